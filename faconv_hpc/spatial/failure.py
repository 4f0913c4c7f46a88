"""One failed rank ends the job at once, with one message: the first rank that knows speaks."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import NoReturn

from torch.distributed.distributed_c10d import Store

from ..errors import EXIT_TERMINATED, InputError, exit_code_of

POLL_S = 0.5
LINGER_S = 3 * POLL_S  # the rank that failed may host the store: leave it up until all have read it
VERDICT = "verdict"
LOST_PEER = ("onnection closed by peer", "onnection reset by peer", "emote process exited")  # gloo, NCCL
LOST_PEER_CHARS = 200
SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it


class _Claim(Enum):
    """Who may speak about the failure."""

    MINE = "mine"
    TAKEN = "taken"
    UNREACHABLE = "unreachable"


class FailureWatch:
    """Tells all ranks that one has failed, and ends them.

    The first rank to fail puts its exit code into the job's key-value store, which gives it the right
    to speak, and prints its message. A thread on every rank asks the store for that code and ends its
    process when it finds one, even inside a collective that would never return. A rank that fails
    later, because its peers are gone, finds the code and stays silent. Where the store itself is gone,
    because rank 0, its host, was killed, every survivor says so.

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
            self.end(error)

    def end(self, error: BaseException) -> NoReturn:
        """Ends this process and the job because of this error."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # nothing may interrupt the message
        self._stopped.set()
        code = exit_code_of(error)
        claim = self._claim(code)
        if claim is _Claim.TAKEN:
            self._follow(*(self._verdict() or (code, None)))
        print(describe(error, self._rank), file=sys.stderr, flush=True)
        if claim is _Claim.UNREACHABLE:
            print(
                f"faconv: failed (rank {self._rank}): rank 0, which all ranks meet at, was killed or has left",
                file=sys.stderr,
            )
        time.sleep(LINGER_S)
        leave(code)

    def stop(self) -> None:
        """Stops watching, before the ranks part in peace."""
        self._stopped.set()
        self._thread.join()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _claim(self, code: int) -> _Claim:
        mine = f"{code} {self._rank}"
        try:
            verdict = self._store.compare_set(VERDICT, "", mine).decode()
        except RuntimeError:
            return _Claim.UNREACHABLE
        return _Claim.MINE if verdict == mine else _Claim.TAKEN

    def _verdict(self) -> tuple[int, int | None] | None:
        """(exit code, rank) of the rank that failed first; None if none has, or nobody can be asked."""
        try:
            if not self._store.check([VERDICT]):
                return None
            code, rank = self._store.get(VERDICT).decode().split()
        except RuntimeError:
            return None
        return int(code), int(rank)

    def _follow(self, code: int, speaker: int | None) -> NoReturn:
        """Leaves with the job's exit code; rank 0, where the store may be, when all have read it."""
        if self._rank in (0, speaker):
            time.sleep(LINGER_S)
        leave(code)

    def _poll(self) -> None:
        while not self._stopped.wait(POLL_S):
            terminated = self._terminated.is_set()
            verdict = self._verdict()
            if self._stopped.is_set():
                return
            if verdict is None and terminated:
                self._claim(EXIT_TERMINATED)
                verdict = self._verdict() or (EXIT_TERMINATED, None)
            if verdict is not None:
                self._follow(*verdict)


def leave(code: int) -> NoReturn:
    """Ends this process from any thread, whatever the others are doing."""
    if sys.stderr.isatty():
        sys.stderr.write(SHOW_CURSOR)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def describe(error: BaseException, rank: int | None = None) -> str:
    """What the terminal shows: the message alone for the user's mistakes, else the traceback."""
    where = "" if rank is None else f" (rank {rank})"
    if isinstance(error, InputError):
        return f"faconv: error{where}: {error}"
    if isinstance(error, KeyboardInterrupt):
        return f"faconv: interrupted{where}"
    if isinstance(error, FloatingPointError):
        return f"faconv: failed{where}: {error}"
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_PEER):
        told = str(error)[:LOST_PEER_CHARS]
        return f"faconv: failed{where}: another rank has left while this one waited for it ({told})"
    lines = "".join(traceback.format_exception(error))
    return f"{lines}faconv: failed{where}: {type(error).__name__}: {error}"
