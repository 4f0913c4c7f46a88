"""What the doctor asks of one process and its machine: libraries, GPUs, compiler, builds, MPI, Slurm."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import ModuleType

from ..versions import versions
from .findings import MACHINE, SOFTWARE, Finding, Subject, Verdict
from .slurm import NO_CLUSTER, ping

PROGRAM_S = 20.0  # a program that has not answered by then hangs
STALE_S = 600.0  # no build of an op takes so long
DECISIVE = ("faconv_hpc", "python", "torch", "deepspeed")
"""Where ranks that differ do not work together; of other packages they only may give other numbers."""

CANNOT_COMPILE = "install g++ (Debian, Ubuntu: apt-get install g++), or load a compiler's module and set CXX"
PROBE = """
#include <omp.h>
#include <vector>
extern "C" int probe() { return static_cast<int>(std::vector<float>(omp_get_max_threads()).size()); }
"""


def library_versions(subject: Subject) -> list[Finding]:
    """Of this package, Python and the libraries: there, new enough for this package, and alike on all ranks."""
    needed = _needed_versions()
    return [_version(name, found, needed.get(name, ("", ""))) for name, found in versions().items() if name != "host"]


def backend(subject: Subject) -> list[Finding]:
    """What this rank computes on, and what carries its messages."""
    torch = load_torch()
    if isinstance(torch, str):
        fix = "Install torch again in this environment: pip install --force-reinstall torch."
        return [Finding(SOFTWARE, "backend", Verdict.FAILURE, f"torch cannot be imported: {torch}", fix)]
    value = "CPU, gloo"
    if subject.device != "cpu" and torch.cuda.is_available():
        nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
        value = f"CUDA {torch.version.cuda}, NCCL {nccl}"  # GPUs of several kinds do work together
    return [Finding(SOFTWARE, "backend", Verdict.OK, value, differs=Verdict.FAILURE)]


def gpus(subject: Subject) -> list[Finding]:
    """Those that the driver lists beside those that torch can use."""
    torch = load_torch()
    if isinstance(torch, str):
        return []  # the backend says so
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen:
        unused = ", not used: device is cpu" if subject.device == "cpu" else ""
        return [Finding(MACHINE, "GPUs", Verdict.OK, f"{seen} x {torch.cuda.get_device_name()}{unused}")]
    listed, problem = _listed_gpus()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed and subject.device == "cpu":
        return [Finding(MACHINE, "GPUs", Verdict.OK, f"{listed}, not used: device is cpu")]
    if listed and hidden in ("", "-1") and subject.device != "cuda":
        return [Finding(MACHINE, "GPUs", Verdict.OK, f"{listed}, hidden by CUDA_VISIBLE_DEVICES={hidden!r}: CPU, gloo")]
    if listed:
        value = f"nvidia-smi lists {listed}, torch {torch.__version__} can use none"
        return [Finding(MACHINE, "GPUs", Verdict.FAILURE, value, _unusable_fix(torch))]
    asked, in_job = subject.config.slurm.gpus_per_node if subject.config else 0, "SLURM_JOB_ID" in os.environ
    if subject.device == "cuda":
        verdict = Verdict.FAILURE if in_job else Verdict.WARNING  # a login node need not have any
        fix = "Start the ranks where there is one, or compute on CPUs (--set device=cpu)."
        return [Finding(MACHINE, "GPUs", verdict, problem or "none here, and device is cuda", fix)]
    if asked and in_job:
        value = f"none, but slurm.gpus_per_node asks for {asked} on each node"
        fix = "Start the job with `faconv submit`, or give sbatch --gpus-per-node; or set slurm.gpus_per_node to 0."
        return [Finding(MACHINE, "GPUs", Verdict.FAILURE, value, fix)]
    if problem:
        fix = "If this node has GPUs, have its driver mended, and leave the node out until then (--exclude)."
        return [Finding(MACHINE, "GPUs", Verdict.WARNING, problem, fix)]
    return [Finding(MACHINE, "GPUs", Verdict.OK, "none: CPU, gloo")]


def compiler(subject: Subject) -> list[Finding]:
    """A C++ compiler that can make what model.kernels=compiled asks of it: a library with OpenMP."""
    program = os.environ.get("CXX") or "g++"
    problem = _compile_problem(program)
    if problem is None:
        return [Finding(MACHINE, "compiler", Verdict.OK, _answer([*shlex.split(program), "--version"])[1] or program)]
    model = subject.config.model if subject.config else None
    if model is not None and model.kernels != "eager" and model.takes("kernels"):
        fix = f"For model.kernels={model.kernels}, {CANNOT_COMPILE}; or --set model.kernels=eager, which is slower."
        return [Finding(MACHINE, "compiler", Verdict.FAILURE, problem, fix)]
    fix = f"For model.kernels=compiled (the default) and DeepSpeed's ops, {CANNOT_COMPILE}."
    return [Finding(MACHINE, "compiler", Verdict.WARNING, problem, fix)]


def kernels(subject: Subject) -> list[Finding]:
    """What computes the passes of the run's layers; on a GPU all but eager ones need the package triton."""
    torch, config = load_torch(), subject.config
    if isinstance(torch, str) or config is None or not config.model.takes("kernels"):
        return []
    from ..training.setup import kernels_of

    device = "cuda" if subject.device != "cpu" and torch.cuda.is_available() else "cpu"
    made = kernels_of(config, device)
    value = f"{made}, on a {'GPU' if device == 'cuda' else 'CPU'} (model.kernels={config.model.kernels})"
    if device == "cuda" and made != "eager" and importlib.util.find_spec("triton") is None:
        fix = "Install a CUDA build of torch, which brings triton; or --set model.kernels=eager, which is slower."
        return [Finding(SOFTWARE, "kernels", Verdict.FAILURE, f"{value}: the package triton is not there", fix)]
    return [Finding(SOFTWARE, "kernels", Verdict.OK, value, differs=Verdict.WARNING)]


