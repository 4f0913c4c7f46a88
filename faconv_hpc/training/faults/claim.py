"""The run directory for one job alone: two would mix their records and checkpoints."""

import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import InputError, LostRankError, RunError
from ...files import cannot_write
from ...locks import DirectoryLock, opened
from ...spatial.environment import RankEnvironment
from ..records import STEPS_FILE, read_records

LOCK_FILE = ".lock"
EARLIER_START_S = 60  # for the last start of a job that was requeued to end, and its lock with it


class Claim:
    """Whose the run directory is: what stands in the lock's file, which the last start to come has signed.

    A lock is not seen on all file systems, nor by all nodes after an outage; what stands in a file is.
    """

    def __init__(self, lock: DirectoryLock | None = None) -> None:
        self._lock = lock
        self._mine = "" if lock is None else lock.holder

    def check(self) -> None:
        """Before anything is written there that lasts. Raises RunError if a later start has signed.

        A signature that cannot be read for now, or is only half written, says nothing.
        """
        if self._lock is None:
            return
        holder = self._lock.holder
        if not holder and self._lock.path.exists():
            return
        if holder != self._mine:
            raise RunError(
                f"{self._lock.path.parent} was taken over by a later start ({holder or 'its lock is gone'}), which "
                f"does not see the lock of this one ({self._mine}). This one ends here, and writes no more."
            )


@contextmanager
def claimed(run_dir: Path, here: bool) -> Iterator[Claim]:
    """The run directory for this job alone, as long as the block lasts; the kernel frees it if the rank is killed.

    Raises:
        InputError: another job trains there, or the directory cannot be made.
        LostRankError: an earlier start of this very job does, and goes on.
    """
    if not here:
        yield Claim()
        return
    lock = opened(run_dir / LOCK_FILE, "run_dir")
    try:
        (run_dir / "checkpoints").mkdir(exist_ok=True)  # now, and not when the first one is due
        (run_dir / STEPS_FILE).open("a").close()
    except OSError as error:
        raise cannot_write("run_dir", run_dir, error) from None
    with lock:
        _lock(lock, run_dir)
        lock.sign(f", {secrets.token_hex(4)}{_slurm_job()}")
        yield Claim(lock)


def _slurm_job() -> str:
    start = RankEnvironment.slurm_start()
    return f", Slurm job {start[0]}, start {start[1]}" if start else ""


def _is_earlier_start(holder: str) -> bool:
    """Whether a lock is held by an earlier start of this very job; NFS may keep that of a lost node."""
    start = RankEnvironment.slurm_start()
    found = re.search(r", Slurm job (\S+), start (\d+)$", holder)
    return start is not None and found is not None and found[1] == start[0] and int(found[2]) < start[1]


def _lock(lock: DirectoryLock, run_dir: Path) -> None:
    began, at_first = time.monotonic(), None
    while not lock.take():
        if not _is_earlier_start(holder := lock.holder):
            raise InputError(
                f"run_dir {run_dir} is in use by {holder or 'another job'}: two jobs would mix "
                f"their records. Wait for it to end, or give another run_dir."
            )
        step, seconds = _last_step(run_dir)
        at_first = step if at_first is None else at_first
        if time.monotonic() - began >= max(EARLIER_START_S, 3 * seconds):  # one that trains does a step meanwhile
            if step != at_first:
                raise LostRankError(
                    f"{holder}, which is an earlier start of this job, still trains in {run_dir}: a node that "
                    f"Slurm has given up is alive. End its processes; the job is requeued meanwhile."
                )
            print(f"{lock.path} is still held by an earlier start of this job ({holder}): going on", file=sys.stderr)
            return
        time.sleep(1.0)


def _last_step(run_dir: Path) -> tuple[int, float]:
    """Number and seconds of the last step on record; 0 where there is none."""
    records = read_records(run_dir)
    return (records[-1].step, records[-1].seconds) if records else (0, 0.0)
