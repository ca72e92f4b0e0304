"""Stage 1: clusters the training images within each group (class x attribute), or within each class.

    python cluster.py --data data/digits-0.95 --embeddings runs/digits-0.95/embeddings --out runs/digits-0.95/clusters
    python cluster.py --data data/digits-0.95 --embeddings runs/digits-0.95/embeddings --within class --k 5 --out /tmp/modes

k-means on CLIP image embeddings within each group (paper, "Clustered DreamBooth"), so that no diffusion model has to
carry too much variation. `--k auto` takes the number of clusters with the best silhouette. No cluster is smaller than
--min-size: smaller ones are merged into their nearest, and a group too small to split stays whole.
`--within class` (ours) clusters a class across its groups, for finetune.py --per dataset; each group's mean embedding is
subtracted first, so that k-means does not find the attribute again.

Reads DATA (split train) and the embeddings of data/embed.py. Writes OUT/metadata.csv (the same rows with a column `cluster`,
an integer from 0 within the group or class, largest first), OUT/<group or class>.png (a sheet with one row per cluster) and
OUT/config.json.
"""

import os
from pathlib import Path

from common import files, imagefolder, models, stage

np = stage.lazy("numpy")

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
    sample = {"sample_size": 10_000, "random_state": seed % 2**32} if len(embeddings) > 10_000 else {}
    return max(candidates, key=lambda labels: silhouette_score(embeddings, labels, **sample))


def kmeans(embeddings, k, min_size, seed):
    """k-means; clusters smaller than min_size are dissolved, smallest first, each image into its nearest other one."""
    from sklearn.cluster import KMeans  # slow to import
    from sklearn.metrics import pairwise_distances_argmin

    fit = KMeans(k, n_init=10, random_state=seed % 2**32).fit(embeddings)
    centres, labels = fit.cluster_centers_, fit.labels_
    while (sizes := np.bincount(labels, minlength=len(centres))).min() < min_size:
        centres = np.delete(centres, sizes.argmin(), axis=0)
        labels = pairwise_distances_argmin(embeddings, centres)
    return np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")[labels]


def without_group_means(embeddings, groups):
    """Embeddings (N, D) minus the mean of their group; groups: a name for each."""
    names, members = np.unique(groups, return_inverse=True)
    means = np.stack([embeddings[members == i].mean(0) for i in range(len(names))])
    return embeddings - means[members]


# ------------------------------------------------------------------------------------------------ the stage


def main(argv=None):
    args = parse(argv)
    inputs = stage.begin(args)
    rows = imagefolder.read_metadata(args.data, "train")
    key = files.digest(stage.settings_of(args, "embeddings"), imagefolder.digest(args.data, rows),
                       link_between(args.out, args.data), models.embeddings_digest(args.embeddings),
                       stage.code_digest(__file__, models.__file__, imagefolder.load_image))
    if stage.is_made(args, key, inputs):
        return print(f"{args.out}: up to date")

    embeddings = models.read_embeddings(args.embeddings, rows)
    titles = imagefolder.group_titles(rows)
    if args.within == "class":
        embeddings = without_group_means(embeddings, [imagefolder.group_of(row) for row in rows])
    names = [imagefolder.group_of(row) if args.within == "group" else f"y{row['y']}" for row in rows]
    with files.replacing(args.out) as out:
        out.mkdir()
        for name in sorted(set(names)):
            members = [i for i, other in enumerate(names) if other == name]
            labels = group_clusters(embeddings[members], args.k, args.k_max, args.min_size,
                                    stage.seed_of(args.seed, name))
            for i, label in zip(members, labels):
                rows[i]["cluster"] = int(label)
            save_sheet(out / f"{name}.png", args.data, [rows[i] for i in members])
            sizes = [list(labels).count(c) for c in range(max(labels) + 1)]
            print(f"{titles.get(name, f'class {name}')}: {len(members)} images in clusters of {sizes}")
        link_images(out, args.data, rows)
        files.write_csv(out / "metadata.csv", rows)
        stage.finish(out, args, key, inputs)


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    count = stage.number(int, 1)
    parser.add_argument("--data", type=Path, required=True, help="real images: a prepared dataset folder")
    parser.add_argument("--embeddings", type=Path, required=True, help="of its images: output folder of data/embed.py")
    parser.add_argument("--k", type=number_of_clusters, default="auto", help="clusters per group or class, or auto")
    parser.add_argument("--within", choices=("group", "class"), default="group", help="what is clustered")
    parser.add_argument("--k-max", type=count, default=5, help="largest number of clusters that auto tries")
    parser.add_argument("--min-size", type=count, default=10,
                        help="smallest number of images in a cluster: models memorise smaller ones (not from the paper)")
    parser.add_argument("--seed", type=int, default=0, help="seed of k-means")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser.parse_args(argv)


def number_of_clusters(text):
    return text if text == "auto" else stage.number(int, 1)(text)


def save_sheet(path, data, rows):
    """One row of up to 20 images per cluster."""
    clusters = [[row for row in rows if row["cluster"] == c] for c in range(1 + max(row["cluster"] for row in rows))]
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
