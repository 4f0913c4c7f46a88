"""Synthetic fields: the same whatever the slab, smooth at the poles, travelling, in season."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from faconv_hpc.data.layout import are_synthetic
from faconv_hpc.data.store import Store
from faconv_hpc.errors import InputError
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.prepare.synthetic import SyntheticOptions, synthesise
from faconv_hpc.prepare.writer import write_store
from faconv_hpc.spatial.grid import Tile

OPTIONS = SyntheticOptions(nlat=19, nlon=30, channels=2, frames=13, seed=4)


def fields_of(path: Path) -> np.ndarray:
    with Store.open(path) as store:
        nlat, nlon = store.layout.grid_shape
        fields, valid = store.read(range(store.frames), Tile((0, nlat), (0, nlon)), range(len(store.channels)))
    assert valid is None
    return fields


def test_a_store_of_the_size_asked_for(tmp_path: Path) -> None:
    summary = synthesise(tmp_path / "s", OPTIONS, mesh=(2, 3), frames_per_file=5)
    assert (summary.frames, summary.grid_shape, summary.files) == (13, (19, 30), 3)
    store = Store.open(tmp_path / "s")
    assert store.channels == ("wave_0", "wave_1")
    assert np.allclose(np.diff(store.time_hours), 6)
    assert store.latitude_deg[0] == pytest.approx(90 - 90 / 19)
    store.grid("pole", "periodic")
    fields = fields_of(tmp_path / "s")
    assert fields.shape == (13, 2, 19, 30)
    assert 0.3 < fields.std() < 3


@pytest.mark.parametrize("slab_bytes", [1, 2000, 10**9])
@pytest.mark.parametrize("frames_per_file", [1, 4, 100])
def test_slabs_and_files_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slab_bytes: int, frames_per_file: int
) -> None:
    synthesise(tmp_path / "want", OPTIONS)
    slabs = partial(write_store, slab_bytes=slab_bytes)
    monkeypatch.setattr("faconv_hpc.prepare.synthetic.write_store", slabs)
    synthesise(tmp_path / "s", OPTIONS, mesh=(3, 2), frames_per_file=frames_per_file)
    assert np.array_equal(fields_of(tmp_path / "s"), fields_of(tmp_path / "want"))


def test_stores_say_that_they_are_synthetic(tmp_path: Path) -> None:
    """So do those that are prepared from them alone; not where a source is of another kind."""
    for name, first in (("a", "2000-01-01"), ("b", "2000-01-02")):
        synthesise(tmp_path / name, SyntheticOptions(nlat=9, nlon=12, frames=4, start=first))
    with xr.open_dataset(tmp_path / "a" / "fields-00000.nc", engine="h5netcdf") as file:
        u = file.fields.sel(channel="wave_0", drop=True).assign_attrs(units="m s**-1")
        xr.Dataset({"u": u}).to_netcdf(tmp_path / "u.nc", engine="h5netcdf")
    prepare([tmp_path / "a", tmp_path / "b"], tmp_path / "joined")
    prepare([tmp_path / "a", tmp_path / "u.nc"], tmp_path / "mixed")
    assert all(are_synthetic([tmp_path / name]) for name in ("a", "b", "joined", "a/fields-00000.nc"))
    assert are_synthetic([tmp_path / "a", tmp_path / "joined"])
    (tmp_path / "named_alike").mkdir()
    (tmp_path / "u.nc").rename(tmp_path / "named_alike" / "store.nc")  # which is no store's
    others: list[list[str]] = [["mixed"], ["u.nc"], ["a", "u.nc"], [], ["named_alike/store.nc"], ["named_alike"]]
    assert not any(are_synthetic([tmp_path / name for name in names]) for names in others)
    prepare([tmp_path / "named_alike" / "store.nc"], tmp_path / "of_it")


def test_seed_decides(tmp_path: Path) -> None:
    made = {}
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        synthesise(tmp_path / name, SyntheticOptions(nlat=9, nlon=12, frames=3, seed=seed))
        made[name] = fields_of(tmp_path / name)
    assert np.array_equal(made["a"], made["b"])
    assert not np.allclose(made["a"], made["c"], atol=0.1)
    assert not np.allclose(made["a"][:, 0], made["a"][:, 1], atol=0.1)


def test_fields_are_smooth_at_the_poles_and_around(tmp_path: Path) -> None:
    synthesise(tmp_path / "s", SyntheticOptions(nlat=180, nlon=360, channels=1, frames=1, noise=0))
    field = fields_of(tmp_path / "s")[0, 0]
    across_pole = np.abs(field[0] - np.roll(field[0], 180))
    assert np.abs(np.diff(field, axis=0)).max() < 0.15
    assert across_pole.max() < 0.1  # one degree apart, on the other side
    assert np.abs(field[:, 0] - field[:, -1]).max() < 0.2


def test_waves_are_those_of_whole_numbers_and_travel(tmp_path: Path) -> None:
    synthesise(tmp_path / "s", SyntheticOptions(nlat=5, nlon=36, channels=1, frames=8, step_hours=1, noise=0))
    equator = np.fft.rfft(fields_of(tmp_path / "s")[:, 0, 2].astype(np.float64)) / 18
    assert (np.abs(equator[:, 1:7]) > 0.1).all()
    assert np.abs(equator[:, 7:]).max() < 1e-6
    turns = np.diff(np.unwrap(np.angle(equator[:, 1:7]), axis=0), axis=0)
    assert np.allclose(turns, turns[0], atol=1e-5)  # at a constant speed
    hours_around = 2 * np.pi * np.arange(1, 7) / np.abs(turns[0])
    assert ((hours_around > 95) & (hours_around < 961)).all()


def test_it_is_summer_in_the_north_in_july(tmp_path: Path) -> None:
    synthesise(tmp_path / "s", SyntheticOptions(nlat=19, nlon=36, channels=1, frames=12, step_hours=730, noise=0))
    zonal = fields_of(tmp_path / "s")[:, 0].mean(axis=2)
    assert zonal[6, 3] > 0.3 > -0.3 > zonal[0, 3]
    assert np.allclose(zonal[:, 3], -zonal[:, -4], atol=1e-5)


def test_noise_is_white_and_as_strong_as_asked(tmp_path: Path) -> None:
    made = []
    for name, noise in (("noisy", 0.5), ("calm", 0.0)):
        synthesise(tmp_path / name, SyntheticOptions(nlat=40, nlon=50, channels=2, frames=4, noise=noise))
        made.append(fields_of(tmp_path / name).astype(np.float64))
    noise = (made[0] - made[1]) / 0.5
    assert noise.mean() == pytest.approx(0, abs=0.03)
    assert noise.std() == pytest.approx(1, abs=0.02)
    for axis in range(4):  # nothing is repeated along any dim
        shifted = np.roll(noise, 1, axis=axis)
        assert abs((noise * shifted).mean()) < 0.04


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"nlat": 0}, r"--nlat is 0; a store has at least 1"),
        ({"frames": -1}, r"--frames is -1"),
        ({"step_hours": 0}, r"--step-hours is 0 .* at least a second"),
        ({"noise": -1}, r"--noise -1"),
        ({"step_hours": float("nan")}, r"--step-hours is nan"),
    ],
)
def test_options_that_make_no_sense(wrong: dict[str, float], match: str) -> None:
    with pytest.raises(InputError, match=match):
        SyntheticOptions(**{"nlat": 4, "nlon": 8, **wrong})  # type: ignore[arg-type]


def test_a_start_that_is_no_date(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"times in --start cannot be read as 'hours since yesterday'"):
        synthesise(tmp_path / "s", SyntheticOptions(nlat=4, nlon=8, start="yesterday"))
