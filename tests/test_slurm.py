"""Real Slurm daemons on this machine; see tools/mini_slurm.sh."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from faconv_hpc.training.records import read_records
from runs import make_store, write_config
from test_cli import faconv

TOOL = Path(__file__).parent.parent / "tools" / "mini_slurm.sh"
MISSING = [program for program in ("munged", "slurmctld", "slurmd", "srun") if shutil.which(program) is None]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Four nodes; ``SLURM_CONF`` for those who talk to them. CI installs the daemons, and fails without."""
    if (MISSING or os.geteuid() != 0) and not os.environ.get("CI"):
        pytest.skip(
            f"needs root and Slurm's daemons (missing: {MISSING}): apt-get install slurmctld slurmd slurm-client munge"
        )
    directory = str(tmp_path_factory.mktemp("slurm") / "mini")
    environment = os.environ | {"MINI_SLURM_DIR": directory}
    subprocess.run(["bash", TOOL, "start", "4"], env=environment, check=True, timeout=120)
    yield {"SLURM_CONF": f"{directory}/slurm.conf"}
    subprocess.run(["bash", TOOL, "stop"], env=environment, check=True, timeout=60)


def test_srun_on_four_nodes_gives_the_same_losses(tmp_path, slurm):
    store = make_store(tmp_path / "waves")
    config = write_config(tmp_path / "srun", store, mesh={"lat": 2, "lon": 2})
    srun = ["srun", "--nodes=4", "--ntasks=4", "--kill-on-bad-exit=1", "--wait=60", sys.executable]
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
