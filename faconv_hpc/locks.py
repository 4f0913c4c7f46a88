"""A directory for one process at a time; the kernel frees it if the process is killed."""

import fcntl
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

from .errors import InputError
from .files import cannot_write, made_directory, remove_parts

OUTPUT_LOCK = ".output.lock"  # not that of a run, a study or a store, if the output is one of their directories


class DirectoryLock:
    """A file that one process holds locked, and in which it says who it is.

    Args:
        path: the file; its directory is made.

    Raises:
        OSError: it cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+")

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def take(self) -> bool:
        """Locks it; False where another process holds it. On a file system without locks it is taken, and said so."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # some parallel file systems are mounted without locks
            print(
                f"{self.path} cannot be locked ({error.strerror}): see to it that no other job works there",
                file=sys.stderr,
            )
        return True

    def sign(self, more: str = "") -> None:
        """Says who holds it, for those who come later."""
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}{more}\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # so that other nodes see it, too

    @property
    def holder(self) -> str:
        """What the holder says; empty where it says nothing."""
        return holder_of(self.path)


def opened(path: Path, what: str) -> DirectoryLock:
    """A lock that is not taken yet; raises InputError if its directory, which ``what`` names, cannot be written."""
    try:
        return DirectoryLock(path)
    except OSError as error:
        raise cannot_write(what, path.parent, error) from None


@contextmanager
def locked_directory(path: Path, what: str, refusal: Callable[[str], InputError]) -> Iterator[None]:
    """A directory for this process alone, as long as the block lasts.

    Args:
        path: of the lock's file in it.
        what: the key or option that names the directory.
        refusal: makes the error of what the holder says, where another process has it.

    Raises:
        InputError: that one, or the directory cannot be written.
    """
    with opened(path, what) as lock:
        if not lock.take():
            raise refusal(lock.holder)
        lock.sign()
        yield


@contextmanager
def held_output(directory: Path, noun: str) -> Iterator[None]:
    """The directory of ``--output`` for this process alone, as long as the block lasts.

    It is made if it is missing, and goes again if nothing was put into it. What killed ones have left there goes first,
    see `replacing_together`.

    Args:
        noun: what writes there, such as "evaluation".

    Raises:
        InputError: another process writes there, or it cannot be written.
    """

    def refusal(holder: str) -> InputError:
        return InputError(
            f"another {noun} writes to {directory}: {holder or 'unknown'}. Wait, or give another --output."
        )

    lock = directory / OUTPUT_LOCK
    with ExitStack() as stack:
        try:
            stack.enter_context(made_directory(directory))
        except OSError as error:
            raise cannot_write("--output", directory, error) from None
        stack.enter_context(locked_directory(lock, "--output", refusal))
        stack.callback(lock.unlink, missing_ok=True)
        remove_parts(directory)
        yield


def is_held(path: Path) -> bool:
    """Whether some process holds a lock. Nothing is made; without a file, or without locks, nobody does."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def holder_of(path: Path) -> str:
    """What the holder of a lock says; empty where it says nothing, or there is no such file."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
