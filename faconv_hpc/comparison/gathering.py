"""From what is on disk of a comparison to its runs and its result."""

import math
from collections.abc import Mapping, Sequence

from ..data.store import Store
from ..scaling.driver import standing
from ..scaling.machine import machine_in_words, versions_in
from ..scaling.points import DONE, FAILED, Outcomes, PointFiles
from .judging import Looked, RunErrors, judged, looked
from .plan import ComparisonConfig, Run, runs_of, spin_up
from .result import AtRate, ComparisonResult, ModelResult, best_first, best_of, check_same_dates, model_result, rates_of


def known_runs(comparison: ComparisonConfig, steps: Mapping[str, int]) -> list[Run]:
    """Those of the seeds that choose a rate, and at the best rates, as far as they are known, those of all seeds."""
    rates, _ = _rates(comparison, runs_of(comparison, steps))
    return runs_of(comparison, steps, _best(rates))


def best_runs(comparison: ComparisonConfig, runs: Sequence[Run]) -> list[Run]:
    """Those that are to be judged: of each model at its best rate, from all seeds, if they are done."""
    rates, looks = _rates(comparison, runs)
    best = _best(rates)
    return [run for run in runs if best.get(run.model) == run.rate and run.point.name in looks]


def result_of(comparison: ComparisonConfig, runs: Sequence[Run]) -> ComparisonResult:
    """Of the runs that are done and judged; the others are told."""
    rates, looks = _rates(comparison, runs)
    found: dict[str, tuple[RunErrors, ...]] = {}
    missing = {}
    for model in comparison.models:
        at = best_of(rates, model)
        own = [run for run in runs if at and (run.model, run.rate) == (at.model, at.rate)]
        kept = tuple(one for run in own if (one := judged(comparison, run)) is not None)
        if at is None:
            missing[model] = _why(rates, model)
        elif len(kept) < len(comparison.seeds):
            missing[model] = _left(comparison, own, len(comparison.seeds) - len(kept))
        else:
            found[model] = kept
    check_same_dates(found)
    models = best_first(_model(rates, name, runs, found[name], looks) for name in found)
    return ComparisonResult(comparison, models, missing, tuple(rates), found, _about(comparison, runs))


def _rates(comparison: ComparisonConfig, runs: Sequence[Run]) -> tuple[list[AtRate], dict[str, Looked]]:
    """Of the seeds that choose; and of all runs that are done."""
    outcomes = Outcomes(comparison.study_dir)
    stand = {run.point.name: standing(run.point, outcomes) for run in runs}
    looks = {run.point.name: looked(run) for run in runs if stand[run.point.name].status == DONE}
    choosing = [run for run in runs if run.seed in comparison.choosing]
    return rates_of(choosing, looks, {name: (state.status, state.why) for name, state in stand.items()}), looks


def _best(rates: Sequence[AtRate]) -> dict[str, float]:
    """The best rate of each model for which it is known."""
    models = dict.fromkeys(at.model for at in rates)
    return {name: at.rate for name in models if (at := best_of(rates, name)) is not None}


def _left(comparison: ComparisonConfig, runs: Sequence[Run], left: int) -> str:
    """Why of the runs at the best rate so many are not judged."""
    outcomes = Outcomes(comparison.study_dir)
    states = [standing(run.point, outcomes) for run in runs]
    failed = [state.why for state in states if state.status == FAILED]
    of_all = f"of {len(comparison.seeds)} runs at its best rate"
    if failed:
        again = "start the comparison again with --retry-failed, or leave out the rate"
        return f"{len(failed)} {of_all} failed ({failed[0]}): {again}"
    return f"{left} {of_all} are still to be run or judged"


def _why(rates: Sequence[AtRate], model: str) -> str:
    """It has no rate at which all seeds have a score."""
    own = [at for at in rates if at.model == model]
    if not own:
        return "its probe has not ended, so it is not known how many steps its time holds"
    failed = next((at for at in own if at.why), None)
    if failed is not None:
        return f"at the rate {failed.rate:g} a run failed ({failed.why}), and at no other all seeds have ended well"
    if any(score is None for at in own for score in at.scores.values()):
        return "at no rate all seeds have ended yet"
    return "at every rate the forecast of a seed is no number any more"


def _model(
    rates: Sequence[AtRate], model: str, runs: Sequence[Run], kept: Sequence[RunErrors], looks: dict[str, Looked]
) -> ModelResult:
    at = best_of(rates, model)
    assert at is not None, "it was judged at its best rate"
    own = [looks[run.point.name] for run in runs if (run.model, run.rate) == (at.model, at.rate)]
    counted = [one.rate for one in rates if one.model == model and math.isfinite(one.mean)]
    return model_result(at, kept, own, counted)


def _about(comparison: ComparisonConfig, runs: Sequence[Run]) -> dict[str, str]:
    """Of the data and the machine, for people."""
    config = runs[0].point.run
    with Store.open(config.data.store) as store:
        shape, times = store.layout.grid_shape, store.layout.time.described
    clusters = [attempt.cluster for run in runs if (attempt := PointFiles(run.point).attempt())]
    machine = machine_in_words(clusters, [versions_in(run.point.run.run_dir) for run in runs])
    batches = "or ".join(f"{size} " for size in sorted({run.point.run.global_batch for run in runs}))
    against = f"; errors are against {comparison.truth}" if comparison.truth else ""
    return {
        "data": f"the store {config.data.store}, {times}, on {shape[0]} x {shape[1]} cells{against}",
        "given": str(spin_up(comparison)),
        "machine": f"{machine}; mesh {config.mesh}, {batches}sample(s) a step",
    }
