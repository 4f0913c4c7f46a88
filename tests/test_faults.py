"""Signals, silent ranks, and numbers that are no numbers: whole processes, and ranks from the pool."""

import contextlib
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

import forks
from faconv_hpc.errors import (
    EXIT_FAILED,
    EXIT_NO_PROGRESS,
    EXIT_STOPPED,
    InputError,
    LostRankError,
    NoProgressError,
    RunError,
    describe,
    exit_code_of,
)
from faconv_hpc.files import write_durably
from faconv_hpc.observe import SAVING, Activity
from faconv_hpc.spatial import failure
from faconv_hpc.spatial.environment import RankEnvironment, free_port
from faconv_hpc.spatial.heartbeat import BEAT_S, Beat, Heartbeats, pace
from faconv_hpc.training import checkpoint
from faconv_hpc.training import trainer as trainer_module
from faconv_hpc.training.faults.claim import claimed
from faconv_hpc.training.faults.health import MicroBatch
from faconv_hpc.training.faults.signals import StepEnd, StopRequest, check_time_limit
from faconv_hpc.training.faults.starts import count_start
from faconv_hpc.training.records import STEPS_FILE, read_records
from faconv_hpc.training.shards import checkpoints_in, whole_checkpoints
from faconv_hpc.training.trainer import Trainer, train
from ranks import Layout, run_on_ranks
from runs import make_store, small_config, write_config
from test_checkpoint import assert_same_state
from test_cli import faconv, faconv_after, messages, ranks_of

TWO = Layout(1, 1, 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "waves")


class PlainStore(dict):
    """A job's store without a job."""

    def check(self, keys):
        return all(key in self for key in keys)

    def get(self, key):
        return self[key].encode()

    def set(self, key, value):
        self[key] = value


# Signals


def sent(directory, store, number, ranks, at_step, training=None, layout=TWO, save_s=0.0):
    """Trains on the pool, ``number`` sent to some ranks in one step; exit codes, and what the first rank printed."""
    config = small_config(directory, store, mesh={"lon": 2}, training=training or {})

    def check(mesh):
        step, write = Trainer._step, checkpoint.write_shard

        def slow(*arguments):
            time.sleep(save_s * mesh.rank)
            return write(*arguments)

        def signalled(self, now):
            if now == at_step and mesh.rank in ranks:
                os.kill(os.getpid(), number)
            return step(self, now)

        Trainer._step, checkpoint.write_shard = signalled, slow
        told = io.StringIO()
        try:
            with contextlib.redirect_stderr(told):
                return train(config, mesh), told.getvalue()
        finally:
            Trainer._step, checkpoint.write_shard = step, write

    answers = run_on_ranks(layout, check)
    return [code for code, _ in answers], answers[0][1]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM], ids=lambda one: one.name)
def test_a_signal_on_one_rank_saves_on_all_at_one_step_and_leaves(tmp_path, store, number):
    codes, told = sent(tmp_path / "cut", store, number, {1}, 3)
    assert codes == [EXIT_STOPPED] * 2
    assert f"stopped by {number.name} after step 3; the checkpoint of step 3 is saved" in told
    assert [one.step for one in checkpoints_in(tmp_path / "cut" / "run")] == [3]
    assert not (tmp_path / "cut" / "run" / "starts.json").exists()  # an orderly end
    assert sent(tmp_path / "cut", store, number, {}, 0)[0] == [0, 0]
    assert sent(tmp_path / "whole", store, number, {}, 0)[0] == [0, 0]
    assert_same_state(*(checkpoints_in(tmp_path / name / "run")[-1] for name in ("cut", "whole")))
    lines = [[record.loss for record in read_records(tmp_path / name / "run")] for name in ("cut", "whole")]
    assert lines[0] == lines[1] and len(lines[0]) == 6


@pytest.mark.parametrize("background", [False, True])
def test_a_save_longer_than_the_grace_is_not_begun(tmp_path, store, background):
    """Known from the save before, on the slowest rank."""
    training = {"checkpoint_every": 2, "term_grace_s": 1.4, "save_in_background": background, "steps": 12}
    codes, told = sent(tmp_path, store, signal.SIGTERM, {0}, 7, training, save_s=1.0)
    assert codes == [EXIT_STOPPED] * 2
    assert re.search(r"after step 7; the checkpoint of step 6 is saved \(a save takes [1-9]\d* s", told)
    assert [one.step for one in checkpoints_in(tmp_path / "run")] == [2, 4, 6]


