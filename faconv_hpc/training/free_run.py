"""Forecasts beyond a window: the network goes on from what it has forecast."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..data.samples import Batch
from ..model.network import NetworkOutput
from ..spatial.domain import Domain


def free_run(
    network: Callable[..., NetworkOutput], batch: Batch, window: int, domain: Domain, step_C: Tensor
) -> Iterator[Tensor]:
    """How the fields change from the last of ``window`` inputs on, as forecast, one lead after the other.

    The state is spun up over the window. From then on the fields are those of the forecast, the forcings those of their
    times, and what is missing in the last input stays missing.

    Args:
        batch: of the window and what follows, T steps in all; of those after the window only the forcings are used.
        step_C: (C,) how much a field as the network sees it changes by a tendency of 1; see `Statistics.step`.

    Yields:
        (B, C, Y, X) the sum of the tendencies, for each of the leads 1 to T - window + 1.
    """
    inputs, season, fields = batch.inputs_BTCYX, batch.year_fraction_BT, len(step_C)
    known = 2 * fields if batch.valid_BTCYX is not None else fields
    output = network(inputs[:, :window], season[:, :window], domain=domain)
    start_BCYX, mask = inputs[:, window - 1, :fields], inputs[:, window - 1, fields:known]
    step = step_C.to(inputs)[:, None, None]
    change_BCYX = output.tendency_BTCYX[:, -1]
    yield change_BCYX
    for at in range(window, inputs.shape[1]):
        now = start_BCYX + change_BCYX * step
        if batch.valid_BTCYX is not None:
            now = now * mask  # what is missing is 0, as in the data
        x_BTCYX = torch.cat([now, mask, inputs[:, at, known:]], dim=1)[:, None]
        output = network(x_BTCYX, season[:, at : at + 1], domain=domain, state=output.state, first_step=at)
        change_BCYX = change_BCYX + output.tendency_BTCYX[:, 0]
        yield change_BCYX
