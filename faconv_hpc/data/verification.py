"""Reading all of a store and saying which of its files are not what was written."""

from collections.abc import Iterable, Iterator
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, TryAgainError
from ..spatial.grid import Tile
from .layout import DIMS, SEQUENCE, SEQUENCE_NAME, FileEntry
from .store import Store


def verify_files(store: Store, files: Iterable[int]) -> Iterator[tuple[FileEntry, str | None]]:
    """Reads every chunk of these files of fields, by their numbers; with each, what is wrong with it, or None."""
    for file in files:
        problem = None
        try:
            _read_all(store, file)
        except (InputError, TryAgainError) as error:
            problem = str(error)
        yield store.files[file], problem


def verify_static(store: Store) -> str | None:
    """Reads the fields without time; what is wrong with their file, or None."""
    nlat, nlon = store.layout.grid_shape
    try:
        store.read_static([one.channel.name for one in store.static], Tile((0, nlat), (0, nlon)))
    except (InputError, TryAgainError) as error:
        return str(error)
    return None


def _read_all(store: Store, file: int) -> None:
    """Raises InputError if the file is damaged, TryAgainError if it is out of reach."""
    entry = store.files[file]
    nlat, nlon = store.layout.grid_shape
    globe, every = Tile((0, nlat), (0, nlon)), store.channels_in(entry)
    for frame in range(entry.first_frame, entry.first_frame + entry.frames):
        store.read([frame], globe, every)
    with store.reading(file) as h5:
        for name, expected in _coordinates(store, entry).items():
            there = _values(h5[name])
            if name == SEQUENCE_NAME:  # others may have come since
                last = store.layout.time.numbers[entry.first_frame + entry.frames - 1]
                expected = expected[: max(len(there), last + 1)]
            if not np.array_equal(there, expected):
                raise OSError(f"its {name} is not that of the store")
        for name in h5.keys() - {*DIMS, SEQUENCE, SEQUENCE_NAME, "fields", "valid"}:
            _values(h5[name])


def _coordinates(store: Store, entry: FileEntry) -> dict[str, NDArray[Any]]:
    axis, frames = store.layout.time, range(entry.first_frame, entry.first_frame + entry.frames)
    seconds = axis.seconds[frames.start : frames.stop]
    names = [store.channels[channel] for channel in store.channels_in(entry)]
    values = (seconds, np.array(names, dtype=object), store.latitude_deg, store.longitude_deg)
    found = dict(zip(DIMS, values, strict=True))
    if axis.names:
        found[SEQUENCE] = axis.numbers[frames.start : frames.stop]
        found[SEQUENCE_NAME] = np.array(axis.names, dtype=object)
    return found


def _values(dataset: h5py.Dataset) -> NDArray[Any]:
    return np.asarray(dataset.asstr()[:] if h5py.check_string_dtype(dataset.dtype) else dataset[:])
