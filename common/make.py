"""What the Makefile asks: are the settings valid, are all flags valid, which folders are out of date, what is done.

    python common/make.py settings OVERRIDES NAME=VALUE...    prints `ok` and settings in one form, or what is wrong
    python common/make.py check FILE COMMANDS                 parses each command with its own script
    python common/make.py status FOLDER...                    what is done, running, failed and to do
    python common/make.py help NAME=VALUE...                  targets, and settings with their values

The first of these runs at every `make`, also before anything is installed: it needs Python's standard library alone.
"""

import ast
import difflib
import fcntl
import importlib
import os
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository
from common import files

HELP = """\
make           run the experiment on {DATASET} at bias {BIAS}: a table, figures, a report
make sweep     the same for several biases: make sweep BIAS="0.9 0.99"
make paper     the paper's recipes and ours at two biases, and a verdict on its claims
make ablate    clustered with one setting changed
make dryrun    what a run will cost on this machine: hours, memory, disk
make status    what is done, running, failed and to do
make -n        show what would run
make test      install and run the tests
make torture   long robustness tests: kills, full disks, bad input, 100,000 images; make test-slurm: the targets on Slurm
make base      train the miniature base model again
make bench     speed and memory beside what one would run instead: make bench BENCH="--peers ~/peers"
make clean     remove runs/{DATASET}-{BIAS}

Settings, for example make K=3 SEEDS="0 1 2 3 4", and flags of a stage, for example make CLUSTER="--k-max 8"
(PREPARE EMBED CLUSTER LORA DREAMBOOTH CLUSTERED COMPOSITIONAL GENERATE CLASSIFIER, PRETRAIN of make base, DRYRUN of make dryrun;
LAUNCH stands before commands):
"""

# --------------------------------------------------------------------------------------------- the settings


class Wrong(Exception):
    pass


def settings(overrides, *values):
    """Prints `ok NAME:=VALUE...` with blanks as `|`, for make to evaluate; or one line that says what is wrong."""
    given = dict(value.split("=", 1) for value in values)
    try:
        if sys.version_info < (3, 11):
            raise Wrong(f"PYTHON is Python {sys.version.split()[0]}; 3.11 or later is needed")
        check_names(overrides)
        settled = settle({name: value.replace(",", " ") for name, value in given.items()}, overrides)
        run_names = [f"runs/{settled['DATASET']}-{settled['BIAS']}" + f"-seed{seed}" * (seed != "0")
                     for seed in settled["MODEL_SEEDS"].split()]
        goals = set(given["MAKECMDGOALS"].split())
        checked = [] if goals and goals <= {"help", "dryrun", "bench", "clean", "test", "torture", "test-slurm", "base"} else stale(
            [f"data/{settled['DATASET']}-{settled['BIAS']}", *run_names])
        for folder in checked:
            print(f"note: {folder}: its files or inputs were changed, it is made again", file=sys.stderr)
        settled["STALE"] = " ".join(checked)
        print("ok", *(f"{name}:={value.strip().replace(' ', '|')}" for name, value in settled.items()))
    except Wrong as error:
        print(error)


def check_names(overrides):
    """Raises Wrong for a variable on make's command line that no Makefile uses."""
    text = "\n".join(path.read_text() for path in (Path("Makefile"), *Path("data").glob("*.mk"),
                                                    *Path("evaluation").glob("*.mk")))
    known = set(re.findall(r"^(?:export )?([A-Z_]+) *\?=", text, re.M)) | set(re.findall(r"\$\(([A-Z_]+)\)", text))
    known -= set(re.findall(r"^([A-Z_]+) *:?=", text, re.M)) | {"MAKE", "MAKEOVERRIDES", "MAKECMDGOALS", "STALE"}
    for name in re.findall(r"(?:^|(?<!\\) )([A-Za-z_][\w.-]*)[:+?]?=", overrides):
        if name not in known and not name.startswith("MAKE"):
            close = difflib.get_close_matches(name, known, 1, 0.5)
            raise Wrong(f"{name}: no such setting ({f'did you mean {close[0]}? ' if close else ''}see make help)")


