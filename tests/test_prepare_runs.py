"""Overwriting, killed runs, several ranks."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faconv_hpc.data.moments import Moments
from faconv_hpc.data.store import Store
from faconv_hpc.errors import InputError
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.spatial.environment import RankEnvironment, choose_steady_mpi
from sources import DIMS, ROOT, dataset, save, values

# Overwriting, killed runs, ranks


def test_a_finished_store_is_not_overwritten(tmp_path: Path) -> None:
    source = save(dataset(), tmp_path / "s.nc")
    prepare([source], tmp_path / "o", frames_per_file=2)
    before = contents(tmp_path / "o")
    with pytest.raises(InputError, match="is a finished store and is not overwritten"):
        prepare([source], tmp_path / "o", variables=["u"])
    assert contents(tmp_path / "o") == before
    summary = prepare([source], tmp_path / "o", variables=["u"], frames_per_file=5, overwrite=True)
    assert summary.kept_files == 0
    assert len(list((tmp_path / "o").glob("*.nc"))) == 3
    Store.open(tmp_path / "o").check_files()


def test_a_store_being_overwritten_is_not_finished(tmp_path: Path) -> None:
    source = save(dataset(), tmp_path / "s.nc")
    prepare([source], tmp_path / "o", frames_per_file=2)
    seen: list[bool] = []
    summary = prepare(
        *([source], tmp_path / "o"),
        frames_per_file=2,
        overwrite=True,
        progress=lambda done, total: seen.append((tmp_path / "o" / "store.nc").exists()),
    )
    assert seen == [False] * 5
    assert summary.kept_files == 0


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.glob("*.nc"))}


KILLED = """
import os, signal, sys
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.spatial.environment import RankEnvironment, choose_steady_mpi
def progress(done, total):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
prepare([sys.argv[1]], sys.argv[2], frames_per_file=2, progress=progress)
"""


def run(*command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False)


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    source = save(dataset(), tmp_path / "s.nc")
    killed = run(sys.executable, "-c", KILLED, str(source), str(tmp_path / "o"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(file.name for file in (tmp_path / "o").glob("[!.]*")) == ["fields-00000.nc", "fields-00001.nc"]
    (tmp_path / "o" / ".fields-00002.nc.part").write_bytes(b"half a file")
    os.truncate(tmp_path / "o" / "fields-00001.nc", 3000)  # as a crash of the machine may leave it
    kept = (tmp_path / "o" / "fields-00000.nc").stat().st_mtime_ns
    summary = prepare([source], tmp_path / "o", frames_per_file=2)
    assert summary.kept_files == 1
    assert (tmp_path / "o" / "fields-00000.nc").stat().st_mtime_ns == kept
    prepare([source], tmp_path / "want", frames_per_file=2)
    assert contents(tmp_path / "o") == contents(tmp_path / "want")


@pytest.mark.parametrize(
    "change",
    [{"variables": ["u"]}, {"mesh": (2, 2)}, {"compression": 1}, {"frames_per_file": 3}, {"calendar": "noleap"}, {}],
)
def test_files_of_another_request_are_not_kept(tmp_path: Path, change: dict[str, Any]) -> None:
    source = save(dataset(), tmp_path / "s.nc")
    prepare([source], tmp_path / "o", frames_per_file=2)
    (tmp_path / "o" / "store.nc").unlink()
    if not change:  # the source itself
        save(dataset({"u": (DIMS, values(8)), "v": (DIMS, values(9))}), source)
    summary = prepare([source], tmp_path / "o", **{"frames_per_file": 2, **change})
    assert summary.kept_files == 0
    prepare([source], tmp_path / "want", **{"frames_per_file": 2, **change})
    assert contents(tmp_path / "o") == contents(tmp_path / "want")


MPIEXEC = Path(sys.executable).parent / "mpiexec"
needs_mpi = pytest.mark.skipif(not MPIEXEC.exists(), reason=f"no {MPIEXEC}: pip install mpich")
RANKS = """
import sys, json
from faconv_hpc.prepare.comm import mpi_comm
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.spatial.environment import RankEnvironment, choose_steady_mpi
comm = mpi_comm()
assert comm.size == 3, comm.size
summary = prepare([sys.argv[1]], sys.argv[2], frames_per_file=2, mesh=(2, 1), comm=comm)
assert summary.files == 5
"""


@needs_mpi
def test_three_ranks_write_the_same_bytes_as_one(tmp_path: Path) -> None:
    data = values()
    data[6] = np.nan
    source = save(dataset({"t": (DIMS, data), "u": (DIMS, values(4))}), tmp_path / "s.nc")
    done = run(str(MPIEXEC), "-n", "3", sys.executable, "-c", RANKS, str(source), str(tmp_path / "o"))
    assert done.returncode == 0, done.stderr
    prepare([source], tmp_path / "want", frames_per_file=2, mesh=(2, 1))
    assert contents(tmp_path / "o") == contents(tmp_path / "want")


@needs_mpi
@pytest.mark.parametrize("where", ["writing", "opening"])
def test_an_error_on_one_rank_ends_all(tmp_path: Path, where: str) -> None:
    data = values()
    data[3, 0, 0] = np.inf  # in the second file, so of the second rank
    source = save(dataset({"t": (DIMS, data)}), tmp_path / "s.nc")
    if where == "opening":
        source = tmp_path / "not-there.nc"
    done = run(str(MPIEXEC), "-n", "3", sys.executable, "-c", RANKS, str(source), str(tmp_path / "o"), timeout=30)
    assert done.returncode == 2, done.stderr
    said = "no field is that large" if where == "writing" else "does not exist"
    assert done.stderr.count(said) == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o" / "store.nc").exists()


def test_ranks_without_an_mpi_library_are_told_to_bring_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not to start them as they have been started."""
    monkeypatch.setenv("MPI4PY_LIBMPI", "/not/there/libmpi.so")
    code = "from faconv_hpc.prepare.comm import mpi_comm; mpi_comm()"
    assert run(sys.executable, "-c", code).returncode == 0
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = run(sys.executable, "-c", code).stderr
    assert re.search(r"2 ranks were started by torchrun, but mpi4py finds no MPI library \(.*pip install mpich", told)


