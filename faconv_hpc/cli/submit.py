"""``faconv submit``: a run as a Slurm job."""

import json
from typing import Annotated

import typer

from ..config import RunConfig
from ..config_file import load_config
from ..errors import EXIT_OK, InputError
from .options import AsJson, ConfigPath, Extend, Overrides, extend_option


def submit_command(
    config: ConfigPath,
    set_: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the batch script, to the letter; start nothing. Writes the config it names to RUN_DIR/slurm.",
        ),
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the log until the job is over; its exit code.")] = False,
    array: Annotated[
        int,
        typer.Option(
            "--array",
            min=0,
            metavar="MEMBERS",
            help="An ensemble, as a job array: member K trains from training.seed + K into RUN_DIR/member-K.",
        ),
    ] = 0,
    extend: Extend = None,
    preflight: Annotated[bool, typer.Option(help="Let `faconv doctor` look at the nodes before every start.")] = True,
    as_json: AsJson = False,
) -> None:
    """Train a run as a Slurm job that is requeued at its time limit, as often as it takes.

    Nodes and tasks come from the mesh, all else from section `slurm` of the config. Before a time limit the ranks save
    together at the end of a step and the job goes back to the queue; the same when a rank is killed or a node lost.
    A mistake in the config never requeues. The resolved config, the script and the log stand in RUN_DIR/slurm.
    `scancel JOB` ends a run for good.

    Example: `faconv submit configs/global_era5_025.yaml --set slurm.account=climate --wait`
    """
    from ..launch.slurm import follow
    from ..launch.submit import script, submit

    run = load_config(config, set_ or ())
    _check(run)
    if dry_run:
        print(script(run, preflight=preflight, members=array, more=extend_option(extend)))
        raise typer.Exit(EXIT_OK)
    if wait and array:
        raise InputError("--wait follows one job, and --array makes several. Leave one of them out.")
    job = submit(run, preflight=preflight, members=array, more=extend_option(extend))
    if as_json:
        print(json.dumps({"job": job.job, "script": str(job.script), "log": str(job.log)}))
    else:
        print(f"job {job.job}, script {job.script}, log {job.log}")
    if wait:
        raise typer.Exit(follow(job.job, job.log))


def _check(run: RunConfig) -> None:
    """Raises InputError for what can work on no node. The store may be made by a job before this one."""
    from ..data.layout import STORE_FILE
    from ..training.fit import check_fits, check_network

    check_network(run.model)
    if (run.data.store / STORE_FILE).is_file():
        check_fits(run, here=False)
