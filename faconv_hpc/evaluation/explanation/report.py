"""What a network looks at, in words: report.md of an explanation."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ...files import write_durably
from ..seasons import SEASONS
from ..words import latitude_in_words, longitude_in_words, plain, table
from .attention_maps import Looks
from .explain import Explanation
from .sensitivity import Sensitivity

NETCDF, REPORT = "explain.nc", "report.md"
EVEN = 1.2  # times an even weight, below which attention has hardly a preference
CAPTIONS = {
    "attention.png": "Where attention looks, in the layer where it adds most: of each cell how much the others of its "
    "latitude circle, and of its meridian, take from it, as a power of two beside an even weight",
    "attention_lines.png": "How far cells look along meridians and along latitude circles",
    "dilations.png": "The share of each dilation in each channel: its kernel's length, times its factor from "
    "squeeze and excitation if there is one",
    "sensitivity.png": "By how much the region's forecast changes where a given field is one standard deviation higher "
    "in a cell of mean area; the box is the region, and every map has a scale of its own",
}


def write_report(found: Explanation, figures: Sequence[Path], path: Path) -> None:
    """The file appears whole; figures lie beside it."""
    write_durably(path, "\n\n".join(_parts(found, figures)) + "\n")


def _parts(found: Explanation, figures: Sequence[Path]) -> Iterable[str]:
    yield f"# What {found.title} looks at"
    yield f"Means over {len(found.dates)} dates from {found.dates[0]} to {found.dates[-1]}; all maps are in `{NETCDF}`."
    yield "## In short"
    yield "\n".join(f"- {sentence}" for sentence in _in_short(found))
    for figure in figures:
        yield f"![{CAPTIONS[figure.name]}]({figure.name})\n\n{CAPTIONS[figure.name]}."
    if found.sensitivity is not None:
        yield "## By how much the forecast changes where a field is one standard deviation higher everywhere"
        yield _totals(found.sensitivity)


def _in_short(found: Explanation) -> Iterable[str]:
    looks, answer = found.looks, found.sensitivity
    if looks is None:
        cell = type(found.forecaster.network.layers[0]).__name__.removesuffix("2d")
        yield f"The network's cells are {cell}, which has neither attention nor dilations that it weighs."
    else:
        yield from _of_attention(found, looks)
        yield from _of_dilations(found, looks)
    if answer is not None:
        yield from _of_answer(answer)
    else:
        yield "Call the command with --region for what a region's forecast hangs on."


def _of_attention(found: Explanation, looks: Looks) -> Iterable[str]:
    if not np.isfinite(looks.added_L).any():
        yield "No attention comes within a window, or the network has none."
        return
    latitude = np.array(found.forecaster.contract.latitude_deg)
    added = ", ".join(f"{value:.2g}" for value in looks.added_L.tolist())
    yield f"What attention adds to the state, over its root mean square, layer by layer: {added}."
    layer = int(np.nanargmax(looks.added_L))
    for season in np.flatnonzero(looks.dates_S).tolist():
        zonal_Y = looks.column_map_LSYX[layer, season].mean(1)
        strongest = int(zonal_Y.argmax())
        row, column = np.unravel_index(looks.row_map_LSYX[layer, season].argmax(), looks.row_map_LSYX.shape[2:])
        longitude = found.forecaster.contract.longitude_deg[int(column)]
        most, peak = float(zonal_Y[strongest]), float(looks.row_map_LSYX[layer, season, row, column])
        circle, place = latitude_in_words(float(latitude[strongest])), latitude_in_words(float(latitude[row]))
        even = " (hardly a preference)" if max(most, peak) < EVEN else ""
        yield (
            f"{list(SEASONS)[season]}: along meridians most is taken from {circle}, "
            f"{most:.2f} times an even weight; along latitude circles from {longitude_in_words(longitude)} at "
            f"{place}, {peak:.2f} times{even}."
        )


def _of_dilations(found: Explanation, looks: Looks) -> Iterable[str]:
    for layer, share_DC in enumerate(looks.dilations_LDC):
        means = ", ".join(
            f"{dilation}: {share:.0%}" for dilation, share in zip(found.dilations, share_DC.mean(1), strict=True)
        )
        favourite = np.bincount(share_DC.argmax(0), minlength=len(found.dilations))
        of_channels = ", ".join(
            f"{dilation} in {count}" for dilation, count in zip(found.dilations, favourite, strict=True)
        )
        yield f"Layer {layer + 1}, share of each dilation: {means}; the strongest one is {of_channels} channels."


def _of_answer(answer: Sensitivity) -> Iterable[str]:
    question, target = answer.question, answer.question.variable
    squares_TC = (answer.rms_TCYX**2).sum((2, 3))
    shares_T = squares_TC.sum(1) / squares_TC.sum()
    last = ", ".join(f"{share:.0%}" for share in shares_T[::-1].tolist())
    shares_C = squares_TC.sum(0) / squares_TC.sum()
    named = ", ".join(f"{one.name} {share:.0%}" for one, share in zip(answer.variables, shares_C, strict=True))
    asked = f"{target.name}, mean over {question.region}, {question.lead} steps ahead"
    yield (
        f"{asked}, is {np.mean(answer.answers):.4g} {plain(target.units)} on average. Of its squared gradient, so much "
        f"comes from the last frame, the one before, and so on: {last}; from the variables: {named}."
    )


def _totals(answer: Sensitivity) -> str:
    window, units = len(answer.total_TC), answer.question.variable.units
    heads = ["steps before the start", *(f"{one.name} [{plain(units)}]" for one in answer.variables)]
    rows = [[str(window - 1 - step), *(f"{value:+.3g}" for value in answer.total_TC[step])] for step in range(window)]
    return table(heads, rows[::-1])
