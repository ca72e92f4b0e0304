"""Stage 3: draws a group-balanced synthetic set from the fine-tuned models and filters it with CLIP.

    python generate.py --base base/miniature --clip base/miniature/clip --data data/digits-0.95 \\
        --embeddings runs/digits-0.95/embeddings --models runs/digits-0.95/models/lora --out runs/digits-0.95/synthetic/lora

Every group of DATA gets --images images, divided among its units. Without --models (vanilla) the base model draws them from
the group's prompt. A rare group (see --rare) is drawn by the models of its class's most common one, without their identifier
and away from that group's words (paper, severe bias). Of the images drawn, the share --keep with the best CLIP score is
selected (paper, CLIP filter). An image is determined by (seed, unit, index) alone. The safety checker is off: a blackened
image is no training image.

Reads DATA/metadata.csv (groups and their prompts), MODELS and EMBEDDINGS. Writes OUT/metadata.csv (the selected images in the
one format, with columns unit, clip_score, and what diffusers needs to draw an image again: seed, prompt, negative_prompt,
guidance_scale), OUT/<unit>/*.png and candidates.csv (all images drawn), OUT/<group>.png (a sheet), a card and config.json.
"""

import math
import time
from pathlib import Path

from PIL import Image

from common import candidates, cards, files, imagefolder, models, stage
from common.files import InputError

np = stage.lazy("numpy")
torch = stage.lazy("torch")

# ---------------------------------------------------------------------------------------------- the method


