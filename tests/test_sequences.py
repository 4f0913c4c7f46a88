"""Stores of several sequences, runs of a simulation or members of an ensemble: told apart wherever frames follow."""

import json
import math

import h5py
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from faconv_hpc.config import PeriodsConfig
from faconv_hpc.data.inspection import describe_store
from faconv_hpc.data.periods import frames_within, ranges_of, spans_of, starts_within, stretches_of
from faconv_hpc.data.statistics import pieces_of, row_weights
from faconv_hpc.data.store import Store
from faconv_hpc.data.times import TimeAxis, in_sequence
from faconv_hpc.data.verification import verify_files
from faconv_hpc.errors import InputError
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.prepare.selection import Period
from faconv_hpc.training.records import CONTRACT_FILE, read_records
from faconv_hpc.training.trainer import train
from ranks import Layout, run_on_ranks
from runs import evaluated, skills_in, small_config
from sources import DIMS, FRAMES, NLAT, NLON, dataset, save, values, whole
from test_checkpoint import assert_same_state, checkpoints_in
from test_cli import faconv

NAMES = ("c", "0", "11", "b")
MEMBER_DIMS = ("time", "member", *DIMS[1:])


def axis_of(lengths, names=None, calendar="standard", step_s=3600):
    parts = [TimeAxis(np.arange(length) * step_s, calendar) for length in lengths]
    return in_sequence(list(zip(names or map(str, range(len(lengths))), parts, strict=True)))


def members(trend=5.0):
    """(time, member, lat, lon), members far from each other, so that a change from one to the next shows."""
    shape = (FRAMES, len(NAMES), NLAT, NLON)
    return values(3, shape) + trend * np.arange(len(NAMES), dtype=np.float32)[None, :, None, None]


def ensemble(**more):
    fields = {"u": (MEMBER_DIMS, members()), "v": (DIMS, values(2))} | more
    return dataset(fields, member=("member", list(NAMES)))


def deviation_of_changes(sequences, store):
    """By definition, area-weighted in float64, of the changes within each."""
    weights = np.broadcast_to(row_weights(store.latitude_deg, store.longitude_deg)[:, None], (NLAT, NLON))
    changes = np.concatenate([np.diff(one.astype(np.float64), axis=0) for one in sequences])
    mean = np.average(changes.mean(0), weights=weights)
    return math.sqrt(np.average(((changes - mean) ** 2).mean(0), weights=weights))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(ensemble(), tmp_path_factory.mktemp("source") / "ensemble.nc")


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_no_window_leaves_its_sequence(data):
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    names = st.sampled_from(["a", "a to b", "b", "1999", "1999 of sequence a", "sequence b", "r1 i1", "0"])
    window = data.draw(st.integers(1, 5))
    axis = axis_of(lengths, data.draw(st.lists(names, min_size=len(lengths), max_size=len(lengths), unique=True)))
    of = np.repeat(np.arange(len(lengths)), lengths)
    inside = np.array(data.draw(st.lists(st.booleans(), min_size=len(of), max_size=len(of))))
    spans = spans_of(inside)
    want = [
        start
        for start in range(len(of) - window)
        if inside[start : start + window + 1].all() and len({*of[start : start + window + 1]}) == 1
    ]
    assert starts_within(stretches_of(axis, spans), window).tolist() == want
    assert (
        spans_of(np.isin(np.arange(len(of)), [f for s in frames_within(axis, ranges_of(axis, spans)) for f in s]))
        == spans
    )


@pytest.mark.parametrize(
    ("text", "frames"),
    [
        ("sequence 11", [8, 9, 10, 11, 12]),
        ("sequences 0 to 11", list(range(3, 13))),
        ("1970-01-01T02 of sequences c to 0", [2, 5]),
        ("/1970-01-01T01:00 of sequence 11", [8, 9]),
        ("1970-01-01T03/", [6, 7, 11, 12]),
    ],
)
def test_periods_are_of_dates_and_sequences(text, frames):
    axis = axis_of([3, 5, 5], ["c", "0", "11"])
    assert [frame for span in frames_within(axis, [text]) for frame in span] == frames


def test_a_period_of_no_sequence_is_said():
    axis = axis_of([3, 5, 5], ["c", "0", "11"])
    with pytest.raises(InputError, match=r"no sequence '1' in the store\. Did you mean '11'\? There are: c, 0, 11"):
        frames_within(axis, ["sequence 1"])
    with pytest.raises(InputError, match="'sequences 11 to c' ends before it begins: c stands before 11"):
        frames_within(axis, ["sequences 11 to c"])
    with pytest.raises(InputError, match="'sequence 0' names a sequence, but the store has but one, without a name"):
        frames_within(axis_of([4]), ["sequence 0"])
    for text in ("sequence", "sequences 1", "1999 of", "1999 sequence 1"):
        with pytest.raises(ValueError, match=r"of sequences such as .* got '"):
            PeriodsConfig(train=text)


