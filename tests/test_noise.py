"""Noise on what a network is given in training: what it is, where it is, and what decides it."""

import json
import math
import re

import numpy as np
import pytest
import torch

from faconv_hpc import LatLonGrid
from faconv_hpc.data.noise import InputNoise
from faconv_hpc.data.store import Store
from faconv_hpc.data.variables import Channels
from faconv_hpc.errors import InputError
from faconv_hpc.spatial.grid import Cuts, Tile
from faconv_hpc.spatial.mesh import ProcessMesh
from faconv_hpc.training.fit import check_fits
from faconv_hpc.training.identity import check_same_run, identity
from faconv_hpc.training.reading import reader, requests
from faconv_hpc.training.records import read_records
from faconv_hpc.training.setup import Workspace, order_of
from faconv_hpc.training.shards import checkpoints_in
from faconv_hpc.training.trainer import train
from ranks import Layout, run_on_ranks
from runs import make_store, skills_in, small_config
from test_rollout import CHANNELS
from test_samples import make_store as store_with_gaps
from test_samples import variable_of, windows_of

ONE = Layout(1, 1, 1)
GRID, SIZE, SEED = (11, 14), 0.5, 2**63 - 1
TRAINING = {"steps": 6, "input_noise": 0.3, "checkpoint_every": 3, "rollout": {4: 2}}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "waves")


@pytest.fixture(scope="module")
def gaps(tmp_path_factory):
    return store_with_gaps(tmp_path_factory.mktemp("gaps"), missing=True)


def noise_on(tile=None, size=1.0, seed=SEED, grid=GRID, channels=CHANNELS, window=3):
    return InputNoise(size, seed, channels, window, tile or Tile((0, grid[0]), (0, grid[1])), LatLonGrid(*grid))


def by_hand(latitude, longitude, *numbers):
    """The definition, in Python's whole numbers and the three dimensions of space, on 11 equal bands of latitude."""

    def mixed(number):
        number = (number + 0x9E3779B97F4A7C15) % 2**64
        number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
        return number ^ number >> 31

    start, total = 0, 0.0
    for number in numbers:
        start = mixed((start + number) % 2**64)
    place = math.cos(latitude) * math.cos(longitude), math.cos(latitude) * math.sin(longitude), math.sin(latitude)
    for part in range(4):  # of 1 to 11
        share, height, turn, phase = (mixed((start + 4 * part + one) % 2**64) / 2**64 for one in range(4))
        up = 2 * height - 1
        side = math.sqrt(1 - up**2)
        direction = side * math.cos(2 * math.pi * turn), side * math.sin(2 * math.pi * turn), up
        wave = 11 ** ((part + share) / 4) * sum(a * b for a, b in zip(direction, place, strict=True))
        total += math.cos(wave + 2 * math.pi * phase)
    return total * math.sqrt(2 / 4)


def test_each_wave_is_that_of_seed_step_place_and_field():
    noise, grid = noise_on(size=SIZE).of(step=7, place=5), LatLonGrid(*GRID)
    assert noise.shape == (2, *GRID) and noise.dtype == np.float32
    for field, row, column in [(0, 0, 0), (1, 10, 13), (0, 4, 9), (1, 7, 2)]:
        want = SIZE * by_hand(grid.latitude[row], grid.longitude[column], SEED, 7, 5, field)
        assert noise[field, row, column] == pytest.approx(want, abs=1e-5)


def test_it_has_the_deviation_that_is_asked_for_in_long_waves_and_in_short_ones():
    noise = noise_on(size=SIZE)
    fields = np.concatenate([noise.of(step, 1).reshape(-1, *GRID) for step in range(180)]) / SIZE
    assert abs(fields.mean()) < 0.1 and 0.9 < fields.var() < 1.1
    means, steps = fields.mean((1, 2)), np.diff(fields, axis=1)
    assert means.var() > 0.1 and steps.var() > 0.2  # of cells each for itself 0.006, and 2
    others = [noise.of(3, 2), noise.of(2, 3), noise_on(size=SIZE, seed=SEED - 1).of(3, 1)]
    fields = np.concatenate([fields, *(one.reshape(-1, *GRID) / SIZE for one in others)]).reshape(-1, math.prod(GRID))
    apart = np.square(fields[:, None] - fields).mean(-1) + 9 * np.eye(len(fields))
    assert apart.min() > 0.05  # no two have the same


