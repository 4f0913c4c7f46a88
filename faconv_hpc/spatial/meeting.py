"""Where the ranks of a job meet: at a port that was agreed on, or at one of several that rank 0 finds free."""

import random
import resource
import socket
import socketserver
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from ..errors import InputError, LostRankError, RunError, TryAgainError
from .environment import RankEnvironment

FIRST_PORT, PORTS = 20000, 12000  # below the range from which Linux hands out ports (32768)
CANDIDATES = 16  # another job, or one that is only just ending, holds some of them now and then
CONNECTIONS, FILES = 2, 500  # of a rank to the store; of rank 0 for all else, gloo's own connections among it
ANSWER_S = 3.0  # within which a door answers; a port may be held by a program that never says a word
AGAIN_S, LONGEST_S = 0.05, 2.0  # between two rounds of knocking: longer each time, while rank 0 is starting
ARRIVED, MET = "arrived", "met"


def meet(environment: RankEnvironment, timeout_s: float) -> Store:
    """The store through which the ranks of a job find each other. Collective: none returns before all are there.

    A rank that left sooner, with an error of the config's for example, would have srun end those that are still
    starting, by a signal, and report that in place of the rank's own exit code.

    Where no port was agreed on, rank 0 opens the store at any free port and a door at the first free one of those
    that all ranks derive from the job's name; the others knock at them until one answers for this very job.

    Raises:
        TryAgainError: no port is free.
        LostRankError: the ranks have not found each other in ``timeout_s``.
    """
    try:
        return _met(environment, timeout_s)
    except (RuntimeError, OSError, ValueError) as error:  # of torch's store, or of a name that has no address
        if isinstance(error, RunError | InputError):
            raise
        raise LostRankError(
            f"rank {environment.rank} of {environment.world_size} cannot meet the others at {environment.address}, "
            f"port {environment.port or 'any'} ({str(error).splitlines()[0]}). Rank 0 must run there, and all nodes "
            f"reach it: look at MASTER_ADDR and MASTER_PORT if they are set, and whether the nodes are up."
        ) from None


