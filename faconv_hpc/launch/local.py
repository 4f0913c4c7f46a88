"""Several ranks on this machine, without a scheduler: started, watched, and ended together."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from types import FrameType
from typing import IO

from ..errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_STOPPED
from ..interrupts import follow
from ..spatial.environment import RankEnvironment, free_port
from ..training.faults.signals import hold_signals, release_signals, restore_signals

GRACE_S = 10.0  # the others end themselves when they learn of a failure; see spatial/failure.py
POLL_S = 0.05
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
STARTED_BY_US = "FACONV_LOCAL_RANK"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def inside_a_job() -> bool:
    """Whether this process is one of several ranks, or one that `run_local_ranks` has started.

    An interactive shell on a node (``srun --pty bash``) or a container may set the variables of a job
    of one rank; starting ranks from there is what the user asks for.
    """
    return STARTED_BY_US in os.environ or RankEnvironment.world_size_hint() > 1


def run_local_ranks(arguments: Sequence[str], ranks: int, stdout: IO[bytes] | None = None) -> int:
    """Runs ``faconv ARGUMENTS`` on so many ranks of this machine and returns the exit code of the first to fail.

    What they print goes to ``stdout``, or where this process prints. When one fails the others get `GRACE_S`
    seconds to leave and are then killed. Signals are passed on; if this process is killed, the ranks are told to end.
    """
    told = _Told()
    before = {number: signal.signal(number, told.all_of) for number in PASSED_ON}
    waited = release_signals(signal.SIGINT)
    try:
        follow()
        port = free_port()
        for rank in range(ranks):
            hold_signals(signal.SIGINT)  # a rank inherits this; none may be lost between its birth and its first line
            told.add(_start(arguments, rank, ranks, port, stdout))
            release_signals(signal.SIGINT)
        return _wait(told.workers)
    finally:
        restore_signals(waited)
        for number, handler in before.items():
            signal.signal(number, handler)
        for worker in told.workers:
            worker.kill()
            worker.wait()


def run_and_read(arguments: Sequence[str], ranks: int) -> tuple[int, str]:
    """`run_local_ranks`; its exit code, and what the ranks printed."""
    with tempfile.TemporaryFile() as printed:
        code = run_local_ranks(arguments, ranks, printed)
        printed.seek(0)
        return code, printed.read().decode()


def _start(
    arguments: Sequence[str], rank: int, ranks: int, port: int, stdout: IO[bytes] | None
) -> subprocess.Popen[bytes]:
    variables = RankEnvironment(rank, ranks, rank, port=port).variables() | {STARTED_BY_US: str(rank)}
    environment = os.environ | variables
    cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    return subprocess.Popen(
        [sys.executable, "-m", "faconv_hpc", *arguments],
        env=environment,
        stdout=stdout,
        start_new_session=True,  # so that Ctrl-C reaches the ranks once, through us
        preexec_fn=partial(end_with, os.getpid()),
    )


def end_with(parent: int) -> None:
    """In the child: SIGTERM when the parent dies, however it dies (Linux), and at once if it has died already."""
    if sys.platform == "linux":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else what Python has noted is forgotten where a program begins
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


def end_with_torchrun() -> None:
    """In a rank that torchrun has started: as if that were told to end, when torchrun is killed.

    Else its ranks would train on, seen by nobody, and hold their GPUs.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and STARTED_BY_US not in os.environ:
        end_with(os.getppid())


class _Told:
    """Passes signals on to ranks, each one to every rank once: those that are born after it as well."""

    def __init__(self) -> None:
        self.workers: list[subprocess.Popen[bytes]] = []
        self._came: list[int] = []
        self._counts: list[int] = []  # of signals that each has been sent

    def add(self, worker: subprocess.Popen[bytes]) -> None:
        """One more rank."""
        self._counts.append(0)
        self.workers.append(worker)
        self._tell()

    def all_of(self, number: int, frame: FrameType | None) -> None:
        """The handler of a signal."""
        self._came.append(number)
        self._tell()

    def _tell(self) -> None:
        for rank, worker in enumerate(self.workers):
            while self._counts[rank] < len(self._came):
                number = self._came[self._counts[rank]]
                self._counts[rank] += 1  # first: another signal may come here, and its handler goes on from there
                if worker.poll() is None:
                    worker.send_signal(number)


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits until all have ended, or one has failed and the grace is over."""
    failed: int | None = None
    deadline = float("inf")
    while time.monotonic() < deadline:
        states = [worker.poll() for worker in workers]  # of all: one that is stopped must not hide one that failed
        if None not in states:
            break
        codes = [code for code in states if code]
        if codes and failed is None:
            failed, deadline = codes[0], time.monotonic() + GRACE_S
        time.sleep(POLL_S)
    codes = [worker.returncode for worker in workers if worker.returncode]
    if failed is None and not codes:
        return EXIT_OK
    code = failed if failed is not None else codes[0]
    for rank, worker in enumerate(workers):
        if worker.returncode is not None and worker.returncode < 0:
            name = signal.Signals(-worker.returncode).name
            print(f"faconv: failed: rank {rank} was ended by {name}", file=sys.stderr)
    return {-signal.SIGINT: EXIT_INTERRUPTED}.get(code, code if code > 0 else EXIT_STOPPED)
