"""Reading configs: YAML, overrides, and what is wrong with them, all at once."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from .config import RunConfig, Section
from .errors import InputError
from .model.rules import attention_channels

AnySection = TypeVar("AnySection", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are decimal: to version 1.1, 12:00:00 is 43200 and 0x1 is 1."""


_NUMBERS = {
    "int": r"[-+]?(?:0|[1-9][0-9_]*)$",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] not in _NUMBERS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), list("-+.0123456789"))


def load_config(path: Path | str, overrides: Sequence[str] = (), *, older: bool = False) -> RunConfig:
    """Reads the YAML config of a run, applies ``section.key=value`` overrides, and checks all of it.

    Args:
        older: it is the resolved config of a run, maybe an older version's, see `as_now`.

    Raises:
        InputError: no such file, no valid YAML, an unknown key (with the nearest known one), or a
            value that breaks a rule. All findings are listed at once.
    """
    return load_yaml(RunConfig, path, overrides, older=older)


def load_yaml(
    model: type[AnySection], path: Path | str, overrides: Sequence[str] = (), *, older: bool = False
) -> AnySection:
    """The same for any model: a run's, a study's."""
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise InputError(
            f"the config {path} cannot be read: {reason}. Give the path of a YAML file, "
            f"such as configs/quickstart_era5.yaml."
        ) from None
    tree = _parsed(text, str(path), model)
    if older and isinstance(tree.get("model"), dict):
        tree["model"] = as_now(tree["model"])
    for override in overrides:
        _apply(tree, override)
    return validated(model, tree, str(path))


def validated(model: type[AnySection], tree: dict[str, Any], where: str) -> AnySection:
    """A model from plain values; ``where`` they stand is named in the InputError that lists what is wrong."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        findings = "\n".join(_findings(error, model))
        raise InputError(f"{where} is not a valid config:\n{findings}") from None


def _parsed(text: str, where: str, model: type[Section]) -> dict[str, Any]:
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not valid YAML: {error}. Mend the line it names.") from None
    if not isinstance(tree, dict):
        raise InputError(
            f"{where} must hold keys and values ({', '.join(model.model_fields)}), got {type(tree).__name__}. "
            f"See configs/quickstart_era5.yaml."
        )
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    """Sets one ``a.b=value`` in the tree; the value is read as YAML."""
    name, equals, value = override.partition("=")
    if not equals or not all(name.split(".")):
        raise InputError(f"--set takes section.key=value, got {override!r}. Write for example training.steps=10.")
    *sections, key = name.split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise InputError(f"--set {override}: {section!r} is a value, not a section. Use one dot per level.")
        tree = inner
    tree[key] = _value(value, override)


def _value(text: str, override: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise InputError(f"--set {override}: {text!r} is not a valid YAML value. Quote it.") from None


def _findings(error: ValidationError, model: type[Section]) -> list[str]:
    """One line per finding: where, the rule, the value, the way out."""
    lines = []
    for finding in error.errors():
        place = ".".join(str(part) for part in finding["loc"]) or "config"
        if finding["type"] == "extra_forbidden":
            lines.append(f"  {place}: unknown key. {_nearest(model, finding['loc'])}")
        elif finding["type"] == "missing":
            lines.append(f"  {place}: this key is required. Add it.")
        else:
            ours = finding["type"] == "value_error"
            rule = finding["ctx"]["error"] if ours else f"{finding['msg']}, got {finding['input']!r}"
            remedy = " Write a list: [a, b]." if finding["type"] == "tuple_type" else " Change the value."
            lines.append(f"  {place}: {rule}.{remedy}")
    return lines


def _nearest(model: Any, location: tuple[int | str, ...]) -> str:
    for part in location[:-1]:
        if isinstance(part, int):  # of a list: its members' model
            (model,) = (one for one in get_args(model) if hasattr(one, "model_fields"))
        else:
            model = model.model_fields[part].annotation
    known = list(model.model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    return (f"Did you mean {close[0]!r}? " if close else "") + f"Known keys here: {', '.join(known)}."


def as_now(model: Mapping[str, Any]) -> dict[str, Any]:
    """A whole model section as an older version wrote it, in the words of this one; what is of this one stays.

    Raises:
        InputError: attention was so wide as it cannot be any more.
    """
    now = {"residual": False} | dict(model)  # until there were residuals
    if "attention_channels" not in now:
        return now
    hidden, width = now["hidden_channels"], now.pop("attention_channels")  # until it was a share
    if now.get("cell") == "convlstm" or not now["attention_every"]:
        return now
    now["attention_reduction"] = reduction = hidden // (width or hidden)
    if attention_channels(hidden, reduction, now["attention_heads"]) != (width or hidden):
        raise InputError(
            f"a network was trained with model.attention_channels={width} of {hidden} hidden channels, as an older "
            f"version allowed; now it is a whole share (model.attention_reduction). Use the version that trained it."
        )
    return now
