"""The verbs on random grids, cuts, boundaries, widths and dilations, through real ranks, against one tile."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from faconv_hpc import Domain, LatLonGrid
from faconv_hpc.model.kernels import EAGER
from faconv_hpc.model.taps import Taps
from faconv_hpc.spatial.grid import Boundary, Cuts
from ranks import Layout, run_on_ranks
from test_domain import coordinates, lines_through, random_like
from test_halo import reference_padded

CUTS = [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (4, 1), (2, 3), (3, 2), (6, 1), (2, 4), (4, 2), (1, 8)]
ADJOINT_TOLERANCE = 1e-13


class Case(NamedTuple):
    """Everything that a halo depends on."""

    grid: LatLonGrid
    cuts: Cuts
    kernel_size: int
    dilations: tuple[int, ...]

    @property
    def width(self) -> int:
        return max(self.dilations) * (self.kernel_size // 2)

    @property
    def layout(self) -> Layout:
        return Layout(1, self.cuts.lat, self.cuts.lon)


@st.composite
def edges(draw, size, parts):
    inner = draw(st.sets(st.integers(1, size - 1), min_size=parts - 1, max_size=parts - 1)) if parts > 1 else set()
    return (0, *sorted(inner), size)


@st.composite
def grids(draw, lat, lon):
    """Any grid that so many tiles fit on: every boundary, rows at the poles or not, either way up, from any start."""
    sides = st.sampled_from(["pole", "zero", "replicate"])
    north, south = draw(st.one_of(st.tuples(sides, sides), st.just(("periodic", "periodic"))))
    poles = "pole" in (north, south)
    lon_boundary = "periodic" if poles else draw(st.sampled_from(["periodic", "zero", "replicate"]))
    nlat = draw(st.integers(max(lat, 2 if poles else 1), 13))
    nlon = 2 * draw(st.integers(-(-lon // 2), 8)) if poles else draw(st.integers(lon, 16))
    latitude = draw(st.sampled_from([90.0, 90.0 - 90.0 / nlat])) * np.linspace(1, -1, nlat) if nlat > 1 else None
    if latitude is not None and draw(st.booleans()):
        latitude = latitude[::-1]
    longitude = draw(st.integers(-180, 359)) + np.arange(nlon) * (360 / nlon)
    return LatLonGrid(nlat, nlon, latitude_deg=latitude, longitude_deg=longitude,
                      lat_boundary=(north, south), lon_boundary=lon_boundary)  # fmt: skip


@st.composite
def cases(draw):
    lat, lon = draw(st.sampled_from(CUTS))
    grid = draw(grids(lat, lon))
    kernel_size = draw(st.sampled_from([3, 5]))
    # beyond a pole lies the other side of it, but not the other pole
    room = grid.nlat - 1 if Boundary.POLE in (grid.north, grid.south) else 9
    if room < 2:
        kernel_size = 3
    most = max(1, room // (kernel_size // 2))
    dilations = draw(st.lists(st.integers(1, min(most, 4)), min_size=1, max_size=3, unique=True))
    return Case(grid, Cuts(draw(edges(grid.nlat, lat)), draw(edges(grid.nlon, lon))), kernel_size, tuple(dilations))


def mixed_reference(padded: Tensor, weight_DCK: Tensor, case: Case) -> Tensor:
    """The bank of dilated depthwise kernels by torch's own convolution, one dilation at a time."""
    total = torch.zeros(())
    for dilation, weight_CK in zip(case.dilations, weight_DCK, strict=True):
        spare = case.width - dilation * (case.kernel_size // 2)
        window = padded[..., spare : padded.shape[-2] - spare, spare : padded.shape[-1] - spare]
        weight = weight_CK.view(-1, 1, case.kernel_size, case.kernel_size)
        total = total + functional.conv2d(window, weight, dilation=dilation, groups=weight.shape[0])
    return total


def check_pad(mesh, case):
    """What is wrong with this rank's padded tile, and with the mixing of it; nothing if all is well."""
    domain = Domain(case.grid, mesh, cuts=case.cuts)
    field = coordinates(case.grid) + 0.123
    want = torch.from_numpy(reference_padded(field.numpy(), case.grid, domain.tile, case.width))
    got = domain.pad(domain.scatter(field), case.width)
    if not torch.equal(got, want):
        return f"rank {mesh.rank}: pad differs in {int((got != want).sum())} of {want.numel()} cells"
    channels = 2
    weight_DCK = random_like((len(case.dilations), channels, case.kernel_size**2), 5)
    taps = Taps.of(case.kernel_size, case.dilations)
    merged = torch.zeros(1, channels, len(taps.offsets), dtype=torch.float64)
    for dilation, owners in enumerate(taps.owner):
        merged[0].index_add_(1, torch.tensor(owners), weight_DCK[dilation])
    two = torch.stack([got, -got])[None]
    mixed = torch.empty(1, channels, *domain.tile.shape, dtype=torch.float64)
    EAGER.mix(mixed, two, merged, taps.offsets)
    reference = mixed_reference(torch.stack([want, -want])[None], weight_DCK, case)
    return "" if torch.allclose(mixed, reference, rtol=1e-12, atol=1e-9) else f"rank {mesh.rank}: mixing differs"


@settings(max_examples=250, deadline=None)
@given(cases())
def test_pad_equals_one_tile_to_the_last_bit(case):
    assert not any(found := run_on_ranks(case.layout, check_pad, case)), found


VERBS: dict[str, Callable[[Domain, Tensor, int], Tensor]] = {
    "pad": lambda domain, x, width: domain.pad(x, width),
    "mean": lambda domain, x, width: domain.mean(x),
    "gather lon": lambda domain, x, width: domain.gather(x, "lon"),
    "gather lat": lambda domain, x, width: domain.gather(x, "lat"),
    "swap lon": lambda domain, x, width: domain.swap(lines_through(x, "lon"), "lon"),
    "swap lat": lambda domain, x, width: domain.swap(lines_through(x, "lat"), "lat"),
    "swap lon and back": lambda domain, x, width: there_and_back(domain, x, "lon"),
    "swap lat and back": lambda domain, x, width: there_and_back(domain, x, "lat"),
}


def there_and_back(domain: Domain, x: Tensor, axis: str) -> Tensor:
    """Whole lines are changed in between, so that nothing cancels."""
    lines = lines_through(x, axis)
    whole = domain.swap(lines, axis)
    ramp = torch.arange(1, whole.shape[1] + 1, dtype=whole.dtype)[:, None]
    return domain.swap_back(whole.cumsum(1) * ramp, axis, lines.shape[0])


def check_adjoints(mesh, case):
    """<F x, y> = <x, F* y> for every verb, summed over ranks; what is wrong, or nothing."""
    domain, alone = Domain(case.grid, mesh, cuts=case.cuts), Domain(case.grid)
    found = []
    for number, (name, verb) in enumerate(VERBS.items()):
        x = random_like((2, 2, *domain.tile.shape), 100 * number + mesh.rank).requires_grad_()
        result = verb(domain, x, case.width)
        y = random_like(result.shape, 5000 + 100 * number + mesh.rank)
        (adjoint,) = torch.autograd.grad(result, x, y)
        sums = torch.stack([(result * y).sum(), (x * adjoint).sum(), (result * y).abs().sum()])
        forward, backward, size = domain.total(sums.detach()).tolist()
        if not abs(forward - backward) <= ADJOINT_TOLERANCE * size:
            found.append(f"{name}: <Fx, y> = {forward!r}, <x, F*y> = {backward!r}")
    x = random_like((2, case.grid.nlat, case.grid.nlon), 7)
    tile = domain.scatter(x).clone().requires_grad_()
    share = (tile**2).sum()
    total = domain.total(share)
    (adjoint,) = torch.autograd.grad(total, tile)
    if not torch.equal(adjoint, 2 * domain.scatter(x)):  # each rank's share enters the total once
        found.append("total: its gradient is not that of the rank's own share")
    same = {
        "total": (total.detach(), (x**2).sum()),
        "mean": (domain.mean(domain.scatter(x)), (x * share_of_area(case.grid)).sum((-2, -1))),
        "gather": (domain.assemble(domain.scatter(x)), x),
        "swap": (
            domain.assemble(back_to_cells(there_and_back(domain, domain.scatter(x)[None], "lat"))),
            back_to_cells(there_and_back(alone, x[None], "lat")),
        ),
    }
    found += [name for name, (got, want) in same.items() if not torch.allclose(got, want, rtol=1e-12, atol=1e-12)]
    return f"rank {mesh.rank}: {found}" if found else ""


def back_to_cells(lines_LNC: Tensor) -> Tensor:
    """(C, Y, X) from the lines along lat of one sample."""
    return lines_LNC.permute(2, 1, 0).contiguous()


def share_of_area(grid: LatLonGrid) -> Tensor:
    """(nlat, nlon) the share of each cell in the sphere (or in the rows there are), by the definition."""
    latitude = np.deg2rad(np.asarray(grid.latitude_deg))
    if grid.nlat == 1:
        bands = np.ones(1)
    else:
        inner = (latitude[1:] + latitude[:-1]) / 2
        outer = (latitude[0] - (inner[0] - latitude[0]), latitude[-1] - (inner[-1] - latitude[-1]))
        edge = np.clip([outer[0], *inner, outer[1]], -np.pi / 2, np.pi / 2)
        bands = np.abs(np.diff(np.sin(edge)))
    return torch.from_numpy(np.repeat((bands / bands.sum() / grid.nlon)[:, None], grid.nlon, axis=1))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_verb_has_its_adjoint_and_the_value_of_one_tile(case):
    assert not any(found := run_on_ranks(case.layout, check_adjoints, case)), found
