"""The training loop: read ahead, forward, backward, step, record."""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial

import torch

from ..config import RunConfig
from ..data.samples import Batch, ReadAhead, Windows
from ..data.store import Store
from ..errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_STOPPED
from ..model.arithmetic import arithmetic
from ..model.losses import Loss
from ..model.state import NetworkState
from ..observe import READING, SAVING, Clock
from ..spatial.mesh import ProcessMesh
from .carried import CarriedStates
from .checkpoint import CheckpointWriter, SaveFailedError
from .engine import Engine, size_of
from .faults.claim import Claim, claimed
from .faults.drift import DriftCheck
from .faults.health import MicroBatch
from .faults.not_finite import NotFinite
from .faults.signals import StepEnd, StopRequest, check_time_limit, grace_s, job_left_s
from .faults.starts import counted_start, made_progress
from .fit import check_store, least_bytes, windows_over_gaps
from .free_run import feedback_for
from .looks import NONE, Looks
from .machines import machines_of, peak_memory_gib
from .objective import losses_of
from .reading import reader, requests
from .records import Recorder, StepRecord, beginning, ending, look_is_missing, recording
from .resume import bring_back, contract_of_run, resume
from .schedule import Leg, Rule, learning_rate, legs_of
from .setup import Workspace, build_network, order_of
from .start_from import Beginning
from .validation import Validation

ASKED_S = 2.0  # a step that takes longer looks between micro-batches whether there is time for the rest of it
FOUND = (
    "loss", "forecast_loss", "embedding_loss", "gradient_norm", "data_share", "exchange_share", "reduction_share",
    "peak_memory_gib",
)  # fmt: skip
"""In each step, by each rank; see `StepRecord`."""
UNSAVED = 3  # saves in a row that may fail before a run ends: until then it may lose so many intervals


def train(
    config: RunConfig,
    mesh: ProcessMesh,
    *,
    strict: bool = False,
    extend: Rule | None = None,
    stop: StopRequest | None = None,
    counted: bool = False,
) -> int:
    """Trains a run to its last step, from its newest whole checkpoint if there is one. Collective.

    Args:
        strict: refuse a damaged checkpoint instead of going on from the one before it.
        extend: what the learning rate is beyond the last step that the run had; see `legs_of`.
        stop: one that has been listening since the process began. Default: listens from here on.
        counted: whether `count_start` was called for this start, before the ranks met.

    Returns:
        exit code: `EXIT_OK`, or `EXIT_STOPPED` where a signal asked to stop before the last step (`EXIT_INTERRUPTED`
        where it was Ctrl-C).

    Raises:
        InputError: config, store and mesh do not fit each other, or the store's data are not as it says.
        FloatingPointError: the loss is not a number.
        RunError: a checkpoint cannot be written, weights drift, or starting again leads nowhere.
    """
    here = mesh.rank == 0
    with ExitStack() as stack:
        stop = stop or stack.enter_context(StopRequest(grace_s(config.training)))
        stack.enter_context(counted_start(config, stop, here=here, counted=counted))
        store = Store.open(config.data.store)
        check_store(config, store)
        stack.enter_context(arithmetic(config.training.precision, mesh.device))
        claim = stack.enter_context(claimed(config.run_dir, here=here))  # from here on nobody else saves there
        workspace, engine = _made(config, store, mesh)
        windows = workspace.training_windows()
        resumed = resume(workspace, engine, strict=strict)
        legs = legs_of(config, resumed.legs, extend)
        done = resumed.step
        progress = partial(made_progress, config.run_dir)
        looks = mesh.from_first(here and done == config.training.steps and look_is_missing(config, done))
        if done >= config.training.steps and not looks:
            if here:
                _say_that_all_is_done(config, done, progress)
            return EXIT_OK
        order = order_of(config, windows)
        carried = CarriedStates.resumed(config, workspace.within, order, resumed, engine.activation_type)
        kept = workspace, engine, resumed, legs, carried
        writer = CheckpointWriter(*kept, before_commit=claim.check, on_commit=progress)
        stack.enter_context(closing(writer))
        machines = machines_of(mesh)
        recorder = stack.enter_context(recording(config, workspace.contract, done, here=here, machines=machines))
        asked = requests(config, order, mesh.replica, done)
        batches = stack.enter_context(ReadAhead(reader(workspace, windows), asked, depth=config.data.read_ahead))
        if here and not looks:
            _announce(workspace, engine, windows, done)
        code = Trainer(workspace, engine, batches, carried, recorder, writer, stop, claim, legs).run(done)
        if code == EXIT_OK and here:
            progress()  # also where all was done already but a look
        return code


