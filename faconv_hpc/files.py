"""Small files that are whole on disk, or not there."""

import errno
import os
import secrets
from pathlib import Path


def write_flushed(path: Path, raw: bytes) -> None:
    """A new file, on disk when this returns."""
    with path.open("xb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def flush_entries(directory: Path) -> None:
    """Makes sure that a directory's entries are on disk, where its file system can."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Replaces a small file by one rename, on disk before and after. Others may do the same meanwhile."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        write_flushed(beside, text.encode())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    flush_entries(path.parent)
