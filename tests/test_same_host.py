"""Ranks of one host and the memory that they share: the same messages as Gloo's, in any order, and no rank waits in
vain."""

import os
import socket
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
    link.receive(channel, link.expect(channel), into)
    return into


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
    late = [other.expect(1) for _ in range(3)]
    assert [received(other, 2, numbers[0]).item() for _ in range(3)] == [1, 3, 4]
    for expected, number in reversed(list(zip(late, (0, 2, 5), strict=True))):
        into = torch.empty(())
        other.receive(1, expected, into)
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


def test_a_door_lets_in_whom_it_expects_and_nobody_else():
    with closing(_Door()) as low, closing(_Door()) as high:
        assert low.place[: same_host.HOST_BYTES] == high.place[: same_host.HOST_BYTES] != same_host.NO_HOST
        strangers = [same_host._knocked(low._token, 5.0) for _ in range(3)]
        strangers[0].send(os.urandom(16))  # without memory
        memory = same_host._memory()
        socket.send_fds(strangers[1], [os.urandom(16)], [memory])  # of nobody who is expected
        strangers[2].close()
        knocking = threading.Thread(target=high.link, args=({low._token: "rank 0"}, {}, 5.0))
        knocking.start()
        low.link({}, {high._token: "rank 1"}, 5.0)
        knocking.join()
        low.links[high._token].send(0, torch.arange(3))
        assert received(high.links[low._token], 0, torch.arange(3)).tolist() == [0, 1, 2]
        assert len(low.links) == 1


def test_another_users_process_is_not_let_in(monkeypatch):
    with closing(_Door()) as low, closing(_Door()) as high:
        monkeypatch.setattr(os, "getuid", lambda: -2)

        def knock() -> None:
            with pytest.raises(LostRankError, match=r"another rank has left as it was met \(rank 0, of this host\)"):
                high.link({low._token: "rank 0"}, {}, 5.0)

        knocking = threading.Thread(target=knock)
        knocking.start()
        with pytest.raises(RuntimeError, match=r"Timed out after 0.2 s as ranks of this host met each other"):
            low.link({}, {high._token: "rank 1"}, 0.2)
        low.close()
        knocking.join()
        assert not low.links and not high.links


def test_a_rank_that_is_gone_before_it_is_met_is_told():
    with closing(_Door()) as low, closing(_Door()) as gone:
        gone.close()
        with pytest.raises(
            LostRankError, match=r"another rank has left as ranks of this host met each other .*refused"
        ):
            low.link({gone._token: "rank 0"}, {}, 5.0)


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
        group = dist.new_group([0, 1, 2])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(same_host, "_doors", [])
            patch.setattr(same_host, "_links", {})
            mine = hosts[mesh.rank].encode() * same_host.HOST_BYTES
            patch.setattr(same_host, "_host", lambda: same_host.NO_HOST if mine.startswith(b"c") else mine)
            same_host.link_group(group, 60.0)
            found = sorted(links_of(group).peers)
            others = [rank for rank in range(3) if rank != mesh.rank]
            incoming = {peer: torch.empty(1) for peer in others}
            start_messages({peer: torch.tensor([10.0 * mesh.rank + peer]) for peer in others}, incoming, group)()
            assert all(incoming[peer] == 10 * peer + mesh.rank for peer in others)
            mesh.gathered([0.0])
            same_host.unlink()
        return found

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
