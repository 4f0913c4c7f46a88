"""Counts the starts of a run that led nowhere, so that a job that is always requeued does not fail for ever."""

import hashlib
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ...config import RunConfig
from ...errors import InputError, NoProgressError
from ...files import cannot_write, write_durably
from .signals import StopRequest

STARTS_FILE = "starts.json"


@contextmanager
def counted_start(config: RunConfig, stop: StopRequest, *, here: bool, counted: bool = False) -> Iterator[None]:
    """Counts this start of a run, until it saves a checkpoint (`made_progress`).

    One that ends by what the user did, Ctrl-C or input to be mended, is not counted, nor one that ends in order because
    SIGTERM told it to: that says nothing about the run. One that is killed is, also where srun ends its other ranks by
    SIGTERM, and one that SIGUSR1 ends at its time limit.

    Args:
        here: whether this rank keeps the count.
        counted: whether `count_start` was called for this start.

    Raises:
        NoProgressError: there have been ``training.give_up_after``.
        InputError: the count cannot be written.
    """
    if not here:
        yield
        return
    if not counted:
        count_start(config)
    try:
        yield
    except (InputError, KeyboardInterrupt):
        take_back(config.run_dir)
        raise
    if stop.came == {signal.SIGTERM}:
        take_back(config.run_dir)


def count_start(config: RunConfig) -> None:
    """Counts one start; raises as `counted_start` does. Before the ranks meet, so that a start without them counts."""
    run_dir, give_up_after = config.run_dir, config.training.give_up_after
    path = run_dir / STARTS_FILE
    mark = hashlib.sha256(config.to_yaml().encode()).hexdigest()
    before = _count(path, mark)
    if give_up_after and before >= give_up_after:
        raise NoProgressError(
            f"{before} starts in a row of the run in {run_dir} have saved no checkpoint, so it is not tried again "
            f"(training.give_up_after={give_up_after}). Mend what the log of the last one says; if it is not in the "
            f"config, remove {path}. Then start the same command again."
        )
    try:
        _write(path, before + 1, mark)
    except OSError as error:
        raise cannot_write("run_dir", run_dir, error) from None


def take_back(run_dir: Path) -> None:
    """One start less, unless there was progress since: another job may train there."""
    path = run_dir / STARTS_FILE
    with suppress(OSError):
        if (count := _count(path)) > 1:
            _write(path, count - 1, _record(path).get("config", ""))
        else:
            path.unlink(missing_ok=True)


def made_progress(run_dir: Path) -> None:
    """Wipes the slate: a checkpoint is saved, or there was nothing left to do."""
    (run_dir / STARTS_FILE).unlink(missing_ok=True)


def _write(path: Path, count: int, mark: str) -> None:
    write_durably(path, json.dumps({"starts": count, "config": mark}) + "\n")


def _count(path: Path, mark: str | None = None) -> int:
    """Starts on record, none if they were of another config than ``mark``; a record that cannot be read counts none."""
    record = _record(path)
    other = mark is not None and record.get("config", mark) != mark
    count = record.get("starts")
    return 0 if other or not isinstance(count, int) else count


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
