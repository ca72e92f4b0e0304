"""make dryrun: a row per stage, also when one fails; and the projection, which is arithmetic."""

import math
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT, environment, files_of, new_house, run, slow

from common import files
from data.prepare import subsample
from tools import plan as plans
from tools import projection

SETTINGS = ("dryrun", "RECIPES=erm lora", "DRYRUN=--photos 8",
            "LORA=--steps 150 --batch 4 --learning-rate 1e-3",
            "GENERATE=--steps 10 --guidance-scale 1 --batch 8", "CLASSIFIER=--batch 16")
STAGES = ["read images", "embed", "images", "generate", "finetune lora", "train erm",
          "train two-stage"]


def dryrun(house, *more):
    done = subprocess.run(["make", *SETTINGS, *more], cwd=house, capture_output=True, text=True,
                          env=environment())
    out = house / "runs" / "dryrun-digits"
    tables = [files.read_csv(out / name) for name in ("dryrun.csv", "projection.csv")]
    return done, {row["stage"]: row for row in tables[0]}, tables[1], files_of(out)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Two dry runs as users run them: one in which fine-tuning fails,
    then the same with the fault mended."""
    house = new_house(tmp_path_factory.mktemp("dryrun") / "house")
    shutil.rmtree(house / "runs", ignore_errors=True)
    return dryrun(house, "LORA=--steps 150 --batch 4 --learning-rate 1e38"), dryrun(house)


@slow
def test_a_stage_that_fails_is_a_row_and_the_others_still_run(both):
    done, rows, table, _ = both[0]
    assert done.returncode == 2 and set(rows) == set(STAGES), done.stderr[-3000:]
    assert rows["finetune lora"]["result"].startswith("failed: finetune.py: error: ")
    assert ("loss is" in rows["finetune lora"]["result"]
            and rows["finetune lora"]["result"] in done.stdout)
    assert all(row["result"] == "ok" for stage, row in rows.items() if stage != "finetune lora")
    assert {line["stage"]: line["hours"] == "" for line in table}["finetune lora"]
    assert sum(line["hours"] == "" for line in table) == 1


@slow
def test_each_stage_has_seconds_memory_and_disk(both):
    done, rows, _, written = both[1]
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(rows) == set(STAGES) and {row["result"] for row in rows.values()} == {"ok"}
    for stage, row in rows.items():
        assert float(row["image_s"]) > 0, stage
        if stage != "read images":
            assert float(row["startup_s"]) > 0.1 and float(row["disk_mb"]) > 0, stage
            assert 20 < float(row["memory_mb"]) < 8000, stage
    assert float(rows["finetune lora"]["step_s"]) > float(rows["generate"]["step_s"]) > 0
    assert 0.2 < float(rows["finetune lora"]["disk_mb"]) < 1
    assert written["dryrun.md"].decode().strip() in done.stdout
    assert not [name for name in written if name.startswith("runs/")], (
        "a stage's own output was left")


@slow
def test_the_projection_is_the_rows_times_the_amounts(both):
    _, rows, table, _ = both[1]
    lines = {line["stage"]: line for line in table}
    assert "cluster" not in lines, "no recipe needs clusters"
    lora = lines["finetune lora"]  # 4 groups of 475, 25, 25, 475 images, 150 steps of 4
    assert (lora["units"], lora["steps"], lora["images"]) == ("4", "600", "1000")
    drawn = lines["generate lora"]  # 250 of 334 images are kept, in batches of 8
    assert (drawn["units"], drawn["images"], drawn["steps"]) == (
        "4", str(4 * 336), str(4 * 336 * 10))
    erm = lines["train erm"]  # 3 seeds, 30 epochs: val is seen after each, val and test at the end
    assert (erm["units"], erm["images"]) == (
        "3", str(round(3 * (30 * (1000 + 600 / 3) + 4000 / 3))))
    for line in table:
        row = rows[line["measured"]]
        seconds = (int(line["runs"]) * float(row["startup_s"])
                   + int(line["units"]) * float(row["unit_s"])
                   + int(line["steps"]) * float(row["step_s"])
                   + int(line["images"]) * float(row["image_s"]))
        assert math.isclose(float(line["hours"]), seconds / 3600, abs_tol=1e-4), line
    assert math.isclose(float(lora["gb"]), 4 * float(rows["finetune lora"]["disk_mb"]) / 1000,
                        abs_tol=1e-4)


def commands_of(*settings):
    """What make dryrun gives to tools/dryrun.py."""
    done = subprocess.run(["make", "-n", "dryrun", *settings], cwd=ROOT, capture_output=True,
                          text=True, check=True, env=environment())
    goals, *plan = shlex.split(done.stdout.split("--plan ")[1])
    return projection.read_commands(plans.read_plan(goals, plan))


def test_without_the_download_the_published_numbers_count():
    commands = commands_of("DATASET=celeba", "RECIPES=erm dreambooth clustered compositional",
                           "MODEL_SEEDS=0 1")
    counts, source = projection.counts_of(ROOT / "data" / "none", "celeba", "natural", subsample)
    assert (sum(counts[0]) == 162_770 and sum(counts[0]) + counts[1] + counts[2] == 202_599
            and "published" in source)
    row = {"startup_s": 10.0, "unit_s": 5.0, "step_s": 2.0, "image_s": 0.5, "disk_mb": 3000.0,
           "result": "ok"}
    rows = {"read images": row, **{command.row: row for command in commands}}
    assert {name for name in rows if "finetune" in name} == {
        "finetune dreambooth", "finetune compositional"}
    table = {line["stage"]: line for line in projection.projection(commands, rows, counts, None, 2)}
    # two seeds, 10 clusters a group, 2,000 steps of one image and a class image
    clustered = table["finetune clustered"]
    assert (clustered["runs"], clustered["units"], clustered["steps"]) == (2, 80, 160_000)
    assert clustered["images"] == 2 * round(3 * 10 * 4000 + 10 * (138.7 + 2000))
    assert clustered["gb"] == 240 and math.isclose(
        clustered["hours"], (2 * 10 + 80 * 5 + 160_000 * 2 + clustered["images"] * 0.5) / 3600,
        abs_tol=1e-4)
    assert table["generate vanilla"]["images"] == 2 * 4 * 2672, (
        "they are drawn for prior preservation")
    assert table["finetune compositional"]["units"] == 2 and table["embed"]["images"] == 202_599
    three = {line["stage"]: line for line in projection.projection(commands, rows, counts, 3, 1)}
    assert three["finetune clustered"]["units"] == 12


def test_a_bias_removes_training_images_and_unknown_datasets_are_one_line_errors():
    (train, val, test), _ = projection.counts_of(ROOT / "data" / "none", "waterbirds", "0.99",
                                                 subsample)
    assert train[0] == 3498 and train[1] == 35 and train[2] == 11 and (val, test) == (1199, 5794)
    with pytest.raises(files.InputError, match="not found"):
        projection.counts_of(ROOT / "data" / "none", "folder", "natural", subsample)


def test_wrong_flags_are_one_line_errors():
    run("tools/dryrun.py", "--dataset", "digits", "--bias", 0.9, "--plan", "x", "--photos", 0,
        "--out", "runs/x", fails="--photos: 0 is not between")


def test_on_several_devices_a_stage_is_divided_into_its_parts_and_waits_for_the_one_before():
    table = [{"stage": stage, "units": units, "images": images, "hours": hours}
             for stage, units, images, hours in (
                 ("read images", 0, 100, 1), ("generate vanilla", 4, 100, 10),
                 ("finetune lora", 4, 8, 8), ("finetune clustered", 20, 8, 8),
                 ("generate lora", 4, 100, 10), ("generate clustered", 20, 100, 10),
                 ("train erm", 3, 100, 3), ("images", 0, 100, ""))]
    one, ten = projection.scaling(table, (1, 10))
    assert one["hours"] == 50 and one["speed-up"] == 1
    # reading 1; vanilla 10 / 10; the four units of lora 8 / 4; drawing 10 / 10;
    # the three seeds of a recipe 3 / 3
    assert ten["hours"] == max(50 / 10, 1 + 1 + 2 + 1 + 1) and ten["longest"] == "finetune"
