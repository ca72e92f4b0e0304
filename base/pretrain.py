"""Trains the miniature base model: a Stable Diffusion pipeline and a CLIP, both small, from scratch.

    python base/pretrain.py --out base/miniature
    python base/pretrain.py --vae-steps 2 --clip-steps 2 --unet-steps 2 --out /tmp/base     (seconds; a smoke test)

They learn *printed* digits, in the fonts that matplotlib ships, on backgrounds of eight colours,
with captions at several levels (which digit, odd or even, which colour), and never see handwriting:
they relate to our handwritten digits as a model of images from the web relates to Waterbirds.

Writes OUT in the layout of diffusers (`StableDiffusionPipeline.from_pretrained(OUT)`), with the
CLIP in OUT/clip (`CLIPModel.from_pretrained(OUT/clip)`), and two sheets to look at: OUT/printed.png
(training images) and OUT/samples.png (images of the model).
"""

import json
import sys
from collections import Counter
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository
from common import files, imagefolder, made, models, stage

np = stage.lazy("numpy")
torch = stage.lazy("torch")
# diffusers and transformers take seconds to import, so the functions that need them import them

SIZE = 32
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {"red": (200, 50, 45), "green": (50, 160, 65), "blue": (50, 80, 200), "yellow": (205, 185, 45),
           "purple": (140, 55, 170), "cyan": (40, 170, 180), "orange": (225, 125, 35), "grey": (120, 120, 120)}
CAPTIONS = (  # from the most to the least that a caption tells
    "a photo of the digit {digit} on a {colour} background",
    "a photo of an {parity} digit on a {colour} background",
    "a photo of the digit {digit}",
    "a photo of an {parity} digit",
    "a photo of a digit on a {colour} background",
)
SHARES = (0.35, 0.35, 0.1, 0.1, 0.1)  # of the captions that the UNet learns from
TOKENS = 48  # a caption's greatest length in tokens, the first and the last included


# --------------------------------------------------------------------------------------- the printed digits


def digit_fonts():
    """Paths of matplotlib's fonts that draw the ten digits upright on the line (others draw blanks or symbols)."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    fonts = sorted(Path(matplotlib.get_data_path(), "fonts/ttf").glob("*.ttf"))
    symbols = ("LastResort", "STIXSiz", "STIXNonUni", "cmex", "cmsy", "cmmi", "Display")
    return [font for font in fonts if not font.name.startswith(symbols) and "Display" not in font.name
            and all(ord(digit) in FT2Font(str(font)).get_charmap() for digit in "0123456789")]


def printed_digits(count, seed):
    """Returns images (count, 3, 32, 32) float in [-1, 1] and their (digit, colour), each an index (count, 2)."""
    fonts = [ImageFont.truetype(str(path), 48) for path in digit_fonts()]
    rng = np.random.default_rng(seed)
    palette = np.array(list(COLOURS.values()))
    labels = np.stack([np.arange(count) % len(DIGITS), rng.integers(len(COLOURS), size=count)], axis=1)
    images = np.empty((count, SIZE, SIZE, 3), np.float32)
    for image, (digit, colour) in zip(images, labels):
        glyph = Image.new("L", (96, 96))
        ImageDraw.Draw(glyph).text((48, 48), str(digit), 255, fonts[rng.integers(len(fonts))], anchor="mm")
        angle, shear = np.deg2rad(rng.uniform(-7, 7)), rng.uniform(-0.1, 0.1)
        wide, high = rng.uniform(1.3, 1.8), rng.uniform(1.35, 1.6)  # pixels of the glyph a pixel of the image
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = turn @ np.array([[wide, shear * wide], [0, high]])
        offset = 48 - matrix @ (SIZE / 2 + rng.uniform(-1.5, 1.5, size=2))
        coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
        ink = np.asarray(glyph.transform((SIZE, SIZE), Image.AFFINE, coefficients, Image.BICUBIC), float) / 255
        background = palette[colour] + rng.integers(-25, 26, size=3)
        image[:] = (1 - ink[..., None]) * background + ink[..., None] * 245
    images = torch.from_numpy(images.clip(0, 255)).permute(0, 3, 1, 2) / 127.5 - 1
    return images.contiguous(), torch.from_numpy(labels)


def caption(level, digit, colour):
    return CAPTIONS[level].format(digit=DIGITS[digit], colour=list(COLOURS)[colour], parity=("even", "odd")[digit % 2])


# ----------------------------------------------------------------------------------------------- the models


def make_tokenizer(out):
    """A CLIPTokenizer that knows the captions' words whole and spells any other word byte by byte."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    words = sorted({word for text in CAPTIONS for word in text.split() if "{" not in word}
                   | {*DIGITS, *COLOURS, "even", "odd"})
    letters = sorted(ByteLevel.alphabet())
    merges = byte_pairs(words)
    vocabulary = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    out.mkdir(parents=True)
    tokens = dict.fromkeys((*vocabulary, "<|startoftext|>", "<|endoftext|>"))
    (out / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (out / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(pair) + "\n" for pair in merges))
    return CLIPTokenizer.from_pretrained(out, model_max_length=TOKENS)


