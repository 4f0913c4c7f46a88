"""Sources joined: for every channel, where each frame comes from. Reads them slab by slab."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ..data.layout import Channel
from ..data.times import TimeAxis, in_sequence
from ..data.units import hint, same_units
from ..data.unknown_names import unknown_name
from ..errors import InputError
from ..spatial.grid import SAME_DEG, Span
from .found import Found
from .roles import SourceOptions
from .segments import ALWAYS, Segment, SourceGrid
from .sources import open_sources

GREGORIAN = ("standard", "proleptic_gregorian")
GREGORIAN_S = -12219292800  # 1582-10-15, from when on they agree


@dataclass(frozen=True, eq=False)
class Catalogue:
    """All channels of all sources on one grid and one time axis; a `FieldReader`.

    Attributes:
        static: the fields without time.
        notes: what was assumed or left out.
    """

    segments: tuple[tuple[Segment, ...], ...]
    static: tuple[Segment, ...]
    time: TimeAxis
    notes: tuple[str, ...]

    @property
    def channels(self) -> tuple[Channel, ...]:
        """In the order of the store to be."""
        return tuple(segments[0].channel for segments in self.segments)

    @property
    def grid(self) -> SourceGrid:
        """The common grid."""
        return (self.segments[0] if self.segments else self.static)[0].grid

    def static_fields(self) -> Iterator[NDArray[np.float32]]:
        """(Y, X) of each field without time, read when it is asked for."""
        return (segment.read_once() for segment in self.static)

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
                    beside = [self.segments[channel][place] for channel in group]
                    at = first + inside.start - frames.start
                    slab_TCYX[at : at + len(inside), columns] = segment.read(inside, rows, beside)
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


def build_catalogue(
    paths: Sequence[Path], options: SourceOptions, longitude_deg: NDArray[np.float64] | None = None
) -> Catalogue:
    """Opens all sources and joins them.

    Args:
        longitude_deg: of the store that they are added to; it may lack fields without time only.

    Raises:
        InputError: nothing to take, or sources that do not fit together.
    """
    opened = ((dataset, path) for path in paths for dataset in open_sources(path, options.select))
    return catalogue_of(opened, options, longitude_deg)


def catalogue_of(
    opened: Iterable[tuple[xr.Dataset, Path]], options: SourceOptions, longitude_deg: NDArray[np.float64] | None = None
) -> Catalogue:
    """Joins what is open, each with the name of its source; see `build_catalogue`."""
    found, paths = Found(options), []
    for dataset, path in opened:
        found.add(dataset, path)
        paths.append(path)
    alone = longitude_deg is None
    found.check(paths, alone=alone)
    chosen, constant = _choose(found.segments, options.variables, paths, found.static, alone=alone)
    order = found.sequences
    joined = {
        name: sorted(found.segments[name], key=lambda one: (order.index(one.sequence), one.begin)) for name in chosen
    }
    turned = _on_one_grid(joined | {name: [found.static[name]] for name in constant}, longitude_deg)
    constant = [name for name in constant if found.is_sound(name)]
    static = tuple(turned[name][0] for name in constant)
    if not chosen:
        return Catalogue((), static, ALWAYS, tuple(dict.fromkeys(found.notes)))
    joined = _in_one_calendar({name: turned[name] for name in chosen})
    axes = {name: _join_times(segments) for name, segments in joined.items()}
    _check_times(axes, joined)
    time = axes[chosen[0]]
    frames = options.period.frames_of(time)
    taken = tuple(tuple(_taken(segments, frames)) for segments in joined.values())
    axis = in_sequence([(one.sequence, one.time) for one in taken[0]])
    return Catalogue(taken, static, axis, tuple(dict.fromkeys(found.notes)))


def _taken(segments: Sequence[Segment], frames_of: Sequence[range]) -> Iterator[Segment]:
    """Of each segment the frames that are asked for of its sequence, by their places among all."""
    first, sequence = 0, 0
    for before, segment in zip([segments[0], *segments], segments, strict=False):
        sequence += segment.sequence != before.sequence
        frames, stop = frames_of[sequence], first + len(segment.time)
        low, high = (max(0, -(-(place - frames.start) // frames.step)) for place in (first, stop))
        own = frames[low:high]
        if len(own):
            there = range(own.start - first, own[-1] - first + 1, own.step)
            yield replace(segment, frames=there, time=TimeAxis(segment.time.seconds[there], segment.time.calendar))
        first = stop


def _in_one_calendar(joined: dict[str, list[Segment]]) -> dict[str, list[Segment]]:
    """From 1582-10-15 on ``standard`` and ``proleptic_gregorian`` are the same; where sources say both, the first."""
    if not same_calendar(*(segment.time for segments in joined.values() for segment in segments)):
        return joined
    if all(segment.time.calendar != GREGORIAN[0] for segments in joined.values() for segment in segments):
        return joined
    return {
        name: [replace(one, time=TimeAxis(one.time.seconds, GREGORIAN[0])) for one in segments]
        for name, segments in joined.items()
    }


def same_calendar(*axes: TimeAxis) -> bool:
    """Whether the seconds of some axes are of one calendar, or of two that they cannot tell apart."""
    calendars, first = {one.calendar for one in axes}, min(one.seconds.min() for one in axes)
    return len(calendars) == 1 or (calendars == set(GREGORIAN) and bool(first >= GREGORIAN_S))


def _choose(
    found: dict[str, list[Segment]],
    wanted: Sequence[str] | None,
    paths: Sequence[Path],
    static: dict[str, Segment],
    *,
    alone: bool,
) -> tuple[list[str], list[str]]:
    """Names of the channels to take, a variable's name stands for all its levels; and of the fields without time."""
    if wanted is None:
        return list(found), [name for name in static if name not in found]
    chosen: list[str] = []
    constant: list[str] = []
    by_variable = {name: str(segments[0].array.name) for name, segments in found.items()}
    for name in wanted:
        named = name in found or name in static  # z may be a variable with levels in one source, orography in another
        names = [name] * (name in found) if named else [key for key, one in by_variable.items() if one == name]
        timeless = [] if names else [key for key, segment in static.items() if name in segment.names]
        if not names and not timeless:
            raise unknown_name("variable", name, [*found, *static], f"the sources {', '.join(map(str, paths[:3]))}")
        chosen += names
        constant += timeless
    if not chosen and alone:
        raise InputError(
            f"--variables {','.join(wanted)} names only fields without time. Name one that is to be forecast, too."
        )
    return list(dict.fromkeys(chosen)), list(dict.fromkeys(constant))


