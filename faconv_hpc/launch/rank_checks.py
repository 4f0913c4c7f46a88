"""What the doctor asks of several ranks together: the mesh, a directory that all see, clocks, messages. Collective."""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

from ..spatial.bandwidth import Pair, all_reduce_s, clock_bounds_s, exchange_s
from ..spatial.mesh import ProcessMesh
from .file_checks import PREFIX, nearest
from .findings import FILES, NETWORK, RANKS, Finding, Subject, Verdict, places

APART_S = 1.0  # dates of files and lines of logs are then out of order
SMALL_BYTES, LARGE_BYTES, MESSAGE_BYTES = 2**16, 2**24, 2**22
SLOW_SHARE = 1 / 3  # of the median pair


def collective_findings(
    mesh: ProcessMesh, nodes: Sequence[str], subject: Subject, *, writable: bool = True
) -> list[Finding]:
    """All that takes several ranks; of one rank only how many there are. Collective.

    Args:
        mesh: all ranks that were started.
        nodes: the node of each.
        subject: what is examined.
        writable: whether every node can write the directory of the run; it is not touched otherwise.

    Returns:
        The same on every rank.
    """
    found = [roster(nodes), *mesh_size(mesh.ranks, subject)]
    if mesh.ranks == 1:
        return found
    found.append(clocks(mesh, nodes))
    if writable and len(set(nodes)) > 1:
        found += shared_directory(mesh, nodes, subject.directory)
    return [*found, *messages(mesh, nodes, quick=subject.quick)]


def roster(nodes: Sequence[str]) -> Finding:
    """How many ranks there are, and on which nodes."""
    names = list(dict.fromkeys(nodes))
    value = f"{len(nodes)} on {places(range(len(nodes)), nodes)}" if len(nodes) > 1 else f"1 on {names[0]}"
    return Finding(RANKS, "ranks", Verdict.OK, value)


def mesh_size(started: int, subject: Subject) -> list[Finding]:
    """Whether the mesh of the config has as many ranks as were started; one process alone may be asked beforehand."""
    if subject.config is None:
        return []
    mesh = subject.config.mesh
    shape = f"{mesh.replicas} replicas x {mesh.lat} lat x {mesh.lon} lon"
    if mesh.ranks == started:
        return [Finding(RANKS, "mesh", Verdict.OK, shape)]
    if started == 1:
        return [Finding(RANKS, "mesh", Verdict.OK, f"{shape} will need {mesh.ranks} ranks")]
    value = f"{shape} needs {mesh.ranks} ranks, {started} were started"
    fix = f"Start {mesh.ranks} ranks, or change mesh.replicas, mesh.lat or mesh.lon in the config or with --set."
    return [Finding(RANKS, "mesh", Verdict.FAILURE, value, fix)]


def clocks(mesh: ProcessMesh, nodes: Sequence[str], now: Callable[[], float] = time.time) -> Finding:
    """How far apart the ranks' clocks are, and how well that is known. Collective."""
    bounds = clock_bounds_s(mesh, now)
    ahead = [(least + most) / 2 for least, most in bounds]
    first, last = min(range(mesh.ranks), key=ahead.__getitem__), max(range(mesh.ranks), key=ahead.__getitem__)
    apart = ahead[last] - ahead[first]
    doubt = sum(bounds[rank][1] - bounds[rank][0] for rank in {first, last}) / 2
    value = f"{1e3 * apart:.1f} ms apart, give or take {1e3 * doubt:.1f} ms"
    if apart - doubt <= APART_S:
        return Finding(RANKS, "clocks", Verdict.OK, value)
    whose = f"{places([last], nodes)} ahead of {places([first], nodes)}"
    value = f"{apart:.1f} s apart, give or take {1e3 * doubt:.1f} ms: {whose}"
    fix = "Have the nodes' clocks set by one time server (chronyc tracking, timedatectl)."
    return Finding(RANKS, "clocks", Verdict.WARNING, value, fix)


