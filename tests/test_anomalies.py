"""Networks that see departures from the annual cycle of each cell: it is fitted, kept, and put back for the skill."""

import contextlib
import io
import shutil

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from faconv_hpc import load_network
from faconv_hpc.data.annual_cycle import CYCLE_FILE, AnnualCycle, CycleFit, basis, most_harmonics, widest_gap
from faconv_hpc.data.store import Store
from faconv_hpc.errors import InputError
from faconv_hpc.model.network import FAConvLSTMNetwork
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.spatial.grid import Tile
from faconv_hpc.spatial.mesh import ProcessMesh
from faconv_hpc.training.contract import make_contract
from faconv_hpc.training.export import export
from faconv_hpc.training.identity import check_same_run
from faconv_hpc.training.parity import verify_parity
from faconv_hpc.training.records import read_records
from faconv_hpc.training.seen import annual_cycle_of
from faconv_hpc.training.setup import Workspace
from faconv_hpc.training.shards import checkpoints_in
from faconv_hpc.training.trainer import train
from ranks import Layout, run_on_ranks
from runs import evaluated, skills_in, small_config
from test_checkpoint import assert_same_state
from test_roles import statistics_of, weights_of

NLAT, NLON, FRAMES, DAYS = 11, 14, 90, 6
TRAINED = 76  # frames; the year is full after 61
DIMS = ("time", "latitude", "longitude")
GLOBE = Tile((0, NLAT), (0, NLON))
ONE = Layout(1, 1, 1)
DATA = {
    "variables": ["ice", "wind", "heat", "rain"],
    "roles": {"rain": "diagnostic"},
    "anomalies": {"heat": 2, "ice": 0, "rain": 1},
    "periods": {"validation": "2004-04-01/2004-04-14", "test": "2004-04-15/"},
    "forcings": ["insolation"],
}
TRAINING = {"steps": 4, "warmup_steps": 1, "validate_every": 2, "validate_leads": 2, "checkpoint_every": 2}


def source(path):
    """Heat with seasons of each cell's own, wind, ice that is missing in summer and nowhere in some cells, rain."""
    random = np.random.default_rng(5)
    shape = (FRAMES, NLAT, NLON)
    season = np.cos(2 * np.pi * np.arange(FRAMES) * DAYS / 365.25)[:, None, None]
    heat = 280 + 15 * random.normal(size=shape[1:]) * season + random.normal(size=shape)
    ice = 2 + 0.3 * random.normal(size=shape)
    ice[(season < -0.5)[:, 0, 0], 3:9] = np.nan
    ice[:, 4, 5:7] = np.nan
    rain = 3 + season + random.random(shape)
    fields = {
        "heat": (heat, "K"),
        "wind": (random.normal(size=shape), "m s**-1"),
        "ice": (ice, "m"),
        "rain": (rain, "m"),
    }
    values = {name: (DIMS, value.astype(np.float32), {"units": units}) for name, (value, units) in fields.items()}
    coordinates = {
        "time": ("time", np.arange(FRAMES) * DAYS * 24.0, {"units": "hours since 2003-01-01"}),
        "latitude": np.linspace(80, -80, NLAT),
        "longitude": np.arange(NLON) * 360 / NLON,
    }
    dataset = xr.Dataset(values, coordinates)
    dataset.to_netcdf(path, engine="h5netcdf")
    return dataset


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store, and what it was made of."""
    directory = tmp_path_factory.mktemp("anomalies")
    dataset = source(directory / "source.nc")
    prepare([directory / "source.nc"], directory / "store", frames_per_file=13, mesh=(2, 2))
    return directory / "store", dataset


def trained(directory, store, layout=ONE, data=DATA, **training):
    sizes = {"replicas": layout.replicas, "lat": layout.lat, "lon": layout.lon}
    config = small_config(directory, store, data=data, training=TRAINING | training, mesh=sizes)
    run_on_ranks(layout, lambda mesh: train(config, mesh))
    return config


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"), made[0])


def cycle_by_hand(field_TYX, fractions, harmonics):
    """Least squares by LAPACK, cell by cell, over the frames of training in which it is known; at all times."""
    cycle_TYX = np.zeros(field_TYX.shape)
    for y, x in np.ndindex(NLAT, NLON):
        known = np.flatnonzero(~np.isnan(field_TYX[:TRAINED, y, x]))
        columns = basis(fractions, harmonics)
        found, *_ = np.linalg.lstsq(columns[known], field_TYX[known, y, x].astype(np.float64))
        cycle_TYX[:, y, x] = columns @ found
    return cycle_TYX


@pytest.fixture(scope="module")
def by_hand(made):
    """The cycle of each variable at all times, zero for wind; and the store's fractions of the year."""
    with Store.open(made[0]) as store:
        fractions = store.year_fraction
    cycles = {name: cycle_by_hand(made[1][name].values, fractions, count) for name, count in DATA["anomalies"].items()}
    return {"wind": np.zeros((FRAMES, NLAT, NLON))} | cycles


