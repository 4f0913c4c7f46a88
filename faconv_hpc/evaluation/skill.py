"""How good the forecasts are: area-weighted RMSE per variable, beside persistence."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config import RunConfig, load_config
from ..data.periods import frames_within, mask_of, starts_before, stretches_of
from ..data.samples import Windows
from ..data.store import Store
from ..errors import InputError
from ..files import write_durably
from ..model.network import FAConvLSTMNetwork
from ..spatial.domain import Domain
from ..spatial.mesh import ProcessMesh
from ..training.identity import check_same_network
from ..training.records import CONFIG_FILE, read_records
from ..training.setup import Workspace, build_network
from ..training.shards import Checkpoint, whole_checkpoints

SKILL_FILE = "evaluation.json"


@dataclass(frozen=True)
class Skill:
    """Errors of one variable's one-step forecasts, in its units."""

    variable: str
    units: str
    rmse: float
    persistence_rmse: float

    @property
    def ratio(self) -> float:
        """RMSE over persistence's; below 1 the forecast is better than no change."""
        return self.rmse / self.persistence_rmse if self.persistence_rmse else float("nan")


@dataclass(frozen=True)
class Example:
    """One forecast of the whole grid, for a figure: change from one date to another, where errors can be seen."""

    variables: tuple[str, ...]
    units: tuple[str, ...]
    latitude_deg: NDArray[np.float64]
    longitude_deg: NDArray[np.float64]
    truth_CYX: NDArray[np.float32]
    forecast_CYX: NDArray[np.float32]
    dates: tuple[str, str]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        step: of the checkpoint that forecast.
        held_out: whether the forecasts are of frames that training never saw as targets.
        forecasts: how many.
        first_loss, last_loss: of the run's first and last steps (mean over a twentieth of it each).
    """

    step: int
    held_out: bool
    forecasts: int
    first_loss: float
    last_loss: float
    skills: tuple[Skill, ...]
    example: Example


def load_run(run_dir: Path) -> RunConfig:
    """The resolved config of a run.

    Raises:
        InputError: the directory holds no run.
    """
    if not (run_dir / CONFIG_FILE).is_file():
        raise InputError(
            f"{run_dir} holds no run: it has no {CONFIG_FILE}. Give the run_dir of a `faconv train` that was started."
        )
    return load_config(run_dir / CONFIG_FILE)


def newest_checkpoint(config: RunConfig, mesh: ProcessMesh) -> Checkpoint:
    """The run's newest whole one. Collective.

    Raises:
        InputError: there is none.
    """
    newest = mesh.from_first(next(whole_checkpoints(config.run_dir), None) if mesh.rank == 0 else None)
    if newest is None:
        raise InputError(
            f"{config.run_dir} has no whole checkpoint. Wait for the run to end, set training.checkpoint_every, or "
            f"look at what is there with `faconv checkpoint list {config.run_dir}`."
        )
    return newest


def trained_network(workspace: Workspace, windows: Windows, checkpoint: Checkpoint) -> FAConvLSTMNetwork:
    """The network with the weights of a checkpoint, in float32.

    Raises:
        InputError: they are another network's.
    """
    network = build_network(workspace.config, windows)
    check_same_network(network, checkpoint.manifest(), checkpoint.path)
    network.load_state_dict(checkpoint.parameters())
    return network.to(workspace.domain.mesh.device).eval()


@torch.no_grad()
def evaluate(config: RunConfig, mesh: ProcessMesh) -> Evaluation:
    """Forecasts every frame of the test period from those before it (every frame, if there is none). Collective.

    The state is spun up over ``data.window`` frames; what counts is the last step's forecast.
    """
    checkpoint = newest_checkpoint(config, mesh)
    workspace = Workspace.of(config, Store.open(config.data.store), mesh, checkpoint.manifest().contract)
    windows = _windows(workspace)
    network = trained_network(workspace, windows, checkpoint)
    squares, weights = (torch.zeros(2, len(windows.field_channels), dtype=torch.float64) for _ in range(2))
    truth = forecast = None
    for index in range(len(windows)):
        truth, forecast = _last_step(network, windows, index, workspace.domain)
        valid = ~truth.isnan()
        for row, field in enumerate((forecast - truth, truth)):
            square, weight = _area_square(field, valid, workspace.domain)
            squares[row] += square
            weights[row] += weight
    assert truth is not None and forecast is not None, "a Windows has at least one window"
    scale = torch.from_numpy(workspace.contract.statistics.tendency_std)
    rmse = (squares / weights).sqrt() * scale
    first, last = _ends([record.loss for record in read_records(config.run_dir) if record.update == "applied"])
    return Evaluation(
        step=checkpoint.step,
        held_out=_held_out(workspace, windows),
        forecasts=len(windows),
        first_loss=first,
        last_loss=last,
        skills=_skills(windows, rmse),
        example=_example(windows, truth, forecast, scale, workspace.domain),
    )


def save_skill(evaluation: Evaluation, run_dir: Path) -> Path:
    """Writes the numbers of an evaluation beside the run's records."""
    path = run_dir / SKILL_FILE
    values = {
        "step": evaluation.step,
        "held_out": evaluation.held_out,
        "forecasts": evaluation.forecasts,
        "first_loss": _number(evaluation.first_loss),
        "last_loss": _number(evaluation.last_loss),
        "skills": [
            {name: _number(value) for name, value in (asdict(skill) | {"ratio": skill.ratio}).items()}
            for skill in evaluation.skills
        ],
    }
    write_durably(path, json.dumps(values, indent=2) + "\n")
    return path


