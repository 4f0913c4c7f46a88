"""Times and grids of sources: calendars, units, what does not fit together."""

import os
from itertools import permutations
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray as xr

from faconv_hpc.data.store import Store
from faconv_hpc.data.times import TimeAxis, decode_times
from faconv_hpc.errors import InputError
from faconv_hpc.prepare.preparation import prepare
from sources import DIMS, FRAMES, NLAT, NLON, dataset, save, values, whole

# Times


def with_time(numbers: Any, **attributes: str) -> xr.Dataset:
    return dataset(time=("time", numbers, attributes))


def test_calendar_of_360_days(tmp_path: Path) -> None:
    data = with_time(np.arange(FRAMES) * 45.0, units="days since 2000-01-01", calendar="360_day")
    prepare([save(data, tmp_path / "s.nc")], tmp_path / "o")
    store = Store.open(tmp_path / "o")
    assert store.calendar == "360_day"
    assert np.allclose(store.year_fraction, [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0])
    with xr.open_dataset(
        tmp_path / "o" / "fields-00000.nc", engine="h5netcdf", decode_times=xr.coders.CFDatetimeCoder(use_cftime=True)
    ) as file:
        assert str(file["time"].values[8]) == "2001-01-01 00:00:00"
        assert str(file["time"].values[2]) == "2000-04-01 00:00:00"


@pytest.mark.parametrize(
    ("calendar", "length"),
    [("noleap", 365), ("standard", 366), ("proleptic_gregorian", 366), ("julian", 366), ("all_leap", 366)],
)
def test_year_fraction_knows_leap_years(calendar: str, length: int) -> None:
    axis = decode_times(np.array([0.0, 100.25]), "days since 2004-01-01", calendar, "here")
    assert axis.year_fraction.tolist() == pytest.approx([0, 100.25 / length])
    assert axis.utc_hour.tolist() == [0, 6]


def test_times_before_1970_and_in_year_one() -> None:
    axis = decode_times(np.array([0, 12]), "hours since 0001-07-01 03:00", "proleptic_gregorian", "here")
    assert axis.utc_hour.tolist() == [3, 15]
    assert axis.year_fraction[0] == pytest.approx((181 + 3 / 24) / 365)
    assert isinstance(axis, TimeAxis)
    assert axis.label(0) == "0001-07-01 03:00:00"


def test_synonyms_of_calendars_are_one(tmp_path: Path) -> None:
    one, two = dataset().isel(time=slice(0, 4)), dataset().isel(time=slice(4, 9))
    one["time"].attrs["calendar"] = "gregorian"
    prepare([save(one, tmp_path / "a.nc"), save(two, tmp_path / "b.nc")], tmp_path / "o")
    assert Store.open(tmp_path / "o").calendar == "standard"


def test_times_without_units_are_asked_for(tmp_path: Path) -> None:
    data = dataset({"t": (("time_index", "lat", "lon"), values())}).drop_vars("time")
    data = data.assign_coords(time_index=np.arange(FRAMES) * 7).assign_attrs(time_units="hours since 1940-01-01 00:00")
    source = save(data, tmp_path / "s.nc")
    with pytest.raises(
        InputError,
        match=r"no time found for variable 't' .*'time_units' says 'hours since 1940.*--time-coordinate time_index",
    ):
        prepare([source], tmp_path / "o")
    with pytest.raises(
        InputError, match=r"have no units: \[0, 7, 14\].*'time_units' says 'hours since 1940.*--time-units"
    ):
        prepare([source], tmp_path / "o", time_coordinate="time_index")
    prepare([source], tmp_path / "o", time_coordinate="time_index", time_units="hours since 1940-01-01")
    store = Store.open(tmp_path / "o")
    assert store.layout.time.label(1) == "1940-01-01 07:00:00"
    assert np.allclose(np.diff(store.time_hours), 7)


