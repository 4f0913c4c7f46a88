"""The passes over all cells of a step: products, mixing and the gates, forward and backward; and attention.

``"eager"`` is plain tensor arithmetic, and the reference. ``"compiled"`` is loops that read and write each number
once: in C++ on a CPU (native.py), and what torch.compile makes of the arithmetic elsewhere. ``"triton"`` makes one
kernel of mixing, expansion and gates on a GPU (fused.py). They know nothing of autograd, but for attention: sweep.py
calls them, forward and backward.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import InputError
from ..spatial.collectives import at_least_float32
from .taps import Gates, Mixing, Offsets


class Sums(NamedTuple):
    """The gradients of what expands and of what gates learn, summed over cells and samples, in float32 or better."""

    weight: Tensor | None
    """None: it was not asked for."""
    bias: Tensor
    peep_GC: Tensor


KERNEL_MODES = ("eager", "compiled", "triton")
SHAPES = 64  # compilations of one pass before torch gives up; its default of 8 is soon reached by tests of layouts


def _shifted_sum(into_BCYX: Tensor, padded_BCYX: Tensor, weight_BCN: Tensor, offsets: Offsets) -> None:
    rows, columns = into_BCYX.shape[-2:]
    total = torch.zeros_like(padded_BCYX[..., :rows, :columns], dtype=weight_BCN.dtype)
    for tap, (row, column) in enumerate(offsets):
        total = (
            total + weight_BCN[:, :, tap, None, None] * padded_BCYX[..., row : row + rows, column : column + columns]
        )
    into_BCYX.copy_(total)


def _shifted_products(padded_BCYX: Tensor, grad_BCYX: Tensor, offsets: Offsets) -> Tensor:
    rows, columns = grad_BCYX.shape[-2:]
    grad = grad_BCYX.to(at_least_float32(grad_BCYX.dtype))
    return torch.stack(
        [
            (padded_BCYX[..., row : row + rows, column : column + columns] * grad).sum((-2, -1))
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


def _gates(
    h_BCYX: Tensor,
    after_BCYX: Tensor,
    a_BGCYX: Tensor,
    bias_GC: Tensor,
    c_BCYX: Tensor,
    peep_GC: Tensor,
    squash: Squash = OF_LIBRARY,
) -> None:
    """Writes h and the new c; pre-activations (B, 4, C, Y, X) come without their bias (4, C)."""
    p_i, p_f, p_o = peep_GC[:, :, None, None].unbind(0)
    i, f, g, o = (a_BGCYX.to(c_BCYX.dtype) + bias_GC[:, :, None, None]).unbind(1)
    c_new = squash.sigmoid(f + p_f * c_BCYX) * c_BCYX + squash.sigmoid(i + p_i * c_BCYX) * squash.tanh(g)
    h_BCYX.copy_(squash.sigmoid(o + p_o * c_new) * squash.tanh(c_new))
    after_BCYX.copy_(c_new)


def _gate_gradients(
    before_BCYX: Tensor,
    a_BGCYX: Tensor,
    bias_GC: Tensor,
    c_BCYX: Tensor,
    peep_GC: Tensor,
    grad_h: Tensor,
    grad_c: Tensor,
    squash: Squash = OF_LIBRARY,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes the gradient of the old c and returns those of pre-activations, bias and peepholes, from those of h and of
    the new c."""
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
    grad_a = torch.stack([d_i, d_f, d_g, d_o], dim=1)
    before_BCYX.copy_(d_c * f + d_i * p_i + d_f * p_f)
    return grad_a, grad_bias, grad_peep


class Turn(NamedTuple):
    """By what the pairs of numbers of each cell of a line are turned: rotary positions (Su et al., arXiv 2104.09864).

    Attributes:
        cosine_N1D, sine_N1D: of D angles; a pair is a number of the first half and its fellow of the second.
    """

    cosine_N1D: Tensor
    sine_N1D: Tensor

    def of(self, cells: slice) -> "Turn":
        """Of some of the cells."""
        return Turn(self.cosine_N1D[cells], self.sine_N1D[cells])

    def __call__(self, x_BLNHD: Tensor) -> Tensor:
        """The numbers of all cells, turned."""
        first, second = x_BLNHD.chunk(2, dim=-1)
        cosine, sine = self
        return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


def is_planar(x_BCYX: Tensor) -> bool:
    """Whether each sample is contiguous, wherever it is."""
    _, _, rows, columns = x_BCYX.shape
    return x_BCYX.stride()[1:] == (rows * columns, columns, 1)


def has_rows(x_BCYX: Tensor) -> bool:
    """Whether the rows of each channel follow each other, wherever it is: as of some rows of what is planar."""
    return x_BCYX.stride()[2:] == (x_BCYX.shape[3], 1)


def planar(x_BCYX: Tensor) -> Tensor:
    """The same numbers, with each sample contiguous."""
    return x_BCYX if is_planar(x_BCYX) else x_BCYX.clone(memory_format=torch.contiguous_format)


