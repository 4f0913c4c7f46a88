"""One run of a comparison: its score in validation, what it cost, and the errors of its forecasts, which are kept."""

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bench.arithmetic import multiply_adds
from ..bench.case import BenchCase
from ..config import MeshConfig, RunConfig
from ..data.store import Store
from ..data.units import same_units
from ..errors import InputError
from ..evaluation import baselines
from ..evaluation.evaluate import evaluate
from ..evaluation.truth import truth_of
from ..files import read_json_lines, write_durably
from ..model.convlstm import ConvLSTM2d
from ..model.layer import FAConvLSTM2d
from ..model.peers import BottleneckLSTM2d, DepthwiseConvLSTM2d
from ..scaling.points import PointFiles
from ..spatial.grid import are_same_deg
from ..spatial.mesh import ProcessMesh
from ..training.loading import TrainedNetwork, load_network
from ..training.looks import score
from ..training.records import VALIDATION_FILE
from .plan import ComparisonConfig, Run, spin_up

JUDGED_FILE = "judged.npz"
FORECASTS = ("network", baselines.PERSISTENCE, baselines.CLIMATOLOGY)
"""F of what is kept, in their order."""
COUNTED = (FAConvLSTM2d, ConvLSTM2d, BottleneckLSTM2d, DepthwiseConvLSTM2d)
EMBEDDING = ("effective_rank", "calendar_share", "probe_r2", "embedding_loss")
"""What a look says of the embedding."""

Progress = Callable[[int, int], None]
"""Called with (dates that are done, dates there are)."""


@dataclass(frozen=True, eq=False)
class RunErrors:
    """Errors of a run's forecasts, and of what costs nothing on the same dates and cells.

    Attributes:
        square_NLFC, weight_NLFC: sums over the grid of the squared errors by area, and of the area.
        dates: (N,) of the starts.
        leads_h: (L,) hours ahead.
        variables, units: (C,).
        parameters: of the network.
        multiply_adds: of its layers and forecast, of a cell and step, forward; NaN: not counted.
        held_out: whether training saw none of it: 1, 0; -1: not known.
    """

    square_NLFC: NDArray[np.float64]
    weight_NLFC: NDArray[np.float64]
    dates: NDArray[np.str_]
    leads_h: NDArray[np.float64]
    variables: NDArray[np.str_]
    units: NDArray[np.str_]
    parameters: int
    multiply_adds: float
    held_out: int


@dataclass(frozen=True)
class Looked:
    """A run's look at its validation period, after the last step, and what its training took.

    Attributes:
        score: error over persistence's, mean of variables and leads; infinite where a forecast is no number.
        embedding: by the names of `EMBEDDING`; NaN: too little to tell.
        frames: that all its steps were trained on, one as often as it came.
        step_s: median of all steps but the first.
        trained_s: sum of the steps.
        peak_gib: of the rank that needed most.
    """

    score: float
    embedding: Mapping[str, float]
    steps: int
    frames: int
    step_s: float
    trained_s: float
    peak_gib: float


def looked(run: Run) -> Looked:
    """Of a run that is done."""
    records, last = PointFiles(run.point).records(), run.point.run.training.steps
    rows = [row for row in read_json_lines(run.point.run.run_dir / VALIDATION_FILE) if row.get("step") == last]
    said = next((row for row in rows if "effective_rank" in row), {})
    embedding = {name: math.nan if said.get(name) is None else float(said[name]) for name in EMBEDDING}
    seconds = [record.seconds for record in records]
    peak_gib = max(record.peak_memory_gib for record in records)
    frames = last * run.point.run.global_batch * run.point.run.data.window
    return Looked(score(rows), embedding, last, frames, median(seconds[1:]), sum(seconds), peak_gib)


def judged(comparison: ComparisonConfig, run: Run) -> RunErrors | None:
    """What was kept of a run, if it was judged as it is now and as the comparison says."""
    path = run.point.directory / JUDGED_FILE
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        kept = dict(file)
    if kept.pop("asked").tolist() != _asked(comparison, run):
        return None
    whole = {name: int(kept.pop(name)) for name in ("parameters", "held_out")}
    return RunErrors(**kept | whole | {"multiply_adds": float(kept["multiply_adds"])})


