"""README and docs: every command and every snippet is run, or at least parsed by what it calls; names and links exist.

A page is followed in its order, in a user's directory. Nothing is left out in silence: a fence of another kind than
bash and python, a command that neither runs nor can be parsed, an option, key or file that is not there fail.

Run as a program it writes the table of keys in docs/training.md anew.
"""

import ast
import re
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import typer
import xarray as xr
import yaml

import forks
from faconv_hpc.cli.app import app
from faconv_hpc.comparison.plan import ComparisonConfig
from faconv_hpc.config import RunConfig, Section
from faconv_hpc.config_file import load_config, load_yaml, validated
from faconv_hpc.scaling.study import StudyConfig, merged
from slurms import job_environment
from sources import save

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
RUN = [page for page in PAGES if page != "docs/measurements.md"]
README_LINES, README_WIDTH = 120, 120  # a page and a half
SECONDS = 300
TREE = "configs/  slurm/"  # begins the one fence without a language: what is where
KEYS = "<!-- keys: made from faconv_hpc/config.py by `python tests/test_docs.py` -->\n"

ONLY_PARSED = {  # commands that begin so, and why they are not run here
    "bash tools/quickstart.sh": "installs: tests/test_quickstart.py",
    "bash tools/test.sh": "this is it",
    "bash tools/mini_slurm.sh": "starts daemons: tests/conftest.py does",
    "python tools/chaos.py": "takes minutes: tests/test_chaos.py",
    "python tools/gpu_check.py": "needs a GPU: tests/test_gpu_check.py",
    "sbatch": "needs a cluster: tests/test_slurm_jobs.py",
    "srun": "needs a cluster: tests/test_slurm.py, tests/test_slurm_data.py",
    "faconv submit configs/global_era5_025.yaml --wait": "needs a cluster",
    "faconv submit my.yaml --wait": "needs a cluster",
    "faconv study configs/": "needs a cluster: tests/test_slurm_study.py",
    "faconv compare configs/": "takes half an hour: tests/test_comparison.py",
    "mpiexec -n 2 faconv data synth --kind shallow-water": "needs torch-harmonics: tests/test_shallow_water.py",
    "faconv data synth --kind shallow-water": "needs torch-harmonics: tests/test_shallow_water.py",
    "faconv regimes embeddings.nc --data data/era5 --output regimes_beyond": "needs a year: tests/test_regimes.py",
    "faconv regimes embeddings.nc --output regimes_by_mixture": "needs a hundred times: tests/test_regimes.py",
    "faconv data prepare data/short data/long": "of what the two before it make: tests/test_shallow_water.py",
    "faconv bench --json": "takes minutes: tests/test_bench.py measures a small case",
    "faconv bench --against": "of the machine that it was made on: tests/test_bench.py",
    "faconv data sample": "fetches 17 MB: tests/test_sample_fetch.py",
}
SMALL = {
    "run_dir": "runs/my_run",
    "mesh": {"lon": 2},
    "data": {"store": "data/era5", "window": 3, "periods": {"test": "2001-01-04T06/"}, "lat_boundary": "pole"},
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
COMPARISON = {
    "study_dir": "runs/comparison", "config": "my.yaml", "learning_rates": [0.01], "seeds": [0], "budget_s": 2,
    "models": {"FAConvLSTM": {}, "ConvLSTM k=3": {"model.cell": "convlstm"}}, "warm_up_steps": 1, "probe_steps": 3,
    "leads": 1,
    "set": {"mesh.lon": 1, "data.periods.validation": "2001-01-03T12/2001-01-04T00"},
}  # fmt: skip
IN_A_FORK = """
import os, runpy, sys
for name in [*sys.modules]:  # so that a snippet has what it imports, as far as it is ours
    if name.partition(".")[0] == "faconv_hpc":
        del sys.modules[name]
os.chdir({0!r})
sys.path[0] = {0!r}
runpy.run_path("snippet.py", run_name="__main__")
"""


def blocks(page):
    """(language, text) of the fenced blocks of a page; every line that looks like a fence begins or ends one."""
    found, fence, inside = [], None, []
    for line in (ROOT / page).read_text().splitlines():
        if not re.match(r"\s*(```|~~~)", line):
            inside.append(line)
            continue
        if fence is None:
            fence, inside = line, []
            continue
        assert line == "```", f"{page}: {line!r} within a block"
        found.append((fence.removeprefix("```"), "\n".join(inside) + "\n"))
        fence = None
    assert fence is None, f"{page}: the block {fence!r} has no end"
    return found


def prose(page):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def spans(page):
    """What stands between backticks in the prose of a page."""
    return re.findall(r"`([^`]+)`", prose(page))


def commands(text):
    """The commands of a bash block, without comments."""
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


def run(line, directory):
    """Runs a command as a user types it, in the user's directory."""
    words = [name for word in shlex.split(line) for name in sorted(map(str, _expanded(word, directory)))]
    command = [sys.executable, "-m", "faconv_hpc", *words[1:]] if words[0] == "faconv" else words
    done = forks.run(command, timeout=SECONDS, env=job_environment(), cwd=directory)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    if line == "cp configs/quickstart_era5.yaml my.yaml":  # and edits it
        (directory / "my.yaml").write_text(yaml.safe_dump(SMALL))


def _expanded(word, directory):
    return [path.relative_to(directory) for path in directory.glob(word)] if "*" in word else [word]


def parse(line, directory):
    """What can be told of a command without running it: its files are there, its verb takes its options and config."""
    words = shlex.split(line)
    files = [word for word in words if re.match(r"(tools|slurm|configs)/", word)]
    missing = [word for word in files if not (ROOT / word).exists()]
    assert not missing, f"{line}: there is no {', '.join(missing)}"
    if words[0] == "sbatch":
        script, *rest = words[1:]
        verb = {"slurm/train_global.sh": "train", "slurm/scaling_study.sh": "study"}[script]
        words = ["faconv", verb, *(rest or ["configs/global_era5_025.yaml"])]
    assert files or "faconv" in words, f"{line}: nothing in it can be checked"
    if "faconv" in words:
        _check_config(_parsed(words[words.index("faconv") + 1 :]).params, directory)
    elif words[0] == "python":
        text = (ROOT / words[1]).read_text()
        assert all(f'"{word}"' in text for word in words if word.startswith("--")), f"{line}: unknown option"


def _parsed(arguments):
    """The verb's context, its options read."""
    context = None
    command = typer.main.get_command(app)
    while hasattr(command, "resolve_command"):
        context = command.make_context(command.name or "faconv", [*arguments], parent=context)
        _, command, arguments = command.resolve_command(context, [*arguments])
    return command.make_context(command.name, [*arguments], parent=context)


def _check_config(given, directory):
    """The config or study that a command names is there, and takes what --set says."""
    of = {"study": StudyConfig, "comparison": ComparisonConfig}
    for name, load in (("config", load_config), *((name, partial(load_yaml, model)) for name, model in of.items())):
        if given.get(name):
            load(directory / given[name], given["set_"] or ())


def follow(page, directory):
    """Does all that a page says, in its order."""
    for language, text in blocks(page):
        if language == "bash":
            for line in commands(text):
                if any(line.startswith(known) for known in ONLY_PARSED):
                    parse(line, directory)
                else:
                    run(line, directory)
        elif language == "python":
            _run_snippet(page, text, directory)
        elif language == "yaml":  # a part of a config
            validated(RunConfig, merged(SMALL, yaml.safe_load(text)), page)
        else:
            assert not language and text.startswith(TREE), f"{page}: a block of {language!r} is not looked at:\n{text}"


def _run_snippet(page, text, directory):
    """The first page's in an interpreter of its own, those with ranks by torchrun, the others in forks without ours."""
    (directory / "snippet.py").write_text(text)
    ranks = "ProcessMesh.start" in text
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if ranks else []
    command, cwd = [*(start or [sys.executable]), "snippet.py"], directory
    if not ranks and page != "README.md":
        command, cwd = [sys.executable, "-m", "forks", IN_A_FORK.format(str(directory))], Path(__file__).parent
    done = forks.run(command, cwd=cwd, env=job_environment(), timeout=SECONDS)
    assert done.returncode == 0, f"{page}:\n{text}\n{done.stderr}"
    if ranks:
        differences = [float(line.split()[-1]) for line in done.stdout.splitlines()]
        assert len(differences) == 2 and max(differences) < 1e-5


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A user's directory in which the README has been followed."""
    directory = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "configs", directory / "configs")
    axes = {"latitude": np.linspace(90, -90, 11), "longitude": np.arange(14) * 360 / 14}
    named = {name: (name, values, {"standard_name": name}) for name, values in axes.items()}
    (directory / "later").mkdir()
    for number, path in enumerate(["era5_0.nc", "era5_1.nc", "later/era5_2.nc", "sst.nc", "orography.nc"]):
        first, frames = (0, 24) if path == "sst.nc" else (8 * number, 8)
        hours = ("time", 6.0 * (np.arange(frames) + first), {"units": "hours since 2001-01-01"})
        values = 280 + np.random.default_rng(number).normal(size=(frames, 11, 14)).astype(np.float32)
        field = (("time", *axes), values, {"units": "K"})
        if path == "orography.nc":
            save(xr.Dataset({"orography": (tuple(axes), values[0], {"units": "m"})}, named), directory / path)
        else:
            save(xr.Dataset({"sst" if frames > 8 else "t2m": field}, {"time": hours, **named}), directory / path)
    follow("README.md", directory)
    (directory / "study.yaml").write_text(yaml.safe_dump(STUDY))
    (directory / "compare.yaml").write_text(yaml.safe_dump(COMPARISON))
    return directory


