"""What a store looks like on disk: names, the description of its content, and store.nc.

A store is a directory. ``fields-00000.nc``, ``fields-00001.nc``, ... hold the same number of
frames each (the last one the rest); ``store.nc`` holds everything else and is written last, so a
directory without it is not finished. All are NetCDF4: any tool opens them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5netcdf
import h5py
import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .chunks import ChunkShape
from .hdf5_file import replacing
from .moments import ChannelMoments
from .times import EPOCH_UNITS, TimeAxis

FORMAT = "faconv_hpc store"
FORMAT_VERSION = 1
STORE_FILE = "store.nc"
CONVENTIONS = "CF-1.8"
DIMS = ("time", "channel", "latitude", "longitude")


@dataclass(frozen=True)
class Channel:
    """One field of a store."""

    name: str
    units: str = ""
    long_name: str = ""


@dataclass(frozen=True)
class FileEntry:
    """One file of fields: where its frames stand among all, and its size when it was finished."""

    name: str
    first_frame: int
    frames: int
    size_bytes: int


@dataclass(frozen=True, eq=False)
class StoreLayout:
    """All that is decided before the first frame is written.

    Args:
        latitude_deg: (latitude,) float64, north first.
        longitude_deg: (longitude,) float64, increasing.
        compression: gzip level 1 to 9, or None.
        provenance: JSON-like: sources, command, versions.
    """

    latitude_deg: NDArray[np.float64]
    longitude_deg: NDArray[np.float64]
    channels: tuple[Channel, ...]
    time: TimeAxis
    chunk: ChunkShape
    mesh: tuple[int, int]
    frames_per_file: int
    compression: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(nlat, nlon)."""
        return self.latitude_deg.size, self.longitude_deg.size

    @property
    def files(self) -> int:
        """Number of files of fields."""
        return -(-len(self.time) // self.frames_per_file)

    def frames_of(self, file: int) -> range:
        """The frames that a file holds."""
        first = file * self.frames_per_file
        return range(first, min(first + self.frames_per_file, len(self.time)))


def file_name(file: int) -> str:
    """Name of a file of fields."""
    return f"fields-{file:05d}.nc"


def write_coordinates(nc: h5netcdf.File, layout: StoreLayout, frames: range) -> None:
    """Dimensions, coordinates and their attributes, the same in every file of a store."""
    sizes = (len(frames), len(layout.channels), *layout.grid_shape)
    nc.dimensions = dict(zip(DIMS, sizes, strict=True))
    time = nc.create_variable("time", ("time",), np.int64)
    time[:] = layout.time.seconds[frames.start : frames.stop]
    time.attrs.update(standard_name="time", axis="T", units=EPOCH_UNITS, calendar=layout.time.calendar)
    write_strings(nc, "channel", "channel", [channel.name for channel in layout.channels])
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


def write_store_file(
    directory: Path, layout: StoreLayout, files: Sequence[FileEntry], moments: Sequence[ChannelMoments]
) -> None:
    """Writes store.nc: it appears whole or not at all."""
    with replacing(directory / STORE_FILE) as (nc, _):
        write_coordinates(nc, layout, range(len(layout.time)))
        _write_channels(nc, layout.channels, moments)
        for name, values in (("year_fraction", layout.time.year_fraction), ("utc_hour", layout.time.utc_hour)):
            nc.create_variable(name, ("time",), np.float64)[:] = values
        _write_file_table(nc, files)
        _write_attributes(nc, layout, moments)


def _write_channels(nc: h5netcdf.File, channels: Sequence[Channel], moments: Sequence[ChannelMoments]) -> None:
    write_strings(nc, "units", "channel", [channel.units for channel in channels])
    write_strings(nc, "long_name", "channel", [channel.long_name for channel in channels])
    columns = {
        "mean": ([moment.value.mean for moment in moments], "area-weighted mean over valid cells"),
        "std": ([moment.value.std for moment in moments], "area-weighted standard deviation over valid cells"),
        "tendency_std": (
            [moment.tendency.std for moment in moments],
            "area-weighted standard deviation of the difference of consecutive frames",
        ),
        "valid_share": ([moment.valid_cells / moment.cells for moment in moments], "share of cells that are valid"),
    }
    for name, (values, meaning) in columns.items():
        variable = nc.create_variable(name, ("channel",), np.float64)
        variable[:] = np.array(values)
        variable.attrs["long_name"] = meaning


def _write_file_table(nc: h5netcdf.File, files: Sequence[FileEntry]) -> None:
    nc.dimensions["file"] = len(files)
    write_strings(nc, "file", "file", [entry.name for entry in files])
    for name in ("first_frame", "frames", "size_bytes"):
        nc.create_variable(name, ("file",), np.int64)[:] = np.array([getattr(entry, name) for entry in files])


def _write_attributes(nc: h5netcdf.File, layout: StoreLayout, moments: Sequence[ChannelMoments]) -> None:
    nc.attrs["Conventions"] = CONVENTIONS
    nc.attrs["format"] = FORMAT
    nc.attrs["format_version"] = np.int64(FORMAT_VERSION)
    nc.attrs["chunk_shape"] = np.array(layout.chunk.dims, dtype=np.int64)
    nc.attrs["intended_mesh"] = np.array(layout.mesh, dtype=np.int64)
    nc.attrs["frames_per_file"] = np.int64(layout.frames_per_file)
    nc.attrs["compression"] = np.int64(layout.compression or 0)
    nc.attrs["has_missing"] = np.int64(any(moment.valid_cells < moment.cells for moment in moments))
    nc.attrs["provenance"] = json.dumps(layout.provenance, sort_keys=True)


@dataclass(frozen=True, eq=False)
class StoreContent:
    """What store.nc says: the layout, the statistics per channel, the table of files."""

    layout: StoreLayout
    files: tuple[FileEntry, ...]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    tendency_std: NDArray[np.float64]
    valid_share: NDArray[np.float64]
    year_fraction: NDArray[np.float64]
    utc_hour: NDArray[np.float64]
    has_missing: bool


def read_store_file(path: Path) -> StoreContent:
    """Reads store.nc.

    Raises:
        InputError: it is damaged, no store of ours, or of another version.
    """
    try:
        with h5py.File(path, "r", locking=False) as h5:
            _check_format(path, h5.attrs)
            return _content(h5)
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path} is damaged ({error}). Copy the store again, or prepare it anew with "
            f"`faconv data prepare ... --output {path.parent} --overwrite`."
        ) from None


