"""Sources that are not what they seem: half copied, of other units, of one level, with several versions of a field."""

import errno
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from faconv_hpc.data.store import Store
from faconv_hpc.errors import InputError
from faconv_hpc.locks import DirectoryLock
from faconv_hpc.prepare import catalogue, writer
from faconv_hpc.prepare.fields_file import default_frames_per_file
from faconv_hpc.prepare.hdf5_file import new_netcdf
from faconv_hpc.prepare.preparation import prepare
from sources import DIMS, FRAMES, NLAT, NLON, dataset, save, values

LEVELS = (1000.0, 850.0, 500.0, 250.0)
LEVEL_DIMS = ("time", "level", "lat", "lon")
LEVEL_VALUES = values(5, (FRAMES, len(LEVELS), NLAT, NLON))


def on_levels(**more):
    level = ("level", list(LEVELS), {"units": "hPa"})
    return dataset({"t": (LEVEL_DIMS, LEVEL_VALUES), "u": (DIMS, values(1))}, level=level, **more)


def zarr(data, path, version=3, chunks=None):
    encoding = {name: {"chunks": chunks or (1, *data[name].shape[1:])} for name in data.data_vars}
    data.to_zarr(path, zarr_format=version, consolidated=False, encoding=encoding)
    return path


# Zarr


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("name", ["t", "u"])
def test_a_zarr_copy_that_is_cut_off_is_named_and_goes_on_when_complete(
    tmp_path: Path, version: int, name: str
) -> None:
    data = on_levels()
    source = zarr(data, tmp_path / "s.zarr", version)
    place = ["6", *["0"] * (len(data[name].dims) - 1)]
    inside = Path(name, "c", *place) if version == 3 else Path(name, ".".join(place))
    chunk, kept = source / inside, tmp_path / "kept"
    chunk.rename(kept)
    with pytest.raises(InputError, match=rf"the chunk {inside} of '{name}' in .*s\.zarr is not there: zarr would read"):
        prepare([source], tmp_path / "o", frames_per_file=2)
    assert not (tmp_path / "o" / "store.nc").exists()
    kept.rename(chunk)
    assert prepare([source], tmp_path / "o", frames_per_file=2).kept_files == 2  # what was there was whole
    prepare([zarr(data, tmp_path / "w.zarr", version)], tmp_path / "want", frames_per_file=2)
    for file in ("fields-00003.nc", "fields-00004.nc"):
        with xr.open_dataset(tmp_path / "o" / file) as got, xr.open_dataset(tmp_path / "want" / file) as want:
            assert np.array_equal(got["fields"], want["fields"])


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_chunks_that_are_left_out_on_purpose_are_filled_when_asked_for(tmp_path: Path) -> None:
    data = values()
    data[4] = np.nan  # zarr leaves out what holds nothing but the fill value
    source = zarr(dataset({"t": (DIMS, data), "u": (DIMS, values(1))}), tmp_path / "s.zarr")
    with pytest.raises(InputError, match=r"c/4/0/0 of 't'.*zarr would read it as nan.*--fill-absent-chunks"):
        prepare([source], tmp_path / "o")
    assert prepare([source], tmp_path / "o", fill_absent_chunks=True).has_missing
    assert prepare([source], tmp_path / "p", variables=["u"]).channels == ("u",)  # what is not read need not be there


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_of_a_selected_member_its_own_chunks_are_looked_for(tmp_path: Path) -> None:
    members = dataset({"t": (("number", *DIMS), values(1, (3, FRAMES, NLAT, NLON)))}, number=("number", [0, 1, 2]))
    source = zarr(members, tmp_path / "s.zarr", chunks=(1, FRAMES, NLAT, NLON))
    (source / "t" / "c" / "1" / "0" / "0" / "0").unlink()
    with pytest.raises(InputError, match=r"the chunk t/c/1/0/0/0 of 't' in .*s\.zarr is not there"):
        prepare([source], tmp_path / "o", select={"number": "1"})
    assert not prepare([source], tmp_path / "o", select={"number": "2"}).has_missing


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_a_damaged_zarr_chunk_is_named(tmp_path: Path) -> None:
    source = zarr(dataset(), tmp_path / "s.zarr")
    (source / "u" / "c" / "3" / "0" / "0").write_bytes(b"not what was written")
    with pytest.raises(InputError, match=r"frames 0 to 9 of variable 'u' in .*s\.zarr cannot be read .*damaged"):
        prepare([source], tmp_path / "o")


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("wanted", [None, ["t"], ["t250", "u", "t1000", "t500"], ["t1000", "t500", "t250"]])
@pytest.mark.parametrize("slab_bytes", [1, 3000, 10**9])
def test_levels_are_read_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: list[str] | None, slab_bytes: int
) -> None:
    source = zarr(on_levels(), tmp_path / "s.zarr")
    read, reads = catalogue.Segment.read, []

    def counting(segment, frames, rows, levels):
        reads.append((str(segment.array.name), frames.start, rows))
        return read(segment, frames, rows, levels)

    monkeypatch.setattr(catalogue.Segment, "read", counting)
    write = writer.write_store
    monkeypatch.setattr(
        "faconv_hpc.prepare.preparation.write_store", lambda *a, **k: write(*a, **k, slab_bytes=slab_bytes)
    )
    monkeypatch.setattr("faconv_hpc.data.chunks.MIN_CHUNK_BYTES", 1)  # one channel in a chunk, as on large grids
    prepare([source], tmp_path / "o", variables=wanted, frames_per_file=FRAMES)
    store = Store.open(tmp_path / "o")
    level = {f"t{value:g}": index for index, value in enumerate(LEVELS)}
    with xr.open_dataset(tmp_path / "o" / "fields-00000.nc") as written:
        for index, name in enumerate(store.channels):
            want = values(1) if name == "u" else LEVEL_VALUES[:, level[name]]
            assert np.array_equal(written["fields"][:, index], want)
    ts = [entry for entry in reads if entry[0] == "t"]
    once = wanted is None or wanted[0] != "t250"  # else another variable stands between
    assert not once or len(ts) == len(set(ts))


