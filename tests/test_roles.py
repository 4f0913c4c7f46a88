"""What a variable is to the network: prognostic, forcing, diagnostic, static; logarithms and weights in the loss."""

import numpy as np
import pytest
import torch
import xarray as xr

from faconv_hpc import Domain, FAConvLSTMNetwork, LatLonGrid, load_network
from faconv_hpc.data.samples import Batch
from faconv_hpc.data.store import Store
from faconv_hpc.data.variables import Channels, Variable, logarithm
from faconv_hpc.errors import InputError
from faconv_hpc.evaluation.figures import draw_forecast
from faconv_hpc.model.losses import area_mean_squared_error
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.spatial.grid import Tile
from faconv_hpc.spatial.mesh import ProcessMesh
from faconv_hpc.training.contract import make_contract
from faconv_hpc.training.export import export
from faconv_hpc.training.free_run import free_run
from faconv_hpc.training.objective import losses_of
from faconv_hpc.training.parity import verify_parity
from faconv_hpc.training.records import read_records
from faconv_hpc.training.setup import Workspace
from faconv_hpc.training.shards import checkpoints_in
from faconv_hpc.training.skill import forecasts_of
from faconv_hpc.training.trainer import train
from ranks import Layout, run_on_ranks
from runs import evaluated, skills_in, small_config
from test_domain import random_like
from test_parity import randomized

NLAT, NLON, FRAMES = 11, 14, 17
DIMS = ("time", "latitude", "longitude")
ONE = Layout(1, 1, 1)
SCALE = 0.001
DATA = {
    "variables": ["rain", "heat", "sst", "land", "wind", "height"],
    "roles": {"rain": "diagnostic", "sst": "forcing"},
    "log1p": {"rain": SCALE},
    "loss_weights": {"w*": 0.5, "rain": 3},
    "periods": {"validation": "2003-03-03T06/2003-03-03T18", "test": "2003-03-04T00/"},
    "forcings": ["insolation"],
}
TRAINING = {"steps": 4, "warmup_steps": 1, "validate_every": 2, "validate_leads": 2}


