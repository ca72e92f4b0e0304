"""One's own images and tables as people have them:
data/prepare.py folder takes them, and says what it inferred."""

import importlib.util

import pytest
from conftest import run
from PIL import Image

from common import files, imagefolder


def pictures(folder, *names):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i * 7 % 256, 9, 99)).save(path)
    return folder


def prepared(root, out, *more):
    """(what it said, rows of metadata)"""
    text = run("data/prepare.py", "folder", "--root", root, *more, "--out", out)
    return text, imagefolder.read_metadata(out)


def in_splits(rows):
    return {split: sum(row["split"] == split for row in rows) for split in imagefolder.SPLITS}


# ------------------------------------------------------------------------------------ class folders


def test_folders_are_classes(tmp_path):
    root = pictures(tmp_path / "r",
                    *(f"{name}/{i}.jpg" for name in ("wild_dog", "cat") for i in range(10)))
    (root / "cat" / "notes.txt").write_text("no image")
    text, rows = prepared(root, tmp_path / "o")
    assert "20 images in folders of classes; classes 0 = cat / 1 = wild dog; val is 10% of" in text
    assert in_splits(rows) == {"train": 14, "val": 2, "test": 4}
    assert imagefolder.group_prompts(rows) == {
        "y0-a0": "a photo of a cat", "y1-a0": "a photo of a wild dog"}
    run("data/prepare.py", "folder", "--root", root, "--bias", 0.9, "--out", tmp_path / "b",
        fails="--bias 0.9: needs attribute labels, and there are none (use natural)")
    _, rows = prepared(root, tmp_path / "o", "--classes", "wild dog", "cat")
    assert imagefolder.group_prompts(rows)["y1-a0"] == "a photo of a cat"


@pytest.mark.parametrize("val", ("val", "valid", "Validation"))
def test_folders_are_splits_classes_and_attributes(tmp_path, val):
    root = pictures(tmp_path / "r", *(
        f"{split}/{y}/{a}/{i}.png" for split, n in (("train", 4), (val, 2), ("test", 3))
        for y in ("cat", "dog") for a in ("grass", "snow") for i in range(n)))
    text, rows = prepared(root, tmp_path / "o")
    assert ("folders of splits, classes and attributes; classes 0 = cat / 1 = dog; "
            "attributes 0 = grass / 1 = snow\n") in text
    assert in_splits(rows) == {"train": 16, "val": 8, "test": 12}
    assert imagefolder.group_prompts(rows)["y1-a1"] == "a photo of a dog, snow"


def test_a_split_that_is_missing_is_cut_from_train(tmp_path):
    root = pictures(tmp_path / "r", *(
        f"{split}/{y}/{i}.png" for split in ("train", "test") for y in "ab" for i in range(10)))
    text, rows = prepared(root, tmp_path / "o")
    assert ("val is 10% of each group of train\n" in text
            and in_splits(rows) == {"train": 18, "val": 2, "test": 20})
    files.write_csv(root / "metadata.csv", [
        {"file_name": row["file_name"].removeprefix("images/"), "split": row["split"],
         "y": "ab"[row["y"]]} for row in rows if row["split"] != "val"])
    text, rows = prepared(root, tmp_path / "o")
    assert ("val is 10% of each group of train\n" in text
            and in_splits(rows) == {"train": 16, "val": 2, "test": 20})


def test_folders_of_no_layout_are_refused_with_the_layouts(tmp_path):
    layouts = "ROOT/cat/1.jpg, perhaps below train, val and test, ROOT/train/cat/1.jpg"
    assert layouts in run(
        "data/prepare.py", "folder", "--root", pictures(tmp_path / "r", "a/1.png", "a/b/c/2.png"),
        "--out", tmp_path / "o",
        fails="contains no metadata.csv, and has images in folders of different depths")
    assert layouts in run(
        "data/prepare.py", "folder", "--root", pictures(tmp_path / "flat", "1.png"),
        "--out", tmp_path / "o", fails="different depths")
    (tmp_path / "empty").mkdir()
    assert layouts in run("data/prepare.py", "folder", "--root", tmp_path / "empty",
                          "--out", tmp_path / "o", fails="contains no images")


# ------------------------------------------------------------------------------------------- tables

