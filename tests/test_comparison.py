"""Comparisons of models: rules, and a real one that is killed and goes on."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from statistics import median

import numpy as np
import pytest
import xarray as xr
import yaml

import forks
from faconv_hpc.comparison.gathering import best_runs, known_runs, result_of
from faconv_hpc.comparison.judging import JUDGED_FILE, check_truth, judged, looked
from faconv_hpc.comparison.plan import ComparisonConfig, known_steps, label_of, probes_of, runs_of, steps_of
from faconv_hpc.config_file import load_yaml
from faconv_hpc.errors import InputError
from faconv_hpc.forecasting.forecaster import Forecaster
from faconv_hpc.model.network import FAConvLSTMNetwork
from faconv_hpc.prepare.preparation import prepare
from faconv_hpc.scaling.driver import StudyDriver
from faconv_hpc.scaling.points import Outcomes, PointFiles
from faconv_hpc.training.loading import about_network
from faconv_hpc.training.records import read_records
from ranks import Layout, run_on_ranks
from runs import evaluated, fields_in, make_store, write_config
from studies import FakeCluster, NoStop, record, write_records
from test_cli import command_after, faconv, messages

AGAIN = "start the comparison again with --retry-failed, or leave out the rate"
SECONDS = 300  # a busy machine is no failure
PERIODS = {"validation": "2000-01-04/2000-01-04T23", "test": "2000-01-05/"}  # frames 12 to 15, 16 to 27
MODELS = {"FAConvLSTM": {}, "ConvLSTM k=3": {"model.cell": "convlstm", "data.window": 4}}
RATES, SEEDS = [0.01, 0.03], [0, 4]
STEP_S = {"FAConvLSTM": 0.1, "ConvLSTM k=3": 0.2}  # of the probes


def write_comparison(directory, **values):
    """Two models at two rates from two seeds: 8 steps of the one, 4 of the other; no store is made."""
    data, training = {"window": 2, "periods": PERIODS}, {"steps": 40, "warmup_steps": 10, "checkpoint_every": 2}
    config = write_config(directory / "base", directory / "waves", data=data, training=training)
    tree = {
        "study_dir": str(directory / "study"), "config": str(config), "models": MODELS, "learning_rates": RATES,
        "seeds": SEEDS, "budget_s": 0.8, "leads": 2, "samples": None,
    }  # fmt: skip
    path = directory / "comparison.yaml"
    path.write_text(yaml.safe_dump(tree | values, sort_keys=False))
    return path


def comparison_of(directory, **values):
    return load_yaml(ComparisonConfig, write_comparison(directory, **values))


def probe(comparison):
    """As if the probes had run, with steps of a known time, on a machine that slows down."""
    for name, point in probes_of(comparison).items():
        seconds = [9.0] * comparison.warm_up_steps + [0.3] + [STEP_S[name]] * (comparison.probe_steps - 1)
        timed(comparison, point, seconds)


def timed(comparison, point, seconds):
    """As if a run had had steps of these seconds."""
    files = PointFiles(point)
    attempt = files.begin("local")
    write_records(point.run.run_dir, [record(step, one) for step, one in enumerate(seconds, 1)])
    Outcomes(comparison.study_dir).add(files.outcome(attempt))


# ---- rules -----------------------------------------------------------------------------------------------------------


def test_all_runs_have_the_same_time_and_schedules_of_the_same_shape(tmp_path):
    comparison = comparison_of(tmp_path)
    probe(comparison)
    steps = {name: steps_of(comparison, point) for name, point in probes_of(comparison).items()}
    assert steps == {"FAConvLSTM": 8, "ConvLSTM k=3": 4}
    runs = runs_of(comparison, steps)
    told = [(run.model, run.rate, run.seed) for run in runs]
    assert told == [(model, rate, seed) for seed in SEEDS for model in MODELS for rate in RATES]
    training = [run.point.run.training for run in runs]
    assert [one.steps for one in training[:4]] == [8, 8, 4, 4]
    assert [one.warmup_steps for one in training[:4]] == [2, 2, 1, 1]  # a quarter, as in the base config
    assert all((one.validate_every, one.validate_leads) == (one.steps, 2) for one in training)
    assert [(one.learning_rate, one.seed) for one in training] == [(rate, seed) for _, rate, seed in told]
    assert [run.point.run.model.cell for run in runs[:3]] == ["faconvlstm", "faconvlstm", "convlstm"]
    assert len({run.point.directory for run in runs}) == 8 and runs[2].point.name == "ConvLSTM-k-3_rate0.01_seed0"
    assert all(run.point.goes_on for run in runs) and label_of("a (b) k=3 ") == "a-b-k-3"


BAD = {
    "one model": ({"models": {"a": {}}}, r"models: .*at least 2 items"),
    "the same directory": ({"models": {"a 1": {}, "a-1": {}}}, r"names that differ in letters or digits.*'a 1', 'a-1'"),
    "a rate twice": ({"learning_rates": [0.01, 0.01]}, r"each once, but 0\.01 stands there more often"),
    "two rates in one directory": (
        {"learning_rates": [0.01, 0.02, 0.010000001]},
        r"each once, but 0\.01 stands there more often: 0\.01, 0\.010000001 \(rates are told apart by six digits",
    ),
    "a seed twice": ({"seeds": [1234567, 4, 1234567]}, r"each once, but 1234567 stands there more often"),
    "a rate of none": ({"learning_rates": [0]}, r"learning_rates\.0: Input should be greater than 0"),
    "no time": ({"budget_s": 0}, r"budget_s: Input should be greater than 0"),
    "an unknown key": ({"budget": 7}, r"budget: unknown key\. Did you mean 'budget_s'"),
    "steps": ({"set": {"training.steps": 9}}, r"set: the comparison decides training\.steps \(as many as budget_s"),
    "a rate of a model": (
        {"models": {"a": {}, "b": {"training": {"learning_rate": 1}}}},
        r"model 'b': the comparison decides training\.learning_rate \(learning_rates says it\)",
    ),
    "a warm-up": (
        {"set": {"training": {"warmup_steps": 5}}},
        r"decides training\.warmup_steps \(the same share of a run's steps as in the base config\)",
    ),
    "a warm-up of a model": ({"models": {"a": {}, "b": {"training.warmup_steps": 5}}}, r"'b': the comparison decides"),
    "a rollout": ({"set": {"training.rollout": {5: 2}}}, r"decides training\.rollout \(that of the base config"),
    "another boundary": (
        {"models": {"a": {}, "b": {"data.lat_boundary": "zero"}}},
        r"trained and judged alike, but data\.lat_boundary is 'pole' of 'a' and 'zero' of 'b'\. Move it",
    ),
    "more seeds that choose than seeds": (
        {"rate_seeds": 3},
        r"rate_seeds=3 of the 2 seeds \(0, 4\) cannot choose a rate",
    ),
    "no seed that chooses": ({"rate_seeds": 0}, r"rate_seeds: Input should be greater than or equal to 1"),
    "a weight more": (
        {"set": {"data.loss_weights.wave_0": 2}, "models": {"a": {}, "b": {"data.loss_weights.wave_1": 2}}},
        r"data\.loss_weights\.wave_1 is None of 'a' and 2\.0 of 'b'",
    ),
    **{
        f"another {key}": (
            {"models": {"a": {}, "b": {key: value}}},
            rf"judged alike, but {re.escape(key)} is .* Move it from the model to `set`, or leave it out: a model's "
            r"own are the keys of `model`, data\.window, and of `training` optimizer, .*, stateful_windows\.",
        )
        for key, value in {
            "device": "cpu",
            "slurm.cpus_per_task": 2,
            "training.start_from": "runs/other",
            "training.accumulation": 2,
            "training.validate_samples": 1,
            "training.on_not_finite": "skip",
        }.items()
    },
    "a wrong value": (
        {"models": {"a": {}, "b": {"model.cell": "x"}}},
        r"model 'b' of the comparison is.*model\.cell",
    ),
    "no validation": (
        {"set": {"data.periods.validation": []}},
        r"data\.periods\.validation of .* names no dates, and rates are chosen by it",
    ),
    "no test": ({"set": {"data.periods.test": []}}, r"periods\.test of .* names no dates, and models are judged on it"),
}


@pytest.mark.parametrize("values, message", BAD.values(), ids=BAD)
def test_a_comparison_that_compares_nothing_is_refused(tmp_path, values, message):
    with pytest.raises(InputError, match=re.compile(message, re.DOTALL)):
        probes_of(comparison_of(tmp_path, **values))


def test_a_model_may_have_a_recipe_of_its_own(tmp_path):
    recipe = {
        "optimizer": "sgd", "beta2": 0.9, "final_learning_rate_share": 0.5, "weight_decay": 0.1, "clip_norm": 0,
        "ema": 0.5, "precision": "bf16", "zero_stage": 3, "input_noise": 0.1, "frozen": ["layers.0.*"],
        "micro_batch": 2, "stateful_windows": 3,
    }  # fmt: skip
    own = {"model.layers": 1, "data.window": 4} | {f"training.{key}": value for key, value in recipe.items()}
    models = {"a": {}, "b": own}
    one, other = (point.run for point in probes_of(comparison_of(tmp_path, models=models)).values())
    assert all(getattr(one.training, key) != getattr(other.training, key) for key in recipe)
    assert (one.data.window, other.data.window) == (2, 4)


def test_a_time_of_no_steps_is_refused(tmp_path):
    comparison = comparison_of(tmp_path)
    probe(comparison)
    point = probes_of(comparison)["ConvLSTM k=3"]
    short = comparison.model_copy(update={"budget_s": 0.2})
    with pytest.raises(InputError, match=r"budget_s=0\.2 s hold 1 steps of 0\.2 s, as probe_ConvLSTM-k-3 measured"):
        steps_of(short, point)
    with pytest.raises(InputError, match=r"has 10 of 11 timed steps, so it is not known how many steps 0\.8 s are"):
        steps_of(comparison.model_copy(update={"probe_steps": 11}), point)


def test_phases_of_a_rollout_have_their_shares_and_are_timed_each(tmp_path):
    """Longer steps of later phases count as far as a run has them."""
    comparison = comparison_of(tmp_path)
    tree = yaml.safe_load(comparison.config.read_text())
    tree["training"] |= {"steps": 40, "rollout": {20: 2, 30: 4}, "lead_weights": [0.5]}
    comparison.config.write_text(yaml.safe_dump(tree))
    each = comparison.warm_up_steps + comparison.probe_steps
    points = probes_of(comparison)
    assert {point.run.training.steps for point in points.values()} == {3 * each}
    assert points["FAConvLSTM"].run.training.rollout == {0: 1, each: 2, 2 * each: 4}
    for point in points.values():
        seconds = [
            second
            for of_phase in (0.1, 0.2, 0.4)
            for second in [9.0] * comparison.warm_up_steps + [of_phase] * comparison.probe_steps
        ]
        timed(comparison, point, seconds)
    assert steps_of(comparison.model_copy(update={"budget_s": 20.0}), points["FAConvLSTM"]) == 100  # of 0.2 s
    assert known_steps(comparison.model_copy(update={"budget_s": 20.0}), points) == dict.fromkeys(points, 100)
    (run, *_) = runs_of(comparison, {"FAConvLSTM": 100})
    assert run.point.run.training.rollout == {0: 1, 50: 2, 75: 4} and run.point.run.training.lead_weights == (0.5,)
    few = comparison.model_copy(update={"budget_s": 0.4})
    with pytest.raises(InputError, match=r"hold 2 steps of 0\.2 s.* a run with 3 phases of training\.rollout has at "):
        steps_of(few, points["FAConvLSTM"])
    timed(comparison, points["FAConvLSTM"], seconds[:-1])
    with pytest.raises(InputError, match=r"has 29 of 30 timed steps"):
        steps_of(comparison, points["FAConvLSTM"])
    tree["training"]["rollout"] = {0: 4}
    comparison.config.write_text(yaml.safe_dump(tree))
    assert probes_of(comparison)["FAConvLSTM"].run.training.rollout == {0: 4}, "one phase, and not of single steps"


# ---- a real one ------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal
from faconv_hpc.training.records import Recorder
DRIVER, WRITE = os.getpid(), Recorder.write

def write(self, record):
    WRITE(self, record)
    if record.step == 5 and "FAConvLSTM_rate0.03_seed0" in self._file.name:
        os.kill(DRIVER, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

Recorder.write = write
"""


