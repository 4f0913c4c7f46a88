"""Runs: the same numbers on every mesh, records, checkpoints and continuation, parity of the user's own config."""

import errno
import fcntl
import json
import math
import re
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
import xarray as xr
from torch.multiprocessing.reductions import StorageWeakRef

from faconv_hpc import FAConvLSTMNetwork, LatLonGrid, load_config
from faconv_hpc.config import MeshConfig, TrainingConfig
from faconv_hpc.data.store import Store
from faconv_hpc.evaluation import figures
from faconv_hpc.evaluation.figures import draw_forecast
from faconv_hpc.evaluation.results import as_json
from faconv_hpc.forecasting.forecaster import Forecaster
from faconv_hpc.look import save_figure
from faconv_hpc.spatial.exchange import HaloExchange
from faconv_hpc.training.contract import check_same_data
from faconv_hpc.training.engine import Engine
from faconv_hpc.training.faults.claim import claimed
from faconv_hpc.training.faults.drift import DriftCheck
from faconv_hpc.training.identity import check_same_run
from faconv_hpc.training.parity import layouts_of, verify_parity
from faconv_hpc.training.records import CONFIG_FILE, STEPS_FILE, VERSIONS_FILE, read_records
from faconv_hpc.training.setup import Workspace
from faconv_hpc.training.shards import checkpoints_in
from faconv_hpc.training.trainer import train
from ranks import Layout, run_on_ranks
from runs import evaluated, make_store, small_config


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "waves")


def losses_of(run_dir):
    return [record.loss for record in read_records(run_dir)]


def train_on(layout, directory, store, extend=None, **sections):
    """Trains on a layout of ranks and returns the losses."""
    sections["mesh"] = dict(zip(("replicas", "lat", "lon"), layout, strict=True))
    config = small_config(directory, store, **sections)
    run_on_ranks(layout, lambda mesh: train(config, mesh, extend=extend))
    return losses_of(config.run_dir)


def test_the_losses_do_not_depend_on_the_mesh(tmp_path, store):
    """The same global batch, six samples."""
    curves = {}
    for layout in (Layout(1, 1, 1), Layout(1, 2, 2), Layout(2, 1, 2), Layout(1, 3, 2)):
        training = {
            "micro_batch": 6 // layout.replicas,
            "zero_stage": 2,
            "clip_norm": 0.1,
            "steps": 8,
            "learning_rate": 0.04,
        }
        curves[layout] = train_on(
            layout, tmp_path / str(layout), store, training=training, model={"checkpoint_steps": 2}
        )
    want = np.array(curves.pop(Layout(1, 1, 1)))
    assert len(want) == 8 and want[-1] < 0.95 * want[0]
    for layout, losses in curves.items():
        np.testing.assert_allclose(losses, want, rtol=1e-5, err_msg=str(layout))


def test_what_the_network_has_said_is_gone_when_backward_begins(tmp_path, store):
    """Its forecasts of all steps, and the states, which are as large as what a segment holds."""

    def check(mesh):
        forward, backward, said, gone = Engine.forward, Engine.backward, [], []

        def saying(engine, *given, **further):
            output = forward(engine, *given, **further)
            large = output.forecast_BTCYX, output.state.layers[-1][1]
            said.extend(StorageWeakRef(one.untyped_storage()) for one in large)
            return output

        def asking(engine, loss):
            gone.extend(one.expired() for one in said)
            backward(engine, loss)

        Engine.forward, Engine.backward = saying, asking
        try:
            train(small_config(tmp_path / "run", store, training={"steps": 3}), mesh)
        finally:
            Engine.forward, Engine.backward = forward, backward
        return gone

    ((first, *others),) = run_on_ranks(Layout(1, 1, 1), check)
    assert first and others and all(others)


def test_accumulation_reports_the_same_losses_as_one_batch(tmp_path, store):
    one = train_on(Layout(1, 1, 2), tmp_path / "one", store, training={"micro_batch": 2})
    two = train_on(Layout(1, 1, 2), tmp_path / "two", store, training={"micro_batch": 1, "accumulation": 2})
    np.testing.assert_allclose(two, one, rtol=1e-5)


