"""The classifier network, the images that it sees, and its predictions."""

import copy
import importlib.util
import pickle

from common import files, imagefolder, stage
from common.files import InputError
from common.pixels import Pixels, ahead

np = stage.lazy("numpy")
torch = stage.lazy("torch")

# ------------------------------------------------------------------------------------ the network


def new_classifier(arch, weights, classes):
    """A torch module of backbone (images -> features), last_layer (features -> logits), projection.

    The projection is the head that the contrastive loss sees (Khosla et al. 2020, section 3.1).
    """
    nn = torch.nn
    model = nn.Module()
    model.backbone, width = cnn() if arch == "cnn" else pretrained(arch, weights)
    model.last_layer = nn.Linear(width, classes)
    model.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 64))
    return model


def cnn():
    """Four convolutions for images of 32 pixels; returns (module, width of its features)."""
    nn, layers, channels = torch.nn, [], 3
    for width in (8, 16, 32, 64):  # the ReLU after the pooling: the same, on a quarter of values
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
                   nn.MaxPool2d(2), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels


def pretrained(arch, weights):
    """A network of torchvision or timm without its last layer: (module, width of its features).

    weights: imagenet, none, or a file of weights. Raises InputError if they do not fit.
    """
    imagenet = weights == "imagenet"
    network = named_network(arch, {"weights": "IMAGENET1K_V1" if imagenet else None},
                            {"pretrained": imagenet}, weights)
    if weights not in ("imagenet", "none"):
        load_weights(network, weights, f"give a file with a state dict of {arch}")
    layers = [(name, layer) for name, layer in network.named_modules()
              if isinstance(layer, torch.nn.Linear)]
    if not layers or getattr(network, "aux_logits", False):
        raise InputError(f"--arch {arch}", "has no linear last layer, or several outputs",
                         "use another network")
    name, last = layers[-1]
    network.set_submodule(name, torch.nn.Identity())
    return torch.nn.Sequential(normalised(network), network), last.in_features


def whole_network(arch, weights, classes, mean=None, std=None):
    """A network with its own last layer: pixels in [-1, 1] -> logits (B, classes); and its size.

    weights: a file of all its weights; mean, std: of red, green and blue in [0, 1]. Raises
    InputError if they do not fit. The size is that of its images in pixels.
    """
    check_name(arch)
    network = named_network(arch, {"weights": None, "num_classes": classes},
                            {"num_classes": classes}, weights)
    load_weights(network, weights, f"give a file with the whole state dict of {arch}, for "
                 f"{classes} classes")
    size = getattr(network, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[-1]
    return torch.nn.Sequential(normalised(network, mean, std), network).eval(), size


def named_network(arch, torchvision_options, timm_options, weights):
    import torchvision  # takes seconds to import

    try:
        if arch in torchvision.models.list_models(torchvision.models):
            return torchvision.models.get_model(arch, **torchvision_options)
        return importlib.import_module("timm").create_model(arch, **timm_options)
    except Exception as error:  # URLError, RuntimeError, ValueError, ...
        raise InputError(f"--arch {arch}", f"cannot be loaded with weights {weights}: "
                         f"{files.reason(error)}",
                         "give --weights none, or a file of weights") from None


def load_weights(network, path, todo):
    """Loads a state dict from .safetensors, or as torch.save writes it, which runs no code.

    As it is found in the wild: in a dict of a training script, below `module.` or `model.`.
    """
    from safetensors.torch import load_file

    try:
        is_safe = str(path).endswith(".safetensors")
        state = load_file(path) if is_safe else torch.load(path, "cpu", weights_only=True)
        for name in ("state_dict", "model_state_dict", "model"):
            if isinstance(state.get(name), dict):
                state = state[name]
        for prefix in ("_orig_mod.", "module.", "model."):
            if all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): value for name, value in state.items()}
        network.load_state_dict(state)
    except pickle.UnpicklingError:
        raise InputError(f"--weights {path}", "holds more than weights, such as a whole model",
                         "save the weights alone: torch.save(model.state_dict(), "
                         "'weights.pth')") from None
    except Exception as error:  # OSError, SafetensorError, RuntimeError for wrong shapes
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"--weights {path}", f"cannot be loaded: {reason}", todo) from None


def normalised(network, mean=None, std=None):
    """A layer that normalises pixels in [-1, 1] as a network expects: timm's, or ImageNet's."""
    from torchvision.transforms import v2  # takes seconds to import

    own = getattr(network, "pretrained_cfg", {})  # of timm
    mean = torch.tensor(mean or own.get("mean") or (0.485, 0.456, 0.406))
    std = torch.tensor(std or own.get("std") or (0.229, 0.224, 0.225))
    return v2.Normalize((2 * mean - 1).tolist(), (2 * std).tolist())  # these are in [0, 1]


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


def check_network(arch, weights, classes, resolution):
    """Raises InputError if the network cannot be loaded, or takes no images of this size."""
    model = new_classifier(arch, weights, classes).eval()
    try:
        with torch.no_grad():
            model.last_layer(model.backbone(torch.zeros(1, 3, resolution, resolution)))
    except Exception as error:  # each network has its own way of refusing
        raise InputError(f"--arch {arch}", f"does not take images of {resolution} pixels: "
                         f"{files.reason(error)}", "try --resolution 224") from None


# ------------------------------------------------------------------------------------- the images


