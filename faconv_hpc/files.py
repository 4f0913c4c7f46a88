"""Files that are whole on disk, or not there; and lines of JSON."""

import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import InputError, TryAgainError, is_out_of_reach


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


def flush_tree(directory: Path) -> None:
    """Makes sure that all files below a directory are on disk, whoever has written them."""
    for entry in directory.iterdir():
        if entry.is_dir():
            flush_tree(entry)
        else:
            with entry.open("rb") as written:
                os.fsync(written.fileno())
    flush_entries(directory)


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """Another name beside ``final``, whose file gets its own by one rename when the block ends: whole or not at all.

    Others may do the same meanwhile. The block writes the file, which is then flushed to disk; if it raises, it goes.

    Raises:
        OSError: it could not be flushed or renamed, and nothing has changed; or its entry could not be flushed to disk.
    """
    beside = final.with_name(f".{final.name}.{secrets.token_hex(4)}.part")
    try:
        yield beside
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(final)
    finally:
        beside.unlink(missing_ok=True)
    flush_entries(final.parent)


@contextmanager
def replacing_together(directory: Path, names: Sequence[str]) -> Iterator[Path]:
    """A directory within ``directory``, whose files get their places there when the block ends; it is made if missing.

    Killed at any instant, none of now stands beside one of before, and the last of the names is there only if all that
    belongs to it is: those of before go first, it before the others, and it comes last. If the block raises, all stays
    as it was.

    Args:
        names: of all files that may be made, in the order in which they come.

    Raises:
        OSError: they could not be flushed, or not all of them be renamed.
    """
    with made_directory(directory):
        beside = directory / f".{secrets.token_hex(4)}.part"
        beside.mkdir()
        try:
            yield beside
            made = {path.name for path in beside.iterdir()}
            assert names[-1] in made <= set(names), f"{sorted(made)} are not of {', '.join(names)}, or lack the last"
            flush_tree(beside)
            for name in reversed(names):
                (directory / name).unlink(missing_ok=True)
            flush_entries(directory)
            for name in (name for name in names if name in made):
                if name == names[-1]:
                    flush_entries(directory)
                (beside / name).replace(directory / name)
            flush_entries(directory)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def made_directory(directory: Path) -> Iterator[None]:
    """A directory, and those above it, are made if they are missing; these go when the block ends and they are empty.

    Raises:
        OSError: they could not be made.
    """
    missing = [one for one in (directory, *directory.parents) if not one.is_dir()]
    try:
        make_durably(directory)
        yield
    finally:
        with suppress(OSError):  # one is not empty: all went well, or it is somebody else's, too
            for one in missing:
                one.rmdir()


def remove_parts(directory: Path) -> None:
    """Takes away what a killed `replacing_together` has left; nobody else may be at work there."""
    for beside in directory.glob(f".{'[0-9a-f]' * 8}.part"):
        shutil.rmtree(beside, ignore_errors=True)


def write_durably(path: Path, content: str | bytes) -> None:
    """Replaces a file as a whole, on disk before and after; its directory is made."""
    make_durably(path.parent)
    with replacing(path) as beside:
        beside.write_bytes(content if isinstance(content, bytes) else content.encode())


def link_or_copy(path: Path, target: Path) -> None:
    """Another name for a file that nobody changes."""
    try:
        target.hardlink_to(path)
    except OSError:  # some file systems have no links
        write_flushed(target, path.read_bytes())


def make_durably(directory: Path) -> None:
    """Makes a directory and those above it that are missing; their entries are on disk when this returns."""
    if not directory.is_dir():
        make_durably(directory.parent)
        directory.mkdir(exist_ok=True)
        flush_entries(directory.parent)


def json_ready(value: Any) -> Any:
    """The same as JSON knows it: numbers that are not finite are None, tuples lists, and NumPy's scalars plain."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(one) for one in value]
    plain = value.item() if hasattr(value, "item") else value
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def write_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON line each; the file appears whole."""
    write_durably(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none if there is no file. A line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def check_data_is_there(paths: Sequence[Path]) -> None:
    """Raises InputError for ``--data`` that is nowhere."""
    for path in paths:
        if not path.exists():
            raise InputError(f"--data {path} does not exist. Give a store, or NetCDF, zarr or GRIB data.")


def check_in_reach(path: Path, error: BaseException) -> None:
    """Raises TryAgainError if a file could not be read because its file system is away."""
    if isinstance(error, OSError) and error.errno and is_out_of_reach(error):
        raise TryAgainError(
            f"{path} cannot be read for now: {os.strerror(error.errno)}. Look at its file system; the same command "
            f"goes on from the newest checkpoint."
        ) from None


def cannot_write(what: str, path: Path, error: OSError) -> InputError | TryAgainError:
    """The error for a directory that the user has named; ``what`` is the name of the key or option."""
    if is_out_of_reach(error):
        return TryAgainError(f"{what} {path} cannot be written for now: {error.strerror}. Look at its file system.")
    return InputError(f"{what} {path} cannot be written: {error.strerror}. Give a directory where you may write.")


def check_can_write(what: str, path: Path) -> None:
    """Raises the error of `cannot_write` unless something can be made where a path is, or is to be; nothing stays."""
    there = next(one for one in (path, *path.parents) if os.path.lexists(one))
    try:
        beside = there / f".{secrets.token_hex(4)}.part"
        beside.mkdir()
        beside.rmdir()
    except OSError as error:
        raise cannot_write(what, path, error) from None
