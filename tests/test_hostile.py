"""Bad input, for every script: one line and status 2 before heavy work, or handled; never half a
folder, never a wrong label. `make torture` runs all cases, `make test` all that are quick and some
of the others."""

import csv
import json
import os
import pickle
import shutil
import string
import zlib

import pytest
from conftest import LONG, files_of, make_dataset, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_evaluate import predictions_of

from common import files, imagefolder

EXAMPLES = 2000 if LONG else 60


def some(cases, step=10):
    """All of the cases in the torture, else each that comes first in its kind and every
    `step`-th."""
    names = list(cases)
    return names if LONG else names[::step]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A recipe's predictions, without the classifier."""
    path = tmp_path_factory.mktemp("run") / "classifiers" / "erm"
    predictions_of(path / "seed0", {})
    return path


@pytest.fixture(scope="module")
def place(base, dataset, embeddings, classifier):
    return {"base": base, "clip": base / "clip", "data": dataset, "embeddings": embeddings,
            "classifier": classifier}


# ------------------------------------------------------------------------------------- metadata.csv

HEAD = "file_name,split,y,a,text\n"
GOOD = "images/train-0-0-0.png,train,0,0,hi\n"
LINE = "images/train-0-0-0.png,train,{},{},hi\n"
METADATA = {  # what stands in it, and what is said of it
    "nothing": ("", "has no column 'file_name'"),
    "blank lines": ("\n\n\n", "has no column 'file_name'"),
    "a header alone": (HEAD, "has no images"),
    "no header": (GOOD * 2, "columns named"),
    "no column split": ("file_name,y,a,text\nimages/train-0-0-0.png,0,0,hi\n",
                        "has no column 'split'"),
    "no column text": ("file_name,split,y,a\nimages/train-0-0-0.png,train,0,0\n",
                       "has no column 'text'"),
    "a column twice": ("file_name,split,y,y,a,text\nimages/train-0-0-0.png,train,0,1,0,hi\n",
                       "has 2 columns named 'y'"),
    "other capitals": (HEAD.upper() + GOOD, "has no column 'file_name'"),
    "semicolons": ((HEAD + GOOD).replace(",", ";"), "has no column 'file_name'"),
    "tabs": ((HEAD + GOOD).replace(",", "\t"), "has no column 'file_name'"),
    "a row twice": (HEAD + GOOD * 2, "is listed already in row 2"),
    "a row twice, once with a dot": (HEAD + GOOD + "./" + GOOD, "is listed already in row 2"),
    "a short row": (HEAD + "images/train-0-0-0.png,train,0\n",
                    "has more or fewer fields than the header"),
    "a long row": (HEAD + GOOD.strip() + ",more\n", "has more or fewer fields than the header"),
    "an open quote": (HEAD + '"' + GOOD, "is not a csv in UTF-8"),
    "text after a quote": (HEAD + '"images"x' + GOOD, "is not a csv in UTF-8"),
    "a huge field": (HEAD + "x" * 200_000 + GOOD, "is not a csv in UTF-8"),
    "UTF-16": ((HEAD + GOOD).encode("utf-16"), "is not a csv in UTF-8"),
    "Latin-1": (HEAD.encode() + GOOD.replace("hi", "é").encode("latin-1"), "is not a csv in UTF-8"),
    "a NUL in a name": (HEAD + GOOD.replace("train-", "tr\0ain-"), "metadata.csv"),
    "random bytes": (bytes(range(256)) * 20, "is not a csv in UTF-8"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(200), "is not a csv in UTF-8"),
    "a float": (HEAD + LINE.format("0.0", 0), "y is '0.0'"),
    "a negative label": (HEAD + LINE.format(0, "-1"), "a is '-1'"),
    "no label": (HEAD + LINE.format("", 0), "y is ''"),
    "NaN": (HEAD + LINE.format("nan", 0), "y is 'nan'"),
    "a word": (HEAD + LINE.format("cat", 0), "y is 'cat'"),
    "a blank before a label": (HEAD + LINE.format(" 0", 0), "y is ' 0'"),
    "a label in other digits": (HEAD + LINE.format("１", 0), "y is '１'"),
    "a superscript": (HEAD + LINE.format("²", 0), "y is '²'"),
    "an exponent": (HEAD + LINE.format("1e3", 0), "y is '1e3'"),
    "a huge label": (HEAD + LINE.format(10**9, 0), "y is 1000000000"),
    "a label of a thousand digits": (HEAD + LINE.format(0, "9" * 5000), "a is 9999"),
    "an unknown split": (HEAD + GOOD.replace("train,", "dev,"), "split is 'dev'"),
    "a split in capitals": (HEAD + GOOD.replace("train,", "Train,"), "split is 'Train'"),
    "no split": (HEAD + GOOD.replace("train,", ","), "split is ''"),
    "no name": (HEAD + ",train,0,0,hi\n", "leaves its folder"),
    "a way up": (HEAD + "../x.png,train,0,0,hi\n", "leaves its folder"),
    "a way up in the middle": (HEAD + "images/../../x.png,train,0,0,hi\n", "leaves its folder"),
    "an absolute path": (HEAD + "/etc/passwd,train,0,0,hi\n", "leaves its folder"),
    "a path of Windows": (HEAD + "images\\x.png,train,0,0,hi\n", "contains a backslash"),
    "a name that is not there": (HEAD + "images/none.png,train,0,0,hi\n", "not found"),
    "a name that is a folder": (HEAD + "images,train,0,0,hi\n", "not found"),
    "a very long name": (HEAD + "x" * 5000 + ",train,0,0,hi\n", "ong"),
    "a blank caption": (HEAD + GOOD.replace("hi", "  "), "text is empty"),
    "the wrong columns in quotes": ('"file_name,split,y,a,text"\n' + GOOD,
                                    "has no column 'file_name'"),
}
ROLES = {  # where a script takes a folder of images
    "embed": "data/embed.py --data {bad} --clip {clip} --out {out}",
    "cluster": "cluster.py --data {bad} --embeddings {embeddings} --out {out}",
    "finetune": "finetune.py --method lora --base {base} --data {bad} --out {out}",
    "prior": "finetune.py --method dreambooth --base {base} --data {data} --prior {bad} "
             "--out {out}",
    "generate": "generate.py --base {base} --clip {clip} --data {bad} --embeddings {embeddings} "
                "--out {out}",
    "classifier": "train_classifier.py --recipe erm --data {bad} --out {out}",
    "synthetic": "train_classifier.py --recipe two-stage --data {data} --synthetic {bad} "
                 "--out {out}",
    "evaluate": "evaluate.py --classifiers {classifier} --data {bad} --out {out}",
    "images": "evaluation/images.py --data {bad} --embeddings {embeddings} --synthetic {data} "
              "--clip {clip} --out {out}",
    "measured": "evaluation/images.py --data {data} --embeddings {embeddings} --synthetic {bad} "
                "--clip {clip} --out {out}",
    "folder": "data/prepare.py folder --root {bad} --out {out}",
}
OF_FOLDERS = {f"{role}: {what}": (role, what)
              for role in ROLES if role != "folder" for what in METADATA}


