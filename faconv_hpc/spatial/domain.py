"""Domain: what a layer knows about where its cells are. Five verbs, each with its adjoint."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..autograd import Context, Operation
from ..errors import InputError
from ..observe import Clock
from . import exchange
from .exchange import HaloExchange, at_least_float32
from .grid import Boundary, Cuts, LatLonGrid, Tile
from .mesh import ProcessMesh
from .tape import Tape

Value = TypeVar("Value")


class Domain:
    """One tile of a grid, and the verbs that reach beyond it.

    Layers are written as on one device and ask their domain for what lies outside the tile. Cell
    tensors end in (Y, X), the owned rows and columns. Every verb is collective over the tiles of
    a replica, and so is its backward.

    Args:
        grid: the whole grid.
        mesh: the ranks; default: this process owns everything.
        cuts: where the grid is cut; default: as evenly as possible over the mesh.
    """

    def __init__(self, grid: LatLonGrid, mesh: ProcessMesh | None = None, *, cuts: Cuts | None = None) -> None:
        self.grid = grid
        self.mesh = mesh or ProcessMesh.alone()
        self.cuts = cuts or Cuts.even(grid, self.mesh.lat, self.mesh.lon)
        if (self.cuts.lat, self.cuts.lon) != (self.mesh.lat, self.mesh.lon):
            raise InputError(
                f"the cuts make {self.cuts.lat} x {self.cuts.lon} tiles, the mesh has {self.mesh.lat} x "
                f"{self.mesh.lon} ranks per replica. Cut the grid once for every rank."
            )
        self.cuts.check_covers(grid)
        self.tile: Tile = self.cuts.tile(self.mesh.tile_index)
        self.clock = Clock(self.mesh.activity)
        self._tape: Tape | None = None
        self._halo_exchanges: dict[int, HaloExchange] = {}
        self._constants: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    @staticmethod
    @lru_cache(maxsize=16)
    def plane(rows: int, columns: int) -> "Domain":
        """A single tile on a flat rectangle: zero boundaries, equal areas."""
        return Domain(LatLonGrid.plane(rows, columns))

    @property
    def tiles(self) -> int:
        """Number of tiles of the grid."""
        return self.cuts.tiles

    # The five verbs

    def pad(self, x: Tensor, width: int) -> Tensor:
        """Fills a halo of ``width`` cells around x (..., Y, X): (..., Y + 2 width, X + 2 width).

        Adjoint: accumulate halo. A cell that is copied into halos is used there too, so its gradient
        is the sum over all uses.
        """
        self._check_cells(x)
        padded: Tensor = _Pad.call(x, self, width) if width else x
        return padded

    def gather(self, x: Tensor, axis: str) -> Tensor:
        """Joins the tiles along ``"lat"`` (all rows) or ``"lon"`` (all columns).

        Adjoint: reduce-scatter. Every rank of the axis uses every cell, so their gradients are
        summed and each rank keeps its own cells'.
        """
        joined: Tensor = _Gather.call(x, self, axis) if self.mesh.size(axis) > 1 else x
        return joined

    def swap(self, x_LCN: Tensor, axis: str) -> Tensor:
        """Moves the split from ``axis`` to the lines: whole lines, fewer of them.

        Args:
            x_LCN: L lines (all that run along ``axis`` through this tile), C numbers per cell,
                N owned cells along ``axis``.

        Returns:
            (L', C, N') with N' all cells along ``axis`` and L' this rank's share of the lines.

        Adjoint: `swap_back`; both only move numbers, so each is the other's inverse and adjoint.
        """
        whole_LCN: Tensor = x_LCN if self.mesh.size(axis) == 1 else _Swap.call(x_LCN, self, axis, x_LCN.shape[0])
        return whole_LCN

    def swap_back(self, x_LCN: Tensor, axis: str, lines: int) -> Tensor:
        """The inverse of `swap`: ``lines`` is the number of lines that run through this tile."""
        owned_LCN: Tensor = x_LCN if self.mesh.size(axis) == 1 else _SwapBack.call(x_LCN, self, axis, lines)
        return owned_LCN

    def mean(self, x: Tensor) -> Tensor:
        """Area-weighted mean of x (..., Y, X) over all tiles: (...), the same on every rank.

        For use inside the network. Summed in float32 or better, returned in x's type. Adjoint: the
        sum over tiles of the gradients, spread by area. Every rank's loss depends on the mean, and
        so on every cell of every tile.
        """
        self._check_cells(x)
        mean: Tensor = _Mean.call(x, self)
        return mean

    def total(self, x: Tensor) -> Tensor:
        """Sum of x over all tiles, any shape, for the end of a loss.

        Adjoint: the identity. Each rank's share enters the total once. Unlike `mean`, the result
        must not be used by further layers.
        """
        summed: Tensor = _Total.call(x, self) if self.tiles > 1 else x
        return summed

    def pad_and_mean(self, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """`pad` and `mean` of the same x in one communication phase, forward and backward."""
        self._check_cells(x)
        padded, mean = _PadAndMean.call(x, self, width)
        return padded, mean

    # Between a tile and the whole grid, for small tensors: tests, figures, examples

    def scatter(self, x: Tensor) -> Tensor:
        """This tile's cells of x (..., nlat, nlon), which every rank holds. Nothing is sent."""
        if x.shape[-2:] != (self.grid.nlat, self.grid.nlon):
            raise InputError(
                f"scatter takes a field of the whole grid, {self.grid.nlat} x {self.grid.nlon}, "
                f"got {tuple(x.shape[-2:])}. Pass the same whole field on every rank."
            )
        return x[..., *self.tile.slices]

    def assemble(self, x: Tensor) -> Tensor:
        """The whole field (..., nlat, nlon) on every rank, from the owned cells x (..., Y, X)."""
        self._check_cells(x)
        return self.gather(self.gather(x, "lon"), "lat")

    def verdict(self, passed: bool) -> bool:
        """Whether all tiles say so: lets every rank agree before anyone raises."""
        votes = torch.tensor(float(not passed), device=self.mesh.device)
        return not exchange.start_sum(votes, self.mesh.tile_group, self.clock, "verdict")().item()

    # Coordinates of the owned cells

    def row_weights(self, like: Tensor) -> Tensor:
        """(Y,) the share of each owned row's cell in the area of the whole grid."""
        return self._constant("weight", like)

    def row_areas(self, like: Tensor) -> Tensor:
        """(nlat,) relative area of a cell in each row of the grid, 1 on average."""
        return self._constant("area", like)

    def latitudes(self, like: Tensor) -> Tensor:
        """(Y,) latitudes of the owned rows, in radians."""
        return self._constant("latitude", like)

    def longitudes(self, like: Tensor) -> Tensor:
        """(X,) longitudes of the owned columns, in radians."""
        return self._constant("longitude", like)

    def pole_taper(self, like: Tensor) -> Tensor:
        """(Y,) cosine of the owned rows' latitudes where the grid ends at a pole, ones on other grids."""
        return self._constant("taper", like)

    # Activation checkpointing

    def recompute_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """``context_fn`` for `torch.utils.checkpoint`: halos and means are kept, not asked for twice.

        What gather and swap bring is as large as what checkpointing saves, and is asked for again.
        """
        tape = Tape()
        return self._using(tape, tape.recording()), self._using(tape, tape.replaying())

    @contextmanager
    def _using(self, tape: Tape, mode: AbstractContextManager[None]) -> Iterator[None]:
        before, self._tape = self._tape, tape
        try:
            with mode:
                yield
        finally:
            self._tape = before

    def remembered(self, communicate: Callable[[], Value]) -> Value:
        """What ``communicate`` returns, or what it returned when the segment was first computed."""
        return communicate() if self._tape is None else self._tape.value(communicate)

    def halo_exchange(self, width: int) -> HaloExchange:
        """The exchange for one halo width; made once. Collective when it is made: all tiles must see the same plan."""
        if width not in self._halo_exchanges:
            self._check_same_plan(width)
            self._halo_exchanges[width] = HaloExchange(
                self.grid, self.cuts, self.mesh.tile_index, width, self.mesh.tile_group, self.clock
            )
        return self._halo_exchanges[width]

    def _check_same_plan(self, width: int) -> None:
        """Compares a hash of what the plan is made from, before anything is sent that nobody would receive."""
        group = self.mesh.tile_group
        if group is None:
            return
        plan = f"{self.grid} {self.cuts} {width}"
        seen = exchange.gathered_hashes(plan, group, self.mesh.device)
        others = [tile for tile, value in enumerate(seen) if value != seen[0]]
        if others:
            raise InputError(
                f"the tiles do not see the same halo plan: tile(s) {', '.join(map(str, others))} differ from tile 0 in "
                f"grid, cuts or width (here: {self.grid.nlat} x {self.grid.nlon} cells, {self.cuts.lat} x "
                f"{self.cuts.lon} tiles, width {width}). Pass the same grid and cuts on every rank."
            )

    def _constant(self, name: str, like: Tensor) -> Tensor:
        key = (name, like.dtype, like.device)
        if key not in self._constants:
            with torch.inference_mode(False):  # constants made while evaluating serve training too
                values = torch.from_numpy(self._values(name).copy())
                self._constants[key] = values.to(dtype=like.dtype, device=like.device)
        return self._constants[key]

    def _values(self, name: str) -> NDArray[np.float64]:
        rows, columns = self.tile.slices
        area = self.grid.cell_area_sr
        if name == "taper":
            has_pole = Boundary.POLE in (self.grid.north, self.grid.south)
            return np.cos(self.grid.latitude[rows]) if has_pole else np.ones(self.tile.shape[0])
        if name in ("latitude", "longitude"):
            return self.grid.latitude[rows] if name == "latitude" else self.grid.longitude[columns]
        scaled: NDArray[np.float64] = area[rows] / self.grid.total_area_sr if name == "weight" else area / area.mean()
        return scaled

    def _check_cells(self, x: Tensor) -> None:
        if x.shape[-2:] != self.tile.shape:
            raise InputError(
                f"this rank's tile has {self.tile.shape[0]} x {self.tile.shape[1]} cells, the tensor ends in "
                f"{tuple(x.shape[-2:])}. Pass owned cells only: `domain.scatter(x)` cuts them from a whole field."
            )


