"""How a command computes, by accelerate: its processes, its device, its precision.

`accelerate launch --num_processes 8 finetune.py ...` (or torchrun, or `srun -n8 python ...`) starts
eight processes of one command. Each takes its share of the units, images or seeds, and the first
one publishes the result once all are done. They meet over the network, and share the folders.
"""

import datetime
import os
import re

from common.files import InputError

if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "RANK" not in os.environ:  # srun -n8
    first_node = re.sub(r"\[(\d+).*", r"\1", os.environ["SLURM_STEP_NODELIST"].split(",")[0])
    step = int(os.environ["SLURM_JOB_ID"]) * 100 + int(os.environ["SLURM_STEP_ID"])
    os.environ.update(RANK=os.environ["SLURM_PROCID"], LOCAL_RANK=os.environ["SLURM_LOCALID"],
                      WORLD_SIZE=os.environ["SLURM_STEP_NUM_TASKS"],
                      MASTER_PORT=str(20_000 + step % 40_000),
                      MASTER_ADDR=os.environ.get("MASTER_ADDR", first_node))

RANK = int(os.environ.get("RANK", 0))  # the number of this process
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # how many there are
FIRST = RANK == 0


def meet(device="auto"):
    """Waits until all processes of this command have started."""
    if PROCESSES > 1:
        from accelerate import PartialState

        week = datetime.timedelta(days=7)  # the first to finish waits for the longest unit
        PartialState(cpu=device == "cpu" or not _on_gpu(), timeout=week)


def alone():
    """This process does all the work of its command: the others have left."""
    global PROCESSES
    PROCESSES = 1
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # accelerate would wait for them
        os.environ.pop(name, None)


def share(items):
    """This process's part of a list: every item belongs to one process, neighbours together."""
    first, last = (len(items) * number // PROCESSES for number in (RANK, RANK + 1))
    return items[first:last]


def gather(items):
    """The items of all processes, in the order of their numbers. Waits for all of them."""
    if PROCESSES == 1:
        return items
    from accelerate.utils import gather_object

    return gather_object(items)


def agreed(find):
    """What find() returns in the first process, for all of them; raises its InputError in all.

    Of shared folders each process might see another state: nodes notice new files late.
    """
    found = []
    if FIRST:
        try:
            found = [find()]
        except InputError as error:
            found = [error]
    [found] = gather(found)
    if isinstance(found, InputError):
        raise found
    return found


def leave():
    """Leaves the other processes, at the end."""
    if PROCESSES > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


def add_flags(parser, precision=True):
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto",
                        help="auto: a GPU if there is one")
    if precision:
        parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                            help="auto: bf16 on a GPU that supports it, else fp32")


def accelerator(device="auto", precision="fp32"):
    """accelerate's Accelerator: `.device`, and `.autocast()` for what may be computed in bf16."""
    import torch
    from accelerate import Accelerator

    cuda = device == "auto" and torch.cuda.is_available()
    supported = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = precision == "bf16" or precision == "auto" and supported
    on_cpu = device == "cpu" or PROCESSES > 1 and not _on_gpu()
    return Accelerator(cpu=on_cpu, mixed_precision="bf16" if bf16 else "no")


def _on_gpu():
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()
