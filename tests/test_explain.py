"""``faconv explain``: what it says of attention, dilations and gradients is what the network does."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from typer.testing import CliRunner

import forecasts
from faconv_hpc import Forecaster
from faconv_hpc.cli.app import app
from faconv_hpc.errors import InputError
from faconv_hpc.evaluation.explanation import explain as explain_module
from faconv_hpc.evaluation.explanation.attention_maps import looks_of
from faconv_hpc.evaluation.explanation.explain import check_memory, explain, write_netcdf
from faconv_hpc.evaluation.explanation.figures import _box
from faconv_hpc.evaluation.explanation.report import write_report
from faconv_hpc.evaluation.explanation.sensitivity import Question, Region, sensitivity_of
from faconv_hpc.forecasting.campaign import open_frames
from faconv_hpc.forecasting.dates import Timeline
from faconv_hpc.forecasting.sources import dataset_frames
from faconv_hpc.locks import OUTPUT_LOCK, locked_directory
from faconv_hpc.look import new_figure
from faconv_hpc.model.sweep import Bank

START = "2003-06-06"
DATES = [START, "2003-12-15", "2004-02-01"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An exported file of drawn weights, and its store."""
    directory = tmp_path_factory.mktemp("explain")
    model, workspace = forecasts.draw_model(directory, forecasts.make_store(directory))
    return model, workspace.store.path


@pytest.fixture
def forecaster(made):
    return Forecaster.load(made[0], device="cpu")


@pytest.fixture
def frames(made, forecaster):
    return open_frames(forecaster.contract, [made[1]])


def starts_of(forecaster, frames, dates=(START,), steps=1):
    timeline = Timeline(frames, forecaster.contract, forecaster.window, steps)
    axis = frames.states.axis
    seconds = [int(np.datetime64(date, "s").astype(int)) for date in dates]
    nearest = [int(np.abs(axis.seconds - second).argmin()) for second in seconds]
    return [timeline.start(int(axis.seconds[frame])) for frame in nearest]


def quiet(done, total):
    pass


@torch.no_grad()
def test_weights_of_attention_are_those_it_mixes_by(forecaster):
    """The values that they weigh give what the lines give, for rows and for columns, in every head."""
    attention, domain = forecaster.network.layers[0].attention, forecaster.domain
    h_BCYX = torch.randn(2, 8, *domain.tile.shape)
    for lines, qkv_BYXF, turned in zip(
        (attention.rows, attention.columns), attention.projected(h_BCYX), (False, True), strict=True
    ):
        expected_BYXF = lines(qkv_BYXF, domain)
        v_BYXHD = qkv_BYXF.unflatten(-1, (3, lines.heads, lines.head_size))[..., 2, :, :]
        for number, weights_BHNN in enumerate(lines.weights(qkv_BYXF, domain)):
            line = v_BYXHD[:, :, number] if turned else v_BYXHD[:, number]
            expected = expected_BYXF[:, :, number] if turned else expected_BYXF[:, number]
            found = torch.einsum("bhqk,bkhd->bqhd", weights_BHNN, line).flatten(2)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert number + 1 == domain.tile.shape[1 if turned else 0]


