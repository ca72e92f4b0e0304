"""train_classifier.py: the losses by hand, the stage by its files."""

import contextlib
import csv
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BIASED, ROOT, files_of, make_dataset, run, start
from torch.nn import functional as F

import train_classifier
from common import files, imagefolder, stage
from classifiers.last_layer import (deep_feature_reweighting, disagreeing, early_stop_disagreement,
                                    tuned)
from classifiers.network import Images, new_classifier, predict, to_input
from common.pixels import Pixels
from train_classifier import RECIPES, Losses, group_labels, supervised_contrastive, takes_synthetic

QUICK = ("--epochs", 2, "--last-layer-epochs", 2, "--batch", 16, "--seeds", 0)


def test_supervised_contrastive_is_equation_2_of_khosla_et_al():
    torch.manual_seed(0)
    features, y, t = F.normalize(torch.randn(7, 5), dim=1), torch.tensor([0, 0, 1, 1, 1, 2, 0]), 0.1
    expected = []
    for i in range(7):
        others = [a for a in range(7) if a != i]
        partners = [p for p in others if y[p] == y[i]]
        total = sum(torch.exp(features[i] @ features[a] / t) for a in others)
        if partners:
            expected.append(-sum(torch.log(torch.exp(features[i] @ features[p] / t) / total)
                                 for p in partners) / len(partners))
    assert torch.allclose(supervised_contrastive(features, y, t), torch.stack(expected).mean(),
                          atol=1e-5)


def test_a_batch_without_partners_has_no_contrastive_loss():
    assert supervised_contrastive(torch.eye(3), torch.tensor([0, 1, 2]), 0.1) == 0


def test_pretraining_weighs_cross_entropy_and_the_contrastive_loss_by_beta():
    torch.manual_seed(0)
    logits, features, y = (torch.randn(6, 2), F.normalize(torch.randn(6, 5), dim=1),
                           torch.tensor([0, 0, 1, 1, 1, 0]))
    parts = torch.stack([F.cross_entropy(logits, y), supervised_contrastive(features, y, 0.1)])
    for beta in (0.0, 0.1, 0.5, 1.0):
        losses = Losses(torch.tensor([0, 1]), 2, beta, temperature=0.1, dro_step=0)
        expected = torch.tensor([beta, 1 - beta]) @ parts
        assert torch.allclose(losses.contrastive(logits, features, y, None), expected)


def test_group_dro_follows_algorithm_1():
    losses = Losses(torch.tensor([0, 1, 2, 2]), 3, 0.5, 0.1, dro_step=0.5)
    logits, y, group = (torch.tensor([[2., 0.], [0., 1.], [0., 0.]]), torch.tensor([0, 0, 1]),
                        torch.tensor([0, 2, 2]))
    each = F.cross_entropy(logits, y, reduction="none")
    means = torch.stack([each[0], torch.tensor(0.), (each[1] + each[2]) / 2])
    weights = torch.full((3,), 1 / 3)
    for _ in range(2):
        weights = weights * torch.exp(0.5 * means)
        weights = weights / weights.sum()
        assert torch.allclose(losses.group_dro(logits, None, y, group), weights @ means)


def test_group_dro_gives_the_numbers_of_spuco():
    """Recorded from GroupWeightedLoss of spuco 2.0.3 (pip), step size 0.1,
    on these three batches.
    """
    losses, given = Losses(torch.tensor([0, 1, 2, 3]), 4, 0.5, 0.1, dro_step=0.1), []
    for step in range(3):
        rng = np.random.default_rng(step)
        logits = torch.tensor(rng.normal(size=(8, 2)), dtype=torch.float32)
        y, group = (torch.tensor(rng.integers(0, high, 8)) for high in (2, 4))
        given.append(losses.group_dro(logits, None, y, group).item())
    assert given == pytest.approx([0.7501942, 0.5709484, 0.6977528], abs=1e-6)
    assert losses.group_weights.tolist() == pytest.approx(
        [0.2351588, 0.2836747, 0.2505705, 0.2305960], abs=1e-6)


