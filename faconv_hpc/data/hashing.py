"""Random numbers that are a pure function of what they are for, such as a cell's number in the whole grid."""

import numpy as np
from numpy.typing import NDArray

PARTS, LEVELS = 4, 2**16
DEVIATION = (PARTS * (LEVELS**2 - 1) / 12) ** 0.5  # of the sum of so many integers below so many


def mixed(number: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea & Flood 2014): neighbours in, nothing alike out. Wraps modulo 2^64."""
    bits = number + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(bits ^ (bits >> np.uint64(31)))


def start_of(*numbers: int) -> NDArray[np.uint64]:
    """(1,) from where to count, far from where others do who have other numbers, or the same in another order."""
    start = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        start = mixed(start + np.uint64(number % 2**64))
    return start


def uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers in [0, 1) of the upper 53 bits."""
    return np.asarray((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def nearly_normal(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers of mean 0 and deviation 1, none beyond 3.5: each the sum of four uniform ones, of 16 bits each. Without a
    logarithm or a cosine, so the same to the last bit on all machines."""
    parts = bits[..., None].view(np.uint16).sum(axis=-1, dtype=np.int64)
    return np.asarray((parts - PARTS * (LEVELS - 1) / 2) / DEVIATION)
