"""What a network sees of fields that it does not see as they are: logarithms, anomalies."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import RunConfig
from ..data.annual_cycle import CYCLE_FILE, NOWHERE, AnnualCycle, CycleFit
from ..data.periods import mask_of
from ..data.statistics import Seen
from ..data.store import Store
from ..data.variables import Variable, logarithm
from ..errors import InputError
from ..files import check_in_reach
from ..observe import READING
from ..spatial.grid import Cuts, Tile
from ..spatial.mesh import ProcessMesh
from .fit import check_store, grid_of, parts_of

if TYPE_CHECKING:
    from .contract import Contract

AT_ONCE, TOGETHER = 8, 16  # frames that a rank reads at once, and how often before all hear of each other


def annual_cycle_of(config: RunConfig, store: Store, mesh: ProcessMesh) -> AnnualCycle:
    """Of the variables that the config wants without it, over the frames of training, on the whole grid. Collective:
    the variables are dealt to replicas, and their tiles read by the ranks of each, some frames at a time, so that
    nobody waits for all of it. On any mesh the same, to the last bit.

    Raises:
        InputError: config and store do not fit each other; see `check_store`.
    """
    anomalies = sorted(config.data.anomalies.items())
    if not anomalies:
        return AnnualCycle()
    check_store(config, store)
    grid, spans = grid_of(config, store), parts_of(config.data, store).train
    cuts = Cuts.even(grid, min(mesh.lat, grid.nlat), min(mesh.lon, grid.nlon))
    frames = np.flatnonzero(mask_of(spans, store.frames)).tolist()
    owns = mesh.index("lat") < cuts.lat and mesh.index("lon") < cuts.lon  # `faconv verify` has any number of ranks
    tile = cuts.tile(mesh.index("lat") * cuts.lon + mesh.index("lon")) if owns else NOWHERE
    whole: dict[str, NDArray[np.float32]] = {}
    for first in range(0, len(anomalies), mesh.replicas):
        turn = anomalies[first : first + mesh.replicas]
        fit = CycleFit(store, *turn[mesh.replica], tile) if owns and mesh.replica < len(turn) else None
        for frame in range(0, len(frames), AT_ONCE):
            if fit is not None:
                with mesh.activity.during(READING):
                    fit.add(frames[frame : frame + AT_ONCE])
            if frame % (AT_ONCE * TOGETHER) == 0:
                mesh.gathered([0.0])
        for replica, (name, harmonics) in enumerate(turn):
            mine = fit.coefficients() if fit is not None and replica == mesh.replica else None
            whole[name] = _assembled(mine, 1 + 2 * harmonics, replica, cuts, mesh)
    return AnnualCycle(whole, Tile((0, grid.nlat), (0, grid.nlon)))


def _assembled(
    mine: NDArray[np.float32] | None, size: int, replica: int, cuts: Cuts, mesh: ProcessMesh
) -> NDArray[np.float32]:
    """(size, nlat, nlon) from what each rank of a replica has of its tile. Collective."""
    whole = np.empty((size, cuts.row_edges[-1], cuts.column_edges[-1]), dtype=np.float32)
    for number in range(cuts.tiles):
        tile = cuts.tile(number)
        rank = replica * mesh.tiles + number // cuts.lon * mesh.lon + number % cuts.lon
        own = torch.from_numpy(mine) if mine is not None and rank == mesh.rank else None
        whole[:, *tile.slices] = mesh.from_rank(own, (size, *tile.shape), rank).cpu().numpy()
    return whole


def kept_cycle(contract: "Contract", places: Sequence[Path], mesh: ProcessMesh) -> Path | None:
    """The file of a contract's annual cycle, of the first of some directories that has it; None: it has none.
    Collective: the first rank looks.

    Raises:
        InputError: none has it as it was.
    """
    if not contract.annual_cycle:
        return None
    found = next(filter(partial(_holds, contract.annual_cycle), places), None) if mesh.rank == 0 else None
    found = mesh.from_first(found)
    if found is None:
        raise InputError(
            f"the annual cycle of the run's variables is missing or damaged: none of {', '.join(map(str, places))} has "
            f"it in {CYCLE_FILE} as it was. Bring it back from a copy of the run, or give another run_dir."
        )
    return found / CYCLE_FILE


def _holds(digest: str, directory: Path) -> bool:
    path = directory / CYCLE_FILE
    try:
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest
    except OSError as error:
        check_in_reach(path, error)
        return False


class Kind(NamedTuple):
    """Of a `Variable`, what it takes to see it as the network does."""

    name: str
    log1p: float | None
    harmonics: int | None


def seen_of(store: Store, variables: Iterable[Variable | Kind], cycle: AnnualCycle) -> Seen:
    """What the network sees of those that it does not see as they are."""
    seen: dict[int, Callable[[NDArray[np.float32], int], NDArray[np.float32]]] = {}
    for one in variables:
        (channel,) = store.channel_indices([one.name])
        if one.log1p is not None:
            seen[channel] = partial(_logarithm, one.log1p, one.name)
        elif one.harmonics is not None:
            seen[channel] = partial(_anomaly, store, cycle, one.name)
    return seen


def _logarithm(scale: float, name: str, field_YX: NDArray[np.float32], frame: int) -> NDArray[np.float32]:
    return logarithm(field_YX, scale, name)


def _anomaly(
    store: Store, cycle: AnnualCycle, name: str, field_YX: NDArray[np.float32], frame: int
) -> NDArray[np.float32]:
    anomaly_YX: NDArray[np.float32] = field_YX - cycle.at(name, store.year_fraction[frame : frame + 1])[0]
    return anomaly_YX
