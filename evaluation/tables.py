"""The tables of stage 5: results.md, intervals.csv and LaTeX."""

import math
from statistics import mean

from common import files, imagefolder
from evaluation import figures

METRICS = {
    "worst_group": "worst-group accuracy",
    "average_group": "average-group accuracy",
    "train_weighted": "train-weighted accuracy",
    "gap": "gap between groups",
    "conflicting": "bias-conflicting accuracy",
    "equalised_odds": "equalised-odds difference",
    "demographic_parity": "demographic-parity difference",
}


def run_of(seed):
    """The run of a seed called <run>/<seed>, else an empty string."""
    return seed.rpartition("/")[0]


def interval_line(recipe, row, found, seeds, labels, references, groups):
    """A row of intervals.csv. collapsed: how many seeds predict a single class."""
    collapsed = sum(len({row["prediction"] for row in rows}) == 1 for rows in seeds.values())
    low, high = found["worst_group"]
    line = {"recipe": recipe, "group_labels": labels, "seeds": len(seeds), "collapsed": collapsed,
            "groups": groups, "average_group": row["average_group"][0],
            "worst_group": row["worst_group"][0], "low": low, "high": high}
    for reference in references:
        values = found.get(f"vs {reference}", ("", "", ""))
        for end, value in zip(("", "_low", "_high"), values):
            line[f"vs_{reference}{end}"] = value
    return {key: f"{value:.6f}" if isinstance(value, float) else value
            for key, value in line.items()}


def averaged_over(predictions):
    """What means and stds are over: `3 seeds`, or `1 or 3 runs (...)`."""
    seeds = {len(seeds) for seeds in predictions.values()}
    runs = {len(set(map(run_of, seeds))) for seeds in predictions.values()}
    if runs == {1}:
        return " or ".join(map(str, sorted(seeds))) + (" seed" if seeds == {1} else " seeds")
    return f"{' or '.join(map(str, sorted(runs)))} runs with other models (one run: over its seeds)"


def markdown(predictions, table, found, lines, rows, titles, sizes, args):
    """results.md. table, found: of evaluate.summary() and intervals_of(); lines: of intervals.csv.

    rows: of DATA's metadata; titles, sizes: {group: its name, number of images}.
    """
    over = averaged_over(predictions)
    labels = {line["recipe"]: line["group_labels"] for line in lines}
    compared = [f"vs {reference}" for reference in args.references
                if any(f"vs {reference}" in row for row in found.values())]
    text = (f"Accuracy on {args.split}: mean ± std over {over}. In brackets: 95 % intervals over "
            f"{args.split} images and {'runs' if 'runs' in over else 'seeds'}. Bold: significantly "
            "different from zero. Group labels: the images whose group (attribute) the recipe "
            "uses.\n\n")
    first = []
    for recipe, row in table.items():
        limits = "[{:.3f}, {:.3f}]".format(*found[recipe]["worst_group"])
        differences = [difference(found[recipe].get(column)) for column in compared]
        first.append([recipe, plus_minus(*row["worst_group"]), limits,
                      plus_minus(*row["average_group"]), labels[recipe], *differences])
    text += figures.markdown_table(["recipe", "worst-group accuracy", "95 % interval",
                                    METRICS["average_group"], "group labels", *compared], first)
    columns = [column for column in next(iter(table.values()))
               if column not in ("worst_group", "average_group")]
    names = [METRICS.get(column) or f"{titles[column]}, {sizes[column]} images"
             for column in columns]
    second = [[recipe, *(plus_minus(*row[column]) for column in columns)]
              for recipe, row in table.items()]
    text += "\n" + figures.markdown_table(["recipe", *names], second)
    if len({imagefolder.labels_of(group)[1] for group in titles}) == 1:
        text += ("\nThe data have no attribute labels: each class is one group, and the worst "
                 "group is the worst class.\n")
    absent = [title for group, title in titles.items() if group not in sizes]
    if absent:
        text += (f"\n**Not estimated**: {', '.join(absent)} {'has' if len(absent) == 1 else 'have'}"
                 f" no {args.split} images. The worst group is the worst of {len(sizes)} of "
                 f"{len(titles)} groups.\n")
    columns = files.read_json(args.data / "config.json").get("arguments", {}).get("a")
    if isinstance(columns, list) and len(columns) > 1:  # groups are their combinations
        text += "\n" + attributes_table(predictions, rows, columns)
    for line in lines:
        if line["collapsed"]:
            text += (f"\n**Collapsed**: {line['collapsed']} of {line['recipe']}'s classifiers "
                     "predict a single class.\n")
    single = [line["recipe"] for line in lines if line["seeds"] == 1]
    if single:
        text += (f"\n**One seed**: {', '.join(single)}. Intervals of these recipes, and "
                 f"differences from them, cover other {args.split} images only, not other seeds.\n")
    return text


def attributes_table(predictions, rows, columns):
    """A table in markdown: of each recipe and attribute the lowest accuracy of a class and value.

    predictions: {recipe: {seed: rows with file_name, y, prediction}}; rows: of metadata. An
    accuracy is the mean over seeds.
    """
    known = {row["file_name"]: row for row in rows}
    lines = []
    for recipe, seeds in predictions.items():
        line = [recipe]
        for column in columns:
            shares = {}
            for predicted in seeds.values():
                correct = {}
                for row in predicted:
                    part = f"class {row['y']}, {column} {known[row['file_name']][column]}"
                    correct.setdefault(part, []).append(row["prediction"] == row["y"])
                for part, hits in correct.items():
                    shares.setdefault(part, []).append(mean(hits))
            worst = min(shares, key=lambda part: mean(shares[part]))
            line.append(f"{mean(shares[worst]):.3f} ({worst})")
        lines.append(line)
    heads = ["recipe", *(f"worst by {column} alone" for column in columns)]
    return figures.markdown_table(heads, lines)


def plus_minus(value, std):
    if math.isnan(value):
        return "n/a"
    return f"{value:.3f}" if math.isnan(std) else f"{value:.3f} ± {std:.3f}"


def difference(values):
    if values is None:
        return ""
    text = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*values)
    return f"**{text}**" if values[1] > 0 or values[2] < 0 else text
