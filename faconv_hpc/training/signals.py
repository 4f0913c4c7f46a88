"""Signals that ask a run to stop: they set a flag; the ranks agree at a step boundary, save, and leave."""

import signal
import time
from collections.abc import Mapping
from types import FrameType, TracebackType


class StopRequest:
    """Notes SIGTERM, SIGUSR1 and SIGUSR2 inside a ``with`` block, and how long the sender will wait.

    Args:
        grace_s: for each signal, seconds until the sender kills. Of several signals the earliest end counts.
    """

    def __init__(self, grace_s: Mapping[signal.Signals, float]) -> None:
        self._grace_s = grace_s
        self._before: dict[signal.Signals, object] = {}
        self._deadline = float("inf")
        self.number = 0

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in self._grace_s}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @property
    def left_s(self) -> float:
        """Seconds until this process may be killed; infinite where no signal has come."""
        return self._deadline - time.monotonic()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._deadline = min(self._deadline, time.monotonic() + self._grace_s[signal.Signals(number)])
        self.number = number
