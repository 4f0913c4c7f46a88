"""Every kind of source against what xarray says is in it; ranks and killed runs against one whole run."""

import tracemalloc
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr

from faconv_hpc.data.store import Store
from faconv_hpc.errors import InputError
from faconv_hpc.prepare.preparation import PrepareSummary, prepare
from faconv_hpc.prepare.segments import unwrap
from faconv_hpc.prepare.writer import write_store
from sources import DIMS, FRAMES, NLAT, NLON, dataset, save, values, whole


def test_summary_says_what_was_made(tmp_path: Path) -> None:
    source = save(dataset(), tmp_path / "s.nc")
    seen: list[tuple[int, int]] = []
    summary = prepare(
        [source],
        tmp_path / "o",
        frames_per_file=4,
        mesh=(2, 2),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert isinstance(summary, PrepareSummary)
    assert (summary.frames, summary.channels, summary.files) == (9, ("u", "v"), 3)
    assert (summary.grid_shape, summary.kept_files, summary.has_missing) == ((11, 16), 0, False)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert summary.size_bytes == sum(file.stat().st_size for file in (tmp_path / "o").glob("fields*"))
    assert summary.as_dict()["mesh"] == (2, 2)
    store = Store.open(tmp_path / "o")
    assert store.layout.provenance["sources"] == [str(source)]
    assert [file.name for file in sorted((tmp_path / "o").glob("*.nc"))] == [
        *(f"fields-0000{i}.nc" for i in range(3)),
        "store.nc",
    ]


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("kind", ["netcdf3", "netcdf4", "zarr2", "zarr3", "unconsolidated"])
def test_every_format_gives_the_same_store(tmp_path: Path, kind: str) -> None:
    path, data = tmp_path / "source", dataset()
    if kind == "netcdf3":
        data.to_netcdf(path, engine="scipy")
    elif kind == "netcdf4":
        save(data, path)
    else:
        data.to_zarr(path, zarr_format=2 if kind == "zarr2" else 3, consolidated=kind != "unconsolidated")
    prepare([path], tmp_path / "o", frames_per_file=4)
    fields, valid, store = whole(tmp_path / "o")
    assert store.channels == ("u", "v")
    assert np.array_equal(fields, np.stack([values(1), values(2)], axis=1))
    assert valid is None


def test_plain_hdf5_is_taken_as_it_is(tmp_path: Path) -> None:
    data = values(shape=(FRAMES, 3, NLAT, NLON))
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["fields"] = data
    summary = prepare([tmp_path / "plain.h5"], tmp_path / "o", mesh=(2, 3))
    fields, _, store = whole(tmp_path / "o")
    assert np.array_equal(fields, data)
    assert store.channels == ("channel_0", "channel_1", "channel_2")
    assert store.latitude_deg[0] == pytest.approx(90 - 90 / NLAT)
    assert store.layout.time.label(1) == "2000-01-01 01:00:00"
    assert "has no time: its frames are taken as hours since 2000-01-01" in summary.notes[0]


def test_plain_hdf5_with_coordinates(tmp_path: Path) -> None:
    data = values(shape=(FRAMES, 2, NLAT, NLON))
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["fields"] = data
        file["latitude"] = np.linspace(-50, 50, NLAT)
        file["longitude"] = np.arange(NLON) + 100.0
        file["channel"] = np.array(["t", "q"], dtype=object)
    prepare([tmp_path / "plain.h5"], tmp_path / "o", time_units="days since 1999-01-01", variables=["q"])
    fields, _, store = whole(tmp_path / "o")
    assert np.array_equal(fields[:, 0], data[:, 1, ::-1])
    assert store.channels == ("q",)
    assert store.latitude_deg[0] == 50
    assert store.longitude_deg[0] == 100
    assert store.layout.time.label(2) == "1999-01-03 00:00:00"


def test_packed_integers_and_fill_values(tmp_path: Path) -> None:
    data = values().astype(np.float64)
    data[2:5, 3:6, 4:9] = np.nan
    packing = {"dtype": "int16", "scale_factor": 0.01, "add_offset": 3.0, "_FillValue": -32767}
    source = save(dataset({"t": (DIMS, data), "u": (DIMS, values(1))}), tmp_path / "s.nc", encoding={"t": packing})
    with h5py.File(source) as file:
        assert file["t"].dtype == np.int16
    prepare([source], tmp_path / "o", frames_per_file=2)
    fields, valid, store = whole(tmp_path / "o")
    with xr.open_dataset(source, engine="h5netcdf") as want:
        assert np.array_equal(fields[:, 0], want["t"].values.astype(np.float32), equal_nan=True)
    assert valid is not None
    assert np.array_equal(valid[:, 0], ~np.isnan(data))
    assert valid[:, 1].all()
    assert store.has_missing
    with h5py.File(tmp_path / "o" / "fields-00004.nc") as file:
        assert "valid" not in file  # its one frame lacks nothing
    assert store.valid_share.tolist() == pytest.approx([1 - 45 / data.size, 1.0])


@pytest.mark.parametrize("slab_bytes", [1, 3000, 10**9])
@pytest.mark.parametrize("chunked_for", [(1, 1), (3, 2)])
def test_slabs_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slab_bytes: int, chunked_for: tuple[int, int]
) -> None:
    data = values()
    data[3, 4:7] = np.nan
    south_first = ("lat", np.linspace(-75, 75, NLAT), {"units": "degrees_north"})
    fields_of_source = {"t": (DIMS, data), "u": (DIMS, values(1)), "w": (DIMS, values(2))}
    source = save(dataset(fields_of_source, lat=south_first), tmp_path / "s.nc")
    prepare([source], tmp_path / "want")
    monkeypatch.setattr("faconv_hpc.prepare.preparation.write_store", partial(write_store, slab_bytes=slab_bytes))
    prepare([source], tmp_path / "o", frames_per_file=4, mesh=chunked_for)
    fields, valid, store = whole(tmp_path / "o")
    want, want_valid, reference = whole(tmp_path / "want")
    assert np.array_equal(want[:, 0], data[:, ::-1], equal_nan=True)
    assert np.array_equal(fields, want, equal_nan=True)
    assert np.array_equal(valid, want_valid)  # type: ignore[arg-type]
    for name in ("mean", "std", "tendency_std"):
        np.testing.assert_allclose(getattr(store, name), getattr(reference, name), rtol=1e-12, atol=1e-14)


