"""Dates to forecast from, and the frames that a forecast from one of them needs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..data.dates import DATE
from ..data.periods import second_of, spans_of, stretches_of
from ..data.times import IRREGULAR_S, SECONDS_PER_HOUR, TimeAxis
from ..errors import InputError
from ..training.contract import Contract
from .frames import Frames

STARTS = re.compile(rf"({DATE})(?:/({DATE})(?:/([1-9]\d*)\s*(min|h|d))?)?")
UNIT_S = {"min": 60, "h": SECONDS_PER_HOUR, "d": 24 * SECONDS_PER_HOUR}
DASHES_OF_A_DAY = 2  # 2020-01-01; a month or a year has fewer
SHOWN = 4  # dates or ranges of dates in a message


@dataclass(frozen=True)
class Start:
    """A forecast from one date: where its inputs are, and its times.

    Attributes:
        states: frames of the window, the last of which is the start.
        forcings: frames of the variables that are forcings, of the window and all leads but the last; empty where the
            network has none.
        times: of the window, and of the leads.
    """

    states: tuple[int, ...]
    forcings: tuple[int, ...]
    times: TimeAxis

    @property
    def window(self) -> int:
        """How many inputs are given."""
        return len(self.states)

    @property
    def second(self) -> int:
        """Of the start."""
        return int(self.times.seconds[self.window - 1])

    @property
    def date(self) -> str:
        """Of the start, for people."""
        return self.times.date(self.window - 1)

    @property
    def leads_s(self) -> NDArray[np.int64]:
        """(N,) from the start to each lead."""
        leads: NDArray[np.int64] = self.times.seconds[self.window :] - self.second
        return leads


class Timeline:
    """Which dates some frames allow to forecast from.

    Where training's frames had one step, each time is a step from the one before, and is looked up; else, as with
    months, the data say which times follow each other.

    Args:
        window: inputs that spin the state up.
        steps: leads.
        what: is made of a date, for messages.
        goes_on: whether a step may lead beyond the last frame, to where the year before has it (see `TimeAxis.after`).
    """

    def __init__(
        self,
        frames: Frames,
        contract: Contract,
        window: int,
        steps: int,
        what: str = "forecast from",
        *,
        goes_on: bool = False,
    ) -> None:
        self._frames, self._window, self._steps, self._what, self._goes_on = frames, window, steps, what, goes_on
        self.step_s = step_of(contract)
        self._calendar = contract.calendar
        self._told = f"{contract.step_hours[0]:g} to {contract.step_hours[1]:g} h"

    def asked(self, texts: Sequence[str], option: str = "--start") -> list[int]:
        """Instants that are asked for, in their order, each once.

        Args:
            texts: dates (a day is its midnight); ranges with a step, ``2020-01-01/2020-02-01/24h``, whose end belongs
                to them; years, months, ``1990-06``, and ranges without a step, which are all their dates that can be;
                or several of them with commas between. A month or a year at the end of a range is all of it.
            option: for messages.

        Raises:
            InputError: a text that is none, or a period without a date that can be.
        """
        seconds: set[int] = set()
        for text in (part.strip() for one in texts for part in one.split(",")):
            match = STARTS.fullmatch(text)
            if match is None:
                alone = ", or `last` alone" if option == "--start" else ""
                raise InputError(
                    f"{option} takes dates such as 2020-01-01 or 2020-01-01T12, a range with its step (min, h or d) "
                    f"such as 2020-01-01/2020-02-01/24h, or a month or a range without a step, 1990/1999, for all of "
                    f"its dates that can be{alone}, got {text!r}."
                )
            first, last, number, unit = match.groups()
            what = f"{option} {text}"
            begin = second_of(first, self._calendar, what)
            if not last and first.count("-") == DASHES_OF_A_DAY:
                seconds.add(begin)
                continue
            whole = not number or (last or first).count("-") < DASHES_OF_A_DAY  # the last day or month is all of it
            end = second_of(last or first, self._calendar, what, after=whole) - whole
            if end < begin:
                raise InputError(f"{what} ends before it begins. Write the earlier date first.")
            if number:
                seconds.update(range(begin, end + 1, int(number) * UNIT_S[unit]))
            else:
                seconds.update(self._able_within(begin, end, what))
        return sorted(seconds)

    def start(self, second: int) -> Start:
        """The forecast from an instant.

        Raises:
            InputError: frames are missing; with those, and the dates that can be.
        """
        found = self._found(second)
        if isinstance(found, Start):
            return found
        raise InputError(f"no {self._what} {self._date(second)}: {found}. {self._dates_that_can_be(second)}")

    def last(self) -> int:
        """The last instant that can be forecast from; raises InputError if there is none."""
        seconds = self._frames.states.axis.seconds
        return int(seconds[self._able][-1]) if self._able.any() else self.start(int(seconds[-1])).second

    def able(self) -> list[int]:
        """Every instant that can be forecast from."""
        found: list[int] = self._frames.states.axis.seconds[self._able].tolist()
        return found

    def all(self) -> list[int]:
        """The same; raises InputError if there is none."""
        return self.able() or [self.start(int(self._frames.states.axis.seconds[-1])).second]

    def _able_within(self, begin: int, end: int, what: str) -> list[int]:
        """From one instant to another."""
        seconds = self._frames.states.axis.seconds
        found: list[int] = seconds[self._able & (seconds >= begin) & (seconds <= end)].tolist()
        if not found:
            raise InputError(f"{what}: no {self._what} any date of it. {self._dates_that_can_be(begin)}")
        return found

    def _found(self, second: int) -> Start | str:
        """What there is, or what is not."""
        states, axis = self._frames.states, self._frames.states.axis
        seconds = self._times_around(second)
        if isinstance(seconds, str):
            return seconds
        places = places_of(axis, seconds)
        missing = [time for time, place in zip(seconds[: self._window], places, strict=False) if place < 0]
        if missing:
            frames = f"of its window of {self._window} frames" if self._window > 1 else "of its time"
            return f"{self._frames.name} has no frame {frames} at {self._listed(missing)}"
        seconds = np.where(places >= 0, axis.seconds[places], seconds)  # as they are, to the second
        forcings: tuple[int, ...] = ()
        if self._frames.forcings is not None:
            needed = seconds[: self._window + self._steps - 1]
            there = places_of(self._frames.forcings.axis, needed)
            missing = needed[there < 0].tolist()
            if missing:
                return f"{self._frames.name} has no {', '.join(self._frames.forcings.names)} at {self._listed(missing)}"
            forcings = tuple(there.tolist())
        assert len(seconds) == self._window + self._steps, f"{len(seconds)} times of {states.names}"
        return Start(tuple(places[: self._window].tolist()), forcings, TimeAxis(seconds, axis.calendar))

    def _times_around(self, second: int) -> NDArray[np.int64] | str:
        """(window + steps,) instants, or why they are not known."""
        axis, before, after = self._frames.states.axis, self._window - 1, self._steps
        if self.step_s is not None:
            return second + self.step_s * np.arange(-before, after + 1, dtype=np.int64)
        (frame,) = places_of(axis, np.array([second])).tolist()
        if frame < 0:
            return f"{self._frames.name} has no such date"
        (stretch,) = (one for one in stretches_of(axis, [range(len(axis))]) if frame in one)
        if frame - before >= stretch.start and frame + 1 == stretch.stop and after == 1 and self._goes_on:
            return np.append(axis.seconds[frame - before : frame + 1], axis.after(frame))
        if frame - before < stretch.start or frame + after >= stretch.stop:
            return (
                f"its window of {self._window} frames and {self._steps} dates after them must follow each other in "
                f"{self._frames.name}, as the network's steps ({self._told}) tell no dates"
            )
        return axis.seconds[frame - before : frame + after + 1]

    @cached_property
    def _able(self) -> NDArray[np.bool_]:
        """(time,) which frames of the states can be forecast from."""
        states, forcings = self._frames.states.axis, self._frames.forcings
        if self.step_s is None:
            return np.array([isinstance(self._found(second), Start) for second in states.seconds.tolist()])
        needed = [(states, 0)] + ([(forcings.axis, self._steps - 1)] if forcings is not None else [])
        able = np.ones(len(states), dtype=bool)
        for axis, after in needed:
            for place in range(1 - self._window, after + 1):
                able &= places_of(axis, states.seconds + place * self.step_s) >= 0
        return able

    def _dates_that_can_be(self, second: int) -> str:
        axis, able = self._frames.states.axis, self._able
        if not able.any():
            return f"Its times, {axis.described}, allow no date at all."
        spans = [f"{axis.date(span[0])} to {axis.date(span[-1])}" for span in spans_of(able)]
        nearest = axis.date(int(np.flatnonzero(able)[np.abs(axis.seconds[able] - second).argmin()]))
        return f"Dates that can be: {_shortened(spans)} ({able.sum()} of {axis.described}). The nearest is {nearest}."

    def _listed(self, seconds: Sequence[int]) -> str:
        return _shortened([self._date(second) for second in seconds])

    def _date(self, second: int) -> str:
        return TimeAxis(np.array([second], dtype=np.int64), self._frames.states.axis.calendar).date(0)


def step_of(contract: Contract) -> int | None:
    """Seconds from each time to the next; None where they differ, as with months."""
    shortest, longest = (hours * SECONDS_PER_HOUR for hours in contract.step_hours)
    return round((shortest + longest) / 2) if longest - shortest <= IRREGULAR_S else None


def places_of(axis: TimeAxis, seconds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Frames at some instants, to the second to which times are kept; -1 where there is none."""
    at = np.searchsorted(axis.seconds, seconds - IRREGULAR_S).clip(max=len(axis) - 1)
    return np.where(np.abs(axis.seconds[at] - seconds) <= IRREGULAR_S, at, -1)


def _shortened(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more
