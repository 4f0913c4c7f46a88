"""``faconv embed``: the embeddings that `Forecaster.embed` gives, on any ranks; killed and continued; refused."""

import json
import re
import signal

import numpy as np
import pytest
import xarray as xr

import forecasts
from faconv_hpc import Forecaster
from faconv_hpc.data.store import Store
from faconv_hpc.data.times import TimeAxis
from faconv_hpc.errors import InputError
from faconv_hpc.evaluation.regimes.embedding_file import read_embeddings
from faconv_hpc.evaluation.regimes.figures import draw_calendar
from faconv_hpc.evaluation.regimes.files import write_netcdf
from faconv_hpc.evaluation.regimes.find import find_regimes
from faconv_hpc.evaluation.regimes.partitions import partitions_of
from faconv_hpc.evaluation.regimes.records import Record
from faconv_hpc.evaluation.regimes.report import write_report
from faconv_hpc.forecasting import embeddings
from faconv_hpc.forecasting.embeddings import plan_embedding, run_embedding
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.spatial.mesh import ProcessMesh
from faconv_hpc.training.contract import Contract
from forecasts import FRAMES, WINDOW
from ranks import Layout, run_on_ranks
from test_cli import faconv, faconv_after, messages


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An exported file, and the store."""
    directory = tmp_path_factory.mktemp("embed")
    model, workspace = forecasts.draw_model(directory, forecasts.make_store(directory))
    return model, workspace.store.path


def embedded(mesh, model, store, output, times=(), **options):
    """The summary of what is written on the ranks of a mesh."""
    forecaster = Forecaster.load(model, mesh=mesh, **options)
    return run_embedding(
        forecaster, plan_embedding(forecaster.contract, forecaster.window, [store], times), output, mesh
    )


def opened(path):
    return xr.load_dataset(path, engine="h5netcdf")


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory):
    """Embeddings on one rank."""
    output = tmp_path_factory.mktemp("alone") / "z.nc"
    summary = embedded(ProcessMesh.alone(), *made, output)
    assert (summary.times, summary.kept_times) == (FRAMES - WINDOW + 1, 0)
    assert not output.with_name("z.nc.partial").exists()
    return opened(output)


def test_they_are_those_of_a_dataset(made, alone):
    found = Forecaster.load(made[0], device="cpu").embed(forecasts.decoded().isel(time=slice(30, 40)))
    assert found.embedding.shape == (10 - WINDOW + 1, 16) and found.embedding.std("time").min() > 0.01
    np.testing.assert_allclose(found.embedding, alone.embedding.sel(time=found.time), rtol=0, atol=1e-6)
    assert found.embedding.attrs == alone.embedding.attrs


def test_the_file_says_of_what_it_is(made, alone):
    assert alone.embedding.dims == ("time", "component") and alone.attrs["Conventions"] == "CF-1.8"
    assert len(alone.attrs["network_sha256"]) == 64 and alone.attrs["window"] == str(WINDOW)
    assert "the store" in json.loads(alone.attrs["faconv_embed"])["--data"]["told"]
    assert Contract.model_validate_json(alone.attrs["contract"]) == Forecaster.load(made[0], device="cpu").contract


def test_the_last_of_months_is_embedded_too(tmp_path):
    """As if the next one were there, whose date the year before tells; what a network is given hangs on it."""
    days = np.cumsum([0, *[31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] * 2])
    random = np.random.default_rng(3).normal(size=(25, 7, 10)).astype(np.float32)
    axes = {"latitude": np.linspace(75, -75, 7), "longitude": np.arange(10) * 36.0}
    time = {"time": ("time", days, {"units": "days since 2001-01-01", "calendar": "noleap"})}
    data = xr.Dataset({"u": (forecasts.DIMS, random, {"units": "m"})}, axes | time)
    model, _ = forecasts.draw_model(
        tmp_path, forecasts.make_store(tmp_path, data), {"forcings": ["step_hours", "next_insolation"], "periods": {}}
    )
    forecaster = Forecaster.load(model, device="cpu")
    whole, cut = (forecaster.embed(xr.decode_cf(data.isel(time=slice(count)))).embedding for count in (25, 15))
    assert whole.time.size == 25 - WINDOW + 1 and cut.time.size == 15 - WINDOW + 1
    np.testing.assert_allclose(cut, whole[: cut.time.size], atol=1e-6)  # the last is March, 31 days; February has 28
    assert float(whole.std("time").min()) > 1e-3
    with pytest.raises(InputError, match="is the only time, and none tells how long a step is"):
        TimeAxis(days[:1], "noleap").after(0)


@pytest.mark.parametrize("layout", [Layout(1, 2, 2), Layout(2, 1, 2)], ids=str)
def test_they_are_the_same_on_any_ranks(made, alone, tmp_path, layout):
    """Over the ends of parts, and with replicas that have nothing to do in the last turn."""

    def check(mesh):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(embeddings, "PART_TIMES", 7)
            embedded(mesh, *made, tmp_path / "z.nc", ["2003-03-02/2003-06-12/6d"])

    run_on_ranks(layout, check)
    tiled = opened(tmp_path / "z.nc")
    assert tiled.time.size == 18
    whole = alone.embedding.sel(time=tiled.time)
    np.testing.assert_allclose(tiled.embedding, whole, rtol=0, atol=1e-5)
    (mine,), (others,) = (partitions_of(one.values, "kmeans", [3], 2) for one in (tiled.embedding, whole))
    np.testing.assert_array_equal(mine.labels_T, others.labels_T)


def test_a_frame_is_read_once(made, tmp_path, monkeypatch):
    """Windows of three frames overlap in two; the variables that are forcings are other fields."""
    frames, read = [], Store.read

    def seen(store, these, *rest):
        frames.extend(these)
        return read(store, these, *rest)

    monkeypatch.setattr(Store, "read", seen)
    summary = embedded(ProcessMesh.alone(), *made, tmp_path / "z.nc", ["2003-03-02/2003-06-12/6d"])
    assert summary.times == 18 and len(frames) == 2 * (18 + WINDOW - 1)


def test_killed_and_started_again_they_are_the_same(made, alone, tmp_path):
    output, (model, store) = tmp_path / "z.nc", made
    command = ["embed", model, "--data", store, "--output", output, "--kernels", "eager"]
    code = """
