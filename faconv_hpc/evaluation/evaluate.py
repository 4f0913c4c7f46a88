"""How good forecasts are, of networks and of files, beside each other and beside what costs nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.dates import as_ranges
from ..data.periods import evenly, mask_of
from ..data.times import SECONDS_PER_HOUR
from ..data.variables import Variable
from ..errors import InputError
from ..forecasting.forecaster import Forecaster
from ..model.arithmetic import arithmetic
from ..spatial.domain import Domain
from ..spatial.grid import LatLonGrid
from ..spatial.mesh import ProcessMesh
from ..training.contract import Contract
from ..training.export import SUFFIXES
from ..training.shards import FOLDER
from ..training.skill import Skill
from . import baselines
from .baselines import Baselines, MadeOf
from .bootstrap import Draws
from .compare import Comparison, compared
from .entries import FILES, Entry, FileEntry, NetworkEntry, cases_of_files, is_file_of_forecasts
from .fields import Example, KeptSpectra, MapSums, SpectraSums
from .sums import PerDate, Sums
from .truth import Case, Target, Truth, truth_of

Progress = Callable[[int, int], None]
"""Called with (dates that are done, dates there are)."""


class Judged(NamedTuple):
    """One of those that stand in a table.

    Attributes:
        kind: ``network`` or ``file of forecasts``.
        about: where it is, its step, its digest.
        held_out: whether training saw none of what it forecast; None: not known.
    """

    name: str
    kind: str
    about: dict[str, str]
    held_out: bool | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        entries: what was judged, without the baselines.
        truth: what came, for people.
        targets: what was forecast.
        known: (C,) of which targets there is a climatology.
        dates: of the starts.
        leads_h: (L,) how far ahead the leads are, in hours, on average over dates.
        per_date: of all entries and then the baselines.
        made_of: which dates climatology and damped persistence are made of.
    """

    entries: tuple[Judged, ...]
    truth: str
    targets: tuple[Target, ...]
    grid: LatLonGrid
    known: NDArray[np.bool_]
    dates: tuple[str, ...]
    leads_h: NDArray[np.float64]
    per_date: PerDate
    spectra: KeptSpectra
    example: Example
    made_of: MadeOf

    @property
    def held_out(self) -> bool | None:
        """Of the first entry."""
        return self.entries[0].held_out

    @property
    def forecasts(self) -> int:
        """How many, each over all leads."""
        return len(self.dates)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the entries and the baselines, in the order of the sums."""
        return (*(one.name for one in self.entries), *baselines.NAMES)

    @cached_property
    def metrics(self) -> dict[str, NDArray[np.float64]]:
        """(L, F, C) each of `METRICS`."""
        return {name: values[0] for name, values in self.per_date.metrics().items()}

    @cached_property
    def draws(self) -> Draws:
        """Dates drawn anew, the same for all, so that differences can be told."""
        errors_NS = self.per_date.errors[:, :, : len(self.entries)].reshape(self.forecasts, -1)
        return Draws.of(errors_NS)

    @cached_property
    def drawn(self) -> dict[str, NDArray[np.float64]]:
        """(B, L, F, C) each of `METRICS`."""
        return dict(self.per_date.metrics(self.draws.drawn_BN))

    @cached_property
    def intervals(self) -> dict[str, NDArray[np.float64]]:
        """(2, L, F, C) each of `METRICS`."""
        return {name: self.draws.interval(values, self.metrics[name]) for name, values in self.drawn.items()}

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Of each entry with those after it, and with the baselines."""
        places = range(len(self.names))
        pairs = [(a, b) for a, b in combinations(places, 2) if a < len(self.entries)]
        given = self.metrics["rmse"], self.drawn["rmse"], self.draws
        names, part_LFC = self.names, self.elsewhere
        return tuple(
            compared(names[a], names[b], a, b, *given, baseline=b >= len(self.entries), part_LC=part_LFC[:, b])
            for a, b in pairs
        )

    @property
    def elsewhere(self) -> NDArray[np.bool_]:
        """(L, F, C) where a baseline was judged on a part of the cells, as it is not known on the others."""
        return np.asarray(self.per_date.shares < 1 - 1e-9)  # NaN: nothing was judged

    @property
    def skills(self) -> tuple[Skill, ...]:
        """Of the first entry, lead by lead."""
        rmse_LFC, first = self.metrics["rmse"], len(self.entries)
        return tuple(
            Skill(target.name, lead + 1, target.units, *rmse_LFC[lead, [0, first, first + 1], place].tolist())
            for lead in range(len(self.leads_h))
            for place, target in enumerate(self.targets)
        )


