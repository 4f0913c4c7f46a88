"""The command line as a user meets it: whole processes, exit codes, one message."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

import forks
from faconv_hpc import load_config
from faconv_hpc.errors import EXIT_STOPPED
from faconv_hpc.launch import local
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.spatial.environment import RankEnvironment, free_port
from faconv_hpc.training.records import read_records
from faconv_hpc.training.shards import checkpoints_in
from runs import make_store, write_config
from sources import dataset, save

SECONDS = 300  # a busy machine is no failure
MPIEXEC = Path(sys.executable).with_name("mpiexec")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def faconv(*arguments, before=(sys.executable,), environment=None):
    """Runs ``faconv`` and returns the finished process."""
    command = [*before, "-m", "faconv_hpc", *map(str, arguments)]
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    return forks.run(command, timeout=SECONDS, env=variables)


def faconv_after(code, *arguments):
    """The same after some code that changes what ``faconv`` has imported; ranks that it starts are forked from it."""
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    return forks.run(command_after(code, *arguments), timeout=SECONDS, env=variables, cwd=Path(__file__).parent)


def command_after(code, *arguments):
    """For `forks.Popen` in this directory."""
    main = f"import sys\nfrom faconv_hpc.cli.app import main\nsys.argv[1:] = {[*map(str, arguments)]}\nmain()"
    return [sys.executable, "-m", "forks", f"{code}\n{main}"]


def messages(process):
    """What the user is told went wrong."""
    return [line for line in process.stderr.splitlines() if line.startswith("faconv: ")]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "waves")


def test_ranks_that_have_parted_end_without_a_farewell(tmp_path, store):
    """In which a thread of torch that lets go of the last collective, one time in thirty on a busy machine, aborted."""
    config = write_config(tmp_path, store, mesh={"lon": 2})
    ended = faconv_after("import atexit; atexit.register(print, 'farewell')", "train", config, "--ranks", 2)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines().count("farewell") == 1, "of the process that has started the ranks"


def test_train_on_two_ranks_then_evaluate_then_go_on(tmp_path, store):
    config = write_config(tmp_path, store, mesh={"lon": 2})
    trained = faconv("train", config, "--ranks", 2)
    assert trained.returncode == 0, trained.stderr
    assert "step 6/6" in trained.stderr and "samples/s" in trained.stderr
    assert re.search(
        r"run: steps 1 to 6 on a mesh of 1 x 1 x 2 \(replicas x lat x lon\), 1 of 10 windows in each\n"
        r"  \d+ channels in, 2 forecast, [\d,]+ parameters, at least [\d.e-]+ GiB a rank; records go to \S+jsonl\n",
        trained.stderr,
    )
    assert re.search(r"run: at step 6, forecast loss 0?1?\.\d+ .* Next: faconv evaluate \S+/run\n", trained.stderr)
    with contextlib.chdir(tmp_path):
        assert load_config(tmp_path / "run" / "config.yaml").data.store.is_absolute()
    evaluated = faconv("evaluate", tmp_path / "run", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert {skill["variable"] for skill in json.loads(evaluated.stdout)["skills"]} == {"wave_0", "wave_1"}
    assert (tmp_path / "run" / "evaluation" / "report.md").read_text().startswith("# Evaluation of run")
    unsaid = faconv("train", config, "--ranks", 2, "--set", "training.steps=8")
    assert unsaid.returncode == 2 and "--extend keep" in unsaid.stderr
    longer = faconv("train", config, "--ranks", 2, "--set", "training.steps=8", "--extend", "keep")
    assert longer.returncode == 0, longer.stderr
    assert [record.step for record in read_records(tmp_path / "run")] == list(range(1, 9))
    _look_at_its_checkpoints(tmp_path / "run")


def _look_at_its_checkpoints(run_dir):
    """As a user does: list, verify, export; damage one, and see it named."""
    listed = json.loads(faconv("checkpoint", "list", run_dir, "--json").stdout)
    assert [(row["step"], row["mesh"], row["problem"]) for row in listed] == [(6, "1x1x2", None), (8, "1x1x2", None)]
    verified = faconv("checkpoint", "verify", run_dir)
    assert verified.returncode == 0 and verified.stdout.count(": whole") == 2
    exported = faconv("checkpoint", "export", run_dir, "--output", run_dir / "model.pt", "--json")
    assert json.loads(exported.stdout)["step"] == 8 and (run_dir / "model.pt").is_file()
    newest = run_dir / "checkpoints" / "step-00000008"
    (newest / "shard-00001.safetensors").write_bytes(b"not what was written")
    damaged = faconv("checkpoint", "verify", newest)
    assert damaged.returncode == 1 and "shard-00001.safetensors is damaged" in damaged.stdout
    table = faconv("checkpoint", "list", run_dir)
    assert table.returncode == 0 and table.stdout.count("as written") == 2  # the manifests are
    nothing = faconv("checkpoint", "list", run_dir / "evaluation")
    assert nothing.returncode == 2 and "holds no checkpoints" in nothing.stderr


@pytest.mark.parametrize("start", ["torchrun", "mpiexec", "--ranks"])
def test_the_same_losses_however_the_ranks_are_started(tmp_path, store, start):
    if start == "mpiexec" and not MPIEXEC.exists():
        pytest.skip("no mpiexec beside Python: pip install mpich")
    before = {"torchrun": TORCHRUN, "mpiexec": [MPIEXEC, "-n", "2", sys.executable]}.get(start, (sys.executable,))
    config = write_config(tmp_path / start, store, mesh={"lon": 2})
    real = {"PYTHONPATH": str(tmp_path)}  # new interpreters, not forks
    started = faconv("train", config, *["--ranks", 2] * (start == "--ranks"), before=before, environment=real)
    assert started.returncode == 0, started.stderr
    plain = faconv("train", write_config(tmp_path / "plain", store))
    assert plain.returncode == 0, plain.stderr
    losses = [[record.loss for record in read_records(tmp_path / name / "run")] for name in (start, "plain")]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def damage_truncate(store):
    (part,) = store.glob("fields-*.nc")
    part.write_bytes(part.read_bytes()[:-1000])


def damage_nan(store):
    (part,) = store.glob("fields-*.nc")
    with h5py.File(part, "r+") as file:
        file["fields"][5, 1, 3, 12] = np.nan  # a cell of the eastern tile: only the last rank reads it


BAD_INPUTS = {
    "unknown key": (["--set", "training.stepps=3"], None, r"training\.stepps: unknown key\. Did you mean 'steps'"),
    "another number of ranks": (["--set", "mesh.lat=2"], None, r"needs 4 ranks"),
    "more tiles than rows": (["--set", "mesh={lat: 2}"], "tiny", r"1 rows cannot be cut over 2 ranks.*mesh\.lat"),
    "longitudes that do not close": (
        ["--set", "data.periods.test=[]"],
        "region",
        r"longitudes do not close: 16 columns from 0 to 30.*lon_boundary",
    ),
    "missing variable": (["--set", "data.variables=[wave_0, wav_1]"], None, r"wav_1.*wave_1"),
    "no store": (["--set", "data.store=nowhere"], None, r"nowhere.*faconv data prepare"),
    "truncated file": ([], damage_truncate, r"fields-00000\.nc.*"),
    "NaN on one rank": ([], damage_nan, r"rank 1\).*wave_1.*fields-00000\.nc"),
    "irregular time": (
        ["--set", "data.periods.test=[]"],
        "irregular",
        r"at most 3 follow each other without a gap .*to equal steps",
    ),
    "window too long": (
        ["--set", "data.window=13"],
        None,
        r"no window of 13 inputs.*fits into 13 of the 16 frames.*data\.window=12 or less",
    ),
    "a period without frames": (
        ["--set", "data.periods.test=2001/"],
        None,
        r"data\.periods\.test=2001/ holds no frame of .*run from 2000-01-01 00:00:00 to 2000-01-04 18:00:00",
    ),
    "a frame in two periods": (
        ["--set", "data.periods.train=2000-01-01/2000-01-04T11"],
        None,
        r"2000-01-04 06:00:00 is in data\.periods\.train and in data\.periods\.test.*share no date",
    ),
    "no range of dates": (["--set", "data.periods.test=1/2/2000"], None, r"a range of dates such as 1979/2015"),
    "no date": (["--set", "data.periods.test=2000-02-30/"], None, r"names 2000-02-30, which is no date of the"),
    "run_dir is a file": (
        ["--set", "run_dir=pyproject.toml"],
        None,
        r"run_dir pyproject\.toml cannot be written: File exists",
    ),
    "wrong boundary": ([], "odd", r"even number of columns"),
}


def store_for(kind, directory):
    """A store with the fault; some faults are damage, others are in what the store holds."""
    if kind == "tiny":
        return make_store(directory / "store", nlat=1)
    if kind == "region":
        columns = ("lon", np.arange(16) * 2.0, {"units": "degrees_east"})
        prepare([save(dataset(lon=columns), directory / "region.nc")], directory / "store")
        return directory / "store"
    if kind == "odd":
        return make_store(directory / "store", nlon=13)
    if kind == "irregular":
        hours = ("time", np.arange(9) * 6.0 + np.arange(9) // 3 * 2.0, {"units": "hours since 2001-01-01"})
        prepare([save(dataset(time=hours), directory / "irregular.nc")], directory / "store")
        return directory / "store"
    store = make_store(directory / "store")
    if kind is not None:
        kind(store)
    return store


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_ends_all_ranks_with_one_message_and_exit_code_2(tmp_path, case):
    options, fault, message = BAD_INPUTS[case]
    config = write_config(tmp_path, store_for(fault, tmp_path), mesh={"lon": 2}, training={"steps": 30})
    process = faconv("train", config, "--ranks", 2, *options)
    assert process.returncode == 2, process.stderr
    assert len(re.findall("faconv: ", process.stderr)) == 1 and "Traceback" not in process.stderr
    assert re.search(message, process.stderr, re.DOTALL)


def test_bad_input_under_torchrun_is_told_once(tmp_path):
    config = write_config(tmp_path, store_for(damage_nan, tmp_path), mesh={"lon": 2}, training={"steps": 30})
    process = faconv("train", config, before=TORCHRUN)
    assert process.returncode != 0
    assert len(messages(process)) == 1 and "rank 1" in messages(process)[0]


def test_an_exception_on_one_rank_ends_all_with_its_traceback(tmp_path, store):
    """A fault of ours, played by breaking the reading on rank 1 only."""
    broken = (
        "import os\n"
        "from faconv_hpc.data import samples\n"
        "read = samples.Windows.read\n"
        "def broken(self, indices, steps=None):\n"
        "    if os.environ['RANK'] == '1': raise RuntimeError('played fault')\n"
        "    return read(self, indices, steps)\n"
        "samples.Windows.read = broken\n"
    )
    config = write_config(tmp_path, store, mesh={"lon": 2})
    process = faconv_after(broken, "train", config, "--ranks", 2)
    assert process.returncode == 1
    assert process.stderr.count("Traceback") == 1
    assert messages(process) == ["faconv: failed (rank 1): RuntimeError: played fault"]


def start(*arguments):
    """``faconv train`` as a shell starts it, in a process group of its own."""
    command = [sys.executable, "-m", "faconv_hpc", *map(str, arguments)]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    return forks.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=variables)


def start_ranks(*commands):
    """A rank for each, as torchrun starts them; nobody watches over them."""
    ranks = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    variables = os.environ | ranks | {"OMP_NUM_THREADS": "1"}
    return [
        forks.Popen(
            [sys.executable, "-m", "faconv_hpc", *map(str, arguments)],
            env=variables | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, arguments in enumerate(commands)
    ]


def wait_for_steps(run_dir, process, steps=2):
    deadline = time.monotonic() + SECONDS
    while len(list(read_records(run_dir))) < steps:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.1)


def ranks_of(process):
    """Process numbers of the ranks, in order: that of their births."""
    return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job_and_is_named(tmp_path, store, victim):
    config = write_config(tmp_path, store, mesh={"lon": 2}, training={"steps": 100000})
    process = start("train", config, "--ranks", 2)
    wait_for_steps(tmp_path / "run", process)
    os.kill(ranks_of(process)[victim], signal.SIGKILL)
    began = time.monotonic()
    _, told = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode == EXIT_STOPPED  # nothing is wrong with the run
    assert f"faconv: failed: rank {victim} was ended by SIGKILL" in told


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_ends_all_ranks_and_loses_nothing(tmp_path, store, number, code):
    config = write_config(tmp_path, store, mesh={"lon": 2}, training={"steps": 100000})
    process = start("train", config, "--ranks", 2)
    wait_for_steps(tmp_path / "run", process)
    ranks = ranks_of(process)
    os.killpg(process.pid, number)  # as a terminal does
    _, told = process.communicate(timeout=30)
    assert process.returncode == code, told
    assert told.count("faconv: Ctrl-C: ends after the step under way") == (number == signal.SIGINT)
    assert told.count(f"stopped by {number.name} after step") == 1 and "Traceback" not in told
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    last = read_records(tmp_path / "run")[-1].step
    assert (tmp_path / "run" / "checkpoints" / f"step-{last:08d}").is_dir()


SLOW = """
import ctypes, time
from faconv_hpc.training.trainer import Trainer
step = Trainer._step
def slow(self, number):
    end = time.monotonic() + 60 * (number == 3)
    while time.monotonic() < end:
        {wait}
    return step(self, number)
