"""A store that grows: later times and other variables, against one that was made of all sources at once."""

import re
import shutil
import sys

import numpy as np
import pytest
import xarray as xr

from faconv_hpc.data.chunks import ChunkShape
from faconv_hpc.data.inspection import describe_reading
from faconv_hpc.data.layout import (
    EXTENDED_VERSION,
    FORMAT_VERSION,
    STORE_FILE,
    Channel,
    StoreLayout,
    read_store_file,
)
from faconv_hpc.data.statistics import Statistics, merged, moments_of, pieces_of
from faconv_hpc.data.store import Store
from faconv_hpc.data.times import TimeAxis
from faconv_hpc.data.verification import verify_files, verify_static
from faconv_hpc.errors import InputError
from faconv_hpc.prepare.extension import extend
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.prepare.selection import Period
from faconv_hpc.prepare.writer import parts_from
from faconv_hpc.spatial.grid import Tile
from faconv_hpc.training.records import read_records
from faconv_hpc.training.shards import checkpoints_in
from faconv_hpc.training.trainer import train
from ranks import Layout, run_on_ranks
from runs import small_config
from sources import DIMS, NLAT, NLON, dataset, save, values, whole
from test_prepare_runs import MPIEXEC, needs_mpi, run

FRAMES = 13
ONE = Layout(1, 1, 1)
HOURS = np.arange(FRAMES) * 6.0


def source(path, names="uv", hours=HOURS, **changes):
    """Fields of any names at some of the hours; the same ones whatever hours are asked for."""
    whole_hours = {hour: place for place, hour in enumerate(np.arange(60) * 6.0)}
    places = [whole_hours[hour] for hour in hours]
    fields = {name: (DIMS, values(ord(name), (60, NLAT, NLON))[places]) for name in names}
    time = ("time", np.array(hours), {"units": "hours since 2001-01-01"})
    return save(dataset(fields, time=time, **changes), path)


def is_as_if_made_at_once(path, *sources, **options):
    """Everything that can be read of a store is that of another, made of all sources; and every byte is whole."""
    want = path.parent / f"{path.name}-at-once"
    prepare(sources, want, **options)
    with Store.open(path) as one, Store.open(want) as other:
        assert one.channels == other.channels and one.units == other.units
        assert one.layout.time.names == other.layout.time.names
        np.testing.assert_array_equal(one.layout.time.seconds, other.layout.time.seconds)
        np.testing.assert_array_equal(one.layout.time.numbers, other.layout.time.numbers)
        globe, every = Tile((0, NLAT), (0, NLON)), range(one.frames)
        order = np.random.default_rng(0).permutation(len(one.channels)).tolist()
        for channels in (range(len(one.channels)), order):
            (fields, valid), (fields_want, valid_want) = (store.read(every, globe, channels) for store in (one, other))
            np.testing.assert_array_equal(fields, fields_want)
            assert (valid is None) == (valid_want is None)
            if valid is not None:
                np.testing.assert_array_equal(valid, valid_want)
        for name in ("mean", "std", "tendency_std", "valid_share"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-13)
        for stretches in ([range(2, one.frames - 1)], [range(5), range(7, one.frames)]):
            rows = [statistics_of(store, stretches) for store in (one, other)]
            np.testing.assert_allclose(*rows, rtol=1e-13)
        assert all(problem is None for _, problem in verify_files(one, range(len(one.files))))
        one.check_files()
        assert {entry.name for entry in one.files} <= {path.name for path in path.glob("fields-*.nc")}
        assert [static.channel for static in one.static] == [static.channel for static in other.static]
        numbers = [[(static.mean, static.std) for static in store.static] for store in (one, other)]
        np.testing.assert_array_equal(*numbers)
        np.testing.assert_array_equal(*(store.read_static(store.static_names, globe) for store in (one, other)))


def statistics_of(store, stretches):
    """Of all channels, over some frames."""
    channels = range(len(store.channels))
    kept, read = pieces_of(store, stretches, channels, {})
    found = merged([moments_of(store, piece, stretches, {}) for piece in (*kept, *read)])
    return Statistics.of(found[channel] for channel in channels).rows


def marks(path):
    """By which a file that was written anew is known."""
    return {entry.name: entry.stat().st_ino for entry in path.glob("fields-*.nc")}


