"""The learning rate of every step: a function of the step, the config, and how often the run was extended."""

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from ..config import RunConfig, TrainingConfig
from ..errors import InputError

Rule = Literal["keep", "rewarm"]
"""How a run goes on beyond its last step: at the last rate; or warmed up again, and decayed over what is new."""


class Leg(BaseModel):
    """Steps over which the learning rate follows one rule, up to step ``end``; ``begun``: the run as it began."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    end: int
    rule: Literal["begun", "keep", "rewarm"] = "begun"


def legs_of(config: RunConfig, before: Sequence[Leg], extend: Rule | None) -> tuple[Leg, ...]:
    """The legs of a run: those it has, and one more where ``training.steps`` is beyond them.

    With fewer steps than before the rate stays what it was: the run only ends sooner.

    Args:
        before: as the checkpoint has them; none where there is no checkpoint.

    Raises:
        InputError: there are more steps than before, and nobody says what the rate shall be.
    """
    steps, last = config.training.steps, before[-1].end if before else 0
    if not before:
        return (Leg(end=steps),)
    if steps <= last:
        return tuple(before)
    if extend is None and config.training.final_learning_rate_share < 1:
        raise InputError(
            f"training.steps={steps}, but this run began with {last} and its learning rate has come down to "
            f"{config.training.final_learning_rate_share:g} of its peak by then; spread over {steps} steps it would "
            f"jump. Say what it shall be: --extend keep (as it is at step {last}) or --extend rewarm (up again in "
            f"training.warmup_steps, then down over the {steps - last} new ones), or leave training.steps as it was."
        )
    return (*before, Leg(end=steps, rule=extend or "keep"))


def learning_rate(training: TrainingConfig, legs: Sequence[Leg], step: int) -> float:
    """Of a step, counted from 0: linear warm-up, then half a cosine down to the final share, leg after leg."""
    first = 0
    for leg in legs[:-1]:
        if step < leg.end:
            return _rate(training, leg, step - first, leg.end - first)
        first = leg.end
    return _rate(training, legs[-1], step - first, legs[-1].end - first)


def _rate(training: TrainingConfig, leg: Leg, step: int, steps: int) -> float:
    floor = training.final_learning_rate_share
    if leg.rule == "keep":
        return training.learning_rate * floor
    bottom = floor if leg.rule == "rewarm" else 0.0
    warm_up = min(training.warmup_steps, steps - 1)
    if step < warm_up:
        return training.learning_rate * (bottom + (1 - bottom) * (step + 1) / warm_up)
    progress = min((step - warm_up) / max(steps - warm_up, 1), 1.0)
    return training.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
