"""States that are carried from window to window: by their definition, on every mesh, through every stop."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from faconv_hpc.data.store import Store
from faconv_hpc.errors import EXIT_STOPPED, InputError
from faconv_hpc.model.state import NetworkState, Past
from faconv_hpc.training import trainer as trainer_module
from faconv_hpc.training.carried import CarriedStates
from faconv_hpc.training.fit import check_store
from faconv_hpc.training.free_run import feedback_for
from faconv_hpc.training.objective import losses_of
from faconv_hpc.training.records import read_records
from faconv_hpc.training.schedule import learning_rate, legs_of
from faconv_hpc.training.setup import Workspace, build_network, order_of
from faconv_hpc.training.shards import (
    DamagedCheckpointError,
    UnreadableCheckpointError,
    checkpoints_in,
)
from faconv_hpc.training.trainer import Trainer, train
from ranks import Layout, run_on_ranks
from runs import evaluated, make_store, skills_in, small_config, without_its_end

ONE = Layout(1, 1, 1)
WINDOW, SAMPLES = 4, 4
USUAL = {"steps": 10, "stateful_windows": 3, "checkpoint_every": 5, "learning_rate": 0.02}
SOME_FOLLOW = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "waves", frames=90)


def config_of(directory, store, layout=ONE, **training):
    """Each of the four samples of a step sees four windows in an epoch."""
    accumulation = training.pop("accumulation", 1)
    samples = {"micro_batch": SAMPLES // accumulation // layout.replicas, "accumulation": accumulation}
    periods = training.pop("periods", {"test": "2000-01-20/"})
    return small_config(
        directory,
        store,
        mesh=dict(zip(("replicas", "lat", "lon"), layout, strict=True)),
        data={"window": WINDOW, "periods": periods},
        training=USUAL | samples | training,
    )


def losses_of_run(config):
    layout = Layout(config.mesh.replicas, config.mesh.lat, config.mesh.lon)
    run_on_ranks(layout, lambda mesh: train(config, mesh))
    return [record.loss for record in read_records(config.run_dir)]


def detached(state):
    return NetworkState.of({name: one.detach() for name, one in state.tensors().items()})


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
            ends[place] = windows.starts[window] + WINDOW, detached(spun_up.state)
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


def carried_of(config, mesh):
    workspace = Workspace.of(config, Store.open(config.data.store), mesh)
    order = order_of(config, workspace.training_windows())
    return CarriedStates(config, workspace.domain, order), workspace, order


def states_of(config, mesh):
    """Places that follow, h of their last layer on the whole grid, and what their embeddings go on from, as this mesh
    reads them from a checkpoint."""
    carried, workspace, _ = carried_of(config, mesh)
    newest = checkpoints_in(config.run_dir)[-1]
    carried.load(newest.path, newest.manifest().states, torch.float32)
    found = carried.saved(newest.step)
    if found is None:
        return (), None, None
    tensors = found[1]
    assert bool(tensors["past/there"][:, -WINDOW:].all()) and tensors["past/there"].dtype == torch.bool
    return found[0].places, workspace.domain.assemble(tensors["1/h"]), tensors["past/tokens"]


def following(config):
    """Which of the four places go on after `SOME_FOLLOW` steps: some, not all."""
    (follows,) = run_on_ranks(
        ONE, lambda mesh: [carried_of(config, mesh)[2].follows(SOME_FOLLOW, place) for place in range(SAMPLES)]
    )
    assert 0 < sum(follows) < SAMPLES
    return follows


def test_every_mesh_reads_the_same_states_to_the_last_bit(tmp_path, store):
    """Of the places whose next window follows, and no more is saved."""
    losses_of_run(config_of(tmp_path, store, Layout(2, 1, 2), accumulation=2, steps=SOME_FOLLOW))
    alone = config_of(tmp_path, store)
    ((places, want, past),) = run_on_ranks(ONE, lambda mesh: states_of(alone, mesh))
    assert places == tuple(place for place, does in enumerate(following(alone)) if does)
    assert want.shape == (len(places), 8, 11, 14) and all(want.flatten(1).std(1) > 1e-3)
    assert past.shape == (len(places), 7, 16) and all(past[:, -WINDOW:].flatten(1).std(1) > 1e-3)
    for layout, accumulation in ((Layout(1, 2, 2), 2), (Layout(1, 3, 1), 1), (Layout(2, 1, 1), 2)):
        config, seen = config_of(tmp_path, store, layout, accumulation=accumulation), set()
        for own, *got in run_on_ranks(layout, lambda mesh, config=config: states_of(config, mesh)):
            for read, whole in zip(got, (want, past), strict=True):
                assert all(torch.equal(read[number], whole[places.index(place)]) for number, place in enumerate(own))
            seen |= {*own}
        assert seen == {*places}


def test_weights_are_read_without_states(tmp_path, store):
    config = config_of(tmp_path, store, steps=SOME_FOLLOW)
    losses_of_run(config)
    newest = checkpoints_in(config.run_dir)[-1]
    (file,) = newest.manifest().states
    want = newest.weights()
    (newest.path / file).write_bytes(b"damaged")
    assert all(torch.equal(value, want[name]) for name, value in newest.weights().items())
    with pytest.raises(DamagedCheckpointError, match=rf"{file} is damaged"):
        newest.check()


def test_looks_begin_with_a_state_of_zero_and_leave_those_of_the_run_alone(tmp_path, store):
    dates, rest = "2000-01-18/2000-01-19", "2000-01-20/"
    periods = {"train": ["/2000-01-17"], "validation": dates, "test": rest}
    plain = config_of(tmp_path / "plain", store, periods=periods)
    looking = config_of(tmp_path / "looks", store, periods=periods, validate_every=10, validate_samples=3)
    assert losses_of_run(looking) == losses_of_run(plain)
    tested = config_of(tmp_path / "tested", store, periods={"train": ["/2000-01-17"], "test": dates})
    losses_of_run(tested)
    (evaluation,) = run_on_ranks(ONE, lambda mesh: evaluated(tested, mesh, samples=3))
    assert [row["rmse"] for row in skills_in(looking.run_dir)] == pytest.approx(
        [skill.rmse for skill in evaluation.skills], rel=1e-6
    )


def test_a_state_is_of_the_step_before_once_that_has_ended(tmp_path, store):
    def check(mesh):
        carried, _, order = carried_of(config_of(tmp_path, store), mesh)
        cells, past = torch.rand(2, SAMPLES, 8, 11, 14), torch.rand(SAMPLES, 7, 16)
        state = NetworkState((tuple(cells),), Past(past, past[..., 0] > 0.5))
        carried.after(state)
        assert carried.before(SOME_FOLLOW, 0) is None and carried.saved(SOME_FOLLOW) is None
        carried.end_step(applied=True)
        follows = torch.tensor([order.follows(SOME_FOLLOW, place) for place in range(SAMPLES)])
        got = carried.before(SOME_FOLLOW, 0).tensors()
        for name, given in state.tensors().items():
            follow = follows.view(-1, *[1] * (given.dim() - 1))
            assert torch.equal(got[name], given.where(follow, torch.zeros_like(given)))
        carried.after(state)
        carried.end_step(applied=False)
        return carried.before(SOME_FOLLOW, 0), carried.saved(SOME_FOLLOW)

    following(config_of(tmp_path, store))
    assert run_on_ranks(ONE, check) == [(None, None)]


def test_where_a_step_is_left_out_windows_begin_with_zero_and_so_do_those_of_a_resumed_run(tmp_path, store):
    config = config_of(tmp_path, store, on_not_finite="skip", checkpoint_every=1, keep_last=20)
    following(config)

    def trained():
        def check(mesh):
            backward, before, zero = Trainer._backward, CarriedStates.before, set()

            def spoiled(self, batch, state):
                if self._activity.step == SOME_FOLLOW:
                    batch.target_BTCYX[0, 1, 0, 0, 0] = torch.nan
                return backward(self, batch, state)

            def seen(self, step, micro):
                states = before(self, step, micro)
                zero.update({step} if states is None else ())
                return states

            Trainer._backward, CarriedStates.before = spoiled, seen
            try:
                train(config, mesh)
                return zero
            finally:
                Trainer._backward, CarriedStates.before = backward, before

        (zero,) = run_on_ranks(ONE, check)
        return zero, [record.loss for record in read_records(config.run_dir)]

    zero, whole = trained()
    updates = [record.update for record in read_records(config.run_dir)]
    assert updates == ["skipped" if step == SOME_FOLLOW else "applied" for step in range(1, 11)]
    assert SOME_FOLLOW in zero  # the step after it, counted from 0
    for one in checkpoints_in(config.run_dir)[SOME_FOLLOW:]:
        shutil.rmtree(one.path)
    assert trained()[1][SOME_FOLLOW:] == whole[SOME_FOLLOW:]


def test_a_step_that_is_given_up_leaves_the_states_of_the_one_before(tmp_path, store):
    training = {"accumulation": 2, "checkpoint_every": 0, "steps": SOME_FOLLOW + 3}
    whole = losses_of_run(config_of(tmp_path / "whole", store, **training))
    config = config_of(tmp_path / "cut", store, **training)
    following(config)

    def check(mesh):
        agreed, asked = Trainer._agreed, trainer_module.ASKED_S

        def too_late(self, rest_s):
            end = agreed(self, rest_s)
            return replace(end, job_left_s=0.0) if self._activity.step == SOME_FOLLOW + 1 else end

        Trainer._agreed, trainer_module.ASKED_S = too_late, 0.0
        try:
            return train(config, mesh)
        finally:
            Trainer._agreed, trainer_module.ASKED_S = agreed, asked

    assert run_on_ranks(ONE, check) == [EXIT_STOPPED]
    assert [one.step for one in checkpoints_in(config.run_dir)] == [SOME_FOLLOW]
    assert losses_of_run(config) == whole


def test_states_that_can_no_longer_be_read_are_said(tmp_path, store):
    losses_of_run(config_of(tmp_path, store, steps=SOME_FOLLOW))
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


@pytest.mark.parametrize(
    ("data", "training", "told"),
    [
        ({}, {"micro_batch": 10}, r"needs two windows for each of the 10 samples.* has 18 for training.*smaller batch"),
        (
            {"window": 40},
            {"micro_batch": 1},
            r"the longest stretch .* is of 36 windows .* of 40 inputs each .* must be 80\. Use data\.window=25 or less",
        ),
    ],
)
def test_where_hardly_a_window_follows_another_it_is_told_before_it_starts(tmp_path, store, data, training, told):
    config = config_of(tmp_path, store, **training)
    config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    with Store.open(store) as opened, pytest.raises(InputError, match=told):
        check_store(config, opened)


def test_a_chain_of_one_window_is_refused(tmp_path, store):
    with pytest.raises(InputError, match=r"stateful_windows: .*a window that is alone follows none"):
        config_of(tmp_path, store, stateful_windows=1)


def test_another_length_of_chains_is_another_run(tmp_path, store):
    losses_of_run(config_of(tmp_path, store, steps=4))
    with pytest.raises(AssertionError, match=r"holds a run with training\.stateful_windows=3, this config says 2"):
        losses_of_run(config_of(tmp_path, store, steps=4, stateful_windows=2))
