"""Sources joined: for every channel, where each frame comes from. Reads them slab by slab."""

import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ..data.layout import Channel
from ..data.names import unknown_name
from ..data.times import TimeAxis, check_increasing, decode_times
from ..errors import InputError
from ..spatial.grid import LatLonGrid, Span
from .channel_names import channels_of
from .roles import Roles, SourceOptions, coordinate, find_roles, time_variable
from .sources import open_source
from .zarr_chunks import ZarrChunks

SAME_DEG = 1e-4  # coordinates kept as float32 in one file and float64 in another
PLAIN_UNITS = "hours since 2000-01-01"


@dataclass(frozen=True, eq=False)
class SourceGrid:
    """Coordinates of a source as a store keeps them, and how to turn its fields to match.

    Args:
        latitude_deg: (latitude,) north first.
        longitude_deg: (longitude,) increasing.
        flip_rows: the source runs south to north.
        flip_columns: the source runs east to west.
    """

    latitude_deg: NDArray[np.float64]
    longitude_deg: NDArray[np.float64]
    flip_rows: bool
    flip_columns: bool


@dataclass(frozen=True, eq=False)
class Segment:
    """Some consecutive frames of one channel in one source."""

    path: Path
    channel: Channel
    array: xr.DataArray
    roles: Roles
    level: int | None
    grid: SourceGrid
    time: TimeAxis
    what: str
    chunks: ZarrChunks | None = None

    def read(self, frames: range, rows: Span, levels: Sequence[int | None]) -> NDArray[np.float32]:
        """fields_TCYX of frames counted from this segment's first, and of some levels; north first, NaN if missing."""
        nlat = self.grid.latitude_deg.size
        source_rows = (nlat - rows[1], nlat - rows[0]) if self.grid.flip_rows else rows
        picked: dict[Hashable, slice | int | list[int]] = dict.fromkeys(self.array.dims, 0)  # dims of size 1
        picked[self.roles.latitude] = slice(*source_rows)
        picked[self.roles.longitude] = slice(None)
        if self.roles.time is not None:
            picked[self.roles.time] = slice(frames.start, frames.stop)
        if self.roles.level is not None:
            picked[self.roles.level] = _together([level for level in levels if level is not None])
        roles = self.roles
        order = [dim for dim in (roles.time, roles.level, roles.latitude, roles.longitude) if dim is not None]
        if self.chunks is not None:
            self.chunks.check(self.array, picked)
        try:
            values = self.array.isel(picked).transpose(*order).values
        except (OSError, RuntimeError, ValueError, zlib.error) as error:  # as HDF5, numcodecs and zlib have it
            raise InputError(
                f"frames {frames.start} to {frames.stop} of variable {self.array.name!r} in {self.path} cannot be read "
                f"({error}). The source is damaged: fetch it again, then run this command again; it goes on."
            ) from None
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which the writer names
            fields = values.astype(np.float32, copy=False).reshape(len(frames), len(levels), *values.shape[-2:])
        fields = fields[..., ::-1, :] if self.grid.flip_rows else fields
        fields = fields[..., ::-1] if self.grid.flip_columns else fields
        return fields[..., : self.grid.longitude_deg.size]

    def is_beside(self, other: "Segment") -> bool:
        """Whether both are levels of one array, which are read together."""
        mine, others = (self.path, self.array.name), (other.path, other.array.name)
        return self.level is not None and other.level is not None and mine == others


