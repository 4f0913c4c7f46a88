"""The contract of a run: what its network was trained on, and needs to be used."""

from functools import cached_property
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from ..config import RunConfig
from ..data.layout import same_units
from ..data.statistics import Statistics, merged, moments_of, pieces_of
from ..data.store import Store
from ..data.times import IRREGULAR_S, SECONDS_PER_HOUR
from ..errors import InputError
from ..spatial.grid import SAME_DEG, Boundary, LatLonGrid
from ..spatial.mesh import ProcessMesh
from .fit import grid_of, training_frames


class Variable(BaseModel):
    """A field of the network: how it is called, in what units, and its statistics over the frames of training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    units: str
    mean: float
    std: float
    tendency_std: float


class Contract(BaseModel):
    """Made once, at a run's first start, of its config and store; it stands in every checkpoint and every export.

    Whatever comes later takes statistics, grid and names from here, never from a store.

    Attributes:
        variables: in the order of the network's channels.
        forcings: names of computed inputs.
        may_miss: whether fields may have missing cells: the network has an input for each that says where.
        latitude_deg, longitude_deg: of the grid, north first and increasing.
        north, south, lon: boundaries, see `LatLonGrid`.
        step_hours: from a frame to the next; None: steps may differ (``data.allow_irregular_time``).
        calendar: of the times.
        first, last: dates of the frames of training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    variables: tuple[Variable, ...]
    forcings: tuple[str, ...]
    may_miss: bool
    latitude_deg: tuple[float, ...]
    longitude_deg: tuple[float, ...]
    north: Boundary
    south: Boundary
    lon: Boundary
    step_hours: float | None
    calendar: str
    first: str
    last: str

    @property
    def names(self) -> tuple[str, ...]:
        """Of the variables."""
        return tuple(variable.name for variable in self.variables)

    @cached_property
    def statistics(self) -> Statistics:
        """Of the variables."""
        rows = [(one.mean, one.std, one.tendency_std) for one in self.variables]
        return Statistics(*np.array(rows, dtype=np.float64).T)

    @cached_property
    def grid(self) -> LatLonGrid:
        """With its boundaries."""
        return LatLonGrid(
            len(self.latitude_deg),
            len(self.longitude_deg),
            latitude_deg=np.array(self.latitude_deg),
            longitude_deg=np.array(self.longitude_deg),
            lat_boundary=(self.north, self.south),
            lon_boundary=self.lon,
        )

    def check(self, store: Store) -> None:
        """Holds data to the contract.

        Raises:
            InputError: a variable is not there or in other units, or grid, step or calendar differ, or cells are
                missing where none were in training; with both values.
        """
        channels = store.channel_indices(self.names)
        for variable, index in zip(self.variables, channels, strict=True):
            if not same_units(variable.units, store.units[index]):
                raise self._refusal(
                    store.path,
                    f"{variable.name!r} in {variable.units or 'no units'}",
                    f"it in {store.units[index] or 'no units'}",
                    "Convert it in the source, and prepare the store again.",
                )
        for name in ("latitude_deg", "longitude_deg"):
            mine, others = np.array(getattr(self, name)), getattr(store, name)
            if mine.shape != others.shape or np.abs(mine - others).max() > SAME_DEG:
                raise self._refusal(store.path, f"{name} {_range(mine)}", _range(others), "Regrid the source.")
        self._check_times(store)
        if store.misses_some(channels) and not self.may_miss:
            raise self._refusal(
                store.path,
                "fields without missing cells",
                "some that are missing",
                "Fill them in the source, or leave those frames out with --from and --to.",
            )

    def _check_times(self, store: Store) -> None:
        if self.calendar != store.calendar:
            raise self._refusal(store.path, f"the calendar {self.calendar}", store.calendar, "See --calendar.")
        if self.step_hours is not None and abs(self.step_hours - store.step_hours) * SECONDS_PER_HOUR > IRREGULAR_S:
            raise self._refusal(
                store.path,
                f"steps of {self.step_hours:g} h",
                f"steps of {store.step_hours:g} h",
                "Thin out the source with --every, or interpolate it.",
            )

    def _refusal(self, path: Path, trained: str, found: str, way_out: str) -> InputError:
        return InputError(f"the network was trained on {trained}, the store {path} has {found}. {way_out}")


def make_contract(config: RunConfig, store: Store, mesh: ProcessMesh) -> Contract:
    """Of a run that begins. Collective: each rank sums up some files.

    Statistics are of the frames of training alone, and the same on every mesh.
    """
    names = store.channels if config.data.variables is None else config.data.variables
    frames, channels = training_frames(config, store), store.channel_indices(names)
    pieces = pieces_of(store, frames, channels)
    mine = [moments_of(store, piece, frames) for piece in pieces[mesh.rank :: mesh.ranks]]
    dealt = mesh.gathered_objects(mine)
    found = merged(dealt[place % mesh.ranks][place // mesh.ranks] for place in range(len(pieces)))
    statistics = Statistics.of(found[channel] for channel in channels)
    grid = grid_of(config, store)
    return Contract(
        variables=tuple(
            Variable(name=name, units=store.units[channel], mean=mean, std=std, tendency_std=tendency_std)
            for name, channel, (mean, std, tendency_std) in zip(names, channels, statistics.rows.tolist(), strict=True)
        ),
        forcings=config.data.forcings,
        may_miss=store.misses_some(channels),
        latitude_deg=tuple(store.latitude_deg.tolist()),
        longitude_deg=tuple(store.longitude_deg.tolist()),
        north=grid.north,
        south=grid.south,
        lon=Boundary(grid.lon_boundary),
        step_hours=None if config.data.allow_irregular_time else store.step_hours,
        calendar=store.calendar,
        first=store.layout.time.label(frames.start),
        last=store.layout.time.label(frames.stop - 1),
    )


def _range(values: np.ndarray) -> str:
    return f"of {values.size} values from {values[0]:g} to {values[-1]:g}"
