"""Ranks of a Slurm job meet, whoever holds the ports they had in mind."""

import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from torch.distributed import TCPStore

import forks
from faconv_hpc.cli import app
from faconv_hpc.errors import InputError, LostRankError, RunError, TryAgainError
from faconv_hpc.launch import slurm
from faconv_hpc.spatial import environment, meeting
from faconv_hpc.spatial.environment import RankEnvironment, first_node
from faconv_hpc.spatial.failure import MARGIN_S
from faconv_hpc.spatial.meeting import _asked, _opened, candidate_ports, meet
from faconv_hpc.training.faults import claim
from faconv_hpc.training.faults.claim import claimed
from faconv_hpc.training.faults.signals import StopRequest
from runs import make_store, write_config
from studies import record, write_records

SLURM = {"SLURM_CLUSTER_NAME": "c", "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
JOB = f"c.{os.getpid()}.0.0"
MEET = """
from faconv_hpc.spatial.environment import RankEnvironment
from faconv_hpc.spatial.meeting import meet
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


LIMITS = """
import torch
from torch.distributed import distributed_c10d
from faconv_hpc import FAConvLSTMNetwork, ProcessMesh
from faconv_hpc.config import TrainingConfig
from faconv_hpc.training.engine import Engine
mesh = ProcessMesh.start(2, 1, 2, timeout_s=77.0)
network = FAConvLSTMNetwork(3, 2, 8, 2, embedding_channels=16, coarse_shape=(2, 2))
Engine(network, mesh, TrainingConfig(steps=1, warmup_steps=0))
groups = list(distributed_c10d._world.pg_map)
limits = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}
print(len(groups), limits)  # ours, and DeepSpeed's
mesh.stop()
"""


def test_collectives_of_every_group_end_when_the_jobs_do():
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(environment.free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "forks", LIMITS]
    options = {"stdout": subprocess.PIPE, "text": True, "cwd": Path(__file__).parent}
    ranks = [
        forks.Popen(command, env=os.environ | port | {"RANK": str(rank), "WORLD_SIZE": "4"}, **options)
        for rank in range(4)
    ]
    assert {rank.communicate(timeout=120)[0] for rank in ranks} == {f"3 {{{77.0 + MARGIN_S}}}\n"}


AT_SCALE = """
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from faconv_hpc import ProcessMesh
made, new_group = [], dist.new_group
def counted(ranks, **options):
    made.append(len(ranks))
    return new_group(ranks, **options)