def test_a_time_limit_is_met_before_it_comes(tmp_path, store):
    """Without any signal: what a step and a save take is known."""

    def timed(directory, lefts, first_step=1):
        config = small_config(directory, store, mesh={"lon": 2}, training={"checkpoint_every": 2, "steps": 6})

        def check(mesh):
            numbers = iter(lefts)
            before = trainer_module.job_left_s
            trainer_module.job_left_s = lambda: next(numbers) if mesh.rank else 1000.0
            told = io.StringIO()
            try:
                with contextlib.redirect_stderr(told):
                    return train(config, mesh), told.getvalue()
            finally:
                trainer_module.job_left_s = before

        answers = run_on_ranks(TWO, check)
        return [code for code, _ in answers], answers[0][1]

    codes, told = timed(tmp_path / "cut", [900.0, 800.0, 0.5])
    assert codes == [EXIT_STOPPED] * 2
    assert re.search(r"stopped by the time limit, \d s ahead, after step 3; the checkpoint of step 3 is saved", told)
    assert timed(tmp_path / "cut", [1000.0] * 3)[0] == [0, 0]
    assert timed(tmp_path / "whole", [1000.0] * 6)[0] == [0, 0]
    assert_same_state(*(checkpoints_in(tmp_path / name / "run")[-1] for name in ("cut", "whole")))


@pytest.mark.parametrize("grace_s", [2.0, 60.0])
def test_a_step_of_many_micro_batches_is_given_up_if_its_end_would_come_too_late(tmp_path, store, grace_s):
    """Nothing is lost but its own part: what goes on is what would have been."""
    training = {"accumulation": 4, "steps": 4, "checkpoint_every": 0, "term_grace_s": grace_s}

    def trained(directory, at_step):
        config = small_config(directory, store, mesh={"lon": 2}, training=training)

        def check(mesh):
            backward, seen = Trainer._backward, []

            def slow(self, *given):
                seen.append(self._activity.step)
                if at_step and self._activity.step >= at_step - 1:
                    time.sleep(0.8)
                    if seen.count(at_step) == 2 and mesh.rank == 1:
                        os.kill(os.getpid(), signal.SIGTERM)
                return backward(self, *given)

            Trainer._backward = slow
            told = io.StringIO()
            try:
                with contextlib.redirect_stderr(told):
                    return train(config, mesh), told.getvalue(), seen.count(at_step)
            finally:
                Trainer._backward = backward

        answers = run_on_ranks(TWO, check)
        return {code for code, *_ in answers}, answers[0][1], answers[0][2]

    codes, told, micros = trained(tmp_path / "cut", 3)
    assert codes == {EXIT_STOPPED} and micros == (2 if grace_s == 2.0 else 4)
    last = 2 if grace_s == 2.0 else 3
    assert f"stopped by SIGTERM after step {last}; the checkpoint of step {last} is saved" in told
    assert trained(tmp_path / "cut", 0)[0] == trained(tmp_path / "whole", 0)[0] == {0}
    assert_same_state(*(checkpoints_in(tmp_path / name / "run")[-1] for name in ("cut", "whole")))
    assert [record.step for record in read_records(tmp_path / "cut" / "run")] == [1, 2, 3, 4]


def test_a_step_and_a_save_must_fit_the_time_that_is_left():
    end = StepEnd(0, float("inf"), save_s=10.0, written=True, step_s=20.0, job_left_s=51.0)
    assert not end.time_is_up and replace(end, job_left_s=49.0).time_is_up
    assert replace(end, written=False).time_is_up and not replace(end, job_left_s=float("inf")).time_is_up
    assert not end.comes_too_late and replace(end, job_left_s=49.0).comes_too_late  # in the middle of a step, too
    asked = replace(end, signal=signal.SIGTERM, job_left_s=float("inf"))
    assert replace(asked, left_s=44.0).comes_too_late and not replace(asked, left_s=46.0).comes_too_late


