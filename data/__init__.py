"""What the data sets, the files beside this one, share: finding and reading a download."""

import hashlib
from pathlib import Path
from typing import Callable, NamedTuple

from common import imagefolder
from common.files import InputError


class Found(NamedTuple):
    """What a data set's read() returns."""

    images: Path | Callable  # the folder of the images, or a function that writes them into one
    rows: list  # a dict per image: file_name in that folder, y, a, split
    table: tuple | None = None  # where the rows come from, for messages: (path, its first row)
    labelled: bool = True  # False: there are no attribute labels, a is 0
    classes: list | None = None  # names, from 0 on
    attributes: list | None = None


def not_found(root, what, source):
    return InputError(root, f"does not contain {what}", f"{source}; point --root to it")


def find(root, source, *names):
    """The first of the names that is in ROOT, or one or two folders below.

    Raises InputError if there is none, or if several folders hold it: a backup beside the original
    must not be taken for it.
    """
    for depth in ("", "*/", "*/*/"):
        for name in names:
            paths = sorted(root.glob(depth + name))
            if len(paths) > 1:
                raise InputError(root, f"contains {len(paths)} copies: "
                                 f"{', '.join(map(str, paths))}",
                                 "point --root to the folder of one of them")
            if paths:
                return paths[0]
    raise not_found(root, " or ".join(names), source)


def read_csv(path, columns):
    """The rows of a csv with a header that has at least `columns`."""
    return not_empty(path, imagefolder.read_table(path, columns))


def not_empty(path, rows):
    if not rows:
        raise InputError(path, "has no rows", "is the download complete?")
    return rows


def read_text(path):
    """The lines of a text file."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(path, f"is not a text in UTF-8: {error}", "download it again") from None


def label(path, line, column, row, below=None):
    """The label in a column of a row: an integer from 0, less than `below`."""
    where = f"{path}, row {line}"
    value = imagefolder.as_label(where, column, row[column].strip())
    if below is not None and value >= below:
        raise InputError(where, f"{column} is {value}",
                         f"here it is an integer from 0 to {below - 1}")
    return value


def position(name):
    """A number in [0, 1) determined by the file name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def split_of(number, val=0.8, test=0.9):
    """train, val from `val` on, test from `test` on (80/10/10: From Fake to Real)."""
    return "train" if number < val else "val" if number < test else "test"


def split_name(text):
    """train, val or test by one of the names that people use for them; None for another text."""
    names = {"training": "train", "valid": "val", "validation": "val", "dev": "val",
             "testing": "test"} | {split: split for split in imagefolder.SPLITS}
    return names.get(text.strip().lower())


def cut_splits(rows, root):
    """Cuts val and test from train where they are missing; returns what it did, for people."""
    there = {row["split"] for row in rows}
    unknown = there - {*imagefolder.SPLITS}
    if unknown:
        raise InputError(root, f"has a split {unknown.pop()!r}",
                         "known are train, validation and test")
    if "train" not in there:
        raise InputError(root, "has no split train", f"it has {', '.join(sorted(there))}")
    val, test = 0.1 * ("val" not in there), 0.2 * ("test" not in there)
    train = [row for row in rows if row["split"] == "train"]
    split_groups(train, 1 - val - test, 1 - test)
    return [f"{name} is {share:.0%} of each group of train"
            for name, share in (("val", val), ("test", test)) if share]


def split_groups(rows, val, test):
    """Splits each group by a digest of the file names: val from the share `val` on, then test."""
    sizes, ranks = imagefolder.group_counts(rows), {}
    for row in sorted(rows, key=lambda row: position(row["file_name"])):
        group = imagefolder.group_of(row)
        ranks[group] = ranks.get(group, -1) + 1
        row["split"] = split_of((ranks[group] + 0.5) / sizes[group], val, test)
