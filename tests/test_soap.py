"""SOAP: what an update is, that it finds the basis and learns where Adam is slow, and that no cut of the grid shows."""

import numpy as np
import pytest
import torch

from faconv_hpc import Domain
from faconv_hpc.config import TrainingConfig
from faconv_hpc.errors import InputError
from faconv_hpc.training.engine import Engine
from faconv_hpc.training.fit import check_fits
from faconv_hpc.training.optimizers import new_moment
from faconv_hpc.training.soap import DAMPING, EPS, KEPT, REFRESH, Soap, sides_of
from ranks import Layout, run_on_ranks
from runs import assert_same_on_every_mesh, make_store, small_config, trained, without_its_end
from test_engine import assert_goes_on_bit_for_bit, grid, network, sharded_update

RATE, BETA2, DECAY = 0.03, 0.9, 0.1


def updated(value, gradients, **options):
    """A parameter after updates with these gradients, and its optimizer's state."""
    parameter = torch.nn.Parameter(torch.tensor(value))
    optimizer = Soap([{"params": [parameter]}], lr=RATE, beta2=BETA2, **options)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    return parameter.detach().numpy(), optimizer.state[parameter]


def by_definition(value, gradients, *, turned):
    """The equations of the docstring, by NumPy."""
    w = value.reshape(len(value), -1).copy() if turned else value.reshape(1, -1).copy()
    n, m = w.shape
    left, right, q_left, q_right = np.zeros((n, n)), np.zeros((m, m)), np.eye(n), np.eye(m)
    mean, square = np.zeros_like(w), np.zeros_like(w)

    def nearer(basis, side):
        return np.linalg.qr((side + DAMPING * np.trace(side) / len(side) * np.eye(len(side))) @ basis)[0]

    for count, gradient in enumerate((one.reshape(w.shape) for one in gradients), start=1):
        left = BETA2 * left + (1 - BETA2) * gradient @ gradient.T
        right = BETA2 * right + (1 - BETA2) * gradient.T @ gradient
        if turned and (count - 1) % REFRESH == 0:
            q_left, q_right = nearer(q_left, left), nearer(q_right, right)
        mean = 0.9 * mean + 0.1 * gradient
        square = BETA2 * square + (1 - BETA2) * (q_left.T @ gradient @ q_right) ** 2
        root = np.sqrt(square / (1 - BETA2**count))
        step = (q_left.T @ mean @ q_right) / (1 - 0.9**count) / (root + EPS * np.sqrt((root**2).mean()))
        w = (1 - RATE * DECAY) * w - RATE * q_left @ step @ q_right.T
    return w.reshape(value.shape)


@pytest.mark.parametrize("shape", [(5, 7), (9, 4), (6, 2, 3, 1), (3, 16, 9), (11,)], ids=str)
def test_an_update_is_what_its_definition_says(shape):
    random = np.random.default_rng(1)
    value, gradients = random.normal(size=shape), random.normal(size=(2 * REFRESH + 2, *shape))
    got, _ = updated(value, gradients, weight_decay=DECAY)
    want = by_definition(value, gradients, turned=sides_of(torch.Size(shape)) != (0, 0))
    np.testing.assert_allclose(got, want, rtol=1e-9)


def test_sides_that_are_too_long_or_short_keep_the_plain_basis():
    shapes = [(128, 16), (1025, 40), (8, 1100), (3, 16, 9), (7,), (12, 32, 1, 1), ()]
    want = [(128, 16), (0, 40), (8, 0), (0, 0), (0, 0), (12, 32), (0, 0)]
    assert [sides_of(torch.Size(shape)) for shape in shapes] == want
    random = np.random.default_rng(1)
    value, gradients = random.normal(size=(1025, 4)), random.normal(size=(3, 1025, 4))
    got, state = updated(value, gradients)
    assert state["left"].shape == state["left_basis"].shape == (0, 0) and state["right_basis"].shape == (4, 4)
    assert 0 < np.abs(got - value).max() < 20 * RATE


def test_the_bases_find_what_hangs_together():
    """Rows and columns of gradients that are mixed by rotations, with scales that lie apart."""
    random = np.random.default_rng(2)
    rows, columns = (np.linalg.qr(random.normal(size=(size, size)))[0] for size in (5, 6))
    scales = np.outer(4.0 ** -np.arange(5), 3.0 ** -np.arange(6))
    gradients = [rows @ (scales * random.normal(size=(5, 6))) @ columns.T for _ in range(400)]
    _, state = updated(np.zeros((5, 6)), gradients)
    for basis, own in (("left_basis", rows), ("right_basis", columns)):
        found = state[basis].numpy()
        np.testing.assert_allclose(found @ found.T, np.eye(len(own)), atol=1e-12)
        shares = np.abs(own.T @ found)
        assert (shares.diagonal()[:3] > 0.95).all(), shares


def least_squares(optimizer_of, rate, steps=200):
    """What is left of the loss where inputs are mixed and of very different size."""
    random = torch.Generator().manual_seed(3)
    mixed = torch.linalg.qr(torch.randn(24, 24, generator=random, dtype=torch.float64))[0]
    sizes = torch.logspace(0, -3, 24, dtype=torch.float64)
    inputs = torch.randn(300, 24, generator=random, dtype=torch.float64) * sizes @ mixed
    wanted = inputs @ torch.randn(24, 8, generator=random, dtype=torch.float64)
    weight = torch.nn.Parameter(torch.zeros(8, 24, dtype=torch.float64))
    optimizer = optimizer_of([weight])
    for step in range(steps):
        loss = (inputs @ weight.T - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()
    return float((inputs @ weight.T - wanted).detach().square().mean() / wanted.square().mean())


def test_it_learns_where_adam_is_slow():
    """Each at its best rate."""
    rates = (0.01, 0.03, 0.1, 0.3)
    soap, adam = (
        min(least_squares(kind, rate) for rate in rates)
        for kind in (
            lambda weights: Soap([{"params": weights}], beta2=0.95),
            lambda weights: torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=0.0),
        )
    )
    assert soap < adam / 3


