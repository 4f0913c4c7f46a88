"""Where cells live: the grid, its boundaries, and its cuts into tiles. NumPy only."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

Span = tuple[int, int]
"""Half-open range of rows or columns, ``start <= index < stop``."""

SAME_DEG = 1e-4  # coordinates kept as float32 in one file and float64 in another
POLE_TOLERANCE_DEG = 1e-4
CLOSURE_TOLERANCE = 0.02  # of one column; coordinates stored as float32 are off by 1e-5 of one


def are_same_deg(some: NDArray[np.float64], others: NDArray[np.float64]) -> bool:
    """Whether coordinates are as many and the same, but for how many digits of them were kept."""
    return some.shape == others.shape and bool((np.abs(some - others) <= SAME_DEG).all())


class Boundary(str, Enum):
    """Rule at the limit of the grid.

    ``periodic``: the other end of the same row or column. ``pole``: the field on the other side
    of the pole, half a turn away in longitude, rows mirrored. ``zero``: nothing. ``replicate``:
    the outermost owned row or column again.
    """

    PERIODIC = "periodic"
    POLE = "pole"
    ZERO = "zero"
    REPLICATE = "replicate"


@dataclass(frozen=True)
class LatLonGrid:
    """A latitude/longitude grid with its coordinates, cell areas and boundaries.

    Args:
        nlat: number of rows. Row 0 is called the northern side, whichever way latitudes run.
        nlon: number of columns, west to east.
        latitude_deg: (nlat,) strictly monotonic, within [-90, 90]. Default: centres of ``nlat``
            equal bands, north first.
        longitude_deg: (nlon,) strictly increasing, from any start. Default: from 0 eastward.
        lat_boundary: one rule for both sides, or a pair (north, south).
        lon_boundary: ``periodic``, ``zero`` or ``replicate``.
        equal_area: cells count alike (a plane) instead of by their area on the sphere.

    Raises:
        InputError: coordinates that do not describe such a grid, or boundaries they do not allow.
    """

    nlat: int
    nlon: int
    latitude_deg: Sequence[float] | NDArray[np.floating] | None = None
    longitude_deg: Sequence[float] | NDArray[np.floating] | None = None
    lat_boundary: Boundary | str | tuple[Boundary | str, Boundary | str] = Boundary.ZERO
    lon_boundary: Boundary | str = Boundary.PERIODIC
    equal_area: bool = False

    def __post_init__(self) -> None:
        if self.nlat < 1 or self.nlon < 1:
            raise InputError(
                f"a grid needs at least one row and one column, got nlat={self.nlat}, "
                f"nlon={self.nlon}. Give the sizes of your fields."
            )
        latitude = _default_latitude(self.nlat) if self.latitude_deg is None else self.latitude_deg
        longitude = _default_longitude(self.nlon) if self.longitude_deg is None else self.longitude_deg
        self._set("latitude_deg", tuple(float(value) for value in latitude))
        self._set("longitude_deg", tuple(float(value) for value in longitude))
        self._set("lat_boundary", _both_sides(self.lat_boundary))
        self._set("lon_boundary", _boundary(self.lon_boundary, "lon_boundary"))
        self._check_coordinates()
        self._check_boundaries()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen once it is built

    @classmethod
    def plane(cls, nlat: int, nlon: int) -> "LatLonGrid":
        """A flat rectangle: zero boundaries on all sides, every cell of the same area."""
        return cls(nlat, nlon, lat_boundary="zero", lon_boundary="zero", equal_area=True)

    @property
    def north(self) -> Boundary:
        """Boundary beyond row 0."""
        return self.lat_boundary[0]  # type: ignore[return-value]

    @property
    def south(self) -> Boundary:
        """Boundary beyond the last row."""
        return self.lat_boundary[1]  # type: ignore[return-value]

    @property
    def boundaries(self) -> tuple[Boundary, Boundary, Boundary]:
        """North, south, and both ends of a row."""
        return self.north, self.south, Boundary(self.lon_boundary)

    @cached_property
    def latitude(self) -> NDArray[np.float64]:
        """(nlat,) latitudes in radians."""
        return np.deg2rad(np.asarray(self.latitude_deg, dtype=np.float64))

    @cached_property
    def longitude(self) -> NDArray[np.float64]:
        """(nlon,) longitudes in radians."""
        return np.deg2rad(np.asarray(self.longitude_deg, dtype=np.float64))

    @cached_property
    def cell_area_sr(self) -> NDArray[np.float64]:
        """(nlat,) solid angle of one cell of each row, in steradians.

        A row reaches to the midpoints between its neighbours' latitudes, the outermost rows as
        far outwards as inwards but never beyond the pole: area = (sin north - sin south) dlon.
        Ones on an ``equal_area`` grid.
        """
        if self.equal_area:
            return np.ones(self.nlat)
        edges = _row_edges(self.latitude)
        return np.abs(np.diff(np.sin(edges))) * self._column_width

    @cached_property
    def total_area_sr(self) -> float:
        """Area of all cells together."""
        return float(self.cell_area_sr.sum()) * self.nlon

    @property
    def _column_width(self) -> float:
        if self.lon_boundary == Boundary.PERIODIC or self.nlon == 1:
            return 2 * np.pi / self.nlon
        return float((self.longitude[-1] - self.longitude[0]) / (self.nlon - 1))

    def has_pole_row(self, side: int) -> bool:
        """Whether the outermost row of a side (0 north, -1 south) lies exactly at a pole."""
        return bool(abs(abs(np.rad2deg(self.latitude[side])) - 90.0) < POLE_TOLERANCE_DEG)

    def _check_coordinates(self) -> None:
        latitude, longitude = np.rad2deg(self.latitude), np.rad2deg(self.longitude)
        for name, values, size in (("latitude", latitude, self.nlat), ("longitude", longitude, self.nlon)):
            if values.shape != (size,) or not np.isfinite(values).all():
                raise InputError(
                    f"{name}_deg needs {size} finite values, got {values.size} "
                    f"({np.isfinite(values).sum()} finite). Give one {name} for every row or column."
                )
        steps = np.diff(latitude)
        if abs(latitude).max() > 90 + POLE_TOLERANCE_DEG or not (np.all(steps > 0) or np.all(steps < 0)):
            raise InputError(
                f"latitudes must run one way within [-90, 90], got {latitude[0]:g} to {latitude[-1]:g} "
                f"with steps from {steps.min():g} to {steps.max():g}. Sort the rows of the source."
            )
        self._check_longitude_steps(longitude)

    def _check_longitude_steps(self, longitude: NDArray[np.float64]) -> None:
        """Columns must be equally wide: areas and the half turn at a pole count on it."""
        if np.any(np.diff(longitude) <= 0):
            column = int(np.argmax(np.diff(longitude) <= 0))
            raise InputError(
                f"longitudes must increase from west to east, but {longitude[column]:g} is followed by "
                f"{longitude[column + 1]:g} at column {column + 1}. Roll or unwrap the source's columns."
            )

        widths = np.diff(longitude)
        if self.nlon > 1 and np.ptp(widths) > CLOSURE_TOLERANCE * widths.mean():
            raise InputError(
                f"longitudes must be equally spaced, got steps from {widths.min():g} to {widths.max():g} degrees. "
                f"Regrid the source to regular columns."
            )

    def _check_boundaries(self) -> None:
        if self.lon_boundary == Boundary.POLE:
            raise InputError(
                "lon_boundary is 'pole', but only rows end at a pole. "
                "Use lon_boundary 'periodic', 'zero' or 'replicate'."
            )
        if (self.north == Boundary.PERIODIC) != (self.south == Boundary.PERIODIC):
            raise InputError(
                f"a periodic boundary joins both sides, got {self.north.value!r} in the north and "
                f"{self.south.value!r} in the south. Make both periodic or neither."
            )
        if self.lon_boundary == Boundary.PERIODIC:
            self._check_closure()
        if Boundary.POLE in (self.north, self.south):
            self._check_pole()
        for name, boundary, row in (("north", self.north, 0), ("south", self.south, -1)):
            if boundary == Boundary.POLE and self.nlat > 1:
                self._check_reaches_pole(name, row)

    def _check_reaches_pole(self, side: str, row: int) -> None:
        """Beyond the last row lies the other side of the pole only if the pole is no further than a row away."""
        latitude = np.rad2deg(self.latitude)
        spacing_deg = abs(latitude[row] - latitude[1 if row == 0 else -2])
        if 90 - abs(latitude[row]) > spacing_deg + POLE_TOLERANCE_DEG:
            raise InputError(
                f"the boundary in the {side} is 'pole', but the outermost row lies at {latitude[row]:g} degrees, more "
                f"than a row ({spacing_deg:g}) from the pole. Use lat_boundary 'zero' or 'replicate' for a region."
            )

    def _check_closure(self) -> None:
        longitude = np.rad2deg(self.longitude)
        column_deg = 360.0 / self.nlon
        gap_deg = longitude[0] + 360.0 - longitude[-1]
        if abs(gap_deg - column_deg) > CLOSURE_TOLERANCE * column_deg:
            remedy = (
                "drop the repeated last column"
                if gap_deg < 0.5 * column_deg
                else "use lon_boundary 'zero' or 'replicate' for a region"
            )
            raise InputError(
                f"longitudes do not close: {self.nlon} columns from {longitude[0]:g} to {longitude[-1]:g} "
                f"leave {gap_deg:g} degrees, a periodic grid needs 360/{self.nlon} = {column_deg:g}: {remedy}."
            )

    def _check_pole(self) -> None:
        if self.lon_boundary != Boundary.PERIODIC or self.nlon % 2:
            raise InputError(
                f"a pole boundary looks half a turn around the globe, so it needs periodic longitudes and an "
                f"even number of columns, got lon_boundary {Boundary(self.lon_boundary).value!r} and "
                f"{self.nlon} columns. Regrid to an even number, or use lat_boundary 'zero' or 'replicate'."
            )


def _boundary(value: Boundary | str, name: str) -> Boundary:
    try:
        return Boundary(value)
    except ValueError:
        choices = ", ".join(boundary.value for boundary in Boundary)
        raise InputError(f"{name} is {value!r}, which is no boundary. Use one of {choices}.") from None


def _both_sides(value: Boundary | str | tuple[Boundary | str, Boundary | str]) -> tuple[Boundary, Boundary]:
    north, south = (value, value) if isinstance(value, str) else value
    return _boundary(north, "lat_boundary"), _boundary(south, "lat_boundary")


def within_half_a_turn(longitude_deg: NDArray[np.float64]) -> NDArray[np.float64]:
    """Longitudes, or differences of them, by their names in [-180, 180)."""
    return (longitude_deg + 180.0) % 360.0 - 180.0


def _default_latitude(nlat: int) -> NDArray[np.float64]:
    band_deg = 180.0 / nlat
    return 90.0 - band_deg * (np.arange(nlat, dtype=np.float64) + 0.5)


def _default_longitude(nlon: int) -> NDArray[np.float64]:
    return np.arange(nlon, dtype=np.float64) * (360.0 / nlon)


def _row_edges(latitude: NDArray[np.float64]) -> NDArray[np.float64]:
    if latitude.size == 1:
        return np.array([np.pi / 2, -np.pi / 2])
    inner = (latitude[1:] + latitude[:-1]) / 2
    first, last = 2 * latitude[0] - inner[0], 2 * latitude[-1] - inner[-1]
    edges: NDArray[np.float64] = np.clip(np.concatenate([[first], inner, [last]]), -np.pi / 2, np.pi / 2)
    return edges


@dataclass(frozen=True)
class Tile:
    """The cells one rank is responsible for: spans of rows and columns of the grid."""

    rows: Span
    columns: Span

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) owned."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of the owned cells in a (..., nlat, nlon) field."""
        return slice(*self.rows), slice(*self.columns)