def test_a_time_limit_that_leaves_no_step_is_told_and_not_requeued(monkeypatch):
    for name, value in (("SLURM_JOB_START_TIME", "1000"), ("SLURM_JOB_END_TIME", "1100")):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        InputError, match=r"SIGUSR1 came before the first step: the job has 100 s in all.*120 of them.*--signal"
    ):
        check_time_limit(signal.SIGUSR1, 120.0)
    check_time_limit(signal.SIGTERM, 120.0)
    check_time_limit(signal.SIGUSR1, 99.0)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "Unknown")
    check_time_limit(signal.SIGUSR1, 120.0)


def test_a_start_that_slurm_ends_while_it_imports_does_not_count(tmp_path, store):
    """As `scontrol requeue` does; it was counted before its ranks met."""
    config = write_config(tmp_path, store, mesh={"lon": 2}, training={"steps": 1000})
    command = [sys.executable, "-m", "faconv_hpc", "train", str(config)]
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    variables = os.environ | job | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    options = {"stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(command, env=variables | {"SLURM_PROCID": rank}, **options) for rank in "01"]
    deadline = time.monotonic() + 60
    starts = tmp_path / "run" / "starts.json"
    while not (starts.exists() and all(catches(rank.pid, signal.SIGTERM) for rank in ranks)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert json.loads(starts.read_text())["starts"] == 1
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    told = [rank.communicate(timeout=90)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [EXIT_STOPPED] * 2, told
    assert "stopped by SIGTERM after step 0; there is no checkpoint" in told[0]
    assert not starts.exists()


def catches(pid, number):
    """Whether a process has a handler for a signal."""
    (mask,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("background", [False, True])
def test_a_signal_in_the_last_step_changes_nothing(tmp_path, store, background):
    assert sent(tmp_path, store, signal.SIGUSR1, {0, 1}, 6, {"save_in_background": background})[0] == [0, 0]
    assert [one.step for one in whole_checkpoints(tmp_path / "run")] == [6]


def test_what_a_save_takes_is_known_at_the_next_start(tmp_path, store):
    common = {"checkpoint_every": 2, "term_grace_s": 1.4, "final_learning_rate_share": 1.0}  # so that it can go on
    assert sent(tmp_path, store, signal.SIGTERM, {0}, 99, common | {"steps": 4}, save_s=1.0)[0] == [0, 0]
    codes, told = sent(tmp_path, store, signal.SIGTERM, {0}, 5, common | {"steps": 8}, save_s=1.0)
    assert codes == [EXIT_STOPPED] * 2
    assert re.search(r"after step 5; the checkpoint of step 4 is saved \(a save takes [1-9]\d* s", told)


def test_an_interrupt_that_python_loses_while_it_starts_is_followed():
    """Raised in a callback of the import machinery it is ignored: the run trained on."""
    with StopRequest({signal.SIGTERM: 5.0}) as stop:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        deadline = time.monotonic() + 5
        while not stop._came_early and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            stop.hold_interrupts(0, speaks=False)
    with StopRequest({signal.SIGTERM: 5.0}) as stop:
        stop.hold_interrupts(0, speaks=False)  # none came


def test_what_follows_a_ctrl_c_at_once_is_its_echo():
    """`timeout` passes on what the terminal has sent to all: the step was ended without a checkpoint."""
    with StopRequest({signal.SIGTERM: 5.0}) as stop:
        stop.hold_interrupts(3, speaks=False)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.0)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt, match=r"came twice; what was done since the checkpoint of step 3"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)


def test_the_grace_that_ends_first_counts():
    with StopRequest({signal.SIGUSR1: 100.0, signal.SIGTERM: 5.0}) as stop:
        assert stop.number == 0 and stop.left_s == float("inf")
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.number == signal.SIGUSR1 and 95 < stop.left_s <= 100
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM and 4 < stop.left_s <= 5
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.number == signal.SIGTERM and 4 < stop.left_s <= 5 and stop.came == {signal.SIGUSR1, signal.SIGTERM}
    assert StepEnd(15, 5.0, 3.0, True).may_save and not StepEnd(15, 5.0, 3.5, True).may_save


def launched(config, ranks=2, start=forks.Popen):
    """``faconv train --ranks 2`` as a user starts it, still running."""
    command = [sys.executable, "-m", "faconv_hpc", "train", str(config), "--ranks", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_step(run_dir, step, process, timeout_s=90):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        path = run_dir / STEPS_FILE
        if path.exists() and path.read_text().count("\n") >= step:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1])


def test_sigterm_to_the_launcher_saves_and_the_same_command_goes_on(tmp_path, store):
    config = write_config(tmp_path, store, mesh={"lon": 2}, training={"steps": 1000})
    process = launched(config)
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, told
    stopped_after = int(re.search(r"stopped by SIGTERM after step (\d+); the checkpoint of step \1 is saved", told)[1])
    again = faconv("train", config, "--ranks", 2, "--set", f"training.steps={stopped_after + 2}")
    assert again.returncode == 0, again.stderr
    assert [record.step for record in read_records(tmp_path / "run")] == list(range(1, stopped_after + 3))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stops_answering_is_named_with_its_step_and_what_it_did(tmp_path, store, rank):
    config = write_config(tmp_path, store, mesh={"lon": 2}, training={"steps": 100000, "timeout_s": 10})
    process = launched(config)
    wait_for_step(tmp_path / "run", 3, process)
    time.sleep(3 * BEAT_S)  # so that the ranks have said that they are training
    stopped = ranks_of(process)[rank]
    began = time.monotonic()
    os.kill(stopped, signal.SIGSTOP)
    _, told = process.communicate(timeout=80)
    assert time.monotonic() - began < 70
    assert process.returncode == EXIT_STOPPED
    first = messages(subprocess.CompletedProcess([], 1, "", told))[0]
    assert re.search(rf"rank {rank}\b.* has not answered for 1\d s \(training\.timeout_s is 10\)", first), told
    assert re.search(r" in step \d+, [a-z]", first), told
    assert "the same command again" in first


HANGS = """
import sys, time
from faconv_hpc.cli.app import main
from faconv_hpc.training.trainer import Trainer
forward, sys.argv = Trainer._backward, ["faconv", "train", sys.argv[2]]
def hanging(self, *arguments):
    if self._mesh.rank == 1 and self._mesh.activity.step == 3:
        time.sleep(1000)
    return forward(self, *arguments)
Trainer._backward = hanging
main()
"""


@pytest.mark.parametrize("mesh", [{"replicas": 2}, {"lon": 2}], ids=["in DeepSpeed's group", "in ours"])
def test_a_rank_that_hangs_while_its_heart_beats_ends_all_after_the_time_out(tmp_path, store, mesh):
    config = write_config(tmp_path, store, mesh=mesh, training={"timeout_s": 10})
    ranks = RankEnvironment(world_size=2, port=free_port()).variables() | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "forks", HANGS, str(config)]
    options = {"stderr": subprocess.PIPE, "text": True, "cwd": Path(__file__).parent}
    started = [
        forks.Popen(command, env=os.environ | ranks | {"RANK": rank, "LOCAL_RANK": rank}, **options) for rank in "01"
    ]
    told = [rank.communicate(timeout=80)[1] for rank in started]
    assert [rank.returncode for rank in started] == [EXIT_STOPPED] * 2, told
    (said,) = [line for text in told for line in text.splitlines() if "faconv: failed" in line]
    assert re.search(r"ran out of time \(training\.timeout_s is 10\): rank 1 is furthest behind: in step 3, ", said), (
        said
    )


