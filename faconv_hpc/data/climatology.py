"""What fields are on average at a time of the year and of the day: what a forecast has to be better than."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..spatial.grid import Tile
from .fields import Fields
from .periods import evenly, mask_of
from .times import MONTHS, SECONDS_PER_DAY, TimeAxis

PARTS_OF_DAY = 8
FRAMES = 40  # read for one time of year and day, at most
AT_ONCE = 8


@dataclass(frozen=True)
class Climatology:
    """Mean of each cell over the frames of training at the same time of year and of day.

    The year is cut into the months of the calendar; the day into the hours that there are, or eight parts, if there are
    more. Where a step is a day or longer the hours do not count: those of the middle of a month differ from year to
    year, and each would have a mean of its own. Of each of these times at most `FRAMES` frames count, evenly spread
    over those that there are. At a time of the year of which training has no frame it is the mean of the others at that
    time of day.

    Attributes:
        kind_F: which time of year and day each frame is.
        mean_KCYX: of a tile; NaN where a cell is never known.
    """

    kind_F: NDArray[np.int64]
    mean_KCYX: NDArray[np.float32]

    @classmethod
    def of(cls, fields: Fields, spans: Iterable[range], tile: Tile) -> "Climatology":
        """Of fields in their units, over spans of their frames. Reads; the same on any tiling.

        Raises:
            InputError: files that are missing or damaged.
        """
        kind_F, kinds = kinds_of(fields.axis)
        counted = mask_of(spans, len(fields.axis))
        mean_KCYX = np.full((kinds, len(fields.names), *tile.shape), np.nan, dtype=np.float32)
        for kind in range(kinds):
            frames = np.flatnonzero(counted & (kind_F == kind))
            if len(frames):
                mean_KCYX[kind] = _mean_of(fields, frames[evenly(len(frames), FRAMES)].tolist(), tile)
        _fill(mean_KCYX.reshape(MONTHS, -1, *mean_KCYX.shape[1:]))
        return cls(kind_F, mean_KCYX)

    def at(self, frames: range) -> Tensor:
        """(T, C, Y, X) float32, of some frames."""
        return torch.from_numpy(self.mean_KCYX[self.kind_F[frames.start : frames.stop]])


def kinds_of(axis: TimeAxis) -> tuple[NDArray[np.int64], int]:
    """(frames,) the time of year and day of each, by number; and how many there are."""
    months = axis.months - 1
    if axis.step_s >= SECONDS_PER_DAY:
        return months, MONTHS
    hours, part_of_day = np.unique(axis.utc_hour.round(3), return_inverse=True)
    if len(hours) > PARTS_OF_DAY:
        part_of_day = (axis.utc_hour * PARTS_OF_DAY / 24).astype(np.int64)
    parts = min(len(hours), PARTS_OF_DAY)
    return months * parts + part_of_day, MONTHS * parts


def _fill(mean_YDCYX: NDArray[np.float32]) -> None:
    """In place: what is not known of a time of the year, by the others; all of them at once would be a copy."""
    for mean_YCYX in mean_YDCYX.swapaxes(0, 1):
        known = ~np.isnan(mean_YCYX)
        count_CYX = known.sum(0)
        with np.errstate(invalid="ignore"):
            other_CYX = (mean_YCYX.sum(0, where=known) / count_CYX).astype(np.float32)
        np.copyto(mean_YCYX, other_CYX, where=~known)


def _mean_of(fields: Fields, frames: list[int], tile: Tile) -> NDArray[np.float64]:
    """(C, Y, X) over the frames where a cell is known; NaN where it never is."""
    sum_CYX = np.zeros((len(fields.names), *tile.shape))
    count_CYX = np.zeros(sum_CYX.shape, dtype=np.int64)
    for first in range(0, len(frames), AT_ONCE):
        values_TCYX, known_TCYX = fields.read(frames[first : first + AT_ONCE], tile)
        known = np.ones(values_TCYX.shape, dtype=bool) if known_TCYX is None else known_TCYX
        sum_CYX += values_TCYX.sum(0, dtype=np.float64, where=known)
        count_CYX += known.sum(0)
    with np.errstate(invalid="ignore"):
        mean_CYX: NDArray[np.float64] = sum_CYX / count_CYX
    return mean_CYX
