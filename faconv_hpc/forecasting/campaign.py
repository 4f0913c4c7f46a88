"""Forecasts from several dates, dealt over replicas and streamed to an output."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..data.layout import STORE_FILE
from ..data.store import Store
from ..errors import InputError
from ..model.arithmetic import arithmetic
from ..observe import SAVING
from ..spatial.domain import Domain
from ..spatial.mesh import ProcessMesh
from ..training.contract import Contract
from ..training.loading import TrainedNetwork
from .dates import Start, Timeline
from .forecaster import Forecaster
from .frames import Frames, store_frames
from .layout import ForecastLayout
from .output import FORECASTS, Asked, Request, Sink, Writer, finish_output, opened_output, written_to
from .turns import Progress, take_turns

LAST = "last"


@dataclass(frozen=True)
class Campaign:
    """What is to be forecast, checked; no weights are needed for it.

    Attributes:
        request: what makes it another one, but for the network.
    """

    frames: Frames
    starts: tuple[Start, ...]
    layout: ForecastLayout
    request: Request


@dataclass(frozen=True)
class Summary:
    """What was made.

    Attributes:
        known_until: up to which of the times that are forecast the data have what came; empty where they end before.
    """

    path: str
    variables: tuple[str, ...]
    dates: int
    kept_dates: int
    steps: int
    first: str
    last: str
    known_until: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def plan_campaign(
    contract: Contract, window: int, data: Sequence[Path], start: Sequence[str], steps: int, sequence: str | None = None
) -> Campaign:
    """Opens the data and finds the frames of every date; reads no fields but those without time.

    Args:
        window: of the network.
        data: a store, or files.
        start: see `Timeline.asked`; or ``last``, the last date that the data allow.
        sequence: of a store that has several.

    Raises:
        InputError: the data have not what the contract says, or not what a date needs.
    """
    frames = open_frames(contract, data, sequence)
    timeline = Timeline(frames, contract, window, steps)
    seconds = [timeline.last()] if list(start) == [LAST] else timeline.asked(start)
    starts = tuple(timeline.start(second) for second in seconds)
    dates = [one.date for one in starts]
    told = f"{len(dates)} dates from {dates[0]} to {dates[-1]}" if len(dates) > 1 else dates[0]
    request = {
        "--data": asked_of_data(frames),
        "--start": Asked(digest_of_dates(dates), told),
        "--steps": Asked(str(steps), str(steps)),
    }
    return Campaign(frames, starts, ForecastLayout.of(contract, starts), request)


def asked_of_data(*frames: Frames) -> Asked:
    """Data, or sequences of one store, as a part of what is asked for."""
    first, more = frames[0], f" and {len(frames) - 1} more" if len(frames) > 1 else ""
    identity = " ".join([first.identity, *(one.sequence for one in frames[1:])])
    return Asked(identity, f"{first.name}{more} (digest {first.identity[:8]})")


def digest_of_dates(dates: Sequence[str]) -> str:
    """Of dates, in their order."""
    return hashlib.sha256(json.dumps(list(dates)).encode()).hexdigest()


def open_sequences(contract: Contract, data: Sequence[Path], sequence: str | None = None) -> tuple[Frames, ...]:
    """As `open_frames`, but for a store of several sequences, of which none is named: each of them, in their order."""
    if len(data) == 1 and sequence is None and (data[0] / STORE_FILE).is_file():
        store = Store.open(data[0])
        if store.layout.time.names:
            return tuple(store_frames(store, contract, name) for name in store.layout.time.names)
    return (open_frames(contract, data, sequence),)


def open_frames(contract: Contract, data: Sequence[Path], sequence: str | None = None) -> Frames:
    """A store, or files of any other kind; see `store_frames` and `file_frames`."""
    stores = [path for path in data if (path / STORE_FILE).is_file()]
    if len(data) == 1 and stores:
        return store_frames(Store.open(data[0]), contract, sequence)
    if sequence is not None:
        raise InputError(f"--sequence {sequence} is of a store that has several, and --data names other files.")
    from .sources import file_frames

    return file_frames(data, contract)


def asked_of(trained: TrainedNetwork) -> Asked:
    """The network, as a part of what is asked for."""
    name = f"step {trained.step} of {trained.about.get('run', 'a network')}"
    return Asked(trained.digest, f"{name} (digest {trained.digest[:8]})")


def run_campaign(
    forecaster: Forecaster,
    campaign: Campaign,
    output: Path,
    mesh: ProcessMesh,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Collective. Each replica forecasts from another date; a lead is written when it is there. Dates that an earlier
    start has finished are kept.

    Raises:
        InputError: the output is of another request, or cannot be written; or fields that cannot be read.
    """
    began, trained = time.monotonic(), forecaster.trained
    request = {"MODEL": asked_of(trained), **campaign.request}
    kept = count = len(campaign.starts)
    with opened_output(output, FORECASTS, campaign.layout, request, mesh, overwrite=overwrite) as writer:
        if writer is not None:
            todo = mesh.from_first([init for init in range(count) if not writer.is_done(init)])
            kept = count - len(todo)
            with arithmetic("fp32", forecaster.device):
                _Work(forecaster, campaign, writer, mesh, output).do(todo, progress)
            finish_output(writer, output, mesh)
    dates = [one.date for one in campaign.starts]
    names, steps = tuple(one.name for one in campaign.layout.fields), campaign.layout.leads_s.size
    until = _known_until(campaign)
    return Summary(str(output), names, count, kept, steps, dates[0], dates[-1], until, time.monotonic() - began)


def _known_until(campaign: Campaign) -> str:
    """See `Summary`."""
    axis, leads_s = campaign.frames.states.axis, campaign.layout.leads_s
    ahead_s = np.add.outer([one.second for one in campaign.starts], leads_s)
    known = np.flatnonzero(np.isin(axis.seconds, ahead_s))
    return axis.date(int(known[-1])) if known.size else ""


@dataclass(frozen=True)
class _Work:
    """Of this rank."""

    forecaster: Forecaster
    campaign: Campaign
    writer: Writer
    mesh: ProcessMesh
    output: Path

    def do(self, todo: Sequence[int], progress: Progress | None) -> None:
        """Forecasts from some dates, as many at once as there are replicas."""
        take_turns(todo, self.campaign.layout.leads_s.size, self.mesh, self._forecast, progress)

    def _forecast(self, init: int) -> Iterator[None]:
        leads = self.forecaster.leads(self.campaign.frames, self.campaign.starts[init])
        with written_to(self.output), self.writer.writing(init, self.mesh.tile_index == 0) as sink:
            for lead, lead_CYX in enumerate(leads):
                self._write(sink, lead, lead_CYX, self.forecaster.domain)
                yield

    def _write(self, sink: Sink | None, lead: int, lead_CYX: Tensor, domain: Domain) -> None:
        """One field of the whole grid after the other, on the rank that writes it."""
        for channel, field_YX in enumerate(lead_CYX):
            whole_YX = domain.assemble_at(field_YX.float(), self.writer.tile_of(channel, self.mesh.tiles))
            if whole_YX is not None:
                assert sink is not None, f"tile {self.mesh.tile_index} writes channel {channel} and has opened nothing"
                with self.mesh.activity.during(SAVING):
                    sink.write(channel, lead, whole_YX.cpu().numpy())
