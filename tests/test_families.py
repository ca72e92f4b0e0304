"""Base models of other families, of the true classes, tiny and random:
training, drawing, reloading."""

import numpy as np
import pytest
import torch
from conftest import run
from diffusers import (AutoencoderDC, AutoencoderKL, DiffusionPipeline, DPMSolverMultistepScheduler,
                       EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, SanaPipeline,
                       SanaTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline,
                       StableDiffusionXLPipeline, UNet2DConditionModel)
from PIL import Image
from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer,
                          Gemma2Config, Gemma2Model, GemmaTokenizerFast, T5Config, T5EncoderModel,
                          T5TokenizerFast)

from base import families, training
from common import compute, imagefolder
from tools import random_model

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip_text(base, kind, width):
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer", model_max_length=77)
    ends = {name: getattr(tokenizer, name)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return tokenizer, kind(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=width, **ends))


def autoencoder(channels, **options):
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4, layers_per_block=1, latent_channels=channels, **options)
    vae.decoder.conv_out.weight.data *= 4  # contrast: a blank image is drawn again
    return vae


def xl(base):
    """As stable-diffusion-xl-base-1.0: two CLIPs, time ids, images of 64 pixels instead of 1024."""
    tokenizer, text = clip_text(base, CLIPTextModel, 16)
    tokenizer_2, text_2 = clip_text(base, CLIPTextModelWithProjection, 24)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64, 64), cross_attention_dim=40,
        attention_head_dim=(2, 4, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        layers_per_block=1,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24)
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012,
                                       beta_schedule="scaled_linear")
    return StableDiffusionXLPipeline(
        autoencoder(4, scaling_factor=0.13025), text, text_2, tokenizer, tokenizer_2, unet,
        scheduler, add_watermarker=False)


def sd3(base):
    """As stable-diffusion-3.5-medium: two CLIPs and T5, a shifted VAE, flow matching."""
    tokenizer, text = clip_text(base, CLIPTextModelWithProjection, 16)
    tokenizer_2, text_2 = clip_text(base, CLIPTextModelWithProjection, 24)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [
        (letter, -5.0) for letter in f"{LETTERS}▁"]
    t5 = T5EncoderModel(T5Config(vocab_size=len(pieces), d_model=48, d_kv=8, d_ff=32, num_layers=1,
                                 num_heads=2))
    transformer = SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, caption_projection_dim=32, pooled_projection_dim=40,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm")
    vae = autoencoder(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
                      use_post_quant_conv=False)
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, text, tokenizer, text_2,
        tokenizer_2, t5, T5TokenizerFast(vocab=pieces, extra_ids=0))


