"""Compiled passes beside eager ones on one tile of the quick start, one thread: medians in milliseconds.

Run: python tools/bench_kernels.py
"""

import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from faconv_hpc.model.kernels import kernels_for
from faconv_hpc.model.taps import Gates, Taps

ROWS, COLUMNS, BOTTLENECK, HIDDEN, RUNS = 181, 180, 32, 32, 9


def median_ms(work: Callable[[], object]) -> float:
    """Median of `RUNS` timed calls, after one that is not counted."""
    work()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[RUNS // 2] * 1e3


def measure(mode: str) -> dict[str, float]:
    """The passes of a step (three dilations, 25 taps), forward and backward."""
    taps = Taps.of(3, (1, 2, 4))
    padded = torch.randn(1, BOTTLENECK, ROWS + 2 * taps.reach, COLUMNS + 2 * taps.reach)
    framed = torch.randn(1, BOTTLENECK, ROWS + 4 * taps.reach, COLUMNS + 4 * taps.reach)
    mixed, grad_padded = torch.randn(1, BOTTLENECK, ROWS, COLUMNS), torch.empty_like(padded)
    weight = torch.randn(1, BOTTLENECK, len(taps.offsets))
    h, c, after = torch.randn(3, 1, HIDDEN, ROWS, COLUMNS).unbind()
    room = mixed.clone()
    gates = Gates(torch.randn(4 * HIDDEN, BOTTLENECK) * 0.2, torch.randn(4 * HIDDEN), torch.randn(3, HIDDEN))
    kernels = kernels_for(mode, h, c)
    passes = {
        "mixing": lambda: kernels.mix(mixed, padded, weight, taps.offsets),
        "adjoint of mixing": lambda: kernels.mix(grad_padded, framed, weight, taps.mirrored),
        "gradient of kernels": lambda: kernels.mix_weights(padded, mixed, taps.offsets),
        "expansion and gates": lambda: kernels.advance(h, after, mixed, c, gates),
        "their gradients": lambda: kernels.retreat(room.copy_(mixed), after, c, gates, h, c),
    }
    with torch.no_grad():
        return {name: median_ms(work) for name, work in passes.items()}


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    eager, compiled = measure("eager"), measure("compiled")
    table = Table(title=f"{ROWS} x {COLUMNS} cells, {BOTTLENECK} and {HIDDEN} channels, float32, one thread")
    for column in ("pass", "eager [ms]", "compiled [ms]", "eager / compiled"):
        table.add_column(column, justify="left" if column == "pass" else "right")
    for name, slow in eager.items():
        table.add_row(name, f"{slow:.2f}", f"{compiled[name]:.2f}", f"{slow / compiled[name]:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
