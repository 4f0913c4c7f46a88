"""What one source holds: for every channel consecutive frames, and how they are read, turned and checked."""

import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ..data.layout import Channel
from ..data.times import TimeAxis, check_increasing, decode_times
from ..errors import InputError
from ..spatial.grid import SAME_DEG, LatLonGrid, Span, within_half_a_turn
from .channel_names import channels_of
from .grib import NOTE
from .roles import Roles, SourceOptions, coordinate, find_roles, static_roles, time_variable
from .selection import SELECTED, bounds_of, is_flag
from .values import refuse_rounded, refuse_suspect
from .zarr_chunks import ZarrChunks

PLAIN_UNITS = "hours since 2000-01-01"
ALWAYS = TimeAxis(np.zeros(1, np.int64), "standard")  # of what has no time


@dataclass(frozen=True, eq=False)
class SourceGrid:
    """Coordinates of a source as a store keeps them, and how to turn its fields to match.

    Args:
        latitude_deg: (latitude,) north first.
        longitude_deg: (longitude,) increasing.
        flip_rows: the source runs south to north.
        flip_columns: the source runs east to west.
        roll: columns of the source, once flipped, that lie west of the first one here.
    """

    latitude_deg: NDArray[np.float64]
    longitude_deg: NDArray[np.float64]
    flip_rows: bool
    flip_columns: bool
    roll: int = 0

    def beginning_at(self, longitude_deg: NDArray[np.float64]) -> "SourceGrid":
        """The same meridians, named and ordered as there; itself if they are not the same."""
        if longitude_deg.shape != self.longitude_deg.shape:
            return self
        roll = int(np.abs(within_half_a_turn(self.longitude_deg - longitude_deg[0])).argmin())
        if np.abs(within_half_a_turn(np.roll(self.longitude_deg, -roll) - longitude_deg)).max() > SAME_DEG:
            return self
        return replace(self, longitude_deg=longitude_deg, roll=roll)


