"""Ranks of one host and the memory that they share: the same messages as Gloo's, in any order, and no rank waits in
vain."""

import os
import socket
import struct
import threading
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from faconv_hpc import Domain, FAConvLSTM2d, LatLonGrid
from faconv_hpc.errors import LostRankError
from faconv_hpc.spatial import same_host
from faconv_hpc.spatial.messages import reaches_all, start_messages
from faconv_hpc.spatial.same_host import SLOT_BYTES, SLOTS, Link, _Door, links_of
from ranks import Layout, hosts_of, run_on_ranks
from test_domain import random_like
from test_parity import randomized


def linked(limit_s: float | None = 5.0) -> tuple[Link, Link]:
    """Two ends in this process."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memory = [same_host._memory() for _ in range(2)]
    for line in (here, there):
        line.settimeout(limit_s)
    ends = Link(here, "rank 1", *memory), Link(there, "rank 0", *reversed(memory))
    for descriptor in memory:
        os.close(descriptor)
    return ends


def received(link: Link, channel: int, like: torch.Tensor) -> torch.Tensor:
    into = torch.empty_like(like)
    link.receive(channel, link.expect(channel, into))
    return into


def linked_anew(mesh) -> list[int]:
    """With whom a rank of three is linked that has met nobody before; all reach each other, in a second group, too."""
    groups = [dist.new_group([0, 1, 2]) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(same_host, "_doors", [])
        patch.setattr(same_host, "_links", {})
        others = [rank for rank in range(3) if rank != mesh.rank]
        for group in groups:
            same_host.link_group(group, 60.0)
            incoming = {peer: torch.empty(1) for peer in others}
            start_messages({peer: torch.tensor([10.0 * mesh.rank + peer]) for peer in others}, incoming, group)()
            assert all(incoming[peer] == 10 * peer + mesh.rank for peer in others)
        first, second = (sorted(links_of(group).peers) for group in groups)
        assert first == second
        mesh.gathered([0.0])
        same_host.unlink()
    return first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7, 5), (0, 3), (SLOT_BYTES // 8,)], ids=str)
def test_a_message_comes_as_it_was_when_it_was_sent(dtype, shape):
    one, other = linked()
    sent = torch.randn(shape).to(dtype)
    given = sent.clone().requires_grad_(dtype.is_floating_point)
    one.send(3, given)
    given.detach().zero_()
    torch.testing.assert_close(received(other, 3, sent), sent, rtol=0, atol=0)


def test_messages_of_a_channel_are_in_order_and_channels_do_not_wait_for_each_other():
    one, other = linked()
    numbers = torch.arange(6.0)
    for channel, number in zip((1, 2, 1, 2, 2, 1), numbers, strict=True):
        one.send(channel, number)
    targets = [torch.empty(()) for _ in range(3)]
    late = [other.expect(1, into) for into in targets]
    assert [received(other, 2, numbers[0]).item() for _ in range(3)] == [1, 3, 4]
    for expected, into, number in reversed(list(zip(late, targets, (0, 2, 5), strict=True))):
        other.receive(1, expected)
        assert into == number


def test_slots_are_used_again_and_who_is_ahead_waits_for_one():
    one, other = linked()
    sizes = [1 + 997 * number % 5000 for number in range(10 * SLOTS)]

    def send() -> None:
        for number, size in enumerate(sizes):
            one.send(0, torch.full((size,), float(number)))

    ahead = threading.Thread(target=send)
    ahead.start()
    ahead.join(0.2)
    assert ahead.is_alive() and max(one._written) == 1  # all slots are full, none was written over
    for number, size in enumerate(sizes):
        assert received(other, 0, torch.empty(size)).eq(number).all()
    ahead.join()
    assert sum(one._written) == len(sizes)


def test_a_rank_that_is_gone_is_told_by_whoever_waits_for_it():
    one, other = linked()
    other.send(0, torch.ones(2))
    other.close()
    assert received(one, 0, torch.empty(2)).eq(1).all()  # what it has sent is there
    for wait in (lambda: received(one, 0, torch.empty(2)), lambda: one.send(0, torch.ones(2))):
        with pytest.raises(LostRankError, match=r"another rank has left while this one waited for it \(rank 1, of"):
            wait()
    one, other = linked()
    for _ in range(SLOTS):
        one.send(0, torch.ones(2))
    other.close()
    with pytest.raises(LostRankError, match="another rank has left"):
        one.send(0, torch.ones(2))


def test_no_wait_is_without_a_limit():
    one, other = linked(limit_s=0.05)
    with pytest.raises(RuntimeError, match=r"Timed out after 0.05 s with rank 1, of this host"):
        received(one, 0, torch.empty(2))
    for _ in range(SLOTS):
        one.send(0, torch.ones(2))
    with pytest.raises(RuntimeError, match=r"Timed out after 0.05 s with rank 1"):
        one.send(0, torch.ones(2))
    other.close()


def meet(low: _Door, high: _Door) -> None:
    """As two ranks do."""
    knocking = threading.Thread(target=high.link, args=(low._token, "rank 0", True, 5.0))
    knocking.start()
    low.link(high._token, "rank 1", False, 5.0)
    knocking.join()


def test_a_door_lets_in_whom_it_expects_and_keeps_others_for_later(monkeypatch):
    monkeypatch.setattr(same_host, "INTRODUCTION_S", 0.1)
    before = sorted(Path("/proc/self/fd").iterdir())
    with closing(_Door()) as low, closing(_Door()) as high, closing(_Door()) as early:
        assert low.place[: same_host.HOST_BYTES] == high.place[: same_host.HOST_BYTES] != same_host.NO_HOST
        strangers = [same_host._socket(5.0) for _ in range(3)]
        for stranger in strangers:
            stranger.connect(same_host._name(low._token))
        strangers[0].send(os.urandom(16))  # without memory; the next says nothing
        strangers[2].close()
        knocking = threading.Thread(target=early.link, args=(low._token, "rank 0", True, 5.0))
        knocking.start()
        meet(low, high)
        low.links[high._token].send(0, torch.arange(3))
        assert received(high.links[low._token], 0, torch.arange(3)).tolist() == [0, 1, 2]
        assert list(low.links) == [high._token]
        low.link(early._token, "rank 2", False, 5.0)
        knocking.join()
        early.links[low._token].send(0, torch.arange(2))
        assert received(low.links[early._token], 0, torch.arange(2)).tolist() == [0, 1]
        for stranger in strangers:
            stranger.close()
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_another_users_process_is_not_let_in(monkeypatch):
    monkeypatch.setattr(same_host, "MEETING_S", 0.3)
    with closing(_Door()) as low, closing(_Door()) as high:
        monkeypatch.setattr(os, "getuid", lambda: 3_000_000_000)
        meet(low, high)
        assert not low.links and not high.links


def test_a_user_of_a_high_number_is_the_same_at_both_ends():
    """User ids have no sign."""
    assert same_host.OWNER.unpack(struct.pack("=iII", 1, 3_000_000_000, 2)) == (1, 3_000_000_000, 2)


def test_who_cannot_be_met_is_not_linked(monkeypatch):
    monkeypatch.setattr(same_host, "MEETING_S", 0.2)
    with closing(_Door()) as low, closing(_Door()) as gone:
        gone.close()
        low.link(gone._token, "rank 0", True, 5.0)
        low.link(gone._token, "rank 0", False, 5.0)
        assert not low.links
        monkeypatch.setattr(os, "memfd_create", lambda name: (_ for _ in ()).throw(OSError(24, "Too many open files")))
        low.link(gone._token, "rank 0", False, 5.0)
        assert not low.links


def test_a_slot_is_free_only_when_it_has_been_read():
    one, other = linked()
    one.send(0, torch.ones(4))
    seen = []

    class Watching(torch.Tensor):
        def copy_(self, source):
            seen.append(int(other._in.read[0]))
            return super().copy_(source)

    into = torch.zeros(4).as_subclass(Watching)
    other.receive(0, other.expect(0, into))
    assert seen == [0] and other._in.read[0] == 1 and into.sum() == 4


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), RuntimeError("unable to mmap")], ids=repr)
def test_a_link_that_one_end_lacks_is_used_by_neither(error):
    """As where a rank may open no more files: all go on, by Gloo where they have to, and do not try again."""

    def check(mesh, error):
        with pytest.MonkeyPatch.context() as patch:
            kept, fallen = Link.__init__, []

            def fails(link, line, peer, mine, theirs):
                kept(link, line, peer, mine, theirs)
                if mesh.rank == 2 and peer == "rank 0":
                    fallen.append(peer)
                    raise error

            patch.setattr(Link, "__init__", fails)
            patch.setattr(same_host, "MEETING_S", 0.5)
            found = linked_anew(mesh)
            assert len(fallen) == (mesh.rank == 2)
            return found

    found = run_on_ranks(Layout(1, 1, 3), check, error)
    assert 2 not in found[0] and 0 not in found[2] and (2 in found[1]) == (1 in found[2])


def test_as_many_may_be_on_their_way_as_both_ends_wait_for():
    """More than there are slots, in both directions at once."""

    def check(mesh):
        peer = 1 - mesh.rank
        waits = []
        for number in range(3 * SLOTS):
            into = torch.empty(3)
            sent = torch.full((3,), float(number + 100 * mesh.rank))
            waits.append((number, into, start_messages({peer: sent}, {peer: into}, mesh.group)))
        for number, into, wait in waits:
            wait()
            assert into.eq(number + 100 * peer).all()

    run_on_ranks(Layout(1, 1, 2), check)


def test_ranks_of_other_users_or_networks_are_of_another_host(monkeypatch):
    mine = same_host._host()
    assert same_host._host() == mine != same_host.NO_HOST
    monkeypatch.setattr(os, "getuid", lambda: -2)
    assert same_host._host() != mine


def test_a_system_without_such_memory_has_no_links(monkeypatch):
    def none(name):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", none)
    with closing(_Door()) as door:
        assert door.place[: same_host.HOST_BYTES] == same_host.NO_HOST
    monkeypatch.delattr(os, "memfd_create")
    with closing(_Door()) as door:
        assert door.place[: same_host.HOST_BYTES] == same_host.NO_HOST


@pytest.mark.parametrize("ranks_of_a_host", [1, 2, 3])
def test_ranks_reach_each_other_whatever_their_hosts(ranks_of_a_host):
    """Messages of many sizes, of which some are too large for a slot, waited for in another order than sent."""

    def check(mesh):
        draw = torch.Generator().manual_seed(0)
        sizes = [1, 1000, SLOT_BYTES // 4, SLOT_BYTES // 4 + 1, 5]
        sent = torch.randn(len(sizes), 3, 3, SLOT_BYTES // 4 + 1, generator=draw)
        others = [rank for rank in range(3) if rank != mesh.rank]
        with hosts_of(ranks_of_a_host):
            near = len(links_of(mesh.group).peers)
            waiting = []
            for number, size in enumerate(sizes):
                outgoing = {peer: sent[number, mesh.rank, peer, :size].clone() for peer in others}
                incoming = {peer: torch.empty(size) for peer in others}
                waiting.append((number, size, incoming, outgoing, start_messages(outgoing, incoming, mesh.group)))
            for number, size, incoming, _, wait in reversed(waiting):
                wait()
                for peer, got in incoming.items():
                    assert torch.equal(got, sent[number, peer, mesh.rank, :size])
        return near, reaches_all(mesh.group)

    hosts = [rank // ranks_of_a_host for rank in range(3)]
    answers = run_on_ranks(Layout(1, 1, 3), check)
    assert [near for near, _ in answers] == [hosts.count(host) - 1 for host in hosts]
    assert all(reached for _, reached in answers)  # once they are on one host again


@pytest.mark.parametrize("layout", [Layout(1, 2, 2), Layout(1, 4, 1), Layout(1, 1, 3)], ids=str)
def test_hosts_never_change_the_result(layout):
    """Bit for bit: halos, means, both exchanges of attention, and their adjoints."""

    def check(mesh):
        grid = LatLonGrid(13, 18, lat_boundary="pole")
        domain, x = Domain(grid, mesh), random_like((2, 3, 4, 13, 18), 1).float()
        found = []
        for exchange in ("gather", "swap"):
            layer = randomized(FAConvLSTM2d(4, 8, attention_every=2, attention_exchange=exchange)).float()
            for ranks_of_a_host in (layout.ranks, 2, 1):
                with hosts_of(ranks_of_a_host):
                    given = domain.scatter(x).clone().requires_grad_()
                    layer.zero_grad()
                    out = layer(given, domain=domain)[0]
                    domain.total(out.square().sum()).backward()
                    found.append([out.detach(), given.grad, *(one.grad for one in layer.parameters())])
        for first, *others in (found[:3], found[3:]):
            for other in others:
                assert all(torch.equal(*pair) for pair in zip(first, other, strict=True))

    run_on_ranks(layout, check)


@pytest.mark.parametrize(
    ("hosts", "near"), [("aba", [[2], [], [0]]), ("abc", [[], [], []]), ("aaa", [[1, 2], [0, 2], [0, 1]])]
)
def test_only_ranks_of_one_host_are_linked(hosts, near):
    """From the first meeting on; two of which neither can share memory are not of one host."""

    def check(mesh, hosts):
        with pytest.MonkeyPatch.context() as patch:
            mine = hosts[mesh.rank].encode() * same_host.HOST_BYTES
            patch.setattr(same_host, "_host", lambda: same_host.NO_HOST if mine.startswith(b"c") else mine)
            return linked_anew(mesh)

    assert run_on_ranks(Layout(1, 1, 3), check, hosts) == near
    if hosts == "abc":
        assert run_on_ranks(Layout(1, 1, 3), check, "cbc") == near


def test_groups_go_by_their_own_messages():
    """Two groups of the same ranks, in another order on each."""

    def check(mesh):
        groups = [mesh.group, dist.new_group([0, 1])]
        same_host.link_group(groups[1], 60.0)
        peer, numbers = 1 - mesh.rank, count(10 * mesh.rank)
        waits = {}
        for place in (0, 1) if mesh.rank == 0 else (1, 0):
            into = torch.empty(1)
            message = torch.tensor([float(100 * place + next(numbers))])
            waits[place] = into, start_messages({peer: message}, {peer: into}, groups[place])
        for _, wait in waits.values():
            wait()
        return [int(waits[place][0]) for place in (0, 1)]

    assert run_on_ranks(Layout(1, 1, 2), check) == [[11, 110], [0, 101]]


def test_nothing_is_left_open_and_nothing_has_a_name():
    def check(mesh):
        before = sorted(Path("/proc/self/fd").iterdir())
        for size in (10, 10_000, 1_000_000):
            peer = 1 - mesh.rank
            into = torch.empty(size)
            start_messages({peer: torch.ones(size)}, {peer: into}, mesh.group)()
        assert sorted(Path("/proc/self/fd").iterdir()) == before

    run_on_ranks(Layout(1, 2, 1), check)
    assert not list(Path("/dev/shm").glob("*faconv*"))
