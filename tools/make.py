"""What the Makefile asks: are settings and flags valid, what is stale, what is done.

    python tools/make.py settings OVERRIDES NAME=VALUE...   `ok` and settings, or what is wrong
    python tools/make.py stale|check|status ... PLAN...     see the functions of these names
    python tools/make.py help NAME=VALUE...                 targets, and settings with their values

A PLAN is a list of `FOLDER COMMAND`: which command makes which folder. `settings` and `stale` run
at every `make`, also before anything is installed: they need Python's standard library alone.
"""

import ast
import difflib
import fcntl
import functools
import importlib
import os
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository
from common import files, made, stage

HELP = """\
make           run the experiment on {DATASET} at bias {BIAS}: a table, figures, a report
make sweep     the same for several biases: make sweep BIAS="0.9 0.99"
make paper     the paper's recipes and ours at two biases, and a verdict on its claims
make ablate    clustered with one setting changed
make failures  where a classifier fails, on one page: PREDICTIONS=predictions.csv
make dryrun    what a run will cost on this machine: hours, memory, disk
make status    what is done, running, failed and to do
make -n        show what would run
make test      install and run the tests
make torture   long tests: kills, full disks, bad input, 100,000 images; make test-slurm: on Slurm
make base      train a base model from scratch: the miniature, or DATASET=mine: base/mine
make bench     speed and memory beside what one would run instead: BENCH="--peers ~/peers"
make clean     remove runs/{DATASET}-{BIAS}

Settings, for example make K=3 SEEDS="0 1 2 3 4", and flags of a stage, which replace those of
data/{DATASET}.mk, for example make CLUSTER="--k-max 8" (PREPARE EMBED CLUSTER PSEUDO LORA
DREAMBOOTH CLUSTERED COMPOSITIONAL TOKENS EDITED GENERATE CLASSIFIER FAILURES, PRETRAIN of make
base, DRYRUN). ROOT is your folder, PREDICTIONS your csv, COLUMNS names its columns, LAUNCH stands
before commands:
"""
WITHOUT_RUN = {"help", "dryrun", "bench", "clean", "test", "torture", "test-slurm"}

# -------------------------------------------------------------------------------------- settings


class Wrong(Exception):
    pass


def settings(overrides, *values):
    """Prints `ok NAME:=VALUE...` with | for blanks, for make to evaluate, or what is wrong."""
    given = dict(value.split("=", 1) for value in values)
    try:
        if sys.version_info < (3, 11):
            version = sys.version.split()[0]
            raise Wrong(f"PYTHON is Python {version}; 3.11 or later is needed")
        check_names(overrides)
        settled = settle({name: value.replace(",", " ").split() for name, value in given.items()},
                         re.search(r"\bBIAS=", overrides))
        print("ok", *(f"{name}:={'|'.join(words)}" for name, words in settled.items()))
    except Wrong as error:
        print(error)


def check_names(overrides):
    """Raises Wrong for a variable on make's command line that no Makefile uses."""
    paths = [Path("Makefile"), *Path("data").glob("*.mk"), *Path("evaluation").glob("*.mk")]
    text = "\n".join(path.read_text() for path in paths)
    settable = set(re.findall(r"^(?:export )?([A-Z_]+) *\?=", text, re.M))
    internal = set(re.findall(r"^([A-Z_]+) *[:+]?=", text, re.M))
    known = settable | set(re.findall(r"\$\(([A-Z_]+)\)", text)) - internal
    for name in re.findall(r"(?:^|(?<!\\) )([A-Za-z_][\w.-]*)[:+?]?=", overrides):
        if name not in known and not name.startswith("MAKE"):
            raise Wrong(f"{name}: no such setting ({did_you_mean(name, known, 0.5)}see make help)")


def did_you_mean(word, known, cutoff=0.6):
    close = difflib.get_close_matches(word, known, 1, cutoff)
    return f"did you mean {close[0]}? " if close else ""


