"""Which chunks of a zarr source are on disk: what is left out reads as the fill value, without an error."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import xarray as xr

from ..errors import InputError


class ZarrChunks:
    """Looks for the chunks of a zarr directory before they are read, each once.

    Args:
        path: of the source.
    """

    def __init__(self, path: Path) -> None:
        import zarr  # here, as most sources are none

        self._path, self._group = path, zarr.open_group(path, mode="r")
        self._seen: set[Path] = set()

    def check(self, array: xr.DataArray, picked: Mapping[Hashable, slice | int | list[int]]) -> None:
        """Whether all chunks are there that hold some part of an array.

        Args:
            picked: indices or an extent along every dim of ``array``, which are those of the zarr array.

        Raises:
            InputError: naming the first chunk that is not.
        """
        stored: Any = self._group[str(array.name)]
        extents = stored.shards or stored.chunks
        touched = [
            _chunks_of(picked[dim], size, extent)
            for dim, size, extent in zip(array.dims, array.shape, extents, strict=True)
        ]
        for place in product(*touched):
            file = self._path / stored.path / stored.metadata.encode_chunk_key(place)
            if file in self._seen:
                continue
            if not file.exists():
                raise InputError(
                    f"the chunk {file.relative_to(self._path)} of {array.name!r} in {self._path} is not there: zarr "
                    f"would read it as {stored.fill_value}. Complete the copy of the source and run this command "
                    f"again; or, if it is whole and only leaves out chunks of nothing else, give --fill-absent-chunks."
                )
            self._seen.add(file)


def _chunks_of(picked: slice | int | list[int], size: int, extent: int) -> Sequence[int]:
    if isinstance(picked, int):
        return [picked // extent]
    if isinstance(picked, list):
        return sorted({index // extent for index in picked})
    start, stop, _ = picked.indices(size)
    return range(start // extent, -(-stop // extent))
