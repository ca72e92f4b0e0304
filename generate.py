"""Stage 3: draws a group-balanced synthetic set from the fine-tuned models and filters it.

    python generate.py --base base/miniature --clip base/miniature/clip --data data/digits-0.95 \\
        --embeddings runs/digits-0.95/embeddings --models runs/digits-0.95/models/lora \\
        --out runs/digits-0.95/synthetic/lora

Every group of DATA gets --images images, divided among its units. Without --models (vanilla) the
base model draws them from the group's prompt. A rare group (see --rare) is drawn by the models of
its class's most common one, without their identifier and away from that group's words (paper,
severe bias). With --rare shared these models draw the common group in the same way, so that nothing
but the attribute tells the images of the two apart. With --edit real images of the common group are
edited into both groups, instead of drawing from noise (see base/drawing.py). Of the images drawn,
the share --keep with the best CLIP score is selected (paper, CLIP filter). An image is determined
by (seed, unit, index) alone; of an edit the seed chooses the real image. The safety checker is off:
a blackened image is no training image.

Reads DATA/metadata.csv (groups and their prompts), MODELS and EMBEDDINGS. Writes OUT/metadata.csv
(the selected images in the one format, with columns unit, clip_score, and what diffusers needs to
draw an image again: seed, prompt, negative_prompt, guidance_scale; with --edit, edited and
edited_prompt: the real image and its own prompt), OUT/<unit>/*.png and candidates.csv (all images
drawn), OUT/<group>.png (a sheet), a card and config.json.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from base import candidates, cards, drawing, families, weights
from common import clip, compute, files, imagefolder, made, stage
from common.files import InputError

np = stage.lazy("numpy")
torch = stage.lazy("torch")

# -------------------------------------------------------------------------------------- the method


class ClipScore:
    """How well images show their group (paper, CLIP filter), all similarities being cosines.

    alpha * similarity to the prompt of the class + (1 - alpha) * similarity to the mean embedding
    of the group's real training images. Where there are none the first term counts alone.
    """

    def __init__(self, encoder, rows, alpha, embeddings):
        self.encoder, self.alpha, self.classes, self.means = encoder, alpha, {}, {}
        for y, texts in imagefolder.class_prompts(rows).items():
            self.classes[y] = normalised(encoder.texts(texts).mean(0))
        train = [row for row in rows if row["split"] == "train"]
        if train and alpha < 1:
            found = clip.read_embeddings(embeddings, train, encoder)
            for group in imagefolder.group_counts(train):
                members = imagefolder.members_of(group, train)
                self.means[group] = normalised(torch.from_numpy(found[members].mean(0)))

    def __call__(self, images, group):
        """Scores of PIL images that are to show this group: [float]."""
        embeddings = self.encoder.images(images)
        self.encoder.rest()  # until the next images are drawn
        scores = embeddings @ self.classes[imagefolder.labels_of(group)[0]]
        if group in self.means:
            to_mean = embeddings @ self.means[group]
            scores = self.alpha * scores + (1 - self.alpha) * to_mean
        return scores.tolist()


def normalised(embedding):
    return torch.nn.functional.normalize(embedding, dim=0)


def selected(drawn, share, keep):
    """The `share` candidates with the best CLIP score, among the first share / keep sound ones.

    Returns (them, the candidates that they were selected from), in the order of their indices;
    the former is [] if not enough have been drawn.
    """
    wanted = math.ceil(share / keep)
    sound = [row for row in drawn if not row["fault"]][:wanted]
    if len(sound) < wanted:
        return [], drawn
    best = sorted(sound, key=lambda row: -float(row["clip_score"]))[:share]
    return sorted(best, key=lambda row: row["index"]), drawn[:sound[-1]["index"] + 1]


# --------------------------------------------------------------------------------------- the units


@dataclass
class Draw:
    """What is to be drawn: images of one group by one unit's model."""

    name: str  # of the folder: the group, and the unit if it is a part of one
    group: str
    title: str  # for people
    prompt: str
    negative: str  # negative prompt
    guidance: float  # guidance scale
    weights: Path | None  # folder of the unit; None: the base model's own
    trained: str | None  # key of these weights
    share: int  # images that are wanted
    pool_prompt: str  # what the images show that --edit edits
    pool: list | None = None  # their rows, see add_sources()
    first: int = 0  # the one that candidate 0 is made from
    key: str = ""

    def source(self, index):
        """The training image that is edited into candidate `index`."""
        return self.pool[(self.first + index) % len(self.pool)]["file_name"]


