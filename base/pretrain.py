"""Trains a base model from scratch: a small Stable Diffusion and a small CLIP, on your images.

    python base/pretrain.py --data data/printed --out base/miniature
    python base/pretrain.py --data data/faces-natural --size 64 --out base/faces

A base should know the domain, faces or x-rays, and need not know the groups: finetune.py and
generate.py take it by --base, and its CLIP by --clip. base/miniature has seen *printed* digits
only. It relates to our handwritten ones as a model of images from the web relates to Waterbirds.

Reads DATA (split train) with its captions, the columns named by --captions. Writes OUT in the
layout of diffusers (`StableDiffusionPipeline.from_pretrained(OUT)`), the CLIP in OUT/clip
(`CLIPModel.from_pretrained(OUT/clip)`), OUT/loss.csv, and to look at: OUT/loss.png, OUT/real.png
(training images) and OUT/samples.png (images of the model).
"""

import itertools
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository
from base import training
from common import compute, files, imagefolder, made, models, pixels, stage
from common.files import InputError

torch = stage.lazy("torch")
# diffusers and transformers take seconds to import, so the functions that need them import them

TOKENS = 48  # a caption's greatest length in tokens, the first and the last included
BATCH = {"clip": 128, "vae": 32, "unet": 64}  # images a step
RATE = {"clip": 1e-3, "vae": 2e-3, "unet": 2e-3}  # learning rates, after warm-up

# ----------------------------------------------------------------------------------- the networks


def make_clip(tokenizer, args):
    from transformers import CLIPConfig, CLIPModel

    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}
    text_width, image_width = args.clip_widths
    text = {"vocab_size": len(tokenizer), "hidden_size": text_width, "projection_dim": 64,
            "intermediate_size": 4 * text_width, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": TOKENS, **ends}
    vision = {"image_size": args.size, "patch_size": 8, "hidden_size": image_width,
              "intermediate_size": 2 * image_width, "num_hidden_layers": 3,
              "num_attention_heads": 4, "projection_dim": 64}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    words = clip.text_model.embeddings.token_embedding
    words.weight.data.mul_(20)  # far apart, so that words are told apart at once
    return clip


def make_vae(args):
    from diffusers import AutoencoderKL

    levels = len(args.vae_widths)
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * levels,
                         up_block_types=("UpDecoderBlock2D",) * levels,
                         block_out_channels=args.vae_widths, layers_per_block=1,
                         norm_num_groups=8, latent_channels=4, sample_size=args.size)


def make_unet(args):
    from diffusers import UNet2DConditionModel

    attending = len(args.unet_widths) - 1
    return UNet2DConditionModel(
        sample_size=args.size // 2 ** (len(args.vae_widths) - 1),
        block_out_channels=args.unet_widths, layers_per_block=1,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * attending,
        up_block_types=("CrossAttnUpBlock2D",) * attending + ("UpBlock2D",),
        cross_attention_dim=args.clip_widths[0], attention_head_dim=4, norm_num_groups=4)


