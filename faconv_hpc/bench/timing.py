"""Seconds and bytes of work, all of it in turn, so that what slows the machine down slows everything."""

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch

WARM_UP = 2
"""Runs that are not counted: passes are compiled, and the library chooses among its ways."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""As <malloc.h> numbers them."""

MOST_MMAPS = 2**16
"""glibc's own M_MMAP_MAX."""

KEEPS_LEAST, KEEPS_MOST = 2**16, 2**25
"""Bytes: small enough for every tensor that counts; where glibc's own threshold ends by itself."""

LARGEST_HOLE = 2**30
"""Bytes; larger ones are taken in parts."""

Key = TypeVar("Key")
Work = Callable[[], object]


def timed(device: torch.device, *works: Work) -> list[float]:
    """Seconds of each of some works, one after the other; on a GPU by its own clock, until the last is done."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for work in works:
            work()
            marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(works) + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for work, event in zip(works, events[1:], strict=True):
        work()
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def interleaved(
    works: Mapping[Key, Callable[[], Sequence[float]]], repeats: int, show: Callable[[str], None]
) -> dict[Key, list[Sequence[float]]]:
    """What each work measures, in every repeat once; each repeat begins with another one.

    Args:
        works: by name; what they return is kept.
        repeats: how many are counted, after `WARM_UP` that are not.
        show: is told which repeat it is.
    """
    names = list(works)
    found: dict[Key, list[Sequence[float]]] = {name: [] for name in names}
    for repeat in range(-WARM_UP, repeats):
        show(f"repeat {repeat + 1} of {repeats}" if repeat >= 0 else "warming up")
        first = repeat % len(names)
        for name in (*names[first:], *names[:first]):
            measured = works[name]()
            if repeat >= 0:
                found[name].append(measured)
    return found


def peak_bytes(work: Work, device: torch.device) -> int | None:
    """Memory that some work takes at most beyond what is there before; None where nothing tells.

    The first run of something in a process counts what is loaded and built for all that follow, too, so let the work
    run once before. What else a process has done changes little of a layer's (docs/measurements.md).

    On a CPU it is the process's, whose allocator gives back at once what is freed meanwhile: how much glibc keeps for
    later hangs on the largest block that was ever freed (mallopt(3), M_MMAP_THRESHOLD).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    library = ctypes.CDLL(None)
    _keep_at_most(library, KEEPS_LEAST)
    holes = _holes(library)
    try:
        if not _peak_is_what_there_is(library):
            return None
        before = _resident_bytes("VmRSS")
        work()
        return max(_resident_bytes("VmHWM") - before, 0)
    finally:
        for hole in holes:
            library.free(hole)
        _keep_at_most(library, KEEPS_MOST)


def _keep_at_most(library: ctypes.CDLL, size: int) -> None:
    """Blocks from `size` bytes on are taken from the system and given back; of smaller ones twice that is kept."""
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, size)
        library.mallopt(M_TRIM_THRESHOLD, 2 * size)


def _holes(library: ctypes.CDLL) -> list[ctypes.c_void_p]:
    """What is free between blocks of the heap and is as large as those that are given back, taken and not touched: what
    work put there would stay with the process when it is freed."""
    if not hasattr(library, "mallopt"):
        return []
    library.malloc.restype = library.sbrk.restype = ctypes.c_void_p
    library.malloc.argtypes, library.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_ssize_t]
    library.mallopt(M_MMAP_MAX, 0)
    found, size = [], LARGEST_HOLE
    while size >= KEEPS_LEAST:
        end, block = library.sbrk(0), ctypes.c_void_p(library.malloc(size))
        if block.value is not None and block.value < end == library.sbrk(0):
            found.append(block)
        else:  # no hole is as large, the heap has grown for it; or it is no block of the heap, but another allocator's
            library.free(block)
            size //= 2
    library.mallopt(M_MMAP_MAX, MOST_MMAPS)
    return found


def _peak_is_what_there_is(library: ctypes.CDLL) -> bool:
    """Whether the process's peak was set back, as proc(5) says of clear_refs, to what it holds without freed blocks."""
    try:
        library.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
