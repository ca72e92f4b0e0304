"""Stage 5: worst-group accuracy of every recipe with intervals, as tables, figures and sheets of images.

    python evaluate.py --data data/digits-0.95 --classifiers runs/digits-0.95/classifiers/{erm,lora} \\
        --synthetic runs/digits-0.95/synthetic/lora --images runs/digits-0.95/images --out runs/digits-0.95/results
    python evaluate.py --sweep runs/digits-{0.9,0.95,0.99}/results --out runs/digits-sweep

Reads the predictions of train_classifier.py, one folder a recipe (of several runs, where their models have other
seeds), and what evaluate_images.py says of the synthetic images.
Writes OUT/results.csv (tidy: recipe, seed, group, metric, value), OUT/results.md (best worst group first, with
95 % bootstrap intervals and the differences from erm and groupdro on the same test images), OUT/cost.md (of the
synthetic images), OUT/intervals.csv, OUT/worst_group.png, OUT/images.png (real and synthetic images side by side) and
OUT/config.json; prints the tables.
With --sweep, the results of several biases side by side: OUT/sweep.csv, OUT/sweep.md, OUT/sweep.png.
"""

from pathlib import Path
from statistics import mean, stdev

from data import imagefolder as folder

METRICS = {
    "worst_group": "worst-group accuracy",
    "mean_group": "mean group accuracy",
    "train_weighted": "train-weighted accuracy",
    "gap": "gap",
    "conflicting": "bias-conflicting accuracy",
    "equalised_odds": "equalised-odds difference",
    "demographic_parity": "demographic-parity difference",
}
MEASURES = (  # of the synthetic sets, in evaluate_images.py's synthetic.csv
    "Means over groups: share of the drawn images that was rejected, kernel distance to held-out real images in CLIP "
    "space, coverage of them, share too near to a training image (0.01 is chance); shares that show the class and the "
    "attribute that they claim.")

# --------------------------------------------------------------------------------------------- the metrics


def metrics(accuracies, train_counts):
    """The accuracies of a classifier that need every group.

    worst_group: the least of the groups' (Sagawa et al. 2020); mean_group: their plain mean; train_weighted: their
    mean weighted by the groups' training images ("adjusted average accuracy" of WILDS and Group-DRO); gap: best group
    less worst.
    """
    seen = {group: train_counts.get(group, 0) for group in accuracies}
    return {
        "worst_group": min(accuracies.values()),
        "mean_group": mean(accuracies.values()),
        "train_weighted": sum(accuracies[group] * n for group, n in seen.items()) / sum(seen.values()),
        "gap": max(accuracies.values()) - min(accuracies.values()),
    }


def fairness(rows, train_counts):
    """The measures that need predictions: {conflicting, equalised_odds, demographic_parity}.

    conflicting: accuracy on images whose attribute is not the one that is most over-represented in their class in
    training (the greatest P(a | y) / P(a)). equalised_odds, demographic_parity: greatest difference between attributes
    of P(prediction = c | y) and of P(prediction = c), over all classes c and y; for two classes they are fairlearn's
    equalized_odds_difference and demographic_parity_difference (Hardt et al. 2016).
    """
    attributes, classes = (sorted({row[label] for row in rows}) for label in "ay")
    tied = {y: folder.tied_attribute(train_counts, y) for y in classes}
    conflicting = [row["prediction"] == row["y"] for row in rows if row["a"] != tied[row["y"]]]

    def difference_of_rates(rows):
        parts = [[row["prediction"] for row in rows if row["a"] == a] for a in attributes]
        return max((max(rates) - min(rates) for rates in (
            [part.count(c) / len(part) for part in parts if part] for c in classes)), default=0.0)

    return {"conflicting": mean(conflicting) if conflicting else float("nan"),
            "equalised_odds": max(difference_of_rates([row for row in rows if row["y"] == y]) for y in classes),
            "demographic_parity": difference_of_rates(rows)}


