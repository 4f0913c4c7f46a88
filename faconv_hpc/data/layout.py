"""What a store looks like on disk: names, the description of its content, and store.nc.

A store is a directory. ``fields-00000.nc``, ``fields-00001.nc``, ... hold some frames each; ``static.nc`` has the
fields without time, where there are any; ``store.nc`` holds everything else and is written last, so a directory without
it is not finished. All are NetCDF4: any tool opens them.

A store that was extended has more of both: files that go on in time, files of the channels that came later (a `block`
of their own), another file of fields without time. store.nc says which.

Every byte that a run depends on is checked: HDF5 keeps a checksum of every chunk (Fletcher-32) and of its own
structures (`LIBVER`), store.nc a digest of all it says, and every file of fields the store's fingerprint and its place.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..files import check_in_reach
from .chunks import VALUE_BYTES, ChunkShape, channels_per_chunk
from .times import TimeAxis

FORMAT = "faconv_hpc store"
FORMAT_VERSION, EXTENDED_VERSION = 3, 4  # what was never extended is as before, and read by what came before
LIBVER = ("v110", "v110")
"""HDF5's file format with checksums of its structures, read by every HDF5 since 1.10 (2016)."""
STORE_FILE = "store.nc"
STATIC_FILE = "static.nc"
MOMENTS = "moments"  # (channel, 8) in every file of fields, see `ChannelMoments.as_row`
SEQUENCE, SEQUENCE_NAME = "sequence", "sequence_name"
"""Of every frame the number of its sequence, and the names of all; where there are several."""
SYNTHETIC = "synthetic"
"""In the provenance of a store that was made without a source, or of such stores: its fields are not of the Earth."""
DIMS = ("time", "channel", "latitude", "longitude")


@dataclass(frozen=True)
class Channel:
    """One field of a store."""

    name: str
    units: str = ""
    long_name: str = ""


@dataclass(frozen=True)
class Static:
    """A field that does not change in time, with its area-weighted mean and standard deviation."""

    channel: Channel
    mean: float
    std: float


@dataclass(frozen=True)
class FileEntry:
    """One file of fields: where its frames stand among all, and its size when it was finished.

    Attributes:
        fingerprint: of the request that it was made by.
        block: which channels it has, see `StoreLayout.blocks`.
    """

    name: str
    first_frame: int
    frames: int
    size_bytes: int
    fingerprint: str
    block: int = 0


@dataclass(frozen=True)
class StaticFile:
    """The file of fields without time."""

    name: str
    size_bytes: int
    fingerprint: str