@pytest.mark.parametrize("page", RUN)
def test_all_that_a_page_says_can_be_done(page, site, tmp_path):
    if page == "README.md":
        assert (site / "runs" / "my_run" / "evaluation" / "forecast.png").exists()
        return
    directory = tmp_path / "site"
    shutil.copytree(site, directory)
    if page == "docs/data.md":
        shutil.rmtree(directory / "data")
    follow(page, directory)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_are_there(page):
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", prose(page)):
        there = (ROOT / page).parent / link if link else ROOT / page
        assert there.exists(), f"{page} leads to {link}"
        titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE) if anchor else []
        known = {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in titles}
        assert not anchor or anchor in known, f"{page} leads to {link}#{anchor}"
    for path in re.findall(r"(?<![\w./])(?:tools|tests|slurm|configs|faconv_hpc)/[\w./*-]+", " ".join(spans(page))):
        assert list(ROOT.glob(path)), f"{page} names {path}"


@pytest.mark.parametrize("page", PAGES)
def test_keys_and_options_in_the_prose_are_there(page):
    keys = {name for name, _ in config_keys()}
    for span in spans(page):
        for key in re.findall(rf"^(?:--set )?((?:{'|'.join(RunConfig.model_fields)})(?:\.\w+)+)", span):
            assert key in keys, f"{page}: the config has no {key}"
        if span.startswith("faconv "):
            _check_options(page, span)


