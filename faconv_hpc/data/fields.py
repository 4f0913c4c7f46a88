"""Raw fields of some variables, frame by frame, whatever holds them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..spatial.grid import Tile
from .store import Store
from .times import TimeAxis


class Fields(Protocol):
    """Some variables at some times, which increase.

    Attributes:
        names: of the variables.
        axis: the times.
    """

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def axis(self) -> TimeAxis: ...

    def read(self, frames: Sequence[int], tile: Tile) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """fields_TCYX, NaN where data are missing, and where they are not; None: nowhere.

        Raises:
            InputError: damaged files, or values missing where none were in training.
        """


@dataclass(frozen=True)
class StoreFields:
    """Of a store, or of a sequence in it.

    Attributes:
        own: frames of the store.
    """

    store: Store
    names: tuple[str, ...]
    own: range

    @cached_property
    def axis(self) -> TimeAxis:
        """Times of the frames."""
        return TimeAxis(self.store.layout.time.seconds[self.own.start : self.own.stop], self.store.calendar)

    def read(self, frames: Sequence[int], tile: Tile) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """See `Store.read`."""
        there = [self.own[frame] for frame in frames]
        return self.store.read(there, tile, self.store.channel_indices(self.names))