@dataclass(frozen=True, eq=False)
class Catalogue:
    """All channels of all sources on one grid and one time axis; a `FieldReader`.

    ``notes`` say what was assumed or left out.
    """

    segments: tuple[tuple[Segment, ...], ...]
    time: TimeAxis
    notes: tuple[str, ...]

    @property
    def channels(self) -> tuple[Channel, ...]:
        """In the order of the store to be."""
        return tuple(segments[0].channel for segments in self.segments)

    @property
    def grid(self) -> SourceGrid:
        """The common grid."""
        return self.segments[0][0].grid

    @property
    def groups(self) -> Sequence[range]:
        """Levels of the same arrays are read together, as a chunk of a source may hold them all."""
        return self._groups(range(len(self.segments)))

    def read(self, frames: range, channels: range, rows: Span) -> NDArray[np.float32]:
        """fields_TCYX of a slab, out of one or more sources."""
        slab_TCYX = np.empty((len(frames), len(channels), rows[1] - rows[0], self.grid.longitude_deg.size), np.float32)
        for group in self._groups(channels):
            first = 0
            columns = slice(group.start - channels.start, group.stop - channels.start)
            for place, segment in enumerate(self.segments[group.start]):
                inside = range(max(frames.start - first, 0), min(frames.stop - first, len(segment.time)))
                if inside:
                    levels = [self.segments[channel][place].level for channel in group]
                    at = first + inside.start - frames.start
                    slab_TCYX[at : at + len(inside), columns] = segment.read(inside, rows, levels)
                first += len(segment.time)
        return slab_TCYX

    def _groups(self, channels: range) -> list[range]:
        groups: list[range] = []
        for channel in channels:
            if groups and self._are_beside(groups[-1].start, channel):
                groups[-1] = range(groups[-1].start, channel + 1)
            else:
                groups.append(range(channel, channel + 1))
        return groups

    def _are_beside(self, channel: int, other: int) -> bool:
        mine, others = self.segments[channel], self.segments[other]
        return len(mine) == len(others) and all(a.is_beside(b) for a, b in zip(mine, others, strict=True))


def build_catalogue(paths: Sequence[Path], options: SourceOptions) -> Catalogue:
    """Opens all sources and joins them.

    Raises:
        InputError: nothing to take, or sources that do not fit together.
    """
    found: dict[str, list[Segment]] = {}
    notes: list[str] = []
    constant: dict[str, Path] = {}
    for path in paths:
        for segment in _segments_of(path, options, notes, constant):
            found.setdefault(segment.channel.name, []).append(segment)
    if not found:
        raise InputError(
            f"no field with time, latitude and longitude in {', '.join(map(str, paths))}. Look at it with xarray or "
            f"ncdump -h; a dim that is not recognised needs the attribute standard_name (latitude, longitude, time)."
        )
    if options.variables is None:
        notes += [f"{path}: {name!r} does not change in time and is left out." for name, path in constant.items()]
    chosen = _choose(found, options.variables, paths, constant)
    joined = {name: sorted(found[name], key=lambda segment: int(segment.time.seconds[0])) for name in chosen}
    _check_grids([segment for segments in joined.values() for segment in segments])
    axes = {name: _join_times(segments) for name, segments in joined.items()}
    _check_times(axes, joined)
    return Catalogue(tuple(map(tuple, joined.values())), axes[chosen[0]], tuple(dict.fromkeys(notes)))


def _segments_of(path: Path, options: SourceOptions, notes: list[str], constant: dict[str, Path]) -> list[Segment]:
    dataset = open_source(path)
    segments: list[Segment] = []
    times: dict[Hashable, TimeAxis] = {}
    chunks = ZarrChunks(path) if path.is_dir() and not options.fill_absent_chunks else None
    ours = "fingerprint" in dataset.attrs and "fields" in dataset.data_vars  # a store's: its mask is in the fields
    for name in ["fields"] if ours else dataset.data_vars:
        roles = find_roles(dataset, name, options, path)
        if roles is None or dataset[name].dtype.kind not in "fiub":
            if dataset[name].ndim >= 2:
                constant[str(name)] = path
            continue
        grid = _source_grid(dataset, roles, options, path)
        if roles.time not in times:
            times[roles.time] = _times(dataset, roles, options, path, notes)
        segments += [
            Segment(path, channel, dataset[name], roles, level, grid, times[roles.time], what, chunks)
            for level, channel, what in channels_of(dataset, name, roles)
        ]
    return segments


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


