"""What a run owns: statistics of its training frames, and a contract that all later data are held to."""

import json
import shutil

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import save_file

from faconv_hpc import load_network
from faconv_hpc.config import PeriodsConfig
from faconv_hpc.data.periods import stretches_of
from faconv_hpc.data.samples import Windows
from faconv_hpc.data.statistics import Statistics, merged, moments_of, pieces_of, row_weights
from faconv_hpc.data.store import Store
from faconv_hpc.errors import InputError
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.spatial.grid import Tile
from faconv_hpc.spatial.mesh import ProcessMesh
from faconv_hpc.training import contract as contract_module
from faconv_hpc.training.contract import make_contract
from faconv_hpc.training.export import export
from faconv_hpc.training.records import CONTRACT_FILE, read_records
from faconv_hpc.training.shards import checkpoints_in
from faconv_hpc.training.trainer import train
from ranks import Layout, run_on_ranks
from runs import evaluated, small_config

NLAT, NLON, FRAMES, HELD_OUT = 11, 14, 17, 4
DATA = {"periods": {"test": "2003-03-04T06/"}}
DIMS = ("time", "latitude", "longitude")
UNITS = {"heat": "K", "wind": "m s**-1"}
ONE = Layout(1, 1, 1)


def fields(gaps=False):
    """Two fields of other sizes, with a trend, so that the last frames are not like the first."""
    random = np.random.default_rng(7)
    trend = np.linspace(0, 3, FRAMES)[:, None, None]
    heat = 280 + 10 * random.normal(size=(FRAMES, NLAT, NLON)) + 5 * trend
    wind = random.normal(size=(FRAMES, NLAT, NLON)) * (1 + trend)
    if gaps:
        wind[:, 3:5, 2:9] = np.nan
        wind[6] = np.nan
    return {"heat": heat.astype(np.float32), "wind": wind.astype(np.float32)}


