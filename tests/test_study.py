"""Scaling studies: rules, statistics, and a driver that may die at any instant."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

import forks
from faconv_hpc.cli.study import make_stores
from faconv_hpc.config import MeshConfig, ModelConfig
from faconv_hpc.config_file import load_yaml
from faconv_hpc.errors import InputError
from faconv_hpc.files import read_json_lines
from faconv_hpc.scaling.driver import StudyDriver
from faconv_hpc.scaling.page import markdown, write_report
from faconv_hpc.scaling.points import Outcomes, PointFiles, locked
from faconv_hpc.scaling.report import report_of
from faconv_hpc.scaling.results import repeats_of, write_results
from faconv_hpc.scaling.stores import check_stores
from faconv_hpc.scaling.study import StudyConfig, merged, points_of
from faconv_hpc.spread import Spread
from runs import make_store, write_config
from studies import FakeCluster, fail, finish, record, write_records
from test_cli import faconv, messages

ROOT = Path(__file__).parent.parent
STUDIES = Path(__file__).with_name("studies.py")
SECONDS = 120  # a busy machine is no failure


def write_study(directory, **values):
    """A study of three points of 6 steps; the base run and its store are not made."""
    config = write_config(directory / "base", directory / "waves", training={"micro_batch": 2})
    tree = {
        "study_dir": str(directory / "study"),
        "config": str(config),
        "scaling": "strong",
        "points": [{"mesh": "1x1"}, {"mesh": "1x2"}, {"mesh": "2x2"}],
        "repeats": 5,
        "warm_up_steps": 1,
        "steps_per_repeat": 1,
        "slurm": {"tasks_per_node": 1},
    }
    path = directory / "study.yaml"
    path.write_text(yaml.safe_dump(tree | values))
    return path


def study_of(directory, **values):
    """The study and its points."""
    config = load_yaml(StudyConfig, write_study(directory, **values))
    return config, points_of(config)


class Patience:
    """A signal comes once a driver has taken so long that it never would end."""

    def __init__(self, seconds):
        self._until = time.monotonic() + seconds

    @property
    def number(self):
        return signal.SIGTERM if time.monotonic() > self._until else 0


def drive(study, points, cluster, where="slurm", **options):
    """The points' states by name, after a driver has brought them to their ends."""
    record = partial(write_results, study, points)
    made = StudyDriver(study, points, cluster, where, record=record, **{"poll_s": 0.0, "settle_s": 0.0} | options)
    return {state.point.name: state.status for state in made.run(Patience(SECONDS))}


# ---- points and rules ------------------------------------------------------------------------------------------------


def test_a_point_is_the_base_run_with_what_the_study_decides(tmp_path):
    study, points = study_of(
        tmp_path,
        warm_up_steps=3,
        steps_per_repeat=4,
        set={"model.hidden_channels": 12, "training": {"zero_stage": 2}},
        slurm={"partition": "gpu", "tasks_per_node": 2},
        points=[{"mesh": "1x2"}, {"mesh": {"lat": 2, "lon": 2}, "name": "square", "tasks_per_node": 4},
                {"mesh": "2x1x2", "set": {"training.micro_batch": 1}}],
    )  # fmt: skip
    first, square, replicas = points
    assert [point.name for point in points] == ["1x2", "square", "2x1x2"]
    assert first.run.training.steps == study.steps == 3 + 5 * 4
    assert first.run.run_dir == tmp_path / "study" / "points" / "1x2" / "run"
    assert (first.run.training.checkpoint_every, first.run.training.usr_grace_s) == (0, 0)
    assert (first.run.model.hidden_channels, first.run.training.zero_stage) == (12, 2)
    assert first.run.model.layers == 2 and first.run.training.warmup_steps == 2  # as in the base run
    assert [(point.ranks, point.nodes) for point in points] == [(2, 1), (4, 1), (4, 2)]
    assert square.run.slurm.partition == "gpu" and square.run.slurm.time_min == 60
    assert {point.run.global_batch for point in points} == {2}
    assert replicas.run.mesh.replicas == 2 and replicas.run.training.micro_batch == 1


def test_a_long_warm_up_of_the_learning_rate_is_shortened_to_fit(tmp_path):
    study, points = study_of(tmp_path, set={})
    config = write_config(tmp_path / "base", tmp_path / "waves", training={"warmup_steps": 1000, "steps": 5000})
    study = study.model_copy(update={"config": config})
    assert points_of(study)[0].run.training.warmup_steps == study.steps - 1 == 5
    assert points[0].run.training.warmup_steps == 2


