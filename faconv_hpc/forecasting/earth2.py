"""A Forecaster as a prognostic model of earth2studio (``earth2studio/models/px/base.py``), without that package.

A state is a tensor x with the dims of its coordinates, an ordered mapping: any that come first, ``time``,
``lead_time``, ``variable``, ``lat``, ``lon``. What a model takes has the lead times of its window, at or below 0; each
that it gives has one. Variables are called as in that package's vocabulary, see `names.in_vocabulary`.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.inputs import Inputs
from ..data.times import SECONDS_PER_HOUR, TimeAxis
from ..errors import InputError
from ..spatial.grid import SAME_DEG
from .dates import step_of
from .forecaster import Window, instants
from .frames import check_static_fields
from .names import in_vocabulary

if TYPE_CHECKING:
    from .forecaster import Forecaster

Coords = Mapping[str, NDArray[Any]]
STATE = ("time", "lead_time", "variable", "lat", "lon")
EXACT = ("standard", "proleptic_gregorian")


def input_coords(forecaster: "Forecaster") -> OrderedDict[str, NDArray[Any]]:
    """Of what the model takes; dims of any size are empty."""
    channels = forecaster.contract.channels
    leads = _step(forecaster) * np.arange(1 - forecaster.window, 1)
    return _coords(forecaster, leads, [in_vocabulary(one) for one in channels.prognostic + channels.static])


def output_coords(forecaster: "Forecaster", given: Coords) -> OrderedDict[str, NDArray[Any]]:
    """Of the step that follows an input with these coordinates; raises InputError where they are not the model's."""
    _check(forecaster, given)
    variables = [in_vocabulary(one) for one in forecaster.contract.channels.targets]
    after = _coords(forecaster, given["lead_time"][-1:] + _step(forecaster), variables)
    leading = {name: values for name, values in given.items() if name not in STATE}
    return OrderedDict(leading | {name: after[name] for name in STATE} | {"time": given["time"]})


def iterate(forecaster: "Forecaster", x: Tensor, coords: Coords) -> Iterator[tuple[Tensor, OrderedDict[str, Any]]]:
    """The last state of the input, in which diagnostic variables are not known (NaN), and then step after step.

    The network's state is carried from step to step here, so that steps are those of one free run.

    Args:
        x: (..., time, lead_time, variable, lat, lon), in units.
    """
    after = output_coords(forecaster, coords)
    if tuple(x.shape) != tuple(len(values) for values in coords.values()):
        raise InputError(f"the state has shape {tuple(x.shape)}, its coordinates {_sizes(coords)}. Give one of each.")
    changing = len(forecaster.contract.channels.prognostic)
    shape = (*x.shape[:-4], 1, len(after["variable"]), *x.shape[-2:])
    first = x.new_full(shape, float("nan"))
    first[..., :changing, :, :] = x[..., -1:, :changing, :, :]
    yield first, after | {"lead_time": coords["lead_time"][-1:]}
    for lead, x_NCYX in enumerate(_free_run(forecaster, x, coords)):
        there = after["lead_time"] + lead * _step(forecaster)
        yield x_NCYX.reshape(shape).to(x.device), OrderedDict(after | {"lead_time": there})


