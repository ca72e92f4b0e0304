"""Stage 5: worst-group accuracy of every recipe with intervals, as tables, figures and sheets of images.

    python evaluate.py --data data/digits-0.95 --classifiers runs/digits-0.95/classifiers/{erm,lora} \\
        --synthetic runs/digits-0.95/synthetic/lora --clip base/miniature/clip --out runs/digits-0.95/results
    python evaluate.py --sweep runs/digits-{0.9,0.95,0.99}/results --out runs/digits-sweep

Reads the predictions of train_classifier.py, one folder a recipe, and the images of generate.py.
Writes OUT/results.csv (tidy: recipe, seed, group, metric, value), OUT/results.md (best worst group first, with
95 % bootstrap intervals and the differences from erm and groupdro on the same test images), OUT/intervals.csv,
OUT/synthetic.csv (whether the images of each synthetic set are what they claim), OUT/cost.md (what each took),
OUT/worst_group.png, OUT/images.png (real and synthetic images side by side) and OUT/config.json; prints the tables.
With --sweep, the results of several biases side by side: OUT/sweep.csv, OUT/sweep.md, OUT/sweep.png.
"""

import csv
import json
from pathlib import Path
from statistics import mean, stdev

from cluster import Clip, pick_device
from data import imagefolder as folder

METRICS = {
    "worst_group": "worst-group accuracy",
    "mean_group": "mean group accuracy",
    "train_weighted": "train-weighted accuracy",
    "gap": "gap",
}
REFERENCES = ("erm", "groupdro")  # recipes that every other is compared with

# --------------------------------------------------------------------------------------------- the metrics


def group_accuracies(rows):
    """{group: share of its images whose prediction is y}, sorted by (y, a)."""
    sizes = folder.group_counts(rows)
    hits = folder.group_counts(row for row in rows if row["prediction"] == row["y"])
    return {group: hits.get(group, 0) / size for group, size in sizes.items()}


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


def bootstrap_worst_group(right, members, draws, rng):
    """Worst-group accuracy, mean over seeds, of `draws` bootstrap samples of test images and of seeds: (draws,) float.

    right: (seeds, images) bool; members: an index array a group. Images are drawn anew within their group, seeds with
    them; with a generator `rng` of the same seed, recipes get the same draws, so that their differences are paired.
    """
    import numpy as np

    accuracies = []
    for group in members:
        counts = rng.multinomial(len(group), np.full(len(group), 1 / len(group)), size=draws)
        accuracies.append(right[:, group].astype(float) @ counts.T / len(group))
    worst = np.min(accuracies, axis=0)  # (seeds, draws)
    seeds = rng.integers(len(right), size=(len(right), draws))
    return np.take_along_axis(worst, seeds, axis=0).mean(0)


def intervals(predictions, draws=2000):
    """{recipe: {"worst_group": (low, high), "vs erm": (difference, low, high), ...}}, all of 95 %.

    predictions: {recipe: {seed: rows}}. A difference is this recipe's worst-group accuracy less the reference's.
    """
    import numpy as np

    first = next(iter(next(iter(predictions.values())).values()))
    groups = np.array([folder.group_of(row) for row in first])
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    right = {recipe: np.array([[row["prediction"] == row["y"] for row in rows] for rows in seeds.values()])
             for recipe, seeds in predictions.items()}
    worst = {recipe: np.mean([min(one[group].mean() for group in members) for one in hits])
             for recipe, hits in right.items()}
    samples = {recipe: bootstrap_worst_group(hits, members, draws, np.random.default_rng(0))
               for recipe, hits in right.items()}
    found = {recipe: {"worst_group": tuple(np.quantile(values, (0.025, 0.975)))} for recipe, values in samples.items()}
    for recipe in found:
        for reference in REFERENCES:
            if reference in samples and reference != recipe:
                low, high = np.quantile(samples[recipe] - samples[reference], (0.025, 0.975))
                found[recipe][f"vs {reference}"] = (worst[recipe] - worst[reference], low, high)
    return found


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


