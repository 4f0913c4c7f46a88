"""What a network can be made of: FAConvLSTM, and what it is to be compared with, at one place and by one word each."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import InputError
from .convlstm import ConvLSTM2d
from .layer import FAConvLSTM2d
from .memoryless import DepthwiseMixer2d, Linear2d
from .peers import BottleneckLSTM2d, DepthwiseConvLSTM2d
from .rules import CELL_OPTIONS, ON_THE_SPHERE
from .sphere import SphericalOperator2d

CELLS: dict[str, type[nn.Module]] = {
    "faconvlstm": FAConvLSTM2d,
    "convlstm": ConvLSTM2d,
    "bottleneck": BottleneckLSTM2d,
    "depthwise_convlstm": DepthwiseConvLSTM2d,
    "depthwise": DepthwiseMixer2d,
    "linear": Linear2d,
    "sfno": SphericalOperator2d,
    "lsno": SphericalOperator2d,
}
"""The layers by the word that names them in a config. All are called as `FAConvLSTM2d` is."""
assert CELLS.keys() == CELL_OPTIONS.keys(), f"{CELLS.keys() ^ CELL_OPTIONS.keys()} are in one of them alone"


def layers_of(
    cell: str, in_channels: int, hidden_channels: int, layers: int, options: Mapping[str, Any]
) -> nn.ModuleList:
    """So many layers, each on the one before it, or one of so many blocks; raises InputError for an unknown cell."""
    if cell not in CELLS:
        raise InputError(f"cell={cell!r} is not known. Use one of {', '.join(CELLS)}.")
    made = CELLS[cell]
    if cell in ON_THE_SPHERE:  # a model of its own, whose blocks are the layers
        return nn.ModuleList([made(cell, in_channels, hidden_channels, layers, **options)])
    inputs = [in_channels] + [hidden_channels] * (layers - 1)
    return nn.ModuleList(made(channels, hidden_channels, **options) for channels in inputs)
