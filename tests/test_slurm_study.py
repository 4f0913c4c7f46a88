"""Scaling studies whose points are jobs of a real Slurm."""

import json
import signal
import sys

import pytest
import yaml

import forks
from faconv_hpc.config import MeshConfig
from runs import make_store, write_config
from slurms import MINUTES_S, job_environment, left_behind, wait_for
from test_cli import faconv


def study_of(directory, scaling, **more):
    config = write_config(directory, make_store(directory / "waves"), slurm={"tasks_per_node": 1, "time_min": 10})
    tree = {
        "study_dir": str(directory / "study"), "config": str(config), "scaling": scaling,
        "warm_up_steps": 2, "repeats": 5, "steps_per_repeat": 2, "at_once": 1, "slurm": {"tasks_per_node": 1},
    }  # fmt: skip
    path = directory / "study.yaml"
    path.write_text(yaml.safe_dump(tree | more))
    return path


def results_of(directory):
    path = directory / "study" / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("scaling", "more"),
    [
        ("strong", {"points": [{"mesh": "1x1"}, {"mesh": "2x2"}]}),
        (
            "weak",
            {"points": [{"mesh": "1x1"}, {"mesh": "1x2"}], "cells_per_rank": [8, 10], "channels": 2, "frames": 12},
        ),
    ],
    ids=["strong", "weak"],
)
def test_over_several_nodes_killed_in_the_middle_and_continued(tmp_path, slurm, scaling, more):
    nodes, repeats = [MeshConfig.parse(point["mesh"]).ranks for point in more["points"]], 5
    study = study_of(tmp_path, scaling, **more)
    command = [sys.executable, "-m", "faconv_hpc", "study", str(study), "--cluster", "slurm"]
    log = tmp_path / "first.log"
    with log.open("w") as file:
        first = forks.Popen(command, env=job_environment(), stdout=file, stderr=file)
    wait_for("a point is done", lambda: results_of(tmp_path), 4 * MINUTES_S, log)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = results_of(tmp_path)
    assert len(done) < repeats * len(nodes)
    again = faconv("study", study, "--cluster", "slurm", "--json", environment=job_environment())
    assert again.returncode == 0, again.stderr + log.read_text()
    results = results_of(tmp_path)
    assert results[: len(done)] == done  # what was measured is kept
    assert len({(line["point"], line["repeat"]) for line in results}) == len(results) == repeats * len(nodes)
    assert {line["nodes"] for line in results} == {*nodes}
    jobs = [json.loads(path.read_text()) for path in (tmp_path / "study" / "points").glob("*/job.json")]
    assert len(jobs) == len(nodes)  # each point was a job of its own, found again by the second driver
    assert not any(left_behind(job["job"]) for job in jobs)
    report = json.loads(again.stdout)
    assert [point["status"] for point in report["points"]] == ["done"] * len(nodes)
    assert (tmp_path / "study" / "scaling.png").stat().st_size > 10_000
    table = (tmp_path / "study" / "report.md").read_text()
    assert all(mesh["mesh"] in table for mesh in more["points"]) and scaling in table
