"""The annual cycle of each cell, for networks that see departures from it: anomalies."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..errors import InputError, TryAgainError
from ..files import check_in_reach
from ..spatial.grid import Tile
from .store import Store

CYCLE_FILE = "annual-cycle.safetensors"
NOWHERE = Tile((0, 0), (0, 0))
DISTINCT = 1e-3  # of the largest eigenvalue of the normal equations
PER_COEFFICIENT = 3  # frames, at least


@dataclass(frozen=True)
class AnnualCycle:
    """What fields are at a time of the year, in each cell of a tile, as the frames of training tell.

    ``c(f) = a_0 + sum over k of a_k cos(2 pi k f) + b_k sin(2 pi k f)``, f the fraction of the year that has gone by,
    by least squares over all frames of training in which the cell is known (`CycleFit`); a smooth climatology by day
    of year (Narapusetty, DelSole & Tippett, J. Climate 22, 2009). Without harmonics it is the mean of the cell.

    Attributes:
        coefficients: by variable, (1 + 2 harmonics, Y, X) float32: a_0, a_1, b_1, a_2, ...
        tile: which cells these are.
    """

    coefficients: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    tile: Tile = NOWHERE

    @classmethod
    def read(cls, path: Path, names: Sequence[str], tile: Tile) -> "AnnualCycle":
        """Of a tile, from the file of the whole grid.

        Raises:
            InputError: it cannot be read.
        """
        try:
            with safe_open(path, "numpy") as stored:
                return cls({name: stored.get_slice(name)[:, *tile.slices] for name in names}, tile)
        except FileNotFoundError:
            raise TryAgainError(
                f"{path} is not to be seen from this node, although it was found. Start the same command again."
            ) from None
        except (OSError, SafetensorError) as error:
            check_in_reach(path, error)
            raise InputError(f"{path} cannot be read: {error}. Bring it back from a checkpoint of the run.") from None

    def part(self, tile: Tile) -> "AnnualCycle":
        """That of a tile in this one."""
        if tile == self.tile:
            return self
        (top, left), (rows, columns) = (self.tile.rows[0], self.tile.columns[0]), (tile.rows, tile.columns)
        place = np.s_[:, rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]
        return AnnualCycle({name: values[place].copy() for name, values in self.coefficients.items()}, tile)

    def at(self, name: str, year_fraction_T: NDArray[np.float64]) -> NDArray[np.float32]:
        """(T, Y, X) at some times of the year, in the variable's units."""
        coefficients_KYX = self.coefficients[name]
        weights_TK = basis(year_fraction_T, len(coefficients_KYX) // 2).astype(np.float32)
        return np.stack([_combined(weights_K, coefficients_KYX) for weights_K in weights_TK])

    def content(self) -> bytes:
        """What its file holds."""
        raw: bytes = save({name: np.ascontiguousarray(value) for name, value in sorted(self.coefficients.items())})
        return raw

    @property
    def digest(self) -> str:
        """SHA-256 of its file; empty where there is nothing in it."""
        return hashlib.sha256(self.content()).hexdigest() if self.coefficients else ""


def basis(year_fraction: NDArray[np.float64], harmonics: int) -> NDArray[np.float64]:
    """(T, 1 + 2 harmonics): 1, cos(2 pi f), sin(2 pi f), cos(4 pi f), ..."""
    angles = 2 * np.pi * np.outer(year_fraction, np.arange(1, harmonics + 1))
    pairs = np.stack([np.cos(angles), np.sin(angles)], axis=-1).reshape(len(year_fraction), 2 * harmonics)
    return np.concatenate([np.ones((len(year_fraction), 1)), pairs], axis=1)


def widest_gap(year_fraction: NDArray[np.float64]) -> tuple[float, float]:
    """(its length, where it begins) of the longest part of the year in which none of the times lies."""
    times = np.unique(year_fraction)
    gaps = np.diff(times, append=times[0] + 1.0)
    widest = int(np.argmax(gaps))
    return float(gaps[widest]), float(times[widest])


def most_harmonics(year_fraction: NDArray[np.float64]) -> int:
    """How many so many times tell apart: the longest gap between them is shorter than a 1 / (1 + 2 harmonics) of the
    year, and there are three for each coefficient."""
    gap, _ = widest_gap(year_fraction)
    by_number = (len(year_fraction) // PER_COEFFICIENT - 1) // 2
    return max(min(int(np.ceil((1 / gap - 1) / 2)) - 1, by_number), 0)


def _combined(weights: Iterable[Any], parts: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """Their weighted sum, cell by cell in one order, which a matrix product would not keep on tiles of any size."""
    terms = (weight * part for weight, part in zip(weights, parts, strict=True))
    whole: NDArray[Any] = next(terms)
    for term in terms:
        whole += term
    return whole


class CycleFit:
    """Fits the cycle of one variable on a tile, from frames that come one after the other; in float64.

    A cell that is known at all times of the frames has their normal equations; one that misses some has its own, of
    1 + 4 harmonics sums: products of waves are waves. Both are solved about the mean of the cell, and what its times
    hardly tell of a wave (`DISTINCT`) is none: out of the season in which it is known its cycle stays near that mean.
    """

    def __init__(self, store: Store, name: str, harmonics: int, tile: Tile) -> None:
        self._store, self._tile, self._harmonics = store, tile, harmonics
        (self._channel,) = store.channel_indices([name])
        self._products_KYX = np.zeros((1 + 2 * harmonics, *tile.shape))
        self._misses = store.misses_some([self._channel])
        self._waves_MYX = np.zeros((1 + 4 * harmonics, *(tile.shape if self._misses else (1, 1))))

    def add(self, frames: Sequence[int]) -> None:
        """Reads and takes in some frames."""
        fields_TCYX, known_TCYX = self._store.read(frames, self._tile, [self._channel])
        waves_TM = basis(self._store.year_fraction[list(frames)], 2 * self._harmonics)
        for at, waves_M in enumerate(waves_TM):
            field_YX = fields_TCYX[at, 0].astype(np.float64)
            known_YX = known_TCYX[at, 0] if known_TCYX is not None and self._misses else np.True_
            for sum_YX, wave in zip(self._products_KYX, waves_M, strict=False):
                np.add(sum_YX, wave * field_YX, out=sum_YX, where=known_YX)
            for sum_YX, wave in zip(self._waves_MYX, waves_M, strict=True):
                np.add(sum_YX, wave, out=sum_YX, where=known_YX)

    def coefficients(self) -> NDArray[np.float32]:
        """(K, Y, X); 0 where a cell was never known."""
        solved_KYX = np.empty_like(self._products_KYX)
        for row in range(self._tile.shape[0]):  # what it takes of memory is that of a row
            own = min(row, self._waves_MYX.shape[1] - 1)
            solved_KYX[:, row] = _solved(self._waves_MYX[:, own], self._products_KYX[:, row], self._harmonics)
        return solved_KYX.astype(np.float32)


def _solved(waves_MX: NDArray[np.float64], products_KX: NDArray[np.float64], harmonics: int) -> NDArray[np.float64]:
    """(K, X) of a row, cell by cell."""
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_X = np.nan_to_num(products_KX[0] / waves_MX[0])
        means_HX = np.nan_to_num(waves_MX[1 : 1 + 2 * harmonics] / waves_MX[0])
    gram_XHH = np.moveaxis(_products_of_waves(waves_MX, harmonics), 2, 0)
    gram_XHH = gram_XHH - (waves_MX[0] * means_HX).T[:, :, None] * means_HX.T[:, None, :]
    inverse_XHH = np.linalg.pinv(gram_XHH, rcond=DISTINCT, hermitian=True)
    about_HX = products_KX[1:] - means_HX * products_KX[0]
    found = [_combined(np.moveaxis(inverse_XHH[:, row], 1, 0), about_HX) for row in range(2 * harmonics)]
    first_X = mean_X - sum((means * part for means, part in zip(means_HX, found, strict=True)), np.zeros_like(mean_X))
    return np.stack([first_X, *found])


def _products_of_waves(waves_MX: NDArray[np.float64], harmonics: int) -> NDArray[np.float64]:
    """(H, H, X) sums of products of two waves, from sums of waves of their differences and sums."""
    cosines = [waves_MX[0], *waves_MX[1::2]]
    sines = [np.zeros_like(waves_MX[0]), *waves_MX[2::2]]
    gram_HHX = np.empty((2 * harmonics, 2 * harmonics, waves_MX.shape[1]))
    for a in range(1, harmonics + 1):
        for b in range(1, harmonics + 1):
            i, j, away = 2 * (a - 1), 2 * (b - 1), np.sign(b - a) * sines[abs(b - a)]
            gram_HHX[i, j] = (cosines[abs(a - b)] + cosines[a + b]) / 2
            gram_HHX[i + 1, j + 1] = (cosines[abs(a - b)] - cosines[a + b]) / 2
            gram_HHX[i, j + 1] = (sines[a + b] + away) / 2
            gram_HHX[j + 1, i] = gram_HHX[i, j + 1]
    return gram_HHX
