"""Stage 5: worst-group accuracy of every recipe with confidence intervals, as tables, figures and sheets of images.

    python evaluate.py --data data/digits-0.95 --classifiers runs/digits-0.95/classifiers/{erm,lora} \\
        --synthetic runs/digits-0.95/synthetic/lora --out runs/digits-0.95/results

Reads the predictions of train_classifier.py, one folder per recipe (from several runs if their models have other seeds).
Writes OUT/results.csv (tidy: recipe, seed, group, metric, value), OUT/results.md (best worst group first, with 95 %
intervals and differences from erm and groupdro on the same test images), OUT/intervals.csv, OUT/worst_group.png,
OUT/images.png (real and synthetic images side by side) and OUT/config.json. evaluation/images.py measures the images.
"""

import math
from pathlib import Path
from statistics import mean, stdev

from common import files, imagefolder, stage
from common.files import InputError
from evaluation import figures, intervals

np = stage.lazy("numpy")

METRICS = {
    "worst_group": "worst-group accuracy",
    "average_group": "average-group accuracy",
    "train_weighted": "train-weighted accuracy",
    "gap": "gap between groups",
    "conflicting": "bias-conflicting accuracy",
    "equalised_odds": "equalised-odds difference",
    "demographic_parity": "demographic-parity difference",
}

# --------------------------------------------------------------------------------------------- the metrics


def metrics(accuracies, train_counts):
    """The metrics of a classifier that depend on its groups' accuracies alone.

    worst_group: the lowest of them (Sagawa et al. 2020); average_group: their plain mean; train_weighted: their mean
    weighted by the groups' training images ("adjusted average accuracy" of WILDS and Group-DRO; NaN if no tested group was in
    training); gap: best group minus worst.
    """
    seen = {group: train_counts.get(group, 0) for group in accuracies}
    total = sum(seen.values())
    return {
        "worst_group": min(accuracies.values()),
        "average_group": mean(accuracies.values()),
        "train_weighted": sum(accuracies[group] * n for group, n in seen.items()) / total if total else float("nan"),
        "gap": max(accuracies.values()) - min(accuracies.values()),
    }


def fairness(rows, train_counts):
    """The metrics that need predictions: {conflicting, equalised_odds, demographic_parity}; NaN if not estimable.

    conflicting: accuracy on images whose attribute is not the one most over-represented in their class in training (the
    largest P(a | y) / P(a)). equalised_odds, demographic_parity: largest difference between attributes of
    P(prediction = c | y) and of P(prediction = c), over all classes c and y; for two classes they are fairlearn's
    equalized_odds_difference and demographic_parity_difference (Hardt et al. 2016).
    """
    attributes, classes = (sorted({row[label] for row in rows}) for label in "ay")
    correlated = {y: imagefolder.correlated_attribute(train_counts, y) for y in classes}
    conflicting = [row["prediction"] == row["y"] for row in rows if row["a"] != correlated[row["y"]]]
    if len({imagefolder.labels_of(group)[1] for group in train_counts}) < 2:  # the training images have no attribute labels
        conflicting = []

    def difference_of_rates(rows):
        parts = [[row["prediction"] for row in rows if row["a"] == a] for a in attributes]
        if len(parts) < 2 or not all(parts):  # an attribute without images: its rate is unknown
            return float("nan")
        return max(max(rates) - min(rates) for rates in (
            [part.count(c) / len(part) for part in parts] for c in classes))

    odds = [difference_of_rates([row for row in rows if row["y"] == y]) for y in classes]
    return {"conflicting": mean(conflicting) if conflicting else float("nan"),
            "equalised_odds": float("nan") if any(map(math.isnan, odds)) else max(odds),
            "demographic_parity": difference_of_rates(rows)}


