"""The package torch-harmonics, which whoever wants it installs: its releases ask pip for one release of torch each."""

from importlib.util import find_spec

HOW_TO_INSTALL = "pip install --no-deps torch-harmonics==0.9.3"


def is_installed() -> bool:
    """Without importing it."""
    return find_spec("torch_harmonics") is not None
