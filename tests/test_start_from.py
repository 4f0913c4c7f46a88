"""A run that begins with the weights of another: on another grid, with other variables, on any mesh."""

import numpy as np
import pytest
import torch

from faconv_hpc import Domain, FAConvLSTMNetwork, LatLonGrid, load_network
from faconv_hpc.data.store import Store
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.spatial.mesh import ProcessMesh
from faconv_hpc.training.contract import make_contract
from faconv_hpc.training.export import export
from faconv_hpc.training.setup import network_options
from faconv_hpc.training.shards import checkpoints_in
from faconv_hpc.training.start_from import Beginning
from faconv_hpc.training.trainer import train
from ranks import Layout, run_on_ranks
from runs import make_store, small_config, trained
from test_contract import make_store as make_other
from test_roles import DIMS, NLAT, NLON, source

ONE, FOUR = Layout(1, 1, 1), Layout(1, 2, 2)
TESTED = {"periods": {"test": "2003-03-04/"}, "forcings": ["insolation"]}
IN_SQUARES = {"scale_factor": 2, "history": 2, "coarse_shape": [2, 2]}
REGION = {"lat_boundary": "replicate"}  # beyond poles 14 columns have no even number of squares


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A run on two variables."""
    directory = tmp_path_factory.mktemp("before")
    source(directory / "source.nc")
    prepare([directory / "source.nc"], directory / "store", variables=["heat", "wind"])
    return of_two_variables(directory, directory / "store")


def of_two_variables(directory, store, **sections):
    sections = {"data": TESTED, "training": {"steps": 8, "learning_rate": 0.02}} | sections
    config = small_config(directory, store, **sections)
    run_on_ranks(ONE, lambda mesh: train(config, mesh))
    return config


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    """A store of the same, and of others: in another order, half as warm again, sea temperatures that miss some."""
    directory = tmp_path_factory.mktemp("more")
    dataset = source(directory / "first.nc")
    warm = (DIMS, dataset["heat"].values * 1.5, {"units": "K"})
    source(directory / "source.nc", heat=warm)
    prepare([directory / "source.nc"], directory / "store", variables=["sst", "wind", "rain", "heat", "height"])
    return directory / "store"


def config_of(directory, store, start_from, layout=ONE, **sections):
    data = TESTED | {"roles": {"sst": "forcing", "rain": "diagnostic"}} | sections.pop("data", {})
    mesh = dict(zip(("replicas", "lat", "lon"), layout, strict=True))
    training = {"start_from": str(start_from)} | sections.pop("training", {})
    return small_config(directory, store, **{"data": data, "mesh": mesh, "training": training} | sections)


@pytest.mark.parametrize("model", [{}, IN_SQUARES], ids=str)
def test_with_new_variables_it_forecasts_the_others_as_before(tmp_path, before, more, model):
    """Before its first step: the learning rate is so small that nothing changes. On squares, too, whose cells are
    channels side by side, now and before."""
    training, data = {"learning_rate": 1e-30, "steps": 3}, REGION if model else {}
    if model:
        before = of_two_variables(tmp_path / "before", before.data.store, data=TESTED | data, model=model)
    config = config_of(tmp_path, more, before.run_dir, training=training, model=model, data=data)
    trained(config)
    old, new = load_network(before.run_dir), load_network(config.run_dir)
    assert new.contract.channels.inputs == ("wind", "heat", "sst", "fresh_sst", "height", "insolation")
    by_name = {one.name: one for one in new.contract.variables}
    for one in old.contract.variables:  # statistics are those that it knows the variable by
        assert by_name[one.name] == one.model_copy(update={"inherited": True})
    assert not by_name["sst"].inherited
    x = {name: torch.randn(1, 4, NLAT, NLON) for name in new.contract.channels.inputs}
    season = torch.rand(1, 4)
    outputs = []
    for trained_network in (old, new):
        inputs = torch.stack([x[name] for name in trained_network.contract.channels.inputs], 2)
        output = trained_network.network(inputs, season, domain=trained_network.domain())
        names = [one.name for one in trained_network.contract.channels.targets]
        outputs.append(dict(zip(names, output.forecast_BTCYX.unbind(2), strict=True)) | {"z": output.embedding_BTE})
    for name in ("heat", "wind", "z"):
        torch.testing.assert_close(outputs[1][name], outputs[0][name], rtol=1e-5, atol=1e-6)
    assert outputs[1]["rain"].abs().max() < 1e-20 and outputs[0]["heat"].abs().max() > 0.01
    assert new.network.subspace.to_coarse.weight.shape[0] == old.network.subspace.to_coarse.weight.shape[0]


@pytest.mark.parametrize(("was", "now"), [(1, 2), (2, 1), (2, 3)])
def test_on_squares_of_other_cells_it_forecasts_for_their_means(tmp_path, before, was, now):
    """On a grid that is finer or coarser by as much, of fields that are the same in all cells of a square."""
    model = before.model.model_copy(update={"scale_factor": was, "history": 2, "coarse_shape": (2, 2)})
    if was > 1:
        sections = {"data": TESTED | REGION, "model": model.model_dump(mode="json")}
        before = of_two_variables(tmp_path, before.data.store, **sections)
    old = load_network(before.run_dir)
    channels, model = old.contract.channels, before.model.model_copy(update={"scale_factor": now})
    new = FAConvLSTMNetwork(**network_options(model, channels))
    told = Beginning.of(before.run_dir).fill(new, model, channels, ProcessMesh.alone())
    assert f"fits a grid {now}/{was} times as fine as that of before" in told
    assert "drawn anew" not in told and "would keep it" not in told
    x, season = torch.randn(1, 4, len(channels.inputs), 9, 8), torch.rand(1, 4)
    found = []
    for network, side in ((old.network, was), (new, now)):
        latitude = np.linspace(80, -80, 9)[:, None] + 20 / side * (np.arange(side)[::-1] - (side - 1) / 2)
        grid = LatLonGrid(9 * side, 8 * side, latitude.ravel(), lat_boundary="replicate" if was > 1 else "pole")
        cells = x.repeat_interleave(side, dim=-2).repeat_interleave(side, dim=-1)
        forecast = network(cells, season, domain=Domain(grid, block=side)).forecast_BTCYX
        found.append(forecast.unflatten(-1, (8, side)).unflatten(-3, (9, side)).mean((-1, -3)))
        spread = forecast.unflatten(-1, (8, side)).std(-1).max() if side > 1 else torch.tensor(0.0)
    assert spread < 1e-6, "a square of which nothing is known but its mean"
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert found[0].std() > 0.01


def test_a_variable_of_another_role_keeps_its_input_and_not_its_forecast(tmp_path, before):
    data = TESTED | {"roles": {"wind": "forcing"}}
    training = {"learning_rate": 1e-30, "steps": 3, "start_from": str(before.run_dir)}
    config = small_config(tmp_path, before.data.store, data=data, training=training)
    trained(config)
    old, new = load_network(before.run_dir), load_network(config.run_dir)
    assert new.contract.channels.inputs == old.contract.channels.inputs == ("heat", "wind", "insolation")
    assert [one.name for one in new.contract.channels.targets] == ["heat"]
    x, season = torch.randn(1, 4, 3, NLAT, NLON), torch.rand(1, 4)
    outputs = [one.network(x, season, domain=one.domain()) for one in (old, new)]
    torch.testing.assert_close(outputs[1].forecast_BTCYX[:, :, 0], outputs[0].forecast_BTCYX[:, :, 0])
    data = TESTED | {"roles": {"wind": "diagnostic"}}
    config = small_config(tmp_path / "out", before.data.store, data=data, training=training)
    trained(config)
    weight = load_network(config.run_dir).network.forecast.weight
    assert weight[0].abs().max() > 0.01 and weight[1].abs().max() < 1e-20  # a change is no departure from the mean


def test_a_static_field_of_another_grid_keeps_its_statistics_and_the_run_goes_on(tmp_path, more):
    """The network knows heights by their deviation of then: that the store's is another is no reason to refuse it."""
    first = small_config(tmp_path / "first", more, data=TESTED | {"variables": ["heat", "height"]})
    trained(first)
    source(tmp_path / "hills.nc", height=(DIMS[1:], np.full((NLAT, NLON), 3.0, np.float32), {"units": "m"}))
    prepare([tmp_path / "hills.nc"], tmp_path / "hills")
    data, training = (
        TESTED | {"variables": ["heat", "height"]},
        {"checkpoint_every": 3, "start_from": str(first.run_dir)},
    )
    config = small_config(tmp_path / "tuned", tmp_path / "hills", data=data, training=training)
    losses = trained(config)
    assert load_network(config.run_dir).contract.channels.static == tuple(
        one.model_copy(update={"inherited": True}) for one in load_network(first.run_dir).contract.channels.static
    )
    checkpoints_in(config.run_dir)[-1].path.rename(tmp_path / "away")
    assert trained(config) == losses


