"""A trained network and what it needs to be used, from a run, a checkpoint or an exported file."""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..config import as_now
from ..data.annual_cycle import AnnualCycle
from ..errors import InputError
from ..model.network import FAConvLSTMNetwork
from ..spatial.domain import Domain
from ..spatial.mesh import ProcessMesh
from .contract import Contract
from .export import CYCLE, cycle_in, metadata
from .shards import newest_at


@dataclass(frozen=True)
class TrainedNetwork:
    """What `load_network` gives.

    Attributes:
        network: in float32, on the CPU, for evaluation; it refuses other boundaries than it was trained with.
        contract: its variables with units and statistics, its forcings and its grid.
        step: of its training.
        cycle: of the variables that it sees without it (those with ``harmonics``), on the whole grid.
    """

    network: FAConvLSTMNetwork
    contract: Contract
    step: int
    cycle: AnnualCycle

    def domain(self, mesh: ProcessMesh | None = None) -> Domain:
        """The grid that it was trained on, cut over the ranks of a mesh; default: all of it here."""
        return Domain(self.contract.grid, mesh)


def load_network(path: Path | str, *, kernels: str = "eager") -> TrainedNetwork:
    """From a run directory (its newest whole checkpoint), a checkpoint's directory, or an exported .safetensors file.

    Args:
        kernels: ``compiled`` is several times faster, and needs a C++ compiler.

    Raises:
        InputError: there is none, it is damaged, of another version, or says nothing of the network.
    """
    about, contract, weights, cycle = read_weights(Path(path))
    options = as_now(json.loads(about["network"])) | {"checkpoint_steps": 0}  # as nothing is trained
    if options["cell"] == "faconvlstm":
        options["kernels"] = kernels
    network = FAConvLSTMNetwork(**options)
    network.load_state_dict(weights)
    network.boundaries = contract.grid.boundaries
    return TrainedNetwork(network.eval(), contract, int(about["step"]), cycle)


Read = tuple[dict[str, str], Contract, dict[str, Tensor], AnnualCycle]


def read_weights(path: Path) -> Read:
    """What is said of a network (see `metadata`), its contract, its weights and its cycle; see `load_network`."""
    return _exported(path) if path.is_file() else _saved(path)


def _saved(path: Path) -> Read:
    checkpoint = newest_at(path)
    manifest = checkpoint.manifest()
    return metadata(manifest), manifest.contract, checkpoint.weights(), cycle_in(checkpoint, manifest.contract)


def _exported(path: Path) -> Read:
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read ({error}). Give a run_dir, a checkpoint's directory, or the .safetensors file that "
            f"`faconv checkpoint export` writes; a .pt file holds the tensors alone."
        ) from None
    try:
        contract = Contract.model_validate_json(about["contract"])
    except (KeyError, ValidationError):
        raise InputError(
            f"{path} says nothing of what its network was trained on: it was not written by this version's "
            f"`faconv checkpoint export`, which does. Export it again."
        ) from None
    prefix = f"{CYCLE}/"
    cycle = {name.removeprefix(prefix): weights.pop(name).numpy() for name in list(weights) if name.startswith(prefix)}
    whole = AnnualCycle(cycle, contract.globe)
    if whole.digest != contract.annual_cycle:
        raise InputError(
            f"{path} has not the annual cycle of {', '.join(contract.harmonics) or 'no variable'} that its network was "
            f"trained with: it was changed after it was written. Export it again."
        )
    return about, contract, weights, whole
