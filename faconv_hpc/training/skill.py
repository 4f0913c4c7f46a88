"""Errors of forecasts beside persistence's and climatology's: area-weighted RMSE per variable and lead."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.climatology import Climatology
from ..data.samples import Batch, Windows
from ..data.variables import Channels
from ..files import json_ready
from ..model.network import NetworkOutput
from ..observe import READING
from ..spatial.domain import Domain
from ..spatial.mesh import ProcessMesh
from .free_run import free_run
from .units import in_units, reference_of


@dataclass(frozen=True)
class Skill:
    """Errors of one variable's forecasts over some steps (``lead``), in its units, beside those of forecasting no
    change, and of forecasting the `Climatology`. NaN: not known."""

    variable: str
    lead: int
    units: str
    rmse: float
    persistence_rmse: float
    climatology_rmse: float

    @property
    def ratio(self) -> float:
        """RMSE over persistence's; below 1 the forecast is better than no change."""
        return self.rmse / self.persistence_rmse if self.persistence_rmse else float("nan")

    def as_json(self) -> dict[str, Any]:
        """Its values and the ratio; JSON knows no NaN and no infinity: they are None."""
        ready: dict[str, Any] = json_ready(asdict(self) | {"ratio": self.ratio})
        return ready


@dataclass(frozen=True)
class LeadFields:
    """Of one sample and lead, in the units of each target: the change since the last input; of diagnostics the
    departure from their mean, and from their annual cycle if they have one. NaN where it is not known.

    Attributes:
        truth_CYX, forecast_CYX: what came, and what was forecast.
        persistence_CYX: what no change would have been; of diagnostics unknown after a window of one step.
        climatology_CYX: what would have led to the climatology.
    """

    truth_CYX: Tensor
    forecast_CYX: Tensor
    persistence_CYX: Tensor
    climatology_CYX: Tensor


class SkillSums:
    """Squared errors of forecasts, persistence and climatology, summed up over the grid and over forecasts."""

    def __init__(self, leads: int, targets: int) -> None:
        self._squares, self._weights = (torch.zeros(leads, 3, targets, dtype=torch.float64) for _ in range(2))

    def add(self, lead: int, fields: LeadFields, domain: Domain, *, counts: bool = True) -> None:
        """One forecast of this tile. Collective over the tiles.

        Args:
            counts: whether it does; one that does not keeps other ranks company.
        """
        known_CYX = ~fields.truth_CYX.isnan()  # a forecast that is no number is wrong, not unknown
        others_RCYX = torch.stack([fields.persistence_CYX, fields.climatology_CYX])
        valid_RCYX = torch.cat([known_CYX[None], known_CYX & ~others_RCYX.isnan()])
        errors_RCYX = torch.cat([fields.forecast_CYX[None], others_RCYX]) - fields.truth_CYX
        squares, weights = _area_squares(errors_RCYX, valid_RCYX, domain)
        if counts:
            self._squares[lead - 1] += squares
            self._weights[lead - 1] += weights

    def over_replicas(self, mesh: ProcessMesh) -> None:
        """Sums up what the replicas have. Collective."""
        flat = torch.cat([self._squares.flatten(), self._weights.flatten()]).tolist()
        rows = torch.tensor(mesh.gathered(flat)[:: mesh.tiles], dtype=torch.float64)  # tiles of one have the same
        squares, weights = rows.sum(0).chunk(2)
        self._squares, self._weights = squares.view_as(self._squares), weights.view_as(self._weights)

    def skills(self, channels: Channels) -> tuple[Skill, ...]:
        """Of all targets, lead by lead."""
        rmse = (self._squares / self._weights).sqrt()
        return tuple(
            Skill(variable.name, lead, variable.units, *of_variable.tolist())
            for lead, errors in enumerate(rmse, start=1)
            for variable, of_variable in zip(channels.targets, errors.T, strict=True)
        )


def read_window(windows: Windows, index: int, domain: Domain) -> Batch:
    """One of the windows, on the device."""
    with domain.mesh.activity.during(READING):
        return windows.read([index]).to(domain.mesh.device)