def intervals_of(predictions, table, references):
    """{recipe: {"worst_group": (low, high), "vs erm": (difference, low, high), ...}}, all at 95 %.

    predictions: {recipe: {seed: rows}}; table: of summary(); references: recipes that the others are compared with. A
    difference is this recipe's worst-group accuracy minus the reference's.
    """
    first = next(iter(next(iter(predictions.values())).values()))
    groups = np.unique([imagefolder.group_of(row) for row in first], return_inverse=True)[1]
    measured = {recipe: intervals.worst_group(
        np.array([[row["prediction"] == row["y"] for row in rows] for rows in seeds.values()]), groups,
        [run_of(seed) for seed in seeds]) for recipe, seeds in predictions.items()}
    found = {recipe: {"worst_group": intervals.interval(values)} for recipe, values in measured.items()}
    for recipe in found:
        for reference in references:
            if reference in measured and reference != recipe:
                difference = table[recipe]["worst_group"][0] - table[reference]["worst_group"][0]
                found[recipe][f"vs {reference}"] = (
                    difference, *intervals.interval(measured[recipe], measured[reference]))
    return found


# ------------------------------------------------------------------------------------------- the predictions


def read_predictions(path, split):
    """The rows of one split of a predictions.csv, labels as int."""
    again = "train this recipe again"
    try:
        rows = [dict(row, y=int(row["y"]), a=int(row["a"]), prediction=int(row["prediction"]))
                for row in files.read_csv(path, again) if row["split"] == split]
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(path, f"cannot be read: {error!r}", again) from None
    if not rows:
        raise InputError(path, f"has no predictions for split {split}", again)
    return rows


def read_recipes(args):
    """{recipe: {seed: rows}}, all for the same images and trained on the same data, and {recipe: group labels it uses}.

    A recipe is known by its folder's name; if that is found in several runs, a seed is called <run>/<seed>.
    """
    names, predictions, tested, trained, labels = [path.name for path in args.classifiers], {}, None, {}, {}
    for recipe in args.classifiers:
        run = f"{recipe.resolve().parent.parent.name}/" if names.count(recipe.name) > 1 else ""
        if (recipe / ".stage").is_file() and not (recipe / "config.json").is_file():
            raise InputError(recipe, "is not finished", "run train_classifier.py for this recipe again")
        seeds = sorted((path for path in recipe.glob("seed*") if path.name[4:].isdigit()),
                       key=lambda path: int(path.name[4:]))
        if not seeds:
            raise InputError(recipe, "contains no seed", "point --classifiers to output folders of train_classifier.py")
        config = files.read_json(recipe / "config.json")
        trained[recipe] = config.get("digests", {}).get("data")
        labels.setdefault(recipe.name, set()).add(str(config.get("group_labels", "unknown")))
        other = next((path for path in trained if trained[path] != trained[recipe]), None)
        if other:
            raise InputError(recipe, f"and {other} were trained on different data", "train both on --data")
        for seed in seeds:
            name = run + seed.name[4:]
            if name in predictions.setdefault(recipe.name, {}):
                raise InputError("--classifiers", f"two {recipe.name} from the same run", "name each once")
            rows = predictions[recipe.name][name] = read_predictions(seed / "predictions.csv", args.split)
            images = [row["file_name"] for row in rows]
            if images != (tested := tested or images):
                raise InputError(seed, "was tested on other images than the first recipe", "train it again")
    data = files.digest(*(imagefolder.digest(args.data, imagefolder.read_metadata(args.data, split))
                          for split in imagefolder.SPLITS)) if any(trained.values()) else None
    if data not in trained.values():
        raise InputError(args.classifiers[0], f"was trained on other data than --data {args.data}", "train it again")
    return predictions, {recipe: " or ".join(sorted(used)) for recipe, used in labels.items()}


def run_of(seed):
    """The run of a seed called <run>/<seed>, else an empty string."""
    return seed.rpartition("/")[0]


# ---------------------------------------------------------------------------------------------- the outputs


def tidy_results(predictions, train_counts):
    """[{recipe, seed, group, metric, value}] of all recipes; a value that cannot be estimated is empty."""
    rows = []
    for recipe, seeds in predictions.items():
        for seed, predicted in seeds.items():
            accuracies = imagefolder.group_accuracies(predicted, [row["prediction"] for row in predicted])
            counts = imagefolder.group_counts(predicted)
            rows += [[recipe, seed, "all", *pair] for pair in
                     (metrics(accuracies, train_counts) | fairness(predicted, train_counts)).items()]
            rows += [[recipe, seed, group, "accuracy", value] for group, value in accuracies.items()]
            rows += [[recipe, seed, group, "images", count] for group, count in counts.items()]
    return [{"recipe": recipe, "seed": seed, "group": group, "metric": metric,
             "value": value if metric == "images" else "" if math.isnan(value) else f"{value:.6f}"}
            for recipe, seed, group, metric, value in rows]


