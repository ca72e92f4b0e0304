"""Base models with the configs of Stable Diffusion 1.5 and 2.1, narrow and random:
loading, training, drawing."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import run, slow
from diffusers import (AutoencoderKL, DPMSolverMultistepScheduler, PNDMScheduler,
                       StableDiffusionPipeline, UNet2DConditionModel)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import save_file
from transformers import (CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTextModel,
                          CLIPTokenizer)

from common import imagefolder

SHAPES = {  # what tells the two apart; the widths are 320, 640, 1280, 1280 in earnest
    "sd15": {"width": 768, "heads": 12, "prediction": "epsilon",
             "unet": {"cross_attention_dim": 768, "attention_head_dim": 8}},
    "sd21": {"width": 1024, "heads": 16, "prediction": "v_prediction",
             "unet": {"cross_attention_dim": 1024, "attention_head_dim": (2, 4, 4, 4),
                      "use_linear_projection": True}},
}


def stable_diffusion(out, base, shape):
    """Saves a pipeline of that shape, safety checker and all, whose images are 64 pixels a side."""
    torch.manual_seed(0)
    settings = SHAPES[shape]
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer", model_max_length=77)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=settings["width"], intermediate_size=256,
        num_hidden_layers=1, num_attention_heads=settings["heads"], max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32), layers_per_block=2, latent_channels=4, sample_size=64)
    unet = UNet2DConditionModel(sample_size=8, block_out_channels=(32, 64, 64, 64),
                                layers_per_block=2, **settings["unet"])
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        set_alpha_to_one=False, steps_offset=1, prediction_type=settings["prediction"])
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=small, vision_config=small | {
        "image_size": 32, "patch_size": 16}, projection_dim=32))
    StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, checker,
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)).save_pretrained(out)
    assert json.loads((out / "model_index.json").read_text())["safety_checker"][1] == (
        "StableDiffusionSafetyChecker")
    return out


# the miniature predicts noise as sd15 does
@pytest.mark.parametrize("shape", (pytest.param("sd15", marks=slow), "sd21"))
def test_fine_tuned_weights_reload_in_plain_diffusers_and_draw_the_same_images(
        base, dataset, tmp_path, shape):
    sd = stable_diffusion(tmp_path / shape, base, shape)
    same = ("--base", sd, "--data", dataset)
    run("finetune.py", *same, "--method", "lora", "--steps", 2, "--learning-rate", 0.01,
        "--alpha", 32, "--out", tmp_path / "lora")
    run("generate.py", *same, "--clip", base / "clip", "--models", tmp_path / "lora",
        "--images", 2, "--batch", 2, "--steps", 3, "--keep", 1, "--alpha", 1, "--rare", "own",
        "--out", tmp_path / "images")
    pipe = StableDiffusionPipeline.from_pretrained(sd, safety_checker=None)
    pipe.load_lora_weights(tmp_path / "lora" / "y1-a0")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert pipe.scheduler.config.prediction_type == SHAPES[shape]["prediction"]
    row = next(row for row in imagefolder.read_metadata(tmp_path / "images")
               if row["unit"] == "y1-a0")
    image = pipe(row["prompt"], num_inference_steps=3, guidance_scale=2.0,
                 generator=torch.Generator().manual_seed(int(row["seed"]))).images[0]
    drawn = np.asarray(Image.open(tmp_path / "images" / row["file_name"]), int)
    assert abs(drawn - np.asarray(image, int)).max() <= 2 and drawn.std() > 1


def test_fp16_variants_load_and_weights_are_saved_in_bf16_on_demand(base, dataset, tmp_path):
    sd = stable_diffusion(tmp_path / "sd15", base, "sd15")
    StableDiffusionPipeline.from_pretrained(sd, dtype=torch.float16).save_pretrained(
        tmp_path / "half", variant="fp16")
    assert not list((tmp_path / "half" / "unet").glob("diffusion_pytorch_model.safetensors"))
    run("finetune.py", "--base", tmp_path / "half", "--data", dataset, "--method", "dreambooth",
        "--steps", 1, "--save-dtype", "bf16", "--out", tmp_path / "out")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "y0-a0" / "unet")
    size = (tmp_path / "out" / "y0-a0" / "unet"
            / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size < 2.1 * sum(weight.numel() for weight in unet.parameters())


def test_an_invalid_base_is_a_one_line_error(base, dataset, tmp_path):
    args = ("generate.py", "--clip", base / "clip", "--data", dataset, "--alpha", 1,
            "--images", 1, "--out", tmp_path / "out")
    run(*args, "--base", "somebody/of-the-hub",
        fails="--base somebody/of-the-hub: cannot be loaded")
    pickled = shutil.copytree(base, tmp_path / "pickled")
    weights = pickled / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    run(*args, "--base", pickled, fails="cannot be loaded")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    run(*args, "--base", tmp_path / "broken.safetensors", fails="cannot be loaded")


def single_file(pipe):
    """The pipeline's weights under the names of the original Stable Diffusion checkpoints:
    {name: tensor}."""
    blocks = [("mid_block.attentions.0", "middle_block.1"),
              ("mid_block.resnets.0", "middle_block.0"), ("mid_block.resnets.1", "middle_block.2"),
              ("time_embedding.linear_1", "time_embed.0"),
              ("time_embedding.linear_2", "time_embed.2"), ("conv_in", "input_blocks.0.0"),
              ("conv_norm_out", "out.0"), ("conv_out", "out.2")]
    for i in range(4):
        for j in range(3):
            blocks += [(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{3 * i + j + 1}.0"),
                       (f"down_blocks.{i}.attentions.{j}", f"input_blocks.{3 * i + j + 1}.1"),
                       (f"up_blocks.{i}.resnets.{j}", f"output_blocks.{3 * i + j}.0"),
                       (f"up_blocks.{i}.attentions.{j}", f"output_blocks.{3 * i + j}.1")]
        blocks += [(f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{3 * i + 3}.0.op"),
                   (f"up_blocks.{i}.upsamplers.0",
                    f"output_blocks.{3 * i + 2}.{1 if i == 0 else 2}")]
    inside = [("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"),
              ("conv2", "out_layers.3"), ("time_emb_proj", "emb_layers.1"),
              ("conv_shortcut", "skip_connection")]
    weights = {}
    for name, value in pipe.unet.state_dict().items():
        old, new = max((pair for pair in blocks if name.startswith(pair[0] + ".")),
                       key=lambda pair: len(pair[0]))
        rest = name.removeprefix(old)
        for one, other in inside if ".resnets." in name else []:
            rest = rest.replace(f".{one}.", f".{other}.")
        weights["model.diffusion_model." + new + rest] = value
    parts = [("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
             ("mid_block.attentions.0", "mid.attn_1"), ("mid_block.resnets.0", "mid.block_1"),
             ("mid_block.resnets.1", "mid.block_2"), ("group_norm", "norm"),
             ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")]
    for i in range(4):
        parts += [(f"down_blocks.{i}.downsamplers.0", f"down.{i}.downsample"),
                  (f"up_blocks.{i}.upsamplers.0", f"up.{3 - i}.upsample")]
        parts += [(f"{way}_blocks.{i}.resnets.{j}",
                   f"{way}.{i if way == 'down' else 3 - i}.block.{j}")
                  for way in ("down", "up") for j in range(3)]
    for name, value in pipe.vae.state_dict().items():
        linear = "attentions" in name and name.endswith("weight") and value.ndim == 2
        for one, other in parts:
            name = f".{name}".replace(f".{one}.", f".{other}.").removeprefix(".")
        weights["first_stage_model." + name] = value[:, :, None, None] if linear else value
    weights |= {"cond_stage_model.transformer.text_model." + name.removeprefix("text_model."): value
                for name, value in pipe.text_encoder.state_dict().items()}
    return {name: value.contiguous() for name, value in weights.items()}


def test_a_single_file_checkpoint_draws_what_the_folder_draws(base, dataset, tmp_path):
    sd = stable_diffusion(tmp_path / "sd15", base, "sd15")
    save_file(single_file(StableDiffusionPipeline.from_pretrained(sd)),
              tmp_path / "one.safetensors")
    shutil.copytree(sd, tmp_path / "one", ignore=shutil.ignore_patterns("*.safetensors"))
    args = ("generate.py", "--clip", base / "clip", "--data", dataset, "--images", 1,
            "--batch", 1, "--steps", 2, "--keep", 1, "--alpha", 1)
    run(*args, "--base", sd, "--out", tmp_path / "of-folder")
    run(*args, "--base", tmp_path / "one.safetensors", "--out", tmp_path / "of-file")
    for row in imagefolder.read_metadata(tmp_path / "of-folder"):
        one, other = (np.asarray(Image.open(tmp_path / out / row["file_name"]), int)
                      for out in ("of-folder", "of-file"))
        assert abs(one - other).max() <= 1 and one.std() > 1
