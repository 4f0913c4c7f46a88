"""``faconv explain``: what a network looks at."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from ..files import cannot_write, replacing_together
from ..locks import held_output
from .options import DataPaths, Device
from .ranks import job_ranks
from .trained import Model, OfSequence, check_directory, paths_of, shown_stages

if TYPE_CHECKING:
    from ..evaluation.explanation.explain import Explanation

Output = Annotated[Path, typer.Option(metavar="DIR", help="For report.md, figures and explain.nc.")]
Samples = Annotated[int, typer.Option(min=1, help="Dates to average over, spread over those that the data allow.")]
RegionText = Annotated[
    str | None,
    typer.Option(
        "--region", metavar="LAT0,LAT1,LON0,LON1", help="Degrees: ask what the forecast of its mean hangs on."
    ),
]
Name = Annotated[str | None, typer.Option("--variable", help="That is asked about. Default: the first forecast.")]
Lead = Annotated[int, typer.Option(min=1, help="How many steps ahead.")]


def explain_command(
    model: Model,
    output: Output,
    data: DataPaths = None,
    samples: Samples = 12,
    region: RegionText = None,
    variable: Name = None,
    lead: Lead = 1,
    sequence: OfSequence = None,
    device: Device = None,
) -> None:
    """Show what a network looks at: attention by season, the dilations of each channel, and, with --region, on which
    fields the forecast of that region hangs (gradients). Read report.md first.

    Works in one process, which must have room for the globe.

    Example: `faconv explain runs/quickstart_era5 --output explained --region 40,60,-20,20 --lead 2`
    """
    from ..evaluation.explanation.explain import explain
    from ..evaluation.explanation.sensitivity import Question, Region
    from ..forecasting.forecaster import Forecaster
    from ..spatial.device import check_device, device_for
    from ..training.loading import about_network, contract_in

    if job_ranks() > 1:
        raise InputError(f"faconv explain is one process, and this is one of {job_ranks()} ranks. Start it once.")
    if region is None and (variable is not None or lead > 1):
        raise InputError("--variable and --lead are of the forecast of a region. Give --region, such as 40,60,-20,20.")
    about = about_network(model)
    paths = paths_of(data, [about], [model])
    check_directory(output, [*paths, model])
    question = None if region is None else Question.of(contract_in(about), Region.parse(region), variable, lead)
    check_device(device or "auto")
    forecaster = Forecaster.load(model, device=device_for(device or "auto"))
    with held_output(output, "explanation"), shown_stages() as stages:
        found = explain(forecaster, paths, samples, question, sequence, stages)
        _write(found, output)
    print(f"{len(found.dates)} dates from {found.dates[0]} to {found.dates[-1]}. Read {output / 'report.md'}")


def _write(found: "Explanation", output: Path) -> None:
    from ..evaluation.explanation.explain import write_netcdf
    from ..evaluation.explanation.figures import draw_all
    from ..evaluation.explanation.report import CAPTIONS, NETCDF, REPORT, write_report

    try:
        with replacing_together(output, (NETCDF, *CAPTIONS, REPORT)) as beside:
            figures = draw_all(found, beside)
            write_netcdf(found, beside / NETCDF)
            write_report(found, figures, beside / REPORT)
    except OSError as error:
        raise cannot_write("--output", output, error) from None
