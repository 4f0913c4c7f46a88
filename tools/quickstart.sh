#!/usr/bin/env bash
# From nothing to a forecast: makes .venv, installs, fetches one week of ERA5 (17 MB), trains FAConvLSTM on two
# ranks that share the globe, and shows what it learned. Under 10 minutes on two cores. Run it again to go on
# from where it stopped; remove runs/quickstart_era5 to start anew. Options are given to `faconv train`, such as
# --set training.steps=360.
set -euo pipefail
cd "$(dirname "$0")/.."
config=configs/quickstart_era5.yaml
store=data/era5_sample

bash tools/make_venv.sh
source .venv/bin/activate

if [ ! -f "$store/store.nc" ]; then
    faconv data sample --output data/source
    faconv data prepare data/source/era5_sample.zarr --output "$store" --mesh 1x2 \
        --time-coordinate time_index --time-units "hours since 1940-01-01"
fi
faconv data inspect "$store" --mesh 1x2
faconv train "$config" --ranks 2 "$@"
faconv evaluate runs/quickstart_era5 --ranks 2
