"""What a scaling study is: its config, its points, and the rules that make them comparable."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, field_validator, model_validator

from ..config import Count, MeshConfig, RunConfig, Section, SlurmConfig
from ..config_file import load_config, validated
from ..errors import InputError

POINTS, STORES = "points", "stores"
SPARE_FRAMES = 8  # windows of a synthetic store, unless the study says how many frames
DECIDED = {
    "run_dir": "every point has one of its own",
    "mesh": "the point's `mesh` says it",
    "training.steps": "warm_up_steps + repeats x steps_per_repeat",
    "training.validate_every": "nothing else is done while steps are timed",
    "training.checkpoint_every": "nothing is saved while steps are timed",
    "training.give_up_after": "a point that is started again by the cluster would take its time limit once more",
    "training.term_grace_s": "a point that is stopped begins anew",
    "training.usr_grace_s": "a point that is stopped begins anew",
}
"""Keys of a run that the study sets, and why."""
OF_THE_STORE = {
    "data.store": "a store is made for each point (cells_per_rank)",
    "data.variables": "a store that is made has `channels` of its own (cells_per_rank)",
    "data.periods": "a store that is made is trained on whole (cells_per_rank)",
}
ASKED_OF_SLURM = ("tasks_per_node", "cpus_per_task", "gpus_per_node")
"""What of the Slurm section may change how long a step takes."""


class Cluster(Protocol):
    """Where the points of a study run.

    A point saves nothing before its last step, so a job that the cluster started again would begin from the first
    one. `training.give_up_after` lets it end instead: a time limit that is too short is not met for ever.
    """

    at_once: int | None
    """How many jobs may be given to it at a time; None: as many as there are."""

    def submit(self, config: Path, run: RunConfig, log: Path) -> str:
        """Starts ``faconv train CONFIG`` as a job of its own; what it prints goes to ``log``.

        Returns:
            the job's id: on disk it outlives this process, so it must name the job for another one too.

        Raises:
            InputError, RunError: the job is not taken. The point is recorded as failed with the message.
        """

    def alive(self, job: str) -> bool:
        """Whether the job is still waiting or running; in doubt it is, of a job that nobody knows it is not."""


class PointConfig(Section):
    """One point: the same run on another mesh."""

    mesh: MeshConfig = Field(description="LATxLON or REPLICASxLATxLON, or a mapping as in a run")
    name: str | None = Field(None, description="of the point's directory; default: the mesh")
    tasks_per_node: Count | None = Field(None, description="ranks on one node; default: that of `slurm`")
    set: dict[str, Any] = Field({}, description="values of the run for this point, as `training.micro_batch: 2`")

    @field_validator("mesh", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return MeshConfig.parse(value) if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _names_a_directory(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"\w[\w.-]*", name, flags=re.ASCII):
            raise ValueError(f"a point's name becomes a directory: letters, digits, and _ . - inside, got {name!r}")
        return name

    @property
    def label(self) -> str:
        """The name, or what stands for it."""
        return self.name or str(self.mesh)


class StudyConfig(Section):
    """The same run at several meshes; paths are relative to the working directory, as those of a run are."""

    study_dir: Path = Field(description="points, results, table and figure go here")
    config: Path = Field(description="YAML file of the run that all points share")
    scaling: Literal["strong", "weak"] = Field(description="the same work in all, or the same work per rank")
    points: tuple[PointConfig, ...] = Field(min_length=1)
    set: dict[str, Any] = Field({}, description="values of the run for all points, as `training.micro_batch: 2`")
    repeats: int = Field(5, ge=5, description="timed blocks of steps; the table gives their median and spread")
    warm_up_steps: Count = Field(5, description="steps before the first block: compiling, reading ahead")
    steps_per_repeat: Count = Field(5, description="steps of a block; their mean is one value")
    cells_per_rank: tuple[Count, Count] | None = Field(
        None, description="weak: rows and columns of a rank's tile; a store of such tiles is made for each point"
    )
    channels: Count | None = Field(None, description="weak, with cells_per_rank: channels of the stores")
    frames: Count | None = Field(
        None, description=f"weak, with cells_per_rank: frames of the stores; default: data.window + {SPARE_FRAMES}"
    )
    at_once: Count | None = Field(None, description="jobs that wait or run at a time; default: all the cluster takes")
    slurm: SlurmConfig = Field(SlurmConfig(), description="keys given here replace those of the run")

    @model_validator(mode="after")
    def _every_name_once(self) -> "StudyConfig":
        labels = [point.label for point in self.points]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"points need different names, but {', '.join(twice)} stands there twice. Give a `name`")
        return self

    @model_validator(mode="after")
    def _stores_are_for_weak_studies(self) -> "StudyConfig":
        if self.cells_per_rank is not None and self.scaling == "strong":
            raise ValueError(
                f"cells_per_rank={list(self.cells_per_rank)} makes a larger grid for more ranks, but a strong study "
                f"keeps the grid. Leave it out, or write scaling: weak"
            )
        given = [name for name in ("channels", "frames") if getattr(self, name) is not None]
        if self.cells_per_rank is None and given:
            raise ValueError(f"{' and '.join(given)} belong to the stores of cells_per_rank, which is not given")
        if self.cells_per_rank is not None and self.channels is None:
            raise ValueError("cells_per_rank makes stores, and these need `channels`: write as many as you train on")
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps of a point."""
        return self.warm_up_steps + self.repeats * self.steps_per_repeat

    @property
    def name(self) -> str:
        """What the study is called in results and tables."""
        return self.study_dir.name