def test_dotted_and_nested_overrides_mean_the_same():
    tree = {"training": {"steps": 3, "seed": 1}, "data": {"window": 2}}
    assert merged(tree, {"training.seed": 5}) == merged(tree, {"training": {"seed": 5}})
    assert merged(tree, {"training.seed": 5}) == {"training": {"steps": 3, "seed": 5}, "data": {"window": 2}}
    assert merged(tree, {"training.rollout": {4: 2}})["training"]["rollout"] == {"4": 2}
    assert tree["training"]["seed"] == 1


WEAK = {"scaling": "weak", "cells_per_rank": [6, 7], "channels": 2}
BAD_STUDIES = {
    "few repeats": ({"repeats": 4}, r"repeats: Input should be greater than or equal to 5, got 4"),
    "no warm-up": ({"warm_up_steps": 0}, r"warm_up_steps.*greater than or equal to 1"),
    "unknown key": ({"repeat": 7}, r"repeat: unknown key\. Did you mean 'repeats'"),
    "unknown key of a point": ({"points": [{"mesh": "1x1", "nodes": 2}]}, r"points\.0\.nodes: unknown key\..*mesh"),
    "no mesh": ({"points": [{"mesh": "2by2"}]}, r"a layout is LATxLON or REPLICASxLATxLON, got '2by2'"),
    "no points": ({"points": []}, r"points: .*at least 1 item"),
    "the same name twice": ({"points": [{"mesh": "1x2"}, {"mesh": "1x2"}]}, r"1x2 stands there twice\. Give a `name`"),
    "a name that is a path": ({"points": [{"mesh": "1x2", "name": "../a"}]}, r"becomes a directory.*got '\.\./a'"),
    "steps in set": ({"set": {"training.steps": 9}}, r"set: the study decides training\.steps \(warm_up_steps \+ rep"),
    "a mesh in set": ({"set": {"mesh": {"lat": 2}}}, r"decides mesh \(the point's `mesh` says it\), got mesh\.lat"),
    "run_dir of a point": (
        {"points": [{"mesh": "1x1", "set": {"run_dir": "x"}}]},
        r"set of point 1x1: the study decides run_dir",
    ),
    "a wrong value": ({"set": {"training.zero_stage": 7}}, r"point 1x1 of the study is not.*training\.zero_stage"),
    "uneven nodes": ({"points": [{"mesh": "1x3", "tasks_per_node": 2}]}, r"point 1x3.*3 ranks do not fill nodes of 2"),
    "strong, another batch": (
        {"points": [{"mesh": "1x1"}, {"mesh": "2x1x2"}]},
        r"1 x 2 x 1 = 2 at 1x1 and 2 x 2 x 1 = 4 at 2x1x2\. Give 2x1x2 a `set` with training\.micro_batch x "
        r"training\.accumulation = 1, or leave the replicas out",
    ),
    "strong, a batch that does not divide": (
        {"points": [{"mesh": "1x1"}, {"mesh": "3x1x1"}]},
        r"2 samples do not divide into 3 replicas",
    ),
    "strong, another window": (
        {"points": [{"mesh": "1x1"}, {"mesh": "1x2", "set": {"data.window": 2}}]},
        r"data\.window is 3 at 1x1 and 2 at 1x2\. Move it",
    ),
    "strong, with stores": (WEAK | {"scaling": "strong"}, r"cells_per_rank=\[6, 7\].*a strong study keeps the grid"),
    "weak, more cuts": ({"scaling": "weak"}, r"1x1 cuts the store into 1x1 tiles and 1x2 into 1x2.*rows"),
    "weak, more samples per rank": (
        {"scaling": "weak", "points": [{"mesh": "1x1"}, {"mesh": "2x1x1", "set": {"training.accumulation": 2}}]},
        r"micro_batch x accumulation is 2 at 1x1 and 4 at 2x1x1",
    ),
    "weak, odd columns": (WEAK, r"1 tiles of 7 columns \(cells_per_rank\) make 7.*pole.*Use 8 columns per rank"),
    "weak, no channels": (WEAK | {"channels": None}, r"need `channels`"),
    "weak, channels alone": (WEAK | {"cells_per_rank": None}, r"channels belong to the stores of cells_per_rank"),
    "weak, few frames": (
        WEAK | {"cells_per_rank": [6, 8], "frames": 3},
        r"frames=3 is less than one window needs, 4.*Write frames: 11",
    ),
    "weak, a store in set": (
        WEAK | {"set": {"data.store": "x"}},
        r"decides data\.store \(a store is made for each point \(cells_per_rank\)\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("values, message", BAD_STUDIES.values(), ids=BAD_STUDIES)
def test_a_study_that_compares_nothing_is_refused(tmp_path, values, message):
    with pytest.raises(InputError, match=re.compile(message, re.DOTALL)):
        study_of(tmp_path, **values)


@pytest.mark.parametrize("kind", ["strong", "weak"])
def test_the_studies_in_configs_are_valid(kind, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_yaml(StudyConfig, f"configs/study_{kind}.yaml")
    points = points_of(study)
    assert [point.nodes for point in points][:4] == [1, 2, 4, 8] and study.scaling == kind
    assert all(point.run.slurm.gpus_per_node == 4 for point in points)


# ---- stores ----------------------------------------------------------------------------------------------------------


def test_weak_stores_grow_with_the_ranks_and_are_made_once(tmp_path):
    study, points = study_of(tmp_path, scaling="weak", cells_per_rank=[5, 6], channels=2)
    said = []
    make_stores(study, points, said.append)
    check_stores(points, here=True)
    shapes = [point.run.data.store.name for point in points]
    assert shapes == ["5x6x2x11", "5x12x2x11", "10x12x2x11"] and len(said) == 3
    assert points[0].run.data.variables is None and points[0].run.data.periods.test == ()
    assert {point.run.global_batch for point in points} == {2}
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "study" / "stores").rglob("*.nc")}
    (points[1].run.data.store / "store.nc").unlink()  # as if it had been cut short
    make_stores(study, points, said.append)
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "study" / "stores").rglob("*.nc")}
    changed = {path.relative_to(tmp_path / "study" / "stores") for path in again if again[path] != files[path]}
    assert changed == {Path("5x12x2x11/store.nc")} and len(said) == 4