def make_store(path, values, *, units=UNITS, step_hours=6.0, hours=None, nlon=NLON, west=0.0, **options):
    """In the order of ``values``."""
    hours = np.arange(FRAMES) * step_hours if hours is None else hours
    source = xr.Dataset(
        {name: (DIMS, field[..., :nlon], {"units": units[name]}) for name, field in values.items()},
        {
            "time": (
                "time",
                np.arange(FRAMES) * step_hours if hours is None else hours,
                {"units": "hours since 2003-03-01"},
            ),
            "latitude": np.linspace(80, -80, NLAT),
            "longitude": np.arange(nlon) * 360 / nlon - west,
        },
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    source.to_netcdf(path.with_suffix(".nc"), engine="h5netcdf")
    shutil.rmtree(path, ignore_errors=True)
    prepare([path.with_suffix(".nc")], path, **{"frames_per_file": 5} | options)
    return path


def moments_over(store, frames, channels):
    frames = stretches_of(store.layout.time, [frames])
    pieces = [piece for some in pieces_of(store, frames, channels, {}) for piece in some]
    found = merged(moments_of(store, piece, frames, {}) for piece in pieces)
    return [found[channel] for channel in channels]


def by_definition(values_TYX, weights_Y):
    """Mean, deviation, and deviation of the change, in float64."""
    values = values_TYX.astype(np.float64)

    def moments(part):
        weights = np.broadcast_to(weights_Y[:, None], part.shape)[~np.isnan(part)]
        known = part[~np.isnan(part)]
        mean = (weights * known).sum() / weights.sum()
        return mean, np.sqrt((weights * (known - mean) ** 2).sum() / weights.sum())

    mean, std = moments(values)
    return mean, std, moments(np.diff(values, axis=0))[1] if len(values) > 1 else 0.0


@pytest.mark.parametrize("frames_per_file", [1, 5, 17])
@pytest.mark.parametrize(
    "limits", [(0, 17), (0, 16), (0, 15), (0, 12), (0, 10), (3, 17), (5, 10), (4, 11), (6, 9), (16, 17)]
)
@pytest.mark.every(3, "frames_per_file", "limits")
def test_statistics_are_of_just_the_frames_that_count(tmp_path, limits, frames_per_file):
    """At the limits of files, inside them, and over several."""
    values = fields(gaps=True)
    frames = range(*limits)
    with Store.open(make_store(tmp_path / "store", values, frames_per_file=frames_per_file)) as store:
        weights = row_weights(store.latitude_deg, store.longitude_deg)
        found = Statistics.of(moments_over(store, frames, [1, 0]))
        want = [by_definition(values[name][slice(*limits)], weights) for name in ("wind", "heat")]
    np.testing.assert_allclose(np.transpose([found.mean, found.std, found.tendency_std]), want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("frames_per_file", [1, 4, 5, 17])
def test_statistics_count_no_change_over_a_gap(tmp_path, frames_per_file):
    values, hours = (
        fields(gaps=True),
        np.arange(FRAMES) * 6.0 + 12.0 * np.searchsorted([4, 5, 10], np.arange(FRAMES), "right"),
    )
    parts = [slice(1, 4), slice(4, 5), slice(5, 10), slice(10, 17)]
    with Store.open(make_store(tmp_path / "store", values, hours=hours, frames_per_file=frames_per_file)) as store:
        weights = row_weights(store.latitude_deg, store.longitude_deg)
        found = Statistics.of(moments_over(store, range(1, FRAMES), [1, 0]))
    for at, name in enumerate(("wind", "heat")):
        field = values[name].astype(np.float64)
        mean, std, _ = by_definition(field[1:], weights)
        changes = np.concatenate([np.diff(field[part], axis=0) for part in parts])
        tendency_std = by_definition(changes, weights)[1]
        got = found.mean[at], found.std[at], found.tendency_std[at]
        np.testing.assert_allclose(got, (mean, std, tendency_std), rtol=1e-11)


def test_a_store_with_gaps_trains_alike_on_every_mesh_and_is_evaluated_by_dates(tmp_path, capfd):
    hours = np.arange(FRAMES) * 6.0 + 12.0 * (np.arange(FRAMES) >= 7)
    store = make_store(tmp_path / "store", fields(), hours=hours)
    data = {"periods": {"train": ["/2003-03-01", "2003-03-02T06/2003-03-03"], "test": "2003-03-05/"}, "window": 2}
    configs = [trained(tmp_path / str(layout), store, layout, data=data) for layout in (ONE, Layout(1, 2, 2))]
    losses = [[record.loss for record in read_records(config.run_dir)] for config in configs]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    contract = load_network(configs[0].run_dir).contract
    assert contract.training == ("2003-03-01 00:00:00/2003-03-01 18:00:00", "2003-03-02 06:00:00/2003-03-03 18:00:00")
    (before,) = run_on_ranks(ONE, lambda mesh: evaluated(configs[0], mesh))
    assert before.held_out and before.forecasts == 3
    make_store(tmp_path / "store", {name: field[6:] for name, field in fields().items()}, hours=hours[6:])
    (after,) = run_on_ranks(ONE, lambda mesh: evaluated(configs[0], mesh))
    assert after.held_out and after.forecasts == 3
    np.testing.assert_allclose([one.rmse for one in after.skills], [one.rmse for one in before.skills], rtol=1e-6)


def test_what_was_trained_on_is_not_held_out_in_whatever_store_it_stands(tmp_path):
    values = fields()
    store = make_store(tmp_path / "store", values)
    config = trained(tmp_path, store, data={"periods": {"train": "2003-03-02/"}, "window": 2})
    (found,) = run_on_ranks(ONE, lambda mesh: evaluated(config, mesh))
    assert not found.held_out and found.forecasts == FRAMES - 2
    make_store(store, {name: field[:6] for name, field in values.items()}, hours=np.arange(6) * 6.0)
    (found,) = run_on_ranks(ONE, lambda mesh: evaluated(config, mesh))
    assert not found.held_out and found.forecasts == 4
    make_store(store, {name: field[:4] for name, field in values.items()}, hours=np.arange(4) * 6.0)
    (found,) = run_on_ranks(ONE, lambda mesh: evaluated(config, mesh))
    assert found.held_out and found.forecasts == 2


def test_of_files_that_count_in_full_no_field_is_read(tmp_path, monkeypatch):
    with Store.open(make_store(tmp_path / "store", fields())) as store:
        read = []
        monkeypatch.setattr(
            Store,
            "read",
            lambda store, frames, *more, once=Store.read: (read.extend(frames), once(store, frames, *more))[1],
        )
        moments_over(store, range(FRAMES), [0])
        assert read == []
        moments_over(store, range(12), [0])
        assert read == [10, 11]


def trained(directory, store, layout=ONE, **sections):
    sections = {"data": DATA, "training": {"steps": 4, "warmup_steps": 1}} | sections
    mesh = {"replicas": layout.replicas, "lat": layout.lat, "lon": layout.lon}
    config = small_config(directory, store, mesh=mesh, **sections)
    assert set(run_on_ranks(layout, lambda mesh: train(config, mesh))) == {0}
    return config


def contract_text(config):
    return (config.run_dir / CONTRACT_FILE).read_text()


def test_what_is_held_out_changes_nothing_in_training(tmp_path):
    values = fields()
    one = trained(tmp_path / "one", make_store(tmp_path / "stores" / "one", values))
    changed = {name: field.copy() for name, field in values.items()}
    for field in changed.values():
        field[-HELD_OUT:] *= 10
    other = trained(tmp_path / "other", make_store(tmp_path / "stores" / "other", changed))
    contracts = [load_network(config.run_dir).contract.model_dump(exclude={"store"}) for config in (one, other)]
    assert contracts[0] == contracts[1]
    losses = [[record.loss for record in read_records(config.run_dir)] for config in (one, other)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_the_contract_is_the_same_on_every_mesh_and_in_every_checkpoint(tmp_path):
    store = make_store(tmp_path / "store", fields())
    configs = [trained(tmp_path / str(layout), store, layout) for layout in (ONE, Layout(1, 2, 2), Layout(1, 1, 3))]
    assert len({contract_text(config) for config in configs}) == 1
    stored = {checkpoints_in(config.run_dir)[-1].manifest().contract.model_dump_json() for config in configs}
    assert stored == {json.dumps(json.loads(contract_text(configs[0])), separators=(",", ":"))}


def test_statistics_are_summed_up_in_rounds(tmp_path, monkeypatch):
    """Nobody waits for what others read of more than a file; and the deal changes nothing."""
    store = make_store(tmp_path / "store", fields(), frames_per_file=2)
    config = small_config(tmp_path, store, data=DATA | {"log1p": {"heat": 100.0}})

    def made(mesh, pieces):
        before, gathered = contract_module.PIECES, []
        original = ProcessMesh.gathered_objects

        def counting(self, value):
            gathered.append(len(value))
            return original(self, value)

        contract_module.PIECES, ProcessMesh.gathered_objects = pieces, counting
        try:
            with Store.open(store) as opened:
                return make_contract(config, opened, mesh), gathered
        finally:
            contract_module.PIECES, ProcessMesh.gathered_objects = before, original

    ((want, _),) = run_on_ranks(ONE, made, 64)
    for pieces in (1, 64):
        for found, gathered in run_on_ranks(Layout(1, 1, 3), made, pieces):
            assert found == want and max(gathered) <= pieces
    assert len(gathered) >= 3  # of a rank, for seven files whose logarithms are read


def skills(config):
    (found,) = run_on_ranks(ONE, lambda mesh: evaluated(config, mesh).skills)
    return {skill.variable: (skill.units, skill.rmse, skill.persistence_rmse) for skill in found}


def test_a_store_of_the_same_source_in_another_order_gives_the_same_skill(tmp_path):
    """Its chunks, files, channels and statistics are others: the network keeps to its own."""
    values = fields()
    config = trained(tmp_path, make_store(tmp_path / "store", values))
    before = skills(config)
    order = {"more": values["heat"] * 3, "wind": values["wind"], "heat": values["heat"]}
    options = {"frames_per_file": 3, "mesh": (2, 2), "compression": 1}
    make_store(tmp_path / "store", order, units=UNITS | {"more": "K"}, **options)
    after = skills(config)
    assert list(after) == ["heat", "wind"]
    for name, (units, *numbers) in before.items():
        assert after[name][0] == units
        np.testing.assert_allclose(after[name][1:], numbers, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"units": {"heat": "degC", "wind": "m s**-1"}},
            r"'heat' in K, the store \S+ has it in degC\. Convert",
        ),
        (
            {"nlon": 12},
            r"longitude_deg of 14 values .*, the store \S+ has of 12 values from 0 to 330\. Re",
        ),
        (
            {"west": 180.0},
            r"of 14 values from 0 to 334.286, the store \S+ has of 14 values from -180 .*begin elsewhere: `ds\.roll\(l",
        ),
        ({"step_hours": 3.0}, r"trained on steps of 6 h, the store \S+ has steps of 3 h\. Thin out.*--every"),
        ({"calendar": "noleap"}, r"trained on the calendar standard, the store \S+ has noleap"),
        ({"gaps": True}, r"trained on a 'wind' without missing cells, the store \S+ has some that are missing\. Fill"),
        ({"without": "wind"}, r"no variable 'wind' in store"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_data_that_are_not_what_the_network_was_trained_on_are_refused(tmp_path, change, told):
    before = Store.open(make_store(tmp_path / "before", fields()))
    contract = make_contract(small_config(tmp_path, before.path, data=DATA), before, ProcessMesh.alone())
    contract.check(before)
    values = fields(change.pop("gaps", False))
    values.pop(change.pop("without", None), None)
    with Store.open(make_store(tmp_path / "after", values, **change)) as after, pytest.raises(InputError, match=told):
        contract.check(after)


def test_gaps_in_what_is_not_used_do_not_matter(tmp_path):
    before = Store.open(make_store(tmp_path / "before", fields()))
    contract = make_contract(small_config(tmp_path, before.path, data=DATA), before, ProcessMesh.alone())
    more, units = fields() | {"sst": fields(gaps=True)["wind"]}, UNITS | {"sst": "K"}
    after = Store.open(make_store(tmp_path / "after", more, units=units))
    contract.check(after)
    config = small_config(tmp_path, after.path, data=DATA | {"variables": ["heat", "wind"]})
    assert after.has_missing
    assert not any(one.may_miss for one in make_contract(config, after, ProcessMesh.alone()).variables)


def test_units_that_are_written_otherwise_are_the_same(tmp_path):
    before = Store.open(make_store(tmp_path / "before", fields()))
    contract = make_contract(small_config(tmp_path, before.path, data=DATA), before, ProcessMesh.alone())
    contract.check(Store.open(make_store(tmp_path / "after", fields(), units={"heat": "K", "wind": "m s-1"})))


def test_a_run_goes_on_with_another_store_of_its_data_and_not_with_other_frames(tmp_path):
    values = fields()
    config = trained(tmp_path / "whole", make_store(tmp_path / "store", values))
    cut = trained(tmp_path / "cut", tmp_path / "store", training={"steps": 4, "warmup_steps": 1, "checkpoint_every": 2})
    shutil.rmtree(checkpoints_in(cut.run_dir)[-1].path)
    make_store(tmp_path / "store", dict(reversed(values.items())), frames_per_file=4)
    run_on_ranks(ONE, lambda mesh: train(cut, mesh))
    losses = [[record.loss for record in read_records(one.run_dir)] for one in (config, cut)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    data = cut.data.model_copy(update={"periods": PeriodsConfig(test="2003-03-05/")})
    longer = cut.model_copy(update={"data": data})
    shutil.rmtree(checkpoints_in(cut.run_dir)[-1].path)
    with pytest.raises(AssertionError, match=r"data\.periods\.test=\['2003-03-04T06/'\], this config says \['2003"):
        run_on_ranks(ONE, lambda mesh: train(longer, mesh))
    for field in values.values():
        field[-HELD_OUT:] *= 2  # of no concern
    values["wind"][5, 3, 4] += 50
    make_store(tmp_path / "store", values)
    told = r"trained on a 'wind' of mean, .* m s\*\*-1, the store \S+ has .* at the same dates.*another run_dir"
    with pytest.raises(AssertionError, match=told):
        run_on_ranks(Layout(1, 1, 2), lambda mesh: train(cut, mesh))


def test_a_run_a_checkpoint_and_an_export_give_the_same_network_and_its_domain(tmp_path):
    config = trained(tmp_path, make_store(tmp_path / "store", fields()))
    newest = checkpoints_in(config.run_dir)[-1]
    export(newest, tmp_path / "weights.safetensors")
    loaded = [load_network(path) for path in (config.run_dir, newest.path, str(tmp_path / "weights.safetensors"))]
    contract = loaded[0].contract
    with Store.open(config.data.store) as store:
        tile, starts = Tile((0, NLAT), (0, NLON)), np.arange(FRAMES - 3)
        windows = Windows(store, tile, channels=contract.channels, window=3, starts=starts, grid=contract.grid)
        batch = windows.read([2])
    outputs = []
    for one in loaded:
        assert one.step == 4 and one.contract == contract and not one.network.training
        assert one.network.checkpoint_steps == 0 and load_network(newest.path, kernels="compiled").step == 4
        given = batch.inputs_BTCYX, batch.year_fraction_BT
        outputs.append(one.network(*given, domain=one.domain()).tendency_BTCYX)
        with pytest.raises(InputError, match=r"boundaries pole, pole, periodic .*this domain has zero, zero, zero"):
            one.network(*given)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_what_holds_no_network_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name, told in (
        ("other.safetensors", r"other\.safetensors says nothing of what .*Export it again"),
        ("text.safetensors", r"text\.safetensors cannot be read .*a \.pt file holds the tensors alone"),
        ("nowhere", r"nowhere holds no checkpoints"),
    ):
        with pytest.raises(InputError, match=told):
            load_network(tmp_path / name)
