"""The embedding: by its definition, causal, no clock; and what is told of it, against closed forms."""

import math

import numpy as np
import pytest
import torch

from faconv_hpc import Domain, FAConvLSTMNetwork, LatLonGrid, ProcessMesh
from faconv_hpc.errors import InputError
from faconv_hpc.model.state import Past
from faconv_hpc.model.subspace import SubspaceHead, coarse_at_leads, coarse_means
from faconv_hpc.training.embeddings import Embedded, calendar_share, effective_rank, embedding_skill, probe_r2
from test_domain import random_like
from test_parity import randomized

STEPS, PAST, LEADS, REGIONS = 6, 3, 2, (2, 3)


def head(**options):
    return randomized(SubspaceHead(5, 8, 2, REGIONS, **({"past": PAST, "leads": LEADS, "heads": 2} | options)))


def sequence(samples=2, seed=0):
    return random_like((samples, STEPS, 5, *REGIONS), seed), random_like((samples, STEPS), seed + 1).sigmoid()


def written_out(model, means_TCRS, season_T, valid_T):
    """z and the coarse fields of one sample by their definition, step by step, in NumPy."""
    weights = {name: value.detach().numpy() for name, value in model.named_parameters()}

    def linear(name, x):
        return weights[f"{name}.weight"] @ x + weights.get(f"{name}.bias", 0.0)

    def norm(name, x):
        return linear_of(weights[f"{name}.weight"], weights[f"{name}.bias"], (x - x.mean()) / np.sqrt(x.var() + 1e-5))

    def linear_of(weight, bias, x):
        return weight * x + bias

    tokens, answers = [], []
    for means_CRS, season, valid in zip(means_TCRS.numpy(), season_T.tolist(), valid_T, strict=True):
        regions = [linear("region", means_CRS[:, r, s]) for r in range(REGIONS[0]) for s in range(REGIONS[1])]
        angles = [2 * math.pi * season * k for k in range(1, 5)]
        waves = np.array([math.sin(one) for one in angles] + [math.cos(one) for one in angles])
        token = linear("embed", np.concatenate(regions)) + linear("season", waves)
        seen = [*tokens, token][-PAST:]
        if valid:
            tokens.append(token)
        q, *_ = np.split(linear("qkv", norm("attention_norm", token)), 3)
        keys, values = zip(*(np.split(linear("qkv", norm("attention_norm", one)), 3)[1:] for one in seen), strict=True)
        mixed = []
        for h in range(model.heads):
            part = slice(h * 4, h * 4 + 4)
            ages = range(len(seen) - 1, -1, -1)
            bias = [weights["bias_of_age"][age, h] for age in ages]
            logits = [q[part] @ key[part] / 2 + one for key, one in zip(keys, bias, strict=True)]
            share = np.exp(logits) / np.exp(logits).sum()
            mixed.append(sum(one * value[part] for one, value in zip(share, values, strict=True)))
        z = token + linear("attention_out", np.concatenate(mixed))
        inner = linear("mlp_in", norm("mlp_norm", z))
        z = z + linear("mlp_out", inner / (1 + np.exp(-inner)))
        coarse, at = [], z
        for _ in range(1 + LEADS):
            coarse.append(linear("to_coarse", at).reshape(2, *REGIONS))
            at = at + linear("ahead", at)
        answers.append((z, np.stack(coarse)))
    z_TE, coarse_TKCRS = zip(*answers, strict=True)
    return np.stack(z_TE), np.stack(coarse_TKCRS)