@pytest.mark.parametrize(
    ("numbers", "attributes", "match"),
    [
        (
            [0, 6, 6],
            {"units": "hours since 2001-01-01"},
            r"times must increase.*frame 1 is at 2001-01-01 06:00:00 and frame 2",
        ),
        ([0, 6, 3], {"units": "hours since 2001-01-01"}, "times must increase"),
        ([0, 6, np.nan], {"units": "hours since 2001-01-01"}, "must be finite numbers"),
        ([0, 6, 12], {"units": "fortnights since 2001-01-01"}, r"cannot be read as 'fortnights since .*--time-units"),
        (
            [0, 1, 2],
            {"units": "months since 2001-01-01"},
            r"month has no fixed length in .*'standard'.*xarray\.date_range",
        ),
        ([0, 6, 12], {"units": "hours since 0000-01-01"}, r"cannot be read as 'hours since 0000.*--calendar"),
        ([0, 6, 12], {"units": "hours since 2001-01-01", "calendar": "maya"}, r"in calendar 'maya'"),
        ([0, 6, 12], {}, r"have no units: \[0.*--time-units \"hours since"),
    ],
)
def test_times_that_cannot_be(tmp_path: Path, numbers: list[float], attributes: dict[str, str], match: str) -> None:
    data = dataset({"u": (DIMS, values()[:3])}, time=("time", np.array(numbers, dtype=np.float64), attributes))
    with pytest.raises(InputError, match=match):
        prepare([save(data, tmp_path / "s.nc")], tmp_path / "o")
    assert not (tmp_path / "o").exists()


# Sources that do not fit together


def test_grids_must_agree(tmp_path: Path) -> None:
    one = save(dataset()[["u"]], tmp_path / "u.nc")
    other = save(dataset(lon=("lon", np.arange(NLON) * 22.5 + 1, {"units": "degrees_east"}))[["v"]], tmp_path / "v.nc")
    with pytest.raises(
        InputError,
        match=r"share one grid, but the longitude_deg of 'u' .* from 0 to 337\.5, those of 'v' .* from 1 to 338\.5",
    ):
        prepare([one, other], tmp_path / "o")
    prepare([one, other], tmp_path / "o", variables=["u"])  # as the message says


def test_times_must_agree(tmp_path: Path) -> None:
    one = save(dataset()[["u"]], tmp_path / "u.nc")
    other = save(dataset()[["v"]].isel(time=slice(0, 8)), tmp_path / "v.nc")
    with pytest.raises(
        InputError, match=r"same times, but 'u' in .*u\.nc has 9 from 2001-01-01 00:00:00 .*'v' in .*v\.nc has 8"
    ):
        prepare([one, other], tmp_path / "o")


def test_overlapping_times_are_refused(tmp_path: Path) -> None:
    one = save(dataset().isel(time=slice(0, 5)), tmp_path / "1.nc")
    other = save(dataset().isel(time=slice(4, 9)), tmp_path / "2.nc")
    with pytest.raises(
        InputError, match=r"times of 'u' overlap: .*1\.nc ends at 2001-01-02 00:00:00, .*2\.nc starts at"
    ):
        prepare([other, one], tmp_path / "o")


def test_different_calendars_are_refused(tmp_path: Path) -> None:
    one = save(dataset().isel(time=slice(0, 5)), tmp_path / "1.nc")
    later = dataset().isel(time=slice(5, 9))
    later["time"].attrs["calendar"] = "noleap"
    with pytest.raises(InputError, match=r"different calendars: noleap, standard\. .*--calendar"):
        prepare([one, save(later, tmp_path / "2.nc")], tmp_path / "o")


def test_dates_before_1582_are_not_taken_for_those_of_another_calendar(tmp_path: Path) -> None:
    """In whatever order the sources come: of two calendars, one of which begins before they agree."""
    paths = []
    for name, calendar, year in (("a", "proleptic_gregorian", 1900), ("b", "proleptic_gregorian", 1500)):
        paths.append(dated(tmp_path / f"{name}.nc", calendar, year))
    paths.append(dated(tmp_path / "c.nc", "standard", 1950))
    for order in permutations(paths):
        with pytest.raises(InputError, match="calendars"):
            prepare(order, tmp_path / "o", sequences=True)
    prepare([paths[0], paths[2]], tmp_path / "o", sequences=True)
    assert Store.open(tmp_path / "o").calendar == "standard"


def dated(path: Path, calendar: str, year: int) -> Path:
    data = dataset()
    data["time"].attrs.update(units=f"hours since {year}-01-01", calendar=calendar)
    return save(data, path)


