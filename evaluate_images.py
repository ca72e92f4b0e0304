"""Stage 5, first half: what the synthetic images are worth, against real images that no model has seen.

    python evaluate_images.py --data data/digits-0.95 --synthetic runs/digits-0.95/synthetic/{vanilla,lora} \\
        --clip base/miniature/clip --out runs/digits-0.95/images

In CLIP space, for each synthetic set and group: the kernel distance to the held-out real images (val and test),
precision, recall, density and coverage, and the share that is suspiciously near to a training image. Beside them the
real training images themselves, as method `real`: what a perfect generator would get. Whether an image is what it
claims is asked of CLIP, zero-shot, and with --judge of a classifier trained without bias.

Reads DATA and each SYNTHETIC. Writes OUT/groups.csv (a row a method and group), OUT/synthetic.csv (a row a method),
OUT/cost.csv (seconds and megabytes a method), OUT/<method>.png (the closest pairs, synthetic above real) and
OUT/config.json.
"""

import json
from pathlib import Path
from statistics import mean

from cluster import Clip, embed_images, pick_device
from data import imagefolder as folder

# --------------------------------------------------------------------- two sets of embeddings, (N, D) and (M, D)


def kernel_distance(synthetic, real):
    """Unbiased estimate of the squared MMD with the kernel (x.y / D + 1)^3: KID (Binkowski et al. 2018, section 4).

    0 for samples of one distribution, in the mean; it may be negative. None for a set of less than two.
    """
    n, m = len(synthetic), len(real)
    if min(n, m) < 2:
        return None

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    within = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(synthetic, synthetic),
                                                                          kernel(real, real)))
    return within - 2 * kernel(synthetic, real).mean()


def precision_recall_density_coverage(synthetic, real, k=5):
    """{precision, recall, density, coverage} by the balls around each image that hold its k nearest of its own kind.

    precision, recall: shares of one set in balls of the other (Kynkaanniemi et al. 2019); density: how many of the
    real balls hold a synthetic image, of k (may exceed 1); coverage: share of real balls that hold any (Naeem et al.
    2020, section 3). {} where a set has not more than k images.
    """
    import numpy as np

    if min(len(synthetic), len(real)) <= k:
        return {}
    ball, real_ball = (np.sort(distances(x, x), axis=1)[:, k] for x in (synthetic, real))  # [:, 0] is the image itself
    apart = distances(synthetic, real)
    in_real = apart < real_ball[None]
    return {"precision": in_real.any(1).mean(), "recall": (apart < ball[:, None]).any(0).mean(),
            "density": in_real.sum(1).mean() / k, "coverage": (apart.min(0) < real_ball).mean()}


def distances(x, y):
    """Euclidean distances, (N, M)."""
    from sklearn.metrics import pairwise_distances

    return pairwise_distances(x, y)


def too_near(synthetic, train, held_out):
    """(share, threshold): how many are as near to a training image as the nearest 1 % of held-out real images.

    0.01 is what images that know nothing of the training set would give; 1 is a copying machine.
    """
    import numpy as np

    threshold = np.quantile(distances(held_out, train).min(1), 0.01)
    return (distances(synthetic, train).min(1) <= threshold).mean(), threshold


# ------------------------------------------------------------------------------ is an image what it claims to be


def claims(rows, embeddings, prompts):
    """Shares of a synthetic set's images whose class, and whose attribute, CLIP tells as claimed, zero-shot.

    prompts: {group: embedding of its prompt}. CLIP is asked which group's prompt an image is nearest to; its class is
    right if that group's is.
    """
    import numpy as np

    labels = np.array([folder.labels_of(group) for group in prompts])
    answers = labels[(embeddings @ np.stack(list(prompts.values())).T).argmax(1)]
    right = answers == [(row["y"], row["a"]) for row in rows]
    return dict(zip(("clip_class", "clip_attribute"), right.mean(0).tolist()))


def load_judge(path):
    """(classifier, pixels a side that it sees) of an OUT/seed<k> of train_classifier.py, trained without bias."""
    from safetensors.torch import load_file

    from train_classifier import Classifier

    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))["arguments"]
        weights = load_file(path / "model.safetensors")
        model = Classifier(settings["arch"], "none", len(weights["last_layer.bias"]))
        model.load_state_dict(weights)
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, RuntimeError of wrong shapes
        raise folder.InputError(f"--judge {path}", f"can't be loaded: {str(error).splitlines()[0]}",
                                "give a seed<k> of train_classifier.py's OUT") from None
    return model, settings["resolution"]


def judged_class(rows, source, judge):
    """Share of images whose class the judge, of load_judge, tells as claimed."""
    from train_classifier import Images, predict

    model, size = judge
    images = Images(source, rows, size, list(folder.group_counts(rows)))
    return (predict(model, images, size).argmax(1) == images.y).float().mean().item()


def mean_colour(path):
    import numpy as np

    return np.asarray(folder.load_image(path, 32), float).mean((0, 1))


def attribute_colours(rows, data):
    """{a: mean colour of the real images of that attribute}."""
    import numpy as np

    return {a: np.mean([mean_colour(data / row["file_name"]) for row in rows if row["a"] == a], axis=0)
            for a in sorted({row["a"] for row in rows})}


def judged_attribute(rows, source, colours):
    """Share of images whose mean colour is nearest to that of the attribute that they claim."""
    import numpy as np

    def nearest(colour):
        return min(colours, key=lambda a: np.linalg.norm(colours[a] - colour))

    return float(mean(nearest(mean_colour(source / row["file_name"])) == row["a"] for row in rows))


# ------------------------------------------------------------------------------------------------ the stage


