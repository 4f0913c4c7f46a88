"""Periods: ranges of dates, which frames lie in them, and which windows of frames they allow."""

import re
from collections.abc import Iterable
from itertools import pairwise

import cftime
import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .dates import RANGE
from .times import EPOCH_UNITS, TimeAxis

UNITS = ("year", "month", "day", "hour", "minute", "second")
FIRST = (1, 1, 0, 0, 0)  # month, day, hour, minute, second


def frames_within(axis: TimeAxis, ranges: Iterable[str]) -> tuple[range, ...]:
    """The frames whose times lie in some of the ranges, as spans in their order, none twice.

    Raises:
        InputError: a date that the calendar does not have, or an end before its beginning.
    """
    inside = np.zeros(len(axis), dtype=bool)
    for text in ranges:
        first, last = _limits(text, axis.calendar)
        inside |= (axis.seconds >= first) & (axis.seconds <= last)
    return spans_of(inside)


def spans_of(inside: NDArray[np.bool_]) -> tuple[range, ...]:
    """Where a mask of frames is true."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], inside, [False])).astype(np.int8)))
    return tuple(range(int(start), int(stop)) for start, stop in edges.reshape(-1, 2))


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


def _limits(text: str, calendar: str) -> tuple[float, float]:
    """First and last second of a range."""
    match = RANGE.fullmatch(text)
    assert match is not None, f"{text!r} was checked before"
    one, begin, end = match.groups()
    begin, end = one or begin, one or end
    first = _second(begin, calendar, text) if begin else -np.inf
    last = _second(end, calendar, text, after=True) - 1 if end else np.inf
    if last < first:
        raise InputError(f"the period {text!r} ends before it begins. Write the earlier date first.")
    return first, last


def _second(date: str, calendar: str, text: str, *, after: bool = False) -> float:
    """Of the beginning of a date, or of what comes after it: the next year, month, ..., second."""
    given = [int(part) for part in re.split(r"[-T :]", date)]
    unit = UNITS[len(given) - 1]
    try:
        begin = cftime.datetime(*given, *FIRST[len(given) - 1 :], calendar=calendar)
    except ValueError as error:
        raise InputError(
            f"the period {text!r} names {date}, which is no date of the calendar {calendar} ({error}). Change it."
        ) from None
    if after and unit == "year":
        begin = begin.replace(year=begin.year + 1)
    elif after and unit == "month":
        begin = begin.replace(year=begin.year + begin.month // 12, month=begin.month % 12 + 1)
    seconds = round(float(cftime.date2num(begin, EPOCH_UNITS, calendar=calendar)))
    lengths = {"day": 86400, "hour": 3600, "minute": 60, "second": 1}
    return seconds + (lengths.get(unit, 0) if after else 0)
