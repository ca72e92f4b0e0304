"""The Makefile's settings: are they valid, and what is their one form.

    python tools/settings.py settle OVERRIDES NAME=VALUE...  `ok` and settings, or what is wrong
    python tools/settings.py help NAME=VALUE...              targets, and settings with their values

The first runs at every `make`, also before anything is installed: it needs Python's standard
library alone, and imports little of that.
"""

import ast
import difflib
import re
import sys
from pathlib import Path

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


class Wrong(Exception):
    pass


def show_settings(overrides, *values):
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


def show_help(*values):
    given = dict(value.split("=", 1) for value in values)
    print(HELP.format(**given))
    for name, value in given.items():
        print(f"  {name:13} {value}")


if __name__ == "__main__":
    functions = {"settle": show_settings, "help": show_help}
    functions[sys.argv[1]](*sys.argv[2:])