TABLES = {  # what people have, flags for it, the labels of the four images, and what is said
    "words": (
        "file_name,y,a\n0.png,cat,grass\n1.png,dog,grass\n2.png,cat,snow\n3.png,dog,snow\n", (),
        "00 10 01 11", "classes 0 = cat / 1 = dog; attributes 0 = grass / 1 = snow"),
    "words in an order": (
        "file_name,y,a\n0.png,cat,grass\n1.png,dog,grass\n2.png,cat,snow\n3.png,dog,snow\n",
        ("--classes", "dog", "cat", "--attributes", "snow", "grass"),
        "11 01 10 00", "classes 0 = dog / 1 = cat"),
    "pandas' floats": (
        "file_name,y,a\n0.png,0.0,1.0\n1.png,1.0,0.0\n2.png,0.0,0.0\n3.png,1.0,1.0\n",
        ("--classes", "cat", "dog", "--attributes", "grass", "snow"),
        "01 10 00 11", "metadata.csv"),
    "true and false": (
        "file_name,y,a\n0.png,True,false\n1.png,False,true\n2.png,True,true\n3.png,False,false\n",
        ("--classes", "cat", "dog", "--attributes", "grass", "snow"),
        "10 01 11 00", "metadata.csv"),
    "semicolons": (
        "file_name;y;text\n0.png;cat;a, b\n1.png;dog;c\n2.png;cat;a, b\n3.png;dog;c\n", (),
        "00 10 00 10", "separated by semicolons"),
    "tabs": (
        "file_name\ty\n0.png\tcat\n1.png\tdog\n2.png\tcat\n3.png\tdog\n", (),
        "00 10 00 10", "separated by tabs"),
    "UTF-16 of Excel": (
        "file_name\ty\n0.png\tBärchen\n1.png\tdog\n2.png\tdog\n3.png\tdog\n".encode("utf-16"), (),
        "00 10 10 10", "separated by tabs; in UTF-16"),
    "other names": (
        "path,label,place\n0.png,cat,1\n1.png,dog,0\n2.png,cat,0\n3.png,dog,1\n",
        ("--image", "path", "--y", "label", "--a", "place", "--attributes", "grass", "snow"),
        "01 10 00 11", "classes 0 = cat / 1 = dog"),
    "several attributes": (
        "file_name,y,gender,age\n0.png,cat,f,1\n1.png,dog,m,0\n2.png,cat,m,1\n3.png,dog,f,1\n",
        ("--a", "gender", "age"),
        "00 11 02 10", "attributes 0 = f, age 1 / 1 = m, age 0 / 2 = m, age 1"),
    "columns of later stages": (
        "file_name,cluster,seed\n0.png,cat,grass\n1.png,dog,grass\n2.png,cat,snow\n"
        "3.png,dog,snow\n", ("--y", "cluster", "--a", "seed"),
        "00 10 01 11", "attributes 0 = grass / 1 = snow"),
    "two columns of names": (
        "file_name,path,y\nx.png,0.png,cat\nx.png,1.png,dog\nx.png,2.png,cat\nx.png,3.png,dog\n",
        ("--image", "path"), "00 10 00 10", "classes 0 = cat / 1 = dog"),
    "validation": (
        "file_name,y,split\n0.png,cat,Train\n1.png,dog,valid\n2.png,cat,test\n3.png,dog,training\n",
        (), "00 10 00 10", "classes 0 = cat / 1 = dog"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_is_taken_as_it_is(tmp_path, case):
    content, flags, labels, said = TABLES[case]
    root = pictures(tmp_path / "r", *(f"{i}.png" for i in range(4)))
    (root / "metadata.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    text, rows = prepared(root, tmp_path / "o", *flags)
    assert [f"{row['y']}{row['a']}"
            for row in sorted(rows, key=lambda row: row["file_name"])] == labels.split()
    assert said in text.splitlines()[0]


def test_absolute_paths_into_the_folder_are_taken(tmp_path):
    root = pictures(tmp_path / "r", "x/0.png", "x/1.png")
    (root / "metadata.csv").write_text(f"file_name,y\n{root}/x/0.png,cat\n{root}/x/1.png,dog\n")
    assert [row["file_name"] for row in prepared(root, tmp_path / "o")[1]] == [
        "images/x/0.png", "images/x/1.png"]


@pytest.mark.skipif(not importlib.util.find_spec("pyarrow"), reason="pip install pyarrow")
def test_parquet_is_read(tmp_path):
    import pyarrow
    from pyarrow import parquet

    root = pictures(tmp_path / "r", "0.png", "1.png")
    parquet.write_table(pyarrow.table({"file_name": ["0.png", "1.png"], "y": ["dog", "cat"]}),
                        root / "metadata.parquet")
    assert [row["y"] for row in prepared(root, tmp_path / "o")[1]] == [1, 0]


@pytest.mark.parametrize("content, flags, message", (
    ("file_name,y\n0.png,cat\n1.png,\n", (), "row 3: y is ''"),
    ("file_name,y\n0.png,cat\n1.png,nan\n", (), "row 3: y is 'nan'"),
    ("file_name,y\n0.png,-1\n1.png,1.5\n", (), "row 2: y is '-1'"),
    ("file_name,y\n0.png,cat\n1.png,1\n", (), "row 2: y is 'cat'"),
    ("file_name,y\n0.png,cat\n1.png,dog\n", ("--classes", "cat", "bear"),
     "--classes: does not contain 'dog', a value of y"),
    ("image,label\n0.png,cat\n", (),
     "has no column 'file_name'; it has 'image', 'label' (name the columns of file names"),
    ("file_name,y\n" + "".join(f"{i}.png,word {i}\n" for i in range(101)), (),
     "column y has 101 different words, such as word 0"),
))
def test_what_is_no_label_is_refused(tmp_path, content, flags, message):
    root = pictures(tmp_path / "r", "0.png", "1.png")
    (root / "metadata.csv").write_text(content)
    run("data/prepare.py", "folder", "--root", root, *flags, "--out", tmp_path / "o", fails=message)
