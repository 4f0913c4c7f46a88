"""Configs: what is refused, and how it is said."""

from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from faconv_hpc import load_config
from faconv_hpc.comparison.plan import ComparisonConfig, probes_of
from faconv_hpc.config import SlurmConfig
from faconv_hpc.config_file import load_yaml
from faconv_hpc.errors import InputError
from faconv_hpc.scaling.study import StudyConfig, points_of
from faconv_hpc.training.schedule import Leg, learning_rate, legs_of
from faconv_hpc.training.setup import places_of

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
COMPARISONS = [path for path in CONFIGS if path.name.startswith("compare_")]
STUDIES = [path for path in CONFIGS if path.name.startswith("study_")]
MINIMAL = {"run_dir": "r", "data": {"store": "s"}, "training": {"steps": 100}}


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
        return path

    return write


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path not in STUDIES + COMPARISONS], ids=lambda path: path.name
)
def test_the_configs_of_the_project_are_valid_and_survive_a_round_trip(path, config_file):
    config = load_config(path)
    assert load_config(config_file(config.to_yaml())) == config


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.name)
def test_the_comparisons_of_the_project_are_valid(path):
    comparison = load_yaml(ComparisonConfig, path)
    assert len(comparison.models) > 1 and len(probes_of(comparison)) == len(comparison.models)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_the_studies_of_the_project_are_valid_on_whole_nodes(path, monkeypatch):
    monkeypatch.chdir(path.parent.parent)  # where their paths start from
    points = points_of(load_yaml(StudyConfig, path))
    assert {point.run.slurm.nodes(point.ranks) for point in points} == {1, 2, 4, 8}


def test_overrides_are_values_of_the_config(config_file):
    config = load_config(
        config_file(MINIMAL), ["training.steps=7", "training.warmup_steps=2", "model.dilations=[1, 3]"]
    )
    assert (config.training.steps, config.model.dilations) == (7, (1, 3))


@pytest.mark.parametrize(
    ("text", "sides"),
    [("[pole, zero]", ("pole", "zero")), ("[zero, zero]", "zero"), ("[pole]", "pole"), ("periodic", "periodic")],
)
def test_a_boundary_for_each_side(config_file, text, sides):
    config = load_config(config_file(MINIMAL), [f"data.lat_boundary={text}"])
    assert config.data.lat_boundary == sides
    assert load_config(config_file(config.to_yaml())) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.learning_rat=1"], r"training\.learning_rat: unknown key\. Did you mean 'learning_rate'\?"),
        (["modle.layers=1"], "modle: unknown key. Did you mean 'model'"),
        (["training.steps=0"], r"training\.steps: Input should be greater than or equal to 1, got 0"),
        (["training.steps=many"], r"training\.steps: .*valid integer.*got 'many'"),
        (["training.zero_stage=4"], r"training\.zero_stage: Input should be 0, 1, 2 or 3, got 4"),
        (["data.lat_boundary=wall"], r"data\.lat_boundary: .*one of pole, periodic, zero, replicate.*got 'wall'"),
        (["data.lat_boundary=[pole, wall]"], r"data\.lat_boundary: .*a pair of them.*got \['pole', 'wall'\]"),
        (["data.lat_boundary=[pole, zero, pole]"], r"data\.lat_boundary: .*got \['pole', 'zero', 'pole'\]"),
        (["data.lat_boundary=3"], r"data\.lat_boundary: .*got 3"),
        (["training.warmup_steps=100"], "warmup_steps=100 must be fewer than steps=100"),
        (["training.learning_rate=.inf"], r"training\.learning_rate: Input should be a finite number, got inf"),
        (["training.seed=99999999999999999999"], r"training\.seed: Input should be less than 9223372036854775808"),
        (["training.timeout_s=0.001"], r"training\.timeout_s: Input should be greater than or equal to 10"),
        (["data.variables=t2m"], r"data\.variables: .*got 't2m'\. Write a list: \[a, b\]"),
        (["data.variables=[]"], r"data\.variables: .*at least one variable"),
        (["data.forcings=[insolation, insolation]"], r"data\.forcings: .*every name once, but insolation"),
        (["data.window=3"], r"model\.attention_every=4 is more than the 3 steps of a window"),
        (["mesh..lat=2"], r"--set takes section\.key=value, got 'mesh\.\.lat=2'"),
        (["training.steps"], "--set takes section.key=value, got 'training.steps'"),
        (["run_dir.steps=1"], "'run_dir' is a value, not a section"),
        (["training.steps=[1"], "is not a valid YAML value"),
    ],
)
def test_what_a_config_refuses(config_file, overrides, message):
    with pytest.raises(InputError, match=message):
        load_config(config_file(MINIMAL), overrides)


def test_all_findings_are_listed_at_once(config_file):
    with pytest.raises(InputError) as caught:
        load_config(config_file({"data": {"stor": "s"}, "training": {"steps": -1}}))
    for part in (
        "run_dir: this key is required",
        "data.store: this key is required",
        "Did you mean 'store'",
        "training.steps",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not valid YAML"), ("- 1", "must hold keys and values.*got list")]
)
def test_a_file_that_is_no_config(config_file, text, message):
    with pytest.raises(InputError, match=message):
        load_config(config_file(text))


def test_a_config_that_is_no_text(tmp_path):
    (tmp_path / "junk.yaml").write_bytes(b"\x89HDF\xff\xfe")
    with pytest.raises(InputError, match=r"junk\.yaml cannot be read: it is not a text file"):
        load_config(tmp_path / "junk.yaml")


