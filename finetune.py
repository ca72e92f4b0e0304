"""Stage 2: fine-tunes the diffusion model on the training images of each group, or of each cluster of a group.

    python finetune.py --method lora --base base/miniature --data data/digits-0.95 --out runs/digits-0.95/models/lora
    python finetune.py --method dreambooth --per cluster --prior runs/digits-0.95/synthetic/vanilla \\
        --base base/miniature --data runs/digits-0.95/clusters --out runs/digits-0.95/models/clustered

Two axes give the paper's methods: what is trained (lora: low-rank updates of the UNet's attention, Hu et al. 2022;
dreambooth: the whole UNet, Ruiz et al. 2023) and on which unit (group, cluster). Clustered DreamBooth is dreambooth per
cluster; vanilla needs no fine-tuning. A rare word in the prompt, the identifier, stands for the unit.

Our compositional method trains one model `--per dataset`: each image with its own group's prompt and an identifier for
its cluster (of cluster.py --within class). What a class looks like is learned mostly from the common groups, the
attribute from the prompt, and a rare group can then be drawn in every mode of its class.

Reads DATA (split train; column `cluster` for --per cluster) and, for prior preservation, the images of vanilla.
Writes OUT/<unit>/ with the weights (pytorch_lora_weights.safetensors for diffusers' `load_lora_weights`, or unet/ for
`UNet2DConditionModel.from_pretrained`), loss.csv, a model card and config.json; last OUT/config.json.
"""

import math
import sys
import time
from pathlib import Path

from common import cards, files, imagefolder, models, pixels, stage
from common.checkpoint import Checkpoint
from common.files import InputError
from common.latents import Images

torch = stage.lazy("torch")
# diffusers and peft take seconds to import, so the functions that need them import them

# ---------------------------------------------------------------------------------------------- the method


def denoising_losses(unet, scheduler, latents, noise, timesteps, prompt_embeds, snr_gamma):
    """Mean squared error of the predicted noise (or velocity) for each image: (B,) float32.

    latents, noise: (B, 4, h, w); timesteps: (B,) int; prompt_embeds: (B, tokens, D).
    snr_gamma > 0 weights timesteps by min-SNR (Hang et al. 2023, section 3.4); 0: all alike.
    """
    from diffusers.training_utils import compute_snr

    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    predicted = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, prompt_embeds).sample
    losses = (predicted.float() - target).pow(2).mean(dim=(1, 2, 3))
    if snr_gamma:
        snr = compute_snr(scheduler, timesteps)
        losses = losses * snr.clamp(max=snr_gamma) / (snr + 1 if velocity else snr)
    return losses


def dreambooth_loss(base, unit, step, args):
    """The loss of one step on one unit, of LoRA too; every random draw is determined by (seed, unit, step).

    With prior preservation, as many of the base model's own images, with the plain prompt, are added to the batch, so
    that the model keeps what it knows about the group (Ruiz et al. 2023, equation 2).
    """
    rng = torch.Generator().manual_seed(stage.seed_of(args.seed, unit.name, step))
    picks = [part.pick(step, args.batch) for part in unit.parts]
    latents = torch.cat([part.latents(pick, rng) for part, pick in zip(unit.parts, picks)]).to(base.device)
    prompts = [part.prompts[i] for part, pick in zip(unit.parts, picks) for i in pick]
    noise = torch.randn(latents.shape, generator=rng).to(latents)
    timesteps = torch.randint(base.scheduler.config.num_train_timesteps, (len(latents),), generator=rng)
    with torch.autocast(base.device.type, torch.bfloat16, enabled=base.bf16):
        losses = denoising_losses(base.unet, base.scheduler, latents, noise, timesteps.to(base.device),
                                  base.prompt_embeds(prompts), args.snr_gamma)
    instance, prior = losses[:args.batch], losses[args.batch:]
    return instance.mean() + args.prior_weight * prior.mean() if unit.prior else instance.mean()


