"""Adding to a finished store: later times, or other variables at its times. What it has is not written again."""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from ..data.layout import FileEntry, StoreLayout, digest_of
from ..data.store import Store
from ..data.times import TimeAxis, in_sequence, is_regular
from ..data.units import hint, same_units
from ..errors import InputError
from ..spatial.grid import SAME_DEG, Span, Tile
from .catalogue import Catalogue, build_catalogue, same_calendar
from .comm import Comm, SerialComm, alike, guarded
from .fields_file import FieldReader, SomeChannels
from .preparation import PrepareSummary, idle, provenance_of, refuse_own_source, request_of, summarise
from .roles import SourceOptions, Taken
from .segments import Segment
from .sources import expand
from .writer import Part, Plan, Progress, Written, held_directory, parts_from, write_store


@dataclass(frozen=True, eq=False)
class Extension:
    """What a store will be, and how it becomes so.

    Attributes:
        layout: of the store as it will be.
        plan: which files are to be written.
        reader: of all channels and frames that these hold.
        static: fields without time of the store, and then the new ones, if there are any.
        notes: what is added, and what was assumed or left out.
        request: what beside the layout determines the files' content.
    """

    layout: StoreLayout
    plan: Plan
    reader: FieldReader
    static: Iterator[NDArray[np.float32]]
    notes: tuple[str, ...]
    request: str


def extend(
    sources: Sequence[str | Path],
    store: str | Path,
    *,
    comm: Comm | None = None,
    progress: Progress | None = None,
    command: str = "",
    **taken: Unpack[Taken],
) -> PrepareSummary:
    """Collective. Adds to a store: all its variables at later times, or other variables at all its times, or fields
    without time.

    The store is what it was until all is written; from then on it reads as if it had been made at once. Only its last
    files are made anew where times go on, as the change to the first new frame counts in their statistics; the old
    ones stay until the next extension, for those who have opened the store. A killed run goes on when it is called
    again; one that has ended does nothing.

    Args:
        sources: as those of `prepare`.
        store: a finished one.
        comm, progress, command, taken: as those of `prepare`.

    Raises:
        InputError: the sources do not fit to the store, or there is nothing to add; or what `prepare` raises.
    """
    started = time.monotonic()
    comm, path = comm or SerialComm(), Path(store)
    options = SourceOptions.of(**taken)
    with guarded(comm):
        alike(comm, lambda: Store.open(path).close())
        with held_directory(path, comm), Store.open(path) as before:
            extension = alike(comm, lambda: _planned(before, sources, options, command))
            if extension is None:
                written = Written(before.files, 0, before.has_missing)
                said = ("this was added before, and all of it is there",)
                return summarise(path, before.layout, written, time.monotonic() - started, said)
            written = write_store(
                path,
                extension.layout,
                extension.reader,
                extension.request,
                comm=comm,
                static=extension.static,
                progress=progress,
                plan=extension.plan,
            )
    notes = [*extension.notes, *idle(len(extension.plan.parts) or comm.size, comm)]
    if written.has_missing and not before.has_missing:
        notes.append("cells are missing now: runs that were trained on this store before refuse it from now on.")
    return summarise(path, extension.layout, written, time.monotonic() - started, tuple(notes))


def _planned(store: Store, sources: Sequence[str | Path], options: SourceOptions, command: str) -> Extension | None:
    """None where this very request was the last to extend the store."""
    paths = expand([Path(source) for source in sources])
    refuse_own_source(store.path, paths)
    asked = request_of(options, paths)
    done = {"request": digest_of((), {"request": asked})}
    earlier = store.layout.provenance
    if earlier.get("extended", [{}])[-1].get("request") == done["request"]:
        return None
    catalogue = build_catalogue(paths, options, store.longitude_deg)
    _check_grid(store, catalogue)
    number = _next_number(store)
    names = [channel.name for channel in catalogue.channels]
    notes = list(catalogue.notes)
    reader: FieldReader = catalogue
    if not names:
        layout, plan = store.layout, Plan((), None, store.files, store.content)
    elif set(names).isdisjoint(store.channels):
        layout, plan = _with_variables(store, catalogue, number)
        reader = SomeChannels(catalogue, range(-len(store.channels), len(names)))  # after the store's, not asked for
        notes.append(f"added at all times: {', '.join(names)}")
    else:
        catalogue = _as_in_store(store, catalogue, notes)
        layout, plan = _with_times(store, catalogue, options, number)
        reader, new = _Later(store, catalogue), range(store.frames, len(layout.time))
        notes.append(f"added {len(new)} frames, from {layout.time.label(new[0])} to {layout.time.label(new[-1])}")
    static = _new_static(store, catalogue, notes)
    if static:
        notes.append(f"added without time: {', '.join(one.channel.name for one in static)}")
        layout = replace(layout, static=(*layout.static, *(one.channel for one in static)))
        plan = replace(plan, static_name=f"static-{number:05d}.nc")
    if not names and not static:
        raise InputError(f"the sources have nothing that {store.path} has not. {' '.join(notes)}")
    of_now = provenance_of(command, paths, catalogue) | done
    return Extension(
        replace(layout, provenance={**earlier, "extended": [*earlier.get("extended", []), of_now]}),
        plan,
        reader,
        (field_YX for part in (_static_of(store), (one.read_once() for one in static)) for field_YX in part),
        tuple(notes),
        f"{store.digest}\n{asked}",
    )


