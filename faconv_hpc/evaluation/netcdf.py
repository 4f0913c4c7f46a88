"""What the NetCDF files of evaluations, regimes and explanations share."""

from pathlib import Path
from typing import Any

import xarray as xr
from numpy.typing import NDArray

from ..files import replacing


def grid_coordinates(latitude_deg: NDArray[Any], longitude_deg: NDArray[Any]) -> dict[str, Any]:
    """Of maps, as xarray takes them."""
    sides = (("latitude", latitude_deg, "degrees_north"), ("longitude", longitude_deg, "degrees_east"))
    return {name: (name, values, {"standard_name": name, "units": units}) for name, values, units in sides}


def save_dataset(dataset: xr.Dataset, path: Path, **options: Any) -> None:
    """As NetCDF4, whole or not at all; options are those of `xarray.Dataset.to_netcdf`."""
    with replacing(path) as beside:
        dataset.to_netcdf(beside, engine="h5netcdf", **options)
