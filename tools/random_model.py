"""A base model with the shapes of Stable Diffusion 1.5 or XL, and CLIP ViT-L/14, of random weights.

    python tools/random_model.py --shapes sdxl --out runs/random

They cost what the real ones cost and need no download. Writes OUT/base and OUT/base/clip.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import files, stage

torch = stage.lazy("torch")

TEXT = {"vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": 768,
        "num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072,
        "num_attention_heads": 12}
VISION = {"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 4096,
          "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "projection_dim": 768}


BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
         "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu"}  # XL's second
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stable_diffusion(width=320):
    """A pipeline of Stable Diffusion 1.5's shapes, in fp32; another width: narrow, for a trial."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        cross_attention_dim=768, attention_head_dim=8)
    schedule = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    text = text_encoder(CLIPTextModel, TEXT, width)
    return StableDiffusionPipeline(autoencoder(512, width), text, tokenizer(), unet, schedule,
                                   safety_checker=None, feature_extractor=None,
                                   requires_safety_checker=False)


def stable_diffusion_xl(width=320):
    """The same of Stable Diffusion XL's."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    unet = UNet2DConditionModel(
        sample_size=128, block_out_channels=(width, 2 * width, 4 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + 1280)
    texts = [text_encoder(CLIPTextModel, TEXT, width),
             text_encoder(CLIPTextModelWithProjection, TEXT | BIG_G, width)]
    vae = autoencoder(1024, width, scaling_factor=0.13025)
    return StableDiffusionXLPipeline(vae, *texts, tokenizer(), tokenizer(), unet,
                                     EulerDiscreteScheduler(**BETAS), add_watermarker=False)


def tokenizer():
    """The miniature's: a small vocabulary will do, as prompts are padded to 77 tokens."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(ROOT / "base/miniature/tokenizer", model_max_length=77)


def text_encoder(kind, shapes, width):
    from transformers import CLIPTextConfig

    words = tokenizer()
    ends = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    narrow = {} if width == 320 else {"num_hidden_layers": 2}
    return kind(CLIPTextConfig(**shapes | ends | narrow))


def autoencoder(size, width, **options):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
                        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4,
                        block_out_channels=(128, 256, 512, 512) if width == 320 else (32,) * 4,
                        sample_size=size, **options)
    vae.decoder.conv_out.weight.data *= 4  # contrast: generate.py draws a blank image again
    return vae


SHAPES = {"sd15": stable_diffusion, "sdxl": stable_diffusion_xl}


def main(argv=None):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    parser = stage.Parser(__file__, __doc__)
    parser.add_argument("--shapes", choices=tuple(SHAPES), default="sd15", help="of the base model")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    stage.begin(args)
    torch.manual_seed(0)
    with files.replacing(args.out) as out:
        pipe = SHAPES[args.shapes]().to(torch.float16)
        pipe.save_pretrained(out / "base")
        clip = CLIPModel(CLIPConfig(text_config=pipe.text_encoder.config.to_dict(),
                                    vision_config=VISION, projection_dim=768))
        clip.half().save_pretrained(out / "base/clip")
        CLIPProcessor(CLIPImageProcessor(), pipe.tokenizer).save_pretrained(out / "base/clip")
        stage.finish(out, args, "")


if __name__ == "__main__":
    stage.run(main)