def draws_of(rows, prompts, titles, args):
    """The draws for all groups. prompts, titles: {group: ...}."""
    trained = weights.read_draws(args.models, args.base) if args.models else []
    base = {"unit": None, "suffix": "", "prompt": "{text}", "images": 1, "key": None}
    counts = imagefolder.group_counts(row for row in rows if row["split"] == "train")
    fewest = {"own": 1, "auto": args.rare_below}.get(args.rare, math.inf)
    draws, notes = [], []
    for group, text in prompts.items():
        y, a = imagefolder.labels_of(group)
        common = imagefolder.correlated_attribute(counts, y)
        own = [draw for draw in trained if draw["y"] == y and draw["a"] in (a, None)]
        of_common = [draw for draw in trained if draw["y"] == y and draw["a"] == common]
        units, negative, guidance = own or [base], "", args.guidance_scale
        other = imagefolder.group_name(y, common)
        is_rare = a != common and counts.get(group, 0) < fewest
        if of_common and (is_rare or args.rare == "shared"):
            units = [draw | {"prompt": "{text}", "suffix": f"-by-{draw['unit']}"}
                     for draw in of_common]
            if is_rare:
                notes.append(f"{titles[group]}: drawn by the models of {titles[other]}")
            if args.rare != "shared" and not args.edit:
                # The paper's severe bias: the common group's models, without their identifier. The
                # rare group's prompt swaps the attribute's words; the others are the negative one.
                negative, guidance = words_in(prompts[other], text), args.rare_guidance
        elif args.models and not own:
            notes.append(f"{titles[group]}: no training images, drawn by the base model")
        shares = share_out(args.images, [unit["images"] for unit in units])
        for unit, share in zip(units, shares):
            name = group + unit["suffix"]
            # What the same model calls the common group: a learned identifier is another there.
            theirs = of_common if units is own else []
            same = [draw for draw in theirs if draw["suffix"] == unit["suffix"]]
            of_pool = (same or theirs or [unit])[0]["prompt"]
            if share:
                draws.append(Draw(
                    name, group, imagefolder.unit_title(name, titles),
                    unit["prompt"].replace("{text}", text), negative, guidance,
                    unit["unit"] and args.models / unit["unit"], unit["key"], share,
                    of_pool.replace("{text}", prompts.get(other, ""))))
    if compute.FIRST and notes:
        print(*notes, sep="\n")
    return draws


def add_sources(draws, rows, titles, args):
    """Gives each draw the real images that --edit edits: of its class's most common group.

    The seed gives their order; the draws of a class edit different ones, while there are any.
    """
    train = [row for row in rows if row["split"] == "train"]
    counts, wanted = imagefolder.group_counts(train), math.ceil(args.images / args.keep)
    pools, taken, notes = {}, {}, {}
    for draw in draws:
        y, _ = imagefolder.labels_of(draw.group)
        if y not in pools:
            group = imagefolder.group_name(y, imagefolder.correlated_attribute(counts, y))
            mine = [row for row in train if imagefolder.group_of(row) == group]
            if not mine:
                raise InputError("--edit", f"there are no training images of class {y}", "add some")
            rng = torch.Generator().manual_seed(stage.seed_of(args.seed, group))
            pools[y] = [mine[i] for i in torch.randperm(len(mine), generator=rng).tolist()]
        draw.pool, draw.first = pools[y], taken.get(y, 0)
        taken[y] = draw.first + math.ceil(draw.share / args.keep)
        if len(draw.pool) < wanted:
            notes[draw.group] = (f"{titles[draw.group]}: {wanted} images from {len(draw.pool)} "
                                 "real ones, with repetitions")
    if compute.FIRST and notes:
        print(*notes.values(), sep="\n")


