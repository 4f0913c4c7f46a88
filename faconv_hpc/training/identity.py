"""What a run must keep to go on as it began."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..data.periods import stretches_of
from ..errors import InputError
from .manifest import Manifest
from .setup import WAYS, Workspace, model_options

BEFORE: dict[str, Any] = {
    "training.input_noise": 0.0, "training.through_leads": True, "training.beta2": 0.999, "model.scale_factor": 1,
    "model.history": 1,
}  # fmt: skip
"""What a run began with until there were these keys."""


def identity(workspace: Workspace) -> dict[str, Any]:
    """What a run must keep to go on as it began: network, data, order and number of samples, optimizer."""
    config, contract, axis = workspace.config, workspace.contract, workspace.store.layout.time
    tree = config.model_dump(mode="json")
    kept = {f"model.{key}": value for key, value in model_options(config.model).items() if key not in WAYS}
    kept |= {f"model.{key}": tree["model"][key] for key in ("history", "scale_factor")}  # whatever they are
    same = ("forcings", "roles", "log1p", "anomalies", "loss_weights", "window", "lat_boundary", "lon_boundary")
    kept |= {f"data.{key}": tree["data"][key] for key in same}
    kept |= {f"data.periods.{name}": ranges for name, ranges in tree["data"]["periods"].items()}
    kept |= {
        f"training.{key}": tree["training"][key]
        for key in (
            "optimizer", "beta2", "seed", "rollout", "lead_weights", "through_leads", "stateful_windows", "input_noise",
            "frozen",
        )
    }  # fmt: skip
    stretches = stretches_of(axis, workspace.training_spans)
    dates = [axis.label(frame) for frame in (stretches[0].start, stretches[-1].stop - 1)]
    pieces = f"{sum(map(len, stretches))} in {len(stretches)} stretches" if len(stretches) > 1 else len(stretches[0])
    return kept | {
        "channels": list(config.data.variables or contract.names),
        "training frames": f"{pieces} from {dates[0]} to {dates[1]}",
        "samples per step (replicas x micro_batch x accumulation)": config.global_batch,
    }


def check_same_run(workspace: Workspace, saved: Mapping[str, Any]) -> None:
    """Raises InputError if the run began with another `identity`, the one that is ``saved``."""
    now = json.loads(json.dumps(identity(workspace)))  # tuples become lists, as in the file
    for key, value in now.items():
        was = saved.get(key, BEFORE.get(key, value))
        if was != value:
            raise InputError(
                f"{workspace.config.run_dir} holds a run with {key}={was!r}, this config says {value!r}. "
                f"A run goes on as it began: change the value back, or give another run_dir."
            )


def check_same_network(network: nn.Module, manifest: Manifest, path: Path) -> None:
    """Raises InputError, with the list, unless a checkpoint holds just the parameters of a network, in their shapes."""
    wanted = {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in network.named_parameters()}
    stored = {name: one.shape for name, one in manifest.parameters.items()}
    findings = [f"{name} is missing" for name in wanted if name not in stored]
    findings += [f"{name} is not in the network" for name in stored if name not in wanted]
    findings += [
        f"{name} has shape {stored[name]}, the network's is {shape}"
        for name, shape in wanted.items()
        if name in stored and stored[name] != shape
    ]
    if findings:
        raise InputError(
            f"{path} holds another network than the config describes: {'; '.join(findings)}. "
            f"Change the config back to what the run began with, or give another run_dir."
        )