def _check_format(path: Path, attributes: h5py.AttributeManager) -> None:
    if attributes.get("format") != FORMAT:
        raise InputError(
            f"{path} is an HDF5 file of another program: its attribute 'format' is "
            f"{attributes.get('format')!r}, not {FORMAT!r}. Make a store with `faconv data prepare`."
        )
    version = _number(attributes["format_version"])
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has store format {version}, this faconv_hpc reads format {FORMAT_VERSION}. "
            f"Install the version that wrote it, or run `faconv data prepare` again."
        )


def _content(h5: h5py.File) -> StoreContent:
    texts = {name: [str(text) for text in h5[name].asstr()[:]] for name in ("channel", "units", "long_name", "file")}
    statistics = ("mean", "std", "tendency_std", "valid_share")
    numbers = {name: h5[name][:] for name in (*statistics, "year_fraction", "utc_hour")}
    chunk = [int(size) for size in h5.attrs["chunk_shape"]]
    mesh = [int(size) for size in h5.attrs["intended_mesh"]]
    layout = StoreLayout(
        latitude_deg=h5["latitude"][:],
        longitude_deg=h5["longitude"][:],
        channels=tuple(map(Channel, texts["channel"], texts["units"], texts["long_name"])),
        time=TimeAxis(h5["time"][:], str(h5["time"].attrs["calendar"])),
        chunk=ChunkShape(*chunk[1:]),
        mesh=(mesh[0], mesh[1]),
        frames_per_file=_number(h5.attrs["frames_per_file"]),
        compression=_number(h5.attrs["compression"]) or None,
        provenance=json.loads(h5.attrs["provenance"]),
    )
    table = zip(*(h5[name][:].tolist() for name in ("first_frame", "frames", "size_bytes")), strict=True)
    files = tuple(FileEntry(name, *row) for name, row in zip(texts["file"], table, strict=True))
    return StoreContent(layout, files, has_missing=bool(_number(h5.attrs["has_missing"])), **numbers)


def _number(attribute: NDArray[np.int64]) -> int:
    return int(np.ravel(attribute)[0])  # NetCDF4 keeps a number as an array of one
