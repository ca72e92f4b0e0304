"""What the tests share: a tiny base model, a tiny dataset, and running a script as a user does."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import imagefolder as folder  # noqa: E402

# A shell lets what it starts in the background ignore Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

LONG = "TORTURE" in os.environ  # of make torture; a short version of it is a part of make test
BIASED = {(0, 0): 24, (0, 1): 3, (1, 0): 3, (1, 1): 24}  # training images a group


def run(script, *args, fails=None):
    """Runs ROOT/script; returns its stdout. With `fails`, expects exit status 2 and one line that holds it."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], capture_output=True, text=True)
    if fails is None:
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout
    assert done.returncode == 2, (done.returncode, done.stderr[-3000:])
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"{Path(script).name}: error: ") and fails in line, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return line


def make_dataset(out, counts=BIASED, splits=("train", "val", "test")):
    """A folder in the one format: class = shape (bar or box), attribute = ground (red or green)."""
    import random

    from PIL import Image, ImageDraw

    draws, rows = random.Random(0), []
    (out / "images").mkdir(parents=True)
    for split in splits:
        for (y, a), count in (counts if split == "train" else dict.fromkeys(counts, 4)).items():
            for i in range(count):
                image = Image.new("RGB", (32, 32), ((200, 50, 45), (50, 160, 65))[a])
                left, top = draws.randrange(4, 12), draws.randrange(4, 8)
                ImageDraw.Draw(image).rectangle((left, top, left + (3 if y else 14), top + 18), fill="white")
                name = f"images/{split}-{y}-{a}-{i}.png"
                image.save(out / name)
                text = f"a photo of an {('even', 'odd')[y]} digit on a {('red', 'green')[a]} background"
                rows.append({"file_name": name, "split": split, "y": y, "a": a, "text": text})
    folder.write_csv(out / "metadata.csv", rows)
    folder.write_json(out / "config.json", {"key": "test"})
    return out


def new_house(path, base):
    """A copy of the repository, with the tiny base model and the installed libraries."""
    shutil.copytree(ROOT, path, ignore=shutil.ignore_patterns(".*", "runs", "miniature", "digits-*", "__pycache__"))
    shutil.copytree(base, path / "base" / "miniature")
    (path / ".venv").symlink_to(ROOT / ".venv")
    return path


def environment():
    """That of a shell: without what the make that runs the tests left in it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}


def make(house, *args):
    """Runs make as a user does, and not as a part of the make that runs the tests; returns its stdout."""
    done = subprocess.run(["make", *args], cwd=house, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def files_of(path, but=("config.json",)):
    """{relative path: bytes} of a folder's files, but for those that tell of their making."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(Path(path).rglob("*"))
            if file.is_file() and file.name not in but}


@pytest.fixture(scope="session")
def base(tmp_path_factory, request):
    """A base model of two steps: its images are noise, its files are whole. Made once for an edition of pretrain.py."""
    made = Path(request.config.cache.mkdir("base")) / folder.code_digest(ROOT / "base" / "pretrain.py")
    if not made.exists():
        out = tmp_path_factory.mktemp("base") / "tiny"
        run("base/pretrain.py", "--images", 100, "--vae-steps", 2, "--clip-steps", 2, "--unet-steps", 2, "--out", out)
        copy = shutil.copytree(out, made.with_name(f"{made.name}-{os.getpid()}"))
        try:
            copy.rename(made)
        except OSError:  # another process was faster
            shutil.rmtree(copy)
    return made


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="session")
def vanilla(base, dataset, tmp_path_factory):
    """A synthetic set of the base model, 5 images a group, unfiltered."""
    out = tmp_path_factory.mktemp("synthetic") / "vanilla"
    run("generate.py", "--base", base, "--clip", base / "clip", "--data", dataset, "--images", 5, "--batch", 4,
        "--steps", 2, "--clip-threshold", 0, "--out", out)
    return out
