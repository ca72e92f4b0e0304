"""How every script behaves: its command line, errors, interruption, log and locks.

    def main(argv=None):
        args = parse(argv)          # a stage.Parser
        stage.begin(args)           # locks, log; meets the other processes of this command
        ...                         # reads folders, writes args.out (see common/made.py)

    if __name__ == "__main__":
        stage.run(main)
"""

import argparse
import fcntl
import hashlib
import importlib.util
import math
import os
import resource
import shlex
import signal
import socket
import sys
import time
from pathlib import Path

from common import compute, files, made
from common.files import InputError

RERUN = "(fix this and rerun; finished work is kept)"


def lazy(name):
    """A module that is imported when it is first used: `--help` does not wait for torch."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seed_of(*parts):
    """A 63-bit seed determined by the given parts alone, such as (seed, unit, index)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def spent(begin):
    """Seconds since `begin`, of time.monotonic(), and the process's peak memory in MB."""
    import torch

    used = {"seconds": round(time.monotonic() - begin, 1),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    if torch.cuda.is_initialized():
        used["peak_gpu_mb"] = torch.cuda.max_memory_allocated() // 2**20
    return used


# ----------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse whose description is the script's docstring and whose every error is one line."""

    def __init__(self, script, doc):
        super().__init__(prog=Path(script).name, description=doc, formatter_class=_HelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        sys.exit(_last_words(f"{self.prog}: error: {message} (see {self.prog} --help)"))

    def parse_args(self, *args):
        parsed = super().parse_args(*args)
        for name, value in vars(parsed).items():
            if isinstance(value, (Path, str)):
                setattr(parsed, name, type(value)(os.path.expanduser(value)))
        _check_out(parsed)
        return parsed


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter,
                     argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


Flag = argparse.BooleanOptionalAction


def number(kind, low=-math.inf, high=math.inf, word=None):
    """An argparse type: an `int` or a `float` in [low, high], or `word`; no NaN, no infinity."""

    def parse(text):
        if text == word:
            return text
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _check_out(args):
    """Raises InputError unless OUT is new or a stage's: other files in it would be lost."""
    def real(path):
        return Path(os.path.realpath(path))  # Path.resolve() raises on circular links

    def is_or_holds(out, paths):
        return any(out == path or out in path.parents for path in map(real, paths))

    out, another = real(args.out), "name another folder"
    if is_or_holds(out, [Path.cwd(), __file__]):
        raise InputError(f"--out {args.out}", "holds this program or the current folder", another)
    if is_or_holds(out, _given_paths(args)):
        raise InputError(f"--out {args.out}", "is or holds an input", another)
    wrong_kind = out.is_dir() if out.suffix == ".html" else out.is_file()
    if wrong_kind:
        kind = "folder" if out.is_dir() else "file"
        raise InputError(f"--out {args.out}", f"is a {kind}", "choose another path")
    if out.is_dir() and not (out / ".stage").is_file():
        if not all(map(files.is_left_over, out.iterdir())):
            raise InputError(f"--out {args.out}", "holds files that no stage wrote",
                             "name another folder or empty it")


def _given_paths(args):
    """The paths among the arguments, but OUT: those by type, and models that are no hub ids."""
    paths = []
    for name, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        if name != "out":
            paths += [path for path in values if isinstance(path, Path)]
        if name in ("base", "clip", "weights") and value and Path(value).exists():
            paths.append(Path(value))
    return paths


# -------------------------------------------------------------------------- running, errors, Ctrl-C

_working = [False]  # an error before is the same in all processes of a command: one tells it
_log = [None]  # the file of its log
_inputs = {}  # {path of an input: its state when the script began}
_locks = {}  # {path: file descriptor}; the kernel releases locks however a process ends


def run(main, shared=False):
    """Runs a script's main() and ends the process. The last line of a log is "done".

    shared: whether the processes of one command share its work; otherwise the first does it all.
    """
    end_at_ctrl_c()
    begun = time.monotonic()
    if not shared and not compute.FIRST:
        sys.exit(0)
    if not shared:
        compute.alone()
    status = call(main)
    if not status:
        compute.leave()
    if _log[0] and not status:
        print(f"done in {time.monotonic() - begun:.0f} s", file=_log[0], flush=True)
    if compute.PROCESSES > 1:  # shutting Python down beside torch's threads has aborted a process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def call(main, argv=None):
    """Runs main(argv); returns the status. Invalid input or a full disk is one line, status 2."""
    script = Path(main.__code__.co_filename).name
    _working[0] = False
    try:
        return main(argv) or 0
    except InputError as error:
        return _last_words(f"{script}: error: {error}")
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        where = error.filename or "disk"
        return _last_words(f"{script}: error: {where}: {error.strerror} {RERUN}")
    except Exception as error:
        if "No space left on device" not in str(error):  # safetensors wraps it
            raise
        return _last_words(f"{script}: error: disk: {error} {RERUN}")
    finally:
        while _locks:
            os.close(_locks.popitem()[1])


def outcome(failures):
    """Waits for all processes; prints what failed in any, a line each; returns the status."""
    failures = compute.gather(failures)
    if failures and compute.FIRST:
        print(*failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


def _last_words(line):
    told = sys.stderr if compute.FIRST or _working[0] else _log[0]
    if told:
        print(" ".join(line.splitlines()), file=told, flush=True)
    return 2


def end_at_ctrl_c():
    """From here on Ctrl-C, and the SIGTERM by which make -j stops its children, end at once.

    They are one line and status 130. No KeyboardInterrupt is raised: libraries swallow it. Nothing
    needs cleaning up either, as whatever a killed process leaves never looks finished.
    """
    def end(number, frame):
        line = f"{Path(sys.argv[0]).name}: interrupted (rerun the same command to resume)\n"
        if _log[0]:
            os.write(_log[0].fileno(), line.encode())
        os.write(2, ("\n" * os.isatty(2) + line).encode())  # below a progress bar
        os._exit(130)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # a shell's background processes ignore it
            signal.signal(number, end)


# --------------------------------------------------------------------------------- logs and locks


def begin(args):
    """Begins the log, locks OUT for writing and the inputs for reading, and meets all processes.

    Raises InputError if another command is writing one of them, or reading OUT.
    """
    args.out.parent.mkdir(parents=True, exist_ok=True)
    compute.meet(getattr(args, "device", "auto"))
    compute.agreed(lambda: _lock_all(args))
    _keep_log(args)
    states = {str(path): made.outside(path) for path in sorted(set(_given_paths(args)))}
    _inputs.clear()
    _inputs.update({path: state for path, state in states.items() if state})


def start(args, wanted):
    """Marks OUT as unfinished. wanted: {unit: how much of it is to be made}, for `make status`."""
    compute.gather([])  # all processes have looked at what is there
    if compute.FIRST:
        files.write_json(args.out / ".stage", {"wanted": wanted})
        (args.out / "config.json").unlink(missing_ok=True)
    compute.gather([])
    _working[0] = True


def finish(out, args, key, **more):
    """Publishes a stage's result: see made.finish()."""
    made.finish(out, args, key, dict(_inputs), **more)


def is_made(args, key):
    """Whether OUT was made for this key and is intact: says so, and renews its config.json."""
    finished = made.is_finished(args.out, key)
    if finished and compute.FIRST:
        path = args.out / "config.json"
        renewed = {"command": sys.argv, "inputs": _inputs}
        files.write_json(path, files.read_json(path) | renewed)
        print(f"{args.out}: up to date")
    return finished


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
    """Begins the log, if make asks for one: the command, when and where it runs, what it prints."""
    path = log_of(args.out, compute.RANK)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = _log[0] = open(path, "w", encoding="utf-8")
        print("$", shlex.join(sys.argv), file=log)
        where = (time.strftime("%F %T"), socket.gethostname(), "process", os.getpid())
        print(*where, file=log, flush=True)
        sys.stdout, sys.stderr = _Logged(sys.stdout, log), _Logged(sys.stderr, log)


def log_of(folder, rank=0, logs=None):
    """Where a script that writes a folder keeps its log: in LOGS, which make sets. None without.

    rank: the number of the process, or "*". logs: instead of LOGS.
    """
    logs, folder = logs or os.environ.get("LOGS"), Path(folder)
    if not logs:
        return None
    logs = Path(logs)
    inside = folder.is_relative_to(logs.parent)
    name = folder.relative_to(logs.parent) if inside else folder.name
    return logs / (f"{name}.{rank}.log" if rank else f"{name}.log")


def lock_of(path):
    """The file beside a folder that a script locks while it writes or reads the folder."""
    path = Path(path)
    return path.with_name(f".{path.name}.lock")


def _lock_all(args):
    """Locks OUT for writing and the inputs for reading."""
    _lock(args.out, fcntl.LOCK_EX)
    for path in sorted(set(_given_paths(args))):
        if lock_of(path).is_file():
            _lock(path, fcntl.LOCK_SH)


def _lock(path, kind):
    lock, exclusive = lock_of(path), kind == fcntl.LOCK_EX
    try:
        flags = os.O_RDWR | os.O_CREAT if exclusive else os.O_RDONLY
        _locks[lock] = os.open(lock, flags, 0o666)
        fcntl.lockf(_locks[lock], kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        if lock in _locks:
            raise InputError(path, "is in use by another process",
                             "wait for it to finish, or stop it") from error
    except OSError:
        pass  # a folder that cannot be written, or a file system without locks
