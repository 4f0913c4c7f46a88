"""Fields of any size that move like weather: planetary waves that travel, on a seasonal cycle; and stores of what is
made here, whatever it is."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..data.chunks import chunk_shape
from ..data.hashing import mixed, start_of, uniform
from ..data.layout import SYNTHETIC, Channel, StoreLayout
from ..data.times import SECONDS_PER_HOUR, TimeAxis, decode_times
from ..errors import InputError
from ..spatial.grid import Span
from .comm import Comm, SerialComm, alike, guarded
from .fields_file import FieldReader, default_frames_per_file
from .preparation import PrepareSummary, check_request, idle, summarise, versions
from .writer import Progress, started_directory, write_store

WAVENUMBERS = (1, 2, 3, 4, 5, 6)
SEASON = 0.5  # amplitude of the seasonal cycle, in units of all waves together
FASTEST_DAYS = 4.0  # to go once around: about the fastest planetary waves there are
SLOWEST_DAYS = 40.0


class Recipe(Protocol):
    """What a store is made of without any source. Its ``repr`` says all that decides the fields."""

    @property
    def coordinates(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(nlat,) latitudes, north first, and (nlon,) longitudes, in degrees."""

    @property
    def variables(self) -> tuple[Channel, ...]:
        """What is made, a channel each."""

    @property
    def time(self) -> TimeAxis:
        """Of the frames."""

    @property
    def frames_per_file(self) -> int | None:
        """Frames that are best made together; None: it makes no difference."""

    def fields(self, layout: StoreLayout) -> FieldReader:
        """They are made where they are read. Raises InputError where they cannot be."""


