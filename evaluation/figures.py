"""The figures and tables of the evaluation."""

from common import files, imagefolder
from common.files import InputError


def new_axes(height):
    import matplotlib  # takes a second to import
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(7, height), layout="constrained")


def worst_group_bars(path, table, found, metrics):
    """Worst-group accuracy per recipe with its interval, and a dot per group.

    table: {recipe: {column: (mean, std)}}, best first; found: of evaluate.intervals_of; metrics:
    columns that are no group.
    """
    figure, axes = new_axes(0.45 * len(table) + 1.2)
    for place, (recipe, row) in enumerate(reversed(table.items())):
        value, (low, high) = row["worst_group"][0], found[recipe]["worst_group"]
        axes.barh(place, value, xerr=[[max(0, value - low)], [max(0, high - value)]],
                  color="#4c72b0", ecolor="black", capsize=3)
        groups = [value for column, (value, _) in row.items() if column not in metrics]
        axes.plot(groups, [place] * len(groups), "o", color="#dd8452", markersize=4, zorder=3,
                  label="each group" if place == 0 else None)
    axes.set(yticks=range(len(table)), yticklabels=list(reversed(table)), xlim=(0, 1),
             xlabel="worst-group accuracy (bar: mean over seeds, whisker: 95 % interval)")
    figure.legend(loc="outside upper right")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def accuracy_against_bias(path, values, biases):
    """values: {recipe: {bias: (worst-group accuracy, low, high)}}."""
    figure, axes = new_axes(4.5)
    for i, (recipe, row) in enumerate(values.items()):
        known = [bias for bias in biases if bias in row]
        centre, low, high = zip(*(row[bias] for bias in known))
        places = [biases.index(bias) + (i - len(values) / 2) * 0.03 for bias in known]
        below = [max(0, c - x) for c, x in zip(centre, low)]
        above = [max(0, x - c) for c, x in zip(centre, high)]
        axes.errorbar(places, centre, [below, above], fmt="-o" if i < 10 else "--s", markersize=3,
                      linewidth=1, capsize=2, label=recipe)
    axes.set(xticks=range(len(biases)), xticklabels=biases, ylim=(0, 1),
             xlabel="bias of the training set",
             ylabel="worst-group accuracy (whisker: 95 % interval)")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def images_by_group(path, titles, data, synthetic):
    """A row of 16 images per group and source: real training images, then each synthetic set.

    titles: {group: name}. Sets that show pseudo-groups follow, below the real images of these.
    """
    lines, labels, shown = [], [], {(data, ()): []}
    for source in synthetic:
        shown.setdefault(imagefolder.groups_drawn(source, data), []).append(source)
    for (folder, merged), sources in shown.items():
        sources = {"real": folder} | {source.name: source for source in sources}
        rows = {name: imagefolder.read_metadata(source, "train")
                for name, source in sources.items()}
        rows["real"] = imagefolder.with_merged(rows["real"], merged)
        names = titles
        if folder != data:
            groups = imagefolder.group_counts(rows["real"])
            names = {group: f"pseudo-group {group}" for group in groups}
        for group, title in names.items():
            for name, source in sources.items():
                members = [row for row in rows[name] if imagefolder.group_of(row) == group]
                chosen = imagefolder.spread(members, 16)
                lines.append([imagefolder.load_image(source / row["file_name"], 64)
                              for row in chosen])
                labels.append(f"{title}: {name}")
    imagefolder.contact_sheet(lines, labels).save(path)


def markdown_table(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def read_intervals(path, todo):
    """The rows of an intervals.csv. Raises InputError, with `todo`, unless evaluate.py wrote it."""
    rows = files.read_csv(path, todo)
    try:
        for row in rows:
            row["recipe"], row["group_labels"]
            for name in ("worst_group", "average_group", "low", "high"):
                float(row[name])
            for name, value in row.items():
                if name.startswith("vs_") and value:
                    float(value)
    except (KeyError, ValueError, TypeError):
        raise InputError(path, "was not written by evaluate.py", todo) from None
    return rows
