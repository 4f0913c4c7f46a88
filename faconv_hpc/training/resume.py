"""Loading the newest whole checkpoint of a run, by all ranks together; see shards.py for what is on disk."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..data.annual_cycle import CYCLE_FILE, AnnualCycle
from ..errors import InputError
from ..files import write_durably
from ..observe import LOADING
from ..spatial.mesh import ProcessMesh
from .contract import Contract, check_same_data
from .engine import Engine
from .identity import check_same_network, check_same_run
from .manifest import Manifest, ShardFile, StatePiece
from .optimizers import new_moment
from .schedule import Leg
from .seen import kept_cycle
from .setup import Workspace
from .shards import (
    AVERAGE,
    PARAMETER,
    Checkpoint,
    DamagedCheckpointError,
    UnreadableCheckpointError,
    candidates_in,
    remove_unfinished,
)


@dataclass(frozen=True)
class Resumed:
    """What a run goes on from.

    Attributes:
        step: of the checkpoint; 0: there was none.
        save_s: what it took to save.
        passed_over: names of the damaged checkpoints that are newer.
        legs: of the learning rate until now.
        directory: of the checkpoint.
        states: what each of its files has of states.
    """

    step: int = 0
    save_s: float = 0.0
    passed_over: frozenset[str] = frozenset()
    legs: tuple[Leg, ...] = ()
    directory: Path = Path()
    states: Mapping[str, StatePiece] = field(default_factory=dict)


@dataclass(frozen=True)
class _Held:
    """A whole checkpoint, each of its files in the memory of one rank."""

    checkpoint: Checkpoint
    manifest: Manifest
    tensors: dict[str, Tensor]


def resume(workspace: Workspace, engine: Engine, *, strict: bool = False, up_to: int | None = None) -> Resumed:
    """Loads the newest whole checkpoint of the run directory into the engine.

    Collective: the first rank lists what is there, as others may not yet see what is on a shared disk; every byte is
    read and checked by one rank. Damaged checkpoints are named and passed over by all ranks together.

    Args:
        strict: refuse damaged checkpoints instead.
        up_to: leave out checkpoints of later steps; None: take any.

    Raises:
        InputError: all checkpoints are damaged, or (``strict``) one newer than the newest whole one is; or it
            belongs to another network, other data or another batch; or it is of another version.
    """
    mesh, run_dir = workspace.domain.mesh, workspace.config.run_dir
    if mesh.rank == 0:
        remove_unfinished(run_dir)
    found = mesh.from_first(candidates_in(run_dir) if mesh.rank == 0 else [])
    found = [one for one in found if up_to is None or one.step <= up_to]
    problem = ""
    passed_over: set[str] = set()
    for candidate in reversed(found):
        held = _held_together(workspace, candidate)
        if isinstance(held, _Held):
            _load(workspace, engine, held)
            found_in = candidate.path, held.manifest.states
            return Resumed(candidate.step, held.manifest.save_s, frozenset(passed_over), held.manifest.legs, *found_in)
        problem = f"{candidate.path}: {held}"
        passed_over.add(candidate.path.name)
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
    return Resumed()


def contract_of_run(run_dir: Path, mesh: ProcessMesh) -> Contract | None:
    """Of a run that has checkpoints, from the newest that is not damaged; None: it begins. Collective."""
    found: Contract | None = None
    if mesh.rank == 0:
        manifests = (_manifest_or_problem(one) for one in reversed(candidates_in(run_dir)))
        found = next((one.contract for one in manifests if not isinstance(one, str)), None)
    return mesh.from_first(found)


def bring_back(run_dir: Path, contract: Contract | None, mesh: ProcessMesh) -> Path:
    """The file of a run's annual cycle, from a checkpoint if it is no longer in the run's directory. Collective.

    Raises:
        InputError: it is nowhere.
    """
    path = run_dir / CYCLE_FILE
    if contract is not None and contract.annual_cycle:
        places = [run_dir, *(one.path for one in reversed(candidates_in(run_dir)))] if mesh.rank == 0 else []
        found = kept_cycle(contract, places, mesh)
        if found != path and found is not None and mesh.rank == 0:
            write_durably(path, found.read_bytes())
        mesh.from_first(None)  # it is there for all
    return path


def _whole_cycle(workspace: Workspace) -> AnnualCycle:
    path, names = workspace.config.run_dir / CYCLE_FILE, list(workspace.contract.harmonics)
    return AnnualCycle.read(path, names, workspace.contract.globe) if names else AnnualCycle()


def _held_together(workspace: Workspace, candidate: Checkpoint) -> _Held | str:
    """The checkpoint, its files read and checked by one rank each; or what is wrong with it, the same on all."""
    mesh = workspace.domain.mesh
    manifest = mesh.from_first(_manifest_or_problem(candidate) if mesh.rank == 0 else "")
    if isinstance(manifest, str):
        return manifest
    tensors: dict[str, Tensor] = {}
    damaged = unreadable = None
    try:
        with mesh.activity.during(LOADING):
            for name, expected in list(manifest.files.items())[mesh.rank :: mesh.ranks]:
                if name == CYCLE_FILE:
                    _mend_cycle(workspace.config.run_dir, candidate, expected)
                elif name in manifest.states:  # read by those who need them
                    candidate.checked_bytes(name, expected)
                else:
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


def _mend_cycle(run_dir: Path, candidate: Checkpoint, expected: ShardFile) -> None:
    """The same file lies in the run's directory, where it has just been found whole: it stands in for a damaged one."""
    try:
        candidate.checked_bytes(CYCLE_FILE, expected)
    except DamagedCheckpointError as error:
        print(f"faconv: {candidate.path}: {error}; it is brought back from {run_dir}", file=sys.stderr)
        write_durably(candidate.path / CYCLE_FILE, (run_dir / CYCLE_FILE).read_bytes())


def _manifest_or_problem(candidate: Checkpoint) -> Manifest | str:
    try:
        return candidate.manifest()
    except DamagedCheckpointError as error:
        return str(error)


def _load(workspace: Workspace, engine: Engine, held: _Held) -> None:
    mesh, manifest = workspace.domain.mesh, held.manifest
    check_same_run(workspace, manifest.identity)
    check_same_data(manifest.contract, workspace.store, mesh, partial(_whole_cycle, workspace))
    check_same_network(engine.network, manifest, held.checkpoint.path)
    reader = {file: place % mesh.ranks for place, file in enumerate(manifest.files)}

    def value(key: str) -> Tensor:
        """One tensor, from the rank that has read it. A mean of weights that is new begins as they are."""
        if key.startswith(f"{AVERAGE}/") and AVERAGE not in manifest.moments:
            key = f"{PARAMETER}/{key.removeprefix(f'{AVERAGE}/')}"
        kind, _, name = key.partition("/")
        stored = manifest.parameters[name]
        rank, shape = reader[stored.file], stored.shape
        if kind in manifest.moments:
            shape = tuple(new_moment(kind, torch.empty(shape, device="meta")).shape)
        return mesh.from_rank(held.tensors[key] if mesh.rank == rank else None, shape, rank)

    engine.load_full(value, manifest.updates)
