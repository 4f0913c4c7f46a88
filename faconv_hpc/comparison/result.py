"""What a comparison found: each model at its best rate, over its seeds, and which differences are more than chance."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from ..errors import InputError
from ..evaluation.compare import Verdict, verdict_of
from ..evaluation.intervals import LEVEL, Weighings, known_on_few
from ..files import json_ready
from ..scaling.points import FAILED
from .judging import EMBEDDING, FORECASTS, JUDGED_FILE, Looked, RunErrors
from .plan import ComparisonConfig, Run


class OverSeeds(NamedTuple):
    """Over the seeds: mean and standard deviation (of one fewer than there are; NaN of one seed)."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "OverSeeds":
        """Of one value a seed."""
        with np.errstate(invalid="ignore"):  # a model may be no number
            deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        return cls(float(np.mean(values)), deviation)

    @classmethod
    def of_ratios(cls, ratios_S: NDArray[np.float64]) -> "OverSeeds":
        """With their geometric mean; their deviation is the plain one."""
        return cls.of(ratios_S.tolist())._replace(mean=_geometric_mean(ratios_S))


@dataclass(frozen=True)
class AtRate:
    """A model at one rate.

    Attributes:
        scores: by seed; None: the run failed, or is not done.
        why: of the first run that failed.
    """

    model: str
    rate: float
    scores: Mapping[int, float | None]
    why: str = ""

    @property
    def mean(self) -> float:
        """Over the seeds; infinite where one has no score."""
        found = [math.inf if one is None else one for one in self.scores.values()]
        return float(np.mean(found))

    @property
    def lacking(self) -> int:
        """How many seeds have no score, as their runs failed or have not ended."""
        return sum(one is None for one in self.scores.values())


@dataclass(frozen=True)
class ModelResult:
    """A model at its best rate.

    Attributes:
        ratio: error over persistence's, geometric mean of variables, leads and seeds, as that of a `Pair`; the
            deviation is that of the seeds.
        rmse_SLC: by seed, lead and variable.
        looks: of its runs.
        at_end: which end of the rates that count the best is, ``least`` or ``largest``; empty: of neither, or there is
            but one.
        lost_leads: at how many of them an error of some seed is no number, although persistence has one.
    """

    model: str
    rate: float
    ratio: OverSeeds
    rmse_SLC: NDArray[np.float64]
    looks: tuple[Looked, ...]
    parameters: int
    multiply_adds: float
    at_end: str
    lost_leads: int

    def over_seeds(self, name: str) -> OverSeeds:
        """Of what a `Looked` says."""
        return OverSeeds.of([getattr(look, name) for look in self.looks])

    @property
    def frame_s(self) -> float:
        """Seconds of training for each frame of each sample, mean of the seeds."""
        return float(np.mean([look.step_s * look.steps / look.frames for look in self.looks]))

    @property
    def embedding(self) -> dict[str, OverSeeds]:
        """Of each of `EMBEDDING`."""
        return {name: OverSeeds.of([look.embedding[name] for look in self.looks]) for name in EMBEDDING}


@dataclass(frozen=True)
class Pair:
    """Two models, each seed of one beside the same seed of the other, on the same forecasts.

    Attributes:
        ratio: geometric mean of the ratio of errors, over variables, leads and seeds; below 1 the first is better. NaN
            where an error of one of them is no number.
        low, high: its interval; NaN where it cannot be told.
    """

    model: str
    other: str
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """On the first."""
        return verdict_of(self.low, self.high)


