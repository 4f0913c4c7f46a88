"""A store with variables of all kinds, and a run of it that has learnt something, for tests of forecasts."""

import numpy as np
import xarray as xr

from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.training.trainer import train
from ranks import Layout, run_on_ranks
from runs import small_config

NLAT, NLON, FRAMES, DAYS, WINDOW = 11, 14, 80, 6, 3
DIMS = ("time", "latitude", "longitude")
DATA = {
    "window": WINDOW,
    "variables": ["heat", "t500", "ice", "vapour", "sst", "rain", "t850", "height"],
    "roles": {"rain": "diagnostic", "sst": "forcing"},
    "anomalies": {"heat": 1, "rain": 0},
    "log1p": {"vapour": 0.01},
    "periods": {"test": "2004-03-15/"},
    "forcings": ["insolation", "next_insolation", "step_hours"],
}
SST_AFTER = 75  # sea temperatures go on to here where prognostic fields end


def dataset(frames=FRAMES):
    """Heat with seasons, vapour of a logarithm, ice that cells miss, sea temperatures given, rain, levels, height."""
    random = np.random.default_rng(11)
    shape = (frames, NLAT, NLON)
    season = np.cos(2 * np.pi * np.arange(frames) * DAYS / 365.25)[:, None, None]
    waves = np.cos(0.3 * np.arange(frames)[:, None, None] + np.arange(NLON) * 2 * np.pi / NLON)
    waves = waves * np.cos(np.linspace(-1.4, 1.4, NLAT))[:, None]
    ice = 2 + waves + 0.1 * random.normal(size=shape)
    ice[:, 3:6, 2:7] = np.nan
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


def make(directory):
    """The config of a trained run; the store is ``directory / "store"``, made of ``directory / "source.nc"``."""
    dataset().to_netcdf(directory / "source.nc", engine="h5netcdf")
    prepare([directory / "source.nc"], directory / "store", frames_per_file=13, mesh=(2, 2))
    training = {"steps": 12, "warmup_steps": 2, "learning_rate": 0.05}
    config = small_config(directory, directory / "store", data=DATA, training=training)
    run_on_ranks(Layout(1, 1, 1), lambda mesh: train(config, mesh))
    return config


def decoded():
    """The dataset as xarray shows it."""
    return xr.decode_cf(dataset())
