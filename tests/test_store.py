"""A store read tile by tile against the same files read whole by xarray."""

import errno
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from faconv_hpc.data.chunks import MAX_CHUNK_BYTES, bytes_needed, bytes_read, chunk_shape, parse_mesh
from faconv_hpc.data.layout import STORE_FILE, read_store_file
from faconv_hpc.data.store import Store
from faconv_hpc.data.verification import verify_files
from faconv_hpc.errors import InputError, TryAgainError, exit_code_of
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.spatial.grid import Cuts, LatLonGrid, Tile

NLAT, NLON, FRAMES, CHANNELS = 37, 53, 11, ("u", "v", "sst")
LAND = np.zeros((NLAT, NLON), dtype=bool)
LAND[10:20, 5:30] = True


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    """Two winds on a large mean, and a sea temperature missing over land and in one whole frame."""
    random = np.random.default_rng(3)
    data = random.normal(size=(FRAMES, len(CHANNELS), NLAT, NLON)).astype(np.float32)
    data[:, 1] += 100_000.0
    data[:, 2, LAND] = np.nan
    data[4, 2] = np.nan
    dims = ("time", "lat", "lon")
    return xr.Dataset(
        {name: (dims, data[:, index], {"units": f"unit-{name}"}) for index, name in enumerate(CHANNELS)},
        {
            "time": ("time", np.arange(FRAMES) * 6, {"units": "hours since 2001-12-30", "calendar": "standard"}),
            "lat": ("lat", np.linspace(90, -90, NLAT), {"units": "degrees_north"}),
            "lon": ("lon", np.arange(NLON) * 360 / NLON, {"units": "degrees_east"}),
        },
    )


