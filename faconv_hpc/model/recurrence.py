"""The state of recurrent layers, and those whose step is plain arithmetic."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..autograd import autocasts
from ..errors import InputError
from ..spatial.collectives import at_least_float32
from ..spatial.domain import Domain
from .rules import check_steps

State = tuple[Tensor, ...]
"""(h, c), each (B, C_h, Y, X). c is float32 or better, whatever the activations' type. Empty: it has no memory."""


def as_taken(x_BTCYX: Tensor, in_channels: int, activations: torch.dtype, valid_BT: Tensor | None = None) -> Tensor:
    """The input of a layer whose weights are of this type: of the same, or of float32; under autocast of the same.

    0 at steps that are not valid, see `known_steps`.

    Raises:
        InputError: it has another shape than the layer takes, or a type that would be rounded.
    """
    if x_BTCYX.dim() != 5 or x_BTCYX.shape[2] != in_channels:
        raise InputError(
            f"the layer takes (batch, time, {in_channels} channels, rows, columns), got {tuple(x_BTCYX.shape)}. "
            f"Permute the tensor, or change in_channels."
        )
    check_steps(x_BTCYX.shape[1])
    x_BTCYX = known_steps(x_BTCYX, valid_BT)
    if autocasts(x_BTCYX.device):
        return x_BTCYX.to(activations)
    kinds = dict.fromkeys((activations, at_least_float32(activations)))
    if x_BTCYX.dtype not in kinds:
        raise InputError(
            f"the layer's weights are {activations}, the input {x_BTCYX.dtype}. Bring both to one type: the layer "
            f"takes {' or '.join(map(str, kinds))}."
        )
    return x_BTCYX


def known_steps(x_BTCYX: Tensor, valid_BT: Tensor | None) -> Tensor:
    """The same with 0 at steps that are not valid: whatever fills them up would reach sums over steps, as 0 times what
    is no number is none, in the gradients of weights, too."""
    return x_BTCYX if valid_BT is None else x_BTCYX.where(valid_BT[:, :, None, None, None], 0)


def zero_state(like_BTCYX: Tensor, hidden_channels: int) -> State:
    """The state of a sequence that begins, on the cells of ``like_BTCYX``."""
    h = like_BTCYX.new_zeros(like_BTCYX.shape[0], hidden_channels, *like_BTCYX.shape[-2:])
    return h, h.to(torch.promote_types(h.dtype, torch.float32))


def unrolled(
    step: Callable[[int, State], State], steps: int, state: State, valid_BT: Tensor | None
) -> tuple[Tensor, State]:
    """Runs so many steps from a state.

    Args:
        step: the state after a step, from its number (from 0) and the state before it.
        valid_BT: bool; at a step that is not valid a sample keeps its state and repeats its output. Default: all are.

    Returns:
        h of every step (B, T, C_h, Y, X), and the state after the last.
    """
    outputs = []
    for number in range(steps):
        state = held(step(number, state), state, None if valid_BT is None else valid_BT[:, number])
        outputs.append(state[0])
    return torch.stack(outputs, dim=1), state


def held(after: State, before: State, valid_B: Tensor | None) -> State:
    """The state after a step for samples whose step is valid, the one before it for the others."""
    if valid_B is None:
        return after
    valid = valid_B[:, None, None, None]
    return tuple(now.where(valid, then) for now, then in zip(after, before, strict=True))


class PlainLayer(nn.Module):
    """A layer of torch's operations: what its input alone decides is computed of all steps at once."""

    in_channels: int
    hidden_channels: int

    def forward(
        self,
        x_BTCYX: Tensor,
        state: State | None = None,
        *,
        domain: Domain | None = None,
        first_step: int = 0,
        valid_BT: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """As `FAConvLSTM2d.forward`; ``first_step`` makes no difference here."""
        x_BTCYX = as_taken(x_BTCYX, self.in_channels, next(self.parameters()).dtype, valid_BT)
        domain = domain or Domain.plane(*x_BTCYX.shape[-2:])
        parts_BTCYX = self._of_inputs(x_BTCYX.flatten(0, 1), domain).unflatten(0, x_BTCYX.shape[:2])
        cells = parts_BTCYX.shape[-2:]
        inner = domain if cells == x_BTCYX.shape[-2:] else Domain.plane(*cells)
        return self._over_steps(parts_BTCYX, state, inner, valid_BT)

    def _of_inputs(self, x_NCYX: Tensor, domain: Domain) -> Tensor:
        """What steps take of their inputs, in the weights' type; on fewer cells than there are only without tiles."""
        raise NotImplementedError

    def _over_steps(
        self, parts_BTCYX: Tensor, state: State | None, domain: Domain, valid_BT: Tensor | None
    ) -> tuple[Tensor, State]:
        """h of every step and the state after the last, of what `_of_inputs` gave."""
        raise NotImplementedError


class Unrolled(PlainLayer):
    """One whose steps follow each other."""

    def _over_steps(
        self, parts_BTCYX: Tensor, state: State | None, domain: Domain, valid_BT: Tensor | None
    ) -> tuple[Tensor, State]:
        of_steps = parts_BTCYX.unbind(1)  # an index would fill a gradient of all steps for each of them
        start = state if state is not None else zero_state(parts_BTCYX, self.hidden_channels)

        def step(number: int, before: State) -> State:
            return self._step(of_steps[number], before, domain)

        return unrolled(step, len(of_steps), start, valid_BT)

    def _step(self, of_input_BCYX: Tensor, state: State, domain: Domain) -> State:
        raise NotImplementedError


def of_exact_inputs(x_NCYX: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Their convolution, of what may be more exact than the weights: it is rounded to their type once, in the end."""
    return functional.conv2d(x_NCYX, weight.to(x_NCYX.dtype), bias.to(x_NCYX.dtype)).to(weight.dtype)
