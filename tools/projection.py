"""How much a run takes: the units, steps and images of each command, for tools/dryrun.py."""

import importlib
import math
from dataclasses import dataclass

from common import imagefolder, made
from common.files import InputError
from train_classifier import ERM, RECIPES

PUBLISHED = {  # training images of the four groups, images of val, of test
    "waterbirds": ((3498, 184, 56, 1057), 1199, 5794),
    "celeba": ((71629, 66874, 22880, 1387), 19867, 19962),
    "utkface": ((924, 5812, 994, 5743), 1682, 1712),
}
GROUPS = [(0, 0), (0, 1), (1, 0), (1, 1)]
EVERY = {"startup_s": "runs", "unit_s": "units", "step_s": "steps", "image_s": "images"}


def counts_of(data, dataset, bias, subsample):
    """(sizes of the training groups, images of val, of test), and where they are from.

    data: the dataset's folder, which need not exist; subsample: of data/prepare.py.
    """
    if (data / "metadata.csv").is_file():
        rows = imagefolder.read_metadata(data)
        of = {split: imagefolder.group_counts(row for row in rows if row["split"] == split)
              for split in imagefolder.SPLITS}
        sizes = dict.fromkeys(imagefolder.group_counts(rows), 0) | of["train"]
        return (list(sizes.values()), sum(of["val"].values()), sum(of["test"].values())), data
    if dataset == "digits":
        common = round(500 * float(bias))
        return ([common, 500 - common, 500 - common, common], 600, 3400), "those of the miniature"
    if dataset not in PUBLISHED:
        raise InputError(data, "not found, and its images must be counted",
                         f"make DATASET={dataset} {data}/config.json")
    train, val, test = PUBLISHED[dataset]
    if bias != "natural":
        rows = [{"file_name": f"{y}{a}-{i}", "split": "train", "y": y, "a": a}
                for (y, a), size in zip(GROUPS, train) for i in range(size)]
        left = imagefolder.group_counts(subsample(rows, float(bias)))
        train = [left.get(imagefolder.group_name(y, a), 0) for y, a in GROUPS]
    return (list(train), val, test), "the published ones (UTKFace: by our loader)"


@dataclass
class Command:
    """A command of the Makefile."""

    words: list  # the script and its flags
    settings: object  # its arguments, parsed
    title: str  # what it makes
    method: str  # of finetune.py and generate.py
    row: str  # what measures it: commands of one kind cost the same


def read_commands(plan):
    """The commands that are measured. plan: {folder: words}, of tools.plan.read_plan()."""
    commands, rows = [], {}
    for folder, words in plan.items():
        script, name = words[0], folder.rpartition("/")[2]
        if script in ("data/prepare.py", "evaluate.py"):
            continue
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        settings = module.parse([*words[1:], "--out", "runs/.check"])
        title, kind = script.rpartition("/")[2].removesuffix(".py"), script
        if script == "finetune.py":
            title = f"finetune {name}"
            same = made.settings_of(settings, "steps", "per", "balance", "learning_rate", "seed")
            kind = (*map(str, same.values()), bool(settings.prior))
        elif script == "generate.py":
            title = f"generate {name}"
        elif script == "train_classifier.py":
            drawn = f" {settings.synthetic.name}" if settings.synthetic else ""
            title, kind = f"train {settings.recipe}{drawn}", bool(settings.synthetic)
        if script == "train_classifier.py":
            row = rows.setdefault(kind, f"train {settings.recipe}")
        else:
            row = rows.setdefault(kind, "generate" if script == "generate.py" else title)
        commands.append(Command(words, settings, title, name, row))
    return commands


def passes(settings, train, drawn, val, test):
    """The images that one seed trains on. One that is only looked at is a third: no backward pass.

    train: sizes of the groups; drawn: synthetic images per group; val, test: images.
    """
    trained, seen = 0, val + test
    sizes = {"real": sum(train), "synthetic": drawn * len(train), "val": 0,
             "mixed": sum(train) + drawn * len(train), "filled": max(train) * len(train)}
    for phase in RECIPES[settings.recipe]:
        images, times = sizes[phase.images], settings.epochs
        if settings.erm and phase == ERM:
            continue
        if phase.images == "synthetic":
            times = settings.pretrain_epochs
        if phase.drawn == "smallest group":
            images = min(filter(None, train)) * len(train)
        if phase.keeps == "errors":
            times = settings.jtt_epochs
        if phase.learns == "last layer":  # it learns from features, computed once
            seen += images + val
        else:
            trained += times * images
            seen += times * val
    return trained + seen / 3