@pytest.mark.parametrize(("lat", "lon"), [(2, 3), (5, 1), (1, 7)])
def test_a_tile_has_its_part_of_the_whole(lat, lon):
    whole = noise_on().of(3, 2)
    cuts = Cuts.even(LatLonGrid(*GRID), lat, lon)
    for number in range(cuts.tiles):
        tile = cuts.tile(number)
        np.testing.assert_allclose(noise_on(tile).of(3, 2), whole[:, *tile.slices], rtol=0, atol=1e-6)


def test_it_is_on_known_fields_that_are_forecast_within_the_window_and_asked_back(gaps):
    said = [
        variable_of(gaps, "heat", role="forcing"),
        variable_of(gaps, "ice", may_miss=True),
        variable_of(gaps, "flat"),
    ]
    window, tile = 2, Tile((2, 9), (1, 14))
    windows = windows_of(gaps, tile, variables=said, forcings=["insolation"], window=4)
    assert windows.channels.inputs == ("ice", "flat", "heat", "fresh_ice", "fresh_flat", "fresh_heat", "insolation")
    clean = windows.read([2, 6])
    noise = InputNoise(SIZE, SEED, windows.channels, window, tile, gaps.grid("zero", "periodic"))
    noisy = noise.added(clean, step=3, places=(8, 1))
    added = noisy.inputs_BTCYX - clean.inputs_BTCYX
    known = clean.inputs_BTCYX[:, :window, 3] > 0  # or was, in the window
    assert not known.all() and 1 > clean.inputs_BTCYX[:, :window, 3][known].min() > 0
    ice = added[:, :window, 0]
    for sample, place in enumerate((8, 1)):
        want = torch.from_numpy(noise.of(3, place)[0])
        torch.testing.assert_close(ice[sample], want.where(known[sample], 0.0), rtol=0, atol=1e-6)
    assert ice[known].std() > 0.1 * SIZE
    added[:, :window, 0] = 0.0
    assert not added.any()  # in a field that never changes, in what is given or computed, and after the window
    ice_of, per_std = gaps.channels.index("ice"), gaps.tendency_std[gaps.channels.index("ice")]
    step = per_std / gaps.std[ice_of]
    true_next = clean.inputs_BTCYX[:, :window, 0] + clean.target_BTCYX[:, :window, 0] * step
    asked = noisy.inputs_BTCYX[:, :window, 0] + noisy.target_BTCYX[:, :window, 0] * step
    torch.testing.assert_close(asked[known], true_next[known], rtol=0, atol=1e-5)
    assert not noisy.target_BTCYX[:, :window, 0][~known].any() and torch.equal(noisy.valid_BTCYX, clean.valid_BTCYX)
    assert torch.equal(noisy.target_BTCYX[:, window:], clean.target_BTCYX[:, window:])
    assert torch.equal(noisy.target_BTCYX[:, :, 1:], clean.target_BTCYX[:, :, 1:])


def test_what_lies_still_has_none():
    """Orography that comes with times: its change, by which it would be asked, is none, and noise would be all."""
    first, *others = CHANNELS.fields
    still = Channels([first.model_copy(update={"tendency_std": 0.0}), *others], ["insolation"])
    noise = noise_on(channels=still).of(3, 2)
    assert not noise[0].any() and noise[1].any() and noise_on().of(3, 2)[0].any()


def test_a_state_that_is_carried_on_would_tell_it(tmp_path, store):
    with pytest.raises(InputError, match=r"input_noise=0\.3 stays through a window.*stateful_windows=2.*Leave one"):
        check_fits(
            small_config(tmp_path, store, data={"window": 2}, training={"stateful_windows": 2, "input_noise": 0.3})
        )


def test_a_run_of_before_there_was_noise_has_none(tmp_path, store):
    def judge(mesh, config, missing):
        workspace = Workspace.of(config, Store.open(config.data.store), mesh)
        saved = {key: value for key, value in identity(workspace).items() if key not in missing}
        check_same_run(workspace, json.loads(json.dumps(saved)))

    keys = ["training.input_noise", "training.through_leads", "training.beta2"]
    for given, told in (
        ({}, "input_noise=0.0, this config says 0.3"),
        ({"input_noise": 0.0, "through_leads": False}, "through_leads=True, this config says False"),
        ({"input_noise": 0.0, "beta2": 0.95}, "beta2=0.999, this config says 0.95"),
    ):
        with pytest.raises(InputError, match=re.escape(told)):
            judge(ProcessMesh.alone(), config_of(tmp_path, store, **given), keys)
    judge(ProcessMesh.alone(), config_of(tmp_path, store, input_noise=0.0), keys)


