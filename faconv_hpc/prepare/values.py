"""Values that no field has: told before they are learnt from."""

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

EXACT_INTEGER = 2**24  # the last up to which float32 tells neighbours apart
SENTINELS = (-99.0, -999.0, -9999.0, -99999.0, -32767.0, -32768.0, -1e10, -9.99e8)
SENTINEL_GAP = 0.1  # of its size, which is free above one
FAR = 10.0  # standard deviations of the rest
REST = 0.05  # of the values, for their deviation to say anything: a few wet cells do not
SAMPLE = 20_000
LARGEST = np.float32(1e30)  # fill values nobody declared: NetCDF's 9.97e36, 1e35, -1e34
COMMON_FILL = np.float32(1e20)  # that of CMIP


def is_unsound(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where values are missing, infinite, or what usually marks missing ones."""
    with np.errstate(invalid="ignore"):
        size = np.abs(values)
        return np.asarray(~(size < LARGEST) | (size == COMMON_FILL))


def refuse_suspect(values_TYX: NDArray[np.float32], where: str, name: str) -> None:
    """Looks at fields as they come from a source.

    Raises:
        InputError: the lowest value stands there again and again, far below all others, or the highest is a usual
            mark far above them: it marks missing data, and nobody said so. A value that stands there once does not
            hide the one after it.
    """
    mark = suspect(values_TYX)
    for extreme in (np.fmin, np.fmax) if mark is None else ():
        limit = extreme.reduce(values_TYX, axis=None)
        if np.isfinite(limit) and np.count_nonzero(values_TYX == limit) == 1:
            mark = mark if mark is not None else suspect(np.where(values_TYX == limit, np.float32(np.nan), values_TYX))
    if mark is not None:
        marked = values_TYX == np.float32(mark)
        count = int(np.count_nonzero(marked))
        side = "below" if mark < np.nanmedian(values_TYX[~marked]) else "above"
        raise InputError(
            f"{where} is {mark:.9g} in {count} cells, far {side} all others. If it marks missing data, say so with "
            f"--missing-value {name}={mark:.9g}; if it is real, with --accept {name}."
        )


def suspect(values: NDArray[np.float32]) -> float | None:
    """The lowest value, if it stands there several times, far below the rest, or the highest if it is a usual mark."""
    with np.errstate(invalid="ignore"):
        lowest, highest = (float(limit.reduce(values, axis=None)) for limit in (np.fmin, np.fmax))
    if _is_sentinel(lowest) and _is_alone(values, lowest):
        return lowest
    if _is_sentinel(-highest) and _is_alone(-values, -highest):
        return highest
    return _outlier(values, lowest)


def _is_sentinel(value: float) -> bool:
    """Whether it is one that usually marks missing data."""
    return any(value == np.float32(sentinel) for sentinel in SENTINELS)


def _is_alone(values: NDArray[np.float32], lowest: float) -> bool:
    """Whether the lowest value stands there several times, and no other is near."""
    rest = values[values > lowest]
    alone = rest.size == 0 or float(rest.min()) - lowest > SENTINEL_GAP * abs(lowest)
    return alone and int(np.count_nonzero(values == lowest)) > 1


def _outlier(values: NDArray[np.float32], lowest: float) -> float | None:
    """The lowest value, if it stands there several times, and the rest, which is not little, keeps far from it."""
    if not np.isfinite(lowest):
        return None
    sample = values.ravel()[:: max(1, values.size // SAMPLE)]
    above = sample[(sample > lowest) & np.isfinite(sample)].astype(np.float64)
    if above.size < max(2, REST * np.count_nonzero(~np.isnan(sample))) or above.std() == 0:
        return None
    if lowest >= above.min() - FAR * above.std() or np.count_nonzero(values == np.float32(lowest)) < 2:
        return None
    return lowest if lowest < float(values[values > lowest].min()) - FAR * above.std() else None


def refuse_rounded(values: NDArray[np.generic], where: str) -> None:
    """Raises InputError for whole numbers that a store's float32 would round."""
    with np.errstate(invalid="ignore"):
        largest = (
            max((abs(float(limit(values))) for limit in (np.nanmin, np.nanmax)), default=0.0) if values.size else 0.0
        )
    if np.isfinite(largest) and largest > EXACT_INTEGER:
        raise InputError(
            f"{where} holds whole numbers up to {largest:.0f}, which a store's float32 would round (beyond "
            f"{EXACT_INTEGER}). Convert it to a field of its own unit, leave it out with --variables, or take it "
            f"rounded with --accept."
        )
