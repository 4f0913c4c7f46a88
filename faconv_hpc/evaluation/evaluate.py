"""How good forecasts are, of networks and of files, beside each other and beside what costs nothing."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

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
from ..forecasting.turns import Progress, take_turns
from ..model.arithmetic import arithmetic
from ..spatial.domain import Domain
from ..spatial.mesh import ProcessMesh
from ..training.contract import Contract
from ..training.export import SUFFIXES
from ..training.loading import store_of
from ..training.shards import FOLDER
from . import baselines
from .baselines import Baselines, MadeOf
from .entries import FILES, Entry, FileEntry, NetworkEntry, cases_of_files, is_file_of_forecasts
from .evaluation import Evaluation, Judged
from .fields import Example, MapSums, SpectraSums
from .sums import PerDate, Sums
from .truth import Case, Chosen, Truth, data_in_words, truth_of


@torch.no_grad()
def evaluate(
    models: Sequence[Path],
    mesh: ProcessMesh,
    *,
    data: Sequence[Path] = (),
    against: Sequence[Path] = (),
    leads: int | None = None,
    samples: int | None = None,
    climatology: Sequence[str] = (),
    maps: Path | None = None,
    spin_up: int | None = None,
    kernels: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Holds forecasts against what came, on the same dates and cells. Collective; tiles share the globe, replicas the
    dates.

    Dates are those whose leads lie in the test period of the first network, or those of the first file, as far as all
    have them. A cell counts where it is known what came, at the start and at the lead, and where each network had
    something to begin from.

    Args:
        models: run directories, checkpoints, exported files; or files of forecasts.
        data: what came, and what networks forecast from: a store or files. Default: the store of the first run.
        against: what came, if it is other than what networks forecast from, such as the same without noise.
        leads: how many steps. Default: 1; of files alone all they have.
        samples: how many dates, spread over those there are. Default: all.
        climatology: dates of which climatology and damped persistence are made. Default: those of training.
        maps: a file to which errors on the map are written, see `MapSums.save`; its directory is there.
        spin_up: frames that a network is given before it runs freely. Default: the window of its training.
        kernels: of networks, see `load_network`.

    Raises:
        InputError: models or data that cannot be read, or that do not fit each other.
    """
    entries, data = opened(models, mesh, data, kernels)
    networks = [one for one in entries if isinstance(one, NetworkEntry)]
    for one in networks:
        one.forecaster.window = spin_up or one.forecaster.window
    files = [one for one in entries if isinstance(one, FileEntry)]
    contract = networks[0].contract if networks else None
    truth = truth_of(against or data, contract, [name for one in files for name in one.names])
    for entry in entries:
        entry.check(truth)
    cases = _cases(networks, files, truth, leads)
    some = [cases[place] for place in evenly(len(cases), samples or len(cases))]
    domain = Domain(truth.grid, mesh, cuts=networks[0].forecaster.domain.cuts if networks else None)
    cycle = networks[0].forecaster.cycle if networks else None
    spans = _spans(truth, climatology, contract)
    base = Baselines.of(truth, domain, spans, len(some[0].leads), cycle)
    work = _Work(entries, truth, domain, base, some)
    with arithmetic("fp32", mesh.device):
        take_turns(range(len(some)), len(some[0].leads), mesh, work.add, progress)
    sequences = tuple(dict.fromkeys(name for name in map(truth.sequence, some) if name is not None))
    chosen = Chosen(len(cases), contract.test if contract is not None else (), sequences, contract is None)
    made_of = MadeOf.of(truth, spans, bool(climatology), some)
    found = work.evaluation(chosen, made_of, data_in_words(data) if networks else "")
    if maps is not None and mesh.replica == 0:
        work.maps.save(maps, [one.name for one in entries], truth.targets, work.leads_h)
    return found


