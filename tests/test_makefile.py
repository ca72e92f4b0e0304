"""The Makefile: one tiny run, and what it would run again after a change."""

import os
import shutil
import subprocess
import time

import pytest
from conftest import environment, files_of, new_house
from conftest import make as run_make

TINY = ("RECIPES=erm vanilla lora clustered", "SEEDS=0", "IMAGES=3", "EPOCHS=1", "K=2", "LORA=--steps 1",
        "DREAMBOOTH=--steps 1 --batch 1", "CLUSTERED=", "GENERATE=--steps 2 --batch 4 --clip-threshold 0")


@pytest.fixture(scope="module")
def house(base, tmp_path_factory):
    """A copy of the repository with everything made, on the tiny base model."""
    house = new_house(tmp_path_factory.mktemp("make") / "house", base)
    assert "| erm |" in make(house)
    return house


def make(house, *args):
    return run_make(house, *TINY, *args)


def would_run(house, *args):
    """What `make -n` tells: {folder that would be made}, without runs/<dataset>-<bias>/."""
    before = files_of(house / "runs", but=())
    lines = [line.split() for line in make(house, "-n", *args).splitlines() if "--out" in line]
    assert files_of(house / "runs", but=()) == before, "make -n changed something"
    return sorted("/".join(line[line.index("--out") + 1].split("/")[2:]) for line in lines)


SECONDS = ("config.json", "cost.csv", "cost.md", "report.html")  # these tell how long things took
CLASSIFIERS = ["classifiers/clustered", "classifiers/erm", "classifiers/lora", "classifiers/vanilla"]


def test_a_second_make_runs_nothing_and_takes_less_than_a_second(house):
    start = time.monotonic()
    assert would_run(house) == []
    assert time.monotonic() - start < 1
    before = files_of(house / "runs", but=())
    assert "| erm |" in make(house)
    assert files_of(house / "runs", but=()) == before


def test_other_clusters_keep_vanilla_and_the_models_of_groups(house):
    assert would_run(house, "K=3") == ["classifiers/clustered", "clusters", "images", "models/clustered",
                                       "results", "results/report.html", "synthetic/clustered"]


def test_other_epochs_run_classifiers_and_evaluation_alone(house):
    assert would_run(house, "EPOCHS=2") == [*CLASSIFIERS, "results", "results/report.html"]


def test_more_images_keep_the_models_of_lora(house):
    again = would_run(house, "IMAGES=4")
    assert "models/lora" not in again and "classifiers/erm" not in again and "synthetic/lora" in again


