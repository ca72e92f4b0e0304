"""Prepares a dataset in the one format (see imagefolder.py): images and a metadata.csv.

    python data/prepare.py digits --bias 0.95 --out data/digits-0.95
    python data/prepare.py waterbirds --root ~/waterbird_complete95_forest2water2 --out data/waterbirds-natural
    python data/prepare.py celeba --root ~/celeba --target Smiling --attribute Young --out data/celeba-smiling
    python data/prepare.py utkface --root ~/UTKFace --attribute race --bias 0.9 --out data/utkface-0.9
    python data/prepare.py folder --root ~/dogs --classes dog wolf --attributes grass snow --out data/dogs

digits      scikit-learn's 1,797 handwritten digits, 32x32, white on a coloured ground: y = even (0) or odd (1), a = red
            (0) or green (1), painted so that a share `bias` of each class is even on red, odd on green
waterbirds  y = landbird, waterbird; a = land, water; its own splits
celeba      y and a: any two of the 40 attributes; the official partition
utkface     y = gender; a = young (up to 5) or old (20 to 50; other ages are left out), or race; splits by file name
folder      your own: images and a metadata.csv with file_name, y, a, and perhaps split and text

--bias natural keeps the training images as they are; a number leaves just so many that this share of each class has
the attribute that the class is tied to, the one most over-represented in it. It removes images of train and no others.

Reads ROOT. Writes OUT/metadata.csv, OUT/images (for digits the images, else a link to yours) and OUT/config.json.
"""

import csv
import hashlib
import re
from pathlib import Path

import imagefolder as folder

WORDS = {  # how a caption is made, and what it calls the classes and the attributes
    "digits": ("a photo of an {y} digit on a {a} background", ("even", "odd"), ("red", "green")),
    "waterbirds": ("a photo of a {y} on {a}", ("landbird", "waterbird"), ("land", "water")),
    "celeba": ("a photo of a {a} with {y}", ("dark hair", "blond hair"), ("woman", "man")),
    "celeba, others": ("a photo of a face, {y}, {a}", None, None),
    "utkface": ("a photo of the face of a {a} {y}", ("male", "female"), ("young", "old")),
    "folder": ("a photo of a {y}, {a}", None, None),
}
RACES = ("White", "Black", "Asian", "Indian", "Latino or Middle Eastern")
SOURCES = {
    "waterbirds": "https://nlp.stanford.edu/data/dro/waterbird_complete95_forest2water2.tar.gz, unpacked",
    "celeba": "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html or Kaggle's jessicali9530/celeba-dataset",
    "utkface": "https://susanqq.github.io/UTKFace, the aligned and cropped faces, unpacked",
}
WATERBIRDS = {"y0-a0": 3498, "y0-a1": 184, "y1-a0": 56, "y1-a1": 1057}  # training images as published

# ------------------------------------------------------------------------------- the datasets
# Each takes the arguments and returns the folder of its images and a row an image: file_name (in that folder), y, a,
# and split where the dataset has one.


def waterbirds(args):
    """Sagawa et al. 2020: metadata.csv with img_id, img_filename, y, split (0, 1, 2), place, place_filename."""
    path = found(args, "metadata.csv")
    rows = [{"file_name": row["img_filename"], "y": label(path, row["y"], 2), "a": label(path, row["place"], 2),
             "split": folder.SPLITS[label(path, row["split"], 3)]}
            for row in read_table(path, ("img_filename", "y", "split", "place"))]
    counts = folder.group_counts(row for row in rows if row["split"] == "train")
    if counts != WATERBIRDS:
        print(f"note: train has the groups {counts}, published are {WATERBIRDS}")
    return path.parent, rows