@pytest.fixture(scope="module")
def path(source: xr.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("store")
    source.to_netcdf(directory / "source.nc", engine="h5netcdf")
    prepare([directory / "source.nc"], directory / "store", mesh=(3, 5), frames_per_file=4)
    return directory / "store"


@pytest.fixture
def copy(path: Path, tmp_path: Path) -> Path:
    """A store to be damaged."""
    target = tmp_path / "store"
    target.mkdir()
    for file in path.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def whole(source: xr.Dataset) -> np.ndarray:
    return np.stack([source[name].values for name in CHANNELS], axis=1)


@pytest.mark.parametrize(("lat", "lon"), [(1, 1), (3, 5), (5, 3), (7, 1), (37, 1), (1, 53), (4, 6)])
def test_tiles_of_any_cut_are_the_slices_of_the_source(path: Path, source: xr.Dataset, lat: int, lon: int) -> None:
    cuts = Cuts.even(LatLonGrid(NLAT, NLON), lat, lon)
    canvas = np.zeros((NLAT, NLON), dtype=int)
    with Store.open(path) as store:
        for index in range(cuts.tiles):
            tile = cuts.tile(index)
            canvas[tile.slices] += 1
            fields, valid = store.read(range(2, 10), tile, [0, 1, 2])
            want = whole(source)[2:10][(..., *tile.slices)]
            assert np.array_equal(fields, want, equal_nan=True)
            assert valid is not None
            assert np.array_equal(valid, ~np.isnan(want))
    assert (canvas == 1).all()


@pytest.mark.parametrize("frames", [[0], [10, 3, 4, 5], [3, 4, 8], list(range(0, 11, 3)), range(11), range(1, 9, 2)])
@pytest.mark.parametrize("channels", [[0], [2, 0], [0, 2], [1, 2], [2, 1, 0], [1, 1]])
def test_frames_and_channels_come_in_the_order_asked_for(
    path: Path, source: xr.Dataset, frames: list[int], channels: list[int]
) -> None:
    tile = Tile((5, 23), (7, 40))
    with Store.open(path) as store:
        fields, valid = store.read(frames, tile, channels)
    want = whole(source)[list(frames)][:, channels][..., 5:23, 7:40]
    assert np.array_equal(fields, want, equal_nan=True)
    assert valid is not None
    assert np.array_equal(valid, ~np.isnan(want))


def test_many_files_are_not_all_kept_open(source: xr.Dataset, path: Path, tmp_path: Path) -> None:
    prepare([path.parent / "source.nc"], tmp_path / "s", frames_per_file=1, variables=["u"])
    with Store.open(tmp_path / "s") as store:
        store._open_limit = 3
        for _ in range(2):
            fields, _ = store.read(range(FRAMES), Tile((0, NLAT), (0, NLON)), [0])
            assert np.array_equal(fields[:, 0], source["u"].values)
            assert len(store._open) == 3


def test_xarray_sees_named_coordinates_and_decoded_times(path: Path, source: xr.Dataset) -> None:
    with xr.open_dataset(path / "fields-00001.nc", engine="h5netcdf") as file:
        assert file["fields"].dims == ("time", "channel", "latitude", "longitude")
        assert list(file["channel"].values) == list(CHANNELS)
        assert np.array_equal(file["time"].values, xr.decode_cf(source)["time"].values[4:8])
        assert np.array_equal(file["latitude"].values, source["lat"].values)
        assert file["longitude"].attrs["units"] == "degrees_east"
        assert np.array_equal(file["fields"].values, whole(source)[4:8], equal_nan=True)
        assert file["valid"].dtype == np.uint8
        assert np.array_equal(file["valid"].values, ~np.isnan(whole(source)[4:8]))
    with xr.open_dataset(path / STORE_FILE, engine="h5netcdf") as file:
        assert list(file["units"].values) == ["unit-u", "unit-v", "unit-sst"]


def test_statistics_are_those_of_numpy_in_float64(path: Path, source: xr.Dataset) -> None:
    data = whole(source).astype(np.float64)
    edges = np.deg2rad(np.concatenate([[90], (source["lat"].values[1:] + source["lat"].values[:-1]) / 2, [-90]]))
    area = np.broadcast_to((np.sin(edges[:-1]) - np.sin(edges[1:]))[:, None], (NLAT, NLON))
    store = Store.open(path)
    for index in range(len(CHANNELS)):
        for values, got in (
            (data[:, index], store.std[index]),
            (np.diff(data[:, index], axis=0), store.tendency_std[index]),
        ):
            weight = np.where(np.isnan(values), 0.0, area)
            mean = np.nansum(weight * values) / weight.sum()
            assert got == pytest.approx(np.sqrt(np.nansum(weight * (values - mean) ** 2) / weight.sum()), rel=1e-11)
        weight = np.where(np.isnan(data[:, index]), 0.0, area)
        mean = np.nansum(weight * data[:, index]) / weight.sum()
        assert store.mean[index] == pytest.approx(mean, rel=1e-12, abs=1e-12)
        assert store.valid_share[index] == pytest.approx(1 - np.isnan(data[:, index]).mean())


def test_what_rounding_makes_of_one_number_is_no_change(tmp_path: Path, source: xr.Dataset) -> None:
    """Divided by it, rounding would become a signal."""
    low = np.float32(273.15)
    steps = np.random.default_rng(0).random((FRAMES, NLAT, NLON)) < 0.5
    noisy = np.where(steps, low, np.nextafter(low, np.float32(300)))
    data = source[["u"]].assign(flat=(("time", "lat", "lon"), noisy))
    data.to_netcdf(tmp_path / "s.nc", engine="h5netcdf")
    prepare([tmp_path / "s.nc"], tmp_path / "o")
    with Store.open(tmp_path / "o") as store:
        (flat, u) = store.channel_indices(["flat", "u"])
        assert store.std[flat] == store.tendency_std[flat] == 0 and store.mean[flat] == pytest.approx(273.15)
        assert store.std[u] == pytest.approx(1, rel=0.05)


def test_times_are_of_the_calendar(path: Path) -> None:
    store = Store.open(path)
    assert store.calendar == "standard"
    assert np.allclose(np.diff(store.time_hours), 6.0)
    assert store.time_hours[0] == (np.datetime64("2001-12-30") - np.datetime64("1970-01-01")) / np.timedelta64(1, "h")
    assert store.utc_hour[:5].tolist() == [0, 6, 12, 18, 0]
    assert store.year_fraction[0] == pytest.approx(363 / 365)
    assert store.year_fraction[8] == 0.0  # New Year
    assert store.frames == FRAMES


@pytest.mark.parametrize(("lat", "lon"), [(1, 1), (3, 5), (2, 2), (5, 7)])
@pytest.mark.parametrize("channels", [[0], [1, 2], [0, 1, 2]])
def test_bytes_read_are_those_of_the_chunks_hdf5_stored(path: Path, lat: int, lon: int, channels: list[int]) -> None:
    cuts = Cuts.even(LatLonGrid(NLAT, NLON), lat, lon)
    store = Store.open(path)
    with h5py.File(path / "fields-00000.nc") as file:
        fields = file["fields"]
        chunks = [fields.id.get_chunk_info(index) for index in range(fields.id.get_num_chunks())]
        extent = fields.chunks
        stored = [(chunk.chunk_offset, chunk.size - 4) for chunk in chunks if chunk.chunk_offset[0] == 0]
    for index in range(cuts.tiles):
        tile = cuts.tile(index)
        wanted = [set(channels), set(range(*tile.rows)), set(range(*tile.columns))]
        touched = sum(  # without the four bytes of each one's checksum
            size
            for offset, size in stored
            if all(set(range(o, o + e)) & want for o, e, want in zip(offset[1:], extent[1:], wanted, strict=True))
        )
        assert store.bytes_read(tile, channels) == touched * 5 // 4  # and one byte of mask for four of fields
        rows, columns = tile.shape
        assert store.bytes_needed(tile, channels) == rows * columns * len(channels) * 5


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count bytes read")
def test_the_kernel_counts_as_many_bytes_as_the_chunks_have(tmp_path: Path) -> None:
    shape, frames = (181, 360), 6
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["fields"] = np.random.default_rng(0).normal(size=(frames, 2, *shape)).astype(np.float32)
    prepare([tmp_path / "plain.h5"], tmp_path / "aligned", mesh=(2, 2))
    prepare([tmp_path / "plain.h5"], tmp_path / "whole", mesh=(1, 1))
    tile = Cuts.even(LatLonGrid(*shape), 2, 2).tile(0)
    ratios = {}
    for name in ("aligned", "whole"):
        with Store.open(tmp_path / name) as store:
            store.read([0], tile, [0, 1])  # opening and indexing happen once
            before = _bytes_read_by_this_process()
            store.read(range(1, frames), tile, [0, 1])
            counted = _bytes_read_by_this_process() - before
            assert counted == pytest.approx((frames - 1) * store.bytes_read(tile, [0, 1]), rel=0.02)
            ratios[name] = counted / ((frames - 1) * store.bytes_needed(tile, [0, 1]))
    assert ratios["aligned"] < 1.1
    assert ratios["whole"] > 3.5


def _bytes_read_by_this_process() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


@pytest.mark.parametrize(
    ("shape", "mesh", "limit"),
    [
        ((181, 360), (2, 2), 1.01),
        ((181, 360), (1, 1), 1.0),
        ((721, 1440), (4, 8), 1.01),
        ((721, 1440), (7, 7), 1.01),
        ((721, 1440), (16, 16), 1.05),
        ((1801, 3600), (8, 16), 1.01),
        ((37, 53), (3, 5), 1.1),
        ((18001, 36000), (8, 16), 1.01),
    ],
)
def test_chunks_fit_the_tiles(shape: tuple[int, int], mesh: tuple[int, int], limit: float) -> None:
    chunk = chunk_shape(shape, *mesh, channels=5)
    cuts = Cuts.even(LatLonGrid(*shape), *mesh)
    tiles = [cuts.tile(index) for index in range(cuts.tiles)]
    read = sum(bytes_read(tile, range(5), chunk, has_missing=False) for tile in tiles)
    needed = sum(bytes_needed(tile, 5, has_missing=False) for tile in tiles)
    assert needed == shape[0] * shape[1] * 5 * 4
    assert 1.0 <= read / needed <= limit
    assert chunk.cells * 4 <= MAX_CHUNK_BYTES


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 20), st.integers(1, 20), st.integers(1, 30))
def test_chunks_stay_in_bounds(nlat: int, nlon: int, lat: int, lon: int, channels: int) -> None:
    lat, lon = min(lat, nlat), min(lon, nlon)
    chunk = chunk_shape((nlat, nlon), lat, lon, channels)
    assert channels % chunk.channels == 0
    assert 1 <= chunk.rows <= -(-nlat // lat)
    assert 1 <= chunk.columns <= -(-nlon // lon)
    assert chunk.cells * 4 <= MAX_CHUNK_BYTES


def test_a_store_can_be_pickled_and_read_after_a_fork(path: Path) -> None:
    tile = Tile((0, NLAT), (0, NLON))
    with Store.open(path) as store:
        want, _ = store.read([0, 5], tile, [0])
        again = pickle.loads(pickle.dumps(store))
        assert np.array_equal(again.read([0, 5], tile, [0])[0], want)
        again.close()
        child = os.fork()
        if child == 0:
            same = np.array_equal(store.read([0, 5], tile, [0])[0], want)
            os._exit(0 if same and store._process == os.getpid() else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert np.array_equal(store.read([0, 5], tile, [0])[0], want)


def test_grid_has_the_stores_coordinates(path: Path) -> None:
    grid = Store.open(path).grid("zero", "periodic")
    assert (grid.nlat, grid.nlon) == (NLAT, NLON)
    assert np.allclose(grid.latitude_deg, np.linspace(90, -90, NLAT))


def test_unknown_variable_names_the_nearest(path: Path) -> None:
    with pytest.raises(InputError, match=r"no variable 'sstt' in store .* mean 'sst'\? There are: u, v, sst"):
        Store.open(path).channel_indices(["u", "sstt"])
    assert Store.open(path).channel_indices(["sst", "u"]) == [2, 0]


def test_a_missing_directory_is_named_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere does not exist\. Make one with `faconv data prepare SOURCE"):
        Store.open(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, but a store is a directory"):
        Store.open(tmp_path / "file")


def test_an_unfinished_store_is_refused(copy: Path) -> None:
    (copy / STORE_FILE).unlink()
    with pytest.raises(InputError, match=r"not finished: it has 3 files of fields but no store\.nc"):
        Store.open(copy)


def test_a_cut_off_file_is_named_before_it_is_opened(copy: Path) -> None:
    target = copy / "fields-00001.nc"
    size = target.stat().st_size
    os.truncate(target, size - 1000)
    with Store.open(copy) as store:
        store.read(range(4), Tile((0, 1), (0, 1)), [0])  # the other files are fine
        match = rf"fields-00001\.nc is missing or damaged: it has {size - 1000} bytes, store\.nc says {size}"
        with pytest.raises(InputError, match=match):
            store.read(range(5), Tile((0, 1), (0, 1)), [0])
        with pytest.raises(InputError, match=match):
            store.check_files()


def test_a_file_of_the_right_size_that_is_not_hdf5_is_named(copy: Path) -> None:
    target = copy / "fields-00002.nc"
    target.write_bytes(b"\0" * target.stat().st_size)
    with Store.open(copy) as store, pytest.raises(InputError, match=r"fields-00002\.nc is missing or damaged: .*open"):
        store.read([10], Tile((0, 1), (0, 1)), [0])


def _flips(path: Path, count: int, seed: int) -> Iterator[int]:
    """Changes one bit of a file after the other, each time of the file as it was; where."""
    raw, random = path.read_bytes(), np.random.default_rng(seed)
    for position in random.integers(len(raw), size=count).tolist():
        spoilt = bytearray(raw)
        spoilt[position] ^= 1 << int(random.integers(8))
        path.write_bytes(spoilt)
        yield position
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["fields-00000.nc", "fields-00001.nc"])
def test_every_flipped_bit_of_fields_is_found_or_changes_nothing(copy: Path, source: xr.Dataset, name: str) -> None:
    found, expected = 0, whole(source)
    for position in _flips(copy / name, 150, seed=7):
        try:
            with Store.open(copy) as store:
                got, valid = store.read(range(FRAMES), Tile((0, NLAT), (0, NLON)), [0, 1, 2])
        except InputError as error:
            assert f"{name} is missing or damaged" in str(error), position
            found += 1
        else:
            np.testing.assert_array_equal(got, expected, err_msg=str(position))
            np.testing.assert_array_equal(valid, ~np.isnan(expected), err_msg=str(position))
    assert found > 100  # the rest are gaps, and names that nobody reads


def test_every_flipped_bit_of_store_nc_is_found_or_changes_nothing(copy: Path) -> None:
    digest = read_store_file(copy / STORE_FILE).digest
    found = 0
    for position in _flips(copy / STORE_FILE, 300, seed=8):
        try:
            assert read_store_file(copy / STORE_FILE).digest == digest, position
        except InputError as error:
            assert re.search(r"store\.nc (is damaged|is an HDF5 file of another program|has store format)", str(error))
            found += 1
    assert found > 50


def test_forty_bytes_flipped_in_the_middle_are_named_when_trained_on(copy: Path) -> None:
    target = copy / "fields-00001.nc"
    raw = bytearray(target.read_bytes())
    with h5py.File(target, "r") as file:
        chunk = file["fields"].id.get_chunk_info(3)
    middle = chunk.byte_offset + chunk.size // 2
    raw[middle : middle + 40] = bytes(byte ^ 0x55 for byte in raw[middle : middle + 40])
    target.write_bytes(raw)
    with Store.open(copy) as store, pytest.raises(InputError, match=r"00001\.nc is missing or damaged: .*checksum"):
        store.read(range(FRAMES), Tile((0, NLAT), (0, NLON)), [0, 1, 2])


def test_two_files_that_were_swapped_are_named(path: Path, tmp_path: Path) -> None:
    prepare([path.parent / "source.nc"], tmp_path / "store", variables=["u", "v"], frames_per_file=4)
    one, other, aside = (tmp_path / "store" / name for name in ("fields-00000.nc", "fields-00001.nc", "aside"))
    assert one.stat().st_size == other.stat().st_size
    one.rename(aside), other.rename(one), aside.rename(other)
    with Store.open(tmp_path / "store") as store:
        store.check_files()  # their sizes are right
        with pytest.raises(InputError, match=r"00000\.nc .*another file of this store, with frames from 4 on, not 0"):
            store.read([0], Tile((0, 1), (0, 1)), [0])


def test_a_file_of_another_store_is_named(copy: Path, source: xr.Dataset, tmp_path: Path) -> None:
    (source + 1.0).assign_coords(source.coords).to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    prepare([tmp_path / "other.nc"], tmp_path / "other", mesh=(3, 5), frames_per_file=4)
    shutil.copy(tmp_path / "other" / "fields-00000.nc", copy)
    with Store.open(copy) as store, pytest.raises(InputError, match=r"00000\.nc .*: it is a file of another store"):
        store.read([0], Tile((0, 1), (0, 1)), [0])


def test_verify_names_what_is_damaged_and_nothing_else(copy: Path) -> None:
    with Store.open(copy) as store:
        assert [problem for _, problem in verify_files(store, range(3))] == [None] * 3
    with h5py.File(copy / "fields-00002.nc", "a") as file:
        file["latitude"][3] += 1e-9
    with Store.open(copy) as store:
        entries, problems = zip(*verify_files(store, range(3)), strict=True)
    assert entries == store.files and problems[:2] == (None, None)
    assert re.search(r"fields-00002\.nc is missing or damaged: its latitude is not that of the store", problems[2])


def test_a_store_file_that_is_away_is_not_to_be_overwritten(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(h5py, "File", away)
    with pytest.raises(TryAgainError, match=r"store\.nc cannot be read for now: Input/output error") as caught:
        Store.open(copy)
    assert "overwrite" not in str(caught.value)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "fields-00000.nc").unlink()
    with Store.open(copy) as store, pytest.raises(InputError, match=r"fields-00000\.nc .*damaged: it does not exist"):
        store.read([0], Tile((0, 1), (0, 1)), [0])


@pytest.mark.parametrize("verb", ["open", "read_direct"])
def test_a_file_system_that_is_away_damages_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    def away(*arguments: object, **options: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with Store.open(copy) as opened:
        monkeypatch.setattr(*((h5py, "File") if verb == "open" else (h5py.Dataset, "read_direct")), away)
        with pytest.raises(TryAgainError, match=r"fields-00000\.nc cannot be read for now: Stale file handle.*goes on"):
            opened.read([0], Tile((0, 1), (0, 1)), [0])
    assert exit_code_of(TryAgainError("")) == 75


def test_a_damaged_store_file_is_named(copy: Path) -> None:
    os.truncate(copy / STORE_FILE, 2000)
    with pytest.raises(InputError, match=r"store\.nc is damaged .* prepare it anew with"):
        Store.open(copy)


def test_another_format_or_version_is_refused(copy: Path) -> None:
    with h5py.File(copy / STORE_FILE, "a") as file:
        file.attrs["format_version"] = 7
    with pytest.raises(InputError, match=r"has store format 7, this faconv_hpc reads 3 and 4"):
        Store.open(copy)
    with h5py.File(copy / STORE_FILE, "a") as file:
        file.attrs["format"] = "something"
    with pytest.raises(InputError, match=r"is an HDF5 file of another program: its attribute 'format' is 'something'"):
        Store.open(copy)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channel", [0, 2])
def test_nan_in_a_valid_cell_is_named_with_place_and_time(copy: Path, bad: float, channel: int) -> None:
    row, column = 30, 50
    with h5py.File(copy / "fields-00001.nc", "a") as file:
        file["fields"][2, channel, row, column] = bad
    with Store.open(copy) as store:
        store.read(range(FRAMES), Tile((0, 30), (0, NLON)), [0, 1, 2])  # other tiles are fine
        match = rf"'{CHANNELS[channel]}' at 2001-12-31 12:00:00 \(frame 6\), latitude -60, longitude 339.6.*00001"
        with pytest.raises(InputError, match=match):
            store.read(range(3, 8), Tile((25, 37), (40, 53)), [0, 2])


def test_cells_and_frames_that_are_not_there_are_refused(path: Path) -> None:
    with Store.open(path) as store:
        with pytest.raises(InputError, match="11 frames of 37 x 53 cells"):
            store.read([11], Tile((0, 1), (0, 1)), [0])
        with pytest.raises(InputError, match="11 frames of 37 x 53 cells"):
            store.read([0], Tile((0, 38), (0, 1)), [0])


@pytest.mark.parametrize("text", ["2", "2x", "0x2", "axb", "1x2x3", "-1x2"])
def test_a_mesh_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"a mesh is written LATxLON .* 2x4"):
        parse_mesh(text)
