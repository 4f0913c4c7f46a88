"""On a GPU: what the CPU computes, from a layer to a run. Several ranks share one where NCCL lets them.

NCCL does from 2.30.7 on, told so by NCCL_MULTI_RANK_GPU_ENABLE=1; an older torch takes a newer one by LD_PRELOAD.
"""

import os

import numpy as np
import pytest
import torch

from faconv_hpc import Domain, FAConvLSTM2d, FAConvLSTMNetwork, LatLonGrid, ProcessMesh
from faconv_hpc.bench.result import BenchResult
from faconv_hpc.model.arithmetic import arithmetic
from faconv_hpc.model.attention import AxialAttention
from faconv_hpc.model.kernels import KERNEL_MODES
from faconv_hpc.training.checkpoint import checkpoints_in
from faconv_hpc.training.records import read_records
from runs import make_store, write_config
from test_cli import faconv
from test_domain import random_like
from test_parity import GRIDS, LAYERS, randomized, relative_difference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 5e-2}
SHARED = "NCCL_MULTI_RANK_GPU_ENABLE"
LAYOUTS = [(1, 1, 2), (1, 2, 1), (2, 1, 1), (1, 2, 2), (1, 3, 1)]
needs_several = pytest.mark.skipif(
    torch.cuda.device_count() < 4 and os.environ.get(SHARED) != "1",
    reason=f"needs four GPUs, or {SHARED}=1 and an NCCL that knows it",
)


def computed(run, module, x, grid, device, dtype):
    """Outputs and all gradients of a random function of them, back on the CPU in float64."""
    module, domain = module.to(device, dtype), Domain(grid, ProcessMesh.alone(device))
    wide = torch.promote_types(dtype, torch.float32)  # inputs are not rounded
    x = x.to(device, wide).requires_grad_()
    with arithmetic("fp32", torch.device(device)):
        return outcomes(run, module, x, domain)


def outcomes(run, module, x, domain):
    outputs = run(module, x, domain)
    weights = [random_like(output.shape, 50 + number).to(output) for number, output in enumerate(outputs)]
    objective = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    gradients = torch.autograd.grad(objective, [x, *module.parameters()], materialize_grads=True)
    return [value.detach().cpu().double() for value in (*outputs, *gradients)]


def root_mean_square(got, want):
    return ((got - want).square().mean().sqrt() / want.square().mean().sqrt()).item()


def agree(run, make, shape, grid, dtype):
    """Of one function on both devices; the reference is the CPU's in float64."""
    x = random_like(shape, 1)
    want = computed(run, make(), x, grid, "cpu", torch.float64)
    got = computed(run, make(), x, grid, "cuda", dtype)
    difference = root_mean_square if dtype == torch.bfloat16 else relative_difference
    differences = [difference(one, other) for one, other in zip(got, want, strict=True) if other.any()]
    assert max(differences) <= TOLERANCES[dtype], differences


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kernels", KERNEL_MODES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_that_of_the_cpu(layer, grid, kernels, dtype):
    def make():
        module = randomized(LAYERS[layer]())
        if isinstance(module, FAConvLSTM2d):
            module.kernels = kernels
        return module

    def run(module, x, domain):
        out, (h, c) = module(x, domain=domain)
        return out, h, c

    grid = GRIDS[grid]()
    agree(run, make, (2, 4, 3, grid.nlat, grid.nlon), grid, dtype)


def test_attention_over_long_lines_is_that_of_the_cpu():
    grid = LatLonGrid(181, 360, latitude_deg=np.linspace(90, -90, 181), lat_boundary="pole")
    agree(
        lambda module, x, domain: (module(x, domain),),
        lambda: randomized(AxialAttention(16, 2, reduction=2)),
        (1, 16, 181, 360), grid, torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", KERNEL_MODES)
def test_the_network_is_that_of_the_cpu(kernels, dtype):
    """At an odd size, with gradients of every weight; in bf16 as the engine runs it, within its rounding."""
    grid = LatLonGrid(37, 74, latitude_deg=np.linspace(90, -90, 37), lat_boundary="pole")

    def make():
        return FAConvLSTMNetwork(
            4, 3, 16, 2, attention_every=2, attention_heads=2, embedding_channels=16, coarse_shape=(2, 3),
            kernels=kernels,
        )  # fmt: skip

    def run(module, x, domain):
        season = random_like((2, 5), 4).sigmoid().to(x.device)
        output = module(x, season, domain=domain)
        return output.forecast_BTCYX, output.embedding_BTE

    agree(run, lambda: drawn(make()), (2, 5, 4, 37, 74), grid, dtype)


def drawn(module):
    """Weights as they are initialised, in float64: of random ones bf16 says little."""
    torch.manual_seed(5)
    for child in module.modules():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()
    return module.double()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("gpu") / "waves")


