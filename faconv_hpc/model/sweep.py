"""The steps between two attentions as one differentiable operation, with a backward of its own.

Forward, for every step::

    u = W_x x + W_h h + b      in the middle of a padded buffer, whose halo travels
    m = K * u                  with the kernels of the step, which are given; or the branches one after the other
    h, c = gates(W_a m + b_a, c)

With activations in bf16, u is summed up in float32, and rounded once, when it is used; a
product is rounded to the type of what it is made of, whatever is added to it is added in float32 or better.

Kept are h, which is the result, c, and u with its halo, so that nothing is sent twice; m and the 4 C_h channels that it
is expanded to are computed again in backward. It goes through the steps from the last to the first and adds up the
weights' gradients of all steps in float32 or better; none of a product is made for what does not learn. While a halo
travels, W_x x of the next step is computed, and the step of those rows that need no other tile's cells; while its
gradient does, those of these rows and of the step's kernels, and those of W_x, W_h, b and x of the step before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..autograd import Context, Operation, as_given
from ..spatial.collectives import at_least_float32
from ..spatial.exchange import HaloExchange
from ..spatial.tape import Remembered
from .bank import Bank
from .kernels import planar
from .taps import Gates, Mixing


class Weights(NamedTuple):
    """What a step learns, but for its kernels; F channels of m.

    In float32 or better, so that their gradients are added up in that, over steps and sweeps.
    """

    input: Tensor
    """(C_b, C_x)"""
    hidden: Tensor
    """(C_b, C_h)"""
    bias: Tensor
    """(C_b,)"""
    expansion: Tensor
    """(4 C_h, F)"""
    expansion_bias: Tensor
    """(4 C_h,)"""
    peephole: Tensor
    """(3, C_h)"""

    def in_float32(self) -> "Weights":
        """The same in float32 or better: gradients are rounded once, not for every sweep."""
        return Weights._make(one.to(at_least_float32(one.dtype)) for one in self)

    def of_products(self, activations: torch.dtype, inputs: torch.dtype) -> "Weights":
        """The same, for products with what is of these types."""
        return self._replace(
            input=self.input.to(inputs),
            hidden=self.hidden.to(activations),
            expansion=self.expansion.to(activations),
        )

    @property
    def of_gates(self) -> Gates:
        """What expands, and what the gates learn."""
        return Gates(self.expansion, self.expansion_bias, self.peephole)


class Seal:
    """Whether the result of a layer is what it was: its sweeps go by it in backward, and keep it under another name."""

    def __init__(self) -> None:
        self._counter: Tensor | None = None
        self._version = 0

    def close(self, result: Tensor) -> None:
        """From here on it is not to be changed."""
        self._counter, self._version = result.detach(), result._version
        self._counter.data = result.new_empty(0)  # which counts the changes of the result, and keeps none of its memory

    def check(self) -> None:
        """Raises RuntimeError, as autograd does for what it has saved itself."""
        if self._counter is not None and self._counter._version != self._version:
            raise RuntimeError(
                "what a layer has returned was modified by an inplace operation, and its gradients need it. Change a "
                "copy, or leave the operation's inplace=True out."
            )


@dataclass(frozen=True, eq=False)
class Steps:
    """What a sweep is told beside tensors.

    Attributes:
        bank, halo: how its steps mix, and what brings them what lies beyond their tile.
        remembered: starts that, or has what came when the same segment was first computed.
        seal: of the result that it writes into.
        keep: whether there will be a backward.
    """

    bank: Bank
    halo: HaloExchange
    remembered: Remembered
    seal: Seal
    keep: bool


def _held(valid_BT: Tensor | None, step: int) -> Tensor | None:
    """(B, 1, 1, 1), the samples that keep their state; None: none does."""
    return None if valid_BT is None else ~valid_BT[:, step, None, None, None]


class Sweep(Operation):
    """So many steps from a state; see the module. Computes in the types that it is given, whatever autocast says.

    Args:
        h_BTCYX: where h of its steps goes, but for the last, which is a tensor of its own: attention may add to it. Its
            type is that of activations.
        valid_BT: bool; where it is not, a sample keeps its state. None: everywhere.
        x_BTCYX: (B, T, C_x, Y, X), of the activations' type, or float32.
        h_BCYX: the state; None: zeros.
        c_BCYX: float32 or better.
        learnt: of each pass the kernels of all steps, (T, B, C_b, taps), float32 or better; then those of `Weights`.

    Returns:
        h of all steps but the last (B, T - 1, C_h, Y, X), h and c of the last.
    """

    @staticmethod
    def forward(
        ctx: Context,
        steps: Steps,
        h_BTCYX: Tensor,
        valid_BT: Tensor | None,
        x_BTCYX: Tensor,
        h_BCYX: Tensor | None,
        c_BCYX: Tensor,
        *learnt: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        bank, kernels, halo, length = steps.bank, steps.bank.kernels, steps.halo, x_BTCYX.shape[1]
        banks, w = learnt[: len(bank.passes)], Weights(*learnt[len(bank.passes) :])
        w = w.of_products(h_BTCYX.dtype, x_BTCYX.dtype)
        last = h_BTCYX.new_empty(c_BCYX.shape)
        u = w.bias.new_empty(x_BTCYX.shape[0], len(w.bias), *x_BTCYX.shape[3:])
        room = kernels.room(u, w.expansion)
        padded, cells = list[Tensor](), []
        h, c = h_BCYX, planar(c_BCYX)
        kernels.product(w.input, x_BTCYX[:, 0], u)
        for step in range(length):
            if h is not None:
                kernels.product(w.hidden, h, u, add=True)
            if steps.keep or not step:
                padded.append(halo.framed(u, h_BTCYX.dtype))
            owned = torch.add(u, w.bias[:, None, None], out=halo.owned(padded[-1]))
            received = steps.remembered(partial(halo.start_fill, owned))
            if step < length - 1:
                kernels.product(w.input, x_BTCYX[:, step + 1], u)
            halo.fill_own(padded[-1])
            mixing = Mixing(padded[-1], bank.passes, [one[step] for one in banks])
            # A view's alias: to the compiler a view is as many shapes as what it is a view of.
            target = h_BTCYX[:, step].data if step < length - 1 else last
            c_after = torch.empty_like(c)
            advance = partial(kernels.mix_and_advance, target, c_after, mixing, c, w.of_gates, room)
            for rows in halo.core:
                advance(rows)
            halo.fill_received(padded[-1], received())
            for rows in halo.edges:
                advance(rows)
            held = _held(valid_BT, step)
            if held is not None:
                c_after = torch.where(held, c, c_after)
                target.copy_(torch.where(held, 0 if h is None else h, target))
            h, c = target, c_after
            if steps.keep:
                cells.append(c)
        early = h_BTCYX[:, : length - 1].data
        if steps.keep:
            ctx.steps = steps
            ctx.save_for_backward(valid_BT, x_BTCYX, h_BCYX, early, c_BCYX, *cells[:-1], *padded, *learnt)
        return early, last, c

    @staticmethod
    def backward(
        ctx: Context, grad_early: Tensor | None, grad_last: Tensor | None, grad_c: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpointed segment gives them once
        with as_given(saved[1].device):
            return _swept_back(ctx, saved, grad_early, grad_last, grad_c)


def _swept_back(
    ctx: Context,
    saved: Sequence[Tensor],
    grad_early: Tensor | None,
    grad_last: Tensor | None,
    grad_c: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of what `Sweep` was given, from those of what it gave."""
    valid_BT, x_BTCYX, h_BCYX, early, *rest = saved
    length = x_BTCYX.shape[1]
    cells, padded, learnt = rest[:length], rest[length : 2 * length], rest[2 * length :]
    if length > 1:
        ctx.steps.seal.check()
    _, _, _, wants_x, wants_h, wants_c, *learn = ctx.needs_input_grad
    back = _Backward(ctx.steps, learnt, learn, cells[0], early.dtype, x_BTCYX.dtype)
    grad_x = torch.empty_like(x_BTCYX) if wants_x else None
    grad_c = torch.zeros_like(cells[0]) if grad_c is None else grad_c
    grad_h = None
    for step in reversed(range(length)):
        of_result = grad_last if step == length - 1 else None if grad_early is None else grad_early[:, step]
        if grad_h is None:
            grad_h = torch.zeros_like(cells[0], dtype=early.dtype) if of_result is None else of_result
        elif of_result is not None:
            grad_h.add_(of_result)
        before = early[:, step - 1] if step else h_BCYX
        wanted = None if grad_x is None else grad_x[:, step]
        state = x_BTCYX[:, step], before, cells[step], padded[step]
        grad_h, grad_c = back.step(step, _held(valid_BT, step), state, grad_h, grad_c, wanted)
    of_learnt = back.gradients()  # which writes the last of x's
    return None, None, None, grad_x, grad_h if wants_h else None, grad_c if wants_c else None, *of_learnt