def sana(base):
    """As Sana_600M_512px: Gemma 2, an autoencoder without posterior,
    flow matching by DPM-Solver++."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *LETTERS]
    gemma = Gemma2Model(Gemma2Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8))
    vae = AutoencoderDC(
        latent_channels=8, attention_head_dim=8, encoder_block_out_channels=(8, 8, 16),
        decoder_block_out_channels=(8, 8, 16), encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()), scaling_factor=0.41407)
    transformer = SanaTransformer2DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=16, sample_size=16)
    scheduler = DPMSolverMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True,
                                            prediction_type="flow_prediction")
    tokenizer = GemmaTokenizerFast(vocab={word: i for i, word in enumerate(words)}, merges=[])
    return SanaPipeline(tokenizer, gemma, vae, transformer, scheduler)


PIPELINES = {"xl": xl, "sd3": sd3, "sana": sana}
DRAWING = {"sana": {"use_resolution_binning": False}}


@pytest.fixture(scope="module", params=PIPELINES)
def other(request, base, tmp_path_factory):
    """(name of the family, folder of a tiny base model)"""
    torch.manual_seed(0)
    pipe = PIPELINES[request.param](base)
    # some begin as zeros
    for weight in getattr(pipe, "transformer", torch.nn.Module()).parameters():
        torch.nn.init.normal_(weight, std=0.2)
    out = tmp_path_factory.mktemp("bases") / request.param
    pipe.save_pretrained(out)
    return request.param, out


def drawn_by_diffusers(name, folder, row, load, scale):
    pipe = DiffusionPipeline.from_pretrained(folder)
    load(pipe)
    if name == "xl":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    size = 64
    image = pipe(
        row["prompt"], num_inference_steps=3, guidance_scale=scale, height=size, width=size,
        generator=torch.Generator().manual_seed(int(row["seed"])),
        **DRAWING.get(name, {})).images[0]
    return np.asarray(image, int)


@pytest.mark.parametrize("method", ("lora", "dreambooth"))
def test_fine_tuned_weights_reload_in_the_plain_pipeline_and_draw_the_same_image(
        other, method, base, dataset, tmp_path):
    name, folder = other
    same = ("--base", folder, "--data", dataset)
    run("finetune.py", *same, "--method", method, "--steps", 2, "--learning-rate", 0.01,
        "--batch", 2, "--out", tmp_path / "models")
    run("generate.py", *same, "--clip", base / "clip", "--models", tmp_path / "models",
        "--images", 2, "--batch", 3, "--steps", 3, "--keep", 1, "--alpha", 1, "--rare", "own",
        "--out", tmp_path / "images")
    row = next(row for row in imagefolder.read_metadata(tmp_path / "images")
               if row["unit"] == "y1-a0")
    unit = tmp_path / "models" / "y1-a0"

    def load(pipe):
        if method == "lora":
            return pipe.load_lora_weights(unit, weight_name="pytorch_lora_weights.safetensors")
        part = "unet" if name == "xl" else "transformer"
        setattr(pipe, part, type(getattr(pipe, part)).from_pretrained(unit / part))

    ours = np.asarray(Image.open(tmp_path / "images" / row["file_name"]), int)
    theirs = drawn_by_diffusers(name, folder, row, load, 2.0)
    untrained = drawn_by_diffusers(name, folder, row, lambda pipe: None, 2.0)
    assert ours.std() > 1 and abs(ours - theirs).max() <= 2
    assert abs(ours - untrained).max() > 2  # training changed something


def test_what_the_network_sees_in_training_is_what_its_pipeline_gives_it(other):
    """Inputs of the network's forward pass, recorded while the pipeline draws without guidance."""
    name, folder = other
    family, seen = families.load(folder, torch.float32), {}
    prompt = family.encode("a photo of a digit")

    def record(module, args, kwargs):
        seen.setdefault("given", (args, kwargs))

    hook = family.network.register_forward_pre_hook(record, with_kwargs=True)
    family.pipe("a photo of a digit", height=64, width=64, num_inference_steps=2,
                guidance_scale=1.0, generator=torch.Generator().manual_seed(0), **family.drawing)
    hook.remove()
    args, kwargs = seen["given"]
    kwargs = {key: value for key, value in kwargs.items() if key != "return_dict"}
    with torch.no_grad():
        expected = family.network(*args, **kwargs).sample
        noisy = args[0] if args else kwargs["hidden_states"]
        timestep = args[1] if len(args) > 1 and args[1].ndim == 0 else kwargs["timestep"]
        timestep = timestep / family.network.config.get("timestep_scale", 1)
        found = family.predict(noisy, timestep.expand(1), prompt)
    assert torch.allclose(found, expected, atol=1e-5)


def test_guidance_in_no_interval_is_no_guidance_and_in_all_of_it_the_usual(
        other, base, dataset, tmp_path):
    name, folder = other
    args = ("generate.py", "--base", folder, "--data", dataset, "--clip", base / "clip",
            "--images", 1, "--batch", 1, "--steps", 3, "--keep", 1, "--alpha", 1)
    for out, more in (("plain", ("--guidance-scale", 1, "--guidance-interval", 0, 0.5)),
                      ("never", ("--guidance-scale", 50, "--guidance-interval", 0, 0)),
                      ("always", ("--guidance-scale", 50)),
                      ("late", ("--guidance-scale", 50, "--guidance-interval", 0, 0.95))):
        run(*args, *more, "--out", tmp_path / out)
    plain, never, always, late = (
        [np.asarray(Image.open(path), int) for path in sorted((tmp_path / out).glob("*/*.png"))]
        for out in ("plain", "never", "always", "late"))
    assert max(abs(a - b).max() for a, b in zip(plain, never)) <= 1
    assert max(abs(a - b).max() for a, b in zip(always, late)) > 1 < max(
        abs(a - b).max() for a, b in zip(plain, late))