def ninja(subject: Subject) -> list[Finding]:
    """The program with which DeepSpeed builds its ops; pip puts it beside Python."""
    beside_python = str(Path(sys.executable).parent)
    found = shutil.which("ninja") or shutil.which("ninja", path=beside_python)
    if found:
        return [Finding(MACHINE, "ninja", Verdict.OK, found)]
    value = f"not on PATH, nor in {beside_python}"
    return [Finding(MACHINE, "ninja", Verdict.WARNING, value, "DeepSpeed builds its ops with it: pip install ninja.")]


def build_locks(subject: Subject) -> list[Finding]:
    """Locks that a killed build of an op has left: whoever builds that op next waits for them without end."""
    root = _extensions_root()
    stale = [(lock, age_s) for lock in sorted(root.rglob("lock")) if (age_s := _age_s(lock)) > STALE_S]
    if not stale:
        return [Finding(MACHINE, "build locks", Verdict.OK, f"none older than {STALE_S / 60:.0f} min in {root}")]
    value = ", ".join(f"{lock} is {age_s / 60:.0f} min old" for lock, age_s in stale)
    fix = "Its build was killed, and later ones wait for it. If none runs: rm " + shlex.join(
        str(lock) for lock, _ in stale
    )
    return [Finding(MACHINE, "build locks", Verdict.WARNING, value, fix)]


def mpi(subject: Subject) -> list[Finding]:
    """The library that mpi4py loads, asked in a process of its own: MPI in one that srun started may end it."""
    question = f"from {_PACKAGE}.prepare.comm import mpi_library; print(mpi_library())"
    code, told = _answer([sys.executable, "-c", question], line=-1)
    if code == 0 and told != "None":
        return [Finding(MACHINE, "MPI", Verdict.OK, told)]
    fix = "Put the directory of that MPI's library on LD_LIBRARY_PATH, or bring another: pip install mpich."
    if code != 0:
        return [Finding(MACHINE, "MPI", Verdict.WARNING, f"loading the MPI library failed ({code}): {told}", fix)]
    launcher = shutil.which("mpiexec")
    if launcher:
        return [Finding(MACHINE, "MPI", Verdict.WARNING, f"mpi4py finds no library, but there is {launcher}", fix)]
    return [
        Finding(MACHINE, "MPI", Verdict.OK, "none: data are prepared by one process (pip install mpich brings one)")
    ]


def slurm(subject: Subject) -> list[Finding]:
    """The client, whether its controller answers, and the job that this is."""
    job = os.environ.get("SLURM_JOB_ID")
    here = f"in job {job}, step {os.environ.get('SLURM_STEP_ID', 'none')}" if job else "not in a job"
    if shutil.which("scontrol") is None:
        if job is None:
            return [Finding(MACHINE, "Slurm", Verdict.OK, "none on this machine")]
        fix = (
            "Without it nodes are reached by name and a run is not requeued: make srun, sbatch, scontrol visible here."
        )
        return [Finding(MACHINE, "Slurm", Verdict.WARNING, f"{here}, but there is no scontrol", fix)]
    up, told = ping(PROGRAM_S)
    if not up and job is None and NO_CLUSTER in told:
        return [Finding(MACHINE, "Slurm", Verdict.OK, "its commands, and no cluster that they know of")]
    if up:
        return [Finding(MACHINE, "Slurm", Verdict.OK, f"{told}; {here}")]
    fix = "See that SLURM_CONF or /etc/slurm names the cluster, and that slurmctld runs; no job is submitted otherwise."
    return [Finding(MACHINE, "Slurm", Verdict.WARNING, f"scontrol ping: {told}; {here}", fix)]


