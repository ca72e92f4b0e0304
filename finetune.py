"""Stage 2: fine-tunes the diffusion model on the training images of each group, or of each cluster of a group.

    python finetune.py --method lora --base base/miniature --data data/digits-0.95 --out runs/digits-0.95/models/lora
    python finetune.py --method dreambooth --per cluster --prior runs/digits-0.95/synthetic/vanilla \\
        --base base/miniature --data runs/digits-0.95/clusters --out runs/digits-0.95/models/clustered

Two axes give the paper's methods: what is trained (lora: low-rank updates of the UNet's attention, Hu et al. 2022;
dreambooth: the whole UNet, Ruiz et al. 2023) and on which unit (group, cluster). Clustered DreamBooth is dreambooth
per cluster; vanilla needs no fine-tuning. A rare identifier in the prompt stands for the unit.

Our compositional method trains one model `--per dataset`: each image with its own group's prompt, and an identifier
for its cluster (of cluster.py --within class). What a class looks like is learned mostly from the common groups,
the attribute from the prompt, and a rare group is then drawn in every mode of its class.

Reads DATA (split train; column `cluster` for --per cluster) and, for prior preservation, the vanilla stage's images.
Writes OUT/<unit>/ with the weights (pytorch_lora_weights.safetensors for plain `load_lora_weights`, or unet/ for
`UNet2DConditionModel.from_pretrained`), loss.csv and config.json; last OUT/config.json.
"""

import csv
import json
import sys
import time
from pathlib import Path

from cluster import load_pipeline, pick_device, tokens_of
from data import imagefolder as folder

# ---------------------------------------------------------------------------------------------- the method


def denoising_losses(unet, scheduler, noisy, noise, latents, timesteps, prompt_embeds, snr_gamma):
    """Squared error of the predicted noise (or velocity), a mean an image: (B,) float32.

    noisy, noise, latents: (B, 4, h, w); timesteps: (B,) int; prompt_embeds: (B, tokens, D).
    snr_gamma > 0 weighs timesteps by min-SNR (Hang et al. 2023, section 3.4); 0: all alike.
    """
    from diffusers.training_utils import compute_snr

    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    losses = (unet(noisy, timesteps, prompt_embeds).sample.float() - target).pow(2).mean(dim=(1, 2, 3))
    if snr_gamma:
        snr = compute_snr(scheduler, timesteps)
        losses = losses * snr.clamp(max=snr_gamma) / (snr + 1 if velocity else snr)
    return losses


def training_step(models, unit, step, args):
    """The loss of one step on one unit; every draw hangs on (seed, unit, step) alone.

    With prior preservation, half of the batch are the base model's own images with the plain prompt, so that the
    model keeps what it knows of the group (Ruiz et al. 2023, equation 2).
    """
    import torch

    rng = torch.Generator().manual_seed(folder.seed_of(args.seed, unit.name, step))
    parts = [(unit.images, 1.0)] + ([(unit.prior, args.prior_weight)] if unit.prior else [])
    picks = [part.pick(step, args.batch) for part, _ in parts]
    latents = torch.cat([part.latents(pick, rng) for (part, _), pick in zip(parts, picks)]).to(models.device)
    prompts = [part.prompt(i, rng, args.part_dropout) for (part, _), pick in zip(parts, picks) for i in pick]
    noise = torch.randn(latents.shape, generator=rng).to(latents)
    timesteps = torch.randint(models.scheduler.config.num_train_timesteps, (len(latents),), generator=rng)
    timesteps = timesteps.to(models.device)
    with torch.autocast(models.device.type, torch.bfloat16, enabled=models.bf16):
        losses = denoising_losses(models.unet, models.scheduler,
                                  models.scheduler.add_noise(latents, noise, timesteps), noise, latents, timesteps,
                                  models.prompt_embeds(prompts), args.snr_gamma)
    return sum(weight * part.mean() for (_, weight), part in zip(parts, losses.split(args.batch)))


