"""Which HDF5 chunks suit which tiles, and how many bytes a tile then reads. Arithmetic only."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..errors import InputError
from ..spatial.grid import Span, Tile, split_evenly

MIN_CHUNK_BYTES = 32 * 1024  # smaller ones are gathered over channels
MAX_CHUNK_BYTES = 8 * 1024 * 1024
CHUNK_OVERHEAD_BYTES = 16 * 1024  # finding a chunk costs about as much as reading this (10 us at 1.6 GB/s; a guess)
VALUE_BYTES = 4  # float32
MASK_BYTES = 1  # uint8


@dataclass(frozen=True)
class ChunkShape:
    """Extent of one HDF5 chunk of ``fields``: always one frame deep."""

    channels: int
    rows: int
    columns: int

    @property
    def cells(self) -> int:
        """Values in one chunk."""
        return self.channels * self.rows * self.columns

    @property
    def dims(self) -> tuple[int, int, int, int]:
        """As HDF5 wants it: (time, channel, latitude, longitude)."""
        return 1, self.channels, self.rows, self.columns


def chunk_shape(grid_shape: tuple[int, int], lat: int, lon: int, channels: int) -> ChunkShape:
    """The chunks with which ``lat`` x ``lon`` tiles together read least.

    The rule: every height that cuts some tile of `split_evenly` into equal parts is tried with
    every such width. All tiles together touch ``n`` chunks of one channel; the pair with the least
    ``n x (bytes of a chunk + CHUNK_OVERHEAD_BYTES / channels)`` wins, chunks over
    ``MAX_CHUNK_BYTES`` excepted. So a chunk that straddles two tiles counts twice, one that hangs
    over the grid's limit counts whole, and exactness is not bought with crumbs. Chunks below
    ``MIN_CHUNK_BYTES`` then take in as many channels as they need to reach it, a number that
    divides ``channels``, so that no chunk is partly empty.

    Args:
        grid_shape: (nlat, nlon).
        lat, lon: number of tiles along each axis of the intended mesh.
        channels: number of channels in the store.

    Raises:
        InputError: more tiles than rows or columns.
    """
    heights = _touched(split_evenly(grid_shape[0], lat, "lat"))
    widths = _touched(split_evenly(grid_shape[1], lon, "lon"))
    overhead = CHUNK_OVERHEAD_BYTES / channels
    costs = {
        (rows, columns): row_chunks * column_chunks * (rows * columns * VALUE_BYTES + overhead)
        for rows, row_chunks in heights.items()
        for columns, column_chunks in widths.items()
        if rows * columns * VALUE_BYTES <= MAX_CHUNK_BYTES
    }
    rows, columns = min(costs, key=lambda shape: costs[shape])
    return ChunkShape(channels_per_chunk(channels, rows * columns * VALUE_BYTES), rows, columns)


def _touched(edges: Sequence[int]) -> dict[int, int]:
    """Candidate chunk sizes along one axis -> chunks touched by all tiles together."""
    spans = list(pairwise(edges))
    sizes = {stop - start for start, stop in spans}
    candidates = {-(-size // parts) for size in sizes for parts in _equal_parts(size)}
    return {size: sum(_chunks_touched(span, size) for span in spans) for size in sorted(candidates, reverse=True)}


def _equal_parts(size: int) -> set[int]:
    """Numbers of parts whose ceil(size / parts) are all different: about 2 sqrt(size) of them."""
    return {-(-size // part) for part in range(1, size + 1)} if size > 1 else {1}


def channels_per_chunk(channels: int, plane_bytes: int) -> int:
    """How many channels a chunk takes in, of which each has so many bytes in it; see `chunk_shape`."""
    divisors = [count for count in range(1, channels + 1) if channels % count == 0]
    allowed = [count for count in divisors if count == 1 or count * plane_bytes <= MAX_CHUNK_BYTES]
    return next((count for count in allowed if count * plane_bytes >= MIN_CHUNK_BYTES), allowed[-1])


def _chunks_touched(span: Span, size: int) -> int:
    return -(-span[1] // size) - span[0] // size


def bytes_needed(tile: Tile, channels: int, *, has_missing: bool) -> int:
    """Bytes of one frame of a tile: its cells, and one byte of mask per cell where data are missing."""
    rows, columns = tile.shape
    return rows * columns * channels * (VALUE_BYTES + (MASK_BYTES if has_missing else 0))


def bytes_read(tile: Tile, channels: Sequence[int], shape: ChunkShape, *, has_missing: bool) -> int:
    """Bytes of all chunks that hold a part of one frame of a tile, before any compression."""
    groups = len({channel // shape.channels for channel in channels})
    touched = groups * _chunks_touched(tile.rows, shape.rows) * _chunks_touched(tile.columns, shape.columns)
    return touched * shape.cells * (VALUE_BYTES + (MASK_BYTES if has_missing else 0))


def parse_mesh(text: str) -> tuple[int, int]:
    """``"2x4"`` -> (2, 4): tiles along latitude and along longitude.

    Raises:
        InputError: anything else.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise InputError(
            f"a mesh is written LATxLON with two positive numbers, got {text!r}. Write for example 2x4: "
            f"2 tiles along latitude, 4 along longitude."
        )
    return int(parts[0]), int(parts[1])
