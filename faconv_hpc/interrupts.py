"""Ctrl-C before a run listens for it: Python loses what a handler raises in a callback, as of an import or a weak
reference, and goes on."""

from types import FrameType

_came = False


def note(number: int, frame: FrameType | None) -> None:
    """The handler of SIGINT: raises KeyboardInterrupt, and remembers that it did."""
    global _came
    _came = True
    raise KeyboardInterrupt


def follow() -> None:
    """Raises KeyboardInterrupt if one came: for whoever begins to listen."""
    if _came:
        raise KeyboardInterrupt