def trainable_weights(models, args):
    """Makes the weights that the method trains require gradients, in fp32, and returns them."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    models.unet.requires_grad_(False)
    if args.method == "lora":
        models.unet.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.alpha or args.rank,
                                           init_lora_weights="gaussian",
                                           target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        cast_training_params(models.unet)
    else:
        models.unet.requires_grad_(True)
        if args.train_text_encoder:
            models.text_encoder.requires_grad_(True)
    return [weight for module in (models.unet, models.text_encoder) for weight in module.parameters()
            if weight.requires_grad]


def finetune(models, unit, args):
    """Trains the models' weights on one unit. Returns the loss curve: [{step, loss, learning_rate}].

    Raises FloatingPointError at the first loss that is no finite number.
    """
    import torch
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from tqdm import trange

    torch.manual_seed(folder.seed_of(args.seed, unit.name))  # LoRA's initial weights
    weights = trainable_weights(models, args)
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    schedule = get_scheduler(args.schedule, optimizer, num_warmup_steps=args.warmup,
                             num_training_steps=args.steps)
    ema = EMAModel(weights, decay=args.ema_decay) if args.ema_decay and args.method == "dreambooth" else None
    checkpoint = Checkpoint(args.out / f".{unit.name}.partial", unit.key, weights, optimizer, schedule, ema)
    curve = checkpoint.load()
    for step in trange(len(curve), args.steps, initial=len(curve), total=args.steps, desc=unit.name, mininterval=1,
                       disable=None):
        total = 0.0
        for part in range(args.accumulation):
            loss = training_step(models, unit, step * args.accumulation + part, args) / args.accumulation
            loss.backward()
            total += loss.item()
        if not torch.isfinite(torch.tensor(total)):
            raise FloatingPointError(f"{unit.name}: loss is {total} at step {step} "
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


class Checkpoint:
    """A hidden folder from which a killed unit goes on exactly.

    As every draw hangs on the step, the weights, AdamW's moments and the loss curve are all there is to keep.
    """

    def __init__(self, path, key, weights, optimizer, schedule, ema):
        self.path, self.key, self.weights, self.optimizer = path, key, weights, optimizer
        self.schedule, self.ema = schedule, ema

    def tensors(self):
        """{name: tensor}, live: the weights, their moments, their running means."""
        parts = {f"weight.{i}": weight.data for i, weight in enumerate(self.weights)}
        for i, weight in enumerate(self.weights):
            parts |= {f"{name}.{i}": value for name, value in self.optimizer.state[weight].items()}
        return parts | {f"ema.{i}": value for i, value in enumerate(self.ema.shadow_params if self.ema else [])}

    def save(self, curve):
        from safetensors.torch import save_file

        with folder.replacing(self.path) as out:
            out.mkdir(parents=True)
            save_file({name: value.contiguous().cpu() for name, value in self.tensors().items()},
                      out / "state.safetensors")
            folder.write_csv(out / "loss.csv", curve)
            folder.write_json(out / "config.json", {"key": self.key})

    def load(self):
        """Puts everything back where it was; returns the loss curve so far, empty where there is no checkpoint."""
        import torch
        from safetensors.torch import load_file

        if not folder.published(self.path, self.key):
            folder.remove(self.path)
            return []
        saved = load_file(self.path / "state.safetensors")
        for i, weight in enumerate(self.weights):
            self.optimizer.state[weight] = {name: torch.zeros_like(saved[f"{name}.{i}"], device=weight.device)
                                            for name in ("step", "exp_avg", "exp_avg_sq")}
        for name, value in self.tensors().items():
            value.copy_(saved[name])
        with open(self.path / "loss.csv", encoding="utf-8", newline="") as file:
            curve = [{name: float(value) for name, value in row.items()} | {"step": int(row["step"])}
                     for row in csv.DictReader(file)]
        for _ in curve:
            self.schedule.step()
        if self.ema:
            self.ema.optimization_step = len(curve)
        return curve


# ------------------------------------------------------------------------------------- a unit and its images


class Images:
    """Images as the diffusion model sees them: moments of their latents, encoded once, and a prompt each."""

    def __init__(self, models, data, rows, prompts, seed, balance=0.0):
        """prompts: of each row (the whole, without its attribute, without its class)."""
        import torch

        sizes = folder.group_counts(rows)
        self.weights = torch.tensor([sizes[folder.group_of(row)] ** -balance for row in rows])
        self.prompts, self.seed, self.balanced = prompts, seed, balance > 0 and len(sizes) > 1
        moments = [models.moments([folder.load_image(data / row["file_name"], models.size) for row in rows[i:i + 16]])
                   for i in range(0, len(rows), 16)]
        self.mean, self.deviation = (torch.cat(part) for part in zip(*moments))

    def __bool__(self):
        return len(self.prompts) > 0

    def pick(self, step, batch):
        """Indices of the images of a step: each epoch goes through all of them in an order of its own.

        With a balance, groups are drawn with weights (1 / size) ** balance an image: 1 is groups equally often.
        """
        import torch

        if self.balanced:
            rng = torch.Generator().manual_seed(folder.seed_of(self.seed, "step", step))
            return torch.multinomial(self.weights, batch, replacement=True, generator=rng).tolist()
        count, indices = len(self.prompts), []
        for position in range(step * batch, (step + 1) * batch):
            epoch, index = divmod(position, count)
            if index == 0 or not indices:
                order = torch.randperm(count, generator=torch.Generator().manual_seed(folder.seed_of(self.seed, epoch)))
            indices.append(order[index].item())
        return indices

    def prompt(self, index, rng, dropout):
        """The prompt of an image; with probability `dropout` each, it loses its attribute, or its class, or both."""
        import torch

        if not dropout:
            return self.prompts[index][0]
        no_attribute, no_class = (torch.rand(2, generator=rng) < dropout).tolist()
        return "" if no_attribute and no_class else self.prompts[index][1 if no_attribute else 2 if no_class else 0]

    def latents(self, indices, rng):
        """Latents drawn anew from the VAE's posterior, (len(indices), 4, h, w)."""
        import torch

        noise = torch.randn(self.mean[indices].shape, generator=rng)
        return self.mean[indices] + self.deviation[indices] * noise


