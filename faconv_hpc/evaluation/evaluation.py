"""What an evaluation found: scores with intervals, and who is better."""

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..spatial.grid import LatLonGrid
from ..training.skill import Skill
from . import baselines
from .baselines import MadeOf
from .compare import Comparison, compared
from .fields import Example, KeptSpectra
from .intervals import Weighings, known_on_few
from .sums import SIZES, PerDate
from .truth import Chosen, Target
from .words import Leads


class Judged(NamedTuple):
    """One of those that stand in a table.

    Attributes:
        kind: ``network`` or ``file of forecasts``.
        about: where it is, its step, its digest.
        held_out: whether training saw none of what it forecast; None: not known.
    """

    name: str
    kind: str
    about: dict[str, str]
    held_out: bool | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        entries: what was judged, without the baselines.
        truth: what came, for people.
        given: what networks forecast from; empty where there is none.
        targets: what was forecast.
        known: (C,) of which targets there is a climatology.
        dates: of the starts.
        chosen: how these were.
        leads_h: (L,) how far ahead the leads are, in hours, on average over dates.
        per_date: of all entries and then the baselines.
        made_of: which dates climatology and damped persistence are made of.
        on_earth: whether coastlines mean something on its maps.
    """

    entries: tuple[Judged, ...]
    truth: str
    given: str
    targets: tuple[Target, ...]
    grid: LatLonGrid
    known: NDArray[np.bool_]
    dates: tuple[str, ...]
    chosen: Chosen
    leads_h: NDArray[np.float64]
    per_date: PerDate
    spectra: KeptSpectra
    example: Example
    made_of: MadeOf
    on_earth: bool = True

    @property
    def held_out(self) -> bool | None:
        """Of the first entry."""
        return self.entries[0].held_out

    @property
    def forecasts(self) -> int:
        """How many, each over all leads."""
        return len(self.dates)

    @property
    def leads(self) -> Leads:
        """In words."""
        return Leads(self.leads_h)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the entries and the baselines, in the order of the sums."""
        return (*(one.name for one in self.entries), *baselines.NAMES)

    @cached_property
    def metrics(self) -> dict[str, NDArray[np.float64]]:
        """(L, F, C) each of `METRICS`."""
        return {name: values[0] for name, values in self.per_date.metrics().items()}

    @cached_property
    def weighings(self) -> Weighings:
        """Dates that count a little more or less, the same for all, so that differences can be told."""
        return Weighings.of(self.forecasts)

    @cached_property
    def weighed(self) -> dict[str, NDArray[np.float64]]:
        """(K, L, F, C) each of `METRICS`; NaN of what is known on too few dates."""
        few_LFC = known_on_few(self.per_date.weight)
        weighed = self.per_date.metrics(self.weighings.weights_KN)
        return {name: np.where(few_LFC, np.nan, values_KLFC) for name, values_KLFC in weighed.items()}

    @cached_property
    def intervals(self) -> dict[str, NDArray[np.float64]]:
        """(2, L, F, C) each of `METRICS`; those that are sizes by their logarithms, which are less skewed."""
        found = {name: (values, self.metrics[name]) for name, values in self.weighed.items()}
        with np.errstate(invalid="ignore", divide="ignore"):
            return {
                name: np.exp(self.weighings.interval(*map(np.log, pair)))
                if name in SIZES
                else self.weighings.interval(*pair)
                for name, pair in found.items()
            }

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Of each entry with those after it, and with the baselines."""
        places = range(len(self.names))
        pairs = [(a, b) for a, b in combinations(places, 2) if a < len(self.entries)]
        given = self.metrics["rmse"], self.weighed["rmse"], self.weighings
        seen = baselines.MADE_OF_DATES if self.made_of.judged else ()
        return tuple(
            compared(
                self.names[a],
                self.names[b],
                a,
                b,
                *given,
                baseline=b >= len(self.entries),
                part_LC=self.elsewhere[:, b],
                seen=b >= len(self.entries) and self.names[b] in seen,
            )
            for a, b in pairs
        )

    def compared_with_others(self, model: str) -> tuple[Comparison, ...]:
        """Of an entry with all others and the baselines, in their order."""
        own = {one.other: one for one in self.comparisons if one.model == model}
        own |= {one.model: one.turned for one in self.comparisons if one.other == model}
        return tuple(own[name] for name in self.names if name in own)

    @property
    def elsewhere(self) -> NDArray[np.bool_]:
        """(L, F, C) where a baseline was judged on a part of the cells, as it is not known on the others."""
        return np.asarray(self.per_date.shares < 1 - 1e-9)  # NaN: nothing was judged

    @property
    def skills(self) -> tuple[Skill, ...]:
        """Of the first entry, lead by lead."""
        rmse_LFC, first = self.metrics["rmse"], len(self.entries)
        return tuple(
            Skill(target.name, lead + 1, target.units, *rmse_LFC[lead, [0, first, first + 1], place].tolist())
            for lead in range(len(self.leads_h))
            for place, target in enumerate(self.targets)
        )
