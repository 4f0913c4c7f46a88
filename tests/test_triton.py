"""The Triton kernels of a GPU without one: in Triton's interpreter, compiled for two GPUs, and how they are chosen."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import forks
from faconv_hpc.errors import InputError
from faconv_hpc.model.arithmetic import arithmetic
from faconv_hpc.model.kernels import Kernels, kernels_for, kernels_named
from faconv_hpc.model.taps import Gates, Mixing, Taps

triton = pytest.importorskip("triton")

INTERPRETED = Path(__file__).with_name("interpreted.py")
CASES = (
    "float32 sum", "float32 concat", "float32 one cell", "bfloat16 sum", "bfloat16 concat", "float32 layer",
    "float32 layer, concat, no attention", "bfloat16 layer",
)  # fmt: skip
ALLOWED = {"float32": (2.0, 3e-7), "bfloat16": (1.5, 2e-3)}
"""How far kernels may be from float64: so many times as far as eager passes of their type, and so much."""
KINDS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
ACTIVATIONS = {"h", "padded", "expansion", "grad_h", "grad_mixed", "grad", "into"}
STEP = ("advance", "retreat", "retreat_weights")


@pytest.fixture(scope="module")
def interpreted():
    """What tests/interpreted.py prints; once."""
    ran = forks.run([sys.executable, str(INTERPRETED)], timeout=600)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told.keys() == {*CASES, "ends", "frozen"}
    return told


@pytest.mark.parametrize("case", CASES)
def test_kernels_are_as_near_to_float64_as_eager_passes(interpreted, case):
    """Forward and backward: passes of uneven tiles, of several blocks and of one cell; and whole layers."""
    times, more = ALLOWED[case.partition(" ")[0]]
    far = {name: both for name, both in interpreted[case].items() if not both[0] <= times * both[1] + more}
    assert len(interpreted[case]) >= 10 and not far


def test_kernels_saturate_as_eager_passes_and_what_is_no_number_stays_none(interpreted):
    assert all(interpreted["ends"].values()) and len(interpreted["ends"]) == 4


def test_the_gradient_of_an_expansion_that_does_not_learn_is_not_made(interpreted):
    """A product less in every block of `retreat_weights`; the other gradients are as with it."""
    frozen = interpreted["frozen"]
    whole, less = frozen["products"]
    assert frozen["none"] and frozen["others"] and 0 < less < whole


def resources(kernel, activations, target, constants):
    """What the compiler says of a kernel: registers and stack of a thread, bytes of a program; and its code."""
    signature, aligned, options = {}, {}, {"num_warps": 4, "num_stages": 1}
    options |= {name: constants.pop(name) for name in options if name in constants}
    for place, (name, parameter) in enumerate(inspect.signature(kernel.fn).parameters.items()):
        if name in constants or parameter.annotation is int:
            signature[name] = "constexpr" if name in constants else "i32"
            continue
        signature[name] = f"*{activations if name in ACTIVATIONS else 'i32' if name == 'shifts' else 'fp32'}"
        aligned[(place,)] = [["tt.divisibility", 16]]  # as tensors are that torch makes
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    made = triton.compile(source, triton.backends.compiler.GPUTarget("cuda", target, 32), options)
    return made.asm["cubin"], made.asm["ptx"], made.metadata.shared


def told_of(cubin, directory):
    (directory / "kernel.cubin").write_bytes(cubin)
    tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", directory / "kernel.cubin"]
    told = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}


@pytest.fixture
def blocks(monkeypatch, tmp_path):
    """The kernels, compiled anew."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from faconv_hpc.model import blocks

    return blocks


