"""The report of a comparison: a page that can be read without the program."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..data.periods import evenly
from ..evaluation import baselines
from ..evaluation.intervals import FEWEST_DATES, LEVEL
from ..evaluation.words import Leads, plain, table, with_units
from ..files import replacing_together, write_durably
from .figures import FIGURES, ROOM, draw_figures
from .judging import EMBEDDING
from .plan import ComparisonConfig
from .result import AtRate, ComparisonResult, ModelResult, OverSeeds, Pair

REPORT_JSON, REPORT_MD = "comparison.json", "comparison.md"
LEADS = 4  # of the table of errors, at most
PERCENT = f"{100 * LEVEL:g} %"
COLUMNS = (
    "model", "error over persistence's", "rate", "steps", "frames", "s trained", "parameters", "multiply-adds",
    "ms per frame", "peak GiB",
)  # fmt: skip
CAPTIONS = {
    "Errors over lead": "Lower is better. A model that leaves its panel has errors larger than its upper end, which is "
    f"{ROOM:g} times the largest of persistence.",
    "Skill against cost": "Each model at its best rate; bars are the deviation over seeds. Models whose multiply-adds "
    "are not counted are not in that panel, and those whose errors are no number in none.",
    "Learning rates": "Lines go through the means over seeds, dots are seeds. A best rate at an end of the line may be "
    "bettered beyond it. Each model's errors are from windows of its own, so rates are compared within a model.",
}
MEANINGS = f"""\
- **error over persistence's**: RMSE over that of no change, geometric mean of variables, leads and seeds, of free runs
  on the test period ± the standard deviation of the seeds. Cells count by their area, all forecasts alike. Models stand
  in its order; of two, the ratio is what the differences are about.
- **rate**: the learning rate whose error over persistence's on the validation period of the data, after the last step
  and from a window of the model's own before each forecast, is least in
  the plain mean of variables, leads and the seeds that were run at all rates. All else stands in the table for that
  rate alone.
- **steps**: as many as the time of a run holds, by the median step of a probe of that model; the learning rate falls
  over all of them. Looks, saves and the first compilation are not in it.
- **frames**: that all steps were trained on, one as often as it came; steps of models may have windows and batches of
  other sizes.
- **s trained**, **ms per frame**: what the steps then took, their sum, and their median over the frames of a step, mean
  of the seeds. Where the sums differ much the machine was not equally busy, and models did not have the same time.
- **parameters** of the whole network; **multiply-adds** of its layers and forecast, of a cell and step, forward, by
  formula (-: not counted); **peak GiB** of the rank that needed most, all that the process holds among it.
- **better** and **worse**: the {PERCENT} interval of the ratio of errors, the geometric mean over variables, leads and
  seeds, does not reach 1. It is of other dates and other seeds: the variance over dates, told from slow waves over the
  period, and that over seeds (each beside the same seed of the other model), with Student's t. It takes two seeds and
  {FEWEST_DATES} forecasts. Of many such verdicts one in ten or more is chance. Leads and variables for which
  persistence's error is 0 or not known, or that are known on fewer dates than {FEWEST_DATES}, count for no model; one
  whose errors are no numbers elsewhere is neither.
