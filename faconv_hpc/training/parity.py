"""Proves for a user's own config and data that tiles give the same numbers as one tile."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import MeshConfig, RunConfig
from ..data.samples import Batch, Windows
from ..data.store import Store
from ..errors import InputError
from ..model.arithmetic import arithmetic
from ..model.network import FAConvLSTMNetwork
from ..spatial.grid import Cuts, LatLonGrid
from ..spatial.mesh import ProcessMesh
from .contract import make_contract
from .engine import Engine
from .fit import block_of, grid_of
from .free_run import feedback_for
from .objective import losses_of
from .seen import annual_cycle_of
from .setup import Workspace, build_network, domain_of

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}
ROUNDINGS = 4  # a float32 result may also differ by so many times what one tile itself is away from float64
FIELD_DIMS = 5  # (B, T, C, Y, X)
GRADIENT, UPDATE = "gradient of ", "update of "
WEIGHT_SCALE = 0.5  # of the random part added to every weight, so that nothing is zero or one


@dataclass(frozen=True)
class ParityRow:
    """One quantity on tiles beside one tile; difference and tolerance are relative to its largest value.

    Sums that cancel to a thousandth of their terms lose three more digits however they are added up (a gradient
    through an activation whose slope is near 0). So where float32 differs by more than its tolerance, that becomes
    4 times the distance of one tile's own float32 result from its float64 result, if this is more.

    ``first`` says where the first difference beyond the tolerance lies, if there is one in a field.
    """

    layout: str
    quantity: str
    difference: float
    tolerance: float
    first: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; a NaN is not."""
        return self.difference <= self.tolerance


Values = dict[str, Tensor]
"""What is compared: values of the whole grid, and gradients summed over tiles."""


