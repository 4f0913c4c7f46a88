"""One failed rank ends the job at once, with one message: the first rank that knows speaks."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.distributed_c10d import Store

from ..errors import InputError, exit_code_of

POLL_S = 0.5
LINGER_S = 3 * POLL_S  # the rank that failed may host the store: leave it up until all have read it


class FailureWatch:
    """Tells all ranks that one has failed, and ends them.

    The first rank to fail claims the right to speak in the job's key-value store, prints its
    message, and leaves its exit code there. A thread on every rank asks the store for that code
    and ends its process when it finds one, even inside a collective that would never return. A
    rank that fails later, because its peers are gone, finds the claim taken and stays silent.

    A launcher that sees the first rank leave sends SIGTERM to the others. They must not die of it
    with a code of their own, which srun would report instead, so SIGTERM ends a rank only if no
    failure is found in the store.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store = store
        self._rank = rank
        self._stopped, self._terminated = threading.Event(), threading.Event()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, frame: self._terminated.set())
        self._thread = threading.Thread(target=self._poll, name="failure-watch", daemon=True)
        self._thread.start()

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Ends this process, and with it the job, if the block raises."""
        try:
            yield
        except BaseException as error:  # KeyboardInterrupt and SystemExit end a rank as well
            if isinstance(error, SystemExit) and not error.code:
                raise
            self._stopped.set()
            self._end(error)

    def stop(self) -> None:
        """Stops watching, before the ranks part in peace."""
        self._stopped.set()
        self._thread.join()

    def _end(self, error: BaseException) -> None:
        code = exit_code_of(error)
        if self._claim():
            print(describe(error, self._rank), file=sys.stderr, flush=True)
            self._leave_code(code)
            time.sleep(LINGER_S)
        else:
            code = self._reported_code() or code
        sys.stdout.flush()
        os._exit(code)

    def _claim(self) -> bool:
        try:
            return int(self._store.add("claims", 1)) == 1
        except RuntimeError:  # the store's host is gone, so somebody else has failed before
            return False

    def _leave_code(self, code: int) -> None:
        try:
            self._store.set("exit_code", str(code))
        except RuntimeError:
            return

    def _reported_code(self) -> int | None:
        deadline = time.monotonic() + LINGER_S
        while time.monotonic() < deadline:
            try:
                if self._store.check(["exit_code"]):
                    return int(self._store.get("exit_code"))
            except RuntimeError:
                return None
            time.sleep(POLL_S / 5)
        return None

    def _poll(self) -> None:
        while not self._stopped.wait(POLL_S):
            terminated = self._terminated.is_set()
            try:
                failed = self._store.check(["exit_code"])
            except RuntimeError:
                return  # the host of the store has left; the collectives will notice
            if failed and not self._stopped.is_set():
                os._exit(int(self._store.get("exit_code")))
            if terminated:
                os._exit(128 + signal.SIGTERM)


def describe(error: BaseException, rank: int | None = None) -> str:
    """What the terminal shows: the message alone for the user's mistakes, else the traceback."""
    where = "" if rank is None else f" (rank {rank})"
    if isinstance(error, InputError):
        return f"faconv: error{where}: {error}"
    lines = "".join(traceback.format_exception(error))
    return f"{lines}faconv: failed{where}: {type(error).__name__}: {error}"
