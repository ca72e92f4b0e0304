"""Whatever happens to a run, the same command resumes and ends with the same bytes:
kills, Ctrl-C, full disks; and 100,000 images.

`make torture` does it at length, `make test` in short.
"""

import contextlib
import csv
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import LONG, ROOT, environment, files_of, new_house, run, slow
from PIL import Image

from common import files, imagefolder

KILLS, INTERRUPTS, IMAGES = (50, 10, 100_000) if LONG else (1, 1, 0)
SMALL = (f"RECIPES=erm lora{' vanilla clustered' * LONG}", "SEEDS=0 1", "IMAGES=6", "EPOCHS=2",
         "K=2", "CLUSTERED=", "LORA=--steps 4 --batch 2 --checkpoint-every 1",
         "DREAMBOOTH=--steps 3 --batch 1 --checkpoint-every 1", "GENERATE=--steps 2 --batch 2")
# the longest wait from a script's start to its death, in seconds
SCRIPTS = {"data/prepare.py": 3, "data/embed.py": 6, "cluster.py": 6, "generate.py": 8,
           "finetune.py": 8, "train_classifier.py": 6, "evaluation/images.py": 6,
           "evaluate.py": 2, "evaluation/report.py": 0.3}
SECONDS = ("config.json", "cost.csv", "images.md", "report.html")  # what tells how long things took
# seconds in which a Ctrl-C may meet Python itself, which says so with a traceback
PYTHON_STARTS = 0.5


def start(house, jobs, log):
    """make in a process group of its own, as a terminal starts it.

    In a make below another one digits.mk leaves the output as it comes: the log tells what runs
    now.
    """
    return subprocess.Popen(
        ["make", f"-j{jobs}", "--no-print-directory", *SMALL], cwd=house, stdout=log,
        stderr=subprocess.STDOUT, start_new_session=True, env=environment() | {"MAKELEVEL": "1"})


def made(house):
    """Everything that a run leaves: {path: bytes}, without the bytes of what tells seconds."""
    files = {}
    for top in ("runs", "data/digits-0.95"):
        files |= {f"{top}/{name}": b"" if name.rsplit("/")[-1] in SECONDS else content
                  for name, content in files_of(house / top, but=()).items()}
    return files


