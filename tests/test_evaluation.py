"""Scores of networks and of anyone's files: equal to the package `scores`; spectra, intervals, verdicts, the report."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scores
import torch
import xarray as xr
from matplotlib.collections import LineCollection
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import stats
from scipy.special import sph_harm_y
from typer.testing import CliRunner

import forecasts
from faconv_hpc import Domain, LatLonGrid, look
from faconv_hpc.cli.app import app
from faconv_hpc.cli.evaluate import _Asked, place_of
from faconv_hpc.data.store import Store
from faconv_hpc.errors import InputError
from faconv_hpc.evaluation import figures, results
from faconv_hpc.evaluation import report as report_module
from faconv_hpc.evaluation.compare import compared
from faconv_hpc.evaluation.evaluate import evaluate, names_of
from faconv_hpc.evaluation.intervals import TILT, Weighings, memory_of, most_waves
from faconv_hpc.evaluation.report import headline, report_of
from faconv_hpc.evaluation.results import as_json, dataset_of, save
from faconv_hpc.evaluation.spectra import Spectra
from faconv_hpc.evaluation.sums import PerDate, Sums
from faconv_hpc.evaluation.truth import truth_of
from faconv_hpc.locks import OUTPUT_LOCK, locked_directory
from faconv_hpc.prepare.synthetic import SyntheticOptions, synthesise
from faconv_hpc.spatial.grid import Tile
from faconv_hpc.spatial.mesh import ProcessMesh
from faconv_hpc.training.contract import Contract

ALONE = ProcessMesh.alone()
LATITUDE, LONGITUDE, HOURS, LEADS = np.linspace(75, -75, 6), np.arange(8) * 45.0, np.arange(48) * 6, (6, 12)
DIMS, CELLS = ("latitude", "longitude"), ("init_time", "lead_time", "latitude", "longitude")
UNITS = {"u": "m s**-1", "t": "K"}


def weights_of(grid):
    return xr.DataArray(
        grid.cell_area_sr / grid.cell_area_sr.mean(), {"latitude": np.rad2deg(grid.latitude)}, ["latitude"]
    )


def known_everywhere(shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("equal_area", [False, True])
def test_sums_are_what_scores_says_of_the_fields(equal_area):
    grid = LatLonGrid(6, 8, latitude_deg=LATITUDE, equal_area=equal_area)
    shape = (5, 2, 6, 8)  # dates, targets
    came, mean, said = (known_everywhere(shape, seed) for seed in (1, 2, 3))
    said = said + came  # so that they have something in common
    came[1, 0, 2, 3:6], mean[:, :, 4, 4] = np.nan, np.nan
    sums = Sums(Domain(grid), 5, 1, 2, 2)
    for date in range(5):
        fields = (torch.from_numpy(one[date]) for one in (said, mean, came))
        forecast, climatology, truth = fields
        sums.add(date, 0, [forecast], [climatology], truth, climatology)
    found = {name: values[0, 0] for name, values in PerDate.of(sums.terms_NLFCK).metrics().items()}
    dims, weights = ("date", "target", *DIMS), weights_of(grid)
    f, o, c = (xr.DataArray(one, {"latitude": np.rad2deg(grid.latitude)}, dims) for one in (said, came, mean))
    for place, forecast in enumerate((f, c)):
        given = {"reduce_dims": ["date", *DIMS], "weights": weights}
        np.testing.assert_allclose(found["rmse"][place], scores.continuous.rmse(forecast, o, **given), rtol=1e-6)
        np.testing.assert_allclose(
            found["bias"][place], scores.continuous.additive_bias(forecast, o, **given), rtol=1e-6
        )
    a, b = (f - c).where(o.notnull()), o - c

    def over_cells(values):
        return scores.processing.aggregate(values, reduce_dims=DIMS, weights=weights)

    if equal_area:
        acc = scores.continuous.correlation.pearsonr(a, b, reduce_dims=DIMS)
    else:
        a, b = a - over_cells(a), b - over_cells(b)
        acc = over_cells(a * b) / np.sqrt(over_cells(a * a) * over_cells(b * b))
    np.testing.assert_allclose(found["acc"][0], acc.mean("date"), rtol=1e-6)
    variance = over_cells((a - over_cells(a)) ** 2)
    np.testing.assert_allclose(found["activity"][0], np.sqrt(variance.mean("date")), rtol=1e-6)
    assert np.isnan(found["acc"][1]).all() and (found["activity"][1] == 0).all()  # climatology has no anomaly


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A network alone with data in files, and its forecasts in a file: no run, no store."""
    made, here = (tmp_path_factory.mktemp(name) for name in ("made", "elsewhere"))
    model, _ = forecasts.draw_model(made, forecasts.make_store(made))
    model.rename(here / "model.safetensors")
    (made / "source.nc").rename(here / "source.nc")
    starts = ["2004-03-14/2004-04-07/6d"]
    forecasts.written(ALONE, here / "model.safetensors", here / "said.nc", [here / "source.nc"], starts, 2)
    return here


def test_a_network_alone_is_judged_as_its_file_is_and_as_scores_says(elsewhere, monkeypatch, tmp_path):
    monkeypatch.chdir(elsewhere)
    models, data = [elsewhere / "model.safetensors", elsewhere / "said.nc"], [elsewhere / "source.nc"]
    found = evaluate(models, ALONE, data=data, leads=2)
    assert found.names[:2] == ("model", "said") and [one.held_out for one in found.entries] == [True, None]
    assert found.forecasts == 5 and found.dates[0] == "2004-03-14 00:00:00"
    for values in found.metrics.values():  # files hold float32
        np.testing.assert_allclose(values[:, 0], values[:, 1], rtol=1e-5, atol=2e-6)
    said, truth = forecasts.opened(elsewhere / "said.nc").astype(float), forecasts.decoded().astype(float)
    weights = xr.DataArray(forecasts_weights(), {"latitude": said.latitude}, ["latitude"])
    for place, target in enumerate(found.targets):
        if target.name.startswith("t"):
            one, came = (each.t.sel(level=float(target.name[1:])) for each in (said, truth))
        else:
            one, came = said[target.name], truth[target.name]
        for lead in range(2):
            forecast = one.isel(lead_time=lead)
            then = came.sel(time=forecast.init_time + forecast.lead_time)
            then = then.where(came.sel(time=forecast.init_time).notnull().values)  # as persistence is
            want = scores.continuous.rmse(forecast, then, weights=weights)
            assert found.metrics["rmse"][lead, 1, place] == pytest.approx(float(want), rel=1e-6), target


def forecasts_weights():
    return LatLonGrid(forecasts.NLAT, 1, latitude_deg=np.linspace(80, -80, forecasts.NLAT)).cell_area_sr


