"""Figures of an evaluation."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ..look import PANEL, SMALL, Colours, colour_bar, draw_map, dress, legend_below, line_style, new_figure, save_figure
from .evaluation import Evaluation
from .intervals import LEVEL
from .words import Leads, with_units

SHOWN, SHOWN_MAPS, SHOWN_ENTRIES = 6, 4, 4  # variables of lines, variables of maps, entries with maps, at most
SHOWN_VARIANCE = 1e-12  # of the most of a spectrum: what is less is not drawn
MOST_APART = 5.0  # scale over the errors of the best model: those of one that runs away would leave nothing to see
MOST_RATIO = 64  # of variances that is shown; at least 2 is
RMSE, ACC, COMPARISONS, SPECTRA, FORECAST = "rmse.png", "acc.png", "comparisons.png", "spectra.png", "forecast.png"
MAP_FIGURES = tuple(f"maps_{place}.png" for place in range(1, SHOWN_ENTRIES + 1))
FIGURES = (RMSE, ACC, COMPARISONS, SPECTRA, *MAP_FIGURES, FORECAST)
"""Names of all that there may be."""


def draw_figures(evaluation: Evaluation, maps: xr.Dataset, directory: Path) -> dict[str, Path]:
    """All of them; what each shows, in words, and where it is."""
    figures = {
        "Errors over lead": draw_scores(evaluation, directory / RMSE, "rmse"),
        "Anomaly correlation over lead": draw_scores(evaluation, directory / ACC, "acc"),
        "Who beats whom": draw_comparisons(evaluation, directory / COMPARISONS),
    }
    if not evaluation.spectra.reason:
        figures["Spectra"] = draw_spectra(evaluation, directory / SPECTRA)
    for entry, name in zip(evaluation.entries, MAP_FIGURES, strict=False):
        figures[f"Errors of {entry.name} on the map"] = draw_maps(
            maps, entry.name, directory / name, coasts=evaluation.on_earth
        )
    figures["One forecast"] = draw_forecast(evaluation, directory / FORECAST)
    return figures


def draw_forecast(evaluation: Evaluation, path: Path) -> Path:
    """Truth, forecast and error of one step of the first entry, a row per variable."""
    example, (before, after) = evaluation.example, evaluation.example.dates
    kind = {True: " (held out)", False: " (trained on)", None: ""}[evaluation.held_out]
    first = evaluation.entries[0]
    step = first.about.get("step")
    title = f"{first.name}{f', step {step}' if step else ''}: from {before} to {after}{kind}"
    shown = example.names[:SHOWN]
    ratios = [skill.ratio for skill in evaluation.skills if skill.lead == 1]
    figure, axes = new_figure(len(shown), 3, title, maps=True, coasts=evaluation.on_earth)
    for row, variable in enumerate(shown):
        truth, forecast = example.truth_CYX[row], example.forecast_CYX[row]
        colours = Colours.of_changes(truth)
        panels = {"truth": truth, "forecast": forecast, "error (forecast - truth)": forecast - truth}
        said = example.judged.get(variable, f"{ratios[row]:.2f} of persistence's error")
        for place, (what, field) in zip(axes[row], panels.items(), strict=True):
            title = f"{variable}: {what}" + f", {said}" * (what == "forecast")
            degrees = example.latitude_deg, example.longitude_deg
            image = draw_map(place, *degrees, field, colours, title, evaluation.on_earth)
        colour_bar(image, list(axes[row]), with_units(example.meaning[row], example.units[row]))
    return save_figure(figure, path)


def draw_scores(evaluation: Evaluation, path: Path, metric: str) -> Path:
    """A panel for each variable: a line for each model over leads, with intervals where they can be told."""
    targets = evaluation.targets[:SHOWN]
    what = {"rmse": "RMSE", "acc": "anomaly correlation"}[metric]
    columns = min(len(targets), 3)
    told = f"bars: {100 * LEVEL:g} % intervals" if evaluation.weighings.can_tell else "too few dates for intervals"
    title = f"{what} of {evaluation.forecasts} forecasts ({told})"
    figure, axes = new_figure(-(-len(targets) // columns), columns, title, height=2.8)
    values, intervals, (ahead, unit) = evaluation.metrics[metric], evaluation.intervals[metric], evaluation.leads.axis
    for number, place in enumerate(axes.flat):
        if number >= len(targets):
            place.set_axis_off()
            continue
        for model, name in enumerate(evaluation.names):
            line, ends = values[:, model, number], intervals[:, :, model, number]
            if np.isfinite(line).any():
                bars = np.abs(ends - line) if np.isfinite(ends).all() else None
                baseline = model - len(evaluation.entries)  # from the end: the same beside any number of models
                style = line_style(model if baseline < 0 else -1 - baseline)
                aside = (model - (len(evaluation.names) - 1) / 2) * 0.012 * np.ptp(ahead)  # bars beside each other
                place.errorbar(ahead + aside * (bars is not None), line, yerr=bars, capsize=2.5, label=name, **style)
        label = with_units(what, targets[number].units) if metric == "rmse" else what
        dress(place, targets[number].name, f"lead [{unit}]", label)
        if len(ahead) > 1:
            place.xaxis.set_major_locator(MaxNLocator(integer=bool((ahead == ahead.round()).all())))
        else:
            place.set_xticks(ahead)
        if metric == "rmse":  # from zero, with as much room above as there is of all that is shown: markers are not cut
            place.update_datalim([(ahead[0], 0.0)])
            place.autoscale_view(scalex=False)
            place.set_ylim(bottom=0)
    legend_below(figure, axes[0, 0])
    return save_figure(figure, path)


def draw_spectra(evaluation: Evaluation, path: Path) -> Path:
    """A row for each variable that is known everywhere: by zonal wavenumber, by total wavenumber, and the share of the
    truth's, at the last lead."""
    kept, names = evaluation.spectra, [one.name for one in evaluation.entries]
    known = [place for place in range(len(evaluation.targets)) if np.isfinite(kept.total_ESCL[0, -1, place]).all()]
    title = f"Spectra {evaluation.leads.one(kept.leads[-1])} ahead, mean of {len(kept.dates)} dates"
    figure, axes = new_figure(max(len(known[:SHOWN_MAPS]), 1), 3, title, height=2.6)
    for row, number in zip(axes, known, strict=False):
        target, (zonal, total) = evaluation.targets[number], (kept.zonal_ESCK, kept.total_ESCL)
        styles = [
            {"color": "black", "linewidth": 2.0},
            *(line_style(entry, markers=False) for entry in range(len(names))),
        ]
        for entry, (name, style) in enumerate(zip(["truth", *names], styles, strict=True)):
            row[0].loglog(kept.zonal_wavenumbers[1:], zonal[entry, -1, number, 1:], label=name, **style)
            row[1].loglog(kept.total_wavenumbers[1:], total[entry, -1, number, 1:], label=name, **style)
            share = total[entry, -1, number, 1:] / np.where(
                total[0, -1, number, 1:] > 0, total[0, -1, number, 1:], np.nan
            )
            row[2].loglog(kept.total_wavenumbers[1:], share, **style)
        units = target.units if target.units.isalpha() or not target.units else f"({target.units})"
        squared = with_units("variance", units and f"{units}²")
        dress(row[0], f"{target.name}: along latitude circles", "zonal wavenumber", squared)
        dress(row[1], f"{target.name}: on the sphere", "total wavenumber", squared)
        dress(row[2], f"{target.name}: blurred below 1, noise above", "total wavenumber", "forecast over truth")
        _scale_ratios(row[2])
        for place in row[:2]:  # where the truth has nothing its rounding would take most of the panel
            low, high = place.get_ylim()
            place.set_ylim(bottom=max(low, SHOWN_VARIANCE * high))
    axes[0, 0].legend(fontsize=SMALL, frameon=False)
    return save_figure(figure, path)