@pytest.mark.parametrize("pieces", [(STEPS,), (1,) * STEPS, (4, 2)], ids=str)
def test_the_head_is_what_its_definition_says(pieces):
    """In pieces of any length, one sample with steps that are left out."""
    model, (means, season) = head(), sequence()
    valid = torch.tensor([[True] * STEPS, [True, False, True, True, False, True]])
    past, found = None, []
    for z, coarse in (written_out(model, *one) for one in zip(means, season, valid.tolist(), strict=True)):
        found.append((z, coarse))
    at, got = 0, []
    for steps in pieces:
        part = slice(at, at + steps)
        z, coarse, tokens = model(means[:, part], season[:, part], past, valid[:, part])
        past = model.after(past, tokens, valid[:, part])
        got.append((z.detach(), coarse.detach()))
        at += steps
    z_BTE, coarse = (torch.cat(parts, 1).numpy() for parts in zip(*got, strict=True))
    for sample, (want_z, want_coarse) in enumerate(found):
        there = valid[sample].numpy()
        np.testing.assert_allclose(z_BTE[sample][there], want_z[there], rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(coarse[sample][there], want_coarse[there], rtol=1e-12, atol=1e-13)


def test_a_sample_without_any_step_spoils_no_gradient():
    model, (means, season) = head(), sequence()
    valid = torch.tensor([[True] * STEPS, [False] * STEPS])
    z, _, _ = model(means, season, None, valid)
    z[0].square().sum().backward()
    assert all(value.grad is None or value.grad.isfinite().all() for value in model.parameters())
    assert not model.after(None, z, valid).there_BN[1].any()


def test_the_past_is_what_a_step_may_attend_to_and_no_more():
    model, (means, season) = head(), sequence()
    other = means.clone()
    other[:, 0] += 1.0
    changed = (model(other, season)[0] - model(means, season)[0]).detach().abs().amax((0, 2))
    assert (changed[:PAST] > 1e-3).all() and changed[PAST:].max() == 0
    alone = head(past=1)
    assert (alone(other, season)[0] - alone(means, season)[0])[:, 1:].abs().max() == 0
    assert Past.none(means.flatten(2), 0).then(means.flatten(2), None).newest(0).tokens_BNE.shape[1] == 0


def network(**options):
    given = {"embedding_channels": 16, "coarse_shape": (3, 4), "embedding_past": PAST, "attention_every": 2} | options
    return FAConvLSTMNetwork(3, 2, 8, 2, **given)


def test_z_of_a_time_is_the_same_whatever_follows_it():
    model, domain = randomized(network()), Domain(LatLonGrid(7, 11))
    x, season = random_like((2, STEPS, 3, 7, 11), 0), random_like((2, STEPS), 1).sigmoid()
    z = model(x, season, domain=domain).embedding_BTE
    for last in range(STEPS - 1):
        later = x.clone()
        later[:, last + 1 :] = random_like((2, STEPS - 1 - last, 3, 7, 11), 2)
        followed = model(later, season, domain=domain).embedding_BTE
        torch.testing.assert_close(followed[:, : last + 1], z[:, : last + 1], rtol=0, atol=1e-13)
        assert (followed - z)[:, last + 1].abs().min() > 1e-6
        cut_off = model(x[:, : last + 1], season[:, : last + 1], domain=domain).embedding_BTE
        torch.testing.assert_close(cut_off, z[:, : last + 1], rtol=0, atol=1e-13)


@torch.no_grad()
def test_another_runs_fields_at_the_same_dates_change_z():
    """Before anything is trained, at dates all over the year: what z varies by comes from the fields alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network().double()
    domain, runs, dates = Domain(LatLonGrid(9, 12)), 12, torch.linspace(0, 0.9, STEPS, dtype=torch.float64)
    regions = random_like((runs, STEPS, 3, 3, 4), 3)
    x = regions.repeat_interleave(3, -2).repeat_interleave(3, -1)
    z = model(x, dates.expand(runs, STEPS), domain=domain).embedding_BTE
    within_a_date = z[:, -2:].var(0).sum()  # half the mean square of what another run changes
    assert within_a_date / z[:, -2:].flatten(0, 1).var(0).sum() > 0.8
    turned = model(x, dates.flip(0).expand(runs, STEPS), domain=domain).embedding_BTE
    assert torch.equal(turned, z)  # the calendar enters as training puts it there
    model.subspace.season.weight.fill_(0.1)
    assert not torch.allclose(model(x, dates.expand(runs, STEPS), domain=domain).embedding_BTE, z)
    assert network(seasonal_encoding=False).subspace.season is None


def test_coarse_fields_of_later_steps_count_where_there_are_some():
    means, counts = random_like((2, 4, 2, 1, 3), 0), random_like((2, 4, 2, 1, 3), 1) > 0
    valid = torch.tensor([[True] * 4, [True, True, False, True]])
    target, count = coarse_at_leads(means, counts, valid, LEADS)
    assert target.shape == count.shape == (2, 4, 1 + LEADS, 2, 1, 3)
    for sample in range(2):
        for step in range(4):
            for lead in range(1 + LEADS):
                there = step + lead < 4 and valid[sample, step] and valid[sample, step + lead]
                want = counts[sample, step + lead] if there else torch.zeros(2, 1, 3, dtype=torch.bool)
                assert torch.equal(count[sample, step, lead], want)
                if there:
                    assert torch.equal(target[sample, step, lead], means[sample, step + lead])
    assert coarse_at_leads(means, None, None, LEADS)[1].sum() == 2 * (4 + 3 + 2) * 6


def test_the_loss_of_the_embedding_is_apart_and_has_its_weight():
    model, domain = randomized(network(embedding_weight=0.3)), Domain(LatLonGrid(7, 11))
    x, season, target = random_like((2, 4, 3, 7, 11), 0), random_like((2, 4), 1), random_like((2, 4, 2, 7, 11), 2)
    output = model(x, season, domain=domain)
    losses = model.losses(output, x, target, domain)
    torch.testing.assert_close(losses.total.value, losses.forecast.value + 0.3 * losses.embedding.value)
    coarse, known = domain.mean(x[:, :, :2], (3, 4)), output.coarse_BTKCRS.detach()
    errors = [(known[:, : 4 - lead, lead] - coarse[:, lead:]).square().flatten(1) for lead in range(3)]
    torch.testing.assert_close(losses.embedding.value, torch.cat(errors, 1).mean())


def test_effective_rank_is_the_participation_ratio():
    random = np.random.default_rng(0)
    waves = np.linalg.qr(random.normal(size=(60, 4)) - 0.0)[0]
    waves = np.linalg.qr(waves - waves.mean(0))[0]
    assert effective_rank(waves + 5.0) == pytest.approx(4)
    assert effective_rank(waves * [3, 1, 1, 1]) == pytest.approx((9 + 3) ** 2 / (81 + 3))
    turned = waves * [3, 1, 1, 1] @ np.linalg.qr(random.normal(size=(4, 4)))[0]
    assert effective_rank(turned) == pytest.approx((9 + 3) ** 2 / (81 + 3))
    assert effective_rank(waves[:, :1] * [1, 2, 3]) == pytest.approx(1)
    assert math.isnan(effective_rank(np.ones((5, 3))))


def test_the_share_of_the_calendar():
    random = np.random.default_rng(0)
    year = np.arange(400) / 100 % 1
    clock = np.stack([np.cos(2 * np.pi * year), np.sin(4 * np.pi * year)], 1)
    noise = random.normal(size=clock.shape) * np.sqrt(0.5)
    assert calendar_share(clock, year) == pytest.approx(1)
    assert calendar_share(clock + noise, year) == pytest.approx(0.5, abs=0.05)
    assert abs(calendar_share(noise, year)) < 0.02
    few = [calendar_share(random.normal(size=(32, 8)), np.arange(32) / 32) for _ in range(100)]
    assert abs(np.mean(few)) < 0.02  # so few windows explain a fourth by chance
    assert math.isnan(calendar_share(noise[:50], year[:50] / 10)) and math.isnan(calendar_share(noise[:8], year[:8]))


def test_the_probe_explains_what_is_linear_in_z():
    random = np.random.default_rng(0)
    z, other = random.normal(size=(2000, 5)), random.normal(size=(2000, 5))
    matrix = random.normal(size=(5, 7))
    x, rest = z @ matrix, random.normal(size=(2000, 7))
    rest *= np.sqrt((x**2).sum() / (rest**2).sum())  # as much again that it does not know
    fit, score = slice(1000), slice(1000, 2000)
    assert probe_r2(z[fit] * 100 + 3, x[fit] + 7, z[score] * 100 + 3, x[score] + 7) == pytest.approx(1, abs=0.02)
    assert probe_r2(z[fit], (x + rest)[fit], z[score], (x + rest)[score]) == pytest.approx(0.5, abs=0.05)
    assert abs(probe_r2(other[fit], x[fit], other[score], x[score])) < 0.03
    constant = np.concatenate([z, np.ones((2000, 1))], 1)  # a component that has died
    assert probe_r2(constant[fit], x[fit], constant[score], x[score]) == pytest.approx(1, abs=0.02)


def test_windows_are_told_together_the_first_half_fits_the_probe():
    random = np.random.default_rng(0)
    matrix = random.normal(size=(4, 3))

    def window(number):
        z = random.normal(size=(5, 4))
        x = z @ matrix if number < 20 else z @ -matrix
        x[:, 1] = np.nan if number == 3 else x[:, 1]  # a region of which something is missing is left out
        return Embedded(np.array([number, 2.0 * number]), z, x, np.full(5, number / 40))

    windows = [window(number) for number in range(40)]
    found = embedding_skill(windows)
    assert (found.forecast_loss, found.embedding_loss) == (19.5, 39.0) and 3.5 < found.effective_rank <= 4
    assert found.probe_r2 < -2  # what follows is the opposite of what was fitted
    assert embedding_skill(windows[:20]).probe_r2 > 0.9 and abs(found.calendar_share) < 0.2
    one = embedding_skill(windows[:1])
    assert one.as_json()["probe_r2"] is None and one.as_json()["calendar_share"] is None
    assert "share of the calendar not told by these dates" in one.told
    windows[7].z_TE[2, 1] = np.inf  # of a run that has run away: told, and no error
    spoiled = embedding_skill(windows)
    assert spoiled.embedding_loss == 39.0 and spoiled.as_json()["effective_rank"] is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"embedding_past": 0}, r"embedding_past=0 must be 1 \(a step attends to itself alone\) or more"),
        ({"embedding_leads": -1}, r"embedding_leads=-1 must be 0 \(the coarse field of the step alone\) or more"),
    ],
)
def test_what_a_head_refuses(options, told):
    with pytest.raises(InputError, match=told):
        network(**options)


def test_a_grid_with_fewer_cells_than_regions_is_refused():
    with pytest.raises(InputError, match=r"3 x 4 regions does not fit a grid of 2 x 11 cells"):
        network()(torch.zeros(1, 2, 3, 2, 11), torch.zeros(1, 2))
    with pytest.raises(InputError, match=r"3 x 12 regions do not fit a grid of 7 x 11 cells"):
        Domain(LatLonGrid(7, 11)).mean(torch.zeros(7, 11), (3, 12))


@pytest.mark.parametrize("regions", [None, (3, 6)], ids=["globe", "regions"])
def test_means_are_rounded_by_no_arithmetic_of_products(regions):
    """As autocast, in bf16, and TF32 on a GPU round them: what is lost would depend on how the grid is cut."""
    domain = Domain(LatLonGrid(31, 46, lat_boundary="pole"), ProcessMesh.alone())
    x = (3 + random_like((2, 31, 46), 5)).float().requires_grad_()

    def found():
        mean = domain.mean(x, regions)
        return mean.detach(), torch.autograd.grad(mean.square().sum(), x)[0]

    plain = found()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(*pair) for pair in zip(found(), plain, strict=True))


def test_a_region_of_which_hardly_anything_is_known_has_the_mean_of_that():
    """One cell at the pole itself: less than float32's eps of its region."""
    domain = Domain(LatLonGrid(721, 1440, lat_boundary="pole"), ProcessMesh.alone())
    known = torch.zeros(1, 1, 1, 721, 1440)
    known[..., 0, 7] = 1
    means, counts = coarse_means(2 * known, domain, (3, 6), known)
    assert counts.sum() == 1 and means[counts].item() == pytest.approx(2, rel=1e-5)


def test_backward_may_go_through_segments_more_than_once():
    network = randomized(FAConvLSTMNetwork(3, 2, 4, 1, checkpoint_steps=2, kernels="eager", coarse_shape=(2, 3)))
    x, when = random_like((1, 4, 3, 6, 9), 1), torch.zeros(1, 4, dtype=torch.float64)

    def gradients(steps):
        network.checkpoint_steps = steps
        output, weight = network(x, when), network.layers[0].input_weight
        parts = output.forecast_BTCYX.square().sum(), output.embedding_BTE.square().sum()
        return [torch.autograd.grad(part, weight, retain_graph=True)[0] for part in parts]

    for again, stored in zip(gradients(2), gradients(0), strict=True):
        torch.testing.assert_close(again, stored, rtol=1e-12, atol=1e-14)


def test_samples_of_different_length_do_not_run_freely():
    network, x = FAConvLSTMNetwork(3, 3, 4, 1, coarse_shape=(2, 3)), torch.zeros(1, 4, 3, 6, 9)
    valid, when = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4)
    with pytest.raises(InputError, match=r"samples of different length \(valid_BT\) do not run freely \(feedback\)"):
        network(x, when, valid_BT=valid, feedback=object())