def layouts_of(ranks: int, grid: LatLonGrid, block: int = 1) -> list[MeshConfig]:
    """All arrangements of so many tiles, of squares of so many cells along a side, that fit a grid, one tile along lat
    first.

    Raises:
        InputError: there is none.
    """
    every = [MeshConfig(lat=lat, lon=ranks // lat) for lat in range(1, ranks + 1) if ranks % lat == 0]
    fitting = [one for one in every if one.lat <= -(-grid.nlat // block) and one.lon <= -(-grid.nlon // block)]
    if not fitting:
        raise InputError(
            f"no arrangement of {ranks} ranks fits a grid of {grid.nlat} x {grid.nlon} cells. Use fewer ranks."
        )
    return fitting


def check_layout(layout: MeshConfig, ranks: int, grid: LatLonGrid, block: int = 1) -> None:
    """Raises InputError unless there is something to compare and the layout fits ranks and grid."""
    if layout.ranks == 1:
        raise InputError(
            "one rank has nothing to compare: tiles beside one tile need two ranks at least. "
            "Use --ranks 2 or more, or --layout 1x2."
        )
    if layout.ranks != ranks:
        raise InputError(
            f"the layout {layout} needs {layout.ranks} ranks, there are {ranks}. Leave --ranks out, and "
            f"`faconv verify` starts as many as each layout needs; or name layouts of {ranks} ranks."
        )
    Cuts.even(grid, layout.lat, layout.lon, block)  # or says which side has too few cells


def verify_parity(
    config: RunConfig,
    mesh: ProcessMesh,
    dtype: torch.dtype = torch.float32,
    layouts: Sequence[MeshConfig] | None = None,
) -> list[ParityRow]:
    """Runs one tile on the first rank and every layout on all ranks, and compares. Collective.

    The network is the config's, its weights random. Values and gradients are those of the first window of the
    store; for the update replica r takes window r, and the reference is the mean of the windows' gradients on
    one tile. The rows are those of every rank. One tile must fit the memory of the first rank, and the others
    wait for it.

    Args:
        config: its mesh is not used.
        mesh: all ranks of the job.
        dtype: float32 (differences up to 1e-5 pass, see ParityRow) or float64 (1e-12).
        layouts: each of as many ranks as the job has. Default: all of one replica that fit the grid.

    Raises:
        InputError: there is one rank only, a layout of another number of ranks, or one that does not fit the grid.
    """
    store = Store.open(config.data.store)
    grid = grid_of(config, store)
    cycle = annual_cycle_of(config, store, mesh)
    contract = make_contract(config, store, mesh, cycle=cycle)
    alone = ProcessMesh.alone(mesh.device)
    reference = _Reference(Workspace(config, store, contract, domain_of(config.model, contract.grid, alone), cycle))
    rows: list[ParityRow] = []
    block = block_of(config.model)
    for layout in layouts_of(mesh.ranks, grid, block) if layouts is None else layouts:
        check_layout(layout, mesh.ranks, grid, block)
        sizes = (layout.replicas, layout.lat, layout.lon)
        arranged = ProcessMesh.arrange(mesh.job_ranks, *sizes, device=mesh.device, watch=mesh.watch)
        assert arranged is not None, f"rank {mesh.rank} is not part of {layout}"
        workspace = Workspace(config, store, contract, domain_of(config.model, contract.grid, arranged), cycle)
        with arithmetic("fp32", mesh.device):
            got = _results(workspace, dtype)
            if dtype == torch.float32:
                got |= _update(workspace)
            if mesh.rank == 0:
                want = reference.values(dtype, layout.replicas)
                rows += _compared(workspace, got, want, dtype, reference)
    return mesh.from_first(rows)


class _Reference:
    """What one tile computes; each window once in a type."""

    def __init__(self, alone: Workspace) -> None:
        self._alone = alone
        self._windows: dict[tuple[torch.dtype, int], Values] = {}

    def values(self, dtype: torch.dtype, replicas: int) -> Values:
        """Of window 0, and of the update that so many replicas make together."""
        values = dict(self._window(dtype, 0))
        if dtype == torch.float32:
            gradients = [self._window(dtype, replica) for replica in range(replicas)]
            for name in [name for name in values if name.startswith(GRADIENT)]:
                mean = torch.stack([one[name] for one in gradients]).mean(0)
                values[UPDATE + name.removeprefix(GRADIENT)] = mean.cpu()
        return values

    def rounding(self, names: Sequence[str]) -> float:
        """How far the float32 values of window 0 are from those in float64, the farthest of these quantities."""
        rough, fine = self._window(torch.float32, 0), self._window(torch.float64, 0)
        of_window = [name.replace(UPDATE, GRADIENT) for name in names]
        return max(float((rough[name] - fine[name]).abs().max()) for name in of_window)

    def _window(self, dtype: torch.dtype, number: int) -> Values:
        if (dtype, number) not in self._windows:
            self._windows[dtype, number] = _results(self._alone, dtype, number)
        return self._windows[dtype, number]


def _update(workspace: Workspace) -> Values:
    """What one SGD step of DeepSpeed at the config's ZeRO stage, learning rate 1, changes of each weight."""
    changes: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "clip_norm": 0.0}
    changes |= {"micro_batch": 1, "accumulation": 1, "precision": "fp32"}
    windows = workspace.training_windows()
    network = _randomized(build_network(workspace.config, windows.channels, workspace.contract.grid), torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    engine = Engine(network, workspace.domain.mesh, workspace.config.training.model_copy(update=changes))
    batch = _window(workspace, windows, workspace.domain.mesh.replica)
    config, domain = workspace.config, workspace.domain
    feedback = feedback_for(batch, config.data.window, through=config.training.through_leads)
    output = engine.forward(batch.inputs_BTCYX, batch.year_fraction_BT, domain, feedback=feedback)
    engine.backward(losses_of(network, output, batch, domain, config.training.lead_weights).total)
    engine.step(1.0)
    return {f"{UPDATE}{name}": before[name] - after for name, after in engine.full_parameters()}


def _window(workspace: Workspace, windows: Windows, number: int) -> Batch:
    """A window of the store; from the first again where there are fewer."""
    return windows.read([number % len(windows)]).to(workspace.domain.mesh.device)


def _results(workspace: Workspace, dtype: torch.dtype, number: int = 0) -> Values:
    """Loss, outputs and gradients of one window, assembled from all tiles."""
    domain = workspace.domain
    windows = workspace.training_windows()
    network = _randomized(build_network(workspace.config, windows.channels, domain.grid), dtype).to(domain.mesh.device)
    batch = _window(workspace, windows, number)
    inputs = batch.inputs_BTCYX.to(dtype).requires_grad_()
    batch = replace(batch, inputs_BTCYX=inputs, target_BTCYX=batch.target_BTCYX.to(dtype))
    training = workspace.config.training
    feedback = feedback_for(batch, workspace.config.data.window, through=training.through_leads)
    output = network(inputs, batch.year_fraction_BT, domain=domain, feedback=feedback)
    loss = losses_of(network, output, batch, domain, training.lead_weights).total
    named = dict(network.named_parameters())
    share = loss.objective / domain.tiles
    gradients = torch.autograd.grad(share, [inputs, *named.values()], materialize_grads=True)
    values = {
        "loss": loss.value,
        "output": domain.assemble(output.forecast_BTCYX.detach()),
        "embedding": output.embedding_BTE.detach(),
        "input gradient": domain.assemble(gradients[0]),
    }
    for name, gradient in zip(named, gradients[1:], strict=True):
        values[f"{GRADIENT}{name}"] = domain.total(gradient)
    return values


def _compared(
    workspace: Workspace, got: Values, want: Values, dtype: torch.dtype, reference: _Reference
) -> Iterator[ParityRow]:
    """One row per quantity; parameters by the module they belong to, updates all together."""
    groups: dict[str, list[str]] = {}
    for name in got:
        group = f"update (ZeRO {workspace.config.training.zero_stage})" if name.startswith(UPDATE) else name
        groups.setdefault(group.rpartition(".")[0] or group, []).append(name)
    mesh = workspace.domain.mesh
    layout = MeshConfig(replicas=mesh.replicas, lat=mesh.lat, lon=mesh.lon)
    for group, names in groups.items():
        scale = max(max(float(want[name].abs().max()) for name in names), 1e-30)
        difference = torch.stack([(got[name] - want[name]).abs().max() for name in names]).max()
        row = ParityRow(str(layout), group, float(difference) / scale, TOLERANCES[dtype])
        if not row.passed and dtype == torch.float32:
            row = replace(row, tolerance=max(row.tolerance, ROUNDINGS * reference.rounding(names) / scale))
        is_field = not row.passed and got[names[0]].dim() == FIELD_DIMS
        place = _place(workspace, group, got[names[0]], want[names[0]], row.tolerance) if is_field else ""
        yield replace(row, first=place)


def _place(workspace: Workspace, quantity: str, got: Tensor, want: Tensor, tolerance: float) -> str:
    """Where the first value lies that differs: step, channel, row and column, and the rank that owns the cell."""
    cuts = workspace.domain.cuts
    wrong = ~((got - want).abs() <= tolerance * want.abs().max())  # a NaN is wrong
    _, step, channel, row, column = wrong.nonzero()[0].tolist()
    lat_index = bisect_right(cuts.row_edges, row) - 1
    lon_index = bisect_right(cuts.column_edges, column) - 1
    channels = workspace.contract.channels
    names = channels.inputs if quantity == "input gradient" else [one.name for one in channels.targets]
    return f"rank {lat_index * cuts.lon + lon_index}, {names[channel]}, step {step}, row {row}, column {column}"


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
