"""What a layer has to do, whoever computes it: multiply-adds by formula, and bytes that memory must bear."""

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..model.attention import AxialAttention
from ..model.layer import FAConvLSTM2d
from .case import BenchCase

PASSES = 3
"""A backward has two products for each one of the forward: the gradients of both factors."""


def multiply_adds(layer: nn.Module, case: BenchCase) -> int:
    """Of one forward, over all cells of all tiles, samples and steps.

    Counted is what grows with the cells: convolutions, matrix products, the merged taps of depthwise kernels, and the
    two products of attention over whole lines. Gates, means and squeeze-and-excitation are not.
    """
    cells = case.batch * case.nlat * case.nlon
    if isinstance(layer, FAConvLSTM2d):
        return cells * _of_sweeps(layer, case)
    return cells * case.steps * sum(weight.numel() for weight in layer.parameters() if weight.dim() == 4)


def _of_sweeps(layer: FAConvLSTM2d, case: BenchCase) -> int:
    """Per cell, of all steps; the first has no h to project."""
    taps = sum(len(one.offsets) for one in layer.passes) * layer.mixing_weight.shape[1]
    step = layer.input_weight.numel() + layer.hidden_weight.numel() + taps + layer.expansion_weight.numel()
    times = case.steps // layer.attention_every if layer.attention is not None else 0
    attention = times * _of_attention(layer.attention, case) if layer.attention is not None else 0
    return case.steps * step - layer.hidden_weight.numel() + attention


def _of_attention(attention: AxialAttention, case: BenchCase) -> int:
    """Per cell: projections, and what a cell has to do with every other of its row and its column."""
    total = 0
    for lines, length in ((attention.rows, case.nlon), (attention.columns, case.nlat)):
        total += lines.qkv.numel() + lines.out.numel() + 2 * lines.out.shape[1] * length
    return total


class KeptForBackward:
    """Inside the ``with`` block: what autograd keeps, each memory once, without what the caller has anyway.

    Args:
        known: tensors whose memory is not counted.
    """

    def __init__(self, known: list[Tensor]) -> None:
        self._known = known
        self._kept: dict[int, Tensor] = {}
        self._hooks = saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def __enter__(self) -> "KeptForBackward":
        self._hooks.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self._hooks.__exit__(*raised)

    def bytes_beside(self, output: Tensor) -> int:
        """Without those of the output either."""
        known = {tensor.untyped_storage().data_ptr() for tensor in (*self._known, output)}
        return sum(tensor.untyped_storage().nbytes() for place, tensor in self._kept.items() if place not in known)

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor


def least_moved_bytes(x: Tensor, output: Tensor, kept_bytes: int, parameters_bytes: int) -> int:
    """What a forward and a backward must read and write at least, if all else stayed in caches.

    Input and its gradient, output and its gradient once each; what is kept is written and read; parameters are read
    twice, their gradients written.
    """
    return 2 * (x.nbytes + output.nbytes + kept_bytes) + PASSES * parameters_bytes
