"""ConvLSTM2d: the layer that FAConvLSTM2d replaces, with the exact semantics of Keras' ConvLSTM2D."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError
from ..spatial.domain import Domain
from .recurrence import State, Unrolled, of_exact_inputs
from .rules import check_kernel

RECURRENT_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,  # Keras 3
    "hard_sigmoid": lambda x: functional.relu6(x + 3) / 6,  # Keras 3's hard_sigmoid
    "hard_sigmoid_keras2": lambda x: torch.clamp(0.2 * x + 0.5, 0, 1),  # the default of Keras 2
}
PADDINGS = ("same", "valid")


class ConvLSTM2d(Unrolled):
    """Convolutional LSTM (Shi et al., arXiv 1506.04214) as Keras computes it: no peepholes.

    Gates are ordered i, f, c, o. ``padding`` is that of the input convolution; the recurrent one is
    always "same". Keras' kernel (k, k, C_x, 4 C_h) is ``input_weight.permute(2, 3, 1, 0)`` here.

    Args:
        in_channels, hidden_channels: C_x and C_h.
        kernel_size: odd.
        padding: ``"same"``, or ``"valid"`` (a single tile only: the output is smaller than the grid).
        recurrent_activation: ``"sigmoid"``, ``"hard_sigmoid"`` or ``"hard_sigmoid_keras2"``.
        unit_forget_bias: start with a forget bias of 1.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int = 3,
        *,
        padding: str = "same",
        recurrent_activation: str = "sigmoid",
        unit_forget_bias: bool = True,
    ) -> None:
        super().__init__()
        _check(kernel_size, padding, recurrent_activation)
        self.in_channels, self.hidden_channels = in_channels, hidden_channels
        self.padding, self.reach = padding, kernel_size // 2
        self.unit_forget_bias = unit_forget_bias
        self.recurrent_activation = RECURRENT_ACTIVATIONS[recurrent_activation]
        self.input_weight = nn.Parameter(torch.empty(4 * hidden_channels, in_channels, kernel_size, kernel_size))
        self.recurrent_weight = nn.Parameter(
            torch.empty(4 * hidden_channels, hidden_channels, kernel_size, kernel_size)
        )
        self.bias = nn.Parameter(torch.empty(4 * hidden_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew, as Keras does: Glorot, orthogonal, zero bias."""
        nn.init.xavier_uniform_(self.input_weight)
        nn.init.orthogonal_(self.recurrent_weight)
        nn.init.zeros_(self.bias)
        if self.unit_forget_bias:
            nn.init.ones_(self.bias.data[self.hidden_channels : 2 * self.hidden_channels])

    def _of_inputs(self, x_NCYX: Tensor, domain: Domain) -> Tensor:
        """The input convolution, in the input's type."""
        if self.padding == "same":
            x_NCYX = domain.pad(x_NCYX, self.reach)
        elif domain.tiles > 1:
            raise InputError(
                f"padding='valid' makes the output smaller than the grid, which {domain.tiles} tiles cannot "
                f"share. Use padding='same', or a single tile."
            )
        return of_exact_inputs(x_NCYX, self.input_weight, self.bias)

    def _step(self, of_input_BCYX: Tensor, state: State, domain: Domain) -> State:
        h, c = state
        recurrent = functional.conv2d(domain.pad(h, self.reach), self.recurrent_weight)
        i, f, g, o = (of_input_BCYX + recurrent).to(c.dtype).chunk(4, dim=1)
        activation = self.recurrent_activation
        c = activation(f) * c + activation(i) * torch.tanh(g)
        return (activation(o) * torch.tanh(c)).to(h.dtype), c


def _check(kernel_size: int, padding: str, recurrent_activation: str) -> None:
    check_kernel(kernel_size)
    if padding not in PADDINGS:
        raise InputError(f"padding={padding!r} is not known. Use one of {', '.join(PADDINGS)}.")
    if recurrent_activation not in RECURRENT_ACTIVATIONS:
        raise InputError(
            f"recurrent_activation={recurrent_activation!r} is not known. "
            f"Use one of {', '.join(RECURRENT_ACTIVATIONS)}."
        )
