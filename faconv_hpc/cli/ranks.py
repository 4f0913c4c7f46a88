"""Ranks behind a command: those to start on this machine, or those that this process is one of."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from ..config import MeshConfig
from ..errors import InputError, LostRankError, RunError
from ..launch.local import inside_a_job, run_local_ranks
from ..spatial.environment import RankEnvironment

if TYPE_CHECKING:
    from ..spatial.mesh import ProcessMesh

CHANGE_MESH = "change mesh.replicas, mesh.lat or mesh.lon with --set"


def job_ranks() -> int:
    """How many ranks were started, of which this process is one."""
    return RankEnvironment.world_size_hint()


def starts_ranks(ranks: int | None) -> bool:
    """Whether this process is to start ranks, and is not one of them."""
    if ranks is None or not inside_a_job():
        return ranks is not None
    if ranks != job_ranks():
        raise InputError(
            f"--ranks is {ranks}, but this is one of {job_ranks()} ranks that are already started. "
            f"Leave --ranks out inside torchrun, srun or mpiexec."
        )
    return False


def check_ranks(mesh: MeshConfig, ranks: int | None, otherwise: str = CHANGE_MESH) -> None:
    """Raises InputError, which says what else to do, unless the ranks to start fill the mesh."""
    if mesh.ranks != ranks:
        raise InputError(
            f"a mesh of {mesh.replicas} replicas x {mesh.lat} lat x {mesh.lon} lon needs {mesh.ranks} ranks, "
            f"--ranks is {ranks}. Use --ranks {mesh.ranks}, or {otherwise}."
        )


def set_options(overrides: Sequence[str] | None) -> list[str]:
    """The ``--set`` options of a command, to hand on to its ranks."""
    return [part for override in overrides or () for part in ("--set", override)]


def run_ranks(arguments: Sequence[str], ranks: int | None) -> int:
    """Runs ``faconv ARGUMENTS`` on so many ranks of this machine; the exit code."""
    return run_local_ranks(arguments, ranks or 1)


@contextmanager
def joined(mesh: MeshConfig | None, timeout_s: float, device: str) -> "Iterator[ProcessMesh]":
    """The ranks, arranged in a mesh (all of them along lon, if none is given); they leave together when the block ends.

    An exception inside ends all of them, with one message.
    """
    from ..spatial.mesh import ProcessMesh

    sizes = (mesh.replicas, mesh.lat, mesh.lon) if mesh else (1, 1, job_ranks())
    ranks = ProcessMesh.start(*sizes, device=device, timeout_s=timeout_s)
    with ranks.guarded():
        yield ranks
    ranks.stop()


def say_before_joining(error: Exception) -> None:
    """One rank of several says it for all and ends them; returns where there are no others, or they do not come."""
    with suppress(LostRankError, InputError, RunError):  # such as the very error
        if job_ranks() > 1:
            from ..spatial.mesh import report_before_joining

            report_before_joining(error)
