"""generate.py: a group-balanced, filtered synthetic set."""

import json
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import files_of, make_dataset, run, slow, start, together
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from common import files, imagefolder
from generate import share_out


@pytest.fixture(scope="module")
def command(base, dataset):
    """Without a filter, as the fixture vanilla is drawn."""
    return ("generate.py", "--base", base, "--clip", base / "clip", "--data", dataset,
            "--batch", 4, "--steps", 2, "--keep", 1, "--alpha", 1)


@pytest.fixture(scope="module")
def filtering(command, embeddings):
    """With the paper's filter."""
    return (*command[:-4], "--embeddings", embeddings)


@pytest.fixture(scope="module")
def filtered(filtering, tmp_path_factory):
    """6 images a group, the best of 8 drawn."""
    out = tmp_path_factory.mktemp("synthetic") / "filtered"
    run(*filtering, "--images", 6, "--out", out)
    return out


def candidates(folder):
    """The rows of a unit's candidates.csv, or of an unfinished unit's tables."""
    rows = [row for path in sorted(folder.glob("candidates*.csv")) for row in files.read_csv(path)]
    return [(int(row["index"]), float(row["clip_score"]), row["fault"]) for row in rows]


def picked(out, unit):
    """The indices of a unit's selected images, as metadata.csv lists them."""
    return [int(row["file_name"].split("/")[1].removesuffix(".png"))
            for row in imagefolder.read_metadata(out) if row["unit"] == unit]


def scores_by_hand(base, dataset, folder, group, alpha, class_text):
    """alpha * cos(image, prompt of the class)
    + (1 - alpha) * cos(image, mean of the group's real images),
    with transformers alone; of all images of a folder.
    """
    clip, processor = (CLIPModel.from_pretrained(base / "clip"),
                       CLIPProcessor.from_pretrained(base / "clip"))

    def of_images(paths):
        pixels = processor(images=[Image.open(path) for path in paths],
                           return_tensors="pt")["pixel_values"]
        return F.normalize(clip.visual_projection(clip.vision_model(pixels).pooler_output), dim=1)

    with torch.no_grad():
        tokens = processor(text=class_text, padding="max_length", return_tensors="pt")
        texts = F.normalize(clip.text_projection(clip.text_model(**tokens).pooler_output), dim=1)
        real = [dataset / row["file_name"] for row in imagefolder.read_metadata(dataset, "train")
                if imagefolder.group_of(row) == group]
        drawn = of_images(sorted(folder.glob("*.png")))
        scores = alpha * drawn @ F.normalize(texts.mean(0), dim=0)
        return (scores + (1 - alpha) * drawn @ F.normalize(of_images(real).mean(0), dim=0)
                if alpha < 1 else scores)


def test_shares_sum_up_and_follow_the_weights():
    assert share_out(10, [30, 10, 10]) == [6, 2, 2]
    assert share_out(7, [1, 1, 1]) == [3, 2, 2]
    assert share_out(1, [5, 100]) == [0, 1]


def test_every_group_has_as_many_images_in_the_one_format(vanilla):
    rows = imagefolder.read_metadata(vanilla)
    assert (set(imagefolder.group_counts(rows).values()) == {5}
            and {row["split"] for row in rows} == {"train"})
    assert len({row["seed"] for row in rows}) == 20
    assert set(rows[0]) - set(imagefolder.REQUIRED) == {
        "unit", "clip_score", "seed", "prompt", "negative_prompt", "guidance_scale"}
    assert all((vanilla / f"{group}.png").is_file() for group in imagefolder.group_counts(rows))


def test_more_images_keep_the_first_and_fewer_are_a_part(command, vanilla, tmp_path):
    shutil.copytree(vanilla, tmp_path / "v")
    run(*command, "--images", 9, "--out", tmp_path / "v")
    more = {row["file_name"]: row for row in imagefolder.read_metadata(tmp_path / "v")}
    assert (all(more[row["file_name"]] == row for row in imagefolder.read_metadata(vanilla))
            and len(more) == 36)
    run(*command, "--images", 5, "--out", tmp_path / "v")
    assert (tmp_path / "v" / "metadata.csv").read_bytes() == (vanilla / "metadata.csv").read_bytes()


