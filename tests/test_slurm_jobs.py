"""sbatch, submitit and requeue on real daemons: users walk away and find a finished run."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
from functools import partial
from pathlib import Path

import pytest

from faconv_hpc.launch.slurm import job_state
from faconv_hpc.training.records import read_records
from faconv_hpc.training.shards import checkpoints_in
from runs import make_store, write_config
from slurms import (
    MINUTES_S,
    ROOT,
    job_environment,
    left_behind,
    over,
    ranks_of_job,
    saved_step,
    sbatch,
    shorten,
    slow_steps,
    step_of,
    wait_for,
)
from test_checkpoint import assert_same_state
from test_cli import faconv, messages

LONG = {"steps": 100_000, "final_learning_rate_share": 1.0, "checkpoint_every": 10, "keep_last": 1000}
INTERVAL = LONG["checkpoint_every"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "waves")


ONE_TILE, TWO_TILES, FOUR_TILES = {}, {"lon": 2}, {"lat": 2, "lon": 2}
TWO_NODES = ["--nodes=2"]


def config_of(directory, store, training=None, slurm=None, mesh=FOUR_TILES):
    sections = {"mesh": mesh, "training": training or {}, "slurm": slurm or {}}
    return write_config(directory, store, **sections)


def losses_of(run_dir):
    return [(record.step, record.loss) for record in read_records(run_dir)]


def assert_as_undisturbed(directory, store, run_dir, steps, mesh):
    """The run's records and final weights are, to the last bit, those of a run that nobody disturbed."""
    config = config_of(directory, store, LONG | {"steps": steps}, mesh=mesh)
    process = faconv("train", config, "--ranks", math.prod(mesh.values()))
    assert process.returncode == 0, process.stderr
    assert losses_of(run_dir) == losses_of(directory / "run")
    newest, expected = (checkpoints_in(one)[-1] for one in (run_dir, directory / "run"))
    assert newest.step == expected.step == steps
    assert_same_state(newest, expected)


def test_the_script_trains_on_four_nodes_as_one_machine_does(tmp_path, slurm, store):
    config = config_of(tmp_path / "slurm", store)
    asked = tmp_path / "asked"
    (tmp_path / "bin").mkdir()
    ours = tmp_path / "bin" / "scontrol"
    ours.write_text(
        f'#!/bin/sh\necho "${{SLURM_STEP_ID-script}} $1 $2" >> {asked}\nexec {shutil.which("scontrol")} "$@"\n'
    )
    ours.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{job_environment()['PATH']}"
    job = sbatch(tmp_path / "slurm", config, "--set", "training.steps=8", PATH=path)
    log = tmp_path / "slurm" / "job.log"
    state = over(job, log)
    assert (state.name, state.restarts) == ("COMPLETED", 0), log.read_text()
    assert "start 1, on n[1-4]" in log.read_text() and "step 8/8" in log.read_text()
    assert "script show node" in asked.read_text()  # once a job, where there may be thousands of ranks
    assert {line.split()[0] for line in asked.read_text().splitlines()} == {"script"}
    other = config_of(tmp_path / "here", store)
    process = faconv("train", other, "--set", "training.steps=8", "--ranks", 4)
    assert process.returncode == 0, process.stderr
    assert len(losses_of(tmp_path / "slurm" / "run")) == 8
    assert losses_of(tmp_path / "slurm" / "run") == losses_of(tmp_path / "here" / "run")


