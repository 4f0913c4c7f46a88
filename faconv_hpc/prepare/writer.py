"""Writing a store: files of fields shared out over ranks, each in slabs of bounded size."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import h5netcdf
import h5py
import numpy as np
from numpy.typing import NDArray

from ..data.layout import (
    DIMS,
    FORMAT_VERSION,
    MOMENTS,
    STATIC_FILE,
    STORE_FILE,
    FileEntry,
    Static,
    StoreLayout,
    digest_of,
    file_name,
)
from ..data.moments import ChannelMoments, MomentStream
from ..data.periods import stretches_of
from ..data.statistics import row_weights
from ..errors import InputError
from ..locks import locked_directory
from ..spatial.grid import Span
from .comm import Comm
from .hdf5_file import ForgivingFile, new_netcdf
from .store_file import CONVENTIONS, write_coordinates, write_static_file, write_store_file
from .values import is_unsound

SLAB_BYTES = 64 * 1024 * 1024  # float32 values of one slab; float64 copies for statistics come on top
LOCK_FILE = ".lock"
Progress = Callable[[int, int], None]
"""Called with (files this rank has finished, files it has to write)."""


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
class Written:
    """What was written, over all ranks."""

    files: tuple[FileEntry, ...]
    kept_files: int
    has_missing: bool


def fingerprint(layout: StoreLayout, request: str) -> str:
    """SHA-256 of all that determines the content of the files of fields.

    Args:
        request: what the layout does not tell, such as the sources' sizes and dates.
    """
    rest = {
        "version": FORMAT_VERSION,
        "channels": [asdict(channel) for channel in layout.channels],
        "static": [asdict(channel) for channel in layout.static],
        "calendar": layout.time.calendar,
        "chunk": layout.chunk.dims,
        "frames_per_file": layout.frames_per_file,
        "compression": layout.compression,
        "request": request,
        **layout.time.said_of_sequences,
    }
    return digest_of((layout.latitude_deg, layout.longitude_deg, layout.time.seconds), rest)


@contextmanager
def started_directory(output: Path, comm: Comm, *, overwrite: bool) -> Iterator[None]:
    """Collective. Makes the directory, keeps others from it, and takes away what is left of earlier runs.

    Finished files of fields stay where the run was not finished: they may serve again.

    Raises:
        InputError: a finished store is there and may not be overwritten, it is a file, or somebody writes there.
    """
    with ExitStack() as stack:
        if comm.rank == 0:
            stack.enter_context(_claimed(output))
            _clear(output, overwrite=overwrite)
        comm.barrier()
        yield


@contextmanager
def _claimed(output: Path) -> Iterator[None]:
    if output.exists() and not output.is_dir():
        raise InputError(f"output {output} is a file, but a store is a directory. Give another --output.")

    def refusal(holder: str) -> InputError:
        return InputError(
            f"another preparation writes to {output}: {holder or 'unknown'}. Wait for it, or give another --output."
        )

    with locked_directory(output / LOCK_FILE, "output", refusal):
        yield


def _clear(output: Path, *, overwrite: bool) -> None:
    finished = (output / STORE_FILE).exists()
    if finished and not overwrite:
        raise InputError(f"{output} is a finished store and is not overwritten. Give another --output, or --overwrite.")
    fields = output.glob("fields-*.nc") if finished else ()  # of one that was cut short they may serve again
    old = (output / STORE_FILE, output / STATIC_FILE)  # store.nc first: from then on unfinished
    for path in [*old, *fields, *output.glob(".*.part")]:
        path.unlink(missing_ok=True)


def write_store(
    output: Path,
    layout: StoreLayout,
    reader: FieldReader,
    request: str,
    *,
    comm: Comm,
    static: Iterable[NDArray[np.float32]] = (),
    progress: Progress | None = None,
    slab_bytes: int = SLAB_BYTES,
) -> Written:
    """Collective. Writes ``static.nc``, the files of fields in turn over the ranks, then ``store.nc``.

    A file of this very request that is there already is kept. The statistics of each file are
    those of its own frames, merged in the order of files, so they do not depend on the ranks.
    """
    mark = fingerprint(layout, request)
    if len(set(comm.allgather(mark))) > 1:
        raise InputError(
            f"the {comm.size} ranks see different sources for {output}: a source changes while it is read, or the "
            f"nodes do not share one file system. Wait until it is complete, and put it where all nodes see it."
        )
    statics: tuple[Static, ...] = ()
    if comm.rank == 0 and layout.static:
        with _writing(output):
            statics = write_static_file(output, layout, _sound(layout, static), mark)
    mine = range(comm.rank, layout.files, comm.size)
    kept = 0
    for done, file in enumerate(mine):
        if _is_finished(output / file_name(file), mark):
            kept += 1
        else:
            with _writing(output):
                _write_file(output, layout, reader, file, mark, slab_bytes)
        if progress is not None:
            progress(done + 1, len(mine))
    comm.barrier()
    kept_files = sum(comm.allgather(kept))
    finished = None
    if comm.rank == 0:
        with _writing(output):
            finished = _finish(output, layout, kept_files, mark, statics)
    written = comm.allgather(finished)[0]
    assert written is not None, "rank 0 finishes the store and tells the others"
    return written


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """What the reader cannot read is an InputError already."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(output, error) from None