def words(line, **places):
    return [word.format(**places) for word in line.split()]


def refused(args, message, out):
    run(*args, fails=message)
    assert not out.exists() or not any(out.iterdir()), "something was published"


@pytest.mark.parametrize("case", OF_FOLDERS)
def test_bad_metadata_is_a_one_line_error_for_every_script(case, place, tmp_path):
    role, what = OF_FOLDERS[case]
    content, message = METADATA[what]
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "images").symlink_to(place["data"] / "images")
    (bad / "metadata.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(words(ROLES[role], bad=bad, out=tmp_path / "out", **place), message, tmp_path / "out")


@pytest.mark.parametrize("role", ROLES)
def test_a_folder_that_is_none_is_a_one_line_error_for_every_script(role, place, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "named" / "metadata.csv").mkdir(parents=True)
    for name in ("none", "file", "empty", "loop", "named"):
        refused(words(ROLES[role], bad=tmp_path / name, out=tmp_path / "out", **place), "",
                tmp_path / "out")


@pytest.mark.parametrize("role", ROLES)
def test_no_script_writes_over_what_no_stage_wrote(role, place, tmp_path):
    """An OUT that is a file, holds the input, or holds somebody's files."""
    data = shutil.copytree(place["data"], tmp_path / "mine" / "data")
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    places = place | {"bad": data}
    for out, message in ((tmp_path / "mine" / "thesis.txt", "is a file"),
                         (data, "is or holds an input"), (tmp_path / "mine", "is or holds"),
                         (tmp_path / "mine" / "data" / "images", "no stage wrote"),
                         ("/", "holds this program")):
        before = files_of(tmp_path / "mine", but=())
        run(*words(ROLES[role], **places, out=out), fails=message)
        assert files_of(tmp_path / "mine", but=()) == before


# -------------------------------------------------------------------------------------------- flags

NUMBERS = {
    "data/embed.py": "batch",
    "cluster.py": "k k-max min-size seed",
    "finetune.py": "balance steps batch accumulation learning-rate warmup weight-decay "
                   "prior-weight rank alpha checkpoint-every seed",
    "generate.py": "images steps guidance-scale rare-below rare-guidance keep alpha max-tries "
                   "batch seed",
    "train_classifier.py": "resolution epochs learning-rate weight-decay batch beta temperature "
                           "dro-step jtt-upsampling",
    "evaluation/images.py": "batch",
    "base/pretrain.py": "vae-steps seed",
}
VALUES = {"nan": "", "x": "invalid", "": "", "-1": "", "1e400": "", "0x10": "invalid"}
FLAGS = {f"{script} --{flag} {value!r}": (script, flag, value) for script, flags in NUMBERS.items()
         for flag in flags.split() for value in VALUES
         if not (flag == "seed" and value == "-1")}


@pytest.mark.parametrize("case", FLAGS)
def test_a_number_that_is_none_or_out_of_range_is_a_one_line_error(case, tmp_path):
    script, flag, value = FLAGS[case]
    refused((script, f"--{flag}={value}", "--out", tmp_path / "out"), f"argument --{flag}: ",
            tmp_path / "out")


CONTRADICTIONS = {
    "finetune.py --method lora --train-text-encoder --base x --data {data} --out {out}":
        "--train-text-encoder",
    "finetune.py --method lora --balance 1 --base x --data {data} --out {out}": "--balance",
    "finetune.py --method lora --warmup 5 --base x --data {data} --out {out}": "--warmup",
    "finetune.py --method lora --prompt sks --base x --data {data} --out {out}": "--prompt",
    "finetune.py --method lora --per cluster --base x --data {data} --out {out}":
        "has no column 'cluster'",
    "finetune.py --method sdxl --base x --data {data} --out {out}": "--method",
    "finetune.py --method lora --schedule sometimes --base x --data {data} --out {out}":
        "--schedule",
    "train_classifier.py --recipe two-stage --data {data} --out {out}": "--synthetic",
    "train_classifier.py --recipe erm --synthetic {data} --data {data} --out {out}": "--synthetic",
    "train_classifier.py --recipe erm --load-size 8 --data {data} --out {out}": "--load-size",
    "train_classifier.py --recipe erm --weights imagenet --data {data} --out {out}": "--weights",
    "train_classifier.py --recipe erm --arch resnet18 --weights x.safetensors --data {data} "
    "--out {out}": "--weights",
    "train_classifier.py --recipe all --data {data} --out {out}": "--recipe",
    "generate.py --rare never --base x --clip x --data {data} --out {out}": "--rare",
    "data/embed.py --data {data} --clip {clip} --device tpu --out {out}": "--device",
    "data/embed.py --data {data} --clip {clip} --device cuda:99 --out {out}": "--device",
    "data/embed.py --data {data} --out {out}": "--clip",
    "cluster.py --data {data} --embeddings {embeddings} --attributes a b --out {out}":
        "--attributes",
    "cluster.py --data {data} --embeddings {embeddings} --unknown 3 --out {out}": "--unknown",
    "cluster.py --data {data} --out {out}": "--embeddings",
    "generate.py --base {base} --clip {clip} --data {data} --out {out}": "--embeddings",
    "generate.py --base {base} --clip {clip} --data {data} --keep 0 --out {out}":
        "--keep: 0 is not between 0.01 and 1",
    "generate.py --base {base} --clip {clip} --data {data} --keep 1.1 --out {out}":
        "--keep: 1.1 is not between 0.01 and 1",
    "evaluate.py --out {out}": "--data, --classifiers",
    "evaluate.py --data {data} --classifiers {data} --out {out}": "contains no seed",
    "evaluation/sweep.py --results {data} --out {out}": "intervals.csv",
    "evaluation/paper.py --results {data} --out {out}": "intervals.csv",
    "data/prepare.py digits --bias natural --out {out}": "--bias",
    "data/prepare.py waterbirds --out {out}": "--root",
    "data/prepare.py folder --root {data} --classes one --attributes a b --out {out}": "--classes",
    "data/prepare.py folder --root {data} --classes a b --attributes a b --template {{z}} "
    "--out {out}": "--template",
    "data/prepare.py folder --root {data} --bias 0.999 --out {out}": "--bias 0.999",
    "data/prepare.py utkface --root {data} --bins 50-20 --out {out}": "--bins",
    "data/prepare.py mnist --out {out}": "dataset",
    "evaluation/report.py --run {data} --data {data} --out {out}/r.html": "intervals.csv",
}


@pytest.mark.parametrize("line", CONTRADICTIONS)
def test_flags_that_contradict_are_one_line_errors(line, place, tmp_path):
    refused(words(line, out=tmp_path / "out", **place), CONTRADICTIONS[line], tmp_path / "out")


# ------------------------------------------------------------------------------------------- images


def png(size, mode="RGB", **options):
    return lambda path: Image.new(mode, size).save(path, "PNG", **options)


def bomb(path):
    """A PNG that says it is 30,000 x 30,000 pixels."""
    def chunk(kind, data):
        return (len(data).to_bytes(4, "big") + kind + data
                + zlib.crc32(kind + data).to_bytes(4, "big"))

    head = (30_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
                     + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def cut(path):
    Image.effect_noise((64, 64), 50).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:600])


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("I am no image"),
    "a page": lambda path: path.write_text("<html><body>404 not found</body></html>"),
    "cut": cut,
    "a bomb": bomb,
    "a head alone": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"),
    "a pickle": lambda path: path.write_bytes(pickle.dumps([1, 2])),
    "a drawing": lambda path: path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"),
}
ODD = {
    "one pixel": png((1, 1)),
    "very wide": png((20_000, 3)),
    "very high": png((3, 20_000)),
    "grey": png((40, 30), "L"),
    "grey and alpha": png((40, 30), "LA"),
    "black and white": png((40, 30), "1"),
    "sixteen bits": png((40, 30), "I;16"),
    "thirty-two bits": lambda path: Image.new("F", (40, 30)).save(path, "TIFF"),
    "palette": png((40, 30), "P"),
    "palette with transparency": png((40, 30), "P", transparency=0),
    "alpha": png((40, 30), "RGBA"),
    "CMYK": lambda path: Image.new("CMYK", (40, 30)).save(path, "JPEG"),
    "animated": lambda path: Image.new("RGB", (40, 30)).save(
        path, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 30), "red")]),
    "webp": lambda path: Image.new("RGB", (40, 30)).save(path, "WEBP"),
    "YCbCr": lambda path: Image.new("YCbCr", (40, 30)).save(path, "JPEG"),
    "Lab": lambda path: Image.new("LAB", (40, 30)).save(path, "TIFF"),
    "on its side": lambda path: Image.new("RGB", (40, 30)).save(
        path, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01"
                           b"\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    "senseless EXIF": lambda path: Image.new("RGB", (40, 30)).save(
        path, "JPEG", exif=b"Exif\0\0rubbish"),
}
STAGES = {
    "cluster": "cluster.py --data {data} --embeddings {embeddings} --out {out}",
    "embed": "data/embed.py --data {data} --clip {clip} --out {out}",
    "finetune": "finetune.py --method lora --base {base} --steps 1 --batch 24 --data {data} "
                "--out {out}",
    "classifier": "train_classifier.py --recipe erm --epochs 1 --seeds 0 --data {data} --out {out}",
    "images": "evaluation/images.py --data {copy} --embeddings {embeddings} --synthetic {data} "
              "--clip {clip} --out {out}",
    "folder": "data/prepare.py folder --root {data} --out {out}",
}


