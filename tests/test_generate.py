"""generate.py: a group-balanced, filtered synthetic set."""

import json
import os
import shutil
import signal
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import files_of, make_dataset, run, start
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from common import files, imagefolder
from generate import share_out


@pytest.fixture(scope="module")
def command(base, dataset):
    return ("generate.py", "--base", base, "--clip", base / "clip", "--data", dataset, "--batch", 4, "--steps", 2,
            "--clip-threshold", 0)


def test_shares_sum_up_and_follow_the_weights():
    assert share_out(10, [30, 10, 10]) == [6, 2, 2]
    assert share_out(7, [1, 1, 1]) == [3, 2, 2]
    assert share_out(1, [5, 100]) == [0, 1]


def test_every_group_has_as_many_images_in_the_one_format(vanilla):
    rows = imagefolder.read_metadata(vanilla)
    assert set(imagefolder.group_counts(rows).values()) == {5} and {row["split"] for row in rows} == {"train"}
    assert len({row["seed"] for row in rows}) == 20
    assert {"unit", "clip_score"} <= set(rows[0])
    assert all((vanilla / f"{group}.png").is_file() for group in imagefolder.group_counts(rows))


def test_more_images_keep_the_first_and_fewer_are_a_part(command, vanilla, tmp_path):
    shutil.copytree(vanilla, tmp_path / "v")
    run(*command, "--images", 9, "--out", tmp_path / "v")
    more = {row["file_name"]: row for row in imagefolder.read_metadata(tmp_path / "v")}
    assert all(more[row["file_name"]] == row for row in imagefolder.read_metadata(vanilla)) and len(more) == 36
    run(*command, "--images", 5, "--out", tmp_path / "v")
    assert (tmp_path / "v" / "metadata.csv").read_bytes() == (vanilla / "metadata.csv").read_bytes()


def test_a_killed_generation_resumes_and_draws_the_same_bytes(command, tmp_path):
    args = (*command, "--images", 40, "--out")
    run(*args, tmp_path / "whole")
    process = start(*args, tmp_path / "cut", stdout=-1, stderr=-1, start_new_session=True)
    while not list(tmp_path.glob("cut/.y0-a1.partial/candidates.csv")):
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "metadata.csv").exists()
    first = (tmp_path / "cut" / "y0-a0" / "00000.png").stat().st_mtime_ns
    run(*args, tmp_path / "cut")
    assert (tmp_path / "cut" / "y0-a0" / "00000.png").stat().st_mtime_ns == first
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    assert not list(tmp_path.glob("cut/.y*"))


def test_batch_size_changes_images_by_float_noise_alone(command, vanilla, tmp_path):
    run(*command, "--images", 5, "--batch", 3, "--out", tmp_path / "v")
    for row in imagefolder.read_metadata(vanilla):
        one, other = (np.asarray(Image.open(path / row["file_name"]), int) for path in (vanilla, tmp_path / "v"))
        assert abs(one - other).max() <= 1


def test_what_clip_rejects_is_counted_and_replaced(command, vanilla, tmp_path):
    scores = [statistics.median(float(row["clip_score"]) for row in imagefolder.read_metadata(vanilla)
                                if imagefolder.group_of(row) == group) for group in ("y0-a0", "y0-a1", "y1-a0", "y1-a1")]
    threshold = min(scores)  # about half of the images of one group are below it
    run(*command, "--images", 5, "--clip-threshold", threshold, "--max-tries", 50, "--out", tmp_path / "v")
    rows = imagefolder.read_metadata(tmp_path / "v")
    assert set(imagefolder.group_counts(rows).values()) == {5}
    assert all(float(row["clip_score"]) >= round(threshold, 4) for row in rows)
    counts = json.loads((tmp_path / "v" / "config.json").read_text())["counts"]
    assert all(count["kept"] == 5 for count in counts.values()) and any(count["clip"] for count in counts.values())


def test_a_unit_that_cannot_fill_its_share_is_a_one_line_error(command, tmp_path):
    run(*command, "--images", 5, "--clip-threshold", 1, "--max-tries", 2, "--out", tmp_path / "v",
        fails="even digit on a red background (y0-a0): 0 of 16 images kept, 5 wanted")
    assert not (tmp_path / "v" / "metadata.csv").exists()


def test_a_group_without_training_images_falls_back_to_the_base_and_is_reported(base, dataset, command, tmp_path):
    data = make_dataset(tmp_path / "data", counts={(0, 0): 4, (1, 0): 0, (1, 1): 4})
    run("finetune.py", "--method", "lora", "--base", base, "--data", data, "--steps", 2, "--out", tmp_path / "lora")
    text = run(*command[:5], "--data", data, *command[7:], "--models", tmp_path / "lora", "--images", 3,
               "--out", tmp_path / "v")
    assert "odd digit on a red background (y1-a0): no training images, drawn by the base model" in text
    assert imagefolder.group_counts(imagefolder.read_metadata(tmp_path / "v")) == {"y0-a0": 3, "y1-a0": 3, "y1-a1": 3}
    units = {row["unit"] for row in imagefolder.read_metadata(tmp_path / "v")}
    assert units == {"y0-a0", "y1-a0", "y1-a1"}