def test_no_more_than_a_slab_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (100, 90, 180)
    coordinates = {"time": ("time", np.arange(100), {"units": "hours since 2001-01-01"})}
    coordinates |= {"lat": ("lat", np.linspace(89, -89, 90)), "lon": ("lon", np.arange(180) * 2.0)}
    source = save(
        xr.Dataset({"u": (DIMS, values(1, shape)), "v": (DIMS, values(2, shape))}, coordinates), tmp_path / "s.nc"
    )
    slab = 500_000
    monkeypatch.setattr("faconv_hpc.prepare.preparation.write_store", partial(write_store, slab_bytes=slab))
    prepare([source], tmp_path / "warm", variables=["u"])  # imports and caches
    tracemalloc.start()
    try:
        prepare([source], tmp_path / "o")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert source.stat().st_size > 12_000_000
    assert peak < 8 * slab, f"{peak} bytes at once for slabs of {slab}"


def test_ascending_latitudes_and_longitudes_from_west_are_turned(tmp_path: Path) -> None:
    data = dataset(
        lat=("lat", np.linspace(-75, 75, NLAT), {"units": "degrees_north"}),
        lon=("lon", -180 + np.arange(NLON) * 22.5, {"units": "degrees_east"}),
    )
    prepare([save(data, tmp_path / "s.nc")], tmp_path / "o", mesh=(3, 2))
    fields, _, store = whole(tmp_path / "o")
    assert np.array_equal(fields[:, 0], values(1)[:, ::-1])
    assert np.array_equal(store.latitude_deg, np.linspace(75, -75, NLAT))
    assert store.longitude_deg[0] == -180


