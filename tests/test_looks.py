"""The best checkpoint and the early end: by looks at the validation period, the same on every mesh and after a kill."""

import io
import json
import math
import shutil
from contextlib import redirect_stderr
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from faconv_hpc import load_network
from faconv_hpc.cli.app import app
from faconv_hpc.errors import InputError
from faconv_hpc.training import shards
from faconv_hpc.training.looks import Looks, score
from faconv_hpc.training.records import read_records
from faconv_hpc.training.shards import BEST, FOLDER, best_of, checkpoints_in, keep_as_best
from faconv_hpc.training.skill import Skill
from faconv_hpc.training.trainer import train
from faconv_hpc.training.validation import Validation
from ranks import Layout, run_on_ranks
from runs import evaluated, make_store, small_config

ONE, TWO = Layout(1, 1, 1), Layout(1, 1, 2)
PERIODS = {"validation": "2000-01-02T18/2000-01-03T18", "test": "2000-01-04/"}
SCORES = {2: 0.9, 4: 0.7, 6: 0.8, 8: 0.75, 10: 0.6}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "waves")


def config_of(directory, store, layout=TWO, **training):
    given = {"steps": 10, "validate_every": 2, "checkpoint_every": 4, "keep_last": 1}
    mesh = dict(zip(("replicas", "lat", "lon"), layout, strict=True))
    return small_config(directory, store, mesh=mesh, data={"periods": PERIODS}, training=given | training)


def trained(config, layout=TWO, scores=SCORES, until=None, strict=False):
    """Looks find what ``scores`` says; after that of step ``until`` the run is killed. Its exit codes."""
    return {code for code, _ in trained_and_told(config, layout, scores, until, strict)}


def trained_and_told(config, layout=TWO, scores=SCORES, until=None, strict=False):
    """The same, with what each rank said."""

    def run(mesh):
        look, told = Validation.look, io.StringIO()

        def scored(self, may_go_on):
            step = self._workspace.domain.mesh.activity.step
            if until is not None and step > until:
                raise KeyboardInterrupt
            found = look(self, may_go_on)
            return replace(found, skills=(Skill("wave_0", 1, "", scores[step], 1.0, 1.0),))

        Validation.look = scored
        try:
            with redirect_stderr(told):
                return train(config, mesh, strict=strict), told.getvalue()
        except KeyboardInterrupt:
            return -1, told.getvalue()
        finally:
            Validation.look = look

    return run_on_ranks(layout, run)


def best_step(config):
    best = best_of(config.run_dir)
    return None if best is None else best.manifest().step


