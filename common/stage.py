"""How every stage behaves: command line, errors, interruption, locks, and how results are published and found again.

A stage reads folders and writes one folder, OUT. The file OUT/.stage marks it as made by a stage. When it is finished, it
also holds a config.json: the arguments, a key (a digest of everything that the result depends on), the state of the inputs.
"""

import argparse
import ast
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import resource
import shlex
import signal
import socket
import sys
import textwrap
import time
from pathlib import Path

from common import files
from common.files import InputError

INTERRUPTED = "{}: interrupted (rerun the same command to resume)"
RERUN = "(fix this and rerun; finished work is kept)"
LIBRARIES = ("torch", "torchvision", "diffusers", "transformers", "peft", "scikit-learn", "numpy", "pillow")


def lazy(name):
    """A module that is imported when it is first used: `--help` and errors need not wait seconds for torch."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse whose description is the script's docstring and whose every error is one line."""

    def __init__(self, script, doc):
        super().__init__(prog=Path(script).name, description=doc, formatter_class=_HelpFormatter, allow_abbrev=False)

    def error(self, message):
        sys.exit(_last_words(f"{self.prog}: error: {message} (see {self.prog} --help)"))

    def parse_args(self, *args):
        parsed = super().parse_args(*args)
        _check_out(parsed)
        return parsed


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


Flag = argparse.BooleanOptionalAction


def number(kind, low=-math.inf, high=math.inf):
    """An argparse type: an `int` or a `float` in [low, high]; NaN and infinity are refused."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


def shard_of(text):
    """An argparse type: `i/n`, the i-th (from 0) of n shards."""
    try:
        i, n = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form i/n") from None
    if not 0 <= i < n:
        raise argparse.ArgumentTypeError(f"{text}: shards are numbered from 0/n to n-1/n")
    return i, n


def _check_out(args):
    """Raises InputError unless OUT is new or was made by a stage: other files in it would be lost."""
    def real(path):
        return Path(os.path.realpath(path))  # Path.resolve() raises on circular links

    out = real(args.out)
    if any(out == path or out in path.parents for path in (Path.cwd(), real(__file__))):
        raise InputError(f"--out {args.out}", "holds this program or the current folder", "name another folder")
    if any(out == real(path) or out in real(path).parents for path in _given_paths(args)):
        raise InputError(f"--out {args.out}", "is or holds an input", "name another folder")
    if out.suffix == ".html" and out.is_dir() or out.suffix != ".html" and out.is_file():
        raise InputError(f"--out {args.out}", f"is a {'folder' if out.is_dir() else 'file'}", "choose another path")
    if out.is_dir() and not (out / ".stage").is_file() and not all(map(files.is_left_over, out.iterdir())):
        raise InputError(f"--out {args.out}", "holds files that no stage wrote", "name another folder or empty it")


def _given_paths(args):
    """The paths among the arguments, but OUT: all that are paths by type, and models that are no hub ids."""
    values = [value for name, value in vars(args).items() if name != "out"]
    paths = [path for value in values for path in (value if isinstance(value, list) else [value])
             if isinstance(path, Path)]
    models = [Path(getattr(args, name, None) or "") for name in ("base", "clip", "encoder", "weights")]
    return paths + [path for path in models if path.name and path.exists()]


# ------------------------------------------------------------------------------------ running, errors, Ctrl-C


def run(main):
    """Runs a script's main() and ends the process. The last line of a log is "done" if all went well."""
    end_at_ctrl_c()
    begun = time.monotonic()
    status = call(main)
    if _log[0] and not status:
        print(f"done in {time.monotonic() - begun:.0f} s", file=_log[0], flush=True)
    sys.exit(status)


def call(main, argv=None):
    """Runs main(argv); returns the exit status. Invalid input or a full disk is one line on stderr and status 2."""
    script = _script[0] = Path(main.__code__.co_filename).name
    try:
        return main(argv) or 0
    except InputError as error:
        return _last_words(f"{script}: error: {error}")
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        return _last_words(f"{script}: error: {error.filename or 'disk'}: {error.strerror} {RERUN}")
    except Exception as error:
        if "No space left on device" not in str(error):  # safetensors wraps it in an error of its own
            raise
        return _last_words(f"{script}: error: disk: {error} {RERUN}")
    finally:
        while _locks:
            os.close(_locks.popitem()[1])


