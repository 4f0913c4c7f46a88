"""What is judged: trained networks, and files of forecasts made by anyone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cftime
import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from ..data.times import EPOCH_UNITS, IRREGULAR_S, SECONDS_PER_HOUR, normal_calendar
from ..data.units import hint, same_units
from ..errors import InputError
from ..forecasting.campaign import open_frames
from ..forecasting.dates import Timeline
from ..forecasting.forecaster import Forecaster, Prepared
from ..forecasting.frames import Frames
from ..forecasting.names import level_of
from ..observe import READING
from ..prepare.catalogue import same_calendar
from ..prepare.sources import ZARR_MARKS, open_sources
from ..spatial.domain import Domain
from ..spatial.grid import SAME_DEG, Tile
from ..training.contract import Contract
from .truth import Case, Target, Truth

DIMS = ("init_time", "lead_time", "latitude", "longitude")
LONG = {"h": "hours", "hr": "hours", "hour": "hours", "d": "days", "day": "days", "min": "minutes", "s": "seconds"}
FILES = (".nc", ".nc4", ".h5", ".hdf5", ".zarr")


def is_file_of_forecasts(path: Path) -> bool:
    """Whether a MODEL is forecasts on disk, and not a network."""
    return path.suffix in FILES or any((path / mark).exists() for mark in ZARR_MARKS)


class Run(NamedTuple):
    """A forecast from one date.

    Attributes:
        begun_CYX: of the truth's targets, bool, where there was something to begin from: elsewhere nothing is forecast,
            which is no error. None: everywhere.
        leads: (C, Y, X) float64 of this tile, the truth's targets, lead by lead; NaN where it has none. Collective over
            the tiles of a network.
    """

    begun_CYX: Tensor | None
    leads: Iterator[Tensor]


class Entry(Protocol):
    """One of those that stand in a table.

    Attributes:
        name: in tables and figures.
        about: what else is said of it: where it is, its step, its digest.
        contract: of a network.
    """

    name: str
    about: dict[str, str]

    @property
    def contract(self) -> Contract | None: ...

    def check(self, truth: Truth) -> None:
        """Raises InputError where it is not of the same cells, units and calendar as what came."""

    def has(self, truth: Truth, case: Case) -> bool:
        """Whether it forecasts from that date over those leads."""

    def run(self, truth: Truth, case: Case, domain: Domain) -> Run:
        """Its forecast from that date."""


@dataclass
class NetworkEntry:
    """A network that forecasts here.

    Args:
        data: what it forecasts from.
    """

    name: str
    about: dict[str, str]
    forecaster: Forecaster
    data: Sequence[Path]

    def __post_init__(self) -> None:
        self._frames: dict[str | None, Frames] = {}

    @property
    def contract(self) -> Contract:
        """What it was trained on."""
        return self.forecaster.contract

    def check(self, truth: Truth) -> None:
        """See `Entry`; of files each network would take the columns in its own order."""
        where = f"what {self.name} is held against, {truth.name},"
        self.contract.check_grid(np.array(truth.grid.latitude_deg), np.array(truth.grid.longitude_deg), where)
        units = {one.name: one.units for one in truth.targets}
        for variable in self.contract.channels.targets:
            self.contract.check_units(variable, units.get(variable.name, variable.units), where)

    def has(self, truth: Truth, case: Case) -> bool:
        """From any date; what it needs is looked up when it is asked."""
        return True

    def run(self, truth: Truth, case: Case, domain: Domain) -> Run:
        """See `Entry`.

        Raises:
            InputError: frames are missing, or its steps are not those of the leads.
        """
        frames, second = self._frames_of(truth.sequence(case)), int(truth.axis.seconds[case.start])
        start = Timeline(frames, self.contract, self.forecaster.window, len(case.leads)).start(second)
        wanted = truth.axis.seconds[list(case.leads)] - second
        if np.abs(start.leads_s - wanted).max() > IRREGULAR_S:
            told = (", ".join(f"{one / 3600:g}" for one in some[:4]) for some in (start.leads_s, wanted))
            raise InputError(
                f"{self.name} forecasts {next(told)} ... h ahead, and what is compared is {next(told)} ... h ahead of "
                f"{truth.axis.label(case.start)}. Judge models of other steps by files: `faconv forecast`."
            )
        names = [one.name for one in self.contract.channels.targets]
        places = [names.index(one.name) if one.name in names else None for one in truth.targets]
        prepared = self.forecaster.prepared(frames, start)
        known_PYX = ~prepared[0].last_BPYX[0].isnan()
        everywhere_YX = torch.ones_like(known_PYX[0])  # a diagnostic begins from nothing
        begun = [known_PYX[at] if at is not None and at < len(known_PYX) else everywhere_YX for at in places]
        return Run(torch.stack(begun), self._leads(prepared, places))

    @torch.no_grad()
    def _leads(self, prepared: Prepared, places: Sequence[int | None]) -> Iterator[Tensor]:
        for lead_BCYX in self.forecaster.free_run(*prepared):
            yield _chosen(lead_BCYX[0], places)

    def _frames_of(self, sequence: str | None) -> Frames:
        if sequence not in self._frames:
            self._frames[sequence] = open_frames(self.contract, self.data, sequence)
        return self._frames[sequence]


class FileEntry:
    """Forecasts on disk, with the names that WeatherBench-X reads: ``init_time``, ``lead_time``, ``latitude``,
    ``longitude`` and, if there are some, ``level``.

    Raises:
        InputError: it cannot be read, or has other dims.
    """

    contract = None

    def __init__(self, path: Path, name: str) -> None:
        self.name, self._path = name, path
        opened = open_sources(path)
        dataset = opened[0]
        missing = [dim for dim in DIMS if dim not in dataset.dims or dim not in dataset.coords]
        if missing or len(opened) > 1:
            raise InputError(
                f"{path} is no file of forecasts: it has no dim and coordinate {', '.join(missing)}; its dims are "
                f"{', '.join(map(str, dataset.dims))}. Rename them, in xarray: `ds.rename(time='init_time', "
                f"prediction_timedelta='lead_time')`."
            )
        self._dataset = dataset.assign_coords(
            init_time=_decoded(dataset.init_time, "MO", "hours since 2000-01-01", path),
            lead_time=_decoded(dataset.lead_time, "m", "hours", path),
        )
        if not (self.leads_s > 0).any():
            ends_h = (
                f"{one / SECONDS_PER_HOUR:g}" for one in (self.leads_s.min(initial=0), self.leads_s.max(initial=0))
            )
            raise InputError(
                f"lead_time of {path} runs from {next(ends_h)} to {next(ends_h)} h, and no forecast is ahead of its "
                f"start. Correct lead_time or its units."
            )
        for name, seconds in (("init_time", self.init_s), ("lead_time", self.leads_s)):
            _, firsts = np.unique(seconds, return_index=True)
            twice = np.setdiff1d(np.arange(seconds.size), firsts)
            if twice.size:
                raise InputError(
                    f"{name} of {path} has {self._dataset[name].values[twice[0]]} more than once. Keep one of each, in "
                    f"xarray: `ds.drop_duplicates({name!r})`."
                )
        self.about = {"path": str(path), "title": str(dataset.attrs.get("title", ""))}

    @property
    def names(self) -> list[str]:
        """Of its variables."""
        return [str(name) for name, one in self._dataset.data_vars.items() if set(DIMS) <= set(one.dims)]

    @cached_property
    def init_s(self) -> NDArray[np.int64]:
        """(init_time,) seconds since 1970, in the file's calendar."""
        times = self._dataset.init_time.values
        if times.dtype == object:
            times = np.rint(cftime.date2num(times, EPOCH_UNITS, calendar=times.flat[0].calendar))
            return np.asarray(times, dtype=np.int64)
        return np.asarray(times.astype("datetime64[s]"), dtype=np.int64)

    @cached_property
    def leads_s(self) -> NDArray[np.int64]:
        """(lead_time,) seconds; analyses at lead 0 are among them, if there are some."""
        return np.asarray(self._dataset.lead_time.values.astype("timedelta64[s]"), dtype=np.int64)

    def check(self, truth: Truth) -> None:
        """See `Entry`."""
        self._onto(truth)
        for target in truth.targets:
            self._variable(target)
        times = self._dataset.init_time.values
        calendar = normal_calendar(times.flat[0].calendar) if times.dtype == object else "standard"
        if not same_calendar(replace(truth.axis, calendar=calendar), truth.axis):
            raise InputError(
                f"init_time of {self._path} is of the calendar {calendar}, what came of {truth.axis.calendar}. Convert "
                f"it, in xarray: `ds.convert_calendar({truth.axis.calendar!r}, 'init_time')`."
            )

    def has(self, truth: Truth, case: Case) -> bool:
        """Whether all of the leads are there."""
        return self._places(truth, case) is not None

    def _places(self, truth: Truth, case: Case) -> tuple[int, list[int]] | None:
        second = truth.axis.seconds[case.start]
        init = _place(self.init_s, second)
        leads = [_place(self.leads_s, truth.axis.seconds[frame] - second) for frame in case.leads]
        if init is None or any(lead is None for lead in leads):
            return None
        return init, [lead for lead in leads if lead is not None]

    def run(self, truth: Truth, case: Case, domain: Domain) -> Run:
        """See `Entry`; reads whole rows."""
        found = self._places(truth, case)
        assert found is not None, f"{self.name} was asked for {truth.axis.label(case.start)}"
        return Run(None, self._leads(truth, *found, domain))

    def _leads(self, truth: Truth, init: int, leads: list[int], domain: Domain) -> Iterator[Tensor]:
        rows, columns = self._onto(truth)
        for lead in leads:
            with domain.mesh.activity.during(READING):
                fields = [self._field(target, init, lead, rows, columns, domain.tile) for target in truth.targets]
            yield torch.from_numpy(np.stack(fields)).to(domain.mesh.device)

    def _field(
        self, target: Target, init: int, lead: int, rows: NDArray[np.intp], columns: NDArray[np.intp], tile: Tile
    ) -> NDArray[np.float64]:
        variable = self._variable(target)
        if variable is None:
            return np.full(tile.shape, np.nan)
        wanted = rows[slice(*tile.rows)]
        first, last = int(wanted.min()), int(wanted.max()) + 1
        band = variable.isel(init_time=init, lead_time=lead, latitude=slice(first, last)).transpose(*DIMS[2:])
        values_YX = band.values.astype(np.float64)[wanted - first]
        return values_YX[:, columns[slice(*tile.columns)]]

    def _variable(self, target: Target) -> xr.DataArray | None:
        """By its name, or as a level of the variable of all levels; None: it is not there."""
        base, level, _ = level_of(target.name, target.long_name)
        if target.name in self._dataset and "level" not in self._dataset[target.name].dims:
            found = self._dataset[target.name]
        elif base in self._dataset and level in self._dataset.get("level", []):
            found = self._dataset[base].sel(level=level)
        else:
            return None
        units = str(found.attrs.get("units", target.units))
        if not same_units(units, target.units):
            raise InputError(
                f"{target.name!r} is in {units} in {self._path}, and in {target.units} in what came. Convert it."
                f"{hint(units, target.units)}"
            )
        others = [dim for dim in found.dims if dim not in DIMS]
        many = [str(dim) for dim in others if found.sizes[dim] != 1]
        if many:
            raise InputError(
                f"{target.name!r} of {self._path} has the dim {', '.join(many)} of {found.sizes[many[0]]} beside "
                f"{', '.join(DIMS)}. Take one or the mean, in xarray: `ds.isel({many[0]}=0)` or `ds.mean({many[0]!r})`."
            )
        return found.squeeze(others)

    def _onto(self, truth: Truth) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Which of its rows and columns each of the truth's grid is."""
        found = []
        for name, around in (("latitude", None), ("longitude", 360.0)):
            mine, others = self._dataset[name].values.astype(float), np.array(getattr(truth.grid, f"{name}_deg"))
            away = np.abs(others[:, None] - mine)
            away = away if around is None else np.minimum(away % around, -away % around)
            if away.min(axis=1).max() > SAME_DEG:
                raise InputError(
                    f"{self._path} has {mine.size} {name}s from {mine[0]:g} to {mine[-1]:g}, what came {others.size} "
                    f"from {others[0]:g} to {others[-1]:g}, and not all of these are among those. Regrid one of them."
                )
            found.append(away.argmin(axis=1))
        return found[0], found[1]


