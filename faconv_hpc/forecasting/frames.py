"""Raw fields to forecast from, as a network's contract has them, whatever holds them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..data.fields import Fields, StoreFields
from ..data.moments import ChannelMoments, Moments
from ..data.statistics import Statistics, row_weights
from ..data.store import Store
from ..data.unknown_names import index_of
from ..errors import InputError
from ..spatial.grid import Tile
from ..training.contract import Contract


@dataclass(frozen=True)
class Frames:
    """What is read to forecast, held to a contract.

    Attributes:
        name: for messages.
        identity: what makes it other data.
        states: the prognostic variables.
        forcings: those that are forcings; None if there are none. They may have other times.
        read_static: fields_SYX without time, of a tile.
        sequence: its name, where it is one of several.
    """

    name: str
    identity: str
    states: Fields
    forcings: Fields | None
    read_static: Callable[[Tile], NDArray[np.float32]]
    sequence: str = ""


def store_frames(store: Store, contract: Contract, sequence: str | None = None) -> Frames:
    """What a store holds.

    Args:
        sequence: which one, where the store has several.

    Raises:
        InputError: the store has not what the contract says, or another sequence.
    """
    contract.check(store, roles=("prognostic", "forcing", "static"))
    axis, channels = store.layout.time, contract.channels
    if axis.names and sequence is None:
        raise InputError(
            f"the store {store.path} holds {len(axis.names)} sequences: {', '.join(axis.names[:8])}"
            f"{', ...' if len(axis.names) > 8 else ''}. Say with --sequence which one to forecast from."
        )
    own = range(len(axis))
    if sequence is not None:
        own = axis.sequences[index_of("sequence", sequence, axis.names, f"the store {store.path}")]
    states, forcings = (
        StoreFields(store, tuple(one.name for one in ones), own) for ones in (channels.prognostic, channels.forcing)
    )
    static = [one.name for one in channels.static]
    return Frames(
        name=f"the store {store.path}" + (f" (sequence {sequence})" if sequence else ""),
        identity=f"{store.digest} {sequence or ''}".strip(),
        states=states,
        forcings=forcings if forcings.names else None,
        read_static=lambda tile: store.read_static(static, tile),
        sequence=sequence or "",
    )


def check_static_fields(contract: Contract, fields_SYX: NDArray[np.float32], where: str) -> None:
    """Raises InputError for fields without time of the whole grid that are not those of training."""
    weights = row_weights(np.array(contract.latitude_deg), np.array(contract.longitude_deg))
    for variable, field_YX in zip(contract.channels.static, fields_SYX, strict=True):
        if not np.isfinite(field_YX).all():
            raise InputError(f"{variable.name!r} has missing cells in {where}, and it has no time. Fill them.")
        moments = ChannelMoments(Moments.of(field_YX[None], weights))
        mean, std, _ = Statistics.of([moments]).rows[0].tolist()
        contract.check_static(variable, mean, std, where)