Trainer._step = slow
"""
WAITS = {
    "in Python": "time.sleep(0.01)",
    "in a library that never returns": (
        "lock, lib = ctypes.create_string_buffer(64), ctypes.CDLL(None); "
        "[lib.pthread_mutex_lock(lock) for _ in range(2)]"
    ),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=list(WAITS))
def test_a_second_interrupt_ends_at_once_and_says_what_is_lost(tmp_path, store, wait):
    """Whether the rank computes in Python, or waits in a library that never comes back."""
    training = {"steps": 100, "checkpoint_every": 1}
    config = write_config(tmp_path, store, mesh={"lon": 2}, training=training)
    code = SLOW.format(wait=wait)
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    process = forks.Popen(
        command_after(code, "train", config, "--ranks", 2), env=variables, cwd=Path(__file__).parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    wait_for_steps(tmp_path / "run", process, 2)
    kept = tmp_path / "run" / "checkpoints" / "step-00000002"
    while not kept.exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(1.0)  # for all ranks to know of it, and to be in the step that does not end
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1.0)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - began < 12, told
    assert "Ctrl-C came twice; what was done since the checkpoint of step 2 is lost. The same command" in told
    assert ("interrupted (rank " in told) == ("ctypes" not in wait), told  # by itself, or by its last resort
    assert "Traceback" not in told
    again = faconv("train", config, "--ranks", 2, "--set", "training.steps=4")
    assert again.returncode == 0 and [record.step for record in read_records(tmp_path / "run")] == [1, 2, 3, 4]


HELD = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the interpreter's own first moments are not ours
print("python is there", flush=True)
from faconv_hpc.__main__ import main
main()
"""


