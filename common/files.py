"""Files on disk: csv and json, written whole or not at all, and digests of what they hold."""

import csv
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clustered-dreambooth"


class InputError(Exception):
    """Invalid input from the user: `where` (a file or flag), `what` is wrong, `todo` about it."""

    def __init__(self, where, what, todo):
        super().__init__(where, what, todo)  # so that it can be pickled, for other processes

    def __str__(self):
        return "{}: {} ({})".format(*self.args)


def reason(error):
    """The first line of what an exception says, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ----------------------------------------------------------------------------- reading and writing


def read_csv(path, todo="run the stage that wrote it again"):
    """The rows of a csv as dicts of str. Raises InputError if it cannot be read."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(path, f"cannot be read: {reason}", todo) from None


def write_csv(path, rows, columns=None):
    """Writes dicts as csv. columns: their names in order; default: the keys of the first row."""
    columns = columns or list(rows[0])
    has_return = any("\r" in str(value) for row in rows for value in row.values())
    quoting = csv.QUOTE_ALL if has_return else csv.QUOTE_MINIMAL  # csv quotes "\n" by itself
    with replacing(path) as hidden, open(hidden, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)


def read_json(path):
    """The object in a json file; {} if the file is missing or holds anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path, content):
    write_text(path, json.dumps(content, indent=1))


def write_text(path, text):
    with replacing(path) as hidden:
        hidden.write_text(text + "\n", encoding="utf-8")


@contextmanager
def replacing(path):
    """Yields a hidden sibling of `path`, a file or folder to write, and renames it to `path`.

    A killed process therefore leaves the old content or the new one, never a half; of a folder,
    which cannot be renamed over another, for an instant neither.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.tmp")
    remove(hidden)
    doomed = _remove_doomed(path)
    try:
        yield hidden
        if path.is_dir() and path.is_symlink():
            path.unlink()
        elif path.is_dir():
            os.replace(path, doomed)
        os.replace(hidden, path)
        _remove_doomed(path)
    finally:
        remove(hidden)


def remove(path):
    """Removes a file or a folder, if it is there. A half-removed folder never looks whole."""
    path = Path(path)
    doomed = _remove_doomed(path)
    if path.is_dir() and not path.is_symlink():
        os.replace(path, doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def _remove_doomed(path):
    """Removes what a process killed in remove(path) left; returns the name of the folder then."""
    doomed = path.with_name(f".{path.name.lstrip('.')}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    return doomed


def is_left_over(path):
    """Whether a killed process left this file or folder."""
    return path.name.startswith(".") and path.suffix in (".tmp", ".old", ".partial")


# ---------------------------------------------------------------------------------------- digests


def digest(*parts):
    """A short digest of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def file_digests(folder, names, stats={}):
    """{name: digest of the file's bytes} for files of a folder.

    A file of known path, size and modification time is not read again: CACHE keeps its digest.
    stats: {name: its os.stat()}, for names of which it is known.
    """
    memory = CACHE / f"{digest(os.path.realpath(folder))}.json"
    known, news, found = read_json(memory), False, {}
    for name in names:
        path = os.path.join(folder, name)
        stat = stats.get(name) or os.stat(path)
        state = [stat.st_size, stat.st_mtime_ns]
        if known.get(name, [None])[:2] != state:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            known[name], news = [*state, content], True
        found[name] = known[name][2]
    if news:
        try:
            write_json(memory, known)
        except OSError:
            pass  # without a place for the cache, files are read every time
    return found


def model_digest(model):
    """A digest of a local model's weights and configs, or of its name if it is a hub id."""
    model = Path(model)
    if model.is_file():
        return digest(file_digests(model.parent, [model.name]))
    ours = {model / "config.json"} if "made_by" in read_json(model / "config.json") else set()
    names = sorted(str(path.relative_to(model)) for path in set(model.rglob("*")) - ours
                   if path.suffix in (".json", ".safetensors", ".txt"))
    return digest(file_digests(model, names) if names else str(model))