def make_tokenizer(out, texts):
    """A CLIPTokenizer that knows the texts' words whole and spells any other word in bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    merges = byte_pairs(sorted({word for text in texts for word in text.lower().split()}))
    vocabulary = letters + [letter + "</w>" for letter in letters] + ["".join(p) for p in merges]
    tokens = dict.fromkeys((*vocabulary, "<|startoftext|>", "<|endoftext|>"))
    out.mkdir(parents=True)
    (out / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (out / "merges.txt").write_text("\n".join(lines) + "\n")
    return CLIPTokenizer.from_pretrained(out, model_max_length=TOKENS)


def byte_pairs(words):
    """Merges that make each word one token (Sennrich et al. 2016, algorithm 1).

    Not by the library's BpeTrainer: it breaks ties in another order in every process.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    spelling, merges = ByteLevel(add_prefix_space=False, use_regex=False), []
    spelt = [spelling.pre_tokenize_str(word)[0][0] for word in words]
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in spelt]
    while pairs := Counter(pair for word in pieces for pair in itertools.pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in pieces:
            for i in range(len(word) - 1, 0, -1):
                if (word[i - 1], *word[i:i + 1]) == best:
                    word[i - 1:i + 1] = ["".join(best)]
    return merges


# ----------------------------------------------------------------------------------- the training


@dataclass
class Examples:
    """The training images and what their captions say."""

    pixels: pixels.Pixels
    flip: bool  # whether they are seen in a mirror, too
    texts: list  # distinct captions; the first one is empty
    captions: object  # (N, columns) int: which of the texts each column of an image holds

    def images(self, indices, device):
        """(B, 3, size, size) float in [-1, 1]."""
        images = self.pixels[indices].to(device) / 127.5 - 1
        mirrored = torch.rand(len(images), 1, 1, 1, device=device) < 0.5 * self.flip
        return torch.where(mirrored, images.flip(3), images)


def clip_loss(clip, tokens, examples, column, device):
    """Contrastive (Radford et al. 2021, section 2.3).

    The captions of a batch are all of one column, so that no caption is true of an image that it
    counts against; images with the same caption share it. tokens: of all texts.
    """
    batch = torch.randint(len(examples.captions), (BATCH["clip"],))
    distinct, target = examples.captions[batch, column].unique(return_inverse=True)
    owners = torch.nn.functional.one_hot(target, len(distinct)).T.float()
    owners = (owners / owners.sum(1, keepdim=True)).to(device)  # a caption's images, equally
    shown = {name: values[distinct].to(device) for name, values in tokens.items()}
    out = clip(pixel_values=examples.images(batch, device), **shown)
    per_text = -(owners * out.logits_per_text.log_softmax(1)).sum(1).mean()
    per_image = torch.nn.functional.cross_entropy(out.logits_per_image, target.to(device))
    return (per_image + per_text) / 2


def vae_loss(vae, examples, device):
    """Absolute errors of the pixels and of their differences to the next ones, which keeps edges.

    And a touch of KL (Rombach et al. 2022, section 3.1; they add a discriminator).
    """
    batch = examples.images(torch.randint(len(examples.captions), (BATCH["vae"],)), device)
    latents = vae.encode(batch).latent_dist
    error = vae.decode(latents.sample()).sample - batch
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + edges + 1e-4 * latents.kl().mean() / latents.mean[0].numel()


def unet_loss(unet, scheduler, moments, prompts, captions, device):
    """Predicts the velocity (Salimans & Ho 2022, appendix D); one caption in ten is empty.

    A network this small can't copy the noise exactly, so that from predicted noise the first steps
    of sampling would see nothing of the caption.

    moments: mean and std of the latents, each (N, 4, h, w), of deviation 1 together. prompts:
    (texts, TOKENS, D).
    """
    count = BATCH["unet"]
    batch = torch.randint(len(moments[0]), (count,))
    texts = captions[batch % len(captions), torch.randint(captions.shape[1], (count,))]
    texts[torch.rand(count) < 0.1] = 0
    mean, std = (part[batch].to(device) for part in moments)
    latents = mean + std * torch.randn_like(mean)
    noise = torch.randn_like(latents)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (count,), device=device)
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    predicted = unet(noisy, timesteps, prompts[texts]).sample
    return torch.nn.functional.mse_loss(predicted.float(), velocity)


def train(name, model, loss_of, work, key, accelerator, args):
    """Minimises loss_of(step) over the model's weights: AdamW, linear warm-up, cosine decay.

    The seed and the step determine a step's random draws, so that a killed run resumes exactly.
    Returns the loss curve, as training.Checkpoint keeps it.
    """
    from diffusers.optimization import get_scheduler

    steps = getattr(args, f"{name}_steps")
    model.train().to(accelerator.device, memory_format=torch.channels_last)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=RATE[name], weight_decay=0.01, fused=True)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 10,
                             num_training_steps=steps)
    checkpoint = training.Checkpoint(work / name, key, weights, optimizer, schedule)
    curve = checkpoint.load()
    for step in imagefolder.progress(range(len(curve), steps), name, "step", initial=len(curve),
                                     total=steps):
        torch.manual_seed(stage.seed_of(args.seed, name, step))
        with accelerator.autocast():
            loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        curve.append({"step": step, "loss": round(loss.item(), 6),
                      "learning_rate": schedule.get_last_lr()[0]})
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if len(curve) % 500 == 0 or len(curve) == steps:
            checkpoint.save(curve)
    model.eval().requires_grad_(False)
    last = [row["loss"] for row in curve[-50:]]
    print(f"{name}: {steps} steps, loss {sum(last) / len(last):.4f}", flush=True)
    return curve


