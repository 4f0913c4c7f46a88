"""Depthwise relatives of ConvLSTM, to be compared with: what others have made of it to save arithmetic.

They are called, and cut into tiles, as `ConvLSTM2d` is. Gates are ordered i, f, g, o; the bias of f starts at 1.
Convolutions are the library's, as their authors have them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..spatial.domain import Domain
from .recurrence import State, Unrolled, of_exact_inputs
from .rules import check_kernel


class _Depthwise(Unrolled):
    def __init__(self, in_channels: int, hidden_channels: int, kernel_size: int) -> None:
        super().__init__()
        check_kernel(kernel_size)
        self.in_channels, self.hidden_channels, self.reach = in_channels, hidden_channels, kernel_size // 2

    def _depthwise(self, x_BCYX: Tensor, weight: Tensor, bias: Tensor, domain: Domain) -> Tensor:
        padded = domain.pad(x_BCYX, self.reach)
        return functional.conv2d(padded, weight.to(padded.dtype), bias.to(padded.dtype), groups=x_BCYX.shape[1])


class BottleneckLSTM2d(_Depthwise):
    """Bottleneck-LSTM (Liu and Zhu, arXiv 1711.06368): one bottleneck for all gates, depthwise separable throughout::

        b = relu(P_b [D_x x, D_h h])                   D depthwise, P 1x1, to C_h channels
        i, f, g, o = P_a D_b b
        c = sigmoid(f) c + sigmoid(i) relu(g)
        h = sigmoid(o) relu(c)

    Two halos are filled at every step, that of h and that of b.

    Args:
        in_channels, hidden_channels: C_x and C_h.
        kernel_size: odd size of the depthwise kernels.
    """

    def __init__(self, in_channels: int, hidden_channels: int, kernel_size: int = 3) -> None:
        super().__init__(in_channels, hidden_channels, kernel_size)
        kernel = (1, kernel_size, kernel_size)
        self.input_depthwise = nn.Parameter(torch.empty(in_channels, *kernel))
        self.input_depthwise_bias = nn.Parameter(torch.empty(in_channels))
        self.input_weight = nn.Parameter(torch.empty(hidden_channels, in_channels, 1, 1))
        self.hidden_depthwise = nn.Parameter(torch.empty(hidden_channels, *kernel))
        self.hidden_depthwise_bias = nn.Parameter(torch.empty(hidden_channels))
        self.hidden_weight = nn.Parameter(torch.empty(hidden_channels, hidden_channels, 1, 1))
        self.bottleneck_bias = nn.Parameter(torch.empty(hidden_channels))
        self.gate_depthwise = nn.Parameter(torch.empty(hidden_channels, *kernel))
        self.gate_depthwise_bias = nn.Parameter(torch.empty(hidden_channels))
        self.gate_weight = nn.Parameter(torch.empty(4 * hidden_channels, hidden_channels, 1, 1))
        self.gate_bias = nn.Parameter(torch.empty(4 * hidden_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        _reset(self, self.gate_bias)

    def _of_inputs(self, x_NCYX: Tensor, domain: Domain) -> Tensor:
        spread = self._depthwise(x_NCYX, self.input_depthwise, self.input_depthwise_bias, domain)
        return of_exact_inputs(spread, self.input_weight, self.bottleneck_bias)

    def _step(self, of_input_BCYX: Tensor, state: State, domain: Domain) -> State:
        h, c = state
        spread = self._depthwise(h, self.hidden_depthwise, self.hidden_depthwise_bias, domain)
        bottleneck = torch.relu(of_input_BCYX + functional.conv2d(spread, self.hidden_weight))
        mixed = self._depthwise(bottleneck, self.gate_depthwise, self.gate_depthwise_bias, domain)
        i, f, g, o = functional.conv2d(mixed, self.gate_weight, self.gate_bias).to(c.dtype).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.relu(g)
        return (torch.sigmoid(o) * torch.relu(c)).to(h.dtype), c


class DepthwiseConvLSTM2d(_Depthwise):
    """The ConvLSTM of RVT (Gehrig and Scaramuzza, arXiv 2212.05598): only h is convolved, depthwise::

        i, f, g, o = W_x x + W_h D h                   D depthwise, W 1x1
        c = sigmoid(f) c + sigmoid(i) tanh(g)
        h = sigmoid(o) tanh(c)

    Args:
        in_channels, hidden_channels: C_x and C_h; RVT has them equal.
        kernel_size: odd size of the depthwise kernel.
    """

    def __init__(self, in_channels: int, hidden_channels: int, kernel_size: int = 3) -> None:
        super().__init__(in_channels, hidden_channels, kernel_size)
        self.input_weight = nn.Parameter(torch.empty(4 * hidden_channels, in_channels, 1, 1))
        self.hidden_depthwise = nn.Parameter(torch.empty(hidden_channels, 1, kernel_size, kernel_size))
        self.hidden_depthwise_bias = nn.Parameter(torch.empty(hidden_channels))
        self.hidden_weight = nn.Parameter(torch.empty(4 * hidden_channels, hidden_channels, 1, 1))
        self.gate_bias = nn.Parameter(torch.empty(4 * hidden_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        _reset(self, self.gate_bias)

    def _of_inputs(self, x_NCYX: Tensor, domain: Domain) -> Tensor:
        return of_exact_inputs(x_NCYX, self.input_weight, self.gate_bias)

    def _step(self, of_input_BCYX: Tensor, state: State, domain: Domain) -> State:
        h, c = state
        spread = self._depthwise(h, self.hidden_depthwise, self.hidden_depthwise_bias, domain)
        gates = of_input_BCYX + functional.conv2d(spread, self.hidden_weight)
        i, f, g, o = gates.to(c.dtype).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return (torch.sigmoid(o) * torch.tanh(c)).to(h.dtype), c


def _reset(layer: nn.Module, gate_bias: Tensor) -> None:
    """Kernels keep the variance of what they are given; biases are 0, but 1 for the forget gate."""
    for weight in layer.parameters():
        nn.init.normal_(weight, std=weight[0].numel() ** -0.5) if weight.dim() > 1 else nn.init.zeros_(weight)
    nn.init.ones_(gate_bias.data.chunk(4)[1])
