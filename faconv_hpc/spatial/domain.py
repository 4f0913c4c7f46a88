"""Domain: what a layer knows about where its cells are. Five verbs, each with its adjoint."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import InputError
from ..observe import Clock
from .area_mean import AreaMean, RegionMeans
from .axis import DIMS, Axis
from .collectives import all_to_all, gathered_hashes, start_sum
from .coordinates import Coordinates
from .exchange import HaloExchange
from .grid import Cuts, LatLonGrid, Tile
from .mesh import ProcessMesh
from .operations import Gather, Mean, Pad, Swap, SwapBack, Total
from .squares import cuts_of_squares, grid_of_squares
from .tape import Again, Started, Tape

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
        block: where it is cut evenly no square of ``block`` x ``block`` cells is parted, see `coarsened`.
        clock: default: one of its own.

    Attributes:
        tile: the owned cells.
        coordinates: areas and angles of the owned cells.
        clock: what the verbs have cost.
    """

    def __init__(
        self,
        grid: LatLonGrid,
        mesh: ProcessMesh | None = None,
        *,
        cuts: Cuts | None = None,
        block: int = 1,
        clock: Clock | None = None,
    ) -> None:
        self.grid = grid
        self.mesh = mesh or ProcessMesh.alone()
        self.cuts = cuts or Cuts.even(grid, self.mesh.lat, self.mesh.lon, block)
        if (self.cuts.lat, self.cuts.lon) != (self.mesh.lat, self.mesh.lon):
            raise InputError(
                f"the cuts make {self.cuts.lat} x {self.cuts.lon} tiles, the mesh has {self.mesh.lat} x "
                f"{self.mesh.lon} ranks per replica. Cut the grid once for every rank."
            )
        self.cuts.check_covers(grid)
        self.tile: Tile = self.cuts.tile(self.mesh.tile_index)
        self.clock = clock or Clock(self.mesh.activity)
        self._tape: Tape | None = None
        self._halo_exchanges: dict[int, HaloExchange] = {}
        self.coordinates = Coordinates(grid, self.tile)
        self._area_mean = AreaMean(self.coordinates.row_weights, self.mesh.tile_group, self.clock)
        self._region_means: dict[tuple[int, int], RegionMeans] = {}
        self._coarsened: dict[int, Domain] = {}

    @staticmethod
    @lru_cache(maxsize=16)
    def plane(rows: int, columns: int) -> "Domain":
        """A single tile on a flat rectangle: zero boundaries, equal areas."""
        return Domain(LatLonGrid.plane(rows, columns))

    @property
    def tiles(self) -> int:
        """Number of tiles of the grid."""
        return self.cuts.tiles

    def coarsened(self, factor: int) -> "Domain":
        """The domain of squares of ``factor`` x ``factor`` cells; made once, and its verbs tell this one's clock.

        Raises:
            InputError: the cuts part some of them, or they do not fit the grid.
        """
        if factor == 1:
            return self
        if factor not in self._coarsened:
            grid, cuts = grid_of_squares(self.grid, factor), cuts_of_squares(self.cuts, factor)
            self._coarsened[factor] = Domain(grid, self.mesh, cuts=cuts, clock=self.clock)
        return self._coarsened[factor]

    # The five verbs

    def pad(self, x: Tensor, width: int) -> Tensor:
        """Fills a halo of ``width`` cells around x (..., Y, X): (..., Y + 2 width, X + 2 width).

        Adjoint: accumulate halo. A cell that is copied into halos is used there too, so its gradient
        is the sum over all uses.
        """
        self.check_cells(x)
        padded: Tensor = Pad.call(x, self.halo_exchange(width), self.remembered) if width else x
        return padded

    def gather(self, x: Tensor, axis: str, dim: int | None = None) -> Tensor:
        """Joins the tiles along ``"lat"`` (all rows) or ``"lon"`` (all columns).

        Args:
            dim: the one that runs along the axis; default: as in (..., Y, X).

        Adjoint: reduce-scatter. Every rank of the axis uses every cell, so their gradients are
        summed and each rank keeps its own cells'.
        """
        if self.mesh.size(axis) == 1:
            return x
        joined: Tensor = Gather.call(x, self.axis(axis), DIMS[axis] if dim is None else dim, self.remembered)
        return joined

    def swap(self, x_LNC: Tensor, axis: str) -> Tensor:
        """Moves the split from ``axis`` to the lines: whole lines, fewer of them.

        Args:
            x_LNC: L lines (all that run along ``axis`` through this tile), N owned cells along ``axis``,
                C numbers per cell.

        Returns:
            (L', N', C) with N' all cells along ``axis`` and L' this rank's share of the lines.

        Adjoint: `swap_back`; both only move numbers, so each is the other's inverse and adjoint.
        """
        if self.mesh.size(axis) == 1:
            return x_LNC
        whole_LNC: Tensor = Swap.call(x_LNC, self.axis(axis), self.remembered)
        return whole_LNC

    def swap_back(self, x_LNC: Tensor, axis: str, lines: int) -> Tensor:
        """The inverse of `swap`: ``lines`` is the number of lines that run through this tile."""
        if self.mesh.size(axis) == 1:
            return x_LNC
        owned_LNC: Tensor = SwapBack.call(x_LNC, self.axis(axis), lines, self.remembered)
        return owned_LNC

    def mean(self, x: Tensor, regions: tuple[int, int] | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """Area-weighted mean of x (..., Y, X) over all tiles: (...), the same on every rank.

        For use inside the network. Summed in float32 or better. Adjoint: the sum over tiles of the
        gradients, spread by area. Every rank's loss depends on the mean, and
        so on every cell of every tile.

        Args:
            regions: (R, S), for the means over so many regions of whole cells, (..., R, S), see `RegionMeans`.
            dtype: of the mean, and of its gradient until tiles have added theirs. Default: x's.
        """
        self.check_cells(x)
        of = self._area_mean if regions is None else self._means_over(regions)
        mean: Tensor = Mean.call(x, of, dtype or x.dtype, self.remembered)
        return mean

    def total(self, x: Tensor) -> Tensor:
        """Sum of x over all tiles, any shape, for the end of a loss.

        Adjoint: the identity. Each rank's share enters the total once. Unlike `mean`, the result
        must not be used by further layers.
        """
        summed: Tensor = Total.call(x, self.mesh.tile_group, self.clock) if self.tiles > 1 else x
        return summed

    # Between a tile and the whole grid, for small tensors: tests, figures, examples

    def scatter(self, x: Tensor) -> Tensor:
        """This tile's cells of x (..., nlat, nlon), which every rank holds, on the mesh's device. Nothing is sent."""
        if x.shape[-2:] != (self.grid.nlat, self.grid.nlon):
            raise InputError(
                f"scatter takes a field of the whole grid, {self.grid.nlat} x {self.grid.nlon}, "
                f"got {tuple(x.shape[-2:])}. Pass the same whole field on every rank."
            )
        return x[..., *self.tile.slices].to(self.mesh.device)

    def assemble(self, x: Tensor) -> Tensor:
        """The whole field (..., nlat, nlon) on every rank, from the owned cells x (..., Y, X)."""
        self.check_cells(x)
        return self.gather(self.gather(x, "lon"), "lat")

    def assemble_at(self, x: Tensor, tile: int) -> Tensor | None:
        """The whole field (..., nlat, nlon) on one tile's rank, None on the others: each cell is sent once."""
        self.check_cells(x)
        if self.mesh.tile_group is None:
            return x
        lead, here = x.shape[:-2], self.mesh.tile_index
        nothing, tiles = x.new_empty(0), [self.cuts.tile(number) for number in range(self.tiles)]
        shapes = [torch.Size((*lead, *one.shape)) if here == tile else torch.Size((0,)) for one in tiles]
        pieces = [x if number in (tile, here) else nothing for number in range(self.tiles)]
        others = all_to_all(pieces, shapes, here, self.mesh.tile_group, self.clock)
        if here != tile:
            return None
        whole = x.new_empty(*lead, self.grid.nlat, self.grid.nlon)
        for one, part in zip(tiles, [*others[:here], x, *others[here:]], strict=True):
            whole[..., *one.slices] = part
        return whole

    def verdict(self, passed: bool) -> bool:
        """Whether all tiles say so: lets every rank agree before anyone raises."""
        votes = torch.tensor(float(not passed), device=self.mesh.device)
        return not start_sum(votes, self.mesh.tile_group, self.clock, "verdict")().item()

    # Activation checkpointing

    def recompute_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """``context_fn`` for `torch.utils.checkpoint`: what other tiles have sent is kept, not asked for twice."""
        tape = Tape()
        return self._using(tape, tape.recording()), Again(lambda: self._using(tape, tape.replaying()))

    @contextmanager
    def _using(self, tape: Tape, mode: AbstractContextManager[None]) -> Iterator[None]:
        before, self._tape = self._tape, tape
        try:
            with mode:
                yield
        finally:
            self._tape = before

    def remembered(self, start: Callable[[], Started[Value]]) -> Started[Value]:
        """What ``start`` starts, or what was received when the segment was first computed."""
        return start() if self._tape is None else self._tape.started(start)

    # What moves the numbers

    def _means_over(self, regions: tuple[int, int]) -> RegionMeans:
        """Made once."""
        if regions not in self._region_means:
            if regions[0] > self.grid.nlat or regions[1] > self.grid.nlon:
                raise InputError(
                    f"{regions[0]} x {regions[1]} regions do not fit a grid of {self.grid.nlat} x {self.grid.nlon} "
                    f"cells, as each has some. Use at most as many."
                )
            self._region_means[regions] = RegionMeans(regions, self.coordinates, self.mesh.tile_group, self.clock)
        return self._region_means[regions]

    def axis(self, name: str) -> Axis:
        """The ranks along ``"lat"`` or ``"lon"`` that share this tile's lines."""
        mesh = self.mesh
        return Axis(self.cuts.sizes(name), mesh.index(name), mesh.axis_groups.get(name), self.clock)

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
        seen = gathered_hashes(plan, group, self.mesh.device)
        others = [tile for tile, value in enumerate(seen) if value != seen[0]]
        if others:
            raise InputError(
                f"the tiles do not see the same halo plan: tile(s) {', '.join(map(str, others))} differ from tile 0 in "
                f"grid, cuts or width (here: {self.grid.nlat} x {self.grid.nlon} cells, {self.cuts.lat} x "
                f"{self.cuts.lon} tiles, width {width}). Pass the same grid and cuts on every rank."
            )

    def check_cells(self, x: Tensor) -> None:
        """Raises InputError for a tensor that does not end in the owned cells."""
        if x.shape[-2:] != self.tile.shape:
            raise InputError(
                f"this rank's tile has {self.tile.shape[0]} x {self.tile.shape[1]} cells, the tensor ends in "
                f"{tuple(x.shape[-2:])}. Pass owned cells only: `domain.scatter(x)` cuts them from a whole field."
            )
