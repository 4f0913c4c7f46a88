"""A store with variables of all kinds, and a run of it that has learnt something, for tests of forecasts."""

import json

import numpy as np
import torch
import xarray as xr
from safetensors.torch import save_file

from faconv_hpc import Forecaster
from faconv_hpc.data.store import Store
from faconv_hpc.forecasting.campaign import plan_campaign, run_campaign
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.spatial.mesh import ProcessMesh
from faconv_hpc.training.export import CYCLE
from faconv_hpc.training.setup import Workspace, build_network, network_options
from faconv_hpc.training.trainer import train
from ranks import Layout, run_on_ranks
from runs import small_config
from test_parity import randomized

NLAT, NLON, FRAMES, DAYS, WINDOW = 11, 14, 80, 6, 3
DIMS = ("time", "latitude", "longitude")
STEPS, STARTS = 4, ["2003-03-02", "2003-06-06/2003-07-06/12d"]
NAMES = ("heat", "t", "ice", "vapour", "rain")
DATA = {
    "window": WINDOW,
    "variables": ["heat", "t500", "ice", "vapour", "sst", "rain", "t850", "height"],
    "roles": {"rain": "diagnostic", "sst": "forcing"},
    "anomalies": {"heat": 1, "ice": 1, "rain": 0},
    "log1p": {"vapour": 0.01},
    "periods": {"test": "2004-03-15/"},
    "forcings": ["insolation", "next_insolation", "step_hours"],
}


def dataset(frames=FRAMES):
    """Heat with seasons, vapour of a logarithm, ice that cells miss, sea temperatures given, rain, levels, height."""
    random = np.random.default_rng(11)
    shape = (frames, NLAT, NLON)
    season = np.cos(2 * np.pi * np.arange(frames) * DAYS / 365.25)[:, None, None]
    waves = np.cos(0.3 * np.arange(frames)[:, None, None] + np.arange(NLON) * 2 * np.pi / NLON)
    waves = waves * np.cos(np.linspace(-1.4, 1.4, NLAT))[:, None]
    ice = 2 + waves + 0.1 * random.normal(size=shape)
    ice[:, 3:6, 2:7] = np.nan
    ice[:11, 7, 4] = np.nan
    ice[np.indices(ice.shape).sum(0) % 3 == 0] = np.nan  # each cell of the others is known two times out of three
    sst = 290 + 3 * np.roll(waves, 2, axis=2)
    sst[:, 5, 5:9] = np.nan
    levels = np.stack([260 + 5 * waves, 280 + 8 * np.roll(waves, 1, axis=2)], axis=1)
    fields = {
        "heat": (280 + 15 * random.normal(size=shape[1:]) * season + 2 * waves, "K"),
        "ice": (ice, "m"),
        "vapour": (0.02 * np.exp(waves), "kg kg**-1"),
        "sst": (sst, "K"),
        "rain": (3 + season + waves**2, "m"),
    }
    values = {name: (DIMS, value.astype(np.float32), {"units": units}) for name, (value, units) in fields.items()}
    values["t"] = (("time", "level", *DIMS[1:]), levels.astype(np.float32), {"units": "K", "long_name": "Temperature"})
    values["height"] = (DIMS[1:], (1000 * random.normal(size=shape[1:])).astype(np.float32), {"units": "m"})
    coordinates = {
        "time": ("time", np.arange(frames) * DAYS * 24.0, {"units": "hours since 2003-01-01"}),
        "level": ("level", [500.0, 850.0], {"units": "hPa"}),
        "latitude": np.linspace(80, -80, NLAT),
        "longitude": np.arange(NLON) * 360 / NLON,
    }
    return xr.Dataset(values, coordinates)


def make_store(directory, data=None, **options):
    """Of the dataset, or another."""
    (dataset() if data is None else data).to_netcdf(directory / "source.nc", engine="h5netcdf")
    prepare([directory / "source.nc"], directory / "store", frames_per_file=13, mesh=(2, 2), **options)
    return directory / "store"


def draw_model(directory, store, data=None, **sections):
    """A network with drawn weights as an exported file, and what reads its store: no run is trained."""
    config = small_config(directory, store, data=DATA if data is None else data, **sections)
    workspace = Workspace.of(config, Store.open(store), ProcessMesh.alone())
    network = randomized(build_network(config, workspace.contract.channels, workspace.contract.grid)).float()
    cycle = {f"{CYCLE}/{name}": torch.from_numpy(values) for name, values in workspace.cycle.coefficients.items()}
    about = {
        "step": "0",
        "network": json.dumps(network_options(config.model, workspace.contract.channels, workspace.contract.grid)),
        "contract": workspace.contract.model_dump_json(),
        "inputs": json.dumps(workspace.contract.channels.inputs),
        "run": "drawn",
        "window": str(config.data.window),
    }
    save_file(network.state_dict() | cycle, directory / "model.safetensors", metadata=about)
    return directory / "model.safetensors", workspace


def make_run(directory):
    """The config of a trained run; the store is ``directory / "store"``, made of ``directory / "source.nc"``."""
    make_store(directory)
    training = {"steps": 12, "warmup_steps": 2, "learning_rate": 0.05}
    config = small_config(directory, directory / "store", data=DATA, training=training)
    run_on_ranks(Layout(1, 1, 1), lambda mesh: train(config, mesh))
    return config


def decoded():
    """The dataset as xarray shows it."""
    return xr.decode_cf(dataset())


def written(mesh, model, output, data, start=STARTS, steps=STEPS, **options):
    """The summary of a forecast on the ranks of a mesh."""
    forecaster = Forecaster.load(model, mesh=mesh)
    sequence = options.pop("sequence", None)
    campaign = plan_campaign(forecaster.contract, forecaster.window, data, start, steps, sequence)
    return run_campaign(forecaster, campaign, output, mesh, **options)


def opened(path):
    return xr.open_zarr(path).load() if path.suffix == ".zarr" else xr.load_dataset(path, engine="h5netcdf")
