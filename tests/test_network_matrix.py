"""The whole network over layouts, grids and boundaries, in the states that training and users put it in."""

from functools import cache
from itertools import chain

import numpy as np
import pytest
import torch

from faconv_hpc import Domain, FAConvLSTMNetwork, LatLonGrid
from faconv_hpc.model.state import NetworkState, Past
from ranks import Layout, run_on_ranks
from test_domain import random_like
from test_parity import TOLERANCE, randomized, relative_difference

CUTS = [  # a column of each kind of cut: see `share`
    (1, 2), (1, 3), (1, 4),
    (2, 1), (3, 1), (6, 1),
    (2, 2), (2, 3), (3, 2),
    (2, 4), (4, 2), (1, 8), (1, 1),
]  # fmt: skip
LAYOUTS = [Layout(1, *cut) for cut in CUTS]

POLES = [("pole", "pole", "periodic"), ("pole", "replicate", "periodic"), ("zero", "pole", "periodic")]
ELSEWHERE = [
    ("zero", "zero", "periodic"),
    ("replicate", "zero", "replicate"),
    ("replicate", "replicate", "zero"),
    ("periodic", "periodic", "periodic"),
    ("periodic", "periodic", "zero"),
]
GRIDS = {
    "like 721 x 1440: 19 x 24, rows at the poles": (np.linspace(90, -90, 19), np.arange(24) * 15.0, POLES + ELSEWHERE),
    "13 x 22, south first, from 180 W": (
        np.linspace(-83, 83, 13),
        np.arange(22) * 360 / 22 - 180,
        POLES + ELSEWHERE[:1],
    ),
    "prime, 11 x 17, a region": (np.linspace(71, 33, 11), np.arange(17) * 2.5 - 20, ELSEWHERE[1:3] + ELSEWHERE[4:]),
}
BATCH, STEPS, FIELDS, INPUTS, HIDDEN, LAYERS = 2, 4, 3, 4, 8, 2
FIRST_PIECE = 3


def grid_of(name, boundaries):
    latitude, longitude, _ = GRIDS[name]
    north, south, lon = boundaries
    return LatLonGrid(len(latitude), len(longitude), latitude_deg=latitude, longitude_deg=longitude,
                      lat_boundary=(north, south), lon_boundary=lon)  # fmt: skip


def network(grid, checkpoint_steps, layers):
    """More heads than ranks along an axis or fewer, swap or gather: all of it somewhere in the matrix."""
    heads, exchange = (4, "auto") if grid.nlat == 13 else (1, "gather" if grid.nlat == 11 else "swap")
    return randomized(
        FAConvLSTMNetwork(INPUTS, FIELDS, HIDDEN, layers, attention_every=2, attention_heads=heads,
                          attention_reduction=1, attention_exchange=exchange, embedding_channels=16,
                          coarse_shape=(2, 3), embedding_past=3, checkpoint_steps=checkpoint_steps)
    )  # fmt: skip


def quantities(grid, domain, checkpoint_steps, layers):
    """One sequence in two pieces, from a given state, of samples of different length, with missing cells.

    Cell tensors are this tile's; gradients of parameters are this tile's part.
    """
    model = network(grid, checkpoint_steps, layers)
    cells = (grid.nlat, grid.nlon)
    x = domain.scatter(random_like((BATCH, STEPS, INPUTS, *cells), 1)).clone().requires_grad_()
    target = domain.scatter(random_like((BATCH, STEPS, FIELDS, *cells), 2))
    there = domain.scatter(random_like((BATCH, STEPS, FIELDS, *cells), 3)) > -0.5
    season, steps = random_like((BATCH, STEPS), 4).sigmoid(), torch.tensor([[True] * 4, [True] * 3 + [False]])
    start = [
        domain.scatter(random_like((BATCH, HIDDEN, *cells), 10 + i)).clone().requires_grad_() for i in range(2 * layers)
    ]
    past = Past(random_like((BATCH, 2, 16), 5), torch.tensor([[True, True], [False, True]]))
    state = NetworkState(tuple(zip(start[::2], start[1::2], strict=True)), past)
    objective, value, outputs, embeddings = 0.0, 0.0, [], []
    for piece in (slice(0, FIRST_PIECE), slice(FIRST_PIECE, STEPS)):
        output = model(x[:, piece], season[:, piece], domain=domain, state=state, first_step=piece.start,
                       valid_BT=steps[:, piece])  # fmt: skip
        known = there[:, piece].double()
        loss = model.losses(output, x[:, piece], target[:, piece], domain, there[:, piece], known).total
        objective, value, state = objective + loss.objective, value + loss.value, output.state
        outputs.append(output.tendency_BTCYX.detach())
        embeddings.append(output.embedding_BTE.detach())
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(objective / domain.tiles, [x, *start, *parameters.values()])
    cells = {"output": torch.cat(outputs, 1), "input gradient": gradients[0], "state": state.layers[-1][1].detach()}
    cells |= {f"gradient of the first state, {i}": gradients[1 + i] for i in range(2 * layers)}
    whole = {"loss": value, "embedding": torch.cat(embeddings, 1)}
    parts = {f"gradient of {name}": one for name, one in zip(parameters, gradients[1 + 2 * layers :], strict=True)}
    return cells, whole, parts


@cache
def one_tile(name, boundaries, layers):
    """The reference, from this process: stored activations, no ranks."""
    grid = grid_of(name, boundaries)
    cells, whole, parts = quantities(grid, Domain(grid), 0, layers)
    everything = cells | whole | parts
    assert all(value.abs().max() > 1e-9 for value in everything.values())  # a zero proves nothing
    return everything


def check_boundaries(mesh, name, references, layers):
    """Everything that differs from one tile by more than the tolerance."""
    found = []
    for boundaries, reference in references.items():
        grid = grid_of(name, boundaries)
        domain = Domain(grid, mesh)
        again = list(GRIDS[name][2]).index(boundaries) % 2
        cells, whole, parts = quantities(grid, domain, 2 * again, layers)
        got = {key: domain.assemble(value) for key, value in cells.items()} | whole
        flat = domain.total(torch.cat([value.flatten() for value in parts.values()]))  # one exchange for all
        pieces = flat.split([value.numel() for value in parts.values()])
        got |= {key: piece.view_as(parts[key]) for key, piece in zip(parts, pieces, strict=True)}
        for key, want in reference.items():
            difference = relative_difference(got[key], want)
            if not difference <= TOLERANCE:
                found.append(f"rank {mesh.rank}, {boundaries}: {key} differs by {difference:.1e}")
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.every(3, "layout", "name")
def test_the_network_on_tiles_equals_one_tile(layout, name, share):
    """A third of the boundaries at each layout: every one is cut along both axes at once, and otherwise."""
    layers = LAYERS if layout.ranks <= 4 else 1  # more ranks cost more
    number = (LAYOUTS.index(layout) + list(GRIDS).index(name)) // 2
    references = {boundaries: one_tile(name, boundaries, layers) for boundaries in share(GRIDS[name][2], number, 3)}
    assert not list(chain(*run_on_ranks(layout, check_boundaries, name, references, layers)))
