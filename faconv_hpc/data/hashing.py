"""Random numbers that are a pure function of what they are for, such as a cell's number in the whole grid."""

import numpy as np
from numpy.typing import NDArray


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
