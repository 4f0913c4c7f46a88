"""Fields without time: found in sources, kept in a store, checked, and held to by a contract."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

from faconv_hpc.data.layout import STATIC_FILE
from faconv_hpc.data.statistics import row_weights
from faconv_hpc.data.store import Store
from faconv_hpc.errors import InputError
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.spatial.grid import Tile
from faconv_hpc.spatial.mesh import ProcessMesh
from faconv_hpc.training.contract import check_same_data, make_contract
from runs import small_config
from test_prepare_runs import MPIEXEC
from test_roles import DIMS, NLAT, NLON, source

GLOBE = Tile((0, NLAT), (0, NLON))


@pytest.fixture
def made(tmp_path):
    """The store, and what it was made of."""
    dataset = source(tmp_path / "source.nc")
    prepare([tmp_path / "source.nc"], tmp_path / "store", frames_per_file=5)
    return tmp_path / "store", dataset


def test_what_has_no_time_is_kept_with_its_statistics(made):
    path, dataset = made
    with Store.open(path) as store:
        assert store.channels == ("heat", "wind", "sst", "rain") and store.static_names == ("land", "height")
        land, height = store.static
        assert (land.channel.units, land.channel.long_name, height.channel.units) == ("1", "land-sea mask", "m")
        weights = np.broadcast_to(row_weights(store.latitude_deg, store.longitude_deg)[:, None], (NLAT, NLON))
        for one in store.static:
            values = dataset[one.channel.name].values.astype(np.float64)
            mean = np.average(values, weights=weights)
            assert one.mean == pytest.approx(mean, rel=1e-12)
            assert one.std == pytest.approx(np.sqrt(np.average((values - mean) ** 2, weights=weights)), rel=1e-12)
        tile = Tile((2, 7), (3, 14))
        got = store.read_static(["height", "land"], tile)
        assert np.array_equal(got[0], dataset["height"].values[2:7, 3:14])
        assert np.array_equal(got[1], dataset["land"].values[2:7, 3:14])
        with pytest.raises(InputError, match=r"no static variable 'hight'.*Did you mean 'height'"):
            store.read_static(["hight"], tile)
    opened = xr.load_dataset(path / STATIC_FILE, engine="h5netcdf")
    assert np.array_equal(opened["land"].values, dataset["land"].values) and opened["height"].units == "m"


def test_rows_and_columns_are_turned_as_those_of_fields_are(tmp_path):
    dataset = source(tmp_path / "source.nc")
    turned = dataset.isel(latitude=slice(None, None, -1)).roll(longitude=5, roll_coords=True)
    turned = turned.transpose("longitude", "latitude", "time")
    turned.to_netcdf(tmp_path / "turned.nc", engine="h5netcdf")
    for name in ("source", "turned"):
        prepare([tmp_path / f"{name}.nc"], tmp_path / name)
    want, got = (Store.open(tmp_path / name) for name in ("source", "turned"))
    roll = int(np.argmin(np.abs(want.longitude_deg - got.longitude_deg[0] % 360)))
    fields = [store.read([3], GLOBE, store.channel_indices(["heat"]))[0][0, 0] for store in (want, got)]
    assert np.array_equal(np.roll(fields[0], -roll, axis=-1), fields[1])
    land = [store.read_static(["land"], GLOBE)[0] for store in (want, got)]
    assert np.array_equal(np.roll(land[0], -roll, axis=-1), land[1])


def test_one_source_may_have_the_fields_and_another_what_has_no_time(tmp_path):
    dataset = source(tmp_path / "all.nc")
    dataset[["heat", "wind"]].to_netcdf(tmp_path / "fields.nc", engine="h5netcdf")
    once = dataset[["height"]].expand_dims(time=[1.0]).assign_coords(time=("time", [0.0], dataset["time"].attrs))
    once.to_netcdf(tmp_path / "invariant.nc", engine="h5netcdf")
    sources = [tmp_path / "fields.nc", tmp_path / "invariant.nc"]
    with pytest.raises(InputError, match=r"all variables need the same times, .*'height'.* --static height"):
        prepare(sources, tmp_path / "store")
    summary = prepare(sources, tmp_path / "store", static=["height"])
    assert summary.static == ("height",)
    store = Store.open(tmp_path / "store")
    assert np.array_equal(store.read_static(["height"], GLOBE)[0], dataset["height"].values)
    with pytest.raises(InputError, match=r"no variable for --static: 'hight'.*'height'"):
        prepare(sources, tmp_path / "other", static=["hight"])


def test_they_are_chosen_and_renamed_like_others(tmp_path):
    source(tmp_path / "source.nc")
    sources = [tmp_path / "source.nc"]
    prepare(sources, tmp_path / "one", variables=["wind", "land"], rename={"land": "lsm"})
    with pytest.raises(InputError, match=r"names only fields without time"):
        prepare(sources, tmp_path / "two", variables=["land"])
    prepare(sources, tmp_path / "three", variables=["wind", "heat"])
    assert (Store.open(tmp_path / "one").channels, Store.open(tmp_path / "one").static_names) == (("wind",), ("lsm",))
    assert Store.open(tmp_path / "three").static == () and not (tmp_path / "three" / STATIC_FILE).exists()


def test_missing_cells_are_refused_by_name_and_left_out_otherwise(tmp_path):
    mask = np.ones((NLAT, NLON), np.float32)
    mask[3, 4] = np.nan
    source(tmp_path / "source.nc", mask=(DIMS[1:], mask, {"units": "1"}))
    summary = prepare([tmp_path / "source.nc"], tmp_path / "store")
    assert summary.static == ("land", "height")
    assert any("'mask' has no time and has missing cells, and is left out" in note for note in summary.notes)
    with pytest.raises(InputError, match=r"static variable 'mask' is nan at latitude 32, .*Fill them"):
        prepare([tmp_path / "source.nc"], tmp_path / "other", variables=["heat", "mask"])
    assert not (tmp_path / "other" / "store.nc").exists()


@pytest.mark.parametrize("value", [1e20, -3e30, np.inf])
def test_what_marks_missing_cells_is_no_value(tmp_path, value):
    """Undeclared, as in fields that have times."""
    mask = np.ones((NLAT, NLON), np.float32)
    mask[3, 4] = value
    source(tmp_path / "source.nc", mask=(DIMS[1:], mask, {"units": "1"}))
    assert "mask" not in prepare([tmp_path / "source.nc"], tmp_path / "store").static
    with pytest.raises(InputError, match=r"static variable 'mask' is .* at latitude 32, longitude 102.857: cells are"):
        prepare([tmp_path / "source.nc"], tmp_path / "other", variables=["heat", "mask"])


def test_a_variable_with_levels_and_one_without_time_may_have_one_name(tmp_path):
    """As ERA5's geopotential and its orography are both z."""
    dataset = source(tmp_path / "fields.nc")
    levels = np.stack([dataset["heat"].values, dataset["wind"].values], axis=1)
    z = (("time", "level", *DIMS[1:]), levels, {"units": "m"})
    dataset[["heat"]].assign(z=z).assign_coords(level=("level", [500.0, 850.0], {"units": "hPa"})).to_netcdf(
        tmp_path / "levels.nc", engine="h5netcdf"
    )
    once = xr.Dataset({"z": (DIMS[1:], dataset["height"].values, {"units": "m"})}, dataset.drop_vars("time").coords)
    once.to_netcdf(tmp_path / "invariant.nc", engine="h5netcdf")
    sources = [tmp_path / "levels.nc", tmp_path / "invariant.nc"]
    for number, (variables, channels) in enumerate(
        [(["heat", "z500", "z"], ("heat", "z500")), (None, ("heat", "z500", "z850"))]
    ):
        prepare(sources, tmp_path / str(number), variables=variables)
        store = Store.open(tmp_path / str(number))
        assert (store.channels, store.static_names) == (channels, ("z",))


