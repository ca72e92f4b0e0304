"""CelebA (Liu et al. 2015): y and a are any two of its 40 attributes; the official partition.

The original txt files or Kaggle's csv files; images in img_align_celeba, nested or not.
"""

from common import imagefolder
from common.files import InputError
from data import Found, find, label, not_empty, read_csv, read_text

SOURCE = ("https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html or Kaggle's "
          "jessicali9530/celeba-dataset")


def add_flags(parser):
    parser.add_argument("--target", default="Blond_Hair", help="the class, an attribute of 40")
    parser.add_argument("--attribute", default="Male", help="the attribute, another of the 40")


def words(args):
    if (args.target, args.attribute) == ("Blond_Hair", "Male"):
        return ("a photo of a {a} with {y}", "a photo of a person with {y}",
                ("dark hair", "blond hair"), ("woman", "man"))
    names = [flag.replace("_", " ").lower() for flag in (args.target, args.attribute)]
    return ("a photo of a face, {y}, {a}", "a photo of a face, {y}",
            *((f"not {name}", name) for name in names))


def read(args):
    attributes = find(args.root, SOURCE, "list_attr_celeba.txt", "list_attr_celeba.csv")
    partition = find(args.root, SOURCE, "list_eval_partition.txt", "list_eval_partition.csv")
    in_csv = attributes.suffix == ".csv"
    table = read_csv(attributes, ("image_id",)) if in_csv else read_attributes(attributes)
    for name, flag in ((args.target, "--target"), (args.attribute, "--attribute")):
        if name not in table[0]:
            known = ", ".join(sorted(set(table[0]) - {"image_id", ""}))
            raise InputError(f"{flag} {name}", f"is not a column of {attributes}",
                             f"use one of {known}")
    splits = read_partition(partition)
    first = find(args.root, SOURCE, f"img_align_celeba/{table[0]['image_id']}")
    rows, top = [], 2 if in_csv else 3
    for line, row in enumerate(table, top):
        name = row["image_id"]
        if name not in splits:
            raise InputError(partition, f"has no row for {name}",
                             "download it again: it is incomplete")
        y, a = ({"1": 1, "-1": 0, "0": 0}.get(row[column].strip())
                for column in (args.target, args.attribute))
        if y is None or a is None:
            raise InputError(f"{attributes}, row {line}", f"a label of {name} is neither 1 nor -1",
                             "download it again")
        split = label(partition, name, "partition", {"partition": splits[name]}, 3)
        rows.append({"file_name": name, "y": y, "a": a, "split": imagefolder.SPLITS[split]})
    return Found(first.parent, rows, (attributes, top))


def read_partition(path):
    """{file name: number of its split}"""
    if path.suffix == ".csv":
        pairs = [(row["image_id"], row["partition"])
                 for row in read_csv(path, ("image_id", "partition"))]
    else:
        pairs = read_lines(path, 2)
    splits = {}
    for name, split in pairs:
        if splits.setdefault(name, split) != split:
            raise InputError(path, f"puts {name} into two splits", "download it again")
    return splits


def read_attributes(path):
    """list_attr_celeba.txt: the count, the names, then a line of 1 and -1 per image."""
    head = read_text(path)[:2]
    if len(head) < 2 or not head[0].strip().isdigit():
        raise InputError(path, "does not begin with a count and a line of names",
                         "download it again")
    names = head[1].split()
    lines = read_lines(path, len(names) + 1, skip=2)
    if len(lines) != int(head[0]):
        raise InputError(path, f"has {len(lines)} images, its first line says {head[0].strip()}",
                         "is the download complete?")
    return not_empty(path, [dict(zip(("image_id", *names), line)) for line in lines])


def read_lines(path, fields, skip=0):
    """The lines of a text file, split at blanks. Raises InputError if one has other fields."""
    lines = [line.split() for line in read_text(path)[skip:] if line.strip()]
    for number, line in enumerate(lines, skip + 1):
        if len(line) != fields:
            raise InputError(f"{path}, line {number}", f"has {len(line)} fields, not {fields}",
                             "is the download complete?")
    return lines
