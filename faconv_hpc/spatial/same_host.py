"""Messages between ranks of one host, through memory that they share. No autograd here, see operations.py.

Gloo sends them through the system's network, with threads of its own at both ends that take more from the ranks'
cores than the messages are worth. Here the sender writes into memory that both have, and says so through a socket in
which the receiver waits: there is no thread, and neither memory nor socket has a name that could outlive the ranks.
What cannot be linked, for whatever reason, goes by Gloo.
"""

import hashlib
import os
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, suppress
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
OWNER = struct.Struct("iII")
"""Of a socket's other end: process, user, group."""
HOST_BYTES, TOKEN_BYTES = 32, 16
MEETING_S, INTRODUCTION_S = 30.0, 2.0
"""For two ranks to meet, and for one that knocks to say who it is; they share no memory where they do not."""
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
        self._targets: dict[tuple[int, int], Tensor] = {}

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

    def expect(self, channel: int, into: Tensor) -> int:
        """The number of the channel's next message, which ``into``, contiguous and of its size, is filled with; it may
        be as soon as that has come, and is once it was waited for (`receive`)."""
        key = channel, self._expected[channel]
        self._expected[channel] += 1
        self._targets[key] = into
        if key in self._arrived:
            self._read(key)
        return key[1]

    def receive(self, channel: int, number: int) -> None:
        """Waits until a message that was expected is there.

        Raises:
            LostRankError: the other rank is gone.
            RuntimeError: the time is up.
        """
        while (channel, number) in self._targets:
            self._take_note()

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
        if (channel, number) in self._targets:
            self._read((channel, number))

    def _read(self, key: tuple[int, int]) -> None:
        """Fills the target of a message that has come, and frees its slot."""
        (slot, size), into = self._arrived.pop(key), self._targets[key]
        assert size == into.nbytes, f"{self._peer} sent {size} bytes where {into.nbytes} were to come"
        into.view(-1).copy_(self._in.part(slot, into))
        self._in.read[slot] += 1
        del self._targets[key]

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
        links: by the other rank's token; None where the two share no memory, and do not try again.
    """

    def __init__(self) -> None:
        self.links: dict[bytes, Link | None] = {}
        self._token, self._socket = os.urandom(TOKEN_BYTES), None
        self._early: dict[bytes, tuple[socket.socket, int]] = {}
        host = NO_HOST
        with suppress(OSError, AttributeError):  # a system that has no such memory or sockets
            self._socket = _socket(MEETING_S)
            self._socket.bind(_name(self._token))
            self._socket.listen(socket.SOMAXCONN)
            os.close(_memory())
            host = _host()
        self.place = host + self._token

    def link(self, token: bytes, peer: str, knocks: bool, limit_s: float | None) -> None:
        """Links this rank with another that calls this, too: one of them knocks, the other lets it in.

        Where that fails, for whatever reason, this end has no link; the other may have one, and lets go of it (`part`).

        Args:
            token: the other's.
            peer: what errors call it.
            knocks: whether this one does.
            limit_s: of each message; None: as long as it takes.
        """
        with suppress(OSError, RuntimeError), ExitStack() as opened:  # the latter of torch, which maps the memory
            mine = _memory()
            opened.callback(os.close, mine)
            line, theirs = self._knocked(token, mine) if knocks else self._let_in(token, mine)
            opened.callback(os.close, theirs)
            line.settimeout(limit_s)
            self.links[token] = Link(line, peer, mine, theirs)

    def part(self, token: bytes) -> None:
        """Ends what there is of a link, for good."""
        link = self.links.get(token)
        if link is not None:
            link.close()
        self.links[token] = None

    def close(self) -> None:
        """Ends all links."""
        for token in self.links:
            self.part(token)
        for line, descriptor in self._early.values():
            line.close()
            os.close(descriptor)
        if self._socket is not None:
            self._socket.close()

    def _knocked(self, token: bytes, mine: int) -> tuple[socket.socket, int]:
        """The line to another rank, which has got this one's memory, and the other's memory."""
        line = _socket(MEETING_S)
        line.connect(_name(token))
        socket.send_fds(line, [self._token], [mine])
        return line, _introduction(line)[1]

    def _let_in(self, token: bytes, mine: int) -> tuple[socket.socket, int]:
        """The same of a rank that knocks; who comes before it is kept for later, and strangers are not heard."""
        assert self._socket is not None, "nobody is told of a door that is not there"
        until = time.monotonic() + MEETING_S
        while token not in self._early:
            self._socket.settimeout(max(until - time.monotonic(), 1e-3))
            line, _ = self._socket.accept()
            line.settimeout(INTRODUCTION_S)
            with suppress(OSError):
                who, theirs = _introduction(line)
                self._early[who] = line, theirs
        line, theirs = self._early.pop(token)
        socket.send_fds(line, [self._token], [mine])
        return line, theirs


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
    place = torch.frombuffer(bytearray(door.place), dtype=torch.uint8)
    everyones = [torch.empty_like(place) for _ in range(group.size())]
    dist.all_gather(everyones, place, group=group)
    here, jobs, host = group.rank(), dist.get_process_group_ranks(group), door.place[:HOST_BYTES]
    places = [bytes(one.tolist()) for one in everyones]
    peers = {
        rank: place[HOST_BYTES:]
        for rank, place in enumerate(places)
        if rank != here and host != NO_HOST and place[:HOST_BYTES] == host
    }
    # Pair by pair: a system lets a user have but so many descriptors on their way (unix(7), ETOOMANYREFS).
    for number in range(1, 1 << (group.size() - 1).bit_length()):
        peer = here ^ number
        if peer in peers and peers[peer] not in door.links:
            door.link(peers[peer], f"rank {jobs[peer]}", peer < here, limit_s)
            if peers[peer] not in door.links:
                break  # nor would another be
    mine = {rank: link for rank, token in peers.items() if (link := door.links.get(token)) is not None}
    at_this_end = torch.tensor([rank in mine for rank in range(group.size())], dtype=torch.uint8)
    at_ends = [torch.empty_like(at_this_end) for _ in places]
    dist.all_gather(at_ends, at_this_end, group=group)
    both = {rank: link for rank, link in mine.items() if at_ends[rank][here]}
    for rank in peers.keys() - both.keys():
        door.part(peers[rank])
    channel = int.from_bytes(hashlib.sha256(group.group_name.encode()).digest()[:8], "big")
    _links[group.group_name] = Links(channel, both)


def links_of(group: dist.ProcessGroup) -> Links:
    """Those of this rank, by `link_group`; none where it was not called."""
    return _links.get(group.group_name, NO_LINKS)


def unlink() -> None:
    """Ends all links of this process, which has parted from the others."""
    while _doors:
        _doors.pop().close()
    _links.clear()


def _socket(limit_s: float) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.settimeout(limit_s)
    return made


def _name(token: bytes) -> str:
    """Of a door: known to the system alone, no file."""
    return f"\0faconv-{token.hex()}"


def _introduction(line: socket.socket) -> tuple[bytes, int]:
    """Whose token and memory come over a line; raises OSError where nobody's do, or another user's would."""
    _, user, _ = OWNER.unpack(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, OWNER.size))
    if user != os.getuid():
        line.close()
        raise PermissionError(f"user {user} is at the other end")
    token, descriptors, _, _ = socket.recv_fds(line, TOKEN_BYTES, 1)
    if len(token) != TOKEN_BYTES or len(descriptors) != 1:
        for descriptor in descriptors:
            os.close(descriptor)
        line.close()
        raise ConnectionError("nobody is at the other end")
    os.set_inheritable(descriptors[0], False)
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