def _scale_ratios(place: Axes) -> None:
    """By powers of two, as far as there is something, and `MOST_RATIO` at most."""
    low, high = place.get_ylim()
    place.set_yscale("log", base=2)
    place.set_ylim(max(min(low, 1 / 2), 1 / MOST_RATIO), min(max(high, 2), MOST_RATIO))
    place.yaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}" if ratio >= 1 else f"1/{1 / ratio:g}")


def draw_maps(maps: xr.Dataset, model: str, path: Path, *, coasts: bool = True) -> Path:
    """A row for each variable: RMSE at the first and the last lead with one scale, or of the only one, and the bias at
    the last; scales are those of the figures of the other models."""
    own, names = maps.sel(model=model), [str(one).removesuffix("_rmse") for one in maps if str(one).endswith("_rmse")]
    of_all = maps.isel(model=slice(SHOWN_ENTRIES))
    leads = Leads(own.lead_time.values / np.timedelta64(1, "h"))
    ends, shown = sorted({0, own.lead_time.size - 1}), names[:SHOWN_MAPS]
    figure, axes = new_figure(len(shown), len(ends) + 1, f"Errors of {model}", maps=True, width=4.2, coasts=coasts)
    coordinates = own.latitude.values, own.longitude.values
    for row, name in zip(axes, shown, strict=True):
        rmse, bias = own[f"{name}_rmse"], own[f"{name}_bias"]
        colours = _shared(Colours.of_magnitudes, of_all[f"{name}_rmse"].isel(lead_time=ends).values)
        for place, lead in zip(row[:-1], ends, strict=True):
            title, field = f"{name}: RMSE {leads.one(lead)} ahead", rmse.isel(lead_time=lead).values
            image = draw_map(place, *coordinates, field, colours, title, coasts)
        colour_bar(image, list(row[:-1]), with_units("RMSE", rmse.units))
        colours = _shared(Colours.of_changes, of_all[f"{name}_bias"].isel(lead_time=-1).values)
        field = bias.isel(lead_time=-1).values
        image = draw_map(row[-1], *coordinates, field, colours, f"{name}: bias {leads.one(-1)} ahead", coasts)
        colour_bar(image, row[-1], with_units("bias", rmse.units))
    return save_figure(figure, path)


