"""The five verbs on several ranks, against one tile."""

from itertools import product

import numpy as np
import pytest
import torch

from faconv_hpc import Domain, LatLonGrid, ProcessMesh
from faconv_hpc.errors import InputError
from faconv_hpc.spatial.grid import Cuts
from ranks import Layout, run_on_ranks
from test_halo import reference_padded

LAYOUTS = [Layout(1, *cut) for cut in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 2))]
GRIDS = {
    "pole, 13 x 16": lambda: LatLonGrid(13, 16, lat_boundary="pole"),
    "pole rows, 11 x 14": lambda: LatLonGrid(11, 14, latitude_deg=np.linspace(90, -90, 11), lat_boundary="pole"),
    "zero, prime, 7 x 11": lambda: LatLonGrid(7, 11),
    "region, 7 x 5": lambda: LatLonGrid(
        7, 5, latitude_deg=np.linspace(40, 70, 7), longitude_deg=np.linspace(-20, 10, 5),
        lat_boundary="replicate", lon_boundary="replicate",
    ),
}  # fmt: skip


def coordinates(grid):
    """A field that has another value in every cell."""
    return torch.arange(grid.nlat * grid.nlon, dtype=torch.float64).view(grid.nlat, grid.nlon) + 1


def random_like(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_agree(domain, passed):
    """Every rank waits for every other's verdict before it raises."""
    assert domain.verdict(bool(passed)), "some rank's numbers differ"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("width", [1, 4])
def test_pad_brings_in_the_neighbours_cells(layout, grid, width):
    def check(mesh):
        domain = Domain(GRIDS[grid](), mesh)
        field = coordinates(domain.grid)
        want = torch.from_numpy(reference_padded(field.numpy(), domain.grid, domain.tile, width))
        blanked = torch.zeros_like(want)
        blanked[width:-width, width:-width] = domain.scatter(field)
        all_agree(domain, not torch.equal(blanked, want))  # else the test proves nothing
        all_agree(domain, torch.equal(domain.pad(domain.scatter(field), width), want))

    run_on_ranks(layout, check)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_owned_tiles_cover_the_canvas_exactly_once(layout):
    def check(mesh):
        domain = Domain(LatLonGrid(13, 16), mesh)
        canvas = torch.zeros(13, 16, dtype=torch.float64)
        canvas[domain.tile.slices] += 1
        all_agree(domain, torch.equal(domain.total(canvas), torch.ones_like(canvas)))
        all_agree(
            domain, torch.equal(domain.assemble(domain.scatter(coordinates(domain.grid))), coordinates(domain.grid))
        )
        several = coordinates(domain.grid) + 1000 * torch.arange(3, dtype=torch.float64)[:, None, None]
        for tile in range(domain.tiles):
            found, here = domain.assemble_at(domain.scatter(several), tile), mesh.tile_index == tile
            all_agree(domain, torch.equal(found, several) if found is not None else not here)

    run_on_ranks(layout, check)


def lines_through(x_BCYX, axis):
    """(lines, cells, channels)."""
    x = x_BCYX.permute(0, 2, 3, 1) if axis == "lon" else x_BCYX.permute(0, 3, 2, 1)
    return x.flatten(0, 1).contiguous()


VERBS = {
    "pad": lambda domain, x: domain.pad(x, 3),
    "gather lon": lambda domain, x: domain.gather(x, "lon"),
    "gather lat": lambda domain, x: domain.gather(x, "lat"),
    "swap lon": lambda domain, x: domain.swap(lines_through(x, "lon"), "lon"),
    "swap lat": lambda domain, x: domain.swap(lines_through(x, "lat"), "lat"),
    "mean": lambda domain, x: domain.mean(x),
    "mean over regions": lambda domain, x: domain.mean(x, (3, 4)),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_verb_has_its_adjoint(layout, grid):
    """<F x, y> = <x, F* y>, both sides summed over ranks."""

    def check(mesh):
        domain = Domain(GRIDS[grid](), mesh)
        for number, verb in enumerate(VERBS.values()):
            x = random_like((2, 3, *domain.tile.shape), 10 * mesh.rank + number).requires_grad_()
            result = verb(domain, x)
            y = random_like(result.shape, 1000 + 10 * mesh.rank + number)
            (adjoint,) = torch.autograd.grad(result, x, y)
            forward, backward = domain.total(torch.stack([(result * y).sum(), (x * adjoint).sum()])).tolist()
            all_agree(domain, abs(forward - backward) <= 1e-13 * (abs(forward) + (result * y).abs().sum().item()))

    run_on_ranks(layout, check)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_mean_and_total_and_swap_equal_one_tile(layout):
    def check(mesh):
        domain = Domain(GRIDS["pole, 13 x 16"](), mesh)
        x = random_like((2, 3, 13, 16), 0)
        area = torch.as_tensor(domain.grid.cell_area_sr)[:, None].expand(13, 16)
        want = (x * area).sum((-2, -1)) / area.sum()
        all_agree(domain, torch.allclose(domain.mean(domain.scatter(x)), want, rtol=1e-13, atol=1e-15))
        for regions in ((1, 1), (3, 5), (13, 16)):
            rows, columns = (torch.arange(n) * parts // n for n, parts in zip((13, 16), regions, strict=True))
            want = torch.empty(2, 3, *regions, dtype=torch.float64)
            for r, s in product(range(regions[0]), range(regions[1])):
                weight = area * ((rows == r)[:, None] & (columns == s))
                want[..., r, s] = (x * weight).sum((-2, -1)) / weight.sum()
            all_agree(domain, torch.allclose(domain.mean(domain.scatter(x), regions), want, rtol=1e-13, atol=1e-15))
        all_agree(domain, torch.allclose(domain.total(domain.scatter(x).sum()), x.sum(), rtol=1e-12))
        for axis in ("lon", "lat"):
            lines = lines_through(domain.scatter(x), axis)
            whole = domain.swap(lines, axis)
            all_agree(domain, whole.shape[1] == (16 if axis == "lon" else 13))
            all_agree(domain, torch.equal(domain.swap_back(whole, axis, lines.shape[0]), lines))

    run_on_ranks(layout, check)


@pytest.mark.parametrize("layout", [Layout(1, 1, 2), Layout(1, 2, 2)], ids=str)
def test_bfloat16_moves_unchanged_and_is_summed_in_float32(layout):
    def check(mesh):
        domain = Domain(GRIDS["pole, 13 x 16"](), mesh)
        field = coordinates(domain.grid).to(torch.bfloat16)
        alone = Domain(domain.grid)
        all_agree(domain, torch.equal(domain.assemble(domain.scatter(field)), field))
        padded = domain.pad(domain.scatter(field), 2)
        want = torch.from_numpy(reference_padded(field.double().numpy(), domain.grid, domain.tile, 2))
        all_agree(domain, torch.equal(padded.double(), want))
        all_agree(domain, torch.equal(domain.mean(domain.scatter(field)), alone.mean(field)))
        in_float32 = domain.mean(domain.scatter(field), dtype=torch.float32)
        all_agree(domain, torch.allclose(in_float32.double(), alone.mean(field.double()), rtol=1e-6, atol=0))
        x = domain.scatter(field).clone().requires_grad_()
        mine = 1 + 2**-9 if domain.mesh.tile_index == 0 else -1 / (domain.tiles - 1)  # in bf16 they would cancel
        (grad,) = torch.autograd.grad(
            domain.mean(x, dtype=torch.float32), x, torch.full(x.shape[:-2], mine, dtype=torch.float32)
        )
        want = 2**-9 * domain.coordinates.row_weights(x.float())[:, None].expand(x.shape)
        all_agree(domain, grad.dtype == x.dtype and torch.allclose(grad.float(), want, rtol=0.01, atol=0))
        close = {"rtol": 2**-8, "atol": 0}  # the last of its eight bits
        by_region = domain.mean(domain.scatter(field), (3, 5))
        all_agree(domain, torch.allclose(by_region, alone.mean(field, (3, 5)), **close))
        all_agree(domain, torch.allclose(by_region.double(), alone.mean(field.double(), (3, 5)), **close))

    run_on_ranks(layout, check)


def test_recomputation_takes_halos_and_means_from_the_tape():
    def check(mesh):
        domain = Domain(GRIDS["pole, 13 x 16"](), mesh)
        x = random_like((1, 2, *domain.tile.shape), mesh.rank)
        first, again = domain.recompute_contexts()
        with first:
            want = domain.pad(x, 2), domain.mean(x)
        domain.clock.take("exchange")
        with again:
            got = domain.pad(x, 2), domain.mean(x)
        all_agree(domain, domain.clock.take("exchange") == 0.0)
        all_agree(domain, all(torch.equal(a, b) for a, b in zip(want, got, strict=True)))

    run_on_ranks(Layout(1, 2, 2), check)


@pytest.mark.parametrize("axis", ["lon", "lat"])
def test_recomputation_takes_what_others_have_of_lines_from_the_tape(axis):
    """Which keeps that, and nothing of the tile's own; uneven tiles, lines that ranks do not divide."""

    def lines_of(domain):
        lines = lines_through(random_like((1, 2, *domain.tile.shape), domain.mesh.rank), axis)
        joined, whole = domain.gather(lines, axis, dim=1), domain.swap(lines, axis)
        return joined, whole, domain.swap_back(whole * 2, axis, lines.shape[0])

    def check(mesh):
        domain, kept = Domain(LatLonGrid(7, 11), mesh), []
        first, again = domain.recompute_contexts()
        with first:
            want = lines_of(domain)
            kept = [[one.untyped_storage() for one in received] for received in domain._tape._values]
        domain.clock.take("exchange")
        with again:
            got = lines_of(domain)
        all_agree(domain, domain.clock.take("exchange") == 0.0)
        all_agree(domain, all(torch.equal(a, b) for a, b in zip(want, got, strict=True)))
        sizes = domain.cuts.sizes(axis)
        mine = sizes[mesh.index(axis)]
        share, lines, channels = want[1].shape[0], want[2].shape[0], want[2].shape[2]
        numbers = lines * (len(sizes) - 1) * max(sizes), share * (sum(sizes) - mine), (lines - share) * mine
        held = [sum({one.data_ptr(): one.nbytes() for one in storages}.values()) for storages in kept]
        all_agree(domain, held == [8 * channels * number for number in numbers])

    run_on_ranks(Layout(1, 1, 3) if axis == "lon" else Layout(1, 3, 1), check)


def test_tiles_that_see_another_plan_are_found_before_anything_is_sent():
    def check(mesh):
        columns = 16 if mesh.rank != 1 else 18
        domain = Domain(LatLonGrid(13, columns), mesh)
        with pytest.raises(InputError, match=r"tile\(s\) 1 differ from tile 0 in grid, cuts or width"):
            domain.pad(torch.zeros(domain.tile.shape), 1)

    run_on_ranks(Layout(1, 1, 3), check)


def test_a_whole_field_is_asked_for_where_a_tile_is_not_enough():
    domain = Domain(LatLonGrid(6, 8))
    with pytest.raises(InputError, match=r"scatter takes a field of the whole grid, 6 x 8, got \(3, 8\)"):
        domain.scatter(torch.zeros(3, 8))
    with pytest.raises(InputError, match="this rank's tile has 6 x 8 cells"):
        domain.pad(torch.zeros(3, 8), 1)


def test_a_mesh_of_another_size_is_refused():
    with pytest.raises(InputError, match="needs 4 ranks, 2 were started"):
        ProcessMesh(1, 2, 2).check_size(2)
    with pytest.raises(InputError, match=r"the cuts make 2 x 1 tiles, the mesh has 1 x 1"):
        Domain(LatLonGrid(6, 8), cuts=Cuts.even(LatLonGrid(6, 8), 2, 1))
    with pytest.raises(InputError, match=r"row_edges \(0, 5\) must run from 0 to 6 and increase"):
        Domain(LatLonGrid(6, 8), cuts=Cuts((0, 5), (0, 8)))
