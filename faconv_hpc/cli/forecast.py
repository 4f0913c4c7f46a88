"""``faconv forecast``: from a trained network to files of forecasts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..files import check_can_write
from .options import AsJson, DataPaths, Device, Kernels, Ranks
from .trained import (
    Mesh,
    Model,
    OfSequence,
    Overwrite,
    Where,
    as_arguments,
    carry_out,
    check_is_no_data,
    paths_of,
)

if TYPE_CHECKING:
    from ..forecasting.campaign import Campaign, Summary
    from ..forecasting.turns import Progress
    from ..spatial.mesh import ProcessMesh

Start = Annotated[
    list[str],
    typer.Option(
        "--start",
        metavar="DATES",
        help="DATE; FIRST/LAST/STEP such as 2020-01-01/2020-02-01/24h; 1990-06 or FIRST/LAST, all dates of it that can "
        "be; or last.",
    ),
]
Output = Annotated[Path, typer.Option(help="NAME.nc (NetCDF4) or NAME.zarr (zarr v3).")]
Steps = Annotated[int, typer.Option(min=1, help="How many steps to forecast from each date.")]


def forecast_command(
    model: Model,
    start: Start,
    steps: Steps,
    output: Output,
    data: DataPaths = None,
    ranks: Ranks = None,
    mesh: Mesh = None,
    device: Device = None,
    sequence: OfSequence = None,
    kernels: Kernels = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Forecast from any dates, and write what is forecast as NetCDF or zarr that xarray and WeatherBench-X read.

    A date is the time of the last frame that the network sees; those before it in its window spin its state up. What
    the network is given at later times (forcings) comes from the data.

    A killed command goes on when it is called again, and keeps the dates that were done.

    Example: `faconv forecast runs/quickstart_era5 --start last --steps 8 --output forecast.nc`
    """
    from ..training.loading import about_network

    about = about_network(model)
    asked = _Asked(model, paths_of(data, [about], [model]), start, steps, sequence, output, overwrite)
    where = Where(ranks, mesh, device, kernels)
    carry_out(asked, [about], where, "leads", _report, as_json=as_json)


@dataclass(frozen=True)
class _Asked:
    """What the user asks for, but for the ranks."""

    model: Path
    data: Sequence[Path]
    start: Sequence[str]
    steps: int
    sequence: str | None
    output: Path
    overwrite: bool

    verb = "forecast"

    @property
    def arguments(self) -> list[str]:
        """To hand on to ranks."""
        several = [("--data", self.data), ("--start", self.start)]
        given = {"--steps": self.steps, "--output": self.output, "--sequence": self.sequence}
        return [str(self.model), *as_arguments(several, given), *["--overwrite"] * self.overwrite]

    def check(self) -> None:
        """With all that can be told without the network's weights; raises InputError."""
        from ..training.loading import about_network

        self.plan(about_network(self.model))
        check_can_write("--output", self.output.parent)

    def plan(self, about: Mapping[str, str]) -> "Campaign":
        """Checked; raises InputError."""
        from ..forecasting.campaign import plan_campaign
        from ..forecasting.output import FORECASTS, check_output
        from ..training.loading import contract_in, window_of

        check_is_no_data(self.output, self.data)
        contract, window = contract_in(about), window_of(about)
        campaign = plan_campaign(contract, window, self.data, self.start, self.steps, self.sequence)
        check_output(self.output, FORECASTS, campaign.request, overwrite=self.overwrite)
        return campaign

    def make(self, mesh: "ProcessMesh", kernels: str | None, progress: "Progress") -> "Summary":
        """On all ranks."""
        from ..forecasting.campaign import run_campaign
        from ..forecasting.forecaster import Forecaster

        forecaster = Forecaster.load(self.model, mesh=mesh, kernels=kernels)
        campaign = self.plan(forecaster.trained.about)
        return run_campaign(forecaster, campaign, self.output, mesh, overwrite=self.overwrite, progress=progress)


def _report(summary: "Summary") -> None:
    dates = f"{summary.dates} dates from {summary.first} to {summary.last}" if summary.dates > 1 else summary.first
    kept = f", {summary.kept_dates} of them there before" if summary.kept_dates else ""
    known = f". The data have what came until {summary.known_until}: `faconv evaluate` says how good this is"
    print(
        f"{summary.path}: {', '.join(summary.variables)}; {summary.steps} steps from {dates}{kept}; "
        f"{summary.seconds:.1f} s{known * bool(summary.known_until)}"
    )
