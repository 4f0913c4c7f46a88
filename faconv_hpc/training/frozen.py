"""Parameters that training leaves as they are."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from ..data.unknown_names import unknown_name
from ..errors import InputError


def frozen_in(network: nn.Module, patterns: Sequence[str]) -> frozenset[str]:
    """Names of the parameters that some pattern matches, such as ``layers.0.*``.

    Raises:
        InputError: a pattern that matches none, or nothing is left to train.
    """
    names = [name for name, _ in network.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise unknown_name("parameter for training.frozen:", pattern, names, "the network")
    frozen = frozenset(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
    if len(frozen) == len(names):
        raise InputError(f"training.frozen={list(patterns)} leaves nothing to train. Leave one out.")
    return frozen


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Their gradients are 0, and so are the updates of SGD and of an Adam that has never seen others, but for weight
    decay. They stay parameters like others, in the optimizer's shards, too. Raises what `frozen_in` does.
    """
    frozen = frozen_in(network, patterns)
    for name, parameter in network.named_parameters():
        if name in frozen:
            parameter.register_hook(torch.zeros_like)
