"""The state of a network: of its layers, and of its embedding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .recurrence import State

PARTS = ("h", "c")
HISTORY = ("frames", "past/frames_there")


@dataclass(frozen=True)
class Past:
    """What the embeddings of the steps to come attend to: the same on every tile.

    Attributes:
        tokens_BNE: of the last N steps, the newest last.
        there_BN: bool; where a sample has had fewer steps, the first are none.
    """

    tokens_BNE: Tensor
    there_BN: Tensor

    @classmethod
    def none(cls, like_BTE: Tensor, steps: int) -> "Past":
        """Before a sequence begins."""
        tokens_BNE = like_BTE.new_zeros(like_BTE.shape[0], steps, like_BTE.shape[-1])
        return cls(tokens_BNE, torch.zeros_like(tokens_BNE[..., 0], dtype=torch.bool))

    def then(self, tokens_BTE: Tensor, valid_BT: Tensor | None) -> "Past":
        """The same with some steps more; those that are not valid come first, as if there were none."""
        valid_BT = torch.ones_like(tokens_BTE[..., 0], dtype=torch.bool) if valid_BT is None else valid_BT
        there_BN = torch.cat([self.there_BN, valid_BT], dim=1)
        places_BN = there_BN.long().argsort(dim=1, stable=True)
        tokens_BNE = torch.cat([self.tokens_BNE, tokens_BTE], dim=1)
        tokens_BNE = tokens_BNE.gather(1, places_BN[..., None].expand_as(tokens_BNE))
        return Past(tokens_BNE, there_BN.gather(1, places_BN))

    def newest(self, steps: int) -> "Past":
        """The last of them alone."""
        first = self.there_BN.shape[1] - steps
        return Past(self.tokens_BNE[:, first:], self.there_BN[:, first:])


@dataclass(frozen=True)
class NetworkState:
    """What a sequence that is continued goes on from.

    Attributes:
        layers: (h, c) of each, this tile's cells; none of layers without memory.
        past: what its embeddings attend to, the same on every tile.
        history: frames before and whether there are any, see `History`; empty where layers see none.
    """

    layers: tuple[State, ...]
    past: Past
    history: State = ()

    @classmethod
    def after(cls, history: State | None, layers: Sequence[State | None], past: Past) -> "NetworkState":
        """Of the parts, those of which are None that have seen no step."""
        return cls(tuple(one for one in layers if one), past, history or ())

    def parts(self, layers: int) -> list[State | None]:
        """The state of the history and of so many layers; None: that of a beginning."""
        return [self.history or None, *(self.layers or [None] * layers)]

    def tensors(self) -> dict[str, Tensor]:
        """By name: ``LAYER/h``, ``LAYER/c``, ``past/tokens``, ``past/there``, and with a history ``frames`` and
        ``past/frames_there``; the first dim of all is the sample."""
        cells = {
            f"{n}/{part}": one for n, pair in enumerate(self.layers) for part, one in zip(PARTS, pair, strict=True)
        }
        whole = {"past/tokens": self.past.tokens_BNE, "past/there": self.past.there_BN}
        return cells | whole | dict(zip(HISTORY, self.history, strict=bool(self.history)))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "NetworkState":
        """From what `tensors` gives."""
        layers = range(sum(name.endswith("/h") for name in tensors))
        pairs = tuple((tensors[f"{layer}/h"], tensors[f"{layer}/c"]) for layer in layers)
        history = tuple(tensors[name] for name in HISTORY if name in tensors)
        return cls(pairs, Past(tensors["past/tokens"], tensors["past/there"]), history)
