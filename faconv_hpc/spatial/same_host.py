"""Messages between ranks of one host, through memory that they share. No autograd here, see operations.py.

Gloo sends them through the system's network, with threads of its own at both ends that take more from the ranks'
cores than the messages are worth. Here the sender writes into memory that both have, and says so through a socket in
which the receiver waits: there is no thread, and neither memory nor socket has a name that could outlive the ranks.
"""

import hashlib
import os
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import LostRankError

SLOTS, SLOT_BYTES = 8, 2**22
"""Messages on their way in one direction, and the most of each. What is never written to takes no memory."""
FLAGS_BYTES = 4096
LOOK_MS = 1
"""Between two looks at whether a slot has become free."""

NOTE = struct.Struct("<QQQQ")
"""Channel, number of the message in it, slot, bytes."""
OWNER = struct.Struct("3i")
"""Of a socket's other end: process, user, group."""
HOST_BYTES, TOKEN_BYTES = 32, 16
NO_HOST = bytes(HOST_BYTES)


class Link:
    """This rank and another of its host: what one writes, the other reads.

    A channel's messages are received in the order in which they were sent; channels do not wait for each other.

    Args:
        line: to the other rank, connected; its time-out is that of every message.
        peer: what errors call the other rank.
        mine, theirs: file descriptors of the memory that this rank writes into, and that the other does.
    """

    def __init__(self, line: socket.socket, peer: str, mine: int, theirs: int) -> None:
        self._line, self._peer = line, peer
        self._out, self._in = _Memory(mine), _Memory(theirs)
        self._sent, self._expected = Counter[int](), Counter[int]()
        self._written = [0] * SLOTS
        self._arrived: dict[tuple[int, int], tuple[int, int]] = {}

    def send(self, channel: int, message: Tensor) -> None:
        """Sends a tensor of at most `SLOT_BYTES`, which may be changed as soon as this returns.

        Raises:
            LostRankError: the other rank is gone.
            RuntimeError: it reads nothing, and the time is up.
        """
        slot = self._free_slot()
        self._out.part(slot, message).copy_(message.detach().reshape(-1))
        note = NOTE.pack(channel, self._sent[channel], slot, message.nbytes)
        self._written[slot] += 1
        self._sent[channel] += 1
        try:
            self._line.send(note)
        except OSError as error:
            raise self._failed(error) from None

    def expect(self, channel: int) -> int:
        """The number of the channel's next message, which `receive` waits for."""
        self._expected[channel] += 1
        return self._expected[channel] - 1

    def receive(self, channel: int, number: int, into: Tensor) -> None:
        """Fills ``into``, which is contiguous and of the message's size.

        Raises:
            LostRankError: the other rank is gone.
            RuntimeError: the time is up.
        """
        while (channel, number) not in self._arrived:
            self._take_note()
        slot, size = self._arrived.pop((channel, number))
        assert size == into.nbytes, f"{self._peer} sent {size} bytes where {into.nbytes} were to come"
        into.view(-1).copy_(self._in.part(slot, into))
        self._in.read[slot] += 1

    def close(self) -> None:
        """Nothing is sent or received afterwards; what the other rank has not yet read, it still can."""
        self._line.close()

    def _take_note(self) -> None:
        try:
            note = self._line.recv(NOTE.size)
        except OSError as error:
            raise self._failed(error) from None
        if not note:
            raise self._failed(ConnectionResetError())
        channel, number, slot, size = NOTE.unpack(note)
        self._arrived[channel, number] = slot, size

    def _free_slot(self) -> int:
        """The first of which all that was ever written has been read."""
        began, limit_s, incoming = time.monotonic(), self._line.gettimeout(), select.poll()
        incoming.register(self._line, select.POLLIN)
        while True:
            for slot, written in enumerate(self._written):
                if self._out.read[slot] == written:
                    return slot
            if limit_s is not None and time.monotonic() - began > limit_s:
                raise self._failed(TimeoutError())
            if incoming.poll(LOOK_MS):
                self._take_note()  # or learns that the other rank is gone

    def _failed(self, error: OSError) -> RuntimeError:
        if isinstance(error, TimeoutError):
            return RuntimeError(f"Timed out after {self._line.gettimeout():g} s with {self._peer}, of this host")
        return LostRankError(f"another rank has left while this one waited for it ({self._peer}, of this host)")


