"""The whole state of a run on disk: independent of mesh, number of ranks and ZeRO stage."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config import RunConfig
from ..errors import InputError
from .engine import Engine

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


def save_checkpoint(config: RunConfig, engine: Engine, step: int, writes: bool) -> None:
    """Saves the state after ``step`` optimizer steps. Collective; the rank that ``writes`` writes it."""
    parameters, moments = _collected(engine.full_parameters(), writes), _collected(engine.full_moments(), writes)
    if not writes:
        return
    final = config.run_dir / "checkpoints" / f"{PREFIX}{step:08d}"
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(parameters, partial / PARAMETERS)
    save_file(moments, partial / MOMENTS)
    (partial / STATE).write_text(json.dumps({"step": step, "config": config.model_dump(mode="json")}, indent=2))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


def resume(config: RunConfig, engine: Engine) -> int:
    """Loads the newest checkpoint of the run directory into the engine and returns its step; 0 if none.

    Raises:
        InputError: the checkpoint belongs to another network or other data.
    """
    found = checkpoints_of(config.run_dir)
    if not found:
        return 0
    check_same_run(config, found[-1])
    engine.load_full(found[-1].parameters(), found[-1].moments(), found[-1].step)
    return found[-1].step


def check_same_run(config: RunConfig, checkpoint: Checkpoint) -> None:
    """A run goes on with the network, the data and the optimizer that it began with."""
    saved = json.loads((checkpoint.path / STATE).read_text())["config"]
    now = config.model_dump(mode="json")
    keys = [("model", key) for key in now["model"] if key not in ("kernels", "checkpoint_steps", "attention_exchange")]
    keys += [("data", key) for key in ("variables", "forcings", "window", "held_out_frames")]
    keys += [("training", "optimizer"), ("training", "seed")]
    for section, key in keys:
        if saved[section].get(key) != now[section][key]:
            raise InputError(
                f"{config.run_dir} holds a run with {section}.{key}={saved[section].get(key)!r}, this config says "
                f"{now[section][key]!r}. A run goes on as it began: change the value back, or give another run_dir."
            )


def _collected(values: object, writes: bool) -> dict[str, Tensor]:
    """All of an iterator that every rank must run through; kept only where they are written."""
    return {name: value for name, value in values if writes or not name}  # type: ignore[attr-defined]


def _opened(state: Path) -> Checkpoint:
    try:
        return Checkpoint(state.parent, int(json.loads(state.read_text())["step"]))
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{state} is damaged: it must hold the step of a checkpoint. Remove the directory {state.parent.name} "
            f"to go on from the one before it."
        ) from None


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} cannot be read: {error}. Remove the directory {path.parent.name} to go on from the "
            f"checkpoint before it."
        ) from None
