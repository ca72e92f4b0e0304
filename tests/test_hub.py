"""data/prepare.py hub: parquet files of the shapes of the Hub's mirrors.

Needs `pip install datasets`.
"""

import importlib.util
import io

import numpy as np
import pytest
from conftest import run
from PIL import Image

from common import imagefolder

there = pytest.mark.skipif(not importlib.util.find_spec("datasets"), reason="pip install datasets")
CAPTIONS = ("--classes", "bird", "duck", "--attributes", "land", "lake")


def parquet(folder, split, count, columns, features=None):
    """Images of random colours and columns, functions of the index,
    in a parquet file, as push_to_hub writes it.
    """
    import datasets
    import pyarrow.parquet

    def image(i):
        out = io.BytesIO()
        Image.fromarray(np.full((20, 24, 3), (i * 5 % 256, 7, 9), np.uint8)).save(out, "PNG")
        return {"bytes": out.getvalue(), "path": None}

    table = {"image": [image(i) for i in range(count)],
             **{name: [of(i) for i in range(count)] for name, of in columns.items()}}
    features = datasets.Features({"image": datasets.Image()} | {
        name: (features or {}).get(name, datasets.Value(
            {bool: "bool", int: "int64", str: "string", float: "float64"}[type(of(0))]))
        for name, of in columns.items()})
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pydict(table, features.arrow_schema)
    pyarrow.parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.skipif(bool(importlib.util.find_spec("datasets")), reason="datasets is installed")
def test_without_the_library_the_error_names_it(tmp_path):
    run("data/prepare.py", "hub", "--root", "grodino/waterbirds", "--out", tmp_path / "o",
        fails="pip install datasets")


@there
def test_class_labels_and_splits_are_taken_as_they_are(tmp_path):
    """The shape of Waterbirds' mirrors: class labels with names, train, validation and test."""
    import datasets

    kinds = {"label": datasets.ClassLabel(names=["landbird", "waterbird"]),
             "place": datasets.ClassLabel(names=["land", "water"])}
    for split, count in (("train", 40), ("validation", 12), ("test", 20)):
        parquet(tmp_path / "w", split, count,
                {"label": lambda i: i % 2, "place": lambda i: i // 2 % 2}, kinds)
    run("data/prepare.py", "hub", "--root", tmp_path / "w", "--y", "label", "--a", "place",
        "--out", tmp_path / "o")
    rows = imagefolder.read_metadata(tmp_path / "o")
    assert [sum(row["split"] == split for row in rows)
            for split in imagefolder.SPLITS] == [40, 12, 20]
    assert imagefolder.group_prompts(rows)["y1-a0"] == "a photo of a waterbird, land"
    assert imagefolder.load_image(
        tmp_path / "o" / rows[3]["file_name"], 20).getpixel((0, 0)) == (15, 7, 9)
    assert (rows[3]["y"], rows[3]["a"]) == (1, 1)
    assert "up to date" in run("data/prepare.py", "hub", "--root", tmp_path / "w",
                               "--y", "label", "--a", "place", "--out", tmp_path / "o")


@there
def test_one_split_is_cut_into_three_and_minus_one_true_and_texts_are_labels(tmp_path):
    """The shapes of CelebA's and UTKFace's mirrors:
    columns of -1 and 1 or of true and false, one split.
    """
    parquet(tmp_path / "c", "train", 200, {
        "Blond_Hair": lambda i: 2 * (i % 2) - 1, "Male": lambda i: i % 3 == 0,
        "race": lambda i: ("White", "Not_White")[i % 3 == 0], "age": lambda i: i + 0.5})
    root = ("data/prepare.py", "hub", "--root", tmp_path / "c", "--y", "Blond_Hair")
    run(*root, "--a", "Male", *CAPTIONS, "--out", tmp_path / "o")
    rows = imagefolder.read_metadata(tmp_path / "o")
    assert {(row["y"], row["a"]) for row in rows} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    for i, row in enumerate(rows):
        assert (row["y"], row["a"]) == (i % 2, int(i % 3 == 0))
    shares = [sum(row["split"] == split for row in rows) / 200 for split in imagefolder.SPLITS]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.03)
    run(*root, "--a", "race", "--classes", "dark", "blond", "--bias", 0.8, "--out", tmp_path / "p")
    rows = imagefolder.read_metadata(tmp_path / "p")
    assert {row["text"] for row in rows if row["a"] == 0} == {
        "a photo of a dark, Not White", "a photo of a blond, Not White"}
    assert len(list((tmp_path / "p" / "images").iterdir())) == len(rows) < 200
    run(*root, "--a", "age", *CAPTIONS, "--out", tmp_path / "q",
        fails="a label is an integer, a text, or true or false")
    run(*root, "--a", "sex", "--out", tmp_path / "q", fails="--a sex: is not a column of")
    run(*root, "--a", "Male", "--out", tmp_path / "q",
        fails="--classes, --attributes: are required")
    assert not (tmp_path / "q").exists()


@there
@pytest.mark.parametrize("spoil", ("nothing", "rubbish"))
def test_what_cannot_be_read_is_a_one_line_error(tmp_path, spoil):
    (tmp_path / "r").mkdir()
    if spoil == "rubbish":
        (tmp_path / "r" / "train-00000-of-00001.parquet").write_bytes(b"no parquet")
    run("data/prepare.py", "hub", "--root", tmp_path / "r", "--out", tmp_path / "o",
        fails="cannot be read by datasets")
    assert not (tmp_path / "o").exists()


@there
def test_an_image_without_its_class_label_is_refused(tmp_path):
    import datasets

    kinds = {"label": datasets.ClassLabel(names=["cat", "dog"])}
    root = parquet(tmp_path / "r", "train", 20, {"label": lambda i: i % 2}, kinds)
    parquet(root, "test", 4, {"label": lambda i: -1}, kinds)
    run("data/prepare.py", "hub", "--root", root, "--out", tmp_path / "o",
        fails="--y label: has images without a label")
