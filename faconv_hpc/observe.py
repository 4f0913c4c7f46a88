"""Seconds spent by name: what a step record says about waiting and communicating."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up wall-clock seconds under names such as ``"exchange"`` or ``"data"``.

    On a GPU an asynchronous exchange returns before it is done; the seconds are then those in
    which the host was held up, a lower bound of the time the device spent communicating.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Adds the time spent inside the ``with`` block to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def take(self, name: str) -> float:
        """Seconds collected under ``name`` since it was last taken; resets them to zero."""
        return self._seconds.pop(name, 0.0)
