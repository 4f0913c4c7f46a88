"""Several ranks from plain pytest: pools of gloo worker processes, started once per session."""

import atexit
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group

from faconv_hpc import ProcessMesh
from faconv_hpc.spatial import same_host
from faconv_hpc.spatial.environment import RankEnvironment, free_port
from faconv_hpc.spatial.same_host import Links
from forks import ENVIRONMENT, Popen

TIMEOUT_S = 300.0
LINGER_S = 5.0


class Layout(NamedTuple):
    """Sizes of a mesh."""

    replicas: int
    lat: int
    lon: int

    @property
    def ranks(self) -> int:
        return self.replicas * self.lat * self.lon

    def __str__(self) -> str:
        return f"{self.replicas}x{self.lat}x{self.lon}"


def run_on_ranks(layout, check, *arguments) -> list[Any]:
    """Calls ``check(mesh, *arguments)`` on every rank of a layout and returns what each returned.

    An exception on any rank is raised here, with that rank's traceback. The first rank that knows
    ends the others: the pool is thrown away and made again by the next call.
    """
    layout = Layout(*layout)
    return _POOLS.of(layout.ranks).run(layout, check, arguments)


@contextmanager
def hosts_of(ranks: int) -> Iterator[None]:
    """In a check, on all ranks: as if each host had so many, and messages between hosts went by Gloo."""
    here = dist.get_rank() // ranks
    with pytest.MonkeyPatch.context() as patch:
        for name, (channel, peers) in same_host._links.items():
            members = dist.get_process_group_ranks(_resolve_process_group(name))
            near = {peer: link for peer, link in peers.items() if members[peer] // ranks == here}
            patch.setitem(same_host._links, name, Links(channel, near))
        yield


def close_pools() -> None:
    """Ends all workers."""
    _POOLS.close()


class RankPool:
    """Workers that share one process group.

    Between two checks they are stopped: for every process group Gloo has a thread that wakes up a hundred times a
    second, and the ranks of all pools of all pytest workers would take a core from those that are checked.
    """

    def __init__(self, ranks: int) -> None:
        port = free_port()  # workers of other pytest processes start at the same time
        self.pipes: list[Connection] = []
        self.workers = []
        for rank in range(ranks):
            here, there = socket.socketpair()
            command = [sys.executable, "-m", "ranks", str(rank), str(ranks), str(port)]
            self.workers.append(Popen(command, stdin=there.fileno(), cwd=Path(__file__).parent, env=ENVIRONMENT))
            there.close()
            self.pipes.append(Connection(here.detach()))

    def run(self, layout, check, arguments) -> list[Any]:
        request = cloudpickle.dumps((layout, check, arguments))
        self._send(signal.SIGCONT)
        for pipe in self.pipes:
            pipe.send_bytes(request)
        answers = self._answers()
        failures = [f"rank {rank}:\n{text}" for rank, (passed, text) in sorted(answers.items()) if not passed]
        if failures or len(answers) < len(self.pipes):
            self.close()
            silent = sorted(set(range(len(self.pipes))) - set(answers))
            raise AssertionError("\n".join([*failures, f"ranks without an answer: {silent}"]))
        self._send(signal.SIGSTOP)
        return [cloudpickle.loads(answers[rank][1]) for rank in range(len(self.pipes))]

    def _answers(self) -> dict[int, tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + TIMEOUT_S
        while len(answers) < len(self.pipes) and time.monotonic() < deadline:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            for pipe in wait(waiting, timeout=1.0):
                rank = self.pipes.index(pipe)
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    answers[rank] = (False, "the process ended")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + LINGER_S)
        return answers

    def _send(self, number: int) -> None:
        for worker in self.workers:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, number)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait()
        for pipe in self.pipes:
            pipe.close()

    @property
    def alive(self) -> bool:
        return all(worker.poll() is None for worker in self.workers)


class _Pools:
    def __init__(self) -> None:
        self.pools: dict[int, RankPool] = {}

    def of(self, ranks: int) -> RankPool:
        if ranks not in self.pools or not self.pools[ranks].alive:
            self.pools[ranks] = RankPool(ranks)
        return self.pools[ranks]

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()


_POOLS = _Pools()
atexit.register(close_pools)  # workers that are stopped would let nobody wait for their end


def _serve(rank: int, ranks: int, port: int, pipe: Connection) -> None:
    """One worker: joins the others, then does what it is asked to until its pipe closes, or pytest is gone."""
    torch.set_num_threads(1)
    RankEnvironment(rank, ranks, rank, port=port).export()
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    meshes: dict[Layout, ProcessMesh] = {}
    while True:
        try:
            layout, check, arguments = cloudpickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            if layout not in meshes:
                meshes[layout] = ProcessMesh.arrange(range(ranks), *layout)
            pipe.send((True, cloudpickle.dumps(check(meshes[layout], *arguments))))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:]), Connection(os.dup(0)))
