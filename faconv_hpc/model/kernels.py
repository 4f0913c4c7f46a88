"""The two passes over all cells that are not matrix products: mixing, and the gates.

Both are written as plain tensor arithmetic. ``"compiled"`` hands that arithmetic to torch.compile,
which makes one loop over memory of it (C++ on a CPU, Triton on a GPU); ``"eager"`` runs it as it
stands. Gradients are written out, so that backward is one such pass too and keeps no intermediates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..autograd import Context, Operation
from ..errors import InputError

Offsets = tuple[tuple[int, int], ...]
"""(row, column) of each tap in the padded buffer, relative to the cell's own north-western corner."""

KERNEL_MODES = ("eager", "compiled")
SHAPES = 64  # compilations of one pass before torch gives up; its default of 8 is soon reached by tests of layouts


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
    def of(cls, kernel_size: int, dilations: Sequence[int]) -> "Taps":
        """The taps of kernels of this size, one per dilation."""
        half = kernel_size // 2
        reach = half * max(dilations)
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


def pointwise(weight: Tensor, x_BCYX: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution as one matrix product per sample: (B, C', Y, X) for a (C', C) weight.

    `torch.matmul` would fold the batch into the cells and copy x to do so.
    """
    x_BCN = x_BCYX.flatten(2)
    weights = weight.expand(x_BCN.shape[0], -1, -1)
    product = torch.bmm(weights, x_BCN) if bias is None else torch.baddbmm(bias[:, None], weights, x_BCN)
    return product.view(*product.shape[:2], *x_BCYX.shape[2:])


def _shifted_sum(padded_BCYX: Tensor, weight_BCN: Tensor, offsets: Offsets, rows: int, columns: int) -> Tensor:
    total = torch.zeros_like(padded_BCYX[..., :rows, :columns])
    for tap, (row, column) in enumerate(offsets):
        total = (
            total + weight_BCN[:, :, tap, None, None] * padded_BCYX[..., row : row + rows, column : column + columns]
        )
    return total


def _shifted_products(padded_BCYX: Tensor, grad_BCYX: Tensor, offsets: Offsets) -> Tensor:
    rows, columns = grad_BCYX.shape[-2:]
    return torch.stack(
        [
            (padded_BCYX[..., row : row + rows, column : column + columns] * grad_BCYX).sum((-2, -1))
            for row, column in offsets
        ],
        dim=-1,
    )


class Squash(NamedTuple):
    """The two functions that gates are made of."""

    sigmoid: Callable[[Tensor], Tensor]
    tanh: Callable[[Tensor], Tensor]


def _sigmoid_by_exp(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def _tanh_by_exp(x: Tensor) -> Tensor:
    """Within a rounding of 1, not of itself where it is small; beyond 40 it is 1 to the last bit, and exp overflows."""
    e = torch.exp(-2 * x.clamp(-40, 40))
    return (1 - e) / (1 + e)


OF_LIBRARY = Squash(torch.sigmoid, torch.tanh)
BY_EXP = Squash(_sigmoid_by_exp, _tanh_by_exp)
"""Which the compiler makes vector code of; of torch's own tanh it makes what takes two to three times as long."""


def _gate_forward(
    a_BGCYX: Tensor, bias_GC: Tensor, c_BCYX: Tensor, peep_GC: Tensor, squash: Squash = OF_LIBRARY
) -> tuple[Tensor, Tensor]:
    p_i, p_f, p_o = peep_GC[:, :, None, None].unbind(0)
    i, f, g, o = (a_BGCYX.to(c_BCYX.dtype) + bias_GC[:, :, None, None]).unbind(1)
    c_new = squash.sigmoid(f + p_f * c_BCYX) * c_BCYX + squash.sigmoid(i + p_i * c_BCYX) * squash.tanh(g)
    return squash.sigmoid(o + p_o * c_new) * squash.tanh(c_new), c_new


def _gate_backward(
    a_BGCYX: Tensor,
    bias_GC: Tensor,
    c_BCYX: Tensor,
    peep_GC: Tensor,
    grad_h: Tensor,
    grad_c: Tensor,
    squash: Squash = OF_LIBRARY,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p_i, p_f, p_o = peep_GC[:, :, None, None].unbind(0)
    a_i, a_f, a_g, a_o = (a_BGCYX.to(c_BCYX.dtype) + bias_GC[:, :, None, None]).unbind(1)
    i, f = squash.sigmoid(a_i + p_i * c_BCYX), squash.sigmoid(a_f + p_f * c_BCYX)
    g = squash.tanh(a_g)
    c_new = f * c_BCYX + i * g
    o, squashed = squash.sigmoid(a_o + p_o * c_new), squash.tanh(c_new)
    d_o = grad_h * squashed * o * (1 - o)
    d_c = grad_c + grad_h * o * (1 - squashed * squashed) + d_o * p_o
    d_i, d_f, d_g = d_c * g * i * (1 - i), d_c * c_BCYX * f * (1 - f), d_c * i * (1 - g * g)
    over = (0, 2, 3)
    grad_bias = torch.stack([d.sum(over) for d in (d_i, d_f, d_g, d_o)])
    grad_peep = torch.stack([(d_i * c_BCYX).sum(over), (d_f * c_BCYX).sum(over), (d_o * c_new).sum(over)])
    grad_a = torch.stack([d_i, d_f, d_g, d_o], dim=1).to(a_BGCYX.dtype)
    return grad_a, grad_bias, d_c * f + d_i * p_i + d_f * p_f, grad_peep


@dataclass(frozen=True)
class Kernels:
    """The passes in one of the two modes; see `kernels_for`."""

    shifted_sum: Callable[..., Tensor]
    shifted_products: Callable[..., Tensor]
    gate_forward: Callable[..., tuple[Tensor, Tensor]]
    gate_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]

    def mix(self, padded_BCYX: Tensor, weight_BCN: Tensor, taps: Taps) -> Tensor:
        """Weighted sum of the cells around each cell: a depthwise convolution with merged taps.

        Args:
            padded_BCYX: a tile padded by ``taps.reach``.
            weight_BCN: a weight for every sample, channel and tap.

        Returns:
            (B, C, Y, X) without the padding.
        """
        mixed: Tensor = _Mix.call(padded_BCYX, weight_BCN, taps, self)
        return mixed

    def gates(self, a_BGCYX: Tensor, bias_GC: Tensor, c_BCYX: Tensor, peep_GC: Tensor) -> tuple[Tensor, Tensor]:
        """The gates with peepholes, design section 3, step 5.

        Args:
            a_BGCYX: pre-activations without their bias, G = i, f, g, o.
            bias_GC: added here, as a product that adds it copies it into every cell first.
            c_BCYX: cell state; float32 or better, and so is the arithmetic.
            peep_GC: (3, C) peephole weights of i, f (on the old c) and o (on the new c).

        Returns:
            h and the new c, both of c's type.
        """
        h, c = _Gates.call(a_BGCYX, bias_GC, c_BCYX, peep_GC, self)
        return h, c


@lru_cache(maxsize=len(KERNEL_MODES))
def kernels_for(mode: str) -> Kernels:
    """The passes, ``"eager"`` or ``"compiled"`` (which needs a C++ compiler, or Triton on a GPU)."""
    if mode not in KERNEL_MODES:
        raise InputError(f"kernels={mode!r} is not known. Use one of {', '.join(KERNEL_MODES)}.")
    passes: tuple[Any, ...] = (_shifted_sum, _shifted_products, _gate_forward, _gate_backward)
    if mode == "compiled":
        passes = (*passes[:2], *(partial(gate, squash=BY_EXP) for gate in passes[2:]))
        from torch import _dynamo as dynamo  # a second of every start, of commands that compute nothing, too

        # A tile shape of its own costs a compilation; from the second on sizes are symbols in the code.
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, SHAPES)
        passes = tuple(torch.compile(one, fullgraph=True) for one in passes)
    return Kernels(*passes)


