"""The one format: what is read, what is refused, how files are published."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, make_dataset, run
from PIL import Image

from data import imagefolder as folder

HEADER = "file_name,split,y,a,text\n"
BAD_METADATA = {
    "a missing column": ("file_name,split,y,text\nx.png,train,0,hi\n", "column a stands 0 times"),
    "a doubled column": ("file_name,split,y,a,a,text\nx.png,train,0,0,0,hi\n", "column a stands 2 times"),
    "a float label": (HEADER + "x.png,train,0.5,0,hi\n", "y is '0.5'"),
    "a negative label": (HEADER + "x.png,train,0,-1,hi\n", "a is '-1'"),
    "an unknown split": (HEADER + "x.png,dev,0,0,hi\n", "split is 'dev'"),
    "a path out of the folder": (HEADER + "../x.png,train,0,0,hi\n", "leaves its folder"),
    "an absolute path": (HEADER + "/etc/x.png,train,0,0,hi\n", "leaves its folder"),
    "a doubled row": (HEADER + "x.png,train,0,0,hi\n" * 2, "stands twice"),
    "an empty caption": (HEADER + "x.png,train,0,0, \n", "text is empty"),
    "a short row": (HEADER + "x.png,train,0\n", "another number of fields"),
    "an image that is not there": (HEADER + "y.png,train,0,0,hi\n", "not there"),
    "no row": (HEADER, "no image"),
    "an empty file": ("", "column file_name stands 0 times"),
    "Latin-1": (HEADER.encode() + "x.png,train,0,0,\xe9\n".encode("latin-1"), "not a csv in UTF-8"),
    "two captions in a group": (HEADER + "x.png,train,0,0,hi\nz.png,train,0,0,ho\n", "has several texts"),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_bad_metadata_is_one_line_and_nothing_is_published(case, tmp_path):
    content, message = BAD_METADATA[case]
    (tmp_path / "metadata.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    for name in ("x.png", "z.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    run("finetune.py", "--method", "lora", "--base", "none", "--data", tmp_path, "--out", tmp_path / "out",
        fails=message)
    assert not (tmp_path / "out").exists()


def test_a_byte_order_mark_crlf_and_quoted_captions_are_read(tmp_path):
    text = 'a "photo", of a digit'
    line = 'x.png,train,1,0,"a ""photo"", of a digit"'
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + (HEADER + line).replace("\n", "\r\n").encode())
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    assert folder.read_metadata(tmp_path) == [{"file_name": "x.png", "split": "train", "y": 1, "a": 0, "text": text}]


@pytest.mark.parametrize("mode", ("L", "P", "CMYK", "RGBA", "I;16", "1"))
def test_every_mode_of_image_becomes_rgb_of_the_same_look(mode, tmp_path):
    grey = Image.new("L", (40, 30), 200)
    image = {"I;16": lambda: Image.new("I;16", grey.size, 200 * 257), "P": lambda: grey.convert("RGB").quantize(4),
             }.get(mode, lambda: grey.convert("RGB").convert(mode))()
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    image.save(path)
    read = folder.load_image(path, 16)
    assert read.mode == "RGB" and read.size == (16, 16)
    if mode != "1":
        assert all(abs(channel - 200) <= 3 for channel in read.getpixel((8, 8)))


def test_transparent_is_white_and_exif_rotation_is_undone(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert folder.load_image(tmp_path / "clear.png", 8).getpixel((4, 4)) == (255, 255, 255)
    image, exif = Image.new("RGB", (16, 16), "black"), Image.Exif()
    image.paste("white", (0, 0, 16, 8))  # white above; orientation 3 says that it was taken upside down
    exif[0x0112] = 3
    image.save(tmp_path / "turned.png", exif=exif)
    assert folder.load_image(tmp_path / "turned.png", 16).getpixel((8, 12)) == (255, 255, 255)


@pytest.mark.parametrize("content", (b"", b"I am no image", None))
def test_a_broken_image_is_an_input_error(content, tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(whole[:len(whole) // 2] if content is None else content)
    with pytest.raises(folder.InputError, match="can't be read as an image"):
        folder.load_image(tmp_path / "x.png", 32)


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    folder.write_json(tmp_path / "x.json", 1)
    with pytest.raises(TypeError):
        folder.write_json(tmp_path / "x.json", object())
    assert (tmp_path / "x.json").read_text() == "1\n"
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_class_is_tied_to_the_attribute_that_is_most_over_represented_in_it():
    counts = {"y0-a0": 60, "y0-a1": 30, "y1-a0": 40, "y1-a1": 5}  # a0 is common everywhere; of a1, 30 of 35 are y0
    assert folder.tied_attribute(counts, 0) == 1 and folder.tied_attribute(counts, 1) == 0


@pytest.mark.parametrize("sent", (signal.SIGINT, signal.SIGTERM))
def test_an_interrupt_is_one_line_and_says_how_to_go_on_whatever_a_library_swallows(sent):
    code = "import sys, time; sys.argv = ['stage.py']; from data import imagefolder as f\n" \
           "def main():\n print('up', flush=True)\n while True:\n  try: time.sleep(60)\n  except BaseException: pass\n" \
           "f.run(main)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=-1, stderr=-1, text=True)
    process.stdout.readline()
    process.send_signal(sent)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors == "stage.py: interrupted (the same command goes on from here)\n"


def test_flags_out_of_range_are_one_line():
    run("cluster.py", "--data", "x", "--clip", "x", "--out", "x", "--k", "0", fails="argument --k: 0 is not between")
    run("cluster.py", "--data", "x", "--clip", "x", "--out", "x", "--k", "many", fails="argument --k: invalid")
    run("generate.py", "--base", "x", "--clip", "x", "--data", "x", "--out", "x", "--guidance-scale", "nan",
        fails="nan is not between 1 and inf")
    run("finetune.py", "--method", "lora", "--base", "x", "--data", "x", "--out", "x", "--shard", "3/3",
        fails="shards count from 0/n to n-1/n")


@pytest.mark.parametrize("script", ("data/prepare.py", "base/pretrain.py", "cluster.py", "finetune.py", "generate.py",
                                    "train_classifier.py", "evaluate.py"))
def test_help_explains_every_flag(script):
    text = run(script, "--help")
    flags = [line for line in text.splitlines() if line.startswith("  --")]
    assert flags and "python " + script in text
