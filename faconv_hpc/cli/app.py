"""The command line: each verb parses, loads the config, and makes one call."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..config import MeshConfig, RunConfig, load_config
from ..errors import EXIT_FAILED, EXIT_OK, InputError, LostRankError, RunError, exit_code_of
from ..launch.local import inside_a_job, run_and_read
from .checkpoint import checkpoint_app
from .data import data_app
from .doctor import doctor_command
from .ranks import check_ranks, in_job, job_ranks, run_ranks, say_before_joining, set_options, starts_ranks
from .study import study_command
from .submit import submit_command

if TYPE_CHECKING:
    from ..evaluation.skill import Evaluation
    from ..spatial.mesh import ProcessMesh
    from ..training.parity import ParityRow

app = typer.Typer(
    help="Train FAConvLSTM on large lat/lon grids, cut into tiles over ranks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)
app.add_typer(checkpoint_app, name="checkpoint", help="List, verify and export the checkpoints of a run.")
app.add_typer(data_app, name="data", help="Make, inspect and fetch stores of fields.")
app.command("doctor")(doctor_command)
app.command("study")(study_command)
app.command("submit")(submit_command)

ConfigPath = Annotated[Path, typer.Argument(help="YAML file of a run, such as configs/quickstart_era5.yaml.")]
RunPath = Annotated[Path, typer.Argument(help="The run_dir of a run.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Change a value of the config. May be repeated.")
]
Ranks = Annotated[
    int | None,
    typer.Option("--ranks", min=1, help="Start so many ranks on this machine; without it, this process is one rank."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]

LAYOUT_HELP = (
    "A layout to compare, LATxLON or REPLICASxLATxLON. May be repeated; without --ranks, starts as many ranks as "
    "each needs."
)


@app.command()
def train(
    config: ConfigPath,
    set_: Overrides = None,
    ranks: Ranks = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a damaged checkpoint instead of going on from the one before it.")
    ] = False,
) -> None:
    """Train a run, from its newest whole checkpoint if there is one.

    Trains in the ranks that are there: started by torchrun, srun or mpiexec, or by --ranks on this machine.
    SIGTERM, SIGUSR1 and SIGUSR2 end it after the step under way, with a checkpoint and exit code 75: start the same
    command again to go on. Exit code 93: starting again has led nowhere several times.

    Example: `faconv train configs/quickstart_era5.yaml --ranks 2 --set training.steps=100`
    """
    run = load_config(config, set_ or ())
    if starts_ranks(ranks):
        check_ranks(run.mesh, ranks)
        raise typer.Exit(run_ranks(["train", str(config), *set_options(set_), *["--strict"] * strict], ranks))
    from ..training.faults.signals import StopRequest, grace_s

    with StopRequest(grace_s(run.training)) as stop:  # before all that takes time
        counted = _counted_on_slurm(run)
        from ..training.trainer import train as train_run

        def job(mesh: "ProcessMesh") -> int:
            return train_run(run, mesh, strict=strict, stop=stop, counted=counted)

        raise typer.Exit(in_job(run.mesh, run.training.timeout_s, job))


@app.command()
def verify(
    config: ConfigPath,
    ranks: Ranks = None,
    layout: Annotated[
        list[str] | None,
        typer.Option("--layout", metavar="[Rx]LATxLON", help=LAYOUT_HELP),
    ] = None,
    set_: Overrides = None,
    float64: Annotated[
        bool, typer.Option("--float64", help="Compute in float64 and ask for 1e-12 instead of 1e-5.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Prove that tiles give the same numbers as one tile, for your own config and data.

    Runs one tile and every layout asked for on random weights and the first windows of the store, and compares loss,
    output, embedding, the gradients of the input and of every part of the network, and the update by DeepSpeed.
    Without --layout: every arrangement of the ranks. Says PASS, or where the first difference lies. Exit code 0 if
    all agree, 1 if not.

    Example: `faconv verify configs/quickstart_era5.yaml --layout 1x2 --layout 2x2 --layout 2x1x2`
    """
    run = load_config(config, set_ or ())
    layouts = [MeshConfig.parse(text) for text in layout or ()]
    arguments = ["verify", str(config), *set_options(set_), *["--float64"] * float64]
    if starts_ranks(ranks) or (layouts and not inside_a_job()):
        rows = _rows_of_local_ranks(run, arguments, ranks, layouts)
        _show_parity(rows, as_json)
        raise typer.Exit(EXIT_OK if all(row.passed for row in rows) else EXIT_FAILED)
    import torch

    from ..training.parity import verify_parity

    def job(mesh: "ProcessMesh") -> int:
        rows = verify_parity(run, mesh, torch.float64 if float64 else torch.float32, layouts or None)
        if mesh.rank == 0:
            _show_parity(rows, as_json)
        return EXIT_OK if all(row.passed for row in rows) else EXIT_FAILED

    raise typer.Exit(in_job(None, run.training.timeout_s, job))


