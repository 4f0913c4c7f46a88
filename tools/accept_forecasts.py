"""Forecasts from many dates as a user makes them: on 1, 2 and 4 ranks, as NetCDF and zarr, killed and gone on with.

Trains a small network on synthetic waves, forecasts by `faconv forecast`, and holds what is written to three rules:

- ranks do not change the numbers: within 1e-5 of each variable's standard deviation;
- a command that is killed twice, by SIGKILL at random times, and started again leaves the same data, byte for byte;
- xarray opens it: dims, coordinates, no number missing.

Minutes. Run: python tools/accept_forecasts.py [--dates 20] [--steps 40] [--formats .nc] [--ranks 1 2]
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import xarray as xr
import yaml

from faconv_hpc.prepare.synthetic import SyntheticOptions, synthesise

LAYOUTS = {1: "1x1x1", 2: "1x1x2", 4: "2x2x1"}  # of the last two replicas share the dates
SAME, FORMATS = 1e-5, (".nc", ".zarr")
DIMS = ("init_time", "lead_time", "latitude", "longitude")
NLAT, NLON, STEP_H, WINDOW = 37, 72, 6, 3
TIMEOUT_S = 3600
CONFIG = {
    "data": {"window": WINDOW, "lat_boundary": "pole"},
    "model": {"hidden_channels": 16, "layers": 2, "attention_every": 2, "attention_heads": 2, "kernels": "eager"},
    "training": {"steps": 12, "warmup_steps": 2, "learning_rate": 0.02},
}


def made(directory, dates):
    """A trained run, and the first and last of so many dates, a step apart, as --start takes them."""
    synthesise(directory / "store", SyntheticOptions(nlat=NLAT, nlon=NLON, channels=3, frames=dates + 10))
    config = CONFIG | {"run_dir": str(directory / "run"), "data": CONFIG["data"] | {"store": str(directory / "store")}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    if not (directory / "run").exists():
        subprocess.run([sys.executable, "-m", "faconv_hpc", "train", str(directory / "config.yaml")], check=True)
    first = np.datetime64("2000-01-01") + np.timedelta64(WINDOW * STEP_H, "h")
    last = first + np.timedelta64((dates - 1) * STEP_H, "h")
    return f"{first}/{last}/{STEP_H}h"


def command(directory, output, start, steps, ranks):
    """``faconv forecast``, as a user types it."""
    given = ["--start", start, "--steps", steps, "--output", output, "--ranks", ranks, "--mesh", LAYOUTS[ranks]]
    given += ["--data", directory / "store"]
    line = [sys.executable, "-m", "faconv_hpc", "forecast", directory / "run", *given, "--kernels", "eager", "--json"]
    return [str(part) for part in line]


def forecast(line):
    """Runs it to its end; what it says, and how long it took."""
    began = time.monotonic()
    said = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S).stdout
    return json.loads(said), time.monotonic() - began


def killed(line, after_s, output):
    """Starts it and kills it and its ranks at a time; False: it had ended."""
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        all_of_it = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in reversed(all_of_it):
            one.kill()
        psutil.wait_procs(all_of_it[1:], timeout=60)
        process.wait()
        assert not output.exists() or output.with_name(f"{output.name}.partial").exists(), f"{output} is half there"
        return True
    return False


def opened(path):
    """As xarray reads it."""
    return xr.load_dataset(path, engine="zarr" if path.suffix == ".zarr" else "h5netcdf", decode_timedelta=True)


def check_readable(found, dates, steps):
    """All that was asked for is there, under the names that others read."""
    for name, field in found.data_vars.items():
        assert field.dims == DIMS and field.shape == (dates, steps, NLAT, NLON), (name, field.sizes)
        assert np.isfinite(field.values).all(), name
    assert found.lead_time.dtype.kind == "m" and found.init_time.dtype.kind == "M"


def furthest(found, want):
    """The largest difference of any variable, as a part of its standard deviation."""
    return max(float(np.abs(found[name] - want[name]).max() / want[name].std()) for name in want.data_vars)


def same_bytes(found, want):
    """Whether all values are the same."""
    return all(found[name].values.tobytes() == want[name].values.tobytes() for name in (*want.coords, *want.data_vars))


def main():
    """Prints a line for each output, and ends with an error where a rule is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dates", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="Of the times at which commands are killed.")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--ranks", nargs="+", type=int, default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--directory", type=Path, help="Is made and kept. Default: a temporary one.")
    options = parser.parse_args()
    directory = options.directory or Path(tempfile.mkdtemp())
    directory.mkdir(parents=True, exist_ok=True)
    start, times, alone = made(directory, options.dates), random.Random(options.seed), None
    for suffix in options.formats:
        for ranks in options.ranks:
            whole, other = (directory / f"{name}-{ranks}{suffix}" for name in ("whole", "killed"))
            _, seconds = forecast(command(directory, whole, start, options.steps, ranks))
            line, kills = command(directory, other, start, options.steps, ranks), []
            while len(kills) < 2:
                after_s = seconds * times.uniform(0.3, 0.95)
                if killed(line, after_s, other):
                    kills.append(round(after_s, 1))
                else:  # it was faster than the first: begin anew
                    kills.clear()
                    shutil.rmtree(other) if other.is_dir() else other.unlink()
            said, _ = forecast(line)
            found, want = opened(other), opened(whole)
            check_readable(want, options.dates, options.steps)
            alone = want if alone is None else alone
            away, same = furthest(want, alone), same_bytes(found, want)
            print(
                f"{suffix} on {ranks} ranks: {seconds:.1f} s, killed after {kills} s, {said['kept_dates']} of "
                f"{options.dates} dates kept; same bytes: {same}; from one rank's: {away:.1e}",
                flush=True,
            )
            assert same and away <= SAME, f"{whole} and {other}"
    if options.directory is None:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