def leave_gaps(store, path):
    """The same store, of which each cell misses every fourth time, and two all of them."""
    fields_TCYX, seconds, latitude_deg, longitude_deg = fields_in(store)
    fields_TCYX[np.indices(fields_TCYX.shape).sum(0) % 4 == 0] = np.nan
    fields_TCYX[:, 1, 3, 5:7] = np.nan
    axes = {"time": seconds.astype("datetime64[s]"), "latitude": latitude_deg, "longitude": longitude_deg}
    fields = {f"wave_{place}": (tuple(axes), fields_TCYX[:, place], {"units": "1"}) for place in (0, 1)}
    encoding = {"time": {"units": "hours since 2000-01-01", "calendar": "standard"}}
    xr.Dataset(fields, axes).to_netcdf(path.with_suffix(".nc"), engine="h5netcdf", encoding=encoding)
    prepare([path.with_suffix(".nc")], path)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison on a store with gaps that was killed within its second run, with all that it started, and then went
    on."""
    directory = tmp_path_factory.mktemp("compared")
    make_store(directory / "noisy", frames=28, noise=0.2)
    leave_gaps(directory / "noisy", directory / "waves")
    make_store(directory / "came", frames=28, noise=0.0)
    path = write_comparison(directory, truth=str(directory / "came"))
    comparison = load_yaml(ComparisonConfig, path)
    probe(comparison)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = command_after(KILLED, "compare", path, "--cluster", "local")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = forks.Popen(command, env=environment, cwd=os.path.dirname(__file__), **pipes)  # noqa: PTH120
    _, told = killed.communicate(timeout=SECONDS)
    assert killed.returncode == -signal.SIGKILL, told
    steps = {name: steps_of(comparison, point) for name, point in probes_of(comparison).items()}
    runs = runs_of(comparison, steps)
    files = {run.point.name: PointFiles(run.point) for run in runs}
    first, second = runs[:2]
    until = time.monotonic() + SECONDS
    while files[second.point.name].is_trained_in() and time.monotonic() < until:
        time.sleep(0.05)
    assert files[first.point.name].complete and not files[second.point.name].complete
    assert [one.step for one in read_records(second.point.run.run_dir)] == [1, 2, 3, 4, 5]
    unfinished = faconv("compare", path, "--report-only")
    assert unfinished.returncode == 1 and "FAConvLSTM is not judged: at no rate all seeds have ended yet" in re.sub(
        r"\s+", " ", unfinished.stdout
    )
    before = files[first.point.name].attempt()
    early = faconv("compare", path, "--cluster", "local", "--set", "rate_seeds=1", "--json")
    assert early.returncode == 0, early.stderr
    done = {run.point.name for run in runs if files[run.point.name].complete}
    ended = faconv("compare", path, "--cluster", "local", "--json")
    assert ended.returncode == 0, ended.stderr
    assert files[first.point.name].attempt() == before
    return path, comparison, runs, json.loads(ended.stdout), (json.loads(early.stdout), done)


def test_killed_within_a_run_it_goes_on_from_the_runs_checkpoint(compared):
    _, comparison, runs, *_ = compared
    attempts = {run.point.name: PointFiles(run.point).attempt().number for run in runs}
    assert attempts == {run.point.name: 2 if run == runs[1] else 1 for run in runs}
    log = PointFiles(runs[1].point).log(2).read_text()
    assert "steps 5 to 8" in log, log  # the checkpoint of step 4 was there
    assert [one.step for one in read_records(runs[1].point.run.run_dir)] == list(range(1, 9))
    assert all(PointFiles(point).attempt().number == 1 for point in probes_of(comparison).values())


def test_the_table_says_what_the_runs_did(compared):
    """By what they left, and by one evaluation of them all at once."""
    _, comparison, runs, said, _ = compared
    store, came = comparison.study_dir.parent / "waves", comparison.study_dir.parent / "came"
    scores = {}
    for run in runs:
        rows = [json.loads(line) for line in (run.point.run.run_dir / "validation.jsonl").read_text().splitlines()]
        ratios = [row["rmse"] / row["persistence_rmse"] for row in rows if "rmse" in row]
        assert {row["step"] for row in rows} == {run.point.run.training.steps} and len(ratios) == 4
        scores[run.model, run.rate, run.seed] = sum(ratios) / 4
    best = {model: min(RATES, key=lambda rate: sum(scores[model, rate, seed] for seed in SEEDS)) for model in MODELS}
    chosen = [run for run in runs if run.rate == best[run.model]]
    assert best_runs(comparison, runs) == chosen
    (whole,) = run_on_ranks(
        Layout(1, 1, 1),
        lambda mesh: evaluated(
            chosen[0].point.run, mesh, 2, directory=chosen[0].point.run.run_dir, against=[came], spin_up=4
        ).metrics["rmse"],
    )
    shape = whole.shape[0], whole.shape[2]
    assert shape == (2, 2) and said["forecasts"] == 11 and said["variables"] == ["wave_0", "wave_1"]
    for row in said["models"]:
        own = [run for run in chosen if run.model == row["model"]]
        assert row["learning_rate"] == best[row["model"]]
        rmse = [_rmse_by_hand(run, store, came) for run in own]
        np.testing.assert_allclose(row["rmse"], rmse, rtol=1e-4)
        ratios = [np.exp(np.mean(np.log(one / np.array(said["persistence"])))) for one in rmse]
        assert row["ratio"]["mean"] == pytest.approx(math.sqrt(ratios[0] * ratios[1]), rel=1e-4)
        assert row["ratio"]["deviation"] == pytest.approx(abs(ratios[0] - ratios[1]) / math.sqrt(2), rel=1e-3)
        seconds = [[one.seconds for one in read_records(run.point.run.run_dir)] for run in own]
        assert row["steps"] == len(seconds[0])
        assert row["trained_s"]["mean"] == pytest.approx(np.mean([sum(one) for one in seconds]))
        assert row["step_s"]["mean"] == pytest.approx(np.mean([median(one[1:]) for one in seconds]))
    np.testing.assert_allclose(whole[:, 1], said["persistence"], rtol=1e-9)
    assert [row["ratio"]["mean"] for row in said["models"]] == sorted(row["ratio"]["mean"] for row in said["models"])
    (pair,) = said["pairs"]
    first, second = (np.array(row["rmse"]) for row in said["models"])
    assert pair["ratio"] == pytest.approx(float(np.exp(np.mean(np.log(first / second)))), rel=1e-9)
    assert pair["ratio"] == pytest.approx(said["models"][0]["ratio"]["mean"] / said["models"][1]["ratio"]["mean"])
    sizes = {row["model"]: (row["parameters"], row["multiply_adds"]) for row in said["models"]}
    inputs = 2 + 2 + 5  # two fields and how fresh they are, five forcings
    dense = 4 * 8 * 9 * (inputs + 8) + 4 * 8 * 9 * (8 + 8) + 2 * (8 + inputs)  # two layers of 8 channels, the forecast
    assert sizes["ConvLSTM k=3"][1] == dense and 0 < sizes["FAConvLSTM"][1] < dense
    about = json.loads(about_network(chosen[0].point.run.run_dir)["network"])
    assert sizes["FAConvLSTM"][0] == sum(one.numel() for one in FAConvLSTMNetwork(**about).parameters())


def test_the_first_seeds_choose_the_rate_and_the_others_run_at_it_alone(compared):
    _, _, runs, _, (early, done) = compared
    first = {(run.model, run.rate): looked(run).score for run in runs if run.seed == SEEDS[0]}
    best = {model: min(RATES, key=lambda rate: first[model, rate]) for model in MODELS}
    assert done == {run.point.name for run in runs if run.seed == SEEDS[0] or run.rate == best[run.model]}
    assert {row["model"]: row["learning_rate"] for row in early["models"]} == best
    assert all(list(at["scores"]) == [str(SEEDS[0])] for at in early["rates"]) and len(early["rates"]) == 4
    assert all(len(row["rmse"]) == len(SEEDS) for row in early["models"])


def test_of_a_run_that_failed_at_the_best_rate_it_is_told_why(compared, tmp_path):
    _, comparison, runs, *_ = compared
    moved = tmp_path / "study"
    shutil.copytree(comparison.study_dir, moved)
    other = comparison.model_copy(update={"study_dir": moved, "rate_seeds": 1})
    steps = {run.model: run.point.run.training.steps for run in runs}
    known = known_runs(other, steps)
    failed = next(run for run in known if run.seed == SEEDS[1])
    told = [run.point.name for run in best_runs(other, known)]
    shutil.rmtree(failed.point.run.run_dir)
    (failed.point.directory / JUDGED_FILE).unlink()
    files = PointFiles(failed.point)
    Outcomes(moved).add(files.outcome(files.begin("local"), why="out of memory"))
    assert known_runs(other, steps) == known and failed.point.name in told
    assert [run.point.name for run in best_runs(other, known)] == [name for name in told if name != failed.point.name]
    result = result_of(other, known)
    assert result.missing == {failed.model: "1 of 2 runs at its best rate failed (out of memory): " + AGAIN}


def _rmse_by_hand(run, store, came):
    """(L, C) of a run's forecasts of the test period, which `Forecaster` makes from frames in memory."""
    fields_TCYX, seconds, latitude_deg, longitude_deg = fields_in(store)
    axes = {"time": seconds.astype("datetime64[s]"), "latitude": latitude_deg, "longitude": longitude_deg}
    names = ("wave_0", "wave_1")
    given = {name: (tuple(axes), fields_TCYX[:, place], {"units": "1"}) for place, name in enumerate(names)}
    starts = range(15, 26)  # those whose two leads are frames 16 to 27
    forecaster = Forecaster.load(run.point.run.run_dir, device="cpu")
    forecaster.window = 4  # the longest of the models
    found = forecaster.forecast(xr.Dataset(given, axes), 2, [str(axes["time"][start]) for start in starts])
    forecasts_NLCYX = np.stack([found[name].values for name in names], axis=2)
    came_NLCYX = np.stack([fields_in(came)[0][start + 1 : start + 3] for start in starts])
    weights = np.cos(np.deg2rad(latitude_deg))[:, None]
    weights_CYX = np.broadcast_to(weights, forecasts_NLCYX.shape[2:]).copy()
    weights_CYX[1, 3, 5:7] = 0  # of these two nothing is ever known
    assert (np.isnan(forecasts_NLCYX) == (weights_CYX == 0)).all()
    squares = np.nansum((forecasts_NLCYX - came_NLCYX).astype(np.float64) ** 2 * weights_CYX, axis=(-2, -1))
    return np.sqrt(squares.mean(axis=0) / weights_CYX.sum(axis=(-2, -1)))


