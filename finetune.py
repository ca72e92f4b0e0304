"""Stage 2: fine-tunes the diffusion model on the training images of each group or cluster.

    python finetune.py --method lora --base base/miniature --data data/digits-0.95 \\
        --out runs/digits-0.95/models/lora
    python finetune.py --method dreambooth --per cluster --base base/miniature \\
        --data runs/digits-0.95/clusters --prior runs/digits-0.95/synthetic/vanilla \\
        --out runs/digits-0.95/models/clustered

Two axes give the paper's methods: what is trained (lora: low-rank updates of the network's
attention, Hu et al. 2022; dreambooth: all of it, Ruiz et al. 2023) and on which unit (group,
cluster). Clustered DreamBooth is dreambooth per cluster; vanilla needs no fine-tuning. A rare word
in the prompt, the identifier, stands for the unit.

Our compositional method trains one model `--per dataset`: each image with its own group's prompt.
What a class looks like is learned mostly from the common groups, the attribute from the prompt.

Reads DATA (split train; column `cluster` for --per cluster) and, for prior preservation, the images
of vanilla. Writes OUT/<unit>/ with the weights (see base/weights.py), loss.csv, a model card and
config.json; last OUT/config.json.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

from base import cards, families, training, weights
from base.training import Base, Checkpoint, Images
from common import compute, files, imagefolder, made, pixels, stage
from common.files import InputError

torch = stage.lazy("torch")
# diffusers and peft take seconds to import, so the functions that need them import them

# -------------------------------------------------------------------------------------- the method


def denoising_losses(family, latents, noise, timesteps, prompts):
    """Mean squared error of what the network predicts for each image: (B,) float32.

    family: see base/families.py; latents, noise: (B, C, h, w); timesteps: (B,); prompts: encoded.
    """
    schedule = family.schedule
    noisy = schedule.noisy(latents, noise, timesteps).to(family.network.dtype)
    predicted = family.predict(noisy, timesteps, prompts)
    target = schedule.target(latents, noise, timesteps)
    return (predicted.float() - target).pow(2).mean(dim=(1, 2, 3))


def step_loss(base, unit, step, args):
    """The loss of one step on one unit, for DreamBooth and LoRA; (seed, unit, step) fix its draws.

    With prior preservation, as many of the base model's own images, with the plain prompt, are
    added to the batch, so that the model keeps what it knows about the group (Ruiz et al. 2023,
    equation 2).
    """
    rng = torch.Generator().manual_seed(stage.seed_of(args.seed, unit.name, step))
    parts = [unit.images, unit.prior] if unit.prior else [unit.images]
    picks = [part.pick(step, args.batch) for part in parts]
    latents = [part.latents(pick, rng) for part, pick in zip(parts, picks)]
    latents = torch.cat(latents).to(base.device)
    prompts = [part.prompts[i] for part, pick in zip(parts, picks) for i in pick]
    noise = torch.randn(latents.shape, generator=rng).to(latents)
    timesteps = base.family.schedule.timesteps(len(latents), rng).to(base.device)
    with base.autocast():
        losses = denoising_losses(base.family, latents, noise, timesteps, base.encoded(prompts))
    instance, prior = losses[:args.batch], losses[args.batch:]
    return instance.mean() + args.prior_weight * prior.mean() if unit.prior else instance.mean()


def trainable_weights(base, args):
    """Makes the weights that the method trains require gradients, in fp32, and returns them."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    network = base.network
    if args.gradient_checkpointing:
        network.enable_gradient_checkpointing()
        network.train()
    if args.method == "lora":
        network.add_adapter(LoraConfig(
            r=args.rank, lora_alpha=args.alpha or args.rank, init_lora_weights="gaussian",
            target_modules=base.family.lora_layers))
        cast_training_params(network)
    else:
        network.requires_grad_(True)
        for part in base.text if args.train_text_encoder else ():
            part.to(base.device).requires_grad_(True)
    return [weight for part in (network, *base.text)
            for weight in part.parameters() if weight.requires_grad]


