"""Stage 3: draws a group-balanced synthetic set from the fine-tuned models and filters it with CLIP.

    python generate.py --base base/miniature --clip base/miniature/clip --data data/digits-0.95 \\
        --out runs/digits-0.95/synthetic/vanilla
    python generate.py --base base/miniature --clip base/miniature/clip --data data/digits-0.95 \\
        --models runs/digits-0.95/models/lora --images 200 --out runs/digits-0.95/synthetic/lora

Every group of DATA gets --images images, divided among its units. Without --models (vanilla), and for a group that has
no unit, the base model draws them from the group's prompt. An image is kept if CLIP, choosing among the prompts of all
groups, gives its own group at least probability --clip-threshold; a rejected image is replaced by the next seed. An image
is determined by (seed, unit, index) alone. The safety checker is off: a blackened image is no training image.

Reads DATA/metadata.csv (groups and their prompts) and MODELS. Writes OUT/metadata.csv (the one format, with columns unit,
seed, clip_score, prompt: with OUT/config.json all it takes to draw an image again in diffusers), OUT/<unit>/*.png and
candidates.csv (every image tried), OUT/<group>.png (a sheet) and OUT/config.json.
"""

import re
import time
from pathlib import Path

from PIL import Image

from common import files, imagefolder, models, stage
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


def verdict(image, score, threshold):
    """`kept`, or why not. image: (H, W, 3) float array in [0, 1]; score: CLIP's probability of its own group."""
    if not np.isfinite(image).all():
        return "nan"
    if image.std() < 0.01:
        return "blank"
    return "kept" if score >= threshold else "clip"


def draw_images(pipe, draw, indices, args):
    """The candidates `indices` of a unit, (len(indices), H, W, 3) float array in [0, 1]."""
    seeds = [stage.seed_of(args.seed, draw["name"], index) for index in indices]
    return pipe([draw["prompt"]] * len(seeds), negative_prompt=[""] * len(seeds), num_inference_steps=args.steps,
                guidance_scale=args.guidance_scale, output_type="np",
                generator=[torch.Generator().manual_seed(seed) for seed in seeds]).images


