"""What can be said of each regime in a line: how often, when in the year, how long, what is unusual where."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...data.times import SECONDS_PER_HOUR, TimeAxis
from ..words import months_in_words
from .find import Regimes


@dataclass(frozen=True)
class Extreme:
    """Where a regime's mean departs most from that of all times, of one variable.

    Attributes:
        anomaly: in units, of the cell where it is largest.
        spread: root of its area-weighted mean square over the globe.
    """

    variable: str
    units: str
    anomaly: float
    latitude_deg: float
    longitude_deg: float
    spread: float


@dataclass(frozen=True)
class RegimeFacts:
    """One regime.

    Attributes:
        number: from 1, the commonest first.
        months: calendar months in which it is the commonest, such as "May to Sep"; empty where there is none.
        run_times: mean number of times in a row.
        run_hours: how long that is.
    """

    number: int
    times: int
    share: float
    months: str
    run_times: float
    run_hours: float
    extremes: tuple[Extreme, ...]


def facts_of(regimes: Regimes) -> list[RegimeFacts]:
    """Of all regimes."""
    labels_T, axis = regimes.labels_T, regimes.embeddings.axis
    commonest = np.argmax(np.nan_to_num(regimes.month_share_KM), axis=0)
    there = np.isfinite(regimes.month_share_KM).all(0)
    found = []
    for label in range(int(labels_T.max()) + 1):
        runs = _runs(labels_T == label, axis)
        months = np.flatnonzero((commonest == label) & there).tolist()
        found.append(
            RegimeFacts(
                number=label + 1,
                times=int((labels_T == label).sum()),
                share=float((labels_T == label).mean()),
                months=months_in_words(months),
                run_times=float(np.mean(runs)),
                run_hours=float(np.mean(runs)) * axis.step_s / SECONDS_PER_HOUR,
                extremes=_extremes(regimes, label),
            )
        )
    return found


def _runs(there_T: NDArray[np.bool_], axis: TimeAxis) -> list[int]:
    """Lengths of the runs of times that follow each other without a gap."""
    runs, length, gaps = [], 0, set(axis.gaps.tolist())
    for time, there in enumerate(there_T.tolist()):
        if length and (time in gaps or not there):
            runs.append(length)
            length = 0
        length += there
    return [*runs, length] if length else runs


def _extremes(regimes: Regimes, label: int) -> tuple[Extreme, ...]:
    composites, record = regimes.composites, regimes.record
    if composites is None or record is None:
        return ()
    found = []
    areas_Y = composites.areas_Y[:, None]
    for variable, anomaly_YX in zip(record.variables, composites.anomaly_KCYX[label], strict=True):
        known = np.isfinite(anomaly_YX)
        row, column = np.unravel_index(np.argmax(np.where(known, np.abs(anomaly_YX), -1.0)), anomaly_YX.shape)
        squares = float((np.where(known, anomaly_YX, 0.0) ** 2 * areas_Y).sum() / (known * areas_Y).sum())
        found.append(
            Extreme(
                variable.name,
                variable.units,
                float(anomaly_YX[row, column]),
                float(composites.latitude_deg[row]),
                float(composites.longitude_deg[column]),
                squares**0.5,
            )
        )
    return tuple(found)
