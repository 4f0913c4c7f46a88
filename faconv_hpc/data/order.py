"""Which window each sample of each step is: a pure function of seed and step.

So there is no state of it to save, and it does not depend on how the samples of a step are dealt to ranks: they have
places in the step's batch. What is drawn is drawn by the Philox generator with the key (seed, epoch), and only of its
raw bits, which NumPy keeps the same in all versions, other than what it makes of them.
"""

from bisect import bisect_right
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .periods import runs_of


class Order(Protocol):
    """Of the samples of a run. Steps and places are counted from 0."""

    def window(self, step: int, place: int) -> int:
        """Which window is at a place of the batch of a step."""

    def follows(self, step: int, place: int) -> bool:
        """Whether that window begins where the one ends that was at this place in the step before."""


class Shuffled:
    """Every epoch is a permutation of all windows; a step takes the next ones, whichever epoch they are of.

    Args:
        seed: of the order.
        windows: how many there are.
        batch: samples of a step.
    """

    def __init__(self, seed: int, windows: int, batch: int) -> None:
        assert windows > 0, f"no windows to order, {windows}"
        self._seed, self._windows, self._batch = seed, windows, batch
        self._permutation = lru_cache(maxsize=2)(self._drawn)

    def window(self, step: int, place: int) -> int:
        epoch, number = divmod(step * self._batch + place, self._windows)
        return self._permutation(epoch)[number]

    def follows(self, step: int, place: int) -> bool:
        return False

    def _drawn(self, epoch: int) -> list[int]:
        return _permutation(_generator(self._seed, epoch), self._windows)


class Chain(NamedTuple):
    """Windows each of which begins where the one before it ends, and is seen a step later at the same place."""

    first: int
    windows: int


class Chained:
    """In every epoch each place sees chains of windows, of random length.

    The windows of a stretch are cut, from one of its first that is drawn, into those that share no input. These are
    cut into chains of 1 to ``longest`` windows, as drawn; the chains of all stretches are permuted, put one after the
    other, and dealt to the places in equal parts. A part may begin or end within a chain. Of what is left over, fewer
    windows than there are places, nothing is seen in that epoch.

    Args:
        seed: of the order.
        starts: (windows,) first frames of the windows, ascending.
        length: inputs of one, by which a window begins later than the one that it follows.
        batch: samples of a step.
        longest: windows of a chain at most.
    """

    def __init__(self, seed: int, starts: NDArray[np.int64], length: int, batch: int, longest: int) -> None:
        self._seed, self._length, self._batch, self._longest = seed, length, batch, longest
        self._stretches = stretches_of_windows(starts)
        self._sizes = np.array([len(one) for one in self._stretches], dtype=np.int64)
        self._ends = [0]  # steps until the end of each epoch; how many windows one has depends on where it is cut
        self._epoch = lru_cache(maxsize=2)(self._drawn)

    def window(self, step: int, place: int) -> int:
        return self._at(step, place)[0]

    def follows(self, step: int, place: int) -> bool:
        return self._at(step, place)[1]

    def _at(self, step: int, place: int) -> tuple[int, bool]:
        """The window, and whether it follows."""
        while self._ends[-1] <= step:
            count = int(self._counts(self._phases(len(self._ends) - 1)).sum())
            self._ends.append(self._ends[-1] + max(count // self._batch, 1))
        epoch = bisect_right(self._ends, step) - 1
        windows, is_first = self._epoch(epoch)
        steps, number = self._ends[epoch + 1] - self._ends[epoch], step - self._ends[epoch]
        at = (place * steps + number) % len(windows)
        return windows[at], number > 0 and not is_first[at]

    def _phases(self, epoch: int) -> NDArray[np.int64]:
        """(stretches,) the first window of each, by number: every window is seen as often as any other."""
        raw = np.asarray(_generator(self._seed, epoch).random_raw(len(self._sizes)))
        phases = raw % np.minimum(self._sizes, self._length).astype(np.uint64)
        return phases.astype(np.int64)

    def _counts(self, phases: NDArray[np.int64]) -> NDArray[np.int64]:
        """(stretches,) how many windows that share no input there are from there on."""
        counts: NDArray[np.int64] = -((phases - self._sizes) // self._length)
        return counts

    def _drawn(self, epoch: int) -> tuple[list[int], list[bool]]:
        """The windows in their order, and which of them are the first of a chain."""
        phases = self._phases(epoch)
        counts = self._counts(phases)
        generator = _generator(self._seed, epoch, stream=1)
        raw = np.asarray(generator.random_raw(int(counts.sum())))
        lengths = iter((1 + raw % np.uint64(self._longest)).tolist())
        chains: list[Chain] = []
        for stretch, phase, count in zip(self._stretches, phases.tolist(), counts.tolist(), strict=True):
            first, left = stretch.start + phase, count
            while left:
                chain = Chain(first, min(next(lengths), left))
                chains.append(chain)
                first, left = first + chain.windows * self._length, left - chain.windows
        windows: list[int] = []
        is_first: list[bool] = []
        for number in _permutation(generator, len(chains)):
            chain = chains[number]
            windows += range(chain.first, chain.first + chain.windows * self._length, self._length)
            is_first += [True] + [False] * (chain.windows - 1)
        return windows, is_first


def stretches_of_windows(starts: NDArray[np.int64]) -> list[range]:
    """Windows, by number, of which each begins one frame after the one before."""
    return [range(first, first + count) for first, _, count in runs_of(starts)]


def _generator(seed: int, epoch: int, stream: int = 0) -> np.random.Philox:
    """Streams of one epoch are far from each other."""
    return np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64)).jumped(stream)


def _permutation(generator: np.random.Philox, count: int) -> list[int]:
    order: list[int] = np.argsort(np.asarray(generator.random_raw(count)), kind="stable").tolist()
    return order
