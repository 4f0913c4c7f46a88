"""What the dims of a source mean, latitude, longitude, time, level: guessed from attributes and names.

The rules of CF count first (standard_name, units, axis), then the names that are usual. GRIB comes here too, with the
names and attributes that cfgrib gives it.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import xarray as xr

from ..errors import InputError
from .selection import Period

MEMBERS = ("realization", "number", "member", "ensemble", "ensemble_member")
NOT_LEVELS = (*MEMBERS, "forecast_period", "step", "prediction_timedelta", "lead_time", "expver")
PRESSURE_NAMES = ("pressure_level", "level", "isobaricinhpa", "plev")
PRESSURE_UNITS = ("Pa", "hPa", "mbar", "mb", "millibar", "millibars")
LATITUDE_NAMES = ("latitude", "lat", "nav_lat")
LONGITUDE_NAMES = ("longitude", "lon", "nav_lon")
TIME_NAMES = ("time", "valid_time", "t")
LATITUDE_UNITS = ("degrees_north", "degree_north", "degrees_n", "degree_n", "degreesn", "degreen")
LONGITUDE_UNITS = ("degrees_east", "degree_east", "degrees_e", "degree_e", "degreese", "degreee")


class Taken(TypedDict, total=False):
    """The same as `SourceOptions`, as it is asked for."""

    variables: Sequence[str] | None
    time_coordinate: str | None
    time_units: str | None
    calendar: str | None
    drop_repeated_column: bool
    fill_absent_chunks: bool
    select: Mapping[str, str] | None
    sequence_dim: str | None
    sequences: bool
    rename: Mapping[str, str] | None
    static: Sequence[str] | None
    missing_values: Sequence[tuple[str, float]] | None
    accept: Sequence[str] | None
    period: Period | None


@dataclass(frozen=True)
class SourceOptions:
    """What the user says about the sources.

    Args:
        variables: variables or channels to take, in this order; None takes all fields.
        time_coordinate: name of the time dim or coordinate, where it cannot be found.
        time_units: CF units of the times, where the source gives none or wrong ones.
        calendar: CF calendar, where the source gives none or a wrong one.
        drop_repeated_column: leave out the last column where it repeats the first.
        fill_absent_chunks: take chunks that a zarr source leaves out as filled, as zarr itself does.
        select: dims, or keys of GRIB messages, and the one value to take of each.
        sequence_dim: dim along which sequences lie beside each other, such as members of an ensemble.
        sequences: every source is a sequence of its own, called as its file is.
        rename: names of variables or channels, and what the store shall call them.
        static: variables to take once, although they have times: the first is taken.
        missing_values: names of variables or channels (empty: all), and what marks missing data there.
        accept: variables that are taken as they are: values that look like marks, flags, sources without units.
        period: the times to take.
    """

    variables: tuple[str, ...] | None = None
    time_coordinate: str | None = None
    time_units: str | None = None
    calendar: str | None = None
    drop_repeated_column: bool = False
    fill_absent_chunks: bool = False
    select: tuple[tuple[str, str], ...] = ()
    sequence_dim: str | None = None
    sequences: bool = False
    rename: tuple[tuple[str, str], ...] = ()
    static: tuple[str, ...] = ()
    missing_values: tuple[tuple[str, float], ...] = ()
    accept: tuple[str, ...] = ()
    period: Period = field(default_factory=Period)

    @classmethod
    def of(cls, **taken: Unpack[Taken]) -> "SourceOptions":
        """From what `prepare` is given: lists and mappings."""
        values: dict[str, Any] = dict(taken)
        for name in ("variables", "static", "missing_values", "accept"):
            values[name] = tuple(values[name] or ()) if name in values else ()
        for name in ("select", "rename"):
            values[name] = tuple((values.get(name) or {}).items())
        return cls(**values | {"variables": values["variables"] or None, "period": values.get("period") or Period()})

    def takes_once(self, name: Hashable) -> bool:
        """Whether a variable is named as static, by its name in the source or the one that it shall have."""
        return not {str(name), dict(self.rename).get(str(name))}.isdisjoint(self.static)


@dataclass(frozen=True)
class Roles:
    """Which dim of a variable is what, by name. ``time`` is None for a single instant."""

    time: Hashable | None
    latitude: Hashable
    longitude: Hashable
    level: Hashable | None


def find_roles(dataset: xr.Dataset, name: Hashable, options: SourceOptions, path: Path) -> Roles | None:
    """What the dims of a variable mean; None if it is no field on latitude and longitude in time.

    Raises:
        InputError: a field whose grid is not regular, whose time cannot be found, or with two
            dims too many.
    """
    array = dataset[name]
    latitude = _dim_of(dataset, array, "latitude")
    longitude = _dim_of(dataset, array, "longitude")
    if latitude is None or longitude is None:
        _refuse_curvilinear(dataset, array, path)
        return None
    if latitude == longitude:
        raise _not_regular(array, path, f"latitude and longitude both run along {latitude!r}")
    time = _time_dim(dataset, array, options)
    known = (latitude, longitude, time)
    others = [dim for dim in array.dims if dim not in known and (array.sizes[dim] > 1 or _is_level(dataset, dim))]
    if time is None and time_variable(dataset, None, options) is None:
        if not others:
            return None  # a constant field, such as a land mask
        raise _no_time(dataset, array, others, path)
    forecasts = [dim for dim in others if _standard_name(dataset, dim) in NOT_LEVELS or dim in NOT_LEVELS]
    if len(others) > 1 or forecasts:
        one = (forecasts or others)[-1]
        if one == "expver":
            remedy = (
                "Take ERA5 alone with --select expver=1, or merge it with its preliminary end (5) first, for example "
                "with xarray: `ds.sel(expver=1).combine_first(ds.sel(expver=5)).to_netcdf('merged.nc')`."
            )
        else:
            value = dataset[one].values[0] if one in dataset.variables else 0
            each = f", or each as a sequence with --sequence-dim {one}" if one in MEMBERS else ""
            remedy = f"Take one of {one!r}, for example with --select {one}={value}{each}."
        raise InputError(
            f"variable {name!r} in {path} has dims {_sizes(array)}: besides time, latitude and longitude there may be "
            f"one of levels, but no members or lead times. {remedy}"
        )
    return Roles(time, latitude, longitude, others[0] if others else None)


def static_roles(dataset: xr.Dataset, name: Hashable, options: SourceOptions) -> Roles | None:
    """Of a field without time, or one that is named as static; None if it is no field on latitude and longitude."""
    array = dataset[name]
    latitude, longitude = _dim_of(dataset, array, "latitude"), _dim_of(dataset, array, "longitude")
    time = _time_dim(dataset, array, options) if options.takes_once(name) else None
    others = [dim for dim in array.dims if dim not in (latitude, longitude, time) and array.sizes[dim] > 1]
    if latitude is None or longitude is None or latitude == longitude or others:
        return None
    return Roles(None, latitude, longitude, None)


def _is_level(dataset: xr.Dataset, dim: Hashable) -> bool:
    """Whether a dim stands for a level even where there is only one: t at 500 hPa is not t."""
    if dim == "channel":
        return True
    coordinate = dataset.variables.get(dim)
    if coordinate is None or coordinate.dims != (dim,):
        return False
    return is_pressure(str(dim), coordinate.attrs)


def is_pressure(name: str, attributes: Mapping[Any, Any]) -> bool:
    """Whether a coordinate is a pressure, by its name or units."""
    return name.lower() in PRESSURE_NAMES or attributes.get("units") in PRESSURE_UNITS


def _dim_of(dataset: xr.Dataset, array: xr.DataArray, kind: str) -> Hashable | None:
    """The dim along which a 1-D coordinate of this kind runs."""
    for dim in array.dims:
        for name, variable in dataset.variables.items():
            if variable.dims == (dim,) and _is_kind(str(name), variable.attrs, kind):
                return dim
    return None


def coordinate(dataset: xr.Dataset, dim: Hashable, kind: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Values of the 1-D coordinate of this kind along a dim."""
    found = [
        variable
        for name, variable in dataset.variables.items()
        if variable.dims == (dim,) and _is_kind(str(name), variable.attrs, kind)
    ]
    return np.asarray(found[0].values, dtype=np.float64)


