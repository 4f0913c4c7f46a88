"""Whether HDF5 can use a file system, with locks and without."""

from pathlib import Path

import h5py
import numpy as np


def locking_problem(directory: Path, *, locks: bool) -> str | None:
    """Why HDF5 cannot write and read a small file in ``directory``; None if it can.

    Args:
        directory: where the file is made, and removed again.
        locks: whether HDF5 is to lock the file, which parallel file systems may refuse. The variable
            ``HDF5_USE_FILE_LOCKING`` overrules it.
    """
    path = directory / f"probe-{'locked' if locks else 'unlocked'}.h5"
    wanted = np.arange(8, dtype=np.float32)
    try:
        with h5py.File(path, "w", locking=locks) as file:
            file["numbers"] = wanted
        with h5py.File(path, "r", locking=locks) as file:
            found = file["numbers"][...]
    except OSError as error:
        return str(error)
    finally:
        path.unlink(missing_ok=True)
    return None if np.array_equal(found, wanted) else f"{found} was read where {wanted} was written"
