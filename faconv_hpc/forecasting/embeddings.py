"""Embeddings of all times of some data, streamed over tiles and replicas into a file that appears whole."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.fields import Fields
from ..data.layout import SEQUENCE
from ..data.times import EPOCH_UNITS, TimeAxis
from ..errors import InputError
from ..files import replacing
from ..model.arithmetic import arithmetic
from ..observe import SAVING
from ..prepare.hdf5_file import new_netcdf
from ..spatial.grid import Tile
from ..spatial.mesh import ProcessMesh
from ..training.contract import Contract
from .campaign import asked_of, asked_of_data, digest_of_dates, open_sequences
from .dates import Start, Timeline
from .forecaster import Forecaster
from .frames import Frames
from .output import Asked, Product, Request, finish_output, opened_output, written_to
from .turns import Progress

PART_TIMES = 64  # what a kill may cost
EMBEDDING_OF, CONTRACT, WINDOW, NAMES = "embedding of", "contract", "window", "names"


@dataclass(frozen=True)
class EmbeddingLayout:
    """Of a file of embeddings.

    Attributes:
        contract: of the network; it says how the fields that go with the embeddings are read.
        axis: all times, of each sequence where there are several.
        window: how many inputs an embedding is of.
    """

    contract: Contract
    axis: TimeAxis
    window: int

    @property
    def parts(self) -> list[range]:
        """Times of each part."""
        count = len(self.axis)
        return [range(first, min(first + PART_TIMES, count)) for first in range(0, count, PART_TIMES)]


@dataclass(frozen=True)
class EmbeddingPlan:
    """What is to be embedded, checked; no weights are needed for it.

    Attributes:
        frames, timelines: of each sequence.
        request: what makes it another one, but for the network.
    """

    frames: tuple[Frames, ...]
    timelines: tuple[Timeline, ...]
    layout: EmbeddingLayout
    request: Request

    def start(self, time: int) -> tuple[int, Start]:
        """Of a time: its sequence, and where its window is."""
        axis = self.layout.axis
        sequence = int(axis.numbers[time])
        return sequence, self.timelines[sequence].start(int(axis.seconds[time]))


@dataclass(frozen=True)
class EmbeddingSummary:
    """What was made."""

    path: str
    times: int
    kept_times: int
    first: str
    last: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def plan_embedding(
    contract: Contract, window: int, data: Sequence[Path], times: Sequence[str] = (), sequence: str | None = None
) -> EmbeddingPlan:
    """Opens the data and finds the times that have their window before them; reads no fields but those without time.

    Args:
        window: of the network.
        data: a store, or files.
        times: see `Timeline.asked`; none: all that can be.
        sequence: of a store that has several.

    Raises:
        InputError: the data have not what the contract says, or not what a time needs.
    """
    several = open_sequences(contract, data, sequence)
    if times and len(several) > 1:
        raise InputError(
            f"--times are of one sequence, and {data[0]} holds {len(several)}. Say with --sequence of which, or leave "
            f"--times out."
        )
    timelines = [Timeline(frames, contract, window, steps=1, what=EMBEDDING_OF, goes_on=True) for frames in several]
    found = [_seconds(timeline, times, len(several) > 1) for timeline in timelines]
    if not any(found):
        timelines[0].all()  # which says why
    kept = [place for place, seconds in enumerate(found) if seconds]
    beginnings = np.cumsum([0, *(len(found[place]) for place in kept[:-1])]).tolist()
    names = tuple(several[place].sequence for place in kept) if len(several) > 1 else ()
    seconds = np.array([second for place in kept for second in found[place]], dtype=np.int64)
    axis = TimeAxis(seconds, contract.calendar, tuple(beginnings), names)
    told = f"{len(axis)} times from {axis.label(0)} to {axis.label(len(axis) - 1)}"
    request = {
        "--data": asked_of_data(*(several[place] for place in kept)),
        "--times": Asked(digest_of_dates([*map(str, seconds.tolist()), *names]), told),
    }
    layout = EmbeddingLayout(contract, axis, window)
    return EmbeddingPlan(tuple(several[at] for at in kept), tuple(timelines[at] for at in kept), layout, request)


def _seconds(timeline: Timeline, times: Sequence[str], may_be_none: bool) -> list[int]:
    """That can be embedded; none of a sequence that is shorter than a window, if there are others."""
    if times:
        return [timeline.start(second).second for second in timeline.asked(times, "--times")]
    return timeline.able() if may_be_none else timeline.all()


def run_embedding(
    forecaster: Forecaster,
    plan: EmbeddingPlan,
    output: Path,
    mesh: ProcessMesh,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EmbeddingSummary:
    """Collective. Times are dealt over replicas; every `PART_TIMES` of them are kept, so that a killed command goes on.

    Args:
        progress: called with (times that are done, times there are).

    Raises:
        InputError: the output is of another request, or cannot be written; or fields that cannot be read.
    """
    began, layout = time.monotonic(), plan.layout
    request = {"MODEL": asked_of(forecaster.trained), **plan.request}
    kept = times = len(layout.axis)
    with opened_output(output, EMBEDDINGS, layout, request, mesh, overwrite=overwrite) as writer:
        if writer is not None:
            todo = mesh.from_first([part for part in range(len(layout.parts)) if not writer.is_done(part)])
            kept -= sum(len(layout.parts[part]) for part in todo)
            with arithmetic("fp32", forecaster.device):
                _embed(forecaster, plan, writer, todo, mesh, output, progress)
            finish_output(writer, output, mesh)
    first, last = layout.axis.label(0), layout.axis.label(times - 1)
    return EmbeddingSummary(str(output), times, kept, first, last, time.monotonic() - began)


def _embed(
    forecaster: Forecaster,
    plan: EmbeddingPlan,
    writer: "EmbeddingWriter",
    todo: Sequence[int],
    mesh: ProcessMesh,
    output: Path,
    progress: Progress | None,
) -> None:
    """As many times at once as there are replicas; all ranks go from turn to turn together."""
    parts, total, recent = plan.layout.parts, len(plan.layout.axis), _Recent(plan)
    done = total - sum(len(parts[part]) for part in todo)
    for part in todo:
        rows: list[NDArray[np.float32]] = []
        for first in range(parts[part].start, parts[part].stop, mesh.replicas):
            mine = first + mesh.replica
            z_E = None
            if mine in parts[part]:
                z_E = forecaster.embedding(*recent.window(mine))
            turn = mesh.gathered_objects(z_E if mesh.tile_index == 0 else None)
            rows += [one for one in turn if one is not None]
            if progress is not None:
                progress(done + len(rows), total)
        done += len(rows)
        if mesh.rank == 0:
            with written_to(output), mesh.activity.during(SAVING):
                writer.write(part, np.stack(rows))


class _Recent:
    """Windows of a plan, whose frames are read once if they come in their order."""

    def __init__(self, plan: EmbeddingPlan) -> None:
        self._plan, self._sequence = plan, -1
        self._frames = plan.frames[0]

    def window(self, time: int) -> tuple[Frames, Start]:
        sequence, start = self._plan.start(time)
        if sequence != self._sequence:
            frames = self._plan.frames[sequence]
            forcings = None if frames.forcings is None else RecentFields(frames.forcings)
            self._frames = replace(frames, states=RecentFields(frames.states), forcings=forcings)
            self._sequence = sequence
        return self._frames, start


class RecentFields:
    """Fields that keep the frames that were read last, as windows overlap.

    Args:
        fields: of which always the same tile is read.
    """

    def __init__(self, fields: Fields) -> None:
        self._fields = fields
        self._kept: dict[int, tuple[NDArray[np.float32], NDArray[np.bool_] | None]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the variables."""
        return self._fields.names

    @property
    def axis(self) -> TimeAxis:
        """The times."""
        return self._fields.axis

    def read(self, frames: Sequence[int], tile: Tile) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """See `Fields.read`; what is given may be changed."""
        new = [frame for frame in frames if frame not in self._kept]
        if new:
            values_TCYX, known_TCYX = self._fields.read(new, tile)
            for place, frame in enumerate(new):
                self._kept[frame] = values_TCYX[place], None if known_TCYX is None else known_TCYX[place]
        self._kept = {frame: self._kept[frame] for frame in frames}
        values, known = zip(*self._kept.values(), strict=True)
        if all(one is None for one in known):
            return np.stack(values), None
        there = [np.ones_like(field, dtype=bool) if one is None else one for field, one in self._kept.values()]
        return np.stack(values), np.stack(there)


