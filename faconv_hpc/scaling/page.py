"""What a study leaves for people: the table, the page around it, and the figure."""

from pathlib import Path

from ..files import replacing_together, write_durably
from .figure import draw_scaling
from .points import FAILED
from .report import PointResult, StudyReport

REPORT_JSON, REPORT_MD, FIGURE = "report.json", "report.md", "scaling.png"
COLUMNS = (
    "point", "mesh", "ranks", "nodes", "s per step", "quartiles", "min to max", "samples/s", "speed-up", "efficiency",
    "communication", "data", "GiB per rank",
)  # fmt: skip
TEXT_COLUMNS = 2  # the first ones; the others are numbers


def rows_of(report: StudyReport) -> list[list[str]]:
    """The table's cells, one row per point, in the order of ``COLUMNS``."""
    return [_cells(point) for point in report.points]


def _cells(point: PointResult) -> list[str]:
    cells = [point.point, point.mesh, str(point.ranks), str(point.nodes)]
    seconds = point.seconds_per_step
    if seconds is None:
        return [*cells, point.status, *[""] * (len(COLUMNS) - len(cells) - 1)]
    return [
        *cells,
        f"{seconds.median:.4g}",
        f"{seconds.quartile_1:.4g} to {seconds.quartile_3:.4g}",
        f"{seconds.least:.4g} to {seconds.most:.4g}",
        f"{point.samples_per_s:.4g}",
        f"{point.speed_up:.2f}",
        f"{point.efficiency:.0%}",
        f"{point.communication_share:.1%}",
        f"{point.data_share:.1%}",
        f"{point.peak_memory_gib:.2f}",
    ]


def write_report(report: StudyReport, study_dir: Path) -> None:
    """report.json, report.md, and the figure if any point is done."""
    with replacing_together(study_dir, (REPORT_JSON, FIGURE, REPORT_MD)) as beside:
        write_durably(beside / REPORT_JSON, report.to_json() + "\n")
        drawn = draw_scaling(report, beside / FIGURE) if report.base is not None else None
        write_durably(beside / REPORT_MD, markdown(report, drawn.name if drawn else None))


def markdown(report: StudyReport, figure: str | None) -> str:
    """The report as a page."""
    rule = ["---" if place < TEXT_COLUMNS else "---:" for place in range(len(COLUMNS))]
    table = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, rule, *rows_of(report))]
    failed = [f"- {one.point} failed: {one.why} (log: {one.log})" for one in report.points if one.status == FAILED]
    parts = [
        f"# Study {report.study}: {report.scaling} scaling",
        "\n".join(table),
        report.caption,
        f"Measured on: {report.machine}.",
        *report.notes,
        "\n".join(failed),
        f"![{report.scaling} scaling]({figure})" if figure else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
