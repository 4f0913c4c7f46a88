"""Figures of regimes: how many there are, where they lie, when they come, what they look like."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from ...data.times import MONTHS, SECONDS_PER_DAY, TimeAxis
from ...data.variables import Variable
from ...look import (
    LINE_COLOURS,
    PANEL,
    SMALL,
    Colours,
    colour_bar,
    draw_map,
    dress,
    fill_colour,
    line_style,
    new_figure,
    save_figure,
)
from ..seasons import SEASONS
from ..words import MONTH_NAMES, with_units
from .find import Regimes, Source
from .partitions import HALVES_AGREE, METHODS, SCORES, SEEDS_AGREE
from .records import Record

FILLED, DARK = "os^DvP*X", (0, 2)  # markers of points; which of the colours of lines are dark
SHOWN = 4  # variables of composites at most
PANEL_INCHES, PAGE = 3.2, 1.5  # of a map of composites; width over height of their figure
DAYS_A_YEAR, MOST_BINS = 365.25, 366
NUMBERED = 400  # cells of the calendar in which the regime's number still can be read


def draw_all(regimes: Regimes, directory: Path) -> list[Path]:
    """All figures, in the order of the report."""
    paths = [
        draw_numbers(regimes, directory / "numbers.png"),
        draw_plane(regimes, directory / "plane.png"),
        draw_calendar(regimes, directory / "calendar.png"),
    ]
    if regimes.composites is not None:
        paths.append(draw_composites(regimes, directory / "composites.png", beyond_season=False))
        if regimes.has_seasons and not regimes.composites.are_seasons_alone:
            paths.append(draw_composites(regimes, directory / "composites_beyond_season.png", beyond_season=True))
    return paths


def draw_numbers(regimes: Regimes, path: Path) -> Path:
    """Silhouettes and agreements over the number of clusters."""
    with_data = regimes.data is not None
    title = "How many regimes? Dotted: the number that is shown"
    figure, places = new_figure(2, 2, title, width=4.2, height=2.9)
    own, in_fields, *rest = places.flat
    panels = {"own": own} | ({"data": in_fields} if with_data else {})
    if not with_data:
        in_fields.set_axis_off()
    number = 0
    for source in regimes.sources:
        for method in source.methods:
            judged, style = regimes.of(source.key, method), line_style(number)
            clusters = [one.partition.clusters for one in judged]
            label, number = f"{source.name}, {METHODS[method]}", number + 1
            if (source.key, method) == ("embedding", regimes.method):
                own.plot(clusters, [regimes.standings[count].score for count in clusters], label=label, **style)
            if "data" in panels:
                in_data = [one.data.silhouette for one in judged if one.data is not None]
                panels["data"].plot(clusters, in_data, label=label, **style)
            for axes, values in (
                (rest[0], [one.partition.seeds_agreement for one in judged]),
                (rest[1], [one.partition.halves_agreement for one in judged]),
            ):
                axes.plot(clusters, values, label=label, **style)
    chance, name = [one.chance for one in regimes.standings.values()], f"{METHODS[regimes.method]} of noise (95 %)"
    noise = own.plot(list(regimes.standings), chance, label=name, **line_style(5))[0]
    what = SCORES[regimes.method]
    dress(own, f"{what.capitalize()}, embedding space", "number of clusters", what)
    if "data" in panels:
        dress(panels["data"], "Silhouette in data space (comparable)", "number of clusters", "silhouette")
    dress(rest[0], "Do seeds find the same?", "number of clusters", "adjusted Rand index (1: the same)")
    dress(rest[1], "Do halves of the record?", "number of clusters", "adjusted Rand index (1: the same)")
    for axes, limit in ((rest[0], SEEDS_AGREE), (rest[1], HALVES_AGREE)):
        axes.axhline(limit, color="#555555", linewidth=0.8)
        axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.05)
    for axes in (*panels.values(), *rest):
        axes.axvline(regimes.suggestion.clusters, color="#555555", linewidth=0.8, linestyle=":")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = rest[1].get_legend_handles_labels()
    figure.legend([*handles, noise], [*labels, name], loc="outside lower center", ncols=3, fontsize=PANEL)
    return save_figure(figure, path)


def draw_plane(regimes: Regimes, path: Path) -> Path:
    """Two principal components of the embedding, and of the fields where they are there, by season, by regime, and by
    when: what made the fields may have changed within the record."""
    sources = [source for source in regimes.sources if source.key in ("embedding", "eof")]
    title = _title(regimes, "Two dimensions of all times, by season, by regime and by date")
    figure, rows = new_figure(len(sources), 3, title, width=4.6, height=3.6)
    when_T, unit = _when(regimes.embeddings.axis)
    for row, source in zip(rows, sources, strict=True):
        points_TE, every = source.points_TE, regimes.every // source.every
        pca = PCA(2, random_state=0) if min(points_TE.shape) >= 2 else None
        xy = pca.fit_transform(points_TE) if pca is not None else np.repeat(points_TE, 2, axis=1)
        shares = pca.explained_variance_ratio_ if pca is not None else (1.0, 1.0)
        months, labels = regimes.embeddings.months[::every], regimes.labels_T[::every]
        groups = {name: np.isin(months, own) for name, own in SEASONS.items() if np.isin(months, own).any()}
        _scatter(row[0], xy, groups, "season")
        _scatter(row[1], xy, {str(label + 1): labels == label for label in np.unique(labels)}, "regime")
        image = row[2].scatter(xy[:, 0], xy[:, 1], s=_size(xy), c=when_T[::every], cmap="viridis", alpha=0.8)
        colour_bar(image, row[2], unit)
        for axes, what in zip(row, ("season", "regime", unit), strict=True):
            first, second = (f"component {place + 1} ({share:.0%} of variance)" for place, share in enumerate(shares))
            dress(axes, f"{_points_of(source)}, by {what}{' of the network' * (what == 'regime')}", first, second)
            axes.set_aspect("equal", adjustable="datalim")  # distances are what clusters are made by
    return save_figure(figure, path)


def _points_of(source: Source) -> str:
    return "Embedding" if source.key == "embedding" else "EOFs of the fields"


def _when(axis: TimeAxis) -> tuple[NDArray[np.float64], str]:
    """(T,) where in the record times lie, and what that is counted in."""
    if axis.names:
        return axis.numbers.astype(np.float64), "sequence"
    if not _is_of_years(axis):
        return (axis.seconds - axis.seconds[0]) / SECONDS_PER_DAY, f"days since {axis.date(0)}"
    return axis.years + axis.year_fraction, "year"


def _is_of_years(axis: TimeAxis) -> bool:
    """Whether there is a year at least from the first time to the last."""
    return bool(np.ptp(axis.seconds) >= DAYS_A_YEAR * SECONDS_PER_DAY)


def _size(xy: NDArray[np.float64]) -> float:
    """Of a point."""
    return float(np.clip(4000 / len(xy), 4, 24))


def _scatter(axes: Axes, xy: NDArray[np.float64], groups: dict[str, NDArray[np.bool_]], what: str) -> None:
    for number, (name, own) in enumerate(groups.items()):
        place = number % len(LINE_COLOURS)
        colour = LINE_COLOURS[place]
        axes.scatter(
            xy[own, 0], xy[own, 1], s=_size(xy), marker=FILLED[place], label=name, alpha=0.8, linewidths=0.6,
            edgecolors=colour, facecolors=colour if number < len(LINE_COLOURS) else "none",
        )  # fmt: skip
    axes.legend(  # beside the points, not on them
        title=what, fontsize=SMALL, title_fontsize=SMALL, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False
    )


def draw_calendar(regimes: Regimes, path: Path) -> Path:
    """Which regime is there at all times; and of a record of a year or more, how often each comes in each month."""
    title, axis = _title(regimes, "When regimes come"), regimes.embeddings.axis
    if _is_of_years(axis):
        figure, ((often, line),) = new_figure(1, 2, title, width=6.4, height=4.2)
        _draw_months(regimes, often)
    else:
        figure, ((line,),) = new_figure(1, 1, title, width=9.6, height=4.2 if axis.names else 1.6)
    _draw_time_line(regimes, line)
    return save_figure(figure, path)


def _draw_months(regimes: Regimes, often: Axes) -> None:
    clusters, share = int(regimes.labels_T.max()) + 1, regimes.month_share_KM
    image = often.pcolormesh(np.ma.masked_invalid(share), cmap="Blues", vmin=0, vmax=1, edgecolors="white")
    for (label, month), value in np.ndenumerate(share):
        if np.isfinite(value) and value > 0:
            colour = "white" if value > 0.5 else "black"
            often.text(month + 0.5, label + 0.5, f"{value:.0%}", ha="center", va="center", fontsize=SMALL, color=colour)
    often.set_xticks(np.arange(MONTHS) + 0.5, MONTH_NAMES)
    often.set_yticks(np.arange(clusters) + 0.5, [str(label + 1) for label in range(clusters)])
    often.invert_yaxis()
    dress(often, "Share of each month's times", "", "regime").grid(visible=False)
    colour_bar(image, often, "share of the month's times")


def _draw_time_line(regimes: Regimes, axes: Axes) -> None:
    """A row for each year or for each sequence; one of all where they are less than a year."""
    axis, clusters = regimes.embeddings.axis, int(regimes.labels_T.max()) + 1
    x_label, y_label = "", "year"
    if axis.names:
        (x, y, cells), x_label, y_label = _sequences(regimes), "days since the first time", "sequence"
    elif _is_of_years(axis):
        x, y, cells = _years(regimes)
        axes.set_xticks(np.arange(MONTHS) + 0.5, MONTH_NAMES)
    else:
        (x, y, cells), x_label, y_label = _days(regimes), f"days since {axis.date(0)}", ""
    colours = ListedColormap([fill_colour(label) for label in range(clusters)])
    norm = BoundaryNorm(np.arange(clusters + 1) - 0.5, clusters)
    axes.set_facecolor("#eeeeee")
    image = axes.pcolormesh(x, y, np.ma.masked_invalid(cells), cmap=colours, norm=norm)
    if cells.size <= NUMBERED:
        _number(axes, (x[:-1] + x[1:]) / 2, (y[:-1] + y[1:]) / 2, cells)
    axes.invert_yaxis()
    axes.yaxis.set_major_locator(MaxNLocator(integer=True) if y_label else NullLocator())
    dress(axes, "Regime of each time", x_label, y_label)
    axes.grid(visible=False)
    bar = colour_bar(image, axes, "regime")
    bar.set_ticks(range(clusters), labels=[str(label + 1) for label in range(clusters)])


Cells = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
"""Edges along x, along y, and what is between them: the regime, NaN where there is none."""


def _days(regimes: Regimes) -> Cells:
    axis = regimes.embeddings.axis
    starts = (axis.seconds - axis.seconds[0]) / SECONDS_PER_DAY
    cells = np.array(regimes.labels_T[None], dtype=np.float64)
    return np.append(starts, starts[-1] + axis.step_s / SECONDS_PER_DAY), np.array([0.0, 1.0]), cells


def _sequences(regimes: Regimes) -> Cells:
    """As if the times of each were evenly spaced."""
    axis = regimes.embeddings.axis
    longest = max(len(own) for own in axis.sequences)
    cells = np.full((len(axis.sequences), longest), np.nan)
    for row, own in enumerate(axis.sequences):
        cells[row, : len(own)] = regimes.labels_T[own.start : own.stop]
    x = np.arange(longest + 1, dtype=np.float64) * axis.step_s / SECONDS_PER_DAY
    return x, np.arange(len(cells) + 1, dtype=np.float64) - 0.5, cells


def _years(regimes: Regimes) -> Cells:
    """A cell for each time, or for several of a day, of which the first is shown."""
    axis = regimes.embeddings.axis
    bins = int(np.clip(round(DAYS_A_YEAR * SECONDS_PER_DAY / max(axis.step_s, 1.0)), 1, MOST_BINS))
    years = np.arange(axis.years.min(), axis.years.max() + 1)
    cells = np.full((years.size, bins), np.nan)
    place = np.minimum((axis.year_fraction * bins).astype(int), bins - 1)
    cells[(axis.years - years[0])[::-1], place[::-1]] = regimes.labels_T[::-1]
    return np.linspace(0, MONTHS, bins + 1), np.append(years, years[-1] + 1) - 0.5, cells


def _number(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], cells: NDArray[np.float64]) -> None:
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            colour = "white" if int(value) in DARK else "black"
            text = {"ha": "center", "va": "center", "fontsize": SMALL, "color": colour}
            axes.text(float(x[column]), float(y[row]), str(int(value) + 1), **text)  # type: ignore[arg-type]


def draw_composites(regimes: Regimes, path: Path, *, beyond_season: bool) -> Path:
    """Mean fields of each regime less those of all times, or of its times' calendar months."""
    found, record = regimes.composites, regimes.record
    assert found is not None and record is not None, "regimes without fields have no composites"
    fields_KCYX = found.beyond_season_KCYX if beyond_season else found.anomaly_KCYX
    variables, clusters = shown_variables(record), len(fields_KCYX)
    across = _across(clusters, len(variables))
    what = "less those of its calendar months" if beyond_season else "less those of all times"
    some = f"; {len(variables)} of {len(record.variables)} variables" * (len(variables) < len(record.variables))
    title = _title(regimes, f"Mean fields of each regime {what}{some}")
    size = {"width": PANEL_INCHES, "height": PANEL_INCHES / 2 + 0.25}
    figure, rows = new_figure(
        -(-clusters // across), across * len(variables), title, **size, maps=True, coasts=record.on_earth
    )
    for channel, variable in enumerate(variables):
        own = rows[:, channel * across : (channel + 1) * across].ravel().tolist()
        colours = Colours.of_changes(*fields_KCYX[:, channel])
        for label, axes in enumerate(own[:clusters]):
            times = int((regimes.labels_T == label).sum())
            told = f"regime {label + 1} ({times} times): {variable.name}"
            field_YX, degrees = fields_KCYX[label, channel], (found.latitude_deg, found.longitude_deg)
            image = draw_map(axes, *degrees, field_YX, colours, told, record.on_earth)
            axes.tick_params(labelbottom=label + across >= clusters)
        for axes in own[clusters:]:
            axes.set_axis_off()
        departure = with_units(f"departure of {variable.name}", variable.units)
        colour_bar(image, own, departure)
    return save_figure(figure, path)


def shown_variables(record: Record) -> Sequence[Variable]:
    """Those whose composites are drawn: the first `SHOWN`."""
    return record.variables[:SHOWN]


def _across(clusters: int, variables: int) -> int:
    """How many regimes stand beside each other, so that the figure is as wide over its height as a page that lies: a
    long column would be shown small, and its text with it."""

    def off(across: int) -> float:
        wide, high = across * variables * PANEL_INCHES, -(-clusters // across) * PANEL_INCHES / 2
        return abs(float(np.log(wide / high / PAGE)))

    return min(range(1, clusters + 1), key=off)


def _title(regimes: Regimes, what: str) -> str:
    partition = regimes.one("embedding").partition
    return f"{what} ({METHODS[regimes.method]}, K = {partition.clusters}, {len(regimes.embeddings.axis)} times)"