def _last_words(line, status=2):
    print(" ".join(line.splitlines()), file=sys.stderr)
    return status


def in_parallel():
    """Whether other commands print to the same terminal, so that progress bars would overwrite each other."""
    return _shard[0] or "jobserver" in os.environ.get("MAKEFLAGS", "")


class _Logged:
    """A stream, such as sys.stdout, of which a log keeps all lines, but no progress bars."""

    def __init__(self, stream, log):
        self.stream, self.log = stream, log

    def write(self, text):
        if "\r" not in text:
            self.log.write(text)
            self.log.flush()
        return self.stream.write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def _keep_log(args):
    """Begins the log of this command, if make asks for logs: the command, when and where it runs, then what it prints."""
    i, n = getattr(args, "shard", (0, 1))
    path = files.log_of(args.out, f"{i}-of-{n}" if n > 1 else "")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        _log[0] = open(path, "w", encoding="utf-8")
        print("$", shlex.join(sys.argv), file=_log[0])
        print(time.strftime("%F %T"), socket.gethostname(), "process", os.getpid(), file=_log[0], flush=True)
        sys.stdout, sys.stderr = _Logged(sys.stdout, _log[0]), _Logged(sys.stderr, _log[0])


def end_at_ctrl_c():
    """From here on Ctrl-C, and the SIGTERM by which make -j stops its children, are one line and status 130, at once.

    No KeyboardInterrupt is raised: libraries swallow it, torch while it is imported. Nothing needs cleaning up either,
    as whatever a killed process leaves never looks finished.
    """
    def end(number, frame):
        line = INTERRUPTED.format(Path(sys.argv[0]).name) + "\n"
        if _log[0]:
            os.write(_log[0].fileno(), line.encode())
        os.write(2, ("\n" * os.isatty(2) + line).encode())  # a progress bar may stand in the terminal's line
        os._exit(130)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # a shell lets background processes ignore them
            signal.signal(number, end)


# ----------------------------------------------------------------------------------------------------- locks

_script = [""]  # the name of the script that runs
_shard = [False]  # whether it is one of several shards
_log = [None]  # the file of its log
_locks = {}  # {path of a lock: file descriptor}; the kernel releases locks when the process ends, however it ends


def begin(args):
    """Locks OUT for writing and the inputs for reading; returns the inputs' state, for finish().

    Raises InputError if another process is writing one of them, or reading OUT. A shard locks its units: see claim().
    """
    args.out.parent.mkdir(parents=True, exist_ok=True)
    _shard[0] = getattr(args, "shard", (0, 1))[1] > 1
    if not _shard[0]:
        _lock(args.out, fcntl.LOCK_EX)
    _keep_log(args)
    inputs = sorted(set(map(str, _given_paths(args))))
    for path in inputs:
        if files.lock_of(path).is_file():
            _lock(path, fcntl.LOCK_SH)
    return {path: files.listing(path) for path in inputs}


def claim(args, units):
    """Locks the units of a shard. Raises InputError if another process is at work on one, or on OUT as a whole."""
    if args.shard[1] > 1:
        for unit in units:
            _lock(args.out, fcntl.LOCK_EX, seed_of(unit) % 2**31, 1)


def _lock(path, kind, start=0, length=0):
    """Locks `length` bytes (0: all) of the lock of `path`."""
    lock = files.lock_of(path)
    try:
        if lock not in _locks:
            _locks[lock] = os.open(lock, os.O_RDWR | os.O_CREAT if kind == fcntl.LOCK_EX else os.O_RDONLY, 0o666)
    except OSError:
        return  # a folder that cannot be written: whoever writes there is told so
    try:
        fcntl.lockf(_locks[lock], kind | fcntl.LOCK_NB, length, start)
    except (BlockingIOError, PermissionError):
        raise InputError(path, "is in use by another process", "wait for it to finish, or stop it") from None
    except OSError:
        pass  # a file system without locks