def test_what_cannot_be_static_is_told(tmp_path):
    dataset = source(tmp_path / "fields.nc")
    levels = np.stack([dataset["heat"].values, dataset["wind"].values], axis=1)
    z = (("time", "level", *DIMS[1:]), levels, {"units": "m"})
    levelled = dataset.assign(z=z).assign_coords(level=("level", [500.0, 850.0], {"units": "hPa"}))
    levelled.to_netcdf(tmp_path / "levels.nc", engine="h5netcdf")
    with pytest.raises(InputError, match=r"--static z: 'z' is no field of latitude, longitude and at most times"):
        prepare([tmp_path / "levels.nc"], tmp_path / "store", static=["z"])
    with pytest.raises(InputError, match=r"--static z500: 'z500' is no field"):
        prepare([tmp_path / "levels.nc"], tmp_path / "store", static=["z500"])
    prepare([tmp_path / "fields.nc"], tmp_path / "renamed", rename={"wind": "gusts"}, static=["gusts"])
    assert Store.open(tmp_path / "renamed").static_names == ("gusts", "land", "height")


def test_a_store_is_a_source_with_all_it_has(made, tmp_path):
    path, dataset = made
    prepare([path], tmp_path / "again", mesh=(2, 2))
    with Store.open(tmp_path / "again") as store:
        assert store.static_names == ("land", "height")
        assert np.array_equal(store.read_static(["height"], GLOBE)[0], dataset["height"].values)
        with Store.open(path) as first:
            assert store.layout.channels == first.layout.channels and store.static == first.static
            assert store.units[0] == "K"


