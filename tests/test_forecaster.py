"""`Forecaster`: from an exported file alone, by files and datasets in any order; embeddings; earth2studio."""

from collections import OrderedDict
from itertools import islice

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors import safe_open
from safetensors.torch import save_file

import forecasts
from faconv_hpc import Forecaster, load_network
from faconv_hpc.data.store import Store
from faconv_hpc.data.times import TimeAxis
from faconv_hpc.data.variables import Variable
from faconv_hpc.errors import InputError
from faconv_hpc.forecasting.dates import Timeline
from faconv_hpc.forecasting.frames import store_frames
from faconv_hpc.forecasting.names import fields_of, in_vocabulary
from faconv_hpc.spatial.mesh import ProcessMesh
from faconv_hpc.training.free_run import free_run
from faconv_hpc.training.skill import forecasts_from
from forecasts import NAMES, STARTS, STEPS, WINDOW, opened, written
from ranks import Layout, run_on_ranks
from test_cli import faconv

START = "2003-06-06"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An exported file, and what reads its store."""
    directory = tmp_path_factory.mktemp("forecaster")
    return forecasts.draw_model(directory, forecasts.make_store(directory))


@pytest.fixture(scope="module")
def exported(made):
    return made[0]


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory):
    """Forecasts from the store."""
    output = tmp_path_factory.mktemp("alone") / "forecast.nc"
    written(ProcessMesh.alone(), made[0], output, [made[1].store.path])
    return opened(output)


@pytest.fixture(scope="module")
def turned():
    """The same fields south first, from another meridian, in other orders, their times decoded."""
    data = forecasts.decoded().isel(latitude=slice(None, None, -1)).roll(longitude=5, roll_coords=True)
    data = data.assign_coords(longitude=(data.longitude + 180) % 360 - 180).transpose("longitude", ...)
    data = data.isel(level=[1, 0]).rename(latitude="lat", longitude="lon", level="pressure_level")
    return data[["rain", "height", "t", "sst", "ice", "vapour", "heat"]]


@pytest.fixture(scope="module")
def forecaster(exported):
    return Forecaster.load(exported, device="cpu")


def assert_same(found, expected):
    for name in NAMES:
        scale = float(np.abs(expected[name]).max())
        np.testing.assert_allclose(found[name].values, expected[name].values, rtol=0, atol=2e-6 * scale, err_msg=name)


@torch.no_grad()
def test_a_forecast_is_a_free_run_in_units(made, alone):
    """Of the samples that training reads; what the network sees is turned back by hand."""
    (model, workspace), first, data = made, 10, forecasts.decoded()
    batch = workspace.windows(np.array([first - WINDOW + 1]), WINDOW + STEPS - 1).read([0])
    channels, fractions = workspace.contract.channels, workspace.store.year_fraction
    fields = {name: data[name].values for name in ("heat", "ice", "vapour")}
    fields |= {f"t{level}": data.t.sel(level=level).values for level in (500, 850)}

    def cycle(name, frame):
        return workspace.cycle.at(name, fractions[frame : frame + 1])[0].astype(np.float64)

    found = alone.isel(init_time=0)
    forecast = {name: found[name].values for name in NAMES if name != "t"}
    forecast |= {f"t{level}": found.t.sel(level=level).values for level in (500, 850)}
    runs = free_run(load_network(model).network, batch, WINDOW, workspace.domain)
    for lead, (change, diagnostic) in enumerate(runs):
        for place, one in enumerate(channels.prognostic):
            dz = change[0, place].double().numpy() * one.tendency_std
            x = np.full(dz.shape, np.nan)
            for at in range(first - WINDOW + 1, first + 1):  # what was known last; of anomalies, less the cycle of then
                now = fields[one.name][at] - (cycle(one.name, at) if one.harmonics is not None else 0)
                x = np.where(np.isnan(now), x, now)
            want = x + dz if one.log1p is None else (x + one.log1p) * np.exp(dz) - one.log1p
            if one.harmonics is not None:
                want += cycle(one.name, first + lead + 1)
            np.testing.assert_allclose(forecast[one.name][lead], want, rtol=2e-6, atol=1e-6, err_msg=one.name)
        (rain,) = channels.diagnostic
        want = rain.mean + rain.std * diagnostic[0, 0].double().numpy() + cycle("rain", first + lead + 1)
        np.testing.assert_allclose(forecast["rain"][lead], want, rtol=2e-6)


@torch.no_grad()
def test_what_came_is_the_change_since_a_cell_was_known_last(made):
    (model, workspace), first, ice = made, 10, forecasts.decoded().ice.values
    windows = workspace.windows(np.array([first - WINDOW + 1]), WINDOW + STEPS - 1)
    given = windows, windows.read([0]), WINDOW, workspace.domain, workspace.climatology()
    place = [one.name for one in workspace.contract.channels.targets].index("ice")
    cycle = workspace.cycle.at("ice", workspace.store.year_fraction)
    now, before, earliest = (ice[at] - cycle[at] + cycle[first] for at in (first, first - 1, first - 2))
    last = np.where(np.isnan(now), np.where(np.isnan(before), earliest, before), now)  # its anomaly then, as of now
    assert 1 > np.isnan(ice[first]).mean() > np.isnan(last).mean() > 0
    for lead, fields in enumerate(forecasts_from(load_network(model).network, *given), start=1):
        want = ice[first + lead] - last
        np.testing.assert_allclose(fields.truth_CYX[place].numpy(), want, rtol=0, atol=2e-6)
        np.testing.assert_allclose(fields.persistence_CYX[place].numpy(), 0, atol=1e-12)
        assert np.isnan(fields.forecast_CYX[place].numpy()).sum() == 0


def test_an_export_of_other_inputs_than_this_version_makes_is_refused(exported, tmp_path):
    with safe_open(exported, "pt") as opened:
        about, weights = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    about["inputs"] = about["inputs"].replace("fresh_ice", "valid_ice")
    save_file(weights, tmp_path / "old.safetensors", metadata=about)
    with pytest.raises(InputError, match=r"old\.safetensors was exported by an older .*saw gaps in fields and"):
        load_network(tmp_path / "old.safetensors")


def test_files_without_run_and_store_give_the_same(exported, turned, alone, tmp_path, monkeypatch):
    """Fields of two files, prognostic ones without the last frames; the command is given a pattern."""
    given = turned.drop_vars(["sst", "rain"]).isel(time=slice(0, 31))
    given.to_netcdf(tmp_path / "given_states.nc", engine="h5netcdf")
    turned[["sst"]].to_netcdf(tmp_path / "given_sst.nc", engine="h5netcdf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(exported.read_bytes())
    starts = [part for text in STARTS for part in ("--start", text)]
    command = ["forecast", "model.safetensors", "--data", "given_*.nc", "--steps", STEPS, "--output", "f.zarr"]
    done = faconv(*command, *starts, "--ranks", 2, "--mesh", "1x2")
    assert done.returncode == 0, done.stderr
    assert_same(opened(tmp_path / "f.zarr"), alone)


def test_a_dataset_gives_the_same(forecaster, turned, alone):
    found = forecaster.forecast(turned.isel(time=slice(26 - WINDOW + 1, 26 + STEPS)), STEPS)
    assert found.init_time.values.astype(str)[0].startswith(START)  # the last that forcings allow
    assert_same(found, alone.sel(init_time=[START]))
    xr.testing.assert_equal(found.drop_vars(NAMES), alone.sel(init_time=[START]).drop_vars(NAMES))
    assert found.t.attrs == {key: alone.t.attrs[key] for key in found.t.attrs}
    by_cftime = xr.decode_cf(forecasts.dataset(), decode_times=xr.coders.CFDatetimeCoder(use_cftime=True))
    assert_same(forecaster.forecast(by_cftime, STEPS, START), found)


def test_tiles_hold_their_part_of_a_dataset(exported, turned, alone):
    def part(mesh):
        return Forecaster.load(exported, mesh=mesh).forecast(turned, STEPS, STARTS)

    for found in run_on_ranks(Layout(1, 2, 1), part):
        assert found.latitude.size in (5, 6)
        assert_same(found, alone.sel(latitude=found.latitude))


def changed(data, name, **changes):
    return data.assign({name: data[name].assign_attrs(changes)})


@pytest.mark.parametrize(
    ("change", "start", "told"),
    [
        (lambda one: one.isel(lat=slice(1, None)), START, r"latitude_deg of 11 values .* has of 10 values"),
        (lambda one: one.assign_coords(lon=one.lon + 3), START, r"longitude_deg of 14 .*, the dataset has of 14"),
        (lambda one: changed(one, "heat", units="degC"), START, r"'heat' in K, the dataset has it in degC"),
        (lambda one: one.drop_vars("vapour"), START, r"no variable 'vapour' in the sources the dataset"),
        (lambda one: one.assign(height=one.height + 1), START, r"a 'height' of mean .* and deviation .* has one of"),
        (
            lambda one: one.assign(heat=one.heat.where(one.lat < 70)),
            START,
            r"'heat' is nan in 14 cells at 2003-05-25 .* without missing cells",
        ),
        (lambda one: one.isel(time=[24, 26, 27, 28, 29]), START, r"no frame of its window of 3 frames at 2003-05-31"),
        (lambda one: one.isel(time=slice(24, 29)), START, r"has no sst at 2003-06-24 .* allow no date at all"),
        (lambda one: one.isel(time=slice(20, 40)), "2003-06-07", r"2003-06-07 .*Dates that can be: 2003-05-13 .*\(15 "),
        (lambda one: one, "2003-06-31", r"--start 2003-06-31 names 2003-06-31, which is no date"),
        (lambda one: one, "June", r"--start takes dates such as .* got 'June'"),
        (lambda one: one, "2003-06-06/2003-05-06/6d", r"ends before it begins"),
    ],
)
def test_what_does_not_fit_is_refused(forecaster, turned, change, start, told):
    with pytest.raises(InputError, match=told):
        forecaster.forecast(change(turned), STEPS, start)


def test_embeddings_are_those_of_the_window(made, forecaster, turned):
    found = forecaster.embed(turned.isel(time=slice(20, 26)))
    assert found.embedding.dims == ("time", "component") and found.embedding.shape == (4, 16)
    workspace = made[1]
    batch = workspace.windows(np.arange(20, 24), WINDOW).read(range(4))
    network = load_network(made[0]).network
    with torch.no_grad():
        z_BTE = network(batch.inputs_BTCYX, batch.year_fraction_BT, domain=workspace.domain).embedding_BTE
    np.testing.assert_allclose(found.embedding.values, z_BTE[:, -1].numpy(), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found.time, turned.time[22:26])


def test_levels_become_a_dim_where_all_have_the_same():
    def one(name, long_name=""):
        return Variable(name=name, units="K", mean=0, std=1, tendency_std=1, long_name=long_name)

    some = [one("z500", "Z at 500 hPa"), one("u10", "10 metre wind"), one("t850", "T at 850 hPa")]
    more = [one("z850", "Z at 850 hPa"), one("t500", "T at 500 hPa"), one("t2m")]
    assert [field.name for field in fields_of(some)] == ["z500", "u10", "t850"]
    found = {field.name: (field.channels, field.levels) for field in fields_of(some + more)}
    levels = (500.0, 850.0)
    assert found == {"z": ((0, 3), levels), "u10": ((1,), ()), "t": ((4, 2), levels), "t2m": ((5,), ())}
    assert [in_vocabulary(each) for each in some] == ["z500", "u10", "t850"]  # z in K is another z
    wind = one("10m_u_component_of_wind").model_copy(update={"units": "m s**-1"})
    assert in_vocabulary(wind) == "u10m"


# earth2studio


@pytest.fixture(scope="module")
def given_nothing(tmp_path_factory):
    """A network without forcing variables, and the same in files."""
    directory, names = tmp_path_factory.mktemp("nothing"), {"heat": "t2m"}
    data = forecasts.dataset().drop_vars(["sst"])
    store = forecasts.make_store(directory, data, rename=names)
    options = {key: value for key, value in forecasts.DATA.items() if key != "variables"}
    options |= {"roles": {"rain": "diagnostic"}, "anomalies": {"t2m": 1, "rain": 0}}
    model, _ = forecasts.draw_model(directory, store, options)
    return Forecaster.load(model, device="cpu"), xr.decode_cf(data).rename(names)


def state_of(data, coords, times):
    """As earth2studio's fetch_data gives it: (time, lead_time, variable, lat, lon)."""
    levels = {"t500": data.t.sel(level=500), "t850": data.t.sel(level=850)}
    x = np.empty([len(times), *(len(coords[name]) for name in ("lead_time", "variable", "lat", "lon"))], np.float32)
    for place, name in enumerate(coords["variable"]):
        field = levels[name] if name in levels else data[name]
        for at, time in enumerate(times):
            x[at, :, place] = field.sel(time=time + coords["lead_time"]) if "time" in field.dims else field
    filled = OrderedDict(time=times, **{name: coords[name] for name in ("lead_time", "variable", "lat", "lon")})
    return torch.from_numpy(x), filled


