"""Whether a run can work at all, from its config and store.nc alone: judged before anything is imported or started."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ..config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from ..data.annual_cycle import PER_COEFFICIENT, most_harmonics, widest_gap
from ..data.forcings import check_forcings
from ..data.order import stretches_of_windows
from ..data.periods import frames_within, mask_of, spans_of, starts_before, starts_within, stretches_of
from ..data.store import Store
from ..data.times import ALIKE, SECONDS_PER_HOUR
from ..data.unknown_names import index_of, unknown_name
from ..errors import InputError
from ..model.rules import (
    MEMORYLESS,
    ON_THE_SPHERE,
    check_coarse,
    check_dilations,
    check_kernel,
    check_layer,
    check_one_tile,
    check_scale,
    globe_of,
    squares_of,
)
from ..spatial.grid import Cuts, LatLonGrid
from ..spatial.halo import halo_rectangles
from ..spatial.squares import cuts_of_squares, grid_of_squares

FLOAT_BYTES = 4


def check_fits(config: RunConfig, *, here: bool = True) -> None:
    """Judges all that config and store.nc can tell.

    Args:
        here: whether the ranks run on this machine, whose memory and device must do.

    Raises:
        InputError: no such store, or one that does not go with the config; a network that cannot be; a mesh that does
            not fit the grid; more memory than this machine has, or a GPU where it has none.
        TryAgainError: the store's file system is away.
    """
    check_network(config.model)
    check_optimizer(config.training)
    with Store.open(config.data.store) as store:
        check_store(config, store)
        grid = grid_of(config, store)
    cuts, block = cuts_of(config, grid), block_of(config.model)
    if config.model.cell in ON_THE_SPHERE:
        _check_sphere(config, cuts, grid)
    if block > 1:
        grid, cuts = grid_of_squares(grid, block), cuts_of_squares(cuts, block)
    check_coarse(config.model.coarse_shape, grid.nlat, grid.nlon, block)
    for tile in (0, cuts.tiles - 1):  # those at the poles
        halo_rectangles(grid, cuts, tile, reach_of(config.model))
    if here:
        _check_memory(config, cuts)
    if here and config.device == "cuda":
        from ..spatial.device import check_device  # which imports torch

        check_device(config.device)


def grid_of(config: RunConfig, store: Store) -> LatLonGrid:
    """The store's grid with the config's boundaries."""
    return store.grid(lat_boundary=config.data.lat_boundary, lon_boundary=config.data.lon_boundary)


def cuts_of(config: RunConfig, grid: LatLonGrid) -> Cuts:
    """Where the config's mesh cuts a grid."""
    return Cuts.even(grid, config.mesh.lat, config.mesh.lon, block_of(config.model))


def block_of(model: ModelConfig) -> int:
    """Cells along a side of the squares that layers compute on, which tiles do not part."""
    return squares_of(model.cell, model.scale_factor)


@dataclass(frozen=True)
class Parts:
    """Frames of a store by what they are for, as spans in their order."""

    train: tuple[range, ...]
    validation: tuple[range, ...]
    test: tuple[range, ...]


def parts_of(data: DataConfig, store: Store) -> Parts:
    """What the periods of a config are in a store.

    Raises:
        InputError: a period without frames, a frame in two of them, or a date that the calendar does not have.
    """
    axis = store.layout.time
    periods = {name: getattr(data.periods, name) for name in ("train", "validation", "test")}
    spans = {name: frames_within(axis, ranges) for name, ranges in periods.items()}
    for name, ranges in periods.items():
        if ranges and not spans[name]:
            raise InputError(
                f"data.periods.{name}={', '.join(ranges)} holds no frame of {store.path}, whose times run from "
                f"{axis.label(0)} to {axis.label(store.frames - 1)}. Name dates within them."
            )
    masks = {name: mask_of(spans[name], store.frames) for name in periods}
    for one, other in combinations(periods, 2):
        both = masks[one] & masks[other]
        if both.any():
            raise InputError(
                f"{axis.label(int(np.argmax(both)))} is in data.periods.{one} and in data.periods.{other}. Both ends "
                f"of a range belong to it: let them share no date."
            )
    left = spans_of(~(masks["validation"] | masks["test"]))
    return Parts(spans["train"] if periods["train"] else left, spans["validation"], spans["test"])


def names_of(data: DataConfig, store: Store) -> tuple[str, ...]:
    """The variables that a config takes of a store, with those that have no time."""
    return (*store.channels, *store.static_names) if data.variables is None else data.variables


def loss_weight_of(data: DataConfig, name: str) -> float:
    """Of a variable: its own, or that of the first pattern that it matches, or 1."""
    patterns = (weight for pattern, weight in data.loss_weights.items() if fnmatchcase(name, pattern))
    return data.loss_weights.get(name, next(patterns, 1.0))


