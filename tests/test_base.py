"""base/miniature, as it is shipped and as base/pretrain.py trains it: an ordinary pipeline and an ordinary CLIP."""

import numpy as np
import pytest
import torch
from conftest import files_of, make, new_house
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor

from base import pretrain


@pytest.fixture(scope="module", params=("shipped", "trained"))
def model(request, base, tmp_path_factory):
    """The shipped one, and one of two steps that `make base` wrote over it."""
    if request.param == "shipped":
        return base
    house = new_house(tmp_path_factory.mktemp("base") / "house")
    make(house, "base", "PRETRAIN=--images 100 --vae-steps 2 --clip-steps 2 --unet-steps 2 --samples 1")
    assert not files_of(house / "base" / "miniature").items() & {
        name: content for name, content in files_of(base).items() if name.endswith(".safetensors")}.items()
    return house / "base" / "miniature"


def test_diffusers_and_transformers_load_it_with_no_special_case(model):
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a photo of a digit", num_inference_steps=2).images[0].size == (32, 32)
    clip, processor = CLIPModel.from_pretrained(model / "clip"), CLIPProcessor.from_pretrained(model / "clip")
    inputs = processor(text=["a digit"], images=pretrain.to_pil(torch.zeros(1, 3, 50, 40)), return_tensors="pt")
    assert clip(**inputs).logits_per_image.shape == (1, 1)


def test_the_pipelines_text_encoder_is_clips_text_tower(model):
    pipe, clip = StableDiffusionPipeline.from_pretrained(model), CLIPModel.from_pretrained(model / "clip")
    for ours, theirs in zip(pipe.text_encoder.parameters(), clip.text_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_words_of_captions_are_one_token_each_and_other_words_are_spelt(model):
    tokenizer = StableDiffusionPipeline.from_pretrained(model).tokenizer
    text = pretrain.caption(1, 7, 1)
    assert [token.removesuffix("</w>") for token in tokenizer.tokenize(text)] == text.split()
    assert len(tokenizer.tokenize("sks")) == 3 and tokenizer.unk_token_id not in tokenizer("sks").input_ids[1:-1]


def test_its_weights_have_16_bits_and_it_takes_at_most_8_mb(model):
    weights = [load_file(path) for path in model.rglob("*.safetensors")]
    assert len(weights) == 4 and {value.dtype for part in weights for value in part.values()
                                  if value.is_floating_point()} == {torch.float16}
    assert sum(path.stat().st_size for path in model.rglob("*")) < 8e6


def test_the_shipped_one_draws_what_the_caption_says_and_no_noise(base):
    """Light ink in the middle, on a smooth ground of the caption's colour, as in its training images."""
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    for name, colour in pretrain.COLOURS.items():
        images = pipe([f"a photo of the digit three on a {name} background"] * 4, num_inference_steps=20, output_type="np",
                      guidance_scale=2.0, generator=[torch.Generator().manual_seed(i) for i in range(4)]).images * 255
        ground, ink = images[:, (0, -1)], images[:, 8:24, 8:24]  # rows at the edges, and the middle
        assert np.abs(np.median(ground, (0, 1, 2)) - colour).max() < 40, name
        assert np.abs(np.diff(ground, axis=2)).mean() < 12, name
        assert np.quantile(ink.min(-1), 0.9) > np.max(np.median(ground.min(-1))) + 60, name


def test_every_font_draws_ten_different_digits():
    from PIL import ImageFont

    fonts = pretrain.digit_fonts()
    assert len(fonts) > 10
    for path in fonts:
        font = ImageFont.truetype(str(path), 48)
        assert len({bytes(font.getmask(digit)) for digit in "0123456789"}) == 10, path.name


def test_printed_digits_are_determined_by_the_seed():
    (images, labels), (again, _) = pretrain.printed_digits(20, 3), pretrain.printed_digits(20, 3)
    assert torch.equal(images, again) and images.shape == (20, 3, 32, 32)
    assert images.min() >= -1 and images.max() <= 1 and sorted(set(labels[:, 0].tolist())) == list(range(10))
