"""Parameters that training leaves as they are."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

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


def freeze(network: nn.Module, patterns: Sequence[str]) -> list[dict[str, Any]]:
    """The groups of an optimizer that leaves them as they are: no gradients, see `unasked`, and no weight decay.

    Without gradients the updates of SGD are 0, and those of an Adam that has never seen others. They stay parameters
    like others, in the optimizer's shards, too. Raises what `frozen_in` does.
    """
    frozen, named = frozen_in(network, patterns), dict(network.named_parameters())
    live = {"params": [value for name, value in named.items() if name not in frozen]}
    kept = {"params": [value for name, value in named.items() if name in frozen], "weight_decay": 0.0}
    return [live, kept] if frozen else [live]


@contextmanager
def unasked(frozen: Iterable[Tensor]) -> Iterator[None]:
    """No gradients of the frozen are made inside, in forward and backward; DeepSpeed takes them as 0.

    Everywhere else they require gradients: what does not is left out of its shards, and so of checkpoints.
    """
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