def test_it_is_a_prognostic_model_of_earth2studio(given_nothing):
    model, data = given_nothing
    wanted = model.input_coords()
    assert list(wanted) == ["batch", "time", "lead_time", "variable", "lat", "lon"]
    assert wanted["lead_time"].tolist() == [np.timedelta64(hours, "h") for hours in (-288, -144, 0)]
    assert set(wanted["variable"]) == {"t2m", "t500", "t850", "ice", "vapour", "height"}
    times = np.array(["2003-06-06", "2003-03-02"], dtype="datetime64[ns]")
    x, coords = state_of(data, wanted, times)
    assert model.to("cpu") is model
    steps = list(islice(model.create_iterator(x, coords), 4))
    expected = model.forecast(data, 3, ["2003-03-02", "2003-06-06"]).sel(init_time=times)
    variables = list(steps[0][1]["variable"])
    for lead, (state, there) in enumerate(steps):
        assert tuple(there) == ("time", "lead_time", "variable", "lat", "lon")
        assert state.shape == tuple(len(values) for values in there.values())
        assert there["lead_time"].tolist() == [np.timedelta64(144 * lead, "h")]
        for name in ("t2m", "ice", "vapour", "rain", "t500"):
            want = expected.t.sel(level=500) if name == "t500" else expected[name]
            first = data.t.sel(level=500) if name == "t500" else data[name]
            want = want.isel(lead_time=lead - 1) if lead else first.sel(time=times)
            if lead == 0 and name == "rain":
                want = want * np.nan  # is not an input
            found = state[:, 0, variables.index(name)].numpy()
            np.testing.assert_allclose(found, want.values, rtol=2e-6, atol=1e-5, err_msg=name)
    one, there = model(x, coords)
    torch.testing.assert_close(one, steps[1][0], equal_nan=True)
    after = model.output_coords(coords)
    assert {name: list(values) for name, values in after.items()} == {
        name: list(values) for name, values in there.items()
    }
    planned = model.output_coords(wanted)
    assert list(planned) == list(wanted) and planned["lead_time"].tolist() == [np.timedelta64(144, "h")]
    members, _ = model(torch.stack([x, x]), OrderedDict(ensemble=np.arange(2), **coords))
    torch.testing.assert_close(members[1], one, equal_nan=True)


