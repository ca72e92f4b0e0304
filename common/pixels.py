"""Decoded images: each is decoded once per size, and read from a file by every stage after that.

The file stands beside the folder of the images, in .decoded/<size>-<version>/, so that datasets
that differ in bias share it, or in the folder that the environment variable DECODED names, such as
the fast disk of a cluster's node. It holds one image after the other, size x size x 3 bytes each,
and `index` a line for each: the digest of the image's file. It grows when images change; remove
.decoded when no stage is running to begin anew.
"""

import errno
import fcntl
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import files, imagefolder, made, stage
from common.files import InputError

np = stage.lazy("numpy")
torch = stage.lazy("torch")

CHUNK = 64  # images that a worker process decodes at a time
RECORDED = 2**28  # bytes after which images are recorded: a killed process loses no more
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.ENOTSUP)


def add_flag(parser):
    parser.add_argument("--cache", action=stage.Flag, default=True, help="keep decoded images in "
                        ".decoded beside their folder; they take images x size x size x 3 bytes")


class Pixels:
    """The images of some rows of metadata: pixels[indices] is a (B, 3, size, size) uint8 tensor.

    They are in a memory-mapped file, or without `cache` decoded when they are asked for. Raises
    InputError if an image is broken, or if the disk is too full.
    """

    def __init__(self, folder, rows, size, cache=True):
        self.size, self.part = size, torch.zeros(len(rows), dtype=torch.int)
        found = None
        try:
            found = decoded(Path(folder), rows, size) if cache else None
        except OSError as error:
            if error.errno not in READ_ONLY:  # nothing can be written, or locked, there
                raise
        if not found:
            check(folder, rows)
            paths = [Path(folder) / row["file_name"] for row in rows]
            found = _Decoder(paths, size), range(len(rows))
        self.sources, self.slots = [found[0]], torch.tensor(found[1])

    def __len__(self):
        return len(self.slots)

    def __getitem__(self, indices):
        part, slots = self.part[indices].numpy(), self.slots[indices].numpy()
        found = np.empty((len(slots), self.size, self.size, 3), np.uint8)
        for number, source in enumerate(self.sources):
            found[part == number] = source[slots[part == number]]
        return torch.from_numpy(found).permute(0, 3, 1, 2)

    def joined(self, other, taken):
        """These images, and after them those of `other` at the indices `taken`."""
        both = object.__new__(Pixels)
        both.size, both.sources = self.size, self.sources + other.sources
        both.part = torch.cat([self.part, other.part[taken] + len(self.sources)])
        both.slots = torch.cat([self.slots, other.slots[taken]])
        return both


class _Decoder:
    """In place of the file: decodes images when they are asked for."""

    def __init__(self, paths, size):
        self.paths, self.size = paths, size

    def __getitem__(self, indices):
        found = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        for place, i in enumerate(indices):
            found[place] = np.asarray(imagefolder.load_image(self.paths[i], self.size))
        return found


def ahead(read, items):
    """read(item) for each item; a thread reads the next one while the last one is being used."""
    with ThreadPoolExecutor(1) as reader:
        waiting = None
        for item in items:
            coming = reader.submit(read, item)
            if waiting:
                yield waiting.result()
            waiting = coming
        if waiting:
            yield waiting.result()


# -------------------------------------------------------------------------------------- the store