def group_rows(method, rows, embeddings, real, counts):
    """[{method, group, clusters, images, rejected, kid, precision, recall, density, coverage, too_near}], empty where
    unknown; clusters: in how many the group was drawn.

    real: {"train" or "held-out": (rows, embeddings)}; counts: of generate.py, how many candidates got which verdict.
    """
    table = []
    for group, size in folder.group_counts(rows).items():
        points, held_out, train = (part[folder.members_of(group, of)] for of, part in (
            (rows, embeddings), real["held-out"], real["train"]))
        tried = [verdicts for unit, verdicts in counts.items() if unit == group or unit.startswith(f"{group}-")]
        total = sum(sum(verdicts.values()) for verdicts in tried)
        units = {rows[i].get("unit") for i in folder.members_of(group, rows)}
        line = {"method": method, "group": group, "clusters": len(units), "images": size,
                "rejected": 1 - sum(verdicts["kept"] for verdicts in tried) / total if total else None,
                "kid": kernel_distance(points, held_out),
                **dict.fromkeys(("precision", "recall", "density", "coverage")),
                **precision_recall_density_coverage(points, held_out), "too_near": None}
        if method != "real" and len(train) and len(held_out):
            line["too_near"] = too_near(points, train, held_out)[0]
        table.append({key: f"{value:.5f}" if isinstance(value, float) else "" if value is None else value
                      for key, value in line.items()})
    return table


def save_closest(path, rows, source, embeddings, data, train, train_embeddings):
    """A sheet of the 12 pairs a group that lie nearest: synthetic images, and below each its nearest training image."""
    lines, labels = [], []
    for group in folder.group_counts(rows):
        mine, theirs = (folder.members_of(group, part) for part in (rows, train))
        if not theirs:
            continue
        apart = distances(embeddings[mine], train_embeddings[theirs])
        chosen = apart.min(1).argsort(kind="stable")[:12]
        lines += [[folder.load_image(source / rows[mine[i]]["file_name"], 64) for i in chosen],
                  [folder.load_image(data / train[theirs[apart[i].argmin()]]["file_name"], 64) for i in chosen]]
        labels += [f"{group} synthetic", "nearest real"]
    folder.contact_sheet(lines, labels).save(path)


def config_of(source):
    """What generate.py says of a synthetic set; {} of images that were made elsewhere."""
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def cost(source):
    """What a synthetic set took, to its last unit: seconds of fine-tuning and of generation, MB of weights on disk."""
    def seconds(where):
        configs = [json.loads(path.read_text(encoding="utf-8")) for path in Path(where).glob("*/config.json")]
        return sum(config.get("seconds", 0) for config in configs)

    models = config_of(source).get("arguments", {}).get("models")
    weights = sum(path.stat().st_size for path in Path(models).rglob("*.safetensors")) if models else 0
    return {"method": source.name, "fine-tuning, s": round(seconds(models)) if models else 0,
            "generation, s": round(seconds(source)), "weights, MB": f"{weights / 1e6:.1f}"}


def main():
    parser = folder.Arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="real images: folder in the one format")
    parser.add_argument("--synthetic", type=Path, nargs="+", required=True, help="OUTs of generate.py")
    parser.add_argument("--clip", required=True, help="folder or hub id of a CLIP model")
    parser.add_argument("--judge", type=Path, help="a seed<k> of train_classifier.py on unbiased images, to judge "
                        "classes; the attribute is then judged by mean colour (digits)")
    parser.add_argument("--batch", type=folder.number(int, 1), default=64, help="images embedded at once")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    everything = folder.read_metadata(args.data)
    prompts = folder.group_prompts(everything)
    sets = {source: folder.read_metadata(source, "train") for source in args.synthetic}
    if all(row["split"] == "train" for row in everything):
        raise folder.InputError(args.data, "has no image of split val or test", "prepare the data again")
    judge = load_judge(args.judge) if args.judge else None
    clip = Clip(args.clip, pick_device(args.device))
    prompts = dict(zip(prompts, clip.texts(list(prompts.values())).numpy()))
    real = {name: [row for row in everything if (row["split"] == "train") == (name == "train")]
            for name in ("train", "held-out")}
    real = {name: (rows, embed_images(clip, args.data, rows, args.batch).astype(float)) for name, rows in real.items()}
    colours = attribute_colours(real["train"][0], args.data) if args.judge else {}
    groups, table = group_rows("real", *real["train"], real, {}), []
    with folder.replacing(args.out) as out:
        out.mkdir()
        for source, rows in sets.items():
            embeddings = embed_images(clip, source, rows, args.batch).astype(float)
            mine = group_rows(source.name, rows, embeddings, real, config_of(source).get("counts", {}))
            groups += mine
            line = {"method": source.name, "images": len(rows)}
            line |= {name: mean(float(row[name]) for row in mine if row[name] != "")
                     for name in ("rejected", "kid", "coverage", "too_near") if any(row[name] != "" for row in mine)}
            line |= claims(rows, embeddings, prompts)
            if judge:
                line |= {"judge_class": judged_class(rows, source, judge),
                         "judge_colour": judged_attribute(rows, source, colours)}
            table.append({key: f"{value:.{4 if key == 'kid' else 3}f}" if isinstance(value, float) else value
                          for key, value in line.items()})
            save_closest(out / f"{source.name}.png", rows, source, embeddings, args.data, *real["train"])
        folder.write_csv(out / "groups.csv", groups)
        folder.write_csv(out / "synthetic.csv", table, list(dict.fromkeys(key for line in table for key in line)))
        folder.write_csv(out / "cost.csv", [cost(source) for source in sets])
        folder.write_config(out, args, folder.digest(groups, table))
    print((args.out / "synthetic.csv").read_text(encoding="utf-8"))
    print(f"Pictures: {args.out}/*.png")


if __name__ == "__main__":
    folder.run(main)
