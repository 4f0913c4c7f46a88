"""Forecasts beyond a window: the network goes on from what it has forecast."""

from collections.abc import Callable, Iterable, Iterator

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
    of their times; what there is nothing of in the last input stays missing.

    Args:
        batch: of the window and what follows, T steps in all; of those after the window only the forcings are used.

    Yields:
        for each of the leads 1 to T - window + 1: (B, P, Y, X) how the prognostic fields have changed, as the sum of
        the tendencies, and (B, D, Y, X) the diagnostics.
    """
    inputs, season = batch.inputs_BTCYX, batch.year_fraction_BT
    given = zip(inputs[:, window:].unbind(1), season[:, window:].unbind(1), strict=True)
    return free_run_from(network, inputs[:, :window], season[:, :window], given, batch.channels, domain)


def free_run_from(
    network: Callable[..., NetworkOutput],
    window_BTCYX: Tensor,
    year_fraction_BT: Tensor,
    given: Iterable[tuple[Tensor, Tensor]],
    channels: Channels,
    domain: Domain,
) -> Iterator[tuple[Tensor, Tensor]]:
    """`free_run` whose inputs come one after the other: it asks for the next when the lead before it is taken.

    Args:
        given: (B, C, Y, X) of the times after the window, of which only the forcings are used, and (B,) their fractions
            of the year.
    """
    window, last_BCYX = window_BTCYX.shape[1], window_BTCYX[:, -1]
    feedback = feedback_of(channels, window)
    output = network(window_BTCYX, year_fraction_BT, domain=domain)
    precision = at_least_float32(output.forecast_BTCYX.dtype)  # as tendencies are summed up
    change_BCYX = output.tendency_BTCYX[:, -1].to(precision)
    yield change_BCYX, output.diagnostic_BTCYX[:, -1].to(precision)
    for at, (given_BCYX, season_B) in enumerate(given, start=window):
        x_BTCYX = feedback.inputs(last_BCYX, given_BCYX, change_BCYX)[:, None]
        output = network(x_BTCYX, season_B[:, None], domain=domain, state=output.state, first_step=at)
        change_BCYX = change_BCYX + output.tendency_BTCYX[:, 0]
        yield change_BCYX, output.diagnostic_BTCYX[:, 0].to(precision)


def feedback_for(batch: Batch, window: int, *, through: bool = True) -> Feedback | None:
    """How a network goes on through what a batch has beyond a window; None: it has nothing."""
    return feedback_of(batch.channels, window, through=through) if batch.inputs_BTCYX.shape[1] > window else None


def feedback_of(channels: Channels, window: int, *, through: bool = True) -> Feedback:
    """How a network of these channels goes on after a window; see `Feedback`."""
    return Feedback(
        window=window,
        step=tuple(one.target_scale / one.scale for one in channels.prognostic),
        fresh=channels.fresh,
        forcings=channels.given,
        through=through,
    )
