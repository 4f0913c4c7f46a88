"""Values that no field has: told before they are learnt from."""

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

EXACT_INTEGER = 2**24  # the last up to which float32 tells neighbours apart
SENTINELS = (-99.0, -999.0, -9999.0, -99999.0, -32767.0, -32768.0, -1e10, -9.99e8)
SENTINEL_GAP = 0.1  # of its size, which is free above one
FAR = 10.0  # standard deviations of the rest
SAMPLE = 20_000


def refuse_suspect(values_TLYX: NDArray[np.float32], where: str, name: str) -> None:
    """Looks at fields as they come from a source.

    Raises:
        InputError: the lowest value of a level stands there again and again, far below all others: it marks missing
            data, and nobody said so.
    """
    for level in range(values_TLYX.shape[1]):
        lowest = suspect(values_TLYX[:, level])
        if lowest is not None:
            count = int(np.count_nonzero(values_TLYX[:, level] == np.float32(lowest)))
            raise InputError(
                f"{where} is {lowest:g} in {count} cells, far below all others. If it marks missing data, say so with "
                f"--missing-value {lowest:g}; if it is real, with --accept {name}."
            )


def suspect(values: NDArray[np.float32]) -> float | None:
    """The lowest value, if it stands there several times, and far below the rest; else None."""
    with np.errstate(invalid="ignore"):
        lowest = float(np.fmin.reduce(values, axis=None))
    if not np.isfinite(lowest):
        return None
    if any(lowest == np.float32(sentinel) for sentinel in SENTINELS):
        rest = values[values > lowest]
        alone = rest.size == 0 or float(rest.min()) - lowest > SENTINEL_GAP * abs(lowest)
        return lowest if alone and np.count_nonzero(values == lowest) > 1 else None
    sample = values.ravel()[:: max(1, values.size // SAMPLE)]
    sample = sample[~np.isnan(sample)]
    above = sample[sample > lowest]
    if above.size == sample.size or above.size == 0 or above.std() == 0:
        return None
    far = lowest < float(above.min()) - FAR * float(above.std())
    return lowest if far and np.count_nonzero(values == lowest) > 1 else None


def as_float32(values: NDArray[np.generic], where: str) -> NDArray[np.float32]:
    """Numbers as a store keeps them; too large ones become infinite, which the writer names.

    Raises:
        InputError: whole numbers that float32 would round.
    """
    if (
        values.dtype.kind in "iu"
        and values.size
        and max(abs(int(values.min())), abs(int(values.max()))) > EXACT_INTEGER
    ):
        raise InputError(
            f"{where} holds whole numbers up to {int(np.abs(values).max())}, which a store's float32 would round "
            f"(beyond {EXACT_INTEGER}). Convert it to a field of its own unit, or leave it out with --variables."
        )
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False)
