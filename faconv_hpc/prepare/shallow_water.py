"""Runs of shallow water on the rotating sphere: a dynamical benchmark of any size, by a solver that is not ours.

The solver is that of torch-harmonics (Bonev et al. 2023, arXiv 2306.03838), which is the only one that this needs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..data.layout import Channel, StoreLayout
from ..data.statistics import row_weights
from ..data.times import SECONDS_PER_HOUR, TimeAxis, decode_times, in_sequence
from ..errors import InputError
from ..harmonics import HOW_TO_INSTALL, is_installed
from ..spatial.grid import Span

if TYPE_CHECKING:
    from torch_harmonics.examples import ShallowWaterSolver

STEPS_PER_HOUR = 24  # of the solver: 150 s, which are stable up to BAND
BAND = 86  # total wavenumbers of 256 rows; of more the steps are shorter
SPIN_UP_HOURS = 12
MACH = 0.2  # of the first random winds, in units of the speed of gravity waves
LEAST_ROWS = 8
SEEDS_APART = 10**6  # runs of one seed
NOISE, GAPS = 1, 2  # streams of random numbers of a run, beside the solver's
VARIABLES = (
    Channel("geopotential", "m**2 s**-2", "geopotential of the free surface"),
    Channel("vorticity", "s**-1", "relative vorticity"),
    Channel("divergence", "s**-1", "divergence of the wind"),
)


@dataclass(frozen=True)
class ShallowWaterOptions:
    """Hourly states of several runs, each a sequence of its own, all of the same dates: a `Recipe`.

    Args:
        nlat, nlon: size of the grid, whose first and last rows are the poles. It resolves nlat / 3 total wavenumbers.
        runs: number of them.
        first: number of the first one. A run depends on its number and the seed only, not on the others.
        states: hours of each that are kept, after 12 of spin-up from a random flow.
        noise: standard deviation of noise that is added in every cell, in units of that of the variable in its run.
        missing: share of cells that are missing, others in every state and variable.
        seed: same seed and number, same run; noise and gaps change nothing but themselves.
    """

    nlat: int = 32
    nlon: int = 64
    runs: int = 48
    first: int = 0
    states: int = 36
    noise: float = 0.0
    missing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"nlat": LEAST_ROWS, "nlon": self.nlat, "runs": 1, "first": 0, "states": 1, "seed": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InputError(f"--{name} is {getattr(self, name)}; shallow water takes at least {value}. Raise it.")
        if self.nlon % 2:
            raise InputError(
                f"--nlon is {self.nlon}; half a turn lies across a pole, so it is even. Use {self.nlon + 1}."
            )
        if self.first + self.runs > SEEDS_APART:
            raise InputError(
                f"--first {self.first} and --runs {self.runs} lead beyond run {SEEDS_APART - 1}, where the runs of "
                f"another seed begin. Lower one, or give another --seed."
            )
        if not self.noise >= 0 or not 0 <= self.missing < 1:
            raise InputError(
                f"--noise is {self.noise:g} and --missing {self.missing:g}; noise is not negative, and a share of 0 to "
                f"less than 1 is missing. Use for example --noise 0.2 --missing 0.25."
            )

    @property
    def coordinates(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """From pole to pole, and meridians from 0."""
        return np.linspace(90.0, -90.0, self.nlat), np.arange(self.nlon, dtype=np.float64) * (360.0 / self.nlon)

    @property
    def variables(self) -> tuple[Channel, ...]:
        """The three that the solver steps on."""
        return VARIABLES

    @property
    def time(self) -> TimeAxis:
        """A sequence for each run, called by its number, such as ``007``."""
        hours = decode_times(np.arange(self.states), "hours since 2000-01-01", "standard", "the runs")
        return in_sequence([(f"{self.first + run:03d}", hours) for run in range(self.runs)])

    @property
    def frames_per_file(self) -> int:
        """A run, which is computed as a whole."""
        return self.states

    def fields(self, layout: StoreLayout) -> "ShallowWaterFields":
        """See `ShallowWaterFields`. Raises InputError where the solver is not installed."""
        check_solver()
        return ShallowWaterFields(layout, self)


class ShallowWaterFields:
    """The runs, each computed when the first of its states is read, and kept until another is: a `FieldReader`.

    Args:
        layout: grid and times.
        options: what to make.
    """

    def __init__(self, layout: StoreLayout, options: ShallowWaterOptions) -> None:
        self._options, self._run_of = options, layout.time.numbers
        self._weights_YX = np.broadcast_to(row_weights(*options.coordinates)[:, None], (options.nlat, options.nlon))
        self._run = lru_cache(maxsize=1)(self._computed)

    @property
    def groups(self) -> Sequence[range]:
        """All of them at once."""
        return [range(len(VARIABLES))]

    def read(self, frames: range, channels: range, rows: Span) -> NDArray[np.float32]:
        """fields_TCYX of a slab; NaN where missing."""
        states = self._options.states
        fields = [self._run(int(self._run_of[frame]))[frame % states] for frame in frames]
        return np.stack(fields)[:, channels.start : channels.stop, slice(*rows)]

    def _computed(self, run: int) -> NDArray[np.float32]:
        """(states, channels, nlat, nlon) of a run, as it is seen."""
        options, number = self._options, self._options.first + run
        seed = options.seed * SEEDS_APART + number
        fields_TCYX = states_of(solver_of(options.nlat, options.nlon), options.states, seed)
        if not np.isfinite(fields_TCYX).all():
            raise InputError(
                f"run {number} of shallow water on {options.nlat} x {options.nlon} cells is no number any more within "
                f"{SPIN_UP_HOURS + options.states} hours: the solver is not stable there. Use fewer --states or rows."
            )
        if options.noise:
            spread = _spread(fields_TCYX, self._weights_YX)[:, None, None]
            drawn = np.random.Generator(np.random.Philox(key=[seed, NOISE])).standard_normal(fields_TCYX.shape)
            fields_TCYX = fields_TCYX + options.noise * spread * drawn
        seen_TCYX = fields_TCYX.astype(np.float32)
        if options.missing:
            drawn = np.random.Generator(np.random.Philox(key=[seed, GAPS])).random(fields_TCYX.shape)
            seen_TCYX[drawn < options.missing] = np.nan
        return seen_TCYX


def check_solver() -> None:
    """Raises InputError where it is not installed."""
    if not is_installed():
        raise InputError(
            f"shallow water is computed by the package torch-harmonics, which is not installed. Run "
            f"`{HOW_TO_INSTALL}` and this command again."
        )


def solver_of(nlat: int, nlon: int) -> "ShallowWaterSolver":
    """In float64, on a grid with poles, without the wavenumbers that products would fold back (the rule of two thirds).

    Its steps are of a whole number an hour.
    """
    from torch_harmonics.examples import ShallowWaterSolver

    band = math.ceil(nlat / 3)
    steps = max(STEPS_PER_HOUR, math.ceil(STEPS_PER_HOUR * band / BAND))
    solver = ShallowWaterSolver(nlat, nlon, SECONDS_PER_HOUR / steps, lmax=band, mmax=band, grid="equiangular")
    return solver.double()


def states_of(solver: "ShallowWaterSolver", states: int, seed: int) -> NDArray[np.float64]:
    """(states, channels, nlat, nlon), an hour apart, from a random flow on, after it has spun up.

    On one thread, as ranks share the runs: the same numbers wherever it is computed.
    """
    import torch

    per_hour, threads = round(SECONDS_PER_HOUR / solver.dt), torch.get_num_threads()
    found = []
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(seed)
            spectrum = solver.timestep(solver.random_initial_condition(mach=MACH), SPIN_UP_HOURS * per_hour)
            for state in range(states):
                spectrum = solver.timestep(spectrum, per_hour) if state else spectrum
                found.append(solver.spec2grid(spectrum).numpy())
    finally:
        torch.set_num_threads(threads)
    return np.stack(found)


def _spread(fields_TCYX: NDArray[np.float64], weights_YX: NDArray[np.float64]) -> NDArray[np.float64]:
    """(channels,) standard deviation over all cells, by their area, and states."""
    weights = np.broadcast_to(weights_YX, fields_TCYX[:, 0].shape)
    means = [np.average(fields, weights=weights) for fields in np.moveaxis(fields_TCYX, 1, 0)]
    departures = fields_TCYX - np.array(means)[:, None, None]
    return np.sqrt([np.average(one**2, weights=weights) for one in np.moveaxis(departures, 1, 0)])
