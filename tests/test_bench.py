"""`faconv bench`: what it counts, how it takes turns, and what it says of an earlier result."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import typer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from faconv_hpc import ConvLSTM2d, FAConvLSTM2d
from faconv_hpc.bench.arithmetic import least_moved_bytes, multiply_adds
from faconv_hpc.bench.case import BenchCase
from faconv_hpc.bench.layers import layers_of
from faconv_hpc.bench.limits import LimitRuns
from faconv_hpc.bench.measure import LayerRun, Place, machine_of, measure
from faconv_hpc.bench.reference import check_comparable, falls, ratios_of
from faconv_hpc.bench.result import BenchResult
from faconv_hpc.bench.timing import WARM_UP, _holes, interleaved, peak_bytes, timed
from faconv_hpc.cli.bench import bench_command
from faconv_hpc.config import MeshConfig
from faconv_hpc.errors import InputError
from faconv_hpc.spatial.domain import Domain
from faconv_hpc.spatial.grid import LatLonGrid
from faconv_hpc.spatial.mesh import ProcessMesh
from test_cli import faconv

CPU = torch.device("cpu")
SIZES = {"nlat": 6, "nlon": 9, "inputs": 3, "hidden": 8, "steps": 5, "batch": 2}
OPTIONS = [
    "--grid", "6x9", "--inputs", "3", "--hidden", "8", "--steps", "5", "--batch", "2", "--kernels", "eager",
    "--repeats", "5",
]  # fmt: skip
MATH = torch.nn.attention.SDPBackend.MATH  # attention whose products torch counts
TAPS = 3 * 8 + 1  # of three dilations of 3 x 3


def case_of(**changes):
    return BenchCase(**({"precision": "fp32", "mesh": MeshConfig()} | SIZES | changes))


def bench(*arguments):
    """On the CPU."""
    return faconv("bench", *arguments, environment={"CUDA_VISIBLE_DEVICES": ""})


bench_app = typer.Typer()
bench_app.command()(bench_command)
CASE = case_of()
LAYERS = layers_of(CASE, ["eager"])


def seen_by_torch(make, case):
    """FLOP of one forward in matrix products and convolutions."""
    x_BTCYX = torch.randn(case.batch, case.steps, case.inputs, case.nlat, case.nlon)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(MATH):
        make()(x_BTCYX)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", LAYERS)
def test_multiply_adds_are_those_that_torch_sees(name):
    """Without what does not grow with the cells, and with what is mixed by eager passes, which are no products."""
    cases = [case_of(nlat=nlat, nlon=nlon) for nlat, nlon in ((6, 9), (7, 20))]
    few, many = (seen_by_torch(LAYERS[name], case) for case in cases)
    fewer, more = (multiply_adds(LAYERS[name](), case) for case in cases)
    cells = case_of().batch * case_of().steps * (7 * 20 - 6 * 9)
    unseen = TAPS * 4 * cells if name.startswith("FAConvLSTM") else 0
    assert many - few == 2 * (more - fewer - unseen) > 0


def test_multiply_adds_of_one_cell_by_hand():
    """Per cell and step, hidden 64, 64 inputs."""
    case = case_of(nlat=1, nlon=1, inputs=64, hidden=64, steps=1, batch=1)
    layers = layers_of(case, ["eager"])
    count = {name: multiply_adds(make(), case) for name, make in layers.items()}
    assert count["ConvLSTM k=3"] == 9 * 128 * 256 and count["ConvLSTM k=5"] == 25 * 128 * 256
    assert count["BottleneckLSTM"] == 9 * 128 + 128 * 64 + 9 * 64 + 64 * 256
    assert count["RVT ConvLSTM"] == 9 * 64 + 128 * 256
    assert count["FAConvLSTM eager"] == 64 * 32 + TAPS * 32 + 32 * 256  # the first step has no h


def test_what_is_kept_is_counted_once_and_without_what_the_caller_has():
    """Of FAConvLSTM: c before every step, the padded bottleneck, its kernels and what they are made of; h is output."""
    place = Place.of(Domain(LatLonGrid(6, 9)), CASE)
    layer = FAConvLSTM2d(3, 8, attention_every=0)
    kept, moved = LayerRun(layer, place).kept_and_moved_bytes()
    batch, steps, bottleneck, reach = 2, 5, 4, 4
    padded = bottleneck * (6 + 2 * reach) * (9 + 2 * reach)
    kernels, factors = bottleneck * TAPS, 3 * bottleneck
    squeezed = 3 + bottleneck + 2 * 1  # the mean of the input, of the bottleneck, and what it is squeezed to
    kept_of_steps = 8 * 6 * 9 + padded + kernels + factors + squeezed
    assert kept == 4 * (batch * steps * kept_of_steps + 3 * 9 * TAPS)  # and which tap a kernel's cell is
    weights = sum(parameter.numel() for parameter in layer.parameters())
    assert moved == 2 * (kept + 4 * batch * steps * (3 + 8) * 6 * 9) + 3 * 4 * weights
    assert least_moved_bytes(torch.zeros(2), torch.zeros(3), 100, 10) == 2 * (8 + 12 + 100) + 30


def test_a_run_leaves_no_gradients_behind():
    place, layer = Place.of(Domain(LatLonGrid(6, 9)), CASE), ConvLSTM2d(3, 8)
    forward, backward, both = LayerRun(layer, place).seconds()
    assert forward > 0 and backward > 0 and both == forward + backward
    assert place.x_BTCYX.grad is None and all(one.grad is None for one in layer.parameters())


def test_works_take_turns_and_each_begins_a_repeat():
    order, told = [], []

    def work(name):
        order.append(name)
        return [float(len(order))]

    found = interleaved({name: partial(work, name) for name in "abc"}, 3, told.append)
    rounds = ["".join(order[first : first + 3]) for first in range(0, len(order), 3)]
    assert len(rounds) == WARM_UP + 3 and rounds[WARM_UP:] == ["abc", "bca", "cab"]
    assert found["a"] == [[WARM_UP * 3 + 1.0], [WARM_UP * 3 + 6.0], [WARM_UP * 3 + 8.0]]
    assert told[-1] == "repeat 3 of 3" and told[0] == "warming up"


class Clock:
    """Stands in for `time`: what is told to take time does, all else takes a microsecond."""

    now = 0.0

    def perf_counter(self):
        self.now += 1e-6
        return self.now

    def goes_on(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    stands = Clock()
    monkeypatch.setattr("faconv_hpc.bench.timing.time", stands)
    return stands


def test_each_work_is_timed_by_itself(clock):
    assert timed(CPU, lambda: clock.goes_on(2), lambda: clock.goes_on(6)) == pytest.approx([2, 6], rel=1e-5)


def test_the_peak_is_of_the_work_alone():
    """Not of what was there before, or has gone again; memory that is freed and taken again counts once."""
    mib = 2**20
    held, above = torch.ones(20 * mib), []

    def work():
        for size in (30, 50, 10):
            torch.ones(size * mib, dtype=torch.uint8)

    for _ in range(3):
        gone = torch.ones(40 * mib), torch.ones(31 * mib, dtype=torch.uint8)
        above.append([torch.ones(4_000) for _ in range(100)])
        del gone  # raises to the second's size what glibc keeps, where what is above it keeps its place, from then on
        assert 48 * mib <= peak_bytes(work, CPU) <= 60 * mib
    assert held[0] == 1


def test_what_the_allocator_has_kept_is_not_there_before_the_work():
    def small_tensors(count):
        return [torch.ones(25_000) for _ in range(count)]  # 100 kB each, which glibc keeps when they are freed

    gone, above = small_tensors(600), small_tensors(1)
    del gone
    assert 28e6 <= peak_bytes(lambda: small_tensors(300), CPU) <= 36e6
    assert above[0][0] == 1


def test_blocks_of_another_allocator_are_no_holes_of_the_heap():
    """Such as jemalloc's, which lie elsewhere and leave the heap's end where it is: there is no last one."""
    taken = []

    def malloc(size):
        assert len(taken) < 100, "it goes on for ever"
        taken.append(2**46 + 2**30 * len(taken))
        return taken[-1]

    library = SimpleNamespace(
        mallopt=lambda option, value: 1,
        malloc=malloc,
        sbrk=lambda more: 2**40,
        free=lambda block: taken.remove(block.value),
    )
    assert _holes(library) == [] == taken


def test_the_limits_are_of_the_sizes_used_and_of_the_type():
    limits = LimitRuns(case_of(precision="bf16"), 54, CPU)
    works = limits.works()
    assert list(works) == ["32 x 4 x 54", "256 x 256 x 256", "512 x 512 x 512", "1024 x 1024 x 1024", "copy"]
    rates = limits.rates({name: [0.5, 0.25] for name in works})
    assert rates["256 x 256 x 256"].most == pytest.approx(2 * 256**3 / 0.25e9)
    assert rates["copy"].least == pytest.approx(2 * 2**27 / 0.5e9)


class Slow(nn.Module):
    """A layer that takes as long as it is told to, forward and backward."""

    def __init__(self, clock, forward_s, backward_s):
        super().__init__()
        self.weight, self.clock, self.seconds = nn.Parameter(torch.ones(8, 3)), clock, (forward_s, backward_s)

    def forward(self, x_BTCYX, domain):
        self.clock.goes_on(self.seconds[0])
        out = torch.einsum("oc,btcyx->btoyx", self.weight, x_BTCYX)
        out.register_hook(lambda grad: self.clock.goes_on(self.seconds[1]))
        return out, None


def test_a_layer_is_as_much_faster_as_it_takes_less(clock):
    makers = {"ConvLSTM k=3": partial(Slow, clock, 4, 5), "FAConvLSTM": partial(Slow, clock, 1, 2)}
    result = measure(CASE, makers, ProcessMesh.alone(), 5, lambda text: None)
    base, ours = result.rows
    assert ours.faster["ConvLSTM k=3"].median == pytest.approx(3, rel=1e-5) and base.faster["ConvLSTM k=3"].median == 1
    seconds = ours.forward_s.least, ours.backward_s.most, ours.total_s.median
    assert seconds == pytest.approx((1, 2, 3), rel=1e-5) and ours.parameters == 24
    assert ours.tiles is None and not ours.layout and not ours.multiply_adds


@pytest.fixture(scope="module")
def printed():
    """What `--json` prints, of one rank and of two."""
    one = bench(*OPTIONS, "--json")
    two = bench(*OPTIONS, "--json", "--ranks", "2", "--only", "FAConvLSTM eager + attention")
    for done in (one, two):
        assert done.returncode == 0, done.stderr
    return one.stdout, two.stdout


def test_json_tells_all_of_every_layer(printed):
    result = BenchResult.model_validate_json(printed[0])
    assert [row.layer for row in result.rows] == list(LAYERS) and result.case == CASE and result.repeats == 5
    assert result.machine == machine_of(CPU) and result.fell == ()
    assert json.loads(result.to_json()) == json.loads(printed[0])
    for row in result.rows:
        layer = LAYERS[row.layer]()
        assert row.parameters == sum(one.numel() for one in layer.parameters())
        assert row.multiply_adds == multiply_adds(layer, CASE) and row.moved_bytes > 2 * row.kept_bytes > 0
        assert set(row.faster) == {"ConvLSTM k=3", "ConvLSTM k=5"} and not row.smaller, "of so little memory"
        assert row.layout in (("",) if "FAConv" in row.layer else ("planar", "channels last"))
        best = max(rate.median for rate in result.limits.products.values())
        share = 6 * row.multiply_adds / row.total_s.median / 1e9 / best
        assert row.product_share == pytest.approx(share, rel=1e-6) and row.copy_share > 0


def test_json_of_ranks_tells_what_tiles_cost(printed):
    result = BenchResult.model_validate_json(printed[1])
    (row,) = result.rows
    assert result.case == case_of(mesh=MeshConfig(lat=2)) and row.tiles is not None and row.faster == {}
    tiles = row.tiles
    for ratio, over in ((tiles.efficiency, tiles.apart_s), (tiles.speed_up, tiles.whole_s)):
        assert over.least / row.total_s.most <= ratio.median <= over.most / row.total_s.least
    verbs = {"pad", "adjoint of pad", "mean", "adjoint of mean"}
    assert verbs <= set(tiles.exposed_s) and 0 < sum(tiles.exposed_s.values()) * CASE.steps < row.total_s.most


def changed(printed, layer="FAConvLSTM eager", by=1.0, **updates):
    """A result whose ratios of one layer are so many times larger."""
    tree = json.loads(printed) | updates
    for row in tree["rows"]:
        if row["layer"] == layer:
            row["smaller"] = {"ConvLSTM k=3": 2.0 * by}
            for spread in row["faster"].values():
                spread["median"] *= by
            for name in ("efficiency", "speed_up") if row["tiles"] else ():
                row["tiles"][name]["median"] *= by
    return BenchResult.model_validate(tree)


def test_a_ratio_that_fell_by_a_fifth_is_named_and_a_tenth_is_not(printed):
    now = changed(printed[0])
    assert not any(falls(now, changed(printed[0], by=by)) for by in (0.5, 1.0, 1 / 0.91))
    fallen = falls(now, changed(printed[0], by=1 / 0.8))
    assert {(one.layer, one.ratio) for one in fallen} == {
        ("FAConvLSTM eager", f"{kind} than {base}")
        for kind, base in (("faster", "ConvLSTM k=3"), ("faster", "ConvLSTM k=5"), ("smaller", "ConvLSTM k=3"))
    }
    assert all(one.now == pytest.approx(0.8 * one.before) for one in fallen)
    tiles = {"layer": "FAConvLSTM eager + attention"}
    on_tiles = falls(changed(printed[1], **tiles), changed(printed[1], **tiles, by=1 / 0.8))
    assert {one.ratio for one in on_tiles} == {"smaller than ConvLSTM k=3", "efficiency on tiles", "speed-up on tiles"}


def test_a_base_is_not_compared_with_itself(printed):
    ratios = ratios_of(BenchResult.model_validate_json(printed[0]))
    assert ("ConvLSTM k=3", "faster than ConvLSTM k=5") in ratios
    assert ("ConvLSTM k=3", "faster than ConvLSTM k=3") not in ratios


def test_the_command_says_what_fell_and_fails(printed, tmp_path):
    path, only = tmp_path / "reference.json", ["--only", "ConvLSTM k=3", "--only", "FAConvLSTM eager"]
    path.write_text(changed(printed[0], by=1e-3).to_json())
    passed = bench(*OPTIONS, *only, "--against", str(path))
    assert passed.returncode == 0 and "no ratio fell by more than 10 % against" in passed.stdout, passed.stderr
    path.write_text(changed(printed[0], by=1e3).to_json())
    failed = bench(*OPTIONS, *only, "--against", str(path), "--json")
    assert failed.returncode == 1
    (fall,) = BenchResult.model_validate_json(failed.stdout).fell
    assert (fall.layer, fall.ratio) == ("FAConvLSTM eager", "faster than ConvLSTM k=3")


def test_a_reference_of_another_case_or_machine_is_refused(printed):
    reference, here = BenchResult.model_validate_json(printed[0]), machine_of(CPU)
    check_comparable(CASE, here, reference)
    check_comparable(CASE, here.model_copy(update={"torch": "9", "cores": 99}), reference)
    with pytest.raises(InputError, match=r"case or machine: nlat 7 \(reference: 6\), hidden 9 \(reference: 8\)\. "):
        check_comparable(case_of(nlat=7, hidden=9), here, reference)
    with pytest.raises(InputError, match=r"mesh 1x2 \(reference: 1x1\)\. .*--json > FILE"):
        check_comparable(case_of(mesh=MeshConfig(lon=2)), here, reference)
    with pytest.raises(InputError, match=r"device Another \(reference: .*threads 7"):
        check_comparable(CASE, here.model_copy(update={"device": "Another", "threads": 7}), reference)
    with pytest.raises(InputError, match="no ratio is in both"):
        falls(reference.model_copy(update={"rows": reference.rows[2:3]}), changed(printed[0], rows=[]))


def test_another_file_is_no_reference(printed, tmp_path):
    path = tmp_path / "reference.json"
    with pytest.raises(InputError, match="holds no result of faconv bench: No such file"):
        BenchResult.load(path)
    path.write_text("{}")
    with pytest.raises(InputError, match=r"case: Field required\. Make one: faconv bench --json > "):
        BenchResult.load(path)
    path.write_text(json.dumps(json.loads(printed[0]) | {"format": 2}))
    with pytest.raises(InputError, match="format: Input should be 1"):
        BenchResult.load(path)
    path.write_text(printed[0])
    assert BenchResult.load(path).to_json() == printed[0].strip()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--grid", "6by9"], "--grid is ROWSxCOLUMNS, got '6by9'"),
        (["--mesh", "2x1x1"], "--mesh 2x1x1 has 2 replicas"),
        (["--only", "LSTM"], "there is no layer 'LSTM'. Use any of: ConvLSTM k=3, "),
        (["--precision", "tf32"], "--precision tf32 is how a GPU multiplies"),
        (["--kernels", "triton"], "--kernels triton are those of a GPU, this is a cpu"),
        (["--ranks", "2", "--mesh", "1x3"], "Use --ranks 3, or another --mesh"),
        (["--ranks", "2", "--against", "nowhere.json"], "nowhere.json holds no result"),
        pytest.param(
            ["--device", "cuda"], "can use no GPU on",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(options, told):
    done = bench(*options)
    assert done.returncode == 2 and told in " ".join(done.stderr.split()), done.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--device", "cuda"], "device is cuda, and torch .* can use no GPU on"),
        (["--precision", "tf32"], "--precision tf32 is how a GPU multiplies, this is a cpu"),
        (["--kernels", "eager", "--kernels", "triton"], "--kernels triton are those of a GPU, this is a cpu"),
    ],
    ids=["device", "precision", "kernels"],
)
def test_ranks_are_not_started_for_what_they_would_refuse(monkeypatch, options, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("faconv_hpc.cli.bench.run_ranks", lambda *_: pytest.fail("ranks were started"))
    with pytest.raises(InputError, match=told):
        CliRunner().invoke(bench_app, [*options, "--ranks", "2"], catch_exceptions=False)