def read_recipes(args):
    """{recipe: {seed: rows of predictions}}, all of the same images."""
    predictions, tested = {}, None
    for recipe in args.classifiers:
        if recipe.name in predictions:
            raise folder.InputError("--classifiers", "two have the same name", "a recipe is known by its folder's name")
        seeds = sorted(recipe.glob("seed*"), key=lambda path: int(path.name[4:]))
        if not seeds:
            raise folder.InputError(recipe, "holds no seed", "point --classifiers to OUTs of train_classifier.py")
        predictions[recipe.name] = {}
        for seed in seeds:
            rows = predictions[recipe.name][seed.name[4:]] = read_predictions(seed / "predictions.csv", args.split)
            names = [row["file_name"] for row in rows]
            if names != (tested := tested or names):
                raise folder.InputError(seed, "was tested on other images than the first recipe", "train it again")
    return predictions


# ------------------------------------------------------------------------------------- the synthetic images


def claims(rows, source, prompts, clip):
    """Shares of a synthetic set's images whose class, and whose attribute, CLIP tells as claimed, zero-shot.

    prompts: {group: prompt}. CLIP is asked which group's prompt an image shows; its class is right if that group's is.
    """
    right = {"class": 0, "attribute": 0}
    for i in range(0, len(rows), 256):
        part = rows[i:i + 256]
        answers = clip.zero_shot([folder.load_image(source / row["file_name"], clip.size) for row in part],
                                 list(prompts.values())).argmax(1).tolist()
        for row, answer in zip(part, answers):
            y, a = list(prompts)[answer].split("-")
            right["class"] += y == f"y{row['y']}"
            right["attribute"] += a == f"a{row['a']}"
    return {f"clip_{name}": count / len(rows) for name, count in right.items()}


def judged_class(rows, source, judge):
    """Share of images whose class a classifier tells as claimed; judge: its OUT/seed<k>, trained without bias."""
    import torch
    from safetensors.torch import load_file

    from train_classifier import Classifier, Images, predict

    settings = json.loads((judge / "config.json").read_text(encoding="utf-8"))["arguments"]
    weights = load_file(judge / "model.safetensors")
    model = Classifier(settings["arch"], "none", len(weights["last_layer.bias"]))
    model.load_state_dict(weights)
    images = Images(source, rows, settings["resolution"], list(folder.group_counts(rows)))
    return (predict(model, images, settings["resolution"]).argmax(1) == images.y).float().mean().item()


def judged_attribute(rows, source, real, data):
    """Share of images whose mean colour is nearest to that of the real images of the attribute that they claim."""
    import numpy as np

    def colour(path):
        return np.asarray(folder.load_image(path, 32), float).mean((0, 1))

    seen = {}
    for row in real:
        seen.setdefault(row["a"], []).append(colour(data / row["file_name"]))
    centres = {a: np.mean(colours, axis=0) for a, colours in seen.items()}
    right = [min(centres, key=lambda a: np.linalg.norm(centres[a] - colour(source / row["file_name"]))) == row["a"]
             for row in rows]
    return sum(right) / len(right)


def cost(source):
    """What a synthetic set took, to its last unit: seconds of fine-tuning and of generation, MB of weights on disk."""
    def seconds(where):
        configs = [json.loads(path.read_text(encoding="utf-8")) for path in Path(where).glob("*/config.json")]
        return sum(config.get("seconds", 0) for config in configs)

    models = json.loads((source / "config.json").read_text(encoding="utf-8"))["arguments"]["models"]
    weights = sum(path.stat().st_size for path in Path(models).rglob("*.safetensors")) if models else 0
    return {"method": source.name, "fine-tuning, s": round(seconds(models)) if models else 0,
            "generation, s": round(seconds(source)), "weights, MB": f"{weights / 1e6:.1f}"}


def synthetic_table(args):
    """[{method, images, clip_class, clip_attribute, judge_class, judge_colour}], shares as far as they are asked."""
    clip = Clip(args.clip, pick_device(args.device)) if args.clip else None
    everything = folder.read_metadata(args.data)
    real, table = [row for row in everything if row["split"] == "train"], []
    for source in args.synthetic:
        rows = folder.read_metadata(source, "train")
        line = {"method": source.name, "images": len(rows)}
        if clip:
            line |= claims(rows, source, folder.group_prompts(everything), clip)
        if args.judge:
            line |= {"judge_class": judged_class(rows, source, args.judge),
                     "judge_colour": judged_attribute(rows, source, real, args.data)}
        table.append({key: f"{value:.3f}" if isinstance(value, float) else value for key, value in line.items()})
    return table


# ---------------------------------------------------------------------------------------------- the outputs


