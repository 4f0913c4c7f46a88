"""Noise on the fields that a network is given in training: it learns to go back from what is a little wrong.

A free run is given its own forecasts, whose errors are in no data. A network that was given fields with noise, and
asked for the true ones a step later, takes away what should not be there (Sanchez-Gonzalez et al. 2020, arXiv
2002.09405; Pfaff et al. 2021, arXiv 2010.03409). Errors of a free run that grow are as wide as the globe at first;
noise of each cell for itself has next to nothing of that, so this one has as much in long waves as in short ones.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from ..spatial.grid import LatLonGrid, Tile
from .hashing import mixed, start_of, uniform
from .inputs import column
from .samples import Batch
from .variables import Channels


class InputNoise:
    """Waves on the sphere, ``cos(k . r + p)`` of the place r of a cell, one in each of some parts of the wavenumbers.

    Wavenumbers lie between 1, a wave that goes once around the globe, and that of two rows. They are cut into parts of
    an octave or less, in which the wavenumber is drawn evenly in its logarithm; the direction and the phase of a wave
    are drawn as well. All are a pure function of seed, step, place in the batch and field: so noise is the same however
    the grid is cut, samples are dealt and a run is continued. It stays through the window, as what is wrong in a free
    run does: what comes and goes would be known by that.

    Args:
        size: deviation of the noise over that of each field; what never changes has none.
        seed: of the run.
        channels: of the network.
        window: inputs that are given; only they have noise.
        tile: which cells.
        grid: the whole one.
    """

    def __init__(self, size: float, seed: int, channels: Channels, window: int, tile: Tile, grid: LatLonGrid) -> None:
        self._seed, self._window, fields = seed, window, channels.prognostic
        latitude, self._longitude = grid.latitude[slice(*tile.rows)], grid.longitude[slice(*tile.columns)]
        self._sine_Y, self._cosine_Y = np.sin(latitude), np.cos(latitude).astype(np.float32)
        self._most = wavenumber_of_two_rows(grid)
        self._size = column([size if one.std and one.tendency_std else 0.0 for one in fields])
        self._per_tendency = torch.from_numpy(column([one.scale / one.target_scale for one in fields]))

    def added(self, batch: Batch, step: int, places: Sequence[int]) -> Batch:
        """The batch with noise on its prognostic fields, where there are some, within the window.

        What is asked for is the change from them to the next true ones. Other inputs, and those after the window, have
        no noise.

        Args:
            step: of the run, from 0.
            places: of the samples, in the batch of the step.
        """
        window, fields = slice(self._window), slice(len(self._size))
        noise_BTCYX = torch.from_numpy(np.stack([self.of(step, place) for place in places]))[:, None]
        fresh_BTCYX = batch.fresh_BTCYX
        if fresh_BTCYX is not None:
            noise_BTCYX = noise_BTCYX * (fresh_BTCYX[:, window] > 0)
        inputs_BTCYX, target_BTCYX = batch.inputs_BTCYX.clone(), batch.target_BTCYX.clone()
        inputs_BTCYX[:, window, fields] += noise_BTCYX
        target_BTCYX[:, window, fields] -= noise_BTCYX * self._per_tendency
        return replace(batch, inputs_BTCYX=inputs_BTCYX, target_BTCYX=target_BTCYX)

    def of(self, step: int, place: int) -> NDArray[np.float32]:
        """(C, Y, X) of one sample: the prognostic fields, this tile's cells."""
        noise_CYX = np.zeros((len(self._size), len(self._sine_Y), len(self._longitude)), dtype=np.float32)
        for field in np.flatnonzero(self._size):
            noise_CYX[field] = self._waves(start_of(self._seed, step, place, int(field))) * self._size[field]
        return noise_CYX

    def _waves(self, start: NDArray[np.uint64]) -> NDArray[np.float32]:
        """(Y, X) their sum, of deviation 1 over all that may be drawn."""
        parts = max(math.ceil(math.log2(self._most)), 1)
        drawn_N4 = uniform(mixed(np.arange(4 * parts, dtype=np.uint64) + start)).reshape(parts, 4)
        sum_YX = np.zeros((len(self._sine_Y), len(self._longitude)), dtype=np.float32)
        for part, (share, height, turn, phase) in enumerate(drawn_N4.tolist()):
            wavenumber, up = self._most ** ((part + share) / parts), 2 * height - 1
            across_X = wavenumber * math.sqrt(1 - up**2) * np.cos(self._longitude - 2 * math.pi * turn)
            along_Y = wavenumber * up * self._sine_Y + 2 * math.pi * phase
            sum_YX += np.cos(
                self._cosine_Y[:, None] * across_X.astype(np.float32) + along_Y.astype(np.float32)[:, None]
            )
        return sum_YX * np.float32(math.sqrt(2 / parts))


def wavenumber_of_two_rows(grid: LatLonGrid) -> float:
    """Of a wave that is two rows long, at least 1; of a grid of one row, two columns."""
    rows = np.abs(np.diff(grid.latitude))
    step = float(rows.mean()) if len(rows) else 2 * math.pi / grid.nlon
    return max(math.pi / step, 1.0)
