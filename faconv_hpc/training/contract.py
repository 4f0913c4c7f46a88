"""The contract of a run: what its network was trained on, and needs to be used."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from ..config import DataConfig, RunConfig
from ..data.annual_cycle import AnnualCycle
from ..data.moments import ChannelMoments
from ..data.periods import frames_within, is_there, ranges_of, stretches_of
from ..data.statistics import Seen, Statistics, Stretches, merged, moments_of, pieces_of
from ..data.store import Store
from ..data.times import IRREGULAR_S, SECONDS_PER_HOUR
from ..data.units import hint, same_units
from ..data.unknown_names import index_of
from ..data.variables import Channels, Role, Variable
from ..errors import InputError
from ..observe import READING
from ..spatial.grid import Boundary, LatLonGrid, Tile, are_same_deg
from ..spatial.mesh import ProcessMesh
from .fit import check_store, grid_of, loss_weight_of, names_of, parts_of
from .seen import Kind, annual_cycle_of, seen_of

PIECES = 64  # kept moments of so many files that a rank reads before all hear of them
SAME = 1e-6  # of a statistic's size, and of the field's deviation: files of other sizes are summed in another order


class Contract(BaseModel):
    """Made once, at a run's first start, of its config and store; it stands in every checkpoint and every export.

    Whatever comes later takes statistics, grid and names from here, never from a store.

    Attributes:
        variables: with their roles, as the config names them; see `Channels` for their order in the network.
        forcings: names of computed inputs.
        latitude_deg, longitude_deg: of the grid, north first and increasing.
        north, south, lon: boundaries, see `LatLonGrid`.
        step_hours: smallest and largest from a frame to the next; what differs more is a gap.
        calendar: of the times.
        training: dates and sequences of the frames of training, see `periods.frames_within`.
        validation, test: those that were kept from it.
        store: digest of the store that it was made of.
        annual_cycle: digest of that of the variables that have harmonics; see `AnnualCycle`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    variables: tuple[Variable, ...]
    forcings: tuple[str, ...]
    latitude_deg: tuple[float, ...]
    longitude_deg: tuple[float, ...]
    north: Boundary
    south: Boundary
    lon: Boundary
    step_hours: tuple[float, float]
    calendar: str
    training: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    store: str
    annual_cycle: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the variables."""
        return tuple(variable.name for variable in self.variables)

    @cached_property
    def channels(self) -> Channels:
        """Where the variables stand in what the network takes and gives."""
        return Channels(self.variables, self.forcings)

    @property
    def harmonics(self) -> dict[str, int]:
        """Of the annual cycles of the variables that have one."""
        return {one.name: one.harmonics for one in self.variables if one.harmonics is not None}

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

    @property
    def globe(self) -> Tile:
        """All of the grid."""
        return Tile((0, len(self.latitude_deg)), (0, len(self.longitude_deg)))

    def training_spans(self, store: Store) -> tuple[range, ...]:
        """The frames of a store at the dates, and of the sequences, of training; there may be others."""
        axis = store.layout.time
        return frames_within(axis, [text for text in self.training if is_there(axis, text)])

    def check(self, store: Store, roles: Collection[Role] = get_args(Role)) -> None:
        """Holds data to the contract.

        Args:
            roles: of the variables that are asked for.

        Raises:
            InputError: a variable is not there or in other units, or grid, step or calendar differ, or cells are
                missing where none were in training; with both values.
        """
        where = f"the store {store.path}"
        for variable in (one for one in self.variables if one.role in roles):
            if variable.role == "static":
                index = index_of("static variable", variable.name, store.static_names, f"store {store.path}")
                static = store.static[index]
                self.check_units(variable, static.channel.units, where)
                self.check_static(variable, static.mean, static.std, where)
                continue
            (index,) = store.channel_indices([variable.name])
            self.check_units(variable, store.units[index], where)
            if store.misses_some([index]) and not variable.may_miss:
                raise self._refusal(
                    where,
                    f"a {variable.name!r} without missing cells",
                    "some that are missing",
                    "Fill them in the source, or leave those frames out with --from and --to.",
                )
        self.check_grid(store.latitude_deg, store.longitude_deg, where)
        self._check_times(store, where)

    def check_grid(self, latitude_deg: NDArray[np.float64], longitude_deg: NDArray[np.float64], where: str) -> None:
        """Raises InputError for another grid; ``where`` names the data."""
        for name, others in (("latitude_deg", latitude_deg), ("longitude_deg", longitude_deg)):
            mine = np.array(getattr(self, name))
            if not are_same_deg(mine, others):
                way_out = _rolled(mine, others) if name == "longitude_deg" else ""
                raise self._refusal(where, f"{name} {_range(mine)}", _range(others), way_out or "Regrid the source.")

    def check_units(self, variable: Variable, units: str, where: str) -> None:
        """Raises InputError for a variable in other units than it was trained in; ``where`` names the data."""
        if not same_units(variable.units, units):
            raise self._refusal(
                where,
                f"{variable.name!r} in {variable.units or 'no units'}",
                f"it in {units or 'no units'}",
                f"Convert it in the source, and prepare the store again.{hint(variable.units, units)}",
            )

    def check_static(self, variable: Variable, mean: float, std: float, where: str) -> None:
        """Raises InputError for another field without time; ``where`` names the data."""
        if not variable.inherited and not _are_close(variable, (mean, std, 0.0)):
            raise self._refusal(
                where,
                f"a {variable.name!r} of mean {variable.mean:.7g} and deviation {variable.std:.7g} {variable.units}",
                f"one of {mean:.7g} and {std:.7g}",
                "Use the same field: it is what the network knows the place by.",
            )

    def _check_times(self, store: Store, where: str) -> None:
        if self.calendar != store.calendar:
            raise self._refusal(where, f"the calendar {self.calendar}", store.calendar, "See --calendar.")
        mine, others = self.step_hours, _steps_of(store, [range(store.frames)])
        margin = IRREGULAR_S / SECONDS_PER_HOUR
        if others[1] and (others[0] < mine[0] - margin or others[1] > mine[1] + margin):
            told, found = (
                f"steps of {' to '.join(f'{one:g}' for one in sorted(set(pair)))} h" for pair in (mine, others)
            )
            raise self._refusal(where, told, found, "Thin out the source with --every, or interpolate it.")

    def _refusal(self, where: str, trained: str, found: str, way_out: str) -> InputError:
        return InputError(f"the network was trained on {trained}, {where} has {found}. {way_out}")


def check_same_data(
    contract: Contract, store: Store, mesh: ProcessMesh, cycle: Callable[[], AnnualCycle] = AnnualCycle
) -> None:
    """Holds a store with which training goes on to what it began with. Collective.

    Another store of the same data has the same statistics over the frames of training.

    Args:
        cycle: reads that of the whole grid, where the network sees anomalies.

    Raises:
        InputError: it has not, for some variable; with both values.
    """
    if store.digest == contract.store:
        return
    stretches = stretches_of(store.layout.time, contract.training_spans(store))
    fields = contract.channels.fields
    now = _statistics(store, stretches, [one.name for one in fields], seen_of(store, fields, cycle()), mesh)
    for variable in (one for one in contract.channels.fields if not one.inherited):
        others = now[variable.name]
        if not _are_close(variable, others):
            mine = (variable.mean, variable.std, variable.tendency_std)
            told = (", ".join(f"{value:.7g}" for value in row) for row in (mine, others))
            units = variable.units if variable.log1p is None else f"(of log(1 + x / {variable.log1p:g}))"
            units += " (less its annual cycle)" if variable.harmonics is not None else ""
            raise InputError(
                f"the run was trained on a {variable.name!r} of mean, deviation and deviation of the change "
                f"{next(told)} {units}, the store {store.path} has {next(told)} at the same dates. A run goes "
                f"on as it began: bring the store back, or give another run_dir."
            )


def _are_close(variable: Variable, others: Sequence[float] | NDArray[np.float64]) -> bool:
    """Whether mean and deviations of the same data, summed up in another order, may be those of a variable."""
    mine = np.array([variable.mean, variable.std, variable.tendency_std])
    return bool((np.abs(mine - others) <= SAME * (np.abs(mine) + variable.std)).all())


def make_contract(
    config: RunConfig,
    store: Store,
    mesh: ProcessMesh,
    before: Contract | None = None,
    cycle: AnnualCycle | None = None,
) -> Contract:
    """Of a run that begins. Collective: each rank sums up some files.

    Statistics are of the frames of training alone, and the same on every mesh.

    Args:
        before: of the network whose weights the run begins with: it knows its variables by their statistics of then.
        cycle: of the variables that the network sees without it, on the whole grid. Default: `annual_cycle_of`.

    Raises:
        InputError: config and store do not fit each other; see `check_store`.
    """
    check_store(config, store)
    data, axis = config.data, store.layout.time
    names = names_of(data, store)
    spans = parts_of(data, store).train
    cycle = annual_cycle_of(config, store, mesh) if cycle is None else cycle
    changing = [name for name in names if name not in store.static_names]
    kinds = [Kind(name, data.log1p.get(name), data.anomalies.get(name)) for name in changing]
    statistics = _statistics(store, stretches_of(axis, spans), changing, seen_of(store, kinds, cycle), mesh)
    grid = grid_of(config, store)
    return Contract(
        variables=tuple(_as_before(_variable(name, data, store, statistics), before) for name in names),
        forcings=data.forcings,
        latitude_deg=tuple(store.latitude_deg.tolist()),
        longitude_deg=tuple(store.longitude_deg.tolist()),
        north=grid.north,
        south=grid.south,
        lon=Boundary(grid.lon_boundary),
        step_hours=_steps_of(store, [range(store.frames)]),
        calendar=store.calendar,
        training=ranges_of(axis, spans),
        validation=data.periods.validation,
        test=data.periods.test,
        store=store.digest,
        annual_cycle=mesh.from_first(cycle.digest if mesh.rank == 0 else ""),
    )


def _as_before(variable: Variable, before: Contract | None) -> Variable:
    """With the statistics that a variable of the same name had, which must have had the same units. Those of anomalies
    are of departures from another cycle: it has its own."""
    found = next((one for one in before.variables if one.name == variable.name), None) if before else None
    kinds = [(one.kind, one.role == "static") for one in (found or variable, variable)]
    if found is None or kinds[0] != kinds[1]:
        return variable
    if not same_units(found.units, variable.units):
        raise InputError(
            f"the network of training.start_from was trained on {found.name!r} in {found.units or 'no units'}, this "
            f"store has it in {variable.units or 'no units'}. Convert it in the source, or prepare it under a new name."
            f"{hint(found.units, variable.units)}"
        )
    if variable.harmonics is not None:
        return variable
    kept = {key: getattr(found, key) for key in ("mean", "std", "tendency_std")}
    return variable.model_copy(update=kept | {"inherited": True})


def _variable(name: str, data: DataConfig, store: Store, statistics: Mapping[str, NDArray[np.float64]]) -> Variable:
    if name in store.static_names:
        static = store.static[store.static_names.index(name)]
        numbers = {"mean": static.mean, "std": static.std, "tendency_std": 0}
        told = {"units": static.channel.units, "long_name": static.channel.long_name}
        return Variable(name=name, role="static", **told, **numbers)
    (channel,) = store.channel_indices([name])
    mean, std, tendency_std = statistics[name].tolist()
    return Variable(
        name=name,
        units=store.units[channel],
        role=data.roles.get(name, "prognostic"),
        log1p=data.log1p.get(name),
        harmonics=data.anomalies.get(name),
        may_miss=store.misses_some([channel]),
        loss_weight=loss_weight_of(data, name),
        mean=mean,
        std=std,
        tendency_std=tendency_std,
        long_name=store.layout.channels[channel].long_name,
    )


def _statistics(
    store: Store, stretches: Stretches, names: Sequence[str], seen: Seen, mesh: ProcessMesh
) -> dict[str, NDArray[np.float64]]:
    """Mean and deviations of variables over some frames: files are dealt to ranks, and merged in their order."""
    channels = store.channel_indices(names)
    kept, read = pieces_of(store, stretches, channels, seen)
    found: dict[int, ChannelMoments] = {}
    for pieces, each in ((kept, PIECES), (read, 1)):
        for first in range(0, len(pieces), each * mesh.ranks):  # in rounds, so that nobody waits for all of it
            some = pieces[first : first + each * mesh.ranks]
            mine = []
            for piece in some[mesh.rank :: mesh.ranks]:
                with mesh.activity.during(READING):
                    mine.append(moments_of(store, piece, stretches, seen))
            dealt = mesh.gathered_objects(mine)
            found = merged([found, *(dealt[place % mesh.ranks][place // mesh.ranks] for place in range(len(some)))])
    return dict(zip(names, Statistics.of(found[channel] for channel in channels).rows, strict=True))


def _steps_of(store: Store, spans: Stretches) -> tuple[float, float]:
    """Smallest and largest step in hours, but for gaps; (0, 0) where there is none."""
    stretches = stretches_of(store.layout.time, spans)
    steps = np.concatenate([np.empty(0), *(np.diff(store.time_hours[one.start : one.stop]) for one in stretches)])
    return (float(steps.min()), float(steps.max())) if steps.size else (0.0, 0.0)


def _rolled(mine: np.ndarray, others: np.ndarray) -> str:
    """What to do where the same longitudes begin elsewhere; empty if they are others."""
    turned = others % 360
    columns = int(np.argmin(np.abs(turned - mine[0] % 360)))
    same = are_same_deg(np.roll(turned, -columns), mine % 360)
    return f"They begin elsewhere: `ds.roll(longitude={-columns}, roll_coords=True)` in xarray." if same else ""


def _range(values: np.ndarray) -> str:
    return f"of {values.size} values from {values[0]:g} to {values[-1]:g}"
