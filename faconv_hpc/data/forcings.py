"""Input fields that are known functions of place and time. Computed per tile, without communication."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .unknown_names import index_of

HOURS_PER_DAY = 24.0


@dataclass(frozen=True)
class Instants:
    """The times of a window: T inputs and the one that follows the last.

    Args:
        hours: (T + 1,) hours since some epoch.
        year_fraction: (T + 1,) in [0, 1).
        utc_hour: (T + 1,) in [0, 24).
    """

    hours: NDArray[np.float64]
    year_fraction: NDArray[np.float64]
    utc_hour: NDArray[np.float64]


def solar_declination(year_fraction: NDArray[np.float64]) -> NDArray[np.float64]:
    """Declination of the sun in radians.

    Fourier series of J. W. Spencer, "Fourier series representation of the position of the sun",
    Search 2 (5), 172 (1971), also in Iqbal, An Introduction to Solar Radiation (1983), eq. 1.3.1;
    off by less than 0.0006 rad. Its day angle is 2 pi (day - 1) / 365, here 2 pi ``year_fraction``,
    so that calendars of 360 days have seasons too.
    """
    angle = 2 * np.pi * year_fraction
    return np.asarray(
        0.006918
        - 0.399912 * np.cos(angle)
        + 0.070257 * np.sin(angle)
        - 0.006758 * np.cos(2 * angle)
        + 0.000907 * np.sin(2 * angle)
        - 0.002697 * np.cos(3 * angle)
        + 0.00148 * np.sin(3 * angle)
    )


def equation_of_time(year_fraction: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far the sun runs ahead of the clock, in hours (Spencer 1971, Iqbal eq. 1.4.1)."""
    angle = 2 * np.pi * year_fraction
    radians = (
        0.000075
        + 0.001868 * np.cos(angle)
        - 0.032077 * np.sin(angle)
        - 0.014615 * np.cos(2 * angle)
        - 0.04089 * np.sin(2 * angle)
    )
    return np.asarray(radians * HOURS_PER_DAY / (2 * np.pi))


def insolation(
    year_fraction: NDArray[np.float64],
    utc_hour: NDArray[np.float64],
    latitude: NDArray[np.float64],
    longitude: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Sunlight at the top of the air, as a share of that under an overhead sun: insolation_TYX.

    It is ``max(0, cos zenith)``, ``cos zenith = sin(lat) sin(d) + cos(lat) cos(d) cos(h)``, with
    declination ``d`` and hour angle ``h``, zero when the sun stands highest.

    Args:
        year_fraction, utc_hour: (T,).
        latitude: (Y,) radians.
        longitude: (X,) radians.
    """
    declination = solar_declination(year_fraction)[:, None, None]
    clock = (utc_hour + equation_of_time(year_fraction) - 12.0) * (2 * np.pi / HOURS_PER_DAY)
    hour_angle = clock[:, None, None] + longitude
    latitude = latitude[:, None]
    cos_zenith = np.sin(latitude) * np.sin(declination) + np.cos(latitude) * np.cos(declination) * np.cos(hour_angle)
    return np.asarray(np.maximum(cos_zenith, 0.0))


Forcing = Callable[[Instants, NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""(instants, latitude, longitude) -> something that broadcasts to (T, Y, X)."""


def _insolation_at(first: int) -> Forcing:
    def compute(at: Instants, latitude: NDArray[np.float64], longitude: NDArray[np.float64]) -> NDArray[np.float64]:
        span = slice(first, first + at.hours.size - 1)
        return insolation(at.year_fraction[span], at.utc_hour[span], latitude, longitude)

    return compute


FORCINGS: dict[str, Forcing] = {
    "sin_latitude": lambda at, latitude, longitude: np.sin(latitude)[:, None],
    "cos_longitude": lambda at, latitude, longitude: np.cos(longitude),
    "sin_longitude": lambda at, latitude, longitude: np.sin(longitude),
    "insolation": _insolation_at(0),
    "next_insolation": _insolation_at(1),
    "step_hours": lambda at, latitude, longitude: (np.diff(at.hours) / HOURS_PER_DAY)[:, None, None],
}
"""All of order one. ``step_hours`` is the time to the next frame, in days."""


def check_forcings(names: Sequence[str]) -> tuple[str, ...]:
    """The names, if all are known.

    Raises:
        InputError: one is not; the nearest one and all are named.
    """
    for name in names:
        index_of("forcing", name, list(FORCINGS), "data.forcings")
    return tuple(names)


def compute_forcings(
    names: Sequence[str],
    at: Instants,
    latitude: NDArray[np.float64],
    longitude: NDArray[np.float64],
    out_TFYX: NDArray[np.float32],
) -> None:
    """Fills ``out_TFYX`` with one field per name and input time; latitude (Y,), longitude (X,) in radians."""
    for index, name in enumerate(names):
        out_TFYX[:, index] = FORCINGS[name](at, latitude, longitude)
