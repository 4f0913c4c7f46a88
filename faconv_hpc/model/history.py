"""The frames before each one, beside it: so that a layer without memory knows as much of the past as its rivals."""

import torch
from torch import Tensor

from .recurrence import State, held


class History:
    """Puts beside the inputs of every step what of those of the steps before it changes.

    The frames before are part of the network's state, as a layer's is: a sequence that is continued in pieces equals
    the whole, a free run has its own forecasts beside it, and tiles keep their own cells, so that nothing is sent.

    Before a sequence begins there is none, and the first frame stands in for those before it: to a network that goes by
    differences of frames nothing has changed yet. With zeros, the mean of the fields, it would see a leap that is as
    large as the fields.

    Args:
        steps: of inputs that layers see at once; 1: no more than those of the step.
        channels: how many of the inputs, from the first, are remembered: what the others are follows from time and
            place.
    """

    def __init__(self, steps: int, channels: int) -> None:
        self.channels, self._before = channels, steps - 1

    @property
    def added(self) -> int:
        """Channels that come to those of the inputs: the newest frame first."""
        return self._before * self.channels

    def __call__(
        self, x_BTCYX: Tensor, state: State | None = None, valid_BT: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The inputs with the frames before them, (B, T, C + added, Y, X), and the state after the last.

        Args:
            state: frames (B, added, Y, X), and whether a sample has had one, bool (B, 1, 1, 1); default: none has.
            valid_BT: at a step that is not valid a sample keeps its state. The same on every tile.
        """
        if not self.added:
            return x_BTCYX, ()
        samples, cells = x_BTCYX.shape[0], x_BTCYX.shape[-2:]
        none = x_BTCYX.new_zeros(samples, self.added, *cells), x_BTCYX.new_zeros(samples, 1, 1, 1, dtype=torch.bool)
        before_BCYX, there_B = state or none
        seen = []
        for number, x_BCYX in enumerate(x_BTCYX.unbind(1)):
            now_BCYX = x_BCYX[:, : self.channels]
            before_BCYX = before_BCYX.where(there_B, self._filled_with(now_BCYX))
            seen.append(before_BCYX)
            older_BCYX = before_BCYX[:, : self.added - self.channels]
            after = torch.cat([now_BCYX, older_BCYX], dim=1), torch.ones_like(there_B)
            valid_B = None if valid_BT is None else valid_BT[:, number]
            before_BCYX, there_B = held(after, (before_BCYX, there_B), valid_B)
        return torch.cat([x_BTCYX, torch.stack(seen, dim=1)], dim=2), (before_BCYX, there_B)

    def _filled_with(self, frame_BCYX: Tensor) -> Tensor:
        return frame_BCYX.repeat(1, self._before, 1, 1)
