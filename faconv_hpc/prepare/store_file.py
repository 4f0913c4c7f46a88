"""Writing what describes a store: coordinates in every file, and store.nc; see data/layout.py for what it means."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import h5netcdf
import h5py
import numpy as np
from numpy.typing import NDArray

from ..data.layout import (
    DIMS,
    EXTENDED_VERSION,
    FORMAT,
    FORMAT_VERSION,
    SEQUENCE,
    SEQUENCE_NAME,
    STORE_FILE,
    FileEntry,
    Static,
    StaticFile,
    StoreContent,
    StoreLayout,
)
from ..data.moments import ChannelMoments, Moments
from ..data.statistics import Statistics, row_weights
from ..data.times import EPOCH_UNITS
from .hdf5_file import new_netcdf

CONVENTIONS = "CF-1.8"


def write_coordinates(nc: h5netcdf.File, layout: StoreLayout, frames: range) -> None:
    """Dimensions, coordinates and their attributes, the same in every file of a store."""
    sizes = (len(frames), len(layout.channels), *layout.grid_shape)
    nc.dimensions = dict(zip(DIMS, sizes, strict=True))
    time = nc.create_variable("time", ("time",), np.int64)
    time[:] = layout.time.seconds[frames.start : frames.stop]
    time.attrs.update(standard_name="time", axis="T", units=EPOCH_UNITS, calendar=layout.time.calendar)
    if layout.time.names:
        nc.dimensions["sequences"] = len(layout.time.names)
        number = nc.create_variable(SEQUENCE, ("time",), np.int64)
        number[:] = layout.time.numbers[frames.start : frames.stop]
        number.attrs["long_name"] = f"number of the sequence in {SEQUENCE_NAME}"
        write_strings(nc, SEQUENCE_NAME, "sequences", layout.time.names)
    write_strings(nc, "channel", "channel", [channel.name for channel in layout.channels])
    _write_grid(nc, layout)


def _write_grid(nc: h5netcdf.File, layout: StoreLayout) -> None:
    for name, values, axis, direction in (
        ("latitude", layout.latitude_deg, "Y", "north"),
        ("longitude", layout.longitude_deg, "X", "east"),
    ):
        variable = nc.create_variable(name, (name,), np.float64)
        variable[:] = values
        variable.attrs.update(standard_name=name, axis=axis, units=f"degrees_{direction}")


def write_strings(nc: h5netcdf.File, name: str, dim: str, texts: Sequence[str]) -> None:
    """A variable of texts."""
    nc.create_variable(name, (dim,), h5py.string_dtype())[:] = np.array(list(texts), dtype=object)


def write_static_file(
    path: Path, layout: StoreLayout, fields: Iterable[NDArray[np.float32]], mark: str
) -> tuple[Static, ...]:
    """Writes the fields without time, a variable for each (Y, X); the file appears whole or not at all."""
    found, weights = [], row_weights(layout.latitude_deg, layout.longitude_deg)
    with new_netcdf(path) as (nc, disk):
        nc.dimensions = dict(zip(DIMS[2:], layout.grid_shape, strict=True))
        _write_grid(nc, layout)
        for channel, field_YX in zip(layout.static, fields, strict=True):
            chunks = layout.chunk.dims[2:]
            variable = nc.create_variable(channel.name, DIMS[2:], np.float32, chunks=chunks, fletcher32=True)
            variable[:] = field_YX
            variable.attrs.update(units=channel.units, long_name=channel.long_name)
            disk.raise_error()
            mean, std, _ = Statistics.of([ChannelMoments(Moments.of(field_YX[None], weights))]).rows[0].tolist()
            found.append(Static(channel, mean, std))
        nc.attrs.update(Conventions=CONVENTIONS, fingerprint=mark)
    return tuple(found)


def write_store_file(
    directory: Path,
    layout: StoreLayout,
    files: tuple[FileEntry, ...],
    moments: Sequence[ChannelMoments],
    mark: str,
    static: tuple[Static, ...] = (),
    static_file: StaticFile | None = None,
) -> None:
    """Writes store.nc: it appears whole or not at all.

    Args:
        mark: the fingerprint of the request that the store was first made by.
        static: what `write_static_file` has written, and where.
    """
    statistics = Statistics.of(moments)
    content = StoreContent(
        layout=layout,
        files=files,
        fingerprint=mark,
        mean=statistics.mean,
        std=statistics.std,
        tendency_std=statistics.tendency_std,
        valid_share=np.array([moment.valid_cells / moment.cells for moment in moments]),
        year_fraction=layout.time.year_fraction,
        utc_hour=layout.time.utc_hour,
        has_missing=any(moment.valid_cells < moment.cells for moment in moments),
        static=static,
        static_file=static_file,
    )
    with new_netcdf(directory / STORE_FILE) as (nc, _):
        write_coordinates(nc, layout, range(len(layout.time)))
        _write_channels(nc, content)
        for name in ("year_fraction", "utc_hour"):
            nc.create_variable(name, ("time",), np.float64)[:] = getattr(content, name)
        _write_file_table(nc, files)
        if static_file is not None:
            _write_static_table(nc, content, static_file)
        if content.is_extended:
            _write_additions(nc, content)
        _write_attributes(nc, content)


def _write_channels(nc: h5netcdf.File, content: StoreContent) -> None:
    write_strings(nc, "units", "channel", [channel.units for channel in content.layout.channels])
    write_strings(nc, "long_name", "channel", [channel.long_name for channel in content.layout.channels])
    meanings = {
        "mean": "area-weighted mean over valid cells",
        "std": "area-weighted standard deviation over valid cells",
        "tendency_std": "area-weighted standard deviation of the difference of consecutive frames",
        "valid_share": "share of cells that are valid",
    }
    for name, meaning in meanings.items():
        variable = nc.create_variable(name, ("channel",), np.float64)
        variable[:] = getattr(content, name)
        variable.attrs["long_name"] = meaning


def _write_file_table(nc: h5netcdf.File, files: Sequence[FileEntry]) -> None:
    nc.dimensions["file"] = len(files)
    write_strings(nc, "file", "file", [entry.name for entry in files])
    for name in ("first_frame", "frames", "size_bytes"):
        nc.create_variable(name, ("file",), np.int64)[:] = np.array([getattr(entry, name) for entry in files])


def _write_static_table(nc: h5netcdf.File, content: StoreContent, file: StaticFile) -> None:
    nc.dimensions["static"] = len(content.static)
    for name, key in (("static", "name"), ("static_units", "units"), ("static_long_name", "long_name")):
        write_strings(nc, name, "static", [getattr(one.channel, key) for one in content.static])
    for name in ("mean", "std"):
        numbers = [getattr(one, name) for one in content.static]
        nc.create_variable(f"static_{name}", ("static",), np.float64)[:] = np.array(numbers)
    nc.attrs["static_bytes"] = np.int64(file.size_bytes)


def _write_additions(nc: h5netcdf.File, content: StoreContent) -> None:
    """Which file was made by which request, and holds which channels."""
    write_strings(nc, "file_fingerprint", "file", [entry.fingerprint for entry in content.files])
    nc.create_variable("file_block", ("file",), np.int64)[:] = np.array([entry.block for entry in content.files])
    nc.attrs["blocks"] = np.array(content.layout.blocks, dtype=np.int64)
    if content.static_file is not None:
        nc.attrs["static_file"], nc.attrs["static_made"] = content.static_file.name, content.static_file.fingerprint


def _write_attributes(nc: h5netcdf.File, content: StoreContent) -> None:
    layout = content.layout
    nc.attrs["Conventions"] = CONVENTIONS
    nc.attrs["format"] = FORMAT
    nc.attrs["format_version"] = np.int64(EXTENDED_VERSION if content.is_extended else FORMAT_VERSION)
    nc.attrs["chunk_shape"] = np.array(layout.chunk.dims, dtype=np.int64)
    nc.attrs["intended_mesh"] = np.array(layout.mesh, dtype=np.int64)
    nc.attrs["frames_per_file"] = np.int64(layout.frames_per_file)
    nc.attrs["compression"] = np.int64(layout.compression or 0)
    nc.attrs["has_missing"] = np.int64(content.has_missing)
    nc.attrs["provenance"] = json.dumps(layout.provenance, sort_keys=True)
    nc.attrs["fingerprint"] = content.fingerprint
    nc.attrs["digest"] = content.digest
