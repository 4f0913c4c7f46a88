"""What a report was asked for, kept beside it so that another does not replace it unasked."""

import json
from collections.abc import Mapping
from pathlib import Path

from ..errors import InputError

ASKED = "asked"  # in the JSON


def check_is_free(file: Path, what: str, request: Mapping[str, str]) -> None:
    """Raises InputError where there is a report that another request has made.

    Args:
        file: its JSON, which has the request.
        what: for people, such as "an evaluation".
        request: by argument or option.
    """
    if not file.exists():
        return
    try:
        before = json.loads(file.read_text()).get(ASKED, {})
    except ValueError:  # it was cut off, or is another's
        before = {}
    for option, now in request.items():
        if before.get(option) != now:
            raise InputError(
                f"{file.parent} has {what} with {option} {before.get(option, 'not said')}, this command says {now}. "
                f"Give another --output, or --overwrite."
            )
