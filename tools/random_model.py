"""A base model with the shapes of Stable Diffusion 1.5, and CLIP ViT-L/14, of random weights.

    python tools/random_model.py --out runs/dryrun-celeba/models

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


def stable_diffusion(width=320):
    """A pipeline of Stable Diffusion 1.5's shapes, in fp32; another width: narrow, for a trial."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    # The miniature's tokenizer: a small vocabulary will do, as prompts are padded to 77 tokens.
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "base/miniature/tokenizer",
                                              model_max_length=77)
    ends = {name: getattr(tokenizer, name)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    layers = TEXT["num_hidden_layers"] if width == 320 else 1
    text = CLIPTextModel(CLIPTextConfig(**TEXT | ends | {"num_hidden_layers": layers}))
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
                        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4,
                        block_out_channels=(128, 256, 512, 512) if width == 320 else (32,) * 4,
                        sample_size=512)
    vae.decoder.conv_out.weight.data *= 4  # contrast: generate.py draws a blank image again
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        cross_attention_dim=768, attention_head_dim=8)
    schedule = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                             skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(vae, text, tokenizer, unet, schedule, safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)


def main(argv=None):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    parser = stage.Parser(__file__, __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    stage.begin(args)
    torch.manual_seed(0)
    with files.replacing(args.out) as out:
        pipe = stable_diffusion().to(torch.float16)
        pipe.save_pretrained(out / "base")
        clip = CLIPModel(CLIPConfig(text_config=pipe.text_encoder.config.to_dict(),
                                    vision_config=VISION, projection_dim=768))
        clip.half().save_pretrained(out / "base/clip")
        CLIPProcessor(CLIPImageProcessor(), pipe.tokenizer).save_pretrained(out / "base/clip")
        stage.finish(out, args, "")


if __name__ == "__main__":
    stage.run(main)