@dataclass(frozen=True)
class Point:
    """One point, ready to run.

    Attributes:
        directory: config, job, logs and run of the point.
        run: what ``faconv train`` is given.
        goes_on: whether another attempt goes on from what an earlier one has saved; else it begins anew, as what is
            timed must.
    """

    name: str
    directory: Path
    run: RunConfig
    goes_on: bool = False

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.run.mesh.ranks

    @property
    def nodes(self) -> int:
        """Nodes that Slurm is asked for."""
        return self.run.slurm.nodes(self.ranks)

    @property
    def samples_per_rank(self) -> int:
        """Samples of which a rank computes its tile in one step."""
        return self.run.training.micro_batch * self.run.training.accumulation

    def measured(self) -> dict[str, Any]:
        """Dotted keys and values of all that a result of this point depends on; not where it is kept."""
        tree = self.run.model_dump(mode="json", exclude={"run_dir"})
        tree["slurm"] = {key: tree["slurm"][key] for key in ASKED_OF_SLURM}
        return dict(flattened(tree))


def points_of(study: StudyConfig) -> list[Point]:
    """The points of a study, each with its whole run.

    Raises:
        InputError: the base config or a point is not valid, or the points cannot be compared.
    """
    base = load_config(study.config).model_dump(mode="json")
    points = [_point(study, base, point) for point in study.points]
    for first, other in ((points[0], other) for other in points[1:]):
        _check_same_data(first, other, of_stores=study.cells_per_rank is not None)
        _check_strong(first, other) if study.scaling == "strong" else _check_weak(study, first, other)
    return points


def _point(study: StudyConfig, base: Mapping[str, Any], point: PointConfig) -> Point:
    directory = study.study_dir.absolute() / POINTS / point.label
    where = f"point {point.label} of the study"
    _refuse_decided(study, point)
    tree = merged(merged(base, study.set), {"slurm": study.slurm.model_dump(mode="json", exclude_unset=True)})
    tree = merged(tree, point.set)
    tree |= {"mesh": point.mesh.model_dump(), "run_dir": str(directory / "run")}
    tree = merged(tree, _data(study, tree, point) | _training(study, tree))
    if point.tasks_per_node:
        tree = merged(tree, {"slurm": {"tasks_per_node": point.tasks_per_node}})
    run = validated(RunConfig, tree, where)
    try:
        run.slurm.nodes(run.mesh.ranks)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if study.cells_per_rank is not None:
        _check_store(study, run, where)
    return Point(point.label, directory, run)


def _training(study: StudyConfig, tree: Mapping[str, Any]) -> dict[str, Any]:
    """As the study decides; the run's warm-up of the learning rate is shortened to fit."""
    warmup_steps = min(int(tree["training"]["warmup_steps"]), study.steps - 1)
    decided = dict.fromkeys(("checkpoint_every", "validate_every", "term_grace_s", "usr_grace_s"), 0)
    decided |= {"steps": study.steps, "give_up_after": 1}
    return {"training": decided | {"warmup_steps": warmup_steps}}


def _data(study: StudyConfig, tree: Mapping[str, Any], point: PointConfig) -> dict[str, Any]:
    """The store by its whole path: the base's, or the one that is made for the point."""
    if study.cells_per_rank is None:
        return {"data": {"store": str(Path(tree["data"]["store"]).absolute())}}
    shape = study.cells_per_rank[0] * point.mesh.lat, study.cells_per_rank[1] * point.mesh.lon
    frames = study.frames or int(tree["data"]["window"]) + SPARE_FRAMES
    name = "x".join(map(str, (*shape, study.channels, frames)))
    store = study.study_dir.absolute() / STORES / name
    return {"data": {"store": str(store), "variables": None, "periods": {"train": [], "validation": [], "test": []}}}


