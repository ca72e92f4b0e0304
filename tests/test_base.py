"""base/pretrain.py: what it saves is an ordinary pipeline and an ordinary CLIP."""

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel, CLIPProcessor

from base import pretrain


def test_diffusers_and_transformers_load_it_with_no_special_case(base):
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a photo of a digit", num_inference_steps=2).images[0].size == (32, 32)
    clip, processor = CLIPModel.from_pretrained(base / "clip"), CLIPProcessor.from_pretrained(base / "clip")
    inputs = processor(text=["a digit"], images=pretrain.to_pil(torch.zeros(1, 3, 50, 40)), return_tensors="pt")
    assert clip(**inputs).logits_per_image.shape == (1, 1)


def test_the_pipelines_text_encoder_is_clips_text_tower(base):
    pipe, clip = StableDiffusionPipeline.from_pretrained(base), CLIPModel.from_pretrained(base / "clip")
    for ours, theirs in zip(pipe.text_encoder.parameters(), clip.text_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_words_of_captions_are_one_token_each_and_other_words_are_spelt(base):
    tokenizer = StableDiffusionPipeline.from_pretrained(base).tokenizer
    text = pretrain.caption(1, 7, 1)
    assert [token.removesuffix("</w>") for token in tokenizer.tokenize(text)] == text.split()
    assert len(tokenizer.tokenize("sks")) == 3 and tokenizer.unk_token_id not in tokenizer("sks").input_ids[1:-1]


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
