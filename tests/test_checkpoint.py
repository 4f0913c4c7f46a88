"""Checkpoints: whole or not at all, every byte checked, any mesh and ZeRO stage, bit for bit where nothing changed."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from contextlib import nullcontext
from hashlib import sha256
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from faconv_hpc import FAConvLSTMNetwork
from faconv_hpc.errors import InputError, NoProgressError, RunError
from faconv_hpc.training import export as export_module
from faconv_hpc.training import shards
from faconv_hpc.training.checkpoint import CheckpointWriter, balanced, shares_of
from faconv_hpc.training.contract import Contract
from faconv_hpc.training.export import SUFFIXES, export
from faconv_hpc.training.faults.signals import StopRequest
from faconv_hpc.training.faults.starts import counted_start, made_progress
from faconv_hpc.training.records import STEPS_FILE, read_records
from faconv_hpc.training.shards import OtherVersionError, checkpoints_in, whole_checkpoints
from faconv_hpc.training.trainer import Trainer, train
from ranks import Layout, run_on_ranks
from runs import make_store, small_config
from test_training import train_on

FOUR, TWO = Layout(1, 2, 2), Layout(1, 1, 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "waves")


@pytest.fixture(scope="module")
def run(tmp_path_factory, store):
    """Six steps on two ranks, checkpoints of steps 2, 4 and 6; tests copy it."""
    directory = tmp_path_factory.mktemp("whole")
    train_on(TWO, directory, store, training={"checkpoint_every": 2})
    return directory / "run"


@pytest.fixture
def copied(tmp_path, run):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def state_of(checkpoint):
    return checkpoint.parameters() | checkpoint.moments()


def assert_same_state(one, other):
    got, want = state_of(one), state_of(other)
    assert got.keys() == want.keys() and len(want) > 100
    assert all(torch.equal(got[name], want[name]) for name in want)


# On disk


def test_each_rank_writes_about_the_same_number_of_bytes_and_every_tensor_once(run):
    manifest = checkpoints_in(run)[-1].manifest()
    sizes = [file.bytes for name, file in sorted(manifest.files.items())]
    assert len(sizes) == TWO.ranks and max(sizes) < 1.5 * min(sizes)
    names = [name for file in manifest.files for name in load_file(checkpoints_in(run)[-1].path / file)]
    assert len(names) == len(set(names)) == 3 * len(manifest.parameters)  # value, two moments
    stored = manifest.parameters["layers.0.expansion_weight"]
    assert stored.shape == (32, 4) and stored.dtype == "float32" and stored.file in manifest.files
    assert manifest.mesh == "1x1x2" and manifest.step == manifest.updates == 6 and manifest.zero_stage == 1
    assert {"torch", "deepspeed", "python"} <= manifest.versions.keys()


def test_coreutils_agree_on_the_sums(run):
    for one in checkpoints_in(run):
        subprocess.run(
            ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=one.path, check=True, capture_output=True
        )


@pytest.mark.parametrize("shares", [1, 3, 8])
def test_sizes_are_dealt_evenly(shares):
    sizes = {f"p{i}": size for i, size in enumerate([100, 90, 40, 40, 30, 20, 9, 1])}
    dealt = balanced(sizes, shares)
    assert sorted(name for share in dealt for name in share) == sorted(sizes)
    totals = [sum(sizes[name] for name in share) for share in dealt]
    assert max(totals) <= max(100, 1.2 * sum(sizes.values()) / shares)


def test_as_many_ranks_write_as_the_bytes_need():
    sizes = {f"p{i}": size for i, size in enumerate([100, 90, 40, 40, 30, 20, 9, 1])}
    for least, writers in ((0, 12), (331, 1), (165, 2), (66, 5), (0.1, 12)):
        shares = shares_of(sizes, 12, least)
        assert sorted(name for share in shares for name in share) == sorted(sizes)
        written = [(rank, sum(sizes[name] for name in share)) for rank, share in enumerate(shares) if share]
        assert len(written) == min(writers, len(sizes)), least
    ranks = [rank for rank, share in enumerate(shares_of(sizes, 12, 100)) if share]
    assert ranks == [0, 4, 8]  # on different nodes, as far as there are any


def test_a_small_network_is_written_by_one_rank(tmp_path, store):
    train_on(TWO, tmp_path, store, training={"shard_mib": 16, "steps": 1, "warmup_steps": 0})
    (checkpoint,) = checkpoints_in(tmp_path / "run")
    assert len(checkpoint.manifest().files) == 1 and checkpoint.problem() is None


def test_every_flipped_bit_is_found_and_its_file_named(copied):
    checkpoint = checkpoints_in(copied)[-1]
    files = sorted(checkpoint.path.iterdir())
    rng = random.Random(0)
    turns = cycle(files)  # the small ones as often as the large
    for _ in range(1000):
        path = next(turns)
        raw = path.read_bytes()
        position = rng.randrange(len(raw))
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 1 << rng.randrange(8)]) + raw[position + 1 :])
        problem = checkpoint.problem()
        assert problem is not None and path.name in problem, (path.name, position, problem)
        path.write_bytes(raw)
    assert checkpoint.problem() is None


def swap_two_shards(path):
    one, other, *_ = sorted(path.glob("shard-*"))
    one.rename(path / "aside")
    other.rename(one)
    (path / "aside").rename(other)


def shard(path):
    return sorted(path.glob("shard-*"))[1]


DAMAGE = {
    "truncated": (lambda path: os.truncate(shard(path), 1000), r"shard-00001\S+ is damaged: it has 1000 bytes"),
    "deleted": (lambda path: shard(path).unlink(), r"shard-00001\S+ is missing"),
    "swapped": (swap_two_shards, r"shard-0000\d\S+ is damaged"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), r"manifest\.json is missing"),
    "no sums": (lambda path: (path / "SHA256SUMS").unlink(), r"SHA256SUMS is missing"),
    "foreign": (lambda path: (path / "manifest.json").write_text('{"epoch": 3}'), r"manifest\.json is damaged or not"),
    "of another step": (lambda path: path.rename(path.with_name("step-00000005")), r"is of step 6, the directory is"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.every(2)
def test_a_damaged_checkpoint_is_passed_over_by_all_ranks(copied, run, store, kind, capfd):
    damage, told = DAMAGE[kind]
    damage(checkpoints_in(copied)[-1].path)
    assert [one.step for one in whole_checkpoints(copied)] == [4, 2]
    with pytest.raises(AssertionError, match=r"--strict was given: .*" + told):
        resume_strictly(copied.parent, store)
    train_on(TWO, copied.parent, store, training={"checkpoint_every": 2})
    assert_same_state(checkpoints_in(copied)[-1], checkpoints_in(run)[-1])
    assert [record.step for record in read_records(copied)] == [1, 2, 3, 4, 5, 6]


def rewritten(checkpoint, **changes):
    """As another version would have written it: its sums are right."""
    manifest = checkpoint.path / "manifest.json"
    raw = json.dumps(json.loads(manifest.read_text()) | changes).encode()
    sums = checkpoint.path / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(sha256(manifest.read_bytes()).hexdigest(), sha256(raw).hexdigest()))
    manifest.write_bytes(raw)


def test_a_checkpoint_of_another_version_is_not_taken_for_damaged(copied, store):
    """Going on from the one before would throw away what the newest holds."""
    newest = checkpoints_in(copied)[-1]
    rewritten(newest, format="faconv_hpc checkpoint 10", more={"of": "this"})
    told = r"step-00000006 was written by faconv_hpc \S+ as 'faconv_hpc checkpoint 10', .*Install the version"
    with pytest.raises(OtherVersionError, match=told):
        next(whole_checkpoints(copied))
    with pytest.raises(AssertionError, match=told):
        train_on(TWO, copied.parent, store, training={"checkpoint_every": 2})
    assert re.search(told, newest.problem()) and newest.path.is_dir()


def test_weights_of_a_network_with_other_names_are_not_loaded(copied, store):
    """As after a change of the code: the config is the same."""
    newest = checkpoints_in(copied)[-1]
    parameters = json.loads((newest.path / "manifest.json").read_text())["parameters"]
    parameters["layers.0.older_name"] = parameters.pop("layers.0.expansion_weight")
    rewritten(newest, parameters=parameters)
    told = r"step-00000006 holds another network .*expansion_weight is missing; layers\.0\.older_name is not in"
    with pytest.raises(AssertionError, match=told):
        train_on(TWO, copied.parent, store, "keep", training={"checkpoint_every": 2, "steps": 8})


def test_a_checkpoint_of_the_format_before_is_named_as_one(copied, store):
    """It has no contract: nobody knows any more what its statistics were."""
    newest = checkpoints_in(copied)[-1]
    raw = json.loads((newest.path / "manifest.json").read_text())
    del raw["contract"]
    rewritten(newest, **raw | {"format": "faconv_hpc checkpoint 2"})
    told = r"as 'faconv_hpc checkpoint 2', this is faconv_hpc \S+, which reads 'faconv_hpc checkpoint 9'\. Install"
    with pytest.raises(AssertionError, match=told):
        train_on(TWO, copied.parent, store, training={"checkpoint_every": 2})


def test_equal_runs_have_equal_shards(tmp_path, run, store):
    train_on(TWO, tmp_path, store, training={"checkpoint_every": 2})
    for one, other in zip(checkpoints_in(run), checkpoints_in(tmp_path / "run"), strict=True):
        sums = [(each.path / "SHA256SUMS").read_text().splitlines() for each in (one, other)]
        assert (
            len(sums[0]) == 1 + TWO.ranks and sum(a == b for a, b in zip(*sums, strict=True)) == TWO.ranks
        )  # all but the manifest's


def resume_strictly(directory, store):
    config = small_config(directory, store, mesh={"lon": 2}, training={"checkpoint_every": 2})
    run_on_ranks(TWO, lambda mesh: train(config, mesh, strict=True))


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(copied, store):
    for one in checkpoints_in(copied):
        os.truncate(shard(one.path), 10)
    lines = (copied / STEPS_FILE).read_text()
    with pytest.raises(AssertionError, match=r"none of the 3 checkpoints in \S+ is whole.*shard-00001.*another run"):
        train_on(TWO, copied.parent, store, training={"checkpoint_every": 2})
    assert (copied / STEPS_FILE).read_text() == lines


def test_another_network_is_refused_with_the_list(copied):
    from faconv_hpc.training.identity import check_same_network

    newest = checkpoints_in(copied)[-1]
    network = FAConvLSTMNetwork(7, 2, 8, 2, peephole=False, attention_every=2, attention_heads=2, embedding_channels=16,
                                coarse_shape=(2, 4))  # fmt: skip
    message = (
        r"layers\.0\.peephole_weight is not in the network; .*subspace\.to_coarse\.weight has shape \(12, 16\), "
        r"the network's is \(16, 16\)"
    )
    with pytest.raises(InputError, match=message):
        check_same_network(network, newest.manifest(), newest.path)
    del network.layers[1].attention.gamma
    network.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(InputError, match=r"extra is missing"):
        check_same_network(network, newest.manifest(), newest.path)


def test_export_is_a_plain_state_dict_with_all_that_builds_the_network(run, tmp_path):
    newest = checkpoints_in(run)[-1]
    export(newest, tmp_path / "weights.safetensors")
    export(newest, tmp_path / "weights.pt")
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        about = file.metadata()
    network = FAConvLSTMNetwork(**json.loads(about["network"]))
    network.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    contract = Contract.model_validate_json(about["contract"])
    assert contract == newest.manifest().contract and about["step"] == "6"
    assert contract.names == ("wave_0", "wave_1") and contract.grid.nlat == 11
    for name, value in torch.load(tmp_path / "weights.pt").items():
        assert torch.equal(value, network.get_parameter(name))
    with pytest.raises(InputError, match=r"\.safetensors or \.pt, got \S+weights\.h5"):
        export(newest, tmp_path / "weights.h5")
    for name in ("weights.pt", "weights.safetensors"):
        with pytest.raises(InputError, match=r"cannot be written"):
            export(newest, tmp_path / "nowhere" / name)


# Continuation

PLACES = [
    (1, 1, 1, 0),
    (1, 1, 2, 1),
    (2, 1, 1, 2),
    (1, 2, 2, 3),
    (2, 1, 2, 1),
    (4, 1, 1, 3),
    (1, 3, 1, 0),
    (2, 2, 1, 2),
]
PAIRS = [  # the first column has every place, the first two lead from every one and to every one
    (0, 3), (3, 4), (3, 0), (1, 2),
    (4, 7), (7, 6), (4, 5), (5, 3),
    (6, 2), (2, 1), (0, 7), (4, 0),
    (1, 5), (5, 0), (2, 3), (5, 1),
    (7, 1),
]  # fmt: skip
GLOBAL_BATCH = 4
BEFORE, AFTER = 3, 4


def train_until(layout, config, last, error=KeyboardInterrupt):
    """Trains, and is ended by an error in the step after ``last``, which is done and lost."""

    def check(mesh):
        step = Trainer._step

        def interrupting(self, number):
            if number == last + 1:
                step(self, number)
                raise error
            return step(self, number)

        Trainer._step = interrupting
        try:
            train(config, mesh)
        except error:
            return
        finally:
            Trainer._step = step

    run_on_ranks(layout, check)


def config_at(place, directory, store):
    *layout, stage = place
    mesh = dict(zip(("replicas", "lat", "lon"), layout, strict=True))
    training = {
        "steps": BEFORE + AFTER,
        "micro_batch": GLOBAL_BATCH // layout[0],
        "zero_stage": stage,
        "checkpoint_every": BEFORE,
        "ema": 0.7,
    }
    # Of the embedding's keys the gradient is little more than rounding, which Adam makes a step of: unless it is small.
    return small_config(directory, store, mesh=mesh, training=training, model={"embedding_weight": 0.01})


def losses_of(directory):
    return [record.loss for record in read_records(directory / "run")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, store):
    """The losses of one process that nothing stops, and the mean of its weights."""
    directory = tmp_path_factory.mktemp("undisturbed")
    train_until(Layout(1, 1, 1), config_at((1, 1, 1, 0), directory, store), BEFORE + AFTER)
    return losses_of(directory), checkpoints_in(directory / "run")[-1].weights()


@pytest.fixture(scope="module")
def begun(tmp_path_factory, store):
    """The first steps at every place, once."""
    runs = {}

    def at(number):
        if number not in runs:
            runs[number] = tmp_path_factory.mktemp(f"place{number}")
            train_until(Layout(*PLACES[number][:3]), config_at(PLACES[number], runs[number], store), BEFORE)
        return runs[number] / "run"

    return at


@pytest.mark.parametrize(("saved", "loaded"), PAIRS, ids=[f"{PLACES[a]} to {PLACES[b]}" for a, b in PAIRS])
@pytest.mark.every(4)
def test_saved_at_one_mesh_and_stage_loaded_at_another(tmp_path, store, undisturbed, begun, saved, loaded):
    shutil.copytree(begun(saved), tmp_path / "run")
    assert [one.step for one in checkpoints_in(tmp_path / "run")] == [BEFORE]
    train_until(Layout(*PLACES[loaded][:3]), config_at(PLACES[loaded], tmp_path, store), BEFORE + AFTER)
    losses = losses_of(tmp_path)
    assert len(losses) == BEFORE + AFTER
    for got, want in zip(losses[BEFORE:], undisturbed[0][BEFORE:], strict=True):
        assert abs(got / want - 1) <= 1e-6
    last = checkpoints_in(tmp_path / "run")[-1]
    difference, size = (
        torch.cat([value(name).flatten() for name in undisturbed[1]]).norm()
        for value in (lambda name: last.weights()[name] - undisturbed[1][name], lambda name: undisturbed[1][name])
    )
    assert last.step == BEFORE + AFTER and difference <= 1e-5 * size


def test_three_resumes_in_a_row_are_bit_identical(tmp_path, store):
    """Twelve windows, two a step: an epoch has six steps. Interrupted in its middle, and a resumed run again."""
    layout = Layout(1, 1, 2)
    training = {"steps": 14, "micro_batch": 2, "checkpoint_every": 2}
    whole = train_on(layout, tmp_path / "whole", store, training=training)
    for interrupted in (4, 6, 10, 14):
        train_until(layout, small_config(tmp_path / "cut", store, mesh={"lon": 2}, training=training), interrupted)
        losses = losses_of(tmp_path / "cut")
        assert len(losses) == interrupted
    assert losses == whole
    assert_same_state(checkpoints_in(tmp_path / "cut" / "run")[-1], checkpoints_in(tmp_path / "whole" / "run")[-1])


# Writing


def test_writing_in_the_background_gives_the_same_checkpoints(tmp_path, run, store):
    train_on(TWO, tmp_path, store, training={"checkpoint_every": 2, "save_in_background": True})
    found = checkpoints_in(tmp_path / "run")
    assert [one.step for one in found] == [2, 4, 6]
    for one, other in zip(found, checkpoints_in(run), strict=True):
        assert_same_state(one, other)
        assert one.manifest().updates == one.step


def test_a_step_that_is_slow_to_write_is_committed_before_the_next_save(tmp_path, run, store):
    """The writer of one rank takes longer than two steps."""
    config = small_config(tmp_path, store, mesh={"lon": 2},
                          training={"checkpoint_every": 2, "save_in_background": True})  # fmt: skip

    def check(mesh):
        import time

        write = CheckpointWriter._write

        def slowly(self, *given):
            time.sleep(1.5 if mesh.rank == 1 else 0)
            return write(self, *given)

        CheckpointWriter._write = slowly
        try:
            train(config, mesh)
        finally:
            CheckpointWriter._write = write

    run_on_ranks(TWO, check)
    assert [one.step for one in whole_checkpoints(tmp_path / "run")] == [6, 4, 2]
    assert_same_state(checkpoints_in(tmp_path / "run")[-1], checkpoints_in(run)[-1])


def test_old_checkpoints_are_removed_but_for_the_last_and_every_nth(tmp_path, store):
    training = {"checkpoint_every": 1, "keep_last": 2, "keep_every": 4, "steps": 10}
    train_on(Layout(1, 1, 1), tmp_path, store, training=training)
    assert [one.step for one in checkpoints_in(tmp_path / "run")] == [4, 8, 9, 10]


def test_only_what_this_run_wrote_is_removed(tmp_path, copied, store):
    folder = copied / "checkpoints"
    other = json.loads((folder / "step-00000002" / "manifest.json").read_text())["run"]
    (copied / "run-id").write_text("0" * 32 + "\n")  # the three checkpoints are another run's from here on
    for name in ("step-00000001", "step-00000003-best", "notes"):
        (folder / name).mkdir()
    train_on(TWO, tmp_path, store, "keep", training={"checkpoint_every": 1, "keep_last": 1, "steps": 9})
    names = sorted(path.name for path in folder.iterdir())
    steps = [f"step-{step:08d}" for step in (1, 2, 4, 6, 9)]
    assert names == sorted([*steps, "step-00000003-best", "notes"]) and other != "0" * 32


def test_the_whole_ones_are_kept_beside_a_damaged_newer_one(tmp_path, copied, store):
    (checkpoints_in(copied)[-1].path / "manifest.json").write_text("not ours")
    train_on(TWO, tmp_path, store, training={"checkpoint_every": 1, "keep_last": 2, "steps": 6})
    assert [one.step for one in whole_checkpoints(copied)] == [6, 5]
    copied.joinpath("checkpoints", "step-00000009").mkdir()
    train_on(TWO, tmp_path, store, "keep", training={"checkpoint_every": 1, "keep_last": 2, "steps": 7})
    assert [one.step for one in whole_checkpoints(copied)] == [7, 6]


def test_a_damaged_one_is_not_counted_among_those_to_keep(tmp_path, copied, store):
    """Its manifest is whole, so that only reading every byte tells."""
    shard = sorted(checkpoints_in(copied)[-1].path.glob("shard-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    steps = [one.step for one in checkpoints_in(copied)]
    assert steps == [2, 4, 6]
    train_on(TWO, tmp_path, store, "keep", training={"checkpoint_every": 7, "keep_last": 2, "steps": 7})
    assert [one.step for one in whole_checkpoints(copied)] == [7, 4]


def test_a_checkpoint_that_cannot_be_read_here_is_not_taken_for_damaged(copied, store, monkeypatch):
    newest = checkpoints_in(copied)[-1]
    (directory,) = {newest.path}
    read = type(directory).read_bytes

    def unreadable(path):
        if path.name == "shard-00001.safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(type(directory), "read_bytes", unreadable)
    with pytest.raises(RunError, match=r"shard-00001\.safetensors cannot be read: Input/output error.*same command"):
        newest.parameters()
    assert "cannot be read" in newest.problem()


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(tmp_path, store):
    config = small_config(tmp_path, store, training={"checkpoint_every": 1, "keep_last": 1})

    def check(mesh):
        from faconv_hpc.training import checkpoint

        remove = checkpoint.remove

        def stale(directory, token):
            raise OSError(errno.ESTALE, "Stale file handle")

        checkpoint.remove = stale
        try:
            return train(config, mesh)
        finally:
            checkpoint.remove = remove

    assert run_on_ranks(Layout(1, 1, 1), check) == [0]
    assert len(checkpoints_in(tmp_path / "run")) == 6


def test_what_a_kill_left_half_written_is_removed_and_never_loaded(tmp_path, copied, store):
    half = copied / "checkpoints" / ".step-00000008.0123abcd.partial"
    shutil.copytree(checkpoints_in(copied)[-1].path, half)
    train_on(TWO, tmp_path, store, training={"checkpoint_every": 2})
    assert not half.exists() and [one.step for one in checkpoints_in(copied)] == [2, 4, 6]


def test_a_checkpoint_is_never_written_into_a_directory_that_is_there(tmp_path, copied, run, store):
    damaged = checkpoints_in(copied)[-1]
    (damaged.path / "manifest.json").write_text("not ours")
    (damaged.path / "precious").write_text("kept")
    train_on(TWO, tmp_path, store, training={"checkpoint_every": 2})
    assert_same_state(checkpoints_in(copied)[-1], checkpoints_in(run)[-1])
    (aside,) = (copied / "checkpoints").glob("step-00000006.replaced-*")
    assert (aside / "precious").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which needs root")
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_leaves_the_last_whole_checkpoint(tmp_path, store, background):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
    try:
        # so few that the log of steps stays within the page that it has: a save in the background may take all others
        training = {"checkpoint_every": 3, "steps": 8, "save_in_background": background}
        config = small_config(disk, store, training=training)

        def check(mesh):
            step = Trainer._step

            def filling(self, number):
                if number == 6:  # that of step 3 is in place, in the background too
                    fill(disk)
                return step(self, number)

            Trainer._step = filling
            try:
                train(config, mesh)
            except RunError as error:
                return str(error)
            finally:
                Trainer._step = step

        (told,) = run_on_ranks(Layout(1, 1, 1), check)
        assert "step 8 could not be written" in told and "No space left on device" in told
        assert f"the newest checkpoint is still {disk}/run/checkpoints/step-00000003" in told
        assert [one.step for one in whole_checkpoints(disk / "run")] == [3]
        assert [path.name for path in (disk / "run" / "checkpoints").iterdir()] == ["step-00000003"]
        (disk / "ballast").unlink()
        train_on(Layout(1, 1, 1), disk, store, training=training)
        assert [record.step for record in read_records(disk / "run")] == list(range(1, 9))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def saved_but(config, failing, number=errno.ENOSPC, layout=FOUR):
    """Trains; the last rank cannot write at some steps. Exit code or (message, exit code) of each rank; what is told.

    The other ranks and the one that commits can.
    """

    def check(mesh):
        import contextlib
        import io
        import os

        from faconv_hpc.errors import exit_code_of
        from faconv_hpc.training import checkpoint

        write = checkpoint.write_shard

        def full(directory, kind, rank, share):
            if rank == mesh.ranks - 1 and int(directory.name.split(".")[1].partition("-")[2]) in failing:
                raise OSError(number, os.strerror(number))
            return write(directory, kind, rank, share)

        checkpoint.write_shard, told = full, io.StringIO()
        try:
            with contextlib.redirect_stderr(told):
                return train(config, mesh), told.getvalue()
        except RunError as error:
            return (str(error), exit_code_of(error)), told.getvalue()
        finally:
            checkpoint.write_shard = write

    answers = run_on_ranks(layout, check)
    assert len({answer for answer, _ in answers}) == 1
    return answers[0]


def config_that_saves(directory, store, steps, **training):
    return small_config(directory, store, mesh={"lat": 2, "lon": 2}, training={"steps": steps} | training)


def test_what_one_rank_could_not_write_is_no_checkpoint(tmp_path, store):
    (told, code), _ = saved_but(config_that_saves(tmp_path, store, 4, checkpoint_every=2), {4})
    assert "step 4 could not be written" in told and "(rank 3: No space left on device)" in told and code == 1
    assert "still" in told and "step-00000002" in told
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("background", [False, True])
def test_a_save_on_the_way_that_fails_is_told_and_the_next_one_tried(tmp_path, store, background):
    config = config_that_saves(tmp_path, store, 8, checkpoint_every=1, keep_last=9, save_in_background=background)
    code, told = saved_but(config, {2, 3, 5, 6})
    assert code == 0 and [one.step for one in checkpoints_in(tmp_path / "run")] == [1, 4, 7, 8]
    assert len(re.findall(r"the checkpoint of step \d could not be written .*rank 3.* The run goes on", told)) == 4


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EIO, 75)])
def test_three_failed_saves_in_a_row_end_the_run(tmp_path, store, number, code):
    """By the code that is put back into the queue, where another node may reach the file system."""
    config = config_that_saves(tmp_path, store, 8, checkpoint_every=1)
    (told, got), _ = saved_but(config, {3, 4, 5}, number)
    assert "step 5 could not be written" in told and "still" in told and "step-00000002" in told and got == code
    assert [record.step for record in read_records(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_weights_that_are_not_finite_are_not_saved(tmp_path, store):
    """Every loss was finite; the last update was not."""
    config = config_that_saves(tmp_path, store, 4, checkpoint_every=2, zero_stage=0)

    def check(mesh):
        step = Trainer._step

        def spoiling(self, number):
            done = step(self, number)
            if number == 4:
                parameter = list(self._engine.network.parameters())[-1]
                parameter.data.view(-1)[0] = torch.inf
            return done

        Trainer._step = spoiling
        try:
            return train(config, mesh)
        except FloatingPointError as error:
            return str(error)
        finally:
            Trainer._step = step

    told = run_on_ranks(FOUR, check)
    assert len(set(told)) == 1
    assert re.search(r"parameter \S+ \(1 in all\) is not finite after step 4.*Lower training\.learning_rate", told[0])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def fill(disk):
    """Leaves a few KiB for the log of steps."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
        file.truncate(file.tell() - 16384)


