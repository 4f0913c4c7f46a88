"""Places, months, durations, leads and units in words, and tables, for reports and figures."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..data.periods import spans_of
from ..data.times import MONTHS, SECONDS_PER_DAY, SECONDS_PER_HOUR

HOURS = {"h": 1.0, "days": 24.0, "months": 730.5}
IN_HOURS, SHORTEST_MONTH, WHOLE = 72.0, 28 * 24.0, 0.1  # hours below; hours; months by which whole ones may be off
MONTH_NAMES = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def latitude_in_words(degrees: float) -> str:
    """Such as ``30°S``."""
    return f"{abs(degrees):.4g}°{'N' if degrees > 0 else 'S' if degrees < 0 else ''}"


def longitude_in_words(degrees: float) -> str:
    """Such as ``30°W``."""
    east = (degrees + 180) % 360 - 180
    return f"{abs(east):.4g}°{'E' if east > 0 else 'W' if east < 0 else ''}"


def with_units(what: str, units: str) -> str:
    """Such as ``RMSE [K]``; without units as it is."""
    return f"{what} [{units}]" if units else what


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Of Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows))


def plain(units: str) -> str:
    """Units in Markdown, which takes stars for emphasis."""
    return units.replace("*", "\\*")


def months_in_words(months: Sequence[int]) -> str:
    """Months from 0, those in a row as a range, also over the end of the year."""
    if len(months) == MONTHS:
        return "all year"
    starts = [month for month in months if (month - 1) % MONTHS not in months]
    spans = []
    for start in starts:
        end = start
        while (end + 1) % MONTHS in months:
            end = (end + 1) % MONTHS
        spans.append(MONTH_NAMES[start] if start == end else f"{MONTH_NAMES[start]} to {MONTH_NAMES[end]}")
    return ", ".join(spans)


def duration_in_words(hours: float, step_hours: float = 0.0) -> str:
    """Such as ``3.2 days``, in no unit that is shorter than the data's steps."""
    days, step_days = (of * SECONDS_PER_HOUR / SECONDS_PER_DAY for of in (hours, step_hours))
    for size, unit in ((365.25, "years"), (30.4, "months"), (1.0, "days")):
        if days >= 2 * size or step_days >= size * (1 - WHOLE):
            return f"{days / size:.1f} {unit}"
    return f"{hours:.1f} hours"


@dataclass(frozen=True, eq=False)
class Leads:
    """Leads as a reader thinks of them: in hours below three days, else in days; in months where all are whole ones.

    Args:
        hours_L: how far ahead, increasing; on average over dates, as months have several lengths.
    """

    hours_L: NDArray[np.floating]

    @property
    def axis(self) -> tuple[NDArray[np.float64], str]:
        """(L,) all of them in the unit of the last, and that unit."""
        unit = self._unit(-1)
        return np.array([self._in(unit, place) for place in range(len(self.hours_L))]), unit

    def one(self, place: int) -> str:
        """Such as ``6 h``, ``10 days``, ``1 month``."""
        unit = self._unit(place)
        value = self._in(unit, place)
        return f"{value:.4g} {unit if unit == 'h' or value != 1 else unit[:-1]}"

    @property
    def span(self) -> str:
        """Of all, such as ``6 h to 10 days``."""
        return self._range(range(len(self.hours_L)))

    def some(self, chosen_L: NDArray[np.bool_]) -> str:
        """Such as ``1 to 3 h, 5 h``: those in a row as a range."""
        return ", ".join(self._range(span) for span in spans_of(chosen_L))

    def _range(self, places: range) -> str:
        first, last = places[0], places[-1]
        if first == last:
            return self.one(first)
        begin = (
            f"{self._in(self._unit(first), first):.4g}" if self._unit(first) == self._unit(last) else self.one(first)
        )
        return f"{begin} to {self.one(last)}"

    def _unit(self, place: int) -> str:
        months_L = self.hours_L / HOURS["months"]
        if self.hours_L[0] >= SHORTEST_MONTH and (np.abs(months_L - months_L.round()) <= WHOLE).all():
            return "months"
        return "h" if self.hours_L[place] < IN_HOURS else "days"

    def _in(self, unit: str, place: int) -> float:
        value = float(self.hours_L[place] / HOURS[unit])
        return round(value) if unit == "months" else value
