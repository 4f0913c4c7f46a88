"""What Slurm's own client says of a job; no accounting database is needed."""

import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import EXIT_FAILED, EXIT_OK, InputError, SilentClusterError

CLIENT_S = 60  # for an answer; a busy controller takes its time
POLL_S = 2.0
OVER = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
)
UNKNOWN_JOB = "nvalid job id"
NO_CLUSTER = "configuration source"  # says a client that no slurm.conf tells of a cluster, as on a laptop


@dataclass(frozen=True)
class JobState:
    """Where a job stands.

    Attributes:
        name: Slurm's word, such as ``RUNNING``.
        reason: why it waits, such as ``Resources``.
        restarts: how often it was requeued.
        exit_code: of its script; 0 while it has none.
    """

    name: str
    reason: str
    restarts: int
    exit_code: int

    @property
    def over(self) -> bool:
        """Whether it will not run again."""
        return self.name in OVER


def job_state(job: str) -> JobState | None:
    """A job's state; None if Slurm does not know it, or no longer (some minutes after its end).

    Raises:
        subprocess.SubprocessError: the controller does not answer.
    """
    command = ["scontrol", "show", "job", "--oneliner", job]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=CLIENT_S, check=False)
    if shown.returncode:
        if UNKNOWN_JOB in shown.stderr:
            return None
        raise subprocess.SubprocessError(shown.stderr.strip())
    fields = dict(re.findall(r"(\w+)=(\S*)", shown.stdout))
    code, _, number = fields["ExitCode"].partition(":")
    return JobState(
        name=fields["JobState"],
        reason=fields.get("Reason", "None"),
        restarts=int(fields.get("Restarts", 0)),
        exit_code=int(code) or (128 + int(number) if int(number) else 0),
    )


def is_alive(job: str) -> bool:
    """Whether a job waits or runs. Raises SilentClusterError where the controller does not say."""
    try:
        state = job_state(job)
    except (subprocess.SubprocessError, OSError) as error:
        raise SilentClusterError(f"Slurm does not say how job {job} does ({error})") from None
    return state is not None and not state.over


def ping(timeout_s: float = CLIENT_S) -> tuple[bool, str]:
    """Whether one of Slurm's controllers answers, the first or a backup, and what ``scontrol ping`` says."""
    try:
        asked = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return False, f"no answer in {timeout_s:g} s"
    except OSError as error:
        return False, str(error)
    lines = [line.strip() for line in (asked.stdout + asked.stderr).splitlines() if line.strip()]
    up = [line for line in lines if line.endswith(" UP")]
    return bool(up), "; ".join(up or lines) or f"exit code {asked.returncode}"


def missing_commands() -> list[str]:
    """Of Slurm's, those that are not on this machine."""
    return [name for name in ("sbatch", "scontrol", "srun") if shutil.which(name) is None]


def check_client() -> None:
    """Raises InputError unless Slurm's commands are here, and SilentClusterError unless its controller answers."""
    if missing := missing_commands():
        raise InputError(
            f"Slurm's commands are not here (missing: {', '.join(missing)}). Run this on a login node of the cluster; "
            f"on one machine use `faconv train CONFIG --ranks N`, or tools/mini_slurm.sh for a Slurm of its own."
        )
    up, answer = ping()
    if not up:
        raise SilentClusterError(
            f"Slurm's controller does not answer (scontrol ping: {answer}). See that SLURM_CONF or "
            f"/etc/slurm names the cluster and that slurmctld runs; on one machine use `faconv train CONFIG --ranks N`."
        )


def follow(job: str, log: Path) -> int:
    """Prints a job's log as it grows, and its state as it changes, until it is over; its exit code."""
    shown, said, last = 0, "", None
    while True:
        state, silence = None, ""
        try:
            state = job_state(job)
        except (subprocess.SubprocessError, OSError) as error:  # the controller is busy, or restarts
            silence = f"Slurm does not say how it does ({error}); asking again"
        shown = _print_from(log, shown)
        if silence:
            if said != silence:
                said = silence
                print(f"job {job}: {silence}", file=sys.stderr, flush=True)
            time.sleep(POLL_S)
            continue
        if state is None:
            where = f"it was last {last.name.lower()}" if last else "it was never seen"
            print(f"job {job}: Slurm no longer knows it, {where}; see its log, {log}", file=sys.stderr)
            return EXIT_FAILED
        if (told := _told(state)) != said:
            said = told
            print(f"job {job}: {told}", file=sys.stderr, flush=True)
        if state.over:
            return state.exit_code or (EXIT_OK if state.name == "COMPLETED" else EXIT_FAILED)
        last = state
        time.sleep(POLL_S)


def _told(state: JobState) -> str:
    waits = f" ({state.reason})" if state.name == "PENDING" and state.reason != "None" else ""
    again = f", requeued {state.restarts} time(s)" if state.restarts else ""
    code = f", exit code {state.exit_code}" if state.over else ""
    return f"{state.name.lower()}{waits}{again}{code}"


def _print_from(log: Path, start: int) -> int:
    """Prints what was added to a file; where it ends now."""
    try:
        with log.open("rb") as file:
            file.seek(start)
            added = file.read()
    except FileNotFoundError:
        return start
    sys.stdout.write(added.decode(errors="replace"))
    sys.stdout.flush()
    return start + len(added)