import os, signal
from faconv_hpc.data.times import TimeAxis
from faconv_hpc.evaluation.regimes.embedding_file import read_embeddings
from faconv_hpc.evaluation.regimes.partitions import partitions_of
from faconv_hpc.evaluation.regimes.records import Record
from faconv_hpc.evaluation.regimes.figures import draw_calendar
from faconv_hpc.evaluation.regimes.files import write_netcdf
from faconv_hpc.evaluation.regimes.report import write_report
from faconv_hpc.evaluation.regimes.find import find_regimes
from faconv_hpc.evaluation.regimes.records import Record
from faconv_hpc.evaluation.regimes.figures import draw_calendar
from faconv_hpc.evaluation.regimes.files import write_netcdf
from faconv_hpc.evaluation.regimes.report import write_report
from faconv_hpc.evaluation.regimes.find import find_regimes
from faconv_hpc.forecasting import embeddings
from faconv_hpc.forecasting.forecaster import Forecaster
embeddings.PART_TIMES = 20
count, embedding = 0, Forecaster.embedding
def killing(*given):
    global count
    count += 1
    if count == 45:
        os.kill(os.getpid(), signal.{signal})
    return embedding(*given)
Forecaster.embedding = killing
"""
    killed = faconv_after(code.format(signal="SIGKILL"), *command)
    assert killed.returncode == -signal.SIGKILL and not output.exists(), killed.stderr
    ended = faconv_after(code.format(signal="SIGCONT"), *command, "--json")
    assert json.loads(ended.stdout)["kept_times"] == 40, ended.stderr
    assert opened(output).embedding.values.tobytes() == alone.embedding.values.tobytes()
    refused = faconv(*command, "--times", "2003-03-02")
    assert refused.returncode == 2 and len(messages(refused)) == 1
    assert re.search(r"was made with --times 78 times from .*, this command says 1 times from", refused.stderr)


def test_what_cannot_be_embedded_is_refused(made, tmp_path):
    model, store = made
    contract = Forecaster.load(model, device="cpu").contract
    for times, told in (
        (
            ["2003-01-07"],
            r"no embedding of 2003-01-07 .* no frame of its window of 3 frames at 2002-12-26.*that can be",
        ),
        (["June"], r"--times takes dates such as [^`]*, got 'June'"),
        (["2003-06-06/2003-05-06/6d"], "--times 2003-06-06/2003-05-06/6d ends before it begins"),
    ):
        with pytest.raises(InputError, match=told):
            plan_embedding(contract, WINDOW, [store], times)
    (tmp_path / "plain.nc").write_text("mine")
    for output, told in (
        ("z.zarr", "the output is NAME.nc, got"),
        ("plain.nc", "is there, and no output of `faconv em"),
        ("plain.nc/below.nc", "plain.nc cannot be written: Not a directory. Give a directory where you may write"),
    ):
        refused = faconv("embed", model, "--data", store, "--output", tmp_path / output, "--ranks", 2)
        assert refused.returncode == 2 and len(messages(refused)) == 1
        assert told in refused.stderr and "(rank" not in refused.stderr


def test_all_sequences_of_a_store_are_embedded(tmp_path):
    """One after the other, each with windows of its own; one that is shorter than a window has none."""
    axes = {"latitude": np.linspace(75, -75, 7), "longitude": np.arange(10) * 36.0}
    members = []
    for number, (name, frames) in enumerate((("r1", 8), ("r2", 2), ("r3", 11))):
        values = np.random.default_rng(number).normal(size=(frames, 7, 10)).astype(np.float32)
        time = {"time": ("time", np.arange(frames) * 6.0, {"units": "hours since 2001-01-01"})}
        members.append(xr.Dataset({"u": (forecasts.DIMS, values, {"units": "m"})}, axes | time))
        members[-1].to_netcdf(tmp_path / f"{name}.nc", engine="h5netcdf")
    sources = [tmp_path / f"{name}.nc" for name in ("r1", "r2", "r3")]
    prepare(sources, tmp_path / "store", sequences=True, mesh=(1, 1))
    model, _ = forecasts.draw_model(tmp_path, tmp_path / "store", {"periods": {}})
    embedded(ProcessMesh.alone(), model, tmp_path / "store", tmp_path / "z.nc")
    found = read_embeddings(tmp_path / "z.nc")
    assert (found.axis.names, found.axis.beginnings, len(found.axis)) == (("r1", "r3"), (0, 6), 6 + 9)
    forecaster = Forecaster.load(model, device="cpu")
    for own, member in zip(found.axis.sequences, (members[0], members[2]), strict=True):
        z_TE = forecaster.embed(xr.decode_cf(member)).embedding.values
        np.testing.assert_allclose(found.z_TE[own.start : own.stop], z_TE, rtol=0, atol=1e-6)
    record = Record.of(found.contract, found.axis, [tmp_path / "store"], None, 1.0)
    fields = np.stack(list(record.fields(range(15), 1, lambda done, total: None)))[:, 0]
    expected = [member.u.values[WINDOW - 1 :] for member in (members[0], members[2])]
    np.testing.assert_array_equal(fields, np.concatenate(expected))
    regimes = find_regimes(found, record, [2], 2)
    assert draw_calendar(regimes, tmp_path / "calendar.png").stat().st_size > 10_000  # a row for each sequence
    write_netcdf(regimes, tmp_path / "regimes.nc")
    with xr.open_dataset(tmp_path / "regimes.nc", engine="h5netcdf") as file:
        assert file.sequence.values.tolist() == ["r1"] * 6 + ["r3"] * 9
    write_report(regimes, [], tmp_path / "report.md", 2)
    assert not regimes.has_seasons and "a part of the year only" in (tmp_path / "report.md").read_text()
    with pytest.raises(InputError, match=r"--times are of one sequence, and \S+store holds 3. Say with --sequence"):
        plan_embedding(forecaster.contract, WINDOW, [tmp_path / "store"], ["2001-01-02"])
    with pytest.raises(InputError, match=r"of the sequences r1, r3, and --data and --sequence name the sequences r2"):
        Record.of(found.contract, found.axis, [tmp_path / "store"], "r2", 1.0)
    with pytest.raises(InputError, match=r"of no sequence, and --data and --sequence name the sequences r1, r2, r3"):
        one = TimeAxis(found.axis.seconds[:6], found.axis.calendar)
        Record.of(found.contract, one, [tmp_path / "store"], None, 1.0)