def _next_number(store: Store) -> int:
    """By which no file of the store is named."""
    return 1 + max(int(re.sub(r"\D", "", name) or 0) for name in store.content.names)


def _new_static(store: Store, catalogue: Catalogue, notes: list[str]) -> list[Segment]:
    """Those that the store has not; one of its own that is another is noted."""
    new: list[Segment] = []
    for segment in catalogue.static:
        name = segment.channel.name
        if name in store.channels:
            notes.append(f"{segment.path}: {name!r} has no time, and in {store.path} it has; it is left out.")
        elif name not in store.static_names:
            new.append(segment)
        elif not np.array_equal(segment.read_once(), next(_static_of(store, name))):
            notes.append(f"{segment.path}: {name!r} is not what {store.path} has, which stays.")
    return new


def _static_of(store: Store, *names: str) -> Iterator[NDArray[np.float32]]:
    """Fields without time, by default all that there are."""
    nlat, nlon = store.layout.grid_shape
    return iter(store.read_static(names or store.static_names, Tile((0, nlat), (0, nlon))))


def _check_grid(store: Store, catalogue: Catalogue) -> None:
    for name in ("latitude_deg", "longitude_deg"):
        mine, others = getattr(store, name), getattr(catalogue.grid, name)
        if mine.shape != others.shape or np.abs(mine - others).max() > SAME_DEG:
            told = (f"{one.size} values from {one[0]:g} to {one[-1]:g}" for one in (mine, others))
            raise InputError(
                f"a store has one grid, but the {name} of {store.path} are {next(told)}, those of the sources "
                f"{next(told)}. Regrid them."
            )


def _with_variables(store: Store, catalogue: Catalogue, number: int) -> tuple[StoreLayout, Plan]:
    """A block more, in files of its own."""
    mine, others = store.layout.time, catalogue.time
    same = same_calendar(mine, others) and (mine.beginnings, mine.names) == (others.beginnings, others.names)
    if not same or not np.array_equal(mine.seconds, others.seconds):
        first = catalogue.channels[0].name
        raise InputError(
            f"all variables need the same times, but {store.path} has {mine.described}, and {first!r}, which is new, "
            f"{others.described}. Give sources with the same times, some of them with --from and --to, or take one "
            f"that does not change with --static {first}."
        )
    twice = [channel.name for channel in catalogue.channels if channel.name in store.static_names]
    if twice:
        raise InputError(
            f"{store.path} has {', '.join(twice)} without time, the sources have it with times. Give it another name "
            f"with --rename {twice[0]}=NAME, or leave it out with --variables."
        )
    before = store.layout
    blocks = (*before.blocks, len(before.channels))
    layout = replace(before, channels=(*before.channels, *catalogue.channels), blocks=blocks)
    return layout, Plan(parts_from(layout, 0, len(blocks) - 1, number), None, store.files, store.content)


def _as_in_store(store: Store, catalogue: Catalogue, notes: list[str]) -> Catalogue:
    """Of the sources all that the store has, in its order; its last sequence first, as they go on with it."""
    segments = {channel.name: one for channel, one in zip(catalogue.channels, catalogue.segments, strict=True)}
    lacking = [name for name in store.channels if name not in segments]
    if lacking:
        raise InputError(
            f"the sources have {', '.join(name for name in segments if name in store.channels)} of {store.path}, but "
            f"not {', '.join(lacking)}: a store has all variables at all times. Add the sources of those, or leave out "
            f"what it has already with --variables."
        )
    more = [name for name in segments if name not in store.channels]
    if more:
        raise InputError(
            f"the sources have {', '.join(more)}, which {store.path} has not. Leave it out with --variables "
            f"{','.join(store.channels)}; or add it first, at the times that the store has."
        )
    for channel, units in zip(store.layout.channels, store.units, strict=True):
        (first, *_) = segments[channel.name]
        if not same_units(units, first.channel.units) and not first.is_accepted:
            raise InputError(
                f"{channel.name!r} is in {units or 'no units'} in {store.path}, but in "
                f"{first.channel.units or 'no units'} in {first.path}. Convert it, or take it as it is: --accept "
                f"{channel.name}.{hint(units, first.channel.units)}"
            )
        if channel.long_name != first.channel.long_name:
            notes.append(
                f"{channel.name!r} is {channel.long_name!r} in {store.path}, and {first.channel.long_name!r} in "
                f"{first.path}; they are taken for one."
            )
    last = store.layout.time.names[-1] if store.layout.time.names else ""
    ordered = (sorted(segments[name], key=lambda one: one.sequence != last) for name in store.channels)
    return replace(catalogue, segments=tuple(map(tuple, ordered)))


