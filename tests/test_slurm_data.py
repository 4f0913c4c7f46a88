"""Preparation by the ranks of an MPI job over two nodes of a real Slurm."""

import json
import os
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest
import xarray as xr

from faconv_hpc.data.store import Store
from slurms import MINUTES_S, job_environment, slowed, wait_for
from test_cli import faconv

LEVELS = (500, 850)
SRUN = ["srun", "--nodes=2", "--ntasks=4", "--kill-on-bad-exit=1", "--wait=60", sys.executable]
PREPARE = ("--frames-per-file", "2", "--mesh", "2x3", "--json")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """As the Climate Data Store delivers: two months in two files, `valid_time`, south last, levels as a dim."""
    directory = tmp_path_factory.mktemp("cds")
    rng = np.random.default_rng(7)
    paths = []
    for month in range(2):
        times = np.datetime64("2020-01-01T00", "h") + 6 * np.arange(month * 13, month * 13 + 13)
        shape = (13, len(LEVELS), 19, 36)
        data = rng.normal(250.0, 15.0, shape).astype(np.float32)
        dims = ("valid_time", "pressure_level", "latitude", "longitude")
        coordinates = {
            "valid_time": ("valid_time", times.astype("datetime64[ns]"), {"standard_name": "time"}),
            "pressure_level": ("pressure_level", np.array(LEVELS, float), {"units": "hPa"}),
            "latitude": ("latitude", np.linspace(90.0, -90.0, 19), {"units": "degrees_north"}),
            "longitude": ("longitude", np.arange(36) * 10.0, {"units": "degrees_east"}),
            "number": 0,
            "expver": ("valid_time", np.full(13, "0001")),
        }
        for name, units in (("t", "K"), ("z", "m**2 s**-2")):
            dataset = xr.Dataset({name: (dims, data + (name == "z"), {"units": units})}, coordinates)
            paths.append(directory / f"{name}-{month}.nc")
            dataset.to_netcdf(paths[-1], engine="h5netcdf")
    return [str(path) for path in paths]


def fields_of(path):
    with h5py.File(path, "r") as file:
        return file["fields"][:].tobytes()


def assert_same_store(one, other):
    names = sorted(path.name for path in one.glob("fields-*.nc"))
    assert len(names) == 13 and names == sorted(path.name for path in other.glob("fields-*.nc"))
    assert all(fields_of(one / name) == fields_of(other / name) for name in names)
    with Store.open(one) as first, Store.open(other) as second:
        assert first.channels == second.channels == ("t500", "t850", "z500", "z850")
        for statistic in ("mean", "std", "tendency_std"):
            np.testing.assert_allclose(getattr(first, statistic), getattr(second, statistic), rtol=1e-12)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, sources):
    output = tmp_path_factory.mktemp("alone") / "store"
    process = faconv("data", "prepare", *sources, "--output", output, *PREPARE)
    assert process.returncode == 0, process.stderr
    return output


def test_four_ranks_on_two_nodes_make_the_store_of_one(tmp_path, slurm, sources, alone):
    srun = [*SRUN[:1], "--mpi=pmi2", *SRUN[1:]]
    process = faconv("data", "prepare", *sources, "--output", tmp_path / "store", *PREPARE, before=srun)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["kept_files"] == 0
    assert_same_store(tmp_path / "store", alone)


def test_a_preparation_that_is_killed_goes_on_to_the_same_store(tmp_path, slurm, sources, alone):
    output = tmp_path / "store"
    srun = [*SRUN[:1], "--mpi=pmi2", *SRUN[1:]]
    command = [*srun, "-m", "faconv_hpc", "data", "prepare", *sources, "--output", str(output), *PREPARE]
    slow = slowed(tmp_path / "site", "prepare.writer", "write_fields_file", 1.0)
    job = subprocess.Popen(command, env=job_environment(**slow), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for("some files", lambda: len(list(output.glob("fields-*.nc"))) >= 3, 2 * MINUTES_S)
    rank = next(pid for pid in _children_named(b"data\0prepare") if pid != job.pid)
    os.kill(rank, signal.SIGKILL)
    printed, _ = job.communicate(timeout=MINUTES_S)
    assert job.returncode != 0, printed
    assert not (output / "store.nc").exists()
    again = faconv("data", "prepare", *sources, "--output", output, *PREPARE, before=srun)
    assert again.returncode == 0, again.stderr
    assert 3 <= json.loads(again.stdout)["kept_files"] < 13
    assert_same_store(output, alone)


def _children_named(words):
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"{entry.path}/cmdline", "rb") as file:  # noqa: PTH123
                    command = file.read()
            except OSError:
                continue
            if words in command and not command.startswith(b"srun"):
                yield int(entry.name)


def test_ranks_that_mpi_does_not_know_of_are_refused(tmp_path, slurm, sources):
    process = faconv("data", "prepare", *sources, "--output", tmp_path / "store", before=[*SRUN[:1], *SRUN[1:]])
    assert process.returncode == 2
    assert "4 ranks were started by srun, but MPI knows of 1" in process.stderr and "--mpi=pmi2" in process.stderr
    assert not (tmp_path / "store").exists()
