"""States that are carried from window to window: by their definition, on every mesh, through every stop."""

import hashlib
import json

import numpy as np
import pytest
import torch

from faconv_hpc.data.store import Store
from faconv_hpc.errors import InputError
from faconv_hpc.training.carried import CarriedStates
from faconv_hpc.training.fit import check_store
from faconv_hpc.training.free_run import feedback_for
from faconv_hpc.training.manifest import FORMAT
from faconv_hpc.training.objective import losses_of
from faconv_hpc.training.records import read_records
from faconv_hpc.training.schedule import learning_rate, legs_of
from faconv_hpc.training.setup import Workspace, build_network, order_of
from faconv_hpc.training.shards import MANIFEST, SUMS, UnreadableCheckpointError, checkpoints_in
from faconv_hpc.training.trainer import train
from ranks import Layout, run_on_ranks
from runs import make_store, small_config

ONE = Layout(1, 1, 1)
WINDOW, SAMPLES = 4, 4
USUAL = {"steps": 10, "stateful_windows": 3, "checkpoint_every": 5, "learning_rate": 0.02}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "waves", frames=90)


def config_of(directory, store, layout=ONE, **training):
    """Each of the four samples of a step sees four windows in an epoch."""
    accumulation = training.pop("accumulation", 1)
    samples = {"micro_batch": SAMPLES // accumulation // layout.replicas, "accumulation": accumulation}
    return small_config(
        directory,
        store,
        mesh=dict(zip(("replicas", "lat", "lon"), layout, strict=True)),
        data={"window": WINDOW, "periods": {"test": "2000-01-20/"}},
        training={"steps": 10, "stateful_windows": 3, "checkpoint_every": 5, "learning_rate": 0.02}
        | samples
        | training,
    )


def losses_of_run(config):
    layout = Layout(config.mesh.replicas, config.mesh.lat, config.mesh.lon)
    run_on_ranks(layout, lambda mesh: train(config, mesh))
    return [record.loss for record in read_records(config.run_dir)]


def written_out(config, mesh):
    """The losses by definition: one sample at a time, a state for each place, plain gradient descent."""
    workspace = Workspace.of(config, Store.open(config.data.store), mesh)
    network, windows = build_network(config, workspace.contract.channels), workspace.training_windows()
    order, legs, ends, losses = order_of(config, windows), legs_of(config, (), None), {}, []
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    carried = 0
    for step in range(config.training.steps):
        optimizer.zero_grad()
        of_samples = []
        for place in range(SAMPLES):
            window = order.window(step, place)
            state = None
            if order.follows(step, place):
                end, state = ends[place]
                assert end == windows.starts[window]
                carried += 1
            batch = windows.read([window], WINDOW + config.training.leads_after(step) - 1)
            inputs, season, domain = batch.inputs_BTCYX, batch.year_fraction_BT, workspace.domain
            spun_up = network(inputs[:, :WINDOW], season[:, :WINDOW], domain=domain, state=state)
            ends[place] = windows.starts[window] + WINDOW, [(h.detach(), c.detach()) for h, c in spun_up.state]
            output = network(inputs, season, domain=domain, state=state, feedback=feedback_for(batch, WINDOW))
            loss = losses_of(network, output, batch, domain).total
            (loss.objective / SAMPLES).backward()
            of_samples.append(float(loss.value))
        losses.append(np.mean(of_samples))
        optimizer.param_groups[0]["lr"] = learning_rate(config.training, legs, step)
        optimizer.step()
    return losses, carried


@pytest.mark.parametrize("rollout", [{}, {3: 2, 6: 3}], ids=str)
def test_it_is_what_the_definition_says(tmp_path, store, rollout):
    training = {"optimizer": "sgd", "clip_norm": 0, "zero_stage": 0, "rollout": rollout}
    config = config_of(tmp_path / "carried", store, **training)
    ((want, carried),) = run_on_ranks(ONE, lambda mesh: written_out(config, mesh))
    np.testing.assert_allclose(losses_of_run(config), want, rtol=1e-5)
    assert 10 < carried < 30


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
    """The losses of one rank with Adam."""
    return losses_of_run(config_of(tmp_path_factory.mktemp("alone"), store))


@pytest.mark.parametrize(
    ("layout", "training"),
    [
        (Layout(1, 2, 2), {"zero_stage": 3, "accumulation": 2}),
        (Layout(2, 1, 2), {"zero_stage": 2, "accumulation": 2}),
        (Layout(1, 1, 3), {"zero_stage": 1}),
        (Layout(4, 1, 1), {"zero_stage": 0}),
    ],
    ids=str,
)
@pytest.mark.every(2)
def test_a_place_sees_the_same_on_every_mesh(tmp_path, store, alone, layout, training):
    np.testing.assert_allclose(losses_of_run(config_of(tmp_path, store, layout, **training)), alone, rtol=2e-5)


def without_its_end(config, away):
    """As a kill after step 7 of 10 leaves a run: the checkpoint of step 5 is its newest."""
    checkpoints_in(config.run_dir)[-1].path.rename(away)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.every(2, "precision", "accumulation")
def test_a_run_that_stopped_goes_on_bit_for_bit(tmp_path, store, accumulation, precision):
    training = {"accumulation": accumulation, "precision": precision, "save_in_background": precision == "bf16"}
    config = config_of(tmp_path, store, Layout(1, 1, 2), **training)
    whole = losses_of_run(config)
    without_its_end(config, tmp_path / "away")
    assert losses_of_run(config) == whole


@pytest.mark.parametrize("layout", [Layout(2, 2, 1), Layout(1, 1, 3), Layout(4, 1, 1), ONE], ids=str)
@pytest.mark.every(2)
def test_it_goes_on_at_another_mesh_from_the_same_states(tmp_path, store, alone, layout):
    config = config_of(tmp_path, store, Layout(2, 1, 2), zero_stage=2)
    losses_of_run(config)
    without_its_end(config, tmp_path / "away")
    np.testing.assert_allclose(losses_of_run(config_of(tmp_path, store, layout)), alone, rtol=2e-5)


def states_of(config, mesh):
    """(places, C_h, Y, X) h of the last layer on the whole grid, as this mesh reads them from the newest checkpoint."""
    workspace = Workspace.of(config, Store.open(config.data.store), mesh)
    carried = CarriedStates(config, workspace.domain, order_of(config, workspace.training_windows()))
    newest = checkpoints_in(config.run_dir)[-1]
    carried.load(newest.path, newest.manifest().states, torch.float32)
    return carried.piece.places, workspace.domain.assemble(dict(carried.tensors())["state/1/h"])


def test_every_mesh_reads_the_same_states_to_the_last_bit(tmp_path, store):
    losses_of_run(config_of(tmp_path, store, Layout(2, 1, 2), accumulation=2))
    ((_, want),) = run_on_ranks(ONE, lambda mesh: states_of(config_of(tmp_path, store), mesh))
    assert want.shape == (SAMPLES, 8, 11, 14) and all(want.flatten(1).std(1) > 1e-3)
    for layout, accumulation in ((Layout(1, 2, 2), 2), (Layout(2, 3, 1), 1), (Layout(4, 1, 1), 1)):
        config = config_of(tmp_path, store, layout, accumulation=accumulation)
        for places, got in run_on_ranks(layout, lambda mesh, config=config: states_of(config, mesh)):
            assert torch.equal(got, want[list(places)])


def test_what_is_forecast_from_looks_is_what_it_is_without_states(tmp_path, store):
    """A look begins with a state of zero, and leaves those of the run alone."""
    looks = {"validate_every": 2, "validate_samples": 3}
    config = config_of(tmp_path / "looks", store, **looks)
    tree = config.model_dump(mode="json")
    tree["data"]["periods"]["validation"] = ["2000-01-18/2000-01-19"]
    looking = type(config)(**tree)
    tree["training"]["validate_every"] = 0
    plain = type(config)(**{**tree, "run_dir": tmp_path / "plain"})
    assert losses_of_run(looking) == losses_of_run(plain)


def test_states_of_a_step_that_is_left_out_are_forgotten(tmp_path, store):
    """They may be what was not finite; the windows after it begin with zero."""

    def check(mesh):
        config = config_of(tmp_path, store)
        workspace = Workspace.of(config, Store.open(store), mesh)
        carried = CarriedStates(config, workspace.domain, order_of(config, workspace.training_windows()))
        bad = [(torch.full((SAMPLES, 8, 11, 14), torch.nan),) * 2]
        carried.after(bad)
        assert carried.before(1, 0) is None and carried.piece is None  # the step has not ended
        carried.end_step(applied=True)
        kept = carried.before(1, 0)
        follows = [order_of(config, workspace.training_windows()).follows(1, place) for place in range(SAMPLES)]
        assert kept[0][0].isnan().flatten(1).all(1).tolist() == follows and 0 < sum(follows) < SAMPLES
        assert not kept[0][0][[not one for one in follows]].any()
        carried.after(bad)
        carried.end_step(applied=False)
        return carried.before(1, 0), carried.piece, list(carried.tensors())

    assert run_on_ranks(ONE, check) == [(None, None, [])]


def test_a_checkpoint_of_before_there_were_states_can_be_gone_on_from(tmp_path, store):
    config = config_of(tmp_path, store, stateful_windows=0)
    whole = losses_of_run(config)
    without_its_end(config, tmp_path / "away")
    rewrite_as_format_4(checkpoints_in(config.run_dir)[-1].path)
    assert losses_of_run(config) == whole


def rewrite_as_format_4(directory):
    tree = json.loads((directory / MANIFEST).read_text())
    assert tree["format"] == FORMAT and not tree.pop("states")
    tree["format"] = "faconv_hpc checkpoint 4"
    tree["identity"].pop("training.stateful_windows")
    raw = json.dumps(tree).encode()
    (directory / MANIFEST).write_bytes(raw)
    lines = [line for line in (directory / SUMS).read_text().splitlines() if not line.endswith(MANIFEST)]
    lines.append(f"{hashlib.sha256(raw).hexdigest()}  {MANIFEST}")
    (directory / SUMS).write_text("".join(f"{line}\n" for line in sorted(lines, key=lambda one: one.split("  ")[1])))


def test_states_that_can_no_longer_be_read_are_said(tmp_path, store):
    losses_of_run(config_of(tmp_path, store))
    newest = checkpoints_in(tmp_path / "run")[-1]
    (file,) = newest.manifest().states
    (newest.path / file).unlink()

    def check(mesh):
        with pytest.raises(UnreadableCheckpointError, match=rf"{file} cannot be read: .*start the same command again"):
            states_of(config_of(tmp_path, store), mesh)

    run_on_ranks(ONE, check)


def test_a_period_of_attention_that_windows_break_is_refused(tmp_path, store):
    told = r"stateful_windows=3 carries.*every 4 steps.*a window of 6 steps.*a multiple of 4"
    with pytest.raises(InputError, match=told):
        small_config(
            tmp_path, store, data={"window": 6}, model={"attention_every": 4}, training={"stateful_windows": 3}
        )


def test_too_few_windows_to_follow_each_other_are_told_before_it_starts(tmp_path, store):
    config = config_of(tmp_path, store, micro_batch=10)
    told = r"stateful_windows=3 needs at least two windows in a row for each of the 10 samples.* has 18 for training"
    with Store.open(store) as opened, pytest.raises(InputError, match=told):
        check_store(config, opened)


def test_another_length_of_chains_is_another_run(tmp_path, store):
    losses_of_run(config_of(tmp_path, store, steps=4))
    with pytest.raises(AssertionError, match=r"holds a run with training\.stateful_windows=3, this config says 2"):
        losses_of_run(config_of(tmp_path, store, steps=4, stateful_windows=2))