@pytest.mark.parametrize("layout", [Layout(1, 1, 2), Layout(2, 1, 1)], ids=str)
def test_a_run_that_stopped_goes_on_as_if_it_had_not(tmp_path, store, layout):
    whole = train_on(layout, tmp_path / "whole", store, training={"checkpoint_every": 3})
    train_on(layout, tmp_path / "cut", store, training={"checkpoint_every": 3})
    run = tmp_path / "cut" / "run"
    # as a kill after step 5 leaves it: no checkpoint beyond step 3, a record cut short
    newest = checkpoints_in(run)[-1]
    newest.path.rename(tmp_path / "away")
    lines = (run / STEPS_FILE).read_text().splitlines()
    (run / STEPS_FILE).write_text("\n".join(lines[:5]) + '\n{"step": 6, "lo')
    again = train_on(layout, tmp_path / "cut", store, training={"checkpoint_every": 3})
    assert again == whole
    assert [record.step for record in read_records(run)] == [1, 2, 3, 4, 5, 6]
    restored, undisturbed = checkpoints_in(run)[-1], checkpoints_in(tmp_path / "whole" / "run")[-1]
    for name, value in undisturbed.parameters().items():
        assert torch.equal(restored.parameters()[name], value)


def test_a_run_keeps_the_config_of_its_earlier_part(tmp_path, store):
    train_on(Layout(1, 1, 1), tmp_path, store)
    train_on(Layout(1, 1, 1), tmp_path, store, "keep", training={"steps": 8, "learning_rate": 0.02})
    run = tmp_path / "run"
    before = (run / CONFIG_FILE).read_text()
    assert load_config(run / "config-until-step-6.yaml").training.steps == 6
    assert load_config(run / CONFIG_FILE).training.learning_rate == 0.02
    train_on(Layout(1, 1, 1), tmp_path, store)  # nothing to do: 6 of 8 steps
    assert (run / CONFIG_FILE).read_text() == before


def test_a_run_goes_on_at_another_mesh_and_stage(tmp_path, store):
    whole = train_on(Layout(1, 1, 2), tmp_path / "whole", store, training={"micro_batch": 2})
    train_on(Layout(1, 1, 2), tmp_path / "moved", store, training={"micro_batch": 2, "checkpoint_every": 3})
    checkpoints_in(tmp_path / "moved" / "run")[-1].path.rename(tmp_path / "away")
    moved = train_on(Layout(2, 1, 1), tmp_path / "moved", store, training={"zero_stage": 3})
    np.testing.assert_allclose(moved, whole, rtol=1e-5)


def test_a_run_leaves_config_versions_and_true_batch_sizes(tmp_path, store):
    train_on(Layout(2, 1, 2), tmp_path, store, training={"accumulation": 2, "tensorboard": True})
    run = tmp_path / "run"
    assert load_config(run / CONFIG_FILE).training.accumulation == 2
    assert json.loads((run / VERSIONS_FILE).read_text())["torch"] == torch.__version__
    for record in read_records(run):
        assert record.samples == 4  # 2 replicas x 2 micro-batches; the tiles do not count
        assert 0 <= record.data_share <= 1 and 0 < record.communication_share < 1 and record.peak_memory_gib > 0.1
    assert list((run / "tensorboard").iterdir())


def test_a_run_that_began_otherwise_is_not_continued(tmp_path, store):
    train_on(Layout(1, 1, 1), tmp_path, store)
    other = make_store(tmp_path / "other", seed=1)
    cases = [
        ({"data": {"lat_boundary": "zero"}}, store, r"data\.lat_boundary='pole', this config says 'zero'"),
        ({"training": {"accumulation": 3}}, store, r"samples per step.*=1, this config says 3"),
        ({"data": {"variables": ["wave_1"]}}, store, r"channels=\['wave_0', 'wave_1'\], this config says \['wave_1'\]"),
        ({}, other, r"trained on a 'wave_0' of mean, .* at the same dates"),
    ]
    for sections, data, message in cases:
        with pytest.raises(AssertionError, match=message):
            _resume_only(tmp_path, data, sections)


