"""The report of an evaluation: a page that can be read without the program."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri

from ..data.periods import evenly
from . import baselines
from .baselines import MadeOf
from .compare import Comparison, verdict_of
from .evaluation import Evaluation
from .fields import SPECTRA_DATES
from .figures import MOST_APART, MOST_RATIO, SHOWN, SHOWN_MAPS
from .intervals import FEWEST_DATES, LEVEL, most_waves
from .words import plain, table, with_units

LEADS, RANGES = 4, 4  # of tables, of dates of climatology, at most
PERCENT = f"{100 * LEVEL:g} %"
MEANINGS = f"""\
- **persistence**: nothing changes from the start on.
- **climatology**: {{climatology}}.
- **damped persistence**: climatology, and what is left of the anomaly of the start, as fitted for each variable and
  lead on at most {baselines.PAIRS} of the dates of climatology; not known without such dates.
- **RMSE**, **bias**: cells count by their area, all dates alike.
- **anomaly correlation**: of departures from climatology over the grid, weighted by area and centred, mean over dates.
- **activity**: standard deviation of departures from climatology over the grid, weighted by area. Where it is less than
  that of what came, the forecast is too smooth.
- **intervals** ({PERCENT}): where the score of ever more such dates would lie. They are told by how the score changes
  when dates count a little more or less along slow waves over the period (equal-weighted cosines: Lazarus and others,
  2018), the same for all, with Student's t; the longer errors last from date to date, the fewer waves are slow enough,
  and the wider the interval.{{width}} *Better* and *worse* are where the interval of the ratio of errors does not
  reach 1. Of many such verdicts one in ten or more is chance."""


def report_of(evaluation: Evaluation, figures: Mapping[str, Path]) -> str:
    """In Markdown."""
    parts = [
        f"# Evaluation of {', '.join(one.name for one in evaluation.entries)}",
        *_answers(evaluation),
        "## What was compared",
        *_compared(evaluation),
        *_leads_won(evaluation),
        "## Scores",
        *_scores(evaluation),
        "## Figures",
        *(f"**{title}.** {_caption(title, evaluation)}\n\n![{title}]({path.name})" for title, path in figures.items()),
        "## What the numbers mean",
        MEANINGS.format(climatology=_climatology(evaluation.made_of), width=_width(evaluation)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def headline(evaluation: Evaluation) -> list[str]:
    """A sentence for each comparison, the most important words of it in bold."""
    return [_sentence(one, evaluation) for one in evaluation.comparisons]


def _answers(evaluation: Evaluation) -> Iterable[str]:
    yield "\n".join(f"- {one}" for one in headline(evaluation))
    if not evaluation.weighings.can_tell:
        yield (
            f"**{evaluation.forecasts} dates are too few to tell chance from skill**: it takes {FEWEST_DATES}. "
            f"The numbers below say what happened on these dates, not what to expect on others."
        )
    seen = [one.name for one in evaluation.entries if one.held_out is False]
    if seen:
        yield f"**{', '.join(seen)} saw some of these dates in training**: on others errors will be larger."
    unknown = [one.name for one in evaluation.entries if one.kind == "network" and one.held_out is None]
    if unknown:
        yield (
            f"Whether {', '.join(unknown)} saw some of these dates in training is **not known**: training names "
            f"sequences, and the data none."
        )


def _sentence(one: Comparison, evaluation: Evaluation) -> str:
    if not np.isfinite(one.overall):
        return f"{one.model} and {one.other} cannot be compared: for no variable both have errors."
    left, ratio = _left_out(one, evaluation), f"its RMSE is {one.overall:.3g} times as large"
    if not evaluation.weighings.can_tell:
        return (
            f"Whether {one.model} is better than {one.other} **cannot be told** from so few dates; on them {ratio}."
            f"{left}"
        )
    counts, (low, high) = one.counts(), one.bounds
    of = (
        f"{ratio} on average over variables and leads ({PERCENT} interval {low:.3g} to "
        f"{high:.3g}); better in {counts['better']} of {sum(counts.values())} of them, worse in {counts['worse']}"
    )
    if one.one_sided:
        return (
            f"Whether {one.model} is better than {one.other} **cannot be told on the whole**.{left} On the rest {of}."
        )
    if one.seen:
        return (
            f"Whether {one.model} is better than {one.other} **cannot be told**: {one.other} is made of some of the "
            f"very dates that are judged. On them {of}.{left}"
        )
    if one.verdict == "cannot tell":
        return f"Whether {one.model} is better than {one.other} **cannot be told**: {of}.{left}"
    return f"**{one.model} is {one.verdict} than {one.other}**: {of}.{left}"


def _left_out(one: Comparison, evaluation: Evaluation) -> str:
    """Which variables and leads a comparison is not of, and why."""
    lacks = "{} has no errors there, as it has no numbers in a cell or on a date where it is known what came"
    why = {
        "model lacks": lacks.format(one.model),
        "other lacks": lacks.format(one.other) if one.other not in baselines.NAMES else f"there is no {one.other}",
        "other cells": f"{one.other} is known on a part of the cells",
        "no error": "but one of the two has an error of 0",
        "too few": "known on too few dates, or the error is 0",
    }
    parts = []
    for reason, left_LC in one.left_out.items():
        places = np.flatnonzero(left_LC.any(axis=0))
        names = ", ".join(_with_leads(evaluation, int(place), left_LC[:, place]) for place in places)
        parts.append(f"{names} ({why[reason]})")
    return f" Left out: {'; '.join(parts)}." if parts else ""


def _with_leads(evaluation: Evaluation, place: int, left_L: NDArray[np.bool_]) -> str:
    name = evaluation.targets[place].name
    return name if left_L.all() else f"{name} at {left_L.sum()} of {len(left_L)} leads"


def _compared(evaluation: Evaluation) -> Iterable[str]:
    held = {True: "yes", False: "no", None: "not known"}
    rows = [[one.name, one.kind, one.about.get("step") or "-", held[one.held_out]] for one in evaluation.entries]
    yield table(["model", "what", "step", "held out"], rows)
    grid, count = evaluation.grid, len(evaluation.leads_h)
    ahead = f"{evaluation.leads.span} ahead{f' ({count} leads)' * (count > 1)}"
    parts = _parts(evaluation)
    yield (
        f"{evaluation.forecasts} forecasts, from {evaluation.dates[0]} to {evaluation.dates[-1]}, {ahead}, of "
        f"{', '.join(one.name for one in evaluation.targets)} on {grid.nlat} x {grid.nlon} cells. {_data(evaluation)} "
        f"All are held against what came on the same dates and cells{', with exceptions' * bool(parts)}."
    )
    yield _chosen(evaluation)
    if parts:
        yield (
            f"Baselines that are not known in all of the cells were judged on a part of the area, and there is no "
            f"ratio of errors to theirs: {'; '.join(parts)}."
        )
    if evaluation.made_of.judged:
        yield (
            f"**Climatology has seen what it is judged on**: {evaluation.made_of.judged} of {evaluation.forecasts} "
            f"forecasts have leads among the dates that it is made of, {_dates(evaluation.made_of)}. It and damped "
            f"persistence look better than they would be; name other dates with `--climatology FIRST/LAST`."
        )
    lacking = [one.name for one, known in zip(evaluation.targets, evaluation.known, strict=True) if not known]
    if lacking:
        yield (
            f"There is no climatology of {', '.join(lacking)}, and nothing that is told by it: the data do not hold "
            f"all dates of training, and `--climatology FIRST/LAST` names no others."
        )
    if evaluation.spectra.reason:
        yield f"There are no spectra: {evaluation.spectra.reason}."


def _chosen(evaluation: Evaluation) -> str:
    """Which dates forecasts begin at, and of which."""
    chosen, count = evaluation.chosen, evaluation.forecasts
    some = f"{count} of {chosen.among} possible start dates were taken, spread evenly over them"
    some = some if count < chosen.among else f"All {count} possible start dates were taken"
    ends = list(dict.fromkeys([*chosen.sequences[:1], *chosen.sequences[-1:]]))
    many = f"{len(chosen.sequences)} sequence{'s' * (len(chosen.sequences) > 1)}"
    several = f", in {many} ({' to '.join(ends)})" * bool(ends)
    if chosen.of_files:
        rule = "dates that all files have, and of which it is known what came at all leads"
    else:
        where = f"in the test period ({', '.join(chosen.within)})" if chosen.within else "in the data"
        rule = f"dates with all leads {where} and the frames before them that a network needs, without a gap"
    return f"{some}{several}: {rule}."


def _data(evaluation: Evaluation) -> str:
    """What networks were given, and what came."""
    if not evaluation.given:
        return f"What came is from {evaluation.truth}."
    if evaluation.given == evaluation.truth:
        return f"What came, and what networks forecast from, is {evaluation.truth}."
    return (
        f"**Networks forecast from {evaluation.given}; what came is from {evaluation.truth}**, and so is persistence."
    )


def _width(evaluation: Evaluation) -> str:
    """How sure the width of an interval is."""
    if not evaluation.weighings.can_tell:
        return ""
    waves = most_waves(evaluation.forecasts)
    least, most = np.sqrt(chdtri(waves, [0.95, 0.05]) / waves)
    return (
        f"\n  Dates and waves are the same at all leads; but of {evaluation.forecasts} dates they are {waves} waves at "
        f"most, and each score is told by its own: by chance an interval is {least:.2g} to {most:.2g} times as wide as "
        f"on average, and may jump from one lead to the next.\n "
    )


def _climatology(made_of: MadeOf) -> str:
    if made_of.kind == "none":
        return "the annual cycle that a network brings, where it has one, as the data do not have the dates of training"
    what = {"training": "the training period", "named": "the dates that `--climatology` names"}[made_of.kind]
    return (
        f"the mean of each cell over {what} ({_dates(made_of)}) in the same month, and at the same time of the day "
        f"where steps are shorter than a day"
    )


def _dates(made_of: MadeOf) -> str:
    more = len(made_of.dates) - RANGES
    return ", ".join(made_of.dates[:RANGES]) + (f" and {more} more" if more > 0 else "")


def _parts(evaluation: Evaluation) -> list[str]:
    """Where baselines were judged on a part of the area: on how much of it, at the lead where that is least."""
    shares_FC = np.where(evaluation.elsewhere, evaluation.per_date.shares, 1.0).min(axis=0)
    known_FC = evaluation.elsewhere.any(axis=0) & (shares_FC > 0)
    return [
        f"{evaluation.names[place]} of {evaluation.targets[number].name}, {100 * shares_FC[place, number]:.3g} %"
        for place, number in np.argwhere(known_FC)
    ]


def _scores(evaluation: Evaluation) -> Iterable[str]:
    told = f" ± half of the {PERCENT} interval" if evaluation.weighings.can_tell else ""
    shown = evenly(len(evaluation.leads_h), LEADS)
    if len(shown) < len(evaluation.leads_h):
        yield f"At {len(shown)} of {len(evaluation.leads_h)} leads; all of them are in `scores.nc` and `scores.json`."
    for title, metric in (
        (f"Root mean squared error{told}; the least in bold", "rmse"),
        (f"Anomaly correlation{told}; the largest in bold", "acc"),
        ("Bias", "bias"),
        ("Activity: the spread of the forecast's anomalies over the grid, beside that of what came", "activity"),
    ):
        best = {"rmse": np.nanargmin, "acc": np.nanargmax}.get(metric)
        head, rows = _metric_rows(evaluation, metric, shown, best)
        yield f"### {title}\n\n{table(head, rows)}"


def _leads_won(evaluation: Evaluation) -> Iterable[str]:
    """A table for each entry: at which leads it is better, and at which worse, by variable and by whom it is held
    against."""
    if not evaluation.weighings.can_tell:
        return
    shown = evenly(len(evaluation.leads_h), LEADS)
    yield "## At which leads who is better"
    yield (
        "Where errors are smaller or larger by more than chance, by the interval of their ratio at each lead alone. Of "
        "leads that are not named it cannot be told. The tables below those are of these ratios with their "
        f"intervals, at {len(shown)} of {len(evaluation.leads_h)} leads: less than 1 is better, bold is no chance."
    )
    for entry in evaluation.entries:
        found = evaluation.compared_with_others(entry.name)
        rows = [
            [target.name, *(_won(one, number, evaluation) for one in found)]
            for number, target in enumerate(evaluation.targets)
        ]
        yield f"**{entry.name}**\n\n{table(['variable', *(f'than {one.other}' for one in found)], rows)}"
        rows = [
            [target.name, evaluation.leads.one(lead), *(_ratio(one, lead, number) for one in found)]
            for number, target in enumerate(evaluation.targets)
            for lead in shown
        ]
        yield table(["variable", "lead", *(f"over {one.other}" for one in found)], rows)


def _ratio(one: Comparison, lead: int, number: int) -> str:
    """Of errors at a lead, of a variable."""
    (low, high), ratio = one.bounds_2LC[:, lead, number].tolist(), float(one.ratio_LC[lead, number])
    if not np.isfinite(ratio):
        return "-"
    told = f"{ratio:.3g} ({low:.3g} to {high:.3g})" if np.isfinite([low, high]).all() else f"{ratio:.3g}"
    return f"**{told}**" if verdict_of(low, high) != "cannot tell" and not one.seen else told


def _won(one: Comparison, number: int, evaluation: Evaluation) -> str:
    low_L, high_L = one.bounds_2LC[:, :, number]
    said = []
    for verdict, leads_L in {"better": high_L < 1, "worse": low_L > 1}.items():
        if leads_L.any() and not one.seen:
            at = "at all leads" if leads_L.all() else f"at {evaluation.leads.some(leads_L)}"
            said.append(f"**{verdict}** {at}")
    return "; ".join(said) or "-"


def _metric_rows(
    evaluation: Evaluation,
    metric: str,
    shown: Sequence[int],
    best: Callable[[NDArray[np.float64]], np.intp] | None,
) -> tuple[list[str], list[list[str]]]:
    """A row for each variable and lead, a column for each model."""
    values, intervals = evaluation.metrics[metric], evaluation.intervals[metric]
    truth = ["what came"] if metric == "activity" else []
    rows = []
    for number, target in enumerate(evaluation.targets):
        for lead in shown:
            line = values[lead, :, number]
            halves = (intervals[1] - intervals[0])[lead, :, number] / 2
            cells = [_number(value, half * (best is not None)) for value, half in zip(line, halves, strict=True)]
            line = np.where(evaluation.elsewhere[lead, :, number], np.nan, line)  # of other cells: not the best
            if best is not None and np.isfinite(line).any():
                cells[best(line)] = f"**{cells[best(line)]}**"
            named = with_units(target.name, plain(target.units) if metric != "acc" else "")
            came = [_number(evaluation.metrics["truth_activity"][lead, 0, number])] if truth else []
            rows.append([named, evaluation.leads.one(lead), *cells, *came])
    return ["variable", "lead", *evaluation.names, *truth], rows


def _number(value: float, half: float = 0.0) -> str:
    if not np.isfinite(value):
        return "-"
    return f"{value:.4g}" + (f" ± {half:.2g}" if np.isfinite(half) and half else "")


def _caption(title: str, evaluation: Evaluation) -> str:
    if title.startswith("Errors over"):
        return "Lower is better. A forecast that crosses climatology is worth nothing from there on."
    if title.startswith("Anomaly"):
        return "1 is perfect, 0 knows nothing of how the day differs from the season. Climatology has none."
    if title.startswith("Who"):
        return "Blue: the row has the smaller errors. The words say whether it is more than chance."
    if title == "Spectra":
        return (
            f"Mean of {len(evaluation.spectra.dates)} dates (at most {SPECTRA_DATES}). Where the line of a forecast "
            f"falls below that of the truth it is too smooth at that scale: short waves are to the right. "
            f"On the right is the forecast's variance over the truth's. A line that leaves a panel there is above "
            f"{MOST_RATIO}, or below 1/{MOST_RATIO}."
            f"{_of_all(evaluation, SHOWN_MAPS, 'scores.nc')}"
        )
    if title.startswith("One"):
        return (
            "The last of the dates; of one step, so that errors can be seen. Fields are shown as they differ from the "
            f"start, or as the scale says; lines are at half of its ends.{_of_all(evaluation, SHOWN)}"
        )
    return (
        "RMSE of each cell over all dates, and the mean error: red where the forecast is too high; lines are at half "
        f"of the ends of its scale.{_scales(evaluation)}{_of_all(evaluation, SHOWN_MAPS, 'maps.nc')}"
    )


def _scales(evaluation: Evaluation) -> str:
    """Of the maps of several models."""
    several = " All models have the same scales"
    beyond = f", which end at {MOST_APART:g} times the errors of the best one at most."
    return (several + beyond) * (len(evaluation.entries) > 1)


def _of_all(evaluation: Evaluation, shown: int, file: str = "") -> str:
    """How many of the variables a figure has, if not all."""
    count = len(evaluation.targets)
    rest = f"; the others are in `{file}`" * bool(file)
    return f" The first {shown} of {count} variables{rest}." if shown < count else ""