def test_images_of_a_batch_are_those_drawn_one_at_a_time(command, vanilla, tmp_path):
    alone = list(command)
    alone[alone.index("--batch") + 1] = 1
    run(*alone, "--images", 5, "--out", tmp_path / "v")
    for row in imagefolder.read_metadata(vanilla):
        one, other = (np.asarray(Image.open(folder / row["file_name"]), int)
                      for folder in (tmp_path / "v", vanilla))
        assert abs(one - other).max() <= 1 and other.std() > 1


@pytest.mark.parametrize("alpha", (0.5, 0.2, 1))
def test_the_clip_score_is_that_of_the_paper(base, dataset, filtering, alpha, tmp_path):
    """Without a column class_text, the prompt of a class is the mean of its groups'."""
    run(*filtering, "--images", 3, "--alpha", alpha, "--out", tmp_path / "v")
    for group in ("y0-a1", "y1-a1"):
        texts = [f"a photo of an {('even', 'odd')[int(group[1])]} digit on a {a} background"
                 for a in ("red", "green")]
        expected = scores_by_hand(base, dataset, tmp_path / "v" / group, group, alpha, texts)
        assert [score for _, score, _ in candidates(tmp_path / "v" / group)] == pytest.approx(
            expected.tolist(), abs=2e-4)


def test_the_score_compares_with_the_prompt_of_the_class_where_the_data_have_one(
        base, dataset, command, filtering, tmp_path):
    data = shutil.copytree(dataset, tmp_path / "data")
    rows = [dict(row, class_text=f"a photo of an {('even', 'odd')[row['y']]} digit")
            for row in imagefolder.read_metadata(data)]
    files.write_csv(data / "metadata.csv", rows)
    args = (*filtering[:6], data, *filtering[7:], "--images", 3, "--out", tmp_path / "v")
    run(*args)
    expected = scores_by_hand(base, data, tmp_path / "v" / "y1-a0", "y1-a0", 0.5,
                              ["a photo of an odd digit"])
    assert [score for _, score, _ in candidates(tmp_path / "v" / "y1-a0")] == pytest.approx(
        expected.tolist(), abs=2e-4)
    before = (tmp_path / "v" / "y1-a0" / "00000.png").stat().st_mtime_ns
    assert "drawn" not in run(*args)
    files.write_csv(data / "metadata.csv",
                    [dict(row, class_text="a photo of a digit") for row in rows])
    run(*args)
    assert (tmp_path / "v" / "y1-a0" / "00000.png").stat().st_mtime_ns != before


def test_exactly_the_best_three_quarters_of_the_images_drawn_are_selected_and_all_stay_on_disk(
        filtered):
    counts = json.loads((filtered / "config.json").read_text())["counts"]
    assert len(imagefolder.read_metadata(filtered)) == 24
    for unit in ("y0-a0", "y0-a1", "y1-a0", "y1-a1"):
        drawn = candidates(filtered / unit)
        assert [index for index, _, fault in drawn if not fault] == list(range(8)) == [
            int(path.stem) for path in sorted((filtered / unit).glob("*.png"))]
        best = sorted(drawn, key=lambda row: -row[1])[:6]
        assert picked(filtered, unit) == sorted(index for index, _, _ in best)
        assert min(score for _, score, _ in best) > max(row[1] for row in drawn if row not in best)
        assert counts[unit] == {"kept": 6, "clip": 2, "blank": 0, "nan": 0}
    assert any(picked(filtered, unit) != list(range(6)) for unit in counts)


def test_images_that_only_complete_a_batch_do_not_compete(filtering, tmp_path):
    run(*filtering, "--images", 5, "--keep", 0.8, "--out", tmp_path / "v")  # 7 of 8
    for unit in ("y0-a0", "y0-a1", "y1-a0", "y1-a1"):
        drawn = candidates(tmp_path / "v" / unit)
        assert len(drawn) == 8 and picked(tmp_path / "v", unit) == sorted(
            index for index, _, _ in sorted(drawn[:7], key=lambda row: -row[1])[:5])
    counts = json.loads((tmp_path / "v" / "config.json").read_text())["counts"]
    assert set(map(json.dumps, counts.values())) == {
        json.dumps({"kept": 5, "clip": 2, "blank": 0, "nan": 0})}


