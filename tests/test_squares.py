"""Networks whose cells are squares of the grid's: what they are, on every cut, from the first step to the results."""

import json
import math

import numpy as np
import pytest
import torch

from faconv_hpc import Domain, FAConvLSTMNetwork, LatLonGrid
from faconv_hpc.data.store import Store
from faconv_hpc.errors import InputError
from faconv_hpc.evaluation.evaluate import evaluate
from faconv_hpc.evaluation.explanation.explain import explain
from faconv_hpc.forecasting.forecaster import Forecaster
from faconv_hpc.model.squares import in_squares, out_of_squares
from faconv_hpc.spatial.grid import Cuts
from faconv_hpc.spatial.squares import cuts_of_squares, grid_of_squares
from faconv_hpc.training.fit import check_fits
from faconv_hpc.training.identity import check_same_run, identity
from faconv_hpc.training.parity import verify_parity
from faconv_hpc.training.setup import Workspace
from ranks import Layout, run_on_ranks
from runs import assert_same_on_every_mesh, make_store, small_config, trained
from test_domain import random_like
from test_parity import TOLERANCE, randomized, relative_difference

POLES = LatLonGrid(
    19, 24, latitude_deg=np.linspace(90, -90, 19), longitude_deg=np.arange(24) * 15.0, lat_boundary="pole"
)
REGION = LatLonGrid(
    11, 17, latitude_deg=np.linspace(71, 33, 11), longitude_deg=np.arange(17) * 2.5 - 20, lat_boundary="replicate",
    lon_boundary="zero",
)  # fmt: skip
BATCH, STEPS, FIELDS, INPUTS, HIDDEN = 2, 4, 3, 4, 8
OPTIONS = {
    "attention_every": 2, "attention_reduction": 1, "embedding_channels": 16, "coarse_shape": (2, 3), "history": 2,
    "past_channels": FIELDS,
}  # fmt: skip


