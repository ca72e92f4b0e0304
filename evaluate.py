"""Stage 5: worst-group accuracy of every recipe with confidence intervals: tables and figures.

    python evaluate.py --data data/digits-0.95 --synthetic runs/digits-0.95/synthetic/lora \\
        --classifiers runs/digits-0.95/classifiers/{erm,lora} --out runs/digits-0.95/results

Reads the predictions of train_classifier.py, one folder per recipe (from several runs if their
models have other seeds). Writes OUT/results.csv (tidy: recipe, seed, group, metric, value),
OUT/results.md (best worst group first, with 95 % intervals and differences from erm and groupdro on
the same test images), OUT/intervals.csv, OUT/worst_group.png, OUT/images.png (real and synthetic
images side by side) and OUT/config.json. evaluation/images.py measures the images.
"""

import math
from pathlib import Path
from statistics import mean, stdev

from common import files, imagefolder, stage
from common.files import InputError
from evaluation import figures, intervals, own, tables
from evaluation.tables import METRICS, run_of

np = stage.lazy("numpy")

# ------------------------------------------------------------------------------------- the metrics


def metrics(accuracies, train_counts):
    """The metrics of a classifier that depend on its groups' accuracies alone.

    worst_group: the lowest of them (Sagawa et al. 2020); average_group: their plain mean;
    train_weighted: their mean weighted by the groups' training images ("adjusted average accuracy"
    of WILDS and Group-DRO; NaN if no tested group was in training); gap: best group minus worst.
    """
    seen = {group: train_counts.get(group, 0) for group in accuracies}
    total = sum(seen.values())
    weighted = sum(accuracies[group] * n for group, n in seen.items())
    return {
        "worst_group": min(accuracies.values()),
        "average_group": mean(accuracies.values()),
        "train_weighted": weighted / total if total else float("nan"),
        "gap": max(accuracies.values()) - min(accuracies.values()),
    }


def fairness(rows, train_counts):
    """The metrics that need predictions; NaN if not estimable.

    conflicting: accuracy on images whose attribute is not the one most over-represented in their
    class in training (the largest P(a | y) / P(a)). equalised_odds, demographic_parity: largest
    difference between attributes of P(prediction = c | y) and of P(prediction = c), over all
    classes c and y; for two classes they are fairlearn's equalized_odds_difference and
    demographic_parity_difference (Hardt et al. 2016).
    """
    attributes, classes = (sorted({row[label] for row in rows}) for label in "ay")
    correlated = {y: imagefolder.correlated_attribute(train_counts, y) for y in classes}
    conflicting = [row["prediction"] == row["y"] for row in rows
                   if row["a"] != correlated[row["y"]]]
    if len({imagefolder.labels_of(group)[1] for group in train_counts}) < 2:
        conflicting = []  # the training images have no attribute labels

    def difference_of_rates(rows):
        parts = [[row["prediction"] for row in rows if row["a"] == a] for a in attributes]
        if len(parts) < 2 or not all(parts):  # an attribute without images: its rate is unknown
            return float("nan")
        rates = [[part.count(c) / len(part) for part in parts] for c in classes]
        return max(max(of_class) - min(of_class) for of_class in rates)

    odds = [difference_of_rates([row for row in rows if row["y"] == y]) for y in classes]
    return {"conflicting": mean(conflicting) if conflicting else float("nan"),
            "equalised_odds": float("nan") if any(map(math.isnan, odds)) else max(odds),
            "demographic_parity": difference_of_rates(rows)}


def intervals_of(predictions, table, references):
    """{recipe: {"worst_group": (low, high), "vs erm": (difference, low, high), ...}}, at 95 %.

    predictions: {recipe: {seed: rows}}; table: of summary(); references: recipes that the others
    are compared with. A difference is this worst-group accuracy minus the reference's.
    """
    first = next(iter(next(iter(predictions.values())).values()))
    groups = np.unique([imagefolder.group_of(row) for row in first], return_inverse=True)[1]
    measured = {}
    for recipe, seeds in predictions.items():
        correct = [[row["prediction"] == row["y"] for row in rows] for rows in seeds.values()]
        runs = [run_of(seed) for seed in seeds]
        measured[recipe] = intervals.worst_group(np.array(correct), groups, runs)
    found = {recipe: {"worst_group": intervals.interval(values)}
             for recipe, values in measured.items()}
    for recipe in found:
        for reference in references:
            if reference in measured and reference != recipe:
                value = table[recipe]["worst_group"][0] - table[reference]["worst_group"][0]
                limits = intervals.interval(measured[recipe], measured[reference])
                found[recipe][f"vs {reference}"] = (value, *limits)
    return found