def bootstrap_worst_group(right, members, draws, rng, runs=None):
    """Worst-group accuracy, mean over seeds, of `draws` bootstrap samples of test images and of seeds: (draws,) float.

    right: (seeds, images) bool; members: an index array a group; runs: of each seed. Images are drawn anew within their
    group, and seeds with them, or runs, where there are several: the seeds of one share its diffusion models. With a
    generator `rng` of the same seed, recipes get the same draws, so that their differences are paired.
    """
    import numpy as np

    accuracies = []
    for group in members:
        counts = rng.multinomial(len(group), np.full(len(group), 1 / len(group)), size=draws)
        accuracies.append(right[:, group].astype(float) @ counts.T / len(group))
    worst = np.min(accuracies, axis=0)  # (seeds, draws)
    if len(set(runs or ())) > 1:
        worst = np.array([worst[[other == run for other in runs]].mean(0) for run in sorted(set(runs))])
    seeds = rng.integers(len(worst), size=(len(worst), draws))
    return np.take_along_axis(worst, seeds, axis=0).mean(0)


def intervals(predictions, table, references, draws=2000):
    """{recipe: {"worst_group": (low, high), "vs erm": (difference, low, high), ...}}, all of 95 %.

    predictions: {recipe: {seed: rows}}; table: of summary; references: recipes that the others are compared with. A
    difference is this recipe's worst-group accuracy less the reference's.
    """
    import numpy as np

    first = next(iter(next(iter(predictions.values())).values()))
    groups = np.array([folder.group_of(row) for row in first])
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    right = {recipe: np.array([[row["prediction"] == row["y"] for row in rows] for rows in seeds.values()])
             for recipe, seeds in predictions.items()}
    samples = {recipe: bootstrap_worst_group(hits, members, draws, np.random.default_rng(0),
                                             [run_of(seed) for seed in predictions[recipe]])
               for recipe, hits in right.items()}
    found = {recipe: {"worst_group": tuple(np.quantile(values, (0.025, 0.975)))} for recipe, values in samples.items()}
    for recipe in found:
        for reference in references:
            if reference in samples and reference != recipe:
                low, high = np.quantile(samples[recipe] - samples[reference], (0.025, 0.975))
                apart = table[recipe]["worst_group"][0] - table[reference]["worst_group"][0]
                found[recipe][f"vs {reference}"] = (apart, low, high)
    return found


def read_predictions(path, split):
    """The rows of one split of a predictions.csv, labels as int."""
    try:
        rows = [dict(row, y=int(row["y"]), a=int(row["a"]), prediction=int(row["prediction"]))
                for row in folder.read_rows(path, "train this recipe again") if row["split"] == split]
    except (KeyError, ValueError, TypeError) as error:
        raise folder.InputError(path, f"can't be read: {error!r}", "train this recipe again") from None
    if not rows:
        raise folder.InputError(path, f"no predictions for split {split}", "train this recipe again")
    return rows


def read_recipes(args):
    """{recipe: {seed: rows of predictions}}, all of the same images.

    A recipe is known by its folder's name; where that stands in several runs, a seed is called <run>/<seed>.
    """
    names, predictions, tested = [path.name for path in args.classifiers], {}, None
    for recipe in args.classifiers:
        run = f"{recipe.resolve().parent.parent.name}/" if names.count(recipe.name) > 1 else ""
        seeds = sorted(recipe.glob("seed*"), key=lambda path: int(path.name[4:]))
        if not seeds:
            raise folder.InputError(recipe, "holds no seed", "point --classifiers to OUTs of train_classifier.py")
        for seed in seeds:
            name = run + seed.name[4:]
            if name in predictions.setdefault(recipe.name, {}):
                raise folder.InputError("--classifiers", f"two {recipe.name} of the same run", "name each once")
            rows = predictions[recipe.name][name] = read_predictions(seed / "predictions.csv", args.split)
            images = [row["file_name"] for row in rows]
            if images != (tested := tested or images):
                raise folder.InputError(seed, "was tested on other images than the first recipe", "train it again")
    return predictions


