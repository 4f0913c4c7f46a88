"""Looking at held-out data while a run trains."""

import math
import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..data.samples import Batch
from ..model.network import FAConvLSTMNetwork, NetworkOutput
from ..model.subspace import coarse_means
from ..observe import VALIDATING
from ..spatial.domain import Domain
from ..spatial.mesh import ProcessMesh
from .embeddings import Embedded, EmbeddingSkill, embedding_skill
from .engine import Engine
from .objective import losses_of
from .setup import Workspace
from .skill import Skill, SkillSums, forecasts_from, read_window


@dataclass(frozen=True)
class Look:
    """What was seen: skills of all variables and leads, and on the first rank that of the embedding."""

    skills: tuple[Skill, ...]
    embedding: EmbeddingSkill | None


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

    def look(self, may_go_on: Callable[[float], bool]) -> Look | None:
        """At all variables and leads; None: it was given up. Collective.

        Every rank runs the network equally often, as ZeRO 3 asks for.

        Args:
            may_go_on: asked before another window, which takes so many seconds. Collective.
        """
        workspace, engine = self._workspace, self._engine
        domain, mesh, window = workspace.domain, workspace.domain.mesh, workspace.config.data.window
        sums = SkillSums(self._leads, len(workspace.contract.channels.targets))
        embedded: dict[int, Embedded] = {}
        turn_s = 0.0
        with mesh.activity.during(VALIDATING), engine.evaluating():
            for turn in range(math.ceil(len(self._some) / mesh.replicas)):
                if not may_go_on(turn_s):
                    return None
                began = time.perf_counter()
                place = turn * mesh.replicas + mesh.replica
                batch = read_window(self._windows, self._some[min(place, len(self._some) - 1)], domain)
                network = _Watched(engine.forward)
                found = forecasts_from(network, self._windows, batch, window, domain, self._climatology)
                for lead, fields in enumerate(found, start=1):
                    sums.add(lead, fields, domain, counts=place < len(self._some))
                assert network.window is not None, "a forecast begins with its window"
                seen = _embedded(engine.network, network.window, batch.first(window), domain)
                if place < len(self._some):
                    embedded[place] = seen
                turn_s = time.perf_counter() - began
            sums.over_replicas(mesh)
            embedding = _embedding_skill(embedded, mesh)
        domain.clock.take("exchange")  # no step's
        engine.take_communication_s()
        return Look(sums.skills(workspace.contract.channels), embedding)


class _Watched:
    """A network that keeps what it said of a window; a free run goes on from there."""

    def __init__(self, network: Callable[..., NetworkOutput]) -> None:
        self._network = network
        self.window: NetworkOutput | None = None

    def __call__(self, *given: Any, **further: Any) -> NetworkOutput:
        output = self._network(*given, **further)
        self.window = output if self.window is None else self.window
        return output


@torch.no_grad()
def _embedded(network: FAConvLSTMNetwork, output: NetworkOutput, batch: Batch, domain: Domain) -> Embedded:
    """Of the one window of a batch. Collective over the tiles."""
    losses = losses_of(network, output, batch, domain)
    fields = batch.inputs_BTCYX[:, :, : output.fields]
    means, known = coarse_means(fields, domain, network.subspace.coarse_shape, batch.fresh_BTCYX)
    means = means if known is None else means.where(known, torch.nan)
    both = torch.stack([losses.forecast.value, losses.embedding.value])
    values = both, output.embedding_BTE[0], means[0].flatten(1), batch.year_fraction_BT[0]
    return Embedded(*(one.double().cpu().numpy() for one in values))


def _embedding_skill(mine: dict[int, Embedded], mesh: ProcessMesh) -> EmbeddingSkill | None:
    """Of all windows, by their places; on the first rank alone. Collective."""
    everywhere = mesh.gathered_objects(mine if mesh.tile_index == 0 else {})  # tiles of one have the same
    if mesh.rank:
        return None
    windows = {place: one for some in everywhere for place, one in some.items()}
    return embedding_skill([windows[place] for place in sorted(windows)])
