"""What somebody else's collectives take."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

COLLECTIVES = {
    "all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "all_gather", "all_gather_into_tensor",
    "broadcast", "all_to_all_single", "barrier", "all_reduce_coalesced", "all_gather_coalesced",
}  # fmt: skip


class Timed:
    """DeepSpeed's way to torch's collectives, with the time that they take.

    Its own log asks at every call for the signature of the function that is called: a fourth of what a small
    collective takes, and of what it reports.
    """

    def __init__(self, backend: Any) -> None:
        self._backend, self._seconds = backend, 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        return partial(self._call, found) if name in COLLECTIVES else found

    def _call(self, collective: Callable[..., Any], *given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return collective(*given, **named)
        finally:
            self._seconds += time.perf_counter() - began

    def taken_s(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