def finetune(base, unit, args):
    """Trains the base's weights on one unit. Returns the loss curve: [{step, loss, learning_rate}].

    Raises FloatingPointError at the first loss that is not finite.
    """
    from diffusers.optimization import get_scheduler

    torch.manual_seed(stage.seed_of(args.seed, unit.name))  # LoRA's initial weights
    learned = trainable_weights(base, args)
    parameters = [{"params": list(learned)}]
    if args.learn_identifiers:
        learned.append(base.learn_tokens(unit.identifiers, args.initial_word))
        parameters.append({"params": learned[-1:], "lr": args.identifier_rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate,
                                  weight_decay=args.weight_decay, fused=True)
    schedule = get_scheduler(args.schedule, optimizer, num_warmup_steps=args.warmup,
                             num_training_steps=args.steps)
    path = made.unfinished(args.out, unit.name)
    checkpoint = Checkpoint(path, unit.key, learned, optimizer, schedule)
    curve = checkpoint.load()
    for step in imagefolder.progress(range(len(curve), args.steps), unit.name, "step",
                                     initial=len(curve), total=args.steps):
        total = 0.0
        for part in range(args.accumulation):
            batch = step * args.accumulation + part
            loss = step_loss(base, unit, batch, args) / args.accumulation
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise FloatingPointError(f"{unit.title}: loss is {total} at step {step} (learning rate "
                                     f"{args.learning_rate:g}, batch {args.batch})")
        rate = schedule.get_last_lr()[0]
        curve.append({"step": step, "loss": round(total, 6), "learning_rate": rate})
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if args.checkpoint_every and len(curve) % args.checkpoint_every == 0:
            if len(curve) < args.steps:
                checkpoint.save(curve)
    return curve


# --------------------------------------------------------------------------------------- the units


@dataclass
class Unit:
    """What has weights of its own: a group, a cluster of a group, or the whole dataset."""

    name: str
    title: str  # for people
    rows: list  # of metadata
    templates: list  # of each row: its prompt, with {text} for the caption
    identifiers: list  # the words that stand for it
    images: Images
    prior: Images | None  # class images, for prior preservation
    key: str = ""


def units_of(rows, prior_rows, args):
    """The units of the training rows, sorted by name."""
    titles, members = imagefolder.group_titles(rows), {}
    for row in rows:
        group = imagefolder.group_of(row)
        names = {"group": group, "cluster": f"{group}-c{row.get('cluster')}", "dataset": "all"}
        members.setdefault(names[args.per], []).append(row)
    steps, units = args.steps * args.accumulation, []
    for name, mine in sorted(members.items()):
        words = [f"<{imagefolder.group_of(row)}>" if args.learn_identifiers else args.identifier
                 for row in mine]
        templates = [args.prompt.replace("{identifier}", word) for word in words]
        prompts = [template.replace("{text}", row["text"])
                   for template, row in zip(templates, mine)]
        images = Images(args.data, mine, prompts, (args.seed, name), steps, args.batch,
                        args.balance)
        groups = imagefolder.group_counts(mine)
        priors = [row for row in prior_rows if imagefolder.group_of(row) in groups]
        prior = Images(args.prior, priors, [row["text"] for row in priors],
                       (args.seed, name, "prior"), steps, args.batch) if priors else None
        units.append(Unit(name, imagefolder.unit_title(name, titles), mine, templates,
                          sorted(set(words)), images, prior))
    return units


def add_keys(units, base_digest, args):
    """The key of each unit: a digest of all that its weights depend on."""
    code = made.code_digest(__file__, training.__file__, weights.__file__, families.__file__,
                            imagefolder.load_image, stage.seed_of)
    settings = made.settings_of(args, "base", "checkpoint_every", "merge_above")
    for unit in units:
        prior = imagefolder.digest(args.prior, unit.prior.rows) if unit.prior else None
        unit.key = files.digest(settings, base_digest, code, unit.images.prompts,
                                imagefolder.digest(args.data, unit.rows), prior)


# --------------------------------------------------------------------------------------- the stage


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    rows = imagefolder.read_metadata(args.data, "train")
    imagefolder.group_prompts(imagefolder.read_metadata(args.data))  # one caption a group
    table = args.data / "metadata.csv"
    if args.per == "cluster" and "cluster" not in rows[0]:
        raise InputError(table, "has no column 'cluster'", "point --data to cluster.py's output")
    for row in rows if args.per == "cluster" else ():  # it becomes a part of a folder's name
        imagefolder.as_label(table, "cluster", row.get("cluster", "0"))
    prior_rows = imagefolder.read_metadata(args.prior, "train") if args.prior else []
    units = units_of(rows, prior_rows, args)
    without = next((unit for unit in units if args.prior and not unit.prior), None)
    if without:
        raise InputError(args.prior, f"has no class images for {without.title}",
                         "generate them for this --data")
    base_digest = files.model_digest(args.base)
    add_keys(units, base_digest, args)
    finished = compute.agreed(lambda: [unit.name for unit in units if made.is_finished(
        args.out / unit.name, unit.key)])
    todo = [unit for unit in units if unit.name not in finished]
    drawn = [row for unit in todo for row in unit.images.drawn.values()]
    compute.agreed(lambda: pixels.check(args.data, drawn))  # now, not after hours of training
    failures = []
    if todo:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.base_dtype]
        base = Base(args.base, compute.accelerator(args.device, args.precision), dtype)
        check_family(base.family, args)
        stage.start(args, {unit.name: 1 for unit in units})
        failures = train_units(base, compute.share(todo), base_digest, args)
    status = stage.outcome(failures)
    if compute.FIRST and not status:
        publish(units, base_digest, args)
    return status


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    count, positive, share = (stage.number(int, 1), stage.number(float, 0),
                              stage.number(float, 0, 1))
    add = parser.add_argument_group("method and data").add_argument
    add("--method", choices=("lora", "dreambooth"), required=True,
        help="low-rank updates, or all weights")
    add("--per", choices=("group", "cluster", "dataset"), default="group",
        help="the unit that has its own weights; dataset: one model for all (compositional, ours)")
    add("--base", required=True, help=f"folder or hub id: {families.KNOWN}")
    add("--data", type=Path, required=True, help="prepared dataset folder, or output of cluster.py")
    add("--prior", type=Path, help="class images (the vanilla synthetic images) for prior "
        "preservation; default: no prior preservation")
    add("--learn-identifiers", action=stage.Flag, default=False, help="--per dataset: learn a word "
        "for each group instead of using --identifier")
    add("--merge-above", type=stage.number(float, -1, 1), default=1.0, help="--learn-identifiers: "
        "groups of a class whose words have a higher cosine similarity are drawn as one group "
        "(SAGE); 1: none")
    add("--out", type=Path, required=True, help="folder to write the units to")
    how = parser.add_argument_group("training")
    add = how.add_argument
    add("--identifier", default="sks", help="rare word that stands for the unit (DreamBooth)")
    add("--prompt", default="{text} {identifier}", help="prompt of the unit's images")
    add("--balance", type=share, default=0.0, help="--per dataset: from 0 (images are drawn as "
        "they come) to 1 (all groups equally often)")
    add("--steps", type=count, default=800, help="optimiser steps per unit (diffusers: 400 to 800)")
    add("--batch", type=count, default=1, help="images per step; as many class images are added")
    add("--accumulation", type=count, default=1, help="batches per step")
    add("--learning-rate", type=positive,
        help="default: 1e-4 for lora, 5e-6 for dreambooth (diffusers)")
    add("--initial-word", default="photo", help="what learned identifiers begin as (SAGE: photo)")
    add("--identifier-rate", type=positive, default=1e-2, help="learning rate of these")
    add("--schedule", choices=("constant", "constant_with_warmup", "linear", "cosine"),
        default="constant", help="how the learning rate changes")
    add("--warmup", type=stage.number(int, 0), default=0, help="warm-up steps of the schedule")
    add("--weight-decay", type=positive, default=0.01, help="weight decay of AdamW")
    add("--prior-weight", type=positive, default=1.0, help="weight of the loss on class "
        "images (DreamBooth: 1)")
    add("--rank", type=count, default=16, help="rank of LoRA")
    add("--alpha", type=count, help="LoRA's updates are scaled by alpha / rank; default: the rank")
    add("--train-text-encoder", action=stage.Flag, default=False, help="dreambooth only")
    add("--gradient-checkpointing", action=stage.Flag, default=False,
        help="less memory, about a third slower")
    add("--checkpoint-every", type=stage.number(int, 0), default=500,
        help="steps between checkpoints, from which a killed unit resumes; 0: it starts again")
    add("--base-dtype", choices=("fp32", "bf16"), default="fp32", help="lora: of the frozen base; "
        "bf16: half the memory")
    add("--save-dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="weights on disk")
    add("--seed", type=int, default=0, help="seed of all random draws")
    compute.add_flags(how)
    args = parser.parse_args(argv)
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.method == "lora" else 5e-6
    one_model = args.per == "dataset"
    for wrong, flag, what, todo in (
            (args.train_text_encoder and args.method == "lora", "--train-text-encoder",
             "LoRA trains attention only", "use --method dreambooth"),
            (args.balance and not one_model, "--balance",
             f"a {args.per} contains one group only", "use --per dataset"),
            (args.learn_identifiers and not one_model, "--learn-identifiers",
             f"a {args.per} has a model of its own", "use --per dataset"),
            (args.merge_above < 1 and not args.learn_identifiers, "--merge-above",
             "there are no learned words to compare", "use --learn-identifiers"),
            (args.base_dtype == "bf16" and args.method == "dreambooth", "--base-dtype",
             "DreamBooth trains the base's weights, in fp32", "use --method lora"),
            (args.base_dtype == "bf16" and args.learn_identifiers, "--base-dtype",
             "learned words are trained in fp32", "use --base-dtype fp32"),
            (args.learn_identifiers and args.train_text_encoder, "--learn-identifiers",
             "trains words, not the text encoder", "leave out --train-text-encoder"),
            (args.warmup and args.schedule == "constant", "--warmup",
             "the constant schedule has none", "use --schedule constant_with_warmup"),
            ("{text}" not in args.prompt, "--prompt",
             "does not contain {text}", 'for example "{text} {identifier}"')):
        if wrong:
            raise InputError(flag, what, todo)
    return args


def check_family(family, args):
    """Raises InputError for a flag that a family of base models does not know."""
    for flag, given in (("--train-text-encoder", args.train_text_encoder),
                        ("--learn-identifiers", args.learn_identifiers)):
        if given and not family.learns_text:
            raise InputError(flag, "is for Stable Diffusion 1.x and 2.x", "leave it out")


def train_units(base, units, base_digest, args):
    """Trains and publishes units, one after the other. Returns a line for each that failed."""
    failures = []
    base.encode_prompts([part.prompts[i] for unit in units for part in (unit.images, unit.prior)
                         if part for i in part.drawn])
    for unit in units:
        begin = time.monotonic()
        base.reset(args.method)
        parts = [unit.images, unit.prior] if unit.prior else [unit.images]
        for part in parts:
            part.encode(base)
        encoding = round(time.monotonic() - begin, 3)
        try:
            curve = finetune(base, unit, args)
        except FloatingPointError as error:
            failures.append(f"finetune.py: error: {error}")
            continue
        finally:
            for part in parts:
                part.mean = part.std = None  # makes room
        with files.replacing(args.out / unit.name) as out:
            weights.save(out, base, args.method, args.save_dtype, args.train_text_encoder)
            files.write_csv(out / "loss.csv", curve)
            cards.of_weights(out / "README.md", unit, base.family, args)
            made.finish(out, args, unit.key, base=base_digest, images=len(unit.rows),
                        encoding_seconds=encoding, **stage.spent(begin))
        files.remove(made.unfinished(args.out, unit.name))
        last = [row["loss"] for row in curve[-50:]]
        print(f"{unit.title}: {len(unit.rows)} images, loss {sum(last) / len(last):.4f}",
              flush=True)
    return failures


def publish(units, base_digest, args):
    """Removes units that no longer exist, and writes OUT/config.json with what can be drawn.

    A draw is a prompt of a unit for the groups of class y with attribute a (null: with any), and
    the number of training images behind it.
    """
    made.remove_other_units(args.out, {unit.name for unit in units})
    texts = {(row["y"], row["a"]): row["text"] for unit in units for row in unit.rows}
    merged = training.merged_groups(args.out / units[0].name, args.merge_above, texts)
    draws = {}
    for unit in units:
        for row, template in zip(unit.rows, unit.templates):
            suffix = f"-c{row['cluster']}" if args.per == "cluster" else ""
            a = None if args.per == "dataset" and not args.learn_identifiers else row["a"]
            if (row["y"], a) in merged:
                suffix = f"-c{a}"
                a = merged[row["y"], a]
            draw = draws.setdefault((unit.name, row["y"], template), {
                "unit": unit.name, "key": unit.key, "y": row["y"], "a": a, "suffix": suffix,
                "prompt": template, "images": 0})
            draw["images"] += 1
    stage.finish(args.out, args, files.digest([unit.key for unit in units]), base=base_digest,
                 draws=list(draws.values()), merged=[(y, a, into) for (y, a), into in
                                                     merged.items()])


if __name__ == "__main__":
    stage.run(main, shared=True)