def settle(values, bias_is_typed):
    """The settings, lists of words, in one form; raises Wrong, naming the choices."""
    datasets = sorted(path.stem for path in Path("data").glob("*.mk"))
    dataset = "".join(values["DATASET"][:1])  # "" for DATASET=
    if dataset not in datasets:
        raise Wrong(f"DATASET={dataset}: no such dataset (use one of "
                    f"{', '.join(datasets)}, or copy data/folder.mk to a name of your own)")
    for name in ("BIAS", "BIASES", "RECIPES", "SEEDS", "MODEL_SEEDS"):
        if not values[name]:
            raise Wrong(f"{name} is empty: see make help")
    biases = [one_bias(text) for text in values["BIAS"]]
    sweep = "sweep" in values["MAKECMDGOALS"]
    if len(biases) > 1 and not sweep:
        text = " ".join(values["BIAS"])
        raise Wrong(f"BIAS={text}: give one value (or run: make sweep BIAS=\"{text}\")")
    if not (sweep and bias_is_typed):
        several = [one_bias(text) for text in values["BIASES"]]
    for name in ("SEEDS", "MODEL_SEEDS"):
        if not all(re.fullmatch(r"\d+", seed) for seed in values[name]):
            text = " ".join(values[name])
            raise Wrong(f"{name}={text}: give integers, for example {name}=\"0 1 2\"")
    for name in ("KEEP_WEIGHTS", "CACHE"):
        if values[name] not in (["yes"], ["no"]):
            raise Wrong(f"{name}={' '.join(values[name])}: use yes or no")
    check_recipes(values)
    found = {"DATASET": values["DATASET"][:1], "BIAS": biases[:1],
             "BIASES": biases if sweep and bias_is_typed else several,
             "RECIPES": values["RECIPES"]}
    found |= {name: [str(int(seed)) for seed in values[name]] for name in ("SEEDS", "MODEL_SEEDS")}
    return {name: list(dict.fromkeys(words)) for name, words in found.items()}


def one_bias(text):
    """`.950` -> `0.95`."""
    is_number = re.fullmatch(r"[0-9]*\.?[0-9]+|[0-9]+\.", text)
    if text == "natural":
        return text
    if is_number and float(text) <= 1:
        return repr(float(text)).removesuffix(".0")
    raise Wrong(f"BIAS={text}: give a number from 0 to 1, for example 0.95, or natural")


def check_recipes(values):
    """Raises Wrong unless RECIPES are recipes, methods, or one of each."""
    tree = ast.parse(Path("train_classifier.py").read_text(encoding="utf-8"))
    tables = [node.value for node in tree.body if isinstance(node, ast.Assign)
              and getattr(node.targets[0], "id", None) == "RECIPES"]
    recipes, methods = [key.value for key in tables[0].keys], values["METHODS"]
    known = [*recipes, *values["MORE_RECIPES"], *methods]
    plain = [name for name in methods if "-" not in name]
    for recipe in values["RECIPES"]:
        words = recipe.split("+")
        for word in words:
            if word not in known:
                hint = did_you_mean(word, known).strip()
                raise Wrong(f"RECIPES: {word} is not a recipe{hint and f', {hint}'} (recipes: "
                            f"{', '.join(recipes)}; methods: {', '.join(plain)}; "
                            "or one of each, as filled+lora)")
        if len(words) > 1 and (len(words), sum(word in methods for word in words)) != (2, 1):
            raise Wrong(f"RECIPES: {recipe}: combine one recipe and one method, as filled+lora")


# ----------------------------------------------------------------------------------------- plans


def read_plan(goals, plan):
    """{folder: words of its command} of the goals and of all that they need, goals last.

    A command needs the folders among its words.
    """
    commands, needed = dict(entry.split(maxsplit=1) for entry in plan), {}

    def need(folder):
        if folder in commands and folder not in needed:
            words = words_of(commands[folder])
            for word in words:
                need(word)
            needed[folder] = words

    for goal in goals.split():
        need(goal)
    return needed


