"""Prepares a dataset in the one format (see imagefolder.py): images and a metadata.csv.

    python data/prepare.py digits --bias 0.95 --out data/digits-0.95

digits: scikit-learn's 1,797 handwritten digits, 32x32, white on a coloured ground.
y = even (0) or odd (1); a = red (0) or green (1) ground. In the training split, a share `bias` of each class
stands on the colour that agrees with it (even on red, odd on green); val and test are balanced in (y, a).
The colour is painted, so it is drawn; the images of a split are the same at every bias.

Reads nothing. Writes OUT/metadata.csv, OUT/images/*.png, OUT/config.json.
"""

from pathlib import Path

import imagefolder as folder

WORDS = (("even", "odd"), ("red", "green"))
GROUNDS = ((200, 50, 45), (50, 160, 65))  # mean RGB of the red and the green ground
VAL, TEST = 300, 496  # multiples of 4, so that the four groups are equal; the other 1,001 are for training


def digits(bias, seed):
    """Yields (name, image, row) of the coloured digits; image: (32, 32, 3) uint8."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    scans, targets = load_digits(return_X_y=True)
    scans, classes = scans.reshape(-1, 8, 8) / 16, targets % 2
    rng = np.random.default_rng(seed)
    jitter = rng.integers(-25, 26, size=(len(scans), 3))
    sides = rng.integers(20, 29, size=len(scans))  # of the scan, in pixels, somewhere in the 32 of the photo
    corners = (rng.random((len(scans), 2)) * (33 - sides)[:, None]).astype(int)
    for y in (0, 1):
        members = rng.permutation(np.flatnonzero(classes == y))
        val, test, train = np.split(members, [VAL // 2, VAL // 2 + TEST // 2])
        agreeing = round(bias * len(train))
        colours = {
            "val": np.arange(len(val)) % 2,
            "test": np.arange(len(test)) % 2,
            "train": np.where(np.arange(len(train)) < agreeing, y, 1 - y),
        }
        for split, indices in (("train", train), ("val", val), ("test", test)):
            for index, a in zip(indices, colours[split]):
                scan = Image.fromarray((scans[index] * 255).astype(np.uint8))
                ink = Image.new("L", (32, 32))
                ink.paste(scan.resize((sides[index],) * 2, Image.BICUBIC), tuple(corners[index].tolist()))
                ink = np.asarray(ink, dtype=float)[..., None] / 255
                image = (1 - ink) * (np.array(GROUNDS[a]) + jitter[index]) + ink * 245
                text = f"a photo of an {WORDS[0][y]} digit on a {WORDS[1][a]} background"
                name = f"images/{index:04}.png"
                row = {"file_name": name, "split": split, "y": y, "a": int(a), "text": text,
                       "digit": int(targets[index])}
                yield name, image.clip(0, 255).astype(np.uint8), row


def main():
    parser = folder.Arguments(__doc__)
    parser.add_argument("dataset", choices=("digits",))
    parser.add_argument("--bias", type=folder.number(float, 0.5, 1), default=0.95,
                        help="share of training images whose attribute agrees with their class")
    parser.add_argument("--seed", type=int, default=0, help="of the splits and the colours")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args()

    from PIL import Image

    rows = []
    with folder.replacing(args.out) as out:
        (out / "images").mkdir(parents=True)
        for name, image, row in digits(args.bias, args.seed):
            Image.fromarray(image).save(out / name)
            rows.append(row)
        rows.sort(key=lambda row: row["file_name"])
        folder.write_csv(out / "metadata.csv", rows)
        folder.write_config(out, args, folder.digest(rows))
    for split in folder.SPLITS:
        print(f"{split:5}", folder.group_counts(row for row in rows if row["split"] == split))


if __name__ == "__main__":
    folder.run(main)
