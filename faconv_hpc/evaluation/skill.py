"""How good the forecasts are: area-weighted RMSE per variable and lead, beside persistence and climatology."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import RunConfig
from ..config_file import load_config
from ..data.periods import mask_of
from ..data.samples import Windows
from ..data.store import Store
from ..data.variables import Variable
from ..errors import InputError
from ..files import write_durably
from ..model.arithmetic import arithmetic
from ..model.network import FAConvLSTMNetwork
from ..spatial.domain import Domain
from ..spatial.mesh import ProcessMesh
from ..training.identity import check_same_network
from ..training.records import CONFIG_FILE, read_records
from ..training.seen import kept_cycle
from ..training.setup import Workspace, build_network
from ..training.shards import FOLDER, Checkpoint, checkpoints_in, newest_at, whole_checkpoints
from ..training.skill import LeadFields, Skill, SkillSums, forecasts_from

SKILL_FILE = "evaluation.json"


@dataclass(frozen=True)
class Example:
    """One forecast of the whole grid, for a figure, where errors can be seen: of prognostic variables the change from
    one date to another, of diagnostic ones the departure from their mean."""

    variables: tuple[Variable, ...]
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
        forecasts: how many, each over all leads.
        first_loss, last_loss: of the run's first and last steps (mean over a twentieth of it each).
    """

    step: int
    held_out: bool
    forecasts: int
    first_loss: float
    last_loss: float
    skills: tuple[Skill, ...]  # of all variables, lead by lead
    example: Example


def run_of(where: Path) -> tuple[Path, Path | None]:
    """The run_dir that is meant, and the directory of the checkpoint in it, if one is."""
    inside = where.parent.name == FOLDER and not (where / CONFIG_FILE).is_file()
    return (where.parent.parent, where) if inside else (where, None)


def load_run(run_dir: Path) -> RunConfig:
    """The resolved config of a run; what one of an older version says nothing of is as it was then.

    Raises:
        InputError: the directory holds no run.
    """
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise InputError(
            f"{run_dir} holds no run: it has no {CONFIG_FILE}. Give the run_dir of a `faconv train` that was started."
        )
    return load_config(path, older=True)


def checkpoint_of(config: RunConfig, mesh: ProcessMesh, directory: Path | None = None) -> Checkpoint:
    """The run's newest whole one, or that of a directory. Collective.

    Raises:
        InputError: there is none, or it is not whole.
    """
    newest = None
    if mesh.rank == 0:
        newest = newest_at(directory) if directory else next(whole_checkpoints(config.run_dir), None)
    newest = mesh.from_first(newest)
    if newest is None:
        way_out = "Wait for the run to end, or set training.checkpoint_every"
        if mesh.from_first(bool(mesh.rank == 0 and checkpoints_in(config.run_dir))):
            way_out = f"What is wrong with those that are there, `faconv checkpoint verify {config.run_dir}` says"
        raise InputError(f"{config.run_dir} has no whole checkpoint. {way_out}.")
    return newest


def trained_network(workspace: Workspace, checkpoint: Checkpoint) -> FAConvLSTMNetwork:
    """The network with the weights of a checkpoint, in float32.

    Raises:
        InputError: they are another network's.
    """
    network = build_network(workspace.config, workspace.contract.channels)
    check_same_network(network, checkpoint.manifest(), checkpoint.path)
    network.load_state_dict(checkpoint.weights())
    return network.to(workspace.domain.mesh.device).eval()


@torch.no_grad()
def evaluate(
    config: RunConfig, mesh: ProcessMesh, leads: int = 1, directory: Path | None = None, samples: int | None = None
) -> Evaluation:
    """Forecasts the frames of the test period from those before them (all frames, if there is none). Collective.

    The state is spun up over ``data.window`` frames, from where the network runs freely for ``leads`` steps; a forecast
    counts where all of them are in the period and none is missing.

    Args:
        directory: of the checkpoint that forecasts; default: the run's newest whole one.
        samples: how many forecasts, spread over the period; default: all.
    """
    checkpoint = checkpoint_of(config, mesh, directory)
    contract = checkpoint.manifest().contract
    kept = kept_cycle(contract, [checkpoint.path, config.run_dir], mesh)
    workspace = Workspace.of(config, Store.open(config.data.store), mesh, contract, kept=kept)
    windows = workspace.forecast_windows(workspace.contract.test, leads)
    network = trained_network(workspace, checkpoint)
    sums = SkillSums(leads, len(windows.channels.targets))
    climatology, window, domain = workspace.climatology(), config.data.window, workspace.domain
    first_step: LeadFields | None = None
    some = windows.spread(samples or len(windows))
    with arithmetic(config.training.precision, mesh.device):
        for index in some:
            forecasts = forecasts_from(network, windows, index, window, domain, climatology)
            for lead, fields in enumerate(forecasts, start=1):
                sums.add(lead, fields, domain)
                first_step = fields if lead == 1 else first_step
    assert first_step is not None, "a Windows has at least one window"
    first, last = _ends([record.loss for record in read_records(config.run_dir) if record.update == "applied"])
    return Evaluation(
        step=checkpoint.step,
        held_out=_held_out(workspace, windows, leads),
        forecasts=len(some),
        first_loss=first,
        last_loss=last,
        skills=sums.skills(windows.channels),
        example=_example(windows, some[-1], leads, first_step, domain),
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
        "skills": [skill.as_json() for skill in evaluation.skills],
    }
    write_durably(path, json.dumps(values, indent=2) + "\n")
    return path


def _number(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they are null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _held_out(workspace: Workspace, windows: Windows, leads: int) -> bool:
    """Whether training saw none of the targets: by their dates, in whatever store they stand."""
    trained = mask_of(workspace.training_spans, workspace.store.frames)
    return not any(trained[windows.starts + windows.window - lead].any() for lead in range(leads))


def _example(windows: Windows, index: int, leads: int, fields: LeadFields, domain: Domain) -> Example:
    """The first lead of a window."""
    last = windows.frames_of(index)[-leads]
    true, guessed = (domain.assemble(one).cpu().float().numpy() for one in (fields.truth_CYX, fields.forecast_CYX))
    return Example(
        windows.channels.targets,
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
