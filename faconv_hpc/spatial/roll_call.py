"""A word from every rank before they join: what would keep them from joining can only be told so."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store

from ..errors import LostRankError
from .environment import RankEnvironment
from .failure import MARGIN_S, FailureWatch
from .meeting import meet

ROLL, DONE, HEARD, ALL_HEARD = "roll", "done", "heard", "all heard"


@dataclass(frozen=True)
class RollCall:
    """Who is there.

    Attributes:
        rank: this one.
        answers: of every rank, in the order of ranks.
        store: of this meeting. Keep it until the ranks have joined: rank 0 hosts it, and who is late still asks there.
    """

    rank: int
    answers: tuple[str, ...]
    store: Store

    def until_rank_0_is_done(self, timeout_s: float) -> None:
        """Collective; returns when rank 0 has come here too. A launcher would end it when another rank leaves first."""
        if self.rank == 0:
            self.store.set(DONE, "")
        with suppress(RuntimeError):  # somebody is gone already
            self.store.wait([DONE], timedelta(seconds=timeout_s))
            if self.store.add(HEARD, 1) == len(self.answers):
                self.store.set(ALL_HEARD, "")
            if self.rank == 0:  # which hosts the store, and would cut the others short
                self.store.wait([ALL_HEARD], timedelta(seconds=MARGIN_S))


def roll_call(answer: Callable[[int], str], timeout_s: float) -> RollCall:
    """Collective over the ranks of the job, through its key-value store alone; before `ProcessMesh.start`.

    A rank that fails before it comes here, or here, ends all, as it does in `ProcessMesh.start`.

    Args:
        answer: what this rank says, from its place on the node (the local rank).
        timeout_s: how long rank 0 waits for the others.

    Raises:
        LostRankError: the ranks have not found each other in time.
        RunError: no port is free for rank 0.
    """
    environment = RankEnvironment.read()
    store = meet(environment, timeout_s)
    own: Store = store.clone()  # type: ignore[attr-defined]
    watch = FailureWatch(PrefixStore("failure", own), environment.rank)
    with watch.guarded():
        board = PrefixStore("roll call", store)
        board.set(str(environment.rank), answer(environment.local_rank))
        if environment.rank == 0:
            board.set(ROLL, json.dumps(_collected(board, environment.world_size, timeout_s)))
        board.wait([ROLL], timedelta(seconds=timeout_s + MARGIN_S))
        answers = json.loads(board.get(ROLL))
    watch.stop()
    return RollCall(environment.rank, tuple(answers), board)


def _collected(board: Store, ranks: int, timeout_s: float) -> list[str]:
    """What all have said; read by rank 0 alone, so that the others ask its host for one value only."""
    names = [str(rank) for rank in range(ranks)]
    try:
        board.wait(names, timedelta(seconds=timeout_s))
    except RuntimeError as error:
        missing = [name for name in names if not board.check([name])]
        raise LostRankError(
            f"of {ranks} ranks {', '.join(missing)} did not come within {timeout_s:g} s. See what they printed, and "
            f"whether their nodes are up. The store says: {error}"
        ) from None
    return [answer.decode() for answer in board.multi_get(names)]
