"""evaluate_images.py: the measures against other libraries' numbers and by hand, the stage by its files."""

import csv
import shutil

import numpy as np
import pytest
from conftest import run

from data import imagefolder as folder
from evaluate_images import claims, kernel_distance, precision_recall_density_coverage, too_near


@pytest.fixture(scope="module")
def points():
    rng = np.random.default_rng(0)
    rng.integers(0, 2, 60), rng.integers(0, 3, 60), rng.random(60)
    return rng.normal(size=(40, 6)), rng.normal(0.5, 1, size=(50, 6))


def test_precision_recall_density_and_coverage_are_those_of_prdc(points):
    """Recorded from compute_prdc of prdc 0.2 (pip), the code of Naeem et al. 2020, with nearest_k=5."""
    found = precision_recall_density_coverage(*points)
    assert found == pytest.approx({"precision": 0.875, "recall": 0.82, "density": 0.62, "coverage": 0.6})


def test_the_kernel_distance_is_that_of_torchmetrics(points):
    """Recorded from poly_mmd of torchmetrics 1.9.0 (pip), which takes sets of one size only."""
    synthetic, real = points
    assert kernel_distance(synthetic, real[:40]) == pytest.approx(1.5453357962604253, rel=1e-6)
    assert kernel_distance(synthetic, real[:1]) is None


def test_copies_of_training_images_are_too_near_and_new_ones_as_often_as_real_ones():
    rng = np.random.default_rng(0)
    train, held_out, new = (rng.normal(size=(n, 4)) for n in (50, 1000, 1000))
    assert too_near(train[:20] + 1e-6, train, held_out)[0] == 1
    assert too_near(new, train, held_out)[0] < 0.03


def test_clip_tells_class_and_attribute_apart():
    """Four images that all claim y0-a1 and look like y0-a1, y0-a0, y1-a1 and y1-a0: half of each is as claimed."""
    prompts = dict(zip(("y0-a0", "y0-a1", "y1-a0", "y1-a1"), np.eye(4)))
    found = claims([{"y": 0, "a": 1}] * 4, np.eye(4)[[1, 0, 3, 2]], prompts)
    assert found == {"clip_class": 0.5, "clip_attribute": 0.5}


def test_a_synthetic_set_is_measured_and_asked_whether_it_is_what_it_claims(base, dataset, vanilla, tmp_path):
    """The judge of colour knows the grounds: real images in the place of synthetic ones are all right."""
    run("train_classifier.py", "--recipe", "erm", "--data", dataset, "--seeds", 0, "--epochs", 1, "--out",
        tmp_path / "c")
    shutil.copytree(dataset, tmp_path / "copies")
    folder.write_json(tmp_path / "copies" / "config.json", {"arguments": {"models": None}})
    run("evaluate_images.py", "--data", dataset, "--synthetic", vanilla, tmp_path / "copies", "--clip", base / "clip",
        "--judge", tmp_path / "c" / "seed0", "--out", tmp_path / "images")
    with open(tmp_path / "images" / "synthetic.csv") as file:
        drawn, copies = csv.DictReader(file)
    assert drawn["method"] == "vanilla" and drawn["images"] == "20" and drawn["rejected"] == "0.000"
    assert copies["images"] == "54" and copies["judge_colour"] == "1.000"
    assert float(copies["kid"]) < float(drawn["kid"]) and 0 <= float(drawn["too_near"]) <= 1
    with open(tmp_path / "images" / "groups.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["clusters"] for row in rows[:8]] == ["1"] * 8
    assert [row["group"] for row in rows] == ["y0-a0", "y0-a1", "y1-a0", "y1-a1"] * 3 and rows[0]["method"] == "real"
    assert {"config.json", "cost.csv", "vanilla.png", "copies.png"} <= {p.name for p in (tmp_path / "images").iterdir()}

    run("train_classifier.py", "--recipe", "erm", "--data", dataset, "--seeds", 0, "--epochs", 1, "--out",
        tmp_path / "classifiers" / "erm")
    text = run("evaluate.py", "--data", dataset, "--classifiers", tmp_path / "classifiers" / "erm", "--synthetic",
               vanilla, "--images", tmp_path / "images", "--out", tmp_path / "results")
    assert "| vanilla | 20 | 0.000 |" in text and "| vanilla | 0 |" in text
    assert "| vanilla | 0 |" in (tmp_path / "results" / "cost.md").read_text()
    run("evaluate_images.py", "--data", dataset, "--synthetic", vanilla, "--clip", base / "clip", "--judge", tmp_path,
        "--out", tmp_path / "i", fails=f"--judge {tmp_path}: can't be loaded")