@dataclass(frozen=True, eq=False)
class StoreLayout:
    """All that is decided before the first frame is written.

    Args:
        latitude_deg: (latitude,) float64, north first.
        longitude_deg: (longitude,) float64, increasing.
        static: fields without time.
        compression: gzip level 1 to 9, or None.
        provenance: JSON-like: sources, command, versions.
        chunk: of the first block; those of others differ in their channels.
        blocks: first channels of the blocks. Those of one block are in the same files.
    """

    latitude_deg: NDArray[np.float64]
    longitude_deg: NDArray[np.float64]
    channels: tuple[Channel, ...]
    time: TimeAxis
    chunk: ChunkShape
    mesh: tuple[int, int]
    frames_per_file: int
    static: tuple[Channel, ...] = ()
    compression: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    blocks: tuple[int, ...] = (0,)

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(nlat, nlon)."""
        return self.latitude_deg.size, self.longitude_deg.size

    def channels_of(self, block: int) -> range:
        """Positions of the channels of a block."""
        return range(self.blocks[block], (*self.blocks, len(self.channels))[block + 1])

    def of_block(self, block: int) -> "StoreLayout":
        """As if there were no other channels: what its files look like."""
        own = self.channels_of(block)
        depth = self.chunk.channels
        if block:
            depth = channels_per_chunk(len(own), self.chunk.rows * self.chunk.columns * VALUE_BYTES)
        chunk = replace(self.chunk, channels=depth)
        return replace(self, channels=self.channels[own.start : own.stop], chunk=chunk, blocks=(0,))


def file_name(file: int) -> str:
    """Name of a file of fields."""
    return f"fields-{file:05d}.nc"


@dataclass(frozen=True, eq=False)
class StoreContent:
    """What store.nc says: the layout, the statistics per channel, the table of files.

    Attributes:
        files: block by block, in the order of time.
        fingerprint: of the request that the store was first made by.
    """

    layout: StoreLayout
    files: tuple[FileEntry, ...]
    fingerprint: str
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    tendency_std: NDArray[np.float64]
    valid_share: NDArray[np.float64]
    year_fraction: NDArray[np.float64]
    utc_hour: NDArray[np.float64]
    has_missing: bool
    static: tuple[Static, ...] = ()
    static_file: StaticFile | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of all files beside store.nc."""
        return (*(entry.name for entry in self.files), *([self.static_file.name] if self.static_file else []))

    @property
    def is_extended(self) -> bool:
        """Whether something was added since the store was made."""
        static = () if self.static_file is None else (self.static_file.fingerprint,)
        marks = {*static, *(entry.fingerprint for entry in self.files)}
        return marks != {self.fingerprint}

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        sizes = ("name", "first_frame", "frames", "size_bytes")
        rest: dict[str, Any] = {}
        if self.static_file is not None:
            rest |= {"static": [asdict(one) for one in self.static], "bytes": self.static_file.size_bytes}
        if self.is_extended:
            rest |= {"blocks": self.layout.blocks, "made": [(one.block, one.fingerprint) for one in self.files]}
            rest |= {"static_file": self.static_file and asdict(self.static_file)}
        layout = self.layout
        statistics = (self.mean, self.std, self.tendency_std, self.valid_share, self.year_fraction, self.utc_hour)
        return digest_of(
            (layout.latitude_deg, layout.longitude_deg, layout.time.seconds, *statistics),
            {
                "channels": [asdict(channel) for channel in layout.channels],
                "calendar": layout.time.calendar,
                "chunk": layout.chunk.dims,
                "mesh": layout.mesh,
                "frames_per_file": layout.frames_per_file,
                "compression": layout.compression,
                "provenance": layout.provenance,
                "files": [{key: getattr(entry, key) for key in sizes} for entry in self.files],
                "fingerprint": self.fingerprint,
                "has_missing": self.has_missing,
            }
            | rest
            | layout.time.said_of_sequences,
        )


def digest_of(arrays: Iterable[NDArray[Any]], rest: Mapping[str, Any]) -> str:
    """SHA-256 of arrays and of what JSON can say."""
    digest = hashlib.sha256()
    for values in arrays:
        digest.update(np.ascontiguousarray(values).tobytes())
    digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()


def read_store_file(path: Path) -> StoreContent:
    """Reads store.nc.

    Raises:
        InputError: it is damaged, no store of ours, or of another version.
        TryAgainError: its file system is away.
    """
    try:
        with h5py.File(path, "r", locking=False) as h5:
            _check_format(path, h5.attrs)
            content = _content(h5)
            if content.digest != h5.attrs["digest"]:
                raise OSError("what it says is not what was written")
            return content
    except InputError:
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:  # as HDF5, or a text or number in it
        check_in_reach(path, error)
        raise InputError(
            f"{path} is damaged ({error}). Copy the store again, or prepare it anew with "
            f"`faconv data prepare ... --output {path.parent} --overwrite`."
        ) from None


def are_synthetic(paths: Iterable[Path]) -> bool:
    """Whether data are stores, or files of stores, that all say that they are synthetic."""
    stores = {(path if path.is_dir() else path.parent) / STORE_FILE for path in paths}
    return bool(stores) and all(map(_is_synthetic, stores))


def _is_synthetic(path: Path) -> bool:
    """Of a file that may be of another program: who reads what lies beside it judges that, if it must."""
    try:
        return path.is_file() and bool(read_store_file(path).layout.provenance.get(SYNTHETIC, False))
    except InputError:
        return False


