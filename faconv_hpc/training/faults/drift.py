"""Weights that must be equal on all ranks, compared now and then: a drift is named, not trained on."""

import zlib
from collections import Counter

import torch
from torch import Tensor, nn

from ...errors import RunError
from ...spatial.mesh import ProcessMesh


class DriftCheck:
    """Compares checksums of all weights over all ranks, every so many steps.

    Every rank computes its own copy of every weight's update. A bit that flips in memory, or a sum that one
    rank forms in another order, makes copies drift apart, and nothing in training would say so. A CRC-32 of
    the bytes finds a single changed bit; equal bytes are what ZeRO's all-gather leaves on every rank.
    At ZeRO 3 only the weights that DeepSpeed keeps whole can be compared: of the others there is one copy.

    Args:
        network: on this rank.
        mesh: all ranks.
        every: steps between comparisons; 0: never.
    """

    def __init__(self, network: nn.Module, mesh: ProcessMesh, every: int) -> None:
        self._network, self._mesh, self._every = network, mesh, every

    def after_step(self, step: int) -> None:
        """Compares if it is time. Collective.

        Raises:
            RunError: some rank's copy differs; names parameter and ranks.
        """
        if self._every and self._mesh.ranks > 1 and step % self._every == 0:
            self.compare(step)

    def compare(self, step: int) -> None:
        """Compares now. Collective; raises as `after_step` does."""
        weights = {name: value for name, value in self._network.named_parameters() if _is_whole(value)}
        rows = self._mesh.gathered([float(checksum(value)) for value in weights.values()])
        for name, copies in zip(weights, zip(*rows, strict=True), strict=True):
            usual, _ = Counter(copies).most_common(1)[0]
            drifted = [rank for rank, copy in enumerate(copies) if copy != usual]
            if drifted:
                raise RunError(
                    f"the weights have drifted apart: after step {step} parameter {name} on rank(s) "
                    f"{', '.join(map(str, drifted))} is not what the other ranks have, to the last bit. Look for "
                    f"faulty memory or other library versions there, and go on from the last checkpoint."
                )


def checksum(value: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    raw = value.detach().contiguous().cpu().flatten().view(torch.uint8)
    return zlib.crc32(raw.numpy().data)


def _is_whole(value: Tensor) -> bool:
    """Whether this rank holds all of a parameter; ZeRO 3 leaves an empty one behind."""
    return value.numel() == getattr(value, "ds_numel", value.numel())
