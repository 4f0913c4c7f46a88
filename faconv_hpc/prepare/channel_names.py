"""What the channels of a variable are called: its own name, or one per level, such as z500.

A variable's name is the one that xarray shows: in NetCDF and zarr that of the file, in GRIB the short name that cfgrib
takes from ecCodes (`t2m`, `u10`). Pressure in Pa is named in hPa.
"""

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ..data.layout import Channel
from .roles import Roles, is_pressure
from .sources import CHANNELS


def channels_of(
    dataset: xr.Dataset, name: Hashable, roles: Roles, rename: Mapping[str, str]
) -> list[tuple[int | None, Channel, str]]:
    """A variable's channels: itself, or one per level, such as z500. With what each is, for messages.

    Args:
        rename: what variables or channels shall be called.
    """
    found = _channels_of(dataset, name, roles, rename.get(str(name), str(name)))
    return [
        (level, replace(channel, name=rename.get(channel.name, channel.name)), what) for level, channel, what in found
    ]


def _channels_of(
    dataset: xr.Dataset, name: Hashable, roles: Roles, called: str
) -> list[tuple[int | None, Channel, str]]:
    whole = f"variable {name!r}"
    attributes = dataset[name].attrs
    units, long_name = str(attributes.get("units", "")), str(attributes.get("long_name", name))
    if roles.level is None:
        text, at = _alone(dataset, name)
        return [(None, Channel(f"{called}{text}", units, f"{long_name}{at}"), f"{whole}{at}")]
    size = dataset.sizes[roles.level]
    if roles.level not in dataset.variables:
        texts = [f"{roles.level} {i}" for i in range(size)]
        return [
            (i, Channel(f"{called}_{roles.level}{i}", units, f"{long_name}, {text}"), f"{whole}, {text}")
            for i, text in enumerate(texts)
        ]
    level = dataset[roles.level]
    if level.dtype.kind in "OSUT":  # names, as a store of ours has them
        known, names = dataset.attrs.get(CHANNELS, {}), [str(text) for text in level.values]
        return [(i, known.get(one, Channel(one, units, one)), f"channel {one}") for i, one in enumerate(names)]
    values, unit = _in_hpa(level)
    texts = [f"at {value:g} {unit}".strip() for value in values]
    return [
        (i, Channel(f"{called}{value:g}", units, f"{long_name} {text}"), f"{whole} {text}")
        for i, (value, text) in enumerate(zip(values, texts, strict=True))
    ]


def _in_hpa(level: xr.DataArray) -> tuple[NDArray[Any], str]:
    """Values of a level's coordinate and their unit; Pa becomes hPa."""
    unit, values = str(level.attrs.get("units", "")), np.atleast_1d(level.values)
    return (values / 100.0, "hPa") if unit == "Pa" else (values, unit)


def _alone(dataset: xr.Dataset, name: Hashable) -> tuple[str, str]:
    """For a field at the one pressure that its source gives, which is no dim then: t at 500 hPa is not t."""
    for coordinate, values in dataset[name].coords.items():
        if values.ndim == 0 and is_pressure(str(coordinate), values.attrs):
            (value,), unit = _in_hpa(values)
            return f"{value:g}", f" at {value:g} {unit}".rstrip()
    return "", ""
