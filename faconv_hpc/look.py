"""The look of all figures: maps with coastlines, colours that fit the quantity, lines that are told apart in grey.

Maps are plate carree (degrees east and north, equally spaced), of the globe with longitude 0 in the middle, or of a
region, which may lie across 180 degrees.
Where colours have a sign, so that a print in grey loses it, lines go around what is beyond half the scale: solid where
it is above zero, dashed below.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colorbar import Colorbar
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from .coastlines import coastlines
from .files import make_durably, replacing
from .spatial.grid import within_half_a_turn

DPI = 130
BAR_ASPECT = 20  # of colours, length over width, for each row of panels
TITLE, PANEL, SMALL = 11, 9, 7  # sizes of text, in points
LETTERS_PER_INCH = 11  # of a title, so that it does not leave its figure
SATURATED_PERCENT = 1.0  # cells beyond the ends of a scale, so that a few of them do not fade all others
REGION_DEG = 120.0  # wide at most: its coasts are finer
SIGN_CELLS = 72  # columns of the coarse map whose lines show the sign: smaller patches would be scribble
MAPS_NOTE, NO_COASTS_NOTE = "plate carrée; coastlines GSHHG", "plate carrée; synthetic data, of no place on Earth"

# Okabe and Ito's colours, which all see, in an order in which neighbours differ in lightness too; with dashes of their
# own, and markers, since two of eight colours may still be of one grey.
LINE_COLOURS = ("#0072B2", "#E69F00", "#000000", "#56B4E9", "#D55E00", "#999999", "#009E73", "#CC79A7")
LINE_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (7, 3)))
LINE_MARKERS = "os^Dvxp*"
PALER = 0.45  # of what a colour has that white has not


@dataclass(frozen=True)
class Colours:
    """A scale of colours that is equally steep to the eye, and what its ends stand for.

    Attributes:
        name: of matplotlib's colour map.
        low, high: the ends; beyond them colours saturate.
        signed: whether the middle is zero.
    """

    name: str
    low: float
    high: float
    signed: bool = False

    @classmethod
    def of_changes(cls, *fields: NDArray[np.floating]) -> "Colours":
        """For changes, anomalies, errors: symmetric about zero, from cold to warm (Moreland, 2009)."""
        limit = _percentile(100 - SATURATED_PERCENT, *(np.abs(field) for field in fields))
        return cls("coolwarm", -limit, limit, signed=True)

    @classmethod
    def of_magnitudes(cls, *fields: NDArray[np.floating]) -> "Colours":
        """For what is zero at least: from zero upwards, lighter and lighter."""
        return cls("viridis", 0.0, _percentile(100 - SATURATED_PERCENT, *fields))

    @classmethod
    def of_values(cls, *fields: NDArray[np.floating]) -> "Colours":
        """For fields as they are: over their range, lighter and lighter."""
        low, high = (_percentile(one, *fields) for one in (SATURATED_PERCENT / 2, 100 - SATURATED_PERCENT / 2))
        return cls("viridis", low, high if high > low else low + 1.0)


def _percentile(percent: float, *fields: NDArray[np.floating]) -> float:
    known = np.concatenate([field[np.isfinite(field)].ravel() for field in fields])
    return (float(np.percentile(known, percent)) if known.size else 0.0) or 1.0


def new_figure(
    rows: int,
    columns: int,
    title: str,
    *,
    width: float = 4.0,
    height: float = 2.3,
    maps: bool = False,
    coasts: bool = True,
) -> tuple[Figure, NDArray[Any]]:
    """A figure and its (rows, columns) panels.

    Args:
        width, height: of a panel, in inches.
        maps: whether its panels are maps of one grid, which is then said at its foot.
        coasts: whether these have some.
    """
    figure = Figure(figsize=(columns * width, rows * height + 0.7), layout="constrained", dpi=DPI)
    figure.suptitle("\n".join(wrap(title, round(columns * width * LETTERS_PER_INCH))), fontsize=TITLE)
    if maps:
        figure.supxlabel(MAPS_NOTE if coasts else NO_COASTS_NOTE, fontsize=SMALL, x=0.995, ha="right", color="#555555")
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=maps, sharey=maps)


def save_figure(figure: Figure, path: Path) -> Path:
    """As PNG, whole or not at all; its directory is made."""
    make_durably(path.parent)
    with replacing(path) as beside:
        figure.savefig(beside, format="png")
    return path


def draw_map(
    axes: Axes,
    latitude_deg: NDArray[np.floating],
    longitude_deg: NDArray[np.floating],
    field_YX: NDArray[np.floating],
    colours: Colours,
    title: str = "",
    coasts: bool = True,
) -> QuadMesh:
    """Draws a field on a regular grid into a panel, with coastlines or without; what is NaN is hatched.

    Args:
        latitude_deg, longitude_deg: of its rows and columns, which may run either way and begin anywhere.
    """
    longitude, order = _centred(np.asarray(longitude_deg, dtype=np.float64))
    latitude, field = np.asarray(latitude_deg, dtype=np.float64), np.asarray(field_YX)[:, order]
    axes.patch.set(facecolor="white", edgecolor="#aaaaaa", hatch="////")
    image = axes.pcolormesh(
        longitude, latitude, field, cmap=colours.name, vmin=colours.low, vmax=colours.high, shading="nearest",
        rasterized=True,
    )  # fmt: skip
    if colours.signed:
        _draw_sign(axes, latitude, longitude, field, colours.high / 2)
    _scale_degrees(axes, latitude, longitude)
    if coasts:
        _draw_coasts(axes, longitude, over=not colours.signed)
    axes.set_title(title, fontsize=PANEL)
    return image


def _draw_coasts(axes: Axes, longitude: NDArray[np.float64], *, over: bool) -> None:
    """Those of the Earth.

    Args:
        over: whether colours are dark somewhere, where lines are seen by a light seam alone.
    """
    resolution = "c" if np.ptp(longitude) > REGION_DEG else "l"
    coast = LineCollection(_coasts(resolution, *axes.get_xlim()), colors="black", linewidths=0.5)
    if over:
        coast.set_path_effects([withStroke(linewidth=1.1, foreground="white", alpha=0.7)])
    axes.add_collection(coast, autolim=False)


def colour_bar(image: ScalarMappable, axes: Axes | list[Axes], label: str) -> Colorbar:
    """Beside one panel, or several that share its colours; ``label`` says the quantity and its units."""
    panels = [axes] if isinstance(axes, Axes) else axes
    rows = {one.get_subplotspec().rowspan.start for one in panels}  # type: ignore[union-attr]
    bar = (
        panels[0]
        .get_figure(root=True)
        .colorbar(  # type: ignore[union-attr]
            image, ax=panels, pad=0.01, extend=_extended(image, panels), aspect=BAR_ASPECT * len(rows)
        )
    )
    bar.set_label(label, fontsize=PANEL)
    bar.ax.tick_params(labelsize=SMALL)
    return bar


def fill_colour(number: int) -> str:
    """Of an area or a class, which has no dashes: of those beyond the eighth the same colours, paler."""
    colour = LINE_COLOURS[number % len(LINE_COLOURS)]
    red, green, blue = (1 - PALER * (1 - part) for part in to_rgb(colour))
    return colour if number < len(LINE_COLOURS) else to_hex((red, green, blue))


def line_style(number: int, *, markers: bool = True) -> dict[str, Any]:
    """Of one of several lines, for `Axes.plot`: another colour, dash and marker for each of eight; those beyond have
    the same colours with other dashes, and other markers, which are hollow."""
    beyond, place = divmod(number, len(LINE_COLOURS))
    dash, marker = ((place + step * beyond) % len(LINE_COLOURS) for step in (1, 3))
    style = {"color": LINE_COLOURS[place], "linestyle": LINE_DASHES[dash], "linewidth": 1.6}
    if markers:
        style |= {"marker": LINE_MARKERS[marker], "markersize": 4.5}
        style |= {"markerfacecolor": "white"} if beyond else {}
    return style


def legend_below(figure: Figure, panel: Axes) -> None:
    """Of all panels, whose lines are those of one of them."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), fontsize=PANEL, frameon=False)


