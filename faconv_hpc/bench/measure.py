"""All layers side by side in one run, on one rank or on the tiles of several."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean, median

import torch
from torch import Tensor, nn

from ..model.arithmetic import ACTIVATIONS, arithmetic
from ..spatial.domain import Domain
from ..spatial.grid import LatLonGrid
from ..spatial.mesh import ProcessMesh
from ..spread import Spread
from ..versions import __version__, processor
from .arithmetic import PASSES, KeptForBackward, least_moved_bytes, multiply_adds
from .case import BenchCase
from .layers import BASES, Makers
from .limits import COPY, LimitRuns
from .result import BenchResult, Costs, Limits, Machine, OnTiles, Row
from .timing import WARM_UP, interleaved, peak_bytes, timed

TILES, APART, WHOLE = "tiles", "apart", "whole"
"""The grid cut over all ranks; the same tiles, each a grid of its own; the grid whole, on the first rank."""
LIMIT = "limit"
LAYOUTS = {"planar": torch.contiguous_format, "channels last": torch.channels_last}
LEAST_PEAK_BYTES = 2**24  # a process's memory does not tell of less
PEAKS = 3  # of which the median counts: what a heap with holes grows by differs by a tenth

Work = Callable[[], list[float]]
Seconds = Mapping[tuple[str, str], Sequence[Sequence[float]]]
"""By layer and place, for each repeat: of forward, backward and both, on the slowest rank."""


@dataclass(frozen=True)
class Place:
    """Where layers run: all on the same input, all given the same gradient of their output."""

    domain: Domain
    x_BTCYX: Tensor
    grad_BTCYX: Tensor

    @classmethod
    def of(cls, domain: Domain, case: BenchCase) -> "Place":
        """With random numbers."""

        def numbers(channels: int) -> Tensor:
            shape = case.batch, case.steps, channels, *domain.tile.shape
            return torch.randn(shape, device=domain.mesh.device, dtype=ACTIVATIONS[case.precision])

        return cls(domain, numbers(case.inputs).requires_grad_(), numbers(case.hidden))


class LayerRun:
    """A layer at a place."""

    def __init__(self, layer: nn.Module, place: Place) -> None:
        self._layer, self._place = layer, place
        self._out: Tensor | None = None

    def seconds(self) -> list[float]:
        """Of a forward, of its backward, and of both."""
        seconds = timed(self._place.x_BTCYX.device, self._forward, self._backward)
        return [*seconds, sum(seconds)]

    def kept_and_moved_bytes(self) -> tuple[int, int]:
        """See `Row`."""
        x_BTCYX, parameters = self._place.x_BTCYX, list(self._layer.parameters())
        with KeptForBackward([x_BTCYX, *parameters]) as kept:
            out_BTCYX = self._forward()
        kept_bytes = kept.bytes_beside(out_BTCYX)
        self._backward()  # which other ranks expect, too
        of_parameters = sum(parameter.nbytes for parameter in parameters)
        return kept_bytes, least_moved_bytes(x_BTCYX, out_BTCYX, kept_bytes, of_parameters)

    def _forward(self) -> Tensor:
        self._out, _ = self._layer(self._place.x_BTCYX, domain=self._place.domain)
        return self._out

    def _backward(self) -> None:
        out, self._out = self._out, None
        assert out is not None, "backward comes after forward"
        out.backward(self._place.grad_BTCYX)
        self._layer.zero_grad(set_to_none=True)
        self._place.x_BTCYX.grad = None


def measure(
    case: BenchCase, makers: Makers, mesh: ProcessMesh, repeats: int, show: Callable[[str], None]
) -> BenchResult:
    """Measures all layers in turn. Collective; the same result on every rank.

    Args:
        case: sizes; its mesh is that of ``mesh``.
        makers: the layers, see `layers_of`.
        mesh: the ranks, and their device.
        repeats: how often each layer is timed.
        show: is told what is being done.
    """
    with _arithmetic_of(case, mesh.device):
        return _Bench(case, makers, mesh, show).run(repeats)


class _Bench:
    """The layers of one run, where they run, and what is found of them."""

    def __init__(self, case: BenchCase, makers: Makers, mesh: ProcessMesh, show: Callable[[str], None]) -> None:
        self.case, self.mesh, self.show = case, mesh, show
        grid, alone = LatLonGrid(case.nlat, case.nlon), replace(ProcessMesh.alone(), device=mesh.device)
        domain = Domain(grid, mesh)
        self.places: dict[str, Place | None] = {TILES: Place.of(domain, case)}
        if mesh.ranks > 1:
            self.places[APART] = Place.of(Domain(LatLonGrid(*domain.tile.shape), alone), case)
            self.places[WHOLE] = Place.of(Domain(grid, alone), case) if mesh.rank == 0 else None
        torch.manual_seed(0)
        self.layers = {name: make().to(mesh.device, ACTIVATIONS[case.precision]) for name, make in makers.items()}
        self.limits = LimitRuns(case, domain.tile.shape[0] * domain.tile.shape[1], mesh.device)
        self.waits: dict[str, list[dict[str, float]]] = {name: [] for name in makers}

    def run(self, repeats: int) -> BenchResult:
        """Costs first, then all in turn."""
        costs = {}
        for name, layer in self.layers.items():
            self.show(f"memory of {name}")
            costs[name] = self._costs(name, layer)
        works: dict[tuple[str, str], Work] = {
            (name, place): self._timing(name, layer, place)
            for name, layer in self.layers.items()
            for place in self.places
        }
        works |= {(LIMIT, name): self._together(work) for name, work in self.limits.works().items()}
        mine = interleaved(works, repeats, self.show)
        rates = self.limits.rates({name: self._mean(mine[LIMIT, name]) for kind, name in mine if kind == LIMIT})
        limits = Limits(copy_gb_s=rates.pop(COPY), products=rates)
        seconds = {key: self._slowest(mine[key]) for key in mine if key[0] != LIMIT}
        waits = self.mesh.gathered_objects({name: found[WARM_UP:] for name, found in self.waits.items()})
        rows = [_row(name, self.case, costs, limits, seconds, [one[name] for one in waits]) for name in self.layers]
        machine = machine_of(self.mesh.device)
        return BenchResult(case=self.case, repeats=repeats, machine=machine, limits=limits, rows=tuple(rows))

    def _costs(self, name: str, layer: nn.Module) -> Costs:
        """Also chooses the layout of a layer of library convolutions."""
        place = self.places[TILES]
        assert place is not None, "every rank has a tile"
        run = LayerRun(layer, place)
        layout = self._faster_layout(layer, run) if any(one.dim() == 4 for one in layer.parameters()) else ""
        kept, moved = run.kept_and_moved_bytes()
        peaks = [peak_bytes(run.seconds, self.mesh.device) for _ in range(PEAKS)]
        peak = None if None in peaks else median(one for one in peaks if one is not None)
        mine = [kept, moved, -1 if peak is None else peak]
        kept, moved, most = (int(max(of_ranks)) for of_ranks in zip(*self.mesh.gathered(mine), strict=True))
        return Costs(
            layer=name,
            layout=layout,
            parameters=sum(parameter.numel() for parameter in layer.parameters()),
            multiply_adds=multiply_adds(layer, self.case),
            kept_bytes=kept,
            moved_bytes=moved,
            peak_bytes=None if peak is None else most,
        )

    def _faster_layout(self, layer: nn.Module, run: LayerRun) -> str:
        """The faster of two runs in each, after one that is not counted."""
        seconds = {}
        for name, layout in LAYOUTS.items():
            layer.to(memory_format=layout)  # type: ignore[call-overload]
            run.seconds()
            seconds[name] = min(run.seconds()[-1] for _ in range(2))
        chosen = self.mesh.from_first(min(seconds, key=lambda name: seconds[name]))
        layer.to(memory_format=LAYOUTS[chosen])  # type: ignore[call-overload]
        return chosen

    def _timing(self, name: str, layer: nn.Module, place: str) -> Work:
        where = self.places[place]
        if where is None:
            return self._together(lambda: [0.0] * 3)
        run = LayerRun(layer, where)
        if place != TILES:
            return self._together(run.seconds)

        def on_tiles() -> list[float]:
            where.domain.clock.take_waits()
            seconds = run.seconds()
            self.waits[name].append(where.domain.clock.take_waits())
            return seconds

        return self._together(on_tiles)

    def _together(self, work: Work) -> Work:
        """All ranks begin at once."""

        def begun_together() -> list[float]:
            self.mesh.gathered([0.0])
            return work()

        return begun_together

    def _slowest(self, repeats: Sequence[Sequence[float]]) -> list[list[float]]:
        """Of each number of each repeat, that of the slowest rank. Collective."""
        width, of_ranks = len(repeats[0]), self.mesh.gathered([one for repeat in repeats for one in repeat])
        most = [max(values) for values in zip(*of_ranks, strict=True)]
        return [most[first : first + width] for first in range(0, len(most), width)]

    def _mean(self, repeats: Sequence[Sequence[float]]) -> list[float]:
        """Of the one number of each repeat, the mean over ranks. Collective."""
        of_ranks = self.mesh.gathered([one for (one,) in repeats])
        return [fmean(values) for values in zip(*of_ranks, strict=True)]


def _row(
    name: str,
    case: BenchCase,
    costs: Mapping[str, Costs],
    limits: Limits,
    seconds: Seconds,
    waits: Sequence[Sequence[Mapping[str, float]]],
) -> Row:
    mine, bases = costs[name], [base for base in BASES if base in costs]
    forward, backward, total = zip(*seconds[name, TILES], strict=True)
    best = limits.products[limits.best_product].median
    flop = 2 * PASSES * mine.multiply_adds / case.mesh.ranks
    return Row(
        **vars(mine),
        forward_s=Spread.of(forward),
        backward_s=Spread.of(backward),
        total_s=Spread.of(total),
        faster={base: _ratio(seconds[base, TILES], seconds[name, TILES]) for base in bases},
        smaller={base: ratio for base in bases if (ratio := _smaller(costs[base], mine)) is not None},
        product_share=flop / 1e9 / median(total) / best,
        copy_share=mine.moved_bytes / 1e9 / median(total) / limits.copy_gb_s.median,
        tiles=_on_tiles(name, case.steps, seconds, waits) if case.mesh.ranks > 1 else None,
    )


def _on_tiles(name: str, steps: int, seconds: Seconds, waits: Sequence[Sequence[Mapping[str, float]]]) -> OnTiles:
    verbs = sorted({verb for of_rank in waits for repeat in of_rank for verb in repeat})
    repeats = list(zip(*waits, strict=True))
    exposed = {
        verb: median(fmean(of_rank.get(verb, 0.0) for of_rank in repeat) for repeat in repeats) / steps
        for verb in verbs
    }
    return OnTiles(
        apart_s=Spread.of([one[-1] for one in seconds[name, APART]]),
        whole_s=Spread.of([one[-1] for one in seconds[name, WHOLE]]),
        efficiency=_ratio(seconds[name, APART], seconds[name, TILES]),
        speed_up=_ratio(seconds[name, WHOLE], seconds[name, TILES]),
        exposed_s=exposed,
    )


def _ratio(these: Sequence[Sequence[float]], those: Sequence[Sequence[float]]) -> Spread:
    """Of forward and backward together, repeat by repeat."""
    return Spread.of([this[-1] / that[-1] for this, that in zip(these, those, strict=True)])


def _smaller(base: Costs, mine: Costs) -> float | None:
    if base.peak_bytes is None or mine.peak_bytes is None:
        return None
    told = min(base.peak_bytes, mine.peak_bytes) >= LEAST_PEAK_BYTES
    return base.peak_bytes / mine.peak_bytes if told else None


def machine_of(device: torch.device) -> Machine:
    """This one, as its ranks see it."""
    return Machine(
        kind=device.type,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        threads=torch.get_num_threads(),
        cores=len(os.sched_getaffinity(0)),
        torch=torch.__version__,
        faconv_hpc=__version__,
    )


@contextmanager
def _arithmetic_of(case: BenchCase, device: torch.device) -> Iterator[None]:
    """That of the case's precision; and the library may try its convolutions and take the fastest."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        with arithmetic(case.precision, device):
            yield
    finally:
        torch.backends.cudnn.benchmark = before