def test_what_no_job_could_do_is_found_before_one_is_started(tmp_path):
    _, points = study_of(tmp_path)
    with pytest.raises(InputError, match="waves does not exist"):
        check_stores(points, here=False)
    make_store(tmp_path / "waves")
    check_stores(points, here=False)
    _, points = study_of(tmp_path, points=[{"mesh": "16x1"}])
    with pytest.raises(InputError, match=r"point 16x1: 11 rows cannot be cut over 16 ranks"):
        check_stores(points, here=False)
    large = points[0].run.model_copy(update={"mesh": MeshConfig(), "model": ModelConfig(hidden_channels=10**6)})
    check_stores([replace(points[0], run=large)], here=False)  # the nodes may have the memory
    with pytest.raises(InputError, match=r"point 16x1: a rank needs at least [\d,]+ GiB"):
        check_stores([replace(points[0], run=large)], here=True)


# ---- statistics ------------------------------------------------------------------------------------------------------


def measured_study(directory, seconds, **values):
    """A study whose points are done; ``seconds`` of every step, by point."""
    study, points = study_of(directory, **values)

    def act(run, log):
        write_records(run.run_dir, [record(step, one) for step, one in enumerate(seconds[run.run_dir.parent.name], 1)])

    states = drive(study, points, FakeCluster({point.name: act for point in points}))
    assert set(states.values()) == {"done"}
    return study, points


def test_repeats_are_means_of_blocks_after_the_warm_up(tmp_path):
    random = np.random.default_rng(7)
    study, points = study_of(tmp_path, warm_up_steps=4, repeats=6, steps_per_repeat=3, points=[{"mesh": "1x2"}])
    steps = 4 + 6 * 3
    columns = {name: random.uniform(0, 0.5, steps) for name in ("exchange_share", "reduction_share", "data_share")}
    seconds, peaks = random.uniform(0.1, 2.0, steps), np.sort(random.uniform(1, 2, steps))

    def act(run, log):
        given = columns | {"peak_memory_gib": peaks}
        rows = [{name: float(values[step]) for name, values in given.items()} for step in range(steps)]
        write_records(run.run_dir, [record(step + 1, float(seconds[step]), **row) for step, row in enumerate(rows)])

    drive(study, points, FakeCluster({"1x2": act}))
    repeats = repeats_of(study, points[0])
    timed = seconds[4:].reshape(6, 3)
    weights = timed / timed.sum(axis=1, keepdims=True)
    assert [one.repeat for one in repeats] == [1, 2, 3, 4, 5, 6]
    assert [(one.first_step, one.last_step) for one in repeats] == [(5 + 3 * r, 7 + 3 * r) for r in range(6)]
    np.testing.assert_allclose([one.seconds_per_step for one in repeats], timed.mean(axis=1))
    np.testing.assert_allclose([one.samples_per_s for one in repeats], 4 * 3 / timed.sum(axis=1))
    np.testing.assert_allclose([one.peak_memory_gib for one in repeats], peaks[4:].reshape(6, 3).max(axis=1))
    for name, values in columns.items():
        expected = (values[4:].reshape(6, 3) * weights).sum(axis=1)
        np.testing.assert_allclose([getattr(one, name) for one in repeats], expected)
    communication = np.array([one.exchange_share + one.reduction_share for one in repeats])
    np.testing.assert_allclose([one.communication_share for one in repeats], communication)
    assert repeats[0].host == "node-a" and repeats[0].versions == {"torch": "2", "faconv_hpc": "0"}


