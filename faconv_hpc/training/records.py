"""What a run leaves behind: one JSON line per step (the truth), progress on the terminal, TensorBoard."""

import json
import math
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .._version import __version__
from ..config import RunConfig
from ..errors import InputError, LostRankError
from ..files import write_durably
from ..locks import DirectoryLock
from ..spatial.environment import RankEnvironment

STEPS_FILE = "steps.jsonl"
CONFIG_FILE = "config.yaml"
VERSIONS_FILE = "versions.json"
LOCK_FILE = ".lock"
PACKAGES = ("torch", "deepspeed", "numpy", "h5py", "h5netcdf", "xarray", "mpi4py")
EARLIER_START_S = 60  # for the last start of a job that was requeued to end, and its lock with it
LINES_PER_RUN = 40  # printed where the terminal cannot show a bar, such as a log file


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. Shares are of the step's wall time, averaged over ranks.

    Attributes:
        step: optimizer steps done, from 1.
        loss: of the whole batch: all replicas and micro-batches.
        forecast_loss: its part from the tendency; 1 is what persistence would have on average.
        gradient_norm: of the whole gradient, before clipping.
        learning_rate: of this step.
        samples: true size of the batch, over replicas and micro-batches.
        seconds: wall time of the step.
        samples_per_s: samples / seconds.
        data_share: waiting for data that was not read ahead in time.
        exchange_share: held up by exchanges between tiles.
        reduction_share: held up by DeepSpeed's collectives (on a GPU not measured: 0).
        peak_memory_gib: of the rank that needed most, so far: host memory on a CPU, else device memory.
        update: what became of the step, ``applied``, or ``skipped`` or ``restored`` where loss or gradient was
            no finite number (written as null).
    """

    step: int
    loss: float
    forecast_loss: float
    gradient_norm: float
    learning_rate: float
    samples: int
    seconds: float
    samples_per_s: float
    data_share: float
    exchange_share: float
    reduction_share: float
    peak_memory_gib: float
    update: str = "applied"

    def to_json(self) -> str:
        """One line; numbers that are not finite are null, which every JSON reader takes."""
        values: dict[str, Any] = asdict(self)
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None
        return json.dumps(values)

    @classmethod
    def from_json(cls, line: str) -> "StepRecord":
        """The inverse of `to_json`; null becomes NaN."""
        values: dict[str, Any] = json.loads(line)
        return cls(**(dict.fromkeys(values, math.nan) | {name: one for name, one in values.items() if one is not None}))

    @property
    def communication_share(self) -> float:
        """Share of the step spent communicating, between tiles and inside DeepSpeed."""
        return self.exchange_share + self.reduction_share


class Recorder:
    """Writes step records; only one rank makes one.

    Args:
        config: of the run; its resolved form and the versions in use are written beside the records.
        done: steps that a checkpoint already holds. Records beyond it, of a run that was cut off, are
            dropped: those steps are done again, and no step stands in the file twice.
        machines: on which the ranks run; stands beside the versions.
    """

    def __init__(self, config: RunConfig, done: int, machines: Mapping[str, Any]) -> None:
        _write_config(config, done)
        write_durably(config.run_dir / VERSIONS_FILE, json.dumps({**versions(), **machines}, indent=2) + "\n")
        self._file = _reopened(config.run_dir / STEPS_FILE, done)
        self._board = _board(config, done)
        self._display = _Display(config.training.steps, done)

    def __enter__(self) -> "Recorder":
        self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.stop()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def flush(self) -> None:
        """Makes sure that all records are on disk, so that no checkpoint is ahead of them."""
        os.fsync(self._file.fileno())

    def write(self, record: StepRecord) -> None:
        """One line, at once on disk: a killed run keeps what it did."""
        self._file.write(record.to_json() + "\n")
        self._file.flush()
        self._display.show(record)
        if self._board is not None:
            for name, value in asdict(record).items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, record.step)


class _Display:
    """A progress bar on a terminal; some lines in a log."""

    def __init__(self, steps: int, done: int) -> None:
        self._steps = steps
        self._console = Console(stderr=True)
        self._every = max(1, steps // LINES_PER_RUN)
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=done)

    def start(self) -> None:
        self._bar.start()

    def stop(self) -> None:
        self._bar.stop()

    def show(self, record: StepRecord) -> None:
        text = (
            f"loss {record.loss:.4f}  {record.samples_per_s:.2f} samples/s  data {record.data_share:.0%}  "
            f"communication {record.communication_share:.0%}  peak {record.peak_memory_gib:.2f} GiB"
        )
        self._bar.update(self._task, completed=record.step, description=text)
        shown = record.step % self._every == 0 or record.step in (1, self._steps)
        if shown and not self._console.is_terminal:
            print(f"step {record.step}/{self._steps}  {text}", file=sys.stderr, flush=True)


def read_records(run_dir: Path) -> Iterator[StepRecord]:
    """The records of a run, in order."""
    path = run_dir / STEPS_FILE
    if path.exists():
        for line in _lines(path):
            if math.isfinite(_step_of(line)):  # a kill may have cut the last line short
                yield StepRecord.from_json(line)


def versions() -> dict[str, str]:
    """What was running: this package and its commit, Python, the host of the first rank, the libraries."""
    found = {"faconv_hpc": __version__, "commit": _commit(), "python": platform.python_version()}
    found |= {"machine": platform.machine(), "host": socket.gethostname()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _commit() -> str:
    """Of the checkout this package is run from, ``-dirty`` with changes that are not committed."""
    package = Path(__file__).parent
    answers = []
    for question in ("ls-files --error-unmatch records.py", "describe --always --dirty --abbrev=40 --exclude=*"):
        try:
            asked = subprocess.run(
                ["git", "-C", package, *question.split()], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):  # no git, or installed from a wheel
            return "not in a checkout"
        answers.append(asked.stdout.strip())
    return answers[-1]


def _write_config(config: RunConfig, done: int) -> None:
    """The resolved config; the one that led to step ``done``, if it was another, is kept beside it."""
    path = config.run_dir / CONFIG_FILE
    until = path.with_name(f"config-until-step-{done}.yaml")
    if done and path.exists() and path.read_text(errors="replace") != config.to_yaml() and not until.exists():
        path.rename(until)
    write_durably(path, config.to_yaml())


@contextmanager
def claimed(run_dir: Path, here: bool) -> Iterator[None]:
    """The run directory for this job alone, as long as the block lasts; the kernel frees it if the rank is killed.

    Raises:
        InputError: another job trains there, or the directory cannot be made.
        LostRankError: an earlier start of this very job does, and goes on.
    """
    if not here:
        yield
        return
    try:
        lock = DirectoryLock(run_dir / LOCK_FILE)
        (run_dir / "checkpoints").mkdir(exist_ok=True)  # now, and not when the first one is due
        (run_dir / STEPS_FILE).open("a").close()
    except OSError as error:
        raise InputError(
            f"run_dir {run_dir} cannot be written: {error.strerror}. Give a directory where you may write."
        ) from None
    with lock:
        _lock(lock, run_dir)
        lock.sign(_slurm_job())
        yield


def _slurm_job() -> str:
    start = RankEnvironment.slurm_start()
    return f", Slurm job {start[0]}, start {start[1]}" if start else ""


def _is_earlier_start(holder: str) -> bool:
    """Whether a lock is held by an earlier start of this very job; NFS may keep that of a lost node."""
    start = RankEnvironment.slurm_start()
    found = re.search(r", Slurm job (\S+), start (\d+)$", holder)
    return start is not None and found is not None and found[1] == start[0] and int(found[2]) < start[1]


def _lock(lock: DirectoryLock, run_dir: Path) -> None:
    began, at_first = time.monotonic(), None
    while not _taken(lock):
        if not _is_earlier_start(holder := lock.holder):
            raise InputError(
                f"run_dir {run_dir} is in use by {holder or 'another job'}: two jobs would mix "
                f"their records. Wait for it to end, or give another run_dir."
            )
        step, seconds = _last_step(run_dir)
        at_first = step if at_first is None else at_first
        if time.monotonic() - began >= max(EARLIER_START_S, 3 * seconds):  # one that trains does a step meanwhile
            if step != at_first:
                raise LostRankError(
                    f"{holder}, which is an earlier start of this job, still trains in {run_dir}: a node that "
                    f"Slurm has given up is alive. End its processes; the job is requeued meanwhile."
                )
            print(f"{lock.path} is still held by an earlier start of this job ({holder}): going on", file=sys.stderr)
            return
        time.sleep(1.0)


def _taken(lock: DirectoryLock) -> bool:
    try:
        return lock.attempt()
    except OSError as error:  # some parallel file systems are mounted without locks
        print(
            f"{lock.path} cannot be locked ({error.strerror}): see to it that no other job trains there",
            file=sys.stderr,
        )
        return True


def _last_step(run_dir: Path) -> tuple[int, float]:
    """Number and seconds of the last step on record; 0 where there is none."""
    step, seconds = 0, 0.0
    for record in read_records(run_dir):
        step, seconds = record.step, record.seconds
    return step, seconds


def _reopened(path: Path, done: int) -> TextIO:
    """The file without the records beyond ``done``; replaced by one rename, so that a kill loses nothing.

    Where a run begins anew, the records of what was there before are kept aside.
    """
    lines = _lines(path) if path.exists() else []
    steps = [_step_of(line) for line in lines]
    kept = [line for line, step in zip(lines, steps, strict=True) if step <= done]
    unreadable = sum(not math.isfinite(step) for step in steps)
    if len(kept) < len(lines):
        again = len(lines) - len(kept) - unreadable
        damage = f", {unreadable} lines that cannot be read are left out" if unreadable else ""
        print(f"{path}: {again} steps beyond step {done} are done again{damage}", file=sys.stderr)
        if done == 0:
            number = sum(1 for _ in path.parent.glob("steps-before-*.jsonl"))
            path.rename(path.with_name(f"steps-before-{number}.jsonl"))
        write_durably(path, "".join(f"{line}\n" for line in kept))
    return path.open("a")


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()


def _step_of(line: str) -> float:
    """The step of a record; a line that a kill cut short is no record and counts as beyond the end."""
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


def _board(config: RunConfig, done: int) -> Any:
    if not config.training.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(config.run_dir / "tensorboard", purge_step=done + 1)


@contextmanager
def recording(config: RunConfig, done: int, *, here: bool, machines: Mapping[str, Any]) -> Iterator[Recorder | None]:
    """A recorder on the one rank that is ``here``; None on the others."""
    if not here:
        yield None
        return
    with Recorder(config, done, machines) as recorder:
        yield recorder
