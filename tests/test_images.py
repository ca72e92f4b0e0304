"""evaluation/images.py: the measures against other libraries' numbers and by hand,
the stage by its files."""

import csv
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import ROOT, run, slow

from common import files
from evaluation import images
from evaluation.images import (claims, generator_leakage, group_rows, kernel_distance,
                               precision_recall_density_coverage, real_gap, too_near, unfit)


@pytest.fixture(scope="module")
def points():
    rng = np.random.default_rng(0)
    rng.integers(0, 2, 60), rng.integers(0, 3, 60), rng.random(60)
    return rng.normal(size=(40, 6)), rng.normal(0.5, 1, size=(50, 6))


def test_precision_recall_density_and_coverage_are_those_of_prdc(points):
    """Recorded from compute_prdc of prdc 0.2 (pip), the code of Naeem et al. 2020,
    with nearest_k=5."""
    found = precision_recall_density_coverage(*points)
    assert found == pytest.approx(
        {"precision": 0.875, "recall": 0.82, "density": 0.62, "coverage": 0.6})


def test_the_kernel_distance_is_that_of_torchmetrics(points):
    """Recorded from poly_mmd of torchmetrics 1.9.0 (pip), which takes sets of one size only."""
    synthetic, real = points
    assert kernel_distance(synthetic, real[:40]) == pytest.approx(1.5453357962604253, rel=1e-6)
    assert kernel_distance(synthetic, real[:1]) is None


def plain_measures(synthetic, real, train, k=5):
    """The same measures from whole matrices, as their papers write them."""
    def distances(x, y):
        return np.linalg.norm(x[:, None] - y[None], axis=2)

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    within = [kernel(x, x)[~np.eye(len(x), dtype=bool)].mean() for x in (synthetic, real)]
    radius, real_radius = (np.sort(distances(x, x))[:, k] for x in (synthetic, real))
    between = distances(synthetic, real)
    in_real = between < real_radius
    threshold = np.quantile(distances(real, train).min(1), 0.01)
    return {"kid": sum(within) - 2 * kernel(synthetic, real).mean(),
            "precision": in_real.any(1).mean(),
            "recall": (between < radius[:, None]).any(0).mean(),
            "density": in_real.sum() / k / len(synthetic), "coverage": in_real.any(0).mean(),
            "too_near": (distances(synthetic, train).min(1) <= threshold).mean()}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_measures_in_blocks_are_those_of_whole_matrices(monkeypatch, dtype):
    monkeypatch.setattr(images, "BLOCK", 7)
    rng = np.random.default_rng(0)
    synthetic, real, train = (rng.normal(shift, 1, size=(n, 8)).astype("float32") / 8
                              for shift, n in ((0.3, 200), (0, 150), (0, 90)))
    synthetic[:30] = train[:30]  # copies
    synthetic, real = synthetic.astype(float), real.astype(float)
    found = {"kid": kernel_distance(synthetic, real),
             **precision_recall_density_coverage(synthetic, real),
             "too_near": too_near(synthetic, train.astype(dtype), real)[0]}
    assert found == pytest.approx(plain_measures(synthetic, real, train.astype(float)), abs=1e-6)


def test_memory_does_not_grow_with_the_square_of_the_images():
    """One matrix of 6,000 x 6,000 distances would take 288 MB, a block of it 24 MB."""
    points = np.random.default_rng(0).normal(size=(6000, 4))
    kernel_distance(points[:9], points[:9])
    tracemalloc.start()
    (kernel_distance(points, points), precision_recall_density_coverage(points, points),
     too_near(points, points, points))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6, f"{peak / 1e6:.0f} MB"


def test_the_images_that_are_compared_are_a_draw_of_set_and_group_alone(monkeypatch):
    monkeypatch.setattr(images, "LIMIT", 10)
    rows = [{"y": i % 2, "a": 0} for i in range(60)]
    draw = images.drawn("lora", rows, "y1-a0")
    assert (draw == images.drawn("lora", rows, "y1-a0") and len(set(draw)) == 10
            and all(i % 2 for i in draw))
    assert draw != images.drawn("vanilla", rows, "y1-a0")
    assert images.drawn("lora", rows[:20], "y1-a0") == list(range(1, 20, 2))


