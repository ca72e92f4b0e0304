"""What the whole experiment will cost on this machine: runs one unit of every stage for a few steps, and multiplies.

    make dryrun DATASET=celeba
    make dryrun DATASET=waterbirds RECIPES="erm lora" DRYRUN="--clusters 3"

Needs neither the images nor the models: it makes random photographs, and models of random weights with the shapes of Stable
Diffusion 1.5 and CLIP ViT-L/14 (base/random_model.py) unless BASE and CLIP are folders. Each stage runs as make would run
it, on folders of the dry run and with fewer steps, images, epochs and seeds. Two runs that differ in one number give the
seconds per step or image; the rest is start-up.

Writes OUT/dryrun.csv (a row per stage: seconds, memory, disk), OUT/projection.csv (a row per folder that make would make:
hours and GB), OUT/dryrun.md (both, and what is assumed) and OUT/logs. A stage that fails is a row, the others still run, and
the exit status is 1. Models and photographs in OUT are kept; an interrupted or failed dry run resumes.
"""

import functools
import math
import os
import random
import signal
import subprocess
import sys
import time
from copy import copy
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the repository, which this script is run from anywhere
from common import files, models, stage
from common.files import InputError
from data import prepare
from evaluation import figures
from evaluation.projection import EVERY, GROUPS, counts_of, passes, projection, read_commands, scaling

np = stage.lazy("numpy")

PIXELS = {"waterbirds": (500, 375), "celeba": (178, 218), "utkface": (200, 200), "digits": (32, 32)}
MEMORY = ("memory_mb", "anonymous_mb", "gpu_mb")
COLUMNS = ("measured", *EVERY, *MEMORY, "disk_mb", "disk_per", "result")

# ------------------------------------------------------------------------------------- random images and labels


def make_photos(folder, count, size):
    """JPEGs of random smooth colours, which have about the bytes of photographs. Returns their paths."""
    rng, paths = random.Random(0), [folder / f"{i:04}.jpg" for i in range(count)]
    small = tuple(max(side // 8, 4) for side in size)
    for path in paths:
        image = Image.frombytes("RGB", small, rng.randbytes(3 * small[0] * small[1])).resize(size, Image.BICUBIC)
        if not path.is_file():
            with files.replacing(path) as hidden:
                image.save(hidden, "JPEG", quality=90)
    return paths


def dataset(folder, photos, width, train, groups=GROUPS):
    """Flags --data and --embeddings: a folder of `train` images, links to the photographs, and two of each group in val and
    in test, with random embeddings of `width` numbers."""
    path = folder / f"{train}-in-{len(groups)}-groups"
    template, _, classes, attributes = prepare.WORDS["digits"]  # any will do: prompts are padded to one length
    labels = [("train", *groups[i % len(groups)]) for i in range(train)]
    labels += [(split, *group) for split in ("val", "test") for group in groups * 2]
    rows = [{"file_name": f"images/{i}.jpg", "split": split, "y": y, "a": a, "cluster": 0,
             "text": template.format(y=classes[y], a=attributes[a])} for i, (split, y, a) in enumerate(labels)]
    embeddings = np.random.default_rng(0).standard_normal((len(rows), width), np.float32)
    if not path.is_dir():
        with files.replacing(path) as hidden:
            (hidden / "images").mkdir(parents=True)
            for i, row in enumerate(rows):
                os.link(photos[i % len(photos)], hidden / row["file_name"])
            files.write_csv(hidden / "metadata.csv", rows)
            clip.save_embeddings(hidden, rows, embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))
    return {"data": path, "embeddings": path}


# ------------------------------------------------------------------------------------------------- measuring


class Failed(Exception):
    pass


class Runs:
    """Runs python with some arguments, and keeps what each run took, for when the dry run resumes."""

    def __init__(self, out):
        self.out, self.child = out, None
        self.known = files.read_json(out / "measured.json")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.end)

    def end(self, number, frame):
        if self.child:
            self.child.kill()
        os.write(2, (stage.INTERRUPTED.format("dryrun.py") + "\n").encode())
        os._exit(130)

    def stage(self, name, command, **instead):
        """Runs a command with other flags `instead`: of equal flags the last counts."""
        flags = [word for flag, value in instead.items() for word in (f"--{flag.replace('_', '-')}", str(value))]
        return self(name, str(ROOT / command.script), *command.flags, *flags, "--out", str(self.out / "runs" / name))

    def __call__(self, name, *words):
        """Returns {seconds of the process, work_s and encoding_s of its units, memory_mb, anonymous_mb, gpu_mb, disk_mb}."""
        out = self.out / "runs" / name
        if self.known.get(name, {}).get("command") != list(words):
            files.remove(out)
            used = self.process(name, words)
            units = [files.read_json(path) for path in (*out.glob("*/config.json"), out / "config.json")]
            self.known[name] = {
                "command": words, **used, "work_s": sum(unit.get("seconds", 0) for unit in units),
                "encoding_s": sum(unit.get("encoding_seconds", 0) for unit in units),
                "gpu_mb": max((unit.get("peak_gpu_mb") or 0 for unit in units), default=0),
                "disk_mb": sum(path.lstat().st_size for path in out.rglob("*") if path.is_file()) / 1e6}
            files.write_json(self.out / "measured.json", self.known)
            files.remove(out)
            print(f"  {name}: {used['seconds']:.1f} s", flush=True)
        return self.known[name]

    def process(self, name, words):
        """The kernel's peak of resident memory includes weights that are mapped from files; the anonymous does not."""
        log, anonymous, begin = self.out / "logs" / f"{name}.log", 0, time.monotonic()
        with open(log, "w") as file:
            self.child = subprocess.Popen([sys.executable, *words], stdout=file, stderr=subprocess.STDOUT)
        while not (ended := os.wait4(self.child.pid, os.WNOHANG))[0]:
            anonymous = max(anonymous, anonymous_kb(self.child.pid))
            time.sleep(0.05)
        self.child, status, seconds = None, os.waitstatus_to_exitcode(ended[1]), time.monotonic() - begin
        if status < 0:
            raise Failed(f"killed by signal {-status}" + " (out of memory?)" * (status == -signal.SIGKILL))
        if status:
            raise Failed((log.read_text(errors="replace").strip() or f"exit status {status}").splitlines()[-1][:300])
        return {"seconds": round(seconds, 2), "anonymous_mb": anonymous // 1024,
                "memory_mb": ended[2].ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)}