def made(**options):
    return randomized(FAConvLSTMNetwork(INPUTS, FIELDS, HIDDEN, 2, **OPTIONS | options))


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_the_cells_of_a_square_lie_side_by_side_and_go_back_to_their_places(factor):
    x = random_like((BATCH, 2, 3, 7, 11), 1)
    squares = in_squares(x, factor)
    assert squares.shape == (BATCH, 2, 3 * factor**2, -(-7 // factor), -(-11 // factor))
    for row, column, channel in [(0, 0, 0), (6, 10, 2), (4, 3, 1), (5, 8, 0)]:
        inside = channel * factor**2 + row % factor * factor + column % factor
        assert torch.equal(squares[:, :, inside, row // factor, column // factor], x[:, :, channel, row, column])
    assert torch.equal(out_of_squares(squares.flatten(0, 1), factor, (7, 11)), x.flatten(0, 1))


def test_the_grid_of_squares_has_the_mean_coordinates_of_their_cells():
    grid = grid_of_squares(POLES, 2)
    np.testing.assert_allclose(grid.latitude_deg, [*np.arange(85, -90, -20), -90])
    np.testing.assert_allclose(grid.longitude_deg, np.arange(12) * 30 + 7.5)
    assert grid.boundaries == POLES.boundaries and grid.total_area_sr == pytest.approx(4 * math.pi)


def test_a_network_of_squares_is_a_network_on_their_grid():
    """By hand: NumPy's reshape, a network of four times the channels with the same weights, and back."""
    network = made(scale_factor=2)
    x, season = random_like((BATCH, STEPS, INPUTS, 18, 24), 1), random_like((BATCH, STEPS), 2).sigmoid()
    grid = LatLonGrid(18, 24, lat_boundary="pole")
    output = network(x, season, domain=Domain(grid))
    by_hand = FAConvLSTMNetwork(4 * INPUTS, 4 * FIELDS, HIDDEN, 2, **OPTIONS | {"past_channels": 4 * FIELDS}).double()
    weights = {name: one for name, one in network.state_dict().items() if not name.startswith("subspace")}
    left = by_hand.load_state_dict(weights, strict=False)  # the embedding maps to the fields' means, not the squares'
    assert all(name.startswith("subspace") for name in left.missing_keys) and not left.unexpected_keys
    parts = x.numpy().reshape(BATCH, STEPS, INPUTS, 9, 2, 12, 2).transpose(0, 1, 2, 4, 6, 3, 5)
    squares = torch.from_numpy(parts.reshape(BATCH, STEPS, 4 * INPUTS, 9, 12).copy())
    want = by_hand(squares, season, domain=Domain(grid_of_squares(grid, 2))).forecast_BTCYX.detach().numpy()
    want = want.reshape(BATCH, STEPS, FIELDS, 2, 2, 9, 12).transpose(0, 1, 2, 5, 3, 6, 4)
    want = want.reshape(BATCH, STEPS, FIELDS, 18, 24)
    assert relative_difference(output.forecast_BTCYX, torch.from_numpy(want.copy())) < 1e-13


def quantities(grid, domain, options):
    model = made(**options)
    cells = grid.nlat, grid.nlon
    x = domain.scatter(random_like((BATCH, STEPS, INPUTS, *cells), 1)).clone().requires_grad_()
    target = domain.scatter(random_like((BATCH, STEPS, FIELDS, *cells), 2))
    output = model(x, random_like((BATCH, STEPS), 4).sigmoid(), domain=domain)
    loss = model.losses(output, x, target, domain).total
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss.objective / domain.tiles, [x, *parameters.values()])
    within = domain.coarsened(model.scale_factor)
    found = {"output": domain.assemble(output.forecast_BTCYX), "input gradient": domain.assemble(gradients[0])}
    found |= {"state": within.assemble(output.state.layers[-1][1]), "loss": loss.value}
    found |= {f"gradient of {n}": domain.total(one) for n, one in zip(parameters, gradients[1:], strict=True)}
    return {name: one.detach() for name, one in found.items()} | {"embedding": output.embedding_BTE.detach()}


@pytest.mark.parametrize("layout", [Layout(1, 1, 3), Layout(1, 4, 1), Layout(1, 2, 2)], ids=str)
@pytest.mark.parametrize(
    ("grid", "options"),
    [(POLES, {"scale_factor": 2, "checkpoint_steps": 2}), (REGION, {"scale_factor": 2}), (REGION, {"scale_factor": 3})],
    ids=["2 x 2, poles, in segments", "2 x 2, a region", "3 x 3, a region"],
)
def test_on_tiles_it_equals_one_tile(layout, grid, options):
    """Also where the last squares lack cells."""
    want = quantities(grid, Domain(grid), options)
    assert all(value.abs().max() > 1e-9 for value in want.values())

    def check(mesh):
        got = quantities(grid, Domain(grid, mesh, block=options["scale_factor"]), options)
        return {name: relative_difference(got[name], want[name]) for name in want}

    for found in run_on_ranks(layout, check):
        assert max(found.values()) <= TOLERANCE, found


def test_tiles_are_of_whole_squares():
    cuts = Cuts.even(POLES, 3, 4, block=2)
    assert cuts.row_edges == (0, 8, 16, 19) and cuts.column_edges == (0, 6, 12, 18, 24)
    assert cuts_of_squares(cuts, 2) == Cuts((0, 4, 8, 10), (0, 3, 6, 9, 12))
    with pytest.raises(InputError, match=r"squares of 2 x 2 cells, and row_edges \(0, 7, 14, 19\) part some.*block=2"):
        cuts_of_squares(Cuts.even(POLES, 3, 1), 2)
    with pytest.raises(InputError, match=r"19 rows in squares of 4 .* over 6 ranks along lat.*between 1 and 5 ranks"):
        Cuts.even(POLES, 6, 1, block=4)
    with pytest.raises(InputError, match=r"24 columns .* 5 x 5 cells, and 24 is no multiple of 10 \(an even number"):
        grid_of_squares(POLES, 5)
    with pytest.raises(InputError, match=r"row of 9 columns .* 2 x 2 cells, and 9 is no multiple of 2. Use another"):
        grid_of_squares(LatLonGrid(4, 9), 2)


# A run


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("squares") / "waves", frames=90, nlat=11, nlon=16)


def config_of(directory, store, layout, scale_factor=2, **training):
    usual = {"steps": 6, "stateful_windows": 3, "checkpoint_every": 3, "rollout": {4: 2}, "learning_rate": 0.02}
    samples = {"micro_batch": 4 // layout.replicas}
    model = {"scale_factor": scale_factor, "coarse_shape": [2, 2]}
    data = {"window": 4, "periods": {"test": "2000-01-20/"}}
    return small_config(
        directory, store, mesh=layout._asdict(), data=data, model=model, training=usual | samples | training
    )


def test_a_run_is_the_same_on_every_mesh_and_goes_on_from_the_states_of_another(tmp_path, store):
    assert_same_on_every_mesh(tmp_path, lambda directory, layout: config_of(directory, store, layout), 2e-5)


def test_a_run_goes_on_with_its_squares_and_history(tmp_path, store):
    """Also where the config now has what networks have that are told nothing of them."""

    def went_on(mesh, key, other):
        saved = json.loads(json.dumps(identity(workspace_of({key: 2}, mesh))))
        with pytest.raises(InputError, match=rf"model\.{key}=2, this config says {other}"):
            check_same_run(workspace_of({key: other}, mesh), saved)

    def workspace_of(model, mesh):
        config = small_config(tmp_path, store, model=model | {"coarse_shape": [2, 2]})
        return Workspace.of(config, Store.open(config.data.store), mesh)

    for key, other in (("scale_factor", 1), ("scale_factor", 3), ("history", 1)):
        run_on_ranks(Layout(1, 1, 1), lambda mesh, key=key, other=other: went_on(mesh, key, other))


def test_more_regions_than_squares_are_refused(tmp_path, store):
    config = small_config(tmp_path, store, model={"scale_factor": 4, "coarse_shape": [4, 3]})
    with pytest.raises(
        InputError, match=r"4 x 3 regions .* grid of 3 x 4 squares of 4 x 4 cells \(model.scale_factor\)"
    ):
        check_fits(config)


def test_verify_proves_it_of_a_run(tmp_path, store):
    config = config_of(tmp_path, store, Layout(1, 1, 1))
    rows, *_ = run_on_ranks(Layout(1, 1, 2), lambda mesh: verify_parity(config, mesh, torch.float64))
    assert {str(row.layout) for row in rows} == {"1x2", "2x1"} and all(row.passed for row in rows)


def test_networks_of_different_squares_are_judged_and_explained_side_by_side(tmp_path, store):
    alone = Layout(1, 1, 1)
    configs = [config_of(tmp_path / str(factor), store, alone, factor, steps=3, rollout={}) for factor in (1, 2)]
    for config in configs:
        trained(config, alone)
    runs = [config.run_dir for config in configs]

    def rmses(mesh):
        return evaluate(runs, mesh, leads=2, samples=3).metrics["rmse"]

    (want,), (got, _) = run_on_ranks(alone, rmses), run_on_ranks(Layout(1, 1, 2), rmses)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert (want[:, 0] != want[:, 1]).all()
    looks = explain(Forecaster.load(runs[1]), [store], 1, None).looks
    assert looks.row_map_LSYX.shape[2:] == (11, 16)
    assert np.array_equal(looks.row_map_LSYX[..., ::2, ::2][..., :5, :], looks.row_map_LSYX[..., 1::2, 1::2], True)