class _Mix(Operation):
    """Gather from the neighbours going forward; the mirrored gather going back."""

    @staticmethod
    def forward(ctx: Context, padded_BCYX: Tensor, weight_BCN: Tensor, taps: Taps, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(padded_BCYX, weight_BCN)
        ctx.taps, ctx.kernels = taps, kernels
        rows, columns = (size - 2 * taps.reach for size in padded_BCYX.shape[-2:])
        return kernels.shifted_sum(padded_BCYX, weight_BCN, taps.offsets, rows, columns)

    @staticmethod
    def backward(ctx: Context, grad_BCYX: Tensor) -> tuple[Tensor, Tensor, None, None]:
        padded_BCYX, weight_BCN = ctx.saved_tensors
        taps, kernels = ctx.taps, ctx.kernels
        grad_BCYX = grad_BCYX.contiguous()
        framed = functional.pad(grad_BCYX, [2 * taps.reach] * 4)
        grad_padded = kernels.shifted_sum(framed, weight_BCN, taps.mirrored, *padded_BCYX.shape[-2:])
        grad_weight = kernels.shifted_products(padded_BCYX, grad_BCYX, taps.offsets)
        return grad_padded, grad_weight.to(weight_BCN.dtype), None, None


class _Gates(Operation):
    """Keeps only its inputs; backward computes the gates again in the same pass as the gradients."""

    @staticmethod
    def forward(
        ctx: Context, a_BGCYX: Tensor, bias_GC: Tensor, c_BCYX: Tensor, peep_GC: Tensor, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a_BGCYX, bias_GC, c_BCYX, peep_GC)
        ctx.kernels = kernels
        return kernels.gate_forward(a_BGCYX, bias_GC, c_BCYX, peep_GC)

    @staticmethod
    def backward(ctx: Context, grad_h: Tensor, grad_c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        saved = ctx.saved_tensors
        grad_a, grad_bias, grad_c_old, grad_peep = ctx.kernels.gate_backward(*saved, grad_h, grad_c)
        return grad_a, grad_bias.to(saved[1].dtype), grad_c_old, grad_peep.to(saved[3].dtype), None
