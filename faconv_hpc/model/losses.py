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
from functools import lru_cache

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
) -> Loss:
    """Squared error averaged over the area of the grid, then over channels, steps and samples.

    Args:
        predicted_BTCYX, target_BTCYX: this tile's cells.
        domain: gives areas, and sums over tiles.
        valid_BTCYX: bool, cells that count; each sample is averaged over its own. Default: all.
        weights: of the channels, of mean 1. Default: all count the same.
    """
    precision = at_least_float32(predicted_BTCYX.dtype)
    error_BTCYX = (predicted_BTCYX.to(precision) - target_BTCYX.to(precision)).square()
    if valid_BTCYX is None:
        share = _weighed(_area_sum(error_BTCYX, domain), weights).mean()
    else:
        valid = valid_BTCYX.to(precision)
        counted_B = domain.total(_weighed(_area_sum(valid, domain), weights).sum((1, 2)))
        share_B = _weighed(_area_sum(error_BTCYX * valid, domain), weights).sum((1, 2))
        share = (share_B / counted_B.clamp_min(1e-30)).mean()
    return Loss(objective=share * domain.tiles, value=domain.total(share.detach()))


def shared_mean_squared_error(predicted: Tensor, target: Tensor, valid: Tensor | None = None) -> Loss:
    """Mean squared error of tensors (B, ...) that all tiles hold in full, such as a coarse field.

    Each of the P tiles has the whole error, so its share is a P-th of it, and P times that is the error.
    Each sample is averaged over its own valid entries (bool, default: all).
    """
    precision = at_least_float32(predicted.dtype)
    error = (predicted.to(precision) - target.to(precision)).square()
    if valid is None:
        loss = error.mean()
    else:
        counted_B = valid.flatten(1).sum(1).clamp_min(1)
        loss = ((error * valid).flatten(1).sum(1) / counted_B).mean()
    return Loss(objective=loss, value=loss.detach())


def _weighed(x_BTC: Tensor, weights: tuple[float, ...] | None) -> Tensor:
    return x_BTC if weights is None else x_BTC * _on_device(weights, x_BTC.device, x_BTC.dtype)


@lru_cache(maxsize=8)
def _on_device(weights: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copied once: a copy at every step would make the processor wait for the device."""
    return torch.tensor(weights, device=device, dtype=dtype)


def _area_sum(x_BTCYX: Tensor, domain: Domain) -> Tensor:
    """(B, T, C) this tile's part of the area-weighted mean."""
    return x_BTCYX.sum(-1) @ domain.coordinates.row_weights(x_BTCYX)
