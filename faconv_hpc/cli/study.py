"""``faconv study``: the same run on several meshes, each a job of its own, then the table and the figure."""

import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ..config_file import load_yaml
from ..errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, InputError
from .options import AsJson, Overrides
from .tables import table_of

if TYPE_CHECKING:
    from ..scaling.driver import PointState
    from ..scaling.report import StudyReport
    from ..scaling.study import Cluster, Point, StudyConfig

FILE_WIDTH = 130  # of the table where it is not printed on a terminal
FOR_THE_PAGE = ("nodes", "min to max", "samples/s", "data")  # columns for which a terminal has no room
ASK_S = 10.0  # for Slurm to answer where nobody asked for it
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Where(StrEnum):
    """What takes the jobs."""

    SLURM = "slurm"
    LOCAL = "local"


def study_command(
    study: Annotated[Path, typer.Argument(help="YAML file of a study, such as configs/study_strong.yaml.")],
    cluster: Annotated[
        Where | None,
        typer.Option(help="slurm, or local: ranks of this machine, one point at a time. Default: slurm if it answers."),
    ] = None,
    set_: Overrides = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run points again that have failed. Else they stay as they are.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Start nothing: table and figure of what is done.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure strong or weak scaling: one config at several meshes, each point a job of its own.

    Points that are done are kept. Stopped or killed, the same command goes on: it finds the jobs that still wait or
    run. Exit code 0: all points are done; 1: some have failed, or are still to do; 2: wrong input; 75: stopped by a
    signal.

    Example: `faconv study configs/study_strong.yaml --cluster slurm`
    """
    from ..scaling.report import report_of
    from ..scaling.study import StudyConfig, points_of

    config = load_yaml(StudyConfig, study, set_ or ())
    points = points_of(config)
    if report_only:
        _check_begun(config, points)
    else:
        _run(config, points, cluster or default_cluster(points), retry_failed)
    report = report_of(config, points)
    from ..scaling.page import write_report  # here, so that a study that is going on does not load matplotlib

    write_report(report, config.study_dir)
    print(report.to_json()) if as_json else _show_report(report, config.study_dir)
    raise typer.Exit(EXIT_OK if report.all_done else EXIT_FAILED)


def _run(config: "StudyConfig", points: "Sequence[Point]", where: Where, retry_failed: bool) -> None:
    """Until all points have ended; leaves with exit code 75 if a signal came."""
    from ..scaling.driver import StudyDriver
    from ..scaling.points import locked
    from ..scaling.results import write_results
    from ..scaling.stores import check_stores
    from ..training.faults.signals import StopRequest

    console = Console(stderr=True)
    cluster = cluster_of(where)  # first: one that does not answer is no failure of a point
    with locked(config.study_dir):
        make_stores(config, points, lambda text: console.print(text, highlight=False, soft_wrap=True))
        check_stores(points, here=where is Where.LOCAL)
        display = Display(console)
        with StopRequest(dict.fromkeys(SIGNALS, 0.0)) as stop, display.live:
            record = partial(write_results, config, points)
            StudyDriver(
                config, points, cluster, where.value, record=record, retry_failed=retry_failed, show=display.show
            ).run(stop)
        if stop.number:
            _say_how_to_go_on(where, stop.number, config.study_dir)
            raise typer.Exit(EXIT_STOPPED)


def make_stores(config: "StudyConfig", points: "Sequence[Point]", say: Callable[[str], None]) -> None:
    """Makes the synthetic stores that are not there yet; one that was cut short is finished."""
    from ..prepare.synthetic import SyntheticOptions, synthesise
    from ..scaling.stores import missing_stores

    for store in missing_stores(config, points):
        say(store.told)
        options = SyntheticOptions(store.nlat, store.nlon, store.channels, store.frames)
        synthesise(store.path, options, mesh=store.mesh, command=f"faconv study, point {store.point}")


def cluster_of(where: Where) -> "Cluster":
    from ..launch.cluster import LocalCluster, SlurmCluster

    return SlurmCluster() if where is Where.SLURM else LocalCluster()


def default_cluster(points: "Sequence[Point]") -> Where:
    """Slurm, where it answers; else this machine, and it is said.

    Raises:
        InputError: Slurm does not answer, and has measured some of the points: others would not be like them.
    """
    from ..launch.slurm import NO_CLUSTER, missing_commands, ping
    from ..scaling.points import PointFiles

    if missing_commands():
        return Where.LOCAL
    up, answer = ping(ASK_S)
    if up:
        return Where.SLURM
    begun = {attempt.cluster for point in points if (attempt := PointFiles(point).attempt())}
    silent = f"Slurm's controller does not answer ({answer})"
    if Where.SLURM in begun:
        raise InputError(
            f"{silent}, and this study has points that ran there; others of this machine would not be like them. "
            f"Start it again when Slurm answers, or give --cluster local."
        )
    why = "Slurm's commands are here, but no cluster" if NO_CLUSTER in answer else silent
    print(f"faconv: {why}: the study runs on this machine; --cluster slurm insists on Slurm", file=sys.stderr)
    return Where.LOCAL


def _check_begun(config: "StudyConfig", points: "Sequence[Point]") -> None:
    """Raises InputError unless there is something to report, and it was measured as the study's file says."""
    from ..scaling.points import PointFiles

    for point in points:
        PointFiles(point).check_same()
    if not config.study_dir.is_dir():
        raise InputError(
            f"there is nothing to report: study_dir {config.study_dir} does not exist. Leave --report-only out, and "
            f"the study is run."
        )


def _say_how_to_go_on(where: Where, number: int, study_dir: Path) -> None:
    jobs = "its jobs go on in Slurm" if where is Where.SLURM else "the point that ran ends, and is run again"
    print(
        f"faconv: stopped by {signal.Signals(number).name}; {jobs}. What is done is kept in {study_dir}: "
        f"the same command goes on from there.",
        file=sys.stderr,
    )


class Display:
    """Which points wait, run, and are done: a table on a terminal, a line for every change in a log."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said: dict[str, str] = {}
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self.live: AbstractContextManager[object] = self._live or nullcontext()

    def show(self, states: "Sequence[PointState]") -> None:
        """What has changed."""
        if self._live is not None:
            self._live.update(_progress_table(states), refresh=True)
            return
        for state in states:
            text = _told(state)
            if self._said.get(state.point.name) != text:
                self._said[state.point.name] = text
                self._console.print(f"point {state.point.name}: {text}", highlight=False, soft_wrap=True, markup=False)


def _told(state: "PointState") -> str:
    job = f", job {state.attempt.job}" if state.attempt and state.attempt.job else ""
    why = f": {state.why}" if state.why else ""
    return f"{state.status}{job if state.status == 'running' else ''}{why}"


def _progress_table(states: "Sequence[PointState]") -> Table:
    table = table_of("point", "ranks", "status", "steps", "job", text=("point", "status", "job"))
    for state in states:
        steps = f"{state.steps}/{state.point.run.training.steps}"
        job = state.attempt.job if state.attempt and state.attempt.job else ""
        table.add_row(state.point.name, str(state.point.ranks), state.status, steps, job)
    return table


def _show_report(report: "StudyReport", study_dir: Path) -> None:
    from ..scaling.page import COLUMNS, FIGURE, REPORT_MD, TEXT_COLUMNS, rows_of

    left_out = () if any(one.point != one.mesh for one in report.points) else ("mesh",)
    shown = [place for place, column in enumerate(COLUMNS) if column not in (*FOR_THE_PAGE, *left_out)]
    title = f"study {report.study}: {report.scaling} scaling"
    headings = (COLUMNS[place].replace("communication", "communi- cation") for place in shown)
    table = table_of(*headings, text=COLUMNS[:TEXT_COLUMNS], title=title)
    for row in rows_of(report):
        table.add_row(*(row[place].replace(" to ", "\nto ") for place in shown))
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    console.print(table)
    lines = [report.caption, f"measured on: {report.machine}", *(f"note: {note}" for note in report.notes)]
    lines += [f"{one.point} failed: {one.why} (log: {one.log})" for one in report.points if one.status == "failed"]
    figure = f", {study_dir / FIGURE}" if report.base is not None else ""
    lines.append(f"written: {study_dir / REPORT_MD}{figure}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
