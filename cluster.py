"""Stage 1: clusters the training images within each group (class x attribute).

    python cluster.py --data data/digits-0.95 --embeddings runs/digits-0.95/embeddings \\
        --out runs/digits-0.95/clusters
    python cluster.py --data data/mine --embeddings runs/mine/embeddings --within dataset \\
        --out runs/mine/pseudo

k-means on CLIP image embeddings within each group (paper, "Clustered DreamBooth"), so that no
diffusion model has to carry too much variation. `--k auto` takes the number of clusters with the
best silhouette. No cluster is smaller than --min-size: smaller ones are merged into their nearest,
and a group too small to split stays whole.

`--within dataset` and `--within class` are for data without attribute labels: they write a dataset
whose attribute `a` is the cluster, for all splits; val and test images take the nearest cluster.
Its groups, class x cluster, are pseudo-groups, which every later stage takes for groups. Clusters
of all classes together (ours) find a shortcut that classes share, where few images of a class lack
it; those of each class are SAGE's way (Luo et al. 2026). `--attributes "on land" "on water"` takes
the more similar of these words by CLIP instead. No attribute label of DATA is read then, except to
print how well they agree.

Reads DATA and the embeddings of data/embed.py. Writes OUT/metadata.csv (the training rows with a
column `cluster`, an integer from 0 within the group, largest first; or all rows of the dataset
without attribute labels), OUT/<group or class>.png (a sheet with one row per cluster) and
OUT/config.json.
"""

import os
from pathlib import Path

from common import clip, compute, files, imagefolder, made, stage
from common.files import InputError

np = stage.lazy("numpy")

SAMPLE = 10_000  # images of a group that decide where its clusters are

# -------------------------------------------------------------------------------------- the method