def _with_times(store: Store, catalogue: Catalogue, options: SourceOptions, number: int) -> tuple[StoreLayout, Plan]:
    """Files more for every block; the last of each is made anew, unless a gap follows it."""
    layout = replace(store.layout, time=_continued(store, catalogue, options))
    goes_on = store.frames not in layout.time.gaps
    parts: list[Part] = []
    kept: list[FileEntry] = []
    for block in range(len(layout.blocks)):
        *own, last = (entry for entry in store.files if entry.block == block)
        kept += [*own, *([] if goes_on else [last])]
        first = last.first_frame if goes_on else store.frames
        parts += parts_from(layout, first, block, number + len(parts))
    return layout, Plan(tuple(parts), None, tuple(kept), store.content)


def _continued(store: Store, catalogue: Catalogue, options: SourceOptions) -> TimeAxis:
    """The store's times, then those of the sources: later ones of its last sequence, or other sequences."""
    mine, others = store.layout.time, catalogue.time
    if not same_calendar(mine, others):
        raise InputError(
            f"{store.path} has the calendar {mine.calendar}, the sources {others.calendar}. Say which with --calendar."
        )
    of_store = [
        (name, TimeAxis(mine.seconds[own.start : own.stop], mine.calendar))
        for name, own in zip(mine.names or ("",), mine.sequences, strict=True)
    ]
    segments = catalogue.segments[0]
    again = {one.sequence for one in segments} & {name for name, _ in of_store[:-1]}
    named = {one.sequence != "" for one in segments} | {bool(mine.names)}
    if again or len(named) > 1:
        raise InputError(
            f"{store.path} has {mine.described}, the sources go on with {others.described}"
            + (f", of {', '.join(sorted(again))}" if again else "")
            + ". Add later times of its last sequence; or, where a store has several and so a name for each, other "
            "sequences, named by --sequence-dim or --sequences. Else prepare all anew."
        )
    first = segments[0]
    if first.sequence == of_store[-1][0]:
        _check_later(store, first, options.period.every)
    joined = in_sequence([*of_store, *((one.sequence, one.time) for one in segments)])
    if not np.array_equal(joined.gaps[joined.gaps < len(mine)], mine.gaps):
        raise InputError(
            f"the times of {store.path} are {mine.step_s / 3600:g} h apart, with those of the sources "
            f"{joined.step_s / 3600:g} h: what was no gap would be one. Prepare all anew, with --every for one step."
        )
    return joined


def _check_later(store: Store, first: Segment, every: int) -> None:
    mine = store.layout.time
    if first.begin <= mine.seconds[-1]:
        raise InputError(
            f"{store.path} ends at {mine.label(len(mine) - 1)}, the sources begin at {first.time.label(0)}. Only later "
            f"times can be added: take them with --from. Other variables can be, at all times that the store has."
        )
    since_s = first.begin - mine.seconds[-1]
    if every > 1 and is_regular(mine) and mine.step_s and since_s % mine.step_s:
        raise InputError(
            f"--every {every} begins anew with {first.time.label(0)}, {since_s / 3600:g} h after the last time of "
            f"{store.path}, whose times are {mine.step_s / 3600:g} h apart. Begin --from such a time."
        )


@dataclass(frozen=True)
class _Later:
    """A store and, after its frames, those of sources; see `FieldReader`."""

    store: Store
    own: Catalogue

    @property
    def groups(self) -> Sequence[range]:
        return self.own.groups

    def read(self, frames: range, channels: range, rows: Span) -> NDArray[np.float32]:
        there = self.store.frames
        old, new = range(frames.start, min(frames.stop, there)), range(max(frames.start, there), frames.stop)
        tile = Tile(rows, (0, self.store.layout.grid_shape[1]))
        parts = [self.store.read(old, tile, channels)[0]] if old else []
        parts += [self.own.read(range(new.start - there, new.stop - there), channels, rows)] if new else []
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
