"""base/miniature as it is shipped, and what base/pretrain.py trains:
ordinary pipelines and ordinary CLIPs."""

import time

import numpy as np
import pytest
import torch
from conftest import files_of, make, new_house, run, start
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor

from base import pretrain, training
from common import imagefolder
from data import printed

STEPS = ("--clip-steps", 2, "--vae-steps", 2, "--unet-steps", 2, "--samples", 1)
LARGER = ("--size", 64, "--vae-widths", 8, 16, "--unet-widths", 16, 32, 64,
          "--clip-widths", 32, 64, "--flip")


@pytest.fixture(scope="module", params=("shipped", "miniature", "mine"))
def model(request, base, dataset, tmp_path_factory):
    """The shipped one; one of two steps that `make base` wrote over it;
    one of a user's images, larger."""
    if request.param == "shipped":
        return base
    if request.param == "mine":
        out = tmp_path_factory.mktemp("base") / "mine"
        run("base/pretrain.py", "--data", dataset, "--captions", "text", *LARGER, *STEPS,
            "--out", out)
        return out
    house = new_house(tmp_path_factory.mktemp("base") / "house")
    shorter = "--captions text digit_text " + " ".join(map(str, STEPS))
    make(house, "base", "PREPARE=--images 100", f"PRETRAIN={shorter}")
    assert not files_of(house / "base" / "miniature").items() & {
        name: content for name, content in files_of(base).items()
        if name.endswith(".safetensors")}.items()
    return house / "base" / "miniature"


def test_diffusers_and_transformers_load_it_with_no_special_case(model):
    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of an even digit", num_inference_steps=2).images[0]
    assert image.size == ((64, 64) if model.name == "mine" else (32, 32))
    clip, processor = (CLIPModel.from_pretrained(model / "clip"),
                       CLIPProcessor.from_pretrained(model / "clip"))
    inputs = processor(text=["a digit"], images=[Image.new("RGB", (50, 40))], return_tensors="pt")
    assert clip(**inputs).logits_per_image.shape == (1, 1)


def test_the_pipelines_text_encoder_is_clips_text_tower(model):
    pipe, clip = (StableDiffusionPipeline.from_pretrained(model),
                  CLIPModel.from_pretrained(model / "clip"))
    for ours, theirs in zip(pipe.text_encoder.parameters(), clip.text_model.parameters(),
                            strict=True):
        assert torch.equal(ours, theirs)


def test_words_of_captions_are_one_token_each_and_other_words_are_spelt(model):
    tokenizer = StableDiffusionPipeline.from_pretrained(model).tokenizer
    text = "a photo of an odd digit on a green background"
    assert [token.removesuffix("</w>") for token in tokenizer.tokenize(text)] == text.split()
    assert (len(tokenizer.tokenize("sks")) == 3
            and tokenizer.unk_token_id not in tokenizer("sks").input_ids[1:-1])


def test_words_in_any_script_are_one_token_each(tmp_path):
    tokenizer = pretrain.make_tokenizer(tmp_path / "tokenizer",
                                        ["", "ein Foto von Müllers Katze, naß", "猫 の 写真"])
    for word in ("müllers", "naß", "写真"):
        assert len(tokenizer.tokenize(word)) == 1, tokenizer.tokenize(word)


def test_its_weights_have_16_bits_and_it_takes_at_most_10_mb(model):
    weights = [load_file(path) for path in model.rglob("*.safetensors")]
    assert len(weights) == 4 and {value.dtype for part in weights for value in part.values()
                                  if value.is_floating_point()} == {torch.float16}
    assert sum(path.stat().st_size for path in model.rglob("*")) < 10e6