class _Memory:
    """What one rank writes and another reads: slots for messages, and how often each has been read."""

    def __init__(self, descriptor: int) -> None:
        # By name: what is mapped by its descriptor keeps one open.
        name, size = f"/proc/self/fd/{descriptor}", FLAGS_BYTES + SLOTS * SLOT_BYTES
        self._bytes = torch.from_file(name, shared=True, size=size, dtype=torch.uint8, device="cpu")
        self.read = self._bytes[:FLAGS_BYTES].numpy().view("int64")[:SLOTS]

    def part(self, slot: int, like: Tensor) -> Tensor:
        """(numel,) the beginning of a slot, as numbers of the type of ``like`` and as many."""
        first = FLAGS_BYTES + slot * SLOT_BYTES
        return self._bytes[first : first + like.nbytes].view(like.dtype)


class _Door:
    """Where other ranks of this host knock, and the links with them.

    Attributes:
        place: what other ranks are told: the host, and a token. Ranks of one host can share memory.
        links: by the other rank's token.
    """

    def __init__(self) -> None:
        self.links: dict[bytes, Link] = {}
        self._token, self._socket = os.urandom(TOKEN_BYTES), None
        host = NO_HOST
        with suppress(OSError, AttributeError):  # a system that has no such memory or sockets
            self._socket = _socket()
            self._socket.bind(_name(self._token))
            self._socket.listen(socket.SOMAXCONN)
            os.close(_memory())
            host = _host()
        self.place = host + self._token

    def link(self, lower: Mapping[bytes, str], higher: Mapping[bytes, str], limit_s: float | None) -> None:
        """Links this rank with others: it knocks at the doors of the lower ones and lets the higher ones in.

        Args:
            lower, higher: by token, what errors call each.
            limit_s: of each wait, and of each message; None: as long as it takes.

        Raises:
            LostRankError: one of them is gone.
            RuntimeError: one does not come, and the time is up.
        """
        try:
            self._link(lower, higher, limit_s)
        except TimeoutError:
            raise RuntimeError(f"Timed out after {limit_s:g} s as ranks of this host met each other") from None
        except OSError as error:
            raise LostRankError(f"another rank has left as ranks of this host met each other ({error})") from None

    def _link(self, lower: Mapping[bytes, str], higher: Mapping[bytes, str], limit_s: float | None) -> None:
        waiting = {token: self._introduced(_knocked(token, limit_s)) for token in lower}
        while not higher.keys() <= self.links.keys():
            token, line, theirs = self._let_in(limit_s)
            if token in higher:
                self._keep(token, higher[token], *self._introduced(line), theirs)
        for token, (line, mine) in waiting.items():
            self._keep(token, lower[token], line, mine, _introduction(line)[1])

    def close(self) -> None:
        """Ends all links."""
        for link in self.links.values():
            link.close()
        if self._socket is not None:
            self._socket.close()

    def _introduced(self, line: socket.socket) -> tuple[socket.socket, int]:
        """A line, once its other end has been told who this is, and has the memory that this rank will write into."""
        memory = _memory()
        socket.send_fds(line, [self._token], [memory])
        return line, memory

    def _let_in(self, limit_s: float | None) -> tuple[bytes, socket.socket, int]:
        """Who knocks next, with the line and the memory it will write into."""
        assert self._socket is not None, "nobody is told of a door that is not there"
        self._socket.settimeout(limit_s)
        line, _ = self._socket.accept()
        line.settimeout(limit_s)
        token, theirs = _introduction(line)
        return token, line, theirs

    def _keep(self, token: bytes, peer: str, line: socket.socket, mine: int, theirs: int) -> None:
        if theirs < 0:
            raise LostRankError(f"another rank has left as it was met ({peer}, of this host)")
        self.links[token] = Link(line, peer, mine, theirs)
        os.close(mine)
        os.close(theirs)