def spoilt(place, tmp_path, kinds):
    """A copy of the dataset with its last training images replaced."""
    data = shutil.copytree(place["data"], tmp_path / "data")
    for i, write in enumerate(kinds):
        path = data / "images" / f"train-1-1-{23 - i}.png"
        path.unlink()
        write(path)
    return place | {"data": data, "copy": place["data"], "out": tmp_path / "out"}


BROKEN_CASES = {f"{stage}: {kind}": (stage, kind)
                for stage in STAGES if stage != "cluster" for kind in BROKEN}


@pytest.mark.parametrize("case", some(BROKEN_CASES, 6))
def test_a_broken_image_is_named_and_nothing_published(case, place, tmp_path):
    stage, kind = BROKEN_CASES[case]
    refused(words(STAGES[stage], **spoilt(place, tmp_path, [BROKEN[kind]])),
            "train-1-1-23.png: cannot be read as an ", tmp_path / "out")


@pytest.mark.parametrize("stage", some(STAGES, 4))
def test_odd_images_go_through_every_stage(stage, place, tmp_path):
    run(*words(STAGES[stage], **spoilt(place, tmp_path, ODD.values())))
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_image_is_read_as_rgb_of_the_size_asked_for(kind, tmp_path):
    ODD[kind](tmp_path / "x.png")
    image = imagefolder.load_image(tmp_path / "x.png", 16)
    assert image.mode == "RGB" and image.size == (16, 16)


