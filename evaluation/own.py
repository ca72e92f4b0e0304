"""A user's own classifier: its predictions from a csv as people write them, or from its weights."""

import re
from pathlib import Path, PurePosixPath

from classifiers import network
from common import compute, files, imagefolder, pixels, stage
from common.files import InputError

torch = stage.lazy("torch")


def add_flags(parser):
    parser.add_argument("--image", default="file_name", help="the csv's column of file names")
    parser.add_argument("--prediction", default="prediction", help="its column of predictions: "
                        "classes as numbers from 0 or by name")


def with_predictions(rows, path, data, image="file_name", prediction="prediction", split=None):
    """The rows of DATA that have a prediction, with it as int.

    path: a csv, or a folder of train_classifier.py, whose first seed is taken. Files are known by
    the longest ending that names one image, whatever folder stands before it; of several, one of
    `split`. Raises InputError for a prediction that is no class, and for a file that could be
    several images.
    """
    if path.is_dir():
        seeds = path.glob("seed*/predictions.csv")
        path = min(seeds, key=lambda path: int(path.parent.name[4:]), default=path / "seed0")
    if not path.is_file():
        raise InputError(path, "not found", "give a csv with file_name and prediction, or a folder "
                         "of train_classifier.py")
    table = imagefolder.read_table(path, ())
    for flag, column in (("--image", image), ("--prediction", prediction)):
        if table and column not in table[0]:
            raise InputError(path, f"has no column {column!r}; it has {', '.join(table[0])}",
                             f"name yours by {flag}")
    places, predicted, others = endings_of(rows), {}, 0
    words = files.read_json(Path(data) / "config.json").get("classes") or []
    names = {word.lower(): number for number, word in enumerate(words)}
    classes = max(len(names), 1 + max(row["y"] for row in rows))
    for line, row in enumerate(table, 2):
        where = f"{path}, row {line}"
        place = place_of(row[image], rows, places, split, where)
        others += place is None
        if place in predicted:
            raise InputError(where, f"{row[image]} is {rows[place]['file_name']}, which has a "
                             "prediction already", "write one row per image")
        if place is not None:
            predicted[place] = class_of(row[prediction], names, classes, where)
    if not predicted:
        raise InputError(path, f"names no image of {data}",
                         "write file_name as in its metadata.csv")
    if others:
        print(f"note: {others} of {len(table)} predictions are of images that DATA does not "
              "contain")
    return [rows[place] | {"prediction": predicted[place]} for place in sorted(predicted)]


def endings_of(rows):
    """{ending of a path, a tuple of its last parts: the rows that end so}."""
    places = {}
    for place, row in enumerate(rows):
        parts = PurePosixPath(row["file_name"]).parts
        for start in range(len(parts)):
            places.setdefault(parts[start:], []).append(place)
    return places


def place_of(name, rows, places, split, where):
    """The row that a file name means, or None. places: of endings_of()."""
    parts = PurePosixPath(name.strip().replace("\\", "/")).parts
    for start in range(len(parts)):
        found = places.get(parts[start:], [])
        if len(found) > 1:
            found = [place for place in found if rows[place]["split"] == split] or found
        if len(found) > 1:
            raise InputError(where, f"{name} could be {len(found)} images",
                             "write more of its folders")
        if found:
            return found[0]
    return None


def class_of(text, names, classes, where):
    """A prediction as int below `classes`: a number, 1.0 for 1, or the name of a class."""
    word = text.strip().replace("_", " ").lower()
    if word in names:
        return names[word]
    if re.fullmatch(r"[0-9]{1,4}(\.0*)?", word) and float(word) < classes:
        return int(float(word))
    known = f"a number from 0 to {classes - 1}" + f", or one of {', '.join(names)}" * bool(names)
    raise InputError(where, f"prediction is {text!r}", f"write {known}")


def with_classifier(rows, args):
    """The rows of val and test with the prediction of a network of torchvision or timm.

    args: of evaluation/failures.py.
    """
    classes = 1 + max(row["y"] for row in rows)
    rows = [row for row in rows if row["split"] != "train"]
    model, size = network.whole_network(args.arch, args.weights, classes, args.mean, args.std)
    device = compute.accelerator(args.device).device
    model.to(device)
    size = args.resolution or size
    images, predicted = pixels.Pixels(args.data, rows, size, args.cache), []
    with torch.no_grad():
        for shown in network.on_device(images, torch.arange(len(rows)).split(64), device):
            predicted += model(network.to_input(shown, size)).argmax(1).tolist()
    return [row | {"prediction": label} for row, label in zip(rows, predicted)]