@dataclass(frozen=True, eq=False)
class Segment:
    """Some consecutive frames of one channel in one source, and of one sequence."""

    path: Path
    channel: Channel
    array: xr.DataArray
    roles: Roles
    level: int | None
    grid: SourceGrid
    time: TimeAxis
    what: str
    options: SourceOptions
    frames: range
    chunks: ZarrChunks | None = None
    selected: Mapping[Hashable, int] = field(default_factory=dict)
    sequence: str = ""

    @property
    def begin(self) -> int:
        """The first of its times, in seconds."""
        return int(self.time.seconds[0])

    def read(self, frames: range, rows: Span, beside: Sequence["Segment"]) -> NDArray[np.float32]:
        """fields_TCYX of frames counted from this segment's first; north first, NaN if missing.

        Args:
            beside: the segments whose levels are read, see `is_beside`.
        """
        nlat = self.grid.latitude_deg.size
        source_rows = (nlat - rows[1], nlat - rows[0]) if self.grid.flip_rows else rows
        picked: dict[Hashable, slice | int | list[int]] = dict.fromkeys(self.array.dims, 0)  # dims of size 1
        picked[self.roles.latitude] = slice(*source_rows)
        picked[self.roles.longitude] = slice(None)
        if self.roles.time is not None:
            there = self.frames[frames.start : frames.stop]
            picked[self.roles.time] = slice(there.start, there.stop, there.step)
        if self.roles.level is not None:
            picked[self.roles.level] = _together([one.level for one in beside if one.level is not None])
        roles = self.roles
        order = [dim for dim in (roles.time, roles.level, roles.latitude, roles.longitude) if dim is not None]
        if self.chunks is not None:
            self.chunks.check(self.array, {**picked, **self.selected})
        try:
            # Loaded first: transposed while it is read, a source in another order takes many times as long.
            values = self.array.isel(picked).load().transpose(*order).values
        except (OSError, RuntimeError, ValueError, zlib.error) as error:  # as HDF5, numcodecs and zlib have it
            raise InputError(
                f"frames {frames.start} to {frames.stop} of variable {self.array.name!r} in {self.path} cannot be read "
                f"({error}). The source is damaged: fetch it again, then run this command again; it goes on."
            ) from None
        values = values.reshape(len(frames), len(beside), *values.shape[-2:])
        fields = np.empty(values.shape, np.float32)
        for place, one in enumerate(beside):
            fields[:, place] = one.checked(values[:, place])
        fields = fields[..., ::-1, :] if self.grid.flip_rows else fields
        fields = fields[..., ::-1] if self.grid.flip_columns else fields
        fields = fields[..., : self.grid.longitude_deg.size]
        return np.roll(fields, -self.grid.roll, axis=-1) if self.grid.roll else fields

    def read_once(self) -> NDArray[np.float32]:
        """The one field (Y, X) of what has no time."""
        field_YX: NDArray[np.float32] = self.read(range(1), (0, self.grid.latitude_deg.size), [self])[0, 0]
        return field_YX

    def checked(self, values_TYX: NDArray[Any]) -> NDArray[np.float32]:
        """Fields of this channel as a store keeps them; raises InputError for values that nobody can have meant."""
        where = f"variable {self.array.name!r} in {self.path}"
        marks = [value for name, value in self.options.missing_values if name in ("", *self.names)]
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which the writer names
            fields_TYX = values_TYX.astype(np.float32)
        marked = np.isin(fields_TYX, np.array(marks, np.float32)) if marks else None
        stored = np.dtype(self.array.encoding.get("dtype", values_TYX.dtype))
        whole = stored.kind in "iu" and "scale_factor" not in self.array.encoding
        if whole and not self.is_accepted:
            refuse_rounded(values_TYX if marked is None else values_TYX[~marked], where)
        if marked is not None:
            fields_TYX[marked] = np.nan
        if not self.is_accepted:
            refuse_suspect(fields_TYX, where, str(self.array.name))
        return fields_TYX

    @property
    def names(self) -> tuple[str, str]:
        """By which the user may mean it: the channel's and the variable's."""
        return self.channel.name, str(self.array.name)

    @property
    def is_accepted(self) -> bool:
        """Whether the user takes this variable, or channel, as it is."""
        return not set(self.names).isdisjoint(self.options.accept)

    def is_beside(self, other: "Segment") -> bool:
        """Whether both are levels of one array, which are read together."""
        return self.level is not None and other.level is not None and self.array is other.array


def segments_of(
    dataset: xr.Dataset, path: Path, options: SourceOptions, notes: list[str], static: dict[str, Segment]
) -> list[Segment]:
    """The fields of a source, and what is to be said of it.

    Args:
        notes: what was assumed or left out is added here.
        static: what does not change in time is added here, by name, of each the first.

    Raises:
        InputError: fields whose grid, times or dims no store can have.
    """
    segments: list[Segment] = []
    bounds, names, taken = bounds_of(dataset), dict(options.rename), dataset.attrs.get(SELECTED, {})
    if NOTE in dataset.attrs:
        notes.append(dataset.attrs[NOTE])
    times: dict[Hashable, TimeAxis] = {}
    chunks = ZarrChunks(path) if path.is_dir() and not options.fill_absent_chunks else None
    ours = "fingerprint" in dataset.attrs and "fields" in dataset.data_vars  # a store's: its mask is in the fields
    for name in ["fields"] if ours else dataset.data_vars:
        if name in bounds:
            continue
        array, is_static = dataset[name], options.takes_once(name)
        roles = None if is_static else find_roles(dataset, name, options, path)
        if roles is None:
            roles, is_static = static_roles(dataset, name, options), True
        if roles is None or array.dtype.kind not in "fiub":
            continue
        if is_flag(array) and not ours and not _is_named(str(name), options):
            notes.append(
                f"{path}: {name!r} holds flags or switches, no field, and is left out; --accept {name} takes it."
            )
            continue
        grid = _source_grid(dataset, roles, options, path)
        if roles.time not in times and not is_static:
            times[roles.time] = _times(dataset, roles, options, path, notes)
        time = ALWAYS if is_static else times[roles.time]
        found = [
            Segment(path, channel, array, roles, level, grid, time, what, options, range(len(time)), chunks, taken)
            for level, channel, what in channels_of(dataset, name, roles, names)
        ]
        if is_static:
            static.update({one.channel.name: one for one in found if one.channel.name not in static})
        else:
            segments += found
    return segments


