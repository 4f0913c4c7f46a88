"""The data of a study's points: what is there, and what is wanted where the work of a rank is to stay the same."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.store import Store
from ..errors import InputError
from ..training.fit import check_fits
from .study import Point, StudyConfig

VALUE_BYTES = 4  # float32


@dataclass(frozen=True)
class WantedStore:
    """A synthetic store that a weak study needs: tiles of one size for every rank."""

    path: Path
    point: str
    nlat: int
    nlon: int
    channels: int
    frames: int
    mesh: tuple[int, int]

    @property
    def told(self) -> str:
        """For people, who wait for it: large ones take minutes."""
        size_gb = self.nlat * self.nlon * self.channels * self.frames * VALUE_BYTES / 1e9
        return (
            f"making {self.path}: {self.frames} frames of {self.channels} channels on {self.nlat} x {self.nlon} "
            f"cells, {size_gb:.2g} GB"
        )


def missing_stores(study: StudyConfig, points: Sequence[Point]) -> Iterator[WantedStore]:
    """Those that are not there yet, or were cut short; each is looked for when it is asked for."""
    if study.cells_per_rank is None or study.channels is None:
        return
    rows, columns = study.cells_per_rank
    for point in points:
        mesh, path = point.run.mesh, point.run.data.store
        if not _is_finished(point):
            frames = int(path.name.rpartition("x")[2])
            sizes = rows * mesh.lat, columns * mesh.lon, study.channels, frames
            yield WantedStore(path, point.name, *sizes, (mesh.lat, mesh.lon))


def _is_finished(point: Point) -> bool:
    try:
        Store.open(point.run.data.store).close()
    except InputError:
        return False
    return True


def check_stores(points: Sequence[Point], *, here: bool) -> None:
    """Judges what only runs and stores together can tell, before any job is started; see `check_fits`."""
    for point in points:
        try:
            check_fits(point.run, here=here)
        except InputError as error:
            raise InputError(f"point {point.name}: {error}") from None
