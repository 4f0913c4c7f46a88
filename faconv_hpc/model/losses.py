"""Area-weighted losses, and the one place where the gradient rule stands.

The rule. Weights are the same on every rank. With R replicas of P tiles, rank (r, p) computes
``share_rp``, its own cells' part of replica r's loss, such that ``loss_r = sum_p share_rp``, and the
loss of the whole batch is ``L = mean_r loss_r``. Autograd, through the adjoints of the domain's verbs,
gives each rank ``g_rp``, its part of the gradient, with ``sum_p g_rp = d loss_r / d w``. DeepSpeed is told
nothing about tiles and averages over all ranks, so a rank hands it ``objective_rp = P share_rp``::

    1 / (R P)  sum_rp  P g_rp  =  1 / R  sum_r  sum_p g_rp  =  1 / R  sum_r  d loss_r / d w  =  d L / d w

This holds at every ZeRO stage, with accumulation (DeepSpeed divides by the number of micro-batches)
and with clipping, because what is clipped is the true gradient. ``tests/test_engine.py`` proves it
over stages and meshes against one process.

For L to be the mean over samples however they are dealt to replicas and micro-batches, every sample
is averaged over its own valid cells.
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from ..spatial.collectives import at_least_float32
from ..spatial.domain import Domain


@dataclass(frozen=True)
class Loss:
    """A loss of one micro-batch.

    Attributes:
        objective: this rank's share times the number of tiles; call backward on it.
        value: the loss itself, the same on all tiles, without a graph.
    """

    objective: Tensor
    value: Tensor

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.objective + other.objective, self.value + other.value)

    def __mul__(self, factor: float) -> "Loss":
        return Loss(self.objective * factor, self.value * factor)


def area_mean_squared_error(
    predicted_BTCYX: Tensor,
    target_BTCYX: Tensor,
    domain: Domain,
    valid_BTCYX: Tensor | None = None,
    weights: tuple[float, ...] | None = None,
    step_weights: tuple[float, ...] | None = None,
) -> Loss:
    """Squared error averaged over the area of the grid, then over channels, steps and samples.

    Args:
        predicted_BTCYX, target_BTCYX: this tile's cells.
        domain: gives areas, and sums over tiles.
        valid_BTCYX: bool, cells that count; each sample is averaged over its own. Default: all.
        weights, step_weights: of channels and of steps, not all 0. Default: all count the same.
    """
    weigh = partial(_weighed, weights=weights, steps=step_weights)
    precision = at_least_float32(predicted_BTCYX.dtype)
    error_BTCYX = _squared_error(predicted_BTCYX.to(precision), target_BTCYX.to(precision), valid_BTCYX)
    if valid_BTCYX is None:
        share = weigh(_area_sum(error_BTCYX, domain)).mean()
    else:
        counted_B = domain.total(weigh(_area_sum(valid_BTCYX.to(precision), domain)).sum((1, 2)))
        share_B = weigh(_area_sum(error_BTCYX, domain)).sum((1, 2))
        share = (share_B / counted_B.clamp_min(1e-30)).mean()
    return Loss(objective=share * domain.tiles, value=domain.total(share.detach()))


def free_run_loss(
    forecast_BTCYX: Tensor,
    target_BTCYX: Tensor,
    domain: Domain,
    valid_BTCYX: Tensor | None,
    weights: tuple[float, ...] | None,
    lead_weights: tuple[float, ...],
    fields: int,
    window: int,
    begun_BCYX: Tensor | None = None,
) -> Loss:
    """Squared error of what has been forecast for the leads from 2 on, averaged as in `area_mean_squared_error`.

    A field's error is that of its change since the last step of the window, the sum of tendencies, in the same units
    as that of lead 1; it counts where the field is known then, and there was something to begin from. A diagnostic's
    error is its own.

    Args:
        forecast_BTCYX, target_BTCYX, valid_BTCYX: tendencies and diagnostics of the window and the leads after it.
        weights: of the channels.
        lead_weights: of the leads from 2 on, not all 0.
        fields: how many of the channels are tendencies.
        window: steps before lead 2, the last of which is lead 1.
        begun_BCYX: bool, where there is something of the fields to begin from. Default: everywhere.
    """
    precision = at_least_float32(forecast_BTCYX.dtype)
    forecast, target = (_since(one.to(precision), fields, window) for one in (forecast_BTCYX, target_BTCYX))
    valid = None if valid_BTCYX is None else valid_BTCYX[:, window:]
    if valid is not None and begun_BCYX is not None:
        valid = torch.cat([valid[:, :, :fields] & begun_BCYX[:, None], valid[:, :, fields:]], dim=2)
    return area_mean_squared_error(forecast, target, domain, valid, weights, lead_weights)


def _since(x_BTCYX: Tensor, fields: int, window: int) -> Tensor:
    """Changes of the fields since the window's last step, for each step after it; and the rest as it is."""
    changes = x_BTCYX[:, window - 1 :, :fields].cumsum(1)[:, 1:]
    return torch.cat([changes, x_BTCYX[:, window:, fields:]], dim=2)


def shared_mean_squared_error(predicted: Tensor, target: Tensor, valid: Tensor | None = None) -> Loss:
    """Mean squared error of tensors (B, ...) that all tiles hold in full, such as a coarse field.

    Each of the P tiles has the whole error, so its share is a P-th of it, and P times that is the error.
    Each sample is averaged over its own valid entries (bool, default: all).
    """
    precision = at_least_float32(predicted.dtype)
    error = _squared_error(predicted.to(precision), target.to(precision), valid)
    if valid is None:
        loss = error.mean()
    else:
        counted_B = valid.flatten(1).sum(1).clamp_min(1)
        loss = (error.flatten(1).sum(1) / counted_B).mean()
    return Loss(objective=loss, value=loss.detach())


def _squared_error(predicted: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """0 where it is not valid, whatever stands there, and so is its gradient: 0 times what is no number is none."""
    difference = predicted - target
    return (difference if valid is None else difference.where(valid, 0)).square()


def _weighed(x_BTC: Tensor, weights: tuple[float, ...] | None, steps: tuple[float, ...] | None) -> Tensor:
    """x by weights, each over their mean."""
    if weights is not None:
        x_BTC = x_BTC * _of_mean_1(weights, x_BTC.device, x_BTC.dtype)
    return x_BTC if steps is None else x_BTC * _of_mean_1(steps, x_BTC.device, x_BTC.dtype)[:, None]


@lru_cache(maxsize=16)
def _of_mean_1(weights: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copied once: a copy at every step would make the processor wait for the device."""
    mean = sum(weights) / len(weights)
    return torch.tensor([weight / mean for weight in weights], device=device, dtype=dtype)


def _area_sum(x_BTCYX: Tensor, domain: Domain) -> Tensor:
    """(B, T, C) this tile's part of the area-weighted mean."""
    return x_BTCYX.sum(-1) @ domain.coordinates.row_weights(x_BTCYX)