def run_of(seed):
    """The run of a seed's name: of <run>/<seed>, else empty."""
    return seed.rpartition("/")[0]


# ---------------------------------------------------------------------------------------------- the outputs


def tidy_results(predictions, train_counts):
    """[{recipe, seed, group, metric, value}] of all recipes."""
    rows = []
    for recipe, seeds in predictions.items():
        for seed, answers in seeds.items():
            accuracies = folder.group_accuracies(answers, [row["prediction"] for row in answers])
            rows += [[recipe, seed, "all", *pair] for pair in
                     (metrics(accuracies, train_counts) | fairness(answers, train_counts)).items()]
            rows += [[recipe, seed, group, "accuracy", value] for group, value in accuracies.items()]
            rows += [[recipe, seed, group, "images", count] for group, count in folder.group_counts(answers).items()]
    return [{"recipe": recipe, "seed": seed, "group": group, "metric": metric,
             "value": value if isinstance(value, int) else f"{value:.6f}"}
            for recipe, seed, group, metric, value in rows]


def summary(results, keep_order=False):
    """{recipe: {metric or group: (mean, deviation)}}, the best worst-group accuracy first, or in the order of results.

    The deviation is that of runs, each the mean of its seeds; of seeds, where there is but one run.
    """
    values = {}
    for row in results:
        if row["metric"] != "images":
            column = row["metric"] if row["group"] == "all" else row["group"]
            runs = values.setdefault(row["recipe"], {}).setdefault(column, {})
            runs.setdefault(run_of(row["seed"]), []).append(float(row["value"]))
    table = {}
    for recipe, columns in values.items():
        for column, runs in columns.items():
            several = [mean(seeds) for seeds in runs.values()] if len(runs) > 1 else next(iter(runs.values()))
            table.setdefault(recipe, {})[column] = (mean(several), stdev(several) if len(several) > 1 else 0.0)
    return table if keep_order else dict(sorted(table.items(), key=lambda item: -item[1]["worst_group"][0]))


def markdown_table(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def markdown_of(path):
    """A csv of evaluate_images.py as a table."""
    rows = folder.read_rows(path, "run evaluate_images.py")
    return markdown_table(list(rows[0]), [row.values() for row in rows])


def interval_line(recipe, row, found, seeds, references):
    """A line of intervals.csv: worst-group accuracy, paired differences, and how many seeds answer with one class."""
    collapsed = sum(len({row["prediction"] for row in rows}) == 1 for rows in seeds.values())
    line = {"recipe": recipe, "collapsed": collapsed, "worst_group": row["worst_group"][0],
            **dict(zip(("low", "high"), found["worst_group"]))}
    for reference in references:
        values = found.get(f"vs {reference}", ("", "", ""))
        line |= dict(zip((f"vs_{reference}", f"vs_{reference}_low", f"vs_{reference}_high"), values))
    return {key: f"{value:.6f}" if isinstance(value, float) else value for key, value in line.items()}


def latex(table, found):
    """The first table as LaTeX, for a paper that uses booktabs."""
    lines = [f"{recipe} & ${row['worst_group'][0]:.3f} \\pm {row['worst_group'][1]:.3f}$ & "
             "$[{:.3f}, {:.3f}]$".format(*found[recipe]["worst_group"]) + f" & ${row['mean_group'][0]:.3f}$ \\\\"
             for recipe, row in table.items()]
    return "\n".join([r"\begin{tabular}{lccc}", r"\toprule",
                      r"Recipe & Worst-group accuracy & 95\,\% interval & Mean group accuracy \\", r"\midrule", *lines,
                      r"\bottomrule", r"\end{tabular}", ""]).replace("_", r"\_")


def over_what(predictions):
    """What means and deviations are over: `3 seeds`, or `1 or 3 runs (the mean of a run's seeds)`."""
    seeds = {len(seeds) for seeds in predictions.values()}
    runs = {len(set(map(run_of, seeds))) for seeds in predictions.values()}
    if runs == {1}:
        return " or ".join(map(str, sorted(seeds))) + " seeds"
    return " or ".join(map(str, sorted(runs))) + " runs with other models (of one run: over its seeds)"


def markdown(table, found, sizes, args, over):
    """The two tables of results.md. sizes: {group: images of the split}; over: of over_what."""
    compared = [column for column in (f"vs {reference}" for reference in args.references)
                if any(column in row for row in found.values())]
    text = (f"Accuracy on {args.split}, mean ± standard deviation over {over}, in brackets 95 % bootstrap intervals "
            f"over {args.split} images and seeds or runs; bold: a difference that leaves zero.\n\n")
    text += markdown_table(["recipe", "worst-group accuracy", "interval", *compared], [
        [recipe, f"{row['worst_group'][0]:.3f} ± {row['worst_group'][1]:.3f}", "[{:.3f}, {:.3f}]".format(
            *found[recipe]["worst_group"]), *(difference(found[recipe].get(column)) for column in compared)]
        for recipe, row in table.items()])
    columns = [column for column in next(iter(table.values())) if column != "worst_group"]
    names = [METRICS.get(column) or f"{column} ({sizes[column]} images)" for column in columns]
    text += "\n" + markdown_table(["recipe", *names], [
        [recipe, *("{:.3f} ± {:.3f}".format(*row[column]) for column in columns)] for recipe, row in table.items()])
    return text


def difference(values):
    if values is None:
        return ""
    text = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*values)
    return f"**{text}**" if values[1] > 0 or values[2] < 0 else text


