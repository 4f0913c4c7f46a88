"""Real Slurm daemons on this machine; see tools/mini_slurm.sh."""

import sys

import numpy as np

from faconv_hpc.training.records import read_records
from runs import make_store, write_config
from test_cli import faconv


def test_srun_on_two_nodes_gives_the_same_losses(tmp_path, slurm):
    store = make_store(tmp_path / "waves")
    config = write_config(tmp_path / "srun", store, mesh={"lat": 2})
    srun = ["srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1", "--wait=60", sys.executable]
    started = faconv("train", config, before=srun, environment=slurm)
    assert started.returncode == 0, started.stderr
    plain = faconv("train", write_config(tmp_path / "plain", store))
    assert plain.returncode == 0, plain.stderr
    losses = [[record.loss for record in read_records(tmp_path / name / "run")] for name in ("srun", "plain")]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_bad_input_under_srun_ends_the_step_with_exit_code_2(tmp_path, slurm):
    config = write_config(tmp_path, make_store(tmp_path / "waves"), mesh={"lat": 2, "lon": 2})
    srun = ["srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1", "--wait=60", sys.executable]
    process = faconv("train", config, before=srun, environment=slurm)
    assert process.returncode == 2
    assert process.stderr.count("faconv: error") == 1 and "needs 4 ranks, 2 were started" in process.stderr
