"""The passes as loops in C++ (passes.cpp), for float32 and float64 on a CPU: built once for every kind of machine.

A build takes two seconds, holds for all shapes, and lies in a directory of the user's under that for temporary files.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..files import replacing
from .kernels import Kernels, Offsets

TYPES = {torch.float32: "float32", torch.float64: "float64"}
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
_SOURCE = Path(__file__).with_name("passes.cpp")


class NativeKernels(Kernels):
    """The passes of `Kernels`, a block of cells after the other: 4 C_h channels of it never go through memory."""

    def product(self, weight: Tensor, x_BCYX: Tensor, into: Tensor | None = None, *, add: bool = False) -> Tensor:
        x, (rows, inner) = _planar(x_BCYX), weight.shape
        if into is None:
            into = x.new_empty(x.shape[0], rows, *x.shape[2:])
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

    def advance(
        self, h: Tensor, mixed_BFYX: Tensor, c_BCYX: Tensor, weight: Tensor, bias: Tensor, peep_GC: Tensor
    ) -> Tensor:
        mixed, c, after = mixed_BFYX.contiguous(), c_BCYX.contiguous(), torch.empty_like(c_BCYX)
        parameters = weight.contiguous(), bias.contiguous(), peep_GC.contiguous()
        _call("advance", h, h.stride(0), after, mixed, c, *parameters, *_sizes(c, mixed))
        return after

    def retreat(
        self,
        mixed_BFYX: Tensor,
        c_BCYX: Tensor,
        weight: Tensor,
        bias: Tensor,
        peep_GC: Tensor,
        grad_h: Tensor,
        grad_c: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        mixed, c, grad_h, grad_c = mixed_BFYX.contiguous(), c_BCYX.contiguous(), _planar(grad_h), grad_c.contiguous()
        parameters = weight.contiguous(), bias.contiguous(), peep_GC.contiguous()
        of_weights = [torch.empty_like(one) for one in parameters]
        grads = of_weights[0], torch.empty_like(mixed), torch.empty_like(c), of_weights[1], of_weights[2]
        _call("retreat", *grads, grad_h, grad_h.stride(0), grad_c, mixed, c, *parameters, *_sizes(c, mixed))
        return grads

    def mix(self, into_BCYX: Tensor, padded_BCYX: Tensor, weight_BCN: Tensor, offsets: Offsets) -> None:
        padded, weight = _planar(padded_BCYX), weight_BCN.contiguous()
        given = into_BCYX, into_BCYX.stride(0), padded, padded.stride(0), weight, _table(offsets)
        _call("mix", *given, *weight.shape, *into_BCYX.shape[2:], *padded.shape[2:])

    def mix_weights(self, padded_BCYX: Tensor, grad_BCYX: Tensor, offsets: Offsets) -> Tensor:
        padded, grad = _planar(padded_BCYX), _planar(grad_BCYX)
        products = grad.new_empty(*grad.shape[:2], len(offsets))
        given = products, padded, padded.stride(0), grad, grad.stride(0), _table(offsets)
        _call("mix_weights", *given, *products.shape, *grad.shape[2:], *padded.shape[2:])
        return products


def _planar(x_BCYX: Tensor) -> Tensor:
    """x, whose samples may be anywhere, each of them contiguous."""
    _, _, rows, columns = x_BCYX.shape
    return x_BCYX if x_BCYX.stride()[1:] == (rows * columns, columns, 1) else x_BCYX.contiguous()


def _sizes(c_BCYX: Tensor, mixed_BFYX: Tensor) -> tuple[int, int, int, int]:
    batch, channels, rows, columns = c_BCYX.shape
    return batch, channels, mixed_BFYX.shape[1], rows * columns


@cache
def _table(offsets: Offsets) -> Tensor:
    return torch.tensor(offsets, dtype=torch.int64)


def _call(name: str, first: Tensor, *rest: Tensor | int) -> None:
    """Tensors as their addresses, numbers as 64 bits, and the threads that torch would use."""
    function = getattr(library(), f"{TYPES[first.dtype]}_{name}")
    arguments = (
        ctypes.c_void_p(one.data_ptr()) if isinstance(one, Tensor) else ctypes.c_int64(one) for one in (first, *rest)
    )
    function(*arguments, ctypes.c_int64(torch.get_num_threads()))


@cache
def library() -> ctypes.CDLL:
    """The built passes.

    Raises:
        InputError: there is no compiler, or it cannot build them.
    """
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    source = _SOURCE.read_bytes()
    about = " ".join((platform.machine(), _processor(), *compiler, *FLAGS)).encode()
    name = hashlib.sha256(source + about).hexdigest()[:24]
    built = _folder() / f"passes-{name}.so"
    if not built.exists():
        with replacing(built) as beside:
            _build([*compiler, *FLAGS, str(_SOURCE), "-o", str(beside)])
    return ctypes.CDLL(str(built))


def _build(command: list[str]) -> None:
    way_out = "Install g++, or load a compiler's module and set CXX; or use kernels: eager, which is slower"
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except OSError as error:
        raise InputError(
            f"kernels=compiled needs a C++ compiler, and {command[0]}: {error.strerror}. {way_out}."
        ) from None
    except subprocess.CalledProcessError as error:
        told = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[0]
        raise InputError(f"kernels=compiled: {shlex.join(command)} failed: {told}. {way_out}.") from None


def _folder() -> Path:
    """A directory that nobody else can write into: what lies there is loaded as code."""
    folder = Path(tempfile.gettempdir()) / f"faconv_hpc-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return Path(tempfile.mkdtemp(prefix="faconv_hpc-"))
    return folder


def _processor() -> str:
    """What the processor can do, as code built for one may be more than another can."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
