"""Sharded recurrent training on large lat/lon grids: public names."""

from ._version import __version__
from .config import RunConfig, load_config
from .model.convlstm import ConvLSTM2d
from .model.layer import FAConvLSTM2d
from .model.network import FAConvLSTMNetwork
from .spatial.domain import Domain
from .spatial.grid import LatLonGrid
from .spatial.mesh import ProcessMesh

__all__ = [
    "ConvLSTM2d",
    "Domain",
    "FAConvLSTM2d",
    "FAConvLSTMNetwork",
    "LatLonGrid",
    "ProcessMesh",
    "RunConfig",
    "__version__",
    "load_config",
]