class Unit:
    """What has weights of its own: a group, a cluster of a group, or the whole dataset."""

    def __init__(self, name, rows, templates, parts, prior_rows):
        self.name, self.rows, self.templates, self.prior_rows = name, rows, templates, prior_rows
        self.prompts = []  # of each row: whole, without its attribute, without its class
        for template, row in zip(templates, rows):
            of_class, of_attribute = parts[folder.group_of(row)]
            self.prompts.append((template.replace("{text}", row["text"]), template.replace("{text}", of_class),
                                 of_attribute))

    def load(self, models, args):
        self.images = Images(models, args.data, self.rows, self.prompts, (args.seed, self.name), args.balance)
        self.prior = self.prior_rows and Images(models, args.prior, self.prior_rows,
                                                [(row["text"],) * 3 for row in self.prior_rows],
                                                (args.seed, self.name, "prior"))


def units_of(rows, parts, prior_rows, args):
    """The units of the training rows, sorted by name. parts: folder.prompt_parts of all groups."""
    names = {}
    for row in rows:
        group = folder.group_of(row)
        name = {"group": group, "cluster": f"{group}-c{row.get('cluster')}", "dataset": "all"}[args.per]
        names.setdefault(name, []).append(row)
    return [Unit(name, members, [prompt_template(row, args) for row in members], parts,
                 [row for row in prior_rows if folder.group_of(row) in folder.group_counts(members)])
            for name, members in sorted(names.items())]


def prompt_template(row, args):
    """The prompt of a row with its identifier, and {text} for its caption. One model tells clusters by their number."""
    number = row.get("cluster", "") if args.per == "dataset" else ""
    return args.prompt.replace("{identifier}", f"{args.identifier}{number}")


