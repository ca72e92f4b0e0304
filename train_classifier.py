"""Stage 4: trains a classifier with one recipe, once per seed, and writes its predictions.

    python train_classifier.py --recipe erm --data data/digits-0.95 \\
        --out runs/digits-0.95/classifiers/erm
    python train_classifier.py --recipe two-stage --synthetic runs/digits-0.95/synthetic/lora \\
        --data data/digits-0.95 --out runs/digits-0.95/classifiers/lora

The paper's recipe is two-stage: cross-entropy and supervised contrastive loss on balanced synthetic
images, then only the last layer on the real, biased ones; it is kept as pretrained if no epoch
improves it on val (two-stage-whole: the whole network; synthetic: the first stage alone). ffr uses
cross-entropy alone, then the whole network; mixed and filled train once, on real and synthetic
images together.
erm, reweight, resample, subg, groupdro, jtt, dfr and self are baselines on real images alone. All
keep the epoch with the best worst-group accuracy on val, but for the first phases of jtt and self;
dfr and self refit the last layer on val. None uses test. OUT/config.json says which group labels a
recipe uses.

Without attribute labels, `--groups` takes the pseudo-groups of cluster.py --within dataset for
groups, and `--val synthetic` the val images of SYNTHETIC for val. sage (Luo et al. 2026) trains on
real and synthetic images together and refits the last layer.

Reads DATA and SYNTHETIC, folders in the one format. Writes OUT/seed<k>/ with model.safetensors,
predictions.csv of val and test (file_name, split, y, a, prediction, one probability per class),
log.csv and config.json; last OUT/config.json.
"""

import copy
import time
from collections import namedtuple
from pathlib import Path

from classifiers import last_layer, network
from classifiers.network import Images, features_of, predict
from common import compute, files, imagefolder, made, pixels, stage
from common.files import InputError

torch = stage.lazy("torch")

# A recipe is a list of phases: which images, how they are sampled, which loss, which weights learn,
# and what is kept: the best epoch on val, the last epoch, or the errors of a short training (JTT).
# "filled" images are the real ones and as many synthetic ones as bring every group to the size of
# the largest.
Phase = namedtuple("Phase", "images drawn loss learns keeps", defaults=["best epoch"])
ERM = Phase("real", "shuffled", "cross_entropy", "all")
GROUP_DRO = Phase("real", "group-balanced", "group_dro", "all")
PRETRAINED = Phase("synthetic", "shuffled", "contrastive", "all")
FAKE = Phase("synthetic", "shuffled", "cross_entropy", "all")
MIXED = Phase("mixed", "shuffled", "cross_entropy", "all")
DFR = Phase("val", None, "deep_feature_reweighting", "last layer")
RECIPES = {
    "erm": [ERM],
    "reweight": [Phase("real", "shuffled", "group_weighted", "all")],
    "resample": [Phase("real", "group-balanced", "cross_entropy", "all")],
    "subg": [Phase("real", "smallest group", "cross_entropy", "all")],  # Idrissi et al. 2022
    "groupdro": [GROUP_DRO],
    "jtt": [Phase("real", "shuffled", "cross_entropy", "all", "errors"),  # Liu et al. 2021
            Phase("real", "errors upsampled", "cross_entropy", "all")],
    "dfr": [ERM, DFR],
    "self": [Phase("real", "class-balanced", "cross_entropy", "all", "last epoch"),
             Phase("val", None, "early_stop_disagreement", "last layer")],
    "mixed": [MIXED],
    "filled": [Phase("filled", "shuffled", "cross_entropy", "all")],
    "ffr": [FAKE, ERM],  # From Fake to Real, arXiv 2308.04553
    "ffr-groupdro": [FAKE, GROUP_DRO],
    "sage": [MIXED, DFR],
    "synthetic": [PRETRAINED],
    "two-stage": [PRETRAINED, Phase("real", "shuffled", "cross_entropy", "last layer")],
    "two-stage-whole": [PRETRAINED, ERM],
    "two-stage-groupdro": [PRETRAINED, Phase("real", "group-balanced", "group_dro", "last layer")],
    "two-stage-dfr": [PRETRAINED, DFR],
}


