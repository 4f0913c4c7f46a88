"""The mean at a time of year and day: equal to NumPy's over the frames of training, on every tile."""

import numpy as np
import pytest
import xarray as xr

from faconv_hpc.data import climatology
from faconv_hpc.data.climatology import Climatology, kinds_of
from faconv_hpc.data.fields import StoreFields
from faconv_hpc.data.store import Store
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.spatial.grid import Tile
from sources import save

NLAT, NLON = 5, 7
DIMS = ("time", "lat", "lon")
GLOBE = Tile((0, NLAT), (0, NLON))
TRAINING = (range(700), range(760, 1100))


def make(directory, step_hours, frames, calendar="standard", hours=None):
    random = np.random.default_rng(3)
    values = {name: random.normal(size=(frames, NLAT, NLON)).astype(np.float32) for name in ("u", "v")}
    values["v"][random.random(values["v"].shape) < 0.3] = np.nan
    values["v"][:, 2, 3] = np.nan  # never known
    units = {"units": "hours since 2001-01-01", "calendar": calendar}
    coordinates = {
        "time": ("time", np.arange(frames) * step_hours if hours is None else hours, units),
        "lat": ("lat", np.linspace(60, -60, NLAT), {"units": "degrees_north"}),
        "lon": ("lon", np.arange(NLON) * 360 / NLON, {"units": "degrees_east"}),
    }
    source = save(xr.Dataset({name: (DIMS, value) for name, value in values.items()}, coordinates), directory / "a.nc")
    prepare([source], directory / "store", frames_per_file=113)
    return directory / "store", values


def of(store, names):
    return StoreFields(store, tuple(names), range(store.frames))


def of_hand(values, name, kind):
    """Mean over the frames of training of one kind."""
    return np.nanmean(values[name][[one for span in TRAINING for one in span if kind(one)]].astype(np.float64), axis=0)


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@pytest.mark.parametrize("calendar", ["360_day", "noleap"])
def test_it_is_the_mean_of_what_is_known_at_the_same_time_of_year_and_day(tmp_path, monkeypatch, calendar):
    """Every 6 hours over ten months: 48 means. For the rest of the year it is that of the ten at the same hour."""
    monkeypatch.setattr(climatology, "FRAMES", 10**6)
    path, values = make(tmp_path, 6.0, 1200, calendar)
    lengths = {"360_day": [30] * 12, "noleap": [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]}[calendar]

    def month(at):
        return int(np.searchsorted(np.cumsum(lengths), at // 4, side="right"))

    with Store.open(path) as store:
        found = Climatology.of(of(store, ["v", "u"]), TRAINING, GLOBE)
        for at in (0, 5, 333, 700, 1199):
            mean_CYX = found.at(range(at, at + 1))[0].numpy()
            for place, name in enumerate(("v", "u")):
                want = of_hand(values, name, lambda one, at=at: one % 4 == at % 4 and month(one) == month(at))
                seen = ~np.isnan(want)
                np.testing.assert_allclose(mean_CYX[place][seen], want[seen], rtol=1e-5, atol=1e-6)
                assert seen.sum() >= 28
        mean_YDCYX = found.mean_KCYX.reshape(12, 4, 2, NLAT, NLON)
        seen = max(map(month, (699, 1099))) + 1
        assert seen < 11
        np.testing.assert_allclose(mean_YDCYX[11], np.nanmean(mean_YDCYX[:seen], axis=0), rtol=1e-5, atol=1e-6)
        assert np.isnan(mean_YDCYX[:, :, 0, 2, 3]).all() and not np.isnan(mean_YDCYX[:, :, 1]).any()


def test_a_tile_has_its_part_of_it_to_the_last_bit(tmp_path):
    path, _ = make(tmp_path, 6.0, 1200)
    with Store.open(path) as store:
        whole = Climatology.of(of(store, ["u", "v"]), TRAINING, GLOBE).mean_KCYX
        for tile in (Tile((0, 3), (0, 7)), Tile((3, 5), (2, 5))):
            np.testing.assert_array_equal(
                Climatology.of(of(store, ["u", "v"]), TRAINING, tile).mean_KCYX, whole[..., *tile.slices]
            )


def test_of_many_frames_some_count_and_none_that_is_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(climatology, "FRAMES", 5)
    path, values = make(tmp_path, 6.0, 1200)
    with Store.open(path) as store:
        found = Climatology.of(of(store, ["u"]), TRAINING, GLOBE).at(range(4, 5))[0, 0].numpy()
        frames = [at for at in range(0, 122, 4) if store.year_fraction[at] < 1 / 12]
        some = [frames[round(place)] for place in np.linspace(0, len(frames) - 1, 5)]
        np.testing.assert_allclose(found, values["u"][some].mean(0), rtol=1e-5, atol=1e-6)
        assert np.isnan(Climatology.of(of(store, ["u"]), [], GLOBE).mean_KCYX).all()


@pytest.mark.parametrize("stamped", ["in the middle", "at the first"])
def test_of_months_the_hours_do_not_count(tmp_path, stamped):
    """A month's middle is at another hour every year; its first day need not be in the same twelfth of the year."""
    days = np.diff(np.arange("2001-01", "2006-02", dtype="datetime64[M]").astype("datetime64[D]")).astype(int)
    first = np.cumsum([0, *days[:-1]]) * 24.0
    hours = first if stamped == "at the first" else (np.arange(60) + 0.5) * 730.5
    path, values = make(tmp_path, None, 60, hours=hours)
    with Store.open(path) as store:
        found = Climatology.of(of(store, ["u"]), [range(48)], GLOBE)
        for at in range(60):
            want = values["u"][at % 12 : 48 : 12].mean(0)  # of four years
            np.testing.assert_allclose(found.at(range(at, at + 1))[0, 0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("step_hours", "kinds"), [(1.0, 96), (3.0, 96), (6.0, 48), (24.0, 12), (730.0, 12)])
def test_the_day_is_cut_into_its_hours_or_into_eight_parts(tmp_path, step_hours, kinds):
    path, _ = make(tmp_path, step_hours, 40)
    with Store.open(path) as store:
        kind_F, count = kinds_of(store.layout.time)
        assert count == kinds
        assert kind_F.min() >= 0 and kind_F.max() < count
        if step_hours == 1.0:
            assert kind_F[:24].tolist() == [hour // 3 for hour in range(24)]