@pytest.mark.parametrize("columns", [8, 5, 15])
def test_sources_that_begin_at_another_meridian_are_turned_to_the_first(tmp_path: Path, columns: int) -> None:
    """From 0 to 337.5 and from -180 to 157.5, eastward or westward, are the same meridians."""
    u, v = values(1), values(2)
    first = save(dataset({"u": (DIMS, u)}), tmp_path / "u.nc")
    longitude = np.roll(np.arange(NLON) * 22.5, columns)
    longitude[longitude >= longitude[0]] -= 360.0
    rolled = {"v": (DIMS, np.roll(v, columns, axis=-1)[..., ::-1])}
    other = save(dataset(rolled, lon=("lon", longitude[::-1], {"units": "degrees_east"})), tmp_path / "v.nc")
    prepare([first, other], tmp_path / "o")
    fields, _, store = whole(tmp_path / "o", "u", "v")
    assert np.allclose(store.longitude_deg, np.arange(NLON) * 22.5)
    assert np.array_equal(fields[:, 0], u) and np.array_equal(fields[:, 1], v)


def test_longitudes_that_jump_are_unwrapped_and_westward_ones_turned(tmp_path: Path) -> None:
    jumping = np.arange(NLON) * 22.5
    jumping[jumping > 180] -= 360
    prepare([save(dataset(lon=("lon", jumping, {"units": "degrees_east"})), tmp_path / "s.nc")], tmp_path / "o")
    fields, _, store = whole(tmp_path / "o")
    assert np.allclose(store.longitude_deg, np.arange(NLON) * 22.5)
    assert np.array_equal(fields[:, 1], values(2))
    westward = 90 - np.arange(NLON) * 22.5
    prepare([save(dataset(lon=("lon", westward, {"units": "degrees_east"})), tmp_path / "w.nc")], tmp_path / "p")
    fields, _, store = whole(tmp_path / "p")
    assert np.allclose(store.longitude_deg, westward[::-1])
    assert np.array_equal(fields[:, 1], values(2)[:, :, ::-1])
    assert unwrap(np.array([350.0, 355, 0, 5])).tolist() == [350, 355, 360, 365]


def test_a_repeated_column_is_refused_and_can_be_dropped(tmp_path: Path) -> None:
    data = dataset(lon=("lon", np.linspace(0, 360, NLON), {"units": "degrees_east"}))
    source = save(data, tmp_path / "s.nc")
    with pytest.raises(
        InputError, match=r"meridian 0 twice: its 16 columns run from 0 to 360\..*--drop-repeated-column"
    ):
        prepare([source], tmp_path / "o")
    prepare([source], tmp_path / "o", drop_repeated_column=True)
    fields, _, store = whole(tmp_path / "o")
    assert np.array_equal(fields[:, 0], values(1)[:, :, :-1])
    store.grid("zero", "periodic")  # now it closes


def test_other_orders_of_dims_and_dims_of_one(tmp_path: Path) -> None:
    data = dataset({"t": (("lon", "height", "lat", "time"), values().transpose(2, 1, 0)[:, None])})
    prepare([save(data, tmp_path / "s.nc")], tmp_path / "o")
    fields, _, store = whole(tmp_path / "o")
    assert store.channels == ("t",)
    assert np.array_equal(fields[:, 0], values())


def test_levels_become_channels(tmp_path: Path) -> None:
    data = values(shape=(FRAMES, 3, NLAT, NLON))
    levels = {"plev": ("plev", [85000.0, 50000.0, 25000.0], {"units": "Pa"})}
    source = save(
        dataset({"z": (("time", "plev", "lat", "lon"), data), "u": (DIMS, values(1))}, **levels), tmp_path / "s.nc"
    )
    prepare([source], tmp_path / "o")
    fields, _, store = whole(tmp_path / "o")
    assert store.channels == ("z850", "z500", "z250", "u")
    assert np.array_equal(fields[:, :3], data)
    assert store.layout.channels[1].long_name == "z at 500 hPa"
    prepare([source], tmp_path / "p", variables=["u", "z250", "z"])
    fields, _, store = whole(tmp_path / "p")
    assert store.channels == ("u", "z250", "z850", "z500")
    assert np.array_equal(fields[:, 1:], data[:, [2, 0, 1]])
    unnamed = dataset({"z": (("time", "layer", "lat", "lon"), data)})
    prepare([save(unnamed, tmp_path / "n.nc")], tmp_path / "q")
    assert Store.open(tmp_path / "q").channels == ("z_layer0", "z_layer1", "z_layer2")