def shared_directory(mesh: ProcessMesh, nodes: Sequence[str], directory: Path) -> list[Finding]:
    """Whether all nodes see the same files where the run writes: each rank writes its shard there. Collective."""
    token = mesh.from_first(_made_token(directory) if mesh.rank == 0 else None)
    if token is None:
        return []  # it cannot be written, which is a finding of its own
    seen = [sees for (sees,) in mesh.gathered([float(token.is_dir())])]
    if mesh.rank == 0:
        shutil.rmtree(token, ignore_errors=True)
    blind = [rank for rank, sees in enumerate(seen) if not sees]
    if not blind:
        return [Finding(FILES, "shared directory", Verdict.OK, "what rank 0 writes is seen by all")]
    value = f"what rank 0 writes to {token.parent} is not seen by {places(blind, nodes)}"
    fix = "All ranks write checkpoints there: give a run_dir on a file system that all nodes share."
    return [Finding(FILES, "shared directory", Verdict.FAILURE, value, fix)]


def messages(mesh: ProcessMesh, nodes: Sequence[str], *, quick: bool) -> list[Finding]:
    """All-reduces of all ranks, and messages between neighbours; the large ones only if not ``quick``. Collective."""
    found = [_all_reduce(mesh, SMALL_BYTES)]
    if quick:
        return found
    pairs = neighbours(nodes)
    seconds = exchange_s(mesh, pairs, MESSAGE_BYTES)
    if _is_slow(seconds):  # once may be chance
        again = exchange_s(mesh, pairs, MESSAGE_BYTES)
        seconds = {pair: min(seconds[pair], again[pair]) for pair in pairs}
    return [*found, _all_reduce(mesh, LARGE_BYTES), judged(seconds, nodes)]


def neighbours(nodes: Sequence[str]) -> list[Pair]:
    """Ranks that follow each other in the mesh: those on different nodes, if there are several nodes."""
    pairs = list(pairwise(range(len(nodes))))
    return [pair for pair in pairs if nodes[pair[0]] != nodes[pair[1]]] or pairs


def judged(seconds: dict[Pair, float], nodes: Sequence[str]) -> Finding:
    """Names the slowest pair of those that were measured."""
    slowest = max(seconds, key=lambda pair: seconds[pair])
    name = f"neighbours {MESSAGE_BYTES / 2**20:g} MiB"
    value = f"{_speed(MESSAGE_BYTES, seconds[slowest])} each way between {places(slowest, nodes)}"
    if len(seconds) > 1:
        value += f", the slowest of {len(seconds)} pairs; median {median(_speeds(seconds)) / 1e9:.2f} GB/s"
    if not _is_slow(seconds):
        return Finding(NETWORK, name, Verdict.OK, value)
    fix = (
        "Every step waits for the slowest pair. See what else runs on those nodes and which network they use "
        "(NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME); leave a node with a bad link out (--exclude)."
    )
    return Finding(NETWORK, name, Verdict.WARNING, value, fix)


def _made_token(directory: Path) -> Path | None:
    try:
        return Path(tempfile.mkdtemp(prefix=PREFIX, dir=nearest(directory)))
    except OSError:
        return None


def _is_slow(seconds: dict[Pair, float]) -> bool:
    return min(_speeds(seconds)) < SLOW_SHARE * median(_speeds(seconds))


def _speeds(seconds: dict[Pair, float]) -> list[float]:
    """Bytes per second of every pair, each way."""
    return [MESSAGE_BYTES / one for one in seconds.values()]


def _all_reduce(mesh: ProcessMesh, size_bytes: int) -> Finding:
    seconds = all_reduce_s(mesh, size_bytes)
    size = f"{size_bytes / 2**20:g} MiB" if size_bytes >= 2**20 else f"{size_bytes / 2**10:g} KiB"
    value = f"{1e3 * seconds:.2f} ms, {_speed(size_bytes, seconds)}"
    return Finding(NETWORK, f"all-reduce {size}", Verdict.OK, value)


def _speed(size_bytes: int, seconds: float) -> str:
    return f"{size_bytes / seconds / 1e9:.2f} GB/s"
