"""tools/gpu_check.py, as far as it goes without a GPU: what it runs, compares and reports."""

import importlib.util
import sys
from pathlib import Path

import cloudpickle
import pytest

import forks
from faconv_hpc.training.records import read_records
from ranks import Layout, run_on_ranks
from runs import make_store, small_config, write_config

TOOL = Path(__file__).parent.parent / "tools" / "gpu_check.py"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("gpu_check") / "waves")


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)  # where its dataclass looks for its types
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "run", lambda command: forks.run(command, timeout=300))
    return module


def checked(tool, tmp_path, config, *skip):
    skipped = ["doctor", "two_ranks", "tests", "bench", *skip]
    given = ["--device", "cpu", "--config", str(config), "--steps", "3", "--output", str(tmp_path / "out")]
    code = tool.main([*given, "--skip", *skipped])
    return code, (tmp_path / "out" / "report.md").read_text()


def test_a_device_is_compared_with_the_cpu(tool, tmp_path, store):
    code, report = checked(tool, tmp_path, write_config(tmp_path, store))
    assert code == 0 and "## training beside the CPU: as it should be" in report
    assert "| cpu, tf32 |" in report and "| cpu, bf16 |" in report
    assert "## forecasts beside the CPU's: as it should be" in report and "of 2 variables" in report


def test_what_is_not_as_it_should_be_is_reported(tool, tmp_path, store, monkeypatch):
    monkeypatch.setattr(tool, "TOLERANCES", {"bf16": 1e-9})
    code, report = checked(tool, tmp_path, write_config(tmp_path, store), "forecasts")
    assert code == 1 and "## training beside the CPU: NOT AS IT SHOULD BE" in report
    code, report = checked(tool, tmp_path, tmp_path / "nowhere.yaml", "forecasts")
    assert code == 1 and "ended with 2" in report and "cannot be read" in report


def test_two_ranks_are_verified_and_trained(tool, tmp_path, store):
    cloudpickle.register_pickle_by_value(tool)
    config = small_config(tmp_path, store, mesh={"lon": 2}, training={"zero_stage": 0, "steps": 3})
    for found in run_on_ranks(Layout(1, 1, 2), lambda mesh, call: call(config, mesh), tool.of_rank):
        assert found["passed"] and 0 < found["difference"] < 1e-5
    assert len(read_records(tmp_path / "run")) == 3
