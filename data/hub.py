"""Image datasets of the Hugging Face Hub, or local folders of parquet files, as `datasets.load_dataset` reads them."""

import io
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from PIL import Image

from common import imagefolder
from common.files import InputError

SPLITS = {"training": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test"}
LABELS = 100  # a column with more values than that is no label


def read(args):
    """(function that writes the images into a folder, a row per image, class names, attribute names) of a dataset.

    args: root, a hub id or a local folder; image, y, a: columns; without `image` the first one that has images. Streamed:
    first the labels alone, then one image after the other, as they are. Names are those of a ClassLabel, or the texts in
    the column; None if it holds numbers.
    """
    try:
        import datasets  # only here: its users have installed it
    except ImportError:
        raise InputError("prepare.py hub", "needs the library datasets", "run .venv/bin/pip install datasets") from None
    datasets.disable_progress_bars()
    with readable(args):
        parts = datasets.load_dataset(str(args.root), streaming=True)
        features = next(iter(parts.values())).features
    args.image = args.image or next((name for name, kind in features.items() if isinstance(kind, datasets.Image)), None)
    args.a = args.a or ("attribute" if "attribute" in features else None)  # None: there are no attribute labels
    for name in ("image", "y", "a")[:2 + bool(args.a)]:
        if getattr(args, name) not in features:
            raise InputError(f"--{name} {getattr(args, name)}", f"is not a column of {args.root}",
                             f"use one of {', '.join(features)}")
    with readable(args):
        found = [(name, i, row[args.y], row[args.a] if args.a else 0) for name, part in parts.items()
                 for i, row in enumerate(part.select_columns([args.y, args.a][:1 + bool(args.a)]))]
        parts = {name: part.select_columns([args.image]).cast_column(args.image, datasets.Image(decode=False))
                 for name, part in parts.items()}
        suffix = Image.open(io.BytesIO(content(next(iter(next(iter(parts.values()))))[args.image]))).format.lower()
    (codes_y, names_y), (codes_a, names_a) = (codes_of(f"--{name} {getattr(args, name)}", features.get(getattr(args, name)),
                                                       {row[k] for row in found}) for name, k in (("y", 2), ("a", 3)))
    rows = [{"file_name": f"{name}-{i:06}.{suffix}", "split": SPLITS.get(name, name), "y": codes_y[y], "a": codes_a[a]}
            for name, i, y, a in found]
    unknown = {row["split"] for row in rows} - {*imagefolder.SPLITS}
    if unknown:
        raise InputError(f"--root {args.root}", f"has a split {unknown.pop()!r}", "known are train, validation and test")

    def write(folder):
        wanted = {row["file_name"] for row in rows}
        with readable(args):
            for name, part in parts.items():
                for i, row in enumerate(imagefolder.progress(part, f"write {name}", "image")):
                    if (file := f"{name}-{i:06}.{suffix}") in wanted:
                        (folder / file).write_bytes(content(row[args.image]))

    return write, rows, names_y, names_a


@contextmanager
def readable(args):
    """Turns what the library and the Hub raise into one InputError."""
    try:
        yield
    except Exception as error:  # OSError, ValueError, DatasetNotFoundError, HTTP errors, pyarrow's, ...
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--root {args.root}", f"cannot be read by datasets: {reason}",
                         "give a hub id, or a folder that load_dataset reads") from None


def content(image):
    """The bytes of an image that has not been decoded."""
    return image["bytes"] or Path(image["path"]).read_bytes()


def codes_of(flag, feature, values):
    """({value: its label, from 0}, names of the labels or None if they are numbers)."""
    if hasattr(feature, "names"):  # a ClassLabel
        return {i: i for i in range(len(feature.names))}, [name.replace("_", " ") for name in feature.names]
    if len(values) > LABELS or not ({type(value) for value in values} in ({int}, {str}, {bool})):
        raise InputError(flag, f"has values such as {', '.join(map(repr, islice(values, 3)))}",
                         f"a label is an integer, a text, or true or false, one of at most {LABELS}")
    different = sorted(values)
    names = [value.replace("_", " ") for value in different] if isinstance(different[0], str) else None
    return {value: i for i, value in enumerate(different)}, names
