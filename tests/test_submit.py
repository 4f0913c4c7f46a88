"""Submitting without daemons: what sbatch is given, and what it may answer. See test_slurm_jobs.py for real jobs."""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from faconv_hpc import load_config
from faconv_hpc.errors import InputError, SilentClusterError
from faconv_hpc.launch.submit import JOB, script, submit
from runs import make_store, small_config
from test_cli import faconv, messages

MINI_SLURM = Path(__file__).parent.parent / "tools" / "mini_slurm.sh"
OF_A_JOB = {
    "SLURM_JOB_ID": "3", "SLURM_MEM_PER_CPU": "100", "SLURM_CPU_BIND": "cores", "SLURM_NTASKS": "8", "PMI_RANK": "0",
    "RANK": "1", "MASTER_PORT": "1",
}  # fmt: skip
KEPT = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "climate", "RANKING": "yes"}


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Stands before the real one on PATH: notes its environment, and says what is put into ``says``."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(f"#!/bin/sh\nenv > {tmp_path}/environment\ncat {tmp_path}/says; exit 0\n")
    (programs / "scontrol").write_text("#!/bin/sh\necho 'Slurmctld(primary) at head is UP'\n")
    (programs / "srun").write_text("#!/bin/sh\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    (tmp_path / "says").write_text("Submitted batch job 7\n")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return tmp_path


def refuse(directory, text):
    (directory / "bin" / "sbatch").write_text(f"#!/bin/sh\necho '{text}' >&2; exit 1\n")


def test_a_job_does_not_take_the_variables_of_the_one_it_is_sent_from(sbatch, monkeypatch):
    for name, value in (OF_A_JOB | KEPT).items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    sent = submit(small_config(sbatch, sbatch / "waves"))
    assert sent.job == "7" and sent.script.exists()
    given = dict(line.partition("=")[::2] for line in (sbatch / "environment").read_text().splitlines())
    assert not OF_A_JOB.keys() & given.keys() and KEPT.items() <= given.items()
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    "text",
    [
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
        "sbatch: error: QOSMaxSubmitJobPerUserLimit",
        "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying",
    ],
)
def test_no_job_now_is_no_refusal(sbatch, text):
    refuse(sbatch, text)
    with pytest.raises(SilentClusterError, match=r"sbatch takes no job now: .*Try again later"):
        submit(small_config(sbatch, sbatch / "waves"))


def test_a_refusal_is_told_with_the_section_to_change(sbatch):
    refuse(sbatch, "sbatch: error: invalid partition specified: nowhere")
    with pytest.raises(InputError, match=r"sbatch refused the job: .*partition.*Change section slurm") as told:
        submit(small_config(sbatch, sbatch / "waves"))
    assert not isinstance(told.value, SilentClusterError)


