"""data/embed.py: the embeddings of a dataset's images, and how the stages read them."""

import shutil

import numpy as np
import pytest
import torch
from conftest import files_of, run, together
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from common import files, imagefolder


def load(folder):
    """{file name: embedding}."""
    with np.load(folder / "embeddings.npz") as file:
        return dict(zip(file["file_name"].tolist(), file["embedding"], strict=True))


def test_every_image_of_every_split_has_clips_embedding_under_its_file_name(
        base, dataset, embeddings):
    found, rows = load(embeddings), imagefolder.read_metadata(dataset)
    assert (list(found) == [row["file_name"] for row in rows]
            and {row["split"] for row in rows} == {"train", "val", "test"})
    clip, processor = (CLIPModel.from_pretrained(base / "clip"),
                       CLIPProcessor.from_pretrained(base / "clip"))
    for row in rows[::20]:
        pixels = processor(images=Image.open(dataset / row["file_name"]),
                           return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = clip.visual_projection(clip.vision_model(pixels).pooler_output)[0]
        assert np.allclose(found[row["file_name"]], expected / expected.norm(), atol=1e-5)


def test_a_second_run_is_up_to_date_and_an_edited_image_or_another_clip_embeds_again(
        base, dataset, embeddings, tmp_path):
    data = shutil.copytree(dataset, tmp_path / "data")
    args = ("data/embed.py", "--data", data, "--out", tmp_path / "e", "--clip")
    run(*args, base / "clip")
    assert files_of(tmp_path / "e") == files_of(embeddings)
    assert "up to date" in run(*args, base / "clip")
    edited = data / "images" / "train-0-0-0.png"
    edited.write_bytes((data / "images" / "train-1-1-0.png").read_bytes())
    assert "up to date" not in run(*args, base / "clip")
    before, after = load(embeddings), load(tmp_path / "e")
    assert [name for name in after if not np.array_equal(before[name], after[name])] == [
        "images/train-0-0-0.png"]
    assert "up to date" not in run(*args, other_clip(base, tmp_path / "clip"))
    assert not np.allclose(after["images/train-0-0-0.png"],
                           load(tmp_path / "e")["images/train-0-0-0.png"], atol=1e-2)


def other_clip(base, path):
    """A CLIP of the same shape with a reflected image projection."""
    clip = CLIPModel.from_pretrained(base / "clip")
    clip.visual_projection.weight.data.neg_()
    shutil.copytree(base / "clip", path)
    clip.save_pretrained(path)
    return path


def test_other_captions_embed_nothing_again(base, dataset, tmp_path):
    data = shutil.copytree(dataset, tmp_path / "data")
    args = ("data/embed.py", "--data", data, "--clip", base / "clip", "--out", tmp_path / "e")
    run(*args)
    files.write_csv(data / "metadata.csv",
                    [dict(row, text="hi") for row in imagefolder.read_metadata(data)])
    assert "up to date" in run(*args)


def test_embeddings_of_another_clip_are_refused_by_what_compares_with_its_prompts(
        base, dataset, vanilla, embeddings, tmp_path):
    names = list(load(embeddings))
    (tmp_path / "e").mkdir()
    saved(file_name=np.array(names), embedding=np.random.default_rng(0).normal(
        size=(len(names), 24)).astype("f"))(tmp_path / "e" / "embeddings.npz")
    read = readers(base, dataset, vanilla, tmp_path / "e", tmp_path)
    run(*read["cluster"], "--k", 2, "--min-size", 4)
    assert {row["cluster"] for row in imagefolder.read_metadata(tmp_path / "cluster")} == {"0", "1"}
    for name in ("generate", "images"):
        run(*read[name], fails="embeddings.npz: holds embeddings of 24 numbers, "
                               "those of CLIP have 64 (run data/embed.py")


def readers(base, dataset, vanilla, embeddings, out):
    """{stage that reads embeddings: its command}."""
    args = ("--data", dataset, "--embeddings", embeddings, "--out")
    return {"cluster": ("cluster.py", *args, out / "cluster"),
            "generate": ("generate.py", "--base", base, "--clip", base / "clip", *args,
                         out / "generate", "--images", 1),
            "images": ("evaluation/images.py", "--clip", base / "clip", "--synthetic", vanilla,
                       *args, out / "images")}


def saved(**arrays):
    return lambda path: np.savez(open(path, "wb"), **arrays)


NAMES = np.array(["images/train-0-0-0.png", "images/train-0-0-1.png"])
BROKEN = {  # what is done to embeddings.npz
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:3000]),
    "truncated at its end": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "a text": lambda path: path.write_text("no zip"),
    "an npy": lambda path: np.save(open(path, "wb"), np.ones((2, 32))),
    "a pickle": saved(file_name=NAMES, embedding=np.array([{}, []], object)),
    "no embeddings": saved(file_name=NAMES),
    "no names": saved(embedding=np.ones((2, 32))),
    "fewer embeddings than names": saved(file_name=NAMES, embedding=np.ones((1, 32))),
    "one number an image": saved(file_name=NAMES, embedding=np.ones(2)),
    "words": saved(file_name=NAMES, embedding=np.full((2, 32), "x")),
    "NaN": saved(file_name=NAMES, embedding=np.full((2, 32), np.nan)),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_embeddings_are_a_one_line_error_in_each_stage_that_reads_them(
        what, base, dataset, vanilla, embeddings, tmp_path):
    BROKEN[what](shutil.copytree(embeddings, tmp_path / "e") / "embeddings.npz")
    for name, command in readers(base, dataset, vanilla, tmp_path / "e", tmp_path).items():
        run(*command, fails="embeddings.npz: cannot be read: ")
        assert not (tmp_path / name).exists()


def test_embeddings_of_other_images_are_a_one_line_error_in_each_stage_that_reads_them(
        base, dataset, vanilla, embeddings, tmp_path):
    found = load(embeddings)
    del found["images/train-1-1-3.png"], found["images/val-0-0-0.png"]
    (tmp_path / "e").mkdir()
    saved(file_name=np.array(list(found)), embedding=np.array(list(found.values())))(
        tmp_path / "e" / "embeddings.npz")
    for name, command in readers(base, dataset, vanilla, tmp_path / "e", tmp_path).items():
        run(*command, fails="embeddings.npz: does not contain 1 of 54 images, "
                            "the first is images/train-1-1-3.png (run data")
        assert not (tmp_path / name).exists()


def test_an_invalid_clip_is_a_one_line_error(dataset, tmp_path):
    run("data/embed.py", "--data", dataset, "--clip", tmp_path, "--out", tmp_path / "e",
        fails="cannot be loaded")
    assert not (tmp_path / "e").exists()


def test_processes_share_the_batches_and_make_the_same_bytes(base, dataset, tmp_path):
    args = ("data/embed.py", "--data", dataset, "--clip", base / "clip", "--batch", 8, "--out")
    run(*args, tmp_path / "whole")
    together(3, *args, tmp_path / "e")
    assert files_of(tmp_path / "e") == files_of(tmp_path / "whole")
