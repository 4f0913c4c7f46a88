"""README and docs: every command and every snippet is run, or at least parsed by what it calls; names and links exist.

Run as a program it writes the table of keys in docs/training.md anew.
"""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
import xarray as xr
import yaml

import forks
from faconv_hpc.cli.app import app
from faconv_hpc.config import RunConfig, Section
from slurms import job_environment
from sources import save

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
RUN = [page for page in PAGES if page != "docs/measurements.md"]
README_LINES, README_WIDTH = 120, 120  # a page and a half
SECONDS = 300
KEYS = "<!-- keys: made from faconv_hpc/config.py by `python tests/test_docs.py` -->\n"

ONLY_PARSED = {  # commands that begin so, and why they are not run here
    "bash tools/quickstart.sh": "installs; run by hand before a release",
    "bash tools/test.sh": "this is it",
    "bash tools/mini_slurm.sh": "starts daemons: tests/conftest.py does",
    "python tools/chaos.py": "takes minutes: tests/test_chaos.py",
    "sbatch": "needs a cluster: tests/test_slurm_jobs.py",
    "srun": "needs a cluster: tests/test_slurm.py, tests/test_slurm_data.py",
    "faconv submit configs/global_era5_025.yaml --wait": "needs a cluster",
    "faconv submit my.yaml --wait": "needs a cluster",
    "faconv study configs/": "needs a cluster: tests/test_slurm_study.py",
    "faconv data sample": "fetches 17 MB: tests/test_sample_fetch.py",
}
SMALL = {
    "run_dir": "runs/my_run",
    "mesh": {"lon": 2},
    "data": {"store": "data/era5", "window": 3, "held_out_frames": 3, "lat_boundary": "pole"},
    "model": {
        "hidden_channels": 8, "layers": 1, "attention_every": 2, "attention_heads": 2, "embedding_channels": 16,
        "coarse_shape": [2, 3], "kernels": "eager",
    },
    "training": {"steps": 4, "warmup_steps": 1, "checkpoint_every": 2},
}  # fmt: skip
STUDY = {
    "study_dir": "runs/study", "config": "my.yaml", "scaling": "strong", "points": [{"mesh": "1x1"}, {"mesh": "1x2"}],
    "warm_up_steps": 1, "repeats": 5, "steps_per_repeat": 1,
}  # fmt: skip


def blocks(page):
    """(language, text) of the fenced blocks of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands(text):
    """The commands of a bash block, without comments."""
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


def run(line, directory):
    """Runs a command as a user types it, in the user's directory."""
    words = [name for word in shlex.split(line) for name in sorted(map(str, _expanded(word, directory)))]
    if line.startswith("faconv "):
        command, start = [sys.executable, "-m", "faconv_hpc", *words[1:]], forks.run
    else:
        command, start = words, forks.run
    done = start(command, timeout=SECONDS, env=job_environment(), cwd=directory)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    if line == "cp configs/quickstart_era5.yaml my.yaml":  # and edits it
        (directory / "my.yaml").write_text(yaml.safe_dump(SMALL))


def _expanded(word, directory):
    return [path.relative_to(directory) for path in directory.glob(word)] if "*" in word else [word]


def parse(line):
    """What can be told of a command without running it: its files are there, its verb knows its options."""
    words = shlex.split(line)
    for word in words:
        if re.match(r"(tools|slurm|configs)/", word):
            assert (ROOT / word).exists(), f"{line}: there is no {word}"
    if words[0] == "sbatch":
        script, *rest = words[1:]
        verb = {"slurm/train_global.sh": "train", "slurm/scaling_study.sh": "study"}[script]
        words = ["faconv", verb, *(rest or ["configs/global_era5_025.yaml"])]
    if "faconv" in words:
        _parse_verb(words[words.index("faconv") + 1 :])
    elif words[0] == "python":
        text = (ROOT / words[1]).read_text()
        assert all(f'"{word}"' in text for word in words if word.startswith("--")), f"{line}: unknown option"


def _parse_verb(arguments):
    command, context = typer.main.get_command(app), None
    while hasattr(command, "resolve_command"):
        context = command.make_context(command.name or "faconv", [*arguments], parent=context)
        _, command, arguments = command.resolve_command(context, [*arguments])
    command.make_context(command.name, [*arguments], parent=context)


def follow(page, directory):
    """Does all that a page says, in its order."""
    for language, text in blocks(page):
        if language == "bash":
            for line in commands(text):
                if any(line.startswith(known) for known in ONLY_PARSED):
                    parse(line)
                else:
                    run(line, directory)
        elif language == "python":
            _run_snippet(page, text, directory)
        else:
            raise AssertionError(f"{page}: a block of {language} is not looked at")


