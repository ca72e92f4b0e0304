"""The one format that every stage reads and writes, and how a stage reads, checks and publishes files.

A folder of images is a Hugging Face `imagefolder`: images, and beside them a metadata.csv with the columns

    file_name   path of the image, relative to the csv, inside its folder
    split       train, val or test (synthetic images: train)
    y           class, an integer from 0
    a           attribute that the class is spuriously tied to, an integer from 0
    text        caption of the image's group: its prompt

A group is a pair (y, a), written `y0-a1`. Other columns may follow.
Nothing here needs torch, so that every script can check its input before it pays for an import.
"""

import argparse
import csv
import hashlib
import inspect
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from difflib import SequenceMatcher
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps


def _interrupted(kind, error, trace):
    """Ctrl-C before end_at_ctrl_c(), while a script's first lines import."""
    if issubclass(kind, KeyboardInterrupt):
        print(INTERRUPTED.format(Path(sys.argv[0]).name), file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _interrupted
INTERRUPTED = "{}: interrupted (the same command goes on from here)"
GO_ON = "(the same command goes on once this is mended)"
REQUIRED = ("file_name", "split", "y", "a", "text")
SPLITS = ("train", "val", "test")
LABELS = 10_000  # more classes or attributes than that are a column of something else
WRITTEN = ("config.json", "metadata.csv", "results.csv", "groups.csv", "sweep.csv", "model_index.json")  # by a stage
LIBRARIES = ("torch", "torchvision", "diffusers", "transformers", "peft", "scikit-learn", "numpy", "pillow")


class InputError(Exception):
    """What the user handed in is wrong: `where` (a file or flag), `what` is wrong, `todo` about it."""

    def __init__(self, where, what, todo):
        super().__init__(f"{where}: {what} ({todo})")


# -------------------------------------------------------------------------------------------- command line


class Arguments(argparse.ArgumentParser):
    """argparse whose help is the script's docstring and whose every error is one line."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message):
        sys.exit(_last_words(f"{self.prog}: error: {message} (see {self.prog} --help)", 2))

    def parse_args(self, *args):
        parsed = super().parse_args(*args)
        _check_out(parsed)
        return parsed


def _check_out(args):
    """InputError unless --out is new, or was written by a stage: what it holds else would be replaced, and be lost."""
    def real(path):
        return Path(os.path.realpath(path))  # Path.resolve() raises on links in a circle

    out = real(args.out)
    if any(out == path or out in path.parents for path in (Path.cwd(), real(sys.argv[0]))):
        raise InputError(f"--out {args.out}", "holds this program or the folder you are in", "name another folder")
    given = [real(path) for value in vars(args).values() for path in (value if isinstance(value, list) else [value])
             if isinstance(path, Path) and path is not args.out]
    if any(out == path or out in path.parents for path in given):
        raise InputError(f"--out {args.out}", "is or holds what is to be read", "name another folder")
    if out.suffix == ".html" and out.is_dir() or out.suffix != ".html" and out.is_file():
        raise InputError(f"--out {args.out}", f"is a {'folder' if out.is_dir() else 'file'}", "name another")
    _check_replaceable(args.out)


def _check_replaceable(path):
    path = Path(path)
    if path.is_dir() and not all(map(_is_left_over, path.iterdir())) and not any(
            next(path.glob(pattern), None) for name in WRITTEN for pattern in (name, f"*/{name}")):
        raise InputError(path, "holds files that no stage wrote", "name another folder, or empty it")


Flag = argparse.BooleanOptionalAction


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def number(kind, low=-math.inf, high=math.inf):
    """An argparse type: an `int` or a `float` in [low, high]; NaN and infinity are refused."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


def shard_of(text):
    """An argparse type: `i/n`, the i-th (from 0) of n shards."""
    try:
        i, n = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form i/n") from None
    if not 0 <= i < n:
        raise argparse.ArgumentTypeError(f"{text}: shards count from 0/n to n-1/n")
    return i, n


def end_at_ctrl_c():
    """From here on Ctrl-C, and the SIGTERM by which make -j ends its children, are one line and status 130, at once.

    No KeyboardInterrupt is raised: libraries swallow it, torch while it is imported. Nothing needs to be put in order
    either, as what a killed process leaves never looks finished.
    """
    def end(number, frame):
        line = INTERRUPTED.format(Path(sys.argv[0]).name) + "\n"
        os.write(2, ("\n" * os.isatty(2) + line).encode())  # a bar may stand in the terminal's line
        os._exit(130)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as a shell starts what it puts in the background
            signal.signal(number, end)


def run(main):
    """Runs a script's main(): a wrong input or a full disk is one line and status 2, Ctrl-C one line and 130."""
    script = Path(sys.argv[0]).name
    end_at_ctrl_c()
    try:
        main()
    except InputError as error:
        sys.exit(_last_words(f"{script}: error: {error}", 2))
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        sys.exit(_last_words(f"{script}: error: {error.filename or 'disk'}: {error.strerror} {GO_ON}", 2))
    except Exception as error:
        if "No space left on device" not in str(error):  # safetensors wraps what the disk says in an error of its own
            raise
        sys.exit(_last_words(f"{script}: error: disk: {error} {GO_ON}", 2))


def _last_words(line, status):
    print(" ".join(line.splitlines()), file=sys.stderr)
    return status


# ------------------------------------------------------------------------------------------------- reading


def group_name(y, a):
    return f"y{y}-a{a}"


def group_of(row):
    """The group (y, a) of a row of read_metadata, as `y0-a1`."""
    return group_name(row["y"], row["a"])


def labels_of(group):
    """`y0-a1` -> (0, 1)."""
    return tuple(int(part[1:]) for part in group.split("-"))


def members_of(group, rows):
    """Where the rows of a group stand: a list of indices."""
    return [i for i, row in enumerate(rows) if group_of(row) == group]


def read_metadata(folder, split=None):
    """Reads and checks folder/metadata.csv.

    Returns a list of dicts, one an image, in the order of the file, with `y` and `a` as int and every other
    column as str; only the rows of `split` where one is given. Images are looked at just enough to know that
    they are there. Raises InputError on the first thing that is wrong.
    """
    path = Path(folder) / "metadata.csv"
    if not path.is_file():
        raise InputError(path, "no such file", "point to a folder made by data/prepare.py or an earlier stage")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows, columns = list(reader), reader.fieldnames or []
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(path, f"not a csv in UTF-8: {error}", "save it as UTF-8 csv") from None
    for column in REQUIRED:
        if columns.count(column) != 1:
            raise InputError(path, f"column {column} stands {columns.count(column)} times in the first line",
                             f"it needs each of {', '.join(REQUIRED)} once")
    seen = set()
    for line, row in enumerate(rows, start=2):
        _check_row(path, line, row, seen)
    rows = [row for row in rows if split in (None, row["split"])]
    if not rows:
        raise InputError(path, f"no image of split {split}" if split else "no images", "prepare the data again")
    for row in rows:
        if not (Path(folder) / row["file_name"]).is_file():
            raise InputError(Path(folder) / row["file_name"], "named in metadata.csv and not there",
                             "was the download moved? prepare the data again")
    return rows


def _check_row(path, line, row, seen):
    """Raises InputError unless the row has all its fields; turns its labels into int."""
    where = f"{path}, row {line}"
    if None in row or None in row.values():
        raise InputError(where, "another number of fields than the first line", "quote commas and newlines")
    for label in ("y", "a"):
        if not row[label].isascii() or not row[label].isdigit():
            raise InputError(where, f"{label} is {row[label]!r}", "labels are integers from 0")
        if len(row[label]) > len(str(LABELS)) or int(row[label]) >= LABELS:
            raise InputError(where, f"{label} is {row[label][:20]}", f"labels are integers from 0, below {LABELS}")
        row[label] = int(row[label])
    if row["split"] not in SPLITS:
        raise InputError(where, f"split is {row['split']!r}", f"it is one of {', '.join(SPLITS)}")
    name = Path(row["file_name"])
    if not row["file_name"] or name.is_absolute() or ".." in name.parts or "\\" in row["file_name"]:
        raise InputError(where, f"file_name {row['file_name']!r} leaves its folder", "use a path inside it")
    if name in seen:
        raise InputError(where, f"{row['file_name']} stands twice", "one row an image")
    seen.add(name)
    if not row["text"].strip():
        raise InputError(where, "text is empty", "it is the prompt of the image's group")


def group_counts(rows):
    """{group: number of rows}, sorted by (y, a)."""
    counts = Counter((row["y"], row["a"]) for row in rows)
    return {group_name(y, a): counts[y, a] for y, a in sorted(counts)}


def tied_attribute(counts, y):
    """The attribute that is most over-represented in class y: the greatest P(a | y) / P(a); counts: {group: images}."""
    with_a = Counter()
    for group, count in counts.items():
        with_a[labels_of(group)[1]] += count
    return max(sorted(with_a), key=lambda a: counts.get(group_name(y, a), 0) / with_a[a], default=None)


def group_accuracies(rows, predictions):
    """{group: share of its rows whose prediction, an int each, is y}, sorted by (y, a)."""
    hits = group_counts(row for row, prediction in zip(rows, predictions) if prediction == row["y"])
    return {group: hits.get(group, 0) / size for group, size in group_counts(rows).items()}


def group_prompts(rows):
    """{group: its prompt}, sorted by (y, a). Raises InputError where a group's captions differ."""
    prompts = {}
    for row in sorted(rows, key=lambda row: (row["y"], row["a"])):
        if prompts.setdefault(group_of(row), row["text"]) != row["text"]:
            raise InputError("metadata.csv", f"group {group_of(row)} has several texts, {row['text']!r} is one",
                             "one caption a group")
    return prompts


def prompt_parts(prompts):
    """{group: (prompt of its class alone, prompt of its attribute alone)} of {group: prompt}.

    A class's prompt is the words that its groups' prompts share, whatever the attribute: of "a photo of an even digit
    on a red background" and the same on green, "a photo of an even digit on a background". Likewise an attribute's.
    """
    def shared(part, index):
        words = None
        for group, prompt in prompts.items():
            if group.split("-")[index] == part:
                words = prompt.split() if words is None else [
                    word for block in SequenceMatcher(None, words, prompt.split(), False).get_matching_blocks()
                    for word in words[block.a:block.a + block.size]]
        return " ".join(words)

    return {group: tuple(shared(part, index) for index, part in enumerate(group.split("-"))) for group in prompts}


def load_image(path, size):
    """An image as an RGB PIL image of size x size: upright (EXIF), on white where it is transparent,
    shortest side resized (bicubic, antialiased), centre-cropped. Raises InputError if it can't be decoded."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # Pillow clips 16 bits at 255 instead of scaling them
                image = image.point(lambda value: value / 256).convert("L")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            return image if image.size == (size, size) else ImageOps.fit(image, (size, size), Image.BICUBIC)
    except Exception as error:  # a broken file makes Pillow raise OSError, ValueError, struct.error and many more
        raise InputError(path, f"can't be read as an image: {error}", "replace or remove it") from None


def check_images(folder, rows):
    """Decodes the images of some rows. Raises InputError with their number and the first one's fault if any is broken."""
    from tqdm import tqdm

    broken = []
    for row in tqdm(rows, f"check {folder}", unit="image", mininterval=1, disable=None):
        try:
            load_image(Path(folder) / row["file_name"], 8)
        except InputError as error:
            broken.append(str(error))
    if broken:
        raise InputError(folder, f"{len(broken)} of {len(rows)} images are broken, the first: {broken[0]}",
                         "replace or remove them")


def read_rows(path, todo):
    """The rows of a csv that a stage wrote, as dicts of str; InputError, with what `todo` about it, if it is broken."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(path, f"can't be read: {error}", todo) from None


# ---------------------------------------------------------------------------------------------- publishing


def write_csv(path, rows, columns=None):
    """Writes dicts as csv through a hidden sibling, so that a killed process leaves the old file or the new one."""
    columns = columns or list(rows[0])
    bare = not any("\r" in str(value) for row in rows for value in row.values())  # csv quotes "\n" by itself
    with replacing(path) as hidden, open(hidden, "w", encoding="utf-8", newline="") as file:
        quoting = csv.QUOTE_MINIMAL if bare else csv.QUOTE_ALL
        writer = csv.DictWriter(file, columns, lineterminator="\n", quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)


def write_json(path, content):
    with replacing(path) as hidden:
        hidden.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def replacing(path):
    """Yields a hidden sibling of `path` to write to, a file or a folder, and renames it to `path` at the end."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.tmp")
    remove(hidden)
    _remove_doomed(path)
    try:
        yield hidden
        if path.is_dir():  # a folder can't be renamed over another: the old one goes first
            _check_replaceable(path)
            remove(path)
        os.replace(hidden, path)
    finally:
        remove(hidden)


