"""Cells that are missing now and were known before: they have the value that they had last, and it is told how old."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


def fill_gaps(
    values_TCYX: NDArray[np.float32], known_TCYX: NDArray[np.bool_] | None, fields: int
) -> NDArray[np.float32] | None:
    """Gives missing cells of the first ``fields`` channels, in place, what they had in the last frame that knows them.

    A network that sees 0 in every gap, the mean of the field, sees leaps that are as large as the field, and could
    forecast no cell that is missing in the frame it begins from. Of what has an annual cycle the anomaly is kept.

    Args:
        values_TCYX: frames that follow each other, as `Inputs.transform` gives them.
        known_TCYX: where they are known; None: everywhere.
        fields: how many channels are filled, from the first; the others stay as they are.

    Returns:
        (T, C, Y, X) how fresh each value is: 1 where it is known, 1 / (1 + n) where it was known n frames before for
        the last time, 0 where there is none. None: all are known.
    """
    if known_TCYX is None or known_TCYX.all():
        return None
    fresh_TCYX = known_TCYX.astype(np.float32)
    filled = slice(fields)
    for before, now in pairwise(range(len(values_TCYX))):
        gaps_CYX, older_CYX = ~known_TCYX[now, filled], fresh_TCYX[before, filled]
        np.copyto(values_TCYX[now, filled], values_TCYX[before, filled], where=gaps_CYX)
        np.copyto(fresh_TCYX[now, filled], older_CYX / (1 + older_CYX), where=gaps_CYX)
    return fresh_TCYX