# -------------------------------------------------------------------- captions, names, small groups

NASTY = ("with blank.png", "quote'd.png", 'double".png', "$HOME.png", "`id`.png", "new\nline.png",
         "-rf.png", "Ωμέγα 鳥 🐦.png", "semi;colon.png", "<script>.png", "a,comma.png",
         "per%cent.png", "hash#.png", "*.png")


@pytest.fixture
def nasty(place, tmp_path):
    """The dataset with names and captions that break what is careless with them."""
    data, rows = tmp_path / "data", imagefolder.read_metadata(place["data"])
    data.mkdir()
    for i, row in enumerate(rows):
        name = NASTY[i] if i < len(NASTY) else f"{i}.png"
        shutil.copy(place["data"] / row["file_name"], data / name)
        row.update(file_name=name, text=f'{"abcd"[2 * row["y"] + row["a"]]} "photo",\n '
                                        'of <b>$x</b> \'é\'')
    files.write_csv(data / "metadata.csv", rows)
    run("data/embed.py", "--data", data, "--clip", place["clip"], "--out", tmp_path / "embeddings")
    return place | {"data": data, "copy": data, "embeddings": tmp_path / "embeddings",
                    "out": tmp_path / "out"}


@pytest.mark.parametrize("stage", some(STAGES, 4))
def test_nasty_names_and_captions_go_through_every_stage(stage, nasty, tmp_path):
    run(*words(STAGES[stage], **nasty))
    if stage in ("cluster", "folder"):
        assert [row["text"] for row in imagefolder.read_metadata(tmp_path / "out", "train")] == [
            row["text"] for row in imagefolder.read_metadata(nasty["data"], "train")]
    if stage == "classifier":
        with open(tmp_path / "out" / "seed0" / "predictions.csv", newline="") as file:
            assert {row["file_name"] for row in csv.DictReader(file)} <= {
                row["file_name"] for row in imagefolder.read_metadata(nasty["data"])}


