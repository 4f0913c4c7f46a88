"""The fields of some times: as points of data space, and as composites of those times that belong together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...data.layout import are_synthetic
from ...data.statistics import row_weights
from ...data.times import MONTHS, TimeAxis
from ...data.variables import Variable
from ...errors import InputError
from ...forecasting.campaign import asked_of_data, open_sequences
from ...forecasting.dates import places_of
from ...forecasting.frames import Frames
from ...forecasting.output import Asked
from ...spatial.domain import Domain
from ...spatial.grid import Tile
from ...training.contract import Contract
from ..seasons import Season, seasonal_share_of
from .spaces import Space, coordinates_of

GIB, SHOWN = 2**30, 4
POINT_BYTES, SUM_BYTES, COUNT_BYTES = 4, 8, 4
NOTHING = 1e-5  # of what departs from what is usual: the rounding of means
BLOCK_CELLS = 8192  # whose inner products are formed at once, in float64

Progress = Callable[[int, int], None]
"""Called with (times that are read, times there are)."""


@dataclass(frozen=True, eq=False)
class Record:
    """Fields of some times, which are read one time after the other.

    Attributes:
        frames: of each sequence.
        places: of each time: its sequence, and its frame there.
        memory_bytes: for what is kept of them at once.
        on_earth: False of stores that are synthetic.
    """

    frames: tuple[Frames, ...]
    places: tuple[tuple[int, int], ...]
    contract: Contract
    memory_bytes: int
    on_earth: bool = True

    @classmethod
    def of(
        cls, contract: Contract, axis: TimeAxis, data: Sequence[Path], sequence: str | None, memory_gib: float
    ) -> "Record":
        """The prognostic variables at all times of an axis; raises InputError where the data have not all of them."""
        several = {frames.sequence: frames for frames in open_sequences(contract, data, sequence)}
        wanted = axis.names or (sequence or "",)
        if not set(wanted) <= set(several):
            raise InputError(
                f"embeddings are of {_listed(wanted)}, and --data and --sequence name {_listed(list(several))}. Name "
                f"what was embedded."
            )
        chosen = [several[name] for name in wanted]
        places = list[tuple[int, int]]()
        for number, (frames, own) in enumerate(zip(chosen, axis.sequences, strict=True)):
            found = places_of(frames.states.axis, axis.seconds[own.start : own.stop])
            missing = np.flatnonzero(found < 0)
            if missing.size:
                raise InputError(
                    f"{frames.name} has no fields of {missing.size} of {len(own)} embeddings, the first of "
                    f"{axis.label(own[int(missing[0])])}. Give with --data what was embedded."
                )
            places += [(number, frame) for frame in found.tolist()]
        return cls(tuple(chosen), tuple(places), contract, round(memory_gib * GIB), not are_synthetic(data))

    @property
    def asked(self) -> Asked:
        """What the data are called, and what makes them others."""
        return asked_of_data(*self.frames)

    @property
    def variables(self) -> tuple[Variable, ...]:
        """That are read."""
        return self.contract.channels.prognostic

    @property
    def latitude_deg(self) -> NDArray[np.float64]:
        """(nlat,)"""
        return np.array(self.contract.latitude_deg)

    @property
    def longitude_deg(self) -> NDArray[np.float64]:
        """(nlon,)"""
        return np.array(self.contract.longitude_deg)

    @property
    def tile(self) -> Tile:
        """All of the grid."""
        return Domain(self.contract.grid).tile

    def stride(self, fields: int, value_bytes: int) -> int:
        """The smallest k for which so many fields of every k-th row and column fit into memory."""
        nlat, nlon = self.tile.shape
        stride = 1
        while fields * len(self.variables) * -(-nlat // stride) * -(-nlon // stride) * value_bytes > self.memory_bytes:
            if stride >= max(nlat, nlon):
                raise InputError(
                    f"{fields} times of one cell of {len(self.variables)} variables need more than "
                    f"{self.memory_bytes / GIB:.3g} GiB. Give more with --memory-gib, or embed fewer --times."
                )
            stride += 1
        return stride

    def fields(self, times: Sequence[int], stride: int, progress: Progress) -> Iterator[NDArray[np.float32]]:
        """(C, Y, X) of every k-th row and column, one time after the other; NaN where missing."""
        for number, time in enumerate(times):
            sequence, frame = self.places[time]
            values_TCYX, _ = self.frames[sequence].states.read([frame], self.tile)
            yield values_TCYX[0, :, ::stride, ::stride]
            progress(number + 1, len(times))


@dataclass(frozen=True, eq=False)
class DataSpace:
    """Times as points whose values are the cells of all fields, each variable from 0 (its least value) to 1.

    Attributes:
        space: all cells count the same, as the paper's authors have it.
        eofs_TE: principal components of the same values, weighted by the cells' areas.
        explained: share of the variance that these have.
        seasonal_share: of the variance, as it was found, that lies between calendar months.
        stride: every k-th row and column is taken.
        cells, left_out: how many are taken, of all variables; and how many are not, as they are missing at some time.
    """

    space: Space
    eofs_TE: NDArray[np.float64]
    explained: float
    seasonal_share: float
    stride: int
    cells: int
    left_out: int


def _listed(names: Sequence[str]) -> str:
    if not any(names):
        return "no sequence"
    return f"the sequences {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"


def data_space_of(
    record: Record,
    times: Sequence[int],
    components: int,
    season: Season,
    months_T: NDArray[np.int64],
    progress: Progress,
) -> DataSpace:
    """Of some times of a record, less their season; as many EOFs as an embedding has components."""
    stride, count = record.stride(len(times), POINT_BYTES), len(times)
    nlat, nlon = (-(-size // stride) for size in record.tile.shape)
    values_TCYX = np.empty((count, len(record.variables), nlat, nlon), dtype=np.float32)
    for place, fields_CYX in enumerate(record.fields(times, stride, progress)):
        values_TCYX[place] = fields_CYX
    areas_YX = np.broadcast_to(row_weights(record.latitude_deg, record.longitude_deg)[::stride, None], (nlat, nlon))
    plain_TT, weighed_TT = np.zeros((count, count)), np.zeros((count, count))
    sums_T, cells, left_out = np.zeros(count), 0, 0
    for place, variable in enumerate(record.variables):
        known_YX: NDArray[np.bool_] = np.asarray(np.isfinite(values_TCYX[:, place]).all(0))
        cells, left_out = cells + int(known_YX.sum()), left_out + int((~known_YX).sum())
        if not known_YX.any():
            raise InputError(
                f"{variable.name!r} is missing in every cell at one of {count} times or another in "
                f"{record.asked.told}. Fill it, or embed times that have it."
            )
        for block_TN, areas_N in _scaled_blocks(values_TCYX[:, place], known_YX, areas_YX):
            plain_TT += block_TN @ block_TN.T
            weighed_TT += (block_TN * areas_N) @ block_TN.T
            sums_T += block_TN.sum(1)
    everything = coordinates_of(_centred(season.removed_from_products(weighed_TT)))
    eofs = everything[:, :components]
    explained = float((eofs**2).sum() / max((everything**2).sum(), np.finfo(np.float64).tiny))
    share = seasonal_share_of(coordinates_of(plain_TT), months_T)
    products_TT, sums_T = season.removed_from_products(plain_TT), season.removed_from(sums_T[:, None])[:, 0]
    space = Space.of_products("data space", products_TT, cells, sums_T)
    return DataSpace(space, eofs, explained, share, stride, cells, left_out)


def _scaled_blocks(
    values_TYX: NDArray[np.float32], known_YX: NDArray[np.bool_], areas_YX: NDArray[np.float64]
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Some cells after the other, from 0 to 1 between the least and the greatest of all; and their areas."""
    values_TN, cells = values_TYX.reshape(len(values_TYX), -1), np.flatnonzero(known_YX)
    blocks = [cells[first : first + BLOCK_CELLS] for first in range(0, cells.size, BLOCK_CELLS)]
    least = min(float(values_TN[:, block].min()) for block in blocks)
    greatest = max(float(values_TN[:, block].max()) for block in blocks)
    for block in blocks:
        scaled = (values_TN[:, block].astype(np.float64) - least) / ((greatest - least) or 1.0)
        yield scaled, areas_YX.ravel()[block]


