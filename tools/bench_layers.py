"""FAConvLSTM beside ConvLSTM, forward and backward of a sequence: medians in milliseconds, and peak memory.

All are run in turn, so that what slows the machine down slows all of them. Run:

    python tools/bench_layers.py                                       # 64 channels, 96 x 192 cells, 8 steps, fp32
    python tools/bench_layers.py --grid 721x1440 --hidden 128 --inputs 74 --steps 4 --precision bf16
"""

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from faconv_hpc import ConvLSTM2d, Domain, FAConvLSTM2d, LatLonGrid
from faconv_hpc.spatial.mesh import ProcessMesh

TYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Figure:
    """What one layer took.

    Attributes:
        forward_ms, backward_ms: medians.
        spread: of the sum, largest over smallest.
        memory_mib: peak over what stood before.
    """

    layer: str
    precision: str
    parameters: int
    forward_ms: float
    backward_ms: float
    spread: float
    memory_mib: float

    @property
    def total_ms(self) -> float:
        """Forward and backward."""
        return self.forward_ms + self.backward_ms


def layers(inputs: int, hidden: int, kernels: list[str]) -> dict[str, Callable[[], nn.Module]]:
    """Of equal hidden width, by name."""
    made: dict[str, Callable[[], nn.Module]] = {
        f"ConvLSTM k={size}": lambda size=size: ConvLSTM2d(inputs, hidden, size)  # type: ignore[misc]
        for size in (3, 5)
    }
    attentions = {
        "no attention": {"attention_every": 0},
        "attention every 4th": {},
        "as wide as the state": {"attention_reduction": 1, "attention_heads": 4},
    }
    for mode in kernels:
        for told, options in attentions.items():
            made[f"FAConvLSTM, {told}, {mode}"] = lambda options=options, mode=mode: FAConvLSTM2d(  # type: ignore[misc]
                inputs, hidden, kernels=mode, **options
            )
    return made


def synchronize(device: torch.device) -> None:
    """Waits for what was handed to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Case:
    """A layer and its input."""

    def __init__(self, module: nn.Module, x_BTCYX: torch.Tensor, domain: Domain) -> None:
        self.module, self.x_BTCYX, self.domain = module, x_BTCYX, domain
        with torch.no_grad():
            self.grad_BTCYX = torch.randn_like(module(x_BTCYX[:, :1], domain=domain)[0]).repeat(
                1, x_BTCYX.shape[1], 1, 1, 1
            )
        self.times: list[tuple[float, float]] = []
        self.memory_mib = 0.0

    def run(self) -> None:
        """One forward and backward, timed."""
        device = self.x_BTCYX.device
        synchronize(device)
        start = time.perf_counter()
        out, _ = self.module(self.x_BTCYX, domain=self.domain)
        synchronize(device)
        middle = time.perf_counter()
        out.backward(self.grad_BTCYX)
        synchronize(device)
        self.times.append((middle - start, time.perf_counter() - middle))
        del out
        self.module.zero_grad(set_to_none=True)
        self.x_BTCYX.grad = None

    def measure_memory(self) -> None:
        """Of one more run. On a CPU it is the process's: what it has freed goes back first."""
        device = self.x_BTCYX.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            self.run()
            self.memory_mib = (torch.cuda.max_memory_allocated(device) - before) / 2**20
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = _resident_mib("VmRSS")
            self.run()
            self.memory_mib = _resident_mib("VmHWM") - before
        self.times.pop()


def _resident_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def measured(options: argparse.Namespace) -> list[Figure]:
    """Every layer at every precision."""
    device = torch.device(options.device)
    rows, columns = map(int, options.grid.split("x"))
    grid = LatLonGrid(rows, columns)
    domain = Domain(grid, replace(ProcessMesh.alone(), device=device))
    figures = []
    for precision in options.precision:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        kind = TYPES[precision]
        cases = {}
        for name, make in layers(options.inputs, options.hidden, options.kernels).items():
            torch.manual_seed(0)
            x_BTCYX = torch.randn(1, options.steps, options.inputs, rows, columns, device=device, dtype=kind)
            cases[name] = Case(make().to(device, kind), x_BTCYX.requires_grad_(), domain)
        for _ in range(options.repeats + 2):
            for case in cases.values():
                case.run()
        for case in cases.values():
            case.measure_memory()
        for name, case in cases.items():
            times = case.times[2:]  # the first compile, and choose among the library's ways
            sums = [sum(pair) for pair in times]
            figures.append(
                Figure(
                    name,
                    precision,
                    sum(parameter.numel() for parameter in case.module.parameters()),
                    statistics.median(forward for forward, _ in times) * 1e3,
                    statistics.median(backward for _, backward in times) * 1e3,
                    max(sums) / min(sums),
                    case.memory_mib,
                )
            )
    return figures


def main() -> None:
    """Prints the table, and writes JSON if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--grid", default="96x192", metavar="ROWSxCOLUMNS")
    parser.add_argument("--inputs", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--precision", nargs="+", choices=TYPES, default=["fp32"])
    parser.add_argument("--kernels", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    figures = measured(options)
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
    what = f"{options.inputs} inputs, {options.hidden} channels, {options.grid} cells, {options.steps} steps"
    table = Table(title=f"{what}; {device}, torch {torch.__version__}")
    columns = (
        "layer",
        "precision",
        "parameters",
        "forward [ms]",
        "backward [ms]",
        "k=3 / this",
        "spread",
        "peak [MiB]",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "layer" else "right")
    for figure in figures:
        first = next(other for other in figures if other.precision == figure.precision)
        table.add_row(
            figure.layer, figure.precision, f"{figure.parameters}", f"{figure.forward_ms:.2f}",
            f"{figure.backward_ms:.2f}", f"{first.total_ms / figure.total_ms:.2f}", f"{figure.spread:.2f}",
            f"{figure.memory_mib:.0f}",
        )  # fmt: skip
    Console(width=140).print(table)
    if options.json:
        options.json.write_text(json.dumps({"what": what, "device": device, "figures": [*map(asdict, figures)]}))


if __name__ == "__main__":
    main()
