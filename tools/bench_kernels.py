"""Compiled passes beside eager ones on one tile of the quick start, one thread: medians in milliseconds.

Run: python tools/bench_kernels.py
"""

import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from faconv_hpc.model.kernels import Taps, kernels_for

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
    """Forward and backward of mixing (three dilations, 25 taps) and of the gates."""
    kernels, taps = kernels_for(mode), Taps.of(3, (1, 2, 4))
    size = (ROWS + 2 * taps.reach, COLUMNS + 2 * taps.reach)
    u = torch.randn(1, BOTTLENECK, *size, requires_grad=True)
    weight = torch.randn(1, BOTTLENECK, len(taps.offsets), requires_grad=True)
    a = torch.randn(1, 4, HIDDEN, ROWS, COLUMNS, requires_grad=True)
    bias = torch.randn(4, HIDDEN, requires_grad=True)
    c = torch.randn(1, HIDDEN, ROWS, COLUMNS, requires_grad=True)
    peephole = torch.randn(3, HIDDEN, requires_grad=True)
    mixed, (h, c_new) = kernels.mix(u, weight, taps), kernels.gates(a, bias, c, peephole)
    grad, grad_h = torch.randn_like(mixed), torch.randn_like(h)
    return {
        "mixing forward": median_ms(lambda: kernels.mix(u, weight, taps)),
        "mixing backward": median_ms(lambda: torch.autograd.grad(mixed, (u, weight), grad, retain_graph=True)),
        "gates forward": median_ms(lambda: kernels.gates(a, bias, c, peephole)),
        "gates backward": median_ms(
            lambda: torch.autograd.grad((h, c_new), (a, bias, c, peephole), (grad_h, grad_h), retain_graph=True)
        ),
    }


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
