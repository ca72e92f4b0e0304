"""What is wrong with my classifier? One page about the images that it fails on, without labels.

    python evaluation/failures.py --data data/dogs --embeddings runs/dogs/embeddings --clip $CLIP \\
        --predictions ~/predictions.csv --words "on grass" "on snow" --out runs/dogs/failures
    python evaluation/failures.py ... --weights ~/resnet18.safetensors --arch resnet18 --out ...

The images that have a prediction are clustered across classes, as by cluster.py --within dataset;
an image's pseudo-group is its class and its cluster. Per pseudo-group the page tells the accuracy,
whether it is significantly below that of the rest of the class, images, and which of --words CLIP
finds more in it than in the rest of the class.

Reads DATA, EMBEDDINGS and PREDICTIONS (a csv with file names and classes; or a folder of
train_classifier.py, whose first seed is taken), or WEIGHTS, the whole state dict of a network of
torchvision or timm. Writes OUT/failures.html, OUT/groups.csv, OUT/pseudo-groups.csv (file_name, and
a, the cluster: for prepare.py --a-from), a sheet of images per pseudo-group and OUT/config.json.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository
import cluster
from common import clip, compute, files, imagefolder, pixels, stage
from common.files import InputError
from evaluation import own
from evaluation.report import environment

np = stage.lazy("numpy")

WORDS = ("indoors", "outdoors", "on water", "on land", "on grass", "in snow", "in a forest",
         "in a street", "at night", "a person", "a hand", "text", "red", "green", "blue", "dark",
         "bright", "black and white", "a drawing")
PSEUDO = "pseudo-groups.csv"
COLUMNS = ("name", "class", "cluster", "images", "accuracy", "rest", "p", "words")  # of groups.csv

# -------------------------------------------------------------------------------------- the method


def compared(correct, inside):
    """Is the accuracy inside a group below that outside? correct, inside: (N,) bool.

    Returns (accuracy inside, outside, one-sided p of Fisher's exact test); NaN and 1 for an empty
    side.
    """
    from scipy.stats import fisher_exact

    table = [[int((correct[side] == hit).sum()) for hit in (True, False)]
             for side in (inside, ~inside)]
    shares = [hits / (hits + misses) if hits + misses else float("nan") for hits, misses in table]
    return *shares, float(fisher_exact(table, "less").pvalue)


def found_more(embeddings, inside, texts):
    """How much more similar to each text are the images inside? (M,), in standard deviations.

    embeddings: (N, D), texts: (M, D), both of unit length; inside: (N,) bool.
    """
    similarity = embeddings @ texts.T
    difference = similarity[inside].mean(0) - similarity[~inside].mean(0)
    return difference / np.maximum(similarity.std(0), 1e-9)


def groups_of(rows, embeddings, labels, words, texts, names):
    """A dict per pseudo-group, the worst first: COLUMNS, and the indices of its members.

    labels: (N,), the cluster of each row; rest: accuracy of the other images of its class.
    """
    y = np.array([row["y"] for row in rows])
    correct = np.array([row["prediction"] for row in rows]) == y
    found = []
    for c in np.unique(y):
        members = np.flatnonzero(y == c)
        for label in np.unique(labels[members]):
            inside = labels[members] == label
            accuracy, rest, p = compared(correct[members], inside)
            more = np.zeros(len(words))
            if not inside.all():
                more = found_more(embeddings[members], inside, texts)
            best = [f"{words[i]} ({more[i]:+.1f})" for i in np.argsort(-more)[:3] if more[i] > 0.5]
            found.append({
                "name": f"{names[int(c)]}, cluster {label}", "class": int(c), "cluster": int(label),
                "images": int(inside.sum()), "accuracy": round(accuracy, 4),
                "rest": round(rest, 4), "p": p, "words": ", ".join(best),
                "members": members[inside]})
    return sorted(found, key=lambda group: group["accuracy"])


# -------------------------------------------------------------------------------------- the script


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    rows = imagefolder.read_metadata(args.data)
    labelled = len({row["a"] for row in rows}) > 1
    command = cure(args, labelled)
    names = {y: texts[0].removeprefix("a photo of ")
             for y, texts in imagefolder.class_prompts(rows).items()}
    if args.predictions:
        rows = own.with_predictions(rows, args.predictions, args.data, args.image,
                                    args.prediction)
    else:
        rows = own.with_classifier(rows, args)
    encoder = clip.Clip(args.clip, compute.accelerator(args.device).device)
    embeddings = clip.read_embeddings(args.embeddings, rows, encoder)
    texts = encoder.texts(list(args.words)).numpy()
    labels = cluster.group_clusters(embeddings, args.k, args.k_max, args.min_size, 0)
    groups = groups_of(rows, embeddings, np.array(labels), args.words, texts, names)
    # Bonferroni: as many tests as groups.
    failing = [group for group in groups if group["p"] < 0.05 / len(groups)]
    accuracy = sum(row["prediction"] == row["y"] for row in rows) / len(rows)
    with files.replacing(args.out) as out:
        out.mkdir(parents=True)
        for group in groups:
            group["sheet"] = out / f"y{group['class']}-c{group['cluster']}.png"
            save_sheet(group["sheet"], [rows[i] for i in group["members"]], args.data)
        page = environment().get_template("failures.html").render(
            data=args.data.name, images=len(rows), accuracy=f"{accuracy:.3f}",
            groups=[table_row(group) for group in groups], failing=failing, sheets=groups,
            classifier=args.predictions or args.weights, words=args.words,
            command=command, known=labelled)
        (out / "failures.html").write_text(page, encoding="utf-8")
        files.write_csv(out / "groups.csv", [{name: group[name] for name in COLUMNS}
                                             for group in groups])
        files.write_csv(out / PSEUDO, [
            {"file_name": row["file_name"].removeprefix("images/"), "a": label}
            for row, label in zip(rows, labels)])
        stage.finish(out, args, files.digest(page))
    print(f"{len(rows)} images, accuracy {accuracy:.3f}; it fails on {len(failing)} of "
          f"{len(groups)} pseudo-groups")
    for group in failing:
        print(f"  {group['name']}: {group['images']} images, accuracy {group['accuracy']:.3f}, "
              f"rest of the class {group['rest']:.3f}; more of: "
              f"{group['words'] or 'none of the words'}")
    print(f"see {args.out / 'failures.html'}; to train a better one and compare:\n{command}")


def cure(args, labelled):
    """The make command that trains without labels, and compares with the user's classifier.

    Unless DATA has attribute labels (labelled), the page's pseudo-groups are the groups of the
    test: in a copy, as this page is made anew from what the command makes.
    """
    dataset, dash, bias = args.data.name.rpartition("-")  # data/<dataset>-<bias>
    words = ["make", *([f"DATASET={dataset}", f"BIAS={bias}"] if dash else [f"DATASET={bias}"])]
    config = files.read_json(args.data / "config.json")
    arguments, flags, copy = config.get("arguments", {}), config.get("command", [])[2:], ""
    for name in ("--bias", "--out", "--root", "--a-from"):
        if name in flags:
            del flags[flags.index(name):flags.index(name) + 2]
    if arguments.get("dataset") == "folder" and not labelled:
        copy = f"cp {shlex.quote(str(args.out / PSEUDO))} . && "
        flags += ["--a-from", PSEUDO]
    if arguments.get("root"):
        words.append(f"ROOT={arguments['root']}")
    if flags:
        words.append(f"PREPARE={shlex.join(flags)}")
    words.append("RECIPES=erm-free dfr-free clustered-free")
    if args.predictions and args.predictions.is_file():
        words.append(f"PREDICTIONS={args.predictions}")
        if (args.image, args.prediction) != ("file_name", "prediction"):
            words.append(f"COLUMNS=--image {args.image} --prediction {args.prediction}")
    return copy + shlex.join(words)


def table_row(group):
    return {"pseudo-group": group["name"], "images": group["images"],
            "accuracy": f"{group['accuracy']:.3f}", "rest of its class": f"{group['rest']:.3f}",
            "p": f"{group['p']:.1e}", "more of (standard deviations)": group["words"]}


def save_sheet(path, rows, data):
    """Up to 16 images that the classifier gets wrong, and as many that it gets right."""
    lines, labels = [], []
    for label, right in (("wrong", False), ("right", True)):
        members = [row for row in rows if (row["prediction"] == row["y"]) == right]
        chosen = imagefolder.spread(members, 16)
        lines.append([imagefolder.load_image(data / row["file_name"], 64) for row in chosen])
        labels.append(f"{label} ({len(members)})")
    imagefolder.contact_sheet(lines, labels).save(path)


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    count, add = stage.number(int, 1), parser.add_argument
    add("--data", type=Path, required=True, help="real images: a prepared dataset folder")
    add("--embeddings", type=Path, required=True, help="of its images: output of data/embed.py")
    add("--clip", required=True, help="the CLIP model of the embeddings, a folder or hub id")
    add("--predictions", type=Path, help="csv with file_name and prediction, or folder of "
        "train_classifier.py")
    own.add_flags(parser)
    add("--weights", type=Path, help="instead: .safetensors or .pth with the state dict of --arch, "
        "for val and test")
    add("--arch", default="resnet50", help="of --weights: a network of torchvision or timm")
    add("--resolution", type=count, help="of --weights: pixels per side; default: timm's, or 224")
    for name, what in (("mean", "means"), ("std", "standard deviations")):
        add(f"--{name}", type=float, nargs=3, help=f"of --weights: the {what} by which red, green "
            "and blue, from 0 to 1, are normalised; default: timm's, or ImageNet's")
    add("--words", nargs="+", default=list(WORDS), help="what CLIP looks for")
    add("--k", type=stage.number(int, 1, word="auto"), default="auto", help="clusters, or auto")
    add("--k-max", type=count, default=5, help="largest number of clusters that auto tries")
    add("--min-size", type=count, default=10, help="smallest number of images in a cluster")
    pixels.add_flag(parser)
    compute.add_flags(parser, precision=False)
    add("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    if bool(args.predictions) == bool(args.weights):
        raise InputError("--predictions, --weights", "one of them is needed",
                         "give predictions, or weights and --arch")
    return args


if __name__ == "__main__":
    stage.run(main)