@dataclass(frozen=True)
class Cuts:
    """How a grid is cut: edges of the rows' and the columns' spans, first 0, last the grid's size.

    Tiles are numbered west to east, then north to south: ``index = lat_index * lon + lon_index``.
    """

    row_edges: tuple[int, ...]
    column_edges: tuple[int, ...]

    @classmethod
    def even(cls, grid: LatLonGrid, lat: int = 1, lon: int = 1, block: int = 1) -> "Cuts":
        """``lat`` x ``lon`` tiles of sizes as equal as `split_evenly` makes them.

        Args:
            block: no square of ``block`` x ``block`` cells, counted from the first row and column, is parted.
        """
        return cls(split_evenly(grid.nlat, lat, "lat", block), split_evenly(grid.nlon, lon, "lon", block))

    def check_covers(self, grid: LatLonGrid) -> None:
        """Raises InputError unless every row and column of the grid belongs to one tile."""
        for name, edges, size in (("row", self.row_edges, grid.nlat), ("column", self.column_edges, grid.nlon)):
            if edges[0] != 0 or edges[-1] != size or any(stop <= start for start, stop in pairwise(edges)):
                raise InputError(
                    f"{name}_edges {edges} must run from 0 to {size} and increase: every {name} belongs to one tile. "
                    f"`Cuts.even(grid, lat, lon)` makes such edges."
                )

    @property
    def lat(self) -> int:
        """Number of tiles along lat."""
        return len(self.row_edges) - 1

    @property
    def lon(self) -> int:
        """Number of tiles along lon."""
        return len(self.column_edges) - 1

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.lat * self.lon

    def tile(self, index: int) -> Tile:
        """The tile with this number."""
        lat_index, lon_index = divmod(index, self.lon)
        return Tile(
            rows=(self.row_edges[lat_index], self.row_edges[lat_index + 1]),
            columns=(self.column_edges[lon_index], self.column_edges[lon_index + 1]),
        )

    def sizes(self, axis: str) -> list[int]:
        """Rows per tile along ``"lat"``, columns per tile along ``"lon"``."""
        edges = self.row_edges if axis == "lat" else self.column_edges
        return [stop - start for start, stop in pairwise(edges)]