SMALL = {  # training images a group
    "one class": {(0, 0): 8, (0, 1): 2},
    "one attribute": {(0, 0): 8, (1, 0): 2},
    "one group": {(0, 0): 4},
    "groups of one image": {(0, 0): 1, (0, 1): 1, (1, 0): 1, (1, 1): 1},
    "an empty group": {(0, 0): 6, (0, 1): 0, (1, 0): 2, (1, 1): 6},
    "labels with gaps": {(0, 0): 6, (5, 0): 2, (5, 7): 6},
}


@pytest.mark.parametrize("what", some(SMALL, 2))
def test_few_classes_attributes_and_images_are_handled(what, place, tmp_path):
    data = tmp_path / "data"
    make_dataset(data, counts={(y % 2, a % 2): n for (y, a), n in SMALL[what].items()})
    rows = imagefolder.read_metadata(data)
    labels = {(y % 2, a % 2): (y, a) for y, a in SMALL[what]}
    for row in rows:
        row["y"], row["a"] = labels[row["y"], row["a"]]
    files.write_csv(data / "metadata.csv", rows)
    places = place | {"data": data, "embeddings": tmp_path / "e"}
    run(*words("data/embed.py --data {data} --clip {clip} --out {embeddings}", **places))
    run(*words("cluster.py --data {data} --embeddings {embeddings} --k 2 --min-size 2 --out {out}",
               out=tmp_path / "c", **places))
    run(*words("finetune.py --method lora --per cluster --steps 1 --base {base} --data {clusters} "
               "--out {out}", out=tmp_path / "m", clusters=tmp_path / "c", **places))
    run(*words("generate.py --models {models} --base {base} --clip {clip} "
               "--embeddings {embeddings} --steps 1 --images 2 --batch 4 --data {data} "
               "--out {out}", out=tmp_path / "s", models=tmp_path / "m", **places))
    assert set(imagefolder.group_counts(imagefolder.read_metadata(tmp_path / "s")).values()) == {2}
    for recipe in ("erm", "groupdro", "subg", "jtt"):
        run(*words(f"train_classifier.py --recipe {recipe} --epochs 1 --seeds 0 --data {{data}} "
                   "--out {out}", out=tmp_path / "run" / "classifiers" / recipe, **places))
    text = run("evaluate.py", "--data", data, "--classifiers",
               *(tmp_path / "run" / "classifiers").glob("[!.]*"),
               "--out", tmp_path / "run" / "results")
    assert ("| erm |" in text
            and "nan" not in (tmp_path / "run" / "results" / "intervals.csv").read_text())
    run("evaluation/report.py", "--run", tmp_path / "run", "--data", data,
        "--out", tmp_path / "r.html")


