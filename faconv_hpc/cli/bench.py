"""``faconv bench``: FAConvLSTM beside ConvLSTM and its depthwise peers."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..bench.case import BenchCase, cells_of
from ..config import MeshConfig
from ..errors import EXIT_FAILED, EXIT_OK, InputError
from .options import AsJson, Device, Ranks
from .ranks import check_ranks, job_ranks, joined, run_ranks, starts_ranks
from .tables import table_of

if TYPE_CHECKING:
    from ..bench.result import BenchResult

TIMEOUT_S = 1800.0  # the other ranks wait while the first has the whole grid


class Precision(StrEnum):
    """Of activations, weights and products."""

    FP32 = "fp32"
    TF32 = "tf32"
    BF16 = "bf16"


class Kernels(StrEnum):
    """FAConvLSTM's passes."""

    EAGER = "eager"
    COMPILED = "compiled"
    TRITON = "triton"


def bench_command(
    grid: Annotated[str, typer.Option(metavar="ROWSxCOLUMNS", help="Cells of the grid.")] = "96x192",
    inputs: Annotated[int, typer.Option(min=1, help="Channels of the input.")] = 16,
    hidden: Annotated[int, typer.Option(min=1, help="Channels of the state, of all layers.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Time steps of the sequence.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Samples.")] = 1,
    precision: Annotated[Precision, typer.Option(help="tf32: on a GPU only.")] = Precision.FP32,
    kernels: Annotated[
        list[Kernels] | None,
        typer.Option(
            metavar="eager|compiled|triton",
            help="FAConvLSTM's passes; triton: on a GPU only. May be repeated. Default: compiled.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER", help="A layer to measure, as the table names it. May be repeated."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=5, help="How often each layer is timed.")] = 7,
    device: Device = None,
    ranks: Ranks = None,
    mesh: Annotated[
        str | None, typer.Option(metavar="LATxLON", help="Tiles of the ranks. Default: all along lat.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="An earlier --json of this case: says which ratios fell by more than 10 %."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure FAConvLSTM beside ConvLSTM and its depthwise peers, all in turn in one run: forward and backward of a
    sequence, memory, arithmetic, and the share of what the machine can do (a matrix product, a copy).

    With --ranks (or inside torchrun, srun, mpiexec) on tiles, beside the same tiles of ranks that do not talk, beside
    one rank with the whole grid, and with the time that each rank waits in each exchange.

    Exit code 0; with --against 1 if a ratio fell. A reference of another case or machine is refused.

    Example: `faconv bench --grid 181x360 --inputs 10 --hidden 32 --ranks 2`
    """
    nlat, nlon = cells_of(grid)
    case = BenchCase(
        nlat=nlat, nlon=nlon, inputs=inputs, hidden=hidden, steps=steps, batch=batch, precision=precision.value,
        mesh=MeshConfig.parse(mesh) if mesh else MeshConfig(lat=ranks or job_ranks()),
    )  # fmt: skip
    case.check()
    modes, names, device = kernels or [Kernels.COMPILED], only or [], device or "auto"
    if starts_ranks(ranks):
        check_ranks(case.mesh, ranks, "another --mesh")
        if device == "cuda" or case.precision == "tf32" or Kernels.TRITON in modes:
            from ..spatial.device import device_for  # which imports torch

            _check_kind(case, modes, device_for(device).type)
        more = [part for mode in modes for part in ("--kernels", mode)]
        more += [part for name in names for part in ("--only", name)]
        more += ["--against", str(against)] if against else []
        given = ["bench", "--device", device, "--repeats", str(repeats), *_options(case), *more, *["--json"] * as_json]
        raise typer.Exit(run_ranks(given, ranks))
    raise typer.Exit(_bench(case, device, modes, names, repeats, against, as_json))


def _check_kind(case: BenchCase, kernels: Sequence[str], kind: str) -> None:
    """Raises InputError for what only a GPU does, on a device of another kind."""
    if case.precision == "tf32" and kind != "cuda":
        raise InputError(f"--precision tf32 is how a GPU multiplies, this is a {kind}. Use fp32 or bf16.")
    if "triton" in kernels and kind != "cuda":
        raise InputError(f"--kernels triton are those of a GPU, this is a {kind}. Use eager or compiled.")


def _options(case: BenchCase) -> list[str]:
    """To hand on to ranks."""
    sizes = {name: getattr(case, name) for name in ("grid", "inputs", "hidden", "steps", "batch", "precision", "mesh")}
    return [part for name, value in sizes.items() for part in (f"--{name}", str(value))]


def _bench(
    case: BenchCase,
    device: str,
    kernels: Sequence[str],
    only: Sequence[str],
    repeats: int,
    against: Path | None,
    as_json: bool,
) -> int:
    """Measures on the ranks that are there; the exit code."""
    from ..bench.layers import layers_of
    from ..bench.measure import machine_of, measure
    from ..bench.reference import check_comparable, falls
    from ..bench.result import BenchResult

    makers = layers_of(case, kernels, only)
    reference = BenchResult.load(against) if against else None
    with joined(case.mesh, TIMEOUT_S, device) as mesh:
        _check_kind(case, kernels, mesh.device.type)
        if reference is not None:
            check_comparable(case, machine_of(mesh.device), reference)
        with Console(stderr=True, quiet=mesh.rank > 0).status("starting") as status:
            result = measure(case, makers, mesh, repeats, status.update)
        if reference is not None:
            result = result.model_copy(update={"fell": falls(result, reference)})
        if mesh.rank == 0:
            print(result.to_json()) if as_json else _show(result, against)
    return EXIT_FAILED if result.fell else EXIT_OK


def _show(result: "BenchResult", against: Path | None) -> None:
    console, case = Console(), result.case
    tables = [_times(result), _costs(result), *([_on_tiles(result), _exposed(result)] if case.mesh.ranks > 1 else [])]
    console.print(*tables)
    for line in _told(result, against):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _told(result: "BenchResult", against: Path | None) -> list[str]:
    """What stands below the tables."""
    case, machine, limits = result.case, result.machine, result.limits
    products = ", ".join(f"{rate.median:.4g} ({name})" for name, rate in limits.products.items())
    layouts = ", ".join(f"{row.layer} {row.layout}" for row in result.rows if row.layout)
    each = " of each rank" if case.mesh.ranks > 1 else ""
    lines = [
        f"{case.grid} cells, {case.inputs} inputs, {case.hidden} hidden, {case.steps} steps, batch {case.batch}, "
        f"{case.precision}; medians of {result.repeats}",
        f"memory layout of library convolutions: {layouts or 'none measured'}",
        f"limits{each}: products {products} GFLOP/s, copy {limits.copy_gb_s.median:.4g} GB/s",
        f"measured on: {machine.device}, {machine.cores} cores, {machine.threads} threads{each}, torch {machine.torch}",
    ]
    lines += [f"FELL: {one.layer}, {one.ratio}: {one.now:.3f}, was {one.before:.3f}" for one in result.fell]
    if against is not None and not result.fell:
        lines.append(f"no ratio fell by more than 10 % against {against}")
    return lines


def _times(result: "BenchResult") -> Table:
    bases = list(result.rows[0].faster)
    ratios = [f"faster than {base.removeprefix('ConvLSTM ')}" for base in bases]
    columns = ("layer", "forward [ms]", "backward [ms]", "middle half", *ratios, "of product", "of copy")
    table = table_of(*columns, text=columns[:1], title="time of a sequence")
    for row in result.rows:
        total = row.total_s
        table.add_row(
            row.layer, f"{row.forward_s.median * 1e3:.4g}", f"{row.backward_s.median * 1e3:.4g}",
            f"{(total.quartile_3 - total.quartile_1) / total.median:.0%}",
            *(f"{row.faster[base].median:.2f}" for base in bases), f"{row.product_share:.0%}", f"{row.copy_share:.0%}",
        )  # fmt: skip
    return table


def _costs(result: "BenchResult") -> Table:
    case, bases = result.case, list(result.rows[0].faster)
    cells = case.batch * case.steps * case.nlat * case.nlon
    ratios = [f"smaller than {base.removeprefix('ConvLSTM ')}" for base in bases]
    columns = ("layer", "para- meters", "multiply- adds", "kept [MiB]", "moved [MiB]", "peak [MiB]", *ratios)
    table = table_of(*columns, text=columns[:1], title="what it costs; multiply-adds of a cell and a time step")
    for row in result.rows:
        sizes = row.kept_bytes, row.moved_bytes, row.peak_bytes
        in_mib = ["-" if size is None else f"{size / 2**20:.4g}" for size in sizes]
        smaller = [f"{row.smaller[base]:.2f}" if base in row.smaller else "-" for base in bases]
        table.add_row(row.layer, f"{row.parameters}", f"{row.multiply_adds / cells:.0f}", *in_mib, *smaller)
    return table


def _on_tiles(result: "BenchResult") -> Table:
    columns = ("layer", "tiles [ms]", "not talking [ms]", "not talking / tiles", "one rank [ms]", "one rank / tiles")
    title = f"on {result.case.mesh} tiles, forward and backward"
    table = table_of(*columns, text=columns[:1], title=title)
    for row in result.rows:
        assert row.tiles is not None, "of several ranks"
        seconds = [f"{one.median * 1e3:.4g}" for one in (row.total_s, row.tiles.apart_s, row.tiles.whole_s)]
        efficiency, speed_up = f"{row.tiles.efficiency.median:.2f}", f"{row.tiles.speed_up.median:.2f}"
        table.add_row(row.layer, *seconds[:2], efficiency, seconds[2], speed_up)
    return table


def _exposed(result: "BenchResult") -> Table:
    of_rows = [row.tiles.exposed_s for row in result.rows if row.tiles is not None]
    verbs = sorted({verb for exposed in of_rows for verb in exposed})
    table = table_of("layer", *verbs, text=("layer",), title="waiting for other ranks [ms a time step]")
    for row, exposed in zip(result.rows, of_rows, strict=True):
        table.add_row(row.layer, *(f"{exposed[verb] * 1e3:.3g}" if verb in exposed else "-" for verb in verbs))
    return table