def test_without_a_group_mean_no_embeddings_are_needed(command, tmp_path):
    args = (*command[:-4], "--images", 3, "--out", tmp_path / "v")
    run(*args, fails="--embeddings: the CLIP score needs the embeddings of the real images "
                     "(run data/embed.py, or use --alpha 1)")
    run(*args, "--alpha", 0.99, fails="--embeddings")
    run(*args, "--alpha", 1)
    assert len(imagefolder.read_metadata(tmp_path / "v")) == 12


def test_a_group_without_real_images_is_scored_by_its_class_alone(base, command, tmp_path):
    data = make_dataset(tmp_path / "data", counts={(0, 0): 4, (1, 0): 0, (1, 1): 4})
    run("data/embed.py", "--data", data, "--clip", base / "clip", "--out", tmp_path / "e")
    run(*command[:5], "--data", data, *command[7:-4], "--embeddings", tmp_path / "e",
        "--images", 3, "--out", tmp_path / "v")
    for group, alpha in (("y1-a0", 1), ("y1-a1", 0.5)):
        texts = [f"a photo of an odd digit on a {a} background" for a in ("red", "green")]
        expected = scores_by_hand(base, data, tmp_path / "v" / group, group, alpha, texts)
        assert [score for _, score, _ in candidates(tmp_path / "v" / group)] == pytest.approx(
            expected.tolist(), abs=2e-4)


def test_without_a_filter_the_first_images_drawn_are_selected(
        filtering, vanilla, filtered, tmp_path):
    run(*filtering, "--images", 5, "--keep", 1, "--out", tmp_path / "v")
    for unit in ("y0-a0", "y0-a1", "y1-a0", "y1-a1"):
        assert picked(tmp_path / "v", unit) == list(range(5)) == picked(vanilla, unit)
        for index in range(5):
            assert len({(out / unit / f"{index:05}.png").read_bytes()
                        for out in (tmp_path / "v", vanilla, filtered)}) == 1
    counts = json.loads((tmp_path / "v" / "config.json").read_text())["counts"]
    assert all(count == {"kept": 5, "clip": 0, "blank": 0, "nan": 0} for count in counts.values())


def test_a_strict_filter_draws_as_many_as_it_needs(filtering, tmp_path):
    """More than --max-tries per image: the limit is for images that cannot be used."""
    run(*filtering, "--images", 1, "--keep", 0.04, "--batch", 8, "--max-tries", 2,
        "--out", tmp_path / "v")
    for row in imagefolder.read_metadata(tmp_path / "v"):
        drawn = candidates(tmp_path / "v" / row["unit"])
        assert (len(drawn) == 32
                and float(row["clip_score"]) == max(score for _, score, _ in drawn[:25]))


def test_another_share_or_more_images_draw_only_what_is_missing(filtering, filtered, tmp_path):
    shutil.copytree(filtered, tmp_path / "v")

    def times():
        return {path.relative_to(tmp_path / "v"): path.stat().st_mtime_ns
                for path in (tmp_path / "v").glob("y*/0*.png")}

    before = times()
    run(*filtering, "--images", 6, "--keep", 0.9, "--out", tmp_path / "v")
    assert times() == before
    run(*filtering, "--images", 12, "--out", tmp_path / "v")
    after = times()
    assert len(after) == 4 * 16 and before.items() <= after.items()
    assert set(imagefolder.group_counts(imagefolder.read_metadata(tmp_path / "v")).values()) == {12}
    run(*filtering, "--images", 6, "--out", tmp_path / "v")
    assert times() == after and (tmp_path / "v" / "metadata.csv").read_bytes() == (
        filtered / "metadata.csv").read_bytes()