@pytest.mark.parametrize("kind", ["run", "checkpoint", "export"])
@pytest.mark.every(2)
def test_it_begins_with_a_run_a_checkpoint_or_an_export_on_any_mesh(tmp_path, before, more, kind):
    newest = checkpoints_in(before.run_dir)[-1]
    export(newest, tmp_path / "weights.safetensors")
    where = {"run": before.run_dir, "checkpoint": newest.path, "export": tmp_path / "weights.safetensors"}[kind]
    alone = trained(config_of(tmp_path / "one", more, where))
    tiled = trained(config_of(tmp_path / "four", more, where, FOUR, training={"zero_stage": 3}), FOUR)
    np.testing.assert_allclose(tiled, alone, rtol=2e-5)
    drawn = trained(small_config(tmp_path / "drawn", more, data=config_of(tmp_path, more, where).data.model_dump(
        mode="json", include={"roles", "periods", "forcings"})))  # fmt: skip
    assert alone[0] != drawn[0]


def test_it_goes_on_as_any_run_and_reads_the_other_no_more(tmp_path, before, more):
    whole = trained(config_of(tmp_path / "whole", more, before.run_dir, training={"checkpoint_every": 3}))
    export(checkpoints_in(before.run_dir)[-1], tmp_path / "weights.safetensors")
    config = config_of(tmp_path / "cut", more, tmp_path / "weights.safetensors", training={"checkpoint_every": 3})
    trained(config)
    checkpoints_in(config.run_dir)[-1].path.rename(tmp_path / "away")
    (tmp_path / "weights.safetensors").unlink()
    assert trained(config) == whole