@torch.no_grad()
def evaluate(
    models: Sequence[Path],
    mesh: ProcessMesh,
    *,
    data: Sequence[Path] = (),
    leads: int | None = None,
    samples: int | None = None,
    climatology: Sequence[str] = (),
    maps: Path | None = None,
    window: int | None = None,
    kernels: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Holds forecasts against what came, on the same dates and cells. Collective; the ranks of a mesh share the globe.

    Dates are those whose leads lie in the test period of the first network, or those of the first file, as far as all
    have them. A cell counts where it is known what came at the start and at every lead up to the one in question.

    Args:
        models: run directories, checkpoints, exported files; or files of forecasts.
        data: what came, and what networks forecast from: a store or files. Default: the store of the first run.
        leads: how many steps. Default: 1; of files alone all they have.
        samples: how many dates, spread over those there are. Default: all.
        climatology: dates of which climatology and damped persistence are made. Default: those of training.
        maps: a file to which errors on the map are written, see `MapSums.save`; its directory is there.
        window: inputs that spin a network's state up. Default: as in training.
        kernels: of networks, see `load_network`.

    Raises:
        InputError: models or data that cannot be read, or that do not fit each other.
    """
    entries, data = opened(models, mesh, data, kernels)
    networks = [one for one in entries if isinstance(one, NetworkEntry)]
    for one in networks:
        one.forecaster.window = window or one.forecaster.window
    files = [one for one in entries if isinstance(one, FileEntry)]
    contract = networks[0].contract if networks else None
    truth = truth_of(data, contract, [name for one in files for name in one.names])
    for entry in entries:
        entry.check(truth)
    cases = _cases(networks, files, truth, leads)
    some = [cases[place] for place in evenly(len(cases), samples or len(cases))]
    domain = Domain(truth.grid, mesh)
    cycle = networks[0].forecaster.cycle if networks else None
    spans = _spans(truth, climatology, contract)
    base = Baselines.of(truth, domain, spans, len(some[0].leads), cycle)
    work = _Work(entries, truth, domain, base, some)
    with arithmetic("fp32", mesh.device):
        for number, case in enumerate(some):
            work.add(number, case)
            if progress is not None:
                progress(number + 1, len(some))
    if maps is not None:
        work.maps.save(maps, [one.name for one in entries], truth.targets, work.leads_h)
    return work.evaluation(MadeOf.of(truth, spans, bool(climatology), some))


def opened(
    models: Sequence[Path], mesh: ProcessMesh, data: Sequence[Path] = (), kernels: str | None = None
) -> tuple[tuple[Entry, ...], Sequence[Path]]:
    """What is to be judged, and the data of all: those that are named, or the store of the first run. Collective."""
    names = names_of(models)
    load = partial(Forecaster.load, mesh=mesh, kernels=kernels)
    loaded = [None if is_file_of_forecasts(path) else load(path) for path in models]
    data = data or _store_of(loaded, models)
    entries = list[Entry]()
    for path, name, forecaster in zip(models, names, loaded, strict=True):
        if forecaster is None:
            entries.append(FileEntry(path, name))
            continue
        trained = forecaster.trained
        about = {"path": str(path), "step": str(trained.step), "network_sha256": trained.digest}
        entries.append(NetworkEntry(name, about, forecaster, data))
    return tuple(entries), data


def _store_of(loaded: Sequence[Forecaster | None], models: Sequence[Path]) -> list[Path]:
    """The store of the first run; raises InputError where there is no run."""
    for forecaster in loaded:
        if forecaster is not None and forecaster.trained.about.get("store"):
            return [Path(forecaster.trained.about["store"])]
    raise InputError(f"{models[0]} is no run, and brings no data. Name what came with --data: a store, or files.")


def names_of(models: Sequence[Path]) -> list[str]:
    """Short names, each once: of runs and files their own, of checkpoints that of their run too.

    Raises:
        InputError: one of them comes twice.
    """
    short = []
    for path in models:
        inside, is_file = path.parent.name == FOLDER, path.suffix in (*FILES, *SUFFIXES)
        short.append(f"{path.parent.parent.name} {path.name}" if inside else path.stem if is_file else path.name)
    clashes = {name for name in short if short.count(name) > 1} | set(baselines.NAMES)
    names = [str(path) if name in clashes else name for path, name in zip(models, short, strict=True)]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InputError(f"MODEL {', '.join(sorted(twice))} is given twice. Name each once.")
    return names


def _cases(networks: Sequence[NetworkEntry], files: Sequence[FileEntry], truth: Truth, leads: int | None) -> list[Case]:
    if networks:
        window = max(one.forecaster.window for one in networks)
        cases = truth.cases(networks[0].contract.test, window, leads or 1)
    else:
        cases = cases_of_files(files, truth, leads)
    found = [case for case in cases if all(one.has(truth, case) for one in files)]
    if not found:
        raise InputError(
            f"none of {len(cases)} dates from {truth.axis.label(cases[0].start)} to "
            f"{truth.axis.label(cases[-1].start)} with {len(cases[0].leads)} leads is in all of "
            f"{', '.join(one.name for one in files)}. Forecast the same dates, or name fewer --leads."
        )
    return found


def _spans(truth: Truth, climatology: Sequence[str], contract: Contract | None) -> tuple[range, ...]:
    """Frames that climatology is made of: those that are named; or those of training, if all of them are there: a few,
    such as those of a window, would say nothing of a season."""
    if climatology:
        spans = truth.spans(as_ranges(list(climatology)))
        if not spans:
            raise InputError(
                f"{truth.name} has no frame at the dates of --climatology {', '.join(climatology)}; its times are "
                f"{truth.axis.described}."
            )
        return spans
    return truth.spans(contract.training) if contract is not None and truth.holds(contract.training) else ()


class _Work:
    """What is added up, case by case."""

    def __init__(
        self, entries: tuple[Entry, ...], truth: Truth, domain: Domain, base: Baselines, cases: Sequence[Case]
    ) -> None:
        self._entries, self._truth, self._domain, self._base, self._cases = entries, truth, domain, base, cases
        leads, targets = len(cases[0].leads), len(truth.targets)
        self._sums = Sums(len(cases), leads, len(entries) + len(baselines.NAMES), targets)
        self._spectra = SpectraSums(domain, leads, len(cases), len(entries), targets)
        self.maps = MapSums(domain, leads, len(entries), targets)
        self._first_step: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, number: int, case: Case) -> None:
        """One case. Collective over the tiles."""
        start_CYX, mean_then_CYX = self._base.came(case.start), self._base.climatology(case.start)
        known = ~start_CYX.isnan()
        runs = zip(*(one.leads(self._truth, case, self._domain) for one in self._entries), strict=True)
        for lead, (frame, forecasts) in enumerate(zip(case.leads, runs, strict=True)):
            came_CYX, mean_CYX = self._base.came(frame), self._base.climatology(frame)
            known &= ~came_CYX.isnan()
            came_CYX = came_CYX.where(known, float("nan"))
            damped_CYX = self._base.damped(lead, start_CYX, mean_then_CYX, mean_CYX)
            free = start_CYX, mean_CYX, damped_CYX
            self._sums.add(number, lead, forecasts, free, came_CYX, mean_CYX, self._domain)
            self._spectra.add(number, lead, came_CYX, forecasts)
            self.maps.add(lead, came_CYX, forecasts)
            if lead == 0:
                self._first_step = start_CYX, came_CYX, forecasts[0]

    @property
    def leads_h(self) -> NDArray[np.float64]:
        """(L,) mean over the cases."""
        seconds = self._truth.axis.seconds
        ahead_s = [seconds[list(case.leads)] - seconds[case.start] for case in self._cases]
        return np.asarray(np.mean(ahead_s, axis=0) / SECONDS_PER_HOUR)

    def evaluation(self, made_of: MadeOf) -> Evaluation:
        """When all cases are added. Collective over the tiles."""
        truth = self._truth
        kinds = ["file of forecasts" if one.contract is None else "network" for one in self._entries]
        entries = zip(self._entries, kinds, strict=True)
        return Evaluation(
            entries=tuple(
                Judged(one.name, kind, one.about, _held_out(one, truth, self._cases)) for one, kind in entries
            ),
            truth=truth.name,
            targets=truth.targets,
            grid=truth.grid,
            known=self._base.known,
            dates=tuple(truth.axis.label(case.start) for case in self._cases),
            leads_h=self.leads_h,
            per_date=PerDate.of(self._sums.terms_NLFCK),
            spectra=self._spectra.kept,
            example=self._whole_example(),
            made_of=made_of,
        )

    def _whole_example(self) -> Example:
        """The first lead of the last case, of the first entry."""
        assert self._first_step is not None, "there is at least one case, of at least one lead"
        start_CYX, came_CYX, forecast_CYX = self._first_step
        case, grid, targets = self._cases[-1], self._domain.grid, self._truth.targets
        reference_CYX, meaning = start_CYX.clone(), ["change in one step"] * len(targets)
        judged = {}
        entry = self._entries[0]
        for place, variable in enumerate(entry.contract.channels.targets if entry.contract else ()):
            if not variable.loss_weight:
                judged[variable.name] = "not trained: its loss has weight 0"
            if variable.role == "diagnostic":
                reference_CYX[place], meaning[place] = self._mean_of(variable, case.leads[0])
        parts = (came_CYX - reference_CYX, forecast_CYX - reference_CYX)
        came, said = (self._domain.assemble(one.float()).cpu().numpy() for one in parts)
        axis, degrees = self._truth.axis, (np.rad2deg(grid.latitude), np.rad2deg(grid.longitude))
        names, units = zip(*((one.name, one.units) for one in targets), strict=True)
        dates = axis.label(case.start), axis.label(case.leads[0])
        return Example(names, units, tuple(meaning), *degrees, came, said, dates, judged)

    def _mean_of(self, variable: Variable, frame: int) -> tuple[Tensor, str]:
        """(Y, X) what a diagnostic variable departs from, and what the departure is called."""
        mean_YX = torch.full(
            self._domain.tile.shape, variable.mean, dtype=torch.float64, device=self._domain.mesh.device
        )
        what = "departure from the mean" if variable.log1p is None else "departure from the mean of its logarithm"
        if variable.harmonics is None:
            return variable.value(mean_YX), what
        cycle_YX = self._base.cycle.at(variable.name, self._truth.axis.year_fraction[frame : frame + 1])[0]
        return mean_YX + torch.from_numpy(cycle_YX).to(mean_YX), "departure from its annual cycle"


def _held_out(entry: Entry, truth: Truth, cases: Sequence[Case]) -> bool | None:
    """Whether training saw none of the leads: by their dates and the names of their sequences, in whatever data they
    stand; None: not known, as training names sequences, and the data none."""
    if entry.contract is None:
        return None
    trained = mask_of(truth.spans(entry.contract.training), len(truth.axis))
    if any(trained[list(case.leads)].any() for case in cases):
        return False
    return True if truth.axis.names or truth.names_all(entry.contract.training) else None
