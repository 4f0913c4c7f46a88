"""Looking at held-out data while a run trains: the same on every mesh, and nothing of the run is changed."""

import json
import os
import shutil
import signal
import threading

import numpy as np
import pytest

from faconv_hpc.data.samples import Windows
from faconv_hpc.data.store import Store
from faconv_hpc.errors import EXIT_STOPPED, InputError
from faconv_hpc.observe import READING
from faconv_hpc.training.fit import check_fits
from faconv_hpc.training.records import VALIDATION_FILE, read_records
from faconv_hpc.training.setup import Workspace
from faconv_hpc.training.shards import checkpoints_in
from faconv_hpc.training.trainer import train
from faconv_hpc.training.validation import Validation
from ranks import Layout, run_on_ranks
from runs import evaluated, make_store, skills_in, small_config

ONE = Layout(1, 1, 1)
DATES = "2000-01-02T18/2000-01-03T18"  # frames 7 to 11 of 16
PERIODS = {"validation": DATES, "test": "2000-01-04/"}
TRAINING = {"validate_every": 2, "validate_leads": 2, "checkpoint_every": 2, "micro_batch": 2}
DATA = {"window": 2, "periods": PERIODS}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "waves")


def config_of(directory, store, layout=ONE, data=None, **training):
    mesh = {"replicas": layout.replicas, "lat": layout.lat, "lon": layout.lon}
    training = TRAINING | {"micro_batch": 2 // layout.replicas} | training
    return small_config(directory, store, mesh=mesh, data=data or DATA, training=training)


OF_EMBEDDINGS = {"step", "forecast_loss", "embedding_loss", "effective_rank", "calendar_share", "probe_r2"}


def trained(config, layout=ONE):
    assert set(run_on_ranks(layout, lambda mesh: train(config, mesh))) == {0}
    return rows_of(config)


def rows_of(config):
    path = config.run_dir / VALIDATION_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses_of(config):
    return [record.loss for record in read_records(config.run_dir)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, store):
    config = config_of(tmp_path_factory.mktemp("alone"), store)
    return config, trained(config)


@pytest.fixture(scope="module")
def looks_of(tmp_path_factory, store, alone):
    """What one rank sees with so many samples."""
    three = config_of(tmp_path_factory.mktemp("three"), store, validate_samples=3)
    trained(three)
    return {samples: skills_in(config.run_dir) for samples, config in ((32, alone[0]), (3, three))}


def test_validation_changes_nothing_in_training_and_is_what_evaluation_says(tmp_path, store, alone, looks_of):
    config, rows = alone[0], skills_in(alone[0].run_dir)
    embeddings = [row for row in alone[1] if row not in rows]
    assert [row["step"] for row in embeddings] == [2, 4, 6] and all(set(row) == OF_EMBEDDINGS for row in embeddings)
    assert all(row["embedding_loss"] > 0 and row["effective_rank"] > 1 for row in embeddings)
    expected = [(step, lead, name) for step in (2, 4, 6) for lead in (1, 2) for name in ("wave_0", "wave_1")]
    assert [(row["step"], row["lead"], row["variable"]) for row in rows] == expected
    assert rows[0]["rmse"] != rows[4]["rmse"] and rows[0]["persistence_rmse"] == rows[4]["persistence_rmse"]
    data = DATA | {"periods": {"train": ["/2000-01-02T12", "2000-01-03T19/2000-01-03"], "test": DATES}}
    without = config_of(tmp_path, store, data=data, validate_every=0)
    assert trained(without) == [] and losses_of(without) == losses_of(config)
    for samples, forecasts, seen in ((None, 4, rows), (3, 3, looks_of[3])):
        (evaluation,) = run_on_ranks(ONE, lambda mesh, some=samples: evaluated(without, mesh, 2, samples=some))
        assert evaluation.forecasts == forecasts
        for skill, row in zip(evaluation.skills, seen[-4:], strict=True):
            said = {"step": 6} | skill.as_json()
            assert said.keys() == row.keys() and (said["variable"], said["lead"]) == (row["variable"], row["lead"])
            numbers = [key for key, value in row.items() if isinstance(value, float)]
            assert [said[key] for key in numbers] == pytest.approx([row[key] for key in numbers], rel=1e-6)


@pytest.mark.parametrize(
    ("layout", "zero_stage", "samples"),
    [(Layout(2, 1, 2), 3, 3), (Layout(2, 1, 1), 0, 32), (Layout(1, 1, 3), 2, 3), (Layout(1, 2, 2), 1, 32)],
    ids=str,
)
@pytest.mark.every(2)
def test_on_every_mesh_it_is_the_same(tmp_path, store, alone, looks_of, layout, zero_stage, samples):
    """Four windows; with three samples two replicas have one that counts for neither."""
    config = config_of(tmp_path, store, layout, zero_stage=zero_stage, validate_samples=samples)
    every, rows = trained(config, layout), skills_in(config.run_dir)
    if samples == 32:
        for got, expected in zip(every, alone[1], strict=True):
            for name in OF_EMBEDDINGS & set(got) - {"step", "calendar_share"}:
                assert got[name] == pytest.approx(expected[name], rel=1e-4)
    for name in ("rmse", "persistence_rmse", "climatology_rmse"):
        want = [row[name] for row in looks_of[samples]]
        np.testing.assert_allclose([row[name] for row in rows], want, rtol=1e-6)


def test_killed_between_a_step_and_its_validation_a_run_continues_bit_for_bit(tmp_path, store, alone):
    config, rows = config_of(tmp_path, store), alone[1]

    def cut(mesh):
        look = Validation.look

        def interrupted(self, may_go_on):
            if rows_of(config):
                raise KeyboardInterrupt
            return look(self, may_go_on)

        Validation.look = interrupted
        try:
            train(config, mesh)
        except KeyboardInterrupt:
            return 1
        finally:
            Validation.look = look

    assert run_on_ranks(ONE, cut) == [1] and {row["step"] for row in rows_of(config)} == {2}
    assert trained(config) == rows and losses_of(config) == losses_of(alone[0])


def test_what_a_signal_prevented_is_made_up_for_before_the_next_step(tmp_path, store, alone):
    """A step that is saved without its look: as SIGTERM in the step leaves it."""
    config, rows = config_of(tmp_path, store, keep_best=False), alone[1]
    trained(config)
    shutil.rmtree(checkpoints_in(config.run_dir)[-1].path)
    path = config.run_dir / VALIDATION_FILE
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] != 4))
    assert sorted(trained(config), key=lambda row: row["step"]) == rows and losses_of(config) == losses_of(alone[0])


