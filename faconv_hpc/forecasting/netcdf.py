"""Forecasts as NetCDF4: a file for each date, which appears whole, and one of all in the end."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5netcdf
import numpy as np
from numpy.typing import NDArray

from ..prepare.hdf5_file import ForgivingFile, new_netcdf
from .layout import ForecastLayout


class NetcdfWriter:
    """Writes parts into a directory, and joins them.

    HDF5 files have one writer each, and are lost if it is killed: so each date has a part of its own.

    Args:
        directory: of the parts.
        attributes: of the file.
    """

    def __init__(self, directory: Path, layout: ForecastLayout, attributes: Mapping[str, str]) -> None:
        self._directory, self._layout, self._attributes = directory, layout, attributes

    def prepare(self) -> None:
        """Nothing has to be there before the first part."""

    def is_done(self, init: int) -> bool:
        """Whether a date's part is there."""
        return self._part(init).exists()

    def tile_of(self, channel: int, tiles: int) -> int:
        """The tile whose rank writes a channel: the first writes all."""
        return 0

    @contextmanager
    def writing(self, init: int, first: bool) -> Iterator["Part | None"]:
        """The part of a date, for the first rank of its replica; it is there when the block ends."""
        if not first:
            yield None
            return
        with new_netcdf(self._part(init)) as (nc, disk):
            create(nc, self._layout.part(init), self._attributes)
            yield Part(nc, disk, self._layout)

    def finish(self, final: Path) -> Iterator[None]:
        """Joins the parts; stops after each, so that nobody waits for all of it."""
        with new_netcdf(final) as (nc, disk):
            create(nc, self._layout, self._attributes)
            for init in range(self._layout.seconds.size):
                with h5netcdf.File(self._part(init), "r", locking=False) as part:
                    for field in self._layout.fields:
                        for place in np.ndindex(self._layout.shape_of(field)[1:-2]):
                            nc.variables[field.name][(init, *place)] = part.variables[field.name][(0, *place)]
                disk.raise_error()
                yield

    def _part(self, init: int) -> Path:
        return self._directory / f"init-{init:06d}.nc"


class Part:
    """One date's forecast that is being written."""

    def __init__(self, nc: h5netcdf.File, disk: ForgivingFile, layout: ForecastLayout) -> None:
        self._nc, self._disk, self._layout = nc, disk, layout

    def write(self, channel: int, lead: int, field_YX: NDArray[np.float32]) -> None:
        """A field of the whole grid."""
        name, place = self._layout.place_in(channel, 0, lead)
        self._nc.variables[name][place] = field_YX
        self._disk.raise_error()


def create(nc: h5netcdf.File, layout: ForecastLayout, attributes: Mapping[str, str]) -> None:
    """Dims, coordinates, and variables without values yet."""
    nc.dimensions = layout.sizes
    for one in layout.coordinates():
        variable = nc.create_variable(one.name, (one.name,), one.values.dtype)
        variable[:] = one.values
        variable.attrs.update(one.attributes)
    for field in layout.fields:
        variable = nc.create_variable(
            field.name,
            layout.dims_of(field),
            np.float32,
            chunks=layout.chunks_of(field),
            fillvalue=np.float32(np.nan),
            fletcher32=True,
        )
        variable.attrs.update(field.attributes)
    nc.attrs.update(attributes)


def attributes_in(path: Path) -> dict[str, Any]:
    """Of a file; none where it cannot be read as NetCDF4."""
    try:
        with h5netcdf.File(path, "r", locking=False) as nc:
            return dict(nc.attrs)
    except OSError:
        return {}