# --------------------------------------------------------------------------------- the predictions


def read_predictions(path, split):
    """The rows of one split of a predictions.csv, labels as int."""
    again = "train this recipe again"
    try:
        rows = [row | {name: int(row[name]) for name in ("y", "a", "prediction")}
                for row in files.read_csv(path, again) if row["split"] == split]
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(path, f"cannot be read: {error!r}", again) from None
    if not rows:
        raise InputError(path, f"has no predictions for split {split}", again)
    return rows


def read_recipes(args):
    """({recipe: {seed: rows}}, {recipe: group labels it uses}), all tested on the same images.

    A recipe is known by its folder's name; if that is found in several runs, a seed is called
    <run>/<seed>. Raises InputError unless all were trained on the same data, which is --data.
    """
    names, predictions, tested = [path.name for path in args.classifiers], {}, None
    trained, labels = {}, {}
    for recipe in args.classifiers:
        several = names.count(recipe.name) > 1
        run = f"{recipe.resolve().parent.parent.name}/" if several else ""
        if (recipe / ".stage").is_file() and not (recipe / "config.json").is_file():
            raise InputError(recipe, "is not finished",
                             "run train_classifier.py for this recipe again")
        seeds = [path for path in recipe.glob("seed*") if path.name[4:].isdigit()]
        if not seeds:
            raise InputError(recipe, "contains no seed",
                             "point --classifiers to output folders of train_classifier.py")
        config = files.read_json(recipe / "config.json")
        trained[recipe] = config.get("digests", {}).get("data")
        used = str(config.get("group_labels", "unknown"))
        labels.setdefault(recipe.name, set()).add(used)
        for other in trained:
            if trained[other] != trained[recipe]:
                raise InputError(recipe, f"and {other} were trained on different data",
                                 "train both on --data")
        for seed in sorted(seeds, key=lambda path: int(path.name[4:])):
            name, mine = run + seed.name[4:], predictions.setdefault(recipe.name, {})
            if name in mine:
                raise InputError("--classifiers", f"two {recipe.name} from the same run",
                                 "name each once")
            mine[name] = read_predictions(seed / "predictions.csv", args.split)
            images = [row["file_name"] for row in mine[name]]
            tested = tested or images
            if images != tested:
                raise InputError(seed, "was tested on other images than the first recipe",
                                 "train it again")
    data = None
    if any(trained.values()):
        data = files.digest(*(
            imagefolder.digest(args.data, imagefolder.read_metadata(args.data, split))
            for split in imagefolder.SPLITS))
    if data not in trained.values():
        raise InputError(args.classifiers[0], f"was trained on other data than --data {args.data}",
                         "train it again")
    return predictions, {recipe: " or ".join(sorted(used)) for recipe, used in labels.items()}


def predictions_of_mine(rows, args):
    """The rows of the split with the predictions of the user's own classifier."""
    tested = [row for row in rows if row["split"] == args.split]
    predicted = own.with_predictions(rows, args.mine, args.data, args.image, args.prediction,
                                     args.split)
    predicted = [row for row in predicted if row["split"] == args.split]
    if len(predicted) < len(tested):
        raise InputError(f"--mine {args.mine}", f"has predictions for {len(predicted)} of "
                         f"{len(tested)} images of split {args.split}", "predict all of them")
    return predicted


# ------------------------------------------------------------------------------------- the outputs


