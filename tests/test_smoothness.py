"""A field that is smooth on the sphere stays smooth through the network: no seam at longitude 0 or at a pole."""

import numpy as np
import pytest
import torch

from faconv_hpc import Domain, FAConvLSTMNetwork, LatLonGrid
from test_parity import randomized

FIELDS, STEPS = 3, 4
SEEDS = range(3)
BANDS = 120  # 1.5 degrees: the reach of the kernels, 4 rows, is small beside the scale of the fields


def globe(rows_at_poles, bands, lat_boundary="pole"):
    """A grid of ``bands`` bands from pole to pole and twice as many columns."""
    latitude = np.linspace(90, -90, bands + 1) if rows_at_poles else None
    nlat = bands + 1 if rows_at_poles else bands
    return LatLonGrid(nlat, 2 * bands, latitude_deg=latitude, lat_boundary=lat_boundary)


def smooth_field(grid, seed):
    """Random polynomials of degree 3 in the Cartesian coordinates of the sphere, (1, T, C, Y, X)."""
    lat, lon = torch.from_numpy(grid.latitude)[:, None], torch.from_numpy(grid.longitude)
    x, y, z = lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin().expand(grid.nlat, grid.nlon)
    terms = torch.stack([x, y, z, x * y, y * z, x * z, x * x - y * y, z * z, x * y * z])
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(STEPS, FIELDS, len(terms), generator=generator, dtype=torch.float64)
    return torch.einsum("tck,kyx->tcyx", weights, terms)[None]


def point_symmetric(network):
    """Kernels that are the same after half a turn: blind to the direction that turns over at a pole."""
    with torch.no_grad():
        for layer in network.layers:
            layer.mixing_weight.copy_((layer.mixing_weight + layer.mixing_weight.flip(-1)) / 2)
    return network


def output_of(grid, seed, symmetric):
    """Of the layers alone: a smooth field that passes by them has no seam, and would hide theirs."""
    torch.manual_seed(seed)
    network = randomized(
        FAConvLSTMNetwork(
            FIELDS, FIELDS, 8, 2, attention_every=2, embedding_channels=16, coarse_shape=(2, 3), residual=False
        )
    )
    if symmetric:
        point_symmetric(network)
    with torch.no_grad():
        return network(smooth_field(grid, seed), torch.zeros(1, STEPS).double(), domain=Domain(grid)).tendency_BTCYX


def largest(difference):
    return difference.abs().max().item()


def jump_across_the_poles(field, grid):
    """Between neighbours across a pole: first rows of opposite columns, or the pole's own row and the next."""
    opposite, pole_row = field.roll(grid.nlon // 2, -1), int(grid.has_pole_row(0))
    return max(
        largest(opposite[..., pole_row, :] - field[..., 0, :]),
        largest(opposite[..., -1 - pole_row, :] - field[..., -1, :]),
    )


def jumps_elsewhere(field):
    return largest(field.diff(dim=-1)), largest(field.diff(dim=-2))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rows_at_poles", [True, False])
def test_longitude_0_is_no_seam(rows_at_poles, seed):
    field = output_of(globe(rows_at_poles, BANDS), seed, symmetric=False)
    along_rows, _ = jumps_elsewhere(field)
    assert 0 < largest(field[..., 0] - field[..., -1]) <= along_rows


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rows_at_poles", [True, False])
def test_the_poles_are_no_seams(rows_at_poles, seed):
    grid = globe(rows_at_poles, BANDS)
    field = output_of(grid, seed, symmetric=True)
    assert 0 < jump_across_the_poles(field, grid) <= max(jumps_elsewhere(field))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rows_at_poles", [True, False])
def test_across_the_poles_the_jump_of_any_kernels_falls_with_the_grid_spacing(rows_at_poles, seed):
    """A kernel that tells north from south turns over at a pole, as wind components do; the limit is smooth."""
    coarse, fine = globe(rows_at_poles, BANDS // 2), globe(rows_at_poles, BANDS)
    before = jump_across_the_poles(output_of(coarse, seed, symmetric=False), coarse)
    after = jump_across_the_poles(output_of(fine, seed, symmetric=False), fine)
    assert 0 < after < 0.75 * before


def test_other_boundaries_do_leave_a_seam_at_the_poles():
    """What the tests above would see if a pole were an edge."""
    grid = globe(False, BANDS, "replicate")
    for seed in SEEDS:
        field = output_of(grid, seed, symmetric=True)
        assert jump_across_the_poles(field, grid) > 1.2 * max(jumps_elsewhere(field))
