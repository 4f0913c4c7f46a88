"""The passes of a step on a GPU by the Triton kernels of blocks.py: mixing, expansion and gates in one of them.

Nothing depends on the number of a GPU's processors: sums over cells are made of the same parts everywhere, one after
the other, so that a run has the same bits every time. Compiled is for a type and a number of channels, not for a tile.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from . import blocks
from .arithmetic import rounds_products
from .kernels import Kernels, Sums, has_rows, planar
from .taps import Gates, Mixing, Offsets

MIXED_CHANNELS = 128  # of m: of more the registers of a program do not hold 16 cells
NUMBERS = 2**31  # of a sample, which kernels count in 32 bits
PROGRAMS = 256  # that sum over cells, each by itself; two for each processor of the GPUs of today
COLUMNS = 16  # of a block: where they lie side by side 64 bytes are, or 32
CELLS = {"ROWS": 8, "COLUMNS": COLUMNS}  # of a block, of the passes without products
TOGETHER = 16  # channels that a program mixes


class TritonKernels(Kernels):
    """The passes of `Kernels`, for activations in float32 or bf16 and cell states in float32.

    Args:
        beyond: the passes for more channels of m than `MIXED_CHANNELS`, and for tiles of more than 2^31 numbers.
    """

    def __init__(self, beyond: Kernels) -> None:
        self.beyond = beyond

    def room(self, like_BCYX: Tensor, weight: Tensor) -> Tensor:
        """Empty: m does not go through memory."""
        return weight.new_empty(0)

    def mix(self, into_BCYX: Tensor, padded_BCYX: Tensor, weight_BCN: Tensor, offsets: Offsets) -> None:
        padded = padded_BCYX if has_rows(padded_BCYX) else padded_BCYX.contiguous()
        weight = weight_BCN.contiguous()
        if not _countable(into_BCYX, padded):
            self.beyond.mix(into_BCYX, padded, weight, offsets)
            return
        assert has_rows(into_BCYX) and into_BCYX.shape[:2] == padded.shape[:2] == weight.shape[:2], "the same channels"
        batch, channels, *cells = into_BCYX.shape
        grid = _blocks(cells, CELLS), batch, triton.cdiv(channels, TOGETHER)
        sizes = *cells, padded.shape[3], padded.stride(1), channels, len(offsets)
        with _on(padded):
            blocks.mix[grid](
                into_BCYX, padded, weight, _shifts((offsets,), padded.shape[3], padded.device), *into_BCYX.stride()[:2],
                padded.stride(0), *sizes, **CELLS, CHANNELS=TOGETHER,
            )  # fmt: skip

    def mix_weights(self, padded_BCYX: Tensor, grad_BCYX: Tensor, offsets: Offsets) -> Tensor:
        padded, (batch, channels, *cells), taps = planar(padded_BCYX), grad_BCYX.shape, len(offsets)
        grad = grad_BCYX if grad_BCYX.stride(3) == 1 else grad_BCYX.contiguous()
        parts = min(_blocks(cells, CELLS), triton.cdiv(PROGRAMS, batch * channels))
        products = padded.new_empty(parts, batch, channels, taps, dtype=torch.float32)
        sizes = *grad.stride()[:3], *cells, padded.shape[3], padded[0, 0].numel(), channels, taps
        with _on(padded):
            blocks.mix_weights[(batch * channels, parts)](
                products, padded, grad, _shifts((offsets,), padded.shape[3], padded.device), padded.stride(0), *sizes,
                **CELLS, TAPS=triton.next_power_of_2(taps),
            )  # fmt: skip
        return products.sum(0)

    def mix_and_advance(
        self, h: Tensor, after: Tensor, mixing: Mixing, c: Tensor, gates: Gates, room: Tensor, rows: slice
    ) -> None:
        weight = gates.weight
        if weight.shape[1] > MIXED_CHANNELS or not _countable(mixing.padded_BCYX, c):
            self.beyond.mix_and_advance(h, after, mixing, c, gates, self.beyond.room(c, weight), rows)
            return
        (h, after, c), mixing, block = _rows(rows, h, after, c), mixing.of_rows(rows), block_of(weight)
        batches = h.stride(0), after.stride(0), c.stride(0)
        with _on(c):
            blocks.advance[_blocks(c.shape[2:], block), len(c)](
                h, after, *_given(mixing, c, gates), *batches, c.stride(1), *_sizes(mixing, c, weight), **block
            )

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
        weight = gates.weight
        if weight.shape[1] > MIXED_CHANNELS or not _countable(mixing.padded_BCYX, c, grad_mixed):
            room = self.beyond.room(c, weight)
            return self.beyond.mix_and_retreat(grad_mixed, before, mixing, c, gates, grad_h, grad_c, room, rows, learns)
        (before, c, grad_h, grad_c), mixing = _rows(rows, before, c, grad_h, grad_c), mixing.of_rows(rows)
        (batch, channels, *cells), inner, grad_mixed = c.shape, weight.shape[1], grad_mixed[..., rows, :]
        given, sizes = _given(mixing, c, gates), _sizes(mixing, c, weight)
        grads, strides = (grad_h, grad_c), (grad_h.stride(0), grad_c.stride(0), c.stride(0), c.stride(1))
        block, of_sums = block_of(weight), block_of(weight, sums=True)
        programs = triton.cdiv(channels, of_sums["CHANNELS"])
        parts = min(_blocks(cells, of_sums) * batch, triton.cdiv(PROGRAMS, programs))
        products, sums = c.new_empty(parts, 4 * channels, inner if learns else 0), c.new_empty(parts, 7, channels)
        with _on(c):
            into = *grad_mixed.stride()[:3], before.stride(0)
            blocks.retreat[_blocks(cells, block), batch](
                grad_mixed, before, *grads, *given, *into, *strides, *sizes, **block
            )
            blocks.retreat_weights[programs, parts](
                products, sums, *grads, *given, *strides, sizes[0], batch, *sizes[1:], LEARNS=learns, **of_sums
            )
        of_bias, of_peep = sums.sum(0).split([4, 3])
        return Sums(products.sum(0) if learns else None, of_bias.flatten(), of_peep)


def _rows(rows: slice, *several: Tensor) -> list[Tensor]:
    """Of tensors of one tile."""
    some = [one[..., rows, :] for one in several]
    assert len({(one.shape, one.stride(1)) for one in some}) == 1 and all(map(has_rows, some)), "of one tile"
    return some


def _given(mixing: Mixing, c: Tensor, gates: Gates) -> tuple[Tensor, ...]:
    """What m is made of, and what becomes of it, as kernels take it."""
    (padded, passes, weights), (expansion, bias, peephole) = mixing, gates
    assert has_rows(padded) and c.dtype == torch.float32, "as a sweep makes them"
    offsets = tuple(taps.offsets for taps in passes)
    factors = torch.cat(list(weights), dim=1) if len(weights) > 1 else weights[0].contiguous()
    shifts = _shifts(offsets, padded.shape[3], padded.device)
    return padded, factors, shifts, c, expansion.contiguous(), bias.float().contiguous(), peephole.float().contiguous()


def _sizes(mixing: Mixing, c: Tensor, weight: Tensor) -> tuple[int, ...]:
    padded, passes, _ = mixing
    _, bottleneck, _, padded_columns = padded.shape
    assert weight.shape == (4 * c.shape[1], len(passes) * bottleneck), "as many channels as the weight takes"
    of_cells = padded.stride(0), *c.shape[2:], padded_columns, padded.stride(1)
    return *of_cells, c.shape[1], weight.shape[1], bottleneck, len(passes[0].offsets)


def block_of(weight: Tensor, *, sums: bool = False) -> dict[str, Any]:
    """What a program of a step has: cells, the channels that it expands at a time, and warps.

    As much as its registers hold: tests/test_triton.py compiles them. Which sizes are fastest was not measured.

    Args:
        weight: of the expansion: how many channels m has, and what is multiplied.
        sums: of the kernel that holds the sums of `retreat_weights`.
    """
    inner = max(triton.next_power_of_2(weight.shape[1]), 16)
    exact = weight.dtype == torch.float32 and not rounds_products()  # takes more registers than a tensor core's product
    numbers, most = (1024, 64) if sums and inner == 32 else (2048, 64) if sums or exact else (4096, 128)
    rows = min(numbers // inner, most) // COLUMNS
    return {
        "ROWS": rows,
        "COLUMNS": COLUMNS,
        "CHANNELS": 8 if exact or inner > 64 else 16,
        "INNER": inner,
        "PRECISION": "ieee" if exact or weight.dtype != torch.float32 else "tf32",
        "num_warps": 8,
        "num_stages": 1,
    }


def _blocks(cells: Sequence[int], block: Mapping[str, Any]) -> int:
    """How many cover so many rows and columns."""
    return math.prod(triton.cdiv(size, block[name]) for size, name in zip(cells, ("ROWS", "COLUMNS"), strict=True))


def _countable(*several: Tensor) -> bool:
    """Whether the numbers of a sample of each can be counted in 32 bits."""
    return all(one.stride(0) < NUMBERS and one[0].numel() < NUMBERS for one in several)


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels are started on the current GPU, which need not be that of their tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def _shifts(passes: tuple[Offsets, ...], padded_columns: int, device: torch.device) -> Tensor:
    """(passes, taps) how far each tap lies from a cell's north-western corner."""
    shifts = [[row * padded_columns + column for row, column in offsets] for offsets in passes]
    return torch.tensor(shifts, dtype=torch.int32, device=device)