def share_out(images, weights):
    """Splits `images` in proportion to the weights, largest remainders first: ints that sum to images."""
    exact = [images * weight / sum(weights) for weight in weights]
    shares = [int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[:images - sum(shares)]:
        shares[i] += 1
    return shares


class ClipScore:
    """How well images show their group, by CLIP: alpha * similarity to the prompt of the class + (1 - alpha) * similarity to
    the mean embedding of the group's real training images (paper, CLIP filter), cosines both.
    Where the group has no training images the first term counts alone. With --clip-threshold instead (ours): the probability
    that CLIP gives the group's prompt among those of all groups.
    """

    def __init__(self, clip, rows, prompts, args):
        self.clip, self.args, self.groups, self.centroids = clip, args, list(prompts), {}
        self.texts = clip.texts(list(prompts.values()))
        if args.clip_threshold is None:
            by_class = imagefolder.class_prompts(rows)
            self.classes = {y: normalised(clip.texts(texts).mean(0)) for y, texts in by_class.items()}
            train = [row for row in rows if row["split"] == "train"] if args.alpha < 1 else []
            embeddings = models.read_embeddings(args.embeddings, train, clip) if train else None
            for group in imagefolder.group_counts(train):
                members = imagefolder.members_of(group, train)
                self.centroids[group] = normalised(torch.from_numpy(embeddings[members].mean(0)))

    def __call__(self, images, group):
        """Scores of PIL images that are to show this group: [float]."""
        embeddings = self.clip.images(images)
        self.clip.rest()  # until the next images are drawn
        if self.args.clip_threshold is not None:
            return self.clip.probabilities(embeddings, self.texts)[:, self.groups.index(group)].tolist()
        scores = embeddings @ self.classes[imagefolder.labels_of(group)[0]]
        if group in self.centroids:
            scores = self.args.alpha * scores + (1 - self.args.alpha) * embeddings @ self.centroids[group]
        return scores.tolist()


def normalised(embedding):
    return torch.nn.functional.normalize(embedding, dim=0)


def selected(drawn, share, args):
    """The candidates that make up a unit's share: the best --keep of those drawn, or those above --clip-threshold; fewer than
    `share` if not enough have been drawn."""
    sound, wanted = [row for row in drawn if not row["fault"]], sound_ones(share, args)
    if args.clip_threshold is not None:
        return [row for row in sound if float(row["clip_score"]) >= args.clip_threshold][:share]
    best = sorted(sound[:wanted], key=lambda row: -float(row["clip_score"]))[:share] if len(sound) >= wanted else []
    return sorted(best, key=lambda row: row["index"])


def sound_ones(share, args):
    """How many sound candidates a share takes at least."""
    return share if args.clip_threshold is not None else math.ceil(share / args.keep)


def considered(drawn, kept, args):
    """The candidates from which a share was selected: without those that only complete the last batch."""
    if args.clip_threshold is not None:
        return drawn[:kept[-1]["index"] + 1]
    sound = [row for row in drawn if not row["fault"]]
    return drawn[:sound[sound_ones(len(kept), args) - 1]["index"] + 1]


def draw_images(pipe, draw, indices, args):
    """The candidates `indices` of a unit, (len(indices), H, W, 3) float array in [0, 1]."""
    seeds = [stage.seed_of(args.seed, draw["name"], index) for index in indices]
    return pipe([draw["prompt"]] * len(seeds), negative_prompt=[draw["negative"]] * len(seeds), num_inference_steps=args.steps,
                guidance_scale=draw["guidance"], output_type="np",
                generator=[torch.Generator().manual_seed(seed) for seed in seeds]).images


def fill(pipe, score, draw, out, args):
    """Draws candidates of one unit, batch by batch, until `draw["share"]` of them are selected.

    `out` holds the images and candidates.csv. An interrupted unit resumes from what is there; batches begin at
    multiples of --batch, so that it draws the very same images.
    """
    there, rows = candidates.that_are_there(out, draw["key"]), []
    with imagefolder.progress(None, draw["name"], "image", total=at_least(draw, args), initial=len(there)) as bar:
        while len(found := selected(rows, draw["share"], args)) < draw["share"]:
            if len(rows) >= args.max_tries * sound_ones(draw["share"], args) + args.batch:
                raise InputError(draw["title"], f"{len(found)} of {len(rows)} images kept, {draw['share']} wanted",
                                 "fine-tune longer or otherwise, raise --max-tries or lower --clip-threshold")
            indices = range(len(rows), len(rows) + args.batch)
            if not there.keys() >= set(indices):
                there |= draw_batch(pipe, score, draw, indices, out, args)
                candidates.write(out, there)
                bar.update(args.batch)
            rows += [there[index] for index in indices]
    candidates.write(out, dict(enumerate(rows)))
    print(f"{draw['title']}: {len(rows)} images drawn, {draw['share']} kept", flush=True)


def draw_part(pipe, score, draw, out, args):
    """Draws one of every draw["parts"] batches of a unit that several shards share, for fill() to go on with."""
    there = candidates.that_are_there(out, draw["key"])
    whole = (args.out / draw["name"], candidates.hidden(args.out, draw["name"]))
    others = [candidates.that_are_there(folder, draw["key"]) for folder in whole]
    for first in range(draw["part"] * args.batch, at_least(draw, args), draw["parts"] * args.batch):
        indices = range(first, first + args.batch)
        if not any(known.keys() >= set(indices) for known in (there, *others)):
            there |= draw_batch(pipe, score, draw, indices, out, args)
            candidates.write(out, there)
    print(f"{draw['title']}: {len(there)} images drawn by shard {args.shard[0]}", flush=True)


def at_least(draw, args):
    """How many candidates a unit takes, unless some turn out to be unsound: whole batches."""
    return math.ceil(sound_ones(draw["share"], args) / args.batch) * args.batch


def draw_batch(pipe, score, draw, indices, out, args):
    """Draws the candidates `indices` and saves them. Returns {index: row of candidates.csv}."""
    arrays = draw_images(pipe, draw, indices, args)
    images = [Image.fromarray((array * 255).round().astype(np.uint8)) for array in np.nan_to_num(arrays)]
    rows = [{"index": index, "clip_score": f"{value:.4f}", "fault": fault_of(array)}
            for index, array, value in zip(indices, arrays, score(images, draw["group"]))]
    for row, image in zip(rows, images):
        if not row["fault"]:
            image.save(out / candidates.image_name(row))
    return {row["index"]: row for row in rows}


def fault_of(image):
    """Why an image, (H, W, 3) float array in [0, 1], cannot be used, or an empty string."""
    return "nan" if not np.isfinite(image).all() else "blank" if image.std((0, 1)).max() < 0.01 else ""


# ------------------------------------------------------------------------------------------------- the units


def draws_of(rows, prompts, titles, args):
    """What is to be drawn: one dict per unit, with its name, group, prompt, negative prompt, guidance scale, folder of
    weights (or None) and share of the images."""
    trained = models.read_draws(args.models, args.base) if args.models else []
    counts = imagefolder.group_counts(row for row in rows if row["split"] == "train")
    fewest = {"own": 1, "auto": args.rare_below, "transfer": math.inf}[args.rare]
    draws = []
    for group, text in prompts.items():
        y, a = imagefolder.labels_of(group)
        mine = [draw for draw in trained if draw["y"] == y and draw["a"] in (a, None)]
        negative, guidance, common = "", args.guidance_scale, imagefolder.correlated_attribute(counts, y)
        from_common = [draw for draw in trained if draw["y"] == y and draw["a"] == common]
        other = imagefolder.group_name(y, common)
        if a != common and from_common and counts.get(group, 0) < fewest:
            mine, negative, guidance = transferred(from_common), words_in(prompts[other], text), args.rare_guidance
            print(f"{titles[group]}: drawn by the models of {titles[other]}")
        elif args.models and not mine:
            print(f"{titles[group]}: no training images, drawn by the base model")
        mine = mine or [{"unit": None, "suffix": "", "prompt": "{text}", "images": 1, "key": None}]
        shares = share_out(args.images, [draw["images"] if args.share == "size" else 1 for draw in mine])
        draws += [{"name": group + draw["suffix"], "group": group,
                   "title": imagefolder.unit_title(group + draw["suffix"], titles),
                   "prompt": draw["prompt"].replace("{text}", text), "negative": negative, "guidance": guidance,
                   "folder": draw["unit"] and args.models / draw["unit"], "trained": draw["key"], "share": share}
                  for draw, share in zip(mine, shares) if share]
    return draws


def transferred(draws):
    """The draws of a common group's units, for the rare group of its class (paper, severe bias): without the identifier.

    The rare group's own prompt swaps the attribute's words, and the common group's become the negative prompt.
    """
    return [dict(draw, prompt="{text}", suffix=f"-by-{draw['unit']}") for draw in draws]


def words_in(prompt, other):
    """The words of a prompt that another one does not contain."""
    return " ".join(word for word in prompt.split() if word not in other.split())


def splits(count, share):
    """The split of each of `count` images: val for a share of them, evenly spread, else train."""
    return ["val" if int((i + 1) * share) > int(i * share) else "train" for i in range(count)]


# ------------------------------------------------------------------------------------------------ the stage


def main(argv=None):
    args = parse(argv)
    inputs = stage.begin(args)
    merged = files.read_json(args.models / "config.json").get("merged", []) if args.models else []
    rows = imagefolder.with_merged(imagefolder.read_metadata(args.data), merged)
    prompts = imagefolder.group_prompts(rows)
    draws = draws_of(rows, prompts, imagefolder.group_titles(rows), args)
    train = [(row["file_name"], imagefolder.group_of(row)) for row in rows if row["split"] == "train"]
    score_by = [imagefolder.class_prompts(rows), args.embeddings and [models.embeddings_digest(args.embeddings), train]]
    made_by = files.digest(stage.settings_of(args, "base", "clip", "images", "share", "max_tries", "drop_weights", "keep",
                                             "embeddings", "rare", "rare_below", "rare_guidance", "val_share"), prompts, score_by,
                           files.model_digest(args.base), files.model_digest(args.clip),
                           stage.code_digest(__file__, models.__file__, stage.seed_of))
    for draw in draws:
        draw["key"] = files.digest(made_by, draw["name"], draw["prompt"], draw["negative"], draw["guidance"], draw["trained"])
    shard, shards = args.shard
    mine = draws[shard % len(draws)::shards]
    for draw in mine:  # where there are fewer draws than shards, several shards share the images of one
        draw["parts"] = math.ceil((shards - shard % len(draws)) / len(draws))
        draw["part"] = shard // len(draws) if draw["parts"] > 1 else None
    stage.claim(args, [draw["name"] if draw["part"] is None else f"{draw['name']}.{draw['part']}" for draw in mine])
    todo = [draw for draw in mine if not is_filled(args.out / draw["name"], draw, args)]
    if todo:
        for draw in todo:
            models.check_weights(draw["folder"], draw["trained"])
        device = models.pick_device(args.device)
        sampler = models.Sampler(args.base, device, models.use_bf16(args.precision, device))
        score = ClipScore(models.Clip(args.clip, device), rows, prompts, args)
        models.token_ids(sampler.pipe.tokenizer, [draw["prompt"] for draw in todo])  # raises if one is too long
        stage.start(args, {draw["name"]: draw["share"] for draw in draws})
        (args.out / "metadata.csv").unlink(missing_ok=True)
    for draw in todo:
        begin, work = time.monotonic(), candidates.unfinished(args.out, draw["name"], draw["key"], draw["part"])
        sampler.load(draw["folder"])
        if draw["part"] is not None:
            draw_part(sampler.pipe, score, draw, work, args)
            continue
        fill(sampler.pipe, score, draw, work, args)
        stage.finish_unit(work, args, draw["key"], **stage.spent(begin))
        files.remove(args.out / draw["name"])
        work.rename(args.out / draw["name"])
    if shards == 1:
        publish(draws, prompts, made_by, args, inputs, merged)


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    count = stage.number(int, 1)
    parser.add_argument("--base", required=True, help="folder or hub id of a Stable Diffusion pipeline")
    parser.add_argument("--models", type=Path, help="output folder of finetune.py; default: vanilla, the base model itself")
    parser.add_argument("--data", type=Path, required=True, help="prepared dataset folder, for its groups and their prompts")
    parser.add_argument("--clip", required=True, help="folder or hub id of the CLIP model that filters")
    parser.add_argument("--images", type=count, default=250, help="images per group")
    parser.add_argument("--val-share", type=stage.number(float, 0, 0.9), default=0.0, help="share of the images that become "
                        "split val, for train_classifier.py --val synthetic")
    parser.add_argument("--share", choices=("size", "even"), default="size", help="how a group's images are divided among its "
                        "units: by their training images, or evenly")
    parser.add_argument("--steps", type=count, default=20, help="steps of DPM-Solver++")
    parser.add_argument("--guidance-scale", type=stage.number(float, 1), default=2.0, help="1: no guidance, half the cost")
    parser.add_argument("--rare", choices=("auto", "own", "transfer"), default="auto", help="who draws a group that is not the "
                        "most common one of its class: own: models of its own; transfer: that one's models (paper); "
                        "auto: transfer if it has fewer than --rare-below training images")
    parser.add_argument("--rare-below", type=count, default=10, help="for --rare auto")
    parser.add_argument("--rare-guidance", type=stage.number(float, 1), default=2.0, help="guidance scale of transferred groups; "
                        "above 1, their negative prompt takes effect")
    parser.add_argument("--keep", type=stage.number(float, 0.01, 1), default=0.75, help="share of the images "
                        "drawn for a unit that is kept, those with the best CLIP score (paper: 0.75); 1: no filter")
    parser.add_argument("--alpha", type=stage.number(float, 0, 1), default=0.5, help="weight of the class's prompt in the CLIP "
                        "score; the rest is that of the group's mean embedding (paper: 0.5)")
    parser.add_argument("--embeddings", type=Path, help="of DATA's images, for that mean: output folder of data/embed.py")
    parser.add_argument("--clip-threshold", type=stage.number(float, 0, 1), help="instead: keep all images to "
                        "whose own group CLIP gives this probability among the prompts of all groups (ours); 0: no filter")
    parser.add_argument("--max-tries", type=count, default=20, help="candidates per image that is needed before giving up")
    parser.add_argument("--batch", type=count, default=64, help="images drawn at once")
    parser.add_argument("--seed", type=int, default=0, help="seed of all images")
    parser.add_argument("--drop-weights", action=stage.Flag, default=False, help="remove MODELS' weights once all is drawn")
    models.add_device_flags(parser)
    parser.add_argument("--shard", type=stage.shard_of, default="0/1", help="i/n: draw every n-th unit, from the i-th on; of "
                        "fewer units than shards, a part of the images")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    if args.clip_threshold is None and args.alpha < 1 and not args.embeddings:
        raise InputError("--embeddings", "the CLIP score needs the embeddings of the real images", "run data/embed.py, or use --alpha 1")
    if args.drop_weights and not args.models:
        raise InputError("--drop-weights", "the base model draws, there are no weights to remove", "give --models")
    return args


def is_filled(path, draw, args):
    return (stage.is_published(path, draw["key"])
            and len(selected(candidates.read(path), draw["share"], args)) == draw["share"])


def publish(draws, prompts, made_by, args, inputs, merged):
    """Writes the sheets and, last, metadata.csv and config.json; removes units that no longer exist."""
    stage.remove_other_units(args.out, {draw["name"] for draw in draws})
    rows, counts = [], {}
    for draw in draws:
        y, a = imagefolder.labels_of(draw["group"])
        drawn = candidates.read(args.out / draw["name"])
        kept = selected(drawn, draw["share"], args)
        faults = [row["fault"] for row in considered(drawn, kept, args)]
        counts[draw["name"]] = {"kept": len(kept), "clip": faults.count("") - len(kept)} | {
            word: faults.count(word) for word in ("blank", "nan")}
        rows += [{"file_name": f"{draw['name']}/{candidates.image_name(row)}", "split": split, "y": y, "a": a,
                  "text": prompts[draw["group"]], "unit": draw["name"], "clip_score": row["clip_score"],
                  "seed": stage.seed_of(args.seed, draw["name"], row["index"]), "prompt": draw["prompt"],
                  "negative_prompt": draw["negative"], "guidance_scale": draw["guidance"]}
                 for row, split in zip(kept, splits(len(kept), args.val_share))]
    for group in prompts:
        save_sheet(args.out / f"{group}.png", args.out, [row for row in rows if imagefolder.group_of(row) == group])
    cards.of_images(args.out / "README.md", rows, args)
    files.write_csv(args.out / "metadata.csv", rows)
    if args.drop_weights:
        inputs.pop(str(args.models), None)
    stage.finish(args.out, args, files.digest(made_by, rows), inputs, counts=counts, merged=merged)
    if args.drop_weights:
        models.drop_weights(args.models)


def save_sheet(path, folder, rows):
    """Images of a group: six rows of 12, or two rows of 16 per cluster."""
    units = {}
    for row in rows:
        units.setdefault(row["unit"], []).append(folder / row["file_name"])
    width, height = (16, 2) if len(units) > 1 else (12, 6)
    lines = [(unit, [Image.open(path) for path in paths[i:i + width]]) for unit, paths in units.items()
             for i in range(0, min(len(paths), width * height), width)]
    imagefolder.contact_sheet([line for _, line in lines], [unit for unit, _ in lines]).save(path)


if __name__ == "__main__":
    stage.run(main)
