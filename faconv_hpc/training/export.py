"""What a checkpoint holds, for people and for other programs."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..config import ModelConfig
from ..data.annual_cycle import AnnualCycle
from ..errors import InputError
from ..files import replacing
from ..spatial.mesh import ProcessMesh
from .contract import Contract
from .manifest import Manifest
from .seen import kept_cycle
from .setup import network_options
from .shards import NAME, Checkpoint, DamagedCheckpointError, OtherVersionError, UnreadableCheckpointError

SUFFIXES = (".safetensors", ".pt")
CYCLE = "annual_cycle"
"""Before the names of variables whose cycle stands beside the weights."""


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """One row of a list; ``problem`` says why the manifest cannot be read."""
    row: dict[str, Any] = {"path": str(checkpoint.path), "step": checkpoint.step, "problem": None}
    try:
        manifest = checkpoint.manifest()
    except (DamagedCheckpointError, OtherVersionError, UnreadableCheckpointError) as error:
        return row | {"problem": str(error)}
    return row | {
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "files": len(manifest.files),
        "mesh": manifest.mesh,
        "zero_stage": manifest.zero_stage,
        "seed": manifest.seed,
        "versions": manifest.versions,
    }


def export(checkpoint: Checkpoint, output: Path) -> dict[str, Any]:
    """Writes the weights as one plain state dict of `FAConvLSTMNetwork`.

    Args:
        checkpoint: a whole one.
        output: ``.safetensors`` (with the network's arguments and its contract as metadata) or ``.pt``.

    Raises:
        InputError: another suffix, or a directory that is not there.
    """
    if output.suffix not in SUFFIXES:
        raise InputError(f"the output is a file {' or '.join(SUFFIXES)}, got {output}. Change its name.")
    if any(NAME.fullmatch(parent.name) for parent in output.absolute().parents):
        raise InputError(
            f"{output} lies in the directory of a checkpoint, which must stay as it is. Give another place."
        )
    parameters, manifest = checkpoint.weights(), checkpoint.manifest()
    cycle = cycle_in(checkpoint, manifest.contract).coefficients
    try:
        with replacing(output) as beside:
            if output.suffix == ".pt":
                torch.save(parameters, beside)
            else:
                kept = {f"{CYCLE}/{name}": torch.from_numpy(values) for name, values in cycle.items()}
                save_file(parameters | kept, beside, metadata=metadata(manifest))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{output} cannot be written: {str(error).rstrip('.')}. Give a file where you may write."
        ) from None
    values = sum(value.numel() for value in parameters.values())
    return {"output": str(output), "step": manifest.step, "tensors": len(parameters), "values": values}


def cycle_in(checkpoint: Checkpoint, contract: Contract) -> AnnualCycle:
    """Of the variables that the network sees without it, on the whole grid."""
    path = kept_cycle(contract, [checkpoint.path], ProcessMesh.alone())
    if path is None:
        return AnnualCycle()
    return AnnualCycle.read(path, list(contract.harmonics), contract.globe)


def metadata(manifest: Manifest) -> dict[str, str]:
    """What builds the network, its contract, and how its run used it: texts, as safetensors wants them, or JSON."""
    model = ModelConfig.model_validate(manifest.config["model"])
    return {
        "step": str(manifest.step),
        "network": json.dumps(network_options(model, manifest.contract.channels, manifest.contract.grid)),
        "contract": manifest.contract.model_dump_json(),
        "inputs": json.dumps(manifest.contract.channels.inputs),
        "faconv_hpc": manifest.versions["faconv_hpc"],
        "run": Path(manifest.config["run_dir"]).name,
        "window": str(manifest.config["data"]["window"]),
        "mesh": manifest.mesh,
    }