def test_what_is_no_state_of_the_protocol_is_refused(given_nothing, forecaster):
    model, data = given_nothing
    x, coords = state_of(data, model.input_coords(), np.array([START], dtype="datetime64[ns]"))
    for change, told in (
        ({"lat": coords["lat"][::-1]}, "takes lat"),
        ({"variable": coords["variable"][::-1]}, "takes variable"),
        ({"lead_time": coords["lead_time"] * 2}, "takes lead_time"),
    ):
        with pytest.raises(InputError, match=told):
            model(x, coords | change)
    some = x.clone()
    some[:, 0, list(coords["variable"]).index("t2m"), 3, 4] = torch.nan
    with pytest.raises(InputError, match=r"'t2m' is missing in some cells"):
        model(some, coords)
    with pytest.raises(InputError, match=r"'height' has missing cells in the state"):
        model(x * torch.nan, coords)
    with pytest.raises(InputError, match=r"has shape \(1, 3, 6, 10, 14\), its coordinates .*lat \(11\)"):
        model(x[..., 1:, :], coords)
    with pytest.raises(InputError, match="no prognostic model in earth2studio's sense: it is given sst"):
        forecaster.input_coords()


# Other stores


def test_months_go_on_as_long_as_the_data_say_how(tmp_path):
    """Their steps differ, so no date can be computed; leads of one file are the same."""
    random = np.random.default_rng(3)
    days = np.cumsum([0, *[31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] * 2])
    values = {"u": (forecasts.DIMS, random.normal(size=(25, 7, 10)).astype(np.float32), {"units": "m"})}
    axes = {"latitude": np.linspace(75, -75, 7), "longitude": np.arange(10) * 36.0}
    time = {"time": ("time", days, {"units": "days since 2001-01-01", "calendar": "noleap"})}
    store = forecasts.make_store(tmp_path, xr.Dataset(values, axes | time))
    model, _ = forecasts.draw_model(tmp_path, store, {"forcings": ["step_hours"], "periods": {}})
    given, alone = (store,), ProcessMesh.alone()
    written(alone, model, tmp_path / "f.nc", given, ["2001-03-01", "2002-03-01"], 3)
    found = opened(tmp_path / "f.nc")
    assert (found.lead_time / np.timedelta64(1, "D")).values.tolist() == [31, 61, 92]
    assert [str(date) for date in found.init_time.values] == ["2001-03-01 00:00:00", "2002-03-01 00:00:00"]  # noleap
    with pytest.raises(InputError, match=r"after 2001-03-01 00:00:00 and after 2001-04-01 .* not of the same length"):
        written(alone, model, tmp_path / "g.nc", given, ["2001-03-01,2001-04-01"], 3)
    with pytest.raises(InputError, match=r"3 dates after them .*\(672 to 744 h\).* to 2002-10-01 .*\(20 of"):
        written(alone, model, tmp_path / "g.nc", given, ["2002-11-01"], 3)
    with pytest.raises(InputError, match="no prognostic model in earth2studio's sense: its steps differ"):
        Forecaster.load(model, device="cpu").input_coords()


