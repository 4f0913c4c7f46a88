"""Layers on one tile: against Keras, against a plain transcription, and their own promises."""

import gc
import os
import platform
import weakref
from collections import Counter
from functools import cache, partial
from itertools import accumulate, pairwise

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from faconv_hpc import ConvLSTM2d, Domain, FAConvLSTM2d, FAConvLSTMNetwork, LatLonGrid
from faconv_hpc.errors import InputError
from faconv_hpc.model import kernels as kernels_module
from faconv_hpc.model import native, sweep
from faconv_hpc.model.attention import AxialAttention, ExchangeCost, cheaper_exchange, exchange_costs
from faconv_hpc.model.kernels import BY_EXP, EAGER, OF_LIBRARY, Kernels, TracedKernels, Turn, kernels_for
from faconv_hpc.model.subspace import SubspaceHead, coarse_means, seasonal_encoding
from faconv_hpc.model.taps import Gates, Mixing, Taps
from faconv_hpc.spatial import collectives
from faconv_hpc.spatial.area_mean import AreaMean, RegionMeans
from faconv_hpc.spatial.exchange import HaloExchange
from faconv_hpc.spatial.messages import start_messages
from ranks import Layout, hosts_of, run_on_ranks
from test_domain import random_like
from test_parity import randomized, relative_difference

GOLDEN = [[[0.48694518, 0.50237733], [0.5461202, 0.5598283]], [[0.8661607, 0.86909103], [0.8774414, 0.8800861]]]


def test_convlstm_reproduces_keras():
    """Keras 3.16 ConvLSTM2D, valid padding, kernel 0.01, recurrent 0.02, bias 0.03 and forget 1."""
    x_BTYXC = torch.arange(480, dtype=torch.float32).reshape(2, 3, 4, 4, 5) / 100
    layer = ConvLSTM2d(5, 2, 3, padding="valid")
    with torch.no_grad():
        layer.input_weight.fill_(0.01)
        layer.recurrent_weight.fill_(0.02)
        layer.bias.fill_(0.03)
        layer.bias[2:4] = 1.0
    out, (h, _) = layer(x_BTYXC.permute(0, 1, 4, 2, 3))
    assert torch.equal(out[:, -1], h)
    for channel in range(2):
        torch.testing.assert_close(h[:, channel], torch.tensor(GOLDEN), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("hard_sigmoid", lambda x: functional.hardsigmoid(x)),
        ("hard_sigmoid_keras2", lambda x: (0.2 * x + 0.5).clip(0, 1)),
    ],
)
def test_convlstm_recurrent_activations(activation, formula):
    layer = randomized(ConvLSTM2d(2, 3, 1, recurrent_activation=activation))
    x = random_like((1, 1, 2, 3, 4), 0) * 3
    i, _, g, o = functional.conv2d(x[:, 0], layer.input_weight, layer.bias).chunk(4, 1)
    want = formula(o) * torch.tanh(formula(i) * torch.tanh(g))
    torch.testing.assert_close(layer(x)[0][:, 0], want)


def plain_step(layer, x, h, c, grid):
    """One step by the equations, with library convolutions, on a plane of equal areas."""
    of_input = torch.einsum("bc,ncyx->nbyx", layer.input_weight, x) + layer.bottleneck_bias[:, None, None]
    u = of_input + torch.einsum("bc,ncyx->nbyx", layer.hidden_weight, h)
    s = torch.ones(len(x), 2 * u.shape[1], dtype=u.dtype)
    if layer.squeeze is not None:
        s = torch.sigmoid(layer.excite(functional.silu(layer.squeeze(of_input.mean((-2, -1))))))
    branches = []
    for d, dilation in enumerate((1, 2)):
        kernel = layer.mixing_weight[d].view(-1, 1, 3, 3)
        m = functional.conv2d(u, kernel, padding=dilation, dilation=dilation, groups=u.shape[1])
        branches.append(s.unflatten(1, (2, -1))[:, d, :, None, None] * m)
    fused = torch.cat(branches, 1) if layer.fuse == "concat" else sum(branches)
    a = torch.einsum("gc,ncyx->ngyx", layer.expansion_weight, fused) + layer.expansion_bias[:, None, None]
    i, f, g, o = a.chunk(4, 1)
    p_i, p_f, p_o = layer.peephole_weight[:, :, None, None]
    c = torch.sigmoid(f + p_f * c) * c + torch.sigmoid(i + p_i * c) * torch.tanh(g)
    return torch.sigmoid(o + p_o * c) * torch.tanh(c), c


