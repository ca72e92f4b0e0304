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

import copy
import importlib
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the repository, which this script is run from anywhere
from common import files, imagefolder, models, stage
from common.files import InputError
from data import prepare
from evaluation import figures
from generate import sound_ones
from train_classifier import RECIPES

np = stage.lazy("numpy")

PUBLISHED = {  # training images of the four groups, images of val, of test
    "waterbirds": ((3498, 184, 56, 1057), 1199, 5794),
    "celeba": ((71629, 66874, 22880, 1387), 19867, 19962),
    "utkface": ((1000, 5700, 900, 6200), 1700, 1700),  # our estimate: none are published
}
PIXELS = {"waterbirds": (500, 375), "celeba": (178, 218), "utkface": (200, 200), "digits": (32, 32)}
GROUPS = [(0, 0), (0, 1), (1, 0), (1, 1)]
COLUMNS = ("measured", "startup_s", "unit_s", "step_s", "image_s", "memory_mb", "anonymous_mb", "gpu_mb", "disk_mb", "disk_per",
           "result")
EVERY = {"startup_s": "runs", "unit_s": "units", "step_s": "steps", "image_s": "images"}  # seconds of a row: how often

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


def dataset(args, train, groups=GROUPS):
    """A folder of `train` images in all, and two of each group in val and test, beside one of random embeddings: the flags
    --data and --embeddings. Its images are links to the photographs."""
    path = args.out / "data" / f"{train}-in-{len(groups)}-groups"
    template, _, classes, attributes = prepare.WORDS["digits"]  # any will do: prompts are padded to one length
    rows = [{"split": split, "y": y, "a": a, "cluster": 0, "text": template.format(y=classes[y], a=attributes[a])}
            for split, count in (("train", train), ("val", 2 * len(groups)), ("test", 2 * len(groups)))
            for y, a in (groups[i % len(groups)] for i in range(count))]
    rows = [{"file_name": f"images/{i}.jpg", **row} for i, row in enumerate(rows)]
    embeddings = np.random.default_rng(0).standard_normal((len(rows), args.width), np.float32)
    if not path.is_dir():
        with files.replacing(path) as hidden:
            (hidden / "images").mkdir(parents=True)
            for i, row in enumerate(rows):
                os.link(args.photographs[i % len(args.photographs)], hidden / row["file_name"])
            files.write_csv(hidden / "metadata.csv", rows)
            models.save_embeddings(hidden, rows, embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))
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
        """Returns {seconds of the process, work_s of its units, memory_mb, anonymous_mb, gpu_mb, disk_mb}."""
        out = self.out / "runs" / name
        if self.known.get(name, {}).get("command") != list(words):
            files.remove(out)
            used = self.process(name, words)
            units = [files.read_json(path) for path in (*out.glob("*/config.json"), out / "config.json")]
            self.known[name] = {
                "command": words, **used, "work_s": sum(unit.get("seconds", 0) for unit in units),
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
            raise Failed(([f"exit status {status}"] + log.read_text(errors="replace").split("\n"))[-2].strip()[:300])
        return {"seconds": round(seconds, 2), "anonymous_mb": anonymous // 1024,
                "memory_mb": ended[2].ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)}


def anonymous_kb(process):
    try:
        status = Path(f"/proc/{process}/status").read_text().split("\n")
    except OSError:  # not on Linux
        return 0
    return sum(int(line.split()[1]) for line in status if line.startswith("RssAnon:"))


def row_of(measured, runs, per, count, **seconds):
    """A row of dryrun.csv without its name. The disk is that of the last run, per `per`, of which it wrote `count`."""
    return {"measured": measured, **{name: round(max(seconds.get(name, 0), 0), 5) for name in EVERY},
            **{name: max(run[name] for run in runs) for name in ("memory_mb", "anonymous_mb", "gpu_mb")},
            "disk_mb": round(runs[-1]["disk_mb"] / count, 5), "disk_per": per, "result": "ok"}


def difference(runs, what, count):
    """Seconds per step or image by which the last run exceeds the one before; at least what the clocks can tell."""
    return max(runs[-1][what] - runs[-2][what], 0.05) / count


def reading(run, args):
    code = "import sys; from common import imagefolder; [imagefolder.load_image(p, int(sys.argv[1])) for p in sys.argv[2:]]"
    code, paths = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}", list(map(str, args.photographs))
    runs = [run(f"read-{times}", "-c", code, "256", *paths * times) for times in (1, 20)]
    image_s = difference(runs, "seconds", 19 * len(paths))
    return row_of(f"{len(paths)} and {20 * len(paths)} images", runs, "", 1, image_s=image_s,
                  startup_s=runs[0]["seconds"] - len(paths) * image_s)