def celeba(args):
    """Liu et al. 2015: the original txt files, or Kaggle's csv files; images in img_align_celeba, nested or not."""
    attributes = found(args, "list_attr_celeba.txt", "list_attr_celeba.csv")
    partition = found(args, "list_eval_partition.txt", "list_eval_partition.csv")
    table = read_table(attributes, ("image_id",)) if attributes.suffix == ".csv" else read_attributes(attributes)
    for name, flag in ((args.target, "--target"), (args.attribute, "--attribute")):
        if name not in table[0]:
            raise folder.InputError(f"{flag} {name}", f"is no column of {attributes}",
                                    f"one of {', '.join(sorted(set(table[0]) - {'image_id'}))}")
    if partition.suffix == ".csv":
        splits = {row["image_id"]: row["partition"] for row in read_table(partition, ("image_id", "partition"))}
    else:
        splits = dict(read_lines(partition, 2))
    images = found(args, f"img_align_celeba/{table[0]['image_id']}").parent
    rows = []
    for row in table:
        if row["image_id"] not in splits:
            raise folder.InputError(partition, f"does not name {row['image_id']}", "is the download whole?")
        y, a = ({"1": 1, "-1": 0, "0": 0}.get(row[name]) for name in (args.target, args.attribute))
        if y is None or a is None:
            raise folder.InputError(attributes, f"a label of {row['image_id']} is neither 1 nor -1",
                                    "download it again")
        rows.append({"file_name": row["image_id"], "y": y, "a": a,
                     "split": folder.SPLITS[label(partition, splits[row["image_id"]], 3)]})
    return images, rows


def utkface(args):
    """Zhang et al. 2017: age_gender_race_date.jpg(.chip.jpg); other names are skipped, counted and listed.

    The bins are those of From Fake to Real (arXiv 2308.04553) unless --bins tells others.
    """
    rows, skipped, seen = [], [], set()
    for path in sorted(args.root.rglob("*.[jJ][pP][gG]")):
        name = re.fullmatch(r"(\d{1,3})_([01])_([0-4])_\d+\.jpg(\.chip\.jpg)?", path.name, re.IGNORECASE)
        if not name or path.name in seen:
            skipped.append(str(path.relative_to(args.root)))
            continue
        seen.add(path.name)
        age, gender, race = map(int, name.groups()[:3])
        a = race if args.attribute == "race" else next(
            (i for i, (low, high) in enumerate(args.bins) if low <= age <= high), None)
        if a is not None:
            rows.append({"file_name": str(path.relative_to(args.root)), "y": gender, "a": a,
                         "split": split_of(place(path.name))})
    if skipped:
        print(f"skipped {len(skipped)} files, twice there or not named age_gender_race_date.jpg:", *skipped[:20],
              *(["..."] if len(skipped) > 20 else []))
    if not rows:
        raise missing(args, "any image named age_gender_race_date.jpg")
    return args.root, rows


def own_folder(args):
    """Your own images in the one format; a split is drawn where there is none: 70 % train, 10 % val, 20 % test of each
    group, by a digest of the file names."""
    path = found(args, "metadata.csv")
    rows = read_table(path, ("file_name", "y", "a"))
    for row in rows:
        row.update(y=label(path, row["y"]), a=label(path, row["a"]))
    if "split" not in rows[0]:
        sizes, ranks = folder.group_counts(rows), {}
        for row in sorted(rows, key=lambda row: place(row["file_name"])):
            rank = ranks[folder.group_of(row)] = ranks.get(folder.group_of(row), -1) + 1
            row["split"] = split_of((rank + 0.5) / sizes[folder.group_of(row)], 0.7, 0.8)
    return path.parent, rows


