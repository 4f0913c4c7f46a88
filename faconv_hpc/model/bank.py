"""The depthwise kernels of a step, and squeeze-and-excitation, which weighs them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .kernels import Kernels
from .taps import Taps

Pullback = Callable[[Sequence[Tensor]], tuple[Tensor, list[Tensor | None]]]


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

    def weights(self, mean_BC: Tensor, mixing: Tensor, *excitation: Tensor | None) -> tuple[Tensor, ...]:
        """(B, C_b, taps) for each pass: kernels weighed by squeeze-and-excitation of the mean, if there is any."""
        squeeze, squeeze_bias, excite, bias = excitation
        if squeeze is None or excite is None:
            weight_BDCK = mixing.expand(len(mean_BC), *mixing.shape)
        else:
            squeezed = functional.silu(functional.linear(mean_BC, squeeze, squeeze_bias))
            excited = functional.linear(squeezed, excite, bias)
            weight_BDCK = torch.sigmoid(excited).unflatten(1, mixing.shape[:2]).unsqueeze(-1) * mixing
        if self.owner_DKN is None:
            kernels: tuple[Tensor, ...] = weight_BDCK.unbind(1)
            return kernels
        return (torch.einsum("bdck,dkn->bcn", weight_BDCK, self.owner_DKN.to(weight_BDCK.dtype)),)

    def again(self, mean_BC: Tensor, mixing: Tensor, *excitation: Tensor | None) -> tuple[tuple[Tensor, ...], Pullback]:
        """`weights` once more, on the way back; and from the gradients of the kernels those of the mean and of what
        `weights` takes, None of what is not there."""
        with torch.enable_grad():
            mean_BC, mixing = (one.detach().requires_grad_() for one in (mean_BC, mixing))
            excitation = tuple(None if one is None else one.detach().requires_grad_() for one in excitation)
            made = self.weights(mean_BC, mixing, *excitation)

        def pullback(grads: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
            there = [one for one in excitation if one is not None]
            of_mean, of_mixing, *of_there = torch.autograd.grad(
                made, [mean_BC, mixing, *there], grads, materialize_grads=True
            )
            gradients = iter(of_there)
            return of_mean, [of_mixing, *(None if one is None else next(gradients) for one in excitation)]

        return tuple(one.detach() for one in made), pullback

    def adjoint(self, into_BCYX: Tensor, framed_BFYX: Tensor, weights: Sequence[Tensor]) -> None:
        """The padded u's gradient from m's, which stands amid twice as much of a frame of zeros."""
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
