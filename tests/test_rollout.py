"""Training through free runs: the same gradients on every mesh and however they are stored, and a schedule of leads."""

from collections import Counter

import numpy as np
import pytest
import torch

from faconv_hpc import Domain, FAConvLSTMNetwork, LatLonGrid
from faconv_hpc.config_file import load_config
from faconv_hpc.data.samples import Batch
from faconv_hpc.data.store import Store
from faconv_hpc.data.variables import Channels, Variable
from faconv_hpc.errors import InputError
from faconv_hpc.observe import Clock
from faconv_hpc.training.fit import check_store
from faconv_hpc.training.free_run import feedback_for, free_run
from faconv_hpc.training.objective import losses_of
from faconv_hpc.training.parity import verify_parity
from faconv_hpc.training.records import read_records
from faconv_hpc.training.shards import checkpoints_in
from faconv_hpc.training.trainer import train
from ranks import Layout, run_on_ranks
from runs import make_store, small_config, write_config
from test_domain import random_like
from test_parity import randomized, relative_difference

ONE = Layout(1, 1, 1)
WINDOW, LEADS, CELLS = 3, 4, (11, 14)
STEPS = WINDOW + LEADS - 1
FIELDS, LEAD_WEIGHTS = 2, (0.5, 2.0)
NUMBERS = {"units": "", "mean": 0.0, "std": 2.0}
CHANNELS = Channels(
    [
        Variable(name="p", tendency_std=0.6, loss_weight=3, **NUMBERS),
        Variable(name="q", tendency_std=1.4, may_miss=True, **NUMBERS),
        Variable(name="f", role="forcing", may_miss=True, tendency_std=1, **NUMBERS),
        Variable(name="d", role="diagnostic", tendency_std=1, **NUMBERS),
    ],
    ["insolation"],
)  # inputs: p, q, f, fresh_q, fresh_f, insolation


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "waves")


def grid():
    return LatLonGrid(*CELLS, lat_boundary="pole")


def network(checkpoint_steps=0):
    options = {"attention_every": 2, "attention_heads": 2, "embedding_channels": 16, "coarse_shape": (2, 3)}
    return randomized(
        FAConvLSTMNetwork(6, FIELDS, 8, 2, diagnostic_channels=1, checkpoint_steps=checkpoint_steps, **options)
    )


def batch_of(domain):
    x = random_like((2, STEPS, 6, *CELLS), 1)
    x[:, :, 3:5] = (x[:, :, 3:5] > -0.8).double() / (1 + (x[:, :, 3:5] > 0.5).double())  # 0, 1/2 and 1
    x[:, :, 1:3] *= x[:, :, 3:5] > 0
    valid = random_like((2, STEPS, 3, *CELLS), 3) > -1.2
    target = random_like((2, STEPS, 3, *CELLS), 2)
    season = random_like((2, STEPS), 4).sigmoid()
    whole = domain.scatter(x).clone().requires_grad_(), domain.scatter(target), domain.scatter(valid)
    return Batch(*whole, season, (0, 1), CHANNELS)


def gradients_of(mesh, checkpoint_steps, through=True):
    """Loss, and gradients of input and parameters, of a rollout."""
    domain, model = Domain(grid(), mesh), network(checkpoint_steps)
    batch = batch_of(domain)
    feedback = feedback_for(batch, WINDOW, through=through)
    output = model(batch.inputs_BTCYX, batch.year_fraction_BT, domain=domain, feedback=feedback)
    losses = losses_of(model, output, batch, domain, LEAD_WEIGHTS)
    share = losses.total.objective / domain.tiles
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(share, [batch.inputs_BTCYX, *parameters.values()])
    values = {"input": domain.assemble(found[0]), "loss": losses.total.value, "forecast": losses.forecast.value}
    return values | {name: domain.total(one) for name, one in zip(parameters, found[1:], strict=True)}


