"""One failed rank ends the job at once, with one message: the first rank that knows speaks."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from typing import NoReturn, TypeVar

from torch.distributed.distributed_c10d import Store

from ..errors import (
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_TERMINATED,
    LostRankError,
    RunError,
    TryAgainError,
    describe,
    exit_code_of,
)
from ..observe import FILE_ACTIVITIES, Activity
from .heartbeat import PAUSE_S, Heartbeats, pace

POLL_S = 0.5  # and longer where there are thousands of ranks (`pace`)
MARGIN_S = 15.0  # between the time-out after which a silent rank is named and that of a collective
ANSWER_S = 5.0  # for the store to answer a rank that is about to leave: its host may be stopped
LINGER_POLLS = 3  # the rank that failed may host the store: leave it up until all have read it
VERDICT = "verdict"
NO_MEMORY = "out of memory"
BROKEN = (  # of a GPU, its driver or the network between GPUs; another node may do it
    "NCCL error", "ncclSystemError", "ncclInternalError", "ncclRemoteError", "ncclUnhandledCudaError",
    "ECC error", "illegal memory access", "unspecified launch failure", "hardware stack error", "GPU is lost",
    "busy or unavailable", "system not yet initialized", "system has unsupported display driver",
)  # fmt: skip
LOST_PEER = ("onnection closed by peer", "onnection reset by peer", "emote process exited")  # gloo, NCCL
TOLD_CHARS = 400
TIMED_OUT = ("imed out", "imeout")  # gloo, NCCL, the store

Value = TypeVar("Value")
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

    A rank that stops answering, without having failed, is found by its neighbour (`Heartbeats`); where it is
    rank 0 and the store with it, a rank of every node says so when the store has been silent for as long. A rank
    that waits for files for as long ends the job itself.

    A launcher that sees the first rank leave sends SIGTERM to the others. They must not die of it
    with a code of their own, which srun would report instead, so SIGTERM ends a rank only if no
    failure is found in the store.

    Args:
        store: a connection of its own to the job's store.
        rank, ranks: this one, and how many.
        timeout_s: silence after which a rank is accused.
        speaks: whether this rank says so if the store falls silent; one of every node does.
    """

    def __init__(
        self, store: Store, rank: int, ranks: int = 1, timeout_s: float = float("inf"), *, speaks: bool = True
    ) -> None:
        self._store = store
        self._rank = rank
        self._speaks = speaks
        self.timeout_s = timeout_s
        self.activity = Activity()
        self._heartbeats = Heartbeats(store, rank, ranks, timeout_s, self.activity)
        self._poll_s = POLL_S * pace(ranks)
        self._answered = time.monotonic()
        self._stopped, self._terminated = threading.Event(), threading.Event()
        self._takes_sigterm = _in_main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if self._takes_sigterm:  # training follows it otherwise
            signal.signal(signal.SIGTERM, lambda number, frame: self._terminated.set())
        self._threads = [
            threading.Thread(target=work, name=f"failure-watch-{work.__name__}", daemon=True)
            for work in (self._poll, self._doubt)
        ]
        for thread in self._threads:
            thread.start()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Ends this process, and with it the job, if the block raises."""
        try:
            yield
        except BaseException as error:  # KeyboardInterrupt and SystemExit end a rank as well
            if isinstance(error, SystemExit) and not error.code:
                raise
            self.end(error)

    def end(self, error: BaseException) -> NoReturn:
        """Ends this process and the job because of this error."""
        if _in_main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # nothing may interrupt the message
        timed_out = _is_timeout(error)
        if timed_out:
            self._linger()  # one that fell silent may be found meanwhile
        raised, error = error, _named(error)
        code = exit_code_of(error)
        self._stopped.set()
        claim = self._claim(code)
        if claim is _Claim.TAKEN:
            self._follow(*(self._verdict() or (code, None)))
        if claim is _Claim.MINE and timed_out:
            error = self._explained(raised)
        print(describe(error, self._rank), file=sys.stderr, flush=True)
        if claim is _Claim.UNREACHABLE:
            self._say("rank 0, which all ranks meet at, was killed or has left")
            code = EXIT_STOPPED if code == EXIT_FAILED else code
        self._linger()
        leave(code)

    def stop(self) -> None:
        """Stops watching, before the ranks part in peace."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(ANSWER_S)
        if self._takes_sigterm and _in_main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _claim(self, code: int) -> _Claim:
        mine = f"{code} {self._rank}"
        try:
            verdict = _asked(lambda: self._store.compare_set(VERDICT, "", mine).decode())
        except RuntimeError:
            return _Claim.UNREACHABLE
        return _Claim.MINE if verdict == mine else _Claim.TAKEN

    def _verdict(self) -> tuple[int, int | None] | None:
        """(exit code, rank) of the rank that failed first; None if none has, or nobody can be asked."""
        try:
            found = self._store.get(VERDICT).decode().split() if self._store.check([VERDICT]) else None
        except RuntimeError:
            return None
        self._answered = time.monotonic()
        return None if found is None else (int(found[0]), int(found[1]))

    def _follow(self, code: int, speaker: int | None) -> NoReturn:
        """Leaves with the job's exit code; rank 0, where the store may be, when all have read it."""
        if self._rank in (0, speaker):
            self._linger()
        leave(code)

    def _linger(self) -> None:
        time.sleep(LINGER_POLLS * self._poll_s)

    def _poll(self) -> None:
        while not self._stopped.wait(self._poll_s):
            terminated = self._terminated.is_set()
            verdict = self._verdict()
            if self._stopped.is_set():
                return
            if verdict is None and terminated:
                self._claim(EXIT_TERMINATED)
                verdict = self._verdict() or (EXIT_TERMINATED, None)
            if verdict is not None:
                self._follow(*verdict)
            self._listen()

    def _listen(self) -> None:
        """One beat of the heart; speaks if the next rank is silent."""
        try:
            accusation = self._heartbeats.accusation() or self._stuck()
        except RuntimeError:  # the store is gone: whoever waits for its host will know
            return
        if accusation is not None and self._claim(EXIT_STOPPED) is _Claim.MINE:
            self._say(accusation)

    def _stuck(self) -> str | None:
        """A message, if this rank has been waiting for files for too long: no collective would run out of time."""
        doing, for_s = self.activity.doing, time.monotonic() - self.activity.since
        if doing not in FILE_ACTIVITIES or for_s < self.timeout_s + MARGIN_S:
            return None
        return (
            f"this rank has been {doing} in step {self.activity.step} for {for_s:.0f} s (training.timeout_s is "
            f"{self.timeout_s:g}). Its file system does not answer, or is slow: look there or raise the time-out, and "
            f"start the same command again."
        )

    def _doubt(self) -> None:
        """Ends this rank when the store does not answer: its host, rank 0, is stopped, and cannot be asked."""
        looked = time.monotonic()
        while not self._stopped.wait(POLL_S):
            now = time.monotonic()
            if now - looked > PAUSE_S:
                self._answered = now
            looked = now
            if now - self._answered > self.timeout_s:
                if self._speaks:
                    self._say(
                        f"rank 0, which all ranks meet at, has not answered for {now - self._answered:.0f} s "
                        f"(training.timeout_s is {self.timeout_s:g}); this rank is in step {self.activity.step}, "
                        f"{self.activity.doing}. Its process is stopped or its node is lost: look there, and start "
                        f"the same command again."
                    )
                leave(EXIT_STOPPED)

    def _say(self, text: str) -> None:
        print(f"faconv: failed (rank {self._rank}): {text}", file=sys.stderr, flush=True)

    def _explained(self, error: BaseException) -> BaseException:
        """A collective ran out of time: with the rank that is to blame."""
        try:
            blame = _asked(self._heartbeats.blame)
        except RuntimeError:
            blame = "no rank can be asked what it is doing"
        return LostRankError(
            f"a collective ran out of time (training.timeout_s is {self.timeout_s:g}): {blame}. Look at what it "
            f"does there, and start the same command again. This rank, in step {self.activity.step}, was told: {error}"
        )


