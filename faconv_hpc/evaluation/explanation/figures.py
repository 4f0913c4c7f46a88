"""Figures of what a network looks at."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from ...look import Colours, colour_bar, draw_map, dress, line_style, new_figure, save_figure
from ..seasons import SEASONS
from ..words import latitude_in_words
from .explain import Explanation

SHOWN_STEPS, SHOWN_VARIABLES = 4, 3
QUERIES_DEG = (60.0, 30.0, 0.0, -30.0, -60.0)


def draw_all(found: Explanation, directory: Path) -> list[Path]:
    """Those that there is something for, in the order of the report."""
    paths = []
    if found.looks is not None:
        if found.looks.dates_S.any() and np.isfinite(found.looks.row_map_LSYX).any():
            paths += [
                draw_maps(found, directory / "attention.png"),
                draw_lines(found, directory / "attention_lines.png"),
            ]
        paths.append(draw_dilations(found, directory / "dilations.png"))
    if found.sensitivity is not None:
        paths.append(draw_sensitivity(found, directory / "sensitivity.png"))
    return paths


def _layer(found: Explanation) -> int:
    """The one whose attention adds most."""
    assert found.looks is not None, "there is attention"
    return int(np.nanargmax(found.looks.added_L))


def draw_maps(found: Explanation, path: Path) -> Path:
    """Where attention looks, by season, in the layer where it adds most."""
    looks, contract, layer = found.looks, found.forecaster.contract, _layer(found)
    assert looks is not None, "there is attention"
    seasons = [place for place, dates in enumerate(looks.dates_S) if dates]
    title = f"What cells look at, layer {layer + 1} of {len(looks.added_L)}: log2 of the weight over an even one"
    figure, rows = new_figure(len(seasons), 2, title, width=5.0, height=2.4, maps=True, coasts=found.on_earth)
    maps = (looks.row_map_LSYX[layer], looks.column_map_LSYX[layer])
    for column, (map_SYX, along) in enumerate(zip(maps, ("its latitude circle", "its meridian"), strict=True)):
        fields = np.log2(map_SYX)
        colours = Colours.of_changes(*fields[seasons])
        for row, season in zip(rows, seasons, strict=True):
            told = f"{list(SEASONS)[season]} (dates: {looks.dates_S[season]}): taken by {along}"
            image = draw_map(
                row[column], _latitude(found), _longitude(found), fields[season], colours, told, found.on_earth
            )
        colour_bar(image, [row[column] for row in rows], "log2 of preference: 1 is twice an even weight")
    assert contract.grid.nlat == maps[0].shape[1], "maps are of the grid"
    return save_figure(figure, path)


def draw_lines(found: Explanation, path: Path) -> Path:
    """Which latitudes some latitudes look at, and how far to the east and west."""
    looks, layer = found.looks, _layer(found)
    assert looks is not None, "there is attention"
    latitude, weights_S = _latitude(found), looks.dates_S / looks.dates_S.sum()
    between = np.einsum("s,sqk->qk", weights_S, np.nan_to_num(looks.latitudes_LSYY[layer]))
    along = np.einsum("s,syx->yx", weights_S, np.nan_to_num(looks.row_offset_LSYX[layer]))
    figure, ((columns, rows),) = new_figure(
        1, 2, f"How far cells look, layer {layer + 1}, all dates", width=5.2, height=3.6
    )
    nlon = along.shape[1]
    offsets = (np.arange(nlon) + nlon // 2) % nlon - nlon // 2
    order = np.argsort(offsets)
    step_deg = 360 / nlon
    for number, query in enumerate(_queries(latitude)):
        label = latitude_in_words(latitude[query])
        columns.plot(latitude, between[query], label=label, **line_style(number, markers=False))
        rows.plot(offsets[order] * step_deg, along[query][order], label=label, **line_style(number, markers=False))
    for axes in (columns, rows):
        axes.axhline(1.0, color="#555555", linewidth=0.8)
        axes.legend(title="cells at", fontsize=7, title_fontsize=7)
    dress(columns, "Along meridians", "latitude looked at [°N]", "weight over an even one")
    dress(rows, "Along latitude circles", "columns looked at [° east]", "weight over an even one")
    return save_figure(figure, path)


def _queries(latitude: NDArray[np.float64]) -> list[int]:
    return sorted({int(np.abs(latitude - query).argmin()) for query in QUERIES_DEG})


def draw_dilations(found: Explanation, path: Path) -> Path:
    """The share of each dilation in each channel, the channels sorted by how far they reach."""
    looks = found.looks
    assert looks is not None, "there are dilations"
    figure, (panels,) = new_figure(
        1, len(looks.dilations_LDC), "Which dilation each channel uses", width=4.6, height=3.2
    )
    for layer, (axes, share_DC) in enumerate(zip(panels, looks.dilations_LDC, strict=True)):
        _stack(axes, share_DC, found.dilations)
        dress(axes, f"Layer {layer + 1}", "channels of the bottleneck, sorted", "share of weight").grid(visible=False)
    panels[0].legend(title="dilation", fontsize=7, title_fontsize=7, loc="lower left")
    return save_figure(figure, path)


def _stack(axes: Axes, share_DC: NDArray[np.float64], dilations: tuple[int, ...]) -> None:
    order = np.argsort(np.array(dilations) @ share_DC)
    below = np.zeros(share_DC.shape[1])
    for number, (dilation, share_C) in enumerate(zip(dilations, share_DC[:, order], strict=True)):
        colour, hatch = str(line_style(number)["color"]), ("", "//", "..", "xx", "--")[number % 5]
        axes.bar(
            np.arange(below.size), share_C, bottom=below, width=1.0, color=colour, hatch=hatch, edgecolor="white",
            linewidth=0.0, label=str(dilation),
        )  # fmt: skip
        below += share_C
    axes.set_ylim(0, 1)
    axes.set_xlim(-0.5, below.size - 0.5)


def draw_sensitivity(found: Explanation, path: Path) -> Path:
    """Mean gradients by the fields of the last steps of the window."""
    answer, contract = found.sensitivity, found.forecaster.contract
    assert answer is not None, "something was asked"
    steps = range(answer.mean_TCYX.shape[0])[-SHOWN_STEPS:]
    shown = range(len(answer.variables))[:SHOWN_VARIABLES]
    question, target = answer.question, answer.question.variable
    title = (
        f"What {target.name} at {question.region} hangs on, {question.lead} steps ahead (mean of {len(answer.answers)})"
    )
    figure, rows = new_figure(len(steps), len(shown), title, width=4.6, height=2.4, maps=True, coasts=found.on_earth)
    for channel in shown:
        name = answer.variables[channel].name
        for row, step in zip(rows, steps, strict=True):
            field_YX = answer.mean_TCYX[step, channel]
            told = f"{name}, {steps[-1] - step} steps before the start"
            colours = Colours.of_changes(field_YX)
            image = draw_map(row[channel], _latitude(found), _longitude(found), field_YX, colours, told, found.on_earth)
            colour_bar(image, row[channel], f"{target.units or target.name} per deviation")
            _box(row[channel], question.region.south_deg, question.region.north_deg, question.region.west_deg,
                 question.region.east_deg)  # fmt: skip
    assert contract.grid.nlat == answer.mean_TCYX.shape[2], "maps are of the grid"
    return save_figure(figure, path)


def _box(axes: Axes, south: float, north: float, west: float, east: float) -> None:
    wide = 360.0 if east - west >= 360 else (east - west) % 360
    for first in (west % 360 + turn for turn in (-720, -360, 0, 360)):  # of which the map shows what lies in it
        last = first + wide
        axes.plot([first, last, last, first, first], [south, south, north, north, south], color="black", linewidth=1.0)


def _latitude(found: Explanation) -> NDArray[np.float64]:
    return np.array(found.forecaster.contract.latitude_deg)


def _longitude(found: Explanation) -> NDArray[np.float64]:
    return np.array(found.forecaster.contract.longitude_deg)
