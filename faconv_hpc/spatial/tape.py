"""What was communicated on the way forward, kept so that recomputation need not ask again."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

Value = TypeVar("Value")
Started = Callable[[], Value]
"""What is under way: a call waits for it, once."""

Remembered = Callable[[Callable[[], Started[Any]]], Started[Any]]
"""Starts to communicate, or has what was received when the same segment was first computed."""


def at_once(start: Callable[[], Started[Value]]) -> Started[Value]:
    """Remembers nothing."""
    return start()


class Tape:
    """The results of the communicating verbs of one checkpointed segment, in order.

    Activation checkpointing computes a segment twice: forward, and again in backward. The first
    time the tape records what was received (a few halo rows, means, what attention has of other
    tiles); the second time it hands the same values back and nothing is sent.
    """

    def __init__(self) -> None:
        self._values: list[object] = []
        self._position = 0
        self._replaying = False

    def started(self, start: Callable[[], Started[Value]]) -> Started[Value]:
        """What ``start`` starts, to be recorded when it has been waited for; when replaying, the recorded value."""
        if self._replaying:
            return self._next
        finish = start()

        def recorded() -> Value:
            received = finish()
            self._values.append(received)
            return received

        return recorded

    def _next(self) -> Any:
        self._position += 1
        return self._values[self._position - 1]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The first computation of the segment."""
        self._values.clear()
        self._replaying = False
        yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """A later computation of the same segment, from its beginning."""
        self._position = 0
        self._replaying = True
        yield


class Again(AbstractContextManager[None]):
    """A context that is made anew whenever it is entered: backward may go through a segment more than once."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make

    def __enter__(self) -> None:
        self._entered = self._make()
        self._entered.__enter__()

    def __exit__(self, *raised: Any) -> bool | None:
        return self._entered.__exit__(*raised)
