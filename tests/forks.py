"""``python -m faconv_hpc`` without its imports, which cost every process and every rank three seconds of a core.

`Popen` is `subprocess.Popen`, but a command that is exactly ``[sys.executable, "-m", "faconv_hpc", ...]`` becomes a
fork of a server, one for each pytest process, that has imported what ``faconv`` imports and asked for its version. The
fork gets the environment, directory and descriptors asked for, default signals and a clean exit, and is the caller's
child as any other: its number, exit code and signals are the real ones. What it starts by that command (ranks) is
forked from itself. All other commands are real processes, and so are those whose environment means something to an
interpreter that starts or to libraries that load (`AT_IMPORT`: a sitecustomize, another number of threads).

The workers of `ranks.RankPool` are forks as well.

What a fork does not show: what the imports print, their time, and an order of sets that differs between ranks
(they share one seed of hashes). The tests of torchrun, mpiexec, srun and sbatch start real processes.
See test_forks.py, which runs any code in this way: ``python -m forks CODE``.
"""

import atexit
import ctypes
import fcntl
import functools
import gc
import importlib
import inspect
import os
import pickle
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path

MODULES = ("faconv_hpc", "forks", "ranks")
ALSO = (  # imported by functions, late; or by tests, of which ranks are asked to do parts
    "torch", "torch._dynamo", "deepspeed", "matplotlib.pyplot", "xarray", "zarr", "h5netcdf", "pytest", "hypothesis",
    "cloudpickle", "deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.zero.muon.muon_optimizer",
)  # fmt: skip
AT_IMPORT = ("PYTHON", "LD_", "OMP_", "MKL_", "OPENBLAS_", "TORCH_", "DS_", "MPL", "HDF5_", "LANG", "LC_", "TZ")
OF_SERVER = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}  # with more threads than one, no fork is safe
ENVIRONMENT = os.environ | OF_SERVER
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
PLAIN = {"pass_fds": (), "shell": False, "gid": None, "gids": None, "uid": None, "umask": -1, "process_group": -1}
HUGE, MADV_COLLAPSE = 2**21, 25  # linux/mman.h
ALL = signal.valid_signals()
ANSWER_S = 300.0  # of the server, on a busy machine


