"""What an evaluation leaves: scores as NetCDF and JSON, maps as NetCDF, a report and figures."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ..files import json_ready, write_durably
from ..forecasting.layout import attributes_of
from .asked import ASKED
from .compare import Comparison
from .evaluation import Evaluation
from .fields import lead_times
from .figures import FIGURES, draw_figures
from .intervals import LEVEL
from .netcdf import save_dataset
from .report import report_of
from .sums import METRICS

SCORES, JSON_FILE, MAPS, REPORT = "scores.nc", "scores.json", "maps.nc", "report.md"
FILES = (SCORES, MAPS, *FIGURES, REPORT, JSON_FILE)
"""All that there may be, the one that says that it is whole at the end."""
BOUNDS = ["low", "high"]
LONG = {
    "rmse": "root mean squared error",
    "bias": "mean error",
    "acc": "anomaly correlation",
    "activity": "standard deviation of the anomaly over the grid",
    "truth_activity": "standard deviation of the anomaly that came",
}


def save(evaluation: Evaluation, directory: Path, request: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Writes all of it beside the maps, which are there, and gives what stands in the JSON.

    Args:
        request: what was asked for, kept so that another does not replace it unasked.
    """
    save_dataset(dataset_of(evaluation), directory / SCORES)
    said = as_json(evaluation) | {ASKED: dict(request or {})}
    write_durably(directory / JSON_FILE, json.dumps(said, indent=2) + "\n")
    with xr.open_dataset(directory / MAPS, engine="h5netcdf", decode_timedelta=True) as maps:
        figures = draw_figures(evaluation, maps, directory)
    write_durably(directory / REPORT, report_of(evaluation, figures))
    return said


def dataset_of(evaluation: Evaluation) -> xr.Dataset:
    """All scores, with their intervals, the spectra, and the errors of each date, from which others can be made."""
    dims = ("lead_time", "model", "variable")
    variables: dict[str, Any] = {}
    for name in METRICS:
        own = dims if name != "truth_activity" else ("lead_time", "variable")
        place = np.s_[...] if name != "truth_activity" else np.s_[..., 0, :]
        told = {"long_name": LONG[name], "bounds": f"{name}_bounds"}
        variables[name] = (own, evaluation.metrics[name][place], told)
        variables[f"{name}_bounds"] = (("bound", *own), evaluation.intervals[name][place])
    pairs = evaluation.comparisons
    ratios = {"long_name": "RMSE of the first over that of the second", "bounds": "rmse_ratio_bounds"}
    variables["rmse_ratio"] = (("pair", "lead_time", "variable"), np.stack([one.ratio_LC for one in pairs]), ratios)
    bounds = np.stack([one.bounds_2LC for one in pairs], axis=1)
    variables["rmse_ratio_bounds"] = (("bound", "pair", "lead_time", "variable"), bounds)
    errors = evaluation.per_date.errors
    variables["mse_of_date"] = (
        ("start", *dims),
        errors,
        {"long_name": "area-weighted mean squared error of each date"},
    )
    coordinates = {
        "model": list(evaluation.names),
        "variable": [one.name for one in evaluation.targets],
        "units": ("variable", [one.units for one in evaluation.targets]),
        "lead_time": lead_times(evaluation.leads_h),
        "start": list(evaluation.dates),
        "bound": BOUNDS,
        "pair": [f"{one.model} / {one.other}" for one in pairs],
    }
    dataset = xr.Dataset(variables | _spectra(evaluation), coordinates, _attributes(evaluation))
    dataset.lead_time.encoding |= {"units": "hours", "dtype": "float64"}
    return dataset


def _spectra(evaluation: Evaluation) -> dict[str, Any]:
    """Of what came and the entries; nothing where there are none."""
    kept = evaluation.spectra
    if kept.reason:
        return {}
    series = ["truth", *(one.name for one in evaluation.entries)]
    dims = ("series", "spectrum_lead_time", "variable")
    return {
        "series": ("series", series),
        "spectrum_lead_time": ("spectrum_lead_time", lead_times(evaluation.leads_h)[kept.leads]),
        "zonal_wavenumber": ("zonal_wavenumber", kept.zonal_wavenumbers),
        "total_wavenumber": ("total_wavenumber", kept.total_wavenumbers),
        "zonal_spectrum": ((*dims, "zonal_wavenumber"), kept.zonal_ESCK),
        "total_spectrum": ((*dims, "total_wavenumber"), kept.total_ESCL),
    }


def _attributes(evaluation: Evaluation) -> dict[str, Any]:
    return {
        **attributes_of(f"Scores of {', '.join(one.name for one in evaluation.entries)}"),
        "truth": evaluation.truth,
        "networks_forecast_from": evaluation.given,
        "climatology": evaluation.made_of.kind,
        "climatology_dates": ", ".join(evaluation.made_of.dates),
        "forecasts_that_climatology_has_seen": evaluation.made_of.judged,
        "interval": f"{100 * LEVEL:g} %, equal-weighted cosines over {evaluation.forecasts} dates",
    }


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """For programs: plain values; what is no number is None."""
    said = {
        "models": [
            {"name": one.name, "kind": one.kind, "held_out": one.held_out, **one.about} for one in evaluation.entries
        ],
        "truth": evaluation.truth,
        "networks_forecast_from": evaluation.given or None,
        "forecasts": evaluation.forecasts,
        "first": evaluation.dates[0],
        "last": evaluation.dates[-1],
        "interval": LEVEL,
        "can_tell": evaluation.weighings.can_tell,
        "climatology": evaluation.made_of._asdict(),
        "spectra": evaluation.spectra.reason or "yes",
        "comparisons": [
            one.as_json() | {"left_out": list(_left_out(one, evaluation))} for one in evaluation.comparisons
        ],
        "skills": list(_rows(evaluation)),
    }
    ready: dict[str, Any] = json_ready(said)
    return ready


def _left_out(one: Comparison, evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """One for each variable and lead that a comparison is not of."""
    for reason, left_LC in one.left_out.items():
        for lead, number in np.argwhere(left_LC).tolist():
            yield {"variable": evaluation.targets[number].name, "lead": lead + 1, "why": reason}


def _rows(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """One for each model, variable and lead."""
    for place, model in enumerate(evaluation.names):
        for number, target in enumerate(evaluation.targets):
            for lead, hours in enumerate(evaluation.leads_h.tolist()):
                row = {"model": model, "variable": target.name, "units": target.units, "lead": lead + 1, "hours": hours}
                for name in METRICS:
                    low, high = evaluation.intervals[name][:, lead, place, number].tolist()
                    row |= {name: float(evaluation.metrics[name][lead, place, number])}
                    row |= {f"{name}_low": low, f"{name}_high": high}
                yield row
