"""From raw fields of a tile to what a network takes: transformed, normalised, how fresh, static and computed ones."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..spatial.grid import LatLonGrid, Tile
from .annual_cycle import AnnualCycle
from .forcings import Instants, check_forcings, compute_forcings
from .variables import Channels, logarithm


class Inputs:
    """Makes the input channels of a network, see `Channels.inputs`, out of the fields of a tile.

    Args:
        channels: of the network; their statistics are those of the data that it was trained on.
        tile: which cells.
        grid: the whole one, for the forcings.
        static_SYX: the fields without time, as they are; they are normalised in place.
        cycle: of the tile, of the fields that the network sees without it.

    Raises:
        InputError: an unknown forcing.
    """

    def __init__(
        self, channels: Channels, tile: Tile, grid: LatLonGrid, static_SYX: NDArray[np.float32], cycle: AnnualCycle
    ) -> None:
        check_forcings(channels.forcings)
        seen = {one.name for one in channels.fields if one.harmonics is not None}
        assert seen == cycle.coefficients.keys(), f"{sorted(seen)} are seen without an annual cycle"
        self.channels, self.tile = channels, tile
        self._cycle = cycle
        self._latitude = grid.latitude[slice(*tile.rows)]
        self._longitude = grid.longitude[slice(*tile.columns)]
        self._static_SYX = static_SYX
        for field_YX, variable in zip(static_SYX, channels.static, strict=True):
            field_YX[:] = (field_YX - np.float32(variable.mean)) / np.float32(variable.scale)
        self._mean = column([one.mean for one in channels.fields])
        self._per_unit = column([1 / one.scale for one in channels.fields])

    def transform(self, values_TCYX: NDArray[np.float32], year_fraction_T: NDArray[np.float64]) -> None:
        """From x to the z that the network sees of it, in place: logarithms and anomalies.

        Args:
            values_TCYX: of `Channels.fields`, from the first, as many as there are.
        """
        for place, variable in enumerate(self.channels.fields[: values_TCYX.shape[1]]):
            if variable.log1p is not None:
                values_TCYX[:, place] = logarithm(values_TCYX[:, place], variable.log1p, variable.name)
            elif variable.harmonics is not None:
                values_TCYX[:, place] -= self._cycle.at(variable.name, year_fraction_T)

    def normalise(self, values_TCYX: NDArray[np.float32]) -> None:
        """From z to ``(z - mean) / std``, in place; of as many fields as `transform`."""
        values_TCYX -= self._mean[: values_TCYX.shape[1]]
        values_TCYX *= self._per_unit[: values_TCYX.shape[1]]

    def fill(
        self,
        values_TCYX: NDArray[np.float32],
        fresh_TCYX: NDArray[np.float32] | None,
        at: Instants,
        inputs_TCYX: NDArray[np.float32],
    ) -> None:
        """Fills in all input channels.

        Args:
            values_TCYX: normalised, of the fields that are inputs.
            fresh_TCYX: how fresh they are, see `fill_gaps`, 0 where there is none; None: all are known.
            at: T + 1 instants, see `Instants`.
        """
        channels, given = self.channels, self.channels.given
        inputs_TCYX[:, :given] = values_TCYX
        for place, variable in enumerate(channels.masked):
            fresh = 1.0 if fresh_TCYX is None else fresh_TCYX[:, channels.fields.index(variable)]
            inputs_TCYX[:, given + place] = fresh
        if fresh_TCYX is not None:
            inputs_TCYX[:, :given][fresh_TCYX == 0] = 0.0
        first = len(channels.inputs) - len(channels.forcings)
        inputs_TCYX[:, first - len(channels.static) : first] = self._static_SYX
        compute_forcings(channels.forcings, at, self._latitude, self._longitude, inputs_TCYX[:, first:])

    def cycle_at(self, year_fraction_T: NDArray[np.float64]) -> NDArray[np.float32]:
        """(T, C, Y, X) what the targets' values are that the network sees as 0: 0 where it sees them as they are, and
        (T, C, 1, 1) where it sees all as they are."""
        shape = self.tile.shape if self._cycle.coefficients else (1, 1)
        cycle_TCYX = np.zeros((len(year_fraction_T), len(self.channels.targets), *shape), dtype=np.float32)
        for place, variable in enumerate(self.channels.targets):
            if variable.harmonics is not None:
                cycle_TCYX[:, place] = self._cycle.at(variable.name, year_fraction_T)
        return cycle_TCYX


def column(numbers: Sequence[float]) -> NDArray[np.float32]:
    """(C, 1, 1) one for each channel."""
    return np.array(numbers, dtype=np.float64).astype(np.float32)[:, None, None]
