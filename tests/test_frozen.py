"""Parameters that are left as they are, at every ZeRO stage."""

import pytest
import torch

from faconv_hpc import Domain
from faconv_hpc.config import TrainingConfig
from faconv_hpc.errors import InputError
from faconv_hpc.model import sweep
from faconv_hpc.training.engine import Engine
from faconv_hpc.training.frozen import frozen_in
from faconv_hpc.training.shards import checkpoints_in
from faconv_hpc.training.trainer import train
from ranks import Layout, run_on_ranks
from runs import make_store, small_config
from test_engine import LEARNING_RATE, grid, network, one_process_gradient, relative, sharded_update

PATTERNS = ("layers.0.*", "forecast.bias")


def moved(mesh, stage, precision, optimizer):
    """What two updates have changed of every parameter."""
    training = TrainingConfig(
        steps=100,
        zero_stage=stage,
        precision=precision,
        optimizer=optimizer,
        frozen=PATTERNS,
        weight_decay=0.1,
        ema=0.5,
    )
    engine, domain = Engine(network(), mesh, training), Domain(grid(), mesh)
    before = dict(engine.full_parameters())
    for _ in range(2):
        sharded_update(engine, domain, 2, 1, 1e-2)
    means = {name.removeprefix("ema/"): value for name, value in engine.full_moments() if name.startswith("ema/")}
    after = dict(engine.full_parameters())
    return {name: (float((after[name] - before[name]).abs().max()), torch.equal(means[name], before[name]))
            for name in before}  # fmt: skip


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "adamw"), ("bf16", "sgd")])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_they_stay_to_the_last_bit_and_the_others_learn(stage, precision, optimizer):
    frozen = frozen_in(network(), PATTERNS)
    for changes in run_on_ranks(Layout(1, 1, 2), moved, stage, precision, optimizer):
        assert {name for name, (change, _) in changes.items() if change == 0} == frozen
        assert all(same == (name in frozen) for name, (_, same) in changes.items())


@pytest.mark.parametrize("stage", [1, 3])
def test_the_others_are_updated_as_without(stage):
    def check(mesh):
        training = TrainingConfig(
            steps=100, optimizer="sgd", zero_stage=stage, clip_norm=0, micro_batch=3, frozen=PATTERNS
        )
        engine = Engine(network(), mesh, training)
        before = dict(engine.full_parameters())
        sharded_update(engine, Domain(grid(), mesh), 3, 1, LEARNING_RATE)
        after, want = dict(engine.full_parameters()), one_process_gradient()
        learning = {name: LEARNING_RATE * want[name] for name in want if name not in frozen_in(network(), PATTERNS)}
        return relative({name: before[name] - after[name] for name in learning}, learning, "")

    assert max(run_on_ranks(Layout(2, 1, 1), check)) <= 1e-5


def test_backward_goes_no_further_than_what_learns():
    """Nothing below learns, and so its sweeps have no backward; above, in the second layer, there are as many."""

    def check(mesh):
        domain, swept_back, counts = Domain(grid(), mesh), sweep._swept_back, []
        for frozen in ((), PATTERNS):
            calls = []
            engine = Engine(network(), mesh, TrainingConfig(steps=100, zero_stage=2, frozen=frozen))
            sweep._swept_back = lambda *given, calls=calls: (calls.append(1), swept_back(*given))[1]
            try:
                sharded_update(engine, domain, 2, 1, 1e-2)
            finally:
                sweep._swept_back = swept_back
            counts.append(len(calls))
        return counts

    for both, second in run_on_ranks(Layout(1, 1, 2), check):
        assert both == 2 * second > 0


def test_a_run_keeps_what_is_frozen_and_one_that_begins_from_it_may_free_it(tmp_path):
    store = make_store(tmp_path / "waves")

    def until(name, steps, frozen, **more):
        training = {"steps": steps, "frozen": frozen, "final_learning_rate_share": 1.0, "zero_stage": 2} | more
        config = small_config(tmp_path / name, store, mesh={"lon": 2}, training=training)
        run_on_ranks(Layout(1, 1, 2), lambda mesh: train(config, mesh))
        return checkpoints_in(config.run_dir)[-1].parameters()

    first, second = (until("first", steps, ["layers.1.*"]) for steps in (3, 5))
    for name, value in first.items():
        assert torch.equal(value, second[name]) == name.startswith("layers.1."), name
    with pytest.raises(AssertionError, match=r"training\.frozen=\['layers\.1\.\*'\], this config says \[\]"):
        until("first", 7, [])
    third = until("second", 3, ["layers.0.*"], start_from=str(tmp_path / "first" / "run"))
    for name, value in second.items():
        assert torch.equal(value, third[name]) == name.startswith("layers.0."), name


def test_patterns_that_mean_nothing_or_everything_are_refused():
    with pytest.raises(InputError, match=r"no parameter for training\.frozen: 'layer\.0\.\*' in the network"):
        frozen_in(network(), ["layer.0.*"])
    with pytest.raises(InputError, match=r"training\.frozen=\['\*'\] leaves nothing to train"):
        frozen_in(network(), ["*"])
