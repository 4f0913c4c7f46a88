"""Forecasts beyond a window: the network goes on from what it has forecast."""

from collections.abc import Callable, Iterator

from torch import Tensor

from ..data.samples import Batch
from ..data.variables import Channels
from ..model.feedback import Feedback
from ..model.network import NetworkOutput
from ..spatial.collectives import at_least_float32
from ..spatial.domain import Domain


def free_run(
    network: Callable[..., NetworkOutput], batch: Batch, window: int, domain: Domain
) -> Iterator[tuple[Tensor, Tensor]]:
    """What is forecast from the last of ``window`` inputs on, one lead after the other; as `Feedback` has it.

    The state is spun up over the window. From then on the prognostic fields are those of the forecast, forcings those
    of their times, and what is missing in the last input stays missing.

    Args:
        batch: of the window and what follows, T steps in all; of those after the window only the forcings are used.

    Yields:
        for each of the leads 1 to T - window + 1: (B, P, Y, X) how the prognostic fields have changed, as the sum of
        the tendencies, and (B, D, Y, X) the diagnostics.
    """
    inputs, season, feedback = batch.inputs_BTCYX, batch.year_fraction_BT, feedback_of(batch.channels, window)
    output = network(inputs[:, :window], season[:, :window], domain=domain)
    precision = at_least_float32(output.forecast_BTCYX.dtype)  # as tendencies are summed up
    change_BCYX = output.tendency_BTCYX[:, -1].to(precision)
    yield change_BCYX, output.diagnostic_BTCYX[:, -1].to(precision)
    for at in range(window, inputs.shape[1]):
        x_BTCYX = feedback.inputs(inputs[:, window - 1], inputs[:, at], change_BCYX)[:, None]
        output = network(x_BTCYX, season[:, at : at + 1], domain=domain, state=output.state, first_step=at)
        change_BCYX = change_BCYX + output.tendency_BTCYX[:, 0]
        yield change_BCYX, output.diagnostic_BTCYX[:, 0].to(precision)


def feedback_for(batch: Batch, window: int) -> Feedback | None:
    """How a network goes on through what a batch has beyond a window; None: it has nothing."""
    return feedback_of(batch.channels, window) if batch.inputs_BTCYX.shape[1] > window else None


def feedback_of(channels: Channels, window: int) -> Feedback:
    """How a network of these channels goes on after a window."""
    return Feedback(
        window=window,
        step=tuple(one.target_scale / one.scale for one in channels.prognostic),
        masks=channels.masks,
        forcings=channels.given,
    )
