"""Scores of forecasts out of sums over the grid, which each tile adds up; one row for each date, so that dates can
count more or less.

With weights w (areas, 0 where nothing is known), forecast f, truth o and climatology c of a date, e = f - o:

    rmse      sqrt( sum over dates of sum(w e^2) / sum over dates of sum(w) )
    bias      the same of e
    acc       mean over dates of the centred correlation of f - c and o - c, as the WMO has it (Manual on the GDPFS,
              appendix 2.2.34)
    activity  sqrt of the mean over dates of the variance over the grid of f - c
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..spatial.domain import Domain

TERMS = (
    9  # sums of w, w e, w e^2; of w (where c is known), and of w times a, b, a^2, b^2, a b with a = f - c, b = o - c
)
METRICS = ("rmse", "bias", "acc", "activity", "truth_activity")
SIZES = ("rmse", "activity", "truth_activity")  # of which none is below 0


class Sums:
    """Of some dates, leads, forecasts of each, and targets; of other replicas' dates when they are joined."""

    def __init__(self, domain: Domain, dates: int, leads: int, forecasts: int, targets: int) -> None:
        self._domain = domain
        self.terms_NLFCK = np.zeros((dates, leads, forecasts, targets, TERMS))

    def add(
        self,
        date: int,
        lead: int,
        forecasts: Sequence[Tensor],
        others: Sequence[Tensor],
        came_CYX: Tensor,
        mean_CYX: Tensor,
    ) -> None:
        """One date and lead. Collective over the tiles.

        Args:
            forecasts: (C, Y, X) each, on this tile. Those that are no numbers where it is known what came have scores
                that are none: nothing is left out.
            others: baselines, which count where they are known.
            came_CYX: NaN where it does not count.
            mean_CYX: climatology, NaN where it is not known.
        """
        known, domain = ~came_CYX.isnan(), self._domain
        rows = [_sums(one, came_CYX, mean_CYX, known, domain) for one in forecasts]
        rows += [_sums(one, came_CYX, mean_CYX, known & ~one.isnan(), domain) for one in others]
        self.terms_NLFCK[date, lead] = domain.total(torch.stack(rows)).permute(0, 2, 1).cpu().numpy()

    def join(self) -> None:
        """Adds the dates of the other replicas. Collective."""
        self.terms_NLFCK = self._domain.mesh.total_of_replicas(torch.from_numpy(self.terms_NLFCK)).numpy()


def _sums(forecast_CYX: Tensor, came_CYX: Tensor, mean_CYX: Tensor, known: Tensor, domain: Domain) -> Tensor:
    """(K, C) of this tile."""
    weight_CYX = domain.coordinates.row_weights(came_CYX)[:, None] * known
    error = (forecast_CYX - came_CYX).where(known, 0.0)
    both = known & ~mean_CYX.isnan()
    a, b = (forecast_CYX - mean_CYX).where(both, 0.0), (came_CYX - mean_CYX).where(both, 0.0)
    one = torch.ones_like(error)
    parts = [weight_CYX * part for part in (one, error, error * error)]
    parts += [weight_CYX * both * part for part in (one, a, b, a * a, b * b, a * b)]
    return torch.stack([part.sum((-2, -1)) for part in parts])


@dataclass(frozen=True)
class PerDate:
    """(N, L, F, C) each; what is added up over dates, with weights that say how much each of them counts."""

    weight: NDArray[np.float64]
    error: NDArray[np.float64]
    square: NDArray[np.float64]
    counts: NDArray[np.float64]
    acc: NDArray[np.float64]
    variance: NDArray[np.float64]
    truth_variance: NDArray[np.float64]

    @classmethod
    def of(cls, terms_NLFCK: NDArray[np.float64]) -> "PerDate":
        """Of sums over the grid."""
        weight, error, square, both, a, b, aa, bb, ab = np.moveaxis(terms_NLFCK, -1, 0)
        counts = (both > 0).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(both > 0, both, 1.0)
            variance, truth_variance = aa / share - (a / share) ** 2, bb / share - (b / share) ** 2
            covariance = ab / share - a * b / share**2
            acc = covariance / np.sqrt(_varies(variance, aa / share) * _varies(truth_variance, bb / share))
        return cls(weight, error, square, counts, np.where(both > 0, acc, 0.0), variance, truth_variance)

    def metrics(self, weights_KN: NDArray[np.float64] | None = None) -> Mapping[str, NDArray[np.float64]]:
        """(K, L, F, C) each of `METRICS`, NaN where they are not known.

        Args:
            weights_KN: how much each date counts, in K ways. Default: one, in which all count once.
        """
        weights_KN = np.ones((1, len(self.weight))) if weights_KN is None else weights_KN
        with np.errstate(invalid="ignore", divide="ignore"):
            sums = {name: np.tensordot(weights_KN, getattr(self, name), axes=1) for name in self.__dataclass_fields__}
            return {
                "rmse": np.sqrt(sums["square"] / sums["weight"]),
                "bias": sums["error"] / sums["weight"],
                "acc": sums["acc"] / sums["counts"],
                "activity": _root(sums["variance"] / sums["counts"]),
                "truth_activity": _root(sums["truth_variance"] / sums["counts"]),
            }

    @property
    def errors(self) -> NDArray[np.float64]:
        """(N, L, F, C) mean squared error of each date."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.square / self.weight

    @property
    def shares(self) -> NDArray[np.float64]:
        """(L, F, C) of the area that the first forecast was judged on; NaN where that is none. Below 1 errors are of
        other cells, and their ratio to that of others says nothing."""
        weight_LFC = self.weight.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(weight_LFC / weight_LFC[:, :1])


def _varies(variance: NDArray[np.float64], square: NDArray[np.float64]) -> NDArray[np.float64]:
    """NaN where a field is the same everywhere, to rounding: it correlates with nothing."""
    return np.where(variance > 1e-12 * square, variance, np.nan)


def _root(square: NDArray[np.float64]) -> NDArray[np.float64]:
    root: NDArray[np.float64] = np.sqrt(np.maximum(square, 0.0))
    return root