def group_clusters(embeddings, k, k_max, min_size, seed):
    """Clusters the images of one group, of one class or of the whole dataset.

    embeddings: (N, D) float array. k: an int, or "auto" for the best silhouette among 2..k_max.
    Returns labels (N,) int from 0, largest cluster first; 0 if the group is too small to split.
    """
    from sklearn.metrics import silhouette_score  # slow to import

    largest = min(k_max if k == "auto" else k, len(embeddings) // min_size, len(embeddings) - 1)
    numbers = range(2, largest + 1) if k == "auto" else [largest]
    found = [kmeans(embeddings, n, min_size, seed) for n in numbers if n > 1]
    found = [labels for labels in found if labels.max() > 0]
    if not found:
        return [0] * len(embeddings)
    sample = {}  # of large groups: the silhouette of all images takes N x N memory
    if len(embeddings) > SAMPLE:
        sample = {"sample_size": SAMPLE, "random_state": seed % 2**32}
    return max(found, key=lambda labels: silhouette_score(embeddings, labels, **sample))


def kmeans(embeddings, k, min_size, seed):
    """k-means; clusters smaller than min_size are dissolved, smallest first.

    Each of their images goes to its nearest other one. Large groups' centres are a sample's.
    """
    from sklearn.cluster import KMeans  # slow to import
    from sklearn.metrics import pairwise_distances_argmin

    sample = embeddings
    if len(embeddings) > SAMPLE:
        chosen = np.random.default_rng(seed).choice(len(embeddings), SAMPLE, replace=False)
        sample = embeddings[chosen]
    fit = KMeans(k, n_init=10, random_state=seed % 2**32).fit(sample)
    centres, labels = fit.cluster_centers_, fit.labels_
    if len(embeddings) > SAMPLE:
        labels = pairwise_distances_argmin(embeddings, centres)
    sizes = np.bincount(labels, minlength=len(centres))
    while sizes.min() < min_size:
        centres = np.delete(centres, sizes.argmin(), axis=0)
        labels = pairwise_distances_argmin(embeddings, centres)
        sizes = np.bincount(labels, minlength=len(centres))
    rank = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")
    return rank[labels]


def nearest_cluster(embeddings, clustered, labels):
    """The cluster (N,) with the nearest mean, for embeddings (N, D).

    clustered: (M, D), the images that have labels (M,).
    """
    from sklearn.metrics import pairwise_distances_argmin

    means = np.stack([clustered[labels == c].mean(0) for c in range(labels.max() + 1)])
    return pairwise_distances_argmin(embeddings, means)


def most_similar(embeddings, rows, prompts, words, encoder):
    """The index (N,) of the words that CLIP finds most similar to each image, and its probability.

    Among `<prompt of its class> <words>` (zero-shot classification, Radford et al. 2021, section
    3.1). prompts: {y: prompt}.
    """
    chosen, confidence = np.zeros(len(rows), int), np.zeros(len(rows))
    for y, prompt in prompts.items():
        members = [i for i, row in enumerate(rows) if row["y"] == y]
        texts = encoder.texts([f"{prompt} {word}" for word in words])
        found = encoder.probabilities(embeddings[members], texts).numpy()
        chosen[members], confidence[members] = found.argmax(1), found.max(1)
    return chosen, confidence


# --------------------------------------------------------------------------------------- the stage


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    rows = imagefolder.read_metadata(args.data, "train" if args.within == "group" else None)
    key = files.digest(made.settings_of(args, "embeddings", "clip"),
                       imagefolder.digest(args.data, rows), link_between(args.out, args.data),
                       clip.embeddings_digest(args.embeddings),
                       args.attributes and files.model_digest(args.clip),
                       made.code_digest(__file__, clip.__file__, imagefolder.load_image))
    if stage.is_made(args, key):
        return
    encoder = args.attributes and clip.Clip(args.clip, compute.accelerator().device)
    embeddings = clip.read_embeddings(args.embeddings, rows, encoder)
    if args.attributes:
        name_attributes(rows, embeddings, args.attributes, encoder)
    else:
        cluster_rows(rows, embeddings, args)
    sheets, column = [part_of(row, args.within) for row in rows], "cluster"
    if args.within != "group":
        sheets = [f"y{row['y']}" for row in rows]
        rows, column = with_attribute(rows, args), "a"
    with files.replacing(args.out) as out:
        out.mkdir()
        for name in sorted(set(sheets)):
            mine = [row for row, sheet in zip(rows, sheets) if sheet == name]
            save_sheet(out / f"{name}.png", args.data, mine, column)
        link_images(out, args.data, rows)
        files.write_csv(out / "metadata.csv", rows)
        stage.finish(out, args, key)


def part_of(row, within):
    """The part of the data that a row is clustered in."""
    names = {"group": imagefolder.group_of(row), "class": f"y{row['y']}", "dataset": "all"}
    return names[within]


def cluster_rows(rows, embeddings, args):
    """Adds `cluster` to each row: of its part's training images, or else the nearest one."""
    titles = imagefolder.group_titles(rows) | {"all": "all classes"}
    parts = [part_of(row, args.within) for row in rows]
    for name in sorted(set(parts)):
        members = [i for i, part in enumerate(parts) if part == name]
        train = [i for i in members if rows[i]["split"] == "train"]
        others = [i for i in members if rows[i]["split"] != "train"]
        seed = stage.seed_of(args.seed, name)
        labels = group_clusters(embeddings[train], args.k, args.k_max, args.min_size, seed)
        labels, found = np.array(labels, dtype=int), [0] * len(others)
        if others and train:
            found = nearest_cluster(embeddings[others], embeddings[train], labels)
        for i, label in zip(train + others, [*labels, *found]):
            rows[i]["cluster"] = int(label)
        title, sizes = titles.get(name, f"class {name}"), np.bincount(labels).tolist()
        print(f"{title}: {len(train)} images in clusters of {sizes}")


def name_attributes(rows, embeddings, words, encoder):
    """Adds `cluster`, the index of one of the words, and `confidence` to each row."""
    prompts = {y: texts[0] for y, texts in imagefolder.class_prompts(rows).items()}
    labels, confidences = most_similar(embeddings, rows, prompts, words, encoder)
    for row, label, confidence in zip(rows, labels, confidences):
        row["cluster"], row["confidence"] = int(label), f"{confidence:.4f}"
    for number, word in enumerate(words):
        chosen = [float(row["confidence"]) for row in rows if row["cluster"] == number]
        mean = f", mean confidence {sum(chosen) / len(chosen):.3f}" if chosen else ""
        print(f"{word}: {len(chosen)} images{mean}")
    if len({row["a"] for row in rows}) > 1:
        agree = sum(row["cluster"] == row["a"] for row in rows) / len(rows)
        print(f"accuracy of the words, taken in order for a = 0, 1, ...: {agree:.3f}")


def with_attribute(rows, args):
    """The rows with their cluster as attribute, and without any label of DATA but the class."""
    prompts, found = imagefolder.class_prompts(rows), []
    for y, texts in prompts.items():
        if len(texts) > 1:
            raise InputError(args.data / "metadata.csv", f"has no column class_text, and class {y} "
                             "has several texts", "add class_text, the prompt of each class")
    for row in rows:
        class_text = prompts[row["y"]][0]
        words = [args.attributes[row["cluster"]]] if args.attributes else []
        new = {"file_name": row["file_name"], "split": row["split"], "y": row["y"],
               "a": row["cluster"], "text": " ".join([class_text, *words]),
               "class_text": class_text}
        found.append(new | ({"confidence": row["confidence"]} if args.attributes else {}))
    return found


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    count, add = stage.number(int, 1), parser.add_argument
    add("--data", type=Path, required=True, help="real images: a prepared dataset folder")
    add("--embeddings", type=Path, required=True, help="of its images: output of data/embed.py")
    add("--k", type=stage.number(int, 1, word="auto"), default="auto",
        help="clusters per group (or class, or dataset), or auto")
    add("--within", choices=("group", "class", "dataset"), default="group",
        help="what is clustered; class, dataset: for data without attribute labels, write a "
        "dataset whose attribute is the cluster")
    add("--attributes", nargs="+", metavar="WORDS", default=[], help="words that are the attribute "
        'instead of clusters, such as "on land" "on water"; they follow the prompt of the class; '
        "--within is then dataset")
    add("--clip", help="for --attributes: the CLIP model of the embeddings, a folder or hub id")
    add("--k-max", type=count, default=5, help="largest number of clusters that auto tries")
    add("--min-size", type=count, default=10, help="smallest number of images in a cluster: models "
        "memorise smaller ones (not from the paper)")
    add("--seed", type=int, default=0, help="seed of k-means")
    add("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    if args.attributes and not args.clip:
        raise InputError("--attributes", "needs the CLIP model of the embeddings", "add --clip")
    if args.attributes:
        args.within = "dataset"
    return args


def save_sheet(path, data, rows, column):
    """One row of up to 20 images per cluster, whose number is in a column."""
    images, labels = [], []
    for c in range(1 + max(row[column] for row in rows)):
        members = [row for row in rows if row[column] == c]
        images.append([imagefolder.load_image(data / row["file_name"], 64)
                       for row in imagefolder.spread(members, 20)])
        labels.append(f"c{c} ({len(members)})")
    imagefolder.contact_sheet(images, labels).save(path)


def link_images(out, data, rows):
    """Links in `out` through which its file_names lead to the images of `data`."""
    for top in sorted({Path(row["file_name"]).parts[0] for row in rows}):
        (out / top).symlink_to(f"{link_between(out, data)}/{top}")


def link_between(out, data):
    """The relative path from `out` to `data`, whatever links lead to them."""
    return os.path.relpath(os.path.realpath(data), os.path.realpath(out))


if __name__ == "__main__":
    stage.run(main)
