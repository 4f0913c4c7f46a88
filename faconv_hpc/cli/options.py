"""Arguments and options that several verbs take."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..training.schedule import Rule

ConfigPath = Annotated[Path, typer.Argument(help="YAML file of a run, such as configs/quickstart_era5.yaml.")]
RunPath = Annotated[Path, typer.Argument(help="The run_dir of a run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Change a value of the file. May be repeated."),
]
Ranks = Annotated[
    int | None,
    typer.Option("--ranks", min=1, help="Start so many ranks on this machine; without it, this process is one rank."),
]
Extend = Annotated[
    Rule | None,
    typer.Option(
        help="If training.steps was raised: keep the last learning rate, or warm up again and decay over the new."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]


class Verb(TyperCommand):
    """A verb whose help shows flags without a value, as they take none."""

    def get_params(self, ctx: Any) -> list[Any]:
        """All of them, --help too."""
        return _without_values(super().get_params(ctx))


class Verbs(TyperGroup):
    """Several of them."""

    def get_params(self, ctx: Any) -> list[Any]:
        """All of them, --help too."""
        return _without_values(super().get_params(ctx))


def _without_values(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


def extend_option(extend: str | None) -> list[str]:
    """To hand on to `faconv train`."""
    return ["--extend", extend] if extend else []
