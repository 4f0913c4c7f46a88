"""Shallow water: what the solver says, as sequences of a store, each run by itself, with noise and gaps where asked."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from faconv_hpc import harmonics
from faconv_hpc.data.periods import frames_within
from faconv_hpc.data.store import Store
from faconv_hpc.errors import InputError
from faconv_hpc.prepare import shallow_water
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.prepare.shallow_water import ShallowWaterOptions
from faconv_hpc.prepare.synthetic import synthesise
from faconv_hpc.prepare.writer import write_store
from faconv_hpc.spatial.grid import Tile

NLAT, NLON = 8, 12
OPTIONS = partial(ShallowWaterOptions, nlat=NLAT, nlon=NLON)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds of the runs that were computed, not by the solver but drawn, of large deviations and means."""
    seeds: list[int] = []

    def states_of(solver: tuple[int, int], states: int, seed: int) -> np.ndarray:
        seeds.append(seed)
        drawn = np.random.default_rng(seed).normal(size=(states, 3, *solver))
        return drawn * np.array([300.0, 1e-5, 1e-6])[:, None, None] + np.array([9e4, 0, 0])[:, None, None]

    monkeypatch.setattr(shallow_water, "solver_of", lambda nlat, nlon: (nlat, nlon))
    monkeypatch.setattr(shallow_water, "states_of", states_of)
    monkeypatch.setattr(shallow_water, "check_solver", lambda: None)
    return seeds


def fields_of(path: Path) -> np.ndarray:
    """All of a store's fields, NaN where missing."""
    with Store.open(path) as store:
        whole = Tile((0, store.layout.grid_shape[0]), (0, store.layout.grid_shape[1]))
        fields, valid = store.read(range(store.frames), whole, range(len(store.channels)))
    return fields if valid is None else np.where(valid, fields, np.nan)


def test_each_run_is_a_sequence_and_a_file(computed: list[int], tmp_path: Path) -> None:
    summary = synthesise(tmp_path / "s", OPTIONS(runs=3, first=7, states=5), mesh=(2, 2))
    assert (summary.frames, summary.files, summary.channels) == (15, 3, ("geopotential", "vorticity", "divergence"))
    assert computed == [7, 8, 9]  # none twice
    with Store.open(tmp_path / "s") as store:
        axis = store.layout.time
        assert axis.names == ("007", "008", "009") and [len(own) for own in axis.sequences] == [5, 5, 5]
        assert np.array_equal(axis.seconds.reshape(3, 5), np.tile(axis.seconds[:5], (3, 1)))
        assert set(axis.steps.tolist()) == {3600}
        assert frames_within(axis, ["sequences 008 to 009"]) == (range(5, 15),)
        assert store.latitude_deg[[0, -1]].tolist() == [90, -90] and store.longitude_deg[1] == 30
        store.grid("pole", "periodic")
    wanted = np.concatenate([shallow_water.states_of((NLAT, NLON), 5, seed) for seed in (7, 8, 9)])  # type: ignore[arg-type]
    assert np.array_equal(fields_of(tmp_path / "s"), wanted.astype(np.float32))


@pytest.mark.parametrize(("slab_bytes", "frames_per_file"), [(1, None), (3000, 4), (10**9, 100)])
def test_slabs_and_files_change_no_bit(
    computed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slab_bytes: int, frames_per_file: int | None
) -> None:
    options = OPTIONS(runs=2, states=6, noise=0.2, missing=0.25)
    synthesise(tmp_path / "want", options)
    monkeypatch.setattr("faconv_hpc.prepare.synthetic.write_store", partial(write_store, slab_bytes=slab_bytes))
    synthesise(tmp_path / "s", options, frames_per_file=frames_per_file)
    assert np.array_equal(fields_of(tmp_path / "s"), fields_of(tmp_path / "want"), equal_nan=True)
    if frames_per_file is None:
        assert computed == [0, 1, 0, 1]


def test_a_run_depends_on_its_number_and_the_seed_alone(computed: list[int], tmp_path: Path) -> None:
    made = {}
    for name, options in {
        "all": OPTIONS(runs=3, states=2), "last": OPTIONS(runs=1, first=2, states=2), "seed": OPTIONS(runs=3, seed=1)
    }.items():  # fmt: skip
        synthesise(tmp_path / name, options)
        made[name] = fields_of(tmp_path / name)
    assert np.array_equal(made["all"][4:], made["last"])
    assert not np.isclose(made["all"][0], made["seed"][0]).any(axis=(1, 2)).all()
    assert computed == [0, 1, 2, 2, 1000000, 1000001, 1000002]


