"""tools/bench.py: a table of speeds."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, run, slow

from common import files, imagefolder
from tools import bench
from tools.bench import Measured


@pytest.fixture
def own_environment(monkeypatch):
    """bench.py sets variables for the processes that it starts, here also those of other tests."""
    for name in ("OMP_NUM_THREADS", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "restored after the test")


@slow
def test_a_row_is_measured_and_one_without_its_peer_is_skipped_and_earlier_rows_stay(
        own_environment, tmp_path):
    out = tmp_path / "bench"
    earlier = bench.entry("nothing", "earlier", [(Measured(1, 1), None)], 1, 8)
    out.mkdir()
    (out / ".stage").write_text("{}")
    files.write_csv(out / "bench.csv", [earlier])
    text = run("tools/bench.py", "--trial", "--repeats", 1, "--threads", 1, "--rows", "lora",
               "generation", "--out", out)
    assert "lora: skipped, --peers holds no train_dreambooth_lora.py" in text
    old, row = files.read_csv(out / "bench.csv")
    assert row["row"] == "generation"
    assert old == {name: str(value) for name, value in earlier.items()}
    seconds, peer = float(row["seconds"]), float(row["peer_seconds"])
    assert 0 < seconds < 60 and 0 < peer < 60
    assert float(row["ratio"]) == pytest.approx(peer / seconds, rel=0.02)
    assert 200 < int(row["peak_mb"]) < 4000 and 200 < int(row["peer_peak_mb"]) < 4000
    assert f"| {row['seconds']} | {row['peer_seconds']} |" in (out / "bench.md").read_text()
    assert {path.name for path in out.iterdir()} == {
        ".stage", "bench.csv", "bench.md", "config.json"}


def test_a_ratio_is_the_median_of_the_ratios_of_each_turn():
    turns = ((1, 3, 10), (2, 8, 30), (4, 4, 20))
    found = [(Measured(ours, mb), Measured(peer, 2 * mb)) for ours, peer, mb in turns]
    row = bench.entry("lora", "what", found, 3, 2)
    assert [row[name] for name in ("ratio", "lowest", "highest")] == ["3.00", "1.00", "4.00"]
    assert [row[name] for name in ("seconds", "peer_seconds", "peak_mb", "peer_peak_mb")] == [
        "2", "4", 30, 60]


def test_memory_is_that_of_the_process_and_a_failed_one_is_a_one_line_error():
    """In a process of its own: a child begins with the peak of this one, which imported torch."""
    code = ("import sys\nfrom tools import bench\n"
            "for size in (1, 300):\n"
            "    work = f'import time; x = b\"x\" * {size} * 2**20; time.sleep(0.2)'\n"
            "    found = bench.measured(sys.executable, '-c', work)\n"
            "    print(found.mb, found.seconds)\n"
            "try:\n    bench.measured(sys.executable, '-c', 'int(\"seven\")')\n"
            "except bench.InputError as error:\n    print(error)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    (small, seconds), (large, _) = (map(float, line.split()) for line in lines[:2])
    assert 300 < large < 320 and small < 60 and seconds > 0.2
    assert "failed: ValueError: invalid literal for int() with base 10: 'seven' (run" in lines[2]


def test_units_have_as_many_images_as_full_batches_take_and_share_none(tmp_path):
    args = SimpleNamespace(work=tmp_path)
    data = bench.units_of(args, 12, 80)
    rows = imagefolder.read_metadata(data)
    folders = bench.flat_folders(args, data)
    assert len(rows) == len({row["file_name"] for row in rows}) == 960
    assert [len(list(folder.iterdir())) for folder, _ in folders] == [80] * 12
    assert sorted(path.name for folder, _ in folders for path in folder.iterdir()) == sorted(
        row["file_name"].split("/")[1] for row in rows)


def test_an_unknown_row_and_a_missing_folder_of_peers_are_one_line_errors(tmp_path):
    run("tools/bench.py", "--rows", "lore", "--out", tmp_path / "b",
        fails="argument --rows: invalid choice: 'lore'")
    run("tools/bench.py", "--peers", tmp_path / "none", "--out", tmp_path / "b",
        fails="none: is not a folder (get the")
    assert not (tmp_path / "b").exists()
