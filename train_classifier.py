"""Stage 4: trains a classifier with one recipe, once per seed, and writes its predictions for the val and test images.

    python train_classifier.py --recipe erm --data data/digits-0.95 --out runs/digits-0.95/classifiers/erm
    python train_classifier.py --recipe two-stage --synthetic runs/digits-0.95/synthetic/lora \\
        --data data/digits-0.95 --out runs/digits-0.95/classifiers/lora

The paper's recipe is two-stage: cross-entropy and supervised contrastive loss on balanced synthetic images, then only the
last layer on the real, biased ones (two-stage-whole: the whole network). ffr uses cross-entropy alone, then the whole
network; mixed and filled train once, on real and synthetic images together. erm, reweight, resample, subg, groupdro, jtt,
dfr and self are baselines on real images alone. Each keeps the epoch with the best worst-group accuracy on val; dfr and
self refit the last layer on val. None uses test. OUT/config.json says which group labels a recipe uses.

Without attribute labels, `--groups` takes the pseudo-groups of cluster.py --as-attribute for groups, and `--val synthetic` the
val images of SYNTHETIC for val. sage (Luo et al. 2026) trains on real and synthetic images together and refits the last layer.

Reads DATA and SYNTHETIC, folders in the one format. Writes OUT/seed<k>/ with model.safetensors, predictions.csv
(file_name, split, y, a, prediction, one probability per class), log.csv and config.json; last OUT/config.json.
"""

import sys
import time
from collections import namedtuple
from pathlib import Path

from common import classifiers, files, imagefolder, models, pixels, stage
from common.classifiers import Images, features_of, predict
from common.files import InputError

torch = stage.lazy("torch")

# A recipe is a list of phases: which images, how they are sampled, which loss, which weights learn, and what is kept: the
# best epoch on val, the last epoch, or the errors of a short training (JTT). "filled" images are the real ones and as many
# synthetic ones as bring every group to the size of the largest.
Phase = namedtuple("Phase", "images drawn loss learns keeps", defaults=["best epoch"])
ERM = Phase("real", "shuffled", "cross_entropy", "all")
PRETRAINED = Phase("synthetic", "shuffled", "contrastive", "all")
RECIPES = {
    "erm": [ERM],
    "reweight": [Phase("real", "shuffled", "group_weighted", "all")],
    "resample": [Phase("real", "group-balanced", "cross_entropy", "all")],
    "subg": [Phase("real", "smallest group", "cross_entropy", "all")],  # Idrissi et al. 2022
    "groupdro": [Phase("real", "group-balanced", "group_dro", "all")],
    "jtt": [Phase("real", "shuffled", "cross_entropy", "all", "errors"),  # Liu et al. 2021, algorithm 1
            Phase("real", "errors upsampled", "cross_entropy", "all")],
    "dfr": [ERM, Phase("val", None, "deep_feature_reweighting", "last layer")],
    "self": [Phase("real", "class-balanced", "cross_entropy", "all", "last epoch"),
             Phase("val", None, "early_stop_disagreement", "last layer")],
    "mixed": [Phase("mixed", "shuffled", "cross_entropy", "all")],
    "filled": [Phase("filled", "shuffled", "cross_entropy", "all")],
    "ffr": [Phase("synthetic", "shuffled", "cross_entropy", "all"), ERM],  # From Fake to Real, arXiv 2308.04553
    "ffr-groupdro": [Phase("synthetic", "shuffled", "cross_entropy", "all"),
                     Phase("real", "group-balanced", "group_dro", "all")],
    "sage": [Phase("mixed", "shuffled", "cross_entropy", "all"), Phase("val", None, "deep_feature_reweighting", "last layer")],
    "two-stage": [PRETRAINED, Phase("real", "shuffled", "cross_entropy", "last layer")],
    "two-stage-whole": [PRETRAINED, ERM],
    "two-stage-groupdro": [PRETRAINED, Phase("real", "group-balanced", "group_dro", "last layer")],
    "two-stage-dfr": [PRETRAINED, Phase("val", None, "deep_feature_reweighting", "last layer")],
}