def _is_named(name: str, options: SourceOptions) -> bool:
    return name in options.accept or (options.variables is not None and name in options.variables)


def _times(dataset: xr.Dataset, roles: Roles, options: SourceOptions, path: Path, notes: list[str]) -> TimeAxis:
    variable = time_variable(dataset, roles.time, options)
    where = f"{path}, {roles.time or 'time'}"
    if variable is not None and variable.dtype.kind == "M":
        seconds = variable.values.astype("datetime64[s]").astype(np.int64).ravel()
        axis = TimeAxis(seconds, options.calendar or "proleptic_gregorian")
        check_increasing(axis, where)
        return axis
    values = np.arange(dataset.sizes[roles.time or ""]) if variable is None else np.atleast_1d(variable.values)
    if values.size == 0:
        raise InputError(f"{where} has no times at all: the source is empty. Leave it out.")
    attributes = {} if variable is None else variable.attrs
    units = options.time_units or attributes.get("units")
    if units is None and "plain_hdf5" in dataset.attrs and variable is None:
        units = PLAIN_UNITS
        notes.append(f"{path} has no time: its frames are taken as {PLAIN_UNITS}. Say otherwise with --time-units.")
    if units is None:
        hints = [f" Its attribute {key!r} says {text!r}." for key, text in dataset.attrs.items() if "time" in str(key)]
        raise InputError(
            f"the times in {where} have no units: {values[:3].tolist()}...{''.join(hints)} "
            f'Give them with --time-units, for example --time-units "hours since 1940-01-01".'
        )
    calendar = options.calendar or str(attributes.get("calendar", "standard"))
    axis = decode_times(values, str(units), calendar, where)
    check_increasing(axis, where)
    return axis


def _source_grid(dataset: xr.Dataset, roles: Roles, options: SourceOptions, path: Path) -> SourceGrid:
    latitude = coordinate(dataset, roles.latitude, "latitude")
    longitude = coordinate(dataset, roles.longitude, "longitude")
    flip_rows = latitude.size > 1 and bool(latitude[0] < latitude[-1])
    latitude = latitude[::-1] if flip_rows else latitude
    flip_columns = longitude.size > 2 and int((np.diff(longitude) < 0).sum()) > longitude.size // 2
    longitude = unwrap(longitude[::-1] if flip_columns else longitude)
    longitude = _without_repeated_column(longitude, options, path)
    try:  # the rules for coordinates are the grid's own
        LatLonGrid(latitude.size, longitude.size, latitude_deg=latitude, longitude_deg=longitude, lon_boundary="zero")
    except InputError as error:
        raise InputError(f"source {path}: {error}") from None
    return SourceGrid(latitude, longitude, flip_rows, flip_columns)


def unwrap(longitude_deg: NDArray[np.float64]) -> NDArray[np.float64]:
    """Longitudes that jump back by a turn (..., 179, -180, ...) made to go on (..., 179, 180, ...)."""
    jumps = np.diff(longitude_deg) < -180.0
    return longitude_deg + 360.0 * np.concatenate([[0.0], np.cumsum(jumps)])


def _without_repeated_column(longitude: NDArray[np.float64], options: SourceOptions, path: Path) -> NDArray[np.float64]:
    if longitude.size < 3 or longitude[-1] - longitude[0] < 360.0 - SAME_DEG:
        return longitude
    if not options.drop_repeated_column:
        raise InputError(
            f"source {path} has the meridian {longitude[0]:g} twice: its {longitude.size} columns run from "
            f"{longitude[0]:g} to {longitude[-1]:g}. Leave out the last one with --drop-repeated-column."
        )
    return longitude[:-1]


def _together(levels: Sequence[int]) -> slice | list[int]:
    """Levels of an array as they are read at once."""
    if list(levels) == list(range(levels[0], levels[-1] + 1)):
        return slice(levels[0], levels[-1] + 1)
    return list(levels)