def absent(rows, synthetic, classes):
    """Lines about what training lacks: classes without any image, groups without val images.

    rows: {split: rows of metadata}; synthetic: rows of training images; classes: their number.
    """
    everything, lines = [row for part in rows.values() for row in part], []
    seen = {row["y"] for row in (*rows["train"], *synthetic)}
    empty = [str(y) for y in range(classes) if y not in seen]
    if empty:
        lines.append(f"note: no training images of class {', '.join(empty)}; labels should count "
                     "from 0 without gaps\n")
    titles = imagefolder.group_titles(everything)
    tested = imagefolder.group_counts(rows["val"])
    missing = [title for group, title in titles.items() if group not in tested]
    if missing:
        lines.append(f"note: no val images of {', '.join(missing)}; epochs are chosen by the worst "
                     f"of {len(tested)} of {len(titles)} groups\n")
    return lines


class Images:
    """Images of some rows: pixels (see Pixels), y (N,), and group (N,), an index in `groups`."""

    def __init__(self, data, rows, size, groups, cache=True):
        self.rows, self.errors = rows, None
        self.pixels = Pixels(data, rows, size, cache)
        self.y = torch.tensor([row["y"] for row in rows])
        if groups:
            self.group = torch.tensor([groups.index(imagefolder.group_of(row)) for row in rows])

    def __len__(self):
        return len(self.rows)

    def joined(self, other, filled):
        """These images and the other's: all, or as many as bring every group to the largest."""
        sizes, taken = self.group.bincount(minlength=int(other.group.max()) + 1), []
        for group in other.group.unique():
            members = (other.group == group).nonzero()[:, 0]
            if filled:  # as many as the group lacks, of all clusters
                lacking = min(len(members), int(sizes.max() - sizes[group]))
                members = members[torch.arange(lacking) * len(members) // max(lacking, 1)]
            taken.append(members)
        taken, both = torch.cat(taken), copy.copy(self)
        both.rows = self.rows + [other.rows[i] for i in taken]
        both.pixels = self.pixels.joined(other.pixels, taken)
        both.y = torch.cat([self.y, other.y[taken]])
        both.group = torch.cat([self.group, other.group[taken]])
        return both

    def batches(self, drawn, size, rng, upsampling=1, seed=0):
        """Index tensors of one epoch, of `size` each; the last may be shorter, but not of one."""
        if drawn == "class-balanced":
            order = equally_often(self.y, rng)
        elif drawn == "group-balanced":
            order = equally_often(self.group, rng)
        else:
            order = torch.arange(len(self))
            if drawn == "smallest group":  # at random, but the same in every epoch
                sizes = self.group.bincount()
                order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
                order = torch.cat([order[self.group[order] == group][:sizes[sizes > 0].min()]
                                   for group in self.group.unique()])
            elif drawn == "errors upsampled":  # the first model's errors, `upsampling` times
                order = order.repeat_interleave(1 + (upsampling - 1) * self.errors.long())
            order = order[torch.randperm(len(order), generator=rng)]
        batches = list(order.split(size))
        if len(batches) > 1 and len(batches[-1]) == 1:  # batch norm cannot learn from one image
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches


def equally_often(labels, rng):
    """As many indices as labels (N,), drawn with replacement, every label equally often."""
    weights = (1 / labels.bincount().double())[labels]
    return torch.multinomial(weights, len(labels), replacement=True, generator=rng)


def on_device(pixels, batches, device):
    """The images of each batch of indices, (B, 3, S, S) uint8; a GPU does not wait for the next."""
    if device.type == "cuda":
        for found in ahead(lambda batch: pixels[batch].pin_memory(), batches):
            yield found.to(device, non_blocking=True)
    else:
        for batch in batches:
            yield pixels[batch].to(device)


def to_input(pixels, size):
    """uint8 pixels (B, 3, S, S) -> float in [-1, 1], the middle `size` pixels of each side."""
    start = round((pixels.shape[-1] - size) / 2)
    pixels = pixels[..., start:start + size, start:start + size]
    return pixels.to(torch.float, memory_format=torch.channels_last) / 127.5 - 1


def random_crops(pixels, size):
    """uint8 pixels (B, 3, S, S) -> float in [-1, 1] (B, 3, size, size): random crops and mirrors.

    Of 70 to 100 % of the area, as in the code of Group-DRO and DFR; resized at once, bilinearly.
    """
    from torchvision.transforms import v2  # takes seconds to import

    crop, side, boxes = v2.RandomResizedCrop, pixels.shape[-1], torch.empty(len(pixels), 2, 3)
    for box in boxes:  # where in the image, from -1 to 1, a pixel of the crop comes from
        top, left, height, width = crop.get_params(pixels[0], scale=(0.7, 1), ratio=(3 / 4, 4 / 3))
        mirror = 1 - 2 * int(torch.rand(()) < 0.5)
        box.copy_(torch.tensor([[mirror * width / side, 0, (2 * left + width) / side - 1],
                                [0, height / side, (2 * top + height) / side - 1]]))
    affine, sample = torch.nn.functional.affine_grid, torch.nn.functional.grid_sample
    grid = affine(boxes.to(pixels.device), (len(pixels), 3, size, size), align_corners=False)
    crops = sample(pixels.float(), grid, padding_mode="border", align_corners=False)
    return crops.contiguous(memory_format=torch.channels_last) / 127.5 - 1


# -------------------------------------------------------------------------------- the predictions


def features_of(model, images, size, autocast):
    """The features that the last layer sees, (N, D). size: pixels that the model sees per side."""
    model.eval()
    device, found = next(model.parameters()).device, []
    batches = torch.arange(len(images)).split(64)  # of 256, a CPU takes up to twice the time
    with torch.no_grad(), autocast():
        for pixels in on_device(images.pixels, batches, device):
            found.append(model.backbone(to_input(pixels, size)))
    return torch.cat(found).float()


def predict(model, images, size, autocast):
    """Class probabilities (N, C) on the CPU."""
    with torch.no_grad():
        return model.last_layer(features_of(model, images, size, autocast)).softmax(1).cpu()