def takes_synthetic(recipe):
    return any(phase.images in ("synthetic", "mixed", "filled") for phase in RECIPES[recipe])


def group_labels(recipe, synthetic, groups=None, val="real"):
    """Which group labels a recipe uses, such as "train, val for selection", or "none (worst class: val for selection)".

    Its images count: fine-tuning on groups or clusters, and a filter that compares with groups, need those of training.
    """
    phases, config = RECIPES[recipe], files.read_json(synthetic / "config.json") if synthetic else {}
    settings = config.get("arguments", {})
    on_train = settings.get("models") or settings.get("embeddings") or any(
        phase.images == "filled" or phase.drawn in ("group-balanced", "smallest group")
        or phase.loss in ("group_weighted", "group_dro") for phase in phases)
    purpose = "training" if phases[-1].loss == "deep_feature_reweighting" else "selection"
    used = "train, " * bool(on_train) + "synthetic " * (val == "synthetic") + f"val for {purpose}"
    return used if groups is None else f"none (worst class: {used})" if groups == "none" else f"none (pseudo-groups: {used})"


# ---------------------------------------------------------------------------------------------- the losses


class Losses:
    """The losses side by side, each a function of a batch: logits (B, C), features (B, D), y (B,), group (B,)."""

    def __init__(self, images, groups, args):
        self.args = args
        sizes = images.group.bincount(minlength=groups)
        self.rarity = len(images) / (sizes.clamp(min=1) * (sizes > 0).sum())  # mean 1 over the images
        self.group_weights = (sizes > 0) / (sizes > 0).sum()  # a group without training images has no weight

    def cross_entropy(self, logits, features, y, group):
        return torch.nn.functional.cross_entropy(logits, y)

    def contrastive(self, logits, features, y, group):
        """beta * cross-entropy + (1 - beta) * supervised contrastive loss (paper, pretraining of the classifier)."""
        supcon = supervised_contrastive(features, y, self.args.temperature)
        return self.args.beta * torch.nn.functional.cross_entropy(logits, y) + (1 - self.args.beta) * supcon

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
        weights.mul_((self.args.dro_step * losses.detach().cpu()).exp())
        weights.div_(weights.sum())
        return losses @ weights.to(losses)


def supervised_contrastive(features, y, temperature):
    """Supervised contrastive loss, L_out of Khosla et al. 2020, equation 2, with one view per image.

    features: (B, D) of unit length; y: (B,). Images without a partner of their class are left out.
    """
    similarity = features @ features.T / temperature
    others = ~torch.eye(len(y), dtype=torch.bool, device=y.device)
    log_prob = similarity - similarity.masked_fill(~others, -torch.inf).logsumexp(1, keepdim=True)
    partners = (y[:, None] == y[None]) & others
    per_image = -(log_prob * partners).sum(1) / partners.sum(1).clamp(min=1)
    return per_image[partners.any(1)].mean() if partners.any() else features.sum() * 0


# ---------------------------------------------------------------------------------------------- the training


