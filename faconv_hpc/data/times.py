"""The time axis: seconds since 1970 in the calendar of the source, sequence after sequence, and what follows."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cftime
import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

EPOCH_UNITS = "seconds since 1970-01-01 00:00:00"
SECONDS_PER_HOUR = 3600
SECONDS_PER_DAY = 86400
MONTHS = 12  # of a year, in every calendar
YEAR_S = round(365.25 * SECONDS_PER_DAY)
IRREGULAR_S = 1.5  # times are kept to the second, so steps meant to be equal differ by one at most
ALIKE = 0.25  # of the usual step, by which others may differ: months and seasons are alike, a missing time is not
_SYNONYMS = {"gregorian": "standard", "365_day": "noleap", "366_day": "all_leap"}


@dataclass(frozen=True)
class TimeAxis:
    """Instants of the frames: of one sequence, or of several, one after the other, each strictly increasing.

    Args:
        seconds: (time,) int64, since 1970-01-01 00:00 of the ``calendar``.
        calendar: CF name: ``standard``, ``proleptic_gregorian``, ``noleap``, ``360_day``, ...
        beginnings: first frames of the sequences.
        names: of the sequences: members, runs; empty where there is but one.
    """

    seconds: NDArray[np.int64]
    calendar: str
    beginnings: tuple[int, ...] = (0,)
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return int(self.seconds.size)

    @property
    def sequences(self) -> tuple[range, ...]:
        """The frames of each."""
        return tuple(map(range, self.beginnings, (*self.beginnings[1:], len(self))))

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """(time,) in which sequence a frame is."""
        return np.repeat(np.arange(len(self.beginnings)), [len(own) for own in self.sequences])

    @property
    def said_of_sequences(self) -> dict[str, Any]:
        """What a digest takes in beside the times; nothing where there is but one."""
        return {"beginnings": self.beginnings, "sequences": self.names} if self.names else {}

    @cached_property
    def steps(self) -> NDArray[np.int64]:
        """Seconds from each frame to the next of its sequence."""
        return np.delete(np.diff(self.seconds), np.array(self.beginnings[1:], dtype=np.int64) - 1)

    @cached_property
    def hours(self) -> NDArray[np.float64]:
        """(time,) hours since 1970-01-01 00:00."""
        return self.seconds / SECONDS_PER_HOUR

    @cached_property
    def year_fraction(self) -> NDArray[np.float64]:
        """(time,) how much of the calendar's year has passed, in [0, 1)."""
        known, where = np.unique(self.years, return_inverse=True)
        starts, ends = np.array([self._year_limits(int(year)) for year in known], dtype=np.int64).T
        return np.asarray((self.seconds - starts[where]) / (ends - starts)[where], dtype=np.float64)

    @cached_property
    def months(self) -> NDArray[np.int64]:
        """(time,) 1 to 12."""
        return np.array([date.month for date in self._dates(self.seconds)], dtype=np.int64)

    @cached_property
    def years(self) -> NDArray[np.int64]:
        """(time,) of the calendar."""
        return np.array([date.year for date in self._dates(self.seconds)], dtype=np.int64)

    @cached_property
    def utc_hour(self) -> NDArray[np.float64]:
        """(time,) hours since midnight, in [0, 24)."""
        return np.mod(self.seconds, SECONDS_PER_DAY) / SECONDS_PER_HOUR

    @cached_property
    def step_s(self) -> float:
        """From a time to the next, as most have it."""
        return float(np.median(self.steps)) if self.steps.size else 0.0

    @cached_property
    def gaps(self) -> NDArray[np.int64]:
        """Frames that do not follow the one before them by about the usual step (see `ALIKE`), or begin a sequence."""
        unlike = np.abs(np.diff(self.seconds) - self.step_s) > ALIKE * self.step_s
        unlike[np.array(self.beginnings[1:], dtype=np.int64) - 1] = True
        return np.flatnonzero(unlike) + 1

    def after(self, frame: int) -> int:
        """The instant that is to follow a frame: as far away as the next one was a year before, or else as the frame
        is from the one before it. Months have the lengths that they had."""
        (own,) = (one for one in self.sequences if frame in one)
        second, before = int(self.seconds[frame]), self.seconds[own.start : frame + 1]
        if len(before) < 2:
            raise InputError(f"{self.label(frame)} is the only time, and none tells how long a step is. Give more.")
        step_s = int(before[-1] - before[-2])
        year = int(np.argmin(np.abs(before[:-1] - (second - YEAR_S))))
        if abs(int(before[year]) - (second - YEAR_S)) <= ALIKE * step_s:
            step_s = int(before[year + 1] - before[year])
        return second + step_s

    @property
    def described(self) -> str:
        """How many, from when to when; for messages."""
        sequences = f" in {len(self.names)} sequences" if self.names else ""
        return f"{len(self)}{sequences} from {self.label(0)} to {self.label(len(self) - 1)} ({self.calendar})"

    def date(self, frame: int) -> str:
        """Date and time of a frame."""
        return str(self._dates(self.seconds[frame : frame + 1])[0])

    def label(self, frame: int) -> str:
        """Which frame it is, for people: its date, and its sequence where there are several."""
        of = f" of sequence {self.names[self.numbers[frame]]}" if self.names else ""
        return self.date(frame) + of

    def _dates(self, seconds: NDArray[np.int64]) -> NDArray[np.object_]:
        return np.atleast_1d(np.asarray(cftime.num2date(seconds, EPOCH_UNITS, calendar=self.calendar)))

    def _year_limits(self, year: int) -> tuple[int, int]:
        """Start of a year and of the next one, in seconds."""
        first = cftime.datetime(year, 1, 1, calendar=self.calendar)
        december = cftime.datetime(year, 12, 1, calendar=self.calendar)
        start, last_month = cftime.date2num([first, december], EPOCH_UNITS, calendar=self.calendar)
        return round(start), round(last_month) + december.daysinmonth * SECONDS_PER_DAY