def test_another_store_of_its_data_is_taken_although_its_statistics_are_inherited(tmp_path, before, more):
    config = config_of(tmp_path, more, before.run_dir, training={"checkpoint_every": 3})
    want = trained(config)
    checkpoints_in(config.run_dir)[-1].path.rename(tmp_path / "away")
    prepare([more], tmp_path / "again", frames_per_file=3)
    data = config.data.model_copy(update={"store": tmp_path / "again"})
    np.testing.assert_allclose(trained(config.model_copy(update={"data": data})), want, rtol=1e-6)


def test_on_another_grid_it_is_better_than_from_scratch(tmp_path):
    """Waves that it has learned at one resolution, then at another; beside as many steps from the beginning."""
    data, model = {"forcings": []}, {"coarse_shape": [2, 3], "attention_heads": 1}
    coarse = make_store(tmp_path / "coarse", frames=40)
    fine = make_store(tmp_path / "fine", nlat=12, nlon=16, frames=40)
    long = {"steps": 150, "learning_rate": 0.02}
    first = small_config(tmp_path / "first", coarse, data=data, model=model, training=long)
    trained(first)
    tuned = {"steps": 25, "learning_rate": 0.004, "warmup_steps": 1, "start_from": str(first.run_dir)}
    fine_tuned = trained(small_config(tmp_path / "tuned", fine, data=data, model=model, training=tuned))
    scratch = trained(small_config(tmp_path / "scratch", fine, data=data, model=model, training=long | {"steps": 50}))
    assert np.mean(fine_tuned[:5]) < np.mean(scratch[-5:])


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"hidden_channels": 16}, r"no layer of its network has the shape of this config's"),
        ({"cell": "convlstm"}, r"no layer of its network has the shape"),
    ],
)
def test_another_network_is_refused(tmp_path, before, more, model, told):
    config = config_of(tmp_path, more, before.run_dir, model=model)
    with pytest.raises(AssertionError, match=told):
        run_on_ranks(Layout(1, 1, 2), lambda mesh: train(config, mesh))
    assert checkpoints_in(config.run_dir) == []


def test_what_is_no_network_is_refused(tmp_path, more):
    config = config_of(tmp_path, more, tmp_path / "nowhere")
    with pytest.raises(AssertionError, match=r"nowhere holds no checkpoints"):
        run_on_ranks(Layout(1, 1, 2), lambda mesh: train(config, mesh))


def test_variables_in_other_units_are_refused(tmp_path, before):
    random = np.random.default_rng(1)
    values = {name: random.normal(size=(17, 11, 14)).astype(np.float32) for name in ("heat", "wind")}
    store = make_other(tmp_path / "store", values, units={"heat": "degC", "wind": "m s**-1"})
    known = load_network(before.run_dir).contract
    with Store.open(store) as opened, pytest.raises(Exception, match=r"start_from was trained on 'heat' in K.*degC"):
        make_contract(small_config(tmp_path, store, data=TESTED), opened, ProcessMesh.alone(), known)
