"""``faconv evaluate``: how good forecasts are, of networks and of files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import InputError
from .options import AsJson, DataPaths, Device, Kernels, Ranks
from .ranks import job_ranks, joined, run_ranks, starts_ranks
from .tables import table_of
from .trained import check_directory, mesh_of, paths_of, shown_progress

if TYPE_CHECKING:
    from ..evaluation.evaluate import Evaluation
    from ..spatial.mesh import ProcessMesh

Models = Annotated[
    list[Path],
    typer.Argument(
        metavar="MODEL",
        help="A run_dir, the directory of one checkpoint, an exported file; or forecasts in NetCDF or zarr.",
    ),
]
Leads = Annotated[
    int | None,
    typer.Option(min=1, help="Run freely for so many steps. Default: 1; of files alone all leads that they have."),
]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Forecast so many times, spread over the period. Default: all.")
]
Climatology = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DATES",
        help="Dates of the data that climatology is made of, FIRST/LAST, may be repeated. Default: those of training.",
    ),
]
Mesh = Annotated[
    str | None, typer.Option("--mesh", metavar="LATxLON", help="How ranks share the globe. Default: as the run's.")
]
Output = Annotated[
    Path | None, typer.Option(help="A directory. Default: evaluation/ in the run, or MODEL.evaluation beside a file.")
]


def evaluate_command(
    model: Models,
    data: DataPaths = None,
    leads: Leads = None,
    samples: Samples = None,
    climatology: Climatology = None,
    output: Output = None,
    ranks: Ranks = None,
    mesh: Mesh = None,
    device: Device = None,
    kernels: Kernels = None,
    as_json: AsJson = False,
) -> None:
    """Hold forecasts of the test period against what came: errors, anomaly correlation, spectra and maps, beside
    persistence, climatology and damped persistence, with intervals; a report says who is better.

    Several models stand in the same table, on the same dates. Files of forecasts may be anyone's, with the names that
    WeatherBench-X reads (init_time, lead_time, latitude, longitude, level).

    On several ranks the globe is cut as the run's mesh says, on one it is whole; the numbers are the same.

    Example: `faconv evaluate runs/quickstart_era5 --ranks 2 --leads 4`
    """
    from ..spatial.device import check_device
    from ..spatial.mesh import TIMEOUT_S

    abouts = _abouts(model)
    starting = starts_ranks(ranks)
    sizes = mesh_of(mesh, _mesh_in(abouts), ranks if starting and ranks else job_ranks(), replicas=False)
    paths = paths_of(data, next((one["store"] for one in abouts if "store" in one), None), model[0])
    check_directory(output or place_of(model[0]), [*paths, *model])
    if starting:
        _check_data(paths)
        check_device(device or "auto")
        options = {"--leads": leads, "--samples": samples, "--output": output, "--device": device, "--kernels": kernels}
        given = [part for name, value in options.items() if value is not None for part in (name, value)]
        given += [part for path in paths for part in ("--data", path)]
        given += [part for text in climatology or () for part in ("--climatology", text)]
        again = ["evaluate", *model, *given, "--mesh", sizes, *["--json"] * as_json]
        raise typer.Exit(run_ranks([str(part) for part in again], ranks))
    with joined(sizes, TIMEOUT_S, device or "auto") as here:
        chosen = {"leads": leads, "samples": samples, "climatology": climatology or (), "kernels": kernels}
        evaluation, said, directory = _evaluate(model, paths, output, here, chosen)
        if here.rank == 0:
            print(json.dumps(said, indent=2)) if as_json else show(evaluation, directory)


def _evaluate(
    models: Sequence[Path], data: Sequence[Path], output: Path | None, mesh: "ProcessMesh", options: dict[str, Any]
) -> tuple["Evaluation", dict[str, Any], Path]:
    """On all ranks."""
    from ..evaluation.evaluate import evaluate
    from ..evaluation.results import MAPS, save
    from ..files import make_durably

    directory = output or place_of(models[0])
    if mesh.rank == 0:
        make_durably(directory)
    with shown_progress("forecasts", disable=mesh.rank > 0) as progress:
        evaluation = evaluate(models, mesh, data=data, maps=directory / MAPS, progress=progress, **options)
    return evaluation, save(evaluation, directory) if mesh.rank == 0 else {}, directory


def place_of(model: Path) -> Path:
    """Where the results of a model go by themselves."""
    from ..training.shards import FOLDER

    if model.suffix and not (model / FOLDER).is_dir():
        return model.with_name(f"{model.name}.evaluation")
    return (model.parent.parent if model.parent.name == FOLDER else model) / "evaluation"


def _abouts(models: Sequence[Path]) -> list[dict[str, str]]:
    """What is said of each network, without reading its weights; of files nothing."""
    from ..evaluation.entries import is_file_of_forecasts
    from ..training.loading import about_network

    for path in models:
        if not path.exists():
            raise InputError(f"MODEL {path} does not exist. Give a run_dir, a checkpoint, or a file.")
    return [{} if is_file_of_forecasts(path) else about_network(path) for path in models]


def _mesh_in(abouts: Sequence[dict[str, str]]) -> str:
    return next((one["mesh"] for one in abouts if "mesh" in one), "1x1")


def _check_data(paths: Sequence[Path]) -> None:
    """Says why data cannot be read before any rank is started."""
    from ..data.layout import STORE_FILE
    from ..data.store import Store
    from ..files import check_data_is_there

    check_data_is_there(paths)
    for path in paths:
        if (path / STORE_FILE).is_file():
            Store.open(path).close()


def show(evaluation: "Evaluation", directory: Path) -> None:
    """Prints the errors of all, what they say, and where the rest is."""
    from ..evaluation.report import headline
    from ..evaluation.results import REPORT

    kinds = {True: ", held out", False: ", trained on", None: ", not known to be held out"}
    steps = f"{len(evaluation.leads_h)} steps" if len(evaluation.leads_h) > 1 else "1 step"
    title = f"{evaluation.forecasts} forecasts of {steps}{kinds[evaluation.held_out]}, area-weighted RMSE"
    headings = [name.replace("_", "_ ") for name in evaluation.names]  # several stand beside each other
    table = table_of("variable", "lead", *headings, text=("variable",), title=title)
    rmse_LFC = evaluation.metrics["rmse"]
    for number, target in enumerate(evaluation.targets):
        for lead in range(len(evaluation.leads_h)):
            numbers = [f"{value:.4g}" if value == value else "-" for value in rmse_LFC[lead, :, number].tolist()]
            table.add_row(f"{target.name} ({target.units})" if target.units else target.name, str(lead + 1), *numbers)
    console = Console()
    console.print(table)
    for sentence in headline(evaluation):
        console.print(sentence.replace("**", ""))
    console.print(f"report: {directory / REPORT}")
