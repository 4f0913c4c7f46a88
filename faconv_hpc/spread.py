"""How one figure lies over repeats of the same measurement."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Of one figure over the repeats."""

    median: float
    quartile_1: float
    quartile_3: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Quartiles are interpolated linearly between repeats."""
        least, low, median, high, most = np.quantile(np.asarray(values, dtype=np.float64), [0, 0.25, 0.5, 0.75, 1])
        return cls(float(median), float(low), float(high), float(least), float(most))
