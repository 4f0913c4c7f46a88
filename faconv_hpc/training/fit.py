"""Whether a run can work at all, from its config and store.nc alone: judged before anything is imported or started."""

import os

from ..config import ModelConfig, RunConfig
from ..data.forcings import check_forcings
from ..data.frames import check_frames, check_regular
from ..data.store import Store
from ..errors import InputError
from ..model.rules import check_attention, check_coarse, check_kernel, check_layer
from ..spatial.grid import Cuts, LatLonGrid
from ..spatial.halo import halo_rectangles

FLOAT_BYTES = 4


def check_fits(config: RunConfig) -> None:
    """Judges all that config and store.nc can tell.

    Raises:
        InputError: no such store, or one that does not go with the config; a network that cannot be; a mesh that does
            not fit the grid; more memory than this machine has.
        TryAgainError: the store's file system is away.
    """
    check_network(config.model)
    with Store.open(config.data.store) as store:
        check_store(config, store)
        grid = grid_of(config, store)
    cuts = Cuts.even(grid, config.mesh.lat, config.mesh.lon)
    check_coarse(config.model.coarse_shape, grid.nlat, grid.nlon)
    for tile in (0, cuts.tiles - 1):  # those at the poles
        halo_rectangles(grid, cuts, tile, reach_of(config.model))
    _check_memory(config, cuts)


def grid_of(config: RunConfig, store: Store) -> LatLonGrid:
    """The store's grid with the config's boundaries."""
    return store.grid(lat_boundary=config.data.lat_boundary, lon_boundary=config.data.lon_boundary)


def training_frames(config: RunConfig, store: Store) -> range:
    """All frames but the held-out last ones."""
    return range(store.frames - config.data.held_out_frames)


def check_store(config: RunConfig, store: Store) -> None:
    """Raises InputError for variables, forcings or frames that the store lacks, and for irregular times."""
    data = config.data
    store.channel_indices(store.channels if data.variables is None else data.variables)
    check_forcings(data.forcings)
    left = store.frames - data.held_out_frames
    if left < data.window + 1 <= store.frames:
        raise InputError(
            f"data.held_out_frames={data.held_out_frames} leaves {max(left, 0)} of the {store.frames} frames of "
            f"{store.path} to train on, one window needs {data.window + 1} (data.window and the target of its last "
            f"step). Hold out at most {store.frames - data.window - 1}."
        )
    frames = training_frames(config, store)
    check_frames(store, frames, data.window)
    if not data.allow_irregular_time:
        check_regular(store, frames)


def check_network(model: ModelConfig) -> None:
    """Raises InputError for a network that cannot be."""
    if model.cell == "convlstm":
        check_kernel(model.kernel_size)
        return
    check_layer(model.kernel_size, model.dilations, model.fuse, model.attention_every)
    if model.attention_every:
        channels = model.attention_channels or model.hidden_channels
        check_attention(model.hidden_channels, model.attention_heads, channels, model.attention_exchange)


def reach_of(model: ModelConfig) -> int:
    """Rows that the widest kernel sees on either side."""
    return model.kernel_size // 2 * (max(model.dilations) if model.cell == "faconvlstm" else 1)


def least_bytes(config: RunConfig, cuts: Cuts) -> int:
    """What a rank needs in any case: parameters and gradients, and one state of the largest tile. A lower bound."""
    model = config.model
    hidden, narrow = model.hidden_channels, model.bottleneck_channels or max(model.hidden_channels // 2, 1)
    weights = 5 * hidden * narrow if model.cell == "faconvlstm" else 4 * hidden * hidden * model.kernel_size**2
    rows, columns = cuts.tile(0).shape
    states = 2 * hidden * rows * columns * config.training.micro_batch
    return FLOAT_BYTES * model.layers * (2 * weights + states)


def _check_memory(config: RunConfig, cuts: Cuts) -> None:
    needed, there = least_bytes(config, cuts), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        rows, columns = cuts.tile(0).shape
        raise InputError(
            f"a rank needs at least {needed / 2**30:,.0f} GiB for its parameters and one state of a tile of {rows} x "
            f"{columns} cells, this machine has {there / 2**30:,.0f} GiB in all (model.hidden_channels="
            f"{config.model.hidden_channels}, model.layers={config.model.layers}, training.micro_batch="
            f"{config.training.micro_batch}). Lower one of them, or cut the globe into more tiles."
        )
