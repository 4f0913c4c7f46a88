"""The version of this package, and of what else a run or its machine has; imports nothing of it."""

import platform
import socket
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

__version__ = "0.1.0"
PACKAGES = ("torch", "deepspeed", "numpy", "h5py", "h5netcdf", "xarray", "mpi4py")


def versions() -> dict[str, str]:
    """What was running: this package and its commit, Python, the host of the first rank, the libraries."""
    found = {"faconv_hpc": __version__, "commit": _commit(), "python": platform.python_version()}
    found |= {"machine": platform.machine(), "host": socket.gethostname()}
    return found | _of_packages()


@cache
def _of_packages() -> dict[str, str]:
    """Of the libraries; metadata are long to read."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def processor() -> str:
    """The processor's name, on Linux; else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


@cache
def _commit() -> str:
    """Of the checkout this package is run from, ``-dirty`` with changes that are not committed."""
    package = Path(__file__).parent
    answers = []
    for question in ("ls-files --error-unmatch versions.py", "describe --always --dirty --abbrev=40 --exclude=*"):
        try:
            asked = subprocess.run(
                ["git", "-C", package, *question.split()], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):  # no git, or installed from a wheel
            return "not in a checkout"
        answers.append(asked.stdout.strip())
    return answers[-1]
