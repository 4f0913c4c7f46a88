"""What a forecast has to be better than: persistence, climatology, and damped persistence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.annual_cycle import AnnualCycle
from ..data.climatology import Climatology
from ..data.periods import evenly, mask_of, ranges_of, starts_within, stretches_of
from ..observe import READING
from ..spatial.domain import Domain
from .truth import Case, Truth

PERSISTENCE, CLIMATOLOGY, DAMPED = "persistence", "climatology", "damped persistence"
NAMES = (PERSISTENCE, CLIMATOLOGY, DAMPED)
MADE_OF_DATES = NAMES[1:]
PAIRS = 40  # dates of training from which it is told how much of an anomaly is left


class MadeOf(NamedTuple):
    """What climatology and damping are made of.

    Attributes:
        kind: the dates of training, others that were named, or none: then climatology is a network's cycle, if known.
        dates: ranges, in their order.
        judged: how many forecasts have leads among them: these climatology has seen.
    """

    kind: Literal["training", "named", "none"] = "none"
    dates: tuple[str, ...] = ()
    judged: int = 0

    @classmethod
    def of(cls, truth: Truth, spans: Sequence[range], named: bool, cases: Sequence[Case]) -> "MadeOf":
        """Of frames, and of the forecasts that are judged."""
        seen = mask_of(spans, len(truth.axis))
        judged = sum(bool(seen[list(case.leads)].any()) for case in cases)
        return cls("named" if named else "training" if spans else "none", ranges_of(truth.axis, spans), judged)


@dataclass(frozen=True)
class Baselines:
    """Of a truth, on this rank's tile.

    Attributes:
        means: of the dates of training; None where the data have not all of them.
        cycle: of the variables that a network saw without it, for data that have none.
        damping_LC: which part of an anomaly is left at a lead, on average over the grid; NaN where it is not known.
    """

    truth: Truth
    domain: Domain
    means: Climatology | None
    cycle: AnnualCycle
    damping_LC: NDArray[np.float64]

    @classmethod
    def of(
        cls, truth: Truth, domain: Domain, spans: Sequence[range], leads: int, cycle: AnnualCycle | None = None
    ) -> "Baselines":
        """Collective over the tiles; reads.

        Args:
            spans: the frames that climatology and damping are made of.
            cycle: of a network, on this tile; where there are no such frames, it is the climatology.
        """
        with domain.mesh.activity.during(READING):
            means = Climatology.of(truth.fields, spans, domain.tile) if spans else None
        nothing = np.full((leads, len(truth.targets)), np.nan)
        alone = cls(truth, domain, means, cycle or AnnualCycle(), nothing)
        return cls(truth, domain, means, alone.cycle, alone._damping(spans, leads))

    @property
    def known(self) -> NDArray[np.bool_]:
        """(C,) of which targets there is a climatology."""
        if self.means is not None:
            return np.ones(len(self.truth.targets), dtype=bool)
        return np.array([one.name in self.cycle.coefficients for one in self.truth.targets])

    def climatology(self, frame: int) -> Tensor:
        """(C, Y, X) float64 at the time of a frame; NaN where it is not known."""
        if self.means is not None:
            return self._on_device(self.means.at(range(frame, frame + 1))[0].numpy())
        fields = np.full((len(self.truth.targets), *self.domain.tile.shape), np.nan, dtype=np.float32)
        fraction = self.truth.axis.year_fraction[frame : frame + 1]
        for place, target in enumerate(self.truth.targets):
            if target.name in self.cycle.coefficients:
                fields[place] = self.cycle.at(target.name, fraction)[0]
        return self._on_device(fields)

    def came(self, frame: int) -> Tensor:
        """(C, Y, X) float64, what came; NaN where it is not known."""
        with self.domain.mesh.activity.during(READING):
            return self._on_device(self.truth.read(frame, self.domain.tile))

    def damped(self, lead: int, start_CYX: Tensor, mean_then_CYX: Tensor, mean_CYX: Tensor) -> Tensor:
        """(C, Y, X) the climatology of a lead (from 0), and what is left of the anomaly of the start."""
        left_C = torch.from_numpy(self.damping_LC[lead]).to(start_CYX.device)
        return mean_CYX + left_C[:, None, None] * (start_CYX - mean_then_CYX)

    def _damping(self, spans: Sequence[range], leads: int) -> NDArray[np.float64]:
        """Least squares of the anomalies at a lead on those before, over the grid and some dates of training:
        ``sum(a_0 a_lead) / sum(a_0 a_0)``, area-weighted."""
        starts = starts_within(stretches_of(self.truth.axis, spans), leads)
        if not starts.size:
            return self.damping_LC
        sums = torch.zeros(2, leads, len(self.truth.targets), dtype=torch.float64, device=self.domain.mesh.device)
        for start in starts[evenly(len(starts), PAIRS)].tolist():
            first_CYX = self.came(start) - self.climatology(start)
            for lead in range(leads):
                frame = start + lead + 1
                later_CYX = self.came(frame) - self.climatology(frame)
                pair_RCYX = torch.stack([first_CYX * later_CYX, first_CYX * first_CYX])
                known = ~pair_RCYX[0].isnan()
                weights = self.domain.coordinates.row_weights(pair_RCYX)[:, None]
                sums[:, lead] += (pair_RCYX.where(known, 0.0) * weights).sum((-2, -1))
        products, squares = self.domain.total(sums).cpu().numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            damping: NDArray[np.float64] = products / squares
        return damping

    def _on_device(self, fields_CYX: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(fields_CYX).to(self.domain.mesh.device).double()
