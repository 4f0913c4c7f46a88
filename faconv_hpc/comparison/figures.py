"""Figures of a comparison: errors over lead, skill against cost, and what the rates did."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation import baselines
from ..evaluation.words import Leads, with_units
from ..look import PANEL, dress, legend_below, line_style, new_figure, save_figure
from .result import ComparisonResult, ModelResult

FIGURES = ("errors.png", "costs.png", "rates.png")
SHOWN = 6  # variables, at most
ROOM = 1.4  # of a panel over persistence's largest error; a model whose errors are larger leaves it
GREY = "#888888"
COSTS: dict[str, Callable[[ModelResult], float]] = {
    "parameters": lambda one: one.parameters,
    "multiply-adds of a cell and step, forward": lambda one: one.multiply_adds,
    "ms of training for a frame": lambda one: 1000 * one.frame_s,
}
RATIO = "error over persistence's"


def draw_figures(result: ComparisonResult, directory: Path) -> dict[str, Path]:
    """All of them; what each shows, in words, and where it is."""
    errors, costs, rates = (directory / name for name in FIGURES)
    return {
        "Errors over lead": draw_errors(result, errors),
        "Skill against cost": draw_costs(result, costs),
        "Learning rates": draw_rates(result, rates),
    }


def _style(result: ComparisonResult, model: str) -> dict[str, Any]:
    """One for each model in all figures, whichever is the best."""
    return line_style(list(result.comparison.models).index(model))


def draw_errors(result: ComparisonResult, path: Path) -> Path:
    """A panel for each variable: a line for each model, mean of the seeds, with their least and most around it."""
    one = result.any_judged
    shown, (leads, unit) = len(one.variables[:SHOWN]), Leads(one.leads_h).axis
    columns = min(shown, 3)
    title = f"RMSE of {len(one.dates)} forecasts: mean of {len(result.comparison.seeds)} seeds, and their range"
    figure, axes = new_figure(-(-shown // columns), columns, title, height=2.8)
    free = {name: result.baseline_rmse_LC(name) for name in (baselines.PERSISTENCE, baselines.CLIMATOLOGY)}
    for number, place in enumerate(axes.flat):
        if number >= shown:
            place.set_axis_off()
            continue
        for model in result.models:
            rmse_SL = np.where(np.isfinite(model.rmse_SLC[:, :, number]), model.rmse_SLC[:, :, number], np.nan)
            style = _style(result, model.model)
            place.plot(leads, rmse_SL.mean(axis=0), label=model.model, **style)
            place.fill_between(leads, rmse_SL.min(axis=0), rmse_SL.max(axis=0), color=style["color"], alpha=0.2)
        for dashes, (name, rmse_LC) in zip(("--", ":"), free.items(), strict=True):
            if np.isfinite(rmse_LC[:, number]).any():
                place.plot(leads, rmse_LC[:, number], dashes, color=GREY, label=name)
        dress(place, str(one.variables[number]), f"lead [{unit}]", with_units("RMSE", str(one.units[number])))
        most = max(np.nan_to_num(model.rmse_SLC[:, :, number], nan=np.inf).max() for model in result.models)
        highest = ROOM * np.nanmax(free[baselines.PERSISTENCE][:, number], initial=0)
        place.set_ylim(bottom=0, top=highest if most > highest > 0 else None)
    legend_below(figure, axes[0, 0])
    return save_figure(figure, path)


def draw_costs(result: ComparisonResult, path: Path) -> Path:
    """A panel for each cost: a point for each model, with the deviation of its seeds; below and left is better."""
    title = "Skill against cost, all trained for the same time (below and left is better)"
    figure, axes = new_figure(1, len(COSTS), title, height=3.0)
    for place, (name, cost) in zip(axes.flat, COSTS.items(), strict=True):
        for model in result.models:
            if not np.isfinite(model.ratio.mean):
                continue
            style = _style(result, model.model) | {"linestyle": "none", "markersize": 7}
            bar = model.ratio.deviation
            place.errorbar(
                cost(model), model.ratio.mean, yerr=bar if np.isfinite(bar) else None, capsize=3, label=model.model,
                **style,
            )  # fmt: skip
        place.set_xscale("log")
        dress(place, "", name, RATIO)
    legend_below(figure, axes[0, 0])
    return save_figure(figure, path)


def draw_rates(result: ComparisonResult, path: Path) -> Path:
    """The score in validation over the rate: a line for each model through the means, a dot for each seed."""
    title = "Validation after the last step: what each learning rate gives"
    figure, ((axes,),) = new_figure(1, 1, title, width=6.5, height=3.4)
    for model in result.comparison.models:
        own = sorted((at for at in result.rates if at.model == model), key=lambda at: at.rate)
        style = _style(result, model)
        means = [at.mean if np.isfinite(at.mean) else np.nan for at in own]
        axes.plot([at.rate for at in own], means, label=model, **style)
        dots = [(at.rate, score) for at in own for score in at.scores.values() if score is not None]
        if dots:
            axes.plot(*zip(*dots, strict=True), ".", color=style["color"], markersize=4)
    axes.set_xscale("log")
    axes.set_xticks(result.comparison.learning_rates, [f"{rate:g}" for rate in result.comparison.learning_rates])
    axes.minorticks_off()
    dress(axes, "", "learning rate", RATIO)
    axes.legend(fontsize=PANEL, frameon=False)
    return save_figure(figure, path)