@pytest.mark.parametrize("frames_per_file", [2, 4, 5, 100])
@pytest.mark.parametrize("first", [1, 8, 12])
@pytest.mark.every(2, "frames_per_file", "first")
def test_later_times_are_as_if_they_had_been_there(tmp_path, frames_per_file, first):
    early, late = source(tmp_path / "a.nc", hours=HOURS[:first]), source(tmp_path / "b.nc", "vu", HOURS[first:])
    prepare([early], tmp_path / "store", frames_per_file=frames_per_file, mesh=(2, 3))
    before = marks(tmp_path / "store")
    summary = extend([late], tmp_path / "store")
    is_as_if_made_at_once(tmp_path / "store", early, late, frames_per_file=frames_per_file, mesh=(2, 3))
    assert f"added {FRAMES - first} frames, from 2001-01-" in summary.notes[-1]
    after = marks(tmp_path / "store")
    assert before.items() <= after.items()
    with Store.open(tmp_path / "store") as store:
        assert before.keys() - {entry.name for entry in store.files} == {max(before)}  # all but the last serve again


def test_month_after_month(tmp_path):
    parts = [source(tmp_path / f"{first}.nc", hours=HOURS[first : first + 3]) for first in range(0, FRAMES, 3)]
    prepare(parts[:1], tmp_path / "store", frames_per_file=4)
    for part in parts[1:]:
        extend([part], tmp_path / "store")
    is_as_if_made_at_once(tmp_path / "store", *parts, frames_per_file=4)
    content = read_store_file(tmp_path / "store" / STORE_FILE)
    assert len(content.layout.provenance["extended"]) == 4 and content.is_extended


def test_after_a_gap_nothing_is_written_anew(tmp_path):
    early, late = source(tmp_path / "a.nc", hours=HOURS[:6]), source(tmp_path / "b.nc", hours=HOURS[8:])
    prepare([early], tmp_path / "store", frames_per_file=4)
    before = marks(tmp_path / "store")
    extend([late], tmp_path / "store")
    is_as_if_made_at_once(tmp_path / "store", early, late, frames_per_file=4)
    assert before.items() <= marks(tmp_path / "store").items()


@pytest.mark.parametrize("frames_per_file", [2, 5])
def test_variables_come_into_files_of_their_own(tmp_path, frames_per_file):
    uv, cab = source(tmp_path / "uv.nc"), source(tmp_path / "cab.nc", "cab")
    prepare([uv], tmp_path / "store", frames_per_file=frames_per_file, mesh=(2, 3))
    before = marks(tmp_path / "store")
    summary = extend([cab], tmp_path / "store")
    is_as_if_made_at_once(tmp_path / "store", uv, cab, frames_per_file=frames_per_file, mesh=(2, 3))
    assert before.items() <= marks(tmp_path / "store").items()
    assert summary.notes == ("added at all times: c, a, b",)


def test_variables_then_times_then_variables(tmp_path):
    """Blocks of one, two and three channels, each with a last file of its own."""
    first = [source(tmp_path / f"{names}-1.nc", names, HOURS[:7]) for names in ("u", "vw", "abc")]
    then = [source(tmp_path / f"{names}-2.nc", names, HOURS[7:]) for names in ("u", "vw", "abc")]
    prepare(first[:1], tmp_path / "store", frames_per_file=3)
    extend(first[1:2], tmp_path / "store")
    extend(then[:2], tmp_path / "store")
    extend([first[2], then[2]], tmp_path / "store")
    is_as_if_made_at_once(tmp_path / "store", *first, *then, frames_per_file=3)
    prepare([tmp_path / "store"], tmp_path / "of-it", frames_per_file=5)  # as a source it is as any other
    is_as_if_made_at_once(tmp_path / "of-it", *first, *then, frames_per_file=5)


def test_what_a_mesh_reads_of_several_blocks_is_counted(tmp_path):
    uv, cab = source(tmp_path / "uv.nc"), source(tmp_path / "cab.nc", "cab")
    prepare([uv], tmp_path / "store", mesh=(1, 2))
    extend([cab], tmp_path / "store")
    with Store.open(tmp_path / "store") as store:
        found = describe_reading(store, (1, 2))
    assert found["bytes_needed"] == found["bytes_read"] == 5 * NLAT * NLON * 4


