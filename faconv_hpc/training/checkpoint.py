"""Saving and loading the whole state of a run, by all ranks together; see shards.py for what is on disk."""

import heapq
import secrets
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError, RunError
from .engine import Engine
from .files import flush_entries, write_durably
from .identity import check_same_network, check_same_run, identity
from .records import versions
from .setup import Workspace
from .shards import (
    FORMAT,
    PARAMETER,
    RANDOM,
    Checkpoint,
    DamagedCheckpointError,
    Manifest,
    ShardFile,
    StoredTensor,
    UnreadableCheckpointError,
    checkpoints_in,
    commit,
    partial_directory,
    random_states,
    remove,
    remove_unfinished,
    restore_random_states,
    write_shard,
)
from .starts import made_progress

RUN_ID_FILE = "run-id"


@dataclass(frozen=True)
class _Report:
    """What one rank has written, or why it could not."""

    files: dict[str, ShardFile] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    seconds: float = 0.0
    problem: str | None = None


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

    Every parameter is written once, with its moments, by one rank; ranks get about the same number of bytes.
    Training waits for the copy to host memory, and with ``training.save_in_background`` for nothing else: the
    checkpoint is committed at the first step boundary at which all ranks have written (`written`, `finish`).

    Args:
        workspace: of the run.
        engine: whose state is saved.
        resumed: step of the checkpoint that the run goes on from; 0: none.

    Attributes:
        saved_step: of the newest checkpoint that is in place; 0: none.
        last_save_s: what the last one took the slowest rank: copying, writing, committing.
    """

    def __init__(self, workspace: Workspace, engine: Engine, resumed: int = 0) -> None:
        self._workspace, self._engine = workspace, engine
        self._mesh, self._config = workspace.domain.mesh, workspace.config
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._run = self._mesh.from_first(run_id(self._config.run_dir) if self._mesh.rank == 0 else "")
        self.saved_step = resumed
        self.last_save_s = 0.0

    def save(self, step: int) -> None:
        """Saves the state after ``step`` optimizer steps. Collective.

        Raises:
            FloatingPointError: a parameter is not finite; nothing is written then.
            RunError: it could not be written; the checkpoints that are there stay.
        """
        self.finish()
        began = time.perf_counter()
        share = self._share(step)
        copying_s = time.perf_counter() - began
        directory = self._new_directory(step)
        writing = self._thread.submit(self._write, directory, share)
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
        """Waits for what is being written and commits it. Collective. Raises RunError, see `save`."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        reports = self._mesh.gathered_objects(pending.report.result())
        began = time.perf_counter()
        problems = [f"rank {rank}: {one.problem}" for rank, one in enumerate(reports) if one.problem]
        problem = problems[0] if problems else None
        if self._mesh.rank == 0 and problem is None:
            problem = _problem_of(lambda: commit(pending.directory, self._manifest(pending, reports)))
        problem = self._mesh.from_first(problem)
        if problem is not None:
            if self._mesh.rank == 0:
                remove(pending.directory, secrets.token_hex(4))
            self._raise(pending.step, problem)
        writing_s = max(report.seconds for report in reports)
        self.last_save_s = pending.copying_s + writing_s + time.perf_counter() - began
        self.saved_step = pending.step
        if self._mesh.rank == 0:
            made_progress(self._config.run_dir)
            self._clean_up()

    def close(self) -> None:
        """Ends the thread that writes. Not collective."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _share(self, step: int) -> dict[str, Tensor]:
        """What this rank writes, in host memory."""
        network = self._engine.network
        sizes = {name: getattr(one, "ds_numel", one.numel()) for name, one in network.named_parameters()}
        mine = balanced(sizes, self._mesh.ranks)[self._mesh.rank]
        share = {f"{PARAMETER}/{name}": value for name, value in self._engine.full_parameters(mine)}
        unsound = [name.partition("/")[2] for name, value in share.items() if not torch.isfinite(value).all()]
        everywhere = sorted(name for names in self._mesh.gathered_objects(unsound) for name in names)
        if everywhere:
            raise FloatingPointError(
                f"the parameter {everywhere[0]} ({len(everywhere)} in all) is not finite after step {step}, so it is "
                f"not saved. Lower training.learning_rate and go on from the checkpoint before."
            )
        share |= dict(self._engine.full_moments(mine))
        return share | {f"{RANDOM}/{self._mesh.rank}/{kind}": one for kind, one in random_states().items()}

    def _new_directory(self, step: int) -> Path:
        directory = partial_directory(self._config.run_dir, step, self._mesh.from_first(secrets.token_hex(4)))
        problem = _problem_of(lambda: _make(directory)) if self._mesh.rank == 0 else None
        problem = self._mesh.from_first(problem)
        if problem is not None:
            self._raise(step, problem)
        return directory

    def _write(self, directory: Path, share: Mapping[str, Tensor]) -> _Report:
        """In the thread: this rank's shard."""
        began = time.perf_counter()
        try:
            files = write_shard(directory, self._mesh.rank, share)
        except OSError as error:
            return _Report(problem=_told(error))
        kinds = ((*name.partition("/"), value) for name, value in share.items())
        shapes = {name: tuple(value.shape) for kind, _, name, value in kinds if kind == PARAMETER}
        return _Report(files, shapes, time.perf_counter() - began)

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
            versions=versions(),
            config=config.model_dump(mode="json"),
            identity=identity(self._workspace),
            moments=self._engine.moment_names,
            parameters={
                name: StoredTensor(file=file, shape=shape)
                for report in reports
                for file in report.files
                for name, shape in report.shapes.items()
            },
            files={file: stored for report in reports for file, stored in report.files.items()},
        )

    def _raise(self, step: int, problem: str) -> None:
        kept = checkpoints_in(self._config.run_dir)
        newest = f"the newest checkpoint is still {kept[-1].path}" if kept else "there is no checkpoint before it"
        raise RunError(
            f"the checkpoint of step {step} could not be written to {self._config.run_dir} ({problem}); {newest}. "
            f"Make room or mend the file system, and start the same command again."
        )

    def _clean_up(self) -> None:
        """Removes this run's own checkpoints before the last ones and the one just saved, but for every n-th.

        One that cannot be removed is no reason to end a run: it is told, and tried again next time.
        """
        training = self._config.training
        older = [one for one in checkpoints_in(self._config.run_dir) if one.step < self.saved_step]
        mine = [one for one in older if _run_of(one) == self._run]
        for one in mine[: max(len(mine) - (training.keep_last - 1), 0)]:
            if not training.keep_every or one.step % training.keep_every:
                problem = _problem_of(partial(remove, one.path, secrets.token_hex(4)))
                if problem is not None:
                    print(f"faconv: {one.path} could not be removed ({problem})", file=sys.stderr)


