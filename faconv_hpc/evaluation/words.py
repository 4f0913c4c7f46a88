"""Places, months, durations and units in words, and tables, for reports and figures."""

from collections.abc import Iterable, Sequence

from ..data.times import MONTHS, SECONDS_PER_DAY, SECONDS_PER_HOUR

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


def duration_in_words(hours: float) -> str:
    """Such as ``3.2 days``."""
    days = hours * SECONDS_PER_HOUR / SECONDS_PER_DAY
    for size, unit in ((365.25, "years"), (30.4, "months"), (1.0, "days")):
        if days >= 2 * size:
            return f"{days / size:.1f} {unit}"
    return f"{hours:.1f} hours"
