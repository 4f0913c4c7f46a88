"""Several ranks on this machine, without a scheduler: started, watched, and ended together."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from ..errors import EXIT_FAILED, EXIT_OK
from ..spatial.environment import RankEnvironment, free_port

GRACE_S = 10.0  # the others end themselves when they learn of a failure; see spatial/failure.py
POLL_S = 0.05
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def inside_a_job() -> bool:
    """Whether this process is already one of several ranks that somebody else started."""
    return RankEnvironment.launcher_name() != "plain"


def run_local_ranks(arguments: Sequence[str], ranks: int) -> int:
    """Runs ``faconv ARGUMENTS`` on so many ranks of this machine and returns the exit code of the first to fail.

    When one fails the others get `GRACE_S` seconds to leave and are then killed. Signals are passed on.
    """
    port = free_port()
    workers = [_start(arguments, rank, ranks, port) for rank in range(ranks)]
    before = {number: signal.signal(number, _passing_on(workers)) for number in PASSED_ON}
    try:
        return _wait(workers)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for worker in workers:
            worker.kill()
            worker.wait()


def _start(arguments: Sequence[str], rank: int, ranks: int, port: int) -> subprocess.Popen[bytes]:
    environment = os.environ | RankEnvironment(rank, ranks, rank, port=port).variables()
    cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    return subprocess.Popen([sys.executable, "-m", "faconv_hpc", *arguments], env=environment)


def _passing_on(workers: Sequence[subprocess.Popen[bytes]]) -> "signal._HANDLER":
    def handler(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    return handler


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits until all have ended, or one has failed and the grace is over."""
    failed: int | None = None
    deadline = float("inf")
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        codes = [worker.returncode for worker in workers if worker.returncode]
        if codes and failed is None:
            failed, deadline = codes[0], time.monotonic() + GRACE_S
        time.sleep(POLL_S)
    codes = [worker.returncode for worker in workers if worker.returncode]
    if failed is None and not codes:
        return EXIT_OK
    code = failed if failed is not None else codes[0]
    if code < 0:
        print(f"faconv: failed: a rank was ended by {signal.Signals(-code).name}", file=sys.stderr)
        return EXIT_FAILED
    return code