def test_unknown_variables_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no variable 'uu' in the sources .*Did you mean 'u'\? There are: u, v"):
        prepare([save(dataset(), tmp_path / "s.nc")], tmp_path / "o", variables=["uu"])


def test_grids_that_are_not_regular_are_refused(tmp_path: Path) -> None:
    flat = xr.Dataset(
        {"t": (("time", "y", "x"), values())},
        {
            "time": ("time", np.arange(FRAMES), {"units": "hours since 2001-01-01"}),
            "lat": (("y", "x"), values()[0], {"units": "degrees_north"}),
            "lon": (("y", "x"), values()[0], {"units": "degrees_east"}),
        },
    )
    with pytest.raises(
        InputError,
        match=r"'t' in .* not on a regular latitude/longitude grid: 'lat' has dims .*with xarray: `ds\.interp",
    ):
        prepare([save(flat, tmp_path / "s.nc")], tmp_path / "o")
    broken = dataset(lat=("lat", [0.0, 5, 3, 8, 9, 10, 11, 12, 13, 14, 15], {"units": "degrees_north"}))
    with pytest.raises(InputError, match=r"source .*b\.nc: latitudes must run one way"):
        prepare([save(broken, tmp_path / "b.nc")], tmp_path / "o")


def test_points_and_rotated_grids_are_refused(tmp_path: Path) -> None:
    time = ("time", np.arange(3), {"units": "hours since 2001-01-01"})
    stations = xr.Dataset(
        {"t": (("time", "station"), np.zeros((3, 4)))},
        {"time": time, "lat": ("station", np.arange(4.0)), "lon": ("station", np.arange(4.0))},
    )
    with pytest.raises(InputError, match=r"'t' in .* both run along 'station'.*Regrid"):
        prepare([save(stations, tmp_path / "s.nc")], tmp_path / "o")
    rotated = xr.Dataset(
        {"t": (("time", "rlat", "rlon"), np.zeros((3, 4, 5)))},
        {"time": time, "rlat": ("rlat", np.arange(4.0), {"standard_name": "grid_latitude", "units": "degrees"})},
    )
    with pytest.raises(InputError, match=r"'t' in .* not on a regular latitude/longitude grid: 'rlat'"):
        prepare([save(rotated, tmp_path / "r.nc")], tmp_path / "o")


@pytest.mark.parametrize("dim", ["step", "number", "lead"])
def test_members_and_lead_times_are_no_levels(tmp_path: Path, dim: str) -> None:
    lead = {"lead": ("lead", [0, 6], {"standard_name": "forecast_period"})} if dim == "lead" else {}
    data = dataset({"t": (("time", dim, "lat", "lon"), values(shape=(FRAMES, 2, NLAT, NLON)))}, **lead)
    with pytest.raises(InputError, match=rf"no members or lead times\. Take one of '{dim}', .*--select {dim}=0"):
        prepare([save(data, tmp_path / "s.nc")], tmp_path / "o")


def test_coordinates_are_found_by_axis(tmp_path: Path) -> None:
    data = xr.Dataset(
        {"t": (("a", "b", "c"), values())},
        {
            "a": ("a", np.arange(FRAMES), {"axis": "T", "units": "days since 2001-01-01"}),
            "reference": ("a", np.zeros(FRAMES), {"units": "days since 1900-01-01"}),
            "b": ("b", np.linspace(-75, 75, NLAT), {"axis": "Y", "units": "degrees"}),
            "c": ("c", np.arange(NLON) * 22.5, {"axis": "X", "units": "degrees"}),
        },
    )
    prepare([save(data, tmp_path / "s.nc")], tmp_path / "o")
    fields, _, store = whole(tmp_path / "o")
    assert np.array_equal(fields[:, 0], values()[:, ::-1])
    assert store.layout.time.label(1) == "2001-01-02 00:00:00"


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"time has no times at all"):
        prepare([save(dataset().isel(time=slice(0, 0)), tmp_path / "s.nc")], tmp_path / "o")


