"""Mean and deviations over some frames of a store, exact: from the moments that each of its files has."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..spatial.grid import LatLonGrid, Tile
from .layout import MOMENTS, FileEntry
from .moments import ChannelMoments, MomentStream
from .periods import stretches_of
from .store import Store

Stretches = Sequence[range]
"""Frames that follow each other, see `periods.stretches_of`; in their order."""
Seen = Mapping[int, Callable[[NDArray[np.float32], int], NDArray[np.float32]]]
"""Channels of which not the field itself counts, (Y, X), but what is made of it and of the number of its frame."""
ROUNDING = 2.0**-23  # of float32, relative


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of some channels, in physical units, area-weighted over all valid cells and times of some frames.

    Attributes:
        mean, std: (channel,) float64.
        tendency_std: (channel,) float64, of the change from a frame to the next; 0 if all are equal.
    """

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    tendency_std: NDArray[np.float64]

    @classmethod
    def of(cls, moments: Iterable[ChannelMoments]) -> "Statistics":
        """From the moments of each channel."""
        rows = [(one.value.mean, one.value.std, one.tendency.std) for one in moments]
        mean, std, tendency_std = np.array(rows, dtype=np.float64).reshape(-1, 3).T
        settled = std <= ROUNDING * np.abs(mean)  # what float32 makes of one number is no change
        return cls(mean, np.where(settled, 0.0, std), np.where(settled, 0.0, tendency_std))

    @property
    def rows(self) -> NDArray[np.float64]:
        """(channel, 3) mean, std, tendency_std."""
        return np.stack([self.mean, self.std, self.tendency_std], axis=1)


@dataclass(frozen=True)
class Piece:
    """A part of the work of summing up some frames: channels of one file."""

    file: int
    channels: tuple[int, ...]


def pieces_of(
    store: Store, frames: Stretches, channels: Sequence[int], seen: Collection[int]
) -> tuple[list[Piece], list[Piece]]:
    """All that there is to do for `moments_of`, in the order of files: what files have kept, which is soon read; and
    what takes the fields themselves. By whom it is done does not change what comes out.

    A file whose frames all count, and the frame after them, has kept its moments: those of all channels are read at
    once. Of the files at the limits, and of channels of which something else counts, the fields are read, each channel
    on its own.
    """
    kept: list[Piece] = []
    read: list[Piece] = []
    for file, entry in enumerate(store.files):
        own = [one for one in channels if one in store.channels_in(entry)]
        if own and _own(entry, frames):
            known = [one for one in own if one not in seen] if _is_whole(store, entry, frames) else []
            kept += [Piece(file, tuple(known))] * bool(known)
            read += [Piece(file, (channel,)) for channel in own if channel not in known]
    return kept, read


def moments_of(store: Store, piece: Piece, frames: Stretches, seen: Seen) -> dict[int, ChannelMoments]:
    """By channel, over those of some frames that a file has and the changes from each to the next of its stretch.

    Raises:
        InputError: the file is missing or damaged.
    """
    entry = store.files[piece.file]
    if _is_whole(store, entry, frames) and seen.keys().isdisjoint(piece.channels):
        with store.reading(piece.file) as h5:
            rows = h5[MOMENTS][:]
        first = store.channels_in(entry).start
        return {channel: ChannelMoments.from_row(rows[channel - first]) for channel in piece.channels}
    return {channel: _read(store, _own(entry, frames), channel, seen) for channel in piece.channels}


def merged(found: Iterable[Mapping[int, ChannelMoments]]) -> dict[int, ChannelMoments]:
    """Of all pieces together, which come in their order."""
    whole: dict[int, ChannelMoments] = {}
    for part in found:
        for channel, moments in part.items():
            whole[channel] = whole.get(channel, ChannelMoments()).merged(moments)
    return whole


def _own(entry: FileEntry, frames: Stretches) -> list[tuple[range, bool]]:
    """The frames of a file that count, by stretches, and whether each of these goes on in the next file."""
    first, stop = entry.first_frame, entry.first_frame + entry.frames
    parts = [(range(max(one.start, first), min(one.stop, stop)), one.stop > stop) for one in frames]
    return [(part, goes_on) for part, goes_on in parts if part]


def _is_whole(store: Store, entry: FileEntry, frames: Stretches) -> bool:
    """Whether what a file has kept is what counts: it holds the changes over no gap, and to the next file's first."""
    axis, stop = store.layout.time, entry.first_frame + entry.frames
    parts = stretches_of(axis, [range(entry.first_frame, stop)])
    goes_on = stop < store.frames and stop not in axis.gaps
    return _own(entry, frames) == [(part, goes_on and part.stop == stop) for part in parts]


def _read(store: Store, own: Iterable[tuple[range, bool]], channel: int, seen: Seen) -> ChannelMoments:
    nlat, nlon = store.layout.grid_shape
    globe, weights = Tile((0, nlat), (0, nlon)), row_weights(store.latitude_deg, store.longitude_deg)
    found = ChannelMoments()

    def field_of(frame: int) -> NDArray[np.float32]:
        field_YX = store.read([frame], globe, [channel])[0][0, 0]
        return seen[channel](field_YX, frame) if channel in seen else field_YX

    for part, goes_on in own:
        stream = MomentStream(weights)
        for frame in part:
            stream.add(field_of(frame)[None])
        if goes_on:
            stream.add_following(field_of(part.stop))
        found = found.merged(stream.moments)
    return found


def row_weights(latitude_deg: NDArray[np.float64], longitude_deg: NDArray[np.float64]) -> NDArray[np.float64]:
    """(latitude,) area of a cell of each row, in units of the mean one."""
    shape = latitude_deg.size, longitude_deg.size
    grid = LatLonGrid(*shape, latitude_deg=latitude_deg, longitude_deg=longitude_deg, lon_boundary="zero")
    areas = grid.cell_area_sr
    return np.asarray(areas / areas.mean(), dtype=np.float64)