@dataclass(frozen=True)
class SyntheticOptions:
    """Travelling waves: a `Recipe`.

    Args:
        nlat, nlon: size of the grid; rows are centres of equal bands, no pole rows.
        channels: number of channels, called wave_0, wave_1, ...
        frames: number of times.
        step_hours: hours between them.
        start: first time, as in ``2000-01-01``.
        noise: standard deviation of the noise, independent in every cell, in units of the waves'.
        seed: same seed, same fields.
    """

    nlat: int = 181
    nlon: int = 360
    channels: int = 3
    frames: int = 48
    step_hours: float = 6.0
    start: str = "2000-01-01"
    noise: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("nlat", "nlon", "channels", "frames"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}; a store has at least 1. Use a positive number.")
        if not self.step_hours * SECONDS_PER_HOUR >= 1 or not self.noise >= 0:
            raise InputError(
                f"--step-hours is {self.step_hours:g} and --noise {self.noise:g}; a step is at least a second, "
                f"noise not negative. Use for example --step-hours 6 --noise 0.05."
            )

    @property
    def coordinates(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Centres of equal bands, and meridians from 0."""
        band_deg = 180.0 / self.nlat
        latitude_deg = 90.0 - band_deg * (np.arange(self.nlat, dtype=np.float64) + 0.5)
        return latitude_deg, np.arange(self.nlon, dtype=np.float64) * (360.0 / self.nlon)

    @property
    def variables(self) -> tuple[Channel, ...]:
        """``wave_0``, ``wave_1``, ..."""
        names = [f"wave_{index}" for index in range(self.channels)]
        return tuple(Channel(name, "1", f"synthetic planetary waves, {name}") for name in names)

    @property
    def time(self) -> TimeAxis:
        """Equal steps in one sequence; raises InputError for a start that is no date."""
        start = decode_times(np.zeros(1), f"hours since {self.start}", "standard", "--start").seconds
        steps_s = np.rint(np.arange(self.frames) * self.step_hours * SECONDS_PER_HOUR).astype(np.int64)
        return TimeAxis(start + steps_s, "standard")

    @property
    def frames_per_file(self) -> None:
        """Any number."""

    def fields(self, layout: StoreLayout) -> "SyntheticFields":
        """See `SyntheticFields`."""
        return SyntheticFields(layout, self)


class SyntheticFields:
    """The fields, computed where they are asked for: a `FieldReader`.

    A channel is ``sum_k cos(lat)^k A_k cos(k lon - w_k t + p_k) + S sin(lat) cos(2 pi (year - 0.5))``
    plus noise. ``cos(lat)^k cos(k lon)`` is a spherical harmonic (l = m = k), so it is smooth at the
    poles. Every number depends on (seed, frame, channel, row, column) only, not on the slab.

    Args:
        layout: grid and times.
        options: what to make.
    """

    def __init__(self, layout: StoreLayout, options: SyntheticOptions) -> None:
        self._options = options
        self._latitude = np.deg2rad(layout.latitude_deg)
        self._longitude = np.deg2rad(layout.longitude_deg)
        self._time = layout.time
        draw = np.random.Philox(key=np.array([options.seed % 2**64, 0], dtype=np.uint64))
        raw = draw.random_raw(4 * options.channels * len(WAVENUMBERS)).reshape(4, options.channels, len(WAVENUMBERS))
        share, pace, phase, direction = uniform(raw)
        self._amplitude_CK = (0.5 + share) / np.sqrt(np.array(WAVENUMBERS))
        periods_h = 24.0 * (FASTEST_DAYS + (SLOWEST_DAYS - FASTEST_DAYS) * pace)
        self._rate_CK = 2 * np.pi / periods_h * np.array(WAVENUMBERS) * np.where(direction < 0.7, 1.0, -1.0)
        self._phase_CK = 2 * np.pi * phase

    @property
    def groups(self) -> Sequence[range]:
        """Every channel for itself."""
        return [range(channel, channel + 1) for channel in range(self._options.channels)]

    def read(self, frames: range, channels: range, rows: Span) -> NDArray[np.float32]:
        """fields_TCYX of a slab."""
        latitude = self._latitude[slice(*rows)]
        shape = len(frames), len(channels), latitude.size, self._longitude.size
        fields_TCYX = np.empty(shape, dtype=np.float32)
        for t, frame in enumerate(frames):
            for c, channel in enumerate(channels):
                field_YX = self._waves(frame, channel, latitude)
                if self._options.noise:
                    field_YX += self._options.noise * self._noise(frame, channel, rows)
                fields_TCYX[t, c] = field_YX
        return fields_TCYX

    def _waves(self, frame: int, channel: int, latitude: NDArray[np.float64]) -> NDArray[np.float64]:
        season = -np.cos(2 * np.pi * self._time.year_fraction[frame])  # northern summer in July
        field_YX = np.repeat((SEASON * season * np.sin(latitude))[:, None], self._longitude.size, axis=1)
        hours = self._time.hours[frame] - self._time.hours[0]
        for k, wavenumber in enumerate(WAVENUMBERS):
            angle = wavenumber * self._longitude - self._rate_CK[channel, k] * hours + self._phase_CK[channel, k]
            profile = self._amplitude_CK[channel, k] * np.cos(latitude) ** wavenumber
            field_YX += profile[:, None] * np.cos(angle)
        return field_YX

    def _noise(self, frame: int, channel: int, rows: Span) -> NDArray[np.float64]:
        """(rows, nlon) of mean 0 and variance 1, from a hash of the cell's number."""
        nlon = self._longitude.size
        cells = np.arange(rows[0] * nlon, rows[1] * nlon, dtype=np.uint64).reshape(-1, nlon)
        start = start_of(self._options.seed, frame, channel)
        return np.asarray((uniform(mixed(cells + start)) - 0.5) * np.sqrt(12.0))


def synthesise(
    output: str | Path,
    recipe: Recipe,
    *,
    mesh: tuple[int, int] = (1, 1),
    frames_per_file: int | None = None,
    compression: int | None = None,
    overwrite: bool = False,
    comm: Comm | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> PrepareSummary:
    """Collective. Makes a store, slab by slab; the ranks share its files. A killed one goes on: whole files are kept.

    Raises:
        InputError: sizes or options that make no sense, or a store that is there already.
    """
    started = time.monotonic()
    comm = comm or SerialComm()
    with guarded(comm):
        layout = alike(comm, lambda: _layout(recipe, mesh, frames_per_file, compression, command))
        fields = alike(comm, lambda: recipe.fields(layout))
        with started_directory(Path(output), comm, overwrite=overwrite):
            written = write_store(Path(output), layout, fields, repr(recipe), comm=comm, progress=progress)
    return summarise(Path(output), layout, written, time.monotonic() - started, idle(len(written.files), comm))


def _layout(
    recipe: Recipe,
    mesh: tuple[int, int],
    frames_per_file: int | None,
    compression: int | None,
    command: str,
) -> StoreLayout:
    check_request(frames_per_file, compression)
    (latitude_deg, longitude_deg), channels = recipe.coordinates, recipe.variables
    shape = latitude_deg.size, longitude_deg.size
    return StoreLayout(
        latitude_deg=latitude_deg,
        longitude_deg=longitude_deg,
        channels=channels,
        time=recipe.time,
        chunk=chunk_shape(shape, *mesh, len(channels)),
        mesh=mesh,
        frames_per_file=frames_per_file or recipe.frames_per_file or default_frames_per_file(shape, len(channels)),
        compression=compression,
        provenance={
            "command": command,
            "sources": [repr(recipe)],
            "versions": versions(),
            "notes": [],
            SYNTHETIC: True,
        },
    )
