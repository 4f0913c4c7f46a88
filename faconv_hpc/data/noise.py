"""Noise on the fields that a network is given in training: it learns to go back from what is a little wrong.

A free run is given its own forecasts, whose errors are in no data. A network that was given fields with noise, and
asked for the true ones a step later, takes away what should not be there (Sanchez-Gonzalez et al. 2020, arXiv
2002.09405; Pfaff et al. 2021, arXiv 2010.03409).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from ..spatial.grid import LatLonGrid, Tile
from .hashing import mixed, nearly_normal, start_of
from .inputs import column
from .samples import Batch
from .variables import Channels


class InputNoise:
    """A pure function of seed, step, place in the batch, time, field, and cell of the whole grid.

    So it is the same to the last bit however the grid is cut, samples are dealt and a run is continued.

    Args:
        size: deviation of the noise over that of each field.
        seed: of the run.
        channels: of the network.
        window: inputs that are given; only they have noise.
        tile: which cells.
        grid: the whole one.
    """

    def __init__(self, size: float, seed: int, channels: Channels, window: int, tile: Tile, grid: LatLonGrid) -> None:
        self._seed, self._window, self._tile, fields = seed, window, tile, channels.prognostic
        self._cells_YX = np.arange(grid.nlat * grid.nlon, dtype=np.uint64).reshape(grid.nlat, -1)[tile.slices]
        self._size = column([size if one.std else 0.0 for one in fields])
        self._per_tendency = torch.from_numpy(column([one.scale / one.target_scale for one in fields]))

    def added(self, batch: Batch, step: int, places: Sequence[int]) -> Batch:
        """The batch with noise on its prognostic fields, where they are known, within the window.

        What is asked for is the change from them to the next true ones. Other inputs, and those after the window, have
        no noise.

        Args:
            step: of the run, from 0.
            places: of the samples, in the batch of the step.
        """
        window, fields = slice(self._window), slice(len(self._size))
        noise_BTCYX = torch.from_numpy(np.stack([self.of(step, place) for place in places]))
        known_BTCYX = batch.known_BTCYX
        if known_BTCYX is not None:
            noise_BTCYX *= known_BTCYX[:, window]
        inputs_BTCYX, target_BTCYX = batch.inputs_BTCYX.clone(), batch.target_BTCYX.clone()
        inputs_BTCYX[:, window, fields] += noise_BTCYX
        target_BTCYX[:, window, fields] -= noise_BTCYX * self._per_tendency
        if batch.valid_BTCYX is not None:
            target_BTCYX *= batch.valid_BTCYX
        return replace(batch, inputs_BTCYX=inputs_BTCYX, target_BTCYX=target_BTCYX)

    def of(self, step: int, place: int) -> NDArray[np.float32]:
        """(T, C, Y, X) of one sample: the window's steps, the prognostic fields, this tile's cells."""
        shape = self._window, len(self._size)
        noise_TCYX = np.empty((*shape, *self._tile.shape), dtype=np.float32)
        for time, field in np.ndindex(shape):
            start = start_of(self._seed, step, place, time, field)
            noise_TCYX[time, field] = nearly_normal(mixed(self._cells_YX + start))
        noise_TCYX *= self._size
        return noise_TCYX