def test_missing_cells_may_come_later_and_with_variables(tmp_path):
    early = source(tmp_path / "a.nc", hours=HOURS[:7])
    late, other = tmp_path / "b.nc", tmp_path / "w.nc"
    with xr.open_dataset(source(tmp_path / "whole.nc", hours=HOURS[7:]), decode_times=False) as data:
        data.u[2, 3, 4] = np.nan
        save(data, late)
    with xr.open_dataset(source(tmp_path / "w-whole.nc", "w"), decode_times=False) as data:
        data.w[5, :2] = np.nan
        save(data, other)
    prepare([early], tmp_path / "store", frames_per_file=3)
    assert not read_store_file(tmp_path / "store" / STORE_FILE).has_missing
    extend([late], tmp_path / "store")
    is_as_if_made_at_once(tmp_path / "store", early, late, frames_per_file=3)
    extend([other], tmp_path / "store")
    (tmp_path / "store-at-once").rename(tmp_path / "aside")
    is_as_if_made_at_once(tmp_path / "store", early, late, other, frames_per_file=3)


def test_sequences_are_added_and_the_last_goes_on(tmp_path):
    paths = [source(tmp_path / f"run_{number}.nc", hours=HOURS[number : number + 5]) for number in range(3)]
    again = tmp_path / "again"
    again.mkdir()
    more, first = source(again / "run_2.nc", hours=HOURS[7:9]), source(again / "run_0.nc", hours=HOURS[9:])
    prepare(paths[:2], tmp_path / "store", sequences=True, frames_per_file=4)
    extend(paths[2:], tmp_path / "store", sequences=True)
    fresh = source(tmp_path / "run_10.nc", hours=HOURS[2:6])
    extend([fresh, more], tmp_path / "store", sequences=True)
    paths.append(more), paths.append(fresh)
    is_as_if_made_at_once(tmp_path / "store", *paths, sequences=True, frames_per_file=4)
    with pytest.raises(InputError, match=r"of run_0\. Add later times of its last sequence; or, where a store has"):
        extend([first], tmp_path / "store", sequences=True)
    with pytest.raises(InputError, match=r"in 4 sequences from .*, the sources go on with 4 from"):
        extend([first], tmp_path / "store")


def test_fields_without_time_alone_are_enough(tmp_path):
    uv, orography = source(tmp_path / "uv.nc"), tmp_path / "z.nc"
    save(dataset({"z": (("lat", "lon"), values(5, (NLAT, NLON)))}).drop_vars("time"), orography)
    prepare([uv], tmp_path / "store")
    before = marks(tmp_path / "store")
    assert extend([orography], tmp_path / "store").static == ("z",)
    assert marks(tmp_path / "store") == before
    mask = save(dataset({"m": (("lat", "lon"), values(6, (NLAT, NLON)))}).drop_vars("time"), tmp_path / "m.nc")
    extend([mask], tmp_path / "store")
    is_as_if_made_at_once(tmp_path / "store", uv, orography, mask)
    with Store.open(tmp_path / "store") as store:
        assert verify_static(store) is None
        assert sorted(path.name for path in (tmp_path / "store").glob("static*.nc"))[-1] == store.static_file.name
    assert "all of it is there" in extend([mask], tmp_path / "store").notes[0]
    with pytest.raises(InputError, match=r"the sources have nothing that .*store has not"):
        extend([orography], tmp_path / "store")


def test_longitudes_that_begin_elsewhere_are_turned(tmp_path):
    uv, w = source(tmp_path / "uv.nc"), source(tmp_path / "w.nc", "w")
    with xr.open_dataset(w, decode_times=False) as data:
        turned = save(data.roll(lon=5, roll_coords=True), tmp_path / "turned.nc")
    prepare([uv], tmp_path / "store")
    extend([turned], tmp_path / "store")
    is_as_if_made_at_once(tmp_path / "store", uv, w)


def test_a_store_that_was_never_extended_is_of_the_format_before(tmp_path):
    prepare([source(tmp_path / "u.nc", "u")], tmp_path / "store")
    extended = shutil.copytree(tmp_path / "store", tmp_path / "extended")
    extend([source(tmp_path / "v.nc", "v")], extended)
    for path, version in ((tmp_path / "store", FORMAT_VERSION), (extended, EXTENDED_VERSION)):
        assert xr.load_dataset(path / STORE_FILE, engine="h5netcdf").attrs["format_version"] == version


MORE = {"later": ("uv", HOURS[7:]), "beside": ("w", HOURS[:7]), "static": (), "beside and static": ("w", HOURS[:7])}


