"""Where the depthwise kernels look: the taps of a bank of dilations; what m of a step is made of, and what of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

Offsets = tuple[tuple[int, int], ...]
"""(row, column) of each tap in the padded buffer, relative to the cell's own north-western corner."""


@dataclass(frozen=True)
class Taps:
    """The distinct cells a bank of dilated depthwise kernels looks at.

    All dilations share the centre, so a bank of D kernels of k x k has D (k^2 - 1) + 1 taps. ``owner``
    says, for each dilation and kernel weight, which tap it belongs to.
    """

    reach: int
    offsets: Offsets
    owner: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, kernel_size: int, dilations: Sequence[int], reach: int | None = None) -> "Taps":
        """The taps of kernels of this size, one per dilation, in a buffer that is padded by ``reach``.

        Default: by as much as they need.
        """
        half = kernel_size // 2
        reach = half * max(dilations) if reach is None else reach
        offsets: dict[tuple[int, int], int] = {}
        owner = tuple(
            tuple(
                offsets.setdefault((reach + dilation * row, reach + dilation * column), len(offsets))
                for row in range(-half, half + 1)
                for column in range(-half, half + 1)
            )
            for dilation in dilations
        )
        return cls(reach, tuple(offsets), owner)

    @property
    def mirrored(self) -> Offsets:
        """Offsets of the adjoint: what a cell gave to, instead of what it took from."""
        return tuple((2 * self.reach - row, 2 * self.reach - column) for row, column in self.offsets)


class Mixing(NamedTuple):
    """What m of a step is made of.

    Attributes:
        padded_BCYX: u with its halo.
        passes: the taps of each pass over it; the channels of m follow each other pass by pass.
        weights: (B, C_b, taps) of each pass.
    """

    padded_BCYX: Tensor
    passes: tuple[Taps, ...]
    weights: Sequence[Tensor]

    def of_rows(self, rows: slice) -> "Mixing":
        """What some rows of m are made of."""
        beyond = rows.start, rows.stop + 2 * self.passes[0].reach
        return self._replace(padded_BCYX=self.padded_BCYX[..., slice(*beyond), :])


class Gates(NamedTuple):
    """What makes gates of m: the expansion, and what they see of the cell.

    Attributes:
        weight, bias: of the expansion, (4 C, F) and (4 C,), in the order i, f, g, o.
        peep_GC: (3, C) peephole weights of i, f (on the old c) and o (on the new c).
    """

    weight: Tensor
    bias: Tensor
    peep_GC: Tensor