@torch.no_grad()
def encode(vae, examples, device):
    """Mean and std of the latents of all images (and of their mirror images), on the CPU."""
    found = []
    for mirror in (False, True)[:1 + examples.flip]:
        batches = torch.arange(len(examples.captions)).split(64)
        for batch in imagefolder.progress(batches, "encode", "batch"):
            images = examples.pixels[batch].to(device) / 127.5 - 1
            posterior = vae.encode(images.flip(3) if mirror else images).latent_dist
            found.append((posterior.mean.cpu(), posterior.std.cpu()))
    return [torch.cat(part) for part in zip(*found)]


# --------------------------------------------------------------------------------------- the stage


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    rows = imagefolder.read_metadata(args.data, "train")
    choose_captions(args, rows[0])
    key = files.digest(made.settings_of(args), imagefolder.digest(args.data, rows),
                       made.code_digest(__file__, training.Checkpoint, imagefolder.load_image))
    if stage.is_made(args, key):
        return
    models.silence_libraries()
    accelerator = compute.accelerator(args.device, args.precision)
    examples = examples_of(rows, args)
    work = made.unfinished(args.out.parent, args.out.name)
    with files.replacing(args.out) as out:
        pipe, clip, curves = pretrain(examples, out, work, key, accelerator, args)
        save(out, pipe, clip, args)
        save_curves(out, curves)
        save_sheets(out, pipe.to(accelerator.device, torch.float32), rows, args)
        stage.finish(out, args, key)
    files.remove(work)


def choose_captions(args, columns):
    """Sets --captions and --clip-first where they were not given; raises InputError."""
    args.captions = args.captions or [name for name in ("text", "class_text") if name in columns]
    args.clip_first = args.clip_first or args.captions[-1]
    for name in args.captions:
        if name not in columns:
            raise InputError(f"--captions {name}", f"is no column of {args.data}/metadata.csv",
                             f"it has {', '.join(columns)}")
    if args.clip_first not in args.captions:
        raise InputError(f"--clip-first {args.clip_first}", "is none of --captions", "name one")


def examples_of(rows, args):
    texts = {"": 0}
    captions = [[texts.setdefault(row[column], len(texts)) for column in args.captions]
                for row in rows]
    shown = pixels.Pixels(args.data, rows, args.size, args.cache)
    return Examples(shown, args.flip, list(texts), torch.tensor(captions))


def pretrain(examples, out, work, key, accelerator, args):
    """Trains CLIP, the VAE, and the UNet on their text embeddings and latents.

    Returns the pipeline, the CLIP, and {network: its loss curve}.
    """
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

    device, curves = accelerator.device, {}
    tokenizer = make_tokenizer(out / "tokenizer", examples.texts)
    longest = max(examples.texts, key=lambda text: len(tokenizer(text).input_ids))
    models.check_length(tokenizer, longest)
    tokens = tokenizer(examples.texts, padding="max_length", return_tensors="pt")
    torch.manual_seed(stage.seed_of(args.seed, "networks"))
    clip, vae, unet = make_clip(tokenizer, args), make_vae(args), make_unet(args)
    first = args.captions.index(args.clip_first)

    def clip_loss_at(step):
        column = int(torch.randint(len(args.captions), ()))
        return clip_loss(clip, tokens, examples, first if step < args.clip_steps // 4 else column,
                         device)

    curves["clip"] = train("clip", clip, clip_loss_at, work, key, accelerator, args)
    curves["vae"] = train("vae", vae, lambda step: vae_loss(vae, examples, device), work, key,
                          accelerator, args)
    mean, std = encode(vae, examples, device)
    scale = 1 / (mean.var() + std.pow(2).mean()).sqrt().item()
    vae.register_to_config(scaling_factor=scale)
    moments = mean * scale, std * scale
    parts = [clip.text_model(part.to(device)).last_hidden_state
             for part in tokens.input_ids.split(64)]
    prompts = torch.cat(parts)
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
        prediction_type="v_prediction", timestep_spacing="trailing")
    training_scheduler = DDPMScheduler.from_config(scheduler.config)
    curves["unet"] = train("unet", unet, lambda step: unet_loss(
        unet, training_scheduler, moments, prompts, examples.captions, device),
        work, key, accelerator, args)
    pipe = StableDiffusionPipeline(vae, clip.text_model, tokenizer, unet, scheduler,
                                   safety_checker=None, feature_extractor=None,
                                   requires_safety_checker=False)
    return pipe, clip, curves


