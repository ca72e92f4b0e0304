"""Decoded images: the same as those in the files, decoded once, whatever happens meanwhile."""

import errno
import fcntl
import multiprocessing
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import files_of, make_dataset, run
from PIL import Image
from torchvision.transforms import v2

from classifiers import network
from common import files, imagefolder, pixels
from common.pixels import Pixels


@pytest.fixture
def folder(tmp_path):
    return make_dataset(tmp_path / "data" / "shapes")


def rows_of(folder):
    return imagefolder.read_metadata(folder)


def as_in_files(folder, rows, size):
    images = [np.array(imagefolder.load_image(folder / row["file_name"], size)) for row in rows]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def whole(found):
    return found[torch.arange(len(found))]


@pytest.mark.parametrize("cache", (True, False))
@pytest.mark.parametrize("size", (32, 20))
def test_pixels_are_those_of_the_files_in_any_order(folder, size, cache):
    rows = rows_of(folder)[::-1]
    found, expected = Pixels(folder, rows, size, cache), as_in_files(folder, rows, size)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    assert found[order].dtype == torch.uint8 and torch.equal(found[order], expected[order])
    assert (folder.parent / ".decoded").exists() == cache


def test_an_image_is_decoded_once_for_all_datasets_beside_each_other(folder, monkeypatch):
    rows = rows_of(folder)
    expected = as_in_files(folder, rows, 16)
    Pixels(folder, rows[:20], 16)
    decoded = []
    load = imagefolder.load_image
    monkeypatch.setattr(pixels.made, "code_digest", lambda *parts: "x" * 16)
    Pixels(folder, rows[:20], 16)
    monkeypatch.setattr(imagefolder, "load_image",
                        lambda path, size: decoded.append(path) or load(path, size))
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    assert torch.equal(whole(Pixels(other, rows, 16)), expected)
    assert len(decoded) == len(
        {*files.file_digests(folder, [row["file_name"] for row in rows[20:]]).values()}
        - {*files.file_digests(folder, [row["file_name"] for row in rows[:20]]).values()}) > 0


def many(folder, count):
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = [{"file_name": f"images/{i}.png"} for i in range(count)]
    for row in rows:
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / row["file_name"])
    return rows


def decode(folder, rows, sums):
    sums.put(whole(Pixels(folder, rows, 8)).sum().item())


def test_worker_processes_and_processes_that_decode_the_same_agree(tmp_path):
    rows = many(tmp_path / "data", 1200)
    spawn = multiprocessing.get_context("spawn")
    sums = spawn.Queue()
    processes = [spawn.Process(target=decode, args=(tmp_path / "data", part, sums))
                 for part in (rows, rows[::-1])]
    for process in processes:
        process.start()
    expected = as_in_files(tmp_path / "data", rows, 8)
    assert [sums.get(timeout=60) for _ in processes] == [expected.sum().item()] * 2
    assert torch.equal(whole(Pixels(tmp_path / "data", rows, 8)), expected)
    place, = (tmp_path / ".decoded").iterdir()
    assert (place / "pixels").stat().st_size == 1200 * 8 * 8 * 3


@pytest.mark.parametrize("end", ("0123456789abcdef", "01234567"))
def test_what_a_killed_process_left_is_decoded_again(folder, end):
    rows = rows_of(folder)
    expected = as_in_files(folder, rows, 16)
    Pixels(folder, rows[:30], 16)
    place, = (folder.parent / ".decoded").iterdir()
    with open(place / "pixels", "ab") as file:
        file.write(b"half of an image")
    with open(place / "index", "a") as file:
        file.write(end)  # a line without its end
    assert torch.equal(whole(Pixels(folder, rows, 16)), expected)