def settle(values, overrides=""):
    """The settings in one form; raises Wrong, naming the choices, if one is invalid."""
    datasets = sorted(path.stem for path in Path("data").glob("*.mk"))
    if values["DATASET"] not in datasets:
        raise Wrong(f"DATASET={values['DATASET']}: no such dataset (use one of {', '.join(datasets)}, or copy "
                    "data/folder.mk to a name of your own)")
    for name in ("BIAS", "BIASES", "RECIPES"):
        if not values[name].split():
            raise Wrong(f"{name} is empty: see make help")
    biases = [one_bias(text) for text in values["BIAS"].split()]
    if len(biases) > 1 and "sweep" not in values["MAKECMDGOALS"].split():
        raise Wrong(f"BIAS={values['BIAS']}: give one value (or run: make sweep BIAS=\"{values['BIAS']}\")")
    chosen = len(biases) > 1 or "sweep" in values["MAKECMDGOALS"].split() and re.search(r"\bBIAS=", overrides)
    several = biases if chosen else [one_bias(text) for text in values["BIASES"].split()]
    for name in ("SEEDS", "MODEL_SEEDS"):
        if not values[name].split() or not all(re.fullmatch(r"\d+", seed) for seed in values[name].split()):
            raise Wrong(f"{name}={values[name]}: give integers, for example {name}=\"0 1 2\"")
    if not re.fullmatch(r"[1-9]\d*", values["SHARDS"]):
        raise Wrong(f"SHARDS={values['SHARDS']}: give a positive integer")
    for name in ("KEEP_WEIGHTS", "CACHE"):
        if values[name] not in ("yes", "no"):
            raise Wrong(f"{name}={values[name]}: use yes or no")
    recipes, methods, variants = known_recipes()
    trained, drawn = (kind + [name for name, what in variants if (what == "recipe") == (kind is recipes)]
                      for kind in (recipes, methods))
    for recipe in values["RECIPES"].split():
        words = recipe.split("+")
        for word in words:
            if word not in trained + drawn:
                close = difflib.get_close_matches(word, trained + drawn, 1)
                raise Wrong(f"RECIPES: {word} is not a recipe{f', did you mean {close[0]}?' if close else ''} (recipes: "
                            f"{', '.join(recipes)}; methods: {', '.join(methods)}; or one of each, as filled+lora)")
        if len(words) > 2 or len(words) == 2 and (words[0] in drawn) == (words[1] in drawn):
            raise Wrong(f"RECIPES: {recipe}: combine one recipe and one method, as filled+lora")
        redrawn = [word for word in words if (word, "generate --models") in variants]
        if redrawn and values["KEEP_WEIGHTS"] == "no":
            raise Wrong(f"KEEP_WEIGHTS=no: {redrawn[0]} needs the weights of clustered, use KEEP_WEIGHTS=yes")
    return {"BIAS": biases[0], "BIASES": unique(several), "RECIPES": unique(values["RECIPES"].split()),
            **{name: unique(str(int(seed)) for seed in values[name].split()) for name in ("SEEDS", "MODEL_SEEDS")},
            "DATASET": values["DATASET"]}


def one_bias(text):
    """`.950` -> `0.95`."""
    if text == "natural" or re.fullmatch(r"[0-9]*\.?[0-9]+|[0-9]+\.", text) and float(text) <= 1:
        return text if text == "natural" else repr(float(text)).removesuffix(".0")
    raise Wrong(f"BIAS={text}: give a number from 0 to 1, for example 0.95, or natural")


def unique(words):
    return " ".join(dict.fromkeys(words))


def known_recipes():
    """(recipes of train_classifier.py, generative methods, [(name, kind)] of ablations), from where they are defined."""
    tree = ast.parse(Path("train_classifier.py").read_text(encoding="utf-8"))
    recipes = next(node.value for node in tree.body if isinstance(node, ast.Assign)
                   and getattr(node.targets[0], "id", None) == "RECIPES")
    methods, variants = (
        [(name, f"{kind} --models" if "--models" in flags else kind) for name, kind, flags in re.findall(
            r"^([\w.-]+)\.(finetune|generate|recipe) *=(.*)", "\n".join(path.read_text() for path in paths), re.M)]
        for paths in ((Path("Makefile"), *Path("data").glob("*.mk")), (Path("evaluation/experiments.mk"),)))
    return [key.value for key in recipes.keys], ["vanilla", *(name for name, _ in methods)], variants


# ------------------------------------------------------------------------------------------- stale folders