def _allow_connections(ranks: int) -> None:
    """Rank 0 holds two connections of every rank to the store: as many files open as that takes, if it may.

    Raises:
        InputError: the limit of this machine is lower.
    """
    needed = CONNECTIONS * ranks + FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise InputError(
            f"rank 0 of {ranks} ranks holds {CONNECTIONS} connections of each, {needed} open files with its own, and "
            f"this machine allows {hard} (ulimit -Hn). Have the limit raised, or start fewer ranks."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _met(environment: RankEnvironment, timeout_s: float) -> Store:
    if environment.rank == 0:
        _allow_connections(environment.world_size)
    timeout = timedelta(seconds=timeout_s)
    store: Store
    if not environment.job:
        environment.export()
        store, _, _ = next(rendezvous("env://", environment.rank, environment.world_size, timeout=timeout))
    elif environment.rank == 0:
        store = _host(environment, timeout)
    else:
        port = _found(environment, timeout_s)
        store = TCPStore(environment.address, port, wait_for_workers=False, timeout=timeout)
        store.add(ARRIVED, 1)
        replace(environment, port=port).export()
        _wait_for_all(environment, store, timeout)
    store.set_timeout(timeout)
    return store


def candidate_ports(job: str) -> tuple[int, ...]:
    """Where the ranks of a job meet, in this order."""
    return tuple(FIRST_PORT + zlib.crc32(f"{job}/{number}".encode()) % PORTS for number in range(CANDIDATES))


class _Door(socketserver.ThreadingTCPServer):
    """Tells those who ask for this job where its store is."""

    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    allow_reuse_address = daemon_threads = True
    request_queue_size = 1024  # all ranks may knock at once

    def __init__(self, port: int, job: str, store_port: int) -> None:
        super().__init__(("", port), _Doorkeeper)
        self.question, self.answer = f"{job}\n".encode(), f"{job} {store_port}\n".encode()

    def server_bind(self) -> None:
        """Both kinds of addresses: a node's name may have either."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class _Doorkeeper(socketserver.StreamRequestHandler):
    server: _Door
    timeout = ANSWER_S

    def handle(self) -> None:
        try:
            if self.rfile.readline(256) == self.server.question:
                self.wfile.write(self.server.answer)
        except OSError:  # somebody who says nothing, or is gone
            return


def _host(environment: RankEnvironment, timeout: timedelta) -> TCPStore:
    """Rank 0: a store, and a door to it until all ranks are there."""
    store = TCPStore(environment.address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
    replace(environment, port=store.port).export()
    deadline = time.monotonic() + timeout.total_seconds()
    with _opened(environment.job, store.port):
        arrived = store.add(ARRIVED, 1)
        while arrived < environment.world_size and time.monotonic() < deadline:
            time.sleep(AGAIN_S)
            arrived = store.add(ARRIVED, 0)
    if arrived < environment.world_size:
        raise LostRankError(
            f"{arrived} of {environment.world_size} ranks have arrived at {environment.address} in "
            f"{timeout.total_seconds():g} s. See what the others printed; if they run, the nodes do not reach each "
            f"other: ask for a way through the firewall, or set MASTER_ADDR and MASTER_PORT."
        )
    store.set(MET, "")
    return store


def _wait_for_all(environment: RankEnvironment, store: Store, timeout: timedelta) -> None:
    """The others: until rank 0 has counted all."""
    try:
        store.wait([MET], timeout)
    except RuntimeError as error:
        raise LostRankError(
            f"rank {environment.rank} has found rank 0 of job {environment.job}, but not all {environment.world_size} "
            f"ranks have come in {timeout.total_seconds():g} s. See what the others printed, and whether their nodes "
            f"are up. The store says: {error}"
        ) from None


@contextmanager
def _opened(job: str, store_port: int) -> Iterator[None]:
    ports = candidate_ports(job)
    door = next((found for port in ports if (found := _door_at(port, job, store_port))), None)
    if door is None:
        raise TryAgainError(
            f"none of the {len(ports)} ports {', '.join(map(str, ports))} is free on {socket.gethostname()}. "
            f"Set MASTER_ADDR and MASTER_PORT to a port that is, for all ranks."
        )
    with door:
        threading.Thread(target=door.serve_forever, args=(AGAIN_S,), name="door", daemon=True).start()
        try:
            yield
        finally:
            door.shutdown()


def _door_at(port: int, job: str, store_port: int) -> _Door | None:
    try:
        return _Door(port, job, store_port)
    except OSError:  # somebody listens there
        return None


def _found(environment: RankEnvironment, timeout_s: float) -> int:
    """The others: the store's port, from the door that answers for this job; those of other jobs are passed over."""
    ports = candidate_ports(environment.job)
    deadline, pause_s = time.monotonic() + timeout_s, AGAIN_S
    while time.monotonic() < deadline:
        for port in ports:
            if (store_port := _asked(environment, port)) is not None:
                return store_port
        time.sleep(pause_s * random.uniform(0.5, 1.0))  # not all at once
        pause_s = min(2 * pause_s, LONGEST_S)
    raise LostRankError(
        f"rank {environment.rank} has not found rank 0 of job {environment.job} in {timeout_s:g} s at "
        f"{environment.address}, ports {', '.join(map(str, ports))}. See what rank 0 printed; if it runs, the nodes "
        f"do not reach each other there: ask for a way through the firewall, or set MASTER_ADDR and MASTER_PORT."
    )


def _asked(environment: RankEnvironment, port: int) -> int | None:
    try:
        with socket.create_connection((environment.address, port), timeout=ANSWER_S) as line:
            line.sendall(f"{environment.job}\n".encode())
            job, _, store_port = line.makefile().readline(256).strip().rpartition(" ")
            return int(store_port) if job == environment.job else None
    except (OSError, ValueError):  # nobody listens, or somebody who knows nothing of this
        return None