def test_the_basis_is_of_whole_waves_of_the_year():
    fractions = np.array([0.0, 0.25, 0.6])
    angle = 2 * np.pi * fractions
    waves = [np.ones(3), np.cos(angle), np.sin(angle), np.cos(2 * angle), np.sin(2 * angle)]
    np.testing.assert_allclose(basis(fractions, 2), np.stack(waves, axis=1), atol=1e-15)
    np.testing.assert_array_equal(basis(fractions, 0), np.ones((3, 1)))


@pytest.mark.parametrize(
    ("fractions", "gap", "most"),
    [([0.3] * 9, 1.0, 0), ([0.1, 0.6] * 9, 0.5, 0), ([0.0, 0.3, 0.6] * 9, 0.4, 0), ([*np.arange(12) / 12], 1 / 12, 1),
     ([*np.arange(12) / 12] * 9, 1 / 12, 5), ([0.9, 0.2, 0.5, 0.7] * 9, 0.3, 1), (np.arange(365) / 365, 1 / 365, 60)],
)  # fmt: skip
def test_how_many_harmonics_the_times_tell_apart(fractions, gap, most):
    fractions = np.array(fractions)
    assert widest_gap(fractions)[0] == pytest.approx(gap) and most_harmonics(fractions) == most
    columns = basis(fractions, most)
    assert np.linalg.cond(columns) < 20


def fitted(store, anomalies, tile=GLOBE):
    fits = {name: CycleFit(store, name, count, tile) for name, count in anomalies.items()}
    for fit in fits.values():
        for first in range(0, TRAINED, 7):
            fit.add(range(first, min(first + 7, TRAINED)))
    return AnnualCycle({name: fit.coefficients() for name, fit in fits.items()}, tile)


@pytest.mark.parametrize("tile", [GLOBE, Tile((4, 5), (3, 9))], ids=["globe", "one row"])
def test_a_cell_that_is_known_in_a_season_only_stays_near_its_mean_in_the_others(made, tile):
    """Waves that its times hardly tell apart would lead hundreds of deviations away; the others are least squares'."""
    with Store.open(made[0]) as store:
        found = fitted(store, {"ice": 2}, tile)
        cycle, at_frames = (found.at("ice", times) for times in (np.linspace(0, 1, 50), store.year_fraction))
        field, fractions = made[1]["ice"].values[:TRAINED], store.year_fraction
    wanted = cycle_by_hand(made[1]["ice"].values, fractions, 2)
    for y, x in np.ndindex(*tile.shape):
        known = field[:, tile.rows[0] + y, tile.columns[0] + x]
        known = known[~np.isnan(known)]
        if not known.size:
            assert not cycle[:, y, x].any()
            continue
        assert np.abs(cycle[:, y, x] - known.mean()).max() < 4 * np.ptp(known)
        if known.size == TRAINED:
            at = wanted[:, tile.rows[0] + y, tile.columns[0] + x]
            np.testing.assert_allclose(at_frames[:, y, x], at, rtol=1e-4, atol=1e-4)


def test_it_is_that_of_least_squares_where_a_cell_is_known(made, by_hand):
    with Store.open(made[0]) as store:
        cycle = fitted(store, DATA["anomalies"])
        for name in DATA["anomalies"]:
            field = made[1][name].values
            known = ~np.isnan(field[:TRAINED]).all(axis=0)
            found = cycle.at(name, store.year_fraction)
            np.testing.assert_allclose(found[:, known], by_hand[name][:, known], rtol=2e-6, atol=2e-5)
            assert known.sum() == NLAT * NLON - 2 * (name == "ice")


