"""Periods: ranges of dates and sequences, which frames lie in them, and which windows of frames they allow."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import cftime
import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .dates import PERIOD, RANGE
from .times import EPOCH_UNITS, TimeAxis
from .unknown_names import index_of

Run = tuple[int, int, int]
"""Consecutive indices: position of the first one among all, first index, how many."""

UNITS = ("year", "month", "day", "hour", "minute", "second")
FIRST = (1, 1, 0, 0, 0)  # month, day, hour, minute, second


def frames_within(axis: TimeAxis, ranges: Iterable[str]) -> tuple[range, ...]:
    """The frames that lie in some of the ranges, as spans in their order, none twice.

    Raises:
        InputError: a date that the calendar does not have, a sequence that is not there, or an end before its
            beginning.
    """
    inside = np.zeros(len(axis), dtype=bool)
    for text in ranges:
        match = PERIOD.fullmatch(text)
        assert match is not None, f"{text!r} was checked before"
        first, last = _limits(match["dates"], axis.calendar) if match["dates"] else (-np.inf, np.inf)
        own = _sequences(axis, match["one"] or match["first"], match["one"] or match["last"], text)
        inside[own.start : own.stop] |= ((axis.seconds >= first) & (axis.seconds <= last))[own.start : own.stop]
    return spans_of(inside)


def ranges_of(axis: TimeAxis, spans: Iterable[range]) -> tuple[str, ...]:
    """The ranges that are just these spans: the inverse of `frames_within`."""
    if not axis.names:
        return tuple(f"{axis.date(span.start)}/{axis.date(span.stop - 1)}" for span in spans)
    found: list[str] = []
    inside = mask_of(spans, len(axis))
    for name, own in zip(axis.names, axis.sequences, strict=True):
        if inside[own.start : own.stop].all():
            found.append(f"sequence {name}")
            continue
        for part in spans_of(inside[own.start : own.stop]):
            dates = [axis.date(own[frame]) for frame in (part.start, part.stop - 1)]
            found.append(f"{dates[0]}/{dates[1]} of sequence {name}")
    return tuple(found)


def is_there(axis: TimeAxis, text: str) -> bool:
    """Whether the sequences that a range names, if it names some, are there."""
    match = PERIOD.fullmatch(text)
    return match is not None and {match["one"], match["first"], match["last"]} <= {None, *axis.names}


def spans_of(inside: NDArray[np.bool_]) -> tuple[range, ...]:
    """Where a mask of frames is true."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], inside, [False])).astype(np.int8)))
    return tuple(range(int(start), int(stop)) for start, stop in edges.reshape(-1, 2))


def runs_of(indices: Sequence[int] | NDArray[np.integer]) -> Iterator[Run]:
    """Cuts indices into runs that count upwards by one."""
    starts = np.flatnonzero(np.diff(indices) != 1) + 1
    for at, end in pairwise([0, *starts.tolist(), len(indices)]):
        if at < end:  # there are none of nothing
            yield at, int(indices[at]), end - at


def evenly(among: int, count: int) -> list[int]:
    """So many places of a sequence, or all that there are, spread over it; of several the first and the last."""
    places: list[int] = np.linspace(0, among - 1, min(among, count)).round().astype(int).tolist()
    return places


def mask_of(spans: Iterable[range], frames: int) -> NDArray[np.bool_]:
    """(frames,) whether a frame lies in some span."""
    inside = np.zeros(frames, dtype=bool)
    for span in spans:
        inside[span.start : span.stop] = True
    return inside


def stretches_of(axis: TimeAxis, spans: Iterable[range]) -> tuple[range, ...]:
    """The spans, cut where times are missing: no window and no change from a frame to the next leads over a gap."""
    parts: list[range] = []
    for span in spans:
        inside = axis.gaps[(axis.gaps > span.start) & (axis.gaps < span.stop)].tolist()
        limits = [span.start, *inside, span.stop]
        parts += [range(start, stop) for start, stop in pairwise(limits)]
    return tuple(parts)


def starts_within(stretches: Iterable[range], window: int) -> NDArray[np.int64]:
    """(windows,) first frames of the windows that lie in one stretch, with the target of their last step."""
    starts = [np.arange(stretch.start, stretch.stop - window) for stretch in stretches if len(stretch) > window]
    return np.concatenate([np.empty(0, dtype=np.int64), *starts]).astype(np.int64)


def starts_before(
    stretches: Iterable[range], targets: NDArray[np.bool_], window: int, leads: int = 1
) -> NDArray[np.int64]:
    """(windows,) first frames of those that ``leads`` of some frames follow; those before may be others.

    Args:
        targets: (frames,) which ones.
    """
    starts = starts_within(stretches, window + leads - 1)
    wanted = [targets[starts + window + lead] for lead in range(leads)]
    return starts[np.all(wanted, axis=0)]


def _sequences(axis: TimeAxis, first: str | None, last: str | None, text: str) -> range:
    """The frames of the sequences from one to another."""
    if first is None or last is None:
        return range(len(axis))
    if not axis.names:
        raise InputError(
            f"the period {text!r} names a sequence, but the store has but one, without a name. Give dates."
        )
    begin, end = (axis.sequences[index_of("sequence", name, axis.names, "the store")] for name in (first, last))
    if end.stop < begin.stop:
        raise InputError(f"the period {text!r} ends before it begins: {last} stands before {first} in the store.")
    return range(begin.start, end.stop)


def _limits(text: str, calendar: str) -> tuple[float, float]:
    """First and last second of a range."""
    match = RANGE.fullmatch(text)
    assert match is not None, f"{text!r} was checked before"
    one, begin, end = match.groups()
    what = f"the period {text!r}"
    begin, end = one or begin, one or end
    first = second_of(begin, calendar, what) if begin else -np.inf
    last = second_of(end, calendar, what, after=True) - 1 if end else np.inf
    if last < first:
        raise InputError(f"the period {text!r} ends before it begins. Write the earlier date first.")
    return first, last


def second_of(date: str, calendar: str, what: str, *, after: bool = False) -> int:
    """Of the beginning of a date, or of what comes after it: the next year, month, ..., second.

    Args:
        date: as `dates.DATE` has it.
        what: names it in messages, such as ``the period '1979/2015'``.

    Raises:
        InputError: the calendar has no such date.
    """
    given = [int(part) for part in re.split(r"[-T :]", date)]
    unit = UNITS[len(given) - 1]
    try:
        begin = cftime.datetime(*given, *FIRST[len(given) - 1 :], calendar=calendar)
    except ValueError as error:
        raise InputError(
            f"{what} names {date}, which is no date of the calendar {calendar} ({error}). Change it."
        ) from None
    if after and unit == "year":
        begin = begin.replace(year=begin.year + 1)
    elif after and unit == "month":
        begin = begin.replace(year=begin.year + begin.month // 12, month=begin.month % 12 + 1)
    seconds = round(float(cftime.date2num(begin, EPOCH_UNITS, calendar=calendar)))
    lengths = {"day": 86400, "hour": 3600, "minute": 60, "second": 1}
    return seconds + (lengths.get(unit, 0) if after else 0)
