"""Signals that ask a run to stop: they set a flag; the ranks agree at a step boundary, save, and leave."""

import os
import signal
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import FrameType, TracebackType

from ...config import TrainingConfig

HELD = (signal.SIGUSR1, signal.SIGUSR2)
"""Blocked until somebody listens: what they do by default would end a rank that is still starting."""


def hold_signals() -> Collection[int]:
    """Keeps SIGUSR1 and SIGUSR2 waiting, in this process and those it starts; the signals that waited before."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, HELD)


def release_signals() -> Collection[int]:
    """Delivers what has been waiting; the signals that waited before."""
    return signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


def restore_signals(waited: Collection[int]) -> None:
    """The inverse of the two, from what they returned: a process that is started later inherits it."""
    signal.pthread_sigmask(signal.SIG_SETMASK, waited)


class StopRequest:
    """Notes SIGTERM, SIGUSR1 and SIGUSR2 inside a ``with`` block, and how long the sender will wait.

    Python runs a handler only between two of its own operations, which on a GPU may be seconds after the signal.
    The interpreter's wake-up pipe is written at once, and a thread reads the time from there.

    Args:
        grace_s: for each signal, seconds until the sender kills. Of several signals the earliest end counts.
    """

    def __init__(self, grace_s: Mapping[signal.Signals, float]) -> None:
        self._grace_s = grace_s
        self._before: dict[signal.Signals, object] = {}
        self._waited_before: Collection[int] = ()
        self._deadline = float("inf")
        self._pipe = (-1, -1)
        self._descriptor_before = -1
        self.number = 0

    def __enter__(self) -> "StopRequest":
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._descriptor_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        self._before = {number: signal.signal(number, self._handle) for number in self._grace_s}
        self._waited_before = release_signals()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hold_signals()  # one that comes now finds nobody who listens
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._descriptor_before)
        restore_signals(self._waited_before)
        os.close(self._pipe[1])  # which ends the thread

    @property
    def left_s(self) -> float:
        """Seconds until this process may be killed; infinite where no signal has come."""
        return self._deadline - time.monotonic()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(number)

    def _listen(self) -> None:
        while arrived := os.read(self._pipe[0], 1):
            self._note(arrived[0])
        os.close(self._pipe[0])

    def _note(self, number: int) -> None:
        if number in self._grace_s:
            self._deadline = min(self._deadline, time.monotonic() + self._grace_s[signal.Signals(number)])
            self.number = number


def grace_s(training: TrainingConfig) -> dict[signal.Signals, float]:
    """What the config says of each signal."""
    usr_s = training.usr_grace_s
    return {signal.SIGTERM: training.term_grace_s, signal.SIGUSR1: usr_s, signal.SIGUSR2: usr_s}


@dataclass(frozen=True)
class StepEnd:
    """What all ranks agree on between two steps.

    Attributes:
        signal: that some rank was sent; 0: none.
        left_s: until the first rank may be killed.
        save_s: what the last checkpoint took the slowest rank.
        written: whether all ranks have written the checkpoint that is under way.
    """

    signal: int
    left_s: float
    save_s: float
    written: bool

    @property
    def may_save(self) -> bool:
        """Whether a checkpoint that takes as long as the last one, and half of that more, is done in time.

        One that is still being written comes first.
        """
        return not self.signal or (1.5 if self.written else 2.5) * self.save_s <= self.left_s