def _choose(
    found: dict[str, list[Segment]], wanted: Sequence[str] | None, paths: Sequence[Path], constant: dict[str, Path]
) -> list[str]:
    """Names of the channels to take; a variable's name stands for all its levels."""
    if wanted is None:
        return list(found)
    chosen: list[str] = []
    by_variable = {name: str(segments[0].array.name) for name, segments in found.items()}
    for name in wanted:
        names = [name] if name in found else [key for key, variable in by_variable.items() if variable == name]
        if not names and name in constant:
            raise InputError(
                f"the variable {name!r} of {constant[name]} is no field in time, latitude and longitude: a store holds "
                f"what changes in time. Leave it out of --variables."
            )
        if not names:
            raise unknown_name("variable", name, list(found), f"the sources {', '.join(map(str, paths[:3]))}")
        chosen += names
    return list(dict.fromkeys(chosen))


def _check_grids(segments: Sequence[Segment]) -> None:
    first = segments[0]
    for segment in segments:
        for name in ("latitude_deg", "longitude_deg"):
            mine, other = getattr(first.grid, name), getattr(segment.grid, name)
            if mine.shape != other.shape or np.abs(mine - other).max() > SAME_DEG:
                raise InputError(
                    f"sources must share one grid, but the {name} of {first.channel.name!r} in {first.path} are "
                    f"{_range(mine)}, those of {segment.channel.name!r} in {segment.path} {_range(other)}. "
                    f"Regrid one of them, or leave it out with --variables."
                )


def _range(values: NDArray[np.float64]) -> str:
    return f"{values.size} values from {values[0]:g} to {values[-1]:g}"


def _join_times(segments: Sequence[Segment]) -> TimeAxis:
    """The times of one channel, over its sources, which must be the same thing in the same units."""
    first = segments[0]
    for segment in segments:
        if segment.what != first.what or not _same_units(segment.channel.units, first.channel.units):
            raise InputError(
                f"{first.channel.name!r} is {first.what} in {first.channel.units or 'no units'} in {first.path}, but "
                f"{segment.what} in {segment.channel.units or 'no units'} in {segment.path}: they are not one field. "
                f"Convert one of them, or rename it in its source, for example with `ncrename -v`."
            )
    calendars = {segment.time.calendar for segment in segments}
    if len(calendars) > 1:
        raise InputError(
            f"sources of {segments[0].channel.name!r} use different calendars: {', '.join(sorted(calendars))}. "
            f"Say which one is right with --calendar."
        )
    for earlier, later in pairwise(segments):
        if later.time.seconds[0] <= earlier.time.seconds[-1]:
            raise InputError(
                f"the times of {earlier.channel.name!r} overlap: {earlier.path} ends at {_last(earlier.time)}, "
                f"{later.path} starts at {later.time.label(0)}. Give each time once."
            )
    return TimeAxis(np.concatenate([segment.time.seconds for segment in segments]), calendars.pop())


def _same_units(one: str, other: str) -> bool:
    """Whether two texts mean the same; one that is empty says nothing."""
    mine, others = ("".join(text.replace("**", "").replace("^", "").split()) for text in (one, other))
    return mine == others or not mine or not others


def _together(levels: Sequence[int]) -> slice | list[int]:
    """Levels of an array as they are read at once."""
    if list(levels) == list(range(levels[0], levels[-1] + 1)):
        return slice(levels[0], levels[-1] + 1)
    return list(levels)


def _check_times(axes: dict[str, TimeAxis], joined: dict[str, list[Segment]]) -> None:
    first_name, first = next(iter(axes.items()))
    for name, axis in axes.items():
        if axis.calendar == first.calendar and np.array_equal(axis.seconds, first.seconds):
            continue
        raise InputError(
            f"all variables need the same times, but {first_name!r} in {joined[first_name][0].path} has {len(first)} "
            f"from {first.label(0)} to {_last(first)} ({first.calendar}), {name!r} in {joined[name][0].path} has "
            f"{len(axis)} from {axis.label(0)} to {_last(axis)} ({axis.calendar}). Give sources with the same times, "
            f"or leave one variable out with --variables."
        )


def _last(axis: TimeAxis) -> str:
    return axis.label(len(axis) - 1)
