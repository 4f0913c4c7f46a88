"""Which device a rank computes on: decided here, from the key ``device``, when the ranks join."""

import socket

import torch

from ..errors import InputError

DEVICES = ("auto", "cpu", "cuda")


def device_for(wanted: str, local_rank: int = 0) -> torch.device:
    """The device of a rank; those of a node are dealt its GPUs in turn.

    Args:
        wanted: ``auto``: a GPU where torch can use one, else the CPU.
        local_rank: the rank's place on its node.

    Raises:
        InputError: no such device is known, or a GPU is wanted and there is none.
    """
    check_device(wanted)
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def check_device(wanted: str) -> None:
    """Raises InputError where no such device is known, or a GPU is wanted and torch can use none here."""
    if wanted not in DEVICES:
        raise InputError(f"device={wanted!r} is not known. Use one of {', '.join(DEVICES)}.")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device is cuda, and torch {torch.__version__} can use no GPU on {socket.gethostname()}. Start the ranks "
            f"where there is one (`faconv doctor` says what is missing), or give device auto or cpu."
        )
