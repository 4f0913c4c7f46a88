"""The doctor: every finding under circumstances that are played, several ranks from the pool, and whole processes."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import pytest
import torch

import forks
from faconv_hpc import load_config
from faconv_hpc.cli.doctor import _show
from faconv_hpc.data.probe import locking_problem
from faconv_hpc.launch import checks, doctor, file_checks, rank_checks
from faconv_hpc.launch.findings import FILES, MACHINE, NETWORK, SOFTWARE, Finding, Report, Subject, Verdict, merged
from faconv_hpc.spatial import bandwidth
from ranks import run_on_ranks
from runs import make_store, write_config
from test_cli import faconv, messages

OK, WARNING, FAILURE = Verdict
THREE = (1, 1, 3)
UP = "echo 'Slurmctld(primary) at head is UP'"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "waves")


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A machine that has no programs but those that are put into this directory."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in ("CXX", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(directory))
    return directory


def put(directory, name, script):
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def subject_of(tmp_path, store=None, **sections):
    """A run that has not begun; with a config, if a store is given."""
    config = load_config(write_config(tmp_path, store, **sections)) if store else None
    return Subject(tmp_path / "run", config, quick=True)


def only(findings, verdict, value, fix=""):
    """The one finding, looked at."""
    (finding,) = findings
    assert finding.verdict is verdict, finding
    assert re.search(value, finding.value), finding
    assert re.search(fix, finding.fix or ""), finding
    return finding


# Software and machine


@pytest.mark.parametrize(
    ("found", "verdict", "value", "fix"),
    [
        ({"torch": "2.13.0+cpu"}, OK, r"2\.13\.0\+cpu", ""),
        ({"torch": "2.11.0"}, OK, r"2\.11\.0", ""),
        ({"torch": "2.9.1"}, FAILURE, r"2\.9\.1, needed is 2\.11 or newer", r"--upgrade 'torch>=2\.11,<2\.14'"),
        ({"torch": "2.14.0"}, WARNING, r"2\.14\.0, tested is up to before 2\.14", "faconv verify"),
        ({"deepspeed": "not installed"}, FAILURE, "not installed", r"pip install 'deepspeed>=0\.19,<0\.20'"),
    ],
)
def test_libraries_must_be_there_and_new_enough(tmp_path, monkeypatch, found, verdict, value, fix):
    monkeypatch.setattr(checks, "versions", lambda: found)
    only(checks.library_versions(subject_of(tmp_path)), verdict, value, fix)


def test_a_compiler_is_needed_where_the_config_compiles(tmp_path, programs, store):
    anyone = subject_of(tmp_path)
    compiled = subject_of(tmp_path / "compiled", store, model={"kernels": "compiled"})
    eager = subject_of(tmp_path / "eager", store, model={"kernels": "eager"})
    only(checks.compiler(anyone), WARNING, r"g\+\+ is not on PATH", r"install g\+\+")
    only(checks.compiler(eager), WARNING, r"g\+\+ is not on PATH")
    only(checks.compiler(compiled), FAILURE, r"g\+\+ is not on PATH", r"--set model\.kernels=eager")
    put(programs, "g++", "echo 'probe.cpp:2:10: fatal error: omp.h: No such file' >&2; exit 1")
    only(checks.compiler(compiled), FAILURE, r"g\+\+ cannot make a library with OpenMP: probe.*omp\.h")


def test_what_computes_the_passes_of_a_run_is_told(tmp_path, monkeypatch, store):
    def of(**model):
        return checks.kernels(subject_of(tmp_path / "-".join(model.values()), store, model=model))

    assert checks.kernels(subject_of(tmp_path)) == of(cell="convlstm") == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    only(of(kernels="eager"), OK, r"^eager, on a CPU \(model\.kernels=eager\)$")
    only(of(kernels="triton"), OK, r"^C\+\+, on a CPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: name)
    only(of(kernels="compiled"), OK, r"^torch\.compile, on a GPU")
    only(of(kernels="triton"), OK, r"^Triton, on a GPU")
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    only(of(kernels="triton"), FAILURE, "the package triton is not there", r"--set model\.kernels=eager")


def test_the_compiler_that_cxx_names_is_tried(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "g++ -std=c++17")
    only(checks.compiler(subject_of(tmp_path)), OK, r"g\+\+")
    monkeypatch.setenv("CXX", "no-such-compiler")
    only(checks.compiler(subject_of(tmp_path)), WARNING, "no-such-compiler is not on PATH", "set CXX")


def test_ninja_may_stand_beside_python(tmp_path, programs, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python" / "python3"))
    only(checks.ninja(subject_of(tmp_path)), WARNING, "not on PATH", "pip install ninja")
    put(tmp_path / "python", "ninja", "")
    only(checks.ninja(subject_of(tmp_path)), OK, "python/ninja")


def test_gpus_that_torch_cannot_use(tmp_path, programs, monkeypatch, store):
    subject = subject_of(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    only(checks.gpus(subject), OK, "none: CPU, gloo")
    put(programs, "nvidia-smi", "echo 'GPU 0: NVIDIA H100 (UUID: a)'; echo 'GPU 1: NVIDIA H100 (UUID: b)'")
    only(checks.gpus(subject), FAILURE, r"nvidia-smi lists 2, torch 2\..* can use none", "built for CPUs: pip install")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    only(checks.gpus(subject), OK, "hidden by CUDA_VISIBLE_DEVICES")
    put(programs, "nvidia-smi", "echo 'No devices were found'; exit 6")
    only(checks.gpus(subject), OK, "none")
    put(programs, "nvidia-smi", "echo 'Failed to initialize NVML: driver mismatch'; exit 18")
    only(checks.gpus(subject), WARNING, "Failed to initialize NVML", "driver")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    asking = subject_of(tmp_path, store, slurm={"gpus_per_node": 4})
    only(checks.gpus(asking), FAILURE, r"gpus_per_node asks for 4", r"--gpus-per-node")


@pytest.mark.parametrize(
    ("built_for", "hidden", "fix"),
    [(None, None, "built for CPUs"), ("12.8", None, "driver may be older than CUDA 12.8"), ("12.8", "9", "unset it")],
)
def test_why_torch_cannot_use_a_gpu(monkeypatch, built_for, hidden, fix):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert fix in checks._unusable_fix(SimpleNamespace(version=SimpleNamespace(cuda=built_for, hip=None)))


def test_the_lock_of_a_killed_build_is_found(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lock = tmp_path / "torch_extensions" / "py311_cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    only(checks.build_locks(subject_of(tmp_path)), OK, "none older than 10 min")  # a build that runs
    os.utime(lock, (time.time() - 3000,) * 2)
    only(checks.build_locks(subject_of(tmp_path)), WARNING, "fused_adam/lock is 50 min old", f"rm {lock}")


def test_mpi_is_asked_in_a_process_of_its_own(tmp_path, programs, monkeypatch):
    subject = subject_of(tmp_path)
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python / "python3"))
    put(python, "python3", "echo None")
    only(checks.mpi(subject), OK, "none: data are prepared by one process")
    put(programs, "mpiexec", "")
    only(checks.mpi(subject), WARNING, "there is .*bin/mpiexec", "LD_LIBRARY_PATH")
    put(python, "python3", "echo 'Traceback'; echo 'undefined symbol: MPI_Init'; exit 1")
    only(checks.mpi(subject), WARNING, r"failed \(1\): undefined symbol: MPI_Init", "pip install mpich")
    put(python, "python3", "kill -SEGV $$")
    only(checks.mpi(subject), WARNING, r"failed \(-11\)")


def test_mpi_is_loaded_and_not_started(tmp_path):
    source = "from faconv_hpc.prepare.comm import mpi_library\nprint(mpi_library())\n"
    source += "from mpi4py import MPI\nassert not MPI.Is_initialized()"
    ran = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    if ran.stdout.strip() == "None":
        pytest.skip("no MPI library: pip install mpich")
    assert ran.returncode == 0, ran.stderr
    assert only(checks.mpi(subject_of(tmp_path)), OK, r"\d").value == ran.stdout.strip()


def test_slurm_answers_or_not(tmp_path, programs, monkeypatch):
    subject = subject_of(tmp_path)
    only(checks.slurm(subject), OK, "none on this machine")
    put(programs, "scontrol", "echo 'scontrol: fatal: Could not establish a configuration source' >&2; exit 1")
    only(checks.slurm(subject), OK, "its commands, and no cluster that they know of")
    put(programs, "scontrol", UP)
    only(checks.slurm(subject), OK, "head is UP; not in a job")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_STEP_ID", "3")
    only(checks.slurm(subject), OK, "in job 12, step 3")
    put(programs, "scontrol", "echo 'Slurmctld(primary) at head is DOWN'")
    only(checks.slurm(subject), WARNING, "head is DOWN; in job 12", "SLURM_CONF")
    for first, second in (("UP", "DOWN"), ("DOWN", "UP")):  # one of two is enough
        lines = f"echo 'Slurmctld(primary) at head is {first}'; echo 'Slurmctld(backup) at spare is {second}'"
        put(programs, "scontrol", lines)
        only(checks.slurm(subject), OK, f"at {'head' if first == 'UP' else 'spare'} is UP; in job 12")
    (programs / "scontrol").unlink()
    only(checks.slurm(subject), WARNING, "in job 12, step 3, but there is no scontrol", "scontrol visible")


def test_a_program_that_hangs_is_not_waited_for(tmp_path, programs, monkeypatch):
    monkeypatch.setattr(checks, "PROGRAM_S", 0.2)
    put(programs, "scontrol", "exec /bin/sleep 30")
    began = time.monotonic()
    only(checks.slurm(subject_of(tmp_path)), WARNING, r"no answer in 0\.2 s")
    assert time.monotonic() - began < 10


# Files


def named(findings):
    return {finding.name: finding for finding in findings}


def test_a_run_directory_that_can_be_written_is_left_as_it_was(tmp_path):
    found = named(file_checks.run_directory(Subject(tmp_path / "a" / "b")))
    assert set(found) == {"run directory", "free space", "HDF5", "write speed"}
    assert found["run directory"].verdict is OK and found["write speed"].amount > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("run_dir", ["file", "file/run"])
def test_a_file_in_the_way_of_the_run_directory(tmp_path, run_dir):
    (tmp_path / "file").touch()
    found = file_checks.run_directory(Subject(tmp_path / run_dir))
    only(found, FAILURE, "cannot be written: Not a directory", "--run-dir")


@pytest.mark.parametrize(("free_gib", "verdict"), [(0.05, FAILURE), (2.0, WARNING), (50.0, OK)])
def test_little_room(tmp_path, monkeypatch, free_gib, verdict):
    usage = SimpleNamespace(free=free_gib * 2**30)
    monkeypatch.setattr(file_checks.shutil, "disk_usage", lambda path: usage)
    only([file_checks._room(tmp_path)], verdict, f"{free_gib:.1f} GiB", "" if verdict is OK else "keep_last")


def test_a_slow_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(file_checks.os, "fsync", lambda file: time.sleep(0.6))
    only([file_checks._speed(tmp_path)], WARNING, r"1\d MB/s", "faster file system")


def test_a_full_disk_is_told_as_such(tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_checks.os, "fsync", full)
    only(file_checks.run_directory(Subject(tmp_path)), FAILURE, "cannot be written: No space left", "room in it")


def test_hdf5_where_locks_are_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("HDF5_USE_FILE_LOCKING", raising=False)
    open_file = h5py.File

    def refusing(path, mode, locking):
        if locking in refused:
            raise OSError(38, "unable to lock file, errno = 38")
        return open_file(path, mode, locking=locking)

    monkeypatch.setattr(h5py, "File", refusing)
    refused = {True}
    assert locking_problem(tmp_path, locks=False) is None and "errno = 38" in locking_problem(tmp_path, locks=True)
    only(file_checks._locks(tmp_path), WARNING, "only without locks: .*unable to lock", "HDF5_USE_FILE_LOCKING=FALSE")
    refused = {True, False}
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "TRUE")
    only(file_checks._locks(tmp_path), FAILURE, "not even without locks, HDF5_USE_FILE_LOCKING=TRUE", "FALSE")
    refused = set()
    only(file_checks._locks(tmp_path), OK, "with and without locks")
    assert list(tmp_path.iterdir()) == []


def test_the_store_of_the_config(tmp_path, store):
    assert file_checks.store(subject_of(tmp_path)) == []
    fits = subject_of(tmp_path, store, mesh={"lat": 2, "lon": 2})
    whole, goes_with_it = file_checks.store(fits)
    only([whole], OK, r"16 frames, 2 variables, 11 x 14 cells$")
    only([goes_with_it], OK, r"^10 windows of 2 variables, tiles of 6 x 7$")
    missing = subject_of(tmp_path, tmp_path / "nowhere")
    only(file_checks.store(missing), FAILURE, "nowhere does not exist", "Make one with `faconv data prepare")
    tiles = subject_of(tmp_path, store, mesh={"lat": 12})
    only(file_checks.store(tiles)[1:], FAILURE, r"11 rows cannot be cut over 12 ranks", r"mesh\.lat")
    variables = subject_of(tmp_path, store, data={"variables": ["wav_1"]})
    only(file_checks.store(variables)[1:], FAILURE, "wav_1", "wave_1")
    kernel = subject_of(tmp_path, store, model={"kernel_size": 4})
    only(file_checks.store(kernel)[1:], FAILURE, "kernel_size=4 has no centre", "odd size")


# From findings to a report


def test_a_finding_that_is_not_ok_needs_a_fix():
    with pytest.raises(AssertionError, match=r"disk: warning, but fix=None"):
        Finding(FILES, "disk", WARNING, "slow")


def test_the_ranks_that_differ_are_named():
    nodes = ["n1", "n1", "n2", "n2"]
    version = [[Finding(SOFTWARE, "torch", OK, "2.13", differs=FAILURE)] for _ in nodes]
    only(merged(version, nodes), OK, r"^2\.13$")
    version[3] = [Finding(SOFTWARE, "torch", OK, "2.12", differs=FAILURE)]
    only(merged(version, nodes), FAILURE, r"^2\.12 on n2 \(rank 3\); 2\.13 on the 3 others$", "install the same")
    room = [[Finding(FILES, "free space", OK, f"{gib} GiB", amount=gib)] if gib else [] for gib in (9, 0, 7, 0)]
    only(merged(room, nodes), OK, r"^7 GiB on n2, the least of 2; most: 9 GiB$")
    shared = [[Finding(FILES, "free space", OK, f"{gib} GiB", amount=gib)] for gib in (9.0, 9.1, 9.0, 9.0)]
    only(merged(shared, nodes), OK, r"^9\.0 GiB$")
    locks = [[Finding(FILES, "HDF5", OK, "with locks")], [], [Finding(FILES, "HDF5", WARNING, "none", "Fix it.")], []]
    only(
        merged(locks, nodes),
        WARNING,
        r"with locks on n1 \(rank 0\).*none on n2 \(rank 2\)|none on.*with locks on",
        "Fix",
    )


@pytest.mark.parametrize(("worst", "closing"), [(OK, "0 warnings, 0 failures"), (WARNING, "1 warning, 0 failures")])
def test_the_table_ends_with_fixes_and_a_count(capsys, worst, closing):
    slurm = Finding(MACHINE, "Slurm", worst, "[ping] DOWN", "Look at [slurmctld]." if worst else None)
    report = Report.of(["n1", "n2"], [slurm, Finding(SOFTWARE, "torch", OK, "2.13")])
    assert _show(report, as_json=False) == worst
    *table, last = capsys.readouterr().out.splitlines()
    assert last == closing
    assert "2 ranks on 2 nodes" in table[0] and any("[ping] DOWN" in line for line in table)
    rows = [line.split("│")[1].strip() for line in table if " ok " in line or " warning " in line]
    assert rows == ["software", "machine"]
    assert (table[-1] == "warning: Slurm: Look at [slurmctld].") == (worst is WARNING)


def test_failures_are_mended_first(capsys):
    slurm = Finding(MACHINE, "Slurm", WARNING, "DOWN", "Look at it.")
    store = Finding(FILES, "store", FAILURE, "missing", "Make one.")
    assert _show(Report.of(["n1"], [slurm, store]), as_json=False) == 2
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "failure: store: Make one.",
        "warning: Slurm: Look at it.",
        "1 warning, 1 failure",
    ]


def test_the_worst_verdict_is_the_exit_code():
    findings = [Finding(FILES, str(verdict), verdict, "", None if verdict is OK else "Mend it.") for verdict in Verdict]
    assert [Report.of(["n1"], findings[: 1 + verdict]).exit_code for verdict in Verdict] == [0, 1, 2]
    answer = Report.of(["n1"], findings).to_json()
    assert (answer["verdict"], answer["exit_code"], answer["ranks"]) == ("failure", 2, 1)
    assert answer["findings"][0] == {"group": "files", "name": "ok", "verdict": "ok", "value": "", "fix": None}


def test_a_check_that_does_not_come_back_is_a_failure(tmp_path):
    def lost_mount(subject):
        time.sleep(30)

    began = time.monotonic()
    only(doctor._in_time(FILES, lost_mount, subject_of(tmp_path), 0.1), FAILURE, r"no answer in 0\.1 s", "--exclude")
    assert time.monotonic() - began < 10

    def stale_handle(subject):
        raise OSError(116, "Stale file handle")

    only(doctor._in_time(FILES, stale_handle, subject_of(tmp_path)), FAILURE, "Stale file handle", "Mend")

    def ours(subject):
        raise TypeError("played fault")

    with pytest.raises(TypeError, match="played fault"):
        doctor._in_time(FILES, ours, subject_of(tmp_path))


def roll(*answers):
    return SimpleNamespace(answers=[json.dumps(answer) for answer in answers])


@pytest.mark.parametrize(
    ("answers", "value", "fix"),
    [
        ([("n1", "a"), ("n1", "b"), ("n2", None)], r"no GPU for n2 \(rank 2\)", "--exclude"),
        ([("n1", "a"), ("n1", "a"), ("n2", "a")], r"one GPU for each of n1 \(ranks 0, 1\), which NCCL", "--ntasks-per"),
    ],
)
def test_devices_with_which_the_ranks_would_wait_without_end(answers, value, fix):
    only(doctor.joining_problems(roll(*answers)), FAILURE, value, fix)


def test_devices_with_which_the_ranks_can_join(monkeypatch):
    assert doctor.joining_problems(roll(("n1", None), ("n2", None))) == []
    assert doctor.joining_problems(roll(("n1", "a"), ("n1", "b"), ("n2", "a"))) == []
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert doctor.joining_problems(roll(("n1", "a"), ("n1", "a"))) == []


# Several ranks


def test_a_mesh_of_another_size(tmp_path, store):
    subject = subject_of(tmp_path, store, mesh={"lat": 2, "lon": 2})
    only(rank_checks.mesh_size(4, subject), OK, "1 replicas x 2 lat x 2 lon")
    only(rank_checks.mesh_size(1, subject), OK, "will need 4 ranks")
    only(rank_checks.mesh_size(3, subject), FAILURE, "needs 4 ranks, 3 were started", "Start 4 ranks")


def test_pairs_are_neighbours_on_different_nodes():
    assert rank_checks.neighbours(["a", "a", "a"]) == [(0, 1), (1, 2)]
    assert rank_checks.neighbours(["a", "a", "b", "b", "c"]) == [(1, 2), (3, 4)]
    assert bandwidth.phases([(0, 1), (1, 2), (2, 3), (3, 4)]) == [[(0, 1), (2, 3)], [(1, 2), (3, 4)]]


def test_the_slowest_pair_is_named():
    nodes = ["n1", "n2", "n3", "n4"]
    even = {(0, 1): 1e-3, (1, 2): 1e-3, (2, 3): 2.9e-3}
    only([rank_checks.judged(even, nodes)], OK, r"1\.45 GB/s each way between n3 \(rank 2\), n4 \(rank 3\)")
    slow = even | {(2, 3): 3.1e-3}
    only([rank_checks.judged(slow, nodes)], WARNING, r"n3 \(rank 2\), n4 \(rank 3\), the slowest of 3.*4\.19", "IFNAME")


def test_ranks_are_compared(tmp_path):
    """Rank 1 has another torch and little room, and its node hangs on another file system."""
    run_dir = tmp_path / "run"

    def check(mesh):
        os.environ["SLURMD_NODENAME"] = f"n{mesh.rank}"
        versions, room, is_dir = checks.versions, file_checks._room, Path.is_dir
        if mesh.rank == 1:
            checks.versions = lambda: versions() | {"torch": "2.12.1", "numpy": "9.9"}
            file_checks._room = lambda inside: Finding(FILES, "free space", WARNING, "1 GiB", "Make room.", amount=1.0)
            Path.is_dir = lambda path: not path.name.startswith(rank_checks.PREFIX) and is_dir(path)
        try:
            return doctor.examine(mesh, Subject(run_dir, quick=True))
        finally:
            checks.versions, file_checks._room, Path.is_dir = versions, room, is_dir
            del os.environ["SLURMD_NODENAME"]

    first, *others = run_on_ranks(THREE, check)
    assert all(report == first for report in others) and first.exit_code == FAILURE
    found = named(first.findings)
    only([found["torch"]], FAILURE, r"^2\.12\.1 on n1 \(rank 1\); 2\.13\S* on the 2 others$", "install the same")
    only([found["numpy"]], WARNING, r"^9\.9 on n1")
    assert "host" not in found  # which differs by right
    only([found["free space"]], WARNING, r"1 GiB on n1, the least of 3", "Make room")
    only([found["shared directory"]], FAILURE, rf"writes to {tmp_path} is not seen by n1 \(rank 1\)", "nodes share")
    only([found["ranks"]], OK, r"3 on n0 \(rank 0\), n1 \(rank 1\), n2 \(rank 2\)")
    assert [name for name, finding in found.items() if finding.group == NETWORK] == ["all-reduce 64 KiB"]
    assert list(tmp_path.iterdir()) == []


def test_the_closest_bounds_of_all_rounds_are_kept():
    class Played:
        def gathered(self, values):
            """Two rounds, entered and left: rank 1 is 10 s ahead; it is held up on its way in, then on its way out."""
            return [values] if len(values) == 1 else [[0.0, 5.0, 0.4, 5.1], [10.3, 14.9, 10.5, 15.9]]

    assert bandwidth.clock_bounds_s(Played(), rounds=2)[1] == pytest.approx((9.9, 10.5))


def test_clocks_that_are_apart():
    def check(mesh):
        nodes = ["n0", "n1", "n2"]
        ahead = {0: 0.0, 1: -20.0, 2: 3.0}[mesh.rank]
        bounds = bandwidth.clock_bounds_s(mesh, lambda: time.time() + ahead)
        return bounds, rank_checks.clocks(mesh, nodes), rank_checks.clocks(mesh, nodes, lambda: time.time() + ahead)

    for bounds, together, apart in run_on_ranks(THREE, check):
        for (least, most), ahead in zip(bounds, (0.0, -20.0, 3.0), strict=True):
            assert least <= ahead <= most and most - least < 2.0  # a busy machine holds a rank up
        only([together], OK, "ms apart, give or take")
        only([apart], WARNING, r"2[23]\.\d s apart.*n2 \(rank 2\) ahead of n1 \(rank 1\)", "time server")


def test_a_slow_link_is_found_and_chance_is_not():
    """Rank 2 is slow to answer, always or in the first measurement only."""

    def check(mesh):
        exchange, left = bandwidth._exchange, []

        def slow(*arguments):
            if mesh.rank == 2 and left:
                time.sleep(left.pop())
            exchange(*arguments)

        bandwidth._exchange = slow
        try:
            found = []
            for times in (1000, bandwidth.REPEATS + bandwidth.WARM_UP):
                left[:] = [0.4] * times
                found.append(named(rank_checks.messages(mesh, ["n0", "n1", "n2"], quick=False)))
            return found
        finally:
            bandwidth._exchange = exchange

    for always, once in run_on_ranks(THREE, check):
        assert set(always) == {"all-reduce 64 KiB", "all-reduce 16 MiB", "neighbours 4 MiB"}
        only(
            [always["neighbours 4 MiB"]],
            WARNING,
            r"between n1 \(rank 1\), n2 \(rank 2\), the slowest of 2",
            "--exclude",
        )
        slow, usual = (float(found["neighbours 4 MiB"].value.split()[0]) for found in (always, once))
        assert slow < 0.02 and slow < usual / 2
        assert re.search(r"^\d+\.\d\d ms, \d+\.\d\d GB/s$", always["all-reduce 16 MiB"].value)


def test_messages_that_do_not_arrive(tmp_path):
    class Broken:
        activity, rank = None, 0

        def gathered_objects(self, value):
            raise RuntimeError("NCCL error: unhandled system error")

    with pytest.raises(doctor.RanksError, match=r"cannot exchange messages: NCCL error.*NCCL_SOCKET_IFNAME"):
        doctor.examine(Broken(), subject_of(tmp_path))


# Whole processes


@pytest.fixture
def healthy(tmp_path):
    """Where Slurm answers, and no build has left a lock."""
    put(tmp_path / "bin", "scontrol", UP)
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"PATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache")}


def test_one_process_where_all_is_well(tmp_path, healthy):
    process = faconv("doctor", "--json", "--run-dir", tmp_path / "run", environment=healthy)
    answer = json.loads(process.stdout)
    assert process.returncode == answer["exit_code"] == 0, process.stdout
    assert answer["verdict"] == "ok" and answer["ranks"] == 1
    names = [finding["name"] for finding in answer["findings"]]
    assert len(names) == len(set(names)) and not (tmp_path / "run").exists()
    assert {"python", "torch", "backend", "GPUs", "compiler", "MPI", "Slurm", "HDF5", "write speed"} <= set(names)


def test_two_ranks_and_a_config(tmp_path, store, healthy):
    config = write_config(tmp_path, store, mesh={"lon": 2})
    put(tmp_path / "bin", "scontrol", "exit 1")
    process = faconv("doctor", config, "--ranks", 2, "--json", environment=healthy)
    answer = json.loads(process.stdout)
    assert process.returncode == answer["exit_code"] == 1, process.stderr + process.stdout
    found = {finding["name"]: finding for finding in answer["findings"]}
    assert [name for name, finding in found.items() if finding["verdict"] != "ok"] == ["Slurm"]
    assert answer["ranks"] == 2 and "ranks 0, 1" in found["neighbours 4 MiB"]["value"]
    assert found["mesh"]["value"] == "1 replicas x 1 lat x 2 lon" and "tiles of 11 x 7" in found["config"]["value"]
    assert not process.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], r"nowhere\.yaml cannot be read"),
        (["CONFIG", "--set", "training.stepps=3"], r"stepps: unknown key\. Did you mean 'steps'"),
        (["--set", "training.steps=3"], r"--set training\.steps=3 changes a config, and none was given"),
    ],
)
def test_a_wrong_config_is_told_in_one_message(tmp_path, store, arguments, message):
    config = str(write_config(tmp_path, store))
    process = faconv("doctor", *(config if argument == "CONFIG" else argument for argument in arguments))
    assert process.returncode == 2 and not process.stdout
    assert len(messages(process)) == 1 and re.search(message, process.stderr)


def processes_of_a_job(tmp_path, commands, **environment):
    """Ranks that nobody starts together: exit codes, and what they print."""
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 10000), "OMP_NUM_THREADS": "1"}
    started = []
    for rank, arguments in enumerate(commands):
        variables = os.environ | port | environment | {"RANK": str(rank), "WORLD_SIZE": str(len(commands))}
        command = [
            sys.executable,
            "-m",
            "faconv_hpc",
            "doctor",
            "--json",
            "--run-dir",
            str(tmp_path / "run"),
            *arguments,
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(forks.Popen(command, env=variables, text=True, **pipes))
    answers = [process.communicate(timeout=100) for process in started]
    return (
        [process.returncode for process in started],
        [out for out, _ in answers],
        "".join(told for _, told in answers),
    )


def test_a_config_that_only_one_rank_lacks(tmp_path):
    codes, printed, told = processes_of_a_job(tmp_path, [[], ["nowhere.yaml"]])
    assert codes == [2, 2] and printed == ["", ""], told
    assert told.count("faconv: error") == 1 and "nowhere.yaml cannot be read" in told


def test_ranks_that_cannot_join_are_told_and_end(tmp_path):
    """Rank 1 would use a GPU and NCCL, rank 0 gloo: each would wait for the other until the time-out."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import json, os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from faconv_hpc.launch import doctor\n"
        "    doctor._place = lambda device, local_rank: json.dumps(['n2', 'GPU-1'])\n"
    )
    codes, printed, told = processes_of_a_job(tmp_path, [[], []], PYTHONPATH=str(site), SLURMD_NODENAME="n1")
    assert (codes, printed[1], told) == ([2, 2], "", "")
    (joining,) = [finding for finding in json.loads(printed[0])["findings"] if finding["name"] == "joining"]
    assert joining["verdict"] == "failure" and "no GPU for n1 (rank 0)" in joining["value"]


