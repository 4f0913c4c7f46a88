"""What a file of forecasts looks like, whatever its format: dims, coordinates, variables, attributes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data.times import EPOCH_UNITS, SECONDS_PER_HOUR
from ..errors import InputError
from ..training.contract import Contract
from ..versions import __version__
from .dates import Start
from .names import Field, fields_of

DIMS = ("init_time", "lead_time", "level", "latitude", "longitude")
CONVENTIONS = "CF-1.8"
CHUNK_BYTES = 16 * 2**20
VALUE_BYTES = 4


def attributes_of(title: str) -> dict[str, str]:
    """Of every file that is made of forecasts and embeddings."""
    return {"Conventions": CONVENTIONS, "title": title, "source": f"faconv_hpc {__version__}"}


class Coordinate(NamedTuple):
    """Values along a dim of the same name."""

    name: str
    values: NDArray[Any]
    attributes: dict[str, str]


@dataclass(frozen=True, eq=False)
class ForecastLayout:
    """Of forecasts from some dates over the same leads.

    Attributes:
        fields: physical variables, each of one or more channels.
        seconds: (init_time,) int64 since 1970 in the contract's calendar.
        leads_s: (lead_time,) int64 seconds.
    """

    contract: Contract
    seconds: NDArray[np.int64]
    leads_s: NDArray[np.int64]

    @classmethod
    def of(cls, contract: Contract, starts: Sequence[Start]) -> "ForecastLayout":
        """Raises InputError for dates whose leads are not the same, as months are of different length."""
        first = starts[0]
        for one in starts:
            if not np.array_equal(one.leads_s, first.leads_s):
                raise InputError(
                    f"the steps after {first.date} and after {one.date} "
                    f"are not of the same length, and one file has one lead_time. Forecast from them one by one."
                )
        return cls(contract, np.array([one.second for one in starts], dtype=np.int64), first.leads_s)

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        """What is forecast: prognostic variables, then diagnostic ones."""
        return fields_of(self.contract.channels.targets)

    @cached_property
    def place_of(self) -> dict[int, tuple[Field, int | None]]:
        """Of each channel its variable, and its place among the levels, if there are some."""
        return {
            channel: (field, level if field.levels else None)
            for field in self.fields
            for level, channel in enumerate(field.channels)
        }

    def part(self, init: int) -> "ForecastLayout":
        """Of one date."""
        return replace(self, seconds=self.seconds[init : init + 1])

    def coordinates(self) -> Iterator[Coordinate]:
        """In the order of dims."""
        calendar = self.contract.calendar
        yield Coordinate(
            "init_time",
            self.seconds,
            {"standard_name": "forecast_reference_time", "units": EPOCH_UNITS, "calendar": calendar},
        )
        hours = not (self.leads_s % SECONDS_PER_HOUR).any()
        values, units = (self.leads_s // SECONDS_PER_HOUR, "hours") if hours else (self.leads_s, "seconds")
        # The attribute dtype is xarray's mark of a duration; without it readers differ in whether they decode it.
        yield Coordinate(
            "lead_time", values, {"standard_name": "forecast_period", "units": units, "dtype": "timedelta64[ns]"}
        )
        levels = next((field.levels for field in self.fields if field.levels), ())
        if levels:
            pressure = {"standard_name": "air_pressure", "units": "hPa", "positive": "down", "axis": "Z"}
            yield Coordinate("level", np.array(levels), pressure)
        for name, axis, units in (("latitude", "Y", "degrees_north"), ("longitude", "X", "degrees_east")):
            values = np.array(getattr(self.contract, f"{name}_deg"))
            yield Coordinate(name, values, {"standard_name": name, "axis": axis, "units": units})

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Of all dims."""
        return {one.name: one.values.size for one in self.coordinates()}

    def dims_of(self, field: Field) -> tuple[str, ...]:
        """Of a variable."""
        return tuple(dim for dim in DIMS if dim != "level" or field.levels)

    def shape_of(self, field: Field) -> tuple[int, ...]:
        """Sizes of its dims."""
        return tuple(self.sizes[dim] for dim in self.dims_of(field))

    def chunks_of(self, field: Field) -> tuple[int, ...]:
        """One lead and level of one date in each, in bands of rows where it is large."""
        nlat, nlon = self.sizes["latitude"], self.sizes["longitude"]
        bands = -(-nlat * nlon * VALUE_BYTES // CHUNK_BYTES)
        return (*[1] * (len(self.dims_of(field)) - 2), -(-nlat // bands), nlon)

    def place_in(self, channel: int, init: int, lead: int) -> tuple[str, tuple[int, ...]]:
        """The variable that a channel is in, and where its field (Y, X) stands there."""
        field, level = self.place_of[channel]
        return field.name, (init, lead) if level is None else (init, lead, level)
