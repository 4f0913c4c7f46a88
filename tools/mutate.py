"""Puts one fault after the other into the code that cuts the globe, saves it and starts it, and asks the tests.

Every fault of tools/faults.yaml changes one line in a copy of the tree; the tests that it names, else those named
here, then run until the first that fails. A fault that no test sees is printed as MISSED, and the exit code is 1.

Run: python tools/mutate.py [--only TEXT]      (some 45 minutes on two cores)
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).parent.parent
COPIED = ("faconv_hpc", "tests", "configs", "tools", "slurm", "pyproject.toml")
TESTS = (  # those that end soonest first
    "grid", "halo", "losses", "domain", "parity", "smoothness", "layers", "network_matrix", "properties", "engine",
    "training",
)  # fmt: skip
TIMEOUT_S = 1800
FAILED = 1  # pytest's exit code when a test fails; others mean that it could not run them


class Fault(NamedTuple):
    """One line as it is and as it should not be, and the tests that should see it."""

    file: str
    what: str
    right: str
    wrong: str
    tests: Sequence[str] = TESTS


def known_faults() -> list[Fault]:
    """All of tools/faults.yaml."""
    return [Fault(**fault) for fault in yaml.safe_load((ROOT / "tools" / "faults.yaml").read_text())]


def caught_by(fault: Fault | None, names: Sequence[str]) -> str | None:
    """The first of these tests that fails with the fault in place; None if all pass."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for name in COPIED:
            source = ROOT / name
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, ignore=ignored) if source.is_dir() else shutil.copy(source, copy)
        if fault is not None:
            _put_in(fault, copy / "faconv_hpc" / fault.file)
        tests = [f"tests/test_{name}.py" for name in names]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", *tests]
        environment = os.environ | {"PYTHONPATH": directory}
        try:
            done = subprocess.run(
                command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return f"no test in particular: they hung for {TIMEOUT_S} s"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if done.returncode != FAILED or not lines:
        raise SystemExit(f"pytest could not run (exit code {done.returncode}):\n{done.stdout[-2000:]}{done.stderr}")
    return lines[0].partition(" ")[2].split(" - ")[0]


def _put_in(fault: Fault, path: Path) -> None:
    text = path.read_text()
    places = text.count(fault.right)
    if places != 1:
        raise SystemExit(f"{fault.file} has {fault.right!r} {places} times: bring this list up to date.")
    path.write_text(text.replace(fault.right, fault.wrong))


def main() -> None:
    """Prints one line per fault and ends with the number that was caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose file or description holds this text")
    parser.add_argument("--no-baseline", dest="baseline", action="store_false", help="do not run without a fault first")
    options = parser.parse_args()
    chosen = [fault for fault in known_faults() if options.only in f"{fault.file} {fault.what}"]
    named = list(dict.fromkeys(name for fault in chosen for name in fault.tests))
    if options.baseline and (failed := caught_by(None, named)):
        raise SystemExit(f"{failed} fails without any fault: mend it first, or every fault would count as caught.")
    missed = 0
    for fault in chosen:
        start = time.monotonic()
        test = caught_by(fault, fault.tests)
        missed += test is None
        verdict = "MISSED" if test is None else f"caught by {test}"
        print(f"{time.monotonic() - start:4.0f} s  {fault.file}: {fault.what}: {verdict}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
