"""Moving cells between tiles: started early, waited for late. No autograd here, see domain.py.

Every message between two ranks is one tensor that holds all rectangles for that peer in the plan's
order. One message per pair and phase leaves no order of messages to get wrong, which matters on a
periodic axis of two ranks, where the western and the eastern neighbour are the same peer.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..observe import Clock
from .grid import Cuts, LatLonGrid
from .halo import Rectangle, halo_rectangles, rectangles_sent

Finish = Callable[[], Tensor]
"""Waits for what was started and returns the result."""

Received = dict[int, Tensor]
"""One flat buffer per peer."""


class HaloExchange:
    """Fills and accumulates the halo of one tile, for one width.

    Args:
        grid, cuts, tile_index: the geometry; every rank of the group passes the same grid and cuts.
        width: rows and columns of the halo on every side.
        group: the ranks of the tiles, tile i being rank i of the group; None for a single tile.
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
        self._group = group
        self._clock = clock

    def start_fill(self, owned: Tensor) -> Callable[[], Received]:
        """Owner to halo: sends what other tiles need of ``owned`` (..., Y, X), receives their cells."""
        outgoing = {peer: _pack([_owned_view(owned, part) for part in parts]) for peer, parts in self._sent.items()}
        return self._start(owned, outgoing, self._received, "pad")

    def pad(self, owned: Tensor, received: Received) -> Tensor:
        """The padded tile (..., Y + 2 width, X + 2 width) from owned cells and received ones."""
        padded = self._framed(owned)
        for part in self._local:
            _halo_view(padded, part).copy_(_turned(_owned_view(owned, part), part))
        for peer, parts in self._received.items():
            for part, cells in zip(parts, _unpack(received[peer], owned, parts), strict=True):
                _halo_view(padded, part).copy_(_turned(cells, part))
        return padded

    def start_accumulate(self, padded: Tensor) -> Callable[[], Received]:
        """Halo to owner, the adjoint: sends the halo's values back to the tiles they came from."""
        outgoing = {
            peer: _pack([_turned(_halo_view(padded, part), part) for part in parts])
            for peer, parts in self._received.items()
        }
        return self._start(padded, outgoing, self._sent, "adjoint of pad")

    def add_halo(self, padded: Tensor, received: Received) -> Tensor:
        """The owned cells (..., Y, X) with what came back from all halos they are copied into, added."""
        width, (rows, columns) = self.width, self.shape
        owned = padded[..., width : width + rows, width : width + columns].clone()
        for part in self._local:
            _owned_view(owned, part).add_(_turned(_halo_view(padded, part), part))
        for peer, parts in self._sent.items():
            for part, cells in zip(parts, _unpack(received[peer], owned, parts), strict=True):
                _owned_view(owned, part).add_(cells)
        return owned

    def _framed(self, owned: Tensor) -> Tensor:
        width, (rows, columns) = self.width, self.shape
        shape = (*owned.shape[:-2], rows + 2 * width, columns + 2 * width)
        padded = owned.new_empty(shape) if self._covers_halo else owned.new_zeros(shape)
        padded[..., width : width + rows, width : width + columns] = owned
        return padded

    def _start(
        self, like: Tensor, outgoing: dict[int, Tensor], expected: dict[int, list[Rectangle]], verb: str
    ) -> Callable[[], Received]:
        """One grouped exchange, a message each way for every peer."""
        lead = like.shape[:-2].numel()
        incoming = {peer: like.new_empty(lead * sum(part.cells for part in parts)) for peer, parts in expected.items()}
        operations = [
            dist.P2POp(operation, buffer, group=self._group, group_peer=peer)
            for operation, buffers in ((dist.irecv, incoming), (dist.isend, outgoing))
            for peer, buffer in sorted(buffers.items())
        ]
        with self._clock.timing("exchange", verb):
            works = dist.batch_isend_irecv(operations) if operations else []

        def finish() -> Received:
            with self._clock.timing("exchange", verb):
                for work in works:
                    work.wait()
            outgoing.clear()  # sent; until here the buffers had to live
            return incoming

        return finish


def start_sum(value: Tensor, group: dist.ProcessGroup | None, clock: Clock, verb: str) -> Finish:
    """Starts the sum of ``value`` over the group, for a verb; ``value`` is overwritten."""
    if group is None:
        return lambda: value
    with clock.timing("exchange", verb):
        work = dist.all_reduce(value, group=group, async_op=True)

    def finish() -> Tensor:
        with clock.timing("exchange", verb):
            work.wait()
        return value

    return finish


def gather(tile: Tensor, dim: int, sizes: Sequence[int], group: dist.ProcessGroup, clock: Clock) -> Tensor:
    """Joins the tiles of all ranks of the group along ``dim``, whose sizes are ``sizes``.

    Tiles are filled up to the largest, because collectives want equal parts, and trimmed again.
    """
    largest = max(sizes)
    part = _filled(tile.movedim(dim, 0), largest)
    parts = part.new_empty(len(sizes) * largest, *part.shape[1:])
    with clock.timing("exchange", "gather"):
        dist.all_gather_single(parts, part, group=group)
    parts = parts.view(len(sizes), largest, *part.shape[1:])
    return torch.cat([parts[rank, :size] for rank, size in enumerate(sizes)]).movedim(0, dim)


def reduce_scatter(
    whole: Tensor, dim: int, sizes: Sequence[int], index: int, group: dist.ProcessGroup, clock: Clock
) -> Tensor:
    """Sums ``whole`` over the group and leaves each rank its own part along ``dim``: adjoint of `gather`."""
    largest = max(sizes)
    spans = whole.movedim(dim, 0).to(at_least_float32(whole.dtype)).split(list(sizes))
    parts = torch.cat([_filled(span, largest) for span in spans])
    part = parts.new_empty(largest, *parts.shape[1:])
    with clock.timing("exchange", "adjoint of gather"):
        dist.reduce_scatter_single(part, parts, group=group)
    return part[: sizes[index]].to(whole.dtype).movedim(0, dim)


def all_to_all(
    pieces: Sequence[Tensor], shapes: Sequence[torch.Size], group: dist.ProcessGroup, clock: Clock
) -> list[Tensor]:
    """Sends piece i to rank i of the group and returns what each rank sent here, of the given shapes."""
    outgoing = torch.cat([piece.reshape(-1) for piece in pieces])
    counts = [shape.numel() for shape in shapes]
    incoming = outgoing.new_empty(sum(counts))
    with clock.timing("exchange", "swap"):
        dist.all_to_all_single(
            incoming,
            outgoing,
            output_split_sizes=counts,
            input_split_sizes=[piece.numel() for piece in pieces],
            group=group,
        )
    return [part.view(shape) for part, shape in zip(incoming.split(counts), shapes, strict=True)]


def gathered_hashes(text: str, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """A 63-bit hash of every rank's text."""
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    mine = torch.tensor([digest], dtype=torch.int64, device=device)
    everyone = mine.new_empty(dist.get_world_size(group))
    dist.all_gather_single(everyone, mine, group=group)
    hashes: list[int] = everyone.tolist()
    return hashes


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type in which values of ``dtype`` are summed: float64 stays, all others become float32."""
    return dtype if dtype == torch.float64 else torch.float32


def _filled(part: Tensor, size: int) -> Tensor:
    filled = part.new_zeros(size, *part.shape[1:])
    filled[: part.shape[0]] = part
    return filled


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