def digits(args):
    """Paints scikit-learn's digits: {file_name: (32, 32, 3) uint8}, and a row each."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    val, test = 300, 496  # multiples of 4, so that the four groups are equal; the other 1,001 are for training
    grounds = ((200, 50, 45), (50, 160, 65))  # mean RGB of the red and the green ground
    scans, targets = load_digits(return_X_y=True)
    scans, classes = scans.reshape(-1, 8, 8) / 16, targets % 2
    rng = np.random.default_rng(args.seed)
    jitter = rng.integers(-25, 26, size=(len(scans), 3))
    sides = rng.integers(24, 29, size=len(scans))  # of the scan, in pixels; it lies in the middle, give or take
    corners = (32 - sides)[:, None] // 2 + rng.integers(-1, 2, size=(len(scans), 2))
    images, rows = {}, []
    for y in (0, 1):
        members = rng.permutation(np.flatnonzero(classes == y))
        parts = dict(zip(("val", "test", "train"), np.split(members, [val // 2, val // 2 + test // 2])))
        for split, indices in parts.items():
            agreeing = round(args.bias * len(indices))
            colours = np.where(np.arange(len(indices)) < agreeing, y, 1 - y) if split == "train" \
                else np.arange(len(indices)) % 2
            for index, a in zip(indices, colours.tolist()):
                scan = Image.fromarray((scans[index] * 255).astype(np.uint8))
                ink = Image.new("L", (32, 32))
                ink.paste(scan.resize((sides[index],) * 2, Image.BICUBIC), tuple(corners[index].tolist()))
                ink = np.asarray(ink, dtype=float)[..., None] / 255
                image = (1 - ink) * (np.array(grounds[a]) + jitter[index]) + ink * 245
                images[f"{index:04}.png"] = image.clip(0, 255).astype(np.uint8)
                rows.append({"file_name": f"{index:04}.png", "split": split, "y": y, "a": a,
                             "digit": int(targets[index])})
    return images, sorted(rows, key=lambda row: row["file_name"])


DATASETS = {"digits": digits, "waterbirds": waterbirds, "celeba": celeba, "utkface": utkface, "folder": own_folder}

# ------------------------------------------------------------------------------------- bias, splits and captions


def subsample(rows, bias):
    """The rows without the training images that are too many for this bias.

    In every class a share `bias` of the training images gets the attribute that the class is tied to. Images that
    come last by the digest of their names go first, so that a higher bias keeps a part of a lower one's rare images.
    """
    train = [row for row in rows if row["split"] == "train"]
    counts = folder.group_counts(train)
    dropped = set()
    for y in sorted({row["y"] for row in train}):
        tied = folder.tied_attribute(counts, y)
        members = sorted((row for row in train if row["y"] == y), key=lambda row: place(row["file_name"]))
        agree, conflict = ([row for row in members if (row["a"] == tied) == same] for same in (True, False))
        keep_agree, keep_conflict = len(agree), len(conflict)
        if bias == 1:
            keep_conflict = 0
        elif len(agree) < bias * (len(agree) + len(conflict)):
            keep_conflict = round(len(agree) * (1 - bias) / bias)
        else:
            keep_agree = round(len(conflict) * bias / (1 - bias))
        if bias < 1 and not keep_conflict or bias > 0 and not keep_agree:
            reach = f"up to {len(agree) / (len(agree) + 1):.4f}, and 1" if conflict else "only 1"
            raise folder.InputError(f"--bias {bias:g}", f"can't be reached: class {y} has {len(agree)} training images "
                                    f"with attribute {tied} and {len(conflict)} others", f"it can reach {reach}")
        dropped |= {row["file_name"] for row in agree[keep_agree:] + conflict[keep_conflict:]}
    kept = [row for row in rows if row["file_name"] not in dropped]
    left = folder.group_counts(row for row in kept if row["split"] == "train")
    print(f"{'train':10}{'there':>8}{'kept':>8}{'dropped':>8}")
    for group, count in counts.items():
        print(f"{group:10}{count:8}{left.get(group, 0):8}{count - left.get(group, 0):8}")
    return kept


def place(name):
    """A number in [0, 1) that hangs on the file name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def split_of(number, val=0.8, test=0.9):
    """train, val from `val` on, test from `test` on (80/10/10: From Fake to Real); number: in [0, 1)."""
    return "train" if number < val else "val" if number < test else "test"


