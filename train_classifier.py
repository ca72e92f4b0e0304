"""Stage 4: trains a classifier with one recipe, once a seed, and writes what it says of the val and test images.

    python train_classifier.py --recipe erm --data data/digits-0.95 --out runs/digits-0.95/classifiers/erm
    python train_classifier.py --recipe two-stage --synthetic runs/digits-0.95/synthetic/lora \\
        --data data/digits-0.95 --out runs/digits-0.95/classifiers/lora

The paper's recipe is two-stage: cross-entropy and supervised contrastive loss on balanced synthetic images, then
only the last layer on the real, biased ones (two-stage-whole: the whole network). ffr has cross-entropy alone, then the
whole network; mixed and filled train once, on real and synthetic images together. erm, reweight, resample, subg,
groupdro, jtt and dfr are peers on real images alone. Each keeps the epoch with the best worst-group accuracy on val;
dfr fits its last layer to val itself. None sees test.

Reads DATA and SYNTHETIC, folders in the one format. Writes OUT/seed<k>/ with model.safetensors, predictions.csv
(file_name, split, y, a, prediction, a probability a class), log.csv and config.json; last OUT/config.json.
"""

import copy
import sys
import time
from collections import namedtuple
from pathlib import Path

from data import imagefolder as folder

if __name__ == "__main__":
    folder.end_at_ctrl_c()  # torch takes seconds to import

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

from cluster import pick_device

# A recipe is a list of phases: which images, how they are drawn, which loss, which weights learn. "filled" images are
# the real ones and as many synthetic ones as bring every group to the size of the largest.
Phase = namedtuple("Phase", "images drawn loss learns")
ERM = Phase("real", "shuffled", "cross_entropy", "all")
PRETRAINED = Phase("synthetic", "shuffled", "contrastive", "all")
RECIPES = {
    "erm": [ERM],
    "reweight": [Phase("real", "shuffled", "group_weighted", "all")],
    "resample": [Phase("real", "group-balanced", "cross_entropy", "all")],
    "subg": [Phase("real", "smallest group", "cross_entropy", "all")],  # Idrissi et al. 2022
    "groupdro": [Phase("real", "group-balanced", "group_dro", "all")],
    "jtt": [Phase("real", "shuffled", "cross_entropy", "identification"),  # Liu et al. 2021, algorithm 1
            Phase("real", "errors upsampled", "cross_entropy", "all")],
    "dfr": [ERM, Phase("val", None, "logistic_regression", "last layer")],
    "mixed": [Phase("mixed", "shuffled", "cross_entropy", "all")],
    "filled": [Phase("filled", "shuffled", "cross_entropy", "all")],
    "ffr": [Phase("synthetic", "shuffled", "cross_entropy", "all"), ERM],  # From Fake to Real, arXiv 2308.04553
    "ffr-groupdro": [Phase("synthetic", "shuffled", "cross_entropy", "all"),
                     Phase("real", "group-balanced", "group_dro", "all")],
    "two-stage": [PRETRAINED, Phase("real", "shuffled", "cross_entropy", "last layer")],
    "two-stage-whole": [PRETRAINED, ERM],
    "two-stage-resample": [PRETRAINED, Phase("real", "group-balanced", "cross_entropy", "last layer")],
    "two-stage-groupdro": [PRETRAINED, Phase("real", "group-balanced", "group_dro", "last layer")],
    "two-stage-dfr": [PRETRAINED, Phase("val", None, "logistic_regression", "last layer")],
}


def takes_synthetic(recipe):
    return any(phase.images in ("synthetic", "mixed", "filled") for phase in RECIPES[recipe])


# ---------------------------------------------------------------------------------------------- the losses