def unit_sizes(tuned, train, cluster, assumed):
    """Images of each unit of a method; tuned, cluster: settings of its commands, or None.

    A group has `assumed` clusters, or as many as the flags of cluster.py allow.
    """
    if tuned is None or tuned.per == "group":
        return [size for size in train if size or tuned is None]
    if tuned.per == "dataset":
        return [sum(train)]
    wanted = assumed or (cluster.k_max if cluster.k == "auto" else cluster.k)
    counts = [max(1, min(wanted, size // cluster.min_size)) for size in train]
    return [size / count for size, count in zip(train, counts) for _ in range(count) if size]


def amounts_of(command, commands, counts, assumed):
    """({units, steps, images} of a command, of how many things its row's disk_mb is that of one)"""
    def all_of(script):
        return [other for other in commands if other.words[0] == script]

    settings, (train, val, test), script = command.settings, counts, command.words[0]
    drawn = next((other.settings.images for other in all_of("generate.py")), 0)
    tuned = next((other.settings for other in all_of("finetune.py")
                  if other.method == command.method), None)
    cluster = next((other.settings for other in all_of("cluster.py")), None)
    units = unit_sizes(tuned, train, cluster, assumed)
    if script == "finetune.py":
        seen = settings.steps * settings.batch * settings.accumulation
        prior = drawn * (len(train) if settings.per == "dataset" else 1) if settings.prior else 0
        images = sum(min(size, seen) + min(prior, seen) for size in units)
        steps = settings.steps * len(units)
        return {"units": len(units), "steps": steps, "images": round(images)}, len(units)
    if script == "generate.py":
        units = max(len(units), len(train))  # one model for all draws each group by itself
        wanted = math.ceil(math.ceil(settings.images * len(train) / units) / settings.keep)
        images = units * math.ceil(wanted / settings.batch) * settings.batch
        steps = images * settings.steps * (2 if settings.edit else 1)  # there and back
        return {"units": units, "steps": steps, "images": images}, images
    if script == "train_classifier.py":
        seeds = len(settings.seeds)
        images = passes(settings, train, drawn, val, test)
        return {"units": seeds, "images": round(seeds * images)}, seeds
    images = {"cluster.py": sum(train), "data/embed.py": sum(train) + val + test}.get(
        script, drawn * len(train) * len(all_of("generate.py")))
    return {"images": images}, images


def projection(commands, rows, counts, assumed, model_seeds):
    """The rows of projection.csv; rows: {name: row of dryrun.csv}; assumed: clusters per group."""
    images = sum(counts[0]) + counts[1] + counts[2]
    table = [line_of("read images", "read images", rows, {"images": images}, 0, 1)]
    for command in commands:
        synthetic = getattr(command.settings, "synthetic", command.words[0] != "data/embed.py")
        table.append(line_of(command.title, command.row, rows,
                             *amounts_of(command, commands, counts, assumed),
                             model_seeds if synthetic else 1))
    return table


def line_of(title, name, rows, amounts, disk, times):
    """A row of projection.csv: `times` the amounts at the rates of the row `name`."""
    row, line = rows[name], {"stage": title, "measured": name}
    amounts = {"runs": 1, "units": 0, "steps": 0, "images": 0} | amounts
    line |= {what: times * count for what, count in amounts.items()} | {"hours": "", "gb": ""}
    if row["result"] == "ok":
        seconds = sum(line[what] * row[each] for each, what in EVERY.items())
        line["hours"] = round(seconds / 3600, 4)
        line["gb"] = round(times * disk * row["disk_mb"] / 1000, 4)
    return line


def scaling(table, devices):
    """Hours of a run on several devices: a lower bound. Returns [{devices, hours, ...}].

    A stage waits for the one before it, and is divided into no more parts than it has: images to
    embed and to draw, units to fine-tune, seeds to train; all else is one part.
    """
    divided = {"embed": "images", "generate": "images", "finetune": "units", "train": "units"}
    lines = [line for line in table if line["hours"]]
    total, found = sum(line["hours"] for line in lines), []
    for count in devices if lines else ():
        chain = {}
        for line in lines:
            kind = line["stage"].split()[0]
            parts = line[divided[kind]] if kind in divided else 1
            name = "vanilla" if line["stage"] == "generate vanilla" else kind
            chain[name] = max(chain.get(name, 0), line["hours"] / min(count, parts))
        hours = max(total / count, sum(chain.values()))
        found.append({"devices": count, "hours": hours, "speed-up": total / hours,
                      "longest": max(chain, key=chain.get)})
    return found