def _decoded(times: xr.DataArray, kinds: str, usual: str, path: Path) -> xr.Variable:
    """Dates or spans of time alone: variables that are measured in hours or days stay numbers.

    Args:
        kinds: of dtypes, which it must be of then.
        usual: units that are understood, for the message.

    Raises:
        InputError: its units are not understood.
    """
    units = str(times.attrs.get("units", ""))
    raw = times.variable.copy()
    raw.attrs |= {"units": LONG[units]} if units in LONG else {}
    try:
        found = xr.decode_cf(xr.Dataset(coords={times.name: raw}), decode_timedelta=True)[times.name].variable
    except (ValueError, OverflowError):
        found = raw
    if found.dtype.kind not in kinds:
        raise InputError(
            f"{times.name} of {path} has {f'the units {units!r}, which say no time' if units else 'no units'}. Give it "
            f"others, in xarray: `ds.{times.name}.attrs['units'] = {usual!r}`."
        )
    return found


def _place(among_s: NDArray[np.int64], second: Any) -> int | None:
    found = np.flatnonzero(np.abs(among_s - second) <= IRREGULAR_S)
    return int(found[0]) if found.size else None


def _chosen(fields_CYX: Tensor, places: Sequence[int | None]) -> Tensor:
    """Those of some places; NaN where there is none."""
    nothing_YX = torch.full_like(fields_CYX[0], float("nan"))
    return torch.stack([nothing_YX if place is None else fields_CYX[place] for place in places])


