"""Samples of one tile: windows of consecutive frames, their order, and reading them ahead."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..spatial.grid import LatLonGrid, Tile
from .forcings import Instants, check_forcings, compute_forcings
from .statistics import Statistics, unit
from .store import Store

T = TypeVar("T")

CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Batch:
    """Samples of a tile.

    Args:
        inputs_BTCYX: float32. Normalised fields, 0 where missing; then, if data may be missing, one
            channel per field that is 1 where it is valid; then the forcings.
        target_BTCYX: float32. Change of each field to the next frame over its ``tendency_std``;
            0 where it is not valid.
        valid_BTCYX: whether both frames of the change are valid; None if nothing is ever missing.
        year_fraction_BT: float64, of the input frames.
        windows: which windows of the `Windows` these are.
    """

    inputs_BTCYX: Tensor
    target_BTCYX: Tensor
    valid_BTCYX: Tensor | None
    year_fraction_BT: Tensor
    windows: tuple[int, ...]

    @property
    def known_BTCYX(self) -> Tensor | None:
        """1 where a field of the input is known, 0 where it is missing; None if nothing is ever missing."""
        if self.valid_BTCYX is None:
            return None
        fields = self.target_BTCYX.shape[2]
        return self.inputs_BTCYX[:, :, fields : 2 * fields]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """The same batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which copies to a GPU run asynchronously."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        valid = None if self.valid_BTCYX is None else change(self.valid_BTCYX)
        year_fraction = change(self.year_fraction_BT)
        return Batch(change(self.inputs_BTCYX), change(self.target_BTCYX), valid, year_fraction, self.windows)


class Windows:
    """The samples that a tile takes out of a store: window ``i`` begins with frame ``starts[i]``.

    It holds ``window`` consecutive input frames and one more, the target of the last.

    Args:
        store: where the fields are.
        tile: which cells.
        variables: which channels, by name.
        statistics: of these, that they are normalised with; those of the data that a network was trained on.
        may_miss: whether there is a channel for each field that says where it is valid. The store must miss nothing
            if not.
        window: number of input frames.
        starts: (windows,) first frames, see `periods.starts_within`.
        forcings: names out of `FORCINGS`.
        grid: the store's grid, for the forcings.

    Attributes:
        field_channels: names of the predicted fields.
        input_channels: names of the input channels, in their order in `Batch.inputs_BTCYX`.

    Raises:
        InputError: an unknown variable or forcing.
    """

    def __init__(
        self,
        store: Store,
        tile: Tile,
        *,
        variables: Sequence[str],
        statistics: Statistics,
        may_miss: bool,
        window: int,
        starts: NDArray[np.int64],
        grid: LatLonGrid,
        forcings: Sequence[str] = (),
    ) -> None:
        assert (grid.nlat, grid.nlon) == store.layout.grid_shape, f"{grid.nlat} x {grid.nlon} is another grid"
        self.store, self.tile, self.window, self.starts = store, tile, window, starts
        self.field_channels = tuple(variables)
        self._channels = store.channel_indices(self.field_channels)
        assert may_miss or not store.misses_some(self._channels), f"{store.path} misses data: nothing would say where"
        self._forcings = check_forcings(forcings)
        self._may_miss = may_miss
        validity = tuple(f"valid_{name}" for name in self.field_channels) if may_miss else ()
        self.input_channels = (*self.field_channels, *validity, *self._forcings)
        self._latitude = grid.latitude[slice(*tile.rows)]
        self._longitude = grid.longitude[slice(*tile.columns)]
        self._mean = statistics.mean.astype(np.float32)[:, None, None]
        self._scale = _inverse(statistics.std)
        self._tendency_scale = _inverse(statistics.tendency_std)

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, indices: Sequence[int]) -> Batch:
        """Reads windows; each frame of a window is read once.

        Raises:
            InputError: files that are missing or damaged.
            IndexError: a window that does not exist.
        """
        size, time, shape = len(indices), self.window, self.tile.shape
        fields_count = len(self.field_channels)
        inputs_BTCYX = torch.empty(size, time, len(self.input_channels), *shape)
        target_BTCYX = torch.empty(size, time, fields_count, *shape)
        valid_BTCYX = torch.empty(target_BTCYX.shape, dtype=torch.bool) if self._may_miss else None
        year_fraction_BT = torch.empty(size, time, dtype=torch.float64)
        for sample, index in enumerate(indices):
            frames = self.frames_of(index)
            valid = None if valid_BTCYX is None else valid_BTCYX[sample].numpy()
            self._fill(frames, inputs_BTCYX[sample].numpy(), target_BTCYX[sample].numpy(), valid)
            year_fraction_BT[sample] = torch.from_numpy(self.store.year_fraction[frames.start : frames.stop - 1])
        return Batch(inputs_BTCYX, target_BTCYX, valid_BTCYX, year_fraction_BT, tuple(indices))

    def frames_of(self, index: int) -> range:
        """Frames of the store that a window takes: its inputs and the one after them."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = int(self.starts[index])
        return range(start, start + self.window + 1)

    def _fill(
        self,
        frames: range,
        inputs_TCYX: NDArray[np.float32],
        target_TCYX: NDArray[np.float32],
        valid_TCYX: NDArray[np.bool_] | None,
    ) -> None:
        count = len(self.field_channels)
        values_TCYX, known_TCYX = self.store.read(frames, self.tile, self._channels)
        np.subtract(values_TCYX[1:], values_TCYX[:-1], out=target_TCYX)
        target_TCYX *= self._tendency_scale
        np.subtract(values_TCYX[:-1], self._mean, out=inputs_TCYX[:, :count])
        inputs_TCYX[:, :count] *= self._scale
        if valid_TCYX is not None:
            known_TCYX = np.ones(values_TCYX.shape, dtype=bool) if known_TCYX is None else known_TCYX
            np.logical_and(known_TCYX[1:], known_TCYX[:-1], out=valid_TCYX)
            target_TCYX[~valid_TCYX] = 0.0
            inputs_TCYX[:, :count][~known_TCYX[:-1]] = 0.0
            inputs_TCYX[:, count : 2 * count] = known_TCYX[:-1]
        span = slice(frames.start, frames.stop)
        at = Instants(self.store.time_hours[span], self.store.year_fraction[span], self.store.utc_hour[span])
        first = len(self.input_channels) - len(self._forcings)
        compute_forcings(self._forcings, at, self._latitude, self._longitude, inputs_TCYX[:, first:])


def _inverse(std: NDArray[np.float64]) -> NDArray[np.float32]:
    """(C, 1, 1) one over it; 1 where a field never changes and its differences are 0 anyway."""
    return (1.0 / unit(std)).astype(np.float32)[:, None, None]


def sample_order(seed: int, position: int, count: int, windows: int) -> list[int]:
    """Which windows stand at ``position`` to ``position + count`` of an endless sequence.

    A pure function, so that there is no state to save and no dependence on the layout. Position
    ``p`` belongs to epoch ``p // windows``; every epoch is a permutation of all windows, drawn by
    the Philox generator with the key (seed, epoch). Only its raw bits are used, which NumPy keeps
    the same in all versions, other than what it makes of them.
    """
    assert windows > 0, f"no windows to order, {windows}"
    places = [divmod(place, windows) for place in range(position, position + count)]
    return [_permutation(seed, epoch, windows)[offset] for epoch, offset in places]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, windows: int) -> list[int]:
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    order: list[int] = np.argsort(np.random.Philox(key=key).random_raw(windows), kind="stable").tolist()
    return order


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