@dataclass(frozen=True)
class _Held:
    """A whole checkpoint, each of its files in the memory of one rank."""

    checkpoint: Checkpoint
    manifest: Manifest
    tensors: dict[str, Tensor]


def resume(workspace: Workspace, engine: Engine, *, strict: bool = False) -> int:
    """Loads the newest whole checkpoint of the run directory into the engine and returns its step; 0 if none.

    Collective: the first rank lists what is there, as others may not yet see what is on a shared disk; every byte is
    read and checked by one rank. Damaged checkpoints are named and passed over by all ranks together.

    Args:
        strict: refuse damaged checkpoints instead.

    Raises:
        InputError: all checkpoints are damaged, or (``strict``) one newer than the newest whole one is; or it
            belongs to another network, other data or another batch.
    """
    mesh, run_dir = workspace.domain.mesh, workspace.config.run_dir
    if mesh.rank == 0:
        remove_unfinished(run_dir)
    found = mesh.from_first(checkpoints_in(run_dir) if mesh.rank == 0 else [])
    problem = ""
    for candidate in reversed(found):
        held = _held_together(workspace, candidate)
        if isinstance(held, _Held):
            _load(workspace, engine, held)
            return candidate.step
        problem = f"{candidate.path}: {held}"
        if strict:
            raise InputError(
                f"a checkpoint is damaged, and --strict was given: {problem}. Remove or mend it, "
                f"or leave --strict out to go on from the newest whole one."
            )
        if mesh.rank == 0:
            print(f"faconv: passed over {problem}", file=sys.stderr)
    if found:
        raise InputError(
            f"none of the {len(found)} checkpoints in {run_dir} is whole; the oldest: {problem}. "
            f"Bring one back from elsewhere, or give another run_dir to start anew."
        )
    return 0


