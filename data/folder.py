"""Your own images: in a folder for each class, or with a table beside them.

ROOT/cat/1.jpg, ROOT/train/cat/1.jpg (train, val or valid or validation, test), or with a folder
for each attribute, too: ROOT/train/cat/snow/1.jpg. Or ROOT/metadata.csv (.jsonl, .parquet) with
the columns file_name, y, and perhaps a, split, text; labels are words, or numbers from 0. Splits
that are missing are cut from train by a digest of the file names: val 10 % of each group, test
20 %. Without attributes each class is one group. What is inferred is printed.
"""

import json
import os
import re
from pathlib import Path

from PIL import Image

from common import files, imagefolder
from common.files import InputError
from data import Found, cut_splits, find, not_empty, read_text, split_name

SOURCE = ("a folder for each class, ROOT/cat/1.jpg, perhaps below train, val and test, "
          "ROOT/train/cat/1.jpg, and above attributes, ROOT/train/cat/snow/1.jpg; or a "
          "metadata.csv, .jsonl or .parquet with the columns file_name, y and perhaps a")
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
OF_STAGES = ("cluster", "unit", "clip_score", "seed", "prompt", "negative_prompt",
             "guidance_scale")  # columns of later stages
MANY = 100  # a column with more words than that is no label


def add_flags(parser):
    parser.add_argument("--image", default="file_name", help="the table's column of file names")
    parser.add_argument("--y", default="y", help="its column of the class")
    parser.add_argument("--a", nargs="+", default=["a"], help="its column of the attribute; groups "
                        "of several are their combinations")
    parser.add_argument("--a-from", type=Path, help="a csv with file_name and a, for some of the "
                        "images, usually those of test")


def words(args):
    return "a photo of a {y}, {a}", "a photo of a {y}", None, None


def read(args):
    depths = ("", "*/", "*/*/")
    if any(any(args.root.glob(depth + name)) for name in TABLES for depth in depths):
        return from_table(args)
    return from_folders(args)


# ------------------------------------------------------------------------------------ class folders


def from_folders(args):
    """A row per image, from the folders that it is in."""
    suffixes, found = Image.registered_extensions(), []
    for folder, folders, names in os.walk(args.root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name).relative_to(args.root) for name in sorted(names)
                  if Path(name).suffix.lower() in suffixes and not name.startswith(".")]
    splits = {path: split_name(path.parts[0]) for path in found}
    in_splits = bool(found) and all(splits.values())
    places = [path.parts[in_splits:-1] for path in found]
    depths = {len(place) for place in places}
    if depths not in ({1}, {2}):
        what = "contains no images" if not found else (
            f"has images in folders of different depths, such as {found[0]}")
        raise InputError(args.root, f"contains no metadata.csv, and {what}", f"give {SOURCE}")
    labelled = depths == {2}
    rows = [{"file_name": str(path), "split": splits[path] if in_splits else "train",
             "y": place[0], "a": place[-1] if labelled else "0"}
            for path, place in zip(found, places)]
    told = [f"{args.root}: {len(rows)} images in folders of "
            f"{'splits, ' * in_splits}classes{' and attributes' * labelled}"]
    return labels_of(args, rows, args.root, None, ["a"] if labelled else [], told)


# ----------------------------------------------------------------------------------------- a table


def from_table(args):
    path = find(args.root, SOURCE, *TABLES)
    told, suffix = [str(path)], path.suffix
    read = {".csv": read_any_csv, ".jsonl": read_jsonl, ".parquet": read_parquet}[suffix]
    rows, columns = read(path, told), [name for name in args.a if name != "a"]
    given = bool(columns) or "a" in rows[0]
    imagefolder.check_columns(path, rows[0], (args.image, args.y, *columns), "name the columns of "
                              "file names, class and attribute by --image, --y, --a")
    args.y, args.a = of_own(args.y), [of_own(name) for name in args.a]
    for row in rows:
        name = row.pop(args.image)
        if os.path.isabs(name) and Path(name).is_relative_to(path.parent.resolve()):
            name = os.path.relpath(name, path.parent.resolve())
        renamed = {of_own(column): value for column, value in row.items()}
        row.clear()
        row.update({"a": "0"} | renamed | {"file_name": name, "y": renamed[args.y]})
        if "split" in row:
            row["split"] = split_name(row["split"]) or row["split"]
    top = 2 if suffix == ".csv" else 1
    return labels_of(args, rows, path.parent, (path, top), args.a if given else [], told)


def of_own(column):
    """What a column of the table is called here: later stages have columns of their own."""
    return f"own_{column}" if column in OF_STAGES else column


def read_any_csv(path, told):
    """The rows of a csv: commas, semicolons or tabs, UTF-8 or UTF-16."""
    encoding = "utf-16" if path.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        with open(path, encoding=encoding) as file:
            header = re.sub('"[^"]*"', "", file.readline())
    except UnicodeError:
        header = ""  # read_table() says it
    separator = max(",;\t", key=header.count)
    if separator != ",":
        told.append(f"separated by {'tabs' if separator != ';' else 'semicolons'}")
    if encoding == "utf-16":
        told.append("in UTF-16")
    return not_empty(path, imagefolder.read_table(path, (), encoding, separator))