class _Pad(Operation):
    """Owner to halo going forward; halo to owner, added, going back."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, domain: Domain, width: int) -> Tensor:
        ctx.halo = domain.halo_exchange(width)
        received = domain.remembered(lambda: ctx.halo.start_fill(x)())
        padded: Tensor = ctx.halo.pad(x, received)
        return padded

    @staticmethod
    def backward(ctx: Context, grad_padded: Tensor) -> tuple[Tensor, None, None]:
        received = ctx.halo.start_accumulate(grad_padded)()
        return ctx.halo.add_halo(grad_padded, received), None, None


class _Mean(Operation):
    """Area-weighted sum over all tiles going forward; gradients summed over tiles going back."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, domain: Domain) -> Tensor:
        ctx.domain, ctx.columns = domain, x.shape[-1]
        # Detached: what autograd returns must not be the tensor on the tape, or the two keep each other alive.
        return domain.remembered(lambda: _start_mean(x, domain)()).detach().to(x.dtype)

    @staticmethod
    def backward(ctx: Context, grad_mean: Tensor) -> tuple[Tensor, None]:
        total = _start_grad_sum(grad_mean, ctx.domain)()
        return _spread(total, ctx.domain, ctx.columns).to(grad_mean.dtype), None


class _PadAndMean(Operation):
    """`_Pad` and `_Mean` with both exchanges under way at once."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, domain: Domain, width: int) -> tuple[Tensor, Tensor]:
        ctx.domain, ctx.columns, ctx.halo = domain, x.shape[-1], domain.halo_exchange(width)

        def communicate() -> tuple[exchange.Received, Tensor]:
            halo, mean = ctx.halo.start_fill(x), _start_mean(x, domain)
            return halo(), mean()

        received, mean = domain.remembered(communicate)
        return ctx.halo.pad(x, received), mean.detach().to(x.dtype)  # detached: see _Mean

    @staticmethod
    def backward(ctx: Context, grad_padded: Tensor, grad_mean: Tensor) -> tuple[Tensor, None, None]:
        halo = ctx.halo.start_accumulate(grad_padded)
        total = _start_grad_sum(grad_mean, ctx.domain)
        grad = ctx.halo.add_halo(grad_padded, halo())
        return grad.add_(_spread(total(), ctx.domain, ctx.columns)), None, None


class _Gather(Operation):
    """All-gather along one axis going forward; reduce-scatter going back."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, domain: Domain, axis: str) -> Tensor:
        ctx.domain, ctx.axis = domain, axis
        return exchange.gather(x, _dim(axis), domain.cuts.sizes(axis), *_axis(domain, axis))

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        domain, axis = ctx.domain, ctx.axis
        sizes, index = domain.cuts.sizes(axis), domain.mesh.index(axis)
        return exchange.reduce_scatter(grad, _dim(axis), sizes, index, *_axis(domain, axis)), None, None


