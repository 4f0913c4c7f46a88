"""ProcessMesh: the arrangement of ranks, replica x lat x lon, and the groups they talk in."""

import atexit
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from ..errors import InputError
from ..observe import Activity
from .collectives import all_gather, carried
from .device import device_for
from .environment import LETTING_GO_S, PARTED, RankEnvironment
from .failure import MARGIN_S, FailureWatch
from .meeting import meet
from .same_host import link_group, unlink

TIMEOUT_S = 600.0

Value = TypeVar("Value")


@dataclass(frozen=True)
class ProcessMesh:
    """Ranks arranged as replica x lat x lon; every rank holds one tile of one replica's samples.

    Ranks are numbered with lon running fastest, so that the tiles of one replica lie on as few
    nodes as possible: ``rank = (replica * lat + lat_index) * lon + lon_index``.

    A mesh is made by `start` (the job's ranks) or `alone` (this process, no set-up).
    """

    replicas: int = 1
    lat: int = 1
    lon: int = 1
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    job_ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None
    tile_group: dist.ProcessGroup | None = None
    axis_groups: dict[str, dist.ProcessGroup | None] = field(default_factory=dict)
    watch: FailureWatch | None = None
    host_group: dist.ProcessGroup | None = None
    activity: Activity = field(default_factory=Activity)

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> "ProcessMesh":
        """One tile, one replica, in this process."""
        return cls(device=torch.device(device))

    @classmethod
    def start(
        cls,
        replicas: int = 1,
        lat: int = 1,
        lon: int = 1,
        *,
        device: str = "auto",
        through_host: bool = False,
        timeout_s: float = TIMEOUT_S,
    ) -> "ProcessMesh":
        """Joins the ranks of this job and arranges them. Collective.

        Args:
            replicas, lat, lon: the mesh's sizes; their product is the number of ranks.
            device: see `device_for`.
            through_host: messages of GPUs go by Gloo and host memory, not by NCCL, which refuses ranks that share one.
            timeout_s: seconds after which a collective that does not finish is an error.

        Raises:
            InputError: the product is not the number of ranks that were started, or there is no such device.
        """
        environment = RankEnvironment.read()
        store = meet(environment, timeout_s)
        watch = _watch(store, environment, timeout_s)  # first, so that none waits in vain for one that fails here
        with watch.guarded():
            place = device_for(device, environment.local_rank)
            if place.type == "cuda":
                torch.cuda.set_device(place)
            _join(environment, store, None if through_host or place.type == "cpu" else place, timeout_s)
            ranks = range(environment.world_size)
            mesh = cls.arrange(ranks, replicas, lat, lon, device=place, watch=watch)
        assert mesh is not None, f"rank {environment.rank} is one of {environment.world_size} ranks"
        return mesh

    @classmethod
    def arrange(
        cls,
        ranks: Sequence[int],
        replicas: int,
        lat: int,
        lon: int,
        *,
        device: torch.device | None = None,
        watch: FailureWatch | None = None,
    ) -> "ProcessMesh | None":
        """A mesh over some ranks of the job that is already joined; None on the others.

        Collective over those ranks. ``device`` and ``watch`` are those of the mesh that `start` gave.
        """
        here = dist.get_rank()
        place = ranks.index(here) if here in ranks else 0
        mesh = cls(replicas, lat, lon, place, device or torch.device("cpu"), tuple(ranks), watch=watch)
        if watch is not None:
            mesh = replace(mesh, activity=watch.activity)
        mesh.check_size(len(ranks))
        return mesh._with_groups() if here in ranks else None

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.replicas * self.lat * self.lon

    @property
    def tiles(self) -> int:
        """Number of tiles of one replica."""
        return self.lat * self.lon

    @property
    def replica(self) -> int:
        """Which replica this rank belongs to."""
        return self.rank // self.tiles

    @property
    def tile_index(self) -> int:
        """Which tile this rank owns; tiles are numbered west to east, then north to south."""
        return self.rank % self.tiles

    def size(self, axis: str) -> int:
        """Number of ranks along ``"lat"`` or ``"lon"``."""
        return self.lat if axis == "lat" else self.lon

    def index(self, axis: str) -> int:
        """This rank's place along ``"lat"`` or ``"lon"``."""
        return self.tile_index // self.lon if axis == "lat" else self.tile_index % self.lon

    def check_size(self, world_size: int) -> None:
        """Raises InputError unless the mesh has as many ranks as were started."""
        if self.ranks != world_size:
            raise InputError(
                f"a mesh of {self.replicas} replicas x {self.lat} lat x {self.lon} lon needs {self.ranks} "
                f"ranks, {world_size} were started. Change the mesh (keys mesh.replicas, mesh.lat, mesh.lon) "
                f"or start {self.ranks} ranks."
            )

    def gathered(self, values: Sequence[float]) -> list[list[float]]:
        """Some numbers of every rank of the mesh, in the order of ranks, in float64. Collective.

        They stay in host memory, as objects do that are sent: no device is waited for.
        """
        mine = torch.tensor(values, dtype=torch.float64)
        if self.host_group is None:
            return [mine.tolist()]
        rows: list[list[float]] = all_gather(mine, self.host_group).tolist()
        return rows

    def from_first(self, value: Value) -> Value:
        """The value that the mesh's first rank has, on every rank; anything that pickles. Collective."""
        if self.host_group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self.job_ranks[0], group=self.host_group)
        return box[0]

    def gathered_objects(self, value: Value) -> list[Value]:
        """The value of every rank, in the order of ranks; anything small that pickles. Collective."""
        if self.host_group is None:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def from_rank(self, value: torch.Tensor | None, shape: Sequence[int], rank: int) -> torch.Tensor:
        """The float32 tensor that one rank has, on every rank; the others pass None. Collective."""
        if value is None:
            value = torch.empty(*shape, dtype=torch.float32, device=self.device)
        value = value.to(self.device).contiguous()
        if self.group is None:
            return value
        sent = carried(value, self.group)
        dist.broadcast(sent, src=self.job_ranks[rank], group=self.group)
        return sent.to(self.device)

    def total_of_replicas(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks that own the same tile, as each has a part of the dates. Collective over them."""
        group = self._group(range(self.tile_index, self.ranks, self.tiles))
        if group is None:
            return value
        total = carried(value.to(self.device, copy=True), group)
        dist.all_reduce(total, group=group)
        return total.to(value.device)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """An exception inside ends all ranks with one message; see `FailureWatch`."""
        if self.watch is None:
            yield
            return
        with self.watch.guarded():
            yield

    def new_group_of_job(self) -> dist.ProcessGroup:
        """A further group of all ranks of the job, for a library of its own; it ends its collectives when ours do.
        Collective."""
        group: dist.ProcessGroup = dist.new_group(timeout=self._limit)
        return group

    def stop(self) -> None:
        """Leaves the job, when all ranks are ready to. Collective. Nothing may be communicated afterwards."""
        with self.guarded():
            self.gathered([0.0])
        if self.watch is not None:
            self.watch.stop()
        if dist.is_initialized():
            unlink()
            dist.destroy_process_group()
            if not PARTED.is_set():
                atexit.register(time.sleep, LETTING_GO_S)
            PARTED.set()

    def _with_groups(self) -> "ProcessMesh":
        """The same mesh with the groups that this rank is in, five at most: its members alone make each of them."""
        by_nccl = dist.get_backend() == dist.Backend.NCCL
        return replace(
            self,
            group=self._group(range(self.ranks)),
            host_group=self._group(range(self.ranks), "gloo" if by_nccl else None),
            tile_group=self._group(self._members(self.replica)),
            axis_groups={
                "lon": self._group(self._members(self.replica, lat_index=self.index("lat"))),
                "lat": self._group(self._members(self.replica, lon_index=self.index("lon"))),
            },
        )

    def _group(self, members: Sequence[int], backend: str | None = None) -> dist.ProcessGroup | None:
        """A group of some places of the mesh, of which this rank's is one; None for one alone."""
        if len(members) == 1:
            return None
        ranks, world = tuple(self.job_ranks[member] for member in members), dist.group.WORLD
        return _group_of(ranks, world, backend or dist.get_backend(world), self._limit)

    @property
    def _limit(self) -> timedelta | None:
        """Of the collectives of every group; None: torch's."""
        return _limit(self.watch.timeout_s) if self.watch is not None else None

    def _members(self, replica: int, lat_index: int | None = None, lon_index: int | None = None) -> list[int]:
        """Places in the mesh of one replica, of one row of it, or of one column."""
        return [
            (replica * self.lat + i) * self.lon + j
            for i in range(self.lat)
            for j in range(self.lon)
            if lat_index in (None, i) and lon_index in (None, j)
        ]


@cache
def _group_of(
    ranks: tuple[int, ...], world: dist.ProcessGroup, backend: str, limit: timedelta | None
) -> dist.ProcessGroup:
    """The group of these ranks of a job, made once: each has threads of its own, or buffers on a GPU.

    Its members ask for it, in the same order. Collectives end at the limit; None: torch's.
    """
    if len(ranks) == world.size() and backend == dist.get_backend(world):
        return _linked(world, limit)
    group: dist.ProcessGroup = dist.new_group(
        list(ranks), timeout=limit, backend=backend, use_local_synchronization=True
    )
    return _linked(group, limit)


def _linked(group: dist.ProcessGroup, limit: timedelta | None) -> dist.ProcessGroup:
    """The group, of which ranks of one host share memory where messages are in host memory."""
    if dist.get_backend(group) == dist.Backend.GLOO:
        link_group(group, None if limit is None else limit.total_seconds())
    return group


def _limit(timeout_s: float) -> timedelta:
    """Of every collective: later than a silent rank is named."""
    return timedelta(seconds=timeout_s + MARGIN_S)


def report_before_joining(error: BaseException) -> NoReturn:
    """Ends a job of several ranks because of an error that this rank found before it joined the others.

    The ranks meet only to agree on who speaks; those that found no error learn of it and end too.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent by a launcher that sees another rank leave; it would hide why
    environment = RankEnvironment.read()
    store = meet(environment, TIMEOUT_S)  # kept to the end: with rank 0's it is closed for all
    _watch(store, environment, TIMEOUT_S).end(error)


def _join(environment: RankEnvironment, store: Store, device: torch.device | None, timeout_s: float) -> None:
    """By NCCL on a device, else by Gloo."""
    dist.init_process_group(
        "nccl" if device is not None else "gloo",
        store=PrefixStore("mesh", store),
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=_limit(timeout_s),
        device_id=device,
    )


def _watch(store: Store, environment: RankEnvironment, timeout_s: float) -> FailureWatch:
    """With a connection of its own: a rank waits in the other one."""
    own: Store = store.clone()  # type: ignore[attr-defined]
    speaks = environment.rank == 1 or environment.local_rank == 0
    return FailureWatch(PrefixStore("failure", own), environment.rank, environment.world_size, timeout_s, speaks=speaks)
