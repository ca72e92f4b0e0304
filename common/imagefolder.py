"""The one format that every stage reads and writes: a Hugging Face `imagefolder`.

Images, and beside them a metadata.csv with the columns

    file_name   path of the image, relative to the csv, inside its folder
    split       train, val or test (synthetic images: train, and val of generate.py --val-share)
    y           class, an integer from 0
    a           attribute that the class is spuriously correlated with, an integer from 0
    text        caption of the image's group: its prompt

A group is a pair (y, a), written `y0-a1`. Other columns may follow, among them `class_text`, the
prompt of the class.
"""

import csv
import os
from collections import Counter
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from common import compute, files
from common.files import InputError

REQUIRED = ("file_name", "split", "y", "a", "text")
SPLITS = ("train", "val", "test")
LABELS = 10_000  # a column with more classes or attributes than that holds something else

# --------------------------------------------------------------------------------------- metadata


def read_table(path, required, encoding="utf-8-sig", separator=","):
    """The rows, as dicts of str, of a csv of the user's that has the required columns.

    Raises InputError if it is malformed.
    """
    try:
        with open(path, encoding=encoding, newline="") as file:
            reader = csv.DictReader(file, strict=True, delimiter=separator)
            rows, columns = list(reader), reader.fieldnames or []
    except (csv.Error, UnicodeError) as error:
        raise InputError(path, f"is not a csv in UTF-8: {error}", "save it as UTF-8 csv") from None
    check_columns(path, columns, required)
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise InputError(f"{path}, row {line}", "has more or fewer fields than the header",
                             "quote fields that contain commas or line breaks")
    return rows


def check_columns(path, columns, required, todo=None):
    """Raises InputError, with `todo`, unless each required column is there, and none twice."""
    for column, count in Counter(list(columns)).items():
        if count > 1:
            raise InputError(path, f"has {count} columns named {column!r}", "keep one")
    for column in required:
        if column not in columns:
            there = ", ".join(map(repr, columns)) or "none"
            raise InputError(path, f"has no column {column!r}; it has {there}"[:500],
                             todo or f"it needs {', '.join(required)}")


def read_metadata(folder, split=None):
    """Reads and checks folder/metadata.csv; only the rows of `split` if one is given.

    Returns a dict per image, in the order of the file, with `y` and `a` as int and every other
    column as str. Images are only checked for existence. Raises InputError for the first fault.
    """
    folder = Path(folder)
    path = folder / "metadata.csv"
    if not path.is_file():
        raise InputError(path, "not found",
                         "point to a folder made by data/prepare.py or an earlier stage")
    rows = read_table(path, REQUIRED)
    check_rows(path, 2, rows)
    rows = [row for row in rows if split in (None, row["split"])]
    if not rows:
        what = f"has no images of split {split}" if split else "has no images"
        raise InputError(path, what, "prepare the data again")
    for row in rows:
        if not (folder / row["file_name"]).is_file():
            raise InputError(folder / row["file_name"], "not found, but listed in metadata.csv",
                             "restore it, or run the stage that made this folder again")
    return rows


def check_rows(path, first, rows):
    """Turns the labels of rows into int. Raises InputError, naming the row, unless all are valid.

    first: the number of the first row.
    """
    seen = {}
    for line, row in enumerate(rows, first):
        where = f"{path}, row {line}"
        for label in ("y", "a"):
            row[label] = as_label(where, label, row[label])
        if row["split"] not in SPLITS:
            raise InputError(where, f"split is {row['split']!r}", f"use {', '.join(SPLITS)}")
        check_name(where, row["file_name"])
        name = Path(row["file_name"])
        if name in seen:
            raise InputError(where, f"{row['file_name']} is listed already in row {seen[name]}",
                             "keep one row per image")
        seen[name] = line
        if not row["text"].strip():
            raise InputError(where, "text is empty", "it is the prompt of the image's group")


def as_label(where, column, text):
    """A label as int. Raises InputError unless it is an integer from 0."""
    if not text.isascii() or not text.isdigit():
        raise InputError(where, f"{column} is {text!r}", "labels are integers from 0")
    if len(text) > len(str(LABELS)) or int(text) >= LABELS:
        raise InputError(where, f"{column} is {text[:20]}",
                         f"labels are integers from 0, below {LABELS}")
    return int(text)


def check_name(where, name):
    """Raises InputError unless a file_name is a relative path that stays inside its folder."""
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(where, f"file_name {name!r} leaves its folder", "use a path inside it")
    if "\\" in name:
        raise InputError(where, f"file_name {name!r} contains a backslash",
                         "separate folders by /")


def with_attributes_of(folder, rows):
    """The rows with the attribute of a folder of pseudo-groups, of cluster.py.

    folder: "none": the attribute is 0; None: the rows as they are. Raises InputError if it lacks an
    image.
    """
    if folder is None:
        return rows
    if folder == "none":
        return [row | {"a": 0} for row in rows]
    attributes = {row["file_name"]: row["a"] for row in read_metadata(folder)}
    for row in rows:
        if row["file_name"] not in attributes:
            raise InputError(f"--groups {folder}", f"does not contain {row['file_name']}",
                             "run cluster.py --within dataset for --data")
    return [row | {"a": attributes[row["file_name"]]} for row in rows]


def groups_drawn(synthetic, data):
    """(the dataset whose groups a synthetic set shows, its merged groups, for with_merged()).

    The dataset is `data` itself or a folder of pseudo-groups, of cluster.py.
    """
    config = files.read_json(synthetic / "config.json")
    folder = Path(config.get("arguments", {}).get("data", data))
    known = (folder / "metadata.csv").is_file() and folder.resolve() != data.resolve()
    return folder if known else data, tuple(map(tuple, config.get("merged", [])))


