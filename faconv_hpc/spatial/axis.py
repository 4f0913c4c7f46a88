"""One axis of the mesh, as a rank that shares its lines sees it: lines are joined, or dealt out whole."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..observe import Clock
from . import collectives

DIMS = {"lat": -2, "lon": -1}
"""Of cell tensors (..., Y, X)."""


def line_shares(lines: int, ranks: int) -> list[int]:
    """How many of the lines each rank of the axis takes; some take none where there are too few."""
    return [lines // ranks + (rank < lines % ranks) for rank in range(ranks)]


@dataclass(frozen=True, eq=False)
class Axis:
    """The ranks along ``"lat"`` or ``"lon"`` that own pieces of the same lines. No autograd, see operations.py.

    Attributes:
        sizes: cells of a line on each of its ranks.
        index: this rank's place among them.
        group: they; None where one rank has whole lines.
        clock: is told what the exchanges take.
    """

    sizes: Sequence[int]
    index: int
    group: dist.ProcessGroup | None
    clock: Clock

    def join(self, x: Tensor, dim: int) -> Tensor:
        """The pieces of all ranks as one along ``dim``; collective."""
        assert self.group is not None, "a line that one rank has whole is not joined"
        return collectives.gather(x, dim, self.sizes, self.group, self.clock)

    def part(self, whole: Tensor, dim: int) -> Tensor:
        """The sum over the ranks of ``whole``, of which each keeps its own cells: adjoint of `join`; collective."""
        assert self.group is not None, "a line that one rank has whole is not cut"
        return collectives.reduce_scatter(whole, dim, self.sizes, self.index, self.group, self.clock)

    def deal(self, x_LNC: Tensor) -> Tensor:
        """Owned pieces of all lines to whole lines, fewer of them; collective."""
        lines, _, channels = x_LNC.shape
        shares = line_shares(lines, len(self.sizes))
        shapes = [torch.Size((shares[self.index], size, channels)) for size in self.sizes]
        return torch.cat(self._exchanged(x_LNC.split(shares), shapes), dim=1)

    def collect(self, x_LNC: Tensor, lines: int) -> Tensor:
        """Whole lines to owned pieces of all ``lines``: inverse and adjoint of `deal`; collective."""
        owned = self.sizes[self.index]
        shapes = [torch.Size((share, owned, x_LNC.shape[2])) for share in line_shares(lines, len(self.sizes))]
        return torch.cat(self._exchanged(x_LNC.split(list(self.sizes), dim=1), shapes))

    def _exchanged(self, pieces: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
        assert self.group is not None, "lines that one rank has whole are not dealt out"
        return collectives.all_to_all(pieces, shapes, self.group, self.clock)
