"""Your own images, and a metadata.csv (or .jsonl) with file_name, y, and perhaps a, split, text.

Without a column split, each group is split by a digest of the file names: 70 % train, 10 % val,
20 % test. Without a column a, each class is one group.
"""

import json
from pathlib import Path

from common import imagefolder
from common.files import InputError
from data import Found, find, label, not_empty, read_csv, read_text, split_groups

SOURCE = "your own metadata.csv with the columns file_name, y, a"
OF_STAGES = ("cluster", "unit", "clip_score", "seed", "prompt", "negative_prompt",
             "guidance_scale")  # columns of later stages


def add_flags(parser):
    parser.add_argument("--a-from", type=Path, help="a csv with file_name and a, for some of the "
                        "images, usually those of test")


def words(args):
    return "a photo of a {y}, {a}", "a photo of a {y}", None, None


def read(args):
    path = find(args.root, SOURCE, "metadata.csv", "metadata.jsonl")
    in_csv, top = path.suffix == ".csv", 1 if path.suffix == ".jsonl" else 2
    rows = (read_csv if in_csv else read_jsonl)(path, ("file_name", "y"))
    labelled, known = "a" in rows[0], {}
    if args.a_from and labelled:
        raise InputError("--a-from", f"{path} has a column 'a' already", "use one of them")
    if args.a_from:
        table = read_csv(args.a_from, ("file_name", "a"))
        known = {row["file_name"]: row["a"] for row in table}
    strange = sorted(known.keys() - {row["file_name"] for row in rows})
    if strange:
        raise InputError(args.a_from, f"names {strange[0]}, which is not in {path}",
                         "use the same file names")
    for line, row in enumerate(rows, top):
        renamed = {f"own_{name}" if name in OF_STAGES else name: value
                   for name, value in row.items()}
        row.clear()
        row.update({"a": known.get(renamed["file_name"], "0")} | renamed)
        row.update(y=label(path, line, "y", row), a=label(path, line, "a", row))
    if "split" not in rows[0]:
        split_groups(rows, 0.7, 0.8)
    for name, column in (("class", "y"), ("attribute", "a")):
        there = {row[column] for row in rows}
        missing = [str(i) for i in range(max(there)) if i not in there]
        if missing:
            print(f"note: column {column} has the values {sorted(there)}: no image of {name} "
                  f"{', '.join(missing)} (labels usually count from 0)")
    return Found(path.parent, rows, (path, top), labelled)


def read_jsonl(path, columns):
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
    if rows:
        imagefolder.check_columns(path, rows[0], columns)
    return not_empty(path, rows)
