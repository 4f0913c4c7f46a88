"""The timed repeats of a study's points, derived from what the runs recorded."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..files import write_json_lines
from ..training.records import STEPS_FILE, StepRecord
from .machine import versions_in
from .points import PointFiles
from .study import Point, StudyConfig

RESULTS_FILE = "results.jsonl"
LOCAL = "local"


@dataclass(frozen=True)
class Repeat:
    """One timed block of steps of one point: a line of results.jsonl. Shares are of the block's wall time.

    Attributes:
        nodes: machines that were asked for; 1 where the ranks were started on this one.
        repeat: from 1.
        first_step, last_step: of the block.
        seconds_per_step: mean over the block.
        samples_per_s: all samples of the block over its time.
        communication_share: exchanges between tiles and DeepSpeed's collectives.
        peak_memory_gib: of the rank that needed most, until the end of the block.
        date: when the point's last step was recorded.
        host: of the first rank.
        hosts: of all ranks, each once, where the run says so.
        versions: what was running.
    """

    study: str
    scaling: str
    point: str
    mesh: str
    ranks: int
    nodes: int
    repeat: int
    first_step: int
    last_step: int
    seconds_per_step: float
    samples_per_s: float
    exchange_share: float
    reduction_share: float
    communication_share: float
    data_share: float
    peak_memory_gib: float
    date: str
    cluster: str
    host: str
    hosts: tuple[str, ...]
    versions: dict[str, Any]


def repeats_of(study: StudyConfig, point: Point) -> list[Repeat]:
    """The repeats of a point, all of them or, unless all its steps are on record, none."""
    files = PointFiles(point)
    records = files.records()
    attempt = files.attempt()
    if len(records) < study.steps or attempt is None:
        return []
    versions = versions_in(files.run_dir)
    about: dict[str, Any] = {
        "study": study.name,
        "scaling": study.scaling,
        "point": point.name,
        "mesh": str(point.run.mesh),
        "ranks": point.ranks,
        "nodes": 1 if attempt.cluster == LOCAL else point.nodes,
        "date": _last_written(files.run_dir / STEPS_FILE),
        "cluster": attempt.cluster,
        "host": str(versions.pop("host", "")),
        "hosts": tuple(versions.pop("hosts", ())),
        "versions": versions,
    }
    found = []
    for repeat in range(study.repeats):
        first = study.warm_up_steps + repeat * study.steps_per_repeat
        block = records[first : first + study.steps_per_repeat]
        found.append(Repeat(repeat=repeat + 1, **about, **_measured(block)))
    return found


def write_results(study: StudyConfig, points: Sequence[Point]) -> list[Repeat]:
    """Derives results.jsonl anew from the records of all points that are done, and returns it.

    The file is replaced as a whole, so that no repeat stands there twice whenever this is cut short.
    """
    found = [repeat for point in points for repeat in repeats_of(study, point)]
    write_json_lines(study.study_dir / RESULTS_FILE, [asdict(repeat) for repeat in found])
    return found


def _measured(block: Sequence[StepRecord]) -> dict[str, Any]:
    """Means over the steps of a block; of shares, weighted by the steps' seconds."""
    seconds = sum(record.seconds for record in block)

    def share(name: str) -> float:
        return float(sum(getattr(record, name) * record.seconds for record in block) / seconds)

    shares = {name: share(name) for name in ("exchange_share", "reduction_share", "communication_share", "data_share")}
    return shares | {
        "first_step": block[0].step,
        "last_step": block[-1].step,
        "seconds_per_step": seconds / len(block),
        "samples_per_s": sum(record.samples for record in block) / seconds,
        "peak_memory_gib": max(record.peak_memory_gib for record in block),
    }


def _last_written(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")