def add_captions(rows, args):
    """Writes the text of each row from the names of its class and attribute; a folder's own texts are left."""
    kind = args.dataset
    if kind == "celeba" and (args.target, args.attribute) != ("Blond_Hair", "Male"):
        kind = "celeba, others"
    template, classes, attributes = WORDS[kind]
    if kind == "celeba, others":
        classes, attributes = ((f"not {name}", name) for name in
                               (flag.replace("_", " ").lower() for flag in (args.target, args.attribute)))
    if kind == "utkface" and args.attribute == "race":
        attributes = RACES
    elif kind == "utkface" and args.bins != [(0, 5), (20, 50)]:
        attributes = [f"{low} to {high} years old" for low, high in args.bins]
    classes, attributes = args.classes or classes, args.attributes or attributes
    if not (classes and attributes):
        if "text" in rows[0]:
            return
        raise folder.InputError("--classes, --attributes", "are needed, as metadata.csv has no column text",
                                "name each, from 0 on")
    for flag, names, labels in (("--classes", classes, "y"), ("--attributes", attributes, "a")):
        if len(names) <= (top := max(row[labels] for row in rows)):
            raise folder.InputError(flag, f"names {len(names)}, but {labels} goes up to {top}", "name each, from 0 on")
    try:
        for row in rows:
            row["text"] = (args.template or template).format(y=classes[row["y"]], a=attributes[row["a"]])
    except (KeyError, IndexError, ValueError) as error:
        raise folder.InputError("--template", f"can't be filled: {error!r}", "it may hold {y} and {a}") from None


# ------------------------------------------------------------------------------------------- reading a download


def missing(args, what):
    source = SOURCES.get(args.dataset, "your own metadata.csv with the columns file_name, y, a")
    return folder.InputError(args.root, f"has not {what}", f"{source}; point --root to it")


def found(args, *names):
    """The first of the names that is in ROOT, or one or two folders below; InputError where none is."""
    for depth in ("", "*/", "*/*/"):
        for name in names:
            for path in sorted(args.root.glob(depth + name)):
                return path
    raise missing(args, " or ".join(names))


