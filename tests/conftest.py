"""Shared by all tests."""

import gc
import os
import shutil
import signal
import subprocess
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read where libraries load: threads of small arrays wait for each other

import pytest
import torch

import forks
import ranks
from balance import (  # noqa: F401
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_xdist_make_scheduler,
)

torch.set_num_threads(1)
forks.collect_garbage_seldom()
MINI_SLURM = Path(__file__).parent.parent / "tools" / "mini_slurm.sh"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def pytest_collection_finish():
    gc.freeze()  # the tests, and all that they import


@pytest.fixture(scope="session", autouse=True)
def _pools_end_with_the_session():
    yield
    ranks.close_pools()


@pytest.fixture(scope="session", autouse=True)
def _quick_tests_start_no_processes(request):
    """With --quick a test that would start ranks or `faconv` ends there, as skipped."""
    if request.config.getoption("--quick"):

        def refuse(*arguments, **options):
            pytest.skip("starts processes, which --quick leaves out")

        ranks.RankPool.__init__ = forks.Popen.__init__ = refuse


def _signals():
    return {number: signal.getsignal(number) for number in SIGNALS}, signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.fixture(scope="session", autouse=True)
def _signals_are_followed():
    """Whoever starts pytest may ignore or block some; its children inherit that, and a shell cannot undo it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _no_test_changes_what_signals_do(_signals_are_followed):
    handlers, blocked = _signals()
    yield
    after = _signals()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    assert after == (handlers, blocked), "the test, or code that it calls, leaves signals ignored, blocked or handled"


@pytest.fixture(autouse=True)
def _no_test_makes_a_rank_of_the_next():
    """Meeting writes these for torch and DeepSpeed; processes that later tests start would take them for their own."""
    yield
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _files_of_a_test_are_closed():
    """Also those that the traceback of an expected error holds: HDF5 opens no file twice in two ways."""
    yield
    gc.collect(1)


@pytest.fixture(scope="session")
def share(request):
    """``share(values, number, parts)``: every part-th value from ``number`` on, or with --all every one.

    What is expensive is not tried in all combinations at each change: every value meets every other one over all
    tests, but not all at once. The test says by what it numbers its combinations.
    """
    whole = request.config.getoption("--all")

    def of(values, number, parts):
        values = list(values)
        return values if whole else values[number % min(parts, len(values)) :: parts]

    return of


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """Four nodes of real daemons; ``SLURM_CONF`` for those who talk to them. CI installs them, and fails without."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "srun") if shutil.which(name) is None]
    if (missing or os.geteuid() != 0) and not os.environ.get("CI"):
        pytest.skip(
            f"needs root and Slurm's daemons (missing: {missing}): apt-get install slurmctld slurmd slurm-client munge"
        )
    directory = str(tmp_path_factory.mktemp("slurm") / "mini")
    worker = 1 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])  # 0 is a user's own
    number = os.environ.get("MINI_SLURM_NUMBER", str(worker))
    environment = os.environ | {"MINI_SLURM_DIR": directory, "MINI_SLURM_NUMBER": number}
    subprocess.run(["bash", MINI_SLURM, "start", "4"], env=environment, check=True, timeout=120)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = f"{directory}/slurm.conf"
    yield {"SLURM_CONF": f"{directory}/slurm.conf"}
    subprocess.run(["bash", MINI_SLURM, "stop"], env=environment, check=True, timeout=60)
    os.environ.pop("SLURM_CONF")
    if before is not None:
        os.environ["SLURM_CONF"] = before