# ------------------------------------------------------------------------------------- keys, and what they decide


def seed_of(*parts):
    """A 63-bit seed determined by the given parts alone, such as (seed, unit, index)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def code_digest(*parts):
    """A digest of what code does: of scripts (paths) and functions, without comments, docstrings and help texts."""
    trees = []
    for part in parts:
        code = textwrap.dedent(inspect.getsource(part)) if callable(part) else Path(part).read_text(encoding="utf-8")
        tree = ast.parse(code)
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(
                    body[0].value, ast.Constant):
                body[0] = ast.Pass()
            if isinstance(node, ast.Call):
                node.keywords = [keyword for keyword in node.keywords if keyword.arg != "help"]
        trees.append(ast.dump(tree))
    return files.digest(trees)


def settings_of(args, *but):
    """The arguments that a result depends on: all but paths, the named ones, and how the work is done."""
    return {name: value for name, value in vars(args).items() if name not in (*but, "shard", "device", "cache")
            and not isinstance(value, Path)}


# ------------------------------------------------------------------------------------------------ publishing


def start(args, wanted):
    """Marks OUT as made by a stage, and unfinished. wanted: {unit: how much of it is to be made}, for `make status`."""
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / ".stage").write_text(json.dumps({"wanted": wanted}))  # several shards may write the same at once
    (args.out / "config.json").unlink(missing_ok=True)


def finish(out, args, key, inputs, **more):
    """Writes OUT/config.json, the last file of a stage."""
    if not (out / ".stage").is_file():
        files.write_json(out / ".stage", {})
    versions = {library: importlib.metadata.version(library) for library in LIBRARIES}
    files.write_json(out / "config.json", {
        "made_by": _script[0], "key": key, "arguments": json.loads(json.dumps(vars(args), default=str)),
        "versions": versions, "inputs": inputs, "files": files.listing(out), **more})


def is_made(args, key, inputs):
    """Whether OUT as a whole was made with this key and is intact; its config.json is then renewed."""
    config = files.read_json(args.out / "config.json")
    if config.get("key") != key or config.get("files") != files.listing(args.out):
        return False
    files.write_json(args.out / "config.json", config | {"inputs": inputs})
    return True


def finish_unit(path, args, key, **more):
    """Writes PATH/config.json of a unit (a part of OUT with a key of its own), with digests of all its files."""
    names = [str(file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file()
             and file != path / "config.json"]
    files.write_json(path / "config.json", {
        "key": key, "arguments": json.loads(json.dumps(vars(args), default=str)),
        "files": files.file_digests(path, names), **more})


def unit_digests(path):
    """{name: digest} of a unit's files as they were published; {} if it is not published."""
    recorded = files.read_json(Path(path) / "config.json").get("files", {})
    return recorded if isinstance(recorded, dict) else {}


def is_published(path, key):
    """Whether a unit was published with this key and all its files are still what they were."""
    path, recorded = Path(path), unit_digests(path)
    return bool(recorded) and files.read_json(path / "config.json").get("key") == key and not changed_files(path)


def changed_files(path):
    """The files of a published unit that are missing or not what they were."""
    path, recorded = Path(path), unit_digests(path)
    there = [name for name in recorded if (path / name).is_file()]
    now = files.file_digests(path, there)
    return [name for name in recorded if now.get(name) != recorded[name]]


def remove_other_units(out, names):
    """Removes the units in OUT that are none of `names`, and what killed processes left of any."""
    for path in sorted(out.iterdir()):
        if files.is_left_over(path) or path.is_dir() and path.name not in names and (path / "config.json").is_file():
            files.remove(path)


def spent(begin):
    """What a process used since `begin`, of time.monotonic(): seconds, and its peak memory so far in MB, also on a GPU."""
    import torch

    used = {"seconds": round(time.monotonic() - begin, 1),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    gpu = torch.cuda.max_memory_allocated() // 2**20 if torch.cuda.is_initialized() else 0
    return used | ({"peak_gpu_mb": gpu} if gpu else {})
