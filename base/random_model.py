"""A base model with the exact shapes of Stable Diffusion 1.5, and CLIP ViT-L/14, of random weights in 16 bits.

    python base/random_model.py --out runs/dryrun-celeba/models

They cost what the real ones cost and need no download; `make dryrun` uses them. Writes OUT/base and OUT/base/clip.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the repository, which this script is run from anywhere
from common import files, stage

torch = stage.lazy("torch")

LAYERS = {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
VISION = {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
          "image_size": 224, "patch_size": 14}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "skip_prk_steps": True,
            "set_alpha_to_one": False, "steps_offset": 1}


def clip_tokenizer():
    """That of the miniature: a small vocabulary will do, as every prompt is padded to 77 tokens."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(ROOT / "base" / "miniature" / "tokenizer", model_max_length=77)


def text_shape(tokenizer):
    return {"vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": 768, **LAYERS,
            **{f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}}


def stable_diffusion(width=320):
    """A pipeline of Stable Diffusion 1.5's shapes, in fp32; another width makes it narrow, for a trial."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = clip_tokenizer()
    text = text_shape(tokenizer) | ({"num_hidden_layers": 1} if width != 320 else {})
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                        block_out_channels=(128, 256, 512, 512) if width == 320 else (32,) * 4, layers_per_block=2,
                        latent_channels=4, sample_size=512)
    vae.decoder.conv_out.weight.data *= 4  # contrast: generate.py draws a blank image again
    unet = UNet2DConditionModel(sample_size=64, block_out_channels=(width, 2 * width, 4 * width, 4 * width),
                                cross_attention_dim=768, attention_head_dim=8)
    return StableDiffusionPipeline(vae, CLIPTextModel(CLIPTextConfig(**text)), tokenizer, unet, PNDMScheduler(**SCHEDULE),
                                   safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def main(argv=None):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    parser = stage.Parser(__file__, __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    stage.begin(args)
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    with files.replacing(args.out) as out:
        stable_diffusion().to(torch.float16).save_pretrained(out / "base")
        clip = CLIPModel(CLIPConfig(text_config=text_shape(tokenizer), vision_config=VISION | {"projection_dim": 768},
                                    projection_dim=768))
        clip.half().save_pretrained(out / "base" / "clip")
        CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(out / "base" / "clip")
        stage.finish(out, args, "", {})


if __name__ == "__main__":
    stage.run(main)