def test_without_dates_of_training_climatology_is_the_networks_own_or_of_dates_that_are_named(elsewhere, tmp_path):
    late = xr.load_dataset(elsewhere / "source.nc", decode_times=False, engine="h5netcdf").isel(time=slice(68, None))
    late.to_netcdf(tmp_path / "late.nc", engine="h5netcdf")
    model, data = [elsewhere / "model.safetensors"], [tmp_path / "late.nc"]
    own, named = (
        evaluate(model, ALONE, data=data),
        evaluate(model, ALONE, data=data, climatology=["2004-03-01/2004-03-14"]),
    )
    assert dict(zip([one.name for one in own.targets], own.known, strict=True)) == {
        "heat": True, "t500": False, "ice": True, "vapour": False, "t850": False, "rain": True
    }  # fmt: skip
    assert (
        np.isfinite(own.metrics["acc"][0, 0, [0, 2, 5]]).all() and np.isnan(own.metrics["acc"][0, 0, [1, 3, 4]]).all()
    )
    assert np.isnan(own.metrics["rmse"][0, 3]).all() and "no climatology of t500, vapour, t850," in report_of(own, {})
    assert named.known.all() and np.isfinite(named.metrics["acc"][0, 0]).all()
    np.testing.assert_allclose(named.metrics["rmse"][0, 0], own.metrics["rmse"][0, 0], rtol=1e-6)


def truth_fields():
    """A wave that moves, weather on it, and a level's."""
    random, time = np.random.default_rng(4), HOURS[:, None, None]
    wave = np.cos(np.deg2rad(LONGITUDE) - 0.02 * time) * np.cos(np.deg2rad(LATITUDE))[:, None]
    noise = random.normal(size=(2, *wave.shape)) * 0.3
    return {"u": wave + noise[0], "t": np.stack([wave - noise[1], 250 + 5 * wave], axis=1)}


def write_truth(path, missing=None):
    fields = truth_fields()
    if missing is not None:
        fields["u"][missing, 2, 3] = np.nan
    dims = {"u": ("time", *DIMS), "t": ("time", "level", *DIMS)}
    values = {name: (dims[name], one.astype(np.float32), {"units": UNITS[name]}) for name, one in fields.items()}
    coordinates = {
        "time": ("time", HOURS.astype(float), {"units": "hours since 2001-01-01"}),
        "level": ("level", [500.0, 850.0], {"units": "hPa", "standard_name": "air_pressure"}),
        "latitude": LATITUDE,
        "longitude": LONGITUDE,
    }
    xr.Dataset(values, coordinates).to_netcdf(path, engine="h5netcdf")
    return path