def remove(path):
    """Removes a file or a folder, if it is there. A folder is renamed first: half of one must not look whole."""
    path = Path(path)
    doomed = _remove_doomed(path)
    if path.is_dir() and not path.is_symlink():
        os.replace(path, doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def _remove_doomed(path):
    """Removes what a killed process left of the folder that it was removing; returns where such a folder goes."""
    doomed = path.with_name(f".{path.name.lstrip('.')}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    return doomed


def _is_left_over(path):
    """Whether a killed process left it."""
    return path.name.startswith(".") and path.suffix in (".tmp", ".old", ".partial")


def remove_others(folder, names):
    """Removes the units in a folder that are none of `names`, with what killed processes left of any."""
    for path in sorted(Path(folder).iterdir()):
        if _is_left_over(path) or path.is_dir() and path.name not in names and (path / "config.json").is_file():
            remove(path)


def digest(*parts):
    """A short digest of JSON-able parts; a Path stands for the content of that file."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                while chunk := file.read(1 << 20):  # a model may be larger than the memory
                    sha.update(chunk)
        else:
            sha.update(json.dumps(part, sort_keys=True).encode())
        sha.update(b"\0")
    return sha.hexdigest()[:16]


def folder_digest(folder, rows):
    """A digest of rows of metadata and of the bytes of their images."""
    return digest(rows, *(Path(folder) / row["file_name"] for row in rows))


def model_digest(folder):
    """A digest of a local model's files, or of its name where it is a hub id."""
    files = [Path(folder)] if Path(folder).is_file() else sorted(
        path for path in Path(folder).rglob("*") if path.suffix in (".json", ".safetensors", ".txt"))
    return digest(*files) if files else digest(str(folder))


def code_digest(*scripts):
    """A digest of the given scripts and of what here decides their results: edited code makes other results."""
    return digest(*map(Path, scripts), inspect.getsource(load_image), inspect.getsource(seed_of))


def published(path, key):
    """Whether `path`/config.json says that it was made for this key (a digest of inputs and arguments)."""
    try:
        return json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))["key"] == key
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_config(folder, args, key, **more):
    """Writes folder/config.json: the arguments, the key, the versions of the libraries, and what else is given."""
    import importlib.metadata  # it takes half of this file's time

    arguments = json.loads(json.dumps(vars(args), default=str))
    versions = {library: importlib.metadata.version(library) for library in LIBRARIES}
    write_json(Path(folder) / "config.json", {"key": key, "arguments": arguments, "versions": versions, **more})


def spent(start):
    """What a process took since `start`, of time.monotonic(): seconds, and its peak of memory so far in MB."""
    return {"seconds": round(time.monotonic() - start, 1),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def seed_of(*parts):
    """A 63-bit seed that hangs on the given parts alone, such as (seed, unit, index)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def contact_sheet(rows, labels, cell=64):
    """A sheet of images a person can look at: one row of PIL images a label."""
    left = 8 + 7 * max(map(len, labels), default=0)
    sheet = Image.new("RGB", (left + (cell + 2) * max(map(len, rows), default=1), (cell + 2) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (images, label) in enumerate(zip(rows, labels)):
        draw.text((4, i * (cell + 2) + cell // 2 - 6), label, fill="black")
        for j, image in enumerate(images):
            sheet.paste(image.resize((cell, cell), Image.NEAREST), (left + j * (cell + 2), i * (cell + 2)))
    return sheet
