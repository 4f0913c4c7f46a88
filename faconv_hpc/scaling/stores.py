"""The data of a study's points: found, or made where the work of a rank is to stay the same."""

from collections.abc import Callable, Sequence

from ..data.store import Store
from ..errors import InputError
from ..prepare.synthetic import SyntheticOptions, synthesise
from ..spatial.grid import Cuts
from .study import Point, StudyConfig

VALUE_BYTES = 4  # float32


def make_stores(study: StudyConfig, points: Sequence[Point], say: Callable[[str], None]) -> None:
    """Makes the synthetic stores that are not there yet; one that was cut short is finished.

    Args:
        say: is told what is made, as large ones take minutes.
    """
    if study.cells_per_rank is None or study.channels is None:
        return
    for point in points:
        mesh, store = point.run.mesh, point.run.data.store
        if _is_finished(point):
            continue
        nlat, nlon = study.cells_per_rank[0] * mesh.lat, study.cells_per_rank[1] * mesh.lon
        frames = int(store.name.rpartition("x")[2])
        size_gb = nlat * nlon * study.channels * frames * VALUE_BYTES / 1e9
        say(f"making {store}: {frames} frames of {study.channels} channels on {nlat} x {nlon} cells, {size_gb:.2g} GB")
        options = SyntheticOptions(nlat, nlon, study.channels, frames)
        synthesise(store, options, mesh=(mesh.lat, mesh.lon), command=f"faconv study, point {point.name}")


def _is_finished(point: Point) -> bool:
    try:
        Store.open(point.run.data.store).close()
    except InputError:
        return False
    return True


def check_stores(points: Sequence[Point]) -> None:
    """Judges what only runs and stores together can tell, before any job is started.

    Raises:
        InputError: a store that is not there, a variable that is not in it, more tiles than cells.
    """
    for point in points:
        data, mesh = point.run.data, point.run.mesh
        with Store.open(data.store) as store:
            store.channel_indices(data.variables or ())
            try:
                Cuts.even(
                    store.grid(lat_boundary=data.lat_boundary, lon_boundary=data.lon_boundary), mesh.lat, mesh.lon
                )
            except InputError as error:
                raise InputError(f"point {point.name}: {error}") from None
