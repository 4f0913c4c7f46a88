"""Depthwise peers of ConvLSTM, by their equations written out; on tiles they are in test_parity.py."""

import pytest
import torch
from torch.nn import functional

from faconv_hpc.errors import InputError
from faconv_hpc.model.peers import BottleneckLSTM2d, DepthwiseConvLSTM2d
from test_domain import random_like
from test_parity import randomized, relative_difference

PEERS = [BottleneckLSTM2d, DepthwiseConvLSTM2d]
INPUTS, HIDDEN, STEPS = 3, 4, 3


def depthwise(x_CYX, kernel_C1KK, bias_C):
    """Cell by cell: the sum over the neighbours that are on the plane."""
    size = kernel_C1KK.shape[-1]
    _, rows, columns = x_CYX.shape
    out = torch.zeros_like(x_CYX) + bias_C[:, None, None]
    for row in range(rows):
        for column in range(columns):
            for i in range(size):
                for j in range(size):
                    y, x = row + i - size // 2, column + j - size // 2
                    if 0 <= y < rows and 0 <= x < columns:
                        out[:, row, column] = out[:, row, column] + kernel_C1KK[:, 0, i, j] * x_CYX[:, y, x]
    return out


def pointwise(weight_OI11, x_IYX):
    return torch.einsum("oi,iyx->oyx", weight_OI11[:, :, 0, 0], x_IYX)


def bottleneck_lstm(layer, x, h, c):
    """Liu and Zhu, section 3.2: one bottleneck of input and state together, all convolutions depthwise separable."""
    kernels = torch.cat([layer.input_depthwise, layer.hidden_depthwise])
    biases = torch.cat([layer.input_depthwise_bias, layer.hidden_depthwise_bias])
    to_bottleneck = torch.cat([layer.input_weight, layer.hidden_weight], dim=1)
    spread = depthwise(torch.cat([x, h]), kernels, biases)
    b = (pointwise(to_bottleneck, spread) + layer.bottleneck_bias[:, None, None]).clamp_min(0)
    gates = pointwise(layer.gate_weight, depthwise(b, layer.gate_depthwise, layer.gate_depthwise_bias))
    i, f, g, o = (gates + layer.gate_bias[:, None, None]).chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.clamp_min(0)
    return o.sigmoid() * c.clamp_min(0), c


def rvt_lstm(layer, x, h, c):
    """As RVT computes it: one 1x1 convolution of the input beside the convolved state."""
    both = torch.cat([x, depthwise(h, layer.hidden_depthwise, layer.hidden_depthwise_bias)])
    gates = pointwise(torch.cat([layer.input_weight, layer.hidden_weight], dim=1), both)
    i, f, g, o = (gates + layer.gate_bias[:, None, None]).chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("kind", PEERS)
def test_a_peer_follows_its_equations(kind, size):
    layer = randomized(kind(INPUTS, HIDDEN, size))
    one_step = bottleneck_lstm if kind is BottleneckLSTM2d else rvt_lstm
    x, start = random_like((2, STEPS, INPUTS, 4, 3), 1).requires_grad_(), random_like((2, 2, HIDDEN, 4, 3), 2)
    states = []
    for sample in range(2):
        h, c = start[:, sample]
        for step in range(STEPS):
            h, c = one_step(layer, x[sample, step], h, c)
        states.append(torch.stack([h, c]))
    want = torch.stack(states, dim=1)
    out, state = layer(x, (start[0], start[1]))
    got = torch.stack(state)
    assert relative_difference(got, want) < 1e-12 and torch.equal(out[:, -1], state[0])
    weight = random_like(want.shape, 3)
    gradients = [torch.autograd.grad((one * weight).sum(), [x, *layer.parameters()]) for one in (got, want)]
    assert max(map(relative_difference, *gradients)) < 1e-11


@pytest.mark.parametrize("kind", PEERS)
def test_a_peer_begins_with_zeros_and_can_be_continued(kind):
    layer, x = randomized(kind(INPUTS, HIDDEN)), random_like((2, 5, INPUTS, 6, 7), 1)
    zeros = torch.zeros(2, HIDDEN, 6, 7, dtype=torch.float64)
    whole, (h, c) = layer(x)
    first, state = layer(x[:, :2], (zeros, zeros))
    rest, (h_last, c_last) = layer(x[:, 2:], state, first_step=2)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)
    torch.testing.assert_close((h_last, c_last), (h, c))
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    held, (h, _) = layer(x, valid_BT=valid)
    torch.testing.assert_close(held[0], whole[0])
    assert torch.equal(h[1], first[1, -1]) and torch.equal(held[1, 3], first[1, -1])


@pytest.mark.parametrize("kind", PEERS)
def test_a_peer_starts_with_open_forget_gates_and_keeps_variance(kind):
    layer = kind(INPUTS, 64)
    assert layer.gate_bias[64:128].eq(1).all() and layer.gate_bias[:64].eq(0).all()
    x = torch.randn(1, 64, 24, 24)
    for name, weight in layer.named_parameters():
        if weight.dim() > 1 and "input" not in name:
            groups = 64 if "depthwise" in name else 1
            assert 0.7 < functional.conv2d(x, weight, groups=groups).std() < 1.4, name


@pytest.mark.parametrize("kind", PEERS)
def test_the_cell_state_of_bf16_stays_float32(kind):
    out, (h, c) = kind(INPUTS, HIDDEN).bfloat16()(torch.randn(1, 2, INPUTS, 5, 6, dtype=torch.bfloat16))
    assert (out.dtype, h.dtype, c.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_an_even_kernel_is_refused():
    with pytest.raises(InputError, match="kernel_size"):
        BottleneckLSTM2d(2, 3, 4)