def test_spread_is_what_numpy_says():
    values = np.random.default_rng(3).uniform(0, 1, 11).tolist()
    spread = Spread.of(values)
    ordered = sorted(values)
    assert (spread.least, spread.median, spread.most) == (ordered[0], ordered[5], ordered[10])
    np.testing.assert_allclose([spread.quartile_1, spread.quartile_3], np.percentile(values, [25, 75]))


def test_strong_speed_up_and_efficiency(tmp_path):
    seconds = {"1x1": [9, 8, 8, 8, 1, 16], "1x2": [9, 5, 5, 5, 5, 5], "2x2": [9, 4, 4, 4, 4, 4]}
    study, points = measured_study(tmp_path, seconds)
    report = report_of(study, points)
    assert report.base == "1x1" and report.all_done
    np.testing.assert_allclose([one.speed_up for one in report.points], [1, 8 / 5, 2])
    np.testing.assert_allclose([one.efficiency for one in report.points], [1, 0.8, 0.5])
    spread = report.points[0].seconds_per_step
    assert (spread.least, spread.quartile_1, spread.median, spread.quartile_3, spread.most) == (1, 8, 8, 8, 16)
    assert report.points[0].communication_share == pytest.approx(0.15)
    assert report.points[2].nodes == 4


def test_weak_efficiency_from_a_base_of_several_ranks_the_fastest_of_them(tmp_path):
    seconds = {"slow": [9] + 5 * [3], "1x2": [9] + 5 * [2], "2x2": [9] + 5 * [2.5]}
    points = [{"mesh": "2x1", "name": "slow"}, {"mesh": "1x2"}, {"mesh": "2x2"}]
    values = {"scaling": "weak", "cells_per_rank": [5, 6], "channels": 2, "points": points}
    study, points = measured_study(tmp_path, seconds, **values)
    report = report_of(study, points)
    assert report.base == "1x2"
    np.testing.assert_allclose([one.efficiency for one in report.points], [2 / 3, 1, 0.8])
    np.testing.assert_allclose([one.speed_up for one in report.points], [2 / 3, 1, 1.6])


def test_report_names_the_base_the_machine_and_what_is_no_scaling_figure(tmp_path):
    seconds = {"1x1": [9, 7, 8, 8, 8, 9], "1x2": [9, 5, 5, 5, 5, 5], "2x2": [9, 3, 4, 4, 4.1, 6]}
    study, points = measured_study(tmp_path, seconds)
    report = report_of(study, points)
    write_report(report, study.study_dir)
    page = (study.study_dir / "report.md").read_text()
    for expected in (
        "base: 1x1",
        "host node-a",
        "| 2x2 | 2x2 | 4 | 4 | 4 | 4 to 4.1 | 3 to 6 |",
        "50%",
        "15.0%",
        "(scaling.png)",
    ):
        assert expected in page, page
    assert json.loads((study.study_dir / "report.json").read_text())["points"][1]["speed_up"] == 1.6
    assert (study.study_dir / "scaling.png").stat().st_size > 10_000


def test_several_nodes_on_one_machine_are_no_scaling_figure(tmp_path):
    study, points = measured_study(tmp_path, {"1x1": 6 * [8], "1x2": 6 * [5], "2x2": 6 * [4]})
    assert report_of(study, points).notes == ()  # the first rank's host alone tells nothing

    def tell(**about):
        for point in points:
            told = {"torch": "2"} | {name: value(point) for name, value in about.items()}
            (point.run.run_dir / "versions.json").write_text(json.dumps(told))
        return " ".join(report_of(study, points).notes)

    assert tell(hosts=lambda point: ["a", "b", "c", "d"][: point.nodes]) == ""
    assert "Point 2x2 asked for 4 nodes, and its ranks ran on" in tell(
        hosts=lambda point: ["a", "b", "c"][: point.nodes]
    )
    assert "no scaling figure" in tell(host=lambda point: platform.node())  # where this report is made
    assert "different versions" in tell(torch=lambda point: point.name)
    assert tell(host=lambda point: f"node-{point.name}") == ""