@pytest.mark.parametrize("how", (pytest.param("command", marks=slow), "filtering"))
def test_a_killed_generation_resumes_and_draws_the_same_bytes(how, request, tmp_path):
    args = (*request.getfixturevalue(how), "--images", 12, "--out")
    run(*args, tmp_path / "whole")
    process = start(*args, tmp_path / "cut", stdout=-1, stderr=-1, start_new_session=True)
    while not list(tmp_path.glob("cut/.y0-a1.partial/candidates*.csv")):
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "metadata.csv").exists()
    first = (tmp_path / "cut" / ".y0-a0.partial" / "00000.png").stat().st_mtime_ns
    run(*args, tmp_path / "cut")
    assert (tmp_path / "cut" / "y0-a0" / "00000.png").stat().st_mtime_ns == first
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    assert not list(tmp_path.glob("cut/.y*"))


def test_processes_divide_the_batches_of_all_units_and_draw_the_same_bytes(
        filtering, filtered, tmp_path):
    args = (*filtering, "--images", 6, "--out", tmp_path / "v")
    together(3, *args)
    assert files_of(tmp_path / "v") == files_of(filtered)
    # as if it had been killed after three batches by three processes
    unit = tmp_path / "v" / "y0-a0"
    shutil.copytree(unit, tmp_path / "v" / ".y0-a0.partial")
    shutil.rmtree(unit)
    rows = files.read_csv(tmp_path / "v" / ".y0-a0.partial" / "candidates.csv")
    (tmp_path / "v" / ".y0-a0.partial" / "candidates.csv").unlink()
    files.write_csv(tmp_path / "v" / ".y0-a0.partial" / "candidates-2.csv", rows[4:])
    kept = (tmp_path / "v" / ".y0-a0.partial" / "00004.png").stat().st_mtime_ns
    run(*args)
    assert (unit / "00004.png").stat().st_mtime_ns == kept
    assert files_of(tmp_path / "v") == files_of(filtered)


def test_batch_size_changes_images_by_float_noise_alone(command, vanilla, tmp_path):
    run(*command, "--images", 5, "--batch", 3, "--out", tmp_path / "v")
    for row in imagefolder.read_metadata(vanilla):
        one, other = (np.asarray(Image.open(path / row["file_name"]), int)
                      for path in (vanilla, tmp_path / "v"))
        assert abs(one - other).max() <= 1


def test_blank_images_are_never_selected_and_a_unit_of_them_is_a_one_line_error(
        base, filtering, tmp_path):
    blank = shutil.copytree(base, tmp_path / "blank")
    path = blank / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_out.weight"].zero_()
    save_file(weights, path, metadata={"format": "pt"})
    args = ("generate.py", "--base", blank, *filtering[3:], "--images", 3, "--max-tries", 2,
            "--out", tmp_path / "v")
    run(*args, fails="even digit on a red background (y0-a0): only 0 of 12 images drawn are sound, "
                     "4 wanted (fine-tune")
    assert not (tmp_path / "v" / "metadata.csv").exists()
    work = tmp_path / "v" / ".y0-a0.partial"
    assert {fault for _, _, fault in candidates(work)} == {"blank"} and not list(work.glob("*.png"))


def test_a_group_without_training_images_is_drawn_by_the_models_of_its_class_and_is_reported(
        base, command, tmp_path):
    data = make_dataset(tmp_path / "data", counts={(0, 0): 4, (1, 0): 0, (1, 1): 4})
    run("finetune.py", "--method", "lora", "--base", base, "--data", data, "--steps", 2,
        "--out", tmp_path / "lora")
    text = run(*command[:5], "--data", data, *command[7:], "--models", tmp_path / "lora",
               "--images", 3, "--out", tmp_path / "v")
    assert ("odd digit on a red background (y1-a0): drawn by the models of "
            "odd digit on a green background (y1-a1)") in text
    assert text.count("drawn by") == 1
    assert imagefolder.group_counts(imagefolder.read_metadata(tmp_path / "v")) == {
        "y0-a0": 3, "y1-a0": 3, "y1-a1": 3}
    units = {row["unit"] for row in imagefolder.read_metadata(tmp_path / "v")}
    assert units == {"y0-a0", "y1-a0-by-y1-a1", "y1-a1"}