@pytest.mark.parametrize("layout", [Layout(1, 2, 2), Layout(2, 1, 3), Layout(3, 1, 1)], ids=str)
def test_it_is_the_same_to_the_last_bit_on_every_mesh(made, tmp_path, layout):
    config = small_config(tmp_path, made[0], data=DATA)

    def check(mesh):
        with Store.open(made[0]) as store:
            return annual_cycle_of(config, store, mesh).content()

    (alone,) = run_on_ranks(ONE, check)
    assert len(alone) > 4 * NLAT * NLON * 9 and set(run_on_ranks(layout, check)) == {alone}


def test_statistics_are_of_what_the_network_sees(made, by_hand, tmp_path):
    with Store.open(made[0]) as store:
        contract = make_contract(small_config(tmp_path, made[0], data=DATA), store, ProcessMesh.alone())
    for one in contract.variables:
        seen = (made[1][one.name].values - by_hand[one.name])[:TRAINED]
        np.testing.assert_allclose((one.mean, one.std, one.tendency_std), statistics_of(seen), rtol=1e-4, atol=1e-5)
        assert one.harmonics == DATA["anomalies"].get(one.name)
    heat = contract.variables[2]
    assert abs(heat.mean) < 0.01 and heat.std < 0.2 * np.nanstd(made[1]["heat"].values)


@pytest.mark.parametrize("tile", [GLOBE, Tile((2, 9), (3, 14))])
def test_a_batch_is_of_anomalies(made, by_hand, tmp_path, tile):
    with Store.open(made[0]) as store:
        workspace = Workspace.of(small_config(tmp_path, made[0], data=DATA), store, ProcessMesh.alone())
        batch = workspace.training_windows(tile).read([5])
    channels = workspace.contract.channels
    for place, one in enumerate(channels.prognostic):
        seen = (made[1][one.name].values - by_hand[one.name])[5:9, *tile.slices]
        known = ~np.isnan(seen[:-1])
        got = batch.inputs_BTCYX[0, :, place].numpy()
        np.testing.assert_allclose(got[known], ((seen[:-1] - one.mean) / one.scale)[known], rtol=1e-4, atol=1e-4)
        assert not got[~known].any()
        change = np.diff(seen, axis=0) / one.target_scale
        valid = ~np.isnan(change)
        np.testing.assert_allclose(batch.target_BTCYX[0, :, place].numpy()[valid], change[valid], rtol=1e-3, atol=1e-4)
    rain = channels.diagnostic[0]
    seen = (made[1]["rain"].values - by_hand["rain"])[6:9, *tile.slices]
    np.testing.assert_allclose(batch.target_BTCYX[0, :, -1].numpy(), (seen - rain.mean) / rain.scale, atol=1e-4)


def test_skill_is_told_of_the_fields_themselves(made, run, by_hand):
    """Persistence by the files; a network that forecasts no change of the anomalies, by the cycle."""
    with Store.open(made[0]) as store:
        labels = [store.layout.time.label(at) for at in range(FRAMES)]
    start = next(at for at, label in enumerate(labels) if label >= "2004-04-15") - 1

    def check(mesh):
        forward = FAConvLSTMNetwork.forward

        def still(self, *given, **more):
            output = forward(self, *given, **more)
            fields = output.forecast_BTCYX.zero_()
            return output._replace(forecast_BTCYX=fields) if hasattr(output, "_replace") else output

        FAConvLSTMNetwork.forward = still
        try:
            return evaluated(run, mesh, 2)
        finally:
            FAConvLSTMNetwork.forward = forward

    (evaluation,) = run_on_ranks(ONE, check)
    starts = range(start, FRAMES - 2)
    assert evaluation.forecasts == len(starts) and evaluation.held_out
    means = {one.name: one.mean for one in load_network(run.run_dir).contract.variables}
    for skill in evaluation.skills:
        field, cycle = made[1][skill.variable].values.astype(np.float64), by_hand[skill.variable]
        squares, persisted = [], []
        for at in starts:
            target, turned = at + skill.lead, cycle[at + skill.lead] - cycle[at]
            forecast = field[at] + turned if skill.variable != "rain" else means["rain"] + cycle[target]
            known = ~np.isnan(field[at : target + 1]).any(axis=0)
            weights = weights_of()[known]
            squares.append((np.sum(weights * (forecast - field[target])[known] ** 2), weights.sum()))
            persisted.append((np.sum(weights * (field[at] - field[target])[known] ** 2), weights.sum()))
        for found, sums in ((skill.rmse, squares), (skill.persistence_rmse, persisted)):
            errors, weight = np.sum(sums, axis=0)
            assert found == pytest.approx(np.sqrt(errors / weight), rel=1e-4), skill
    heat = [skill for skill in evaluation.skills if skill.variable == "heat"]
    assert all(skill.ratio < 1 for skill in heat)  # the season goes on


