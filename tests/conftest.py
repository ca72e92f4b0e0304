"""What the tests share: a tiny base model, a tiny dataset,
and running a script or make as a user does."""

import contextlib
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import files, stage  # noqa: E402

# A shell lets what it starts in the background ignore Ctrl-C,
# and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

LONG = "TORTURE" in os.environ  # make torture; make test runs a short version of it
slow = pytest.mark.skipif(not LONG, reason="takes minutes: make torture")
BIASED = {(0, 0): 24, (0, 1): 3, (1, 0): 3, (1, 1): 24}  # training images per group


def run(script, *args, fails=None):
    """Runs ROOT/script in this process (starting Python and importing torch takes seconds);
    returns its stdout.

    With `fails`, expects exit status 2 and one line on stderr that contains it; returns that line.
    """
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # each process has its own
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            status = stage.call(module.main, [str(arg) for arg in args])
        except SystemExit as end:  # of argparse
            status = end.code or 0
    if fails is None:
        assert status == 0, errors.getvalue()[-3000:]
        return out.getvalue()
    assert status == 2, (status, errors.getvalue()[-3000:])
    line = errors.getvalue().strip().splitlines()[-1]
    assert line.startswith(f"{Path(script).name}: error: ") and fails in line, (
        errors.getvalue()[-3000:])
    return line


def start(script, *args, **options):
    """Starts ROOT/script as a process of its own."""
    return subprocess.Popen([sys.executable, str(ROOT / script), *map(str, args)], text=True,
                            **options)


def together(processes, script, *args):
    """Runs ROOT/script in several processes that share its work, as accelerate launch does."""
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone",
              "--nproc_per_node", str(processes))
    done = subprocess.run([*launch, str(ROOT / script), *map(str, args)], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def make_dataset(out, counts=BIASED, splits=("train", "val", "test")):
    """A folder in the one format: class = shape (bar or box),
    attribute = background (red or green)."""
    import random

    from PIL import Image, ImageDraw

    draws, rows = random.Random(0), []
    (out / "images").mkdir(parents=True)
    for split in splits:
        for (y, a), count in (counts if split == "train" else dict.fromkeys(counts, 4)).items():
            for i in range(count):
                image = Image.new("RGB", (32, 32), ((200, 50, 45), (50, 160, 65))[a])
                left, top = draws.randrange(4, 12), draws.randrange(4, 8)
                ImageDraw.Draw(image).rectangle(
                    (left, top, left + (3 if y else 14), top + 18), fill="white")
                name = f"images/{split}-{y}-{a}-{i}.png"
                image.save(out / name)
                text = (f"a photo of an {('even', 'odd')[y]} digit "
                        f"on a {('red', 'green')[a]} background")
                rows.append({"file_name": name, "split": split, "y": y, "a": a, "text": text})
    files.write_csv(out / "metadata.csv", rows)
    return out


def new_house(path):
    """A copy of the repository as one clones it, with what is installed."""
    shutil.copytree(ROOT, path, ignore=shutil.ignore_patterns(
        ".git*", ".venv", ".*cache", ".*.lock", "runs", "digits-*", "printed-*", "__pycache__",
        ".decoded"))
    (path / ".venv").symlink_to(ROOT / ".venv")
    return path


def environment():
    """That of a shell: without what the make that runs the tests left in it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}


def make(house, *args, fails=None):
    """Runs make as a user does; returns its stdout.

    With `fails`, expects an error that contains it; returns stderr.
    """
    done = subprocess.run(["make", *args], cwd=house, capture_output=True, text=True,
                          env=environment())
    if fails is None:
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout
    assert done.returncode == 2 and fails in done.stderr, (done.returncode, done.stderr[-3000:])
    return done.stderr


def files_of(path, but=("config.json",)):
    """{relative path: bytes} of a folder's files, except those that record how they were made."""
    return {str(file.relative_to(path)): file.read_bytes()
            for file in sorted(Path(path).rglob("*"))
            if file.is_file() and file.name not in but
            and not file.name.endswith((".lock", ".log")) and ".decoded" not in file.parts}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The cache of file digests, for the scripts in this process and those that it starts."""
    files.CACHE = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(files.CACHE)


@pytest.fixture(scope="session")
def base():
    """The base model that the repository ships."""
    return ROOT / "base" / "miniature"


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="session")
def embeddings(base, dataset, tmp_path_factory):
    """The CLIP embeddings of the dataset."""
    out = tmp_path_factory.mktemp("embeddings") / "embeddings"
    run("data/embed.py", "--data", dataset, "--clip", base / "clip", "--out", out)
    return out


@pytest.fixture(scope="session")
def vanilla(base, dataset, tmp_path_factory):
    """A synthetic set of the base model, 5 images per group, unfiltered."""
    out = tmp_path_factory.mktemp("synthetic") / "vanilla"
    run("generate.py", "--base", base, "--clip", base / "clip", "--data", dataset,
        "--images", 5, "--batch", 4, "--steps", 2, "--keep", 1, "--alpha", 1, "--out", out)
    return out