# What is joined


def test_one_level_is_a_level(tmp_path: Path) -> None:
    data = on_levels()
    sources = [save(data[["t"]].isel(level=[i]), tmp_path / f"{i}.nc") for i in (2, 0)]
    prepare(sources, tmp_path / "o")
    assert Store.open(tmp_path / "o").channels == ("t500", "t1000")


def test_sources_that_differ_in_units_or_meaning_are_not_joined(tmp_path: Path) -> None:
    def part(name: str, first: int, stop: int, units: str) -> Path:
        data = dataset({"t": (DIMS, values(), {"units": units})}).isel(time=slice(first, stop))
        return save(data, tmp_path / name)

    early = part("early.nc", 0, 4, "K")
    with pytest.raises(InputError, match=r"'t' is variable 't' in K in .*early\.nc, but variable 't' in degC in "):
        prepare([early, part("late.nc", 4, FRAMES, "degC")], tmp_path / "o")
    spelt = [part("a.nc", 0, 4, "m s**-1"), part("b.nc", 4, FRAMES, "m s-1")]
    prepare(spelt, tmp_path / "q")
    levels = {"level": ("level", [10.0, 100.0], {"units": "hPa"})}
    aloft = dataset({"u": (LEVEL_DIMS, values(3, (FRAMES, 2, NLAT, NLON)))}, **levels)
    surface = dataset({"u10": (DIMS, values())})
    with pytest.raises(InputError, match=r"'u10' is variable 'u' at 10 hPa .* but variable 'u10' in .*--rename u=NAME"):
        prepare([save(aloft, tmp_path / "aloft.nc"), save(surface, tmp_path / "surface.nc")], tmp_path / "r")


@pytest.mark.parametrize(
    ("dim", "way_out"),
    [("expver", r"combine_first\(ds\.sel\(expver=5\)\)"), ("prediction_timedelta", "--select prediction_timedelta=1")],
)
def test_versions_and_leads_are_no_levels(tmp_path: Path, dim: str, way_out: str) -> None:
    data = dataset({"t": (("time", dim, "lat", "lon"), values(2, (FRAMES, 2, NLAT, NLON)))}, **{dim: (dim, [1, 5])})
    with pytest.raises(InputError, match=way_out):
        prepare([save(data, tmp_path / "s.nc")], tmp_path / "o")


def test_a_zip_archive_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "download.nc").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(InputError, match=r"is a ZIP archive.*Unzip it, and give the files in it"):
        prepare([tmp_path / "download.nc"], tmp_path / "o")