# ---- the driver ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ("faconv: passed over step-4: damaged\nfaconv: error (rank 1): hidden_channels\n" + "srun: error\n" * 40,
         "faconv: error (rank 1): hidden_channels"),
        ("faconv: passed over step-4: damaged\nslurmstepd: error: Exceeded job memory limit", "slurmstepd: error"),
        ("faconv: failed (rank 2): ECC\nfaconv: failed: rank 0 was ended by SIGTERM", "faconv: failed (rank 2): ECC"),
        ("\n", "an empty log"),
    ],
)  # fmt: skip
def test_a_failed_point_names_the_last_words_of_its_run(tmp_path, log, why):
    _, (point, *_) = study_of(tmp_path)
    files = PointFiles(point)
    attempt = files.begin("local")
    files.log(attempt.number).write_text(log)
    outcome = files.outcome(attempt)
    assert outcome.why.startswith(why) and len(outcome.last_lines) <= 15


def test_jobs_that_finish_fail_and_are_killed_are_told_apart(tmp_path):
    study, points = study_of(tmp_path)
    cluster = FakeCluster({"1x2": fail}, looks=3)
    assert drive(study, points, cluster) == {"1x1": "done", "1x2": "failed", "2x2": "done"}
    assert cluster.submitted == ["1x1", "1x2", "2x2"] and cluster.most == 3
    lines = read_json_lines(study.study_dir / "points.jsonl")
    failed = next(line for line in lines if line["point"] == "1x2")
    assert len(lines) == 3 and (failed["status"], failed["steps"], failed["of"]) == ("failed", 2, 6)
    assert failed["why"] == "faconv: failed: rank 0 was ended by SIGKILL" and "srun: error" in failed["last_lines"][-1]
    report = report_of(study, points)
    assert [one.status for one in report.points] == ["done", "failed", "done"] and not report.all_done
    assert "1x2 failed: faconv: failed: rank 0 was ended by SIGKILL" in markdown(report, None)
    assert len(read_json_lines(study.study_dir / "results.jsonl")) == 10
    again = FakeCluster()
    assert drive(study, points, again) == {"1x1": "done", "1x2": "failed", "2x2": "done"}
    assert again.submitted == []
    assert drive(study, points, again, retry_failed=True)["1x2"] == "done"
    assert again.submitted == ["1x2"] and len(read_json_lines(study.study_dir / "points.jsonl")) == 4
    assert len(read_json_lines(study.study_dir / "results.jsonl")) == 15


def test_a_job_that_hangs_holds_up_no_other_and_fails_when_the_cluster_ends_it(tmp_path):
    study, points = study_of(tmp_path)
    cluster = FakeCluster({"1x1": lambda run, log: None})
    seen = []

    def show(states):
        seen.append({state.point.name: state.status for state in states})
        if seen[-1] == {"1x1": "running", "1x2": "done", "2x2": "done"}:
            cluster.left["1x1-1"] = 0  # its time limit
        else:
            cluster.left["1x1-1"] = 100

    assert drive(study, points, cluster, show=show) == {"1x1": "failed", "1x2": "done", "2x2": "done"}
    assert {"1x1": "running", "1x2": "done", "2x2": "done"} in seen
    assert report_of(study, points).base == "1x2"  # the fewest ranks that are done


@pytest.mark.parametrize("by", ["cluster", "study"])
def test_no_more_jobs_at_a_time_than_allowed(tmp_path, by):
    study, points = study_of(tmp_path, at_once=2 if by == "study" else None)
    cluster = FakeCluster(at_once=1 if by == "cluster" else None, looks=4)
    drive(study, points, cluster)
    assert cluster.most == (1 if by == "cluster" else 2) and len(cluster.submitted) == 3


def test_a_job_that_is_not_taken_is_a_failed_point(tmp_path):
    def refuse(run, log):
        raise InputError("sbatch refused the job: invalid partition")

    study, points = study_of(tmp_path)
    assert drive(study, points, FakeCluster({"1x2": refuse})) == {"1x1": "done", "1x2": "failed", "2x2": "done"}
    line = next(one for one in read_json_lines(study.study_dir / "points.jsonl") if one["point"] == "1x2")
    assert line["why"] == "not started: sbatch refused the job: invalid partition" and line["job"] is None


def test_records_that_arrive_late_are_waited_for(tmp_path):
    study, points = study_of(tmp_path, points=[{"mesh": "1x1"}])
    cluster, looks = FakeCluster({"1x1": lambda run, log: None}), []

    def show(states):
        looks.append(cluster.left["1x1-1"])
        if len(looks) == 6:  # the job has long ended
            finish(points[0].run, None)

    assert drive(study, points, cluster, show=show, settle_s=60) == {"1x1": "done"} and looks[5] < 0


