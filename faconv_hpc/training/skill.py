"""Errors of forecasts beside persistence's: area-weighted RMSE per variable and lead."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.samples import Batch
from ..model.network import NetworkOutput
from ..spatial.domain import Domain
from ..spatial.mesh import ProcessMesh
from .contract import Contract
from .free_run import free_run


@dataclass(frozen=True)
class Skill:
    """Errors of one variable's forecasts over some steps (``lead``), in its units."""

    variable: str
    lead: int
    units: str
    rmse: float
    persistence_rmse: float

    @property
    def ratio(self) -> float:
        """RMSE over persistence's; below 1 the forecast is better than no change."""
        return self.rmse / self.persistence_rmse if self.persistence_rmse else float("nan")

    def as_json(self) -> dict[str, Any]:
        """Its values and the ratio; JSON knows no NaN and no infinity: they are None."""
        values = asdict(self) | {"ratio": self.ratio}
        return {key: None if isinstance(one, float) and not math.isfinite(one) else one for key, one in values.items()}


class SkillSums:
    """Squared errors of forecasts and of persistence, summed up over the grid and over forecasts."""

    def __init__(self, leads: int, fields: int) -> None:
        self._squares, self._weights = (torch.zeros(leads, 2, fields, dtype=torch.float64) for _ in range(2))

    def add(self, lead: int, truth_CYX: Tensor, forecast_CYX: Tensor, domain: Domain, *, counts: bool = True) -> None:
        """One forecast's change of this tile, and the true one, NaN where it is not known. Collective over the tiles.

        Args:
            counts: whether it does; one that does not keeps other ranks company.
        """
        valid = ~truth_CYX.isnan()
        for row, field in enumerate((forecast_CYX - truth_CYX, truth_CYX)):
            square, weight = _area_square(field, valid, domain)
            if counts:
                self._squares[lead - 1, row] += square
                self._weights[lead - 1, row] += weight

    def over_replicas(self, mesh: ProcessMesh) -> None:
        """Sums up what the replicas have. Collective."""
        flat = torch.cat([self._squares.flatten(), self._weights.flatten()]).tolist()
        rows = torch.tensor(mesh.gathered(flat)[:: mesh.tiles], dtype=torch.float64)  # tiles of one have the same
        squares, weights = rows.sum(0).chunk(2)
        self._squares, self._weights = squares.view_as(self._squares), weights.view_as(self._weights)

    def skills(self, contract: Contract) -> tuple[Skill, ...]:
        """Of all variables, lead by lead; ``contract`` says in which units the changes were."""
        rmse = (self._squares / self._weights).sqrt() * torch.from_numpy(contract.statistics.tendency_std)
        return tuple(
            Skill(variable.name, lead, variable.units, float(own), float(persistence))
            for lead, errors in enumerate(rmse, start=1)
            for variable, own, persistence in zip(contract.variables, *errors, strict=True)
        )


def changes(
    network: Callable[..., NetworkOutput], batch: Batch, window: int, domain: Domain, contract: Contract
) -> Iterator[tuple[Tensor, Tensor]]:
    """True and forecast change (C, Y, X) of a sample over each lead, over ``tendency_std``; NaN where it is not known.

    A change is known where the field was known in every frame from the first to the last.
    """
    targets_TCYX = batch.target_BTCYX[0, window - 1 :]
    if batch.valid_BTCYX is not None:
        targets_TCYX = targets_TCYX.where(batch.valid_BTCYX[0, window - 1 :], float("nan"))
    step = torch.from_numpy(contract.statistics.step)
    for truth, forecast in zip(targets_TCYX.cumsum(0), free_run(network, batch, window, domain, step), strict=True):
        yield truth, forecast[0]


def _area_square(x_CYX: Tensor, valid_CYX: Tensor, domain: Domain) -> tuple[Tensor, Tensor]:
    """(C,) area-weighted sums over the whole grid of the squares where they are valid, and of their weights."""
    square = x_CYX.double().square().where(valid_CYX, 0.0)
    weight = domain.coordinates.row_weights(square)[:, None] * valid_CYX
    sums = domain.total(torch.stack([(square * weight).sum((-2, -1)), weight.sum((-2, -1))])).cpu()
    return sums[0], sums[1]
