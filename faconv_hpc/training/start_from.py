"""A run that begins with the weights of another: what fits is taken over, channels by the names of their variables."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..data.variables import Channels, Variable
from ..errors import InputError
from ..model.rules import ON_THE_SPHERE, squares_of
from ..spatial.mesh import ProcessMesh
from .contract import Contract
from .fit import block_of
from .loading import read_weights
from .setup import WAYS, model_options

TARGETS, COARSE = "forecast.", "subspace.to_coarse."
OF_INPUTS = {"layers.0.input_weight": 1, "layers.0.input_depthwise": 0, "layers.0.input_depthwise_bias": 0}
"""Weights of the first layer that the inputs come into, and along which dim they stand."""
KERNELS_OF_INPUTS = "layers.0.input_depthwise"
INPUTS_TO_TARGETS = "forecast.from_inputs.weight"
OF_THE_EMBEDDING = (
    "embedding_channels", "embedding_past", "embedding_leads", "embedding_weight", "seasonal_encoding", "coarse_shape",
)  # fmt: skip
SHOWN = 6  # names in one message
Key = tuple[str | float | None, ...]
"""What tells channels apart: a variable's name, and what makes it another one."""
Seen = tuple[list[Key], list[Key]]
"""What the layers of a network see: that of the weights, and the one that they come into."""


@dataclass(frozen=True)
class Beginning:
    """What a run begins with.

    Attributes:
        path: a run's, a checkpoint's or an export's.
        step: of that training.
        options: of its network.
        contract: of that training; the statistics of the variables that both have are kept.
        weights: by their names; empty but on the first rank.
    """

    path: Path
    step: int
    options: dict[str, Any]
    contract: Contract
    weights: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path, mesh: ProcessMesh) -> "Beginning":
        """Collective: the first rank reads.

        Raises:
            InputError: there is none, or it is damaged or of another version.
        """
        whole = cls.of(path) if mesh.rank == 0 else None
        told = mesh.from_first(whole and replace(whole, weights={}))
        assert told is not None, "the first rank reads"
        return whole or told

    @classmethod
    def of(cls, path: Path) -> "Beginning":
        """The same, for this process alone."""
        about, contract, weights, _ = read_weights(path)
        return cls(path, int(about["step"]), json.loads(about["network"]), contract, weights)

    def fill(self, network: nn.Module, model: ModelConfig, channels: Channels, mesh: ProcessMesh) -> str:
        """Puts the weights into a network, on every rank; says what is new. Collective.

        The network is what the model section says, for these channels.

        What a channel has no weight for, as its variable is new, begins at 0: the forecast of the others is what it was
        before; and a new variable is forecast by persistence. What has another shape stays as it was drawn.

        Raises:
            InputError: no layer has the shape of any of the weights, or a model of torch-harmonics has other inputs.
        """
        before = self.contract.channels
        kept: dict[str, Tensor] = {}
        seen = _input_keys(before, self._history), _input_keys(channels, model.history)
        self._check_operator(seen)
        squares = self._squares, block_of(model)
        parameters = dict(network.named_parameters())
        if mesh.rank == 0:
            for name, value in network.state_dict().items():
                if name in OF_INPUTS and self._squares not in (1, squares[1]) and KERNELS_OF_INPUTS in self.weights:
                    continue  # kernels of a square's cells and what they are weighed by have no mean together
                fitted = _fitted(name, self.weights.get(name), value, before, channels, seen, squares)
                if fitted is not None:
                    kept[name] = fitted
        names, had = mesh.from_first((list(kept), list(self.weights)))
        news = [name for name in parameters if name not in had]
        out = [name for name in had if name not in parameters]
        drawn = [name for name in parameters if name in had and name not in names]
        if not any(name.startswith("layers.") for name in names):
            raise InputError(
                f"training.start_from={self.path}: no layer of its network has the shape of this config's. "
                f"Give the same model section (hidden_channels, bottleneck_channels, cell, ...), or another checkpoint."
            )
        with torch.no_grad():
            for name in names:
                parameters[name].copy_(mesh.from_rank(kept.get(name), parameters[name].shape, 0))
        lists = {"new": news, "of another shape, so drawn anew": drawn, "left out, as this network has no such": out}
        return "\n  ".join([*self._told(before, channels), *_listed(lists), *self._built_otherwise(model)])

    @property
    def _squares(self) -> int:
        """Cells along a side of those that its layers compute on."""
        return squares_of(self.options["cell"], int(self.options.get("scale_factor", 1)))

    @property
    def _history(self) -> int:
        """Frames that its network sees at each step."""
        return int(self.options.get("history", 1))

    def _check_operator(self, seen: Seen) -> None:
        """Raises InputError where channels would have to be matched within a model of torch-harmonics."""
        cell, (was, now) = self.options["cell"], seen
        if cell in ON_THE_SPHERE and was != now:
            raise InputError(
                f"training.start_from={self.path}: a network of cell={cell} is taken over with the same inputs in the "
                f"same order only; it has {_shown(was)}, this config gives {_shown(now)}. Give those, or begin anew."
            )

    def _built_otherwise(self, model: ModelConfig) -> Iterator[str]:
        now = json.loads(json.dumps(model_options(model)))
        elsewhere = (*WAYS, *OF_THE_EMBEDDING, "history", "scale_factor")
        both = [key for key in now if key in self.options and key not in elsewhere]
        other = [f"model.{key}={json.dumps(self.options[key])}" for key in both if now[key] != self.options[key]]
        if model.history < self._history:  # more frames change nothing at first, fewer are missed
            other.append(f"model.history={self._history}")
        squares = block_of(model)
        if squares != self._squares:
            yield (
                f"its layers computed on squares of {self._squares} x {self._squares} cells, those here on {squares} x "
                f"{squares}: the forecast begins with what it was for their means, and fits a grid {squares}/"
                f"{self._squares} times as fine as that of before"
            )
        if other:
            yield (
                f"its network was built in another way, so the forecast does not begin as it was: {', '.join(other)} "
                f"would keep it"
            )

    def _told(self, before: Channels, channels: Channels) -> list[str]:
        lines = [f"begins with the weights of {self.path}, step {self.step}"]
        targets = [[one.name for one in of.targets] for of in (before, channels)]
        for what, old, new in (("inputs", before.inputs, channels.inputs), ("forecast", *targets)):
            for text, some in (("new", set(new) - set(old)), ("left out", set(old) - set(new))):
                if some:
                    lines.append(f"{what} {text}: {', '.join(sorted(some))}")
        kinds = {one.name: one.kind for one in before.fields}
        other = [one.name for one in channels.fields if kinds.get(one.name, one.kind) != one.kind]
        if other:
            lines.append(f"seen in another way than before (log1p, anomalies), so as new: {', '.join(other)}")
        return lines


