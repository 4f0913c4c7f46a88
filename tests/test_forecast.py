"""``faconv forecast``: the same on any ranks, and what evaluate finds; killed and continued; refused with a reason."""

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import forecasts
import forks
from faconv_hpc import Forecaster
from faconv_hpc.errors import InputError
from faconv_hpc.evaluation.skill import evaluate
from faconv_hpc.forecasting.campaign import plan_campaign, run_campaign
from faconv_hpc.spatial.mesh import ProcessMesh
from faconv_hpc.training.export import export
from faconv_hpc.training.shards import checkpoints_in
from ranks import Layout, run_on_ranks
from test_cli import command_after, faconv, messages
from test_roles import weights_of

STEPS, STARTS = 4, ["2003-03-02", "2003-06-06/2003-07-06/12d"]
NAMES = ("heat", "t", "ice", "vapour", "rain")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return forecasts.make(tmp_path_factory.mktemp("forecast"))


@pytest.fixture(scope="module")
def exported(config, tmp_path_factory):
    """The network alone, where nothing else is."""
    path = tmp_path_factory.mktemp("elsewhere") / "model.safetensors"
    export(checkpoints_in(config.run_dir)[-1], path)
    return path


def written(mesh, model, output, data, start=STARTS, steps=STEPS, **options):
    """The summary of a forecast on the ranks of a mesh."""
    forecaster = Forecaster.load(model, mesh=mesh)
    campaign = plan_campaign(forecaster.contract, forecaster.window, data, start, steps)
    return run_campaign(forecaster, campaign, output, mesh, **options)


def opened(path):
    return xr.open_zarr(path).load() if path.suffix == ".zarr" else xr.load_dataset(path, engine="h5netcdf")


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """Forecasts on one rank."""
    output = tmp_path_factory.mktemp("alone") / "forecast.nc"
    summary = written(ProcessMesh.alone(), config.run_dir, output, [config.data.store])
    assert (summary.dates, summary.steps, summary.kept_dates) == (4, STEPS, 0)
    assert not output.with_name("forecast.nc.partial").exists()
    return opened(output)


def test_it_is_what_others_read(alone):
    assert tuple(alone.data_vars) == NAMES  # forcings are not forecast
    assert alone.t.dims == ("init_time", "lead_time", "level", "latitude", "longitude")
    assert alone.heat.dims == ("init_time", "lead_time", "latitude", "longitude")
    starts = np.array(["2003-03-02", "2003-06-06", "2003-06-18", "2003-06-30"], dtype="datetime64[ns]")
    np.testing.assert_array_equal(alone.init_time, starts)
    np.testing.assert_array_equal(alone.lead_time, np.arange(1, STEPS + 1) * np.timedelta64(6 * 24, "h"))
    assert alone.level.values.tolist() == [500, 850] and alone.t.attrs["standard_name"] == "air_temperature"
    assert alone.vapour.attrs["units"] == "kg kg**-1" and alone.attrs["Conventions"] == "CF-1.8"
    assert "step 12 of run" in alone.attrs["title"] and len(alone.attrs["network_sha256"]) == 64
    missing = np.isnan(alone.ice.values)
    assert missing[:, :, 3:6, 2:7].all() and missing.sum() == 4 * STEPS * 15
    assert all(np.isfinite(alone[name].values).all() for name in NAMES if name != "ice")


def test_it_says_more_than_persistence(alone):
    """Else tests that compare forecasts would prove nothing."""
    truth = forecasts.decoded()
    for name in ("heat", "t", "ice", "vapour"):
        change = alone[name] - truth[name].sel(time=alone.init_time)
        assert np.abs(change).mean() > 0.02 * truth[name].std(), name


@pytest.mark.parametrize("layout", [Layout(1, 1, 2), Layout(1, 2, 2), Layout(2, 1, 2), Layout(3, 1, 1)], ids=str)
def test_it_is_the_same_on_any_ranks(config, alone, tmp_path, layout):
    output = tmp_path / ("forecast.zarr" if layout.ranks == 4 else "forecast.nc")
    run_on_ranks(layout, written, config.run_dir, output, [config.data.store])
    tiled = opened(output)
    for name in NAMES:
        scale = float(np.abs(alone[name]).max())
        np.testing.assert_allclose(tiled[name].values, alone[name].values, rtol=0, atol=1e-5 * scale)
    xr.testing.assert_equal(tiled.drop_vars(NAMES), alone.drop_vars(NAMES))


