"""Whether one forecast is better than another."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .intervals import Weighings

Verdict = Literal["better", "worse", "cannot tell"]
Why = Literal["model lacks", "other lacks", "other cells", "no error", "too few"]
"""Leads and targets do not count: one of the two has no RMSE, that of the other is of a part of the cells, that of but
one is 0, or they have no ratio when dates count otherwise."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Of the errors of one with those of another, on the same dates and cells.

    Attributes:
        model, other: their names.
        ratio_LC: RMSE of the one over that of the other; below 1 it is better.
        bounds_2LC: its interval; NaN where it cannot be told.
        overall, bounds: the geometric mean of the ratios over all leads and targets that count, and its interval.
        left_out: leads and targets (L, C) that one of them has and that do not count, by why; none of it empty.
        one_sided: whether a forecast that is judged lacks some of them, or one of the two has no error at all there:
            then the others say nothing of the whole.
        seen: whether the other is made of dates that are judged: there is no verdict then.
    """

    model: str
    other: str
    ratio_LC: NDArray[np.float64]
    bounds_2LC: NDArray[np.float64]
    overall: float
    bounds: tuple[float, float]
    left_out: Mapping[Why, NDArray[np.bool_]]
    one_sided: bool
    seen: bool = False

    @property
    def verdict(self) -> Verdict:
        """On the whole."""
        return "cannot tell" if self.one_sided or self.seen else verdict_of(*self.bounds)

    @property
    def turned(self) -> "Comparison":
        """Of the other with the one."""
        lacks: dict[Why, Why] = {"model lacks": "other lacks", "other lacks": "model lacks"}
        with np.errstate(divide="ignore"):
            low, overall, high = (1 / np.array([self.bounds[1], self.overall, self.bounds[0]])).tolist()
            return replace(
                self,
                model=self.other,
                other=self.model,
                ratio_LC=1 / self.ratio_LC,
                bounds_2LC=1 / self.bounds_2LC[::-1],
                overall=overall,
                bounds=(low, high),
                left_out={lacks.get(why, why): left_LC for why, left_LC in self.left_out.items()},
            )

    def counts(self) -> dict[Verdict, int]:
        """How many of the leads and targets have each verdict; those that one of them lacks have none."""
        known = np.isfinite(self.ratio_LC)
        pairs = zip(*(bound[known].tolist() for bound in self.bounds_2LC), strict=True)
        every = [verdict_of(*pair) for pair in pairs]
        return {one: every.count(one) for one in ("better", "worse", "cannot tell")}

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        low, high = self.bounds
        said = {"model": self.model, "other": self.other, "rmse_ratio": self.overall, "low": low, "high": high}
        return said | {"verdict": self.verdict, "other_has_seen": self.seen, "leads_and_variables": self.counts()}


def verdict_of(low: float, high: float) -> Verdict:
    """Of an interval of a ratio of errors."""
    if high < 1:
        return "better"
    return "worse" if low > 1 else "cannot tell"


def compared(
    model: str,
    other: str,
    a: int,
    b: int,
    rmse_LFC: NDArray[np.float64],
    weighed_KLFC: NDArray[np.float64],
    weighings: Weighings,
    *,
    baseline: bool = False,
    part_LC: NDArray[np.bool_] | None = None,
    seen: bool = False,
) -> Comparison:
    """Of two forecasts, by their places among F.

    Args:
        baseline: whether the other is one, which may lack variables without a verdict on the whole being withheld.
        part_LC: where the other was judged on a part of the cells: there is no ratio. Default: nowhere.
        seen: see `Comparison`.
    """
    part_LC = np.zeros_like(rmse_LFC[:, b], dtype=bool) if part_LC is None else part_LC
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio_LC, ratio_KLC = rmse_LFC[:, a] / rmse_LFC[:, b], weighed_KLFC[:, :, a] / weighed_KLFC[:, :, b]
        ratio_LC, ratio_KLC = (np.where(part_LC, np.nan, ratio) for ratio in (ratio_LC, ratio_KLC))
        log, log_K = np.log(ratio_LC), np.log(ratio_KLC)
        bounds_2LC = np.exp(weighings.interval(log_K, log))
    known = np.isfinite(log) & np.isfinite(log_K).all(axis=0)
    left_out = _left_out(rmse_LFC[:, a], rmse_LFC[:, b], part_LC, known)
    one_sided = bool(left_out.keys() & {"model lacks", "no error", *["other lacks"] * (not baseline)})
    rest = left_out, one_sided, seen
    if not known.any():
        return Comparison(model, other, ratio_LC, bounds_2LC, float("nan"), (float("nan"), float("nan")), *rest)
    overall, overall_K = log[known].mean(), log_K[:, known].mean(axis=1)
    low, high = np.exp(weighings.interval(overall_K, overall)).tolist()
    return Comparison(model, other, ratio_LC, bounds_2LC, float(np.exp(overall)), (low, high), *rest)


def _left_out(
    model_LC: NDArray[np.float64], other_LC: NDArray[np.float64], part_LC: NDArray[np.bool_], known: NDArray[np.bool_]
) -> dict[Why, NDArray[np.bool_]]:
    """Of the errors of both, and where their ratio counts."""
    has, other_has = np.isfinite(model_LC), np.isfinite(other_LC)
    part, both = part_LC & has & other_has, has & other_has & ~part_LC
    perfect = both & ((model_LC == 0) ^ (other_LC == 0))
    why: dict[Why, NDArray[np.bool_]] = {
        "model lacks": other_has & ~has,
        "other lacks": has & ~other_has,
        "other cells": part,
        "no error": perfect,
        "too few": both & ~known & ~perfect,
    }
    return {reason: left_LC for reason, left_LC in why.items() if left_LC.any()}
