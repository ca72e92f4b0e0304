"""Our results beside the paper's, and a verdict on each claim of its abstract.

    python evaluation/paper.py --results runs/digits-0.95/results runs/digits-0.99/results \\
        --out runs/digits-paper

Reads intervals.csv of each results folder, of which evaluate.py must have compared recipes with
vanilla, groupdro and dreambooth; the first is the original bias, the last the severe one. Writes
OUT/paper.md and OUT/config.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository
from common import files, stage
from evaluation import figures

# Basu et al., AAAI 2026: worst-group / average-group accuracy in percent, original and at bias
# 0.999, of Waterbirds, CelebA and UTKFace.
PAPER = """
erm        | 63.7 / 88.0 | 29.0 / 66.7 | 47.8 / 94.9 | 31.7 / 67.3 | 74.3 / 84.5 | 31.0 / 48.9
ffr        | 69.5 / 84.0 | 57.3 / 84.2 | 68.9 / 85.7 | 22.8 / 47.7 | 67.4 / 81.4 | 55.0 / 68.0
vanilla    | 74.6 / 80.5 | 69.9 / 80.1 | 76.4 / 84.2 | 77.1 / 84.7 | 62.0 / 83.3 | 67.8 / 82.7
lora       | 86.5 / 89.9 | 61.5 / 84.0 | 82.3 / 87.2 | 73.5 / 83.2 | 68.6 / 85.6 | 64.5 / 82.4
dreambooth | 89.3 / 90.1 | 82.4 / 88.3 | 82.1 / 87.9 | 78.8 / 84.6 | 57.9 / 80.9 | 66.9 / 77.1
clustered  | 88.1 / 90.2 | 84.2 / 88.5 | 84.1 / 88.4 | 81.8 / 85.9 | 76.0 / 83.5 | 60.5 / 80.8
groupdro   | 91.4 / 93.5 | 23.5 / 65.5 | 88.9 / 92.9 | 27.2 / 75.2 | 81.6 / 85.9 | 30.5 / 50.3
self       | 93.0 / 94.0 | 25.5 / 64.2 | 83.9 / 91.1 | 45.6 / 95.4 | 65.9 / 82.3 | 0.6 / 50.5
"""
COLUMNS = [f"{data}, paper{bias}" for data in ("Waterbirds", "CelebA", "UTKFace")
           for bias in ("", " at 0.999")]
CLAIMS = [  # (the claim, recipe, reference, at which bias, what would confirm it)
    ("fine-tuned models beat the base model", "lora", "vanilla", "each", "better"),
    ("fine-tuned models beat the base model", "dreambooth", "vanilla", "each", "better"),
    ("fine-tuned models beat the base model", "clustered", "vanilla", "each", "better"),
    ("level with Group-DRO on the original bias", "clustered", "groupdro", "first", "level"),
    ("ahead of Group-DRO as the bias grows", "clustered", "groupdro", "last", "better"),
    ("clusters beat one DreamBooth per group", "clustered", "dreambooth", "each", "better"),
]


def verdict(row, reference, wanted):
    """(difference with its interval, what it says of the claim); row: of an intervals.csv."""
    value, low, high = (float(row[f"vs_{reference}{end}"]) for end in ("", "_low", "_high"))
    found = "better" if low > 0 else "worse" if high < 0 else "level"
    word = "not significant" if found == "level" else f"no: significantly {found}"
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]", "yes" if found == wanted else word


def cell(row):
    if not row:
        return ""
    names = ("worst_group", "average_group", "low", "high")
    return "{:.3f} / {:.3f} [{:.3f}, {:.3f}]".format(*(float(row[name]) for name in names))


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    todo, found = "run evaluate.py with --references vanilla groupdro dreambooth for this run", {}
    for results in args.results:
        rows = figures.read_intervals(results / "intervals.csv", f"{todo} first")
        found[results.parent.name] = {row["recipe"]: row for row in rows}
    runs = list(found)
    severe, recipes = found[runs[-1]], dict.fromkeys(name for run in runs for name in found[run])
    recipes = sorted(recipes, key=lambda name: -float(severe[name]["worst_group"])
                     if name in severe else 0)
    paper = {line.split()[0]: line.split(" | ")[1:] for line in PAPER.strip().splitlines()}
    ours, claims = [], []
    for name in recipes:
        row = next(rows[name] for rows in [severe, *found.values()] if name in rows)
        ours.append([name, *(cell(found[run].get(name)) for run in runs), row["group_labels"],
                     *paper.get(name, [""] * 6)])
    for claim, name, reference, where, wanted in CLAIMS:
        for run in {"first": runs[:1], "last": runs[-1:], "each": runs}[where]:
            row = found[run].get(name, {})
            if row.get(f"vs_{reference}"):
                what = f"{name} - {reference}"
                claims.append([claim, run, what, *verdict(row, reference, wanted)])
    text = ("Worst-group / average-group accuracy: ours, with the 95 % interval of the former, and "
            "the paper's in percent.\n\n"
            + figures.markdown_table(["recipe", *runs, "group labels", *COLUMNS], ours)
            + "\nThe claims of the paper's abstract, in worst-group accuracy.\n\n"
            + figures.markdown_table(["claim", "run", "difference", "with its 95 % interval",
                                      "holds"], claims))
    with files.replacing(args.out) as out:
        out.mkdir()
        (out / "paper.md").write_text(text, encoding="utf-8")
        stage.finish(out, args, files.digest(text))
    print(text)


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    parser.add_argument("--results", type=Path, nargs="+", required=True,
                        help="output folders of evaluate.py, least bias first")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    stage.run(main)