def anonymous_kb(process):
    try:
        status = Path(f"/proc/{process}/status").read_text().split("\n")
    except OSError:  # not on Linux
        return 0
    return sum(int(line.split()[1]) for line in status if line.startswith("RssAnon:"))


def row_of(measured, runs, per="", count=1, **seconds):
    """A row of dryrun.csv. The last run wrote disk_mb for each of `count` images or units, as `per` says."""
    return {"measured": measured, **{name: round(max(seconds.get(name, 0), 0), 6) for name in EVERY},
            **{name: max(run[name] for run in runs) or "" for name in MEMORY},
            "disk_mb": round(runs[-1]["disk_mb"] / count, 6), "disk_per": per, "result": "ok"}


def difference(runs, what, count):
    """Seconds per step or image: by how much the last run exceeds the one before, and at least what the clocks can tell."""
    return max(runs[-1][what] - runs[-2][what], 0.05) / count


def reading(run, photos):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from common import imagefolder; "
            "[imagefolder.load_image(path, 256) for path in sys.argv[2:]]")
    runs = [run(f"read-{times}", "-c", code, str(ROOT), *map(str, photos * times)) for times in (1, 20)]
    image_s = difference(runs, "seconds", 19 * len(photos))
    return row_of(f"{len(photos)} and {20 * len(photos)} images", runs, image_s=image_s,
                  startup_s=runs[0]["seconds"] - len(photos) * image_s)


def by_images(run, command, few, many, flags):
    """A stage that takes a start-up and a time per image; flags: a function of the number of images."""
    runs = [run.stage(f"{command.row}-{count}", command, **flags(count)) for count in (few, many)]
    image_s = difference(runs, "seconds", many - few)
    return row_of(f"{few} and {many} images", runs, "image", many, image_s=image_s,
                  startup_s=runs[0]["seconds"] - few * image_s)


def finetuning(run, command, data_of, more):
    """One step, and `more` steps, on as many images as a step takes."""
    settings, batch = command.settings, command.settings.batch * command.settings.accumulation
    images = batch * (2 if settings.prior else 1)  # and class images
    data = data_of(batch, GROUPS[:1])["data"]
    instead = {"data": data} | ({"prior": data} if settings.prior else {})
    runs = [run.stage(f"{command.row}-{steps}", command, steps=steps, **instead) for steps in (1, 1 + more)]
    step_s, encoding_s = difference(runs, "work_s", more), sum(run["encoding_s"] for run in runs) / 2
    return row_of(f"1 and {1 + more} steps of {batch} images" + " and as many class images" * bool(settings.prior), runs, "unit",
                  startup_s=runs[0]["seconds"] - runs[0]["work_s"], step_s=step_s, image_s=encoding_s / images,
                  unit_s=runs[0]["work_s"] - step_s - encoding_s)