def test_a_group_without_training_images_has_no_weight_in_group_dro():
    losses = Losses(torch.tensor([0] * 9 + [2]), 3, 0.5, 0.1, dro_step=1)
    losses.group_dro(torch.zeros(2, 2), None, torch.tensor([0, 1]), torch.tensor([0, 2]))
    assert losses.group_weights[1] == 0 and losses.group_weights.sum() == pytest.approx(1)


def sized_images(groups):
    images = Images.__new__(Images)
    images.rows, images.group = ([f"{groups[0]}:{i}" for i in range(len(groups))],
                                 torch.tensor(groups))
    images.y, images.pixels = images.group.clone(), object.__new__(Pixels)
    images.pixels.size, images.pixels.sources = 1, [
        np.tile(np.arange(len(groups))[:, None, None, None], 3)]
    images.pixels.part, images.pixels.slots = torch.zeros(len(groups)), torch.arange(len(groups))
    return images


def test_rare_groups_are_filled_with_synthetic_images_to_the_size_of_the_largest():
    """And with images of all clusters, which follow one another."""
    real, synthetic = sized_images([0, 0, 0, 0, 1]), sized_images([0, 0, 1, 1, 1, 1, 1, 1, 2, 2])
    filled, mixed = real.joined(synthetic, filled=True), real.joined(synthetic, filled=False)
    assert (filled.group.bincount().tolist() == [4, 4, 2]
            and mixed.group.bincount().tolist() == [6, 7, 2])
    assert (filled.pixels[torch.arange(5, 10)][:, 0, 0, 0].tolist() == [2, 4, 6, 8, 9]
            and len(filled.rows) == len(filled.y) == 10)
    assert len(real) == 5


def test_errors_of_the_first_model_stand_several_times_in_an_epoch_of_jtt():
    images = sized_images([0, 0, 1])
    images.errors = torch.tensor([False, True, False])
    drawn = torch.cat(images.batches("errors upsampled", 4, torch.Generator().manual_seed(0), 6))
    assert drawn.bincount().tolist() == [1, 6, 1]


def test_group_weights_make_every_group_count_alike():
    """Of groups of 3, 1 and 0 images, each that is there has half of the weight."""
    losses = Losses(torch.tensor([0, 0, 0, 1]), 3, 0.5, 0.1, dro_step=0)
    logits, y, group = torch.randn(4, 2), torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 0, 1])
    each = F.cross_entropy(logits, y, reduction="none")
    assert torch.allclose(losses.group_weighted(logits, None, y, group),
                          each[:3].mean() / 2 + each[3] / 2)


def test_the_smallest_group_gives_the_size_of_all_in_subg():
    images = sized_images([0, 0, 0, 0, 0, 2, 2, 3, 3])
    first, second = (
        torch.cat(images.batches("smallest group", 4, torch.Generator().manual_seed(s), seed=0))
        for s in (0, 1))
    assert (images.group[first].bincount().tolist() == [2, 0, 2, 2]
            and set(first.tolist()) == set(second.tolist()))


def test_subg_takes_random_images_of_a_group_not_its_first():
    images = sized_images([0] * 1000 + [1] * 50)
    one, other = (torch.cat(images.batches("smallest group", 64, None, seed=seed)).sort().values
                  for seed in (0, 1))
    assert not torch.equal(one, other)
    assert all(300 < taken[taken < 1000].float().mean() < 700 for taken in (one, other))


