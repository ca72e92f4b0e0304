"""Waterbirds (Sagawa et al. 2020): y = landbird, waterbird; a = land, water; its own splits."""

from common import imagefolder
from data import Found, find, label, read_csv

SOURCE = ("https://nlp.stanford.edu/data/dro/waterbird_complete95_forest2water2.tar.gz, unpacked")
PUBLISHED = {"y0-a0": 3498, "y0-a1": 184, "y1-a0": 56, "y1-a1": 1057}  # training images


def words(args):
    return ("a photo of a {y} on {a}", "a photo of a {y}", ("landbird", "waterbird"),
            ("land", "water"))


def read(args):
    """metadata.csv has img_id, img_filename, y, split (0, 1, 2), place, place_filename."""
    path, rows = find(args.root, SOURCE, "metadata.csv"), []
    for line, row in enumerate(read_csv(path, ("img_filename", "y", "split", "place")), 2):
        split = imagefolder.SPLITS[label(path, line, "split", row, 3)]
        rows.append({"file_name": row["img_filename"], "y": label(path, line, "y", row, 2),
                     "a": label(path, line, "place", row, 2), "split": split})
    counts = imagefolder.group_counts(row for row in rows if row["split"] == "train")
    if counts != PUBLISHED:
        print(f"note: the training groups are {counts}, the published ones {PUBLISHED}")
    return Found(path.parent, rows, (path, 2))