def _resume_only(directory, store, sections):
    """As far as a run goes before it asks whether it may go on."""
    config = small_config(directory, store, **sections)

    def check(mesh):
        workspace = Workspace.of(config, Store.open(config.data.store), mesh)
        manifest = checkpoints_in(config.run_dir)[-1].manifest()
        check_same_run(workspace, manifest.identity)
        check_same_data(manifest.contract, workspace.store, mesh)

    run_on_ranks(Layout(1, 1, 1), check)


def test_a_network_of_another_size_is_refused(tmp_path, store):
    train_on(Layout(1, 1, 1), tmp_path, store)
    with pytest.raises(AssertionError, match=r"holds a run with model\.hidden_channels=8, this config says 12"):
        train_on(Layout(1, 1, 1), tmp_path, store, model={"hidden_channels": 12})


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, store):
    with pytest.raises(AssertionError, match=r"the (loss|norm).* is (nan|inf) at step \d.*Lower training"):
        train_on(Layout(1, 1, 2), tmp_path, store, training={"learning_rate": 1e30, "clip_norm": 0})


def test_missing_data_is_masked_alike_on_every_mesh(tmp_path):
    store = make_store(tmp_path / "holes")
    _punch_holes(store)
    curves = [
        train_on(layout, tmp_path / str(layout), store, training={"micro_batch": 2 // layout.replicas})
        for layout in (Layout(1, 1, 1), Layout(1, 2, 2), Layout(2, 1, 2))
    ]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)
    np.testing.assert_allclose(curves[2], curves[0], rtol=1e-5)


def _punch_holes(store):
    """Prepares the same store again with a third of its cells missing, other ones at other times."""
    import xarray as xr

    from faconv_hpc.prepare.preparation import prepare

    (part,) = sorted(store.glob("fields-*.nc"))
    with xr.open_dataset(part, engine="h5netcdf") as opened:
        fields = opened["fields"].load()
    holes = np.random.default_rng(0).random(fields.shape) < 0.3
    names = [str(name) for name in fields["channel"].values]
    dataset = xr.Dataset({name: fields.where(~holes).isel(channel=i, drop=True) for i, name in enumerate(names)})
    source = store.parent / "holes.nc"
    dataset.to_netcdf(source, engine="h5netcdf")
    prepare([source], store, overwrite=True)


def test_evaluation_is_the_same_on_every_mesh_and_beats_persistence(tmp_path, monkeypatch):
    store = make_store(tmp_path / "waves", frames=40, noise=0.0)
    data = {"periods": {"test": "2000-01-10T06/"}}
    config = small_config(tmp_path, store, training={"steps": 240, "learning_rate": 0.02}, data=data)
    run_on_ranks(Layout(1, 1, 1), lambda mesh: train(config, mesh))
    maps = [tmp_path / "alone.nc", tmp_path / "on_ranks.nc"]
    alone, *_ = run_on_ranks(Layout(1, 1, 1), lambda mesh: evaluated(config, mesh, maps=maps[0]))
    assert alone.held_out and alone.forecasts == 3
    for layout in (Layout(1, 2, 2), Layout(2, 1, 2)):  # tiles; and replicas, of which one has a date less
        _check_is_the_same(run_on_ranks(layout, lambda mesh: evaluated(config, mesh, maps=maps[1])), alone)
        xr.testing.assert_allclose(*(xr.load_dataset(path, engine="h5netcdf") for path in maps), rtol=1e-5, atol=1e-5)
        maps[1].unlink()
    assert all(skill.ratio < 0.9 for skill in alone.skills)
    _check_against_the_files(alone, store)
    _look_at_the_figure(alone, tmp_path / "figures" / "forecast.png", monkeypatch)


def _check_is_the_same(on_ranks, alone):
    """On every rank; spectra on the first."""
    for evaluation in on_ranks:
        for found, want in zip(evaluation.skills, alone.skills, strict=True):
            assert found.rmse == pytest.approx(want.rmse, rel=1e-5)
            assert found.persistence_rmse == pytest.approx(want.persistence_rmse, rel=1e-5)
        for name, values in evaluation.metrics.items():
            np.testing.assert_allclose(values, alone.metrics[name], rtol=1e-5, atol=1e-5)
        for name in ("truth_CYX", "forecast_CYX"):
            np.testing.assert_allclose(getattr(evaluation.example, name), getattr(alone.example, name), atol=1e-5)
    for name in ("zonal_ESCK", "total_ESCL"):
        found, want = (getattr(one.spectra, name) for one in (on_ranks[0], alone))
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-9)