class Kernels:
    """The passes in plain tensor arithmetic: ``"eager"``, and what others are compared with."""

    def product(self, weight: Tensor, x_BCYX: Tensor, into: Tensor | None = None, *, add: bool = False) -> Tensor:
        """A 1x1 convolution as one matrix product per sample: (B, C', Y, X) for a (C', C) weight.

        `torch.matmul` would fold the batch into the cells and copy x to do so.

        Args:
            weight: of x's type.
            into: where to write it, contiguous; of x's type or a better one, in which is added.
            add: to what stands there.
        """
        x_BCN = x_BCYX.flatten(2)
        weights = weight.expand(x_BCN.shape[0], -1, -1)
        if into is None:
            return torch.bmm(weights, x_BCN).view(x_BCYX.shape[0], -1, *x_BCYX.shape[2:])
        product = into.view(*into.shape[:2], -1)
        if into.dtype != x_BCYX.dtype:
            rounded = torch.bmm(weights, x_BCN)
            product.add_(rounded) if add else product.copy_(rounded)
        elif add:
            torch.baddbmm(product, weights, x_BCN, out=product)
        else:
            torch.bmm(weights, x_BCN, out=product)
        return into

    def mix(self, into_BCYX: Tensor, padded_BCYX: Tensor, weight_BCN: Tensor, offsets: Offsets) -> None:
        """Weighted sum of the cells at so many offsets: a depthwise convolution with merged taps.

        Its adjoint is the same with `Taps.mirrored` offsets of a gradient that is framed by zeros.

        Args:
            into_BCYX: where it goes.
            padded_BCYX: so many more rows and columns as the offsets need.
            weight_BCN: a weight for every sample, channel and tap, float32 or better: the sum is made in its type.
        """
        _shifted_sum(into_BCYX, padded_BCYX, weight_BCN, offsets)

    def mix_weights(self, padded_BCYX: Tensor, grad_BCYX: Tensor, offsets: Offsets) -> Tensor:
        """(B, C, N) the gradient of the weights of `mix`, in float32 or better."""
        return _shifted_products(padded_BCYX, grad_BCYX, offsets)

    def advance(self, h: Tensor, after: Tensor, mixed_BFYX: Tensor, c_BCYX: Tensor, gates: Gates) -> None:
        """Expansion and gates, design section 3, steps 4 and 5.

        Args:
            h: where h goes, of any type.
            after: where the new c goes.
            mixed_BFYX: m.
            c_BCYX: cell state; float32 or better, and so is the arithmetic of the gates.
            gates: what they learn.
        """
        self._gates(h, after, *_gate_inputs(self.product(gates.weight, mixed_BFYX), c_BCYX, gates))

    def retreat(
        self,
        mixed_BFYX: Tensor,
        before: Tensor,
        c_BCYX: Tensor,
        gates: Gates,
        grad_h: Tensor,
        grad_c: Tensor,
        learns: bool = True,
    ) -> Sums:
        """The gradients of `advance`, whose pre-activations are computed again.

        Args:
            mixed_BFYX: m, in whose place its gradient comes.
            before: where the gradient of the old c goes.
            grad_h, grad_c: of h and of the new c.
            learns: whether that of the expansion's weight is asked for; it costs a product.
        """
        given = _gate_inputs(self.product(gates.weight, mixed_BFYX), c_BCYX, gates)
        grad_a, grad_bias, grad_peep = self._gate_gradients(before, *given, grad_h, grad_c)
        grad_a = grad_a.flatten(1, 2).to(mixed_BFYX.dtype)
        of_weight = None
        if learns:
            of_weight = torch.bmm(grad_a.flatten(2), mixed_BFYX.flatten(2).transpose(1, 2)).sum(0, dtype=c_BCYX.dtype)
        mixed_BFYX.copy_(self.product(gates.weight.t(), grad_a))
        return Sums(of_weight, grad_bias.flatten(), grad_peep)

    def room(self, like_BCYX: Tensor, weight: Tensor) -> Tensor:
        """Where `mix_and_advance` and `mix_and_retreat` put m, for so many samples and cells and this expansion."""
        return weight.new_empty(like_BCYX.shape[0], weight.shape[1], *like_BCYX.shape[2:])

    def mix_and_advance(
        self, h: Tensor, after: Tensor, mixing: Mixing, c: Tensor, gates: Gates, room: Tensor, rows: slice
    ) -> None:
        """`advance` of some rows, from what m is made of; m itself is not to be read afterwards."""
        h, after, room, c = (one[..., rows, :] for one in (h, after, room, c))
        self._mix_passes(room, mixing.of_rows(rows))
        self.advance(h, after, room, c, gates)

    def mix_and_retreat(
        self,
        grad_mixed: Tensor,
        before: Tensor,
        mixing: Mixing,
        c: Tensor,
        gates: Gates,
        grad_h: Tensor,
        grad_c: Tensor,
        room: Tensor,
        rows: slice,
        learns: bool = True,
    ) -> Sums:
        """`retreat` of some rows, whose m is computed again; its gradient is written to the view ``grad_mixed``."""
        several = grad_mixed, before, c, grad_h, grad_c, room
        grad_mixed, before, c, grad_h, grad_c, room = (one[..., rows, :] for one in several)
        self._mix_passes(room, mixing.of_rows(rows))
        sums = self.retreat(room, before, c, gates, grad_h, grad_c, learns)
        grad_mixed.copy_(room)
        return sums

    def _mix_passes(self, into_BFYX: Tensor, mixing: Mixing) -> None:
        padded, passes, weights = mixing
        for part, taps, weight in zip(into_BFYX.chunk(len(passes), dim=1), passes, weights, strict=True):
            self.mix(part, padded, weight, taps.offsets)

    def attend(self, own: Tensor, others: Tensor | None, turn_q: Turn, turn_k: Turn, bias_M: Tensor | None) -> Tensor:
        """Scaled dot-product attention among the cells of each line, differentiable by what they have.

        Args:
            own: (B, L, N, 3, H, D), queries, keys and values, the numbers of a head of a cell side by side; or queries
                alone, (B, L, N, 1, H, D), where they attend to others.
            others: (B, L, M, 2, H, D), keys and values of those.
            turn_q, turn_k: of the cells of queries and of keys.
            bias_M: (M,) what is added to the logits of each key's cell.

        Returns:
            (B, L, N, H, D).
        """
        q, k, v = (*own.unbind(3), *(() if others is None else others.unbind(3)))
        lines = q.shape[:2]
        q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (turn_q(q), turn_k(k), v))
        mask = None if bias_M is None else bias_M.expand(1, 1, q.shape[-2], -1)
        if not q.shape[0]:
            mixed = q + k[..., :1, :] * 0 + v[..., :1, :] * 0  # no lines: keep the graph
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        attended: Tensor = mixed.transpose(1, 2).unflatten(0, lines)
        return attended

    _gates: Callable[..., None] = staticmethod(_gates)
    _gate_gradients: Callable[..., tuple[Tensor, Tensor, Tensor]] = staticmethod(_gate_gradients)


