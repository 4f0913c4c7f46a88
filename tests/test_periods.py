"""Periods: dates as xarray understands them, gaps, and windows that cross none."""

import cftime
import numpy as np
import pytest
import xarray as xr
import yaml

from faconv_hpc.config import PeriodsConfig
from faconv_hpc.data.periods import frames_within, mask_of, spans_of, starts_before, starts_within, stretches_of
from faconv_hpc.data.times import EPOCH_UNITS, TimeAxis
from faconv_hpc.errors import InputError

DAYS = {"standard": 31, "360_day": 30, "noleap": 31}


def axis_of(hours, calendar="standard", since="1999-12-30"):
    dates = cftime.num2date(hours, f"hours since {since}", calendar=calendar)
    seconds = cftime.date2num(dates, EPOCH_UNITS, calendar=calendar)
    return TimeAxis(np.rint(seconds).astype(np.int64), calendar)


@pytest.mark.parametrize("calendar", DAYS)
@pytest.mark.parametrize(
    "text",
    [
        "2000", "1999", "2000-01", "2000-02", "2000-01-01", "2000-01-01T06", "2000-01-01T07:30", "2000/2001", "/1999",
        "2000-12-30/", "1999-12-30 23:59:59/2000-01-01 00:00:00", "2000-02-28/2000-03-01T11:59", "/2000-02-28T18",
        "2000-12/2001-01-02", "1999-12-30T00:00:01/1999-12-30T05:59:59",
    ],
)  # fmt: skip
def test_a_range_of_dates_is_what_xarray_takes_it_for(text, calendar):
    axis = axis_of(np.arange(4 * 400) * 6.0, calendar)
    index = xr.CFTimeIndex(cftime.num2date(axis.seconds, EPOCH_UNITS, calendar=calendar))
    frames = xr.DataArray(np.arange(len(axis)), {"time": index}, "time")
    first, _, last = text.partition("/") if "/" in text else (text, "", text)
    want = frames.sel(time=slice(first.replace("T", " ") or None, last.replace("T", " ") or None)).values
    got = [frame for span in frames_within(axis, [text]) for frame in span]
    assert got == want.tolist()


def test_several_ranges_are_spans_in_order_and_no_frame_counts_twice():
    axis = axis_of(np.arange(40) * 6.0)
    ranges = ["2000-01-05/", "1999-12-31", "1999-12-31T12/2000-01-01T06", "2000-01-04"]
    assert frames_within(axis, ranges) == (range(4, 10), range(20, 40))
    assert frames_within(axis, []) == frames_within(axis, ["2005"]) == ()


@pytest.mark.parametrize(
    ("text", "calendar", "told"),
    [
        ("2001-02-29/", "standard", r"'2001-02-29/' names 2001-02-29, which is no date of the calendar standard"),
        ("/2000-01-31", "360_day", r"names 2000-01-31, which is no date of the calendar 360_day"),
        ("2001/2000", "noleap", r"'2001/2000' ends before it begins"),
        ("2000-13", "standard", r"names 2000-13, which is no date"),
    ],
)
def test_a_date_that_is_none_is_refused(text, calendar, told):
    with pytest.raises(InputError, match=told):
        frames_within(axis_of(np.arange(3.0), calendar), [text])


@pytest.mark.parametrize("text", ["", "/", "99", "2000-1", "2000/2001/2002", "last year", "2000-01-01T6"])
def test_what_is_no_range_of_dates_is_said(text):
    with pytest.raises(ValueError, match=r"a range of dates such as 1979/2015, .* got '"):
        PeriodsConfig(train=text)


def test_dates_as_yaml_has_them():
    tree = yaml.safe_load("train: [1979/1999, 2003]\ntest: 2001-02-03")
    assert PeriodsConfig(**tree) == PeriodsConfig(train=("1979/1999", "2003"), test=("2001-02-03",))
    with pytest.raises(ValueError, match="valid string"):
        PeriodsConfig(train=[[1979]])


@pytest.mark.parametrize(
    ("hours", "gaps"),
    [
        (np.delete(np.arange(12) * 1.0, 5), [5]),
        (np.delete(np.arange(12) * 6.0, [3, 4, 9]), [3, 7]),
        ([0, 7, 14, 21, 29, 36, 43, 51], []),
        ([0, 6, 12, 15, 18, 24, 30], [3, 4]),
        ([0.0], []),
        ([0, 606], []),
    ],
)
def test_where_times_are_missing_or_crowd_is_a_gap(hours, gaps):
    assert axis_of(np.array(hours)).gaps.tolist() == gaps


@pytest.mark.parametrize("calendar", DAYS)
@pytest.mark.parametrize("months", [1, 3, 12])
def test_months_seasons_and_years_have_no_gaps_but_for_those_that_miss(calendar, months):
    dates = [cftime.datetime(1990 + n // 12, n % 12 + 1, 1, calendar=calendar) for n in range(0, 120, months)]
    seconds = cftime.date2num(dates, EPOCH_UNITS, calendar=calendar).astype(np.int64)
    assert not len(TimeAxis(seconds, calendar).gaps)
    assert TimeAxis(np.delete(seconds, 4), calendar).gaps.tolist() == [4]


def test_windows_are_those_that_lie_in_one_stretch(seed=3):
    """Against the definition, on random gaps and periods."""
    random = np.random.default_rng(seed)
    for _ in range(50):
        frames, window = int(random.integers(2, 40)), int(random.integers(1, 6))
        hours = np.cumsum(random.choice([1.0, 1.0, 1.0, 1.0, 1.0, 3.0], size=frames))
        inside, targets = random.random((2, frames)) < 0.8
        axis = axis_of(hours)
        whole = np.diff(hours) == np.median(np.diff(hours))

        def fits(start, allowed, window=window, whole=whole):
            return whole[start : start + window].all() and allowed[start : start + window + 1].all()

        stretches = stretches_of(axis, spans_of(inside))
        assert all(mask_of(stretches, frames) == inside)
        want = [start for start in range(frames - window) if fits(start, inside)]
        assert starts_within(stretches, window).tolist() == want
        everything = np.ones(frames, dtype=bool)
        want = [start for start in range(frames - window) if fits(start, everything) and targets[start + window]]
        assert starts_before(stretches_of(axis, [range(frames)]), targets, window).tolist() == want