def test_time_limits_are_survived_more_often_than_submitit_would(tmp_path, slurm, store):
    """Both ways of starting, side by side: each meets its limit at least four times; submitit gives up after three.

    Slurm looks at limits twice a minute and may signal half a minute early: 35 to 65 s after a start.
    """
    training = LONG | {"usr_grace_s": 55, "give_up_after": 0}
    slow = slow_steps(tmp_path / "site", 1.0)
    by_sbatch = config_of(tmp_path / "sbatch", store, training, mesh=TWO_TILES)
    log = tmp_path / "sbatch" / "job.log"
    limit = ["--time=2", "--signal=USR1@55"]
    jobs = {sbatch(tmp_path / "sbatch", by_sbatch, options=TWO_NODES + limit, **slow): (by_sbatch, TWO_TILES)}
    by_submit = config_of(tmp_path / "submit", store, training, {"time_min": 2, "tasks_per_node": 1}, ONE_TILE)
    sent = faconv("submit", by_submit, "--no-preflight", "--json", environment=job_environment(**slow))
    assert sent.returncode == 0, sent.stderr
    (copy,) = (tmp_path / "submit" / "run" / "slurm").glob("config-*.yaml")
    jobs[re.search(r'"job": "(\d+)"', sent.stdout)[1]] = copy, ONE_TILE
    for job, (config, _) in jobs.items():
        often = partial(_requeued, job, 4)
        wait_for(f"job {job} is requeued 4 times", often, 15 * MINUTES_S, log, every_s=5.0)
        run_dir = Path(config.parent.parent if config is copy else config.parent / "run")
        shorten(config, step_of(run_dir) + 5)  # a busy machine does not get far in a minute
    for job, (config, mesh) in jobs.items():
        state = over(job, log, 10 * MINUTES_S)
        run_dir = Path(config.parent.parent if config is copy else config.parent / "run")
        assert state.name == "COMPLETED" and state.restarts >= 4
        assert_as_undisturbed(tmp_path / f"undisturbed-{job}", store, run_dir, step_of(run_dir), mesh)


def _requeued(job, times):
    return job_state(job).restarts >= times


def test_requeue_a_killed_rank_and_a_lost_node_lose_nothing(tmp_path, slurm, store):
    config = config_of(tmp_path, store, LONG, mesh=TWO_TILES)
    run_dir, log = tmp_path / "run", tmp_path / "job.log"
    job = sbatch(tmp_path, config, options=TWO_NODES, **slow_steps(tmp_path / "site", 0.1))
    nodes = []
    faults = [lambda: subprocess.run(["scontrol", "requeue", job], check=True), lambda: _kill_a_rank(job)]
    faults.append(lambda: nodes.append(_lose_a_node(job, slurm)))
    for number, fault in enumerate(faults):
        before = step_of(run_dir)
        wait_for("progress", lambda before=before: step_of(run_dir) >= before + 2 * INTERVAL, 3 * MINUTES_S, log)
        ranks = ranks_of_job(job)
        assert len(ranks) == 2
        fault()
        reached = step_of(run_dir)
        wait_for("the ranks end", lambda ranks=ranks: not any(map(_lives, ranks)), MINUTES_S, log)
        wait_for("it is requeued", lambda number=number: job_state(job).restarts == number + 1, MINUTES_S, log)
        assert saved_step(run_dir) >= reached - INTERVAL
    assert "DOWN" in subprocess.run(["scontrol", "show", "node", nodes[0]], capture_output=True, text=True).stdout
    _start_node(nodes[0], slurm)
    steps = step_of(run_dir) + 2 * INTERVAL
    shorten(config, steps)
    wait_for("progress", lambda: step_of(run_dir) >= steps, 3 * MINUTES_S, log)
    assert over(job, log).name == "COMPLETED"
    assert not left_behind(job)
    assert_as_undisturbed(tmp_path / "undisturbed", store, run_dir, steps, TWO_TILES)


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _kill_a_rank(job):
    os.kill(ranks_of_job(job)[1], signal.SIGKILL)


def _lose_a_node(job, slurm):
    """A node goes dark: its daemon, the one that watches its part of the step, and its rank."""
    directory = Path(slurm["SLURM_CONF"]).parent
    rank = ranks_of_job(job)[1]
    node = re.search(r"\0SLURMD_NODENAME=(\w+)", Path(f"/proc/{rank}/environ").read_text())[1]
    daemon = int((directory / f"{node}.pid").read_text())
    watcher = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
    for pid in (daemon, watcher, rank):
        os.kill(pid, signal.SIGKILL)
    return node


def _start_node(node, slurm):
    subprocess.run(["slurmd", "-f", slurm["SLURM_CONF"], "-N", node], check=True, timeout=60)


@pytest.mark.parametrize("preflight", ["yes", "no"])
def test_a_config_error_is_one_message_and_never_requeued(tmp_path, slurm, store, preflight):
    config = config_of(tmp_path, store, mesh=TWO_TILES)
    job = sbatch(tmp_path, config, "--set", "training.stepz=8", options=TWO_NODES, preflight=preflight)
    log = tmp_path / "job.log"
    state = over(job, log)
    assert (state.name, state.exit_code, state.restarts) == ("FAILED", 2, 0), log.read_text()
    assert log.read_text().count("faconv: error") == 1 and "Did you mean 'steps'" in log.read_text()


