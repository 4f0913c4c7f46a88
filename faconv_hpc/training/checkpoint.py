"""The whole state of a run on disk: independent of mesh, number of ranks and ZeRO stage."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import InputError
from .engine import Engine
from .setup import Workspace

PARAMETERS, MOMENTS, STATE = "parameters.safetensors", "moments.safetensors", "state.json"
PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory that is whole: it appears by one rename."""

    path: Path
    step: int

    def parameters(self) -> dict[str, Tensor]:
        """Name and fp32 value of every parameter."""
        return _load(self.path / PARAMETERS)

    def moments(self) -> dict[str, Tensor]:
        """``moment/parameter`` and value of the optimizer's moments."""
        return _load(self.path / MOMENTS)


def checkpoints_of(run_dir: Path) -> list[Checkpoint]:
    """The checkpoints of a run, oldest first."""
    found = (run_dir / "checkpoints").glob(f"{PREFIX}*/{STATE}")
    return sorted((_opened(state) for state in found), key=lambda one: one.step)


def save_checkpoint(workspace: Workspace, engine: Engine, step: int) -> None:
    """Saves the state after ``step`` optimizer steps. Collective; the first rank writes it.

    Raises:
        FloatingPointError: a parameter is not finite; nothing is written then.
    """
    mesh, config = workspace.domain.mesh, workspace.config
    writes = mesh.rank == 0
    parameters, moments = _collected(engine.full_parameters(), writes), _collected(engine.full_moments(), writes)
    if not writes:
        return
    _check_finite(parameters, step)
    final = config.run_dir / "checkpoints" / f"{PREFIX}{step:08d}"
    partial, replaced = final.with_name(f".{final.name}.partial"), final.with_name(f".{final.name}.replaced")
    for left_over in (partial, replaced):
        shutil.rmtree(left_over, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(parameters, partial / PARAMETERS)
    save_file(moments, partial / MOMENTS)
    state = {"step": step, "config": config.model_dump(mode="json"), "identity": identity(workspace)}
    (partial / STATE).write_text(json.dumps(state, indent=2))
    for file in partial.iterdir():
        _flush(file)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def resume(workspace: Workspace, engine: Engine) -> int:
    """Loads the newest checkpoint of the run directory into the engine and returns its step; 0 if none.

    Collective: the first rank chooses, as others may not yet see what is on a shared disk.

    Raises:
        InputError: the checkpoint belongs to another network, other data or another batch.
    """
    mesh, config = workspace.domain.mesh, workspace.config
    newest = mesh.from_first(next(reversed(checkpoints_of(config.run_dir)), None))
    if newest is None:
        return 0
    check_same_run(workspace, newest)
    engine.load_full(newest.parameters(), newest.moments(), newest.step)
    return newest.step


def identity(workspace: Workspace) -> dict[str, Any]:
    """What a run must keep to go on as it began: network, data, order and number of samples, optimizer."""
    config, store = workspace.config, workspace.store
    tree = config.model_dump(mode="json")
    free = ("kernels", "checkpoint_steps", "attention_exchange")  # other ways to the same numbers
    kept = {f"model.{key}": value for key, value in tree["model"].items() if key not in free}
    kept |= {f"data.{key}": tree["data"][key] for key in ("forcings", "window", "lat_boundary", "lon_boundary")}
    kept |= {f"training.{key}": tree["training"][key] for key in ("optimizer", "seed")}
    channels = config.data.variables or store.channels
    indices = store.channel_indices(channels)
    content = [
        store.latitude_deg,
        store.longitude_deg,
        store.mean[indices],
        store.std[indices],
        store.tendency_std[indices],
    ]
    return kept | {
        "channels": list(channels),
        "training frames": len(workspace.training_frames),
        "samples per step (replicas x micro_batch x accumulation)": config.global_batch,
        "store (grid and statistics)": hashlib.sha256(b"".join(part.tobytes() for part in content)).hexdigest()[:16],
    }


def check_same_run(workspace: Workspace, checkpoint: Checkpoint) -> None:
    """Raises InputError if the run began with another `identity`."""
    saved = _state(checkpoint.path / STATE).get("identity", {})
    now = json.loads(json.dumps(identity(workspace)))  # tuples become lists, as in the file
    for key, value in now.items():
        if key in saved and saved[key] != value:
            raise InputError(
                f"{workspace.config.run_dir} holds a run with {key}={saved[key]!r}, this config says {value!r}. "
                f"A run goes on as it began: change the value back, or give another run_dir."
            )


def _check_finite(parameters: dict[str, Tensor], step: int) -> None:
    for name, value in parameters.items():
        if not torch.isfinite(value).all():
            raise FloatingPointError(
                f"the parameter {name} is not finite after step {step}, so it is not saved. "
                f"Lower training.learning_rate and go on from the checkpoint before."
            )


def _flush(path: Path) -> None:
    """Makes sure that a file or a directory's entries are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _collected(values: Iterator[tuple[str, Tensor]], writes: bool) -> dict[str, Tensor]:
    """All of an iterator that every rank must run through; kept only where they are written."""
    return {name: value for name, value in values if writes}


def _opened(state: Path) -> Checkpoint:
    return Checkpoint(state.parent, int(_state(state)["step"]))


def _state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(path.read_text())
        int(state["step"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} is damaged: it must hold the step of a checkpoint. Remove the directory {path.parent.name} "
            f"to go on from the one before it."
        ) from None
    return state


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} cannot be read: {error}. Remove the directory {path.parent.name} to go on from the "
            f"checkpoint before it."
        ) from None
