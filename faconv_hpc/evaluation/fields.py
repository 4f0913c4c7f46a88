"""What is kept of whole fields: spectra, maps of errors, an example. One field of the whole grid is held at a time."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from ..data.periods import evenly
from ..data.times import SECONDS_PER_HOUR
from ..files import replacing
from ..forecasting.layout import CONVENTIONS
from ..observe import SAVING
from ..spatial.domain import Domain
from .netcdf import grid_coordinates
from .spectra import Spectra
from .truth import Target

SHOWN_LEADS = 3  # of which there are maps and spectra: the first, the last, and one between
SPECTRA_DATES = 20


@dataclass(frozen=True, eq=False)
class KeptSpectra:
    """Mean spectra of what came and of forecasts, at some leads and dates; complete on the first rank.

    Attributes:
        reason: why there are none; empty where there are.
        leads: places of the leads.
        dates: places of the dates.
        zonal_wavenumbers, total_wavenumbers: (K,) and (L,); none where there are no spectra.
        zonal_ESCK, total_ESCL: of what came (the first of E) and each entry, by lead S and target C; NaN where a field
            was not known everywhere.
    """

    reason: str
    leads: list[int]
    dates: list[int]
    zonal_wavenumbers: NDArray[np.int64]
    total_wavenumbers: NDArray[np.int64]
    zonal_ESCK: NDArray[np.float64]
    total_ESCL: NDArray[np.float64]


class SpectraSums:
    """Adds up spectra.

    Attributes:
        kept: see there.
    """

    def __init__(self, domain: Domain, leads: int, dates: int, entries: int, targets: int) -> None:
        self._domain, self._spectra = domain, Spectra(domain.grid)
        reason = self._spectra.reason
        zonal, total = np.arange(0), np.arange(0)
        if not reason:
            zonal, total = self._spectra.zonal_wavenumbers, self._spectra.total_wavenumbers
        shown, some = evenly(leads, SHOWN_LEADS), evenly(dates, SPECTRA_DATES)
        zeros = (np.zeros((1 + entries, len(shown), targets, len(one))) for one in (zonal, total))
        self.kept = KeptSpectra(reason, shown, some, zonal, total, *zeros)

    def add(self, date: int, lead: int, came_CYX: Tensor, forecasts: Sequence[Tensor]) -> None:
        """If they count. Collective over the tiles."""
        kept = self.kept
        if kept.reason or date not in kept.dates or lead not in kept.leads:
            return
        for entry, fields_CYX in enumerate([came_CYX, *forecasts]):
            for target, field_YX in enumerate(fields_CYX):
                whole_YX = self._domain.assemble_at(field_YX, 0)
                if whole_YX is not None:
                    place, values_YX = (entry, kept.leads.index(lead), target), whole_YX.cpu().numpy()
                    kept.zonal_ESCK[place] += self._spectra.zonal(values_YX) / len(kept.dates)
                    kept.total_ESCL[place] += self._spectra.total(values_YX) / len(kept.dates)

    def join(self) -> None:
        """Adds the dates of the other replicas. Collective."""
        spectra = self.kept.zonal_ESCK, self.kept.total_ESCL
        zonal_ESCK, total_ESCL = (self._domain.mesh.total_of_replicas(torch.from_numpy(one)).numpy() for one in spectra)
        self.kept = replace(self.kept, zonal_ESCK=zonal_ESCK, total_ESCL=total_ESCL)


class MapSums:
    """Sums of errors of each cell over all dates, at some leads, on this rank's tile; float32.

    Attributes:
        leads: places of the leads.
    """

    def __init__(self, domain: Domain, leads: int, entries: int, targets: int) -> None:
        self.leads, self._domain = evenly(leads, SHOWN_LEADS), domain
        shape = (len(self.leads), entries, targets, *domain.tile.shape)
        self._error_SECYX, self._square_SECYX = (torch.zeros(shape, device=domain.mesh.device) for _ in range(2))
        self._count_SCYX = torch.zeros((shape[0], *shape[2:]), device=domain.mesh.device)

    def add(self, lead: int, came_CYX: Tensor, forecasts: Sequence[Tensor]) -> None:
        """If the lead counts; on this tile."""
        if lead not in self.leads:
            return
        place, known = self.leads.index(lead), ~came_CYX.isnan()
        self._count_SCYX[place] += known
        for entry, forecast_CYX in enumerate(forecasts):
            error_CYX = (forecast_CYX - came_CYX).where(known, 0.0).float()
            self._error_SECYX[place, entry] += error_CYX
            self._square_SECYX[place, entry] += error_CYX.square()

    def join(self) -> None:
        """Adds the dates of the other replicas. Collective."""
        parts = self._error_SECYX, self._square_SECYX, self._count_SCYX
        self._error_SECYX, self._square_SECYX, self._count_SCYX = map(self._domain.mesh.total_of_replicas, parts)

    def whole(self, lead: int, entry: int, target: int) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """(nlat, nlon) bias and RMSE of one of the leads (by its place among them), NaN where nothing was known; on the
        first tile, None on others. Collective over the tiles."""
        count_YX = self._count_SCYX[lead, target]
        bias_YX = self._error_SECYX[lead, entry, target] / count_YX
        rmse_YX = (self._square_SECYX[lead, entry, target] / count_YX).sqrt()
        both = self._domain.assemble_at(torch.stack([bias_YX, rmse_YX]), 0)
        return None if both is None else (both[0].cpu().numpy(), both[1].cpu().numpy())

    def save(self, path: Path, entries: Sequence[str], targets: Sequence[Target], leads_h: NDArray[np.float64]) -> None:
        """Writes ``NAME_rmse`` and ``NAME_bias`` of each target as NetCDF, one after the other, so that no more than
        the maps of one are held. Collective over the tiles of the first replica, when all are joined; the first rank
        writes."""
        grid, mesh = self._domain.grid, self._domain.mesh
        coordinates = {
            "model": list(entries),
            "lead_time": lead_times(leads_h)[self.leads],
            **grid_coordinates(np.rad2deg(grid.latitude), np.rad2deg(grid.longitude)),
        }
        shape = (len(entries), len(self.leads), grid.nlat, grid.nlon)
        with ExitStack() as stack:
            beside = stack.enter_context(replacing(path)) if mesh.rank == 0 else None
            for number, target in enumerate(targets):
                maps = {name: np.empty(shape, dtype=np.float32) for name in ("bias", "rmse")}
                for entry, lead in np.ndindex(*shape[:2]):
                    whole = self.whole(lead, entry, number)
                    if whole is not None:
                        maps["bias"][entry, lead], maps["rmse"][entry, lead] = whole
                if beside is not None:
                    told = {"units": target.units}
                    fields = {f"{target.name}_{name}": (tuple(coordinates), one, told) for name, one in maps.items()}
                    dataset = xr.Dataset(fields, coordinates, {"Conventions": CONVENTIONS})
                    dataset.lead_time.encoding |= {"units": "hours", "dtype": "float64"}
                    with mesh.activity.during(SAVING):
                        dataset.to_netcdf(beside, mode="a" if number else "w", engine="h5netcdf")


def lead_times(hours: NDArray[np.float64]) -> NDArray[np.timedelta64]:
    """To the second."""
    return (hours * SECONDS_PER_HOUR).round().astype("timedelta64[s]").astype("timedelta64[ns]")


@dataclass(frozen=True)
class Example:
    """One forecast of the whole grid over one step, for a figure, where errors can be seen.

    Attributes:
        names, units: of its fields.
        meaning: what the values are: changes from one date to another, or departures from a mean.
        judged: what is to be said of some of the fields, by name.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    meaning: tuple[str, ...]
    latitude_deg: NDArray[np.float64]
    longitude_deg: NDArray[np.float64]
    truth_CYX: NDArray[np.float32]
    forecast_CYX: NDArray[np.float32]
    dates: tuple[str, str]
    judged: dict[str, str] = field(default_factory=dict)
