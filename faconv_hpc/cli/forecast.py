"""``faconv forecast``: from a trained network to files of forecasts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config import MeshConfig
from ..errors import InputError
from .options import AsJson, DataPaths, Device, Kernels, Ranks
from .ranks import check_ranks, job_ranks, joined, run_ranks, starts_ranks

if TYPE_CHECKING:
    from ..forecasting.campaign import Campaign, Summary
    from ..spatial.mesh import ProcessMesh

PROGRESS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A run_dir, the directory of one checkpoint, or an exported file.")
]
Start = Annotated[
    list[str],
    typer.Option("--start", metavar="DATES", help="DATE, FIRST/LAST/STEP such as 2020-01-01/2020-02-01/24h, or last."),
]
Output = Annotated[Path, typer.Option(help="NAME.nc (NetCDF4) or NAME.zarr (zarr v3).")]
Mesh = Annotated[
    str | None,
    typer.Option("--mesh", metavar="[Rx]LATxLON", help="How ranks share dates and the globe. Default: as the run's."),
]
OfSequence = Annotated[
    str | None, typer.Option(help="Which sequence of the store to forecast from, if it has several.")
]
Steps = Annotated[int, typer.Option(min=1, help="How many steps to forecast from each date.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")]


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
    from ..spatial.device import check_device
    from ..spatial.mesh import TIMEOUT_S
    from ..training.loading import about_network

    about = about_network(model)
    starting = starts_ranks(ranks)
    sizes = mesh_of(mesh, about.get("mesh", "1x1"), ranks if starting and ranks else job_ranks())
    asked = _Asked(paths_of(data, about.get("store"), model), start, steps, sequence, output, overwrite)
    if starting:
        asked.plan(about)  # or says why not, before any rank is started
        check_device(device or "auto")
        given = [*(["--kernels", kernels] if kernels else []), *(["--device", device] if device else [])]
        again = ["forecast", str(model), *asked.arguments, "--mesh", str(sizes), *given, *["--json"] * as_json]
        raise typer.Exit(run_ranks(again, ranks))
    with joined(sizes, TIMEOUT_S, device or "auto") as ranks_here:
        summary = _forecast(model, asked, kernels, ranks_here)
        if ranks_here.rank == 0:
            print(json.dumps(summary.as_dict(), indent=2)) if as_json else _report(summary)


@dataclass(frozen=True)
class _Asked:
    """What the user asks for, but for the network and the ranks."""

    data: Sequence[Path]
    start: Sequence[str]
    steps: int
    sequence: str | None
    output: Path
    overwrite: bool

    @property
    def arguments(self) -> list[str]:
        """To hand on to ranks."""
        texts: list[tuple[str, Any]] = [("--data", path) for path in self.data] + [
            ("--start", text) for text in self.start
        ]
        texts += [("--steps", self.steps), ("--output", self.output)]
        texts += [("--sequence", self.sequence)] if self.sequence is not None else []
        return [str(part) for pair in texts for part in pair] + ["--overwrite"] * self.overwrite

    def plan(self, about: Mapping[str, str]) -> "Campaign":
        """With all that can be told without the network's weights; raises InputError."""
        from ..forecasting.campaign import plan_campaign
        from ..forecasting.output import check_output
        from ..training.loading import contract_in, window_of

        if self.output.absolute() in [path.absolute() for path in self.data]:
            raise InputError(f"--output {self.output} is the data, which it would replace. Give another --output.")
        contract, window = contract_in(about), window_of(about)
        campaign = plan_campaign(contract, window, self.data, self.start, self.steps, self.sequence)
        check_output(self.output, campaign.request, overwrite=self.overwrite)
        return campaign


def _forecast(model: Path, asked: _Asked, kernels: str | None, mesh: "ProcessMesh") -> "Summary":
    """On all ranks."""
    from ..forecasting.campaign import run_campaign
    from ..forecasting.forecaster import Forecaster

    forecaster = Forecaster.load(model, mesh=mesh, kernels=kernels)
    campaign = asked.plan(forecaster.trained.about)
    with Progress(*PROGRESS, console=Console(stderr=True), transient=True, disable=mesh.rank > 0) as shown:
        task = shown.add_task("leads", total=None)

        def progress(done: int, total: int) -> None:
            shown.update(task, completed=done, total=total)

        return run_campaign(forecaster, campaign, asked.output, mesh, overwrite=asked.overwrite, progress=progress)


def mesh_of(text: str | None, trained: str, ranks: int, *, replicas: bool = True) -> MeshConfig:
    """What is asked for; or the run's tiles, and as many replicas as there are ranks for, if they may be several. One
    rank has all."""
    if text is not None:
        mesh = MeshConfig.parse(text)
    elif ranks == 1:
        return MeshConfig()
    else:
        tiles = MeshConfig.parse(trained)
        several = max(ranks // (tiles.lat * tiles.lon), 1) if replicas else 1
        mesh = tiles.model_copy(update={"replicas": several})
    if mesh.replicas > 1 and not replicas:
        raise InputError(f"--mesh {text} has {mesh.replicas} replicas, and all ranks share the globe. Give LATxLON.")
    check_ranks(mesh, ranks, f"say with --mesh how they share {'dates and ' * replicas}the globe")
    return mesh


def paths_of(data: Sequence[str] | None, store: str | None, model: Path) -> list[Path]:
    """The data that are named, patterns resolved; or the run's store."""
    if not data and store is None:
        raise InputError(f"{model} is no run, and brings no data. Name a store or files with --data.")
    found: list[Path] = []
    for text in data or [str(store)]:
        path = Path(text)
        matching = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor)))) if "*" in text else [path]
        if not matching:
            raise InputError(f"--data {text} matches no file. Give a store, or NetCDF, zarr or GRIB data.")
        found += matching
    return found


def _report(summary: "Summary") -> None:
    dates = f"{summary.dates} dates from {summary.first} to {summary.last}" if summary.dates > 1 else summary.first
    kept = f", {summary.kept_dates} of them there before" if summary.kept_dates else ""
    print(
        f"{summary.path}: {', '.join(summary.variables)}; {summary.steps} steps from {dates}{kept}; "
        f"{summary.seconds:.1f} s"
    )
