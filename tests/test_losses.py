"""The losses, against closed forms in NumPy: value on every tile, shares that add up, gradients by the rule."""

import numpy as np
import pytest
import torch

from faconv_hpc import Domain, LatLonGrid
from faconv_hpc.model.losses import area_mean_squared_error, shared_mean_squared_error
from ranks import Layout, run_on_ranks
from test_domain import random_like

SHAPE = (3, 2, 2, 7, 10)


def fields():
    predicted, target = random_like(SHAPE, 1), random_like(SHAPE, 2)
    valid = random_like(SHAPE, 3) > 0.7  # few cells, other ones in every sample
    valid[..., :4, :] = valid[..., :4, :] & (random_like(SHAPE, 4)[..., :4, :] > 0.5)  # fewer in the north
    return predicted, target, valid


def by_definition(valid):
    """Loss and its gradient: each sample is averaged over the area of its own valid cells."""
    predicted, target, mask = (one.numpy() for one in fields())
    edge = np.sin(np.deg2rad(np.linspace(90, -90, SHAPE[-2] + 1)))
    weight = np.broadcast_to(-np.diff(edge)[:, None], SHAPE[-2:]) * (mask if valid else np.ones(SHAPE))
    share = weight / weight.sum((1, 2, 3, 4), keepdims=True) / SHAPE[0]
    error = predicted - target
    return (share * error**2).sum(), 2 * share * error


@pytest.mark.parametrize("layout", [Layout(1, 1, 1), Layout(1, 2, 2), Layout(1, 3, 1)], ids=str)
@pytest.mark.parametrize("valid", [False, True])
def test_area_mean_squared_error(layout, valid):
    def check(mesh):
        domain = Domain(LatLonGrid(7, 10, lat_boundary="pole"), mesh)
        predicted, target, mask = (domain.scatter(one) for one in fields())
        predicted = predicted.clone().requires_grad_()
        loss = area_mean_squared_error(predicted, target, domain, mask if valid else None)
        (gradient,) = torch.autograd.grad(loss.objective / domain.tiles, predicted)
        shares = domain.total(loss.objective.detach() / domain.tiles)
        return loss.value.item(), shares.item(), domain.assemble(gradient).numpy()

    value, gradient = by_definition(valid)
    for got, shares, got_gradient in run_on_ranks(layout, check):
        assert got == pytest.approx(value, rel=1e-12) and shares == pytest.approx(value, rel=1e-12)
        np.testing.assert_allclose(got_gradient, gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("layout", [Layout(1, 1, 1), Layout(1, 1, 3)], ids=str)
def test_shared_mean_squared_error(layout):
    """Every tile has all of it: P times its P-th share is the error itself."""

    def check(mesh):
        domain = Domain(LatLonGrid(7, 10), mesh)
        predicted, target, mask = fields()
        found = []
        for valid in (None, mask):
            loss = shared_mean_squared_error(predicted, target, valid)
            found.append((loss.value.item(), domain.total(loss.objective / domain.tiles).item()))
        return found

    predicted, target, mask = (one.numpy() for one in fields())
    square = (predicted - target) ** 2
    by_sample = [square[sample][mask[sample]].mean() for sample in range(SHAPE[0])]
    for plain, masked in run_on_ranks(layout, check):
        assert plain == pytest.approx([square.mean()] * 2, rel=1e-12)
        assert masked == pytest.approx([np.mean(by_sample)] * 2, rel=1e-12)
