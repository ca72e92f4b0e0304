"""What the Makefile asks: what is stale, are the flags valid, what is done.

    python tools/plan.py stale|check|status ... PLAN...     see the functions of these names

A PLAN is a list of `FOLDER COMMAND`: which command makes which folder. `stale` runs at every
`make`, also before anything is installed: it needs Python's standard library alone, and no
`common.stage`, which the other functions import.
"""

import fcntl
import functools
import importlib
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository
from common import files, made

WITHOUT_RUN = {"help", "dryrun", "bench", "clean", "test", "torture", "test-slurm"}


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
        path = f"{folder}/config.json"
        config = files.read_json(path)
        done = config.get("command")  # with --out FOLDER at its end
        if made.was_changed(folder, config):
            print(f"note: {folder}: its files or inputs were changed, it is made again",
                  file=sys.stderr)
            found.append(path)
        elif done and list(map(os.path.expanduser, done[:-2])) != words_of(command):
            found.append(path)
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
    from common import stage

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


# ---------------------------------------------------------------------------------------- status


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
    from common import stage

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
    from common import stage

    try:
        with open(stage.lock_of(folder)) as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


if __name__ == "__main__":
    functions = {"stale": stale, "check": check, "status": status}
    sys.exit(functions[sys.argv[1]](*sys.argv[2:]))