def generating(run, command, data_of, more, images, batch):
    """Images of 1 and of `more` steps, by the base model and without a filter."""
    command, flags = copy(command), command.flags
    if "--models" in flags:
        i = flags.index("--models")
        command.flags = [flag for flag in flags[:i] + flags[i + 2:] if flag != "--drop-weights"]
    instead = {"keep": 1, "images": images, "batch": batch, **data_of(1, GROUPS[:1])}
    instead |= {} if command.settings.clip_threshold is None else {"clip_threshold": 0}
    runs = [run.stage(f"generate-{steps}", command, steps=steps, **instead) for steps in (1, 1 + more)]
    step_s = difference(runs, "work_s", images * more)
    return row_of(f"{images} images, {batch} at once, of 1 and {1 + more} steps", runs, "image", images, step_s=step_s,
                  startup_s=runs[0]["seconds"] - runs[0]["work_s"], image_s=max(runs[0]["work_s"] / images - step_s, 0.001))


def classifying(run, command, data_of, batches, epochs):
    """A single run: the seconds of a seed are without the start-up."""
    size = math.ceil(command.settings.batch / 4) * batches
    data = data_of(4 * size)["data"]
    done = run.stage(command.row, command, data=data, seeds=0, epochs=epochs, weights="none",
                     **({"synthetic": data} if command.settings.synthetic else {}))
    return row_of(f"{epochs} epochs of {4 * size} images", [done], "unit", startup_s=done["seconds"] - done["work_s"],
                  image_s=max(done["work_s"], 0.05) / passes(command.settings, [size] * 4, size, 8, 8, epochs))


# --------------------------------------------------------------------------------------------------- the stage


def find_models(run, commands, args):
    """The folders of the base model and of CLIP: the commands', if they are on this machine, or random ones."""
    base, clip = (next((getattr(command.settings, flag) for command in commands if hasattr(command.settings, flag)), "")
                  for flag in ("base", "clip"))
    if args.shapes == "tiny":
        base, clip = ROOT / "base" / "miniature", ROOT / "base" / "miniature" / "clip"
    made = args.out / "models" / "base"
    if not (Path(base).exists() and Path(clip).exists()) and not made.is_dir():
        print(f"making random models of Stable Diffusion 1.5's shapes in {made.parent}", flush=True)
        try:
            run.process("models", [str(ROOT / "base" / "random_model.py"), "--out", str(made.parent)])
        except Failed as error:
            raise InputError(made.parent, f"cannot be made: {error}", "free memory or disk, and run it again") from None
    return (path if Path(path).exists() else other for path, other in ((base, made), (clip, made / "clip")))


def measure(commands, gpu, args):
    """{name: row of dryrun.csv}"""
    run, rows = Runs(args.out), {}
    base, clip = map(Path, find_models(run, commands, args))
    for command in commands:
        command.flags += [word for flag, model in (("base", base), ("clip", clip)) if hasattr(command.settings, flag)
                          for word in (f"--{flag}", str(model))]
    for model in (base, clip):
        files.model_digest(model)  # is kept: the first stage would pay for it
    pixels = PIXELS.get(args.dataset, PIXELS["waterbirds"])
    photos = make_photos(args.out / "photos", args.photos, pixels)
    settings = files.read_json(clip / "config.json")
    data_of = functools.partial(dataset, args.out / "data", photos, settings["projection_dim"])

    def slow(pixels):  # seconds a step
        return pixels > 128 and not gpu

    drawing_slowly = slow(8 * files.read_json(base / "unet" / "config.json").get("sample_size", 64))
    more, many = 2 if drawing_slowly else 20, 40 if slow(settings["vision_config"]["image_size"]) else 1000
    jobs = {"read images": (reading, photos)}
    for command in commands:
        batch = getattr(command.settings, "batch", 1)
        drawn = (min(batch, 2), min(batch, 2)) if drawing_slowly else (2 * batch, batch)  # a CPU gains nothing by a batch
        trained = (1, 1) if slow(getattr(command.settings, "resolution", 0)) else (8, 3)
        jobs.setdefault(command.row, {
            "data/embed.py": (by_images, command, 8, many, lambda n: {"data": data_of(n)["data"]}),
            "cluster.py": (by_images, command, 500, 2000, lambda n: data_of(n, GROUPS[:1])),
            "finetune.py": (finetuning, command, data_of, more),
            "generate.py": (generating, command, data_of, more, *drawn),
            "train_classifier.py": (classifying, command, data_of, *trained),
            "evaluation/images.py": (by_images, command, 8, many, lambda n: {
                **data_of(64), "synthetic": data_of(n)["data"]})}[command.script])
    for name, (function, *arguments) in jobs.items():
        try:
            rows[name] = {"stage": name} | function(run, *arguments)
        except Failed as error:
            print(f"{name}: failed: {error}", file=sys.stderr, flush=True)
            rows[name] = {"stage": name} | dict.fromkeys(COLUMNS, "") | {"result": f"failed: {error}"}
    if all(row["result"] == "ok" for row in rows.values()):
        files.remove(args.out / "measured.json")  # the next dry run measures again
    return rows


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    commands = read_commands(args.commands)
    counts, source = counts_of(Path("data") / f"{args.dataset}-{args.bias}", args.dataset, args.bias)
    stage.start(args, {})
    for name in ("photos", "data", "runs", "logs"):
        (args.out / name).mkdir(exist_ok=True)
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    gpu = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
    rows = measure(commands, gpu, args)
    table = projection(commands, rows, counts, args.clusters, args.model_seeds)
    text = report(rows, table, counts, source, gpu, args)
    files.write_csv(args.out / "dryrun.csv", list(rows.values()))
    files.write_csv(args.out / "projection.csv", table)
    files.write_text(args.out / "dryrun.md", text)
    print(text)
    return int(any(row["result"] != "ok" for row in rows.values()))


