"""What each step of a run reads."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from ..config import RunConfig
from ..data.noise import InputNoise
from ..data.order import Order
from ..data.samples import Batch, Windows
from .setup import Workspace, places_of


class Request(NamedTuple):
    """Of one micro-batch of one replica.

    Attributes:
        step: of the run, from 0.
        places: of its samples in the step's batch.
        windows: which ones they are.
        steps: how much of them.
    """

    step: int
    places: Sequence[int]
    windows: Sequence[int]
    steps: int


def requests(config: RunConfig, order: Order, replica: int, done: int) -> Iterator[Request]:
    """From the first step that is not done to the last."""
    training = config.training
    for step in range(done, training.steps):
        steps = config.data.window + training.leads_after(step) - 1
        for micro in range(training.accumulation):
            places = places_of(config, micro, replica)
            yield Request(step, places, [order.window(step, place) for place in places], steps)


def reader(workspace: Workspace, windows: Windows) -> Callable[[Request], Batch]:
    """Makes a batch of a request, with noise where the run wants some."""
    config, domain = workspace.config, workspace.domain
    noise, training = None, config.training
    if training.input_noise:
        channels, cells = workspace.contract.channels, (domain.tile, domain.grid)
        noise = InputNoise(training.input_noise, training.seed, channels, config.data.window, *cells)
    return partial(_read, windows, noise, domain.mesh.device)


def _read(windows: Windows, noise: InputNoise | None, device: torch.device, request: Request) -> Batch:
    """In memory from which a GPU copies while it computes."""
    batch = windows.read(request.windows, request.steps)
    if noise is not None:
        batch = noise.added(batch, request.step, request.places)
    return batch.pin_memory() if device.type == "cuda" else batch
