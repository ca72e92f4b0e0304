"""What is finished, and what is stale.

A stage writes one folder. It is finished when it holds config.json, which is written last and
records what the result depends on; it is stale when one of these has changed:

    key       a digest of settings, code and the inputs' bytes: the stage itself compares it
    files     digests of the files that were written: an edited or a lost one is noticed
    inputs    sizes and times of what was read from outside, such as a download or a base model
    command   the command line

A unit (a group's weights, a classifier's seed) is such a folder inside, kept or made anew by
itself. `make` runs a stage when its script, shared code or an input folder is newer, when its
command line differs, or when was_changed() says so; the stage then compares keys, and remakes only
the units whose key differs.
"""

import json
import os
import sys
from pathlib import Path
from stat import S_ISLNK, S_ISREG

from common import files

# ast, inspect and others are imported where they are used: each `make` waits for was_changed().

LIBRARIES = ("torch", "torchvision", "diffusers", "transformers", "peft", "accelerate",
             "scikit-learn", "numpy", "pillow")
LATER = ("config.json", "report.html")  # what is written when all else is there

# ------------------------------------------------------------------------------------------- keys


def code_digest(*parts):
    """A digest of what code does: of scripts (paths) and functions.

    Comments, docstrings and help texts do not count.
    """
    import ast
    import inspect
    import textwrap

    trees = []
    for part in parts:
        code = inspect.getsource(part) if callable(part) else Path(part).read_text(encoding="utf-8")
        tree = ast.parse(textwrap.dedent(code))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            first = body[0] if isinstance(body, list) and body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                body[0] = ast.Pass()
            if isinstance(node, ast.Call):
                node.keywords = [keyword for keyword in node.keywords if keyword.arg != "help"]
        trees.append(ast.dump(tree))
    return files.digest(trees)


def settings_of(args, *but):
    """The arguments that a result depends on: all but paths, `but`, and how work is done."""
    return {name: value for name, value in vars(args).items()
            if name not in (*but, "device", "cache") and not isinstance(value, Path)}


# ------------------------------------------------------------------------------- finished folders


def finish(path, args, key, inputs=None, **more):
    """Writes PATH/config.json, the last file of a stage or a unit. inputs: {path: its state}."""
    from importlib import metadata

    if inputs is not None and not (path / ".stage").is_file():
        files.write_json(path / ".stage", {})
    files.write_json(path / "config.json", {
        "made_by": Path(sys.argv[0]).name, "command": sys.argv, "key": key,
        "arguments": json.loads(json.dumps(vars(args), default=str)),
        "versions": {library: metadata.version(library) for library in LIBRARIES},
        "inputs": inputs or {}, "files": _states(path, _names(path)), **more})


def is_finished(path, key):
    """Whether a folder was made for this key, and is as it was then."""
    config = files.read_json(path / "config.json")
    return bool(config.get("key") == key and config.get("files")
                and not changed_files(path, config))


def changed_files(path, config=None):
    """The files of a finished folder that are missing or not what they were; not its units'.

    config: what its config.json holds, if that is read already.
    """
    config = files.read_json(path / "config.json") if config is None else config
    recorded = config.get("files")
    recorded = recorded if isinstance(recorded, dict) else {}
    now = _states(path, recorded)
    return [name for name in recorded if now.get(name) != recorded[name]]


def unfinished(out, unit):
    """The hidden folder in which a unit is made, and from which a killed process resumes."""
    return out / f".{unit}.partial"


def remove_other_units(out, names):
    """Removes the units in OUT that are none of `names`, and what killed processes left of any."""
    for path in sorted(out.iterdir()):
        is_unit = path.is_dir() and (path / "config.json").is_file()
        if files.is_left_over(path) or is_unit and path.name not in names:
            files.remove(path)


def _names(top):
    """The files of a folder, relative; of a unit in it config.json alone. Links count as files."""
    names = []
    for folder, folders, found in os.walk(top):
        if Path(folder) == top:
            found = [name for name in found if name not in LATER]
        elif "key" in files.read_json(f"{folder}/config.json"):
            folders[:], found = [], ["config.json"]
        found += [name for name in folders if os.path.islink(f"{folder}/{name}")]
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [os.path.relpath(f"{folder}/{name}", top) for name in found
                  if not name.startswith(".")]
    return sorted(names)


def _states(path, names):
    """{name: digest of the file, or where a link leads} of those that are there."""
    links, plain = {}, {}
    for name in names:
        file = os.path.join(path, name)  # a Path takes longer than the file system
        try:
            stat = os.lstat(file)
        except (OSError, ValueError):  # as os.path.lexists()
            continue
        if S_ISLNK(stat.st_mode):
            links[name] = os.readlink(file)
        elif S_ISREG(stat.st_mode):
            plain[name] = stat
    return links | files.file_digests(path, plain, plain)


# -------------------------------------------------------------------------------- stale folders


def outside(path):
    """The state of an input (listing()); None for a folder that a stage made: it has a record."""
    ours = Path(path).parts[:1] in (("data",), ("runs",))
    return None if ours and files.read_json(Path(path) / "config.json") else listing(path)


def listing(path):
    """A digest of names, sizes and times below a folder, or of a file; None if there is nothing.

    Quick, as no file is opened. Links are followed; hidden files do not count.
    """
    if os.path.isfile(path):
        stat = os.stat(path)
        return files.digest([stat.st_size, stat.st_mtime_ns])
    found, seen = [], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if os.path.realpath(folder) in seen:  # links in a circle
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = os.path.join(folder, name)
            if not name.startswith("."):
                stat = os.stat(file) if os.path.exists(file) else os.lstat(file)
                found.append([os.path.relpath(file, path), stat.st_size, stat.st_mtime_ns])
    return files.digest(sorted(found)) if seen else None


def was_changed(folder, config):
    """Whether a finished folder, a unit in it, or an input from outside is not what it was.

    config: what its config.json holds.
    """
    folder = Path(folder)
    if "key" not in config:  # half a file
        return (folder / ".stage").is_file() and (folder / "config.json").is_file()
    units = [(folder / name).parent for name in config.get("files", {})
             if name.endswith("/config.json")]
    return (bool(changed_files(folder, config)) or any(map(changed_files, units))
            or any(os.path.exists(path) and listing(path) != state
                   for path, state in config.get("inputs", {}).items()))
