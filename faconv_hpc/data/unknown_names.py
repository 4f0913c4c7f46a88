"""Names the user gives, looked up with a helpful answer when they are wrong."""

import difflib
from collections.abc import Sequence

from ..errors import InputError


def unknown_name(kind: str, name: str, choices: Sequence[str], where: str) -> InputError:
    """The error for a name that is not there: the nearest one that is, and all of them.

    Args:
        kind: what is named, such as ``"variable"``.
        name: what the user wrote.
        choices: what exists.
        where: where it was looked for, such as a path.
    """
    nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.0)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return InputError(f"no {kind} {name!r} in {where}.{hint} There are: {', '.join(choices) or 'none'}.")


def index_of(kind: str, name: str, choices: Sequence[str], where: str) -> int:
    """Position of ``name`` in ``choices``.

    Raises:
        InputError: it is not there.
    """
    if name not in choices:
        raise unknown_name(kind, name, choices, where)
    return list(choices).index(name)
