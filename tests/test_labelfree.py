"""Data without attribute labels: pseudo-groups, learned identifiers, a synthetic val set, and the
page about failures."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BIASED, make, make_dataset, new_house, run, slow
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from common import files, imagefolder
from evaluation.failures import compared, found_more
from generate import splits
from train_classifier import group_labels

QUICK = ("--seeds", 0, "--epochs", 2, "--last-layer-epochs", 2, "--batch", 8)


def with_attributes(data, out, attribute_of):
    """A dataset with other attribute labels, whose prompts and classes stay; attribute_of: a
    function of a row."""
    shutil.copytree(data, out)
    rows = [row | {"a": attribute_of(row), "class_text": row["text"].split(" on ")[0]}
            for row in imagefolder.read_metadata(data)]
    for row in rows:
        row["text"] = row["class_text"] if attribute_of(row) == 0 else row["text"]
    files.write_csv(out / "metadata.csv", rows)
    return out


@pytest.fixture(scope="module")
def unlabelled(dataset, tmp_path_factory):
    """The dataset of the other tests as one has it who does not know the background."""
    return with_attributes(dataset, tmp_path_factory.mktemp("data") / "unlabelled", lambda row: 0)


@pytest.fixture(scope="module")
def pseudo(unlabelled, embeddings, tmp_path_factory):
    out = tmp_path_factory.mktemp("clusters") / "pseudo"
    run("cluster.py", "--data", unlabelled, "--embeddings", embeddings, "--within", "dataset",
        "--k", 2, "--min-size", 3, "--out", out)
    return out


# ----------------------------------------------------------------------------------------- the data


def own_images(root, header, lines):
    (root / "a").mkdir(parents=True)
    for i in range(len(lines)):
        Image.new("RGB", (8, 8), (20 * i, 90, 90)).save(root / "a" / f"{i}.png")
    (root / "metadata.csv").write_text("\n".join(
        [header, *(f"a/{i}.png,{line}" for i, line in enumerate(lines))]) + "\n")
    return root


def test_a_folder_needs_no_attribute_and_a_second_csv_brings_that_of_test(tmp_path):
    root = own_images(tmp_path / "root", "file_name,y,split",
                      ["0,train", "1,train", "0,val", "1,val", "0,test", "1,test"])
    args = ("data/prepare.py", "folder", "--root", root, "--classes", "dog", "wolf")
    run(*args, "--out", tmp_path / "o")
    rows = imagefolder.read_metadata(tmp_path / "o")
    assert {row["a"] for row in rows} == {0}
    assert ([row["text"] for row in rows[:2]] == [row["class_text"] for row in rows[:2]]
            == ["a photo of a dog", "a photo of a wolf"])
    (tmp_path / "known.csv").write_text("file_name,a\na/4.png,0\na/5.png,1\n")
    run(*args, "--a-from", tmp_path / "known.csv", "--out", tmp_path / "o")
    rows = imagefolder.read_metadata(tmp_path / "o")
    assert [(row["a"], row["text"]) for row in rows][4:] == [
        (0, "a photo of a dog"), (1, "a photo of a wolf")]
    (tmp_path / "known.csv").write_text("file_name,a\nb/4.png,0\n")
    run(*args, "--a-from", tmp_path / "known.csv", "--out", tmp_path / "o",
        fails="names b/4.png, which is none of")


def test_an_attribute_that_is_there_is_not_given_twice(tmp_path):
    root = own_images(tmp_path / "root", "file_name,y,a", ["0,0", "1,1"])
    (tmp_path / "known.csv").write_text("file_name,a\na/1.png,1\n")
    run("data/prepare.py", "folder", "--root", root, "--classes", "a", "b",
        "--attributes", "c", "d", "--a-from", tmp_path / "known.csv", "--out", tmp_path / "o",
        fails="tells attributes already")


# ------------------------------------------------------------------------------------ pseudo-groups


def test_clusters_over_all_classes_find_the_background_that_few_images_of_a_class_lack(
        dataset, pseudo):
    truth = {row["file_name"]: row["a"] for row in imagefolder.read_metadata(dataset)}
    rows = imagefolder.read_metadata(pseudo)
    assert {row["file_name"] for row in rows} == set(truth)
    assert set(rows[0]) == {"file_name", "split", "y", "a", "text", "class_text"}
    agree = np.mean([row["a"] == truth[row["file_name"]] for row in rows])
    assert max(agree, 1 - agree) == 1
    assert {row["text"] for row in rows} == {"a photo of an even digit", "a photo of an odd digit"}
    assert (pseudo / "y0.png").is_file() and (pseudo / "y1.png").is_file()


def test_pseudo_groups_do_not_depend_on_any_attribute_label(dataset, embeddings, pseudo, tmp_path):
    for name, attribute_of in (("true", lambda row: row["a"]),
                               ("odd", lambda row: len(row["file_name"]) % 2)):
        data = with_attributes(dataset, tmp_path / name, attribute_of)
        run("cluster.py", "--data", data, "--embeddings", embeddings, "--within", "dataset",
            "--k", 2, "--min-size", 3, "--out", tmp_path / f"pseudo-{name}")
        assert ((tmp_path / f"pseudo-{name}" / "metadata.csv").read_bytes()
                == (pseudo / "metadata.csv").read_bytes())


def test_words_take_the_place_of_clusters(base, dataset, embeddings, tmp_path):
    data = with_attributes(dataset, tmp_path / "data", lambda row: row["a"])
    args = ("cluster.py", "--data", data, "--embeddings", embeddings,
            "--attributes", "on a red background", "on a green background",
            "--out", tmp_path / "out")
    text = run(*args, "--clip", base / "clip")
    rows = imagefolder.read_metadata(tmp_path / "out")
    agree = np.mean([row["a"] == true["a"]
                     for row, true in zip(rows, imagefolder.read_metadata(dataset))])
    assert (agree > 0.9
            and f"accuracy of the words, taken in order for a = 0, 1, ...: {agree:.3f}" in text)
    assert {row["text"] for row in rows if row["a"]} == {
        f"a photo of an {y} digit on a green background" for y in ("even", "odd")}
    assert all(0.5 <= float(row["confidence"]) <= 1 for row in rows)
    run(*args, fails="--attributes: needs the CLIP model of the embeddings (add --clip)")


def test_pseudo_groups_need_a_prompt_of_each_class(dataset, embeddings, tmp_path):
    run("cluster.py", "--data", dataset, "--embeddings", embeddings, "--within", "class",
        "--out", tmp_path / "out",
        fails="has no column class_text, and class 0 has several texts")


# ------------------------------------------------------------------ learned words and synthetic val


@pytest.fixture(scope="module", params=("lora", "dreambooth"))
def tokens(request, base, pseudo, tmp_path_factory):
    """One model with a learned word for each pseudo-group, and a few of its images."""
    out = tmp_path_factory.mktemp(request.param)
    run("finetune.py", "--method", request.param, "--per", "dataset", "--learn-identifiers",
        "--base", base, "--data", pseudo, "--balance", 1, "--steps", 3, "--batch", 8,
        "--learning-rate", 1e-3, "--identifier-rate", 0.1, "--out", out / "models")
    run("generate.py", "--base", base, "--clip", base / "clip", "--data", pseudo,
        "--models", out / "models", "--images", 8, "--rare", "own", "--val-share", 0.25,
        "--steps", 2, "--keep", 1, "--alpha", 1, "--batch", 8, "--out", out / "synthetic")
    return out


def test_each_pseudo_group_learns_a_word_of_its_own_from_the_same_beginning(base, tokens, pseudo):
    groups = imagefolder.group_counts(imagefolder.read_metadata(pseudo))
    learned = {}
    for path in (tokens / "models" / "all" / "tokens").iterdir():
        learned |= load_file(path)
    assert learned.keys() == {f"<{group}>" for group in groups}
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    photo = pipe.tokenizer("photo", add_special_tokens=False).input_ids
    start = pipe.text_encoder.get_input_embeddings().weight[photo[0]]
    moved = [(vector - start).abs().max() for vector in learned.values()]
    assert (min(moved) > 0.01
            and len({tuple(vector.tolist()) for vector in learned.values()}) == len(groups))


def test_plain_diffusers_loads_words_and_weights_and_draws_the_same_image(base, tokens):
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    unit = tokens / "models" / "all"
    for path in (unit / "tokens").iterdir():
        pipe.load_textual_inversion(path)
    if (unit / "unet").is_dir():
        pipe.unet = type(pipe.unet).from_pretrained(unit / "unet")
    else:
        pipe.load_lora_weights(unit)
    rows = imagefolder.read_metadata(tokens / "synthetic")
    for row in (rows[0], rows[-1]):
        assert f"<{imagefolder.group_of(row)}>" in row["prompt"]
        image = pipe(row["prompt"], num_inference_steps=2,
                     guidance_scale=float(row["guidance_scale"]),
                     generator=torch.Generator().manual_seed(int(row["seed"]))).images[0]
        drawn = np.asarray(Image.open(tokens / "synthetic" / row["file_name"]), int)
        assert abs(drawn - np.asarray(image, int)).max() <= 1 and drawn.std() > 1


def test_the_words_change_what_is_drawn(base, tokens):
    prompts = [row["prompt"] for row in imagefolder.read_metadata(tokens / "synthetic")]
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    for path in (tokens / "models" / "all" / "tokens").iterdir():
        pipe.load_textual_inversion(path)
    of_one, of_other = (pipe(prompt, num_inference_steps=2, output_type="np",
                             generator=torch.Generator().manual_seed(0)).images
                        for prompt in (next(p for p in prompts if "<y0-a0>" in p),
                                       next(p for p in prompts if "<y0-a1>" in p)))
    assert abs(of_one - of_other).max() > 0.01


def test_an_edit_begins_from_the_word_of_the_common_group(base, tokens, pseudo, tmp_path):
    run("generate.py", "--base", base, "--clip", base / "clip", "--data", pseudo,
        "--models", tokens / "models", "--images", 1, "--rare", "own", "--edit", "--steps", 2,
        "--keep", 1, "--alpha", 1, "--batch", 1, "--out", tmp_path / "s")
    counts = imagefolder.group_counts(imagefolder.read_metadata(pseudo, "train"))
    for row in imagefolder.read_metadata(tmp_path / "s"):
        common = imagefolder.group_name(
            row["y"], imagefolder.correlated_attribute(counts, row["y"]))
        assert (f"<{imagefolder.group_of(row)}>" in row["prompt"]
                and f"<{common}>" in row["edited_prompt"])


def test_learned_words_belong_to_one_model_for_the_dataset(base, pseudo, tmp_path):
    args = ("finetune.py", "--base", base, "--data", pseudo, "--learn-identifiers",
            "--out", tmp_path / "out")
    run(*args, "--method", "lora", fails="a group has a model of its own (use --per dataset)")
    run(*args, "--method", "dreambooth", "--per", "dataset", "--train-text-encoder",
        fails="trains words, not the text encoder")


def test_groups_whose_words_are_alike_are_drawn_as_one(
        base, pseudo, tokens, unlabelled, embeddings, tmp_path):
    """All words have a cosine above -1, none above 0.99999; models are not trained again for
    another threshold."""
    shutil.copytree(tokens / "models", tmp_path / "models")
    method = files.read_json(tmp_path / "models" / "config.json")["arguments"]["method"]
    train = ("finetune.py", "--method", method, "--per", "dataset", "--learn-identifiers",
             "--base", base, "--data", pseudo, "--balance", 1, "--steps", 3, "--batch", 8,
             "--learning-rate", 1e-3, "--identifier-rate", 0.1, "--out", tmp_path / "models")
    assert "loss" not in run(*train, "--merge-above", 0.99999)
    assert files.read_json(tmp_path / "models" / "config.json")["merged"] == []
    assert "loss" not in run(*train, "--merge-above", -1)
    assert files.read_json(tmp_path / "models" / "config.json")["merged"] == [
        [0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0]]
    named = [row | {"text": f"{row['text']}, attribute {row['a']}"}
             for row in files.read_csv(pseudo / "metadata.csv")]
    shutil.copytree(pseudo, tmp_path / "named", symlinks=True)
    files.write_csv(tmp_path / "named" / "metadata.csv", named)
    run(*train[:-1], tmp_path / "of_named", "--data", tmp_path / "named", "--merge-above", -1)
    assert files.read_json(tmp_path / "of_named" / "config.json")["merged"] == []  # other captions
    run("generate.py", "--base", base, "--clip", base / "clip", "--data", pseudo,
        "--models", tmp_path / "models", "--images", 8, "--rare", "own", "--steps", 2,
        "--embeddings", embeddings, "--batch", 8, "--out", tmp_path / "synthetic")
    rows = imagefolder.read_metadata(tmp_path / "synthetic")
    assert imagefolder.group_counts(rows) == {"y0-a0": 8, "y1-a0": 8}
    sizes = imagefolder.group_counts(imagefolder.read_metadata(pseudo, "train"))
    drawn = {unit: sum(row["unit"] == unit for row in rows) for unit in ("y0-a0-c0", "y0-a0-c1")}
    assert (drawn["y0-a0-c0"] == round(8 * sizes["y0-a0"] / (sizes["y0-a0"] + sizes["y0-a1"]))
            and sum(drawn.values()) == 8)
    assert {row["prompt"] for row in rows if row["unit"] == "y0-a0-c1"} == {
        "a photo of an even digit <y0-a1>"}
    run("evaluation/images.py", "--data", unlabelled, "--embeddings", embeddings,
        "--clip", base / "clip", "--synthetic", tmp_path / "synthetic",
        "--out", tmp_path / "images")
    measured = [row for row in files.read_csv(tmp_path / "images" / "groups.csv")
                if row["method"] == "synthetic"]
    assert [row["group"] for row in measured] == ["y0-a0", "y1-a0"]


def test_a_share_of_each_units_images_is_a_balanced_val_set(tokens):
    rows = imagefolder.read_metadata(tokens / "synthetic")
    assert set(imagefolder.group_counts(
        row for row in rows if row["split"] == "val").values()) == {2}
    assert set(imagefolder.group_counts(
        row for row in rows if row["split"] == "train").values()) == {6}
    for count, share in ((8, 0.25), (5, 0.0), (7, 0.5), (3, 0.9)):
        assert splits(count, share).count("val") == int(count * share)


def test_image_measures_compare_pseudo_groups_with_pseudo_groups_whatever_the_labels(
        base, dataset, unlabelled, embeddings, tokens, tmp_path):
    for name, data in (
            ("known", with_attributes(dataset, tmp_path / "data", lambda row: 1 - row["a"])),
            ("unknown", unlabelled)):
        run("evaluation/images.py", "--data", data, "--embeddings", embeddings,
            "--clip", base / "clip", "--synthetic", tokens / "synthetic", "--out", tmp_path / name)
    known, unknown = ([row for row in files.read_csv(tmp_path / name / "groups.csv", "")
                       if row["method"] == "synthetic"] for name in ("known", "unknown"))
    assert known == unknown and len(known) == 4 and all(float(row["kid"]) > 0 for row in known)
    assert files.read_csv(tmp_path / "known" / "synthetic.csv", "")[1]["clip_attribute"] == ""


# ----------------------------------------------------------------------------------- the classifier


@pytest.mark.parametrize("recipe", ("erm", "groupdro", "dfr", "sage"))
def test_with_pseudo_groups_the_true_ones_of_train_and_val_change_nothing(
        recipe, dataset, unlabelled, pseudo, tokens, tmp_path):
    if "lora" not in str(tokens) and recipe != "sage":
        pytest.skip("uses no synthetic images")
    more = ("--synthetic", tokens / "synthetic", "--val", "synthetic") if recipe == "sage" else ()
    for name, data in (
            ("known", with_attributes(dataset, tmp_path / "data", lambda row: row["a"])),
            ("unknown", unlabelled)):
        run("train_classifier.py", "--recipe", recipe, "--groups", pseudo, "--data", data, *more,
            *QUICK, "--out", tmp_path / name)
    known, unknown = ([row["p1"] for row in files.read_csv(
        tmp_path / name / "seed0" / "predictions.csv", "")] for name in ("known", "unknown"))
    assert known == unknown
    assert files.read_json(tmp_path / "known" / "config.json")["group_labels"].startswith(
        "none (pseudo-groups: ")


def test_predictions_carry_the_attribute_of_the_data(dataset, pseudo, tmp_path):
    data = with_attributes(dataset, tmp_path / "data", lambda row: row["a"])
    run("train_classifier.py", "--recipe", "erm", "--groups", pseudo, "--data", data, *QUICK,
        "--out", tmp_path / "out")
    rows = files.read_csv(tmp_path / "out" / "seed0" / "predictions.csv", "")
    truth = {row["file_name"]: row["a"] for row in imagefolder.read_metadata(dataset)}
    assert all(int(row["a"]) == truth[row["file_name"]] for row in rows)


def test_without_groups_each_class_is_one(dataset, tmp_path):
    run("train_classifier.py", "--recipe", "erm", "--groups", "none", "--data", dataset, *QUICK,
        "--out", tmp_path / "out")
    log = files.read_csv(tmp_path / "out" / "seed0" / "log.csv", "")
    assert {name for name in log[0] if name.startswith("val_y")} == {"val_y0-a0", "val_y1-a0"}


def test_results_over_seeds_need_no_attribute_labels(unlabelled, tmp_path):
    """Measures that compare attributes are empty, not an error."""
    run("train_classifier.py", "--recipe", "erm", "--groups", "none", "--data", unlabelled,
        "--seeds", 0, 1, "--epochs", 1, "--out", tmp_path / "erm")
    text = run("evaluate.py", "--data", unlabelled, "--classifiers", tmp_path / "erm",
               "--references", "erm", "--out", tmp_path / "results")
    assert "mean ± std over 2 seeds" in text and "nan" not in text


@pytest.mark.parametrize("recipe, groups, val, expected", (
    ("erm", "none", "real", "none (worst class: val for selection)"),
    ("jtt", "pseudo", "real", "none (pseudo-groups: val for selection)"),
    ("groupdro", "pseudo", "real", "none (pseudo-groups: train, val for selection)"),
    ("sage", "pseudo", "synthetic", "none (pseudo-groups: train, synthetic val for training)")))
def test_a_recipe_says_that_it_uses_no_labels(recipe, groups, val, expected, tmp_path):
    files.write_json(tmp_path / "config.json", {"arguments": {"models": "m"}})
    assert group_labels(recipe, tmp_path if recipe == "sage" else None, groups, val) == expected


def test_groups_that_do_not_fit_are_refused(dataset, pseudo, vanilla, tokens, tmp_path):
    args = ("train_classifier.py", "--data", dataset, *QUICK, "--out", tmp_path / "out")
    run(*args, "--recipe", "two-stage", "--synthetic", vanilla, "--groups", pseudo,
        fails="was drawn for the groups of")
    run(*args, "--recipe", "erm", "--val", "synthetic", fails="erm uses no synthetic images")
    run(*args, "--recipe", "sage", "--synthetic", vanilla, "--val", "synthetic",
        fails="has no images of split val")
    other = make_dataset(tmp_path / "other", counts={(0, 0): 2, (1, 0): 2}, splits=("train",))
    run(*args, "--recipe", "erm", "--groups", other, fails="does not contain")


# --------------------------------------------------------------------------------- the failure page


def test_a_group_is_compared_with_the_rest_of_its_class_exactly():
    correct, inside = np.array([True] * 90 + [False] * 10), np.arange(100) >= 80
    accuracy, rest, p = compared(correct, inside)  # 10 of 20 inside, 80 of 80 outside
    assert (accuracy, rest) == (0.5, 1.0) and p < 1e-6
    assert compared(correct, ~inside)[2] == pytest.approx(1)
    embeddings = np.eye(3)[[0, 0, 1, 1]]
    assert found_more(
        embeddings, np.array([True, True, False, False]), np.eye(3)).tolist() == [2, -2, 0]


def test_the_page_finds_the_shortcut_and_names_it(base, dataset, unlabelled, embeddings, tmp_path):
    """A classifier that sees nothing but the background."""
    rows = [row for row in imagefolder.read_metadata(dataset)]
    table = [{"file_name": row["file_name"], "prediction": row["a"]} for row in rows]
    files.write_csv(tmp_path / "predictions.csv", table)
    args = ("evaluation/failures.py", "--data", unlabelled, "--embeddings", embeddings,
            "--clip", base / "clip", "--k", 2, "--min-size", 3,
            "--words", "on a red background", "on a green background", "<script>",
            "--out", tmp_path / "out")
    text = run(*args, "--predictions", tmp_path / "predictions.csv")
    assert "it fails on 2 of 4 pseudo-groups" in text
    groups = files.read_csv(tmp_path / "out" / "groups.csv", "")
    assert [float(group["accuracy"]) for group in groups] == [0, 0, 1, 1]
    named = {group["class"]: group["words"].split(" (")[0] for group in groups[:2]}
    assert named == {"0": "on a green background", "1": "on a red background"}
    page = (tmp_path / "out" / "failures.html").read_text()
    assert ("<script" not in page and "&lt;script&gt;" in page
            and not re.search('(src|href)=(?!"data:)', page))
    assert ("even digit, cluster" in page and '&#39;RECIPES=erm-free dfr-free' in page
            and "PREDICTIONS=" in page)
    (tmp_path / "predictions.csv").write_text("file_name,prediction\nx.png,1\n")
    run(*args, "--predictions", tmp_path / "predictions.csv", fails="names no image of")
    run(*args, fails="one of them is needed")


def test_a_network_of_torchvision_is_enough(base, unlabelled, embeddings, tmp_path):
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=2)
    save_file(network.state_dict(), tmp_path / "resnet18.safetensors")
    args = ("evaluation/failures.py", "--data", unlabelled, "--embeddings", embeddings,
            "--clip", base / "clip", "--arch", "resnet18", "--resolution", 32, "--k", 2,
            "--min-size", 3, "--out", tmp_path / "out", "--weights")
    text = run(*args, tmp_path / "resnet18.safetensors")
    tested = [row for row in imagefolder.read_metadata(unlabelled) if row["split"] != "train"]
    assert f"{len(tested)} images, accuracy " in text
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    run(*args, tmp_path / "broken.safetensors", fails="cannot be loaded")


# ---------------------------------------------------------------------------------------- with make


def test_a_folder_without_attribute_labels_is_known_by_its_header_or_its_folders(tmp_path):
    house = new_house(tmp_path / "house")

    def runs(recipe, folder, *more):
        text = make(house, "-n", "DATASET=folder", f"ROOT={folder}", *more)
        assert f"--out runs/folder-natural/classifiers/{recipe}\n" in text, (recipe, folder)

    table = tmp_path / "images"
    table.mkdir()
    for header, recipe in (("file_name,y", "sage"), ("file_name,y,area", "sage"),
                           ("file_name,y,a\r", "clustered"), ('file_name,"a",y', "clustered"),
                           ("file_name;a;y", "clustered"), ("file_name\ty\ta", "clustered")):
        (table / "metadata.csv").write_text(f"{header}\n")
        runs(recipe, table)
    (table / "metadata.csv").write_bytes("file_name\ta\ty\n".encode("utf-16"))
    runs("clustered", table)
    (table / "metadata.csv").write_text("file_name,y,gender,age\n")
    runs("clustered", table, "PREPARE=--a gender age")
    assert "--recipe sage" in make(house, "-n", "DATASET=hub", "ROOT=x/y", "LABELLED=")
    assert '--clip "base/miniature/clip"' in make(
        house, "-n", "DATASET=folder", f"ROOT={table}", "BASE=base/miniature")
    for name, recipe in (("cat", "sage"), ("cat/grass", "clustered"), ("train/cat", "sage"),
                         ("train/cat/grass", "clustered")):
        folder = tmp_path / name.replace("/", "-")
        (folder / name).mkdir(parents=True)
        (folder / name / "1.png").touch()
        (folder / ".git" / "objects" / "ab").mkdir(parents=True)
        (folder / ".git" / "objects" / "ab" / "cd").touch()
        runs(recipe, folder)


@slow
def test_make_runs_class_folders_without_attributes_and_the_cure_that_the_page_names(tmp_path):
    house, data = new_house(tmp_path / "house"), make_dataset(tmp_path / "images", counts=BIASED)
    root, table = tmp_path / "my shapes", []
    for row in imagefolder.read_metadata(data):
        path = root / row["split"] / ("box", "bar")[row["y"]] / Path(row["file_name"]).name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data / row["file_name"], path)
        # sees nothing but the background
        table.append({"path": path, "prediction": ("box", "bar")[row["a"]]})
    files.write_csv(tmp_path / "mine.csv", table)
    args = ("DATASET=folder", f"ROOT={root}", "BASE=base/miniature", "SEEDS=0 1",
            "CLIP=base/miniature/clip", "IMAGES=4", "EPOCHS=1", "CLUSTER=--min-size 3",
            "LORA=--steps 1", "TOKENS=", "CLASSIFIER=", "DREAMBOOTH=--steps 1",
            "COMPOSITIONAL=--steps 1", "GENERATE=--steps 2 --batch 4 --keep 1 --alpha 1")
    text = make(house, *args)
    assert ("| sage |" in text and "| clustered-free |" in text and "| erm-free |" in text
            and "each class is one group" in text)
    assert "--predictions runs/folder-natural/classifiers/erm-free " in make(
        house, *args, "-n", "failures"), "without predictions of one's own"
    own = (f"PREDICTIONS={tmp_path / 'mine.csv'}", "COLUMNS=--image path")
    text = make(house, *args, "failures", *own, "FAILURES=--k 2 --min-size 3")
    assert "it fails on 2 of 4 pseudo-groups" in text
    copy, command = text.splitlines()[-1].split(" && ")
    assert copy == "cp runs/folder-natural/failures/pseudo-groups.csv ."
    shutil.copy(house / copy.split()[1], house)
    mine = [word for word in shlex.split(command)[1:] if not word.startswith("ROOT=")]
    text = make(house, *args, *mine)
    assert "| mine | 0.000 | [0.000" in text and "| clustered-free |" in text, (
        "of the pseudo-groups that it fails on")
