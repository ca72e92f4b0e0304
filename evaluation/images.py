"""The quality of the synthetic images, measured against real images that no model has seen.

    python evaluation/images.py --data data/digits-0.95 --clip base/miniature/clip \\
        --synthetic runs/digits-0.95/synthetic/{vanilla,lora} \\
        --embeddings runs/digits-0.95/embeddings --out runs/digits-0.95/images

In CLIP space, for each synthetic set and group: the kernel distance to the held-out real images
(val and test), precision, recall, density and coverage, and the share that is suspiciously near to
a training image. Two linear probes ask whether the images tell which model drew them, and whether a
class looks as it does in real images. The real training images are measured in the same way, as
method `real`: what a perfect generator would get. Whether an image shows what it claims is asked of
CLIP, zero-shot. Of larger sets and groups, 10,000 images are drawn and compared.

Reads DATA, its embeddings, and each SYNTHETIC. Writes OUT/groups.csv (a row per method and group),
OUT/synthetic.csv (a row per method), OUT/cost.csv (seconds and megabytes per method), OUT/images.md
(both as tables), OUT/<method>.png (the closest pairs, synthetic above real) and OUT/config.json.
"""

import random
import sys
from collections import Counter
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository
from common import clip, compute, files, imagefolder, made, pixels, stage
from common.files import InputError
from evaluation import figures

np = stage.lazy("numpy")

LIMIT = 10_000  # images of a set and group that are compared: time grows with their square
BLOCK = 500  # rows of a matrix of distances or kernels that are in memory at once
FOLDS = 5  # of cross-validation; a group needs as many images

MEASURES = (  # the columns of synthetic.csv
    "Means over groups; real: the real training images, for comparison. Groups of more than 10,000 "
    "images are measured on as many of them, drawn at random. rejected: share of the drawn images; "
    "kid: kernel distance to held-out real images in CLIP space; coverage: share of held-out "
    "images that are covered; too_near: share that is suspiciously near to a training image "
    "(chance: 0.01); leakage: accuracy of a linear probe that tells bias-aligned from "
    "bias-conflicting images (chance: 0.5; real: held-out images, what content alone gives away), "
    "high if images show which model drew them; real_gap: accuracy of a linear probe for the "
    "class, trained on synthetic images, on other synthetic images minus held-out real ones, high "
    "if it uses what only synthetic images have; clip_class, clip_attribute: share that CLIP "
    "recognises as the "
    "class, the attribute that it claims.")

# ------------------------------------------------------- two sets of embeddings, (N, D) and (M, D)


def kernel_distance(synthetic, real):
    """Unbiased estimate of the squared MMD with the kernel (x.y / D + 1)^3: KID.

    (Binkowski et al. 2018, section 4.) Its mean is 0 for samples of one distribution, so it may be
    negative. None if a set has fewer than two images.
    """
    n, m = len(synthetic), len(real)
    if min(n, m) < 2:
        return None

    def kernel_sum(x, y):
        return sum(((rows @ y.T / x.shape[1] + 1) ** 3).sum() for rows in blocks(x))

    def mean_within(x):  # of different images
        same = (((x * x).sum(1) / x.shape[1] + 1) ** 3).sum()
        return (kernel_sum(x, x) - same) / (len(x) * (len(x) - 1))

    between = kernel_sum(synthetic, real) / (n * m)
    return mean_within(synthetic) + mean_within(real) - 2 * between


