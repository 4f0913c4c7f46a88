"""Small sources for tests that prepare stores."""

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from faconv_hpc.data.store import Store
from faconv_hpc.spatial.grid import Tile

NLAT, NLON, FRAMES = 11, 16, 9
ROOT = Path(__file__).resolve().parents[1]
DIMS = ("time", "lat", "lon")


def values(seed: int = 0, shape: tuple[int, ...] = (FRAMES, NLAT, NLON)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dataset(fields: dict[str, Any] | None = None, **coordinates: Any) -> xr.Dataset:
    """A regular global dataset; fields default to ``u`` and ``v``, coordinates can be replaced."""
    fields = {"u": (DIMS, values(1)), "v": (DIMS, values(2))} if fields is None else fields
    given = {
        "time": ("time", np.arange(FRAMES) * 6.0, {"units": "hours since 2001-01-01"}),
        "lat": ("lat", np.linspace(75, -75, NLAT), {"units": "degrees_north"}),
        "lon": ("lon", np.arange(NLON) * 22.5, {"units": "degrees_east"}),
    }
    return xr.Dataset(fields, {**given, **coordinates})


def save(data: xr.Dataset, path: Path, **options: Any) -> Path:
    data.to_netcdf(path, engine="h5netcdf", **options)
    return path


def whole(path: Path, *names: str) -> tuple[np.ndarray, np.ndarray | None, Store]:
    with Store.open(path) as store:
        nlat, nlon = store.layout.grid_shape
        fields, valid = store.read(
            range(store.frames), Tile((0, nlat), (0, nlon)), store.channel_indices(names or store.channels)
        )
        return fields, valid, store
