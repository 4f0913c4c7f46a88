"""Collectives over a group of ranks, one tensor each; halos are moved in exchange.py. No autograd here.

A group of None is a single rank, which has nothing to send.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..observe import Clock
from .messages import reaches_all, start_messages
from .same_host import SLOT_BYTES

Value = TypeVar("Value")
Finish = Callable[[], Tensor]
"""Waits for what was started and returns the result."""

# What torch 2.13 calls all_gather_single and reduce_scatter_single has other names in 2.11 and 2.12, which 2.13
# takes too, with a warning that they are going away.
SMALL_BYTES = 2**16
"""Up to here Gloo's rings, of several messages from each rank to the next, take longer than one from all to all."""

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def carried(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The tensor where the group's messages begin and end: Gloo's in host memory, NCCL's on the device."""
    if group is None or value.device.type == "cpu" or dist.get_backend(group) != dist.Backend.GLOO:
        return value
    return value.cpu()


def start_sum(value: Tensor, group: dist.ProcessGroup | None, clock: Clock, verb: str) -> Finish:
    """Starts the sum of ``value`` over the group, for a verb; ``value`` is overwritten.

    It has the same bits on all ranks.
    """
    if group is None:
        return lambda: value
    device, value = value.device, carried(value, group)
    if _is_small(value, group):
        with clock.communicating(verb):
            everyones, sent = _start_to_all(value, group)

        def summed() -> Tensor:
            with clock.communicating(verb):
                sent()
            return everyones.sum(0, dtype=value.dtype).to(device)

        return summed
    with clock.communicating(verb):
        work = dist.all_reduce(value, group=group, async_op=True)

    def finish() -> Tensor:
        with clock.communicating(verb):
            work.wait()
        return value.to(device)

    return finish


def gather(
    tile: Tensor, dim: int, sizes: Sequence[int], index: int, group: dist.ProcessGroup, clock: Clock
) -> list[Tensor]:
    """The tiles of all ranks of the group but this one, number ``index``; their sizes along ``dim`` are ``sizes``.

    Tiles are filled up to the largest, because collectives want equal parts, and trimmed again.
    """
    part = _filled(tile.movedim(dim, 0), max(sizes))
    with clock.communicating("gather"):
        parts = all_gather(part, group)
    others = torch.cat([parts[:index], parts[index + 1 :]])  # which may be kept, and this rank's not a second time
    return [part[:size].movedim(0, dim) for part, size in zip(others, _but(sizes, index), strict=True)]


def reduce_scatter(
    whole: Tensor, dim: int, sizes: Sequence[int], index: int, group: dist.ProcessGroup, clock: Clock
) -> Tensor:
    """Sums ``whole`` over the group and leaves each rank its own part along ``dim``: adjoint of `gather`."""
    largest = max(sizes)
    spans = whole.movedim(dim, 0).to(at_least_float32(whole.dtype)).split(list(sizes))
    parts = carried(torch.cat([_filled(span, largest) for span in spans]), group)
    part = parts.new_empty(largest, *parts.shape[1:])
    with clock.communicating("adjoint of gather"):
        if parts.device.type == "cpu":  # Gloo would sum up all of it on every rank
            received = torch.empty_like(parts)
            counts = [part.numel()] * len(sizes)
            _exchange(parts.view(-1), counts, received.view(-1), counts, group)
            part = received.view(len(sizes), *part.shape).sum(0)
        else:
            _reduce_scatter(part, parts, group=group)
    return part[: sizes[index]].to(whole).movedim(0, dim)


def all_to_all(
    pieces: Sequence[Tensor], shapes: Sequence[torch.Size], index: int, group: dist.ProcessGroup, clock: Clock
) -> list[Tensor]:
    """Sends piece i to rank i of the group; returns what each other rank sent here, of the given shapes.

    This rank is number ``index``, and its own piece goes nowhere.
    """
    outgoing = carried(torch.cat([piece.reshape(-1) for piece in _but(pieces, index)]), group)
    counts = [shape.numel() for shape in _but(shapes, index)]
    incoming = outgoing.new_empty(sum(counts))
    with clock.communicating("swap"):
        sent = [piece.numel() if rank != index else 0 for rank, piece in enumerate(pieces)]
        _exchange(outgoing, sent, incoming, [*counts[:index], 0, *counts[index:]], group)
    parts = incoming.to(pieces[0].device).split(counts)
    return [part.view(shape) for part, shape in zip(parts, _but(shapes, index), strict=True)]


def all_gather(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(R, ...) the tensors of the R ranks of the group, all of one shape."""
    device, mine = mine.device, carried(mine, group)
    if _is_small(mine, group) or (reaches_all(group) and mine.nbytes <= SLOT_BYTES):
        everyones, sent = _start_to_all(mine, group)
        sent()
        return everyones.to(device)
    ranks = dist.get_world_size(group)
    everyone = mine.new_empty(ranks * mine.numel())
    _all_gather(everyone, mine.flatten(), group=group)
    return everyone.view(ranks, *mine.shape).to(device)


def gathered_hashes(text: str, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """A 63-bit hash of every rank's text."""
    digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    hashes: list[int] = all_gather(torch.tensor(digest, dtype=torch.int64, device=device), group).tolist()
    return hashes


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type in which values of ``dtype`` are summed: float64 stays, all others become float32."""
    return dtype if dtype == torch.float64 else torch.float32


def _is_small(value: Tensor, group: dist.ProcessGroup) -> bool:
    """Whether it is sent from every rank to every other at once."""
    return value.device.type == "cpu" and value.nbytes * group.size() <= SMALL_BYTES


def _start_to_all(value: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Callable[[], object]]:
    """(R, ...) the tensors of the R ranks, once what is returned with them has been called."""
    if reaches_all(group):
        value, everyones = value.contiguous(), value.new_empty(group.size(), *value.shape)
        everyones[group.rank()] = value
        others = [rank for rank in range(group.size()) if rank != group.rank()]
        return everyones, start_messages(
            dict.fromkeys(others, value), {rank: everyones[rank] for rank in others}, group
        )
    copies = value.expand(group.size(), *value.shape).contiguous()
    everyones = torch.empty_like(copies)
    return everyones, dist.all_to_all_single(everyones, copies, group=group, async_op=True).wait


def _exchange(
    outgoing: Tensor, sent: Sequence[int], incoming: Tensor, received: Sequence[int], group: dist.ProcessGroup
) -> None:
    """Fills ``incoming`` with what every rank has sent here, when parts of ``outgoing`` have gone to every rank.

    Both have one dimension: parts of ``sent`` and ``received`` numbers, in the order of ranks, this one among them.
    """
    if not reaches_all(group):
        dist.all_to_all_single(incoming, outgoing, list(received), list(sent), group=group)
        return
    pieces, places = outgoing.split(list(sent)), incoming.split(list(received))
    here = group.rank()
    places[here].copy_(pieces[here])
    outgoing_by_rank, incoming_by_rank = (
        {rank: part for rank, part in enumerate(parts) if rank != here and part.numel()} for parts in (pieces, places)
    )
    start_messages(outgoing_by_rank, incoming_by_rank, group)()


def _but(everyones: Sequence[Value], index: int) -> list[Value]:
    """Of all ranks but one."""
    return [*everyones[:index], *everyones[index + 1 :]]


def _filled(part: Tensor, size: int) -> Tensor:
    filled = part.new_zeros(size, *part.shape[1:])
    filled[: part.shape[0]] = part
    return filled
