"""The classifier network, the images that it sees, and its predictions."""

import copy
import importlib.util
import itertools

from common import imagefolder, stage
from common.files import InputError
from common.pixels import Pixels, ahead

np = stage.lazy("numpy")
torch = stage.lazy("torch")

# ----------------------------------------------------------------------------------------------- the network


def new_classifier(arch, weights, classes, bf16=False):
    """A torch module with three parts: backbone (images -> features), last_layer (features -> logits), and projection,
    the head that the contrastive loss sees (Khosla et al. 2020, section 3.1). bf16: the backbone computes in bfloat16."""
    model = torch.nn.Module()
    model.bf16 = bf16
    model.backbone, width = cnn() if arch == "cnn" else pretrained(arch, weights)
    model.last_layer = torch.nn.Linear(width, classes)
    model.projection = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 64))
    return model


def check_network(args, classes):
    """Raises InputError if the network or its weights cannot be loaded, or if it does not take images of --resolution."""
    model = new_classifier(args.arch, args.weights, classes).eval()
    try:
        with torch.no_grad():
            model.last_layer(model.backbone(torch.zeros(1, 3, args.resolution, args.resolution)))
    except Exception as error:  # each network has its own way of refusing
        raise InputError(f"--arch {args.arch}", f"does not take images of {args.resolution} pixels: "
                         f"{str(error).splitlines()[0]}", "try --resolution 224") from None


def check_name(arch):
    """Raises InputError unless there is such a network."""
    if arch in ("cnn", "resnet18", "resnet50"):
        return  # at once: torchvision takes seconds to import
    import torchvision

    if arch not in torchvision.models.list_models(torchvision.models):
        timm = importlib.util.find_spec("timm") and importlib.import_module("timm")
        if not timm or not timm.is_model(arch):
            raise InputError(f"--arch {arch}", "is neither cnn nor in torchvision.models",
                             "for a network of timm, pip install timm")


def cnn():
    """Four convolutions for images of 32 pixels; returns (module, width of its features)."""
    nn, layers, channels = torch.nn, [], 3
    for width in (8, 16, 32, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.MaxPool2d(2),
                   nn.ReLU(inplace=True)]  # after the pooling: the same function, on a quarter of the values
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels


def pretrained(arch, weights):
    """A network of torchvision (or timm) without its last layer; weights: imagenet, none, or a .safetensors file.

    Returns (module, width of its features). Raises InputError if there is no such network, or if the weights do not fit.
    """
    import torchvision  # takes seconds to import
    from safetensors.torch import load_file

    try:
        if arch in torchvision.models.list_models(torchvision.models):
            network = torchvision.models.get_model(arch, weights="IMAGENET1K_V1" if weights == "imagenet" else None)
        else:
            network = importlib.import_module("timm").create_model(arch, pretrained=weights == "imagenet")
    except Exception as error:  # URLError, RuntimeError, ValueError, ...
        raise InputError(f"--arch {arch}", f"cannot be loaded with weights {weights}: {str(error).splitlines()[0]}",
                         "give --weights none, or a .safetensors file") from None
    try:
        if weights.endswith(".safetensors"):
            network.load_state_dict(load_file(weights))
    except Exception as error:  # OSError, SafetensorError, RuntimeError for wrong shapes
        raise InputError(f"--weights {weights}", f"cannot be loaded: {str(error).splitlines()[0]}",
                         f"give a .safetensors file with a state dict of {arch}") from None
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)]
    if not layers or getattr(network, "aux_logits", False):
        raise InputError(f"--arch {arch}", "has no linear last layer, or several outputs", "use another network")
    name, last = layers[-1]
    network.set_submodule(name, torch.nn.Identity())
    return torch.nn.Sequential(as_for_imagenet(), network), last.in_features


def as_for_imagenet():
    """A layer that normalises pixels in [-1, 1] as networks trained on ImageNet expect."""
    from torchvision.transforms import v2  # takes seconds to import

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # in [0, 1]
    return v2.Normalize((2 * mean - 1).tolist(), (2 * std).tolist())


def whole_network(arch, weights, classes):
    """A network of torchvision with its own last layer, and a .safetensors file of all its weights: pixels in [-1, 1] (B, 3, S,
    S) -> logits (B, classes). Raises InputError if they do not fit."""
    import torchvision  # takes seconds to import
    from safetensors.torch import load_file

    check_name(arch)
    try:
        network = torchvision.models.get_model(arch, weights=None, num_classes=classes)
        network.load_state_dict(load_file(weights))
    except Exception as error:  # OSError, SafetensorError, RuntimeError for wrong shapes
        raise InputError(f"--weights {weights}", f"cannot be loaded: {str(error).splitlines()[0]}",
                         f"give a .safetensors file with the whole state dict of {arch}, for {classes} classes") from None
    return torch.nn.Sequential(as_for_imagenet(), network).eval()


# ------------------------------------------------------------------------------------------------ the images


