"""Opening GRIB: all messages of a file become fields, or the file is refused. The only importer of cfgrib."""

import importlib.util
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import xarray as xr

from ..errors import InputError

SPATIAL = ("latitude", "longitude", "values", "x", "y")
NOTE = "faconv_note"
"""Attribute of a dataset: what is to be said of its file."""


class _Message(NamedTuple):
    """What tells a field from the others of a file; ``name`` as cfgrib calls it."""

    name: str
    kind: str
    level: str
    date: str
    hour: str
    step: str
    number: str


def open_grib(path: Path, keys: Mapping[str, str], options: Mapping[str, Any]) -> list[xr.Dataset]:
    """The fields of a file, in as many datasets as it takes: cfgrib keeps one height, say, in each.

    cfgrib on its own leaves out, with a line in a log, what does not fit the first field. Here every message is
    counted and has to be found again.

    Args:
        keys: of ecCodes, and the value they must have, such as ``typeOfLevel: isobaricInhPa``.
        options: of xarray.open_dataset.

    Raises:
        InputError: cfgrib is not installed, the file is damaged, or messages that differ in nothing but their values.
    """
    if importlib.util.find_spec("cfgrib") is None:
        raise InputError(
            f"source {path} is GRIB, which needs the package cfgrib, and that is not installed. "
            f"Run `pip install cfgrib` and this command again."
        )
    import cfgrib

    native: dict[str, Any] = {}
    left_out: set[str] = set()
    try:
        messages = list(_messages(path, keys, native, left_out))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            filters = {"indexpath": "", "errors": "raise", "filter_by_keys": native}
            datasets = cfgrib.open_datasets(str(path), backend_kwargs=filters, **options) if messages else []
    except Exception as error:  # cfgrib and ecCodes have errors of their own, which share no ancestor
        raise InputError(
            f"source {path} is GRIB that cannot be read ({type(error).__name__}: {error}). Fetch it again if it is cut "
            f"off or damaged; take a part of it with --select, such as --select typeOfLevel=isobaricInhPa."
        ) from None
    _refuse_repeated(path, messages)
    _check_all_found(path, Counter(message.name for message in messages), datasets)
    if left_out and datasets:
        _add_note(datasets[0], f"{path}: --select leaves out {', '.join(sorted(left_out))}.")
    return list(datasets)


def _messages(path: Path, keys: Mapping[str, str], native: dict[str, Any], left_out: set[str]) -> Iterator[_Message]:
    """The messages that have the values of the keys.

    Args:
        native: gets the keys' values as ecCodes has them, which is how cfgrib compares them.
        left_out: gets the names of variables of which no message has them.
    """
    import eccodes

    taken: set[str] = set()
    with path.open("rb") as file:
        while (handle := eccodes.codes_grib_new_from_file(file)) is not None:
            try:
                name = _name(handle)
                if all(_is_same(_text(handle, key), value) for key, value in keys.items()):
                    native.update(
                        {
                            key: eccodes.codes_get(handle, key, eccodes.codes_get_native_type(handle, key))
                            for key in keys
                        }
                    )
                    taken.add(name)
                    rest = ("typeOfLevel", "level", "dataDate", "dataTime", "stepRange", "number")
                    yield _Message(name, *(_text(handle, key) for key in rest))
                else:
                    left_out.add(name)
            finally:
                eccodes.codes_release(handle)
    left_out -= taken


def _name(handle: int) -> str:
    """As cfgrib names a variable."""
    name = _text(handle, "cfVarName")
    return _text(handle, "shortName") if name in ("", "undef", "unknown") else name


def _text(handle: int, key: str) -> str:
    """The value of a key; nothing where the message has none."""
    import eccodes

    try:
        return str(eccodes.codes_get(handle, key, str))
    except eccodes.KeyValueNotFoundError:
        return ""


def _is_same(found: str, wanted: str) -> bool:
    try:
        return float(found) == float(wanted)  # 0001 is 1
    except ValueError:
        return found == wanted


def _refuse_repeated(path: Path, messages: list[_Message]) -> None:
    repeated = [message for message, count in Counter(messages).items() if count > 1]
    if repeated:
        one = repeated[0]
        raise InputError(
            f"source {path} has GRIB messages that differ in nothing but their values, {len(repeated)} in all, the "
            f"first of them {one.name} at {one.kind} {one.level} on {one.date} {one.hour}. Take a part of it with "
            f"--select KEY=VALUE (any key of ecCodes, such as expver), or give the parts as files of their own."
        )


def _check_all_found(path: Path, messages: Counter[str], datasets: list[xr.Dataset]) -> None:
    """Raises InputError where there are fewer fields than messages; notes in a dataset where there are more."""
    fields: Counter[str] = Counter()
    for dataset in datasets:
        for name, array in dataset.data_vars.items():
            count = 1
            for dim, size in array.sizes.items():
                count *= 1 if dim in SPATIAL else size
            fields[str(name)] += count
    lost = {name: (count, fields[name]) for name, count in messages.items() if fields[name] < count}
    if lost:
        told = ", ".join(f"{name} has {count} messages, {kept} fields" for name, (count, kept) in lost.items())
        raise InputError(
            f"source {path} has GRIB messages that cfgrib cannot arrange as fields: {told}. Take a part of it with "
            f"--select KEY=VALUE (any key of ecCodes, such as typeOfLevel), or give the parts as files of their own."
        )
    absent = {name: fields[name] - count for name, count in messages.items() if fields[name] > count}
    if absent:
        told = ", ".join(f"{count} of {fields[name]} of {name}" for name, count in absent.items())
        _add_note(datasets[0], f"{path} has no message for {told}: missing data.")


def _add_note(dataset: xr.Dataset, text: str) -> None:
    dataset.attrs[NOTE] = " ".join([*filter(None, [dataset.attrs.get(NOTE)]), text])
