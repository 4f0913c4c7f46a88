"""The training loop: read ahead, forward, backward, step, record."""

import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..config import RunConfig
from ..data.samples import Batch, ReadAhead, Windows, sample_order
from ..observe import Clock
from ..spatial.mesh import ProcessMesh
from .checkpoint import resume, save_checkpoint
from .engine import Engine
from .guard import ReplicaGuard
from .records import Recorder, StepRecord, claimed, recording
from .setup import Workspace, build_network, check_config_fits, learning_rate, sample_positions


def train(config: RunConfig, mesh: ProcessMesh) -> None:
    """Trains a run to its last step, from its newest checkpoint if there is one. Collective.

    Raises:
        InputError: config, store and mesh do not fit each other, or the store's data are not as it says.
        FloatingPointError: the loss is not a number.
    """
    workspace = Workspace.open(config, mesh)
    check_config_fits(config, workspace.store)
    windows = workspace.windows(workspace.training_frames)
    with claimed(config.run_dir, here=mesh.rank == 0):
        engine = Engine(build_network(config, windows), mesh, config.training)
        done = resume(workspace, engine)
        if done < config.training.steps:
            _train_from(done, workspace, windows, engine)
        elif mesh.rank == 0:
            print(f"{config.run_dir} is already at step {done}; raise training.steps to train on", file=sys.stderr)


def _train_from(done: int, workspace: Workspace, windows: Windows, engine: Engine) -> None:
    config, mesh = workspace.config, workspace.domain.mesh
    requests = _requests(config, windows, mesh.replica, done)
    with (
        recording(config, done, here=mesh.rank == 0) as recorder,
        ReadAhead(partial(_read, windows, mesh.device), requests, depth=config.data.read_ahead) as batches,
    ):
        Trainer(workspace, engine, batches, recorder).run(done)


def _requests(config: RunConfig, windows: Windows, replica: int, done: int) -> Iterator[list[int]]:
    """Which windows each micro-batch of this replica reads, from the first step that is not done."""
    for step in range(done, config.training.steps):
        for micro in range(config.training.accumulation):
            position, count = sample_positions(config, step, micro, replica)
            yield sample_order(config.training.seed, position, count, len(windows))


def _read(windows: Windows, device: torch.device, indices: Sequence[int]) -> Batch:
    """A batch in memory from which a GPU copies while it computes."""
    batch = windows.read(indices)
    return batch.pin_memory() if device.type == "cuda" else batch


def check_finite(value: float, name: str, step: int, windows: Sequence[int]) -> None:
    """Every rank checks the same value and finds the same.

    Raises:
        FloatingPointError: the value is infinite or not a number.
    """
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {name} is {value} at step {step}, in windows {list(windows)}: it must be a finite number. "
            f"Lower training.learning_rate, or look at these frames with `faconv data inspect`."
        )


class Trainer:
    """Steps through a run; made by `train`."""

    def __init__(
        self, workspace: Workspace, engine: Engine, batches: Iterator[Batch], recorder: Recorder | None
    ) -> None:
        self._workspace, self._config, self._domain = workspace, workspace.config, workspace.domain
        self._engine, self._batches, self._recorder = engine, iter(batches), recorder
        self._clock = Clock()
        every = workspace.config.training.compare_replicas_every
        self._guard = ReplicaGuard(engine.network, workspace.domain.mesh, every)

    def run(self, done: int) -> None:
        """All steps that are left, with checkpoints on the way and at the end."""
        training = self._config.training
        for step in range(done, training.steps):
            record = self._step(step)
            if self._recorder is not None:
                self._recorder.write(record)
            self._guard.after_step(record.step)
            every = training.checkpoint_every
            if record.step == training.steps or (every and record.step % every == 0):
                save_checkpoint(self._workspace, self._engine, record.step)

    def _step(self, step: int) -> StepRecord:
        """One optimizer step: the numbers leave the device once, before the update that a NaN would spoil."""
        start = time.perf_counter()
        rate = learning_rate(self._config, step)
        losses: list[Tensor] = []
        windows: list[int] = []
        for micro in range(self._config.training.accumulation):
            if micro:
                self._engine.step(rate)  # ends the micro-batch before; DeepSpeed updates after the last one only
            batch = self._next_batch()
            losses.append(self._backward(batch))
            windows += batch.windows
        loss, forecast = torch.stack(losses).mean(0).tolist()
        check_finite(loss, "loss", step + 1, windows)
        self._engine.step(rate)
        check_finite(self._engine.gradient_norm, "norm of the gradient", step + 1, windows)
        return self._record(step + 1, loss, forecast, rate, time.perf_counter() - start)

    def _next_batch(self) -> Batch:
        with self._clock.timing("data"):
            batch = next(self._batches)
        return batch.to(self._domain.mesh.device, non_blocking=True)

    def _backward(self, batch: Batch) -> Tensor:
        """Forward and backward of one micro-batch: (loss, its forecast part), still on the device."""
        network, domain = self._engine.network, self._domain
        output = self._engine.forward(batch.inputs_BTCYX, batch.year_fraction_BT, domain)
        forecast = network.forecast_loss(output, batch.target_BTCYX, domain, batch.valid_BTCYX)
        loss = forecast + network.embedding_loss(output, batch.inputs_BTCYX, domain, batch.known_BTCYX)
        self._engine.backward(loss)
        return torch.stack([loss.value, forecast.value])

    def _record(self, step: int, loss: float, forecast: float, rate: float, seconds: float) -> StepRecord:
        mesh, samples = self._domain.mesh, self._config.global_batch
        waited = [
            self._clock.take("data"),
            self._domain.clock.take("exchange"),
            self._engine.take_communication_s(),
        ]
        peak_gib = _peak_memory_gib(mesh.device)
        rows = mesh.gathered([loss, forecast, *(value / seconds for value in waited), peak_gib])
        loss, forecast, *shares, _ = (sum(column) / mesh.ranks for column in zip(*rows, strict=True))
        return StepRecord(
            step=step,
            loss=loss,
            forecast_loss=forecast,
            gradient_norm=self._engine.gradient_norm,
            learning_rate=rate,
            samples=samples,
            seconds=seconds,
            samples_per_s=samples / seconds,
            data_share=shares[0],
            exchange_share=shares[1],
            reduction_share=shares[2],
            peak_memory_gib=max(row[-1] for row in rows),
        )


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
