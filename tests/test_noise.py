"""Noise on what a network is given in training: what it is, where it is, and that nothing else decides it."""

import math

import numpy as np
import pytest
import torch

from faconv_hpc import LatLonGrid
from faconv_hpc.data.noise import InputNoise
from faconv_hpc.data.store import Store
from faconv_hpc.errors import InputError
from faconv_hpc.spatial.grid import Cuts, Tile
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


def by_hand(*numbers, cell):
    """The definition in Python's whole numbers."""

    def mixed(number):
        number = (number + 0x9E3779B97F4A7C15) % 2**64
        number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
        return number ^ number >> 31

    start = 0
    for number in numbers:
        start = mixed((start + number) % 2**64)
    bits = mixed((start + cell) % 2**64)
    parts = [bits >> shift & 0xFFFF for shift in (0, 16, 32, 48)]
    return sum((part / 65535 - 0.5) * 2 for part in parts) * 65535 / 2 / math.sqrt(4 * (65536**2 - 1) / 12)


def test_each_number_is_that_of_seed_step_place_time_field_and_cell():
    noise = noise_on(size=SIZE).of(step=7, place=5)
    assert noise.shape == (3, 2, *GRID) and noise.dtype == np.float32
    for time, field, row, column in [(0, 0, 0, 0), (2, 1, 10, 13), (1, 0, 4, 9), (0, 1, 7, 2)]:
        want = SIZE * by_hand(SEED, 7, 5, time, field, cell=row * GRID[1] + column)
        assert noise[time, field, row, column] == pytest.approx(want, rel=1e-6)


def test_it_has_the_deviation_that_is_asked_for_and_nothing_in_common():
    noise = noise_on(size=SIZE, grid=(64, 128))
    one, *others = [noise.of(step, place).astype(float) / SIZE for step, place in [(3, 1), (4, 1), (3, 2), (1, 3)]]
    error = one.size**-0.5
    assert abs(one.mean()) < 4 * error and abs(one.var() - 1) < 6 * error and np.abs(one).max() < 3.5
    shifted = [np.roll(one, shift, axis) for shift, axis in [(1, 0), (1, 1), (1, 2), (1, 3), (5, 3)]]
    others.append(noise_on(size=1.0, seed=SEED - 1, grid=(64, 128)).of(3, 1))
    for other in shifted + others:
        assert abs((one * other).mean()) < 4 * error


@pytest.mark.parametrize(("lat", "lon"), [(2, 3), (5, 1), (1, 7)])
def test_a_tile_has_its_part_of_the_whole_to_the_last_bit(lat, lon):
    whole = noise_on().of(3, 2)
    cuts = Cuts.even(LatLonGrid(*GRID), lat, lon)
    for number in range(cuts.tiles):
        tile = cuts.tile(number)
        assert np.array_equal(noise_on(tile).of(3, 2), whole[:, :, *tile.slices])


def test_it_is_on_known_fields_that_are_forecast_within_the_window_and_asked_back(gaps):
    said = [
        variable_of(gaps, "heat", role="forcing"),
        variable_of(gaps, "ice", may_miss=True),
        variable_of(gaps, "flat"),
    ]
    window, tile = 2, Tile((2, 9), (1, 14))
    windows = windows_of(gaps, tile, variables=said, forcings=["insolation"], window=4)
    assert windows.channels.inputs == ("ice", "flat", "heat", "valid_ice", "valid_flat", "valid_heat", "insolation")
    clean = windows.read([2, 6])
    noise = InputNoise(SIZE, SEED, windows.channels, window, tile, gaps.grid("zero", "periodic"))
    noisy = noise.added(clean, step=3, places=(8, 1))
    added = noisy.inputs_BTCYX - clean.inputs_BTCYX
    known = clean.inputs_BTCYX[:, :window, 3].bool()
    assert not known.all() and known.any()
    ice = added[:, :window, 0]
    for sample, place in enumerate((8, 1)):
        want = torch.from_numpy(noise.of(3, place)[:, 0])
        torch.testing.assert_close(ice[sample], want.where(known[sample], 0.0), rtol=0, atol=1e-6)
    assert 0.8 < ice[known].std() / SIZE < 1.2
    added[:, :window, 0] = 0.0
    assert not added.any()  # in a field that never changes, in what is given or computed, and after the window
    ice_of, per_std = gaps.channels.index("ice"), gaps.tendency_std[gaps.channels.index("ice")]
    step = per_std / gaps.std[ice_of]
    true_next = clean.inputs_BTCYX[:, :window, 0] + clean.target_BTCYX[:, :window, 0] * step
    asked = noisy.inputs_BTCYX[:, :window, 0] + noisy.target_BTCYX[:, :window, 0] * step
    valid = clean.valid_BTCYX[:, :window, 0]
    torch.testing.assert_close(asked[valid], true_next[valid], rtol=0, atol=1e-5)
    assert not noisy.target_BTCYX[~noisy.valid_BTCYX].any() and torch.equal(noisy.valid_BTCYX, clean.valid_BTCYX)
    assert torch.equal(noisy.target_BTCYX[:, window:], clean.target_BTCYX[:, window:])
    assert torch.equal(noisy.target_BTCYX[:, :, 1:], clean.target_BTCYX[:, :, 1:])


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
    assert torch.corrcoef(noises).fill_diagonal_(0).abs().max() < 0.3  # of each step and place its own
    for layout, accumulation in ((Layout(2, 1, 2), 1), (Layout(1, 2, 2), 4)):
        found = {}
        for one in run_on_ranks(layout, read_by, config_of(tmp_path, store, layout, accumulation=accumulation)):
            found |= one
        assert found.keys() == want.keys()
        assert all(torch.equal(*pair) for one in want for pair in zip(found[one], want[one], strict=True))


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
