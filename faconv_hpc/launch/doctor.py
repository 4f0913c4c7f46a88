"""The doctor: asks this process, its node and all ranks together what works, and makes one report of it."""

import json
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from ..errors import InputError
from . import checks, file_checks
from .findings import FILES, MACHINE, RANKS, SOFTWARE, Finding, Report, Subject, Verdict, merged, places

if TYPE_CHECKING:
    from ..spatial.mesh import ProcessMesh
    from ..spatial.roll_call import RollCall

Check = Callable[[Subject], list[Finding]]

CHECK_S = 45.0  # longer than a program may take; a file system that does not answer takes for ever
OF_RANK: tuple[tuple[str, Check], ...] = (
    (SOFTWARE, checks.library_versions),
    (SOFTWARE, checks.backend),
    (SOFTWARE, checks.kernels),
)
OF_NODE: tuple[tuple[str, Check], ...] = (
    (MACHINE, checks.gpus),
    (MACHINE, checks.compiler),
    (MACHINE, checks.ninja),
    (MACHINE, checks.build_locks),
    (MACHINE, checks.mpi),
    (FILES, file_checks.run_directory),
    (FILES, file_checks.store),
)
OF_JOB: tuple[tuple[str, Check], ...] = ((MACHINE, checks.slurm),)  # by one rank: a controller has other things to do


class RanksError(InputError, RuntimeError):
    """The ranks cannot exchange messages: exit code 2, as a run needs them; explained like any other such error."""


def examine(mesh: "ProcessMesh", subject: Subject) -> Report:
    """Examines all ranks of a job. Collective.

    Args:
        mesh: all ranks that were started, in any arrangement.
        subject: what is examined, the same on every rank.

    Returns:
        The same report on every rank.

    Raises:
        RanksError: a message was not sent or did not arrive.
    """
    from .rank_checks import collective_findings  # here, as it needs torch

    with _messages_arrive():
        nodes = mesh.gathered_objects(node_name())
    with mesh.activity.during("examining its node"):
        mine = _findings_here(subject, whole_node=nodes.index(nodes[mesh.rank]) == mesh.rank, job=mesh.rank == 0)
    with _messages_arrive():
        found = merged(mesh.gathered_objects(mine), nodes)
        failed = {finding.name for finding in found if finding.verdict is Verdict.FAILURE}
        found += collective_findings(mesh, nodes, subject, writable="run directory" not in failed)
    return Report.of(nodes, found)


def examine_alone(subject: Subject, found: Sequence[Finding] = ()) -> Report:
    """What one process can tell where the ranks cannot join, with what is already ``found``."""
    mine = _findings_here(subject, whole_node=True, job=True)
    return Report.of([node_name()], [*mine, *found])


def call_roll(timeout_s: float, device: str) -> "RollCall":
    """What every rank would join with, before any does. Collective; see `roll_call` for its errors."""
    from ..spatial.environment import RankEnvironment
    from ..spatial.roll_call import roll_call

    by_slurm = RankEnvironment.launcher_name() == "srun"
    before = {name: os.environ.get(name) for name in RankEnvironment().variables()}
    roll = roll_call(partial(_place, device), timeout_s)
    if by_slurm:  # or the ranks, when they join, would open the store of this meeting once more
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
    return roll


def joining_problems(roll: "RollCall") -> list[Finding]:
    """What would keep the ranks waiting for each other without end, if they joined."""
    heard = [json.loads(answer) for answer in roll.answers]
    nodes, devices = [node for node, _ in heard], [device for _, device in heard]
    without = [rank for rank, device in enumerate(devices) if device is None]
    if 0 < len(without) < len(devices):
        value = f"no GPU for {places(without, nodes)}, but for the others: they use gloo, the others NCCL"
        fix = "Leave those nodes out (--exclude), or compute on CPUs (--set device=cpu)."
        return [Finding(RANKS, "joining", Verdict.FAILURE, value, fix)]
    return _shared_gpus(nodes, devices)


def node_name() -> str:
    """What Slurm calls this node, or else the name of this host."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _place(device: str, local_rank: int) -> str:
    """The node of this rank, and the GPU that it will take."""
    import torch

    from ..spatial.device import device_for

    place = device_for(device, local_rank)
    gpu = None if place.type == "cpu" else str(torch.cuda.get_device_properties(place).uuid)
    return json.dumps([node_name(), gpu])


def _shared_gpus(nodes: list[str], devices: list[str | None]) -> list[Finding]:
    """NCCL refuses two ranks on one GPU, unless it is told not to (from 2.30.7 on; for trials, as they share it)."""
    if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1":
        return []
    users: dict[tuple[str, str], list[int]] = {}
    for rank, (node, device) in enumerate(zip(nodes, devices, strict=True)):
        if device is not None:
            users.setdefault((node, device), []).append(rank)
    shared = [ranks for ranks in users.values() if len(ranks) > 1]
    if not shared:
        return []
    value = f"one GPU for each of {'; '.join(places(ranks, nodes) for ranks in shared)}, which NCCL refuses"
    fix = "Start one rank per GPU: fewer ranks on a node (--ntasks-per-node), or more GPUs (--gpus-per-node)."
    return [Finding(RANKS, "joining", Verdict.FAILURE, value, fix)]


@contextmanager
def _messages_arrive() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RanksError(
            f"the ranks cannot exchange messages: {error}. See which network the nodes share (NCCL_SOCKET_IFNAME, "
            f"GLOO_SOCKET_IFNAME), and what the other ranks have printed."
        ) from error


def _findings_here(subject: Subject, *, whole_node: bool, job: bool) -> list[Finding]:
    """What this process finds; one process of each node looks at the node, one of all at what they share."""
    todo = [*OF_RANK, *(OF_NODE if whole_node else ()), *(OF_JOB if job else ())]
    return [finding for group, check in todo for finding in _in_time(group, check, subject)]


def _in_time(group: str, check: Check, subject: Subject, limit_s: float = CHECK_S) -> list[Finding]:
    """What a check finds, or that it has not come back: from a file system that does not answer nobody does."""
    answers: queue.SimpleQueue[list[Finding] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(check(subject))
        except Exception as error:
            answers.put(error)

    name = check.__name__.replace("_", " ")
    threading.Thread(target=ask, name=f"doctor-{name}", daemon=True).start()
    try:
        answer = answers.get(timeout=limit_s)
    except queue.Empty:
        fix = "Its file system or driver hangs: try there by hand, or leave the node out (--exclude)."
        return [Finding(group, name, Verdict.FAILURE, f"no answer in {limit_s:g} s", fix)]
    if isinstance(answer, OSError):
        fix = "Mend what the message names, or leave the node out (--exclude)."
        return [Finding(group, name, Verdict.FAILURE, f"cannot be looked at: {answer}", fix)]
    if isinstance(answer, Exception):
        raise answer
    return answer
