"""Saving the whole state of a run, by all ranks together; see shards.py for what is on disk, resume.py for loading."""

import heapq
import secrets
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..data.annual_cycle import CYCLE_FILE
from ..errors import RunError, TryAgainError, is_out_of_reach
from ..files import link_or_copy, make_durably, write_durably, write_flushed
from ..observe import SAVING
from ..versions import versions
from .carried import CarriedStates
from .engine import Engine
from .fit import FLOAT_BYTES
from .identity import identity
from .manifest import FORMAT, Manifest, ShardFile, StatePiece, StoredTensor
from .resume import Resumed
from .schedule import Leg
from .setup import Workspace
from .shards import (
    BEST,
    FOLDER,
    PARAMETER,
    Checkpoint,
    DamagedCheckpointError,
    OtherVersionError,
    UnreadableCheckpointError,
    checkpoints_in,
    commit,
    directory_name,
    keep_as_best,
    partial_directory,
    remove,
    sweep,
    write_shard,
)

RUN_ID_FILE = "run-id"
MIB = 2**20


class SaveFailedError(RunError):
    """A checkpoint could not be written; those before it stay."""


class SaveOutOfReachError(SaveFailedError, TryAgainError):
    """Because its file system is away, or fails; from other nodes it may not."""


@dataclass(frozen=True)
class _Report:
    """What one rank has written, or why it could not."""

    files: dict[str, ShardFile] = field(default_factory=dict)
    parameters: dict[str, StoredTensor] = field(default_factory=dict)
    states: dict[str, StatePiece] = field(default_factory=dict)
    seconds: float = 0.0
    problem: "_Problem | None" = None