@pytest.mark.every(4, "channels", "kind", "target")
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [16, 32, 64, 128])
def test_kernels_of_a_step_compile_and_spill_nothing(blocks, tmp_path, channels, kind, target):
    """For A100 and H100. Products are those that the precision asks for: tensor cores, but not of fp32. What is no
    number is not lost at a bound, which the interpreter cannot show: it has bounds of its own."""
    from faconv_hpc.model.fused import block_of

    weight = torch.empty(4 * channels, channels, dtype=KINDS[kind])
    with arithmetic(kind, torch.device("cuda")):
        chosen = {name: block_of(weight, sums=name == "retreat_weights") for name in STEP}
    chosen["retreat_weights"]["LEARNS"] = True
    for name, constants in chosen.items():
        cubin, code, shared_bytes = resources(
            getattr(blocks, name), "bf16" if kind == "bf16" else "fp32", target, constants
        )
        told = told_of(cubin, tmp_path)
        assert told["STACK"] == told["LOCAL"] == 0 and 32 < told["REG"] <= 255, (name, told)
        assert shared_bytes <= 64 * 1024  # a processor of an A100 has 164 KiB: two programs at least
        products = set(re.findall(r"(?:mma|wgmma)\S*\.(f32\.\w+)\.", code))
        bounds = re.findall(r"\b(?:min|max)\.\S*f32", code)
        assert bounds and all(".NaN." in bound for bound in bounds), (name, bounds)
        assert products == {"fp32": set(), "tf32": {"f32.tf32"}, "bf16": {"f32.bf16"}}[kind], (name, products)


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_kernels_that_mix_compile_and_spill_nothing(blocks, tmp_path, kind, target):
    from faconv_hpc.model.fused import CELLS, TOGETHER

    for kernel, more in ((blocks.mix, {"CHANNELS": TOGETHER}), (blocks.mix_weights, {"TAPS": 32})):
        cubin, _, _ = resources(kernel, kind, target, CELLS | more)
        told = told_of(cubin, tmp_path)
        assert told["STACK"] == told["LOCAL"] == 0, (kernel, told)


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (("eager", "cuda", torch.float32, torch.float32), "eager"),
        (("compiled", "cuda", torch.float32, torch.float32), "torch.compile"),
        (("triton", "cuda", torch.float32, torch.float32), "Triton"),
        (("triton", "cuda", torch.bfloat16, torch.float32), "Triton"),
        (("triton", "cuda", torch.float64, torch.float64), "torch.compile"),
        (("triton", "cuda", torch.float32, torch.float64), "torch.compile"),
        (("triton", "cpu", torch.float32, torch.float32), "C++"),
        (("triton", "cpu", torch.bfloat16, torch.float32), "torch.compile"),
    ],
)
def test_which_kernels_a_layer_gets(given, made):
    assert kernels_named(*given) == made


def on_a_gpu(kind):
    return SimpleNamespace(device=torch.device("cuda"), dtype=kind)


def test_without_triton_there_is_a_way_out(monkeypatch):
    for name in ("fused", "blocks"):
        monkeypatch.delitem(sys.modules, f"faconv_hpc.model.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(InputError, match=r"kernels=triton needs the package triton, which torch's CUDA builds bring"):
        kernels_for("triton", on_a_gpu(torch.float32), on_a_gpu(torch.float32))


class Told(Kernels):
    """Says what it was asked for."""

    def mix(self, into, *given):
        into.fill_(1)

    def mix_and_advance(self, h, after, *given):
        after.fill_(given[-2].numel())

    def mix_and_retreat(self, *given):
        return "gone back", given[-3].shape


@pytest.mark.parametrize("limit", ["MIXED_CHANNELS", "NUMBERS"])
def test_what_kernels_cannot_count_is_left_to_others(monkeypatch, limit):
    """More channels than registers hold, and more numbers than 32 bits count; m has room there."""
    from faconv_hpc.model import fused

    monkeypatch.setattr(fused, limit, 4)
    kernels, taps = fused.TritonKernels(Told()), Taps.of(3, (1,))
    u, c, weight = torch.zeros(1, 5, 4, 5), torch.zeros(1, 2, 2, 3), torch.zeros(8, 5)
    gates = Gates(weight, torch.zeros(8), torch.zeros(3, 2))
    given = Mixing(u, (taps,), (torch.zeros(1, 5, 9),)), c, gates
    room = kernels.room(c, weight)
    assert not room.numel()
    after = torch.zeros_like(c)
    kernels.mix_and_advance(c.clone(), after, *given, room, slice(0, 2))
    assert (after == 1 * 5 * 2 * 3).all()
    asked = torch.zeros(1, 5, 2, 3), c, *given, c, c, room, slice(0, 2)
    assert kernels.mix_and_retreat(*asked) == ("gone back", (1, 5, 2, 3))
    if limit == "NUMBERS":
        mixed = torch.zeros(1, 5, 2, 3)
        kernels.mix(mixed, u, torch.zeros(1, 5, 9), taps.offsets)
        assert mixed.all()
