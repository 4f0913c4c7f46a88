"""The geometry of halos: which rectangles of which tiles fill the halo of each tile.

A plan is computed the same way on every rank, from the grid, the cuts and the width alone. It covers
uneven tiles, corners, periodic wrap, the poles, one or two tiles on a periodic axis, and halos wider
than a tile, because every padded row and column is traced to its source on its own.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..errors import InputError
from .grid import Boundary, Cuts, LatLonGrid, Span


@dataclass(frozen=True)
class Rectangle:
    """Cells that one tile owns and another has in its halo (or the same one, around the globe).

    ``source_rows`` and ``source_columns`` count from the source's first owned cell; ``rows`` and
    ``columns`` from the destination's first padded cell. ``mirrored``: beyond a pole, rows run the
    other way; exchange.py turns them (`_turned`).
    """

    source: int
    destination: int
    source_rows: Span
    source_columns: Span
    rows: Span
    columns: Span
    mirrored: bool

    @property
    def cells(self) -> int:
        """Number of cells."""
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])


@dataclass(frozen=True)
class _Source:
    """Where one padded row or column comes from: a global index, perhaps across a pole."""

    index: int
    mirrored: bool = False


@dataclass(frozen=True)
class _Run:
    """Consecutive padded rows or columns with consecutive sources in one tile."""

    padded: Span
    tile: int
    source: Span  # from the tile's first row or column
    mirrored: bool
    owned: bool


@lru_cache(maxsize=4096)
def halo_rectangles(grid: LatLonGrid, cuts: Cuts, destination: int, width: int) -> tuple[Rectangle, ...]:
    """The rectangles that fill the halo of one tile, ``width`` cells on all sides.

    Cells beyond a ``zero`` boundary belong to no rectangle. The order is the same on every rank and
    is the order of cells inside a message.

    Raises:
        InputError: a pole boundary whose halo would reach the other pole.
    """
    row, column = divmod(destination, cuts.lon)
    return tuple(
        Rectangle(
            source=rows.tile * cuts.lon + cols.tile,
            destination=destination,
            source_rows=rows.source,
            source_columns=cols.source,
            rows=rows.padded,
            columns=cols.padded,
            mirrored=rows.mirrored,
        )
        for rows in _row_runs(grid, cuts, row, width)
        for cols in _column_runs(grid, cuts, column, width, rows.mirrored)
        if not (rows.owned and cols.owned)
    )


@lru_cache(maxsize=4096)
def rectangles_sent(grid: LatLonGrid, cuts: Cuts, source: int, width: int) -> tuple[Rectangle, ...]:
    """The rectangles of one tile that fill other tiles' halos, in the order their receivers have them."""
    return tuple(
        rectangle
        for destination in _receivers(grid, cuts, source, width)
        for rectangle in halo_rectangles(grid, cuts, destination, width)
        if rectangle.source == source and destination != source
    )


def _receivers(grid: LatLonGrid, cuts: Cuts, source: int, width: int) -> list[int]:
    """The tiles whose halos reach this one, in order; found along each axis, as there may be thousands of tiles."""
    source_row, source_column = divmod(source, cuts.lon)
    found = set()
    for row in range(cuts.lat):
        for mirrored in {run.mirrored for run in _row_runs(grid, cuts, row, width) if run.tile == source_row}:
            for column in range(cuts.lon):
                if any(run.tile == source_column for run in _column_runs(grid, cuts, column, width, mirrored)):
                    found.add(row * cuts.lon + column)
    return sorted(found)


@lru_cache(maxsize=4096)
def _row_runs(grid: LatLonGrid, cuts: Cuts, row: int, width: int) -> tuple[_Run, ...]:
    """Of the tiles in one row of tiles: where their padded rows come from."""
    first, last = cuts.row_edges[row : row + 2]
    return _runs([_row_source(grid, index) for index in range(first - width, last + width)], cuts.row_edges, width)


@lru_cache(maxsize=4096)
def _column_runs(grid: LatLonGrid, cuts: Cuts, column: int, width: int, mirrored: bool) -> tuple[_Run, ...]:
    """Of the tiles in one column of tiles: where their padded columns come from, beyond a pole if ``mirrored``."""
    first, last = cuts.column_edges[column : column + 2]
    sources = [_column_source(grid, index, mirrored) for index in range(first - width, last + width)]
    return _runs(sources, cuts.column_edges, width)


def _row_source(grid: LatLonGrid, row: int) -> _Source | None:
    if 0 <= row < grid.nlat:
        return _Source(row)
    northern = row < 0
    boundary = grid.north if northern else grid.south
    if boundary == Boundary.POLE:
        return _across_the_pole(grid, row)
    return _along(boundary, row, grid.nlat)


def _across_the_pole(grid: LatLonGrid, row: int) -> _Source:
    """Row -1 mirrors row 0, or row 1 if row 0 is the pole itself, which must not be repeated."""
    if row < 0:
        source = -row - (0 if grid.has_pole_row(0) else 1)
    else:
        source = 2 * grid.nlat - 1 - row - (1 if grid.has_pole_row(-1) else 0)
    if not 0 <= source < grid.nlat:
        beyond = -row if row < 0 else row - grid.nlat + 1
        raise InputError(
            f"a halo of {beyond} rows beyond the pole reaches past the other end of {grid.nlat} rows. "
            f"Use smaller dilations or a grid with more rows."
        )
    return _Source(source, mirrored=True)


def _column_source(grid: LatLonGrid, column: int, mirrored: bool) -> _Source | None:
    if mirrored:
        return _Source((column + grid.nlon // 2) % grid.nlon)
    return _along(Boundary(grid.lon_boundary), column, grid.nlon)


def _along(boundary: Boundary, index: int, size: int) -> _Source | None:
    if boundary == Boundary.PERIODIC:
        return _Source(index % size)
    if 0 <= index < size:
        return _Source(index)
    return None if boundary == Boundary.ZERO else _Source(min(max(index, 0), size - 1))


def _runs(sources: Sequence[_Source | None], edges: tuple[int, ...], width: int) -> tuple[_Run, ...]:
    """Groups padded indices into runs whose sources lie side by side in one tile."""
    owned = range(width, len(sources) - width)
    groups: list[list[tuple[int, _Source]]] = []
    for position, source in enumerate(sources):
        if source is None:
            continue
        if groups and _continues(groups[-1][-1], (position, source), edges, owned):
            groups[-1].append((position, source))
        else:
            groups.append([(position, source)])
    return tuple(_run(group, edges, owned) for group in groups)


def _continues(last: tuple[int, _Source], new: tuple[int, _Source], edges: tuple[int, ...], owned: range) -> bool:
    step = -1 if new[1].mirrored else 1
    return (
        new[0] == last[0] + 1
        and (new[0] in owned) == (last[0] in owned)
        and new[1].mirrored == last[1].mirrored
        and new[1].index == last[1].index + step
        and _tile_of(new[1], edges) == _tile_of(last[1], edges)
    )


def _tile_of(source: _Source, edges: tuple[int, ...]) -> int:
    return bisect_right(edges, source.index) - 1


def _run(group: list[tuple[int, _Source]], edges: tuple[int, ...], owned: range) -> _Run:
    first, last = group[0], group[-1]
    tile = _tile_of(first[1], edges)
    low = min(first[1].index, last[1].index) - edges[tile]
    return _Run(
        padded=(first[0], last[0] + 1),
        tile=tile,
        source=(low, low + len(group)),
        mirrored=first[1].mirrored,
        owned=first[0] in owned,
    )
