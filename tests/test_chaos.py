"""A short run of tools/chaos.py: faults at random instants of a run on two processes; nothing may be lost."""

import re
import subprocess
import sys
from pathlib import Path

from runs import make_store, write_config

TOOL = Path(__file__).parent.parent / "tools" / "chaos.py"


def test_no_fault_loses_anything(tmp_path):
    config = write_config(tmp_path, make_store(tmp_path / "waves", frames=40))
    command = [
        sys.executable,
        TOOL,
        "--config",
        config,
        "--saves",
        "5",
        "--others",
        "12",
        "--ranks",
        "2",
        "--patience",
        "5",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"kill during a save\W+5\b", done.stdout)
    assert "PASS: 17 faults, 0 checkpoints that load wrongly, 0 mixtures, 0 hangs, at most" in done.stdout