def summary(results, keep_order=False):
    """{recipe: {metric or group: (mean, std)}}, best worst-group accuracy first, or in the order of results.

    The std is over runs, each the mean of its seeds, or over seeds if there is one run. NaN: not estimable, as the std of one.
    """
    values = {}
    for row in results:
        if row["metric"] != "images":
            column = row["metric"] if row["group"] == "all" else row["group"]
            runs = values.setdefault(row["recipe"], {}).setdefault(column, {})
            runs.setdefault(run_of(row["seed"]), []).append(float("nan" if row["value"] == "" else row["value"]))
    table = {}
    for recipe, columns in values.items():
        for column, runs in columns.items():
            several = [mean(seeds) for seeds in runs.values()] if len(runs) > 1 else next(iter(runs.values()))
            table.setdefault(recipe, {})[column] = (mean(several), stdev(several) if len(several) > 1 else float("nan"))
    return table if keep_order else dict(sorted(table.items(), key=lambda item: -item[1]["worst_group"][0]))


def interval_line(recipe, row, found, seeds, labels, references, groups):
    """A row of intervals.csv. collapsed: how many seeds predict a single class; groups: tested, of all in the data."""
    collapsed = sum(len({row["prediction"] for row in rows}) == 1 for rows in seeds.values())
    line = {"recipe": recipe, "group_labels": labels, "seeds": len(seeds), "collapsed": collapsed, "groups": groups,
            "average_group": row["average_group"][0], "worst_group": row["worst_group"][0],
            **dict(zip(("low", "high"), found["worst_group"]))}
    for reference in references:
        values = found.get(f"vs {reference}", ("", "", ""))
        line |= dict(zip((f"vs_{reference}", f"vs_{reference}_low", f"vs_{reference}_high"), values))
    return {key: f"{value:.6f}" if isinstance(value, float) else value for key, value in line.items()}


def latex(table, found):
    """The first table as LaTeX, for a paper that uses booktabs."""
    lines = [f"{recipe} & ${plus_minus(*row['worst_group'])}$ & ".replace("±", r"\pm") +
             "$[{:.3f}, {:.3f}]$".format(*found[recipe]["worst_group"]) + f" & ${row['average_group'][0]:.3f}$ \\\\"
             for recipe, row in table.items()]
    return "\n".join([r"\begin{tabular}{lccc}", r"\toprule",
                      r"Recipe & Worst-group accuracy & 95\,\% interval & Average-group accuracy \\", r"\midrule", *lines,
                      r"\bottomrule", r"\end{tabular}", ""]).replace("_", r"\_")


def averaged_over(predictions):
    """What means and stds are over: `3 seeds`, or `1 or 3 runs (...)`."""
    seeds = {len(seeds) for seeds in predictions.values()}
    runs = {len(set(map(run_of, seeds))) for seeds in predictions.values()}
    if runs == {1}:
        return " or ".join(map(str, sorted(seeds))) + (" seed" if seeds == {1} else " seeds")
    return " or ".join(map(str, sorted(runs))) + " runs with other models (one run: over its seeds)"