def _check_format(path: Path, attributes: h5py.AttributeManager) -> None:
    if attributes.get("format") != FORMAT:
        raise InputError(
            f"{path} is an HDF5 file of another program: its attribute 'format' is "
            f"{attributes.get('format')!r}, not {FORMAT!r}. Make a store with `faconv data prepare`."
        )
    version = _number(attributes["format_version"])
    if version not in (FORMAT_VERSION, EXTENDED_VERSION):
        raise InputError(
            f"{path} has store format {version}, this faconv_hpc reads {FORMAT_VERSION} and {EXTENDED_VERSION}. "
            f"Install the version that wrote it, or run `faconv data prepare` again."
        )


def _content(h5: h5py.File) -> StoreContent:
    texts = {name: [str(text) for text in h5[name].asstr()[:]] for name in ("channel", "units", "long_name", "file")}
    statistics = ("mean", "std", "tendency_std", "valid_share")
    numbers = {name: h5[name][:] for name in (*statistics, "year_fraction", "utc_hour")}
    chunk = [int(size) for size in h5.attrs["chunk_shape"]]
    mesh = [int(size) for size in h5.attrs["intended_mesh"]]
    static, first = _static(h5), str(h5.attrs["fingerprint"])
    layout = StoreLayout(
        latitude_deg=h5["latitude"][:],
        longitude_deg=h5["longitude"][:],
        channels=tuple(map(Channel, texts["channel"], texts["units"], texts["long_name"])),
        time=TimeAxis(h5["time"][:], str(h5["time"].attrs["calendar"]), *_sequences(h5)),
        chunk=ChunkShape(*chunk[1:]),
        mesh=(mesh[0], mesh[1]),
        frames_per_file=_number(h5.attrs["frames_per_file"]),
        static=tuple(one.channel for one in static),
        compression=_number(h5.attrs["compression"]) or None,
        provenance=json.loads(h5.attrs["provenance"]),
        blocks=tuple(h5.attrs["blocks"].tolist()) if "blocks" in h5.attrs else (0,),
    )
    table = [h5[name][:].tolist() for name in ("first_frame", "frames", "size_bytes")]
    marks = h5["file_fingerprint"].asstr()[:].tolist() if "file_fingerprint" in h5 else [first] * len(texts["file"])
    blocks = h5["file_block"][:].tolist() if "file_block" in h5 else [0] * len(texts["file"])
    return StoreContent(
        layout,
        tuple(map(FileEntry, texts["file"], *table, marks, blocks)),
        first,
        has_missing=bool(_number(h5.attrs["has_missing"])),
        static=static,
        static_file=_static_file(h5, first) if static else None,
        **numbers,
    )


def _static_file(h5: h5py.File, first: str) -> StaticFile:
    name, mark = h5.attrs.get("static_file", STATIC_FILE), h5.attrs.get("static_made", first)
    return StaticFile(str(name), _number(h5.attrs["static_bytes"]), str(mark))


def _sequences(h5: h5py.File) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """First frames and names; where there is but one, it has no name."""
    if SEQUENCE not in h5:
        return (0,), ()
    names = tuple(str(text) for text in h5[SEQUENCE_NAME].asstr()[:])
    return tuple(np.searchsorted(h5[SEQUENCE][:], np.arange(len(names))).tolist()), names


def _static(h5: h5py.File) -> tuple[Static, ...]:
    if "static" not in h5:
        return ()
    texts = [[str(text) for text in h5[name].asstr()[:]] for name in ("static", "static_units", "static_long_name")]
    numbers = (h5[name][:].tolist() for name in ("static_mean", "static_std"))
    return tuple(map(Static, map(Channel, *texts), *numbers))


def _number(attribute: NDArray[np.int64]) -> int:
    return int(np.ravel(attribute)[0])  # NetCDF4 keeps a number as an array of one