def test_data_without_held_out_images_are_not_measured_against(place, tmp_path):
    data = make_dataset(tmp_path / "data", splits=["train"])
    refused(words(STAGES["images"], **place | {"data": place["data"], "copy": data},
                  out=tmp_path / "out"),
            "has no images of split val or test", tmp_path / "out")


@pytest.mark.parametrize("split", ("train", "val"))
def test_a_split_without_images_is_a_one_line_error(split, place, tmp_path):
    data = make_dataset(tmp_path / "data",
                        splits=[other for other in imagefolder.SPLITS if other != split])
    refused(words("train_classifier.py --recipe erm --data {data} --out {out}", data=data,
                  out=tmp_path / "out"), f"has no images of split {split}", tmp_path / "out")


# ----------------------------------------------------------------------- models and files of stages


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_weights(path, change):
    from safetensors.torch import load_file, save_file

    save_file({name: change(name, value) for name, value in load_file(path).items()}, path,
              metadata={"format": "pt"})


UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
BASES = {
    "no folder": lambda base: shutil.rmtree(base),
    "a file": lambda base: (shutil.rmtree(base), base.write_text("x")),
    "no unet": lambda base: shutil.rmtree(base / "unet"),
    "no config": lambda base: (base / "unet" / "config.json").unlink(),
    "no model_index.json": lambda base: (base / "model_index.json").unlink(),
    "model_index.json cut": lambda base: (base / "model_index.json").write_text(
        '{"_class_name": "Stable'),
    "weights cut": lambda base: os.truncate(base / UNET, 5000),
    "weights empty": lambda base: os.truncate(base / UNET, 0),
    "weights missing": lambda base: (base / UNET).unlink(),
    "a pickle in their place": lambda base: ((base / UNET).unlink(), (
        base / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({}))),
    "wrong shapes": lambda base: edited(base / "unet" / "config.json", cross_attention_dim=8),
    "NaN weights": lambda base: with_weights(base / UNET, lambda name, value: value * float("nan")),
    "an infinite weight": lambda base: with_weights(base / TEXT,
                                                    lambda name, value: value + float("inf")),
    "an inpainting model": lambda base: (
        edited(base / "unet" / "config.json", in_channels=9),
        with_weights(base / UNET, lambda name, value: value.repeat(1, 3, 1, 1)[:, 3:].contiguous()
                     if name == "conv_in.weight" else value)),
    "no tokenizer": lambda base: [path.unlink() for path in (base / "tokenizer").iterdir()],
    "remote code": lambda base: edited(base / "model_index.json", unet=["evil", "UNet"]),
    "an XL": lambda base: edited(base / "unet" / "config.json", addition_embed_type="text_time"),
}


@pytest.mark.parametrize("script", ("finetune", "generate"))
@pytest.mark.parametrize("what", some(BASES, 11))
def test_a_base_model_that_is_not_whole_is_a_one_line_error(what, script, place, tmp_path):
    base = shutil.copytree(place["base"], tmp_path / "base")
    BASES[what](base)
    line = {"finetune": "finetune.py --method lora --base {base} --data {data} --out {out}",
            "generate": "generate.py --base {base} --clip {clip} --data {data} "
                        "--embeddings {embeddings} --images 2 --out {out}"}[script]
    refused(words(line, **place | {"base": base, "out": tmp_path / "out"}), f"--base {base}",
            tmp_path / "out")