def test_a_run_directory_of_somebody_else_is_not_removed(tmp_path):
    study, points = study_of(tmp_path)
    (points[0].run.run_dir).mkdir(parents=True)
    (points[0].run.run_dir / "mine").write_text("keep")
    with pytest.raises(InputError, match=r"1x1/run is there, but no job of this study made it.*another study_dir"):
        drive(study, points, FakeCluster())
    assert (points[0].run.run_dir / "mine").read_text() == "keep"


def test_points_of_another_config_are_not_mixed_in(tmp_path):
    drive(*study_of(tmp_path), FakeCluster())
    study, points = study_of(tmp_path, set={"model.hidden_channels": 16})
    with pytest.raises(InputError, match=r"point 1x1.*was run with model\.hidden_channels=8, the study now says 16"):
        drive(study, points, FakeCluster())
    study, points = study_of(tmp_path, slurm={"tasks_per_node": 1, "time_min": 5, "partition": "other"})
    cluster = FakeCluster()
    assert set(drive(study, points, cluster).values()) == {"done"} and cluster.submitted == []


def test_a_study_is_run_by_one_process_at_a_time(tmp_path):
    with (
        locked(tmp_path / "study"),
        pytest.raises(InputError, match=rf"already run by process {os.getpid()} on .*--report-only"),
        locked(tmp_path / "study"),
    ):
        pass
    with locked(tmp_path / "study"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"study_dir .*file cannot be written"), locked(tmp_path / "file"):
        pass


class StopAfter:
    """A signal that comes after so many looks."""

    def __init__(self, looks):
        self.looks = looks

    @property
    def number(self):
        self.looks -= 1
        return signal.SIGTERM if self.looks < 0 else 0


def test_a_local_job_that_ended_with_its_driver_is_run_again_and_not_failed(tmp_path):
    study, points = study_of(tmp_path, points=[{"mesh": "1x1"}])
    first = FakeCluster({"1x1": fail}, looks=10**9)  # runs, and dies with the driver
    stopped = StudyDriver(study, points, first, "local", poll_s=0, settle_s=0).run(StopAfter(8))
    assert stopped[0].status == "running" and not (study.study_dir / "points.jsonl").exists()
    second = FakeCluster(at_once=1)
    second.left = {"1x1-1": 2}  # for a moment it is still there
    assert drive(study, points, second, "local") == {"1x1": "done"} and second.submitted == ["1x1"]
    assert json.loads((points[0].directory / "job.json").read_text())["number"] == 2


def test_a_job_of_another_cluster_is_not_forgotten(tmp_path):
    study, points = study_of(tmp_path, points=[{"mesh": "1x1"}])
    endless = FakeCluster({"1x1": lambda run, log: None}, looks=10**9)
    StudyDriver(study, points, endless, "slurm", poll_s=0, settle_s=0).run(StopAfter(8))
    with pytest.raises(InputError, match=r"started on slurm as job 1x1-1.*Go on with --cluster slurm"):
        drive(study, points, FakeCluster(), "local")
    finish(points[0].run, None)
    assert drive(study, points, FakeCluster(), "local") == {"1x1": "done"}


# ---- a driver that dies ----------------------------------------------------------------------------------------------


def process_of(study, starts, *count):
    arguments = [str(STUDIES), "drive", str(study), str(starts), *map(str, count)]
    code = f"import runpy, sys; sys.argv = {arguments!r}; runpy.run_path({str(STUDIES)!r}, run_name='__main__')"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return forks.Popen([sys.executable, "-m", "forks", code], cwd=STUDIES.parent, env=forks.ENVIRONMENT, **pipes)


def started(starts):
    names = starts.read_text().split() if starts.exists() else []
    return {name: names.count(name) for name in names}


def check_books(study, points):
    """No repeat twice, all of the points that are done, and of none else."""
    lines = read_json_lines(study.study_dir / "results.jsonl")
    keys = [(line["point"], line["repeat"]) for line in lines]
    assert len(set(keys)) == len(keys)
    done = {point.name for point in points if PointFiles(point).complete}
    assert {name for name, _ in keys} <= done and all(keys.count((name, 1)) == 1 for name, _ in keys)
    outcomes = [(line["point"], line["attempt"]) for line in read_json_lines(study.study_dir / "points.jsonl")]
    assert len(set(outcomes)) == len(outcomes)
    return {line["point"] for line in read_json_lines(study.study_dir / "points.jsonl")}


