"""Looking at held-out data while a run trains."""

import math

import numpy as np

from ..observe import VALIDATING
from .engine import Engine
from .setup import Workspace
from .skill import Skill, SkillSums, forecasts_of


class Validation:
    """Forecasts some windows of the validation period, dealt to the replicas, with the weights as they are.

    Nothing of the run is changed by it: no number is drawn and no gradient kept.
    """

    def __init__(self, workspace: Workspace, engine: Engine) -> None:
        training = workspace.config.training
        self._workspace, self._engine = workspace, engine
        self._every, self._leads = training.validate_every, training.validate_leads
        if self._every:
            windows = workspace.forecast_windows(workspace.contract.validation, self._leads)
            some = np.linspace(0, len(windows) - 1, min(len(windows), training.validate_samples)).round().astype(int)
            self._windows, self._some = windows, some.tolist()

    def due(self, step: int) -> bool:
        """Whether a run looks at its validation period after this step."""
        return bool(self._every and step and step % self._every == 0)

    def skills(self) -> tuple[Skill, ...]:
        """Of all variables and leads. Collective: every rank runs the network equally often, as ZeRO 3 asks for."""
        workspace, engine = self._workspace, self._engine
        domain, mesh = workspace.domain, workspace.domain.mesh
        sums = SkillSums(self._leads, len(workspace.contract.channels.targets))
        with mesh.activity.during(VALIDATING), engine.evaluating():
            for turn in range(math.ceil(len(self._some) / mesh.replicas)):
                place = turn * mesh.replicas + mesh.replica
                batch = self._windows.read([self._some[min(place, len(self._some) - 1)]]).to(mesh.device)
                found = forecasts_of(engine.forward, batch, workspace.config.data.window, domain)
                for lead, fields in enumerate(found, start=1):
                    sums.add(lead, fields, domain, counts=place < len(self._some))
            sums.over_replicas(mesh)
        domain.clock.take("exchange")  # no step's
        engine.take_communication_s()
        return sums.skills(workspace.contract.channels)