def test_who_is_furthest_behind_is_to_blame():
    """Beats go on, but say the same for longest; who only waits for others has not fallen behind of its own."""

    store, activity = PlainStore(), Activity()
    beats = Heartbeats(store, 0, 3, 600.0, activity)
    assert beats.blame() == "no rank has said what it was doing"
    beats_said = [Beat(9, 12, 600.0, "gather", True), Beat(9, 12, 599.0, "reading data"), Beat(9, 12, 580.1, "forward")]
    for rank, beat in enumerate(beats_said):
        store.set(f"beat/{rank}", str(beat))
    assert beats.blame() == "rank 1 is furthest behind: in step 12, reading data, for 599 s"
    store.set("beat/1", str(Beat(9, 12, 599.0, "pad", True)))
    assert beats.blame() == "rank 2 is furthest behind: in step 12, forward, for 580 s"
    store.set("beat/2", str(Beat(9, 11, 1.0, "backward")))
    assert beats.blame().startswith("rank 2 is furthest behind: in step 11, backward")
    store.set("beat/0", str(Beat(9, 11, 2.0, "pad", True)))
    assert beats.blame().startswith("rank 2 "), "of one step, who waits is not to blame"
    assert Beat.parse(str(Beat(3, 0, 0.5, "adjoint of pad"))).where == "before the first step, adjoint of pad"
    assert Beat.parse(str(Beat(3, 0, 0.5, "adjoint of pad", True))) == Beat(3, 0, 0.5, "adjoint of pad", True)


