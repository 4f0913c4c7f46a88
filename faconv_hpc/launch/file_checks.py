"""What the doctor asks of file systems: the directory of the run, its room, speed and locks; the store."""

import os
import shutil
import tempfile
import time
from pathlib import Path

from ..config import RunConfig
from ..data.probe import locking_problem
from ..data.store import Store
from ..errors import InputError
from .findings import FILES, Finding, Subject, Verdict
from .local import inside_a_job

GIB = 2**30
LITTLE_GIB, NOTHING_GIB = 5.0, 0.1
SLOW_MB_S = 20.0  # a checkpoint of 1 GB then takes a minute
BLOCK_BYTES, MOST_BLOCKS, WRITING_S = 2**23, 8, 1.0
PREFIX = ".faconv-doctor-"


def run_directory(subject: Subject) -> list[Finding]:
    """Whether the run can write there, how much and how fast; nothing that was not there stays."""
    try:
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=nearest(subject.directory)) as name:
            inside = Path(name)
            found = [Finding(FILES, "run directory", Verdict.OK, f"{subject.directory} can be written")]
            found += [_room(inside), *_locks(inside)]
            return found if subject.quick else [*found, _speed(inside)]
    except OSError as error:
        value = f"{subject.directory} cannot be written: {error.strerror}"
        fix = "Give a directory where you may write, with room in it: run_dir in the config, or --run-dir."
        return [Finding(FILES, "run directory", Verdict.FAILURE, value, fix)]


def store(subject: Subject) -> list[Finding]:
    """Whether the store of the config opens and has all its files, and whether the run can work with it."""
    if subject.config is None:
        return []
    path = subject.config.data.store
    try:
        with Store.open(path) as opened:
            opened.check_files()
            rows, columns = opened.layout.grid_shape
            value = f"{path}: {opened.frames} frames, {len(opened.channels)} variables, {rows} x {columns} cells"
    except InputError as error:
        return [Finding.of_error(FILES, "store", error)]
    return [Finding(FILES, "store", Verdict.OK, value), _fit(subject.config)]


def nearest(directory: Path) -> Path:
    """The directory itself, or the nearest one above it that is there."""
    directory = directory.absolute()
    return next(path for path in (directory, *directory.parents) if path.exists())


def _room(inside: Path) -> Finding:
    free = shutil.disk_usage(inside).free / GIB
    value = f"{free:.1f} GiB"
    fix = "Remove what is not needed, lower training.keep_last, or give another run_dir."
    if free < NOTHING_GIB:
        return Finding(FILES, "free space", Verdict.FAILURE, value, fix, amount=free)
    if free < LITTLE_GIB:
        return Finding(FILES, "free space", Verdict.WARNING, value, fix, amount=free)
    return Finding(FILES, "free space", Verdict.OK, value, amount=free)


def _locks(inside: Path) -> list[Finding]:
    """Stores are read without locks; a run, and who else writes HDF5 there, would like to have them."""
    variable = os.environ.get("HDF5_USE_FILE_LOCKING")
    ruled = f", HDF5_USE_FILE_LOCKING={variable}" if variable is not None else ""
    without = locking_problem(inside, locks=False)
    if without is not None:
        fix = "Set HDF5_USE_FILE_LOCKING=FALSE for all ranks, or give a run_dir on another file system."
        return [Finding(FILES, "HDF5", Verdict.FAILURE, f"not even without locks{ruled}: {without}", fix)]
    with_locks = locking_problem(inside, locks=True)
    if with_locks is not None:
        fix = (
            "Set HDF5_USE_FILE_LOCKING=FALSE where files are written there (`faconv data prepare`), and see to it that "
            "no two jobs use one run_dir."
        )
        return [Finding(FILES, "HDF5", Verdict.WARNING, f"only without locks{ruled}: {with_locks}", fix)]
    return [Finding(FILES, "HDF5", Verdict.OK, f"with and without locks{ruled}")]


def _speed(inside: Path) -> Finding:
    """Of writing to the disk, not to its cache; for about a second."""
    block, written = os.urandom(BLOCK_BYTES), 0  # random, as some file systems compress
    began = time.perf_counter()
    with (inside / "speed").open("wb", buffering=0) as file:
        while written < MOST_BLOCKS and time.perf_counter() - began < WRITING_S:
            file.write(block)
            os.fsync(file.fileno())
            written += 1
    speed = written * BLOCK_BYTES / 1e6 / (time.perf_counter() - began)
    value = f"{speed:.0f} MB/s"
    if speed < SLOW_MB_S:
        fix = "Give a run_dir on a faster file system, or write fewer checkpoints (training.checkpoint_every)."
        return Finding(FILES, "write speed", Verdict.WARNING, value, fix, amount=speed)
    return Finding(FILES, "write speed", Verdict.OK, value, amount=speed)


def _fit(config: RunConfig) -> Finding:
    """Whether config, store and machine go together."""
    from ..training.fit import check_fits, cuts_of, grid_of, names_of, parts_of, training_starts

    data = config.data
    try:
        check_fits(config, here=inside_a_job())
    except InputError as error:
        return Finding.of_error(FILES, "config", error)
    with Store.open(data.store) as opened:
        tile = cuts_of(config, grid_of(config, opened)).tile(0)
        starts = training_starts(opened, parts_of(data, opened).train, data.window, config.training.most_leads)
        names, (rows, columns) = names_of(data, opened), tile.shape
        value = f"{len(starts)} windows of {len(names)} variables, tiles of {rows} x {columns}"
    return Finding(FILES, "config", Verdict.OK, value)
