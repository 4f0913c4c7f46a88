"""``faconv embed``: one embedding per time, from a trained network and data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..files import check_can_write
from .options import AsJson, DataPaths, Device, Kernels, Ranks
from .trained import (
    Mesh,
    Model,
    OfSequence,
    Overwrite,
    Where,
    as_arguments,
    carry_out,
    check_is_no_data,
    paths_of,
)

if TYPE_CHECKING:
    from ..forecasting.embeddings import EmbeddingPlan, EmbeddingSummary
    from ..forecasting.turns import Progress
    from ..spatial.mesh import ProcessMesh

Output = Annotated[Path, typer.Option(help="NAME.nc (NetCDF4).")]
Times = Annotated[
    list[str] | None,
    typer.Option(
        "--times",
        metavar="DATES",
        help="DATE; FIRST/LAST/STEP such as 1990-01-01/2019-12-31/24h; 1990-06 or FIRST/LAST, all dates of it that can "
        "be. Default: all that have their window.",
    ),
]


def embed_command(
    model: Model,
    output: Output,
    data: DataPaths = None,
    times: Times = None,
    ranks: Ranks = None,
    mesh: Mesh = None,
    device: Device = None,
    sequence: OfSequence = None,
    kernels: Kernels = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Embed the globe at every time: (time, embedding) as NetCDF, which `faconv regimes` reads.

    The embedding of a time is what the network makes of the window of frames that ends there.

    A killed command goes on when it is called again, and keeps what was done.

    Example: `faconv embed runs/quickstart_era5 --output embeddings.nc`
    """
    from ..training.loading import about_network

    about = about_network(model)
    asked = _Asked(model, paths_of(data, [about], [model]), times or (), sequence, output, overwrite)
    where = Where(ranks, mesh, device, kernels)
    carry_out(asked, [about], where, "times", _report, as_json=as_json)


@dataclass(frozen=True)
class _Asked:
    """What the user asks for, but for the ranks."""

    model: Path
    data: Sequence[Path]
    times: Sequence[str]
    sequence: str | None
    output: Path
    overwrite: bool

    verb = "embed"

    @property
    def arguments(self) -> list[str]:
        """To hand on to ranks."""
        several = [("--data", self.data), ("--times", self.times)]
        given = {"--output": self.output, "--sequence": self.sequence}
        return [str(self.model), *as_arguments(several, given), *["--overwrite"] * self.overwrite]

    def check(self) -> None:
        """With all that can be told without the network's weights; raises InputError."""
        from ..training.loading import about_network

        self.plan(about_network(self.model))
        check_can_write("--output", self.output.parent)

    def plan(self, about: Mapping[str, str]) -> "EmbeddingPlan":
        """Checked; raises InputError."""
        from ..forecasting.embeddings import EMBEDDINGS, plan_embedding
        from ..forecasting.output import check_output
        from ..training.loading import contract_in, window_of

        check_is_no_data(self.output, self.data)
        plan = plan_embedding(contract_in(about), window_of(about), self.data, self.times, self.sequence)
        check_output(self.output, EMBEDDINGS, plan.request, overwrite=self.overwrite)
        return plan

    def make(self, mesh: "ProcessMesh", kernels: str | None, progress: "Progress") -> "EmbeddingSummary":
        """On all ranks."""
        from ..forecasting.embeddings import run_embedding
        from ..forecasting.forecaster import Forecaster

        forecaster = Forecaster.load(self.model, mesh=mesh, kernels=kernels)
        plan = self.plan(forecaster.trained.about)
        return run_embedding(forecaster, plan, self.output, mesh, overwrite=self.overwrite, progress=progress)


def _report(summary: "EmbeddingSummary") -> None:
    kept = f", {summary.kept_times} of them there before" if summary.kept_times else ""
    print(
        f"{summary.path}: {summary.times} embeddings from {summary.first} to {summary.last}{kept}; "
        f"{summary.seconds:.1f} s. Next: faconv regimes {summary.path}"
    )
