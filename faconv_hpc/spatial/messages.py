"""Messages between ranks, a tensor each: started early, waited for late. No autograd here, see operations.py."""

from collections.abc import Callable, Mapping

import torch.distributed as dist
from torch import Tensor

from .same_host import SLOT_BYTES, links_of


def start_messages(
    outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], group: dist.ProcessGroup | None
) -> Callable[[], None]:
    """Sends a tensor to each of some ranks of a group, and receives one from each of some.

    Between ranks of one host they go through memory that both have, where the group is Gloo's and they are not too
    large for it; all others by the group, on a GPU at once.

    Args:
        outgoing, incoming: by rank of the group; contiguous, on the device that the group's messages begin and end on
            (see `carried`). Neither may be freed or changed before they have been waited for.
        group: in which the others call this, too; None where there are none.

    Returns:
        What waits for them.
    """
    if group is None:
        return lambda: None
    channel, links = links_of(group)

    def near(peer: int, message: Tensor) -> bool:
        return peer in links and message.nbytes <= SLOT_BYTES

    expected = [
        (links[peer], links[peer].expect(channel, into)) for peer, into in sorted(incoming.items()) if near(peer, into)
    ]
    for peer, message in sorted(outgoing.items()):
        if near(peer, message):
            links[peer].send(channel, message)
    works = _started_by_group(
        {peer: message for peer, message in outgoing.items() if not near(peer, message)},
        {peer: into for peer, into in incoming.items() if not near(peer, into)},
        group,
    )

    def finish() -> None:
        for link, number in expected:
            link.receive(channel, number)
        for work in works:
            work.wait()

    return finish


def reaches_all(group: dist.ProcessGroup) -> bool:
    """Whether this rank and all others of the group are on one host, and share memory."""
    return len(links_of(group).peers) == group.size() - 1


def _started_by_group(
    outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], group: dist.ProcessGroup
) -> list[dist.Work]:
    """As one on a GPU; Gloo knows no such thing, and torch's way to several takes as long again as its messages."""
    operations = [
        dist.P2POp(operation, buffer, group=group, group_peer=peer)
        for operation, buffers in ((dist.irecv, incoming), (dist.isend, outgoing))
        for peer, buffer in sorted(buffers.items())
    ]
    if operations and operations[0].tensor.device.type != "cpu":
        return list(dist.batch_isend_irecv(operations))
    role = {dist.irecv: "group_src", dist.isend: "group_dst"}
    works = (one.op(one.tensor, group=one.group, **{role[one.op]: one.group_peer}) for one in operations)
    return [work for work in works if work is not None]
