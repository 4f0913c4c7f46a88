"""What all sources hold, before it is joined; and whether the options name what is there."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import xarray as xr

from ..data.layout import SEQUENCE
from ..data.unknown_names import unknown_name
from ..errors import InputError
from .roles import SourceOptions
from .segments import Segment, segments_of
from .selection import selected, sequences_in
from .values import is_unsound


@dataclass
class Found:
    """Collects it, source by source.

    Attributes:
        segments: of fields with time, by the channel's name.
        notes: what was assumed or left out.
    """

    options: SourceOptions
    segments: dict[str, list[Segment]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _once: dict[str, list[Segment]] = field(default_factory=dict)  # without time
    _names: set[str] = field(default_factory=set)
    _selected: set[str] = field(default_factory=set)  # options.select that were of use
    _named: set[bool] = field(default_factory=set)  # whether a source with the sequences' dim names its values or value

    def add(self, dataset: xr.Dataset, path: Path) -> None:
        """Takes a source; raises what `segments_of` does."""
        options = self.options
        self._names |= set(map(str, dataset.data_vars))
        self._selected |= {dim for dim, _ in options.select if dim in dataset.dims or "GRIB_edition" in dataset.attrs}
        names = not {options.sequence_dim, SEQUENCE}.isdisjoint(map(str, dataset.variables))
        if names or options.sequence_dim in dataset.dims:
            self._named |= {names}
        wanted = selected(dataset, options.select, path)
        for sequence, part in sequences_in(wanted, options.sequence_dim, options.sequences, path):
            once: dict[str, Segment] = {}
            for segment in segments_of(part, path, options, self.notes, once):
                self.segments.setdefault(segment.channel.name, []).append(replace(segment, sequence=sequence))
            for name, segment in once.items():
                self._once.setdefault(name, []).append(replace(segment, sequence=sequence))

    @property
    def static(self) -> dict[str, Segment]:
        """Of each field without time the first."""
        return {name: several[0] for name, several in self._once.items()}

    @property
    def sequences(self) -> list[str]:
        """Names, in their order."""
        return list(dict.fromkeys(one.sequence for several in self.segments.values() for one in several))

    def check(self, paths: Sequence[Path], *, alone: bool) -> None:
        """Raises InputError for an option that is of no use, and where there is nothing to take.

        Args:
            alone: fields without time are not enough.
        """
        options, static = self.options, self.static
        segments = [one for several in self.segments.values() for one in several] + list(static.values())
        self._check_names(self._names | {name for one in segments for name in one.names})
        for name in options.static:
            if not any(name in one.names for one in static.values()):
                raise InputError(
                    f"--static {name}: {name!r} is no field of latitude, longitude and at most times: it has levels or "
                    f"members, or is one level of several. Take one with --select, and call it by its variable's name."
                )
        for dim, value in options.select:
            if dim not in self._selected:
                raise InputError(
                    f"--select {dim}={value}: no source has such a dim, nor a GRIB message with it. Look for its name."
                )
        self._check_sequences()
        if not self.segments and (alone or not static):
            left_out = f" {' '.join(self.notes)}" if self.notes else ""
            raise InputError(
                f"no field with time, latitude and longitude in {', '.join(map(str, paths))}.{left_out} Look at it "
                f"with `python -c \"import xarray; print(xarray.open_dataset('{paths[0]}'))\"`; a dim that is not "
                f"recognised needs the attribute standard_name (latitude, longitude, time)."
            )

    def _check_names(self, known: set[str]) -> None:
        options = self.options
        renamed = {new for _, new in options.rename}
        for option, given in (
            ("--rename", [old for old, _ in options.rename]),
            ("--accept", options.accept),
            ("--static", options.static),
            ("--missing-value", [name for name, _ in options.missing_values if name]),
        ):
            for name in given:
                if name not in known | (set() if option == "--rename" else renamed):
                    raise unknown_name(f"variable for {option}:", name, sorted(known), "the sources")

    def _check_sequences(self) -> None:
        """Some sources may not say which sequence they are of while others do."""
        dim = self.options.sequence_dim
        if dim is not None and not self._named:
            raise InputError(f"--sequence-dim {dim}: no source has such a dim. Look for its name.")
        if dim in dict(self.options.select):
            raise InputError(f"--select {dim} takes one of what --sequence-dim {dim} takes all. Leave one out.")
        if len(self._named) > 1:
            raise InputError(
                f"some sources name the values of the dim {dim!r} and some do not, so nobody can tell which belong "
                f"together. Give it a coordinate everywhere, in xarray: `ds.assign_coords({dim}=[...])`."
            )
        one_of = {one.sequence: one for several in self.segments.values() for one in several}
        if "" in one_of and len(one_of) > 1:
            others, name = ", ".join(one for one in one_of if one), dim or SEQUENCE
            raise InputError(
                f"{one_of[''].path} does not say which sequence it is of, others do ({others}). Give it the "
                f"coordinate {name!r}, in xarray: `ds.assign_coords({name}=...)`, or leave it out."
            )

    def is_sound(self, name: str) -> bool:
        """Whether a field without time can be taken: it is the same in all sequences, and has all cells or was named.

        If not, that is noted.

        Raises:
            InputError: it differs between sequences, and was named.
        """
        first, *others = self._once[name]
        by_name = not {*first.names}.isdisjoint({*(self.options.variables or ()), *self.options.static})
        others = [one for one in others if one.sequence != first.sequence]
        if others:
            field_YX = first.read_once()
        for other in others:
            if not np.array_equal(field_YX, other.read_once(), equal_nan=True):
                pair = f"{first.sequence} and {other.sequence}"
                told = f"{name!r} has no time and is not the same in the sequences {pair}"
                if by_name:
                    raise InputError(f"{told}; a store has one of each. Leave it out, or give it times.")
                self.notes.append(f"{told}, and is left out.")
                return False
        if self.options.variables or not is_unsound(first.read_once()).any():
            return True
        self.notes.append(f"{first.path}: {name!r} has no time and has missing cells, and is left out; fill them.")
        return False