def precision_recall_density_coverage(synthetic, real, k=5):
    """From the balls around each image that hold its k nearest of its own set; {} for tiny sets.

    precision, recall: shares of one set inside balls of the other (Kynkaanniemi et al. 2019);
    density: how many of the real balls hold a synthetic image, divided by k (may exceed 1);
    coverage: share of real balls that hold any (Naeem et al. 2020, section 3).
    """
    from sklearn.metrics import pairwise_distances  # takes seconds to import
    from sklearn.neighbors import NearestNeighbors

    if min(len(synthetic), len(real)) <= k:
        return {}

    def radii_of(x):  # [:, 0] is the image itself
        neighbours = NearestNeighbors(n_neighbors=k + 1, algorithm="brute").fit(x)
        return neighbours.kneighbors(x)[0][:, k]

    radius, real_radius = radii_of(synthetic), radii_of(real)
    balls, recalled, covered = [], np.zeros(len(real), bool), np.zeros(len(real), bool)
    for rows, radii in zip(blocks(synthetic), blocks(radius)):
        between = pairwise_distances(rows, real)
        in_real = between < real_radius
        balls.append(in_real.sum(1))  # real balls that hold each synthetic image
        covered |= in_real.any(0)
        recalled |= (between < radii[:, None]).any(0)
    balls = np.concatenate(balls)
    return {"precision": (balls > 0).mean(), "recall": recalled.mean(),
            "density": balls.mean() / k, "coverage": covered.mean()}


def blocks(x):
    return (x[i:i + BLOCK] for i in range(0, len(x), BLOCK))


def nearest(x, y):
    """(index, distance) of the nearest of y to each of x, (N,) each, in bounded memory."""
    from sklearn.metrics import pairwise_distances_argmin_min

    return pairwise_distances_argmin_min(x.astype(y.dtype), y)


def too_near(synthetic, train, held_out):
    """(share, threshold): how many are as near to a training image as the nearest 1 % of held-out.

    0.01 is expected of images that are independent of the training set; 1 is copying.
    """
    threshold = np.quantile(nearest(held_out, train)[1], 0.01)
    return (nearest(synthetic, train)[1] <= threshold).mean(), threshold


def claims(rows, embeddings, prompts):
    """Shares of images whose class, and whose attribute, CLIP recognises as claimed, zero-shot.

    prompts: {group: embedding of its prompt}. CLIP chooses the group whose prompt is nearest to the
    image; the class is correct if that group's is. Where groups share a prompt, as pseudo-groups
    do, the attribute is unknown: "".
    """
    labels = np.array([imagefolder.labels_of(group) for group in prompts])
    texts = np.stack(list(prompts.values()))
    chosen = labels[(embeddings @ texts.T).argmax(1)]
    correct = chosen == [(row["y"], row["a"]) for row in rows]
    shares = dict(zip(("clip_class", "clip_attribute"), correct.mean(0).tolist()))
    alike = len(np.unique(texts, axis=0)) < len(prompts)
    return shares | ({"clip_attribute": ""} if alike else {})


# ------------------------------------------------------- linear probes; rows: of metadata