def _shared(scale: Callable[[NDArray[np.floating]], Colours], fields_M: NDArray[np.floating]) -> Colours:
    """One scale of several models (M, ...): that of the largest errors, as far as the smallest still are seen on it."""
    own = [scale(field) for field in fields_M if np.where(np.isfinite(field), field, 0).any()]  # the others have none
    if not own:
        return scale(fields_M)
    high = min(max(one.high for one in own), MOST_APART * min(one.high for one in own))
    return replace(own[0], low=-high if own[0].signed else own[0].low, high=high)


def draw_comparisons(evaluation: Evaluation, path: Path) -> Path:
    """A row for each entry, a column for each of the others: the ratio of errors, and whether it can be told."""
    names, entries = evaluation.names, [one.name for one in evaluation.entries]
    ratios, texts = np.full((len(entries), len(names)), np.nan), {}
    for row, model in enumerate(entries):
        for one in evaluation.compared_with_others(model):
            place = row, names.index(one.other)
            ratios[place] = one.overall
            texts[place] = f"{one.overall:.2f}\n{one.verdict}" if np.isfinite(one.overall) else "not known"
    title = "RMSE of the row over that of the column (all variables and leads)"
    figure, ((axes,),) = new_figure(1, 1, title, width=2.2 + 1.35 * len(names), height=0.8 + 0.6 * len(entries))
    colours = Colours.of_changes(np.log(ratios), np.array([0.1]))
    image = axes.imshow(np.log(ratios), cmap=colours.name, vmin=colours.low, vmax=colours.high, aspect="auto")
    image.set_alpha(0.75)
    for (row, column), text in texts.items():
        axes.text(column, row, text, ha="center", va="center", fontsize=PANEL)
    axes.set_xticks(range(len(names)), [one.replace(" ", "\n") for one in names], fontsize=PANEL)
    axes.set_yticks(range(len(entries)), entries, fontsize=PANEL)
    return save_figure(figure, path)
