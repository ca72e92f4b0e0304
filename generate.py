"""Stage 3: draws a group-balanced synthetic set from the fine-tuned models, filtered with CLIP.

    python generate.py --base base/miniature --clip base/miniature/clip --data data/digits-0.95 \\
        --out runs/digits-0.95/synthetic/vanilla
    python generate.py --base base/miniature --clip base/miniature/clip --data data/digits-0.95 \\
        --models runs/digits-0.95/models/lora --images 200 --out runs/digits-0.95/synthetic/lora

Every group of DATA gets --images images, shared out over its units; without --models (vanilla), and for a group
that has no unit, the base model draws them from the group's prompt. An image is kept if CLIP, asked which group's
prompt it shows, gives its own group at least --clip-threshold of the probability; the next seed replaces a rejected
one. An image hangs on (seed, unit, index) alone. The safety checker is off: a black image is no training image.

Reads DATA/metadata.csv (groups and their prompts) and MODELS. Writes OUT/metadata.csv (the one format, with columns
unit, seed, clip_score), OUT/<unit>/*.png and candidates.csv (every image tried), OUT/<group>.png (a sheet) and
OUT/config.json.
"""

import inspect
import json
import re
import time
from contextlib import contextmanager
from pathlib import Path

from cluster import Clip, load_pipeline, pick_device, tokens_of
from data import imagefolder as folder

# ---------------------------------------------------------------------------------------------- the method