def added(tmp_path, kind):
    paths = [source(tmp_path / "b.nc", *MORE[kind])] if MORE[kind] else []
    if "static" in kind:
        mask = dataset({"m": (("lat", "lon"), values(6, (NLAT, NLON)))}).drop_vars("time")
        paths.append(save(mask, tmp_path / "m.nc"))
    return paths


@pytest.mark.parametrize("kind", MORE)
def test_until_all_is_written_the_store_is_what_it_was(tmp_path, monkeypatch, kind):
    """A run that is killed goes on, and one that never comes again leaves no trace for those who read."""
    early, more = source(tmp_path / "a.nc", hours=HOURS[:7]), added(tmp_path, kind)
    orography = save(dataset({"z": (("lat", "lon"), values(5, (NLAT, NLON)))}).drop_vars("time"), tmp_path / "z.nc")
    prepare([early], tmp_path / "store", frames_per_file=2)
    extend([orography], tmp_path / "store")
    fields, _, _ = whole(tmp_path / "store")

    def is_what_it_was(path):
        with Store.open(path) as store:
            assert (store.frames, store.channels, store.static_names) == (7, ("u", "v"), ("z",))
            assert all(problem is None for _, problem in verify_files(store, range(len(store.files))))
            assert verify_static(store) is None
        np.testing.assert_array_equal(whole(path)[0], fields)

    def killed(*rest):
        raise KeyboardInterrupt

    writer = "faconv_hpc.prepare.writer"
    stages = ["write_static_file"] * ("static" in kind) + ["write_fields_file"] * (kind != "static")
    for name in (*stages, "_survey", "write_store_file"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"{writer}.{name}", killed)
            extend(more, tmp_path / "store")
        is_what_it_was(tmp_path / "store")
    prepare([tmp_path / "store"], tmp_path / "copy")  # what an unfinished extension left is no source
    is_what_it_was(tmp_path / "copy")
    with monkeypatch.context() as patch, pytest.raises(InputError, match="cannot write to"):
        patch.setattr(f"{writer}.write_store_file", lambda *rest: _full())
        extend(more, tmp_path / "store")
    is_what_it_was(tmp_path / "store")
    with Store.open(tmp_path / "store") as reader:  # as a run that trains has it
        summary = extend(more, tmp_path / "store")
        assert summary.kept_files == (0 if kind == "static" else 4)
        np.testing.assert_array_equal(reader.read(range(7), Tile((0, NLAT), (0, NLON)), [0, 1])[0], fields)
    is_as_if_made_at_once(tmp_path / "store", early, orography, *more, frames_per_file=2)
    there = marks(tmp_path / "store")
    assert extend(more, tmp_path / "store").notes == ("this was added before, and all of it is there",)
    assert marks(tmp_path / "store") == there


def _full():
    raise OSError(28, "No space left on device")


def test_files_of_another_extension_are_not_taken_for_ones_own(tmp_path):
    early, late = source(tmp_path / "a.nc", hours=HOURS[:7]), source(tmp_path / "b.nc", hours=HOURS[7:])
    other = source(tmp_path / "c.nc", hours=HOURS[7:] + 6.0)
    prepare([early], tmp_path / "store", frames_per_file=4)

    def killed(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extend([other], tmp_path / "store", progress=killed)
    assert extend([late], tmp_path / "store").kept_files == 0
    is_as_if_made_at_once(tmp_path / "store", early, late, frames_per_file=4)


LAT = ("lat", np.linspace(80, -80, NLAT), {"units": "degrees_north"})
STEP_12 = np.arange(9, 59, 2) * 6.0


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda tmp: source(tmp, hours=HOURS[:9]), r"store ends at 2001-01-03 00:.*, the sources begin at 2001-01-01"),
        (lambda tmp: source(tmp, "w", HOURS[:8]), r"store has 9 from .* and 'w', which is new, 8 from .*--from and"),
        (lambda tmp: source(tmp, "w", HOURS), r"'w', which is new, 13 from"),
        (lambda tmp: source(tmp, "u", HOURS[9:]), r"have u of .*store, but not v: a store has all variables at all"),
        (lambda tmp: source(tmp, "uvw", HOURS[9:]), r"have w, which .*store has not\. .* --variables u,v; or add it"),
        (lambda tmp: source(tmp, hours=STEP_12), r"are 6 h apart, with those of the sources 12 h: what was no gap"),
        (lambda tmp: source(tmp, "w", HOURS[:9], lat=LAT), r"the latitude_deg of .* 75 to -75, those .* 80 to -80"),
        (lambda tmp: tmp.parent / "store", r"output .*store holds the source"),
        (lambda tmp: tmp.parent / "nowhere.nc", r"nowhere\.nc does not exist"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, change, said):
    prepare([source(tmp_path / "a.nc", hours=HOURS[:9])], tmp_path / "store", frames_per_file=4)
    before = marks(tmp_path / "store")
    with pytest.raises(InputError, match=said):
        extend([change(tmp_path / "more.nc")], tmp_path / "store")
    assert marks(tmp_path / "store") == before


