"""The geometry of halos, against an independent reference that looks up one cell at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faconv_hpc.errors import InputError
from faconv_hpc.spatial.grid import Boundary, Cuts, LatLonGrid, split_evenly
from faconv_hpc.spatial.halo import halo_rectangles, rectangles_sent


def reference_cell(field, grid, row, column):
    """The value of one cell, perhaps beyond the grid, by the definition of each boundary."""
    nlat, nlon = field.shape
    if row < 0 or row >= nlat:
        boundary = grid.north if row < 0 else grid.south
        if boundary == Boundary.ZERO:
            return 0.0
        if boundary == Boundary.PERIODIC:
            row %= nlat
        elif boundary == Boundary.REPLICATE:
            row = 0 if row < 0 else nlat - 1
        else:
            latitude = grid.latitude_deg
            at_pole = abs(abs(latitude[0 if row < 0 else -1]) - 90) < 1e-6
            row = (
                (-row if at_pole else -row - 1)
                if row < 0
                else (2 * (nlat - 1) - row if at_pole else 2 * nlat - 1 - row)
            )
            column += nlon // 2
    if 0 <= column < nlon:
        return field[row, column]
    if grid.lon_boundary == Boundary.PERIODIC:
        return field[row, column % nlon]
    if grid.lon_boundary == Boundary.REPLICATE:
        return field[row, 0 if column < 0 else nlon - 1]
    return 0.0


def reference_padded(field, grid, tile, width):
    return np.array(
        [
            [
                reference_cell(field, grid, row, column)
                for column in range(tile.columns[0] - width, tile.columns[1] + width)
            ]
            for row in range(tile.rows[0] - width, tile.rows[1] + width)
        ]
    )


def padded_by_plan(field, grid, cuts, destination, width):
    tile = cuts.tile(destination)
    rows, columns = tile.shape
    padded = np.zeros((rows + 2 * width, columns + 2 * width))
    padded[width : width + rows, width : width + columns] = field[tile.slices]
    for part in halo_rectangles(grid, cuts, destination, width):
        owned = field[cuts.tile(part.source).slices]
        cells = owned[slice(*part.source_rows), slice(*part.source_columns)]
        padded[slice(*part.rows), slice(*part.columns)] = cells[::-1] if part.mirrored else cells
    return padded


@st.composite
def edges(draw, size):
    inner = draw(st.sets(st.integers(1, size - 1), max_size=4)) if size > 1 else set()
    return (0, *sorted(inner), size)


@st.composite
def cases(draw):
    lat_boundary = draw(
        st.sampled_from(["pole", "zero", "replicate", "periodic", ("pole", "zero"), ("replicate", "pole")])
    )
    poles = "pole" in lat_boundary
    lon_boundary = "periodic" if poles else draw(st.sampled_from(["periodic", "zero", "replicate"]))
    nlat = draw(st.integers(1, 13))
    nlon = 2 * draw(st.integers(1, 7)) if poles else draw(st.integers(1, 13))
    latitude = None
    if nlat > 1 and draw(st.booleans()):
        latitude = np.linspace(90, -90, nlat) * (1 if draw(st.booleans()) else -1)  # a row at each pole
    grid = LatLonGrid(nlat, nlon, latitude_deg=latitude, lat_boundary=lat_boundary, lon_boundary=lon_boundary)
    cuts = Cuts(draw(edges(nlat)), draw(edges(nlon)))
    width = draw(st.integers(1, max(1, min(6, nlat - 1)) if poles else 9))
    return grid, cuts, width


@settings(max_examples=300, deadline=None)
@given(cases())
def test_a_plan_brings_in_what_the_boundary_says(case):
    grid, cuts, width = case
    if grid.nlat == 1 and Boundary.POLE in (grid.north, grid.south) and width > 1:
        return
    field = np.random.default_rng(0).standard_normal((grid.nlat, grid.nlon))
    for destination in range(cuts.tiles):
        want = reference_padded(field, grid, cuts.tile(destination), width)
        np.testing.assert_array_equal(padded_by_plan(field, grid, cuts, destination, width), want)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_what_is_sent_is_what_is_received_in_the_same_order(case):
    grid, cuts, width = case
    for source in range(cuts.tiles):
        for destination in set(range(cuts.tiles)) - {source}:
            sent = [part for part in rectangles_sent(grid, cuts, source, width) if part.destination == destination]
            received = [part for part in halo_rectangles(grid, cuts, destination, width) if part.source == source]
            assert sent == received


def test_a_rank_plans_for_its_neighbours_only():
    """Of 4,096 tiles: all plans on every rank would take it a second for each width."""
    grid = LatLonGrid(640, 1280, lat_boundary="pole")
    cuts = Cuts.even(grid, 64, 64)
    for source, neighbours in ((32 * 64 + 5, 8), (0, 8)):  # beside the pole three of them are beyond it
        halo_rectangles.cache_clear()
        sent = rectangles_sent(grid, cuts, source, 4)
        assert len({part.destination for part in sent}) == neighbours
        assert halo_rectangles.cache_info().misses <= 2 * neighbours


def test_a_halo_over_the_far_pole_is_refused():
    grid = LatLonGrid(3, 8, lat_boundary="pole")
    with pytest.raises(InputError, match="a halo of 4 rows beyond the pole reaches past the other end of 3 rows"):
        halo_rectangles(grid, Cuts.even(grid), 0, 4)


@pytest.mark.parametrize(("size", "parts"), [(721, 4), (181, 2), (181, 4), (7, 3), (5, 4), (1440, 7), (13, 13), (1, 1)])
def test_split_evenly_covers_all_and_its_largest_part_is_as_small_as_can_be(size, parts):
    edges = split_evenly(size, parts)
    sizes = np.diff(edges)
    assert edges[0] == 0 and edges[-1] == size and len(sizes) == parts
    assert sizes.min() >= 1 and sizes.max() == -(-size // parts)


def test_more_ranks_than_rows_are_refused():
    with pytest.raises(InputError, match=r"5 rows cannot be cut over 6 ranks along lat.*mesh\.lat"):
        split_evenly(5, 6)
