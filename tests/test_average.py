"""The mean of the weights (training.ema): what it is, who uses it, and that nothing of it is lost."""

import time

import numpy as np
import pytest
import torch

from faconv_hpc import Domain, load_network
from faconv_hpc.config import TrainingConfig
from faconv_hpc.errors import InputError
from faconv_hpc.training.engine import Engine
from faconv_hpc.training.export import export
from faconv_hpc.training.shards import checkpoints_in
from faconv_hpc.training.skill import SkillSums
from faconv_hpc.training.trainer import train
from ranks import Layout, run_on_ranks
from runs import evaluated, make_store, skills_in, small_config
from test_checkpoint import assert_same_state, train_until
from test_engine import every_parameter_cut, grid, network, samples, sharded_update
from test_parity import relative_difference
from test_validation import DATA, DATES, config_of, losses_of, rows_of, trained

DECAY, UPDATES = 0.3, 4
ONE = Layout(1, 1, 1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "waves")


def averaged(mesh, stage, precision, optimizer):
    """The weights after each update, the mean that the engine keeps, the weights while and after it evaluates, and how
    far its forecast is from that of a network with the mean."""
    training = TrainingConfig(steps=100, zero_stage=stage, precision=precision, optimizer=optimizer, ema=DECAY)
    engine, domain, seen = Engine(network(), mesh, training), Domain(grid(), mesh), []
    for _ in range(UPDATES):
        seen.append(dict(engine.full_parameters()))
        sharded_update(engine, domain, 2, 1, 1e-2)
    seen.append(dict(engine.full_parameters()))
    mean = {name.removeprefix("ema/"): value for name, value in engine.full_moments() if name.startswith("ema/")}
    x, season = samples()[0][:2], samples()[2][:2]
    with engine.evaluating():
        used = dict(engine.full_parameters())
        got = engine.forward(x, season, domain).tendency_BTCYX
    plain = network()
    plain.load_state_dict(mean)
    plain.to(engine.activation_type)
    with torch.no_grad():
        want = plain(x, season, domain=domain).tendency_BTCYX
    return seen, mean, used, dict(engine.full_parameters()), relative_difference(got, want)


@pytest.mark.parametrize(
    ("stage", "precision", "optimizer"),
    [(stage, precision, "adamw") for stage in range(4) for precision in ("fp32", "bf16")] + [(1, "fp32", "sgd")],
)
@pytest.mark.every(2, "stage", "precision", "optimizer")
def test_it_is_the_mean_that_its_definition_says(stage, precision, optimizer):
    for seen, mean, used, after, difference in run_on_ranks(Layout(2, 1, 1), averaged, stage, precision, optimizer):
        assert difference <= 1e-5
        for name, got in mean.items():
            want = seen[0][name].double()
            for number, weights in enumerate(seen[1:], start=1):
                decay = min(DECAY, (1 + number) / (10 + number))
                want = decay * want + (1 - decay) * weights[name].double()
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)
            assert torch.equal(used[name], got) and torch.equal(after[name], seen[-1][name])
        assert any(not torch.equal(mean[name], seen[-1][name]) for name in mean)


def test_validation_evaluation_and_export_use_it_and_training_does_not(tmp_path, store):
    plain, averaged = (config_of(tmp_path / name, store, ema=ema) for name, ema in (("plain", 0.0), ("mean", 0.8)))
    for config in (plain, averaged):
        trained(config)
    assert losses_of(plain) == losses_of(averaged)
    last = [[row["rmse"] for row in skills_in(config.run_dir)[-4:]] for config in (plain, averaged)]
    assert last[0] != last[1]
    data = DATA | {"periods": {"train": ["/2000-01-02T12", "2000-01-03T19/2000-01-03"], "test": DATES}}
    config = config_of(tmp_path / "evaluated", store, data=data, ema=0.8, validate_every=0)
    assert trained(config) == [] and losses_of(config) == losses_of(averaged)
    (evaluation,) = run_on_ranks(ONE, lambda mesh: evaluated(config, mesh, 2))
    np.testing.assert_allclose([skill.rmse for skill in evaluation.skills], last[1], rtol=1e-6)
    newest = checkpoints_in(averaged.run_dir)[-1]
    assert any(not torch.equal(value, newest.weights()[name]) for name, value in newest.parameters().items())
    export(newest, tmp_path / "weights.safetensors")
    for place in (averaged.run_dir, newest.path, tmp_path / "weights.safetensors"):
        used = load_network(place).network.state_dict()
        assert all(torch.equal(used[name], value) for name, value in newest.weights().items())


def test_looks_by_the_mean_leave_no_trace_where_every_parameter_is_cut(tmp_path, store):
    """At ZeRO 3 DeepSpeed leaves parameters whole after a forward pass without backward, and would use them again."""
    layout = Layout(1, 1, 2)

    def losses(ema):
        config = config_of(tmp_path / str(ema), store, layout, zero_stage=3, ema=ema)

        def check(mesh):
            with every_parameter_cut():
                return train(config, mesh)

        run_on_ranks(layout, check)
        return losses_of(config)

    assert losses(0.9) == losses(0.0)


def test_an_error_on_one_rank_in_a_look_ends_all(tmp_path, store):
    """Putting the weights back takes all ranks, and the others wait elsewhere."""
    layout = Layout(1, 1, 2)
    config = config_of(tmp_path, store, layout, ema=0.9)

    def check(mesh):
        add = SkillSums.add

        def failing(self, *given, **named):
            if mesh.rank == 1:
                raise InputError("a damaged chunk")
            add(self, *given, **named)

        SkillSums.add = failing
        try:
            train(config, mesh)
        finally:
            SkillSums.add = add

    began = time.monotonic()
    with pytest.raises(AssertionError, match="a damaged chunk"):
        run_on_ranks(layout, check)
    assert time.monotonic() - began < 60


def test_a_run_that_is_resumed_keeps_it_to_the_last_bit(tmp_path, store):
    training = {"steps": 6, "checkpoint_every": 2, "ema": 0.9, "zero_stage": 2}
    layout, mesh = Layout(1, 1, 2), {"lon": 2}
    whole, cut = (small_config(tmp_path / name, store, mesh=mesh, training=training) for name in ("whole", "cut"))
    train_until(layout, whole, 6)
    train_until(layout, cut, 3)
    run_on_ranks(layout, lambda mesh: train(cut, mesh))
    assert_same_state(*(checkpoints_in(config.run_dir)[-1] for config in (whole, cut)))


def test_begun_in_the_middle_it_begins_with_the_weights_and_it_can_be_left_out_again(tmp_path, store):
    def until(steps, ema):
        training = {"steps": steps, "ema": ema, "warmup_steps": 0, "final_learning_rate_share": 1.0}
        config = small_config(tmp_path, store, training=training)
        run_on_ranks(ONE, lambda mesh: train(config, mesh))
        return checkpoints_in(config.run_dir)[-1]

    before = until(2, 0.0)
    then = until(3, 0.9)
    decay = min(0.9, 4 / 13)
    for name, mean in then.weights().items():
        want = decay * before.parameters()[name] + (1 - decay) * then.parameters()[name]
        torch.testing.assert_close(mean, want, rtol=1e-5, atol=1e-7)
    last = until(4, 0.0)
    assert "ema" not in last.manifest().moments
    assert all(torch.equal(last.weights()[name], value) for name, value in last.parameters().items())
    assert rows_of(small_config(tmp_path, store)) == []
