"""How ranges of dates are written."""

import re
from datetime import date
from typing import Any

DATE = r"\d{4,}(?:-\d\d(?:-\d\d(?:[T ]\d\d(?::\d\d(?::\d\d)?)?)?)?)?"
RANGE = re.compile(rf"({DATE})|({DATE})?/({DATE})?")
"""``1979/2015``, ``2016-07/``, ``/1999-12-31T18``, or one date; closed: a year is all of it."""


def as_ranges(value: Any) -> Any:
    """One range of dates or several, as a tuple of texts: YAML makes a number of a year and a date of a day.

    Raises:
        ValueError: a text that is none, in whatever calendar.
    """
    several = value if isinstance(value, list | tuple) else [value]
    return tuple(_checked(str(one)) if isinstance(one, str | int | date) else one for one in several)


def _checked(text: str) -> str:
    if text.strip("/ ") == "" or not RANGE.fullmatch(text):
        raise ValueError(
            f"a range of dates such as 1979/2015, 2016-07/ or 2003-03-01T06/2003-03-04, got {text!r}; both ends belong "
            f"to it, and a year or a day is all of it"
        )
    return text
