"""Samples of one tile: windows of consecutive frames, and reading them ahead. Their order: order.py."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..spatial.grid import LatLonGrid, Tile
from .annual_cycle import AnnualCycle
from .forcings import Instants
from .gaps import fill_gaps
from .inputs import Inputs, column
from .periods import evenly
from .store import Store
from .variables import Channels

T = TypeVar("T")

CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Batch:
    """Samples of a tile.

    Args:
        inputs_BTCYX: float32, see `Channels.inputs`. Normalised fields, gaps of prognostic ones as `fill_gaps` fills
            them, 0 where there is nothing; of those that may miss cells how fresh they are, of forcings 1 or 0; then
            what is static or computed.
        target_BTCYX: float32, see `Channels.targets`. Change of each prognostic field to the next frame over its
            ``tendency_std``, and each diagnostic one of the next frame, normalised. Gaps are filled at both ends of a
            change, so that a sum of changes is that of the fields; 0 where there is none to begin from.
        valid_BTCYX: whether a target is valid, a change where the next frame is known and there is something to begin
            from; None if none is ever missing.
        year_fraction_BT: float64, of the input frames.
        windows: which windows of the `Windows` these are.
        channels: what stands where.
    """

    inputs_BTCYX: Tensor
    target_BTCYX: Tensor
    valid_BTCYX: Tensor | None
    year_fraction_BT: Tensor
    windows: tuple[int, ...]
    channels: Channels

    @property
    def fresh_BTCYX(self) -> Tensor | None:
        """How fresh the prognostic fields of the input are, see `fill_gaps`; None if none ever misses cells."""
        places = self.channels.fresh
        if all(place is None for place in places):
            return None
        fresh_BTCYX = torch.ones_like(self.inputs_BTCYX[:, :, : len(places)])
        for field, place in enumerate(places):
            if place is not None:
                fresh_BTCYX[:, :, field] = self.inputs_BTCYX[:, :, place]
        return fresh_BTCYX

    def first(self, steps: int) -> "Batch":
        """The same samples, of the first steps alone."""
        return self._map(lambda tensor: tensor[:, :steps])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The same batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which copies to a GPU run asynchronously."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            inputs_BTCYX=change(self.inputs_BTCYX),
            target_BTCYX=change(self.target_BTCYX),
            valid_BTCYX=None if self.valid_BTCYX is None else change(self.valid_BTCYX),
            year_fraction_BT=change(self.year_fraction_BT),
        )


class Windows:
    """The samples that a tile takes out of a store: window ``i`` begins with frame ``starts[i]``.

    It holds ``window`` consecutive input frames and one more, the target of the last.

    Args:
        store: where the fields are.
        tile: which cells.
        channels: of the network; their statistics are those of the data that it was trained on. The store must miss
            nothing of what may not miss any.
        window: number of input frames.
        starts: (windows,) first frames, see `periods.starts_within`.
        grid: the store's grid, for the forcings.
        cycle: of the tile, of the fields that the network sees without it.

    Raises:
        InputError: an unknown variable or forcing.
    """

    def __init__(
        self,
        store: Store,
        tile: Tile,
        *,
        channels: Channels,
        window: int,
        starts: NDArray[np.int64],
        grid: LatLonGrid,
        cycle: AnnualCycle | None = None,
    ) -> None:
        assert (grid.nlat, grid.nlon) == store.layout.grid_shape, f"{grid.nlat} x {grid.nlon} is another grid"
        self.store, self.tile, self.window, self.starts, self.channels = store, tile, window, starts, channels
        self._stored = store.channel_indices([one.name for one in channels.fields])
        for variable, index in zip(channels.fields, self._stored, strict=True):
            assert variable.may_miss or not store.misses_some([index]), f"{variable.name} misses data unexpectedly"
        self._may_miss = any(one.may_miss for one in channels.targets)
        static_SYX = store.read_static([one.name for one in channels.static], tile)
        self._inputs = Inputs(channels, tile, grid, static_SYX, cycle or AnnualCycle())
        self._per_tendency = column([1 / one.target_scale for one in channels.prognostic])

    def __len__(self) -> int:
        return len(self.starts)

    def spread(self, count: int) -> list[int]:
        """So many of them, or all there are, evenly over all; of several the first and the last are among them."""
        return evenly(len(self), count)

    def read(self, indices: Sequence[int], steps: int | None = None) -> Batch:
        """Reads windows; each frame of a window is read once.

        Args:
            steps: only the first inputs, and the target of the last; default: all.

        Raises:
            InputError: files that are missing or damaged.
            IndexError: a window that does not exist.
        """
        size, time, shape = len(indices), steps or self.window, self.tile.shape
        assert time <= self.window, f"{time} steps of a window of {self.window}"
        inputs_BTCYX = torch.empty(size, time, len(self.channels.inputs), *shape)
        target_BTCYX = torch.empty(size, time, len(self.channels.targets), *shape)
        valid_BTCYX = torch.empty(target_BTCYX.shape, dtype=torch.bool) if self._may_miss else None
        year_fraction_BT = torch.empty(size, time, dtype=torch.float64)
        for sample, index in enumerate(indices):
            frames = self.frames_of(index)[: time + 1]
            valid = None if valid_BTCYX is None else valid_BTCYX[sample].numpy()
            self._fill(frames, inputs_BTCYX[sample].numpy(), target_BTCYX[sample].numpy(), valid)
            year_fraction_BT[sample] = torch.from_numpy(self.store.year_fraction[frames.start : frames.stop - 1])
        return Batch(inputs_BTCYX, target_BTCYX, valid_BTCYX, year_fraction_BT, tuple(indices), self.channels)

    def frames_of(self, index: int) -> range:
        """Frames of the store that a window takes: its inputs and the one after them."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = int(self.starts[index])
        return range(start, start + self.window + 1)

    def cycle_of(self, frames: range) -> NDArray[np.float32]:
        """(T, C, Y, X) what the targets' values are that the network sees as 0, see `Inputs.cycle_at`."""
        return self._inputs.cycle_at(self.store.year_fraction[list(frames)])

    def _fill(
        self,
        frames: range,
        inputs_TCYX: NDArray[np.float32],
        target_TCYX: NDArray[np.float32],
        valid_TCYX: NDArray[np.bool_] | None,
    ) -> None:
        inputs, changing, given = self._inputs, len(self.channels.prognostic), self.channels.given
        span = slice(frames.start, frames.stop)
        at = Instants(self.store.time_hours[span], self.store.year_fraction[span], self.store.utc_hour[span])
        values_TCYX, known_TCYX = self.store.read(frames, self.tile, self._stored)
        inputs.transform(values_TCYX, at.year_fraction)
        fresh_TCYX = fill_gaps(values_TCYX, known_TCYX, changing)
        np.subtract(values_TCYX[1:, :changing], values_TCYX[:-1, :changing], out=target_TCYX[:, :changing])
        target_TCYX[:, :changing] *= self._per_tendency
        inputs.normalise(values_TCYX)
        target_TCYX[:, changing:] = values_TCYX[1:, given:]
        inputs.fill(values_TCYX[:-1, :given], None if fresh_TCYX is None else fresh_TCYX[:-1, :given], at, inputs_TCYX)
        if valid_TCYX is not None:
            valid_TCYX[:] = True
        if fresh_TCYX is not None and valid_TCYX is not None:
            begun_TCYX, known_TCYX = fresh_TCYX[:-1, :changing] > 0, fresh_TCYX[1:] == 1
            np.logical_and(known_TCYX[:, :changing], begun_TCYX, out=valid_TCYX[:, :changing])
            valid_TCYX[:, changing:] = known_TCYX[:, given:]
            target_TCYX[:, :changing][~begun_TCYX] = 0.0
            target_TCYX[:, changing:][~known_TCYX[:, given:]] = 0.0