@pytest.mark.parametrize("classes", (2, 3))
def test_deep_feature_reweighting_drops_the_feature_that_only_the_training_set_rewards(classes):
    """Two features a class, the class's own and a spurious one, balanced in val:
    the layer learns the first alone.
    """
    rng = torch.Generator().manual_seed(0)
    y, a = torch.randint(classes, (2, 400), generator=rng)
    features = torch.cat([F.one_hot(y, classes), F.one_hot(a, classes)], 1).float()
    features += torch.randn(features.shape, generator=rng) / 4
    model = torch.nn.Module()
    model.last_layer = torch.nn.Linear(2 * classes, classes)
    val = SimpleNamespace(y=y, group=y * classes + a)
    assert deep_feature_reweighting(model, val, features, 0) > 0.9
    weight = model.last_layer.weight.abs()
    assert weight[:, :classes].diagonal().min() > 5 * weight[:, classes:].max()


@pytest.mark.parametrize("seed, weight, bias", (
    (0, (4.24767, -0.03688, 0.14359), 0.00161),  # of strength 1.0
    (2, (4.10164, -0.01048, 0.11467), 0.0)))     # of strength 0.7
def test_deep_feature_reweighting_gives_the_layer_of_spuco(seed, weight, bias):
    """Recorded from DFR.train_multiple_model of spuco 2.0.3 (pip)
    on the same standardised features.
    """
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    y, a = np.repeat([0, 0, 1, 1], 60), np.tile(np.repeat([0, 1], 60), 2)
    features = np.stack([y + rng.normal(0, 0.35, 240), a + rng.normal(0, 0.35, 240),
                         rng.normal(size=240)], 1)
    scaler, model = StandardScaler().fit(features), torch.nn.Module()
    model.last_layer = torch.nn.Linear(3, 2)
    val = SimpleNamespace(y=torch.tensor(y), group=torch.tensor(2 * y + a))
    deep_feature_reweighting(model, val, torch.tensor(features, dtype=torch.float32), seed)
    ours = (model.last_layer.weight[1] - model.last_layer.weight[0]).detach().numpy()
    assert ours * scaler.scale_ == pytest.approx(weight, abs=1e-3)
    shift = (model.last_layer.bias[1] - model.last_layer.bias[0]).item()
    assert shift + ours @ scaler.mean_ == pytest.approx(bias, abs=1e-3)


def self_inputs(classes):
    """y (200,), features (200, 6), and two last layers (C, 6 + 1),
    the early-stopped model's and the final one's.
    """
    rng = np.random.default_rng(0)
    y, a = rng.integers(0, classes, (2, 200))
    features = (np.eye(classes)[y] @ rng.normal(size=(classes, 6))
                + np.eye(classes)[a] @ rng.normal(size=(classes, 6)))
    features += rng.normal(size=(200, 6)) / 2
    layers = []
    for values in torch.from_numpy(rng.normal(size=(2, classes, 7)).astype(np.float32)):
        layers.append(torch.nn.Linear(6, classes))
        layers[-1].load_state_dict({"weight": values[:, :-1], "bias": values[:, -1]})
    return torch.from_numpy(y), torch.from_numpy(features.astype(np.float32)), *layers


@pytest.mark.parametrize("classes, points, seed, picked, weight, bias", (
    (2, 20, 0, "195 47 157 75 183 191 25 167 64 35 99 18 187 8 153 160 179 94 53 60",
     ((-1.3614658, 0.5559578, 0.4022739, 0.2528242, 0.9266841, 0.5883560),
      (-0.1339454, -0.7746089, -0.3337800, 0.3545240, 0.8434165, 1.0452765)),
     (-0.1365359, 1.2701590)),
    (3, 50, 1, "94 61 84 112 22 142 28 9 31 21 134 108 123 136 83 176 185 139 150 23 103 119 74 97 "
               "101 17 125 138 54 197 172 18 19 140 133 16 80 180 20 153 24 29 130 34 106 43 86 71 "
               "8 158",
     ((0.0807072, -0.5456753, -0.1595623, -1.5128601, 0.6319953, -0.6736302),
      (0.9679407, 1.5975547, -0.8522710, 1.1343775, -0.8509457, -2.1438086),
      (0.9690267, 0.2172024, 0.5220753, 0.0204931, 0.7808569, 0.0047457)),
     (-2.7327652, -0.2739989, -0.5407024))))