def judge(comparison: ComparisonConfig, run: Run, mesh: ProcessMesh, progress: Progress | None = None) -> RunErrors:
    """Forecasts the test period with the weights after the last step, and keeps the errors. Collective.

    Before each forecast all models are given as many frames, see `spin_up`.
    """
    found = evaluate(
        [run.point.run.run_dir],
        mesh,
        leads=comparison.leads,
        samples=comparison.samples,
        against=[comparison.truth] if comparison.truth else (),
        spin_up=spin_up(comparison),
        progress=progress,
    )
    places = [0, *(found.names.index(name, 1) for name in FORECASTS[1:])]
    trained = load_network(run.point.run.run_dir)
    result = RunErrors(
        square_NLFC=found.per_date.square[:, :, places],
        weight_NLFC=found.per_date.weight[:, :, places],
        dates=np.array(found.dates),
        leads_h=found.leads_h,
        variables=np.array([one.name for one in found.targets]),
        units=np.array([one.units for one in found.targets]),
        parameters=sum(parameter.numel() for parameter in trained.network.parameters()),
        multiply_adds=multiply_adds_of(trained),
        held_out=-1 if found.held_out is None else int(found.held_out),
    )
    if mesh.rank == 0:
        _keep(run.point.directory / JUDGED_FILE, vars(result) | {"asked": np.array(_asked(comparison, run))})
    return result


def check_truth(comparison: ComparisonConfig, run: RunConfig) -> None:
    """Raises InputError where what came cannot be held against forecasts of a run's store; asked before training."""
    if comparison.truth is None:
        return
    names = run.data.variables or Store.open(run.data.store).channels
    given, came = (truth_of([path], None, names) for path in (run.data.store, comparison.truth))
    units = {one.name: one.units for one in came.targets}
    for target in given.targets:
        if not same_units(units.get(target.name, target.units + "?"), target.units):
            found = f"it in {units[target.name] or 'no units'}" if target.name in units else ", ".join(units)
            raise InputError(
                f"models forecast {target.name!r} in {target.units or 'no units'}, and truth {comparison.truth} has "
                f"{found}. Name a store that has the same variables."
            )
    for name in ("latitude", "longitude"):
        mine, others = (np.asarray(getattr(one.grid, f"{name}_deg")) for one in (given, came))
        if not are_same_deg(mine, others):
            raise InputError(
                f"truth {comparison.truth} has {len(others)} {name}s from {others[0]:g} to {others[-1]:g}, and the "
                f"store {run.data.store} has {len(mine)} from {mine[0]:g} to {mine[-1]:g}. Name one on the same grid."
            )
    came.cases(run.data.periods.test, spin_up(comparison), comparison.leads)


def multiply_adds_of(trained: TrainedNetwork) -> float:
    """Of a cell and step, forward: its layers by formula (see `multiply_adds`) and its forecast, in a long sequence,
    whatever the window that it was trained in; NaN where a layer is of a kind whose formula is not known."""
    network, grid = trained.network, trained.domain().coarsened(trained.network.scale_factor).grid
    if not all(isinstance(layer, COUNTED) for layer in network.layers):
        return math.nan
    period = max(getattr(layer, "attention_every", 1) for layer in network.layers) or 1
    once, twice = (
        BenchCase(
            nlat=grid.nlat, nlon=grid.nlon, inputs=1, hidden=1, steps=steps, batch=1, precision="fp32",
            mesh=MeshConfig(),
        )
        for steps in (period, 2 * period)
    )  # fmt: skip
    more = sum(multiply_adds(layer, twice) - multiply_adds(layer, once) for layer in network.layers)
    of_layers = more / (grid.nlat * grid.nlon * period)
    of_forecast = sum(weight.numel() for weight in network.forecast.parameters() if weight.dim() == 4)
    return (of_layers + of_forecast) / network.scale_factor**2


def _asked(comparison: ComparisonConfig, run: Run) -> list[str]:
    """What the errors depend on besides the run's config: which attempt it was, and what it is judged by."""
    attempt = PointFiles(run.point).attempt()
    truth = comparison.truth and (comparison.truth.absolute(), Store.open(comparison.truth).digest)
    judged_by = comparison.leads, comparison.samples, spin_up(comparison), truth
    return [str(attempt.number if attempt else 0), str(run.point.run.training.steps), *map(str, judged_by)]


def _keep(path: Path, values: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **values)
    write_durably(path, buffer.getvalue())
