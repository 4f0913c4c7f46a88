"""Weighted mean and variance of a stream, merged without loss (Chan, Golub & LeVeque 1979)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Moments:
    """Weight, mean and sum of weighted squared deviations, in float64.

    Two of them merge into those of both parts: ``mean = mean_a + d w_b / w`` and
    ``deviation = deviation_a + deviation_b + d^2 w_a w_b / w`` with ``d = mean_b - mean_a``, which,
    other than a sum of squares, does not lose digits where the mean is large.
    """

    weight: float = 0.0
    mean: float = 0.0
    deviation: float = 0.0

    @classmethod
    def of(cls, values_TYX: NDArray[np.floating], weight_Y: NDArray[np.float64]) -> "Moments":
        """Moments of the values that are not NaN, each row counting with its weight."""
        sums_TY = values_TYX.sum(axis=-1, dtype=np.float64)  # rows have one weight each: few passes over the cells
        missing_TYX = np.isnan(values_TYX) if np.isnan(sums_TY).any() else None
        cells_TY = np.full(sums_TY.shape, values_TYX.shape[-1])
        if missing_TYX is not None:
            sums_TY = values_TYX.sum(axis=-1, dtype=np.float64, where=~missing_TYX)
            cells_TY -= missing_TYX.sum(axis=-1)
        total = float((weight_Y * cells_TY).sum())
        if total == 0.0:
            return cls()
        mean = float((weight_Y * sums_TY).sum() / total)
        away_TYX = np.subtract(values_TYX, mean, dtype=np.float64)
        if missing_TYX is not None:
            away_TYX[missing_TYX] = 0.0
        squares_TY = np.einsum("tyx,tyx->ty", away_TYX, away_TYX)
        return cls(total, mean, float((weight_Y * squares_TY).sum()))

    def merged(self, other: "Moments") -> "Moments":
        """Moments of both parts together."""
        weight = self.weight + other.weight
        if self.weight == 0.0 or other.weight == 0.0:
            return self if other.weight == 0.0 else other
        delta = other.mean - self.mean
        mean = self.mean + delta * other.weight / weight
        return Moments(weight, mean, self.deviation + other.deviation + delta**2 * self.weight * other.weight / weight)

    @property
    def std(self) -> float:
        """Standard deviation, 0 where there is nothing to deviate."""
        return float(np.sqrt(self.deviation / self.weight)) if self.weight else 0.0


@dataclass(frozen=True)
class ChannelMoments:
    """Moments of a channel and of its change from frame to frame; cells and how many are valid."""

    value: Moments = Moments()
    tendency: Moments = Moments()
    cells: int = 0
    valid_cells: int = 0

    def merged(self, other: "ChannelMoments") -> "ChannelMoments":
        """Of both parts together."""
        return ChannelMoments(
            self.value.merged(other.value),
            self.tendency.merged(other.tendency),
            self.cells + other.cells,
            self.valid_cells + other.valid_cells,
        )

    def as_row(self) -> list[float]:
        """Eight numbers, to be kept in a file; exact, for counts below 2^53."""
        value, tendency = self.value, self.tendency
        parts = [value.weight, value.mean, value.deviation, tendency.weight, tendency.mean, tendency.deviation]
        return [*parts, float(self.cells), float(self.valid_cells)]

    @classmethod
    def from_row(cls, row: NDArray[np.float64]) -> "ChannelMoments":
        """The inverse of `as_row`."""
        numbers = [float(number) for number in row]
        return cls(Moments(*numbers[:3]), Moments(*numbers[3:6]), int(numbers[6]), int(numbers[7]))


class MomentStream:
    """Collects the moments of one channel of some rows, frame after frame.

    Args:
        weight_Y: that a cell of each row counts with.

    Attributes:
        moments: of what has come.
    """

    def __init__(self, weight_Y: NDArray[np.float64]) -> None:
        self._weight_Y = weight_Y
        self._last_YX: NDArray[np.float32] | None = None
        self.moments = ChannelMoments()

    def add(self, fields_TYX: NDArray[np.float32]) -> None:
        """Takes the next frames."""
        for field_YX in fields_TYX:
            valid = int(np.count_nonzero(~np.isnan(field_YX)))
            found = ChannelMoments(self._of(field_YX), self._change_to(field_YX), field_YX.size, valid)
            self.moments = self.moments.merged(found)
            self._last_YX = field_YX

    def begin_anew(self) -> None:
        """What comes next does not follow what has come."""
        self._last_YX = None

    def add_following(self, field_YX: NDArray[np.float32]) -> None:
        """Takes a frame of the next file: only the change to it belongs here."""
        self.moments = self.moments.merged(ChannelMoments(tendency=self._change_to(field_YX)))

    def _of(self, values_YX: NDArray[np.floating]) -> Moments:
        return Moments.of(values_YX[None], self._weight_Y)

    def _change_to(self, field_YX: NDArray[np.float32]) -> Moments:
        if self._last_YX is None:
            return Moments()
        return self._of(np.subtract(field_YX, self._last_YX, dtype=np.float64))
