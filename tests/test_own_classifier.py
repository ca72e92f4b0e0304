"""One's own classifier: its predictions and weights as people have them,
beside ours in the results."""

import importlib.util
import shutil

import pytest
import torch
from conftest import run
from safetensors.torch import save_file

from common import files, imagefolder
from evaluation import own

TIMM = pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="pip install timm")


@pytest.fixture(scope="module")
def named(dataset, tmp_path_factory):
    """The dataset, prepared from a table with words."""
    root = tmp_path_factory.mktemp("own") / "root"
    shutil.copytree(dataset / "images", root)
    rows = [row | {"file_name": row["file_name"].removeprefix("images/"),
                   "y": ("box", "wide_bar")[row["y"]], "a": ("red", "green")[row["a"]]}
            for row in imagefolder.read_metadata(dataset)]
    files.write_csv(root / "metadata.csv", [
        {name: row[name] for name in ("file_name", "split", "y", "a")} for row in rows])
    out = root.parent / "data"
    run("data/prepare.py", "folder", "--root", root, "--out", out)
    return out


def predictions(path, rows, columns=("file_name", "prediction"), name=str, label=str):
    files.write_csv(path, [dict(zip(columns, (name(row["file_name"]), label(row["y"]))))
                           for row in rows])
    return path


WAYS = {
    "names of classes": {"label": lambda y: ("box", "Wide Bar")[y]},
    "names with underscores": {"label": lambda y: ("box", "wide_bar")[y]},
    "floats": {"label": lambda y: f"{y}.0"},
    "absolute paths": {"name": lambda name: f"/home/me/project/{name}"},
    "paths of Windows": {"name": lambda name: "C:\\photos\\" + name.split("/")[-1]},
    "names alone": {"name": lambda name: name.split("/")[-1]},
}


@pytest.mark.parametrize("way", WAYS)
def test_predictions_are_taken_as_people_write_them(named, tmp_path, way):
    rows = imagefolder.read_metadata(named, "test")
    found = own.with_predictions(rows, predictions(tmp_path / "p.csv", rows, **WAYS[way]), named)
    assert [row["prediction"] for row in found] == [row["y"] for row in rows]


def test_what_is_ambiguous_or_unknown_is_refused(named, tmp_path):
    rows = [{"file_name": f"images/{folder}/1.png", "split": "test", "y": 0, "a": 0}
            for folder in "ab"]

    def refused(lines, message):
        (tmp_path / "p.csv").write_text("file_name,prediction\n" + lines)
        with pytest.raises(files.InputError, match=message):
            own.with_predictions(rows, tmp_path / "p.csv", named)

    refused("1.png,0\n", "row 2: 1.png could be 2 images")
    refused("a/1.png,0\nx/a/1.png,1\n",
            "row 3: x/a/1.png is images/a/1.png, which has a prediction already")
    refused("a/1.png,zebra\n",
            "row 2: prediction is 'zebra' .write a number from 0 to 1, or one of box, wide bar")
    refused("a/1.png,2\n", "row 2: prediction is '2' .write a number from 0 to 1, or one of box")
    refused("2.png,0\n", "names no image of")
    (tmp_path / "p.csv").write_text("image,pred\na/1.png,0\n")
    with pytest.raises(files.InputError, match="has no column 'file_name'; it has image, pred "
                                               ".name yours by --image"):
        own.with_predictions(rows, tmp_path / "p.csv", named)
    assert own.with_predictions(
        rows, tmp_path / "p.csv", named, "image", "pred")[0]["prediction"] == 0


def test_a_name_that_several_splits_share_is_an_image_of_the_split_that_is_tested(named, tmp_path):
    rows = [{"file_name": f"images/{split}/cat/1.png", "y": 0, "a": 0, "split": split}
            for split in ("train", "test")]
    for line, found in (("cat/1.png,1", ["test"]), ("root/train/cat/1.png,1", ["train"]),
                        ("train/cat/1.png,1\ntest/cat/1.png,0", ["train", "test"])):
        (tmp_path / "p.csv").write_text(f"file_name,prediction\n{line}\n")
        predicted = own.with_predictions(rows, tmp_path / "p.csv", named, split="test")
        assert [row["split"] for row in predicted] == found


def test_its_predictions_are_a_row_of_the_results_with_interval_and_difference(named, tmp_path):
    run("train_classifier.py", "--recipe", "erm", "--data", named, "--seeds", 0, 1, "--epochs", 1,
        "--out", tmp_path / "erm")
    test = imagefolder.read_metadata(named, "test")
    path = predictions(tmp_path / "p.csv", test, ("image", "pred"),
                       label=lambda y: ("box", "wide bar")[y])
    args = ("evaluate.py", "--data", named, "--classifiers", tmp_path / "erm",
            "--references", "erm", "mine", "--mine", path, "--image", "image",
            "--prediction", "pred", "--out", tmp_path / "results")
    text = run(*args)
    row = next(row for row in files.read_csv(tmp_path / "results" / "intervals.csv")
               if row["recipe"] == "mine")
    assert float(row["worst_group"]) == 1 and row["vs_erm"] and row["group_labels"] == "unknown"
    assert "| mine | 1.000 | " in text and "vs mine" in text
    predictions(path, test[1:], ("image", "pred"))
    run(*args, fails=f"has predictions for {len(test) - 1} of {len(test)} images of split test")


