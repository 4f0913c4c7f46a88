"""What was communicated on the way forward, kept so that recomputation need not ask again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Value = TypeVar("Value")


class Tape:
    """The results of the communicating verbs of one checkpointed segment, in order.

    Activation checkpointing computes a segment twice: forward, and again in backward. The first
    time the tape records what was received (a few halo rows and means); the second time it hands
    the same values back and nothing is sent.
    """

    def __init__(self) -> None:
        self._values: list[object] = []
        self._position = 0
        self._replaying = False

    def value(self, communicate: Callable[[], Value]) -> Value:
        """The recorded value when replaying, else what ``communicate`` returns, recorded."""
        if self._replaying:
            self._position += 1
            return self._values[self._position - 1]  # type: ignore[return-value]
        received = communicate()
        self._values.append(received)
        return received

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
