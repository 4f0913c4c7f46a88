"""``faconv evaluate``: how good forecasts are, of networks and of files."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console

from ..errors import InputError
from .options import AsJson, DataPaths, Device, Kernels, Ranks
from .tables import table_of
from .trained import Mesh, Overwrite, Where, as_arguments, carry_out, check_directory, paths_in, paths_of

if TYPE_CHECKING:
    from ..evaluation.evaluation import Evaluation
    from ..forecasting.turns import Progress
    from ..spatial.mesh import ProcessMesh

Models = Annotated[
    list[Path],
    typer.Argument(
        metavar="MODEL",
        help="A run_dir, the directory of one checkpoint, an exported file; or forecasts in NetCDF or zarr.",
    ),
]
Leads = Annotated[
    int | None,
    typer.Option(min=1, help="Run freely for so many steps. Default: 1; of files alone all leads that they have."),
]
Samples = Annotated[
    int | None, typer.Option(min=1, help="Forecast so many times, spread over the period. Default: all.")
]
SpinUp = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Give a network so many frames before it runs freely, and take the dates that have them. Default: as many "
        "as a window of its training.",
    ),
]
Climatology = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DATES",
        help="Dates of the data that climatology is made of, FIRST/LAST, may be repeated. Default: those of training.",
    ),
]
Came = Annotated[
    list[str] | None,
    typer.Option(
        "--truth",
        metavar="PATH",
        help="What came, where networks forecast from other --data, as with noise. May be repeated. Default: the data.",
    ),
]
Output = Annotated[
    Path | None, typer.Option(help="A directory. Default: evaluation/ in the run, or MODEL.evaluation beside a file.")
]


def evaluate_command(
    model: Models,
    data: DataPaths = None,
    truth: Came = None,
    leads: Leads = None,
    samples: Samples = None,
    spin_up: SpinUp = None,
    climatology: Climatology = None,
    output: Output = None,
    ranks: Ranks = None,
    mesh: Mesh = None,
    device: Device = None,
    kernels: Kernels = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Hold forecasts of the test period against what came: errors, anomaly correlation, spectra and maps, beside
    persistence, climatology and damped persistence, with intervals; a report says who is better.

    Several models stand in the same table, on the same dates. Files of forecasts may be anyone's, with the names that
    WeatherBench-X reads (init_time, lead_time, latitude, longitude, level).

    On several ranks the globe is cut as the run's mesh says, and replicas share the dates; on one it is whole; the
    numbers are the same. An earlier evaluation of other models or options is not touched without --overwrite.

    Example: `faconv evaluate runs/quickstart_era5 --ranks 2 --leads 4 --output four_steps`
    """
    abouts = _abouts(model)
    paths = paths_of(data, abouts, model)
    came = paths_in(truth or (), "--truth")
    place = output or place_of(model[0])
    asked = _Asked(model, paths, came, leads, samples, spin_up, climatology or (), place, overwrite)
    asked.check()
    carry_out(asked, abouts, Where(ranks, mesh, device, kernels), "leads", _report, as_json=as_json)