def share_out(images, weights):
    """Splits `images` over units in proportion to their weights, largest remainders first: ints that sum to images."""
    exact = [images * weight / sum(weights) for weight in weights]
    shares = [int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[:images - sum(shares)]:
        shares[i] += 1
    return shares


def verdict(image, score, threshold):
    """`kept`, or why not: image: (H, W, 3) float array in [0, 1]; score: CLIP's probability of its own group."""
    import numpy as np

    if not np.isfinite(image).all():
        return "nan"
    if image.std() < 0.01:
        return "blank"
    return "kept" if score >= threshold else "clip"


def draw_candidates(pipe, draw, indices, args):
    """Images of the candidates `indices` of a draw, (len(indices), H, W, 3) float array in [0, 1]."""
    import torch

    seeds = [folder.seed_of(args.seed, draw["name"], index) for index in indices]
    options = {"num_inference_steps": args.steps, "output_type": "np",
               "generator": [torch.Generator().manual_seed(seed) for seed in seeds]}
    if args.attribute_guidance is None:
        return pipe([draw["prompt"]] * len(seeds), negative_prompt=[""] * len(seeds),
                    guidance_scale=args.guidance_scale, **options).images
    with composed_guidance(pipe, draw["parts"], (args.guidance_scale, args.attribute_guidance)):
        return pipe([draw["prompt"]] * len(seeds), guidance_scale=1.0, **options).images


@contextmanager
def composed_guidance(pipe, parts, scales):
    """Within it, the UNet answers with e + sum of scale * (e_part - e), e being what it says of the empty prompt.

    This is the conjunction of Liu et al. 2022 (section 3.2): each part of the prompt, class and attribute, is stressed
    by its own scale. As the weights sum to 1 it holds for velocity as for noise. Ask the pipeline for guidance 1.
    """
    import torch

    embeds = pipe.text_encoder(tokens_of(pipe.tokenizer, ["", *parts]).to(pipe.device)).last_hidden_state
    plain = pipe.unet.forward

    def forward(sample, timestep, encoder_hidden_states, return_dict=False, **_):
        states = embeds.repeat_interleave(len(sample), 0)
        empty, *predicted = plain(sample.repeat(len(embeds), 1, 1, 1), timestep, states, return_dict=False)[0].chunk(
            len(embeds))
        return (empty + sum(scale * (part - empty) for scale, part in zip(scales, predicted)),)

    pipe.unet.forward = forward
    try:
        with torch.no_grad():
            yield
    finally:
        del pipe.unet.forward


def fill(pipe, clip, draw, prompts, out, args):
    """Draws candidates of one unit, a batch after the other, until `draw["share"]` of them are kept.

    `out` holds the images and candidates.csv; what an earlier, interrupted run left there is gone on from. Batches
    begin at multiples of --batch, so that it makes the very same images.
    """
    from tqdm import tqdm

    candidates = read_candidates(out)
    candidates = candidates[:len(candidates) // args.batch * args.batch]
    kept = sum(row["verdict"] == "kept" for row in candidates)
    with tqdm(total=draw["share"], initial=min(kept, draw["share"]), desc=draw["name"], unit="image",
              mininterval=1, disable=None) as bar:
        while kept < draw["share"]:
            if len(candidates) >= args.max_tries * draw["share"] + args.batch:
                found = f"{kept} of {len(candidates)} images kept, {draw['share']} wanted"
                raise folder.InputError(draw["name"], found,
                                        "lower --clip-threshold, raise --max-tries or fine-tune longer")
            candidates += try_batch(pipe, clip, draw, prompts, range(len(candidates), len(candidates) + args.batch),
                                    out, args)
            folder.write_csv(out / "candidates.csv", candidates)
            kept = sum(row["verdict"] == "kept" for row in candidates)
            bar.update(min(kept, draw["share"]) - bar.n)
    print(f"{draw['name']}: {len(candidates)} images drawn, {kept} kept, {draw['share']} wanted", flush=True)


def try_batch(pipe, clip, draw, prompts, indices, out, args):
    """Draws the candidates `indices`, saves those that are kept, and returns a row of candidates.csv each."""
    import numpy as np
    from PIL import Image

    arrays = draw_candidates(pipe, draw, indices, args)
    images = [Image.fromarray((array * 255).round().astype(np.uint8)) for array in np.nan_to_num(arrays)]
    scores = clip.zero_shot(images, list(prompts.values()))[:, list(prompts).index(draw["group"])].tolist()
    rows = [{"index": index, "clip_score": f"{score:.4f}", "verdict": verdict(array, score, args.clip_threshold)}
            for index, array, score in zip(indices, arrays, scores)]
    for row, image in zip(rows, images):
        if row["verdict"] == "kept":
            image.save(out / f"{row['index']:05}.png")
    return rows


# ------------------------------------------------------------------------------------------------- the units


def draws_of(prompts, models, args):
    """What is to be drawn: a dict a unit, with its name, group, prompt, weights' folder (or None) and share."""
    trained = []
    if models:
        config = Path(models) / "config.json"
        if not config.is_file():
            raise folder.InputError(config, "no such file", "point --models to the OUT of a finished finetune.py")
        try:
            trained = json.loads(config.read_text(encoding="utf-8"))["draws"]
            for draw in trained:  # unit and suffix become names of folders
                if not (re.fullmatch(r"all|y\d+-a\d+(-c\d+)?", draw["unit"])
                        and re.fullmatch(r"(-c\d+)?", draw["suffix"])
                        and {int} == {type(draw[name]) for name in ("y", "images")} and draw["images"] > 0):
                    raise ValueError(draw)
                draw["a"], draw["key"], draw["prompt"].replace("", "")
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            raise folder.InputError(config, "is not of finetune.py", "fine-tune again") from None
    draws, parts = [], folder.prompt_parts(prompts)
    for group, text in prompts.items():
        y, a = folder.labels_of(group)
        of_class, of_attribute = parts[group]
        mine = [draw for draw in trained if draw["y"] == y and draw["a"] in (a, None)]
        if models and not mine:
            print(f"{group}: no training images, drawn by the base model")
        mine = mine or [{"unit": None, "suffix": "", "prompt": "{text}", "images": 1, "key": None}]
        shares = share_out(args.images, [draw["images"] if args.share == "size" else 1 for draw in mine])
        draws += [{"name": group + draw["suffix"], "group": group, "prompt": draw["prompt"].replace("{text}", text),
                   "parts": (draw["prompt"].replace("{text}", of_class), of_attribute),
                   "folder": draw["unit"] and Path(models) / draw["unit"], "key": draw["key"], "share": share}
                  for draw, share in zip(mine, shares)]
    return draws


def dataset_prompts(data):
    """{group: prompt} of every class with every attribute of the dataset, in whatever split it stands."""
    return folder.group_prompts(folder.read_metadata(data))


def sampler(name, device, precision):
    """The base pipeline with DPM-Solver++ (Lu et al. 2022) in place of its own sampler."""
    import torch
    from diffusers import DPMSolverMultistepScheduler

    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())
    pipe = load_pipeline(name, torch.bfloat16 if bf16 else torch.float32).to(device)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="dpmsolver++")
    pipe.set_progress_bar_config(disable=True)
    pipe.base_weights = {part: {key: value.clone() for key, value in getattr(pipe, part).state_dict().items()}
                         for part in ("unet", "text_encoder")}
    return pipe


