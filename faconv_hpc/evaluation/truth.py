"""What came: the fields that forecasts are held against, and the dates that can be judged."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data.fields import Fields, StoreFields
from ..data.layout import STORE_FILE, Channel, are_synthetic
from ..data.periods import frames_within, is_there, mask_of, ranges_of, starts_before, stretches_of
from ..data.store import Store
from ..data.times import TimeAxis
from ..data.variables import Variable
from ..errors import InputError
from ..forecasting.names import level_of
from ..forecasting.sources import SourceFields, fields_in, files_opened, told_as, told_by_prepare
from ..prepare.catalogue import catalogue_of
from ..prepare.roles import SourceOptions
from ..spatial.grid import Boundary, LatLonGrid, Tile
from ..training.contract import Contract


class Target(NamedTuple):
    """A field that is forecast."""

    name: str
    units: str
    long_name: str


class Case(NamedTuple):
    """A forecast: the frame of its start, and those of its leads."""

    start: int
    leads: tuple[int, ...]


class Chosen(NamedTuple):
    """How forecasts were chosen, which are spread evenly over those that there could be.

    Attributes:
        among: how many there could be.
        within: periods that their leads lie in; none where they lie in all of the data, or files of forecasts say it.
        sequences: names of those that the chosen lie in, in their order; none where there is but one.
        of_files: whether files of forecasts say which there could be, and no network.
    """

    among: int
    within: tuple[str, ...] = ()
    sequences: tuple[str, ...] = ()
    of_files: bool = False


@dataclass(frozen=True)
class Truth:
    """Fields that came.

    Attributes:
        name: for messages.
        targets: what the fields are.
        axis: of their times; their frames may lie in several sequences.
        fields: reads them.
        on_earth: False of stores that are synthetic.
    """

    name: str
    targets: tuple[Target, ...]
    grid: LatLonGrid
    axis: TimeAxis
    fields: Fields
    on_earth: bool = True

    def read(self, frame: int, tile: Tile) -> NDArray[np.float32]:
        """(C, Y, X), NaN where it is not known."""
        values_TCYX, known_TCYX = self.fields.read([frame], tile)
        if known_TCYX is not None:
            values_TCYX[~known_TCYX] = np.nan
        first_CYX: NDArray[np.float32] = values_TCYX[0]
        return first_CYX

    def spans(self, dates: Sequence[str]) -> tuple[range, ...]:
        """The frames at some dates, and of some sequences, as far as they are there."""
        return frames_within(self.axis, [text for text in dates if is_there(self.axis, text)])

    def names_all(self, dates: Sequence[str]) -> bool:
        """Whether the sequences that some dates are of are there, all of them."""
        return all(is_there(self.axis, text) for text in dates)

    def holds(self, dates: Sequence[str]) -> bool:
        """Whether all of some dates of training are there, from the first to the last, as a contract writes them."""
        return bool(dates) and all(ranges_of(self.axis, self.spans([text])) == (text,) for text in dates)

    def sequence(self, case: Case) -> str | None:
        """The sequence that a case lies in; None where there is but one."""
        return self.axis.names[self.axis.numbers[case.start]] if self.axis.names else None

    def cases(self, dates: Sequence[str], window: int, leads: int) -> list[Case]:
        """All whose leads lie in a period (anywhere, if it names none), without a gap from the window before them on.

        Raises:
            InputError: there is none.
        """
        count = len(self.axis)
        spans = self.spans(dates) if dates else (range(count),)
        stretches = stretches_of(self.axis, [range(count)])
        first = starts_before(stretches, mask_of(spans, count), window, leads).tolist()
        if not first:
            raise InputError(
                f"{self.name} has no {f'{leads} frames' if leads > 1 else 'frame'}"
                f"{' within ' + ', '.join(dates) if dates else ''} that {window} frames precede without a gap; its "
                f"times run from {self.axis.label(0)} to {self.axis.label(count - 1)}. Name other --data, "
                f"fewer --leads, or a shorter --spin-up."
            )
        return [Case(at + window - 1, tuple(range(at + window, at + window + leads))) for at in first]


def truth_of(data: Sequence[Path], contract: Contract | None, names: Sequence[str]) -> Truth:
    """Of a store, or of files in any format that `faconv data prepare` takes.

    Args:
        contract: of a network that is judged; the data are held to it. None: there is none.
        names: without a contract, of the variables of the forecasts.

    Raises:
        InputError: the data cannot be read, or have not what is judged.
    """
    truth = _of_store(Store.open(data[0]), contract, names) if _is_store(data) else _of_files(data, contract, names)
    return replace(truth, on_earth=not are_synthetic(data))


def data_in_words(data: Sequence[Path]) -> str:
    """As `Truth.name` has it, of data that are not opened."""
    return f"the store {data[0]}" if _is_store(data) else told_as(data)


def _is_store(data: Sequence[Path]) -> bool:
    return len(data) == 1 and (data[0] / STORE_FILE).is_file()


def _of_store(store: Store, contract: Contract | None, names: Sequence[str]) -> Truth:
    where, axis = data_in_words([store.path]), store.layout.time
    if contract is not None:
        contract.check(store)
        targets, grid = _targets(contract.channels.targets), contract.grid
    else:
        found = [one for one in store.layout.channels if called(one.name, one.long_name) & set(names)]
        if not found:
            raise InputError(
                f"{where} has {', '.join(store.channels)}, and the forecasts are of {', '.join(names)}. Name --data "
                f"that have the same variables."
            )
        targets, grid = _targets(found), grid_of(store.latitude_deg, store.longitude_deg)
    return Truth(where, targets, grid, axis, StoreFields(store, tuple(one.name for one in targets), range(len(axis))))


def _of_files(data: Sequence[Path], contract: Contract | None, names: Sequence[str]) -> Truth:
    opened, where = files_opened(data)
    if contract is not None:
        fields = fields_in(opened, contract.channels.targets, contract, where)
        targets, grid = _targets(contract.channels.targets), contract.grid
    else:
        with told_by_prepare():
            catalogue = catalogue_of(opened, SourceOptions.of(variables=list(names)))
        targets = _targets(catalogue.channels)
        numbers = {"mean": 0.0, "std": 1.0, "tendency_std": 1.0}
        variables = tuple(Variable(name=one.name, units=one.units, **numbers) for one in targets)
        fields = SourceFields(variables, catalogue, catalogue.time, where)
        grid = grid_of(catalogue.grid.latitude_deg, catalogue.grid.longitude_deg)
    holed = tuple(
        one.model_copy(update={"may_miss": True}) for one in fields.variables
    )  # what is missing is not judged
    return Truth(where, targets, grid, fields.axis, replace(fields, variables=holed))


def _targets(channels: Iterable[Channel | Variable]) -> tuple[Target, ...]:
    return tuple(Target(one.name, one.units, one.long_name) for one in channels)


def called(name: str, long_name: str) -> set[str]:
    """What a channel may be called in a file of forecasts: its own name, or one without the level."""
    return {name, level_of(name, long_name)[0]}


def grid_of(latitude_deg: NDArray[np.float64], longitude_deg: NDArray[np.float64]) -> LatLonGrid:
    """Of coordinates alone: its circles close, if the longitudes go around."""
    make = partial(
        LatLonGrid, len(latitude_deg), len(longitude_deg), latitude_deg=latitude_deg, longitude_deg=longitude_deg
    )
    try:
        return make(lon_boundary=Boundary.PERIODIC)
    except InputError:
        return make(lon_boundary=Boundary.ZERO)
