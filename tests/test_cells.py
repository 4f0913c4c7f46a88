"""Every cell that a config can name, and the frames before: on tiles, in pieces, in free runs, through all verbs."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

import forecasts
from faconv_hpc import Domain, FAConvLSTMNetwork, Forecaster, LatLonGrid, ProcessMesh, harmonics
from faconv_hpc.config import MeshConfig, ModelConfig
from faconv_hpc.data.variables import Channels, Variable
from faconv_hpc.errors import InputError
from faconv_hpc.model import rules
from faconv_hpc.model.cells import CELLS
from faconv_hpc.model.feedback import Feedback
from faconv_hpc.model.history import History
from faconv_hpc.model.memoryless import DepthwiseMixer2d, Linear2d
from faconv_hpc.model.rules import MEMORYLESS, ON_THE_SPHERE
from faconv_hpc.model.state import NetworkState
from faconv_hpc.training.export import export
from faconv_hpc.training.fit import check_fits, reach_of
from faconv_hpc.training.loading import check_tiles
from faconv_hpc.training.parity import verify_parity
from faconv_hpc.training.setup import network_options
from faconv_hpc.training.shards import newest_at
from faconv_hpc.training.start_from import Beginning
from faconv_hpc.training.trainer import train
from ranks import Layout, run_on_ranks
from runs import evaluated, make_store, small_config
from test_domain import random_like
from test_parity import randomized, relative_difference

ONE = Layout(1, 1, 1)
GRID = LatLonGrid(11, 14, lat_boundary="pole")
PLANE = (GRID.nlat, GRID.nlon)
PLANAR = [cell for cell in CELLS if cell not in ON_THE_SPHERE]
OTHERS = [cell for cell in PLANAR if cell != "faconvlstm"]
INPUTS, FIELDS, HISTORY, PAST = 4, 2, 3, 3
FREE = Feedback(window=1, step=(0.3, 1.7), fresh=(None, None), forcings=FIELDS)
HELD = torch.tensor([[True, True, True], [True, False, False]])


def network_of(cell, history=HISTORY, layers=2, **options):
    """Its weights are random; of the frames before it sees all inputs but one."""
    options |= {"attention_every": 2} if cell == "faconvlstm" else {}
    options |= {"past_channels": PAST} if history > 1 else {}
    options |= {"kernel_size": 3} if cell == "depthwise" else {}
    return randomized(FAConvLSTMNetwork(INPUTS, FIELDS, 8, layers, cell=cell, embedding_channels=16,
                                        coarse_shape=(2, 3), history=history, **options))  # fmt: skip


def quantities(cell, domain, checkpoint_steps):
    """One sequence in two pieces, of samples of different length in the first, running freely in the second.

    Cell tensors are this tile's; gradients of parameters are this tile's part.
    """
    network = network_of(cell, checkpoint_steps=checkpoint_steps)
    x = domain.scatter(random_like((2, 6, INPUTS, *PLANE), 1)).clone().requires_grad_()
    target, season = domain.scatter(random_like((2, 6, FIELDS, *PLANE), 2)), random_like((2, 6), 3).sigmoid()
    first = network(x[:, :3], season[:, :3], domain=domain, valid_BT=HELD)
    second = network(x[:, 3:], season[:, 3:], domain=domain, state=first.state, first_step=3, feedback=FREE)
    pairs = [network.losses(one, x[:, part], target[:, part], domain).total
             for one, part in ((first, slice(3)), (second, slice(3, 6)))]  # fmt: skip
    objective, named = sum(one.objective for one in pairs), dict(network.named_parameters())
    gradients = torch.autograd.grad(objective / domain.tiles, [x, *named.values()])
    cells = {"first": first.forecast_BTCYX, "second": second.forecast_BTCYX, "input gradient": gradients[0]}
    states = second.state.tensors()
    cells |= {name: one for name, one in states.items() if not name.startswith("past/")}
    whole = {"loss": sum(one.value for one in pairs), "embedding": second.embedding_BTE}
    return cells, whole, dict(zip(named, gradients[1:], strict=True))


@cache
def one_tile(cell):
    """The reference, of this process."""
    return quantities(cell, Domain(GRID), 0)


def differences(mesh, cell, reference):
    """What differs from one tile by more than rounding; activations are computed again on some."""
    domain = Domain(GRID, mesh)
    cells, whole, parts = quantities(cell, domain, 2 * (mesh.ranks > 1))
    got = {name: domain.assemble(one.detach()) for name, one in cells.items()} | whole
    got |= {name: domain.total(one) for name, one in parts.items()}
    want = {name: one for values in reference for name, one in values.items()}
    assert got.keys() == want.keys()
    return {name: found for name in want if not (found := relative_difference(got[name], want[name])) < 1e-11}


@pytest.mark.parametrize("layout", [Layout(1, 2, 2), Layout(1, 1, 3)], ids=str)
@pytest.mark.parametrize("cell", PLANAR)
@pytest.mark.every(2, "layout", "cell")
def test_a_network_on_tiles_equals_one_tile(layout, cell):
    cells, whole, parts = one_tile(cell)
    reference = [{name: one.detach() for name, one in values.items()} for values in (cells, whole, parts)]
    assert all(one.abs().max() > 1e-9 for values in reference for one in values.values())  # a zero proves nothing
    assert not any(run_on_ranks(layout, differences, cell, reference))


@pytest.mark.parametrize("cell", OTHERS)
def test_a_sequence_in_pieces_equals_the_whole(cell):
    """Pieces shorter than the history, through the state as checkpoints keep it."""
    network, x, season = network_of(cell), random_like((2, 6, INPUTS, *PLANE), 0), random_like((2, 6), 1).sigmoid()
    whole, state, parts = network(x, season), None, []
    for first, stop in ((0, 1), (1, 3), (3, 6)):
        part = network(x[:, first:stop], season[:, first:stop], state=state, first_step=first)
        state = NetworkState.of(part.state.tensors())
        parts.append(part)
    for name in ("forecast_BTCYX", "embedding_BTE"):
        joined = torch.cat([getattr(one, name) for one in parts], dim=1)
        torch.testing.assert_close(joined, getattr(whole, name), rtol=1e-12, atol=1e-12)
    for name, one in whole.state.tensors().items():
        torch.testing.assert_close(state.tensors()[name], one, rtol=1e-12, atol=1e-12)
    assert (whole.state.layers == ()) == (cell in MEMORYLESS)


def test_layers_see_the_frames_before():
    """By hand: of sample 1 the first step is not valid, nor the third, so that they are in no past."""
    x, valid = random_like((2, 5, INPUTS, 2, 3), 0), torch.tensor([[True] * 5, [False, True, False, True, True]])
    seen, (frames, there) = History(HISTORY, PAST)(x, None, valid)
    want = {0: [(0, 0, 0), (1, 0, 0), (2, 1, 0), (3, 2, 1), (4, 3, 2)], 1: [(1, 1, 1), (3, 1, 1), (4, 3, 1)]}
    for sample, ages in want.items():
        for now, *before in ages:
            past = [x[sample, step, :PAST] for step in before]
            assert torch.equal(seen[sample, now], torch.cat([x[sample, now], *past])), (sample, now)
    assert torch.equal(frames, torch.stack([x[0, [4, 3], :PAST], x[1, [4, 3], :PAST]]).flatten(1, 2)) and there.all()
    same, state = History(1, INPUTS)(x)
    assert same is x and state == ()


def test_a_sample_that_follows_none_begins_with_its_own_first_frame():
    """As carried states have it: zeros where nothing was."""
    history, x = History(HISTORY, PAST), random_like((2, 3, INPUTS, 2, 3), 0)
    _, state = history(random_like((2, 4, INPUTS, 2, 3), 1))
    mixed = tuple(torch.cat([one[:1], torch.zeros_like(one[1:])]) for one in state)
    seen, _ = history(x, mixed)
    assert torch.equal(seen[:1], history(x[:1], tuple(one[:1] for one in state))[0])
    assert torch.equal(seen[1:], history(x[1:])[0])


def test_a_free_run_has_its_own_forecasts_beside_it():
    """What is forecast step by step equals what the network says to the sequence of its own frames."""
    network, x = network_of("linear"), random_like((1, 6, INPUTS, *PLANE), 0)
    season = random_like((1, 6), 1).sigmoid()
    feedback = Feedback(window=3, step=(0.3, 1.7), fresh=(None, None), forcings=FIELDS)
    free, frames = network(x, season, feedback=feedback), x.clone()
    changes = free.tendency_BTCYX[:, 2:].cumsum(1) * torch.tensor(feedback.step, dtype=torch.float64)[:, None, None]
    frames[:, 3:, :FIELDS] = frames[:, 2:3, :FIELDS] + changes[:, :-1]
    torch.testing.assert_close(network(frames, season).forecast_BTCYX, free.forecast_BTCYX, rtol=1e-11, atol=1e-12)


def test_fields_and_where_they_are_known_are_remembered():
    """Not what has no time, nor what follows from it: they are the last of the inputs."""
    numbers = {"units": "", "mean": 0.0, "std": 1.0, "tendency_std": 1.0}
    roles = {"height": "static", "sst": "forcing", "rain": "diagnostic", "t": "prognostic"}
    variables = [Variable(name=name, role=role, may_miss=role == "forcing", **numbers) for name, role in roles.items()]
    channels = Channels(variables, ["insolation"])
    assert channels.inputs[: channels.remembered] == ("t", "sst", "fresh_sst")
    options = network_options(ModelConfig(history=3, cell="linear"), channels)
    network = FAConvLSTMNetwork(**options)
    assert network.layers[0].in_channels == 5 + 2 * 3 == network.forecast.from_inputs.in_channels
    assert not {"history", "past_channels"} & network_options(ModelConfig(), channels).keys()


@torch.no_grad()
def test_a_mixer_follows_its_equations():
    layer, x = randomized(DepthwiseMixer2d(3, 5, 3, (1, 2))), random_like((1, 1, 3, 6, 7), 0)
    y = torch.einsum("oi,iyx->oyx", layer.input_weight[:, :, 0, 0], x[0, 0]) + layer.input_bias[:, None, None]
    for block, dilation in zip(layer.blocks, (1, 2), strict=True):
        padded, mixed = functional.pad(y, [dilation] * 4), torch.zeros_like(y)
        for i in range(3):
            for j in range(3):
                rows, columns = slice(i * dilation, i * dilation + 6), slice(j * dilation, j * dilation + 7)
                mixed += block.depthwise[:, 0, i, j, None, None] * padded[:, rows, columns]
        mixed += block.depthwise_bias[:, None, None]
        normed = (mixed - mixed.mean(0)) / (mixed.var(0, correction=0) + block.norm.eps).sqrt()
        normed = normed * block.norm.weight[:, None, None] + block.norm.bias[:, None, None]
        y = y + torch.einsum("oi,iyx->oyx", block.weight[:, :, 0, 0], normed * normed.sigmoid())
        y = y + block.bias[:, None, None]
    out, state = layer(x)
    torch.testing.assert_close(out[0, 0], y, rtol=1e-12, atol=1e-12)
    assert state == ()


def test_a_linear_network_is_linear():
    network, season = network_of("linear", layers=1), torch.zeros(1, 4)
    one, other = (random_like((1, 4, INPUTS, *PLANE), seed) for seed in (0, 1))
    said = [network(x, season).forecast_BTCYX for x in (one, other, one + 2 * other, torch.zeros_like(one))]
    torch.testing.assert_close(said[2] - said[3], said[0] - said[3] + 2 * (said[1] - said[3]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cell", OTHERS)
def test_a_cell_learns_a_small_thing(cell):
    """A wave that moves by a column in a step: to less than a twentieth of the square of what persistence is off by.

    Of the last step, as one of the cells knows of its neighbours by its state alone.
    """
    torch.manual_seed(0)
    network = FAConvLSTMNetwork(1, 1, 8, 1, cell=cell, embedding_channels=16, coarse_shape=(2, 3), embedding_weight=0.0)
    angle = torch.arange(14) * 2 * torch.pi / 14 - torch.arange(4)[:, None] * 2 * torch.pi / 14
    wave = angle.sin()[None, :, None, None].expand(1, 4, 1, 4, 14)
    domain, season = Domain(LatLonGrid(4, 14, lat_boundary="replicate")), torch.zeros(1, 3)
    x, target = wave[:, :3], wave.diff(dim=1) / wave.diff(dim=1).square().mean().sqrt()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    for _ in range(50):
        optimizer.zero_grad()
        output = network(x, season, domain=domain)
        network.losses(output, x, target, domain).total.objective.backward()
        optimizer.step()
    assert (output.forecast_BTCYX - target)[:, -1].square().mean() < 0.05


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "waves", frames=40)


def config_of(directory, store, cell, **sections):
    model = {"cell": cell, "history": 2, "kernel_size": 3} | sections.pop("model", {})
    data = {"periods": {"test": "2000-01-09/"}} | sections.pop("data", {})
    training = {"steps": 3, "warmup_steps": 1, "rollout": {1: 2}} | sections.pop("training", {})
    return small_config(directory, store, model=model, data=data, training=training, **sections)


def trained_and_used(mesh, config, file):
    """A run, its export, a forecast and an embedding by both, and what its forecasts are worth."""
    train(config, mesh)
    export(newest_at(config.run_dir), file)
    skills = evaluated(config, mesh, 2).skills
    of_run, of_file = (Forecaster.load(path, device="cpu") for path in (config.run_dir, file))
    window = random_like((1, 3, len(of_run.contract.channels.inputs), *PLANE), 0).float()
    said = [one.network(window, torch.zeros(1, 3), domain=one.domain) for one in (of_run, of_file)]
    torch.testing.assert_close(said[0].forecast_BTCYX, said[1].forecast_BTCYX, rtol=0, atol=0)
    assert said[0].forecast_BTCYX.abs().max() > 1e-6
    return [one.rmse for one in skills]


@pytest.mark.parametrize("cell", OTHERS)
@pytest.mark.every(2)
def test_a_cell_goes_through_all_verbs(tmp_path, store, cell):
    config = config_of(tmp_path, store, cell, training={"stateful_windows": 2})
    (skills,) = run_on_ranks(ONE, trained_and_used, config, tmp_path / "weights.safetensors")
    assert len(skills) == 4 and np.isfinite(skills).all()


def test_verify_says_that_tiles_equal_one_tile(tmp_path, store):
    config = config_of(tmp_path, store, "depthwise", data={"window": 3}, training={"zero_stage": 3})
    rows = run_on_ranks(Layout(1, 1, 2), lambda mesh: verify_parity(config, mesh))[0]
    assert all(row.passed for row in rows) and any(row.quantity.startswith("update") for row in rows)


def test_states_with_a_history_are_carried_on_and_resumed(tmp_path, store):
    """The weights of a run that did not stop and was on one tile, from the states that the checkpoint of step 2 has."""
    training = {"steps": 4, "stateful_windows": 3, "checkpoint_every": 2, "rollout": {}}
    whole, stopped = (config_of(tmp_path / name, store, "faconvlstm", data={"window": 4}, training=training)
                      for name in ("whole", "stopped"))  # fmt: skip
    run_on_ranks(ONE, lambda mesh: train(whole, mesh))
    run_on_ranks(Layout(1, 1, 2), lambda mesh: train(stopped, mesh))
    newest_at(stopped.run_dir).path.rename(tmp_path / "away")
    pieces = newest_at(stopped.run_dir).manifest().states
    assert pieces, "no sample follows another after step 2"
    run_on_ranks(Layout(1, 2, 1), lambda mesh: train(stopped, mesh))
    want, got = (Beginning.of(one.run_dir).weights for one in (whole, stopped))
    for name, one in want.items():
        torch.testing.assert_close(got[name], one, rtol=2e-4, atol=2e-6)


def test_a_run_with_a_history_begins_with_weights_of_one_without(tmp_path, store):
    """The frames before count for nothing at first, and what has no other factor is drawn."""
    for cell in ("bottleneck", "depthwise"):
        first = config_of(tmp_path / cell, store, cell, model={"history": 1}, training={"rollout": {}})
        run_on_ranks(ONE, lambda mesh, config: train(config, mesh), first)
        begun = config_of(
            tmp_path / cell / "then",
            store,
            cell,
            training={
                "steps": 1,
                "warmup_steps": 0,
                "learning_rate": 1e-12,
                "rollout": {},
                "start_from": str(first.run_dir),
            },
        )
        run_on_ranks(ONE, lambda mesh, config: train(config, mesh), begun)
        old, new = (Forecaster.load(one.run_dir, device="cpu").network for one in (first, begun))
        x = random_like((1, 3, old.layers[0].in_channels, *PLANE), 0).float()
        said = [one(x, torch.zeros(1, 3), domain=Domain(GRID)).forecast_BTCYX for one in (old, new)]
        torch.testing.assert_close(*said, rtol=1e-4, atol=1e-6)
        assert said[0].abs().max() > 1e-4
        if cell == "bottleneck":
            assert new.layers[0].input_depthwise.abs().amax((1, 2, 3)).min() > 0


def test_what_a_beginning_loses_of_its_history_is_told():
    options = {"cell": "linear", "history": 3, "hidden_channels": 8}
    told = list(Beginning(Path("runs/first"), 9, options, None, {})._built_otherwise(ModelConfig(cell="linear")))
    assert len(told) == 1 and "model.history=3" in told[0] and "model.hidden_channels=8" in told[0]
    kept = Beginning(Path("runs/first"), 9, {"cell": "linear"}, None, {})
    assert not list(kept._built_otherwise(ModelConfig(cell="linear", history=3)))


def test_an_operator_on_the_sphere_begins_with_the_same_inputs_alone():
    inputs = [("a",), ("b",)]
    for cell in (*ON_THE_SPHERE, "linear"):
        begun = Beginning(Path("runs/first"), 9, {"cell": cell}, None, {})
        begun._check_operator((inputs, inputs))
        if cell == "linear":
            begun._check_operator((inputs, inputs[::-1]))
        else:
            with pytest.raises(
                InputError, match=rf"cell={cell} .*same order only; it has a, b, this config gives b, a"
            ):
                begun._check_operator((inputs, inputs[::-1]))


@pytest.mark.parametrize("sizes", [{"history": 0}, {"history": 2, "past_channels": 4}])
def test_a_history_that_cannot_be_is_refused(sizes):
    with pytest.raises(InputError, match=r"history=[02] frames with past_channels=[34].*in_channels=3"):
        FAConvLSTMNetwork(3, 2, 8, cell="linear", **sizes)


@pytest.fixture(scope="module")
def globe(tmp_path_factory):
    """A store with both poles among its rows."""
    data = forecasts.dataset().assign_coords(latitude=np.linspace(90, -90, 11))
    return forecasts.make_store(tmp_path_factory.mktemp("globe"), data)


def on_globe(directory, globe, cell, **sections):
    return small_config(directory, globe, data=forecasts.DATA, model={"cell": cell, "history": 2}, **sections)


@pytest.mark.parametrize("cell", ON_THE_SPHERE)
def test_an_operator_on_the_sphere_goes_through_all_verbs(tmp_path, globe, cell):
    """On two replicas with sharded gradients or parameters; skipped where its package, which is no extra, is not."""
    pytest.importorskip("torch_harmonics", reason="pip install --no-deps torch-harmonics==0.9.3")
    training = {
        "steps": 3,
        "warmup_steps": 1,
        "zero_stage": {"sfno": 3, "lsno": 2}[cell],
        "ema": 0.5,
        "rollout": {1: 2},
    }
    config, file = on_globe(tmp_path, globe, cell, mesh={"replicas": 2}, training=training), tmp_path / "w.safetensors"
    assert run_on_ranks(Layout(2, 1, 1), lambda mesh: train(config, mesh)) == [0, 0]
    export(newest_at(config.run_dir), file)
    of_run, of_file = (Forecaster.load(path, device="cpu") for path in (config.run_dir, file))
    assert all(one.dtype == torch.float32 for one in of_file.network.state_dict().values())
    x, season = random_like((1, 3, len(of_run.contract.channels.inputs), *PLANE), 0).float(), torch.zeros(1, 3)
    said = [one.network(x, season, domain=one.domain).forecast_BTCYX for one in (of_run, of_file)]
    assert torch.equal(*said) and said[0].abs().max() > 1e-6
    turned = of_run.network(x.roll(5, dims=-1), season, domain=of_run.domain).forecast_BTCYX
    assert relative_difference(turned, said[0].roll(5, dims=-1)) < 1e-3  # a rotation of the globe rotates it
    skills = evaluated(config, ProcessMesh.alone(), 2).skills
    assert all(np.isfinite(one.rmse) for one in skills)
    with pytest.raises(InputError, match=r"is bound to the 11 x 14 cells that it was made for, these are 11 x 16"):
        of_run.network(torch.zeros(1, 1, x.shape[2], 11, 16), season[:, :1], domain=Domain(LatLonGrid(
            11, 16, latitude_deg=np.linspace(90, -90, 11), lat_boundary="pole")))  # fmt: skip


def test_where_no_operator_on_the_sphere_can_be_it_is_refused(tmp_path, store, globe, monkeypatch):
    """Before a rank starts, whether the package is there or not."""
    for cell in ON_THE_SPHERE:
        with monkeypatch.context() as there:
            there.setattr(harmonics, "find_spec", lambda name: name)
            check_fits(on_globe(tmp_path, globe, cell, mesh={"replicas": 2}))
            with pytest.raises(
                InputError, match=rf"{cell} transforms .*precision=bf16 would round .* Use fp32 or tf32."
            ):
                check_fits(on_globe(tmp_path, globe, cell, training={"precision": "bf16"}))
            with pytest.raises(
                InputError, match=r"whole latitude circles and meridians, and 2 tiles share the grid. Use"
            ):
                check_fits(on_globe(tmp_path, globe, cell, mesh={"lon": 2}))
            with pytest.raises(
                InputError, match=rf"{cell} needs rows at equal distances .* has 11 rows from 81.8182 to"
            ):
                check_fits(config_of(tmp_path, store, cell))
            there.setattr(harmonics, "find_spec", lambda name: None)
            missing = r"torch-harmonics, which is not installed. Install it \(`pip install"
            with pytest.raises(InputError, match=missing):
                check_fits(on_globe(tmp_path, globe, cell))
            with pytest.raises(InputError, match=missing):  # as a network that was trained elsewhere is loaded
                FAConvLSTMNetwork(2, 1, 8, cell=cell, globe=(11, 14, "equiangular"))
        about = {"network": json.dumps({"cell": cell})}
        with pytest.raises(InputError, match=r"and 4 tiles share the grid. Use one tile .*--mesh 1x1"):
            check_tiles(about, MeshConfig.parse("3x2x2"))
        check_tiles(about, MeshConfig.parse("3x1x1"))
    gauss = np.rad2deg(np.arcsin(np.polynomial.legendre.leggauss(12)[0][::-1]))
    monkeypatch.setattr(harmonics, "find_spec", lambda name: name)
    assert rules.globe_of("sfno", LatLonGrid(12, 24, latitude_deg=gauss)) == (12, 24, "legendre-gauss")
    with pytest.raises(InputError, match=r"north first.*has 12 rows from -"):
        rules.globe_of("sfno", LatLonGrid(12, 24, latitude_deg=gauss[::-1]))
    with pytest.raises(InputError, match=r"11 rows from 90 to -90 degrees, zero along them"):
        rules.globe_of("lsno", LatLonGrid(11, 5, latitude_deg=np.linspace(90, -90, 11), lon_boundary="zero"))


@pytest.mark.parametrize("cell", ON_THE_SPHERE)
def test_a_scale_that_leaves_an_operator_no_grid_is_refused_before_a_rank_starts(tmp_path, globe, cell, monkeypatch):
    monkeypatch.setattr(harmonics, "find_spec", lambda name: name)

    def scaled(scale):
        return small_config(tmp_path, globe, data=forecasts.DATA, model={"cell": cell, "scale_factor": scale})

    check_fits(scaled(7))
    with pytest.raises(
        InputError,
        match=rf"model.scale_factor=8 leaves model.cell={cell} 2 rows and 1 columns of a grid of 11 x 14 cells, and it "
        rf"needs two rows and two columns at least.*Use 7 or less",
    ):
        check_fits(scaled(8))
    if cell == "lsno":
        with pytest.raises(InputError, match=r"4 columns .* whose number divides theirs. Use 2 or less that does\."):
            check_fits(scaled(3))
    else:
        check_fits(scaled(3))
    with pytest.raises(
        InputError, match=r"leaves model.cell=.* 1 rows and 4 columns of a grid of 1 x 4 .* another cell"
    ):
        rules.check_scale(cell, 1, 1, 4)


@pytest.mark.parametrize("cell", ON_THE_SPHERE)
def test_an_operator_runs_at_every_scale_that_is_not_refused(cell):
    pytest.importorskip("torch_harmonics", reason="pip install --no-deps torch-harmonics==0.9.3")
    taken = []
    for scale in range(1, 16):
        try:
            rules.check_scale(cell, scale, 7, 14)
        except InputError:
            continue
        operator = CELLS[cell](cell, 2, 4, 2, globe=(7, 14, "equiangular"), scale_factor=scale)
        h_BTCYX, _ = operator(random_like((1, 2, 2, 7, 14), 0).float())
        h_BTCYX.square().mean().backward()
        assert h_BTCYX.shape == (1, 2, 4, 7, 14) and h_BTCYX.std() > 1e-6
        assert all(one.grad.isfinite().all() for one in operator.parameters())
        taken.append(scale)
    assert taken == {"sfno": [1, 2, 3, 4, 5, 6], "lsno": [1, 2, 5, 6]}[cell]


def test_what_no_cell_can_be_is_refused(tmp_path, store):
    with pytest.raises(InputError, match=r"cell='lstm' is not known. Use one of faconvlstm, convlstm, bottleneck"):
        FAConvLSTMNetwork(2, 1, 8, cell="lstm")
    with pytest.raises(InputError, match=r"model.history=4 is more than the 3 steps of a window.*or use a longer"):
        config_of(tmp_path, store, "linear", model={"history": 4})
    for cell in ("bottleneck", "linear", "depthwise"):
        with pytest.raises(InputError, match=r"kernel_size=4 has no centre"):
            check_fits(config_of(tmp_path, store, cell, model={"kernel_size": 4}))
    with pytest.raises(InputError, match=r"dilations=\(\) must be one or more positive numbers"):
        check_fits(config_of(tmp_path, store, "depthwise", model={"dilations": []}))
    with pytest.raises(InputError, match=r"a halo of 12 rows beyond the pole reaches past"):
        check_fits(config_of(tmp_path, store, "depthwise", model={"kernel_size": 7}))
    for cell, reach in (("depthwise", 4), ("bottleneck", 1), ("faconvlstm", 4), ("linear", 1)):
        assert reach_of(config_of(tmp_path, store, cell).model) == reach, cell
    assert Linear2d(3, 4, 5).reach == 2