class EmbeddingWriter:
    """Keeps parts in a directory, and joins them as NetCDF4.

    Args:
        directory: of the parts.
        attributes: of the file.
    """

    def __init__(self, directory: Path, layout: EmbeddingLayout, attributes: Mapping[str, str]) -> None:
        self._directory, self._layout, self._attributes = directory, layout, attributes

    def prepare(self) -> None:
        """Nothing has to be there before the first part."""

    def is_done(self, part: int) -> bool:
        """Whether a part is there."""
        return self._path(part).exists()

    def write(self, part: int, z_TE: NDArray[np.float32]) -> None:
        """A part; it appears whole."""
        with replacing(self._path(part)) as beside, beside.open("wb") as file:
            np.save(file, z_TE)

    def finish(self, final: Path) -> Iterator[None]:
        """Joins the parts; stops after each, so that nobody waits for all of it."""
        layout = self._layout
        with new_netcdf(final) as (nc, disk):
            for number, part in enumerate(layout.parts):
                z_TE = np.load(self._path(number))
                if number == 0:
                    self._create(nc, z_TE.shape[1])
                nc.variables["embedding"][part.start : part.stop] = z_TE
                disk.raise_error()
                yield

    def _create(self, nc: Any, components: int) -> None:
        layout = self._layout
        nc.dimensions = {"time": len(layout.axis), "component": components}
        times = nc.create_variable("time", ("time",), np.int64)
        times[:] = layout.axis.seconds
        times.attrs.update({"standard_name": "time", "units": EPOCH_UNITS, "calendar": layout.contract.calendar})
        if layout.axis.names:
            numbers = nc.create_variable(SEQUENCE, ("time",), np.int32)
            numbers[:] = layout.axis.numbers
            numbers.attrs[NAMES] = json.dumps(layout.axis.names)
        embedding = nc.create_variable("embedding", ("time", "component"), np.float32, fletcher32=True)
        embedding.attrs.update(embedding_attributes(layout.window))
        said = {WINDOW: str(layout.window), CONTRACT: layout.contract.model_dump_json()}
        nc.attrs.update({**self._attributes, **said})

    def _path(self, part: int) -> Path:
        return self._directory / f"times-{part:06d}.npy"


def embedding_attributes(window: int) -> dict[str, str]:
    """Of the variable."""
    return {"long_name": f"embedding of the globe after {window} steps", "units": "1"}


EMBEDDINGS: Product[EmbeddingLayout, EmbeddingWriter] = Product(
    "embed", "embedding", "Embeddings by", {".nc": EmbeddingWriter}
)
