"""evaluate.py: the metrics by hand, the files they end in."""

import csv
import shutil

import numpy as np
import pytest
from conftest import run

from common import files, imagefolder
from evaluate import fairness, intervals_of, metrics, summary, tidy_results
from evaluation.tables import difference


def predictions_of(path, wrong):
    """A predictions.csv of 4 test images a group, `wrong[group]` of them misclassified, and one
    image of val."""
    rows = [{"file_name": "val.png", "split": "val", "y": 0, "a": 0, "prediction": 1}]
    for y in (0, 1):
        for a in (0, 1):
            rows += [{"file_name": f"{y}{a}{i}.png", "split": "test", "y": y, "a": a,
                      "prediction": 1 - y if i < wrong.get((y, a), 0) else y} for i in range(4)]
    files.write_csv(path / "predictions.csv", rows)
    return [row for row in rows if row["split"] == "test"]


def test_the_metrics_agree_with_a_hand_worked_example(tmp_path):
    rows = predictions_of(tmp_path, {(0, 1): 1, (1, 0): 3})
    accuracies = imagefolder.group_accuracies(rows, [row["prediction"] for row in rows])
    assert accuracies == {"y0-a0": 1, "y0-a1": 0.75, "y1-a0": 0.25, "y1-a1": 1}
    weighted = metrics(accuracies, {"y0-a0": 90, "y0-a1": 4, "y1-a0": 6})
    assert weighted == {"worst_group": 0.25, "average_group": 0.75,
                        "train_weighted": pytest.approx(0.945), "gap": 0.75}


def test_fairness_is_that_of_fairlearn():
    """Recorded from equalized_odds_difference and demographic_parity_difference of fairlearn
    0.15.0 (pip)."""
    rng = np.random.default_rng(0)
    y, a = rng.integers(0, 2, 60), rng.integers(0, 3, 60)
    predictions = np.where(rng.random(60) < 0.3, 1 - y, y)
    found = fairness([{"y": int(i), "a": int(j), "prediction": int(k)}
                      for i, j, k in zip(y, a, predictions)], {})
    assert found["equalised_odds"] == pytest.approx(0.175)
    assert found["demographic_parity"] == pytest.approx(0.1842105263157895)


def test_bias_conflicting_images_have_an_attribute_that_their_class_is_not_correlated_with(
        tmp_path):
    rows = predictions_of(tmp_path, {(0, 1): 1, (1, 0): 3, (1, 1): 4})
    # attribute 1 is over-represented in class 1
    counts = {"y0-a0": 60, "y0-a1": 20, "y1-a0": 10, "y1-a1": 10}
    assert fairness(rows, counts)["conflicting"] == 0.5  # 3 of 4 in y0-a1, 1 of 4 in y1-a0


def test_runs_with_other_models_are_one_recipe(dataset, tmp_path):
    """The seeds of a run share its diffusion models: the spread is that of the runs' means."""
    for run_name, wrong in (("a", 0), ("b", 2)):
        for seed in (0, 1):
            predictions_of(tmp_path / run_name / "classifiers" / "lora" / f"seed{seed}",
                           {(1, 0): wrong + seed})
    text = run("evaluate.py", "--data", dataset,
               "--classifiers", *tmp_path.glob("*/classifiers/lora"),
               "--out", tmp_path / "results")
    assert ("| lora | 0.625 ± 0.354 | [" in text
            and "95 % intervals over test images and runs." in text)
    run("evaluate.py", "--data", dataset,
        "--classifiers", *[tmp_path / "a" / "classifiers" / "lora"] * 2,
        "--out", tmp_path / "results", fails="two lora from the same run")


def test_a_difference_is_bold_only_if_its_interval_excludes_zero(tmp_path):
    def predicted(name, wrong):
        return {"0": predictions_of(tmp_path / name, {
            group: wrong for group in ((0, 0), (0, 1), (1, 0), (1, 1))})}

    predictions = {"erm": predicted("erm", 1), "same": predicted("same", 1),
                   "worse": predicted("worse", 4)}
    found = intervals_of(predictions, summary(tidy_results(predictions, {"y0-a0": 1})), ["erm"])
    assert (found["same"]["vs erm"][1] <= found["same"]["vs erm"][0] == 0
            and "**" not in difference(found["same"]["vs erm"]))
    assert (found["worse"]["vs erm"][0] == -0.75
            and difference(found["worse"]["vs erm"]).startswith("**-0.750"))


