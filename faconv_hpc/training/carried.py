"""States that are carried on: a sample whose window follows another begins with what the network knew at its end."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import RunConfig
from ..data.order import Order
from ..model.recurrence import State
from ..spatial.domain import Domain
from ..spatial.grid import Span
from .manifest import StatePiece
from .setup import places_of
from .shards import UnreadableCheckpointError

STATE, PARTS = "state", ("h", "c")


class CarriedStates:
    """Of the samples of this replica, on this rank's tile, from one step to the next.

    They are detached: gradients end where a window begins. What a step makes of them counts from its end on; where one
    is given up they are what they were.

    Args:
        config: of the run.
        domain: where the tile lies.
        order: of the samples, which says where a window follows another.
    """

    def __init__(self, config: RunConfig, domain: Domain, order: Order) -> None:
        self._domain, self._order, self._carries = domain, order, bool(config.training.stateful_windows)
        replica, micros = domain.mesh.replica, range(config.training.accumulation)
        self._places = [places_of(config, micro, replica) for micro in micros]
        self._kept: list[tuple[State, ...]] = []  # of each micro-batch; none at the beginning, when all are zero
        self._coming: list[tuple[State, ...]] = []

    def before(self, step: int, micro: int) -> tuple[State, ...] | None:
        """What the samples of a micro-batch begin with, per layer; zero where none is carried on. None: all are."""
        follows = [self._order.follows(step, place) for place in self._places[micro]]
        if not self._kept or not any(follows):
            return None
        states = self._kept[micro]
        if all(follows):
            return states
        kept = torch.tensor(follows, device=states[0][0].device)[:, None, None, None]
        return tuple((h.where(kept, 0), c.where(kept, 0)) for h, c in states)

    def after(self, states: Sequence[State]) -> None:
        """Takes what the samples of the next micro-batch of this step have come to."""
        if self._carries:
            self._coming.append(tuple((h.detach(), c.detach()) for h, c in states))

    def end_step(self, *, applied: bool) -> None:
        """What the step has made of the states is kept, or, where its numbers are not sound, forgotten: zero."""
        self._kept, self._coming = self._coming if applied else [], []

    # In a checkpoint

    @property
    def piece(self) -> StatePiece | None:
        """What this rank has of all states; None: nothing, all are zero."""
        if not self._kept:
            return None
        tile = self._domain.tile
        return StatePiece(places=tuple(self._all_places), rows=tile.rows, columns=tile.columns)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """``state/LAYER/PART`` and its value, (places, C_h, Y, X)."""
        for layer, states in enumerate(zip(*self._kept, strict=True)):
            for part, values in zip(PARTS, zip(*states, strict=True), strict=True):
                yield f"{STATE}/{layer}/{part}", torch.cat(values)

    def load(self, checkpoint: Path, pieces: Mapping[str, StatePiece], activation_type: torch.dtype) -> None:
        """Reads what this rank needs of them, whichever ranks and tiles wrote it.

        Args:
            checkpoint: its directory, whose files have been found whole.
            pieces: what each of them has.
            activation_type: of h; c is float32.

        Raises:
            UnreadableCheckpointError: a file can no longer be read.
        """
        whole: dict[str, Tensor] = {}
        for file, piece in pieces.items() if self._carries else ():
            try:
                self._fill(whole, checkpoint / file, piece)
            except (OSError, SafetensorError) as error:
                raise UnreadableCheckpointError(
                    f"{checkpoint / file} cannot be read: {error}. Look at its file system and permissions, and start "
                    f"the same command again."
                ) from None
        if not whole:
            return
        kept = {key: value.to(self._domain.mesh.device) for key, value in whole.items()}
        layers = range(len(kept) // len(PARTS))
        states = [(kept[f"{STATE}/{layer}/h"].to(activation_type), kept[f"{STATE}/{layer}/c"]) for layer in layers]
        sizes = [len(places) for places in self._places]
        parts = [(h.split(sizes), c.split(sizes)) for h, c in states]
        self._kept = [tuple((h[micro], c[micro]) for h, c in parts) for micro in range(len(sizes))]

    def _fill(self, whole: dict[str, Tensor], path: Path, piece: StatePiece) -> None:
        """Takes over the cells and places of a file that are this rank's, too."""
        tile, own = self._domain.tile, {place: number for number, place in enumerate(self._all_places)}
        places = [(own[place], number) for number, place in enumerate(piece.places) if place in own]
        rows, columns = _common(piece.rows, tile.rows), _common(piece.columns, tile.columns)
        if not (places and rows and columns):
            return
        there, here = (
            (slice(rows.start - first, rows.stop - first), slice(columns.start - left, columns.stop - left))
            for first, left in ((piece.rows[0], piece.columns[0]), (tile.rows[0], tile.columns[0]))
        )
        with safe_open(path, "pt") as stored:
            for key in stored.keys():  # noqa: SIM118
                if key.startswith(f"{STATE}/"):
                    values = stored.get_slice(key)[:, :, *there]
                    filled = whole.setdefault(key, values.new_zeros(len(own), values.shape[1], *tile.shape))
                    for mine, number in places:
                        filled[mine, :, *here] = values[number]

    @property
    def _all_places(self) -> list[int]:
        return [place for places in self._places for place in places]


def _common(one: Span, other: Span) -> range:
    return range(max(one[0], other[0]), min(one[1], other[1]))