SOAK = """
import resource, time, numpy as np
import torch  # as the stage does
from evaluation.images import group_rows
rng = np.random.default_rng(0)
def of(*sizes):  # images per group
    rows = [{"y": i // 2, "a": i % 2} for i, size in enumerate(sizes) for _ in range(size)]
    return rows, rng.standard_normal((len(rows), 768), "float32") / 768 ** 0.5
real = {"train": of(71629, 66874, 22880, 1387), "held-out": of(18302, 15151, 5946, 430)}
synthetic, begin = of(20000, 5000, 5000, 5000), time.process_time()
group_rows("lora", *synthetic, real, {}, {})
print(time.process_time() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


@slow
def test_images_as_many_as_those_of_celeba_fit_in_2_gb():
    """About 0.6 GB is torch, 0.7 GB the embeddings."""
    done = subprocess.run([sys.executable, "-c", SOAK], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    seconds, peak = map(float, done.stdout.split())
    print(f"\nCelebA's images: {seconds:.0f} s of CPU, peak memory {peak:.2f} GB")
    assert peak < 2


def test_copies_of_training_images_are_too_near_and_new_ones_as_often_as_real_ones():
    rng = np.random.default_rng(0)
    train, held_out, new = (rng.normal(size=(n, 4)) for n in (50, 1000, 1000))
    assert too_near(train[:20] + 1e-6, train, held_out)[0] == 1
    assert too_near(new, train, held_out)[0] < 0.03


def test_clip_recognises_class_and_attribute_separately():
    """Four images that all claim y0-a1 and look like y0-a1, y0-a0, y1-a1 and y1-a0:
    half of each is as claimed."""
    prompts = dict(zip(("y0-a0", "y0-a1", "y1-a0", "y1-a1"), np.eye(4)))
    found = claims([{"y": 0, "a": 1}] * 4, np.eye(4)[[1, 0, 3, 2]], prompts)
    assert found == {"clip_class": 0.5, "clip_attribute": 0.5}


BIASED = {"y0-a0": 90, "y0-a1": 10, "y1-a0": 10, "y1-a1": 90}


def embedded(*sizes, seed=0, signature=0, cue=0, groups=tuple(BIASED)):
    """Rows and (N, 16) embeddings that show class and attribute, in noise.

    signature: how strong a trace each group's model leaves; cue: how much more of the class they
    show than others do.
    """
    rng, traces = np.random.default_rng(seed), np.random.default_rng(9).normal(size=(4, 16))
    rows = [dict(zip("ya", images.imagefolder.labels_of(group)))
            for group, n in zip(groups, sizes) for _ in range(n)]
    embeddings = rng.normal(size=(len(rows), 16))
    for row, point in zip(rows, embeddings):
        point += signature * traces[2 * row["y"] + row["a"]]
        point[:3] += 2 * row["y"], 4 * row["a"], cue * row["y"]
    return rows, embeddings


@pytest.mark.parametrize("sizes", [(200, 200, 200, 200), (600, 30, 30, 600)])
def test_leakage_is_near_1_if_each_group_has_a_model_of_its_own_and_else_near_chance(sizes):
    found = generator_leakage(*embedded(*sizes), BIASED)
    assert (list(found) == list(BIASED)
            and np.mean(list(found.values())) == pytest.approx(0.5, abs=0.06))
    assert min(generator_leakage(*embedded(*sizes, signature=3), BIASED).values()) > 0.95


def test_the_gap_to_real_images_is_large_if_only_synthetic_images_show_a_cue():
    real = embedded(200, 200, 200, 200, seed=1)
    assert np.abs(list(real_gap(*embedded(300, 300, 300, 300), *real).values())).max() < 0.06
    assert np.mean(list(real_gap(*embedded(300, 300, 300, 300, cue=9), *real).values())) > 0.3


def test_what_the_probes_cannot_measure_is_left_empty():
    real, full = embedded(20, 20, 20, 20), embedded(9, 9, 9, 9)
    # one class, one attribute, one group
    for groups in (["y0-a0", "y0-a1"], ["y0-a0", "y1-a0"], ["y0-a0"]):
        part = embedded(*[9] * len(groups), groups=groups)
        assert generator_leakage(*part, BIASED) == {}
        assert bool(real_gap(*part, *real)) == (groups[-1] == "y1-a0")
    # class and attribute are independent
    assert generator_leakage(*full, dict.fromkeys(BIASED, 9)) == {}
    assert generator_leakage(*embedded(9, 9, 9, 4), BIASED) == {}
    assert list(real_gap(*embedded(9, 9, 9, 4), *real)) == ["y0-a0", "y0-a1", "y1-a0"]
    assert list(real_gap(*full, *embedded(9, 9, 0, 9))) == ["y0-a0", "y0-a1", "y1-a1"]
    table = group_rows("lora", *embedded(9, 9, 9, 4),
                       {"train": full, "held-out": embedded(9, 9, 0, 9)}, {}, {})
    assert [(row["leakage"], row["real_gap"] != "") for row in table] == [
        ("", True), ("", True), ("", False), ("", False)]


def test_a_base_that_does_not_know_the_images_is_told():
    real = {"method": "real", "images": 1000, "coverage": "0.500", "clip_class": "0.900"}
    good = {"method": "vanilla", "images": 1000, "coverage": "0.051", "clip_class": "0.540"}
    assert unfit(good, real, 2) == "" and unfit(good | {"coverage": ""}, real, 2) == ""
    assert ("they cover 0.049 of the held-out images (real training images: 0.500). "
            "Choose another") in unfit(good | {"coverage": "0.049"}, real, 2)
    assert "CLIP recognises the class in 0.530 of them (chance: 0.500)" in unfit(
        good | {"clip_class": "0.530"}, real, 2)
    assert unfit(good | {"clip_class": "1.000"}, real, 1) == ""


def test_a_synthetic_set_is_measured_against_held_out_images(
        base, dataset, embeddings, vanilla, tmp_path):
    shutil.copytree(dataset, tmp_path / "copies")
    args = ("evaluation/images.py", "--data", dataset, "--embeddings", embeddings,
            "--synthetic", vanilla, tmp_path / "copies", "--clip", base / "clip",
            "--out", tmp_path / "images")
    run(*args)
    with open(tmp_path / "images" / "synthetic.csv") as file:
        real, drawn, copies = csv.DictReader(file)
    assert (real["method"] == "real" and real["images"] == "54"
            and real["too_near"] == real["rejected"] == "")
    assert drawn["method"] == "vanilla" and drawn["images"] == "20" and drawn["rejected"] == "0.000"
    assert copies["images"] == "54"
    assert (0 <= float(drawn["leakage"]) <= 1 and -1 <= float(drawn["real_gap"]) <= 1
            and copies["leakage"] == "")
    assert float(copies["kid"]) < float(drawn["kid"]) and 0 <= float(drawn["too_near"]) <= 1
    with open(tmp_path / "images" / "groups.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["clusters"] for row in rows[:8]] == ["1"] * 8
    assert ([row["group"] for row in rows] == ["y0-a0", "y0-a1", "y1-a0", "y1-a1"] * 3
            and rows[0]["method"] == "real")
    assert rows[1]["name"] == "even digit on a green background (y0-a1)"
    assert {"config.json", "cost.csv", "vanilla.png", "copies.png"} <= {
        p.name for p in (tmp_path / "images").iterdir()}
    text = (tmp_path / "images" / "images.md").read_text()
    assert (f"| vanilla | 20 | 0.000 | {drawn['kid']} |" in text and "| vanilla | 0 |" in text
            and "leakage: accuracy of" in text)
    assert "up to date" in run(*args)


def test_the_log_the_tables_and_the_record_tell_of_a_base_that_draws_something_else(
        base, dataset, embeddings, vanilla, tmp_path):
    shutil.copytree(vanilla, tmp_path / "swapped")
    rows = files.read_csv(vanilla / "metadata.csv")
    files.write_csv(tmp_path / "swapped" / "metadata.csv",
                    [row | {"y": 1 - int(row["y"])} for row in rows])
    said = run("evaluation/images.py", "--data", dataset, "--embeddings", embeddings,
               "--synthetic", tmp_path / "swapped", "--clip", base / "clip",
               "--out", tmp_path / "images")
    [note] = files.read_json(tmp_path / "images" / "config.json")["notes"]
    assert note.startswith("The base model or CLIP does not know images like these, "
                           "as those of swapped show: ")
    assert note in said and note in (tmp_path / "images" / "images.md").read_text()


def test_what_the_filter_left_out_is_rejected_and_what_completes_a_batch_is_not(
        base, dataset, embeddings, tmp_path):
    run("generate.py", "--base", base, "--clip", base / "clip", "--data", dataset,
        "--embeddings", embeddings, "--images", 3, "--steps", 1, "--batch", 8,
        "--out", tmp_path / "drawn")
    run("evaluation/images.py", "--data", dataset, "--embeddings", embeddings,
        "--synthetic", tmp_path / "drawn", "--clip", base / "clip", "--out", tmp_path / "images")
    with open(tmp_path / "images" / "synthetic.csv") as file:
        assert [row["rejected"] for row in csv.DictReader(file)] == ["", "0.250"]