def save(out, pipe, clip, args):
    """In 16 bits: they are enough, and half to download."""
    from transformers import CLIPImageProcessor, CLIPProcessor

    pipe.to("cpu", torch.float16).save_pretrained(out)
    processor = CLIPImageProcessor(size={"shortest_edge": args.size}, crop_size=args.size,
                                   image_mean=[0.5] * 3, image_std=[0.5] * 3)
    CLIPProcessor(processor, pipe.tokenizer).save_pretrained(out / "clip")
    clip.cpu().half().save_pretrained(out / "clip")
    for config in (out / "text_encoder" / "config.json", out / "clip" / "config.json"):
        text = config.read_text().replace('"float16"', '"float32"')
        config.write_text(text)  # what transformers computes in


def save_curves(out, curves):
    """loss.csv and loss.png: means of 1 % of each network's steps."""
    from matplotlib.figure import Figure

    rows, figure = [], Figure(figsize=(9, 2.5), layout="constrained")
    for name, axes in zip(curves, figure.subplots(1, len(curves))):
        losses = torch.tensor([row["loss"] for row in curves[name]])
        parts = losses.split(max(1, len(losses) // 100))
        ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
        means = [round(part.mean().item(), 6) for part in parts]
        rows += [{"network": name, "step": end, "loss": mean} for end, mean in zip(ends, means)]
        axes.loglog(ends, means)
        axes.set(title=name, xlabel="step", ylabel="loss")
    files.write_csv(out / "loss.csv", rows)
    figure.savefig(out / "loss.png", dpi=100, metadata={"Software": None})


def save_sheets(out, pipe, rows, args):
    """real.png: training images. samples.png: images of the model with the same captions."""
    texts = {}
    for column in dict.fromkeys(args.captions):
        shown = sorted({row[column] for row in rows})
        for text in shown[::-(-len(shown) // 8) or 1]:
            texts[text] = [row for row in rows if row[column] == text][:args.samples]
    real = [[imagefolder.load_image(args.data / row["file_name"], args.size) for row in mine]
            for mine in texts.values()]
    pipe.set_progress_bar_config(disable=True)
    drawn = [pipe(text, num_images_per_prompt=args.samples, num_inference_steps=20,
                  guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images
             for text in texts]
    for name, sheet in (("real", real), ("samples", drawn)):
        imagefolder.contact_sheet(sheet, list(texts)).save(out / f"{name}.png")


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    count = stage.number(int, 1)
    add = parser.add_argument_group("data and size").add_argument
    add("--data", type=Path, required=True, help="prepared dataset folder")
    add("--captions", nargs="+", help="columns of captions; one is taken at random, one "
        "that is named twice twice as often; default: text, and class_text if there is one")
    add("--clip-first", help="the column from which CLIP learns in the first quarter of its "
        "steps, so that what is hard to see is not lost behind what is easy; default: the last")
    add("--flip", action=stage.Flag, default=False, help="mirrored images are as good")
    add("--size", type=count, default=32, help="pixels per side of an image")
    add("--vae-widths", type=count, nargs="+", default=[16, 32, 64],
        help="channels of each level; a level more halves the latents")
    add("--unet-widths", type=count, nargs="+", default=[48, 96],
        help="channels of each level; all but the first have attention")
    add("--clip-widths", type=count, nargs=2, default=[64, 96],
        help="widths of the text and of the image encoder")
    add("--out", type=Path, required=True, help="folder to write")
    how = parser.add_argument_group("training")
    add = how.add_argument
    for name, steps in (("clip", 2500), ("vae", 2500), ("unet", 8000)):
        add(f"--{name}-steps", type=count, default=steps,
            help=f"steps of {BATCH[name]} images")
    add("--samples", type=count, default=16, help="images per row of the two sheets")
    add("--seed", type=int, default=0, help="seed of all random draws")
    pixels.add_flag(how)
    compute.add_flags(how)
    args = parser.parse_args(argv)
    smallest = max(8, 2 ** (len(args.vae_widths) + len(args.unet_widths) - 2))
    if args.size % smallest:
        raise InputError(f"--size {args.size}", f"is no multiple of {smallest}",
                         "use fewer levels or another size")
    return args


if __name__ == "__main__":
    stage.run(main)
