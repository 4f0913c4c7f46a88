"""Figures of a run."""

from pathlib import Path

from ..data.variables import Variable
from ..look import Colours, colour_bar, draw_map, new_figure, save_figure
from .skill import Evaluation

SHOWN = 6  # variables at most


def draw_forecast(evaluation: Evaluation, path: Path, name: str) -> Path:
    """Truth, forecast and error of one step of a run of that name, a row per variable."""
    example, (before, after) = evaluation.example, evaluation.example.dates
    kind = "held out" if evaluation.held_out else "trained on"
    ratios = [skill.ratio for skill in evaluation.skills if skill.lead == 1]
    shown = example.variables[:SHOWN]
    title = f"{name}, step {evaluation.step}: change from {before} to {after} ({kind})"
    figure, axes = new_figure(len(shown), 3, title, maps=True)
    for row, variable in enumerate(shown):
        truth, forecast = example.truth_CYX[row], example.forecast_CYX[row]
        colours = Colours.of_changes(truth)
        panels = {"truth": truth, "forecast": forecast, "error": forecast - truth}
        for place, (what, field) in zip(axes[row], panels.items(), strict=True):
            said = _judged(variable, ratios[row]) if what == "forecast" else ""
            title = f"{variable.name}: {what}{said}"
            image = draw_map(place, example.latitude_deg, example.longitude_deg, field, colours, title)
        colour_bar(image, list(axes[row]), _meaning(variable))
    return save_figure(figure, path)


def _judged(variable: Variable, ratio: float) -> str:
    if not variable.loss_weight:
        return ", not trained: its loss has weight 0"
    return f", {ratio:.2f} of persistence's error"


def _meaning(variable: Variable) -> str:
    what = "change in one step"
    if variable.role == "diagnostic":
        what = "departure from the mean" if variable.log1p is None else "departure from the mean of its logarithm"
        what = what if variable.harmonics is None else "departure from its annual cycle"
    return f"{what} [{variable.units}]" if variable.units else what