def test_the_shipped_one_draws_what_the_caption_says_and_no_noise(base):
    """Light ink in the middle, on a smooth ground of the caption's colour,
    as in its training images."""
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    for name, colour in printed.COLOURS.items():
        images = pipe(
            [f"a photo of the digit three on a {name} background"] * 4, num_inference_steps=20,
            output_type="np", guidance_scale=2.0,
            generator=[torch.Generator().manual_seed(i) for i in range(4)]).images * 255
        ground, ink = images[:, (0, -1)], images[:, 8:24, 8:24]  # rows at the edges, and the middle
        assert np.abs(np.median(ground, (0, 1, 2)) - colour).max() < 40, name
        assert np.abs(np.diff(ground, axis=2)).mean() < 12, name
        assert np.quantile(ink.min(-1), 0.9) > np.max(np.median(ground.min(-1))) + 60, name


def test_a_killed_pretraining_resumes_to_the_same_bytes(dataset, tmp_path):
    command = ("base/pretrain.py", "--data", dataset, "--captions", "text", "--clip-steps", 2,
               "--vae-steps", 2, "--unet-steps", 30, "--samples", 1)
    run(*command, "--out", tmp_path / "undisturbed")
    process, finished = (start(*command, "--out", tmp_path / "killed"),
                         tmp_path / ".killed.partial/vae/config.json")
    while not finished.is_file() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() < 0 and not (tmp_path / "killed").exists()
    assert "clip: 2 steps" in run(*command, "--out", tmp_path / "killed")
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "undisturbed")
    assert not list(tmp_path.glob(".*.partial"))


def test_a_checkpoint_within_a_network_resumes_exactly(tmp_path):
    """Weights are channels_last, the checkpoint's file is not."""
    def begun():
        torch.manual_seed(0)
        network = torch.nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(network.parameters(), 0.1, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return network, optimizer, schedule, training.Checkpoint(
            tmp_path / "kept", "key", list(network.parameters()), optimizer, schedule)

    def train(network, optimizer, schedule, checkpoint, steps):
        for step in steps:
            images = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(step))
            network(images).square().mean().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return [weight.detach().clone() for weight in network.parameters()]

    whole = train(*begun(), range(6))
    first, second = begun(), begun()
    train(*first, range(3))
    first[-1].save([{"step": step, "loss": 0.0, "learning_rate": 0.1} for step in range(3)])
    assert len(second[-1].load()) == 3
    assert all(map(torch.equal, train(*second, range(3, 6)), whole))


def test_impossible_sizes_and_captions_are_refused(dataset, tmp_path):
    command = ("base/pretrain.py", "--data", dataset, "--out", tmp_path / "base")
    run(*command, "--captions", "text", "--size", 36, fails="is no multiple of 8")
    run(*command, "--captions", "story", fails="--captions story: is no column of")
    run(*command, "--captions", "text", "--clip-first", "class_text", fails="is none of --captions")
    long = tmp_path / "long"
    long.mkdir()
    (long / "images").symlink_to(dataset / "images")
    table = (dataset / "metadata.csv").read_text().replace(
        "background", "background " + "and " * 40 + "so on")
    (long / "metadata.csv").write_text(table)
    run("base/pretrain.py", "--data", long, "--captions", "text", "--out", tmp_path / "base",
        fails="tokens, the model takes 48")


def test_every_font_draws_ten_different_digits():
    from PIL import ImageFont

    fonts = printed.digit_fonts()
    assert len(fonts) > 10
    for path in fonts:
        font = ImageFont.truetype(str(path), 48)
        assert len({bytes(font.getmask(digit)) for digit in "0123456789"}) == 10, path.name


def test_printed_digits_are_determined_by_the_seed(tmp_path):
    for out in ("one", "again"):
        run("data/prepare.py", "printed", "--images", 20, "--out", tmp_path / out)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "again")
    rows = imagefolder.read_metadata(tmp_path / "one")
    assert sorted({row["digit"] for row in rows}) == list("0123456789")
    assert all(row["text"].split()[4] == ("even", "odd")[int(row["digit"]) % 2] for row in rows)
