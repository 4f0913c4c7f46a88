"""A checkpoint on disk: safetensors shards, a manifest, and the SHA-256 of every byte. Knows no ranks.

A checkpoint is a directory ``step-00000040`` that holds::

    shard-00000.safetensors ...   tensors, each once: parameter/NAME, MOMENT/NAME
    state-00000.safetensors ...   where states are carried on, those of a tile: LAYER/h, past/tokens, ...
    annual-cycle.safetensors      where the network sees anomalies, what they depart from
    manifest.json                 step, seed, mesh, ZeRO stage, versions, config; what lies in which file
    SHA256SUMS                    of all the others; `sha256sum --check SHA256SUMS` reads it too

It is made under another name, flushed to disk, and renamed, so it is there whole or not at all.
"""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..errors import InputError, TryAgainError
from ..files import flush_entries, link_or_copy, write_flushed
from ..versions import __version__
from .manifest import READ, Manifest, ShardFile

FOLDER, MANIFEST, SUMS = "checkpoints", "manifest.json", "SHA256SUMS"
BEST = "best"  # a link to best-step-00000040, which holds the same files as step-00000040, or did
NAME = re.compile(r"step-(\d{8,})")
BEST_NAME = re.compile(r"best-step-(\d{8,})")
UNFINISHED = re.compile(r"\.(best-)?step-\d{8,}\.[0-9a-f]{8}\.(partial|removed)")
PARAMETER = "parameter"
AVERAGE = "ema"
"""The mean of the weights, kept beside them as the optimizer's moments are."""


class DamagedCheckpointError(InputError):
    """A checkpoint that is not, to the last bit, what was written; the message names the file."""


class OtherVersionError(InputError):
    """A checkpoint that is what was written, by a version of this package whose format is another."""


class UnreadableCheckpointError(TryAgainError):
    """A checkpoint that cannot be read here and now: this says nothing about what it holds."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory; it may still turn out to be damaged."""

    path: Path
    step: int

    def manifest(self) -> Manifest:
        """The manifest, if it and the list of sums are what was written.

        Raises:
            DamagedCheckpointError: they are not, or this is no checkpoint.
            OtherVersionError: they are, but say what this version cannot read.
        """
        raw = self._read(MANIFEST)
        sums = self._read(SUMS)
        self._check_version(raw, sums)
        try:
            manifest = Manifest.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            raise DamagedCheckpointError(f"{MANIFEST} is damaged or not ours ({where}: {first['msg']})") from None
        if _sums(raw, manifest.files) != sums:
            raise DamagedCheckpointError(f"{MANIFEST} or {SUMS} is damaged: they do not belong together")
        if manifest.step != self.step:
            raise DamagedCheckpointError(f"{MANIFEST} is of step {manifest.step}, the directory is {self.path.name}")
        return manifest

    def _check_version(self, manifest: bytes, sums: bytes) -> None:
        """A manifest whose own sum is right is not damaged, whatever it says."""
        if f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}".encode() not in sums.splitlines():
            return
        try:
            said = json.loads(manifest)
            found, wrote = said["format"], said["versions"]["faconv_hpc"]
        except (ValueError, KeyError, TypeError):
            return
        if found not in READ:
            raise OtherVersionError(
                f"{self.path} was written by faconv_hpc {wrote} as {found!r}, this is faconv_hpc {__version__}, which "
                f"reads {' and '.join(map(repr, READ))}. Install the version that wrote it, or start anew with another "
                f"run_dir."
            )

    def checked_bytes(self, name: str, expected: ShardFile) -> bytes:
        """One file's content, if it is what was written; raises DamagedCheckpointError if not."""
        raw = self._read(name)
        if len(raw) != expected.bytes:
            raise DamagedCheckpointError(f"{name} is damaged: it has {len(raw)} bytes, {expected.bytes} were written")
        if hashlib.sha256(raw).hexdigest() != expected.sha256:
            raise DamagedCheckpointError(f"{name} is damaged: its SHA-256 is not that of what was written")
        return raw

    def tensors(self, name: str, expected: ShardFile) -> dict[str, Tensor]:
        """The tensors of one shard; raises DamagedCheckpointError if it is not what was written."""
        try:
            return load(self.checked_bytes(name, expected))
        except SafetensorError as error:
            raise DamagedCheckpointError(f"{name} is no safetensors file: {error}") from None

    def problem(self) -> str | None:
        """What is wrong with it, every byte of every file looked at; None if it is whole."""
        try:
            self.check()
        except (DamagedCheckpointError, OtherVersionError, UnreadableCheckpointError) as error:
            return str(error)
        return None

    def check(self) -> None:
        """Looks at every byte of every file; raises what `manifest` does, and UnreadableCheckpointError."""
        for name, expected in self.manifest().files.items():
            self.checked_bytes(name, expected)

    def parameters(self) -> dict[str, Tensor]:
        """Name and fp32 value of every parameter; raises DamagedCheckpointError."""
        return self._of_kind(PARAMETER)

    def weights(self) -> dict[str, Tensor]:
        """What a network is used with, by parameter: the mean of its weights, where there is one, or the last."""
        return self._of_kind(AVERAGE if AVERAGE in self.manifest().moments else PARAMETER)

    def _of_kind(self, kind: str) -> dict[str, Tensor]:
        prefix = f"{kind}/"
        return {name.removeprefix(prefix): value for name, value in self._content() if name.startswith(prefix)}

    def moments(self) -> dict[str, Tensor]:
        """``moment/parameter`` and value of the optimizer's moments; raises DamagedCheckpointError."""
        kinds = self.manifest().moments
        return {name: value for name, value in self._content() if name.partition("/")[0] in kinds}

    def _content(self) -> Iterator[tuple[str, Tensor]]:
        manifest = self.manifest()
        for file in dict.fromkeys(one.file for one in manifest.parameters.values()):
            yield from self.tensors(file, manifest.files[file]).items()

    def _read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise DamagedCheckpointError(f"{name} is missing") from None
        except OSError as error:
            raise UnreadableCheckpointError(
                f"{self.path / name} cannot be read: {error.strerror}. Look at its file system and permissions, and "
                f"start the same command again."
            ) from None


