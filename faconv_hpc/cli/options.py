"""Arguments and options that several verbs take."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from ..training.schedule import Rule

ConfigPath = Annotated[Path, typer.Argument(help="YAML file of a run, such as configs/quickstart_era5.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Change a value of the file. May be repeated."),
]
Ranks = Annotated[
    int | None,
    typer.Option("--ranks", min=1, help="Start so many ranks on this machine; without it, this process is one rank."),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"] | None,
    typer.Option(help="What ranks compute on. Default: as a run says, or a GPU each where there are some."),
]
DataPaths = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="PATH",
        help="A store; or NetCDF, zarr, GRIB, a pattern, may be repeated. Default: the run's store.",
    ),
]
Kernels = Annotated[
    Literal["eager", "compiled", "triton"] | None,
    typer.Option(help="How passes are computed. Default: as in training."),
]
Extend = Annotated[
    Rule | None,
    typer.Option(
        help="If training.steps was raised: keep the last learning rate, or warm up again and decay over the new."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program.")]


class _PlainFlags:
    """Of a command: its help shows flags without a value, as they take none."""

    def get_params(self, ctx: Any) -> list[Any]:
        """All of them, --help too."""
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return parameters


class Verb(_PlainFlags, TyperCommand):
    """A verb."""


class Verbs(_PlainFlags, TyperGroup):
    """Several of them."""


def extend_option(extend: str | None) -> list[str]:
    """To hand on to `faconv train`."""
    return ["--extend", extend] if extend else []
