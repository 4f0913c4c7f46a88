"""``faconv evaluate``: how good a run's forecasts are."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..config import MeshConfig
from .options import AsJson, Device, ModelPath, Ranks
from .ranks import check_ranks, job_ranks, joined, run_ranks, starts_ranks
from .tables import table_of

if TYPE_CHECKING:
    from ..evaluation.skill import Evaluation
    from ..training.skill import Skill


Leads = Annotated[int, typer.Option(min=1, help="Run freely for so many steps, each on the forecast before it.")]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Forecast so many times, spread over the period. Default: all.")
]


def evaluate_command(
    model: ModelPath,
    ranks: Ranks = None,
    leads: Leads = 1,
    samples: Samples = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Forecast the test period of a run: RMSE per variable and lead, and a figure. Persistence (no change) and
    climatology (the mean of the training period at that time of year and day) stand beside it.

    By its newest checkpoint, or that of a directory such as `runs/my_run/checkpoints/best`.

    On several ranks the globe is cut as the run's mesh says, on one it is whole; the numbers are the same.

    Example: `faconv evaluate runs/quickstart_era5 --ranks 2 --leads 4`
    """
    from ..evaluation.skill import load_run, run_of

    run_dir, checkpoint = run_of(model)
    run = load_run(run_dir)
    device = device or run.device
    tiles = MeshConfig(lat=run.mesh.lat, lon=run.mesh.lon)
    if starts_ranks(ranks):
        from ..data.store import Store
        from ..spatial.device import check_device

        check_device(device)
        Store.open(run.data.store).close()  # or says why not, before any rank is started
        check_ranks(tiles, ranks, "leave it out: one process has the globe whole")
        some = [] if samples is None else ["--samples", str(samples)]
        given = ["evaluate", str(model), "--leads", str(leads), *some, "--device", device, *["--json"] * as_json]
        raise typer.Exit(run_ranks(given, ranks))
    from ..evaluation.figures import draw_forecast
    from ..evaluation.skill import evaluate as evaluate_run
    from ..evaluation.skill import save_skill

    run = run.model_copy(update={"run_dir": run_dir})

    with joined(tiles if job_ranks() > 1 else MeshConfig(), run.training.timeout_s, device) as mesh:
        evaluation = evaluate_run(run, mesh, leads, checkpoint, samples)
        if mesh.rank == 0:
            figure = draw_forecast(evaluation, run_dir / "figures" / "forecast.png", run_dir.name)
            saved = save_skill(evaluation, run_dir)
            print(saved.read_text()) if as_json else _show_skill(evaluation, figure)


def _show_skill(evaluation: "Evaluation", figure: Path) -> None:
    names, leads = [skill.variable for skill in evaluation.skills], max(skill.lead for skill in evaluation.skills)
    what = "held out" if evaluation.held_out else "trained on"
    steps = f"{leads} steps" if leads > 1 else "1 step"
    title = f"{evaluation.forecasts} forecasts of {steps}, {what}, by the checkpoint of step {evaluation.step}"
    columns = ("variable", "units", "lead", "forecast", "persistence", "ratio", "climatology")
    table = table_of(*columns, text=columns[:2], title=f"{title}, area-weighted RMSE")
    for skill in sorted(evaluation.skills, key=lambda one: (names.index(one.variable), one.lead)):
        numbers = (f"{skill.rmse:.4g}", f"{skill.persistence_rmse:.4g}", f"{skill.ratio:.3f}", _known(skill))
        table.add_row(skill.variable, skill.units, str(skill.lead), *numbers)
    console = Console()
    console.print(table)
    console.print(
        f"loss of the run: {evaluation.first_loss:.4f} at its start, {evaluation.last_loss:.4f} at its end "
        f"({evaluation.last_loss / evaluation.first_loss:.2f} of it)\nfigure: {figure}"
    )


def _known(skill: "Skill") -> str:
    return "-" if math.isnan(skill.climatology_rmse) else f"{skill.climatology_rmse:.4g}"