def probe(labels, groups, embeddings, others):
    """A linear probe's predictions: (N,) by cross-validation, (FOLDS, M) on `others` by each fold.

    labels: (N,) int; groups: N names, each of one label; embeddings: (N, D); others: (M, D). Labels
    count equally, and so do the groups of a label. Every group needs FOLDS images.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sizes, shares = Counter(groups), Counter(dict(zip(groups, labels)).values())
    weights = [1 / sizes[group] / shares[label] for group, label in zip(groups, labels)]
    weights = np.array(weights) / np.mean(weights)  # regularised as if unweighted
    found, of_others = np.empty_like(labels), []
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    for fit, rest in folds.split(embeddings, groups):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        model.fit(embeddings[fit], labels[fit], logisticregression__sample_weight=weights[fit])
        found[rest] = model.predict(embeddings[rest])
        of_others.append(model.predict(others))
    return found, np.array(of_others)


def generator_leakage(rows, embeddings, train_counts):
    """{group: share of its images that a probe tells to be bias-aligned or -conflicting}.

    Where class and attribute are balanced, this is an exclusive-or of the two. A linear probe can
    hardly read that from what images show, but easily from the traces of the models that drew them
    (ours; a classifier two-sample test, Lopez-Paz & Oquab 2017). Chance is 0.5; real images tell
    what content alone gives away. {} unless there are two attributes, classes differ in the one
    that they are correlated with, and each has FOLDS images with every attribute.
    """
    sizes = imagefolder.group_counts(rows)
    classes, attributes = (sorted({row[label] for row in rows}) for label in "ya")
    correlated = {y: imagefolder.correlated_attribute(train_counts, y) for y in classes}
    smallest = min(sizes.get(imagefolder.group_name(y, a), 0) for y in classes for a in attributes)
    if min(len(attributes), len(set(correlated.values()))) < 2 or smallest < FOLDS:
        return {}
    aligned = np.array([int(row["a"] == correlated[row["y"]]) for row in rows])
    groups = [imagefolder.group_of(row) for row in rows]
    found = probe(aligned, groups, embeddings, embeddings[:1])[0]
    return shares_by_group(groups, found == aligned)


def real_gap(rows, embeddings, held_out, held_out_embeddings):
    """{group: accuracy of a probe for the class on images of its own set, minus on real ones}.

    Large and positive if the probe uses what only synthetic images have. The first accuracy is
    cross-validated. Leaves out groups with fewer than FOLDS images, or without held-out images; {}
    if the other groups are of one class.
    """
    sizes = imagefolder.group_counts(rows)
    chosen = [i for i, row in enumerate(rows) if sizes[imagefolder.group_of(row)] >= FOLDS]
    rows, embeddings = [rows[i] for i in chosen], embeddings[chosen]
    groups, real_groups = ([imagefolder.group_of(row) for row in part] for part in (rows, held_out))
    y, real_y = (np.array([row["y"] for row in part], int) for part in (rows, held_out))
    if len(set(y)) < 2 or not held_out:
        return {}
    found, of_real = probe(y, groups, embeddings, held_out_embeddings)
    accuracy = shares_by_group(groups, found == y)
    on_real = shares_by_group(real_groups, (of_real == real_y).mean(0))
    return {group: accuracy[group] - on_real[group] for group in accuracy if group in on_real}


def shares_by_group(groups, correct):
    """{group: mean of its entries of `correct`, (N,)}."""
    groups = np.array(groups)
    return {group: correct[groups == group].mean() for group in dict.fromkeys(groups.tolist())}


# ------------------------------------------------------------------------------------- the tables


def drawn(name, rows, group, limit=None):
    """The indices of at most `limit` (default: LIMIT) images of a group, drawn with a seed."""
    members, limit = imagefolder.members_of(group, rows), LIMIT if limit is None else limit
    if len(members) <= limit:
        return members
    return sorted(random.Random(stage.seed_of(name, group)).sample(members, limit))


def balanced(name, rows, embeddings):
    """(rows, embeddings) of at most LIMIT images, from each group at most its equal share."""
    groups = imagefolder.group_counts(rows)
    chosen = [i for group in groups for i in drawn(name, rows, group, LIMIT // len(groups))]
    return [rows[i] for i in chosen], embeddings[chosen]


def group_rows(method, rows, embeddings, real, counts, titles):
    """[{method, group, name, clusters, images, rejected, kid, precision, ...}], "" where unknown.

    clusters: the number of units that drew the group. real: {"train" or "held-out": (rows,
    embeddings)}; counts: of generate.py, how many candidates were kept or rejected, and why. The
    leakage of method `real` is that of the held-out images, whose classes and attributes are
    balanced as far as the dataset allows.
    """
    table, train, held_out = [], real["train"], real["held-out"]
    probed, real_probed = balanced(method, rows, embeddings), balanced("held-out", *held_out)
    train_counts = imagefolder.group_counts(train[0])
    leakage = generator_leakage(*(real_probed if method == "real" else probed), train_counts)
    gap = real_gap(*probed, *real_probed)
    for group, size in imagefolder.group_counts(rows).items():
        points = embeddings[drawn(method, rows, group)].astype(float)
        others = held_out[1][drawn("held-out", held_out[0], group)].astype(float)
        of_train = imagefolder.members_of(group, train[0])  # all: any may have been copied
        tried = [verdicts for unit, verdicts in counts.items()
                 if unit == group or unit.startswith(f"{group}-")]
        total = sum(sum(verdicts.values()) for verdicts in tried)
        kept = sum(verdicts["kept"] for verdicts in tried)
        units = {rows[i].get("unit") for i in imagefolder.members_of(group, rows)}
        line = {"method": method, "group": group, "name": titles.get(group, group),
                "clusters": len(units), "images": size,
                "rejected": 1 - kept / total if total else None,
                "kid": kernel_distance(points, others),
                **dict.fromkeys(("precision", "recall", "density", "coverage")),
                **precision_recall_density_coverage(points, others), "too_near": None,
                "leakage": leakage.get(group), "real_gap": gap.get(group)}
        if method != "real" and of_train and len(others):
            line["too_near"] = too_near(points, train[1][of_train], others)[0]
        line = {key: "" if value is None else value for key, value in line.items()}
        table.append(rounded(line, 5))
    return table


def rounded(line, digits):
    return {name: f"{value:.{digits}f}" if isinstance(value, float) else value
            for name, value in line.items()}


def set_row(method, rows, embeddings, table, prompts):
    """{method, images, rejected, ...}: means over the groups of its table, and what CLIP says."""
    line = {"method": method, "images": len(rows)}
    for name in ("rejected", "kid", "coverage", "too_near", "leakage", "real_gap"):
        known = [float(row[name]) for row in table if row[name] != ""]
        line[name] = mean(known) if known else ""
    line |= claims(rows, embeddings, prompts)
    return rounded(line | rounded({"kid": line["kid"]}, 4), 3)


def unfit(line, real, classes):
    """A sentence if a set, usually vanilla, shows that its base model does not know such images.

    Either its images cover less than a tenth of the held-out images that the real training images
    cover, or CLIP recognises the class in no more of them than by chance (two standard
    deviations). line, real: of set_row(); classes: their number.
    """
    faults, count, chance = [], line["images"], 1 / classes
    if line["coverage"] != "" and float(line["coverage"]) < 0.1 * float(real["coverage"] or 0):
        faults.append(f"they cover {line['coverage']} of the held-out images (real training "
                      f"images: {real['coverage']})")
    expected = chance + 2 * (chance * (1 - chance) / count) ** 0.5
    if classes > 1 and float(line["clip_class"]) <= expected:
        faults.append(f"CLIP recognises the class in {line['clip_class']} of them (chance: "
                      f"{chance:.3f})")
    if not faults:
        return ""
    return (f"The base model or CLIP does not know images like these, as those of {line['method']} "
            f"show: {' and '.join(faults)}. Choose another (BASE=, CLIP=), or train one on images "
            "of this kind (make base, see README).")


def save_closest(path, rows, source, embeddings, data, train, train_embeddings, titles):
    """The 12 closest pairs per group: synthetic images, and below each its nearest of training."""
    lines, labels = [], []
    for group in imagefolder.group_counts(rows):
        mine, theirs = drawn(source.name, rows, group), imagefolder.members_of(group, train)
        if theirs:
            closest, distance = nearest(embeddings[mine], train_embeddings[theirs])
            chosen = distance.argsort(kind="stable")[:12]
            pairs = [(source / rows[mine[i]]["file_name"],
                      data / train[theirs[closest[i]]]["file_name"]) for i in chosen]
            lines += [[imagefolder.load_image(path, 64) for path in side] for side in zip(*pairs)]
            labels += [f"{titles.get(group, group)}: synthetic", "nearest training image"]
    imagefolder.contact_sheet(lines, labels).save(path)


def cost(source):
    """What a synthetic set cost: seconds of fine-tuning and generation, MB of weights on disk."""
    def seconds(where):
        configs = map(files.read_json, Path(where).glob("*/config.json"))
        return round(sum(config.get("seconds", 0) for config in configs))

    models = files.read_json(source / "config.json").get("arguments", {}).get("models")
    weights = list(Path(models).rglob("*.safetensors")) if models else []
    megabytes = f"{sum(path.stat().st_size for path in weights) / 1e6:.1f}"
    removed = models and not weights
    return {"method": source.name, "fine-tuning, s": seconds(models) if models else 0,
            "generation, s": seconds(source), "weights, MB": "removed" if removed else megabytes}


# --------------------------------------------------------------------------------------- the stage


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    everything = imagefolder.read_metadata(args.data)
    titles = imagefolder.group_titles(everything)
    sets = {source: imagefolder.read_metadata(source, "train") for source in args.synthetic}
    if all(row["split"] == "train" for row in everything):
        raise InputError(args.data, "has no images of split val or test", "prepare the data again")
    key = files.digest(
        imagefolder.digest(args.data, everything), files.model_digest(args.clip),
        clip.embeddings_digest(args.embeddings),
        [[str(source), imagefolder.digest(source, rows), files.read_json(source / "config.json")]
         for source, rows in sets.items()],
        made.code_digest(__file__, clip.__file__, imagefolder.load_image,
                         imagefolder.correlated_attribute))
    if stage.is_made(args, key):
        return
    encoder = clip.Clip(args.clip, compute.accelerator(args.device).device)

    def prompts_of(rows):
        prompts = imagefolder.group_prompts(rows)
        return dict(zip(prompts, encoder.texts(list(prompts.values())).numpy()))

    prompts, real = prompts_of(everything), {}
    for name in ("train", "held-out"):
        rows = [row for row in everything if (row["split"] == "train") == (name == "train")]
        real[name] = rows, clip.read_embeddings(args.embeddings, rows, encoder)
    groups = group_rows("real", *real["train"], real, {}, titles)
    table = [set_row("real", *real["train"], groups, prompts)]
    with files.replacing(args.out) as out:
        out.mkdir()
        for source, rows in sets.items():
            embeddings = clip.embed_images(encoder, source, rows, args.batch, args.cache)
            counts = files.read_json(source / "config.json").get("counts", {})
            of, its_prompts, names = real, prompts, titles
            folder, merged = imagefolder.groups_drawn(source, args.data)
            if folder != args.data:  # pseudo-groups
                of = {}
                for name, (part, found) in real.items():
                    part = imagefolder.with_attributes_of(folder, part)
                    of[name] = imagefolder.with_merged(part, merged), found
                its_prompts, names = prompts_of(imagefolder.read_metadata(folder)), {}
            mine = group_rows(source.name, rows, embeddings, of, counts, names)
            groups += mine
            table.append(set_row(source.name, rows, embeddings, mine, its_prompts))
            save_closest(out / f"{source.name}.png", rows, source, embeddings, args.data,
                         *of["train"], names)
        plain = {source.name for source in sets if files.read_json(
            source / "config.json").get("arguments", {}).get("models", "") is None}  # vanilla
        classes = len({row["y"] for row in everything})
        notes = [unfit(line, table[0], classes) for line in table if line["method"] in plain]
        notes = [note for note in notes if note]
        if notes:
            print(*notes, sep="\n")
        costs = [cost(source) for source in sets]
        for name, lines in (("groups", groups), ("synthetic", table), ("cost", costs)):
            files.write_csv(out / f"{name}.csv", lines)
        text = "\n\n".join((f"The synthetic images. {MEASURES}", *notes, markdown(table)))
        (out / "images.md").write_text(f"{text}\n{markdown(costs)}", encoding="utf-8")
        stage.finish(out, args, key, notes=notes)


def markdown(rows):
    return figures.markdown_table(list(rows[0]), [row.values() for row in rows])


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="real images: a prepared dataset folder")
    add("--synthetic", type=Path, nargs="+", required=True, help="output folders of generate.py")
    add("--embeddings", type=Path, required=True, help="of DATA's images: of data/embed.py")
    add("--clip", required=True, help="folder or hub id of the CLIP model that made them")
    add("--batch", type=stage.number(int, 1), default=64, help="images embedded at once")
    pixels.add_flag(parser)
    compute.add_flags(parser, precision=False)
    add("--out", type=Path, required=True, help="folder to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    stage.run(main)