def _look_at_the_figure(evaluation, path, monkeypatch):
    """What is written in it."""
    judged = {"wave_1": "not trained: its loss has weight 0"}
    evaluation = replace(evaluation, example=replace(evaluation.example, judged=judged))
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure) or save_figure(figure, path))
    ratios = [skill.ratio for skill in evaluation.skills]
    assert draw_forecast(evaluation, path).stat().st_size > 10_000
    (figure,) = drawn
    before, after = evaluation.example.dates
    said = f"run, step 240: from {before} to {after} (held out)"
    assert figure.get_suptitle() == said and before.startswith("2000-01-1")
    titles = [place.get_title() for place in figure.axes if place.get_title()]
    expected = [f"wave_{n}: {what}" for n in range(2) for what in ("truth", "forecast", "error (forecast - truth)")]
    expected[1] += f", {ratios[0]:.2f} of persistence's error"
    expected[4] += ", not trained: its loss has weight 0"
    assert titles == expected
    labels = {label.get_text() for place in figure.axes[:6] for label in place.get_xticklabels()}
    assert {"60°E", "0°", "120°W"} <= labels


def test_a_forecast_that_is_no_number_is_not_left_out(tmp_path, monkeypatch):
    store = make_store(tmp_path / "waves")
    config = small_config(tmp_path, store)
    run_on_ranks(Layout(1, 1, 1), lambda mesh: train(config, mesh))

    def check(mesh):
        free_run = Forecaster.free_run

        def spoiled(self, *given):
            for number, fields_BCYX in enumerate(free_run(self, *given)):
                fields_BCYX[:, 0, 3, 5] = torch.inf if number else torch.nan
                yield fields_BCYX

        Forecaster.free_run = spoiled
        try:
            return evaluated(config, mesh, 2)
        finally:
            Forecaster.free_run = free_run

    (evaluation,) = run_on_ranks(Layout(1, 1, 1), check)
    for first, second in (evaluation.skills[:2], evaluation.skills[2:]):
        assert not math.isfinite(first.rmse) and math.isfinite(first.persistence_rmse) and math.isfinite(second.rmse)
    rows = json.loads(json.dumps(as_json(evaluation)), parse_constant=lambda name: 1 / 0)["skills"]
    assert [row["rmse"] for row in rows if row["model"] == "run"] == [
        None,
        None,
        *(one.rmse for one in evaluation.skills[1::2]),
    ]


def _check_against_the_files(evaluation, store):
    """Persistence's error from the HDF5 file itself."""
    with h5py.File(sorted(store.glob("fields-*.nc"))[0]) as file:
        fields, latitude = file["fields"][...].astype(np.float64), file["latitude"][...]
    edges = np.clip(np.concatenate([[90], (latitude[1:] + latitude[:-1]) / 2, [-90]]), -90, 90)
    area = np.abs(np.diff(np.sin(np.deg2rad(edges))))[:, None] / fields.shape[-1]
    square = ((fields[-3:] - fields[-4:-1]) ** 2).mean(0)
    want = np.sqrt((square * area).sum((-2, -1)) / (area.sum() * fields.shape[-1]))
    np.testing.assert_allclose([skill.persistence_rmse for skill in evaluation.skills], want, rtol=1e-5)


