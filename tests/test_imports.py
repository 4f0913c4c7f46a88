"""The structure of the house: arrows point down, and some packages are known in one room only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PACKAGE = Path(__file__).parent.parent / "faconv_hpc"
ROOMS = {
    "spatial": set(),
    "model": {"spatial"},
    "data": {"spatial"},
    "bench": {"spatial", "model"},
    "prepare": {"spatial", "data"},
    "training": {"spatial", "model", "data"},
    "forecasting": {"spatial", "model", "data", "prepare", "training"},
    "evaluation": {"spatial", "model", "data", "prepare", "training", "forecasting"},
    "scaling": {"spatial", "model", "data", "training"},
    "launch": {"spatial", "data", "training", "scaling"},
    "comparison": {"spatial", "model", "bench", "data", "training", "forecasting", "evaluation", "scaling"},
}
CHOKE_POINTS = {
    "torch.distributed": ("spatial/", "training/engine.py"),
    "deepspeed": ("training/engine.py",),
    "submitit": ("launch/submit.py",),
    "h5py": ("data/", "prepare/"),
    "h5netcdf": ("prepare/", "forecasting/netcdf.py"),
    "zarr": ("prepare/", "forecasting/zarr_store.py"),
    "xarray": ("prepare/", "forecasting/", "evaluation/"),
    "triton": ("model/blocks.py", "model/fused.py"),
    "mpi4py": ("spatial/environment.py", "prepare/comm.py"),
    "sklearn": ("evaluation/",),
    "torch_harmonics": ("model/sphere.py", "prepare/shallow_water.py"),
}
ENVIRONMENT_READERS = ("spatial/environment.py", "launch/", "model/native.py")  # the last: which compiler
LINES = 400
FUNCTION_LINES = 60

FILES = sorted(PACKAGE.rglob("*.py"))


def inside(path):
    return path.relative_to(PACKAGE).as_posix()


def imports(path):
    """Absolute names of everything a file imports, wherever in the file."""
    package = ("faconv_hpc", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else [])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=inside)
def test_rooms_import_only_what_lies_below_them(path):
    room = inside(path).split("/")[0]
    for name in imports(path) if room in ROOMS else ():
        other = name.split(".")[1] if name.startswith("faconv_hpc.") else room
        assert other not in ROOMS or other == room or other in ROOMS[room], f"{room} imports {name}"
        assert other != "cli", f"{room} imports the command line"


@pytest.mark.parametrize("path", sorted((PACKAGE / "training").glob("*.py")), ids=inside)
def test_of_training_only_the_loop_knows_of_faults(path):
    knows = any(name.startswith("faconv_hpc.training.faults") for name in imports(path))
    assert knows == (path.name == "trainer.py"), "who deals with faults imports what they happen to"


@pytest.mark.parametrize("path", FILES, ids=inside)
def test_some_packages_are_known_in_one_place_only(path):
    for name in imports(path):
        for prefix, allowed in CHOKE_POINTS.items():
            if name == prefix or name.startswith(f"{prefix}."):
                assert inside(path).startswith(allowed), f"{inside(path)} imports {name}"
    if "os.environ" in path.read_text():
        assert inside(path).startswith(ENVIRONMENT_READERS), f"{inside(path)} reads the environment"


@pytest.mark.parametrize(
    ("module", "late"),
    [
        ("cli.app", {"torch", "xarray", "pandas", "h5py", "sklearn"}),
        ("training.trainer", {"xarray", "pandas", "torch._dynamo"}),
    ],
)
def test_ranks_do_not_wait_for_imports_that_they_have_no_use_for(module, late):
    code = f"import sys, faconv_hpc.{module}; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not late & set(loaded)


@pytest.mark.parametrize("path", FILES, ids=inside)
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < FUNCTION_LINES, f"{inside(path)}: {node.name}"


def test_every_fault_of_mutate_is_in_a_line_that_is_there():
    """Or what tools/mutate.py is to prove is proven of code that has gone."""
    faults = yaml.safe_load((PACKAGE.parent / "tools" / "faults.yaml").read_text())
    gone = [fault["what"] for fault in faults if (PACKAGE / fault["file"]).read_text().count(fault["right"]) != 1]
    assert len(faults) > 90 and not gone
