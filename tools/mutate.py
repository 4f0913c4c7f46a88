"""Puts one fault after the other into the code that cuts the globe, saves it and starts it, and asks the tests.

Every fault of tools/faults.yaml changes one line in a copy of the tree; the tests that it names, else those named
here, then run until the first that fails. A fault that no test sees is printed as MISSED, and the exit code is 1.
First the tests run without any fault, or every fault would count as caught. What was found is kept in
tools/faults_found.json: stopped, the same command goes on. What has changed since runs again, beginning with the test
that caught the fault before.

Run: python tools/mutate.py [--only TEXT] [--jobs 2]
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import NamedTuple

import yaml

from faconv_hpc.files import write_durably

ROOT = Path(__file__).parent.parent
FOUND = ROOT / "tools" / "faults_found.json"
COPIED = ("faconv_hpc", "tests", "configs", "docs", "tools", "slurm", "pyproject.toml", "README.md")
TESTS = (  # those that end soonest first
    "grid", "halo", "losses", "domain", "parity", "smoothness", "layers", "network_matrix", "properties", "engine",
    "training",
)  # fmt: skip
TIMEOUT_S = 1800
FAILED = 1  # pytest's exit code when a test fails; others mean that it could not run them
NOT_FOUND = 4  # a test that was there before has another name now
MISSED, PASSED, CAUGHT = "MISSED", "pass", "caught by "


class Fault(NamedTuple):
    """One line as it is and as it should not be, and the tests that should see it."""

    file: str
    what: str
    right: str
    wrong: str
    tests: Sequence[str] = TESTS

    @property
    def name(self) -> str:
        """For people, and for what is kept."""
        return f"{self.file}: {self.what}"

    def put_into(self, path: Path) -> None:
        """Changes the line, in a copy of the file."""
        self.check()
        path.write_text(path.read_text().replace(self.right, self.wrong))

    def check(self) -> None:
        """Ends if the line is not there just once."""
        places = (ROOT / "faconv_hpc" / self.file).read_text().count(self.right)
        if places != 1:
            raise SystemExit(f"{self.file} has {self.right!r} {places} times: bring tools/faults.yaml up to date.")


class Findings:
    """What was found before, and for which content of the code and the tests."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._found: dict[str, dict[str, str]] = json.loads(FOUND.read_text()) if FOUND.exists() else {}

    def verdict(self, name: str, mark: str) -> str | None:
        """What is known, if nothing has changed since."""
        found = self._found.get(name, {})
        return found.get("verdict") if found.get("mark") == mark else None

    def last_test(self, name: str) -> str | None:
        """Which test caught it before, whatever has changed since; None if it was not caught, or that test is gone."""
        verdict = self._found.get(name, {}).get("verdict", "")
        test = verdict.removeprefix(CAUGHT)
        return test if test != verdict and (ROOT / test.partition("::")[0]).is_file() else None

    def keep(self, name: str, mark: str, verdict: str) -> None:
        """On disk at once."""
        with self._lock:
            self._found[name] = {"mark": mark, "verdict": verdict}
            write_durably(FOUND, json.dumps(self._found, indent=1, sort_keys=True) + "\n")


def known_faults() -> list[Fault]:
    """All of tools/faults.yaml."""
    return [Fault(**fault) for fault in yaml.safe_load((ROOT / "tools" / "faults.yaml").read_text())]


def mark_of(fault: Fault | None, names: Sequence[str]) -> str:
    """Of all that a verdict depends on: the fault, the package, the files of tests that are asked, and helpers."""
    digest = hashlib.sha256(repr((fault, names)).encode())
    shared = [file for file in sorted((ROOT / "tests").glob("*.py")) if not file.name.startswith("test_")]
    named = [ROOT / "tests" / f"test_{name}.py" for name in names]
    package = sorted(file for file in (ROOT / "faconv_hpc").rglob("*") if file.suffix in (".py", ".sh", ".cpp"))
    for file in (*shared, *named, *package):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def files_of(names: Sequence[str]) -> list[str]:
    """The tests of these names, as pytest wants them."""
    return [f"tests/test_{name}.py" for name in names]