def test_a_file_system_without_locks_is_no_reason_not_to_train(tmp_path, monkeypatch, capsys):
    def no_locks(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with claimed(tmp_path, here=True):
        assert "cannot be locked (Function not implemented)" in capsys.readouterr().err


@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.float32), (4, torch.float64), (3, torch.float64)])
def test_parity_of_a_users_config(tmp_path, store, ranks, dtype):
    config = small_config(tmp_path, store, model={"checkpoint_steps": 2})
    answers = run_on_ranks(Layout(1, 1, ranks), lambda mesh: verify_parity(config, mesh, dtype))
    assert all(rows == answers[0] for rows in answers)
    every = layouts_of(ranks, LatLonGrid(11, 14))
    assert {row.layout for row in answers[0]} == {str(layout) for layout in every} and len(every) > 1
    quantities = {row.quantity for row in answers[0]}
    assert ("update (ZeRO 1)" in quantities) == (dtype == torch.float32)
    assert {"loss", "output", "embedding", "input gradient", "gradient of layers.1.attention"} <= quantities
    assert all(row.passed for row in answers[0]), [row for row in answers[0] if not row.passed]


def test_parity_of_replicas_and_a_boundary_for_each_side(tmp_path, store):
    config = small_config(tmp_path, store, data={"lat_boundary": ["pole", "replicate"]}, training={"zero_stage": 3})
    layouts = [MeshConfig(replicas=2, lat=2), MeshConfig(replicas=4), MeshConfig(lat=4)]
    rows, *_ = run_on_ranks(Layout(1, 1, 4), lambda mesh: verify_parity(config, mesh, layouts=layouts))
    assert [row.layout for row in rows if row.quantity == "update (ZeRO 3)"] == ["2x2x1", "4x1x1", "4x1"]
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]
    # The slope of SiLU is near 0 there: one tile's own float32 gradient is 1.04e-5 away from the float64 one.
    by_rounding = {row.quantity: row.tolerance for row in rows if row.tolerance > 1e-5}
    assert by_rounding.keys() <= {"gradient of layers.1.squeeze"} and all(one < 1e-4 for one in by_rounding.values())


def test_parity_finds_an_error_in_the_exchange(tmp_path, store):
    config = small_config(tmp_path, store)

    def check(mesh):
        fill = HaloExchange.start_fill

        def broken(self, owned):
            finish = fill(self, owned)
            return lambda: {peer: buffer * 1.001 for peer, buffer in finish().items()}

        HaloExchange.start_fill = broken
        try:
            return verify_parity(config, mesh)
        finally:
            HaloExchange.start_fill = fill

    for rows in run_on_ranks(Layout(1, 1, 2), check):
        failed = {(row.layout, row.quantity): row.first for row in rows if not row.passed}
        assert ("1x2", "update (ZeRO 1)") in failed
        # the cell beside the border between the tiles (columns 6 and 7) is the first to see the other tile
        assert re.fullmatch(r"rank 0, wave_0, step 0, row 0, column [0-3]", failed["1x2", "output"])


@pytest.mark.parametrize("stage", [0, 2])
def test_a_weight_that_drifts_on_one_rank_is_caught_and_named(stage):
    def check(mesh):
        training = TrainingConfig(steps=100, zero_stage=stage, micro_batch=1)
        engine = Engine(FAConvLSTMNetwork(3, 2, 8, 2, embedding_channels=16, coarse_shape=(2, 2)), mesh, training)
        drift = DriftCheck(engine.network, mesh, every=2)
        drift.after_step(2)
        weight = dict(engine.network.named_parameters())["layers.1.expansion_weight"]
        if mesh.rank == 2:
            flat = weight.data.view(-1)
            flat[17] = torch.nextafter(flat[17], torch.tensor(torch.inf))
        drift.after_step(3)  # not its turn
        try:
            drift.after_step(4)
        except RuntimeError as error:
            return str(error)
        return "not caught"

    for told in run_on_ranks(Layout(1, 2, 2), check):
        assert re.search(r"after step 4 parameter layers\.1\.expansion_weight on rank\(s\) 2 is not", told)
