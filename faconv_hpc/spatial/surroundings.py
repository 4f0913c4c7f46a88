"""What a step of a recurrent layer needs from other tiles, the halo and the mean of one tensor, in one phase.

Both travel at once, forward and backward, each way in two halves, so that other things can be computed in between.
No autograd here: a layer whose steps are one operation writes its own backward.
"""

from dataclasses import dataclass

from torch import Tensor

from .area_mean import AreaMean, NoMean
from .exchange import HaloExchange, Received
from .tape import Remembered, Started


@dataclass(frozen=True, eq=False)
class Surroundings:
    """The halo of one width, and the mean, as `Domain.surroundings` gives them.

    Adjoint of the two: a cell's gradient is that of the cell, of all its copies in halos, and its share of the mean's.
    """

    halo: HaloExchange
    mean: AreaMean | NoMean
    remembered: Remembered

    def start(self, padded: Tensor) -> Started[Tensor]:
        """Sends what others need of the owned cells. What is returned waits, fills the halo and gives the mean,
        float32 or better."""
        owned = self.halo.owned(padded)

        def both() -> Started[tuple[Received, Tensor]]:
            cells, mean = self.halo.start_fill(owned), self.mean.start(owned)
            return lambda: (cells(), mean())

        started: Started[tuple[Received, Tensor]] = self.remembered(both)

        def finish() -> Tensor:
            received, mean = started()
            self.halo.fill(padded, received)
            return mean

        return finish

    def start_halo_gradient(self, grad_padded: Tensor) -> Started[Received]:
        """Sends the gradients of the halo back to the owners of its cells."""
        return self.halo.start_accumulate(grad_padded)

    def gradient(self, grad_padded: Tensor, received: Received, grad_mean: Tensor, into: Tensor) -> None:
        """Writes the owned cells' gradient (..., Y, X) from that of the padded tile, the halos' and the mean's."""
        into.copy_(self.halo.owned(grad_padded))
        self.mean.add_gradient(grad_mean, into)
        self.halo.add_halo(grad_padded, received, into)