class Models:
    """The base: VAE, text encoder, UNet and noise schedule."""

    def __init__(self, name, device, bf16):
        import torch
        from diffusers import DDPMScheduler

        pipe = load_pipeline(name, torch.float32)
        self.device, self.bf16, self.tokenizer = device, bf16, pipe.tokenizer
        self.text_encoder = pipe.text_encoder.to(device).requires_grad_(False)
        self.vae = pipe.vae.to(device).requires_grad_(False)
        self.unet = pipe.unet.to(device)
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.size = self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)
        self._base = {part: {key: value.cpu().clone() for key, value in part.state_dict().items()}
                      for part in (self.unet, self.text_encoder)}
        self._embeds = {}

    def reset(self):
        """Back to the base's weights."""
        if getattr(self.unet, "peft_config", None):
            self.unet.unload_lora()
        for part, weights in self._base.items():
            part.load_state_dict(weights)
            part.requires_grad_(False)
        self._embeds.clear()

    def moments(self, images):
        """PIL images -> mean and deviation of their latents, each (B, 4, h, w) on the CPU, scaled for the UNet."""
        import torch
        from torchvision.transforms.functional import pil_to_tensor

        pixels = torch.stack([pil_to_tensor(image) for image in images]).to(self.device) / 127.5 - 1
        with torch.no_grad():
            posterior = self.vae.encode(pixels).latent_dist
        scale = self.vae.config.scaling_factor
        return (posterior.mean * scale).cpu(), (posterior.std * scale).cpu()

    def prompt_embeds(self, prompts):
        """(len(prompts), tokens, D); computed once a prompt, unless the text encoder is being trained."""
        import torch

        training = any(weight.requires_grad for weight in self.text_encoder.parameters())
        embeds = {} if training else self._embeds
        for prompt in dict.fromkeys(prompts):
            if prompt not in embeds:
                tokens = tokens_of(self.tokenizer, [prompt]).to(self.device)
                with torch.set_grad_enabled(training):
                    embeds[prompt] = self.text_encoder(tokens).last_hidden_state[0]
        return torch.stack([embeds[prompt] for prompt in prompts])


# ------------------------------------------------------------------------------------------------ the stage


def main():
    args = parse()
    rows = folder.read_metadata(args.data, "train")
    parts = folder.prompt_parts(folder.group_prompts(folder.read_metadata(args.data)))
    if args.per == "cluster" and "cluster" not in rows[0]:
        raise folder.InputError(args.data / "metadata.csv", "has no column cluster", "point --data to cluster.py's OUT")
    for row in rows:  # it becomes a part of a folder's name
        if not (number := row.get("cluster", "0")).isascii() or not number.isdigit():
            raise folder.InputError(args.data / "metadata.csv", f"cluster is {number!r}", "it is an integer from 0")
    prior_rows = folder.read_metadata(args.prior, "train") if args.prior else []
    units = units_of(rows, parts, prior_rows, args)
    for unit in units:
        if args.prior and not unit.prior_rows:
            raise folder.InputError(args.prior, f"has no class images for {unit.name}", "generate them for this --data")
    base = folder.model_digest(args.base)
    settings = {name: value for name, value in vars(args).items()
                if name not in ("base", "data", "prior", "out", "shard", "device", "checkpoint_every")}
    for unit in units:
        unit.key = folder.digest(settings, base, folder.code_digest(__file__), unit.prompts,
                                 folder.folder_digest(args.data, unit.rows),
                                 folder.folder_digest(args.prior, unit.prior_rows))
    (args.out / "config.json").unlink(missing_ok=True)
    shard, shards = args.shard
    todo = [unit for unit in units[shard::shards] if not is_trained(args.out / unit.name, unit.key)]
    folder.check_images(args.data, [row for unit in todo for row in unit.rows])  # not after hours of training
    failures = train_units(todo, args) if todo else []
    if failures:
        sys.exit("\n".join(failures))
    if shards == 1:
        publish_method(units, args)


