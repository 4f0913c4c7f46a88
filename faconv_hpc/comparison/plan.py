"""What a comparison of models is: its config, its runs, and how many steps a time makes of each."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count as count_from
from itertools import pairwise
from operator import ge
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from ..config import Count, RunConfig, Section, SlurmConfig
from ..config_file import load_config, validated
from ..errors import InputError
from ..scaling.points import PointFiles
from ..scaling.study import POINTS, Point, flattened, merged
from ..training.records import StepRecord

FEWEST_STEPS = 2
DECIDED = {
    "run_dir": "every run has one of its own",
    "training.steps": "as many as budget_s holds, by the seconds of a step in the probe",
    "training.warmup_steps": "the same share of a run's steps as in the base config",
    "training.learning_rate": "learning_rates says it",
    "training.seed": "seeds says it",
    "training.rollout": "that of the base config, at the same shares of a run's steps",
    "training.validate_every": "each run looks at its validation period once, after the last step",
    "training.validate_leads": "leads says it",
    "training.stop_after": "all runs have the same time",
    "training.keep_best": "the weights after the last step are judged",
    "training.save_in_background": "saving beside a step would cost it time",
}
"""Keys of a run that the comparison sets, and why."""
RECIPE = (
    "optimizer", "beta2", "final_learning_rate_share", "weight_decay", "clip_norm", "ema", "precision", "zero_stage",
    "input_noise", "frozen", "micro_batch", "stateful_windows",
)  # fmt: skip
"""What of `training` may be a model's own, beside all of `model` and `data.window`: how its weights are fitted and
kept, and in which portions it takes the frames that all are trained on (one without a memory has no use for windows).
All else decides what a model is given (data, weights to begin with), how it is looked at, or what its time is worth
(mesh, device, cores)."""
ROOM = {"checkpoint_every": 0, "validate_every": 0, "compare_replicas_every": 0, "give_up_after": 1}
"""Of a probe: nothing but steps."""

Rate = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class ComparisonConfig(Section):
    """Models beside each other on the same data, each trained for the same time, at several rates, from several seeds.

    Paths are relative to the working directory, as those of a run are.
    """

    study_dir: Path = Field(description="runs, report and figures go here")
    config: Path = Field(description="YAML file of the run that all models share")
    models: dict[str, dict[str, Any]] = Field(
        min_length=2, description="name: values of the run that make it, as `model.cell: convlstm`"
    )
    learning_rates: tuple[Rate, ...] = Field(min_length=1, description="each model is judged at its best one")
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1, description="runs of each model and rate")
    rate_seeds: Count | None = Field(
        None, description="of the seeds, the first so many choose the rate; the others run at the best one alone; all"
    )
    budget_s: float = Field(gt=0, description="seconds of training of each run, as its probe measured them")
    set: dict[str, Any] = Field({}, description="values of the run for all models")
    leads: Count = Field(8, description="steps that forecasts run freely, in validation and in the judgement")
    samples: Count | None = Field(48, description="forecasts of the test period that are judged; null: all there are")
    truth: Path | None = Field(
        None, description="what came, a store, to be judged against, if data.store has it with noise; default: that"
    )
    warm_up_steps: Count = Field(3, description="steps of the probe before it is timed: compiling, reading ahead")
    probe_steps: Count = Field(10, description="steps of the probe that are timed; their median counts")
    at_once: Count | None = Field(None, description="jobs that wait or run at a time; default: all the cluster takes")
    slurm: SlurmConfig = Field(SlurmConfig(), description="keys given here replace those of the run")

    @field_validator("learning_rates", "seeds")
    @classmethod
    def _each_once(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        texts = [str(value) if isinstance(value, int) else rate_in_words(value) for value in values]
        twice = [value for value, text in zip(values, texts, strict=True) if texts.count(text) > 1]
        if twice:
            told = next(text for text in texts if texts.count(text) > 1)
            raise ValueError(
                f"each once, but {told} stands there more often: {', '.join(map(repr, twice))} (rates are told apart "
                f"by six digits, which directories and tables have of them)"
            )
        return values

    @model_validator(mode="after")
    def _names_are_told_apart(self) -> "ComparisonConfig":
        labels = [label_of(name) for name in self.models]
        twice = [name for name, label in zip(self.models, labels, strict=True) if labels.count(label) > 1 or not label]
        if twice:
            raise ValueError(
                f"models need names that differ in letters or digits, which their directories are called by, got "
                f"{', '.join(map(repr, twice))}"
            )
        return self

    @model_validator(mode="after")
    def _seeds_choose(self) -> "ComparisonConfig":
        if self.rate_seeds is not None and self.rate_seeds > len(self.seeds):
            raise ValueError(
                f"rate_seeds={self.rate_seeds} of the {len(self.seeds)} seeds ({', '.join(map(str, self.seeds))}) "
                f"cannot choose a rate. Name more seeds, or fewer that choose."
            )
        return self

    @property
    def name(self) -> str:
        """What it is called in the report."""
        return self.study_dir.name

    @property
    def choosing(self) -> tuple[Seed, ...]:
        """The seeds from which a model is run at every rate."""
        return self.seeds[: self.rate_seeds]


@dataclass(frozen=True)
class Run:
    """One of the runs: a model, at a rate, from a seed."""

    model: str
    rate: float
    seed: int
    point: Point


def label_of(name: str) -> str:
    """A model's name as a part of a directory's: ``convlstm k=3`` is ``convlstm-k-3``."""
    return re.sub(r"[^\w.]+", "-", name, flags=re.ASCII).strip("-.")


def rate_in_words(rate: float) -> str:
    """Its six digits."""
    return f"{rate:g}"


def probes_of(comparison: ComparisonConfig) -> dict[str, Point]:
    """A short run of each model, which tells the seconds of a step with each number of leads that runs are trained for.

    Raises:
        InputError: the base config or a model is not valid, or the models cannot be compared.
    """
    probes, phases = {}, _phases(comparison)
    each = comparison.warm_up_steps + comparison.probe_steps
    rollout = {place * each: leads for place, leads in enumerate(phases.values())}
    for name in comparison.models:
        training = ROOM | {"steps": each * max(len(phases), 1), "warmup_steps": 0, "rollout": rollout}
        probes[name] = _point(comparison, name, f"probe_{label_of(name)}", training, goes_on=False)
    _check_same(probes)
    return probes


def step_seconds(comparison: ComparisonConfig, probe: Point) -> float:
    """The median of a probe's timed steps; of those with so many leads each, the mean as a run has them.

    Raises:
        InputError: the probe is not done.
    """
    done, wanted = _progress(comparison, probe)
    if done < wanted:
        raise InputError(
            f"the probe {probe.name} has {done} of {wanted} timed steps, so it is not known how many steps "
            f"{comparison.budget_s:g} s are. Start the comparison again, without --report-only."
        )
    begins = [*(_phases(comparison) or [0.0]), 1.0]
    medians = [median(record.seconds for record in records) for records in _timed(comparison, probe)]
    return sum(((end - begin) * of for (begin, end), of in zip(pairwise(begins), medians, strict=True)), 0.0)


def _phases(comparison: ComparisonConfig) -> dict[float, int]:
    """Share of a run's steps: leads that it is trained for from there on, the first from 0 on; empty: single steps."""
    base = load_config(comparison.config).training
    steps = {0: 1} | base.rollout if base.rollout else {}
    return {step / base.steps: leads for step, leads in sorted(steps.items()) if step < base.steps}


