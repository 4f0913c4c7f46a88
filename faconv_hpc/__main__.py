"""``python -m faconv_hpc`` is ``faconv``."""

import os
import signal
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # EXIT_INTERRUPTED; nothing is imported before Ctrl-C is quiet


def main() -> None:
    """Entry point. Until the command line is there, a second perhaps, Ctrl-C ends the process without a word."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # in the background of a script
    if not ignored:
        signal.signal(signal.SIGINT, _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # held back by who starts ranks
    from .cli.app import main as command_line
    from .interrupts import note

    try:
        if not ignored:
            signal.signal(signal.SIGINT, note)
        command_line()
    except KeyboardInterrupt:  # before any verb has begun, each of which has its own answer
        raise SystemExit(INTERRUPTED) from None


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
