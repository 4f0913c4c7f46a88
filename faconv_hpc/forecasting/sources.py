"""Frames of anything that xarray opens: files, as `faconv data prepare` takes them, or a dataset in memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import cftime
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ..data.layout import digest_of
from ..data.times import EPOCH_UNITS, TimeAxis, normal_calendar
from ..data.variables import Variable
from ..errors import InputError
from ..files import check_data_is_there
from ..prepare.catalogue import Catalogue, catalogue_of, same_calendar
from ..prepare.preparation import request_of
from ..prepare.roles import SourceOptions
from ..prepare.sources import open_sources
from ..spatial.grid import Tile
from ..training.contract import Contract
from .frames import Frames, check_static_fields

Opened = Sequence[tuple[xr.Dataset, Path]]
DATASET = Path("the dataset")


@dataclass(frozen=True)
class SourceFields:
    """Some variables of sources, which are turned to the contract's grid as they are read."""

    variables: tuple[Variable, ...]
    catalogue: Catalogue
    axis: TimeAxis
    where: str

    @property
    def names(self) -> tuple[str, ...]:
        """Of the variables."""
        return tuple(one.name for one in self.variables)

    def read(self, frames: Sequence[int], tile: Tile) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """One frame after the other, its rows whole; NaN is what is missing, and nothing else may be."""
        fields_TCYX = np.empty((len(frames), len(self.variables), *tile.shape), dtype=np.float32)
        with told_by_prepare():
            for at, frame in enumerate(frames):
                for group in self.catalogue.groups:
                    slab_CYX = self.catalogue.read(range(frame, frame + 1), group, tile.rows)[0]
                    fields_TCYX[at, group.start : group.stop] = slab_CYX[..., slice(*tile.columns)]
        for place, variable in enumerate(self.variables):
            bad_TYX = ~np.isfinite(fields_TCYX[:, place])
            if variable.may_miss:
                bad_TYX = np.isinf(fields_TCYX[:, place])
            if bad_TYX.any():
                at = int(np.argmax(bad_TYX.any((1, 2))))
                raise InputError(
                    f"{variable.name!r} is {fields_TCYX[at, place][bad_TYX[at]][0]} in {int(bad_TYX[at].sum())} cells "
                    f"at {self.axis.date(frames[at])} in {self.where}, and the network was trained on it without "
                    f"missing cells. Fill them, or forecast from another date."
                )
        return fields_TCYX, ~np.isnan(fields_TCYX)


def file_frames(paths: Sequence[Path], contract: Contract) -> Frames:
    """What files hold, of any format that `faconv data prepare` takes.

    Raises:
        InputError: they cannot be read, or have not what the contract says.
    """
    opened, where = files_opened(paths)
    identity = digest_of((), {"request": request_of(SourceOptions(), paths)})
    return _frames(opened, contract, where, identity)


def files_opened(paths: Sequence[Path]) -> tuple[Opened, str]:
    """What files hold, unread, and what to call them in messages; raises InputError as `open_sources`."""
    check_data_is_there(paths)
    return [(dataset, path) for path in paths for dataset in open_sources(path)], told_as(paths)


def told_as(paths: Sequence[Path]) -> str:
    """What to call files, of which there may be many."""
    return ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")


def dataset_frames(dataset: xr.Dataset, contract: Contract) -> Frames:
    """What a dataset holds, its times decoded by xarray or not.

    Raises:
        InputError: it has not what the contract says.
    """
    return _frames([(_with_plain_times(dataset), DATASET)], contract, str(DATASET), "")


def _frames(opened: Opened, contract: Contract, where: str, identity: str) -> Frames:
    channels = contract.channels
    states = fields_in(opened, channels.prognostic, contract, where, channels.static)
    forcings = fields_in(opened, channels.forcing, contract, where) if channels.forcing else None
    static_SYX = _static_fields(states.catalogue, contract, where)
    return Frames(where, identity, states, forcings, lambda tile: static_SYX[:, *tile.slices].copy())


def fields_in(
    opened: Opened,
    variables: tuple[Variable, ...],
    contract: Contract,
    where: str,
    static: tuple[Variable, ...] = (),
) -> SourceFields:
    """Those of these variables, held to the contract; its catalogue has the fields without time beside them.

    Raises:
        InputError: they are not there, or in other units or another calendar, or on another grid.
    """
    names, timeless = ([one.name for one in ones] for ones in (variables, static))
    with told_by_prepare():
        options = SourceOptions.of(variables=[*names, *timeless], static=timeless)
        catalogue = catalogue_of(opened, options, np.array(contract.longitude_deg))
    found = [channel.name for channel in (*catalogue.channels, *(one.channel for one in catalogue.static))]
    for variable in (*variables, *static):
        if variable.name not in found:
            raise InputError(
                f"{where} has {variable.name!r} as {', '.join(found)}, and the network takes one field of that name. "
                f"Select it, in xarray, and give it the name."
            )
    for variable, channel in zip(variables, catalogue.channels, strict=True):
        contract.check_units(variable, channel.units, where)
    contract.check_grid(catalogue.grid.latitude_deg, catalogue.grid.longitude_deg, where)
    return SourceFields(variables, catalogue, _in_calendar(catalogue.time, contract.calendar, where), where)


def _static_fields(catalogue: Catalogue, contract: Contract, where: str) -> NDArray[np.float32]:
    """(S, nlat, nlon) the fields without time, in the contract's order."""
    static, grid = contract.channels.static, contract.grid
    by_name = {one.channel.name: one for one in catalogue.static}
    fields_SYX = np.empty((len(static), grid.nlat, grid.nlon), dtype=np.float32)
    for place, variable in enumerate(static):
        segment = by_name[variable.name]
        contract.check_units(variable, segment.channel.units, where)
        with told_by_prepare():
            fields_SYX[place] = segment.read_once()
    check_static_fields(contract, fields_SYX, where)
    return fields_SYX


def _in_calendar(axis: TimeAxis, calendar: str, where: str) -> TimeAxis:
    """The same times in the contract's calendar, if they are the same there."""
    if not same_calendar(axis, replace(axis, calendar=calendar)):
        raise InputError(
            f"the network was trained on times of the calendar {calendar}, those of {where} are of {axis.calendar}. "
            f"Convert them, in xarray: `ds.convert_calendar({calendar!r})`."
        )
    return TimeAxis(axis.seconds, calendar)


def _with_plain_times(dataset: xr.Dataset) -> xr.Dataset:
    """Dates as cftime has them made numbers with units again."""
    plain = {}
    for name, coordinate in dataset.coords.items():
        if coordinate.dtype == object and coordinate.size and isinstance(coordinate.values.flat[0], cftime.datetime):
            calendar = normal_calendar(coordinate.values.flat[0].calendar)
            seconds = cftime.date2num(coordinate.values, EPOCH_UNITS, calendar=calendar)
            attributes = {"units": EPOCH_UNITS, "calendar": calendar, "standard_name": "time"}
            plain[name] = (coordinate.dims, np.asarray(seconds, dtype=np.int64), attributes)
    return dataset.assign_coords(plain)


@contextmanager
def told_by_prepare() -> Iterator[None]:
    """What is wrong with sources is told with the options of `faconv data prepare`, which are not ours."""
    try:
        yield
    except InputError as error:
        options = (
            " Options named here are those of `faconv data prepare`: make a store with them, and forecast from it."
        )
        raise InputError(f"{error}{options * ('--' in str(error))}") from None