CLIPS = {
    "weights cut": lambda clip: os.truncate(clip / "model.safetensors", 5000),
    "no config": lambda clip: (clip / "config.json").unlink(),
    "no tokenizer": lambda clip: [path.unlink() for path in clip.glob("*token*")],
    "NaN weights": lambda clip: with_weights(clip / "model.safetensors",
                                             lambda name, value: value * float("nan")),
    "a pickle in their place": lambda clip: ((clip / "model.safetensors").unlink(), (
        clip / "pytorch_model.bin").write_bytes(pickle.dumps({}))),
}


@pytest.mark.parametrize("what", some(CLIPS, 4))
def test_a_clip_that_is_not_whole_is_a_one_line_error(what, place, tmp_path):
    clip = shutil.copytree(place["clip"], tmp_path / "clip")
    CLIPS[what](clip)
    refused(words("data/embed.py --data {data} --clip {clip} --out {out}",
                  **place | {"clip": clip}, out=tmp_path / "out"),
            f"--clip {clip}", tmp_path / "out")


DRAW = {"unit": "y0-a0", "key": "k", "y": 0, "a": 0, "suffix": "", "prompt": "{text}", "images": 1}
MODELS = {
    "no json": "x", "a list": [], "null": None, "a number": 3, "no draws": {},
    "draws of words": {"draws": ["x"]}, "draws that are a word": {"draws": "y0"},
    "a draw without key": {"draws": [{"unit": "y0-a0"}]},
    "a unit that leaves": {"draws": [DRAW | {"unit": "../y0-a0"}]},
    "a suffix that leaves": {"draws": [DRAW | {"suffix": "/../../../evil"}]},
    "a unit that is absolute": {"draws": [DRAW | {"unit": "/tmp/x"}]},
    "no images": {"draws": [DRAW | {"images": 0}]},
    "negative images": {"draws": [DRAW | {"images": -5}]},
    "labels of words": {"draws": [DRAW | {"y": "0"}]},
    "no prompt": {"draws": [DRAW | {"prompt": None}]},
}


@pytest.mark.parametrize("what", MODELS)
def test_a_config_that_is_not_of_finetune_is_a_one_line_error(what, place, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "config.json").write_text(
        MODELS[what] if isinstance(MODELS[what], str) else json.dumps(MODELS[what]))
    refused(words("generate.py --base {base} --clip {clip} --data {data} "
                  "--embeddings {embeddings} --models {models} --out {out}",
                  models=tmp_path / "models", out=tmp_path / "out", **place),
            "was not written by finetune.py", tmp_path / "out")


def test_a_cluster_that_leaves_its_folder_is_a_one_line_error(place, tmp_path):
    rows = imagefolder.read_metadata(place["data"], "train")
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(place["data"] / "images")
    for cluster in ("/../../../evil", "-1", "", "x"):
        files.write_csv(data / "metadata.csv", [dict(row, cluster=cluster) for row in rows])
        refused(words("finetune.py --method lora --per cluster --base {base} --data {bad} "
                      "--out {out}", bad=data, out=tmp_path / "out", **place),
                "cluster is", tmp_path / "out")


PREDICTED = "file_name,split,y,a,prediction\n"
PREDICTIONS = {
    "empty": "", "a header alone": PREDICTED, "no column": "file_name,split,y\nx.png,test,0\n",
    "a word": PREDICTED + "x.png,test,0,0,cat\n", "no prediction": PREDICTED + "x.png,test,0,0,\n",
    "a float": PREDICTED + "x.png,test,0,0,0.5\n", "a short row": PREDICTED + "x.png,test,0\n",
    "an open quote": PREDICTED + '"x.png,test,0,0,0\n',
    "Latin-1": (PREDICTED + "é.png,test,0,0,0\n").encode("latin-1"),
    "val alone": PREDICTED + "x.png,val,0,0,0\n", "bytes": bytes(range(256)),
    "a label of a word": PREDICTED + "x.png,test,zero,0,0\n",
}