def test_its_errors_are_those_of_evaluate(config, tmp_path):
    skills = {(one.variable, one.lead): one.rmse for one in evaluate(config, ProcessMesh.alone(), 3).skills}
    truth = forecasts.decoded()
    starts = [str(date)[:10] for date in truth.time.values[truth.time.values >= np.datetime64("2004-03-09")][:-3]]
    written(ProcessMesh.alone(), config.run_dir, tmp_path / "f.nc", [config.data.store], [",".join(starts)], 3)
    forecast = opened(tmp_path / "f.nc")
    for name, rel in (("vapour", 1e-6), ("rain", 1e-6), ("heat", 1e-5)):  # errors of heat are few of its float32 digits
        for lead in range(3):
            one = forecast[name].isel(lead_time=lead).astype(np.float64)
            came = truth[name].sel(time=one.init_time + one.lead_time).astype(np.float64)
            squares = (one.values - came.values) ** 2
            rmse = np.sqrt(np.average(squares.mean(0), weights=weights_of()))
            assert rmse == pytest.approx(skills[name, lead + 1], rel=rel), (name, lead)


def test_a_forecast_may_go_on_where_data_end_if_nothing_is_given(tmp_path, config):
    """The last frame can be forecast from: only the network's forcing variables must be there later."""
    with pytest.raises(
        InputError, match=r"has no sst at 2004-04-25 00:00:00.*Dates that can be: 2003-01-13 .* to 2004-04-07"
    ):
        written(ProcessMesh.alone(), config.run_dir, tmp_path / "f.nc", [config.data.store], ["2004-04-13"], 3)
    summary = written(ProcessMesh.alone(), config.run_dir, tmp_path / "f.nc", [config.data.store], ["last"], 1)
    assert summary.first == summary.last == "2004-04-19 00:00:00"
    assert opened(tmp_path / "f.nc").lead_time.size == 1


def kill_at(field):
    """Code: the process is killed as it writes a field, counted over all dates, leads and channels."""
    return f"""
import os, signal
from faconv_hpc.forecasting import netcdf, zarr_store
count = 0
def killing(write):
    def killed(*given):
        global count
        count += 1
        if count == {field}:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*given)
    return killed
netcdf.Part.write, zarr_store.Chunks.write = map(killing, (netcdf.Part.write, zarr_store.Chunks.write))
"""


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_killed_and_started_again_it_ends_with_the_same(config, alone, tmp_path, suffix):
    output = tmp_path / f"forecast{suffix}"
    command = ["forecast", config.run_dir, "--steps", STEPS, "--output", output, "--kernels", "eager"]
    command += [part for text in STARTS for part in ("--start", text)]
    each = STEPS * 6
    for field, done in ((each + 7, 1), (2 * each + each // 2, 3)):  # in the second date; two dates on, in the fourth
        killed = forks.run(command_after(kill_at(field), *command), timeout=300, cwd=Path(__file__).parent)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not output.exists()
        partial = tmp_path / f"forecast{suffix}.partial"
        assert len(list(partial.glob("init-*"))) == done
    ended = json.loads(faconv(*command, "--json").stdout)
    assert (ended["kept_dates"], ended["dates"]) == (3, 4) and not partial.exists()
    for name in NAMES:
        assert opened(output)[name].values.tobytes() == alone[name].values.tobytes(), name
    before = opened(output)
    assert json.loads(faconv(*command, "--json").stdout)["kept_dates"] == 4
    for changed, told in (
        (["--steps", 3], "was made with --steps 4, this command says 3"),
        (["--start", "2003-03-08"], "was made with --start 4 dates from 2003-03-02 .*says 5 dates"),
    ):
        refused = faconv(*command, *changed)
        assert refused.returncode == 2
        assert len(messages(refused)) == 1 and re.search(told, refused.stderr), refused.stderr
    xr.testing.assert_identical(opened(output), before)