def _check_variables(data: DataConfig, store: Store) -> None:
    """Raises InputError for variables that the store lacks, and for what is said of one that is not taken."""
    taken, there = names_of(data, store), (*store.channels, *store.static_names)
    for name in taken:
        index_of("variable", name, there, f"store {store.path}")
    names = [name for name in taken if name not in store.static_names]
    for key, said in (("roles", data.roles), ("log1p", data.log1p), ("anomalies", data.anomalies)):
        for name in said:
            if name in store.static_names:
                raise InputError(
                    f"data.{key} names {name!r}, which has no time in {store.path}: it is an input that never changes. "
                    f"Leave it out there."
                )
            index_of(f"variable for data.{key}:", name, names, f"what the network takes of {store.path}")
    if both := data.log1p.keys() & data.anomalies.keys():
        raise InputError(
            f"data.log1p and data.anomalies both name {', '.join(sorted(both))}: a network sees the logarithm or the "
            f"anomaly. Leave it out of one of them."
        )
    targets = [name for name in names if data.roles.get(name) != "forcing"]
    if all(data.roles.get(name) == "diagnostic" for name in targets):
        raise InputError(
            f"no variable of data.variables ({', '.join(names)}) is prognostic: a network forecasts from what it has "
            f"forecast. Leave one out of data.roles."
        )
    for pattern in data.loss_weights:
        if not any(fnmatchcase(name, pattern) for name in targets):
            raise unknown_name("variable for data.loss_weights:", pattern, targets, "what is forecast")
    if not any(loss_weight_of(data, name) for name in targets):
        raise InputError("data.loss_weights leaves nothing to learn: every variable has weight 0. Give one more.")


def training_starts(store: Store, spans: tuple[range, ...], window: int, leads: int = 1) -> NDArray[np.int64]:
    """First frames of the windows that samples are drawn from, none of which leads over a gap, nor its leads.

    Raises:
        InputError: there is none.
    """
    axis = store.layout.time
    stretches = stretches_of(axis, spans)
    starts = starts_within(stretches, window + leads - 1)
    if not len(starts):
        longest, targets = max(map(len, stretches), default=0), f"{leads} targets" if leads > 1 else "a target"
        taken = sum(map(len, stretches))
        fits = longest - leads
        shorter = f"data.window={fits} or less" if fits > 0 else "fewer leads (training.rollout)"
        kept = f" (data.periods keeps {store.frames - taken} from training)" if taken < store.frames else ""
        raise InputError(
            f"no window of {window} inputs and {targets} fits into {taken} of the {store.frames} frames of "
            f"{store.path}, those to train on{kept}: at most {longest} follow each other without a gap (a step "
            f"that differs by more than {ALIKE:.0%} from the usual {axis.step_s / SECONDS_PER_HOUR:g} h). Use "
            f"{shorter}, change data.periods, or bring the source to equal steps."
        )
    return starts


def forecast_starts(store: Store, dates: Sequence[str], window: int, leads: int) -> NDArray[np.int64]:
    """First frames of the windows that ``leads`` frames of a period follow; of any frames where it names none.

    Raises:
        InputError: there is none.
    """
    axis = store.layout.time
    spans = frames_within(axis, dates) if dates else (range(store.frames),)
    stretches = stretches_of(axis, [range(store.frames)])
    starts = starts_before(stretches, mask_of(spans, store.frames), window, leads)
    if not len(starts):
        raise InputError(
            f"{store.path} has no {f'{leads} frames' if leads > 1 else 'frame'}"
            f"{' within ' + ', '.join(dates) if dates else ''} that {window} frames precede without a gap; its times "
            f"run from {axis.label(0)} to {axis.label(store.frames - 1)}. Name a data.store that has, or fewer leads."
        )
    return starts


def windows_over_gaps(store: Store, spans: tuple[range, ...], window: int) -> int:
    """How many windows would lead over a gap, and are left out."""
    return len(starts_within(spans, window)) - len(starts_within(stretches_of(store.layout.time, spans), window))


def check_store(config: RunConfig, store: Store) -> None:
    """Raises InputError for variables, forcings or periods that the store lacks, and for too few frames."""
    data = config.data
    _check_variables(data, store)
    check_forcings(data.forcings)
    training, spans = config.training, parts_of(data, store).train
    starts = training_starts(store, spans, data.window, training.most_leads)
    _check_year(data, store, spans)
    if training.stateful_windows:
        _check_chains(config, starts)
    if training.validate_every and not data.periods.validation:
        raise InputError(
            f"training.validate_every={training.validate_every}, but data.periods.validation names no dates. "
            f"Name some, such as 2016, or leave training.validate_every out."
        )
    if training.validate_every:
        forecast_starts(store, data.periods.validation, data.window, training.validate_leads)


