"""evaluate.py: the metrics by hand, the files they end in."""

import csv

import pytest
from conftest import run

from data import imagefolder as folder
from evaluate import group_accuracies, metrics


def answers(path, wrong):
    """A predictions.csv of 4 test images a group, `wrong[group]` of them misclassified, and one image of val."""
    rows = [{"file_name": "val.png", "split": "val", "y": 0, "a": 0, "prediction": 1}]
    for y in (0, 1):
        for a in (0, 1):
            rows += [{"file_name": f"{y}{a}{i}.png", "split": "test", "y": y, "a": a,
                      "prediction": 1 - y if i < wrong.get((y, a), 0) else y} for i in range(4)]
    folder.write_csv(path / "predictions.csv", rows)
    return [row for row in rows if row["split"] == "test"]


def test_the_metrics_agree_with_a_hand_worked_example(tmp_path):
    accuracies = group_accuracies(answers(tmp_path, {(0, 1): 1, (1, 0): 3}))
    assert accuracies == {"y0-a0": 1, "y0-a1": 0.75, "y1-a0": 0.25, "y1-a1": 1}
    weighted = metrics(accuracies, {"y0-a0": 90, "y0-a1": 4, "y1-a0": 6})
    assert weighted == {"worst_group": 0.25, "mean_group": 0.75, "train_weighted": pytest.approx(0.945)}


def test_the_table_is_sorted_and_holds_mean_and_deviation_over_seeds(dataset, tmp_path):
    for recipe, seed, wrong in (("bad", 0, 4), ("bad", 1, 2), ("good", 0, 0), ("good", 1, 1)):
        answers(tmp_path / recipe / f"seed{seed}", {(1, 0): wrong})
    text = run("evaluate.py", "--data", dataset, "--classifiers", tmp_path / "bad", tmp_path / "good",
               "--out", tmp_path / "results")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[2].startswith("| good | 0.875 ± 0.177 |") and lines[3].startswith("| bad | 0.250 ± 0.354 |")
    with open(tmp_path / "results" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["recipe", "seed", "group", "metric", "value"] and len(rows) == 4 * 7
    assert {"recipe": "bad", "seed": "1", "group": "y1-a0", "metric": "accuracy", "value": "0.500000"} in rows
    assert all((tmp_path / "results" / name).is_file() for name in ("worst_group.png", "images.png", "results.md"))


def test_recipes_tested_on_different_images_are_not_compared(dataset, tmp_path):
    answers(tmp_path / "a" / "seed0", {})
    rows = answers(tmp_path / "b" / "seed0", {})
    folder.write_csv(tmp_path / "b" / "seed0" / "predictions.csv", rows[1:])
    run("evaluate.py", "--data", dataset, "--classifiers", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "r",
        fails="was tested on other images")


def test_missing_and_broken_predictions_are_one_line(dataset, tmp_path):
    args = ("evaluate.py", "--data", dataset, "--classifiers", tmp_path / "a", "--out", tmp_path / "r")
    run(*args, fails="holds no seed")
    (tmp_path / "a" / "seed0").mkdir(parents=True)
    run(*args, fails="predictions.csv: can't be read")
    (tmp_path / "a" / "seed0" / "predictions.csv").write_text("split,y\ntest,x\n")
    run(*args, fails="predictions.csv: can't be read")
    assert not (tmp_path / "r").exists()