def _cannot_write(output: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot write to {output} ({error.strerror or error}). Check the directory's rights and the space left (df, "
        f"quota), then run the same command again: what is finished is kept."
    )


def _finish(output: Path, layout: StoreLayout, kept_files: int, mark: str, static: tuple[Static, ...]) -> Written:
    """Merges the statistics of all files and writes store.nc."""
    entries, moments = _survey(output, layout, mark)
    _check_statistics(layout, moments)
    for path in set(output.glob("fields-*.nc")) - {output / entry.name for entry in entries}:
        path.unlink()  # of an earlier, unfinished run with more files
    write_store_file(output, layout, entries, moments, mark, static)
    return Written(entries, kept_files, any(moment.valid_cells < moment.cells for moment in moments))


def _is_finished(path: Path, mark: str) -> bool:
    """Whether a file is there, whole, and of the same request."""
    try:
        with h5py.File(path, "r", locking=False) as h5:
            return bool(h5.attrs.get("fingerprint") == mark)
    except OSError:  # not there, or cut off
        return False


def _survey(output: Path, layout: StoreLayout, mark: str) -> tuple[tuple[FileEntry, ...], list[ChannelMoments]]:
    """The table of files, and the moments of all their frames."""
    entries = []
    moments = [ChannelMoments() for _ in layout.channels]
    for file in range(layout.files):
        path, frames = output / file_name(file), layout.frames_of(file)
        with h5py.File(path, "r", locking=False) as h5:
            if h5.attrs.get("fingerprint") != mark:
                raise InputError(
                    f"{path} is of another request, although it was written by this one: another preparation writes to "
                    f"{output}. End one of them, and run this command again."
                )
            rows = h5[MOMENTS][:]
        moments = [moment.merged(ChannelMoments.from_row(row)) for moment, row in zip(moments, rows, strict=True)]
        entries.append(FileEntry(path.name, frames.start, len(frames), path.stat().st_size))
    return tuple(entries), moments


def _check_statistics(layout: StoreLayout, moments: list[ChannelMoments]) -> None:
    for channel, moment in zip(layout.channels, moments, strict=True):
        if moment.valid_cells == 0:
            raise InputError(
                f"variable {channel.name!r} has no valid cell in any of {len(layout.time)} frames, so there is nothing "
                f"to learn from it. Leave it out: name the others with --variables."
            )


def _write_file(output: Path, layout: StoreLayout, reader: FieldReader, file: int, mark: str, slab_bytes: int) -> None:
    """Writes one file of fields; it appears whole or not at all."""
    frames = layout.frames_of(file)
    with new_netcdf(output / file_name(file)) as (nc, disk):
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


def _sound(layout: StoreLayout, static: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """The static fields, if all their values are numbers."""
    for channel, field_YX in zip(layout.static, static, strict=True):
        bad = is_unsound(field_YX)
        if bad.any():
            y, x = (int(index[0]) for index in np.nonzero(bad))
            raise InputError(
                f"the static variable {channel.name!r} is {field_YX[y, x]} at latitude {layout.latitude_deg[y]:g}, "
                f"longitude {layout.longitude_deg[x]:g}: cells are missing, and nothing would say where. Fill them in "
                f"the source, or name the variables to take with --variables."
            )
        yield field_YX


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
