"""From any source xarray reads to a store, alone or with the ranks of an MPI job."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Unpack

from ..data.chunks import chunk_shape
from ..data.layout import SYNTHETIC, StoreLayout, are_synthetic
from ..errors import InputError
from .catalogue import Catalogue, build_catalogue
from .comm import Comm, SerialComm, alike, guarded
from .fields_file import default_frames_per_file
from .roles import SourceOptions, Taken
from .sources import expand
from .writer import Progress, Written, started_directory, write_store


@dataclass(frozen=True)
class PrepareSummary:
    """What a preparation made."""

    path: str
    channels: tuple[str, ...]
    static: tuple[str, ...]
    frames: int
    grid_shape: tuple[int, int]
    mesh: tuple[int, int]
    chunk_shape: tuple[int, int, int, int]
    files: int
    kept_files: int
    size_bytes: int
    has_missing: bool
    seconds: float
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def prepare(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    mesh: tuple[int, int] = (1, 1),
    frames_per_file: int | None = None,
    compression: int | None = None,
    overwrite: bool = False,
    comm: Comm | None = None,
    progress: Progress | None = None,
    command: str = "",
    **taken: Unpack[Taken],
) -> PrepareSummary:
    """Collective. Streams sources into a store.

    Variables and times may be spread over files. A killed run goes on: finished files of the same request are kept.

    Args:
        sources: NetCDF 3 or 4, zarr, GRIB (with cfgrib), plain HDF5 with ``fields``, or stores.
        output: directory of the store.
        mesh: tiles along latitude and longitude that shall read no other tile's bytes.
        frames_per_file: default: as many as fit 256 MiB, and at least 16.
        compression: gzip level 1 to 9; default none, which reads fastest.
        overwrite: replace a finished store.
        comm: ranks that share the work; default this process.
        progress: called after each file.
        command: kept in the store's provenance.
        taken: what of the sources, and how they are read; see `SourceOptions`.

    Raises:
        InputError: whatever is wrong with the request or the sources.
    """
    started = time.monotonic()
    comm = comm or SerialComm()
    options = SourceOptions.of(**taken)
    with guarded(comm):
        paths, catalogue, layout = alike(
            comm, lambda: _planned(sources, options, mesh, frames_per_file, compression, command)
        )
        refuse_own_source(Path(output), paths)
        request = request_of(options, paths)
        with started_directory(Path(output), comm, overwrite=overwrite):
            written = write_store(
                Path(output), layout, catalogue, request, comm=comm, static=catalogue.static_fields(), progress=progress
            )
    notes = (*catalogue.notes, *idle(len(written.files), comm))
    return summarise(Path(output), layout, written, time.monotonic() - started, notes)


def idle(files: int, comm: Comm) -> tuple[str, ...]:
    """What is said where there were more ranks than files to write."""
    if files >= comm.size:
        return ()
    return (f"{files} file(s) kept no more of {comm.size} ranks busy; use a smaller --frames-per-file.",)


def _planned(
    sources: Sequence[str | Path],
    options: SourceOptions,
    mesh: tuple[int, int],
    frames_per_file: int | None,
    compression: int | None,
    command: str,
) -> tuple[list[Path], Catalogue, StoreLayout]:
    """Opens all sources."""
    check_request(frames_per_file, compression)
    paths = expand([Path(source) for source in sources])
    catalogue = build_catalogue(paths, options)
    return paths, catalogue, _layout(catalogue, paths, mesh, frames_per_file, compression, command)


def check_request(frames_per_file: int | None, compression: int | None) -> None:
    """Judges the options that stand for themselves.

    Raises:
        InputError: naming the option.
    """
    if frames_per_file is not None and frames_per_file < 1:
        raise InputError(f"a file holds at least one frame, got {frames_per_file}. Use --frames-per-file 1 or more.")
    if compression is not None and not 1 <= compression <= 9:
        raise InputError(f"gzip has levels 1 to 9, got {compression}. Use --compression 1, or leave it out for none.")


def _layout(
    catalogue: Catalogue,
    paths: Sequence[Path],
    mesh: tuple[int, int],
    frames_per_file: int | None,
    compression: int | None,
    command: str,
) -> StoreLayout:
    grid = catalogue.grid
    shape = grid.latitude_deg.size, grid.longitude_deg.size
    channels = catalogue.channels
    return StoreLayout(
        latitude_deg=grid.latitude_deg,
        longitude_deg=grid.longitude_deg,
        channels=channels,
        time=catalogue.time,
        chunk=chunk_shape(shape, *mesh, len(channels)),
        mesh=mesh,
        frames_per_file=frames_per_file or default_frames_per_file(shape, len(channels)),
        static=tuple(one.channel for one in catalogue.static),
        compression=compression,
        provenance=provenance_of(command, paths, catalogue),
    )


def provenance_of(command: str, paths: Sequence[Path], catalogue: Catalogue) -> dict[str, Any]:
    """What a store says of where its fields come from."""
    return {
        "command": command,
        "sources": [str(path.resolve()) for path in paths],
        "versions": versions(),
        "notes": list(catalogue.notes),
    } | ({SYNTHETIC: True} if are_synthetic(paths) else {})


def refuse_own_source(output: Path, paths: Sequence[Path]) -> None:
    """Raises InputError for a source that lies in the store that is to be made."""
    inside = [path for path in paths if output.resolve() in (path.resolve(), *path.resolve().parents)]
    if inside:
        raise InputError(f"output {output} holds the source {inside[0]} and would destroy it. Give another --output.")


def request_of(options: SourceOptions, paths: Sequence[Path]) -> str:
    """What beside the layout determines what is written: options, and which sources these are."""
    return "\n".join([repr(options), *map(_identity, paths)])


def _identity(path: Path) -> str:
    """Where a source is, how large, and when it last changed; of a directory, its metadata files."""
    files = [path] if path.is_file() else sorted(entry for entry in path.glob("*") if entry.is_file())
    files += sorted(path.glob("*/zarr.json")) + sorted(path.glob("*/.zarray"))
    marks = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return f"{path.resolve()}: {', '.join(marks)}"


def versions() -> dict[str, str]:
    """Versions of what writes a store."""
    found = {}
    for package in ("faconv_hpc", "h5py", "h5netcdf", "xarray", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that is not installed
            found[package] = "unknown"
    return found


def summarise(
    output: Path, layout: StoreLayout, written: Written, seconds: float, notes: tuple[str, ...]
) -> PrepareSummary:
    """The summary of a written store."""
    return PrepareSummary(
        path=str(output),
        channels=tuple(channel.name for channel in layout.channels),
        static=tuple(channel.name for channel in layout.static),
        frames=len(layout.time),
        grid_shape=layout.grid_shape,
        mesh=layout.mesh,
        chunk_shape=layout.chunk.dims,
        files=len(written.files),
        kept_files=written.kept_files,
        size_bytes=sum(entry.size_bytes for entry in written.files),
        has_missing=written.has_missing,
        seconds=seconds,
        notes=notes,
    )