def new_axes(height):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(7, height), layout="constrained")


def save_figure(path, table, found):
    """Worst-group accuracy a recipe, with its interval, and a dot a group."""
    figure, axes = new_axes(0.45 * len(table) + 1.2)
    for place, (recipe, row) in enumerate(reversed(table.items())):
        low, high = found[recipe]["worst_group"]
        value = row["worst_group"][0]
        axes.barh(place, value, xerr=[[max(0, value - low)], [max(0, high - value)]], color="#4c72b0", ecolor="black",
                  capsize=3)
        groups = [value for column, (value, _) in row.items() if column not in METRICS]
        axes.plot(groups, [place] * len(groups), "o", color="#dd8452", markersize=4, zorder=3,
                  label="each group" if place == 0 else None)
    axes.set(yticks=range(len(table)), yticklabels=list(reversed(table)), xlim=(0, 1),
             xlabel="worst-group accuracy (bar: mean over seeds, whisker: 95 % interval)")
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


def sweep(args):
    """Puts the intervals.csv of several results, one a bias, side by side."""
    values = {}
    for results in args.sweep:
        bias = results.parent.name.rsplit("-", 1)[-1]
        for row in folder.read_rows(results / "intervals.csv", "run evaluate.py for this bias first"):
            values.setdefault(row["recipe"], {})[bias] = [float(row[name]) for name in ("worst_group", "low", "high")]
    biases = sorted({bias for row in values.values() for bias in row}, key=lambda text: (text == "natural", text))
    values = dict(sorted(values.items(), key=lambda item: -mean(value[0] for value in item[1].values())))
    with folder.replacing(args.out) as out:
        out.mkdir()
        figure, axes = new_axes(4.5)
        for i, (recipe, row) in enumerate(values.items()):
            known = [bias for bias in biases if bias in row]
            centre, low, high = zip(*(row[bias] for bias in known))
            places = [biases.index(bias) + (i - len(values) / 2) * 0.03 for bias in known]
            axes.errorbar(places, centre, [[max(0, c - x) for c, x in zip(centre, low)],
                                           [max(0, x - c) for c, x in zip(centre, high)]],
                          fmt="-o" if i < 10 else "--s", markersize=3, linewidth=1, capsize=2, label=recipe)
        axes.set(xticks=range(len(biases)), xticklabels=biases, ylim=(0, 1), xlabel="bias of the training set",
                 ylabel="worst-group accuracy (whisker: 95 % interval)")
        figure.legend(loc="outside right upper")
        figure.savefig(out / "sweep.png", dpi=120, metadata={"Software": None})
        folder.write_csv(out / "sweep.csv", [{"recipe": recipe, "bias": bias, "worst_group": value[0], "low": value[1],
                                              "high": value[2]} for recipe, row in values.items()
                                             for bias, value in row.items()])
        (out / "sweep.md").write_text("Worst-group accuracy and its 95 % interval, for each bias\n\n" + markdown_table(
            ["recipe", *biases], [[recipe, *("{:.3f} [{:.3f}, {:.3f}]".format(*row[bias]) if bias in row else ""
                                             for bias in biases)] for recipe, row in values.items()]), encoding="utf-8")
        folder.write_config(out, args, folder.digest(values))
    print((args.out / "sweep.md").read_text(encoding="utf-8"))
    print(f"Picture: {args.out}/sweep.png")