def checkpoints_in(run_dir: Path) -> list[Checkpoint]:
    """All directories of a run that are named like a checkpoint, oldest first; damaged ones too."""
    folder = run_dir / FOLDER
    try:
        found = [(NAME.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
        named = [Checkpoint(path, int(match.group(1))) for match, path in found if match and path.is_dir()]
    except OSError as error:
        raise UnreadableCheckpointError(
            f"{folder} cannot be read: {error.strerror}. Look at its file system and permissions."
        ) from None
    return sorted(named, key=lambda one: one.step)


def best_of(run_dir: Path) -> Checkpoint | None:
    """That of the best look at the validation period, if there is one; it may be damaged."""
    return _named(run_dir / FOLDER / BEST)


def _named(where: Path) -> Checkpoint | None:
    """The checkpoint that a directory is by its name, or by that of what it links to."""
    if not where.is_dir():
        return None
    match = NAME.fullmatch(where.name) or BEST_NAME.fullmatch(where.resolve().name)
    return Checkpoint(where, int(match.group(1))) if match else None


def candidates_in(run_dir: Path) -> list[Checkpoint]:
    """What a run may go on from, `checkpoints_in` and `best_of`; oldest first."""
    best = best_of(run_dir)
    return sorted([*([best] if best else []), *checkpoints_in(run_dir)], key=lambda one: one.step)


def whole_checkpoints(run_dir: Path) -> Iterator[Checkpoint]:
    """The whole checkpoints of a run, newest first, each checked when it is asked for; says which are passed over.

    Raises:
        OtherVersionError: one is of another version, and nobody asked for one before it.
    """
    return whole_of(checkpoints_in(run_dir))


def whole_of(checkpoints: Sequence[Checkpoint]) -> Iterator[Checkpoint]:
    """The whole ones, from the last to the first; see `whole_checkpoints`."""
    for one in reversed(checkpoints):
        try:
            one.check()
        except (DamagedCheckpointError, UnreadableCheckpointError) as error:
            print(f"faconv: passed over {one.path}: {error}", file=sys.stderr)
        else:
            yield one


def checkpoints_at(where: Path) -> list[Checkpoint]:
    """Those of a run directory, or the one whose directory is given; oldest first.

    Raises:
        InputError: there are none.
    """
    try:
        one = _named(where)
        found = [one] if one else candidates_in(where)
    except OSError as error:  # a name that no file can have
        raise InputError(f"{where} cannot be looked at: {error.strerror}. Give the run_dir of a run.") from None
    if not found:
        raise InputError(
            f"{where} holds no checkpoints. Give the run_dir of a run (it has a folder checkpoints/), "
            f"or a directory step-00000040 or best in that folder."
        )
    return found


def newest_at(where: Path) -> Checkpoint:
    """The newest whole one of a run directory, or the one whose directory is given; every byte is read.

    Raises:
        InputError: there is none.
    """
    whole = next(whole_of(checkpoints_at(where)), None)
    if whole is None:
        raise InputError(f"{where} holds no whole checkpoint. `faconv checkpoint verify {where}` says what is wrong.")
    return whole


def directory_name(step: int) -> str:
    """Name of the checkpoint of a step."""
    return f"step-{step:08d}"


def partial_directory(run_dir: Path, step: int, token: str) -> Path:
    """Where a checkpoint is written before it is committed; ``token`` is 8 hexadecimal digits of its own."""
    return run_dir / FOLDER / f".{directory_name(step)}.{token}.partial"


def write_shard(directory: Path, kind: str, number: int, tensors: Mapping[str, Tensor]) -> dict[str, ShardFile]:
    """Writes one shard, or a file of states, and flushes it to disk; nothing, if there are no tensors."""
    if not tensors:
        return {}
    raw = save({name: value.contiguous() for name, value in tensors.items()})
    name = f"{kind}-{number:05d}.safetensors"
    write_flushed(directory / name, raw)
    return {name: ShardFile(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())}


def commit(directory: Path, manifest: Manifest) -> Path:
    """Makes a directory of shards a checkpoint: manifest, sums, flush, one rename. Returns where it is now.

    A directory that has the name already is not written into: it is moved aside, with ``.replaced`` and the
    token of the new one in its name.
    """
    raw = manifest.model_dump_json(indent=1).encode()
    write_flushed(directory / MANIFEST, raw)
    write_flushed(directory / SUMS, _sums(raw, manifest.files))
    flush_entries(directory)
    final = directory.with_name(directory_name(manifest.step))
    if final.exists():
        final.rename(final.with_name(f"{final.name}.replaced-{directory.name.split('.')[-2]}"))
    directory.rename(final)
    flush_entries(final.parent)
    return final


def keep_as_best(run_dir: Path, step: int, token: str) -> None:
    """Makes the checkpoint of a step that of the best look: the same files under another name, and a link to them.

    At any moment ``best`` is what it was, or this.

    Raises:
        OSError: it stays what it was.
    """
    folder = run_dir / FOLDER
    final, link = folder / f"best-{directory_name(step)}", folder / BEST
    if not final.exists():
        beside = partial_directory(run_dir, step, token)
        beside.mkdir()
        for path in sorted((folder / directory_name(step)).iterdir()):
            link_or_copy(path, beside / path.name)
        flush_entries(beside)
        beside.rename(final)
    new = folder / f".{BEST}"
    new.unlink(missing_ok=True)  # of one that was killed here
    new.symlink_to(final.name)
    new.replace(link)
    flush_entries(folder)
    for path in folder.iterdir():
        if BEST_NAME.fullmatch(path.name) and path != final:
            remove(path, token)


def remove(directory: Path, token: str) -> None:
    """Removes a directory so that a half removed one is never taken for a checkpoint.

    Raises:
        OSError: some of it is left, without its name.
    """
    if UNFINISHED.fullmatch(directory.name) is None:
        renamed = directory.with_name(f".{directory.name}.{token}.removed")
        directory = directory.rename(renamed)
    shutil.rmtree(directory)


def sweep(run_dir: Path) -> None:
    """Removes what could not be removed before. Raises OSError if it still cannot."""
    for path in (run_dir / FOLDER).glob(".*.removed"):
        if UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path)


def remove_unfinished(run_dir: Path) -> None:
    """Removes what killed runs have left half written or half removed."""
    folder = run_dir / FOLDER
    for path in folder.iterdir() if folder.is_dir() else ():
        if UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _sums(manifest: bytes, files: Mapping[str, ShardFile]) -> bytes:
    """The content of SHA256SUMS, as coreutils write it."""
    rows = {name: file.sha256 for name, file in files.items()}
    rows[MANIFEST] = hashlib.sha256(manifest).hexdigest()
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(rows.items())).encode()
