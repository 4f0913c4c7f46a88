"""Runs of shallow water on the rotating sphere, as a source for `faconv data prepare`: a benchmark that is not ours.

The solver is that of torch-harmonics (Bonev et al. 2023, arXiv 2306.03838):
    pip install --no-deps torch-harmonics==0.9.3
    python tools/shallow_water.py data/training.nc
    python tools/shallow_water.py data/longer.nc --first 48 --runs 8 --states 100
    faconv data prepare data/training.nc data/longer.nc --sequence-dim run --output data/shallow_water
"""

import argparse
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr

if TYPE_CHECKING:
    from torch_harmonics.examples import ShallowWaterSolver

SOLVER_STEP_S = 150.0
SPIN_UP_HOURS = 12
MACH = 0.2
UNITS = {"geopotential": "m**2 s**-2", "vorticity": "s**-1", "divergence": "s**-1"}


def run_of(solver: "ShallowWaterSolver", states: int) -> np.ndarray:
    """Hourly states (time, channel, latitude, longitude) from a random balanced flow on, after it has spun up."""
    per_hour = round(3600 / SOLVER_STEP_S)
    spectrum = solver.timestep(solver.random_initial_condition(mach=MACH), SPIN_UP_HOURS * per_hour)
    found = []
    for _ in range(states):
        found.append(solver.spec2grid(spectrum).numpy().astype(np.float32))
        spectrum = solver.timestep(spectrum, per_hour)
    return np.stack(found)


def source(fields_RTCYX: np.ndarray, names: list[str], solver: "ShallowWaterSolver") -> xr.Dataset:
    """With coordinates, poles included; all runs have the same dates."""
    fields = {
        name: (("run", "time", "latitude", "longitude"), fields_RTCYX[:, :, channel], {"units": units})
        for channel, (name, units) in enumerate(UNITS.items())
    }
    coordinates = {
        "run": ("run", names),
        "time": ("time", np.arange(fields_RTCYX.shape[1]), {"units": "hours since 2000-01-01"}),
        "latitude": ("latitude", np.rad2deg(solver.lats.numpy()), {"units": "degrees_north"}),
        "longitude": ("longitude", np.rad2deg(solver.lons.numpy()), {"units": "degrees_east"}),
    }
    return xr.Dataset(fields, coordinates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="file to write")
    parser.add_argument("--runs", type=int, default=48)
    parser.add_argument("--first", type=int, default=0, help="number of the first run: its name and its seed")
    parser.add_argument("--states", type=int, default=36, help="hours of each run that are kept")
    parser.add_argument("--nlat", type=int, default=32)
    parser.add_argument("--nlon", type=int, default=64)
    given = parser.parse_args()
    from torch_harmonics.examples import ShallowWaterSolver

    band = math.ceil(given.nlat / 3)
    sizes = {"nlat": given.nlat, "nlon": given.nlon, "lmax": band, "mmax": band}
    solver = ShallowWaterSolver(dt=SOLVER_STEP_S, grid="equiangular", **sizes).double()
    names, runs = [f"{given.first + run:03d}" for run in range(given.runs)], []
    began = time.monotonic()
    with torch.inference_mode():
        for name in names:
            torch.manual_seed(int(name))
            runs.append(run_of(solver, given.states))
    source(np.stack(runs), names, solver).to_netcdf(given.output, engine="h5netcdf")
    print(f"{given.output}: {given.runs} runs of {given.states} hours, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