@pytest.mark.parametrize("ranks", [(), ("--ranks", 2)], ids=["alone", "two ranks"])
@pytest.mark.parametrize("after_s", [0.0, 0.3, 1.0, 2.0])
def test_an_interrupt_while_it_starts_ends_it_without_a_traceback(tmp_path, store, after_s, ranks):
    config = write_config(tmp_path, store, mesh={"lon": max(len(ranks), 1)}, training={"steps": 100000})
    process = subprocess.Popen(
        [sys.executable, "-c", HELD, "train", str(config), *map(str, ranks)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "python is there\n"
    time.sleep(after_s)
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()  # and not train on beside all other tests
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in told, told
    assert after_s >= 1 or len(told.splitlines()) <= 2, told  # later it may train already


LOST = """
import os, signal, sys
import faconv_hpc.cli.train as train
from faconv_hpc.__main__ import main

class Lost:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)  # Python ignores what is raised in here, as in callbacks of its imports

def losing(*given, load=train.load_config):
    Lost()
    return load(*given)

train.load_config, sys.argv[1:] = losing, {arguments}
main()
"""


@pytest.mark.parametrize("ranks", [[], ["--ranks", "2"]], ids=["alone", "two ranks"])
def test_an_interrupt_that_python_loses_before_a_run_listens_is_followed(tmp_path, store, ranks):
    config = write_config(tmp_path, store, mesh={"lon": max(len(ranks), 1)}, training={"steps": 30})
    command = [sys.executable, "-m", "forks", LOST.format(arguments=["train", str(config), *ranks])]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    process = forks.run(command, timeout=SECONDS, env=variables, cwd=Path(__file__).parent)
    assert process.returncode == 130, process.stderr
    assert not (tmp_path / "run" / "steps.jsonl").exists() or not read_records(tmp_path / "run")


def test_two_jobs_do_not_share_a_run_directory(tmp_path, store):
    config = write_config(tmp_path, store, mesh={"lon": 2}, training={"steps": 100000})
    first = start("train", config, "--ranks", 2)
    wait_for_steps(tmp_path / "run", first)
    second = faconv("train", config, "--ranks", 2)
    assert second.returncode == 2
    assert re.search(r"run is in use by process \d+ on .*two jobs would mix their records", second.stderr)
    first.kill()
    first.communicate(timeout=60)  # its ranks, too, have closed what they print to


def test_ranks_end_with_the_process_that_started_them(tmp_path, store):
    config = write_config(tmp_path, store, mesh={"lon": 2}, training={"steps": 100000})
    process = start("train", config, "--ranks", 2)
    they_end_with(process, tmp_path / "run")


def test_a_rank_of_torchrun_ends_when_that_is_killed(tmp_path, store):
    config = write_config(tmp_path, store, training={"steps": 100000})
    variables = RankEnvironment(0, 1, 0, port=free_port()).variables() | {"TORCHELASTIC_RUN_ID": "none"}
    arguments = ["train", str(config)]
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-m', 'faconv_hpc', *{arguments}])"
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    options = {"env": environment, "cwd": Path(__file__).parent, "text": True, "stderr": subprocess.PIPE}
    they_end_with(forks.Popen([sys.executable, "-m", "forks", code], **options), tmp_path / "run")
    assert checkpoints_in(tmp_path / "run")


def they_end_with(process, run_dir):
    """The ranks finish their step, save it and leave."""
    wait_for_steps(run_dir, process)
    ranks = ranks_of(process)
    process.kill()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline, "ranks train on without the process that started them"
        time.sleep(0.1)
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("there", [0, 1, 2])
def test_a_signal_that_comes_while_ranks_are_started_reaches_all_of_them(monkeypatch, number, there):
    """Right after so many have been born, of which the last is not yet on the list of those who are told."""

    def sleeping(command, popen=subprocess.Popen, **options):
        born.append(popen(["sleep", "60"], **options))
        if len(born) == there:
            os.kill(os.getpid(), number)
        return born[-1]

    def port():
        if not there:
            os.kill(os.getpid(), number)
        return 1

    born = []
    monkeypatch.setattr(local.subprocess, "Popen", sleeping)
    monkeypatch.setattr(local, "free_port", port)
    # SIGINT stays held in a rank until its first line, which a sleep does not have
    monkeypatch.setattr(local, "end_with", lambda parent: signal.pthread_sigmask(signal.SIG_UNBLOCK, [number]))
    began = time.monotonic()
    assert local.run_local_ranks(["train"], 2) == (130 if number == signal.SIGINT else EXIT_STOPPED)
    assert time.monotonic() - began < 30 and [process.returncode for process in born] == [-number] * 2


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_who_is_born_after_its_parent_died_ends_as_well(seconds):
    """The kernel tells of a death only those who have asked for it before."""
    code = (
        "import os, signal, subprocess, sys, time\n"
        "from faconv_hpc.launch.local import end_with\n"
        "if os.fork() == 0:\n"
        "    parent = os.getpid()\n"
        "    if os.fork() == 0:\n"
        f"        time.sleep({0.5 - seconds})\n"
        "        end_with(parent)\n"
        "        time.sleep(60)\n"
        f"    time.sleep({seconds})\n"
        "    os._exit(0)\n"
        "os.wait()\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=30, check=True, capture_output=True)  # until its pipes close


def test_a_config_that_only_one_rank_lacks(tmp_path, store):
    """Found before the ranks join: those who wait for it are told and end."""
    config = write_config(tmp_path, store, mesh={"lon": 2})
    processes = start_ranks(["train", config], ["train", tmp_path / "nowhere.yaml"])
    told = "".join(process.communicate(timeout=60)[1] for process in processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert told.count("faconv: error") == 1 and "nowhere.yaml cannot be read" in told


def test_one_rank_has_nothing_to_verify(tmp_path, store):
    config = write_config(tmp_path, store)
    process = faconv("verify", config)
    assert process.returncode == 2 and "one rank has nothing to compare" in process.stderr
    shell = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}  # srun --pty bash
    started = faconv("verify", config, "--ranks", 2, environment=shell)
    assert started.returncode == 0 and "1x2" in started.stdout, started.stderr
    ranks = start_ranks(["verify", config, "--ranks", 3], ["verify", config, "--ranks", 3])
    told = "".join(rank.communicate(timeout=60)[1] for rank in ranks)
    assert told.count("faconv: error") == 1 and "--ranks is 3, but this is one of 2 ranks" in told


@pytest.mark.parametrize("ranks", [2, 4])
def test_verify_passes_and_says_so(tmp_path, store, ranks):
    process = faconv("verify", write_config(tmp_path, store), "--ranks", ranks)
    assert process.returncode == 0, process.stderr
    assert "PASS" in process.stdout and "input gradient" in process.stdout and f"1x{ranks}" in process.stdout


def test_verify_starts_the_ranks_that_each_layout_needs(tmp_path, store):
    process = faconv("verify", write_config(tmp_path, store), "--layout", "2x1x1", "--layout", "3x1", "--json")
    assert process.returncode == 0, process.stderr
    answer = json.loads(process.stdout)
    assert answer["passed"] and {row["layout"] for row in answer["rows"]} == {"2x1x1", "3x1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layout", "1x2", "--layout", "12x1"], r"11 rows cannot be cut over 12 ranks along lat"),
        (["--layout", "1x1"], r"one rank has nothing to compare.*--layout 1x2"),
        (["--layout", "2x"], r"a layout is LATxLON or REPLICASxLATxLON, got '2x'"),
        (["--layout", "1x2", "--ranks", 3], r"the layout 1x2 needs 2 ranks, there are 3"),
    ],
)
def test_layouts_that_verify_refuses_before_anything_is_started(tmp_path, store, options, message):
    process = faconv("verify", write_config(tmp_path, store), *options)
    assert process.returncode == 2 and not process.stdout
    (told,) = messages(process)
    assert re.search(message, told)


