"""How sure scores are: what they would be, if dates counted a little more or less along slow waves over the period.

A score s of N dates has an influence of each, I_n. Its projections on cosines are ``z_k = sum_n a_kn I_n``, with
``a_kn = sqrt(2) cos(pi k (n + 1/2) / N)``. Those on slow waves have the variance of s each, whatever the dates have to
do with each other, if they forget it within the shortest of these waves. So the mean of z_k^2 over k = 1..B is the
variance of s, and (s - truth) over its root is Student's t of B degrees of freedom: Lazarus, Lewis, Stock & Watson, J.
Business & Econ. Statist. 36, 2018. Where dates remember long, few waves are slow enough: then B is small and t large.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

LEVEL = 0.9  # of intervals
FEWEST_DATES = 12  # for an interval to mean something
FEWEST_WAVES = 2  # by one alone an interval would be four times as wide
TILT = 1e-3  # of the weights: small, so that what a score does is a derivative
MOST_WAVES = 0.4  # of N^(2/3): more would tell little more, and hide what the first lags do not tell
FLOOR = 0.25  # of the variance of independent dates: two waves may be small by chance, and an interval a point
BIAS = 0.1  # of the variance, that the fastest wave may bring
LAGS = 3  # by which memory is told
MEMORY, FORGOTTEN = 0.98, 4  # its most, and 1 - 4 / N: more cannot be told from a trend, and would be so by chance


@dataclass(frozen=True)
class Weighings:
    """Weights of dates, in the order of time.

    Attributes:
        weights_KN: all ones but for a small wave in each row, slow ones first, N - 1 of them.
    """

    weights_KN: NDArray[np.float64]

    @classmethod
    def of(cls, dates: int) -> "Weighings":
        """Of so many dates."""
        wave, date = np.arange(1, dates)[:, None], np.arange(dates) + 0.5
        return cls(1 + TILT * np.sqrt(2) * np.cos(np.pi * wave * date / dates))

    @property
    def can_tell(self) -> bool:
        """Whether there are dates enough."""
        return bool(self.weights_KN.shape[1] >= FEWEST_DATES)

    def interval(self, values_K: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
        """(2, ...) around what was found (...), from its values (K, ...) by each of the weights; NaN where it cannot be
        told.

        Args:
            values_K, found: of any smooth function of sums or means over dates.
        """
        if not self.can_tell:
            return np.full((2, *values_K.shape[1:]), np.nan)
        variance, freedom = self.variance(values_K, found)
        half = stdtrit(freedom, (1 + LEVEL) / 2) * np.sqrt(variance)
        return np.stack([found - half, found + half])

    def variance(
        self, values_K: NDArray[np.float64], found: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Of what was found, over other dates, and its degrees of freedom, both (...); see `interval`."""
        squares_K = ((values_K - found) / TILT) ** 2
        variance_S, freedom_S = _variance(squares_K.reshape(len(squares_K), -1), self.weights_KN.shape[1])
        return variance_S.reshape(np.shape(found)), freedom_S.reshape(np.shape(found))


def most_waves(dates: int) -> int:
    """That an interval is told by, where dates have nothing to do with each other."""
    most: int = round(MOST_WAVES * dates ** (2 / 3))
    return max(FEWEST_WAVES, most)


def known_on_few(weight_N: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(...) what is known on too few of N dates to be told, by the weight that it has on each (N, ...): an interval
    would take the others for dates that tell the same. Of few dates in all it is what is not known on each of them."""
    return np.asarray((weight_N > 0).sum(axis=0) < min(FEWEST_DATES, len(weight_N)))


def _variance(squares_KS: NDArray[np.float64], dates: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(S,) variances of several scores, by the squares of their projections, and how many waves each is the mean of.

    The fast waves tell the memory m of a score from a date to the next, and with it the shape of a spectrum that
    decays alike: it is taken out of the first waves, and of these those count whose share of it would be off by
    less than `BIAS`, if it were. An interval is at least half as wide as if dates knew nothing of each other (`FLOOR`).
    """
    frequency_K = np.pi * np.arange(1, dates) / dates
    memory_S = memory_of(squares_KS, frequency_K, dates)
    shape_KS = (1 - memory_S) ** 2 / (1 - 2 * memory_S * np.cos(frequency_K)[:, None] + memory_S**2)
    slow_S = dates / np.pi * (1 - memory_S) * np.sqrt(3 * BIAS / np.maximum(memory_S, 1e-9))
    waves_S = np.clip(slow_S.astype(int), FEWEST_WAVES, most_waves(dates))
    variance_KS = np.cumsum(squares_KS / shape_KS, axis=0)
    found_S = np.take_along_axis(variance_KS, waves_S[None] - 1, axis=0)[0] / waves_S
    return np.maximum(found_S, FLOOR * squares_KS.mean(axis=0)), waves_S


def memory_of(squares_KS: NDArray[np.float64], frequency_K: NDArray[np.float64], dates: int) -> NDArray[np.float64]:
    """(S,) which part is left of a departure from one date to the next: the most that the first lags tell.

    Autocorrelations are those of the spectrum, r(l) = sum of z_k^2 cos(l w_k) over that of z_k^2, and freed of what the
    mean takes away (Marriott & Pope, Biometrika 41, 1954, for a red series). Lags after the first, which see through
    noise on it, count where they are more than chance, 2 / sqrt(N).
    """
    memory_S, most = np.zeros(squares_KS.shape[1]), min(MEMORY, 1 - FORGOTTEN / dates)
    for lag in range(1, LAGS + 1):
        with np.errstate(invalid="ignore", divide="ignore"):
            correlation_S = np.cos(lag * frequency_K) @ squares_KS / squares_KS.sum(axis=0)
        left_S = np.clip((correlation_S * dates + 1) / (dates - 4), 0, most) ** (1 / lag)
        counts_S = (correlation_S > 2 / np.sqrt(dates)) | (lag == 1)
        memory_S = np.fmax(memory_S, np.where(counts_S, left_S, 0.0))
    return np.minimum(memory_S, most)