def test_a_touched_generate_runs_generation_and_what_follows(house):
    stat = (house / "generate.py").stat()
    os.utime(house / "generate.py")
    # vanilla's images are the class images of clustered's prior preservation
    assert would_run(house) == ["classifiers/clustered", "classifiers/lora", "classifiers/vanilla", "images",
                                "models/clustered", "results", "results/report.html", "synthetic/clustered",
                                "synthetic/lora", "synthetic/vanilla"]
    os.utime(house / "generate.py", ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_another_recipe_runs_that_recipe_alone(house):
    assert would_run(house, "RECIPES=erm vanilla lora clustered groupdro") == [
        "classifiers/groupdro", "results", "results/report.html"]


def test_shards_and_launch_redo_no_finished_work(house):
    assert would_run(house, "SHARDS=2", "LAUNCH=nice") == []


def test_shards_run_side_by_side_behind_launch_and_make_the_same_bytes(house):
    lora = house / "runs" / "digits-0.95" / "models" / "lora"
    before = files_of(lora)
    shutil.rmtree(lora)
    text = make(house, "SHARDS=2", "LAUNCH=nice", "-j2", str(lora.relative_to(house) / "config.json"))
    assert "nice .venv/bin/python finetune.py" in text and "--shard 1/2" in text
    assert files_of(lora) == before


def test_an_unfinished_stage_is_gone_on_from_with_the_same_bytes(house):
    runs = house / "runs" / "digits-0.95"
    before = files_of(runs, but=SECONDS)
    shutil.rmtree(runs / "models" / "lora" / "y0-a1")  # as a killed stage leaves it: no unit, nothing that says done
    for name in ("models/lora/config.json", "synthetic/lora/config.json", "synthetic/lora/metadata.csv"):
        (runs / name).unlink()
    make(house)
    assert files_of(runs, but=SECONDS) == before


def test_other_seeds_of_the_models_are_runs_of_their_own_in_one_table(house):
    before = would_run(house, "MODEL_SEEDS=0 1", "RECIPES=erm lora")
    assert before == ["classifiers/lora", "images", "models/lora", "results", "results/report.html", "synthetic/lora"]
    text = make(house, "MODEL_SEEDS=0 1", "RECIPES=erm lora")
    assert "runs/digits-0.95-seed1/classifiers/lora" in text and "| lora |" in text
    assert would_run(house, "MODEL_SEEDS=0 1", "RECIPES=erm lora") == []
    make(house)


def test_a_word_with_a_plus_is_a_recipe_on_the_images_of_a_method(house):
    text = make(house, "-n", "RECIPES=erm filled+lora ffr")
    assert "--recipe filled --synthetic runs/digits-0.95/synthetic/lora" in text
    assert "--recipe ffr --synthetic runs/digits-0.95/synthetic/vanilla" in text


def test_a_sweep_makes_the_results_of_every_bias_and_puts_them_side_by_side(house):
    text = make(house, "-n", "sweep", "BIAS=0.9 0.99", "RECIPES=erm")
    for bias in ("0.9", "0.99"):
        assert f"data/prepare.py digits --bias {bias} --out data/digits-{bias}" in text
    assert "evaluate.py --sweep runs/digits-0.9/results runs/digits-0.99/results --out runs/digits-sweep" in text
    assert not (house / "data" / "digits-0.9").exists()


def test_an_ablation_changes_one_setting_and_keeps_what_does_not_hang_on_it(house):
    lines = [" ".join(line.split()) for line in make(house, "-n", "ablate").splitlines()]
    made = {line.split(" --out runs/digits-0.95/")[1]: line for line in lines if " --out runs/" in line}
    assert not {"clusters", "models/clustered", "synthetic/vanilla", "classifiers/clustered"} & set(made)
    assert "--k 10 " in made["clusters-k10"]
    assert "--data runs/digits-0.95/clusters-k10 " in made["models/clustered-k10"]
    assert "--prior" in made["models/clustered-k10"] and "--prior" not in made["models/clustered-no-prior"]
    assert "--clip-threshold 0.9 --models runs/digits-0.95/models/clustered " in made["synthetic/clustered-clip0.9"]
    assert "--images 50 --models runs/digits-0.95/models/clustered " in made["synthetic/clustered-images50"]
    for recipe, flags in (("lambda0", "two-stage --contrastive 0"), ("two-stage-whole", "two-stage-whole")):
        assert f"--recipe {flags} --synthetic runs/digits-0.95/synthetic/clustered " in made[
            f"classifiers/{recipe}+clustered"]
    assert "--classifiers runs/digits-0.95/classifiers/clustered runs/digits-0.95/classifiers/clustered-no-prior " in \
        made["ablations/prior"] + " "


@pytest.mark.parametrize("locked, args", (("digits-0.95", ()), ("digits-0.99", ("sweep", "BIAS=0.9 0.99")),
                                          ("digits-0.95-seed1", ("MODEL_SEEDS=0 1",))))
def test_a_second_make_on_the_same_run_is_refused_while_the_first_lives(house, locked, args, tmp_path):
    with subprocess.Popen(["make", "-f-", "wait"], stdin=subprocess.PIPE, cwd=tmp_path, env=environment()) as first:
        first.stdin.write(b"wait:; @sleep 60")
        first.stdin.close()
        (house / "runs" / f"{locked}.pid").write_text(f"{first.pid}\n")
        done = subprocess.run(["make", *TINY, *args], cwd=house, capture_output=True, text=True, env=environment())
        first.kill()
    assert done.returncode == 2 and f"another make (process {first.pid}) is at work on {locked}: wait" in done.stderr
    assert [path.name for path in (house / "runs").glob("*.pid")] == [f"{locked}.pid"]
    (house / "runs" / f"{locked}.pid").unlink()


def test_what_a_dead_make_held_is_taken_over_though_its_number_lives_on(house):
    with subprocess.Popen(["sleep", "60"]) as other:
        (house / "runs" / "digits-0.95.pid").write_text(f"{other.pid}\n")
        assert "| erm |" in make(house) and not list((house / "runs").glob("*.pid"))
        other.kill()


def test_help_shows_the_settings_and_their_values(house):
    text = make(house, "help", "BIAS=0.9")
    assert "BIAS          0.9" in text and "make test" in text
