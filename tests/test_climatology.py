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


def make(directory, step_hours, frames, calendar="standard"):
    random = np.random.default_rng(3)
    values = {name: random.normal(size=(frames, NLAT, NLON)).astype(np.float32) for name in ("u", "v")}
    values["v"][random.random(values["v"].shape) < 0.3] = np.nan
    values["v"][:, 2, 3] = np.nan  # never known
    units = {"units": "hours since 2001-01-01", "calendar": calendar}
    coordinates = {
        "time": ("time", np.arange(frames) * step_hours, units),
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
    days = {"360_day": 360, "noleap": 365}[calendar]

    def twelfth(at):
        return int(at * 6 / 24 / days * 12)

    with Store.open(path) as store:
        found = Climatology.of(of(store, ["v", "u"]), TRAINING, GLOBE)
        for at in (0, 5, 333, 700, 1199):
            mean_CYX = found.at(range(at, at + 1))[0].numpy()
            for place, name in enumerate(("v", "u")):
                want = of_hand(values, name, lambda one, at=at: one % 4 == at % 4 and twelfth(one) == twelfth(at))
                seen = ~np.isnan(want)
                np.testing.assert_allclose(mean_CYX[place][seen], want[seen], rtol=1e-5, atol=1e-6)
                assert seen.sum() >= 28
        mean_YDCYX = found.mean_KCYX.reshape(12, 4, 2, NLAT, NLON)
        seen = max(map(twelfth, (699, 1099))) + 1
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


@pytest.mark.parametrize(("step_hours", "kinds"), [(1.0, 96), (3.0, 96), (6.0, 48), (24.0, 12), (730.0, None)])
def test_the_day_is_cut_into_its_hours_or_into_eight_parts(tmp_path, step_hours, kinds):
    path, _ = make(tmp_path, step_hours, 40)
    with Store.open(path) as store:
        kind_F, count = kinds_of(store.layout.time)
        assert kinds is None or count == kinds
        assert kind_F.min() >= 0 and kind_F.max() < count
        if step_hours == 1.0:
            assert kind_F[:24].tolist() == [hour // 3 for hour in range(24)]