@dataclass(frozen=True)
class _Problem:
    """What went wrong with a disk."""

    told: str
    out_of_reach: bool
    rank: int | None = None

    @classmethod
    def of(cls, error: OSError) -> "_Problem":
        return cls(error.strerror or str(error), is_out_of_reach(error))

    def __str__(self) -> str:
        return self.told if self.rank is None else f"rank {self.rank}: {self.told}"


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written; the engine may have gone on."""

    step: int
    updates: int
    directory: Path
    copying_s: float
    report: "Future[_Report]"


class CheckpointWriter:
    """Saves checkpoints of a run, written by all ranks, and removes old ones.

    Every parameter is written once, with its moments, by one rank. As many ranks write as the bytes need
    (``training.shard_mib``), about the same number each: thousands of small files would burden a shared disk.
    Training waits for the copy to host memory, and with ``training.save_in_background`` for nothing else: the
    checkpoint is committed at the first step boundary at which all ranks have written (`written`, `finish`).

    Args:
        workspace: of the run.
        engine: whose state is saved.
        resumed: what the run goes on from.
        legs: of the learning rate; they stand in every checkpoint.
        carried: states that go from one step to the next.
        before_commit: called by rank 0 before a checkpoint gets its name; what it raises ends the run.
        on_commit: called by rank 0 whenever a checkpoint is in place; an OSError is told.

    Attributes:
        saved_step: of the newest checkpoint that is in place; 0: none.
        last_save_s: what the last one took the slowest rank: copying, writing, committing.
        passed_over: names of checkpoints that are known to be damaged; they are not counted among those to keep.
    """

    def __init__(
        self,
        workspace: Workspace,
        engine: Engine,
        resumed: Resumed,
        legs: tuple[Leg, ...],
        carried: CarriedStates,
        *,
        before_commit: Callable[[], None] = lambda: None,
        on_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self._workspace, self._engine, self._legs, self._carried = workspace, engine, legs, carried
        self._before_commit, self._on_commit = before_commit, on_commit
        self._mesh, self._config = workspace.domain.mesh, workspace.config
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._run = self._mesh.from_first(run_id(self._config.run_dir) if self._mesh.rank == 0 else "")
        self._versions = versions() if self._mesh.rank == 0 else {}  # now: a checkout may change under a run
        self.saved_step, self.last_save_s = resumed.step, resumed.save_s
        self.passed_over = set(resumed.passed_over)

    def save(self, step: int) -> None:
        """Saves the state after ``step`` optimizer steps. Collective.

        Raises:
            FloatingPointError: a parameter is not finite; nothing is written then.
            SaveFailedError: it, or the one before, could not be written; the checkpoints that are there stay.
        """
        self.finish()
        began = time.perf_counter()
        share, states = self._share(step), self._carried.saved(step)
        copying_s = time.perf_counter() - began
        directory = self._new_directory(step)
        writing = self._thread.submit(self._write, directory, share, states)
        self._pending = _Pending(step, self._engine.updates, directory, copying_s, writing)
        self._engine.take_communication_s()  # a save's collectives are no step's
        if not self._config.training.save_in_background:
            self.finish()

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._pending is None or self._pending.report.done()

    @property
    def pending(self) -> bool:
        """Whether a checkpoint waits to be committed; the same on all ranks."""
        return self._pending is not None

    @property
    def newest_step(self) -> int:
        """Step of the newest checkpoint that is in place or being written; 0: none."""
        return self.saved_step if self._pending is None else self._pending.step

    def finish(self) -> None:
        """Waits for what is being written and commits it. Collective. Raises SaveFailedError, see `save`."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        own = pending.report.result()
        first = self._mesh.rank == 0
        with self._mesh.activity.during(SAVING if first else "waiting for the others to save", waits=not first):
            self._commit(pending, self._mesh.gathered_objects(own))

    def _commit(self, pending: _Pending, reports: list[_Report]) -> None:
        began = time.perf_counter()
        problems = [replace(one.problem, rank=rank) for rank, one in enumerate(reports) if one.problem]
        problem = problems[0] if problems else None
        if self._mesh.rank == 0 and problem is None:
            self._before_commit()
            problem = _problem_of(lambda: commit(pending.directory, self._manifest(pending, reports)))
        problem = self._mesh.from_first(problem)
        if problem is not None:
            if self._mesh.rank == 0:
                _problem_of(partial(remove, pending.directory, secrets.token_hex(4)))
            self._raise(pending.step, problem)
        writing_s = max(report.seconds for report in reports)
        self.last_save_s = pending.copying_s + writing_s + time.perf_counter() - began
        self.saved_step = pending.step
        self.passed_over.discard(directory_name(pending.step))
        if self._mesh.rank == 0:
            self._clean_up()

    def keep_best(self, step: int) -> None:
        """Keeps the state after a step, which is saved if it is not, as ``checkpoints/best``. Collective.

        If that cannot be done it is told, and what was the best before stays.

        Raises:
            SaveFailedError: see `save`.
        """
        if self.newest_step != step:
            self.save(step)
        self.finish()
        if self._mesh.rank == 0:
            self._before_commit()
            problem = _problem_of(lambda: keep_as_best(self._config.run_dir, step, secrets.token_hex(4)))
            if problem is not None:
                best = self._config.run_dir / FOLDER / BEST
                print(f"faconv: step {step} is the best, but {best} stays what it was ({problem})", file=sys.stderr)

    def close(self) -> None:
        """Ends the thread that writes. Not collective."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _share(self, step: int) -> dict[str, Tensor]:
        """What this rank writes, in host memory."""
        least = self._config.training.shard_mib * MIB / FLOAT_BYTES
        mine = shares_of(self._engine.stored_sizes, self._mesh.ranks, least)[self._mesh.rank]
        share = {f"{PARAMETER}/{name}": value for name, value in self._engine.full_parameters(mine)}
        unsound = [name.partition("/")[2] for name, value in share.items() if not torch.isfinite(value).all()]
        everywhere = sorted(name for names in self._mesh.gathered_objects(unsound) for name in names)
        if everywhere:
            raise FloatingPointError(
                f"the parameter {everywhere[0]} ({len(everywhere)} in all) is not finite after step {step}, so it is "
                f"not saved. Lower training.learning_rate and go on from the checkpoint before."
            )
        return share | dict(self._engine.full_moments(mine))

    def _new_directory(self, step: int) -> Path:
        directory = partial_directory(self._config.run_dir, step, self._mesh.from_first(secrets.token_hex(4)))
        problem = _problem_of(lambda: make_durably(directory)) if self._mesh.rank == 0 else None
        problem = self._mesh.from_first(problem)
        if problem is not None:
            self._raise(step, problem)
        return directory

    def _write(
        self, directory: Path, share: Mapping[str, Tensor], states: tuple[StatePiece, dict[str, Tensor]] | None
    ) -> _Report:
        """In the thread: this rank's shard, and its file of states."""
        began, pieces = time.perf_counter(), {}
        digest = self._workspace.contract.annual_cycle
        try:
            files = shard = write_shard(directory, "shard", self._mesh.rank, share)
            if digest and self._mesh.rank == 0:
                files = shard | {CYCLE_FILE: ShardFile(bytes=self._keep_cycle(directory), sha256=digest)}
            if states is not None:
                piece, tensors = states
                of_states = write_shard(directory, "state", self._mesh.rank, tensors)
                files, pieces = files | of_states, dict.fromkeys(of_states, piece)
        except OSError as error:
            return _Report(problem=_Problem.of(error))
        parameters = {
            name.partition("/")[2]: StoredTensor(file=file, shape=tuple(value.shape))
            for file in shard
            for name, value in share.items()
            if name.startswith(f"{PARAMETER}/")
        }
        return _Report(files, parameters, pieces, time.perf_counter() - began)

    def _keep_cycle(self, directory: Path) -> int:
        """Its bytes; the file of all checkpoints, and another than the run's own: what damages one leaves the other."""
        before = self._config.run_dir / FOLDER / directory_name(self.saved_step) / CYCLE_FILE
        if before.is_file():
            link_or_copy(before, directory / CYCLE_FILE)
        else:
            write_flushed(directory / CYCLE_FILE, (self._config.run_dir / CYCLE_FILE).read_bytes())
        return (directory / CYCLE_FILE).stat().st_size

    def _manifest(self, pending: _Pending, reports: list[_Report]) -> Manifest:
        config, mesh = self._config, self._mesh
        return Manifest(
            format=FORMAT,
            run=self._run,
            step=pending.step,
            updates=pending.updates,
            seed=config.training.seed,
            mesh=f"{mesh.replicas}x{mesh.lat}x{mesh.lon}",
            zero_stage=config.training.zero_stage,
            versions=self._versions,
            save_s=pending.copying_s + max(report.seconds for report in reports),
            config=config.model_dump(mode="json"),
            identity=identity(self._workspace),
            contract=self._workspace.contract,
            moments=self._engine.moment_names,
            legs=self._legs,
            parameters={name: stored for report in reports for name, stored in report.parameters.items()},
            states={file: piece for report in reports for file, piece in report.states.items()},
            files={file: stored for report in reports for file, stored in report.files.items()},
        )

    def _raise(self, step: int, problem: _Problem) -> None:
        kept = self._config.run_dir / FOLDER / directory_name(self.saved_step)
        newest = f"the newest checkpoint is still {kept}" if self.saved_step else "there is no checkpoint before it"
        kind = SaveOutOfReachError if problem.out_of_reach else SaveFailedError
        raise kind(
            f"the checkpoint of step {step} could not be written to {self._config.run_dir} ({problem}); {newest}. "
            f"Make room or mend the file system, and start the same command again."
        )

    def _clean_up(self) -> None:
        """Removes this run's own checkpoints before the last ones and the one just saved, but for every n-th.

        What cannot be read or removed is no reason to end a run: it is told, and tried again next time.
        """
        run_dir, training = self._config.run_dir, self._config.training
        try:
            self._on_commit()
            sweep(run_dir)
            older = [one for one in checkpoints_in(run_dir) if one.step < self.saved_step]
        except (OSError, UnreadableCheckpointError) as error:
            print(f"faconv: old checkpoints in {run_dir} stay for now ({error})", file=sys.stderr)
            return
        mine = [one for one in older if _run_of(one) == self._run and one.path.name not in self.passed_over]
        for one in mine[: max(len(mine) - (training.keep_last - 1), 0)]:
            if not training.keep_every or one.step % training.keep_every:
                problem = _problem_of(partial(remove, one.path, secrets.token_hex(4)))
                if problem is not None:
                    print(f"faconv: {one.path} could not be removed ({problem})", file=sys.stderr)


