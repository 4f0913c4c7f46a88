"""What a machine without a GPU can tell of one: where tensors are made, what is waited for, which device is taken."""

import os
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from faconv_hpc import Domain, LatLonGrid, ProcessMesh
from faconv_hpc.data.store import Store
from faconv_hpc.errors import InputError
from faconv_hpc.model.arithmetic import arithmetic
from faconv_hpc.observe import Activity
from faconv_hpc.spatial import collectives, exchange
from faconv_hpc.spatial import mesh as mesh_module
from faconv_hpc.spatial.device import device_for
from faconv_hpc.spatial.environment import deepspeed_finds
from faconv_hpc.training.carried import CarriedStates
from faconv_hpc.training.engine import Engine, _check_accelerator
from faconv_hpc.training.optimizers import optimizer_of
from faconv_hpc.training.setup import Workspace, build_network, order_of
from faconv_hpc.training.trainer import Trainer, train
from ranks import Layout, run_on_ranks
from runs import make_store, small_config, write_config
from test_cli import faconv
from test_domain import random_like
from test_parity import LAYERS, randomized, relative_difference

COPIES = ("aten._to_copy", "aten.copy_", "aten.lift_fresh", "aten.detach", "aten.clone")
WAITS = {"item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__", "__index__", "nonzero"}
"""What makes a processor wait for the device that a tensor is on."""
ALL = {"training": {"accumulation": 2, "rollout": {0: 2}, "lead_weights": [0.5], "stateful_windows": 2, "ema": 0.9}}
"""What makes a step longer, together."""
DATA = {"window": 4, "periods": {}}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("device") / "waves", frames=60)


