"""Squares of cells: the grid of a network whose cells are f x f of the grid that it is given."""

import numpy as np

from ..errors import InputError
from .grid import Boundary, Cuts, LatLonGrid


def grid_of_squares(grid: LatLonGrid, factor: int) -> LatLonGrid:
    """The grid whose cells are squares of ``factor`` x ``factor`` cells, at their mean coordinates; boundaries are
    the same. In the last row, and in the last column of a region, they are of as many cells as are left.

    Raises:
        InputError: a row that is periodic is not parted evenly.
    """
    if grid.lon_boundary == Boundary.PERIODIC:
        even = 2 if Boundary.POLE in grid.boundaries else 1  # what goes on beyond a pole comes back half a turn away
        if grid.nlon % (factor * even):
            raise InputError(
                f"model.scale_factor={factor} parts a periodic row of {grid.nlon} columns into squares of {factor} x "
                f"{factor} cells, and {grid.nlon} is no multiple of {factor * even}"
                f"{' (an even number of squares, as the row goes on beyond a pole)' if even > 1 else ''}. Use another "
                f"scale_factor, or regrid."
            )
    latitudes, longitudes = (np.asarray(values, dtype=np.float64) for values in (grid.latitude_deg, grid.longitude_deg))
    latitude_deg = [float(latitudes[row : row + factor].mean()) for row in range(0, grid.nlat, factor)]
    to_middle = (longitudes[-1] - longitudes[0]) / max(grid.nlon - 1, 1) * (factor - 1) / 2
    longitude_deg = longitudes[::factor] + to_middle  # as wide as others, at the end too
    return LatLonGrid(
        len(latitude_deg),
        len(longitude_deg),
        latitude_deg,
        longitude_deg,
        grid.lat_boundary,
        grid.lon_boundary,
        grid.equal_area,
    )


def cuts_of_squares(cuts: Cuts, factor: int) -> Cuts:
    """The same cuts, counted in squares.

    Raises:
        InputError: one of them parts a square.
    """
    for name, edges in (("row", cuts.row_edges), ("column", cuts.column_edges)):
        if any(edge % factor for edge in edges[:-1]):
            raise InputError(
                f"a network of model.scale_factor={factor} needs tiles of whole squares of {factor} x {factor} cells, "
                f"and {name}_edges {edges} part some. Cut by `Domain(grid, mesh, block={factor})`, which is what "
                f"`trained.domain(mesh)` of `load_network` does."
            )
    rows, columns = (tuple(-(-edge // factor) for edge in edges) for edges in (cuts.row_edges, cuts.column_edges))
    return Cuts(rows, columns)
