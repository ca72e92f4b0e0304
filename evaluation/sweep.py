"""Worst-group accuracy against bias: the results of evaluate.py for several biases.

    python evaluation/sweep.py --results runs/digits-{0.9,0.95,0.99}/results --out runs/digits-sweep

Reads intervals.csv of each results folder. Writes OUT/sweep.csv, OUT/sweep.md, OUT/sweep.png and
OUT/config.json.
"""

import re
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository
from common import files, stage
from evaluation import figures


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    values = {}  # {recipe: {bias: (worst group, low, high)}}
    for results in args.results:
        bias = re.sub(r"-seed\d+$", "", results.parent.name).rsplit("-", 1)[-1]
        path, todo = results / "intervals.csv", "run evaluate.py for this bias first"
        for row in figures.read_intervals(path, todo):
            cell = [float(row[name]) for name in ("worst_group", "low", "high")]
            values.setdefault(row["recipe"], {})[bias] = cell
    biases = sorted({bias for row in values.values() for bias in row},
                    key=lambda text: (text == "natural", text))
    values = dict(sorted(values.items(),
                         key=lambda item: -mean(cell[0] for cell in item[1].values())))
    rows, table = [], []
    for recipe, row in values.items():
        cells = {bias: "{:.3f} [{:.3f}, {:.3f}]".format(*cell) for bias, cell in row.items()}
        table.append([recipe, *(cells.get(bias, "") for bias in biases)])
        for bias, (value, low, high) in row.items():
            rows.append({"recipe": recipe, "bias": bias, "worst_group": value, "low": low,
                         "high": high})
    text = ("Worst-group accuracy and its 95 % interval over test images and seeds or runs, for "
            f"each bias\n\n{figures.markdown_table(['recipe', *biases], table)}")
    with files.replacing(args.out) as out:
        out.mkdir()
        figures.accuracy_against_bias(out / "sweep.png", values, biases)
        files.write_csv(out / "sweep.csv", rows)
        (out / "sweep.md").write_text(text, encoding="utf-8")
        stage.finish(out, args, files.digest(values))
    print(text)
    print(f"Figure: {args.out}/sweep.png")


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    parser.add_argument("--results", type=Path, nargs="+", required=True,
                        help="output folders of evaluate.py, one per bias")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    stage.run(main)
