"""Dates are dealt over the replicas of a mesh, which go from step to step together."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ..spatial.mesh import ProcessMesh

Date = TypeVar("Date")
Progress = Callable[[int, int], None]
"""Called with (steps that are done, steps there are), of the first replica."""


def take_turns(
    dates: Sequence[Date],
    steps: int,
    mesh: ProcessMesh,
    begin: Callable[[Date], Iterator[None]],
    progress: Progress | None,
) -> None:
    """As many dates at once as there are replicas. All ranks go from step to step together, those too that have no date
    in the last turn, so that none waits long for another. Collective.

    Args:
        dates: the same on all ranks.
        begin: the work of a date, which yields after each of ``steps`` steps; collective over the tiles of a replica.
    """
    turns = [dates[first : first + mesh.replicas] for first in range(0, len(dates), mesh.replicas)]
    for number, turn in enumerate(turns):
        mine = begin(turn[mesh.replica]) if mesh.replica < len(turn) else iter(())
        for step in range(steps):
            next(mine, None)
            mesh.gathered([0.0])
            if progress is not None:
                progress(number * steps + step + 1, len(turns) * steps)
        for _ in mine:
            raise AssertionError(f"a date has more than {steps} steps")
