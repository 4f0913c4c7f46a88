"""Forecasts from data with noise, held against the truth without it."""

import json
import re

import numpy as np
import pytest

from faconv_hpc.errors import InputError
from faconv_hpc.prepare.synthetic import SyntheticOptions, synthesise
from faconv_hpc.training.trainer import train
from ranks import Layout, run_on_ranks
from runs import evaluated, fields_in, small_config
from test_cli import faconv, messages

ONE = Layout(1, 1, 1)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """The same waves with and without noise, and a run on the first that has learned nothing: it is persistence."""
    directory = tmp_path_factory.mktemp("stores")
    for name, noise in (("noisy", 0.5), ("clean", 0.0)):
        synthesise(directory / name, SyntheticOptions(11, 14, channels=2, frames=16, noise=noise))
    training = {"steps": 1, "warmup_steps": 0, "learning_rate": 1e-30}
    config = small_config(directory / "run", directory / "noisy", training=training)
    assert set(run_on_ranks(ONE, lambda mesh: train(config, mesh))) == {0}
    return config, directory / "noisy", directory / "clean"


def test_what_a_network_forecasts_from_and_what_came_are_two(stores):
    config, noisy, clean = stores
    (rmse,) = run_on_ranks(ONE, lambda mesh: evaluated(config, mesh, 2, against=[clean]).metrics["rmse"])
    (given, _, latitude_deg, _), (came, *_) = fields_in(noisy), fields_in(clean)
    weights = np.cos(np.deg2rad(latitude_deg))[:, None] / np.cos(np.deg2rad(latitude_deg)).mean() / 14 / 11
    starts = range(12, 14)  # of leads in frames 13 to 15
    for lead in (1, 2):
        for place, start in enumerate((given, came)):  # the network, persistence of what came
            errors = np.stack([start[at] - came[at + lead] for at in starts]).astype(np.float64)
            wanted = np.sqrt((errors**2 * weights).sum(axis=(-2, -1)).mean(axis=0))
            np.testing.assert_allclose(rmse[lead - 1, place], wanted, rtol=1e-5)
    assert (rmse[0, 0] > 1.1 * rmse[0, 1]).all()


def test_the_command_takes_both(stores, tmp_path):
    config, noisy, clean = stores
    output = tmp_path / "judged"
    done = faconv("evaluate", config.run_dir, "--truth", clean, "--output", output, "--json")
    assert done.returncode == 0, done.stderr
    said, page = json.loads(done.stdout), (output / "report.md").read_text()
    assert (said["truth"], said["networks_forecast_from"]) == (f"the store {clean}", f"the store {noisy}")
    assert f"**Networks forecast from the store {noisy}; what came is from the store {clean}**, and so is" in page
    missing = faconv("evaluate", config.run_dir, "--truth", tmp_path / "no*", "--output", output)
    assert missing.returncode == 2 and "--truth" in messages(missing)[0] and "matches no file" in messages(missing)[0]


def test_a_truth_of_another_grid_is_refused(stores, tmp_path):
    config, *_ = stores
    synthesise(tmp_path / "other", SyntheticOptions(9, 14, channels=2, frames=16))
    (told,) = run_on_ranks(ONE, lambda mesh: _refusal(config, mesh, tmp_path / "other"))
    assert re.search(r"was trained on latitude_deg .*other has .*Regrid", told)


def _refusal(config, mesh, other):
    with pytest.raises(InputError) as raised:
        evaluated(config, mesh, against=[other])
    return str(raised.value)
