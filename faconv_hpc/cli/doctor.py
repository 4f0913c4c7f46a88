"""``faconv doctor``: what is installed and what works, with the fix for what does not."""

import json
import signal
import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..config_file import load_config
from ..errors import EXIT_INPUT, InputError, exit_code_of
from ..launch.local import inside_a_job
from .options import AsJson, Overrides, Ranks
from .ranks import job_ranks, joined, run_ranks, set_options, starts_ranks

if TYPE_CHECKING:
    from ..launch.findings import Report, Subject
    from ..spatial.mesh import ProcessMesh

TIMEOUT_S = 120.0  # for all ranks to come, where no config says how long they may take
STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red"}


def doctor_command(
    config: Annotated[Path | None, typer.Argument(help="YAML file of the run that is to be started, if any.")] = None,
    set_: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Directory to look at. Default: run_dir of the config, or the current one.")
    ] = None,
    ranks: Ranks = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out write speed and large messages.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is installed and what works, with the fix for what does not.

    Looks at versions, the backend, GPUs, compiler, MPI, Slurm, and the directory of the run; with a config, also at
    its store and mesh. In a job of several ranks it looks at every node, compares the ranks, their clocks and their
    messages, and prints one report. Exit code 0 all is well, 1 something works worse than it could, 2 something that
    a run needs does not work; 75 as elsewhere: a rank was lost.

    Example: `srun faconv doctor configs/quickstart_era5.yaml && srun faconv train configs/quickstart_era5.yaml`
    """
    from ..launch.findings import Subject

    if config is None and set_:
        raise InputError(
            f"--set {set_[0]} changes a config, and none was given. Name it: faconv doctor CONFIG --set ..."
        )
    run = load_config(config, set_ or ()) if config else None
    if starts_ranks(ranks):
        options = [*set_options(set_), *(["--run-dir", str(run_dir)] if run_dir else [])]
        flags = [*["--quick"] * quick, *["--json"] * as_json]
        raise typer.Exit(run_ranks(["doctor", *([str(config)] if config else []), *options, *flags], ranks))
    raise typer.Exit(_examined(Subject(run_dir or (run.run_dir if run else Path.cwd()), run, quick), as_json))


def _examined(subject: "Subject", as_json: bool) -> int:
    """Examines the ranks that are there, prints the report on one of them, and returns its exit code on all."""
    from ..launch.checks import load_torch
    from ..launch.doctor import call_roll, examine_alone, joining_problems, node_name

    torch = load_torch()
    if isinstance(torch, str) and inside_a_job():  # it cannot even say so to the others
        print(f"faconv: error: torch cannot be imported on {node_name()}: {torch}. Install it there.", file=sys.stderr)
        return EXIT_INPUT
    if isinstance(torch, str):
        return _show(examine_alone(subject), as_json)
    timeout_s = subject.config.training.timeout_s if subject.config else TIMEOUT_S
    device = "cpu" if subject.device == "cpu" else "auto"  # where a GPU is missing a finding says so
    try:
        if job_ranks() > 1:
            roll = call_roll(timeout_s, device)
            problems = joining_problems(roll)
            if problems:
                code = _show(examine_alone(subject, problems), as_json) if roll.rank == 0 else EXIT_INPUT
                roll.until_rank_0_is_done(timeout_s)
                _leave_together(code)
        with joined(None, timeout_s, device) as mesh:
            return _examined_job(mesh, subject, as_json)
    except RuntimeError as error:  # the ranks have not met
        print(f"faconv: failed: {error}", file=sys.stderr)
        return max(exit_code_of(error), EXIT_INPUT)


def _examined_job(mesh: "ProcessMesh", subject: "Subject", as_json: bool) -> int:
    from ..launch.doctor import examine

    report = examine(mesh, subject)
    if mesh.rank == 0:
        _show(report, as_json)
    if mesh.ranks > 1:
        mesh.gathered([0.0])  # it is shown
        _leave_together(report.exit_code)
    return report.exit_code


def _leave_together(code: int) -> NoReturn:
    """At once: srun sends SIGTERM to the ranks that are still there when the first has left with a code not 0."""
    from ..spatial.failure import leave

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    leave(code)


def _show(report: "Report", as_json: bool) -> int:
    """Prints it; its exit code."""
    print(json.dumps(report.to_json())) if as_json else _show_table(report)
    return report.exit_code


def _show_table(report: "Report") -> None:
    from ..launch.findings import Verdict

    console = Console()
    table = Table(
        title=f"faconv doctor: {_count(len(report.nodes), 'rank')} on {_count(len(set(report.nodes)), 'node')}"
    )
    for column in ("", "looked at", "verdict", "found"):
        table.add_column(column, overflow="fold")
    for group, findings in groupby(report.findings, key=lambda finding: finding.group):
        for row, finding in enumerate(findings):
            verdict = Text(str(finding.verdict), STYLES[str(finding.verdict)])
            table.add_row(group if row == 0 else "", finding.name, verdict, Text(finding.value))
        table.add_section()
    console.print(table)
    for finding in sorted(report.findings, key=lambda finding: -finding.verdict):
        if finding.fix is not None:
            verdict = Text(f"{finding.verdict}: ", STYLES[str(finding.verdict)])
            console.print(verdict + Text(f"{finding.name}: {finding.fix}", ""), soft_wrap=True)
    warnings, failures = (report.count(verdict) for verdict in (Verdict.WARNING, Verdict.FAILURE))
    console.print(f"{_count(warnings, 'warning')}, {_count(failures, 'failure')}")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"
