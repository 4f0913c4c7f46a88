"""Counts the starts of a run that led nowhere, so that a job that is always requeued does not fail for ever."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...errors import InputError, NoProgressError
from ...files import cannot_write, write_durably

STARTS_FILE = "starts.json"


@contextmanager
def counted_start(run_dir: Path, give_up_after: int, here: bool, *, counted: bool = False) -> Iterator[None]:
    """Counts this start of a run, until it saves a checkpoint (`made_progress`).

    One that ends by what the user did, Ctrl-C or input to be mended, is not counted. A process that is killed is.

    Args:
        give_up_after: starts in a row that save no checkpoint; 0: never give up.
        here: whether this rank keeps the count.
        counted: whether `count_start` was called for this start.

    Raises:
        NoProgressError: there have been as many as that.
        InputError: the count cannot be written.
    """
    if not here:
        yield
        return
    if not counted:
        count_start(run_dir, give_up_after)
    try:
        yield
    except (InputError, KeyboardInterrupt):
        take_back(run_dir)
        raise


def count_start(run_dir: Path, give_up_after: int) -> None:
    """Counts one start; raises as `counted_start` does. Before the ranks meet, so that a start without them counts."""
    path = run_dir / STARTS_FILE
    before = _count(path)
    if give_up_after and before >= give_up_after:
        raise NoProgressError(
            f"{before} starts in a row of the run in {run_dir} have saved no checkpoint, so it is not tried again "
            f"(training.give_up_after={give_up_after}). Mend what the log of the last one says, remove {path}, and "
            f"start the same command again."
        )
    try:
        _write(path, before + 1)
    except OSError as error:
        raise cannot_write("run_dir", run_dir, error) from None


def take_back(run_dir: Path) -> None:
    """One start less, unless there was progress since: another job may train there."""
    path = run_dir / STARTS_FILE
    with suppress(OSError):
        if (count := _count(path)) > 1:
            _write(path, count - 1)
        else:
            path.unlink(missing_ok=True)


def made_progress(run_dir: Path) -> None:
    """Wipes the slate: a checkpoint is saved, or there was nothing left to do."""
    (run_dir / STARTS_FILE).unlink(missing_ok=True)


def _write(path: Path, count: int) -> None:
    write_durably(path, json.dumps({"starts": count}) + "\n")


def _count(path: Path) -> int:
    """Starts on record; a record that cannot be read counts none."""
    try:
        return int(json.loads(path.read_text())["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