def content(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def test_the_best_stays_and_is_what_was_saved(tmp_path, store):
    config = config_of(tmp_path, store, steps=8)
    assert trained(config) == {0}
    assert best_step(config) == 4 and best_of(config.run_dir).problem() is None
    assert [one.step for one in checkpoints_in(config.run_dir)] == [8]  # keep_last
    other = config_of(tmp_path / "other", store, steps=8, keep_best=False, keep_last=9)
    assert trained(other) == {0} and best_of(other.run_dir) is None
    want = checkpoints_in(other.run_dir)[0]
    assert want.step == 4
    kept, saved = best_of(config.run_dir).parameters(), want.parameters()
    assert kept and all(torch.equal(value, saved[name]) for name, value in kept.items())
    for one in (config.run_dir / FOLDER / BEST, config.run_dir / FOLDER / "best-step-00000004"):
        assert load_network(one).step == 4
    assert load_network(config.run_dir).step == 8


def test_a_look_between_two_checkpoints_saves_if_it_is_the_best(tmp_path, store):
    config = config_of(tmp_path, store)
    assert trained(config) == {0}
    assert best_step(config) == 10
    scores = SCORES | {6: 0.1}
    config = config_of(tmp_path / "six", store)
    assert trained(config, scores=scores) == {0}
    assert best_step(config) == 6
    assert [one.step for one in checkpoints_in(config.run_dir)] == [10]
    assert not list((config.run_dir / FOLDER).glob(".*"))


@pytest.mark.parametrize("until", [2, 4, 6])
@pytest.mark.every(2)
def test_killed_after_a_look_the_best_is_that_of_a_whole_run(tmp_path, store, until):
    scores = SCORES | {10: 0.95}
    whole = config_of(tmp_path / "whole", store)
    assert trained(whole, scores=scores) == {0} and best_step(whole) == 4
    config = config_of(tmp_path / "cut", store)
    assert trained(config, scores=scores, until=until) == {-1}
    assert trained(config, scores=scores) == {0}
    assert best_step(config) == 4
    best, of_whole = (content(one.run_dir / FOLDER / BEST) for one in (config, whole))
    assert len(best) == 2 and best == of_whole
    losses = [[record.loss for record in read_records(one.run_dir)] for one in (whole, config)]
    assert losses[0] == losses[1]


def test_a_run_goes_on_from_its_best_where_nothing_else_is_left(tmp_path, store):
    config = config_of(tmp_path, store)
    assert trained(config, scores=SCORES | {10: 0.95}) == {0}
    losses = [record.loss for record in read_records(config.run_dir)]
    for one in checkpoints_in(config.run_dir):
        shutil.rmtree(one.path)
    (code, told), _ = trained_and_told(config, scores=SCORES | {10: 0.95})
    assert code == 0 and ": steps 5 to 10 on a mesh" in told
    assert [record.loss for record in read_records(config.run_dir)] == losses and best_step(config) == 4
    newest = checkpoints_in(config.run_dir)[-1].path / "manifest.json"
    newest.write_text(newest.read_text()[:-9])
    with pytest.raises(AssertionError, match=r"InputError.*a checkpoint is damaged, and --strict"):
        trained(config, strict=True)


@pytest.mark.parametrize("layout", [ONE, Layout(2, 1, 1)], ids=str)
def test_a_run_that_gets_no_better_ends_and_stays_ended(tmp_path, store, layout):
    config = config_of(tmp_path, store, layout, stop_after=2, micro_batch=2 // layout.replicas)
    for _ in range(5):  # the same command says the same, and is no start that leads nowhere
        answers = trained_and_told(config, layout)
        assert {code for code, _ in answers} == {0}
        assert "at step 8 of 10, as it gets no better (training.stop_after)" in answers[0][1]
        assert [record.step for record in read_records(config.run_dir)] == list(range(1, 9))
        assert best_step(config) == 4 and checkpoints_in(config.run_dir)[-1].step == 8
    patient = config.model_copy(update={"training": config.training.model_copy(update={"stop_after": 3})})
    assert trained(patient, layout) == {0}
    assert checkpoints_in(config.run_dir)[-1].step == 10 and best_step(config) == 10


def test_evaluation_takes_the_best_by_its_directory(tmp_path, store):
    config = config_of(tmp_path, store, ONE)
    assert trained(config, ONE, SCORES | {10: 0.95}) == {0}
    where = config.run_dir / FOLDER / BEST
    (found,) = run_on_ranks(ONE, lambda mesh: evaluated(config, mesh, directory=where))
    assert found.entries[0].about["step"] == "4"
    told = CliRunner().invoke(app, ["checkpoint", "list", str(config.run_dir), "--json"])
    assert [(row["step"], row["problem"]) for row in json.loads(told.output)] == [(4, None), (10, None)]
    assert CliRunner().invoke(app, ["checkpoint", "list", str(config.run_dir)]).output.count("the best") == 1
    assert CliRunner().invoke(app, ["checkpoint", "verify", str(where)]).exit_code == 0


def test_a_best_that_cannot_be_kept_is_told_and_the_run_goes_on(tmp_path, store):
    config = config_of(tmp_path, store, ONE)
    blocked = config.run_dir / FOLDER / BEST
    (blocked / "by a directory").mkdir(parents=True)
    ((code, told),) = trained_and_told(config, ONE)
    assert code == 0 and "step 10 is the best, but " in told
    assert [record.step for record in read_records(config.run_dir)] == list(range(1, 11))
    assert [one.step for one in checkpoints_in(config.run_dir)] == [10]


@pytest.mark.parametrize("links", [True, False])
def test_the_link_is_what_it_was_or_what_it_shall_be(tmp_path, store, monkeypatch, links):
    """At every call to the file system at which it may be killed."""
    config = config_of(tmp_path, store, ONE, keep_last=9)
    trained(config, ONE, dict.fromkeys(SCORES, 1.0))
    if not links:
        monkeypatch.setattr("pathlib.Path.hardlink_to", lambda *args: (_ for _ in ()).throw(PermissionError()))
    calls = ["mkdir", "rename", "symlink_to", "replace", "iterdir"]
    for number, name in enumerate(calls):
        keep_as_best(config.run_dir, 4, f"{number:07d}a")
        with monkeypatch.context() as patched:

            def killed(*args, **kwargs):
                raise KeyboardInterrupt

            patched.setattr(f"pathlib.Path.{name}", killed)
            with pytest.raises(KeyboardInterrupt):
                keep_as_best(config.run_dir, 8, f"{number:07d}b")
        assert best_step(config) == (8 if False else best_step(config)) and best_of(config.run_dir).problem() is None
        shards.remove_unfinished(config.run_dir)
        keep_as_best(config.run_dir, 8, f"{number:07d}c")
        assert best_step(config) == 8
        found = sorted(path.name for path in (config.run_dir / FOLDER).iterdir() if path.name.startswith(("best", ".")))
        assert found == ["best", "best-step-00000008"]


def test_scores_are_means_of_what_is_known():
    def row(rmse, ratio, step=2):
        return {"step": step, "rmse": rmse, "ratio": ratio}

    assert score([row(1, 0.5), row(1, 0.7), row(1, None)]) == pytest.approx(0.6)
    assert score([row(1, 0.5), row(None, None)]) == math.inf == score([row(1, None)])
    looks = Looks.of([row(1, 0.5), row(1, 0.9), row(1, 0.8, 4), row(1, 0.6, 6), row(None, None, 8)])
    assert looks.scores == {2: 0.7, 4: 0.8, 6: 0.6, 8: math.inf}
    assert [looks.verdict(step, 1).best for step in (2, 4, 6, 8)] == [True, False, True, False]
    assert [looks.verdict(step, 1).stop for step in (2, 4, 6, 8)] == [False, True, False, True]
    assert not any(looks.verdict(step, 2).stop for step in (2, 4, 6, 8))
    assert not looks.verdict(8, 0).stop
    assert not Looks({2: 0.5, 4: 0.5}).verdict(4, 1).best  # as good is no better


def test_looks_are_needed_to_stop(tmp_path, store):
    with pytest.raises(InputError, match=r"stop_after=2 counts looks at the validation period, and there are none"):
        small_config(tmp_path, store, training={"stop_after": 2})