class ReadAhead(Generic[T], Iterator[Batch]):
    """Reads batches in a thread, ``depth`` ahead of the one who takes them.

    An error while reading is raised when its batch is taken, those before it arrive first. HDF5
    and NumPy let go of the interpreter while they read and compute.

    Args:
        read: makes a batch of a request, in the thread; such as `Windows.read`.
        requests: what to read, in order; drawn in the consumer's thread. May be endless.
        depth: batches being read or waiting.
    """

    def __init__(self, read: Callable[[T], Batch], requests: Iterable[T], depth: int = 2) -> None:
        assert depth >= 1, f"reading ahead needs a depth of 1 or more, got {depth}"
        self._read = read
        self._requests = iter(requests)
        self._waiting: deque[Future[Batch]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._closed = False
        while len(self._waiting) < depth and self._ask():
            pass

    def _ask(self) -> bool:
        """Whether there was anything left to ask for."""
        for request in self._requests:
            self._waiting.append(self._thread.submit(self._read, request))
            return True
        return False

    def __next__(self) -> Batch:
        if self._closed or not self._waiting:
            raise StopIteration
        batch = self._waiting.popleft()
        self._ask()
        return batch.result()

    def close(self) -> None:
        """Forgets what is not read yet; waits a few seconds at most for a read under way."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        wait([batch for batch in self._waiting if not batch.cancelled()], timeout=CLOSE_TIMEOUT_S)
        self._waiting.clear()

    def __enter__(self) -> "ReadAhead[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
