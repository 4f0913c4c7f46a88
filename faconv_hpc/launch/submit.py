"""A run as a Slurm job, through submitit; the only importer of it.

The job is `faconv train` itself, not a pickled function: the script can be read, kept and submitted by hand. submitit's
own way of going on after a time limit is not used: it saves inside a signal handler, on rank 0 alone, and gives up
after three times. Here the ranks save together at the next step boundary and leave with exit code 75, and the script
requeues its job, as often as it takes.
"""

import hashlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from ..config import RunConfig
from ..errors import InputError, SilentClusterError
from ..files import cannot_write, write_durably
from ..spatial.environment import outside_a_job
from .slurm import check_client

SRUN = ("--kill-on-bad-exit=1", "--wait=60")  # or one dead rank leaves the others hanging
NOT_NOW = ("nable to contact", "imed out", "MaxSubmitJob", "temporarily")
"""In what sbatch says: its controller is away or busy, or the user has as many jobs as is allowed."""

MEMBER = "member-"  # and its number: the run directory of one of an ensemble
JOB = Path(__file__).with_name("job.sh")
"""What a job does at its start and its end, among it the rule for requeueing; the scripts in slurm/ read it too."""


@dataclass(frozen=True)
class Submission:
    """A job that was given to Slurm.

    Attributes:
        job: Slurm's number of it.
        script: the batch script.
        log: what the job prints, over all its starts.
    """

    job: str
    script: Path
    log: Path


class TrainingExecutor(submitit.SlurmExecutor):  # type: ignore[misc]
    """submitit's executor for jobs that run one command on all ranks.

    Args:
        folder: for scripts and logs.
        command: what every rank runs.
    """

    def __init__(self, folder: Path, command: str) -> None:
        super().__init__(folder)
        self._command = command

    @classmethod
    def affinity(cls) -> int:
        """A script can be written where there is no Slurm, too."""
        return 2

    @classmethod
    def name(cls) -> str:
        """What submitit calls the plugin."""
        return "slurm"

    def script(self) -> str:
        """The batch script, to the letter."""
        return str(self._make_submission_file_text(self._command, ""))

    def start(self) -> str:
        """Gives the script to sbatch; the job's number."""
        return str(self._submit_command(self._command).job_id)


def submit(
    config: RunConfig,
    *,
    preflight: bool = True,
    log: Path | None = None,
    name: str | None = None,
    members: int = 0,
    more: Sequence[str] = (),
) -> Submission:
    """Gives a run to Slurm.

    Args:
        more: options of `faconv train`.
        members: of an ensemble, a job array: each trains from another seed into a directory of its own; 0: no array.
        preflight: whether `faconv doctor` looks at the nodes first.
        log: where the job prints to; default: a file beside the script.
        name: of the job; default: that of the run's directory.

    Raises:
        InputError: there is no Slurm here, it refuses the job, or the ranks do not fill the nodes evenly.
        SilentClusterError: it does not answer, or takes no more jobs at the moment.
    """
    check_client()
    executor = _executor(config, preflight, log, name, members, more)
    try:
        with outside_a_job():
            job = executor.start()
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        (*_, said) = str(error).strip().splitlines() or [type(error).__name__]
        if any(sign in str(error) for sign in NOT_NOW):
            raise SilentClusterError(f"sbatch takes no job now: {said}. Try again later.") from None
        no_gpus = " This Slurm knows of no GPUs: --set slurm.gpus_per_node=0." if "gres" in str(error) else ""
        raise InputError(
            f"sbatch refused the job: {said}.{no_gpus} Change section slurm of the config "
            f"(`--set slurm.partition=NAME`, account, time_min, gpus_per_node ...); --dry-run shows the script."
        ) from None
    folder = _folder(config)
    return Submission(
        job,
        folder / f"{job}_submission.sh",
        Path(str(_log(config, log, members)).replace("%j", job).replace("%A", job)),
    )