def _shown(keys: Sequence[Key]) -> str:
    return ", ".join("".join(str(part) for part in key if part is not None) for key in keys)


def _listed(lists: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for what, names in lists.items():
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            yield f"{what}: {', '.join(names[:SHOWN])}{more}"


def _fitted(
    name: str,
    old: Tensor | None,
    drawn: Tensor,
    before: Channels,
    channels: Channels,
    seen: Seen,
    squares: tuple[int, int],
) -> Tensor | None:
    """The weight as this network has it; None: it fits nowhere.

    Args:
        squares: sides of those that the two compute on.
    """
    if old is None:
        return None
    zero, was, now = torch.zeros_like(drawn), squares[0] ** 2, squares[1] ** 2
    given = _of_each_cell(seen[0], now), _of_each_cell(seen[1], now)
    targets = _of_each_cell(_keys(before.targets), now), _of_each_cell(_keys(channels.targets), now)
    if name in OF_INPUTS:  # a kernel of one channel stays as drawn: of two factors that are both 0 none would learn
        dim = OF_INPUTS[name]
        return _gathered(_on_squares(old, was, now, dim), zero if dim else drawn, *given, dim=dim)
    if name == INPUTS_TO_TARGETS:
        old = _on_squares(_on_squares(old, was, now, 0), was, now, 1)
        empty = drawn.new_zeros(len(drawn), *old.shape[1:])
        rows = _gathered(old, empty, *targets, dim=0)
        return None if rows is None else _gathered(rows, zero, *given, dim=1)
    if name.startswith(TARGETS):
        return _gathered(_on_squares(old, was, now, 0), zero, *targets, dim=0)
    if name.startswith(COARSE):
        had, has = _keys(before.prognostic), _keys(channels.prognostic)
        found = _gathered(old.unflatten(0, (len(had), -1)), zero.unflatten(0, (len(has), -1)), had, has, dim=0)
        return None if found is None else found.flatten(0, 1)
    return old if old.shape == drawn.shape else None


def _keys(variables: Sequence[Variable]) -> list[Key]:
    """What is forecast: a change and a departure from the mean are not the same."""
    return [(one.name, one.role, *one.kind) for one in variables]


def _input_keys(channels: Channels, history: int) -> list[Key]:
    """What an input is: its name, how it is transformed, and of how many steps before."""
    kinds = {one.name: one.kind for one in channels.fields}
    now = [(name, *kinds.get(name, ())) for name in channels.inputs]
    return now + [(*key, f"-{age}") for age in range(1, history) for key in now[: channels.remembered]]


def _on_squares(old: Tensor, was: int, now: int, dim: int) -> Tensor:
    """Weights of squares with so many cells as those of squares with others, whose cells all have the same.

    What a layer takes in (dim 1) is then the mean of a square's cells; what it gives (dim 0) is the mean that it gave.
    """
    if was == now:
        return old
    of_cells: Tensor = old.unflatten(dim, (-1, was))
    of_square = of_cells.mean(dim + 1) if dim == 0 else of_cells.sum(dim + 1) / now
    return of_square.repeat_interleave(now, dim=dim)


def _of_each_cell(keys: Sequence[Key], cells: int) -> list[Key]:
    """Of squares, whose cells are channels side by side."""
    return [(*key, f"cell {cell}") for key in keys for cell in range(cells)]


def _gathered(old: Tensor, new: Tensor, before: Sequence[Key], now: Sequence[Key], dim: int) -> Tensor | None:
    """Of each channel its own part along a dim, that of ``new`` where it had none; None where shapes differ."""
    parts = dict(zip(before, old.unbind(dim), strict=True))
    of_new = new.unbind(dim)
    if any(part.shape != of_new[0].shape for part in parts.values()):
        return None
    return torch.stack([parts.get(key, one) for key, one in zip(now, of_new, strict=True)], dim=dim)
