"""What config and store.nc can tell is told before torch is imported and any rank is started."""

import json
import re
import subprocess
import sys
import time

import pytest

from faconv_hpc.errors import InputError
from faconv_hpc.training.fit import check_fits
from forecasts import draw_model
from runs import make_store, small_config, write_config
from test_cli import faconv

CASES = {
    "more tiles than rows": (
        {"mesh": {"lat": 12}},
        r"11 rows cannot be cut over 12 ranks along lat: every tile needs one at least. Use between 1 and 11",
    ),
    "a kernel without centre": ({"model": {"kernel_size": 4}}, r"kernel_size=4 has no centre. Use an odd size"),
    "no centre of the baseline's": ({"model": {"kernel_size": 4, "cell": "convlstm"}}, r"kernel_size=4 has no centre"),
    "a coarse field": ({"model": {"coarse_shape": [12, 3]}}, r"12 x 3 regions does not fit a grid of 11 x 14"),
    "no store": ({"data": {"store": "nowhere"}}, r"store nowhere does not exist. Make one with"),
    "no variable": ({"data": {"variables": ["wav_0"]}}, r"wav_0.*wave_0"),
    "no forcing": ({"data": {"forcings": ["moon"]}}, r"moon"),
    "no frames": ({"data": {"window": 16}}, r"a target fits into 13 of the 16 .* keeps 3 from training\)"),
    "no memory": (
        {"model": {"hidden_channels": 10**9}},
        r"at least [\d,]{9,} GiB .* 11 x 14 cells, this machine has [\d,]+ GiB .*hidden_channels=1000000000.*Lower one",
    ),
    "a wide halo at the pole": ({"model": {"dilations": [1, 20]}}, r"a halo of \d+ rows beyond the pole reaches past"),
}
HERE = """
import json, sys
from pathlib import Path
from faconv_hpc.config_file import load_config
from faconv_hpc.errors import InputError
from faconv_hpc.training.fit import check_fits
for path in json.loads(sys.argv[1]):
    try:
        check_fits(load_config(path))
    except InputError:
        continue
print(sorted({"torch", "deepspeed", "xarray"} & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "waves")


def config_of(directory, store, case, make=small_config):
    sections = {name: dict(section) for name, section in CASES[case][0].items()}
    return make(directory, sections.get("data", {}).pop("store", store), **sections)


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_is_told(tmp_path, store, case):
    with pytest.raises(InputError, match=CASES[case][1]):
        check_fits(config_of(tmp_path, store, case))


def test_what_can_be_is_not_refused(tmp_path, store):
    for model in ({}, {"cell": "convlstm"}, {"attention_heads": 3}, {"attention_heads": 5, "attention_reduction": 1}):
        check_fits(small_config(tmp_path, store, mesh={"lat": 11, "lon": 14}, model=model))


def test_nothing_slow_is_imported_for_it(tmp_path, store):
    paths = [str(config_of(tmp_path / str(place), store, case, write_config)) for place, case in enumerate(CASES)]
    ran = subprocess.run([sys.executable, "-c", HERE, json.dumps(paths)], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


@pytest.mark.parametrize("command", [["submit", "--dry-run"], ["verify", "--layout", "1x2"]])
@pytest.mark.parametrize("case", ["a kernel without centre", "a coarse field", "no frames"])
def test_every_command_that_would_start_ranks_judges_it(tmp_path, store, case, command):
    verb, *options = command
    ran = faconv(verb, config_of(tmp_path, store, case, write_config), *options)
    assert ran.returncode == 2 and re.search(CASES[case][1], " ".join((ran.stdout + ran.stderr).split())), ran


def test_a_store_that_a_job_before_this_one_makes_is_not_asked_for(tmp_path):
    ran = faconv("submit", write_config(tmp_path, tmp_path / "to be made"), "--dry-run")
    assert ran.returncode == 0 and "#SBATCH" in ran.stdout, ran


def test_evaluate_starts_no_ranks_without_a_store(tmp_path, store):
    model, _ = draw_model(tmp_path, store, data={"window": 3})
    ran = faconv("evaluate", model, "--data", tmp_path / "gone", "--mesh", "1x2", "--ranks", 2)
    assert ran.returncode == 2 and ran.stderr.startswith(f"faconv: error: --data {tmp_path / 'gone'} does not exist")


def test_no_rank_is_started_for_a_mesh_that_does_not_fit(tmp_path, store):
    config = write_config(tmp_path, store, mesh={"lat": 91})
    began = time.monotonic()
    command = [sys.executable, "-m", "faconv_hpc", "train", str(config), "--ranks", "91"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 2 and "11 rows cannot be cut over 91 ranks along lat" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()
    assert time.monotonic() - began < 20  # 91 ranks would take minutes
