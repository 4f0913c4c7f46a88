"""Opening any source that xarray reads, whatever its format; what its dims mean is found out in roles.py."""

import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xarray as xr

from ..data.layout import DIMS, STORE_FILE, Channel, read_store_file
from ..errors import InputError
from .grib import open_grib

LAZY: dict[str, Any] = {"decode_times": False, "decode_timedelta": False, "cache": False}
UNLOCKED: dict[str, Any] = {"driver_kwds": {"locking": False}}  # parallel file systems may refuse locks
GRIB = "cfgrib"
CHANNELS = "faconv_channels"
"""Attribute of a dataset that is a file of a store: what the store says of its channels, by name."""
ZARR_MARKS = ("zarr.json", ".zmetadata", ".zgroup", ".zattrs")


def expand(paths: list[Path]) -> list[Path]:
    """Sources as they are opened: a store of ours stands for its files of fields."""
    expanded: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"source {path} does not exist. Give paths of NetCDF, HDF5, zarr or GRIB data.")
        if not (path / STORE_FILE).is_file():
            expanded.append(path)
            continue
        expanded += [path / name for name in read_store_file(path / STORE_FILE).names]
    return expanded


def open_sources(path: Path, select: tuple[tuple[str, str], ...] = ()) -> list[xr.Dataset]:
    """Opens a source lazily: nothing but coordinates is read, times are left as numbers. GRIB may be several datasets.

    Args:
        select: keys of GRIB messages, and the value that they must have.

    Raises:
        InputError: it cannot be read; the message says what would.
    """
    engine = _engine(path)
    if engine == GRIB:
        return open_grib(path, dict(select), LAZY)
    return [_opened(path, engine)]


def _opened(path: Path, engine: str) -> xr.Dataset:
    try:
        if engine == "h5netcdf" and _is_plain(path):
            return _open_plain(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(not recognized as a component|consolidated).*")
            dataset = xr.open_dataset(path, engine=engine, **LAZY, **(UNLOCKED if engine == "h5netcdf" else {}))
        if "fingerprint" in dataset.attrs and (path.parent / STORE_FILE).is_file():
            store = path.parent / STORE_FILE
            return dataset.assign_attrs({CHANNELS: _channels_of(store, store.stat().st_mtime_ns)})
        # A directory lists its variables in any order, which ranks must not disagree about.
        return dataset[sorted(dataset.data_vars, key=str)] if engine == "zarr" else dataset
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise InputError(
            f"source {path} looks like {engine} data but cannot be read ({error}). Check that it is whole, "
            f"for example with `python -c \"import xarray; xarray.open_dataset('{path}', engine='{engine}')\"`."
        ) from None


@lru_cache(maxsize=4)
def _channels_of(store: Path, changed_ns: int) -> dict[str, Channel]:
    """What a store says of its channels; kept, as it may have thousands of files, until ``changed_ns`` is another."""
    return {one.name: one for one in read_store_file(store).layout.channels}


def _engine(path: Path) -> str:
    """xarray's name for the reader, by the first bytes and not by the name's ending."""
    if path.is_dir():
        if any((path / mark).exists() for mark in ZARR_MARKS):
            return "zarr"
        raise InputError(
            f"source {path} is a directory but no zarr data: none of {', '.join(ZARR_MARKS)} is in it. "
            f"Give the files in it, such as {path}/*.nc."
        )
    with path.open("rb") as file:
        magic = file.read(8)
    if magic[:4] == b"GRIB":
        return GRIB
    if magic[:4] in (b"CDF\x01", b"CDF\x02"):
        return "scipy"
    if magic == b"\x89HDF\r\n\x1a\n":
        return "h5netcdf"
    if magic[:4] == b"PK\x03\x04":
        raise InputError(
            f"source {path} is a ZIP archive, as the Climate Data Store sends several kinds of fields at once. Unzip "
            f"it, and give the files in it."
        )
    remedy = (
        f'It is NetCDF in the format CDF-5: convert it with `pip install netCDF4` and `python -c "import xarray; '
        f"xarray.open_dataset('{path.name}', engine='netcdf4').to_netcdf('converted.nc')\"`."
        if magic[:4] == b"CDF\x05"
        else "Convert it first, to NetCDF or zarr, with a tool that reads it."
    )
    raise InputError(
        f"source {path} starts with {magic!r}, which is no NetCDF (3, 4), HDF5, zarr or GRIB data. {remedy}"
    )


def _is_plain(path: Path) -> bool:
    """Whether it is HDF5 without NetCDF's dims: a dataset ``fields`` with four of its own."""
    with h5py.File(path, "r", locking=False) as h5:
        fields = h5.get("fields")
        return isinstance(fields, h5py.Dataset) and fields.ndim == 4 and not any(map(len, fields.dims))


def _open_plain(path: Path) -> xr.Dataset:
    """``fields`` (time, channel, latitude, longitude) as it is; coordinates where datasets give them."""
    raw = xr.open_dataset(path, engine="h5netcdf", phony_dims="access", **LAZY, **UNLOCKED)
    fields = raw["fields"].variable
    nlat, nlon = fields.shape[2:]
    coordinates: dict[str, Any] = {
        "latitude": ("latitude", 90.0 - 180.0 / nlat * (np.arange(nlat) + 0.5)),
        "longitude": ("longitude", np.arange(nlon) * (360.0 / nlon)),
        "channel": ("channel", [f"channel_{index}" for index in range(fields.shape[1])]),
    }
    for name, size in zip(DIMS, fields.shape, strict=True):
        if name in raw.variables and raw[name].shape == (size,):
            given = raw[name]
            values = given.values.astype(str) if name == "channel" else given.values
            coordinates[name] = (name, values, given.attrs)
    renamed = xr.Variable(DIMS, fields._data, fields.attrs, fields.encoding)  # still lazy
    return xr.Dataset({"fields": renamed}, coordinates, {**raw.attrs, "plain_hdf5": 1})
