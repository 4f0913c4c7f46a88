"""States that are carried on: a sample whose window follows another begins with what the network knew at its end."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import RunConfig
from ..data.order import Order
from ..model.state import NetworkState
from ..observe import LOADING
from ..spatial.domain import Domain
from ..spatial.grid import Span, Tile
from .manifest import StatePiece
from .resume import Resumed
from .setup import places_of
from .shards import UnreadableCheckpointError

PAST = "past/"
"""What all tiles have the same of; the rest are a tile's cells."""
OWN_TYPE = ("c", "there", "frames")
"""Parts whose type is not that of the activations."""


class CarriedStates:
    """Of the samples of this replica, on this rank's tile, from one step to the next.

    They are detached: gradients end where a window begins. What a step makes of them counts from its end on; where one
    is given up they are what they were, and where its numbers are not sound all begin with zero again.

    Args:
        config: of the run.
        domain: where the tile lies.
        order: of the samples, which says where a window follows another.
    """

    def __init__(self, config: RunConfig, domain: Domain, order: Order) -> None:
        self._domain, self._order, self._carries = domain, order, bool(config.training.stateful_windows)
        replica, micros = domain.mesh.replica, range(config.training.accumulation)
        self._places = [places_of(config, micro, replica) for micro in micros]
        self._kept: list[dict[str, Tensor]] = []  # of each micro-batch; none where all are zero
        self._coming: list[dict[str, Tensor]] = []

    @classmethod
    def resumed(
        cls, config: RunConfig, domain: Domain, order: Order, resumed: Resumed, activation_type: torch.dtype
    ) -> "CarriedStates":
        """Those that a run goes on with; see `load`."""
        carried = cls(config, domain, order)
        carried.load(resumed.directory, resumed.states, activation_type)
        return carried

    def before(self, step: int, micro: int) -> NetworkState | None:
        """What the samples of a micro-batch begin with; zero where none is carried on. None: all are."""
        follows = self._follows(step, micro)
        if not self._kept or not any(follows):
            return None
        kept = self._kept[micro]
        return NetworkState.of(kept if all(follows) else {name: _where(follows, one) for name, one in kept.items()})

    def after(self, state: NetworkState) -> None:
        """Takes what the samples of the next micro-batch of this step have come to."""
        if self._carries:
            self._coming.append({name: one.detach() for name, one in state.tensors().items()})

    def end_step(self, *, applied: bool) -> None:
        """What the step has made of the states is kept; or, where its numbers are not sound, none is."""
        self._kept, self._coming = self._coming if applied else [], []

    def _follows(self, step: int, micro: int) -> list[bool]:
        return [self._order.follows(step, place) for place in self._places[micro]]

    # In a checkpoint

    def saved(self, step: int) -> tuple[StatePiece, dict[str, Tensor]] | None:
        """What a run needs of this rank's to go on after so many steps, in host memory; None: nothing.

        See `NetworkState.tensors`; the samples are the places whose next window follows.
        """
        parts = [(micro, [n for n, one in enumerate(self._follows(step, micro)) if one]) for micro in self._micros]
        places = [self._places[micro][number] for micro, numbers in parts for number in numbers]
        if not (self._kept and places):
            return None
        tensors = {
            name: torch.cat([self._kept[micro][name][numbers].cpu() for micro, numbers in parts])
            for name in self._kept[0]
        }
        tile = self._domain.tile
        return StatePiece(places=tuple(places), rows=tile.rows, columns=tile.columns), tensors

    def load(self, checkpoint: Path, pieces: Mapping[str, StatePiece], activation_type: torch.dtype) -> None:
        """Reads what this rank needs of them, whichever ranks and tiles wrote it; other places begin with zero.

        Args:
            checkpoint: its directory, whose files have been found whole.
            pieces: what each of its files of states has.
            activation_type: of all but `OWN_TYPE`.

        Raises:
            UnreadableCheckpointError: a file can no longer be read.
        """
        if not (pieces and self._carries):
            return
        places = [place for own in self._places for place in own]
        reader = _Reader({place: number for number, place in enumerate(places)}, self._domain.tile)
        with self._domain.mesh.activity.during(LOADING):
            for file, piece in pieces.items():
                try:
                    reader.read(checkpoint / file, piece)
                except (OSError, SafetensorError) as error:
                    raise UnreadableCheckpointError(
                        f"{checkpoint / file} cannot be read: {error}. Look at its file system and permissions, and "
                        f"start the same command again."
                    ) from None
        if not reader.whole:
            return
        device, sizes = self._domain.mesh.device, [len(own) for own in self._places]
        split = {
            name: one.to(device, one.dtype if name.endswith(OWN_TYPE) else activation_type).split(sizes)
            for name, one in reader.whole.items()
        }
        self._kept = [{name: parts[micro] for name, parts in split.items()} for micro in self._micros]

    @property
    def _micros(self) -> range:
        return range(len(self._places))


class _Reader:
    """Puts together what one rank has of the files of all that wrote."""

    def __init__(self, places: Mapping[int, int], tile: Tile) -> None:
        self._places, self._tile = places, tile
        self.whole: dict[str, Tensor] = {}

    def read(self, path: Path, piece: StatePiece) -> None:
        """Takes over the cells and places of a file that are this rank's, too."""
        tile, common = self._tile, [(own, number) for number, place in enumerate(piece.places)
                                    if (own := self._places.get(place)) is not None]  # fmt: skip
        rows, columns = _common(piece.rows, tile.rows), _common(piece.columns, tile.columns)
        if not (common and rows and columns):
            return
        there, here = (
            (slice(rows.start - first, rows.stop - first), slice(columns.start - left, columns.stop - left))
            for first, left in ((piece.rows[0], piece.columns[0]), (tile.rows[0], tile.columns[0]))
        )
        with safe_open(path, "pt") as stored:
            for key in stored.keys():  # noqa: SIM118
                part, cells = stored.get_slice(key), not key.startswith(PAST)
                for own, number in common:
                    values = part[number : number + 1, :, *there] if cells else part[number : number + 1]
                    if key not in self.whole:
                        shape = (values.shape[1], *tile.shape) if cells else values.shape[1:]
                        self.whole[key] = values.new_zeros(len(self._places), *shape)
                    self.whole[key][own, :, *(here if cells else ())] = values[0]


def _where(follows: Sequence[bool], values: Tensor) -> Tensor:
    """Zero for samples that follow none; without a mask, for whose copy the processor would wait for the device."""
    parts = zip(follows, values.split(1), strict=True)
    return torch.cat([part if one else torch.zeros_like(part) for one, part in parts])


def _common(one: Span, other: Span) -> range:
    return range(max(one[0], other[0]), min(one[1], other[1]))
