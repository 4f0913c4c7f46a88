"""A short run of tools/chaos.py: faults at random instants of a run on two processes; nothing may be lost."""

import random
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from runs import make_store, write_config

TOOL = Path(__file__).parent.parent / "tools" / "chaos.py"


def test_no_fault_loses_anything(tmp_path):
    config = write_config(tmp_path, make_store(tmp_path / "waves", frames=40))
    command = [sys.executable, TOOL, "--config", config, "--ranks=2", "--saves=5", "--others=12", "--patience=5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"kill during a save\W+5\b", done.stdout)
    assert "PASS: 17 faults, 0 checkpoints that load wrongly, 0 mixtures, 0 hangs, at most" in done.stdout


@pytest.mark.parametrize(("codes", "counts"), [([75, -9], True), ([0, 0], False)], ids=["in time", "too late"])
def test_a_checkpoint_is_damaged_only_if_a_start_is_left_that_passes_it_over(tmp_path, codes, counts):
    kept = []
    for name in ("earlier", "newest"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-0").write_bytes(b"weights")
        kept.append(SimpleNamespace(path=tmp_path / name, problem=lambda: None))
    damage = runpy.run_path(str(TOOL))["FAULTS"]["deleted shard"]
    damage.__globals__["checkpoints_in"] = lambda run_dir: kept
    job, damaged = SimpleNamespace(send=lambda rank, number: None, wait=lambda: codes), set()
    assert damage(SimpleNamespace(random=random.Random(0)), job, tmp_path, 0, damaged) is counts
    assert damaged == ({"newest"} if counts else set())
    assert (tmp_path / "newest" / "shard-0").exists() is not counts
