"""What segments cost: memory beside that of a shorter sequence without any, time beside the same sequence stored.

Of a layer whose output is used up where it is made (its gradient is given), and of a network of two with its losses.
Peaks come first, while the process has no freed memory to use again; then all run in turn. Time is the processor's,
the kernel's for fresh memory included: other work on the machine changes it little.

On tiles, a rank each, all along a circle of latitude: what segments keep of other tiles, counted.

Run: python tools/bench_segments.py [--steps 32] [--segment 4] [--repeats 5] [--threads 1]
     torchrun --standalone --nproc-per-node 2 tools/bench_segments.py
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median
from typing import ClassVar, NamedTuple
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from faconv_hpc import Domain, FAConvLSTM2d, FAConvLSTMNetwork, LatLonGrid, ProcessMesh
from faconv_hpc.autograd import Context, Operation
from faconv_hpc.bench.timing import Work, interleaved, peak_bytes
from faconv_hpc.model.segments import Segments
from faconv_hpc.spatial.environment import RankEnvironment
from faconv_hpc.spatial.tape import Started, Tape
from faconv_hpc.spread import Spread

GRID, INPUTS, HIDDEN, LAYERS, ATTENTION = LatLonGrid(96, 192), 16, 64, 2, (0, 4)
PEAKS = 3  # of which the last two count: the first builds and loads what computes
CPU = torch.device("cpu")


class Case(NamedTuple):
    """What is measured."""

    part: str
    attention_every: int
    steps: int
    segment: int

    @property
    def module(self) -> str:
        """For a row."""
        attention = f"attention every {self.attention_every}" if self.attention_every else "no attention"
        return f"{self.part}, {attention}"


class Used(Operation):
    """A number made of an output, whose gradient is one that is there already."""

    @staticmethod
    def forward(ctx: Context, out_BTCYX: Tensor, grad_BTCYX: Tensor) -> Tensor:
        ctx.grad_BTCYX = grad_BTCYX
        return out_BTCYX.new_zeros(())

    @staticmethod
    def backward(ctx: Context, _: Tensor) -> tuple[Tensor, None]:
        return ctx.grad_BTCYX, None


def processor_s(*works: Work) -> list[float]:
    """Of each of some works, one after the other."""
    marks = [time.process_time()]
    for work in works:
        work()
        marks.append(time.process_time())
    return [after - before for before, after in pairwise(marks)]


def run_layer(layer: nn.Module, domain: Domain, case: Case, x_BTCYX: Tensor, grad_BTCYX: Tensor) -> list[float]:
    """The processor's seconds of a forward and a backward."""
    cut = Segments(case.segment, domain)

    def segment(x: Tensor, grad: Tensor, state: object, first_step: int) -> tuple[Tensor, object]:
        out, state = layer(x, state, domain=domain, first_step=first_step)
        return Used.call(out, grad), state

    parts: list[Tensor] = []

    def forward() -> None:
        state = None
        for (start, x), (_, grad) in zip(cut.of(x_BTCYX), cut.of(grad_BTCYX), strict=True):
            used, state = cut.computed(segment, x, grad, state, start)
            parts.append(used)

    seconds = processor_s(forward, lambda: torch.stack(parts).sum().backward())
    layer.zero_grad(set_to_none=True)
    x_BTCYX.grad = None
    return seconds


def run_network(network: FAConvLSTMNetwork, domain: Domain, case: Case, x: Tensor, target: Tensor) -> list[float]:
    """The processor's seconds of a forward and a backward."""
    network.checkpoint_steps = case.segment
    losses: list[Tensor] = []

    def forward() -> None:
        output = network(x, torch.zeros(1, case.steps), domain=domain)
        losses.append(network.losses(output, x, target, domain).total.objective)

    seconds = processor_s(forward, lambda: losses[0].backward())
    network.zero_grad(set_to_none=True)
    return seconds


def works(steps: int, segment: int) -> dict[Case, Callable[[], list[float]]]:
    """What runs in turn: two segments' steps stored, all steps stored, and all in segments."""
    found: dict[Case, Callable[[], list[float]]] = {}
    domain = Domain(GRID)
    for every in ATTENTION:
        torch.manual_seed(0)
        layer = FAConvLSTM2d(INPUTS, HIDDEN, attention_every=every, kernels="compiled")
        network = FAConvLSTMNetwork(INPUTS, INPUTS, HIDDEN, LAYERS, attention_every=every, kernels="compiled")
        for length, cut in ((2 * segment, 0), (steps, 0), (steps, segment)):
            x, target, grad = (torch.randn(1, length, size, GRID.nlat, GRID.nlon) for size in (INPUTS, INPUTS, HIDDEN))
            one, many = Case("layer", every, length, cut), Case("network", every, length, cut)
            found[one] = partial(run_layer, layer, domain, one, x.clone().requires_grad_(), grad)
            found[many] = partial(run_network, network, domain, many, x, target)
    return found