def test_decoded_images_can_be_kept_on_a_disk_of_the_node(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DECODED", str(tmp_path / "scratch"))
    assert torch.equal(whole(Pixels(folder, rows_of(folder), 16)),
                       as_in_files(folder, rows_of(folder), 16))
    assert (list((tmp_path / "scratch").glob("16-*/pixels"))
            and not (folder.parent / ".decoded").exists())


def test_a_file_system_without_locks_changes_no_bytes(folder, base, tmp_path, monkeypatch):
    def embed(out):
        run("data/embed.py", "--data", folder, "--clip", base / "clip", "--out", tmp_path / out)
        return files_of(tmp_path / out)

    def no_locks(*args):  # as NFS without its lock daemon answers
        raise OSError(errno.ENOLCK, "No locks available")

    with_locks = embed("with")
    shutil.rmtree(folder.parent / ".decoded")
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert embed("without") == with_locks


def test_a_changed_image_is_decoded_anew(folder):
    rows = rows_of(folder)
    Pixels(folder, rows, 16)
    Image.new("RGB", (40, 40), "blue").save(folder / rows[3]["file_name"])
    assert whole(Pixels(folder, rows, 16))[3].float().mean((1, 2)).tolist() == [0, 0, 255]


@pytest.mark.parametrize("cache", ("--cache", "--no-cache"))
def test_broken_images_are_counted_before_anything_else_happens(folder, base, tmp_path, cache):
    rows = rows_of(folder)
    for row in rows[3:5]:
        (folder / row["file_name"]).write_text(f"no image: {row}")
    run("data/embed.py", "--data", folder, "--clip", base / "clip", cache,
        "--out", tmp_path / "out", fails=f"2 of {len(rows)} images are broken, the first is")
    assert not (tmp_path / "out").exists()
    Image.new("RGB", (40, 40), "blue").save(folder / rows[3]["file_name"])
    Image.new("RGB", (40, 40), "red").save(folder / rows[4]["file_name"])
    run("data/embed.py", "--data", folder, "--clip", base / "clip", cache,
        "--out", tmp_path / "out")


def test_images_that_were_decoded_before_are_not_checked_again(folder, monkeypatch):
    rows = rows_of(folder)
    Pixels(folder, rows[:-1], 16)
    checked = []
    monkeypatch.setattr(imagefolder, "load_image",
                        lambda path, size: checked.append(path) or Image.new("RGB", (8, 8)))
    pixels.check(folder, rows)
    digests = files.file_digests(folder, [row["file_name"] for row in rows])
    twins = sum(digest == digests[rows[-1]["file_name"]] for digest in digests.values())
    assert len(checked) == (twins == 1)


def test_a_disk_that_is_too_full_is_told_before_decoding(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(files.InputError, match="are free .*--no-cache"):
        Pixels(folder, rows_of(folder), 16)


def test_joined_pixels_are_read_from_both_folders(folder, tmp_path):
    other = make_dataset(tmp_path / "other" / "shapes", {(0, 0): 5, (1, 1): 5})
    first, second = Pixels(folder, rows_of(folder), 16), Pixels(other, rows_of(other), 16)
    taken = torch.tensor([4, 0, 9])
    both = first.joined(second, taken)
    indices = torch.tensor([len(first) + 2, 1, len(first)])
    assert torch.equal(both[indices], torch.stack([
        second[torch.tensor([9])][0], first[torch.tensor([1])][0], second[torch.tensor([4])][0]]))


def test_read_ahead_gives_the_same_in_order():
    assert (list(pixels.ahead(lambda x: 2 * x, range(5))) == [0, 2, 4, 6, 8]
            and not list(pixels.ahead(None, [])))


def test_random_crops_are_those_of_torchvision_resized_at_once(monkeypatch):
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    # what is beyond the edge of a crop then matters little
    images = v2.functional.gaussian_blur(images, 7)
    box = 4, 8, 30, 28  # top, left, height, width
    monkeypatch.setattr(v2.RandomResizedCrop, "get_params",
                        staticmethod(lambda image, scale, ratio: box))
    torch.manual_seed(0)
    found = network.random_crops(images, 24)
    expected = v2.functional.resized_crop(images.float(), *box, [24, 24],
                                          antialias=False) / 127.5 - 1
    mirrored = [not torch.allclose(a, b, atol=0.1) for a, b in zip(found, expected)]
    for crop, wanted, mirror in zip(found, expected, mirrored):
        wanted = wanted.flip(-1) if mirror else wanted
        assert (crop - wanted)[:, 1:-1, 1:-1].abs().max() < 1e-4
    flips = [not torch.allclose(network.random_crops(images, 24)[0], expected[0], atol=0.1)
             for _ in range(40)]
    assert 8 < sum(flips) < 32