def share_out(images, sizes):
    """Splits `images` in proportion to sizes, largest remainders first: ints of that sum."""
    exact = [images * size / sum(sizes) for size in sizes]
    shares = [int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[:images - sum(shares)]:
        shares[i] += 1
    return shares


def words_in(prompt, other):
    """The words of a prompt that another one does not contain."""
    return " ".join(word for word in prompt.split() if word not in other.split())


# ------------------------------------------------------------------------------------- the drawing


def draw_batches(sampler, score, batches, args):
    """Draws and saves the batches, [(draw, number)]. Returns their seconds, [(name, float)]."""
    seconds, loaded = [], None
    with imagefolder.progress(None, "generate", "image", total=len(batches) * args.batch) as bar:
        for draw, number in batches:
            begin = time.monotonic()
            if draw is not loaded:
                sampler.load(draw.weights)
                prompt = sampler.encoded(draw.prompt, draw.negative, draw.guidance > 1)
                before = sampler.encoded(draw.pool_prompt, "", False) if args.edit else None
                work = made.unfinished(args.out, draw.name)
                loaded, rows = draw, candidates.read(work, candidates.TABLE)
            indices = range(number * args.batch, (number + 1) * args.batch)
            if args.edit:
                paths = [args.data / draw.source(index) for index in indices]
                arrays = drawing.edit_images(sampler.family, before, prompt, paths, args.steps)
            else:
                seeds = [stage.seed_of(args.seed, draw.name, index) for index in indices]
                arrays = drawing.draw_images(sampler.family, prompt, seeds, draw.guidance,
                                             args.steps)
            images = [Image.fromarray((array * 255).round().astype(np.uint8))
                      for array in np.nan_to_num(arrays)]
            scores = score(images, draw.group)
            for index, array, image, value in zip(indices, arrays, images, scores):
                fault = fault_of(array)
                rows[index] = {"index": index, "clip_score": f"{value:.4f}", "fault": fault}
                if not fault:
                    image.save(work / candidates.image_name(index))
            candidates.write(work, rows)
            bar.update(args.batch)
            seconds.append((draw.name, time.monotonic() - begin))
    return seconds


def fault_of(image):
    """Why an image, (H, W, 3) float array in [0, 1], cannot be used, or an empty string."""
    if not np.isfinite(image).all():
        return "nan"
    return "blank" if image.std((0, 1)).max() < 0.01 else ""


def batches_needed(draw, args):
    """The numbers of the batches that a unit still needs, if all of their images are sound.

    Batches begin at multiples of --batch, so that a resumed unit draws the very same images.
    """
    there, needed = candidates.read(made.unfinished(args.out, draw.name)), []
    wanted, number = math.ceil(draw.share / args.keep), 0
    most = args.max_tries * wanted + args.batch
    while wanted > 0:
        if number * args.batch >= most:
            sound = sum(not row["fault"] for row in there.values())
            raise InputError(draw.title, f"only {sound} of {len(there)} images drawn are sound, "
                             f"{math.ceil(draw.share / args.keep)} wanted",
                             "fine-tune longer or otherwise, or raise --max-tries")
        indices = range(number * args.batch, (number + 1) * args.batch)
        if there.keys() >= set(indices):
            wanted -= sum(not there[index]["fault"] for index in indices)
        else:
            needed.append(number)
            wanted -= args.batch
        number += 1
    return needed


# --------------------------------------------------------------------------------------- the stage


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    merged = files.read_json(args.models / "config.json").get("merged", []) if args.models else []
    rows = imagefolder.with_merged(imagefolder.read_metadata(args.data), merged)
    prompts = imagefolder.group_prompts(rows)
    titles = imagefolder.group_titles(rows)
    draws = draws_of(rows, prompts, titles, args)
    if args.edit:
        add_sources(draws, rows, titles, args)
    made_by = add_keys(draws, rows, prompts, args)
    filled = compute.agreed(lambda: [draw.name for draw in draws if is_filled(draw, args)])
    todo = [draw for draw in draws if draw.name not in filled]
    if todo:
        draw_all(todo, {draw.name: draw.share for draw in draws}, rows, args)
    compute.gather([])
    if compute.FIRST:
        publish(draws, prompts, made_by, merged, args)


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    count, scale, share = (stage.number(int, 1), stage.number(float, 1), stage.number(float, 0, 1))
    add = parser.add_argument
    add("--base", required=True, help=f"folder or hub id: {families.KNOWN}")
    add("--models", type=Path, help="output of finetune.py; default: the base model (vanilla)")
    add("--data", type=Path, required=True, help="dataset folder, for its groups and their prompts")
    add("--clip", required=True, help="folder or hub id of the CLIP model that filters")
    add("--images", type=count, default=250, help="images per group")
    add("--val-share", type=stage.number(float, 0, 0.9), default=0.0, help="share of the images "
        "that become split val, for train_classifier.py --val synthetic")
    add("--steps", type=count, default=20, help="sampling steps")
    add("--guidance-scale", type=scale, default=2.0, help="1: no guidance, half the cost")
    add("--guidance-interval", type=share, nargs=2, metavar=("LOW", "HIGH"), default=[0.0, 1.0],
        help="guidance only at these noise levels, from 0 (image) to 1 (noise); faster")
    add("--rare", choices=("auto", "own", "transfer", "shared"), default="auto", help="who draws "
        "a group that is not the most common one of its class: own: models of its own; transfer: "
        "that one's models (paper); auto: transfer if it has fewer than --rare-below training "
        "images; shared: that one's models draw both, in the same way (ours)")
    add("--edit", action=stage.Flag, default=False, help="edit real images of each class's common "
        "group instead of drawing from noise (ours); without guidance")
    add("--rare-below", type=count, default=10, help="--rare auto: groups with fewer training "
        "images are drawn by the models of their class's common group")
    add("--rare-guidance", type=scale, default=2.0, help="guidance scale of transferred groups; "
        "above 1, their negative prompt takes effect")
    add("--keep", type=stage.number(float, 0.01, 1), default=0.75, help="share of the images drawn "
        "for a unit that is kept, those with the best CLIP score (paper: 0.75); 1: no filter")
    add("--alpha", type=share, default=0.5, help="weight of the class's prompt in the CLIP score; "
        "the rest is that of the group's mean embedding (paper: 0.5)")
    add("--embeddings", type=Path, help="of DATA's images, for that mean: of data/embed.py")
    add("--max-tries", type=count, default=20, help="candidates per image before giving up")
    add("--batch", type=count, default=64, help="images drawn at once")
    add("--seed", type=int, default=0, help="seed of all images")
    add("--drop-weights", action=stage.Flag, default=False,
        help="remove MODELS' weights once all is drawn")
    compute.add_flags(parser)
    add("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    if args.alpha < 1 and not args.embeddings:
        raise InputError("--embeddings", "the CLIP score needs the embeddings of the real images",
                         "run data/embed.py, or use --alpha 1")
    if args.guidance_interval[0] > args.guidance_interval[1]:
        raise InputError("--guidance-interval", "its ends are in the wrong order", "give LOW HIGH")
    if args.edit:
        args.guidance_scale = args.rare_guidance = 1.0  # with guidance an inversion is inexact
    if args.drop_weights and not args.models:
        raise InputError("--drop-weights", "the base model draws, there are no weights to remove",
                         "give --models")
    return args


def add_keys(draws, rows, prompts, args):
    """Gives each draw its key, a digest of what its images depend on. Returns what is common."""
    train = [(row["file_name"], imagefolder.group_of(row)) for row in rows
             if row["split"] == "train"]
    means = args.embeddings and [clip.embeddings_digest(args.embeddings), train]
    settings = made.settings_of(
        args, "base", "clip", "images", "max_tries", "drop_weights", "keep", "embeddings",
        "rare", "rare_below", "rare_guidance", "val_share")
    code = made.code_digest(__file__, weights.__file__, clip.__file__, families.__file__,
                            candidates.__file__, drawing.__file__, imagefolder.load_image,
                            stage.seed_of)
    made_by = files.digest(settings, prompts, imagefolder.class_prompts(rows), means,
                           files.model_digest(args.base), files.model_digest(args.clip), code)
    pools = {imagefolder.labels_of(draw.group)[0]: draw.pool for draw in draws if draw.pool}
    digests = {y: imagefolder.digest(args.data, pool) for y, pool in pools.items()}
    for draw in draws:
        pool = digests.get(imagefolder.labels_of(draw.group)[0])
        edited = pool and [pool, draw.first, draw.pool_prompt]
        draw.key = files.digest(made_by, draw.name, draw.prompt, draw.negative, draw.guidance,
                                draw.trained, edited)
    return made_by


def is_filled(draw, args):
    path = args.out / draw.name
    return made.is_finished(path, draw.key) and bool(chosen(path, draw, args)[0])


def chosen(folder, draw, args):
    """See selected()."""
    return selected(list(candidates.read(folder).values()), draw.share, args.keep)


def draw_all(draws, wanted, rows, args):
    """Draws and publishes the units. The processes of this command divide their batches."""
    for draw in draws:
        weights.check(draw.weights, draw.trained)
    accelerator = compute.accelerator(args.device, args.precision)
    bf16 = accelerator.mixed_precision == "bf16"
    family = families.load(args.base, torch.bfloat16 if bf16 else torch.float32)
    if args.edit and not isinstance(family.schedule, families.Diffusion):
        raise InputError("--edit", "is for Stable Diffusion 1.x, 2.x and XL", "leave it out")
    family.pipe.to(accelerator.device)
    sampler = weights.Sampler(family)
    wanted_prompts = [(draw.prompt, draw.negative, draw.guidance > 1) for draw in draws]
    wanted_prompts += [(draw.pool_prompt, "", False) for draw in draws if args.edit]
    sampler.encode(wanted_prompts)
    if args.guidance_interval != [0, 1]:
        drawing.guide_within(args.guidance_interval, family)
    score = ClipScore(clip.Clip(args.clip, accelerator.device), rows, args.alpha, args.embeddings)
    stage.start(args, wanted)
    if compute.FIRST:
        (args.out / "metadata.csv").unlink(missing_ok=True)
        for draw in draws:
            candidates.begin(args.out, draw.name, draw.key)
    seconds, needed = [], True
    while needed:
        compute.gather([])  # what the first process has begun, and all have drawn, is there
        numbers = compute.agreed(lambda: [batches_needed(draw, args) for draw in draws])
        needed = [(draw, i) for draw, batches in zip(draws, numbers) for i in batches]
        seconds += compute.gather(draw_batches(sampler, score, compute.share(needed), args))
    for draw in draws if compute.FIRST else ():
        taken = sum(each for name, each in seconds if name == draw.name)
        spent = stage.spent(time.monotonic()) | {"seconds": round(taken, 1)}
        count = candidates.publish(args.out, draw.name, args, draw.key, **spent)
        print(f"{draw.title}: {count} images drawn, {draw.share} kept", flush=True)


def publish(draws, prompts, made_by, merged, args):
    """Writes the sheets and, last, metadata.csv and config.json; removes other units."""
    made.remove_other_units(args.out, {draw.name for draw in draws})
    rows, counts = [], {}
    for draw in draws:
        y, a = imagefolder.labels_of(draw.group)
        kept, drawn = chosen(args.out / draw.name, draw, args)
        faults = [row["fault"] for row in drawn]
        counts[draw.name] = {"kept": len(kept), "clip": faults.count("") - len(kept),
                             "blank": faults.count("blank"), "nan": faults.count("nan")}
        for row, split in zip(kept, splits(len(kept), args.val_share)):
            rows.append({
                "file_name": f"{draw.name}/{candidates.image_name(row['index'])}",
                "split": split, "y": y, "a": a, "text": prompts[draw.group], "unit": draw.name,
                "clip_score": row["clip_score"],
                "seed": "" if args.edit else stage.seed_of(args.seed, draw.name, row["index"]),
                "prompt": draw.prompt,
                "negative_prompt": draw.negative, "guidance_scale": draw.guidance}
                | ({"edited": draw.source(row["index"]), "edited_prompt": draw.pool_prompt}
                   if args.edit else {}))
    for group in prompts:
        mine = [row for row in rows if imagefolder.group_of(row) == group]
        save_sheet(args.out / f"{group}.png", args.out, mine)
    cards.of_images(args.out / "README.md", rows, args)
    files.write_csv(args.out / "metadata.csv", rows)
    stage.finish(args.out, args, files.digest(made_by, rows), counts=counts, merged=merged)
    if args.drop_weights:
        weights.drop(args.models)


def splits(count, share):
    """The split of each of `count` images: val for a share of them, evenly spread, else train."""
    return ["val" if int((i + 1) * share) > int(i * share) else "train" for i in range(count)]


def save_sheet(path, folder, rows):
    """Images of a group: six rows of 12, or two rows of 16 per cluster."""
    units = {}
    for row in rows:
        units.setdefault(row["unit"], []).append(folder / row["file_name"])
    width, height = (16, 2) if len(units) > 1 else (12, 6)
    lines, labels = [], []
    for unit, paths in units.items():
        for i in range(0, min(len(paths), width * height), width):
            lines.append([Image.open(path) for path in paths[i:i + width]])
            labels.append(unit)
    imagefolder.contact_sheet(lines, labels).save(path)


if __name__ == "__main__":
    stage.run(main, shared=True)