def trainable_weights(base, args):
    """Makes the weights that the method trains require gradients, in fp32, and returns them."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    if args.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
        base.unet.train()
    if args.method == "lora":
        base.unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.alpha or args.rank, init_lora_weights="gaussian",
                                         target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        cast_training_params(base.unet)
    else:
        base.unet.requires_grad_(True)
        if args.train_text_encoder:
            base.text_encoder.to(base.device).requires_grad_(True)
    return [weight for module in (base.unet, base.text_encoder) for weight in module.parameters() if weight.requires_grad]


def optimizer_of(base, unit, weights, args):
    """AdamW for the weights and, with --learn-identifiers, the embeddings of the unit's identifiers (textual inversion, Gal et
    al. 2023), all of which begin as those of a common word. Adds the latter to `weights`."""
    parameters = [{"params": list(weights)}]
    if args.learn_identifiers:
        weights.append(base.learn_tokens(unit.identifiers, args.initial_word))
        parameters.append({"params": weights[-1:], "lr": args.identifier_rate, "weight_decay": 0.0})
    return torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)


def finetune(base, unit, args):
    """Trains the base's weights on one unit. Returns the loss curve: [{step, loss, learning_rate}].

    Raises FloatingPointError at the first loss that is not finite.
    """
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    torch.manual_seed(stage.seed_of(args.seed, unit.name))  # LoRA's initial weights
    weights = trainable_weights(base, args)
    optimizer = optimizer_of(base, unit, weights, args)
    schedule = get_scheduler(args.schedule, optimizer, num_warmup_steps=args.warmup, num_training_steps=args.steps)
    ema = EMAModel(weights, decay=args.ema_decay) if args.ema_decay and args.method == "dreambooth" else None
    checkpoint = Checkpoint(args.out / f".{unit.name}.partial", unit.key, weights, optimizer, schedule, ema)
    curve = checkpoint.load()
    for step in imagefolder.progress(range(len(curve), args.steps), unit.name, "step", initial=len(curve), total=args.steps):
        total = 0.0
        for part in range(args.accumulation):
            loss = dreambooth_loss(base, unit, step * args.accumulation + part, args) / args.accumulation
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise FloatingPointError(f"{unit.title}: loss is {total} at step {step} "
                                     f"(learning rate {args.learning_rate:g}, batch {args.batch})")
        curve.append({"step": step, "loss": round(total, 6), "learning_rate": schedule.get_last_lr()[0]})
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.step(weights)
        if args.checkpoint_every and len(curve) % args.checkpoint_every == 0 and len(curve) < args.steps:
            checkpoint.save(curve)
    if ema:
        ema.copy_to(weights)
    return curve


# ------------------------------------------------------------------------------------------------- the units


class Unit:
    """What has weights of its own: a group, a cluster of a group, or the whole dataset."""

    def __init__(self, name, rows, templates, prior_rows, args):
        self.name, self.rows, self.templates, self.prior_rows = name, rows, templates, prior_rows
        self.identifiers = sorted({identifier(row, args) for row in rows})
        self.prompts = [template.replace("{text}", row["text"]) for template, row in zip(templates, rows)]
        self.images = Images(args.data, rows, self.prompts, (args.seed, name), args, args.balance)
        self.prior = prior_rows and Images(args.prior, prior_rows, [row["text"] for row in prior_rows],
                                           (args.seed, name, "prior"), args)
        self.parts = [self.images, self.prior] if self.prior else [self.images]


def units_of(rows, prior_rows, args):
    """The units of the training rows, sorted by name."""
    members = {}
    for row in rows:
        group = imagefolder.group_of(row)
        name = {"group": group, "cluster": f"{group}-c{row.get('cluster')}", "dataset": "all"}[args.per]
        members.setdefault(name, []).append(row)
    return [Unit(name, rows, [prompt_template(row, args) for row in rows],
                 [row for row in prior_rows if imagefolder.group_of(row) in imagefolder.group_counts(rows)], args)
            for name, rows in sorted(members.items())]


def identifier(row, args):
    """The word that stands for a row's unit. One model tells clusters by their number, or learns a word for each."""
    cluster = row.get("cluster", "") if args.per == "dataset" else ""
    if args.learn_identifiers:
        return f"<{imagefolder.group_of(row)}{f'-c{cluster}' if cluster else ''}>"
    return f"{args.identifier}{cluster}"


def prompt_template(row, args):
    """The prompt of a row with its identifier, and {text} for its caption."""
    return args.prompt.replace("{identifier}", identifier(row, args))


# ------------------------------------------------------------------------------------------------ the stage


