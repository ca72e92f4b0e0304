"""cluster.py: clusters within each group."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import files_of, ROOT, run, start, together

from cluster import group_clusters
from common import imagefolder


def blobs(*sizes):
    """Embeddings of unit length in well separated blobs."""
    rng = np.random.default_rng(0)
    points = np.concatenate([np.eye(8)[i] + 0.05 * rng.normal(size=(size, 8))
                             for i, size in enumerate(sizes)])
    return (points / np.linalg.norm(points, axis=1, keepdims=True),
            np.repeat(np.arange(len(sizes)), sizes))


def test_auto_finds_as_many_clusters_as_there_are_largest_first():
    points, truth = blobs(12, 30, 20)
    labels = group_clusters(points, "auto", 6, 5, 0)
    assert np.bincount(labels).tolist() == [30, 20, 12]
    assert len(set(zip(labels, truth))) == 3


def test_no_cluster_is_smaller_than_the_least_size():
    points, _ = blobs(30, 20, 2)
    for k in (3, 5, "auto"):
        assert np.bincount(group_clusters(points, k, 6, 5, 0)).min() >= 5


def test_more_clusters_than_images_are_not_tried():
    assert (len(group_clusters(blobs(3, 2)[0], "auto", 5, 1, 0))
            == len(group_clusters(blobs(3, 2)[0], 5, 5, 1, 0)) == 5)


def test_a_sample_finds_the_clusters_of_all(monkeypatch):
    points, truth = blobs(300, 200, 100)
    whole = group_clusters(points, 3, 6, 5, 0)
    monkeypatch.setattr("cluster.SAMPLE", 60)
    for k in (3, "auto"):
        assert (np.array_equal(group_clusters(points, k, 6, 5, 0), whole)
                and np.bincount(whole).tolist() == [300, 200, 100])


@pytest.mark.parametrize("size", (1, 2, 9))
def test_a_group_too_small_to_split_stays_whole(size):
    assert list(group_clusters(blobs(size)[0], 3, 5, 5, 0)) == [0] * size


def test_the_stage_writes_the_one_format_with_clusters_of_train_and_a_sheet_per_group(
        dataset, embeddings, tmp_path):
    args = ("cluster.py", "--data", dataset, "--embeddings", embeddings, "--k", 3,
            "--min-size", 4, "--out", tmp_path / "c")
    run(*args)
    rows = imagefolder.read_metadata(tmp_path / "c")
    assert rows and {row["split"] for row in rows} == {"train"}
    assert {row["cluster"] for row in rows if imagefolder.group_of(row) == "y0-a1"} == {"0"}
    for group in imagefolder.group_counts(rows):
        assert (tmp_path / "c" / f"{group}.png").is_file()
    first = files_of(tmp_path / "c")
    assert "up to date" in run(*args)
    (tmp_path / "c" / "y0-a0.png").unlink()
    assert "up to date" not in run(*args) and files_of(tmp_path / "c") == first


def test_clusters_in_a_folder_that_is_reached_through_a_link_lead_to_the_images(
        dataset, embeddings, tmp_path):
    (tmp_path / "far" / "away" / "scratch").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "far" / "away" / "scratch")
    run("cluster.py", "--data", dataset, "--embeddings", embeddings, "--k", 1,
        "--out", tmp_path / "runs" / "c")
    assert len(imagefolder.read_metadata(tmp_path / "runs" / "c")) == 54


def test_where_several_processes_start_the_first_does_it_alone(dataset, embeddings, tmp_path):
    together(2, "cluster.py", "--data", dataset, "--embeddings", embeddings, "--k", 2,
             "--out", tmp_path / "c")
    assert len(imagefolder.read_metadata(tmp_path / "c")) == 54


def test_a_log_ends_with_done_or_with_the_error_and_status_shows_it(dataset, embeddings, tmp_path):
    """Any stage would do: this one starts quickly."""
    run_folder = tmp_path / "runs" / "x-0.9"
    logs = os.environ | {"LOGS": str(run_folder / "logs")}
    for out, given, status, last in (("clusters", embeddings, 0, "done in "),
                                     ("modes", tmp_path, 2, "cluster.py: error: ")):
        process = start("cluster.py", "--data", dataset, "--embeddings", given, "--k", 2,
                        "--min-size", 3, "--out", run_folder / out,
                        stdout=-1, stderr=-1, env=logs)
        process.communicate()
        lines = (run_folder / "logs" / f"{out}.log").read_text().splitlines()
        assert (process.returncode == status and f"--out {run_folder / out}" in lines[0]
                and lines[-1].startswith(last))
    plan = [f"{run_folder / name} cluster.py" for name in ("clusters", "modes")]
    goals = f"{run_folder / 'clusters'} {run_folder / 'modes'}"
    status = (sys.executable, ROOT / "tools" / "plan.py", "status", goals, *plan)
    shown = subprocess.run(status, capture_output=True, text=True, env=logs).stdout.splitlines()
    assert shown[0].endswith(" done")
    assert ("failed: cluster.py: error: " in shown[1]
            and shown[1].endswith(f"({run_folder}/logs/modes.log)"))
