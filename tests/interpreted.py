"""``python tests/interpreted.py``: the Triton kernels in Triton's interpreter, beside eager passes, for test_triton.py.

The interpreter runs kernels on a CPU, program by program; it must be on before triton is imported: a process of its
own. Prints JSON: for each case and each of its results how far the kernels and the eager passes of the same type are
from eager ones in float64, relative to the largest number; in the mean of some draws.
"""

import json
import os
from collections import Counter
from contextlib import contextmanager

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from faconv_hpc import FAConvLSTM2d
from faconv_hpc.model import attention, fused, layer
from faconv_hpc.model.kernels import EAGER
from faconv_hpc.model.taps import Gates, Mixing, Taps
from test_domain import random_like
from test_parity import randomized

PASSES = {
    # batch, rows, columns, C, C_b, dilations, fuse, programs that sum: more blocks and fewer than of those
    "float32 sum": (torch.float32, 2, 5, 19, 11, 5, (2,), "sum", 256),
    "float32 concat": (torch.float32, 1, 7, 13, 5, 6, (1, 3, 2), "concat", 2),
    "float32 one cell": (torch.float32, 3, 1, 1, 3, 17, (1,), "sum", 2),
    "bfloat16 sum": (torch.bfloat16, 1, 11, 17, 19, 7, (1, 2), "sum", 2),
    "bfloat16 concat": (torch.bfloat16, 1, 3, 37, 5, 6, (1, 2, 3), "concat", 256),
}
LAYERS = {
    # and how often: what is rounded to bf16 twice, as what is squeezed to one channel, is near by chance
    "float32 layer": (torch.float32, {"attention_every": 2, "dilations": (2,)}, 1),
    "float32 layer, concat, no attention": (
        torch.float32,
        {"attention_every": 0, "dilations": (1, 2), "fuse": "concat", "peephole": False},
        1,
    ),
    "bfloat16 layer": (torch.bfloat16, {"attention_every": 2, "dilations": (1,)}, 6),
}


PRODUCTS = Counter()


def as_on_a_gpu():
    """The interpreter cuts float32 down to bf16, and multiplies the bits of bf16 as if they were whole numbers."""
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def rounded(self, src, kind):
        if (src.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, kind)
        bits = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16).numpy()
        return interpreter.TensorHandle(bits.view(np.uint16).reshape(src.data.shape), tl.bfloat16)

    def widened(self, *given):
        PRODUCTS["dot"] += 1
        a, b = (cast(self, one, tl.float32) if one.dtype.scalar == tl.bfloat16 else one for one in given[:2])
        return dot(self, a, b, *given[2:])

    builder.cast_impl, builder.create_dot = rounded, widened


def passes(kernels, kind, batch, rows, columns, channels, bottleneck, dilations, fuse):
    """What the passes of a step make of the same numbers, forward and backward; samples lie apart."""
    wide, reach = torch.promote_types(kind, torch.float32), max(dilations)
    groups = [dilations] if fuse == "sum" else [(dilation,) for dilation in dilations]
    taps = tuple(Taps.of(3, group, reach) for group in groups)
    inner = bottleneck * len(taps)

    def numbers(seed, *shape):
        return random_like((batch, 2, *shape), seed)[:, 1].to(kind)

    u, grad_h, h = (numbers(seed, size, rows + more, columns + more) for seed, size, more in
                    ((0, bottleneck, 2 * reach), (1, channels, 0), (2, channels, 0)))  # fmt: skip
    c, grad_c = (random_like((batch, channels, rows, columns), seed).to(wide) for seed in (3, 4))
    weights = tuple(random_like((batch, bottleneck, len(one.offsets)), 5).to(wide) for one in taps)
    expansion, bias, peep = (
        random_like((4 * channels, inner), 6),
        random_like((4 * channels,), 7),
        random_like((3, channels), 8),
    )
    gates = Gates(expansion.to(kind), bias.to(wide), peep.to(wide))
    framed = torch.zeros(batch, inner, rows + 4 * reach, columns + 4 * reach, dtype=kind)
    amid = framed[..., 2 * reach : 2 * reach + rows, 2 * reach : 2 * reach + columns]
    mixing, room, back = (
        Mixing(u.contiguous(), taps, weights),
        kernels.room(c, gates.weight),
        torch.empty_like(u).contiguous(),
    )
    after, pieces = torch.empty_like(c), [slice(0, 1), slice(1, rows)][: 1 + (rows > 1)]
    for some in reversed(pieces):
        kernels.mix_and_advance(h.data, after, mixing, c, gates, room, some)
    of_c, sums = torch.empty_like(c), []
    for some in pieces:
        sums.append(kernels.mix_and_retreat(amid, of_c, mixing, c, gates, grad_h, grad_c, room, some))
    of_weight, of_bias, of_peep = (sum(parts) for parts in zip(*sums, strict=True))
    for some in (slice(0, 2), slice(2, rows + 2 * reach)):
        looked = framed[:, :bottleneck, some.start : some.stop + 2 * reach]
        kernels.mix(back[..., some, :], looked, weights[0], taps[0].mirrored)
    of_taps = kernels.mix_weights(u, amid[:, :bottleneck], taps[0].offsets)
    return {"h": h, "c": after, "of expansion": of_weight, "of m": amid, "of c": of_c, "of bias": of_bias,
            "of peepholes": of_peep, "of m, framed": framed, "of u": back, "of taps": of_taps}  # fmt: skip


