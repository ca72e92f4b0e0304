"""The Makefile: one tiny run, and what it would run again after a change."""

import os
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from conftest import LONG, ROOT, files_of, new_house, slow
from conftest import make as run_make

from common import files

TINY = ("RECIPES=erm vanilla lora clustered", "SEEDS=0", "IMAGES=3", "EPOCHS=1", "K=2",
        "LORA=--steps 1", "DREAMBOOTH=--steps 1 --batch 1", "CLUSTERED=",
        "GENERATE=--steps 2 --batch 4")


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of the repository with everything made."""
    house = new_house(tmp_path_factory.mktemp("make") / "house")
    text = make(house)
    assert "| erm |" in text and "| vanilla | 12 | 0.250 |" in text, (
        "results and images' measures are not both printed")
    return house


def make(house, *args, **options):
    return run_make(house, *TINY, *args, **options)


def would_run(house, *args):
    """What `make -n` tells: {folder that would be made}, without runs/<dataset>-<bias>/."""
    before = files_of(house / "runs", but=())
    lines = [line.split() for line in make(house, "-n", *args).splitlines() if "--out" in line]
    assert files_of(house / "runs", but=()) == before, "make -n changed something"
    return sorted("/".join(line[line.index("--out") + 1].split("/")[2:]) for line in lines)


# these tell how long things took
SECONDS = ("config.json", "cost.csv", "images.md", "report.html", ".checked")
CLASSIFIERS = ["classifiers/clustered", "classifiers/erm", "classifiers/lora",
               "classifiers/vanilla"]


def test_a_second_make_runs_nothing_and_takes_less_than_a_second(house):
    start = os.times()
    assert would_run(house) == []
    spent = [getattr(os.times(), name) - getattr(start, name)
             for name in ("children_user", "children_system")]
    assert sum(spent) < 1  # of the processor: other work beside does not count
    before = files_of(house / "runs", but=())
    assert "| erm |" in make(house)
    assert files_of(house / "runs", but=()) == before


def test_other_clusters_keep_vanilla_and_the_models_of_groups(house):
    assert would_run(house, "K=3") == [
        "classifiers/clustered", "clusters", "images", "models/clustered", "results",
        "results/report.html", "synthetic/clustered"]


def test_other_epochs_run_classifiers_and_evaluation_alone(house):
    assert would_run(house, "EPOCHS=2") == [*CLASSIFIERS, "results", "results/report.html"]


def test_more_images_keep_the_models_of_lora(house):
    again = would_run(house, "IMAGES=4")
    assert ("models/lora" not in again and "classifiers/erm" not in again
            and "synthetic/lora" in again)


def test_a_touched_generate_runs_generation_and_what_follows(house):
    stat = (house / "generate.py").stat()
    os.utime(house / "generate.py")
    # vanilla's images are the class images of clustered's prior preservation
    assert would_run(house) == [
        "classifiers/clustered", "classifiers/lora", "classifiers/vanilla", "images",
        "models/clustered", "results", "results/report.html", "synthetic/clustered",
        "synthetic/lora", "synthetic/vanilla"]
    os.utime(house / "generate.py", ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_another_recipe_runs_that_recipe_alone(house):
    assert would_run(house, "RECIPES=erm vanilla lora clustered groupdro") == [
        "classifiers/groupdro", "results", "results/report.html"]


def test_another_launcher_redoes_no_finished_work(house):
    assert would_run(house, "LAUNCH=nice") == []


def test_launchers_of_accelerate_and_torch_stand_for_python_and_others_before_it(house):
    for launch, command in (("nice", "nice .venv/bin/python data/embed.py"),
                            ("accelerate launch --num_processes 8",
                             "accelerate launch --num_processes 8 data/embed.py"),
                            ("torchrun --standalone", "torchrun --standalone data/embed.py"),
                            ("srun -n1 accelerate launch", "srun -n1 accelerate launch data/")):
        assert command in " ".join(make(house, "-n", "BIAS=0.9", f"LAUNCH={launch}").split())


@slow
def test_several_processes_of_a_command_make_the_same_bytes(house):
    lora = house / "runs" / "digits-0.95" / "models" / "lora"
    before = files_of(lora)
    shutil.rmtree(lora)
    make(house, "LAUNCH=torchrun --standalone --nproc_per_node 2", "-j1",
         str(lora.relative_to(house) / "config.json"))
    assert files_of(lora) == before
    make(house)  # what was made from it is up to date


def test_other_model_seeds_would_be_runs_of_their_own(house):
    text = make(house, "-n", "MODEL_SEEDS=0 1", "RECIPES=erm lora")
    assert ('finetune.py --base "base/miniature" --seed 1' in text
            and "--out runs/digits-0.95-seed1/models/lora" in text)
    assert "runs/digits-0.95/classifiers/lora runs/digits-0.95-seed1/classifiers/lora" in text


@slow
def test_other_seeds_of_the_models_are_runs_of_their_own_in_one_table(house):
    before = would_run(house, "MODEL_SEEDS=0 1", "RECIPES=erm lora")
    assert before == ["classifiers/lora", "images", "models/lora", "results",
                      "results/report.html", "synthetic/lora"]
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
    assert ("evaluation/sweep.py --results runs/digits-0.9/results runs/digits-0.99/results "
            "--out runs/digits-sweep") in text
    assert not (house / "data" / "digits-0.9").exists()
    text = make(house, "-n", "sweep", "BIAS=0.9", "MODEL_SEEDS=1", "RECIPES=erm")
    assert "--results runs/digits-0.9-seed1/results --out runs/digits-sweep" in text


def test_an_ablation_changes_one_setting_and_keeps_what_does_not_depend_on_it(house):
    lines = [" ".join(line.split()) for line in make(house, "-n", "ablate").splitlines()]
    made = {line.split(" --out runs/digits-0.95/")[1]: line
            for line in lines if " --out runs/" in line}
    assert not {"clusters", "models/clustered", "synthetic/vanilla",
                "classifiers/clustered"} & set(made)
    assert "--k 10 " in made["clusters-k10"]
    assert "--data runs/digits-0.95/clusters-k10 " in made["models/clustered-k10"]
    assert ("--prior" in made["models/clustered-k10"]
            and "--prior" not in made["models/clustered-no-prior"])
    assert "--alpha 0 --models runs/digits-0.95/models/clustered " in made[
        "synthetic/clustered-alpha0"]
    assert "--keep 1 --models runs/digits-0.95/models/clustered " in made[
        "synthetic/clustered-random"]
    assert "--rare transfer --models runs/digits-0.95/models/dreambooth " in made[
        "synthetic/dreambooth-transfer"]
    assert "--rare own --models runs/digits-0.95/models/clustered " in made[
        "synthetic/clustered-own"]
    assert "--images 50 --models runs/digits-0.95/models/clustered " in made[
        "synthetic/clustered-images50"]
    for recipe, flags in (("beta0.9", "two-stage --beta 0.9"), ("beta1", "two-stage --beta 1"),
                          ("two-stage-whole", "two-stage-whole")):
        assert f"--recipe {flags} --synthetic runs/digits-0.95/synthetic/clustered " in made[
            f"classifiers/{recipe}+clustered"]
    assert ("--classifiers runs/digits-0.95/classifiers/clustered "
            "runs/digits-0.95/classifiers/clustered-no-prior ") in made["ablations/prior"] + " "


def test_what_make_has_done_it_does_not_plan_again(house, tmp_path):
    """Make compares each command with the one that a folder was made by, whatever its length."""
    house = shutil.copytree(house, tmp_path / "house", symlinks=True,
                            ignore=shutil.ignore_patterns("runs"))
    for args in (["ablate"], ["BIAS=0.99"], ["RECIPES=clustered-k1 clustered-k2 clustered"]):
        for _ in range(3):
            lines = [line for line in run_make(house, "-n", *args).splitlines()
                     if " --out " in line]
            for line in lines:  # as if it had been done
                script, out = line.split(".venv/bin/python ")[1].split(" --out ")
                command = [*shlex.split(script), "--out", out]
                (house / out).mkdir(parents=True, exist_ok=True)
                files.write_json(house / out / "config.json", {"key": "x", "command": command})
        assert not [line for line in lines if "report" not in line], args


def test_a_folder_that_another_process_writes_is_refused_while_that_process_lives(house):
    lock = house / "runs" / "digits-0.95" / "classifiers" / ".erm.lock"
    code = ("import fcntl, sys, time; f = open(sys.argv[1], 'a'); "
            "fcntl.lockf(f, fcntl.LOCK_EX); print('locked', flush=True)")
    with subprocess.Popen([sys.executable, "-c", f"{code}; time.sleep(60)", lock],
                          stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        make(house, "EPOCHS=2", "runs/digits-0.95/classifiers/erm/config.json",
             fails="erm: is in use by another process (wait for it to finish, or stop it)")
        lines = dict(line.split(maxsplit=1) for line in make(house, "status").splitlines())
        assert lines["runs/digits-0.95/classifiers/erm"] == "1 of 1 seeds done, running"
        other.kill()
    assert would_run(house) == []


# ---------------------------------------------------------- what was lost or changed is made again


def test_edited_lost_and_unfinished_results_are_made_again_and_nothing_else_is_trained(house):
    before = files_of(house / "runs", but=SECONDS)
    run, images = (house / "runs" / "digits-0.95",
                   sorted((house / "data" / "digits-0.95" / "images").iterdir()))
    (run / "synthetic" / "lora" / "y0-a0" / "00000.png").unlink()
    shutil.rmtree(run / "models" / "lora" / "y1-a0")
    (run / "classifiers" / "erm" / "seed0" / "predictions.csv").unlink()
    assert {"synthetic/lora", "models/lora", "classifiers/erm", "results"} <= set(would_run(house))
    (run / "results" / "results.csv").write_text("edited")
    (run / "images" / "config.json").write_text("{")
    assert "images" in would_run(house)
    if LONG:  # otherwise test_edited_labels_are_noticed and test_pixels.py do
        images[0].write_bytes(images[1].read_bytes())
        images[2].unlink()
        assert ("data/prepare.py digits" in make(house, "-n")
                and {"clusters", "classifiers/vanilla"} <= set(would_run(house)))
    # as a killed stage leaves it: no unit, nothing that says done
    shutil.rmtree(run / "models" / "clustered" / "y0-a1-c0")
    for name in ("models/clustered/config.json", "synthetic/clustered/config.json",
                 "synthetic/clustered/metadata.csv"):
        (run / name).unlink()
    script = house / "finetune.py"
    stat, code = script.stat(), script.read_text()
    script.write_text(code.replace('"""Stage 2:', '"""The second stage:') + "# a comment\n")
    # the lost units: an edited comment retrains nothing
    assert make(house).count("images, loss") == 2
    script.write_text(code)
    os.utime(script, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert files_of(house / "runs", but=SECONDS) == before and would_run(house) == []


@slow
def test_another_base_model_retrains_what_was_made_from_the_first(house):
    config = house / "base" / "miniature" / "scheduler" / "scheduler_config.json"
    before = config.read_text()
    files.write_json(config, files.read_json(config) | {"beta_end": 0.013})
    again = would_run(house)
    assert ({"models/lora", "synthetic/lora"} <= set(again)
            and not {"embeddings", "clusters"} & set(again))  # CLIP is the same
    text = make(house, "runs/digits-0.95/models/lora/config.json")
    assert text.count("images, loss") == 4
    config.write_text(before)
    make(house)


@slow
def test_dropped_weights_are_trained_again_only_when_images_are_missing(house):
    make(house, "KEEP_WEIGHTS=no")
    lora = house / "runs" / "digits-0.95" / "models" / "lora"
    assert not list(lora.rglob("*.safetensors")) and list(lora.rglob("loss.csv"))
    assert would_run(house, "KEEP_WEIGHTS=no") == []
    assert {"models/lora", "synthetic/lora"} <= set(would_run(house, "KEEP_WEIGHTS=no", "IMAGES=4"))
    make(house)
    assert list(lora.rglob("*.safetensors")) and would_run(house) == []


def test_another_clip_is_noticed_by_what_reads_it(house):
    config = house / "base" / "miniature" / "clip" / "config.json"
    stat, before = config.stat(), config.read_text()
    config.write_text(before + " ")
    assert {"embeddings", "clusters", "synthetic/vanilla", "images"} <= set(would_run(house))
    config.write_text(before)
    os.utime(config, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert would_run(house) == []


def test_edited_labels_are_noticed(house):
    table = house / "data" / "digits-0.95" / "metadata.csv"
    stat, before = table.stat(), table.read_text()
    table.write_text(before.replace(",train,0,", ",train,1,", 1))
    assert "data/prepare.py digits" in make(house, "-n")
    table.write_text(before)
    os.utime(table, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_the_base_model_is_trained_only_by_make_base(house, tmp_path):
    fresh = new_house(tmp_path / "fresh")
    assert "base/pretrain.py" not in make(fresh, "-n")
    planned = make(fresh, "-n", "base", "PRETRAIN=--unet-steps 3")
    assert ("base/pretrain.py --data data/printed-natural --unet-steps 3  "
            "--out base/miniature") in planned
    make(fresh, "data/printed-natural/config.json", "DATASET=printed", "BIAS=natural",
         "PREPARE=--images 60")
    assert "data/prepare.py printed" in make(fresh, "-n", "base", "PREPARE=--images 90")


def test_an_edited_file_of_the_base_is_noticed_by_what_was_made_from_it(house):
    weights = house / "base" / "miniature" / "vae" / "config.json"
    stat, before = weights.stat(), weights.read_text()
    weights.write_text(before + " ")
    assert {"models/lora", "synthetic/vanilla", "synthetic/lora",
            "classifiers/lora"} <= set(would_run(house))
    assert "classifiers/erm" not in would_run(house)
    weights.write_text(before)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert would_run(house) == []


def test_image_measures_that_fail_leave_the_results(house):
    script, results = house / "evaluation" / "images.py", house / "runs" / "digits-0.95" / "results"
    stat, before = script.stat(), script.read_text()
    script.write_text(before.replace(
        "    args = parse(argv)\n",
        "    args = parse(argv)\n    raise InputError('x', 'fails', 'y')\n"))
    shutil.rmtree(house / "runs" / "digits-0.95" / "classifiers" / "erm")
    make(house, "-j2", fails="images.py: error: x: fails")
    assert "| erm |" in (results / "results.md").read_text()
    assert ((results / "config.json").stat().st_mtime > script.stat().st_mtime
            and not (results / "report.html").exists())
    script.write_text(before)
    os.utime(script, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    make(house)


def test_references_are_the_recipes_that_others_are_compared_with(house):
    assert would_run(house, "REFERENCES=vanilla") == ["results", "results/report.html"]
    assert "--references vanilla " in make(house, "-n", "REFERENCES=vanilla")


def test_the_papers_recipes_run_at_two_biases_with_more_seeds_and_are_put_beside_its_numbers(house):
    text = make(house, "-n", "paper")
    for bias in ("0.95", "0.99"):
        assert f"--data data/digits-{bias} --seeds 0 1 2 3 4 --epochs 1 --recipe self" in text
        assert f"--out runs/digits-{bias}-seed2/models/lora" in text
    assert "--references erm groupdro vanilla dreambooth" in text
    assert ("evaluation/paper.py --results runs/digits-0.95/results runs/digits-0.99/results "
            "--out runs/digits-paper") in text
    assert "--results runs/digits-0.9/results --out" in make(
        house, "-n", "paper", "PAPER_BIASES=0.9", "PAPER_RECIPES=erm")


def test_digits_run_a_process_with_one_thread_per_core_unless_one_says_otherwise(
        house, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "show.mk").write_text(
        "include data/digits.mk\nall:\n\t@echo $(MAKEFLAGS) threads $$OMP_NUM_THREADS\n")
    for args, jobs, threads in (
            ((), f"-j{len(os.sched_getaffinity(0))} ", "1"), (("-j3",), "-j3 ", "1"),
            (("OMP_NUM_THREADS=2",), f"-j{len(os.sched_getaffinity(0))} ", "2")):
        text = run_make(house, "-f", str(tmp_path / "show.mk"), "all", *args)
        assert jobs in text and text.split("threads ")[1].strip() == threads, (args, text)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # nproc reads it
    assert f"-j{len(os.sched_getaffinity(0))} " in run_make(
        house, "-f", str(tmp_path / "show.mk"), "all")


# ---------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("setting, message", (
    ("RECIPES=lora lroa", "RECIPES: lroa is not a recipe, did you mean lora? (recipes: erm, "),
    ("RECIPES=erm lora+vanlla", "RECIPES: vanlla is not a recipe, did you mean vanilla?"),
    ("DATASET=birds", "DATASET=birds: no such dataset (use one of celeba, "),
    ("BIAS=95", "BIAS=95: give a number from 0 to 1"),
    ("BIAS=high", "BIAS=high: give a number from 0 to 1"),
    ("BIAS=0.9 0.99", 'BIAS=0.9 0.99: give one value (or run: make sweep BIAS="0.9 0.99")'),
    ("SEEDS=0 one", 'SEEDS=0 one: give integers, for example SEEDS="0 1 2"'),
    ("MODEL_SEEDS=-1", "MODEL_SEEDS=-1: give"),
    ("KEEP_WEIGHTS=No", "KEEP_WEIGHTS=No: use yes or no"), ("SHARDS=2", "SHARDS: no such setting"),
    ("CACHE=0", "CACHE=0: use yes or no"),
    ("RECIPES=lora+clustered",
     "RECIPES: lora+clustered: combine one recipe and one method, as filled+lora"),
    ("RECIPES=", "RECIPES is empty"), ("BIAS=", "BIAS is empty"),
    ("BIAS=-0", "BIAS=-0: give a number"),
    ("PREPARE=--classes dog's wolf",
     "data/prepare.py: error: flags: No closing quotation (check the quotes in this setting)"),
    ("RECIPIES=erm", "RECIPIES: no such setting (did you mean RECIPES?"),
    ("GENERATE=--alfa 0.2", "generate.py: error: unrecognized arguments: --alfa 0.2"),
    ("CLASSIFIER=--arch vgg",
     "train_classifier.py: error: --arch vgg: is neither cnn nor in torchvision"),
    ("K=many", "cluster.py: error: argument --k"),
    ("EPOCHS=many", "train_classifier.py: error: argument --epochs"),
    ("LORA=--rank 0", "finetune.py: error: argument --rank: 0 is not between"),
    ("IMAGES=", "generate.py: error: argument --images"),
))
def test_an_invalid_setting_ends_before_anything_runs(house, setting, message):
    before = files_of(house / "runs", but=())
    tiny = [given for given in TINY if given.split("=")[0] != setting.split("=")[0]]
    errors = run_make(house, *tiny, setting, fails=message)
    assert len([line for line in errors.splitlines() if "rror" in line or "***" in line]) <= 2
    assert (files_of(house / "runs", but=()) == before
            and not (house / "data" / "digits-95").exists())


def test_a_download_that_is_not_there_is_told_before_anything_runs(house):
    run_make(house, "DATASET=waterbirds", "ROOT=/nowhere",
             fails="prepare.py: error: --root /nowhere: is not a folder (https")
    assert not (house / "data" / "waterbirds-natural").exists()


def test_the_same_settings_in_another_form_are_the_same_run(house):
    tiny = [given for given in TINY if given.split("=")[0] not in ("RECIPES", "SEEDS")]
    text = run_make(house, *tiny, "-n", "RECIPES=erm,vanilla,lora,clustered,erm", "SEEDS=0 0",
                    "BIAS=.950")
    assert "--out" not in text


def test_help_fits_a_screen_and_shows_the_settings_and_their_values(house):
    text = make(house, "help", "BIAS=0.9")
    assert "BIAS          0.9" in text and "make test" in text and len(text.splitlines()) < 40


def test_status_tells_what_is_done_and_to_do(house):
    lines = dict(line.split(maxsplit=1)
                 for line in make(house, "status", "RECIPES=erm lora groupdro").splitlines())
    assert (lines["runs/digits-0.95/models/lora"] == "done"
            and lines["runs/digits-0.95/classifiers/groupdro"] == "to do")


def test_every_command_leaves_a_log(house):
    logs = {str(path.relative_to(house / "runs" / "digits-0.95" / "logs")):
            path.read_text().splitlines()
            for path in (house / "runs" / "digits-0.95" / "logs").rglob("*.log")}
    assert {"digits-0.95.log", "embeddings.log", "models/lora.log", "classifiers/erm.log",
            "results.log"} <= set(logs)
    assert all(lines[0].startswith("$ ") and lines[-1].startswith("done in ")
               for lines in logs.values()), logs
    assert any("images, loss" in line for line in logs["models/lora.log"])


def test_status_counts_no_more_images_than_are_wanted(tmp_path):
    """A unit of which 6 images are wanted draws 8."""
    synthetic = tmp_path / "runs" / "x-0.9" / "synthetic" / "vanilla"
    for unit, drawn in (("y0-a0", 8), ("y0-a1", 4)):
        (synthetic / f".{unit}.partial").mkdir(parents=True)
        for i in range(drawn):
            (synthetic / f".{unit}.partial" / f"{i:05}.png").touch()
    files.write_json(synthetic / ".stage", {"wanted": {"y0-a0": 6, "y0-a1": 6}})
    status = [sys.executable, ROOT / "tools" / "plan.py", "status", str(synthetic),
              f"{synthetic} generate.py"]
    assert subprocess.run(status, capture_output=True, text=True).stdout.endswith(
        "10 of 12 images done, to do\n")
    done_unit = synthetic / "y0-a0"
    files.write_json(done_unit / "config.json", {"seconds": 300})  # 6 images
    done = subprocess.run(status, capture_output=True, text=True)
    assert done.stdout.endswith("10 of 12 images done, to do, about 2 min left\n")