def test_a_spin_up_is_as_long_as_the_command_says(compared, tmp_path):
    """Of a network that was trained in windows of 2, handed on to a rank."""
    _, comparison, runs, *_ = compared
    store, came = comparison.study_dir.parent / "waves", comparison.study_dir.parent / "came"
    run = next(run for run in runs if run.point.run.data.window == 2)
    given = "--truth", came, "--leads", 2, "--spin-up", 4, "--ranks", 1
    done = faconv("evaluate", run.point.run.run_dir, *given, "--output", tmp_path / "judged", "--json")
    assert done.returncode == 0, done.stderr
    skills = {(row["model"], row["variable"], row["lead"]): row["rmse"] for row in json.loads(done.stdout)["skills"]}
    said = [[skills[run.point.run.run_dir.name, name, lead] for name in ("wave_0", "wave_1")] for lead in (1, 2)]
    np.testing.assert_allclose(said, _rmse_by_hand(run, store, came), rtol=1e-4)
    asked = json.loads((tmp_path / "judged" / "scores.json").read_text())["asked"]
    assert asked["--spin-up"] == "4"


def test_what_is_done_is_not_done_again_and_more_seeds_are_added(compared, tmp_path):
    path, comparison, runs, said, _ = compared
    kept = {file: file.stat().st_mtime_ns for file in comparison.study_dir.glob("points/*/*") if file.is_file()}
    again = faconv("compare", path, "--cluster", "local", "--json")
    assert again.returncode == 0 and json.loads(again.stdout) == said
    assert kept == {file: file.stat().st_mtime_ns for file in comparison.study_dir.glob("points/*/*") if file.is_file()}
    other = faconv("compare", path, "--cluster", "local", "--set", "budget_s=1.6")
    assert other.returncode == 2
    assert re.search(r"was run with training\.steps=8, the study now says 16", messages(other)[0]), other.stderr
    assert all(judged(comparison, run) is not None for run in best_runs(comparison, runs))
    fewer = comparison.model_copy(update={"samples": 5})
    assert all(judged(fewer, run) is None for run in runs)  # of other forecasts


