"""Stage 1: clusters the training images within each group (class x attribute), within each class, or all together.

    python cluster.py --data data/digits-0.95 --embeddings runs/digits-0.95/embeddings --out runs/digits-0.95/clusters
    python cluster.py --data data/digits-0.95 --embeddings runs/digits-0.95/embeddings --within class --k 5 --out /tmp/modes
    python cluster.py --data data/mine --embeddings runs/mine/embeddings --within dataset --as-attribute --out runs/mine/pseudo

k-means on CLIP image embeddings within each group (paper, "Clustered DreamBooth"), so that no diffusion model has to
carry too much variation. `--k auto` takes the number of clusters with the best silhouette. No cluster is smaller than
--min-size: smaller ones are merged into their nearest, and a group too small to split stays whole.
`--within class` (ours) clusters a class across its groups, for finetune.py --per dataset; each group's mean embedding is
subtracted first, so that k-means does not find the attribute again.

`--as-attribute` (ours) is for data without attribute labels: it writes a dataset whose attribute `a` is the cluster, for all
splits; val and test images take the nearest cluster. Its groups, class x cluster, are pseudo-groups, and every later stage
takes them for groups. A shortcut is shared by classes, so `--within dataset` finds it where few images of a class lack it;
`--within class` needs no such thing, as in SAGE (Luo et al. 2026). `--attributes "on land" "on water"` takes the more similar
of these words by CLIP instead of a cluster. No attribute label of DATA is read then, except to print how well they agree.

Reads DATA and the embeddings of data/embed.py. Writes OUT/metadata.csv (the training rows with a column `cluster`, an integer
from 0 within the group or class, largest first; with --as-attribute all rows), OUT/<group or class>.png (a sheet with one
row per cluster) and OUT/config.json.
"""

import os
from pathlib import Path

from common import files, imagefolder, models, stage
from common.files import InputError

np = stage.lazy("numpy")

SAMPLE = 10_000  # images of a group that decide where its clusters are

# ---------------------------------------------------------------------------------------------- the method