def read_by(mesh, config):
    """What each micro-batch of this replica has, whole."""
    workspace = Workspace.of(config, Store.open(config.data.store), mesh)
    windows, domain = workspace.training_windows(), workspace.domain
    read, found = reader(workspace, windows), {}
    for one in requests(config, order_of(config, windows), mesh.replica, 3):
        batch = read(one)
        whole = [domain.assemble(part) for part in (batch.inputs_BTCYX, batch.target_BTCYX)]
        found |= {(one.step, place): [part[number] for part in whole] for number, place in enumerate(one.places)}
    return found


def config_of(directory, store, layout=ONE, **training):
    accumulation = training.get("accumulation", 1)
    samples = {"micro_batch": 4 // accumulation // layout.replicas}
    mesh = dict(zip(("replicas", "lat", "lon"), layout, strict=True))
    return small_config(directory, store, mesh=mesh, training=TRAINING | samples | training)


def test_a_sample_has_the_same_noise_whoever_reads_it(tmp_path, store):
    (want,) = run_on_ranks(ONE, read_by, config_of(tmp_path, store))
    (without,) = run_on_ranks(ONE, read_by, config_of(tmp_path, store, input_noise=0))
    assert len(want) == 3 * 4
    noises = torch.stack([(want[one][0] - without[one][0])[:3, :2].flatten() for one in want])
    assert torch.pdist(noises).min() > 3  # of each step and place its own
    for layout, accumulation in ((Layout(2, 1, 2), 1), (Layout(1, 2, 2), 4)):
        found = {}
        for one in run_on_ranks(layout, read_by, config_of(tmp_path, store, layout, accumulation=accumulation)):
            found |= one
        assert found.keys() == want.keys()
        for one, fields in want.items():
            torch.testing.assert_close(found[one], fields, rtol=0, atol=1e-5)


def losses_of_run(config):
    layout = Layout(config.mesh.replicas, config.mesh.lat, config.mesh.lon)
    run_on_ranks(layout, lambda mesh: train(config, mesh))
    return [record.loss for record in read_records(config.run_dir)]


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
    """The losses of one rank."""
    return losses_of_run(config_of(tmp_path_factory.mktemp("alone"), store))


@pytest.mark.parametrize(
    ("layout", "training"),
    [(Layout(1, 2, 2), {"zero_stage": 3, "accumulation": 2}), (Layout(2, 1, 1), {"accumulation": 2})],
    ids=str,
)
@pytest.mark.every(2)
def test_a_run_is_the_same_on_every_mesh(tmp_path, store, alone, layout, training):
    np.testing.assert_allclose(losses_of_run(config_of(tmp_path, store, layout, **training)), alone, rtol=2e-5)


def test_a_run_that_stopped_goes_on_bit_for_bit(tmp_path, store, alone):
    config = config_of(tmp_path, store)
    assert losses_of_run(config) == alone
    checkpoints_in(config.run_dir)[-1].path.rename(tmp_path / "away")
    assert losses_of_run(config) == alone


def test_a_look_has_none(tmp_path, store):
    """Of weights that hardly change it says what it says without."""
    periods = {"validation": "2000-01-03T06/2000-01-04T00", "test": "2000-01-04T06/"}
    said = []
    for name, size in (("noisy", 3.0), ("clean", 0.0)):
        training = {"steps": 2, "warmup_steps": 1, "learning_rate": 1e-12, "validate_every": 2, "input_noise": size}
        config = small_config(tmp_path / name, store, data={"periods": periods}, training=training)
        losses_of_run(config)
        said.append([one["rmse"] for one in skills_in(config.run_dir)])
    assert said[0] and said[0] == pytest.approx(said[1], rel=1e-6)


def test_less_than_none_is_refused(tmp_path, store):
    with pytest.raises(InputError, match=r"training\.input_noise: .*greater than or equal to 0.*-0\.1"):
        small_config(tmp_path, store, training={"input_noise": -0.1})


def test_other_noise_is_another_run(tmp_path, store):
    config = config_of(tmp_path, store, steps=3, rollout={})
    losses_of_run(config)
    with pytest.raises(AssertionError, match=r"holds a run with training\.input_noise=0\.3, this config says 0\.2"):
        losses_of_run(config_of(tmp_path, store, steps=3, rollout={}, input_noise=0.2))