def test_what_has_no_gradient_stays():
    value = np.random.default_rng(4).normal(size=(6, 5)).astype(np.float32)
    got, state = updated(value, [np.zeros_like(value)] * 7)
    assert np.array_equal(got, value) and torch.equal(state["left_basis"].abs(), torch.eye(6))


@pytest.mark.parametrize("size", [1e-17, 1e-22, 1e-25, 1e-40])
def test_tiny_gradients_make_no_larger_steps_than_others(size):
    """Also where their squares are 0."""
    random = np.random.default_rng(6)
    gradients = [(size * random.normal(size=(6, 5))).astype(np.float32) for _ in range(7)]
    got, _ = updated(np.zeros((6, 5), dtype=np.float32), gradients)
    assert np.abs(got).max() < 7 * 3 * RATE


def test_rounding_does_not_show():
    """Nor in directions that have no more than that."""
    random = np.random.default_rng(5)
    some = random.normal(size=(12, 16, 3)) @ random.normal(size=(3, 20))  # of rank 3
    noise = 1 + 1e-7 * random.normal(size=(2, *some.shape))
    value = np.zeros(some.shape[1:], dtype=np.float32)
    one, other = (updated(value, (some * part).astype(np.float32))[0] for part in noise)
    assert np.abs(one - other).max() < 2e-3 * np.abs(one).max()


# In a run


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("soap") / "waves")


def config_of(directory, store, layout, **training):
    usual = {"optimizer": "soap", "zero_stage": 0, "beta2": 0.95, "learning_rate": 0.03}
    usual |= {"steps": 12, "checkpoint_every": 4, "micro_batch": 2 // layout.replicas}
    return small_config(directory, store, mesh=layout._asdict(), training=usual | training)


def test_a_run_is_the_same_on_every_mesh_and_goes_on_on_another(tmp_path, store):
    want = assert_same_on_every_mesh(tmp_path, lambda directory, layout: config_of(directory, store, layout), 5e-5)
    assert want[-1] < 0.9 * want[0]


def test_a_run_that_stopped_goes_on_bit_for_bit(tmp_path, store):
    """Between two steps of the bases."""
    layout = Layout(1, 1, 2)
    config = config_of(tmp_path, store, layout, ema=0.5, checkpoint_every=7)
    want = trained(config, layout)
    without_its_end(config, tmp_path / "away")
    assert trained(config, layout) == want


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_state_put_in_place_continues_bit_for_bit(precision):
    options = {"optimizer": "soap", "zero_stage": 0, "precision": precision, "learning_rate": 1e-2, "micro_batch": 2}
    assert_goes_on_bit_for_bit(TrainingConfig(steps=100, **options))


def test_the_state_has_the_shapes_that_resuming_expects():
    value = torch.zeros(8, 3, 2)
    shapes = {name: tuple(new_moment(name, value.to("meta")).shape) for name in KEPT}
    assert shapes == {
        "exp_avg": (8, 3, 2), "exp_avg_sq": (8, 3, 2), "left": (8, 8), "right": (6, 6), "left_basis": (8, 8),
        "right_basis": (6, 6),
    }  # fmt: skip
    assert torch.equal(new_moment("right_basis", value), torch.eye(6))


def test_all_ranks_have_the_weights_of_the_first(tmp_path):
    """Whose products may round otherwise than theirs: here by an update that is other on each."""

    def check(mesh):
        training = TrainingConfig(steps=100, optimizer="soap", zero_stage=0, micro_batch=1, ema=0.5)
        engine, domain = Engine(network(), mesh, training), Domain(grid(), mesh)
        plain = engine._torch_optimizer.step

        def step(*given):
            plain(*given)
            for value in engine._shards():
                value.data.add_(mesh.rank)

        engine._torch_optimizer.step = step
        sharded_update(engine, domain, 3 // mesh.replicas, 1, 1e-2)
        return dict(engine.full_parameters()), dict(engine.full_moments())

    (weights, moments), *others = run_on_ranks(Layout(1, 1, 3), check)
    assert len(others) == 2
    for other, kept in others:
        assert all(torch.equal(other[name], value) for name, value in weights.items())
        assert all(torch.equal(kept[f"ema/{name}"], moments[f"ema/{name}"]) for name in weights)


@pytest.mark.parametrize("stage", [1, 3])
def test_matrices_that_are_cut_are_refused(tmp_path, store, stage):
    told = rf"optimizer=soap turns .* training\.zero_stage={stage} cuts them\. Use zero_stage: 0, or"
    with pytest.raises(InputError, match=told):
        check_fits(config_of(tmp_path, store, Layout(1, 1, 1), zero_stage=stage))

    def check(mesh):
        with pytest.raises(InputError, match=told):
            Engine(network(), mesh, TrainingConfig(steps=100, optimizer="soap", zero_stage=stage))

    run_on_ranks(Layout(1, 1, 1), check)
