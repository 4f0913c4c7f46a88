"""Losses and gradients that are no finite numbers: where they come from, in words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...data.samples import Batch
from ...model.network import NetworkOutput
from ...spatial.mesh import ProcessMesh

SHOWN = 8  # findings in one message


@dataclass(frozen=True)
class MicroBatch:
    """What is kept of a micro-batch until its step is done.

    Attributes:
        losses: (3,) the loss, that of the forecast, and that of the embedding, on the device.
        windows: of its samples.
        unsound_BC: whether the forecast error of a sample and variable is no finite number on this tile.
    """

    losses: Tensor
    windows: tuple[int, ...]
    unsound_BC: Tensor

    @classmethod
    def of(cls, losses: Tensor, output: NetworkOutput, batch: Batch) -> "MicroBatch":
        """Looks at every cell once, without waiting for the device."""
        with torch.no_grad():
            error_BTCYX = output.forecast_BTCYX - batch.target_BTCYX
            return cls(losses, batch.windows, ~error_BTCYX.isfinite().all(-1).all(-1).all(1))


def is_sound(value: float) -> bool:
    """Whether a loss or a norm is a finite number; DeepSpeed says -1 for the norm of what is not."""
    return math.isfinite(value) and value >= 0


def report(
    what: str, value: float, step: int, micros: Sequence[MicroBatch], variables: Sequence[str], mesh: ProcessMesh
) -> str:
    """What is not finite: step, variables and samples, the same on all ranks. Collective."""
    mine = [
        (window, variables[channel], mesh.rank)
        for micro in micros
        for sample, window in enumerate(micro.windows)
        for channel in micro.unsound_BC[sample].nonzero().flatten().tolist()
    ]
    windows = [window for micro in micros for window in micro.windows]
    everywhere = sorted({window for one in mesh.gathered_objects(windows) for window in one})
    found: dict[tuple[int, str], list[int]] = {}
    for one in mesh.gathered_objects(mine):
        for window, variable, rank in one:
            found.setdefault((window, variable), []).append(rank)
    places = [
        f"{variable} of window {window} (rank {', '.join(map(str, ranks))})"
        for (window, variable), ranks in sorted(found.items())[:SHOWN]
    ]
    where = f"in the forecast of {'; '.join(places)}" if places else f"in windows {everywhere}"
    return (
        f"the {what} is {value} at step {step}, {where}: it must be a finite number. Lower training.learning_rate, or "
        f"look at these frames with `faconv data inspect`."
    )
