"""The depthwise kernels of a sweep's steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import Kernels
from .taps import Taps


@dataclass(frozen=True, eq=False)
class Bank:
    """The depthwise kernels: all dilations in one pass (their sum), or one pass each (side by side).

    Attributes:
        passes: the taps of each pass.
        owner_DKN: 1 where a kernel's cell is a tap, for dilations that are summed; None: there is a pass for each.
        kernels: what computes them.
    """

    passes: tuple[Taps, ...]
    owner_DKN: Tensor | None
    kernels: Kernels

    def weights(self, factors_BTDC: Tensor, mixing_DCK: Tensor) -> list[Tensor]:
        """(T, B, C_b, taps) for each pass, a kernel of each step, sample and channel: each dilation's by its factor."""
        weights_TBDCK = factors_BTDC.transpose(0, 1)[..., None] * mixing_DCK
        if self.owner_DKN is None:
            return [one.contiguous() for one in weights_TBDCK.unbind(2)]
        return [torch.einsum("tbdck,dkn->tbcn", weights_TBDCK, self.owner_DKN.to(weights_TBDCK.dtype))]

    def adjoint(self, into_BCYX: Tensor, framed_BFYX: Tensor, weights: Sequence[Tensor], rows: slice) -> None:
        """Some rows of the padded u's gradient from m's, which stands amid twice as much of a frame of zeros."""
        into_BCYX = into_BCYX[..., rows, :]
        framed_BFYX = framed_BFYX[..., rows.start : rows.stop + 2 * self.passes[0].reach, :]
        parts = framed_BFYX.chunk(len(self.passes), dim=1)
        for number, (part, taps, weight) in enumerate(zip(parts, self.passes, weights, strict=True)):
            target = torch.empty_like(into_BCYX) if number else into_BCYX
            self.kernels.mix(target, part, weight, taps.mirrored)
            if number:
                into_BCYX.add_(target)

    def products(self, padded_BCYX: Tensor, grad_BFYX: Tensor) -> list[Tensor]:
        """The gradient of each pass's weights."""
        parts = grad_BFYX.chunk(len(self.passes), dim=1)
        return [
            self.kernels.mix_weights(padded_BCYX, part, taps.offsets)
            for part, taps in zip(parts, self.passes, strict=True)
        ]