dist.new_group = counted
dist.init_process_group("fake", store=FakeStore(), rank=2500, world_size=4096)
mesh = ProcessMesh.arrange(range(4096), 4, 128, 8)
print(made, [dist.get_world_size(mesh.axis_groups[axis]) for axis in ("lat", "lon")])
"""


def test_a_rank_makes_the_groups_that_it_is_in_and_no_other():
    """Of 4,096 ranks, on fake groups: every group once was a split of all ranks, 549 of them."""
    ran = forks.run([sys.executable, "-m", "forks", AT_SCALE], cwd=Path(__file__).parent, timeout=120)
    assert ran.stdout == "[1024, 8, 128] [128, 8]\n", ran.stderr


def test_rank_0_may_hold_the_connections_of_all_or_says_so(monkeypatch):
    limits = {}
    monkeypatch.setattr(meeting.resource, "getrlimit", lambda which: (1024, 4096))
    monkeypatch.setattr(meeting.resource, "setrlimit", lambda which, both: limits.update({which: both}))
    meeting._allow_connections(200)
    assert limits == {}
    meeting._allow_connections(1000)
    assert limits == {meeting.resource.RLIMIT_NOFILE: (2500, 4096)}
    with pytest.raises(InputError, match=r"rank 0 of 4096 ranks .* 8692 open files .* allows 4096 \(ulimit -Hn\)"):
        meeting._allow_connections(4096)


def test_ranks_meet_although_others_hold_their_first_ports():
    ports = candidate_ports(JOB)
    assert len(set(ports)) > 10 and all(20000 <= port < 32000 for port in ports)
    with ExitStack() as stack:
        stack.enter_context(listening(ports[0]))
        older = TCPStore("127.0.0.1", ports[1], is_master=True, wait_for_workers=False)
        stack.enter_context(_opened("another job", ports[2]))
        variables = os.environ | SLURM | {"SLURM_STEP_NODELIST": "localhost"}
        ranks = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", MEET],
                    env=variables | {"SLURM_PROCID": str(rank), "MASTER_ADDR": "127.0.0.1"},
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in (1, 0)
        ]
        answers = [rank.communicate(timeout=120)[0] for rank in ranks]
        del older
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


def test_only_rank_0_counts_a_start_of_a_slurm_job(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    for rank in range(3):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        assert RankEnvironment.is_first_of_slurm() == (rank == 0)


@pytest.mark.parametrize("said", ["other 4711\n", "220 mail.example\n", "4711\n", "\n"])
def test_only_the_door_of_this_job_is_believed(said):
    """Whatever else listens at one of its ports, and answers."""

    class Answer(socketserver.StreamRequestHandler):
        def handle(self):
            self.rfile.readline()
            self.wfile.write(said.encode())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        assert _asked(RankEnvironment(rank=1, world_size=2, job="mine"), server.server_address[1]) is None
        server.shutdown()
    with _opened("mine", 4711):
        found = [_asked(RankEnvironment(rank=1, world_size=2, job="mine"), port) for port in candidate_ports("mine")]
    assert 4711 in found


def test_no_rank_0_is_said_with_where_it_was_looked_for():
    here = RankEnvironment(rank=1, world_size=2, job="nobody")
    with pytest.raises(RunError, match=r"rank 1 has not found rank 0 of job nobody in 1 s at 127\.0\.0\.1, ports 2"):
        meet(here, 1.0)


def test_no_rank_leaves_before_all_are_there():
    """Or srun would end the late ones by a signal, which counts for more than an exit code."""
    code = "import time; from faconv_hpc.spatial.environment import RankEnvironment as E\n"
    code += "from faconv_hpc.spatial.meeting import meet\nkept = meet(E({}, 3, job='late-" + JOB + "'), 60.0)\n"
    code += "print(time.time()); time.sleep(2)"
    with ExitStack() as stack:
        ranks = []
        for rank in (0, 1, 2):
            if rank == 2:
                time.sleep(8.0)
                assert [one.poll() for one in ranks] == [None, None]
                began = time.time()
            command = [sys.executable, "-c", code.format(rank)]
            ranks.append(stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)))
        met = [float(rank.communicate(timeout=120)[0]) for rank in ranks]
    assert min(met) > began


def test_ranks_that_do_not_come_are_counted():
    with pytest.raises(RunError, match=r"1 of 3 ranks have arrived at 127\.0\.0\.1 in 1 s"):
        meet(RankEnvironment(world_size=3, job="lonely"), 1.0)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("address", ["nowhere.invalid", "127.0.0.1"])
def test_a_place_where_nobody_can_meet_is_told_and_tried_again(monkeypatch, rank, address):
    """A name without an address; a port at which somebody else listens, or nobody."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if rank == 0:
            other.listen()
        environment = RankEnvironment(rank, 2, rank, address, other.getsockname()[1])
        for name, value in (environment.variables() | {"DS_ACCELERATOR": "cpu"}).items():
            monkeypatch.setenv(name, value)  # as it does, and restored
        with pytest.raises(
            LostRankError, match=rf"rank {rank} of 2 cannot meet the others at {address}, port \d+ \(.*MAS"
        ):
            meet(environment, 2.0)


def test_no_free_port_is_said():
    with ExitStack() as stack:
        for port in set(candidate_ports("crowded")):
            stack.enter_context(listening(port))
        with pytest.raises(TryAgainError, match=r"none of the 16 ports .* is free .* Set MASTER_ADDR and MASTER_PORT"):
            meet(RankEnvironment(world_size=2, job="crowded"), 1.0)


