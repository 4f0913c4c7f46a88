"""What a layer can be, in numbers alone: judged by the layers themselves, and before anything is imported."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..errors import InputError
from ..harmonics import HOW_TO_INSTALL, is_installed
from ..spatial.grid import SAME_DEG, Boundary, LatLonGrid

Cell = Literal["faconvlstm", "convlstm", "bottleneck", "depthwise_convlstm", "depthwise", "linear", "sfno", "lsno"]
CELL_OPTIONS: dict[Cell, tuple[str, ...]] = {
    "faconvlstm": (
        "kernel_size", "dilations", "bottleneck_channels", "fuse", "se_reduction", "peephole", "attention_every",
        "kernels",
    ),
    "convlstm": ("kernel_size",),
    "bottleneck": ("kernel_size",),
    "depthwise_convlstm": ("kernel_size",),
    "depthwise": ("kernel_size", "dilations"),
    "linear": ("kernel_size",),
    "sfno": ("scale_factor",),
    "lsno": ("scale_factor",),
}  # fmt: skip
"""What of a model section is a cell's own: the arguments of its layers."""
MEMORYLESS: tuple[Cell, ...] = ("depthwise", "linear", "sfno", "lsno")
"""Cells without a state."""
ON_THE_SPHERE: tuple[Cell, ...] = ("sfno", "lsno")
"""Cells that need the whole globe on one tile, and the package torch-harmonics."""

FUSES = ("sum", "concat")
EXCHANGES = ("auto", "gather", "swap")


