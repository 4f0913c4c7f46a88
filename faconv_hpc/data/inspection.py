"""What a store holds and what a mesh would read of it, as plain numbers."""

from dataclasses import asdict
from typing import Any

from ..spatial.grid import Cuts, LatLonGrid
from .store import Store
from .times import describe_steps, is_regular


def describe_store(store: Store) -> dict[str, Any]:
    """Coordinates, times, channels with their statistics, chunks, provenance."""
    layout = store.layout
    smallest, largest = describe_steps(layout.time)
    return {
        "path": str(store.path),
        "grid": {
            "nlat": layout.grid_shape[0],
            "nlon": layout.grid_shape[1],
            "latitude_deg": [float(store.latitude_deg[0]), float(store.latitude_deg[-1])],
            "longitude_deg": [float(store.longitude_deg[0]), float(store.longitude_deg[-1])],
        },
        "time": {
            "frames": store.frames,
            "first": layout.time.label(0),
            "last": layout.time.label(store.frames - 1),
            "calendar": store.calendar,
            "step_hours": [smallest, largest],
            "regular": is_regular(layout.time),
            "sequences": [
                {"name": name, "frames": len(own), "first": layout.time.date(own[0]), "last": layout.time.date(own[-1])}
                for name, own in zip(layout.time.names, layout.time.sequences, strict=False)
            ],
        },
        "channels": [
            {
                "name": channel.name,
                "units": channel.units,
                "long_name": channel.long_name,
                "mean": float(store.mean[index]),
                "std": float(store.std[index]),
                "tendency_std": float(store.tendency_std[index]),
                "missing_share": float(1.0 - store.valid_share[index]),
            }
            for index, channel in enumerate(layout.channels)
        ],
        "static": [{**asdict(one.channel), "mean": one.mean, "std": one.std} for one in store.static],
        "files": len(store.files),
        "size_bytes": store.size_bytes,
        "chunk_shape": list(layout.chunk.dims),
        "compression": layout.compression,
        "intended_mesh": list(layout.mesh),
        "provenance": layout.provenance,
    }


def describe_reading(store: Store, mesh: tuple[int, int], window: int | None = None) -> dict[str, Any]:
    """What each tile of a mesh needs and reads, per frame or, with ``window``, per sample.

    A sample is ``window`` input frames and one more.

    Raises:
        InputError: more tiles than rows or columns.
    """
    nlat, nlon = store.layout.grid_shape
    cuts = Cuts.even(LatLonGrid(nlat, nlon), *mesh)
    frames = 1 if window is None else window + 1
    every = range(len(store.channels))
    tiles: list[dict[str, Any]] = []
    for index in range(cuts.tiles):
        tile = cuts.tile(index)
        needed, read = frames * store.bytes_needed(tile, every), frames * store.bytes_read(tile, every)
        shape = {"rows": list(tile.rows), "columns": list(tile.columns)}
        tiles.append({"tile": index, **shape, "bytes_needed": needed, "bytes_read": read, "ratio": read / needed})
    needed, read = (sum(tile[key] for tile in tiles) for key in ("bytes_needed", "bytes_read"))
    totals = {"bytes_needed": needed, "bytes_read": read, "ratio": read / needed}
    return {"mesh": list(mesh), "frames": frames, "tiles": tiles, **totals}
