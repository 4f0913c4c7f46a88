"""The config of a run: frozen, strict, and judged before any rank is started."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .data.dates import as_ranges
from .data.variables import ChosenRole
from .errors import InputError
from .model.rules import CELL_OPTIONS, Cell

Count = Annotated[int, Field(ge=1)]
Dates = Annotated[tuple[str, ...], BeforeValidator(as_ranges)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Harmonics = Annotated[int, Field(ge=0, le=12)]
LatBoundary = Literal["pole", "periodic", "zero", "replicate"]
_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml's, where PyYAML was built with it: four times as fast


class Section(BaseModel):
    """A part of the config: unknown keys are refused, values cannot be changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def to_yaml(self) -> str:
        """All of it, defaults included, as a file that can be loaded again."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


class MeshConfig(Section):
    """How the ranks are arranged: replicas see other samples, lat x lon tiles share one globe."""

    replicas: Count = Field(1, description="copies of the globe, each with samples of its own")
    lat: Count = Field(1, description="tiles from north to south")
    lon: Count = Field(1, description="tiles from west to east")

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.replicas * self.lat * self.lon

    @classmethod
    def parse(cls, text: str) -> "MeshConfig":
        """From ``LATxLON`` or ``REPLICASxLATxLON``, such as 2x3 or 2x1x2; raises InputError."""
        match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)x([1-9]\d*)", text)
        if match is None:
            raise InputError(
                f"a layout is LATxLON or REPLICASxLATxLON, got {text!r}. Write for example 2x3 (2 tiles along lat, 3 "
                f"along lon) or 2x1x2 (2 replicas of 1 x 2 tiles)."
            )
        replicas, lat, lon = match.groups(default="1")
        return cls(replicas=int(replicas), lat=int(lat), lon=int(lon))

    def __str__(self) -> str:
        """What `parse` takes; replicas only where there are several."""
        return f"{self.replicas}x" * (self.replicas > 1) + f"{self.lat}x{self.lon}"


class PeriodsConfig(Section):
    """Which dates are for what; no frame is for two things."""

    train: Dates = Field((), description="dates such as 1979/2015, or sequences, or a list; default: all that is left")
    validation: Dates = Field((), description="dates or sequences that a run looks at while it trains")
    test: Dates = Field((), description="dates or sequences that `faconv evaluate` forecasts, kept from training")


class DataConfig(Section):
    """What is read, and what the network is told about it."""

    store: Path = Field(description="directory made by `faconv data prepare`")
    variables: tuple[str, ...] | None = Field(None, description="those of the store to take; default: all")
    roles: dict[str, ChosenRole] = Field({}, description="name: forcing (input only) or diagnostic (output only)")
    log1p: dict[str, Scale] = Field({}, description="name: s, for a network that sees log(1 + x / s) instead of x")
    anomalies: dict[str, Harmonics] = Field(
        {}, description="name: k, for a network that sees x less its annual cycle of k harmonics in each cell"
    )
    loss_weights: dict[str, Weight] = Field(
        {}, description="name, or pattern such as z*: weight of its error; others 1"
    )
    window: Count = Field(8, description="time steps of one sample")
    forcings: tuple[str, ...] = Field(
        ("sin_latitude", "cos_longitude", "sin_longitude", "insolation", "next_insolation"),
        description="known functions of place and time, added to the input",
    )
    lat_boundary: LatBoundary | tuple[LatBoundary, LatBoundary] = Field(
        "pole", description="rule beyond the first and the last row, or a pair: beyond the first, beyond the last"
    )
    lon_boundary: Literal["periodic", "zero", "replicate"] = Field("periodic", description="rule beyond the columns")
    periods: PeriodsConfig = PeriodsConfig()
    read_ahead: Count = Field(2, description="micro-batches read before they are needed")

    @field_validator("lat_boundary", mode="before")
    @classmethod
    def _one_rule_or_two(cls, value: Any) -> Any:
        """Judged here, because of a union pydantic would list what is wrong with each of its members."""
        known = get_args(LatBoundary)
        sides = [value] if isinstance(value, str) else value
        if not isinstance(sides, list | tuple) or len(sides) not in (1, 2) or any(side not in known for side in sides):
            raise ValueError(
                f"one of {', '.join(known)}, or a pair of them for the first and the last row, got {value!r}"
            )
        return sides[0] if sides[0] == sides[-1] else tuple(sides)

    @field_validator("variables", "forcings")
    @classmethod
    def _named_once(cls, names: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        twice = sorted({name for name in names or () if (names or ()).count(name) > 1})
        if twice:
            raise ValueError(f"every name once, but {', '.join(twice)} stands there more often")
        if info.field_name == "variables" and names is not None and not names:
            raise ValueError("at least one variable; leave the key out to take all of the store")
        return names


class ModelConfig(Section):
    """The network; see FAConvLSTMNetwork and FAConvLSTM2d for the meaning of each part."""

    cell: Cell = Field("faconvlstm", description="what layers are; the others are there to be compared with it")
    hidden_channels: Count = Field(32, description="C_h of every layer")
    layers: Count = Field(2, description="how many are stacked")
    history: Count = Field(1, description="frames that layers see at each step: its own, and those before it")
    residual: bool = Field(True, description="layers add to what they are given, and the forecast sees the inputs")
    kernel_size: Count = Field(3, description="odd size of the kernels")
    dilations: tuple[Count, ...] = Field((1, 2, 4), description="one depthwise kernel for each")
    scale_factor: Count = Field(1, description="cells along a side that become one within, which costs less")
    bottleneck_channels: Count | None = Field(None, description="C_b; default: half of C_h")
    fuse: Literal["sum", "concat"] = Field("sum", description="how the dilations' results are joined")
    se_reduction: int = Field(4, ge=0, description="C_b is squeezed to so many times fewer channels; 0: no squeeze")
    peephole: bool = Field(True, description="whether the gates see the cell state")
    attention_every: int = Field(4, ge=0, description="axial attention every so many steps; 0: never")
    attention_heads: Count = Field(1, description="of the axial attention")
    attention_reduction: Count = Field(4, description="C_h is narrowed to so many times fewer channels to attend")
    attention_exchange: Literal["auto", "gather", "swap"] = Field("auto", description="auto: what moves fewer bytes")
    embedding_channels: Annotated[int, Field(ge=8, multiple_of=8, description="4 heads, an even number in each")] = 32
    embedding_past: Count = Field(8, description="steps that the embedding of one attends to, itself among them")
    embedding_leads: int = Field(2, ge=0, description="steps ahead of which it maps to the coarse field, too")
    embedding_weight: float = Field(0.02, ge=0, description="of the coarse fields' error in the loss")
    seasonal_encoding: bool = Field(True, description="whether the embedding is told the day of the year")
    coarse_shape: tuple[Count, Count] = Field((3, 6), description="regions whose means it is made of, and maps to")
    checkpoint_steps: int = Field(0, ge=0, description="time steps per recomputed segment; 0: store everything")
    kernels: Literal["eager", "compiled", "triton"] = Field(
        "compiled",
        description="compiled is several times faster; it needs g++, on a GPU it is torch.compile; triton: on a GPU "
        "kernels of our own, whose speed was not measured yet",
    )

    def takes(self, key: str) -> bool:
        """Whether a key that is a cell's own is this one's."""
        return key in CELL_OPTIONS[self.cell]

    @property
    def attends(self) -> bool:
        """Whether its layers have attention."""
        return self.takes("attention_every") and self.attention_every > 0


class TrainingConfig(Section):
    """How the network is fitted."""

    steps: Count = Field(description="optimizer steps")
    micro_batch: Count = Field(1, description="samples per replica and backward")
    accumulation: Count = Field(1, description="micro-batches per optimizer step")
    optimizer: Literal["adamw", "sgd", "soap"] = Field("adamw", description="under DeepSpeed; soap: at ZeRO 0")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay per step of the mean of squared gradients, but sgd's")
    learning_rate: float = Field(4e-3, gt=0, description="after the warm-up; then half a cosine down")
    final_learning_rate_share: Fraction = Field(0.02, description="what is left of it at the last step")
    warmup_steps: int = Field(20, ge=0, description="steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, description="of the optimizer")
    clip_norm: float = Field(1.0, ge=0, description="largest gradient norm; 0: no clipping")
    ema: float = Field(0.0, ge=0, lt=1, description="decay per step of a mean of the weights, which forecasts; 0: none")
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="what DeepSpeed ZeRO shards over all ranks")
    precision: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32", description="of activations; tf32: of products on a GPU alone; inputs, cell states and sums stay fp32"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of weights and of the order of samples")
    checkpoint_every: int = Field(500, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_last: Count = Field(3, description="newest checkpoints that are kept; older ones of this run are removed")
    keep_every: int = Field(0, ge=0, description="checkpoints of steps divisible by this stay for good; 0: none do")
    save_in_background: bool = Field(False, description="train on while a checkpoint is written")
    shard_mib: float = Field(16.0, ge=0, description="least size of a checkpoint's files: as many ranks write as that")
    on_not_finite: Literal["stop", "skip", "restore"] = Field(
        "stop", description="a loss or gradient that is no number: end, leave the step out, or go back to a checkpoint"
    )
    term_grace_s: float = Field(30.0, ge=0, description="seconds between SIGTERM and SIGKILL, as the cluster is set")
    usr_grace_s: float = Field(
        120.0, ge=0, le=65535, description="seconds between SIGUSR1 or 2 and SIGKILL, `--signal=USR1@120`"
    )
    give_up_after: int = Field(3, ge=0, description="starts in a row that save no checkpoint; 0: never give up")
    compare_replicas_every: int = Field(
        100, ge=0, description="steps between comparisons of all ranks' weights; 0: never"
    )
    timeout_s: float = Field(600.0, ge=10, le=10**7, description="a collective that takes longer is an error")
    validate_every: int = Field(0, ge=0, description="steps between looks at the validation period; 0: never")
    validate_leads: Count = Field(1, description="steps that it forecasts then, running freely")
    validate_samples: Count = Field(32, description="windows that it forecasts then, spread over the period")
    start_from: Path | None = Field(
        None, description="run, checkpoint or exported file whose weights a run begins with; variables may be others"
    )
    frozen: tuple[str, ...] = Field((), description="parameters to leave as they are, by name or pattern: layers.0.*")
    keep_best: bool = Field(True, description="the checkpoint of the best look stays as checkpoints/best")
    stop_after: int = Field(0, ge=0, description="looks in a row that are no better, after which it ends; 0: never")
    rollout: dict[Annotated[int, Field(ge=0)], Count] = Field(
        {}, description="steps done: leads from there on, trained through free runs; before the first, and default: 1"
    )
    stateful_windows: int = Field(
        0, ge=0, description="windows in a row that states are carried through, 1 to so many, as drawn; 0: none are"
    )
    lead_weights: tuple[Weight, ...] = Field(
        (), description="of leads 2, 3, ... in the loss, the last for all that follow; default: 1, like a step"
    )
    through_leads: bool = Field(True, description="gradients go back through leads; false: each learns by itself")
    input_noise: float = Field(
        0.0,
        ge=0,
        description="deviation of noise on the fields that are given in training, over the fields' own; 0: none",
    )
    tensorboard: bool = Field(False, description="also write TensorBoard events")

    @property
    def most_leads(self) -> int:
        """That a sample is ever trained for."""
        return max(self.rollout.values(), default=1)

    def looks_after(self, step: int) -> bool:
        """Whether the run looks at its validation period after a step."""
        return bool(self.validate_every and step and step % self.validate_every == 0)

    def leads_after(self, done: int) -> int:
        """For how many leads the step is trained that follows so many."""
        return self.rollout.get(max((step for step in self.rollout if step <= done), default=-1), 1)

    @field_validator("stateful_windows")
    @classmethod
    def _one_follows_none(cls, windows: int) -> int:
        if windows == 1:
            raise ValueError("0, or 2 and more: a window that is alone follows none, and no state is carried on")
        return windows

    @model_validator(mode="after")
    def _who_stops_looks(self) -> "TrainingConfig":
        if self.stop_after and not self.validate_every:
            raise ValueError(
                f"stop_after={self.stop_after} counts looks at the validation period, and there are none: "
                f"give validate_every a number of steps, too"
            )
        return self

    @model_validator(mode="after")
    def _leads_that_are_weighed_are_trained(self) -> "TrainingConfig":
        if self.lead_weights and self.most_leads == 1:
            raise ValueError(
                f"lead_weights={self.lead_weights} weighs leads from 2 on, and training.rollout trains none: give it "
                f"steps and leads, such as {{100: 3}}, or leave lead_weights out"
            )
        return self

    @model_validator(mode="after")
    def _warm_up_is_shorter_than_the_run(self) -> "TrainingConfig":
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be fewer than steps={self.steps}: "
                f"the learning rate would never reach its value. Lower warmup_steps"
            )
        return self


DECIDED = {
    **dict.fromkeys(("nodes", "ntasks", "ntasks-per-node"), "mesh and slurm.tasks_per_node"),
    **dict.fromkeys(("partition", "account", "qos", "constraint", "mem"), "the key of that name in section slurm"),
    "time": "slurm.time_min",
    "cpus-per-task": "slurm.cpus_per_task",
    "gpus-per-node": "slurm.gpus_per_node",
    **dict.fromkeys(("requeue", "no-requeue", "array", "open-mode", "output", "error", "chdir"), "faconv submit"),
    "signal": "training.usr_grace_s",
    "job-name": "the name of run_dir",
}
"""Options of sbatch that are not free, and what decides them."""


class SlurmConfig(Section):
    """How `faconv submit` and `faconv study` ask Slurm for the ranks; it decides nothing about a run's result."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # an account may be a number

    partition: str | None = Field(None, description="as sbatch's option")
    account: str | None = Field(None, description="as sbatch's option")
    qos: str | None = Field(None, description="as sbatch's option")
    constraint: str | None = Field(None, description="as sbatch's option")
    time_min: Count = Field(60, description="limit of one start, minutes or H:MM:SS; a longer run is requeued")
    tasks_per_node: Count = Field(4, description="ranks on one node, one per GPU")
    gpus_per_node: int = Field(0, ge=0, description="GPUs asked for on each node; 0: none are")
    cpus_per_task: Count = Field(1, description="cores of a rank")
    mem: str | None = Field(None, description="memory of a node, such as 200GB; default: what the cluster gives")
    setup: tuple[str, ...] = Field((), description="shell lines before the ranks start, such as `module load cuda`")
    sbatch: dict[str, str | int | bool] = Field({}, description="any other option of sbatch, such as reservation: name")

    @field_validator("time_min", mode="before")
    @classmethod
    def _in_minutes(cls, value: Any) -> Any:
        """As sbatch writes it, too: H:MM:SS or D-H:MM:SS."""
        found = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", value) if isinstance(value, str) else None
        if found is None:
            return value
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return (days * 24 + hours) * 60 + minutes + (seconds > 0)

    @field_validator("sbatch")
    @classmethod
    def _not_decided_elsewhere(cls, options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        options = {name.replace("_", "-").lstrip("-"): value for name, value in options.items()}
        wrong = [name for name in options if not re.fullmatch(r"[a-z][a-z0-9-]+", name)]
        if wrong:
            raise ValueError(f"names of sbatch's long options, such as reservation, got {', '.join(map(repr, wrong))}")
        for name in options:
            if name in DECIDED:
                raise ValueError(f"{name} is decided by {DECIDED[name]}; leave it out here")
        return options

    def nodes(self, ranks: int) -> int:
        """Nodes for so many ranks; raises InputError where they do not fill the nodes evenly."""
        per_node = min(self.tasks_per_node, ranks)
        if ranks % per_node:
            raise InputError(
                f"{ranks} ranks do not fill nodes of {per_node} evenly (slurm.tasks_per_node={self.tasks_per_node}). "
                f"Choose a number that divides {ranks}, or another mesh."
            )
        return ranks // per_node


class RunConfig(Section):
    """Everything that decides a run's result, and how Slurm is asked for its ranks."""

    run_dir: Path = Field(description="records, checkpoints and figures go here")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="what ranks compute on; auto: a GPU each where there are some"
    )
    mesh: MeshConfig = MeshConfig()
    data: DataConfig
    model: ModelConfig = ModelConfig()
    training: TrainingConfig
    slurm: SlurmConfig = SlurmConfig()

    @model_validator(mode="after")
    def _attention_is_reached(self) -> "RunConfig":
        every = self.model.attention_every
        if self.model.attends and every > self.data.window:
            raise ValueError(
                f"model.attention_every={every} is more than the {self.data.window} steps of a window (data.window), "
                f"so attention would never run. Lower it, or write 0 to leave attention out"
            )
        return self

    @model_validator(mode="after")
    def _history_is_reached(self) -> "RunConfig":
        if self.model.history > self.data.window:
            raise ValueError(
                f"model.history={self.model.history} is more than the {self.data.window} steps of a window "
                f"(data.window), so no step would have as many frames. Lower it, or use a longer window"
            )
        return self

    @model_validator(mode="after")
    def _attention_keeps_its_period(self) -> "RunConfig":
        every, window = self.model.attention_every, self.data.window
        if self.training.stateful_windows and self.model.attends and window % every:
            raise ValueError(
                f"training.stateful_windows={self.training.stateful_windows} carries states from window to window, and "
                f"attention runs every {every} steps (model.attention_every): a window of {window} steps (data.window) "
                f"would break its period. Choose a window that is a multiple of {every}"
            )
        return self

    @model_validator(mode="after")
    def _a_start_is_longer_than_its_end(self) -> "RunConfig":
        grace_s, limit_s = self.training.usr_grace_s, 60 * self.slurm.time_min
        if grace_s >= limit_s:
            raise ValueError(
                f"training.usr_grace_s={grace_s:g} s before a time limit of {limit_s} s (slurm.time_min) leave no time "
                f"to train. Lower it, or give more time"
            )
        return self

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step, over all replicas and micro-batches."""
        return self.mesh.replicas * self.training.micro_batch * self.training.accumulation