class _Backward:
    """The steps of a sweep from the last to the first: their buffers, and the sums of the gradients of what learns."""

    def __init__(
        self,
        steps: Steps,
        learnt: Sequence[Tensor],
        learn: Sequence[bool],
        c_BCYX: Tensor,
        activations: torch.dtype,
        inputs: torch.dtype,
    ) -> None:
        passes = len(steps.bank.passes)
        self.steps, self.banks, weights = steps, learnt[:passes], Weights(*learnt[passes:])
        self.w = weights.of_products(activations, inputs)
        self.of_banks = [torch.empty_like(one) for one in self.banks] if any(learn[:passes]) else []
        batch, _, *cells = c_BCYX.shape
        halo = steps.halo
        self.grad_u = c_BCYX.new_empty(batch, len(weights.bias), *cells, dtype=activations)
        self.room = steps.bank.kernels.room(c_BCYX, self.w.expansion)
        frame = 2 * halo.width
        self.framed = self.w.expansion.new_zeros(
            batch, weights.expansion.shape[1], *(size + 2 * frame for size in cells)
        )
        self.amid = self.framed[..., frame : frame + cells[0], frame : frame + cells[1]]
        self.grad_padded = halo.framed(self.grad_u)
        self.learns = dict(zip(Weights._fields, learn[passes:], strict=True))
        of_products = (torch.zeros_like(one) for one in (weights.input, weights.hidden))
        self.of_input, self.of_hidden = (total.expand(batch, *total.shape).clone() for total in of_products)
        self.of_bias = torch.zeros_like(weights.bias)
        self.others = [torch.zeros_like(one) for one in weights[3:]]
        self.left: tuple[Tensor, Tensor | None, Tensor | None] | None = None

    def step(
        self,
        number: int,
        held: Tensor | None,
        state: tuple[Tensor, Tensor | None, Tensor, Tensor],
        grad_h: Tensor,
        grad_c: Tensor,
        grad_x: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The gradients of h and c before a step from those after it; that of x is written where it is wanted."""
        w, bank, halo = self.w, self.steps.bank, self.steps.halo
        x, h, c, padded = state
        passed = None
        if held is not None:
            passed = torch.where(held, grad_h, 0), torch.where(held, grad_c, 0)
            grad_h, grad_c = torch.where(held, 0, grad_h), torch.where(held, 0, grad_c)
        c, grad_h, grad_c = planar(c), planar(grad_h), planar(grad_c)
        mixing, before = Mixing(padded, bank.passes, [one[number] for one in self.banks]), torch.empty_like(c)
        retreat = partial(self._retreat, before, mixing, c, grad_h, grad_c)
        retreat(halo.edges, halo.outside)
        received = halo.start_accumulate(self.grad_padded)
        retreat(halo.core, halo.inside)
        products = bank.products(padded, self.amid) if self.of_banks else ()
        for into, one in zip(self.of_banks, products, strict=True):
            into[number] = one
        self._do_what_is_left()
        self.grad_u.copy_(halo.owned(self.grad_padded))
        halo.add_halo(self.grad_padded, received(), self.grad_u)
        self.left = x, h, grad_x
        grad_h = bank.kernels.product(w.hidden.t(), self.grad_u)
        return (grad_h, before) if passed is None else (grad_h + passed[0], before + passed[1])

    def _retreat(
        self,
        before: Tensor,
        mixing: Mixing,
        c: Tensor,
        grad_h: Tensor,
        grad_c: Tensor,
        rows: Sequence[slice],
        padded: Sequence[slice],
    ) -> None:
        """The gradients of what is in some rows, then those of u in some padded rows, which hang on no others."""
        bank, given = self.steps.bank, (mixing, c, self.w.of_gates, grad_h, grad_c, self.room)
        for some in rows:
            sums = bank.kernels.mix_and_retreat(self.amid, before, *given, some, self.learns["expansion"])
            for total, one in zip(self.others, sums, strict=True):
                if one is not None:
                    total.add_(one)
        for some in padded:
            bank.adjoint(self.grad_padded, self.framed, mixing.weights, some)

    def _do_what_is_left(self) -> None:
        """What no other step waits for: the gradients of W_x, W_h, b and x of the step after this one."""
        if self.left is None:
            return
        x, h, grad_x = self.left
        if self.learns["input"]:
            _add_product(self.of_input, self.grad_u, x)
        if h is not None and self.learns["hidden"]:
            _add_product(self.of_hidden, self.grad_u, h)
        if grad_x is not None:
            product = self.steps.bank.kernels.product(self.w.input.to(self.grad_u.dtype).t(), self.grad_u)
            grad_x.copy_(product)
        self.of_bias.add_(self.grad_u.sum((0, 2, 3), dtype=self.w.bias.dtype))
        self.left = None

    def gradients(self) -> list[Tensor | None]:
        """Of the kernels and of all weights, in their order, after the last step; None where one does not learn."""
        self._do_what_is_left()
        sums = self.of_input.sum(0), self.of_hidden.sum(0), self.of_bias, *self.others
        of_weights = [total if learns else None for total, learns in zip(sums, self.learns.values(), strict=True)]
        of_banks = self.of_banks if self.of_banks else [None] * len(self.banks)
        return [*of_banks, *of_weights]


def _add_product(total: Tensor, grad_BCYX: Tensor, x_BCYX: Tensor) -> None:
    """Adds the gradient of a product's weight, for each sample."""
    grad_BCN, x_BNC = grad_BCYX.flatten(2).to(x_BCYX.dtype), x_BCYX.flatten(2).transpose(1, 2)
    if total.dtype == grad_BCN.dtype:
        total.baddbmm_(grad_BCN, x_BNC)
    else:
        total.add_(torch.bmm(grad_BCN, x_BNC))


class Joined(Operation):
    """h of all steps, whose buffer the sweeps have written into; what is missing is copied.

    Args:
        h_BTCYX: the buffer.
        ends: the step after each sweep.
        parts: of each sweep h of its steps but the last, and of the last.
    """

    @staticmethod
    def forward(ctx: Context, h_BTCYX: Tensor, ends: Sequence[int], *parts: Tensor) -> Tensor:
        ctx.ends = ends
        result = h_BTCYX.data
        for end, last in zip(ends, parts[1::2], strict=True):
            result[:, end - 1].copy_(last)
        return result

    @staticmethod
    def backward(ctx: Context, grad_BTCYX: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None, None]
        for first, end in zip((0, *ctx.ends[:-1]), ctx.ends, strict=True):
            grads += [grad_BTCYX[:, first : end - 1], grad_BTCYX[:, end - 1]]
        return tuple(grads)