class TracedKernels(Kernels):
    """What torch.compile makes of them: one loop over memory each, of Triton on a GPU."""

    def __init__(self) -> None:
        from torch import _dynamo as dynamo  # a second of every start, of commands that compute nothing, too

        # A tile shape of its own costs a compilation; from the second on sizes are symbols in the code.
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, SHAPES)
        traced = partial(torch.compile, fullgraph=True)
        self.mix, self.mix_weights = traced(_shifted_sum), traced(_shifted_products)  # type: ignore[method-assign]
        self._gates = traced(partial(_gates, squash=BY_EXP))
        self._gate_gradients = traced(partial(_gate_gradients, squash=BY_EXP))


def kernels_for(mode: str, x: Tensor, c: Tensor) -> Kernels:
    """The passes for activations and cell states like these; see `kernels_named` for the choice.

    Raises:
        InputError: ``"triton"`` on a GPU, and the package is not there.
    """
    return _MADE[kernels_named(mode, x.device.type, x.dtype, c.dtype)]()


def kernels_named(mode: str, device: str, activations: torch.dtype, cells: torch.dtype) -> str:
    """``"eager"``, or what its loops are made by: ``"C++"``, ``"Triton"``, ``"torch.compile"``.

    Args:
        mode: ``"eager"``; ``"compiled"``, C++ for float32 and float64 on a CPU (it needs a compiler), torch.compile
            for all else; ``"triton"``, on a GPU kernels of our own for activations in float32 and bf16 and cell states
            in float32, for all else as ``"compiled"``.
        device: its type.
    """
    check_kernels(mode)
    if mode == "eager":
        return mode
    if device == "cpu" and activations == cells and cells in (torch.float32, torch.float64):
        return "C++"
    ours = mode == "triton" and device == "cuda" and cells == torch.float32
    return "Triton" if ours and activations in (torch.float32, torch.bfloat16) else "torch.compile"


def check_kernels(mode: str) -> None:
    """Raises InputError for another mode than there is."""
    if mode not in KERNEL_MODES:
        raise InputError(f"kernels={mode!r} is not known. Use one of {', '.join(KERNEL_MODES)}.")


EAGER = Kernels()


@cache
def _native() -> Kernels:
    from .native import NativeKernels

    return NativeKernels()


@cache
def _fused() -> Kernels:
    try:
        from .fused import TritonKernels
    except ImportError as error:
        raise InputError(
            f"kernels=triton needs the package triton, which torch's CUDA builds bring: {error}. Install such a build, "
            f"or use kernels: eager."
        ) from None
    return TritonKernels(_traced())


_traced = cache(TracedKernels)
_MADE: dict[str, Callable[[], Kernels]] = {
    "eager": lambda: EAGER,
    "C++": _native,
    "torch.compile": _traced,
    "Triton": _fused,
}


def _gate_inputs(a_BFYX: Tensor, c_BCYX: Tensor, gates: Gates) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    four, kind = (4, c_BCYX.shape[1]), c_BCYX.dtype
    return a_BFYX.unflatten(1, four), gates.bias.unflatten(0, four).to(kind), c_BCYX, gates.peep_GC.to(kind)