@pytest.mark.parametrize("flags, transferred", (
    # 3 images; 12 are enough, and the common groups of the classes always have their own
    ((), {"y0-a1"}),
    (("--rare-below", 13), {"y0-a1", "y1-a0"}),
    (("--rare-below", 3), set()),
    (("--rare", "own", "--rare-below", 13), set()),
    (("--rare", "transfer", "--rare-below", 1), {"y0-a1", "y1-a0"}),
    (("--rare", "shared"), {"y0-a0", "y0-a1", "y1-a0", "y1-a1"})))
def test_rare_groups_have_models_of_their_own_if_they_are_large_enough_or_always_or_never(
        base, command, tmp_path, flags, transferred):
    data = make_dataset(tmp_path / "data", counts={(0, 0): 24, (0, 1): 3, (1, 0): 12, (1, 1): 14})
    run("finetune.py", "--method", "lora", "--base", base, "--data", data, "--steps", 1,
        "--out", tmp_path / "lora")
    run(*command[:5], "--data", data, *command[7:], "--models", tmp_path / "lora",
        "--images", 1, *flags, "--out", tmp_path / "v")
    rows = {imagefolder.group_of(row): row for row in imagefolder.read_metadata(tmp_path / "v")}
    assert {group for group, row in rows.items() if row["unit"] != group} == transferred
    assert all(rows[group]["unit"] == f"{group}-by-{group[:2]}-a{group[1]}"
               for group in transferred)
    assert all((row["prompt"] == row["text"]) == (group in transferred)
               for group, row in rows.items())
    if "shared" in flags:  # both groups of a class in the same way
        assert {(row["negative_prompt"], row["guidance_scale"])
                for row in rows.values()} == {("", "2.0")}


def test_a_class_without_training_images_falls_back_to_the_base_and_is_reported(
        base, command, tmp_path):
    data = make_dataset(tmp_path / "data", counts={(0, 0): 4, (0, 1): 2, (1, 1): 0})
    run("finetune.py", "--method", "lora", "--base", base, "--data", data, "--steps", 1, "--out",
        tmp_path / "lora")
    text = run(*command[:5], "--data", data, *command[7:], "--models", tmp_path / "lora",
               "--images", 1, "--out", tmp_path / "v")
    assert ("odd digit on a green background (y1-a1): no training images, "
            "drawn by the base model") in text
    row = imagefolder.read_metadata(tmp_path / "v")[-1]
    assert (row["unit"], row["prompt"], row["negative_prompt"]) == ("y1-a1", row["text"], "")


def test_rare_groups_are_drawn_by_each_cluster_of_the_aligned_group(
        base, dataset, embeddings, command, tmp_path):
    """In proportion to the clusters' sizes, without their identifier,
    away from the words that only that group has.
    """
    run("cluster.py", "--data", dataset, "--embeddings", embeddings, "--k", 2,
        "--out", tmp_path / "c")
    run("finetune.py", "--method", "lora", "--per", "cluster", "--base", base,
        "--data", tmp_path / "c", "--steps", 1, "--out", tmp_path / "lora")
    clusters = {(imagefolder.group_of(row), row["cluster"])
                for row in imagefolder.read_metadata(tmp_path / "c")}
    assert {("y0-a0", "0"), ("y0-a0", "1")} <= clusters
    run(*command, "--models", tmp_path / "lora", "--images", 6, "--guidance-scale", 1.5,
        "--rare-guidance", 3, "--out", tmp_path / "v")
    rows = imagefolder.read_metadata(tmp_path / "v")
    assert set(imagefolder.group_counts(rows).values()) == {6}
    by_group = {group: [row for row in rows if imagefolder.group_of(row) == group]
                for group in imagefolder.group_counts(rows)}
    assert {row["unit"] for row in by_group["y0-a1"]} == {"y0-a1-by-y0-a0-c0", "y0-a1-by-y0-a0-c1"}
    assert Counter(row["unit"].split("-by-")[1] for row in by_group["y0-a1"]) == Counter(
        row["unit"] for row in by_group["y0-a0"])
    assert {(row["prompt"], row["negative_prompt"], row["guidance_scale"])
            for row in by_group["y0-a1"]} == {
                ("a photo of an even digit on a green background", "red", "3.0")}
    assert {(row["prompt"], row["negative_prompt"], row["guidance_scale"])
            for row in by_group["y1-a1"]} == {
                ("a photo of an odd digit on a green background sks", "", "1.5")}