def group_clusters(embeddings, k, k_max, min_size, seed):
    """Clusters the images of one group or class.

    embeddings: (N, D) float array. k: an int, or "auto" for the best silhouette among 2..k_max.
    Returns labels (N,) int from 0, largest cluster first; all 0 if the group is too small to split.
    """
    from sklearn.metrics import silhouette_score  # slow to import

    largest = min(k_max if k == "auto" else k, len(embeddings) // min_size, len(embeddings) - 1)
    candidates = [kmeans(embeddings, n, min_size, seed) for n in (range(2, largest + 1) if k == "auto" else [largest])
                  if n > 1]
    candidates = [labels for labels in candidates if labels.max() > 0]
    if not candidates:
        return [0] * len(embeddings)
    # on a sample of large groups: the silhouette of all images takes N x N memory
    sample = {"sample_size": SAMPLE, "random_state": seed % 2**32} if len(embeddings) > SAMPLE else {}
    return max(candidates, key=lambda labels: silhouette_score(embeddings, labels, **sample))


def kmeans(embeddings, k, min_size, seed):
    """k-means; clusters smaller than min_size are dissolved, smallest first, each image into its nearest other one.

    The centres of large groups are those of a sample.
    """
    from sklearn.cluster import KMeans  # slow to import
    from sklearn.metrics import pairwise_distances_argmin

    large = len(embeddings) > SAMPLE
    some = np.random.default_rng(seed).choice(len(embeddings), SAMPLE, replace=False) if large else slice(None)
    fit = KMeans(k, n_init=10, random_state=seed % 2**32).fit(embeddings[some])
    centres, labels = fit.cluster_centers_, fit.labels_
    if large:
        labels = pairwise_distances_argmin(embeddings, centres)
    while (sizes := np.bincount(labels, minlength=len(centres))).min() < min_size:
        centres = np.delete(centres, sizes.argmin(), axis=0)
        labels = pairwise_distances_argmin(embeddings, centres)
    return np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")[labels]


def without_group_means(embeddings, groups):
    """Embeddings (N, D) minus the mean of their group; groups: a name for each."""
    names, members = np.unique(groups, return_inverse=True)
    means = np.stack([embeddings[members == i].mean(0) for i in range(len(names))])
    return embeddings - means[members]


def nearest_cluster(embeddings, clustered, labels):
    """The cluster (N,) with the nearest mean; embeddings: (N, D); clustered: (M, D), the images that have labels (M,)."""
    from sklearn.metrics import pairwise_distances_argmin

    means = np.stack([clustered[labels == c].mean(0) for c in range(labels.max() + 1)])
    return pairwise_distances_argmin(embeddings, means)


def most_similar(embeddings, rows, prompts, words, clip):
    """The index (N,) of the words that CLIP finds most similar to each image, among `<prompt of its class> <words>`, and its
    probability (N,) (zero-shot classification, Radford et al. 2021, section 3.1). prompts: {y: prompt}."""
    chosen, confidence = np.zeros(len(rows), int), np.zeros(len(rows))
    for y, prompt in prompts.items():
        members = [i for i, row in enumerate(rows) if row["y"] == y]
        found = clip.probabilities(embeddings[members], clip.texts([f"{prompt} {word}" for word in words])).numpy()
        chosen[members], confidence[members] = found.argmax(1), found.max(1)
    return chosen, confidence


# ------------------------------------------------------------------------------------------------ the stage


def main(argv=None):
    args = parse(argv)
    inputs = stage.begin(args)
    rows = imagefolder.read_metadata(args.data, None if args.as_attribute else "train")
    key = files.digest(stage.settings_of(args, "embeddings", "clip"), imagefolder.digest(args.data, rows),
                       link_between(args.out, args.data), models.embeddings_digest(args.embeddings),
                       args.attributes and files.model_digest(args.clip),
                       stage.code_digest(__file__, models.__file__, imagefolder.load_image))
    if stage.is_made(args, key, inputs):
        return print(f"{args.out}: up to date")

    embeddings = models.read_embeddings(args.embeddings, rows)
    titles = imagefolder.group_titles(rows)
    if args.within == "class" and not args.as_attribute:
        embeddings = without_group_means(embeddings, [imagefolder.group_of(row) for row in rows])
    if args.attributes:
        name_attributes(rows, embeddings, args)
    else:
        cluster_rows(rows, embeddings, titles, args)
    sheets = [f"y{row['y']}" if args.within == "dataset" else part_of(row, args) for row in rows]
    if args.as_attribute:
        rows = with_attribute(rows, args)
    with files.replacing(args.out) as out:
        out.mkdir()
        for name in sorted(set(sheets)):
            save_sheet(out / f"{name}.png", args.data, [row for row, sheet in zip(rows, sheets) if sheet == name],
                       "a" if args.as_attribute else "cluster")
        link_images(out, args.data, rows)
        files.write_csv(out / "metadata.csv", rows)
        stage.finish(out, args, key, inputs)


def part_of(row, args):
    """The part of the data that a row is clustered in."""
    return {"group": imagefolder.group_of(row), "class": f"y{row['y']}", "dataset": "all"}[args.within]


def cluster_rows(rows, embeddings, titles, args):
    """Adds `cluster` to each row: of its part's training images, or else the nearest one."""
    parts = [part_of(row, args) for row in rows]
    for name in sorted(set(parts)):
        members = [i for i, part in enumerate(parts) if part == name]
        train = [i for i in members if rows[i]["split"] == "train"]
        labels = np.array(group_clusters(embeddings[train], args.k, args.k_max, args.min_size, stage.seed_of(args.seed, name)),
                          dtype=int)
        others = [i for i in members if rows[i]["split"] != "train"]
        found = nearest_cluster(embeddings[others], embeddings[train], labels) if others and train else [0] * len(others)
        for i, label in zip(train + others, [*labels, *found]):
            rows[i]["cluster"] = int(label)
        title = titles.get(name, "all classes" if name == "all" else f"class {name}")
        print(f"{title}: {len(train)} images in clusters of {np.bincount(labels).tolist()}")


def name_attributes(rows, embeddings, args):
    """Adds `cluster`, the index of one of --attributes, and `confidence` to each row."""
    clip = models.Clip(args.clip, models.pick_device("auto"))
    prompts = {y: texts[0] for y, texts in imagefolder.class_prompts(rows).items()}
    for row, label, confidence in zip(rows, *most_similar(embeddings, rows, prompts, args.attributes, clip)):
        row["cluster"], row["confidence"] = int(label), f"{confidence:.4f}"
    for number, words in enumerate(args.attributes):
        chosen = [float(row["confidence"]) for row in rows if row["cluster"] == number]
        print(f"{words}: {len(chosen)} images" + (f", mean confidence {sum(chosen) / len(chosen):.3f}" if chosen else ""))
    if len({row["a"] for row in rows}) > 1:
        agree = sum(row["cluster"] == row["a"] for row in rows) / len(rows)
        print(f"accuracy of the words, taken in order for a = 0, 1, ...: {agree:.3f}")


def with_attribute(rows, args):
    """The rows with their cluster as attribute, and without any label of DATA but the class."""
    prompts = imagefolder.class_prompts(rows)
    several = next((y for y, texts in prompts.items() if len(texts) > 1), None)
    if several is not None:
        raise InputError(args.data / "metadata.csv", f"has no column class_text, and class {several} has several texts",
                         "add class_text, the prompt of each class")
    return [{"file_name": row["file_name"], "split": row["split"], "y": row["y"], "a": row["cluster"],
             "text": " ".join([prompts[row["y"]][0], *args.attributes[row["cluster"]:][:1]]), "class_text": prompts[row["y"]][0],
             **({"confidence": row["confidence"]} if args.attributes else {})} for row in rows]


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    count = stage.number(int, 1)
    parser.add_argument("--data", type=Path, required=True, help="real images: a prepared dataset folder")
    parser.add_argument("--embeddings", type=Path, required=True, help="of its images: output folder of data/embed.py")
    parser.add_argument("--k", type=number_of_clusters, default="auto", help="clusters per group or class, or auto")
    parser.add_argument("--within", choices=("group", "class", "dataset"), default="group", help="what is clustered")
    parser.add_argument("--as-attribute", action=stage.Flag, default=False,
                        help="write a dataset whose attribute is the cluster: for data without attribute labels")
    parser.add_argument("--attributes", nargs="+", metavar="WORDS", default=[], help='words for --as-attribute instead of '
                        'clusters, such as "on land" "on water"; they follow the prompt of the class')
    parser.add_argument("--clip", help="for --attributes: the CLIP model of the embeddings, a folder or hub id")
    parser.add_argument("--k-max", type=count, default=5, help="largest number of clusters that auto tries")
    parser.add_argument("--min-size", type=count, default=10,
                        help="smallest number of images in a cluster: models memorise smaller ones (not from the paper)")
    parser.add_argument("--seed", type=int, default=0, help="seed of k-means")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    if args.attributes and not (args.clip and args.as_attribute):
        raise InputError("--attributes", "needs --clip and --as-attribute", "add them")
    if args.attributes:
        args.within = "dataset"
    if args.as_attribute and args.within == "group":
        raise InputError("--as-attribute", "a cluster of a group depends on its attribute", "add --within class or dataset")
    if args.within == "dataset" and not args.as_attribute:
        raise InputError("--within dataset", "its clusters span classes", "add --as-attribute")
    return args


def number_of_clusters(text):
    return text if text == "auto" else stage.number(int, 1)(text)


def save_sheet(path, data, rows, column):
    """One row of up to 20 images per cluster, whose number is in a column."""
    clusters = [[row for row in rows if row[column] == c] for c in range(1 + max(row[column] for row in rows))]
    images = [[imagefolder.load_image(data / row["file_name"], 64) for row in members[:20]] for members in clusters]
    imagefolder.contact_sheet(images, [f"c{c} ({len(members)})" for c, members in enumerate(clusters)]).save(path)


def link_images(out, data, rows):
    """Links in `out` through which its file_names lead to the images of `data`: nothing is copied."""
    for top in sorted({Path(row["file_name"]).parts[0] for row in rows}):
        (out / top).symlink_to(f"{link_between(out, data)}/{top}")


def link_between(out, data):
    """The relative path from `out` to `data`, whatever links lead to them."""
    return os.path.relpath(os.path.realpath(data), os.path.realpath(out))


if __name__ == "__main__":
    stage.run(main)