def byte_pairs(words):
    """Merges that make each word one token (Sennrich et al. 2016, algorithm 1).

    Not by the library's BpeTrainer: it breaks ties in another order in every process, and with them our seed.
    """
    pieces, merges = [[*word[:-1], word[-1] + "</w>"] for word in words], []
    while pairs := Counter(pair for word in pieces for pair in zip(word, word[1:])):
        merges.append(best := min(pairs, key=lambda pair: (-pairs[pair], pair)))
        for word in pieces:
            for i in range(len(word) - 1, 0, -1):
                if (word[i - 1], *word[i:i + 1]) == best:
                    word[i - 1:i + 1] = ["".join(best)]
    return merges


def make_clip(tokenizer):
    from transformers import CLIPConfig, CLIPModel

    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}
    text = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": TOKENS, "projection_dim": 64, **ends}
    vision = {"image_size": SIZE, "patch_size": 8, "hidden_size": 96, "intermediate_size": 192,
              "num_hidden_layers": 3, "num_attention_heads": 4, "projection_dim": 64}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def make_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
                         block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8,
                         latent_channels=4, sample_size=SIZE)


def make_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=SIZE // 4, block_out_channels=(48, 96), layers_per_block=1,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                                cross_attention_dim=64, attention_head_dim=4, norm_num_groups=4)


# ---------------------------------------------------------------------------------------------- the training


