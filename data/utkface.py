"""UTKFace (Zhang et al. 2017): y = gender; a = young or old, or race; splits by file name.

Files are named age_gender_race_date.jpg(.chip.jpg); others are skipped, counted and listed. The age
bins, up to 5 and 20 to 50, are those of From Fake to Real (arXiv 2308.04553).
"""

import re

from common.files import InputError
from data import Found, not_found, position, split_of

SOURCE = "https://susanqq.github.io/UTKFace, the aligned and cropped faces, unpacked"
RACES = ("White", "Black", "Asian", "Indian", "Latino or Middle Eastern")
BINS = [(0, 5), (20, 50)]
NAME = re.compile(r"([0-9]{1,3})_([01])_([0-4])_[0-9]+\.jpg(\.chip\.jpg)?", re.IGNORECASE)


def add_flags(parser):
    parser.add_argument("--attribute", default="age", help="age or race")
    parser.add_argument("--bins", type=years, nargs="+", default=BINS, metavar="LOW-HIGH",
                        help="ages in years, both ends included; default 0-5 20-50")


def years(text):
    """`20-50` -> (20, 50)."""
    low, high = map(int, text.split("-"))
    if low > high:
        raise ValueError(text)
    return low, high


def check(args):
    bins = sorted(args.bins)
    if any(high >= low for (_, high), (low, _) in zip(bins, bins[1:])):
        raise InputError("--bins", "overlap",
                         "give ranges of ages that do not, for example 0-5 20-50")
    if args.attribute not in ("age", "race"):
        raise InputError(f"--attribute {args.attribute}", "is not in UTKFace", "use age or race")


def words(args):
    attributes = ("young", "old")
    if args.attribute == "race":
        attributes = RACES
    elif args.bins != BINS:
        attributes = [f"{low} to {high} years old" for low, high in args.bins]
    return ("a photo of the face of a {a} {y}", "a photo of the face of a {y}",
            ("male", "female"), attributes)


def read(args):
    rows, skipped, seen = [], [], set()
    for path in sorted(args.root.rglob("*.[jJ][pP][gG]")):
        name = NAME.fullmatch(path.name)
        if not name or path.name in seen:
            skipped.append(str(path.relative_to(args.root)))
            continue
        seen.add(path.name)
        age, gender, race = map(int, name.groups()[:3])
        found = [i for i, (low, high) in enumerate(args.bins) if low <= age <= high]
        if args.attribute == "race":
            found = [race]
        for a in found:
            rows.append({"file_name": str(path.relative_to(args.root)), "y": gender, "a": a,
                         "split": split_of(position(path.name))})
    if skipped:
        more = ["..."] if len(skipped) > 20 else []
        print(f"skipped {len(skipped)} files, duplicates or not named age_gender_race_date.jpg:",
              *skipped[:20], *more)
    if not rows:
        raise not_found(args.root, "any image named age_gender_race_date.jpg", SOURCE)
    return Found(args.root, rows)