def _held_together(workspace: Workspace, candidate: Checkpoint) -> _Held | str:
    """The checkpoint, its files read and checked by one rank each; or what is wrong with it, the same on all."""
    mesh = workspace.domain.mesh
    manifest = mesh.from_first(_manifest_or_problem(candidate) if mesh.rank == 0 else "")
    if isinstance(manifest, str):
        return manifest
    tensors: dict[str, Tensor] = {}
    damaged = unreadable = None
    try:
        for name, expected in list(manifest.files.items())[mesh.rank :: mesh.ranks]:
            tensors |= candidate.tensors(name, expected)
    except DamagedCheckpointError as error:
        damaged = str(error)
    except UnreadableCheckpointError as error:
        unreadable = str(error)
    everywhere = mesh.gathered_objects((damaged, unreadable))
    for rank, (_, problem) in enumerate(everywhere):
        if problem is not None:
            raise UnreadableCheckpointError(f"on rank {rank} {problem}")
    problems = [problem for problem, _ in everywhere if problem is not None]
    return problems[0] if problems else _Held(candidate, manifest, tensors)


def _manifest_or_problem(candidate: Checkpoint) -> Manifest | str:
    try:
        return candidate.manifest()
    except DamagedCheckpointError as error:
        return str(error)


def _load(workspace: Workspace, engine: Engine, held: _Held) -> None:
    mesh, manifest = workspace.domain.mesh, held.manifest
    check_same_run(workspace, manifest.identity)
    check_same_network(engine.network, manifest, held.checkpoint.path)
    reader = {file: place % mesh.ranks for place, file in enumerate(manifest.files)}

    def value(key: str) -> Tensor:
        """One tensor, from the rank that has read it."""
        stored = manifest.parameters[key.partition("/")[2]]
        rank = reader[stored.file]
        return mesh.from_rank(held.tensors[key] if mesh.rank == rank else None, stored.shape, rank)

    engine.load_full(value, manifest.updates)
    _restore_random_states(workspace, held)


def _restore_random_states(workspace: Workspace, held: _Held) -> None:
    """Each rank's own, where there are as many ranks as when it was saved; else the first rank's on all."""
    mesh = workspace.domain.mesh
    mine = {name: value for name, value in held.tensors.items() if name.startswith(f"{RANDOM}/")}
    states: dict[int, dict[str, Tensor]] = {}
    for part in mesh.gathered_objects(mine):
        for name, value in part.items():
            _, rank, kind = name.split("/")
            states.setdefault(int(rank), {})[kind] = value
    restore_random_states(states[mesh.rank if len(states) == mesh.ranks else 0])


def run_id(run_dir: Path) -> str:
    """The name that this run gave itself when it began."""
    path = run_dir / RUN_ID_FILE
    if not path.exists():
        write_durably(path, uuid.uuid4().hex + "\n")
    return path.read_text().strip()


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
    except (DamagedCheckpointError, UnreadableCheckpointError):
        return None


def _make(directory: Path) -> None:
    """A new directory whose entry, and its parent's, are on disk."""
    directory.mkdir(parents=True)
    flush_entries(directory.parent)
    flush_entries(directory.parent.parent)


def _problem_of(work: Callable[[], object]) -> str | None:
    """Does the work; what went wrong with the disk, or None."""
    try:
        work()
    except OSError as error:
        return _told(error)
    return None


def _told(error: OSError) -> str:
    return error.strerror or str(error)