def markdown(table, found, labels, sizes, titles, args, over):
    """The two tables of results.md. sizes: {group: images of the split}; titles: {group: name}."""
    compared = [column for column in (f"vs {reference}" for reference in args.references)
                if any(column in row for row in found.values())]
    text = (f"Accuracy on {args.split}: mean ± std over {over}. In brackets: 95 % intervals over {args.split} images and "
            f"{'runs' if 'runs' in over else 'seeds'}. Bold: significantly different from zero. Group labels: the images "
            "whose group (attribute) the recipe uses.\n\n")
    text += figures.markdown_table(["recipe", "worst-group accuracy", "95 % interval", METRICS["average_group"], "group labels",
                            *compared], [
        [recipe, plus_minus(*row["worst_group"]), "[{:.3f}, {:.3f}]".format(*found[recipe]["worst_group"]),
         plus_minus(*row["average_group"]), labels[recipe],
         *(difference(found[recipe].get(column)) for column in compared)] for recipe, row in table.items()])
    columns = [column for column in next(iter(table.values())) if column not in ("worst_group", "average_group")]
    names = [METRICS.get(column) or f"{titles[column]}, {sizes[column]} images" for column in columns]
    text += "\n" + figures.markdown_table(["recipe", *names], [
        [recipe, *(plus_minus(*row[column]) for column in columns)] for recipe, row in table.items()])
    if len({imagefolder.labels_of(group)[1] for group in titles}) == 1:
        text += "\nThe data have no attribute labels: each class is one group, and the worst group is the worst class.\n"
    absent = [title for group, title in titles.items() if group not in sizes]
    if absent:
        text += (f"\n**Not estimated**: {', '.join(absent)} {'has' if len(absent) == 1 else 'have'} no {args.split} "
                 f"images. The worst group is the worst of {len(sizes)} of {len(titles)} groups.\n")
    return text


def plus_minus(value, std):
    return "n/a" if math.isnan(value) else f"{value:.3f}" if math.isnan(std) else f"{value:.3f} ± {std:.3f}"


def difference(values):
    if values is None:
        return ""
    text = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*values)
    return f"**{text}**" if values[1] > 0 or values[2] < 0 else text


# ------------------------------------------------------------------------------------------------ the stage


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    predictions, labels = read_recipes(args)
    rows = imagefolder.read_metadata(args.data)
    titles = imagefolder.group_titles(rows)
    results = tidy_results(predictions, imagefolder.group_counts(row for row in rows if row["split"] == "train"))
    table = summary(results, args.keep_order)
    found = intervals_of(predictions, table, args.references)
    sizes = imagefolder.group_counts(next(iter(next(iter(predictions.values())).values())))
    titles = {group: group for group in sizes} | titles
    with files.replacing(args.out) as out:
        out.mkdir()
        files.write_csv(out / "results.csv", results)
        lines = [interval_line(recipe, table[recipe], found[recipe], predictions[recipe], labels[recipe],
                               args.references, f"{len(sizes)} of {len(titles)}") for recipe in table]
        files.write_csv(out / "intervals.csv", lines)
        text = markdown(table, found, labels, sizes, titles, args, averaged_over(predictions))
        text += "".join(f"\n**Collapsed**: {line['collapsed']} of {line['recipe']}'s classifiers predict a single class.\n"
                        for line in lines if line["collapsed"])
        single = [line["recipe"] for line in lines if line["seeds"] == 1]
        if single:
            text += (f"\n**One seed**: {', '.join(single)}. Intervals of these recipes, and differences from them, cover "
                     f"other {args.split} images only, not other seeds.\n")
        if args.latex:
            (out / "results.tex").write_text(latex(table, found), encoding="utf-8")
        (out / "results.md").write_text(text, encoding="utf-8")
        figures.worst_group_bars(out / "worst_group.png", table, found, METRICS)
        figures.images_by_group(out / "images.png", titles, args.data, args.synthetic)
        stage.finish(out, args, files.digest(results))
    if args.print:
        print(text)


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    parser.add_argument("--data", type=Path, required=True, help="real images: a prepared dataset folder")
    parser.add_argument("--classifiers", type=Path, nargs="+", required=True, help="output folders of train_classifier.py")
    parser.add_argument("--synthetic", type=Path, nargs="*", default=[], help="output folders of generate.py to show")
    parser.add_argument("--references", nargs="+", default=["erm", "groupdro"], metavar="RECIPE",
                        help="recipes that the others are compared with")
    parser.add_argument("--keep-order", action=stage.Flag, default=False,
                        help="show recipes in the given order, not the best worst group first")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="val: for choosing settings")
    parser.add_argument("--print", action=stage.Flag, default=True, help="print results.md")
    parser.add_argument("--latex", action=stage.Flag, default=False, help="write results.tex as well")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    stage.run(main)