class Losses:
    """The losses side by side, each a function of a batch: logits (B, C), features (B, D), y (B,), group (B,)."""

    def __init__(self, images, groups, args):
        self.args = args
        self.group_weights = torch.full((groups,), 1 / groups)
        sizes = images.group.bincount(minlength=groups)
        self.root_sizes = sizes.clamp(min=1).sqrt()
        self.rarity = len(images) / (sizes.clamp(min=1) * (sizes > 0).sum())  # mean 1 over the images

    def cross_entropy(self, logits, features, y, group):
        return F.cross_entropy(logits, y)

    def contrastive(self, logits, features, y, group):
        """Cross-entropy + lambda x supervised contrastive loss (paper, classifier pretraining)."""
        return F.cross_entropy(logits, y) + self.args.contrastive * supervised_contrastive(
            features, y, self.args.temperature)

    def group_weighted(self, logits, features, y, group):
        """Cross-entropy, each image weighted by the inverse size of its group."""
        return (F.cross_entropy(logits, y, reduction="none") * self.rarity.to(logits)[group]).mean()

    def group_dro(self, logits, features, y, group):
        """Group losses weighted by exponentiated gradient ascent (Sagawa et al. 2020, algorithm 1).

        As in the authors' code, a group without an image in the batch has loss 0, and the generalisation adjustment
        C / sqrt(size) (section 3.3) is added to the losses that move the weights.
        """
        weights = self.group_weights
        member = F.one_hot(group, len(weights)).float()
        losses = member.T @ F.cross_entropy(logits, y, reduction="none") / member.sum(0).clamp(min=1)
        weights.mul_((self.args.dro_step * (losses.detach().cpu() + self.args.dro_adjustment / self.root_sizes)).exp())
        weights.div_(weights.sum())
        return losses @ weights.to(losses)


def supervised_contrastive(features, y, temperature):
    """Supervised contrastive loss, L_out of Khosla et al. 2020, equation 2, of one view an image.

    features: (B, D) of unit length; y: (B,). Images without a partner of their class are left out.
    """
    similarity = features @ features.T / temperature
    others = ~torch.eye(len(y), dtype=torch.bool, device=y.device)
    log_prob = similarity - similarity.masked_fill(~others, -torch.inf).logsumexp(1, keepdim=True)
    partners = (y[:, None] == y[None]) & others
    per_image = -(log_prob * partners).sum(1) / partners.sum(1).clamp(min=1)
    return per_image[partners.any(1)].mean() if partners.any() else features.sum() * 0


# ----------------------------------------------------------------------------------------------- the network


class Classifier(nn.Module):
    """Features, a last layer, and a projection head for the contrastive loss (Khosla et al. 2020, section 3.1)."""

    def __init__(self, arch, weights, classes):
        super().__init__()
        self.backbone, width = cnn() if arch == "cnn" else resnet(arch, weights)
        self.last_layer = nn.Linear(width, classes)
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 64))

    def forward(self, images):
        features = self.backbone(images)
        return self.last_layer(features), F.normalize(self.projection(features), dim=1)


