"""Forecasts as other programs take them: WeatherBench-X reads and judges a file, earth2studio takes a network.

- WeatherBench-X's own loader opens what `faconv forecast` wrote, renames nothing, and its RMSE is that of `evaluate`;
- a `Forecaster` is a `PrognosticModel` of earth2studio's own protocol, if --model and --earth2studio are given.

Neither is a dependency: name where their sources are, from GitHub, and what WeatherBench-X imports (absl-py, jax).
Run: PYTHONPATH=WEATHERBENCHX python tools/check_readers.py FORECAST STORE [--model MODEL --earth2studio SOURCES]
"""

import argparse
import sys
import types
from pathlib import Path

import numpy as np
import xarray as xr

from faconv_hpc import Forecaster
from faconv_hpc.evaluation.evaluate import evaluate
from faconv_hpc.spatial.mesh import ProcessMesh

SAME = 1e-5
OVER = ["init_time", "latitude", "longitude"]


def came_in(store):
    """What came, one variable for each channel."""
    files = [xr.open_dataset(path, engine="h5netcdf") for path in sorted(store.glob("fields-*.nc"))]
    return xr.concat([one["fields"] for one in files], "time").load().to_dataset("channel")


def rmse_of_weatherbench(forecast, came):
    """(lead, variable) RMSE by its loaders, its weights and its metric."""
    from weatherbenchX import aggregation, weighting
    from weatherbenchX.data_loaders import xarray_loaders
    from weatherbenchX.metrics import base, deterministic

    said = xarray_loaders.PredictionsFromXarray(path=str(forecast), rename_dimensions=None)
    truth = xarray_loaders.TargetsFromXarray(ds=came)
    said.maybe_prepare_dataset()
    times = said._ds.init_time.values, said._ds.lead_time.values
    metrics = {"rmse": deterministic.RMSE()}
    statistics = base.compute_unique_statistics_for_all_metrics(
        metrics, said.load_chunk(*times), truth.load_chunk(*times)
    )
    aggregator = aggregation.Aggregator(reduce_dims=OVER, weigh_by=[weighting.GridAreaWeighting()])
    found = aggregator.aggregate_statistics(statistics).metric_values(metrics)
    return {name.removeprefix("rmse."): field.values for name, field in found.items()}


def is_prognostic_model(model, sources):
    """By the protocol in its own file, which needs nothing but the name of a type."""
    utils = types.ModuleType("earth2studio.utils.type")
    utils.CoordSystem = dict
    sys.modules |= {"earth2studio": utils, "earth2studio.utils": utils, "earth2studio.utils.type": utils}
    protocol = types.ModuleType("px_base")
    text = "from __future__ import annotations\n" + (sources / "models" / "px" / "base.py").read_text()
    exec(compile(text, "base.py", "exec"), protocol.__dict__)
    forecaster = Forecaster.load(model, device="cpu")
    before = forecaster.input_coords()
    after = forecaster.output_coords(before)
    same = all(np.array_equal(before[name], after[name]) for name in ("variable", "lat", "lon"))
    return isinstance(forecaster, protocol.PrognosticModel) and same and len(after["lead_time"]) == 1


def main():
    """Prints both RMSEs of each variable and lead, and ends with an error where they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forecast", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--earth2studio", type=Path, metavar="SOURCES", help="Its folder with models/px/base.py.")
    options = parser.parse_args()
    theirs = rmse_of_weatherbench(options.forecast, came_in(options.store))
    found = evaluate([options.forecast], ProcessMesh.alone(), data=[options.store])
    for place, target in enumerate(found.targets):
        ours = found.metrics["rmse"][:, 0, place]
        away = np.abs(ours / theirs[target.name] - 1).max()
        print(f"{target.name}: {ours.size} leads, RMSE {ours[0]:.6g} to {ours[-1]:.6g}, largest difference {away:.1e}")
        assert away <= SAME, f"WeatherBench-X has {theirs[target.name]}, evaluate {ours}"
    if options.earth2studio is not None:
        assert is_prognostic_model(options.model, options.earth2studio), f"{options.model} is no PrognosticModel"
        print(f"{options.model} is a PrognosticModel of earth2studio")


if __name__ == "__main__":
    main()