def test_each_of_several_attributes_is_shown_alone(dataset, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "images").symlink_to(dataset / "images")
    rows = imagefolder.read_metadata(dataset)
    files.write_csv(root / "metadata.csv", [
        {"file_name": row["file_name"], "split": row["split"], "y": row["y"],
         "colour": ("red", "green")[row["a"]], "half": ("first", "second")[i % 2]}
        for i, row in enumerate(rows)])
    run("data/prepare.py", "folder", "--root", root, "--a", "colour", "half",
        "--classes", "box", "bar", "--out", tmp_path / "data")
    run("train_classifier.py", "--recipe", "erm", "--data", tmp_path / "data", "--seeds", 0,
        "--epochs", 1, "--out", tmp_path / "erm")
    # all are called boxes
    test = [row | {"y": 0} for row in imagefolder.read_metadata(tmp_path / "data", "test")]
    text = run("evaluate.py", "--data", tmp_path / "data", "--classifiers", tmp_path / "erm",
               "--mine", predictions(tmp_path / "p.csv", test), "--out", tmp_path / "results")
    assert "| recipe | worst by colour alone | worst by half alone |" in text
    assert ("| mine | 0.000 (class 1, colour red) | 0.000 (class 1, half first) |" in text
            or "colour green) |" in text)


# ------------------------------------------------------------------------------------------ weights


@pytest.fixture(scope="module")
def resnet():
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=2)


def page(place, named, base, embeddings, weights, *more, fails=None):
    return run("evaluation/failures.py", "--data", named, "--embeddings", embeddings,
               "--clip", base / "clip", "--resolution", 32, "--k", 2, "--min-size", 3,
               "--weights", weights, *more, "--out", place / "out", fails=fails)


def test_weights_as_training_scripts_save_them_give_the_same_predictions(
        named, dataset, base, embeddings, resnet, tmp_path):
    arch, state = ("--arch", "resnet18"), resnet.state_dict()
    wrapped = {f"module.{name}": value for name, value in state.items()}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "wrapped.pth")
    torch.save(resnet, tmp_path / "whole.pth")
    groups = []
    for name in ("w.safetensors", "plain.pth", "wrapped.pth"):
        page(tmp_path, named, base, embeddings, tmp_path / name, *arch)
        groups.append(files.read_csv(tmp_path / "out" / "groups.csv"))
    assert groups[0] == groups[1] == groups[2]
    assert "torch.save(model.state_dict(), 'weights.pth')" in page(
        tmp_path, named, base, embeddings, tmp_path / "whole.pth", *arch,
        fails="holds more than weights, such as a whole model")


@TIMM
def test_a_network_of_timm_is_normalised_as_timm_says(named, base, embeddings, tmp_path):
    import timm

    from classifiers import network

    model = timm.create_model("tf_efficientnet_lite0", num_classes=2)
    torch.save(model.state_dict(), tmp_path / "lite.pth")
    found, size = network.whole_network("tf_efficientnet_lite0", str(tmp_path / "lite.pth"), 2)
    config = model.pretrained_cfg
    assert (size == config["input_size"][1]
            and found[0].mean == pytest.approx([2 * mean - 1 for mean in config["mean"]]))
    found, _ = network.whole_network("tf_efficientnet_lite0", str(tmp_path / "lite.pth"), 2,
                                     [0.5, 0.4, 0.3], [0.2, 0.2, 0.2])
    assert (found[0].mean == pytest.approx([0.0, -0.2, -0.4])
            and found[0].std == pytest.approx([0.4] * 3))
    page(tmp_path, named, base, embeddings, tmp_path / "lite.pth",
         "--arch", "tf_efficientnet_lite0")


def test_the_page_writes_what_checks_the_cure(named, dataset, base, embeddings, tmp_path):
    rows = imagefolder.read_metadata(named, "test")
    path = predictions(tmp_path / "p.csv", rows, ("image", "pred"))
    said = run("evaluation/failures.py", "--data", named, "--embeddings", embeddings,
               "--clip", base / "clip", "--k", 2, "--min-size", 3, "--predictions", path,
               "--image", "image", "--prediction", "pred", "--out", tmp_path / "out")
    table = files.read_csv(tmp_path / "out" / "pseudo-groups.csv")
    assert len(table) == len(rows) and {row["a"] for row in table} == {"0", "1"}
    assert said.splitlines()[-1].startswith("make DATASET=data ROOT=")
    assert f"PREDICTIONS={path} 'COLUMNS=--image image --prediction pred'" in said.splitlines()[-1]
