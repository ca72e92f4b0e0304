"""One self-contained page about a run, to send to somebody who was not there.

    python evaluation/report.py --run runs/digits-0.95 --data data/digits-0.95 \\
        --out runs/digits-0.95/results/report.html

Reads what the stages left in RUN: results/, images/, ablations/, clusters/, pseudo/ and every
config.json. Writes the one file OUT, which opens from disk without a network; every text in it is
escaped.
"""

import base64
import sys
from pathlib import Path
from statistics import mean

import jinja2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository
from common import files, imagefolder, stage
from evaluation.images import MEASURES

TODO = "run evaluation/images.py and evaluate.py for this run first"

# --------------------------------------------------------------------------------- the conclusion


def conclude(rows):
    """Which recipe is best, by how much, and is that significant? rows: of intervals.csv."""
    best = rows[0]
    accuracy = interval(best, "worst_group", ".3f")
    text = [f"{best['recipe']} has the best worst-group accuracy, {accuracy}."]
    for name in compared(rows):
        reference = name.removeprefix("vs_")
        if best[name]:
            significant = float(best[f"{name}_low"]) > 0 or float(best[f"{name}_high"]) < 0
            verdict = "significant" if significant else "not significant"
            text.append(f"Difference from {reference}: {interval(best, name, '+.3f')}, {verdict}.")
    ties = [row["recipe"] for row in rows[1:] if float(row["high"]) >= float(best["worst_group"])]
    if ties:
        text.append(f"Recipes whose intervals include its value: {', '.join(ties)}.")
    return " ".join(text)


def interval(row, name, form):
    low, high = row.get(f"{name}_low", row["low"]), row.get(f"{name}_high", row["high"])
    return f"{float(row[name]):{form}} [{float(low):{form}}, {float(high):{form}}]"


# ------------------------------------------------------------------------------------- the tables


def compared(rows):
    """The columns of an intervals.csv that hold differences from a recipe, such as vs_erm."""
    return [name for name in rows[0]
            if f"{name}_low" in rows[0] and any(row[name] for row in rows)]


def recipes_table(rows):
    """The rows of an intervals.csv for people."""
    table = []
    for row in rows:
        line = {"recipe": row["recipe"],
                "worst-group accuracy": interval(row, "worst_group", ".3f"),
                "average-group accuracy": f"{float(row['average_group']):.3f}",
                "group labels": row["group_labels"]}
        for name in compared(rows):
            line[name] = interval(row, name, "+.3f") if row[name] else ""
        table.append(line)
    return table


def accuracies_table(results, images, sizes, titles):
    """The recipes in each group, the rarest first: accuracy, and what their images are like.

    results: folder of evaluate.py; images: of evaluation/images.py, if there is one; sizes: {group:
    training images}.
    """
    measured = files.read_csv(images / "groups.csv", TODO) if images.is_dir() else []
    of_images = {(row["method"], row["group"]): row for row in measured}
    accuracies = {}
    for row in files.read_csv(results / "results.csv", TODO):
        if row["metric"] == "accuracy":
            key = sizes.get(row["group"], 0), row["group"], row["recipe"]
            accuracies.setdefault(key, []).append(float(row["value"]))
    rows = []
    for size, group, recipe in sorted(accuracies, key=lambda key: key[:2]):
        line = {"group": titles.get(group, group), "training images": size, "recipe": recipe,
                "accuracy": f"{mean(accuracies[size, group, recipe]):.3f}"}
        about = next((of_images[name, group] for name in recipe.split("+")
                      if (name, group) in of_images), {})
        for name in ("clusters", "recall", "coverage", "too_near", "leakage", "real_gap"):
            value = about.get(name, "")
            line[name] = f"{float(value):.3f}" if "." in value else value
        rows.append(line)
    return rows


def costs_table(run):
    found = {}
    for path in sorted(run.rglob("config.json")):
        config = files.read_json(path)
        if "seconds" in config:
            name = "/".join(path.relative_to(run).parts[:2])
            line = found.setdefault(name, {"stage": name, "units": 0, "seconds": 0.0,
                                           "peak memory, MB": 0})
            line["units"] += 1
            line["seconds"] += config["seconds"]
            line["peak memory, MB"] = max(line["peak memory, MB"],
                                          config.get("peak_memory_mb", 0))
    return [line | {"seconds": f"{line['seconds']:.0f}"} for line in found.values()]


def settings_of(run):
    """The arguments of each stage, a line each, and the versions of the libraries."""
    lines, versions = [], {}
    for path in sorted([*run.glob("*/config.json"), *run.glob("*/*/config.json")]):
        config = files.read_json(path)
        versions = config.get("versions", versions)
        if "made_by" in config:
            flags = [f"--{name.replace('_', '-')} {value}"
                     for name, value in config["arguments"].items() if value not in (None, [])]
            lines.append(f"{path.parent.relative_to(run)}: {' '.join(flags)}")
    lines.append(" ".join(f"{name} {version}" for name, version in versions.items()))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- the page


def main(argv=None):
    args = parse(argv)
    results, images = args.run / "results", args.run / "images"
    rows = files.read_csv(results / "intervals.csv", TODO)
    everything = imagefolder.read_metadata(args.data)
    titles = imagefolder.group_titles(everything)
    sizes = imagefolder.group_counts(row for row in everything if row["split"] == "train")
    tested, known = (int(part) for part in rows[0]["groups"].split(" of "))
    ablations, clusters = [], {}
    for path in sorted((args.run / "ablations").glob("*/intervals.csv")):
        ablations.append({
            "name": path.parent.name, "recipes": recipes_table(files.read_csv(path, TODO)),
            "figure": path.parent / "worst_group.png",
            "accuracies": accuracies_table(path.parent, args.run / "ablations" / "synthetic",
                                           sizes, titles)})
    for name, title in (("clusters", "each group"), ("pseudo", "all classes")):
        sheets = sorted((args.run / name).glob("*.png"))
        if sheets:
            clusters[title] = sheets
    page = environment().get_template("report.html").render(
        run=args.run.name,
        groups={title: sizes.get(group, 0) for group, title in titles.items()},
        conclusion=conclude(rows), recipes=recipes_table(rows), results=results, images=images,
        collapsed=[row["recipe"] for row in rows if int(row["collapsed"])],
        single=[row["recipe"] for row in rows if row["seeds"] == "1"],
        absent=rows[0]["groups"] if tested < known else "",
        accuracies=accuracies_table(results, images, sizes, titles), explanation=MEASURES,
        measures=files.read_csv(images / "synthetic.csv", TODO) if images.is_dir() else [],
        notes=files.read_json(images / "config.json").get("notes", []),
        ablations=ablations, clusters=clusters, costs=costs_table(args.run),
        settings=settings_of(args.run))
    with files.replacing(args.out) as hidden:
        hidden.write_text(page, encoding="utf-8")


def environment():
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    made = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True,
                              undefined=jinja2.StrictUndefined)
    made.filters["base64"] = lambda path: base64.b64encode(path.read_bytes()).decode()
    return made


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    add = parser.add_argument
    add("--run", type=Path, required=True, help="folder of a run, with its results")
    add("--data", type=Path, required=True, help="real images: a prepared dataset folder")
    add("--out", type=Path, required=True, help="html file to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    stage.run(main)
