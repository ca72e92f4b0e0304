"""What the whole experiment will cost on this machine: a little of every stage, multiplied.

    make dryrun DATASET=celeba
    make dryrun DATASET=waterbirds RECIPES="erm lora" DRYRUN="--clusters 3"

Needs neither the images nor the models: it makes random photographs, and models of random weights
with the shapes of Stable Diffusion 1.5 (XL: DRYRUN="--shapes sdxl") and CLIP ViT-L/14 unless BASE
and CLIP are folders. Each command runs as make would run it, on few images and with few steps: two
runs that differ in one number give the seconds per step or image, the rest is start-up (a
classifier tells them itself).

Writes OUT/dryrun.csv (a row per stage: seconds and memory), OUT/projection.csv (a row per folder
that make would make: hours and GB) and OUT/dryrun.md (both). A stage that fails is a row, the
others still run, and the exit status is 1.
"""

import argparse
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import clip, files, imagefolder, stage
from data import prepare
from evaluation import figures
from tools import plan, projection
from tools.projection import EVERY, GROUPS

np = stage.lazy("numpy")

PIXELS = {"celeba": (178, 218), "utkface": (200, 200), "digits": (32, 32)}  # others: 500 x 375

# ------------------------------------------------------------------------------------- the inputs


def make_photos(folder, count, size):
    """JPEGs of random smooth colours, about as large as photographs. Returns their paths."""
    rng, paths = random.Random(0), [folder / f"{i:04}.jpg" for i in range(count)]
    small = tuple(max(side // 8, 4) for side in size)
    folder.mkdir(exist_ok=True)
    for path in paths:
        image = Image.frombytes("RGB", small, rng.randbytes(3 * small[0] * small[1]))
        image.resize(size, Image.BICUBIC).save(path, "JPEG", quality=90)
    return paths


def dataset(folder, photos, width, train, groups=GROUPS):
    """A folder of `train` images and two of each group in val and test; its embeddings too."""
    path = folder / f"{train}-in-{len(groups)}-groups"
    labels = [("train", *groups[i % len(groups)]) for i in range(train)]
    labels += [(split, *group) for split in ("val", "test") for group in groups * 2]
    rows = [{"file_name": f"images/{i}.jpg", "split": split, "y": y, "a": a, "cluster": 0,
             "text": f"a photo of {('even', 'odd')[y]} {('red', 'green')[a]}"}
            for i, (split, y, a) in enumerate(labels)]
    if not path.is_dir():
        found = np.random.default_rng(0).standard_normal((len(rows), width), np.float32)
        with files.replacing(path) as hidden:
            (hidden / "images").mkdir(parents=True)
            for i, row in enumerate(rows):
                os.link(photos[i % len(photos)], hidden / row["file_name"])
            files.write_csv(hidden / "metadata.csv", rows)
            clip.save_embeddings(hidden, rows, found / np.linalg.norm(found, axis=1, keepdims=True))
    return path


# -------------------------------------------------------------------------------------- measuring


class Failed(Exception):
    pass


def run(out, name, command, **flags):
    """Runs a command with other flags: of equal flags the last counts. Its cost, as a dict."""
    folder, log = out / "runs" / name, out / "logs" / f"{name}.log"
    files.remove(folder)
    words = [sys.executable, str(ROOT / command[0]), *command[1:]]
    for flag, value in flags.items():
        words += [f"--{flag.replace('_', '-')}", str(value)]
    begin = time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen([*words, "--out", str(folder)], stdout=file, stderr=file)
        _, status, used = os.wait4(process.pid, 0)
    seconds = time.monotonic() - begin
    if status:
        last = (log.read_text(errors="replace").strip() or f"status {status}").splitlines()[-1]
        raise Failed(last[:300])
    units = [files.read_json(path) for path in (folder / "config.json",
                                                *folder.glob("*/config.json"))]
    disk = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    files.remove(folder)
    print(f"  {name}: {seconds:.1f} s", flush=True)
    return {"seconds": seconds, "memory_mb": used.ru_maxrss // 1024, "disk_mb": disk / 1e6,
            "gpu_mb": max(unit.get("peak_gpu_mb", 0) for unit in units),
            "work_s": sum(unit.get("seconds", 0) for unit in units),
            "encoding_s": sum(unit.get("encoding_seconds", 0) for unit in units)}


def row_of(runs, count=1, **seconds):
    """A row of dryrun.csv. The last run wrote disk_mb for `count` images or units."""
    return {**{name: round(max(seconds.get(name, 0), 0), 6) for name in EVERY},
            "memory_mb": max(run["memory_mb"] for run in runs),
            "gpu_mb": max(run["gpu_mb"] for run in runs) or "",
            "disk_mb": round(runs[-1]["disk_mb"] / count, 6), "result": "ok"}


def slope(runs, what, count):
    """Seconds per step or image, and at least what the clocks can tell."""
    return max(runs[1][what] - runs[0][what], 0.05) / count


def by_images(out, name, command, few, many, flags):
    """A stage that takes a start-up and a time per image; flags: a function of their number."""
    runs = [run(out, f"{name}-{count}", command, **flags(count)) for count in (few, many)]
    each = slope(runs, "seconds", many - few)
    return row_of(runs, many, image_s=each, startup_s=runs[0]["seconds"] - few * each)


def finetuning(out, name, command, settings, data_of, more):
    """One step, and `more` steps, on as many images (and class images) as a step takes."""
    batch = settings.batch * settings.accumulation
    data = data_of(batch, GROUPS[:1])
    flags = {"data": data} | ({"prior": data} if settings.prior else {})
    runs = [run(out, f"{name}-{steps}", command, steps=steps, **flags) for steps in (1, 1 + more)]
    step, encoding = slope(runs, "work_s", more), runs[0]["encoding_s"]
    return row_of(runs, startup_s=runs[0]["seconds"] - runs[0]["work_s"], step_s=step,
                  image_s=encoding / batch / (2 if settings.prior else 1),
                  unit_s=runs[0]["work_s"] - step - encoding)


def generating(out, name, command, data_of, more, images):
    """Images of 1 and of `more` steps, by the base model and without a filter."""
    if "--models" in command:
        i = command.index("--models")
        command = command[:i] + command[i + 2:]
    data = data_of(1, GROUPS[:1])
    flags = {"keep": 1, "images": images, "data": data, "embeddings": data}
    command = [word for word in command if word != "--drop-weights"]
    runs = [run(out, f"{name}-{steps}", command, steps=steps, **flags) for steps in (1, 1 + more)]
    step = slope(runs, "work_s", images * more)
    return row_of(runs, images, step_s=step, startup_s=runs[0]["seconds"] - runs[0]["work_s"],
                  image_s=max(runs[0]["work_s"] / images - step, 0.001))


def classifying(out, name, command, settings, data_of, batches, epochs):
    size = math.ceil(settings.batch / 4) * batches
    data = data_of(4 * size)
    given = {"synthetic": settings.synthetic, "groups": settings.groups}
    flags = {name: data for name, value in given.items() if isinstance(value, Path)}
    flags |= {"epochs": epochs, "pretrain_epochs": epochs}
    if settings.erm:  # there is none here
        command = [word for word in command if word not in ("--erm", str(settings.erm))]
    done = run(out, name, command, data=data, seeds=0, weights="none", **flags)
    settings = argparse.Namespace(**{**vars(settings), **flags, "erm": None})
    images = projection.passes(settings, [size] * 4, size, 8, 8)
    return row_of([done], startup_s=done["seconds"] - done["work_s"],
                  image_s=max(done["work_s"], 0.05) / images)


def reading(photos):
    begin = time.monotonic()
    for path in photos:
        imagefolder.load_image(path, 256)
    each = (time.monotonic() - begin) / len(photos)
    return row_of([{"memory_mb": 0, "gpu_mb": 0, "disk_mb": 0}], image_s=each)


def measure(commands, gpu, args):
    """{name: row of dryrun.csv}"""
    base, clip_folder = models_of(commands, args)
    photos = make_photos(args.out / "photos", args.photos, PIXELS.get(args.dataset, (500, 375)))
    config = files.read_json(clip_folder / "config.json")
    out, rows = args.out, {"read images": {"stage": "read images"} | reading(photos)}

    def data_of(train, groups=GROUPS):
        return dataset(out / "data", photos, config["projection_dim"], train, groups)

    def both(count):
        return {"data": data_of(count, GROUPS[:1]), "embeddings": data_of(count, GROUPS[:1])}

    def measured(count):
        data = data_of(64)
        return {"data": data, "embeddings": data, "synthetic": data_of(count)}

    latents = files.read_json(base / "unet/config.json").get("sample_size", 64)
    slow = latents > 16 and not gpu  # seconds a step
    more = 2 if slow else 20
    many = 40 if config["vision_config"]["image_size"] > 128 and not gpu else 1000
    for command in commands:
        settings, words, name = command.settings, list(command.words), command.row
        if hasattr(settings, "base"):
            words += ["--base", str(base)]
        if hasattr(settings, "clip"):
            words += ["--clip", str(clip_folder)]
        heavy = getattr(settings, "resolution", 0) > 128 and not gpu
        jobs = {
            "data/embed.py": lambda: by_images(out, name, words, 8, many,
                                               lambda n: {"data": data_of(n)}),
            "cluster.py": lambda: by_images(out, name, words, 500, 2000, both),
            "finetune.py": lambda: finetuning(out, name, words, settings, data_of, more),
            "generate.py": lambda: generating(out, name, words, data_of, more,
                                              min(settings.batch, 2) if slow else settings.batch),
            "train_classifier.py": lambda: classifying(out, name, words, settings, data_of,
                                                       *((1, 1) if heavy else (8, 3))),
            "evaluation/images.py": lambda: by_images(out, name, words, 8, many, measured)}
        if name not in rows:
            try:
                rows[name] = {"stage": name} | jobs[words[0]]()
            except Failed as error:
                print(f"{name}: failed: {error}", file=sys.stderr, flush=True)
                empty = dict.fromkeys((*EVERY, "memory_mb", "gpu_mb", "disk_mb"), "")
                rows[name] = {"stage": name, **empty, "result": f"failed: {error}"}
    return rows


def models_of(commands, args):
    """The folders of the base model and of CLIP: the commands', if they exist, or random ones."""
    named = [next((getattr(command.settings, flag) for command in commands
                   if getattr(command.settings, flag, None)), "") for flag in ("base", "clip")]
    made = args.out / f"models-{args.shapes}" / "base"
    if args.shapes == "tiny":
        named = [ROOT / "base/miniature", ROOT / "base/miniature/clip"]
    if not all(Path(name).exists() for name in named) and not made.is_dir():
        print(f"making random models of the shapes {args.shapes} in {made.parent}", flush=True)
        subprocess.run([sys.executable, str(ROOT / "tools/random_model.py"), "--shapes",
                        args.shapes, "--out", str(made.parent)], check=True)
    return [Path(name) if Path(name).exists() else other
            for name, other in zip(named, (made, made / "clip"))]


# ------------------------------------------------------------------------------------- the script


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    commands = projection.read_commands(plan.read_plan(args.plan[0], args.plan[1:]))
    counts, source = projection.counts_of(Path("data") / f"{args.dataset}-{args.bias}",
                                          args.dataset, args.bias, prepare.subsample)
    stage.start(args, {})
    for name in ("data", "runs", "logs"):
        (args.out / name).mkdir(exist_ok=True)
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    gpu = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    gpu = gpu.stdout.strip()
    rows = measure(commands, gpu, args)
    table = projection.projection(commands, rows, counts, args.clusters, args.model_seeds)
    text = report(rows, table, counts, source, gpu, args)
    files.write_csv(args.out / "dryrun.csv", list(rows.values()))
    files.write_csv(args.out / "projection.csv", table)
    files.write_text(args.out / "dryrun.md", text)
    print(text)
    return int(any(row["result"] != "ok" for row in rows.values()))


def report(rows, table, counts, source, gpu, args):
    """dryrun.md"""
    hours, gb = (shown(sum(line[name] or 0.0 for line in table)) for name in ("hours", "gb"))
    failed = ", ".join(name for name, row in rows.items() if row["result"] != "ok")
    lines = [list(map(shown, line.values())) for line in table]
    columns = ["stage", "start-up, s", "per unit or seed, s", "per step, s", "per image, s",
               "memory, MB", "GPU, MB", "disk, MB", "result"]
    scaled = projection.scaling(table, (1, 8, 64))
    return f"""\
# {args.dataset}, bias {args.bias}: {hours} hours and {gb} GB on this machine

{gpu or "No GPU"}, {os.cpu_count()} cores.{f" Without what failed: {failed}." if failed else ""}

{figures.markdown_table(columns, [map(shown, row.values()) for row in rows.values()])}
hours = (runs x start-up + units x per unit + steps x per step + images x per image) / 3600:

{figures.markdown_table(list(table[0]), [*lines, ["all", *[""] * 5, hours, gb]])}
On several devices like this one (LAUNCH="accelerate launch ..."), calculated from it, at least:

{figures.markdown_table(["devices", "hours", "speed-up", "longest stage"],
                        [map(shown, line.values()) for line in scaled])}
All of this assumes:

- Training images per group {", ".join(map(str, counts[0]))}, val {counts[1]}, test {counts[2]}:
  {source}.
- Clusters per group: {args.clusters or "the most that --k or --k-max and --min-size allow"}.
- A unit encodes its images, but no more than it draws in all steps; generation draws whole batches,
  and the images that the filter rejects; fine-tuned models take as long as the base model.
- A classifier's images are those that it trains on in all epochs; one that it looks at is a third.
- The photographs are random: they compress worse than real ones, and k-means stops later.
"""


def shown(value):
    if not isinstance(value, float):
        return value
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    count, add = stage.number(int, 1), parser.add_argument
    add("--dataset", required=True, help="dataset whose number and sizes of images are assumed")
    add("--bias", required=True, help="of the dataset: a number or natural")
    add("--plan", nargs="+", required=True, help="GOALS and PLAN of the Makefile")
    add("--photos", type=count, default=64, help="random photographs; larger folders repeat them")
    add("--shapes", choices=("sd15", "sdxl", "tiny"), default="sd15", help="of the models, where "
        "BASE or CLIP is not a folder; tiny: always base/miniature")
    add("--clusters", type=count, help="clusters to assume per group; default: the most possible")
    add("--model-seeds", type=count, default=1, help="how often models are made")
    add("--out", type=Path, required=True, help="folder to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    stage.run(main)
