"""What is printed fits 80 columns, and nothing of it is cut away."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from faconv_hpc.bench.case import BenchCase
from faconv_hpc.bench.result import BenchResult, Fall, Limits, Machine, OnTiles, Row
from faconv_hpc.cli.bench import _show as show_bench
from faconv_hpc.cli.checkpoint import list_command
from faconv_hpc.cli.compare import show as show_comparison
from faconv_hpc.cli.data import _show
from faconv_hpc.cli.evaluate import show
from faconv_hpc.cli.study import _progress_table, _show_report
from faconv_hpc.cli.verify import _show_parity
from faconv_hpc.comparison.judging import EMBEDDING, Looked, RunErrors
from faconv_hpc.comparison.plan import ComparisonConfig
from faconv_hpc.comparison.result import AtRate, ComparisonResult, model_result
from faconv_hpc.config import MeshConfig
from faconv_hpc.data.inspection import describe_reading, describe_store
from faconv_hpc.data.store import Store
from faconv_hpc.evaluation.baselines import MadeOf
from faconv_hpc.evaluation.evaluate import Evaluation, Judged
from faconv_hpc.evaluation.sums import PerDate
from faconv_hpc.evaluation.truth import Chosen, Target
from faconv_hpc.scaling.report import PointResult, StudyReport
from faconv_hpc.spatial.grid import LatLonGrid
from faconv_hpc.spread import Spread
from faconv_hpc.training import export, shards
from faconv_hpc.training.parity import ParityRow
from faconv_hpc.training.records import StepRecord, _Display
from runs import make_store

WIDTH, WIDE = 80, 300
LONG = ("total_precipitation_6hr", "kg m**-2 s**-1", "mean rate over six hours, of all kinds, of a large scale")


@pytest.fixture
def printed(monkeypatch, capsys):
    """``printed(show)``: what it prints on a terminal of 80 columns; nothing is missing of what a wide one shows."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")

    def at(show, width):
        monkeypatch.setenv("COLUMNS", str(width))
        show()
        return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", capsys.readouterr().out)

    def of(show):
        narrow, wide = at(show, WIDTH), at(show, WIDE)
        tables = [line for line in narrow.splitlines() if "   " in line.strip()]
        assert "…" not in narrow and max(map(len, tables)) <= WIDTH, narrow
        letters = [sorted(re.sub(r"[\s─]", "", text)) for text in (narrow, wide)]
        assert letters[0] == letters[1], narrow
        numbers = [set(re.findall(r"(?<=\s)\d[\d.e%-]*(?=\s)", text)) for text in (narrow, wide)]
        assert numbers[1] <= numbers[0], narrow
        return narrow

    return of


def test_an_evaluation(printed):
    """Of many steps, by two models of long names."""
    dates, leads, targets = 40, (1, 120), (Target(*LONG[:2], ""), Target("geopotential_at_500_hpa", "m**2 s**-2", ""))
    squares = np.random.default_rng(0).uniform(1.2e-5, 3.2e-5, (dates, len(leads), 5, len(targets)))
    ones = np.ones_like(squares)
    entries = tuple(Judged(f"a_run_of_long_name_{name}", "network", {"step": "20000"}, True) for name in "ab")
    labels, hours = tuple(map(str, range(dates))), np.array(leads) * 6.0
    per_date = PerDate(ones, ones, squares, ones, ones, ones, ones)
    grid, known = LatLonGrid(721, 1440), np.ones(2, dtype=bool)
    found = Evaluation(
        entries,
        "the store data/era5",
        "",
        targets,
        grid,
        known,
        labels,
        Chosen(40),
        hours,
        per_date,
        None,
        None,
        MadeOf(),
    )
    told = printed(lambda: show(found, Path("runs/a/evaluation")))
    assert "persistence" in told and "climatology" in told and "40 forecasts of 2 steps, held out" in told
    assert "cannot be told" in told and "evaluation/report.md" in told


def test_a_store(printed, tmp_path):
    with Store.open(make_store(tmp_path / "waves")) as store:
        described = describe_store(store) | {"reading": describe_reading(store, (2, 2))}
    described["path"] = "waves"
    numbers = {"mean": 2.34567e-5, "std": 1.23456e-4, "tendency_std": 3.45678e-5, "missing_share": 0.123}
    described["channels"] += [dict(zip(("name", "units", "long_name"), LONG, strict=True)) | numbers]
    described["static"] = [{"name": "orography", "units": "m", "long_name": "altitude", "mean": 300.0, "std": 700.0}]
    assert "2.3457e-05" in printed(lambda: _show(described, Console()))


def test_tiles_beside_one_tile(printed):
    layouts = ["1x2", "2x1", "2x2", "4x1", "2x2x2"]
    rows = [ParityRow(layout, f"gradient of {part}", 1.2e-3, 1e-5) for layout in layouts for part in ("weights", "h")]
    assert "1.2e-03  FAIL" in printed(lambda: _show_parity(rows, as_json=False))


def test_checkpoints(printed, monkeypatch):
    row = {"bytes": 123456e6, "files": 4096, "mesh": "16x16x16", "zero_stage": 3, "problem": None, "path": "best"}
    rows = [row | {"step": 12_345_678, "versions": {"torch": "2.13.0+cu130"}}, {"step": 1, "problem": "x.json " * 20}]
    monkeypatch.setattr(shards, "checkpoints_at", lambda where: rows)
    monkeypatch.setattr(export, "summary", lambda one: one)
    assert "as written, the best" in printed(lambda: list_command(Path("runs/long")))