def fill(pipe, clip, draw, texts, out, args):
    """Draws candidates of one unit, batch by batch, until `draw["share"]` of them are kept.

    `out` holds the images and candidates.csv. An interrupted unit resumes from what is there; batches begin at
    multiples of --batch, so that it draws the very same images.
    """
    candidates = read_candidates(out)
    lost = [row["index"] for row in candidates if row["verdict"] == "kept" and not (out / image_name(row)).is_file()]
    usable = min([len(candidates), *lost])
    candidates = candidates[:usable // args.batch * args.batch]
    kept = count_kept(candidates)
    with imagefolder.progress(None, draw["name"], "image", total=draw["share"], initial=min(kept, draw["share"])) as bar:
        while kept < draw["share"]:
            if len(candidates) >= args.max_tries * draw["share"] + args.batch:
                raise InputError(draw["title"], f"{kept} of {len(candidates)} images kept, {draw['share']} wanted",
                                 "lower --clip-threshold, raise --max-tries or fine-tune longer")
            indices = range(len(candidates), len(candidates) + args.batch)
            candidates += draw_batch(pipe, clip, draw, texts, indices, out, args)
            files.write_csv(out / "candidates.csv", candidates)
            kept = count_kept(candidates)
            bar.update(min(kept, draw["share"]) - bar.n)
    print(f"{draw['title']}: {len(candidates)} images drawn, {kept} kept, {draw['share']} wanted", flush=True)


def draw_batch(pipe, clip, draw, texts, indices, out, args):
    """Draws the candidates `indices`, saves those that are kept, and returns a row of candidates.csv for each.

    texts: {group: CLIP embedding of its prompt}.
    """
    arrays = draw_images(pipe, draw, indices, args)
    images = [Image.fromarray((array * 255).round().astype(np.uint8)) for array in np.nan_to_num(arrays)]
    scores = clip.zero_shot(images, torch.stack(list(texts.values())))[:, list(texts).index(draw["group"])].tolist()
    rows = [{"index": index, "clip_score": f"{score:.4f}", "verdict": verdict(array, score, args.clip_threshold)}
            for index, array, score in zip(indices, arrays, scores)]
    for row, image in zip(rows, images):
        if row["verdict"] == "kept":
            image.save(out / image_name(row))
    return rows


# ------------------------------------------------------------------------------------------------- the units


def draws_of(prompts, titles, args):
    """What is to be drawn: one dict per unit, with its name, group, prompt, weights' folder (or None) and share."""
    trained = read_models(args) if args.models else []
    draws = []
    for group, text in prompts.items():
        y, a = imagefolder.labels_of(group)
        mine = [draw for draw in trained if draw["y"] == y and draw["a"] in (a, None)]
        if args.models and not mine:
            print(f"{titles[group]}: no training images, drawn by the base model")
        mine = mine or [{"unit": None, "suffix": "", "prompt": "{text}", "images": 1, "key": None}]
        shares = share_out(args.images, [draw["images"] if args.share == "size" else 1 for draw in mine])
        draws += [{"name": group + draw["suffix"], "group": group,
                   "title": imagefolder.unit_title(group + draw["suffix"], titles), "prompt": draw["prompt"].replace("{text}", text),
                   "folder": draw["unit"] and args.models / draw["unit"], "trained": draw["key"], "share": share}
                  for draw, share in zip(mine, shares) if share]
    return draws


def read_models(args):
    """The draws that finetune.py recorded in MODELS/config.json. Raises InputError unless they fit --base."""
    path = args.models / "config.json"
    if not path.is_file():
        raise InputError(path, "not found", "point --models to the output folder of a finished finetune.py")
    config = files.read_json(path)
    try:
        for draw in config["draws"]:  # unit and suffix become names of folders
            if not (re.fullmatch(r"all|y\d+-a\d+(-c\d+)?", draw["unit"])
                    and re.fullmatch(r"(-c\d+)?", draw["suffix"])
                    and {int} == {type(draw[name]) for name in ("y", "images")} and draw["images"] > 0):
                raise ValueError(draw)
            draw["a"], draw["key"], draw["prompt"].replace("", "")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(path, "was not written by finetune.py", "run finetune.py again") from None
    if config.get("base") != files.model_digest(args.base):
        raise InputError(args.models, f"was fine-tuned from another base model than --base {args.base}",
                         "run finetune.py with this --base")
    return config["draws"]


def check_weights(draw):
    """Raises InputError unless a unit's weights are those that finetune.py published."""
    if draw["folder"] and not stage.is_published(draw["folder"], draw["trained"]):
        changed = ", ".join(stage.changed_files(draw["folder"])) or "the unit"
        raise InputError(draw["folder"], f"{changed} was removed or changed since fine-tuning", "run finetune.py again")


def image_name(row):
    return f"{row['index']:05}.png"


def read_candidates(out):
    path = out / "candidates.csv"
    rows = files.read_csv(path, "remove its folder to draw it again") if path.is_file() else []
    return [dict(row, index=int(row["index"])) for row in rows]


def count_kept(candidates):
    return sum(row["verdict"] == "kept" for row in candidates)


# ------------------------------------------------------------------------------------------------ the stage


def main(argv=None):
    args = parse(argv)
    inputs = stage.begin(args)
    rows = imagefolder.read_metadata(args.data)
    prompts = imagefolder.group_prompts(rows)
    draws = draws_of(prompts, imagefolder.group_titles(rows), args)
    made_by = files.digest(stage.settings_of(args, "base", "clip", "images", "share", "max_tries", "drop_weights"),
                           prompts, files.model_digest(args.base), files.model_digest(args.clip),
                           stage.code_digest(__file__, models.__file__, stage.seed_of))
    for draw in draws:
        draw["key"] = files.digest(made_by, draw["name"], draw["prompt"], draw["trained"])
    shard, shards = args.shard
    stage.claim(args, [draw["name"] for draw in draws[shard::shards]])
    todo = [draw for draw in draws[shard::shards] if not is_filled(args.out / draw["name"], draw)]
    if todo:
        for draw in todo:
            check_weights(draw)
        device = models.pick_device(args.device)
        sampler = models.Sampler(args.base, device, models.use_bf16(args.precision, device))
        clip = models.Clip(args.clip, device)
        texts = dict(zip(prompts, clip.texts(list(prompts.values()))))
        models.token_ids(sampler.pipe.tokenizer, [draw["prompt"] for draw in todo])  # raises if one is too long
        stage.start(args, {draw["name"]: draw["share"] for draw in draws})
        (args.out / "metadata.csv").unlink(missing_ok=True)
    for draw in todo:
        begin, work = time.monotonic(), unfinished_unit(draw, args)
        sampler.load(draw["folder"])
        fill(sampler.pipe, clip, draw, texts, work, args)
        stage.finish_unit(work, args, draw["key"], **stage.spent(begin))
        files.remove(args.out / draw["name"])
        work.rename(args.out / draw["name"])
    if shards == 1:
        publish(draws, prompts, made_by, args, inputs)


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    count = stage.number(int, 1)
    parser.add_argument("--base", required=True, help="folder or hub id of a Stable Diffusion pipeline")
    parser.add_argument("--models", type=Path, help="output folder of finetune.py; default: vanilla, the base model itself")
    parser.add_argument("--data", type=Path, required=True, help="prepared dataset folder, for its groups and prompts")
    parser.add_argument("--clip", required=True, help="folder or hub id of the CLIP model that filters")
    parser.add_argument("--images", type=count, default=250, help="images per group")
    parser.add_argument("--share", choices=("size", "even"), default="size",
                        help="how a group's images are divided among its units: by their training images, or evenly")
    parser.add_argument("--steps", type=count, default=20, help="steps of DPM-Solver++")
    parser.add_argument("--guidance-scale", type=stage.number(float, 1), default=2.0,
                        help="classifier-free guidance; 1: none (half the cost)")
    parser.add_argument("--clip-threshold", type=stage.number(float, 0, 1), default=0.1, help="smallest probability of "
                        "an image's own group among the prompts of all groups; 0: no filter")
    parser.add_argument("--max-tries", type=count, default=20, help="candidates per wanted image before giving up")
    parser.add_argument("--batch", type=count, default=64, help="images drawn at once")
    parser.add_argument("--seed", type=int, default=0, help="seed of all images")
    parser.add_argument("--drop-weights", action=stage.Flag, default=False,
                        help="remove MODELS' weights once all images are made (a UNet of SD 1.5 is 3.4 GB)")
    models.add_device_flags(parser)
    parser.add_argument("--shard", type=stage.shard_of, default="0/1", help="i/n: draw every n-th unit, from the i-th on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    if args.drop_weights and not args.models:
        raise InputError("--drop-weights", "the base model draws, there are no weights to remove", "give --models")
    return args


def is_filled(path, draw):
    return stage.is_published(path, draw["key"]) and count_kept(read_candidates(path)) >= draw["share"]


def unfinished_unit(draw, args):
    """The hidden folder in which a unit is drawn. It begins with the images that are there for the same key."""
    path, work = args.out / draw["name"], args.out / f".{draw['name']}.partial"
    if files.read_json(work / "config.json").get("key") != draw["key"]:
        files.remove(work)
        if files.read_json(path / "config.json").get("key") == draw["key"]:  # damaged, or more images are wanted
            for name in stage.changed_files(path):
                (path / name).unlink(missing_ok=True)
            path.rename(work)
        else:
            work.mkdir(parents=True)
            files.write_json(work / "config.json", {"key": draw["key"]})
    return work


def publish(draws, prompts, made_by, args, inputs):
    """Writes the sheets and, last, metadata.csv and config.json; removes units that no longer exist."""
    stage.remove_other_units(args.out, {draw["name"] for draw in draws})
    rows, counts = [], {}
    for draw in draws:
        y, a = imagefolder.labels_of(draw["group"])
        candidates = read_candidates(args.out / draw["name"])
        kept = [row for row in candidates if row["verdict"] == "kept"][:draw["share"]]
        tried = [row["verdict"] for row in candidates[:kept[-1]["index"] + 1]] if kept else []
        counts[draw["name"]] = {word: tried.count(word) for word in ("kept", "clip", "blank", "nan")}
        rows += [{"file_name": f"{draw['name']}/{image_name(row)}", "split": "train", "y": y, "a": a,
                  "text": prompts[draw["group"]], "unit": draw["name"], "clip_score": row["clip_score"],
                  "seed": stage.seed_of(args.seed, draw["name"], row["index"]), "prompt": draw["prompt"]}
                 for row in kept]
    for group in prompts:
        save_sheet(args.out / f"{group}.png", args.out, [row for row in rows if imagefolder.group_of(row) == group])
    files.write_csv(args.out / "metadata.csv", rows)
    if args.drop_weights:
        inputs.pop(str(args.models), None)
    stage.finish(args.out, args, files.digest(made_by, rows), inputs, counts=counts)
    if args.drop_weights:
        drop_weights(args.models)


def drop_weights(folder):
    """Removes fine-tuned weights, and the config.json that says that they are there; loss curves stay."""
    (folder / "config.json").unlink(missing_ok=True)
    for unit in folder.glob("*/"):
        for name in ("unet", "text_encoder", models.LORA_FILE):
            files.remove(unit / name)


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
