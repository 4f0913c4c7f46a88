"""The command line: each verb parses, loads the config, and makes one call. One file per verb."""

import os
import signal
import sys
import time

import typer

from ..errors import InputError, LostRankError, RunError, describe, exit_code_of
from ..spatial.environment import PARTED, RankEnvironment
from .bench import bench_command
from .checkpoint import checkpoint_app
from .compare import compare_command
from .data import data_app
from .doctor import doctor_command
from .embed import embed_command
from .evaluate import evaluate_command
from .explain import explain_command
from .forecast import forecast_command
from .made import sample_command, synth_command
from .options import Verb, Verbs
from .ranks import say_before_joining
from .regimes import regimes_command
from .study import study_command
from .submit import submit_command
from .train import train_command
from .verify import verify_command

FIRST_S = 20.0  # for a launcher to end those that would say it again: the first may learn it some seconds later

app = typer.Typer(
    cls=Verbs,
    help="Train FAConvLSTM on large lat/lon grids, cut into tiles over ranks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)
app.command("train", cls=Verb)(train_command)
app.command("verify", cls=Verb)(verify_command)
app.command("evaluate", cls=Verb)(evaluate_command)
app.command("forecast", cls=Verb)(forecast_command)
app.command("embed", cls=Verb)(embed_command)
app.command("regimes", cls=Verb)(regimes_command)
app.command("explain", cls=Verb)(explain_command)
app.add_typer(checkpoint_app, name="checkpoint", help="List, verify and export the checkpoints of a run.")
data_app.command("synth", cls=Verb)(synth_command)
data_app.command("sample", cls=Verb)(sample_command)
app.add_typer(data_app, name="data", help="Make, inspect and fetch stores of fields.")
app.command("doctor", cls=Verb)(doctor_command)
app.command("bench", cls=Verb)(bench_command)
app.command("study", cls=Verb)(study_command)
app.command("compare", cls=Verb)(compare_command)
app.command("submit", cls=Verb)(submit_command)


def main() -> None:
    """Entry point: a mistake of the user's ends with one message and exit code 2."""
    from ..training.faults.signals import hold_signals

    hold_signals()
    try:
        app()
    except (InputError, RunError) as error:
        if not isinstance(error, LostRankError):
            say_before_joining(error)
        elif not RankEnvironment.is_first_of_node():  # the ranks cannot agree on who speaks: one of every node is first
            code = exit_code_of(error)
            if error.told_to_leave:
                sys.exit(code)
            signal.signal(signal.SIGTERM, lambda number, frame: os._exit(code))
            time.sleep(FIRST_S)
        print(describe(error), file=sys.stderr)
        sys.exit(exit_code_of(error))
    except SystemExit as end:
        if PARTED.is_set() and isinstance(end.code, int | None):
            from ..spatial.failure import leave

            leave(end.code or 0)
        raise
