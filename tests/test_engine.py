"""DeepSpeed: one update equals one process; the whole state survives; on every stage and mesh."""

import pytest
import torch

from faconv_hpc import Domain, FAConvLSTMNetwork, LatLonGrid
from faconv_hpc.config import TrainingConfig
from faconv_hpc.training import engine as engine_module
from faconv_hpc.training.engine import Engine
from ranks import Layout, run_on_ranks
from test_domain import random_like
from test_parity import randomized

LAYOUTS = [Layout(1, 2, 2), Layout(2, 1, 2), Layout(2, 2, 1), Layout(4, 1, 1)]
BATCH = 4


def grid():
    return LatLonGrid(9, 10, lat_boundary="pole")


def network(checkpoint_steps=0):
    return randomized(
        FAConvLSTMNetwork(4, 3, 8, 2, attention_every=2, embedding_channels=16, coarse_shape=(2, 3),
                          checkpoint_steps=checkpoint_steps)
    ).float()  # fmt: skip


def samples():
    x, target = random_like((BATCH, 3, 4, 9, 10), 1).float(), random_like((BATCH, 3, 3, 9, 10), 2).float()
    valid = random_like(target.shape, 3) > -0.5
    return x, target, random_like((BATCH, 3), 4).sigmoid(), valid


def one_process_update(training, domain):
    """Parameters after one plain SGD update with the whole batch, and the norm of its gradient."""
    model = network()
    x, target, season, valid = samples()
    loss = model.loss(model(x, season, domain=domain), x, target, domain, valid)
    loss.objective.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    factor = min(1.0, training.clip_norm / float(norm)) if training.clip_norm else 1.0
    return {
        name: parameter.detach() - training.learning_rate * factor * parameter.grad
        for name, parameter in model.named_parameters()
    }, float(norm)


def sharded_update(engine, domain, micro_batch, accumulation, learning_rate):
    """The same through DeepSpeed, the batch dealt to replicas and micro-batches."""
    x, target, season, valid = samples()
    per_micro = BATCH // accumulation
    for micro in range(accumulation):
        first = micro * per_micro + domain.mesh.replica * micro_batch
        part = slice(first, first + micro_batch)
        inputs = domain.scatter(x[part])
        output = engine.forward(inputs, season[part], domain)
        loss = engine.network.loss(output, inputs, domain.scatter(target[part]), domain, domain.scatter(valid[part]))
        engine.backward(loss)
        engine.step(learning_rate)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("clip_norm", [0.0, 0.01])
def test_one_sgd_update_equals_one_process(layout, stage, clip_norm):
    def check(mesh):
        micro_batch = BATCH // layout.replicas
        training = TrainingConfig(
            steps=100,
            optimizer="sgd",
            learning_rate=1.0,
            zero_stage=stage,
            clip_norm=clip_norm,
            micro_batch=micro_batch,
        )
        engine = Engine(network(checkpoint_steps=2), mesh, training)
        sharded_update(engine, Domain(grid(), mesh), micro_batch, 1, 1.0)
        got = dict(engine.full_parameters())
        want, norm = one_process_update(training, Domain(grid()))
        update = max(float((want[name] - value).abs().max()) for name, value in network().named_parameters())
        difference = max(float((got[name] - want[name]).abs().max()) for name in want)
        return difference, update, engine.gradient_norm, norm

    for difference, update, got_norm, norm in run_on_ranks(layout, check):
        assert update > 1e-3  # else the test proves nothing
        assert difference <= 1e-6
        assert got_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("checkpoint_steps", [0, 2])
def test_zero_3_with_every_parameter_cut(checkpoint_steps):
    """By default DeepSpeed keeps parameters as small as ours whole on every rank."""

    def check(mesh):
        config = engine_module._deepspeed_config

        def cut_all(training, device):
            tree = config(training, device)
            tree["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            return tree

        engine_module._deepspeed_config = cut_all
        try:
            training = TrainingConfig(
                steps=100, optimizer="sgd", learning_rate=1.0, zero_stage=3, clip_norm=0, micro_batch=2
            )
            engine = Engine(network(checkpoint_steps), mesh, training)
        finally:
            engine_module._deepspeed_config = config
        assert not any(parameter.ds_persist for parameter in engine.network.parameters())
        sharded_update(engine, Domain(grid(), mesh), 2, 1, 1.0)
        got, (want, _) = dict(engine.full_parameters()), one_process_update(training, Domain(grid()))
        return max(float((got[name] - want[name]).abs().max()) for name in want)

    assert max(run_on_ranks(Layout(2, 1, 2), check)) <= 1e-6


@pytest.mark.parametrize("stage", [0, 3])
def test_accumulated_micro_batches_equal_one_batch(stage):
    def check(mesh):
        training = TrainingConfig(
            steps=100, optimizer="sgd", learning_rate=1.0, zero_stage=stage, clip_norm=0, accumulation=2
        )
        engine = Engine(network(), mesh, training)
        sharded_update(engine, Domain(grid(), mesh), 1, 2, 1.0)
        got, (want, _) = dict(engine.full_parameters()), one_process_update(training, Domain(grid()))
        return max(float((got[name] - want[name]).abs().max()) for name in want)

    assert max(run_on_ranks(Layout(2, 1, 2), check)) <= 1e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_state_put_in_place_continues_bit_for_bit(stage, precision):
    def check(mesh):
        training = TrainingConfig(steps=100, zero_stage=stage, precision=precision, learning_rate=1e-2, micro_batch=2)
        domain = Domain(grid(), mesh)
        first = Engine(network(), mesh, training)
        for _ in range(2):
            sharded_update(first, domain, 2, 1, 1e-2)
        parameters, moments = dict(first.full_parameters()), dict(first.full_moments())
        second = Engine(
            FAConvLSTMNetwork(4, 3, 8, 2, attention_every=2, embedding_channels=16, coarse_shape=(2, 3)), mesh, training
        )
        second.load_full(parameters, moments, step=2)
        for engine in (first, second):
            for _ in range(2):
                sharded_update(engine, domain, 2, 1, 1e-2)
        want, got = dict(first.full_parameters()), dict(second.full_parameters())
        moved = max(float((want[name] - parameters[name]).abs().max()) for name in want)
        return moved, all(torch.equal(want[name], got[name]) for name in want)

    for moved, equal in run_on_ranks(Layout(2, 1, 2), check):
        assert moved > 1e-3 and equal
