"""Writing one file of fields, in slabs of bounded size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import h5netcdf
import numpy as np
from numpy.typing import NDArray

from ..data.chunks import VALUE_BYTES
from ..data.layout import DIMS, MOMENTS, StoreLayout
from ..data.moments import ChannelMoments, MomentStream
from ..data.periods import stretches_of
from ..data.statistics import row_weights
from ..errors import InputError
from ..spatial.grid import Span
from .hdf5_file import ForgivingFile, new_netcdf
from .store_file import CONVENTIONS, write_coordinates
from .values import is_unsound

SLAB_BYTES = 64 * 1024 * 1024  # float32 values of one slab; float64 copies for statistics come on top
FILE_BYTES = 256 * 1024 * 1024  # of fields in one file, unless the user says how many frames
LEAST_FRAMES = 16  # in one file of large frames: a store of years has thousands of files then, not a hundred thousand


def default_frames_per_file(grid_shape: tuple[int, int], channels: int) -> int:
    """As many frames as fit ``FILE_BYTES``, or ``LEAST_FRAMES``; it depends on nothing but the fields' size."""
    return max(LEAST_FRAMES, FILE_BYTES // (grid_shape[0] * grid_shape[1] * channels * VALUE_BYTES))


class FieldReader(Protocol):
    """Where the fields of a new store come from."""

    @property
    def groups(self) -> Sequence[range]:
        """All channels in order, in parts that are best read together, such as the levels of one variable."""

    def read(self, frames: range, channels: range, rows: Span) -> NDArray[np.float32]:
        """fields_TCYX of consecutive frames and channels, some rows (north first), all columns.

        NaN where data are missing.
        """


@dataclass(frozen=True)
class SomeChannels:
    """Some channels of a reader, that follow each other, as if there were no others."""

    whole: FieldReader
    channels: range

    @property
    def groups(self) -> list[range]:
        """Those of the reader, as far as they are among them."""
        first, stop = self.channels.start, self.channels.stop
        found = [range(max(one.start, first), min(one.stop, stop)) for one in self.whole.groups]
        return [range(one.start - first, one.stop - first) for one in found if one]

    def read(self, frames: range, channels: range, rows: Span) -> NDArray[np.float32]:
        """As the reader does."""
        first = self.channels.start
        return self.whole.read(frames, range(channels.start + first, channels.stop + first), rows)


def write_fields_file(
    path: Path, layout: StoreLayout, reader: FieldReader, frames: range, mark: str, slab_bytes: int
) -> None:
    """Writes some frames of all channels of a layout; the file appears whole or not at all.

    Raises:
        InputError: values that no field has; or what the reader raises.
        OSError: it cannot be written.
    """
    with new_netcdf(path) as (nc, disk):
        write_coordinates(nc, layout, frames)
        fields = _create(nc, layout, "fields", np.float32, np.float32(np.nan), layout.compression)
        fields.attrs["long_name"] = "one field per channel, units as in store.nc"
        moments = _write_slabs(nc, disk, layout, reader, frames, slab_bytes)
        nc.attrs["Conventions"] = CONVENTIONS
        rows = np.array([moment.as_row() for moment in moments])
        nc.dimensions["moment"] = rows.shape[1]
        checked = nc.create_variable(MOMENTS, ("channel", "moment"), np.float64, chunks=rows.shape, fletcher32=True)
        checked[:] = rows  # serve when a killed run goes on
        nc.attrs["first_frame"] = np.int64(frames.start)
        nc.attrs["fingerprint"] = mark


def _create(
    nc: h5netcdf.File, layout: StoreLayout, name: str, dtype: type, fill: np.generic, compression: int | None
) -> h5netcdf.Variable:
    # A channel count or grid smaller than the chunk cannot be: chunks come from the grid itself.
    filters = {"compression": "gzip", "compression_opts": compression, "shuffle": True} if compression else {}
    return nc.create_variable(name, DIMS, dtype, chunks=layout.chunk.dims, fillvalue=fill, fletcher32=True, **filters)


def _write_slabs(
    nc: h5netcdf.File, disk: ForgivingFile, layout: StoreLayout, reader: FieldReader, frames: range, slab_bytes: int
) -> list[ChannelMoments]:
    weights, gaps = row_weights(layout.latitude_deg, layout.longitude_deg), {*layout.time.gaps.tolist()}
    moments = [ChannelMoments() for _ in layout.channels]
    for channels, rows in _columns_of_work(layout, reader.groups, slab_bytes):
        collected = [MomentStream(weights[slice(*rows)]) for _ in channels]
        for block in _blocks(frames, layout, channels, rows, slab_bytes):
            slab_TCYX = _read_slab(layout, reader, block, channels, rows)
            _store_slab(nc, layout, slab_TCYX, block.start - frames.start, channels, rows)
            disk.raise_error()
            for part in stretches_of(layout.time, [block]):
                for index, stream in enumerate(collected):
                    if part.start in gaps:
                        stream.begin_anew()
                    stream.add(slab_TCYX[part.start - block.start : part.stop - block.start, index])
        if frames.stop < len(layout.time) and frames.stop not in gaps:  # the change to the next file's first frame
            after = range(frames.stop, frames.stop + 1)
            following_TCYX = _read_slab(layout, reader, after, channels, rows)
            for index, stream in enumerate(collected):
                stream.add_following(following_TCYX[0, index])
        for channel, stream in zip(channels, collected, strict=True):
            moments[channel] = moments[channel].merged(stream.moments)
    return moments


def _columns_of_work(layout: StoreLayout, groups: Sequence[range], slab_bytes: int) -> Iterator[tuple[range, Span]]:
    """Channels and rows that are written together: whole chunks, at least one frame within a slab."""
    nlat, nlon = layout.grid_shape
    step, count = layout.chunk.channels, len(layout.channels)
    parts = groups if step == 1 else [range(first, first + step) for first in range(0, count, step)]
    for channels in parts:
        row_bytes = nlon * 4 * len(channels)
        height = max(1, slab_bytes // (row_bytes * layout.chunk.rows)) * layout.chunk.rows
        for row in range(0, nlat, height):
            yield channels, (row, min(row + height, nlat))


def _blocks(frames: range, layout: StoreLayout, channels: range, rows: Span, slab_bytes: int) -> Iterator[range]:
    frame_bytes = (rows[1] - rows[0]) * layout.grid_shape[1] * 4 * len(channels)
    count = max(1, slab_bytes // frame_bytes)
    for start in range(frames.start, frames.stop, count):
        yield range(start, min(start + count, frames.stop))


def _read_slab(
    layout: StoreLayout, reader: FieldReader, frames: range, channels: range, rows: Span
) -> NDArray[np.float32]:
    """fields_TCYX of a slab, checked."""
    slab_TCYX = reader.read(frames, channels, rows)
    _check_values(layout, slab_TCYX, frames, channels, rows)
    return slab_TCYX


def _check_values(
    layout: StoreLayout, slab_TCYX: NDArray[np.float32], frames: range, channels: range, rows: Span
) -> None:
    bad = is_unsound(slab_TCYX) & ~np.isnan(slab_TCYX)
    if bad.any():
        t, c, y, x = (int(index[0]) for index in np.nonzero(bad))
        raise InputError(
            f"variable {layout.channels[channels[c]].name!r} is {slab_TCYX[t, c, y, x]} at "
            f"{layout.time.label(frames[t])} (frame {frames[t]}), latitude {layout.latitude_deg[rows[0] + y]:g}, "
            f"longitude {layout.longitude_deg[x]:g}: no field is that large. If it marks missing data, say so "
            f"with --missing-value, or set the variable's attribute _FillValue in the source."
        )


def _store_slab(
    nc: h5netcdf.File, layout: StoreLayout, slab_TCYX: NDArray[np.float32], frame: int, channels: range, rows: Span
) -> None:
    target = np.s_[frame : frame + len(slab_TCYX), channels.start : channels.stop, slice(*rows)]
    nc["fields"][target] = slab_TCYX
    missing = np.isnan(slab_TCYX)
    if missing.any():
        if "valid" not in nc.variables:
            # What is not written reads as the fill value 1, valid; as an attribute it would mean missing.
            valid = _create(nc, layout, "valid", np.uint8, np.uint8(1), 1)
            del valid.attrs["_FillValue"]
            valid.attrs.update(long_name="1 where the field is valid, 0 where it is missing")
        nc["valid"][target] = ~missing