SPREAD, MANY = Spread(0.12344, 0.12001, 0.13002, 0.11, 0.15), Spread(123.44, 120.01, 130.02, 110.0, 150.0)


def test_a_study(printed):
    done = PointResult(
        "16x16x16", "16x16x16", 4096, 1024, "done", 5, SPREAD, 1234.5, 1234.56, 0.95, 0.123, 0.01, 139.25
    )
    waiting = PointResult("2x16x16-long", "2x16x16", 512, 128, "waiting")
    report = StudyReport("strong", "strong", "16x16x16", (done, waiting), "8 nodes", ())
    told = printed(lambda: _show_report(report, Path("runs/study")))
    assert "efficiency" in told and "139.25" in told


def test_a_comparison(printed):
    """Of models of long names and many parameters."""
    names = ("FAConvLSTM without attention", "ConvLSTM k=5")
    values = {"study_dir": "runs/compare", "config": "c.yaml", "budget_s": 36000.0}
    models = {name: {} for name in names}
    config = ComparisonConfig(**values, models=models, learning_rates=(0.01,), seeds=(0, 1))
    random, axes = np.random.default_rng(0), (np.array([6.0, 12.0]), *[np.array([text]) for text in LONG[:2]])
    dates = np.array([str(date) for date in range(40)])
    look = Looked(0.3, dict.fromkeys(EMBEDDING, 0.5), 123_456, 7_901_184, 0.12345, 36012.3, 139.25)
    judged, found = {}, []
    for name in names:
        squares = [random.uniform(1e-5, 2e-5, (40, 2, 3, 1)) for _ in config.seeds]
        judged[name] = tuple(
            RunErrors(one, np.ones_like(one), dates, *axes, 12_345_678, 1_234_567.0, 1) for one in squares
        )
        at = AtRate(name, 0.0123, {0: 0.3, 1: 0.3})
        found.append(model_result(at, judged[name], (look, look), (0.0123, 0.02)))
    result = ComparisonResult(config, tuple(found), {"a third": "at no rate"}, (), judged, {})
    told = printed(lambda: show_comparison(result))
    assert "12,345,678" in told and "its RMSE is" in told and "a third is not judged" in told
    assert "is the least of those that count" in told.replace("\n", " ")


def test_a_bench(printed):
    """Of a large grid on many tiles."""
    layers = ("ConvLSTM k=3", "BottleneckLSTM", "FAConvLSTM eager + attention")
    verbs = ("adjoint of gather", "adjoint of mean", "adjoint of pad", "gather", "mean", "pad", "swap")
    exposed_s = dict.fromkeys(verbs, 0.12)
    tiles = OnTiles(apart_s=MANY, whole_s=MANY, efficiency=SPREAD, speed_up=SPREAD, exposed_s=exposed_s)
    bases = ("ConvLSTM k=3", "ConvLSTM k=5")
    row = Row(
        layer="", layout="channels last", parameters=1_234_567, multiply_adds=10**15, kept_bytes=2**40,
        moved_bytes=2**41, peak_bytes=2**37, forward_s=MANY, backward_s=MANY, total_s=MANY,
        faster=dict.fromkeys(bases, SPREAD), smaller=dict.fromkeys(bases, 12.345), product_share=0.5, copy_share=0.5,
        tiles=tiles,
    )  # fmt: skip
    mesh = MeshConfig(lat=16, lon=16)
    result = BenchResult(
        case=BenchCase(nlat=721, nlon=1440, inputs=74, hidden=128, steps=32, batch=1, precision="bf16", mesh=mesh),
        repeats=7,
        machine=Machine(kind="cuda", device="NVIDIA H200", threads=12, cores=96, torch="2.13.0", faconv_hpc="0.1.0"),
        limits=Limits(products={"8192 x 8192 x 8192": MANY}, copy_gb_s=MANY),
        rows=[row.model_copy(update={"layer": layer}) for layer in layers],
        fell=[Fall("FAConvLSTM", "faster than ConvLSTM k=3", 7.6, 5.1)],
    )
    told = printed(lambda: show_bench(result, None))
    assert "adjoint" in told and "FELL: FAConvLSTM, faster than ConvLSTM k=3: 5.100, was 7.600" in told


def test_the_points_of_a_study_that_runs(printed):
    run = SimpleNamespace(training=SimpleNamespace(steps=100_000))
    point = SimpleNamespace(name="2x16x16-with-a-long-name", ranks=4096, run=run)
    state = SimpleNamespace(point=point, status="running", steps=99_999, attempt=SimpleNamespace(job="1234567"))
    assert "99999/100000" in printed(lambda: Console().print(_progress_table([state])))


def test_the_bar_of_a_run(monkeypatch):
    """With time left and memory, also of a long run."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    display = _Display(200_000, 123_456)
    record = StepRecord(123_456, 12.3456, 1.0, 1.0, 0.1, 16, 0.1, 1234.5, 0.1, 0.1, 0.1, 139.25)
    display.show(replace(record, step=123_457))
    with display._console.capture() as shown:
        display._console.print(display._bar.get_renderable())
    line = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown.get()).rstrip("\n")
    assert len(line) <= WIDTH and "…" not in line, line
    assert "123457/200000" in line and "loss 12.3456 1.23e+03/s 139.2 GiB" in line and line.count(":") >= 3, line
