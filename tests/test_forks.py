"""What stands in for a new interpreter does what a new interpreter would do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import forks
from runs import make_store, write_config
from test_cli import ranks_of, start, wait_for_steps

TESTS = Path(__file__).parent
IMPORTS = "import atexit, os, random, signal, sys, threading, time\n"
SAYS = {
    "arguments": "print(sys.argv, sys.orig_argv, __name__, __package__, sys.modules['__main__'].__name__)",
    "directory": "print(os.getcwd(), sys.path)",
    "environment": "print(sorted(os.environ.items()))",
    "handlers": "print({one.name: str(signal.getsignal(one)) for one in signal.Signals})",
    "blocked": "print(signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.set_wakeup_fd(-1))",
    "threads": "print(threading.active_count(), threading.current_thread().name, len(os.listdir('/proc/self/task')))",
    "descriptors": "print(sorted(os.listdir('/proc/self/fd'))[:3], len(os.listdir('/proc/self/fd')))",
    "input": "print(sys.stdin.read(), input is not None)",
    "buffers": "print(*((s.line_buffering, s.encoding, s.errors) for s in (sys.stdout, sys.stderr, sys.stdin)))",
    "both": "print('printed'); print('told', file=sys.stderr); os.system('echo by a shell; echo told >&2')",
    "parent": "print(os.getppid(), os.getsid(0) == os.getsid(os.getppid()), os.getpgrp() == os.getpgid(os.getppid()))",
    "0": "sys.exit()",
    "3": "sys.exit(3)",
    "-1": "sys.exit(-1)",
    "a message": "print('printed'); sys.exit('a message')",
    "without farewell": "os._exit(9)",
    "ended by itself": "os.kill(os.getpid(), signal.SIGKILL)",
    "Ctrl-C": "signal.raise_signal(signal.SIGINT)",
    "Ctrl-C after printing": "atexit.register(print, 'last'); print('main'); signal.raise_signal(signal.SIGINT)",
    "Ctrl-C in the farewell": "atexit.register(lambda: signal.raise_signal(2)); print('main')",
    "a broken pipe": "r, w = os.pipe(); os.close(r); os.write(w, b'x')",
    "farewells": "atexit.register(print, 'last'); threading.Timer(0.2, print, ['a thread']).start(); print('main')",
    "a farewell of a mistake": "atexit.register(print, 'last'); sys.exit(2)",
}
DEFAULTS = {"OMP_NUM_THREADS": "1"}


def ran(popen, code, given="", **options):
    """Exit code, and the last line of what was told: frames above an error's are others."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    options = {"cwd": TESTS, "env": os.environ | DEFAULTS} | options
    with popen([sys.executable, "-m", "forks", IMPORTS + code], text=True, **pipes | options) as process:
        printed, told = process.communicate(given, timeout=60)
    return process.returncode, printed, told.count("Traceback"), told.splitlines()[-1:]


@pytest.mark.parametrize("code", SAYS.values(), ids=SAYS)
def test_a_fork_says_and_ends_as_a_process_does(code):
    assert ran(forks.Popen, code, "given") == ran(subprocess.Popen, code, "given")


def test_an_error_is_told_once():
    code, _, traces, (last,) = ran(forks.Popen, "1 / 0")
    assert (code, traces, last) == (1, 1, "ZeroDivisionError: division by zero")


def test_what_is_asked_for_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(TESTS)  # where nothing else is said
    variables = {"env": os.environ | DEFAULTS | {"NEW": "value"}, "cwd": None, "start_new_session": True}
    says = "print(os.environ['NEW'], os.environ.get('PYTEST_CURRENT_TEST'), os.getsid(0) == os.getpid(), os.getcwd())"
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        answers = [ran(popen, f"{says}; {SAYS['blocked']}", **variables) for popen in (forks.Popen, subprocess.Popen)]
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
    assert answers[0] == answers[1] and "value" in answers[0][1] and "SIGUSR2" in answers[0][1]
    with (tmp_path / "log").open("w") as log:  # one file for both, as a script's `> log 2>&1`
        command = [sys.executable, "-m", "forks", IMPORTS + SAYS["both"]]
        forks.Popen(command, env=os.environ | DEFAULTS, stdout=log, stderr=subprocess.STDOUT).wait(timeout=60)
    assert sorted((tmp_path / "log").read_text().split()) == sorted(["printed", "told", "by", "a", "shell", "told"])


