"""Forecasts that become the next inputs: how a network runs freely."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Feedback:
    """What of a network's inputs it forecasts itself.

    Its inputs are fields, forcings, how fresh fields are, and whatever else is known; see `Channels.inputs`.

    Attributes:
        window: inputs that are given. The fields of those after them are what has been forecast, as fresh as what is
            known, the forcings those given; and what there is nothing of in the last input stays missing.
        step: by how much each field, as the network sees it, changes with a tendency of 1.
        fresh: for each field the input that says how fresh it is, 0 where there is none; None: it is known everywhere.
        forcings: the inputs from the fields to here are given at all times; then comes how fresh fields are.
        through: whether gradients go back through what has been fed back; else each step learns by itself alone.
    """

    window: int
    step: tuple[float, ...]
    fresh: tuple[int | None, ...]
    forcings: int
    through: bool = True

    @property
    def fields(self) -> int:
        """How many of the inputs are forecast."""
        return len(self.step)

    def inputs(self, last_BCYX: Tensor, given_BCYX: Tensor, change_BCYX: Tensor) -> Tensor:
        """The inputs (B, C, Y, X) after so much of a change.

        Args:
            last_BCYX: the last of the window.
            given_BCYX: those of the time itself; its fields and how fresh they are is not used.
            change_BCYX: sum of the tendencies since then, float32 or better.
        """
        step_C11 = _on_device(self.step, change_BCYX.device, change_BCYX.dtype)
        now_BCYX = last_BCYX[:, : self.fields] + change_BCYX * step_C11
        aged = [place for place in self.fresh if place is not None]
        if aged:  # where there is nothing it is 0, as in the data; no list as an index, whose copy a device waits for
            everywhere = torch.ones_like(last_BCYX[:, 0])
            there = [everywhere if place is None else (last_BCYX[:, place] > 0).to(everywhere) for place in self.fresh]
            now_BCYX = now_BCYX * torch.stack(there, dim=1)
        parts = (
            now_BCYX.to(given_BCYX),
            given_BCYX[:, self.fields : self.forcings],
            (last_BCYX[:, self.forcings : self.forcings + len(aged)] > 0).to(given_BCYX),
            given_BCYX[:, self.forcings + len(aged) :],
        )
        return torch.cat(parts, dim=1)


@lru_cache(maxsize=8)
def _on_device(step: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copied once: a copy at every step would make the processor wait for the device."""
    return torch.tensor(step, device=device, dtype=dtype)[:, None, None]
