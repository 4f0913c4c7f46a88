"""How a run's looks at its validation period compare: which was the best, and when to stop."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """On one look: whether it is the best so far, and whether so many since the best were not better."""

    best: bool
    stop: bool


NONE = Verdict(best=False, stop=False)


@dataclass(frozen=True)
class Looks:
    """The score of each look, by the step after which it was made, in their order; less is better."""

    scores: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> "Looks":
        """From the lines of ``validation.jsonl``."""
        by_step: dict[int, list[Mapping[str, Any]]] = {}
        for row in rows:
            by_step.setdefault(row["step"], []).append(row)
        return cls({step: score(several) for step, several in by_step.items()})

    def verdict(self, step: int, patience: int) -> Verdict:
        """On the look after a step; ``patience``: looks in a row that may be no better, 0: any number."""
        earlier = [one for other, one in self.scores.items() if other < step]
        mine = self.scores[step]
        best = math.isfinite(mine) and all(mine < one for one in earlier)
        until = [one for other, one in self.scores.items() if other <= step]
        since = len(until) - 1 - until.index(min(until))
        return Verdict(best, bool(patience) and since >= patience)


def score(rows: Iterable[Mapping[str, Any]]) -> float:
    """The error over that of persistence, the mean of variables and leads; infinite where a forecast is no number.

    What knows no persistence is left out, and what is told of embeddings.
    """
    rows = [row for row in rows if "rmse" in row]
    if any(row["rmse"] is None for row in rows):
        return math.inf
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    return fmean(ratios) if ratios else math.inf
