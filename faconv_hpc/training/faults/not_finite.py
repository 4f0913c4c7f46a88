"""What is done where loss or gradient are no finite numbers: the run stops, skips the step, or restores."""

import sys
from collections.abc import Sequence

from ...errors import NoProgressError
from ..checkpoint import CheckpointWriter
from ..engine import Engine, Snapshot
from ..resume import resume
from ..setup import Workspace
from .health import MicroBatch, is_sound, report

SKIPS, RESTORES = 10, 3  # in a row, then the run ends
NOT_STOP = "With training.on_not_finite such steps are left out, or a checkpoint is restored."


class NotFinite:
    """Follows ``training.on_not_finite`` after every update: before it nobody has waited for the step's numbers.

    ``stop`` ends the run; the newest checkpoint is from before. ``skip`` leaves the step out: parameters, moments
    and the optimizer's count stay as they were, and the next samples come. ``restore`` goes back to parameters and
    moments of the newest whole checkpoint, and on with the next samples: those since that checkpoint are not seen
    again, so what led to the numbers is left out too. Steps are counted on, and the records say what became of them.

    Args:
        workspace, engine: of the run.
        writer: of its checkpoints.
    """

    def __init__(self, workspace: Workspace, engine: Engine, writer: CheckpointWriter) -> None:
        self._workspace, self._engine, self._writer = workspace, engine, writer
        self._mesh = workspace.domain.mesh
        self._policy = workspace.config.training.on_not_finite
        self._in_a_row = 0  # steps without an update

    def before_update(self) -> Snapshot | None:
        """What the update is going to change, where the policy is to skip."""
        return self._engine.snapshot() if self._policy == "skip" else None

    def after_update(
        self,
        step: int,
        losses: Sequence[float],
        norms: Sequence[float],
        micros: Sequence[MicroBatch],
        before: Snapshot | None,
    ) -> str:
        """``applied``, or what was done where loss or gradient are not finite: ``skipped``, ``restored``. Collective.

        Args:
            step: its number.
            losses, norms: that all ranks have found.
            micros: the step's micro-batches.
            before: what `before_update` gave.

        Raises:
            FloatingPointError: the policy is to stop, or has led nowhere.
            NoProgressError: restoring has led nowhere.
        """
        seen = {"loss": losses, "norm of the gradient": norms}
        found = [(what, one) for what, ones in seen.items() for one in ones if not is_sound(one)]
        if not found:
            self._in_a_row = 0
            return "applied"
        what, value = found[0]
        told = self._told(what, value, step, micros)
        self._in_a_row += 1
        if self._policy == "restore":
            return self._restore(step, told)
        if before is None:
            raise FloatingPointError(f"{told} {NOT_STOP}")
        if self._in_a_row > SKIPS:
            raise FloatingPointError(f"{told} {SKIPS} steps in a row were left out, in vain.")
        self._engine.put_back(before)
        self._say(f"{told} The step is left out.")
        return "skipped"

    def _restore(self, step: int, told: str) -> str:
        self._writer.finish()
        resumed = resume(self._workspace, self._engine, up_to=step)
        self._writer.passed_over |= resumed.passed_over
        if not resumed.step:
            raise FloatingPointError(f"{told} There is no checkpoint yet to restore.")
        if self._in_a_row > RESTORES:
            raise NoProgressError(f"{told} A checkpoint was restored {RESTORES} times in a row, in vain.")
        self._say(f"{told} Weights and moments are those of step {resumed.step} again.")
        return "restored"

    def _told(self, what: str, value: float, step: int, micros: Sequence[MicroBatch]) -> str:
        variables = [one.name for one in self._workspace.contract.channels.targets]
        return report(what, value, step, micros, variables, self._mesh)

    def _say(self, text: str) -> None:
        if self._mesh.rank == 0:
            print(f"faconv: {text}", file=sys.stderr)
