"""Which rank am I: read once from what started this process. The only reader of the environment."""

import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..errors import InputError

LOOPBACK = "127.0.0.1"
OF_A_JOB = re.compile(r"(SLURMD?|PMIX?|OMPI)_.*|RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT|FACONV_FIRST_NODE")
OF_A_SITE = ("SLURM_CONF", "SLURM_CLUSTERS")

PARTED = threading.Event()
"""Set once this process has left a job of several ranks. `faconv` then ends without Python's farewell: a thread of gloo
that lets go of the last collective's tensors needs the interpreter, and aborts where that has begun to go."""

LETTING_GO_S = 0.5
"""For such threads, before the farewell of a program of somebody else's."""

_HELD: list[socket.socket] = []
"""For `free_port`."""


@dataclass(frozen=True)
class RankEnvironment:
    """Rank, number of ranks, place on the node, and where the ranks meet.

    Attributes:
        port: that all ranks agreed on; 0: none is, they look for one by the name of the ``job``.
        job: unlike that of any other job, or start of this one, at the same address.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = LOOPBACK
    port: int = 0
    job: str = ""

    @classmethod
    def read(cls) -> "RankEnvironment":
        """Recognizes torchrun (and our own launcher), srun, mpiexec, or a plain process."""
        readers = {"torchrun": _from_torchrun, "srun": _from_slurm, "mpiexec": _from_mpi, "plain": _plain}
        return readers[cls.launcher_name()]()

    @staticmethod
    def launcher_name() -> str:
        """What started this process: ``torchrun``, ``srun``, ``mpiexec`` or ``plain``."""
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            return "torchrun"
        if "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ:
            return "srun"
        if "PMI_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ:
            return "mpiexec"
        return "plain"

    @staticmethod
    def slurm_start() -> tuple[str, int] | None:
        """(cluster and number of the Slurm job this is a rank of, which start of it from 1); None outside."""
        if "SLURM_PROCID" not in os.environ or "SLURM_STEP_ID" not in os.environ:
            return None
        job = ".".join(os.environ.get(name, "0") for name in ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID"))
        return job, 1 + _integer("SLURM_RESTART_COUNT", "0")

    @staticmethod
    def job_span_s() -> tuple[float, float] | None:
        """Unix times at which Slurm began this job and will end it; None outside, and without a time limit.

        Newer Slurms tell their jobs; for older ones launch/job.sh asks, once for all ranks.
        """
        names = ("SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME")
        span = [os.environ.get(name, "") for name in names]
        return (float(span[0]), float(span[1])) if all(text.isdecimal() for text in span) else None

    @staticmethod
    def is_first_of_slurm() -> bool:
        """Whether this is rank 0 of a Slurm job, as far as the environment tells."""
        return RankEnvironment.launcher_name() == "srun" and _integer("SLURM_PROCID") == 0

    @staticmethod
    def is_first_of_node() -> bool:
        """Whether no other rank of this node is before this one, as far as the environment tells."""
        names = {
            "torchrun": ("LOCAL_RANK",),
            "srun": ("SLURM_LOCALID",),
            "mpiexec": ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK"),
            "plain": (),
        }
        return _first_integer(*names[RankEnvironment.launcher_name()], default=0) == 0

    @staticmethod
    def world_size_hint() -> int:
        """The number of ranks as far as the environment tells, without joining anything."""
        names = {
            "torchrun": ("WORLD_SIZE",),
            "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
            "mpiexec": ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"),
            "plain": (),
        }
        return _first_integer(*names[RankEnvironment.launcher_name()], default=1)

    def export(self) -> None:
        """Writes the values where torch and DeepSpeed look for them."""
        os.environ.update(self.variables())

    def variables(self) -> dict[str, str]:
        """The same values as the environment of a process."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


@contextmanager
def deepspeed_finds(kind: str, index: int | None) -> Iterator[None]:
    """The device that DeepSpeed takes where it is imported and makes an engine inside.

    By itself it would move the network to a GPU wherever there is one, to that of the local rank's number.

    Args:
        kind: ``cpu`` or ``cuda``.
        index: of a GPU.
    """
    os.environ["DS_ACCELERATOR"] = kind
    before = os.environ["LOCAL_RANK"]
    os.environ["LOCAL_RANK"] = before if index is None else str(index)
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = before


@contextmanager
def outside_a_job() -> Iterator[None]:
    """As if no job had started this process: what is submitted inside must not take its variables for its own."""
    names = [name for name in os.environ if OF_A_JOB.fullmatch(name) and name not in OF_A_SITE]
    of_job = {name: os.environ[name] for name in names}
    for name in of_job:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(of_job)


