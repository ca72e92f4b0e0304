"""How much a run takes: the units, steps and images of each command of the Makefile, times what dryrun.py has measured."""

import copy
import importlib
import math
import shlex
from pathlib import Path

from common import imagefolder, stage
from common.files import InputError
from data import prepare
from generate import sound_ones
from train_classifier import RECIPES

PUBLISHED = {  # training images of the four groups, images of val, of test
    "waterbirds": ((3498, 184, 56, 1057), 1199, 5794),
    "celeba": ((71629, 66874, 22880, 1387), 19867, 19962),
    "utkface": ((1000, 5700, 900, 6200), 1700, 1700),  # our estimate: none are published
}
GROUPS = [(0, 0), (0, 1), (1, 0), (1, 1)]
EVERY = {"startup_s": "runs", "unit_s": "units", "step_s": "steps", "image_s": "images"}  # seconds of a row: how often

# ------------------------------------------------------------------------------------ the images and the commands


def counts_of(data, dataset, bias):
    """(sizes of the training groups, images of val, of test), and in words where they are from; data: the dataset's folder,
    which need not exist."""
    if (data / "metadata.csv").is_file():
        rows = imagefolder.read_metadata(data)
        sizes = dict.fromkeys(imagefolder.group_counts(rows), 0) | imagefolder.group_counts(
            row for row in rows if row["split"] == "train")
        return (list(sizes.values()), *(sum(row["split"] == split for row in rows) for split in ("val", "test"))), data
    if dataset == "digits":
        aligned = round(500 * float(bias))
        return ([aligned, 500 - aligned, 500 - aligned, aligned], 600, 3400), "those of the miniature"
    if dataset not in PUBLISHED:
        raise InputError(data, "not found, and its images must be counted", f"make DATASET={dataset} {data}/config.json")
    train, val, test = PUBLISHED[dataset]
    if bias != "natural":
        rows = [{"file_name": f"{y}{a}-{i}", "split": "train", "y": y, "a": a} for (y, a), size in zip(GROUPS, train)
                for i in range(size)]
        left = imagefolder.group_counts(prepare.subsample(rows, float(bias)))
        train = [left.get(imagefolder.group_name(y, a), 0) for y, a in GROUPS]
    return (list(train), val, test), "estimated, none are published" if dataset == "utkface" else "the published ones"


class Command:
    """A command of the Makefile: its script, flags and settings; title: what it makes; row: what measures it."""

    def __init__(self, text):
        self.script, *self.flags = shlex.split(text)
        module = importlib.import_module(self.script.removesuffix(".py").replace("/", "."))
        self.settings = module.parse([*self.flags, "--out", "runs/.check"])
        self.title = self.row = self.method = Path(self.script).stem


def read_commands(text):
    """The commands that are measured. In COMMANDS a method's finetune.py follows its generate.py, whose --models name it."""
    commands = [Command(part) for part in text.split(" @@ ") if part.split()[0] not in ("data/prepare.py", "evaluate.py")]
    if "/pseudo" not in text:  # nothing reads the pseudo-groups
        commands = [command for command in commands if not getattr(command.settings, "as_attribute", False)]
    first = {}  # commands of one kind cost the same: the first one is measured
    for before, command in zip([None, *commands], commands):
        settings = command.settings
        if command.script == "generate.py":
            command.method = settings.models.name if settings.models else "vanilla"
            command.title = f"generate {command.method}"
        elif command.script == "finetune.py":
            command.method, command.title = before.method, f"finetune {before.method}"
            kind = made.settings_of(settings, "steps", "per", "balance", "learning_rate", "seed")
            command.row = first.setdefault((*map(str, kind.values()), bool(settings.prior)), command.title)
        elif command.script == "train_classifier.py":
            command.title = "train " + settings.recipe + (f" {settings.synthetic.name}" if settings.synthetic else "")
            command.row = first.setdefault(bool(settings.synthetic), f"train {settings.recipe}")
    draws = [command for command in commands if command.script == "generate.py"]
    if any(getattr(command.settings, "prior", None) for command in commands) and all(draw.settings.models for draw in draws):
        vanilla = copy.copy(draws[0])  # for prior preservation
        vanilla.method, vanilla.title = "vanilla", "generate vanilla"
        commands.append(vanilla)
    return commands


