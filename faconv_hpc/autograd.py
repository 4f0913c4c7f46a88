"""A base for our differentiable operations that a type checker can follow."""

from typing import Any

from torch.autograd import Function

Context = Any
"""What autograd hands to forward and backward; it has no public type."""


class Operation(Function):
    """A `torch.autograd.Function` that is used by `call`."""

    @classmethod
    def call(cls, *arguments: Any) -> Any:
        """The operation's result, recorded for backward."""
        return cls.apply(*arguments)  # type: ignore[no-untyped-call]