# ------------------------------------------------------------------------------------------------ the stage


def main():
    args = parse()
    if args.sweep:
        return sweep(args)
    predictions = read_recipes(args)
    results = tidy_results(predictions, folder.group_counts(folder.read_metadata(args.data, "train")))
    table = summary(results, args.keep_order)
    found = intervals(predictions, table, args.references)
    first = next(iter(next(iter(predictions.values())).values()))
    with folder.replacing(args.out) as out:
        out.mkdir()
        folder.write_csv(out / "results.csv", results)
        lines = [interval_line(recipe, table[recipe], found[recipe], predictions[recipe], args.references)
                 for recipe in table]
        folder.write_csv(out / "intervals.csv", lines)
        text = markdown(table, found, folder.group_counts(first), args, over_what(predictions))
        text += "".join(f"\n**Collapsed**: {line['collapsed']} of {line['recipe']}'s classifiers answer with one class "
                        "alone.\n" for line in lines if line["collapsed"])
        if args.images:
            text += f"\nThe synthetic sets. {MEASURES}\n\n{markdown_of(args.images / 'synthetic.csv')}"
            (out / "cost.md").write_text(markdown_of(args.images / "cost.csv"), encoding="utf-8")
        if args.latex:
            (out / "results.tex").write_text(latex(table, found), encoding="utf-8")
        (out / "results.md").write_text(text, encoding="utf-8")
        save_figure(out / "worst_group.png", table, found)
        save_images(out / "images.png", args)
        folder.write_config(out, args, folder.digest(results))
    for path in (args.out / "results.md", args.out / "cost.md"):
        if path.is_file():
            print(path.read_text(encoding="utf-8"))
    print(f"Pictures: {args.out}/worst_group.png, {args.out}/images.png", *(f"{s}/*.png" for s in args.synthetic),
          sep=", ")


def parse():
    parser = folder.Arguments(__doc__)
    parser.add_argument("--data", type=Path, help="real images: folder in the one format")
    parser.add_argument("--classifiers", type=Path, nargs="+", help="OUTs of train_classifier.py")
    parser.add_argument("--synthetic", type=Path, nargs="*", default=[], help="OUTs of generate.py to show")
    parser.add_argument("--images", type=Path, help="OUT of evaluate_images.py for them")
    parser.add_argument("--references", nargs="+", default=["erm", "groupdro"], metavar="RECIPE",
                        help="recipes that the others are compared with")
    parser.add_argument("--keep-order", action=folder.Flag, default=False,
                        help="show recipes in the order given, not the best worst group first")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="val: for choosing settings")
    parser.add_argument("--latex", action=folder.Flag, default=False, help="write results.tex as well")
    parser.add_argument("--sweep", type=Path, nargs="+", help="OUTs of this script, one a bias, to put side by side")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    if not args.sweep and not (args.data and args.classifiers):
        raise folder.InputError("--data, --classifiers", "are needed", "or --sweep with finished results")
    return args


if __name__ == "__main__":
    folder.run(main)