def read_jsonl(path, told):
    """The rows of a file with one JSON object per line, values as str."""
    rows = []
    for number, line in enumerate(read_text(path), 1):
        where = f"{path}, line {number}"
        try:
            rows.append({name: str(value) for name, value in json.loads(line).items()})
        except (ValueError, AttributeError):
            raise InputError(where, "is not a JSON object", "write one object per line") from None
        if rows[-1].keys() != rows[0].keys():
            raise InputError(where, "has different keys from line 1", "use the same keys")
    return not_empty(path, rows)


def read_parquet(path, told):
    """The rows of a parquet file, values as str; needs pyarrow."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(path, "needs the library pyarrow",
                         "run .venv/bin/pip install pyarrow, or save it as csv") from None
    try:
        table = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise InputError(path, f"cannot be read: {files.reason(error)}",
                         "save it again, or as csv") from None
    return not_empty(path, [{name: str(value) for name, value in row.items()} for row in table])


# --------------------------------------------------------------------------------------- the labels


def labels_of(args, rows, images, table, attributes, told):
    """Numbers the labels, cuts missing splits; prints what was inferred; returns a data.Found.

    attributes: the columns of the attribute, [] if there is none. told: what is to be printed.
    """
    where = str(table[0]) if table else str(args.root)
    first = table[1] if table else 1
    if args.a_from and attributes:
        raise InputError("--a-from", f"{where} tells attributes already", "use one of them")
    if args.a_from:
        add_attributes(rows, args.a_from)
    codes, classes = codes_of(where, first, "y", [row["y"] for row in rows], args.classes)
    for row in rows:
        row["y"] = codes[row["y"]]
    names = None
    if len(attributes) > 1:  # their combinations
        of_each = []
        for column in attributes:
            values = [row[column] for row in rows]
            codes, words = codes_of(where, first, column, values, None)
            of_each.append({value: words[codes[value]] if words else f"{column} {codes[value]}"
                            for value in codes})
        shown = [", ".join(of[row[column]] for of, column in zip(of_each, attributes))
                 for row in rows]
        names = sorted(set(shown))
        for row, name in zip(rows, shown):
            row["a"] = names.index(name)
    else:
        column = attributes[0] if attributes else "a"
        codes, names = codes_of(where, first, column, [row[column] for row in rows],
                                args.attributes)
        for row in rows:
            row["a"] = codes[row[column]]
    for title, found in (("classes", classes), ("attributes", names)):
        if found:
            told.append(f"{title} {' / '.join(f'{i} = {name}' for i, name in enumerate(found))}")
    if "split" not in rows[0]:
        for row in rows:
            row["split"] = "train"
    if not table or {row["split"] for row in rows} <= {*imagefolder.SPLITS}:
        told += cut_splits(rows, args.root)  # prepare.py names the row of another split
    print("; ".join(told))
    for title, column in (("class", "y"), ("attribute", "a")):
        there = {row[column] for row in rows}
        missing = [str(i) for i in range(max(there)) if i not in there]
        if missing:
            print(f"note: column {column} has the values {sorted(there)}: no image of {title} "
                  f"{', '.join(missing)} (labels usually count from 0)")
    return Found(images, rows, table, bool(attributes), classes, names)


def add_attributes(rows, path):
    """Sets the attribute of the images that a csv names: file_name and a."""
    table = not_empty(path, imagefolder.read_table(path, ("file_name", "a")))
    known = {row["file_name"]: row["a"] for row in table}
    strange = sorted(known.keys() - {row["file_name"] for row in rows})
    if strange:
        raise InputError(path, f"names {strange[0]}, which is none of the images",
                         "use the same file names")
    for row in rows:
        row["a"] = known.get(row["file_name"], "0")


def codes_of(where, first, column, values, names):
    """({value: its label from 0}, the labels' names, or None for numbers).

    values: of each row, the first of which is row `first` of `where`. Numbers are labels
    themselves (1.0 is 1), and so are false and true, 0 and 1; words are numbered in the order of
    `names`, or sorted. Raises InputError for anything else.
    """
    rows = {}
    for number, value in enumerate(values, first):
        rows.setdefault(value, f"{where}, row {number}")
    numbers = {value: number_of(value) for value in rows}
    if any(number is not None for number in numbers.values()):
        return {value: imagefolder.as_label(rows[value], column, value if number is None else
                                            str(number)) for value, number in numbers.items()}, None
    words = {value: value.strip().replace("_", " ") for value in rows}
    for value, word in words.items():
        if not word or re.match(r"[-+]?[0-9.]|(nan|none|null)$", word.lower()):
            raise InputError(rows[value], f"{column} is {value!r}", "labels are words, integers "
                             "from 0, or true and false")
    different = sorted(set(words.values()))
    if len(different) > MANY:
        raise InputError(where, f"column {column} has {len(different)} different words, such as "
                         f"{', '.join(different[:3])}", f"a label is one of at most {MANY}")
    if names:
        different = [name.replace("_", " ") for name in names]
        lacking = sorted(set(words.values()) - set(different))
        if lacking:
            flag = "--classes" if column == "y" else "--attributes"
            raise InputError(flag, f"does not contain {lacking[0]!r}, a value of {column}",
                             "name each value once")
    return {value: different.index(word) for value, word in words.items()}, different


def number_of(text):
    """The integer that a label is (`1`, `1.0`, `True`), or None."""
    text = text.strip().lower()
    if text in ("true", "false"):
        return int(text == "true")
    return int(text.split(".")[0]) if re.fullmatch(r"[0-9]{1,9}(\.0*)?", text) else None