@dataclass(frozen=True, eq=False)
class ComparisonResult:
    """All that is told of a comparison.

    Attributes:
        models: those that could be judged, best first.
        missing: the others, and why.
        rates: all models at all rates.
        judged: of each model, a run a seed; all have the same dates.
        about: of data, machine and versions, for people.
    """

    comparison: ComparisonConfig
    models: tuple[ModelResult, ...]
    missing: Mapping[str, str]
    rates: tuple[AtRate, ...]
    judged: Mapping[str, tuple[RunErrors, ...]]
    about: Mapping[str, str]

    @property
    def any_judged(self) -> RunErrors:
        """Of dates, variables and baselines all say the same."""
        return self.judged[self.models[0].model][0]

    def baseline_rmse_LC(self, name: str) -> NDArray[np.float64]:
        """Of persistence, or climatology; NaN where it is not known."""
        one, place = self.any_judged, FORECASTS.index(name)
        return _rmse(one.square_NLFC[:, :, place], one.weight_NLFC[:, :, place])

    @property
    def sparse_LC(self) -> NDArray[np.bool_]:
        """What is known on too few dates to count."""
        return _is_judged(self.any_judged) & ~_counts(self.any_judged)

    @cached_property
    def weighings(self) -> Weighings:
        """Of the dates, the same for all."""
        return Weighings.of(len(self.any_judged.dates))

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """Each model with those after it."""
        logs = {name: np.stack([self._log_rmse(one) for one in row]) for name, row in self.judged.items()}
        names = [one.model for one in self.models]
        return tuple(pair_of(a, b, logs[a], logs[b], self.weighings) for a, b in combinations(names, 2))

    def _log_rmse(self, one: RunErrors) -> NDArray[np.float64]:
        """(1 + K, L, C) of the error as it is, and by each of the weighings: NaN where no model is judged, infinite
        where this one's forecast is no number, on however few dates."""
        weights_KN = np.concatenate([np.ones((1, len(one.dates))), self.weighings.weights_KN])
        square, weight = (
            np.tensordot(weights_KN, part[:, :, 0], axes=1) for part in (one.square_NLFC, one.weight_NLFC)
        )
        with np.errstate(divide="ignore"):
            log_KLC = np.log(_root(square, weight))
        log_KLC[np.isnan(log_KLC)] = math.inf
        lost_LC = np.isposinf(log_KLC).any(axis=0) & _is_judged(one)
        return np.where(_counts(one) | lost_LC, log_KLC, math.nan)

    def as_json(self) -> dict[str, Any]:
        """For programs: plain values; what is no number is None."""
        one = self.any_judged if self.models else None
        said = {
            "comparison": self.comparison.name,
            "budget_s": self.comparison.budget_s,
            "interval": LEVEL,
            "models": [self._row(model) for model in self.models],
            "missing": dict(self.missing),
            "pairs": [asdict(pair) | {"verdict": pair.verdict} for pair in self.pairs] if one else [],
            "rates": [asdict(at) | {"mean": at.mean} for at in self.rates],
            "forecasts": len(one.dates) if one else 0,
            "leads_h": one.leads_h.tolist() if one else [],
            "variables": one.variables.tolist() if one else [],
            "about": dict(self.about),
        }
        if one:
            said |= {name: self.baseline_rmse_LC(name).tolist() for name in FORECASTS[1:]}
        ready: dict[str, Any] = json_ready(said)
        return ready

    def _row(self, model: ModelResult) -> dict[str, Any]:
        spreads = {name: model.over_seeds(name)._asdict() for name in ("step_s", "trained_s", "peak_gib", "score")}
        return {
            "model": model.model,
            "learning_rate": model.rate,
            "ratio": model.ratio._asdict(),
            "rmse": model.rmse_SLC.tolist(),
            "lost_leads": model.lost_leads,
            "steps": model.looks[0].steps,
            "frames": model.looks[0].frames,
            "frame_s": model.frame_s,
            "parameters": model.parameters,
            "multiply_adds": model.multiply_adds,
            "embedding": {name: spread._asdict() for name, spread in model.embedding.items()},
            **spreads,
        }


def pair_of(
    model: str, other: str, log_SKLC: NDArray[np.float64], other_SKLC: NDArray[np.float64], weighings: Weighings
) -> Pair:
    """Of the logarithms of the errors of two models, as they are (the first of 1 + K) and by each of the weighings.

    With d_s the difference of seed s, mean of variables and leads, the ratio is ``exp(mean d)``. Its variance is that
    over other dates, see `Weighings`, and that over seeds, ``var(d) / S``. The interval is Student's, of the degrees of
    freedom of Welch and Satterthwaite: a model is better where neither other dates nor other seeds would turn the
    difference. Of one seed it cannot be told.

    A lead of a variable is left out where both are NaN throughout, which is where nothing is known. A model that is no
    number elsewhere is neither better nor worse by the rest.
    """
    known = (np.isfinite(log_SKLC) & np.isfinite(other_SKLC)).all(axis=(0, 1))
    left_out = (np.isnan(log_SKLC) & np.isnan(other_SKLC)).all(axis=(0, 1))
    if not known.any() or not (known | left_out).all():
        return Pair(model, other, math.nan, math.nan, math.nan)
    difference_SK = (log_SKLC[:, :, known] - other_SKLC[:, :, known]).mean(axis=-1)
    difference_K, seeds = difference_SK.mean(axis=0), len(difference_SK)
    overall = float(difference_K[0])
    if seeds < 2 or not weighings.can_tell:
        return Pair(model, other, math.exp(overall), math.nan, math.nan)
    of_dates, waves = (float(part) for part in weighings.variance(difference_K[1:], difference_K[0]))
    of_seeds = float(difference_SK[:, 0].var(ddof=1)) / seeds
    variance = of_dates + of_seeds
    if not variance:  # one and the same
        return Pair(model, other, math.exp(overall), math.exp(overall), math.exp(overall))
    freedom = variance**2 / (of_dates**2 / waves + of_seeds**2 / (seeds - 1))
    half = float(stdtrit(freedom, 0.5 + LEVEL / 2)) * math.sqrt(variance)
    return Pair(model, other, *(math.exp(overall + part) for part in (0.0, -half, half)))