def _on_one_grid(
    joined: dict[str, list[Segment]], longitude_deg: NDArray[np.float64] | None
) -> dict[str, list[Segment]]:
    """Sources that begin at another meridian, or call it 180 degrees east or west, are turned to the first one's."""
    if longitude_deg is None:
        longitude_deg = next(iter(joined.values()))[0].grid.longitude_deg
    turned = {
        name: [replace(one, grid=one.grid.beginning_at(longitude_deg)) for one in segments]
        for name, segments in joined.items()
    }
    _check_grids([segment for segments in turned.values() for segment in segments])
    return turned


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
        same = same_units(segment.channel.units, first.channel.units) or segment.is_accepted
        if segment.what != first.what or not same:
            silent = not (segment.channel.units and first.channel.units)
            accept = f", or take both as they are: --accept {first.channel.name}" if silent else ""
            raise InputError(
                f"{first.channel.name!r} is {first.what} in {first.channel.units or 'no units'} in {first.path}, but "
                f"{segment.what} in {segment.channel.units or 'no units'} in {segment.path}: they are not one field. "
                f"Convert one of them, or prepare it alone under another name with --rename "
                f"{first.array.name}=NAME{accept}.{hint(segment.channel.units, first.channel.units)}"
            )
    calendars = {segment.time.calendar for segment in segments}
    if len(calendars) > 1:
        raise InputError(
            f"sources of {segments[0].channel.name!r} use different calendars: {', '.join(sorted(calendars))}. "
            f"Say which one is right with --calendar."
        )
    for earlier, later in pairwise(segments):
        if later.sequence == earlier.sequence and later.begin <= earlier.time.seconds[-1]:
            of = f" of sequence {later.sequence}" if later.sequence else ""
            raise InputError(
                f"the times of {earlier.channel.name!r}{of} overlap: {earlier.path} ends at {_last(earlier.time)}, "
                f"{later.path} starts at {later.time.label(0)}. Give each time once"
                + (", or several sequences of it with --sequences." if not later.sequence else ".")
            )
    return in_sequence([(segment.sequence, segment.time) for segment in segments])


def _check_times(axes: dict[str, TimeAxis], joined: dict[str, list[Segment]]) -> None:
    first_name, first = next(iter(axes.items()))
    sequences = {name: [*dict.fromkeys(one.sequence for one in segments)] for name, segments in joined.items()}
    for name, axis in axes.items():
        if sequences[name] != sequences[first_name]:
            told = (", ".join(sequences[one]) for one in (first_name, name))
            raise InputError(
                f"all variables need the same sequences, but {first_name!r} has {next(told)}, and {name!r} has "
                f"{next(told)}. Give sources with the same ones, or leave one variable out with --variables."
            )
        same = (axis.calendar, axis.beginnings) == (first.calendar, first.beginnings)
        if same and np.array_equal(axis.seconds, first.seconds):
            continue
        short = name if len(axis) < len(first) else first_name
        once = f", or take one that does not change with --static {joined[short][0].array.name}"
        raise InputError(
            f"all variables need the same times, but {first_name!r} in {joined[first_name][0].path} has "
            f"{first.described}, {name!r} in {joined[name][0].path} has {axis.described}. Give sources with the same "
            f"times, "
            f"or leave one variable out with --variables{once}."
        )


def _last(axis: TimeAxis) -> str:
    return axis.label(len(axis) - 1)