@pytest.fixture
def read(monkeypatch):
    """Windows.read for looks, which is called with ``before(windows, number of the call)``, on the ranks."""

    def on_ranks(layout, config, before):
        def run(mesh):
            original, calls = Windows.read, []

            def reading(self, indices, steps=None):
                if threading.current_thread() is threading.main_thread():  # training reads ahead in another
                    calls.append(mesh.activity.doing)
                    before(mesh, len(calls))
                return original(self, indices, steps)

            Windows.read = reading
            try:
                return train(config, mesh), calls
            finally:
                Windows.read = original

        return run_on_ranks(layout, run)

    return on_ranks


@pytest.mark.parametrize("window", [1, 3, 9])
@pytest.mark.every(2)
def test_a_signal_in_a_look_is_followed_before_its_next_window(tmp_path, store, alone, read, window):
    """Looks are of four windows; between two checkpoints, too, and after the last step, nothing is lost."""
    layout = Layout(1, 1, 2)
    whole = config_of(tmp_path / "whole", store, layout, checkpoint_every=0)
    rows = trained(whole, layout)
    config = config_of(tmp_path / "cut", store, layout, checkpoint_every=0)

    def before(mesh, call):
        if call == window and mesh.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    answers = read(layout, config, before)
    assert [code for code, _ in answers] == [EXIT_STOPPED] * 2
    step = 2 * (1 + (window - 1) // 4)
    assert {doing for _, calls in answers for doing in calls} == {READING}
    assert all(len(calls) == window for _, calls in answers)
    assert checkpoints_in(config.run_dir)[-1].step == step and {row["step"] for row in rows_of(config)} < {2, 4, 6}
    assert trained(config, layout) == rows and losses_of(config) == losses_of(whole)


def test_the_last_step_is_saved_before_its_look_and_a_look_that_is_left_is_made_up_for(tmp_path, store, alone, read):
    config = config_of(tmp_path, store, checkpoint_every=0)
    seen = []

    def before(mesh, call):
        if call == 9:
            seen.append([one.step for one in checkpoints_in(config.run_dir)])
            raise KeyboardInterrupt

    with pytest.raises(AssertionError, match="KeyboardInterrupt"):
        read(ONE, config, before)
    assert checkpoints_in(config.run_dir)[-1].step == 6 and {row["step"] for row in rows_of(config)} == {2, 4}
    assert trained(config) == alone[1] and losses_of(config) == losses_of(alone[0])
    assert trained(config) == alone[1]  # and there is nothing left to do


def test_a_look_reads_by_files_of_its_own(tmp_path, store):
    """HDF5's handles are not for two threads, and training reads ahead."""
    config = config_of(tmp_path, store)

    def check(mesh):
        with Store.open(store) as opened:
            workspace = Workspace.of(config, opened, mesh)
            windows = Validation(workspace, None)._windows
            windows.read([0])
            return windows.store is not opened and windows.store._open is not opened._open and bool(windows.store._open)

    assert run_on_ranks(ONE, check) == [True]


def test_a_new_run_keeps_the_looks_of_the_one_before_aside(tmp_path, store, alone):
    config = config_of(tmp_path, store)
    trained(config)
    shutil.rmtree(config.run_dir / "checkpoints")
    assert trained(config) == alone[1]
    kept = (config.run_dir / "validation-before-0.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == alone[1]


@pytest.mark.parametrize("cut", [1, 30, 400])
def test_a_look_that_is_cut_off_in_the_file_is_made_up_for(tmp_path, store, alone, cut):
    config = config_of(tmp_path, store)
    trained(config)
    path = config.run_dir / VALIDATION_FILE
    path.write_bytes(path.read_bytes()[:-cut])
    assert trained(config) == alone[1]


def test_what_cannot_be_validated_is_told_before_a_run_starts(tmp_path, store):
    with pytest.raises(InputError, match=r"validate_every=2, but data\.periods\.validation names no dates.*leave tr"):
        check_fits(config_of(tmp_path, store, data={"window": 2}))
    with pytest.raises(InputError, match=r"2000-01-03 18:00:00 is in data\.periods\.validation and in data\.periods\."):
        check_fits(config_of(tmp_path, store, data=DATA | {"periods": PERIODS | {"test": "2000-01-03T18/"}}))
    config = config_of(tmp_path, store, validate_leads=6)
    with pytest.raises(InputError, match=r"no 6 frames within 2000-01-02T18/2000-01-03T18 that 2 frames precede"):
        check_fits(config)