@pytest.mark.parametrize("frames_per_file", [2, 9, 12, 100])
def test_members_become_sequences_with_statistics_of_their_own_changes(tmp_path, source, frames_per_file):
    prepare([source], tmp_path / "store", sequence_dim="member", frames_per_file=frames_per_file)
    fields, _, store = whole(tmp_path / "store", "u", "v")
    want = np.moveaxis(members(), 1, 0)
    np.testing.assert_array_equal(fields[:, 0].reshape(len(NAMES), FRAMES, NLAT, NLON), want)
    np.testing.assert_array_equal(fields[:, 1], np.tile(values(2), (len(NAMES), 1, 1)))
    axis = store.layout.time
    assert axis.names == NAMES and axis.beginnings == (0, 9, 18, 27) and axis.gaps.tolist() == [9, 18, 27]
    assert axis.label(19) == "2001-01-01 06:00:00 of sequence 11"
    assert store.tendency_std[0] == pytest.approx(deviation_of_changes(want, store), rel=1e-12)
    kept, read = pieces_of(store, stretches_of(axis, [range(store.frames)]), [0, 1], {})
    assert len(kept) == len(store.files) and not read  # of all frames every file has kept what counts
    assert all(problem is None for _, problem in verify_files(store, range(len(store.files))))
    described = describe_store(store)["time"]
    assert described["regular"] and [one["name"] for one in described["sequences"]] == list(NAMES)


def test_each_file_is_a_sequence_and_files_of_one_name_are_one(tmp_path):
    """Variables in files of their own, and one run that is longer."""
    for number, length in enumerate((9, 5)):
        part = dataset().isel(time=slice(0, length)) + number
        for name in ("u", "v"):
            (tmp_path / name).mkdir(exist_ok=True)
            part[name].attrs["units"] = "m s-1"
            save(part[[name]].assign_coords(time=dataset().time[:length], lat=dataset().lat, lon=dataset().lon),
                 tmp_path / name / f"run_{number}.nc")  # fmt: skip
    sources = sorted(tmp_path.glob("?/run_*.nc"))
    prepare(sources, tmp_path / "store", sequences=True, frames_per_file=4)
    fields, _, store = whole(tmp_path / "store", "u", "v")
    assert store.layout.time.names == ("run_0", "run_1") and store.layout.time.beginnings == (0, 9)
    want = np.stack([values(1), values(2)], axis=1)
    np.testing.assert_array_equal(fields, np.concatenate([want, want[:5] + 1]))
    with pytest.raises(
        InputError, match=r"times of 'u' overlap: .*Give each time once, or several sequences of it with"
    ):
        prepare(sources, tmp_path / "other")


def test_a_store_of_a_store_keeps_its_sequences(tmp_path, source):
    prepare([source], tmp_path / "first", sequence_dim="member", frames_per_file=7)
    prepare([tmp_path / "first"], tmp_path / "second", period=Period("2001-01-01T12:00", None, 2), frames_per_file=5)
    fields, _, store = whole(tmp_path / "second", "u")
    assert store.layout.time.names == NAMES and store.layout.time.beginnings == (0, 4, 8, 12)
    want = np.moveaxis(members(), 1, 0)[:, 2::2]
    np.testing.assert_array_equal(fields[:, 0].reshape(want.shape), want)


def test_dates_that_some_sequences_lack_leave_those_out(tmp_path):
    for number in range(3):
        times = ("time", np.arange(FRAMES) * 6.0, {"units": f"hours since 200{number}-01-01"})
        save(dataset(time=times), tmp_path / f"run_{number}.nc")
    prepare(sorted(tmp_path.glob("*.nc")), tmp_path / "store", sequences=True, period=Period("2001", None))
    with Store.open(tmp_path / "store") as store:
        assert store.layout.time.names == ("run_1", "run_2") and store.frames == 2 * FRAMES
    prepare(sorted(tmp_path.glob("*.nc")), tmp_path / "one", sequences=True, period=Period("2002", None))
    with Store.open(tmp_path / "one") as store:
        assert store.layout.time.names == () and store.layout.time.label(0) == "2002-01-01 00:00:00"