def _refuse_decided(study: StudyConfig, point: PointConfig) -> None:
    decided = DECIDED | (OF_THE_STORE if study.cells_per_rank is not None else {})
    for where, changes in (("set", study.set), (f"set of point {point.label}", point.set)):
        for key, _ in flattened(changes):
            for name, reason in decided.items():
                if key == name or key.startswith(f"{name}."):
                    raise InputError(f"{where}: the study decides {name} ({reason}), got {key}. Leave it out.")


def _check_store(study: StudyConfig, run: RunConfig, where: str) -> None:
    """What can be said of a store before it is made."""
    assert study.cells_per_rank is not None, "there is a store to make"
    columns = study.cells_per_rank[1] * run.mesh.lon
    sides = [run.data.lat_boundary] if isinstance(run.data.lat_boundary, str) else run.data.lat_boundary
    if columns % 2 and "pole" in sides:
        raise InputError(
            f"{where}: {run.mesh.lon} tiles of {study.cells_per_rank[1]} columns (cells_per_rank) make {columns}, but "
            f"data.lat_boundary pole looks half a turn around the globe and needs an even number. "
            f"Use {study.cells_per_rank[1] + 1} columns per rank."
        )
    if study.frames is not None and study.frames <= run.data.window:
        raise InputError(
            f"{where}: frames={study.frames} is less than one window needs, {run.data.window + 1} (data.window and "
            f"the target of its last step). Write frames: {run.data.window + SPARE_FRAMES}, or leave it out."
        )


def _check_same_data(first: Point, other: Point, *, of_stores: bool) -> None:
    free = {"read_ahead"} | ({"store"} if of_stores else set())
    one, two = (dict(flattened(point.run.data.model_dump(mode="json", exclude=free))) for point in (first, other))
    different = [key for key in one if one[key] != two[key]]
    if different:
        key = different[0]
        raise InputError(
            f"the points of a study read the same data, but data.{key} is {one[key]!r} at {first.name} and "
            f"{two[key]!r} at {other.name}. Move it from the point's `set` to that of the study."
        )


def _check_strong(first: Point, other: Point) -> None:
    batches = [point.run.global_batch for point in (first, other)]
    if batches[0] == batches[1]:
        return
    replicas = other.run.mesh.replicas
    per_replica, rest = divmod(batches[0], replicas)
    remedy = (
        f"Give {other.name} a `set` with training.micro_batch x training.accumulation = {per_replica}"
        if not rest
        else f"{batches[0]} samples do not divide into {replicas} replicas: give the study's `set` a batch that does"
    )
    raise InputError(
        f"a strong study keeps the global batch (replicas x micro_batch x accumulation), but it is "
        f"{_batch(first)} at {first.name} and {_batch(other)} at {other.name}. {remedy}, or leave the replicas out."
    )


def _batch(point: Point) -> str:
    training = point.run.training
    factors = f"{point.run.mesh.replicas} x {training.micro_batch} x {training.accumulation}"
    return f"{factors} = {point.run.global_batch}"


def _check_weak(study: StudyConfig, first: Point, other: Point) -> None:
    if first.samples_per_rank != other.samples_per_rank:
        raise InputError(
            f"a weak study keeps the work of a rank, but micro_batch x accumulation is {first.samples_per_rank} at "
            f"{first.name} and {other.samples_per_rank} at {other.name}. Make them equal, for example by leaving them "
            f"to the study's `set`."
        )
    tiles = [f"{point.run.mesh.lat}x{point.run.mesh.lon}" for point in (first, other)]
    if study.cells_per_rank is None and tiles[0] != tiles[1]:
        raise InputError(
            f"a weak study keeps the work of a rank, but {first.name} cuts the store into {tiles[0]} tiles and "
            f"{other.name} into {tiles[1]}. Give cells_per_rank: [rows, columns] and channels, and a store is made "
            f"for each point; or let only the replicas grow, such as 1x{tiles[0]}, 2x{tiles[0]}."
        )


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested values with others put in; a key of ``changes`` may be dotted, as training.micro_batch."""
    result = dict(tree)
    for key, value in changes.items():
        head, _, rest = str(key).partition(".")  # a step of training.rollout is a number
        value = {rest: value} if rest else value
        inner = result.get(head)
        if isinstance(value, Mapping):
            result[head] = merged(inner if isinstance(inner, Mapping) else {}, value)
        else:
            result[head] = value
    return result


def flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; lists are values."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
