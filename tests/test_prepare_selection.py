"""What is taken of a source, and values, flags and units that nobody meant."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from faconv_hpc.errors import InputError
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.prepare.selection import Period
from faconv_hpc.prepare.values import refuse_suspect, suspect
from sources import DIMS, FRAMES, NLAT, NLON, dataset, save, values, whole

MEMBERS = ("number", *DIMS)


def times(count: int, start: float = 0.0, **attributes: Any) -> tuple[str, np.ndarray, dict[str, Any]]:
    return ("time", start + np.arange(count) * 6.0, {"units": "hours since 2001-01-01", **attributes})


# Members and names


def test_one_member_is_taken(tmp_path: Path) -> None:
    members = values(3, (4, FRAMES, NLAT, NLON))
    source = save(dataset({"t": (MEMBERS, members)}, number=("number", [0, 5, 7, 9])), tmp_path / "s.nc")
    with pytest.raises(InputError, match=r"Take one of 'number', for example with --select number=0"):
        prepare([source], tmp_path / "o")
    prepare([source], tmp_path / "o", select={"number": "7"}, rename={"t": "temperature"})
    np.testing.assert_array_equal(whole(tmp_path / "o", "temperature")[0][:, 0], members[2])


def test_what_cannot_be_selected_is_told(tmp_path: Path) -> None:
    source = save(
        dataset({"t": (MEMBERS, values(3, (2, FRAMES, NLAT, NLON)))}, number=("number", [0, 5])), tmp_path / "s.nc"
    )
    with pytest.raises(
        InputError, match=r"--select number=3: the dim 'number' of .*s\.nc has the values 0, 5\. Take one"
    ):
        prepare([source], tmp_path / "o", select={"number": "3"})
    with pytest.raises(InputError, match=r"--select numbr=0: no source has such a dim"):
        prepare([source], tmp_path / "o", select={"numbr": "0", "number": "0"})


# Dates


@pytest.mark.parametrize(
    ("period", "frames"),
    [
        (Period(), range(40)),
        (Period("2001-01-03"), range(8, 40)),
        (Period(None, "2001-01-03"), range(12)),
        (Period("2001-01-02", "2001-01-03", 3), range(4, 12, 3)),
        (Period("2001-01-02T06:00", "2001-01-02T18:00"), range(5, 8)),
        (Period("2001-01-02 06:00:00", "2001-01-02 18:00:00"), range(5, 8)),
        (Period("2001", "2001-01", 4), range(0, 40, 4)),
        (Period("2000-12", "2002", 7), range(0, 40, 7)),
    ],
)
@pytest.mark.parametrize("files", [1, 3, 7])
@pytest.mark.every(2, "period", "files")
def test_dates_are_taken_over_any_number_of_files(tmp_path: Path, period: Period, frames: range, files: int) -> None:
    data, cuts = values(4, (40, NLAT, NLON)), np.linspace(0, 40, files + 1).astype(int)
    paths = [
        save(dataset({"t": (DIMS, data[a:b])}, time=times(b - a, 6.0 * a)), tmp_path / f"{a}.nc")
        for a, b in pairwise(cuts)
    ]
    prepare(paths, tmp_path / "o", period=period, frames_per_file=4)
    got, _, store = whole(tmp_path / "o")
    np.testing.assert_array_equal(got[:, 0], data[frames])
    np.testing.assert_array_equal(np.diff(store.time_hours), np.diff(list(frames)) * 6.0)


@pytest.mark.parametrize(
    ("period", "match"),
    [
        (Period("2003"), r"no frame is left from 2003 to the last: the sources run from 2001-01-01"),
        (Period("soon"), r"--from takes a date of the calendar 'standard', such as 1990.*got 'soon'"),
        (Period("2001-00-00"), r"--from takes a date .*got '2001-00-00'"),
        (Period(None, "2001-02-30"), r"--to takes a date .*got '2001-02-30'"),
        (Period(every=0), r"--every takes one frame of so many, got 0"),
    ],
)
def test_dates_of_no_use(tmp_path: Path, period: Period, match: str) -> None:
    with pytest.raises(InputError, match=match):
        prepare([save(dataset(), tmp_path / "s.nc")], tmp_path / "o", period=period)


def test_two_names_of_one_calendar_are_joined(tmp_path: Path) -> None:
    paths = [
        save(dataset(time=times(FRAMES, 54.0 * place, calendar=calendar)), tmp_path / f"{calendar}.nc")
        for place, calendar in enumerate(("standard", "proleptic_gregorian"))
    ]
    assert prepare(paths, tmp_path / "o").frames == 2 * FRAMES
    assert whole(tmp_path / "o")[2].calendar == "standard"
    old = [
        save(
            dataset(
                time=("time", np.arange(FRAMES) + 20.0 * place, {"units": "days since 1500-01-01", "calendar": name})
            ),
            path,
        )
        for place, (name, path) in enumerate(
            (("standard", tmp_path / "a.nc"), ("proleptic_gregorian", tmp_path / "b.nc"))
        )
    ]
    with pytest.raises(InputError, match=r"different calendars"):
        prepare(old, tmp_path / "p")


# What is no field


def test_bounds_are_left_out_without_a_word_and_flags_with_one(tmp_path: Path) -> None:
    data = dataset(
        {
            "t": (DIMS, values()),
            "time_bnds": (("time", "bnds"), np.zeros((FRAMES, 2))),
            "limits": (("time", "bnds"), np.zeros((FRAMES, 2))),
            "quality": (DIMS, np.ones((FRAMES, NLAT, NLON), dtype=np.int8)),
            "kind": (DIMS, values(), {"flag_values": [0.0, 1.0], "flag_meanings": "no yes"}),
        }
    )
    data["time"].attrs["bounds"] = "limits"
    source = save(data, tmp_path / "s.nc")
    made = prepare([source], tmp_path / "o")
    assert made.channels == ("t",)
    assert sorted(note.partition(": ")[2].split("'")[1] for note in made.notes) == ["kind", "quality"]
    assert prepare([source], tmp_path / "p", variables=["t", "quality"]).channels == ("t", "quality")
    assert prepare([source], tmp_path / "q", accept=["kind"]).channels == ("t", "kind")


def test_a_packed_field_of_bytes_is_a_field(tmp_path: Path) -> None:
    source = save(
        dataset({"t": (DIMS, values())}), tmp_path / "s.nc", encoding={"t": {"dtype": "int8", "scale_factor": 0.1}}
    )
    assert prepare([source], tmp_path / "o").channels == ("t",)


# Values


def marked(low: float, count: int, mean: float = 280.0, std: float = 15.0) -> np.ndarray:
    field = (mean + std * values(8)).astype(np.float32)
    if count:
        field.reshape(-1)[:: field.size // count][:count] = low
    return field


@pytest.mark.parametrize(
    ("field", "found"),
    [
        (marked(-999, 300), -999.0),
        (marked(-9999, 2), -9999.0),
        (marked(-32768, 5, mean=0), -32768.0),
        (marked(0, 400), 0.0),  # land in a sea's temperature
        (-marked(-9999, 2), 9999.0),
        (marked(999, 40, mean=990), None),  # pressures in hPa
        (marked(-1234.5678, 300), float(np.float32(-1234.5678))),
        (marked(-999, 1), None),  # once
        (marked(280, 0), None),
        (np.maximum(values(8) - 1, 0), None),  # rain: mostly none
        (np.where(values(8) > 0, 1, 0).astype(np.float32), None),  # a mask
        (np.full((3, 4, 5), -999, np.float32), -999.0),
        (np.linspace(-2000, 2000, 600, dtype=np.float32).round().reshape(3, 10, 20), None),
        (np.full((3, 4, 5), np.nan, np.float32), None),
        (np.full((3, 4, 5), 7, np.float32), None),
    ],
)
def test_a_mark_is_told_from_a_value(field: np.ndarray, found: float | None) -> None:
    assert suspect(field) == found


def test_a_rare_mark_in_many_values_is_found_and_rare_rain_is_none() -> None:
    random = np.random.default_rng(5)
    many = (280 + 15 * random.normal(size=(16, 200, 300))).astype(np.float32)
    many.reshape(-1)[random.choice(many.size, 100, replace=False)] = -1000.0
    assert suspect(many) == -1000.0
    for seed in range(50):
        random, rain = np.random.default_rng(seed), np.zeros((16, 40, 40), np.float32)
        for _ in range(1 + seed % 3):
            row, column = random.integers(38, size=2)
            rain[:, row : row + 2, column : column + 2] = 5 + random.random((16, 2, 2))
        assert suspect(rain) is None


def test_a_mark_of_one_variable_is_none_of_another(tmp_path: Path) -> None:
    rain = np.maximum(values(9) - 1, 0).astype(np.float32)
    source = save(dataset({"sst": (DIMS, marked(0, 400)), "tp": (DIMS, rain)}), tmp_path / "s.nc")
    with pytest.raises(InputError, match=r"--missing-value sst=0; if it is real"):
        prepare([source], tmp_path / "o")
    prepare([source], tmp_path / "p", missing_values=[("sst", 0.0)])
    _, valid, _ = whole(tmp_path / "p", "sst", "tp")
    assert valid[:, 1].all() and 300 < (~valid[:, 0]).sum() <= 400


def test_a_suggested_mark_is_the_value(tmp_path: Path) -> None:
    source = save(dataset({"t": (DIMS, marked(-1234.5678, 300))}), tmp_path / "s.nc")
    with pytest.raises(InputError) as caught:
        prepare([source], tmp_path / "o")
    name, _, text = str(caught.value).partition("--missing-value ")[2].partition(";")[0].partition("=")
    assert prepare([source], tmp_path / "o", missing_values=[(name, float(text))]).has_missing


def test_one_level_is_accepted_and_no_other(tmp_path: Path) -> None:
    levels = {"level": ("level", [850.0, 500.0], {"units": "hPa"})}
    data = np.stack([values(1), marked(-999, 300)], axis=1)
    source = save(dataset({"t": (("time", "level", "lat", "lon"), data)}, **levels), tmp_path / "s.nc")
    with pytest.raises(InputError, match=r"is -999 in 300 cells"):
        prepare([source], tmp_path / "o", accept=["t850"])
    assert prepare([source], tmp_path / "o", accept=["t500"]).channels == ("t850", "t500")


def test_a_field_at_its_only_pressure_is_named_by_it(tmp_path: Path) -> None:
    alone = dataset({"t": (DIMS, values())}).assign_coords(level=((), 500.0, {"units": "hPa"}))
    assert prepare([save(alone, tmp_path / "s.nc")], tmp_path / "o").channels == ("t500",)


@pytest.mark.parametrize("option", ["rename", "accept", "missing_values"])
def test_a_name_that_no_source_has_is_told(tmp_path: Path, option: str) -> None:
    given = {"rename": {"uu": "x"}, "accept": ["uu"], "missing_values": [("uu", 1.0)]}[option]
    with pytest.raises(InputError, match=r"no variable for --.*'uu' in the sources\. Did you mean 'u'\?"):
        prepare([save(dataset(), tmp_path / "s.nc")], tmp_path / "o", **{option: given})


def test_percent_in_bytes_is_a_field_and_bytes_with_gaps_a_flag(tmp_path: Path) -> None:
    ice = np.random.default_rng(1).integers(0, 101, size=(FRAMES, NLAT, NLON)).astype(np.uint8)
    quality = np.ma.masked_array(ice % 3)
    data = dataset({"ice": (DIMS, ice, {"units": "%"}), "quality": (DIMS, quality.astype(np.float32))})
    source = save(data, tmp_path / "s.nc", encoding={"quality": {"dtype": "int8", "_FillValue": -1}})
    made = prepare([source], tmp_path / "o")
    assert made.channels == ("ice",) and "'quality' holds flags" in "".join(made.notes)
    only = save(data[["quality"]], tmp_path / "q.nc", encoding={"quality": {"dtype": "int8", "_FillValue": -1}})
    with pytest.raises(InputError, match=r"no field with time, .*'quality' holds flags .* --accept quality takes it"):
        prepare([only], tmp_path / "p")


def test_a_mark_that_nobody_declared_is_refused_named_and_taken_away(tmp_path: Path) -> None:
    field = marked(-999, 300)
    source = save(dataset({"t": (DIMS, field)}), tmp_path / "s.nc")
    match = r"variable 't' in .*s\.nc is -999 in 300 cells, far below .*--missing-value t=-999; if .*--accept t"
    with pytest.raises(InputError, match=match):
        prepare([source], tmp_path / "o")
    prepare([source], tmp_path / "p", missing_values=[("t", -999.0)])
    got, valid, store = whole(tmp_path / "p")
    np.testing.assert_array_equal(valid[:, 0], field != -999)
    assert store.mean[0] > 200 and np.nanmin(got) > 200
    prepare([source], tmp_path / "q", accept=["t"])
    np.testing.assert_array_equal(whole(tmp_path / "q")[0][:, 0], field)


def test_whole_numbers_that_would_be_rounded_are_refused(tmp_path: Path) -> None:
    counts = np.arange(FRAMES * NLAT * NLON, dtype=np.int32).reshape(FRAMES, NLAT, NLON)
    assert prepare([save(dataset({"n": (DIMS, counts)}), tmp_path / "s.nc")], tmp_path / "o").channels == ("n",)
    large = save(dataset({"n": (DIMS, counts + 2**24)}), tmp_path / "l.nc")
    with pytest.raises(
        InputError, match=r"variable 'n' in .*l\.nc holds whole numbers up to 1677\d+, .*\(beyond 16777216\)"
    ):
        prepare([large], tmp_path / "p")


def test_a_source_without_units_joins_none_with_them(tmp_path: Path) -> None:
    first = save(dataset({"t": (DIMS, values(), {"units": "K"})}), tmp_path / "a.nc")
    second = save(dataset({"t": (DIMS, values() - 273)}, time=times(FRAMES, 54.0)), tmp_path / "b.nc")
    with pytest.raises(InputError, match=r"in K in .*a\.nc, but .* in no units in .*b\.nc.*--accept t"):
        prepare([first, second], tmp_path / "o")
    assert prepare([first, second], tmp_path / "o", accept=["t"]).frames == 2 * FRAMES


def test_another_order_of_dims_is_the_same_store(tmp_path: Path) -> None:
    """As WeatherBench 2 has it: longitude before latitude."""
    plain = dataset()
    turned = xr.Dataset(
        {name: array.transpose("lon", "time", "lat") for name, array in plain.data_vars.items()}, plain.coords
    )
    for name, data in (("plain", plain), ("turned", turned)):
        prepare([save(data, tmp_path / f"{name}.nc")], tmp_path / name)
    np.testing.assert_array_equal(whole(tmp_path / "plain")[0], whole(tmp_path / "turned")[0])


@pytest.mark.parametrize(("lone", "mark"), [(-9999.0, -999.0), (-9999.0, 9999.0), (1e6, -999.0), (9.0e5, 9999.0)])
def test_a_mark_is_found_behind_a_value_that_stands_there_once(lone: float, mark: float) -> None:
    field = 280 + np.random.default_rng(0).normal(size=(5, 9, 12)).astype(np.float32)
    field[:, 2:4, 3:5] = mark
    field[2, 7, 7] = lone
    with pytest.raises(InputError, match=rf"here is {mark:g} in 20 cells, far {'below' if mark < 0 else 'above'} all"):
        refuse_suspect(field, "here", "t")
    field[field == np.float32(mark)] = 280
    refuse_suspect(field, "here", "t")  # of one value nobody can tell
