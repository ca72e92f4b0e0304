"""Stage 5, last: one self-contained page of a run, to send to somebody who was not there.

    python report.py --run runs/digits-0.95 --data data/digits-0.95 --out runs/digits-0.95/results/report.html

Reads what the other stages left in RUN: results/, images/, ablations/, clusters/ and every config.json. Writes the one
file OUT, which opens from disk without a network; every text in it is escaped.
"""

import base64
import html
import json
from pathlib import Path
from statistics import mean
from string import Template

from data import imagefolder as folder
from evaluate import MEASURES

TODO = "run evaluate_images.py and evaluate.py for this run first"
PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; color: #222 }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem } .answer { font-size: 1.2rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
summary { cursor: pointer; margin: .5rem 0 }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap }
img { max-width: 100% } .wide img { max-width: none } pre { overflow-x: auto; background: #f4f4f4; padding: .5rem }
.bad { color: #b00020 }
</style>
<h1>$title</h1>
<p>Does a classifier hold on the group that its training data neglects? Groups and their training images: $groups.</p>
<p class="answer">$answer</p>
$body
</html>
""")

# ----------------------------------------------------------------------------------------------- the answer


def answer(rows):
    """Which recipe wins, by how much, and whether that can be told from chance; rows: of intervals.csv, best first."""
    best = rows[0]
    text = [f"{best['recipe']} has the best worst-group accuracy, {interval(best, 'worst_group', '.3f')}."]
    for reference in ("erm", "groupdro"):
        if best.get(f"vs_{reference}"):
            low, high = (float(best[f"vs_{reference}_{end}"]) for end in ("low", "high"))
            verdict = "a difference" if low > 0 or high < 0 else "which may be chance"
            text.append(f"Against {reference} that is {interval(best, f'vs_{reference}', '+.3f')}, {verdict}.")
    ties = [row["recipe"] for row in rows[1:] if float(row["high"]) >= float(best["worst_group"])]
    if ties:
        text.append(f"Their intervals hold it as well: {', '.join(ties)}.")
    return " ".join(text)


def interval(row, name, form):
    low, high = (row[f"{name}_{end}"] if f"{name}_{end}" in row else row[end] for end in ("low", "high"))
    return f"{float(row[name]):{form}} [{float(low):{form}}, {float(high):{form}}]"


# --------------------------------------------------------------------------------------- pieces of the page


def table(columns, rows):
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f'<div class="wide"><table>{line(columns, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'


def recipes_table(rows):
    """The rows of an intervals.csv: worst-group accuracy, and the difference from each reference that is there."""
    compared = [name for name in rows[0] if f"{name}_low" in rows[0] and any(row[name] for row in rows)]
    return table(["recipe", "worst-group accuracy", *(name.replace("_", " ") for name in compared)], [
        [row["recipe"], interval(row, "worst_group", ".3f"),
         *(interval(row, name, "+.3f") if row[name] else "" for name in compared)] for row in rows])


def groups_table(results, images, sizes):
    """The recipes in each group, the rarest first: their accuracy, and what their synthetic images of it are like.

    results: folder of evaluate.py; images: of evaluate_images.py, if there is one; sizes: {group: training images}.
    """
    measured = folder.read_rows(images / "groups.csv", TODO) if images.is_dir() else []
    of_images = {(row["method"], row["group"]): row for row in measured}
    accuracies = {}
    for row in folder.read_rows(results / "results.csv", TODO):
        if row["metric"] == "accuracy":
            accuracies.setdefault((row["group"], row["recipe"]), []).append(float(row["value"]))
    columns, rows = ("clusters", "recall", "coverage", "too_near"), []
    for group, recipe in sorted(accuracies, key=lambda key: (sizes.get(key[0], 0), key[0])):
        about = [of_images.get((recipe.split("+")[-1], group), {}).get(name, "") for name in columns]
        rows.append([f"{group} ({sizes.get(group, 0)})", recipe, f"{mean(accuracies[group, recipe]):.3f}",
                     *(f"{float(value):.3f}" if "." in value else value for value in about)])
    names = ["group (training images)", "recipe", "accuracy", *(name.replace("_", " ") for name in columns)]
    return f"<details><summary>Group by group, the rarest first</summary>{table(names, rows)}</details>"


def picture(path, wide=True):
    """An image of a run, inside the page; a wide one keeps its size and is scrolled."""
    text = base64.b64encode(path.read_bytes()).decode()
    return (f'<div{" class=wide" * wide}><img alt="{html.escape(path.stem)}" '
            f'src="data:image/png;base64,{text}"></div>')


def section(title, note, *pieces):
    return f"<h2>{html.escape(title)}</h2><p>{html.escape(note)}</p>" + "".join(pieces)


def costs(run):
    """[(stage, parts, seconds, greatest peak of memory in MB)] of what says what it spent."""
    found = {}
    for path in sorted(run.rglob("config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        if "seconds" in config:
            part = found.setdefault("/".join(path.relative_to(run).parts[:2]), [0, 0.0, 0])
            part[:] = part[0] + 1, part[1] + config["seconds"], max(part[2], config.get("peak_memory_mb", 0))
    return [(stage, parts, f"{seconds:.0f}", memory) for stage, (parts, seconds, memory) in found.items()]


def settings(run):
    """The arguments of each stage, a line each, and the versions of the libraries."""
    lines, versions = [], {}
    for path in sorted([*run.glob("*/config.json"), *run.glob("*/*/config.json")]):
        config = json.loads(path.read_text(encoding="utf-8"))
        versions = config.get("versions", versions)
        if "arguments" in config and not path.parent.name.startswith("seed"):
            lines.append(f"{path.parent.relative_to(run)}: " + " ".join(
                f"--{name.replace('_', '-')} {value}" for name, value in config["arguments"].items()
                if value not in (None, [])))
    return "\n".join(dict.fromkeys([*lines, " ".join(f"{name} {version}" for name, version in versions.items())]))


# ------------------------------------------------------------------------------------------------ the stage


def main():
    parser = folder.Arguments(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run, with its results")
    parser.add_argument("--data", type=Path, required=True, help="real images: folder in the one format")
    parser.add_argument("--out", type=Path, required=True, help="html file to write")
    args = parser.parse_args()
    results = args.run / "results"
    rows = folder.read_rows(results / "intervals.csv", TODO)
    groups = folder.group_counts(folder.read_metadata(args.data, "train"))
    collapsed = [row["recipe"] for row in rows if int(row["collapsed"])]
    body = [section("Recipes", "Sorted by worst-group accuracy; in brackets 95 % bootstrap intervals over test images "
                    "and seeds; the differences are paired, on the same test images.",
                    recipes_table(rows),
                    *([f'<p class="bad">Collapsed, a seed or more answers with one class alone: '
                       f'{html.escape(", ".join(collapsed))}</p>'] if collapsed else []),
                    picture(results / "worst_group.png", wide=False),
                    groups_table(results, args.run / "images", groups))]
    if (args.run / "images" / "synthetic.csv").is_file():
        made = folder.read_rows(args.run / "images" / "synthetic.csv", TODO)
        body += [section("Synthetic images", MEASURES, table(list(made[0]), [row.values() for row in made]),
                         picture(results / "images.png")),
                 section("Closest pairs", "The synthetic images nearest to a training image, above that image: are "
                         "they copies?", *(f"<h3>{html.escape(row['method'])}</h3>"
                                      + picture(args.run / "images" / f"{row['method']}.png") for row in made))]
    ablations = sorted(path.parent for path in (args.run / "ablations").glob("*/intervals.csv"))
    if ablations:
        body.append(section("Ablations", "Worst-group accuracy of clustered with one setting changed.", *(
            f"<h3>{html.escape(path.name)}</h3>" + recipes_table(folder.read_rows(path / "intervals.csv", TODO))
            + picture(path / "worst_group.png", wide=False)
            + groups_table(path, args.run / "ablations" / "synthetic", groups) for path in ablations)))
    for name, what in (("clusters", "each group"), ("modes", "each class, across its groups")):
        sheets = sorted((args.run / name).glob("*.png"))
        if sheets:
            body.append(section(f"Clusters of {what}", "A row a cluster.", *(
                f"<h3>{html.escape(path.stem)}</h3>" + picture(path) for path in sheets)))
    body += [section("Cost", "Seconds, and greatest peak of memory of a process.",
                     table(["stage", "parts", "seconds", "peak memory, MB"], costs(args.run))),
             section("Settings", "", f"<pre>{html.escape(settings(args.run))}</pre>")]
    page = PAGE.substitute(title=html.escape(f"Clustered DreamBooth: {args.run.name}"), body="\n".join(body),
                           groups=html.escape(", ".join(f"{group}: {n}" for group, n in groups.items())),
                           answer=html.escape(answer(rows)))
    with folder.replacing(args.out) as hidden:
        hidden.write_text(page, encoding="utf-8")
    print(f"Report: {args.out}")


if __name__ == "__main__":
    folder.run(main)