def test_an_image_can_be_drawn_again_from_its_row_in_plain_diffusers(
        base, dataset, command, tmp_path):
    """metadata.csv has prompts, guidance scale and seed, config.json steps and base."""
    run("finetune.py", "--method", "lora", "--base", base, "--data", dataset, "--steps", 2,
        "--learning-rate", 0.1, "--out", tmp_path / "lora")
    run(*command, "--models", tmp_path / "lora", "--images", 1, "--guidance-scale", 1.5,
        "--rare-guidance", 3, "--out", tmp_path / "v")
    transferred, own = imagefolder.read_metadata(tmp_path / "v")[-2:]
    assert ((transferred["unit"], own["unit"]) == ("y1-a0-by-y1-a1", "y1-a1")
            and own["prompt"] == f"{own['text']} sks")
    assert (transferred["prompt"] == transferred["text"]
            and transferred["negative_prompt"] == "green")
    settings = files.read_json(tmp_path / "v" / "config.json")["arguments"]
    pipe = StableDiffusionPipeline.from_pretrained(settings["base"])
    pipe.load_lora_weights(Path(settings["models"]) / "y1-a1")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="dpmsolver++")
    for row in (transferred, own):
        drawn = np.asarray(Image.open(tmp_path / "v" / row["file_name"]), int)
        image, other = (pipe(row["prompt"], negative_prompt=negative,
                             num_inference_steps=settings["steps"],
                             guidance_scale=float(row["guidance_scale"]),
                             generator=torch.Generator().manual_seed(int(row["seed"]))).images[0]
                        for negative in (row["negative_prompt"], "blue"))
        assert abs(drawn - np.asarray(image, int)).max() <= 1 < drawn.std()
        assert abs(drawn - np.asarray(other, int)).max() > 1  # the negative prompt counts


def test_a_lost_or_edited_image_is_drawn_again(command, vanilla, tmp_path):
    shutil.copytree(vanilla, tmp_path / "v")
    (tmp_path / "v" / "y0-a0" / "00002.png").unlink()
    (tmp_path / "v" / "y1-a1" / "00000.png").write_bytes(b"edited")
    (tmp_path / "v" / "y1-a0" / "candidates.csv").unlink()
    run(*command, "--images", 5, "--out", tmp_path / "v")
    assert files_of(tmp_path / "v") == files_of(vanilla)


def test_weights_of_another_base_or_changed_since_are_refused(base, dataset, command, tmp_path):
    run("finetune.py", "--method", "lora", "--base", base, "--data", dataset, "--steps", 1, "--out",
        tmp_path / "lora")
    other = shutil.copytree(base, tmp_path / "other")
    files.write_json(other / "scheduler" / "scheduler_config.json",
                     files.read_json(other / "scheduler" / "scheduler_config.json")
                     | {"beta_end": 0.013})
    args = ("--models", tmp_path / "lora", "--images", 1, "--out", tmp_path / "v")
    run("generate.py", "--base", other, *command[3:], *args,
        fails="was fine-tuned from another base model than --base")
    shutil.rmtree(tmp_path / "lora" / "y0-a0")
    run(*command, *args, fails="y0-a0: the unit was removed or changed since fine-tuning "
                               "(run finetune.py again)")
    assert not (tmp_path / "v" / "metadata.csv").exists()