@app.command()
def evaluate(run_dir: RunPath, ranks: Ranks = None, as_json: AsJson = False) -> None:
    """Forecast the held-out frames of a run: RMSE per variable beside persistence, and a figure.

    On several ranks the globe is cut as the run's mesh says, on one it is whole; the numbers are the same.

    Example: `faconv evaluate runs/quickstart_era5 --ranks 2`
    """
    from ..evaluation.skill import load_run

    run = load_run(run_dir)
    tiles = MeshConfig(lat=run.mesh.lat, lon=run.mesh.lon)
    if starts_ranks(ranks):
        check_ranks(tiles, ranks)
        raise typer.Exit(run_ranks(["evaluate", str(run_dir), *["--json"] * as_json], ranks))
    from ..evaluation.figures import draw_forecast
    from ..evaluation.skill import evaluate as evaluate_run
    from ..evaluation.skill import save_skill

    run = run.model_copy(update={"run_dir": run_dir})

    def job(mesh: "ProcessMesh") -> None:
        evaluation = evaluate_run(run, mesh)
        if mesh.rank == 0:
            title = f"{run_dir.name}: change to the last frame, {'held out' if evaluation.held_out else 'trained on'}"
            figure = draw_forecast(evaluation.example, run_dir / "figures" / "forecast.png", title)
            saved = save_skill(evaluation, run_dir)
            print(saved.read_text()) if as_json else _show_skill(evaluation, figure)

    in_job(tiles if job_ranks() > 1 else MeshConfig(), run.training.timeout_s, job)


def main() -> None:
    """Entry point: a mistake of the user's ends with one message and exit code 2."""
    from ..training.faults.signals import hold_signals

    hold_signals()
    try:
        app()
    except LostRankError as error:  # the ranks have not met, and cannot agree
        print(f"faconv: failed: {error}", file=sys.stderr)
        sys.exit(exit_code_of(error))
    except (InputError, RunError) as error:
        say_before_joining(error)
        print(f"faconv: {'error' if isinstance(error, InputError) else 'failed'}: {error}", file=sys.stderr)
        sys.exit(exit_code_of(error))


def _counted_on_slurm(run: RunConfig) -> bool:
    """Counts this start on the first rank of a Slurm job, which is requeued even if its ranks never meet."""
    from ..spatial.environment import RankEnvironment
    from ..training.faults.starts import count_start

    if not RankEnvironment.is_first_of_slurm() or run.mesh.ranks != job_ranks():
        return False
    count_start(run.run_dir, run.training.give_up_after)
    return True


def _rows_of_local_ranks(
    run: RunConfig, arguments: Sequence[str], ranks: int | None, layouts: Sequence[MeshConfig]
) -> "list[ParityRow]":
    """The layouts' rows, from ranks started here: one start for all layouts of as many ranks."""
    from ..data.store import Store
    from ..training.parity import ParityRow, check_layout
    from ..training.setup import grid_of

    grid = grid_of(run, Store.open(run.data.store))
    by_ranks: dict[int, list[MeshConfig]] = {ranks: []} if ranks else {}
    for layout in layouts:
        check_layout(layout, ranks or layout.ranks, grid)
        by_ranks.setdefault(layout.ranks, []).append(layout)
    rows: list[ParityRow] = []
    for started, group in by_ranks.items():
        options = [part for layout in group for part in ("--layout", str(layout))]
        code, printed = run_and_read([*arguments, *options, "--json"], started)
        answer = printed.rpartition('{"passed"')
        if not answer[1] or code not in (EXIT_OK, EXIT_FAILED):  # no verdict: stderr says why
            raise typer.Exit(code or EXIT_FAILED)
        found = json.loads("".join(answer[1:]))["rows"]
        rows += [ParityRow(**{name: row[name] for name in row if name != "passed"}) for row in found]
    return rows


def _show_parity(rows: "Sequence[ParityRow]", as_json: bool) -> None:
    passed = all(row.passed for row in rows)
    if as_json:
        print(json.dumps({"passed": passed, "rows": [asdict(row) | {"passed": row.passed} for row in rows]}))
        return
    table = Table(
        title="tiles beside one tile: largest difference over largest value",
        caption="layouts: tiles along lat x lon, or replicas x lat x lon",
    )
    layouts = list(dict.fromkeys(row.layout for row in rows))
    table.add_column("quantity")
    for layout in layouts:
        table.add_column(layout, justify="right")
    by_place = {(row.quantity, row.layout): row for row in rows}
    for quantity in dict.fromkeys(row.quantity for row in rows):
        cells = [by_place[quantity, layout] for layout in layouts]
        table.add_row(quantity, *(f"{row.difference:.1e}{'' if row.passed else '  FAIL'}" for row in cells))
    console = Console()
    console.print(table)
    for row in rows:
        if row.first:
            console.print(f"first difference of the {row.quantity} on {row.layout}: {row.first}")
    worst = max(rows, key=lambda row: row.difference if row.difference == row.difference else float("inf"))
    console.print(
        f"{'PASS' if passed else 'FAIL'}: largest difference {worst.difference:.1e} "
        f"({worst.quantity}, {worst.layout}), tolerance {worst.tolerance:g}"
    )


def _show_skill(evaluation: "Evaluation", figure: Path) -> None:
    what = "held-out" if evaluation.held_out else "training"
    title = f"one-step forecasts of {evaluation.forecasts} {what} frames by the checkpoint of step {evaluation.step}"
    table = Table(title=f"{title}, area-weighted RMSE")
    for column in ("variable", "units", "forecast", "persistence", "ratio"):
        table.add_column(column, justify="left" if column in ("variable", "units") else "right")
    for skill in evaluation.skills:
        numbers = (f"{skill.rmse:.4g}", f"{skill.persistence_rmse:.4g}", f"{skill.ratio:.3f}")
        table.add_row(skill.variable, skill.units, *numbers)
    console = Console()
    console.print(table)
    console.print(
        f"loss of the run: {evaluation.first_loss:.4f} at its start, {evaluation.last_loss:.4f} at its end "
        f"({evaluation.last_loss / evaluation.first_loss:.2f} of it)\nfigure: {figure}"
    )