def test_a_source_damaged_inside_is_named_and_the_run_goes_on_when_it_is_whole(tmp_path: Path) -> None:
    encoding = {"u": {"chunksizes": (1, NLAT, NLON), "zlib": True}}
    source = save(dataset()[["u"]], tmp_path / "s.nc", encoding=encoding)
    good = source.read_bytes()
    times = source.stat()
    with h5py.File(source) as file:
        chunk = file["u"].id.get_chunk_info(7)
    bad = bytearray(good)
    bad[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    source.write_bytes(bad)
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(
        InputError, match=r"frames 6 to 8 of variable 'u' in .*s\.nc cannot be read .*damaged: fetch it"
    ):
        prepare([source], tmp_path / "o", frames_per_file=2)
    source.write_bytes(good)
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert prepare([source], tmp_path / "o", frames_per_file=2).kept_files == 3
    assert np.array_equal(whole(tmp_path / "o")[0][:, 0], values(1))


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    source = save(dataset(), tmp_path / "s.nc")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"output .*file/o cannot be written: Not a directory"):
        prepare([source], tmp_path / "file" / "o")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "fields-00001.nc").mkdir()  # a rename onto it fails
    with pytest.raises(InputError, match=r"cannot write to .*run the same command again"):
        prepare([source], tmp_path / "o", frames_per_file=2)


def test_nothing_to_take_is_refused(tmp_path: Path) -> None:
    data = xr.Dataset({"x": ("station", np.arange(4.0))})
    with pytest.raises(InputError, match="no field with time, latitude and longitude in"):
        prepare([save(data, tmp_path / "s.nc")], tmp_path / "o")


@pytest.mark.parametrize("value", [np.inf, 9.96921e36, 1e20, -1e34])
def test_fill_values_that_nobody_declared_are_refused(tmp_path: Path, value: float) -> None:
    data = values()
    data[5, 3, 2] = value
    source = save(dataset({"t": (DIMS, data)}), tmp_path / "s.nc")
    with pytest.raises(
        InputError,
        match=r"'t' is .* at 2001-01-02 06:00:00 \(frame 5\), latitude 30, longitude 45: no field.*_FillValue",
    ):
        prepare([source], tmp_path / "o", frames_per_file=2)
    with pytest.raises(InputError, match="not finished"):
        Store.open(tmp_path / "o")


def test_a_variable_that_is_all_missing_is_refused(tmp_path: Path) -> None:
    source = save(dataset({"t": (DIMS, values() * np.nan), "u": (DIMS, values())}), tmp_path / "s.nc")
    with pytest.raises(InputError, match=r"'t' has no valid cell in any of 9 frames.*--variables"):
        prepare([source], tmp_path / "o")
    prepare([source], tmp_path / "o", variables=["u"])  # the same directory, another request
    assert Store.open(tmp_path / "o").channels == ("u",)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"GRIB\0\0\0\2" + b"\0" * 100, r"is GRIB that cannot be read .*Fetch it again"),
        (b"CDF\x05" + b"\0" * 100, r"starts with .* no NetCDF \(3, 4\).*CDF-5: convert it with `pip install netCDF4`"),
        (b"latitude,longitude\n", r"starts with b'latitude'.*Convert it first"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, r"looks like h5netcdf data but cannot be read .*Check that it is whole"),
        (b"CDF\x01" + b"\0" * 3, r"looks like scipy data but cannot be read"),
        (b"", r"starts with b''"),
    ],
)
def test_files_of_no_use(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "source"
    path.write_bytes(content)
    with pytest.raises(InputError, match=match):
        prepare([path], tmp_path / "o")


def test_paths_of_no_use(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"source .*nothing does not exist"):
        prepare([tmp_path / "nothing"], tmp_path / "o")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"is a directory but no zarr data: none of zarr\.json"):
        prepare([tmp_path / "empty"], tmp_path / "o")
    source = save(dataset(), tmp_path / "s.nc")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, but a store is a directory"):
        prepare([source], tmp_path / "file")
    with pytest.raises(InputError, match="at least one frame, got 0"):
        prepare([source], tmp_path / "o", frames_per_file=0)
    with pytest.raises(InputError, match="levels 1 to 9, got 11"):
        prepare([source], tmp_path / "o", compression=11)
    with pytest.raises(InputError, match="11 rows cannot be cut over 12 ranks"):
        prepare([source], tmp_path / "o", mesh=(12, 1))