def load_unit(pipe, weights):
    """Puts a unit's weights (a folder of finetune.py, or None for the base's own) into the pipeline."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    lora = weights and (weights / "pytorch_lora_weights.safetensors").is_file()
    if weights and not lora and not (weights / "unet").is_dir():
        raise folder.InputError(weights, "holds neither a LoRA nor a UNet", "fine-tune again")
    pipe.unload_lora_weights()
    try:
        for part, base in pipe.base_weights.items():
            files = sorted((weights / part).glob("*.safetensors")) if weights else []
            getattr(pipe, part).load_state_dict(load_file(files[0]) if files else base)
        if lora:
            pipe.load_lora_weights(weights, weight_name="pytorch_lora_weights.safetensors")
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise folder.InputError(weights, f"can't be loaded: {str(error).splitlines()[0]}",
                                "fine-tune again, with the same --base") from None
    if lora and not pipe.get_list_adapters():
        raise folder.InputError(weights, "holds no LoRA weights of this model", "fine-tune with the same --base")


def read_candidates(out):
    path = out / "candidates.csv"
    rows = folder.read_rows(path, "remove its folder, to draw it again") if path.is_file() else []
    return [dict(row, index=int(row["index"])) for row in rows]


# ------------------------------------------------------------------------------------------------ the stage


def main():
    args = parse()
    prompts = dataset_prompts(args.data)
    draws = draws_of(prompts, args.models, args)
    settings = {name: getattr(args, name) for name in ("steps", "guidance_scale", "attribute_guidance",
                                                       "clip_threshold", "seed", "batch", "precision")}
    made_by = folder.digest(settings, prompts, folder.model_digest(args.base), folder.model_digest(args.clip),
                            inspect.getsource(Clip), folder.code_digest(__file__))
    for draw in draws:
        draw["key"] = folder.digest(made_by, draw["name"], draw["prompt"], draw["parts"], draw["key"])
    shard, shards = args.shard
    (args.out / "metadata.csv").unlink(missing_ok=True)
    (args.out / "config.json").unlink(missing_ok=True)
    todo = [draw for draw in draws[shard::shards] if not is_filled(args.out / draw["name"], draw)]
    if todo:
        device = pick_device(args.device)
        pipe, clip = sampler(args.base, device, args.precision), Clip(args.clip, device)
        tokens_of(pipe.tokenizer, [draw["prompt"] for draw in todo])
    for draw in todo:
        work = args.out / f".{draw['name']}.partial"
        if not folder.published(work, draw["key"]):
            folder.remove(work)
            if folder.published(args.out / draw["name"], draw["key"]):  # more images of the same unit are wanted
                (args.out / draw["name"]).rename(work)
            else:
                work.mkdir(parents=True)
                folder.write_config(work, args, draw["key"])
        start = time.monotonic()
        load_unit(pipe, draw["folder"])
        fill(pipe, clip, draw, prompts, work, args)
        folder.write_config(work, args, draw["key"], **folder.spent(start))
        folder.remove(args.out / draw["name"])
        work.rename(args.out / draw["name"])
    if shards == 1:
        publish(draws, prompts, made_by, args)
        if args.drop_weights:
            for weights in {draw["folder"] for draw in draws if draw["folder"]}:
                for name in ("unet", "text_encoder", "pytorch_lora_weights.safetensors"):
                    folder.remove(weights / name)


def parse():
    parser = folder.Arguments(__doc__)
    count = folder.number(int, 1)
    parser.add_argument("--base", required=True, help="folder or hub id of a Stable Diffusion pipeline")
    parser.add_argument("--models", type=Path, help="OUT of finetune.py; none: vanilla, the base model itself")
    parser.add_argument("--data", type=Path, required=True, help="folder in the one format: its groups and prompts")
    parser.add_argument("--clip", required=True, help="folder or hub id of the CLIP model that filters")
    parser.add_argument("--images", type=count, default=250, help="images a group")
    parser.add_argument("--share", choices=("size", "even"), default="size",
                        help="a group's images over its units: by their training images, or evenly")
    parser.add_argument("--steps", type=count, default=20, help="of DPM-Solver++")
    parser.add_argument("--guidance-scale", type=folder.number(float, 1), default=2.0,
                        help="of the prompt against the empty one; 1: none (half the cost)")
    parser.add_argument("--attribute-guidance", type=folder.number(float, 0), help="scale of the attribute's words "
                        "alone, --guidance-scale then being that of the class's (costs half more); default: one scale")
    parser.add_argument("--clip-threshold", type=folder.number(float, 0, 1), default=0.1,
                        help="least probability of an image's own group among all groups' prompts; 0: no filter")
    parser.add_argument("--max-tries", type=count, default=20, help="candidates a wanted image before giving up")
    parser.add_argument("--batch", type=count, default=64, help="images drawn at once")
    parser.add_argument("--seed", type=int, default=0, help="of all images")
    parser.add_argument("--drop-weights", action=folder.Flag, default=False,
                        help="remove the weights in MODELS once all images are made (a UNet of SD 1.5 is 3.4 GB)")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                        help="auto: bf16 on a GPU that has it, else fp32")
    parser.add_argument("--shard", type=folder.shard_of, default="0/1", help="i/n: draw every n-th unit, from the i-th")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser.parse_args()


def is_filled(path, draw):
    kept = sum(row["verdict"] == "kept" for row in read_candidates(path))
    return folder.published(path, draw["key"]) and kept >= draw["share"]


def publish(draws, prompts, made_by, args):
    """Writes the sheets and, last, metadata.csv and config.json; removes units that are no more."""
    from PIL import Image

    folder.remove_others(args.out, {draw["name"] for draw in draws})
    rows, counts = [], {}
    for draw in draws:
        y, a = folder.labels_of(draw["group"])
        candidates = read_candidates(args.out / draw["name"])
        kept = [row for row in candidates if row["verdict"] == "kept"][:draw["share"]]
        tried = [row["verdict"] for row in candidates[:kept[-1]["index"] + 1]] if kept else []
        counts[draw["name"]] = {word: tried.count(word) for word in ("kept", "clip", "blank", "nan")}
        rows += [{"file_name": f"{draw['name']}/{row['index']:05}.png", "split": "train", "y": y, "a": a,
                  "text": prompts[draw["group"]], "unit": draw["name"], "clip_score": row["clip_score"],
                  "seed": folder.seed_of(args.seed, draw["name"], row["index"])} for row in kept]
    for group in prompts:
        units = {}
        for row in rows:
            if folder.group_of(row) == group:
                units.setdefault(row["unit"], []).append(args.out / row["file_name"])
        width = 16 if len(units) > 1 else 12
        lines = [(unit, [Image.open(path) for path in paths[i:i + width]]) for unit, paths in units.items()
                 for i in range(0, min(len(paths), width * (2 if len(units) > 1 else 6)), width)]
        folder.contact_sheet([line for _, line in lines], [unit for unit, _ in lines]).save(args.out / f"{group}.png")
    folder.write_csv(args.out / "metadata.csv", rows)
    folder.write_config(args.out, args, folder.digest(made_by, rows), counts=counts)


if __name__ == "__main__":
    folder.run(main)