def opened(
    models: Sequence[Path], mesh: ProcessMesh, data: Sequence[Path] = (), kernels: str | None = None
) -> tuple[tuple[Entry, ...], Sequence[Path]]:
    """What is to be judged, and the data of all: those that are named, or the store of the first run. Collective."""
    names = names_of(models)
    load = partial(Forecaster.load, mesh=mesh, kernels=kernels)
    loaded = [None if is_file_of_forecasts(path) else load(path) for path in models]
    block = math.lcm(*(one.network.scale_factor for one in loaded if one is not None))
    loaded = [  # all on the same tiles
        one if one is None or one.network.scale_factor == block else Forecaster(one.trained, mesh, block=block)
        for one in loaded
    ]
    data = data or [store_of([one.trained.about for one in loaded if one is not None], models)]
    entries = list[Entry]()
    for path, name, forecaster in zip(models, names, loaded, strict=True):
        if forecaster is None:
            entries.append(FileEntry(path, name))
            continue
        trained = forecaster.trained
        about = {"path": str(path), "step": str(trained.step), "network_sha256": trained.digest}
        entries.append(NetworkEntry(name, about, forecaster, data))
    return tuple(entries), data


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
        self._sums = Sums(domain, len(cases), leads, len(entries) + len(baselines.NAMES), targets)
        self._spectra = SpectraSums(domain, leads, len(cases), len(entries), targets)
        self.maps = MapSums(domain, leads, len(entries), targets)
        self._first_step: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, number: int) -> Iterator[None]:
        """One case, lead by lead. Collective over the tiles."""
        case = self._cases[number]
        start_CYX, mean_then_CYX = self._base.came(case.start), self._base.climatology(case.start)
        known, runs = ~start_CYX.isnan(), [one.run(self._truth, case, self._domain) for one in self._entries]
        for run in runs:
            known = known if run.begun_CYX is None else known & run.begun_CYX
        leads = zip(*(run.leads for run in runs), strict=True)
        for lead, (frame, forecasts) in enumerate(zip(case.leads, leads, strict=True)):
            came_CYX, mean_CYX = self._base.came(frame), self._base.climatology(frame)
            came_CYX = came_CYX.where(known, float("nan"))
            damped_CYX = self._base.damped(lead, start_CYX, mean_then_CYX, mean_CYX)
            free = start_CYX, mean_CYX, damped_CYX
            self._sums.add(number, lead, forecasts, free, came_CYX, mean_CYX)
            self._spectra.add(number, lead, came_CYX, forecasts)
            self.maps.add(lead, came_CYX, forecasts)
            if lead == 0:
                self._first_step = start_CYX, came_CYX, forecasts[0]
            yield

    @property
    def leads_h(self) -> NDArray[np.float64]:
        """(L,) mean over the cases."""
        seconds = self._truth.axis.seconds
        ahead_s = [seconds[list(case.leads)] - seconds[case.start] for case in self._cases]
        return np.asarray(np.mean(ahead_s, axis=0) / SECONDS_PER_HOUR)

    def evaluation(self, chosen: Chosen, made_of: MadeOf, given: str) -> Evaluation:
        """When all cases are added; ``given`` is what networks forecast from. Collective."""
        truth = self._truth
        for sums in (self._sums, self._spectra, self.maps):
            sums.join()
        kinds = ["file of forecasts" if one.contract is None else "network" for one in self._entries]
        entries = zip(self._entries, kinds, strict=True)
        return Evaluation(
            entries=tuple(
                Judged(one.name, kind, one.about, _held_out(one, truth, self._cases)) for one, kind in entries
            ),
            truth=truth.name,
            given=given,
            targets=truth.targets,
            grid=truth.grid,
            known=self._base.known,
            dates=tuple(truth.axis.label(case.start) for case in self._cases),
            chosen=chosen,
            leads_h=self.leads_h,
            per_date=PerDate.of(self._sums.terms_NLFCK),
            spectra=self._spectra.kept,
            example=self._whole_example(),
            made_of=made_of,
            on_earth=truth.on_earth,
        )

    def _whole_example(self) -> Example:
        """The first lead of the last case, of the first entry, on every rank. Collective."""
        case, grid, axis, mesh = self._cases[-1], self._domain.grid, self._truth.axis, self._domain.mesh
        contract = self._entries[0].contract
        meaning, judged = ["change in one step"] * len(self._truth.targets), {}
        for place, variable in enumerate(contract.channels.targets if contract else ()):
            if not variable.loss_weight:
                judged[variable.name] = "not trained: its loss has weight 0"
            if variable.role == "diagnostic":
                meaning[place] = _departure_of(variable)
        replica = (len(self._cases) - 1) % mesh.replicas
        fields = self._departures(case) if mesh.replica == replica else None
        shape = (2, len(self._truth.targets), grid.nlat, grid.nlon)
        came, said = mesh.from_rank(fields, shape, replica * mesh.tiles).cpu().numpy()
        degrees = (np.rad2deg(grid.latitude), np.rad2deg(grid.longitude))
        names, units = zip(*((one.name, one.units) for one in self._truth.targets), strict=True)
        dates = axis.label(case.start), axis.label(case.leads[0])
        return Example(names, units, tuple(meaning), *degrees, came, said, dates, judged)

    def _departures(self, case: Case) -> Tensor | None:
        """(2, C, nlat, nlon) what came and the forecast, less the start or, of diagnostic variables, a mean; on the
        first tile. Collective over the tiles of the replica that has the last case."""
        assert self._first_step is not None, "there is at least one case, of at least one lead"
        start_CYX, came_CYX, forecast_CYX = self._first_step
        reference_CYX, contract = start_CYX.clone(), self._entries[0].contract
        for place, variable in enumerate(contract.channels.targets if contract else ()):
            if variable.role == "diagnostic":
                reference_CYX[place] = self._mean_of(variable, case.leads[0])
        parts = torch.stack([came_CYX - reference_CYX, forecast_CYX - reference_CYX])
        return self._domain.assemble_at(parts.float(), 0)

    def _mean_of(self, variable: Variable, frame: int) -> Tensor:
        """(Y, X) what a diagnostic variable departs from."""
        shape, device = self._domain.tile.shape, self._domain.mesh.device
        mean_YX = torch.full(shape, variable.mean, dtype=torch.float64, device=device)
        if variable.harmonics is None:
            return variable.value(mean_YX)
        cycle_YX = self._base.cycle.at(variable.name, self._truth.axis.year_fraction[frame : frame + 1])[0]
        return mean_YX + torch.from_numpy(cycle_YX).to(mean_YX)


def _departure_of(variable: Variable) -> str:
    """What the departure of a diagnostic variable is called."""
    if variable.harmonics is not None:
        return "departure from its annual cycle"
    return "departure from the mean" if variable.log1p is None else "departure from the mean of its logarithm"


def _held_out(entry: Entry, truth: Truth, cases: Sequence[Case]) -> bool | None:
    """Whether training saw none of the leads: by their dates and the names of their sequences, in whatever data they
    stand; None: not known, as training names sequences, and the data none."""
    if entry.contract is None:
        return None
    trained = mask_of(truth.spans(entry.contract.training), len(truth.axis))
    if any(trained[list(case.leads)].any() for case in cases):
        return False
    return True if truth.axis.names or truth.names_all(entry.contract.training) else None