class Images:
    """The images of some rows: pixels (see Pixels), y (N,), group (N,) an index into `groups`, where these are given."""

    def __init__(self, data, rows, size, groups, cache=True):
        self.rows, self.errors = rows, None
        self.pixels = Pixels(data, rows, size, cache)
        self.y = torch.tensor([row["y"] for row in rows])
        self.group = groups and torch.tensor([groups.index(imagefolder.group_of(row)) for row in rows])

    def __len__(self):
        return len(self.rows)

    def joined(self, other, filled):
        """These images and the other's: all, or with `filled` as many as bring every group to the largest size."""
        sizes, taken = self.group.bincount(minlength=int(other.group.max()) + 1), []
        for group in other.group.unique():
            members = (other.group == group).nonzero()[:, 0]
            taken.append(members[:sizes.max() - sizes[group]] if filled else members)
        taken, both = torch.cat(taken), copy.copy(self)
        both.rows, both.pixels = self.rows + [other.rows[i] for i in taken], self.pixels.joined(other.pixels, taken)
        for name in ("y", "group"):
            setattr(both, name, torch.cat([getattr(self, name), getattr(other, name)[taken]]))
        return both

    def batches(self, drawn, size, rng, upsampling=1):
        """Index tensors of one epoch, of `size` each; the last may be shorter, but never a single image."""
        if drawn == "shuffled":
            order = torch.randperm(len(self), generator=rng)
        elif drawn == "smallest group":  # the same images in every epoch: of each group as many as the smallest has
            sizes = self.group.bincount()
            first = [(self.group == group).nonzero()[:, 0][:sizes[sizes > 0].min()] for group in self.group.unique()]
            order = torch.cat(first)
            order = order[torch.randperm(len(order), generator=rng)]
        elif drawn == "errors upsampled":  # the first model's errors appear `upsampling` times per epoch
            order = torch.arange(len(self)).repeat_interleave(1 + (upsampling - 1) * self.errors.long())
            order = order[torch.randperm(len(order), generator=rng)]
        else:
            order = equally_often({"class-balanced": self.y, "group-balanced": self.group}[drawn], rng)
        batches = list(order.split(size))
        if len(batches) > 1 and len(batches[-1]) == 1:  # batch normalisation cannot learn from one image
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches


def equally_often(labels, rng):
    """As many indices as there are labels (N,), drawn with replacement, every label equally often."""
    return torch.multinomial((1 / labels.bincount().double())[labels], len(labels), replacement=True, generator=rng)


def on_device(pixels, batches, device):
    """The images of each batch of indices, (B, 3, S, S) uint8 on the device; a GPU does not wait for the next batch."""
    if device.type == "cuda":
        yield from (found.to(device, non_blocking=True) for found in ahead(lambda batch: pixels[batch].pin_memory(), batches))
    else:
        yield from (pixels[batch].to(device) for batch in batches)


def to_input(pixels, size):
    """uint8 pixels (B, 3, S, S) -> float in [-1, 1], the middle `size` pixels of each side."""
    start = round((pixels.shape[-1] - size) / 2)
    pixels = pixels[..., start:start + size, start:start + size]
    return pixels.to(torch.float, memory_format=torch.channels_last) / 127.5 - 1


def random_crops(pixels, size):
    """uint8 pixels (B, 3, S, S) -> float in [-1, 1] (B, 3, size, size): of each image a random crop, or its mirror image.

    Crops of 70 to 100 % of the area, as in the code of Group-DRO and DFR; all of a batch are resized at once, bilinearly.
    """
    from torchvision.transforms import v2  # takes seconds to import

    side, boxes = pixels.shape[-1], torch.empty(len(pixels), 2, 3)
    for box in boxes:  # where in the image, from -1 to 1, a pixel of the crop, from -1 to 1, comes from
        top, left, height, width = v2.RandomResizedCrop.get_params(pixels[0], scale=(0.7, 1), ratio=(3 / 4, 4 / 3))
        mirror = 1 - 2 * int(torch.rand(()) < 0.5)
        box.copy_(torch.tensor([[mirror * width / side, 0, (2 * left + width) / side - 1],
                                [0, height / side, (2 * top + height) / side - 1]]))
    grid = torch.nn.functional.affine_grid(boxes.to(pixels.device), (len(pixels), 3, size, size), align_corners=False)
    crops = torch.nn.functional.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)
    return crops.contiguous(memory_format=torch.channels_last) / 127.5 - 1


# ------------------------------------------------------------------------------------------- the predictions


def features_of(model, images, size):
    """The features that the last layer sees, (N, D); size: pixels per side that the model sees."""
    model.eval()
    device = next(model.parameters()).device
    batches = torch.arange(len(images.y)).split(256)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=model.bf16):
        return torch.cat([model.backbone(to_input(part, size)) for part in on_device(images.pixels, batches, device)]).float()


def predict(model, images, size):
    """Class probabilities (N, C) on the CPU."""
    with torch.no_grad():
        return model.last_layer(features_of(model, images, size)).softmax(1).cpu()


# -------------------------------------------------------------------------------- the last layer, refitted on val