def _check_year(data: DataConfig, store: Store, spans: tuple[range, ...]) -> None:
    """Raises InputError where the frames of training do not tell the harmonics of an annual cycle apart."""
    fractions = store.year_fraction[mask_of(spans, store.frames)]
    most, (gap, first) = most_harmonics(fractions), widest_gap(fractions)
    for name, harmonics in data.anomalies.items():
        if harmonics > most:
            raise InputError(
                f"data.anomalies wants {harmonics} harmonics of the year for {name!r}, which need a frame of training "
                f"in every {1 / (1 + 2 * harmonics):.0%} of the year, and {PER_COEFFICIENT * (1 + 2 * harmonics)} in "
                f"all: {store.path} has {len(fractions)}, and none in the {gap:.0%} after its first {first:.0%}. Use "
                f"{f'{most} or fewer' if most else '0'} (0: the mean of each cell), or train on more of the year."
            )


def _check_chains(config: RunConfig, starts: NDArray[np.int64]) -> None:
    """Raises InputError where hardly a window would follow another, and states are to be carried on."""
    wanted, window, batch = config.training.stateful_windows, config.data.window, config.global_batch
    if config.training.input_noise:
        raise InputError(
            f"training.input_noise={config.training.input_noise:g} stays through a window and is drawn anew for the "
            f"next, which a state that is carried on (training.stateful_windows={wanted}) would tell it by. Leave one "
            f"of them out; a run that begins from this one (training.start_from) may have the other."
        )
    sizes = [len(one) for one in stretches_of_windows(starts)]
    if max(sizes) < 2 * window:
        raise InputError(
            f"training.stateful_windows={wanted} needs windows that follow each other, and the longest stretch of "
            f"{config.data.store} without a gap is of {max(sizes)} windows that begin one frame after the other: of "
            f"{window} inputs each (data.window) it must be {2 * window}. Use data.window="
            f"{(max(sizes) + window) // 3} or less, or leave it out."
        )
    there = sum(max(size // window, 1) for size in sizes)
    if there < 2 * batch:
        raise InputError(
            f"training.stateful_windows={wanted} needs two windows for each of the {batch} samples of a step, and "
            f"{config.data.store} has {there} for training that share no input (data.window={window}). Use a smaller "
            f"batch or window, or leave it out."
        )


def check_network(model: ModelConfig) -> None:
    """Raises InputError for a network that cannot be."""
    if model.cell == "faconvlstm":
        check_layer(model.kernel_size, model.dilations, model.fuse, model.se_reduction, model.attention_every)
        return
    if model.takes("kernel_size"):
        check_kernel(model.kernel_size)
    if model.takes("dilations"):
        check_dilations(model.dilations)


def _check_sphere(config: RunConfig, cuts: Cuts, grid: LatLonGrid) -> None:
    """Raises InputError for what no cell of `ON_THE_SPHERE` can do."""
    cell = config.model.cell
    check_one_tile(cell, cuts.tiles)
    globe_of(cell, grid)
    check_scale(cell, config.model.scale_factor, grid.nlat, grid.nlon)
    if config.training.precision == "bf16":
        raise InputError(
            f"model.cell={cell} transforms in float32, and training.precision=bf16 would round what it transforms by. "
            f"Use fp32 or tf32."
        )


def reach_of(model: ModelConfig) -> int:
    """Rows that the widest kernel sees on either side."""
    wide = max(model.dilations) if model.takes("dilations") else 1
    return model.kernel_size // 2 * wide if model.takes("kernel_size") else 0


def check_optimizer(training: TrainingConfig) -> None:
    """Raises InputError for a ZeRO stage that cuts what the optimizer needs whole."""
    if training.optimizer == "soap" and training.zero_stage:
        raise InputError(
            f"training.optimizer=soap turns the gradients of whole matrices, and training.zero_stage="
            f"{training.zero_stage} cuts them. Use zero_stage: 0, or optimizer: adamw."
        )


def least_bytes(config: RunConfig, cuts: Cuts) -> int:
    """What a rank needs in any case: parameters and gradients, and the states of the largest tile. A lower bound."""
    model = config.model
    hidden, narrow = model.hidden_channels, model.bottleneck_channels or max(model.hidden_channels // 2, 1)
    dense = {"faconvlstm": 5 * hidden * narrow, "convlstm": 4 * hidden * hidden * model.kernel_size**2}
    weights = dense.get(model.cell, hidden * hidden)
    rows, columns = cuts.tile(0).shape
    training = config.training
    held = 2 * training.accumulation if training.stateful_windows else 1  # those before a step, and those after it
    states = 2 * hidden * rows * columns * training.micro_batch * held if model.cell not in MEMORYLESS else 0
    return FLOAT_BYTES * model.layers * (2 * weights + states)


def _check_memory(config: RunConfig, cuts: Cuts) -> None:
    needed, there = least_bytes(config, cuts), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        rows, columns = cuts.tile(0).shape
        raise InputError(
            f"a rank needs at least {needed / 2**30:,.0f} GiB for its parameters and the states of a tile of {rows} x "
            f"{columns} cells, this machine has {there / 2**30:,.0f} GiB in all (model.hidden_channels="
            f"{config.model.hidden_channels}, model.layers={config.model.layers}, training.micro_batch="
            f"{config.training.micro_batch}, and with training.stateful_windows training.accumulation="
            f"{config.training.accumulation}). Lower one of them, or cut the globe into more tiles."
        )
