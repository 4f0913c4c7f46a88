"""A result beside an earlier one of the same case on the same machine: which of its ratios has fallen."""

from ..errors import InputError
from .case import BenchCase
from .result import BenchResult, Fall, Machine

MARGIN = 0.10
"""Of a ratio that is not counted as a fall."""
COMPARABLE = ("kind", "device", "threads")  # of the machine: with others ratios differ by factors


def check_comparable(case: BenchCase, machine: Machine, reference: BenchResult) -> None:
    """Raises InputError, which says what differs, unless the reference is of this case and such a machine."""
    ours, theirs = _described(case, machine), _described(reference.case, reference.machine)
    different = [f"{name} {ours[name]} (reference: {theirs[name]})" for name in ours if ours[name] != theirs[name]]
    if different:
        raise InputError(
            f"the reference is of another case or machine: {', '.join(different)}. Give the options that it was made "
            f"with, or make one here: faconv bench ... --json > FILE."
        )


def _described(case: BenchCase, machine: Machine) -> dict[str, str]:
    sizes = {name: str(getattr(case, name)) for name in BenchCase.model_fields}
    return sizes | {name: str(getattr(machine, name)) for name in COMPARABLE}


def falls(result: BenchResult, reference: BenchResult) -> tuple[Fall, ...]:
    """The ratios of layers in both that have fallen by more than `MARGIN`.

    Raises:
        InputError: they have no ratio in common.
    """
    now, before = ratios_of(result), ratios_of(reference)
    common = [key for key in now if key in before]
    if not common:
        raise InputError(
            f"the reference has {', '.join(row.layer for row in reference.rows)}, this result "
            f"{', '.join(row.layer for row in result.rows)}: no ratio is in both. Measure the same layers."
        )
    fallen = (key for key in common if now[key] < (1 - MARGIN) * before[key])
    return tuple(Fall(*key, before[key], now[key]) for key in fallen)


def ratios_of(result: BenchResult) -> dict[tuple[str, str], float]:
    """By layer and name; the larger, the better."""
    ratios: dict[tuple[str, str], float] = {}
    for row in result.rows:
        for base in row.faster.keys() - {row.layer}:
            ratios[row.layer, f"faster than {base}"] = row.faster[base].median
        for base in row.smaller.keys() - {row.layer}:
            ratios[row.layer, f"smaller than {base}"] = row.smaller[base]
        if row.tiles is not None:
            ratios[row.layer, "efficiency on tiles"] = row.tiles.efficiency.median
            ratios[row.layer, "speed-up on tiles"] = row.tiles.speed_up.median
    return ratios