def test_the_report_can_be_read_alone(compared):
    path, comparison, _, said, _ = compared
    page = (comparison.study_dir / "comparison.md").read_text()
    best = said["models"][0]
    for expected in (
        f"**{best['model']}** has the smallest errors",
        "11 forecasts, from 2000-01-04 18:00:00 to 2000-01-07 06:00:00, 6 to 12 h ahead (2 leads), each from 4 frames, "
        "of wave_0, wave_1",
        "| ConvLSTM k=3 | model.cell=convlstm, data.window=4 |",
        f"| {best['model']} | {best['ratio']['mean']:.3g} ± {best['ratio']['deviation']:.2g} | ",
        f"11 x 14 cells; errors are against {comparison.truth}. Each model was tried at 2 learning rate(s) from seeds "
        "0, 4.",
        "Measured on: local",
        "What the numbers mean",
    ):
        assert expected in page, page
    for name in ("errors.png", "costs.png", "rates.png"):
        assert f"({name})" in page and (comparison.study_dir / name).stat().st_size > 10_000
    shown = faconv("compare", path, "--report-only")
    assert shown.returncode == 0 and "FAConvLSTM" in shown.stdout and "comparison.md" in shown.stdout


def test_a_model_that_is_no_number_at_one_rate_is_judged_at_another(compared, tmp_path):
    """And one that is at none is told as missing; a seed that failed counts as no number."""
    _, comparison, runs, said, _ = compared
    moved = tmp_path / "study"
    shutil.copytree(comparison.study_dir, moved)
    other = comparison.model_copy(update={"study_dir": moved})
    steps = {run.model: run.point.run.training.steps for run in runs}
    copied = runs_of(other, steps)
    chosen = next(row for row in said["models"] if row["model"] == "FAConvLSTM")["learning_rate"]
    for run in copied:
        if run.rate == chosen and run.model == "FAConvLSTM":
            _spoil(run)
    result = result_of(other, copied)
    assert result.missing == {"FAConvLSTM": "2 of 2 runs at its best rate are still to be run or judged"}
    for run in copied:
        if run.model == "FAConvLSTM":
            _spoil(run)
    result = result_of(other, copied)
    assert result.missing == {"FAConvLSTM": "at every rate the forecast of a seed is no number any more"}
    assert [one.model for one in result.models] == ["ConvLSTM k=3"] and result.pairs == ()