# Starts


@pytest.fixture
def listening():
    with StopRequest({signal.SIGTERM: 30.0, signal.SIGUSR1: 120.0}) as stop:
        yield stop


def starts_of(config):
    path = config.run_dir / "starts.json"
    return json.loads(path.read_text())["starts"] if path.exists() else 0


def killed(config, stop, saves=False):
    with pytest.raises(ZeroDivisionError), counted_start(config, stop, here=True):
        if saves:
            made_progress(config.run_dir)
        raise ZeroDivisionError


def test_starts_that_lead_nowhere_are_counted_and_then_refused(tmp_path, listening):
    config = small_config(tmp_path, tmp_path / "store", training={"give_up_after": 3})
    killed(config, listening)
    for error in (InputError, KeyboardInterrupt):  # what the user did does not count
        with pytest.raises(error), counted_start(config, listening, here=True):
            raise error
        assert starts_of(config) == 1
    killed(config, listening)
    killed(config, listening, saves=True)  # a checkpoint is progress
    for _ in range(3):
        killed(config, listening)
    with pytest.raises(NoProgressError, match=r"3 starts in a row .* have saved no checkpoint.*remove"):
        killed(config, listening)
    with counted_start(config, listening, here=False):
        pass  # only one rank counts


def test_another_config_is_another_try(tmp_path, listening):
    config = small_config(tmp_path, tmp_path / "store", training={"give_up_after": 1})
    killed(config, listening)
    with pytest.raises(NoProgressError, match=r"if it is not in the config, remove \S+starts\.json"):
        killed(config, listening)
    mended = small_config(tmp_path, tmp_path / "store", training={"give_up_after": 1, "learning_rate": 0.1})
    killed(mended, listening)
    assert starts_of(mended) == 1