def trained(directory, store, layout=(1, 1, 1), *, device="cuda", kernels="eager", **training):
    """The losses of a run, from the command line."""
    mesh = dict(zip(("replicas", "lat", "lon"), layout, strict=True))
    training = {"micro_batch": 6 // layout[0], "learning_rate": 0.04, "steps": 8} | training
    config = write_config(directory, store, mesh=mesh, model={"kernels": kernels}, training=training)
    ranks = int(np.prod(layout))
    started = ["--ranks", ranks] if ranks > 1 else []
    finished = faconv("train", config, "--set", f"device={device}", *started)
    assert finished.returncode == 0, finished.stderr
    return [record.loss for record in read_records(directory / "run")]


@pytest.mark.parametrize("kernels", KERNEL_MODES)
@pytest.mark.parametrize("zero_stage", range(4))
def test_a_run_is_that_of_the_cpu(tmp_path, store, zero_stage, kernels):
    on_cpu = trained(tmp_path / "cpu", store, device="cpu", zero_stage=zero_stage)
    on_gpu = trained(tmp_path / "gpu", store, zero_stage=zero_stage, kernels=kernels)
    assert on_gpu[-1] < 0.95 * on_gpu[0]
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-4)


@pytest.mark.parametrize("kernels", KERNEL_MODES[1:])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_run_in_bf16_follows_that_in_fp32(tmp_path, store, zero_stage, kernels):
    whole = trained(tmp_path / "fp32", store, zero_stage=zero_stage)
    rounded = trained(tmp_path / "bf16", store, zero_stage=zero_stage, precision="bf16", kernels=kernels)
    np.testing.assert_allclose(rounded, whole, rtol=0.03)


def cut_back(run, step, away):
    """As a kill leaves it: no checkpoint beyond that step."""
    for checkpoint in checkpoints_in(run):
        if checkpoint.step > step:
            checkpoint.path.rename(away / checkpoint.path.name)
    assert checkpoints_in(run)[-1].step == step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_stopped_goes_on_as_if_it_had_not(tmp_path, store, precision):
    options = {"precision": precision, "checkpoint_every": 3, "zero_stage": 2}
    whole = trained(tmp_path, store, **options)
    cut_back(tmp_path / "run", 3, tmp_path)
    again = trained(tmp_path, store, **options)
    assert len(again) == 8
    np.testing.assert_allclose(again, whole, rtol=1e-6)


def test_evaluation_is_that_of_the_cpu(tmp_path, store):
    trained(tmp_path, store)
    tables = {}
    for device in ("cuda", "cpu"):
        finished = faconv("evaluate", tmp_path / "run", "--device", device)
        assert finished.returncode == 0, finished.stderr
        tables[device] = finished.stdout
    assert tables["cuda"] == tables["cpu"]


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_bench_tells_what_a_gpu_does(precision):
    sizes = ["--grid", "12x16", "--inputs", "3", "--hidden", "8", "--steps", "4", "--repeats", "5"]
    modes = [part for mode in KERNEL_MODES for part in ("--kernels", mode)]
    finished = faconv("bench", *sizes, *modes, "--precision", precision, "--json")
    assert finished.returncode == 0, finished.stderr
    result = BenchResult.model_validate_json(finished.stdout)
    assert (result.machine.kind, result.machine.device) == ("cuda", torch.cuda.get_device_name())
    assert all(row.peak_bytes > row.kept_bytes > 0 and 0 < row.product_share < 1 for row in result.rows)


@needs_several
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_cut_gives_the_same_result(tmp_path, store, ranks):
    """Over NCCL, of all layouts of so many ranks: outputs, gradients and the update."""
    finished = faconv("verify", write_config(tmp_path, store), "--ranks", ranks)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@needs_several
@pytest.mark.parametrize("zero_stage", range(4))
def test_runs_on_any_mesh_are_that_of_one_rank(tmp_path, store, zero_stage):
    want = trained(tmp_path / "one", store, zero_stage=zero_stage, clip_norm=0.1)
    for layout in LAYOUTS[zero_stage::2]:
        losses = trained(tmp_path / str(layout), store, layout, zero_stage=zero_stage, clip_norm=0.1)
        np.testing.assert_allclose(losses, want, rtol=1e-5, err_msg=str(layout))


@needs_several
def test_a_run_goes_on_upon_another_mesh(tmp_path, store):
    whole = trained(tmp_path, store, (1, 1, 2), checkpoint_every=4)
    cut_back(tmp_path / "run", 4, tmp_path)
    again = trained(tmp_path, store, (1, 2, 2), checkpoint_every=4)
    np.testing.assert_allclose(again, whole, rtol=1e-5)
