"""What the user takes of a source: some members or levels, some dates; and what is no field to be forecast."""

import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cftime
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ..data.layout import SEQUENCE, SEQUENCE_NAME
from ..data.times import EPOCH_UNITS, SECONDS_PER_DAY, TimeAxis
from ..errors import InputError
from .sources import CHANNELS

SELECTED = "faconv_selected"
"""Attribute of a dataset: which place along a dim of the source was taken."""
BOUNDS = re.compile(r".*_(bnds?|bounds|vertices)")
DATE = re.compile(r"(\d{1,4})(?:-(\d\d?))?(?:-(\d\d?))?(?:[T ](\d\d):(\d\d)(?::00)?)?")


def selected(dataset: xr.Dataset, select: tuple[tuple[str, str], ...], path: Path) -> xr.Dataset:
    """One value of each named dim that the dataset has; a level keeps its name by it.

    Raises:
        InputError: the dim has no such value.
    """
    for dim, text in select:
        if dim not in dataset.dims:
            continue
        known = _values_of(dataset, dim)
        found = [place for place, value in enumerate(known) if _is_same(value, text)]
        if len(found) != 1:
            shown = ", ".join(map(str, known[:8])) + (", ..." if len(known) > 8 else "")
            raise InputError(
                f"--select {dim}={text}: the dim {dim!r} of {path} has the values {shown}. Take one of them."
            )
        dataset = _one_of(dataset, dim, found[0])
    return dataset


def _values_of(dataset: xr.Dataset, dim: Hashable) -> NDArray[Any]:
    """Along a dim; places where it has no coordinate."""
    return dataset[dim].values if dim in dataset.variables else np.arange(dataset.sizes[dim])


def _one_of(dataset: xr.Dataset, dim: Hashable, place: int) -> xr.Dataset:
    """The part at a place along a dim, which it remembers."""
    places = {**dataset.attrs.get(SELECTED, {}), dim: place}
    return dataset.isel({dim: [place]}).assign_attrs({SELECTED: places})


def sequences_in(dataset: xr.Dataset, dim: str | None, per_file: bool, path: Path) -> Iterator[tuple[str, xr.Dataset]]:
    """The sequences that a source holds, by name: a part of it for each. Where nothing tells them apart it has none.

    A file of a store with several tells them apart by itself.

    Args:
        dim: along which they lie beside each other, such as members.
        per_file: each source is one, called as its file is.
    """
    first = [_name_of(dataset, path)] if per_file else []
    if SEQUENCE in dataset.variables and SEQUENCE_NAME in dataset.variables:
        numbers, names = dataset[SEQUENCE].values, dataset[SEQUENCE_NAME].values
        for number in np.unique(numbers):
            low, high = np.searchsorted(numbers, [number, number + 1])
            yield " ".join([*first, str(names[number])]), dataset.isel(time=slice(int(low), int(high)))
    elif dim in dataset.dims:
        for place, value in enumerate(_values_of(dataset, dim)):
            yield " ".join([*first, _text(value)]), _one_of(dataset, dim, place)
    elif dim in dataset.variables and not dataset[dim].dims:
        yield " ".join([*first, _text(dataset[dim].values[()])]), dataset
    else:
        yield " ".join(first), dataset


def _name_of(dataset: xr.Dataset, path: Path) -> str:
    """Of a source: a store's directory, or a file without its ending."""
    if CHANNELS in dataset.attrs:
        return path.resolve().parent.name
    return path.stem if path.is_file() or path.suffix == ".zarr" else path.name


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _is_same(value: object, text: str) -> bool:
    try:
        return bool(np.isclose(float(value), float(text), rtol=1e-6))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return str(value) == text


def bounds_of(dataset: xr.Dataset) -> set[Hashable]:
    """Variables that give the limits of cells or of times, which are no fields."""
    named = {
        attrs.get("bounds", attrs.get("climatology")) for attrs in (one.attrs for one in dataset.variables.values())
    }
    return {name for name in dataset.data_vars if name in named or BOUNDS.fullmatch(str(name))}


def is_flag(array: xr.DataArray) -> bool:
    """Whether the numbers of a variable stand for names or switches, of which there is no mean.

    By its attributes; or it is kept as bytes that are not scaled, and has no units.
    """
    if not {"flag_values", "flag_masks", "flag_meanings"}.isdisjoint(array.attrs):
        return True
    stored = np.dtype(array.encoding.get("dtype", array.dtype))
    bare = "scale_factor" not in array.encoding and array.attrs.get("units", "1") in ("", "1")
    return stored.kind == "b" or (stored.kind in "iu" and stored.itemsize == 1 and bare)


@dataclass(frozen=True)
class Period:
    """Which times to take: from one date to another, both included, and every so many of those."""

    first: str | None = None
    last: str | None = None
    every: int = 1

    def frames_of(self, time: TimeAxis) -> tuple[range, ...]:
        """Positions of the frames to take of each sequence, counted from the period's first on.

        Raises:
            InputError: a date that is none, or no frames are left.
        """
        if self.every < 1:
            raise InputError(f"--every takes one frame of so many, got {self.every}. Use 1 or more.")
        begin = time.seconds.min() if self.first is None else _span(self.first, time.calendar, "--from")[0]
        end = time.seconds.max() if self.last is None else _span(self.last, time.calendar, "--to")[1]
        found = []
        for own in time.sequences:
            seconds = time.seconds[own.start : own.stop]
            first, stop = int(np.searchsorted(seconds, begin)), int(np.searchsorted(seconds, end, side="right"))
            found.append(range(own.start + first, own.start + max(first, stop), self.every))
        if not any(found):
            raise InputError(
                f"no frame is left from {self.first or 'the first'} to {self.last or 'the last'}: the sources run from "
                f"{time.label(0)} to {time.label(len(time) - 1)}. Give other dates to --from and --to."
            )
        return tuple(found)


def _span(text: str, calendar: str, option: str) -> tuple[int, int]:
    """First and last second of a year, month or day; of a date and hour that instant."""
    match = DATE.fullmatch(text.strip())
    try:
        if match is None:
            raise ValueError
        year, month, day, hour, minute = (None if part is None else int(part) for part in match.groups())
        first = _seconds(
            calendar, year or 0, 1 if month is None else month, 1 if day is None else day, hour or 0, minute or 0
        )
        if hour is not None:
            return first, first
        if day is not None:
            return first, first + SECONDS_PER_DAY - 1
        months = (year or 0) * 12 + (12 if month is None else month)  # of the month after
        return first, _seconds(calendar, months // 12, months % 12 + 1, 1) - 1
    except ValueError:
        raise InputError(
            f"{option} takes a date of the calendar {calendar!r}, such as 1990, 1990-03, 1990-03-01 or "
            f"1990-03-01T06:00, got {text!r}."
        ) from None


def _seconds(calendar: str, *date: int) -> int:
    return round(float(cftime.date2num(cftime.datetime(*date, calendar=calendar), EPOCH_UNITS, calendar=calendar)))