def optimise(name, model, loss_of, steps, rate):
    """Minimises loss_of(step) over the model's weights: AdamW, linear warm-up, cosine decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    model.train()
    bar = imagefolder.progress(range(steps), name, "step")
    for step in bar:
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 50 == 49 or step == steps - 1:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    print(f"{name}: {steps} steps, loss {loss.item():.3f}", flush=True)
    model.eval().requires_grad_(False)


def train_clip(clip, tokenizer, images, labels, steps, rate):
    """Contrastive training (Radford et al. 2021, section 2.3).

    The captions of a batch are all of one level, so that no caption is true of an image that it counts against;
    images with the same caption share it. The first quarter of the steps only names digits: with all levels from
    the start the towers settle on the colour and stay there (zero-shot accuracy on printed digits 0.51, not 0.96).
    """
    clip.text_model.embeddings.token_embedding.weight.data.mul_(20)  # far apart, so that words are told apart at once

    def loss_of(step):
        level = 2 if step < steps // 4 else max(0, int(torch.randint(-2, len(CAPTIONS), ())))
        batch = torch.randint(len(images), (128,))
        captions = [caption(level, *labels[i].tolist()) for i in batch]
        distinct = sorted(set(captions))
        tokens = tokenizer(distinct, padding="max_length", return_tensors="pt")
        out = clip(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=images[batch])
        target = torch.tensor([distinct.index(text) for text in captions])
        owners = torch.nn.functional.one_hot(target, len(distinct)).T.float()
        owners = owners / owners.sum(1, keepdim=True)  # (captions, images): each caption's own images, equally
        per_text = -(owners * out.logits_per_text.log_softmax(1)).sum(1).mean()
        return torch.nn.functional.cross_entropy(out.logits_per_image, target) / 2 + per_text / 2

    optimise("clip", clip, loss_of, steps, rate)


def train_vae(vae, images, steps, rate):
    """Absolute error of the reconstruction and a touch of KL (Rombach et al. 2022, section 3.1, no discriminator)."""
    def loss_of(step):
        batch = images[torch.randint(len(images), (32,))]
        latents = vae.encode(batch).latent_dist
        error = (vae.decode(latents.sample()).sample - batch).abs().mean()
        return error + 1e-4 * latents.kl().mean() / latents.mean[0].numel()

    optimise("vae", vae, loss_of, steps, rate)


def train_unet(unet, scheduler, latents, prompts, labels, steps, rate):
    """Predicts the velocity (Salimans & Ho 2022, appendix D); one caption in ten is empty, for guidance.

    A network this small can't copy the noise exactly, so that from predicted noise the first steps of sampling see
    nothing of the caption: after 500 steps the error of the image at timestep 900 was 11.4, with velocity it is 0.23.

    latents: (N, 4, 8, 8), scaled to deviation 1. prompts: {(level, digit, colour) or None: (TOKENS, 64)}.
    """
    def loss_of(step):
        batch = torch.randint(len(latents), (64,))
        levels = torch.multinomial(torch.tensor(SHARES), 64, replacement=True)
        levels[torch.rand(64) < 0.1] = -1
        embeds = torch.stack([prompts[(level, *label)] if level >= 0 else prompts[None]
                              for level, label in zip(levels.tolist(), labels[batch].tolist())])
        noise = torch.randn(64, *latents.shape[1:])
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (64,))
        noisy = scheduler.add_noise(latents[batch], noise, timesteps)
        velocity = scheduler.get_velocity(latents[batch], noise, timesteps)
        return torch.nn.functional.mse_loss(unet(noisy, timesteps, embeds).sample, velocity)

    optimise("unet", unet, loss_of, steps, rate)


def to_pil(images):
    """(N, 3, H, W) float in [-1, 1] -> PIL images."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in pixels]


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    key = files.digest(made.settings_of(args), made.code_digest(__file__))
    if stage.is_made(args, key):
        return

    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
    from transformers import CLIPImageProcessor, CLIPProcessor

    models.silence_libraries()
    torch.manual_seed(args.seed)
    images, labels = printed_digits(args.images, args.seed)
    with files.replacing(args.out) as out:
        tokenizer = make_tokenizer(out / "tokenizer")
        clip = make_clip(tokenizer)
        train_clip(clip, tokenizer, images, labels, args.clip_steps, 1e-3)

        vae = make_vae().to(memory_format=torch.channels_last)
        train_vae(vae, images, args.vae_steps, 2e-3)
        moments = [vae.encode(batch).latent_dist for batch in imagefolder.progress(images.split(64), "encode", "batch")]
        latents = torch.cat([moment.sample() for moment in moments])
        vae.register_to_config(scaling_factor=1 / latents.std().item())

        texts = {None: ""} | {(level, digit, colour): caption(level, digit, colour) for level in range(len(CAPTIONS))
                              for digit in range(len(DIGITS)) for colour in range(len(COLOURS))}
        tokens = tokenizer(list(texts.values()), padding="max_length", return_tensors="pt")
        prompts = dict(zip(texts, clip.text_model(tokens.input_ids).last_hidden_state))
        scheduler = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                                prediction_type="v_prediction", timestep_spacing="trailing",
                                                steps_offset=1)
        unet = make_unet().to(memory_format=torch.channels_last)
        train_unet(unet, DDPMScheduler.from_config(scheduler.config), latents * vae.config.scaling_factor, prompts,
                   labels, args.unet_steps, 2e-3)

        pipe = StableDiffusionPipeline(vae, clip.text_model, tokenizer, unet, scheduler, safety_checker=None,
                                       feature_extractor=None, requires_safety_checker=False)
        pipe.to(torch.float16).save_pretrained(out)  # 16 bits are enough, and half to download
        processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE, image_mean=[0.5] * 3,
                                       image_std=[0.5] * 3)
        CLIPProcessor(processor, tokenizer).save_pretrained(out / "clip")
        clip.half().save_pretrained(out / "clip")
        for config in (out / "text_encoder" / "config.json", out / "clip" / "config.json"):
            config.write_text(config.read_text().replace('"float16"', '"float32"'))  # what transformers computes in
        save_sheets(out, pipe.to(torch.float32), images, labels, args.samples)
        stage.finish(out, args, key)


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    count = stage.number(int, 1)
    parser.add_argument("--images", type=count, default=12000, help="printed digits to draw")
    parser.add_argument("--vae-steps", type=count, default=400, help="steps of 32 images")
    parser.add_argument("--clip-steps", type=count, default=800, help="steps of 128 images")
    parser.add_argument("--unet-steps", type=count, default=1200, help="steps of 64 images")
    parser.add_argument("--samples", type=count, default=16, help="images per row of the two sheets")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random draws")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser.parse_args(argv)


def save_sheets(out, pipe, images, labels, width):
    """printed.png: training images. samples.png: a row of images per caption, digits and then parities."""
    rows = [to_pil(images[labels[:, 0] == digit][:width]) for digit in range(len(DIGITS))]
    imagefolder.contact_sheet(rows, DIGITS).save(out / "printed.png")
    prompts = [caption(0, digit, digit % len(COLOURS)) for digit in range(len(DIGITS))]
    prompts += [caption(1, parity, colour) for parity in (0, 1) for colour in (0, 1)]
    pipe.set_progress_bar_config(disable=True)
    rows = [pipe(prompt, num_images_per_prompt=width, num_inference_steps=20, guidance_scale=3.0,
                 generator=torch.Generator().manual_seed(0)).images for prompt in prompts]
    imagefolder.contact_sheet(rows, [prompt.removeprefix("a photo of ") for prompt in prompts]).save(out / "samples.png")


if __name__ == "__main__":
    stage.run(main)