def _made(config: RunConfig, store: Store, mesh: ProcessMesh) -> tuple[Workspace, Engine]:
    """What a run works with: by the contract of its checkpoints, or newly made, with another's weights if it wants."""
    contract, source = contract_of_run(config.run_dir, mesh), config.training.start_from
    before = Beginning.read(source, mesh) if source and contract is None else None
    cycle = bring_back(config.run_dir, contract, mesh)
    workspace = Workspace.of(config, store, mesh, contract, before.contract if before else None, cycle)
    network = build_network(config, workspace.contract.channels, workspace.contract.grid)
    if before is not None:
        told = before.fill(network, config.model, workspace.contract.channels, mesh)
        if mesh.rank == 0:
            print(f"{config.run_dir}: {told}", file=sys.stderr)
    return workspace, Engine(network, mesh, config.training)


def _say_that_all_is_done(config: RunConfig, done: int, progress: Callable[[], None]) -> None:
    progress()
    told = f"{config.run_dir} is already at step {done}; raise training.steps, with --extend, to train on"
    print(told, file=sys.stderr)


def _announce(workspace: Workspace, engine: Engine, windows: Windows, done: int) -> None:
    parameters = sum(map(size_of, engine.network.parameters()))
    rank_gib = least_bytes(workspace.config, workspace.domain.cuts) / 2**30
    left_out = windows_over_gaps(workspace.store, workspace.training_spans, windows.window)
    told = beginning(workspace.config, workspace.contract, windows, left_out, parameters, rank_gib, done)
    print(told, file=sys.stderr, flush=True)


