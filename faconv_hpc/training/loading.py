"""A trained network and what it needs to be used, from a run, a checkpoint or an exported file."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ..config import MeshConfig
from ..data.annual_cycle import AnnualCycle
from ..errors import InputError
from ..model.network import FAConvLSTMNetwork
from ..model.rules import ON_THE_SPHERE, check_one_tile
from ..spatial.domain import Domain
from ..spatial.mesh import ProcessMesh
from .contract import Contract
from .export import CYCLE, cycle_in, metadata
from .manifest import Manifest
from .setup import WAYS
from .shards import Checkpoint, DamagedCheckpointError, checkpoints_at, newest_at


@dataclass(frozen=True)
class TrainedNetwork:
    """What `load_network` gives.

    Attributes:
        network: in float32, on the CPU, for evaluation; it refuses other boundaries than it was trained with.
        contract: its variables with units and statistics, its forcings and its grid.
        step: of its training.
        cycle: of the variables that it sees without it (those with ``harmonics``), on the whole grid.
        about: what else is said of it, see `metadata`; of a run's or a checkpoint's, ``store`` too.
    """

    network: FAConvLSTMNetwork
    contract: Contract
    step: int
    cycle: AnnualCycle
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def window(self) -> int:
        """How many inputs in a row it was trained on, which spin its state up.

        Raises:
            InputError: it was exported by a version that did not say so.
        """
        return window_of(self.about)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its weights, and of all that makes something of them: its architecture and its contract."""
        weights = {name: value.cpu().contiguous() for name, value in sorted(self.network.state_dict().items())}
        said = {"network": json.loads(self.about["network"]), "contract": self.contract.model_dump(mode="json")}
        for free in WAYS:
            said["network"].pop(free, None)
        return hashlib.sha256(save(weights) + json.dumps(said, sort_keys=True).encode()).hexdigest()

    def domain(self, mesh: ProcessMesh | None = None, block: int = 1) -> Domain:
        """The grid that it was trained on, cut over the ranks of a mesh; default: all of it here.

        Args:
            block: cells along a side of the squares that are not parted, besides its own.
        """
        return Domain(self.contract.grid, mesh, block=math.lcm(block, self.network.scale_factor))


def load_network(path: Path | str, *, kernels: str | None = "eager") -> TrainedNetwork:
    """From a run directory (its newest whole checkpoint), a checkpoint's directory, or an exported .safetensors file.

    Args:
        kernels: ``compiled`` is several times faster, and needs a C++ compiler; ``triton`` is for GPUs. None: those
            that it was trained with.

    Raises:
        InputError: there is none, it is damaged, of another version, or says nothing of the network.
    """
    about, contract, weights, cycle = read_weights(Path(path))
    options = json.loads(about["network"]) | {"checkpoint_steps": 0}  # as nothing is trained
    if "kernels" in options and kernels is not None:
        options["kernels"] = kernels
    network = FAConvLSTMNetwork(**options)
    network.load_state_dict(weights)
    network.boundaries = contract.grid.boundaries
    return TrainedNetwork(network.eval(), contract, int(about["step"]), cycle, about)


def check_tiles(about: Mapping[str, str], mesh: MeshConfig) -> None:
    """Raises InputError for a network that needs the whole globe on one tile, and a mesh that cuts it."""
    cell = json.loads(about.get("network", "{}")).get("cell", "")
    if cell in ON_THE_SPHERE:
        check_one_tile(cell, mesh.lat * mesh.lon)


def window_of(about: Mapping[str, str]) -> int:
    """Of what is said of a network; raises InputError where it does not say, see `TrainedNetwork.window`."""
    if "window" not in about:
        raise InputError(
            f"the network was exported by a version of faconv_hpc ({about.get('faconv_hpc', 'unknown')}) that did not "
            f"say how many inputs spin its state up. Export it again from its run: `faconv checkpoint export`."
        )
    return int(about["window"])


def about_network(path: Path) -> dict[str, str]:
    """What is said of a network (see `TrainedNetwork.about`), without reading its weights.

    Raises:
        InputError: as `load_network`, as far as can be told.
    """
    if path.is_file():
        return _metadata_in(path)
    found = [one for one in map(_manifest_of, reversed(checkpoints_at(path))) if one is not None]
    return _said_of(found[0]) if found else _said_of(newest_at(path).manifest())


def store_of(abouts: Sequence[Mapping[str, str]], models: Sequence[Path]) -> Path:
    """The store of the first run of several networks, by what is said of them.

    Raises:
        InputError: there is no run.
    """
    store = next((one["store"] for one in abouts if one.get("store")), None)
    if store is None:
        raise InputError(f"{models[0]} is no run, and brings no data. Name a store or files with --data.")
    return Path(store)


def _manifest_of(checkpoint: Checkpoint) -> Manifest | None:
    try:
        return checkpoint.manifest()
    except DamagedCheckpointError:
        return None


Read = tuple[dict[str, str], Contract, dict[str, Tensor], AnnualCycle]


def read_weights(path: Path) -> Read:
    """What is said of a network (see `metadata`), its contract, its weights and its cycle; see `load_network`."""
    return _exported(path) if path.is_file() else _saved(path)


def _saved(path: Path) -> Read:
    checkpoint = newest_at(path)
    manifest = checkpoint.manifest()
    return _said_of(manifest), manifest.contract, checkpoint.weights(), cycle_in(checkpoint, manifest.contract)


def _said_of(manifest: Manifest) -> dict[str, str]:
    return metadata(manifest) | {"store": str(manifest.config["data"]["store"])}


def _metadata_in(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read ({error}). Give a run_dir, a checkpoint's directory, or the .safetensors file that "
            f"`faconv checkpoint export` writes; a .pt file holds the tensors alone."
        ) from None


def contract_in(about: Mapping[str, str], path: Path | str = "the file") -> Contract:
    """What is said of a network's data; raises InputError where nothing is."""
    try:
        return Contract.model_validate_json(about["contract"])
    except (KeyError, ValidationError):
        raise InputError(
            f"{path} says nothing of what its network was trained on: it was not written by this version's "
            f"`faconv checkpoint export`, which does. Export it again."
        ) from None


def _exported(path: Path) -> Read:
    about = _metadata_in(path)
    contract = contract_in(about, path)
    if about.get("inputs") != json.dumps(contract.channels.inputs):
        raise InputError(
            f"{path} was exported by an older version of faconv_hpc ({about.get('faconv_hpc', 'unknown')}), whose "
            f"networks saw gaps in fields and squeezed otherwise. Install the version that exported it, or train anew."
        )
    prefix, weights = f"{CYCLE}/", load_file(path)
    cycle = {name.removeprefix(prefix): weights.pop(name).numpy() for name in list(weights) if name.startswith(prefix)}
    whole = AnnualCycle(cycle, contract.globe)
    if whole.digest != contract.annual_cycle:
        raise InputError(
            f"{path} has not the annual cycle of {', '.join(contract.harmonics) or 'no variable'} that its network was "
            f"trained with: it was changed after it was written. Export it again."
        )
    return about, contract, weights, whole