def tidy_results(predictions, train_counts):
    """[{recipe, seed, group, metric, value}] of all recipes; "" for what cannot be estimated."""
    rows = []
    for recipe, seeds in predictions.items():
        for seed, predicted in seeds.items():
            accuracies = imagefolder.group_accuracies(
                predicted, [row["prediction"] for row in predicted])
            overall = metrics(accuracies, train_counts) | fairness(predicted, train_counts)
            sizes = imagefolder.group_counts(predicted)
            lines = [("all", *pair) for pair in overall.items()]
            lines += [(group, "accuracy", value) for group, value in accuracies.items()]
            lines += [(group, "images", count) for group, count in sizes.items()]
            for group, metric, value in lines:
                if metric != "images":
                    value = "" if math.isnan(value) else f"{value:.6f}"
                rows.append({"recipe": recipe, "seed": seed, "group": group, "metric": metric,
                             "value": value})
    return rows


def summary(results, keep_order=False):
    """{recipe: {metric or group: (mean, std)}}, best worst group first, or in their order.

    The std is over runs, each the mean of its seeds, or over seeds if there is one run. NaN: not
    estimable, as the std of one.
    """
    values = {}
    for row in results:
        if row["metric"] != "images":
            column = row["metric"] if row["group"] == "all" else row["group"]
            runs = values.setdefault(row["recipe"], {}).setdefault(column, {})
            value = float("nan" if row["value"] == "" else row["value"])
            runs.setdefault(run_of(row["seed"]), []).append(value)
    table = {}
    for recipe, columns in values.items():
        for column, runs in columns.items():
            several = list(runs.values())
            several = list(map(mean, several)) if len(several) > 1 else several[0]
            known = len(several) > 1 and not any(map(math.isnan, several))
            std = stdev(several) if known else float("nan")
            table.setdefault(recipe, {})[column] = (mean(several), std)
    if keep_order:
        return table
    return dict(sorted(table.items(), key=lambda item: -item[1]["worst_group"][0]))


# --------------------------------------------------------------------------------------- the stage


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    predictions, labels = read_recipes(args)
    rows = imagefolder.read_metadata(args.data)
    if args.mine:
        predictions["mine"], labels["mine"] = {"0": predictions_of_mine(rows, args)}, "unknown"
    titles = imagefolder.group_titles(rows)
    train_counts = imagefolder.group_counts(row for row in rows if row["split"] == "train")
    results = tidy_results(predictions, train_counts)
    table = summary(results, args.keep_order)
    found = intervals_of(predictions, table, args.references)
    sizes = imagefolder.group_counts(next(iter(next(iter(predictions.values())).values())))
    titles = {group: group for group in sizes} | titles
    groups = f"{len(sizes)} of {len(titles)}"
    lines = [tables.interval_line(recipe, table[recipe], found[recipe], predictions[recipe],
                                  labels[recipe], args.references, groups) for recipe in table]
    text = tables.markdown(predictions, table, found, lines, rows, titles, sizes, args)
    with files.replacing(args.out) as out:
        out.mkdir()
        files.write_csv(out / "results.csv", results)
        files.write_csv(out / "intervals.csv", lines)
        (out / "results.md").write_text(text, encoding="utf-8")
        figures.worst_group_bars(out / "worst_group.png", table, found, METRICS)
        figures.images_by_group(out / "images.png", titles, args.data, args.synthetic)
        stage.finish(out, args, files.digest(results))
    if args.print:
        print(text)


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="real images: a prepared dataset folder")
    add("--classifiers", type=Path, nargs="+", required=True,
        help="output folders of train_classifier.py")
    add("--synthetic", type=Path, nargs="*", default=[], help="outputs of generate.py to show")
    add("--mine", type=Path, help="a csv with the predictions of a classifier of your own: the row "
        "`mine`")
    own.add_flags(parser)
    add("--references", nargs="+", default=["erm", "groupdro"], metavar="RECIPE",
        help="recipes that the others are compared with")
    add("--keep-order", action=stage.Flag, default=False,
        help="show recipes in the given order, not the best worst group first")
    add("--split", choices=("test", "val"), default="test", help="val: for choosing settings")
    add("--print", action=stage.Flag, default=True, help="print results.md")
    add("--out", type=Path, required=True, help="folder to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    stage.run(main)
