"""The annual cycle of points, and points less it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..data.annual_cycle import PER_COEFFICIENT, basis
from ..data.times import MONTHS, SECONDS_PER_DAY, TimeAxis
from ..errors import InputError

SEASONS = {"Dec to Feb": (12, 1, 2), "Mar to May": (3, 4, 5), "Jun to Aug": (6, 7, 8), "Sep to Nov": (9, 10, 11)}
SHORTEST_DAYS = 330  # eleven monthly means and more
COLLINEAR = 1e-6  # waves that times so regular cannot tell apart count once


@dataclass(frozen=True, eq=False)
class Season:
    """Waves of the year at some times, of which points are freed by least squares.

    Attributes:
        waves_TW: orthonormal; none where the cycle is to stay.
    """

    waves_TW: NDArray[np.float64]

    @classmethod
    def of(cls, axis: TimeAxis, harmonics: int) -> "Season":
        """Of the mean and so many harmonics of the year; 0: the cycle stays.

        Raises:
            InputError: too few times for them, or of less than a year.
        """
        if harmonics == 0:
            return cls(np.zeros((len(axis), 0)))
        needed = PER_COEFFICIENT * (1 + 2 * harmonics)
        if needed > len(axis):
            raise InputError(
                f"an annual cycle of {harmonics} harmonics needs at least {needed} times, there are {len(axis)}. Ask "
                f"for fewer with --harmonics, or embed more times."
            )
        days = float(np.ptp(axis.seconds)) / SECONDS_PER_DAY
        if days < SHORTEST_DAYS:
            raise InputError(
                f"an annual cycle needs the dates of a year, and these span {days:.3g} days: what goes with it would "
                f"be the weather. Leave --harmonics out, or embed more times."
            )
        axes_TW, sizes_W, _ = np.linalg.svd(basis(axis.year_fraction, harmonics), full_matrices=False)
        return cls(axes_TW[:, sizes_W > COLLINEAR * sizes_W[0]])

    def removed_from(self, points_TE: NDArray[np.float64]) -> NDArray[np.float64]:
        """Departures of points from their annual cycle."""
        left: NDArray[np.float64] = points_TE - self.waves_TW @ (self.waves_TW.T @ points_TE)
        return left

    def removed_from_products(self, products_TT: NDArray[np.float64]) -> NDArray[np.float64]:
        """Inner products of what `removed_from` leaves of points that have these."""
        return self.removed_from(self.removed_from(products_TT).T)


def counts_of(labels_T: NDArray[np.int64], months_T: NDArray[np.int64]) -> NDArray[np.int64]:
    """(clusters, months) how many times are in both."""
    counts = np.zeros((int(labels_T.max()) + 1, MONTHS), dtype=np.int64)
    np.add.at(counts, (labels_T, months_T - 1), 1)
    return counts


@dataclass(frozen=True)
class Told:
    """How well calendar months tell clusters.

    Attributes:
        share: of times whose cluster is the commonest of their calendar month.
        largest: share of times that are of the largest cluster, which is told without a month: never above `share`.
    """

    share: float
    largest: float

    @property
    def gain(self) -> float:
        """What months tell of what the largest cluster leaves to tell: from 0, nothing, to 1, all."""
        return (self.share - self.largest) / (1 - self.largest) if self.largest < 1 else 0.0


def told_by_month(labels_T: NDArray[np.int64], months_T: NDArray[np.int64]) -> Told:
    """Of clusters of times."""
    counts = counts_of(labels_T, months_T)
    return Told(float(counts.max(0).sum() / len(labels_T)), float(counts.sum(1).max() / len(labels_T)))


def seasonal_share_of(points_TE: NDArray[np.float64], months_T: NDArray[np.int64]) -> float:
    """Share of the variance of points that lies between calendar months."""
    departures = points_TE - points_TE.mean(0)
    between = sum(
        (months_T == month).sum() * (departures[months_T == month].mean(0) ** 2).sum() for month in np.unique(months_T)
    )
    return float(between / max((departures**2).sum(), np.finfo(np.float64).tiny))
