"""``faconv forecast``: the same on any ranks, and what evaluate finds; killed and continued; refused with a reason."""

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import forecasts
from faconv_hpc.cli.forecast import _report
from faconv_hpc.errors import InputError
from faconv_hpc.forecasting import zarr_store
from faconv_hpc.locks import locked_directory
from faconv_hpc.spatial.mesh import ProcessMesh
from faconv_hpc.training.export import export
from faconv_hpc.training.shards import checkpoints_in
from forecasts import NAMES, STARTS, STEPS, opened, written
from ranks import Layout, run_on_ranks
from runs import evaluated
from test_cli import faconv, faconv_after, messages
from test_roles import weights_of


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return forecasts.make_run(tmp_path_factory.mktemp("forecast"))


@pytest.fixture(scope="module")
def exported(config, tmp_path_factory):
    """The network alone, where nothing else is."""
    path = tmp_path_factory.mktemp("elsewhere") / "model.safetensors"
    export(checkpoints_in(config.run_dir)[-1], path)
    return path


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """Forecasts on one rank."""
    output = tmp_path_factory.mktemp("alone") / "forecast.nc"
    summary = written(ProcessMesh.alone(), config.run_dir, output, [config.data.store])
    assert (summary.dates, summary.steps, summary.kept_dates) == (4, STEPS, 0)
    assert summary.known_until == "2003-07-24 00:00:00"
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
    assert missing[:, :, 3:6, 2:7].all() and missing[0, :, 7, 4].all()  # it is known one frame late
    assert missing.sum() == 4 * STEPS * 15 + STEPS
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
    skills = {(one.variable, one.lead): one.rmse for one in evaluated(config, ProcessMesh.alone(), 3).skills}
    truth = forecasts.decoded()
    starts = [str(date)[:10] for date in truth.time.values[truth.time.values >= np.datetime64("2004-03-09")][:-3]]
    written(ProcessMesh.alone(), config.run_dir, tmp_path / "f.nc", [config.data.store], [",".join(starts)], 3)
    forecast = opened(tmp_path / "f.nc")
    for name in ("vapour", "rain", "heat"):
        for lead in range(3):
            one = forecast[name].isel(lead_time=lead).astype(np.float64)
            came = truth[name].sel(time=one.init_time + one.lead_time).astype(np.float64)
            squares = (one.values - came.values) ** 2
            rmse = np.sqrt(np.average(squares.mean(0), weights=weights_of()))
            step = np.spacing(np.abs(one.values).max().astype(np.float32))  # of heat's errors, a part that can be seen
            rounding = step / np.sqrt(12 * squares.size)
            assert rmse == pytest.approx(skills[name, lead + 1], rel=1e-6, abs=5 * rounding), (name, lead)


def test_a_forecast_may_go_on_where_data_end_if_nothing_is_given(tmp_path, config):
    """The last frame can be forecast from: only the network's forcing variables must be there later."""
    told = (
        r"has no sst at 2004-04-25 00:00:00.*Dates that can be: 2003-01-13 .* to 2004-04-07.*The nearest is 2004-04-07"
    )
    with pytest.raises(InputError, match=told):
        written(ProcessMesh.alone(), config.run_dir, tmp_path / "f.nc", [config.data.store], ["2004-04-13"], 3)
    summary = written(ProcessMesh.alone(), config.run_dir, tmp_path / "f.nc", [config.data.store], ["last"], 1)
    assert summary.first == summary.last == "2004-04-19 00:00:00"
    assert opened(tmp_path / "f.nc").lead_time.size == 1 and summary.known_until == ""


def test_it_is_said_up_to_when_the_data_have_what_came(tmp_path, config, capsys):
    """Of a network that is given something later times must be there, so the last date may be long before the end."""
    for start, steps, told in (
        ("2004-04-07", 3, r"s\. The data have what came until 2004-04-19 00:00:00: `faconv evaluate` says how good"),
        ("last", 1, r"; \d+\.\d s\n$"),
    ):
        output = tmp_path / f"{start}.nc"
        _report(written(ProcessMesh.alone(), config.run_dir, output, [config.data.store], [start], steps))
        assert re.search(told, capsys.readouterr().out)


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
        killed = faconv_after(kill_at(field), *command)
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


def test_a_date_counts_as_done_when_its_chunks_are_on_disk(config, tmp_path, monkeypatch):
    flushed, whole = set(), {}
    flush, mark = os.fsync, zarr_store.write_durably

    def seen(descriptor):
        flushed.add(Path(f"/proc/self/fd/{descriptor}").resolve())
        flush(descriptor)

    def marked(path, content):
        chunks = [path.parent / zarr_store.CONTENT / name / "c" / "0" for name in NAMES]
        whole[path.name] = all({one, *one.rglob("*")} <= flushed for one in chunks)
        mark(path, content)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(zarr_store, "write_durably", marked)
    written(ProcessMesh.alone(), config.run_dir, tmp_path / "f.zarr", [config.data.store], ["2003-03-02"], 1)
    assert whole == {"made.done": False, "init-000000.done": True}


