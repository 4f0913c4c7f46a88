"""Whether two texts mean the same units.

Not by pint, which does not read ``m s-1``, nor by UDUNITS, which is compiled: nothing is to be converted here.
"""

import re
from collections import Counter

FACTOR = re.compile(
    r"(?P<by>\s*/\s*|\s*\.\s*|\s*\*(?!\*)\s*|\s+)?(?P<name>1(?!\d)|%|[^\W\d]+)(?:(?:\*\*|\^)?(?P<power>[-+]?\d+))?"
)
RAISED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹·", "-0123456789.")


def same_units(one: str, other: str) -> bool:
    """Whether two texts mean the same units: ``m/s``, ``m s-1``, ``m s**-1`` and ``m s^-1`` do.

    ``ms-1`` means others, per millisecond, as UDUNITS and the CF conventions read it. Who writes it for ``m s-1`` is
    told so, see `hint`: what is taken for the same unasked cannot be told apart any more.
    """
    powers = powers_of(one), powers_of(other)
    return powers[0] == powers[1] and (powers[0] is not None or _plain(one) == _plain(other))


def hint(one: str, other: str) -> str:
    """For a message that refuses two texts: how they may mean the same after all; empty where they cannot."""
    if _plain(one) != _plain(other) or same_units(one, other):
        return ""
    return " A blank alone tells them apart: if both mean the same, correct the attribute `units`."


def powers_of(units: str) -> dict[str, int] | None:
    """Powers of the units that a text is a product of, as UDUNITS reads it: a stroke turns the factor after it alone.
    None: it is no such product, and compared as it stands, blanks left out; so is a text of nothing."""
    text, powers, place = units.translate(RAISED).strip(), Counter[str](), 0
    while place < len(text):
        factor = FACTOR.match(text, place)
        if factor is None or (place == 0) != (factor["by"] is None):
            return None
        turned = -1 if (factor["by"] or "").strip() == "/" else 1
        if factor["name"] != "1":
            powers[factor["name"]] += turned * int(factor["power"] or 1)
        place = factor.end()
    return {name: power for name, power in powers.items() if power} if text else None


def _plain(units: str) -> str:
    return "".join(units.replace("**", "").replace("^", "").split())