def stale(tops):
    """The finished folders below `tops` whose own files or whose inputs are not what they were when they were made."""
    seen = {}

    def state(path):
        if path not in seen:
            seen[path] = files.listing(path)
        return seen[path]

    found = []
    for top in tops:
        for path in sorted({Path(top) / "config.json", *Path(top).glob("[!.]*/config.json"),
                            *Path(top).glob("[!.]*/[!.]*/config.json")}):
            config = files.read_json(path)
            if "made_by" not in config:  # a file that a stage did not write, or half of it
                if (path.parent / ".stage").is_file() and path.is_file():
                    found.append(str(path.parent))
            elif (config.get("files") != state(str(path.parent)) or any(
                    os.path.exists(name) and state(name) != was for name, was in config.get("inputs", {}).items()
                    if not is_unfinished(name))):
                found.append(str(path.parent))
    return found


def is_unfinished(path):
    """Whether a folder is one that a stage makes, and is not finished: make decides about it by itself."""
    return path.startswith("runs/") and not os.path.isfile(f"{path}/config.json")


# ------------------------------------------------------------------------------------- flags, status and help


def check(record, commands):
    """Parses every command (they are separated by @@) with its script's own parser, and records them if all are valid.

    The first invalid flag is one line and status 2.
    """
    from common import stage  # here, as `settings` must not need it

    for command in commands.split(" @@ "):
        try:
            script, *flags = shlex.split(command)
        except ValueError as error:
            print(f"{command.split()[0]}: error: flags: {error} (check the quotes in this setting)", file=sys.stderr)
            return 2
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        if stage.call(module.parse, [*flags, "--out", "runs/.check"]) == 2:
            return 2
    files.write_text(record, commands)


def status(*folders):
    """Prints one line per folder: done, running, failed or to do, and how many of its units, images or seeds."""
    stages = ("data", "embeddings", "clusters", "modes", "pseudo", "models", "synthetic", "classifiers", "images", "results")

    def in_order(folder):
        parts = Path(folder).parts
        return parts[0] != "data", parts[0] == "runs" and parts[1], stages.index(next(
            (stage for stage in stages if parts[2:] and parts[2].startswith(stage)), "data")), folder

    for folder in sorted(folders, key=in_order):
        print(f"{folder:45} {progress(Path(folder))}")


def progress(folder):
    """What is done of a folder, from its files and logs alone: it works while other machines are at work on it."""
    running = is_locked(folder)
    if (folder / "config.json").is_file() and not running:
        return "done"
    wanted = files.read_json(folder / ".stage").get("wanted", {})
    done = sum(count if (folder / unit / "config.json").is_file() else
               min(count, len(list(folder.glob(f".{unit}.*partial/*.png")))) for unit, count in wanted.items())
    kind = {"models": "units", "synthetic": "images", "classifiers": "seeds"}.get(folder.parent.name)
    parts = f"{done} of {sum(wanted.values())} {kind} done" if wanted else ""
    state = "running" if running else failure(folder) or "to do"
    return ", ".join(part for part in (parts, state, time_left(folder, wanted, done)) if part)


def failure(folder):
    """How the last command that wrote a folder, or a shard of it, failed; nothing if none did."""
    pattern = files.log_of(folder, "*")
    for path in (files.log_of(folder), *sorted(pattern.parent.glob(pattern.name))) if pattern else ():
        last = (path.read_text(encoding="utf-8").splitlines() or [""])[-1] if path.is_file() else "done"
        if not last.startswith("done"):
            return f"{'failed' if 'error' in last.lower() else 'ended after'}: {last} ({path})"


def time_left(folder, wanted, done):
    """What is left of a folder's work for one process, at the rate of its finished units; nothing before the first of them."""
    spent = {unit: files.read_json(folder / unit / "config.json").get("seconds", 0) for unit in wanted}
    finished = sum(wanted[unit] for unit, seconds in spent.items() if seconds)
    left = sum(spent.values()) / finished * (sum(wanted.values()) - done) if finished else 0
    return f"about {left / 60:.0f} min left" if left >= 60 else f"about {left:.0f} s left" if left else ""


def is_locked(folder):
    """Whether a process is writing a folder (see common/stage.py)."""
    try:
        with open(files.lock_of(folder)) as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def show_help(*values):
    given = dict(value.split("=", 1) for value in values)
    print(HELP.format(**given))
    for name, value in given.items():
        print(f"  {name:13} {value}")


if __name__ == "__main__":
    asked = {"settings": settings, "check": check, "status": status, "help": show_help}[sys.argv[1]]
    sys.exit(asked(*sys.argv[2:]))