@pytest.mark.parametrize("layout", [Layout(1, 2, 2), Layout(2, 1, 1)], ids=str)
def test_a_run_is_the_same_on_every_mesh(made, run, tmp_path, layout):
    batch = {"accumulation": 2} if layout.replicas == 1 else {}
    one = trained(tmp_path / "one", made[0], accumulation=2)
    tiled = trained(tmp_path / "tiled", made[0], layout, **batch)
    losses = [[record.loss for record in read_records(config.run_dir)] for config in (one, tiled)]
    np.testing.assert_allclose(*losses, rtol=2e-5)
    looks = [skills_in(config.run_dir) for config in (one, tiled)]
    for key in ("rmse", "persistence_rmse", "climatology_rmse"):
        np.testing.assert_allclose(*([row[key] for row in rows] for rows in looks), rtol=2e-5)
    cycles = [(config.run_dir / CYCLE_FILE).read_bytes() for config in (one, tiled, run)]
    assert len(set(cycles)) == 1


def test_verify_holds_for_anomalies(made, tmp_path):
    config = small_config(tmp_path, made[0], data=DATA)
    for rows in run_on_ranks(Layout(1, 1, 2), lambda mesh: verify_parity(config, mesh, torch.float64)):
        assert rows and all(row.passed for row in rows)


def test_a_run_goes_on_bit_for_bit_from_the_cycle_of_its_checkpoint(made, run, tmp_path):
    """Also where its own file is gone or damaged, and on another store of the same data."""
    prepare([made[0]], tmp_path / "other", frames_per_file=31)
    for name, damage in (("gone", lambda path: path.unlink()), ("damaged", lambda path: path.write_bytes(b"x"))):
        cut = tmp_path / name
        config = trained(cut, made[0], steps=2)
        damage(cut / "run" / CYCLE_FILE)
        again = small_config(
            cut, tmp_path / "other" if name == "gone" else made[0], data=DATA,
            training=TRAINING | {"steps": 4}, mesh={"replicas": 1, "lat": 1, "lon": 1},
        )  # fmt: skip
        run_on_ranks(ONE, lambda mesh, again=again: train(again, mesh, extend="rewarm"))
        assert (cut / "run" / CYCLE_FILE).read_bytes() == (run.run_dir / CYCLE_FILE).read_bytes()
        assert [one.problem() for one in checkpoints_in(config.run_dir)] == [None] * 2