@pytest.fixture(scope="module")
def months(tmp_path_factory):
    """Dates to forecast two months from, after two; the frame of a month is its 15th."""
    days = 14 + np.cumsum([0, *[31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] * 2])[:24]
    values = {
        "u": (forecasts.DIMS, np.random.default_rng(5).normal(size=(24, 5, 8)).astype(np.float32), {"units": "m"})
    }
    axes = {"latitude": np.linspace(60, -60, 5), "longitude": np.arange(8) * 45.0}
    time = {"time": ("time", days, {"units": "days since 2001-01-01", "calendar": "noleap"})}
    directory = tmp_path_factory.mktemp("months")
    store = Store.open(forecasts.make_store(directory, xr.Dataset(values, axes | time)))
    model, _ = forecasts.draw_model(directory, store.path, {"periods": {}})
    contract = load_network(model).contract
    return Timeline(store_frames(store, contract), contract, window=2, steps=2)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("2001-06", ["2001-06-15"]),
        ("2001-11/2002-01", ["2001-11-15", "2001-12-15", "2002-01-15"]),
        ("2002", [f"2002-{month:02}-15" for month in range(1, 11)]),  # two months are left for the leads
        ("2001-06-15, 2001-02-20/2001-04-15", ["2001-03-15", "2001-04-15", "2001-06-15"]),
        ("2001-04-15/2001-04-17/1d", ["2001-04-15", "2001-04-16", "2001-04-17"]),
        ("2001-04-01/2001-04/10d", ["2001-04-01", "2001-04-11", "2001-04-21"]),
        ("2001-06-02/2001-06", ["2001-06-15"]),
        (
            "2001-06-20/2001-07-10",
            r"--start 2001-06-20/2001-07-10: no forecast from any date of it.*nearest is",
        ),
        ("2003", r"no forecast from any date of it. Dates that can be: 2001-02-15 .* to 2002-10-15"),
        ("2001-13", r"--start 2001-13 names 2001-13, which is no date"),
    ],
)
def test_a_month_is_all_of_its_dates_that_can_be(months, text, told):
    """Wherever in it the frame of a month stands; dates and ranges with a step are what they say."""
    if isinstance(told, list):
        assert [TimeAxis(np.array([one]), "noleap").date(0)[:10] for one in months.asked([text])] == told
    else:
        with pytest.raises(InputError, match=told):
            months.asked([text])


