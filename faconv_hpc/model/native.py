"""The passes as loops in C++ (passes.cpp, attend.cpp), for float32 and float64 on a CPU, built once for a machine.

A build takes two seconds, holds for all shapes, and lies in a directory of the user's under that for temporary files.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..autograd import Context, Operation
from ..errors import InputError
from ..files import replacing
from .kernels import Kernels, Sums, Turn, has_rows, planar
from .taps import Gates, Offsets

TYPES = {torch.float32: "float32", torch.float64: "float64"}
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
OR_EAGER = "or use kernels: eager, which is slower"
_SOURCES = tuple(Path(__file__).with_name(name) for name in ("passes.cpp", "attend.cpp", "blocks.hpp"))


class NativeKernels(Kernels):
    """The passes of `Kernels`, a block of cells after the other: 4 C_h channels of it never go through memory."""

    def product(self, weight: Tensor, x_BCYX: Tensor, into: Tensor | None = None, *, add: bool = False) -> Tensor:
        x, (rows, inner) = planar(x_BCYX), weight.shape
        if into is None:
            into = x.new_empty(x.shape[0], rows, *x.shape[2:])
        assert into.shape == (x.shape[0], rows, *x.shape[2:]) and into.is_contiguous(), "the product's own shape"
        assert x.shape[1] == inner, "as many channels as the weight takes"
        cells = x.shape[2] * x.shape[3]
        _call(
            "product",
            into,
            into.stride(0),
            weight,
            *weight.stride(),
            x,
            x.stride(0),
            x.shape[0],
            rows,
            inner,
            cells,
            add,
        )
        return into

    def advance(self, h: Tensor, after: Tensor, mixed_BFYX: Tensor, c_BCYX: Tensor, gates: Gates) -> None:
        assert h.shape == after.shape == c_BCYX.shape, "h and c have as many channels"
        places, sizes = _tiles(h, after, mixed_BFYX, c_BCYX), _sizes(c_BCYX, mixed_BFYX)
        _call("advance", h, *places, *(one.contiguous() for one in gates), *sizes)

    def retreat(
        self,
        mixed_BFYX: Tensor,
        before: Tensor,
        c_BCYX: Tensor,
        gates: Gates,
        grad_h: Tensor,
        grad_c: Tensor,
        learns: bool = True,
    ) -> Sums:
        assert before.shape == c_BCYX.shape == grad_h.shape == grad_c.shape, "h and c have as many channels"
        places, sizes = _tiles(mixed_BFYX, before, c_BCYX, grad_h, grad_c), _sizes(c_BCYX, mixed_BFYX)
        parameters = [one.contiguous() for one in gates]
        of_weight, *others = (torch.empty_like(one) for one in parameters)
        of_weight = of_weight if learns else c_BCYX.new_empty(0)  # whose address is null
        _call("retreat", of_weight, *others, mixed_BFYX, *places, *parameters, *sizes)
        return Sums(of_weight if learns else None, *others)

    def mix(self, into_BCYX: Tensor, padded_BCYX: Tensor, weight_BCN: Tensor, offsets: Offsets) -> None:
        padded = padded_BCYX if has_rows(padded_BCYX) else padded_BCYX.contiguous()
        into, weight = into_BCYX, weight_BCN.contiguous()
        assert has_rows(into) and into.shape[:2] == padded.shape[:2] == weight.shape[:2], "the same channels"
        to, looked = into.stride()[:2], padded.stride()[:3]
        _call("mix", into, *to, padded, *looked, weight, _table(offsets), *weight.shape, *into.shape[2:])

    def mix_weights(self, padded_BCYX: Tensor, grad_BCYX: Tensor, offsets: Offsets) -> Tensor:
        padded, grad = (one if one.stride(3) == 1 else one.contiguous() for one in (padded_BCYX, grad_BCYX))
        products = grad.new_empty(*grad.shape[:2], len(offsets))
        of_padded, of_grad = padded.stride()[:3], grad.stride()[:3]
        sizes = *products.shape, *grad.shape[2:]
        _call("mix_weights", products, padded, *of_padded, grad, *of_grad, _table(offsets), *sizes)
        return products

    def attend(self, own: Tensor, others: Tensor | None, turn_q: Turn, turn_k: Turn, bias_M: Tensor | None) -> Tensor:
        attended: Tensor = Attended.call(own, others, *turn_q, *turn_k, own.new_empty(0) if bias_M is None else bias_M)
        return attended


class Attended(Operation):
    """`Kernels.attend`. Kept are what is given, the result and a number for each query; logits are computed again."""

    @staticmethod
    def forward(ctx: Context, own: Tensor, others: Tensor | None, *places: Tensor) -> Tensor:
        batch, lines, queries, _, heads, size = own.shape
        keys = (own if others is None else others).shape[2]
        attended, logarithms = (
            own.new_empty(batch, lines, queries, heads, size),
            own.new_empty(batch, lines, heads, queries),
        )
        ctx.sizes = batch, lines, heads, queries, keys, size
        _call("attend", attended, logarithms, *_strided(_each(own, others)), *places, *ctx.sizes)
        ctx.save_for_backward(own, others, attended, logarithms)
        ctx.places = places
        return attended

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        own, others, attended, logarithms = ctx.saved_tensors
        grads = torch.empty_like(own), None if others is None else torch.empty_like(others)  # side by side as they are
        given = *_strided((grad.contiguous(), attended)), logarithms, *_strided(_each(own, others))
        _call("attend_back", *_strided(_each(*grads)), *given, *ctx.places, *ctx.sizes)
        return *grads, *(None for _ in ctx.places)


def _each(own: Tensor, others: Tensor | None) -> Iterable[Tensor]:
    """Queries, keys and values."""
    yield from own.unbind(3)
    yield from () if others is None else others.unbind(3)


def _strided(several: Iterable[Tensor]) -> Iterator[Tensor]:
    """Of each the numbers, and the strides of all dims but the last."""
    for one in several:
        assert one.stride(-1) == 1, "the numbers of a head lie side by side"
        yield one
        yield torch.tensor(one.stride()[:-1])


def _tiles(first: Tensor, *others: Tensor) -> list[Tensor | int]:
    """Tensors of some rows of a tile each, but for the first: how far its samples are apart, and channels of all."""
    several = first, *others
    assert len({(len(one), *one.shape[2:], one.stride(1)) for one in several}) == 1, (
        "of the same cells of as large a tile"
    )
    assert all(map(has_rows, several)), "rows follow each other"
    return [first.stride(0), *(value for one in others for value in (one, one.stride(0))), first.stride(1)]


def _sizes(c_BCYX: Tensor, mixed_BFYX: Tensor) -> tuple[int, int, int, int]:
    batch, channels, rows, columns = c_BCYX.shape
    return batch, channels, mixed_BFYX.shape[1], rows * columns


@cache
def _table(offsets: Offsets) -> Tensor:
    return torch.tensor(offsets, dtype=torch.int64)


def _call(name: str, first: Tensor, *rest: Tensor | int) -> None:
    """Tensors as their addresses, numbers as 64 bits, and the threads that torch would use."""
    for one in rest:
        if isinstance(one, Tensor) and one.dtype not in (first.dtype, torch.int64):
            raise TypeError(f"a native pass got {first.dtype} and {one.dtype}: it reads both as the same")
    function = getattr(library(), f"{TYPES[first.dtype]}_{name}")
    arguments = (
        ctypes.c_void_p(one.data_ptr()) if isinstance(one, Tensor) else ctypes.c_int64(one) for one in (first, *rest)
    )
    function(*arguments, ctypes.c_int64(torch.get_num_threads()))


@cache
def library() -> ctypes.CDLL:
    """The built passes; of the ranks of a machine one builds them, and the others wait.

    Raises:
        InputError: there is no compiler, or what it makes cannot be kept or loaded.
    """
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    command = [*compiler, *FLAGS, *(str(source) for source in _SOURCES if source.suffix == ".cpp")]
    about = [platform.machine(), _processor(), *platform.libc_ver(), _run([*compiler, "--version"]), *compiler, *FLAGS]
    texts = [source.read_bytes() for source in _SOURCES]
    name = hashlib.sha256(b"\n".join([*texts, *(one.encode() for one in about)])).hexdigest()[:24]
    try:
        with _folder() as folder:
            built = folder / f"passes-{name}.so"
            for again in (True, False):
                if not built.exists():
                    with replacing(built) as beside:
                        _run([*command, "-o", str(beside)])
                try:
                    return ctypes.CDLL(str(built))
                except OSError:  # it was damaged since
                    built.unlink(missing_ok=True)
                    if not again:
                        raise
    except OSError as error:
        raise InputError(
            f"kernels=compiled cannot keep or load what it builds under {tempfile.gettempdir()}: {error}. Set TMPDIR "
            f"to a directory with room that programs may be run from, {OR_EAGER}."
        ) from None
    raise AssertionError("loaded or raised")


def _run(command: list[str]) -> str:
    """What a compiler says."""
    way_out = f"Install g++, or load a compiler's module and set CXX; {OR_EAGER}"
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except OSError as error:
        raise InputError(
            f"kernels=compiled needs a C++ compiler, and {command[0]}: {error.strerror}. {way_out}."
        ) from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        told = next((line for line in lines if "error" in line), lines[0])
        raise InputError(f"kernels=compiled: {shlex.join(command)} failed: {told}. {way_out}.") from None


@contextmanager
def _folder() -> Iterator[Path]:
    """A directory that nobody else can write into, as what lies there is loaded as code; locked against others."""
    folder = Path(tempfile.gettempdir()) / f"faconv_hpc-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    about = folder.lstat()
    ours = stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid()
    if not ours or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        with tempfile.TemporaryDirectory(prefix="faconv_hpc-") as private:
            yield Path(private)
        return
    with (folder / "lock").open("w") as lock:
        with suppress(OSError):  # a file system without locks: whoever comes builds it once more
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _processor() -> str:
    """What the processor can do, as code built for one may be more than another can."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
