"""A directory for one process at a time; the kernel frees it if the process is killed."""

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType


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

    def attempt(self) -> bool:
        """Locks it; False where another process holds it. Raises OSError on a file system without locks."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_held_elsewhere(self) -> bool:
        """Locks it unless another process holds it; a file system without locks tells of none."""
        try:
            return not self.attempt()
        except OSError:
            return False

    def sign(self, more: str = "") -> None:
        """Says who holds it, for those who come later."""
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}{more}\n")
        self._file.flush()

    @property
    def holder(self) -> str:
        """What the holder says; empty where it says nothing."""
        return self.path.read_text().strip()