def tidy_results(predictions, train_counts):
    """[{recipe, seed, group, metric, value}] of all recipes."""
    rows = []
    for recipe, seeds in predictions.items():
        for seed, answers in seeds.items():
            accuracies = group_accuracies(answers)
            rows += [[recipe, seed, "all", *pair] for pair in metrics(accuracies, train_counts).items()]
            rows += [[recipe, seed, group, "accuracy", value] for group, value in accuracies.items()]
            rows += [[recipe, seed, group, "images", count] for group, count in folder.group_counts(answers).items()]
    return [{"recipe": recipe, "seed": seed, "group": group, "metric": metric,
             "value": value if isinstance(value, int) else f"{value:.6f}"}
            for recipe, seed, group, metric, value in rows]


def summary(results):
    """{recipe: {metric or group: (mean, deviation over seeds)}}, the best worst-group accuracy first."""
    values = {}
    for row in results:
        if row["metric"] != "images":
            column = row["metric"] if row["group"] == "all" else row["group"]
            values.setdefault(row["recipe"], {}).setdefault(column, []).append(float(row["value"]))
    table = {recipe: {column: (mean(seeds), stdev(seeds) if len(seeds) > 1 else 0.0)
                      for column, seeds in columns.items()} for recipe, columns in values.items()}
    return dict(sorted(table.items(), key=lambda item: -item[1]["worst_group"][0]))


def markdown_table(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def markdown(table, found, sizes, seeds, split):
    """The two tables of results.md. sizes: {group: images of the split}."""
    compared = [column for column in (f"vs {reference}" for reference in REFERENCES)
                if any(column in row for row in found.values())]
    text = (f"Accuracy on {split}, mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)} of the classifier, "
            "in brackets 95 % bootstrap intervals over test images and seeds; bold: a difference that leaves zero.\n\n")
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
        path = results / "intervals.csv"
        if not path.is_file():
            raise folder.InputError(path, "no such file", "run evaluate.py for this bias first")
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                numbers = [float(row[name]) for name in ("worst_group", "low", "high")]
                values.setdefault(row["recipe"], {})[bias] = numbers
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
    table, found = summary(results), intervals(predictions)
    first = next(iter(next(iter(predictions.values())).values()))
    synthetic = synthetic_table(args) if args.synthetic else []
    with folder.replacing(args.out) as out:
        out.mkdir()
        folder.write_csv(out / "results.csv", results)
        folder.write_csv(out / "intervals.csv", [dict(zip(("recipe", "worst_group", "low", "high"), (
            recipe, *(f"{value:.6f}" for value in (table[recipe]["worst_group"][0], *found[recipe]["worst_group"])))))
            for recipe in table])
        text = markdown(table, found, folder.group_counts(first), max(map(len, predictions.values())), args.split)
        if synthetic:
            folder.write_csv(out / "synthetic.csv", synthetic)
            text += ("\nThe synthetic sets: shares of images that show the class and the attribute that they claim.\n\n"
                     + markdown_table(list(synthetic[0]), [line.values() for line in synthetic]))
            costs = [cost(source) for source in args.synthetic]
            (out / "cost.md").write_text(markdown_table(list(costs[0]), [line.values() for line in costs]))
        (out / "results.md").write_text(text, encoding="utf-8")
        save_figure(out / "worst_group.png", table, found)
        save_images(out / "images.png", args)
        folder.write_config(out, args, folder.digest(results))
    print((args.out / "results.md").read_text(encoding="utf-8"))
    print(f"Pictures: {args.out}/worst_group.png, {args.out}/images.png", *(f"{s}/*.png" for s in args.synthetic),
          sep=", ")


def parse():
    parser = folder.Arguments(__doc__)
    parser.add_argument("--data", type=Path, help="real images: folder in the one format")
    parser.add_argument("--classifiers", type=Path, nargs="+", help="OUTs of train_classifier.py")
    parser.add_argument("--synthetic", type=Path, nargs="*", default=[], help="OUTs of generate.py to show")
    parser.add_argument("--clip", help="folder or hub id of a CLIP, asked whether synthetic images are what they claim")
    parser.add_argument("--judge", type=Path, help="a seed<k> of train_classifier.py on unbiased images, to judge "
                        "classes; the attribute is then judged by mean colour (digits)")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="val: for choosing settings")
    parser.add_argument("--sweep", type=Path, nargs="+", help="OUTs of this script, one a bias, to put side by side")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    if not args.sweep and not (args.data and args.classifiers):
        raise folder.InputError("--data, --classifiers", "are needed", "or --sweep with finished results")
    return args


if __name__ == "__main__":
    folder.run(main)
