"""How fast the ranks talk to each other, and how far their clocks are apart: measured here, judged elsewhere."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
import torch.distributed as dist

from .mesh import ProcessMesh
from .messages import start_messages

Pair = tuple[int, int]
"""Two ranks of a mesh."""

REPEATS = 7
WARM_UP = 2  # the first message opens the connection
CLOCK_ROUNDS = 9
FLOAT_BYTES = 4


def all_reduce_s(mesh: ProcessMesh, size_bytes: int, repeats: int = REPEATS) -> float:
    """Seconds of an all-reduce over all ranks: the median of each rank, of the slowest rank. Collective.

    Args:
        mesh: of at least two ranks.
        size_bytes: of float32 numbers on every rank.
        repeats: how many are timed.
    """
    assert mesh.ranks > 1, "an all-reduce takes two ranks, this mesh has one"
    numbers = torch.zeros(size_bytes // FLOAT_BYTES, device=mesh.device)
    here_s = _median_s(mesh, lambda: dist.all_reduce(numbers, group=mesh.group), repeats)
    return max(seconds for (seconds,) in mesh.gathered([here_s]))


def exchange_s(mesh: ProcessMesh, pairs: Sequence[Pair], size_bytes: int, repeats: int = REPEATS) -> dict[Pair, float]:
    """Seconds in which the two ranks of a pair send each other a message: the median of the slower one. Collective.

    Pairs without a rank in common are measured at the same time, as the halos of all tiles travel at the same time.

    Args:
        mesh: of at least two ranks.
        pairs: the same ones on every rank.
        size_bytes: of the message in each direction, float32 numbers.
        repeats: how many are timed.

    Returns:
        Those of every pair, on every rank.
    """
    outgoing = torch.zeros(size_bytes // FLOAT_BYTES, device=mesh.device)
    incoming = torch.empty_like(outgoing)
    here: dict[Pair, float] = {}
    for phase in phases(pairs):
        mesh.gathered([0.0])  # all begin together
        for pair in phase:
            if mesh.rank in pair:
                exchange = partial(_exchange, mesh, sum(pair) - mesh.rank, outgoing, incoming)
                here[pair] = _median_s(mesh, exchange, repeats)
    of_ranks = mesh.gathered_objects(here)
    return {pair: max(rank_s[pair] for rank_s in of_ranks if pair in rank_s) for pair in pairs}


def phases(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs sorted into as few steps as they come to, no rank twice in one; a chain of neighbours takes two."""
    sorted_in: list[list[Pair]] = []
    for pair in pairs:
        for phase in sorted_in:
            if not any(set(pair) & set(other) for other in phase):
                phase.append(pair)
                break
        else:
            sorted_in.append([pair])
    return sorted_in


def clock_bounds_s(
    mesh: ProcessMesh, now: Callable[[], float] = time.time, rounds: int = CLOCK_ROUNDS
) -> list[tuple[float, float]]:
    """Between which seconds each rank's clock is ahead of that of rank 0. Collective.

    No rank leaves an all-gather before all have entered it. So a rank leaves after rank 0 has entered,
    ahead <= left - entered_0, and rank 0 leaves after the rank has entered, ahead >= entered - left_0. Each round
    gives such bounds; the closest ones are kept.

    Args:
        mesh: of any number of ranks.
        now: this rank's clock.
        rounds: all-gathers that are timed.

    Returns:
        (least, most) of every rank, on every rank; less than zero: behind.
    """
    entered, left = [], []
    for _ in range(rounds):
        entered.append(now())
        mesh.gathered([0.0])
        left.append(now())
    of_ranks = torch.tensor(mesh.gathered([*entered, *left]), dtype=torch.float64)
    entered_RN, left_RN = of_ranks[:, :rounds], of_ranks[:, rounds:]
    least_R = (entered_RN - left_RN[0]).amax(dim=1)
    most_R = (left_RN - entered_RN[0]).amin(dim=1)
    return list(zip(least_R.tolist(), most_R.tolist(), strict=True))


def _exchange(mesh: ProcessMesh, peer: int, outgoing: torch.Tensor, incoming: torch.Tensor) -> None:
    start_messages({peer: outgoing}, {peer: incoming}, mesh.group)()


def _median_s(mesh: ProcessMesh, communicate: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(WARM_UP + repeats):
        began = time.perf_counter()
        communicate()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize(mesh.device)
        seconds.append(time.perf_counter() - began)
    return median(seconds[WARM_UP:])