def check_kernel(kernel_size: int) -> None:
    """Raises InputError for a kernel without a centre."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise InputError(f"kernel_size={kernel_size} has no centre. Use an odd size, such as 3.")


def check_dilations(dilations: Sequence[int]) -> None:
    """Raises InputError where there is none, or one that is no distance."""
    if not dilations or min(dilations) < 1:
        raise InputError(f"dilations={tuple(dilations)} must be one or more positive numbers, such as (1, 2, 4).")


def check_layer(kernel_size: int, dilations: Sequence[int], fuse: str, se_reduction: int, attention_every: int) -> None:
    """Raises InputError for arguments of `FAConvLSTM2d` that no layer can have."""
    check_kernel(kernel_size)
    check_dilations(dilations)
    if fuse not in FUSES:
        raise InputError(f"fuse={fuse!r} is not known. Use one of {', '.join(FUSES)}.")
    if se_reduction < 0:
        raise InputError(f"se_reduction={se_reduction} must be 0 (no squeeze-and-excitation) or a number to divide by.")
    if attention_every < 0:
        raise InputError(f"attention_every={attention_every} must be 0 (no attention) or a number of steps.")


def squares_of(cell: str, scale_factor: int) -> int:
    """Cells along a side of the squares that layers compute on; those of `ON_THE_SPHERE` make squares of their own."""
    return 1 if cell in ON_THE_SPHERE else scale_factor


def check_steps(steps: int) -> None:
    """Raises InputError for a sequence of none."""
    if steps < 1:
        raise InputError(f"a sequence of {steps} steps has no output and no last state. Give it one step or more.")


def attention_channels(channels: int, reduction: int, heads: int) -> int:
    """C_a, of queries, keys and values over all heads: C / reduction, rounded up to an even number for each head, as
    rotary positions turn pairs."""
    pairs = 2 * heads
    return pairs * -(-channels // (reduction * pairs))


def check_attention(heads: int, reduction: int, exchange: str) -> None:
    """Raises InputError for arguments of `AxialAttention` that no attention can have."""
    if exchange not in EXCHANGES:
        raise InputError(f"attention_exchange={exchange!r} is not known. Use one of {', '.join(EXCHANGES)}.")
    if heads < 1:
        raise InputError(f"attention_heads={heads} must be 1 or more.")
    if reduction < 1:
        raise InputError(f"attention_reduction={reduction} must be 1 (as many channels as the field has) or more.")


def check_coarse(coarse_shape: tuple[int, int], nlat: int, nlon: int, scale_factor: int = 1) -> None:
    """Raises InputError for a coarse field with more regions than the grid that layers compute on has cells."""
    if coarse_shape[0] > nlat or coarse_shape[1] > nlon:
        squares = f"squares of {scale_factor} x {scale_factor} cells (model.scale_factor)"
        raise InputError(
            f"a coarse field of {coarse_shape[0]} x {coarse_shape[1]} regions does not fit a grid of "
            f"{nlat} x {nlon} {squares if scale_factor > 1 else 'cells'}. Use at most as many (key model.coarse_shape)."
        )


def check_one_tile(cell: str, tiles: int) -> None:
    """Raises InputError for a cell of `ON_THE_SPHERE` whose grid is cut."""
    if tiles > 1:
        raise InputError(
            f"model.cell={cell} transforms whole latitude circles and meridians, and {tiles} tiles share the grid. Use "
            f"one tile (mesh.lat=1 and mesh.lon=1, or --mesh 1x1; replicas may be any), or another cell."
        )


def check_scale(cell: str, scale_factor: int, nlat: int, nlon: int) -> None:
    """Raises InputError for a scale_factor of a cell of `ON_THE_SPHERE` that leaves it no grid to compute on.

    Between its first and its last block it has every n-th row, from one pole to the other, and so many times fewer
    columns. Waves need two rows and two columns there; lsno's kernels, columns that divide those of the grid.
    """

    def fits(scale: int) -> bool:
        rows, columns = _within(scale, nlat, nlon)
        return min(rows, columns) >= 2 and (cell != "lsno" or nlon % columns == 0)

    if not fits(scale_factor):
        rows, columns = _within(scale_factor, nlat, nlon)
        best = max((scale for scale in range(1, min(scale_factor, nlon)) if fits(scale)), default=None)
        divides = " whose number divides theirs" * (cell == "lsno")
        raise InputError(
            f"model.scale_factor={scale_factor} leaves model.cell={cell} {rows} rows and {columns} columns of a grid "
            f"of {nlat} x {nlon} cells, and it needs two rows and two columns at least{divides}. "
            f"{f'Use {best} or less' if best else 'Use another cell'}{' that does' * (cell == 'lsno')}."
        )


def _within(scale_factor: int, nlat: int, nlon: int) -> tuple[int, int]:
    """Rows and columns between the first and the last block of a cell of `ON_THE_SPHERE`."""
    return (nlat - 1) // scale_factor + 1, nlon // scale_factor


def check_package(cell: str) -> None:
    """Raises InputError for a cell of `ON_THE_SPHERE` whose package is not there."""
    if not is_installed():
        raise InputError(
            f"model.cell={cell} is of the package torch-harmonics, which is not installed. Install it "
            f"(`{HOW_TO_INSTALL}`), or use another cell."
        )


def globe_of(cell: str, grid: LatLonGrid) -> tuple[int, int, str]:
    """Rows, columns and kind of a grid, as torch-harmonics names it, for a cell of `ON_THE_SPHERE`.

    Raises:
        InputError: it is a region or of another kind, or the package is not there.
    """
    check_package(cell)
    latitude = np.asarray(grid.latitude_deg, dtype=np.float64)
    kinds = {"equiangular": np.linspace(90, -90, grid.nlat)}
    if np.abs(latitude - kinds["equiangular"]).max() > SAME_DEG:
        kinds["legendre-gauss"] = np.rad2deg(np.arcsin(np.polynomial.legendre.leggauss(grid.nlat)[0][::-1]))
    found = [kind for kind, rows in kinds.items() if np.abs(latitude - rows).max() <= SAME_DEG]
    if not found or grid.lon_boundary != Boundary.PERIODIC:
        raise InputError(
            f"model.cell={cell} needs rows at equal distances with both poles among them, or at the zeros of a "
            f"Legendre polynomial (Gauss), north first, and whole circles; the grid has {grid.nlat} rows from "
            f"{latitude[0]:g} to {latitude[-1]:g} degrees, {Boundary(grid.lon_boundary).value} along them. Regrid, or "
            f"use another cell."
        )
    return grid.nlat, grid.nlon, found[0]
