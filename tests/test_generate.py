"""generate.py: a group-balanced, filtered synthetic set."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
from conftest import ROOT, files_of, run

from data import imagefolder as folder
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
    rows = folder.read_metadata(vanilla)
    assert set(folder.group_counts(rows).values()) == {5} and {row["split"] for row in rows} == {"train"}
    assert len({row["seed"] for row in rows}) == 20
    assert {"unit", "clip_score"} <= set(rows[0])
    assert all((vanilla / f"{group}.png").is_file() for group in folder.group_counts(rows))


def test_more_images_keep_the_first_and_fewer_are_a_part(command, vanilla, tmp_path):
    shutil.copytree(vanilla, tmp_path / "v")
    run(*command, "--images", 9, "--out", tmp_path / "v")
    more = {row["file_name"]: row for row in folder.read_metadata(tmp_path / "v")}
    assert all(more[row["file_name"]] == row for row in folder.read_metadata(vanilla)) and len(more) == 36
    run(*command, "--images", 5, "--out", tmp_path / "v")
    assert (tmp_path / "v" / "metadata.csv").read_bytes() == (vanilla / "metadata.csv").read_bytes()


def test_a_killed_generation_goes_on_and_makes_the_same_bytes(command, tmp_path):
    args = (*command, "--images", 40, "--out")
    run(*args, tmp_path / "whole")
    process = subprocess.Popen([sys.executable, *map(str, (ROOT / args[0], *args[1:], tmp_path / "cut"))],
                               stdout=-1, stderr=-1, start_new_session=True)
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
    assert not list(tmp_path.glob("cut/.*"))


def test_batch_size_changes_images_by_float_noise_alone(command, vanilla, tmp_path):
    import numpy as np
    from PIL import Image

    run(*command, "--images", 5, "--batch", 3, "--out", tmp_path / "v")
    for row in folder.read_metadata(vanilla):
        one, other = (np.asarray(Image.open(path / row["file_name"]), int) for path in (vanilla, tmp_path / "v"))
        assert abs(one - other).max() <= 1


def test_what_clip_rejects_is_counted_and_replaced(command, vanilla, tmp_path):
    scores = [statistics.median(float(row["clip_score"]) for row in folder.read_metadata(vanilla)
                                if folder.group_of(row) == group) for group in ("y0-a0", "y0-a1", "y1-a0", "y1-a1")]
    threshold = min(scores)  # about half of the images of one group are below it
    run(*command, "--images", 5, "--clip-threshold", threshold, "--max-tries", 50, "--out", tmp_path / "v")
    rows = folder.read_metadata(tmp_path / "v")
    assert set(folder.group_counts(rows).values()) == {5}
    assert all(float(row["clip_score"]) >= round(threshold, 4) for row in rows)
    counts = json.loads((tmp_path / "v" / "config.json").read_text())["counts"]
    assert all(count["kept"] == 5 for count in counts.values()) and any(count["clip"] for count in counts.values())


def test_a_unit_that_cannot_fill_its_share_is_one_line(command, tmp_path):
    run(*command, "--images", 5, "--clip-threshold", 1, "--max-tries", 2, "--out", tmp_path / "v",
        fails="y0-a0: 0 of 16 images kept, 5 wanted")
    assert not (tmp_path / "v" / "metadata.csv").exists()


def test_a_group_without_training_images_falls_back_to_the_base_and_is_reported(base, dataset, command, tmp_path):
    from conftest import make_dataset

    data = make_dataset(tmp_path / "data", counts={(0, 0): 4, (1, 0): 0, (1, 1): 4})
    run("finetune.py", "--method", "lora", "--base", base, "--data", data, "--steps", 2, "--out", tmp_path / "lora")
    text = run(*command[:5], "--data", data, *command[7:], "--models", tmp_path / "lora", "--images", 3,
               "--out", tmp_path / "v")
    assert "y1-a0: no training images, drawn by the base model" in text
    assert folder.group_counts(folder.read_metadata(tmp_path / "v")) == {"y0-a0": 3, "y1-a0": 3, "y1-a1": 3}
    units = {row["unit"] for row in folder.read_metadata(tmp_path / "v")}
    assert units == {"y0-a0", "y1-a0", "y1-a1"}


def test_wrong_input_is_one_line(command, tmp_path):
    run(*command, "--models", tmp_path, "--out", tmp_path / "v", fails="no such file")
    draw = {"unit": "y0-a0", "key": "k", "y": 0, "a": 0, "suffix": "", "prompt": "{text}", "images": 1}
    folder.write_json(tmp_path / "config.json", {"draws": [draw]})
    run(*command, "--models", tmp_path, "--images", 1, "--out", tmp_path / "v", fails="neither a LoRA nor a UNet")
    (tmp_path / "y0-a0").mkdir()
    (tmp_path / "y0-a0" / "pytorch_lora_weights.safetensors").write_bytes(b"no weights")
    run(*command, "--models", tmp_path, "--images", 1, "--out", tmp_path / "v", fails="can't be loaded")
    assert not (tmp_path / "v" / "metadata.csv").exists()