@pytest.mark.parametrize(
    ("sent", "error", "counted"),
    [
        ([signal.SIGTERM], None, 1),
        ([signal.SIGUSR1], None, 2),  # the time limit, at which nothing was saved
        ([signal.SIGUSR1, signal.SIGTERM], None, 2),
        ([signal.SIGTERM], ZeroDivisionError, 2),  # srun ends the other ranks of one that was killed like this
        ([], None, 2),
    ],
)
def test_a_start_that_is_told_to_end_says_nothing_about_the_run(tmp_path, listening, sent, error, counted):
    """As by `scontrol requeue`; the starts that count, with one before this."""
    config = small_config(tmp_path, tmp_path / "store")
    config.run_dir.mkdir()
    (config.run_dir / "starts.json").write_text('{"starts": 1}')
    with pytest.raises(error) if error else nullcontext(), counted_start(config, listening, here=True):
        for number in sent:
            os.kill(os.getpid(), number)
        time.sleep(0.05)
        if error:
            raise error
    assert starts_of(config) == counted


def test_a_run_that_saves_and_is_killed_again_and_again_is_not_given_up(tmp_path, store):
    """Although a damaged checkpoint of a later step lies there."""
    training = {"checkpoint_every": 1, "steps": 30, "give_up_after": 2}
    config = small_config(tmp_path, store, training=training)
    train_until(Layout(1, 1, 1), config, 1, ZeroDivisionError)
    (tmp_path / "run" / "checkpoints" / "step-00000099").mkdir()
    for last in (2, 3, 4, 5):
        train_until(Layout(1, 1, 1), config, last, ZeroDivisionError)
        assert next(whole_checkpoints(tmp_path / "run")).step == last