def test_verify_fails_when_the_exchange_is_broken(tmp_path, store):
    """West and east swapped: what two ranks on a periodic axis get when messages pair by the wrong order."""
    broken = (
        "from faconv_hpc.spatial import exchange\n"
        "fill = exchange.HaloExchange.fill_received\n"
        "def broken(self, padded, received):\n"
        "    return fill(self, padded, {peer: buffer.flip(0) for peer, buffer in received.items()})\n"
        "exchange.HaloExchange.fill_received = broken\n"
    )
    process = faconv_after(broken, "verify", write_config(tmp_path, store), "--ranks", 2, "--json")
    assert process.returncode == 1, process.stderr
    answer = json.loads(process.stdout)
    assert not answer["passed"] and not all(row["passed"] for row in answer["rows"])


def test_evaluate_without_a_checkpoint(tmp_path, store):
    config = write_config(tmp_path, store)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config.read_text())
    process = faconv("evaluate", tmp_path / "run")
    assert process.returncode == 2 and "holds no checkpoints" in process.stderr
    (tmp_path / "run" / "checkpoints" / "step-00000003").mkdir(parents=True)
    process = faconv("evaluate", tmp_path / "run")
    assert process.returncode == 2 and "`faconv checkpoint verify" in process.stderr


@pytest.mark.parametrize(
    "verb",
    [
        [], ["train"], ["verify"], ["evaluate"], ["data"], ["data", "prepare"], ["data", "inspect"], ["checkpoint"],
        ["checkpoint", "list"], ["checkpoint", "verify"], ["checkpoint", "export"],
    ],
)  # fmt: skip
def test_every_verb_has_help(verb):
    process = faconv(*verb, "--help")
    assert process.returncode == 0
    assert verb in ([], ["data"], ["checkpoint"]) or "Example" in process.stdout
    assert "bool" not in process.stdout  # a flag takes no value