def test_what_is_prepared_anew_without_them_has_none(made, tmp_path):
    path, _ = made
    prepare([tmp_path / "source.nc"], path, variables=["heat"], overwrite=True)
    assert Store.open(path).static == () and not (path / STATIC_FILE).exists()


def test_ranks_of_mpi_write_the_same(made, tmp_path):
    path, _ = made
    command = [sys.executable, "-m", "faconv_hpc", "data", "prepare", tmp_path / "source.nc", "--frames-per-file", "5"]
    subprocess.run([MPIEXEC, "-n", "2", *command, "--output", tmp_path / "two"], check=True, timeout=120)
    assert (tmp_path / "two" / STATIC_FILE).read_bytes() == (path / STATIC_FILE).read_bytes()


def flipped(path):
    raw = bytearray(path.read_bytes())
    with Store.open(path.parent) as store:
        height = store.read_static(["height"], GLOBE)[0]
    at = raw.index(height.tobytes()[:32])
    raw[at] ^= 1
    path.write_bytes(raw)


def verify(path):
    command = [sys.executable, "-m", "faconv_hpc", "data", "verify", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, {row["file"]: row["problem"] for row in json.loads(done.stdout)}


def test_every_byte_of_them_is_checked(made, tmp_path):
    path, _ = made
    assert verify(path)[0] == 0 and STATIC_FILE in verify(path)[1]
    flipped(path / STATIC_FILE)
    with Store.open(path) as store, pytest.raises(InputError, match=r"static\.nc is missing or damaged: .*checksum"):
        store.read_static(["height"], GLOBE)
    code, found = verify(path)
    assert code == 1 and "checksum" in found[STATIC_FILE] and found["fields-00000.nc"] is None
    (path / STATIC_FILE).write_bytes((path / STATIC_FILE).read_bytes()[:-9])
    with Store.open(path) as store, pytest.raises(InputError, match=r"static\.nc .* store\.nc says"):
        store.check_files()


def test_those_of_another_store_are_refused(made, tmp_path):
    path, dataset = made
    other = source(tmp_path / "other.nc", height=(DIMS[1:], dataset["height"].values + 1, {"units": "m"}))
    assert not np.array_equal(other["height"].values, dataset["height"].values)
    prepare([tmp_path / "other.nc"], tmp_path / "other", frames_per_file=5)
    shutil.copy(tmp_path / "other" / STATIC_FILE, path / STATIC_FILE)
    with Store.open(path) as store, pytest.raises(InputError, match=r"static\.nc .*it is a file of another store"):
        store.read_static(["height"], GLOBE)


def test_a_contract_holds_data_to_them(made, tmp_path):
    path, dataset = made
    with Store.open(path) as store:
        config = small_config(tmp_path, path, data={"periods": {"test": "2003-03-04/"}})
        contract = make_contract(config, store, ProcessMesh.alone())
        assert [one.name for one in contract.channels.static] == ["land", "height"]
        contract.check(store)
    source(tmp_path / "feet.nc", height=(DIMS[1:], dataset["height"].values, {"units": "ft"}))
    prepare([tmp_path / "feet.nc"], tmp_path / "feet")
    with Store.open(tmp_path / "feet") as store, pytest.raises(InputError, match=r"'height' in m, .* has it in ft"):
        contract.check(store)
    source(tmp_path / "hills.nc", height=(DIMS[1:], 1.01 * dataset["height"].values, {"units": "m"}))
    prepare([tmp_path / "hills.nc"], tmp_path / "hills")
    with Store.open(tmp_path / "hills") as store, pytest.raises(InputError, match=r"'height' of mean .*has one of"):
        contract.check(store)
    prepare([tmp_path / "feet.nc"], tmp_path / "less", variables=["heat", "wind", "sst", "rain", "land"])
    with Store.open(tmp_path / "less") as store, pytest.raises(InputError, match=r"no static variable 'height' in sto"):
        contract.check(store)


def test_a_field_of_one_number_has_no_deviation(tmp_path):
    """Whatever is left of it in sums: a store that is prepared again is the same one."""
    flat = np.full((NLAT, NLON), 137.3, np.float32)
    source(tmp_path / "source.nc", flat=(DIMS[1:], flat, {"units": "m"}))
    prepare([tmp_path / "source.nc"], tmp_path / "store")
    config = small_config(tmp_path, tmp_path / "store", data={"periods": {"test": "2003-03-04/"}})
    with Store.open(tmp_path / "store") as store:
        assert store.static[-1].std == 0 and store.static[-1].channel.name == "flat"
        contract = make_contract(config, store, ProcessMesh.alone())
    prepare([tmp_path / "source.nc"], tmp_path / "again", frames_per_file=3)
    with Store.open(tmp_path / "again") as store:
        contract.check(store)
        check_same_data(contract, store, ProcessMesh.alone())