def test_of_thousands_of_ranks_one_asks_who_is_to_blame_and_all_ask_more_rarely(monkeypatch, capsys):
    """Every rank's collective runs out of time at once; all beats read by all ranks would be their number squared."""
    store, asked = HashStore(), []
    monkeypatch.setattr(failure, "POLL_S", 0.01)
    monkeypatch.setattr(failure, "_in_main_thread", lambda: False)  # signals are left alone
    monkeypatch.setattr(Heartbeats, "blame", lambda beats: asked.append(beats) or "rank 7 is furthest behind")

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(failure, "leave", leave)
    watches = [failure.FailureWatch(store, rank, 4) for rank in range(4)]
    for watch in watches:
        watch.stop()
    for watch in watches:
        with pytest.raises(SystemExit, match=str(EXIT_STOPPED)):
            watch.end(RuntimeError("Timed out waiting 600 s for recv"))
    assert len(asked) == 1 and capsys.readouterr().err.count("rank 7 is furthest behind") == 1
    assert failure.POLL_S * pace(4096) == 0.01 * 4.096 and pace(500) == 1


def test_a_rank_that_cannot_join_ends_the_others_at_once(tmp_path, store):
    """An interface that is not there, on one rank only."""
    elsewhere = (
        "import os\n"
        "from faconv_hpc.spatial import mesh\n"
        "join = mesh._join\n"
        "def joins(environment, *more):\n"
        "    if environment.rank == 1: os.environ['GLOO_SOCKET_IFNAME'] = 'ib77'\n"
        "    join(environment, *more)\n"
        "mesh._join = joins\n"
    )
    config = write_config(tmp_path, store, mesh={"lon": 2})
    began = time.monotonic()
    process = faconv_after(elsewhere, "train", config, "--ranks", 2)
    assert process.returncode == EXIT_FAILED and time.monotonic() - began < 60
    (told,) = messages(process)
    assert told.startswith("faconv: failed (rank 1)") and "ib77" in told


def test_the_first_rank_stopped_and_another_killed_leaves_nobody_waiting(tmp_path, store):
    """Whoever fails asks the store who may speak; its host does not answer."""
    config = write_config(tmp_path, store, mesh={"lon": 3}, training={"steps": 100000, "timeout_s": 10})
    process = launched(config, ranks=3)
    wait_for_step(tmp_path / "run", 3, process)
    first, second, third = ranks_of(process)
    os.kill(first, signal.SIGSTOP)
    os.kill(third, signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED and "rank 2 was ended by SIGKILL" in told
    assert not Path(f"/proc/{second}").exists()


def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(failure, "ANSWER_S", 0.2)
    assert failure._asked(lambda: "yes") == "yes"
    with pytest.raises(RuntimeError, match=r"the store has not answered within 0\.2 s"):
        failure._asked(lambda: time.sleep(5))


def test_a_rank_that_waits_for_files_for_too_long_ends_the_job(monkeypatch):
    """By itself: nobody else can."""
    code = f"""
import time
from torch.distributed import HashStore
from faconv_hpc.spatial.failure import FailureWatch
watch = FailureWatch(HashStore(), 0, 1, timeout_s=10.0)
watch.activity.step, watch.activity.since, watch.activity.doing = 7, time.monotonic() - 100, {SAVING!r}
time.sleep(30)
"""
    ended = forks.run([sys.executable, "-m", "forks", code], cwd=Path(__file__).parent, timeout=60)
    assert ended.returncode == EXIT_STOPPED
    assert "failed (rank 0): this rank has been saving a checkpoint in step 7 for 10" in ended.stderr
    watch = failure.FailureWatch(PlainStore(), 0, 1, timeout_s=10.0)
    try:
        watch.activity.step, watch.activity.since = 7, time.monotonic() - 100
        watch.activity.doing = "backward"
        assert watch._stuck() is None  # a collective's own time-out sees to that
        watch.activity.doing = SAVING
        assert re.search(r"saving a checkpoint in step 7 for 100 s \(training\.timeout_s is 10\)", watch._stuck())
        watch.activity.since = time.monotonic()
        assert watch._stuck() is None
    finally:
        watch.stop()


def test_restarts_without_progress_end_with_the_code_that_is_not_requeued(tmp_path, store):
    config = write_config(tmp_path, store, training={"steps": 50})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "starts.json").write_text('{"starts": 3}')
    process = faconv("train", config)
    assert process.returncode == EXIT_NO_PROGRESS
    assert "3 starts in a row" in process.stderr and "Traceback" not in process.stderr