def _is_kind(name: str, attributes: Mapping[Any, Any], kind: str) -> bool:
    standard, units = str(attributes.get("standard_name", "")), str(attributes.get("units", "")).lower()
    names, known_units, axis = {
        "latitude": (LATITUDE_NAMES, LATITUDE_UNITS, "Y"),
        "longitude": (LONGITUDE_NAMES, LONGITUDE_UNITS, "X"),
    }[kind]
    if standard:
        return standard == kind
    says_so = name.lower() in names or attributes.get("axis") == axis
    return units in known_units or (says_so and units in ("", "degrees", "degree"))


def _time_dim(dataset: xr.Dataset, array: xr.DataArray, options: SourceOptions) -> Hashable | None:
    if options.time_coordinate in array.dims:
        return options.time_coordinate
    with_times = (dim for dim in array.dims if time_variable(dataset, dim, options) is not None)
    by_name = (dim for dim in array.dims if str(dim).lower() in TIME_NAMES)  # without times: frames are counted
    return next(with_times, next(by_name, None))


def time_variable(dataset: xr.Dataset, dim: Hashable | None, options: SourceOptions) -> xr.Variable | None:
    """The variable with the times along a dim, or, for None, the one instant of the whole source."""
    dims = () if dim is None else (dim,)
    if options.time_coordinate is not None:
        named = dataset.variables.get(options.time_coordinate)
        return named if named is not None and named.dims == dims else None
    found = {name: variable for name, variable in dataset.variables.items() if variable.dims == dims}
    times = {name: variable for name, variable in found.items() if _is_time(str(name), variable)}
    return times.get(dim, next(iter(times.values()), None))  # the dim's own coordinate first


