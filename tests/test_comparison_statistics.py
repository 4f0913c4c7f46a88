"""Statistics of comparisons, by hand: which rate is best, which model, and what is more than chance."""

import math

import numpy as np
import pytest
from scipy import stats

from faconv_hpc.comparison import figures, gathering
from faconv_hpc.comparison.judging import EMBEDDING, Looked, RunErrors
from faconv_hpc.comparison.page import notes_of, report_of
from faconv_hpc.comparison.plan import ComparisonConfig
from faconv_hpc.comparison.result import (
    AtRate,
    ComparisonResult,
    best_first,
    best_of,
    check_same_dates,
    model_result,
    pair_of,
)
from faconv_hpc.errors import InputError
from faconv_hpc.evaluation.intervals import Weighings
from faconv_hpc.look import line_style

NAMES = ("one", "other")
ABOUT = {"data": "made", "machine": "none", "given": "8"}
DATES = np.array([f"2000-01-{day:02}" for day in range(1, 31)])


def result_with(rmse_SLC, persistence_LC, rates=(), known_NC=None):
    """Of models by name whose errors are the same at all dates where they are known: (S, L, C) of each."""
    config = ComparisonConfig(
        study_dir="runs/compare", config="c.yaml", budget_s=9.0, models={name: {} for name in rmse_SLC},
        learning_rates=(0.01, 0.02), seeds=(0, 1),
    )  # fmt: skip
    look = Looked(0.3, dict.fromkeys(EMBEDDING, 0.5), 9, 72, 1.0, 9.0, 1.0)
    judged, models = {}, []
    for name, errors_SLC in rmse_SLC.items():
        judged[name] = tuple(_run_errors(np.stack([rmse_LC, persistence_LC, persistence_LC], axis=1), known_NC)
                             for rmse_LC in errors_SLC)  # fmt: skip
        models.append(model_result(AtRate(name, 0.01, {0: 0.3, 1: 0.3}), judged[name], (look, look), (0.01,)))
    return ComparisonResult(config, best_first(models), {}, tuple(rates), judged, ABOUT)


def _run_errors(rmse_LFC, known_NC):
    weight_NLFC = np.ones((len(DATES), *rmse_LFC.shape))
    if known_NC is not None:
        weight_NLFC *= known_NC[:, None, None]
    square_NLFC = np.where(weight_NLFC, rmse_LFC**2, 0.0)
    leads, _, variables = rmse_LFC.shape
    names = np.array([f"v{number}" for number in range(variables)])
    return RunErrors(square_NLFC, weight_NLFC, DATES, 6.0 * np.arange(1, leads + 1), names, names, 7, 1.0, 1)


def same_dates(values_S, weighings):
    """Logarithms (S, 1 + K, 1, 1) of errors that are the same at all dates."""
    weighed = 1 + len(weighings.weights_KN)
    return np.broadcast_to(np.array(values_S)[:, None, None, None], (len(values_S), weighed, 1, 1))


def test_seeds_alone_are_judged_by_the_paired_t_test():
    weighings = Weighings.of(60)
    one, other = np.log([[0.50, 0.55, 0.52, 0.58], [0.60, 0.61, 0.65, 0.66]])
    pair = pair_of("a", "b", same_dates(one, weighings), same_dates(other, weighings), weighings)
    said = stats.ttest_rel(one, other).confidence_interval(0.9)
    assert math.log(pair.ratio) == pytest.approx((one - other).mean())
    assert [math.log(pair.low), math.log(pair.high)] == pytest.approx([said.low, said.high])
    assert pair.verdict == "better"
    assert pair_of("b", "a", same_dates(other, weighings), same_dates(one, weighings), weighings).verdict == "worse"
    close = one + np.array([0.05, -0.04, 0.03, -0.05])
    assert (
        pair_of("a", "b", same_dates(one, weighings), same_dates(close, weighings), weighings).verdict == "cannot tell"
    )
    alone = pair_of("a", "b", same_dates(one[:1], weighings), same_dates(other[:1], weighings), weighings)
    assert alone.verdict == "cannot tell" and math.isnan(alone.low) and alone.ratio == pytest.approx(0.5 / 0.6)


def test_intervals_hold_what_other_dates_and_other_seeds_would_give():
    """By the variance of one of the two alone they would in 71 or 82 of a hundred."""
    random, weighings, trials = np.random.default_rng(1), Weighings.of(400), 400
    held = 0
    for _ in range(trials):
        noise_N, seeds_S = random.normal(0, 0.2, 400), random.normal(0, 0.03, 6)
        of_dates_K = np.concatenate([[noise_N.mean()], weighings.weights_KN @ noise_N / 400])
        log_SKLC = (of_dates_K[None, :] + seeds_S[:, None])[:, :, None, None]
        pair = pair_of("a", "b", log_SKLC, np.zeros_like(log_SKLC), weighings)
        assert math.log(pair.ratio) == pytest.approx(noise_N.mean() + seeds_S.mean())
        held += pair.low < 1 < pair.high
    assert 0.86 < held / trials < 0.95


