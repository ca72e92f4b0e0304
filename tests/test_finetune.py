"""finetune.py: weights of each unit."""

import csv
import json
import shutil
import time

import pytest
import torch
from conftest import LONG, files_of, make_dataset, run, start, together
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torchvision.transforms.functional import pil_to_tensor

import finetune
from base import training
from common import compute, files, imagefolder, made, stage

QUICK = ("--steps", 3, "--batch", 2, "--learning-rate", 1e-2)


def trained(stdout):
    """The units that a run says it trained."""
    return [line.split("(")[1].split(")")[0]
            for line in stdout.splitlines() if "images, loss" in line]


@pytest.fixture(scope="module")
def lora(base, dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "lora"
    run("finetune.py", "--method", "lora", "--base", base, "--data", dataset, *QUICK,
        "--rank", 4, "--alpha", 16, "--out", out)
    return out


def test_each_group_gets_weights_a_loss_curve_and_a_config(lora):
    assert sorted(path.name for path in lora.glob("[!.]*")) == [
        "config.json", "y0-a0", "y0-a1", "y1-a0", "y1-a1"]
    for unit in lora.glob("y*"):
        assert sorted(p.name for p in unit.iterdir()) == [
            "README.md", "config.json", "loss.csv", "pytorch_lora_weights.safetensors"]
        with open(unit / "loss.csv") as file:
            assert [row["step"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    draws = json.loads((lora / "config.json").read_text())["draws"]
    assert {draw["unit"]: draw["images"] for draw in draws} == {
        "y0-a0": 24, "y0-a1": 3, "y1-a0": 3, "y1-a1": 24}
    assert draws[0]["prompt"] == "{text} sks"


def test_a_plain_load_lora_weights_honours_alpha(base, lora):
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(lora / "y0-a0")
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q
    assert layer.scaling == {"default_0": 4.0}
    assert layer.lora_B["default_0"].weight.abs().max() > 0


def test_units_that_are_published_are_kept_and_others_are_made_anew(base, dataset, lora, tmp_path):
    shutil.copytree(lora, tmp_path / "lora")
    again = ("finetune.py", "--method", "lora", "--base", base, "--data", dataset, *QUICK,
             "--rank", 4, "--alpha", 16)
    shutil.rmtree(tmp_path / "lora" / "y0-a1")
    made = run(*again, "--out", tmp_path / "lora")
    assert trained(made) == ["y0-a1"]
    assert files_of(tmp_path / "lora") == files_of(lora)
    assert len(trained(run(*again, "--seed", 1, "--out", tmp_path / "lora"))) == 4


def test_only_the_split_train_is_learned_from(base, lora, tmp_path):
    data = make_dataset(tmp_path / "data")
    for row in imagefolder.read_metadata(data):
        if row["split"] != "train":
            (data / row["file_name"]).write_bytes(b"not even an image")
    run("finetune.py", "--method", "lora", "--base", base, "--data", data, *QUICK,
        "--rank", 4, "--alpha", 16, "--out", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(lora)


def test_clustered_dreambooth_with_prior_and_text_encoder_loads_in_diffusers(
        base, dataset, embeddings, vanilla, tmp_path):
    clusters = tmp_path / "clusters"
    run("cluster.py", "--data", dataset, "--embeddings", embeddings, "--k", 2, "--min-size", 2,
        "--out", clusters)
    run("finetune.py", "--method", "dreambooth", "--per", "cluster", "--base", base,
        "--data", clusters, "--prior", vanilla, *QUICK,
        "--train-text-encoder", "--accumulation", 2, "--gradient-checkpointing",
        "--schedule", "cosine", "--out", tmp_path / "out")
    expected = {f"{imagefolder.group_of(row)}-c{row['cluster']}"
                for row in imagefolder.read_metadata(clusters)}
    assert {path.name for path in (tmp_path / "out").glob("y*")} == expected
    unit, before = (tmp_path / "out" / "y0-a0-c0",
                    UNet2DConditionModel.from_pretrained(base / "unet"))
    after = UNet2DConditionModel.from_pretrained(unit / "unet")
    moved = [not torch.equal(a, b)
             for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved) and (unit / "text_encoder" / "model.safetensors").is_file()


def test_one_model_for_the_dataset_draws_every_group(base, tmp_path):
    """Also in a group without a single training image: y1-a0 is in val and test alone."""
    data = make_dataset(tmp_path / "data", counts={(0, 0): 9, (0, 1): 2, (1, 0): 0, (1, 1): 9})
    run("finetune.py", "--method", "lora", "--per", "dataset", "--balance", 0.5, "--base", base,
        "--data", data, *QUICK, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*/")] == ["all"]
    text = run("generate.py", "--base", base, "--clip", base / "clip", "--data", data,
               "--models", tmp_path / "out", "--images", 4, "--steps", 2, "--keep", 1,
               "--alpha", 1, "--out", tmp_path / "synthetic")
    assert "has no unit of its own" not in text
    rows = imagefolder.read_metadata(tmp_path / "synthetic")
    assert set(imagefolder.group_counts(rows).values()) == {4}
    assert {row["unit"] for row in rows} == {"y0-a0", "y0-a1", "y1-a0", "y1-a1"}


def test_cached_latents_are_those_of_encoding_an_image_anew(base, dataset):
    model = training.Base(base, compute.accelerator("cpu"))
    rows = imagefolder.read_metadata(dataset, "train")
    images = training.Images(dataset, rows, ["a photo"] * len(rows), 0, steps=14, batch=4)
    images.encode(model)
    for pick in ([0], [5, 53, 17, 5]):
        chosen = [imagefolder.load_image(dataset / rows[i]["file_name"], 32) for i in pick]
        pixels = torch.stack([pil_to_tensor(image) for image in chosen]) / 127.5 - 1
        with torch.no_grad():
            posterior = model.vae.encode(pixels).latent_dist
        anew = posterior.sample(torch.Generator().manual_seed(1)) * model.vae.config.scaling_factor
        cached = images.latents(pick, torch.Generator().manual_seed(1))
        assert torch.allclose(cached, anew, atol=1e-5) and anew.std() > 0.1


def test_lora_in_bf16_has_nearly_the_losses_of_fp32_and_weights_in_fp32(base, dataset, tmp_path):
    losses = []
    for precision in ("fp32", "bf16"):
        run("finetune.py", "--method", "lora", "--base", base, "--data", dataset, *QUICK,
            "--precision", precision, "--out", tmp_path / precision)
        losses.append([float(row["loss"]) for row in files.read_csv(
            tmp_path / precision / "y0-a0" / "loss.csv")])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.03)
    weights = load_file(tmp_path / "bf16" / "y0-a0" / "pytorch_lora_weights.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_processes_share_the_units_and_make_the_same_bytes(base, dataset, lora, tmp_path):
    together(3, "finetune.py", "--method", "lora", "--base", base, "--data", dataset, *QUICK,
             "--rank", 4, "--alpha", 16, "--out", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(lora)


def test_an_output_that_another_command_writes_is_refused(base, dataset, tmp_path):
    args = ("finetune.py", "--method", "lora", "--base", base, "--data", dataset,
            "--steps", 5000, "--out", tmp_path / "out")
    process = start(*args, "--checkpoint-every", 1, stdout=-1, stderr=-1)
    while not checkpointed(tmp_path / "out" / ".y0-a0.partial" / "loss.csv"):
        assert process.poll() is None
        time.sleep(0.01)
    run(*args, fails="out: is in use by another process")
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    "more", (("--method", "lora"),) + (("--method", "dreambooth"),) * LONG)
def test_a_killed_unit_resumes_exactly_from_its_checkpoint(base, dataset, tmp_path, more):
    data = make_dataset(tmp_path / "data", counts={(0, 0): 4})
    args = ("finetune.py", *more, "--base", base, "--data", data, "--steps", 60, "--batch", 2,
            "--learning-rate", 1e-2, "--schedule", "cosine")
    run(*args, "--checkpoint-every", 0, "--out", tmp_path / "whole")
    cut, reached = (*args, "--checkpoint-every", 2, "--out", tmp_path / "cut"), [0]
    for _ in range(1 + LONG):
        process = start(*cut, stdout=-1, stderr=-1)
        while (now := checkpointed(
                tmp_path / "cut" / ".y0-a0.partial" / "loss.csv")) <= reached[-1]:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        process.wait()
        reached.append(now)
    assert 0 < reached[1] <= reached[-1] < 60
    run(*cut)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def checkpointed(path):
    """Steps that a checkpoint holds, 0 where there is none at this moment."""
    try:
        return len(path.read_text().splitlines()) - 1
    except FileNotFoundError:
        return 0


def test_invalid_input_is_a_one_line_error(base, dataset, tmp_path):
    args = ("finetune.py", "--base", base, "--data", dataset, "--out", tmp_path / "out")
    run(*args, "--method", "lora", "--per", "cluster", fails="has no column 'cluster'")
    run(*args, "--method", "lora", "--train-text-encoder", fails="LoRA trains attention only")
    run(*args, "--method", "lora", "--prompt", "hi", fails="does not contain {text}")
    run("finetune.py", "--base", tmp_path, "--data", dataset, "--out", tmp_path / "out",
        "--method", "lora", fails="cannot be loaded")
    run(*args, "--method", "lora", "--prompt", "{text} " + "word " * 30,
        fails="tokens, the model takes 48")
    assert not list(tmp_path.glob("out/y*"))


def test_a_loss_that_is_not_finite_stops_the_unit_and_publishes_nothing(
        base, dataset, tmp_path, capsys):
    status = stage.call(finetune.main, [
        "--method", "dreambooth", "--base", str(base), "--data", str(dataset), "--steps", "9",
        "--learning-rate", "1e30", "--out", str(tmp_path / "out")])
    errors = capsys.readouterr().err
    assert (status == 1 and "(y1-a1): loss is nan at step" in errors
            and not list(tmp_path.glob("out/y*")))


def test_a_changed_unit_is_trained_again_and_a_comment_retrains_nothing(
        base, dataset, lora, tmp_path):
    """Whatever was lost or edited is made again, to the same bytes."""
    shutil.copytree(lora, tmp_path / "lora")
    again = ("finetune.py", "--method", "lora", "--base", base, "--data", dataset, *QUICK,
             "--rank", 4, "--alpha", 16, "--out", tmp_path / "lora")
    (tmp_path / "lora" / "y0-a1" / "loss.csv").unlink()
    with open(tmp_path / "lora" / "y1-a0" / "pytorch_lora_weights.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert (trained(run(*again)) == ["y0-a1", "y1-a0"]
            and files_of(tmp_path / "lora") == files_of(lora))


def test_the_digest_of_code_ignores_comments_docstrings_and_help(tmp_path):
    def digest(text):
        (tmp_path / "x.py").write_text(text)
        return made.code_digest(tmp_path / "x.py")

    first = digest('"""A."""\ndef f(x):\n    """B."""\n    return x + 1\n'
                   'parser.add("--x", help="a")\n')
    assert first == digest('"""C."""\n\ndef f(x):  # why\n    """D."""\n    return x + 1\n'
                           'parser.add("--x", help="b")\n')
    assert first != digest('"""A."""\ndef f(x):\n    """B."""\n    return x + 2\n'
                           'parser.add("--x", help="a")\n')


@pytest.mark.parametrize("balance, batch, steps", ((0, 2, 3), (0, 4, 20), (0.5, 2, 5)))
def test_the_images_that_steps_draw_and_no_others_are_encoded(balance, batch, steps):
    rows = [{"y": 0, "a": int(i > 20)} for i in range(24)]
    images = training.Images(None, rows, [""] * 24, (0, "x"), 2 * steps, batch, balance)
    assert set(images.drawn) == {i for step in range(2 * steps) for i in images.pick(step, batch)}
    assert len(images.drawn) == 24 if steps == 20 else len(images.drawn) <= 2 * steps * batch < 24
    assert all(row is rows[i] for i, row in images.drawn.items())
