"""Stage 5: worst-group accuracy of every recipe, as a table, a figure and a sheet of images.

    python evaluate.py --data data/digits-0.95 --classifiers runs/digits-0.95/classifiers/{erm,lora} \\
        --synthetic runs/digits-0.95/synthetic/lora --out runs/digits-0.95/results

Reads the predictions of train_classifier.py, one folder a recipe, and looks at the images of --split.
Writes OUT/results.csv (tidy: recipe, seed, group, metric, value), OUT/results.md (mean and standard deviation over
seeds, best worst group first), OUT/worst_group.png, OUT/images.png (real and synthetic images side by side) and
OUT/config.json; prints the table.
"""

import csv
from pathlib import Path
from statistics import mean, stdev

from data import imagefolder as folder

METRICS = {
    "worst_group": "worst-group accuracy",
    "mean_group": "mean group accuracy",
    "train_weighted": "train-weighted accuracy",
}

# --------------------------------------------------------------------------------------------- the metrics


def group_accuracies(rows):
    """{group: share of its images whose prediction is y}, sorted by (y, a)."""
    sizes = folder.group_counts(rows)
    hits = folder.group_counts(row for row in rows if row["prediction"] == row["y"])
    return {group: hits.get(group, 0) / size for group, size in sizes.items()}


def metrics(accuracies, train_counts):
    """The accuracies of a classifier that need every group.

    worst_group: the least of the groups' (Sagawa et al. 2020); mean_group: their plain mean; train_weighted: their
    mean weighted by the groups' training images ("adjusted average accuracy" of WILDS and Group-DRO).
    """
    seen = {group: train_counts.get(group, 0) for group in accuracies}
    return {
        "worst_group": min(accuracies.values()),
        "mean_group": mean(accuracies.values()),
        "train_weighted": sum(accuracies[group] * n for group, n in seen.items()) / sum(seen.values()),
    }


def read_predictions(path, split):
    """The rows of one split of a predictions.csv, labels as int."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [dict(row, y=int(row["y"]), a=int(row["a"]), prediction=int(row["prediction"]))
                    for row in csv.DictReader(file) if row["split"] == split]
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise folder.InputError(path, f"can't be read: {error}", "train this recipe again") from None
    if not rows:
        raise folder.InputError(path, f"no predictions for split {split}", "train this recipe again")
    return rows


# ---------------------------------------------------------------------------------------------- the outputs


def tidy_results(args, train_counts):
    """[{recipe, seed, group, metric, value}] of all recipes."""
    rows, tested = [], None
    if len({recipe.name for recipe in args.classifiers}) < len(args.classifiers):
        raise folder.InputError("--classifiers", "two have the same name", "a recipe is known by its folder's name")
    for recipe in args.classifiers:
        seeds = sorted(recipe.glob("seed*"), key=lambda path: int(path.name[4:]))
        if not seeds:
            raise folder.InputError(recipe, "holds no seed", "point --classifiers to OUTs of train_classifier.py")
        for seed in seeds:
            predictions = read_predictions(seed / "predictions.csv", args.split)
            names = [row["file_name"] for row in predictions]
            if names != (tested := tested or names):
                raise folder.InputError(seed, "was tested on other images than the first recipe", "train it again")
            accuracies = group_accuracies(predictions)
            for metric, value in metrics(accuracies, train_counts).items():
                rows.append([recipe.name, seed.name[4:], "all", metric, value])
            rows += [[recipe.name, seed.name[4:], group, "accuracy", value] for group, value in accuracies.items()]
    return [dict(zip(("recipe", "seed", "group", "metric", "value"), (*row[:4], f"{row[4]:.6f}"))) for row in rows]


def summary(results):
    """{recipe: {metric or group: (mean, deviation over seeds)}}, the best worst-group accuracy first."""
    values = {}
    for row in results:
        column = row["metric"] if row["group"] == "all" else row["group"]
        values.setdefault(row["recipe"], {}).setdefault(column, []).append(float(row["value"]))
    table = {recipe: {column: (mean(seeds), stdev(seeds) if len(seeds) > 1 else 0.0)
                      for column, seeds in columns.items()} for recipe, columns in values.items()}
    return dict(sorted(table.items(), key=lambda item: -item[1]["worst_group"][0]))


def markdown(table, seeds, split):
    columns = list(next(iter(table.values())))
    lines = [f"Accuracy on {split}, mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}; best worst-group "
             "accuracy first. Group y1-a0: class 1 with attribute 0.", "",
             "| recipe | " + " | ".join(METRICS.get(column, column) for column in columns) + " |",
             "| --- |" + " --- |" * len(columns)]
    lines += [f"| {recipe} | " + " | ".join(f"{m:.3f} ± {s:.3f}" for m, s in row.values()) + " |"
              for recipe, row in table.items()]
    return "\n".join(lines) + "\n"


def save_figure(path, table):
    """Worst-group accuracy a recipe, with the deviation over seeds, and a dot a group."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 0.45 * len(table) + 1.2), layout="constrained")
    for place, (recipe, row) in enumerate(reversed(table.items())):
        axes.barh(place, row["worst_group"][0], xerr=row["worst_group"][1], color="#4c72b0", ecolor="black", capsize=3)
        groups = [value for column, (value, _) in row.items() if column not in METRICS]
        axes.plot(groups, [place] * len(groups), "o", color="#dd8452", markersize=4, zorder=3,
                  label="each group" if place == 0 else None)
    axes.set(yticks=range(len(table)), yticklabels=list(reversed(table)), xlim=(0, 1),
             xlabel="worst-group accuracy (bar: mean, whisker: deviation over seeds)")
    figure.legend(loc="outside upper right")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def save_images(path, args):
    """A row of 16 images a group and source: real training images, then each synthetic set."""
    lines, labels = [], []
    sources = {"real": args.data} | {source.name: source for source in args.synthetic}
    rows = {name: folder.read_metadata(source, "train") for name, source in sources.items()}
    groups = sorted({group for part in rows.values() for group in folder.group_counts(part)})
    for group in groups:
        for name, source in sources.items():
            members = [row for row in rows[name] if folder.group_of(row) == group]
            chosen = members[::max(1, len(members) // 16)][:16]
            lines.append([folder.load_image(source / row["file_name"], 64) for row in chosen])
            labels.append(f"{group} {name}")
    folder.contact_sheet(lines, labels).save(path)


def main():
    parser = folder.Arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="real images: folder in the one format")
    parser.add_argument("--classifiers", type=Path, nargs="+", required=True, help="OUTs of train_classifier.py")
    parser.add_argument("--synthetic", type=Path, nargs="*", default=[], help="OUTs of generate.py to show")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="val: for choosing settings")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    results = tidy_results(args, folder.group_counts(folder.read_metadata(args.data, "train")))
    table = summary(results)
    seeds = max(len(list(recipe.glob("seed*"))) for recipe in args.classifiers)
    with folder.replacing(args.out) as out:
        out.mkdir()
        folder.write_csv(out / "results.csv", results)
        (out / "results.md").write_text(markdown(table, seeds, args.split), encoding="utf-8")
        save_figure(out / "worst_group.png", table)
        save_images(out / "images.png", args)
        folder.write_config(out, args, folder.digest(results))
    print((args.out / "results.md").read_text(encoding="utf-8"))
    print(f"Pictures: {args.out}/worst_group.png, {args.out}/images.png", *(f"{s}/*.png" for s in args.synthetic),
          sep=", ")


if __name__ == "__main__":
    folder.run(main)