def test_submit_names_what_is_wrong_before_there_is_a_job(tmp_path, slurm, store):
    config = config_of(tmp_path, store, slurm={"tasks_per_node": 3})
    process = faconv("submit", config, environment=job_environment())
    assert process.returncode == 2
    assert "4 ranks do not fill nodes of 3 evenly (slurm.tasks_per_node=3)" in messages(process)[0]
    settings = ["--set", "slurm.tasks_per_node=1", "--set", "slurm.partition=nowhere"]
    process = faconv("submit", config, *settings, environment=job_environment())
    assert process.returncode == 2 and len(messages(process)) == 1
    assert "sbatch refused the job" in process.stderr and "invalid partition" in process.stderr


def test_the_dry_run_is_what_sbatch_gets(tmp_path, slurm, store):
    config = config_of(tmp_path, store, slurm={"tasks_per_node": 1}, mesh=TWO_TILES)
    printed = faconv("submit", config, "--dry-run", environment=job_environment())
    assert printed.returncode == 0, printed.stderr
    (tmp_path / "dry.sh").write_text(printed.stdout)
    options = ["--parsable", f"--output={tmp_path}/job.log"]
    command = ["sbatch", *options, str(tmp_path / "dry.sh")]
    by_hand = subprocess.run(command, env=job_environment(), capture_output=True, text=True, check=True, cwd=tmp_path)
    assert over(by_hand.stdout.strip(), tmp_path / "job.log").name == "COMPLETED"
    assert len(losses_of(tmp_path / "run")) == 6
    waited = faconv(
        "submit", config, "--wait", "--set", "training.steps=8", "--extend", "keep", environment=job_environment()
    )
    assert waited.returncode == 0, waited.stdout + waited.stderr
    assert "step 8/8" in waited.stdout and "completed" in waited.stderr
    script = Path(re.search(r"script (\S+),", waited.stdout)[1]).read_text()
    lines, others = ({*text.strip().splitlines()} for text in (script, printed.stdout))
    assert all("config-" in line for line in lines ^ others) and len(lines ^ others) == 4  # the config's copy, twice
    versions = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert versions["hosts"] == [socket.gethostname()] and versions["device"] == "cpu" and len(versions["commit"]) > 10


def test_doctor_gets_the_settings_of_the_script_and_not_its_other_options(tmp_path):
    (tmp_path / "srun").write_text('#!/bin/bash\necho "${@:3}"\n')
    (tmp_path / "srun").chmod(0o755)
    options = ["my.yaml", "--strict", "--set", "a.b=1 2", "--set=c.d=--set"]
    variables = job_environment(SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(tmp_path))
    variables["PATH"] = f"{tmp_path}:{variables['PATH']}"
    script = str(ROOT / "slurm" / "train_global.sh")
    ran = subprocess.run(["bash", script, *options], env=variables, capture_output=True, text=True, check=True)
    _, doctor, train = ran.stdout.splitlines()
    assert doctor == "faconv doctor my.yaml --set a.b=1 2 --set=c.d=--set --quick"
    assert train == "faconv train my.yaml --strict --set a.b=1 2 --set=c.d=--set"


def test_a_job_that_is_cancelled_does_not_come_back(tmp_path, slurm, store):
    config = config_of(tmp_path, store, LONG, mesh=TWO_TILES)
    job = sbatch(tmp_path, config, options=TWO_NODES, **slow_steps(tmp_path / "site", 0.1))
    wait_for("steps", lambda: step_of(tmp_path / "run") > 3, 3 * MINUTES_S, tmp_path / "job.log")
    subprocess.run(["scancel", job], check=True)
    state = over(job, tmp_path / "job.log", MINUTES_S)
    assert (state.name, state.restarts) == ("CANCELLED", 0)
    wait_for("its ranks end", lambda: not left_behind(job), MINUTES_S)
    assert saved_step(tmp_path / "run") == step_of(tmp_path / "run") > 3