class Trainer:
    """Steps through a run; made by `train`."""

    def __init__(
        self,
        workspace: Workspace,
        engine: Engine,
        batches: Iterator[Batch],
        carried: CarriedStates,
        recorder: Recorder | None,
        writer: CheckpointWriter,
        stop: StopRequest,
        claim: Claim,
        legs: tuple[Leg, ...],
    ) -> None:
        self._workspace, self._config, self._domain = workspace, workspace.config, workspace.domain
        self._mesh, self._activity = workspace.domain.mesh, workspace.domain.mesh.activity
        self._engine, self._batches, self._carried, self._recorder = engine, iter(batches), carried, recorder
        self._writer, self._stop, self._claim, self._legs = writer, stop, claim, legs
        self._unsaved = 0  # saves in a row that failed
        self._step_s: float | None = None  # what the last step took the slowest rank; 0 for the first of a start
        self._clock = Clock(self._activity)
        every = workspace.config.training.compare_replicas_every
        self._drift = DriftCheck(engine.network, self._mesh, every)
        self._not_finite = NotFinite(workspace, engine, writer)
        self._validation = Validation(workspace, engine)

    def run(self, done: int) -> int:
        """All steps that are left, with checkpoints on the way and at the end; the exit code."""
        last = self._config.training.steps
        self._stop.hold_interrupts(done, speaks=self._mesh.rank == 0)
        asked = max(number for (number,) in self._mesh.gathered([self._stop.number]))
        if asked:
            check_time_limit(int(asked), self._config.training.usr_grace_s)
            return self._leave(done, StepEnd(int(asked), left_s=0.0, save_s=0.0, written=True))
        code = self._look(done)  # a signal may have come between the step and this
        for step in range(done + 1, last + 1):
            if code is not None:
                return code
            record, end = self._step(step)
            if record is None:  # the step was given up: as if it had not begun
                with self._activity.during(SAVING):
                    return self._leave(step - 1, end)
            if self._recorder is not None:
                self._claim.check()
                self._recorder.write(record)
            self._drift.after_step(step)
            with self._activity.during(SAVING):
                self._save_if_due(step, end)
                self._stop.kept_step = self._writer.saved_step
                if end.signal or end.time_is_up:
                    return self._leave(step, end)
            code = self._look(step)
        return self._ended(last) if code is None else code

    def _ended(self, step: int) -> int:
        """With all its steps, or because it gets no better."""
        with self._activity.during(SAVING):
            if self._writer.newest_step != step:
                self._save(step)
            self._writer.finish()
        if self._recorder is not None:
            print(ending(self._config, step, self._recorder.last), file=sys.stderr)
        return EXIT_OK

    def _look(self, step: int) -> int | None:
        """At the validation period, if it is due, after the step is saved where that is: what goes on from there makes
        up for a look that was given up. The exit code, if the run ends with it."""
        training = self._config.training
        if not training.looks_after(step):
            return None
        looks = Looks() if self._recorder is None else self._recorder.looks
        if not self._mesh.from_first(step in looks.scores):
            ends: list[StepEnd] = []
            found = self._validation.look(partial(self._may_go_on, ends))
            if found is None:
                with self._activity.during(SAVING):
                    return self._leave(step, ends[-1])
            if self._recorder is not None:
                self._claim.check()
                assert found.embedding is not None, "the first rank has it"
                self._recorder.write_look(step, found.skills, found.embedding)
        verdict = self._mesh.from_first(looks.verdict(step, training.stop_after) if self._mesh.rank == 0 else NONE)
        if verdict.best and training.keep_best:
            with self._activity.during(SAVING):
                self._tried(partial(self._keep_best, step), last=False)
        return self._ended(step) if verdict.stop else None

    def _may_go_on(self, ends: list[StepEnd], seconds: float) -> bool:
        """With what takes so long; adds to ``ends`` where all ranks stand. Collective."""
        ends.append(self._agreed(seconds))
        return not (ends[-1].signal or ends[-1].time_is_up)

    def _keep_best(self, step: int) -> None:
        if self._recorder is not None:
            self._recorder.flush()
        self._writer.keep_best(step)

    def _save_if_due(self, step: int, end: StepEnd) -> None:
        training = self._config.training
        every = training.checkpoint_every
        due = (step == training.steps or (every and step % every == 0)) and end.may_save
        due = due and self._writer.newest_step != step  # the best one is there already
        if self._writer.pending and (end.written or due):
            self._tried(self._writer.finish, last=False)
        if due:
            self._tried(partial(self._save, step), last=step == training.steps)

    def _tried(self, save: Callable[[], None], *, last: bool) -> None:
        """A save on the way that fails is told, and the next one tried; the last one, or several in a row, raise."""
        saved = self._writer.saved_step
        try:
            save()
        except SaveFailedError as error:
            self._unsaved += 1
            if last or self._unsaved == UNSAVED:
                raise
            if self._mesh.rank == 0:
                print(f"faconv: {error} The run goes on meanwhile.", file=sys.stderr)
        if self._writer.saved_step != saved:
            self._unsaved = 0

    def _save(self, step: int) -> None:
        if self._recorder is not None:
            self._recorder.flush()
        self._writer.save(step)

    def _leave(self, step: int, end: StepEnd) -> int:
        """Saves, if the time left allows it, and says how to go on: after the last step, too, if a look is left."""
        if self._writer.newest_step != step and end.may_save:
            self._tried(self._writer.finish, last=False)  # one that failed must not cost this one
            self._save(step)
        self._writer.finish()
        saved = self._writer.saved_step
        if step == saved == self._config.training.steps and not self._config.training.looks_after(step):
            return EXIT_OK
        if self._mesh.rank == 0:
            name = signal.Signals(end.signal).name if end.signal else f"the time limit, {end.job_left_s:.0f} s ahead,"
            why = "" if saved == step else f" (a save takes {end.save_s:.0f} s, {end.left_s:.0f} s were left)"
            newest = f"the checkpoint of step {saved} is saved" if saved else "there is no checkpoint"
            print(
                f"faconv: stopped by {name} after step {step}; {newest}{why}. The same command goes on from there.",
                file=sys.stderr,
            )
        return EXIT_INTERRUPTED if end.signal == signal.SIGINT else EXIT_STOPPED

    def _step(self, step: int) -> tuple[StepRecord | None, StepEnd]:
        """One optimizer step, numbered from 1.

        No record: between two micro-batches there was too little time left for the rest of them, as far as the step
        before tells. Of a start's first step, which compiles, nothing is known; and short ones are not interrupted.
        """
        start = time.perf_counter()
        self._activity.step = step
        rate = learning_rate(self._config.training, self._legs, step - 1)
        micros: list[MicroBatch] = []
        for micro in range(self._config.training.accumulation):
            if micro:
                if self._step_s and self._step_s > ASKED_S:  # the same on all ranks
                    end = self._agreed(self._step_s * (1 - micro / self._config.training.accumulation))
                    if end.comes_too_late:
                        return None, end
                self._engine.step(rate)  # ends the micro-batch before; DeepSpeed updates after the last one only
            micros.append(self._backward(self._next_batch(), self._carried.before(step - 1, micro)))
        with self._activity.during("optimizer step"):
            before = self._not_finite.before_update()
            self._engine.step(rate)
            found, end = self._found(micros, start)
            seen = found["loss"], found["gradient_norm"]
            update = self._not_finite.after_update(step, *seen, micros, before)
            self._carried.end_step(applied=update == "applied")
        self._step_s = 0.0 if self._step_s is None else end.step_s  # the first is no measure of the next
        return self._record(step, rate, found, end.step_s, update), end

    def _next_batch(self) -> Batch:
        with self._clock.timing("data", READING):
            batch = next(self._batches)
        return batch.to(self._mesh.device, non_blocking=True)

    def _backward(self, batch: Batch, state: NetworkState | None) -> MicroBatch:
        """Forward and backward of one micro-batch; nothing waits for the device."""
        with self._activity.during("forward"):
            loss, micro = self._forward(batch, state)
        with self._activity.during("backward"):
            self._engine.backward(loss)
        return micro

    def _forward(self, batch: Batch, state: NetworkState | None) -> tuple[Loss, MicroBatch]:
        """What the network has said ends here: backward has its memory."""
        network, domain = self._engine.network, self._domain
        training = self._config.training
        feedback = feedback_for(batch, self._config.data.window, through=training.through_leads)
        given = batch.inputs_BTCYX, batch.year_fraction_BT, domain
        output = self._engine.forward(*given, state=state, feedback=feedback)
        self._carried.after(output.window_state)
        losses = losses_of(network, output, batch, domain, training.lead_weights)
        found = torch.stack([losses.total.value, losses.forecast.value, losses.embedding.value])
        return losses.total, MicroBatch.of(found, output, batch)

    def _found(self, micros: Sequence[MicroBatch], start: float) -> tuple[dict[str, tuple[float, ...]], StepEnd]:
        """Some numbers of a step, of every rank, and where all ranks stand. Collective.

        In a step the processor waits for the device here and nowhere else; all that was found goes in one message.

        Args:
            start: when the step began, by `time.perf_counter`.
        """
        losses = torch.stack([micro.losses for micro in micros]).mean(0)
        of_device = torch.cat([losses, self._engine.gradient_norm.reshape(1).to(losses)]).tolist()
        seconds = time.perf_counter() - start
        waited = [
            self._clock.take("data"),
            self._domain.clock.take("exchange"),
            self._engine.take_communication_s(),
        ]
        mine = [*of_device, *(one / seconds for one in waited), peak_memory_gib(self._mesh.device)]
        columns = list(zip(*self._mesh.gathered([*mine, *self._standing(seconds)]), strict=True))
        return dict(zip(FOUND, columns, strict=False)), StepEnd.of(columns[len(FOUND) :])

    def _record(
        self, step: int, rate: float, found: dict[str, tuple[float, ...]], seconds: float, update: str
    ) -> StepRecord:
        samples, means = self._config.global_batch, {name: sum(ones) / len(ones) for name, ones in found.items()}
        own = {"gradient_norm": found["gradient_norm"][0], "peak_memory_gib": max(found["peak_memory_gib"])}
        return StepRecord(
            step=step,
            learning_rate=rate,
            samples=samples,
            seconds=seconds,
            samples_per_s=samples / seconds,
            update=update,
            **(means | own),
        )

    def _standing(self, step_s: float) -> list[float]:
        """What this rank knows of a `StepEnd`."""
        stop, writer = self._stop, self._writer
        return [writer.written, stop.number, stop.left_s, writer.last_save_s, step_s, job_left_s()]

    def _agreed(self, rest_s: float) -> StepEnd:
        """Before something that takes so long: where all ranks stand. Collective."""
        return StepEnd.of(list(zip(*self._mesh.gathered(self._standing(rest_s)), strict=True)))
