"""Layers that know nothing of the steps before: what a recurrent one must be better than, with the same frames given.

They are called, and cut into tiles, as `FAConvLSTM2d` is; their state is empty.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..spatial.domain import Domain
from .recurrence import PlainLayer, State, of_exact_inputs
from .rules import check_dilations, check_kernel


class Memoryless(PlainLayer):
    """To such a layer steps are as samples. Its state is empty, and a state that is given makes no difference; what it
    says at a step that is not valid is of that step."""

    def _over_steps(
        self, parts_BTCYX: Tensor, state: State | None, domain: Domain, valid_BT: Tensor | None
    ) -> tuple[Tensor, State]:
        return parts_BTCYX, ()


class Linear2d(Memoryless):
    """A convolution and nothing else: with the head on it a linear model of the cells around.

    Args:
        in_channels, hidden_channels: C_x and C_h; as many as there are targets, and the model is any linear one.
        kernel_size: odd.
    """

    def __init__(self, in_channels: int, hidden_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        check_kernel(kernel_size)
        self.in_channels, self.hidden_channels, self.reach = in_channels, hidden_channels, kernel_size // 2
        self.input_weight = nn.Parameter(torch.empty(hidden_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(hidden_channels))
        nn.init.xavier_uniform_(self.input_weight)

    def _of_inputs(self, x_NCYX: Tensor, domain: Domain) -> Tensor:
        return of_exact_inputs(domain.pad(x_NCYX, self.reach), self.input_weight, self.bias)


class DepthwiseMixer2d(Memoryless):
    """Blocks of a wide depthwise kernel and a 1x1 that add to what they are given, as ConvMixer (Trockman and Kolter,
    arXiv 2201.09792) has them, with ConvNeXt's normalisation (Liu et al., arXiv 2201.03545), once in a block::

        y = W_x x                                      1x1
        y = y + P silu(norm(D_d y))                    for each dilation d; D depthwise, P 1x1

    The norm is that of a cell's channels (mean 0, variance 1, then a factor and a shift for each): it needs no other
    cell, so tiles compute what one does. Each block fills a halo of its own, of all steps at once.

    Args:
        in_channels, hidden_channels: C_x and C_h.
        kernel_size: odd size of the depthwise kernels.
        dilations: a block for each, in this order.
    """

    def __init__(
        self, in_channels: int, hidden_channels: int, kernel_size: int = 7, dilations: Sequence[int] = (1, 2, 4)
    ) -> None:
        super().__init__()
        check_kernel(kernel_size)
        check_dilations(dilations)
        self.in_channels, self.hidden_channels = in_channels, hidden_channels
        self.input_weight = nn.Parameter(torch.empty(hidden_channels, in_channels, 1, 1))
        self.input_bias = nn.Parameter(torch.zeros(hidden_channels))
        self.blocks = nn.ModuleList(_Block(hidden_channels, kernel_size, dilation) for dilation in dilations)
        nn.init.normal_(self.input_weight, std=in_channels**-0.5)

    def _of_inputs(self, x_NCYX: Tensor, domain: Domain) -> Tensor:
        y_NCYX = of_exact_inputs(x_NCYX, self.input_weight, self.input_bias)
        for block in self.blocks:
            y_NCYX = block(y_NCYX, domain)
        return y_NCYX


class _Block(nn.Module):
    """What `DepthwiseMixer2d` has of each dilation."""

    def __init__(self, channels: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.dilation, self.reach = dilation, dilation * (kernel_size // 2)
        self.depthwise = nn.Parameter(torch.empty(channels, 1, kernel_size, kernel_size))
        self.depthwise_bias = nn.Parameter(torch.zeros(channels))
        self.norm = nn.LayerNorm(channels)
        self.weight = nn.Parameter(torch.empty(channels, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels))
        for weight in (self.depthwise, self.weight):
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)

    def forward(self, y_NCYX: Tensor, domain: Domain) -> Tensor:
        mixed = functional.conv2d(
            domain.pad(y_NCYX, self.reach),
            self.depthwise,
            self.depthwise_bias,
            dilation=self.dilation,
            groups=y_NCYX.shape[1],
        )
        normed = self.norm(mixed.movedim(1, -1)).movedim(-1, 1)
        return y_NCYX + functional.conv2d(functional.silu(normed), self.weight, self.bias)