def _number(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they are null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _windows(workspace: Workspace) -> Windows:
    """Windows whose last targets are the frames of the test period, or all where there is none.

    Raises:
        InputError: the store has no frame of the test period with a window before it.
    """
    store, length, dates = workspace.store, workspace.config.data.window, workspace.contract.test
    axis = store.layout.time
    spans = frames_within(axis, dates) if dates else (range(store.frames),)
    stretches = stretches_of(axis, [range(store.frames)])
    starts = starts_before(stretches, mask_of(spans, store.frames), length)
    if not len(starts):
        raise InputError(
            f"{store.path} has no frame{' within ' + ', '.join(dates) if dates else ''} that {length} frames precede "
            f"without a gap; its times run from {axis.label(0)} to {axis.label(store.frames - 1)}. Name a data.store "
            f"that has."
        )
    return workspace.windows(starts, length)


def _held_out(workspace: Workspace, windows: Windows) -> bool:
    """Whether training saw none of the targets: by their dates, in whatever store they stand."""
    trained = mask_of(workspace.training_spans, workspace.store.frames)
    return not trained[windows.starts + windows.window].any()


def _last_step(network: FAConvLSTMNetwork, windows: Windows, index: int, domain: Domain) -> tuple[Tensor, Tensor]:
    """True and forecast tendency (C, Y, X) of a window's last step, NaN where the truth is not valid."""
    batch = windows.read([index]).to(domain.mesh.device)
    output = network(batch.inputs_BTCYX, batch.year_fraction_BT, domain=domain)
    truth = batch.target_BTCYX[0, -1]
    if batch.valid_BTCYX is not None:
        truth = truth.where(batch.valid_BTCYX[0, -1], float("nan"))
    return truth, output.tendency_BTCYX[0, -1]


def _area_square(x_CYX: Tensor, valid_CYX: Tensor, domain: Domain) -> tuple[Tensor, Tensor]:
    """(C,) area-weighted sums over the whole grid of the squares where they are valid, and of their weights."""
    square = x_CYX.double().square().where(valid_CYX, 0.0)
    weight = domain.coordinates.row_weights(square)[:, None] * valid_CYX
    sums = domain.total(torch.stack([(square * weight).sum((-2, -1)), weight.sum((-2, -1))])).cpu()
    return sums[0], sums[1]


def _skills(windows: Windows, rmse: Tensor) -> tuple[Skill, ...]:
    units = [windows.store.units[index] for index in windows.store.channel_indices(windows.field_channels)]
    return tuple(
        Skill(name, unit, float(own), float(persistence))
        for name, unit, own, persistence in zip(windows.field_channels, units, *rmse, strict=True)
    )


def _example(windows: Windows, truth: Tensor, forecast: Tensor, scale: Tensor, domain: Domain) -> Example:
    units = [windows.store.units[index] for index in windows.store.channel_indices(windows.field_channels)]
    last = windows.frames_of(len(windows) - 1)[-1]
    true, guessed = (
        (domain.assemble(tendency).cpu() * scale[:, None, None]).float().numpy() for tendency in (truth, forecast)
    )
    return Example(
        windows.field_channels,
        tuple(units),
        np.rad2deg(domain.grid.latitude),
        np.rad2deg(domain.grid.longitude),
        true,
        guessed,
        (windows.store.layout.time.label(last - 1), windows.store.layout.time.label(last)),
    )


def _ends(losses: list[float]) -> tuple[float, float]:
    """Mean loss of the first and of the last twentieth of the steps."""
    if not losses:
        return float("nan"), float("nan")
    part = max(len(losses) // 20, 1)
    return float(np.mean(losses[:part])), float(np.mean(losses[-part:]))