def _timed(comparison: ComparisonConfig, probe: Point) -> list[list[StepRecord]]:
    """Of each number of leads of a probe, the steps after the first."""
    each, records = comparison.warm_up_steps + comparison.probe_steps, PointFiles(probe).records()
    begins = (place * each for place in range(len(probe.run.training.rollout) or 1))
    return [records[begin + comparison.warm_up_steps : begin + each] for begin in begins]


def _progress(comparison: ComparisonConfig, probe: Point) -> tuple[int, int]:
    """How many steps of a probe are timed, and should be."""
    timed = _timed(comparison, probe)
    return sum(map(len, timed)), comparison.probe_steps * len(timed)


def steps_of(comparison: ComparisonConfig, probe: Point) -> int:
    """How many steps the budget holds; raises InputError where that is next to none, or a phase has none."""
    seconds, phases = step_seconds(comparison, probe), _phases(comparison)
    steps = round(comparison.budget_s / seconds)
    fewest = next(count for count in count_from(FEWEST_STEPS) if len(_rollout(phases, count)) == len(phases))
    if steps < fewest:
        of_phases = f" with {len(phases)} phases of training.rollout" * (len(phases) > 1)
        raise InputError(
            f"budget_s={comparison.budget_s:g} s hold {steps} steps of {seconds:.3g} s, as {probe.name} measured them; "
            f"a run{of_phases} has at least {fewest}. Give more seconds, or a smaller model or batch."
        )
    return steps


def _rollout(phases: Mapping[float, int], steps: int) -> dict[int, int]:
    """The phases at their shares of so many steps; those that begin together or at the end are fewer."""
    begins = ((round(share * steps), leads) for share, leads in phases.items())
    return {begin: leads for begin, leads in begins if begin < steps}