# ---------------------------------------------------------------------------------------------------- how much


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


def amounts_of(command, commands, counts, assumed):
    """{units, steps, images} of a command, and of how many things its row's disk_mb is that of one."""
    settings, (train, val, test) = command.settings, counts
    all_settings = {script: [other.settings for other in commands if other.script == script] for script in (
        "cluster.py", "generate.py", "finetune.py")}
    drawn = next((other.images for other in all_settings["generate.py"]), 0)
    tuned = next((other.settings for other in commands
                  if other.script == "finetune.py" and other.method == command.method), None)
    units = unit_sizes(tuned, train, next(iter(all_settings["cluster.py"]), None), assumed)
    if command.script == "finetune.py":
        seen, prior = settings.steps * settings.batch * settings.accumulation, drawn if settings.prior else 0
        prior *= len(train) if settings.per == "dataset" else 1
        images = sum(min(size, seen) + min(prior, seen) for size in units)
        return {"units": len(units), "steps": settings.steps * len(units), "images": round(images)}, len(units)
    if command.script == "generate.py":
        units = max(len(units), len(train))  # one model for all draws each group by itself
        share = math.ceil(settings.images * len(train) / units)
        images = units * math.ceil(sound_ones(share, settings) / settings.batch) * settings.batch
        return {"units": units, "steps": images * settings.steps, "images": images}, images
    if command.script == "train_classifier.py":
        images, seeds = passes(settings, train, drawn, val, test, settings.epochs), len(settings.seeds)
        return {"units": seeds, "images": round(seeds * images)}, seeds
    images = {"cluster.py": sum(train), "data/embed.py": sum(train) + val + test}.get(
        command.script, drawn * len(train) * len(all_settings["generate.py"]))
    return {"images": images}, images


def line_of(title, name, rows, amounts, disk, times=1):
    """A row of projection.csv: `times` the amounts at the rates of the row `name` of dryrun.csv."""
    amounts, row = {"runs": 1, "units": 0, "steps": 0, "images": 0} | amounts, rows[name]
    amounts = {what: times * count for what, count in amounts.items()}
    line = {"stage": title, "measured": name, **amounts, "hours": "", "gb": ""}
    if row["result"] == "ok":
        line["hours"] = round(sum(line[what] * row[seconds] for seconds, what in EVERY.items()) / 3600, 4)
        line["gb"] = round(times * disk * row["disk_mb"] / 1000, 4)
    return line


def projection(commands, rows, counts, assumed, model_seeds):
    """The rows of projection.csv; rows: {name: row of dryrun.csv}. assumed: clusters per group, or None."""
    table = [line_of("read images", "read images", rows, {"images": sum(counts[0]) + counts[1] + counts[2]}, 0)]
    clustered = any(getattr(command.settings, "per", "") == "cluster" for command in commands)
    for command in commands:
        again = getattr(command.settings, "synthetic", command.script != "data/embed.py")  # once per model seed
        if command.script != "cluster.py" or clustered:
            table.append(line_of(command.title, command.row, rows, *amounts_of(command, commands, counts, assumed),
                                 model_seeds if again else 1))
    return table


def scaling(table, devices):
    """Hours of a run on several devices, GPUs or nodes: a lower bound. Returns [{devices, hours, speed-up, longest}].

    Work is divided evenly, but a stage waits for the one before it, and is divided into no more parts than it has: images to
    embed and to draw, units to fine-tune, seeds to train; all else is one part. longest: the stage that takes most of that chain.
    """
    divided = {"embed": "images", "generate": "images", "finetune": "units", "train": "units"}

    def on(count, line):
        parts = line[divided[kind]] if (kind := line["stage"].split()[0]) in divided else 1
        return line["hours"] / min(count, parts)

    lines, found = [line for line in table if line["hours"]], []
    total = sum(line["hours"] for line in lines)
    for count in devices if lines else ():
        chain = {}
        for line in lines:
            name = "generate vanilla" if line["stage"] == "generate vanilla" else line["stage"].split()[0]
            chain[name] = max(chain.get(name, 0), on(count, line))
        hours = max(total / count, sum(chain.values()))
        found.append({"devices": count, "hours": hours, "speed-up": total / hours, "longest": max(chain, key=chain.get)})
    return found