def run_id(run_dir: Path) -> str:
    """The name that this run gave itself when it began."""
    path = run_dir / RUN_ID_FILE
    if not path.exists():
        write_durably(path, uuid.uuid4().hex + "\n")
    return path.read_text().strip()


def shares_of(sizes: Mapping[str, int], ranks: int, least: float) -> list[set[str]]:
    """Names that each rank writes: of about the same total size, ``least`` or more, or nothing; writers lie apart."""
    writers = min(ranks, int(sum(sizes.values()) / least)) if least else ranks
    shares: list[set[str]] = [set() for _ in range(ranks)]
    for number, share in enumerate(balanced(sizes, max(writers, 1))):
        shares[number * ranks // max(writers, 1)] = share
    return shares


def balanced(sizes: Mapping[str, int], shares: int) -> list[set[str]]:
    """Names dealt to so many shares of about the same total size: the largest first, each to the least full."""
    filled = [(0, share) for share in range(shares)]
    dealt: list[set[str]] = [set() for _ in range(shares)]
    for name in sorted(sizes, key=lambda one: (-sizes[one], one)):
        total, share = heapq.heappop(filled)
        dealt[share].add(name)
        heapq.heappush(filled, (total + sizes[name], share))
    return dealt


def _run_of(checkpoint: Checkpoint) -> str | None:
    try:
        return checkpoint.manifest().run
    except (DamagedCheckpointError, OtherVersionError, UnreadableCheckpointError):
        return None


def _problem_of(work: Callable[[], object]) -> _Problem | None:
    """Does the work; what went wrong with the disk, or None."""
    try:
        work()
    except OSError as error:
        return _Problem.of(error)
    return None