def written_out(through=True):
    """The same by its definition, on one tile: the network step by step, the loss cell by cell."""
    domain, model = Domain(grid()), network()
    batch = batch_of(domain)
    x, season = batch.inputs_BTCYX, batch.year_fraction_BT
    area = torch.from_numpy(domain.grid.cell_area_sr)[:, None].expand(CELLS)
    weights = torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64)

    def mean(error, valid, steps):
        """Over cells, channels and steps, of each sample."""
        weighed = area * weights[:, None, None] * steps[:, None, None, None] * valid
        return ((error**2 * weighed).sum((1, 2, 3, 4)) / weighed.sum((1, 2, 3, 4))).mean()

    valid, target = batch.valid_BTCYX.double(), batch.target_BTCYX
    begun = (x[:, WINDOW - 1, 3:4] > 0).double()
    sequence, forecasts = x[:, :WINDOW], []
    embedding = None
    for at in range(WINDOW, STEPS + 1):
        output = model(sequence, season[:, : sequence.shape[1]], domain=domain)
        forecasts = output.forecast_BTCYX
        embedding = output
        if at < STEPS:
            change = forecasts[:, WINDOW - 1 :, :FIELDS].sum(1)
            change = change if through else change.detach()
            now = x[:, WINDOW - 1, :FIELDS] + change * torch.tensor([0.3, 0.7], dtype=torch.float64)[:, None, None]
            now = torch.cat([now[:, :1], now[:, 1:] * begun], 1)
            later = torch.cat([now, x[:, at, 2:3], begun, x[:, at, 4:]], 1)
            sequence = torch.cat([sequence, later[:, None]], 1)
    first = mean(forecasts[:, :WINDOW] - target[:, :WINDOW], valid[:, :WINDOW], torch.ones(WINDOW))
    errors, known = [], []
    for lead in range(1, LEADS):
        span = slice(WINDOW - 1, WINDOW + lead)
        said = forecasts[:, span, :FIELDS]
        said = said if through else torch.cat([said[:, :-1].detach(), said[:, -1:]], 1)
        change = (said - target[:, span, :FIELDS]).sum(1)
        last = WINDOW - 1 + lead
        there = valid[:, last, :FIELDS] * torch.cat([torch.ones_like(begun), begun], 1)
        errors.append(torch.cat([change, forecasts[:, last, FIELDS:] - target[:, last, FIELDS:]], 1))
        known.append(torch.cat([there, valid[:, last, FIELDS:]], 1))
    leads = torch.tensor([0.5, 2.0, 2.0], dtype=torch.float64)
    free = mean(torch.stack(errors, 1), torch.stack(known, 1), leads)
    whole = (first * WINDOW + free * leads.sum()) / (WINDOW + leads.sum())
    loss = whole + model.embedding_weight * model.embedding_loss(embedding, x, domain, batch.fresh_BTCYX).objective
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, [x, *parameters.values()])
    values = {"input": found[0], "loss": loss.detach(), "forecast": first.detach()}
    return values | dict(zip(parameters, found[1:], strict=True))


@pytest.mark.parametrize(("checkpoint_steps", "through"), [(0, True), (1, True), (2, True), (0, False), (2, False)])
def test_gradients_go_through_all_leads_or_each_alone_and_are_those_of_one_tile(checkpoint_steps, through):
    want = written_out(through)
    for layout in (ONE, Layout(1, 2, 2), Layout(1, 1, 3)):
        for got in run_on_ranks(layout, gradients_of, checkpoint_steps, through):
            differences = {name: relative_difference(got[name], value) for name, value in want.items()}
            assert max(differences.values()) < 1e-12, differences


