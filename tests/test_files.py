"""Files that belong together: those of now, or those of before, whenever somebody is killed."""

from contextlib import suppress
from pathlib import Path

import pytest

from faconv_hpc.files import replacing_together

NAMES = ("table", "old figure", "new figure", "report")
BEFORE, NOW = {"table", "old figure", "report"}, {"table", "new figure", "report"}


class Killed(BaseException):
    """At an instant."""


def write(directory, names, text):
    with replacing_together(directory, NAMES) as beside:
        for name in names:
            (beside / name).write_text(text)


def killed_after(patch, steps):
    """Whatever takes a file away or gives it its place, but for so many of them."""
    left = iter(range(steps))

    def until_then(original):
        def step(*given, **options):
            if next(left, None) is None:
                raise Killed
            return original(*given, **options)

        return step

    for kind in ("unlink", "replace"):
        patch.setattr(Path, kind, until_then(getattr(Path, kind)))


def test_files_that_belong_together_are_never_of_two_times(tmp_path, monkeypatch):
    """And the last says that all are there."""
    seen = []
    for steps in range(20):
        directory = tmp_path / str(steps)
        write(directory, BEFORE, "before")
        with monkeypatch.context() as patch:
            killed_after(patch, steps)
            with suppress(Killed):
                write(directory, NOW, "now")
        there = {path.name: path.read_text() for path in directory.iterdir()}
        assert len(set(there.values())) <= 1, there
        if "report" in there:
            assert there.keys() == {"before": BEFORE, "now": NOW}[there["report"]]
        seen.append(there.get("report", "none"))
    assert list(dict.fromkeys(seen)) == ["before", "none", "now"]


def test_what_raises_on_the_way_leaves_all_as_it_was(tmp_path):
    write(tmp_path / "out", BEFORE, "before")
    with pytest.raises(Killed), replacing_together(tmp_path / "out", NAMES) as beside:
        (beside / "table").write_text("now")
        raise Killed
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == dict.fromkeys(BEFORE, "before")
    with pytest.raises(Killed), replacing_together(tmp_path / "new" / "newer" / "newest", NAMES):
        raise Killed
    assert not (tmp_path / "new").exists()
    with pytest.raises(AssertionError, match=r"\['table'\] are not of table, .* or lack the last"):
        write(tmp_path / "out", {"table"}, "now")
