"""The real benchmarks: small files of exactly the formats that one downloads, through all five
stages.
"""

import csv
import os
import random
import shutil

import pytest
from conftest import make, new_house, run, slow
from PIL import Image, ImageDraw

from common import imagefolder, made

GROUPS = {(0, 0): 24, (0, 1): 6, (1, 0): 6, (1, 1): 24}


def picture(path, y, a, i, size=(40, 48)):
    """A bar or a box on a ground of its attribute's colour;
    some as greyscale, as CMYK, or lying on their side.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draws = random.Random(f"{y}{a}{i}")
    image = Image.new("RGB", size,
                      ((200, 50, 45), (50, 160, 65), (50, 80, 200), (205, 185, 45))[a % 4])
    left, top = draws.randrange(4, 12), draws.randrange(4, 8)
    ImageDraw.Draw(image).rectangle((left, top, left + 3 + 5 * y, top + 18), fill="white")
    if i == 1:
        image = image.convert("L")
    if i == 2:
        image = image.convert("CMYK")
    exif = Image.Exif()
    exif[0x0112] = 6 if i == 3 else 1
    image.save(path, quality=90, **({"exif": exif} if path.suffix == ".jpg" else {}))


def members(counts=GROUPS):
    """(split, y, a, index) of every image of a download."""
    for split in imagefolder.SPLITS:
        for (y, a), count in (counts if split == "train" else dict.fromkeys(counts, 4)).items():
            for i in range(count):
                yield split, y, a, i


def waterbirds(root):
    """waterbird_complete95_forest2water2, as its generate_waterbirds.py writes it."""
    with open_text(root / "metadata.csv") as file:
        table = csv.writer(file)
        table.writerow(("img_id", "img_filename", "y", "split", "place", "place_filename"))
        for number, (split, y, a, i) in enumerate(members(), 1):
            species = ("001.Black_footed_Albatross", "004.Groove_billed_Ani")[1 - y]
            name = f"{species}/{species[4:]}_{number:04}_{796000 + number}.jpg"
            picture(root / name, y, a, i)
            table.writerow((number, name, y, imagefolder.SPLITS.index(split), a,
                            f"/o/ocean/{number:08}.jpg"))
    return root


ATTRIBUTES = [f"Attribute_{i}" for i in range(40)]
ATTRIBUTES[9], ATTRIBUTES[20], ATTRIBUTES[31] = "Blond_Hair", "Male", "Smiling"


def celeba(root, kaggle=False, nested=True):
    """The original txt files, with one blank before -1 and two before 1, or Kaggle's csv files."""
    images = root / "img_align_celeba" / ("img_align_celeba" if nested else "")
    rows, splits = [], []
    for number, (split, y, a, i) in enumerate(members(), 1):
        name = f"{number:06}.jpg"
        picture(images / name, y, a, i, size=(178 // 4, 218 // 4))
        values = [random.Random(number + 1000 * j).choice((-1, 1)) for j in range(40)]
        values[9], values[20] = 2 * y - 1, 2 * a - 1
        rows.append((name, *values))
        splits.append((name, imagefolder.SPLITS.index(split)))
    if kaggle:
        for path, head, lines in (("list_attr_celeba.csv", ("image_id", *ATTRIBUTES), rows),
                                  ("list_eval_partition.csv", ("image_id", "partition"), splits)):
            with open_text(root / path) as file:
                csv.writer(file).writerows([head, *lines])
    else:
        (root / "list_attr_celeba.txt").write_text(
            f"{len(rows)}\n{' '.join(ATTRIBUTES)} \n"
            + "".join(name + "".join(f" {value:2}" for value in values) + "\n"
                      for name, *values in rows))
        (root / "list_eval_partition.txt").write_text(
            "".join(f"{name} {split}\n" for name, split in splits))
    return root


MALFORMED = ("61_3_20170109150557335.jpg.chip.jpg", "39_1_20170116174525125.jpg.chip.jpg",
             "53__0_20170116184028385.jpg.chip.jpg", "landmarks.jpg")


def utkface(root):
    """age_gender_race_date.jpg.chip.jpg in nested folders,
    and the names that are known to be malformed.
    """
    draws = random.Random(0)
    for number in range(260):
        old, gender = draws.random() < 0.6, draws.randrange(2)
        age = (draws.choice((20, 35, 50) if old else (0, 1, 5)) if number % 10
               else draws.choice((6, 19, 51, 116)))
        name = (f"{age}_{gender}_{draws.randrange(5)}_2017011{number:010}.jpg"
                + ".chip.jpg" * (number % 2))
        picture(root / ("part1", "part2")[number % 2] / name, gender, int(old), number)
    for name in MALFORMED:
        picture(root / "part1" / name, 0, 0, 9)
    return root


def own_folder(root):
    """SpuCo Animals' shape: 4 classes, 4 backgrounds; no splits, no captions."""
    counts = {(y, a): 14 if y == a else 4 for y in range(4) for a in range(4)}
    with open_text(root / "metadata.csv") as file:
        table = csv.writer(file)
        table.writerow(("file_name", "y", "a"))
        for (y, a), count in counts.items():
            for i in range(count):
                name = f"animals, all of them/{y} {a}/ünïque {i}.png"
                if i != 2:  # no CMYK in png
                    picture(root / name, y, a, i)
                    table.writerow((name, y, a))
    return root


def open_text(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "w", newline="", encoding="utf-8")


def counts_of(out, split="train"):
    return imagefolder.group_counts(imagefolder.read_metadata(out, split))


# ------------------------------------------------------------------------------------- reading them


def test_waterbirds_is_read_as_it_is_and_a_difference_from_the_published_counts_is_reported(
        tmp_path):
    text = run("data/prepare.py", "waterbirds", "--root", waterbirds(tmp_path / "w"),
               "--out", tmp_path / "out")
    assert "the published ones {'y0-a0': 3498, 'y0-a1': 184, 'y1-a0': 56, 'y1-a1': 1057}" in text
    assert counts_of(tmp_path / "out") == {f"y{y}-a{a}": n for (y, a), n in GROUPS.items()}
    assert set(counts_of(tmp_path / "out", "val").values()) == {4}
    row = imagefolder.read_metadata(tmp_path / "out")[0]
    assert (row["file_name"].startswith("images/004.Groove")
            and row["text"] == "a photo of a landbird on land")
    assert (tmp_path / "out" / "images").is_symlink()


@pytest.mark.parametrize("kaggle, nested", ((False, True), (False, False), (True, True)))
def test_celeba_is_read_from_txt_and_csv_nested_or_not(tmp_path, kaggle, nested):
    run("data/prepare.py", "celeba", "--root", celeba(tmp_path / "c", kaggle, nested),
        "--out", tmp_path / "out")
    assert counts_of(tmp_path / "out") == {f"y{y}-a{a}": n for (y, a), n in GROUPS.items()}
    texts = imagefolder.group_prompts(imagefolder.read_metadata(tmp_path / "out"))
    assert texts["y1-a0"] == "a photo of a woman with blond hair"


def test_celeba_takes_any_two_attributes_by_name(tmp_path):
    root = celeba(tmp_path / "c")
    run("data/prepare.py", "celeba", "--root", root, "--target", "Smiling",
        "--attribute", "Blond_Hair", "--out", tmp_path / "out")
    texts = imagefolder.group_prompts(imagefolder.read_metadata(tmp_path / "out"))
    assert texts["y1-a0"] == "a photo of a face, smiling, not blond hair"
    blond = sum(row["a"] for row in imagefolder.read_metadata(tmp_path / "out", "train"))
    assert blond == GROUPS[1, 0] + GROUPS[1, 1]
    run("data/prepare.py", "celeba", "--root", root, "--target", "Smile", "--out", tmp_path / "o",
        fails="--target Smile: is not a column of")


def test_utkface_skips_malformed_names_bins_ages_and_splits_by_file_name(tmp_path):
    root = utkface(tmp_path / "u")
    text = run("data/prepare.py", "utkface", "--root", root, "--out", tmp_path / "out")
    assert "skipped 4 files" in text and all(name in text for name in MALFORMED)
    for row in imagefolder.read_metadata(tmp_path / "out"):
        age, gender = map(int, row["file_name"].split("/")[-1].split("_")[:2])
        assert row["y"] == gender and (row["a"] == 0 and age <= 5
                                       or row["a"] == 1 and 20 <= age <= 50)
    splits = {row["file_name"].split("/")[-1]: row["split"]
              for row in imagefolder.read_metadata(tmp_path / "out")}
    # other folders, another order: the same splits
    for path in sorted((root / "part1").iterdir())[::2]:
        path.rename(root / path.name)
    run("data/prepare.py", "utkface", "--root", root, "--bins", "0-5", "6-19", "20-116",
        "--out", tmp_path / "o")
    again = {row["file_name"].split("/")[-1]: row["split"]
             for row in imagefolder.read_metadata(tmp_path / "o")}
    assert all(again[name] == split for name, split in splits.items()) and len(again) > len(splits)
    assert {row["a"] for row in imagefolder.read_metadata(tmp_path / "o")} == {0, 1, 2}
    run("data/prepare.py", "utkface", "--root", root, "--attribute", "race",
        "--out", tmp_path / "r")
    assert {row["a"] for row in imagefolder.read_metadata(tmp_path / "r")} == {0, 1, 2, 3, 4}


def test_a_folder_of_ones_own_gets_stratified_splits_and_captions_of_the_names(tmp_path):
    root, names = own_folder(tmp_path / "f"), ("cat", "dog", "bear", "bird")
    args = ("data/prepare.py", "folder", "--root", root, "--out", tmp_path / "out")
    run(*args, fails="are required, as labels are numbers")
    run(*args, "--classes", *names[:3], "--attributes", *names,
        fails="--classes: has 3 names, but y goes up to 3")
    run(*args, "--classes", *names, "--attributes", "land", "sea", "sky", "snow",
        "--template", "a {y} in the {a}")
    for split in imagefolder.SPLITS:
        assert len(counts_of(tmp_path / "out", split)) == 16 or split != "train"
    assert (imagefolder.group_prompts(imagefolder.read_metadata(tmp_path / "out"))["y1-a3"]
            == "a dog in the snow")
    shutil.copy(tmp_path / "out" / "metadata.csv", tmp_path / "first.csv")
    lines = (root / "metadata.csv").read_text().splitlines()
    (root / "metadata.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    run(*args, "--classes", *names, "--attributes", "land", "sea", "sky", "snow",
        "--template", "a {y} in the {a}")
    before, after = (sorted((tmp_path / name).read_text().splitlines())
                     for name in ("first.csv", "out/metadata.csv"))
    assert before == after


def test_a_number_subsamples_train_to_that_severity_by_removing_alone(tmp_path):
    root = waterbirds(tmp_path / "w")
    run("data/prepare.py", "waterbirds", "--root", root, "--out", tmp_path / "natural")
    natural = {row["file_name"]: row for row in imagefolder.read_metadata(tmp_path / "natural")}
    rare = None
    for bias, expected in ((0.5, (6, 6)), (0.9, (24, 3)), (0.96, (24, 1)), (1, (24, 0))):
        out = tmp_path / f"w-{bias}"
        text = run("data/prepare.py", "waterbirds", "--root", root, "--bias", bias, "--out", out)
        assert "removed" in text
        rows = imagefolder.read_metadata(out)
        assert all(natural[row["file_name"]] == row for row in rows)
        counts = counts_of(out)
        assert [(counts[f"y{y}-a{y}"], counts.get(f"y{y}-a{1 - y}", 0))
                for y in (0, 1)] == [expected] * 2
        assert set(counts_of(out, "val").values()) == set(counts_of(out, "test").values()) == {4}
        now = {row["file_name"] for row in rows if row["split"] == "train" and row["y"] != row["a"]}
        assert rare is None or now <= rare
        rare = now
    run("data/prepare.py", "waterbirds", "--root", root, "--bias", 0.99, "--out", tmp_path / "o",
        fails="class 0 has 24 training images with attribute 0 and 6 others "
              "(it can reach up to 0.9600, and 1)")
    assert not (tmp_path / "o").exists()


def test_a_missing_or_partial_download_is_a_one_line_error_that_says_what_and_where(tmp_path):
    run("data/prepare.py", "waterbirds", "--out", tmp_path / "o", fails="nlp.stanford.edu")
    (tmp_path / "empty").mkdir()
    run("data/prepare.py", "waterbirds", "--root", tmp_path / "empty", "--out", tmp_path / "o",
        fails="does not contain metadata.csv (https://nlp.stanford.edu")
    run("data/prepare.py", "utkface", "--root", tmp_path / "empty", "--out", tmp_path / "o",
        fails="susanqq")
    root = celeba(tmp_path / "c")
    os.remove(root / "img_align_celeba" / "img_align_celeba" / "000007.jpg")
    run("data/prepare.py", "celeba", "--root", root, "--out", tmp_path / "o",
        fails="does not contain 1 of 92 images, the first is 000007.jpg; (https://mmlab")
    lines = (root / "list_attr_celeba.txt").read_text().splitlines()
    (root / "list_attr_celeba.txt").write_text("\n".join(lines[:-5]))
    run("data/prepare.py", "celeba", "--root", root, "--out", tmp_path / "o",
        fails="has 87 images, its first line says 92 (is the download complete?)")
    (root / "list_attr_celeba.txt").write_text("<html>quota exceeded</html>")
    run("data/prepare.py", "celeba", "--root", root, "--out", tmp_path / "o",
        fails="does not begin with a count")


def test_a_download_that_was_moved_is_a_one_line_error(tmp_path):
    run("data/prepare.py", "waterbirds", "--root", waterbirds(tmp_path / "w"),
        "--out", tmp_path / "out")
    (tmp_path / "w").rename(tmp_path / "elsewhere")
    run("train_classifier.py", "--recipe", "erm", "--data", tmp_path / "out",
        "--out", tmp_path / "c", fails="not found, but listed in metadata.csv")
    run("data/prepare.py", "waterbirds", "--root", tmp_path / "elsewhere",
        "--out", tmp_path / "out")  # as it says
    run("train_classifier.py", "--recipe", "erm", "--epochs", 1, "--seeds", 0,
        "--data", tmp_path / "out", "--out", tmp_path / "c")


# ---------------------------------------------------------------- downloads and tables as they come


def table(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path.parent


def own(path, text, name="metadata.csv"):
    """A folder with images x.png and y.png and a table of its own."""
    table(path / name, text)
    for image in ("x.png", "y.png", " z.png"):
        Image.new("RGB", (8, 8)).save(path / image)
    return path


def test_celeba_is_read_with_a_byte_order_mark_and_with_the_unnamed_index_column_of_pandas(
        tmp_path):
    expected = {f"y{y}-a{a}": n for (y, a), n in GROUPS.items()}
    for kaggle in (False, True):
        root = celeba(tmp_path / f"c{kaggle}", kaggle)
        for path in root.glob("list_*"):
            text = path.read_text()
            if kaggle:
                text = "".join(f"{i - 1 if i else ''},{line}\n"
                               for i, line in enumerate(text.splitlines()))
            path.write_text("\ufeff" + text, encoding="utf-8")
        run("data/prepare.py", "celeba", "--root", root, "--out", tmp_path / f"o{kaggle}")
        assert counts_of(tmp_path / f"o{kaggle}") == expected


def test_a_csv_without_a_needed_column_is_told_which_and_what_it_has(tmp_path):
    root = celeba(tmp_path / "c", kaggle=True)
    (root / "list_eval_partition.csv").write_text("image,split\n000001.jpg,0\n")
    run("data/prepare.py", "celeba", "--root", root, "--out", tmp_path / "o",
        fails="list_eval_partition.csv: has no column 'image_id'; it has 'image', 'split'")


@pytest.mark.parametrize("place", ("backup/metadata.csv", "old/copy/metadata.csv"))
def test_a_second_copy_beside_the_download_is_not_taken_for_it(tmp_path, place):
    waterbirds(tmp_path / "w" / "waterbirds")
    table(tmp_path / "w" / place, "img_filename,y,split,place\n")
    args = ("data/prepare.py", "waterbirds", "--root", tmp_path / "w", "--out", tmp_path / "o")
    if place.startswith("backup"):
        run(*args, fails="contains 2 copies: ")
    else:
        run(*args)


CAPTIONS = ("--classes", "a", "b", "--attributes", "c", "d")
TABLES = {  # what a metadata.csv of one's own holds, and what is said of it
    "a column twice": ("file_name,y,y,a\nx.png,0,1,0\n", "metadata.csv: has 2 columns named 'y'"),
    "a header alone": ("file_name,y,a\n", "metadata.csv: has no rows"),
    "a row twice": ("file_name,y,a\nx.png,0,0\nx.png,0,0\n",
                    "metadata.csv, row 3: x.png is listed already in row 2"),
    "a way up": ("file_name,y,a\n../x.png,0,0\n",
                 "metadata.csv, row 2: file_name '../x.png' leaves its folder"),
    "an absolute path": ("file_name,y,a\n/x.png,0,0\n",
                         "metadata.csv, row 2: file_name '/x.png' leaves its folder"),
    "a backslash": ("file_name,y,a\na\\x.png,0,0\n",
                    "contains a backslash (separate folders by /)"),
    "a label that is none": ("file_name,y,a\nx.png,0,0\ny.png,cat,0\n",
                             "metadata.csv, row 3: y is 'cat'"),
    "an attribute that is none": ("file_name,y,a\nx.png,0,1.5\n",
                                  "metadata.csv, row 2: a is '1.5'"),
    "a split that is none": ("file_name,y,a,split\nx.png,0,0,holdout\n",
                             "metadata.csv, row 2: split is 'holdout' (use train"),
    "an image that is not there": ("file_name,y,a\nnone.png,0,0\n",
                                   "1 of 1 images, the first is none.png"),
}


@pytest.mark.parametrize("case", TABLES)
def test_an_invalid_table_of_ones_own_is_named_with_its_row_before_any_image_is_decoded(
        tmp_path, case):
    text, message = TABLES[case]
    root = own(tmp_path / "mine", text)
    line = run("data/prepare.py", "folder", "--root", root, *CAPTIONS, "--out", tmp_path / "o",
               fails=message)
    assert ".tmp" not in line and not (tmp_path / "o").exists()


def line_of(path, number, change):
    """Rewrites one line of a text (from 0)."""
    lines = path.read_text().splitlines()
    lines[number] = change(lines[number])
    path.write_text("\n".join(line for line in lines if line is not None) + "\n")


ATTR, PART, IMAGES = "list_attr_celeba", "list_eval_partition", "img_align_celeba"
CELEBA = {  # what is wrong with a download of CelebA, with the txt files, and what is said of it
    "no attributes": (lambda root: (root / f"{ATTR}.txt").unlink(),
                      f"does not contain {ATTR}.txt or {ATTR}.csv"),
    "no partition": (lambda root: (root / f"{PART}.txt").unlink(),
                     f"does not contain {PART}.txt or {PART}.csv"),
    "no images": (lambda root: shutil.rmtree(root / IMAGES),
                  f"does not contain {IMAGES}/000001.jpg"),
    "an empty attribute file": (lambda root: (root / f"{ATTR}.txt").write_text(""),
                                "does not begin with a count"),
    "no count": (lambda root: line_of(root / f"{ATTR}.txt", 0, lambda line: None),
                 "does not begin with a count"),
    "a wrong count": (lambda root: line_of(root / f"{ATTR}.txt", 0, lambda line: "202599"),
                      "has 92 images, its first line says 202599"),
    "a count of nothing": (
        lambda root: (root / f"{ATTR}.txt").write_text(f"0\n{' '.join(ATTRIBUTES)}\n"),
        "has no rows"),
    "a value that is missing": (
        lambda root: line_of(root / f"{ATTR}.txt", 5, lambda line: line[:-3]),
        f"{ATTR}.txt, line 6: has 40 fields, not 41"),
    "a value too many": (lambda root: line_of(root / f"{ATTR}.txt", 5, lambda line: line + " 1"),
                         "has 42 fields, not 41"),
    "a value of 2": (
        lambda root: line_of(root / f"{ATTR}.txt", 4,
                             lambda line: line.replace(" 1", " 2").replace("-1", "2")),
        f"{ATTR}.txt, row 5: a label of 000003.jpg is neither 1 nor -1"),
    "an image twice": (
        lambda root: line_of(root / f"{ATTR}.txt", 3,
                             lambda line: line.replace("000002", "000001")),
        f"{ATTR}.txt, row 4: 000001.jpg is listed already in row 3"),
    "a page instead of attributes": (
        lambda root: (root / f"{ATTR}.txt").write_text("<html>quota</html>"), "a count"),
    "attributes in UTF-16": (
        lambda root: (root / f"{ATTR}.txt").write_bytes("92\nMale\n".encode("utf-16")),
        "is not a text in UTF-8"),
    "a split of 3": (lambda root: line_of(root / f"{PART}.txt", 0, lambda line: "000001.jpg 3"),
                     "partition is 3"),
    "a split that is a word": (
        lambda root: line_of(root / f"{PART}.txt", 0, lambda line: "000001.jpg train"),
        "partition is 'train'"),
    "a line without a split": (
        lambda root: line_of(root / f"{PART}.txt", 1, lambda line: "000002.jpg"),
        f"{PART}.txt, line 2: has 1 fields, not 2"),
    "an image without a split": (lambda root: line_of(root / f"{PART}.txt", 1, lambda line: None),
                                 f"{PART}.txt: has no row for 000002.jpg"),
    "an image in two splits": (
        lambda root: line_of(root / f"{PART}.txt", 1, lambda line: "000001.jpg 2"),
        "puts 000001.jpg into two splits"),
    "a partition in Latin-1": (lambda root: (root / f"{PART}.txt").write_bytes(b"caf\xe9.jpg 0\n"),
                               "is not a text in UTF-8"),
    "an image that is missing": (lambda root: (root / IMAGES / IMAGES / "000009.jpg").unlink(),
                                 "1 of 92 images, the first is 000009.jpg"),
    "an image that is cut": (lambda root: os.truncate(root / IMAGES / IMAGES / "000009.jpg", 300),
                             "1 of 92 images are broken, the first is"),
    "an image that is a page": (
        lambda root: (root / IMAGES / IMAGES / "000009.jpg").write_text("<html>"), "are broken"),
    "two copies": (
        lambda root: [shutil.copytree(root, root / name, ignore=shutil.ignore_patterns("a", "b"))
                      for name in "ab"] and (root / f"{ATTR}.txt").unlink(),
        "contains 2 copies"),
}


@pytest.mark.parametrize("case", CELEBA)
def test_a_faulty_celeba_is_a_one_line_error(tmp_path, case):
    spoil, message = CELEBA[case]
    spoil(celeba(tmp_path / "c"))
    run("data/prepare.py", "celeba", "--root", tmp_path / "c", "--out", tmp_path / "o",
        fails=message)
    assert not (tmp_path / "o").exists()


CSV = {  # the same for Kaggle's csv files
    "no image_id": (ATTR, lambda text: text.replace("image_id", "image"),
                    "has no column 'image_id'; it has 'image'"),
    "no Male": (ATTR, lambda text: text.replace("Male", "male"),
                "--attribute Male: is not a column of"),
    "semicolons": (ATTR, lambda text: text.replace(",", ";"),
                   "has no column 'image_id'; it has 'image_id;"),
    "a header alone": (ATTR, lambda text: text.splitlines()[0] + "\n", "has no rows"),
    "a column twice": (ATTR, lambda text: text.replace("Attribute_0", "Male"),
                       "has 2 columns named 'Male'"),
    "a short row": (ATTR, lambda text: text.replace(",-1\n", "\n", 1),
                    "has more or fewer fields than the header"),
    "no partition": (PART, lambda text: text.replace("partition", "split"),
                     "has no column 'partition'"),
    "a page": (PART, lambda text: "<html>quota exceeded</html>", "has no column 'image_id'"),
    "nothing": (PART, lambda text: "", "has no column 'image_id'"),
}


@pytest.mark.parametrize("case", CSV)
def test_a_faulty_csv_of_celeba_is_a_one_line_error(tmp_path, case):
    name, change, message = CSV[case]
    path = celeba(tmp_path / "c", kaggle=True) / f"{name}.csv"
    path.write_text(change(path.read_text().replace("\r\n", "\n")))
    run("data/prepare.py", "celeba", "--root", tmp_path / "c", "--out", tmp_path / "o",
        fails=message)


@pytest.mark.parametrize("ending", ("\r\n", "\n\n\n"))
def test_celeba_is_read_whatever_its_line_endings(tmp_path, ending):
    for path in celeba(tmp_path / "c").glob("*.txt"):
        path.write_bytes(path.read_bytes().rstrip(b"\n").replace(
            b"\n", b"\r\n" if "\r" in ending else b"\n") + ending.encode())
    run("data/prepare.py", "celeba", "--root", tmp_path / "c", "--out", tmp_path / "o")
    assert sum(counts_of(tmp_path / "o").values()) == sum(GROUPS.values())


ODD_FACES = ("1_0_2017.jpg", "1_0_0_.jpg", "1_2_0_2017.jpg", "1_0_5_2017.jpg",
             "1000_0_0_2017.jpg", "-1_0_0_2017.jpg", "1.5_0_0_2017.jpg", "a_0_0_2017.jpg",
             "1_0_0_2017.jpg.jpg", " 1_0_0_2017.jpg", "1_0_0_2017 (1).jpg",
             "._1_0_0_2017.jpg", "1-0-0-2017.jpg", "１_0_0_2017.jpg", "1_0_0_2017.chip.jpg")


@pytest.mark.parametrize("name", ODD_FACES)
def test_a_face_with_a_malformed_name_is_skipped_and_listed(tmp_path, name):
    for good in ("1_0_0_20170101.jpg", "30_1_0_20170102.jpg.chip.jpg", "30_0_0_20170103.JPG",
                 "2_1_4_20170104.jpg"):
        picture(tmp_path / "u" / good, 0, 0, 9)
    picture(tmp_path / "u" / name, 0, 0, 9)
    text = run("data/prepare.py", "utkface", "--root", tmp_path / "u", "--out", tmp_path / "o")
    assert "skipped 1 files" in text and name in text
    assert len(imagefolder.read_metadata(tmp_path / "o")) == 4


@pytest.mark.parametrize("flags, message", (
    (("--bins", "0-5", "3-10"), "--bins: overlap"), (("--bins", "5"), "--bins"),
    (("--bins", "9-3"), "--bins"), (("--bins", "100-116"), "does not contain any image"),
    (("--attribute", "hair"), "--attribute hair: is not in UTKFace"),
))
def test_faulty_bins_and_attributes_of_utkface_are_one_line_errors(tmp_path, flags, message):
    picture(tmp_path / "u" / "1_0_0_20170101.jpg", 0, 0, 9)
    run("data/prepare.py", "utkface", "--root", tmp_path / "u", *flags, "--out", tmp_path / "o",
        fails=message)


def test_leading_blanks_of_names_are_kept_and_of_labels_ignored(tmp_path):
    root = own(tmp_path / "mine", "file_name,y,a,split\n z.png, 1, 0,train\nx.png,0,0,train\n")
    run("data/prepare.py", "folder", "--root", root, *CAPTIONS, "--out", tmp_path / "o")
    assert [row["file_name"] for row in imagefolder.read_metadata(tmp_path / "o")] == [
        "images/ z.png", "images/x.png"]


def test_metadata_jsonl_is_read_like_csv(tmp_path):
    lines = ['{"file_name": "x.png", "y": 0, "a": 1, "split": "train"}',
             '{"file_name": "y.png", "y": 1, "a": 0, "split": "val"}']
    root = own(tmp_path / "mine", "\n".join(lines) + "\n", "metadata.jsonl")
    args = ("data/prepare.py", "folder", "--root", root, *CAPTIONS, "--out", tmp_path / "o")
    run(*args)
    assert ([(row["y"], row["a"], row["split"])
             for row in imagefolder.read_metadata(tmp_path / "o")]
            == [(0, 1, "train"), (1, 0, "val")])
    own(root, lines[0] + "\nnot json\n", "metadata.jsonl")
    run(*args, fails="metadata.jsonl, line 2: is not a JSON object")


def test_class_names_without_attribute_names_are_refused_though_there_are_captions(tmp_path):
    root = own(tmp_path / "mine", "file_name,y,a,text\nx.png,0,0,one\ny.png,1,0,two\n")
    run("data/prepare.py", "folder", "--root", root, "--classes", "a", "b",
        "--out", tmp_path / "o", fails="--attributes")


def test_labels_from_one_are_reported(tmp_path):
    root = own(tmp_path / "mine",
               "file_name,y,a,split,text\nx.png,1,1,train,one\ny.png,2,1,train,two\n")
    text = run("data/prepare.py", "folder", "--root", root, "--out", tmp_path / "o")
    assert "column y has the values [1, 2]: no image of class 0" in text


def test_columns_that_stages_add_are_kept_under_another_name(tmp_path):
    root = own(tmp_path / "mine",
               "file_name,y,a,split,cluster\nx.png,0,0,train,north\ny.png,1,1,train,south\n")
    run("data/prepare.py", "folder", "--root", root, *CAPTIONS, "--out", tmp_path / "o")
    assert [row["own_cluster"] for row in imagefolder.read_metadata(tmp_path / "o")] == [
        "north", "south"]


def test_an_edit_behind_a_link_in_the_download_is_noticed(tmp_path):
    root = celeba(tmp_path / "c")
    (root / IMAGES).rename(tmp_path / "disk")
    (root / IMAGES).symlink_to(tmp_path / "disk")
    before = made.listing(root)
    (tmp_path / "disk" / IMAGES / "000001.jpg").write_bytes(b"edited")
    assert made.listing(root) != before


def test_an_edited_download_is_prepared_again_and_an_unchanged_one_kept(tmp_path):
    root = own(tmp_path / "mine", "file_name,y,a,split\nx.png,0,0,train\ny.png,1,0,train\n")
    args = ("data/prepare.py", "folder", "--root", root, *CAPTIONS, "--out", tmp_path / "o")
    run(*args)
    assert "up to date" in run(*args)
    Image.new("RGB", (8, 8), "red").save(root / "x.png")
    assert "up to date" not in run(*args) and "up to date" in run(*args)


# ------------------------------------------------------------------------------- through all stages


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return new_house(tmp_path_factory.mktemp("benchmarks") / "house")


NAMES = '--classes cat dog bear bird --attributes land sea sky snow'


def run_again(house, args):
    """What `make -n` would run."""
    return [line for line in make(house, "-n", *args).splitlines() if "--out" in line]


@pytest.mark.parametrize("dataset, download, method, more", (
    ("waterbirds", waterbirds, "erm", ["BIAS=0.9"]),
    pytest.param("waterbirds", waterbirds, "compositional", ["BIAS=0.9"], marks=slow),
    pytest.param("utkface", utkface, "clustered-lora", ["KEEP_WEIGHTS=no"], marks=slow),
    pytest.param("celeba", celeba, "clustered-lora", [], marks=slow),
    pytest.param("folder", own_folder, "compositional", [f'PREPARE=--root "$(ROOT)" {NAMES}'],
                 marks=slow),
), ids=("erm on waterbirds", "waterbirds", "utkface", "celeba", "folder"))
def test_make_runs_all_stages(house, tmp_path, dataset, download, method, more):
    root = download(tmp_path / "a download")
    args = [f"DATASET={dataset}", f"ROOT={root}", f"RECIPES={method}", "BASE=base/miniature",
            "SEEDS=0", "CLIP=base/miniature/clip", "IMAGES=3", "EPOCHS=1", "K=2",
            "CLUSTER=--min-size 3", "LORA=--steps 1", "COMPOSITIONAL=--steps 1 --batch 2",
            "CLASSIFIER=", "GENERATE=--steps 2 --batch 4 --keep 1 --alpha 1", *more]
    make(house, *args)
    bias = "0.9" if "BIAS=0.9" in more else "natural"
    assert f"| {method} |" in (
        house / "runs" / f"{dataset}-{bias}" / "results" / "results.md").read_text()
    assert run_again(house, args) == []
    if method == "erm":
        return
    synthetic = imagefolder.read_metadata(
        house / "runs" / f"{dataset}-{bias}" / "synthetic" / method)
    groups = imagefolder.group_counts(
        imagefolder.read_metadata(house / "data" / f"{dataset}-{bias}"))
    assert imagefolder.group_counts(synthetic) == dict.fromkeys(groups, 3)
    weights = list((house / "runs" / f"{dataset}-{bias}" / "models").rglob("*.safetensors"))
    assert bool(weights) == ("KEEP_WEIGHTS=no" not in more)
    if not weights:  # other images are wanted: the weights are trained again
        make(house, *args, "IMAGES=4")
        more = imagefolder.read_metadata(
            house / "runs" / f"{dataset}-{bias}" / "synthetic" / method)
        assert all(row in more for row in synthetic) and len(more) == 16
