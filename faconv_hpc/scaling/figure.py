"""The figure of a study: what was measured over the number of ranks, beside the ideal."""

from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FormatStrFormatter, PercentFormatter

from ..look import LINE_COLOURS, SMALL, dress, new_figure, save_figure
from .report import PointResult, StudyReport

MEASURED, IDEAL = LINE_COLOURS[0], "#888888"


def draw_scaling(report: StudyReport, path: Path) -> Path:
    """Speed-up of a strong study, efficiency of a weak one, over ranks; bars are the quartiles of the repeats."""
    done = sorted((one for one in report.points if one.seconds_per_step is not None), key=lambda one: one.ranks)
    strong = report.scaling == "strong"
    figure, ((axes,),) = new_figure(1, 1, f"{report.study}: {report.scaling} scaling", width=7, height=3.9)
    _draw_ideal(axes, done, strong)
    _draw_measured(axes, done, strong)
    _label_ranks(axes, done)
    base = next(one for one in done if one.point == report.base)
    of = f"{base.ranks} rank{'s' * (base.ranks > 1)} ({base.point})"
    dress(axes, x="ranks", y=f"speed-up over {of}" if strong else f"efficiency, {of} = 100 %")
    axes.legend(loc="upper left" if strong else "lower left", frameon=False)
    return save_figure(figure, path)


def _value(point: PointResult, strong: bool) -> tuple[float, float, float]:
    """Speed-up or efficiency, and how far its quartiles lie below and above; faster is higher."""
    assert point.seconds_per_step is not None, "the point was measured"
    seconds, value = point.seconds_per_step, point.speed_up if strong else point.efficiency
    assert value is not None, "a point that was measured has a speed-up"
    low, high = value * seconds.median / seconds.quartile_3, value * seconds.median / seconds.quartile_1
    return value, value - low, high - value


def _draw_ideal(axes: Axes, done: list[PointResult], strong: bool) -> None:
    ranks = sorted({one.ranks for one in done})
    ideal = [count / ranks[0] if strong else 1.0 for count in ranks]
    axes.plot(ranks, ideal, "--", color=IDEAL, label="ideal", zorder=1)
    axes.set_xscale("log", base=2)
    if strong:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    else:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _draw_measured(axes: Axes, done: list[PointResult], strong: bool) -> None:
    """All points; a line through the best of each number of ranks."""
    groups = [list(group) for _, group in groupby(done, key=lambda one: one.ranks)]
    best = [max(group, key=lambda one: _value(one, strong)[0]) for group in groups]
    axes.plot([one.ranks for one in best], [_value(one, strong)[0] for one in best], color=MEASURED, zorder=2)
    values = [_value(one, strong) for one in done]
    axes.errorbar(
        [one.ranks for one in done],
        [value for value, _, _ in values],
        yerr=[[below for _, below, _ in values], [above for _, _, above in values]],
        fmt="o",
        color=MEASURED,
        capsize=4,
        label="measured: median, quartiles",
        zorder=3,
    )
    aside = (7, -11) if strong else (7, 5)  # of the line: it rises, or falls
    for one, (value, _, _) in zip(done, values, strict=True):
        axes.annotate(one.point, (one.ranks, value), aside, textcoords="offset points", fontsize=SMALL + 1)
    if not strong:
        axes.set_ylim(0, max(1.1, *(1.05 * (value + above) for value, _, above in values)))


def _label_ranks(axes: Axes, done: list[PointResult]) -> None:
    """A tick per number of ranks, with the nodes they ran on."""
    ticks = sorted({one.ranks for one in done})
    labels = []
    for ranks in ticks:
        nodes = sorted({one.nodes for one in done if one.ranks == ranks})
        labels.append(f"{ranks}\n{' or '.join(map(str, nodes))} node{'s' * (nodes != [1])}")
    axes.set_xticks(ticks, labels)
    axes.minorticks_off()
    axes.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