def test_what_is_new_may_not_bear_a_name_that_is_taken(tmp_path):
    z = save(dataset({"z": (("lat", "lon"), values(5, (NLAT, NLON)))}).drop_vars("time"), tmp_path / "z.nc")
    prepare([source(tmp_path / "u.nc", "u"), z], tmp_path / "store")
    with pytest.raises(InputError, match=r"has z without time, the sources have it with times\. .*--rename z=NAME"):
        extend([source(tmp_path / "zt.nc", "z")], tmp_path / "store")
    mask = dataset({"u": (("lat", "lon"), values(6, (NLAT, NLON)))}).drop_vars("time")
    with pytest.raises(InputError, match=r"nothing that .*'u' has no time, and in .*store it has; it is left out"):
        extend([save(mask, tmp_path / "mask.nc")], tmp_path / "store")
    other = dataset({"z": (("lat", "lon"), values(7, (NLAT, NLON)))}).drop_vars("time")
    with pytest.raises(InputError, match=r"nothing that .*'z' is not what .*store has, which stays"):
        extend([save(other, tmp_path / "other.nc")], tmp_path / "store")


def test_fields_of_another_description_are_noted(tmp_path):
    prepare([source(tmp_path / "a.nc", "u", HOURS[:9])], tmp_path / "store")
    with xr.open_dataset(source(tmp_path / "late.nc", "u", HOURS[9:]), decode_times=False) as data:
        data.u.attrs["long_name"] = "u of another model"
        save(data, tmp_path / "named.nc")
    notes = extend([tmp_path / "named.nc"], tmp_path / "store").notes
    assert re.search(r"'u' is '.*' in .*store, and 'u of another model' in .*named\.nc; they are taken", notes[0])


def test_every_goes_on_with_the_steps_of_the_store(tmp_path):
    path = source(tmp_path / "all.nc", hours=np.arange(40) * 6.0)
    prepare([path], tmp_path / "store", period=Period(None, "2001-01-03", 4))
    with pytest.raises(InputError, match=r"--every 4 begins anew with 2001-01-04 06:00:00, 30 h after .*24 h apart"):
        extend([path], tmp_path / "store", period=Period("2001-01-04T06:00", None, 4))
    extend([path], tmp_path / "store", period=Period("2001-01-04", None, 4))
    is_as_if_made_at_once(tmp_path / "store", path, period=Period(None, None, 4))


def test_files_of_two_blocks_that_were_swapped_are_named(tmp_path):
    u, v = ([source(tmp_path / f"{n}{k}.nc", n, h) for k, h in enumerate((HOURS[:7], HOURS[7:]))] for n in "uv")
    prepare(u[:1], tmp_path / "store", frames_per_file=3)
    extend(v[:1], tmp_path / "store")
    extend([u[1], v[1]], tmp_path / "store")
    with Store.open(tmp_path / "store") as store:
        one, other = (next(e.name for e in store.files if e.block == b and e.first_frame == 6) for b in (0, 1))
    one, other, aside = (tmp_path / "store" / name for name in (one, other, "aside"))
    one.rename(aside), other.rename(one), aside.rename(other)
    told = r"damaged: it is a file of another store\. Copy the store again, or prepare all of it anew, from its first"
    with Store.open(tmp_path / "store") as store, pytest.raises(InputError, match=told):
        store.read([6], Tile((0, 1), (0, 1)), [0])


def test_many_channels_come_into_files_of_fewer_frames(monkeypatch):
    monkeypatch.setattr("faconv_hpc.prepare.fields_file.FILE_BYTES", 64 * NLAT * NLON * 4)
    layout = read_layout(channels=1, more=2, frames=100, frames_per_file=64)
    assert [len(part.frames) for part in parts_from(layout, 0, 0)] == [64, 36]
    assert [len(part.frames) for part in parts_from(layout, 0, 1)] == [32, 32, 32, 4]


