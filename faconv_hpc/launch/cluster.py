"""Where the points of a study run: as jobs of their own on Slurm, or one after the other on this machine."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from ..config import RunConfig
from .local import end_with
from .slurm import check_client, is_alive
from .submit import submit


class SlurmCluster:
    """Jobs of Slurm, through submitit. Raises InputError if it does not answer."""

    at_once: int | None = None

    def __init__(self) -> None:
        check_client()

    def submit(self, config: Path, run: RunConfig, log: Path) -> str:
        """Starts `faconv train` as a job; what it prints goes to ``log``; the job's number."""
        study, _, point = config.parent.parts[-3:]
        return submit(run, preflight=False, log=log, name=f"{study}-{point}").job

    def alive(self, job: str) -> bool:
        """Whether the job waits or runs. Raises SilentClusterError where Slurm does not say."""
        return is_alive(job)


class LocalCluster:
    """Ranks of this machine; they end with the process that started them."""

    at_once: int | None = 1

    def __init__(self) -> None:
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    def submit(self, config: Path, run: RunConfig, log: Path) -> str:
        """Starts `faconv train CONFIG` on as many ranks as its mesh has; what it prints goes to ``log``; its id."""
        command = [sys.executable, "-m", "faconv_hpc", "train", str(config), "--ranks", str(run.mesh.ranks)]
        with log.open("ab") as file:
            ends_with_us = partial(end_with, os.getpid())
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, preexec_fn=ends_with_us)
        job = f"{process.pid} {_born(process.pid)}"
        self._started[job] = process
        return job

    def alive(self, job: str) -> bool:
        """Whether the ranks run; those of an earlier process have ended with it, or are about to."""
        if job in self._started:
            return self._started[job].poll() is None
        pid, _, born = job.partition(" ")
        return bool(born) and _born(int(pid)) == born


def _born(pid: int) -> str:
    """When a process began, in the kernel's ticks: its number may be given again. Empty if it is not there, or dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    state, began = fields[0], fields[19]  # fields 3 and 22 of proc(5)
    return "" if state in "ZX" else began
