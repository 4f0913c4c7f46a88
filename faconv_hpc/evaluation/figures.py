"""Figures of a run."""

from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from ..data.variables import Variable
from ..files import replacing
from ..spatial.grid import within_half_a_turn
from .skill import Evaluation

matplotlib.use("Agg")  # ranks have no screen
from matplotlib import pyplot

FIGURE_DPI = 110
SCALE_PERCENTILE = 99.0  # colours saturate beyond it, so that a few cells do not fade all others


def draw_forecast(evaluation: Evaluation, path: Path, name: str) -> Path:
    """Truth, forecast and error of one step of a run of that name, a row per variable, longitude 0 in the middle."""
    example, (before, after) = evaluation.example, evaluation.example.dates
    kind = "held out" if evaluation.held_out else "trained on"
    ratios = [skill.ratio for skill in evaluation.skills if skill.lead == 1]
    shown = min(len(example.variables), 6)
    figure, axes = pyplot.subplots(shown, 3, figsize=(12, 2.3 * shown + 0.7), squeeze=False, layout="constrained")
    longitude, order = _centred(example.longitude_deg)
    for row in range(shown):
        truth, forecast = example.truth_CYX[row][:, order], example.forecast_CYX[row][:, order]
        limit = float(np.nanpercentile(np.abs(truth), SCALE_PERCENTILE)) or 1.0
        panels = {"truth": truth, "forecast": forecast, "error": forecast - truth}
        for place, (what, field) in zip(axes[row], panels.items(), strict=True):
            image = _map(place, longitude, example.latitude_deg, field, limit)
            said = _judged(example.variables[row], ratios[row]) if what == "forecast" else ""
            place.set_title(f"{example.variables[row].name}: {what}{said}", fontsize=9)
        figure.colorbar(image, ax=list(axes[row]), label=_meaning(example.variables[row]), pad=0.01)
    figure.suptitle(f"{name}, step {evaluation.step}: change from {before} to {after} ({kind})", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=FIGURE_DPI, format="png")
    pyplot.close(figure)
    return path


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


def _map(
    place: Axes, longitude: NDArray[np.float64], latitude: NDArray[np.float64], field: NDArray[np.float32], limit: float
) -> matplotlib.collections.QuadMesh:
    image = place.pcolormesh(
        longitude, latitude, field, cmap="RdBu_r", vmin=-limit, vmax=limit, shading="nearest", rasterized=True
    )
    place.set_xticks(np.arange(-180, 181, 60) if longitude[0] < -90 and longitude[-1] > 90 else place.get_xticks())
    for axis, (above, below) in ((place.xaxis, ("E", "W")), (place.yaxis, ("N", "S"))):
        axis.set_major_formatter(partial(_degrees, above, below))
    place.tick_params(labelsize=7)
    place.set_xlim(longitude[0], longitude[-1])
    place.set_ylim(min(latitude[0], latitude[-1]), max(latitude[0], latitude[-1]))
    return image


def _degrees(above: str, below: str, value: float, position: int | None = None) -> str:
    return f"{abs(value):g}°{above if value > 0 else below if value < 0 else ''}"


def _centred(longitude_deg: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Longitudes within [-180, 180) in increasing order, and the order of columns that makes them so."""
    wrapped = within_half_a_turn(longitude_deg)
    order = np.argsort(wrapped)
    return wrapped[order], order
