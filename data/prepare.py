"""Prepares a dataset in the one format (see common/imagefolder.py): images and a metadata.csv.

    python data/prepare.py digits --bias 0.95 --out data/digits-0.95
    python data/prepare.py celeba --root ~/celeba --target Smiling --out data/celeba-smiling
    python data/prepare.py folder --root ~/dogs --out data/dogs
    python data/prepare.py utkface --help

{datasets}

A data set is a file beside this one, and for `make` its settings, <name>.mk. Its docstring's first
line is shown above; SOURCE says where to get it; read(args) returns a data.Found: where the images
are, and a row each; words(args) returns templates of the captions of a group ({y}, {a}) and of a
class ({y}), and the names of classes and attributes; add_flags(parser), check(args) are optional.

--bias natural keeps the training images as they are. A number removes training images until this
share of each class has the attribute that is most over-represented in it; val and test are never
touched. Without attribute labels a is 0 throughout: each class is one group (cluster.py --within
dataset finds others).

Reads ROOT. Writes OUT/metadata.csv, OUT/images (a link to them, or the images where they are not
files), OUT/splits (the same once more, a folder per split: so `load_dataset("imagefolder",
data_dir=OUT)` tells the splits apart) and OUT/config.json.
"""

import ast
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository
import data
from common import files, imagefolder, made, pixels, stage
from common.files import InputError

DATASETS = sorted(path.stem for path in Path(__file__).parent.glob("*.py")
                  if path.stem not in ("__init__", "prepare", "embed"))


def subsample(rows, bias):
    """The rows without the training images that are too many for this bias.

    In every class a share `bias` of the training images gets the attribute most over-represented in
    it. Images that come last by the digest of their names go first, so that a higher bias keeps a
    part of a lower one's rare images.
    """
    train = [row for row in rows if row["split"] == "train"]
    counts = imagefolder.group_counts(train)
    dropped = set()
    for y in sorted({row["y"] for row in train}):
        common = imagefolder.correlated_attribute(counts, y)
        members = [row for row in train if row["y"] == y]
        members.sort(key=lambda row: data.position(row["file_name"]))
        agree = [row for row in members if row["a"] == common]
        conflict = [row for row in members if row["a"] != common]
        keep_agree, keep_conflict = len(agree), len(conflict)
        if bias == 1:
            keep_conflict = 0
        elif len(agree) < bias * len(members):
            keep_conflict = round(len(agree) * (1 - bias) / bias)
        else:
            keep_agree = round(len(conflict) * bias / (1 - bias))
        if bias < 1 and not keep_conflict or bias > 0 and not keep_agree:
            raise out_of_reach(bias, y, common, len(agree), len(conflict), keep_agree)
        dropped |= {row["file_name"] for row in agree[keep_agree:] + conflict[keep_conflict:]}
    kept = [row for row in rows if row["file_name"] not in dropped]
    left = imagefolder.group_counts(row for row in kept if row["split"] == "train")
    print(f"{'train':10}{'found':>8}{'kept':>8}{'removed':>8}")
    for group, count in counts.items():
        print(f"{group:10}{count:8}{left.get(group, 0):8}{count - left.get(group, 0):8}")
    return kept


def out_of_reach(bias, y, common, agree, conflict, keep_agree):
    reach = f"up to {agree / (agree + 1):.4f}, and 1"
    if not conflict:
        reach = "only 1"
    elif not keep_agree:
        reach = f"down to {1 / (conflict + 1):.4f}"
    return InputError(f"--bias {bias:g}", f"cannot be reached: class {y} has {agree} training "
                      f"images with attribute {common} and {conflict} others",
                      f"it can reach {reach}")