def test_a_sequence_of_a_store_is_named(tmp_path):
    axes = {"latitude": np.linspace(75, -75, 7), "longitude": np.arange(10) * 36.0}
    time = {"time": ("time", np.arange(8) * 6.0, {"units": "hours since 2001-01-01"})}
    shape, random = (2, 8, 7, 10), np.random.default_rng(4)
    values = {"u": (("number", *forecasts.DIMS), random.normal(size=shape).astype(np.float32), {"units": "m"})}
    both = xr.Dataset(values, axes | time | {"number": [3, 5]})
    store = forecasts.make_store(tmp_path, both, sequence_dim="number")
    model, _ = forecasts.draw_model(tmp_path, store, {"periods": {}})
    with pytest.raises(InputError, match=r"holds 2 sequences: 3, 5. Say with --sequence which one"):
        written(ProcessMesh.alone(), model, tmp_path / "f.nc", [store], ["last"], 2)
    for name in ("3", "5"):
        written(ProcessMesh.alone(), model, tmp_path / f"{name}.nc", [store], ["last"], 2, sequence=name)
        one = xr.decode_cf(both.sel(number=int(name), drop=True))
        expected = Forecaster.load(model, device="cpu").forecast(one, 2)
        np.testing.assert_allclose(opened(tmp_path / f"{name}.nc").u, expected.u, atol=1e-6)


def test_one_frame_is_enough_for_a_window_of_one(tmp_path):
    """A store of one frame has no step that could differ."""
    axes = {"latitude": np.linspace(75, -75, 7), "longitude": np.arange(10) * 36.0}
    time = {"time": ("time", np.arange(4) * 6.0, {"units": "hours since 2001-01-01"})}
    random = np.random.default_rng(6).normal(size=(4, 7, 10)).astype(np.float32)
    data = xr.Dataset({"u": (forecasts.DIMS, random, {"units": "m"})}, axes | time)
    (tmp_path / "one").mkdir()
    store, one = forecasts.make_store(tmp_path, data), forecasts.make_store(tmp_path / "one", data.isel(time=[3]))
    model, _ = forecasts.draw_model(tmp_path, store, {"window": 1, "periods": {}}, model={"attention_every": 0})
    summary = written(ProcessMesh.alone(), model, tmp_path / "f.nc", [one], ["last"], 2)
    assert summary.first == "2001-01-01 18:00:00"
    expected = Forecaster.load(model, device="cpu").forecast(xr.decode_cf(data), 2)
    np.testing.assert_allclose(opened(tmp_path / "f.nc").u, expected.u, atol=1e-6)