def stale(asked, record, *plan):
    """Prints the config.json of each finished folder that is stale, for make to make it again.

    And `record`, unless check() wrote it for this plan. asked: the targets that one typed.
    """
    if asked and set(asked.split()) <= WITHOUT_RUN:
        return
    made.listing = functools.cache(made.listing)  # many commands read the same base model
    checked = Path(record).read_text(encoding="utf-8") if Path(record).is_file() else ""
    found = [] if checked == "\n".join([*plan, ""]) else [record]
    for entry in plan:
        folder, command = entry.split(maxsplit=1)
        config = f"{folder}/config.json"
        done = files.read_json(config).get("command")  # with --out FOLDER at its end
        if made.was_changed(folder):
            print(f"note: {folder}: its files or inputs were changed, it is made again",
                  file=sys.stderr)
            found.append(config)
        elif done and list(map(os.path.expanduser, done[:-2])) != words_of(command):
            found.append(config)
    print(*found)


def words_of(command):
    """Its words, ~ expanded; [] if its quotes are unbalanced, which check() tells."""
    try:
        return list(map(os.path.expanduser, shlex.split(command)))
    except ValueError:
        return []


def check(record, goals, *plan):
    """Parses the commands that the goals need, each with its script's own parser.

    The first invalid flag is one line and status 2; if there is none, `record` says so.
    """
    for entry in plan:
        if not words_of(entry):
            print(f"{entry.split()[1]}: error: flags: No closing quotation (check the quotes in "
                  "this setting)", file=sys.stderr)
            return 2
    for script, *flags in read_plan(goals, plan).values():
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        if stage.call(module.parse, [*flags, "--out", "runs/.check"]) == 2:
            return 2
    files.write_text(record, "\n".join(plan))


# ------------------------------------------------------------------------------- status and help


def status(goals, *plan):
    """Prints a line per folder: done, running, failed or to do, and how much of its work."""
    for folder in read_plan(goals, plan):
        print(f"{folder:45} {progress(Path(folder))}")


def progress(folder):
    """What is done of a folder, from its files and logs alone: others may be at work on it."""
    running = is_locked(folder)
    if (folder / "config.json").is_file() and not running:
        return "done"
    wanted, done = files.read_json(folder / ".stage").get("wanted", {}), 0
    for unit, count in wanted.items():
        finished = (folder / unit / "config.json").is_file()
        drawn = len(list(folder.glob(f".{unit}.partial/*.png")))
        done += count if finished else min(count, drawn)
    kinds = {"models": "units", "synthetic": "images", "classifiers": "seeds"}
    kind = kinds.get(folder.parent.name)
    parts = [f"{done} of {sum(wanted.values())} {kind} done"] if wanted else []
    dropped = wanted and done == sum(wanted.values()) and folder.parent.name == "models"
    parts += ["running" if running else failure(folder) or
              ("weights removed" if dropped else "to do")]
    return ", ".join([*parts, *time_left(folder, wanted, done)])


def failure(folder):
    """How the last command that wrote a folder failed, in any of its processes; or None."""
    of_run = Path(*folder.parts[:2], "logs") if folder.parts[0] == "runs" else None
    logs = [stage.log_of(folder, rank, of_run) for rank in (0, "*")]
    for path in [path for log in logs if log for path in log.parent.glob(log.name)]:
        last = (path.read_text(encoding="utf-8").splitlines() or [""])[-1]
        if not last.startswith("done"):
            return f"{'failed' if 'error' in last.lower() else 'ended after'}: {last} ({path})"


def time_left(folder, wanted, done):
    """[what is left for one process, at the rate of finished units]; [] before the first."""
    spent = {unit: files.read_json(folder / unit / "config.json").get("seconds", 0)
             for unit in wanted}
    finished = sum(wanted[unit] for unit, seconds in spent.items() if seconds)
    if not finished or done == sum(wanted.values()):
        return []
    left = sum(spent.values()) / finished * (sum(wanted.values()) - done)
    return [f"about {left / 60:.0f} min left" if left >= 60 else f"about {left:.0f} s left"]


def is_locked(folder):
    """Whether a process is writing a folder (see common/stage.py)."""
    try:
        with open(stage.lock_of(folder)) as file:
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
    functions = {"settings": settings, "stale": stale, "check": check, "status": status,
                 "help": show_help}
    sys.exit(functions[sys.argv[1]](*sys.argv[2:]))
