"""How much of a message's time a layer hides: forward and backward on two ranks where halos take longer than here.

Run: OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 tools/bench_latency.py 2x1

Every exchange ends so many milliseconds after it began at the earliest, as on a network that is slower than a machine's
memory. Whoever waits for it sleeps: it takes no processor.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from faconv_hpc.config import MeshConfig
from faconv_hpc.model.layer import FAConvLSTM2d
from faconv_hpc.spatial.domain import Domain
from faconv_hpc.spatial.exchange import HaloExchange, Received
from faconv_hpc.spatial.grid import LatLonGrid
from faconv_hpc.spatial.mesh import ProcessMesh

LATENCIES_MS = (0, 2, 4, 6)
STEPS, INPUTS, HIDDEN, GRID = 6, 10, 32, (181, 360)


class Slow:
    """Exchanges that take a while."""

    def __init__(self) -> None:
        self.latency_s, self._start = 0.0, HaloExchange._start
        HaloExchange._start = lambda *given: self._started(*given)  # type: ignore[method-assign]

    def _started(self, *given: Any) -> Callable[[], Received]:
        there_at, finish = time.perf_counter() + self.latency_s, self._start(*given)

        def wait() -> Received:
            received = finish()
            time.sleep(max(there_at - time.perf_counter(), 0.0))
            return received

        return wait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mesh", help="LATxLON, as many tiles as ranks")
    parser.add_argument("--repeats", type=int, default=25)
    given = parser.parse_args()
    tiles = MeshConfig.parse(given.mesh)
    mesh, slow = ProcessMesh.start(replicas=1, lat=tiles.lat, lon=tiles.lon), Slow()
    domain = Domain(LatLonGrid(*GRID), mesh)
    layer = FAConvLSTM2d(INPUTS, HIDDEN, attention_every=0, kernels="compiled")
    x_BTCYX = torch.randn(1, STEPS, INPUTS, *domain.tile.shape)
    found: dict[int, list[tuple[float, float]]] = {latency: [] for latency in LATENCIES_MS}
    for repeat in range(given.repeats + 2):
        for latency, times in found.items():
            slow.latency_s = latency / 1e3
            mesh.gathered([0.0])  # all ranks begin at once
            marks = [time.perf_counter()]
            out_BTCYX, _ = layer(x_BTCYX, domain=domain)
            marks.append(time.perf_counter())
            out_BTCYX.sum().backward()
            marks.append(time.perf_counter())
            if repeat >= 2:
                times.append((marks[1] - marks[0], marks[2] - marks[1]))
    if mesh.rank == 0:
        table = Table(
            "an exchange takes [ms]", "forward [ms]", "backward [ms]", title=f"{STEPS} steps, mesh {given.mesh}"
        )
        for latency, times in found.items():
            table.add_row(f"{latency}", *(f"{1e3 * median(one):.1f}" for one in zip(*times, strict=True)))
        Console().print(table)
    mesh.stop()


if __name__ == "__main__":
    main()