def main(argv=None):
    args = parse(argv)
    inputs = stage.begin(args)
    rows = imagefolder.read_metadata(args.data, "train")
    imagefolder.group_prompts(imagefolder.read_metadata(args.data))  # raises if a group has several captions
    if args.per == "cluster" and "cluster" not in rows[0]:
        raise InputError(args.data / "metadata.csv", "has no column 'cluster'", "point --data to the output of cluster.py")
    for row in rows if args.per != "group" else ():  # the cluster becomes a part of a folder's name
        imagefolder.as_label(args.data / "metadata.csv", "cluster", row.get("cluster", "0"))
    prior_rows = imagefolder.read_metadata(args.prior, "train") if args.prior else []
    titles = imagefolder.group_titles(rows)
    units = units_of(rows, prior_rows, args)
    for unit in units:
        unit.title = imagefolder.unit_title(unit.name, titles)
        if args.prior and not unit.prior_rows:
            raise InputError(args.prior, f"has no class images for {unit.title}", "generate them for this --data")
    base = files.model_digest(args.base)
    code = stage.code_digest(__file__, models.__file__, Images, imagefolder.load_image, stage.seed_of)
    for unit in units:
        unit.key = files.digest(stage.settings_of(args, "base", "checkpoint_every", "merge_above"), base, code, unit.prompts,
                                imagefolder.digest(args.data, unit.rows),
                                imagefolder.digest(args.prior, unit.prior_rows) if args.prior else None)
    mine = units[args.shard[0]::args.shard[1]]
    stage.claim(args, [unit.name for unit in mine])
    todo = [unit for unit in mine if not stage.is_published(args.out / unit.name, unit.key)]
    pixels.check(args.data, [row for unit in todo for row in unit.images.drawn.values()])  # now, not after hours of training
    failures = train_units(todo, units, base, args) if todo else []
    if failures:
        print(*failures, sep="\n", file=sys.stderr)
        return 1
    if args.shard[1] == 1:
        publish(units, base, args, inputs)


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    count, positive = stage.number(int, 1), stage.number(float, 0)
    what = parser.add_argument_group("method and data")
    what.add_argument("--method", choices=("lora", "dreambooth"), required=True, help="low-rank updates or the UNet")
    what.add_argument("--per", choices=("group", "cluster", "dataset"), default="group", help="the unit that has its own weights; "
                      "dataset: one model for all (compositional, ours)")
    what.add_argument("--base", required=True, help="folder or hub id of a Stable Diffusion pipeline")
    what.add_argument("--data", type=Path, required=True, help="prepared dataset folder, or output of cluster.py")
    what.add_argument("--prior", type=Path, help="class images (the vanilla synthetic images) for prior preservation; "
                      "default: no prior preservation")
    what.add_argument("--learn-identifiers", action=stage.Flag, default=False,
                      help="--per dataset: learn a word for each group (or cluster) instead of using --identifier")
    what.add_argument("--out", type=Path, required=True, help="folder to write the units to")
    what.add_argument("--merge-above", type=stage.number(float, -1, 1), default=1.0, help="--learn-identifiers: groups of a "
                      "class whose words have a higher cosine similarity are drawn as one group (SAGE); 1: none")
    how = parser.add_argument_group("training")
    how.add_argument("--identifier", default="sks", help="rare word that stands for the unit (DreamBooth)")
    how.add_argument("--prompt", default="{text} {identifier}", help="prompt of the unit's images")
    how.add_argument("--balance", type=stage.number(float, 0, 1), default=0.0, help="--per dataset: from 0 (images are "
                     "drawn as they come) to 1 (all groups equally often)")
    how.add_argument("--steps", type=count, default=800, help="optimiser steps per unit (diffusers: 400 to 800)")
    how.add_argument("--batch", type=count, default=1, help="images per step; as many class images are added")
    how.add_argument("--accumulation", type=count, default=1, help="batches per step")
    how.add_argument("--learning-rate", type=positive, help="default: 1e-4 for lora, 5e-6 for dreambooth (diffusers)")
    how.add_argument("--initial-word", default="photo", help="what learned identifiers begin as (SAGE: photo)")
    how.add_argument("--identifier-rate", type=positive, default=1e-2, help="learning rate of learned identifiers")
    how.add_argument("--schedule", choices=("constant", "constant_with_warmup", "linear", "cosine"), default="constant",
                     help="of the learning rate")
    how.add_argument("--warmup", type=stage.number(int, 0), default=0, help="warm-up steps of the schedule")
    how.add_argument("--weight-decay", type=positive, default=0.01, help="weight decay of AdamW")
    how.add_argument("--prior-weight", type=positive, default=1.0, help="weight of the prior loss (DreamBooth: 1)")
    how.add_argument("--rank", type=count, default=16, help="rank of LoRA")
    how.add_argument("--alpha", type=count, help="LoRA's updates are scaled by alpha / rank; default: the rank")
    how.add_argument("--snr-gamma", type=positive, default=0.0, help="gamma of min-SNR weighting, usually 5; 0: off")
    how.add_argument("--ema-decay", type=stage.number(float, 0, 1), default=0.0, help="of dreambooth's averaged weights; 0: off")
    how.add_argument("--train-text-encoder", action=stage.Flag, default=False, help="dreambooth only")
    how.add_argument("--gradient-checkpointing", action=stage.Flag, default=False, help="less memory, about a third slower")
    how.add_argument("--checkpoint-every", type=stage.number(int, 0), default=500, help="steps between checkpoints, from which "
                     "a killed unit resumes; 0: it starts again")
    how.add_argument("--save-dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="weights on disk")
    how.add_argument("--seed", type=int, default=0, help="seed of all random draws")
    models.add_device_flags(how)
    how.add_argument("--shard", type=stage.shard_of, default="0/1", help="i/n: train every n-th unit, from the i-th on")
    args = parser.parse_args(argv)
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.method == "lora" else 5e-6
    if args.train_text_encoder and args.method == "lora":
        raise InputError("--train-text-encoder", "LoRA trains the UNet only", "use --method dreambooth")
    if args.balance and args.per != "dataset":
        raise InputError("--balance", f"a {args.per} contains one group only", "use --per dataset")
    if args.learn_identifiers and args.per != "dataset":
        raise InputError("--learn-identifiers", f"a {args.per} has a model of its own", "use --per dataset")
    if args.merge_above < 1 and not args.learn_identifiers:
        raise InputError("--merge-above", "there are no learned words to compare", "use --learn-identifiers")
    if args.learn_identifiers and args.train_text_encoder:
        raise InputError("--learn-identifiers", "trains words, not the text encoder", "leave out --train-text-encoder")
    if "{text}" not in args.prompt:
        raise InputError("--prompt", "does not contain {text}", 'for example "{text} {identifier}"')
    return args


def train_units(todo, units, base_digest, args):
    """Trains and publishes the units `todo`, one after the other. Returns one line for each that failed."""
    device = models.pick_device(args.device)
    base = models.Base(args.base, device, models.use_bf16(args.precision, device))
    failures = []
    stage.start(args, {unit.name: 1 for unit in units})
    for unit in todo:
        begin = time.monotonic()
        base.reset(args.method)
        for part in unit.parts:
            part.encode(base)
        encoding = time.monotonic() - begin
        try:
            curve = finetune(base, unit, args)
        except FloatingPointError as error:
            failures.append(f"finetune.py: error: {error}")
            continue
        finally:
            for part in unit.parts:
                part.mean = part.std = None
        with files.replacing(args.out / unit.name) as out:
            models.save_weights(out, base, args.method, args.save_dtype, args.train_text_encoder)
            files.write_csv(out / "loss.csv", curve)
            cards.of_weights(out / "README.md", unit, args)
            stage.finish_unit(out, args, unit.key, base=base_digest, images=len(unit.rows),
                              encoding_seconds=round(encoding, 3), **stage.spent(begin))
        files.remove(args.out / f".{unit.name}.partial")
        last = [row["loss"] for row in curve[-50:]]
        print(f"{unit.title}: {len(unit.rows)} images, loss {sum(last) / len(last):.4f}", flush=True)
    return failures


def publish(units, base_digest, args, inputs):
    """Removes units that no longer exist, and writes OUT/config.json with what generate.py is to draw.

    A draw is a prompt of a unit for the groups of class y with attribute a (null: with any), and the number of training
    images behind it.
    """
    stage.remove_other_units(args.out, {unit.name for unit in units})
    draws, merged = {}, merged_groups(args.out / units[0].name, args) if args.merge_above < 1 else {}
    for unit in units:
        for row, template in zip(unit.rows, unit.templates):
            suffix = f"-c{row['cluster']}" if args.per != "group" and "cluster" in row else ""
            a = None if args.per == "dataset" and not args.learn_identifiers else row["a"]
            if (row["y"], a) in merged:
                a, suffix = merged[row["y"], a], f"-c{a}"
            draw = draws.setdefault((unit.name, row["y"], template), {
                "unit": unit.name, "key": unit.key, "y": row["y"], "a": a, "suffix": suffix, "prompt": template, "images": 0})
            draw["images"] += 1
    stage.finish(args.out, args, files.digest([unit.key for unit in units]), inputs, base=base_digest,
                 draws=list(draws.values()), merged=[(y, a, into) for (y, a), into in merged.items()])


def merged_groups(folder, args):
    """{(y, a): a of the group that it is drawn with}, for groups of a class whose words, learned by the unit in `folder`, are
    alike: by single linkage of the cosine distances of their embeddings (SAGE, Luo et al. 2026)."""
    from sklearn.cluster import AgglomerativeClustering  # slow to import

    merged, words = {}, models.read_tokens(folder)
    linkage = AgglomerativeClustering(None, metric="cosine", linkage="single", distance_threshold=1 - args.merge_above)
    groups = sorted(imagefolder.labels_of(word.strip("<>")) for word in words if "-c" not in word)
    for y in {y for y, _ in groups}:
        mine = [a for other, a in groups if other == y]
        if len(mine) > 1:
            labels = linkage.fit_predict([words[f"<{imagefolder.group_name(y, a)}>"] for a in mine]).tolist()
            merged |= {(y, a): mine[labels.index(label)] for a, label in zip(mine, labels) if labels.count(label) > 1}
    return merged


if __name__ == "__main__":
    stage.run(main)
