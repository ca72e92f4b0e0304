"""A dataset of the Hugging Face Hub, or a local folder of parquet files; needs `datasets`.

As `datasets.load_dataset` reads it, streamed. Splits that it lacks are cut from train by a digest
of the names: val 10 % of each group, test 20 %. Install it with .venv/bin/pip install datasets.
"""

import io
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from PIL import Image

from common import files, imagefolder
from common.files import InputError
from data import Found, cut_splits, split_name
from data.folder import words

SOURCE = "a hub id, such as grodino/waterbirds, or a folder of parquet files"
LABELS = 100  # a column with more values than that is no label


def add_flags(parser):
    parser.add_argument("--image", help="the column of the images; default: the first of the kind")
    parser.add_argument("--y", default="label", help="the column of the class: numbers, texts, or "
                        "true and false")
    parser.add_argument("--a", help="the column of the attribute; default: attribute, if there is "
                        "such a column")


def read(args):
    """First the labels alone, then one image after the other, as they are."""
    try:
        import datasets  # only here: its users have installed it
    except ImportError:
        raise InputError("prepare.py hub", "needs the library datasets",
                         "run .venv/bin/pip install datasets") from None
    datasets.disable_progress_bars()
    with readable(args.root):
        parts = datasets.load_dataset(str(args.root), streaming=True)
        features = next(iter(parts.values())).features
    images = args.image or next((name for name, kind in features.items()
                                 if isinstance(kind, datasets.Image)), None)
    attribute = args.a or ("attribute" if "attribute" in features else None)
    columns = [args.y, attribute] if attribute else [args.y]
    for flag, name in zip(("--image", "--y", "--a"), (images, *columns)):
        if name not in features:
            raise InputError(f"{flag} {name}", f"is not a column of {args.root}",
                             f"use one of {', '.join(features)}")
    found = []
    with readable(args.root):
        for name, part in parts.items():
            for i, row in enumerate(part.select_columns(columns)):
                found.append((name, i, row[args.y], row[attribute] if attribute else 0))
            part = part.select_columns([images])
            parts[name] = part.cast_column(images, datasets.Image(decode=False))
        first = next(iter(next(iter(parts.values()))))[images]
        suffix = Image.open(io.BytesIO(content(first))).format.lower()
    codes_y, classes = codes_of(f"--y {args.y}", features[args.y], {row[2] for row in found})
    codes_a, attributes = codes_of(f"--a {attribute}", features.get(attribute),
                                   {row[3] for row in found})
    rows = [{"file_name": f"{name}-{i:06}.{suffix}", "split": split_name(name) or name,
             "y": codes_y[y], "a": codes_a[a]} for name, i, y, a in found]
    told = cut_splits(rows, f"--root {args.root}")
    if told:
        print("; ".join(told))

    def write(folder):
        wanted = {row["file_name"] for row in rows}
        with readable(args.root):
            for name, part in parts.items():
                for i, row in enumerate(imagefolder.progress(part, f"write {name}", "image")):
                    file = f"{name}-{i:06}.{suffix}"
                    if file in wanted:
                        (folder / file).write_bytes(content(row[images]))

    return Found(write, rows, None, bool(attribute), classes, attributes)


@contextmanager
def readable(root):
    """Turns what the library and the Hub raise into one InputError."""
    try:
        yield
    except Exception as error:  # OSError, ValueError, HTTP errors, pyarrow's, ...
        raise InputError(f"--root {root}", f"cannot be read by datasets: {files.reason(error)}",
                         "give a hub id, or a folder that load_dataset reads") from None


def content(image):
    """The bytes of an image that has not been decoded."""
    return image["bytes"] or Path(image["path"]).read_bytes()


def codes_of(flag, feature, values):
    """({value: its label, from 0}, names of the labels or None if they are numbers)."""
    if hasattr(feature, "names"):  # a ClassLabel
        names = [name.replace("_", " ") for name in feature.names]
        if values - set(range(len(names))):  # -1 or None, often in a test split
            raise InputError(flag, "has images without a label",
                             "remove these images, or their split")
        return {i: i for i in range(len(names))}, names
    kinds = {type(value) for value in values}
    if len(values) > LABELS or kinds not in ({int}, {str}, {bool}):
        raise InputError(flag, f"has values such as {', '.join(map(repr, islice(values, 3)))}",
                         f"a label is an integer, a text, or true or false, one of at most "
                         f"{LABELS}")
    different = sorted(values)
    names = None
    if kinds == {str}:
        names = [value.replace("_", " ") for value in different]
    return {value: i for i, value in enumerate(different)}, names