def test_records_survive_damage_and_a_run_begun_anew(tmp_path, store):
    train_on(Layout(1, 1, 1), tmp_path, store, training={"checkpoint_every": 3})
    path = tmp_path / "run" / STEPS_FILE
    path.write_bytes(path.read_bytes() + b"\xff\xfe\n")
    assert [record.step for record in read_records(tmp_path / "run")] == list(range(1, 7))
    train_on(Layout(1, 1, 1), tmp_path, store, "keep", training={"checkpoint_every": 3, "steps": 7})
    assert [record.step for record in read_records(tmp_path / "run")] == list(range(1, 8))
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train_on(Layout(1, 1, 1), tmp_path, store, training={"checkpoint_every": 3, "steps": 4})
    assert len((tmp_path / "run" / "steps-before-0.jsonl").read_text().splitlines()) == 7
    assert [record.step for record in read_records(tmp_path / "run")] == [1, 2, 3, 4]


def test_what_is_removed_halfway_is_no_checkpoint(copied, monkeypatch):
    newest = checkpoints_in(copied)[-1].path

    def killed(directory):
        next(Path(directory).glob("shard-*")).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards.shutil, "rmtree", killed)
        shards.remove(newest, "0123abcd")
    assert newest not in [one.path for one in checkpoints_in(copied)]
    shards.sweep(copied)
    assert not list(newest.parent.glob(f".{newest.name}.*"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_export_that_fails_leaves_the_one_before(copied, tmp_path, monkeypatch, suffix):
    output = tmp_path / f"model{suffix}"
    output.write_text("the one before")

    def fails(tensors, path, **options):
        Path(path).write_text("half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "save_file", fails)
    monkeypatch.setattr(export_module.torch, "save", fails)
    with pytest.raises(InputError, match=r"model\.\w+ cannot be written: .*No space left"):
        export(checkpoints_in(copied)[-1], output)
    assert [path.read_text() for path in tmp_path.glob("*model*")] == ["the one before"]


def test_export_never_writes_into_a_checkpoint(copied):
    newest = checkpoints_in(copied)[-1]
    with pytest.raises(InputError, match=r"lies in the directory of a checkpoint"):
        export(newest, newest.path / "shard-00000.safetensors")
    assert newest.problem() is None
