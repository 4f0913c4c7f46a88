"""What a run leaves behind: one JSON line per step (the truth), progress on the terminal, TensorBoard."""

import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..config import RunConfig
from ..data.samples import Windows
from ..files import json_ready, read_json_lines, write_durably, write_json_lines
from ..versions import versions
from .contract import Contract
from .embeddings import EmbeddingSkill
from .looks import Looks, score
from .skill import Skill

STEPS_FILE = "steps.jsonl"
VALIDATION_FILE = "validation.jsonl"
CONFIG_FILE = "config.yaml"
CONTRACT_FILE = "contract.json"
VERSIONS_FILE = "versions.json"
LINES_PER_RUN = 40  # printed where the terminal cannot show a bar, such as a log file


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, a line of steps.jsonl; `Trainer` fills it. A new field needs a default: older lines lack it.

    Shares are of the step's wall time, averaged over ranks.

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
        embedding_loss: error of the coarse fields that the embedding maps to, which has its weight in the loss; not
            known (null) of runs of before it was told.
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
    embedding_loss: float = math.nan

    def to_json(self) -> str:
        """One line; numbers that are not finite are null, which every JSON reader takes."""
        return json.dumps(json_ready(asdict(self)))

    @classmethod
    def from_row(cls, values: Mapping[str, Any]) -> "StepRecord":
        """From the values of a line of `to_json`; null becomes NaN."""
        known: dict[str, Any] = {name: math.nan if one is None else one for name, one in values.items()}
        return cls(**known)

    @property
    def communication_share(self) -> float:
        """Share of the step spent communicating, between tiles and inside DeepSpeed."""
        return self.exchange_share + self.reduction_share


class Recorder:
    """Writes step records; only one rank makes one.

    Args:
        config, contract: of the run; they and the versions in use are written beside the records.
        done: steps that a checkpoint already holds. Records beyond it, of a run that was cut off, are
            dropped: those steps are done again, and no step stands in the file twice.
        machines: on which the ranks run; stands beside the versions.

    Attributes:
        last: what was written last; None if nothing was.
        looks: those at the validation period, up to now.
    """

    def __init__(self, config: RunConfig, contract: Contract, done: int, machines: Mapping[str, Any]) -> None:
        self.last: StepRecord | None = None
        _write_config(config, done)
        write_durably(config.run_dir / CONTRACT_FILE, contract.model_dump_json(indent=2) + "\n")
        write_durably(config.run_dir / VERSIONS_FILE, json.dumps({**versions(), **machines}, indent=2) + "\n")
        self._file = _reopened(config.run_dir / STEPS_FILE, done)
        looks = config.run_dir / VALIDATION_FILE
        self._validations = _reopened(looks, done) if config.training.validate_every or looks.exists() else None
        self.looks = Looks.of(_looked_at(config.run_dir))
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
        if self._validations is not None:
            self._validations.close()
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
        self.last = record
        if self._board is not None:
            for name, value in asdict(record).items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, record.step)

    def write_look(self, step: int, skills: Sequence[Skill], embedding: EmbeddingSkill) -> None:
        """A line for each variable and lead, after a step, and one of the embedding; they appear together."""
        assert self._validations is not None, "a run that looks has a file for it"
        new = [{"step": step} | said for said in (*(one.as_json() for one in skills), embedding.as_json())]
        self._validations.write("".join(json.dumps(row) + "\n" for row in new))
        self._validations.flush()
        os.fsync(self._validations.fileno())
        self.looks.scores[step] = score(new)
        leads = sorted({one.lead for one in skills})
        means = {lead: _mean([one.ratio for one in skills if one.lead == lead]) for lead in leads}
        told = ", ".join(f"{ratio:.3f} at lead {lead}" for lead, ratio in means.items())
        told += "; the best so far" if self.looks.verdict(step, 0).best else ""
        self._display.say(f"step {step}: validation, error over persistence's, mean of the variables: {told}")
        self._display.say(f"step {step}: embedding, {embedding.told}")
        if self._board is not None:
            for name, value in asdict(embedding).items():
                self._board.add_scalar(f"validation/embedding/{name}", value, step)
            for skill in skills:
                self._board.add_scalar(f"validation/{skill.variable}/lead {skill.lead}", skill.ratio, step)


def _mean(values: Sequence[float]) -> float:
    known = [one for one in values if one == one]
    return sum(known) / len(known) if known else math.nan


class _Display:
    """A progress bar on a terminal; some lines in a log."""

    def __init__(self, steps: int, done: int) -> None:
        self._steps = steps
        self._console = Console(stderr=True)
        self._every = max(1, steps // LINES_PER_RUN)
        self._bar = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=10),
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

    def say(self, text: str) -> None:
        if self._console.is_terminal:
            self._console.print(text, highlight=False, soft_wrap=True)  # above the bar
        else:
            print(text, file=sys.stderr, flush=True)

    def show(self, record: StepRecord) -> None:
        text = (
            f"loss {record.loss:.4f}  {record.samples_per_s:.2f} samples/s  data {record.data_share:.0%}  "
            f"communication {record.communication_share:.0%}  peak {record.peak_memory_gib:.2f} GiB"
        )
        short = f"loss {record.loss:.4f} {record.samples_per_s:.3g}/s {record.peak_memory_gib:.1f} GiB"  # 80 columns
        self._bar.update(self._task, completed=record.step, description=short)
        shown = record.step % self._every == 0 or record.step in (1, self._steps)
        if shown and not self._console.is_terminal:
            print(f"step {record.step}/{self._steps}  {text}", file=sys.stderr, flush=True)


