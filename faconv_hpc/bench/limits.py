"""What the machine can do at best, measured beside the layers: a matrix product, and a copy."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from ..model.arithmetic import ACTIVATIONS
from ..spread import Spread
from .case import BenchCase
from .timing import timed

SQUARES = {"cpu": (256, 512, 1024), "cuda": (2048, 4096, 8192)}
COPIED_BYTES = {"cpu": 2**27, "cuda": 2**30}  # more than caches hold
COPY = "copy"

Shape = tuple[int, int, int]
"""M, K, N of a product (M, K) (K, N)."""


class LimitRuns:
    """The works that show the limits, on this rank.

    Args:
        case: of the layers: the type, and the sizes of one of the products, an expansion to four gates.
        cells: of this rank's tile.
        device: of this rank.
    """

    def __init__(self, case: BenchCase, cells: int, device: torch.device) -> None:
        expansion = (4 * case.hidden, max(case.hidden // 2, 1), cells)
        self._shapes = {_name(shape): shape for shape in (expansion, *((n, n, n) for n in SQUARES[device.type]))}
        self._dtype, self._device = ACTIVATIONS[case.precision], device

    def works(self) -> dict[str, Callable[[], list[float]]]:
        """By what `interleaved` calls them; each gives its seconds."""
        works: dict[str, Callable[[], list[float]]]
        works = {name: partial(timed, self._device, self._product(shape)) for name, shape in self._shapes.items()}
        source = torch.zeros(COPIED_BYTES[self._device.type], dtype=torch.uint8, device=self._device)
        return works | {COPY: partial(timed, self._device, partial(torch.empty_like(source).copy_, source))}

    def rates(self, seconds: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
        """GFLOP/s of every product, GB/s (read and written) of the copy, from the seconds of every repeat."""
        amounts = {name: 2 * m * k * n for name, (m, k, n) in self._shapes.items()}
        amounts[COPY] = 2 * COPIED_BYTES[self._device.type]
        return {name: Spread.of([amount / 1e9 / one for one in seconds[name]]) for name, amount in amounts.items()}

    def _product(self, shape: Shape) -> Callable[[], object]:
        rows, inner, columns = shape
        left, right = self._random(rows, inner), self._random(inner, columns)
        return partial(torch.mm, left, right, out=left.new_empty(rows, columns))

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self._device, dtype=self._dtype)


def _name(shape: Shape) -> str:
    return " x ".join(map(str, shape))
