"""Counts the starts of a run that led nowhere, so that a job that is always requeued does not fail for ever."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, NoProgressError
from .shards import write_durably

STARTS_FILE = "starts.json"


@dataclass
class Start:
    """One start of a run; ``led_nowhere`` says, at its orderly end, that it counts all the same."""

    led_nowhere: bool = False


@contextmanager
def counted_start(run_dir: Path, step: int, give_up_after: int, here: bool) -> Iterator[Start]:
    """Counts this start of a run, whose newest checkpoint is of ``step``, unless it ends in an orderly way.

    Orderly ends are the last step, a signal that was followed with a checkpoint, and the user's own: Ctrl-C, input to
    be mended. A process that is killed leaves the count.

    Args:
        give_up_after: starts in a row from the same step; 0: never give up.
        here: whether this rank keeps the count.

    Raises:
        NoProgressError: as many starts as that have led to no newer checkpoint.
    """
    start = Start()
    if not here:
        yield start
        return
    path = run_dir / STARTS_FILE
    before = _count(path, step)
    if give_up_after and before >= give_up_after:
        raise NoProgressError(
            f"{before} starts in a row have brought {run_dir} no further than step {step}, so it is not tried again "
            f"(training.give_up_after={give_up_after}). Mend what the log of the last one says, remove {path}, and "
            f"start the same command again."
        )
    write_durably(path, json.dumps({"step": step, "starts": before + 1}) + "\n")
    try:
        yield start
    except (InputError, KeyboardInterrupt):
        path.unlink(missing_ok=True)
        raise
    if not start.led_nowhere:
        path.unlink(missing_ok=True)


def _count(path: Path, step: int) -> int:
    """Starts from this step that are on record; a record that cannot be read counts none."""
    try:
        record = json.loads(path.read_text())
        return int(record["starts"]) if record["step"] == step else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0
