"""What is on disk of a study's points: which job runs one, which steps it has done, how its attempts have ended."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from ..config_file import load_config
from ..errors import InputError
from ..files import read_json_lines, write_durably, write_json_lines
from ..locks import holder_of, is_held, locked_directory
from ..training.faults.claim import LOCK_FILE
from ..training.records import CONFIG_FILE, StepRecord, look_is_missing, read_records
from .study import Point

JOB_FILE, OUTCOMES_FILE, STUDY_LOCK = "job.json", "points.jsonl", ".lock"
DONE, FAILED = "done", "failed"
LAST_LINES = 15  # of a failed job's log, kept with its outcome
SEARCHED = 500  # in which its last words are looked for: each of many ranks may have a few after them
WORDS = ("faconv: failed", "faconv: error", "faconv: interrupted")  # as errors.describe has them


@dataclass(frozen=True)
class Attempt:
    """One start of a point.

    Attributes:
        number: from 1.
        job: its id in the cluster; None where the driver was killed before it learned it, or no job was taken.
        cluster: ``slurm`` or ``local``.
        date: when it was started.
    """

    number: int
    job: str | None
    cluster: str
    date: str


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: a line of points.jsonl.

    Attributes:
        status: ``done`` or ``failed``.
        steps: that are on record, of ``of``.
        why: one line, for the table.
        last_lines: of the log.
    """

    point: str
    attempt: int
    status: str
    job: str | None
    steps: int
    of: int
    date: str
    why: str
    log: str
    last_lines: tuple[str, ...]


class PointFiles:
    """The directory of one point.

    It holds config.yaml, job.json (the newest attempt), one log per attempt, and the run directory.
    """

    def __init__(self, point: Point) -> None:
        self.point = point
        self.run_dir = point.run.run_dir
        self.config = point.directory / CONFIG_FILE

    def log(self, attempt: int) -> Path:
        """Where the job of an attempt prints to."""
        return self.point.directory / f"attempt-{attempt}.log"

    def attempt(self) -> Attempt | None:
        """The newest one, if there is one."""
        path = self.point.directory / JOB_FILE
        try:
            return Attempt(**json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            raise InputError(
                f"{path} cannot be read, and it says which job runs the point. See that no job runs in "
                f"{self.run_dir}, remove {self.point.directory}, and start the study again."
            ) from None

    def save(self, attempt: Attempt) -> None:
        """Puts the attempt on disk, at once and whole."""
        write_durably(self.point.directory / JOB_FILE, json.dumps(asdict(attempt)) + "\n")

    def begin(self, cluster: str) -> Attempt:
        """A new attempt: noted, what an earlier one left removed unless it goes on from there, the config written.

        The job's id is to follow.

        Raises:
            InputError: the run directory is not one that a study made, or it cannot be removed.
        """
        before = self.attempt()
        if before is None and self.run_dir.exists():
            raise InputError(
                f"{self.run_dir} is there, but no job of this study made it, so it is not removed. Move it away, or "
                f"give another study_dir."
            )
        attempt = Attempt(before.number + 1 if before else 1, None, cluster, now())
        self.save(attempt)
        if not self.point.goes_on:
            self._remove_run()
        write_durably(self.config, self.point.run.to_yaml())
        return attempt

    def _remove_run(self) -> None:
        try:
            shutil.rmtree(self.run_dir)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise InputError(
                f"{self.run_dir}, of an earlier attempt, cannot be removed: {error.strerror or error}. Remove it, and "
                f"start the study again."
            ) from None

    def records(self) -> list[StepRecord]:
        """The steps that are done, from the first, without a gap."""
        found = read_records(self.run_dir)
        return [record for place, record in enumerate(found, start=1) if record.step == place]

    @property
    def complete(self) -> bool:
        """Whether all steps are on record, and the look at the validation period after the last, if there is one."""
        run, last = self.point.run, self.point.run.training.steps
        return len(self.records()) >= last and not look_is_missing(run, last)

    def is_trained_in(self) -> bool:
        """Whether some process still holds the run directory, such as a job whose id was lost."""
        return is_held(self.run_dir / LOCK_FILE)

    @property
    def holder(self) -> str:
        """Who trains there, by what its lock says."""
        return holder_of(self.run_dir / LOCK_FILE) or "somebody"

    def check_same(self) -> None:
        """Raises InputError where what is there was run with another config: a study compares like with like."""
        if not self.config.exists():
            return
        run = load_config(self.config, older=True)
        was = Point(self.point.name, self.point.directory, run).measured()
        wanted = self.point.measured()
        for key in [*wanted, *(key for key in was if key not in wanted)]:
            if was.get(key) != wanted.get(key):
                raise InputError(
                    f"point {self.point.name} in {self.point.directory} was run with {key}={was.get(key)!r}, the study "
                    f"now says {wanted.get(key)!r}. Give another study_dir, give the point another name, or remove "
                    f"{self.point.directory} to run it again."
                )

    def outcome(self, attempt: Attempt, why: str = "") -> Outcome:
        """How the attempt has ended, by what is on record."""
        steps, of = len(self.records()), self.point.run.training.steps
        log = self.log(attempt.number)
        lines = _lines(log)
        status = DONE if self.complete else FAILED
        if status == FAILED and not why:
            why = _reason(lines)
        return Outcome(
            point=self.point.name,
            attempt=attempt.number,
            status=status,
            job=attempt.job,
            steps=min(steps, of),
            of=of,
            date=now(),
            why="" if status == DONE else why,
            log=str(log),
            last_lines=() if status == DONE else tuple(lines[-LAST_LINES:]),
        )


class Outcomes:
    """points.jsonl of a study: one line per attempt that has ended; the newest of each point counts."""

    def __init__(self, study_dir: Path) -> None:
        self._path = study_dir / OUTCOMES_FILE
        lines = read_json_lines(self._path)
        self._all = [Outcome(**line | {"last_lines": tuple(line["last_lines"])}) for line in lines]

    def of(self, point: str, attempt: Attempt | None) -> Outcome | None:
        """Of this attempt, if it has ended and was seen to."""
        same = [one for one in self._all if attempt and one.point == point and one.attempt == attempt.number]
        return same[-1] if same else None

    def add(self, outcome: Outcome) -> None:
        """One line more, whole or not at all; none twice."""
        self._all = [one for one in self._all if (one.point, one.attempt) != (outcome.point, outcome.attempt)]
        self._all.append(outcome)
        write_json_lines(self._path, [asdict(one) for one in self._all])


@contextmanager
def locked(study_dir: Path) -> Iterator[None]:
    """The study for this process alone; the kernel frees it if the process is killed.

    Raises:
        InputError: another process runs the study, or the directory cannot be made.
    """

    def refusal(holder: str) -> InputError:
        return InputError(
            f"the study in {study_dir} is already run by {holder or 'another process'}. Wait for "
            f"it, or look at what is done with --report-only."
        )

    with locked_directory(study_dir / STUDY_LOCK, "study_dir", refusal):
        yield


def now() -> str:
    """The time in UTC, as in 2026-11-25T01:20:00+00:00."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _lines(log: Path) -> list[str]:
    try:
        return log.read_text(errors="replace").splitlines()[-SEARCHED:]
    except OSError:
        return []


def _reason(lines: Sequence[str]) -> str:
    """The line of a log that says most: with which the run, or one rank for all, has ended; or else the last line."""
    said = [line.strip() for line in lines if line.strip()]
    ours = [line for line in said if line.startswith(WORDS)]
    return (ours or said[-1:] or ["an empty log"])[0]