def _spoil(run):
    path = run.point.run.run_dir / "validation.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | ({"rmse": None} if "rmse" in row else {})) + "\n" for row in rows))


def test_a_probe_that_is_done_is_not_begun_anew_when_more_steps_are_asked_for(tmp_path):
    comparison = comparison_of(tmp_path)
    probe(comparison)
    more = comparison.model_copy(update={"probe_steps": 20})
    points = list(probes_of(more).values())
    cluster = FakeCluster()
    with pytest.raises(InputError, match=r"point probe_FAConvLSTM in .* was run with training\.steps=13.* now says 23"):
        StudyDriver(more, points, cluster, "local").run(NoStop())
    assert cluster.submitted == [] and all(len(PointFiles(point).records()) == 13 for point in points)


def test_a_model_without_a_probe_is_told_as_missing(tmp_path):
    """When another is added to the file, and the report alone is asked for."""
    comparison = comparison_of(tmp_path)
    probe(comparison)
    make_store(tmp_path / "waves", frames=28)
    more = comparison.model_copy(update={"models": MODELS | {"third": {"model.cell": "convlstm"}}})
    steps = known_steps(more, probes_of(more))
    assert steps == {"FAConvLSTM": 8, "ConvLSTM k=3": 4}
    missing = result_of(more, runs_of(more, steps)).missing
    assert missing["third"] == "its probe has not ended, so it is not known how many steps its time holds"
    assert missing["FAConvLSTM"] == "at no rate all seeds have ended yet"
    none = more.model_copy(update={"study_dir": tmp_path / "nothing"})
    with pytest.raises(InputError, match=r"has 0 of 10 timed steps"):
        known_steps(none, probes_of(none))