def test_a_fault_of_ours_on_one_rank_ends_all(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from faconv_hpc.launch import checks\n"
        "    def versions(): raise TypeError('played fault')\n"
        "    checks.versions = versions\n"
    )
    codes, printed, told = processes_of_a_job(tmp_path, [[], []], PYTHONPATH=str(site))
    assert codes == [1, 1] and printed == ["", ""]
    assert told.count("Traceback") == 1 and "faconv: failed (rank 1): TypeError: played fault" in told


def test_a_torch_that_cannot_be_imported(tmp_path, healthy):
    (tmp_path / "site" / "torch").mkdir(parents=True)
    (tmp_path / "site" / "torch" / "__init__.py").write_text("raise ImportError('libtorch_cpu.so: cannot open')")
    environment = healthy | {"PYTHONPATH": str(tmp_path / "site")}
    process = faconv("doctor", "--quick", "--json", environment=environment)
    assert process.returncode == 2, process.stderr
    failed = [finding for finding in json.loads(process.stdout)["findings"] if finding["verdict"] == "failure"]
    assert [finding["name"] for finding in failed] == ["backend"] and "libtorch_cpu.so" in failed[0]["value"]
    inside = faconv("doctor", "--quick", environment=environment | {"RANK": "0", "WORLD_SIZE": "2"})
    assert inside.returncode == 2 and re.search(r"torch cannot be imported on .*libtorch_cpu", inside.stderr)


def test_the_verb_has_help():
    process = faconv("doctor", "--help")
    assert process.returncode == 0 and "srun faconv doctor" in process.stdout and "--quick" in process.stdout
