"""A store of fields, read tile by tile."""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..files import check_in_reach
from ..spatial.grid import Boundary, LatLonGrid, Tile
from . import chunks
from .layout import STORE_FILE, FileEntry, StoreContent, read_store_file
from .periods import Run, runs_of
from .unknown_names import index_of

OPEN_FILES = 16  # kept open per process; a window reads one or two

FILTER_FAILED = "filter returned failure"  # what HDF5 says of a checksum that is wrong


class Store:
    """Fields of one grid, many times and some channels, in HDF5 files that are valid NetCDF4.

    Opening reads ``store.nc`` only. Files of fields are opened when they are first read, in the
    process that reads them, read-only and without locks (which parallel file systems may refuse);
    the sixteen used last stay open.

    Attributes:
        path: the directory.
        content: what ``store.nc`` says.
        layout: grid, channels, times and chunks.
        files: of fields, block by block.
        digest: of all that ``store.nc`` says.
        latitude_deg: (latitude,) float64, north first.
        longitude_deg: (longitude,) float64, increasing, from any start.
        channels: names, in stored order.
        units: of each channel.
        mean, std: (channel,) float64, area-weighted over all valid cells and times.
        tendency_std: (channel,) float64, of the difference of consecutive frames; 0 if all are equal.
        valid_share: (channel,) float64, share of cells that are not missing.
        time_hours: (time,) float64, hours since 1970-01-01 in the store's ``calendar``.
        year_fraction: (time,) float64 in [0, 1), in the store's calendar.
        utc_hour: (time,) float64 in [0, 24).
        frames: number of times.
        size_bytes: of all files of fields.
        has_missing: whether some cell of some frame is missing; it is NaN then and not valid.
        static: what there is of fields without time; see `read_static`.
    """

    def __init__(self, path: Path, content: StoreContent) -> None:
        layout = content.layout
        self.path, self.content = path, content
        self.layout = layout
        self.files, self.digest = content.files, content.digest
        self.latitude_deg, self.longitude_deg = layout.latitude_deg, layout.longitude_deg
        self.channels = tuple(channel.name for channel in layout.channels)
        self.units = tuple(channel.units for channel in layout.channels)
        self.mean, self.std, self.tendency_std = content.mean, content.std, content.tendency_std
        self.valid_share = content.valid_share
        self.time_hours, self.calendar = layout.time.hours, layout.time.calendar
        self.year_fraction, self.utc_hour = content.year_fraction, content.utc_hour
        self.frames = len(layout.time)
        self.size_bytes = sum(entry.size_bytes for entry in content.files)
        self.has_missing = content.has_missing
        self.static, self.static_file = content.static, content.static_file
        self._blocks = [
            [number for number, entry in enumerate(content.files) if entry.block == block]
            for block in range(len(layout.blocks))
        ]
        self._open: OrderedDict[int, h5py.File] = OrderedDict()
        self._process = os.getpid()
        self._open_limit = OPEN_FILES

    @classmethod
    def open(cls, path: str | Path) -> "Store":
        """Opens a finished store.

        Raises:
            InputError: no such directory, not finished, damaged, or of another format version.
        """
        directory = Path(path)
        if not directory.is_dir():
            what = "is a file, but a store is a directory" if directory.exists() else "does not exist"
            raise InputError(
                f"store {directory} {what}. Make one with `faconv data prepare SOURCE --output {directory}` "
                f"or `faconv data synth --output {directory}`."
            )
        if not (directory / STORE_FILE).is_file():
            parts = len(list(directory.glob("fields-*.nc")))
            raise InputError(
                f"store {directory} is not finished: it has {parts} files of fields but no {STORE_FILE}, which is "
                f"written last. Run the `faconv data prepare` (or `faconv data synth`) that makes it again: it goes on "
                f"where it stopped."
            )
        return cls(directory, read_store_file(directory / STORE_FILE))

    def close(self) -> None:
        """Closes the files of fields. Reading opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # handles belong to their process

    def misses_some(self, channels: Sequence[int]) -> bool:
        """Whether a cell of one of these channels is missing in some frame."""
        return bool((self.valid_share[list(channels)] < 1).any())

    @property
    def static_names(self) -> tuple[str, ...]:
        """Of the fields without time."""
        return tuple(one.channel.name for one in self.static)

    def channel_indices(self, names: Sequence[str]) -> list[int]:
        """Positions of variables.

        Raises:
            InputError: a variable that is not there; the nearest one and all are named.
        """
        return [index_of("variable", name, self.channels, f"store {self.path}") for name in names]

    def grid(
        self, lat_boundary: Boundary | str | tuple[Boundary | str, Boundary | str], lon_boundary: Boundary | str
    ) -> LatLonGrid:
        """The store's grid with these boundaries.

        Raises:
            InputError: the coordinates do not allow these boundaries.
        """
        return LatLonGrid(
            *self.layout.grid_shape,
            latitude_deg=self.latitude_deg,
            longitude_deg=self.longitude_deg,
            lat_boundary=lat_boundary,
            lon_boundary=lon_boundary,
        )

    def bytes_needed(self, tile: Tile, channels: Sequence[int]) -> int:
        """Bytes of one frame of a tile."""
        return chunks.bytes_needed(tile, len(channels), has_missing=self.has_missing)

    def bytes_read(self, tile: Tile, channels: Sequence[int]) -> int:
        """Bytes of the chunks that must be read for one frame of a tile, before any compression."""
        read = 0
        for block in range(len(self.layout.blocks)):
            every = self.layout.channels_of(block)
            own = [channel - every.start for channel in channels if channel in every]
            chunk = self.layout.of_block(block).chunk
            read += chunks.bytes_read(tile, own, chunk, has_missing=self.has_missing)
        return read

    def read(
        self, frames: range | Sequence[int], tile: Tile, channels: Sequence[int]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """Reads a tile's cells, and no other tile's where the chunks fit.

        Args:
            frames: which times; each run of consecutive ones is read at once.
            tile: which rows and columns.
            channels: positions of channels; each run of consecutive ones is read as a slice,
                since a list is twice as slow in HDF5.

        Returns:
            fields_TCYX, NaN where data are missing, and valid_TCYX, or None where the store
            ``has_missing`` nothing.

        Raises:
            InputError: a file that is missing or damaged; NaN or infinity in a valid cell.
        """
        self._check_request(frames, tile)
        shape = (len(frames), len(channels), *tile.shape)
        fields_TCYX = np.empty(shape, dtype=np.float32)
        valid_TCYX = np.ones(shape, dtype=bool) if self.has_missing else None
        for block, (channel_at, channel, channel_count) in self._runs_by_block(channels):
            for file, (at, first, count) in self._runs_by_file(frames, block):
                source = np.s_[first : first + count, channel : channel + channel_count, *tile.slices]
                target = np.s_[at : at + count, channel_at : channel_at + channel_count]
                self._read_slab(file, source, target, fields_TCYX, valid_TCYX)
        self._check_finite(fields_TCYX, valid_TCYX, frames, tile, channels)
        return fields_TCYX, valid_TCYX

    def read_static(self, names: Sequence[str], tile: Tile) -> NDArray[np.float32]:
        """Fields without time, fields_SYX, of a tile.

        Raises:
            InputError: one that is not there; the file is missing or damaged.
        """
        for name in names:
            index_of("static variable", name, self.static_names, f"store {self.path}")
        fields_SYX = np.empty((len(names), *tile.shape), dtype=np.float32)
        if not names or self.static_file is None:
            return fields_SYX
        path = self.path / self.static_file.name
        try:
            self._check_size(self.static_file.name, self.static_file.size_bytes)
            with h5py.File(path, "r", locking=False) as h5:
                _check_fingerprint(h5, self.static_file.fingerprint)
                for place, name in enumerate(names):
                    fields_SYX[place] = h5[name][tile.slices]
        except (OSError, KeyError, RuntimeError, UnicodeDecodeError) as error:  # as HDF5 has it
            raise self._unreadable(path, error) from None
        return fields_SYX

    def channels_in(self, entry: FileEntry) -> range:
        """Positions of the channels that a file has."""
        return self.layout.channels_of(entry.block)

    def _file_of(self, frame: int, block: int) -> int:
        own = self._blocks[block]
        return own[bisect_right(own, frame, key=lambda file: self.files[file].first_frame) - 1]

    def check_files(self) -> None:
        """Looks for every file and compares its size with the table, reading none.

        Raises:
            InputError: naming the first file that is missing or has another size.
        """
        for entry in self.files:
            self._check_size(entry.name, entry.size_bytes)
        if self.static_file is not None:
            self._check_size(self.static_file.name, self.static_file.size_bytes)

    def _check_request(self, frames: range | Sequence[int], tile: Tile) -> None:
        nlat, nlon = self.layout.grid_shape
        inside = 0 <= tile.rows[0] < tile.rows[1] <= nlat and 0 <= tile.columns[0] < tile.columns[1] <= nlon
        if not inside or (len(frames) and not 0 <= min(frames) <= max(frames) < self.frames):
            raise InputError(
                f"frames {frames} of {tile} were asked of store {self.path}, which has {self.frames} frames of "
                f"{nlat} x {nlon} cells. Ask for cells and times that are there."
            )

    def _runs_by_block(self, channels: Sequence[int]) -> Iterator[tuple[int, Run]]:
        """Channels by their places within their block."""
        for at, first, count in runs_of(channels):
            while count:
                block = bisect_right(self.layout.blocks, first) - 1
                own = self.layout.channels_of(block)
                inside = min(count, own.stop - first)
                yield block, (at, first - own.start, inside)
                at, first, count = at + inside, first + inside, count - inside

    def _runs_by_file(self, frames: range | Sequence[int], block: int) -> Iterator[tuple[int, Run]]:
        for at, first, count in runs_of(frames):
            while count:
                file = self._file_of(first, block)
                entry = self.files[file]
                inside = min(count, entry.first_frame + entry.frames - first)
                yield file, (at, first - entry.first_frame, inside)
                at, first, count = at + inside, first + inside, count - inside

    def _read_slab(
        self,
        file: int,
        source: tuple[slice, ...],
        target: tuple[slice, ...],
        fields_TCYX: NDArray[np.float32],
        valid_TCYX: NDArray[np.bool_] | None,
    ) -> None:
        with self.reading(file) as h5:
            h5["fields"].read_direct(fields_TCYX, source, target)
            if valid_TCYX is not None and "valid" in h5:  # a file without it has nothing missing
                valid_TCYX[target] = h5["valid"][source]

    @contextmanager
    def reading(self, file: int) -> Iterator[h5py.File]:
        """A file of fields, opened; what goes wrong with it is an InputError, or a TryAgainError."""
        try:
            yield self._file(file)
        except (OSError, KeyError, RuntimeError, UnicodeDecodeError) as error:  # as HDF5 has it
            raise self._unreadable(self.path / self.files[file].name, error) from None

    def _file(self, file: int) -> h5py.File:
        if self._process != os.getpid():  # after a fork the handles are the parent's
            self._open, self._process = OrderedDict(), os.getpid()
        if file not in self._open:
            self._open[file] = self._opened(self.files[file])
            while len(self._open) > self._open_limit:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(file)
        return self._open[file]

    def _opened(self, entry: FileEntry) -> h5py.File:
        self._check_size(entry.name, entry.size_bytes)
        h5 = h5py.File(self.path / entry.name, "r", locking=False)
        try:
            _check_fingerprint(h5, entry.fingerprint)
            if (first := int(np.ravel(h5.attrs["first_frame"])[0])) != entry.first_frame:
                raise OSError(f"it is another file of this store, with frames from {first} on, not {entry.first_frame}")
        except BaseException:
            h5.close()
            raise
        return h5

    def _check_size(self, name: str, size_bytes: int) -> None:
        path = self.path / name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise self._unreadable(path, error) from None
        if size != size_bytes:
            raise self._damaged(path, f"it has {size} bytes, {STORE_FILE} says {size_bytes}")

    def _unreadable(self, path: Path, error: Exception) -> InputError:
        """For what is damaged for good; raises TryAgainError for what is out of reach for now."""
        if isinstance(error, FileNotFoundError):
            return self._damaged(path, "it does not exist")
        check_in_reach(path, error)
        if FILTER_FAILED in str(error):
            return self._damaged(path, f"a block of it is not what was written, its checksum is another ({error})")
        return self._damaged(path, str(error))

    def _damaged(self, path: Path, reason: str) -> InputError:
        again = f"delete this file and {STORE_FILE} and run the `faconv data prepare` that made it: it writes again"
        again += " what is not there"
        if self.content.is_extended:
            again = "prepare all of it anew, from its first sources and those that were added: provenance names them"
        return InputError(f"{path} is missing or damaged: {reason}. Copy the store again, or {again}.")

    def _check_finite(
        self,
        fields_TCYX: NDArray[np.float32],
        valid_TCYX: NDArray[np.bool_] | None,
        frames: range | Sequence[int],
        tile: Tile,
        channels: Sequence[int],
    ) -> None:
        # One sum is cheaper than a mask of booleans, and float64 cannot overflow over float32.
        if valid_TCYX is None and np.isfinite(fields_TCYX.sum(dtype=np.float64)):
            return
        bad = ~np.isfinite(fields_TCYX) if valid_TCYX is None else ~np.isfinite(fields_TCYX) & valid_TCYX
        if not bad.any():
            return
        t, c, y, x = (int(index[0]) for index in np.nonzero(bad))
        frame = frames[t]
        raise InputError(
            f"{fields_TCYX[t, c, y, x]} in a cell that is not marked as missing: variable "
            f"{self.channels[channels[c]]!r} at {self.layout.time.label(frame)} (frame {frame}), latitude "
            f"{self.latitude_deg[tile.rows[0] + y]:g}, longitude {self.longitude_deg[tile.columns[0] + x]:g} in "
            f"{self.path / self._name_of(frame, channels[c])}. The file was changed or damaged: run `faconv data "
            f"prepare` again."
        )

    def _name_of(self, frame: int, channel: int) -> str:
        return self.files[self._file_of(frame, bisect_right(self.layout.blocks, channel) - 1)].name


def _check_fingerprint(h5: h5py.File, expected: str) -> None:
    if h5.attrs["fingerprint"] != expected:
        raise OSError("it is a file of another store")
