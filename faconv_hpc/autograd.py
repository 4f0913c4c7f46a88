"""A base for our differentiable operations that a type checker can follow, and the types they compute in."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Context = Any
"""What autograd hands to forward and backward; it has no public type."""


class Operation(Function):
    """A `torch.autograd.Function` that is used by `call`.

    Its backward cannot be differentiated again: what other ranks sent carries no history here, so
    second derivatives would silently lack their part. Autograd raises instead.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.backward = staticmethod(once_differentiable(cls.backward))  # type: ignore[method-assign,assignment]

    @classmethod
    def call(cls, *arguments: Any) -> Any:
        """The operation's result, recorded for backward."""
        return cls.apply(*arguments)  # type: ignore[no-untyped-call]


def autocasts(device: torch.device) -> bool:
    """Whether autocast changes the types of what is computed there."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def as_given(device: torch.device) -> AbstractContextManager[Any]:
    """Arithmetic in the types of its tensors, where autocast would change them."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()
