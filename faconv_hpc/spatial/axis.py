"""One axis of the mesh, as a rank that shares its lines sees it: lines are joined, or dealt out whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ..observe import Clock
from . import collectives
from .tape import Remembered, at_once

DIMS = {"lat": -2, "lon": -1}
"""Of cell tensors (..., Y, X)."""


def line_shares(lines: int, ranks: int) -> list[int]:
    """How many of the lines each rank of the axis takes; some take none where there are too few."""
    return [lines // ranks + (rank < lines % ranks) for rank in range(ranks)]


@dataclass(frozen=True, eq=False)
class Axis:
    """The ranks along ``"lat"`` or ``"lon"`` that own pieces of the same lines. No autograd, see operations.py.

    What is remembered of an exchange is what the others have sent.

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

    def join(self, x: Tensor, dim: int, remembered: Remembered = at_once) -> Tensor:
        """The pieces of all ranks as one along ``dim``; collective."""
        assert self.group is not None, "a line that one rank has whole is not joined"
        given = x, dim, self.sizes, self.index, self.group, self.clock
        others = remembered(lambda: partial(collectives.gather, *given))()
        return torch.cat(self._with_own(x, others), dim)

    def part(self, whole: Tensor, dim: int) -> Tensor:
        """The sum over the ranks of ``whole``, of which each keeps its own cells: adjoint of `join`; collective."""
        assert self.group is not None, "a line that one rank has whole is not cut"
        return collectives.reduce_scatter(whole, dim, self.sizes, self.index, self.group, self.clock)

    def deal(self, x_LNC: Tensor, remembered: Remembered = at_once) -> Tensor:
        """Owned pieces of all lines to whole lines, fewer of them; collective."""
        lines, _, channels = x_LNC.shape
        shares = line_shares(lines, len(self.sizes))
        shapes = [torch.Size((shares[self.index], size, channels)) for size in self.sizes]
        return torch.cat(self._exchanged(x_LNC.split(shares), shapes, remembered), dim=1)

    def collect(self, x_LNC: Tensor, lines: int, remembered: Remembered = at_once) -> Tensor:
        """Whole lines to owned pieces of all ``lines``: inverse and adjoint of `deal`; collective."""
        owned = self.sizes[self.index]
        shapes = [torch.Size((share, owned, x_LNC.shape[2])) for share in line_shares(lines, len(self.sizes))]
        return torch.cat(self._exchanged(x_LNC.split(list(self.sizes), dim=1), shapes, remembered))

    def _exchanged(
        self, pieces: Sequence[Tensor], shapes: Sequence[torch.Size], remembered: Remembered
    ) -> list[Tensor]:
        """What every rank has sent here, of the given shapes, when piece i has gone to rank i."""
        assert self.group is not None, "lines that one rank has whole are not dealt out"
        given = pieces, shapes, self.index, self.group, self.clock
        others = remembered(lambda: partial(collectives.all_to_all, *given))()
        return self._with_own(pieces[self.index], others)

    def _with_own(self, own: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
        return [*others[: self.index], own, *others[self.index :]]
