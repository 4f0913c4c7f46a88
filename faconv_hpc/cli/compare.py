"""``faconv compare``: models beside each other, each trained for the same time, and which is better."""

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..config_file import load_yaml
from ..errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, InputError, RunError
from .options import AsJson, Overrides
from .ranks import joined
from .study import SIGNALS, Display, Where, cluster_of, default_cluster
from .tables import table_of
from .trained import shown_progress

if TYPE_CHECKING:
    from ..comparison.plan import ComparisonConfig, Run
    from ..comparison.result import ComparisonResult
    from ..scaling.driver import PointState
    from ..scaling.study import Cluster, Point
    from ..training.faults.signals import StopRequest

FOR_THE_PAGE = ("frames", "s trained", "peak GiB")  # columns for which a terminal has no room


def compare_command(
    comparison: Annotated[Path, typer.Argument(help="YAML file, such as configs/compare_shallow_water.yaml.")],
    cluster: Annotated[
        Where | None,
        typer.Option(help="slurm, or local: ranks of this machine, one run at a time. Default: slurm if it answers."),
    ] = None,
    set_: Overrides = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Start runs again that have failed. Else they stay as they are.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Start nothing: tables and figures of what is done.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare models on the same data under the same time of training: each at its best learning rate, from several
    seeds.

    A probe times a step of each model; its runs then have as many steps as the time holds. What is done is kept.
    Stopped or killed, the same command goes on, each run from its newest checkpoint. Networks are judged by this
    process. Exit code 0: all models are judged; 1: some are not; 2: wrong input; 75: stopped by a signal.

    Example: `faconv compare configs/compare_shallow_water.yaml --cluster local`
    """
    from ..comparison.gathering import known_runs, result_of
    from ..comparison.plan import ComparisonConfig, known_steps, probes_of

    config = load_yaml(ComparisonConfig, comparison, set_ or ())
    probes = probes_of(config)
    if not report_only:
        _run(config, probes, cluster or default_cluster(list(probes.values())), retry_failed)
    elif not config.study_dir.is_dir():
        raise InputError(
            f"there is nothing to report: study_dir {config.study_dir} does not exist. Leave --report-only out, and "
            f"the comparison is run."
        )
    runs = known_runs(config, known_steps(config, probes))
    _check_same(runs)
    result = result_of(config, runs)
    from ..comparison.page import write_report  # here, as it loads matplotlib

    write_report(result, config.study_dir)
    print(json.dumps(result.as_json(), indent=2)) if as_json else show(result)
    raise typer.Exit(EXIT_OK if not result.missing else EXIT_FAILED)


def _run(config: "ComparisonConfig", probes: "Mapping[str, Point]", where: Where, retry_failed: bool) -> None:
    """Probes, runs, and judges what is best; leaves with exit code 75 if a signal came."""
    from ..comparison.gathering import best_runs, known_runs
    from ..comparison.judging import check_truth
    from ..comparison.plan import runs_of, steps_of
    from ..scaling.points import FAILED, locked
    from ..training.faults.signals import StopRequest

    cluster = cluster_of(where)
    check_truth(config, next(iter(probes.values())).run)
    with locked(config.study_dir), StopRequest(dict.fromkeys(SIGNALS, 0.0)) as stop:
        states = _drive(config, list(probes.values()), cluster, where, retry_failed, stop)
        failed = next((state for state in states if state.status == FAILED), None)
        if failed is not None:
            raise RunError(
                f"{failed.point.name} failed: {failed.why} (its log is in {failed.point.directory}). Mend that, "
                f"or leave the model out, and start the same command with --retry-failed."
            )
        steps = {name: steps_of(config, probe) for name, probe in probes.items()}
        runs = runs_of(config, steps)
        _drive(config, [run.point for run in runs], cluster, where, retry_failed, stop)
        runs = known_runs(config, steps)
        if others := [run.point for run in runs if run.seed not in config.choosing]:
            _drive(config, others, cluster, where, retry_failed, stop)
        _judge(config, best_runs(config, runs), stop)


def _drive(
    config: "ComparisonConfig",
    points: "Sequence[Point]",
    cluster: "Cluster",
    where: Where,
    retry_failed: bool,
    stop: "StopRequest",
) -> "list[PointState]":
    """Until all points have ended; leaves with exit code 75 if a signal came."""
    from ..scaling.driver import StudyDriver
    from ..scaling.stores import check_stores

    check_stores(points, here=where is Where.LOCAL)
    display = Display(Console(stderr=True))
    with display.live:
        driver = StudyDriver(config, points, cluster, where.value, retry_failed=retry_failed, show=display.show)
        states = driver.run(stop)
    _leave_if_stopped(config, stop)
    return states


def _judge(config: "ComparisonConfig", runs: "Sequence[Run]", stop: "StopRequest") -> None:
    """Those that are not judged yet, one after the other."""
    from ..comparison.judging import judge, judged
    from ..spatial.mesh import TIMEOUT_S

    left = [run for run in runs if judged(config, run) is None]
    if not left:
        return
    with joined(None, TIMEOUT_S, left[0].point.run.device) as mesh:
        for run in left:
            _leave_if_stopped(config, stop)
            print(f"judging {run.point.name}", file=sys.stderr)
            with shown_progress("forecasts", disable=mesh.rank > 0) as progress:
                judge(config, run, mesh, progress)
    _leave_if_stopped(config, stop)


def _leave_if_stopped(config: "ComparisonConfig", stop: "StopRequest") -> None:
    if stop.number:
        print(
            f"faconv: stopped by {signal.Signals(stop.number).name}. What is done is kept in {config.study_dir}: the "
            f"same command goes on from there.",
            file=sys.stderr,
        )
        raise typer.Exit(EXIT_STOPPED)


def _check_same(runs: "Sequence[Run]") -> None:
    """Raises InputError where what is there was trained otherwise than the file says now."""
    from ..scaling.points import PointFiles

    for run in runs:
        PointFiles(run.point).check_same()


def show(result: "ComparisonResult") -> None:
    """Prints the table of models, what can be told, and where the rest is."""
    from ..comparison.page import COLUMNS, REPORT_MD, headline, notes_of, rows_of

    console = Console()
    shown = [place for place, column in enumerate(COLUMNS) if column not in FOR_THE_PAGE]
    heads = [COLUMNS[place].replace("tence's", "t- ence's").replace("y-adds", "y- adds") for place in shown]
    table = table_of(*heads, text=("model",), title=f"comparison {result.comparison.name}")
    for row in rows_of(result):
        table.add_row(*(row[place] for place in shown))
    console.print(table)
    for sentence in (*headline(result), *notes_of(result)):
        console.print(sentence.replace("**", ""), highlight=False, markup=False)
    console.print(f"report: {result.comparison.study_dir / REPORT_MD}", highlight=False, soft_wrap=True)
