"""Running a study: each point a job, at most so many at a time; what was done before is kept."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import InputError, RunError, SilentClusterError
from ..files import write_durably
from .points import DONE, FAILED, Attempt, Outcome, Outcomes, PointFiles
from .results import LOCAL
from .study import Cluster, Point

WAITING, RUNNING = "waiting", "running"
STUDY_FILE = "study.yaml"
POLL_S = {LOCAL: 0.5, "slurm": 5.0}
SETTLE_S = {LOCAL: 1.0, "slurm": 20.0}
"""How long after a job's end its last records may still be on their way over a shared file system."""
STALE_S = 60.0  # the lock of a lost node may stay on a network file system
NAP_S = 0.2  # a signal is noticed that soon


class Studied(Protocol):
    """What a driver asks of a study, whatever its points are for."""

    @property
    def study_dir(self) -> Path:
        """Where its points are."""

    @property
    def at_once(self) -> int | None:
        """How many jobs may wait or run at a time; None: all the cluster takes."""

    def to_yaml(self) -> str:
        """What is kept of it in its directory."""


class Stop(Protocol):
    """Tells whether a signal has asked to stop."""

    @property
    def number(self) -> int:
        """Of the signal; 0: none has come."""


@dataclass
class PointState:
    """Where a point stands.

    Attributes:
        status: ``waiting``, ``running`` (its job waits in the queue or runs), ``done`` or ``failed``.
        attempt: the one under way, or the last.
        ours: whether this process started it.
        ended_at: when its job was first found to have ended, by the monotonic clock.
        held_since: when its run directory was first found to be held although its job is over.
        steps: on record.
        why: it failed, or nothing is heard of it.
    """

    point: Point
    files: PointFiles
    status: str = WAITING
    attempt: Attempt | None = None
    ours: bool = False
    ended_at: float | None = None
    held_since: float | None = None
    steps: int = 0
    why: str = ""


Show = Callable[[Sequence[PointState]], None]


