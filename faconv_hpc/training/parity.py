"""Proves for a user's own config and data that tiles give the same numbers as one tile."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import RunConfig
from ..data.store import Store
from ..errors import InputError
from ..model.network import FAConvLSTMNetwork
from ..spatial.domain import Domain
from ..spatial.mesh import ProcessMesh
from .setup import Workspace, build_network, grid_of

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}
WEIGHT_SCALE = 0.5  # of the random part added to every weight, so that nothing is zero or one


@dataclass(frozen=True)
class ParityRow:
    """One quantity on tiles beside one tile; the difference is relative to its largest value."""

    layout: str
    quantity: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; a NaN is not."""
        return self.difference <= self.tolerance


Values = dict[str, Tensor]
"""What is compared: values of the whole grid, and gradients summed over tiles."""


def layouts_of(ranks: int) -> list[tuple[int, int]]:
    """All (lat, lon) with so many tiles, one tile along lat first."""
    return [(lat, ranks // lat) for lat in range(1, ranks + 1) if ranks % lat == 0]


def verify_parity(config: RunConfig, mesh: ProcessMesh, dtype: torch.dtype = torch.float32) -> list[ParityRow]:
    """Runs one tile on the first rank and every layout of all ranks, and compares. Collective.

    The network is the config's, its weights random; the sample is the first window of the store. The
    rows are those of every rank. One tile must fit the memory of the first rank, and the others wait for it.

    Args:
        config: its mesh is not used.
        mesh: all ranks of the job.
        dtype: float32 (differences up to 1e-5 pass) or float64 (1e-12).

    Raises:
        InputError: there is one rank only, or no layout of so many ranks fits the grid.
    """
    if mesh.ranks == 1:
        raise InputError(
            "one rank has nothing to compare: tiles beside one tile need two ranks at least. Use --ranks 2 or more."
        )
    store = Store.open(config.data.store)
    grid = grid_of(config, store)
    fitting = [(lat, lon) for lat, lon in layouts_of(mesh.ranks) if lat <= grid.nlat and lon <= grid.nlon]
    if not fitting:
        raise InputError(
            f"no arrangement of {mesh.ranks} ranks fits a grid of {grid.nlat} x {grid.nlon} cells. Use fewer ranks."
        )
    alone = Domain(grid, replace(ProcessMesh.alone(), device=mesh.device))
    want = _results(Workspace(config, store, alone), dtype) if mesh.rank == 0 else None
    rows: list[ParityRow] = []
    for lat, lon in fitting:
        arranged = ProcessMesh.arrange(mesh.job_ranks, 1, lat, lon, device=mesh.device, watch=mesh.watch)
        assert arranged is not None, f"rank {mesh.rank} is not part of {lat} x {lon}"
        got = _results(Workspace(config, store, Domain(grid, arranged)), dtype)
        if want is not None:
            rows += _compared(f"{lat}x{lon}", got, want, TOLERANCES[dtype])
    return mesh.from_first(rows)


def _results(workspace: Workspace, dtype: torch.dtype) -> Values:
    """Loss, outputs and gradients of one sample, assembled from all tiles."""
    domain = workspace.domain
    windows = workspace.windows(range(workspace.store.frames))
    network = _randomized(build_network(workspace.config, windows), dtype).to(domain.mesh.device)
    batch = windows.read([0]).to(domain.mesh.device)
    inputs = batch.inputs_BTCYX.to(dtype).requires_grad_()
    output = network(inputs, batch.year_fraction_BT, domain=domain)
    known = None if batch.known_BTCYX is None else batch.known_BTCYX.to(dtype)
    loss = network.loss(output, inputs, batch.target_BTCYX.to(dtype), domain, batch.valid_BTCYX, known)
    named = dict(network.named_parameters())
    share = loss.objective / domain.tiles
    gradients = torch.autograd.grad(share, [inputs, *named.values()], materialize_grads=True)
    values = {
        "loss": loss.value,
        "output": domain.assemble(output.tendency_BTCYX.detach()),
        "embedding": output.embedding_BTE.detach(),
        "input gradient": domain.assemble(gradients[0]),
    }
    for name, gradient in zip(named, gradients[1:], strict=True):
        values[f"gradient of {name}"] = domain.total(gradient)
    return values


def _compared(layout: str, got: Values, want: Values, tolerance: float) -> Iterator[ParityRow]:
    """One row per quantity; parameters by the module they belong to."""
    groups: dict[str, list[str]] = {}
    for name in want:
        groups.setdefault(name.rpartition(".")[0] or name, []).append(name)
    for group, names in groups.items():
        largest = max(float(want[name].abs().max()) for name in names)
        furthest = torch.stack([(got[name] - want[name]).abs().max() for name in names]).max()
        yield ParityRow(layout, group, float(furthest) / max(largest, 1e-30), tolerance)


def _randomized(network: FAConvLSTMNetwork, dtype: torch.dtype) -> FAConvLSTMNetwork:
    """The same random weights on every rank and mesh, drawn in float64."""
    generator = torch.Generator().manual_seed(1)
    network = network.to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = WEIGHT_SCALE / max(parameter.shape[-1], 1) ** 0.5
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((scale * noise).to(dtype))
    return network
