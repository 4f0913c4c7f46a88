"""How sure scores are: dates are drawn anew in blocks, by the stationary bootstrap."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

DRAWS, SEED = 1000, 0
LEVEL = 0.9  # of intervals
FEWEST_DATES, FEWEST_BLOCKS = 10, 5  # for an interval to mean something


@dataclass(frozen=True)
class Draws:
    """Drawn dates.

    Attributes:
        drawn_BN: how often each date counts in each draw.
        block: mean length of the blocks, in dates.
    """

    drawn_BN: NDArray[np.float64]
    block: float

    @classmethod
    def of(cls, series_NS: NDArray[np.float64], draws: int = DRAWS, seed: int = SEED) -> "Draws":
        """Of the dates of several series, whose order is theirs in time; see `block_length` and `resampled`."""
        block = block_length(series_NS)
        indices_BN = resampled(len(series_NS), block, draws, seed)
        drawn_BN = np.apply_along_axis(np.bincount, 1, indices_BN, minlength=len(series_NS)).astype(np.float64)
        return cls(drawn_BN, block)

    @property
    def blocks(self) -> float:
        """How many blocks the dates are."""
        return len(self.drawn_BN.T) / self.block

    @property
    def can_tell(self) -> bool:
        """Whether there are dates enough."""
        return self.drawn_BN.shape[1] >= FEWEST_DATES and self.blocks >= FEWEST_BLOCKS

    def interval(self, values_B: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
        """(2, ...) around what was found (...), from its values (B, ...) in the draws; NaN where it cannot be told.

        Percentiles, wider by ``t sqrt(m / (m - 1)) / z``, t Student's and z the normal quantile, as m blocks are like
        so many independent values: Hesterberg, The American Statistician 69, 2015, section 4.
        """
        if not self.can_tell:
            return np.full((2, *values_B.shape[1:]), np.nan)
        tails, blocks = [50 * (1 - LEVEL), 50 * (1 + LEVEL)], self.blocks
        wider = stats.t.ppf(tails[1] / 100, blocks - 1) / stats.norm.ppf(tails[1] / 100)
        ends = np.percentile(values_B, tails, axis=0)
        interval: NDArray[np.float64] = found + wider * np.sqrt(blocks / (blocks - 1)) * (ends - found)
        return interval


def resampled(dates: int, block: float, draws: int, seed: int = SEED) -> NDArray[np.int64]:
    """(draws, dates) which dates: each follows the one before it (the first the last), or, with probability 1 / block,
    is any: Politis & Romano, J. Amer. Statist. Assoc. 89, 1994."""
    random = np.random.default_rng(seed)
    fresh = random.random((draws, dates)) < 1 / block
    fresh[:, 0] = True
    anywhere = random.integers(0, dates, (draws, dates))
    since = np.arange(dates) - np.maximum.accumulate(np.where(fresh, np.arange(dates), 0), axis=1)
    started = np.take_along_axis(anywhere, np.arange(dates) - since, axis=1)
    return (started + since) % dates


def block_length(series_NS: NDArray[np.float64]) -> float:
    """Mean length of blocks: twice the median over series of what is best for the variance of each one's mean (see
    `best_length`), as intervals cover better with longer blocks; within N^(1/3) and N / 3. Series that are not numbers
    throughout, or never change, do not count."""
    count = len(series_NS)
    good = np.isfinite(series_NS).all(axis=0) & (np.ptp(np.nan_to_num(series_NS), axis=0) > 0)
    lengths = [best_length(series) for series in series_NS[:, good].T]
    longest = max(count / 3, 1.0)
    return float(np.clip(2 * np.median(lengths) if lengths else 1.0, min(count ** (1 / 3), longest), longest))


def best_length(series_N: NDArray[np.float64]) -> float:
    """Politis & White, Econometric Reviews 23, 2004, with the correction of Patton, Politis & White, ibid. 28, 2009.

    Autocovariances R(k) count, tapered, up to 2 m, where m is the last lag before several (at least five) that differ
    from 0 by less than 2 sqrt(log10(N) / N): with g = sum |k| R(k) and s = sum R(k) over -2m..2m the length is
    ``(2 g^2 / (2 s^2))^(1/3) N^(1/3)``, within 1 and min(3 sqrt(N), N / 3).
    """
    count = len(series_N)
    if count < FEWEST_DATES:
        return 1.0
    departure = series_N - series_N.mean()
    silent = max(5, round(np.sqrt(np.log10(count))))
    lags = min(int(np.ceil(np.sqrt(count))) + silent, count - 1)
    covariance = np.array([departure[: count - lag] @ departure[lag:] / count for lag in range(lags + 1)])
    loud = np.abs(covariance[1:] / covariance[0]) >= 2 * np.sqrt(np.log10(count) / count)
    last = next((lag for lag in range(lags - silent + 1) if not loud[lag : lag + silent].any()), None)
    last = int(np.flatnonzero(loud)[-1]) + 1 if last is None else last
    reach = min(2 * max(last, 1), lags)
    k = np.arange(-reach, reach + 1)
    taper = np.clip(2 * (1 - np.abs(k) / reach), 0, 1)
    tapered = taper * covariance[np.abs(k)]
    g, s = float(np.abs(k) @ tapered), float(tapered.sum())
    length = (g**2 / s**2) ** (1 / 3) * count ** (1 / 3) if s else 1.0
    return float(np.clip(length, 1.0, min(3 * np.sqrt(count), count / 3)))