def test_what_does_not_fit_is_said(tmp_path, source):
    with pytest.raises(InputError, match="--sequence-dim number: no source has such a dim"):
        prepare([save(dataset(), tmp_path / "plain.nc")], tmp_path / "store", sequence_dim="number")
    with pytest.raises(InputError, match=r"--select member=c, or each as a sequence with --sequence-dim member"):
        prepare([source], tmp_path / "store")
    alone = save(dataset({"w": (DIMS, values(5))}), tmp_path / "alone.nc")
    with pytest.raises(InputError, match=r"alone\.nc does not say which sequence it is of, others do \(c, 0, 11, b\)"):
        prepare([source, alone], tmp_path / "store", sequence_dim="member")
    later = dataset({"w": (DIMS, values(5))}, time=("time", 1.0 + np.arange(FRAMES), dataset().time.attrs))
    later = save(later.expand_dims(member=list(NAMES)), tmp_path / "later.nc")
    with pytest.raises(InputError, match=r"'u' .* has 36 in 4 sequences from .* of sequence c to .*'w' .* has 36 in 4"):
        prepare([source, later], tmp_path / "store", sequence_dim="member")


def test_a_member_that_a_file_holds_alone_has_its_number(tmp_path, source):
    """The control member beside the perturbed ones, and a file that goes on with one of them."""
    one = dataset({"u": (DIMS, values(7)), "v": (DIMS, values(2))})
    control = save(one.assign_coords(member="x"), tmp_path / "control.nc")
    later = one.assign_coords(member="11", time=("time", 54 + np.arange(FRAMES) * 6.0, one.time.attrs))
    prepare([control, source, save(later, tmp_path / "later.nc")], tmp_path / "store", sequence_dim="member")
    with Store.open(tmp_path / "store") as store:
        assert store.layout.time.names == ("x", *NAMES) and store.layout.time.beginnings == (0, 9, 18, 27, 45)
    prepare([control, tmp_path / "later.nc"], tmp_path / "alone", sequence_dim="member")
    with Store.open(tmp_path / "alone") as store:
        assert store.layout.time.names == ("x", "11") and store.layout.time.gaps.tolist() == [FRAMES]
    with pytest.raises(InputError, match=r"plain\.nc does not say which sequence it is of, others do \(c, 0, 11, b\)"):
        prepare([source, save(one, tmp_path / "plain.nc")], tmp_path / "other", sequence_dim="member")


def test_members_without_a_name_are_not_joined_to_those_with_one(tmp_path, source):
    later = (
        ensemble().drop_vars("member").assign_coords(time=("time", 54 + np.arange(FRAMES) * 6.0, dataset().time.attrs))
    )
    with pytest.raises(InputError, match="some sources name the values of the dim 'member' and some do not"):
        prepare([source, save(later, tmp_path / "later.nc")], tmp_path / "store", sequence_dim="member")
    with pytest.raises(InputError, match="--select member takes one of what --sequence-dim member takes all"):
        prepare([source], tmp_path / "store", sequence_dim="member", select={"member": "c"})


def test_what_has_no_time_and_differs_between_sequences_is_not_the_first_ones(tmp_path):
    height = np.arange(4, dtype=np.float32)[:, None, None] + values(4, (NLAT, NLON))
    fields = {"oro": (("member", *DIMS[1:]), height), "mask": (DIMS[1:], values(5, (NLAT, NLON)))}
    source = save(ensemble(**fields), tmp_path / "source.nc")
    summary = prepare([source], tmp_path / "store", sequence_dim="member")
    assert summary.static == ("mask",)
    assert any(
        "'oro' has no time and is not the same in the sequences c and 0, and is left out" in note
        for note in summary.notes
    )
    with pytest.raises(
        InputError, match=r"'oro' has no time and is not the same in the sequences c and 0; a store has"
    ):
        prepare([source], tmp_path / "named", sequence_dim="member", variables=["u", "oro"])


def test_stores_are_sequences_by_their_whole_name(tmp_path):
    for number, name in enumerate(("nu_0.5", "nu_0.75")):
        times = ("time", 54.0 * number + np.arange(FRAMES) * 6.0, {"units": "hours since 2001-01-01"})
        prepare([save(dataset(time=times), tmp_path / f"{number}.nc")], tmp_path / name)
    prepare([tmp_path / "nu_0.5", tmp_path / "nu_0.75"], tmp_path / "store", sequences=True)
    with Store.open(tmp_path / "store") as store:
        assert store.layout.time.names == ("nu_0.5", "nu_0.75") and store.layout.time.gaps.tolist() == [FRAMES]


def test_one_variable_of_each_of_two_runs_is_no_run(tmp_path):
    for name in ("u", "v"):
        save(dataset()[[name]], tmp_path / f"run_{name}.nc")
    with pytest.raises(InputError, match="need the same sequences, but 'u' has run_u, and 'v' has run_v"):
        prepare(sorted(tmp_path.glob("*.nc")), tmp_path / "store", sequences=True)