def verbs_of(mesh, checkpoint_steps, exchange):
    """How often each verb was heard of, forward and backward, of a window and a free run."""
    domain, model, counts, communicating = (
        Domain(grid(), mesh),
        network(checkpoint_steps),
        Counter(),
        Clock.communicating,
    )
    for layer in model.layers:
        layer.attention.rows.exchange = layer.attention.columns.exchange = exchange

    def counting(clock, verb):
        counts[verb] += 1
        return communicating(clock, verb)

    batch = batch_of(domain)
    Clock.communicating = counting
    try:
        given = batch.inputs_BTCYX, batch.year_fraction_BT
        output = model(*given, domain=domain, feedback=feedback_for(batch, WINDOW))
        forward = Counter(counts)
        output.forecast_BTCYX.square().sum().backward()
    finally:
        Clock.communicating = communicating
    return forward, counts - forward


@pytest.mark.parametrize("exchange", ["gather", "swap"])
def test_what_is_computed_again_sends_nothing(exchange):
    """Neither for halos and means nor for attention, in the window and beyond it."""
    for checkpoint_steps in (0, 2):
        for forward, backward in run_on_ranks(Layout(1, 2, 2), verbs_of, checkpoint_steps, exchange):
            assert min(forward[verb] for verb in ("pad", "mean", exchange)) > 0
            assert not backward.keys() & {"pad", "mean", "gather"}
            assert backward["adjoint of pad"] == forward["pad"]
            assert backward["adjoint of gather"] == forward["gather"]
            assert backward["swap"] == forward["swap"]  # whose adjoint goes by the same name