def test_resumed_it_is_the_run_that_never_stopped(made, run, tmp_path):
    shutil.copytree(run.run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    trained(tmp_path, made[0])
    assert_same_state(*(checkpoints_in(one)[-1] for one in (run.run_dir, tmp_path / "run")))


def test_a_damaged_file_of_all_checkpoints_is_mended_from_the_runs_own(made, run, tmp_path):
    """They are links to one."""
    shutil.copytree(run.run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    (tmp_path / "run" / "checkpoints" / "step-00000002" / CYCLE_FILE).write_bytes(b"damaged")
    trained(tmp_path, made[0])
    assert [one.problem() for one in checkpoints_in(tmp_path / "run")] == [None] * 2
    assert_same_state(*(checkpoints_in(one)[-1] for one in (run.run_dir, tmp_path / "run")))


def test_a_run_that_saw_no_anomalies_does_not_begin_to(made, tmp_path):
    saved = {"data.log1p": {}, "data.anomalies": {}}
    with Store.open(made[0]) as store:
        workspace = Workspace.of(small_config(tmp_path, made[0], data=DATA), store, ProcessMesh.alone())
    with pytest.raises(InputError, match=r"holds a run with data\.anomalies=\{\}, this config says \{'heat': 2"):
        check_same_run(workspace, saved)


def test_an_export_without_the_cycle_is_refused(run, tmp_path):
    export(checkpoints_in(run.run_dir)[-1], tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        about = file.metadata()
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["annual_cycle/heat"][0, 0, 0] += 1
    save_file(tensors, tmp_path / "changed.safetensors", metadata=about)
    with pytest.raises(InputError, match=r"changed\.safetensors has not the annual cycle of ice, heat, rain that"):
        load_network(tmp_path / "changed.safetensors")


def test_without_its_cycle_a_run_does_not_go_on(made, run, tmp_path):
    shutil.copytree(run.run_dir, tmp_path / "run")
    for path in (tmp_path / "run").rglob(CYCLE_FILE):
        path.unlink()
        path.write_bytes(b"another")
    with pytest.raises(AssertionError, match=r"annual cycle of the run's variables is missing or damaged: none of"):
        trained(tmp_path, made[0])
    found = checkpoints_in(tmp_path / "run")[-1].problem()
    assert found is not None and CYCLE_FILE in found


def test_another_year_of_the_data_is_refused_where_training_would_go_on(made, run, tmp_path):
    shutil.copytree(run.run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    warmer = made[1].assign(heat=made[1]["heat"] * np.float32(1.01))
    warmer["heat"].attrs["units"] = "K"
    warmer.to_netcdf(tmp_path / "warmer.nc", engine="h5netcdf")
    prepare([tmp_path / "warmer.nc"], tmp_path / "warmer")
    with pytest.raises(AssertionError, match=r"trained on a 'heat' of mean.* K \(less its annual cycle\), the store"):
        trained(tmp_path, tmp_path / "warmer")


@pytest.mark.parametrize("kind", ["run", "checkpoint", "export"])
def test_a_trained_network_knows_what_it_departs_from(run, by_hand, made, tmp_path, kind):
    checkpoint = checkpoints_in(run.run_dir)[-1]
    export(checkpoint, tmp_path / "model.safetensors")
    places = {"run": run.run_dir, "checkpoint": checkpoint.path, "export": tmp_path / "model.safetensors"}
    trained_network = load_network(places[kind])
    assert trained_network.cycle.coefficients.keys() == set(DATA["anomalies"])
    assert trained_network.contract.harmonics == DATA["anomalies"]
    with Store.open(made[0]) as store:
        heat = trained_network.cycle.at("heat", store.year_fraction)
    np.testing.assert_allclose(heat, by_hand["heat"], rtol=2e-6, atol=2e-5)
    assert sum(name.startswith("annual_cycle/") for name in load_file(tmp_path / "model.safetensors")) == 3


def test_a_run_that_begins_with_it_knows_its_channels(made, run, tmp_path):
    begins = trained(tmp_path, made[0], start_from=str(run.run_dir))
    contracts = [checkpoints_in(one.run_dir)[-1].manifest().contract for one in (run, begins)]
    kinds = {one.name: one.inherited for one in contracts[1].variables}  # anomalies are of a cycle of their own
    assert kinds == {"ice": False, "wind": True, "heat": False, "rain": False}
    assert contracts[0].annual_cycle == contracts[1].annual_cycle
    other = DATA | {"anomalies": {"heat": 2}}
    printed = io.StringIO()

    def check(mesh):
        with contextlib.redirect_stderr(printed):
            train(begins, mesh)
        return printed.getvalue()

    begins = small_config(tmp_path / "other", made[0], data=other, training=TRAINING | {"start_from": str(run.run_dir)})
    (told,) = run_on_ranks(ONE, check)
    variables = checkpoints_in(begins.run_dir)[-1].manifest().contract.variables
    assert [one.name for one in variables if one.inherited] == ["wind"]
    assert "seen in another way than before (log1p, anomalies), so as new: ice, rain" in told


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"anomalies": {"heet": 1}}, r"no variable for data\.anomalies: 'heet'.*Did you mean 'heat'"),
        ({"anomalies": {"heat": 1}, "log1p": {"heat": 300}}, r"log1p and data\.anomalies both name heat.*one of them"),
        (
            {"periods": {"train": "2003-03-01/2003-09-30"}},
            r"for 'heat', .* every 20% .* and 15 in .* none in the 4\d% after its first 7\d%\. Use 0 \(",
        ),
    ],
)
def test_what_cannot_be_is_told(made, tmp_path, data, message):
    config = small_config(tmp_path, made[0], data=DATA | data)
    with Store.open(made[0]) as store, pytest.raises(InputError, match=message):
        make_contract(config, store, ProcessMesh.alone())
