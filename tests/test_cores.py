"""Which rows are computed while a halo travels, and that no cut of rows changes a layer's gradients."""

from itertools import combinations

import numpy as np
import pytest
import torch

from faconv_hpc import Domain, FAConvLSTM2d, LatLonGrid
from faconv_hpc.spatial.exchange import HaloExchange
from faconv_hpc.spatial.grid import Cuts
from ranks import Layout, run_on_ranks

BOUNDARIES = ["zero", "replicate", "periodic", "pole", ("zero", "pole"), ("pole", "zero"), ("zero", "replicate")]


def rows_of(slices):
    return [row for part in slices for row in range(part.start, part.stop)]


@pytest.mark.parametrize("boundary", BOUNDARIES, ids=str)
@pytest.mark.parametrize("columns", [1, 2])
def test_what_travels_hangs_on_the_edges_alone(boundary, columns):
    """Of all cuts of rows into one, two and three: row r looks at padded rows r to r + 2 width."""
    with_core = 0
    for nlat in range(2, 12):
        grid = LatLonGrid(nlat, 4, lat_boundary=boundary)
        for inner in (inner for count in range(3) for inner in combinations(range(1, nlat), count)):
            cuts = Cuts((0, *inner, nlat), (0, 4) if columns == 1 else (0, 2, 4))
            for width, tile in ((width, tile) for width in range(1, min(5, nlat)) for tile in range(cuts.tiles)):
                halo = HaloExchange(grid, cuts, tile, width, None, None)
                rows, received = halo.shape[0], halo._received.values()
                core, edges, inside, outside = map(rows_of, (halo.core, halo.edges, halo.inside, halo.outside))
                beyond = {row for parts in received for part in parts for row in range(*part.rows)}
                assert sorted(core + edges) == list(range(rows))
                assert sorted(inside + outside) == list(range(rows + 2 * width)) and beyond <= set(outside)
                assert all(beyond.isdisjoint(range(row, row + 2 * width + 1)) for row in core)
                assert all(set(core).isdisjoint(range(padded - 2 * width, padded + 1)) for padded in outside)
                with_core += bool(core)
    assert with_core > 100 if columns == 1 else not with_core  # where columns are cut every row needs a neighbour


UNEVEN = [("zero", 16, 13, 0), ("zero", 16, 3, 4), ("periodic", 18, 15, 0), ("pole", 18, 16, 0)]


@pytest.mark.parametrize(("boundary", "nlat", "cut", "every"), UNEVEN, ids=str)
@pytest.mark.parametrize("kernels", ["eager", "compiled"])
def test_a_layer_on_tiles_of_few_rows_learns_what_one_tile_learns(boundary, nlat, cut, every, kernels):
    """Of 3 rows or fewer beside a halo of 4: rows of a tile's own stand beyond those that it receives."""
    grid, cuts = LatLonGrid(nlat, 12, lat_boundary=boundary), Cuts((0, cut, nlat), (0, 12))

    def learned(mesh=None):
        torch.manual_seed(0)
        layer = FAConvLSTM2d(3, 8, kernels=kernels, attention_every=every, dilations=(1, 2, 4)).double()
        x, wanted = (torch.randn(2, 5, channels, nlat, 12, dtype=torch.float64) for channels in (3, 8))
        domain = Domain(grid) if mesh is None else Domain(grid, mesh, cuts=cuts)
        mine = x[..., *domain.tile.slices].clone().requires_grad_()
        out, _ = layer(mine, domain=domain)
        (out * wanted[..., *domain.tile.slices]).sum().backward()
        return out.detach().numpy(), mine.grad.numpy(), [one.grad.numpy() for one in layer.parameters()]

    outs, grads, weights = zip(*run_on_ranks(Layout(1, 2, 1), learned), strict=True)
    out, grad, of_weights = learned()
    np.testing.assert_allclose(np.concatenate(outs, axis=-2), out, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(np.concatenate(grads, axis=-2), grad, rtol=1e-9, atol=1e-11)
    for ours, alone in zip(zip(*weights, strict=True), of_weights, strict=True):
        np.testing.assert_allclose(sum(ours), alone, rtol=1e-9, atol=1e-10)