@torch.no_grad()
def test_it_is_the_free_run_of_forecasts():
    domain, model = Domain(grid()), network()
    batch = batch_of(domain)
    output = model(batch.inputs_BTCYX, batch.year_fraction_BT, domain=domain, feedback=feedback_for(batch, WINDOW))
    changes = output.tendency_BTCYX[:, WINDOW - 1 :].cumsum(1)
    for lead, (change, diagnostic) in enumerate(free_run(model, batch, WINDOW, domain)):
        torch.testing.assert_close(changes[:, lead], change, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(output.diagnostic_BTCYX[:, WINDOW - 1 + lead], diagnostic, rtol=1e-12, atol=1e-13)


def losses_of_run(directory, store, layout=ONE, extend=None, **training):
    mesh = dict(zip(("replicas", "lat", "lon"), layout, strict=True))
    schedule = {"steps": 6, "rollout": {2: 2, 4: 4}, "lead_weights": [0.5], "checkpoint_every": 3}
    config = small_config(directory, store, mesh=mesh, training=schedule | training)
    run_on_ranks(layout, lambda mesh: train(config, mesh, extend=extend))
    return config, [record.loss for record in read_records(config.run_dir)]


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
    """The losses of one rank, which sees two samples in a step."""
    return losses_of_run(tmp_path_factory.mktemp("alone"), store, micro_batch=2)[1]


@pytest.mark.parametrize(
    ("layout", "stage", "checkpoint_steps"),
    [(Layout(1, 2, 2), 3, 0), (Layout(2, 1, 1), 1, 2), (Layout(1, 1, 3), 2, 1)],
    ids=str,
)
@pytest.mark.every(2)
def test_a_schedule_of_leads_trains_alike_on_every_mesh(tmp_path, store, alone, layout, stage, checkpoint_steps):
    training = {"zero_stage": stage, "micro_batch": 2 // layout.replicas}
    config = small_config(
        tmp_path,
        store,
        mesh=dict(zip(("replicas", "lat", "lon"), layout, strict=True)),
        model={"checkpoint_steps": checkpoint_steps},
        training={"steps": 6, "rollout": {2: 2, 4: 4}, "lead_weights": [0.5], "checkpoint_every": 3} | training,
    )
    run_on_ranks(layout, lambda mesh: train(config, mesh))
    np.testing.assert_allclose([record.loss for record in read_records(config.run_dir)], alone, rtol=2e-5)


@pytest.mark.parametrize("stage", [3, 1])
@pytest.mark.every(2)
def test_a_run_that_stopped_between_two_lengths_goes_on_bit_for_bit(tmp_path, store, stage):
    layout = Layout(1, 1, 2)
    _, whole = losses_of_run(tmp_path / "whole", store, layout, zero_stage=stage)
    config, first = losses_of_run(tmp_path / "cut", store, layout, zero_stage=stage)
    assert first == whole
    checkpoints_in(config.run_dir)[-1].path.rename(tmp_path / "away")
    _, again = losses_of_run(tmp_path / "cut", store, layout, zero_stage=stage)
    assert again == whole


def test_no_more_is_read_than_the_length_needs(tmp_path, store, monkeypatch):
    read, asked = Store.read, []

    def counting(self, frames, tile, channels):
        asked.append(len(frames))
        return read(self, frames, tile, channels)

    config = small_config(tmp_path, store, training={"steps": 6, "rollout": {2: 2, 4: 4}})

    def check(mesh):
        Store.read = counting
        try:
            return train(config, mesh), asked
        finally:
            Store.read = read

    ((_, lengths),) = run_on_ranks(ONE, check)
    assert lengths[-6:] == [4, 4, 5, 5, 7, 7]  # the window of 3, its target, and a frame for each lead more


@pytest.mark.parametrize("through", [True, False])
def test_verify_proves_the_longest(tmp_path, store, through):
    training = {"rollout": {0: 1, 3: 3}, "lead_weights": [2], "through_leads": through}
    config = small_config(tmp_path, store, training=training)
    for rows in run_on_ranks(Layout(1, 1, 2), lambda mesh: verify_parity(config, mesh, torch.float64)):
        assert rows and all(row.passed for row in rows)


def test_a_schedule_is_read_as_it_is_written(tmp_path, store):
    path = write_config(tmp_path, store, training={"steps": 40, "rollout": {20: 2, 30: 4}, "lead_weights": [1, 0]})
    training = load_config(path).training
    assert [training.leads_after(done) for done in (0, 19, 20, 29, 30, 39)] == [1, 1, 2, 2, 4, 4]
    assert training.most_leads == 4
    path.write_text(load_config(path).to_yaml())
    assert load_config(path).training == training
    assert load_config(path, ["training.rollout={0: 3}"]).training.leads_after(0) == 3


@pytest.mark.parametrize(
    ("training", "told"),
    [
        ({"rollout": {-1: 2}}, r"training\.rollout\.-1.*greater than or equal to 0"),
        ({"rollout": {3: 0}}, r"training\.rollout\.3: .*greater than or equal to 1"),
        ({"rollout": {"soon": 2}}, r"training\.rollout\.soon.*valid integer"),
        ({"lead_weights": [0.5]}, r"training: lead_weights=\(0\.5,\) weighs leads from 2 on, and training\.rollout"),
        ({"lead_weights": [-1]}, r"training\.lead_weights\.0: .*greater than or equal to 0"),
    ],
)
def test_what_no_schedule_is_is_refused(tmp_path, store, training, told):
    with pytest.raises(InputError, match=told):
        small_config(tmp_path, store, training=training)


def test_more_leads_than_there_are_frames_are_refused(tmp_path, store):
    config = small_config(tmp_path, store, training={"rollout": {0: 20}})
    told = r"no window of 3 inputs and 20 targets fits into 13 of the 16 frames.*Use fewer leads \(training\.rollout\)"
    with Store.open(store) as opened, pytest.raises(InputError, match=told):
        check_store(config, opened)


def test_another_schedule_is_another_run(tmp_path, store):
    losses_of_run(tmp_path, store, steps=4)
    with pytest.raises(AssertionError, match=r"holds a run with training\.rollout=.*this config says"):
        losses_of_run(tmp_path, store, steps=4, rollout={2: 3})
    with pytest.raises(AssertionError, match=r"holds a run with training\.through_leads=True, this config says False"):
        losses_of_run(tmp_path, store, steps=4, through_leads=False)