def _centred(products_TT: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inner products of what departs from the mean of all points."""
    means = products_TT.mean(0)
    centred: NDArray[np.float64] = products_TT - means[:, None] - means[None, :] + means.mean()
    return centred


@dataclass(frozen=True, eq=False)
class Composites:
    """Mean fields of regimes, as they depart from what is usual; NaN where always missing.

    Attributes:
        anomaly_KCYX: from the mean of all times, in units.
        beyond_season_KCYX: from the mean of each time's calendar month.
        latitude_deg, longitude_deg: of the rows and columns that were taken.
        areas_Y: of a cell of each row, relative.
        stride: every k-th.
    """

    anomaly_KCYX: NDArray[np.float64]
    beyond_season_KCYX: NDArray[np.float64]
    latitude_deg: NDArray[np.float64]
    longitude_deg: NDArray[np.float64]
    areas_Y: NDArray[np.float64]
    stride: int

    @property
    def are_seasons_alone(self) -> bool:
        """Whether no regime departs from its months, as where all times of a month are of one regime."""
        beyond, all_of_it = (np.nanmax(np.abs(one)) for one in (self.beyond_season_KCYX, self.anomaly_KCYX))
        return bool(beyond <= NOTHING * all_of_it)


def composites_of(
    record: Record, labels_T: NDArray[np.integer], months_T: NDArray[np.integer], progress: Progress
) -> Composites:
    """Of clusters of all times of a record, labelled from 0."""
    clusters, variables = int(labels_T.max()) + 1, len(record.variables)
    groups = clusters + MONTHS
    stride = record.stride(2 * groups + clusters * MONTHS * COUNT_BYTES // SUM_BYTES, SUM_BYTES)
    shape = (variables, *(-(-size // stride) for size in record.tile.shape))
    sums, pairs = np.zeros((groups, *shape)), np.zeros((clusters, MONTHS, *shape), dtype=np.int32)
    for time, fields_CYX in enumerate(record.fields(range(len(labels_T)), stride, progress)):
        known = np.isfinite(fields_CYX)
        cluster, month = int(labels_T[time]), int(months_T[time]) - 1
        pairs[cluster, month] += known
        for group in (cluster, clusters + month):
            sums[group] += np.where(known, fields_CYX, 0.0)
    counts = np.concatenate([pairs.sum(1), pairs.sum(0)])
    with np.errstate(invalid="ignore"):
        means = sums / counts
        overall = sums[:clusters].sum(0) / counts[:clusters].sum(0)
        usual = sum(pairs[:, month] * np.nan_to_num(means[clusters + month]) for month in range(MONTHS))
        usual = usual / counts[:clusters]  # the months of those times alone that are known in a cell, as its mean is
    latitude, longitude = record.latitude_deg, record.longitude_deg
    return Composites(
        means[:clusters] - overall,
        means[:clusters] - usual,
        latitude[::stride],
        longitude[::stride],
        row_weights(latitude, longitude)[::stride],
        stride,
    )
