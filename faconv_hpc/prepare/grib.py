"""Opening GRIB: all messages of a file become fields, or the file is refused. The only importer of cfgrib."""

import importlib.util
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xarray as xr

from ..errors import InputError

PRESSURE = ("isobaricInhPa", "isobaricInPa")
SPATIAL = ("latitude", "longitude", "values", "x", "y")
ABSENT = "faconv_absent_fields"
"""Attribute of a dataset: what its file has no message for, though its other fields have one."""


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

    wanted = {key: _number_or_text(value) for key, value in keys.items()}
    try:
        messages = _messages(path, wanted)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            filters = {"indexpath": "", "errors": "raise", "filter_by_keys": wanted}
            datasets = cfgrib.open_datasets(str(path), backend_kwargs=filters, **options) if messages else []
    except Exception as error:  # cfgrib and ecCodes have errors of their own, which share no ancestor
        raise InputError(
            f"source {path} is GRIB that cannot be read ({type(error).__name__}: {error}). Fetch it again if it is cut "
            f"off or damaged; take a part of it with --select, such as --select typeOfLevel=isobaricInhPa."
        ) from None
    _check_all_found(path, messages, datasets)
    return [_with_its_level(dataset) for dataset in datasets]


def _with_its_level(dataset: xr.Dataset) -> xr.Dataset:
    """Where there is one pressure level only, cfgrib makes it no dim; but u at 500 hPa is not u."""
    alone = [name for name in PRESSURE if name in dataset.coords and name not in dataset.dims]
    return dataset.expand_dims(alone[0]) if alone else dataset


def _messages(path: Path, wanted: Mapping[str, Any]) -> Counter[str]:
    """How many messages the file has of each variable, by the name that cfgrib gives it."""
    import eccodes

    found: Counter[str] = Counter()
    with path.open("rb") as file:
        while (message := eccodes.codes_grib_new_from_file(file)) is not None:
            try:
                if all(_value(message, key, type(value)) == value for key, value in wanted.items()):
                    found[_name(message)] += 1
            finally:
                eccodes.codes_release(message)
    return found


def _name(message: int) -> str:
    """As cfgrib names a variable."""
    names = (_value(message, key, str) for key in ("cfVarName", "shortName"))
    return next(
        (name for name in names if name not in (None, "unknown", "~")),
        "paramId_" + str(_value(message, "paramId", str)),
    )


def _value(message: int, key: str, kind: type) -> Any:
    import eccodes

    try:
        return eccodes.codes_get(message, key, kind)
    except eccodes.KeyValueNotFoundError:
        return None


def _number_or_text(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


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
            f"source {path} has GRIB messages that differ in nothing but their values, or that cfgrib cannot arrange: "
            f"{told}. Take a part of it with --select KEY=VALUE (any key that `grib_ls` shows, such as "
            f"number, typeOfLevel, expver), or give the parts as files of their own."
        )
    for dataset in datasets:
        absent = {str(name): fields[str(name)] - messages[str(name)] for name in dataset.data_vars}
        if any(absent.values()):
            holes = [f"{count} of {fields[name]} of {name}" for name, count in absent.items() if count]
            dataset.attrs[ABSENT] = ", ".join(holes)