def with_merged(rows, merged):
    """The rows with the groups that finetune.py merged, [(y, a, a that it is merged into)]."""
    into = {(y, a): other for y, a, other in merged}
    return [row | {"a": into.get((row["y"], row["a"]), row["a"])} for row in rows]


def digest(folder, rows):
    """A digest of rows of metadata and of the bytes of their images."""
    names = [row["file_name"] for row in rows]
    return files.digest(rows, files.file_digests(folder, names))


# ----------------------------------------------------------------------------------------- groups


def group_name(y, a):
    return f"y{y}-a{a}"


def group_of(row):
    """The group of a row of metadata, as `y0-a1`."""
    return group_name(row["y"], row["a"])


def labels_of(group):
    """`y0-a1` -> (0, 1)."""
    return tuple(int(part[1:]) for part in group.split("-"))


def members_of(group, rows):
    """The indices of the rows of a group."""
    return [i for i, row in enumerate(rows) if group_of(row) == group]


def group_counts(rows):
    """{group: number of rows}, sorted by (y, a)."""
    counts = Counter((row["y"], row["a"]) for row in rows)
    return {group_name(y, a): counts[y, a] for y, a in sorted(counts)}


def group_accuracies(rows, predictions):
    """{group: share of its rows whose prediction, an int each, is y}, sorted by (y, a)."""
    correct = [row for row, prediction in zip(rows, predictions) if prediction == row["y"]]
    hits = group_counts(correct)
    return {group: hits.get(group, 0) / size for group, size in group_counts(rows).items()}


def group_prompts(rows):
    """{group: its prompt}, sorted by (y, a). Raises InputError if the captions of one differ."""
    prompts = {}
    for row in sorted(rows, key=lambda row: (row["y"], row["a"])):
        group, text = group_of(row), row["text"]
        if prompts.setdefault(group, text) != text:
            raise InputError("metadata.csv", f"group {group} has several texts, {text!r} is one of "
                             "them", "use one caption per group")
    return prompts


def class_prompts(rows):
    """{y: prompts of the class}: its class_text, or without that column those of its groups."""
    prompts = {}
    for row in rows:
        prompts.setdefault(row["y"], {})[row.get("class_text") or row["text"]] = None
    return {y: list(texts) for y, texts in sorted(prompts.items())}


def group_titles(rows):
    """{group: its name for people}, such as `waterbird on land (y1-a0)`.

    The words of its prompt without those that all prompts begin with, and its code.
    """
    words = {group_of(row): row["text"].split() for row in rows}
    texts, common = list(words.values()), 0
    shortest = min(map(len, texts), default=0)
    while len(words) > 1 and common < shortest - 1 and len({text[common] for text in texts}) == 1:
        common += 1
    titles = {}
    for group in sorted(words, key=labels_of):
        title = " ".join(words[group][common:]).removeprefix("a ").removeprefix("an ")
        titles[group] = f"{title[:40]} ({group})"
    return titles


def unit_title(unit, titles):
    """The name for people of a unit, a group or a part: `waterbird on land (y1-a0-c2)`."""
    group = "-".join(unit.split("-")[:2])
    return titles[group].replace(f"({group})", f"({unit})") if group in titles else unit


def correlated_attribute(counts, y):
    """The attribute most over-represented in class y, by P(a | y) / P(a); counts: per group."""
    with_a = Counter()
    for group, count in counts.items():
        with_a[labels_of(group)[1]] += count
    return max(sorted(with_a), default=None,
               key=lambda a: counts.get(group_name(y, a), 0) / with_a[a])


# ----------------------------------------------------------------------------------------- images


def load_image(path, size):
    """An image as an RGB PIL image of size x size pixels.

    EXIF rotation is undone, transparency becomes white, the shortest side is resized (bicubic,
    antialiased), and the middle is cropped. Raises InputError if the file cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # Pillow clips 16 bits at 255, and does not scale
                image = image.point(lambda value: value / 256).convert("L")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            fits = image.size == (size, size)
            return image if fits else ImageOps.fit(image, (size, size), Image.BICUBIC)
    except Exception as error:  # OSError, ValueError, struct.error and many more
        raise InputError(path, f"cannot be read as an image: {error}",
                         "replace or remove it") from None


def progress(items, title, unit, **more):
    """A progress bar over `items`, or to be updated by hand; on a terminal of its own only."""
    together = compute.PROCESSES > 1 or "jobserver" in os.environ.get("MAKEFLAGS", "")
    disable = True if together else None  # their bars would overwrite each other
    return tqdm(items, title, unit=unit, mininterval=1, disable=disable, **more)


def spread(rows, most):
    """Up to `most` rows, evenly spread: files stand in order, so that the first are of a kind."""
    return rows[::max(1, len(rows) // most)][:most]


def contact_sheet(rows, labels, cell=64):
    """A picture with one row of PIL images per label."""
    measure = ImageDraw.Draw(Image.new("1", (1, 1))).textlength
    left = 12 + int(max(map(measure, labels), default=0))
    width = left + (cell + 2) * max(map(len, rows), default=1)
    sheet = Image.new("RGB", (width, (cell + 2) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (images, label) in enumerate(zip(rows, labels)):
        top = i * (cell + 2)
        draw.text((4, top + cell // 2 - 6), label, fill="black")
        for j, image in enumerate(images):
            sheet.paste(image.resize((cell, cell), Image.NEAREST), (left + j * (cell + 2), top))
    return sheet
