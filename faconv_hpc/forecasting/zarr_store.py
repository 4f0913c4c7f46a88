"""Forecasts as zarr v3: every rank writes chunks of its own, none of which two share.

zarr is imported by what writes or reads one: it takes half a second, on every rank of an evaluation too.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..files import flush_tree, write_durably
from .layout import ForecastLayout

if TYPE_CHECKING:
    import zarr

CONTENT = "forecast.zarr"
CHUNKS = "c"
"""The directory of an array's chunks in zarr v3; below it there is one for each index of the first dim."""


class ZarrWriter:
    """Writes a zarr store in a directory, which it leaves when all is there.

    Args:
        directory: where it is made, and what says which dates are done.
        attributes: of the store.
    """

    def __init__(self, directory: Path, layout: ForecastLayout, attributes: Mapping[str, str]) -> None:
        self._directory, self._layout, self._attributes = directory, layout, attributes

    def prepare(self) -> None:
        """Makes the arrays, if they are not there."""
        if self._marker("made").exists():
            return
        import zarr

        group = zarr.create_group(self._content, zarr_format=3, attributes=dict(self._attributes), overwrite=True)
        for one in self._layout.coordinates():
            array = group.create_array(
                one.name, data=one.values, chunks=one.values.shape, dimension_names=[one.name],
                attributes=one.attributes,
            )  # fmt: skip
            assert array.shape == one.values.shape, f"{one.name} has {array.shape}"
        for field in self._layout.fields:
            group.create_array(
                field.name,
                shape=self._layout.shape_of(field),
                chunks=self._layout.chunks_of(field),
                dtype=np.float32,
                fill_value=np.float32(np.nan),
                dimension_names=self._layout.dims_of(field),
                attributes=field.attributes,
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Cc]onsolidated metadata")  # of zarr 3, which xarray reads
            zarr.consolidate_metadata(self._content)
        flush_tree(self._content)
        write_durably(self._marker("made"), "")

    def is_done(self, init: int) -> bool:
        """Whether all of a date is there."""
        return self._marker(f"init-{init:06d}").exists()

    def tile_of(self, channel: int, tiles: int) -> int:
        """The tile whose rank writes a channel: each has its share."""
        return channel % tiles

    @contextmanager
    def writing(self, init: int, first: bool) -> Iterator["Chunks"]:
        """The chunks of a date; when the block ends all ranks of its replica have written theirs."""
        import zarr

        yield Chunks(zarr.open_group(self._content, mode="r+"), self._layout, init)
        if first:
            chunks = [self._content / field.name / CHUNKS / str(init) for field in self._layout.fields]
            for directory in filter(Path.is_dir, chunks):  # chunks of missing cells alone are no files
                flush_tree(directory)
            write_durably(self._marker(f"init-{init:06d}"), "")

    def finish(self, final: Path) -> Iterator[None]:
        """Gives it its name; one that is there goes."""
        if final.exists():
            final.rename(self._directory / "replaced.zarr")
        self._content.rename(final)
        yield

    @property
    def _content(self) -> Path:
        return self._directory / CONTENT

    def _marker(self, name: str) -> Path:
        return self._directory / f"{name}.done"


class Chunks:
    """One date's forecast that is being written."""

    def __init__(self, group: "zarr.Group", layout: ForecastLayout, init: int) -> None:
        self._group, self._layout, self._init = group, layout, init

    def write(self, channel: int, lead: int, field_YX: NDArray[np.float32]) -> None:
        """A field of the whole grid."""
        name, place = self._layout.place_in(channel, self._init, lead)
        self._group[name][place] = field_YX


def attributes_in(path: Path) -> dict[str, Any]:
    """Of a store; none where it cannot be read as zarr."""
    import zarr

    try:
        return dict(zarr.open_group(path, mode="r").attrs)
    except (OSError, ValueError, KeyError):
        return {}
