"""The area-weighted mean over all tiles: started early, waited for late. No autograd here, see operations.py."""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from ..observe import Clock
from .collectives import Finish, at_least_float32, start_sum


class AreaMean:
    """Sums of one tile's cells, weighed by area, over all tiles.

    Args:
        row_weights: (Y,) the owned rows' shares of the grid's area per cell, of the type of the tensor that it gets.
        group: the ranks of the tiles; None for a single tile.
        clock: is told what the exchanges take.
    """

    def __init__(self, row_weights: Callable[[Tensor], Tensor], group: dist.ProcessGroup | None, clock: Clock) -> None:
        self._row_weights, self._group, self._clock = row_weights, group, clock

    def start(self, x: Tensor) -> Finish:
        """The mean (...) of x (..., Y, X), in float32 or better."""
        rows = x.sum(-1, dtype=at_least_float32(x.dtype))
        return start_sum(rows @ self._row_weights(rows), self._group, self._clock, "mean")

    def start_gradient(self, grad_mean: Tensor) -> Finish:
        """The sum over tiles of the gradients of the mean, which every tile has used."""
        share = grad_mean.to(at_least_float32(grad_mean.dtype), copy=True).contiguous()
        return start_sum(share, self._group, self._clock, "adjoint of mean")

    def by_row(self, total: Tensor) -> Tensor:
        """The gradient at every owned cell of a row, (..., Y, 1): its weight times the mean's gradient."""
        return total[..., None, None] * self._row_weights(total)[:, None]
