"""Layers that add to what they are given, and a forecast that sees the inputs; runs of before there were any."""

import pytest
import torch
import yaml

from faconv_hpc import FAConvLSTMNetwork, ProcessMesh, load_network
from faconv_hpc.errors import InputError
from faconv_hpc.evaluation.skill import evaluate, load_run
from faconv_hpc.scaling.points import PointFiles
from faconv_hpc.training.checkpoint import checkpoints_in
from faconv_hpc.training.export import export
from faconv_hpc.training.setup import build_network
from faconv_hpc.training.start_from import Beginning
from faconv_hpc.training.trainer import train
from ranks import Layout, run_on_ranks
from runs import make_store, rewrite_manifest, small_config
from test_domain import random_like
from test_parity import randomized
from test_study import study_of

ONE = Layout(1, 1, 1)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("cell", ["faconvlstm", "convlstm"])
def test_a_network_is_its_parts(cell, residual):
    network = randomized(FAConvLSTMNetwork(4, 3, 8, 3, diagnostic_channels=1, residual=residual, cell=cell,
                                           embedding_channels=8, coarse_shape=(2, 2)))  # fmt: skip
    x, season = random_like((2, 3, 4, 7, 9), 0), random_like((2, 3), 1)
    first, second, third = network.layers
    h = first(x)[0]
    h = second(h)[0] + h * residual
    h = third(h)[0] + h * residual
    want = torch.einsum("oc,btcyx->btoyx", network.forecast.weight[:, :, 0, 0], h)
    want = want + network.forecast.bias[:, None, None]
    if residual:
        want = want + torch.einsum("oc,btcyx->btoyx", network.forecast.from_inputs.weight[:, :, 0, 0], x)
    torch.testing.assert_close(network(x, season).forecast_BTCYX, want)
    if not residual:
        assert network.forecast.from_inputs is None


def test_the_first_forecast_is_persistence():
    network = FAConvLSTMNetwork(4, 3, 8, embedding_channels=8)
    assert not network(torch.randn(1, 2, 4, 7, 9), torch.rand(1, 2)).forecast_BTCYX.any()


def as_before(config):
    """A run as a version left it that knew no residuals."""
    kept = config.run_dir / "config.yaml"
    tree = yaml.safe_load(kept.read_text())
    assert tree["model"].pop("residual") is False
    kept.write_text(yaml.safe_dump(tree))

    def change(tree):
        del tree["config"]["model"]["residual"], tree["identity"]["model.residual"]

    for checkpoint in checkpoints_in(config.run_dir):
        rewrite_manifest(checkpoint.path, change)


def test_a_run_of_before_is_evaluated_exported_and_goes_on(tmp_path):
    store = make_store(tmp_path / "waves")
    model, training = {"residual": False}, {"checkpoint_every": 3}
    config = small_config(tmp_path, store, model=model, training=training)
    run_on_ranks(ONE, lambda mesh: train(config, mesh))
    skills = run_on_ranks(ONE, lambda mesh: evaluate(load_run(config.run_dir), mesh, 1).skills)
    want = load_network(config.run_dir).network
    as_before(config)
    assert load_run(config.run_dir) == config
    assert run_on_ranks(ONE, lambda mesh: evaluate(load_run(config.run_dir), mesh, 1).skills) == skills
    export(checkpoints_in(config.run_dir)[-1], tmp_path / "weights.safetensors")
    for path in (config.run_dir, tmp_path / "weights.safetensors"):
        got = load_network(path).network
        assert got.forecast.from_inputs is None
        for name, value in want.state_dict().items():
            assert torch.equal(got.state_dict()[name], value)
    checkpoints_in(config.run_dir)[-1].path.rename(tmp_path / "away")
    run_on_ranks(ONE, lambda mesh: train(config, mesh))
    again = checkpoints_in(config.run_dir)[-1]
    assert again.step == 6
    for name, value in again.weights().items():
        assert torch.equal(want.state_dict()[name], value)
    other = small_config(tmp_path, store, training=training)

    def refused(mesh):
        with pytest.raises(InputError, match=r"holds a run with model\.residual=False, this config says True"):
            train(other, mesh)

    run_on_ranks(ONE, refused)


def test_a_run_says_that_it_begins_with_a_network_that_is_connected_otherwise(tmp_path):
    store = make_store(tmp_path / "waves")
    for residual in (True, False):
        first = small_config(tmp_path / str(residual), store, model={"residual": residual})
        run_on_ranks(ONE, lambda mesh, config: train(config, mesh), first)
        told = {}
        for now in (True, False):
            config = small_config(tmp_path / "other", store, model={"residual": now})
            beginning = Beginning.of(first.run_dir)
            network = build_network(config, beginning.contract.channels)
            told[now] = beginning.fill(network, beginning.contract.channels, ProcessMesh.alone())
        assert told[residual].splitlines() == [f"begins with the weights of {first.run_dir}, step 6"]
        other = told[not residual]
        assert f"model.residual={str(residual).lower()} would keep it" in other
        assert ("new" if not residual else "left out, as this network has no such") + ": forecast.from_inputs" in other


def test_what_has_no_place_in_the_new_network_is_said(tmp_path):
    store = make_store(tmp_path / "waves")
    first = small_config(tmp_path, store)
    run_on_ranks(ONE, lambda mesh: train(first, mesh))
    beginning = Beginning.of(first.run_dir)
    config = small_config(tmp_path, store, model={"layers": 1})
    channels = beginning.contract.channels
    told = beginning.fill(build_network(config, channels), channels, ProcessMesh.alone())
    assert "left out, as this network has no such: layers.1." in told and " more" in told
    config = small_config(tmp_path, store, model={"layers": 3})
    told = beginning.fill(build_network(config, channels), channels, ProcessMesh.alone())
    assert "new: layers.2." in told and "another shape" not in told


def test_a_point_of_a_study_of_before_is_not_taken_for_one_of_now(tmp_path):
    _, points = study_of(tmp_path)
    files = PointFiles(points[0])
    files.begin("local")
    files.check_same()
    tree = yaml.safe_load(files.config.read_text())
    del tree["model"]["residual"]
    files.config.write_text(yaml.safe_dump(tree))
    with pytest.raises(InputError, match=r"was run with model\.residual=False, the study now says True"):
        files.check_same()