@pytest.fixture
def first_rank(monkeypatch):
    """Rank 0 of a Slurm job that has met the others."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")  # so that they are taken away again
        monkeypatch.delenv(name)
    for name, value in (SLURM | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}).items():
        monkeypatch.setenv(name, value)
    meet(RankEnvironment.read(), 5.0)
    return monkeypatch


def claim_while_it_grows(run_dir):
    """A third start, while the second one does steps."""
    write_records(run_dir, [record(1, seconds=0.1)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_RESTART_COUNT", "2")
        patch.setattr(claim.time, "sleep", lambda seconds: write_records(run_dir, [record(1, 0.1), record(2, 0.1)]))
        patch.setattr(claim, "EARLIER_START_S", 0.01)
        claimed(run_dir, here=True).__enter__()


def test_the_lock_of_an_earlier_start_of_the_job_does_not_end_this_one(tmp_path, first_rank, capfd):
    """A node that is lost may keep its lock on a network file system."""
    first_rank.setattr(claim, "EARLIER_START_S", 2)
    with claimed(tmp_path, here=True):
        with pytest.raises(InputError, match=r"in use by process \d+ on .*, Slurm job c\.\d+, start 1: two jobs"):
            claimed(tmp_path, here=True).__enter__()
        first_rank.setenv("SLURM_RESTART_COUNT", "1")
        with claimed(tmp_path, here=True):
            assert "held by an earlier start of this job" in capfd.readouterr().err
            assert (tmp_path / ".lock").read_text().endswith(f"Slurm job c.{os.getpid()}, start 2\n")
        with pytest.raises(LostRankError, match=r"start 2, which is an earlier start of this job, still trains in"):
            claim_while_it_grows(tmp_path)
        first_rank.setenv("SLURM_JOB_ID", "1")
        with pytest.raises(InputError, match="two jobs would mix"):
            claimed(tmp_path, here=True).__enter__()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("n[1-4]-ib", "n1-ib"),
        ("a1,a2", "a1"),
        ("login,n[1-2]", "login"),
    ],
)
def test_the_first_node_of_a_list_without_slurms_client(monkeypatch, nodes, first):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    assert first_node(nodes) == first


def test_a_controller_that_does_not_answer_ends_no_rank(monkeypatch):
    def never(command, **options):
        raise subprocess.TimeoutExpired(command, 30)

    monkeypatch.setattr(environment.shutil, "which", lambda name: name)
    monkeypatch.setattr(environment.subprocess, "run", never)
    assert first_node("n[1-4]") == "n1"


def test_the_log_is_followed_while_the_controller_restarts(tmp_path, monkeypatch, capsys):
    answers = [subprocess.SubprocessError("down"), ("PENDING", 0), ("RUNNING", 0), subprocess.SubprocessError("down")]
    answers.append(("FAILED", 2))

    def state(job):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return slurm.JobState(answer[0], "None", 1, answer[1])

    monkeypatch.setattr(slurm, "job_state", state)
    monkeypatch.setattr(slurm, "POLL_S", 0.01)
    (tmp_path / "log").write_text("step 1\n")
    assert slurm.follow("7", tmp_path / "log") == 2
    shown = capsys.readouterr()
    assert shown.out == "step 1\n" and "job 7: failed, requeued 1 time(s), exit code 2" in shown.err
    assert shown.err.startswith("job 7: Slurm does not say how it does (down); asking again\n")
    monkeypatch.setattr(slurm, "job_state", lambda job: None)
    assert slurm.follow("7", tmp_path / "log") == 1
    assert "Slurm no longer knows it" in capsys.readouterr().err


def test_starts_whose_ranks_never_meet_are_counted_and_end(tmp_path):
    """A job that is requeued whenever a rank is lost must not be for ever."""
    training = {"timeout_s": 10, "give_up_after": 2}
    directory = tmp_path / "timed out"  # what a message names must not be taken for what it says
    config = write_config(directory, make_store(tmp_path / "waves"), mesh={"lon": 2}, training=training)
    command = [sys.executable, "-m", "faconv_hpc", "train", str(config)]
    variables = os.environ | SLURM | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    (directory / "run").mkdir()
    (directory / "run" / "starts.json").write_text('{"starts": 1}')
    alone = forks.run(command, env=variables | {"SLURM_PROCID": "0"}, timeout=120)
    assert alone.returncode == 75 and "1 of 2 ranks have arrived" in alone.stderr, alone.stderr
    ranks = [
        forks.Popen(command, env=variables | {"SLURM_PROCID": rank}, stderr=subprocess.PIPE, text=True) for rank in "10"
    ]
    told = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [93, 93], told
    assert sum(text.count("2 starts in a row of the run") for text in told) == 1


def test_a_rank_that_was_told_to_leave_while_it_met_the_others_leaves_in_silence(monkeypatch, capsys):
    """Before it knew that it cannot meet them: the one that knew first has spoken."""

    def meets():
        with StopRequest({signal.SIGTERM: 60.0}):
            os.kill(os.getpid(), signal.SIGTERM)
            raise LostRankError("rank 1 of 2 cannot meet the others")

    monkeypatch.setattr(app, "app", meets)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits to be ended"))
    for name, value in RankEnvironment(1, 2, 1).variables().items():
        monkeypatch.setenv(name, value)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(SystemExit, match="75"):
        app.main()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert capsys.readouterr().err == ""


def test_ranks_that_cannot_meet_end_with_75_and_one_message_a_node(tmp_path):
    config = write_config(tmp_path, make_store(tmp_path / "waves"), mesh={"lon": 2}, training={"timeout_s": 10})
    command = [sys.executable, "-m", "faconv_hpc", "train", str(config)]
    variables = os.environ | {"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "20001", "OMP_NUM_THREADS": "1"}
    ranks = [
        forks.Popen(
            command,
            env=variables | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    told = [ranks[0].communicate(timeout=120)[1]]
    time.sleep(1.0)
    assert ranks[1].poll() is None  # it waits for a launcher to end it, as srun does, or has yet to learn the same
    ranks[1].terminate()
    told.append(ranks[1].communicate(timeout=120)[1])
    assert [rank.returncode for rank in ranks] == [75, 75], told
    assert [text.count("faconv: failed") for text in told] == [1, 0], told
    assert "rank 0 of 2 cannot meet the others at nowhere.invalid, port 20001" in told[0]