def test_times_that_are_dates_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some readers, such as cfgrib, give no numbers."""
    times = np.datetime64("2001-01-01", "ns") + np.arange(FRAMES)[::-1] * np.timedelta64(6, "h")
    dated = dataset(time=("time", times))
    monkeypatch.setattr(catalogue, "open_sources", lambda path, select: [dated])
    (tmp_path / "s").write_text("")
    with pytest.raises(InputError, match="increas"):
        prepare([tmp_path / "s"], tmp_path / "o")


def test_a_store_with_gaps_is_a_source(tmp_path: Path) -> None:
    data = values()
    data[3, 2:5] = np.nan
    prepare([save(dataset({"t": (DIMS, data), "u": (DIMS, values(1))}), tmp_path / "s.nc")], tmp_path / "o")
    summary = prepare([tmp_path / "o"], tmp_path / "p", mesh=(2, 2), frames_per_file=4)
    assert summary.has_missing and summary.channels == ("t", "u") and summary.notes == ()
    with Store.open(tmp_path / "p") as store:
        assert store.valid_share.tolist() == pytest.approx([1 - 3 * NLON / data.size, 1.0])


# What is written


def test_large_frames_share_a_file() -> None:
    assert default_frames_per_file((721, 1440), 69) == 16
    assert default_frames_per_file((32, 64), 5) == 6553


def test_an_overwriting_run_that_is_killed_goes_on(tmp_path: Path) -> None:
    source = save(dataset(), tmp_path / "s.nc")
    prepare([source], tmp_path / "o", frames_per_file=2, compression=1)

    def killed(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([source], tmp_path / "o", frames_per_file=2, overwrite=True, progress=killed)
    assert prepare([source], tmp_path / "o", frames_per_file=2, overwrite=True).kept_files == 3
    assert prepare([source], tmp_path / "o", frames_per_file=2, overwrite=True).kept_files == 0


def test_one_preparation_at_a_time(tmp_path: Path) -> None:
    source = save(dataset(), tmp_path / "s.nc")
    with DirectoryLock(tmp_path / "o" / ".lock") as lock:
        assert lock.take()
        lock.sign()
        with pytest.raises(InputError, match=rf"another preparation writes to .*: process {os.getpid()} on"):
            prepare([source], tmp_path / "o")
    prepare([source], tmp_path / "o")


def test_who_opened_the_lock_of_a_preparation_holds_that_of_the_next(tmp_path: Path) -> None:
    """Its file is not removed when the first ends: a lock on a file that is gone keeps nobody out."""
    source, waiting = save(dataset(), tmp_path / "s.nc"), []
    prepare([source], tmp_path / "o", progress=lambda *_: waiting.append(DirectoryLock(tmp_path / "o" / ".lock")))
    with waiting[-1] as second:
        assert second.take()
        with pytest.raises(InputError, match="another preparation writes to"):
            prepare([source], tmp_path / "o", overwrite=True)


def test_a_file_that_another_preparation_has_replaced_is_found(tmp_path: Path) -> None:
    """Where a file system has no locks."""
    source = save(dataset(), tmp_path / "s.nc")
    prepare([source], tmp_path / "other", variables=["u", "v"], frames_per_file=2, calendar="noleap")

    def replace(done: int, total: int) -> None:
        if done == 3:
            (tmp_path / "other" / "fields-00001.nc").replace(tmp_path / "o" / "fields-00001.nc")

    with pytest.raises(InputError, match=r"fields-00001\.nc is of another request"):
        prepare([source], tmp_path / "o", frames_per_file=2, progress=replace)
    assert not (tmp_path / "o" / "store.nc").exists()


def test_a_disk_that_is_full_at_the_last_block_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), new_netcdf(tmp_path / "last_block.nc") as (nc, disk):
        nc.dimensions["time"] = 3
        disk._error = OSError(errno.ENOSPC, "No space left on device")  # so that nothing is written at the close
    assert not (tmp_path / "last_block.nc").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which needs root")
def test_a_full_disk_is_told_and_what_is_finished_is_kept(tmp_path: Path) -> None:
    shape = (40, 90, 180)
    coordinates = {"time": ("time", np.arange(40), {"units": "hours since 2001-01-01"})}
    coordinates |= {"lat": ("lat", np.linspace(89, -89, 90)), "lon": ("lon", np.arange(180) * 2.0)}
    source = save(xr.Dataset({"u": (DIMS, values(1, shape))}, coordinates), tmp_path / "s.nc")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=True)
    try:
        with pytest.raises(InputError, match=r"cannot write to .*/o \(No space left on device\)\. Check"):
            prepare([source], disk / "o", frames_per_file=10)
        kept = len(list((disk / "o").glob("fields-*.nc")))
        assert kept >= 2
        subprocess.run(["mount", "-o", "remount,size=9m", disk], check=True)
        assert prepare([source], disk / "o", frames_per_file=10).kept_files == kept
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