def _is_time(name: str, variable: xr.Variable) -> bool:
    attributes = variable.attrs
    if attributes.get("standard_name") in ("forecast_reference_time", "forecast_period"):
        return False
    says_so = attributes.get("standard_name") == "time" or attributes.get("axis") == "T"
    since = " since " in str(attributes.get("units", ""))
    return says_so or since or variable.dtype.kind == "M" or (bool(variable.dims) and name.lower() in TIME_NAMES)


def _no_time(dataset: xr.Dataset, array: xr.DataArray, others: list[Hashable], path: Path) -> InputError:
    hints = {key: value for key, value in dataset.attrs.items() if "time" in str(key).lower()}
    found = "".join(f" Its attribute {key!r} says {value!r}." for key, value in hints.items())
    return InputError(
        f"no time found for variable {array.name!r} in {path}, which has dims {_sizes(array)}.{found} Name it, for "
        f'example --time-coordinate {others[0]} --time-units "hours since 1940-01-01" (with your date).'
    )


def _refuse_curvilinear(dataset: xr.Dataset, array: xr.DataArray, path: Path) -> None:
    for name, variable in dataset.variables.items():
        flat = variable.ndim == 2 and set(variable.dims) <= set(array.dims)
        rotated = variable.attrs.get("standard_name") == "grid_latitude" and set(variable.dims) <= set(array.dims)
        if rotated or (flat and array.ndim > 2 and _is_kind(str(name), variable.attrs, "latitude")):
            raise _not_regular(array, path, f"{name!r} has dims {variable.dims}")


def _not_regular(array: xr.DataArray, path: Path, reason: str) -> InputError:
    return InputError(
        f"variable {array.name!r} in {path} is not on a regular latitude/longitude grid: {reason}. "
        f"Regrid it first, for example with xarray: `ds.interp(latitude=..., longitude=...)`, or with cdo or xesmf."
    )


def _standard_name(dataset: xr.Dataset, dim: Hashable) -> str:
    return str(dataset.variables[dim].attrs.get("standard_name", "")) if dim in dataset.variables else ""


def _sizes(array: xr.DataArray) -> str:
    return ", ".join(f"{dim} ({size})" for dim, size in array.sizes.items())