def test_a_config_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml cannot be read: No such file"):
        load_config(tmp_path / "nowhere.yaml")


RATES = ["training.steps=100", "training.warmup_steps=10", "training.learning_rate=1.0"]


def rates_of(config, before=(), extend=None):
    legs = legs_of(config, before, extend)
    return [learning_rate(config.training, legs, step) for step in range(config.training.steps)]


def test_the_learning_rate_warms_up_and_falls(config_file):
    rates = rates_of(load_config(config_file(MINIMAL), RATES))
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.02, abs=1e-3) and all(a >= b for a, b in pairwise(rates[10:]))


def test_more_steps_than_the_run_began_with_need_a_rule(config_file):
    """Spread anew over 200 steps, the rate of step 100 would be 0.54 of its peak after 0.02."""
    config = load_config(config_file(MINIMAL), [*RATES, "training.steps=200"])
    with pytest.raises(
        InputError, match=r"steps=200, but this run began with 100 .*0\.02 .*--extend keep .*rewarm .*100 new"
    ):
        legs_of(config, (Leg(end=100),), None)
    before = rates_of(load_config(config_file(MINIMAL), RATES))
    kept, again = (rates_of(config, (Leg(end=100),), rule) for rule in ("keep", "rewarm"))
    assert kept[:100] == again[:100] == before and set(kept[100:]) == {0.02}
    assert again[100] == pytest.approx(0.02 + 0.98 / 10) and again[109] == again[110] == pytest.approx(1.0)
    assert again[199] == pytest.approx(0.02, abs=1e-3) and max(b - a for a, b in pairwise(again)) < 0.11
    twice = load_config(config_file(MINIMAL), [*RATES, "training.steps=250"])
    assert rates_of(twice, legs_of(config, (Leg(end=100),), "rewarm"), "keep") == again + [0.02] * 50


def test_fewer_steps_end_a_run_sooner_and_change_no_rate(config_file):
    fewer = load_config(config_file(MINIMAL), [*RATES, "training.steps=40"])
    assert rates_of(fewer, (Leg(end=100),)) == rates_of(load_config(config_file(MINIMAL), RATES))[:40]


def test_a_rate_that_does_not_fall_needs_no_rule(config_file):
    constant = [*RATES, "training.final_learning_rate_share=1.0"]
    config = load_config(config_file(MINIMAL), [*constant, "training.steps=200"])
    assert rates_of(config, (Leg(end=100),)) == rates_of(config)


@pytest.mark.parametrize(("replicas", "micro", "accumulation"), [(1, 12, 1), (2, 3, 2), (4, 1, 3), (3, 4, 1)])
def test_a_step_sees_the_same_samples_however_they_are_dealt(config_file, replicas, micro, accumulation):
    config = load_config(
        config_file(MINIMAL),
        [f"mesh.replicas={replicas}", f"training.micro_batch={micro}", f"training.accumulation={accumulation}"],
    )
    assert config.global_batch == 12
    micros, replicas = range(accumulation), range(config.mesh.replicas)
    assert [place for m in micros for r in replicas for place in places_of(config, m, r)] == list(range(12))


@pytest.mark.parametrize(
    ("text", "minutes"), [("90", 90), ("12:00:00", 720), ("1-06:30:01", 1831), ("0:30:00", 30)], ids=str
)
def test_a_time_limit_may_be_written_as_sbatch_writes_it(config_file, text, minutes):
    """To YAML 1.1 12:00:00 is the number 43200."""
    assert load_config(config_file(MINIMAL), [f"slurm.time_min={text}"]).slurm.time_min == minutes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("slurm.time_min=12:00", "slurm.time_min: .*valid integer.*got '12:00'"),
        ("slurm.sbatch={nodes: 3}", "nodes is decided by mesh and slurm.tasks_per_node"),
        ("slurm.sbatch={open_mode: truncate}", "open-mode is decided by faconv submit"),
        ("slurm.sbatch={bad key: 1}", "names of sbatch's long options, such as reservation, got 'bad key'"),
        ("slurm.time_min=2", "usr_grace_s=120 s before a time limit of 120 s .slurm.time_min. leave no time"),
        ("mesh=0x1", "LATxLON|MeshConfig|mapping|dictionary"),
    ],
)
def test_what_slurm_is_asked_for_is_judged(config_file, override, message):
    with pytest.raises(InputError, match=message):
        load_config(config_file(MINIMAL), [override])


def test_accounts_may_be_numbers_and_numbers_are_decimal(config_file):
    overrides = ["slurm.account=12345", "training.learning_rate=4e-3", "training.steps=1_000", "slurm.sbatch={x_y: 1}"]
    config = load_config(config_file(MINIMAL), overrides)
    assert (config.slurm.account, config.training.learning_rate, config.training.steps) == ("12345", 4e-3, 1000)
    assert config.slurm.sbatch == {"x-y": 1}


@pytest.mark.parametrize("ranks", [4, 6, 8])
def test_nodes_are_filled_evenly_or_refused(ranks):
    slurm = SlurmConfig(tasks_per_node=4)
    if ranks % 4:
        with pytest.raises(InputError, match=r"6 ranks do not fill nodes of 4 evenly \(slurm.tasks_per_node=4\)"):
            slurm.nodes(ranks)
    else:
        assert slurm.nodes(ranks) == ranks // 4
