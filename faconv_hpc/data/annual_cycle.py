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

from ..errors import InputError
from ..files import check_in_reach
from ..spatial.grid import Tile
from .periods import mask_of
from .store import Store

CYCLE_FILE = "annual-cycle.safetensors"
AT_ONCE = 8  # frames that are read
NOWHERE = Tile((0, 0), (0, 0))
DISTINCT = 1e-6  # of the largest eigenvalue: less is no information


@dataclass(frozen=True)
class AnnualCycle:
    """What fields are at a time of the year, in each cell of a tile, as the frames of training tell.

    ``c(f) = a_0 + sum over k of a_k cos(2 pi k f) + b_k sin(2 pi k f)``, f the fraction of the year that has gone by,
    by least squares over all frames of training in which the cell is known; a smooth climatology by day of year
    (Narapusetty, DelSole & Tippett, J. Climate 22, 2009). Without harmonics it is the mean of the cell.

    Attributes:
        coefficients: by variable, (1 + 2 harmonics, Y, X) float32: a_0, a_1, b_1, a_2, ...
        tile: which cells these are.
    """

    coefficients: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    tile: Tile = NOWHERE

    @classmethod
    def of(cls, store: Store, spans: Iterable[range], harmonics: Mapping[str, int], tile: Tile) -> "AnnualCycle":
        """Fitted to spans of frames. Reads; to the last bit the same on any tiling.

        Args:
            harmonics: how many of each variable.

        Raises:
            InputError: files that are missing or damaged.
        """
        frames = np.flatnonzero(mask_of(spans, store.frames)).tolist()
        return cls({name: _fitted(store, frames, name, count, tile) for name, count in harmonics.items()}, tile)

    @classmethod
    def read(cls, path: Path, names: Sequence[str], tile: Tile) -> "AnnualCycle":
        """Of a tile, from the file of the whole grid.

        Raises:
            InputError: it cannot be read.
        """
        try:
            with safe_open(path, "numpy") as stored:
                return cls({name: stored.get_slice(name)[:, *tile.slices] for name in names}, tile)
        except (OSError, SafetensorError) as error:
            check_in_reach(path, error)
            raise InputError(f"{path} cannot be read: {error}. Bring it back from a checkpoint of the run.") from None

    def part(self, tile: Tile) -> "AnnualCycle":
        """That of a tile in this one; a copy."""
        (top, left), (rows, columns) = (self.tile.rows[0], self.tile.columns[0]), (tile.rows, tile.columns)
        place = np.s_[:, rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]
        return AnnualCycle({name: values[place].copy() for name, values in self.coefficients.items()}, tile)

    def at(self, name: str, year_fraction_T: NDArray[np.float64]) -> NDArray[np.float32]:
        """(T, Y, X) at some times of the year, in the variable's units."""
        coefficients_KYX = self.coefficients[name]
        weights_TK = basis(year_fraction_T, len(coefficients_KYX) // 2).astype(np.float32)
        return np.stack([_combined(weights_K, coefficients_KYX) for weights_K in weights_TK])

    def bytes(self) -> bytes:
        """What its file holds."""
        raw: bytes = save({name: np.ascontiguousarray(value) for name, value in sorted(self.coefficients.items())})
        return raw

    @property
    def digest(self) -> str:
        """SHA-256 of its file; empty where there is nothing in it."""
        return hashlib.sha256(self.bytes()).hexdigest() if self.coefficients else ""


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
    """How many times tell apart: the longest gap between them is shorter than a 1 / (1 + 2 harmonics) of the year."""
    gap, _ = widest_gap(year_fraction)
    return max(int(np.ceil((1 / gap - 1) / 2)) - 1, 0)


def _combined(weights: Iterable[Any], parts: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """Their weighted sum, cell by cell in one order, which a matrix product would not keep on tiles of any size."""
    terms = (weight * part for weight, part in zip(weights, parts, strict=True))
    whole: NDArray[Any] = next(terms)
    for term in terms:
        whole += term
    return whole


def _fitted(store: Store, frames: Sequence[int], name: str, harmonics: int, tile: Tile) -> NDArray[np.float32]:
    """(K, Y, X) by the normal equations, in float64; where the times of a cell do not tell all apart, the least of them
    that fits."""
    (channel,) = store.channel_indices([name])
    basis_TK = basis(store.year_fraction[frames], harmonics)
    size = basis_TK.shape[1]
    products_KYX = np.zeros((size, *tile.shape))
    misses = store.misses_some([channel])
    grams_KKYX = np.zeros((size, size, *tile.shape)) if misses else None
    for first in range(0, len(frames), AT_ONCE):
        fields_TCYX, known_TCYX = store.read(frames[first : first + AT_ONCE], tile, [channel])
        for at, weights_K in enumerate(basis_TK[first : first + AT_ONCE]):
            field_YX = fields_TCYX[at, 0].astype(np.float64)
            if grams_KKYX is not None:
                known_YX = np.ones(tile.shape, dtype=bool) if known_TCYX is None else known_TCYX[at, 0]
                field_YX[~known_YX] = 0.0
                grams_KKYX += np.where(known_YX, np.outer(weights_K, weights_K)[..., None, None], 0.0)
            for row_YX, weight in zip(products_KYX, weights_K, strict=True):
                row_YX += weight * field_YX
    if grams_KKYX is None:
        inverse_KK = np.linalg.pinv(basis_TK.T @ basis_TK, rcond=DISTINCT, hermitian=True)
        solved = [_combined(row, products_KYX) for row in inverse_KK]
    else:
        inverse_YXKK = np.linalg.pinv(np.moveaxis(grams_KKYX, (0, 1), (2, 3)), rcond=DISTINCT, hermitian=True)
        solved = [_combined(np.moveaxis(inverse_YXKK[..., row, :], 2, 0), products_KYX) for row in range(size)]
    return np.stack(solved).astype(np.float32)
