"""What bf16 rounds, and what it does not: inputs, sums, gradients."""

import copy

import pytest
import torch

from faconv_hpc import ConvLSTM2d, Domain, FAConvLSTM2d, FAConvLSTMNetwork, LatLonGrid
from faconv_hpc.errors import InputError
from faconv_hpc.model.feedback import Feedback
from faconv_hpc.model.memoryless import DepthwiseMixer2d, Linear2d
from faconv_hpc.model.peers import DepthwiseConvLSTM2d
from test_domain import random_like

EPS = 2.0**-8
"""Of bf16: the largest relative error of a rounding is half of it."""


def root_mean_square(value):
    return value.double().square().mean().sqrt().item()


def error(got, want):
    return root_mean_square(got.double() - want.double()) / root_mean_square(want)


def field_and_after(change=0.02):
    """Two channels: a field as large as normalised ones are, and the field after a small change; float32."""
    field = 2 * random_like((2, 1, 1, 9, 12), 1) + 3
    return torch.cat([field, field + change * random_like(field.shape, 2)], dim=2).float()


def in_both(make):
    """A module in bf16, and in float64 with the same weights."""
    low, exact = make().to(torch.bfloat16), make().double()
    exact.load_state_dict({name: value.double() for name, value in low.state_dict().items()})
    return low, exact


def small_differences(of):
    """A layer whose bottleneck is the difference of two inputs, or that of an input from a bias; inputs without and
    with a small change, float32."""
    torch.manual_seed(0)
    inputs = 2 if of == "inputs" else 1
    layer = FAConvLSTM2d(inputs, 8, attention_every=0)
    weight = torch.tensor([[-8.0, 8.0]]) if inputs == 2 else torch.tensor([[8.0]])
    with torch.no_grad():
        layer.input_weight.copy_(weight.expand(4, inputs))
        layer.bottleneck_bias.fill_(0.0 if inputs == 2 else -24.0)
    x = field_and_after()
    if inputs == 2:
        return layer, torch.cat([x[:, :, :1], x[:, :, :1]], dim=2), x
    change = x[:, :, 1:] - x[:, :, :1]
    return layer, torch.full_like(change, 3.0), 3 + change


@pytest.mark.parametrize("of", ["inputs", "input and bias"])
def test_a_small_change_of_a_large_field_reaches_the_layer(of):
    """Rounded to bf16, an input of 3 is off by up to 0.008, 0.0045 in the mean: 22 percent of such a change."""
    low, exact = in_both(lambda: small_differences(of)[0])
    _, before, x = small_differences(of)
    base = exact(before.double())[0]
    seen, want = low(x)[0].double() - base, exact(x.double())[0] - base
    # h is some tenths, of which half an EPS is lost; so is as much of u, of m, of the pre-activations
    assert error(seen, want) < 4 * EPS * root_mean_square(exact(x.double())[0]) / root_mean_square(want) < 0.3
    assert error(low(x.bfloat16())[0].double() - base, want) > 0.2


def test_a_forecast_sees_a_small_change_of_its_inputs():
    """The head is linear in the inputs: of float32 inputs its weights in bf16 make a float32 forecast."""

    def make():
        torch.manual_seed(0)
        network = FAConvLSTMNetwork(2, 1, 8, 1, attention_every=0, embedding_channels=16, coarse_shape=(2, 3))
        with torch.no_grad():
            network.forecast.from_inputs.weight.copy_(torch.tensor([-1.0, 1.0])[None, :, None, None])
        return network

    x, season = field_and_after(), torch.zeros(2, 1, dtype=torch.float64)
    low, exact = in_both(make)
    want = exact(x.double(), season).forecast_BTCYX
    got = low(x, season).forecast_BTCYX
    assert got.dtype == torch.float32 and error(got, want) < 1e-4
    assert error(low(x.bfloat16(), season).forecast_BTCYX, want) > 0.1


def test_a_free_run_moves_on_by_changes_that_bf16_would_lose():
    last = field_and_after()[:, 0]
    feedback = Feedback(window=1, step=(0.01, 0.01), fresh=(None, None), forcings=2)
    after = feedback.inputs(last, torch.zeros_like(last), torch.ones_like(last))
    torch.testing.assert_close(after - last, torch.full_like(last, 0.01), rtol=1e-3, atol=0)


@pytest.mark.parametrize("make", [
    lambda: FAConvLSTM2d(3, 8, attention_every=3),
    lambda: FAConvLSTM2d(3, 8, attention_every=0, fuse="concat"),
    lambda: ConvLSTM2d(3, 8),
    lambda: DepthwiseConvLSTM2d(3, 8),
    lambda: Linear2d(3, 8),
], ids=["attention", "concat", "convlstm", "depthwise convlstm", "linear"])  # fmt: skip
def test_gradients_in_bf16_are_within_its_roundings(make):
    """Against float64 of the same weights. Ten tensors of a step are rounded on the way there and back (u, kernels, m,
    pre-activations, h, and the gradients of each): in the mean by EPS over the root of 12, as good as independently, so
    in T steps by the root of 10 T of that."""
    steps, grid = 12, LatLonGrid(9, 12, lat_boundary="pole")
    torch.manual_seed(3)
    low, exact = in_both(make)
    x, weight = random_like((2, steps, 3, 9, 12), 1).float(), random_like((2, steps, 8, 9, 12), 2)
    grads = []
    for module, given in ((low, x), (exact, x.double())):
        out = module(given, domain=Domain(grid))[0]
        (out.double() * weight).sum().backward()
        grads.append(torch.cat([one.grad.double().flatten() for one in module.parameters()]))
    assert EPS / 100 < error(*grads) < EPS / 12**0.5 * (10 * steps) ** 0.5


def test_sums_over_sweeps_are_made_in_float32():
    """At weights of 0 every step adds 1/2 to the gradient of this bias: a sum in bf16 would stop at 128."""
    layer = FAConvLSTM2d(1, 2, attention_every=1, attention_heads=1).to(torch.bfloat16)
    for parameter in layer.parameters():
        parameter.data.zero_()
    out, _ = layer(torch.zeros(1, 600, 1, 1, 1))
    (grad,) = torch.autograd.grad(out.float().sum(), layer.expansion_bias)
    torch.testing.assert_close(grad[4:6].float(), torch.full((2,), 299.5), rtol=EPS / 2, atol=0)


def test_an_input_that_a_layer_would_round_is_refused():
    for layer in (FAConvLSTM2d(1, 4, attention_every=0), ConvLSTM2d(1, 4), DepthwiseMixer2d(1, 4, 3)):
        with pytest.raises(InputError, match=r"weights are torch\.float32, the input torch\.bfloat16.*takes torch\.fl"):
            layer(torch.zeros(1, 1, 1, 4, 4, dtype=torch.bfloat16))


def test_the_mean_of_bf16_is_squeezed_as_it_is():
    """Between two numbers of bf16, to one of which it would be rounded."""
    low = FAConvLSTM2d(3, 8, attention_every=0).to(torch.bfloat16)
    exact = copy.deepcopy(low).float()
    x_BTCYX = torch.where(torch.arange(6) % 2 == 0, 1.0, 1 + 2 * EPS).expand(1, 2, 3, 4, 6)
    found, want = (
        one.dilation_weights(x, Domain.plane(4, 6)) / one.mixing_weight.norm(dim=-1)
        for one, x in ((low, x_BTCYX.bfloat16()), (exact, x_BTCYX))
    )
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)