def test_signals_waiting_and_killing():
    command = [sys.executable, "-m", "forks", "import time; print('here', flush=True); time.sleep(100)"]
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1):
        process = forks.Popen(command, cwd=TESTS, env=os.environ | DEFAULTS, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "here\n" and process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.05)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.wait() == process.poll() == -number
        assert not Path(f"/proc/{process.pid}").exists()  # nobody else has to bury it


@pytest.mark.parametrize(
    ("variables", "forked"),
    [
        ({}, True),
        ({"OMP_NUM_THREADS": "2"}, False),
        ({"PYTHONPATH": "/site"}, False),
        ({"LD_LIBRARY_PATH": "/x"}, False),
    ],
)
def test_what_means_something_to_a_new_interpreter_gets_one(variables, forked):
    code = "print('--' + 'serve' in open('/proc/self/cmdline').read())"
    _, printed, *_ = ran(forks.Popen, code, env=os.environ | DEFAULTS | variables)
    assert printed == f"{forked}\n"
    no_threads = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    assert ran(forks.Popen, code, env=no_threads)[1] == "False\n"


def test_ranks_are_their_launchers_children_and_sessions_of_their_own(tmp_path):
    config = write_config(tmp_path, make_store(tmp_path / "waves"), mesh={"lon": 2}, training={"steps": 100000})
    with start("train", config, "--ranks", 2) as process:
        try:
            wait_for_steps(tmp_path / "run", process)
            ranks = ranks_of(process)
            for pid in (process.pid, *ranks):
                assert b"--serve" in Path(f"/proc/{pid}/cmdline").read_bytes()
            for rank in ranks:
                parent = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
                assert parent == process.pid and os.getsid(rank) == rank
            os.kill(ranks[1], signal.SIGKILL)
            _, told = process.communicate(timeout=60)
            assert "rank 1 was ended by SIGKILL" in told
        finally:
            process.kill()


def test_the_server_has_done_nothing_and_said_nothing():
    ran(forks.Popen, "")
    forks.Popen.said.seek(0)
    assert forks.Popen.said.read() == b""
    code = "import torch; print(torch.cuda.is_initialized(), 'mpi4py.MPI' in sys.modules)\n"
    code += "import deepspeed; print(torch.distributed.is_initialized(), {'RANK', 'MASTER_ADDR'} & os.environ.keys())"
    variables = os.environ | DEFAULTS | {"DS_ACCELERATOR": "cpu"}
    assert ran(forks.Popen, code, env=variables) == ran(subprocess.Popen, code, env=variables)
    draws = ("random.random()", "numpy.random.rand()", "torch.rand(1)")
    for draw in draws:
        assert len({ran(forks.Popen, f"import numpy, torch; print({draw})")[1] for _ in range(3)}) == 3


def test_nothing_outlives_the_process_that_asked(tmp_path):
    command = [sys.executable, "-m", "forks", "import time; time.sleep(1000)"]
    code = f"import forks, os, time; child = forks.Popen({command}, env=os.environ)\n"
    code += "print(child.pid, open(f'/proc/self/task/{os.getpid()}/children').read(), flush=True); time.sleep(1000)"
    pipes = {"stdout": subprocess.PIPE, "text": True, "cwd": TESTS, "env": os.environ | DEFAULTS}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        child, *children = process.stdout.readline().split()
        process.kill()
    assert child in children and len(children) == 2
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{one}").exists() for one in children):
        assert time.monotonic() < deadline, "they live on"
        time.sleep(0.1)