def takes_synthetic(recipe):
    return any(phase.images in ("synthetic", "mixed", "filled") for phase in RECIPES[recipe])


def group_labels(recipe, synthetic, groups=None, val="real"):
    """Which group labels a recipe uses, such as "train, val for selection".

    Its images count: fine-tuning on groups or clusters, and a filter that compares with groups,
    need those of training. Pseudo-groups and classes are no labels.
    """
    config = files.read_json(synthetic / "config.json") if synthetic else {}
    settings = config.get("arguments", {})
    on_train = settings.get("models") or settings.get("embeddings") or settings.get("edit")
    for phase in RECIPES[recipe]:
        by_group = (phase.images == "filled", phase.drawn in ("group-balanced", "smallest group"),
                    phase.loss in ("group_weighted", "group_dro"))
        on_train = on_train or any(by_group)
    purpose = "training" if RECIPES[recipe][-1] == DFR else "selection"
    used = f"{'synthetic ' if val == 'synthetic' else ''}val for {purpose}"
    used = f"train, {used}" if on_train else used
    if groups is None:
        return used
    return f"none (worst class: {used})" if groups == "none" else f"none (pseudo-groups: {used})"


# -------------------------------------------------------------------------------------- the losses


class Losses:
    """The losses side by side: functions of logits (B, C), features (B, D), y (B,), group (B,)."""

    def __init__(self, group, groups, beta, temperature, dro_step):
        """group: (N,) of the training images; groups: their number."""
        self.beta, self.temperature, self.dro_step = beta, temperature, dro_step
        sizes = group.bincount(minlength=groups)
        there = sizes > 0  # a group without training images has no weight
        self.rarity = len(group) / (sizes.clamp(min=1) * there.sum())  # mean 1 over the images
        self.group_weights = there / there.sum()

    def cross_entropy(self, logits, features, y, group):
        return torch.nn.functional.cross_entropy(logits, y)

    def contrastive(self, logits, features, y, group):
        """beta * cross-entropy + (1 - beta) * supervised contrastive loss (paper, pretraining)."""
        supcon = supervised_contrastive(features, y, self.temperature)
        cross_entropy = torch.nn.functional.cross_entropy(logits, y)
        return self.beta * cross_entropy + (1 - self.beta) * supcon

    def group_weighted(self, logits, features, y, group):
        """Cross-entropy, each image weighted by the inverse size of its group."""
        losses = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        return (losses * self.rarity.to(logits)[group]).mean()

    def group_dro(self, logits, features, y, group):
        """Group losses weighted by exponentiated gradient ascent (Sagawa et al. 2020, algorithm 1).

        As in the authors' code, a group without an image in the batch has loss 0.
        """
        weights = self.group_weights
        member = torch.nn.functional.one_hot(group, len(weights)).float()
        losses = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        losses = member.T @ losses / member.sum(0).clamp(min=1)
        weights.mul_((self.dro_step * losses.detach().cpu()).exp())
        weights.div_(weights.sum())
        return losses @ weights.to(losses)


def supervised_contrastive(features, y, temperature):
    """Supervised contrastive loss, L_out of Khosla et al. 2020, equation 2, one view per image.

    features: (B, D) of unit length; y: (B,). Images without a partner of their class are left out.
    """
    similarity = features @ features.T / temperature
    others = ~torch.eye(len(y), dtype=torch.bool, device=y.device)
    of_others = similarity.masked_fill(~others, -torch.inf)
    log_prob = similarity - of_others.logsumexp(1, keepdim=True)
    partners = (y[:, None] == y[None]) & others
    per_image = -(log_prob * partners).sum(1) / partners.sum(1).clamp(min=1)
    return per_image[partners.any(1)].mean() if partners.any() else features.sum() * 0