class StudyDriver:
    """Brings the points of a study to their ends.

    Args:
        points: of the study.
        cluster: takes the jobs.
        where: ``slurm`` or ``local``. Local jobs end with the process that started them.
        record: derives results from what is on disk, at the start and whenever a point is done.
        retry_failed: start points again that have failed.
        show: is told where the points stand, after every look.
        poll_s, settle_s: seconds between looks, and until the end of a job without all steps is believed; by default
            as long as ``where`` needs.
        stale_s: how long a run directory may be held after its job is over.
    """

    def __init__(
        self,
        study: Studied,
        points: Sequence[Point],
        cluster: Cluster,
        where: str,
        *,
        record: Callable[[], object] = lambda: None,
        retry_failed: bool = False,
        show: Show = lambda states: None,
        poll_s: float | None = None,
        settle_s: float | None = None,
        stale_s: float = STALE_S,
    ) -> None:
        self._study, self._points, self._cluster, self._where = study, points, cluster, where
        self._record, self._retry_failed, self._show = record, retry_failed, show
        self._poll_s = POLL_S[where] if poll_s is None else poll_s
        self._settle_s = SETTLE_S[where] if settle_s is None else settle_s
        self._stale_s = stale_s
        self._outcomes = Outcomes(study.study_dir)
        self._at_once = min(limit for limit in (cluster.at_once, study.at_once, len(points)) if limit is not None)

    def run(self, stop: Stop) -> list[PointState]:
        """Until every point is done or has failed, or a signal came; where they stand then.

        Raises:
            InputError: what is on disk was run with another config or cluster, or belongs to somebody else.
        """
        states = [self._found(point) for point in self._points]
        write_durably(self._study.study_dir / STUDY_FILE, self._study.to_yaml())
        self._record()
        while not stop.number:
            for state in states:
                if state.status == RUNNING:
                    self._look_at(state, stop)
            self._start_next(states, stop)
            self._show(states)
            if all(state.status in (DONE, FAILED) for state in states):
                break
            _nap(self._poll_s, stop)
        return states

    def _found(self, point: Point) -> PointState:
        """Where a point stands before this process has done anything."""
        state = standing(point, self._outcomes)
        if state.status == FAILED and self._retry_failed:
            state.status = WAITING
        if state.status == WAITING and not self._retries(state):
            self._attach(state)
        if state.status in (DONE, RUNNING) or point.goes_on or self._was_done(state):
            state.files.check_same()
        return state

    def _retries(self, state: PointState) -> bool:
        return self._outcomes.of(state.point.name, state.attempt) is not None

    def _was_done(self, state: PointState) -> bool:
        """One of fewer steps may have been: it is not begun anew because more are asked for."""
        outcome = self._outcomes.of(state.point.name, state.attempt)
        return outcome is not None and outcome.status == DONE

    def _attach(self, state: PointState) -> None:
        """A job of an earlier process that still lives, or has done all steps unseen."""
        attempt = state.attempt
        if attempt is None:
            return
        held = state.files.is_trained_in()  # by a job whose id was lost, it may be
        if attempt.job is None and not (held or state.files.complete):
            return
        if attempt.cluster != self._where and not state.files.complete:
            raise InputError(
                f"point {state.point.name} was started on {attempt.cluster} as job {attempt.job}, and has not ended as "
                f"far as the study knows. Go on with --cluster {attempt.cluster}; or see that the job has ended and "
                f"remove {state.point.directory}."
            )
        alive = attempt.cluster == self._where and attempt.job is not None and self._alive(state, attempt.job)
        if alive or held or state.files.complete or attempt.cluster != LOCAL:  # that one may have failed unseen
            state.status = RUNNING

    def _look_at(self, state: PointState, stop: Stop) -> None:
        """Whether the job of a running point has ended, and how."""
        assert state.attempt is not None, "a point that runs was started"
        state.steps = len(state.files.records())
        if self._lives(state):
            state.ended_at = None
            return
        state.ended_at = state.ended_at or time.monotonic()
        if state.files.complete:
            self._end(state, state.files.outcome(state.attempt))
        elif time.monotonic() - state.ended_at >= self._settle_s:
            if self._where == LOCAL and (stop.number or not state.ours):
                state.status = WAITING  # it ended because the process that started it did
            else:
                self._end(state, state.files.outcome(state.attempt))

    def _lives(self, state: PointState) -> bool:
        """Whether a job of the point waits or runs. Once its job is over, its lock alone is not believed for long."""
        state.why = ""
        job = state.attempt.job if state.attempt and state.attempt.cluster == self._where else None
        if job is not None and self._alive(state, job):
            state.held_since = None
            return True
        if not state.files.is_trained_in():
            state.held_since = None
            return False
        state.held_since = state.held_since or time.monotonic()
        held_s = time.monotonic() - state.held_since
        if held_s > self._settle_s:  # before that it may just be ending
            state.why = f"{state.files.run_dir} is held by {state.files.holder}"
        return job is None or held_s < self._stale_s

    def _alive(self, state: PointState, job: str) -> bool:
        """As far as the cluster tells; one that is silent has not ended the job."""
        try:
            return self._cluster.alive(job)
        except SilentClusterError as error:
            state.why = str(error)
            return True

    def _start_next(self, states: Sequence[PointState], stop: Stop) -> None:
        running = sum(state.status == RUNNING for state in states)
        for state in states:
            if running >= self._at_once or stop.number:
                return
            if state.status == WAITING and not self._lives(state):
                self._start(state, stop)
                if state.status == WAITING:  # the cluster takes no job now
                    return
                running += state.status == RUNNING

    def _start(self, state: PointState, stop: Stop) -> None:
        """The attempt is on disk before its job can be, and the job's id right after."""
        attempt = state.files.begin(self._where)
        state.attempt, state.steps, state.ended_at, state.ours, state.why = attempt, 0, None, True, ""
        try:
            job = self._cluster.submit(state.files.config, state.point.run, state.files.log(attempt.number))
        except SilentClusterError as error:
            state.why = str(error)
            return
        except (InputError, RunError) as error:
            if not stop.number:  # else Ctrl-C ended what was submitting
                self._end(state, state.files.outcome(attempt, f"not started: {error}"))
            return
        state.attempt = Attempt(attempt.number, job, attempt.cluster, attempt.date)
        state.files.save(state.attempt)
        state.status = RUNNING

    def _end(self, state: PointState, outcome: Outcome) -> None:
        """The results first: from an outcome on, nobody looks at the point again."""
        state.status, state.steps, state.why = outcome.status, outcome.steps, outcome.why
        if outcome.status == DONE:
            self._record()
        self._outcomes.add(outcome)


def standing(point: Point, outcomes: Outcomes) -> PointState:
    """Where a point stands by what is on disk, without asking a cluster: done, failed, or still to do."""
    files = PointFiles(point)
    state = PointState(point, files, attempt=files.attempt(), steps=len(files.records()))
    outcome = outcomes.of(point.name, state.attempt)
    if outcome is not None and outcome.status == FAILED and not files.complete:
        state.status, state.why = FAILED, outcome.why
    elif outcome is not None and files.complete:
        state.status = DONE
    return state


def _nap(seconds: float, stop: Stop) -> None:
    until = time.monotonic() + seconds
    while not stop.number and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, NAP_S))
