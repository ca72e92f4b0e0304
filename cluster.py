"""Stage 1: clusters the training images within each group (class x attribute), or within each class.

    python cluster.py --data data/digits-0.95 --clip base/miniature/clip --k auto --out runs/digits-0.95/clusters
    python cluster.py --data data/digits-0.95 --clip base/miniature/clip --k 5 --within class --out /tmp/modes

CLIP image embeddings, then k-means within each group (paper, "Clustered DreamBooth"), so that no diffusion model
has to carry too much variation. With `--k auto` the number of clusters is the one with the best silhouette.
No cluster is smaller than --min-size: smaller ones join their nearest, a group too small to split stays whole.
`--within class` (ours) clusters a class across its groups, for finetune.py --per dataset: each group's mean is taken
out of its embeddings first, so that k-means does not find the attribute again.

Reads DATA/metadata.csv and its images of split train. Writes OUT/metadata.csv (the same rows, with a column
`cluster`, an integer from 0 within the group or class, largest first), OUT/<group or class>.png (a contact sheet,
rows = clusters) and OUT/config.json.
"""

import os
from pathlib import Path

from data import imagefolder as folder

# ---------------------------------------------------------------------------------------------- the method


def group_clusters(embeddings, k, k_max, min_size, seed):
    """Clusters one group, or one class.

    embeddings: (N, D) float array. k: an int, or "auto" for the best silhouette in 2..k_max.
    Returns labels (N,) int from 0, largest cluster first; all 0 where the group is too small to split.
    """
    from sklearn.metrics import silhouette_score

    largest = min(k_max if k == "auto" else k, len(embeddings) // min_size)
    candidates = [kmeans(embeddings, n, min_size, seed) for n in (range(2, largest + 1) if k == "auto" else [largest])
                  if n > 1]
    candidates = [labels for labels in candidates if labels.max() > 0]
    if not candidates:
        return [0] * len(embeddings)
    some = {"sample_size": 10_000, "random_state": seed % 2**32} if len(embeddings) > 10_000 else {}  # all: N x N
    return max(candidates, key=lambda labels: silhouette_score(embeddings, labels, **some))


def kmeans(embeddings, k, min_size, seed):
    """k-means whose clusters smaller than min_size are dissolved, smallest first, each image into its nearest."""
    import numpy as np
    from sklearn.cluster import KMeans
    from sklearn.metrics import pairwise_distances_argmin

    fit = KMeans(k, n_init=10, random_state=seed % 2**32).fit(embeddings)
    centres, labels = fit.cluster_centers_, fit.labels_
    while (sizes := np.bincount(labels, minlength=len(centres))).min() < min_size:
        centres = np.delete(centres, sizes.argmin(), axis=0)
        labels = pairwise_distances_argmin(embeddings, centres)
    return np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")[labels]


def without_group_means(embeddings, groups):
    """Embeddings (N, D) less the mean of their group; groups: a name each."""
    import numpy as np

    names, members = np.unique(groups, return_inverse=True)
    means = np.stack([embeddings[members == i].mean(0) for i in range(len(names))])
    return embeddings - means[members]


def attribute_left(embeddings, attributes, seed):
    """Balanced accuracy with which a linear probe reads the attribute, 5-fold; None where there is too little of one.

    1 / number of attributes is chance.
    """
    from collections import Counter

    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    counts = Counter(attributes)
    if len(counts) < 2 or min(counts.values()) < 5:
        return None
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    probe = LogisticRegression(class_weight="balanced", max_iter=1000)
    return cross_val_score(probe, embeddings, attributes, cv=folds, scoring="balanced_accuracy").mean()


# ---------------------------------------------------------------------- models (later stages import these)


def pick_device(name):
    """A torch.device: the named one, or with "auto" the best there is: cuda, mps, cpu."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise folder.InputError("--device", f"{name} can't be used: {str(error).splitlines()[0]}", "try cpu") from None


def load_model(read, name, flag):
    """read(name), a from_pretrained; InputError where no such model is, or where it is not whole."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for every file of a model hides the bars of the work
    try:
        model = read(name)
        for part in getattr(model, "components", {"": model}).values():
            for weight, values in part.named_parameters() if hasattr(part, "named_parameters") else ():
                if not values.isfinite().all():
                    raise ValueError(f"its weight {weight} is not finite")
        tokenizer = getattr(model, "tokenizer", None)  # without its files it is there all the same, and empty
        if tokenizer is not None and set(tokenizer("a photo").input_ids) <= set(tokenizer.all_special_ids):
            raise ValueError("its tokenizer knows no words")
        return model
    except Exception as error:  # these loaders raise OSError, ValueError, KeyError, SafetensorError, HTTP errors, ...
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise folder.InputError(f"{flag} {name}", f"can't be loaded: {reason}",
                                "give a folder in diffusers layout or, with a network, a hub id") from None


def weights_of(model):
    """A from_pretrained that reads no pickle, and no other precision than fp32."""
    import torch

    return lambda name: model.from_pretrained(name, use_safetensors=True, dtype=torch.float32)


def load_pipeline(name, dtype):
    """Stable Diffusion 1.x or 2.x with its safety checker off: a folder in diffusers layout, with fp16 variants or
    without, a hub id, or a single .safetensors file (with a folder of the same name for its configs, where the hub
    can't be reached). Epsilon or velocity is read from the scheduler's config. Pickles are never read."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a LoRA of the UNet alone is no reason to warn of the text encoder
    off = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}

    def read(name):
        if name.endswith(".safetensors"):
            config = Path(name).with_suffix("")
            options = {"config": str(config)} if config.is_dir() else {}
            return StableDiffusionPipeline.from_single_file(name, dtype=dtype, **off, **options)
        try:
            return StableDiffusionPipeline.from_pretrained(name, dtype=dtype, use_safetensors=True, **off)
        except OSError:
            variants = Path(name).is_dir() and any(Path(name).rglob("*.fp16.safetensors"))
            if not variants:
                raise
            return StableDiffusionPipeline.from_pretrained(name, variant="fp16", dtype=dtype, use_safetensors=True,
                                                           **off)

    pipe = load_model(read, str(name), "--base")
    if pipe.unet.config.addition_embed_type:
        raise folder.InputError(f"--base {name}", "is a Stable Diffusion XL", "give a Stable Diffusion 1.x or 2.x")
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise folder.InputError(f"--base {name}", "paints into images", "give a model that draws from a prompt alone")
    return pipe


def tokens_of(tokenizer, prompts):
    """Token ids of prompts, (len(prompts), tokens). A prompt that is too long is an InputError, no silent cut."""
    for prompt in prompts:
        length = len(tokenizer(prompt).input_ids)
        if length > tokenizer.model_max_length:
            raise folder.InputError(f"prompt {prompt!r}", f"has {length} tokens, the model takes "
                                    f"{tokenizer.model_max_length}", "shorten it")
    return tokenizer(list(prompts), padding="max_length", max_length=tokenizer.model_max_length,
                     return_tensors="pt").input_ids


class Clip:
    """CLIP's two towers, by folder or hub id: embeddings of unit length."""

    def __init__(self, name, device):
        from transformers import CLIPModel, CLIPProcessor

        self.device = device
        self.model = load_model(weights_of(CLIPModel), name, "--clip").to(device).eval().requires_grad_(False)
        self.processor = load_model(CLIPProcessor.from_pretrained, name, "--clip")

    @property
    def size(self):
        """Side of the images that the image tower sees, in pixels."""
        return self.model.config.vision_config.image_size

    def images(self, images):
        """PIL images -> (N, D) float32 on the CPU."""
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"].to(self.device)
        return self._unit(self.model.vision_model(pixels).pooler_output, self.model.visual_projection)

    def texts(self, texts):
        """Prompts -> (N, D) float32 on the CPU."""
        tokens = self.processor(text=texts, padding="max_length", return_tensors="pt").to(self.device)
        if tokens["input_ids"].shape[1] > self.model.config.text_config.max_position_embeddings:
            raise folder.InputError("metadata.csv", f"a text is too long for CLIP, one of {texts}", "shorten it")
        return self._unit(self.model.text_model(**tokens).pooler_output, self.model.text_projection)

    def zero_shot(self, images, prompts):
        """Probability of each prompt for each PIL image, (N, len(prompts)) float32 (Radford et al. 2021, 3.1)."""
        scale = self.model.logit_scale.exp().cpu()
        return (scale * self.images(images) @ self.texts(prompts).T).softmax(1)

    @staticmethod
    def _unit(pooled, projection):
        import torch

        return torch.nn.functional.normalize(projection(pooled).float(), dim=1).cpu()


class Encoder:
    """Another image encoder, by folder or hub id, such as DINOv2: its pooled output."""

    def __init__(self, name, device):
        from transformers import AutoImageProcessor, AutoModel

        self.device = device
        self.model = load_model(weights_of(AutoModel), name, "--encoder").to(device).eval().requires_grad_(False)
        self.processor = load_model(AutoImageProcessor.from_pretrained, name, "--encoder")
        self.size = self.model.config.image_size

    def images(self, images):
        """PIL images -> (N, D) float32 of unit length on the CPU."""
        import torch

        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"].to(self.device)
        return torch.nn.functional.normalize(self.model(pixels).pooler_output.float(), dim=1).cpu()


def embed_images(clip, data, rows, batch):
    """Embeddings of rows of metadata, (N, D) float array."""
    import torch
    from tqdm import tqdm

    chunks = [rows[i:i + batch] for i in range(0, len(rows), batch)]
    return torch.cat([clip.images([folder.load_image(data / row["file_name"], clip.size) for row in chunk])
                      for chunk in tqdm(chunks, "embed", unit="batch", mininterval=1, disable=None)]).numpy()


# ------------------------------------------------------------------------------------------------ the stage


def number_of_clusters(text):
    return text if text == "auto" else folder.number(int, 1)(text)


def main():
    parser = folder.Arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder in the one format")
    parser.add_argument("--clip", required=True, help="folder or hub id of a CLIP model")
    parser.add_argument("--encoder", help="folder or hub id of another image encoder to cluster with, such as "
                        "facebook/dinov2-base; none: CLIP")
    parser.add_argument("--k", type=number_of_clusters, default="auto", help="clusters a group or class, or auto")
    parser.add_argument("--within", choices=("group", "class"), default="group", help="what is clustered")
    parser.add_argument("--k-max", type=folder.number(int, 1), default=5, help="most clusters that auto tries")
    parser.add_argument("--min-size", type=folder.number(int, 1), default=10,
                        help="least images a cluster; few are memorised (ours)")
    parser.add_argument("--batch", type=folder.number(int, 1), default=64, help="images embedded at once")
    parser.add_argument("--seed", type=int, default=0, help="of k-means")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    rows = folder.read_metadata(args.data, "train")

    encoder = (Encoder if args.encoder else Clip)(args.encoder or args.clip, pick_device(args.device))
    embeddings = embed_images(encoder, args.data, rows, args.batch)
    if args.within == "class":
        attributes = [row["a"] for row in rows]
        before, embeddings = embeddings, without_group_means(embeddings, [folder.group_of(row) for row in rows])
        left = [attribute_left(part, attributes, args.seed) for part in (before, embeddings)]
        if None not in left:
            print("attribute read by a linear probe (balanced accuracy): {:.2f}, group means out {:.2f}".format(*left))
    names = [folder.group_of(row) if args.within == "group" else f"y{row['y']}" for row in rows]
    with folder.replacing(args.out) as out:
        out.mkdir()
        for name in sorted(set(names)):
            members = [i for i, other in enumerate(names) if other == name]
            labels = group_clusters(embeddings[members], args.k, args.k_max, args.min_size,
                                    folder.seed_of(args.seed, name))
            for i, label in zip(members, labels):
                rows[i]["cluster"] = int(label)
            save_sheet(out / f"{name}.png", args.data, [rows[i] for i in members])
            sizes = [list(labels).count(c) for c in range(max(labels) + 1)]
            print(f"{name}: {len(members)} images in clusters of {sizes}")
        link_images(out, args.data, rows)
        folder.write_csv(out / "metadata.csv", rows)
        key = folder.digest(folder.folder_digest(args.data, rows), folder.model_digest(args.encoder or args.clip))
        folder.write_config(out, args, key)


def save_sheet(path, data, rows):
    """A row of up to 20 images a cluster."""
    clusters = [[row for row in rows if row["cluster"] == c] for c in range(1 + max(row["cluster"] for row in rows))]
    images = [[folder.load_image(data / row["file_name"], 64) for row in members[:20]] for members in clusters]
    folder.contact_sheet(images, [f"c{c} ({len(members)})" for c, members in enumerate(clusters)]).save(path)


def link_images(out, data, rows):
    """Links in `out` by which its file_names lead to the images of `data`: nothing is copied."""
    for top in sorted({Path(row["file_name"]).parts[0] for row in rows}):
        (out / top).symlink_to(os.path.relpath(data / top, out))


if __name__ == "__main__":
    folder.run(main)
