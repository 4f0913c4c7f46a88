"""What forecast variables are called: their levels, CF's standard names, and earth2studio's vocabulary."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..data.units import same_units
from ..data.variables import Variable

LEVEL = re.compile(r"(?P<name>.+) at (?P<level>\d+(?:\.\d+)?)(?: (?:hPa|mbar|mb|millibars?))?")
"""A long name that says its level, as `faconv data prepare` writes it."""


class Known(NamedTuple):
    """A quantity: its name in earth2studio's vocabulary, CF's standard name, and the units that both mean."""

    vocabulary: str
    standard: str
    units: str


QUANTITIES = {
    ("t", "temperature"): Known("t", "air_temperature", "K"),
    ("u", "u_component_of_wind"): Known("u", "eastward_wind", "m s**-1"),
    ("v", "v_component_of_wind"): Known("v", "northward_wind", "m s**-1"),
    ("w", "vertical_velocity"): Known("w", "lagrangian_tendency_of_air_pressure", "Pa s**-1"),
    ("z", "geopotential"): Known("z", "geopotential", "m**2 s**-2"),
    ("q", "specific_humidity"): Known("q", "specific_humidity", "kg kg**-1"),
    ("r", "relative_humidity"): Known("r", "relative_humidity", "%"),
    ("t2m", "2t", "2m_temperature"): Known("t2m", "air_temperature", "K"),
    ("d2m", "2d", "2m_dewpoint_temperature"): Known("d2m", "dew_point_temperature", "K"),
    ("u10", "u10m", "10u", "10m_u_component_of_wind"): Known("u10m", "eastward_wind", "m s**-1"),
    ("v10", "v10m", "10v", "10m_v_component_of_wind"): Known("v10m", "northward_wind", "m s**-1"),
    ("u100", "u100m", "100u", "100m_u_component_of_wind"): Known("u100m", "eastward_wind", "m s**-1"),
    ("v100", "v100m", "100v", "100m_v_component_of_wind"): Known("v100m", "northward_wind", "m s**-1"),
    ("msl", "mean_sea_level_pressure"): Known("msl", "air_pressure_at_mean_sea_level", "Pa"),
    ("sp", "surface_pressure"): Known("sp", "surface_air_pressure", "Pa"),
    ("sst", "sea_surface_temperature"): Known("sst", "sea_surface_temperature", "K"),
    ("tcwv", "total_column_water_vapour"): Known("tcwv", "atmosphere_mass_content_of_water_vapor", "kg m**-2"),
}
KNOWN = {name: known for names, known in QUANTITIES.items() for name in names}


@dataclass(frozen=True)
class Field:
    """A physical variable of a forecast.

    Attributes:
        levels: in hPa, of its channels; none where it has one channel and no dim of levels.
        channels: their places among the targets.
    """

    name: str
    units: str
    long_name: str
    channels: tuple[int, ...]
    levels: tuple[float, ...] = ()

    @property
    def attributes(self) -> dict[str, str]:
        """As CF has them."""
        found = {"units": self.units, "long_name": self.long_name or self.name}
        known = KNOWN.get(self.name)
        return found | ({"standard_name": known.standard} if known and same_units(known.units, self.units) else {})


def fields_of(targets: Sequence[Variable]) -> tuple[Field, ...]:
    """The physical variables of channels, in the order of their first: those of several levels have a dim of levels,
    if all of them have the same ones."""
    alone = [Field(one.name, one.units, one.long_name, (place,)) for place, one in enumerate(targets)]
    groups: dict[str, list[tuple[float, Field]]] = {}
    for one in alone:
        base, level, long_name = level_of(one.name, one.long_name)
        if level is not None:
            groups.setdefault(base, []).append((level, Field(base, one.units, long_name, one.channels)))
    levels = {tuple(sorted(level for level, _ in group)) for group in groups.values()}
    units = all(same_units(group[0][1].units, one.units) for group in groups.values() for _, one in group)
    taken = {one.name for one in alone}
    if len(levels) != 1 or len(*levels) < 2 or not units or taken & groups.keys():
        return tuple(alone)
    found: dict[str, Field] = {}
    for one in alone:
        base, level, _ = level_of(one.name, one.long_name)
        if level is None:
            found[one.name] = one
        elif base not in found:
            ordered = sorted(groups[base], key=lambda pair: pair[0])
            first, places = ordered[0][1], tuple(of_level.channels[0] for _, of_level in ordered)
            found[base] = Field(base, first.units, first.long_name, places, tuple(at for at, _ in ordered))
    return tuple(found.values())


def level_of(name: str, long_name: str) -> tuple[str, float | None, str]:
    """A channel's name without its level, the level if it has one, and the long name without it."""
    match = LEVEL.fullmatch(long_name)
    if match is None or not name.endswith(match["level"]) or name == match["level"]:
        return name, None, long_name
    return name.removesuffix(match["level"]), float(match["level"]), match["name"]


def in_vocabulary(variable: Variable) -> str:
    """What earth2studio calls a channel; its own name where that is not known."""
    base, level, _ = level_of(variable.name, variable.long_name)
    known = KNOWN.get(base)
    if known is None or not same_units(known.units, variable.units):
        return variable.name
    return known.vocabulary + (f"{level:g}" if level is not None else "")