@pytest.mark.parametrize("what", PREDICTIONS)
def test_predictions_that_are_none_are_one_line_errors(what, place, tmp_path):
    seed = tmp_path / "erm" / "seed0"
    seed.mkdir(parents=True)
    content = PREDICTIONS[what]
    (seed / "predictions.csv").write_bytes(
        content if isinstance(content, bytes) else content.encode())
    refused(words("evaluate.py --data {data} --classifiers {erm} --out {out}", erm=tmp_path / "erm",
                  out=tmp_path / "out", **place), "predictions.csv: ", tmp_path / "out")


# ------------------------------------------------------------------------------------------ fuzzing

FUZZ = settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=not LONG,
                suppress_health_check=list(HealthCheck))
FIELDS = st.one_of(
    st.sampled_from(["0", "1", "train", "val", "x.png", "y.png", "./x.png", "../x", "hi", "", " ",
                     "-1"]),
    st.text(max_size=8), st.text(string.printable, max_size=8))


@FUZZ
@given(st.one_of(st.binary(max_size=200), st.lists(st.lists(FIELDS, max_size=7), max_size=6)),
       st.permutations(imagefolder.REQUIRED))
def test_fuzz_metadata_is_read_right_or_refused(tmp_path_factory, content, columns):
    """What is read are rows of the file as Python's own reader sees it, its labels as they stand
    there."""
    path = FUZZED.setdefault("path", None) or FUZZED.setdefault(
        "made", tmp_path_factory.mktemp("fuzz"))
    for name in ("x.png", "y.png"):
        (path / name).write_bytes(b"")
    if isinstance(content, list):
        with open(path / "metadata.csv", "w", encoding="utf-8", errors="ignore",
                  newline="") as file:
            csv.writer(file).writerows([columns, *content])
    else:
        (path / "metadata.csv").write_bytes(content)
    try:
        rows = imagefolder.read_metadata(path)
    except (files.InputError, OSError):  # run() makes one line of both
        return
    with open(path / "metadata.csv", encoding="utf-8-sig", newline="") as file:
        for row, line in zip(rows, csv.DictReader(file), strict=True):
            assert {name: str(value) for name, value in row.items() if name not in "ya"} == {
                name: value for name, value in line.items() if name not in "ya"}
            assert ((row["y"], row["a"]) == (int(line["y"]), int(line["a"]))
                    and min(row["y"], row["a"]) >= 0)
            assert (row["split"] in imagefolder.SPLITS
                    and (path / row["file_name"]).resolve().is_relative_to(path.resolve()))


FUZZED = {}


@FUZZ
@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]), st.lists(st.tuples(
    st.integers(0, 2000), st.integers(0, 255)), max_size=12), st.integers(0, 2000))
def test_fuzz_an_image_is_read_or_refused(tmp_path_factory, kind, changes, end):
    path = (FUZZED.get("made")
            or FUZZED.setdefault("made", tmp_path_factory.mktemp("fuzz"))) / "image"
    Image.effect_noise((20, 12), 80).save(path, kind)
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content[:max(1, len(content) - end)] if end < 1000 else content)
    try:
        image = imagefolder.load_image(path, 8)
    except files.InputError:
        return
    assert image.mode == "RGB" and image.size == (8, 8)


@FUZZ
@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
                          st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=6))
def test_fuzz_what_is_written_is_read_again(tmp_path_factory, groups):
    path = FUZZED.get("made") or FUZZED.setdefault("made", tmp_path_factory.mktemp("fuzz"))
    rows = [{"file_name": f"{i}.png", "split": "train", "y": y, "a": a, "text": text}
            for i, (text, y, a) in enumerate(groups) if text.strip()]
    if not rows:
        return
    for row in rows:
        (path / row["file_name"]).write_bytes(b"")
    files.write_csv(path / "metadata.csv", rows)
    assert imagefolder.read_metadata(path) == rows


def test_a_million_rows_are_read_in_a_minute(tmp_path):
    import time

    count = 1_000_000 if LONG else 20_000
    with open(tmp_path / "metadata.csv", "w") as file:
        file.write(HEAD)
        file.writelines(f"{i}.png,train,{i % 2},{i % 3},hi\n" for i in range(count))
    start = time.monotonic()
    with pytest.raises(files.InputError, match="not found"):
        imagefolder.read_metadata(tmp_path)
    assert time.monotonic() - start < 60
