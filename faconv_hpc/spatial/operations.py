"""The differentiable operations behind a domain's verbs: what is sent going forward, and going back.

Each stands with its adjoint. What moves the numbers is in exchange.py (halos) and area_mean.py, each in two halves,
start and finish; sweep.py computes between those of halos. And in axis.py, which waits.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ..autograd import Context, Operation
from ..observe import Clock
from .area_mean import AreaMean, RegionMeans
from .axis import Axis
from .collectives import start_sum
from .exchange import HaloExchange
from .tape import Remembered


class Pad(Operation):
    """Owner to halo going forward; halo to owner, added, going back."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, halo: HaloExchange, remembered: Remembered) -> Tensor:
        ctx.halo = halo
        return halo.pad(x, remembered(lambda: halo.start_fill(x))())

    @staticmethod
    def backward(ctx: Context, grad_padded: Tensor) -> tuple[Tensor, None, None]:
        received = ctx.halo.start_accumulate(grad_padded)()
        owned = ctx.halo.owned(grad_padded).clone()
        return ctx.halo.add_halo(grad_padded, received, owned), None, None


class Mean(Operation):
    """Area-weighted sum over all tiles, or over each region, going forward; gradients summed over tiles going back."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, mean: AreaMean | RegionMeans, kind: torch.dtype, remembered: Remembered
    ) -> Tensor:
        ctx.mean, ctx.columns, ctx.kind = mean, x.shape[-1], x.dtype
        # Detached: what autograd returns must not be the tensor on the tape, or the two keep each other alive.
        received: Tensor = remembered(lambda: mean.start(x))()
        return received.detach().to(kind)

    @staticmethod
    def backward(ctx: Context, grad_mean: Tensor) -> tuple[Tensor, None, None, None]:
        total = ctx.mean.start_gradient(grad_mean)()
        return ctx.mean.by_cell(total, ctx.columns, ctx.kind), None, None, None


class Gather(Operation):
    """All-gather along one axis going forward; reduce-scatter going back."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, axis: Axis, dim: int, remembered: Remembered) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return axis.join(x, dim, remembered)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.axis.part(grad, ctx.dim), None, None, None


class Swap(Operation):
    """All-to-all from owned pieces of all lines to whole lines, fewer; going back, the reverse."""

    @staticmethod
    def forward(ctx: Context, x_LNC: Tensor, axis: Axis, remembered: Remembered) -> Tensor:
        ctx.axis, ctx.lines = axis, x_LNC.shape[0]
        return axis.deal(x_LNC, remembered)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.axis.collect(grad, ctx.lines), None, None


class SwapBack(Operation):
    """All-to-all from whole lines to owned pieces of all lines; going back, the reverse."""

    @staticmethod
    def forward(ctx: Context, x_LNC: Tensor, axis: Axis, lines: int, remembered: Remembered) -> Tensor:
        ctx.axis = axis
        return axis.collect(x_LNC, lines, remembered)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.axis.deal(grad), None, None, None


class Total(Operation):
    """Sum over all tiles going forward; the identity going back."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, group: dist.ProcessGroup | None, clock: Clock) -> Tensor:
        return start_sum(x.clone(), group, clock, "total")()

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None
