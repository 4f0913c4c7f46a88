"""Seconds spent by name, and what a rank is doing: what step records say, and what is told of a rank that is silent."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

READING, SAVING, LOADING = "reading data", "saving a checkpoint", "reading a checkpoint"
VALIDATING = "validation"
FILE_ACTIVITIES = (READING, SAVING, LOADING)
"""What a rank does while it waits for files, not for other ranks."""


class Activity:
    """What the main thread is doing; it writes, a watching thread reads.

    Attributes:
        step: optimizer step under way, 0 before the first.
        doing: such as ``"backward"``, or the verb that communicates.
        since: when it began with that, by `time.monotonic`.
        waits: whether it waits for other ranks.
    """

    def __init__(self) -> None:
        self.step = 0
        self.doing = "starting"
        self.since = time.monotonic()
        self.waits = False

    @contextmanager
    def during(self, what: str, *, waits: bool = False) -> Iterator[None]:
        """Says so inside the ``with`` block."""
        before = self.doing, self.waits
        self._begin(what, waits)
        try:
            yield
        finally:
            self._begin(*before)

    def _begin(self, what: str, waits: bool) -> None:
        self.doing, self.since, self.waits = what, time.monotonic(), waits


class Clock:
    """Adds up wall-clock seconds under names such as ``"exchange"`` or ``"data"``.

    On a GPU an asynchronous exchange returns before it is done; the seconds are then those in
    which the host was held up, a lower bound of the time the device spent communicating.

    Args:
        activity: told what is going on while time is taken.
    """

    def __init__(self, activity: Activity | None = None) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._waits: dict[str, float] = defaultdict(float)
        self._activity = activity or Activity()

    @contextmanager
    def timing(self, name: str, doing: str, *, waits: bool = False) -> Iterator[None]:
        """Adds the time spent inside the ``with`` block to ``name``; ``doing`` says what it is."""
        start = time.perf_counter()
        try:
            with self._activity.during(doing, waits=waits):
                yield
        finally:
            seconds = time.perf_counter() - start
            self._seconds[name] += seconds
            if waits:
                self._waits[doing] += seconds

    def communicating(self, verb: str) -> AbstractContextManager[None]:
        """Adds the time inside the ``with`` block to ``"exchange"``: this rank waits for others in ``verb``."""
        return self.timing("exchange", verb, waits=True)

    def take(self, name: str) -> float:
        """Seconds collected under ``name`` since it was last taken; resets them to zero."""
        return self._seconds.pop(name, 0.0)

    def take_waits(self) -> dict[str, float]:
        """Seconds in which this rank waited for others, by verb, since they were last taken; resets them."""
        waits, self._waits = dict(self._waits), defaultdict(float)
        return waits