def decoded(folder, rows, size):
    """(memory-mapped (M, size, size, 3) uint8 array, the place in it of each row's image).

    Decodes those that are missing.
    """
    names, version = [row["file_name"] for row in rows], made.code_digest(imagefolder.load_image)
    digests, place = files.file_digests(folder, names), _place(folder) / f"{size}-{version[:8]}"
    index = _read_index(place)
    if any(digest not in index for digest in digests.values()):
        place.mkdir(parents=True, exist_ok=True)
        for other in place.parent.glob(f"{size}-*"):
            if other != place:
                shutil.rmtree(other, ignore_errors=True)
        with open(place / "lock", "w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)  # another process may be decoding the same images
            index = _read_index(place)
            missing = {digests[name]: folder / name for name in names
                       if digests[name] not in index}
            _report(_append(place, folder, missing, index, size), folder, len(names))
        index = _read_index(place)
    stored = np.memmap(place / "pixels", np.uint8, "r", shape=(len(index), size, size, 3))
    return stored, [index[digests[name]] for name in names]


def _append(place, folder, missing, index, size):
    """Decodes `missing`, {digest: path}, into the file and the index. Returns the faults."""
    record, digests, paths = 3 * size * size, list(missing), list(missing.values())
    needed, free = len(paths) * record / 1e9, shutil.disk_usage(place).free / 1e9
    if needed > free:
        raise InputError(place, f"needs {needed:.1f} GB for {len(paths)} decoded images, "
                         f"{free:.1f} GB are free", "free some, or use --no-cache")
    if needed > 1:
        print(f"{place}: {len(paths)} images are decoded once, for all stages; they take "
              f"{needed:.1f} GB", flush=True)
    if index:
        files.write_text(place / "index", "\n".join(index))
    else:
        (place / "index").unlink(missing_ok=True)
    with open(place / "pixels", "ab") as file:
        file.truncate(len(index) * record)  # a killed process may have written more
    every, faults, done = -(-RECORDED // record // CHUNK), [], 0
    chunks = _Chunks(paths, size, place / "pixels", len(index))
    for chunk, found in enumerate(_in_workers(chunks, f"decode {folder}", len(paths)), 1):
        faults += found
        if not faults and (chunk % every == 0 or chunk == len(chunks)):
            with open(place / "pixels", "rb") as file:
                os.fsync(file)  # a line in the index promises that the image is on the disk
            with open(place / "index", "a", encoding="ascii") as file:
                file.writelines(f"{digest}\n" for digest in digests[done:chunk * CHUNK])
            done = chunk * CHUNK
    return faults


class _Chunks:
    """A dataset for a DataLoader: item i decodes the i-th chunk of images, and lists its faults.

    Into the file `pixels`, if one is given, from the place `first` on.
    """

    def __init__(self, paths, size, pixels=None, first=0):
        self.paths, self.size, self.pixels, self.first = paths, size, pixels, first

    def __len__(self):
        return -(-len(self.paths) // CHUNK)

    def __getitem__(self, i):
        start, images, faults = i * CHUNK, [], []
        for path in self.paths[start:start + CHUNK]:
            try:
                images.append(np.asarray(imagefolder.load_image(path, self.size)).tobytes())
            except InputError as error:
                faults.append(str(error))
        if self.pixels and not faults:
            with open(self.pixels, "r+b") as file:
                file.seek((self.first + start) * 3 * self.size**2)
                file.write(b"".join(images))
        return faults


def _in_workers(chunks, title, images):
    """The items of `chunks`, in order, made by a process per core; few in this process."""
    affinity = getattr(os, "sched_getaffinity", None)
    workers = len(affinity(0)) if affinity else os.cpu_count()
    loader = torch.utils.data.DataLoader(chunks, batch_size=None, worker_init_fn=_end_silently,
                                         num_workers=workers if images > 1000 else 0)
    with imagefolder.progress(None, title, "image", total=images) as bar:
        for found in loader:
            yield found
            bar.update(min(CHUNK, images - bar.n))


def _end_silently(worker):
    for number in (signal.SIGINT, signal.SIGTERM):  # the process that started it says why
        signal.signal(number, signal.SIG_DFL)


def check(folder, rows):
    """Decodes images, but those that are in the store. Raises InputError for broken ones."""
    names, folder = [row["file_name"] for row in rows], Path(folder)
    known = set().union(*map(_read_index, _place(folder).glob("*/")))
    digests = files.file_digests(folder, names) if known else {}
    paths = [folder / name for name in names if digests.get(name) not in known]
    faults = []
    for found in _in_workers(_Chunks(paths, 8), f"check {folder}", len(paths)) if paths else ():
        faults += found
    _report(faults, folder, len(paths))


def _report(faults, folder, total):
    if faults:
        raise InputError(folder, f"{len(faults)} of {total} images are broken, the first is "
                         f"{faults[0]}", "replace or remove them")


def _place(folder):
    return Path(os.environ.get("DECODED") or folder.parent / ".decoded")


def _read_index(place):
    """{digest of an image's file: its place}; a line that a killed process began is left out."""
    try:
        lines = (place / "index").read_text(encoding="ascii").split("\n")[:-1]
    except (OSError, UnicodeDecodeError):
        return {}
    return {digest: i for i, digest in enumerate(lines)}
