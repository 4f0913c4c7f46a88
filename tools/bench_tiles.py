"""What several ranks cost, side by side in one run: attention's two exchanges, and the comparison of weights.

A layer's exchanges: `faconv bench --ranks 2`.

Run: torchrun --standalone --nproc-per-node 2 tools/bench_tiles.py
"""

import os
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from faconv_hpc import Domain, FAConvLSTMNetwork, LatLonGrid, ProcessMesh
from faconv_hpc.config import TrainingConfig
from faconv_hpc.model.attention import AxialAttention, exchange_costs
from faconv_hpc.training.engine import Engine
from faconv_hpc.training.faults.drift import DriftCheck

GRID = LatLonGrid(181, 360)  # the quick start's, and its network
STEPS, FIELDS, INPUTS, HIDDEN, ATTENTION = 6, 5, 10, 32, 8
RUNS = 9


def median_s(work: Callable[[], object]) -> float:
    """Median of `RUNS` timed calls, after two that are not counted."""
    times = []
    for run in range(RUNS + 2):
        start = time.perf_counter()
        work()
        if run > 1:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def attention_s(domain: Domain, exchange: str) -> float:
    """Forward and backward of one axial attention."""
    torch.manual_seed(0)
    attention = AxialAttention(HIDDEN, exchange=exchange)
    h_BCYX = torch.randn(1, HIDDEN, *domain.tile.shape, requires_grad=True)
    return median_s(lambda: attention(h_BCYX, domain).square().sum().backward())


def step_and_comparison_s(domain: Domain, zero_stage: int) -> tuple[float, float]:
    """One training step, and one comparison of all weights over all ranks."""
    torch.manual_seed(0)
    network = FAConvLSTMNetwork(
        INPUTS, FIELDS, HIDDEN, 2, bottleneck_channels=HIDDEN, attention_every=6,
        kernels="compiled",
    )  # fmt: skip
    engine = Engine(network, domain.mesh, TrainingConfig(steps=100, zero_stage=zero_stage))
    x_BTCYX = torch.randn(1, STEPS, INPUTS, *domain.tile.shape)
    target_BTCYX, season_BT = torch.randn(1, STEPS, FIELDS, *domain.tile.shape), torch.zeros(1, STEPS)

    def step() -> None:
        output = engine.forward(x_BTCYX, season_BT, domain)
        engine.backward(network.losses(output, x_BTCYX, target_BTCYX, domain).total)
        engine.step(1e-3)

    drift = DriftCheck(network, domain.mesh, every=1)
    return median_s(step), median_s(lambda: drift.compare(0))


def attention_table(domain: Domain) -> Table:
    """Times of gather and swap along the mesh's axis, and what the cost rule counts."""
    axis = "lon" if domain.mesh.lon > 1 else "lat"
    lines = domain.tile.shape[0 if axis == "lon" else 1]
    costs = exchange_costs(lines, domain.cuts.sizes(axis), ATTENTION, torch.float32)
    table = Table(title=f"axial attention, {domain.mesh.lat} x {domain.mesh.lon} tiles of {GRID.nlat} x {GRID.nlon}")
    for column in ("exchange", "time [ms]", "moved [MB]", "held [MB]", "phases"):
        table.add_column(column, justify="left" if column == "exchange" else "right")
    for name, cost in costs.items():
        milliseconds = f"{attention_s(domain, name) * 1e3:.1f}"
        table.add_row(
            name, milliseconds, f"{cost.moved_bytes / 1e6:.2f}", f"{cost.held_bytes / 1e6:.2f}", f"{cost.phases}"
        )
    return table


def main() -> None:
    """Prints the tables on the first rank."""
    torch.set_num_threads(1)
    ranks = int(os.environ["WORLD_SIZE"])
    mesh = ProcessMesh.start(lon=ranks)
    with mesh.guarded():
        domain = Domain(GRID, mesh)
        table = Table(title="comparing all weights over all ranks, every 100 steps (the default)")
        for column in ("ZeRO", "step [ms]", "comparison [ms]", "share of 100 steps"):
            table.add_column(column, justify="right")
        for stage in (0, 1, 2, 3):
            step_s, comparison_s = step_and_comparison_s(domain, stage)
            share = comparison_s / (100 * step_s)
            table.add_row(str(stage), f"{step_s * 1e3:.0f}", f"{comparison_s * 1e3:.2f}", f"{share:.4%}")
        of_attention = attention_table(domain)
        if mesh.rank == 0:
            Console().print(of_attention, table)
    mesh.stop()


if __name__ == "__main__":
    main()