@dataclass(frozen=True)
class _Asked:
    """What the user asks for, but for the ranks."""

    models: Sequence[Path]
    data: Sequence[Path]
    against: Sequence[Path]
    leads: int | None
    samples: int | None
    spin_up: int | None
    climatology: Sequence[str]
    output: Path
    overwrite: bool

    verb = "evaluate"

    @property
    def arguments(self) -> list[str]:
        """To hand on to ranks."""
        several = [("--data", self.data), ("--truth", self.against), ("--climatology", self.climatology)]
        given = {
            "--leads": self.leads,
            "--samples": self.samples,
            "--spin-up": self.spin_up,
            "--output": self.output,
        }
        return [*map(str, self.models), *as_arguments(several, given), *["--overwrite"] * self.overwrite]

    @property
    def request(self) -> dict[str, str]:
        """What makes it another evaluation, by argument or option."""
        known = ((path.absolute(), about.get("step")) for path, about in self._abouts)
        steps = (f"{path} of step {step}" if step is not None else str(path) for path, step in known)
        return {
            "MODEL": ", ".join(steps),
            "--data": ", ".join(str(path.absolute()) for path in self.data),
            "--truth": ", ".join(str(path.absolute()) for path in self.against) or "the data",
            "--leads": str(self.leads or "by default"),
            "--samples": str(self.samples or "all"),
            "--spin-up": str(self.spin_up or "by default"),
            "--climatology": ", ".join(self.climatology) or "by default",
        }

    @property
    def _abouts(self) -> Iterable[tuple[Path, dict[str, str]]]:
        return zip(self.models, _abouts(self.models), strict=True)

    def check(self) -> None:
        """With all that can be told without weights; raises InputError."""
        check_directory(self.output, [*self.data, *self.against, *self.models])
        _check_data([*self.data, *self.against])
        self._check_is_free()
        if self.spin_up is not None and not any(about for _, about in self._abouts):
            files = ", ".join(map(str, self.models))
            raise InputError(
                f"--spin-up {self.spin_up} is for networks, and what is judged are files of forecasts: {files}. Leave "
                f"it out."
            )

    def _check_is_free(self) -> None:
        from ..evaluation.asked import check_is_free
        from ..evaluation.results import JSON_FILE

        if not self.overwrite:
            check_is_free(self.output / JSON_FILE, "an evaluation", self.request)

    def make(self, mesh: "ProcessMesh", kernels: str | None, progress: "Progress") -> "_Judged":
        """On all ranks."""
        from ..evaluation.evaluate import evaluate
        from ..evaluation.results import FILES, MAPS, save
        from ..files import replacing_together
        from ..locks import held_output

        with ExitStack() as stack:
            beside = self.output
            if mesh.rank == 0:
                stack.enter_context(held_output(self.output, "evaluation"))
                self._check_is_free()
                beside = stack.enter_context(replacing_together(self.output, FILES))
            found = evaluate(
                self.models,
                mesh,
                data=self.data,
                against=self.against,
                leads=self.leads,
                samples=self.samples,
                spin_up=self.spin_up,
                climatology=self.climatology,
                maps=beside / MAPS,
                kernels=kernels,
                progress=progress,
            )
            said = save(found, beside, self.request) if mesh.rank == 0 else {}
        return _Judged(found, said, self.output)


class _Judged(NamedTuple):
    """What was found, for people and for ``--json``, and where the rest is."""

    evaluation: "Evaluation"
    said: dict[str, Any]
    directory: Path

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``; on the first rank."""
        return self.said


def _report(judged: _Judged) -> None:
    show(judged.evaluation, judged.directory)


def place_of(model: Path) -> Path:
    """Where the results of a model go by themselves."""
    from ..training.shards import FOLDER

    if model.suffix and not (model / FOLDER).is_dir():
        return model.with_name(f"{model.name}.evaluation")
    return (model.parent.parent if model.parent.name == FOLDER else model) / "evaluation"


def _abouts(models: Sequence[Path]) -> list[dict[str, str]]:
    """What is said of each network, without reading its weights; of files nothing."""
    from ..evaluation.entries import is_file_of_forecasts
    from ..training.loading import about_network

    for path in models:
        if not path.exists():
            raise InputError(f"MODEL {path} does not exist. Give a run_dir, a checkpoint, or a file.")
    return [{} if is_file_of_forecasts(path) else about_network(path) for path in models]


def _check_data(paths: Sequence[Path]) -> None:
    """Says why data cannot be read before any rank is started."""
    from ..data.layout import STORE_FILE
    from ..data.store import Store
    from ..files import check_data_is_there

    check_data_is_there(paths)
    for path in paths:
        if (path / STORE_FILE).is_file():
            Store.open(path).close()


def show(evaluation: "Evaluation", directory: Path) -> None:
    """Prints the errors of all, what they say, and where the rest is."""
    from ..evaluation.report import headline
    from ..evaluation.results import REPORT

    kinds = {True: ", held out", False: ", trained on", None: ", not known to be held out"}
    steps = f"{len(evaluation.leads_h)} steps" if len(evaluation.leads_h) > 1 else "1 step"
    title = f"{evaluation.forecasts} forecasts of {steps}{kinds[evaluation.held_out]}, area-weighted RMSE"
    headings = [name.replace("_", "_ ") for name in evaluation.names]  # several stand beside each other
    table = table_of("variable", "lead", *headings, text=("variable",), title=title)
    rmse_LFC = evaluation.metrics["rmse"]
    for number, target in enumerate(evaluation.targets):
        for lead in range(len(evaluation.leads_h)):
            numbers = [f"{value:.4g}" if value == value else "-" for value in rmse_LFC[lead, :, number].tolist()]
            table.add_row(f"{target.name} ({target.units})" if target.units else target.name, str(lead + 1), *numbers)
    console = Console()
    console.print(table)
    for sentence in headline(evaluation):
        console.print(sentence.replace("**", ""))
    console.print(f"report: {directory / REPORT}")