def add_captions(found, words, args):
    """Writes the text of each row from the names of its labels; a folder's own texts are kept.

    Returns the names of the classes and of the attributes, None where they are unknown.
    """
    rows = found.rows
    template, class_template, classes, attributes = words
    classes = found.classes or args.classes or classes
    attributes = found.attributes or args.attributes or attributes
    known = classes, attributes if found.labelled else None
    if "text" in rows[0] and not (args.classes or args.attributes or args.template):
        return known
    if not (found.labelled or attributes):  # the prompt of a class is that of its groups
        template, attributes = class_template, [""] * (1 + max(row["a"] for row in rows))
    if not (classes and attributes):
        raise InputError("--classes, --attributes", "are required, as labels are numbers and the "
                         "metadata have no column 'text'", "name each class and attribute, from 0 "
                         "on")
    for flag, names, column in (("--classes", classes, "y"), ("--attributes", attributes, "a")):
        top = max(row[column] for row in rows)
        if len(names) <= top:
            raise InputError(flag, f"has {len(names)} names, but {column} goes up to {top}",
                             "name each, from 0 on")
    try:
        for row in rows:
            y, a = classes[row["y"]], attributes[row["a"]]
            row["text"] = (args.template or template).format(y=y, a=a)
            row["class_text"] = class_template.format(y=y)
    except (KeyError, IndexError, ValueError) as error:
        raise InputError("--template", f"cannot be filled in: {error!r}",
                         "it may contain {y} and {a}") from None
    return known


def write_splits(out, rows, columns):
    """A folder per split with a metadata.csv of its own."""
    for split in {row["split"] for row in rows}:
        part = out / {"val": "validation"}.get(split, split)
        part.mkdir(parents=True)
        (part / "images").symlink_to("../../images", target_is_directory=True)
        files.write_csv(part / "metadata.csv", [row for row in rows if row["split"] == split],
                        columns)


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    module = module_of(args.dataset)
    found = module.read(args)
    root, rows = found.images, found.rows
    classes, attributes = add_captions(found, module.words(args), args)
    if found.table:
        imagefolder.check_rows(*found.table, [{name: str(value) for name, value in row.items()}
                                              for row in rows])
    if args.bias != "natural" and args.dataset != "digits":
        if not found.labelled:
            raise InputError(f"--bias {args.bias:g}", "needs attribute labels, and there are none",
                             "use natural")
        rows = subsample(rows, args.bias)
        found.rows[:] = rows
    downloaded = isinstance(root, Path)
    content = [str(args.root), made.outside(args.root or "")]
    if downloaded:
        missing = [row["file_name"] for row in rows if not (root / row["file_name"]).is_file()]
        if missing:
            raise data.not_found(args.root, f"{len(missing)} of {len(rows)} images, the first is "
                                 f"{missing[0]};", module.SOURCE)
        content = [str(root.resolve()), imagefolder.digest(root, rows)]
    code = made.code_digest(__file__, data.__file__, module.__file__)
    key = files.digest(rows, content, args.dataset, code, classes, attributes)
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
        stage.finish(out, args, key, classes=classes, attributes=attributes)
    for split in imagefolder.SPLITS:
        counts = imagefolder.group_counts(row for row in rows if row["split"] == split)
        print(f"{split:5}", counts)


def module_of(dataset):
    return importlib.import_module(f"data.{dataset}")


def parse(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    named = next((word for word in argv if word in DATASETS), None)
    module = named and module_of(named)
    parser = stage.Parser(__file__, module.__doc__ if module else about())
    add = parser.add_argument
    add("dataset", choices=DATASETS)
    add("--root", type=Path, help="the unpacked download, your folder, or a hub id")
    add("--bias", type=stage.number(float, 0, 1, word="natural"), default="natural",
        help="natural, or the share of a class's training images that have the attribute it is "
        "correlated with")
    add("--classes", nargs="+", help="names of the classes in the captions, from 0 on")
    add("--attributes", nargs="+", help="names of the attributes in the captions, from 0 on")
    add("--template", help="a caption, with {y} and {a} for the names")
    add("--out", type=Path, required=True, help="folder to write")
    if hasattr(module, "add_flags"):
        module.add_flags(parser)
    args = parser.parse_args(argv)
    if args.dataset != named:
        raise InputError(args.dataset, f"stands behind {named}", "name the dataset first")
    if module.SOURCE and not args.root:
        raise InputError("--root", "is missing", f"give {module.SOURCE}")
    if module.SOURCE and args.dataset != "hub" and not args.root.is_dir():
        raise InputError(f"--root {args.root}", "is not a folder", module.SOURCE)
    if hasattr(module, "check"):
        module.check(args)
    return args


def about():
    """This script's docstring, with a line for each data set."""
    lines = []
    for name in DATASETS:
        tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
        lines.append(f"{name:12}{ast.get_docstring(tree).splitlines()[0]}")
    return __doc__.replace("{datasets}", "\n".join(lines))


if __name__ == "__main__":
    stage.run(main)
