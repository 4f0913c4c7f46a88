"""Tests are dealt out whole: none is lost, none runs twice."""

from types import SimpleNamespace

from balance import TOGETHER_S, Queue, pytest_collection_modifyitems, units_of

NAMES = [f"tests/test_{file}.py::test_{number}[a::b]" for file in "abc" for number in range(8)]


def test_units_are_of_one_file_and_about_half_a_minute():
    seconds = dict.fromkeys(NAMES[:8], 12.0) | {NAMES[9]: 500.0}
    units = units_of(NAMES, seconds)
    assert list(units) == NAMES  # each once
    held = {unit: [name for name in NAMES if units[name] == unit] for unit in units.values()}
    assert all(len({name.partition("::")[0] for name in names}) == 1 for names in held.values())
    assert [len(names) for names in held.values()] == [2, 2, 2, 2, 2, 6, 8]
    for names in held.values():
        assert sum(seconds.get(name, 0.0) for name in names) <= TOGETHER_S or NAMES[9] in names


def dealt(units, workers):
    """What those who ask for one unit after the other are given."""
    given = []
    for units.asks in workers:
        given.append(units.popitem(last=False)[0])
    return given


def test_the_longest_unit_is_dealt_out_first():
    units = Queue({"b": 30.0, "c": 5.0, "d": 26.0})
    units.update({"x 0": {"a": False}, "x 1": {"b": False}, "x 2": {"c": False, "d": False}})
    assert dealt(units, [1, 1, 1]) == ["x 2", "x 1", "x 0"] and not units


def test_a_worker_stays_with_its_file_and_then_helps_where_most_is_left():
    units = Queue({"a": 30.0, "b": 20.0, "c": 10.0, "d": 40.0, "e": 35.0, "f": 1.5})
    units.update({f"x {number}": {name: False} for number, name in enumerate("abc")})
    units.update({"y 0": {"d": False}, "z 0": {"e": False}, "z 1": {"f": False}})
    assert dealt(units, [1, 2, 1]) == ["x 0", "y 0", "x 1"]  # 60 s are left of x at first, 40 of y, 36.5 of z
    assert dealt(units, [2]) == ["z 0"]  # y has no more, and nobody is at z
    assert dealt(units, [3, 2]) == ["x 2", "z 1"]  # somebody is at both: 10 s are left of x


def test_what_a_crashed_worker_has_done_is_not_dealt_out_again():
    """A unit without a test to run would be the last that its worker hears of: pytest would wait for ever."""
    units = Queue({"a": 30.0})
    units.update({"done": {"a": True}, "begun": {"b": True, "c": False}})
    assert units == {"begun": {"b": True, "c": False}}


class Item:
    """What pytest has collected, as far as we look at it."""

    def __init__(self, nodeid, fixtures=(), every=None, **parameters):
        self.nodeid, self.fixturenames, self.every = nodeid, fixtures, every
        self.callspec = SimpleNamespace(params=parameters)

    def get_closest_marker(self, _):
        return self.every and SimpleNamespace(args=self.every)


def tried(items, option=""):
    out, items = [], [*items]
    hook = SimpleNamespace(pytest_deselected=lambda items: out.extend(items))
    config = SimpleNamespace(getoption=lambda name: name == option, hook=hook)
    whole = [*items]
    pytest_collection_modifyitems(config, items)
    assert sorted(map(whole.index, items + out)) == [*range(len(whole))]
    return [item.nodeid for item in items]


def test_all_tests_run_but_with_quick_for_long_ones(monkeypatch):
    monkeypatch.setattr("balance.known_seconds", lambda: {"long": 9.0})
    items = [Item("new", ["tmp_path"]), Item("long"), Item("job", ["slurm"])]
    assert tried(items) == tried(items, "--all") == ["new", "long", "job"]
    assert tried(items, "--quick") == ["new"]


def test_of_combinations_a_share_is_tried_that_has_every_value():
    rows = [Item(f"a::rows[{number}]", every=(3,)) for number in range(7)]
    assert tried(rows) == ["a::rows[0]", "a::rows[3]", "a::rows[6]"]
    grid = [Item(f"b::grid[{x}{y}]", every=(2, "x", "y"), x=x, y=[y]) for x in "pqr" for y in range(4)]
    assert tried([*grid, *rows])[:6] == [f"b::grid[{one}]" for one in ("p0", "p2", "q1", "q3", "r0", "r2")]
    assert len(tried([*grid, *rows], "--all")) == 19
    few = [Item(f"c::few[{x}{y}]", every=(3, "x", "y"), x=x, y=y) for x in "pq" for y in "pq"]
    assert len(tried(few)) == 4  # a third of them would be without q