- **effective rank**, **share of the calendar**, **R2**, **loss** of the embedding: of the validation period, as a run's
  own looks say them."""


def write_report(result: ComparisonResult, directory: Path) -> None:
    """The page, its figures, and all numbers as JSON."""
    with replacing_together(directory, (REPORT_JSON, *FIGURES, REPORT_MD)) as beside:
        write_durably(beside / REPORT_JSON, json.dumps(result.as_json(), indent=2) + "\n")
        figures = draw_figures(result, beside) if result.models else {}
        write_durably(beside / REPORT_MD, report_of(result, figures))


def headline(result: ComparisonResult) -> list[str]:
    """A sentence for each pair of models."""
    return [_sentence(pair) for pair in result.pairs] if result.models else []


def rows_of(result: ComparisonResult) -> list[list[str]]:
    """The table of models, best first, in the order of `COLUMNS`."""
    return [_row(model) for model in result.models]


def report_of(result: ComparisonResult, figures: Mapping[str, Path]) -> str:
    """In Markdown."""
    parts = [f"# Comparison {result.comparison.name}", *_answers(result)]
    if result.models:
        parts += ["## What was compared", *_compared(result), "## Models", table(COLUMNS, rows_of(result))]
        parts += ["## Errors", *_errors(result), "## Differences", *_differences(result)]
        parts += ["## Embeddings", _embeddings(result)]
    parts += ["## Learning rates", _rates(result), "## Figures" if figures else ""]
    parts += [f"**{title}.** {CAPTIONS[title]}\n\n![{title}]({path.name})" for title, path in figures.items()]
    parts += ["## What the numbers mean", MEANINGS]
    return "\n\n".join(part for part in parts if part) + "\n"


def notes_of(result: ComparisonResult) -> list[str]:
    """What to know before believing the numbers."""
    notes = [f"**{name} is not judged**: {why}." for name, why in result.missing.items()]
    for model in result.models:
        if model.lost_leads:
            notes.append(
                f"**{model.model} has errors that are no number** at {model.lost_leads} of "
                f"{len(result.any_judged.leads_h)} leads of the test period, from one seed or more. It is not ranked, "
                f"and is neither better nor worse than another."
            )
        notes += [_without(at) for at in result.rates if at.model == model.model and at.lacking]
        if model.at_end:
            notes.append(
                f"The best rate of {model.model}, {model.rate:g}, is the {model.at_end} of those that count: "
                f"{'larger' if model.at_end == 'largest' else 'smaller'} ones may be better."
            )
        trained = model.over_seeds("trained_s").mean
        if abs(trained / result.comparison.budget_s - 1) > 0.1:
            notes.append(
                f"**{model.model} was trained for {trained:.3g} s**, and not for {result.comparison.budget_s:g}: the "
                f"machine was busier, or less busy, than when its steps were timed."
            )
    notes += _sparse(result) if result.models else []
    if len(result.comparison.seeds) < 2 and result.models:
        notes.append("Of one seed it cannot be told which differences are more than chance.")
    elif result.models and not result.weighings.can_tell:
        notes.append(
            f"{len(result.any_judged.dates)} forecasts are too few to tell chance from skill: it takes {FEWEST_DATES}."
        )
    if any(one.held_out == 0 for row in result.judged.values() for one in row):
        notes.append("**Training saw some of the dates that models are judged on**: on others errors will be larger.")
    return notes


def _sparse(result: ComparisonResult) -> Iterable[str]:
    """Of variables that are known on few dates."""
    sparse_LC, fewest = result.sparse_LC, min(FEWEST_DATES, len(result.any_judged.dates))
    for name, sparse_L in zip(result.any_judged.variables, sparse_LC.T, strict=True):
        if sparse_L.any():
            yield (
                f"**{name} is known on fewer than {fewest} dates** at {sparse_L.sum()} of {len(sparse_L)} leads, where "
                f"it counts for no model."
            )


def _without(at: AtRate) -> str:
    """Of a rate that does not count."""
    why = f"failed, or have not ended ({at.why})" if at.why else "have not ended"
    return f"**{at.model} was judged without the rate {at.rate:g}**: {at.lacking} of {len(at.scores)} runs {why}."


def _answers(result: ComparisonResult) -> Iterable[str]:
    if not result.models:
        yield "No model can be judged yet."
    else:
        yield _best(result)
        yield "\n".join(f"- {one}" for one in headline(result))
    yield "\n".join(f"- {note}" for note in notes_of(result))


def _best(result: ComparisonResult) -> str:
    """Who has the smallest errors; a model that is no number somewhere has not."""
    best, many = result.models[0], len(result.models)
    trained = (
        f"each trained for as many steps as {result.comparison.budget_s:g} s held in its probe, from "
        f"{len(result.comparison.seeds)} seed(s)"
    )
    if not math.isfinite(best.ratio.mean):
        return f"None of {many} models has a number for all its errors, {trained}."
    return (
        f"Of {many} models, {trained}, **{best.model}** has the smallest errors: {_spread(best.ratio)} of "
        f"persistence's, geometric mean of variables, leads and seeds."
    )


def _sentence(pair: Pair) -> str:
    if not math.isfinite(pair.ratio):
        return f"Whether {pair.model} is better than {pair.other} **cannot be told**: not all their errors are numbers."
    ratio = f"its RMSE is {pair.ratio:.3g} times as large"
    if not math.isfinite(pair.low):
        return f"Whether {pair.model} is better than {pair.other} **cannot be told**: {ratio}."
    interval = f"{ratio} ({PERCENT} interval {pair.low:.3g} to {pair.high:.3g})"
    if pair.verdict == "cannot tell":
        return f"Whether {pair.model} is better than {pair.other} **cannot be told**: {interval}."
    return f"**{pair.model} is {pair.verdict} than {pair.other}**: {interval}."


def _compared(result: ComparisonResult) -> Iterable[str]:
    one, about = result.any_judged, result.about
    yield (
        f"{len(one.dates)} forecasts, from {one.dates[0]} to {one.dates[-1]}, "
        f"{Leads(one.leads_h).span} ahead ({len(one.leads_h)} leads), each from {about['given']} frames, of "
        f"{', '.join(one.variables)}. Data: "
        f"{about['data']}. Each model was tried at {len(result.comparison.learning_rates)} learning rate(s) from "
        f"{_seeds(result.comparison)}."
    )
    yield f"Measured on: {about['machine']}."
    changes = [[model, ", ".join(f"{k}={v}" for k, v in said.items()) or "as the config has it"]
               for model, said in result.comparison.models.items()]  # fmt: skip
    yield table(["model", f"beside {result.comparison.config}"], changes)


def _seeds(comparison: ComparisonConfig) -> str:
    """Those that choose, and those that run at the best rate alone."""
    choosing = comparison.choosing
    others = comparison.seeds[len(choosing) :]
    told = f"seed{'s' * (len(choosing) > 1)} {', '.join(map(str, choosing))}"
    return f"{told}, and at the best from {', '.join(map(str, others))} too" if others else told


def _row(model: ModelResult) -> list[str]:
    adds = f"{model.multiply_adds:,.0f}" if math.isfinite(model.multiply_adds) else "-"
    return [
        model.model,
        _spread(model.ratio),
        f"{model.rate:g}",
        f"{model.looks[0].steps:,}",
        f"{model.looks[0].frames:,}",
        f"{model.over_seeds('trained_s').mean:.4g}",
        f"{model.parameters:,}",
        adds,
        f"{1000 * model.frame_s:.4g}",
        f"{model.over_seeds('peak_gib').mean:.3g}",
    ]


def _errors(result: ComparisonResult) -> Iterable[str]:
    one, models = result.any_judged, result.models
    persistence_LC = result.baseline_rmse_LC(baselines.PERSISTENCE)
    climatology_LC = result.baseline_rmse_LC(baselines.CLIMATOLOGY)
    rows = []
    shown = evenly(len(one.leads_h), LEADS)
    for number, (name, units) in enumerate(zip(one.variables, one.units, strict=True)):
        for lead in shown:
            free = persistence_LC[lead, number] or math.nan
            spreads = [OverSeeds.of((m.rmse_SLC[:, lead, number] / free).tolist()) for m in models]
            cells = [_spread(spread) for spread in spreads]
            means = [spread.mean if math.isfinite(spread.mean) else math.inf for spread in spreads]
            if math.isfinite(min(means)):
                best = means.index(min(means))
                cells[best] = f"**{cells[best]}**"
            free_cells = [f"{value:.4g}" if math.isfinite(value) else "-" for value in
                     (persistence_LC[lead, number], climatology_LC[lead, number])]  # fmt: skip
            rows.append([with_units(str(name), plain(str(units))), Leads(one.leads_h).one(lead), *cells, *free_cells])
    some = f" at {len(shown)} of {len(one.leads_h)} leads" if len(shown) < len(one.leads_h) else ""
    yield (
        f"RMSE over persistence's{some}: mean of the seeds ± their deviation, the least in bold; the last two columns "
        f"are RMSE in the variable's units. All leads are in `{REPORT_JSON}`."
    )
    head = ["variable", "lead", *(model.model for model in models), baselines.PERSISTENCE, baselines.CLIMATOLOGY]
    yield table(head, rows)


def _differences(result: ComparisonResult) -> Iterable[str]:
    if not result.pairs:
        yield "One model alone was judged."
        return
    rows = []
    for pair in result.pairs:
        interval = f"{pair.low:.3g} to {pair.high:.3g}" if math.isfinite(pair.low) else "-"
        ratio = f"{pair.ratio:.3g}" if math.isfinite(pair.ratio) else "-"
        rows.append([pair.model, pair.other, ratio, interval, pair.verdict])
    yield table(["model", "beside", "ratio of errors", f"{PERCENT} interval", "the first is"], rows)


def _embeddings(result: ComparisonResult) -> str:
    heads = ["model", "effective rank", "share of the calendar", "R2 of the coarse field", "loss"]
    rows = [[model.model, *(_spread(model.embedding[name]) for name in EMBEDDING)] for model in result.models]
    return table(heads, rows)


def _rates(result: ComparisonResult) -> str:
    rows = []
    for at in result.rates:
        scores = ["-" if score is None else f"{score:.4g}" for score in at.scores.values()]
        rows.append([at.model, f"{at.rate:g}", *scores, f"{at.mean:.4g}" if math.isfinite(at.mean) else at.why or "-"])
    seeds = [f"seed {seed}" for seed in result.comparison.choosing]
    return table(["model", "rate", *seeds, "mean"], rows)


def _spread(spread: OverSeeds) -> str:
    if not math.isfinite(spread.mean):
        return "-"
    return f"{spread.mean:.3g}" + (f" ± {spread.deviation:.2g}" if math.isfinite(spread.deviation) else "")
