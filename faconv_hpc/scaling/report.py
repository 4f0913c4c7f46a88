"""What a study found: statistics over repeats, speed-up and efficiency."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..spread import Spread
from .driver import PointState, standing
from .machine import machine_in_words
from .points import DONE, FAILED, Outcomes
from .results import LOCAL, Repeat, write_results
from .study import Point, StudyConfig


@dataclass(frozen=True)
class PointResult:
    """A row of the table. What was not measured is None.

    Attributes:
        status: ``done``, ``failed`` or ``waiting`` (to be run or running).
        seconds_per_step: over the repeats.
        speed_up: how much more work per second than the base; of medians.
        efficiency: speed-up over the ranks' ratio: 1 is ideal.
        communication_share, data_share: of the time, medians.
        peak_memory_gib: of the rank that needed most.
        why: of a point that failed.
        log: of the last attempt.
    """

    point: str
    mesh: str
    ranks: int
    nodes: int
    status: str
    repeats: int = 0
    seconds_per_step: Spread | None = None
    samples_per_s: float | None = None
    speed_up: float | None = None
    efficiency: float | None = None
    communication_share: float | None = None
    data_share: float | None = None
    peak_memory_gib: float | None = None
    why: str = ""
    log: str = ""


@dataclass(frozen=True)
class StudyReport:
    """All that is told of a study.

    Attributes:
        base: the point that speed-up and efficiency refer to; None: none is done.
        machine: what it was measured on.
        notes: what to know before believing the figures.
    """

    study: str
    scaling: str
    base: str | None
    points: tuple[PointResult, ...]
    machine: str
    notes: tuple[str, ...]

    @property
    def all_done(self) -> bool:
        """Whether every point is."""
        return all(point.status == DONE for point in self.points)

    def to_json(self) -> str:
        """For programs."""
        return json.dumps(asdict(self), indent=2)

    @property
    def caption(self) -> str:
        """How to read the table."""
        if self.base is None:
            return "no point is done yet"
        ratio = "T(base) / T" if self.scaling == "strong" else "ranks / ranks(base) x T(base) / T"
        return (
            f"{self.scaling} scaling; base: {self.base}, of the fewest ranks that are done. T: median s per step; "
            f"speed-up: {ratio}; efficiency: speed-up x ranks(base) / ranks; communication, data: shares of the time."
        )


def report_of(study: StudyConfig, points: Sequence[Point]) -> StudyReport:
    """From what is on disk: repeats are derived from the runs' records, results.jsonl with them."""
    repeats = write_results(study, points)
    outcomes = Outcomes(study.study_dir)
    states = [standing(point, outcomes) for point in points]
    by_point = {point.name: [one for one in repeats if one.point == point.name] for point in points}
    base = base_of(repeats)
    results = tuple(_result(study, state, by_point[state.point.name], by_point.get(base or "")) for state in states)
    return StudyReport(study.name, study.scaling, base, results, _machine(repeats), _notes(repeats))


def base_of(repeats: Sequence[Repeat]) -> str | None:
    """The point of the fewest ranks; of several, the fastest, which makes the strictest base."""
    medians = {
        (one.ranks, one.point): Spread.of([other.seconds_per_step for other in repeats if other.point == one.point])
        for one in repeats
    }
    return min(medians, key=lambda key: (key[0], medians[key].median))[1] if medians else None


def _result(
    study: StudyConfig, state: PointState, repeats: Sequence[Repeat], base: Sequence[Repeat] | None
) -> PointResult:
    point = state.point
    nodes = repeats[0].nodes if repeats else _nodes(state)
    row: dict[str, Any] = {"point": point.name, "mesh": str(point.run.mesh), "ranks": point.ranks, "nodes": nodes}
    if not repeats or not base:
        status = FAILED if state.status == FAILED else "waiting"
        log = str(state.files.log(state.attempt.number)) if state.attempt else ""
        return PointResult(**row, status=status, why=state.why, log=log)
    seconds = Spread.of([one.seconds_per_step for one in repeats])
    base_s = Spread.of([one.seconds_per_step for one in base]).median
    growth = point.ranks / base[0].ranks
    efficiency = base_s / seconds.median / (growth if study.scaling == "strong" else 1)
    return PointResult(
        **row,
        status=DONE,
        repeats=len(repeats),
        seconds_per_step=seconds,
        samples_per_s=_median(repeats, "samples_per_s"),
        speed_up=efficiency * growth,
        efficiency=efficiency,
        communication_share=_median(repeats, "communication_share"),
        data_share=_median(repeats, "data_share"),
        peak_memory_gib=max(one.peak_memory_gib for one in repeats),
    )


def _nodes(state: PointState) -> int:
    return 1 if state.attempt and state.attempt.cluster == LOCAL else state.point.nodes


def _median(repeats: Sequence[Repeat], name: str) -> float:
    return Spread.of([getattr(one, name) for one in repeats]).median


def _machine(repeats: Sequence[Repeat]) -> str:
    """What the runs say of the machine, and when they ran."""
    if not repeats:
        return "nothing was measured"
    said = [one.versions | {"host": one.host, "hosts": one.hosts} for one in repeats]
    dates = [one.date for one in repeats]
    return f"{machine_in_words([one.cluster for one in repeats], said)}; {min(dates)} to {max(dates)}"


def _notes(repeats: Sequence[Repeat]) -> tuple[str, ...]:
    """What makes figures of a study something else than they seem."""
    notes = []
    largest = max(repeats, key=lambda one: one.ranks, default=None)
    if largest is None:
        return ()
    if any(one.cluster == LOCAL and one.ranks > 1 for one in repeats):
        notes.append(
            "The ranks were started on one machine. Unless each has a device of its own they share its cores and "
            "memory: this shows what cutting and communicating cost there, and is no scaling figure."
        )
    elif (shared := _shared_machine(repeats)) is not None:
        notes.append(
            f"Point {shared.point} asked for {shared.nodes} nodes, and its ranks ran on "
            f"{', '.join(shared.hosts) or shared.host}. If several nodes are one machine, "
            f"ranks share its cores, and this is no scaling figure."
        )
    if largest.ranks > 1 and all(one.reduction_share == 0 for one in repeats):
        notes.append(
            "DeepSpeed's collectives were not measured (on a GPU they are not), so communication is exchanges."
        )
    if len({json.dumps(one.versions, sort_keys=True) for one in repeats}) > 1:
        notes.append("The points ran with different versions of the software; see results.jsonl.")
    return tuple(notes)


def _shared_machine(repeats: Sequence[Repeat]) -> Repeat | None:
    """One of a point whose nodes are fewer machines; where the run names one host only, it is this very machine."""
    for one in sorted(repeats, key=lambda one: -one.nodes):
        told = len(one.hosts) < one.nodes if one.hosts else one.nodes > 1 and one.host == platform.node()
        if told:
            return one
    return None
