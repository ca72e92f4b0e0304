"""The classifier network, the images that it sees, and its predictions."""

import copy

from common import imagefolder, stage
from common.files import InputError

np = stage.lazy("numpy")
torch = stage.lazy("torch")

# ----------------------------------------------------------------------------------------------- the network


def new_classifier(arch, weights, classes):
    """A torch module with three parts: backbone (images -> features), last_layer (features -> logits), and projection,
    the head that the contrastive loss sees (Khosla et al. 2020, section 3.1)."""
    model = torch.nn.Module()
    model.backbone, width = cnn() if arch == "cnn" else resnet(arch, weights)
    model.last_layer = torch.nn.Linear(width, classes)
    model.projection = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 64))
    return model


def cnn():
    """Four convolutions for images of 32 pixels; returns (module, width of its features)."""
    nn, layers, channels = torch.nn, [], 3
    for width in (16, 32, 64, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                   nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels


def resnet(arch, weights):
    """torchvision's ResNet without its last layer; weights: imagenet, none, or a .safetensors file."""
    import torchvision  # takes seconds to import
    from safetensors.torch import load_file

    try:
        network = getattr(torchvision.models, arch)(weights="IMAGENET1K_V1" if weights == "imagenet" else None)
        if weights.endswith(".safetensors"):
            network.load_state_dict(load_file(weights))
    except Exception as error:  # URLError, OSError, SafetensorError, RuntimeError for wrong shapes
        raise InputError(f"--weights {weights}", f"cannot be loaded: {str(error).splitlines()[0]}",
                         f"give a .safetensors file with a state dict of torchvision's {arch}") from None
    width, network.fc = network.fc.in_features, torch.nn.Identity()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])  # ImageNet's, in [0, 1]
    normalize = torchvision.transforms.v2.Normalize((2 * mean - 1).tolist(), (2 * std).tolist())
    return torch.nn.Sequential(normalize, network), width


# ------------------------------------------------------------------------------------------------ the images


class Images:
    """The images of some rows in memory: pixels (N, 3, S, S) uint8, y (N,), group (N,) an index into `groups`."""

    def __init__(self, data, rows, size, groups):
        self.rows, self.errors = rows, None
        self.pixels = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
        for pixels, row in zip(self.pixels, imagefolder.progress(rows, f"read {data}", "image")):
            image = np.asarray(imagefolder.load_image(data / row["file_name"], size))
            pixels.copy_(torch.from_numpy(image.copy()).permute(2, 0, 1))
        self.y = torch.tensor([row["y"] for row in rows])
        self.group = torch.tensor([groups.index(imagefolder.group_of(row)) for row in rows])

    def __len__(self):
        return len(self.rows)

    def joined(self, other, filled):
        """These images and the other's: all, or with `filled` as many as bring every group to the largest size."""
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
        elif drawn == "smallest group":  # the same images in every epoch: of each group as many as the smallest has
            sizes = self.group.bincount()
            first = [(self.group == group).nonzero()[:, 0][:sizes[sizes > 0].min()] for group in self.group.unique()]
            order = torch.cat(first)
            order = order[torch.randperm(len(order), generator=rng)]
        elif drawn == "errors upsampled":  # the first model's errors appear `upsampling` times per epoch
            order = torch.arange(len(self)).repeat_interleave(1 + (upsampling - 1) * self.errors.long())
            order = order[torch.randperm(len(order), generator=rng)]
        else:  # group-balanced: resampling with replacement, every group equally often
            weights = 1 / self.group.bincount().float()
            order = torch.multinomial(weights[self.group], len(self), replacement=True, generator=rng)
        batches = list(order.split(size))
        if len(batches) > 1 and len(batches[-1]) == 1:  # batch normalisation cannot learn from one image
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches


def random_crops(pixels, size):
    """A random crop and flip of each image, as in the code of Group-DRO and DFR."""
    from torchvision.transforms import v2  # takes seconds to import

    crop = v2.Compose([v2.RandomResizedCrop(size, scale=(0.7, 1), ratio=(3 / 4, 4 / 3), antialias=True),
                       v2.RandomHorizontalFlip()])
    return torch.stack([crop(image) for image in pixels])


def to_input(pixels, device, size):
    """uint8 pixels -> float in [-1, 1], the middle `size` pixels of each side."""
    start = round((pixels.shape[-1] - size) / 2)
    pixels = pixels[..., start:start + size, start:start + size]
    return pixels.to(device, torch.float, memory_format=torch.channels_last) / 127.5 - 1


# ------------------------------------------------------------------------------------------- the predictions


def features_of(model, images, size):
    """The features that the last layer sees, (N, D); size: pixels per side that the model sees."""
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat([model.backbone(to_input(part, device, size)) for part in images.pixels.split(256)])


def predict(model, images, size):
    """Class probabilities (N, C) on the CPU."""
    with torch.no_grad():
        return model.last_layer(features_of(model, images, size)).softmax(1).cpu()
