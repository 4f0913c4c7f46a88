"""Writing a store: files of fields shared out over ranks, each in slabs of bounded size."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from ..data.layout import (
    FORMAT_VERSION,
    MOMENTS,
    STATIC_FILE,
    STORE_FILE,
    FileEntry,
    Static,
    StaticFile,
    StoreContent,
    StoreLayout,
    digest_of,
    file_name,
)
from ..data.moments import ChannelMoments
from ..errors import InputError
from ..locks import locked_directory
from .comm import Comm
from .fields_file import SLAB_BYTES, FieldReader, SomeChannels, default_frames_per_file, write_fields_file
from .store_file import write_static_file, write_store_file
from .values import is_unsound

LOCK_FILE = ".lock"
Progress = Callable[[int, int], None]
"""Called with (files this rank has finished, files it has to write)."""


@dataclass(frozen=True)
class Part:
    """A file of fields that is to be written: which frames of which block of channels."""

    name: str
    frames: range
    block: int = 0

    def mark(self, request: str) -> str:
        """The fingerprint that it bears, of a request and its block: files of two blocks cannot be swapped unseen."""
        return f"{request}.{self.block}" if self.block else request


@dataclass(frozen=True, eq=False)
class Plan:
    """The files that a store will have, and which of them are to be written.

    Args:
        parts: the files of fields to write.
        static_name: the file of fields without time to write, if there is any.
        kept: files of fields of the store that is extended, which stay as they are.
        before: that store.
    """

    parts: tuple[Part, ...]
    static_name: str | None
    kept: tuple[FileEntry, ...] = ()
    before: StoreContent | None = None

    @property
    def names(self) -> set[str]:
        """Of the files to write."""
        return {part.name for part in self.parts} | ({self.static_name} if self.static_name else set())

    @classmethod
    def of(cls, layout: StoreLayout) -> "Plan":
        """Of a store that is made anew."""
        return cls(parts_from(layout, 0), STATIC_FILE if layout.static else None)


def parts_from(layout: StoreLayout, first: int, block: int = 0, number: int = 0) -> tuple[Part, ...]:
    """Files for the frames from some one on; those of a later block have as many frames as suit its channels.

    Args:
        number: of the first of these files, by which it is named.
    """
    size = layout.frames_per_file
    if block:
        size = min(size, default_frames_per_file(layout.grid_shape, len(layout.channels_of(block))))
    starts = range(first, len(layout.time), size)
    spans = [range(start, min(start + size, len(layout.time))) for start in starts]
    return tuple(Part(file_name(number + place), frames, block) for place, frames in enumerate(spans))


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


@contextmanager
def held_directory(output: Path, comm: Comm) -> Iterator[None]:
    """Collective. Keeps others from a finished store, whose content stays.

    Raises:
        InputError: somebody writes there.
    """
    with ExitStack() as stack:
        if comm.rank == 0:
            stack.enter_context(_claimed(output))
            for path in output.glob(".*.part"):
                path.unlink(missing_ok=True)
        comm.barrier()
        yield


def _clear(output: Path, *, overwrite: bool) -> None:
    finished = (output / STORE_FILE).exists()
    if finished and not overwrite:
        raise InputError(
            f"{output} is a finished store and is not overwritten. Give another --output, or "
            f"--overwrite; --extend adds to it."
        )
    fields = output.glob("fields-*.nc") if finished else ()  # of one that was cut short they may serve again
    static = output.glob("static*.nc")
    for path in [output / STORE_FILE, *static, *fields, *output.glob(".*.part")]:  # store.nc first: unfinished then
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
    plan: Plan | None = None,
) -> Written:
    """Collective. Writes the fields without time, the files of fields in turn over the ranks, then ``store.nc``.

    A file of this very request that is there already is kept. The statistics of each file are
    those of its own frames, merged in the order of files, so they do not depend on the ranks.

    Args:
        plan: what is to be written; default: all of a new store.
    """
    plan = plan or Plan.of(layout)
    mark = fingerprint(layout, request)
    _check_names(plan)
    if len(set(comm.allgather(mark))) > 1:
        raise InputError(
            f"the {comm.size} ranks see different sources for {output}: a source changes while it is read, or the "
            f"nodes do not share one file system. Wait until it is complete, and put it where all nodes see it."
        )
    statics, static_file = (plan.before.static, plan.before.static_file) if plan.before else ((), None)
    if comm.rank == 0 and plan.static_name is not None:
        path = output / plan.static_name
        with _writing(output):
            statics = write_static_file(path, layout, _sound(layout, static), mark)
            static_file = StaticFile(path.name, path.stat().st_size, mark)
    if comm.rank == 0 and plan.before is not None:
        _clear_replaced(output, plan, plan.before)
    comm.barrier()
    mine = plan.parts[comm.rank :: comm.size]
    kept = 0
    for done, part in enumerate(mine):
        if _is_finished(output / part.name, part.mark(mark)):
            kept += 1
        else:
            with _writing(output):
                own, some = layout.of_block(part.block), SomeChannels(reader, layout.channels_of(part.block))
                write_fields_file(output / part.name, own, some, part.frames, part.mark(mark), slab_bytes)
        if progress is not None:
            progress(done + 1, len(mine))
    comm.barrier()
    kept_files = sum(comm.allgather(kept))
    finished = None
    if comm.rank == 0:
        with _writing(output):
            finished = _finish(output, layout, plan, kept_files, mark, statics, static_file)
    written = comm.allgather(finished)[0]
    assert written is not None, "rank 0 finishes the store and tells the others"
    return written


def _check_names(plan: Plan) -> None:
    there = set(plan.before.names) if plan.before else set()
    assert there.isdisjoint(plan.names), "the store would be destroyed"


def _clear_replaced(output: Path, plan: Plan, before: StoreContent) -> None:
    """Takes away what an earlier extension has replaced: it was left to those who read the store by then."""
    for path in (*output.glob("fields-*.nc"), *output.glob("static*.nc")):
        if path.name not in {*before.names, *plan.names}:
            path.unlink()


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


def _finish(
    output: Path,
    layout: StoreLayout,
    plan: Plan,
    kept_files: int,
    mark: str,
    static: tuple[Static, ...],
    static_file: StaticFile | None,
) -> Written:
    """Merges the statistics of all files and writes store.nc."""
    entries, moments = _survey(output, layout, plan, mark)
    _check_statistics(layout, moments)
    first = plan.before.fingerprint if plan.before else mark
    if plan.before is None:
        for path in set(output.glob("fields-*.nc")) - {output / entry.name for entry in entries}:
            path.unlink()  # of an earlier, unfinished run with more files
    write_store_file(output, layout, entries, moments, first, static, static_file)
    return Written(entries, kept_files, any(moment.valid_cells < moment.cells for moment in moments))


def _is_finished(path: Path, mark: str) -> bool:
    """Whether a file is there, whole, and of the same request."""
    try:
        with h5py.File(path, "r", locking=False) as h5:
            return bool(h5.attrs.get("fingerprint") == mark)
    except OSError:  # not there, or cut off
        return False


def _survey(
    output: Path, layout: StoreLayout, plan: Plan, mark: str
) -> tuple[tuple[FileEntry, ...], list[ChannelMoments]]:
    """The table of files, and the moments of all their frames."""
    new = [
        FileEntry(
            one.name, one.frames.start, len(one.frames), (output / one.name).stat().st_size, one.mark(mark), one.block
        )
        for one in plan.parts
    ]
    entries = sorted([*plan.kept, *new], key=lambda entry: (entry.block, entry.first_frame))
    moments = [ChannelMoments() for _ in layout.channels]
    for entry in entries:
        path, own = output / entry.name, layout.channels_of(entry.block)
        with h5py.File(path, "r", locking=False) as h5:
            if h5.attrs.get("fingerprint") != entry.fingerprint:
                raise InputError(
                    f"{path} is of another request, although it was written by this one: another preparation writes to "
                    f"{output}. End one of them, and run this command again."
                )
            rows = h5[MOMENTS][:]
        for channel, row in zip(own, rows, strict=True):
            moments[channel] = moments[channel].merged(ChannelMoments.from_row(row))
    return tuple(entries), moments


def _check_statistics(layout: StoreLayout, moments: list[ChannelMoments]) -> None:
    for channel, moment in zip(layout.channels, moments, strict=True):
        if moment.valid_cells == 0:
            raise InputError(
                f"variable {channel.name!r} has no valid cell in any of {len(layout.time)} frames, so there is nothing "
                f"to learn from it. Leave it out: name the others with --variables."
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