def test_each_latent_belongs_to_its_caption_however_images_are_shuffled(other, dataset):
    model = training.Base(other[1], compute.accelerator("cpu"))
    rows = imagefolder.read_metadata(dataset, "train")
    captions = [row["file_name"] for row in rows]
    images = training.Images(dataset, rows, captions, 0, steps=20, batch=4, balance=0.5)
    images.encode(model)
    images.std.zero_()
    for step in (0, 7, 19):
        pick = images.pick(step, 4)
        found = images.latents(pick, torch.Generator())
        alone = [model.encode([dataset / images.prompts[i]])[0] for i in pick]
        assert torch.allclose(found, torch.cat(alone), atol=1e-4) and len(set(pick)) > 1


@pytest.mark.parametrize("shift", (1.0, 3.0))
def test_a_flow_is_the_straight_line_of_diffusers_scheduler(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    flow = families.schedule_of(scheduler)
    latents, noise = torch.randn(2, 5, 3, 4, 4)
    timesteps = scheduler.timesteps[[0, 10, 500, 900, 999]]
    assert torch.allclose(flow.noisy(latents, noise, timesteps),
                          scheduler.scale_noise(latents, timesteps, noise), atol=1e-5)
    velocity = flow.target(latents, noise, timesteps)
    level = (timesteps / 1000)[:, None, None, None]
    assert torch.allclose(flow.noisy(latents, noise, timesteps) - level * velocity, latents,
                          atol=1e-5)
    drawn = flow.timesteps(10_000, torch.Generator().manual_seed(0)) / 1000
    assert 0 < drawn.min() and drawn.max() < 1
    assert drawn.median().item() == pytest.approx(shift / (1 + shift), abs=0.02)


def test_a_text_encoder_that_does_not_learn_is_a_one_line_error(
        other, dataset, tmp_path):
    args = ("finetune.py", "--base", other[1], "--data", dataset, "--method", "dreambooth",
            "--steps", 1, "--out", tmp_path / "out")
    run(*args, "--train-text-encoder",
        fails="--train-text-encoder: is for Stable Diffusion 1.x and 2.x")


def test_in_bf16_a_frozen_base_trains_a_lora_and_draws(other, base, dataset, tmp_path):
    same = ("--base", other[1], "--data", dataset)
    run("finetune.py", *same, "--method", "lora", "--steps", 2, "--base-dtype", "bf16",
        "--out", tmp_path / "models")
    run("generate.py", *same, "--models", tmp_path / "models", "--precision", "bf16",
        "--clip", base / "clip", "--images", 1, "--batch", 2, "--steps", 2, "--keep", 1,
        "--alpha", 1, "--rare", "own", "--out", tmp_path / "images")
    assert len(imagefolder.read_metadata(tmp_path / "images")) == 4


def test_an_unknown_family_is_told_which_are_known(base, dataset, tmp_path):
    folder = tmp_path / "pixart"
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
    run("finetune.py", "--base", folder, "--data", dataset, "--method", "lora",
        "--out", tmp_path / "out",
        fails="is a PixArtSigmaPipeline (give Stable Diffusion 1.x, 2.x, XL or 3.x, or Sana)")


@pytest.mark.parametrize("shapes", random_model.SHAPES)
def test_a_random_model_of_the_real_shapes_predicts_and_decodes(shapes):
    """Narrow, all else as in the dry run: its parts must fit together."""
    pipe = random_model.SHAPES[shapes](width=32)
    family = families.FAMILIES[type(pipe).__name__](pipe)
    assert family.size == {"sd15": 512, "sdxl": 1024}[shapes]
    with torch.no_grad():
        predicted = family.predict(torch.zeros(1, 4, 8, 8), torch.tensor([1]),
                                   family.encode("a photo"))
        assert predicted.shape == (1, 4, 8, 8) and predicted.isfinite().all()
        assert pipe.vae.decode(predicted).sample.shape == (1, 3, 64, 64)
