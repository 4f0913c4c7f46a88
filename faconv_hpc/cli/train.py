"""``faconv train``: a run, in the ranks that are there."""

from typing import Annotated

import typer

from ..config import RunConfig
from ..config_file import load_config
from ..errors import InputError
from .options import ConfigPath, Extend, Overrides, Ranks, extend_option
from .ranks import check_ranks, job_ranks, joined, run_ranks, set_options, starts_ranks


def train_command(
    config: ConfigPath,
    set_: Overrides = None,
    ranks: Ranks = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a damaged checkpoint instead of going on from the one before it.")
    ] = False,
    extend: Extend = None,
) -> None:
    """Train a run, from its newest whole checkpoint if there is one.

    Trains in the ranks that are there: started by torchrun, srun or mpiexec, or by --ranks on this machine.
    SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C end it after the step under way, with a checkpoint and exit code 75 (Ctrl-C:
    130): start the same command again to go on. Exit code 93: starting again has led nowhere several times.

    Example: `faconv train configs/quickstart_era5.yaml --ranks 2 --set training.steps=100`
    """
    from ..training.fit import check_fits

    run = load_config(config, set_ or ())
    if starts_ranks(ranks):
        check_ranks(run.mesh, ranks)
        check_fits(run)
        more = [*["--strict"] * strict, *extend_option(extend)]
        raise typer.Exit(run_ranks(["train", str(config), *set_options(set_), *more], ranks))
    from ..launch.local import end_with_torchrun
    from ..training.faults.signals import StopRequest, grace_s
    from ..training.faults.starts import take_back

    end_with_torchrun()
    with StopRequest(grace_s(run.training)) as stop:  # before all that takes time
        counted = _counted_on_slurm(run)
        try:
            check_fits(run)
        except InputError:
            if counted:
                take_back(run.run_dir)
            raise
        from ..training.trainer import train as train_run

        with joined(run.mesh, run.training.timeout_s, run.device) as mesh:
            code = train_run(run, mesh, strict=strict, extend=extend, stop=stop, counted=counted)
    raise typer.Exit(code)


def _counted_on_slurm(run: RunConfig) -> bool:
    """Counts this start on the first rank of a Slurm job, which is requeued even if its ranks never meet."""
    from ..spatial.environment import RankEnvironment
    from ..training.faults.starts import count_start

    if not RankEnvironment.is_first_of_slurm() or run.mesh.ranks != job_ranks():
        return False
    count_start(run)
    return True