def test_self_picks_the_points_and_gives_the_layer_of_its_authors(
        classes, points, seed, picked, weight, bias):
    """Recorded from the authors' code (tmlabonte/last-layer-retraining, 40612d4)
    on the same inputs.

    Their Disagreement datamodule split the 200 points, chose and drew from the chosen; their Model
    gave loss and optimizer. PyTorch Lightning was replaced by a loop, the network by its last
    layer, and the sampler was given the seed.
    """
    y, features, early, final = self_inputs(classes)
    held = np.arange(200)
    np.random.default_rng(seed).shuffle(held)
    held = held[:100]
    with torch.no_grad():
        chosen = held[disagreeing(*(layer(features[held]).softmax(1) for layer in (early, final)),
                                  points)]
    assert chosen.tolist() == [int(index) for index in picked.split()]
    layer = tuned(final, features[chosen], y[chosen], 0.01, 32, 1e-4,
                  torch.Generator().manual_seed(seed))
    assert layer.weight.detach().numpy() == pytest.approx(np.array(weight), abs=1e-5)
    assert layer.bias.tolist() == pytest.approx(bias, abs=1e-5)


def test_self_disagreement_is_the_kl_divergence_of_the_early_from_the_final_model():
    early, final = np.random.default_rng(0).dirichlet((1, 1, 1), (2, 30))
    divergence = (early * np.log(early / final)).sum(1)
    found = disagreeing(torch.from_numpy(early), torch.from_numpy(final), 5)
    assert found.tolist() == np.argsort(-divergence)[:5].tolist()
    assert len(disagreeing(torch.from_numpy(early), torch.from_numpy(final), 500)) == 30
    early, final = torch.tensor([[1.0, 0.0], [0.6, 0.4]]), torch.tensor([[1.0, 0.0], [0.4, 0.6]])
    assert disagreeing(early, final, 1) == 1  # sure of the same class is no disagreement


def test_self_reads_no_group_label_of_the_half_of_val_that_it_trains_on():
    y, features, early, final = self_inputs(2)
    model, weights = torch.nn.Module(), []
    half = np.random.default_rng(stage.seed_of(0, "self")).permutation(200)[:100]
    for groups in (y, y.clone().index_fill(0, torch.from_numpy(half), 3)):
        model.last_layer = final
        history = [layer(features).softmax(1).detach() for layer in (early, final)]
        assert early_stop_disagreement(
            model, SimpleNamespace(y=y, group=groups), features, 0, history, points=[20, 100],
            batch=32, weight_decay=1e-4) > 0.5
        weights.append(model.last_layer.weight)
    assert torch.equal(*weights) and not torch.equal(weights[0], final.weight)


def test_a_class_balanced_epoch_has_every_class_equally_often():
    images = sized_images([0] * 900 + [1] * 100)
    drawn = torch.cat(images.batches("class-balanced", 64, torch.Generator().manual_seed(0)))
    assert len(drawn) == 1000 and 450 < (images.y[drawn] == 1).sum() < 550


@pytest.mark.parametrize("recipe, models, expected", (
    ("erm", None, "val for selection"), ("jtt", None, "val for selection"),
    ("self", None, "val for selection"),
    ("groupdro", None, "train, val for selection"), ("reweight", None, "train, val for selection"),
    ("resample", None, "train, val for selection"), ("subg", None, "train, val for selection"),
    ("dfr", None, "val for training"), ("two-stage", None, "val for selection"),
    ("two-stage", "runs/x/models/lora", "train, val for selection"),
    ("filled", None, "train, val for selection"),
    ("two-stage-dfr", "runs/x/models/lora", "train, val for training")))
def test_a_recipe_states_whose_group_labels_it_uses(recipe, models, expected, tmp_path):
    files.write_json(tmp_path / "config.json", {"arguments": {"models": models}})
    assert group_labels(recipe, tmp_path if takes_synthetic(recipe) else None) == expected