# Which device


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_the_ranks_of_a_node_are_dealt_its_gpus(two_gpus):
    assert [str(device_for("auto", rank)) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert device_for("cuda", 3) == torch.device("cuda:1") and device_for("cpu", 3) == torch.device("cpu")


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_for("auto", 1) == torch.device("cpu")
    with pytest.raises(InputError, match=r"device is cuda, and torch .* no GPU on .*give device auto or cpu"):
        device_for("cuda")
    with pytest.raises(InputError, match=r"device='gpu' is not known. Use one of auto, cpu, cuda"):
        device_for("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_told_before_any_rank_is_started(tmp_path, store):
    finished = faconv("train", write_config(tmp_path, store, mesh={"lon": 2}), "--ranks", 2, "--set", "device=cuda")
    assert finished.returncode == 2 and finished.stderr.count("device is cuda, and torch") == 1
    assert not (tmp_path / "run").exists()


def test_deepspeed_takes_the_meshs_device(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with deepspeed_finds("cpu", None):
        assert (os.environ["DS_ACCELERATOR"], os.environ["LOCAL_RANK"]) == ("cpu", "3")
    with deepspeed_finds("cuda", 1):
        assert (os.environ["DS_ACCELERATOR"], os.environ["LOCAL_RANK"]) == ("cuda", "1")
    assert os.environ["LOCAL_RANK"] == "3"
    with pytest.raises(InputError, match=r"DeepSpeed computes on cuda in this process, this mesh on cpu"):
        _check_accelerator("cuda", "cpu")


def test_scatter_brings_a_field_to_the_meshs_device():
    tile = Domain(LatLonGrid(4, 6), ProcessMesh.alone("meta")).scatter(torch.zeros(2, 4, 6))
    assert tile.device.type == "meta" and tile.shape == (2, 4, 6)


@pytest.mark.parametrize(("precision", "kind", "rounds"), [
    ("tf32", "cuda", True), ("tf32", "cpu", False), ("fp32", "cuda", False), ("bf16", "cuda", False),
])  # fmt: skip
def test_products_and_convolutions_are_made_in_one_arithmetic(precision, kind, rounds):
    def settings():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before = settings()
    with pytest.raises(KeyError), arithmetic(precision, torch.device(kind)):
        assert settings() == (rounds, rounds)
        raise KeyError
    assert settings() == before == (False, True)  # torch's own, which differ


def test_messages_through_host_memory_come_back(monkeypatch):
    """As on GPUs whose ranks talk by Gloo: what is sent and received lies elsewhere than what is computed with."""

    def check(mesh, name):
        grid = LatLonGrid(9, 14, lat_boundary="pole")
        domain, x = Domain(grid, mesh), random_like((2, 3, 3, 9, 14), 1)
        layer = randomized(LAYERS[name]())
        copies = Counter()

        def elsewhere(value, group):
            copies[group is None] += 1
            return value.clone()

        with pytest.MonkeyPatch.context() as patch:
            for module in (collectives, exchange, mesh_module):
                patch.setattr(module, "carried", elsewhere)
            given = domain.scatter(x).clone().requires_grad_()
            out = layer(given, domain=domain)[0]
            (grad,) = torch.autograd.grad(domain.total(out.square().sum()), given)
            got = domain.assemble(out.detach()), domain.assemble(grad)
        whole = x.clone().requires_grad_()
        want = layer(whole, domain=Domain(grid))[0]
        wanted = want.detach(), torch.autograd.grad(want.square().sum(), whole)[0]
        return copies[False], max(map(relative_difference, got, wanted))

    for name in ("gather, few channels", "concat, swap"):
        for copies, difference in run_on_ranks(Layout(1, 2, 1), check, name):
            assert copies > 10 and difference < 1e-12


# Where tensors are made, and what is waited for


class Elsewhere(TorchDispatchMode):
    """Notes operations that take or make a tensor that is not on `meta`, but for those that may copy one there."""

    def __init__(self, may=()):
        super().__init__()
        self.may, self.found = may, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, torch.Tensor)]
        if any(one.device.type != "meta" for one in tensors) and not str(func).startswith(self.may):
            self.found[str(func)] += 1
        return result


class MetaEngine:
    """What a trainer asks of an engine, by torch alone: DeepSpeed does not know `meta`."""

    def __init__(self, network, training):
        self.network, self.gradient_norm = network, torch.zeros((), device="meta")
        self.optimizer = optimizer_of(network, training)

    def forward(self, inputs, season, domain, **further):
        return self.network(inputs, season, domain=domain, **further)

    def backward(self, loss):
        loss.objective.backward()

    def step(self):
        self.gradient_norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.mark.every(2, "model", "precision")
@pytest.mark.parametrize("model", [
    {}, {"checkpoint_steps": 2, "fuse": "concat"}, {"cell": "convlstm", "kernel_size": 3},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_makes_every_tensor_on_its_device(tmp_path, store, model, precision):
    """The first one copies constants there, the others nothing: a copy of what is not pinned is waited for, too."""
    config = small_config(tmp_path, store, model=model, data=DATA | {"loss_weights": {"wave_0": 2.0}}, **ALL)
    mesh = ProcessMesh.alone("meta")
    workspace = Workspace.of(config, Store.open(store), mesh)
    windows, network = workspace.training_windows(), build_network(config, workspace.contract.channels)
    engine = MetaEngine(network.to("meta", torch.bfloat16 if precision == "bf16" else None), config.training)
    carried = CarriedStates(config, workspace.domain, order_of(config, windows))
    trainer = SimpleNamespace(
        _engine=engine, _domain=workspace.domain, _activity=Activity(), _config=config, _carried=carried, _mesh=mesh
    )
    trainer._forward = partial(Trainer._forward, trainer)
    batches = [windows.read([number]).to("meta") for number in range(2)]
    for step, may in enumerate([COPIES, ()]):
        with Elsewhere(may) as elsewhere:
            micros = [Trainer._backward(trainer, one, carried.before(step, micro)) for micro, one in enumerate(batches)]
        assert not elsewhere.found, f"step {step}"
        engine.step()
        carried.end_step(applied=True)
        assert all(one.device.type == "meta" for micro in micros for one in (micro.losses, micro.unsound_BC))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta tensor"):  # the one thing that is waited for
        Trainer._found(trainer, micros, 0.0)


class Waits(TorchFunctionMode):
    """Counts them, by who asks."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in WAITS:
            self.found[_asker()] += 1
        return func(*args, **(kwargs or {}))


def _asker():
    import sys

    frame = sys._getframe(2)
    return next(name for name in ("deepspeed", "torch", "faconv_hpc", "test") if name in frame.f_code.co_filename)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16")])
def test_a_step_waits_for_the_device_once(tmp_path, store, stage, precision):
    """DeepSpeed asks three times at most, all in its update; torch's Adam counts in host memory."""
    training = ALL["training"] | {"zero_stage": stage, "precision": precision, "on_not_finite": "skip", "steps": 3}
    config = small_config(tmp_path, store, mesh={"replicas": 2}, data=DATA, training=training)

    def check(mesh):
        found, step, gathered, updates = [], Trainer._step, ProcessMesh.gathered, Engine.updates.fget

        def counted(self, number):
            with Waits() as waits:
                answer = step(self, number)
            found.append(waits.found)
            return answer

        def of_the_host(call, *given):
            with torch._C.DisableTorchFunction():
                return call(*given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "_step", counted)
            patch.setattr(ProcessMesh, "gathered", lambda *given: of_the_host(gathered, *given))
            patch.setattr(Engine, "updates", property(lambda engine: of_the_host(updates, engine)))
            train(config, mesh)
        return found

    for found in run_on_ranks(Layout(2, 1, 1), check):
        assert len(found) == 3
        for step in found:
            assert step["faconv_hpc"] == 1 and step["deepspeed"] <= 3
