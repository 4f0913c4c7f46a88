"""From a config to the parts of a run: store, grid, samples, network. Used by training and evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import ModelConfig, RunConfig
from ..data.annual_cycle import AnnualCycle
from ..data.climatology import Climatology
from ..data.fields import StoreFields
from ..data.order import Chained, Order, Shuffled
from ..data.samples import Windows
from ..data.store import Store
from ..data.variables import Channels
from ..files import cannot_write, write_durably
from ..model.arithmetic import ACTIVATIONS
from ..model.kernels import kernels_named
from ..model.network import FAConvLSTMNetwork
from ..model.rules import CELL_OPTIONS, ON_THE_SPHERE, globe_of
from ..observe import READING
from ..spatial.collectives import at_least_float32
from ..spatial.domain import Domain
from ..spatial.grid import LatLonGrid, Tile
from ..spatial.mesh import ProcessMesh
from .contract import Contract, make_contract
from .fit import block_of, forecast_starts, training_starts
from .seen import annual_cycle_of


@dataclass(frozen=True)
class Workspace:
    """What every rank of a run works with."""

    config: RunConfig
    store: Store
    contract: Contract
    domain: Domain
    cycle: AnnualCycle = field(default_factory=AnnualCycle)
    """Of the fields that the network sees without it; its tile holds this rank's."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        store: Store,
        mesh: ProcessMesh,
        contract: Contract | None = None,
        before: Contract | None = None,
        kept: Path | None = None,
    ) -> "Workspace":
        """Cuts the store's grid over the mesh. Collective.

        Args:
            contract: of a run that has begun; the store is held to it. Default: one is made of config and store.
            before: of the network whose weights it begins with; see `make_contract`.
            kept: the file of the annual cycle on the whole grid; it is written if a contract is made.

        Raises:
            InputError: the store's data are not what the contract says.
        """
        if contract is None:
            whole = annual_cycle_of(config, store, mesh)
            contract = make_contract(config, store, mesh, before, whole)
            domain = domain_of(config.model, contract.grid, mesh)
            if whole.coefficients and kept is not None and mesh.rank == 0:
                try:
                    write_durably(kept, whole.content())
                except OSError as error:
                    raise cannot_write("run_dir", kept.parent, error) from None
            return cls(config, store, contract, domain, whole.part(domain.tile))
        contract.check(store)
        domain = domain_of(config.model, contract.grid, mesh)
        names = list(contract.harmonics)
        assert kept is not None or not names, "a network that sees anomalies has a file of what they depart from"
        cycle = AnnualCycle.read(kept, names, domain.tile) if kept is not None and names else AnnualCycle()
        return cls(config, store, contract, domain, cycle)

    @property
    def within(self) -> Domain:
        """The domain that layers compute on."""
        return self.domain.coarsened(block_of(self.config.model))

    @property
    def training_spans(self) -> tuple[range, ...]:
        """The frames of the store at the dates of training."""
        return self.contract.training_spans(self.store)

    def training_windows(self, tile: Tile | None = None) -> Windows:
        """The samples of training: ``data.window`` inputs, and those for as many leads as any step is trained for."""
        length, leads = self.config.data.window, self.config.training.most_leads
        starts = training_starts(self.store, self.training_spans, length, leads)
        return self.windows(starts, length + leads - 1, tile)

    def forecast_windows(self, dates: Sequence[str], leads: int) -> Windows:
        """Windows and the leads after them, which are frames of a period, or any where it names none.

        A sample is of ``data.window + leads - 1`` inputs.

        Raises:
            InputError: the store has no such frames with a window before them.
        """
        length = self.config.data.window
        return self.windows(forecast_starts(self.store, dates, length, leads), length + leads - 1)

    def climatology(self) -> Climatology:
        """Of what is forecast, at the dates of training, on this rank's tile; reads."""
        with self.domain.mesh.activity.during(READING):
            names = tuple(one.name for one in self.contract.channels.targets)
            fields = StoreFields(self.store, names, range(self.store.frames))
            return Climatology.of(fields, self.training_spans, self.domain.tile)

    def windows(self, starts: NDArray[np.int64], length: int, tile: Tile | None = None) -> Windows:
        """Samples of this rank's tile, or of another, which must lie in it."""
        tile = tile or self.domain.tile
        return Windows(
            self.store,
            tile,
            channels=self.contract.channels,
            window=length,
            starts=starts,
            grid=self.domain.grid,
            cycle=self.cycle.part(tile),
        )


def domain_of(model: ModelConfig, grid: LatLonGrid, mesh: ProcessMesh) -> Domain:
    """The grid, cut over a mesh as the network needs it."""
    return Domain(grid, mesh, block=block_of(model))


WAYS = ("kernels", "checkpoint_steps", "attention_exchange")
"""Keys of a model section that are other ways to the same numbers."""


def build_network(config: RunConfig, channels: Channels, grid: LatLonGrid | None = None) -> FAConvLSTMNetwork:
    """The network of the config, drawn from its seed: the same on every rank and every mesh; see `network_options`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        return FAConvLSTMNetwork(**network_options(config.model, channels, grid))


def network_options(model: ModelConfig, channels: Channels, grid: LatLonGrid | None = None) -> dict[str, Any]:
    """Arguments of `FAConvLSTMNetwork`; plain values, as JSON can hold.

    Args:
        grid: cells of `ON_THE_SPHERE` alone are bound to it.
    """
    sizes: dict[str, Any] = {
        "in_channels": len(channels.inputs),
        "field_channels": len(channels.prognostic),
        "diagnostic_channels": len(channels.diagnostic),
    }
    if model.history > 1:
        sizes["past_channels"] = channels.remembered
    if model.cell in ON_THE_SPHERE:
        assert grid is not None, f"a network of cell={model.cell} is bound to a grid"
        sizes["globe"] = globe_of(model.cell, grid)
    return sizes | model_options(model)


def model_options(model: ModelConfig) -> dict[str, Any]:
    """What of a model section counts for its network; the rest belongs to another cell, or to attention without any."""
    kept = {
        "hidden_channels", "layers", "embedding_channels", "embedding_past", "embedding_leads", "embedding_weight",
        "seasonal_encoding", "coarse_shape", "checkpoint_steps", "cell", "residual", *CELL_OPTIONS[model.cell],
    }  # fmt: skip
    if model.history > 1:
        kept |= {"history"}
    if model.scale_factor > 1:
        kept |= {"scale_factor"}
    if model.attends:
        kept |= {"attention_heads", "attention_reduction", "attention_exchange"}
    return model.model_dump(include=kept)


def kernels_of(config: RunConfig, device: str) -> str:
    """What computes the passes of the run's layers on a device of this type, as `kernels_named` says it."""
    activations = ACTIVATIONS[config.training.precision]
    return kernels_named(config.model.kernels, device, activations, at_least_float32(activations))


def order_of(config: RunConfig, windows: Windows) -> Order:
    """Which of the windows each sample of each step is."""
    training, batch = config.training, config.global_batch
    if not training.stateful_windows:
        return Shuffled(training.seed, len(windows), batch)
    return Chained(training.seed, windows.starts, config.data.window, batch, training.stateful_windows)


def places_of(config: RunConfig, micro: int, replica: int) -> range:
    """Which samples of a step one micro-batch of a replica has.

    The ``global_batch`` places are dealt to micro-batches, then replicas, then samples, so that a step sees the same
    samples on every mesh with the same global batch.
    """
    training = config.training
    first = (micro * config.mesh.replicas + replica) * training.micro_batch
    return range(first, first + training.micro_batch)