def test_dilations_weigh_as_the_sweep_weighs_them(forecaster, frames, monkeypatch):
    """The factors that its kernels were made with."""
    factors, weights = [], Bank.weights

    def seen(bank, factors_BTDC, mixing_DCK):
        factors.append(factors_BTDC)
        return weights(bank, factors_BTDC, mixing_DCK)

    monkeypatch.setattr(Bank, "weights", seen)
    layer, domain = forecaster.network.layers[0], forecaster.domain
    x_BTCYX = torch.randn(1, 5, layer.in_channels, *domain.tile.shape)
    with torch.no_grad():
        layer(x_BTCYX, domain=domain)
        found_BTDC = layer.dilation_weights(x_BTCYX, domain)
        lengths = layer.mixing_weight.square().sum(-1).sqrt()
        areas_Y = torch.from_numpy(domain.grid.cell_area_sr / domain.grid.cell_area_sr.sum()).float()
        for step in range(5):
            of_input = torch.einsum("cyx,y->c", x_BTCYX[0, step], areas_Y) / domain.grid.nlon
            mean_C = layer.input_weight @ of_input + layer.bottleneck_bias
            excited = layer.excite(torch.nn.functional.silu(layer.squeeze(mean_C))).sigmoid()
            expected = excited.view(1, *lengths.shape) * lengths
            torch.testing.assert_close(found_BTDC[:, step], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(factors[0][:, step] * lengths, expected, rtol=1e-4, atol=1e-5)
        layer.squeeze = layer.excite = None
        found_BTDC = layer.dilation_weights(x_BTCYX, domain)
    torch.testing.assert_close(found_BTDC, lengths.expand_as(found_BTDC))


def test_maps_are_in_units_of_even_weights_and_of_their_season(forecaster, frames):
    starts = starts_of(forecaster, frames, DATES)
    looks = looks_of(forecaster, frames, starts, quiet)
    assert looks.dates_S.tolist() == [2, 0, 1, 0]
    areas_Y = forecaster.domain.grid.cell_area_sr / forecaster.domain.grid.cell_area_sr.sum()
    for season in (0, 2):
        np.testing.assert_allclose(looks.row_map_LSYX[:, season].mean(-1), 1, rtol=1e-5)
        np.testing.assert_allclose(looks.row_offset_LSYX[:, season].mean(-1), 1, rtol=1e-5)
        np.testing.assert_allclose(np.einsum("lyx,y->lx", looks.column_map_LSYX[:, season], areas_Y), 1, rtol=1e-5)
        np.testing.assert_allclose(looks.latitudes_LSYY[:, season] @ areas_Y, 1, rtol=1e-5)
        assert looks.row_map_LSYX[:, season].std() > 0.003 and looks.column_map_LSYX[:, season].std() > 0.003
    assert np.isnan(looks.row_map_LSYX[:, 1]).all() and (looks.added_L > 0).all()
    np.testing.assert_allclose(looks.dilations_LDC.sum(1), 1, rtol=1e-6)
    winter = looks_of(forecaster, frames, starts[1:], quiet)
    np.testing.assert_allclose(winter.column_map_LSYX[:, 0], looks.column_map_LSYX[:, 0], rtol=1e-6)
    assert np.abs(looks.row_map_LSYX[:, 0] - looks.row_map_LSYX[:, 2]).max() > 1e-3


def test_an_offset_is_to_the_east(forecaster, frames):
    """Keys that lie one column to the east of their query get all: rotary angles are turned by that much."""
    layer = forecaster.network.layers[0]
    nlon = forecaster.domain.tile.shape[1]

    def weights(qkv_BYXF, domain):
        for _ in range(qkv_BYXF.shape[1]):
            yield torch.eye(nlon).roll(1, dims=1)[None, None]

    layer.attention.rows.weights = weights
    looks = looks_of(forecaster, frames, starts_of(forecaster, frames), quiet)
    np.testing.assert_allclose(looks.row_offset_LSYX[0, 2, :, 1], nlon)
    assert not looks.row_offset_LSYX[0, 2, :, 2:].any()


@pytest.mark.parametrize(("name", "lead", "step"), [("heat", 1, 2), ("heat", 2, 1), ("vapour", 2, 1), ("sst", 2, 0)])
def test_gradients_are_those_of_forecasts(forecaster, frames, name, lead, step):
    """By differences of whole forecasts: a field of one cell a little higher, in deviations as the network sees it."""
    region, delta = Region.parse("30,60,300,40"), 0.05
    question = Question.of(forecaster.contract, region, "heat", lead)
    one = next(each for each in forecaster.contract.channels.fields if each.name == name)
    data, at = forecasts.decoded(), 26
    raw, row, column = data[name].values, 3, 13
    share_YX = region.share_YX(forecaster.contract)
    assert 0 < (share_YX > 0).sum() < 20 and share_YX[row, column] > 0
    frame = at - (forecaster.window - 1) + step

    def answer(by):
        changed = raw.astype(np.float64)
        z = np.log1p(changed[frame, row, column] / one.log1p) if one.log1p else changed[frame, row, column]
        z += by * one.scale
        changed[frame, row, column] = one.log1p * np.expm1(z) if one.log1p else z
        given = data.assign({name: (data[name].dims, changed.astype(np.float32), data[name].attrs)})
        others = dataset_frames(given.isel(time=slice(20, 34)), forecaster.contract)
        leads = list(forecaster.leads(others, *starts_of(forecaster, others, [data.time.values[at]], lead)))
        return float((leads[lead - 1][0].numpy() * share_YX).sum())

    found = sensitivity_of(
        forecaster, frames, starts_of(forecaster, frames, [data.time.values[at]], lead), question, quiet
    )
    assert found.answers[0] == pytest.approx(answer(0.0), rel=1e-6)
    place = [each.name for each in found.variables].index(name)
    areas_Y = forecaster.domain.grid.cell_area_sr
    gradient = found.mean_TCYX[step, place, row, column] * areas_Y[row] / areas_Y.mean()
    assert gradient == pytest.approx((answer(delta) - answer(-delta)) / (2 * delta), rel=0.05) and abs(gradient) > 1e-5
    np.testing.assert_allclose(found.total_TC[step, place], (
        found.mean_TCYX[step, place] * areas_Y[:, None] / areas_Y.mean()).sum(), rtol=1e-6)  # fmt: skip
    np.testing.assert_allclose(found.rms_TCYX, np.abs(found.mean_TCYX))  # of one date


def test_a_region_may_cross_the_end_of_longitudes(forecaster):
    contract = forecaster.contract
    longitude = np.array(contract.longitude_deg)
    share_YX = Region.parse("60,-20,300,40").share_YX(contract)
    assert share_YX.sum() == pytest.approx(1)
    there = (share_YX > 0).any(0)
    np.testing.assert_array_equal(there, (longitude >= 300) | (longitude <= 40))
    assert (Region.parse("-90,90,-180,180").share_YX(contract) > 0).all()
    assert str(Region.parse("60,-20,300,40")) == "20°S to 60°N, 60°W to 40°E"
    rows = share_YX[share_YX.any(1)][:, 0]
    areas = contract.grid.cell_area_sr[share_YX.any(1)]
    np.testing.assert_allclose(rows / rows.sum(), areas / areas.sum())


@pytest.mark.parametrize(
    ("west", "east", "view", "seen"),
    [(170, -160, (149, 211), (170, 200)), (170, -160, (-211, -149), (-190, -160)),
     (-180, 180, (-180, 180), (-180, 180)), (300, 40, (-180, 180), (-60, 40))],
)  # fmt: skip
def test_a_region_is_framed_where_the_map_has_it(west, east, view, seen):
    _, ((axes,),) = new_figure(1, 1, "")
    axes.set_xlim(*view)
    _box(axes, -40, -20, west, east)
    ends = [(min(line.get_xdata()), max(line.get_xdata())) for line in axes.lines]
    assert [one for one in ends if one[0] < view[1] and one[1] > view[0]] == [seen]


def test_memory_that_only_caches_files_is_free(forecaster, monkeypatch, tmp_path):
    """What the system would give back at once counts, as MemAvailable has it."""
    table = tmp_path / "meminfo"
    monkeypatch.setattr(explain_module, "MEMORY_TABLE", table)
    table.write_text("MemTotal:  24684084 kB\nMemFree:     8 kB\nMemAvailable:   8388608 kB\n")
    check_memory(forecaster, 1)
    table.write_text("MemTotal:  24684084 kB\nMemFree:   8388608 kB\nMemAvailable:      16 kB\n")
    with pytest.raises(InputError, match=r"for 4 steps, and 0.0 GiB are free"):
        check_memory(forecaster, 1)
    table.unlink()  # as on other systems than Linux
    check_memory(forecaster, 1)


def faconv(*arguments):
    result = CliRunner().invoke(app, ["explain", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_leaves_all_that_a_reader_needs(made, tmp_path):
    model, store = made
    options = ("--samples", 3, "--region", "30,60,300,40", "--variable", "rain", "--lead", 2)
    told = faconv(model, "--data", store, "--output", tmp_path / "out", *options)
    assert re.search(r"3 dates from 2003-01-13 .* to 2004-04-13 .*Read \S+report.md", told, re.DOTALL)
    report = (tmp_path / "out" / "report.md").read_text()
    figures = re.findall(r"!\[[^]]+\]\((\S+)\)", report)
    assert figures == ["attention.png", "attention_lines.png", "dilations.png", "sensitivity.png"]
    assert all((tmp_path / "out" / name).stat().st_size > 10_000 for name in figures)
    assert "rain, mean over 30°N to 60°N, 60°W to 40°E, 2 steps ahead" in report
    with xr.open_dataset(tmp_path / "out" / "explain.nc", engine="h5netcdf") as file:
        assert dict(file.sensitivity.sizes) == {
            "steps_before_start": 3, "given": 6, "latitude": 11, "longitude": 14
        }  # fmt: skip
        assert file.steps_before_start.values.tolist() == [-2, -1, 0] and file.given.values[-1] == "sst"
        assert np.isfinite(file.sensitivity).all() and file.row_attention.dims[:2] == ("layer", "season")


def test_a_network_without_attention_is_explained_by_gradients(made, tmp_path):
    model, _ = forecasts.draw_model(tmp_path, made[1], model={"cell": "convlstm", "attention_every": 0})
    forecaster = Forecaster.load(model, device="cpu")
    question = Question.of(forecaster.contract, Region.parse("30,60,0,90"), None, 1)
    found = explain(forecaster, [made[1]], 2, question)
    write_report(found, [], tmp_path / "report.md")
    report = (tmp_path / "report.md").read_text()
    assert "ConvLSTM, which has neither" in report and "heat, mean over 30°N to 60°N" in report
    write_netcdf(found, tmp_path / "explain.nc")
    with xr.open_dataset(tmp_path / "explain.nc", engine="h5netcdf") as file:
        assert np.abs(file.sensitivity).sum() > 0 and "row_attention" not in file


def test_bad_input_is_refused(made, tmp_path, monkeypatch):
    model, store = made
    good = (model, "--data", store, "--output", tmp_path / "out", "--samples", 1)
    for given, match in (
        (("--region", "40,60"), r"--region takes LAT0,LAT1,LON0,LON1 in degrees such as 40,60,-20,20, got 40,60"),
        (("--region", "81,82,0,1"), r"has no cell of a grid of 11 rows from 80 to -80 degrees"),
        (("--region", "0,60,0,90", "--variable", "sst"), r"no forecast variable 'sst' in the network"),
        (("--variable", "heat"), r"--variable and --lead are of the forecast of a region"),
        (("--sequence", "r1"), r"no sequence 'r1' in the store"),
        (
            ("--region", "10,35,80,130", "--variable", "ice"),
            r"'ice' is missing in every cell of --region 10°N to 35°N, 80°E to 130°E in the forecast from 2003-01-13.* "
            r"Give a larger region, or another --variable.",
        ),
    ):
        with pytest.raises(InputError, match=match):
            faconv(*good, *given)
    (tmp_path / "plain").write_text("mine")
    with pytest.raises(InputError, match=r"plain is a file. Give a directory"):
        faconv(model, "--data", store, "--output", tmp_path / "plain")
    with pytest.raises(
        InputError, match=r"--output \S*plain/below cannot be written: Not a directory\. Give a directory"
    ):
        faconv(model, "--data", store, "--output", tmp_path / "plain" / "below")
    with (
        locked_directory(tmp_path / "held" / OUTPUT_LOCK, "--output", InputError),
        pytest.raises(InputError, match=r"another explanation writes to \S*held: process \d+"),
    ):
        faconv(model, "--data", store, "--output", tmp_path / "held")
    monkeypatch.setattr(explain_module, "KEPT_PER_STEP", 10**9)
    with pytest.raises(InputError, match=r"on 11 x 14 cells .* keeps about .* GiB for 4 steps, and .* GiB are free"):
        faconv(*good)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="one process, and this is one of 2 ranks"):
        faconv(*good)
    assert not Path(tmp_path / "out").exists()