def forecasts_from(
    network: Callable[..., NetworkOutput],
    windows: Windows,
    batch: Batch,
    window: int,
    domain: Domain,
    climatology: Climatology,
) -> Iterator[LeadFields]:
    """Forecasts one of the windows, each of ``window`` inputs and those of the leads: `forecasts_of`."""
    mesh, (index,) = domain.mesh, batch.windows
    frames = windows.frames_of(index)[window - 1 :]
    mean_LCYX = climatology.at(frames[1:]).to(mesh.device)
    cycle_LCYX = torch.from_numpy(windows.cycle_of(frames)).to(mesh.device)
    return forecasts_of(network, batch, window, domain, mean_LCYX, cycle_LCYX)


def forecasts_of(
    network: Callable[..., NetworkOutput],
    batch: Batch,
    window: int,
    domain: Domain,
    climatology_LCYX: Tensor,
    cycle_LCYX: Tensor,
) -> Iterator[LeadFields]:
    """Of the first sample of a batch, lead by lead, beside the climatology of their times.

    Args:
        cycle_LCYX: of the last input and the leads, see `Windows.cycle_of`: a change of an anomaly is one of the field
            less that of its cycle.

    A change is known where the field is known then and there was something to begin from, a diagnostic where it is
    and was at the last input.
    """
    channels, changing = batch.channels, len(batch.channels.prognostic)
    changes_TCYX = batch.target_BTCYX[0, window - 1 :, :changing].cumsum(0)
    diagnostics_TCYX = batch.target_BTCYX[0, :, changing:]
    if batch.valid_BTCYX is not None:
        diagnostics_TCYX = diagnostics_TCYX.where(batch.valid_BTCYX[0, :, changing:], float("nan"))
        changes_TCYX = changes_TCYX.where(batch.valid_BTCYX[0, window - 1 :, :changing], float("nan"))
    if batch.fresh_BTCYX is not None:
        changes_TCYX = changes_TCYX.where(batch.fresh_BTCYX[0, window - 1] > 0, float("nan"))
    before_CYX = torch.full_like(diagnostics_TCYX[0], float("nan")) if window == 1 else diagnostics_TCYX[window - 2]
    start_CYX = batch.inputs_BTCYX[0, window - 1]
    z_CYX = reference_of(start_CYX, channels)
    persistence_CYX = in_units(torch.cat([torch.zeros_like(changes_TCYX[0]), before_CYX]), z_CYX, channels)
    reference_CYX = torch.stack([one.value(z) for one, z in zip(channels.targets, z_CYX, strict=True)])
    cycle_LCYX = cycle_LCYX.double()
    turned_LCYX = cycle_LCYX - cycle_LCYX[0]
    prognostic_C = torch.arange(len(channels.targets), device=turned_LCYX.device)[:, None, None] < changing
    for lead, forecast in enumerate(free_run(network, batch, window, domain)):
        came_CYX = diagnostics_TCYX[window - 1 + lead]
        if window > 1:  # where it was known, as a change is: both errors are of the same cells
            came_CYX = came_CYX.where(~before_CYX.isnan(), float("nan"))
        truth_CYX = torch.cat([changes_TCYX[lead], came_CYX])
        forecast_CYX = torch.cat([part[0] for part in forecast])
        turned_CYX = turned_LCYX[lead + 1].where(prognostic_C, 0.0)
        came, said = (in_units(fields, z_CYX, channels) + turned_CYX for fields in (truth_CYX, forecast_CYX))
        persisted_CYX = persistence_CYX - turned_LCYX[lead + 1].where(~prognostic_C, 0.0)
        mean_CYX = reference_CYX + cycle_LCYX[0].where(prognostic_C, cycle_LCYX[lead + 1])
        yield LeadFields(came, said, persisted_CYX, climatology_LCYX[lead] - mean_CYX)


def _area_squares(error_RCYX: Tensor, valid_RCYX: Tensor, domain: Domain) -> tuple[Tensor, Tensor]:
    """(R, C) area-weighted sums over the whole grid of the squares where they are valid, and of their weights."""
    square = error_RCYX.square().where(valid_RCYX, 0.0)
    weight = domain.coordinates.row_weights(square)[:, None] * valid_RCYX
    sums = domain.total(torch.stack([(square * weight).sum((-2, -1)), weight.sum((-2, -1))])).cpu()
    return sums[0], sums[1]