def test_killed_at_any_durable_write_and_continued_a_study_ends_as_if_it_had_not_been(tmp_path):
    points = [{"mesh": "1x1"}, {"mesh": "1x2", "name": "failing"}, {"mesh": "2x2"}]
    path, starts = write_study(tmp_path, points=points), tmp_path / "starts"
    study, points = study_of(tmp_path, points=points)
    ended, kills = set(), 0
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 5, 4, 3, 6, 4, 3):
        before = started(starts)
        process = process_of(path, starts, count)
        out, err = process.communicate(timeout=SECONDS)
        assert process.returncode in (-signal.SIGKILL, 0), err
        kills += process.returncode != 0
        assert {name: started(starts)[name] for name in ended} == {name: before[name] for name in ended}
        ended |= check_books(study, points)
    process = process_of(path, starts)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err
    assert json.loads(out) == {"1x1": "done", "failing": "failed", "2x2": "done"} and kills >= 5
    assert check_books(study, points) == {"1x1", "failing", "2x2"}
    assert len(read_json_lines(study.study_dir / "results.jsonl")) == 10
    assert [len(PointFiles(point).records()) for point in points] == [6, 2, 6]
    states = [Outcomes(study.study_dir).of(point.name, PointFiles(point).attempt()).status for point in points]
    assert states == ["done", "failed", "done"]


def test_a_job_that_outlives_its_driver_is_found_again(tmp_path):
    path, starts = write_study(tmp_path, points=[{"mesh": "1x1"}], steps_per_repeat=20), tmp_path / "starts"
    study, points = study_of(tmp_path, points=[{"mesh": "1x1"}], steps_per_repeat=20)
    files, process = PointFiles(points[0]), process_of(path, starts)
    until = time.monotonic() + SECONDS
    while len(files.records()) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=SECONDS)
    attempt = files.attempt()
    assert 2 <= len(files.records()) < study.steps and attempt.job is not None
    process = process_of(path, starts)
    out, err = process.communicate(timeout=SECONDS)
    assert json.loads(out) == {"1x1": "done"}, err
    assert files.attempt() == attempt and started(starts) == {"1x1": 1}


def test_a_job_whose_number_was_lost_is_waited_for(tmp_path):
    """The driver is killed between giving the job away and writing down its number."""
    path, starts = write_study(tmp_path, points=[{"mesh": "1x1"}], steps_per_repeat=20), tmp_path / "starts"
    study, points = study_of(tmp_path, points=[{"mesh": "1x1"}], steps_per_repeat=20)
    files, process = PointFiles(points[0]), process_of(path, starts)
    until = time.monotonic() + SECONDS
    while len(files.records()) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=SECONDS)
    job_file = points[0].directory / "job.json"
    job_file.write_text(json.dumps(json.loads(job_file.read_text()) | {"job": None}))
    process = process_of(path, starts)
    out, err = process.communicate(timeout=SECONDS)
    assert json.loads(out) == {"1x1": "done"}, err
    assert started(starts) == {"1x1": 1} and len(write_results(study, points)) == 5


# ---- slurm/scaling_study.sh ------------------------------------------------------------------------------------------

FAKE_FACONV = """#!/usr/bin/env bash
echo "$@" > "$STUB/arguments"
trap 'echo stopped >> "$STUB/arguments"; exit 75' TERM
[ "$CODE" = wait ] || exit "$CODE"
while true; do sleep 0.05; done
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$STUB/calls"
if [ "$(grep -c "$1" "$STUB/calls")" -le "$SILENT" ]; then exit 1; fi
if [ "$1" = show ]; then echo "JobId=7 JobState=$STATE"; else echo "$@" >> "$STUB/requeued"; fi
"""
FAKE_SLEEP = """#!/usr/bin/env bash
[ "$1" -lt 60 ] && exec /bin/sleep 0.05
exec /bin/sleep "$1"
"""