def test_an_image_can_be_drawn_again_from_its_row_in_plain_diffusers(base, dataset, command, tmp_path):
    """metadata.csv has prompt and seed, config.json steps, guidance scale and base."""
    run("finetune.py", "--method", "lora", "--base", base, "--data", dataset, "--steps", 2, "--learning-rate", 0.1, "--out",
        tmp_path / "lora")
    run(*command, "--models", tmp_path / "lora", "--images", 1, "--out", tmp_path / "v")
    row = imagefolder.read_metadata(tmp_path / "v")[-1]
    settings = files.read_json(tmp_path / "v" / "config.json")["arguments"]
    pipe = StableDiffusionPipeline.from_pretrained(settings["base"])
    pipe.load_lora_weights(Path(settings["models"]) / row["unit"])
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="dpmsolver++")
    image = pipe(row["prompt"], num_inference_steps=settings["steps"], guidance_scale=settings["guidance_scale"],
                 generator=torch.Generator().manual_seed(int(row["seed"]))).images[0]
    drawn = np.asarray(Image.open(tmp_path / "v" / row["file_name"]), int)
    assert row["prompt"] == f"{row['text']} sks" and abs(drawn - np.asarray(image, int)).max() <= 1 < drawn.std()


def test_a_lost_or_edited_image_is_drawn_again(command, vanilla, tmp_path):
    shutil.copytree(vanilla, tmp_path / "v")
    (tmp_path / "v" / "y0-a0" / "00002.png").unlink()
    (tmp_path / "v" / "y1-a1" / "00000.png").write_bytes(b"edited")
    (tmp_path / "v" / "y1-a0" / "candidates.csv").unlink()
    run(*command, "--images", 5, "--out", tmp_path / "v")
    assert files_of(tmp_path / "v") == files_of(vanilla)


def test_weights_of_another_base_or_changed_since_are_refused(base, dataset, command, tmp_path):
    run("finetune.py", "--method", "lora", "--base", base, "--data", dataset, "--steps", 1, "--out", tmp_path / "lora")
    other = shutil.copytree(base, tmp_path / "other")
    files.write_json(other / "scheduler" / "scheduler_config.json",
                     files.read_json(other / "scheduler" / "scheduler_config.json") | {"beta_end": 0.013})
    args = ("--models", tmp_path / "lora", "--images", 1, "--out", tmp_path / "v")
    run("generate.py", "--base", other, *command[3:], *args, fails="was fine-tuned from another base model than --base")
    shutil.rmtree(tmp_path / "lora" / "y0-a1")
    run(*command, *args, fails="y0-a1: the unit was removed or changed since fine-tuning (run finetune.py again)")
    assert not (tmp_path / "v" / "metadata.csv").exists()


def test_an_output_or_input_in_use_by_another_process_is_refused(base, dataset, command, tmp_path):
    """The kernel releases a lock when its process ends, however it ends."""
    args = ("--images", 400, "--out", tmp_path / "v")
    process = start(*command, *args, stdout=-1, stderr=-1)
    while not list(tmp_path.glob("v/.y0-a0.partial/*.png")):
        assert process.poll() is None
        time.sleep(0.01)
    run(*command, *args, fails="v: is in use by another process (wait for it to finish, or stop it)")
    run("train_classifier.py", "--recipe", "two-stage", "--data", dataset, "--synthetic", vanilla_of(tmp_path), "--out",
        tmp_path / "c", fails="v: is in use by another process")
    process.kill()
    process.wait()
    run(*command, "--images", 1, "--out", tmp_path / "v")


def vanilla_of(path):
    """A folder that looks complete while another process writes it."""
    row = {"file_name": "y0-a0/x.png", "split": "train", "y": 0, "a": 0, "text": "x"}
    (path / "v" / "y0-a0").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(path / "v" / "y0-a0" / "x.png")
    files.write_csv(path / "v" / "metadata.csv", [row])
    return path / "v"


def test_a_unit_without_a_share_is_not_drawn(base, dataset, command, tmp_path):
    run("cluster.py", "--data", dataset, "--clip", base / "clip", "--k", 5, "--min-size", 2, "--out", tmp_path / "c")
    run("finetune.py", "--method", "lora", "--per", "cluster", "--base", base, "--data", tmp_path / "c", "--steps", 1,
        "--out", tmp_path / "lora")
    args = (*command, "--models", tmp_path / "lora", "--images", 2, "--out", tmp_path / "v")
    assert "wanted" in run(*args)
    assert "wanted" not in run(*args) and len(imagefolder.read_metadata(tmp_path / "v")) == 8


def test_invalid_input_is_a_one_line_error(command, tmp_path):
    run(*command, "--models", tmp_path, "--out", tmp_path / "v", fails="config.json: not found")
    run(*command, "--drop-weights", "--out", tmp_path / "v", fails="--drop-weights: the base model draws")
    assert not (tmp_path / "v" / "metadata.csv").exists()
