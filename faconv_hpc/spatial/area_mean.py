"""Area-weighted means over all tiles, in two halves: start and finish. No autograd here, see operations.py.

Without matrix products, whose factors TF32 and autocast round: what is lost would depend on how the grid is cut.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..observe import Clock
from .collectives import Finish, at_least_float32, start_sum
from .coordinates import Coordinates


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
        return start_sum((rows * self._row_weights(rows)).sum(-1), self._group, self._clock, "mean")

    def start_gradient(self, grad_mean: Tensor) -> Finish:
        """The sum over tiles of the gradients of the mean, which every tile has used."""
        share = grad_mean.to(at_least_float32(grad_mean.dtype), copy=True).contiguous()
        return start_sum(share, self._group, self._clock, "adjoint of mean")

    def by_cell(self, total: Tensor, columns: int, kind: torch.dtype) -> Tensor:
        """The same of every owned cell, (..., Y, X), in a type; only rows are in memory."""
        by_row = (total[..., None, None] * self._row_weights(total)[:, None]).to(kind)
        return by_row.expand(*by_row.shape[:-1], columns)


class RegionMeans:
    """The same over each of R x S regions of whole cells, of all tiles, in one sum.

    Row r of the grid belongs to region row ``floor(r R / nlat)``, columns alike.

    Args:
        regions: (R, S); every region has cells.
        coordinates: of the tile.
        group, clock: see `AreaMean`.
    """

    def __init__(
        self, regions: tuple[int, int], coordinates: Coordinates, group: dist.ProcessGroup | None, clock: Clock
    ) -> None:
        self._regions, self._coordinates, self._group, self._clock = regions, coordinates, group, clock

    def start(self, x: Tensor) -> Finish:
        """The means (..., R, S) of x (..., Y, X), in float32 or better."""
        kind = at_least_float32(x.dtype)
        spans = self._coordinates.spans_of_columns(self._regions[1])
        by_column = torch.stack([x[..., span].sum(-1, dtype=kind) for span in spans], dim=-1)
        rows, columns = self._shares(by_column)
        by_region = (rows[:, :, None] * by_column[..., None, :, :]).sum(-2)
        return start_sum(by_region * columns, self._group, self._clock, "mean")

    def start_gradient(self, grad_means: Tensor) -> Finish:
        """The sum over tiles of the gradients of the means, which every tile has used."""
        share = grad_means.to(at_least_float32(grad_means.dtype), copy=True).contiguous()
        return start_sum(share, self._group, self._clock, "adjoint of mean")

    def by_cell(self, total: Tensor, columns: int, kind: torch.dtype) -> Tensor:
        """The gradient at every owned cell, (..., Y, X): its weight times that of its region's mean."""
        rows, per_column = self._shares(total)
        of_rows = (total * per_column)[..., rows.argmax(0), :]  # each row lies in one region
        by_region = (of_rows * rows.sum(0)[:, None]).to(kind)
        spans = self._coordinates.spans_of_columns(self._regions[1])
        parts = [by_region[..., place, None].expand(*by_region.shape[:-1], _length(span))
                 for place, span in enumerate(spans)]  # fmt: skip
        cells = torch.cat(parts, dim=-1)
        assert cells.shape[-1] == columns, "every owned column lies in one region"
        return cells

    def _shares(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(R, Y) of each owned row in the columns of its region, and (S,) of each column."""
        return self._coordinates.shares_in_regions(self._regions, like)


def _length(span: slice) -> int:
    return int(span.stop - span.start)
