"""Forecasts beyond a window: each on the one before it, on any tiles, measured against the files."""

import numpy as np
import pytest
import torch

from faconv_hpc import Domain, FAConvLSTMNetwork, LatLonGrid
from faconv_hpc.data.samples import Batch
from faconv_hpc.data.store import Store
from faconv_hpc.data.variables import Channels, Variable
from faconv_hpc.spatial.grid import Tile
from faconv_hpc.training.free_run import free_run
from faconv_hpc.training.trainer import train
from ranks import Layout, run_on_ranks
from runs import evaluated, make_store, small_config
from test_domain import random_like
from test_parity import randomized

FIELDS, FORCINGS, WINDOW, STEPS, CELLS = 2, 3, 3, 7, (11, 14)
STEPS_C = (0.3, 1.7)


def batch_of(domain, missing):
    mask = (random_like((1, STEPS, FIELDS, *CELLS), 3) > -0.5).double() if missing else None
    fields = random_like((1, STEPS, FIELDS, *CELLS), 1) * (1 if mask is None else mask)
    parts = [fields, *([mask] if missing else []), random_like((1, STEPS, FORCINGS, *CELLS), 2)]
    valid = domain.scatter(mask.bool()) if missing else None
    inputs = domain.scatter(torch.cat(parts, dim=2))
    taken = [
        Variable(name=f"x{at}", units="", may_miss=missing, mean=0, std=2, tendency_std=2 * step)
        for at, step in enumerate(STEPS_C)
    ]
    season, channels = random_like((1, STEPS), 4).sigmoid(), Channels(taken, [f"f{at}" for at in range(FORCINGS)])
    return Batch(inputs, inputs[:, :, :FIELDS], valid, season, (0,), channels)


def network_of(missing):
    channels = FIELDS * (2 if missing else 1) + FORCINGS
    options = {"attention_every": 2, "attention_heads": 2, "embedding_channels": 16, "coarse_shape": (2, 3)}
    return randomized(FAConvLSTMNetwork(channels, FIELDS, 8, 2, **options))


@torch.no_grad()
def runs_of(mesh, missing):
    """The free run, assembled; and what the network says to the whole sequence so far, run again for each lead."""
    domain, network = Domain(LatLonGrid(*CELLS), mesh), network_of(missing)
    batch = batch_of(domain, missing)
    found = [domain.assemble(change) for change, _ in free_run(network, batch, WINDOW, domain)]
    x, season, expected = batch.inputs_BTCYX.clone(), batch.year_fraction_BT, []
    last, mask = x[:, WINDOW - 1].clone(), x[:, WINDOW - 1, FIELDS : 2 * FIELDS].clone()
    change = torch.zeros_like(last[:, :FIELDS])
    for at in range(WINDOW, STEPS + 1):
        change = change + network(x[:, :at], season[:, :at], domain=domain).tendency_BTCYX[:, -1]
        expected.append(domain.assemble(change))
        if at < STEPS:
            x[:, at, :FIELDS] = last[:, :FIELDS] + change * torch.tensor(STEPS_C, dtype=torch.float64)[:, None, None]
            if missing:
                x[:, at, :FIELDS] *= mask
                x[:, at, FIELDS : 2 * FIELDS] = mask
    return found, expected


@pytest.mark.parametrize("missing", [False, True])
def test_each_lead_is_what_the_whole_sequence_gives(missing):
    (alone,) = run_on_ranks(Layout(1, 1, 1), runs_of, missing)
    assert len(alone[0]) == STEPS - WINDOW + 1
    for layout in (Layout(1, 1, 1), Layout(1, 2, 2), Layout(1, 1, 3)):
        for found, expected in run_on_ranks(layout, runs_of, missing):
            for one, again, whole in zip(found, expected, alone[0], strict=True):
                torch.testing.assert_close(one, again, rtol=1e-11, atol=1e-12)
                torch.testing.assert_close(one, whole, rtol=1e-11, atol=1e-12)


def test_skill_over_leads_is_the_same_on_every_mesh_and_persistence_is_that_of_the_files(tmp_path):
    store, leads = make_store(tmp_path / "waves"), 3
    config = small_config(tmp_path, store, data={"periods": {"test": "2000-01-03T06/"}})
    run_on_ranks(Layout(1, 1, 1), lambda mesh: train(config, mesh))
    (alone,) = run_on_ranks(Layout(1, 1, 1), lambda mesh: evaluated(config, mesh, leads))
    for tiled in run_on_ranks(Layout(1, 2, 2), lambda mesh: evaluated(config, mesh, leads)):
        for found, want in zip(tiled.skills, alone.skills, strict=True):
            assert (found.variable, found.lead) == (want.variable, want.lead)
            assert found.rmse == pytest.approx(want.rmse, rel=1e-5)
    assert alone.held_out and alone.forecasts == 7 - leads + 1  # of frames 9 to 15
    assert [skill.lead for skill in alone.skills] == [1, 1, 2, 2, 3, 3]
    with Store.open(store) as opened:
        fields = opened.read(range(16), Tile((0, 11), (0, 14)), [0, 1])[0].astype(np.float64)
        areas = LatLonGrid(11, 14, latitude_deg=opened.latitude_deg, lat_boundary="pole").cell_area_sr
    for skill in alone.skills:
        channel = opened.channels.index(skill.variable)
        changes = [fields[at + skill.lead, channel] - fields[at, channel] for at in range(8, 13)]
        want = np.sqrt(np.mean([np.average(change**2, weights=areas[:, None] + 0 * change) for change in changes]))
        assert skill.persistence_rmse == pytest.approx(want, rel=1e-5)
