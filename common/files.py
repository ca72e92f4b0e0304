"""Files on disk: csv and json, written whole or not at all, and digests of what they hold."""

import csv
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

LATER = ("config.json", "command", "report.html")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clustered-dreambooth"


class InputError(Exception):
    """Invalid input from the user: `where` (a file or flag), `what` is wrong, and what `todo` about it."""

    def __init__(self, where, what, todo):
        super().__init__(f"{where}: {what} ({todo})")


# -------------------------------------------------------------------------------------- reading and writing


def read_csv(path, todo="run the stage that wrote it again"):
    """The rows of a csv as dicts of str. Raises InputError, with what `todo` about it, if it cannot be read."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(path, f"cannot be read: {getattr(error, 'strerror', None) or error}", todo) from None


def write_csv(path, rows, columns=None):
    """Writes dicts as csv. columns: their names in order; default: the keys of the first row."""
    columns = columns or list(rows[0])
    bare = not any("\r" in str(value) for row in rows for value in row.values())  # csv quotes "\n" by itself
    with replacing(path) as hidden, open(hidden, "w", encoding="utf-8", newline="") as file:
        quoting = csv.QUOTE_MINIMAL if bare else csv.QUOTE_ALL
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
    """Yields a hidden sibling of `path`, a file or folder to write, and renames it to `path` at the end.

    A killed process therefore leaves the old content or the new one, never a half.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.tmp")
    remove(hidden)
    _remove_doomed(path)
    try:
        yield hidden
        if path.is_dir():  # a folder cannot be renamed over another
            remove(path)
        os.replace(hidden, path)
    finally:
        remove(hidden)


def remove(path):
    """Removes a file or a folder if it is there. A folder is renamed first, so that half of one never looks whole."""
    path = Path(path)
    doomed = _remove_doomed(path)
    if path.is_dir() and not path.is_symlink():
        os.replace(path, doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)


def _remove_doomed(path):
    """Removes what a process killed while removing `path` left; returns the name that the folder gets meanwhile."""
    doomed = path.with_name(f".{path.name.lstrip('.')}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    return doomed


def lock_of(path):
    """The file beside a folder whose lock a process holds while it writes or reads the folder (see stage.begin)."""
    path = Path(path)
    return path.with_name(f".{path.name}.lock")


def log_of(folder, shard=""):
    """Where a stage that writes a folder keeps its log: in LOGS, which make sets to runs/<run>/logs. None without LOGS.

    shard: for example "0-of-4", or "*".
    """
    if not os.environ.get("LOGS"):
        return None
    logs, folder = Path(os.environ["LOGS"]), Path(folder)
    name = folder.relative_to(logs.parent) if folder.is_relative_to(logs.parent) else folder.name
    return logs / f"{name}{shard and f'.{shard}'}.log"


def is_left_over(path):
    """Whether a killed process left this file or folder."""
    return path.name.startswith(".") and path.suffix in (".tmp", ".old", ".partial")


# -------------------------------------------------------------------------------------------------- digests


def digest(*parts):
    """A short digest of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def file_digests(folder, names):
    """{name: digest of the file's bytes} for files of a folder.

    A file of known path, size and modification time is not read again: the digests are kept in CACHE.
    """
    folder = Path(folder)
    memory = CACHE / f"{digest(os.path.realpath(folder))}.json"
    known, news, found = read_json(memory), False, {}
    for name in names:
        stat = os.stat(folder / name)
        state = [stat.st_size, stat.st_mtime_ns]
        if known.get(name, [None])[:2] != state:
            with open(folder / name, "rb") as file:
                known[name], news = [*state, hashlib.file_digest(file, "sha256").hexdigest()[:16]], True
        found[name] = known[name][2]
    if news:
        try:
            write_json(memory, known)
        except OSError:
            pass  # without a place for the cache, files are read every time
    return found


def model_files(model):
    """(folder, [names]) of the weights and configs of a local model; no names for a hub id."""
    model = Path(model)
    if model.is_file():
        return model.parent, [model.name]
    ours = {model / "config.json"} if "made_by" in read_json(model / "config.json") else set()
    return model, sorted(str(path.relative_to(model)) for path in {*model.rglob("*")} - ours
                         if path.suffix in (".json", ".safetensors", ".txt"))


def model_digest(model):
    """A digest of a local model's files, or of its name if it is a hub id."""
    folder, names = model_files(model)
    return digest(file_digests(folder, names) if names else str(model))


def listing(path):
    """A digest of the names, sizes and modification times below a folder (or of one file); None if there is nothing.

    Quick, as no file is opened. Links in what a stage made are not followed, those in a user's folder are. Hidden files and
    what is written after a stage has finished (config.json, command and report.html at the top) do not count.
    """
    if not os.path.isdir(path):
        return digest([os.stat(path).st_size, os.stat(path).st_mtime_ns]) if os.path.isfile(path) else None
    follow = not os.path.isfile(os.path.join(path, ".stage"))
    found, folders, seen = [], [str(path)], set()
    while folders:
        folder = folders.pop()
        if os.path.realpath(folder) in seen:
            continue  # links in a circle
        seen.add(os.path.realpath(folder))
        for entry in os.scandir(folder):
            if entry.name.startswith(".") or not follow and folder == str(path) and entry.name in LATER:
                continue
            if entry.is_dir(follow_symlinks=follow):
                folders.append(entry.path)
            else:
                stat = entry.stat(follow_symlinks=follow and os.path.exists(entry.path))
                found.append([entry.path[len(str(path)):], stat.st_size, stat.st_mtime_ns])
    return digest(sorted(found))
