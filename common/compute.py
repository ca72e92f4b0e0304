"""How a command computes, by accelerate: the processes that share its work, their device, their precision.

`accelerate launch --num_processes 8 finetune.py ...` (or torchrun, or `srun -n8 python`) starts
eight processes of one command. Each takes its share of the units, images or seeds, and the first
one publishes the result once all are done. They meet over the network, and share the folders.
"""

import datetime
import os
import re

if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "RANK" not in os.environ:  # srun -n8
    host = re.sub(r"\[(\d+).*", r"\1", os.environ["SLURM_STEP_NODELIST"].split(",")[0])
    port = 20_000 + (int(os.environ["SLURM_JOB_ID"]) * 100 + int(os.environ["SLURM_STEP_ID"])) % 40_000
    os.environ |= {"RANK": os.environ["SLURM_PROCID"], "LOCAL_RANK": os.environ["SLURM_LOCALID"],
                   "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"], "MASTER_PORT": str(port),
                   "MASTER_ADDR": os.environ.get("MASTER_ADDR", host)}

RANK = int(os.environ.get("RANK", 0))  # the number of this process
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # how many there are
FIRST = RANK == 0


def meet():
    """Waits until all processes of this command have started."""
    if PROCESSES > 1:
        import torch
        from accelerate import PartialState

        on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
        PartialState(cpu=on_cpu, timeout=datetime.timedelta(days=30))  # for the longest unit


def share(items):
    """This process's part of a list: every item belongs to one process."""
    return items[RANK::PROCESSES]


def gather(items):
    """The items of all processes, in the order of their numbers. Waits for all of them."""
    if PROCESSES == 1:
        return items
    from accelerate.utils import gather_object

    return gather_object(items)


def add_flags(parser, precision=True):
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto",
                        help="auto: accelerate's choice, a GPU if there is one")
    if precision:
        parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                            help="auto: bf16 on a GPU that supports it, else fp32")


def accelerator(device="auto", precision="fp32"):
    """accelerate's Accelerator: `.device`, and `.autocast()` for what may be computed in bf16."""
    import torch
    from accelerate import Accelerator

    on_gpu = device == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    bf16 = precision == "bf16" or precision == "auto" and on_gpu
    return Accelerator(cpu=device == "cpu" or not on_gpu and PROCESSES > 1,
                       mixed_precision="bf16" if bf16 else "no")