def _run_snippet(page, text, directory):
    (directory / "snippet.py").write_text(text)
    ranks = "ProcessMesh.start" in text
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if ranks else []
    command = [*(start or [sys.executable]), "snippet.py"]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, env=job_environment(), timeout=SECONDS, check=False
    )
    assert done.returncode == 0, f"{page}:\n{text}\n{done.stderr}"
    if ranks:
        differences = [float(line.split()[-1]) for line in done.stdout.splitlines()]
        assert len(differences) == 2 and max(differences) < 1e-5


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A user's directory in which the README has been followed."""
    directory = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "configs", directory / "configs")
    for number in range(2):
        times = ("time", 6.0 * (np.arange(8) + 8 * number), {"units": "hours since 2001-01-01"})
        field = np.random.default_rng(number).normal(size=(8, 11, 14)).astype(np.float32)
        coordinates = {"time": times, "latitude": np.linspace(90, -90, 11), "longitude": np.arange(14) * 360 / 14}
        named = {name: (name, values, {"standard_name": name}) for name, values in list(coordinates.items())[1:]}
        fields = {"t2m": (("time", "latitude", "longitude"), 280 + field, {"units": "K"})}
        save(xr.Dataset(fields, {"time": times, **named}), directory / f"era5_{number}.nc")
    follow("README.md", directory)
    (directory / "study.yaml").write_text(yaml.safe_dump(STUDY))
    return directory


@pytest.mark.parametrize("page", RUN)
def test_all_that_a_page_says_can_be_done(page, site, tmp_path):
    if page == "README.md":
        assert (site / "runs" / "my_run" / "figures" / "forecast.png").exists()
        return
    directory = tmp_path / "site"
    shutil.copytree(site, directory)
    if page == "docs/data.md":
        shutil.rmtree(directory / "data")
    follow(page, directory)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_are_there(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert ((ROOT / page).parent / link).exists(), f"{page} leads to {link}"
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for path in re.findall(r"`((?:tools|tests|slurm|configs|docs|faconv_hpc)/[\w./*-]+)`", prose):
        assert list(ROOT.glob(path)), f"{page} names {path}"


def test_the_readme_is_a_page_and_a_half_and_names_every_room():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= README_LINES and max(map(len, lines)) <= README_WIDTH
    tree = "\n".join(lines[lines.index("## What is where") :])
    rooms = {path.parent.name for path in (ROOT / "faconv_hpc").rglob("__init__.py")} - {"faconv_hpc"}
    assert rooms == set(re.findall(r"^ +(\w+)/ ", tree, re.MULTILINE))
    for room, names in re.findall(r"^ +(\w+)/ +(.*(?:\n {20,}.*)*)", tree, re.MULTILINE):
        (directory,) = (path.parent for path in (ROOT / "faconv_hpc").rglob(f"{room}/__init__.py"))
        for name in re.findall(r"(?<![.\w])([a-z_]+)(?= \()", names):
            assert (directory / f"{name}.py").exists(), f"{room}/ has no {name}.py"


def key_table():
    """Every key of a run's config, its default and what it is."""
    rows = ["| key | default | meaning |", "|---|---|---|"]

    def add(section, prefix):
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                add(field.annotation, f"{prefix}{name}.")
                continue
            default = "(needed)" if field.is_required() else f"`{_shown(field.default)}`"
            assert field.description, f"{prefix}{name} has no description"
            rows.append(f"| `{prefix}{name}` | {default} | {field.description} |")

    add(RunConfig, "")
    return "\n".join(rows) + "\n"


def _shown(value):
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return {None: "null", True: "true", False: "false"}.get(value, value) if not isinstance(value, dict) else "{}"


def test_the_table_of_keys_is_up_to_date():
    _, _, table = (ROOT / "docs" / "training.md").read_text().partition(KEYS)
    assert table == key_table(), "run: python tests/test_docs.py"


def test_tools_can_be_loaded():
    """What they import is there, and what they call has the arguments that they give."""
    for path in sorted((ROOT / "tools").glob("*.py")):
        ast.parse(path.read_text())
        loaded = subprocess.run(
            [sys.executable, "-c", f"import runpy; runpy.run_path({str(path)!r})"], capture_output=True, text=True,
            env=job_environment(), timeout=SECONDS, check=False,
        )  # fmt: skip
        assert loaded.returncode == 0, loaded.stderr


if __name__ == "__main__":
    page = ROOT / "docs" / "training.md"
    before, marker, _ = page.read_text().partition(KEYS)
    page.write_text(before + marker + key_table())
