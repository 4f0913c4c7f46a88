"""Jobs on the real Slurm daemons that `slurm` (conftest.py) has started on this machine."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import yaml

from faconv_hpc.launch.slurm import job_state
from faconv_hpc.training.records import read_records
from faconv_hpc.training.shards import checkpoints_in

ROOT = Path(__file__).parent.parent
MINUTES_S = 60
NODES = ["--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
SLOW = """
import importlib.util, sys, time

class Slow:
    def find_spec(self, name, path, target=None):
        if name != "{module}":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            *outer, last = "{name}".split(".")
            owner = getattr(module, outer[0]) if outer else module
            function = getattr(owner, last)

            def slow(*arguments):
                time.sleep({seconds})
                return function(*arguments)

            setattr(owner, last, slow)

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Slow())
"""


def job_environment(**variables):
    """What jobs inherit: `faconv` of this interpreter, one thread."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"OMP_NUM_THREADS": "1", "PATH": path} | variables


def slowed(directory, module, name, seconds):
    """Variables with which a function of ours waits first: what takes long, without keeping a core busy."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sitecustomize.py").write_text(SLOW.format(module=f"faconv_hpc.{module}", name=name, seconds=seconds))
    return {"PYTHONPATH": str(directory)}


def slow_steps(directory, seconds):
    """The same for every optimizer step."""
    return slowed(directory, "training.trainer", "Trainer._step", seconds)


def sbatch(directory, *arguments, options=(), preflight="no", **variables):
    """Gives slurm/train_global.sh to sbatch, site lines overridden; the job's number."""
    command = ["sbatch", "--parsable", *NODES, "--time=20", f"--output={directory}/job.log", *options]
    command += [str(ROOT / "slurm" / "train_global.sh"), *map(str, arguments)]
    environment = job_environment(PREFLIGHT=preflight, **variables)
    directory.mkdir(parents=True, exist_ok=True)
    sent = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return sent.stdout.strip().split(";")[0]


def wait_for(what, condition, timeout_s, log=None, every_s=1.0):
    """Waits until the condition holds; its value."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(every_s)
    printed = log.read_text()[-3000:] if log is not None and log.exists() else ""
    queue = subprocess.run(["squeue"], capture_output=True, text=True, check=False).stdout
    raise AssertionError(f"{what}: not within {timeout_s} s\n{queue}\n{printed}")


def over(job, log, timeout_s=5 * MINUTES_S):
    """The job's last state."""

    def ended():
        state = job_state(job)
        return state if state is not None and state.over else None

    return wait_for(f"job {job} ends", ended, timeout_s, log, every_s=3.0)


def step_of(run_dir):
    """The last step on record."""
    return max((record.step for record in read_records(run_dir)), default=0)


def saved_step(run_dir):
    """The newest checkpoint's."""
    return max((checkpoint.step for checkpoint in checkpoints_in(run_dir)), default=0)


def shorten(config, steps):
    """Changes the last step in a config file."""
    tree = yaml.safe_load(config.read_text())
    tree["training"]["steps"] = steps
    config.write_text(yaml.safe_dump(tree))


def left_behind(job):
    """Processes of a job's ranks that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                variables, command = (entry / "environ").read_bytes(), (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if f"SLURM_JOB_ID={job}\0".encode() in variables and b"faconv" in command:
                found.append((int(entry.name), command.replace(b"\0", b" ").decode()))
    return found


def ranks_of_job(job):
    """Process numbers of a job's ranks, in order."""
    found = {}
    for pid, command in left_behind(job):
        if "train" in command:
            variables = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
            rank = re.search(r"SLURM_PROCID=(\d+)", variables)
            if rank and "srun" not in command and "bash" not in command:
                found[int(rank[1])] = pid
    return [found[rank] for rank in sorted(found)]