def source(path, **changes):
    """Two fields, sea temperatures that land misses, rain that the fields leave, and what has no time."""
    random = np.random.default_rng(7)
    shape = (FRAMES, NLAT, NLON)
    land = (random.random(shape[1:]) < 0.3).astype(np.float32)
    sst = np.where(land > 0, np.nan, 290 + 3 * random.normal(size=shape)).astype(np.float32)
    rain = (0.002 * random.random(shape) ** 4).astype(np.float32)
    values = {
        "heat": (DIMS, (280 + 10 * random.normal(size=shape)).astype(np.float32), {"units": "K"}),
        "wind": (DIMS, random.normal(size=shape).astype(np.float32), {"units": "m s**-1"}),
        "sst": (DIMS, sst, {"units": "K"}),
        "rain": (DIMS, rain, {"units": "m"}),
        "land": (DIMS[1:], land, {"units": "1", "long_name": "land-sea mask"}),
        "height": (DIMS[1:], (1000 * random.normal(size=shape[1:])).astype(np.float32), {"units": "m"}),
    }
    coordinates = {
        "time": ("time", np.arange(FRAMES) * 6.0, {"units": "hours since 2003-03-01"}),
        "latitude": np.linspace(80, -80, NLAT),
        "longitude": np.arange(NLON) * 360 / NLON,
    }
    dataset = xr.Dataset(values | changes, coordinates)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.to_netcdf(path, engine="h5netcdf")
    return dataset


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store, and what it was made of."""
    directory = tmp_path_factory.mktemp("roles")
    dataset = source(directory / "source.nc")
    prepare([directory / "source.nc"], directory / "store", frames_per_file=5, mesh=(2, 2))
    return directory / "store", dataset


def workspace_of(config, mesh):
    return Workspace.of(config, Store.open(config.data.store), mesh)


def weights_of():
    grid = LatLonGrid(NLAT, NLON, latitude_deg=np.linspace(80, -80, NLAT), lat_boundary="pole")
    return np.broadcast_to(grid.cell_area_sr[:, None], (NLAT, NLON))


def statistics_of(values_TYX):
    """Mean and deviations in float64, of what is known."""
    values, weights = values_TYX.astype(np.float64), np.broadcast_to(weights_of(), values_TYX.shape)

    def moments(part):
        known = ~np.isnan(part)
        weight = weights[: len(part)][known]
        mean = np.average(part[known], weights=weight)
        return mean, np.sqrt(np.average((part[known] - mean) ** 2, weights=weight))

    mean, std = moments(values)
    return mean, std, moments(np.diff(values, axis=0))[1] if len(values) > 1 else 0.0


def test_a_contract_says_what_each_variable_is(made, tmp_path):
    store, dataset = made
    contract = make_contract(small_config(tmp_path, store, data=DATA), Store.open(store), ProcessMesh.alone())
    roles = ("diagnostic", "prognostic", "forcing", "static", "prognostic", "static")
    assert [one.name for one in contract.variables] == DATA["variables"]
    assert tuple(one.role for one in contract.variables) == roles
    assert [one.may_miss for one in contract.variables] == [False, False, True, False, False, False]
    assert [one.loss_weight for one in contract.variables] == [3, 1, 1, 1, 0.5, 1]
    channels = contract.channels
    assert channels.inputs == ("heat", "wind", "sst", "fresh_sst", "land", "height", "insolation")
    assert [one.name for one in channels.targets] == ["heat", "wind", "rain"]
    assert channels.loss_weights == (1, 0.5, 3)
    trained = slice(0, 9)  # the validation begins with frame 9
    for one in contract.variables:
        found = (one.mean, one.std, one.tendency_std)
        if one.role == "static":
            np.testing.assert_allclose(found, statistics_of(dataset[one.name].values[None]), rtol=1e-6)
            continue
        values = dataset[one.name].values[trained]
        values = np.log1p(values / np.float32(SCALE)) if one.name == "rain" else values
        np.testing.assert_allclose(found, statistics_of(values), rtol=1e-6)


@pytest.mark.parametrize("tile", [Tile((0, NLAT), (0, NLON)), Tile((2, 9), (1, 12))])
def test_a_batch_is_what_the_files_say(made, tmp_path, tile):
    store, dataset = made
    workspace = workspace_of(small_config(tmp_path, store, data=DATA), ProcessMesh.alone())
    batch = workspace.training_windows(tile).read([2])
    by_name = {one.name: one for one in workspace.contract.variables}
    fields = {name: dataset[name].values[..., slice(*tile.rows), slice(*tile.columns)] for name in by_name}
    fields["rain"] = np.log1p(fields["rain"] / SCALE)
    inputs, targets = batch.inputs_BTCYX[0].numpy(), batch.target_BTCYX[0].numpy()
    assert inputs.shape == (3, 7, *tile.shape) and targets.shape == (3, 3, *tile.shape)
    known = ~np.isnan(fields["sst"][2:5])
    for place, name in enumerate(("heat", "wind", "sst")):
        want = (fields[name][2:5] - by_name[name].mean) / by_name[name].std
        np.testing.assert_allclose(inputs[:, place], np.nan_to_num(want), atol=3e-5)
    assert np.array_equal(inputs[:, 3], known)
    for place, name in ((4, "land"), (5, "height")):
        want = (fields[name] - by_name[name].mean) / by_name[name].std
        np.testing.assert_allclose(inputs[:, place], np.broadcast_to(want, (3, *tile.shape)), atol=1e-5)
    for place, name in enumerate(("heat", "wind")):
        want = (fields[name][3:6] - fields[name][2:5]) / by_name[name].tendency_std
        np.testing.assert_allclose(targets[:, place], want, atol=3e-5)
    want = (fields["rain"][3:6] - by_name["rain"].mean) / by_name["rain"].std
    np.testing.assert_allclose(targets[:, 2], want, atol=1e-5)
    assert batch.valid_BTCYX is None and batch.fresh_BTCYX is None  # no target misses anything


def test_what_a_diagnostic_misses_counts_in_no_loss_and_only_where_it_is_missing(tmp_path):
    random = np.random.default_rng(3)
    rain = random.random((FRAMES, NLAT, NLON)).astype(np.float32)
    rain[:, 2, 3] = np.nan
    rain[4, 5:] = np.nan
    source(tmp_path / "source.nc", rain=(DIMS, rain, {"units": "m"}))
    prepare([tmp_path / "source.nc"], tmp_path / "store")
    workspace = workspace_of(small_config(tmp_path, tmp_path / "store", data=DATA), ProcessMesh.alone())
    batch = workspace.training_windows().read([1])  # targets are frames 2, 3 and 4
    assert batch.valid_BTCYX is not None and batch.fresh_BTCYX is None
    assert batch.valid_BTCYX[:, :, :2].all()
    assert np.array_equal(batch.valid_BTCYX[0, :, 2].numpy(), ~np.isnan(rain[2:5]))
    assert (batch.target_BTCYX[~batch.valid_BTCYX] == 0).all() and batch.inputs_BTCYX.isfinite().all()


def test_masks_are_of_those_that_may_miss():
    sound, gaps = ({"units": "", "mean": 0, "std": 1, "tendency_std": 1, "may_miss": one} for one in (False, True))
    taken = [Variable(name="a", **sound), Variable(name="b", **gaps), Variable(name="c", role="forcing", **gaps)]
    channels = Channels(taken, ["insolation"])
    assert channels.inputs == ("a", "b", "c", "fresh_b", "fresh_c", "insolation") and channels.fresh == (None, 3)
    inputs = torch.arange(6.0).expand(2, 3, 4, 5, 6).permute(0, 1, 4, 2, 3)
    batch = Batch(inputs, inputs[:, :, :2], None, torch.zeros(2, 3), (0, 1), channels)
    assert (batch.fresh_BTCYX[:, :, 0] == 1).all() and (batch.fresh_BTCYX[:, :, 1] == 3).all()


@torch.no_grad()
def free_runs(mesh):
    """The free run of a network with all roles, and the whole sequence run again for each lead."""
    domain, window, steps = Domain(LatLonGrid(NLAT, NLON), mesh), 2, 6
    numbers = {"units": "", "mean": 0.0, "std": 2.0, "tendency_std": 0.6}
    channels = Channels(
        [
            Variable(name="d", role="diagnostic", **numbers),
            Variable(name="p", **numbers),
            Variable(name="f", role="forcing", may_miss=True, **numbers),
            Variable(name="q", may_miss=True, **numbers),
            Variable(name="s", role="static", **numbers),
        ],
        ["insolation"],
    )
    assert channels.inputs == ("p", "q", "f", "fresh_q", "fresh_f", "s", "insolation")
    options = {"attention_every": 2, "attention_heads": 2, "embedding_channels": 16, "coarse_shape": (2, 3)}
    network = randomized(FAConvLSTMNetwork(7, 2, 8, 2, diagnostic_channels=1, **options))
    whole = random_like((1, steps, 7, NLAT, NLON), 1)
    whole[:, :, 3:5] = (whole[:, :, 3:5] > -0.4).double() / (1 + (whole[:, :, 3:5] > 0.4).double())  # 0, 1/2 and 1
    whole[:, :, 1:3] *= whole[:, :, 3:5] > 0
    x, season = domain.scatter(whole), random_like((1, steps), 4).sigmoid()
    batch = Batch(x, x[:, :, :3], domain.scatter(whole[:, :, 3:4].bool()), season, (0,), channels)
    found = [torch.cat(parts, dim=1) for parts in free_run(network, batch, window, domain)]
    x, expected, change = x.clone(), [], 0
    start, begun = x[:, window - 1, :2].clone(), (x[:, window - 1, 3:4] > 0).double()
    for at in range(window, steps + 1):
        output = network(x[:, :at], season[:, :at], domain=domain)
        change = change + output.tendency_BTCYX[:, -1]
        expected.append(torch.cat([change, output.diagnostic_BTCYX[:, -1]], dim=1))
        if at < steps:  # forcings, their mask and what is static stay those of the data
            x[:, at, :2] = start + change * 0.3
            x[:, at, 1:2] *= begun
            x[:, at, 3:4] = begun  # what is forecast is as fresh as what is known
    return [[domain.assemble(one) for one in several] for several in (found, expected)]


def test_a_free_run_takes_forcings_of_their_times_and_gives_diagnostics(tmp_path):
    (alone,) = run_on_ranks(ONE, free_runs)
    for layout in (ONE, Layout(1, 2, 2), Layout(1, 1, 3)):
        for found, expected in run_on_ranks(layout, free_runs):
            for one, again, whole in zip(found, expected, alone[0], strict=True):
                assert one.shape == (1, 3, NLAT, NLON)
                torch.testing.assert_close(one, again, rtol=1e-11, atol=1e-12)
                torch.testing.assert_close(one, whole, rtol=1e-11, atol=1e-12)


def trained(directory, store, layout=ONE, **training):
    config = small_config(
        directory,
        store,
        data=DATA,
        mesh={"replicas": layout.replicas, "lat": layout.lat, "lon": layout.lon},
        training=TRAINING | training,
    )
    run_on_ranks(layout, lambda mesh: train(config, mesh))
    return config


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    """Of one rank."""
    return trained(tmp_path_factory.mktemp("run"), made[0])


@pytest.mark.parametrize(("layout", "stage"), [(Layout(1, 2, 2), 3), (Layout(1, 1, 3), 1)])
def test_the_mesh_does_not_change_what_roles_make(made, run, tmp_path, layout, stage):
    tiled = trained(tmp_path, made[0], layout, zero_stage=stage)
    losses = [[record.loss for record in read_records(one.run_dir)] for one in (run, tiled)]
    np.testing.assert_allclose(*losses, rtol=2e-5)
    looks = [skills_in(one.run_dir) for one in (run, tiled)]
    rows = [(step, name, lead) for step in (2, 4) for lead in (1, 2) for name in ("heat", "wind", "rain")]
    assert [(row["step"], row["variable"], row["lead"]) for row in looks[0]] == rows
    for key in ("rmse", "persistence_rmse", "climatology_rmse"):
        np.testing.assert_allclose(*([row[key] for row in one] for one in looks), rtol=2e-5)


def test_verify_holds_for_all_roles(made, tmp_path):
    config = small_config(tmp_path, made[0], data=DATA)
    for rows in run_on_ranks(Layout(1, 1, 2), lambda mesh: verify_parity(config, mesh, torch.float64)):
        assert rows and all(row.passed for row in rows)


def climatology(field, at):
    """Of the nine frames of training, all of one month, those at the same hour."""
    return np.mean([field[one] for one in range(at % 4, 9, 4)], axis=0)


def test_skill_is_in_physical_units_beside_persistence_and_climatology(made, run, tmp_path):
    """The forecast's error by its figure, the others' by the files: of rain, too, whose logarithm is forecast."""
    store, dataset = made
    (evaluation,) = run_on_ranks(ONE, lambda mesh: evaluated(run, mesh, 2))
    first, last = 12, FRAMES  # frames of the test period
    starts = range(first - 1, last - 2)
    assert evaluation.forecasts == len(starts) and evaluation.held_out
    for skill in evaluation.skills:
        field = dataset[skill.variable].values.astype(np.float64)
        squares = [np.average((field[at + skill.lead] - field[at]) ** 2, weights=weights_of()) for at in starts]
        assert skill.persistence_rmse == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-5), skill
        targets = [at + skill.lead for at in starts]
        squares = [np.average((field[at] - climatology(field, at)) ** 2, weights=weights_of()) for at in targets]
        assert skill.climatology_rmse == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-5), skill
        assert 0.3 < skill.ratio < 1.1
    assert evaluation.example.names == ("heat", "wind", "rain") and [
        skill.units for skill in evaluation.skills[:3]
    ] == [
        "K",
        "m s**-1",
        "m",
    ]
    rain = dataset["rain"].values[last - 2]
    mean = make_contract(run, Store.open(store), ProcessMesh.alone()).variables[0].mean
    departure = rain - SCALE * np.expm1(mean)
    np.testing.assert_allclose(evaluation.example.truth_CYX[2], departure, rtol=1e-4, atol=1e-8)
    assert draw_forecast(evaluation, tmp_path / "forecast.png").stat().st_size > 10_000


def test_forecast_and_persistence_are_judged_on_the_same_cells(tmp_path):
    """Where a diagnostic was missing at the last input nobody knows what persistence would be."""
    numbers = {"units": "", "mean": 0.0, "std": 1.0, "tendency_std": 1.0, "may_miss": True}
    channels = Channels([Variable(name="p", **numbers), Variable(name="d", role="diagnostic", **numbers)])
    x, target = random_like((1, 3, 2, NLAT, NLON), 1), random_like((1, 3, 2, NLAT, NLON), 2)
    valid = random_like(target.shape, 3) > -0.3
    batch = Batch(x, target, valid, torch.zeros(1, 3), (0,), channels)
    options = {"attention_every": 0, "embedding_channels": 16, "coarse_shape": (2, 3)}
    network = randomized(FAConvLSTMNetwork(2, 1, 8, 1, diagnostic_channels=1, **options))
    domain = Domain(LatLonGrid(NLAT, NLON))
    with torch.no_grad():
        mean_LCYX = random_like((2, 2, NLAT, NLON), 4).where(random_like((2, 2, NLAT, NLON), 5) > -0.3, torch.nan)
        found = list(forecasts_of(network, batch, 2, domain, mean_LCYX, torch.zeros(3, 2, NLAT, NLON)))
    for lead, fields in enumerate(found):
        known = valid[0, 0, 1] & valid[0, 1 + lead, 1]
        assert torch.equal(~fields.truth_CYX[1].isnan(), known)
        assert torch.equal(~(fields.persistence_CYX[1] - fields.truth_CYX[1]).isnan(), known)
        changes = mean_LCYX[lead, 0] - x[0, 1, 0], mean_LCYX[lead, 1]
        torch.testing.assert_close(fields.climatology_CYX, torch.stack(changes), equal_nan=True)
    with torch.no_grad():  # a window of one step has nothing before it
        first = next(forecasts_of(network, batch, 1, domain, mean_LCYX, torch.zeros(3, 2, NLAT, NLON)))
    assert first.persistence_CYX[1].isnan().all() and torch.equal(~first.truth_CYX[1].isnan(), valid[0, 0, 1])


@torch.no_grad()
def test_a_free_run_in_bf16_sums_its_changes_in_float32():
    channels = Channels([Variable(name="p", units="", mean=0, std=1, tendency_std=1e-3)])
    network = FAConvLSTMNetwork(1, 1, 8, 1, attention_every=0, embedding_channels=16, coarse_shape=(2, 3))
    torch.nn.init.constant_(network.forecast.bias, 0.3)
    x = torch.randn(1, 41, 1, 6, 8).bfloat16()
    batch = Batch(x, x, None, torch.zeros(1, 41), (0,), channels)
    network = network.bfloat16()
    changes = [change for change, _ in free_run(network, batch, 2, Domain(LatLonGrid(6, 8)))]
    assert changes[-1].dtype == torch.float32
    step = float(network.forecast.bias)
    torch.testing.assert_close(changes[-1], torch.full_like(changes[-1], 40 * step), rtol=1e-5, atol=0)


def test_an_export_knows_its_roles(run, tmp_path):
    export(checkpoints_in(run.run_dir)[-1], tmp_path / "weights.safetensors")
    loaded = [load_network(path) for path in (run.run_dir, tmp_path / "weights.safetensors")]
    assert loaded[0].contract == loaded[1].contract
    assert loaded[0].contract.channels.inputs[:3] == ("heat", "wind", "sst")
    x = torch.randn(1, 3, 7, NLAT, NLON)
    outputs = [one.network(x, torch.zeros(1, 3), domain=one.domain()) for one in loaded]
    assert torch.equal(outputs[0].forecast_BTCYX, outputs[1].forecast_BTCYX)
    assert outputs[0].diagnostic_BTCYX.shape[2] == 1 and outputs[0].tendency_BTCYX.shape[2] == 2


# The loss


@pytest.mark.parametrize("missing", [False, True])
def test_weights_are_those_of_a_weighted_mean(missing):
    domain, weights = Domain(LatLonGrid(NLAT, NLON, lat_boundary="pole")), (0.25, 2.0, 0.5)
    one, other = (random_like((2, 3, 3, NLAT, NLON), seed) for seed in (1, 2))
    valid = random_like((2, 3, 3, NLAT, NLON), 3) > -0.5 if missing else None
    found = area_mean_squared_error(one, other, domain, valid, weights).value
    area = domain.grid.cell_area_sr[:, None] * np.array(weights)[:, None, None] * np.ones((2, 3, 1, 1, NLON))
    area = area if valid is None else area * valid.numpy()
    samples = ((one - other).square().numpy() * area).sum((1, 2, 3, 4)) / area.sum((1, 2, 3, 4))
    assert float(found) == pytest.approx(samples.mean(), rel=1e-12)


def test_what_weighs_nothing_is_not_learned(made, tmp_path):
    data = DATA | {"loss_weights": {"rain": 0}}
    workspace = workspace_of(small_config(tmp_path, made[0], data=data), ProcessMesh.alone())
    channels, domain = workspace.contract.channels, workspace.domain
    network = FAConvLSTMNetwork(
        len(channels.inputs), 2, 8, 1, diagnostic_channels=1, attention_every=0, embedding_weight=0, coarse_shape=(2, 3)
    )
    batch = workspace.training_windows().read([0])
    output = network(batch.inputs_BTCYX, batch.year_fraction_BT, domain=domain)
    losses = losses_of(network, output, batch, domain)
    losses.total.objective.backward()
    gradient = network.forecast.weight.grad
    assert (gradient[:2] != 0).any() and (gradient[2] == 0).all()
    alone = area_mean_squared_error(output.tendency_BTCYX, batch.target_BTCYX[:, :, :2], domain)
    assert float(losses.forecast.value) == pytest.approx(float(alone.value), rel=1e-6)


# What is refused


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"roles": {"rian": "diagnostic"}}, r"no variable for data\.roles: 'rian'.*Did you mean 'rain'"),
        ({"log1p": {"heet": 1}}, r"no variable for data\.log1p: 'heet'.*Did you mean 'heat'"),
        ({"roles": {"land": "forcing"}}, r"data\.roles names 'land', which has no time .*Leave it out"),
        ({"variables": ["heat", "lamd"]}, r"no variable 'lamd' in store.*Did you mean 'land'"),
        ({"variables": ["rain", "sst", "land"]}, r"no variable .* is prognostic: a network forecasts from what"),
        ({"loss_weights": {"z*": 2}}, r"no variable for data\.loss_weights: 'z\*' in what is forecast"),
        ({"loss_weights": {"sst": 2}}, r"no variable for data\.loss_weights: 'sst'"),
        ({"loss_weights": {"*": 0}}, r"data\.loss_weights leaves nothing to learn: every variable has weight 0"),
        ({"log1p": {"wind": 0.5}}, r"variable 'wind' is -[\d.]+ somewhere.*only above -0\.5.*data\.log1p"),
    ],
)
def test_what_cannot_be_is_refused(made, tmp_path, data, told):
    defaults = {"roles": DATA["roles"], "periods": DATA["periods"]}
    config = small_config(tmp_path, made[0], data=defaults | data)
    with Store.open(made[0]) as store, pytest.raises(InputError, match=told):
        make_contract(config, store, ProcessMesh.alone())


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("roles", {"heat": "static"}, r"data\.roles\.heat.*'prognostic', 'forcing' or 'diagnostic'"),
        ("log1p", {"rain": 0}, r"data\.log1p\.rain: .*greater than 0"),
        ("loss_weights", {"rain": -1}, r"data\.loss_weights\.rain: .*greater than or equal to 0"),
    ],
)
def test_a_config_says_which_roles_and_numbers_there_are(tmp_path, key, value, told):
    with pytest.raises(InputError, match=told):
        small_config(tmp_path, tmp_path, data={key: value})


@pytest.mark.parametrize(
    "change",
    [{"roles": {"sst": "forcing"}}, {"log1p": {}}, {"loss_weights": {}}],
    ids=lambda change: next(iter(change)),
)
def test_a_run_goes_on_with_its_roles(made, tmp_path, change):
    config = trained(tmp_path, made[0], steps=2, checkpoint_every=1)
    other = config.model_copy(update={"data": config.data.model_copy(update=change)})
    longer = other.model_copy(update={"training": other.training.model_copy(update={"steps": 3})})
    with pytest.raises(AssertionError, match=rf"holds a run with data\.{next(iter(change))}="):
        run_on_ranks(ONE, lambda mesh: train(longer, mesh, extend="keep"))


def test_a_logarithm_is_exact_where_the_values_are_small():
    x = np.array([0, 1e-9, 1e-3, np.nan, -4e-4], dtype=np.float32)
    np.testing.assert_allclose(logarithm(x, 1e-3, "x"), np.log1p(x.astype(np.float64) / 1e-3), rtol=1e-6)
    variable = Variable(name="x", units="m", log1p=1e-3, mean=0, std=1, tendency_std=1)
    z = torch.tensor([0.0, 0.7, 3.0], dtype=torch.float64)
    dz = torch.tensor([1e-9, -0.2, 1.5], dtype=torch.float64)
    want = 1e-3 * (torch.expm1(z + dz) - torch.expm1(z))
    torch.testing.assert_close(variable.change(z, dz), want, rtol=1e-6, atol=0)
