"""evaluation/images.py: the measures against other libraries' numbers and by hand, the stage by its files."""

import csv
import shutil

import numpy as np
import pytest
from conftest import run

from evaluation.images import claims, kernel_distance, precision_recall_density_coverage, too_near


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


def test_clip_recognises_class_and_attribute_separately():
    """Four images that all claim y0-a1 and look like y0-a1, y0-a0, y1-a1 and y1-a0: half of each is as claimed."""
    prompts = dict(zip(("y0-a0", "y0-a1", "y1-a0", "y1-a1"), np.eye(4)))
    found = claims([{"y": 0, "a": 1}] * 4, np.eye(4)[[1, 0, 3, 2]], prompts)
    assert found == {"clip_class": 0.5, "clip_attribute": 0.5}


def test_a_synthetic_set_is_measured_against_held_out_images(base, dataset, vanilla, tmp_path):
    shutil.copytree(dataset, tmp_path / "copies")
    args = ("evaluation/images.py", "--data", dataset, "--synthetic", vanilla, tmp_path / "copies", "--clip",
            base / "clip", "--out", tmp_path / "images")
    run(*args)
    with open(tmp_path / "images" / "synthetic.csv") as file:
        drawn, copies = csv.DictReader(file)
    assert drawn["method"] == "vanilla" and drawn["images"] == "20" and drawn["rejected"] == "0.000"
    assert copies["images"] == "54"
    assert float(copies["kid"]) < float(drawn["kid"]) and 0 <= float(drawn["too_near"]) <= 1
    with open(tmp_path / "images" / "groups.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["clusters"] for row in rows[:8]] == ["1"] * 8
    assert [row["group"] for row in rows] == ["y0-a0", "y0-a1", "y1-a0", "y1-a1"] * 3 and rows[0]["method"] == "real"
    assert rows[1]["name"] == "even digit on a green background (y0-a1)"
    assert {"config.json", "cost.csv", "vanilla.png", "copies.png"} <= {p.name for p in (tmp_path / "images").iterdir()}
    assert "up to date" in run(*args)

    run("train_classifier.py", "--recipe", "erm", "--data", dataset, "--seeds", 0, "--epochs", 1, "--out",
        tmp_path / "classifiers" / "erm")
    text = run("evaluate.py", "--data", dataset, "--classifiers", tmp_path / "classifiers" / "erm", "--synthetic",
               vanilla, "--images", tmp_path / "images", "--out", tmp_path / "results")
    assert "| vanilla | 20 | 0.000 |" in text
    assert "| vanilla | 0 |" in (tmp_path / "results" / "cost.md").read_text()