def wipe(house):
    for top in ("runs", "data/digits-0.95"):
        shutil.rmtree(house / top, ignore_errors=True)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A copy of the repository in which nothing is made yet."""
    return new_house(tmp_path_factory.mktemp("kills") / "house")


@pytest.fixture(scope="module")
def undisturbed(house):
    """What an undisturbed run makes."""
    with open(house.parent / "log", "w") as log:
        assert start(house, 2, log).wait() == 0, (house.parent / "log").read_text()[-3000:]
    return made(house)


def same(house, undisturbed):
    files = made(house)
    assert sorted(files) == sorted(undisturbed), "files are missing, or something was left behind"
    assert not [name for name in files if files[name] != undisturbed[name]]


def aimed(house, jobs, script, delay, sent):
    """Starts make, sends a signal to all of it `delay` seconds after `script` began;
    (status, its output, hit).
    """
    path = house.parent / "log"
    with open(path, "w") as log:
        process = start(house, jobs, log)
        while process.poll() is None and f"python {script}" not in path.read_text():
            time.sleep(0.02)
        try:
            process.wait(delay)
            hit = False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, sent)
            hit = True
        begun = time.monotonic()
        status = process.wait(60)
    return status, path.read_text(), hit and time.monotonic() - begun


def random_draws():
    """Another generator at each call; its seed is printed, so that a failure can be repeated."""
    seed = int(os.environ.get("TEST_SEED", random.randrange(10**6)))
    print(f"random seed {seed} (TEST_SEED={seed} repeats it)")
    return random.Random(seed)


def at_work(output):
    """The script that began last."""
    return [word for line in output.splitlines() if " --out " in line
            for word in line.split() if word in SCRIPTS][-1]


@slow
def test_a_run_killed_anywhere_resumes_to_the_same_bytes(house, undisturbed, capsys):
    """SIGKILL to the whole process group at a random moment of every script in turn."""
    draws, kills, laps, start_of_all = random_draws(), Counter(), 0, time.monotonic()
    targets = itertools.cycle(SCRIPTS) if LONG else iter(["generate.py"] * 9)
    while kills.total() < KILLS:
        if laps or not LONG:
            shutil.rmtree(house / "runs")
            if LONG:
                wipe(house)
        jobs = 1 if laps % 2 else 4
        for script in SCRIPTS if LONG else targets:
            status, output, hit = aimed(house, jobs, script, draws.uniform(0, SCRIPTS[script]),
                                        signal.SIGKILL)
            if hit is not False:
                kills[at_work(output)] += 1
            else:
                assert status == 0, output[-3000:]
        with open(house.parent / "log", "w") as log:
            assert start(house, jobs, log).wait() == 0, (house.parent / "log").read_text()[-3000:]
        same(house, undisturbed)
        laps += 1
    with capsys.disabled():
        print(f"\nkills: {kills.total()} in {laps} runs, -j4 and -j1 in turn, "
              f"{time.monotonic() - start_of_all:.0f} s:",
              ", ".join(f"{script} {count}" for script, count in kills.items()))
    assert not LONG or set(kills) >= set(SCRIPTS) - {"evaluation/report.py", "data/prepare.py"}


@slow
def test_ctrl_c_ends_within_seconds_without_a_traceback_and_says_how_to_resume(
        house, undisturbed, capsys):
    draws, interrupts, slowest = random_draws(), 0, 0
    targets = itertools.cycle(["cluster.py", "generate.py", "finetune.py", "train_classifier.py",
                               "evaluation/images.py"])
    shutil.rmtree(house / "runs")
    while interrupts < INTERRUPTS:
        script = next(targets)
        delay = draws.uniform(PYTHON_STARTS, SCRIPTS[script])
        status, output, seconds = aimed(house, 4, script, delay, signal.SIGINT)
        if seconds is False:  # it had ended already
            assert status == 0
            shutil.rmtree(house / "runs")
            continue
        interrupts, slowest = interrupts + 1, max(slowest, seconds)
        assert seconds < 10 and status != 0
        assert "Traceback" not in output, output[-3000:]
        # says make, where the script had done its work and was ending
        done = output.rstrip().endswith("Interrupt")
        assert "interrupted (rerun the same command to resume)" in output or done, output[-3000:]
    with open(house.parent / "log", "w") as log:
        assert start(house, 2, log).wait() == 0
    same(house, undisturbed)
    with capsys.disabled():
        print(f"\nCtrl-C: {interrupts} times, the slowest end took {slowest:.2f} s")


# ------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def disk(tmp_path):
    """mount(kilobytes) gives a disk of that size, or makes it as large."""
    place = tmp_path / "disk"

    def mount(kilobytes):
        options = ["-o", f"size={kilobytes}k", "tmpfs", str(place)]
        if place.exists():
            return subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(place)],
                                  check=True)
        place.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", *options], capture_output=True).returncode:
            pytest.skip("only root may mount a disk that is small enough to be full")
        return place

    yield mount
    subprocess.run(["umount", str(place)], capture_output=True)


FILLERS = {
    "prepare": "data/prepare.py digits --bias 0.9 --out {out}",
    "embed": "data/embed.py --data {data} --clip {base}/clip --out {out}",
    "cluster": "cluster.py --data {data} --embeddings {embeddings} --k 2 --min-size 2 --out {out}",
    "lora": "finetune.py --method lora --base {base} --data {data} --steps 2 --checkpoint-every 1 "
            "--out {out}",
    "dreambooth": "finetune.py --method dreambooth --base {base} --data {data} --steps 2 "
                  "--batch 1 --out {out}",
    "generate": "generate.py --base {base} --clip {base}/clip --data {data} "
                "--embeddings {embeddings} --images 6 --steps 2 --batch 2 --out {out}",
    "classifier": "train_classifier.py --recipe erm --data {data} --epochs 1 --seeds 0 1 "
                  "--out {out}",
    "images": "evaluation/images.py --data {data} --embeddings {embeddings} "
              "--synthetic {vanilla} --clip {base}/clip --out {out}",
    "pretrain": "base/pretrain.py --data {data} --captions text --vae-steps 1 --clip-steps 1 "
                "--unet-steps 1 --samples 1 --out {out}",
}


@pytest.mark.parametrize("stage", FILLERS if LONG else ("lora", "generate"))
def test_a_full_disk_is_one_line_and_the_same_command_resumes(
        stage, base, dataset, embeddings, vanilla, disk, tmp_path):
    def args(out):
        return FILLERS[stage].format(base=base, data=dataset, embeddings=embeddings,
                                     vanilla=vanilla, out=out).split()

    run(*args(tmp_path / "roomy"))
    size = sum(4096 * (1 + len(content) // 4096)
               for content in files_of(tmp_path / "roomy", but=()).values())
    place = disk(size // 2 // 1024)
    run(*args(place / "out"), fails="o space left on device")
    assert not (place / "out" / "config.json").exists()
    disk(size * 4 // 1024)
    run(*args(place / "out"))
    assert files_of(place / "out", SECONDS) == files_of(tmp_path / "roomy", SECONDS)
    assert [path.name for path in place.glob("[!.]*")] == ["out"], "something was left behind"


# -------------------------------------------------------------------------------------------- soak


def measured(*args):
    """Runs a script; (seconds, peak of its own memory in MB: without files that are mapped,
    which the kernel may drop).
    """
    begun, peak = time.monotonic(), 0
    process = subprocess.Popen([sys.executable, *map(str, (ROOT / args[0], *args[1:]))],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(OSError, StopIteration):
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = max(peak, int(next(line for line in status
                                      if line.startswith("RssAnon")).split()[1]))
        time.sleep(0.05)
    assert process.returncode == 0, args
    return time.monotonic() - begun, peak / 1024


def soak(count, base, place):
    """{stage: (seconds, MB)} of `count` images."""
    download, spent = place / "download", {}
    download.mkdir(parents=True)
    rows = []
    for i in range(count):
        y, a = i % 2, (i // 2) % 20 == 0
        image = Image.new("RGB", (32, 32), (200 * y, 100 * a, i % 256))
        image.paste((i // 256 % 256, i // 65536, 0), (0, 0, 16, 16))  # each is another one
        image.save(download / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "y": y, "a": int(y ^ a)})
    files.write_csv(download / "metadata.csv", rows)
    data, out = place / "data", place / "run"
    spent["prepare"] = measured(
        "data/prepare.py", "folder", "--root", download, "--classes", "even", "odd",
        "--attributes", "red", "green", "--out", data)
    spent["embed"] = measured("data/embed.py", "--data", data, "--clip", base / "clip",
                              "--batch", 512, "--out", out / "embeddings")
    spent["cluster"] = measured("cluster.py", "--data", data, "--embeddings", out / "embeddings",
                                "--k", 2, "--out", out / "clusters")
    drawing = ("generate.py", "--base", base, "--clip", base / "clip", "--data", data,
               "--embeddings", out / "embeddings", "--steps", 1, "--batch", 1,
               "--out", out / "synthetic", "--images")
    measured(*drawing, 1)
    for unit in out.glob("synthetic/y*/"):  # as if all of them had been drawn
        with open(unit / "candidates.csv") as file:
            row = next(csv.DictReader(file))
        drawn = -(-count // 3)  # of which 75 % are kept
        for i in range(2, drawn):
            os.link(unit / "00000.png", unit / f"{i:05}.png")
        files.write_csv(unit / "candidates.csv", [
            dict(row, index=i, clip_score=i % 1000 / 1000) for i in range(drawn)])
        config = files.read_json(unit / "config.json")
        names = sorted(path.name for path in unit.iterdir() if path.name != "config.json")
        files.write_json(unit / "config.json", config | {"files": files.file_digests(unit, names)})
    spent["generate"] = measured(*drawing, count // 4)
    assert len(imagefolder.read_metadata(out / "synthetic")) == count // 4 * 4
    spent["classifier"] = measured(
        "train_classifier.py", "--recipe", "filled", "--data", data,
        "--synthetic", out / "synthetic", "--epochs", 1, "--batch", 512, "--seeds", 0,
        "--out", out / "c")
    spent["at 224"] = measured(
        "train_classifier.py", "--recipe", "erm", "--data", data, "--epochs", 1, "--batch", 128,
        "--load-size", 224, "--resolution", 64, "--seeds", 0, "--out", out / "large")
    spent["images"] = measured(
        "evaluation/images.py", "--data", data, "--embeddings", out / "embeddings",
        "--synthetic", out / "synthetic", "--clip", base / "clip", "--batch", 512,
        "--out", out / "images")
    return spent


@slow
def test_time_is_linear_and_memory_bounded_in_the_number_of_images(base, tmp_path, capsys):
    few, many = (soak(count, base, tmp_path / str(count)) for count in (IMAGES // 4, IMAGES))
    with capsys.disabled():
        print(f"\nsoak: {IMAGES} images (a quarter of them)")
        for stage in many:
            print("  {:10} {:5.0f} s ({:.0f} s), {:5.0f} MB ({:.0f} MB)".format(
                stage, many[stage][0], few[stage][0], many[stage][1], few[stage][1]))
    for stage in many:
        assert many[stage][0] < 6 * max(few[stage][0], 2), f"{stage}: more than linear"
        assert many[stage][1] < few[stage][1] + 200 + IMAGES * 0.01, (
            f"{stage}: more than 10 kB an image")
