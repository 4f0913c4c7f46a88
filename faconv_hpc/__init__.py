"""Sharded recurrent training on large lat/lon grids: public names.

They are loaded when they are first used, so that ``faconv --help`` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .versions import __version__

if TYPE_CHECKING:
    from .config import RunConfig
    from .config_file import load_config
    from .forecasting.forecaster import Forecaster
    from .model.convlstm import ConvLSTM2d
    from .model.layer import FAConvLSTM2d
    from .model.network import FAConvLSTMNetwork
    from .spatial.domain import Domain
    from .spatial.grid import LatLonGrid
    from .spatial.mesh import ProcessMesh
    from .training.loading import load_network

_HOMES = {
    "ConvLSTM2d": "model.convlstm",
    "Domain": "spatial.domain",
    "FAConvLSTM2d": "model.layer",
    "FAConvLSTMNetwork": "model.network",
    "Forecaster": "forecasting.forecaster",
    "LatLonGrid": "spatial.grid",
    "ProcessMesh": "spatial.mesh",
    "RunConfig": "config",
    "load_config": "config_file",
    "load_network": "training.loading",
}

__all__ = [
    "ConvLSTM2d",
    "Domain",
    "FAConvLSTM2d",
    "FAConvLSTMNetwork",
    "Forecaster",
    "LatLonGrid",
    "ProcessMesh",
    "RunConfig",
    "__version__",
    "load_config",
    "load_network",
]


def __getattr__(name: str) -> object:
    """Loads a public name from its home (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
