"""What the owned cells of a tile know about their place, as tensors of the type and device that is asked for."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .grid import Boundary, LatLonGrid, Tile


class Coordinates:
    """Areas and angles of a tile's rows and columns; each is made once for every type and device.

    Args:
        grid: the whole grid.
        tile: the owned cells.
    """

    def __init__(self, grid: LatLonGrid, tile: Tile) -> None:
        self._grid = grid
        self._rows, self._columns = tile.slices
        self._made: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def row_weights(self, like: Tensor) -> Tensor:
        """(Y,) the share of each owned row's cell in the area of the whole grid."""
        return self._like("weight", lambda: self._grid.cell_area_sr[self._rows] / self._grid.total_area_sr, like)

    def log_areas(self, like: Tensor) -> Tensor:
        """(nlat,) logarithm of the relative area of a cell in each row of the grid, as far as float32 goes: the row of
        a pole itself has hardly any."""
        return self._like("log area", self._log_areas, like)

    def shares_in_regions(self, regions: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        """Of R x S regions, see `RegionMeans`: (R, Y) the share of each owned row's cell in the area of a column of its
        region, 0 in the others, and (S,) the share of a column in its region."""
        rows, columns = regions
        return (
            self._like(f"rows of {rows} regions", lambda: self._shares_of_rows(rows), like),
            self._like(f"columns of {columns} regions", lambda: 1 / np.bincount(_part(self._grid.nlon, columns)), like),
        )

    def spans_of_columns(self, regions: int) -> list[slice]:
        """The owned columns, counted from the tile's first, of each of so many regions from west to east."""
        part = _part(self._grid.nlon, regions)[self._columns]
        edges = np.searchsorted(part, np.arange(regions + 1)).tolist()
        return [slice(*edge) for edge in pairwise(edges)]

    def turns_of_longitude(self, harmonics: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(nlon, 1, harmonics) cosines and sines of so many harmonics of all columns' longitudes, from 1."""
        return self._turns("longitude", self._grid.longitude, harmonics, like)

    def turns_of_latitude(self, harmonics: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(nlat, 1, harmonics) cosines and sines of so many times all rows' latitudes."""
        return self._turns("latitude", self._grid.latitude, harmonics, like)

    def pole_taper(self, like: Tensor) -> Tensor:
        """(Y,) cosine of the owned rows' latitudes where the grid ends at a pole, ones on other grids."""
        return self._like("taper", self._taper, like)

    def _shares_of_rows(self, regions: int) -> NDArray[np.float64]:
        areas = (np.arange(regions)[:, None] == _part(self._grid.nlat, regions)) * self._grid.cell_area_sr
        shares: NDArray[np.float64] = areas / areas.sum(1, keepdims=True)
        return shares[:, self._rows]

    def _log_areas(self) -> NDArray[np.float64]:
        areas: NDArray[np.float64] = self._grid.cell_area_sr / self._grid.cell_area_sr.mean()
        return np.log(np.maximum(areas, float(np.finfo(np.float32).tiny)))

    def _turns(self, name: str, angles: NDArray[np.float64], harmonics: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Made in float64, whatever the type that is asked for."""
        turns = angles[:, None, None] * np.arange(1, harmonics + 1)
        return (
            self._like(f"cosines of {harmonics} {name}s", lambda: np.cos(turns), like),
            self._like(f"sines of {harmonics} {name}s", lambda: np.sin(turns), like),
        )

    def _taper(self) -> NDArray[np.float64]:
        latitude = self._grid.latitude[self._rows]
        has_pole = Boundary.POLE in (self._grid.north, self._grid.south)
        return np.cos(latitude) if has_pole else np.ones_like(latitude)

    def _like(self, name: str, values: Callable[[], NDArray[np.float64]], like: Tensor) -> Tensor:
        key = (name, like.dtype, like.device)
        if key not in self._made:
            with torch.inference_mode(False):  # made while evaluating, they serve training too
                self._made[key] = torch.from_numpy(values().copy()).to(dtype=like.dtype, device=like.device)
        return self._made[key]


def _part(cells: int, parts: int) -> NDArray[np.int64]:
    """(cells,) to which of so many parts each belongs."""
    return np.arange(cells) * parts // cells
