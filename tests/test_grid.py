"""Grids: coordinates, areas, and what is refused."""

import numpy as np
import pytest

from faconv_hpc.errors import InputError
from faconv_hpc.spatial.grid import LatLonGrid


def test_areas_cover_the_sphere():
    for latitude in (None, np.linspace(90, -90, 19), np.linspace(-90, 90, 19)):
        grid = LatLonGrid(19, 8, latitude_deg=latitude, lat_boundary="pole")
        np.testing.assert_allclose(grid.total_area_sr, 4 * np.pi, rtol=1e-12)
        np.testing.assert_allclose(grid.cell_area_sr, grid.cell_area_sr[::-1], rtol=1e-12)


def test_a_region_has_its_own_area():
    grid = LatLonGrid(
        10, 20, latitude_deg=np.arange(30.5, 40.5), longitude_deg=np.arange(0.5, 20.5),
        lat_boundary="zero", lon_boundary="zero",
    )  # fmt: skip
    want = (np.sin(np.deg2rad(40)) - np.sin(np.deg2rad(30))) * np.deg2rad(20)
    np.testing.assert_allclose(grid.total_area_sr, want, rtol=1e-12)


def test_a_plane_has_equal_cells():
    np.testing.assert_array_equal(LatLonGrid.plane(5, 7).cell_area_sr, np.ones(5))


def test_longitudes_may_start_anywhere_and_carry_rounding():
    LatLonGrid(4, 144, longitude_deg=(20 + 2.5 * np.arange(144)).astype(np.float32), lat_boundary="pole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nlat": 0, "nlon": 4}, "at least one row and one column, got nlat=0"),
        ({"nlat": 3, "nlon": 4, "latitude_deg": [1, 2]}, "latitude_deg needs 3 finite values, got 2"),
        ({"nlat": 3, "nlon": 4, "latitude_deg": [1, 2, np.nan]}, "latitude_deg needs 3 finite values"),
        ({"nlat": 3, "nlon": 4, "latitude_deg": [1, 3, 2]}, "latitudes must run one way"),
        ({"nlat": 3, "nlon": 4, "latitude_deg": [80, 90, 100]}, r"latitudes must run one way within \[-90, 90\]"),
        ({"nlat": 3, "nlon": 4, "longitude_deg": [0, 90, 80, 270]}, "must increase.*90 is followed by 80 at column 2"),
        (
            {"nlat": 3, "nlon": 5, "longitude_deg": [0, 90, 180, 270, 360]},
            "do not close.*drop the repeated last column",
        ),
        ({"nlat": 3, "nlon": 4, "longitude_deg": [0, 10, 20, 30]}, "longitudes do not close.*lon_boundary 'zero'"),
        ({"nlat": 3, "nlon": 5, "lat_boundary": "pole"}, "even number of columns.*5 columns"),
        ({"nlat": 3, "nlon": 4, "lat_boundary": "pole", "lon_boundary": "zero"}, "needs periodic longitudes"),
        ({"nlat": 3, "nlon": 4, "lon_boundary": "pole"}, "only rows end at a pole"),
        ({"nlat": 3, "nlon": 4, "longitude_deg": [0, 80, 180, 270]}, "equally spaced, got steps from 80 to 100"),
        (
            {"nlat": 3, "nlon": 4, "latitude_deg": [30, 0, -30], "lat_boundary": "pole"},
            "in the north is 'pole', but the outermost row lies at 30 degrees, more than a row",
        ),
        ({"nlat": 3, "nlon": 4, "lat_boundary": ("periodic", "zero")}, "a periodic boundary joins both sides"),
        ({"nlat": 3, "nlon": 4, "lat_boundary": "wall"}, "'wall', which is no boundary. Use one of periodic, pole"),
    ],
)
def test_what_a_grid_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        LatLonGrid(**arguments)
