"""Studies without training: jobs that write the records of a run, and a cluster of such jobs.

Run as ``python studies.py drive STUDY STARTS [KILL_AT]`` it is the driver of a study, which may kill itself at its
n-th durable write; as ``python studies.py job CONFIG`` it is the job of a point.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import yaml

from faconv_hpc import files
from faconv_hpc.config_file import load_yaml
from faconv_hpc.scaling import driver, points, results
from faconv_hpc.scaling.study import StudyConfig, points_of
from faconv_hpc.training.records import StepRecord

STEP_S = 0.03  # of a job that only writes records


def record(step, seconds=0.5, **values):
    """A step's record."""
    given = {
        "step": step, "loss": 1.0, "forecast_loss": 1.0, "gradient_norm": 1.0, "learning_rate": 1e-3, "samples": 4,
        "seconds": seconds, "samples_per_s": 4 / seconds, "data_share": 0.01, "exchange_share": 0.1,
        "reduction_share": 0.05, "peak_memory_gib": 0.5,
    }  # fmt: skip
    return StepRecord(**given | values)


def write_records(run_dir, records):
    """As a run leaves them."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "steps.jsonl").write_text("".join(one.to_json() + "\n" for one in records))
    (run_dir / "versions.json").write_text(json.dumps({"torch": "2", "faconv_hpc": "0", "host": "node-a"}))


class NoStop:
    """No signal comes."""

    number = 0


class FakeCluster:
    """Jobs in this process: each does at once what ``acts[name]`` does, and lives for so many looks.

    An act gets the run and the log. A point without one finishes.
    """

    def __init__(self, acts=None, at_once=None, looks=2):
        self.acts, self.at_once, self.looks = acts or {}, at_once, looks
        self.submitted, self.left, self.most = [], {}, 0

    def submit(self, config, run, log):
        assert config.exists() and not run.run_dir.exists(), "a point begins from nothing"
        assert json.loads((config.parent / "job.json").read_text())["job"] is None
        name = config.parent.name
        self.submitted.append(name)
        self.acts.get(name, finish)(run, log)
        job = f"{name}-{len(self.submitted)}"
        self.left[job] = self.looks
        self.most = max(self.most, sum(left > 0 for left in self.left.values()))
        return job

    def alive(self, job):
        self.left[job] = self.left.get(job, 0) - 1
        return self.left[job] > 0


def finish(run, log):
    """All steps."""
    write_records(run.run_dir, [record(step) for step in range(1, run.training.steps + 1)])


def fail(run, log):
    """Two steps and a message."""
    write_records(run.run_dir, [record(step) for step in (1, 2)])
    log.write_text("step 2/6\nfaconv: failed: rank 0 was ended by SIGKILL\nsrun: error: gone\n")


class ProcessCluster:
    """Jobs that are processes of their own and outlive the driver; each start is a line of ``starts``."""

    at_once = 2

    def __init__(self, starts):
        self.starts = starts

    def submit(self, config, run, log):
        with self.starts.open("a") as file:
            file.write(config.parent.name + "\n")
        command = [sys.executable, __file__, "job", str(config)]
        with log.open("ab") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        return str(process.pid)

    def alive(self, job):
        with suppress(ChildProcessError):  # of another driver
            os.waitpid(int(job), os.WNOHANG)
        try:
            return b"studies.py" in Path(f"/proc/{job}/cmdline").read_bytes()
        except OSError:
            return False


def job(config):
    """Claims the run directory as a run does, and writes a step now and then; of a point named failing, only two."""
    tree = yaml.safe_load(config.read_text())
    run_dir, steps = Path(tree["run_dir"]), tree["training"]["steps"]
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit("faconv: error: run_dir is in use")
        with (run_dir / "steps.jsonl").open("w") as file:
            for step in range(1, steps + 1):
                time.sleep(STEP_S)
                if step == 3 and config.parent.name == "failing":
                    sys.exit("faconv: failed: on purpose")
                file.write(record(step).to_json() + "\n")
                file.flush()


def kill_at(count):
    """This process kills itself at its n-th durable write: before, or for odd numbers after it."""
    written = 0
    original = files.write_durably

    def counting(path, text):
        nonlocal written
        written += 1
        if written == count and count % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        original(path, text)
        if written == count:
            os.kill(os.getpid(), signal.SIGKILL)

    files.write_durably = points.write_durably = driver.write_durably = counting


def drive(study, starts, count=None):
    """Runs a study to its end; prints where its points stand."""
    if count:
        kill_at(count)
    config = load_yaml(StudyConfig, study)
    with points.locked(config.study_dir):
        found = points_of(config)
        record = partial(results.write_results, config, found)
        made = driver.StudyDriver(
            config, found, ProcessCluster(starts), "slurm", record=record, poll_s=0.02, settle_s=0.1
        ).run(NoStop())
    print(json.dumps({state.point.name: state.status for state in made}))


if __name__ == "__main__":
    if sys.argv[1] == "job":
        job(Path(sys.argv[2]))
    else:
        assert results.write_json_lines is points.write_json_lines is files.write_json_lines, "all are counted"
        drive(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else None)
