"""How periods are written: ranges of dates, of sequences, or of dates in sequences."""

import re
from datetime import date
from typing import Any

DATE = r"\d{4,}(?:-\d\d(?:-\d\d(?:[T ]\d\d(?::\d\d(?::\d\d)?)?)?)?)?"
RANGE = re.compile(rf"({DATE})|({DATE})?/({DATE})?")
"""``1979/2015``, ``2016-07/``, ``/1999-12-31T18``, or one date; closed: a year is all of it."""
PERIOD = re.compile(
    r"(?:(?P<dates>[^a-z]+?)(?: of (?=s)|$))?(?:sequence (?P<one>.+)|sequences (?P<first>.+?) to (?P<last>.+))?"
)
"""A range of dates; ``sequence r1``, ``sequences 0 to 39``; or both, ``1979/2015 of sequence r1``."""


def as_ranges(value: Any) -> Any:
    """One period or several, as a tuple of texts: YAML makes a number of a year and a date of a day.

    Raises:
        ValueError: a text that is none, in whatever calendar.
    """
    several = value if isinstance(value, list | tuple) else [value]
    return tuple(_checked(str(one)) if isinstance(one, str | int | date) else one for one in several)


def _checked(text: str) -> str:
    match = PERIOD.fullmatch(text)
    dates = match["dates"] if match else ""
    if not text or (dates is not None and (dates.strip("/ ") == "" or not RANGE.fullmatch(dates))):
        raise ValueError(
            f"a range of dates such as 1979/2015, 2016-07/ or 2003-03-01T06/2003-03-04, of sequences such as "
            f"'sequence r1' or 'sequences 0 to 39', or both, '1979/2015 of sequence r1', got {text!r}; both ends "
            f"belong to it, and a year or a day is all of it"
        )
    return text