def test_a_truth_that_nothing_can_be_held_against_is_refused_before_training(tmp_path):
    make_store(tmp_path / "waves", frames=28)
    other = {
        "grid": ({"nlon": 12}, r"truth .*other has 12 longitudes from 0 to 330, and the store .*waves has 14 from 0"),
        "variables": ({"channels": 1}, r"forecast 'wave_1' in 1, and truth .* has wave_0\. Name a store that has"),
        "dates": ({"frames": 17}, r"has no 2 frames within 2000-01-05/ that 4 frames precede without a gap"),
    }
    for name, (options, message) in other.items():
        make_store(tmp_path / name / "other", **{"frames": 28} | options)
        comparison = comparison_of(tmp_path, truth=str(tmp_path / name / "other"))
        with pytest.raises(InputError, match=re.compile(message, re.DOTALL)):
            check_truth(comparison, probes_of(comparison)["FAConvLSTM"].run)
    gone = faconv("compare", write_comparison(tmp_path, truth=str(tmp_path / "gone")), "--cluster", "local")
    assert gone.returncode == 2 and "gone" in messages(gone)[0] and not (tmp_path / "study").exists()


def test_before_anything_is_done_there_is_nothing_to_report(tmp_path):
    nothing = faconv("compare", write_comparison(tmp_path), "--report-only")
    assert nothing.returncode == 2 and "does not exist. Leave --report-only out" in messages(nothing)[0]


def test_a_run_is_done_when_it_has_looked(tmp_path):
    """One that is killed between its last step and the look has no score yet."""
    comparison = comparison_of(tmp_path)
    probe(comparison)
    run = runs_of(comparison, dict.fromkeys(MODELS, 8))[0]
    files = PointFiles(run.point)
    attempt = files.begin("local")
    write_records(run.point.run.run_dir, [record(step) for step in range(1, 9)])
    assert not files.complete and files.outcome(attempt).status == "failed"
    (run.point.run.run_dir / "validation.jsonl").write_text('{"step": 8, "rmse": 1.0, "ratio": 0.5}\n')
    assert files.complete and files.outcome(attempt).status == "done"
    files.begin("local")
    assert len(files.records()) == 8  # goes on from what is there