def test_names_that_are_bytes_are_read_and_verified(tmp_path, source):
    bytes_ = ensemble().assign_coords(member=("member", np.array(NAMES, dtype="S2")))
    prepare([save(bytes_, tmp_path / "bytes.nc")], tmp_path / "store", sequence_dim="member")
    with Store.open(tmp_path / "store") as store:
        assert store.layout.time.names == NAMES
        path = tmp_path / "store" / store.files[0].name
    with h5py.File(path, "r+", locking=False) as file:
        file["sequence_name"][1] = "other"
    with Store.open(tmp_path / "store") as store:
        assert [problem for _, problem in verify_files(store, [0]) if "its sequence_name is not" in str(problem)]


CASES = {"one rank": Layout(1, 1, 1), "2 x 2 tiles": Layout(1, 2, 2), "replicas": Layout(2, 1, 2)}
PERIODS = {"train": ["sequences c to 0", "/2001-01-02T00 of sequence b"], "validation": "sequence 11",
           "test": "2001-01-02T12/ of sequence b"}  # fmt: skip


def trained(directory, store, layout, **training):
    mesh = dict(zip(("replicas", "lat", "lon"), layout, strict=True))
    training = {"steps": 4, "micro_batch": 2 // layout.replicas, "validate_every": 2, "checkpoint_every": 2} | training
    data = {"window": 2, "periods": PERIODS}
    config = small_config(directory, store, mesh=mesh, data=data, training=training)
    run_on_ranks(layout, lambda mesh: train(config, mesh))
    rows = skills_in(config.run_dir)
    skills = run_on_ranks(layout, lambda mesh: evaluated(config, mesh))[0].skills
    numbers = [record.loss for record in read_records(config.run_dir)], [row["rmse"] for row in rows]
    return [*numbers, [skill.rmse for skill in skills]], config


def test_a_run_on_sequences_is_the_same_on_every_mesh(tmp_path, source):
    prepare([source], tmp_path / "store", sequence_dim="member", frames_per_file=10)
    found = {name: trained(tmp_path / name, tmp_path / "store", layout) for name, layout in CASES.items()}
    want, config = found.pop("one rank")
    for numbers, _ in found.values():
        for got, expected in zip(numbers, want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5)
    contract = json.loads((config.run_dir / CONTRACT_FILE).read_text())
    assert contract["training"] == ["sequence c", "sequence 0", "2001-01-01 00:00:00/2001-01-02 00:00:00 of sequence b"]
    u = next(one for one in contract["variables"] if one["name"] == "u")
    with Store.open(tmp_path / "store") as store:
        want = deviation_of_changes([members()[:, 0], members()[:, 1], members()[:5, 3]], store)
    assert u["tendency_std"] == pytest.approx(want, rel=1e-11)


def test_a_run_is_evaluated_on_a_store_of_other_sequences(tmp_path, source):
    prepare([source], tmp_path / "store", sequence_dim="member")
    _, config = trained(tmp_path / "run", tmp_path / "store", CASES["one rank"], steps=3, validate_every=3)
    other = ensemble().assign_coords(member=("member", ["k", "l", "m", "b"]))
    prepare([save(other, tmp_path / "other.nc")], tmp_path / "others", sequence_dim="member")
    moved = config.model_copy(update={"data": config.data.model_copy(update={"store": tmp_path / "others"})})
    (evaluation,) = run_on_ranks(CASES["one rank"], lambda mesh: evaluated(moved, mesh))
    assert evaluation.held_out and evaluation.forecasts == 3


def test_held_out_sequences_change_nothing_in_training(tmp_path):
    losses = []
    for factor in (1, 10):
        field = members()
        field[:, 2] *= factor
        field[5:, 3] *= factor
        source = save(ensemble(u=(MEMBER_DIMS, field)), tmp_path / f"{factor}.nc")
        prepare([source], tmp_path / f"store{factor}", sequence_dim="member")
        numbers, config = trained(tmp_path / str(factor), tmp_path / f"store{factor}", CASES["one rank"])
        losses.append((numbers[0], config))
    assert losses[0][0] == losses[1][0]
    assert_same_state(*(checkpoints_in(config.run_dir)[-1] for _, config in losses))


def test_the_verb_takes_and_shows_sequences(tmp_path, source):
    store = tmp_path / "store"
    made = faconv("data", "prepare", source, "--output", store, "--sequence-dim", "member")
    assert made.returncode == 0, made.stderr
    shown = faconv("data", "inspect", store)
    assert "36 frames in 4 sequences, 2001-01-01 00:00:00 of sequence c to" in shown.stdout.replace("\n", " ")


def test_any_tool_sees_which_frame_is_of_which_sequence(tmp_path, source):
    prepare([source], tmp_path / "store", sequence_dim="member", frames_per_file=12)
    with xr.open_dataset(tmp_path / "store" / "fields-00001.nc", engine="h5netcdf") as second:
        names = second["sequence_name"].values[second["sequence"].values]
        assert names.tolist() == ["0"] * 6 + ["11"] * 6
