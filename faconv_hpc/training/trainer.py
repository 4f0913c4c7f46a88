"""The training loop: read ahead, forward, backward, step, record."""

import resource
import time
from collections.abc import Iterator

import torch

from ..config import RunConfig
from ..data.samples import Batch, ReadAhead, Windows, sample_order
from ..model.losses import Loss
from ..observe import Clock
from ..spatial.mesh import ProcessMesh
from .checkpoint import resume, save_checkpoint
from .engine import Engine
from .records import Recorder, StepRecord, recording
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
    engine = Engine(build_network(config, windows), mesh, config.training)
    done = resume(config, engine)
    requests = _requests(config, windows, mesh.replica, done)
    with (
        recording(config, done, here=mesh.rank == 0) as recorder,
        ReadAhead(windows.read, requests, depth=config.data.read_ahead) as batches,
    ):
        Trainer(workspace, engine, batches, recorder).run(done)


def _requests(config: RunConfig, windows: Windows, replica: int, done: int) -> Iterator[list[int]]:
    """Which windows each micro-batch of this replica reads, from the first step that is not done."""
    for step in range(done, config.training.steps):
        for micro in range(config.training.accumulation):
            position, count = sample_positions(config, step, micro, replica)
            yield sample_order(config.training.seed, position, count, len(windows))


class Trainer:
    """Steps through a run; made by `train`."""

    def __init__(
        self, workspace: Workspace, engine: Engine, batches: Iterator[Batch], recorder: Recorder | None
    ) -> None:
        self._config, self._domain = workspace.config, workspace.domain
        self._engine, self._batches, self._recorder = engine, iter(batches), recorder
        self._clock = Clock()

    def run(self, done: int) -> None:
        """All steps that are left, with checkpoints on the way and at the end."""
        training = self._config.training
        for step in range(done, training.steps):
            record = self._step(step)
            if self._recorder is not None:
                self._recorder.write(record)
            every = training.checkpoint_every
            if record.step == training.steps or (every and record.step % every == 0):
                save_checkpoint(self._config, self._engine, record.step, writes=self._recorder is not None)

    def _step(self, step: int) -> StepRecord:
        start = time.perf_counter()
        rate = learning_rate(self._config, step)
        losses = [self._micro_step(rate) for _ in range(self._config.training.accumulation)]
        loss, forecast = (sum(values) / len(losses) for values in zip(*losses, strict=True))
        return self._record(step + 1, float(loss), float(forecast), rate, time.perf_counter() - start)

    def _micro_step(self, rate: float) -> tuple[float, float]:
        """One micro-batch: forward, loss, backward; DeepSpeed updates after the last of a step."""
        with self._clock.timing("data"):
            batch = next(self._batches)
        batch = batch.to(self._domain.mesh.device)
        output = self._engine.forward(batch.inputs_BTCYX, batch.year_fraction_BT, self._domain)
        network = self._engine.network
        forecast = network.forecast_loss(output, batch.target_BTCYX, self._domain, batch.valid_BTCYX)
        loss = forecast + network.embedding_loss(output, batch.inputs_BTCYX, self._domain)
        self._check_finite(loss, batch)
        self._engine.backward(loss)
        self._engine.step(rate)
        return float(loss.value), float(forecast.value)

    def _check_finite(self, loss: Loss, batch: Batch) -> None:
        """All tiles of a replica hold the same value, and so find the same."""
        if not torch.isfinite(loss.value):
            raise FloatingPointError(
                f"the loss of windows {list(batch.windows)} is {float(loss.value)}: it must be a finite number. "
                f"Lower training.learning_rate, or look at these frames with `faconv data inspect`."
            )

    def _record(self, step: int, loss: float, forecast: float, rate: float, seconds: float) -> StepRecord:
        mesh, samples = self._domain.mesh, self._config.global_batch
        waited = [
            self._clock.take("data"),
            self._domain.clock.take("exchange"),
            self._engine.take_communication_s(),
        ]
        loss, forecast, *shares = mesh.average([loss, forecast, *(value / seconds for value in waited)])
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
            peak_memory_gib=mesh.largest(_peak_memory_gib(mesh.device)),
        )


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