class Links(NamedTuple):
    """Of the ranks of a group with this one."""

    channel: int
    """Of the group's messages."""
    peers: Mapping[int, Link]
    """By rank of the group."""


NO_LINKS = Links(0, {})
_links: dict[str, Links] = {}
"""By the name of the group."""
_doors: list[_Door] = []
"""This process's, once it has one."""


def link_group(group: dist.ProcessGroup, limit_s: float | None) -> None:
    """Links the ranks of a Gloo group that are on one host with each other. Collective over the group.

    Args:
        limit_s: after which a message that does not come is an error; None: never.
    """
    if not _doors:
        _doors.append(_Door())
    (door,) = _doors
    mine = torch.frombuffer(bytearray(door.place), dtype=torch.uint8)
    everyones = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyones, mine, group=group)
    here, jobs = group.rank(), dist.get_process_group_ranks(group)
    places = [bytes(one.tolist()) for one in everyones]
    host = door.place[:HOST_BYTES]
    peers = {
        rank: place[HOST_BYTES:]
        for rank, place in enumerate(places)
        if rank != here and host != NO_HOST and place[:HOST_BYTES] == host
    }
    new = {rank: token for rank, token in peers.items() if token not in door.links}
    names = {token: f"rank {jobs[rank]}" for rank, token in new.items()}
    lower = {token: names[token] for rank, token in new.items() if rank < here}
    higher = {token: names[token] for rank, token in new.items() if rank > here}
    door.link(lower, higher, limit_s)
    channel = int.from_bytes(hashlib.sha256(group.group_name.encode()).digest()[:8], "big")
    _links[group.group_name] = Links(channel, {rank: door.links[token] for rank, token in peers.items()})


def links_of(group: dist.ProcessGroup) -> Links:
    """Those of this rank, by `link_group`; none where it was not called."""
    return _links.get(group.group_name, NO_LINKS)


def unlink() -> None:
    """Ends all links of this process, which has parted from the others."""
    while _doors:
        _doors.pop().close()
    _links.clear()


def _socket(limit_s: float | None = None) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.settimeout(limit_s)
    return made


def _name(token: bytes) -> str:
    """Of a door: known to the system alone, no file."""
    return f"\0faconv-{token.hex()}"


def _knocked(token: bytes, limit_s: float | None) -> socket.socket:
    line = _socket(limit_s)
    line.connect(_name(token))
    return line


def _introduction(line: socket.socket) -> tuple[bytes, int]:
    """Whose token and memory have come over a line; nobody's where its other end is gone, or another user's."""
    _, user, _ = OWNER.unpack(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, OWNER.size))
    token, descriptors, _, _ = socket.recv_fds(line, TOKEN_BYTES, 1)
    if user != os.getuid() or len(descriptors) != 1:
        line.close()
        return b"", -1
    return token, descriptors[0]


def _memory() -> int:
    """The file descriptor of new memory for one direction, all zeros."""
    descriptor = os.memfd_create("faconv")
    os.ftruncate(descriptor, FLAGS_BYTES + SLOTS * SLOT_BYTES)
    return descriptor


def _host() -> bytes:
    """The same for processes that reach each other's doors and are let in: of one user and network of a system since it
    was started."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    spaces = (Path(f"/proc/self/ns/{kind}").stat().st_ino for kind in ("net", "user"))
    return hashlib.sha256(f"{boot} {os.getuid()} {list(spaces)}".encode()).digest()
