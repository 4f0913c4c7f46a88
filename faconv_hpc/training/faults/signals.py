"""Signals that ask a run to stop: they set a flag; the ranks agree at a step boundary, save, and leave."""

import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType

from ...config import TrainingConfig
from ...errors import EXIT_INTERRUPTED, InputError, LostRankError
from ...interrupts import follow
from ...spatial.environment import RankEnvironment

MARGIN_S = 5.0  # of a time limit, for the ranks to leave
ECHO_S = 0.5  # of one Ctrl-C, which reaches a process from its terminal and from who started it, such as `timeout`
STUCK_S = 5.0  # after a second Ctrl-C, for a process that waits outside Python and does not hear of it
FIRST_INTERRUPT = "faconv: Ctrl-C: ends after the step under way, with a checkpoint; once more ends at once, without"
HELD = (signal.SIGUSR1, signal.SIGUSR2)
"""Blocked until somebody listens: what they do by default would end a rank that is still starting."""


def hold_signals(*more: signal.Signals) -> Collection[int]:
    """Keeps SIGUSR1, SIGUSR2 and others waiting, in this process and those it starts; what waited before."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, (*HELD, *more))


def release_signals(*more: signal.Signals) -> Collection[int]:
    """Delivers what has been waiting; what waited before."""
    return signal.pthread_sigmask(signal.SIG_UNBLOCK, (*HELD, *more))


def restore_signals(waited: Collection[int]) -> None:
    """The inverse of the two, from what they returned: a process that is started later inherits it."""
    signal.pthread_sigmask(signal.SIG_SETMASK, waited)


class StopRequest:
    """Notes SIGTERM, SIGUSR1 and SIGUSR2 inside a ``with`` block, and how long the sender will wait.

    Python runs a handler only between two of its own operations, which on a GPU may be seconds after the signal.
    The interpreter's wake-up pipe is written at once, and a thread reads the time from there.

    SIGINT (Ctrl-C) ends a process as usual until `hold_interrupts`; from then on the first is one of these signals,
    and the second ends the process at once, and says what is lost; what follows the first at once is its echo.

    Args:
        grace_s: for each signal, seconds until the sender kills. Of several signals the earliest end counts.

    Attributes:
        number: of the signal that has come; 0: none. Of several the one that ends soonest.
        came: numbers of all of them.
        kept_step: of the newest checkpoint, for what is said then.
    """

    def __init__(self, grace_s: Mapping[signal.Signals, float]) -> None:
        self._grace_s = dict(grace_s)
        self._before: dict[signal.Signals, object] = {}
        self._waited_before: Collection[int] = ()
        self._deadline = float("inf")
        self._pipe = (-1, -1)
        self._descriptor_before = -1
        self._speaks = False
        self._held, self._first_s = False, float("inf")  # of SIGINT
        self._handled, self._heard, self._interrupts = 0, 0, 0  # once handled may stand for twice come
        self._came_early = False
        self._last_resort = threading.Timer(STUCK_S, self._end_at_once)
        self._last_resort.daemon = True
        self.number = self.kept_step = 0
        self.came: set[int] = set()

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
        if isinstance(error, LostRankError):
            error.told_to_leave = signal.SIGTERM in self.came
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._descriptor_before)
        restore_signals(self._waited_before)
        os.close(self._pipe[1])  # which ends the thread
        self._last_resort.cancel()

    def hold_interrupts(self, kept_step: int, *, speaks: bool) -> None:
        """From here on there is something to lose by Ctrl-C. The rank that ``speaks`` answers the first.

        Raises:
            KeyboardInterrupt: one came before, in a moment in which Python loses it: while a module is imported.
        """
        follow()
        if self._came_early:
            raise KeyboardInterrupt
        self.kept_step, self._speaks = kept_step, speaks
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script
            return
        self._grace_s[signal.SIGINT], self._held = float("inf"), True
        self._before.setdefault(signal.SIGINT, signal.signal(signal.SIGINT, self._handle))

    @property
    def left_s(self) -> float:
        """Seconds until this process may be killed; infinite where no signal has come."""
        return self._deadline - time.monotonic()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(number)
        if number == signal.SIGINT and self._held:
            self._handled += 1
            comes_now = self._handled > self._heard and time.monotonic() > self._first_s + ECHO_S
            if self._interrupts > 1 or comes_now:
                raise KeyboardInterrupt(self._lost())

    def _listen(self) -> None:
        while arrived := os.read(self._pipe[0], 1):
            number = arrived[0]
            self._note(number)
            self._came_early |= number == signal.SIGINT and not self._held
            if number == signal.SIGINT and self._held:
                self._heard += 1
                echoes = self._first_s < time.monotonic() < self._first_s + ECHO_S
                self._first_s = min(self._first_s, time.monotonic())
                self._interrupts += not echoes
                if echoes:
                    continue
                if self._interrupts == 1 and self._speaks:
                    print(FIRST_INTERRUPT, file=sys.stderr, flush=True)
                if self._interrupts == 2:
                    self._last_resort.start()
        os.close(self._pipe[0])

    def _end_at_once(self) -> None:
        print(f"faconv: interrupted: {self._lost()}", file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)

    def _lost(self) -> str:
        since = f"the checkpoint of step {self.kept_step}" if self.kept_step else "the start"
        return f"Ctrl-C came twice; what was done since {since} is lost. The same command does it again."

    def _note(self, number: int) -> None:
        if number in self._grace_s:
            deadline = time.monotonic() + self._grace_s[signal.Signals(number)]
            if not self.number or deadline < self._deadline:
                self.number, self._deadline = number, deadline
            self.came.add(number)


def grace_s(training: TrainingConfig) -> dict[signal.Signals, float]:
    """What the config says of each signal."""
    usr_s = training.usr_grace_s
    return {signal.SIGTERM: training.term_grace_s, signal.SIGUSR1: usr_s, signal.SIGUSR2: usr_s}


@dataclass(frozen=True)
class StepEnd:
    """What all ranks agree on between two steps, or two micro-batches.

    Attributes:
        signal: that some rank was sent; 0: none.
        left_s: until the first rank may be killed.
        save_s: what the last checkpoint took the slowest rank.
        written: whether all ranks have written the checkpoint that is under way.
        step_s: what the step took the slowest rank; in the middle of one, what is left of it will take.
        job_left_s: until the job meets its time limit.
    """

    signal: int
    left_s: float
    save_s: float
    written: bool
    step_s: float = 0.0
    job_left_s: float = float("inf")

    @property
    def time_is_up(self) -> bool:
        """Whether the time limit would come before another step and a checkpoint: it is met now, with one."""
        return self.job_left_s < MARGIN_S + 1.5 * self.step_s + self._save_s

    @property
    def comes_too_late(self) -> bool:
        """In the middle of a step: whether what is left of it, and a checkpoint after it, take longer than there is."""
        return self.time_is_up or bool(self.signal and self.left_s < 1.5 * self.step_s + self._save_s)

    @property
    def _save_s(self) -> float:
        """As long as the last checkpoint took, and half of that more. One that is still being written comes first."""
        return (1.5 if self.written else 2.5) * self.save_s

    @property
    def may_save(self) -> bool:
        """Whether a checkpoint is done in time."""
        return not self.signal or self._save_s <= self.left_s

    @classmethod
    def of(cls, standings: Sequence[Sequence[float]]) -> "StepEnd":
        """From what every rank knows, a column for each."""
        written, signals, left_s, save_s, step_s, left = standings
        return cls(int(max(signals)), min(left_s), max(save_s), all(written), max(step_s), min(left))


def check_time_limit(asked: int, usr_grace_s: float) -> None:
    """A signal came before the first step: raises InputError if it always will, however often the job is requeued."""
    span = RankEnvironment.job_span_s()
    if span is not None and asked in (signal.SIGUSR1, signal.SIGUSR2) and span[1] - span[0] <= usr_grace_s:
        raise InputError(
            f"{signal.Signals(asked).name} came before the first step: the job has {span[1] - span[0]:.0f} s in all, "
            f"and training.usr_grace_s={usr_grace_s:g} of them are kept for saving: it would never train. Give it more "
            f"time, or lower training.usr_grace_s and the seconds of sbatch's --signal."
        )


def job_left_s() -> float:
    """Until the job meets its time limit."""
    span = RankEnvironment.job_span_s()
    return float("inf") if span is None else span[1] - time.time()