def rates_of(runs: Sequence[Run], looks: Mapping[str, Looked], states: Mapping[str, tuple[str, str]]) -> list[AtRate]:
    """All models at all rates.

    Args:
        looks: of the runs that are done, by their points.
        states: status of each point, and why it failed.
    """
    found = []
    for model, rate in dict.fromkeys((run.model, run.rate) for run in runs):
        own = [run for run in runs if (run.model, run.rate) == (model, rate)]
        scores = {run.seed: looks[run.point.name].score if run.point.name in looks else None for run in own}
        why = next((states[run.point.name][1] for run in own if states[run.point.name][0] == FAILED), "")
        found.append(AtRate(model, rate, scores, why))
    return found


def best_of(rates: Sequence[AtRate], model: str) -> AtRate | None:
    """The rate of the least score, mean of the seeds; None where at no rate all have one."""
    own = [at for at in rates if at.model == model and math.isfinite(at.mean)]
    return min(own, key=lambda at: at.mean, default=None)


def check_same_dates(judged: Mapping[str, Sequence[RunErrors]]) -> None:
    """Raises InputError where two runs were judged on other dates: the data have changed since the first was."""
    every = [(name, one.dates.tolist()) for name, row in judged.items() for one in row]
    for name, dates in every[1:]:
        first, wanted = every[0]
        if dates != wanted:
            raise InputError(
                f"models are judged on the same dates, but a run of {first!r} was on {_span(wanted)} and one of "
                f"{name!r} on {_span(dates)}: the store has changed in between. Remove {JUDGED_FILE} from the "
                f"directories of the runs, and start the comparison again."
            )


def _span(dates: Sequence[str]) -> str:
    return f"{len(dates)} dates from {dates[0]} to {dates[-1]}" if dates else "no dates"


def model_result(
    at: AtRate, judged: Sequence[RunErrors], looks: Sequence[Looked], rates: Sequence[float]
) -> ModelResult:
    """Of a model at its best rate.

    Args:
        rates: at which all its seeds have a score that is a number.
    """
    rmse_SLC = np.stack([_rmse(one.square_NLFC[:, :, 0], one.weight_NLFC[:, :, 0]) for one in judged])
    free_LC = _rmse(judged[0].square_NLFC[:, :, 1], judged[0].weight_NLFC[:, :, 1])
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio_SLC = rmse_SLC / free_LC
    lost_LC = _is_judged(judged[0]) & ~np.isfinite(rmse_SLC).all(axis=0)
    counts_LC = _counts(judged[0]) | lost_LC
    ratio_S = _geometric_mean(ratio_SLC[:, counts_LC], axis=1) if counts_LC.any() else np.full(len(judged), math.nan)
    ends = {min(rates): "least", max(rates): "largest"} if len(rates) > 1 else {}
    one = judged[0]
    return ModelResult(
        at.model, at.rate, OverSeeds.of_ratios(ratio_S), rmse_SLC, tuple(looks), one.parameters, one.multiply_adds,
        ends.get(at.rate, ""), int(lost_LC.any(axis=1).sum()),
    )  # fmt: skip


def best_first(models: Iterable[ModelResult]) -> tuple[ModelResult, ...]:
    """By their errors; those that are no number somewhere come last."""
    return tuple(sorted(models, key=lambda one: one.ratio.mean if math.isfinite(one.ratio.mean) else math.inf))


def _is_judged(one: RunErrors) -> NDArray[np.bool_]:
    """(L, C) where a model's error over persistence's means something: that is known, and there is one."""
    persistence_LC = _rmse(one.square_NLFC[:, :, 1], one.weight_NLFC[:, :, 1])
    return np.isfinite(persistence_LC) & (persistence_LC > 0)


def _counts(one: RunErrors) -> NDArray[np.bool_]:
    """(L, C) where it also is known on dates enough to tell who is better, as in an evaluation."""
    return _is_judged(one) & ~known_on_few(one.weight_NLFC[:, :, 0])


def _geometric_mean(values: NDArray[np.float64], axis: int | None = None) -> Any:
    with np.errstate(divide="ignore"):
        return np.exp(np.log(values).mean(axis=axis))


def _rmse(square_NLC: NDArray[np.float64], weight_NLC: NDArray[np.float64]) -> NDArray[np.float64]:
    return _root(square_NLC.sum(axis=0), weight_NLC.sum(axis=0))


def _root(square: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        root: NDArray[np.float64] = np.sqrt(square / weight)
    return root