def cases_of_files(files: Sequence[FileEntry], truth: Truth, leads: int | None) -> list[Case]:
    """Dates, in their order, from which the first of some files forecasts, and at whose leads it is known what came.

    Args:
        leads: how many; default: all there are.

    Raises:
        InputError: there is none, or the truth has several sequences, which files do not tell apart.
    """
    if truth.axis.names:
        raise InputError(
            f"{truth.name} holds {len(truth.axis.names)} sequences, and files of forecasts do not say of which they "
            f"are. Judge the networks themselves, or give --data of one sequence."
        )
    first, seconds = files[0], truth.axis.seconds
    ahead_s = sorted(lead for lead in first.leads_s.tolist() if lead > 0)[:leads]
    found = []
    for init_s in sorted(first.init_s.tolist()):  # intervals go by the order of dates
        frames = [_place(seconds, init_s + ahead) for ahead in (0, *ahead_s)]
        if all(frame is not None for frame in frames):
            start, *rest = (frame for frame in frames if frame is not None)
            found.append(Case(start, tuple(rest)))
    if not found:
        raise InputError(
            f"{truth.name} has no date of {first.name} with {len(ahead_s)} leads after it: its times are "
            f"{truth.axis.described}. Name other --data, or fewer --leads."
        )
    return found
