"""Windows against the definition written out in numpy, their order, and reading ahead."""

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from faconv_hpc.data.forcings import FORCINGS, equation_of_time, insolation, solar_declination
from faconv_hpc.data.periods import starts_within, stretches_of
from faconv_hpc.data.samples import Batch, ReadAhead, Windows
from faconv_hpc.data.store import Store
from faconv_hpc.data.variables import Channels, Variable
from faconv_hpc.errors import InputError
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.spatial.grid import Cuts, Tile

NLAT, NLON, FRAMES = 13, 20, 17
ALL_FORCINGS = tuple(FORCINGS)


def make_store(directory: Path, *, missing: bool, hours: np.ndarray | None = None) -> Store:
    random = np.random.default_rng(5)
    hours = np.arange(FRAMES) * 6.0 if hours is None else hours
    shape = (len(hours), NLAT, NLON)
    heat = (280 + 10 * random.normal(size=shape)).astype(np.float32)
    ice = random.normal(size=shape).astype(np.float32)
    if missing:
        ice[:, 3:6, 2:9] = np.nan
        ice[7] = np.nan
        ice[random.random(shape) < 0.3] = np.nan  # others each time
    dims = ("time", "latitude", "longitude")
    dataset = xr.Dataset(
        {"heat": (dims, heat), "ice": (dims, ice), "flat": (dims, np.full(shape, 7, np.float32))},
        {
            "time": ("time", hours, {"units": "hours since 2003-03-01"}),
            "latitude": np.linspace(84, -84, NLAT),
            "longitude": np.arange(NLON) * 18.0,
        },
    )
    dataset.to_netcdf(directory / "source.nc", engine="h5netcdf")
    prepare([directory / "source.nc"], directory / "store", frames_per_file=5)
    return Store.open(directory / "store")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("missing"), missing=True)


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("whole"), missing=False)


def variable_of(store: Store, name: str, **said: object) -> Variable:
    """With the statistics of all frames, and what is said besides."""
    (index,) = store.channel_indices([name])
    numbers = {key: getattr(store, key)[index] for key in ("mean", "std", "tendency_std")}
    return Variable(name=name, units=store.units[index], **{"may_miss": store.has_missing} | numbers | said)


def windows_of(
    store: Store,
    tile: Tile | None = None,
    variables: Sequence[str | Variable] | None = None,
    forcings: Sequence[str] = (),
    frames: range | None = None,
    window: int = 4,
    **said: object,
) -> Windows:
    taken = [variable_of(store, one, **said) if isinstance(one, str) else one for one in variables or store.channels]
    starts = starts_within(stretches_of(store.layout.time, [frames or range(store.frames)]), window)
    tile, grid = tile or Tile((0, NLAT), (0, NLON)), store.grid("zero", "periodic")
    return Windows(store, tile, channels=Channels(taken, forcings), window=window, starts=starts, grid=grid)


def source(store: Store, name: str) -> np.ndarray:
    with xr.open_dataset(store.path.parent / "source.nc", decode_times=False, engine="h5netcdf") as file:
        return file[name].values.astype(np.float64)


