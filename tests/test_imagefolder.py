"""The one format: what is read, what is refused, how files are published."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, run
from PIL import Image

from common import files, imagefolder, made

HEADER = "file_name,split,y,a,text\n"


def test_a_byte_order_mark_crlf_and_quoted_captions_are_read(tmp_path):
    text = 'a "photo", of a digit'
    line = 'x.png,train,1,0,"a ""photo"", of a digit"'
    (tmp_path / "metadata.csv").write_bytes(
        b"\xef\xbb\xbf" + (HEADER + line).replace("\n", "\r\n").encode())
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    assert imagefolder.read_metadata(tmp_path) == [
        {"file_name": "x.png", "split": "train", "y": 1, "a": 0, "text": text}]


@pytest.mark.parametrize("mode", ("L", "P", "CMYK", "RGBA", "I;16", "1"))
def test_every_mode_of_image_becomes_rgb_of_the_same_look(mode, tmp_path):
    grey = Image.new("L", (40, 30), 200)
    image = {"I;16": lambda: Image.new("I;16", grey.size, 200 * 257),
             "P": lambda: grey.convert("RGB").quantize(4),
             }.get(mode, lambda: grey.convert("RGB").convert(mode))()
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    image.save(path)
    read = imagefolder.load_image(path, 16)
    assert read.mode == "RGB" and read.size == (16, 16)
    if mode != "1":
        assert all(abs(channel - 200) <= 3 for channel in read.getpixel((8, 8)))


def test_transparent_is_white_and_exif_rotation_is_undone(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert imagefolder.load_image(tmp_path / "clear.png", 8).getpixel((4, 4)) == (255, 255, 255)
    image, exif = Image.new("RGB", (16, 16), "black"), Image.Exif()
    # white above; orientation 3 says that it was taken upside down
    image.paste("white", (0, 0, 16, 8))
    exif[0x0112] = 3
    image.save(tmp_path / "turned.png", exif=exif)
    assert imagefolder.load_image(tmp_path / "turned.png", 16).getpixel((8, 12)) == (255, 255, 255)


@pytest.mark.parametrize("content", (b"", b"I am no image", None))
def test_a_broken_image_is_an_input_error(content, tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(whole[:len(whole) // 2] if content is None else content)
    with pytest.raises(files.InputError, match="cannot be read as an image"):
        imagefolder.load_image(tmp_path / "x.png", 32)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    files.write_json(tmp_path / "x.json", 1)
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "x.json", object())
    assert (tmp_path / "x.json").read_text() == "1\n"
    assert os.listdir(tmp_path) == ["x.json"]


def test_groups_are_named_by_what_their_prompts_do_not_share():
    texts = {"y0-a0": "a photo of a landbird on land", "y1-a0": "a photo of a waterbird on land"}
    rows = [dict(zip("ya", map(int, group[1::3])), text=text) for group, text in texts.items()]
    assert imagefolder.group_titles(rows) == {
        "y0-a0": "landbird on land (y0-a0)", "y1-a0": "waterbird on land (y1-a0)"}
    assert imagefolder.group_titles(rows[:1]) == {"y0-a0": "photo of a landbird on land (y0-a0)"}


def test_the_prompts_of_a_class_are_its_class_text_or_those_of_its_groups():
    rows = [{"y": y, "a": a, "text": f"a {'ab'[y]} on {'cd'[a]}"}
            for y, a in ((1, 1), (0, 0), (0, 1), (0, 0))]
    assert imagefolder.class_prompts(rows) == {0: ["a a on c", "a a on d"], 1: ["a b on d"]}
    # one of the classes has none
    rows = [dict(row, class_text=f"a {'ab'[row['y']]}" if row["y"] else "") for row in rows]
    assert imagefolder.class_prompts(rows) == {0: ["a a on c", "a a on d"], 1: ["a b"]}


def test_file_digests_follow_the_bytes_and_the_listing_what_changed(tmp_path):
    (tmp_path / "x").write_text("one")
    first, listed = files.file_digests(tmp_path, ["x"]), made.listing(tmp_path)
    os.utime(tmp_path / "x", ns=(1, 1))
    assert files.file_digests(tmp_path, ["x"]) == first and made.listing(tmp_path) != listed
    (tmp_path / "x").write_text("two")
    assert files.file_digests(tmp_path, ["x"]) != first


def test_a_class_is_correlated_with_the_attribute_most_over_represented_in_it():
    # a0 is common everywhere; of a1, 30 of 35 are y0
    counts = {"y0-a0": 60, "y0-a1": 30, "y1-a0": 40, "y1-a1": 5}
    assert (imagefolder.correlated_attribute(counts, 0) == 1
            and imagefolder.correlated_attribute(counts, 1) == 0)


@pytest.mark.parametrize("sent", (signal.SIGINT, signal.SIGTERM))
def test_an_interrupt_is_one_line_and_says_how_to_resume_whatever_a_library_swallows(sent):
    code = ("import sys, time; sys.argv = ['stage.py']; from common import stage\n"
            "def main(argv):\n print('up', flush=True)\n while True:\n"
            "  try: time.sleep(60)\n  except BaseException: pass\n"
            "stage.run(main)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=-1, stderr=-1,
                               text=True)
    process.stdout.readline()
    process.send_signal(sent)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors == "stage.py: interrupted (rerun the same command to resume)\n"


def test_flags_out_of_range_are_one_line_errors():
    run("cluster.py", "--data", "x", "--embeddings", "x", "--out", "x", "--k", "0",
        fails="argument --k: 0 is not between")
    run("cluster.py", "--data", "x", "--embeddings", "x", "--out", "x", "--k", "many",
        fails="argument --k: invalid")
    run("generate.py", "--base", "x", "--clip", "x", "--data", "x", "--out", "x",
        "--guidance-scale", "nan", fails="nan is not between 1 and inf")


@pytest.mark.parametrize("script", (
    "data/prepare.py", "data/embed.py", "base/pretrain.py", "cluster.py", "finetune.py",
    "generate.py", "train_classifier.py", "evaluate.py", "evaluation/images.py",
    "evaluation/sweep.py", "evaluation/paper.py", "evaluation/report.py", "tools/bench.py"))
def test_help_explains_every_flag(script):
    text = run(script, "--help")
    flags = [line for line in text.splitlines() if line.startswith("  --")]
    assert flags and "python " + script in text


def test_an_input_below_data_that_no_stage_made_is_watched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data" / "raw"
    root.mkdir(parents=True)
    before = made.outside("data/raw")
    (root / "1.jpg").write_text("an image")
    assert None not in (before, made.outside("data/raw")) and made.outside("data/raw") != before
    files.write_json(root / "config.json", {"key": "of a stage"})
    assert made.outside("data/raw") is None