def test_the_config_that_a_waiting_job_will_read_is_not_written_again(sbatch):
    config = small_config(sbatch, sbatch / "waves")
    submit(config)
    (copy,) = (sbatch / "run" / "slurm").glob("config-*.yaml")
    before = copy.stat()
    script(config)
    assert (copy.stat().st_ino, copy.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    copy.write_text("half of it")
    script(config)
    assert copy.read_text() == config.to_yaml()


FAKE_SCONTROL = """#!/bin/sh
if [ $1 = show ]; then echo "JobId=7 JobState=$(cat $STATE)"; else echo "$@" >> $REQUEUED; echo PENDING > $STATE; fi
"""


def job(directory, commands, state="RUNNING", **variables):
    """Runs what every job reads, then commands; the exit code, and what was asked of scontrol."""
    for name, text in (("scontrol", FAKE_SCONTROL), ("sleep", "#!/bin/sh\n")):
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    (directory / "state").write_text(state)
    environment = os.environ | {"PATH": f"{directory}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"} | variables
    environment |= {"STATE": str(directory / "state"), "REQUEUED": str(directory / "requeued")}
    ran = subprocess.run(["bash", "-c", f"source {JOB}\n{commands}"], env=environment, check=False)
    return ran.returncode, (directory / "requeued").read_text() if (directory / "requeued").exists() else ""


def test_a_slurm_without_gpus_is_told_in_words(sbatch):
    refuse(sbatch, "sbatch: error: Invalid generic resource (gres) specification")
    config = small_config(sbatch, sbatch / "waves", slurm={"gpus_per_node": 4})
    with pytest.raises(InputError, match=r"knows of no GPUs: --set slurm\.gpus_per_node=0\. Change section slurm"):
        submit(config)


@pytest.mark.parametrize(
    ("code", "again"),
    [(0, False), (1, False), (2, False), (75, True), (93, False), (128, False), (130, False), (137, True)],
)
def test_which_exit_codes_put_a_job_back_into_the_queue(tmp_path, code, again):
    assert job(tmp_path, f"faconv_end {code}") == (code, "requeue 7\n" if again else "")


def test_a_job_that_is_cancelled_is_not_put_back(tmp_path, capfd):
    assert job(tmp_path, "faconv_end 75", state="COMPLETING") == (75, "")
    assert "job 7 is COMPLETING: not put back" in capfd.readouterr().err


def test_of_an_array_this_job_counts(tmp_path):
    """scontrol shows a job that is an array's leader first, then the others."""
    assert job(tmp_path, "faconv_end 75", state="RUNNING\nJobId=8 JobState=PENDING") == (75, "requeue 7\n")


def test_a_task_of_an_array_puts_back_itself_alone(tmp_path):
    """The last one's job number is the array's."""
    task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert job(tmp_path, "faconv_end 75", **task) == (75, "requeue 7_3\n")


def test_the_ranks_are_told_how_long_the_job_may_run(tmp_path, capfd):
    """By Slurm, or by what it says when it is asked."""
    say = (
        "faconv_say_start > /dev/null; echo $SLURM_JOB_START_TIME $SLURM_JOB_END_TIME; export -p | grep -c JOB_END_TIME"
    )
    limited = "RUNNING\n   StartTime=2026-01-01T00:00:00 EndTime=2026-01-01T01:30:00 Deadline=N/A"
    job(tmp_path, say, state=limited, TZ="UTC")
    job(tmp_path, say, state=limited, SLURM_JOB_START_TIME="5", SLURM_JOB_END_TIME="7")
    job(tmp_path, say, state="RUNNING\n   StartTime=2026-01-01T00:00:00 EndTime=Unknown", TZ="UTC")
    assert capfd.readouterr().out.split("\n")[:-1] == ["1767225600 1767231000", "1", "5 7", "1", "1767225600", "1"]


def test_each_member_of_an_ensemble_has_a_seed_and_a_directory(sbatch):
    """As the shell of its task sees it; by `load_config`, the other values are those of the run."""
    config = small_config(sbatch, sbatch / "waves", training={"seed": 40})
    text = script(config, preflight=False, members=12)
    assert "#SBATCH --array=0-11\n" in text and f"#SBATCH --output={sbatch}/run/slurm/%A_%a.log" in text
    (sbatch / "bin" / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    variables = os.environ | {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "11"}
    ran = subprocess.run(["bash", "-c", text], env=variables, capture_output=True, text=True, check=True)
    words = ran.stdout.splitlines()
    given = words[words.index("train") + 1 :]
    assert given[1::2] == ["--set", "--set"] and given[2::2] == [f"run_dir={sbatch}/run/member-11", "training.seed=51"]
    member = load_config(given[0], given[2::2])
    assert member.run_dir == sbatch / "run" / "member-11" and member.training.seed == 51
    assert member.model == config.model and "--array" not in script(config)


def test_what_doctor_finds_ends_a_job_at_its_first_start_only(tmp_path):
    commands = "faconv_preflight sh -c 'exit 2'; exit 7"
    assert job(tmp_path, commands)[0] == 2
    assert job(tmp_path, commands, SLURM_RESTART_COUNT="1")[0] == 7
    assert job(tmp_path, "faconv_preflight sh -c 'exit 1'; exit 7")[0] == 7  # a warning


def test_all_scripts_have_what_a_job_does_from_one_text(sbatch):
    assert JOB.read_text() in script(small_config(sbatch, sbatch / "waves"))
    for name in ("train_global.sh", "scaling_study.sh"):
        text = (JOB.parents[2] / "slurm" / name).read_text()
        assert "/job.sh" in text and "scontrol requeue" not in text


def test_scripts_need_no_python_in_a_checkout_and_say_so_elsewhere(tmp_path):
    for name, text in (("python", "exit 1"), ("srun", 'echo "$@"'), ("faconv", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "checkout" / "faconv_hpc" / "launch").mkdir(parents=True)
    shutil.copy(JOB, tmp_path / "checkout" / "faconv_hpc" / "launch")
    environment = os.environ | {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    for name in ("train_global.sh", "scaling_study.sh"):
        for place, code, said in (("checkout", 0, "my.yaml"), ("", 2, "start it from the project's root, or where")):
            command = ["bash", str(JOB.parents[2] / "slurm" / name), "my.yaml"]
            variables = environment | {"SLURM_SUBMIT_DIR": str(tmp_path / place)}
            ran = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
            assert ran.returncode == code and said in (ran.stderr if code else ran.stdout), ran.stderr


@pytest.mark.parametrize("name", ["train_global.sh", "scaling_study.sh"])
def test_a_job_that_does_not_find_faconv_says_so_before_it_asks_for_ranks(tmp_path, name):
    (tmp_path / "srun").write_text("#!/bin/sh\necho asked\n")
    (tmp_path / "srun").chmod(0o755)
    root = JOB.parents[2]
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    shutil.copytree(root / "faconv_hpc" / "launch", tmp_path / "faconv_hpc" / "launch")
    command = ["bash", str(root / "slurm" / name), "my.yaml"]
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and "no faconv on PATH in the job: see module_lines" in ran.stderr
    assert ran.stdout == ""


def test_an_installed_package_has_what_a_job_does():
    tree = tomllib.loads((JOB.parents[2] / "pyproject.toml").read_text())
    patterns = tree["tool"]["setuptools"]["package-data"]["faconv_hpc"]
    assert any(JOB in JOB.parents[1].glob(pattern) for pattern in patterns)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MASTER_PORT": "abc"}, "MASTER_PORT must be a whole number, got 'abc'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, got 'two'"),
    ],
)
def test_what_keeps_ranks_from_joining_is_told_once(tmp_path, variables, message):
    started = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "2"}
    process = faconv("train", tmp_path / "nothing.yaml", environment=started | variables)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert len(messages(process)) == 1
    config = small_config(tmp_path, make_store(tmp_path / "waves"), mesh={"lon": 2})
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    process = faconv("train", tmp_path / "resolved.yaml", environment=started | variables)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    (told,) = messages(process)
    assert message in told


def test_mini_slurm_leaves_what_is_not_its_own(tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    for config, code in ((None, 0), ("ClusterName=real\n", 0)):
        if config:
            (tmp_path / "slurm.conf").write_text(config)
        stop = subprocess.run(
            ["bash", MINI_SLURM, "stop"], env=os.environ | {"MINI_SLURM_DIR": str(tmp_path)}, check=False
        )
        assert stop.returncode == code and (tmp_path / "thesis.tex").exists()