def read_table(path, columns):
    """The rows of a csv with a header, which has at least `columns`."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, strict=True, skipinitialspace=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise folder.InputError(path, f"not a csv in UTF-8: {error}", "download it again") from None
    lacks = [column for column in columns if not rows or column not in rows[0]]
    if lacks or any(None in row or None in row.values() for row in rows):
        raise folder.InputError(path, f"lacks {', '.join(lacks)}" if lacks else "a row has too many or too few fields",
                                "download it again")
    return rows


def read_lines(path, fields, skip=0):
    """The lines of a text, split at blanks, one or two; InputError where one has not so many fields."""
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()[skip:] if line.strip()]
    for number, line in enumerate(lines, skip + 1):
        if len(line) != fields:
            raise folder.InputError(f"{path}, line {number}", f"has {len(line)} fields, not {fields}",
                                    "is the download whole?")
    return lines


def read_attributes(path):
    """list_attr_celeba.txt: a line with the count, one with the names, then a line an image, of 1 and -1."""
    head = path.read_text(encoding="utf-8").splitlines()[:2]
    if len(head) < 2 or not head[0].strip().isdigit():
        raise folder.InputError(path, "does not begin with a count and a line of names", "download it again")
    names = head[1].split()
    lines = read_lines(path, len(names) + 1, skip=2)
    if len(lines) != int(head[0]):
        raise folder.InputError(path, f"has {len(lines)} images, its first line says {head[0].strip()}",
                                "is the download whole?")
    return [dict(zip(("image_id", *names), line)) for line in lines]


def label(path, text, below=None):
    """An integer from 0, less than `below`."""
    if not (text.isascii() and text.isdigit()) or (below is not None and int(text) >= below):
        raise folder.InputError(path, f"{text!r} is no label",
                                f"here labels are integers from 0{f' to {below - 1}' if below else ''}")
    return int(text)


# ------------------------------------------------------------------------------------------------ the script


def bias_of(text):
    return text if text == "natural" else folder.number(float, 0, 1)(text)


def years(text):
    """`20-50` -> (20, 50)."""
    low, high = map(int, text.split("-"))
    if low > high:
        raise ValueError(text)
    return low, high


def main():
    args = parse()
    source, rows = DATASETS[args.dataset](args)
    add_captions(rows, args)
    if args.dataset != "digits":
        rows = rows if args.bias == "natural" else subsample(rows, args.bias)
        gone = [row["file_name"] for row in rows if not (source / row["file_name"]).is_file()]
        if gone:
            raise missing(args, f"{len(gone)} of {len(rows)} images, {gone[0]} is the first,")
        folder.check_images(source, rows)
    for row in rows:
        row["file_name"] = f"images/{row['file_name']}"
    columns = list(dict.fromkeys((*folder.REQUIRED, *rows[0])))
    with folder.replacing(args.out) as out:
        out.mkdir(parents=True)
        if args.dataset == "digits":
            from PIL import Image

            (out / "images").mkdir()
            for name, image in source.items():
                Image.fromarray(image).save(out / "images" / name)
        else:
            (out / "images").symlink_to(source.resolve(), target_is_directory=True)
        folder.write_csv(out / "metadata.csv", rows, columns)
        folder.read_metadata(out)
        folder.write_config(out, args, folder.digest(rows))
    for split in folder.SPLITS:
        print(f"{split:5}", folder.group_counts(row for row in rows if row["split"] == split))


def parse():
    parser = folder.Arguments(__doc__)
    parser.add_argument("dataset", choices=tuple(DATASETS))
    parser.add_argument("--root", type=Path, help="the unpacked download, or your folder (digits needs none)")
    parser.add_argument("--bias", type=bias_of, help="natural, or the share of a class's training images whose "
                        "attribute agrees with it; default: 0.95 for digits, natural for others")
    parser.add_argument("--target", help="celeba: the class, one of the 40 attributes; default Blond_Hair")
    parser.add_argument("--attribute", help="celeba: the attribute, one of the 40, default Male; utkface: age or race")
    parser.add_argument("--bins", type=years, nargs="+", default=[(0, 5), (20, 50)], metavar="LOW-HIGH",
                        help="utkface: ages in years, both ends included; default 0-5 20-50 (From Fake to Real)")
    parser.add_argument("--classes", nargs="+", help="names of the classes in the captions, from 0 on")
    parser.add_argument("--attributes", nargs="+", help="names of the attributes in the captions, from 0 on")
    parser.add_argument("--template", help="a caption, with {y} and {a} for the names")
    parser.add_argument("--seed", type=int, default=0, help="digits: of the splits and the colours")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    if args.bias is None:
        args.bias = 0.95 if args.dataset == "digits" else "natural"
    if args.dataset == "digits" and args.bias == "natural":
        raise folder.InputError("--bias natural", "digits have no colour by nature", "give a number, such as 0.95")
    args.root = args.root and args.root.expanduser()
    if args.dataset != "digits" and not (args.root and args.root.is_dir()):
        raise folder.InputError("--root", f"{args.root or ''} is no folder",
                                SOURCES.get(args.dataset, "your images and their metadata.csv"))
    args.target = args.target or "Blond_Hair"
    args.attribute = args.attribute or {"celeba": "Male", "utkface": "age"}.get(args.dataset)
    if args.dataset == "utkface" and args.attribute not in ("age", "race"):
        raise folder.InputError(f"--attribute {args.attribute}", "is none of UTKFace", "age or race")
    return args


if __name__ == "__main__":
    folder.run(main)
