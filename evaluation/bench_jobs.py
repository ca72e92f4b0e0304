"""What evaluation/bench.py runs in processes of their own: its inputs, what a user would write, checks of both sides.

Each function takes and returns what json holds.
"""

import os
import sys
import time
from argparse import Namespace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the repository, which this script is run from anywhere
from common import classifiers, files, imagefolder, models, stage

np = stage.lazy("numpy")
torch = stage.lazy("torch")

BASE = ROOT / "base" / "miniature"


def machine():
    """The GPU's name or None, and a line about this machine. Also reads all libraries once: nobody pays for a cold disk."""
    import accelerate  # noqa: F401
    import diffusers
    import peft  # noqa: F401
    import sklearn.cluster  # noqa: F401
    import torchvision  # noqa: F401
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cpu = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] if os.path.exists(
        "/proc/cpuinfo") else []
    return gpu, (f"{gpu or (cpu or ['unknown CPU'])[0]}, {os.cpu_count()} cores, Python {sys.version.split()[0]}, "
                 f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}")


# ------------------------------------------------------------------------------------------------------ inputs


def photographs(folder, count, width, height):
    """A folder in the one format with `count` random JPEGs of that size, smooth with some noise, no two of them alike."""
    from PIL import Image

    folder, rng = Path(folder), np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    kinds = []
    for _ in range(min(count, 50)):
        smooth = Image.fromarray(rng.integers(0, 256, (8, 11, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
        noisy = np.asarray(smooth, float) + rng.normal(0, 8, (height, width, 3))
        kinds.append(noisy.clip(0, 255).astype(np.uint8))
    for i in range(count):
        pixels = kinds[i % len(kinds)].copy()
        pixels[:16, :16] = rng.integers(0, 256, 3)
        Image.fromarray(pixels).save(folder / f"images/{i:06}.jpg", quality=90)
    files.write_csv(folder / "metadata.csv", [
        {"file_name": f"images/{i:06}.jpg", "split": "train", "y": i % 2, "a": i // 2 % 2, "cluster": 0,
         "text": f"a photo of kind {i % 2} in place {i // 2 % 2}"} for i in range(count)])


def random_embeddings(folder, count):
    """A dataset of `count` links to one image in four groups, and random embeddings: unit vectors of 768 numbers from
    a mixture of 8 normal distributions per group, whose means are about 4 standard deviations from one another."""
    from PIL import Image

    folder, rng = Path(folder), np.random.default_rng(0)
    (folder / "data" / "images").mkdir(parents=True)
    (folder / "embeddings").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "image.png")
    rows = [{"file_name": f"images/{i:06}.png", "split": "train", "y": i % 2, "a": i // 2 % 2,
             "text": f"a photo of kind {i % 2} in place {i // 2 % 2}"} for i in range(count)]
    for row in rows:
        (folder / "data" / row["file_name"]).symlink_to(folder / "image.png")
    files.write_csv(folder / "data" / "metadata.csv", rows)
    centres = 0.1 * rng.standard_normal((32, 768), dtype=np.float32)
    found = rng.standard_normal((count, 768), dtype=np.float32)
    found += centres[np.arange(count) % 4 * 8 + rng.integers(0, 8, count)]
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    clip.save_embeddings(folder / "embeddings", rows, found)


def stable_diffusion(folder, width):
    """Saves a base model of the shapes of Stable Diffusion 1.5 (width 320; else a narrow one) with random weights.

    Its digest is taken too: finetune.py remembers it, and the first run would be slower than the next.
    """
    from base import random_model

    random_model.stable_diffusion(width).save_pretrained(folder)
    files.model_digest(folder)


# -------------------------------------------------------------------------------------------------- generation


def plain_pipeline(bf16):
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(BASE, torch_dtype=torch.bfloat16 if bf16 else torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def plain_generation(prompts, images, batch, bf16, steps, guidance, out):
    """Draws `images` of each prompt as the documentation of StableDiffusionPipeline shows, `batch` per call."""
    pipe = plain_pipeline(bf16)
    for group, prompt in prompts.items():
        Path(out, group).mkdir(parents=True)
        for first in range(0, images, batch):
            generators = [torch.Generator().manual_seed(i) for i in range(first, first + batch)]
            drawn = pipe(prompt, num_images_per_prompt=batch, num_inference_steps=steps, guidance_scale=guidance,
                         generator=generators).images
            for i, image in enumerate(drawn, first):
                image.save(Path(out, group, f"{i:05}.png"))


def generation_difference(prompts, batch, steps, guidance):
    """The largest difference of a value in [0, 1] between images of generate.py and of the plain pipeline, in fp32."""
    import generate

    sampler, pipe, found = models.Sampler(BASE, compute.accelerator().device, bf16=False), plain_pipeline(False), []
    for group, prompt in prompts.items():
        draw = {"name": group, "prompt": prompt, "negative": "", "guidance": guidance}
        ours = generate.draw_images(sampler.pipe, draw, range(batch), Namespace(seed=0, steps=steps))
        generators = [torch.Generator().manual_seed(stage.seed_of(0, group, i)) for i in range(batch)]
        plain = pipe(prompt, num_images_per_prompt=batch, num_inference_steps=steps, guidance_scale=guidance,
                     generator=generators, output_type="np").images
        found.append(float(abs(ours - plain).max()))
    return max(found)


def flops_and_rate(base, data, batch):
    """FLOPs of one of finetune.py's LoRA steps, forward and backward, and the FLOPs per second of a bf16 matrix product."""
    from torch.utils.flop_counter import FlopCounterMode

    import finetune

    args = finetune.parse(["--method", "lora", "--base", base, "--data", data, "--batch", str(batch), "--out",
                           f"{data}-flops"])
    device = compute.accelerator().device
    model = models.Base(base, device, True)
    [unit] = finetune.units_of(imagefolder.read_metadata(data), [], args)
    unit.images.encode(model)
    finetune.trainable_weights(model, args)
    model.prompt_embeds(unit.prompts)  # once per prompt, not at each step
    with FlopCounterMode(display=False) as counter:
        finetune.dreambooth_loss(model, unit, 0, args).backward()
    size, seconds = 8192 if device.type == "cuda" else 256, []
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    for _ in range(5):
        begin = time.monotonic()
        for _ in range(20):
            product = a @ b
        product[0, 0].item()  # waits for all of them
        seconds.append(time.monotonic() - begin)
    return counter.get_total_flops(), 20 * 2 * size**3 / min(seconds)


# -------------------------------------------------------------------------------------------------- classifiers


def our_epoch(data, batch):
    """Seconds in which train_classifier.py decodes the images, and those of an epoch: ResNet-18, 224 of 256 pixels."""
    import train_classifier as ours

    args = ours.parse(["--recipe", "erm", "--data", data, "--arch", "resnet18", "--resolution", "224", "--load-size", "256",
                       "--batch", str(batch), "--epochs", "1", "--out", f"{data}-ours"])
    rows = imagefolder.read_metadata(data)
    groups = list(imagefolder.group_counts(rows))
    begin = time.monotonic()
    images = classifiers.Images(Path(data), rows, args.load_size, groups)
    read = time.monotonic()
    val = classifiers.Images(Path(data), rows[:4], args.load_size, groups)
    model = classifiers.new_classifier(args.arch, args.weights, 2).to(memory_format=torch.channels_last)
    start = time.monotonic()
    ours.train_phase(model, ours.ERM, images, val, ours.Losses(images, len(groups), args), args, 0, [])
    return {"reading": read - begin, "epoch": time.monotonic() - start}


def group_dro_epoch(peer, data, batch, workers):
    """Seconds of an epoch with group_DRO's dataset, transform and loader, as its README trains on Waterbirds.

    Its loop is that of its run_epoch() without statistics, on the CPU. The pass over all images by which its dataset counts
    groups is not measured.
    """
    sys.path.insert(0, peer)
    import torchvision
    from data.cub_dataset import CUBDataset
    from data.dro_dataset import DRODataset

    root = Path(f"{data}-waterbirds")
    folder = root / "data" / "waterbird_complete95_forest2water2"
    if not folder.is_dir():
        folder.mkdir(parents=True)
        (folder / "images").symlink_to(Path(data) / "images")
        files.write_csv(folder / "metadata.csv", [{"img_filename": row["file_name"], "y": row["y"], "place": row["a"],
                                                   "split": 0} for row in imagefolder.read_metadata(data)])
    full = CUBDataset(str(root), "waterbird_complete95", ["forest2water2"], model_type="resnet50")
    dataset = DRODataset(full.get_splits(["train"])["train"], None, full.n_groups, full.n_classes, full.group_str)
    loader = dataset.get_loader(train=True, reweight_groups=False, batch_size=batch, num_workers=workers)
    model = torchvision.models.resnet18()
    model.fc = torch.nn.Linear(model.fc.in_features, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4)
    model.train()
    begin = time.monotonic()
    for x, y, _ in loader:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"epoch": time.monotonic() - begin}


def last_layer(data, cached, epochs):
    """Seconds of the paper's second stage with the miniature's network; cached: as train_classifier.py does it."""
    import train_classifier as ours

    rows = {split: imagefolder.read_metadata(data, split) for split in ("train", "val")}
    groups = list(imagefolder.group_counts(rows["train"]))
    images, val = (classifiers.Images(Path(data), part, 32, groups) for part in rows.values())
    for count in (1, epochs):  # the first time torch imports its optimizers
        args = ours.parse(["--recipe", "erm", "--data", data, "--last-layer-epochs", str(count), "--out", f"{data}-ours"])
        model = classifiers.new_classifier("cnn", "none", 2).to(memory_format=torch.channels_last)
        given = (model, ours.RECIPES["two-stage"][1], images, val, ours.Losses(images, len(groups), args), args, 0)
        begin = time.monotonic()
        (ours.train_phase if cached else last_layer_through_network)(*given, log=[])
        seconds = time.monotonic() - begin
    return {"epochs": seconds}


def last_layer_through_network(model, phase, images, val, losses, args, seed, log):
    """train_classifier.train_phase for the last layer, written plainly: every batch goes through the frozen network.

    Returns, like it, two values; here the second, the class probabilities (N, C) on val after each epoch, alone counts.
    """
    model.eval()
    optimizer = torch.optim.SGD(model.last_layer.parameters(), args.last_layer_rate, momentum=0.9,
                                weight_decay=args.weight_decay)
    schedule, history = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.last_layer_epochs), []
    for epoch in range(args.last_layer_epochs):
        rng = torch.Generator().manual_seed(stage.seed_of(seed, phase, epoch))
        for batch in images.batches(phase.drawn, args.batch, rng):
            with torch.no_grad():
                features = model.backbone(classifiers.to_input(images.pixels[batch], args.resolution))
            loss = getattr(losses, phase.loss)(model.last_layer(features), None, images.y[batch], images.group[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        history.append(classifiers.predict(model, val, args.resolution))
    return None, history