def test_two_extra_dims_are_refused(tmp_path: Path) -> None:
    data = dataset({"z": (("member", "time", "level", "lat", "lon"), values(shape=(2, FRAMES, 3, NLAT, NLON)))})
    with pytest.raises(
        InputError, match=r"'z' in .* has dims member \(2\), time \(9\), level \(3\).*there may be one of levels"
    ):
        prepare([save(data, tmp_path / "s.nc")], tmp_path / "o")


def test_one_variable_per_file_and_times_over_files(tmp_path: Path) -> None:
    data = dataset()
    sources = []
    for name in ("u", "v"):
        for first, stop in ((5, 9), (0, 2), (2, 5)):
            sources.append(save(data[[name]].isel(time=slice(first, stop)), tmp_path / f"{name}{first}.nc"))
    prepare(sources, tmp_path / "o", frames_per_file=4, variables=["v", "u"])
    fields, _, store = whole(tmp_path / "o")
    assert store.channels == ("v", "u")
    assert np.array_equal(fields, np.stack([values(2), values(1)], axis=1))
    assert np.allclose(np.diff(store.time_hours), 6)
    reference = tmp_path / "r"
    prepare([save(data, tmp_path / "all.nc")], reference, variables=["v", "u"])
    assert np.allclose(store.tendency_std, Store.open(reference).tendency_std, rtol=1e-13)


def test_a_single_instant_per_file(tmp_path: Path) -> None:
    data = dataset()
    sources = [save(data.isel(time=index), tmp_path / f"{index}.nc") for index in range(FRAMES)]
    prepare(sources, tmp_path / "o", frames_per_file=4)
    assert np.array_equal(whole(tmp_path / "o", "u")[0][:, 0], values(1))


def test_a_store_is_a_source_for_other_chunks(tmp_path: Path) -> None:
    prepare([save(dataset(), tmp_path / "s.nc")], tmp_path / "o", frames_per_file=4)
    prepare([tmp_path / "o"], tmp_path / "p", mesh=(2, 4), variables=["v", "u"])
    fields, _, store = whole(tmp_path / "p")
    assert store.channels == ("v", "u")
    assert store.layout.chunk.rows == 6
    assert np.array_equal(fields, whole(tmp_path / "o", "v", "u")[0])
    with pytest.raises(InputError, match="would destroy it"):
        prepare([tmp_path / "o"], tmp_path / "o", overwrite=True)
    assert np.array_equal(whole(tmp_path / "o", "u")[0][:, 0], values(1))


def test_what_is_no_field_is_left_out(tmp_path: Path) -> None:
    data = dataset(
        {
            "u": (DIMS, values(1)),
            "bounds": (("time", "two"), np.zeros((FRAMES, 2))),
            "name": (("time",), np.array(["x"] * FRAMES, dtype=object)),
        }
    )
    prepare([save(data, tmp_path / "s.nc")], tmp_path / "o")
    assert Store.open(tmp_path / "o").channels == ("u",) and Store.open(tmp_path / "o").static == ()


@pytest.mark.parametrize("compression", [1, 9])
def test_compression_is_lossless(tmp_path: Path, compression: int) -> None:
    smooth = np.round(values(1), 1)
    source = save(dataset({"u": (DIMS, smooth)}), tmp_path / "s.nc")
    prepare([source], tmp_path / "o", compression=compression)
    assert np.array_equal(whole(tmp_path / "o")[0][:, 0], smooth)
    with h5py.File(tmp_path / "o" / "fields-00000.nc") as file:
        assert (file["fields"].compression, file["fields"].compression_opts) == ("gzip", compression)
