"""Forecasts beyond a window: the network goes on from what it has forecast."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..data.samples import Batch
from ..model.network import NetworkOutput
from ..spatial.domain import Domain


def free_run(
    network: Callable[..., NetworkOutput], batch: Batch, window: int, domain: Domain
) -> Iterator[tuple[Tensor, Tensor]]:
    """What is forecast from the last of ``window`` inputs on, one lead after the other.

    The state is spun up over the window. From then on the prognostic fields are those of the forecast, forcings those
    of their times, and what is missing in the last input stays missing.

    Args:
        batch: of the window and what follows, T steps in all; of those after the window only the forcings are used.

    Yields:
        for each of the leads 1 to T - window + 1: (B, P, Y, X) how the prognostic fields have changed, as the sum of
        the tendencies, and (B, D, Y, X) the diagnostics.
    """
    inputs, season, channels = batch.inputs_BTCYX, batch.year_fraction_BT, batch.channels
    changing, given = len(channels.prognostic), channels.given
    masks = given + sum(place is not None for place in channels.masks)
    output = network(inputs[:, :window], season[:, :window], domain=domain)
    last = replace(batch, inputs_BTCYX=inputs[:, window - 1 : window])
    start_BCYX, known_BTCYX = inputs[:, window - 1, :changing], last.known_BTCYX
    step_C = torch.tensor([one.target_scale / one.scale for one in channels.prognostic], dtype=torch.float64)
    step = step_C.to(inputs)[:, None, None]
    change_BCYX = output.tendency_BTCYX[:, -1]
    yield change_BCYX, output.diagnostic_BTCYX[:, -1]
    for at in range(window, inputs.shape[1]):
        now = start_BCYX + change_BCYX * step
        if known_BTCYX is not None:
            now = now * known_BTCYX[:, 0]  # what is missing is 0, as in the data
        parts = now, inputs[:, at, changing:given], inputs[:, window - 1, given:masks], inputs[:, at, masks:]
        x_BTCYX = torch.cat(parts, dim=1)[:, None]
        output = network(x_BTCYX, season[:, at : at + 1], domain=domain, state=output.state, first_step=at)
        change_BCYX = change_BCYX + output.tendency_BTCYX[:, 0]
        yield change_BCYX, output.diagnostic_BTCYX[:, 0]
