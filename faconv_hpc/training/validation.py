"""Looking at held-out data while a run trains."""

import math
import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace

from ..observe import VALIDATING
from .engine import Engine
from .setup import Workspace
from .skill import Skill, SkillSums, forecasts_from


class Validation:
    """Forecasts some windows of the validation period, dealt to the replicas, by the weights as they are or their mean.

    Nothing of the run is changed by it: no number is drawn and no gradient kept. It reads by files of its own, as the
    run reads ahead in a thread.
    """

    def __init__(self, workspace: Workspace, engine: Engine) -> None:
        training = workspace.config.training
        self._workspace, self._engine = workspace, engine
        self._leads = training.validate_leads
        if training.validate_every:
            own = replace(workspace, store=copy(workspace.store))
            windows = own.forecast_windows(workspace.contract.validation, self._leads)
            self._windows, self._some = windows, windows.spread(training.validate_samples)
            self._climatology = own.climatology()

    def skills(self, may_go_on: Callable[[float], bool]) -> tuple[Skill, ...] | None:
        """Of all variables and leads; None: it was given up. Collective.

        Every rank runs the network equally often, as ZeRO 3 asks for.

        Args:
            may_go_on: asked before another window, which takes so many seconds. Collective.
        """
        workspace, engine = self._workspace, self._engine
        domain, mesh, window = workspace.domain, workspace.domain.mesh, workspace.config.data.window
        sums = SkillSums(self._leads, len(workspace.contract.channels.targets))
        turn_s = 0.0
        with mesh.activity.during(VALIDATING), engine.evaluating():
            for turn in range(math.ceil(len(self._some) / mesh.replicas)):
                if not may_go_on(turn_s):
                    return None
                began = time.perf_counter()
                place = turn * mesh.replicas + mesh.replica
                index = self._some[min(place, len(self._some) - 1)]
                found = forecasts_from(engine.forward, self._windows, index, window, domain, self._climatology)
                for lead, fields in enumerate(found, start=1):
                    sums.add(lead, fields, domain, counts=place < len(self._some))
                turn_s = time.perf_counter() - began
            sums.over_replicas(mesh)
        domain.clock.take("exchange")  # no step's
        engine.take_communication_s()
        return sums.skills(workspace.contract.channels)
