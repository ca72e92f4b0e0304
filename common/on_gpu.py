"""Runs a command on a free GPU: `make -j8 SHARDS=8 GPUS=8` puts this before every command.

    python common/on_gpu.py 8 .venv/bin/python finetune.py --shard 0/8 ...

The command sees one GPU, in CUDA_VISIBLE_DEVICES: the first that no other command holds; if all are held, it waits. A GPU is
held by a lock that the command itself inherits, so it is free again however the command ends. Where CUDA_VISIBLE_DEVICES is
set already, its devices are shared out.
"""

import fcntl
import os
import sys
import tempfile
import time
from pathlib import Path


def main(count, *command):
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = visible.split(",")[:int(count)] if visible else [str(number) for number in range(int(count))]
    locks = Path(tempfile.gettempdir()) / f"gpus-of-{os.getuid()}"
    locks.mkdir(exist_ok=True)
    while True:
        for device in devices:
            lock = os.open(locks / device, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                continue
            os.set_inheritable(lock, True)
            os.environ["CUDA_VISIBLE_DEVICES"] = device
            os.execvp(command[0], command)
        time.sleep(0.2)


if __name__ == "__main__":
    main(*sys.argv[1:])
