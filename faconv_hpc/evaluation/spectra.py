"""How much of a field is in waves of which length: by zonal and by total wavenumber, on grids of the whole globe.

A forecast that is blurred has too little in short waves. Total wavenumbers are those of spherical harmonics, whose
Legendre functions are SciPy's.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import sph_legendre_p_all

from ..spatial.grid import Boundary, LatLonGrid

TABLE_BYTES = 400 * 2**20  # of Legendre functions: enough for 0.25 degrees; of finer grids the highest are left out
FITS = 1e-8  # relative error of integrals of Legendre polynomials, by the weights of rows


@dataclass(frozen=True)
class Spectra:
    """Of fields on a grid.

    Attributes:
        grid: there are none where `reason` says why.
    """

    grid: LatLonGrid

    @cached_property
    def reason(self) -> str:
        """Why there are no spectra on the grid; empty where there are."""
        grid, latitude = self.grid, np.rad2deg(self.grid.latitude)
        if grid.lon_boundary != Boundary.PERIODIC or grid.equal_area:
            return "longitudes do not go around the globe"
        if grid.nlat < 4 or grid.nlon < 4:
            return f"{grid.nlat} x {grid.nlon} cells are too few"
        ends = [(90 - abs(latitude[at]), abs(latitude[at] - latitude[inner])) for at, inner in ((0, 1), (-1, -2))]
        if any(gap > row + 1e-3 for gap, row in ends):
            return f"latitudes from {latitude[0]:g} to {latitude[-1]:g} do not reach the poles"
        degree = 2 * int(self.total_wavenumbers[-1])
        integrals = np.polynomial.legendre.legvander(np.sin(grid.latitude), degree).T @ self._weights_Y
        if np.abs(integrals - 2 * (np.arange(degree + 1) == 0)).max() > FITS:
            return "latitudes are too uneven for an integral over the sphere"
        return ""

    @cached_property
    def zonal_wavenumbers(self) -> NDArray[np.int64]:
        """(K,) from 0 to half the columns."""
        return np.arange(self.grid.nlon // 2 + 1)

    @cached_property
    def total_wavenumbers(self) -> NDArray[np.int64]:
        """(L,) from 0 to the highest that rows and columns tell."""
        rows, columns = self.grid.nlat, self.grid.nlon
        by_memory = int(np.sqrt(2 * TABLE_BYTES / 8 / rows)) - 2
        return np.arange(min((rows - 1) // 2, (columns - 1) // 2, by_memory) + 1)

    def zonal(self, field_YX: NDArray[np.floating]) -> NDArray[np.float64]:
        """(K,) variance of each zonal wavenumber along latitude circles, their area-weighted mean; from 1 on they add
        up to the mean variance along circles."""
        waves_YK = np.fft.rfft(field_YX, axis=1) / self.grid.nlon
        both_ways = np.where((self.zonal_wavenumbers > 0) & (2 * self.zonal_wavenumbers < self.grid.nlon), 2.0, 1.0)
        shares_Y = self.grid.cell_area_sr / self.grid.cell_area_sr.sum()
        power_K: NDArray[np.float64] = shares_Y @ (np.abs(waves_YK) ** 2) * both_ways
        return power_K

    def total(self, field_YX: NDArray[np.floating]) -> NDArray[np.float64]:
        """(L,) part of the mean square over the sphere in each total wavenumber: the sum over m of |a_lm|^2 / (4 pi),
        with orthonormal spherical harmonics. Exact for fields that have no higher ones."""
        highest = self.total_wavenumbers[-1]
        waves_YM = np.fft.rfft(field_YX, axis=1)[:, : highest + 1] * (2 * np.pi / self.grid.nlon)
        parts_YMP = np.stack([waves_YM.real, waves_YM.imag], axis=-1) * self._weights_Y[:, None, None]
        power_L = np.zeros(highest + 1)
        for order, legendre_LY in enumerate(self._legendre):
            both_ways = 2.0 if order else 1.0
            power_L[order:] += both_ways * ((legendre_LY @ parts_YMP[:, order]) ** 2).sum(axis=1)
        return power_L / (4 * np.pi)

    @cached_property
    def _legendre(self) -> tuple[NDArray[np.float64], ...]:
        """For each order from 0 the orthonormal Legendre functions of degrees from it on, (L, Y) at the rows."""
        highest = int(self.total_wavenumbers[-1])
        table = tuple(np.empty((highest + 1 - order, self.grid.nlat)) for order in range(highest + 1))
        for row, latitude in enumerate(self.grid.latitude):
            every_LM = sph_legendre_p_all(highest, highest, np.pi / 2 - latitude)[0]  # negative orders come last
            for order, legendre_LY in enumerate(table):
                legendre_LY[:, row] = every_LM[order:, order]
        return table

    @cached_property
    def _weights_Y(self) -> NDArray[np.float64]:
        return quadrature(self.grid, 2 * int(self.total_wavenumbers[-1]))


def quadrature(grid: LatLonGrid, degree: int) -> NDArray[np.float64]:
    """(nlat,) weights that integrate polynomials in the sine of latitude exactly up to a degree, from -1 to 1: those
    nearest to the areas of rows."""
    areas_Y = grid.cell_area_sr / grid.cell_area_sr.sum() * 2
    polynomials_KY = np.polynomial.legendre.legvander(np.sin(grid.latitude), degree).T
    wanted_K = np.zeros(degree + 1)
    wanted_K[0] = 2.0
    scaled_KY = polynomials_KY * areas_Y
    change_Y = np.linalg.lstsq(scaled_KY, wanted_K - scaled_KY.sum(axis=1), rcond=None)[0]
    weights_Y: NDArray[np.float64] = areas_Y * (1 + change_Y)
    return weights_Y