def read_layout(channels, more, frames, frames_per_file):
    """Of two blocks, on the grid of the sources."""
    names = tuple(Channel(f"c{number}") for number in range(channels + more))
    axis = TimeAxis(np.arange(frames) * 21600, "standard")
    grid = dataset()
    chunk = ChunkShape(1, NLAT, NLON)
    return StoreLayout(
        grid.lat.values, grid.lon.values, names, axis, chunk, (1, 1), frames_per_file, blocks=(0, channels)
    )


def test_units_and_calendars_must_be_those_of_the_store(tmp_path):
    prepare([source(tmp_path / "a.nc", hours=HOURS[:9])], tmp_path / "store")
    with xr.open_dataset(source(tmp_path / "late.nc", hours=HOURS[9:]), decode_times=False) as data:
        data.u.attrs["units"] = "m s-1"
        save(data, tmp_path / "units.nc")
    with pytest.raises(InputError, match=r"'u' is in no units in .*store, but in m s-1 in .*units\.nc.*--accept u"):
        extend([tmp_path / "units.nc"], tmp_path / "store")
    with pytest.raises(InputError, match=r"store has the calendar standard, the sources noleap"):
        extend([tmp_path / "late.nc"], tmp_path / "store", calendar="noleap")
    extend([tmp_path / "units.nc"], tmp_path / "store", accept=["u"], calendar="proleptic_gregorian")
    with Store.open(tmp_path / "store") as store:
        assert store.frames == FRAMES and store.calendar == "standard"


def test_only_a_store_can_be_extended(tmp_path):
    path = source(tmp_path / "a.nc")
    with pytest.raises(InputError, match=r"store .*nowhere does not exist\. Make one with"):
        extend([path], tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    prepare([path], tmp_path / "store")
    (tmp_path / "store" / STORE_FILE).unlink()
    with pytest.raises(InputError, match=r"is not finished"):
        extend([path], tmp_path / "store")


def test_dates_are_chosen_of_the_sources(tmp_path):
    path = source(tmp_path / "all.nc")
    prepare([path], tmp_path / "store", period=Period(None, "2001-01-02"), frames_per_file=4)
    extend([path], tmp_path / "store", period=Period("2001-01-03", None))
    is_as_if_made_at_once(tmp_path / "store", path, frames_per_file=4)


RANKS = """
import sys
from faconv_hpc.prepare.comm import mpi_comm
from faconv_hpc.prepare.extension import extend
comm = mpi_comm()
assert comm.size == 3, comm.size
extend([sys.argv[1]], sys.argv[2], comm=comm)
"""


@needs_mpi
def test_three_ranks_add_what_one_does_and_all_hear_of_an_error(tmp_path):
    early, late = source(tmp_path / "a.nc", hours=HOURS[:5]), source(tmp_path / "b.nc", hours=HOURS[5:])
    prepare([early], tmp_path / "store", frames_per_file=2)
    command = [str(MPIEXEC), "-n", "3", sys.executable, "-c", RANKS, str(late), str(tmp_path / "store")]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    is_as_if_made_at_once(tmp_path / "store", early, late, frames_per_file=2)
    command[-2] = str(early)
    again = run(*command)
    assert again.returncode == 2 and len(re.findall("Only later times can be added", again.stderr)) == 1


def test_a_run_goes_on_bit_for_bit_with_a_store_that_has_grown(tmp_path):
    hours = np.arange(40) * 6.0
    early, late = source(tmp_path / "a.nc", hours=hours[:30]), source(tmp_path / "b.nc", hours=hours[30:])
    prepare([early], tmp_path / "store", frames_per_file=7)
    runs = []
    for name in ("whole", "cut"):
        data, training = {"periods": {"test": "2001-01-07/"}}, {"steps": 4, "warmup_steps": 1, "checkpoint_every": 2}
        runs.append(small_config(tmp_path / name, tmp_path / "store", data=data, training=training))
        run_on_ranks(ONE, lambda mesh: train(runs[-1], mesh))
    shutil.rmtree(checkpoints_in(runs[1].run_dir)[-1].path)
    extend([late], tmp_path / "store")
    extend([source(tmp_path / "w.nc", "w", hours)], tmp_path / "store")
    run_on_ranks(ONE, lambda mesh: train(runs[1], mesh))
    losses = [[record.loss for record in read_records(one.run_dir)] for one in runs]
    assert len(losses[0]) == 4 and losses[0] == losses[1]