@pytest.mark.parametrize("ranks_met", [False, True])
def test_what_the_user_did_wrong_is_no_start(tmp_path, store, ranks_met):
    """Not when the start was counted before the ranks met, and not beside another job that trains there."""
    file = tmp_path / "run" / "starts.json"
    elsewhere = small_config(tmp_path, tmp_path / "nowhere")
    here = small_config(tmp_path, store)
    file.parent.mkdir()
    for config, message in ((elsewhere, "nowhere"), (here, "in use by process 1")):
        file.write_text('{"starts": 1}')

        def check(mesh, config=config):
            if ranks_met:
                count_start(config)
            with claimed(here.run_dir, here=True):
                (here.run_dir / ".lock").write_text("process 1")
                return train(config, mesh, counted=ranks_met)

        with pytest.raises(AssertionError, match=message):
            run_on_ranks(Layout(1, 1, 1), check)
        assert json.loads(file.read_text())["starts"] == 1


def test_errors_of_ours_are_not_taken_for_those_of_a_collective():
    of_torch = RuntimeError("[gloo] Timed out waiting 30000ms for recv operation")
    lost = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:3")
    assert failure._is_timeout(of_torch) and failure._is_lost_peer(lost)
    for error in (RunError, LostRankError, NoProgressError):
        ours = error("the run in runs/timeout_1 (Connection timed out); Connection reset by peer")
        assert not failure._is_timeout(ours) and not failure._is_lost_peer(ours)


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("CUDA error: uncorrectable ECC error encountered", 75),
        ("CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA`", 75),
        ("NCCL error in: ../NCCLUtils.cpp:94, unhandled cuda error", 75),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", 1),
        ("NCCL error: out of memory", 1),
        ("CUDA error: device-side assert triggered", 1),
        ("The size of tensor a (3) must match the size of tensor b (4)", 1),
    ],
)
def test_what_another_node_may_do_is_put_back_into_the_queue(said, code):
    """`training.give_up_after` bounds it. Of a GPU; no such error could be had here."""
    code_of_rank = f"""
from torch.distributed import HashStore
from faconv_hpc.spatial.failure import FailureWatch
with FailureWatch(HashStore(), 0).guarded():
    raise RuntimeError({said!r})
"""
    ended = forks.run([sys.executable, "-m", "forks", code_of_rank], cwd=Path(__file__).parent, timeout=60)
    assert ended.returncode == code, ended.stderr
    assert ("Another node may do it: start the same command again" in ended.stderr) == (code == 75)
    assert ("Traceback" in ended.stderr) == (code == 1)


def test_a_file_system_that_is_away_is_no_mistake_of_ours():
    error = OSError(errno.ESTALE, "Stale file handle", "runs/my_run/steps.jsonl")
    assert exit_code_of(error) == EXIT_STOPPED and exit_code_of(OSError(errno.ENOENT, "No such file")) == 1
    assert "steps.jsonl'. The file system is away, or fails" in describe(error) and "Traceback" not in describe(error)


@pytest.mark.parametrize("writes", ["a record", "a checkpoint"])
def test_an_older_start_ends_before_it_writes_beside_a_newer_one(tmp_path, store, writes):
    """Where neither sees the other's lock: the newer has signed after it."""
    config = small_config(tmp_path, store, mesh={"lon": 2}, training={"checkpoint_every": 4, "steps": 8})
    lock = config.run_dir / ".lock"

    def check(mesh):
        step, write = Trainer._step, checkpoint.write_shard

        def signed(*arguments):
            if mesh.rank == 0:
                lock.write_text("process 9 on node7, 01234567\n")

        def stepping(self, now):
            if writes == "a record" and now == 6:
                signed()
            return step(self, now)

        def writing(directory, *rest):
            if writes == "a checkpoint" and "step-00000008" in directory.name:
                signed()
            return write(directory, *rest)

        Trainer._step, checkpoint.write_shard = stepping, writing  # the pool goes with the error
        train(config, mesh)

    with pytest.raises(AssertionError, match=r"run was taken over by a later start \(process 9 on node7, 01234567\)"):
        run_on_ranks(TWO, check)
    assert [one.step for one in checkpoints_in(config.run_dir)] == [4]
    assert len(read_records(config.run_dir)) == (5 if writes == "a record" else 8)