def whole_layer(options, kind, draw):
    """Outputs and all gradients of a layer on one tile, from a state, with a sample that ends early."""
    module, wide = randomized(FAConvLSTM2d(3, 6, **options)).to(kind), torch.promote_types(kind, torch.float32)
    shapes = [(2, 3, 3, 3, 17), *[(2, 6, 3, 17)] * 2, (2, 3, 6, 3, 17), (2, 6, 3, 17)]
    x, h, c, of_out, of_c = (random_like(shape, 100 * draw + seed) for seed, shape in enumerate(shapes, start=1))
    x, *state = (one.to(of).requires_grad_() for one, of in ((x, wide), (h, kind), (c, wide)))
    out, (_, c) = module(x, state, valid_BT=torch.tensor([[True, True, True], [True, False, True]]))
    objective = (out * of_out.to(kind)).sum() + (c * of_c.to(wide)).sum()
    names = ["of x", "of h", "of c", *(f"of {name}" for name, _ in module.named_parameters())]
    grads = torch.autograd.grad(objective, [x, *state, *module.parameters()])
    return {"h": out.detach(), "c": c.detach()} | dict(zip(names, grads, strict=True))


@contextmanager
def kernels_are(kernels):
    """Whatever a layer asks for."""
    before = layer.kernels_for
    layer.kernels_for = attention.kernels_for = lambda *_: kernels
    try:
        yield
    finally:
        layer.kernels_for = attention.kernels_for = before


def gates_at_their_ends(kernels):
    """h, c and gradients where gates saturate, and where they are no numbers."""
    bias = torch.tensor([0.0, 1e-8, 30.0, -30.0, 200.0, -200.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan])
    channels = len(bias)
    mixing = Mixing(torch.zeros(1, 1, 2, 3), (Taps(0, ((0, 0),), ((0,),)),), (torch.ones(1, 1, 1),))
    given = (
        mixing,
        torch.ones(1, channels, 2, 3),
        Gates(torch.zeros(4 * channels, 1), bias.repeat(4), torch.zeros(3, channels)),
    )
    (h, after), room = torch.empty(2, 1, channels, 2, 3), kernels.room(given[1], given[2].weight)
    kernels.mix_and_advance(h, after, *given, room, slice(0, 2))
    of_c, one = torch.empty_like(h), torch.ones_like(h)
    sums = kernels.mix_and_retreat(torch.empty(1, 1, 2, 3), of_c, *given, one, one, room, slice(0, 2))
    return {"h": h, "c": after, "of c": of_c, "of bias": sums.bias}


def gradients_of_what_learns(kernels, learns):
    """Of one step whose expansion learns or not; and how many products were made."""
    rows, columns, channels = 5, 19, 11
    u, m, c = (
        random_like((1, size, rows + more, columns + more), size).float() for size, more in ((5, 2), (5, 0), (11, 0))
    )
    taps = Taps.of(3, (1,))
    gates = Gates(*(random_like(shape, 6).float() for shape in ((4 * channels, 5), (4 * channels,), (3, channels))))
    mixing = Mixing(u, (taps,), (random_like((1, 5, 9), 5).float(),))
    before, room = PRODUCTS.total(), kernels.room(c, gates.weight)
    of_c, given = torch.empty_like(c), (mixing, c, gates, 2 * c, 3 * c, room, slice(0, rows), learns)
    of_weight, *others = kernels.mix_and_retreat(m, of_c, *given)
    return of_weight, [m, of_c, *others], PRODUCTS.total() - before


def what_does_not_learn(kernels):
    """Whether its gradient is left out, whether the others are the same, and the products of both."""
    (_, want, all_products), (none, got, products) = (
        gradients_of_what_learns(kernels, learns) for learns in (True, False)
    )
    return {"none": none is None, "others": all(map(torch.equal, got, want)), "products": [all_products, products]}


def apart(got, want):
    return ((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-300)).item()


def compared(ours, eager, exact):
    assert all((ours[name].dtype, ours[name].shape) == (one.dtype, one.shape) for name, one in eager.items())
    return {name: (apart(ours[name], one), apart(eager[name], one)) for name, one in exact.items()}


def main():
    torch.set_num_threads(1)
    as_on_a_gpu()
    kernels, told = fused.TritonKernels(EAGER), {}
    for name, (kind, *sizes, programs) in PASSES.items():
        fused.PROGRAMS = programs
        told[name] = compared(*(passes(one, of, *sizes) for one, of in
                                ((kernels, kind), (EAGER, kind), (EAGER, torch.float64))))  # fmt: skip
    for name, (kind, options, draws) in LAYERS.items():
        found = []
        for draw in range(draws):
            results = []
            for one, of in ((kernels, kind), (EAGER, kind), (EAGER, torch.float64)):
                with kernels_are(one):
                    results.append(whole_layer(options, of, draw))
            found.append(compared(*results))
        told[name] = {key: np.mean([one[key] for one in found], axis=0).tolist() for key in found[0]}
    ends = [gates_at_their_ends(one) for one in (kernels, EAGER)]
    told["ends"] = {
        name: torch.allclose(one, ends[1][name], rtol=1e-6, atol=1e-6, equal_nan=True) for name, one in ends[0].items()
    }
    told["frozen"] = what_does_not_learn(kernels)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