def train_phase(model, phase, images, val, losses, args, seed, log):
    """Trains the weights that the phase lets learn, and keeps those of the epoch that was best on val, or the last.

    Returns the worst-group accuracy on val, and the class probabilities (N, C) on val after each epoch.
    Raises FloatingPointError at the first epoch whose loss is not finite.
    """
    device = next(model.parameters()).device
    last_layer = phase.learns == "last layer"
    learning = model.last_layer if last_layer else model
    epochs, rate = (args.last_layer_epochs, args.last_layer_rate) if last_layer else (
        args.jtt_epochs if phase.keeps == "errors" else args.epochs, args.learning_rate)
    optimizer = torch.optim.SGD(learning.parameters(), rate, momentum=0.9, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    if last_layer:  # the backbone is frozen, batch statistics included: its features are computed once
        features, val_features = (features_of(model, part, args.resolution) for part in (images, val))
    view = classifiers.random_crops if args.augment == "crop-flip" else classifiers.to_input
    loss_of, best, kept, history = getattr(losses, phase.loss), -1.0, None, []
    for epoch in range(epochs):
        model.train(not last_layer)
        total = 0.0
        rng = torch.Generator().manual_seed(stage.seed_of(seed, phase, epoch))
        torch.manual_seed(stage.seed_of(seed, phase, epoch, "crops"))
        batches = images.batches(phase.drawn, args.batch, rng, args.jtt_upsampling)
        seen = (features[batch] for batch in batches) if last_layer else classifiers.on_device(images.pixels, batches, device)
        for batch, shown in zip(batches, seen):
            if last_layer:
                logits, embedded = model.last_layer(shown), None
            else:
                with torch.autocast(device.type, torch.bfloat16, enabled=model.bf16):
                    found = model.backbone(view(shown, args.resolution))
                logits = model.last_layer(found.float())
                embedded = torch.nn.functional.normalize(model.projection(found.float()), dim=1)
            loss = loss_of(logits, embedded, images.y[batch].to(device), images.group[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / len(batches)
        if not total < float("inf"):
            raise FloatingPointError(f"seed {seed}: loss is {total} in epoch {epoch} on {phase.images} images "
                                     f"(learning rate {rate:g}, batch {args.batch})")
        schedule.step()
        history.append(model.last_layer(val_features).softmax(1).detach().cpu() if last_layer
                       else predict(model, val, args.resolution))
        accuracies = imagefolder.group_accuracies(val.rows, history[-1].argmax(1).tolist())
        log.append({"images": phase.images, "epoch": epoch, "loss": round(total, 6),
                    "val_worst_group": round(min(accuracies.values()), 6)}
                   | {f"val_{group}": round(value, 6) for group, value in accuracies.items()})
        if phase.keeps != "best epoch" or min(accuracies.values()) > best:
            best = min(accuracies.values())
            kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)
    return best, history


def train(phases, images, val, groups, classes, device, args, seed, log):
    """Goes through a recipe's phases; images: {name: Images}. Returns (classifier, worst-group accuracy on val)."""
    real = images["real"]
    for phase in phases:
        if phase is phases[0] or phase.drawn == "errors upsampled":  # JTT's second model is a new one
            torch.manual_seed(stage.seed_of(seed))  # a seed's initial weights are the same for every recipe
            model = classifiers.new_classifier(args.arch, args.weights, classes, models.use_bf16(args.precision, device))
            model.to(device, memory_format=torch.channels_last)
        if phase.images == "val":
            best = getattr(classifiers, phase.loss)(model, val, history, args, seed)
        else:
            losses = Losses(images[phase.images], groups, args)
            best, history = train_phase(model, phase, images[phase.images], val, losses, args, seed, log)
        if phase.keeps == "errors":
            real.errors = predict(model, real, args.resolution).argmax(1) != real.y
            print(f"{args.out.name} seed {seed}: {real.errors.sum()} of {len(real)} images are upsampled")
    return model, best


# ------------------------------------------------------------------------------------------------ the stage


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    phases = RECIPES[args.recipe]
    rows = {split: imagefolder.read_metadata(args.data, split) for split in imagefolder.SPLITS}
    digests = {"data": files.digest(*(imagefolder.digest(args.data, part) for part in rows.values()))}
    synthetic = imagefolder.read_metadata(args.synthetic, "train") if args.synthetic else []
    chosen_on = args.synthetic if args.val == "synthetic" else args.data
    relabelled = imagefolder.with_attributes_of(args.groups, rows["train"] + rows["val"])
    known = {split: [row for row in relabelled if row["split"] == split] for split in ("train", "val")}
    if args.val == "synthetic":
        known["val"] = imagefolder.read_metadata(args.synthetic, "val")
    everything = [row for part in (*known.values(), rows["test"], synthetic) for row in part]
    groups = list(imagefolder.group_counts(everything))
    classes = 1 + max(row["y"] for row in everything)
    print(*imagefolder.absent(known, synthetic, classes), sep="", end="")
    for y in range(classes) if phases[-1].images == "val" else ():
        if sum(row["y"] == y for row in known["val"]) < 2:
            raise InputError(chosen_on, f"has too few val images of class {y} for {args.recipe}", "add some")
    if args.synthetic:
        digests["synthetic"] = imagefolder.digest(args.synthetic, synthetic)
    if args.groups or args.val == "synthetic":
        digests["groups"] = files.digest(known["train"], imagefolder.digest(chosen_on, known["val"]))
    key = files.digest(made.settings_of(args, "seeds", "groups"), digests, files.model_digest(args.weights),
                       made.code_digest(__file__, classifiers.__file__, pixels.Pixels, imagefolder.load_image, stage.seed_of))
    shard, shards = args.shard
    stage.claim(args, [f"seed{seed}" for seed in args.seeds[shard::shards]])
    todo = [seed for seed in args.seeds[shard::shards] if not made.is_finished(args.out / f"seed{seed}", key)]
    if todo:
        device = compute.accelerator(args.device).device
        images = {"real": (real := Images(args.data, known["train"], args.load_size, groups, args.cache))}
        if synthetic:
            images["synthetic"] = drawn = Images(args.synthetic, synthetic, args.load_size, groups, args.cache)
        images |= {name: real.joined(drawn, name == "filled") for name in {phase.images for phase in phases}
                   & {"mixed", "filled"}}
        val = Images(chosen_on, known["val"], args.load_size, groups, args.cache)
        tested = [Images(args.data, rows[split], args.load_size, None, args.cache) for split in ("val", "test")]
        classifiers.check_network(args, classes)
        stage.start(args, {f"seed{seed}": 1 for seed in args.seeds})
    failures = []
    for seed in todo:
        begin, log = time.monotonic(), []
        try:
            model, best = train(phases, images, val, len(groups), classes, device, args, seed, log)
        except FloatingPointError as error:
            failures.append(f"train_classifier.py: error: {error}")
            continue
        publish_seed(args.out / f"seed{seed}", model, tested, log, args, key, seed, begin)
        print(f"{args.out.name} seed {seed}: worst-group accuracy on val {best:.3f}", flush=True)
    if failures:
        print(*failures, sep="\n", file=sys.stderr)
        return 1
    if shards == 1:
        made.remove_other_units(args.out, {f"seed{seed}" for seed in args.seeds})
        stage.finish(args.out, args, key, digests=digests,
                     group_labels=group_labels(args.recipe, args.synthetic, args.groups, args.val))


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    count, positive = stage.number(int, 1), stage.number(float, 0)
    parser.add_argument("--recipe", choices=tuple(RECIPES), required=True, help="how to train, see above")
    parser.add_argument("--data", type=Path, required=True, help="real images: a prepared dataset folder")
    parser.add_argument("--synthetic", type=Path, help="synthetic images: output folder of generate.py")
    parser.add_argument("--groups", type=lambda text: text if text == "none" else Path(text), help="folder of cluster.py "
                        "--as-attribute: its attribute replaces DATA's in train and val; none: each class is one group")
    parser.add_argument("--val", choices=("real", "synthetic"), default="real", help="val images: DATA's, or SYNTHETIC's")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the seeds to")
    parser.add_argument("--seeds", type=stage.number(int, 0), nargs="+", default=[0, 1, 2], help="one classifier each")
    parser.add_argument("--arch", default="cnn", help="cnn, for 32 pixels, or a network of torchvision (resnet50, "
                        "convnext_tiny, vit_b_16, ...) or timm")
    parser.add_argument("--weights", default="none", help="initial weights: imagenet, none, or a .safetensors "
                        "file")
    parser.add_argument("--resolution", type=count, default=32, help="pixels per side that the classifier sees")
    parser.add_argument("--load-size", type=count, help="pixels per side that images are resized to; the classifier "
                        "sees their middle; default: the resolution")
    parser.add_argument("--augment", choices=("none", "crop-flip"), default="none",
                        help="crop-flip: random crops of 70 to 100 %% and flips while all weights learn")
    parser.add_argument("--epochs", type=count, default=30, help="epochs of a phase in which all weights learn")
    parser.add_argument("--learning-rate", type=positive, default=0.02, help="of SGD with momentum 0.9, cosine to 0")
    parser.add_argument("--last-layer-epochs", type=count, default=30, help="epochs of the last-layer phase")
    parser.add_argument("--last-layer-rate", type=positive, default=0.001, help="learning rate of the last-layer phase")
    parser.add_argument("--weight-decay", type=positive, default=1e-4, help="weight decay of SGD")
    parser.add_argument("--batch", type=stage.number(int, 2), default=64, help="images per step")
    parser.add_argument("--beta", type=stage.number(float, 0, 1), default=0.5, help="pretraining minimises beta * "
                        "cross-entropy + (1 - beta) * supervised contrastive loss (paper: 0.5)")
    parser.add_argument("--temperature", type=stage.number(float, 1e-6), default=0.1, help="of the contrastive loss")
    parser.add_argument("--dro-step", type=positive, default=0.01, help="step size of Group-DRO (its authors')")
    parser.add_argument("--jtt-epochs", type=count, default=2, help="epochs of JTT's first model")
    parser.add_argument("--jtt-upsampling", type=count, default=20, help="how often JTT's second model sees the first's "
                        "errors per epoch")
    parser.add_argument("--self-points", type=count, nargs="+", default=[20, 100, 500], help="numbers of val images that "
                        "SELF's last layer is tuned on; the best on the rest of val is kept (its authors')")
    pixels.add_flag(parser)
    compute.add_flags(parser)
    parser.add_argument("--shard", type=stage.shard_of, default="0/1", help="i/n: train every n-th seed, from the i-th on")
    args = parser.parse_args(argv)
    args.seeds = list(dict.fromkeys(args.seeds))
    args.load_size = args.load_size or args.resolution
    if takes_synthetic(args.recipe) != bool(args.synthetic):
        raise InputError("--synthetic", f"{args.recipe} {'needs' if takes_synthetic(args.recipe) else 'does not use'} "
                         "synthetic images", "generate.py writes such a folder")
    if args.val == "synthetic" and not args.synthetic:
        raise InputError("--val synthetic", f"{args.recipe} uses no synthetic images", "use --val real")
    drawn_for = args.synthetic and files.read_json(args.synthetic / "config.json").get("arguments", {}).get("data")
    if args.groups and drawn_for and args.groups != "none" and args.groups.resolve() != Path(drawn_for).resolve():
        raise InputError(f"--groups {args.groups}", f"{args.synthetic} was drawn for the groups of {drawn_for}",
                         "draw images for these groups")
    if args.load_size < args.resolution:
        raise InputError("--load-size", f"{args.load_size} is smaller than the resolution", "use at least the resolution")
    classifiers.check_name(args.arch)
    if args.arch == "cnn" and args.weights != "none":
        raise InputError("--weights", "the cnn has no pretrained weights", "use --arch resnet50, for example")
    return args


def publish_seed(path, model, splits, log, args, key, seed, begin):
    from safetensors.torch import save_file

    rows = []
    for images in splits:
        for row, probabilities in zip(images.rows, predict(model, images, args.resolution).tolist()):
            rows.append({name: row[name] for name in ("file_name", "split", "y", "a")}
                        | {"prediction": max(range(len(probabilities)), key=probabilities.__getitem__)}
                        | {f"p{y}": f"{value:.6f}" for y, value in enumerate(probabilities)})
    with files.replacing(path) as out:
        out.mkdir()
        save_file({name: value.contiguous().cpu() for name, value in model.state_dict().items()},
                  out / "model.safetensors")
        files.write_csv(out / "predictions.csv", rows)
        files.write_csv(out / "log.csv", log)
        made.finish(out, args, key, seed=seed, **stage.spent(begin))


if __name__ == "__main__":
    stage.run(main)