def test_variables_of_which_nothing_is_known_do_not_count():
    weighings = Weighings.of(60)
    one, other = (same_dates(np.log(values), weighings) for values in ([0.5, 0.6], [0.8, 0.9]))
    lost = np.full_like(one, np.nan)
    both = (np.concatenate([part, lost], axis=-1) for part in (one, other))
    assert pair_of("a", "b", *both, weighings).ratio == pytest.approx(math.sqrt(0.5 / 0.8 * 0.6 / 0.9))
    assert math.isnan(pair_of("a", "b", lost, lost, weighings).ratio)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_of_a_model_without_a_number_it_cannot_be_told(value):
    """Else what it lost were left out, and it could be better by what is left. Of both lost it can be told no more."""
    weighings = Weighings.of(60)
    one, other = (same_dates(np.log(values), weighings) for values in ([0.5, 0.51], [0.8, 0.81]))
    whole, lost = np.concatenate([other, other], axis=-1), np.concatenate([one, np.full_like(one, value)], axis=-1)
    told = np.concatenate([one, one], axis=-1)
    assert pair_of("a", "b", told, whole, weighings).verdict == "better"
    pairs = [pair_of("a", "b", lost, whole, weighings), pair_of("b", "a", whole, lost, weighings)]
    if value == np.inf:
        pairs.append(pair_of("a", "b", lost, lost, weighings))
    for pair in pairs:
        assert pair.verdict == "cannot tell" and math.isnan(pair.ratio) and math.isnan(pair.low)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("lost", NAMES)
def test_a_model_whose_forecasts_end_is_never_named_best(tmp_path, lost, value):
    """Its other errors are the smaller ones; where nothing is known, or persistence has no error, all lack it."""
    rmse = {name: np.full((2, 4, 3), 0.2 if name == lost else 0.5) for name in NAMES}
    persistence_LC = np.array([[1.0, 2.0, 0.0]] * 4)
    rmse[lost][1, 2:, 1] = value
    result = result_with(rmse, persistence_LC)
    kept = next(name for name in NAMES if name != lost)
    assert [one.model for one in result.models] == [kept, lost]
    (pair,) = result.pairs
    assert pair.verdict == "cannot tell" and math.isnan(pair.ratio)
    notes = " ".join(notes_of(result))
    assert f"**{lost} has errors that are no number** at 2 of 4 leads" in notes and f"**{kept} has errors" not in notes
    page = report_of(result, figures.draw_figures(result, tmp_path))
    assert f"**{kept}** has the smallest errors" in page and f"**{lost}** has the smallest" not in page
    assert "nan" not in page and "inf" not in page.replace("information", "")
    rmse[kept][0, 3, 0] = value
    page = report_of(result_with(rmse, persistence_LC), {})
    assert "has the smallest errors" not in page and "None of 2 models has a number for all its errors" in page


@pytest.mark.parametrize("dates", [11, 12])
def test_what_is_known_on_few_dates_does_not_count(dates):
    """As in an evaluation: its dates would be taken for all. A model that has no number there is not better by the
    rest."""
    rmse = {"one": np.full((2, 3, 2), 0.5), "other": np.full((2, 3, 2), 0.6)}
    rmse["one"][1] += 0.01
    rmse["one"][:, :, 1] = 5.0
    known_NC = np.ones((len(DATES), 2))
    known_NC[dates:, 1] = 0
    result = result_with(rmse, np.ones((3, 2)), known_NC=known_NC)
    (pair,), few = result.pairs, dates < 12
    names = [pair.model, pair.other]
    assert [one.model for one in result.models] == names == (["one", "other"] if few else ["other", "one"])
    by_hand = {name: np.exp(np.log(rmse[name][:, :, : 1 if few else 2]).mean()) for name in NAMES}
    assert pair.verdict == "better" and pair.ratio == pytest.approx(by_hand[names[0]] / by_hand[names[1]])
    assert result.models[0].ratio.mean == pytest.approx(by_hand[names[0]])
    note = "**v1 is known on fewer than 12 dates** at 3 of 3 leads, where it counts for no model."
    assert (note in notes_of(result)) == few and not any("v0 is known" in one for one in notes_of(result))
    rmse["one"][1, 2, 1] = np.nan
    lost = result_with(rmse, np.ones((3, 2)), known_NC=known_NC)
    assert [one.model for one in lost.models] == ["other", "one"] and math.isnan(lost.pairs[0].ratio)