class CountedTape(Tape):
    """Counts what it keeps, by what it is of."""

    kept: ClassVar[Counter[str]] = Counter()
    KINDS: ClassVar = {
        dict: "halos",
        list: "attention",
        Tensor: "means",
    }

    def started(self, start: Callable[[], Started[object]]) -> Started[object]:
        """As a tape."""
        finish: Started[object] = super().started(start)
        if self._replaying:
            return finish

        def counted() -> object:
            received = finish()
            self.kept[self.KINDS[type(received)]] += kept_bytes(received)
            return received

        return counted


def kept_bytes(received: object) -> int:
    """Of all memory that its tensors hold."""
    found: dict[int, int] = {}
    left = [received]
    while left:
        one = left.pop()
        if isinstance(one, Tensor):
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        else:
            left += one.values() if isinstance(one, dict) else one
    return sum(found.values())


def on_tiles(steps: int, segment: int) -> None:
    """Prints what tapes keep of a network on this rank, the first one's, beside the states of its segments."""
    mesh = ProcessMesh.start(lon=RankEnvironment.world_size_hint(), device="cpu")
    domain = Domain(GRID, mesh)
    x_BTCYX = torch.randn(1, steps, INPUTS, *domain.tile.shape)
    states = -(-steps // segment) * LAYERS * 2 * HIDDEN * domain.tile.shape[0] * domain.tile.shape[1] * 4
    kinds = [*CountedTape.KINDS.values()]
    title = f"kept of a network's {steps} steps in segments of {segment} on each of {mesh.tiles} tiles [MiB]"
    table = table_of(title, "", *kinds, "h and c")
    for every, exchange in ((0, "auto"), (4, "gather"), (4, "swap")):
        torch.manual_seed(0)
        options = {"attention_every": every, "attention_exchange": exchange, "checkpoint_steps": segment}
        network = FAConvLSTMNetwork(INPUTS, INPUTS, HIDDEN, LAYERS, kernels="compiled", **options)
        CountedTape.kept.clear()
        with patch("faconv_hpc.spatial.domain.Tape", CountedTape):
            network(x_BTCYX, torch.zeros(1, steps), domain=domain)
        numbers = [CountedTape.kept[kind] for kind in kinds] + [states]
        attention = f"attention every {every}, {exchange}" if every else "no attention"
        table.add_row(attention, *(f"{one / 2**20:.2f}" for one in numbers))
    if mesh.rank == 0:
        Console(width=120).print(table)
    mesh.stop()


def table_of(title: str, *columns: str) -> Table:
    """Text, then numbers."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 32), ("segment", 4), ("repeats", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if RankEnvironment.world_size_hint() > 1:
        on_tiles(given.steps, given.segment)
        return
    everything = works(given.steps, given.segment)
    short, cut = 2 * given.segment, f"in segments of {given.segment}"
    console, rows = Console(), [case for case in everything if case.segment]

    with console.status("memory"):
        peaks = {
            case: median([peak_bytes(work, CPU) or 0 for _ in range(PEAKS)][1:]) for case, work in everything.items()
        }
    table = table_of("peak [MiB]", "", f"{short} steps", f"{given.steps} steps", cut, f"over {short} steps")
    for case in rows:
        least, stored = (peaks[case._replace(steps=steps, segment=0)] for steps in (short, given.steps))
        mib = [f"{one / 2**20:.0f}" for one in (least, stored, peaks[case])]
        table.add_row(case.module, *mib, f"{peaks[case] / least:.2f}")
    console.print(table)

    timings = {case: work for case, work in everything.items() if case.steps == given.steps}
    with console.status("warming up") as status:
        seconds = interleaved(timings, given.repeats, status.update)
    table = table_of(
        "a time step [ms of the processor], medians", "", "stored", "of it forward", cut, "over stored", "middle half"
    )
    for case in rows:
        stored, again = seconds[case._replace(segment=0)], seconds[case]
        ratio = Spread.of([sum(one) / sum(other) for one, other in zip(again, stored, strict=True)])
        figures = [median(map(sum, stored)), median(one[0] for one in stored), median(map(sum, again))]
        ms = [f"{one / given.steps * 1e3:.1f}" for one in figures]
        table.add_row(case.module, *ms, f"{ratio.median:.2f}", f"{ratio.quartile_1:.2f} to {ratio.quartile_3:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