def leave(code: int) -> NoReturn:
    """Ends this process from any thread, whatever the others are doing."""
    if sys.stderr.isatty():
        sys.stderr.write(SHOW_CURSOR)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _named(error: BaseException) -> BaseException:
    """What torch raises where a rank, a GPU or a network is lost, as an error that says so."""
    told = str(error)[:TOLD_CHARS]
    if _is_timeout(error):
        return LostRankError(f"a collective ran out of time: {told}")
    if _is_lost_peer(error):
        return LostRankError(f"another rank has left while this one waited for it ({told})")
    if _is_broken(error):
        return TryAgainError(
            f"a GPU, its driver or the network of {socket.gethostname()} failed: {told}. Another node may do it: "
            f"start the same command again, and have this one looked at if it happens there again."
        )
    return error


def _is_lost_peer(error: BaseException) -> bool:
    return _is_of_torch(error) and any(sign in str(error) for sign in LOST_PEER)


def _is_timeout(error: BaseException) -> bool:
    return _is_of_torch(error) and any(sign in str(error) for sign in TIMED_OUT)


def _is_broken(error: BaseException) -> bool:
    told = str(error)
    return _is_of_torch(error) and NO_MEMORY not in told and any(sign in told for sign in BROKEN)


def _is_of_torch(error: BaseException) -> bool:
    """What a collective or the store may raise; our own say what they are, and their texts hold names of files."""
    return isinstance(error, RuntimeError) and not isinstance(error, RunError)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _asked(question: Callable[[], Value]) -> Value:
    """The store's answer. Against a stopped host some questions wait without limit, whatever the store's time-out.

    Raises:
        RuntimeError: there was none within `ANSWER_S`, or the connection is gone.
    """
    answers: list[Value] = []

    def ask() -> None:
        with suppress(RuntimeError):
            answers.append(question())

    thread = threading.Thread(target=ask, name="failure-question", daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if not answers:
        raise RuntimeError(f"the store has not answered within {ANSWER_S:g} s")
    return answers[0]