@torch.no_grad()
def _free_run(forecaster: "Forecaster", x: Tensor, coords: Coords) -> Iterator[Tensor]:
    """(N, C, Y, X) of all samples, one after the other along the dims up to time; without end."""
    channels, step_s = forecaster.contract.channels, step_of(forecaster.contract)
    assert step_s is not None, "was checked"
    samples = x.flatten(0, -5).float().cpu().numpy()
    valid = coords["time"] + coords["lead_time"][-1]
    starts = np.resize(valid.astype("datetime64[s]").astype(np.int64), len(samples))
    windows, makers, changing = [], [], len(channels.prognostic)
    for x_TVYX, start in zip(samples, starts, strict=True):
        times = _times(start, step_s, range(1 - forecaster.window, 2), forecaster.contract.calendar)
        static_SYX = x_TVYX[-1, changing:].copy()
        check_static_fields(forecaster.contract, static_SYX, "the state")
        made = Inputs(channels, forecaster.domain.tile, forecaster.domain.grid, static_SYX, forecaster.cycle)
        values_TPYX = x_TVYX[:, :changing].copy()
        _check_known(forecaster, values_TPYX)
        known, at = ~np.isnan(values_TPYX), instants(times, range(forecaster.window))
        windows.append(forecaster.window_from(made, values_TPYX, known, at))
        makers.append(made)

    def given() -> Iterator[tuple[Tensor, Tensor]]:
        for lead in count(1):
            parts = []
            for made, start in zip(makers, starts, strict=True):
                values = np.zeros((1, channels.given, *forecaster.domain.tile.shape), dtype=np.float32)
                at = instants(_times(start, step_s, range(lead, lead + 2), forecaster.contract.calendar), range(1))
                parts.append(forecaster.given_from(made, values, np.ones(values.shape, dtype=bool), at))
            inputs, fractions = zip(*parts, strict=True)
            yield torch.cat(inputs), torch.cat(fractions)

    def cycles() -> Iterator[Tensor]:
        for lead in count():
            at = [_times(start, step_s, range(lead, lead + 1), forecaster.contract.calendar) for start in starts]
            parts = [made.cycle_at(times.year_fraction) for made, times in zip(makers, at, strict=True)]
            yield torch.from_numpy(np.concatenate(parts)).to(forecaster.device)

    joined = (torch.cat(parts) for parts in zip(*map(_parts, windows), strict=True))
    yield from (x_NCYX.float() for x_NCYX in forecaster.free_run(Window(*joined), given(), cycles()))


def _parts(window: Window) -> tuple[Tensor, Tensor, Tensor]:
    return window.inputs_BTCYX, window.year_fraction_BT, window.last_BPYX


def _times(start: int, step_s: int, steps: range, calendar: str) -> TimeAxis:
    return TimeAxis(start + step_s * np.array(steps, dtype=np.int64), calendar)


def _step(forecaster: "Forecaster") -> np.timedelta64:
    """Raises InputError for a network that is no such model."""
    contract, step_s = forecaster.contract, step_of(forecaster.contract)
    given = [one.name for one in contract.channels.forcing]
    reasons = {
        "its steps differ in length": step_s is None,
        f"it is given {', '.join(given)} at all times": bool(given),
        f"its calendar is {contract.calendar}": contract.calendar not in EXACT,
        f"the grid is cut into {forecaster.domain.tiles} tiles": forecaster.domain.tiles > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(
                f"the network is no prognostic model in earth2studio's sense: {reason}. Use `Forecaster.forecast`, or "
                f"`faconv forecast`."
            )
    hours, rest = divmod(int(step_s or 0), SECONDS_PER_HOUR)
    return np.timedelta64(step_s, "s") if rest else np.timedelta64(hours, "h")


def _coords(forecaster: "Forecaster", leads: NDArray[Any], variables: list[str]) -> OrderedDict[str, NDArray[Any]]:
    grid = forecaster.contract
    return OrderedDict(
        batch=np.empty(0),
        time=np.empty(0),
        lead_time=leads,
        variable=np.array(variables),
        lat=np.array(grid.latitude_deg),
        lon=np.array(grid.longitude_deg),
    )


def _check(forecaster: "Forecaster", given: Coords) -> None:
    wanted = input_coords(forecaster)
    if tuple(given)[-len(STATE) :] != STATE:
        raise InputError(f"the dims of a state end in {', '.join(STATE)}, got {', '.join(given)}. Transpose it.")
    for name in ("lead_time", "variable", "lat", "lon"):
        mine, others = wanted[name], np.asarray(given[name])
        others = others - others[-1] if name == "lead_time" and others.size else others
        same = mine.shape == others.shape and (
            np.abs(mine - others).max() <= SAME_DEG if name in ("lat", "lon") else bool((mine == others).all())
        )
        if not same:
            told = (f"{values[:3].tolist()}... ({values.size})" for values in (mine.astype(str), others.astype(str)))
            raise InputError(
                f"the network takes {name} {next(told)}, the state has {next(told)}. Take or interpolate them: "
                f"`input_coords()` says what it takes."
            )


def _check_known(forecaster: "Forecaster", values_TPYX: NDArray[np.float32]) -> None:
    for place, variable in enumerate(forecaster.contract.channels.prognostic):
        if not variable.may_miss and not np.isfinite(values_TPYX[:, place]).all():
            raise InputError(
                f"{in_vocabulary(variable)!r} is missing in some cells, and the network was trained on it without "
                f"missing cells. Fill them."
            )


def _sizes(coords: Coords) -> str:
    return ", ".join(f"{name} ({len(values)})" for name, values in coords.items())