class _Swap(Operation):
    """All-to-all from owned pieces of all lines to whole lines, fewer; going back, the reverse."""

    @staticmethod
    def forward(ctx: Context, x_LCN: Tensor, domain: Domain, axis: str, lines: int) -> Tensor:
        ctx.domain, ctx.axis, ctx.lines = domain, axis, lines
        return _to_whole_lines(x_LCN, domain, axis)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _to_owned_pieces(grad, ctx.domain, ctx.axis, ctx.lines), None, None, None


class _SwapBack(Operation):
    """All-to-all from whole lines to owned pieces of all lines; going back, the reverse."""

    @staticmethod
    def forward(ctx: Context, x_LCN: Tensor, domain: Domain, axis: str, lines: int) -> Tensor:
        ctx.domain, ctx.axis = domain, axis
        return _to_owned_pieces(x_LCN, domain, axis, lines)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _to_whole_lines(grad, ctx.domain, ctx.axis), None, None, None


class _Total(Operation):
    """Sum over all tiles going forward; the identity going back."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, domain: Domain) -> Tensor:
        return exchange.start_sum(x.clone(), domain.mesh.tile_group, domain.clock, "total")()

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _start_mean(x: Tensor, domain: Domain) -> exchange.Finish:
    rows = x.sum(-1, dtype=at_least_float32(x.dtype))
    return exchange.start_sum(rows @ domain.row_weights(rows), domain.mesh.tile_group, domain.clock, "mean")


def _start_grad_sum(grad_mean: Tensor, domain: Domain) -> exchange.Finish:
    share = grad_mean.to(at_least_float32(grad_mean.dtype), copy=True).contiguous()
    return exchange.start_sum(share, domain.mesh.tile_group, domain.clock, "adjoint of mean")


def _spread(total: Tensor, domain: Domain, columns: int) -> Tensor:
    """The gradient of a mean at every owned cell: its weight times the mean's gradient."""
    by_row = total[..., None, None] * domain.row_weights(total)[:, None]
    return by_row.expand(*by_row.shape[:-1], columns)