def normal_calendar(name: str) -> str:
    """One name for calendars that have two."""
    lower = name.lower()
    return _SYNONYMS.get(lower, lower)


def decode_times(values: NDArray[np.generic], units: str, calendar: str, where: str) -> TimeAxis:
    """Numbers with CF units as a time axis, rounded to the second.

    Args:
        values: (time,) numbers.
        units: such as ``hours since 1940-01-01``.
        calendar: CF name of the calendar.
        where: file and variable, for messages.

    Raises:
        InputError: units or a calendar that mean nothing, or times that are not numbers.
    """
    calendar = normal_calendar(calendar)
    numbers = np.asarray(values, dtype=np.float64) if np.issubdtype(values.dtype, np.floating) else values
    if not np.issubdtype(numbers.dtype, np.number) or not np.isfinite(numbers).all():
        raise InputError(
            f"the times in {where} must be finite numbers, got {values.dtype} with "
            f"{values.ravel()[:3].tolist()}... Name another time with --time-coordinate."
        )
    try:
        dates = cftime.num2date(numbers, units, calendar=calendar)
        seconds = cftime.date2num(dates, EPOCH_UNITS, calendar=calendar)
    except (ValueError, OverflowError) as error:
        if units.split()[:1] in (["months"], ["month"]) and calendar != "360_day":
            raise InputError(
                f"the times in {where} are in {units!r}, and a month has no fixed length in {calendar!r}. Give "
                f"dates instead: `ds = xarray.open_dataset(FILE, decode_times=False)`, "
                f'`ds["time"] = xarray.date_range("1990-01-01", periods=ds.sizes["time"], freq="MS")` with your first '
                f"month, `ds.to_netcdf(NEW)`; or, if all months have 30 days, say --calendar 360_day."
            ) from None
        raise InputError(
            f"the times in {where} cannot be read as {units!r} in calendar {calendar!r} ({error}). "
            f'Give --time-units "hours since 2000-01-01" (with your date) and, if it is not {calendar}, '
            f"--calendar, such as proleptic_gregorian, noleap or 360_day."
        ) from None
    return TimeAxis(np.rint(np.asarray(seconds, dtype=np.float64)).astype(np.int64), calendar)


def check_increasing(axis: TimeAxis, where: str) -> None:
    """Times that stand still or run backwards are refused.

    Raises:
        InputError: naming the first such pair.
    """
    steps = np.diff(axis.seconds)
    if np.any(steps <= 0):
        frame = int(np.argmax(steps <= 0))
        raise InputError(
            f"times must increase, but in {where} frame {frame} is at {axis.label(frame)} and frame "
            f"{frame + 1} at {axis.label(frame + 1)}. Sort the source by time and drop the duplicates."
        )


def describe_steps(axis: TimeAxis) -> tuple[float, float]:
    """Smallest and largest step in hours; (0, 0) for single times."""
    steps = axis.steps / SECONDS_PER_HOUR
    return (float(steps.min()), float(steps.max())) if steps.size else (0.0, 0.0)


def is_regular(axis: TimeAxis) -> bool:
    """Whether all steps are alike, to the second to which times are kept."""
    smallest, largest = describe_steps(axis)
    return (largest - smallest) * SECONDS_PER_HOUR <= IRREGULAR_S


def in_sequence(parts: Sequence[tuple[str, TimeAxis]]) -> TimeAxis:
    """One axis of several, each with the name of its sequence; those of one name follow each other."""
    names = [name for name, _ in parts]
    new = [place for place, name in enumerate(names) if place == 0 or name != names[place - 1]]
    ends = np.cumsum([0, *(len(axis) for _, axis in parts)])
    seconds = np.concatenate([axis.seconds for _, axis in parts])
    known = tuple(names[place] for place in new) if len(new) > 1 else ()
    return TimeAxis(seconds, parts[0][1].calendar, tuple(int(ends[place]) for place in new), known)
