"""The ranks that share the work of a preparation: none but this one, or those of an MPI job.

Preparing is not training: it runs on login and data nodes, where there is an MPI library or just
one process. Four verbs are all it needs, so that one process is a job of one rank and not a second
code path.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeVar

from ..errors import InputError, describe, exit_code_of
from ..spatial.environment import RankEnvironment, choose_steady_mpi

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")

TOLD_S = 0.5  # for mpiexec to pass on what a rank has said, which it does not do once the job is aborted


class Comm(Protocol):
    """What preparing asks of a communicator."""

    rank: int
    size: int

    def barrier(self) -> None:
        """Waits until every rank is here."""

    def allgather(self, value: T) -> list[T]:
        """The value of every rank, in the order of ranks, on every rank."""

    def abort(self, code: int) -> NoReturn:
        """Ends all ranks at once with this exit code."""


class SerialComm:
    """One process."""

    rank = 0
    size = 1

    def barrier(self) -> None:
        """Nobody to wait for."""

    def allgather(self, value: T) -> list[T]:
        """The value alone."""
        return [value]

    def abort(self, code: int) -> NoReturn:
        """Ends this process."""
        raise SystemExit(code)


class MpiComm:
    """The ranks of an MPI communicator (mpi4py, lower-case methods: pickled Python objects)."""

    def __init__(self, world: "MPI.Intracomm") -> None:
        self._world = world
        self.rank: int = world.Get_rank()
        self.size: int = world.Get_size()

    def barrier(self) -> None:
        """Waits until every rank is here."""
        self._world.Barrier()

    def allgather(self, value: T) -> list[T]:
        """The value of every rank, in the order of ranks, on every rank."""
        gathered: list[T] = self._world.allgather(value)
        return gathered

    def abort(self, code: int) -> NoReturn:
        """Ends all ranks at once with this exit code."""
        self._world.Abort(code)
        os._exit(code)  # MPICH may return from Abort and kill a little later: the error would be printed again


def mpi_comm() -> Comm:
    """The ranks of the MPI job, or a job of one where mpi4py or an MPI library is missing. Starts MPI.

    Raises:
        InputError: several ranks were started, but MPI does not know of each other's: all would do the whole work.
    """
    started, launcher = RankEnvironment.world_size_hint(), RankEnvironment.launcher_name()
    try:
        mpi = _loaded_mpi()
        choose_steady_mpi(mpi.Get_library_version())
        if not mpi.Is_initialized():
            mpi.Init_thread()
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, the MPI library is not
        if started > 1:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{started} ranks were started by {launcher}, but mpi4py finds no MPI library ({why}): each would do "
                f"the whole work. Load your site's MPI module, or bring a library with pip install mpich; or prepare "
                f"with one process."
            ) from None
        return SerialComm()
    comm = MpiComm(mpi.COMM_WORLD)
    if comm.size == 1 < started:
        raise InputError(
            f"{started} ranks were started by {launcher}, but MPI knows of {comm.size}: each would do the whole work. "
            f"Under Slurm use srun --mpi=pmi2 (or the kind that `srun --mpi=list` names and your MPI was built for), "
            f"otherwise mpiexec of the MPI that mpi4py uses."
        )
    return comm


def _loaded_mpi() -> ModuleType:
    """mpi4py's MPI, which is not started yet; raises ImportError or RuntimeError where it or a library is missing."""
    import mpi4py

    mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    from mpi4py import MPI

    return MPI


def mpi_library() -> str | None:
    """Name and version of the MPI library that mpi4py loads, such as ``MPICH Version: 4.2.1``; None if there is none.

    Loads it without starting MPI. A library that does not suit its process ends it: ask in a process of its own.
    """
    try:
        mpi = _loaded_mpi()
    except (ImportError, RuntimeError):
        return None
    described = str(mpi.Get_library_version()).splitlines()[0]  # what follows is how it was built
    return " ".join(described.partition(",")[0].split())


@contextmanager
def guarded(comm: Comm) -> Iterator[None]:
    """What `ProcessMesh.guarded` is to a mesh: an exception inside ends all ranks, with one message.

    Without it the others would wait in the next collective for ever. The rank that fails says why and ends the job.
    A job of one rank is left alone: the exception goes on.
    """
    try:
        yield
    except Agreed:
        raise
    except BaseException as error:
        if comm.size == 1:
            raise
        print(describe(error, comm.rank), file=sys.stderr, flush=True)
        time.sleep(TOLD_S)
        comm.abort(exit_code_of(error))


class Agreed(SystemExit):
    """Every rank knows of the error and one of them has printed it: leave quietly."""


def alike(comm: Comm, work: Callable[[], T]) -> T:
    """Collective. What every rank does alike; if one finds something wrong, all hear of it: see `agree`."""
    done: list[T] = []
    wrong = None
    try:
        done.append(work())
    except InputError as error:
        wrong = error
    agree(comm, wrong)
    return done[0]


def agree(comm: Comm, error: InputError | None) -> None:
    """Collective. If any rank has an error, all leave, and one message is printed.

    For work that every rank does alike, such as opening the sources, where all would print the
    same message.

    Raises:
        InputError: on a job of one rank.
        Agreed: on every rank of a larger job, with exit code 2.
    """
    first = next((one for one in comm.allgather(error) if one is not None), None)
    if first is None:
        return
    if comm.size == 1:
        raise first
    if comm.rank == 0:
        print(describe(first), file=sys.stderr, flush=True)
    raise Agreed(exit_code_of(first))