def _check_options(page, span):
    """Its arguments may be left out: the prose names a verb and what it does."""
    command, (_, *words) = typer.main.get_command(app), span.split()
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"{page}: faconv has no {words[0]!r} in `{span}`"
        command = command.commands[words.pop(0)]
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    unknown = {word for word in words if word.startswith("--")} - known - {"--help"}
    assert not unknown, f"{page}: `{span}` has no {', '.join(unknown)}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_what_a_config_says_to_type_can_be_typed(path):
    """In its first lines: commands, and after some spaces what they are for."""
    head = re.sub(r"\\\n# +", "", path.read_text().partition("\n\n")[0])  # a command may go on below
    said = [re.split(r" {3,}", line)[0] for line in re.findall(r"^# {3}(\S.*)$", head, re.MULTILINE)]
    for line in said:
        if not line.startswith("pip install "):
            parse(line, ROOT)
    assert said or path.name in ("quickstart_era5.yaml", "global_era5_025.yaml"), f"{path.name} says no command"


def test_only_what_a_page_says_is_excused_from_running():
    said = [line for page in RUN for language, text in blocks(page) if language == "bash" for line in commands(text)]
    idle = [known for known in ONLY_PARSED if not any(line.startswith(known) for line in said)]
    assert not idle, f"no page has {idle}"


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


def config_keys(section=RunConfig, prefix=""):
    """(name, field) of every key of a run's config."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from config_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def key_table():
    """Every key of a run's config, its default, what it is, and the values it may have where they are few."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in config_keys():
        assert field.description, f"{name} has no description"
        default = "(needed)" if field.is_required() else f"`{_shown(field.default)}`"
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        one_of = f" ({', '.join(f'`{choice}`' for choice in choices)})" if choices else ""
        rows.append(f"| `{name}` | {default} | {field.description}{one_of} |")
    return "\n".join(rows) + "\n"


def _shown(value):
    """As YAML writes it."""
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).splitlines()[0]


def test_the_table_of_keys_is_up_to_date():
    _, _, table = (ROOT / "docs" / "training.md").read_text().partition(KEYS)
    assert table == key_table(), "run: python tests/test_docs.py"


def test_a_default_is_shown_as_yaml_reads_it():
    """1 equals True and 0 equals False to Python, not to a reader."""
    defaults = dict(re.findall(r"^\| `([\w.]+)` \| `(.*?)` \|", key_table(), re.MULTILINE))
    for name, field in config_keys():
        if not field.is_required():
            read, default = yaml.safe_load(defaults[name]), field.default
            default = list(default) if isinstance(default, tuple) else default
            assert (read, type(read)) == (default, type(default)), name


def test_tools_can_be_loaded():
    """What they import is there, and what they call has the arguments that they give."""
    for path in sorted((ROOT / "tools").glob("*.py")):
        ast.parse(path.read_text())
        command = [sys.executable, "-m", "forks", f"import runpy; runpy.run_path({str(path)!r})"]
        loaded = forks.run(command, timeout=SECONDS, env=job_environment(), cwd=Path(__file__).parent)
        assert loaded.returncode == 0, loaded.stderr


if __name__ == "__main__":
    page = ROOT / "docs" / "training.md"
    before, marker, _ = page.read_text().partition(KEYS)
    page.write_text(before + marker + key_table())
