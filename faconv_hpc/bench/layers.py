"""The layers that are measured, of equal hidden width."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from ..errors import InputError
from ..model.convlstm import ConvLSTM2d
from ..model.layer import FAConvLSTM2d
from ..model.peers import BottleneckLSTM2d, DepthwiseConvLSTM2d
from .case import BenchCase

BASES = ("ConvLSTM k=3", "ConvLSTM k=5")
"""What all others are compared with."""

Makers = dict[str, Callable[[], nn.Module]]
"""A layer's name, and what makes it."""


def layers_of(case: BenchCase, kernels: Sequence[str], only: Sequence[str] = ()) -> Makers:
    """The layers to measure, by name; ConvLSTM's first.

    Args:
        case: gives C_x and C_h.
        kernels: modes of FAConvLSTM's passes; ``"compiled"`` goes without saying.
        only: names; none: all.

    Raises:
        InputError: a name that no layer has.
    """
    sizes = case.inputs, case.hidden
    layers: Makers = {
        "ConvLSTM k=3": partial(ConvLSTM2d, *sizes, 3),
        "ConvLSTM k=5": partial(ConvLSTM2d, *sizes, 5),
        "BottleneckLSTM": partial(BottleneckLSTM2d, *sizes),
        "RVT ConvLSTM": partial(DepthwiseConvLSTM2d, *sizes),
    }
    for mode in kernels:
        name = "FAConvLSTM" if mode == "compiled" else f"FAConvLSTM {mode}"
        layers[name] = partial(FAConvLSTM2d, *sizes, attention_every=0, kernels=mode)
        layers[f"{name} + attention"] = partial(FAConvLSTM2d, *sizes, kernels=mode)
    unknown = [name for name in only if name not in layers]
    if unknown:
        raise InputError(f"--only: there is no layer {unknown[0]!r}. Use any of: {', '.join(layers)}.")
    return {name: make for name, make in layers.items() if not only or name in only}