def split_evenly(size: int, parts: int, axis: str = "lat", block: int = 1) -> tuple[int, ...]:
    """Edges that cut ``size`` rows or columns into ``parts`` spans, none larger than needed.

    All spans but the last have ``ceil(size / parts)``: the largest, which sets the pace, is as
    small as can be, and every edge is a multiple of one number, so that storage chunks of that
    size never straddle two tiles. Where this would leave the last span under half of the others,
    sizes differ by at most one instead.

    Args:
        block: so many rows or columns are dealt out together, as if they were one.

    Raises:
        InputError: more parts than rows or columns, or blocks of them.
    """
    blocks = -(-size // block)
    if not 1 <= parts <= blocks:
        kind = ("rows" if axis == "lat" else "columns") + f" in squares of {block} (model.scale_factor)" * (block > 1)
        raise InputError(
            f"{size} {kind} cannot be cut over {parts} ranks along {axis}: every tile needs one at least. "
            f"Use between 1 and {blocks} ranks along {axis} (key mesh.{axis})."
        )
    each = -(-blocks // parts)
    if 2 * (blocks - each * (parts - 1)) >= each:
        return (*range(0, block * each * parts, block * each), size)
    small, larger = divmod(blocks, parts)
    return (*(block * (part * small + min(part, larger)) for part in range(parts)), size)