# ------------------------------------------------------------------------------------ the training


def train_phase(model, phase, images, val, losses, args, autocast, seed, log):
    """Trains the weights that the phase lets learn, and keeps those of the best epoch on val.

    A last layer that no epoch improves on val is kept as it comes: on real, biased images it can
    learn the bias again. Returns the worst-group accuracy on val, and the class probabilities
    (N, C) on val after each epoch. Raises FloatingPointError at the first epoch whose loss is not
    finite.
    """
    device = next(model.parameters()).device
    frozen = phase.learns == "last layer"
    epochs, rate, learning = args.epochs, args.learning_rate, model
    if phase.keeps == "errors":
        epochs = args.jtt_epochs
    elif phase.images == "synthetic":
        epochs = args.pretrain_epochs
    if frozen:  # the backbone and its batch statistics: features are computed once
        epochs, rate, learning = args.last_layer_epochs, args.last_layer_rate, model.last_layer
        features, val_features = (features_of(model, part, args.resolution, autocast)
                                  for part in (images, val))
    optimizer = torch.optim.SGD(learning.parameters(), rate, momentum=0.9,
                                weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    view = network.random_crops if args.augment == "crop-flip" else network.to_input

    def on_val():
        """Class probabilities (N, C), and the accuracy of each group."""
        found = (model.last_layer(val_features).softmax(1).detach().cpu() if frozen
                 else predict(model, val, args.resolution, autocast))
        return found, imagefolder.group_accuracies(val.rows, found.argmax(1).tolist())

    loss_of, best, kept, history = getattr(losses, phase.loss), -1.0, None, []
    if frozen:
        _, accuracies = on_val()
        best, kept = min(accuracies.values()), copy.deepcopy(learning.state_dict())
    for epoch in range(epochs):
        model.train(not frozen)
        total = 0.0
        rng = torch.Generator().manual_seed(stage.seed_of(seed, phase, epoch))
        torch.manual_seed(stage.seed_of(seed, phase, epoch, "crops"))
        batches = images.batches(phase.drawn, args.batch, rng, args.jtt_upsampling, seed)
        seen = (network.on_device(images.pixels, batches, device) if not frozen
                else (features[batch] for batch in batches))
        for batch, shown in zip(batches, seen):
            embedded = None
            if not frozen:
                with autocast():
                    shown = model.backbone(view(shown, args.resolution))
                shown = shown.float()
                embedded = torch.nn.functional.normalize(model.projection(shown), dim=1)
            loss = loss_of(model.last_layer(shown), embedded, images.y[batch].to(device),
                           images.group[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / len(batches)
        if not total < float("inf"):
            raise FloatingPointError(f"seed {seed}: loss is {total} in epoch {epoch} on "
                                     f"{phase.images} images (learning rate {rate:g}, batch "
                                     f"{args.batch})")
        schedule.step()
        probabilities, accuracies = on_val()
        history.append(probabilities)
        worst = min(accuracies.values())
        log.append({"images": phase.images, "epoch": epoch, "loss": round(total, 6),
                    "val_worst_group": round(worst, 6)}
                   | {f"val_{group}": round(value, 6) for group, value in accuracies.items()})
        if phase.keeps != "best epoch" or worst > best:
            best, kept = worst, copy.deepcopy(learning.state_dict())
    learning.load_state_dict(kept)
    return best, history


def train(phases, images, val, groups, classes, accelerator, args, seed, log):
    """Goes through a recipe's phases; images: {name: Images}; groups, classes: their numbers.

    With --erm its network stands for the first phase. Returns (classifier, worst-group accuracy on
    val).
    """
    autocast, real = accelerator.autocast, images["real"]
    for phase in phases:
        if phase is phases[0] or phase.drawn == "errors upsampled":  # JTT's second model is new
            torch.manual_seed(stage.seed_of(seed))  # the same initial weights for every recipe
            model = network.new_classifier(args.arch, args.weights, classes)
            model.to(accelerator.device, memory_format=torch.channels_last)
        if args.erm and phase == ERM:
            begun = args.erm / f"seed{seed}"
            network.load_weights(model, begun / "model.safetensors", "train it again")
            log += files.read_csv(begun / "log.csv")
            history = None  # DFR needs none
        elif phase.images == "val":
            refit = getattr(last_layer, phase.loss)
            features = features_of(model, val, args.resolution, autocast)
            best = refit(model, val, features, seed, history=history, points=args.self_points,
                         batch=args.batch, weight_decay=args.weight_decay)
        else:
            losses = Losses(images[phase.images].group, groups, args.beta, args.temperature,
                            args.dro_step)
            best, history = train_phase(model, phase, images[phase.images], val, losses, args,
                                        autocast, seed, log)
        if phase.keeps == "errors":
            predicted = predict(model, real, args.resolution, autocast).argmax(1)
            real.errors = predicted != real.y
            print(f"{args.out.name} seed {seed}: {real.errors.sum()} of {len(real)} images are "
                  "upsampled")
    return model, best


# --------------------------------------------------------------------------------------- the stage


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    rows = {split: imagefolder.read_metadata(args.data, split) for split in imagefolder.SPLITS}
    synthetic = imagefolder.read_metadata(args.synthetic, "train") if args.synthetic else []
    known, chosen_on = known_rows(rows, args)
    everything = [row for part in (*known.values(), rows["test"], synthetic) for row in part]
    groups = list(imagefolder.group_counts(everything))
    classes = 1 + max(row["y"] for row in everything)
    if compute.FIRST:
        print(*network.absent(known, synthetic, classes), sep="", end="")
    for y in range(classes) if RECIPES[args.recipe][-1].images == "val" else ():
        if sum(row["y"] == y for row in known["val"]) < 2:
            raise InputError(chosen_on, f"has too few val images of class {y} for {args.recipe}",
                             "add some, or leave this recipe out")
    digests = {"data": files.digest(*(imagefolder.digest(args.data, part)
                                      for part in rows.values()))}
    if args.synthetic:
        digests["synthetic"] = imagefolder.digest(args.synthetic, synthetic)
    if args.groups or args.val == "synthetic":
        digests["groups"] = files.digest(known["train"],
                                         imagefolder.digest(chosen_on, known["val"]))
    key = key_of(args.recipe, digests, args)
    todo = compute.agreed(lambda: [seed for seed in args.seeds if not made.is_finished(
        args.out / f"seed{seed}", key)])
    if args.erm:
        expected = key_of("erm", digests, args)
        for seed in todo:
            if not made.is_finished(args.erm / f"seed{seed}", expected):
                raise InputError(args.erm, f"has no seed {seed} of erm with these settings and "
                                 "images", "train it with the same flags, or leave out --erm")
    failures = []
    if todo:
        def images_of(folder, rows, groups=groups):
            return Images(folder, rows, args.load_size, groups, args.cache)

        images = {"real": images_of(args.data, known["train"])}
        if synthetic:
            images["synthetic"] = images_of(args.synthetic, synthetic)
        for name in {"mixed", "filled"} & {phase.images for phase in RECIPES[args.recipe]}:
            images[name] = images["real"].joined(images["synthetic"], name == "filled")
        val = images_of(chosen_on, known["val"])
        tested = [images_of(args.data, rows[split], None) for split in ("val", "test")]
        network.check_network(args.arch, args.weights, classes, args.resolution)
        stage.start(args, {f"seed{seed}": 1 for seed in args.seeds})
        accelerator = compute.accelerator(args.device, args.precision)
    for seed in compute.share(todo):
        begin, log = time.monotonic(), []
        try:
            model, best = train(RECIPES[args.recipe], images, val, len(groups), classes,
                                accelerator, args, seed, log)
        except FloatingPointError as error:
            failures.append(f"train_classifier.py: error: {error}")
            continue
        predictions = predictions_of(model, tested, args.resolution, accelerator.autocast)
        publish_seed(args.out / f"seed{seed}", model, predictions, log, args, key, seed, begin)
        print(f"{args.out.name} seed {seed}: worst-group accuracy on val {best:.3f}", flush=True)
    status = stage.outcome(failures)
    if compute.FIRST and not status:
        made.remove_other_units(args.out, {f"seed{seed}" for seed in args.seeds})
        labels = group_labels(args.recipe, args.synthetic, args.groups, args.val)
        stage.finish(args.out, args, key, digests=digests, group_labels=labels)
    return status


def key_of(recipe, digests, args):
    """What a seed depends on; another recipe or loss in this file retrains nothing."""
    phases = RECIPES[recipe]
    losses = [getattr(Losses, phase.loss) for phase in phases if hasattr(Losses, phase.loss)]
    code = made.code_digest(train, train_phase, Losses.__init__, supervised_contrastive, *losses,
                            predictions_of, network.__file__, last_layer.__file__, pixels.Pixels,
                            imagefolder.load_image, stage.seed_of)
    settings = made.settings_of(args, "seeds", "groups", "erm") | {"recipe": recipe}
    if not takes_synthetic(recipe):  # then --pretrain-epochs plays no part
        settings["pretrain_epochs"] = args.epochs
    return files.digest(settings, phases, digests, files.model_digest(args.weights), code)


def known_rows(rows, args):
    """({train, val: rows with the groups that training knows}, the folder of val's images)."""
    relabelled = imagefolder.with_attributes_of(args.groups, rows["train"] + rows["val"])
    known = {split: [row for row in relabelled if row["split"] == split]
             for split in ("train", "val")}
    if args.val == "real":
        return known, args.data
    return known | {"val": imagefolder.read_metadata(args.synthetic, "val")}, args.synthetic


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    count, positive, add = stage.number(int, 1), stage.number(float, 0), parser.add_argument
    add("--recipe", choices=tuple(RECIPES), required=True, help="how to train, see above")
    add("--data", type=Path, required=True, help="real images: a prepared dataset folder")
    add("--synthetic", type=Path, help="synthetic images: output folder of generate.py")
    add("--groups", type=lambda text: text if text == "none" else Path(text), help="folder of "
        "pseudo-groups, of cluster.py: its attribute replaces DATA's in train and val; none: each "
        "class is one group")
    add("--val", choices=("real", "synthetic"), default="real", help="val images: of DATA or "
        "SYNTHETIC")
    add("--erm", type=Path, help="dfr: the folder of erm with the same flags, whose networks are "
        "taken instead of being trained again")
    add("--out", type=Path, required=True, help="folder to write the seeds to")
    add("--seeds", type=stage.number(int, 0), nargs="+", default=[0, 1, 2], help="one classifier "
        "each")
    add("--arch", default="cnn", help="cnn, for 32 pixels, or a network of torchvision (resnet50, "
        "convnext_tiny, vit_b_16, ...) or timm")
    add("--weights", default="none", help="initial: imagenet, none, or a file, .safetensors "
        "or .pth")
    add("--resolution", type=count, default=32, help="pixels per side that the classifier sees")
    add("--load-size", type=count, help="pixels per side that images are resized to; the "
        "classifier sees their middle; default: the resolution")
    add("--augment", choices=("none", "crop-flip"), default="none", help="crop-flip: random crops "
        "of 70 to 100 %% and flips while all weights learn")
    add("--epochs", type=count, default=30, help="epochs of a phase in which all weights learn")
    add("--pretrain-epochs", type=count, help="epochs of a phase on synthetic images alone; "
        "default: --epochs")
    add("--learning-rate", type=positive, default=0.02, help="of SGD, momentum 0.9, cosine to 0")
    add("--last-layer-epochs", type=count, default=30, help="epochs of the last-layer phase")
    add("--last-layer-rate", type=positive, default=0.001, help="its learning rate")
    add("--weight-decay", type=positive, default=1e-4, help="weight decay of SGD")
    add("--batch", type=stage.number(int, 2), default=64, help="images per step")
    add("--beta", type=stage.number(float, 0, 1), default=0.5, help="pretraining minimises beta * "
        "cross-entropy + (1 - beta) * supervised contrastive loss (paper: 0.5)")
    add("--temperature", type=stage.number(float, 1e-6), default=0.1, help="temperature of the "
        "contrastive loss")
    add("--dro-step", type=positive, default=0.01, help="step size of Group-DRO (its authors')")
    add("--jtt-epochs", type=count, default=2, help="epochs of JTT's first model")
    add("--jtt-upsampling", type=count, default=20, help="how often JTT's second model sees the "
        "first's errors per epoch")
    add("--self-points", type=count, nargs="+", default=[20, 100, 500], help="numbers of val "
        "images that SELF tunes on; the best on the rest of val is kept (its authors')")
    pixels.add_flag(parser)
    compute.add_flags(parser)
    args = parser.parse_args(argv)
    args.seeds = list(dict.fromkeys(args.seeds))
    args.load_size = args.load_size or args.resolution
    args.pretrain_epochs = args.pretrain_epochs or args.epochs
    check(args)
    return args


def check(args):
    """Raises InputError for flags that contradict one another."""
    needed = takes_synthetic(args.recipe)
    if needed != bool(args.synthetic):
        raise InputError("--synthetic", f"{args.recipe} {'needs' if needed else 'does not use'} "
                         "synthetic images", "generate.py writes such a folder")
    if args.erm and args.recipe != "dfr":
        raise InputError("--erm", f"is for --recipe dfr, not {args.recipe}", "leave it out")
    if args.val == "synthetic" and not args.synthetic:
        raise InputError("--val synthetic", f"{args.recipe} uses no synthetic images",
                         "use --val real")
    if args.groups not in (None, "none") and args.synthetic:
        config = files.read_json(args.synthetic / "config.json")
        drawn_for = config.get("arguments", {}).get("data")
        if drawn_for and args.groups.resolve() != Path(drawn_for).resolve():
            raise InputError(f"--groups {args.groups}", f"{args.synthetic} was drawn for the "
                             f"groups of {drawn_for}", "draw images for these groups")
    if args.load_size < args.resolution:
        raise InputError("--load-size", f"{args.load_size} is smaller than the resolution",
                         "use at least the resolution")
    network.check_name(args.arch)
    if args.arch == "cnn" and args.weights != "none":
        raise InputError("--weights", "the cnn has no pretrained weights",
                         "use --arch resnet50, for example")


def predictions_of(model, splits, resolution, autocast):
    """The rows of predictions.csv."""
    rows = []
    for images in splits:
        found = predict(model, images, resolution, autocast).tolist()
        for row, probabilities in zip(images.rows, found):
            line = {name: row[name] for name in ("file_name", "split", "y", "a")}
            line["prediction"] = probabilities.index(max(probabilities))
            rows.append(line | {f"p{y}": f"{value:.6f}" for y, value in enumerate(probabilities)})
    return rows


def publish_seed(path, model, predictions, log, args, key, seed, begin):
    from safetensors.torch import save_file

    weights = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    with files.replacing(path) as out:
        out.mkdir()
        save_file(weights, out / "model.safetensors")
        files.write_csv(out / "predictions.csv", predictions)
        files.write_csv(out / "log.csv", log)
        made.finish(out, args, key, seed=seed, **stage.spent(begin))


if __name__ == "__main__":
    stage.run(main, shared=True)