def test_the_table_is_sorted_and_holds_mean_and_std_over_seeds(dataset, tmp_path):
    for recipe, seed, wrong in (("bad", 0, 4), ("bad", 1, 2), ("good", 0, 0), ("good", 1, 1)):
        predictions_of(tmp_path / recipe / f"seed{seed}", {(1, 0): wrong})
    text = run("evaluate.py", "--data", dataset,
               "--classifiers", tmp_path / "bad", tmp_path / "good",
               "--out", tmp_path / "results")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert (lines[2].startswith("| good | 0.875 ± 0.177 | [")
            and lines[3].startswith("| bad | 0.250 ± 0.354 | ["))
    with open(tmp_path / "results" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert (list(rows[0]) == ["recipe", "seed", "group", "metric", "value"]
            and len(rows) == 4 * (7 + 2 * 4))
    assert {"recipe": "bad", "seed": "0", "group": "y1-a0", "metric": "images",
            "value": "4"} in rows
    assert {"recipe": "bad", "seed": "1", "group": "y1-a0", "metric": "accuracy",
            "value": "0.500000"} in rows
    assert all((tmp_path / "results" / name).is_file()
               for name in ("worst_group.png", "images.png", "results.md"))
    assert "± std over 2 seeds." in text
    text = run("evaluate.py", "--data", dataset,
               "--classifiers", tmp_path / "bad", tmp_path / "good", "--keep-order",
               "--references", "good", "--out", tmp_path / "results")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[2].startswith("| bad | 0.250 ± 0.354 | [") and "| -0.625 [" in lines[2]


def test_the_first_table_says_which_group_labels_a_recipe_uses(dataset, tmp_path):
    for recipe in ("erm", "old"):
        predictions_of(tmp_path / recipe / "seed0", {(1, 0): 2})
    files.write_json(tmp_path / "erm" / "config.json", {"group_labels": "val for selection"})
    text = run("evaluate.py", "--data", dataset,
               "--classifiers", tmp_path / "erm", tmp_path / "old",
               "--references", "none", "--out", tmp_path / "results")
    assert ("| recipe | worst-group accuracy | 95 % interval | average-group accuracy "
            "| group labels |") in text
    assert "| 0.875 | val for selection |" in text and "| 0.875 | unknown |" in text
    rows = files.read_csv(tmp_path / "results" / "intervals.csv", "")
    assert [(row["group_labels"], row["average_group"]) for row in rows] == [
        ("val for selection", "0.875000"), ("unknown", "0.875000")]


def test_recipes_tested_on_different_images_are_not_compared(dataset, tmp_path):
    predictions_of(tmp_path / "a" / "seed0", {})
    rows = predictions_of(tmp_path / "b" / "seed0", {})
    files.write_csv(tmp_path / "b" / "seed0" / "predictions.csv", rows[1:])
    run("evaluate.py", "--data", dataset, "--classifiers", tmp_path / "a", tmp_path / "b",
        "--out", tmp_path / "r", fails="was tested on other images")


def test_missing_and_broken_predictions_are_one_line_errors(dataset, tmp_path):
    args = ("evaluate.py", "--data", dataset, "--classifiers", tmp_path / "a",
            "--out", tmp_path / "r")
    run(*args, fails="contains no seed")
    (tmp_path / "a" / "seed0").mkdir(parents=True)
    (tmp_path / "a" / ".stage").write_text("{}")
    run(*args, fails="a: is not finished (run train_classifier.py for this recipe again)")
    (tmp_path / "a" / ".stage").unlink()
    run(*args, fails="predictions.csv: cannot be read")
    (tmp_path / "a" / "seed0" / "predictions.csv").write_text("split,y\ntest,x\n")
    run(*args, fails="predictions.csv: cannot be read")
    assert not (tmp_path / "r").exists()


def test_biases_are_put_side_by_side(dataset, tmp_path):
    for bias, wrong in (("0.9", 1), ("0.99", 2)):
        predictions_of(tmp_path / bias / "erm" / "seed0", {(1, 0): wrong})
        run("evaluate.py", "--data", dataset, "--classifiers", tmp_path / bias / "erm", "--out",
            tmp_path / f"shapes-{bias}" / "results")
    text = run("evaluation/sweep.py", "--results", *tmp_path.glob("shapes-*/results"),
               "--out", tmp_path / "sweep")
    assert "| recipe | 0.9 | 0.99 |" in text and "| erm | 0.750 [0.289, 1.000] | 0.500 [" in text
    assert (tmp_path / "sweep" / "sweep.png").is_file()
    run("evaluation/sweep.py", "--results", tmp_path, "--out", tmp_path / "s",
        fails="intervals.csv: cannot be read")


def test_a_group_without_test_images_is_said_to_be_missing_and_never_counts_as_fair(
        dataset, tmp_path):
    """Its accuracy cannot be estimated, nor can equalised odds in its class."""
    rows = [row for row in predictions_of(tmp_path / "erm" / "seed0", {(1, 1): 2})
            if (row["y"], row["a"]) != (1, 0)]
    files.write_csv(tmp_path / "erm" / "seed0" / "predictions.csv", rows)
    text = run("evaluate.py", "--data", dataset, "--classifiers", tmp_path / "erm",
               "--out", tmp_path / "run" / "results")
    assert ("**Not estimated**: odd digit on a red background (y1-a0) has no test images. "
            "The worst group is the worst of 3 of 4 groups.") in text
    assert "| n/a |" in text.split("equalised-odds")[1]
    with open(tmp_path / "run" / "results" / "results.csv") as file:
        values = {row["metric"]: row["value"]
                  for row in csv.DictReader(file) if row["group"] == "all"}
    assert values["equalised_odds"] == "" and values["worst_group"] == "0.500000"
    run("evaluation/report.py", "--run", tmp_path / "run", "--data", dataset,
        "--out", tmp_path / "report.html")
    assert "The worst group is the worst of 3 of 4 groups" in (tmp_path / "report.html").read_text()


def test_a_tested_group_that_training_never_saw_has_no_weight_in_the_weighted_mean():
    assert (metrics({"y0-a0": 0.5}, {})["worst_group"] == 0.5
            and np.isnan(metrics({"y0-a0": 0.5}, {})["train_weighted"]))


def test_recipes_trained_on_different_data_are_not_put_into_one_table(dataset, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    args = ("--epochs", 1, "--seeds", 0, "--data", data, "--out")
    run("train_classifier.py", "--recipe", "erm", *args, tmp_path / "erm")
    image = data / "images" / "train-0-0-0.png"
    image.write_bytes((data / "images" / "train-1-0-0.png").read_bytes())
    run("evaluate.py", "--data", data, "--classifiers", tmp_path / "erm", "--out", tmp_path / "r",
        fails=f"erm: was trained on other data than --data {data}")
    run("train_classifier.py", "--recipe", "resample", *args, tmp_path / "resample")
    line = run("evaluate.py", "--data", data,
               "--classifiers", tmp_path / "erm", tmp_path / "resample",
               "--out", tmp_path / "r", fails="were trained on different data")
    assert "erm" in line and "resample" in line and not (tmp_path / "r").exists()


def test_one_seed_has_no_spread_and_a_class_without_test_images_is_said_to_be_missing(
        dataset, tmp_path):
    rows = [row for row in predictions_of(tmp_path / "erm" / "seed0", {(0, 1): 1}) if row["y"] == 0]
    files.write_csv(tmp_path / "erm" / "seed0" / "predictions.csv", rows)
    text = run("evaluate.py", "--data", dataset, "--classifiers", tmp_path / "erm",
               "--out", tmp_path / "results")
    assert ("mean ± std over 1 seed." in text and "| erm | 0.750 | [" in text
            and "**One seed**: erm. Intervals of" in text)
    assert ("(y1-a0), odd digit on a green background (y1-a1) have no test images. "
            "The worst group is the worst of 2 of 4") in text
