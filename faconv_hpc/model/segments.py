"""Segments of a sequence: what lies between their states is computed again in backward, by all layers and the head.

Kept of a segment are the states that it begins with (h and c of each layer), what it has said (the forecast and the
means, of few channels), and what other tiles have sent: strips of halos, means, and for attention keys and values, or
the lines dealt out. From these the same numbers are made again, to the last bit, and nothing is sent twice. Beside
them the steps of one segment at a time are held, as those of all are without segments.

It is the same for every cell, with attention or not, and in free runs: they are called twice, and know nothing of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..spatial.domain import Domain


@dataclass(frozen=True)
class Segments:
    """How a sequence is cut.

    Attributes:
        steps: of a segment; the last one may have fewer. 0: there is one, and all of it is stored.
        domain: whose verbs are all that segments communicate by.
    """

    steps: int
    domain: Domain

    def of(self, x_BTCYX: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The first step of each and its inputs: split, as an index would fill a gradient of all steps for each."""
        length = max(x_BTCYX.shape[1], 1)
        steps = self.steps or length
        pieces = x_BTCYX.split(steps, dim=1)  # one of no steps, where there are none
        return zip(range(0, x_BTCYX.shape[1], steps), pieces, strict=False)

    def computed(self, segment: Callable[..., Any], *given: Any) -> Any:
        """What ``segment``, which draws no random numbers, makes of what it is given: stored, or computed again.

        Not by torch's re-entrant way: it gives wrong gradients for weights that are used again.
        """
        if not self.steps or not torch.is_grad_enabled():
            return segment(*given)
        contexts = self.domain.recompute_contexts
        return checkpoint(segment, *given, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