def test_an_output_or_input_in_use_by_another_process_is_refused(base, dataset, command, tmp_path):
    """The kernel releases a lock when its process ends, however it ends."""
    args = ("--images", 400, "--out", tmp_path / "v")
    process = start(*command, *args, stdout=-1, stderr=-1)
    while not list(tmp_path.glob("v/.y0-a0.partial/*.png")):
        assert process.poll() is None
        time.sleep(0.01)
    run(*command, *args, fails="v: is in use by another process "
                               "(wait for it to finish, or stop it)")
    run("train_classifier.py", "--recipe", "two-stage", "--data", dataset,
        "--synthetic", vanilla_of(tmp_path), "--out", tmp_path / "c",
        fails="v: is in use by another process")
    with pytest.raises(AssertionError, match="v: is in use by another process"):
        together(2, *command, *args)
    process.kill()
    process.wait()
    run(*command, "--images", 1, "--out", tmp_path / "v")


def vanilla_of(path):
    """A folder that looks complete while another process writes it."""
    row = {"file_name": "y0-a0/x.png", "split": "train", "y": 0, "a": 0, "text": "x"}
    (path / "v" / "y0-a0").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(path / "v" / "y0-a0" / "x.png")
    files.write_csv(path / "v" / "metadata.csv", [row])
    return path / "v"


def test_a_unit_without_a_share_is_not_drawn(base, dataset, embeddings, command, tmp_path):
    run("cluster.py", "--data", dataset, "--embeddings", embeddings, "--k", 5,
        "--min-size", 2, "--out", tmp_path / "c")
    run("finetune.py", "--method", "lora", "--per", "cluster", "--base", base,
        "--data", tmp_path / "c", "--steps", 1, "--out", tmp_path / "lora")
    args = (*command, "--models", tmp_path / "lora", "--images", 2, "--out", tmp_path / "v")
    assert "images drawn" in run(*args)
    assert "images drawn" not in run(*args) and len(imagefolder.read_metadata(tmp_path / "v")) == 8


def test_invalid_input_is_a_one_line_error(command, tmp_path):
    run(*command, "--models", tmp_path, "--out", tmp_path / "v", fails="config.json: not found")
    run(*command, "--drop-weights", "--out", tmp_path / "v",
        fails="--drop-weights: the base model draws")
    assert not (tmp_path / "v" / "metadata.csv").exists()


def test_cards_are_what_the_hub_reads(base, dataset, vanilla, tmp_path):
    from huggingface_hub import DatasetCard, ModelCard

    card = DatasetCard.load(vanilla / "README.md")
    assert (card.data.task_categories == ["image-classification"]
            and "20 synthetic images in 4 groups" in card.text)
    assert "| even digit on a red background (y0-a0) | 5 |" in card.text
    for method, load in (("lora", "load_lora_weights"), ("dreambooth", 'subfolder="unet"')):
        run("finetune.py", "--method", method, "--base", base, "--data", dataset, "--steps", 1,
            "--out", tmp_path / method)
        card = ModelCard.load(tmp_path / method / "y1-a0" / "README.md")
        assert (card.data.base_model == str(base) and card.data.library_name == "diffusers"
                and method in card.data.tags)
        assert card.data.instance_prompt.endswith("sks") and load in card.text
        assert "on 3 images: 1 steps of 1" in " ".join(card.text.split())


def test_edited_images_are_real_ones_of_the_common_group_drawn_anew(command, dataset, tmp_path):
    """Under their own prompt they stay as they are; under the rare group's they change."""
    run(*command, "--images", 2, "--batch", 4, "--edit", "--steps", 20, "--out", tmp_path / "v")
    rows = imagefolder.read_metadata(tmp_path / "v")
    train = {row["file_name"]: row for row in imagefolder.read_metadata(dataset, "train")}
    change = {}
    for row in rows:
        assert imagefolder.group_of(train[row["edited"]]) == f"y{row['y']}-a{row['y']}"
        assert row["guidance_scale"] == "1.0"
        drawn = np.asarray(Image.open(tmp_path / "v" / row["file_name"]), float)
        real = np.asarray(imagefolder.load_image(dataset / row["edited"], 32), float)
        change.setdefault(row["y"] == row["a"], []).append(abs(drawn - real).mean())
    assert max(change[True]) < 20 < 40 < min(change[False]), change