def halves(count, rng):
    """Two random halves of range(count): one to learn from, one to choose settings by. As DFR and SELF do."""
    return np.split(rng.permutation(count), [count // 2])


def worst_group(correct, group):
    """The worst accuracy of a group; correct: (N,) bool, group: (N,)."""
    return min(correct[group == g].mean() for g in np.unique(group))


def deep_feature_reweighting(model, val, history, args, seed):
    """Deep feature reweighting (Kirichenko et al. 2023, section 5): the last layer anew, on balanced parts of val.

    L1 logistic regression on standardised features; its strength is chosen on the other half of val, and the layer is
    the mean of 20 fits, as in the authors' code. Returns the chosen strength's worst-group accuracy on that half.
    """
    from sklearn.linear_model import LogisticRegression  # takes seconds to import
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.preprocessing import StandardScaler

    features = features_of(model, val, args.resolution).cpu().numpy()
    y, group = val.y.numpy(), val.group.numpy()
    rng = np.random.default_rng(stage.seed_of(seed, "dfr"))

    def balanced(indices):
        parts = [rng.permutation(indices[group[indices] == g]) for g in np.unique(group[indices])]
        return np.concatenate([part[:min(map(len, parts))] for part in parts])

    def fit(indices, strength):
        scaler = StandardScaler().fit(features[indices])
        layers = OneVsRestClassifier(LogisticRegression(l1_ratio=1, C=strength, solver="liblinear", random_state=0))
        layers.fit(scaler.transform(features[indices]), y[indices])
        weight = np.concatenate([one.coef_ for one in layers.estimators_]) / scaler.scale_
        bias = np.concatenate([one.intercept_ for one in layers.estimators_]) - weight @ scaler.mean_
        if len(layers.classes_) == 2:  # one regression separates two classes
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        return weight, bias

    half, other = halves(len(y), rng)
    if not set(y[half]) == set(y[other]) == set(y):
        raise InputError(args.data, "has too few val images: one half of them lacks a class", "add some")

    def score(layer):
        return worst_group((features[other] @ layer[0].T + layer[1]).argmax(1) == y[other], group[other])

    scores = {strength: score(fit(balanced(half), strength))
              for strength in (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)}
    strength = max(scores, key=scores.get)
    layers = [fit(balanced(np.arange(len(y))), strength) for _ in range(20)]
    with torch.no_grad():
        for parameter, values in zip((model.last_layer.weight, model.last_layer.bias), zip(*layers)):
            parameter.copy_(torch.from_numpy(np.mean(values, axis=0)))
    return scores[strength]


def early_stop_disagreement(model, val, history, args, seed):
    """SELF (LaBonte et al. 2023): the last layer, tuned on the points of val whose prediction changed most in training.

    As in the authors' code (tmlabonte/last-layer-retraining, 40612d4, "early-stop disagreement"): the points are chosen
    from one half of val without any label; class-balanced batches of them tune ERM's layer for 250 steps; the number of
    points, the learning rate and the early epoch (10, 20 or 50 % of all) are those with the best worst group on the other
    half, which alone needs group labels. Ours: images are not augmented, and the backbone's batch statistics are frozen.
    history: class probabilities (N, C) on val after each epoch. Returns the chosen worst-group accuracy.
    """
    features, best = features_of(model, val, args.resolution), -1.0
    half, other = halves(len(val.y), np.random.default_rng(stage.seed_of(seed, "self")))
    for points, rate, share in itertools.product(args.self_points, (1e-4, 1e-3, 1e-2), (0.1, 0.2, 0.5)):
        early = history[max(round(share * len(history)), 1) - 1]
        chosen = half[disagreeing(early[half], history[-1][half], points).numpy()]
        rng = torch.Generator().manual_seed(stage.seed_of(seed, "self", points, rate, share))
        layer = tuned(model.last_layer, features[chosen], val.y[chosen], rate, args, rng)
        correct = layer(features[other]).argmax(1).cpu() == val.y[other]
        score = worst_group(correct.numpy(), val.group[other].numpy())
        if score >= best:  # of equals the last, as in the authors' code
            best, kept = score, layer
    model.last_layer = kept
    return best


def disagreeing(early, final, points):
    """The rows, at most `points`, at which two models' class probabilities (N, C) differ most, by KL(early || final)."""
    final = final.clamp(min=torch.finfo(final.dtype).tiny)  # log 0 would make the divergence of equal points NaN
    divergence = torch.nn.functional.kl_div(final.log(), early, reduction="none").mean(1)
    return divergence.topk(min(points, len(divergence))).indices


def tuned(layer, features, y, rate, args, rng, steps=250):
    """A copy of the layer, trained on class-balanced batches of features (N, D), y (N,).

    SGD without momentum: the authors' code sets one, but where torch does not read it.
    """
    layer, batches = copy.deepcopy(layer), []
    optimizer = torch.optim.SGD(layer.parameters(), rate, weight_decay=args.weight_decay)
    while len(batches) < steps:
        batches += equally_often(y, rng).split(args.batch)
    for batch in batches[:steps]:
        loss = torch.nn.functional.cross_entropy(layer(features[batch]), y[batch].to(features.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer
