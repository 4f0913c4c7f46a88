"""What a trained network is worth on another grid and with other variables: fine-tuned beside from scratch.

Real data: the sample's week of ERA5 at one degree, five variables; then the same week at two degrees with two more that
follow from them, wind speed and momentum flux.

Run: python tools/bench_fine_tuning.py data/source/era5_sample.zarr data/era5_sample runs/fine_tuning
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import numpy as np
import xarray as xr
import yaml

from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.training.records import read_records

QUICK = Path(__file__).parents[1] / "configs" / "quickstart_era5.yaml"
SCRATCH_STEPS, TUNED_STEPS, OF_MEAN = 50, 10, 5
COARSER = 2
TIMES = {"time_coordinate": "time_index", "time_units": "hours since 1940-01-01"}


def coarser(sample: Path, directory: Path) -> Path:
    """A store of every so many rows and columns, `COARSER`, with two variables more."""
    store = directory / "store"
    if not (store / "store.nc").exists():
        data = xr.open_zarr(sample, consolidated=False, decode_times=False)
        data = data.isel(latitude=slice(None, None, COARSER), longitude=slice(None, None, COARSER)).load()
        data["speed"] = np.hypot(data.u10, data.v10).assign_attrs(units="m s**-1")
        data["flux"] = (data.u10 * data.v10).assign_attrs(units="m**2 s**-2")
        data.drop_encoding().to_netcdf(directory / "coarse.nc", engine="h5netcdf")
        prepare([directory / "coarse.nc"], store, **TIMES)
    return store


def losses(run_dir: Path, store: Path, seed: int, cells: int = 1, **training: object) -> list[float]:
    """Of every step of a run on one rank; a run that is there already is not done again.

    Args:
        cells: of the sample along a side of the grid's, so that squares are as wide on both.
    """
    config = yaml.safe_load(QUICK.read_text())
    config |= {"run_dir": str(run_dir), "mesh": {}, "data": config["data"] | {"store": str(store)}}
    config["model"]["scale_factor"] = max(config["model"]["scale_factor"] // cells, 1)
    config["training"] |= {"seed": seed, **training}
    run_dir.mkdir(parents=True, exist_ok=True)
    given = run_dir / "given.yaml"
    given.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "faconv_hpc", "train", str(given)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return [record.forecast_loss for record in read_records(run_dir)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sample", type=Path, help="the sample, as `faconv data sample` fetches it")
    parser.add_argument("store", type=Path, help="made of it, at one degree")
    parser.add_argument("runs", type=Path, help="directory for the runs")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    given.runs.mkdir(parents=True, exist_ok=True)
    coarse = coarser(given.sample, given.runs)
    for seed in range(given.seeds):
        first = given.runs / f"first-{seed}"
        losses(first, given.store.resolve(), seed)
        start = {"steps": TUNED_STEPS, "warmup_steps": 1, "learning_rate": 0.004, "start_from": str(first)}
        tuned = losses(given.runs / f"tuned-{seed}", coarse.resolve(), seed, COARSER, **start)
        scratch = losses(given.runs / f"scratch-{seed}", coarse.resolve(), seed, COARSER, steps=SCRATCH_STEPS)
        early, late = mean(tuned[:OF_MEAN]), mean(scratch[-OF_MEAN:])
        print(
            f"seed {seed}: fine-tuned {tuned[0]:.3f} at its first step, {early:.3f} over the first {OF_MEAN}; "
            f"from scratch {late:.3f} over the last {OF_MEAN} of {SCRATCH_STEPS}",
            flush=True,
        )


if __name__ == "__main__":
    main()