def run_script(directory, code, *, state="RUNNING", inside=True, silent=0):
    """slurm/scaling_study.sh with stubs for what it calls; its exit code and what was requeued.

    ``silent``: how often Slurm does not answer first.
    """
    for name, text in (("faconv", FAKE_FACONV), ("scontrol", FAKE_SCONTROL), ("sleep", FAKE_SLEEP)):
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    variables = {"PATH": f"{directory}:{os.environ['PATH']}", "STUB": str(directory), "CODE": code, "STATE": state}
    variables["SILENT"] = str(silent)
    if inside:
        variables |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_CONF": "/etc/slurm.conf"}
    command = ["bash", str(ROOT / "slurm" / "scaling_study.sh"), "study.yaml", "--retry-failed"]
    process = subprocess.Popen(command, cwd=directory, env=variables, start_new_session=True)
    if code == "wait":
        until = time.monotonic() + SECONDS
        while not (directory / "arguments").exists() and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.2)  # until the stub listens
        process.send_signal(signal.SIGUSR1)
    requeued = directory / "requeued"
    until = time.monotonic() + SECONDS
    while process.poll() is None and not requeued.exists() and time.monotonic() < until:
        time.sleep(0.02)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # as Slurm does once the job is requeued
    return process.wait(), requeued.read_text() if requeued.exists() else ""


@pytest.mark.parametrize("code", ["0", "1", "2"])
def test_the_script_passes_exit_codes_on_and_requeues_none_of_them(tmp_path, code):
    assert run_script(tmp_path, code) == (int(code), "")
    assert (tmp_path / "arguments").read_text() == "study --cluster slurm study.yaml --retry-failed\n"


@pytest.mark.parametrize("silent", [0, 2])
def test_the_script_requeues_itself_before_its_time_limit(tmp_path, silent):
    code, requeued = run_script(tmp_path, "wait", silent=silent)
    assert requeued == "requeue 7\n" and code == -signal.SIGKILL
    assert (tmp_path / "arguments").read_text().endswith("stopped\n")


def test_the_script_stays_ended_after_scancel_and_on_a_login_node(tmp_path):
    for name, options in (("cancelled", {"state": "CANCELLED"}), ("login", {"inside": False})):
        directory = tmp_path / name
        directory.mkdir()
        assert run_script(directory, "wait", **options) == (75, "")


def test_the_script_says_when_slurm_does_not_take_it_back(tmp_path, capfd):
    assert run_script(tmp_path, "wait", silent=100) == (75, "")
    assert "Slurm does not take this job back: start the same command again" in capfd.readouterr().err


# ---- the command line ------------------------------------------------------------------------------------------------


def test_a_real_study_of_one_and_two_ranks_stopped_and_continued(tmp_path):
    """`faconv study` on this machine: training itself, not a stand-in."""
    make_store(tmp_path / "waves")
    study = write_study(tmp_path, points=[{"mesh": "1x1"}, {"mesh": "1x2"}], steps_per_repeat=12)
    config, points = study_of(tmp_path, points=[{"mesh": "1x1"}, {"mesh": "1x2"}], steps_per_repeat=12)
    command = [sys.executable, "-m", "faconv_hpc", "study", str(study), "--cluster", "local"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = forks.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    until = time.monotonic() + SECONDS
    while not (points[1].directory / "attempt-1.log").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # the first point is done, the second starts
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 75 and "the same command goes on from there" in err, err
    assert "point 1x1: done" in err
    ended = faconv("study", study, "--cluster", "local", "--json")
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert [(one["point"], one["status"], one["repeats"]) for one in report["points"]] == [
        ("1x1", "done", 5),
        ("1x2", "done", 5),
    ]
    assert report["base"] == "1x1" and "share its cores" in report["notes"][0]
    assert report["points"][1]["communication_share"] > 0 and report["points"][1]["nodes"] == 1
    keys = [(line["point"], line["repeat"]) for line in read_json_lines(config.study_dir / "results.jsonl")]
    assert keys == [(name, repeat) for name in ("1x1", "1x2") for repeat in range(1, 6)]
    assert (config.study_dir / "scaling.png").stat().st_size > 10_000
    assert PointFiles(points[0]).attempt().number == 1 and PointFiles(points[1]).attempt().number == 2


def test_the_command_reports_what_is_there_and_says_what_is_wrong(tmp_path):
    study, points = study_of(tmp_path)
    nothing = faconv("study", tmp_path / "study.yaml", "--report-only")
    assert nothing.returncode == 2 and "does not exist. Leave --report-only out" in messages(nothing)[0]
    drive(study, points, FakeCluster({"1x2": fail}))
    table = faconv("study", tmp_path / "study.yaml", "--report-only")
    assert table.returncode == 1, table.stderr
    for expected in ("strong scaling", "1x2 failed: faconv: failed: rank 0", "base: 1x1", "report.md"):
        assert expected in table.stdout
    wrong = faconv("study", tmp_path / "study.yaml", "--set", "repeats=3")
    assert wrong.returncode == 2 and "greater than or equal to 5" in wrong.stderr
    missing = faconv("study", tmp_path / "study.yaml", "--cluster", "local")
    assert missing.returncode == 2 and "waves does not exist" in messages(missing)[0]