def load_torch() -> ModuleType | str:
    """The module, or why it cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its libraries does not load
        return str(error)
    return torch


_PACKAGE = __name__.partition(".")[0]


def _version(package: str, found: str, needed: tuple[str, str]) -> Finding:
    """Beside the least version that is needed and the first one that is not tested; empty: any will do."""
    differs = Verdict.FAILURE if package in DECISIVE else Verdict.WARNING
    least, beyond = needed
    wanted = package + ",".join(f"{sign}{limit}" for sign, limit in ((">=", least), ("<", beyond)) if limit)
    if found == "not installed":
        fix = f"pip install '{wanted}' in the environment that starts the ranks."
        return Finding(SOFTWARE, package, Verdict.FAILURE, found, fix)
    if _numbers(found) < _numbers(least):
        fix = f"pip install --upgrade '{wanted}'."
        return Finding(SOFTWARE, package, Verdict.FAILURE, f"{found}, needed is {least} or newer", fix)
    if beyond and _numbers(found) >= _numbers(beyond):
        fix = f"pip install '{wanted}', or see that `faconv verify` passes with yours."
        return Finding(
            SOFTWARE, package, Verdict.WARNING, f"{found}, tested is up to before {beyond}", fix, differs=differs
        )
    return Finding(SOFTWARE, package, Verdict.OK, found, differs=differs)


def _needed_versions() -> dict[str, tuple[str, str]]:
    """(least, beyond the last tested) version of each package, as this one's metadata tell."""
    try:
        required = metadata.requires(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return {}
    limits = {}
    for line in required:
        package, rules = re.match(r"([\w.-]+)(.*)", line.partition(";")[0]).groups()  # type: ignore[union-attr]
        least, beyond = (re.search(rf"{sign}\s*([\d.]+)", rules) for sign in (">=", "<"))
        limits[package] = (least[1] if least else "", beyond[1] if beyond else "")
    return limits


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _listed_gpus() -> tuple[int, str | None]:
    """How many GPUs the driver lists, and what is wrong if it does not answer as it should."""
    if shutil.which("nvidia-smi") is None:
        return 0, None
    code, told = _answer(["nvidia-smi", "-L"], line=None)
    listed = len(re.findall(r"^GPU \d+", told, re.MULTILINE))
    if listed or code == 0 or "No devices" in told:
        return listed, None
    return 0, f"nvidia-smi: {told.partition(chr(10))[0] or f'exit code {code}'}"


def _unusable_fix(torch: ModuleType) -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "This torch is built for CPUs: pip install the CUDA build of the same version (see pytorch.org)."
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f"CUDA_VISIBLE_DEVICES={hidden!r} names none of them: unset it, or ask Slurm for GPUs."
    return (
        f"The driver may be older than CUDA {torch.version.cuda}, for which torch is built: `nvidia-smi` shows what it "
        f"supports. Install a torch built for that, or have the driver updated."
    )


def _compile_problem(program: str) -> str | None:
    command = shlex.split(program)
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not on PATH"
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "probe.cpp"
        source.write_text(PROBE)
        options = ["-fopenmp", "-shared", "-fPIC", str(source), "-o", str(source.with_suffix(".so"))]
        code, told = _answer([*command, *options])
    return None if code == 0 else f"{program} cannot make a library with OpenMP: {told or f'exit code {code}'}"


def _extensions_root() -> Path:
    """Where torch and DeepSpeed build ops, by the rules of `torch.utils.cpp_extension`."""
    cache = os.environ.get("XDG_CACHE_HOME") or f"{os.environ.get('HOME', '')}/.cache"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or f"{cache}/torch_extensions")


def _age_s(path: Path) -> float:
    """Seconds since it was written; 0 if it has just gone."""
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime
    return 0.0


def _answer(command: Sequence[str], line: int | None = 0) -> tuple[int, str]:
    """Exit code and output of a program: one line of it, or (None) all; -1 and the reason where there is none."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_S, check=False)
    except subprocess.TimeoutExpired:
        return -1, f"no answer in {PROGRAM_S:g} s"
    except OSError as error:
        return -1, str(error.strerror)
    lines = [one.strip() for one in (ran.stdout or ran.stderr).splitlines() if one.strip()]
    return ran.returncode, ("\n".join(lines) if line is None else lines[line] if lines else "")