def test_another_model_at_the_same_output_is_refused(config, exported, tmp_path):
    output, data = tmp_path / "f.nc", [config.data.store]
    written(ProcessMesh.alone(), exported, output, data, ["2003-03-02"], 1)
    written(ProcessMesh.alone(), config.run_dir, output, data, ["2003-03-02"], 1)  # the same, by its run
    tensors = load_file(exported)
    with safe_open(exported, "pt") as file:
        about = file.metadata()
    save_file(tensors | {"forecast.bias": tensors["forecast.bias"] + 1}, tmp_path / "other.safetensors", about)
    told = r"f.nc was made with MODEL step 12 of run \(digest \w+\), this command says step 12 of run \(digest"
    with pytest.raises(InputError, match=told):
        written(ProcessMesh.alone(), tmp_path / "other.safetensors", output, data, ["2003-03-02"], 1)
    before = opened(output)
    written(ProcessMesh.alone(), tmp_path / "other.safetensors", output, data, ["2003-03-02"], 1, overwrite=True)
    assert (np.abs(opened(output).heat - before.heat) > 0.1).all()


def test_bad_input_is_told_before_ranks_start(config, exported, tmp_path):
    """One message, by the command that would have started them."""
    (tmp_path / "plain.nc").write_text("mine")
    start, steps = ("--start", "2003-03-02"), ("--steps", 1)
    older = tmp_path / "older.safetensors"
    with safe_open(exported, "pt") as file:
        save_file(load_file(exported), older, {key: text for key, text in file.metadata().items() if key != "window"})
    store, good = ("--data", config.data.store), ("--output", tmp_path / "f.nc")
    for given, told in (
        ((exported, *start, *steps, *good), "is no run, and brings no data. Name a store or files with --data"),
        ((older, *store, *start, *steps, *good), "did not say how many inputs spin its state up. Export it again"),
        ((config.run_dir, *start, *steps, "--output", tmp_path / "f.grib"), "the output is NAME.nc or NAME.zarr, got"),
        (
            (config.run_dir, *start, *steps, "--output", tmp_path / "plain.nc"),
            "is there, and no output of `faconv",
        ),
        (
            (config.run_dir, *start, *steps, "--output", tmp_path / "plain.nc" / "below.nc"),
            "--output .*plain.nc cannot be written: Not a directory. Give a directory where you may write",
        ),
        (
            (config.run_dir, *start, *steps, *good, "--mesh", "1x3"),
            "needs 3 ranks, --ranks is 2. Use .* or say",
        ),
        ((config.run_dir, *start, *steps, *good, "--sequence", "r1"), "no sequence 'r1' in the store"),
        ((config.run_dir, "--data", tmp_path / "no_*.nc", *start, *steps, *good), "no_\\*.nc matches no file"),
        ((config.run_dir, "--data", tmp_path / "plain.nc", *start, *steps, *good), "starts with b'mine', which is no"),
        (
            (config.run_dir, "--start", "2003-01-07", *steps, *good),
            "frames at 2002-12-26 00:00:00. Dates that can",
        ),
        ((tmp_path / "nowhere", *start, *steps, *good), "holds no checkpoints"),
    ):
        refused = faconv("forecast", *given, "--ranks", 2)
        assert refused.returncode == 2 and len(messages(refused)) == 1, refused.stderr
        assert re.search(told, refused.stderr) and "(rank" not in refused.stderr, refused.stderr
    assert not (tmp_path / "f.nc").exists() and not list(tmp_path.glob("*.partial"))


def test_two_do_not_write_one_output(config, tmp_path):
    output = tmp_path / "f.zarr"

    def refusal(holder):
        return InputError(holder)

    with (
        locked_directory(tmp_path / "f.zarr.partial" / ".lock", "--output", refusal),
        pytest.raises(InputError, match=r"another forecast writes to .*f.zarr: process \d+ on"),
    ):
        written(ProcessMesh.alone(), config.run_dir, output, [config.data.store], ["2003-03-02"], 1)


def test_a_rank_that_fails_ends_all(config, tmp_path):
    """While others wait for its part of a field."""
    code = """
from faconv_hpc.forecasting import netcdf
def failing(self, channel, lead, field_YX):
    raise OSError(28, "No space left on device")
netcdf.Part.write = failing
"""
    options = ["--start", STARTS[1], "--steps", 2, "--output", tmp_path / "f.nc", "--ranks", 2, "--mesh", "1x2"]
    failed = faconv_after(code, "forecast", config.run_dir, *options)
    assert failed.returncode == 2 and len(messages(failed)) == 1
    assert re.search(r"cannot write to .*f.nc \(No space left on device\).*dates that are done are kept", failed.stderr)
