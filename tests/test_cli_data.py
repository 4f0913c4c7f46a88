"""The verbs of ``faconv data``, as typed."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

from faconv_hpc.cli.app import data_app
from faconv_hpc.data.store import Store
from faconv_hpc.errors import InputError
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.prepare.selection import Period
from sources import whole


def faconv(*arguments: object) -> str:
    result = CliRunner().invoke(data_app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = np.random.default_rng(0).normal(size=(8, 12, 18)).astype(np.float32)
    data[2, 3:5] = np.nan
    dataset = xr.Dataset(
        {
            "sst": (("step", "latitude", "longitude"), data, {"units": "K"}),
            "u": (("step", "latitude", "longitude"), data[::-1]),
        },
        {"latitude": np.linspace(80, -80, 12), "longitude": np.arange(18) * 20.0, "step": np.arange(8) * 3},
    )
    path = tmp_path_factory.mktemp("cli") / "source.nc"
    dataset.to_netcdf(path, engine="h5netcdf")
    return path


@pytest.fixture(scope="module")
def store(source: Path) -> Path:
    output = source.parent / "store"
    said = json.loads(
        faconv(
            *("prepare", source, "--output", output, "--variables", "sst", "--mesh", "2x3", "--frames-per-file", 3),
            *("--time-coordinate", "step", "--time-units", "hours since 1979-01-01", "--json"),
        )
    )
    assert said["channels"] == ["sst"]
    assert said["files"] == 3
    assert said["has_missing"] is True
    return output


def test_what_is_taken_of_a_source_is_said_by_options(tmp_path: Path) -> None:
    """The same as the call in Python takes."""
    data = np.random.default_rng(1).normal(size=(8, 2, 3, 12, 18)).astype(np.float32)
    data[5, 1, 2, 4] = -999.0
    dims = ("time", "number", "level", "latitude", "longitude")
    times = ("time", np.arange(8) * 6, {"units": "hours since 2001-01-01"})
    places = {"latitude": np.linspace(80, -80, 12), "longitude": np.arange(18) * 20.0}
    source, said = tmp_path / "s.nc", {"number": [0, 7], "level": [1, 2, 3], "time": times}
    xr.Dataset({"t": (dims, data), "odd": (dims, np.where(data > 0, data, -8e9))}, places | said).to_netcdf(source)
    some = ("prepare", source, "--select", "number=7", "--select", "level=3", "--missing-value", "t=-999")
    with pytest.raises(InputError, match=r"'odd' .* is -8e\+09 in 8\d\d cells, far below .*--accept odd"):
        faconv(*some, "--output", tmp_path / "a")
    options = "--rename t=temperature --accept odd --from 2001-01-01T06:00 --to 2001-01-02T12:00 --every 2"
    faconv(*some, "--output", tmp_path / "b", *options.split())
    prepare(
        [source],
        tmp_path / "c",
        select={"number": "7", "level": "3"},
        rename={"t": "temperature"},
        missing_values=[("t", -999.0)],
        accept=["odd"],
        period=Period("2001-01-01T06:00", "2001-01-02T12:00", 2),
    )
    typed, called = (whole(tmp_path / name, "temperature3", "odd3") for name in "bc")
    np.testing.assert_array_equal(typed[0], called[0])
    assert typed[0].shape == (3, 2, 12, 18) and not typed[1][2, 0, 4].any()  # of 06, 18 and 06 the last one


def test_prepare_takes_its_options(store: Path) -> None:
    opened = Store.open(store)
    assert opened.layout.mesh == (2, 3)
    assert (opened.layout.chunk.rows, opened.layout.chunk.columns) == (6, 6)
    assert opened.layout.time.label(1) == "1979-01-01 03:00:00"
    assert opened.layout.provenance["command"]


def test_prepare_says_what_it_made(source: Path, tmp_path: Path) -> None:
    said = faconv(
        *("prepare", source, "--output", tmp_path / "o", "--time-coordinate", "step", "--calendar", "noleap"),
        *("--time-units", "days since 1979-01-01", "--compression", 2),
    )
    assert "8 frames of 2 channels on 12 x 18 cells, with missing data" in said
    assert Store.open(tmp_path / "o").calendar == "noleap"
    assert Store.open(tmp_path / "o").layout.compression == 2
    with pytest.raises(InputError, match="not overwritten"):
        faconv(
            "prepare",
            source,
            "--output",
            tmp_path / "o",
            "--time-coordinate",
            "step",
            "--time-units",
            "days since 1979-01-01",
        )


def test_inspect_in_json_counts_bytes_per_tile(store: Path) -> None:
    said = json.loads(faconv("inspect", store, "--mesh", "2x2", "--window", 4, "--json"))
    assert said["grid"]["nlat"] == 12
    assert said["time"] == {
        "frames": 8, "first": "1979-01-01 00:00:00", "last": "1979-01-01 21:00:00",
        "calendar": "standard", "step_hours": [3.0, 3.0], "regular": True, "sequences": [],
    }  # fmt: skip
    (channel,) = said["channels"]
    assert channel["units"] == "K"
    assert channel["missing_share"] == pytest.approx(2 * 18 / (8 * 12 * 18))
    reading = said["reading"]
    assert reading["frames"] == 5
    assert len(reading["tiles"]) == 4
    # 2x2 tiles of 6 x 9 cells over chunks of 6 x 6: each touches two; five bytes a cell, five frames
    assert all(tile["bytes_needed"] == 6 * 9 * 5 * 5 for tile in reading["tiles"])
    assert all(tile["bytes_read"] == 2 * 6 * 6 * 5 * 5 for tile in reading["tiles"])
    assert reading["ratio"] == pytest.approx(72 / 54)


def test_inspect_for_people(store: Path) -> None:
    said = " ".join(faconv("inspect", store).split())
    for part in ("12 x 18", "every 3 h", "standard", "sst", "K", "mesh 2x3", "ratio 1.000", "2.1 %"):
        assert part in said, part
    assert "for this mesh, prepare" not in said.lower()
    said = re.sub(r"\s+", " ", faconv("inspect", store, "--mesh", "2x2"))
    assert "For this mesh, prepare the store with --mesh 2x2" in said


def test_inspect_refuses_what_it_cannot_show(store: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        faconv("inspect", tmp_path / "no")
    with pytest.raises(InputError, match="LATxLON"):
        faconv("inspect", store, "--mesh", "4")
    with pytest.raises(InputError, match="12 rows cannot be cut over 13"):
        faconv("inspect", store, "--mesh", "13x1")
    with pytest.raises(InputError, match="at least 1 input frame, got 0"):
        faconv("inspect", store, "--window", 0)


def test_synth(tmp_path: Path) -> None:
    said = json.loads(
        faconv("synth", "--output", tmp_path / "w", "--nlat", 9, "--nlon", 12, "--frames", 4, "--channels", 2, "--json")
    )
    assert said["grid_shape"] == [9, 12]
    assert Store.open(tmp_path / "w").frames == 4
    assert "4 frames of 2 channels" in faconv(
        "synth", "--output", tmp_path / "w", "--nlat", 9, "--nlon", 12, "--frames", 4, "--channels", 2, "--overwrite"
    )


def test_an_option_of_another_kind_of_fields_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--runs 3 is of --kind shallow-water; --kind waves takes --nlat, .*--start"):
        faconv("synth", "--output", tmp_path / "w", "--runs", 3)
    with pytest.raises(InputError, match=r"--step-hours 1.0 is of --kind waves; --kind shallow-water takes .*--states"):
        faconv("synth", "--output", tmp_path / "w", "--kind", "shallow-water", "--step-hours", 1)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("name", ["era5", "winds"])
def test_sample_takes_a_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        faconv("sample", "--name", name, "--output", tmp_path, "--file", tmp_path / "none.whl")


@pytest.mark.parametrize("verb", ["prepare", "inspect", "synth", "sample"])
def test_every_help_has_an_example(verb: str) -> None:
    assert f"faconv data {verb}" in faconv(verb, "--help")


def test_a_store_is_extended_and_keeps_how_it_was_made(tmp_path: Path, source: Path, store: Path) -> None:
    shutil.copytree(store, tmp_path / "store")
    times = ("--time-coordinate", "step", "--time-units", "hours since 1979-01-01")
    more = ("prepare", source, "--output", tmp_path / "store", "--variables", "u", *times, "--extend")
    with pytest.raises(InputError, match=r"--extend adds files like those .*Leave out --mesh, --frames-per-file"):
        faconv(*more, "--mesh", "2x3")
    said = faconv(*more)
    assert "note: added at all times: u" in said and "8 frames of 2 channels on 12 x 18 cells" in said
    shown = json.loads(faconv("inspect", tmp_path / "store", "--json"))
    assert [channel["name"] for channel in shown["channels"]] == ["sst", "u"] and shown["files"] == 6
    assert shown["provenance"]["extended"][0]["sources"] == [str(source)]