@pytest.mark.parametrize("se_reduction", [2, 0])
@pytest.mark.parametrize("fuse", ["sum", "concat"])
def test_faconvlstm_follows_its_equations(fuse, se_reduction):
    layer = randomized(FAConvLSTM2d(3, 8, dilations=(1, 2), fuse=fuse, se_reduction=se_reduction, attention_every=0))
    x = random_like((2, 3, 3, 7, 9), 0).requires_grad_()
    h = c = torch.zeros(2, 8, 7, 9, dtype=torch.float64)
    for step in range(3):
        h, c = plain_step(layer, x[:, step], h, c, None)
    got, (h_got, c_got) = layer(x)
    torch.testing.assert_close(h_got, h, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(c_got, c, rtol=1e-12, atol=1e-13)
    y = random_like(h.shape, 3)
    want = torch.autograd.grad((h * y).sum(), [x, *layer.parameters()])
    for a, b in zip(torch.autograd.grad((got[:, -1] * y).sum(), [x, *layer.parameters()]), want, strict=True):
        assert relative_difference(a, b) < 1e-11


def test_a_squeeze_takes_one_mean_for_all_steps_and_without_it_none_is_taken(monkeypatch):
    """Nor has the layer weights for one."""
    layer, without = (FAConvLSTM2d(3, 8, se_reduction=reduction) for reduction in (4, 0))
    names = {name for name, _ in layer.named_parameters()} - {name for name, _ in without.named_parameters()}
    assert names == {f"{part}.{kind}" for part in ("squeeze", "excite") for kind in ("weight", "bias")}
    borrowed = {id(one) for _, one in FAConvLSTMNetwork(3, 3, 8, 1, se_reduction=0).borrowed()}
    assert len(borrowed) == 4, "of attention's rows and columns alone"
    taken = []
    for name in ("start", "start_gradient"):
        monkeypatch.setattr(AreaMean, name, lambda mean, x, name=name: taken.append(name) or (lambda: x.mean((-2, -1))))
    without(torch.randn(1, 3, 3, 5, 6))[0].sum().backward()
    assert not taken
    layer(torch.randn(1, 3, 3, 5, 6))
    assert taken == ["start"]


@pytest.mark.parametrize("options", [{"fuse": "sum"}, {"fuse": "concat", "peephole": False}], ids=str)
def test_a_layer_has_the_gradients_of_finite_differences(options):
    """Of inputs, state and all weights, from a state and from none, where some samples end early, attention between."""
    layer = randomized(FAConvLSTM2d(2, 4, dilations=(1, 2), attention_every=2, attention_heads=1, **options))
    names, weights = zip(*layer.named_parameters(), strict=True)
    x, h, c = (random_like(shape, seed) for seed, shape in enumerate([(2, 3, 2, 3, 4), (2, 4, 3, 4), (2, 4, 3, 4)]))
    given = [one.clone().requires_grad_() for one in (x, h, c, *weights)]
    valid = torch.tensor([[True, True, True], [True, False, False]])

    def outcome(x, h, c, *weights):
        with_weights = dict(zip(names, weights, strict=True))
        out, state = torch.func.functional_call(layer, with_weights, (x, (h, c)), {"valid_BT": valid})
        without, _ = torch.func.functional_call(layer, with_weights, (x,))
        return out, *state, without

    assert torch.autograd.gradcheck(outcome, given, fast_mode=True)


def test_a_sweep_keeps_its_states_and_the_padded_bottleneck():
    """Neither what is expanded nor what is mixed, which are computed again."""
    layer, x = FAConvLSTM2d(3, 8, dilations=(1, 2), attention_every=0), torch.randn(2, 5, 3, 7, 9, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.setdefault(one.data_ptr(), one), lambda one: one):
        out, _ = layer(x)
    weights, bottleneck = sum(parameter.numel() for parameter in layer.parameters()), 4
    states = out.numel() + 5 * 2 * 8 * 7 * 9  # h and c of every step, h of all of them in one buffer
    padded = 5 * 2 * bottleneck * (7 + 4) * (9 + 4)
    kernels = 5 * 2 * bottleneck * (17 + 2 * 9)  # of each step at all taps, of each dilation
    assert sum(one.numel() for one in kept.values()) <= weights + x.numel() + states + padded + kernels


@pytest.mark.parametrize("change", [lambda out: out.mul_(2), lambda out: out.detach().mul_(2)], ids=["out", "detached"])
@pytest.mark.parametrize("used", ["out", "state"])
def test_a_changed_result_is_no_silent_error(change, used):
    """Backward goes by h of every step, which is what the layer returned; whatever the loss is made of."""
    layer = FAConvLSTM2d(3, 8, attention_every=0)
    out, (h, _) = layer(torch.randn(1, 3, 3, 5, 6))
    change(out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out if used == "out" else h).sum().backward()


def test_what_backward_does_not_go_by_may_be_changed():
    layer, x = FAConvLSTM2d(3, 8, attention_every=1), torch.randn(1, 3, 3, 5, 6)
    grads = []
    for factor in (2, 1):
        out, _ = layer(x)
        changed = out.mul_(2) if factor == 2 else out * 2
        grads.append(torch.autograd.grad(changed.square().sum(), list(layer.parameters())))
    torch.testing.assert_close(*grads)


def test_a_mask_that_is_used_again_is_no_silent_error():
    layer, valid = FAConvLSTM2d(3, 8, attention_every=0), torch.tensor([[True, True, False]])
    out, _ = layer(torch.randn(1, 3, 3, 5, 6), valid_BT=valid)
    valid.fill_(True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("kernels", ["eager", "compiled"])
def test_a_state_may_lie_in_memory_in_any_way(kernels):
    layer = FAConvLSTM2d(3, 8, attention_every=2, kernels=kernels)
    x, h, c = torch.randn(2, 3, 3, 5, 6), torch.randn(2, 8, 5, 6), torch.randn(2, 8, 5, 6)
    outcomes = []
    for turned in (lambda one: one, lambda one: one.to(memory_format=torch.channels_last),
                   lambda one: one.transpose(2, 3).contiguous().transpose(2, 3)):  # fmt: skip
        state = tuple(turned(one.clone()).requires_grad_() for one in (h, c))
        out, last = layer(turned(x.flatten(0, 1)).unflatten(0, (2, 3)), state)
        grads = torch.autograd.grad(out.square().sum() + last[1].sum(), [*state, *layer.parameters()])
        outcomes.append((out, *last, *grads))
    for other in outcomes[1:]:
        torch.testing.assert_close(other, outcomes[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", ["eager", "compiled"])
@pytest.mark.parametrize(
    ("state", "told"),
    [
        (lambda h, c: (h.repeat(2, 1, 1, 1), c), r"the state's h has shape \(4, 8, 5, 6\).* needs \(2, 8, 5, 6\)"),
        (lambda h, c: (h, c[:1]), r"the state's c has shape \(1, 8, 5, 6\).*Pass the state of the same samples"),
        (lambda h, c: (h.double(), c), r"the state's h is torch\.float64, the layer computes in torch\.float32.*h\.to"),
    ],
)
def test_a_state_of_something_else_is_refused(kernels, state, told):
    layer = FAConvLSTM2d(3, 8, attention_every=0, kernels=kernels)
    with pytest.raises(InputError, match=told):
        layer(torch.randn(2, 2, 3, 5, 6), state(torch.randn(2, 8, 5, 6), torch.randn(2, 8, 5, 6)))


@pytest.mark.parametrize("kernels", ["eager", "compiled"])
def test_autocast_and_cells_in_float64_change_no_arithmetic(kernels, traced, monkeypatch):
    """Cells in float64 beside activations in float32 are torch.compile's, whose code another test has."""
    monkeypatch.setitem(kernels_module._MADE, "torch.compile", cache(TracedKernels))
    layer = FAConvLSTM2d(3, 8, attention_every=2, kernels=kernels)
    x, h, c = torch.randn(2, 3, 3, 5, 6), torch.randn(2, 8, 5, 6), torch.randn(2, 8, 5, 6)
    want, _ = layer(x, (h, c))
    want_grads = torch.autograd.grad(want.sum(), list(layer.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = layer(x, (h, c))
    got_grads = torch.autograd.grad(got.sum(), list(layer.parameters()))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_grads, want_grads)
    finer, (_, c_last) = layer(x, (h, c.double()))
    assert c_last.dtype == torch.float64
    torch.testing.assert_close(finer, want, rtol=1e-5, atol=1e-5)
    assert bool(traced.frame_count) == (kernels == "compiled")


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
def test_native_gradients_of_kernels_keep_their_digits_on_large_tiles(kind):
    """A quarter of a degree: sums of a million numbers that are all alike."""
    padded, grad = torch.full((1, 1, 723, 1442), 0.1, dtype=kind), torch.full((1, 1, 721, 1440), 0.1, dtype=kind)
    native_kernels = kernels_for("compiled", padded, padded)
    got = native_kernels.mix_weights(padded, grad, Taps.of(3, (1,)).offsets)
    want = (padded[0, 0, 0, 0].double() * grad[0, 0, 0, 0].double()) * 721 * 1440
    assert ((got.double() - want).abs() / want).max() < 4e-6  # one sum for each lane: 7e-4


def test_what_no_gradient_is_asked_of_keeps_nothing():
    layer, made = FAConvLSTM2d(3, 8, attention_every=0).requires_grad_(False), []
    x = torch.randn(1, 6, 3, 5, 6)
    layer.register_forward_hook(lambda _, __, out: made.append(out))
    for kept in (layer(x), made[-1]):
        assert kept[0].grad_fn is None
    layer.requires_grad_(True)
    with torch.no_grad():
        assert layer(x)[0].grad_fn is None


@pytest.mark.parametrize("kernels", ["eager", "compiled"])
def test_what_does_not_learn_is_not_multiplied_out(kernels, monkeypatch):
    """Neither for W_x and W_h nor for W_a; the gradients of what learns beside them are the same to the last bit."""
    layer, x = randomized(FAConvLSTM2d(3, 8, attention_every=2, kernels=kernels)), random_like((2, 4, 3, 7, 9), 0)
    x.requires_grad_()

    def gradients():
        learning = {name: one for name, one in layer.named_parameters() if one.requires_grad}
        found = torch.autograd.grad(layer(x)[0].square().sum(), [x, *learning.values()])
        return dict(zip(["x", *learning], found, strict=True))

    want, made, passes = gradients(), [], type(kernels_for(kernels, x, x))
    frozen = {"input_weight", "hidden_weight", "expansion_weight"}
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    retreat = passes.retreat

    def retreating(*given):
        grads = retreat(*given)
        made.append(grads[0])
        return grads

    monkeypatch.setattr(passes, "retreat", retreating)
    monkeypatch.setattr(sweep, "_add_product", lambda *given: made.append(given))
    got = gradients()
    assert got.keys() == want.keys() - frozen and all(torch.equal(got[name], want[name]) for name in got)
    assert made == [None] * 4
    mix_weights, products = passes.mix_weights, []
    monkeypatch.setattr(passes, "mix_weights", lambda *given: products.append(mix_weights(*given)) or products[-1])
    gradients()
    assert len(products) == 4
    for name, parameter in layer.named_parameters():  # nor of kernels that nothing is made of that learns
        parameter.requires_grad_(name == "expansion_bias")
    layer(x.detach())[0].square().sum().backward()
    assert len(products) == 4 and layer.expansion_bias.grad.abs().min() > 0


def test_rows_that_need_no_other_tile_are_computed_while_messages_travel():
    """In every step, forward and backward; all of them where columns are cut, before and after."""

    def check(mesh):
        domain, events = Domain(LatLonGrid(9, 12, lat_boundary="zero"), mesh), []

        def told(name, function):
            def call(self, *given):
                (rows,) = [(one.start, one.stop) for one in given if isinstance(one, slice)] or [name]
                events.append(rows)
                return function(self, *given)

            return call

        layer = randomized(FAConvLSTM2d(3, 8, dilations=(2,), attention_every=0, kernels="eager"))
        with pytest.MonkeyPatch.context() as patch:
            for of, names in (
                (HaloExchange, ("start_fill", "fill_received", "start_accumulate", "add_halo")),
                (Kernels, ("mix_and_advance", "mix_and_retreat")),
            ):
                for name in names:
                    patch.setattr(of, name, told(name, getattr(of, name)))
            out, _ = layer(torch.randn(1, 2, 3, *domain.tile.shape).double(), domain=domain)
            out.square().sum().backward()
        return events

    def step(edges, core):
        return 2 * ["start_fill", *core, "fill_received", *edges] + 2 * [*edges, "start_accumulate", *core, "add_halo"]

    north, middle, south = run_on_ranks(Layout(1, 3, 1), check)
    assert (north, south) == (step([(1, 3)], [(0, 1)]), step([(0, 2)], [(2, 3)]))
    assert middle == step([(0, 3)], [])
    north, south = run_on_ranks(Layout(1, 2, 1), check)
    assert (north, south) == (step([(3, 5)], [(0, 3)]), step([(0, 2)], [(2, 4)]))
    for events in run_on_ranks(Layout(1, 1, 2), check):
        assert events == step([(0, 9)], [])
    assert run_on_ranks(Layout(1, 1, 1), check) == [step([], [(0, 9)])]


def test_one_exchange_for_every_step_one_reduction_for_all_and_none_for_recomputation():
    """Of the bottleneck's channels, and its gradient, whatever is computed again."""

    def check(mesh):
        domain = Domain(LatLonGrid(7, 11), mesh)
        counts = []
        for checkpoint_steps in (0, 2):
            options = {"dilations": (1, 2), "attention_every": 0, "checkpoint_steps": checkpoint_steps}
            network = FAConvLSTMNetwork(3, 2, 8, 2, embedding_channels=16, coarse_shape=(2, 2), **options)
            count = Counter()

            def counting(name, function, count=count):
                def call(self, cells):
                    count[name] += 1
                    count[f"{name} channels"] += cells.shape[1]
                    return function(self, cells)

                return call

            methods = [(HaloExchange, "start_fill"), (HaloExchange, "start_accumulate"),
                       (AreaMean, "start"), (AreaMean, "start_gradient"),
                       (RegionMeans, "start"), (RegionMeans, "start_gradient")]  # fmt: skip
            originals = [getattr(*method) for method in methods]
            try:
                for method, original in zip(methods, originals, strict=True):
                    setattr(*method, counting(method[1], original))
                output = network(torch.randn(1, 5, 3, *domain.tile.shape), torch.zeros(1, 5), domain=domain)
                (output.forecast_BTCYX.square().sum() + output.embedding_BTE.square().sum()).backward()
            finally:
                for method, original in zip(methods, originals, strict=True):
                    setattr(*method, original)
            counts.append(count)
        return counts

    for stored, recomputed in run_on_ranks(Layout(1, 1, 2), check):
        for count in (stored, recomputed):
            assert count["start_fill"] == count["start_accumulate"] == 2 * 5
            assert count["start_fill channels"] == count["start_accumulate channels"] == 2 * 5 * 4
        # of each layer's input in each of three segments, and of h, for the embedding; data want no gradient
        assert stored["start"] == 2 + 1 and recomputed["start"] == 3 * (2 + 1)
        assert stored["start_gradient"] == 1 + 1 and recomputed["start_gradient"] == 3 * (1 + 1)


def test_the_passes_have_the_gradients_that_autograd_gives():
    """Each of them against derivatives of the one that it is the gradient of."""
    taps = Taps.of(3, (1, 2))
    u, w = random_like((2, 2, 7, 8), 0).requires_grad_(), random_like((2, 2, 17), 1).requires_grad_()
    rows, columns, y = 3, 4, random_like((2, 2, 3, 4), 2)
    shifted = [u[..., i : i + rows, j : j + columns] * w[..., n, None, None] for n, (i, j) in enumerate(taps.offsets)]
    grad_u, grad_w = torch.autograd.grad(sum(shifted), (u, w), y)
    mixed, back = torch.empty(2, 2, rows, columns).double(), torch.empty_like(u)
    with torch.no_grad():
        EAGER.mix(mixed, u, w, taps.offsets)
        EAGER.mix(back, functional.pad(y, [4] * 4), w, taps.mirrored)
        torch.testing.assert_close(mixed, sum(shifted))
        torch.testing.assert_close(back, grad_u)
        torch.testing.assert_close(EAGER.mix_weights(u, y, taps.offsets), grad_w)

    shapes = (2, 5, 2, 3), (2, 3, 2, 3), (12, 5), (12,), (3, 3)
    given = [random_like(shape, number).requires_grad_() for number, shape in enumerate(shapes)]
    grad_h, grad_c = random_like((2, 3, 2, 3), 8), random_like((2, 3, 2, 3), 9)
    h = torch.zeros(2, 3, 2, 3).double()
    after = torch.zeros_like(h)
    EAGER.advance(h, after, *given[:2], Gates(*given[2:]))
    want = torch.autograd.grad((h, after), given, (grad_h, grad_c))
    with torch.no_grad():
        of_mixed, of_c = given[0].detach().clone(), torch.empty_like(given[1])
        gates = Gates(*given[2:])
        of_weight, of_bias, of_peep = EAGER.retreat(of_mixed, of_c, given[1], gates, grad_h, grad_c)
    for got, one in zip((of_mixed, of_c, of_weight, of_bias, of_peep), want, strict=True):
        torch.testing.assert_close(got, one)


def test_gates_by_exp_are_those_of_the_library_and_end_at_1():
    """In float64 and float32, at any size of a number, infinite ones too."""
    x = torch.cat([torch.linspace(-45, 45, 1001), torch.tensor([0.0, 1e-8, -1e-8, 1e30, -1e30, torch.inf, -torch.inf])])
    for kind, tolerance in ((torch.float64, 4e-16), (torch.float32, 2e-7)):
        for mine, library in zip(BY_EXP, OF_LIBRARY, strict=True):
            torch.testing.assert_close(mine(x.to(kind)), library(x.to(kind)), rtol=0, atol=tolerance)


def all_passes(kernels, batch, rows, columns, kind=torch.float32):
    """What the passes make of the same numbers; samples lie apart, as those of one step of a sequence do."""
    taps = Taps(2, ((0, 1), (2, 2), (4, 3)), ((0, 1, 2),))  # three are compiled in a third of the time of nine

    def numbers(seed, *shape):
        return random_like((batch, 2, *shape), seed).to(kind)[:, 1]

    u, w = numbers(0, 6, rows + 4, columns + 4), numbers(1, 6, 3).contiguous()
    m, c, x, grad_h = (numbers(seed, size, rows, columns) for seed, size in ((2, 6), (3, 7), (4, 5), (5, 7)))
    m, c = m.contiguous(), c.contiguous()
    *parameters, other = (random_like(shape, 9).to(kind) for shape in ((28, 6), (28,), (3, 7), (9, 5)))
    gates = Gates(*parameters)
    h, mixed, c_new = numbers(6, 7, rows, columns).data, torch.empty_like(m), torch.empty_like(c)
    with torch.no_grad():
        kernels.mix(mixed, u, w, taps.offsets)
        kernels.advance(h, c_new, m, c, gates)
        products = (
            kernels.product(other, x),
            kernels.product(other.t(), kernels.product(other, x), x.contiguous(), add=True),
        )
        of_taps, before = kernels.mix_weights(u, m, taps.offsets), torch.empty_like(c)
        sums = kernels.retreat(m, before, c, gates, grad_h, c_new)
        return mixed, of_taps, h, c_new, *products, m, before, *sums


def step_in_pieces(kernels, kind, *edges):
    """h and the new c of a step and the gradients, so many rows at a time; samples lie apart, and m is of several
    passes."""
    rows, columns, taps = 9, 21, tuple(Taps.of(3, (dilation,), reach=2) for dilation in (1, 2))
    u, h, c = (
        random_like((2, 2, *shape), 3).to(kind)[:, 1]
        for shape in ((3, rows + 4, columns + 4), *[(5, rows, columns)] * 2)
    )
    c, after = c.contiguous(), torch.zeros_like(c, memory_format=torch.contiguous_format)
    gates = Gates(*(random_like(shape, 9).to(kind) for shape in ((20, 6), (20,), (3, 5))))
    mixing = Mixing(u, taps, [random_like((2, 3, 9), seed).to(kind) for seed in (1, 2)])
    room = kernels.room(c, gates.weight)
    with torch.no_grad():
        for first, end in pairwise((0, *edges, rows)):
            kernels.mix_and_advance(h.data, after, mixing, c, gates, room, slice(first, end))
        grad_mixed, before, sums = torch.zeros(2, 6, rows, columns + 3, dtype=kind)[..., 2:-1], torch.zeros_like(c), []
        for first, end in pairwise((0, *edges, rows)):
            given = mixing, c, gates, h.data, after, room, slice(first, end)
            sums.append(kernels.mix_and_retreat(grad_mixed, before, *given))
    return h, after, grad_mixed, before, *(sum(parts) for parts in zip(*sums, strict=True))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_step_of_some_rows_after_the_other_is_a_step(kind):
    compiled = kernels_for("compiled", *[torch.empty(0, dtype=kind)] * 2)
    whole = step_in_pieces(EAGER, kind)
    for kernels in (EAGER, compiled):
        for edges in ((), (1,), (2, 7), (8,), (1, 2, 3, 4)):
            torch.testing.assert_close(step_in_pieces(kernels, kind, *edges), whole, rtol=2e-5, atol=2e-5)


def attentions(kernels, lines, cells, others, heads, size, kind=torch.float32):
    """What attention makes of the same numbers and its gradients, along rows and columns of one tensor, and of others;
    logits are far from 0, as those of a trained network are."""

    def numbers(seed, *shape):
        return random_like(shape, seed).to(kind)

    def turn(seed, count):
        angles = numbers(seed, count, 1, size // 2)
        return Turn(angles.cos(), angles.sin())

    field, results = 3 * numbers(0, 2, lines, cells, 6 * heads * size).requires_grad_(), []
    rows, columns = (half.unflatten(-1, (3, heads, size)) for half in field.chunk(2, dim=-1))
    far = 3 * numbers(1, 2, lines, others, 2, heads, size).requires_grad_()
    for own, more, keys, bias in (
        (rows, None, cells, None),
        (columns.transpose(1, 2), None, lines, -20 * numbers(2, lines).abs()),
        (rows[:, :, :, :1], far, others, numbers(3, others)),
    ):
        attended = kernels.attend(own, more, turn(4, own.shape[2]), turn(5, keys), bias)
        grads = torch.autograd.grad(attended, (field, far), numbers(6, *attended.shape), allow_unused=True)
        results += attended.detach(), *(grad for grad in grads if grad is not None)
    return results


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_native_passes_equal_eager_ones(kind, threads):
    """Of cells that fill a block and that do not, of one row, of one cell; with the same bits every time."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for shape in ((1, 9, 10), (2, 1, 7), (3, 1, 1), (2, 13, 53), (1, 5, 32)):
            native = kernels_for("compiled", *[torch.empty(0, dtype=kind)] * 2)
            assert native is not EAGER
            results = [all_passes(kernels, *shape, kind) for kernels in (native, native, EAGER)]
            for one, again, eager in zip(*results, strict=True):
                assert torch.equal(one, again)
                exact = {"rtol": 2e-5, "atol": 2e-5} if kind == torch.float32 else {"rtol": 1e-13, "atol": 1e-13}
                torch.testing.assert_close(one, eager, **exact)
        for sizes in ((3, 7, 5, 2, 2), (2, 50, 31, 1, 6), (1, 1, 1, 1, 4), (5, 24, 100, 3, 16)):
            results = [attentions(kernels, *sizes, kind) for kernels in (native, native, EAGER)]
            assert len(results[0]) == 7
            for one, again, eager in zip(*results, strict=True):
                assert torch.equal(one, again)
                exact = {"rtol": 1e-4, "atol": 1e-4} if kind == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
                torch.testing.assert_close(one, eager, **exact)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "flags",
    [["-march=x86-64", "-O1"], ["-DVECTOR_BYTES=64", "-DACROSS=2", "-DBLOCKS=3", "-Wno-psabi", "-O1"]],
    ids=["narrow vectors", "wide vectors"],
)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names another processor's vectors")
def test_native_passes_for_processors_that_are_not_here(monkeypatch, flags):
    """Compilers make two of a vector that is too wide."""
    machine = [flag for flag in native.FLAGS if not (flag.startswith("-march") and flags[0].startswith("-march"))]
    monkeypatch.setattr(native, "FLAGS", (*machine, *flags))
    library = native.library.__wrapped__()
    monkeypatch.setattr(native, "library", lambda: library)
    kernels = native.NativeKernels()
    for shape in ((1, 9, 10), (2, 13, 53), (1, 2, 192)):
        for one, eager in zip(all_passes(kernels, *shape), all_passes(EAGER, *shape), strict=True):
            torch.testing.assert_close(one, eager, rtol=2e-5, atol=2e-5)
    of_both = [attentions(one, 3, 37, 50, 2, 6, torch.float64) for one in (kernels, EAGER)]
    torch.testing.assert_close(*of_both, rtol=1e-12, atol=1e-12)


def test_native_gates_at_the_ends_of_their_range():
    """What saturates does, what is no number stays none."""
    bias = torch.tensor([0.0, 1e-8, 30.0, -30.0, 200.0, -200.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan])
    channels = len(bias)
    gates = Gates(torch.zeros(4 * channels, 1), bias.repeat(4), torch.zeros(3, channels))
    given = torch.zeros(1, 1, 2, 3), torch.ones(1, channels, 2, 3), gates
    outcomes = []
    for kernels in (kernels_for("compiled", *[torch.empty(0)] * 2), EAGER):
        h, after = torch.empty(2, 1, channels, 2, 3).unbind()
        kernels.advance(h, after, *given)
        outcomes.append((h, after))
    torch.testing.assert_close(*outcomes, equal_nan=True, rtol=1e-6, atol=1e-6)
    assert outcomes[0][0][:, :-1].isfinite().all() and outcomes[0][0][:, -1].isnan().all()


@pytest.fixture
def traced(monkeypatch):
    """Kernels that are traced as on a GPU, without Triton, which is not there; counts traces."""
    from torch._dynamo.testing import CompileCounterWithBackend  # two seconds, of every worker

    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    yield counter
    torch.compiler.reset()


def test_any_number_of_shapes_can_be_traced(traced):
    """More than the compilations of one function after which torch gives up: eight by default, three here."""
    offsets = ((0, 1), (2, 2), (4, 3))
    with torch._dynamo.config.patch(recompile_limit=3):
        kernels = TracedKernels()
        for batch, rows, columns in [(1, 9, 10), (2, 6, 7), (1, 1, 10), (2, 8, 1), (1, 1, 1)]:
            u, w = random_like((batch, 6, rows + 4, columns + 4), 0), random_like((batch, 6, 3), 1)
            mixed = [torch.empty(batch, 6, rows, columns).double() for _ in range(2)]
            kernels.mix(mixed[0], u, w, offsets)
            EAGER.mix(mixed[1], u, w, offsets)
            torch.testing.assert_close(*mixed)
    assert traced.frame_count > 3


def test_traced_passes_compiled_by_torch_equal_eager_ones():
    """What a GPU gets of Triton, in C++ here: at sizes that are numbers in the code, then at symbols."""
    kernels = TracedKernels()
    for shape in ((1, 9, 10), (2, 1, 7)):
        for one, eager in zip(all_passes(kernels, *shape), all_passes(EAGER, *shape), strict=True):
            torch.testing.assert_close(one, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"fuse": "concat", "se_reduction": 0}], ids=str)
def test_a_compiled_layer_is_the_eager_one(more):
    options = {"dilations": (1, 2), "attention_every": 2} | more
    layers = [FAConvLSTM2d(3, 8, kernels=mode, **options) for mode in ("eager", "compiled")]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 3, 3, 9, 10)
    outs, grads = [], []
    for layer in layers:
        outs.append(layer(x)[0])
        grads.append(torch.autograd.grad(outs[-1].square().sum(), list(layer.parameters())))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("compiler", "told"),
    [("no-such-compiler", "needs a C\\+\\+ compiler, and no-such-compiler: No such file.*use kernels: eager"),
     ("false", "false .*failed: exit code 1.*Install g\\+\\+")],
)  # fmt: skip
def test_without_a_compiler_there_is_a_way_out(monkeypatch, tmp_path, compiler, told):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(InputError, match=told):
        native.library.__wrapped__()
    assert not list(tmp_path.rglob("*.so*"))


@pytest.fixture
def short_source(monkeypatch, tmp_path_factory):
    """A library that is built in a tenth of a second, where not what is in it counts but where it lies."""
    source = tmp_path_factory.mktemp("source") / "short.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(native, "_SOURCES", (source,))


def assert_built(library):
    assert library.answer() == 42


@pytest.mark.parametrize("way", ["others may write", "a link"])
def test_what_others_can_write_is_not_loaded(monkeypatch, tmp_path, short_source, way):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    predictable, theirs = tmp_path / f"faconv_hpc-{os.getuid()}", tmp_path / "theirs"
    theirs.mkdir()
    if way == "a link":
        predictable.symlink_to(theirs)
    else:
        predictable.mkdir()
        predictable.chmod(0o777)
    assert_built(native.library.__wrapped__())
    assert not list(predictable.iterdir()) and not list(theirs.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {predictable.name, "theirs"}


def test_a_damaged_library_is_built_anew(monkeypatch, tmp_path, short_source):
    (tmp_path / "whole").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "whole"))
    assert_built(native.library.__wrapped__())
    (whole,) = tmp_path.rglob("*.so")
    damaged = tmp_path / "damaged" / whole.parent.name / whole.name
    damaged.parent.mkdir(parents=True, mode=0o700)
    damaged.write_bytes(b"not a library")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "damaged"))
    assert_built(native.library.__wrapped__())
    assert damaged.stat().st_size == whole.stat().st_size


def test_where_nothing_can_be_kept_there_is_a_way_out(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(InputError, match=r"cannot keep or load what it builds under .*missing.*Set TMPDIR"):
        native.library.__wrapped__()


def test_a_forward_without_backward_frees_everything():
    """What checkpointing keeps must not keep itself alive: the garbage collector cannot see such a cycle."""
    network = FAConvLSTMNetwork(3, 2, 8, 1, embedding_channels=16, checkpoint_steps=1, attention_every=0)
    domain = Domain(LatLonGrid(8, 12))
    x = torch.randn(1, 2, 3, 8, 12)
    kept = []
    hook = network.layers[0].register_forward_pre_hook(lambda module, inputs: kept.append(weakref.ref(inputs[0])))
    network(x, torch.zeros(1, 2), domain=domain)
    hook.remove()
    gc.collect()
    assert len(kept) == 2 and all(one() is None for one in kept)


def test_a_checkpointed_segment_keeps_its_last_states_alone():
    """What a layer says of every step is computed again, so that its memory is free until then."""
    network = FAConvLSTMNetwork(3, 2, 8, 2, embedding_channels=16, checkpoint_steps=3, attention_every=2)
    domain, said = Domain(LatLonGrid(8, 12)), []
    for layer in network.layers:
        layer.register_forward_hook(lambda _, __, out: said.append(StorageWeakRef(out[0].untyped_storage())))
    output = network(torch.randn(1, 6, 3, 8, 12), torch.zeros(1, 6), domain=domain)
    gc.collect()
    assert len(said) == 4 and all(one.expired() for one in said)
    output.forecast_BTCYX.sum().backward()


def most_allocated(work):
    """Bytes of tensors that there are at most while it works, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    of_memory = (one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]")
    changes = sorted((one.start_ns(), one.nbytes()) for one in of_memory)
    return max(accumulate(change for _, change in changes))


@pytest.mark.parametrize("options", [{"attention_every": 2}, {"cell": "convlstm"}], ids=str)
def test_four_segments_take_less_memory_than_two_that_are_stored(options):
    network, domain = FAConvLSTMNetwork(4, 4, 16, 2, embedding_channels=16, **options), Domain(LatLonGrid(24, 32))

    def peak(steps, checkpoint_steps):
        x, network.checkpoint_steps = torch.randn(1, steps, 4, 24, 32), checkpoint_steps

        def work():
            output = network(x, torch.zeros(1, steps), domain=domain)
            network.losses(output, x, x, domain).total.objective.backward()
            network.zero_grad()

        return most_allocated(work)

    assert peak(16, 4) < peak(8, 0)


def test_second_derivatives_are_refused():
    domain = Domain(LatLonGrid(6, 8))
    x = random_like((1, 2, 6, 8), 0).requires_grad_()
    (gradient,) = torch.autograd.grad(domain.pad(x, 1).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_training_after_inference_mode():
    domain = Domain(LatLonGrid(6, 8))
    layer = FAConvLSTM2d(3, 8, attention_every=1)
    x = torch.randn(1, 2, 3, 6, 8)
    with torch.inference_mode():
        layer(x, domain=domain)
    layer(x, domain=domain)[0].sum().backward()


@pytest.mark.parametrize("cell", ["faconvlstm", "convlstm"])
def test_a_sequence_in_pieces_equals_the_whole(cell):
    options = {"attention_every": 3} if cell == "faconvlstm" else {}
    network = randomized(FAConvLSTMNetwork(3, 2, 8, 2, cell=cell, embedding_channels=16, **options))
    x, season = random_like((2, 7, 3, 6, 8), 0), random_like((2, 7), 1).sigmoid()
    whole = network(x, season)
    first = network(x[:, :2], season[:, :2])
    second = network(x[:, 2:], season[:, 2:], state=first.state, first_step=2)
    for name in ("tendency_BTCYX", "embedding_BTE", "coarse_BTKCRS"):
        joined = torch.cat([getattr(first, name), getattr(second, name)], dim=1)
        torch.testing.assert_close(joined, getattr(whole, name), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second.state.layers[1][0], whole.state.layers[1][0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", ["faconvlstm", "convlstm"])
def test_sequences_of_different_length_equal_each_by_itself(cell):
    options = {"attention_every": 2} if cell == "faconvlstm" else {}
    network = randomized(
        FAConvLSTMNetwork(3, 2, 8, 2, cell=cell, embedding_channels=16, coarse_shape=(2, 2), **options)
    )
    x, season, target = (
        random_like((2, 5, 3, 6, 8), 0),
        random_like((2, 5), 1).sigmoid(),
        random_like((2, 5, 2, 6, 8), 2),
    )
    lengths, domain = (3, 5), Domain(LatLonGrid(6, 8))
    valid_BT = torch.arange(5) < torch.tensor(lengths)[:, None]
    together = network(x, season, domain=domain, valid_BT=valid_BT)
    loss = network.losses(together, x, target, domain).total
    losses = []
    for sample, length in enumerate(lengths):
        part = (slice(sample, sample + 1), slice(length))
        alone = network(x[part], season[part], domain=domain)
        losses.append(network.losses(alone, x[part], target[part], domain).total.value)
        torch.testing.assert_close(together.tendency_BTCYX[part], alone.tendency_BTCYX)
        torch.testing.assert_close(together.embedding_BTE[part], alone.embedding_BTE)
        torch.testing.assert_close(together.state.layers[1][0][sample], alone.state.layers[1][0][0])
    torch.testing.assert_close(loss.value, torch.stack(losses).mean())
    x_beyond = x.clone()
    x_beyond[0, 3:] = 100.0  # what lies beyond the end changes nothing
    beyond = network(x_beyond, season, domain=domain, valid_BT=valid_BT)
    torch.testing.assert_close(
        network.forecast_loss(beyond, target, domain).value, network.forecast_loss(together, target, domain).value
    )


def beyond_the_end(x, valid_BT):
    """The same with no numbers at the steps that are not valid."""
    filled = x.clone()
    filled[~valid_BT] = torch.nan
    return filled


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        ("faconvlstm", {"attention_every": 2}),
        ("faconvlstm", {"attention_every": 3, "kernels": "compiled", "checkpoint_steps": 2}),
        ("convlstm", {}),
    ],
    ids=["eager", "compiled, in segments", "convlstm"],
)
def test_what_fills_up_a_sequence_reaches_neither_losses_nor_gradients(cell, options):
    """Nor do no numbers: 0 times them is none."""
    options = options | {"embedding_channels": 16, "coarse_shape": (2, 2)}
    network, domain = randomized(FAConvLSTMNetwork(3, 2, 8, 2, cell=cell, **options)), Domain(LatLonGrid(5, 7))
    x, target, season = random_like((2, 5, 3, 5, 7), 0), random_like((2, 5, 2, 5, 7), 2), random_like((2, 5), 1)
    valid_BT = torch.arange(5) < torch.tensor([[3], [5]])
    known = random_like(target.shape, 3) > -1
    x_filled, target_filled, season_filled = (beyond_the_end(one, valid_BT) for one in (x, target, season.sigmoid()))
    weights = list(network.parameters())

    def with_gradients(x, season, target, known, valid=None):
        output = network(x, season, domain=domain, valid_BT=valid)
        loss = network.losses(output, x, target, domain, known).total
        return loss.value, *torch.autograd.grad(loss.objective, weights)

    alone = []
    for sample, length in enumerate((3, 5)):
        part = (slice(sample, sample + 1), slice(length))
        alone.append(with_gradients(x[part], season.sigmoid()[part], target[part], known[part]))
    want = [torch.stack(of_samples).mean(0) for of_samples in zip(*alone, strict=True)]
    got = with_gradients(x_filled, season_filled, target_filled, known, valid_BT)
    torch.testing.assert_close(list(got), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [lambda: FAConvLSTM2d(3, 8, attention_every=2), lambda: ConvLSTM2d(3, 8)])
def test_a_layer_takes_no_numbers_where_a_sample_has_ended(make):
    layer, x, valid_BT = randomized(make()), random_like((2, 5, 3, 5, 7), 0), torch.ones(2, 5, dtype=torch.bool)
    valid_BT[0, 2:], valid_BT[1, 1] = False, False
    found = []
    for given in (x, beyond_the_end(x, valid_BT)):
        given.requires_grad_()
        out, (h, c) = layer(given, valid_BT=valid_BT)
        objective = (out * random_like(out.shape, 1)).sum() + (h * c).sum()
        found.append([out, h, c, *torch.autograd.grad(objective, [given, *layer.parameters()])])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert found[1][3][valid_BT].abs().min() > 0 and not found[1][3][~valid_BT].any()


@pytest.mark.parametrize("make", [
    lambda x: FAConvLSTM2d(3, 8, attention_every=0)(x),
    lambda x: FAConvLSTM2d(3, 8, attention_every=2)(x),
    lambda x: ConvLSTM2d(3, 8)(x),
    lambda x: FAConvLSTMNetwork(3, 2, 8, 1, embedding_channels=16, coarse_shape=(2, 2))(x, x.new_zeros(2, 0)),
    lambda x: SubspaceHead(8, 16, 2, (2, 2))(x.new_zeros(2, 0, 8, 2, 2), x.new_zeros(2, 0)),
], ids=["layer", "attention", "convlstm", "network", "head"])  # fmt: skip
def test_a_sequence_of_no_steps_is_refused(make):
    with pytest.raises(InputError, match=r"a sequence of 0 steps has no output and no last state\. Give it one step"):
        make(torch.zeros(2, 0, 3, 6, 8))


def test_rotating_the_globe_rotates_the_output():
    domain = Domain(LatLonGrid(7, 12, lat_boundary="pole"))
    layer = randomized(FAConvLSTM2d(2, 8, attention_every=1))
    x = random_like((1, 3, 2, 7, 12), 0)
    out = layer(x, domain=domain)[0]
    turned = layer(x.roll(5, dims=-1), domain=domain)[0]
    assert relative_difference(turned, out.roll(5, dims=-1)) < 1e-12
    without = layer(x.flip(-2), domain=domain)[0]
    assert relative_difference(without, out.flip(-2)) > 1e-3  # north and south are told apart


def test_column_attention_weighs_keys_by_area():
    """With equal logits, the attended value is the area-weighted mean of the column."""
    grid = LatLonGrid(6, 4)
    module = AxialAttention(4, reduction=1).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.zero_()
            if name.endswith(".out"):
                parameter.copy_(torch.eye(4))
        module.columns.qkv[8:] = torch.eye(4)  # values are h itself, queries and keys are zero
        module.gamma.fill_(1.0)
    h = random_like((1, 4, 6, 4), 0)
    area = torch.as_tensor(grid.cell_area_sr)[:, None]
    want = ((h * area).sum(-2, keepdim=True) / area.sum()).expand_as(h)
    torch.testing.assert_close(module(h, Domain(grid)) - h, want)


def test_switching_parts_off_changes_the_parameters():
    names = set(dict(FAConvLSTM2d(3, 8).named_parameters()))
    assert {name.split(".")[0] for name in names} >= {"attention", "peephole_weight"}
    bare = set(FAConvLSTM2d(3, 8, peephole=False, attention_every=0).state_dict())
    assert not any("attention" in name or "peephole" in name for name in bare)


def test_peepholes_and_attention_are_trained():
    layer = FAConvLSTM2d(3, 8, attention_every=2)
    layer(torch.randn(1, 3, 3, 6, 8))[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_bfloat16_activations_keep_a_float32_cell_state():
    for layer in (FAConvLSTM2d(3, 8, attention_every=2), ConvLSTM2d(3, 8)):
        layer = layer.to(torch.bfloat16)
        out, (h, c) = layer(torch.randn(1, 3, 3, 6, 8, dtype=torch.bfloat16))
        assert out.dtype == h.dtype == torch.bfloat16 and c.dtype == torch.float32
        out.float().square().sum().backward()


def test_the_cost_rule_for_attention():
    def rule(ranks, lines=24, dtype=torch.float32):
        return cheaper_exchange(lines, [5] * ranks, 4, dtype)

    assert [rule(ranks) for ranks in (1, 2, 3, 8)] == ["gather", "gather", "swap", "swap"]
    assert rule(2, dtype=torch.bfloat16) == "swap"  # the adjoint of gather sums in float32
    assert rule(8, lines=1) == "gather"  # one rank would have the only line
    even = exchange_costs(24, [5] * 4, 4, torch.float32)
    tile_bytes = 24 * 5 * 4 * 4
    assert even["gather"] == ExchangeCost(12 * tile_bytes, 2, 10 * tile_bytes)
    assert even["swap"] == ExchangeCost(6 * tile_bytes, 4, 4 * tile_bytes)


@pytest.mark.parametrize("exchange", ["gather", "swap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("axis", ["lon", "lat"])
@pytest.mark.parametrize("way", ["one host", "gloo"])
def test_the_cost_rule_counts_the_bytes_that_the_collectives_bring(exchange, dtype, axis, way):
    """On uneven tiles, lines that the ranks do not divide."""

    def check(mesh):
        domain = Domain(LatLonGrid(7, 11), mesh)
        attention = AxialAttention(8, heads=2, reduction=2, exchange=exchange).to(dtype)
        x = torch.randn(2, *domain.tile.shape, 12).to(dtype).requires_grad_()
        received = dict.fromkeys(("bytes", "phases"), 0)

        def counting(collective, brought):
            def call(into, source, *sizes, **options):
                received["bytes"] += brought(into, sizes) * into.element_size()
                received["phases"] += 1
                return collective(into, source, *sizes, **options)

            return call

        def counting_messages(outgoing, incoming, group):
            received["bytes"] += sum(into.nbytes for into in incoming.values())
            received["phases"] += 1
            return start_messages(outgoing, incoming, group)

        ranks, index = mesh.size(axis), mesh.index(axis)
        brought = {
            (collectives, "_all_gather"): lambda into, sizes: into.numel() * (ranks - 1) // ranks,
            (collectives, "_reduce_scatter"): lambda into, sizes: into.numel() * (ranks - 1),
            (dist, "all_to_all_single"): lambda into, sizes: (
                into.numel() - (sizes[0] if sizes else [into.numel() // ranks] * ranks)[index]
            ),
        }
        lines_attention = attention.rows if axis == "lon" else attention.columns
        with pytest.MonkeyPatch.context() as patch, hosts_of(1 if way == "gloo" else ranks):
            for place, function in brought.items():
                patch.setattr(*place, counting(getattr(*place), function))
            patch.setattr(collectives, "start_messages", counting_messages)
            lines_attention(x, domain).float().square().sum().backward()
        lines_of_heads = 2 * domain.tile.shape[0 if axis == "lon" else 1] * 2
        return received, exchange_costs(lines_of_heads, domain.cuts.sizes(axis), 2, dtype)[exchange]

    answers = run_on_ranks(Layout(1, 1, 3) if axis == "lon" else Layout(1, 3, 1), check)
    assert max(received["bytes"] for received, _ in answers) == answers[0][1].moved_bytes > 0
    assert {received["phases"] for received, _ in answers} == {answers[0][1].phases}


def test_coarse_means_are_means_over_regions():
    grid = LatLonGrid(7, 9)
    x = random_like((1, 1, 1, 7, 9), 0)
    means, counts = coarse_means(x, Domain(grid), (2, 3))
    assert counts is None
    got = means[0, 0, 0]
    area = torch.as_tensor(grid.cell_area_sr)[:, None].expand(7, 9)
    rows, columns = torch.arange(7) * 2 // 7, torch.arange(9) * 3 // 9
    for r in range(2):
        for c in range(3):
            inside = (rows == r)[:, None] & (columns == c)
            torch.testing.assert_close(got[r, c], (x[0, 0, 0] * area)[inside].sum() / area[inside].sum())


def test_coarse_means_leave_missing_cells_out():
    known = torch.ones(1, 1, 1, 4, 6)
    known[..., :2, :] = torch.tensor([1.0, 0, 1, 0, 0, 0])  # of the northern regions, the last has no cell
    x = torch.where(known == 1, 2.0, 7.0)
    fresh = torch.where(known == 1, known, 0.5)  # those have an older value
    means, counts = coarse_means(x, Domain(LatLonGrid(4, 6)), (2, 3), fresh)
    torch.testing.assert_close(means[0, 0, 0], torch.tensor([[2.0, 2, 0], [2, 2, 2]]))
    assert counts[0, 0, 0].tolist() == [[True, True, False], [True, True, True]]


def test_the_seasonal_encoding_closes_the_year():
    encoding = seasonal_encoding(torch.tensor([[0.0, 0.25, 1.0]]), 4)
    torch.testing.assert_close(encoding[0, 0], encoding[0, 2])
    torch.testing.assert_close(encoding[0, 1, :2], torch.tensor([1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FAConvLSTM2d(3, 8, kernel_size=4), "kernel_size=4 has no centre"),
        (lambda: FAConvLSTM2d(3, 8, dilations=()), r"dilations=\(\) must be one or more"),
        (lambda: FAConvLSTM2d(3, 8, fuse="mean"), "fuse='mean' is not known. Use one of sum, concat"),
        (lambda: FAConvLSTM2d(3, 8, se_reduction=-1), r"se_reduction=-1 must be 0 \(no squeeze-and-excitation\)"),
        (lambda: FAConvLSTM2d(3, 8, attention_heads=0), "attention_heads=0 must be 1 or more"),
        (lambda: FAConvLSTM2d(3, 8, attention_reduction=0), r"attention_reduction=0 must be 1 \(as many channels"),
        (lambda: FAConvLSTM2d(3, 8, attention_exchange="ring"), "attention_exchange='ring' is not known"),
        (lambda: FAConvLSTM2d(3, 8, kernels="fast"), "kernels='fast' is not known. Use one of eager, compiled, triton"),
        (
            lambda: FAConvLSTM2d(3, 8)(torch.zeros(1, 2, 4, 5, 6)),
            r"takes \(batch, time, 3 channels.*got \(1, 2, 4, 5, 6\)",
        ),
        (lambda: ConvLSTM2d(3, 8, 2), "kernel_size=2 has no centre"),
        (lambda: ConvLSTM2d(3, 8, padding="full"), "padding='full' is not known"),
        (lambda: ConvLSTM2d(3, 8, recurrent_activation="relu"), "recurrent_activation='relu' is not known"),
        (lambda: FAConvLSTMNetwork(3, 4), "field_channels=4 must be between 1 and in_channels=3"),
        (lambda: FAConvLSTMNetwork(3, 3, cell="gru"), "cell='gru' is not known"),
        (lambda: FAConvLSTMNetwork(3, 3, embedding_channels=12), "embedding_channels=12 over 4 heads.*multiple of 8"),
    ],
)
def test_what_a_layer_refuses(make, message):
    with pytest.raises(InputError, match=message):
        make()