def forecast_of(error, dates=range(4, 40), seed=7):
    """The truth and noise of a size, with WeatherBench-X's names."""
    random, fields = np.random.default_rng(seed), truth_fields()
    frames = np.array([[date + lead // 6 for lead in LEADS] for date in dates])
    values = {}
    for name, field in fields.items():
        dims = CELLS if name == "u" else (*CELLS[:2], "level", *CELLS[2:])
        values[name] = (dims, field[frames] + error * random.normal(size=field[frames].shape), {"units": UNITS[name]})
    start = np.datetime64("2001-01-01", "ns")
    coordinates = {
        "init_time": start + HOURS[list(dates)] * np.timedelta64(1, "h"),
        "lead_time": np.array(LEADS) * np.timedelta64(1, "h").astype("timedelta64[ns]"),
        "level": [500.0, 850.0],
        "latitude": LATITUDE,
        "longitude": LONGITUDE,
    }
    return xr.Dataset(values, coordinates)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What came, a good forecast, and one of three times its errors: on rows from the south, longitudes from -180."""
    here = tmp_path_factory.mktemp("files")
    forecast_of(0.1).to_netcdf(here / "good.nc", engine="h5netcdf")
    worse = forecast_of(0.3, range(2, 30), seed=8).isel(latitude=slice(None, None, -1))
    worse = worse.assign_coords(longitude=(worse.longitude + 180) % 360 - 180).sortby("longitude")
    worse.to_zarr(here / "worse.zarr", zarr_format=3, consolidated=False)
    write_truth(here / "truth.nc")
    return here


@pytest.fixture(scope="module")
def judged(files):
    models = [files / "worse.zarr", files / "good.nc"]
    return evaluate(models, ALONE, data=[files / "truth.nc"], climatology=["/2001-01-05"], maps=files / "maps.nc")


def test_anyones_files_stand_in_one_table(judged):
    assert judged.names == ("worse", "good", "persistence", "climatology", "damped persistence")
    assert [one.name for one in judged.targets] == ["t500", "t850", "u"] and judged.leads_h.tolist() == [6, 12]
    assert judged.forecasts == 26  # that both have
    np.testing.assert_allclose(judged.metrics["rmse"][:, 0], 0.3, rtol=0.06)
    np.testing.assert_allclose(judged.metrics["rmse"][:, 1], 0.1, rtol=0.06)
    first, *others = judged.comparisons
    assert (first.model, first.other, first.verdict) == ("worse", "good", "worse")
    assert first.overall == pytest.approx(3, rel=0.05) and first.counts() == {"better": 0, "worse": 6, "cannot tell": 0}
    assert {(one.model, one.other): one.verdict for one in others}["good", "persistence"] == "better"
    low, high = judged.intervals["rmse"][:, :, 1]
    assert (low < judged.metrics["rmse"][:, 1]).all() and (high > judged.metrics["rmse"][:, 1]).all()
    assert (np.abs(high - low) < 0.02).all()


def test_damped_persistence_keeps_what_training_says_is_left(judged):
    """By NumPy: from the mean of each cell at its time of the day, over the 20 frames that were named."""
    field = truth_fields()["u"].astype(np.float32).astype(float)
    weights = LatLonGrid(6, 8, latitude_deg=LATITUDE).cell_area_sr[:, None]
    means = np.stack([field[hour:20:4].mean(0) for hour in range(4)])
    anomaly = field - means[np.arange(len(field)) % 4]
    for lead in (1, 2):
        left, pairs = 0.0, [(start, start + lead) for start in range(18)]
        products, squares = (
            sum((weights * anomaly[a] * anomaly[b]).sum() for a, b in some)
            for some in (pairs, [(a, a) for a, _ in pairs])
        )
        left = products / squares
        errors = [means[(at + lead) % 4] + left * anomaly[at] - field[at + lead] for at in range(4, 30)]
        want = np.sqrt(np.mean([np.average(one**2, weights=weights + 0 * one) for one in errors]))
        assert judged.metrics["rmse"][lead - 1, 4, 2] == pytest.approx(want, rel=1e-5), lead


def test_the_report_and_the_files_say_who_is_better(judged, files, tmp_path, monkeypatch):
    (tmp_path / "maps.nc").write_bytes((files / "maps.nc").read_bytes())
    monkeypatch.setattr(look, "DPI", 40)
    for name in ("SHOWN", "SHOWN_MAPS"):  # every figure, of one variable and few dots
        for module in (figures, report_module):
            monkeypatch.setattr(module, name, 1)
    said = save(judged, tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert report.count("The first 1 of 3 variables; the others are in `maps.nc`.") == 2  # maps of two models
    assert "The first 1 of 3 variables; the others are in `scores.nc`." in report
    assert report.count("The first 1 of 3 variables.") == 1
    assert "**worse is worse than good**: its RMSE is " in report and "**good is better than persistence**" in report
    for name in ("rmse", "acc", "comparisons", "spectra", "maps_1", "maps_2", "forecast"):
        assert (tmp_path / f"{name}.png").stat().st_size > 2_000 and f"({name}.png)" in report
    assert said["comparisons"][0]["verdict"] == "worse" and said["models"][1]["kind"] == "file of forecasts"
    with xr.open_dataset(tmp_path / "scores.nc", engine="h5netcdf", decode_timedelta=True) as stored:
        good = stored.sel(model="good", variable="t850", lead_time=np.timedelta64(12, "h"))
        (row,) = [one for one in said["skills"] if (one["model"], one["variable"], one["lead"]) == ("good", "t850", 2)]
        for name in ("rmse", "bias", "acc", "activity"):
            assert (
                float(good[name]) == pytest.approx(row[name]) and row[f"{name}_low"] < row[name] < row[f"{name}_high"]
            )
    with xr.open_dataset(tmp_path / "maps.nc", engine="h5netcdf", decode_timedelta=True) as maps:
        square = maps.u_rmse.sel(model="good").astype(float) ** 2
        whole = np.sqrt(
            square.weighted(
                weights_of(LatLonGrid(6, 8, latitude_deg=LATITUDE)).assign_coords(latitude=maps.latitude)
            ).mean(DIMS)
        )
        np.testing.assert_allclose(whole, judged.metrics["rmse"][:, 1, 2], rtol=1e-6)


def test_a_cell_that_was_missing_at_the_start_or_at_the_lead_does_not_count(files, tmp_path):
    truth = write_truth(tmp_path / "truth.nc", missing=10)
    found = evaluate([files / "good.nc"], ALONE, data=[truth], leads=2)
    assert found.targets[0].name == "u"
    weight_NL = found.per_date.weight[:, :, 0, 0]
    without = 1 - LatLonGrid(6, 8, latitude_deg=LATITUDE).cell_area_sr[2] / (4 * np.pi)
    want = np.ones((36, 2))
    want[4, 1] = want[5, 0] = want[6] = without  # dates 8, 9 and 10: the first is of frame 4
    np.testing.assert_allclose(weight_NL, want, rtol=1e-9)
    assert np.isfinite(found.metrics["rmse"][:, 0]).all()


def test_of_few_dates_it_says_that_it_cannot_tell(files):
    few = evaluate([files / "good.nc", files / "worse.zarr"], ALONE, data=[files / "truth.nc"], samples=6)
    assert not few.weighings.can_tell and few.comparisons[0].verdict == "cannot tell"
    assert "**cannot be told** from so few dates" in headline(few)[0] and "**6 dates are too few" in report_of(few, {})
    assert np.isnan(few.intervals["rmse"]).all() and as_json(few)["skills"][0]["rmse_low"] is None
    assert few.known.sum() == 0 and dataset_of(few).rmse.sel(model="climatology").isnull().all()


NOT_FITTING = {
    "names": (lambda one: one.rename(init_time="time"), r"has no dim and coordinate init_time.*Rename them"),
    "units": (lambda one: one.assign(u=one.u.assign_attrs(units="km")), r"'u' is in km in .*, and in m s\*\*-1"),
    "a blank": (
        lambda one: one.assign(u=one.u.assign_attrs(units="ms-1")),
        r"'u' is in ms-1 in .*, and in m s\*\*-1 in what came. Convert it. A blank alone tells them apart: if",
    ),
    "grid": (lambda one: one.assign_coords(latitude=LATITUDE + 1), r"has 6 latitudes from 76 to -74, what came 6"),
    "dates": (lambda one: one.assign_coords(init_time=one.init_time + np.timedelta64(40, "D")), r"has no date of"),
    "leads": (lambda one: one.assign_coords(lead_time=("lead_time", [6, 12])), r"lead_time of .* has no units"),
    "unknown units": (
        lambda one: one.assign_coords(lead_time=("lead_time", [6, 12], {"units": "steps"})),
        r"lead_time of .* has the units 'steps', which say no time. Give it others, in xarray: .* = 'hours'`",
    ),
    "no lead": (lambda one: one.assign_coords(lead_time=one.lead_time * 0), r"from 0 to 0 h, and no forecast is"),
    "plain numbers": (
        lambda one: one.assign_coords(init_time=("init_time", np.arange(36) * 6)),
        r"init_time of .* has no units. Give it others, in xarray: .* = 'hours since 2000-01-01'`",
    ),
    "no date": (
        lambda one: one.assign_coords(init_time=("init_time", np.arange(36), {"units": "hours since then"})),
        r"init_time of .* has the units 'hours since then', which say no time",
    ),
    "a date twice": (
        lambda one: one.isel(init_time=[0, 1, 2, 1]),
        r"init_time of .* has 2001-01-02T06:00:00.* more than once.*drop_duplicates\('init_time'\)",
    ),
    "a lead twice": (lambda one: one.isel(lead_time=[0, 1, 1]), r"lead_time of .* has 43200.* more than once"),
    "members": (
        lambda one: one.expand_dims(number=[0, 1]),
        r"'u' of .* has the dim number of 2 beside init_time.*`ds.isel\(number=0\)` or `ds.mean\('number'\)`",
    ),
    "calendar": (lambda one: one.convert_calendar("noleap", "init_time"), r"of the calendar noleap, what came of"),
    "variables": (lambda one: one.drop_vars("t").rename(u="rain"), r"'rain'"),
}


@pytest.mark.parametrize(("change", "told"), NOT_FITTING.values(), ids=list(NOT_FITTING))
def test_files_that_do_not_fit_are_refused(files, tmp_path, change, told):
    change(forecast_of(0.1)).to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    with pytest.raises(InputError, match=told):
        evaluate([tmp_path / "other.nc"], ALONE, data=[files / "truth.nc"])


@pytest.mark.parametrize(("units", "hour"), [("h", 1), ("hour", 1), ("days", 1 / 24), ("day", 1 / 24), ("s", 3600)])
def test_leads_are_told_in_any_units_of_time(files, tmp_path, units, hour):
    told = forecast_of(0.1).assign_coords(lead_time=("lead_time", np.array(LEADS) * hour, {"units": units}))
    told.to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    found = evaluate([files / "good.nc", tmp_path / "other.nc"], ALONE, data=[files / "truth.nc"], samples=4)
    assert found.leads_h.tolist() == [6, 12]
    np.testing.assert_array_equal(found.metrics["rmse"][:, 0], found.metrics["rmse"][:, 1])


def test_dates_are_judged_in_their_order_however_a_file_has_them(files, tmp_path):
    mixed = np.random.default_rng(1).permutation(36)
    forecast_of(0.1).isel(init_time=mixed).to_netcdf(tmp_path / "good.nc", engine="h5netcdf")
    found, want = (evaluate([one / "good.nc"], ALONE, data=[files / "truth.nc"]) for one in (tmp_path, files))
    assert found.dates == want.dates and len(found.dates) == 36
    np.testing.assert_array_equal(found.intervals["rmse"], want.intervals["rmse"])


def test_one_member_is_a_forecast(files, tmp_path):
    forecast_of(0.1).expand_dims(number=[3]).to_netcdf(tmp_path / "member.nc", engine="h5netcdf")
    models, data = [files / "good.nc", tmp_path / "member.nc"], [files / "truth.nc"]
    found = evaluate(models, ALONE, data=data, samples=4)
    np.testing.assert_array_equal(found.metrics["rmse"][:, 0], found.metrics["rmse"][:, 1])


def test_variables_measured_in_days_are_no_times(tmp_path):
    with xr.open_dataset(write_truth(tmp_path / "truth.nc"), decode_times=False, engine="h5netcdf") as truth:
        truth.assign(u=truth.u.assign_attrs(units="days")).to_netcdf(tmp_path / "days.nc", engine="h5netcdf")
    said = forecast_of(0.1)
    said.assign(u=said.u.assign_attrs(units="days")).to_netcdf(tmp_path / "said.nc", engine="h5netcdf")
    found = evaluate([tmp_path / "said.nc"], ALONE, data=[tmp_path / "days.nc"], samples=8)
    assert [one.units for one in found.targets] == ["days", "K", "K"]
    np.testing.assert_allclose(found.metrics["rmse"][:, 0], 0.1, rtol=0.1)


def test_what_has_nothing_in_common_is_refused(files, elsewhere, tmp_path):
    forecast_of(0.1, range(40, 44)).to_netcdf(tmp_path / "later.nc", engine="h5netcdf")
    with pytest.raises(InputError, match=r"none of 36 dates from 2001-01-02 .* with 2 leads is in all of good, later"):
        evaluate([files / "good.nc", tmp_path / "later.nc"], ALONE, data=[files / "truth.nc"])
    with pytest.raises(InputError, match=r"good.nc is no run, and brings no data. Name a store or files with --data"):
        evaluate([files / "good.nc"], ALONE)
    with pytest.raises(
        InputError, match=r"has no frame at the dates of --climatology 1999; its times are 48 from 2001"
    ):
        evaluate([files / "good.nc"], ALONE, data=[files / "truth.nc"], climatology=["1999"])
    with pytest.raises(InputError, match=r"has no 2 frames within 2004-03-15/ that 3 frames precede"):
        late = xr.load_dataset(elsewhere / "source.nc", decode_times=False, engine="h5netcdf").isel(time=slice(9, 30))
        late.to_netcdf(tmp_path / "early.nc", engine="h5netcdf")
        evaluate([elsewhere / "model.safetensors"], ALONE, data=[tmp_path / "early.nc"], leads=2)


def changed(path, output, contract, **about):
    """A network that says other things of itself."""
    with safe_open(path, "pt") as file:
        before = file.metadata()
    own = Contract.model_validate_json(before["contract"])
    told = own.model_copy(update=contract(own)).model_dump_json()
    save_file(load_file(path), output, before | about | {"contract": told})
    return output


@pytest.mark.parametrize(
    ("training", "held_out", "told"),
    [
        (
            ("sequence a", "2003-01-01/2003-06-01 of sequence b"),
            None,
            "Whether other saw some of these dates in training",
        ),
        (("sequence a", "2004-01-01/2005-01-01"), False, "**other saw some of these dates in training**"),
        (("2003-01-01/2003-06-01",), True, "| yes |"),
    ],
    ids=["not known", "no", "yes"],
)
def test_of_sequences_that_data_do_not_name_it_is_not_known_whether_training_saw_them(
    elsewhere, tmp_path, training, held_out, told
):
    model = changed(elsewhere / "model.safetensors", tmp_path / "other.safetensors", lambda own: {"training": training})
    found = evaluate([model], ALONE, data=[elsewhere / "source.nc"], samples=2)
    report = report_of(found, {})
    assert found.held_out is held_out and told in report and ("| not known |" in report) == (held_out is None)
    assert as_json(found)["models"][0]["held_out"] is held_out


def test_networks_of_other_steps_are_not_judged_together(elsewhere, tmp_path):
    path = elsewhere / "model.safetensors"
    changed(path, tmp_path / "other.safetensors", lambda own: {"step_hours": (288.0, 288.0)})
    with pytest.raises(InputError, match=r"other forecasts 288 ... h ahead, and what is compared is 144 ... h ahead"):
        evaluate([path, tmp_path / "other.safetensors"], ALONE, data=[elsewhere / "source.nc"])


def test_networks_of_several_runs_forecast_from_the_data_of_the_first(elsewhere, tmp_path):
    path, store = elsewhere / "model.safetensors", forecasts.make_store(tmp_path)
    first = changed(path, tmp_path / "first.safetensors", lambda own: {}, store=str(store))
    second = changed(path, tmp_path / "second.safetensors", lambda own: {}, store=str(tmp_path / "gone"))
    found = evaluate([first, second], ALONE, samples=2)
    assert found.truth == f"the store {store}" and np.isfinite(found.metrics["rmse"][0, 0]).all()
    np.testing.assert_array_equal(found.metrics["rmse"][:, 0], found.metrics["rmse"][:, 1])


@pytest.mark.parametrize(
    ("contract", "told"),
    {
        "columns": (
            lambda own: {"longitude_deg": tuple(one - 180 for one in own.longitude_deg)},
            r"longitude_deg .*-180.*, what other is held against, .*source.nc, has ",
        ),
        "units": (
            lambda own: {
                "variables": tuple(
                    one.model_copy(update={"units": "mm"} if one.name == "rain" else {}) for one in own.variables
                )
            },
            r"trained on 'rain' in mm, what other is held against, .*source.nc, has it in m\.",
        ),
    }.values(),
    ids=["columns", "units"],
)
def test_networks_that_do_not_fit_the_data_of_all_are_refused(elsewhere, tmp_path, contract, told):
    other = changed(elsewhere / "model.safetensors", tmp_path / "other.safetensors", contract)
    with pytest.raises(InputError, match=told):
        evaluate([elsewhere / "model.safetensors", other], ALONE, data=[elsewhere / "source.nc"], samples=1)


def test_the_command_says_what_it_cannot_do(files, tmp_path):
    for given, told in (
        ([tmp_path / "nothing"], "nothing does not exist. Give a run_dir, a checkpoint, or a file"),
        ([files / "good.nc"], "is no run, and brings no data. Name a store or files with --data"),
        (
            [files / "good.nc", "--data", files / "truth.nc", "--output", tmp_path / "out", "--spin-up", 3],
            f"--spin-up 3 is for networks, and what is judged are files of forecasts: {files / 'good.nc'}. Leave it",
        ),
    ):
        ended = CliRunner().invoke(app, ["evaluate", *map(str, given)])
        assert isinstance(ended.exception, InputError) and told in str(ended.exception)
    places = {"runs/a": "runs/a/evaluation", "runs/a/checkpoints/best": "runs/a/evaluation", "b.nc": "b.nc.evaluation"}
    assert [str(place_of(Path(model))) for model in places] == list(places.values())


def test_names_are_short_and_each_once():
    models = ["runs/a.v2", "runs/b/checkpoints/best", "x.nc", "y/x.zarr", "persistence.nc", "m.safetensors"]
    want = ["a.v2", "b best", "x.nc", "y/x.zarr", "persistence.nc", "m"]
    assert names_of([Path(model) for model in models]) == want
    with pytest.raises(InputError, match=r"MODEL x\.nc is given twice"):
        names_of([Path("x.nc")] * 2)


GRIDS = {
    "with poles": LatLonGrid(37, 72, latitude_deg=np.linspace(90, -90, 37)),
    "between": LatLonGrid(24, 48),
    "Gaussian": LatLonGrid(21, 40, latitude_deg=np.rad2deg(np.arcsin(np.polynomial.legendre.leggauss(21)[0][::-1]))),
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
def test_a_field_of_a_known_spectrum_has_it(grid):
    random, spectra = np.random.default_rng(0), Spectra(grid)
    assert spectra.reason == ""
    colatitude, longitude = np.pi / 2 - grid.latitude[:, None], grid.longitude[None]
    field, total, count = (
        np.zeros((grid.nlat, grid.nlon)),
        np.zeros(spectra.total_wavenumbers.size),
        len(spectra.total_wavenumbers),
    )
    for wavenumber in (0, 1, 2, count // 2, count - 1):
        for order in {0, wavenumber // 2, wavenumber}:
            factor = complex(*random.normal(size=2)) if order else random.normal()
            twice = 2 if order else 1
            field += twice * np.real(factor * sph_harm_y(wavenumber, order, colatitude, longitude))
            total[wavenumber] += twice * abs(factor) ** 2 / (4 * np.pi)
    np.testing.assert_allclose(spectra.total(field), total, atol=1e-10)
    waves = 3 * np.cos(4 * longitude + 1) * np.cos(colatitude) + 0.5 * np.sin(grid.nlon // 2 * (longitude + 0.1)) + 7
    shares = grid.cell_area_sr / grid.cell_area_sr.sum()
    power = spectra.zonal(waves + 0 * colatitude)
    assert power[4] == pytest.approx(4.5 * shares @ np.sin(grid.latitude) ** 2, rel=1e-10)
    assert power[1:].sum() == pytest.approx(float(shares @ (waves + 0 * colatitude).var(axis=1)), rel=1e-10)


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        (
            LatLonGrid(5, 9, latitude_deg=np.linspace(60, 20, 5), longitude_deg=np.arange(9.0), lon_boundary="zero"),
            "around",
        ),
        (LatLonGrid(9, 12, latitude_deg=np.linspace(60, -60, 9)), "from 60 to -60 do not reach the poles"),
    ],
    ids=["region", "belt"],
)
def test_other_grids_have_no_spectra(grid, told):
    assert told in Spectra(grid).reason


def red(random, tries, dates, memory):
    """(N, S) series in which each value keeps so much of the one before it."""
    series, value = np.empty((dates, tries)), random.normal(size=tries)
    for place in range(dates):
        series[place] = value
        value = memory * value + np.sqrt(1 - memory**2) * random.normal(size=tries)
    return series


def overlapping(random, tries, dates, steps):
    """(N, S) errors of forecasts of so many steps, one begun at each of them: sums of what comes in each step."""
    sums = np.cumsum(random.normal(size=(dates + steps, tries)), axis=0)
    return sums[steps:] - sums[:-steps]


SERIES = {
    **{f"red {memory}": (lambda *given, memory=memory: red(*given, memory)) for memory in (0.0, 0.5, 0.8, 0.9)},
    **{f"overlapping {steps}": (lambda *given, steps=steps: overlapping(*given, steps)) for steps in (4, 10)},
}


@pytest.mark.parametrize("dates", [48, 100, 200])
@pytest.mark.parametrize("series", SERIES.values(), ids=list(SERIES))
def test_intervals_cover(series, dates):
    """The mean of a series, 0, lies within 90 % intervals in 87 to 93 of a hundred, however long errors last. The
    bounds leave two deviations of chance."""
    tries = 1500
    series_NS, weighings = series(np.random.default_rng(0), tries, dates), Weighings.of(dates)
    low, high = weighings.interval(weighings.weights_KN @ series_NS / dates, series_NS.mean(0))
    covered = ((low <= 0) & (high >= 0)).mean()
    assert 0.87 - 0.017 <= covered <= 0.93 + 0.013


def test_an_interval_is_that_of_the_mean_of_independent_dates():
    """By hand: t of B waves, and the variance of the mean as these have it; of many waves the usual one."""
    values, weighings = np.random.default_rng(3).normal(size=4000), Weighings.of(4000)
    low, high = weighings.interval(weighings.weights_KN @ values / 4000, values.mean())
    waves = round(0.4 * 4000 ** (2 / 3))
    phases = np.pi * np.arange(1, waves + 1)[:, None] * (np.arange(4000) + 0.5) / 4000
    by_hand = np.sqrt(np.mean((np.sqrt(2) * np.cos(phases) @ values / 4000) ** 2))
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.95, waves) * by_hand, rel=0.03)  # little memory by chance
    assert (high - low) / 2 == pytest.approx(1.645 * values.std() / np.sqrt(4000), rel=0.15)
    assert (high + low) / 2 == pytest.approx(values.mean())


def test_few_waves_that_are_small_by_chance_make_no_interval_a_point():
    """Dates that differ from one to the next alone: no slow wave has anything of it."""
    dates = 14
    values = np.cos(np.pi * 11 * (np.arange(dates) + 0.5) / dates)
    weighings = Weighings.of(dates)
    low, high = weighings.interval(weighings.weights_KN @ values / dates, values.mean())
    independent = stats.t.ppf(0.95, 2) * values.std() / np.sqrt(dates)
    assert 0.45 * independent < (high - low) / 2 < 0.6 * independent


def test_memory_is_told_of_series_of_all_kinds():
    """The most of what three lags tell: noise on a red series hides it from the first."""
    random, dates = np.random.default_rng(1), 4000
    noisy = red(random, 1, dates, 0.9) + random.normal(size=(dates, 1))
    series_NS = np.concatenate([red(random, 1, dates, 0.7), noisy, random.normal(size=(dates, 1))], axis=1)
    waves = (Weighings.of(dates).weights_KN - 1) / TILT
    told = memory_of((waves @ series_NS / dates) ** 2, np.pi * np.arange(1, dates) / dates, dates)
    assert told[0] == pytest.approx(0.7, abs=0.03) and 0.65 < told[1] < 0.9 and told[2] < 0.3


def test_chance_is_no_verdict():
    """Two forecasts of the same size of errors, and one of less that all dates agree on."""
    random = np.random.default_rng(5)
    squares = np.stack([random.chisquare(20, (40, 2)) / 20 * size for size in (1.0, 1.0, 0.5)], axis=1)[:, None]
    ones = np.ones_like(squares)
    per_date = PerDate(ones, ones, squares, ones, ones, ones, ones)
    weighings = Weighings.of(40)
    given = per_date.metrics()["rmse"][0], per_date.metrics(weighings.weights_KN)["rmse"], weighings
    assert compared("a", "b", 0, 1, *given).verdict == "cannot tell"
    better, worse = compared("c", "a", 2, 0, *given), compared("a", "c", 0, 2, *given)
    assert (better.verdict, worse.verdict) == ("better", "worse") and better.overall == pytest.approx(0.7, rel=0.1)
    assert better.bounds[0] == pytest.approx(1 / worse.bounds[1])


def test_several_sequences_are_no_truth_of_a_file(files, tmp_path):
    from faconv_hpc.prepare.preparation import prepare

    members = xr.load_dataset(files / "truth.nc", decode_times=False, engine="h5netcdf").expand_dims(member=["a", "b"])
    members.to_netcdf(tmp_path / "members.nc", engine="h5netcdf")
    prepare([tmp_path / "members.nc"], tmp_path / "store", sequence_dim="member")
    assert truth_of([tmp_path / "store"], None, ["u"]).axis.names == ("a", "b")
    with pytest.raises(InputError, match="holds 2 sequences, and files of forecasts do not say"):
        evaluate([files / "good.nc"], ALONE, data=[tmp_path / "store"])


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("there.txt", r"--output \S*there.txt is a file. Give a directory"),
        ("truth.nc", "is the data, which it would"),
        ("there.txt/below", r"--output \S*below cannot be written: Not a directory\. Give a directory where you may"),
        ("/proc/below", r"--output /proc/below cannot be written: No such file or directory"),
    ],
)
def test_an_output_that_is_no_directory_or_is_data_is_refused(files, tmp_path, output, told):
    (tmp_path / "there.txt").touch()
    place = (files if output == "truth.nc" else tmp_path) / output
    given = ["evaluate", files / "good.nc", "--data", files / "truth.nc", "--output", place]
    ended = CliRunner().invoke(app, [str(one) for one in given])
    assert isinstance(ended.exception, InputError) and re.search(told, str(ended.exception))
    assert [path.name for path in tmp_path.iterdir()] == ["there.txt"]


def test_two_do_not_write_one_evaluation(files, tmp_path):
    """Nor does one begin that cannot write it, where ranks were started by others and nothing was checked before."""

    def made(output):
        asked = _Asked([files / "good.nc"], [files / "truth.nc"], [], 1, 2, None, (), output, overwrite=True)
        asked.make(ALONE, None, lambda done, of: pytest.fail("something is computed"))

    with (
        locked_directory(tmp_path / "out" / OUTPUT_LOCK, "--output", InputError),
        pytest.raises(
            InputError, match=r"another evaluation writes to \S*out: process \d+ on .* or give another --out"
        ),
    ):
        made(tmp_path / "out")
    with pytest.raises(InputError, match=r"--output /proc/below cannot be written: No such file or directory"):
        made(Path("/proc/below"))


def test_an_earlier_evaluation_is_not_replaced_unasked(files, tmp_path, monkeypatch):
    """By other options or models; by the same it is made anew."""
    for name in ("draw_figures", "report_of"):
        monkeypatch.setattr(results, name, lambda *given: "" if len(given) == 2 else {})
    asked = ["evaluate", files / "good.nc", "--data", files / "truth.nc", "--output", tmp_path / "out"]

    def ended(*more):
        return CliRunner().invoke(app, [str(one) for one in (*asked, "--samples", 4, *more)])

    assert ended("--leads", 1).exit_code == 0
    before = (tmp_path / "out" / "scores.json").read_bytes()
    for more, told in (
        (
            ("--leads", 2),
            r"out has an evaluation with --leads 1, this command says 2\. Give another --output",
        ),
        ((), r"with --leads 1, this command says by default"),
        (("--leads", 1, "--spin-up", 3), r"with --spin-up by default, this command says 3\."),
        (("--leads", 1, "--climatology", "/2001-01-05"), r"with --climatology by default, this command says /2001-01"),
        (("--leads", 1, files / "worse.zarr"), r"with MODEL \S*good.nc, this command says \S*good.nc, \S*worse.zarr"),
    ):
        refused = ended(*more)
        assert isinstance(refused.exception, InputError) and re.search(told, str(refused.exception)), refused.exception
    assert (tmp_path / "out" / "scores.json").read_bytes() == before
    assert ended("--leads", 1).exit_code == 0 and (tmp_path / "out" / "scores.json").read_bytes() == before
    assert ended("--leads", 2, "--overwrite").exit_code == 0
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["asked"]["--leads"] == "2"
    (tmp_path / "out" / "scores.json").write_text("{")
    assert "with MODEL not said, this command" in str(ended("--leads", 2).exception)


def test_an_overwrite_that_is_stopped_leaves_what_was_there(files, tmp_path, monkeypatch):
    """The maps are the first that are made, the figures the last."""

    def stopped(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "draw_figures", stopped)
    before = {name: f"before {name}" for name in ("maps.nc", "scores.nc", "maps_2.png", "scores.json", "report.md")}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    asked = _Asked([files / "good.nc"], [files / "truth.nc"], [], 1, 2, None, (), tmp_path, overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        asked.make(ALONE, None, lambda done, of: None)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("at", [3, None], ids=["a cell of a date", "not at all"])
def test_a_forecast_that_lacks_a_variable_has_no_verdict_on_the_whole(files, tmp_path, at):
    """Its errors there may be any: these are large."""
    given = forecast_of(0.1)
    given["u"] = given.u + 5
    if at is None:
        given.u[:] = np.nan
    given.u[{"init_time": at or 0, "lead_time": 1, "latitude": 2, "longitude": 2}] = np.nan
    given.to_netcdf(tmp_path / "holed.nc", engine="h5netcdf")
    models, data = [tmp_path / "holed.nc", files / "good.nc"], [files / "truth.nc"]
    found = evaluate(models, ALONE, data=data, climatology=["/2001-01-05"])
    leads = "" if at is None else " at 1 of 2 leads"
    for one, sentence in zip(found.comparisons, headline(found), strict=True):
        if "holed" in (one.model, one.other):
            assert one.verdict == "cannot tell" and one.as_json()["verdict"] == "cannot tell"
            assert f"**cannot be told on the whole**. Left out: u{leads} (holed has no errors there, as" in sentence
        else:
            assert sentence.startswith("**good is better than ") != one.seen and "Left out" not in sentence
    left = as_json(found)["comparisons"][0]["left_out"]
    assert {"variable": "u", "lead": 2, "why": "model lacks"} in left and len(left) == (2 if at is None else 1)


def test_a_comparison_names_what_does_not_count():
    """Leads: both have errors; one lacks; the other lacks; an error of 0; known on too few dates."""
    rmse_LFC = np.array([[1.0, 2.0], [np.nan, 2.0], [1.0, np.nan], [1.0, 0.0], [1.0, 2.0], [np.nan, np.nan]])[..., None]
    weighings = Weighings.of(40)
    weighed_KLFC = np.repeat(rmse_LFC[None], len(weighings.weights_KN), axis=0)
    weighed_KLFC[:, 4] = np.nan
    for leads, why, verdict, of_baseline in (
        ([0], [], "better", "better"),
        ([0, 1], ["model lacks"], "cannot tell", "cannot tell"),
        ([0, 2], ["other lacks"], "cannot tell", "better"),
        ([0, 3], ["no error"], "cannot tell", "cannot tell"),
        ([0, 4], ["too few"], "better", "better"),
        ([0, 5], [], "better", "better"),
    ):
        given = rmse_LFC[leads], weighed_KLFC[:, leads], weighings
        one, other = compared("a", "b", 0, 1, *given), compared("a", "b", 0, 1, *given, baseline=True)
        assert (one.verdict, other.verdict, one.overall) == (verdict, of_baseline, 0.5), why
        assert {reason: left_LC[:, 0].tolist() for reason, left_LC in one.left_out.items()} == {
            reason: [False, True] for reason in why
        }


def test_a_comparison_can_be_turned():
    """Into what the other with the one gives."""
    random = np.random.default_rng(5)
    square_NLFC = random.exponential(size=(40, 3, 2, 2)) * np.array([1.0, 1.4])[:, None]
    weighings = Weighings.of(40)
    rmse_LFC = np.sqrt(square_NLFC.mean(0))
    weighed_KLFC = np.sqrt(np.tensordot(weighings.weights_KN, square_NLFC, 1) / 40)
    rmse_LFC[0, 0, 0], rmse_LFC[1, 1, 1] = np.nan, 0.0
    one, other = (compared(*pair, rmse_LFC, weighed_KLFC, weighings) for pair in (("a", "b", 0, 1), ("b", "a", 1, 0)))
    turned = one.turned
    assert (turned.model, turned.other, turned.verdict) == ("b", "a", other.verdict)
    assert turned.left_out.keys() == other.left_out.keys() == {"other lacks", "no error"}
    for name in ("ratio_LC", "bounds_2LC", "overall", "bounds"):
        np.testing.assert_allclose(getattr(turned, name), getattr(other, name), rtol=1e-5)


def test_the_report_says_at_which_leads_who_is_better(judged, monkeypatch):
    report = report_of(judged, {})
    assert "| u [m s\\*\\*-1] | 6 h |" in report, "stars are no emphasis"
    worse, good = (report.split(f"\n**{name}**\n")[1].split("\n**")[0].split("\n#")[0] for name in ("worse", "good"))
    assert worse.count("| **worse** at all leads |") == 3 and good.count(" | **better** at all leads | ") >= 3
    assert "| variable | than worse | than persistence | than climatology | than damped persistence |" in good
    (first, *_), rows = (
        judged.compared_with_others("good"),
        [line for line in good.split("\n") if line.startswith("| u ")],
    )
    assert (first.model, first.other) == ("good", "worse") and first.seen is False
    assert rows[0].split(" | ")[3:] == ["-", "- |"], "climatology is made of some of the very dates"
    (ratio, other), (low, high) = judged.metrics["rmse"][0, 1::-1, 2], first.bounds_2LC[:, 0, 2]
    assert f"| u | 6 h | **{ratio / other:.3g} ({low:.3g} to {high:.3g})** |" in good
    (line,) = (line for line in good.split("\n") if line.startswith("| u | 6 h |"))
    assert [cell.startswith("**") for cell in line.split(" | ")[2:]] == [True, True, False, False]
    high = first.bounds_2LC.copy()
    high[0, 1, 2], high[1, 1, 2], high[:, 0, 1] = 1.1, 1.2, np.nan
    found = replace(first, bounds_2LC=high)
    told = [report_module._won(found, number, judged) for number in range(3)]
    assert told == ["**better** at all leads", "**better** at 12 h", "**better** at 6 h; **worse** at 12 h"]


def test_what_is_known_on_few_dates_has_no_interval(judged):
    """The others would be taken for dates that tell nothing else."""
    weight = judged.per_date.weight.copy()
    weight[11:, 0, :, 0] = 0.0
    found = replace(
        judged, per_date=replace(judged.per_date, weight=weight, square=judged.per_date.square * (weight > 0))
    )
    assert np.isfinite(found.metrics["rmse"][:, :2]).all() and np.isnan(found.intervals["rmse"][:, 0, :2, 0]).all()
    assert np.isfinite(found.intervals["rmse"][:, 0, :2, 1:]).all()
    assert found.comparisons[0].left_out["too few"].tolist() == [[True, False, False], [False] * 3]
    weight[:12, 0, :, 0] = 1.0
    found = replace(judged, per_date=replace(judged.per_date, weight=weight))
    assert np.isfinite(found.intervals["rmse"][:, 0, :2]).all()


def test_a_baseline_that_was_judged_on_other_cells_has_no_ratio(files, tmp_path):
    """In two rows climatology is not known, as they are missing on all its dates; the forecast errs most there."""
    with xr.open_dataset(files / "truth.nc", engine="h5netcdf", decode_times=False) as stored:
        truth = stored.load()
    truth.u[:20, 2:4] = np.nan
    truth.to_netcdf(tmp_path / "truth.nc", engine="h5netcdf")
    forecast = forecast_of(0.1, range(20, 40))
    forecast.u[:, :, 2:4] += 1
    forecast.to_netcdf(tmp_path / "errs.nc", engine="h5netcdf")
    found = evaluate([tmp_path / "errs.nc"], ALONE, data=[tmp_path / "truth.nc"], climatology=["/2001-01-05"])
    persistence, climatology, damped = found.comparisons
    u = [one.name for one in found.targets].index("u")
    assert np.isfinite(persistence.ratio_LC).all() and not persistence.left_out
    for one in (climatology, damped):
        assert np.isnan(one.ratio_LC[:, u]).all() and np.isnan(one.bounds_2LC[:, :, u]).all()
        assert {why: left.nonzero()[1].tolist() for why, left in one.left_out.items()} == {"other cells": [u, u]}
        t = np.delete(found.metrics["rmse"], u, axis=2)
        place = found.names.index(one.other)
        assert one.overall == pytest.approx(np.exp(np.log(t[:, 0] / t[:, place]).mean()))
    area = LatLonGrid(6, 8, latitude_deg=LATITUDE).cell_area_sr
    share = f"{100 * (1 - area[2:4].sum() / area.sum()):.3g} %"
    report = report_of(found, {})
    assert f"climatology of u, {share}; damped persistence of u, {share}." in report
    assert "Left out: u (climatology is known on a part of the cells)" in headline(found)[1]
    rows = [line.split("|")[3:8] for line in report.split("## Scores")[1].splitlines() if line.startswith("| u ")]
    assert all("**" in "".join(row[:2]) and "**" not in "".join(row[2:]) for row in rows[:2])  # not the least elsewhere


def test_the_report_says_what_climatology_is_made_of_and_whether_it_is_judged_on_it(files, judged, elsewhere):
    leaks = evaluate([files / "good.nc"], ALONE, data=[files / "truth.nc"], climatology=["2001-01-08/2001-01-09"])
    none = evaluate([files / "good.nc"], ALONE, data=[files / "truth.nc"])
    trained = evaluate([elsewhere / "model.safetensors"], ALONE, data=[elsewhere / "source.nc"])
    # frames 28 to 35 are the last of two dates; starts are 4 to 39, leads one and two later
    assert leaks.made_of == ("named", ("2001-01-08 00:00:00/2001-01-09 18:00:00",), 9)
    # frames 0 to 19, starts 4 to 29
    assert (judged.made_of.kind, judged.made_of.judged) == ("named", 15) and none.made_of == ("none", (), 0)
    assert trained.made_of.kind == "training" and trained.made_of.judged == 0
    for found, what, warned in (
        (
            leaks,
            "over the dates that `--climatology` names (2001-01-08",
            "9 of 36 forecasts have leads among the dates",
        ),
        (none, "the annual cycle that a network brings", None),
        (trained, "over the training period (", None),
    ):
        report = report_of(found, {})
        assert f"- **climatology**: {'' if found is none else 'the mean of each cell '}{what}" in report
        assert (warned in report) if warned else "has seen" not in report
        assert ("training period" in report) == (found is trained)
        assert as_json(found)["climatology"] == found.made_of._asdict() | {"dates": list(found.made_of.dates)}
        others = {one.other: one for one in found.comparisons}
        seen = {name: bool(warned) and name != "persistence" for name in others}
        assert {name: one.seen for name, one in others.items()} == seen
        for sentence, one in zip(headline(found), found.comparisons, strict=True):
            assert (f": {one.other} is made of some of the very dates" in sentence) == one.seen, sentence
            assert not one.seen or (one.verdict == "cannot tell" and "**cannot be told**" in sentence), sentence
        assert as_json(found)["comparisons"][1]["other_has_seen"] == seen["climatology"]
        stored = dataset_of(found).attrs
        assert stored["climatology"] == found.made_of.kind
        assert stored["climatology_dates"] == ", ".join(found.made_of.dates)


@pytest.mark.parametrize(
    ("errors", "high"),
    [((1, 3), 3), ((1, 3, 0, np.nan), 3), ((0.5, 1e6), 2.5), ((1, 2, 3, 4, 9), 4), ((0, np.nan), 1)],
    ids=["the larger", "no errors, no numbers", "one runs away", "not drawn", "nothing"],
)
def test_maps_of_several_models_have_one_scale(monkeypatch, tmp_path, errors, high):
    drawn = []
    monkeypatch.setattr(
        figures, "draw_map", lambda axes, a, b, field, colours, title, coasts: drawn.append(colours) or axes
    )
    monkeypatch.setattr(figures, "colour_bar", lambda *_: None)
    sizes = np.array(errors)[:, None, None, None] * np.ones((2, 6, 8))
    coordinates = {"model": list(map(str, errors)), "lead_time": np.array([6, 12]).astype("timedelta64[h]")}
    fields = {f"u_{name}": (("model", "lead_time", *DIMS), sizes, {"units": "K"}) for name in ("rmse", "bias")}
    maps = xr.Dataset(fields, coordinates | {"latitude": LATITUDE, "longitude": LONGITUDE})
    for model in coordinates["model"][:2]:
        figures.draw_maps(maps, model, tmp_path / "maps.png")
    assert [(one.low, one.high) for one in drawn] == [(0, high), (0, high), (-high, high)] * 2
    drawn.clear()
    figures.draw_maps(maps.isel(lead_time=[1]), coordinates["model"][0], tmp_path / "maps.png")
    assert [one.low for one in drawn] == [0, -high], "one lead has one map of RMSE, and one of bias"


def test_markers_of_errors_lie_within_their_panel(judged, monkeypatch, tmp_path):
    """Of models that are about as good as each other, too; and a single lead is told as it is."""
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: figure)
    monkeypatch.setitem(judged.intervals, "rmse", np.full_like(judged.intervals["rmse"], np.nan))
    monkeypatch.setitem(judged.metrics, "rmse", 5 + 0.001 * judged.metrics["rmse"])
    panel = figures.draw_scores(judged, tmp_path / "rmse.png", "rmse").axes[0]
    assert panel.get_ylim() == pytest.approx((0, 5.25), rel=1e-3)
    one = replace(judged, leads_h=judged.leads_h[:1])
    for name in ("metrics", "intervals"):
        lead = {key: values[..., :1, :, :] for key, values in getattr(judged, name).items()}
        monkeypatch.setitem(one.__dict__, name, lead)
    panel = figures.draw_scores(one, tmp_path / "rmse.png", "rmse").axes[0]
    assert panel.get_xticks().tolist() == one.leads.axis[0].tolist()


def test_ratios_of_spectra_are_seen_however_large(judged, monkeypatch, tmp_path):
    """By powers of two, from half to twice at least, and what leaves the panel is said."""
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: figure)
    kept = judged.spectra
    for share, want in ((1.2, (1 / 2, 2)), (5.0, (1 / 2, 5)), (1000.0, (1 / 2, 64)), (0.001, (1 / 64, 2))):
        total_ESCL = kept.total_ESCL.copy()
        total_ESCL[1:] = share * total_ESCL[:1]
        found = replace(judged, spectra=replace(kept, total_ESCL=total_ESCL))
        panels = figures.draw_spectra(found, tmp_path / "spectra.png").axes
        for place in panels[2::3]:
            assert place.get_yscale() == "log" and place.get_ylim() == pytest.approx(want, rel=0.1)
            assert place.lines[1].get_ydata() == pytest.approx(share)
    report = report_of(judged, {"Spectra": tmp_path / "spectra.png"})
    assert "A line that leaves a panel there is above 64, or below 1/64." in report


def test_the_report_says_how_dates_were_chosen(files, judged, elsewhere):
    """Among how many, of which period, and of which sequences."""
    assert judged.chosen == (26, (), (), True)
    assert "\n\nAll 26 possible start dates were taken: dates that all files have, and of" in report_of(judged, {})
    few = evaluate([files / "good.nc"], ALONE, data=[files / "truth.nc"], samples=6)
    assert "\n\n6 of 36 possible start dates were taken, spread evenly over them: dates" in report_of(few, {})
    network = evaluate([elsewhere / "model.safetensors"], ALONE, data=[elsewhere / "source.nc"], samples=3)
    (period,) = Contract.model_validate_json(contract_of(elsewhere)).test
    report = report_of(network, {})
    assert (
        f"3 of {network.chosen.among} possible start dates were taken, spread evenly over them: dates with all"
        in report
    )
    assert f" in the test period ({period}) and the frames before them" in report and network.chosen.among > 3
    several = replace(judged, chosen=judged.chosen._replace(sequences=("b", "c", "e")))
    assert "All 26 possible start dates were taken, in 3 sequences (b to e): dates that" in report_of(several, {})
    one = replace(judged, chosen=judged.chosen._replace(sequences=("b",), of_files=False))
    assert ", in 1 sequence (b): dates with all leads in the data and" in report_of(one, {})


def contract_of(directory):
    with safe_open(directory / "model.safetensors", "pt") as file:
        return file.metadata()["contract"]


def test_the_report_says_how_sure_the_width_of_an_interval_is():
    """Of the square root of a mean of so many squares of normal numbers; by drawing them."""
    random = np.random.default_rng(2)
    for dates, waves in ((12, 2), (24, 3), (200, 14)):
        assert most_waves(dates) == waves
        width = np.sqrt((random.normal(size=(200_000, waves)) ** 2).mean(1))
        told = report_module._width(SimpleNamespace(forecasts=dates, weighings=Weighings.of(dates)))
        assert f"of {dates} dates they are {waves} waves at most" in told
        found = [float(one) for one in re.search(r"is ([\d.]+) to ([\d.]+) times", told).groups()]
        assert found == pytest.approx(np.quantile(width, [0.05, 0.95]), rel=0.03)
    assert report_module._width(SimpleNamespace(forecasts=6, weighings=Weighings.of(6))) == ""


def test_maps_of_synthetic_data_have_no_coasts(tmp_path, monkeypatch):
    """Neither those of its errors nor that of one forecast; a store tells it, whoever made the forecast."""
    synthesise(tmp_path / "waves", SyntheticOptions(nlat=6, nlon=8, channels=1, frames=20))
    with Store.open(tmp_path / "waves") as store:
        fields, _ = store.read(range(20), Tile((0, 6), (0, 8)), [0])
        sides = {"latitude": store.latitude_deg, "longitude": store.longitude_deg}
    start = np.datetime64("2000-01-01", "ns") + np.arange(4, 19) * np.timedelta64(6, "h")
    coordinates = {"init_time": start, "lead_time": np.array([6]).astype("timedelta64[h]").astype("timedelta64[ns]")}
    said = xr.Dataset({"wave_0": (CELLS, fields[5:20] + 0.1, {"units": "1"})}, coordinates | sides)
    said.to_netcdf(tmp_path / "said.nc", engine="h5netcdf")
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: figure)
    found = evaluate([tmp_path / "said.nc"], ALONE, data=[tmp_path / "waves"], maps=tmp_path / "maps.nc")
    with xr.open_dataset(tmp_path / "maps.nc", engine="h5netcdf", decode_timedelta=True) as opened:
        maps = opened.load()
    assert found.on_earth is False and np.isfinite(maps.wave_0_rmse).all()
    for one, coasts in ((found, False), (replace(found, on_earth=True), True)):
        drawn = figures.draw_figures(one, maps, tmp_path)
        for name in ("Errors of said on the map", "One forecast"):
            lines = [line for place in drawn[name].axes for line in place.collections if type(line) is LineCollection]
            assert bool([line for line in lines if line.get_linewidths() == [0.5]]) == coasts
            assert ("GSHHG" in drawn[name].get_supxlabel()) == coasts