def free_port() -> int:
    """A port of this machine at which nobody listens, and which is handed to nobody else until this process ends.

    Gloo listens at some five ports for every rank: beside other jobs, one that was free a second ago may not be. A
    socket that is bound and does not listen keeps the system from handing out its port, but not those who name it.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((LOOPBACK, 0))
    _HELD.append(held)
    return int(held.getsockname()[1])


def choose_steady_mpi(library: str) -> None:
    """Before MPI is started: lets an MPICH that can, talk over OFI under srun, unless the user chose otherwise.

    Over UCX, the default of one that has both, 8 of 15 jobs of 4 ranks on 2 nodes failed as they started (mpich 5.0.2
    of PyPI, Slurm 22.05, pmi2: addresses reach the other ranks damaged); over OFI none of 15. Preparing sends a few
    numbers, so it costs nothing.

    Args:
        library: what the library says of itself, with a line such as ``MPICH Device: ch4:ucx ofi``.
    """
    device = next((line for line in library.splitlines() if line.startswith("MPICH Device")), "")
    if RankEnvironment.launcher_name() == "srun" and {"ucx", "ofi"} <= set(re.split(r"\W+", device)):
        os.environ.setdefault("MPIR_CVAR_CH4_NETMOD", "ofi")


def _integer(name: str, default: str | None = None) -> int:
    text = os.environ.get(name, default)
    try:
        return int(text if text is not None else "")
    except ValueError:
        raise InputError(
            f"the environment variable {name} must be a whole number, got {text!r}. "
            f"Start the ranks with torchrun, srun, mpiexec or `faconv train --ranks N`."
        ) from None


def _first_integer(*names: str, default: int) -> int:
    return next((_integer(name) for name in names if name in os.environ), default)


def _plain() -> RankEnvironment:
    return RankEnvironment(port=free_port())


def _from_torchrun() -> RankEnvironment:
    if _integer("MASTER_PORT") == 0:
        raise InputError(
            "MASTER_PORT is 0, which is no port that all ranks could meet at. "
            "Give torchrun --standalone, or --master-port with a number."
        )
    return RankEnvironment(
        rank=_integer("RANK"),
        world_size=_integer("WORLD_SIZE"),
        local_rank=_integer("LOCAL_RANK", "0"),
        address=os.environ.get("MASTER_ADDR", LOOPBACK),
        port=_integer("MASTER_PORT"),
    )


def _from_slurm() -> RankEnvironment:
    names = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job = ".".join(os.environ.get(name, "0") for name in names)
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", "localhost"))
    return RankEnvironment(
        rank=_integer("SLURM_PROCID"),
        world_size=_integer("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1")),
        local_rank=_integer("SLURM_LOCALID", "0"),
        address=os.environ.get("MASTER_ADDR") or _told_by_the_job(nodes) or first_node(nodes),
        port=_integer("MASTER_PORT", "0"),
        job="" if "MASTER_PORT" in os.environ else job,
    )


def _told_by_the_job(nodes: str) -> str:
    """The address of its first node, as launch/job.sh has asked once; empty for a step on other nodes than all."""
    return os.environ.get("FACONV_FIRST_NODE", "") if nodes == os.environ.get("SLURM_JOB_NODELIST") else ""


def first_node(nodes: str) -> str:
    """The address of the first node of a Slurm node list such as ``gpu[03-05,9],login1``.

    Slurm's own client is asked where it answers: lists may be folded further, and an address may not be the name.
    """
    name = _scontrol("hostnames", nodes).partition("\n")[0].strip()
    if not name:
        (head, first, tail), *_ = re.findall(r"^([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes)
        name = f"{head}{first}{tail}"
    address = re.search(r"NodeAddr=(\S+)", _scontrol("node", name))
    return address.group(1) if address else name


def _scontrol(what: str, name: str) -> str:
    """What ``scontrol show`` says; nothing where it does not answer."""
    if shutil.which("scontrol") is None:
        return ""
    try:
        return subprocess.run(
            ["scontrol", "show", what, name], capture_output=True, text=True, check=False, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _from_mpi() -> RankEnvironment:
    """Rank 0 tells all others where to meet; MPI is then no longer needed and is ended.

    Ended at once, so that a rank that fails later is reported by us, and not by MPI as well.
    """
    import mpi4py

    mpi4py.rc.finalize = False
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    meeting = (LOOPBACK if node.size == world.size else socket.gethostname(), free_port())
    address, port = world.bcast(meeting, root=0)
    environment = RankEnvironment(world.rank, world.size, node.rank, address, port)
    node.Free()
    MPI.Finalize()
    return environment
