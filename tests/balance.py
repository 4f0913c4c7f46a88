"""Which worker of pytest-xdist runs which tests: files that take longest first, a file by one worker as far as it goes.

A file's tests share what is expensive (a run of four ranks, a reference, pools of ranks), so they stay together. They
are dealt out in units of half a minute: no worker may be left with a long file while the others have ended; who has
none left helps with the one that has most. ``durations.json`` has the seconds of those tests that take more than one,
as ``pytest --store-durations`` has measured them; what is not in it is taken for a short one. Every test is in exactly
one unit. Without xdist, tests run in the order of their files.
"""

import json
from collections import OrderedDict, defaultdict
from pathlib import Path

import pytest

DURATIONS = Path(__file__).with_name("durations.json")
SHORT_S, TOGETHER_S = 1.0, 30.0


def known_seconds():
    """Of the tests that take long, by name."""
    return json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}


def units_of(names, seconds):
    """The unit of every test: its file, and a number that grows whenever half a minute is full."""
    units, numbers, filled = {}, defaultdict(int), defaultdict(float)
    for name in names:
        file, took = name.partition("::")[0], seconds.get(name, 0.0)
        if filled[file] and filled[file] + took > TOGETHER_S:
            numbers[file] += 1
            filled[file] = 0.0
        filled[file] += took
        units[name] = f"{file} {numbers[file]}"
    return units


class Queue(OrderedDict):
    """Units that are still to be dealt out, each a dict whose keys are tests."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.at, self.asks = seconds, {}, None

    def update(self, units):
        """All that a worker which crashed was ever given comes back: what is done would leave the next one idle."""
        super().update({unit: tests for unit, tests in units.items() if not all(tests.values())})

    def popitem(self, last=True):
        """The longest unit of the file that the worker who asks is at; where nothing of it is left, of the one with
        most left, if there is one that no other worker is at."""
        took = {unit: sum(self.seconds.get(name, SHORT_S / 4) for name in self[unit]) for unit in self}
        left = defaultdict(float)
        for unit in self:
            left[_file_of(unit)] += took[unit]
        file, others = self.at.get(self.asks), {self.at[one] for one in self.at if one != self.asks}
        if file not in left:
            file = self.at[self.asks] = max(left, key=lambda one: (one not in others, left[one]))
        longest = max((unit for unit in self if _file_of(unit) == file), key=took.get)
        return longest, self.pop(longest)


def _file_of(unit):
    return unit.rpartition(" ")[0]


def scheduler(config, log):
    """xdist's, which keeps the tests of a scope together, with our scopes and our order."""
    from xdist.scheduler import LoadScopeScheduling

    class ByTime(LoadScopeScheduling):
        def __init__(self):
            super().__init__(config, log)
            self.seconds, self.units = known_seconds(), {}
            self.workqueue = Queue(self.seconds)

        def _split_scope(self, nodeid):
            self.units = self.units or units_of(self.collection, self.seconds)
            return self.units[nodeid]

        def _assign_work_unit(self, node):
            self.workqueue.asks = node
            super()._assign_work_unit(node)

    return ByTime()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return scheduler(config, log) if config.getvalue("dist") == "load" else None


def pytest_addoption(parser):
    parser.addoption("--store-durations", action="store_true", help=f"measure how long tests take, for {DURATIONS}")
    parser.addoption("--quick", action="store_true", help="leave out what takes long, Slurm, and processes")
    parser.addoption("--all", action="store_true", help="all combinations where else a share is tried; see `share`")


def pytest_configure(config):
    if config.getoption("--store-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Stopwatch())


def pytest_collection_modifyitems(config, items):
    whole, quick, long = config.getoption("--all"), config.getoption("--quick"), known_seconds().keys()
    left_out = set() if whole else {*_left_out(items)}
    for item in items if quick else ():
        if item.nodeid in long or "slurm" in getattr(item, "fixturenames", ()):
            left_out.add(item)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def _left_out(items):
    """What of the tests marked ``every(parts, *names)`` is tried with --all only.

    Without names all but every part-th of a test's combinations. With names of parameters all but those where the
    numbers of their values add up to a multiple of ``parts``: every value is tried, with a share of every other's.
    Where one would not be, all combinations are tried.
    """
    combinations = defaultdict(list)
    for item in items:
        if item.get_closest_marker("every"):
            combinations[item.nodeid.partition("[")[0]].append(item)
    for those in combinations.values():
        parts, *names = those[0].get_closest_marker("every").args
        values = {name: list(dict.fromkeys(repr(item.callspec.params[name]) for item in those)) for name in names}
        out = []
        for number, item in enumerate(those):
            if names:
                number = sum(values[name].index(repr(item.callspec.params[name])) for name in names)
            out += [item] * bool(number % parts)
        kept = [item for item in those if item not in out]
        seen = [{repr(item.callspec.params[name]) for item in kept} for name in names]
        if seen == [{*values[name]} for name in names]:  # not where only some were asked for
            yield from out


class Stopwatch:
    """Sums up what each test takes, with its fixtures, and writes down the long ones beside those that did not run."""

    def __init__(self):
        self.seconds = defaultdict(float)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self):
        merged = known_seconds() | {name: round(took, 1) for name, took in self.seconds.items()}
        kept = {name: merged[name] for name in sorted(merged) if merged[name] > SHORT_S}
        DURATIONS.write_text(json.dumps(kept, indent=1) + "\n")