def caught_by(fault: Fault | None, tests: Sequence[str], place: int) -> str | None:
    """The first of these tests that fails with the fault in place; None if all pass, or it has another name now.

    Args:
        tests: files or tests, as pytest wants them.
        place: of those that run side by side; what machines have once is kept apart by it.
    """
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for name in COPIED:
            source = ROOT / name
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, ignore=ignored) if source.is_dir() else shutil.copy(source, copy)
        if fault is not None:
            fault.put_into(copy / "faconv_hpc" / fault.file)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", *tests]
        environment = os.environ | {"PYTHONPATH": directory, "MINI_SLURM_NUMBER": str(13 + place)}
        process = subprocess.Popen(
            command, cwd=copy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            printed, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"no test in particular: they hung for {TIMEOUT_S} s"
        finally:
            end_all_of(directory)
    if process.returncode == 0 or (process.returncode == NOT_FOUND and "::" in tests[0]):
        return None
    lines = [line for line in printed.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if process.returncode != FAILED or not lines:
        raise SystemExit(f"pytest could not run (exit code {process.returncode}):\n{printed[-3000:]}")
    return lines[0].partition(" ")[2].split(" - ")[0]


def end_all_of(directory: str) -> None:
    """Kills what still runs in a copy of the tree: with a fault, ranks may outlive their test."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with suppress(OSError):
                if directory.encode() in (process / "cmdline").read_bytes() + (process / "environ").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)


@contextmanager
def _stoppable(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that begins nothing more once the block has raised, such as by Ctrl-C."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def asked(chosen: Sequence[Fault], findings: Findings, jobs: int) -> int:
    """Prints one line per fault; how many were missed."""
    missed, number = 0, 0
    places: SimpleQueue[int] = SimpleQueue()
    for place in range(jobs):
        places.put(place)

    def ask(fault: Fault) -> tuple[Fault, str, float]:
        began, mark = time.monotonic(), mark_of(fault, fault.tests)
        verdict = findings.verdict(fault.name, mark)
        if verdict is None:
            place = places.get()
            try:
                last = findings.last_test(fault.name)
                test = caught_by(fault, [last], place) if last else None
                test = test or caught_by(fault, files_of(fault.tests), place)
            finally:
                places.put(place)
            verdict = MISSED if test is None else f"{CAUGHT}{test}"
            findings.keep(fault.name, mark, verdict)
        return fault, verdict, time.monotonic() - began

    with _stoppable(jobs) as pool:
        for done in as_completed([pool.submit(ask, fault) for fault in chosen]):
            fault, verdict, seconds = done.result()
            number += 1
            missed += verdict == MISSED
            print(f"{number:3d}/{len(chosen)} {seconds:4.0f} s  {fault.name}: {verdict}", flush=True)
    return missed


def check_baseline(names: Sequence[str], findings: Findings, jobs: int) -> None:
    """Ends if a test file fails without any fault."""

    def passes(place: int, name: str) -> str | None:
        mark = mark_of(None, [name])
        if findings.verdict(f"without any fault: {name}", mark) == PASSED:
            return None
        failed = caught_by(None, files_of([name]), place)
        if failed is None:
            findings.keep(f"without any fault: {name}", mark, PASSED)
        return failed

    with _stoppable(jobs) as pool:
        for failed in pool.map(lambda numbered: passes(numbered[0] % jobs, numbered[1]), enumerate(names)):
            if failed:
                raise SystemExit(f"{failed} fails without any fault: mend it first.")


def main() -> None:
    """Prints one line per fault and ends with the number that was caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose file or description holds this text")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    parser.add_argument("--no-baseline", dest="baseline", action="store_false", help="do not run without a fault first")
    options = parser.parse_args()
    chosen = [fault for fault in known_faults() if options.only in fault.name]
    for fault in chosen:
        fault.check()
    findings = Findings()
    if options.baseline:
        check_baseline(list(dict.fromkeys(name for fault in chosen for name in fault.tests)), findings, options.jobs)
    missed = asked(chosen, findings, options.jobs)
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
