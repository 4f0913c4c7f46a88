"""Which rank has fallen silent, and where it was: every rank says what it does, its neighbour listens."""

import time
from dataclasses import dataclass

from torch.distributed.distributed_c10d import Store

from ..observe import Activity

BEAT_S = 2.0
AT_ONCE = 1000  # ranks that may ask the store so often; more ask more rarely, so that its host is asked as often by all
PAUSE_S = 10.0  # a thread that was not run for so long was stopped itself, and has no right to accuse others


def pace(ranks: int) -> float:
    """How many times longer ranks wait between two questions to the store where there are so many of them."""
    return max(1.0, ranks / AT_ONCE)


@dataclass(frozen=True)
class Beat:
    """What a rank said last.

    Attributes:
        count: number of the beat; a rank that is stopped says no new one.
        step: optimizer step it is in.
        for_s: seconds since it began with what it is doing.
        doing: such as ``"backward"`` or ``"gather"``.
        waits: whether it waits for others in that.
    """

    count: int
    step: int
    for_s: float
    doing: str
    waits: bool = False

    @classmethod
    def parse(cls, text: str) -> "Beat":
        """From what `str` gives."""
        count, step, for_s, waits, doing = text.split(" ", 4)
        return cls(int(count), int(step), float(for_s), doing, waits == "waits")

    def __str__(self) -> str:
        return f"{self.count} {self.step} {self.for_s:.1f} {'waits' if self.waits else 'works'} {self.doing}"

    @property
    def where(self) -> str:
        """For a message."""
        return f"in step {self.step}, {self.doing}" if self.step else f"before the first step, {self.doing}"


class Heartbeats:
    """Tells the job's store what this rank does, and listens to the next rank.

    Every rank is listened to by one other, as often as keeps the load on the store from growing (`pace`); of neighbours
    that fall silent together the first is accused.

    Args:
        store: of the job.
        rank, ranks: this one, and how many.
        timeout_s: a rank that says nothing new for so long is silent.
        activity: of this rank's main thread.
    """

    def __init__(self, store: Store, rank: int, ranks: int, timeout_s: float, activity: Activity) -> None:
        self._store, self._rank, self._ranks = store, rank, ranks
        self._timeout_s, self._activity, self._pace = timeout_s, activity, pace(ranks)
        self._count = 0
        self._last = self._heard_at = time.monotonic()
        self._heard: Beat | None = None

    def accusation(self) -> str | None:
        """Says this rank's beat, if it is time for one; a message, if the next rank is silent."""
        now = time.monotonic()
        if now - self._last < BEAT_S * self._pace or self._ranks == 1:
            return None
        if now - self._last > PAUSE_S * self._pace:
            self._heard_at = now
        self._last = now
        self._say(now)
        neighbour = (self._rank + 1) % self._ranks
        beat = self._beat_of(neighbour)
        if beat != self._heard:
            self._heard, self._heard_at = beat, now
        silent_s = now - self._heard_at
        if silent_s < self._timeout_s:
            return None
        where = beat.where if beat is not None else "before it said anything"
        return (
            f"rank {neighbour} has not answered for {silent_s:.0f} s (training.timeout_s is {self._timeout_s:g}); it "
            f"was last seen {where}. Its process is stopped or its node is lost: look there, and start the same "
            f"command again."
        )

    def blame(self) -> str:
        """Which rank the others wait for when a collective ran out of time.

        Of those in the earliest step one that does not wait itself, and of those the one longest at the same thing: who
        waits may have begun before whoever is waited for came to where it hangs. Asks for every rank's beat: one rank
        may do so, not all of them.
        """
        said = ((rank, self._beat_of(rank)) for rank in range(self._ranks))
        beats = [(beat.step, beat.waits, -beat.for_s, rank, beat) for rank, beat in said if beat]
        if not beats:
            return "no rank has said what it was doing"
        *_, rank, beat = min(beats)
        return f"rank {rank} is furthest behind: {beat.where}, for {beat.for_s:.0f} s"

    def _say(self, now: float) -> None:
        activity = self._activity
        self._count += 1
        beat = Beat(self._count, activity.step, now - activity.since, activity.doing, activity.waits)
        self._store.set(f"beat/{self._rank}", str(beat))

    def _beat_of(self, rank: int) -> Beat | None:
        key = f"beat/{rank}"
        return Beat.parse(self._store.get(key).decode()) if self._store.check([key]) else None
