"""Layers that add to what they are given, and a forecast that sees the inputs; runs of before there were any."""

import shutil

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from faconv_hpc import FAConvLSTMNetwork, ProcessMesh, load_network
from faconv_hpc.config_file import as_now, load_config
from faconv_hpc.errors import InputError
from faconv_hpc.scaling.points import PointFiles
from faconv_hpc.training.checkpoint import checkpoints_in
from faconv_hpc.training.export import export
from faconv_hpc.training.records import CONFIG_FILE
from faconv_hpc.training.setup import build_network
from faconv_hpc.training.shards import OtherVersionError
from faconv_hpc.training.start_from import Beginning
from faconv_hpc.training.trainer import train
from ranks import Layout, run_on_ranks
from runs import evaluated, make_store, rewrite_manifest, small_config
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
    """A run as a version left it of another embedding, without residuals, that counted attention's channels."""

    def as_then(model):
        assert model.pop("residual") is False
        model["attention_channels"] = model["hidden_channels"] // model.pop("attention_reduction")
        for key in ("embedding_past", "embedding_leads", "seasonal_encoding"):
            del model[key]

    def change(tree):
        as_then(tree["config"]["model"])
        tree["format"] = "faconv_hpc checkpoint 7"

    kept = config.run_dir / "config.yaml"
    tree = yaml.safe_load(kept.read_text())
    as_then(tree["model"])
    kept.write_text(yaml.safe_dump(tree))
    for checkpoint in checkpoints_in(config.run_dir):
        rewrite_manifest(checkpoint.path, change)


def test_what_an_older_version_left_is_refused_by_name(tmp_path):
    """A run, a checkpoint, an export: nothing is taken for damaged, and nothing is begun anew in its place."""
    store = make_store(tmp_path / "waves")
    config = small_config(tmp_path, store, model={"residual": False, "attention_reduction": 2})
    run_on_ranks(ONE, lambda mesh: train(config, mesh))
    newest, file = checkpoints_in(config.run_dir)[-1], tmp_path / "weights.safetensors"
    export(newest, file)
    as_before(config)
    kept = load_config(config.run_dir / CONFIG_FILE, older=True)
    assert not kept.model.residual and kept.model.attention_reduction == 2
    named = r"was written by faconv_hpc \S+ as 'faconv_hpc checkpoint 7', this is faconv_hpc \S+, which reads"

    def refused(mesh):
        for use in (lambda: train(config, mesh), lambda: evaluated(kept, mesh, 1)):
            with pytest.raises(OtherVersionError, match=named):
                use()

    run_on_ranks(ONE, refused)
    for use in (load_network, Beginning.of):
        for path in (config.run_dir, newest.path):
            with pytest.raises(OtherVersionError, match=named):
                use(path)
    with safe_open(file, "pt") as opened:
        about, weights = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(weights, file, metadata={key: one for key, one in about.items() if key != "inputs"})
    for use in (load_network, Beginning.of):
        with pytest.raises(InputError, match=r"was exported by an older version of faconv_hpc \(\S+\), whose networks"):
            use(file)


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
            told[now] = beginning.fill(network, config.model, beginning.contract.channels, ProcessMesh.alone())
        assert told[residual].splitlines() == [f"begins with the weights of {first.run_dir}, step 6"]
        other = told[not residual]
        assert f"model.residual={str(residual).lower()} would keep it" in other
        assert ("new" if not residual else "left out, as this network has no such") + ": forecast.from_inputs" in other


def test_a_run_says_what_its_network_has_in_another_way_than_that_of_its_weights(tmp_path):
    """Also what no parameter's shape shows: heads share the same projections."""
    first = small_config(tmp_path, make_store(tmp_path / "waves"), model={"attention_reduction": 1})
    run_on_ranks(ONE, lambda mesh: train(first, mesh))
    beginning = Beginning.of(first.run_dir)
    channels = beginning.contract.channels

    def told(**model):
        config = small_config(tmp_path, "waves", model={"attention_reduction": 1} | model)
        text = beginning.fill(build_network(config, channels), config.model, channels, ProcessMesh.alone())
        return text.partition("the forecast does not begin as it was: ")[2].splitlines()

    assert told(attention_heads=4) == ["model.attention_heads=2 would keep it"]
    assert told(attention_reduction=4, dilations=[1, 2, 3]) == [
        "model.dilations=[1, 2, 4], model.attention_reduction=1 would keep it"
    ]
    assert told(kernels="compiled", attention_exchange="swap", checkpoint_steps=2, embedding_weight=0.5) == []


def test_what_has_no_place_in_the_new_network_is_said(tmp_path):
    store = make_store(tmp_path / "waves")
    first = small_config(tmp_path, store)
    run_on_ranks(ONE, lambda mesh: train(first, mesh))
    beginning = Beginning.of(first.run_dir)
    config = small_config(tmp_path, store, model={"layers": 1})
    channels = beginning.contract.channels
    told = beginning.fill(build_network(config, channels), config.model, channels, ProcessMesh.alone())
    assert "left out, as this network has no such: layers.1." in told and " more" in told
    config = small_config(tmp_path, store, model={"layers": 3})
    told = beginning.fill(build_network(config, channels), config.model, channels, ProcessMesh.alone())
    assert "new: layers.2." in told and "another shape" not in told


def test_keys_of_an_attention_that_is_not_there_hold_no_run_back(tmp_path):
    store = make_store(tmp_path / "waves")
    for model in ({"attention_every": 0}, {"cell": "convlstm"}):
        first = small_config(tmp_path, store, model=model, training={"steps": 4})
        run_on_ranks(ONE, lambda mesh, config: train(config, mesh), first)
        now = small_config(tmp_path, store, model=model | {"attention_reduction": 2}, training={"steps": 4})
        assert run_on_ranks(ONE, lambda mesh, config: train(config, mesh), now) == [0]
        shutil.rmtree(first.run_dir)


def test_attention_as_wide_as_no_share_any_more_is_refused():
    model = {"hidden_channels": 24, "attention_every": 2, "attention_heads": 2, "attention_channels": 16}
    with pytest.raises(InputError, match=r"attention_channels=16 of 24 hidden channels.*Use the version that trained"):
        as_now(model)
    assert as_now(model | {"attention_every": 0}) == {
        "residual": False, "hidden_channels": 24, "attention_every": 0, "attention_heads": 2,
    }  # fmt: skip


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