def parse():
    parser = folder.Arguments(__doc__)
    count, rate = folder.number(int, 1), folder.number(float, 0)
    what = parser.add_argument_group("what is trained, on what")
    what.add_argument("--method", choices=("lora", "dreambooth"), required=True, help="low-rank updates or the UNet")
    what.add_argument("--per", choices=("group", "cluster", "dataset"), default="group",
                      help="the unit that has its own weights; dataset: one model for all (compositional, ours)")
    what.add_argument("--base", required=True, help="folder or hub id of a Stable Diffusion pipeline")
    what.add_argument("--data", type=Path, required=True, help="folder in the one format; split train is used")
    what.add_argument("--prior", type=Path, help="folder of class images (the vanilla synthetic images) for prior "
                      "preservation; none: without")
    what.add_argument("--out", type=Path, required=True, help="folder to write the units to")
    how = parser.add_argument_group("how")
    how.add_argument("--identifier", default="sks", help="rare word that stands for the unit (DreamBooth)")
    how.add_argument("--prompt", default="{text} {identifier}", help="prompt of the unit's images")
    how.add_argument("--balance", type=folder.number(float, 0, 1), default=0.0, help="--per dataset: groups are drawn "
                     "as they come (0) to equally often (1)")
    how.add_argument("--part-dropout", type=folder.number(float, 0, 1), default=0.0, help="--per dataset: how often a "
                     "prompt loses its class, and how often its attribute, for generate.py --attribute-guidance")
    how.add_argument("--steps", type=count, default=800, help="optimiser steps a unit (diffusers: 400 to 800)")
    how.add_argument("--batch", type=count, default=1, help="images a step; as many class images beside them")
    how.add_argument("--accumulation", type=count, default=1, help="batches a step")
    how.add_argument("--learning-rate", type=rate, help="default 1e-4 for lora, 5e-6 for dreambooth (diffusers)")
    how.add_argument("--schedule", default="constant", help="of the learning rate",
                     choices=("constant", "constant_with_warmup", "linear", "cosine"))
    how.add_argument("--warmup", type=folder.number(int, 0), default=0, help="steps of the schedule's warm-up")
    how.add_argument("--weight-decay", type=rate, default=0.01, help="of AdamW")
    how.add_argument("--prior-weight", type=rate, default=1.0, help="of the class images' loss (DreamBooth: 1)")
    how.add_argument("--rank", type=count, default=16, help="of LoRA")
    how.add_argument("--alpha", type=count, help="of LoRA: updates are scaled by alpha / rank; default: the rank")
    how.add_argument("--snr-gamma", type=rate, default=0.0, help="min-SNR weighting, 5 is usual; 0: none")
    how.add_argument("--ema-decay", type=folder.number(float, 0, 1), default=0.0,
                     help="of dreambooth's weights; 0: none")
    how.add_argument("--train-text-encoder", action=folder.Flag, default=False, help="dreambooth only")
    how.add_argument("--gradient-checkpointing", action=folder.Flag, default=False, help="less memory, a third slower")
    how.add_argument("--checkpoint-every", type=folder.number(int, 0), default=500,
                     help="steps after which a killed unit can go on; 0: it begins anew")
    how.add_argument("--seed", type=int, default=0, help="of everything")
    how.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
    how.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                     help="auto: bf16 on a GPU that has it, else fp32; trained weights are always fp32")
    how.add_argument("--save-dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the weights on disk")
    how.add_argument("--shard", type=folder.shard_of, default="0/1", help="i/n: train every n-th unit, from the i-th")
    args = parser.parse_args()
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.method == "lora" else 5e-6
    if args.train_text_encoder and args.method == "lora":
        raise folder.InputError("--train-text-encoder", "LoRA trains the UNet alone", "use --method dreambooth")
    for flag in ("balance", "part_dropout"):
        if getattr(args, flag) and args.per != "dataset":
            raise folder.InputError(f"--{flag.replace('_', '-')}", f"a {args.per} holds one group", "use --per dataset")
    if "{text}" not in args.prompt:
        raise folder.InputError("--prompt", "does not hold {text}", 'for example "{text} {identifier}"')
    return args