def run(command, *, timeout, **options):
    """`subprocess.run` with captured text."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with Popen(command, **pipes | options) as process:
        try:
            printed, told = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, printed, told)


class _Forking(subprocess.Popen):
    """Forks where it can."""

    def _execute_child(self, *given):
        asked = inspect.signature(super()._execute_child).bind(*given).arguments
        environment = dict(os.environ if asked["env"] is None else asked["env"])
        if not _is_ours(asked, environment):
            super()._execute_child(*given)
            return
        pipes = [asked[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        descriptors = [number if pipe == -1 else pipe for number, pipe in enumerate(pipes)]
        names = ("args", "start_new_session", "preexec_fn")
        request = {name: asked[name] for name in names} | {"env": environment, "cwd": asked["cwd"] or Path.cwd()}
        self.pid = self._fork(request, descriptors)
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(asked[name] for name in ends))


def _is_ours(asked, environment):
    """Whether a fork does the same as a new interpreter."""
    at_import = {name for name in environment.keys() | ENVIRONMENT.keys() if name.startswith(AT_IMPORT)}
    return (
        len(asked["args"]) > 2
        and list(asked["args"])[:2] == [sys.executable, "-m"]
        and asked["args"][2] in MODULES
        and asked["executable"] in (None, sys.executable)
        and all(asked.get(name, value) == value for name, value in PLAIN.items())
        and all((OF_SERVER | environment).get(name) == ENVIRONMENT.get(name) for name in at_import)
        and environment.get("OMP_NUM_THREADS") == "1"
        and not _has_gpu()
    )


@functools.cache
def _has_gpu():
    """A driver that one process has initialized is lost to its forks."""
    import torch

    return torch.cuda.is_available()


class Popen(_Forking):
    """For tests: asks the server, which is started by the first who does."""

    said, _line, _lock = None, None, threading.Lock()

    def _fork(self, request, descriptors):
        assert request["preexec_fn"] is None, "cannot be sent"
        with Popen._lock:
            if Popen._line is None:
                Popen._line = _server()
            request["blocked"] = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            line, prctl = Popen._line, ctypes.CDLL(None).prctl
            prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # for a moment: orphans of a test's processes are not ours
            try:
                socket.send_fds(line, [pickle.dumps(request)], descriptors)
                pid = int(line.recv(100) or b"-1")
                assert line.recv(100) == b"adopted", "the fork server has ended"
            except BaseException:  # it has ended, or says nothing: the next who asks starts another
                Popen._line = None
                line.close()
                raise
            finally:
                prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
            return pid


class _ForkingItself(_Forking):
    """Inside a forked ``faconv``: what it starts is its own child."""

    def _fork(self, request, descriptors):
        request["blocked"] = signal.pthread_sigmask(signal.SIG_BLOCK, ALL)  # until its handlers are not its parent's
        try:
            pid = os.fork()
            if pid == 0:
                _become(request, descriptors)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
        return pid


def _server():
    """The line to a new server; it ends when the line does."""
    import faconv_hpc

    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    Popen.said = said = tempfile.TemporaryFile()  # noqa: SIM115
    files = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": said, "pass_fds": [there.fileno()]}
    tree = Path(faconv_hpc.__file__).parents[1]  # which a fork's interpreter would find in its directory
    command = [sys.executable, __file__, "--serve", str(there.fileno()), str(tree)]
    subprocess.Popen(command, env=ENVIRONMENT, **files)
    there.close()
    here.settimeout(ANSWER_S)
    answer = here.recv(1000).decode()
    if not answer.startswith("ready "):
        said.seek(0)
        raise RuntimeError(f"the fork server did not start:\n{said.read().decode()}")
    assert answer == f"ready {faconv_hpc.__file__}", f"forks would test another tree: {answer}"
    return here


def _serve(line, tree):
    sys.path.insert(0, tree)
    import faconv_hpc

    for name in (*ALSO, *(module.name for module in pkgutil.walk_packages(faconv_hpc.__path__, "faconv_hpc."))):
        if not name.endswith(("__main__", ".blocks", ".fused")):  # a program; what only GPUs use, and needs Triton
            importlib.import_module(name)
    sys.path.remove(tree)
    sys.modules["faconv_hpc.versions"].versions()  # which every run writes down: two calls of git, metadata of packages
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a thread would be missing from the forks"
    collect_garbage_seldom()
    gc.collect()
    gc.freeze()  # so that a collection does not copy what is shared
    for library in weakref.finalize._registry:  # torch: the farewell to its operators copies 38 MB in every fork
        library.atexit = False
    _in_huge_pages()
    line.send(f"ready {faconv_hpc.__file__}".encode())
    while True:
        message, descriptors, *_ = socket.recv_fds(line, 2**20, 3)
        if not message:
            os._exit(0)  # nothing to say farewell to
        between = os.fork()
        if between == 0:
            _fork_twice(line, pickle.loads(message), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        os.waitpid(between, 0)  # by now its child is that of the process that asked
        line.send(b"adopted")


def collect_garbage_seldom():
    """As often as 50,000 objects have come, not 700: a sixth of the time of all tests."""
    gc.set_threshold(50_000, 10, 10)


def _in_huge_pages():
    """All that lies in memory, where the kernel may: a fork has fewer pages to list."""
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        ends, access, _, _, inode, *_ = line.split()
        if access == "rw-p" and inode == "0":
            first, last = (int(end, 16) for end in ends.split("-"))
            first = -(-first // HUGE) * HUGE
            for at in range(first, last - HUGE + 1, HUGE):
                libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(HUGE), MADV_COLLAPSE)


def _fork_twice(line, request, descriptors):
    """An orphan is given to the nearest ancestor that collects them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ALL)
    between = os.getpid()
    if pid := os.fork():
        line.send(str(pid).encode())
        os._exit(0)
    while os.getppid() == between:
        time.sleep(0.001)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no test outlives pytest
    _become(request, descriptors)


def _become(request, descriptors):
    """This fork does what a new interpreter would do with the request, and ends, whatever interrupts its farewell."""
    code, interrupted = 1, False
    try:
        try:
            _forget(request, descriptors)
            runpy.run_module(request["args"][2], run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if not isinstance(end.code, int | None):
                print(end.code, file=sys.stderr)
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
            interrupted = isinstance(error, KeyboardInterrupt)
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        if interrupted:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(code & 0xFF)


def _forget(request, descriptors):
    """All that this process has from its parent and a new interpreter would not."""
    if request["start_new_session"]:
        os.setsid()
    wanted = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in descriptors]
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        os.dup2(nowhere, number)
        stream.flush()  # what the parent has yet to print
    for number, descriptor in enumerate(wanted):
        os.dup2(descriptor, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    signal.set_wakeup_fd(-1)
    for number in ALL - {signal.SIGKILL, signal.SIGSTOP, signal.SIGINT}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    if request["preexec_fn"] is not None:
        request["preexec_fn"]()
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[0] = str(Path.cwd())
    sys.orig_argv = list(request["args"])
    sys.argv = list(request["args"][2:])
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].default_generator.seed()
    subprocess.Popen = _ForkingItself


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        _serve(socket.socket(fileno=int(sys.argv[2])), sys.argv[3])
    else:
        exec(sys.argv[1])
