"""Squares of cells as the cells of a network: what their cells hold side by side, as channels.

A network that computes on squares of f x f cells has f^2 times fewer to go through and to keep, and its kernels reach f
times as far. Nothing is averaged: it sees each cell of a square, and forecasts each.
"""

import torch
from torch import Tensor
from torch.nn import functional


def in_squares(x_BTCYX: Tensor, factor: int) -> Tensor:
    """(B, T, C f^2, ceil(Y / f), ceil(X / f)), the squares' cells of the first channel first.

    Squares at the end of the grid that lack cells have those before them once more. Tiles part no square.
    """
    if factor == 1:
        return x_BTCYX
    for dim in (-2, -1):
        if more := -x_BTCYX.shape[dim] % factor:
            last = x_BTCYX.narrow(dim, x_BTCYX.shape[dim] - 1, 1)
            x_BTCYX = torch.cat([x_BTCYX, *[last] * more], dim=dim)
    return functional.pixel_unshuffle(x_BTCYX, factor)


def out_of_squares(x_NCYX: Tensor, factor: int, cells: tuple[int, int]) -> Tensor:
    """(N, C, Y, X) from (N, C f^2, ceil(Y / f), ceil(X / f)): `in_squares` the other way, for so many cells Y, X."""
    if factor == 1:
        return x_NCYX
    return functional.pixel_shuffle(x_NCYX, factor)[..., : cells[0], : cells[1]]
