"""Moving halos between tiles: started early, waited for late. No autograd here, see operations.py.

Every message between two ranks is one tensor that holds all rectangles for that peer in the plan's
order. One message per pair and phase leaves no order of messages to get wrong, which matters on a
periodic axis of two ranks, where the western and the eastern neighbour are the same peer.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from ..observe import Clock
from .collectives import carried
from .grid import Cuts, LatLonGrid
from .halo import Rectangle, halo_rectangles, rectangles_sent
from .messages import start_messages

Received = dict[int, Tensor]
"""One flat buffer per peer."""


class HaloExchange:
    """Fills and accumulates the halo of one tile, for one width.

    Args:
        grid, cuts, tile_index: the geometry; every rank of the group passes the same grid and cuts.
        width: rows and columns of the halo on every side.
        group: the ranks of the tiles, tile i being rank i of the group; None for a single tile.

    Attributes:
        core: the owned rows that look at no cell of another tile, no further than ``width``, one after the other: all
            of a single tile, none where columns are cut.
        edges: the others, north and south of them.
        inside, outside: the padded rows that some row of the core looks at, and the others, all received ones among
            them: what comes back to these hangs on the edges alone.
    """

    def __init__(
        self, grid: LatLonGrid, cuts: Cuts, tile_index: int, width: int, group: dist.ProcessGroup | None, clock: Clock
    ) -> None:
        self.width = width
        self.shape = cuts.tile(tile_index).shape
        rectangles = halo_rectangles(grid, cuts, tile_index, width)
        self._local = [rectangle for rectangle in rectangles if rectangle.source == tile_index]
        self._received = _by_peer(rectangles, "source", tile_index)
        self._sent = _by_peer(rectangles_sent(grid, cuts, tile_index, width), "destination", tile_index)
        rows, columns = self.shape
        halo_cells = (rows + 2 * width) * (columns + 2 * width) - rows * columns
        self._covers_halo = sum(rectangle.cells for rectangle in rectangles) == halo_cells
        core = self._core()
        self.core, self.edges = _cut(rows, core)
        self.inside, self.outside = _cut(rows + 2 * width, range(core.start, core.stop + 2 * width) if core else core)
        self._group = group
        self._clock = clock

    def start_fill(self, owned: Tensor) -> Callable[[], Received]:
        """Owner to halo: sends what other tiles need of ``owned`` (..., Y, X), receives their cells."""
        outgoing = {peer: _pack([_owned_view(owned, part) for part in parts]) for peer, parts in self._sent.items()}
        return self._start(owned, outgoing, self._received, "pad")

    def pad(self, owned: Tensor, received: Received) -> Tensor:
        """The padded tile (..., Y + 2 width, X + 2 width) from owned cells and received ones."""
        padded = self.framed(owned)
        self.owned(padded).copy_(owned)
        self.fill_own(padded)
        self.fill_received(padded, received)
        return padded

    def fill_own(self, padded: Tensor) -> None:
        """Fills what of the halo of a tile (..., Y + 2 width, X + 2 width) is of its own cells, which stand in it."""
        owned = self.owned(padded)
        for part in self._local:
            _halo_view(padded, part).copy_(_turned(_owned_view(owned, part), part))

    def fill_received(self, padded: Tensor, received: Received) -> None:
        """Fills the rest. Cells beyond a ``zero`` boundary stay what they are."""
        for peer, parts in self._received.items():
            for part, cells in zip(parts, _unpack(received[peer], padded, parts), strict=True):
                _halo_view(padded, part).copy_(_turned(cells, part))

    def start_accumulate(self, padded: Tensor) -> Callable[[], Received]:
        """Halo to owner, the adjoint: sends the halo's values back to the tiles they came from."""
        outgoing = {
            peer: _pack([_turned(_halo_view(padded, part), part) for part in parts])
            for peer, parts in self._received.items()
        }
        return self._start(padded, outgoing, self._sent, "adjoint of pad")

    def add_halo(self, padded: Tensor, received: Received, owned: Tensor) -> Tensor:
        """Adds to the owned cells (..., Y, X) what came back from all halos they are copied into; returns them."""
        for part in self._local:
            _owned_view(owned, part).add_(_turned(_halo_view(padded, part), part))
        for peer, parts in self._sent.items():
            for part, cells in zip(parts, _unpack(received[peer], owned, parts), strict=True):
                _owned_view(owned, part).add_(cells)
        return owned

    def framed(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A padded tile whose cells are to be written: those that nothing is copied into are 0. Default: its type."""
        shape = (*like.shape[:-2], *(size + 2 * self.width for size in self.shape))
        make = like.new_empty if self._covers_halo else like.new_zeros
        return make(shape, dtype=dtype)

    def owned(self, padded: Tensor) -> Tensor:
        """The owned cells (..., Y, X) of a padded tile, a view."""
        width, (rows, columns) = self.width, self.shape
        return padded[..., width : width + rows, width : width + columns]

    def _core(self) -> range:
        """The owned rows whose padded row, and ``2 width`` after it, hold no cell of another tile: those south of all
        that is received in the north, and north of all in the south."""
        beyond = {row for parts in self._received.values() for part in parts for row in range(*part.rows)}
        own = [row for row in range(self.shape[0]) if beyond.isdisjoint(range(row, row + 2 * self.width + 1))]
        return range(own[0], own[-1] + 1) if own else range(0)

    def _start(
        self, like: Tensor, outgoing: dict[int, Tensor], expected: dict[int, list[Rectangle]], verb: str
    ) -> Callable[[], Received]:
        """One grouped exchange, a message each way for every peer."""
        lead = like.shape[:-2].numel()
        outgoing = {peer: carried(cells, self._group) for peer, cells in outgoing.items()}
        incoming = {
            peer: carried(like.new_empty(lead * sum(part.cells for part in parts)), self._group)
            for peer, parts in expected.items()
        }
        with self._clock.communicating(verb):
            sent = start_messages(outgoing, incoming, self._group)

        def finish() -> Received:
            with self._clock.communicating(verb):
                sent()
            outgoing.clear()  # until here the buffers had to live
            return {peer: cells.to(like.device) for peer, cells in incoming.items()}

        return finish


def _cut(count: int, core: range) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """So many rows: the core, and those before and after it, as far as there are some."""
    north, middle, south = (slice(*ends) for ends in pairwise((0, core.start, core.stop, count)))
    return (middle,) if core else (), tuple(rows for rows in (north, south) if rows.start < rows.stop)


def _by_peer(rectangles: Sequence[Rectangle], role: str, here: int) -> dict[int, list[Rectangle]]:
    peers: dict[int, list[Rectangle]] = defaultdict(list)
    for rectangle in rectangles:
        peer = rectangle.source if role == "source" else rectangle.destination
        if peer != here:
            peers[peer].append(rectangle)
    return dict(peers)


def _owned_view(owned: Tensor, part: Rectangle) -> Tensor:
    """The cells of a rectangle where they are owned."""
    return owned[..., slice(*part.source_rows), slice(*part.source_columns)]


def _halo_view(padded: Tensor, part: Rectangle) -> Tensor:
    """The cells of a rectangle where they are halo."""
    return padded[..., slice(*part.rows), slice(*part.columns)]


def _turned(cells: Tensor, part: Rectangle) -> Tensor:
    """From the owner's order of rows to the halo's or back: the same turn both ways."""
    return cells.flip(-2) if part.mirrored else cells


def _pack(views: Sequence[Tensor]) -> Tensor:
    return torch.cat([view.reshape(-1) for view in views])


def _unpack(buffer: Tensor, like: Tensor, parts: Sequence[Rectangle]) -> list[Tensor]:
    """The rectangles of a message, rows in the owner's order."""
    lead = like.shape[:-2]
    shapes = [(*lead, part.rows[1] - part.rows[0], part.columns[1] - part.columns[0]) for part in parts]
    pieces = buffer.split([lead.numel() * part.cells for part in parts])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
