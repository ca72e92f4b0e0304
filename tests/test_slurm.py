"""The same targets on Slurm: a real one of two nodes, started on this machine.

`make test-slurm` runs it.
"""

import os
import shutil
import subprocess
import tempfile
import time

import pytest
from conftest import ROOT, environment, new_house
from test_kills import made, wipe

pytestmark = [pytest.mark.skipif("TEST_SLURM" not in os.environ,
                                 reason="takes minutes: make test-slurm"),
              pytest.mark.skipif(not shutil.which("slurmctld",
                                                  path=os.environ["PATH"] + ":/usr/sbin"),
                                 reason="Slurm is not installed: "
                                        "apt-get install slurmctld slurmd slurm-client munge")]
SMALL = ("RECIPES=erm lora", "SEEDS=0 1", "IMAGES=6", "EPOCHS=2", "GENERATE=--steps 2 --batch 2",
         "LORA=--steps 20 --batch 2 --checkpoint-every 5")
SLURM = ("-j2", "LAUNCH=srun -K -n2 -c1")  # a process on each node


@pytest.fixture(scope="module")
def slurm():
    """slurm(what, node): runs tests/slurm.sh. All that this test starts finds this Slurm."""
    place = tempfile.mkdtemp(prefix="slurm-")  # a socket's path must be short

    def control(*words):
        subprocess.run([ROOT / "tests" / "slurm.sh", words[0], place, *words[1:]], check=True)

    control("start")
    os.environ["SLURM_CONF"] = f"{place}/slurm.conf"
    os.environ["MASTER_ADDR"] = "127.0.0.1"  # the nodes are no names of hosts
    yield control
    control("stop")
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return new_house(tmp_path_factory.mktemp("slurm") / "house")


@pytest.fixture(scope="module")
def plain(house):
    """What a plain make makes."""
    make(house, "-j2")
    return made(house)


def start(house, *args):
    log = open(house.parent / "log", "w")
    return subprocess.Popen(["make", "--no-print-directory", *SMALL, *args], cwd=house,
                            stdout=log, stderr=subprocess.STDOUT,
                            env=environment() | {"MAKELEVEL": "1", "OMP_NUM_THREADS": "1"})


def make(house, *args):
    status = start(house, *args).wait()
    assert status == 0, (house.parent / "log").read_text()[-3000:]
    return (house.parent / "log").read_text()


def same(house, plain):
    now = made(house)
    assert sorted(now) == sorted(plain), "files are missing, or something was left behind"
    assert not [name for name in now if now[name] != plain[name]]


def test_two_processes_and_slurm_give_the_bytes_of_a_plain_make(house, plain, slurm):
    for args in (("-j1", "LAUNCH=torchrun --standalone --nproc_per_node 2"), SLURM):
        wipe(house)
        text = make(house, *args)
        same(house, plain)
    assert "srun -K -n2 -c1 .venv/bin/python finetune.py" in " ".join(text.split())


@pytest.mark.parametrize("script", ("finetune.py", "generate.py"))
def test_when_a_node_dies_make_ends_and_the_next_one_gives_the_same_bytes(
        house, plain, slurm, script):
    wipe(house)
    process, log = start(house, *SLURM), house.parent / "log"
    while f"python {script}" not in log.read_text():
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.1)
    time.sleep(8)  # by then both processes are at work
    slurm("kill", "node0")
    assert process.wait() == 2 and "rror" in log.read_text()
    slurm("node", "node0")
    make(house, *SLURM)
    same(house, plain)
