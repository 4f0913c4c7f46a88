"""The promise: how the grid is cut never changes the result. Layers and attention, values and gradients."""

import numpy as np
import pytest
import torch

from faconv_hpc import ConvLSTM2d, Domain, FAConvLSTM2d, LatLonGrid
from faconv_hpc.model.attention import AxialAttention
from faconv_hpc.model.peers import BottleneckLSTM2d, DepthwiseConvLSTM2d
from ranks import Layout, run_on_ranks
from test_domain import LAYOUTS, all_agree, random_like

TOLERANCE = 1e-12
GRIDS = {
    "pole, 13 x 22": lambda: LatLonGrid(13, 22, lat_boundary="pole"),
    "pole rows, 11 x 18": lambda: LatLonGrid(11, 18, latitude_deg=np.linspace(90, -90, 11), lat_boundary="pole"),
    "zero, prime, 7 x 13": lambda: LatLonGrid(7, 13),
}
LAYERS = {
    "faconv": lambda: FAConvLSTM2d(3, 8, attention_every=2, attention_heads=2, attention_reduction=1),
    "concat, swap": lambda: FAConvLSTM2d(3, 8, fuse="concat", attention_every=2, attention_exchange="swap"),
    "gather, few channels": lambda: FAConvLSTM2d(
        3, 8, dilations=(1, 3), attention_every=1, attention_reduction=2, attention_exchange="gather"
    ),
    "no peephole, no attention": lambda: FAConvLSTM2d(
        3, 6, kernel_size=5, dilations=(1,), peephole=False, attention_every=0
    ),
    "no squeeze": lambda: FAConvLSTM2d(3, 6, fuse="concat", se_reduction=0, attention_every=0),
    "convlstm": lambda: ConvLSTM2d(3, 5, 3),
    "bottleneck lstm": lambda: BottleneckLSTM2d(3, 5, 3),
    "depthwise convlstm": lambda: DepthwiseConvLSTM2d(3, 5, 5),
}  # fmt: skip


def randomized(module):
    """All weights drawn anew, none of them zero or one, in float64."""
    generator = torch.Generator().manual_seed(7)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    return module


def relative_difference(got, want):
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-300)).item()


def gradients(outputs, weights, x, module):
    """Gradients of a random linear function of all outputs, for the input and every parameter."""
    objective = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    return torch.autograd.grad(objective, [x, *module.parameters()])


def compare(domain, run, module, x):
    """Outputs and gradients of ``run`` on tiles beside one tile; ``run`` returns cell tensors."""
    alone = Domain(domain.grid)
    whole = x.clone().requires_grad_()
    want = run(whole, alone)
    weights = [random_like(output.shape, 50 + number) for number, output in enumerate(want)]
    want_grads = gradients(want, weights, whole, module)

    tile = domain.scatter(x).clone().requires_grad_()
    got = run(tile, domain)
    got_grads = gradients(got, [domain.scatter(weight) for weight in weights], tile, module)

    differences = [relative_difference(domain.assemble(a.detach()), b) for a, b in zip(got, want, strict=True)]
    differences.append(relative_difference(domain.assemble(got_grads[0]), want_grads[0]))
    summed = [domain.total(gradient) for gradient in got_grads[1:]]
    differences += [relative_difference(a, b) for a, b in zip(summed, want_grads[1:], strict=True)]
    all_agree(domain, max(differences) <= TOLERANCE)
    return max(differences)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.every(len(GRIDS), "layout", "grid", "layer")
def test_a_layer_on_tiles_equals_one_tile(layout, grid, layer):
    def check(mesh):
        domain = Domain(GRIDS[grid](), mesh)
        module = randomized(LAYERS[layer]())
        x = random_like((2, 4, 3, domain.grid.nlat, domain.grid.nlon), 1)

        def run(x, domain):
            out, (h, c) = module(x, domain=domain)
            return out, h, c

        compare(domain, run, module, x)

    run_on_ranks(layout, check)


@pytest.mark.parametrize("layout", [Layout(1, 1, 3), Layout(1, 3, 2)], ids=str)
@pytest.mark.parametrize("exchange", ["gather", "swap"])
def test_attention_with_fewer_lines_than_ranks(layout, exchange):
    def check(mesh):
        domain = Domain(LatLonGrid(3, 4, lat_boundary="pole"), mesh)
        module = randomized(AxialAttention(4, reduction=1, exchange=exchange))
        compare(domain, lambda x, domain: (module(x, domain),), module, random_like((1, 4, 3, 4), 1))

    run_on_ranks(layout, check)