def dress(axes: Axes, title: str = "", x: str = "", y: str = "") -> Axes:
    """Gives a panel of lines its title, labels and faint grid."""
    axes.set_title(title, fontsize=PANEL)
    axes.set_xlabel(x, fontsize=PANEL)
    axes.set_ylabel(y, fontsize=PANEL)
    axes.tick_params(which="both", labelsize=SMALL)
    axes.grid(alpha=0.3)
    return axes


def _extended(image: ScalarMappable, panels: list[Axes]) -> str:
    """At which ends of the scale there is more, in any of the panels."""
    drawn = [image, *(one for panel in panels for one in panel.collections if isinstance(one, QuadMesh))]
    values = np.concatenate([np.ma.compressed(np.ma.masked_invalid(np.ma.asarray(one.get_array()))) for one in drawn])
    low, high = image.get_clim()
    ends = values.min(initial=low) < low, values.max(initial=high) > high
    return {(True, True): "both", (True, False): "min", (False, True): "max"}.get(ends, "neither")


def _draw_sign(
    axes: Axes,
    latitude: NDArray[np.float64],
    longitude: NDArray[np.float64],
    field: NDArray[np.floating],
    level: float,
) -> None:
    block = max(1, round(field.shape[1] / SIGN_CELLS))
    rows, columns = (size // block for size in field.shape)
    if min(rows, columns) < 2 or not np.isfinite(field).any():
        return
    y, x = (
        axis[: count * block].reshape(count, block).mean(1) for axis, count in ((latitude, rows), (longitude, columns))
    )
    cells = field[: rows * block, : columns * block].reshape(rows, block, columns, block)
    coarse = np.ma.masked_invalid(cells.mean((1, 3)))
    for sign, dashes in ((1, "solid"), (-1, "dashed")):
        if coarse.min() < sign * level < coarse.max():
            axes.contour(x, y, coarse, levels=[sign * level], colors="#303030", linestyles=dashes, linewidths=0.7)


def _scale_degrees(axes: Axes, latitude: NDArray[np.float64], longitude: NDArray[np.float64]) -> None:
    """All of the cells are seen, to half a cell beyond the centres of the outermost, and of the globe no more."""
    around = 180.0 if np.isclose(np.ptp(longitude), 360) else np.inf
    for limit, values, most in ((axes.set_xlim, longitude, around), (axes.set_ylim, np.sort(latitude), 90.0)):
        first, last = (abs(values[1] - values[0]), abs(values[-1] - values[-2])) if values.size > 1 else (1.0, 1.0)
        limit(max(values[0] - first / 2, -most), min(values[-1] + last / 2, most))
    for axis, values, wide, step in ((axes.xaxis, longitude, 180, 60), (axes.yaxis, latitude, 90, 30)):
        if np.ptp(values) > wide:
            first, last = axis.get_view_interval()
            axis.set_ticks(step * np.arange(np.floor(first / step) + 1, np.ceil(last / step)))
    axes.xaxis.set_major_formatter(_meridian)
    axes.yaxis.set_major_formatter(partial(_degrees, "N", "S"))
    axes.tick_params(labelsize=SMALL)


def _meridian(value: float, _: float) -> str:
    named = (value + 180) % 360 - 180
    return "180°" if named == -180 else _degrees("E", "W", named)


def _degrees(above: str, below: str, value: float, position: int | None = None) -> str:
    return f"{abs(value):g}°{above if value > 0 else below if value < 0 else ''}"


def _coasts(resolution: str, west: float, east: float) -> list[NDArray[np.float64]]:
    """Of a map between two longitudes, which may reach beyond 180 degrees."""
    turns = [turn for turn in (-360.0, 0.0, 360.0) if west < turn + 180 and east > turn - 180]
    return [line + np.array([turn, 0.0]) for turn in turns for line in coastlines(resolution)]


def _centred(longitude_deg: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Longitudes in increasing order, and the columns that they are. Those that go around the globe begin at -180, and
    the first comes again at the end: its cells reach across 180 degrees. Those of a region begin after the widest gap.
    """
    wrapped = within_half_a_turn(longitude_deg)
    order = np.argsort(wrapped)
    longitude = wrapped[order]
    gaps = np.diff(longitude, append=longitude[0] + 360)
    if longitude.size > 2 and gaps.max() < 1.5 * np.median(gaps):
        return np.append(longitude, longitude[0] + 360), np.append(order, order[0])
    begin = -int(np.argmax(gaps[::-1])) % longitude.size  # of equal gaps the last, which is at 180 degrees
    longitude, order = np.append(longitude[begin:], longitude[:begin] + 360), np.roll(order, -begin)
    return longitude - 360 * np.ceil((longitude[0] + longitude[-1] - 360) / 720), order