def test_where_all_is_known_on_few_dates_no_model_is_better():
    known_NC = np.zeros((len(DATES), 1))
    known_NC[:11] = 1
    rmse = {"one": np.full((2, 1, 1), 0.5), "other": np.full((2, 1, 1), 0.6)}
    result = result_with(rmse, np.ones((1, 1)), known_NC=known_NC)
    assert result.pairs[0].verdict == "cannot tell" and math.isnan(result.models[0].ratio.mean)
    assert "None of 2 models has a number for all its errors" in report_of(result, {})


def test_the_best_rate_is_that_of_the_mean_and_has_all_seeds():
    rates = [
        AtRate("a", 0.1, {0: 0.2, 1: 0.9}), AtRate("a", 0.2, {0: 0.5, 1: 0.5}), AtRate("a", 0.3, {0: 0.1, 1: None}),
        AtRate("a", 0.4, {0: 0.1, 1: math.inf}), AtRate("b", 0.1, {0: 0.01, 1: 0.01}),
    ]  # fmt: skip
    assert best_of(rates, "a") is rates[1]
    assert best_of(rates[2:4], "a") is None


def test_runs_that_were_judged_on_other_dates_are_refused():
    def on(dates):
        sums, names = np.ones((len(dates), 1, 3, 1)), np.array(["v"])
        return RunErrors(sums, sums, np.array(dates), np.array([6.0]), names, names, 1, 1.0, 1)

    check_same_dates({"a": [on(["1", "2"]), on(["1", "2"])], "b": [on(["1", "2"])]})
    with pytest.raises(
        InputError, match=r"a run of 'a' was on 2 dates from 1 to 2 and one of 'b' on 1 dates from 2 to"
    ):
        check_same_dates({"a": [on(["1", "2"])], "b": [on(["2"])]})


def test_models_are_in_the_order_of_what_is_told_of_their_difference():
    """By the plain mean of variables, or of seeds, the other would be first."""
    rmse = {"one": np.array([[[0.10, 1.2]], [[0.10, 1.3]]]), "other": np.array([[[0.5, 0.5]], [[0.5, 0.52]]])}
    result = result_with(rmse, np.ones((1, 2)))
    assert rmse["one"].mean() > rmse["other"].mean() and [one.model for one in result.models] == ["one", "other"]
    first, second = (one.ratio.mean for one in result.models)
    assert result.pairs[0].ratio == pytest.approx(first / second) and result.pairs[0].verdict == "better"
    assert first == pytest.approx((0.1 * 0.1 * 1.2 * 1.3) ** 0.25)


def test_it_is_told_which_rates_a_model_was_judged_without():
    rates = [
        AtRate("one", 0.01, {0: 0.3, 1: 0.3}), AtRate("one", 0.02, {0: None, 1: 0.1}, "out of memory"),
        AtRate("other", 0.01, {0: 0.3, 1: 0.3}), AtRate("other", 0.02, {0: None, 1: None}),
    ]  # fmt: skip
    result = result_with({name: np.full((2, 1, 1), 0.5) for name in NAMES}, np.ones((1, 1)), rates)
    notes = notes_of(result)
    assert "**one was judged without the rate 0.02**: 1 of 2 runs failed, or have not ended (out of memory)." in notes
    assert "**other was judged without the rate 0.02**: 2 of 2 runs have not ended." in notes
    assert not any("0.01" in note for note in notes)


def test_the_end_of_the_rates_is_that_of_those_that_count(monkeypatch):
    rates = [AtRate("a", 0.1, {0: 0.3}), AtRate("a", 0.2, {0: 0.2}), AtRate("a", 0.3, {0: None})]
    monkeypatch.setattr(gathering, "model_result", lambda at, kept, own, counted: (at.rate, counted))
    assert gathering._model(rates, "a", [], [], {}) == (0.2, [0.1, 0.2])


def test_a_model_looks_the_same_in_all_figures(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    rates = [AtRate(name, rate, {0: 0.3, 1: 0.3}) for name in NAMES for rate in (0.01, 0.02)]
    result = result_with({"one": np.full((2, 2, 1), 0.5), "other": np.full((2, 2, 1), 0.4)}, np.ones((2, 1)), rates)
    assert result.models[0].model == "other"
    figures.draw_figures(result, tmp_path)
    for figure in drawn:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        lines = dict(zip(labels, (getattr(handle, "lines", [handle])[0] for handle in handles), strict=True))
        for index, name in enumerate(NAMES):
            style = line_style(index)
            assert (lines[name].get_color(), lines[name].get_marker()) == (style["color"], style["marker"])
    assert len(drawn) == 3