@pytest.mark.parametrize(
    ("device", "launcher", "chosen"),
    [
        ("ch4:ucx ofi", "srun", "ofi"),  # of PyPI, or of anybody else
        ("ch4:ucx,ofi", "srun", "ofi"),
        ("ch4:ucx", "srun", None),  # has nothing else
        ("ch4:ofi", "srun", None),
        ("ch4:ucx ofi", "mpiexec", None),
    ],
)
def test_an_mpich_with_a_choice_talks_over_ofi_under_srun(
    monkeypatch: pytest.MonkeyPatch, device: str, launcher: str, chosen: str | None
) -> None:
    monkeypatch.setenv("MPIR_CVAR_CH4_NETMOD", "")
    monkeypatch.delenv("MPIR_CVAR_CH4_NETMOD")
    monkeypatch.setattr(RankEnvironment, "launcher_name", lambda: launcher)
    choose_steady_mpi(f"MPICH Version:      5.0.2\nMPICH Device:       {device}\nMPICH CC:           ucx-ofi-cc\n")
    assert os.environ.get("MPIR_CVAR_CH4_NETMOD") == chosen


def test_moments_merge_without_losing_digits() -> None:
    random = np.random.default_rng(2)
    data = (1e8 + random.normal(size=(50, 7, 11))).astype(np.float64)
    weight = random.uniform(0.1, 1, size=7)
    merged = Moments()
    for frame in data:
        merged = merged.merged(Moments.of(frame[None], weight))
    weights = np.broadcast_to(weight[:, None], data.shape)
    mean = np.average(data, weights=weights)
    assert merged.mean == pytest.approx(mean, rel=1e-15)
    assert merged.std == pytest.approx(np.sqrt(np.average((data - mean) ** 2, weights=weights)), rel=1e-9)
    assert Moments().merged(merged) == merged == merged.merged(Moments())