def is_trained(path, key):
    """Whether the unit is published for this key, with its weights: generate.py --drop-weights removes them."""
    return folder.published(path, key) and ((path / "unet").is_dir()
                                            or (path / "pytorch_lora_weights.safetensors").is_file())


def train_units(units, args):
    """Trains and publishes units one after the other. Returns a line a unit that failed."""
    import torch

    device = pick_device(args.device)
    bf16 = args.precision == "bf16" or (args.precision == "auto" and device.type == "cuda"
                                        and torch.cuda.is_bf16_supported())
    models = Models(args.base, device, bf16)
    if args.gradient_checkpointing:
        models.unet.enable_gradient_checkpointing()
        models.unet.train()
    print_memory(models, trainable_weights(models, args), args)
    failures = []
    for unit in units:
        start = time.monotonic()
        models.reset()
        unit.load(models, args)
        try:
            curve = finetune(models, unit, args)
        except FloatingPointError as error:
            failures.append(f"finetune.py: error: {error}")
            continue
        folder.remove(args.out / unit.name)
        with folder.replacing(args.out / unit.name) as out:
            save_weights(out, models, args)
            folder.write_csv(out / "loss.csv", curve)
            folder.write_config(out, args, unit.key, unit=unit.name, images=len(unit.rows),
                                **folder.spent(start))
        folder.remove(args.out / f".{unit.name}.partial")
        last = [row["loss"] for row in curve[-50:]]
        print(f"{unit.name}: {len(unit.rows)} images, loss {sum(last) / len(last):.4f}", flush=True)
    return failures


def print_memory(models, weights, args):
    """What training takes at least: the models, and of each trained weight its gradient and AdamW's two moments."""
    parts = (models.unet, models.text_encoder, models.vae)
    held = sum(weight.numel() for part in parts for weight in part.parameters())
    trained = sum(weight.numel() for weight in weights)
    total = 4 * held + (16 if args.ema_decay else 12) * trained
    print(f"memory: {total / 1e9:.2f} GB for {held / 1e6:.1f} M weights of which {trained / 1e6:.2f} M learn, and "
          "activations on top (less with --method lora, a smaller --batch, --gradient-checkpointing)", flush=True)


def save_weights(out, models, args):
    import torch
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.save_dtype]
    if args.method == "lora":  # the metadata hold alpha: without it a plain load scales the update by 1
        config = {f"unet.{name}": sorted(value) if isinstance(value, set) else value
                  for name, value in models.unet.peft_config["default"].to_dict().items()}
        metadata = {"lora_adapter_metadata": json.dumps(config, sort_keys=True)}  # one key: of several the order varies
        StableDiffusionPipeline.save_lora_weights(
            out, {key: value.to(dtype) for key, value in get_peft_model_state_dict(models.unet).items()},
            weight_name="pytorch_lora_weights.safetensors",
            save_function=lambda weights, path: save_file(weights, path, metadata=metadata))
        return
    models.unet.to(dtype).save_pretrained(out / "unet")
    models.unet.float()
    if args.train_text_encoder:
        models.text_encoder.to(dtype).save_pretrained(out / "text_encoder")
        models.text_encoder.float()


def publish_method(units, args):
    """Removes units that are no more, and writes OUT/config.json with what generate.py is to draw.

    A draw is a prompt of a unit for the groups of class y with attribute a (null: with any), and how many training
    images stand behind it.
    """
    folder.remove_others(args.out, {unit.name for unit in units})
    draws = {}
    for unit in units:
        for row, template in zip(unit.rows, unit.templates):
            suffix = f"-c{row['cluster']}" if args.per != "group" and "cluster" in row else ""
            a = None if args.per == "dataset" else row["a"]
            draw = draws.setdefault((unit.name, row["y"], template), {
                "unit": unit.name, "key": unit.key, "y": row["y"], "a": a, "suffix": suffix, "prompt": template,
                "images": 0})
            draw["images"] += 1
    folder.write_config(args.out, args, folder.digest([unit.key for unit in units]), draws=list(draws.values()))


if __name__ == "__main__":
    folder.run(main)