def test_a_lock_that_cannot_be_read_for_now_ends_no_run(tmp_path, monkeypatch):
    with claimed(tmp_path, here=True) as claim:
        read = Path.read_text

        def away(path, *arguments, **options):
            if path.name == ".lock":
                raise OSError(errno.ESTALE, "Stale file handle")
            return read(path, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", away)
            claim.check()
        (tmp_path / ".lock").write_text("")  # by one that is about to sign
        claim.check()
        (tmp_path / ".lock").unlink()
        with pytest.raises(RunError, match=r"taken over by a later start \(its lock is gone\)"):
            claim.check()


def test_a_save_that_is_under_way_takes_its_time_first():
    end = StepEnd(signal=10, left_s=20.0, save_s=10.0, written=True)
    assert end.may_save and not replace(end, written=False).may_save
    assert replace(end, written=False, left_s=25.0).may_save


def test_small_files_are_whole_whoever_else_writes_them(tmp_path):
    path, texts = tmp_path / "report.json", ["a" * 5000, "b" * 9000]

    def write(text):
        for _ in range(50):
            write_durably(path, text)
            assert path.read_text() in texts

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, texts))
    assert [one.name for one in tmp_path.iterdir()] == ["report.json"]


# Numbers that are no numbers


def with_nan(directory, store, layout, training, bad_steps, channel=1, rate_zero=()):
    """Trains; in some steps the loss of the first replica is not a number, because of one variable of one sample.

    Of several micro-batches it is the first.
    """
    mesh_sizes = dict(zip(("replicas", "lat", "lon"), layout, strict=True))
    config = small_config(directory, store, mesh=mesh_sizes, training=training)

    def check(mesh):
        backward, rate = Trainer._backward, trainer_module.learning_rate
        spoilt = set()

        def spoiled(self, batch, *rest):
            if (step := self._activity.step) in set(bad_steps) - spoilt and mesh.replica == 0:
                spoilt.add(step)
                batch.target_BTCYX[0, 1, channel, 0, 0] = torch.nan
            return backward(self, batch, *rest)

        def sometimes_zero(training, legs, step):
            return 0.0 if step + 1 in rate_zero else rate(training, legs, step)

        Trainer._backward, trainer_module.learning_rate = spoiled, sometimes_zero
        try:
            return train(config, mesh)
        except FloatingPointError as error:
            return str(error)
        finally:
            Trainer._backward, trainer_module.learning_rate = backward, rate

    answers = run_on_ranks(layout, check)
    return answers[0]