def report(rows, table, counts, source, gpu, args):
    """dryrun.md"""
    hours, gb, weights = (sum(line[name] or 0 for line in table if line["stage"].startswith(stages))
                          for name, stages in (("hours", ""), ("gb", ""), ("gb", "finetune")))
    failed = [name for name, row in rows.items() if row["result"] != "ok"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
    columns = ["stage", "measured", "start-up, s", "per unit or seed, s", "per step, s", "per image, s", "memory, MB",
               "anonymous, MB", "GPU, MB", "disk, MB", "disk per", "result"]
    return f"""# {args.dataset}, bias {args.bias}: {shown(hours)} hours and {shown(gb)} GB on this machine

{gpu or "No GPU"}, {os.cpu_count()} cores, {memory:.0f} GB of memory, threads: {threads}.{
    f" Without what failed: {', '.join(failed)}." if failed else ""}

What was measured:

{figures.markdown_table(columns, [map(shown, row.values()) for row in rows.values()])}
What a run takes, and how often it does that:

{figures.markdown_table(list(table[0]), [*(map(shown, line.values()) for line in table),
                                         ["all", *[""] * 5, shown(hours), shown(gb)]])}
hours = (runs x start-up + units x per unit + steps x per step + images x per image) / 3600

On several machines or GPUs like this one (make -j SHARDS=...), calculated from this, at least:

{figures.markdown_table(["devices", "hours", "speed-up", "longest stage"],
                        [map(shown, line.values()) for line in scaling(table, (1, 8, 64))])}
All of this assumes:

- Training images per group {", ".join(map(str, counts[0]))}, val {counts[1]}, test {counts[2]}: {source}.
- Clusters per group: {args.clusters or "the most that --k or --k-max and --min-size allow; --clusters assumes others"}.
- Stages run one after the other, with nothing beside them. prepare and evaluate take minutes and are not counted.
- A unit encodes its images, but no more than it draws in all steps. Generation draws whole batches, and the images that the
  filter rejects; one step is that of one image, with guidance; fine-tuned models take as long as the base model.
- A classifier's images are those that it trains on, in all epochs; one that it only looks at counts a third. Every real
  image is read once for all of them.
- {shown(weights)} GB are fine-tuned weights; KEEP_WEIGHTS=no removes them once their images are drawn.
- Memory is that of the small runs. That which is not anonymous, such as weights mapped from files, the kernel can give back.
- The photographs are random: they compress worse than real ones when they are drawn, and k-means stops later.
"""


def shown(value):
    return value if not isinstance(value, float) else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    count = stage.number(int, 1)
    parser.add_argument("--dataset", required=True, help="for the numbers and sizes of its images")
    parser.add_argument("--bias", required=True, help="of the dataset: a number or natural")
    parser.add_argument("--commands", required=True, help="of the run, separated by @@: COMMANDS of the Makefile")
    parser.add_argument("--photos", type=count, default=64, help="random photographs; larger folders repeat them")
    parser.add_argument("--shapes", choices=("sd15", "tiny"), default="sd15", help="of the models, where BASE or CLIP is "
                        "not a folder; tiny: always base/miniature")
    parser.add_argument("--clusters", type=count, help="clusters to assume per group; default: what --k or --k-max and "
                        "--min-size of cluster.py allow")
    parser.add_argument("--model-seeds", type=count, default=1, help="how often everything before the classifiers is made")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    stage.run(main)