def filled(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each cell had last in a window, NaN where it had nothing yet, and 1 over 1 and the frames since then."""
    last, fresh = np.full(values.shape, np.nan), np.zeros(values.shape)
    for at, row, column in np.ndindex(values.shape):
        for ago in range(at + 1):
            if not np.isnan(values[at - ago, row, column]):
                last[at, row, column], fresh[at, row, column] = values[at - ago, row, column], 1 / (1 + ago)
                break
    return last, fresh


def test_a_batch_is_what_its_docstring_says(store: Store) -> None:
    tile = Tile((2, 9), (1, 14))
    windows = windows_of(store, tile, variables=["ice", "heat"], frames=range(1, 16), forcings=["step_hours"])
    assert len(windows) == 11  # starts at 1 to 11; the last takes 11..15
    assert windows.channels.inputs == ("ice", "heat", "fresh_ice", "fresh_heat", "step_hours")
    assert [one.name for one in windows.channels.targets] == ["ice", "heat"]
    batch = windows.read([10, 0, 6])
    assert batch.windows == (10, 0, 6)
    assert batch.inputs_BTCYX.shape == (3, 4, 5, 7, 13)
    assert batch.target_BTCYX.shape == (3, 4, 2, 7, 13)
    assert batch.inputs_BTCYX.dtype == batch.target_BTCYX.dtype == torch.float32
    assert batch.valid_BTCYX is not None
    for sample, start in enumerate((11, 1, 7)):
        frames = slice(start, start + 4)
        assert np.array_equal(batch.year_fraction_BT[sample].numpy(), store.year_fraction[frames])
        for field, name in enumerate(("ice", "heat")):
            index = store.channels.index(name)
            values = source(store, name)[start : start + 5, 2:9, 1:14]
            last, fresh = filled(values)
            begun, came = fresh[:-1] > 0, ~np.isnan(values[1:])
            normal = np.where(begun, (last[:-1] - store.mean[index]) / store.std[index], 0.0)
            change = np.where(begun, np.diff(last, axis=0) / store.tendency_std[index], 0.0)
            got = batch.inputs_BTCYX[sample].numpy()
            np.testing.assert_allclose(got[:, field], normal, atol=3e-5)
            np.testing.assert_allclose(got[:, 2 + field], fresh[:-1], rtol=1e-6)
            assert np.array_equal(batch.valid_BTCYX[sample, :, field].numpy(), begun & came)
            np.testing.assert_allclose(batch.target_BTCYX[sample, :, field], change, atol=3e-5)
            assert (got[:, 4] == 0.25).all()
    assert not batch.valid_BTCYX.all() and len(batch.inputs_BTCYX[:, :, 2].unique()) == 5  # 1, 1/2, 1/3, 1/4 and 0
    assert torch.isfinite(batch.inputs_BTCYX).all()


def test_without_missing_data_there_is_no_mask(whole_store: Store) -> None:
    windows = windows_of(whole_store)
    batch = windows.read([0, 1])
    assert windows.channels.inputs == ("heat", "ice", "flat")
    assert batch.valid_BTCYX is None
    normal = (source(whole_store, "ice") - whole_store.mean[1]) / whole_store.std[1]
    np.testing.assert_allclose(batch.inputs_BTCYX[1, :, 1], normal[1:5], atol=1e-6)


def test_where_data_may_be_missing_and_none_is_all_is_known(whole_store: Store) -> None:
    """A network that was trained on gaps forecasts from fields without."""
    batch = windows_of(whole_store, may_miss=True, variables=["ice"]).read([0])
    assert batch.inputs_BTCYX.shape[2] == 2 and (batch.inputs_BTCYX[:, :, 1] == 1).all()
    assert batch.valid_BTCYX is not None and batch.valid_BTCYX.all()
    assert torch.equal(batch.inputs_BTCYX[:, :, :1], windows_of(whole_store, variables=["ice"]).read([0]).inputs_BTCYX)


def test_a_field_that_never_changes_is_zero_and_not_nan(whole_store: Store) -> None:
    batch = windows_of(whole_store).read([3])
    assert whole_store.tendency_std[2] == 0.0
    assert (batch.inputs_BTCYX[:, :, 2] == 0).all()
    assert (batch.target_BTCYX[:, :, 2] == 0).all()


def test_the_target_carries_one_input_to_the_next(whole_store: Store) -> None:
    batch = windows_of(whole_store, variables=["heat"]).read([2])
    step = batch.target_BTCYX[0, :-1, 0] * whole_store.tendency_std[0] / whole_store.std[0]
    torch.testing.assert_close(batch.inputs_BTCYX[0, :-1, 0] + step, batch.inputs_BTCYX[0, 1:, 0], atol=2e-5, rtol=0)


@pytest.mark.parametrize(("lat", "lon"), [(2, 3), (5, 1), (1, 7)])
def test_tiles_put_together_are_the_whole(store: Store, lat: int, lon: int) -> None:
    grid = store.grid("zero", "periodic")
    cuts = Cuts.even(grid, lat, lon)
    want = windows_of(store, forcings=ALL_FORCINGS).read([4])
    for index in range(cuts.tiles):
        tile = cuts.tile(index)
        got = windows_of(store, tile, forcings=ALL_FORCINGS).read([4])
        rows, columns = tile.slices
        assert torch.equal(got.inputs_BTCYX, want.inputs_BTCYX[..., rows, columns])
        assert torch.equal(got.target_BTCYX, want.target_BTCYX[..., rows, columns])


def test_each_frame_of_a_window_is_read_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[range] = []
    read = Store.read

    def counting(self: Store, frames: range, tile: Tile, channels: list[int]) -> object:
        asked.append(frames)
        return read(self, frames, tile, channels)

    monkeypatch.setattr(Store, "read", counting)
    windows_of(store).read([2])
    assert asked == [range(2, 7)]


@pytest.mark.parametrize(("frames", "window", "want"), [(17, 4, 13), (5, 4, 1), (2, 1, 1)])
def test_number_of_windows(store: Store, frames: int, window: int, want: int) -> None:
    windows = windows_of(store, frames=range(frames), window=window)
    starts = [start for start in range(frames) if start + window < frames]
    assert len(windows) == want == len(starts)
    assert windows.frames_of(want - 1)[-1] < frames
    with pytest.raises(IndexError):
        windows.read([want])


def test_steps_that_differ_a_little_are_steps_and_the_network_may_be_told(tmp_path: Path) -> None:
    store = make_store(tmp_path, missing=False, hours=np.array([0, 7, 14, 21, 29, 36, 43, 50.0]))
    batch = windows_of(store, forcings=["step_hours"]).read([1])
    assert batch.inputs_BTCYX[0, :, -1, 0, 0].tolist() == pytest.approx([7 / 24, 7 / 24, 8 / 24, 7 / 24])


def test_no_window_leads_over_a_gap(tmp_path: Path) -> None:
    hours = np.array([0, 6, 12, 18, 30, 36, 42, 48, 54, 57, 63, 69, 75.0])  # without 24; 57 comes too early
    store = make_store(tmp_path, missing=False, hours=hours)
    windows = windows_of(store, window=2)
    assert [windows.frames_of(index)[0] for index in range(len(windows))] == [0, 1, 4, 5, 6, 9, 10]
    got = windows.read([2]).target_BTCYX[0, 0, 0].numpy()
    heat = source(store, "heat")
    np.testing.assert_allclose(got, (heat[5] - heat[4]) / store.tendency_std[0], rtol=1e-4, atol=1e-4)


def test_times_rounded_to_the_second_count_as_regular(tmp_path: Path) -> None:
    store = make_store(tmp_path, missing=False, hours=np.arange(9) / 3)  # 20 minutes
    assert len(windows_of(store)) == 5


def test_unknown_names_name_the_nearest(store: Store) -> None:
    with pytest.raises(InputError, match=r"no forcing 'insolatoin' in data\.forcings\. Did you mean 'insolation'\?"):
        windows_of(store, forcings=["insolatoin"])
    with pytest.raises(InputError, match=r"no variable 'icee'.*Did you mean 'ice'\?"):
        windows_of(store, variables=["icee"])


def test_a_batch_moves_as_a_whole(store: Store) -> None:
    batch = windows_of(store).read([0])
    moved = batch.to("meta")
    assert moved.valid_BTCYX is not None
    assert {moved.inputs_BTCYX.device.type, moved.valid_BTCYX.device.type} == {"meta"}
    assert moved.windows == (0,)


# Forcings


@pytest.mark.parametrize(
    ("day", "declination_deg"),  # of the Astronomical Almanac, at noon of days in 2023
    [(79, -0.3), (172, 23.44), (266, -0.1), (355, -23.44), (45, -13.1), (320, -18.6)],
)
def test_declination_is_that_of_the_almanac(day: int, declination_deg: float) -> None:
    got = np.rad2deg(solar_declination(np.array([(day - 0.5) / 365])))[0]
    assert got == pytest.approx(declination_deg, abs=0.45)


def test_equation_of_time_has_its_known_extremes() -> None:
    minutes = 60 * equation_of_time(np.arange(365) / 365)
    assert minutes.min() == pytest.approx(-14.2, abs=0.3)  # about 11 February
    assert minutes.max() == pytest.approx(16.4, abs=0.3)  # about 3 November
    assert abs(int(minutes.argmin()) - 41) <= 3
    assert abs(int(minutes.argmax()) - 306) <= 3


@pytest.mark.parametrize("year_fraction", [0.0, 0.21, 0.47, 0.8])
def test_insolation_averages_to_the_closed_form_of_a_day(year_fraction: float) -> None:
    latitude = np.deg2rad(np.array([89.0, 60.0, 23.0, 0.0, -45.0, -80.0]))
    hours = np.arange(0, 24, 0.02)
    got = insolation(np.full(hours.shape, year_fraction), hours, latitude, np.array([0.7])).mean(axis=(0, 2))
    declination = solar_declination(np.array([year_fraction]))[0]
    sunset = np.arccos(np.clip(-np.tan(latitude) * np.tan(declination), -1, 1))
    want = sunset * np.sin(latitude) * np.sin(declination) + np.cos(latitude) * np.cos(declination) * np.sin(sunset)
    np.testing.assert_allclose(got, want / np.pi, atol=1e-5)


def test_the_sun_moves_west() -> None:
    longitude = np.deg2rad(np.arange(360.0))
    at = insolation(np.full(3, 0.22), np.array([0.0, 6.0, 12.0]), np.zeros(1), longitude)[:, 0]
    assert [abs(int(noon) - want) <= 3 for noon, want in zip(at.argmax(axis=1), (180, 90, 0), strict=True)] == [
        True
    ] * 3


def test_forcings_are_of_their_frames(store: Store) -> None:
    windows = windows_of(store, forcings=ALL_FORCINGS)
    inputs = windows.read([6]).inputs_BTCYX[0].numpy()
    named = dict(zip(windows.channels.inputs, inputs.transpose(1, 0, 2, 3), strict=True))
    latitude, longitude = np.deg2rad(store.latitude_deg), np.deg2rad(store.longitude_deg)
    for name, first in (("insolation", 6), ("next_insolation", 7)):
        span = slice(first, first + 4)
        want = insolation(store.year_fraction[span], store.utc_hour[span], latitude, longitude)
        np.testing.assert_allclose(named[name], want, atol=1e-6)
    assert np.allclose(named["sin_latitude"], np.sin(latitude)[None, :, None])
    assert np.allclose(named["cos_longitude"] ** 2 + named["sin_longitude"] ** 2, 1)
    assert np.allclose(np.arctan2(named["sin_longitude"], named["cos_longitude"])[0, 0, :9], longitude[:9])


# Reading ahead


def batch_of(number: int) -> Batch:
    empty = torch.empty(0)
    return Batch(empty, empty, None, empty, (number,), Channels([]))


def test_no_more_is_asked_for_than_there_is() -> None:
    """A depth of a thousand million, as a config may say, takes no longer than what there is."""
    with ReadAhead(batch_of, range(5), 10**9) as ahead:
        assert numbers_of(ahead) == list(range(5))


def numbers_of(ahead: ReadAhead[int]) -> list[int]:
    return [batch.windows[0] for batch in ahead]


@pytest.mark.parametrize("depth", [1, 2, 7, 50])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_batches_come_in_order(depth: int, count: int) -> None:
    with ReadAhead(batch_of, range(count), depth) as ahead:
        assert numbers_of(ahead) == list(range(count))
        assert list(ahead) == []


def test_it_reads_depth_ahead_and_no_further() -> None:
    read: list[int] = []

    def slow(number: int) -> Batch:
        read.append(number)
        return batch_of(number)

    def endless() -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1

    with ReadAhead(slow, endless(), 3) as ahead:
        wait_until(lambda: len(read) == 3)
        time.sleep(0.05)
        assert read == [0, 1, 2]
        next(ahead)
        wait_until(lambda: len(read) == 4)
        assert threading.current_thread() is threading.main_thread()


def test_reading_happens_beside_the_consumer() -> None:
    threads = set()

    def read(number: int) -> Batch:
        threads.add(threading.current_thread().name)
        return batch_of(number)

    with ReadAhead(read, range(5)) as ahead:
        numbers_of(ahead)
    assert len(threads) == 1
    assert threading.current_thread().name not in threads


def test_an_error_is_raised_where_its_batch_is_taken() -> None:
    def read(number: int) -> Batch:
        if number == 2:
            raise InputError("file 2 is damaged")
        return batch_of(number)

    with ReadAhead(read, range(9), 4) as ahead:
        assert next(ahead).windows == (0,)
        assert next(ahead).windows == (1,)
        with pytest.raises(InputError, match="file 2 is damaged"):
            next(ahead)


def test_close_does_not_wait_for_what_nobody_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faconv_hpc.data.samples.CLOSE_TIMEOUT_S", 0.2)
    release = threading.Event()

    def stuck(number: int) -> Batch:
        release.wait(30)
        return batch_of(number)

    ahead = ReadAhead(stuck, range(100), 5)
    started = time.monotonic()
    ahead.close()
    ahead.close()
    assert time.monotonic() - started < 10
    with pytest.raises(StopIteration):
        next(ahead)
    release.set()


def test_after_close_no_read_is_under_way(store: Store) -> None:
    windows = windows_of(store)
    ahead = ReadAhead(windows.read, ([index % 13] for index in range(10_000)), 4)
    next(ahead)
    ahead.close()
    store.close()  # would race with a read under way
    assert windows.read([0]).windows == (0,)


def wait_until(condition: object) -> None:
    for _ in range(6000):
        if condition():  # type: ignore[operator]
            return
        time.sleep(0.01)
    raise AssertionError("nothing happened for a minute")
