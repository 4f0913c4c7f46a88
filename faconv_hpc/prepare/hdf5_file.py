"""Writing HDF5 to a disk that may be full: the error is raised once the file is closed in order."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5netcdf

from ..data.layout import LIBVER
from ..files import replacing


class ForgivingFile:
    """A file as h5py takes one, in which writing never fails; what went wrong is kept for `raise_error`.

    HDF5 cannot close a file whose last blocks do not fit on the disk: it keeps half of it open, prints a page, and
    crashes when the process ends (h5py 3.16, HDF5 2.0). So it is told that all is well, and the error is ours.

    Args:
        path: is replaced.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=0)
        self._error: OSError | None = None

    def raise_error(self) -> None:
        """Raises the first OSError, if there was one."""
        if self._error is not None:
            raise self._error

    def write(self, block: Any) -> int:
        """All of it, or, after an error, nothing."""
        left = memoryview(block).cast("B")
        size = len(left)
        try:
            while self._error is None and len(left):
                left = left[self._file.write(left) :]
        except OSError as error:
            self._error = error
        return size

    def readinto(self, block: Any) -> int:
        """What was written; zeros where it did not fit."""
        view = memoryview(block).cast("B")
        count = self._file.readinto(view) or 0
        view[count:] = bytes(len(view) - count)
        return len(view)

    def read(self, size: int = -1) -> bytes:
        """As that of a file; h5py asks for `readinto`, and by this method knows a file."""
        return self._file.read(size) or b""

    def truncate(self, size: int | None = None) -> int:
        """As that of a file."""
        try:
            if self._error is None:
                return self._file.truncate(size)
        except OSError as error:
            self._error = error
        return size or 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As that of a file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """As that of a file."""
        return self._file.tell()

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Closes the file itself, which HDF5 only seems to do."""
        self._file.close()


@contextmanager
def new_netcdf(final: Path) -> Iterator[tuple[h5netcdf.File, ForgivingFile]]:
    """A new NetCDF file under another name, which is given its own at the end: it appears whole or not at all.

    Ask the second of the two for errors now and then, so that a full disk ends the work soon.

    Raises:
        OSError: it could not be written, and nothing has changed; or see `replacing`.
    """
    with replacing(final) as beside:
        file = ForgivingFile(beside)
        try:
            with h5netcdf.File(file, "w", libver=LIBVER) as nc:
                yield nc, file
        except Exception:
            file.raise_error()  # which is why, if HDF5 was led astray by a block that is not there
            raise
        finally:
            file.close()
        file.raise_error()