@pytest.mark.parametrize("layout", [Layout(2, 1, 1), Layout(1, 2, 2)], ids=str)
def test_stop_names_step_variable_and_sample(tmp_path, store, layout):
    told = with_nan(tmp_path, store, layout, {"checkpoint_every": 1}, {4})
    assert re.search(
        r"the loss is nan at step 4, in the forecast of wave_1 of window \d+ \(rank 0(, 1, 2, 3)?\): it", told
    )
    assert [one.step for one in checkpoints_in(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.every(2, "precision", "stage")
def test_a_step_that_is_skipped_leaves_no_trace(tmp_path, store, stage, precision):
    """As if its learning rate had been zero, with plain SGD; Adam's count and moments stay as they were."""
    layout, common = Layout(2, 1, 1), {"zero_stage": stage, "precision": precision, "checkpoint_every": 6, "ema": 0.5}
    sgd = common | {"optimizer": "sgd", "learning_rate": 0.1}
    assert with_nan(tmp_path / "skip", store, layout, sgd | {"on_not_finite": "skip"}, {3, 4}) == 0
    assert with_nan(tmp_path / "zero", store, layout, sgd, {}, rate_zero={3, 4}) == 0
    got, want = (checkpoints_in(tmp_path / name / "run")[-1].parameters() for name in ("skip", "zero"))
    assert all(torch.equal(got[name], want[name]) for name in want)
    updates = [record.update for record in read_records(tmp_path / "skip" / "run")]
    assert updates == ["applied"] * 2 + ["skipped"] * 2 + ["applied"] * 2
    assert with_nan(tmp_path / "adam", store, layout, common | {"on_not_finite": "skip"}, {3}) == 0
    newest = checkpoints_in(tmp_path / "adam" / "run")[-1]
    assert newest.manifest().updates == 5 and all(torch.isfinite(value).all() for value in newest.moments().values())


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (2, "bf16"), (1, "fp32"), (3, "bf16"), (3, "fp32")])
@pytest.mark.every(2)
def test_restored_weights_and_moments_are_those_of_the_checkpoint(tmp_path, store, stage, precision):
    """Of several micro-batches the first is bad; what is saved right after is what was loaded."""
    training = {"checkpoint_every": 1, "on_not_finite": "restore", "steps": 5, "keep_last": 9}
    training |= {"zero_stage": stage, "precision": precision, "accumulation": 2}
    assert with_nan(tmp_path, store, TWO, training, {4}) == 0
    assert [record.update for record in read_records(tmp_path / "run")] == ["applied"] * 3 + ["restored", "applied"]
    third, fourth, fifth = checkpoints_in(tmp_path / "run")[2:]
    assert_same_state(third, fourth)
    assert fourth.manifest().updates == third.manifest().updates == 3 and fifth.manifest().updates == 4
    with pytest.raises(AssertionError):
        assert_same_state(fourth, fifth)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_bad_micro_batch_among_good_ones_leaves_its_step_out(tmp_path, store, stage):
    training = {"zero_stage": stage, "on_not_finite": "skip", "checkpoint_every": 1, "accumulation": 2, "steps": 3}
    assert with_nan(tmp_path, store, Layout(2, 1, 1), training, {2}) == 0
    assert [record.update for record in read_records(tmp_path / "run")] == ["applied", "skipped", "applied"]
    first, second, _ = checkpoints_in(tmp_path / "run")
    assert_same_state(first, second)


def test_restore_goes_back_to_the_checkpoint_and_on_with_the_next_samples(tmp_path, store):
    training = {"checkpoint_every": 2, "on_not_finite": "restore", "steps": 8, "keep_last": 9}
    assert with_nan(tmp_path, store, TWO, training, {5}) == 0
    records = read_records(tmp_path / "run")
    assert [record.update for record in records] == ["applied"] * 4 + ["restored"] + ["applied"] * 3
    assert [record.step for record in records] == list(range(1, 9))
    found = {one.step: one for one in checkpoints_in(tmp_path / "run")}
    assert found[4].manifest().updates == 4 and found[6].manifest().updates == 5 and found[8].manifest().updates == 7
    assert '"loss": null' in (tmp_path / "run" / STEPS_FILE).read_text()


def test_restoring_in_vain_ends(tmp_path, store):
    training = {"checkpoint_every": 2, "on_not_finite": "restore", "steps": 20}
    with pytest.raises(AssertionError, match=r"NoProgressError.* at step 6.*restored 3 times in a row, in vain"):
        with_nan(tmp_path, store, TWO, training, set(range(3, 20)))


def test_nothing_to_restore_is_said(tmp_path, store):
    told = with_nan(tmp_path, store, TWO, {"on_not_finite": "restore"}, {2})
    assert "at step 2" in told and "There is no checkpoint yet to restore" in told


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_first_step_that_is_skipped_can_be_saved(tmp_path, store, stage):
    training = {"zero_stage": stage, "on_not_finite": "skip", "checkpoint_every": 1, "steps": 3}
    assert with_nan(tmp_path, store, TWO, training, {1}) == 0
    first, *_, last = checkpoints_in(tmp_path / "run")
    assert first.manifest().updates == 0 and last.manifest().updates == 2
    assert all(not value.any() for value in first.moments().values())


def test_what_is_not_finite_is_found_without_the_rest():
    class Output:
        forecast_BTCYX = torch.zeros(2, 3, 2, 4, 5)

    class Target:
        target_BTCYX = torch.zeros(2, 3, 2, 4, 5)
        windows = (7, 9)

    Target.target_BTCYX[1, 2, 0, 3, 4] = torch.inf
    micro = MicroBatch.of(torch.zeros(2), Output(), Target())
    assert micro.unsound_BC.tolist() == [[False, False], [True, False]]
