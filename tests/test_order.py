"""In what order samples are seen: a pure function, shuffled, or in chains of windows that follow each other."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from faconv_hpc.data.order import Chained, Shuffled, stretches_of_windows


def shuffled(seed, first, count, windows):
    order = Shuffled(seed, windows, batch=1)
    return [order.window(step, 0) for step in range(first, first + count)]


def test_every_epoch_sees_every_window_once():
    order = shuffled(3, 0, 5 * 37, 37)
    epochs = [order[start : start + 37] for start in range(0, len(order), 37)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


@pytest.mark.parametrize(("first", "count"), [(0, 10), (30, 20), (36, 1), (37, 80), (1000, 3)])
def test_order_is_a_function_of_step(first, count):
    assert shuffled(3, first, count, 37) == shuffled(3, 0, 1100, 37)[first : first + count]


def test_places_of_a_step_are_next_to_each_other():
    batch, whole = Shuffled(3, 37, batch=5), shuffled(3, 0, 60, 37)
    assert [batch.window(step, place) for step in range(12) for place in range(5)] == whole
    assert not batch.follows(7, 2)


def test_seeds_differ_and_order_never_changes_between_versions():
    assert shuffled(0, 0, 20, 20) != shuffled(1, 0, 20, 20)
    assert shuffled(0, 0, 8, 8) == [0, 2, 1, 5, 4, 3, 6, 7]
    assert shuffled(-1, 0, 8, 8) == shuffled(2**64 - 1, 0, 8, 8)


def test_first_places_are_drawn_evenly():
    counts = Counter(shuffled(9, 4 * epoch, 1, 4)[0] for epoch in range(2000))
    assert all(abs(count - 500) < 100 for count in counts.values())


LENGTH, BATCH, LONGEST = 4, 3, 5
STRETCHES = [(0, 61), (70, 73), (80, 137), (200, 206)]  # of first frames; one too short for two windows, one not quite
STARTS = np.concatenate([np.arange(*one) for one in STRETCHES])


def chained(seed=1):
    return Chained(seed, STARTS, LENGTH, BATCH, LONGEST)


def rows(order, epochs):
    """(epoch, place, first frame of its windows one step after the other, whether each follows)."""
    order.window(20 * epochs, 0)
    limits = list(pairwise(order._ends))[:epochs]
    assert len(limits) == epochs and {last - first for first, last in limits} <= {9, 10, 11}
    for epoch, limit in enumerate(limits):
        for place in range(BATCH):
            frames = [int(STARTS[order.window(step, place)]) for step in range(*limit)]
            yield epoch, place, frames, [order.follows(step, place) for step in range(*limit)]


def test_a_window_follows_where_the_one_before_ends_and_nowhere_else():
    """Within a stretch, so never over a gap or into another sequence."""
    stretch = {frame: number for number, ends in enumerate(STRETCHES) for frame in range(*ends)}
    following = 0
    for _, _, frames, follows in rows(chained(), 40):
        assert not follows[0]
        for (before, now), does in zip(pairwise(frames), follows[1:], strict=True):
            next_to = now == before + LENGTH and stretch[now] == stretch[before]
            assert next_to or not does
            following += does
    assert following > 40 * BATCH * 4


def test_within_an_epoch_no_frame_is_an_input_of_two_windows():
    seen = Counter()
    for epoch, _, frames, _ in rows(chained(), 10):
        for frame in frames:
            seen.update((epoch, frame + step) for step in range(LENGTH))
    assert set(seen.values()) == {1}


def test_windows_are_drawn_evenly_and_chains_of_each_length():
    """Each window of a long stretch in one epoch of ``LENGTH``; its phase is drawn without favour."""
    epochs, windows, lengths = 1200, Counter(), Counter()
    for _, _, frames, follows in rows(chained(), epochs):
        windows.update(frames)
        lengths.update(later - first for first, later in pairwise(n for n, does in enumerate(follows) if not does))
    assert set(windows) == set(STARTS.tolist())
    counts = [windows[frame] * LENGTH / epochs for ends in (STRETCHES[0], STRETCHES[2]) for frame in range(*ends)]
    assert min(counts) > 0.75 and max(counts) < 1.2  # a little is left over in every epoch
    assert set(lengths) == set(range(1, LONGEST + 1))


def test_a_stretch_of_less_than_two_lengths_has_two_windows_in_some_epochs():
    order = Chained(0, np.arange(LENGTH + 2), LENGTH, 1, LONGEST)
    assert {tuple(order.follows(step, 0) for step in range(*limit)) for limit in pairwise(ends_of(order))} >= {
        (False,), (False, True),
    }  # fmt: skip


def ends_of(order):
    order.window(100, 0)
    return order._ends


def test_the_order_in_chains_is_a_pure_function_too():
    there, late = [one[2:] for one in rows(chained(), 6)], chained()
    sixth = ends_of(chained())[5]
    assert int(STARTS[late.window(sixth, 1)]) == there[5 * BATCH + 1][0][0]
    assert [one[2:] for one in rows(late, 6)] == there  # whatever was asked before
    assert [one[2:] for one in rows(chained(2), 6)] != there
    assert there[0][0] == [86, 43, 47, 51, 55, 59, 35, 39, 7, 11]


def test_a_batch_larger_than_what_there_is_sees_windows_that_follow_none():
    order = Chained(0, np.arange(5), 2, 7, 3)
    assert {order.window(step, place) for step in range(20) for place in range(7)} == set(range(5))
    assert not any(order.follows(step, place) for step in range(20) for place in range(7))


def test_stretches_are_where_windows_begin_one_after_the_other():
    assert stretches_of_windows(STARTS) == [range(61), range(61, 64), range(64, 121), range(121, 127)]
    assert stretches_of_windows(np.array([4])) == [range(1)]