def read_records(run_dir: Path) -> list[StepRecord]:
    """The records of a run, in order; none where there is no run."""
    return [StepRecord.from_row(row) for row in _rows(run_dir / STEPS_FILE)]


def beginning(
    config: RunConfig, contract: Contract, windows: Windows, left_out: int, parameters: int, rank_gib: float, done: int
) -> str:
    """What a start is going to do, for people.

    Args:
        contract, windows: what it is trained on, and samples are drawn from.
        left_out: windows that would lead over a gap, or from a sequence into the next.
        parameters: how many the network has.
        rank_gib: memory that a rank needs at least.
        done: steps that are done already.
    """
    mesh, channels = config.mesh, contract.channels
    gaps = f" ({left_out} more would lead over a gap in time or into the next sequence)" if left_out else ""
    shortest, longest = contract.step_hours
    steps = f"steps of time take {shortest:g} to {longest:g} h, " if longest > shortest else ""
    chain = config.training.stateful_windows
    steps += f"states go through up to {chain} windows in a row, " if chain else ""
    return (
        f"{config.run_dir}: steps {done + 1} to {config.training.steps} on a mesh of {mesh.replicas} x {mesh.lat} x "
        f"{mesh.lon} (replicas x lat x lon), {config.global_batch} of {len(windows)} windows in each{gaps}\n"
        f"  {len(channels.inputs)} channels in, {len(channels.targets)} forecast, {parameters:,} parameters, {steps}at "
        f"least {rank_gib:.2g} GiB a rank; records go to {config.run_dir / STEPS_FILE}"
    )


def ending(config: RunConfig, step: int, last: StepRecord | None) -> str:
    """What it has done, and what comes next."""
    diagnostic = "diagnostic" in config.data.roles.values()
    reference = "persistence has, and of a diagnostic its mean" if diagnostic else "persistence has"
    loss = f", forecast loss {last.forecast_loss:.4f} (1 is what {reference})" if last else ""
    steps = config.training.steps
    early = f" of {steps}, as it gets no better (training.stop_after)" if step < steps else ""
    return f"{config.run_dir}: at step {step}{early}{loss}. Next: faconv evaluate {config.run_dir}"


def _write_config(config: RunConfig, done: int) -> None:
    """The resolved config; the one that led to step ``done``, if it was another, is kept beside it."""
    store = config.data.store.absolute()  # so that what comes later may be called from another directory
    config = config.model_copy(update={"data": config.data.model_copy(update={"store": store})})
    path = config.run_dir / CONFIG_FILE
    until = path.with_name(f"config-until-step-{done}.yaml")
    if done and path.exists() and path.read_text(errors="replace") != config.to_yaml() and not until.exists():
        path.rename(until)
    write_durably(path, config.to_yaml())


def _reopened(path: Path, done: int) -> TextIO:
    """The file without the records beyond ``done``; replaced by one rename, so that a kill loses nothing.

    Where a run begins anew, the records of what was there before are kept aside.
    """
    text = path.read_text(errors="replace") if path.exists() else ""
    lines, rows = len(text.splitlines()), _rows(path)
    kept = [row for row in rows if row["step"] <= done]
    if len(kept) < lines:
        unreadable = lines - len(rows)
        damage = f", {unreadable} lines that cannot be read are left out" if unreadable else ""
        again = len({row["step"] for row in rows} - {row["step"] for row in kept})
        print(f"{path}: {again} steps beyond step {done} are done again{damage}", file=sys.stderr)
        if done == 0:
            number = sum(1 for _ in path.parent.glob(f"{path.stem}-before-*.jsonl"))
            path.rename(path.with_name(f"{path.stem}-before-{number}.jsonl"))
        write_json_lines(path, kept)
    return path.open("a")


def _looked_at(run_dir: Path) -> list[dict[str, Any]]:
    return _rows(run_dir / VALIDATION_FILE)


def look_is_missing(config: RunConfig, done: int) -> bool:
    """Whether a run that has done all its steps has not looked at its validation period after the last."""
    return config.training.looks_after(done) and all(row["step"] != done for row in _looked_at(config.run_dir))


def _rows(path: Path) -> list[dict[str, Any]]:
    """The lines that are records; of a look at the validation period all or none, where a machine failed in writing."""
    rows = [row for row in read_json_lines(path) if isinstance(row.get("step"), int)]
    last = (
        path.read_text(errors="replace").rpartition("\n")[2] if path.name == VALIDATION_FILE and path.exists() else ""
    )
    begun = re.match(r'\{"step": (\d+),', last)  # a whole line ends
    return [row for row in rows if row["step"] != int(begun.group(1))] if begun else rows


def _board(config: RunConfig, done: int) -> Any:
    if not config.training.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(config.run_dir / "tensorboard", purge_step=done + 1)


@contextmanager
def recording(
    config: RunConfig, contract: Contract, done: int, *, here: bool, machines: Mapping[str, Any]
) -> Iterator[Recorder | None]:
    """A recorder on the one rank that is ``here``; None on the others."""
    if not here:
        yield None
        return
    with Recorder(config, contract, done, machines) as recorder:
        yield recorder