def test_noise_and_gaps_are_as_large_as_asked_and_lie_over_the_same_truth(computed: list[int], tmp_path: Path) -> None:
    some = partial(OPTIONS, nlat=24, nlon=48, runs=2, states=12)
    made = {}
    for name, options in {"truth": some(), "noisy": some(noise=0.2, missing=0.25), "gaps": some(missing=0.25)}.items():
        summary = synthesise(tmp_path / name, options)
        assert summary.has_missing == (name != "truth")
        made[name] = fields_of(tmp_path / name)
    gone = np.isnan(made["noisy"])
    assert np.array_equal(gone, np.isnan(made["gaps"]))
    assert np.array_equal(made["gaps"][~gone], made["truth"][~gone])
    assert gone.mean(axis=(0, 2, 3)) == pytest.approx([0.25] * 3, abs=0.01)
    assert (gone[0] != gone[1]).any() and (gone[:, 0] != gone[:, 1]).any()
    noise = made["noisy"].astype(np.float64) - made["truth"]
    share = np.nanstd(noise, axis=(0, 2, 3)) / made["truth"].std(axis=(0, 2, 3), dtype=np.float64)
    assert share == pytest.approx([0.2] * 3, rel=0.02)
    assert abs(np.nanmean(noise[0] * noise[1], axis=(1, 2)) / np.nanvar(noise, axis=(0, 2, 3))).max() < 0.15


def test_runs_of_other_lengths_are_joined_by_prepare(computed: list[int], tmp_path: Path) -> None:
    synthesise(tmp_path / "a", OPTIONS(runs=2, states=3))
    synthesise(tmp_path / "b", OPTIONS(runs=2, first=2, states=7))
    prepare([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    with Store.open(tmp_path / "both") as store:
        assert store.layout.time.names == ("000", "001", "002", "003")
        assert [len(own) for own in store.layout.time.sequences] == [3, 3, 7, 7]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"nlat": 7}, r"--nlat is 7; shallow water takes at least 8"),
        ({"nlon": 7}, r"--nlon is 7; shallow water takes at least 8"),
        ({"nlon": 13}, r"--nlon is 13; half a turn lies across a pole.*Use 14"),
        ({"runs": 0}, r"--runs is 0; shallow water takes at least 1"),
        ({"first": 999_999, "runs": 2}, r"--first 999999 and --runs 2 lead beyond run 999999"),
        ({"noise": -0.1}, r"--noise is -0\.1"),
        ({"missing": 1.0}, r"--missing 1; noise is not negative, and a share of 0 to less than 1"),
    ],
)
def test_options_that_make_no_sense(wrong: dict[str, float], match: str) -> None:
    with pytest.raises(InputError, match=match):
        OPTIONS(**wrong)


def test_a_run_that_is_no_number_any_more_is_no_gap(
    computed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shallow_water, "states_of", lambda *given: np.full((2, 3, NLAT, NLON), np.nan))
    with pytest.raises(InputError, match=r"run 4 of shallow water on 8 x 12 cells is no number any more within 14 h"):
        synthesise(tmp_path / "s", OPTIONS(runs=1, first=4, states=2))
    assert not (tmp_path / "s" / "store.nc").exists()


def test_without_the_solver_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_harmonics", None)
    monkeypatch.setattr(harmonics, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed\. Run `pip install --no-deps torch-harmonics==0\.9\.3`"):
        synthesise(tmp_path / "s", OPTIONS())
    assert not (tmp_path / "s").exists()


def test_the_solver_keeps_mass_and_means_and_moves(tmp_path: Path) -> None:
    """Means over the sphere by Clenshaw-Curtis weights of NumPy: none of the three equations has a source of them."""
    pytest.importorskip("torch_harmonics", reason="pip install --no-deps torch-harmonics==0.9.3")
    states = shallow_water.states_of(shallow_water.solver_of(12, 24), 3, seed=5)
    theta = np.linspace(0, np.pi, 12)
    moments = np.where(np.arange(12) % 2 == 0, 2 / (1 - np.arange(12.0) ** 2 + (np.arange(12) == 1)), 0.0)
    weights = np.linalg.solve(np.cos(np.outer(np.arange(12), theta)), moments) / 2  # of cosines: exact
    assert weights.sum() == pytest.approx(1)
    means = np.einsum("tcyx,y->tc", states, weights) / 24
    assert (np.ptp(means, axis=0) < 1e-9 * np.abs(states).max(axis=(0, 2, 3))).all()
    assert means[0, 0] == pytest.approx(98061.6, rel=1e-3)  # 10 km of depth
    assert 1e-3 < np.abs(states[2, 1] - states[0, 1]).max() / np.abs(states[0, 1]).max() < 2  # it moves, and stays
    again = shallow_water.states_of(shallow_water.solver_of(12, 24), 1, seed=5)
    assert np.array_equal(again[0], states[0])