def test_a_filter_that_compares_with_the_means_of_groups_uses_the_training_labels(
        base, dataset, embeddings, vanilla, tmp_path):
    assert group_labels("two-stage", vanilla) == "val for selection"
    run("generate.py", "--base", base, "--clip", base / "clip", "--data", dataset,
        "--embeddings", embeddings, "--images", 1, "--steps", 1, "--batch", 2,
        "--out", tmp_path / "filtered")
    assert group_labels("two-stage", tmp_path / "filtered") == "train, val for selection"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_publishes_weights_predictions_and_log_and_repeats_to_the_byte(
        recipe, dataset, vanilla, tmp_path):
    args = ("train_classifier.py", "--recipe", recipe, "--data", dataset, *QUICK)
    args += ("--synthetic", vanilla) if takes_synthetic(recipe) else ()
    for name in "ab":
        run(*args, "--out", tmp_path / name)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert (files.read_json(tmp_path / "a" / "config.json")["group_labels"]
            .split(", ")[-1].startswith("val for "))
    with open(tmp_path / "a" / "seed0" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    wanted = [row for split in ("val", "test") for row in imagefolder.read_metadata(dataset, split)]
    assert [row["file_name"] for row in rows] == [row["file_name"] for row in wanted]
    for row in rows:
        assert int(row["prediction"]) == (float(row["p1"]) > float(row["p0"]))
        assert abs(float(row["p0"]) + float(row["p1"]) - 1) < 1e-5


def test_dfr_takes_the_networks_of_erm_and_gives_the_same_bytes(dataset, tmp_path):
    args = ("train_classifier.py", "--data", dataset, *QUICK)
    for recipe in ("erm", "dfr"):
        run(*args, "--recipe", recipe, "--out", tmp_path / recipe)
    after = (*args, "--recipe", "dfr", "--erm", tmp_path / "erm", "--out")
    run(*after, tmp_path / "after")
    assert files_of(tmp_path / "after") == files_of(tmp_path / "dfr")
    assert "seed" not in run(*after, tmp_path / "dfr")  # one is as good as the other
    run(*after, tmp_path / "other", "--batch", 8, fails="has no seed 0 of erm with these settings")


def test_pretraining_has_epochs_of_its_own(dataset, vanilla, tmp_path):
    run("train_classifier.py", "--recipe", "ffr", "--data", dataset, "--synthetic", vanilla, *QUICK,
        "--pretrain-epochs", 3, "--out", tmp_path / "ffr")
    log = files.read_csv(tmp_path / "ffr" / "seed0" / "log.csv")
    assert [row["images"] for row in log] == 3 * ["synthetic"] + 2 * ["real"]


def two_stages(tmp_path, wrong):
    """The folders of a seed of the first stage alone and of both.

    wrong: which images, synthetic or real, have the other class as label in training.
    """
    folders = {"synthetic": make_dataset(tmp_path / "drawn", counts=dict.fromkeys(BIASED, 12)),
               "real": make_dataset(tmp_path / "data")}
    rows = imagefolder.read_metadata(folders[wrong])
    files.write_csv(folders[wrong] / "metadata.csv", [
        row | {"y": 1 - row["y"]} if row["split"] == "train" else row for row in rows])
    for recipe in ("synthetic", "two-stage"):
        run("train_classifier.py", "--recipe", recipe, "--data", folders["real"], "--synthetic",
            folders["synthetic"], *QUICK, "--epochs", 8, "--last-layer-epochs", 40,
            "--last-layer-rate", 1, "--out", tmp_path / recipe)
    return [tmp_path / recipe / "seed0" for recipe in ("synthetic", "two-stage")]


def test_the_second_stage_moves_the_last_layer_alone(tmp_path):
    from safetensors.torch import load_file

    one, two = (load_file(seed / "model.safetensors") for seed in two_stages(tmp_path, "synthetic"))
    assert {name for name in one if not torch.equal(one[name], two[name])} == {
        "last_layer.weight", "last_layer.bias"}


def test_a_last_layer_that_real_images_make_worse_on_val_is_kept_as_pretrained(tmp_path):
    one, two = two_stages(tmp_path, "real")
    log = files.read_csv(two / "log.csv")
    worst = [float(row["val_worst_group"]) for row in log]
    assert max(worst[:8]) > max(worst[8:]) and files.read_csv(one / "log.csv") == log[:8]
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_cached_features_train_the_last_layer_as_the_frozen_network_does(dataset):
    """In every epoch the same predictions, to float noise."""
    rows = {split: imagefolder.read_metadata(dataset, split) for split in ("train", "val")}
    groups = list(imagefolder.group_counts(rows["train"]))
    images, val = (Images(dataset, part, 32, groups) for part in rows.values())
    args = train_classifier.parse([
        "--recipe", "erm", "--data", str(dataset), "--out", "x", "--last-layer-epochs", "4",
        "--batch", "16", "--last-layer-rate", "0.3"])
    phase, losses, histories = (RECIPES["two-stage"][1],
                                Losses(images.group, len(groups), 0.5, 0.1, 0), [])
    for trained in (train_classifier.train_phase, last_layer_through_network):
        torch.manual_seed(0)
        model = new_classifier("cnn", "none", 2)
        found = trained(model, phase, images, val, losses, args, contextlib.nullcontext, 0, log=[])
        histories.append(torch.stack(found[1]))
    cached, plain = histories
    assert torch.allclose(cached, plain, atol=1e-5) and (plain[0] - plain[-1]).abs().max() > 0.01


def last_layer_through_network(model, phase, images, val, losses, args, autocast, seed, log):
    """train_phase for the last layer, written plainly:
    every batch goes through the frozen network.
    """
    model.eval()
    optimizer = torch.optim.SGD(model.last_layer.parameters(), args.last_layer_rate, momentum=0.9,
                                weight_decay=args.weight_decay)
    schedule, history = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, args.last_layer_epochs), []
    for epoch in range(args.last_layer_epochs):
        rng = torch.Generator().manual_seed(stage.seed_of(seed, phase, epoch))
        for batch in images.batches(phase.drawn, args.batch, rng):
            with torch.no_grad():
                features = model.backbone(to_input(images.pixels[batch], args.resolution))
            loss = losses.cross_entropy(model.last_layer(features), None, images.y[batch], None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        history.append(predict(model, val, args.resolution, autocast))
    return None, history


def test_a_resnet_needs_no_library_but_its_own():
    """In a process of its own: others that this one has imported load parts of torchvision."""
    code = ("from classifiers import network; "
            "print(network.new_classifier('resnet18', 'none', 2).last_layer)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "Linear(in_features=512, out_features=2, bias=True)\n", done.stderr


def test_finished_seeds_are_kept_and_dropped_ones_go(dataset, tmp_path):
    args = ("train_classifier.py", "--recipe", "erm", "--data", dataset, *QUICK[:-1])
    run(*args, 0, 1, "--out", tmp_path / "erm")
    assert ("seed 1" not in (text := run(*args, 1, 2, "--out", tmp_path / "erm"))
            and "seed 2" in text)
    assert sorted(path.name for path in (tmp_path / "erm").glob("[!.]*")) == [
        "config.json", "seed1", "seed2"]


def test_a_loss_that_is_not_finite_stops_each_seed_and_publishes_nothing(dataset, tmp_path):
    process = start("train_classifier.py", "--recipe", "erm", "--data", dataset,
                    "--seeds", 0, 1, "--learning-rate", "1e30", "--out", tmp_path / "erm",
                    stdout=-1, stderr=-1)
    _, errors = process.communicate()
    assert (process.returncode == 1 and "Traceback" not in errors
            and not list(tmp_path.glob("erm/seed*")))
    for seed in (0, 1):
        assert (f"train_classifier.py: error: seed {seed}: loss is nan in epoch 1 "
                "on real images (") in errors


def test_synthetic_images_are_required_or_refused_by_the_recipe(dataset, vanilla, tmp_path):
    args = ("train_classifier.py", "--data", dataset, "--out", tmp_path / "x", "--recipe")
    run(*args, "two-stage", fails="--synthetic: two-stage needs synthetic images")
    run(*args, "erm", "--synthetic", vanilla,
        fails="--synthetic: erm does not use synthetic images")


def test_groups_without_val_images_and_classes_without_training_images_are_reported(tmp_path):
    data = make_dataset(tmp_path / "data", counts={(0, 0): 6, (0, 1): 2, (1, 0): 2, (1, 1): 6})
    rows = imagefolder.read_metadata(data)
    files.write_csv(data / "metadata.csv", [dict(row, y=row["y"] + 1) for row in rows
                                            if (row["split"], row["y"], row["a"]) != ("val", 1, 0)])
    text = run("train_classifier.py", "--recipe", "erm", "--data", data, *QUICK,
               "--out", tmp_path / "erm")
    assert "no training images of class 0" in text
    assert ("no val images of odd digit on a red background (y2-a0); "
            "epochs are chosen by the worst of 3 of 4 groups") in text


def test_dfr_needs_every_class_in_val(tmp_path):
    data = make_dataset(tmp_path / "data", counts={(0, 0): 6, (1, 1): 6})
    rows = imagefolder.read_metadata(data)
    files.write_csv(data / "metadata.csv", [
        row for row in rows if (row["split"], row["y"]) != ("val", 1)])
    run("train_classifier.py", "--recipe", "dfr", "--data", data, *QUICK, "--out", tmp_path / "dfr",
        fails="has too few val images of class 1 for dfr")


def test_other_weights_under_the_same_name_are_trained_from_again(dataset, tmp_path):
    import torchvision
    from safetensors.torch import save_file

    args = ("train_classifier.py", "--recipe", "erm", "--arch", "resnet18",
            "--weights", tmp_path / "w.safetensors", "--data", dataset, "--epochs", 1,
            "--batch", 64, "--seeds", 0, "--out", tmp_path / "erm")
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_file(torchvision.models.resnet18().state_dict(), tmp_path / "w.safetensors")
        assert "seed 0" in run(*args)
    assert "seed 0" not in run(*args)


@pytest.mark.parametrize("more", (("--arch", "mobilenet_v3_small"), ("--arch", "convnext_tiny"),
                                  ("--precision", "bf16")), ids=lambda more: more[1])
def test_other_networks_and_precisions_train(dataset, tmp_path, more):
    run("train_classifier.py", "--recipe", "erm", "--data", dataset, *QUICK, "--epochs", 1, *more,
        "--out", tmp_path / "o")
    with open(tmp_path / "o" / "seed0" / "predictions.csv") as file:
        assert all(abs(float(row["p0"]) + float(row["p1"]) - 1) < 2e-6
                   for row in csv.DictReader(file))


@pytest.mark.parametrize("arch, message", (
    ("resnet9000", "is neither cnn nor in torchvision.models"),
    ("squeezenet1_0", "has no linear last layer"),
    ("inception_v3", "several outputs"), ("vit_b_16", "does not take images of 32 pixels")))
def test_networks_that_cannot_be_used_are_refused_before_training(dataset, tmp_path, arch, message):
    run("train_classifier.py", "--recipe", "erm", "--data", dataset, "--arch", arch,
        "--out", tmp_path / "o", fails=message)
    assert not (tmp_path / "o").exists()


def test_a_tilde_in_a_setting_is_the_home_folder():
    """Also where a hub id or a word may stand: make puts settings in quotes."""
    args = train_classifier.parse(["--recipe", "erm", "--data", "d", "--out", "~/o", "--arch",
                                   "resnet18", "--weights", "~/net.pth"])
    assert args.weights == os.path.expanduser("~/net.pth")
    assert str(args.out) == os.path.expanduser("~/o")