def known_steps(comparison: ComparisonConfig, probes: Mapping[str, Point]) -> dict[str, int]:
    """How many steps the budget holds of each model whose probe is done; raises InputError where none is."""
    done = {name: probe for name, probe in probes.items() if ge(*_progress(comparison, probe))}
    return {name: steps_of(comparison, probe) for name, probe in (done or probes).items()}


def runs_of(
    comparison: ComparisonConfig, steps: Mapping[str, int], best: Mapping[str, float] | None = None
) -> list[Run]:
    """All models at all rates from the seeds that choose; and at the best rates from all: the first seed of all comes
    first.

    The learning rate's warm-up and the phases of the rollout have the same shares of a run's steps as in the base
    config.

    Args:
        steps: of each model; those that are not in it have no runs.
        best: rate of each model for which it is known.
    """
    base, phases = load_config(comparison.config).training, _phases(comparison)
    runs = []
    for seed in comparison.seeds:
        for name in (name for name in comparison.models if name in steps):
            for rate in comparison.learning_rates:
                if seed not in comparison.choosing and rate != (best or {}).get(name):
                    continue
                count = steps[name]
                training = {
                    "steps": count,
                    "warmup_steps": min(round(base.warmup_steps / base.steps * count), count - 1),
                    "rollout": _rollout(phases, count),
                    "learning_rate": rate,
                    "seed": seed,
                    "validate_every": count,
                    "validate_leads": comparison.leads,
                }
                label = f"{label_of(name)}_rate{rate_in_words(rate)}_seed{seed}"
                runs.append(Run(name, rate, seed, _point(comparison, name, label, training, goes_on=True)))
    return runs


def _point(
    comparison: ComparisonConfig, model: str, label: str, training: Mapping[str, Any], *, goes_on: bool
) -> Point:
    directory = comparison.study_dir.absolute() / POINTS / label
    _refuse_decided("set", comparison.set)
    _refuse_decided(f"model {model!r}", comparison.models[model])
    tree = merged(_shared(comparison), {"slurm": comparison.slurm.model_dump(mode="json", exclude_unset=True)})
    tree = merged(tree, comparison.models[model])
    decided = {"stop_after": 0, "keep_best": False, "save_in_background": False, **training}
    tree = merged(tree, {"training": decided, "run_dir": str(directory / "run")})
    tree["training"]["rollout"] = training["rollout"]  # not merged with the base config's, which names other steps
    tree["data"]["store"] = str(Path(tree["data"]["store"]).absolute())
    run = validated(RunConfig, tree, f"model {model!r} of the comparison")
    for period in ("validation", "test"):
        if not getattr(run.data.periods, period):
            what = "rates are chosen by it" if period == "validation" else "models are judged on it"
            raise InputError(
                f"data.periods.{period} of {comparison.config} names no dates, and {what}. Give it some, which "
                f"training does not see."
            )
    return Point(label, directory, run, goes_on=goes_on)


def _shared(comparison: ComparisonConfig) -> dict[str, Any]:
    """What all models have, where they say nothing else."""
    return merged(load_config(comparison.config).model_dump(mode="json"), comparison.set)


def spin_up(comparison: ComparisonConfig) -> int:
    """Frames that all models are given before each forecast that is judged: as many as the longest window has."""
    shared = _shared(comparison)
    windows = (merged(shared, changes)["data"]["window"] for changes in comparison.models.values())
    return int(max(windows))


def _refuse_decided(where: str, changes: Mapping[str, Any]) -> None:
    for key, _ in flattened(changes):
        for name, reason in DECIDED.items():
            if key == name or key.startswith(f"{name}."):
                raise InputError(f"{where}: the comparison decides {name} ({reason}), got {key}. Leave it out.")


def _check_same(probes: Mapping[str, Point]) -> None:
    """All models see the same frames of the same data, on the same ranks and machines, and are looked at alike."""
    (first, one), *others = probes.items()
    for name, other in others:
        for key, mine, its in _differences(one.run, other.run):
            raise InputError(
                f"the models of a comparison are trained and judged alike, but {key} is {mine!r} of {first!r} and "
                f"{its!r} of {name!r}. Move it from the model to `set`, or leave it out: a model's own are the keys of "
                f"`model`, data.window, and of `training` {', '.join(RECIPE)}."
            )


def _differences(one: RunConfig, other: RunConfig) -> Sequence[tuple[str, Any, Any]]:
    """Keys that are not a model's own, and what they are in two runs; None: what is not there."""
    own: dict[str, Any] = {"run_dir": True, "model": True, "data": {"window"}, "training": set(RECIPE)}
    mine, its = (dict(flattened(run.model_dump(mode="json", exclude=own))) for run in (one, other))
    return [(key, mine.get(key), its.get(key)) for key in mine | its if mine.get(key) != its.get(key)]
