"""Ranks of a Slurm job meet, whoever holds the ports they had in mind."""

import os
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest
from torch.distributed import TCPStore

from faconv_hpc.errors import InputError, RunError
from faconv_hpc.spatial.environment import RankEnvironment
from faconv_hpc.spatial.meeting import _opened, candidate_ports, meet
from faconv_hpc.training.records import claimed

SLURM = {"SLURM_CLUSTER_NAME": "c", "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
JOB = f"c.{os.getpid()}.0.0"
MEET = """
from faconv_hpc.spatial.environment import RankEnvironment
from faconv_hpc.spatial.meeting import meet
from faconv_hpc.training.records import claimed
environment = RankEnvironment.read()
for turn in "first", "second":
    store = meet(environment, 30.0)
    store.set(f"{turn} {environment.rank}", turn)
    store.wait([f"{turn} 0", f"{turn} 1"])
    print(turn, environment.rank, store.clone().get(f"{turn} {1 - environment.rank}").decode())
"""


def listening(port):
    """Somebody who takes connections and never says a word."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("0.0.0.0", port))
    held.listen()
    return held


def test_ranks_meet_although_others_hold_their_first_ports():
    ports = candidate_ports(JOB)
    assert len(set(ports)) > 10 and all(20000 <= port < 32000 for port in ports)
    with ExitStack() as stack:
        stack.enter_context(listening(ports[0]))
        older = TCPStore("127.0.0.1", ports[1], is_master=True, wait_for_workers=False)
        stack.enter_context(_opened("another job", ports[2]))
        environment = os.environ | SLURM | {"SLURM_STEP_NODELIST": "localhost"}
        ranks = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", MEET],
                    env=environment | {"SLURM_PROCID": str(rank), "MASTER_ADDR": "127.0.0.1"},
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in (1, 0)
        ]
        answers = [rank.communicate(timeout=120)[0] for rank in ranks]
        assert older.port == ports[1]
    assert answers == ["first 1 first\nsecond 1 second\n", "first 0 first\nsecond 0 second\n"]


def test_a_requeued_job_looks_elsewhere(monkeypatch):
    for name, value in (SLURM | {"SLURM_PROCID": "0"}).items():
        monkeypatch.setenv(name, value)
    jobs = {RankEnvironment.read().job}
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    jobs.add(RankEnvironment.read().job)
    assert len(jobs) == 2 and len({candidate_ports(job)[0] for job in jobs}) == 2
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert (RankEnvironment.read().job, RankEnvironment.read().port) == ("", 1234)


def test_no_rank_0_is_said_with_where_it_was_looked_for():
    here = RankEnvironment(rank=1, world_size=2, job="nobody")
    with pytest.raises(RunError, match=r"rank 1 has not found rank 0 of job nobody in 1 s at 127\.0\.0\.1, ports 2"):
        meet(here, 1.0)


def test_ranks_that_do_not_come_are_counted():
    with pytest.raises(RunError, match=r"1 of 3 ranks have arrived at 127\.0\.0\.1 in 1 s"):
        meet(RankEnvironment(world_size=3, job="lonely"), 1.0)


def test_no_free_port_is_said():
    with ExitStack() as stack:
        for port in set(candidate_ports("crowded")):
            stack.enter_context(listening(port))
        with pytest.raises(RunError, match=r"none of the 16 ports .* is free .* Set MASTER_ADDR and MASTER_PORT"):
            meet(RankEnvironment(world_size=2, job="crowded"), 1.0)


def test_the_lock_of_an_earlier_start_of_the_job_does_not_end_this_one(tmp_path, monkeypatch, capfd):
    """A node that is lost may keep its lock on a network file system."""
    for name, value in (SLURM | {"SLURM_PROCID": "0"}).items():
        monkeypatch.setenv(name, value)
    with claimed(tmp_path, here=True):
        with pytest.raises(InputError, match=r"in use by process \d+ on .*, Slurm job c\.\d+, start 1: two jobs"):
            claimed(tmp_path, here=True).__enter__()
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with claimed(tmp_path, here=True):
            assert "held by an earlier start of this job" in capfd.readouterr().err
            assert (tmp_path / ".lock").read_text().endswith(f"Slurm job c.{os.getpid()}, start 2\n")
        monkeypatch.setenv("SLURM_JOB_ID", "1")
        with pytest.raises(InputError, match="two jobs would mix"):
            claimed(tmp_path, here=True).__enter__()