def script(config: RunConfig, *, preflight: bool = True, members: int = 0, more: Sequence[str] = ()) -> str:
    """The batch script that `submit` would give to sbatch. The config it names is written too, so that it can run.

    Raises:
        InputError: the ranks do not fill the nodes evenly.
    """
    return _executor(config, preflight, members=members, more=more).script()


def _executor(
    config: RunConfig,
    preflight: bool,
    log: Path | None = None,
    name: str | None = None,
    members: int = 0,
    more: Sequence[str] = (),
) -> TrainingExecutor:
    slurm, ranks = config.slurm, config.mesh.ranks
    nodes = slurm.nodes(ranks)
    copy = _written(config)
    executor = TrainingExecutor(
        _folder(config), _faconv("train", copy, *more) + (_of_member(config) if members else "")
    )
    output = str(_log(config, log, members))
    options: dict[str, Any] = {
        "job_name": f"faconv-{name or config.run_dir.name}",
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "time": slurm.time_min,
        "nodes": nodes,
        "ntasks_per_node": ranks // nodes,
        "cpus_per_task": slurm.cpus_per_task,
        "gpus_per_node": slurm.gpus_per_node or None,
        "mem": slurm.mem,
        "signal_delay_s": max(1, round(config.training.usr_grace_s)),
        "wckey": None,
        "stderr_to_stdout": True,
        "srun_args": [f"--output={output}", "--open-mode=append", *_srun(config)],
        "setup": [
            "export SLURM_EXPORT_ENV=ALL",
            *slurm.setup,
            JOB.read_text(),
            "faconv_say_start",
            *([_preflight(config, copy)] if preflight else []),
        ],
        "teardown": ["faconv_end $?"],  # directly behind srun
        "additional_parameters": {
            "output": output,
            "requeue": True,
            "chdir": str(Path.cwd()),
            **({"array": f"0-{members - 1}"} if members else {}),
            **_other_options(config),
        },
    }
    executor.update_parameters(**options)
    return executor


def _of_member(config: RunConfig) -> str:
    """Options of a task of an array, for the shell to fill in; the first member trains as the run alone would."""
    directory = shlex.quote(f"run_dir={config.run_dir.absolute()}/{MEMBER}")
    seed = config.training.seed
    return f' --set {directory}"$SLURM_ARRAY_TASK_ID" --set training.seed="$(({seed} + SLURM_ARRAY_TASK_ID))"'


def _other_options(config: RunConfig) -> dict[str, str | int | bool]:
    """Of section slurm.sbatch: true is a flag, false leaves it out."""
    return {name: value for name, value in config.slurm.sbatch.items() if value is not False}


def _srun(config: RunConfig) -> tuple[str, ...]:
    return *SRUN, f"--cpus-per-task={config.slurm.cpus_per_task}"  # since Slurm 22.05 srun does not take it from sbatch


def _preflight(config: RunConfig, copy: Path) -> str:
    return f"faconv_preflight {shlex.join(['srun', *_srun(config)])} {_faconv('doctor', copy, '--quick')}"


def _faconv(*arguments: str | Path) -> str:
    return shlex.join([sys.executable, "-u", "-m", "faconv_hpc", *map(str, arguments)])


def _folder(config: RunConfig) -> Path:
    return (config.run_dir / "slurm").absolute()


def _log(config: RunConfig, log: Path | None, members: int = 0) -> Path:
    return log.absolute() if log is not None else _folder(config) / ("%A_%a.log" if members else "%j.log")


def _written(config: RunConfig) -> Path:
    """The resolved config beside the run: what the job trains does not change with the file it was made from."""
    if "%" in str(_folder(config)):
        raise InputError(
            f"run_dir {config.run_dir} holds a %, for which Slurm puts something else in the log's name. "
            f"Give another run_dir."
        )
    text = config.to_yaml()
    path = _folder(config) / f"config-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
    try:
        if not path.exists() or path.read_text(errors="replace") != text:  # a job that waits may read it
            write_durably(path, text)
    except OSError as error:
        raise cannot_write("run_dir", config.run_dir, error) from None
    return path