def by_images(run, name, command, few, many, flags):
    """A stage whose time is a start-up and a time per image; flags: a function of the number of images."""
    runs = [run.stage(f"{name}-{count}", command, **flags(count)) for count in (few, many)]
    image_s = difference(runs, "seconds", many - few)
    return row_of(f"{few} and {many} images", runs, "image", many, image_s=image_s,
                  startup_s=runs[0]["seconds"] - few * image_s)


def finetuning(run, name, command, args, more, encode_s):
    """One step, `more` steps, and on more images: these are encoded at first. encode_s: seconds per image, if known."""
    settings, batch = command.settings, command.settings.batch * command.settings.accumulation
    sides, many = 2 if settings.prior else 1, batch * (1 + more // 2)  # images, and class images

    def start(number, steps, images):
        data = dataset(args, images, GROUPS[:1])["data"]
        return run.stage(f"{name}-{number}", command, data=data, steps=steps, **({"prior": data} if settings.prior else {}))

    runs = [start(1, 1, batch), start(2, 1 + more, batch)]
    step_s = difference(runs, "work_s", more)
    if encode_s is None:
        runs.append(start(3, 1 + more, many))
        encode_s = difference(runs, "work_s", sides * (many - batch))
    return row_of(f"1 and {1 + more} steps of {batch} images" + " and as many class images" * (sides - 1), runs, "unit", 1,
                  startup_s=runs[0]["seconds"] - runs[0]["work_s"], step_s=step_s, image_s=encode_s,
                  unit_s=runs[0]["work_s"] - step_s - sides * batch * encode_s)


def generating(run, command, args, more, images, batch):
    """Images of 1 and of `more` steps, by the base model and without a filter."""
    flags = {"keep": 1, "images": images, "batch": batch, **dataset(args, 1, GROUPS[:1])}
    flags |= {} if command.settings.clip_threshold is None else {"clip_threshold": 0}
    command = copy.copy(command)
    if "--models" in command.flags:
        i = command.flags.index("--models")
        command.flags = [flag for flag in command.flags[:i] + command.flags[i + 2:] if flag != "--drop-weights"]
    runs = [run.stage(f"generate-{steps}", command, steps=steps, **flags) for steps in (1, 1 + more)]
    step_s = difference(runs, "work_s", images * more)
    return row_of(f"{images} images, {batch} at once, 1 and {1 + more} steps", runs, "image", images, step_s=step_s,
                  startup_s=runs[0]["seconds"] - runs[0]["work_s"], image_s=max(runs[0]["work_s"] / images - step_s, 0.001))


def classifying(run, name, command, args, epochs):
    """A single run: a seed's seconds are without the start-up."""
    size = math.ceil(command.settings.batch / 4)
    data = dataset(args, 4 * size)["data"]
    done = run.stage(name, command, data=data, seeds=0, epochs=epochs, weights="none",
                     **({"synthetic": data} if command.settings.synthetic else {}))
    return row_of(f"{epochs} epochs of {4 * size} images", [done], "unit", 1, startup_s=done["seconds"] - done["work_s"],
                  image_s=max(done["work_s"], 0.05) / passes(command.settings, [size] * 4, size, 8, 8, epochs))


# ------------------------------------------------------------------------------------------------ projecting


def passes(settings, train, drawn, val, test, epochs):
    """The images that one seed trains on. One that is only looked at is a third: a forward pass without a backward one.

    train: sizes of the groups; drawn: synthetic images per group; val, test: images.
    """
    trained, seen = 0, val + test
    for phase in RECIPES[settings.recipe]:
        images = {"real": sum(train), "synthetic": drawn * len(train), "mixed": sum(train) + drawn * len(train),
                  "filled": max(train) * len(train), "val": 0}[phase.images]
        if phase.drawn == "smallest group":
            images = min(filter(None, train)) * len(train)
        times = settings.jtt_epochs if phase.keeps == "errors" else 0 if phase.learns == "last layer" else epochs
        trained += times * images
        seen += times * val if times else images + val  # the last layer learns from features, computed once
    return trained + seen / 3


def unit_sizes(tuned, train, cluster, assumed):
    """Images of each unit of a method. tuned: its settings of finetune.py, None for the base model; cluster: those of
    cluster.py. A group has `assumed` clusters, or as many as the flags allow."""
    if tuned is None or tuned.per == "group":
        return [size for size in train if size or tuned is None]
    if tuned.per == "dataset":
        return [sum(train)]
    wanted = assumed or (cluster.k_max if cluster.k == "auto" else cluster.k)
    counts = [max(1, min(wanted, size // cluster.min_size)) for size in train]
    return [size / count for size, count in zip(train, counts) for _ in range(count) if size]


def amounts_of(command, commands, train, val, test, args):
    """{units, steps, images} of a command, and how many things its row's disk_mb is of one of."""
    settings, tuned = command.settings, {other.name: other.settings for other in commands if other.script == "finetune.py"}
    cluster = next((other.settings for other in commands if other.script == "cluster.py"), None)
    drawn = next((other.settings.images for other in commands if other.script == "generate.py"), 0)
    units = unit_sizes(tuned.get(command.name), train, cluster, args.clusters)
    if command.script == "finetune.py":
        seen, prior = settings.steps * settings.batch * settings.accumulation, drawn if settings.prior else 0
        prior *= len(train) if settings.per == "dataset" else 1
        return {"units": len(units), "steps": settings.steps * len(units),
                "images": round(sum(min(size, seen) + min(prior, seen) for size in units))}, len(units)
    if command.script == "generate.py":
        units = max(len(units), len(train))  # one model for all draws each group by itself
        share = math.ceil(settings.images * len(train) / units)
        images = units * math.ceil(sound_ones(share, settings) / settings.batch) * settings.batch
        return {"units": units, "steps": images * settings.steps, "images": images}, images
    if command.script == "train_classifier.py":
        images = passes(settings, train, drawn, val, test, settings.epochs)
        return {"units": len(settings.seeds), "images": round(len(settings.seeds) * images)}, len(settings.seeds)
    images = {"cluster.py": sum(train), "evaluation/images.py": drawn * len(train) * sum(
        other.script == "generate.py" for other in commands)}.get(command.script, sum(train) + val + test)
    return {"images": images}, images


def projected(title, name, rows, amounts, disk, times):
    """A row of projection.csv, from the row `name` of dryrun.csv. disk: of how many things its disk_mb is."""
    amounts = {"runs": 1, "units": 0, "steps": 0, "images": 0} | amounts
    amounts, row = {what: times * count for what, count in amounts.items()}, rows[name]
    line = {"stage": title, "measured": name, **amounts, "hours": "", "gb": ""}
    if row["result"] == "ok":
        line["hours"] = round(sum(amounts[what] * row[seconds] for seconds, what in EVERY.items()) / 3600, 4)
        line["gb"] = round(times * disk * row["disk_mb"] / 1000, 4)
    return line


# --------------------------------------------------------------------------------------------------- the stage


class Command:
    """A command of the Makefile; row: the name of the row of dryrun.csv that measures it."""

    def __init__(self, text):
        self.script, *self.flags = shlex.split(text)
        self.settings = importlib.import_module(self.script.removesuffix(".py").replace("/", ".")).parse(
            [*self.flags, "--out", "runs/.check"])
        self.title = self.row = self.name = Path(self.script).stem


def read_commands(text):
    """The commands that are measured. finetune.py's follow generate.py's, whose --models name them."""
    commands = [Command(part) for part in text.split(" @@ ") if part.split()[0] not in ("data/prepare.py", "evaluate.py")]
    first = {}
    for before, command in zip([None, *commands], commands):
        settings = command.settings
        if command.script == "generate.py":
            command.name = settings.models.name if settings.models else "vanilla"
            command.title = f"generate {command.name}"
        elif command.script == "finetune.py":
            command.name, kind = before.name, stage.settings_of(settings, "steps", "per", "balance", "learning_rate", "seed")
            command.title = f"finetune {command.name}"
            command.row = first.setdefault((*map(str, kind.values()), bool(settings.prior)), command.title)
        elif command.script == "train_classifier.py":
            command.title = "train " + settings.recipe + (f" {settings.synthetic.name}" if settings.synthetic else "")
            command.row = first.setdefault(bool(settings.synthetic), f"train {settings.recipe}")
    draws = [command for command in commands if command.script == "generate.py"]
    if any(getattr(command.settings, "prior", None) for command in commands) and all(draw.settings.models for draw in draws):
        vanilla = copy.copy(draws[0])  # for prior preservation
        vanilla.name, vanilla.title = "vanilla", "generate vanilla"
        commands.append(vanilla)
    return commands


def counts_of(args):
    """(sizes of the training groups, images of val, of test), and in words where they are from."""
    data = ROOT / "data" / f"{args.dataset}-{args.bias}"
    if (data / "metadata.csv").is_file():
        rows = imagefolder.read_metadata(data)
        sizes = dict.fromkeys(imagefolder.group_counts(rows), 0) | imagefolder.group_counts(
            row for row in rows if row["split"] == "train")
        return (list(sizes.values()), *(sum(row["split"] == split for row in rows) for split in ("val", "test"))), "yours"
    if args.dataset == "digits":
        aligned = round(500 * float(args.bias))
        return ([aligned, 500 - aligned, 500 - aligned, aligned], 600, 3400), "the miniature's"
    if args.dataset not in PUBLISHED:
        raise InputError(data, "not found: the dry run takes its numbers of images", "prepare this dataset first")
    train, val, test = PUBLISHED[args.dataset]
    if args.bias != "natural":
        rows = [{"file_name": f"{y}{a}-{i}", "split": "train", "y": y, "a": a} for (y, a), size in zip(GROUPS, train)
                for i in range(size)]
        left = imagefolder.group_counts(prepare.subsample(rows, float(args.bias)))
        train = [left.get(imagefolder.group_name(y, a), 0) for y, a in GROUPS]
    return (list(train), val, test), "estimated, none are published" if args.dataset == "utkface" else "the published ones"


def measure(commands, args):
    """{name: row of dryrun.csv}, and the name of the GPU, if there is one. Removes the record of runs if none failed."""
    run, rows, encode_s = Runs(args.out), {}, None
    base, clip = (next((vars(command.settings).get(flag) for command in commands if flag in vars(command.settings)), "")
                  for flag in ("base", "clip"))
    if args.shapes == "tiny":
        base, clip = ROOT / "base" / "miniature", ROOT / "base" / "miniature" / "clip"
    made = args.out / "models" / "base"
    if not (Path(base).exists() and Path(clip).exists()):
        if not made.is_dir():
            print(f"making models of Stable Diffusion 1.5's shapes in {made.parent}", flush=True)
            run.process("models", [str(ROOT / "base" / "random_model.py"), "--out", str(made.parent)])
        base, clip = (path if Path(path).exists() else made / part for path, part in ((base, ""), (clip, "clip")))
    for command in commands:
        command.flags += [word for flag, model in (("base", base), ("clip", clip)) if flag in vars(command.settings)
                          for word in (f"--{flag}", str(model))]
    for model in (base, clip):
        files.model_digest(model)  # it is kept: the first stage would pay for it
    args.photographs = make_photos(args.out / "photos", args.photos, PIXELS.get(args.dataset, PIXELS["waterbirds"]))
    vision = files.read_json(Path(clip) / "config.json")
    args.width = vision["projection_dim"]
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    gpu = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()

    def more(pixels):
        return 2 if pixels > 128 and not gpu else 50

    drawing = more(8 * files.read_json(Path(base) / "unet" / "config.json").get("sample_size", 64))
    looking = 8 + 16 * more(vision["vision_config"]["image_size"])
    jobs = {"read images": (reading, args)}
    for command in commands:
        name, batch = command.row, getattr(command.settings, "batch", 1)
        one = batch if drawing > 2 else min(batch, 4)  # a CPU is not faster with more
        jobs.setdefault(name, {
            "data/embed.py": (by_images, name, command, 8, looking, lambda n: {"data": dataset(args, n)["data"]}),
            "cluster.py": (by_images, name, command, 500, 2000, lambda n: dataset(args, n, GROUPS[:1])),
            "finetune.py": (finetuning, name, command, args, drawing),
            "generate.py": (generating, command, args, drawing, one if drawing == 2 else 4 * one, one),
            "train_classifier.py": (classifying, name, command, args, more(getattr(command.settings, "resolution", 0)) // 2),
            "evaluation/images.py": (by_images, name, command, 8, looking, lambda n: {
                **dataset(args, 64), "synthetic": dataset(args, n)["data"]})}[command.script])
    for name, (function, *arguments) in jobs.items():
        try:
            if function is finetuning:
                arguments.append(encode_s)
            rows[name] = {"stage": name} | function(run, *arguments)
            encode_s = rows[name]["image_s"] if function is finetuning else encode_s
        except Failed as error:
            print(f"{name}: failed: {error}", file=sys.stderr, flush=True)
            rows[name] = {"stage": name} | dict.fromkeys(COLUMNS, "") | {"result": f"failed: {error}"}
    if all(row["result"] == "ok" for row in rows.values()):
        files.remove(args.out / "measured.json")
    return rows, gpu


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    commands, ((train, val, test), source) = read_commands(args.commands), counts_of(args)
    stage.start(args, {})
    for name in ("photos", "data", "runs", "logs"):
        (args.out / name).mkdir(exist_ok=True)
    rows, gpu = measure(commands, args)
    table = [projected("read images", "read images", rows, {"images": sum(train) + val + test}, 0, 1)]
    for command in commands:
        if command.script != "cluster.py" or any(getattr(other.settings, "per", "") == "cluster" for other in commands):
            again = command.script != "data/embed.py" and (command.script != "train_classifier.py" or command.settings.synthetic)
            table.append(projected(command.title, command.row, rows, *amounts_of(command, commands, train, val, test, args),
                                   args.model_seeds if again else 1))
    files.write_csv(args.out / "dryrun.csv", list(rows.values()))
    files.write_csv(args.out / "projection.csv", table)
    text = report(rows, table, (train, val, test), source, gpu, commands, args)
    files.write_text(args.out / "dryrun.md", text)
    print(text)
    return int(any(row["result"] != "ok" for row in rows.values()))


def report(rows, table, counts, source, gpu, commands, args):
    def shown(value):
        return f"{value:.3g}" if isinstance(value, float) and value < 1000 else round(value) if value != "" and not \
            isinstance(value, str) else value

    known = [line for line in table if line["hours"] != ""]
    hours, gb = (sum(line[name] for line in known) for name in ("hours", "gb"))
    weights = sum(line["gb"] for line in known if line["stage"].startswith("finetune"))
    failed = [row["stage"] for row in rows.values() if row["result"] != "ok"]
    train, val, test = counts
    assumed = args.clusters or "as many clusters as --k-max and --min-size allow (--clusters N assumes N)"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return "\n".join([
        f"# {args.dataset}, bias {args.bias}: about {hours:.3g} hours and {gb:.3g} GB on this machine", "",
        f"{gpu or 'No GPU'}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores, "
        f"{memory:.0f} GB of memory, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}. "
        + (f"Without {', '.join(failed)}, which failed. " if failed else "")
        + f"{weights:.3g} GB are fine-tuned weights; KEEP_WEIGHTS=no removes them once their images are drawn.", "",
        "What was measured:", "", figures.markdown_table(
            ["stage", "measured", "start-up, s", "per unit or seed, s", "per step, s", "per image, s", "images/s",
             "memory, MB", "anonymous, MB", "GPU, MB", "disk, MB", "result"],
            [[*map(shown, list(row.values())[:6]), shown(1 / row["image_s"]) if row["image_s"] else "",
              *map(shown, (row["memory_mb"], row["anonymous_mb"], row["gpu_mb"] or "")),
              f"{shown(row['disk_mb'])} per {row['disk_per']}" if row["disk_per"] else "", row["result"]]
             for row in rows.values()]),
        "What the run will take:", "", figures.markdown_table(list(table[0]), [
            [*map(shown, line.values())] for line in table] + [["all", "", "", "", "", "", shown(hours), shown(gb)]]),
        "hours = (runs x start-up + units x per unit + steps x per step + images x per image) / 3600. Assumed:", "",
        f"- Training images per group {', '.join(map(str, train))}; {val} of val, {test} of test: {source}.",
        f"- A group has {assumed}.",
        "- One stage after the other, on this machine, with nothing else running. prepare and evaluate are not counted.",
        "- Images: fine-tuning encodes a unit's images, at most as many as it draws; generation draws whole batches, and what "
        "the filter rejects. A classifier's are those that it trains on; one that it only looks at counts a third. Each real "
        "image is read once beside these.",
        "- A step of generation is one of one image. All methods' images take as long as the base model's.",
        "- Memory and disk are those of the small runs. The kernel's peak of memory includes weights mapped from files, the "
        "anonymous does not. Random images compress worse than real ones.",
        "- Weights and photographs are random, which changes no time but that of k-means: it stops later."])


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    count = stage.number(int, 1)
    parser.add_argument("--dataset", required=True, help="for the numbers and sizes of its images")
    parser.add_argument("--bias", required=True, help="of the dataset: a number or natural")
    parser.add_argument("--commands", required=True, help="all commands of the run, separated by @@: the Makefile's COMMANDS")
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