def cnn():
    """Four convolutions for images of 32 pixels; returns (module, width of its features)."""
    layers, channels = [], 3
    for width in (16, 32, 64, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                   nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels


def resnet(arch, weights):
    """torchvision's ResNet without its last layer; weights: imagenet, none, or a .safetensors file."""
    import torchvision
    from safetensors.torch import load_file

    try:
        network = getattr(torchvision.models, arch)(weights="IMAGENET1K_V1" if weights == "imagenet" else None)
        if weights.endswith(".safetensors"):
            network.load_state_dict(load_file(weights))
    except Exception as error:  # URLError, OSError, SafetensorError, RuntimeError of wrong shapes
        raise folder.InputError(f"--weights {weights}", f"can't be loaded: {str(error).splitlines()[0]}",
                                f"give a .safetensors file with a state dict of torchvision's {arch}") from None
    width, network.fc = network.fc.in_features, nn.Identity()
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's, in [0, 1]
    return nn.Sequential(v2.Normalize((2 * mean - 1).tolist(), (2 * deviation).tolist()), network), width


# ---------------------------------------------------------------------------------------------- the training


class Images:
    """All images of some rows in memory: pixels (N, 3, S, S) uint8, y (N,), group (N,) an index into `groups`."""

    def __init__(self, data, rows, size, groups):
        from torchvision.transforms.functional import pil_to_tensor
        from tqdm import tqdm

        self.rows, self.errors = rows, None
        self.pixels = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
        for pixels, row in zip(self.pixels, tqdm(rows, f"read {data}", unit="image", mininterval=1, disable=None)):
            pixels.copy_(pil_to_tensor(folder.load_image(data / row["file_name"], size)))
        self.y = torch.tensor([row["y"] for row in rows])
        self.group = torch.tensor([groups.index(folder.group_of(row)) for row in rows])

    def __len__(self):
        return len(self.rows)

    def joined(self, other, filled):
        """These images and the other's: all, or with `filled` the first so many as bring every group to the largest."""
        sizes, taken = self.group.bincount(minlength=int(other.group.max()) + 1), []
        for group in other.group.unique():
            members = (other.group == group).nonzero()[:, 0]
            taken.append(members[:sizes.max() - sizes[group]] if filled else members)
        taken, both = torch.cat(taken), copy.copy(self)
        both.rows = self.rows + [other.rows[i] for i in taken]
        for name in ("pixels", "y", "group"):
            setattr(both, name, torch.cat([getattr(self, name), getattr(other, name)[taken]]))
        return both

    def batches(self, drawn, size, rng, upsampling=1):
        """Index tensors of one epoch, of `size` each; the last may be shorter, but never a single image."""
        if drawn == "shuffled":
            order = torch.randperm(len(self), generator=rng)
        elif drawn == "smallest group":  # the same images in every epoch: as many of each group as the smallest has
            sizes = self.group.bincount()
            first = [(self.group == group).nonzero()[:, 0][:sizes[sizes > 0].min()] for group in self.group.unique()]
            order = torch.cat(first)
            order = order[torch.randperm(len(order), generator=rng)]
        elif drawn == "errors upsampled":  # what the model before got wrong stands `upsampling` times in the epoch
            order = torch.arange(len(self)).repeat_interleave(1 + (upsampling - 1) * self.errors.long())
            order = order[torch.randperm(len(order), generator=rng)]
        else:  # every group as often as every other (resampling with replacement)
            weights = 1 / self.group.bincount().float()
            order = torch.multinomial(weights[self.group], len(self), replacement=True, generator=rng)
        batches = list(order.split(size))
        if len(batches) > 1 and len(batches[-1]) == 1:  # batch normalisation can't learn from one image
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches


def random_crops(pixels, size):
    """Another crop and perhaps a flip of each image, as the peers train (Group-DRO's and DFR's code)."""
    crop = v2.Compose([v2.RandomResizedCrop(size, scale=(0.7, 1), ratio=(3 / 4, 4 / 3), antialias=True),
                       v2.RandomHorizontalFlip()])
    return torch.stack([crop(image) for image in pixels])


def to_input(pixels, device, size):
    """uint8 -> float in [-1, 1], the middle of each image, `size` pixels a side."""
    pixels = pixels if size == pixels.shape[-1] else v2.functional.center_crop(pixels, size)
    return pixels.to(device, torch.float, memory_format=torch.channels_last) / 127.5 - 1


def train_phase(model, phase, images, val, losses, args, seed, log):
    """Trains the weights that the phase lets learn and leaves those of the epoch that was best on val.

    Returns its worst-group accuracy on val. An identification phase stops early and leaves those of its last epoch.
    Raises FloatingPointError at the first epoch whose loss is no finite number.
    """
    device = next(model.parameters()).device
    last_layer = phase.learns == "last layer"
    learning = model.last_layer if last_layer else model
    identifies = phase.learns == "identification"
    epochs, rate = (args.last_layer_epochs, args.last_layer_rate) if last_layer else (
        args.jtt_epochs if identifies else args.epochs, args.learning_rate)
    optimizer = torch.optim.SGD(learning.parameters(), rate, momentum=0.9, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    if last_layer:  # the rest stands still, batch statistics included: its features are computed once
        features, val_features = (features_of(model, part, args.resolution) for part in (images, val))
    loss_of, best, kept = getattr(losses, phase.loss), -1.0, None
    for epoch in range(epochs):
        model.train(not last_layer)
        total = 0.0
        rng = torch.Generator().manual_seed(folder.seed_of(seed, phase, epoch))
        torch.manual_seed(folder.seed_of(seed, phase, epoch, "crops"))
        batches = images.batches(phase.drawn, args.batch, rng, args.jtt_upsampling)
        for batch in batches:
            if last_layer:
                logits, embedded = model.last_layer(features[batch]), None
            else:
                pixels = images.pixels[batch]
                pixels = random_crops(pixels, args.resolution) if args.augment == "crop-flip" else pixels
                logits, embedded = model(to_input(pixels, device, args.resolution))
            loss = loss_of(logits, embedded, images.y[batch].to(device), images.group[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / len(batches)
        if not total < float("inf"):
            raise FloatingPointError(f"seed {seed}: loss is {total} in epoch {epoch} on {phase.images} images "
                                     f"(learning rate {rate:g}, batch {args.batch})")
        schedule.step()
        answers = model.last_layer(val_features).cpu() if last_layer else predict(model, val, args.resolution)
        accuracies = folder.group_accuracies(val.rows, answers.argmax(1).tolist())
        log.append({"images": phase.images, "epoch": epoch, "loss": round(total, 6),
                    "val_worst_group": round(min(accuracies.values()), 6)}
                   | {f"val_{group}": round(value, 6) for group, value in accuracies.items()})
        if identifies or min(accuracies.values()) > best:
            best = min(accuracies.values())
            kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)
    return best


def fit_last_layer(model, val, args, seed):
    """Deep feature reweighting (Kirichenko et al. 2023, section 5): the last layer anew, on balanced parts of val.

    L1 logistic regression on standardised features; its strength is chosen on the other half of val, and the layer is
    the mean of 20 fits, as in the authors' code. Returns the chosen strength's worst-group accuracy on that half.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.preprocessing import StandardScaler

    features = features_of(model, val, args.resolution).cpu().numpy()
    y, group = val.y.numpy(), val.group.numpy()
    rng = np.random.default_rng(folder.seed_of(seed, "dfr"))

    def balanced(indices):
        parts = [rng.permutation(indices[group[indices] == g]) for g in np.unique(group[indices])]
        return np.concatenate([part[:min(map(len, parts))] for part in parts])

    def fit(indices, strength):
        scaler = StandardScaler().fit(features[indices])
        layers = OneVsRestClassifier(LogisticRegression(l1_ratio=1, C=strength, solver="liblinear", random_state=0))
        layers.fit(scaler.transform(features[indices]), y[indices])
        weight = np.concatenate([one.coef_ for one in layers.estimators_]) / scaler.scale_
        bias = np.concatenate([one.intercept_ for one in layers.estimators_]) - weight @ scaler.mean_
        if len(layers.classes_) == 2:  # one regression tells two classes
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        return weight, bias

    order = rng.permutation(len(y))
    half, other = order[:len(order) // 2], order[len(order) // 2:]

    def worst(layer):
        right = (features[other] @ layer[0].T + layer[1]).argmax(1) == y[other]
        return min(right[group[other] == g].mean() for g in np.unique(group[other]))

    scores = {strength: worst(fit(balanced(half), strength)) for strength in (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)}
    strength = max(scores, key=scores.get)
    layers = [fit(balanced(np.arange(len(y))), strength) for _ in range(20)]
    with torch.no_grad():
        for parameter, values in zip((model.last_layer.weight, model.last_layer.bias), zip(*layers)):
            parameter.copy_(torch.from_numpy(np.mean(values, axis=0)))
    return scores[strength]


@torch.no_grad()
def features_of(model, images, size):
    """What the last layer sees, (N, D); size: pixels a side that the model sees."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat([model.backbone(to_input(part, device, size)) for part in images.pixels.split(256)])


@torch.no_grad()
def predict(model, images, size):
    """Class probabilities (N, C) on the CPU."""
    return model.last_layer(features_of(model, images, size)).softmax(1).cpu()


def train(phases, images, val, groups, classes, device, args, seed, log):
    """Goes through a recipe's phases; images: {name: Images}. Returns (classifier, worst-group accuracy on val)."""
    real = images["real"]
    for phase in phases:
        if phase is phases[0] or phase.drawn == "errors upsampled":
            torch.manual_seed(folder.seed_of(seed))  # the first weights of a seed are the same for every recipe
            model = Classifier(args.arch, args.weights, classes).to(device, memory_format=torch.channels_last)
        if phase.loss == "logistic_regression":
            best = fit_last_layer(model, val, args, seed)
        else:
            losses = Losses(images[phase.images], groups, args)
            best = train_phase(model, phase, images[phase.images], val, losses, args, seed, log)
        if phase.learns == "identification":
            real.errors = predict(model, real, args.resolution).argmax(1) != real.y
            print(f"{args.out.name} seed {seed}: {real.errors.sum()} of {len(real)} images to be upsampled")
    return model, best


# ------------------------------------------------------------------------------------------------ the stage


def main():
    args = parse()
    phases = RECIPES[args.recipe]
    rows = {split: folder.read_metadata(args.data, split) for split in folder.SPLITS}
    needs_synthetic = takes_synthetic(args.recipe)
    if needs_synthetic != bool(args.synthetic):
        raise folder.InputError("--synthetic", f"{args.recipe} {'needs it' if needs_synthetic else 'takes none'}",
                                "generate.py writes such a folder")
    synthetic = folder.read_metadata(args.synthetic, "train") if args.synthetic else []
    everything = [row for part in (*rows.values(), synthetic) for row in part]
    groups = list(folder.group_counts(everything))
    classes = 1 + max(row["y"] for row in everything)
    settings = {name: value for name, value in vars(args).items()
                if name not in ("data", "synthetic", "out", "device", "seeds", "shard")}
    key = folder.digest(settings, folder.code_digest(__file__), *(folder.folder_digest(args.data, part)
                        for part in rows.values()), folder.folder_digest(args.synthetic, synthetic))
    (args.out / "config.json").unlink(missing_ok=True)
    shard, shards = args.shard
    todo = [seed for seed in args.seeds[shard::shards] if not folder.published(args.out / f"seed{seed}", key)]
    if todo:
        device = pick_device(args.device)
        images = {"real": (real := Images(args.data, rows["train"], args.load_size, groups))}
        if synthetic:
            images["synthetic"] = drawn = Images(args.synthetic, synthetic, args.load_size, groups)
        if phases[0].images in ("mixed", "filled"):
            images[phases[0].images] = real.joined(drawn, phases[0].images == "filled")
        val, test = (Images(args.data, rows[split], args.load_size, groups) for split in ("val", "test"))
    failures = []
    for seed in todo:
        start, log = time.monotonic(), []
        try:
            model, best = train(phases, images, val, len(groups), classes, device, args, seed, log)
        except FloatingPointError as error:
            failures.append(f"train_classifier.py: error: {error}")
            continue
        publish(args.out / f"seed{seed}", model, [val, test], log, args, key, seed, start)
        print(f"{args.out.name} seed {seed}: worst-group accuracy on val {best:.3f}", flush=True)
    if failures:
        sys.exit("\n".join(failures))
    if shards == 1:
        for path in args.out.glob("seed*"):
            if path.name not in {f"seed{seed}" for seed in args.seeds}:
                folder.remove(path)
        folder.write_config(args.out, args, key)


def parse():
    parser = folder.Arguments(__doc__)
    count, rate = folder.number(int, 1), folder.number(float, 0)
    parser.add_argument("--recipe", choices=tuple(RECIPES), required=True, help="how to train, see above")
    parser.add_argument("--data", type=Path, required=True, help="real images: folder in the one format")
    parser.add_argument("--synthetic", type=Path, help="synthetic images: folder of generate.py")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the seeds to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one classifier each")
    parser.add_argument("--arch", choices=("cnn", "resnet18", "resnet50"), default="cnn", help="cnn: for 32 pixels")
    parser.add_argument("--weights", default="none", help="of a resnet: imagenet, none, or a .safetensors file")
    parser.add_argument("--resolution", type=count, default=32, help="pixels a side that the classifier sees")
    parser.add_argument("--load-size", type=count, help="pixels a side that images are resized to; the classifier sees "
                        "their middle; default: the resolution")
    parser.add_argument("--augment", choices=("none", "crop-flip"), default="none",
                        help="crop-flip: random crops of 70 to 100 %% and flips while all weights learn")
    parser.add_argument("--epochs", type=count, default=30, help="of a phase in which all weights learn")
    parser.add_argument("--learning-rate", type=rate, default=0.02, help="of SGD with momentum 0.9, cosine to 0")
    parser.add_argument("--last-layer-epochs", type=count, default=30, help="of the phase on the last layer")
    parser.add_argument("--last-layer-rate", type=rate, default=0.001, help="learning rate of that phase")
    parser.add_argument("--weight-decay", type=rate, default=1e-4, help="of SGD")
    parser.add_argument("--batch", type=folder.number(int, 2), default=64, help="images a step")
    parser.add_argument("--contrastive", type=rate, default=0.5, help="lambda: weight of the contrastive loss")
    parser.add_argument("--temperature", type=folder.number(float, 1e-6), default=0.1, help="of the contrastive loss")
    parser.add_argument("--dro-step", type=rate, default=0.01, help="step size of Group-DRO's weights (its authors')")
    parser.add_argument("--dro-adjustment", type=rate, default=0.0, help="C of Group-DRO's generalisation adjustment")
    parser.add_argument("--jtt-epochs", type=count, default=2, help="of JTT's first model, whose errors are upsampled")
    parser.add_argument("--jtt-upsampling", type=count, default=20, help="how often its second sees each an epoch")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu or auto")
    parser.add_argument("--shard", type=folder.shard_of, default="0/1",
                        help="i/n: train every n-th seed, from the i-th")
    args = parser.parse_args()
    args.load_size = args.load_size or args.resolution
    if args.load_size < args.resolution:
        raise folder.InputError("--load-size", f"{args.load_size} is less than the resolution", "make it as large")
    if args.arch == "cnn" and args.weights != "none":
        raise folder.InputError("--weights", "the cnn has no pretrained weights", "use --arch resnet18 or resnet50")
    return args


def publish(path, model, splits, log, args, key, seed, start):
    from safetensors.torch import save_file

    rows = []
    for images in splits:
        for row, probabilities in zip(images.rows, predict(model, images, args.resolution).tolist()):
            rows.append({name: row[name] for name in ("file_name", "split", "y", "a")}
                        | {"prediction": max(range(len(probabilities)), key=probabilities.__getitem__)}
                        | {f"p{y}": f"{value:.6f}" for y, value in enumerate(probabilities)})
    with folder.replacing(path) as out:
        out.mkdir()
        save_file({name: value.contiguous().cpu() for name, value in model.state_dict().items()},
                  out / "model.safetensors")
        folder.write_csv(out / "predictions.csv", rows)
        folder.write_csv(out / "log.csv", log)
        folder.write_config(out, args, key, seed=seed, **folder.spent(start))


if __name__ == "__main__":
    folder.run(main)