def _dim(axis: str) -> int:
    return -2 if axis == "lat" else -1


def _axis(domain: Domain, axis: str) -> tuple[Any, Clock]:
    return domain.mesh.axis_groups[axis], domain.clock


def line_shares(lines: int, ranks: int) -> list[int]:
    """How many of the lines each rank of the axis takes; some take none where there are too few."""
    return [lines // ranks + (rank < lines % ranks) for rank in range(ranks)]


def _to_whole_lines(x_LCN: Tensor, domain: Domain, axis: str) -> Tensor:
    lines, channels, _ = x_LCN.shape
    shares = line_shares(lines, domain.mesh.size(axis))
    mine = shares[domain.mesh.index(axis)]
    shapes = [torch.Size((mine, channels, size)) for size in domain.cuts.sizes(axis)]
    return torch.cat(exchange.all_to_all(x_LCN.split(shares), shapes, *_axis(domain, axis)), dim=-1)


def _to_owned_pieces(x_LCN: Tensor, domain: Domain, axis: str, lines: int) -> Tensor:
    sizes = domain.cuts.sizes(axis)
    owned = sizes[domain.mesh.index(axis)]
    shapes = [torch.Size((share, x_LCN.shape[1], owned)) for share in line_shares(lines, len(sizes))]
    return torch.cat(exchange.all_to_all(x_LCN.split(sizes, dim=-1), shapes, *_axis(domain, axis)))
