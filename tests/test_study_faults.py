"""Scaling studies whose cluster falls silent, whose jobs end unseen, and whose nodes are lost."""

import fcntl
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from faconv_hpc.cli.study import Where, default_cluster
from faconv_hpc.errors import InputError, SilentClusterError
from faconv_hpc.launch.cluster import LocalCluster, _born
from faconv_hpc.scaling.driver import StudyDriver
from faconv_hpc.scaling.points import Outcomes, PointFiles
from studies import FakeCluster, NoStop, fail, finish
from test_cli import faconv, messages
from test_study import drive, study_of, write_study

SECONDS = 60


@contextmanager
def held(run_dir):
    """The lock of a run, as a lost node leaves it on a network file system."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 1 on n3")
        lock.flush()
        yield


class Silent(FakeCluster):
    """A cluster that takes no job and says nothing of those it has, the first times it is asked."""

    def __init__(self, submits=0, looks=0, **options):
        super().__init__(**options)
        self.submits, self.silences = submits, looks

    def submit(self, config, run, log):
        if self.submits:
            self.submits -= 1
            raise SilentClusterError("Slurm's controller does not answer")
        return super().submit(config, run, log)

    def alive(self, job):
        if self.silences:
            self.silences -= 1
            raise SilentClusterError(f"Slurm does not say how job {job} does")
        return super().alive(job)


def test_a_cluster_that_takes_no_job_now_fails_no_point(tmp_path):
    study, points = study_of(tmp_path)
    cluster, shown = Silent(submits=3, at_once=1), []
    states = drive(study, points, cluster, show=lambda states: shown.extend((one.status, one.why) for one in states))
    assert states == dict.fromkeys(("1x1", "1x2", "2x2"), "done")
    assert cluster.submitted == ["1x1", "1x2", "2x2"]
    assert ("waiting", "Slurm's controller does not answer") in shown
    assert not any(status == "failed" for status, _ in shown)


def test_a_cluster_that_says_nothing_of_a_job_has_not_ended_it(tmp_path):
    study, points = study_of(tmp_path, points=[{"mesh": "1x1"}])
    shown = []
    cluster = Silent(looks=3)
    drive(study, points, cluster, show=lambda states: shown.extend((one.status, one.why) for one in states))
    assert shown.count(("running", "Slurm does not say how job 1x1-1 does")) == 3
    assert shown[-1] == ("done", "") and cluster.submitted == ["1x1"]


def test_a_job_that_failed_while_nobody_looked_has_failed(tmp_path):
    study, points = study_of(tmp_path, points=[{"mesh": "1x1"}])
    driver, files = StudyDriver(study, points, FakeCluster({"1x1": fail}), "slurm"), PointFiles(points[0])
    (state,) = [driver._found(point) for point in points]
    driver._start(state, NoStop())  # and is killed before it looks again
    cluster = FakeCluster(looks=0)
    assert drive(study, points, cluster) == {"1x1": "failed"} and cluster.submitted == []
    (outcome,) = [Outcomes(study.study_dir).of("1x1", files.attempt())]
    assert outcome.why == "faconv: failed: rank 0 was ended by SIGKILL" and outcome.attempt == 1
    assert drive(study, points, FakeCluster(), retry_failed=True) == {"1x1": "done"}


def test_the_lock_of_a_lost_node_is_not_believed_for_ever(tmp_path):
    study, points = study_of(tmp_path, points=[{"mesh": "1x1"}])
    shown, locks = [], []

    def lose(run, log):
        fail(run, log)
        locks.append(held(run.run_dir))
        locks[-1].__enter__()

    show = lambda states: shown.extend((one.status, one.why) for one in states)  # noqa: E731
    started = time.monotonic()
    states = drive(study, points, FakeCluster({"1x1": lose}), stale_s=1.0, poll_s=0.05, show=show)
    assert states == {"1x1": "failed"} and 1.0 < time.monotonic() - started < SECONDS
    assert ("running", f"{points[0].run.run_dir} is held by process 1 on n3") in shown
    again = drive(study, points, FakeCluster(), stale_s=0.2, poll_s=0.05, retry_failed=True)
    assert again == {"1x1": "done"}
    locks[0].__exit__(None, None, None)


def test_a_point_that_somebody_holds_says_so_while_it_waits(tmp_path):
    """The number of its job was lost, so that only the lock tells that it runs."""
    study, points = study_of(tmp_path, points=[{"mesh": "1x1"}])
    PointFiles(points[0]).begin("slurm")
    shown, released = [], threading.Event()

    def show(states):
        shown.extend((one.status, one.why) for one in states)
        if len(shown) > 5 and not released.is_set():
            released.set()
            finish(points[0].run, None)
            lock.__exit__(None, None, None)

    lock = held(points[0].run.run_dir)
    lock.__enter__()
    cluster = FakeCluster()
    assert drive(study, points, cluster, show=show, poll_s=0.02) == {"1x1": "done"} and cluster.submitted == []
    assert ("running", f"{points[0].run.run_dir} is held by process 1 on n3") in shown


def test_a_dead_process_that_nobody_has_buried_is_no_job():
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    born = _born(process.pid)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert born and Path(f"/proc/{process.pid}/stat").exists()
    assert not LocalCluster().alive(f"{process.pid} {born}")
    process.wait()


def test_commands_without_a_cluster_are_none(tmp_path, monkeypatch, capsys):
    """As on a laptop on which they were installed."""
    for name in ("scontrol", "sbatch", "srun"):
        (tmp_path / name).write_text(
            "#!/bin/sh\necho 'fatal: Could not establish a configuration source' >&2; exit 1\n"
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert default_cluster([]) is Where.LOCAL
    assert "no cluster: the study runs on this machine" in capsys.readouterr().err


def test_where_slurm_does_not_answer_a_study_runs_here_and_says_so(tmp_path, monkeypatch, capsys):
    """Unless it is told to use Slurm."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("scontrol", "sbatch", "srun"):
        (commands / name).write_text("#!/bin/sh\necho 'Slurmctld(primary) at head is DOWN'\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    assert default_cluster([]) is Where.LOCAL
    (told,) = capsys.readouterr().err.splitlines()
    assert "does not answer" in told and "head is DOWN" in told and "runs on this machine; --cluster slurm" in told

    _, points = study_of(tmp_path / "begun")
    PointFiles(points[1]).begin("slurm")
    with pytest.raises(InputError, match=r"head is DOWN\), and this study has points that ran there.*--cluster local"):
        default_cluster(points)

    file = write_study(tmp_path)
    process = faconv("study", file, "--cluster", "slurm")
    assert process.returncode == 2 and len(messages(process)) == 1 and "head is DOWN" in process.stderr
    assert not (tmp_path / "study").exists()
