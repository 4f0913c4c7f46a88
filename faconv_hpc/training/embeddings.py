"""What embeddings are worth on held-out data: whether they have collapsed, are a clock, or know the coarse field."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.annual_cycle import basis, most_harmonics
from ..files import json_ready
from ..model.subspace import HARMONICS

Rows = NDArray[np.float64]
RIDGE = 0.1  # times the number of rows, for embeddings of deviation 1: steps of a window are alike


@dataclass(frozen=True)
class EmbeddingSkill:
    """Of the embeddings of some windows; NaN: there is too little to tell, or an embedding is no number.

    Attributes:
        forecast_loss, embedding_loss: as training has them, mean of the windows.
        effective_rank: participation ratio of z's variances, see `effective_rank`.
        calendar_share: of z's variance, see `calendar_share`.
        probe_r2: of the coarse field from z, see `probe_r2`; fitted to the first half of the windows, for the second.
    """

    forecast_loss: float
    embedding_loss: float
    effective_rank: float
    calendar_share: float
    probe_r2: float

    @property
    def told(self) -> str:
        """For people."""
        share = "not told by these dates" if math.isnan(self.calendar_share) else f"{self.calendar_share:.0%}"
        return (
            f"effective rank {self.effective_rank:.1f}, share of the calendar {share}, R2 of the coarse field "
            f"{self.probe_r2:.2f}, its loss {self.embedding_loss:.4f}"
        )

    def as_json(self) -> dict[str, Any]:
        """JSON knows no NaN and no infinity: they are None."""
        ready: dict[str, Any] = json_ready(asdict(self))
        return ready


@dataclass(frozen=True)
class Embedded:
    """One window: what its network knows at each of its T steps.

    Attributes:
        losses: (2,) of the forecast and the embedding.
        z_TE: embeddings.
        coarse_TK: the true coarse field, all its regions; NaN where nothing is known.
        year_fraction_T: of the steps.
    """

    losses: NDArray[np.float64]
    z_TE: NDArray[np.float64]
    coarse_TK: NDArray[np.float64]
    year_fraction_T: NDArray[np.float64]


def embedding_skill(windows: Sequence[Embedded]) -> EmbeddingSkill:
    """Of windows in the order of their times."""
    forecast_loss, embedding_loss = np.mean([one.losses for one in windows], axis=0).tolist()
    z_NE = np.concatenate([one.z_TE for one in windows])
    if not np.isfinite(z_NE).all():
        return EmbeddingSkill(forecast_loss, embedding_loss, math.nan, math.nan, math.nan)
    last_z = np.stack([one.z_TE[-1] for one in windows])
    last_fraction = np.stack([one.year_fraction_T[-1] for one in windows])
    half = len(windows) // 2
    probed = math.nan
    if half:
        fit, score = (
            [np.concatenate([getattr(one, name) for one in part]) for name in ("z_TE", "coarse_TK")]
            for part in (windows[:half], windows[half:])
        )
        known = ~np.isnan(np.concatenate([fit[1], score[1]])).any(0)
        probed = probe_r2(fit[0], fit[1][:, known], score[0], score[1][:, known])
    share = calendar_share(last_z, last_fraction)
    return EmbeddingSkill(forecast_loss, embedding_loss, effective_rank(z_NE), share, probed)


def effective_rank(z_NE: Rows) -> float:
    """Participation ratio ``(sum v)^2 / sum v^2`` of the variances v along the principal components: 1 where all z lie
    on a line, E where they vary alike in all directions. NaN where they do not vary."""
    variances = np.linalg.svd(z_NE - z_NE.mean(0), compute_uv=False) ** 2
    return _ratio(variances.sum() ** 2, (variances**2).sum())


def calendar_share(z_NE: Rows, year_fraction_N: Rows) -> float:
    """Share of z's variance that is linear in harmonics of the year, less what so many would explain by chance.

    It has as many harmonics as the dates tell apart, 4 at most; NaN where that is none.
    """
    harmonics = min(most_harmonics(year_fraction_N), HARMONICS)
    if not harmonics:
        return math.nan
    waves = basis(year_fraction_N, harmonics)
    left = z_NE - waves @ np.linalg.lstsq(waves, z_NE, rcond=None)[0]
    free = len(z_NE) - waves.shape[1]
    return 1 - _ratio((left**2).sum() / free, ((z_NE - z_NE.mean(0)) ** 2).sum() / (len(z_NE) - 1))


def probe_r2(fit_z_NE: Rows, fit_x_NK: Rows, z_ME: Rows, x_MK: Rows) -> float:
    """How much of x is linear in z, by ridge regression: 1 less the squared error over the variance, of all columns
    together. NaN where there is nothing to explain."""
    mean, deviation, x_mean = fit_z_NE.mean(0), fit_z_NE.std(0), fit_x_NK.mean(0)
    fit, score = ((z - mean) / np.where(deviation > 0, deviation, 1) for z in (fit_z_NE, z_ME))
    weights = np.linalg.solve(fit.T @ fit + RIDGE * np.eye(fit.shape[1]) * len(fit), fit.T @ (fit_x_NK - x_mean))
    error = ((x_MK - x_mean - score @ weights) ** 2).sum()
    return 1 - _ratio(error, ((x_MK - x_MK.mean(0)) ** 2).sum())


def _ratio(one: float, other: float) -> float:
    return float(one / other) if other > 0 else math.nan
