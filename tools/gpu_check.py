"""Whether a machine's GPU does what the CPU does, and how fast: one command, one report in Markdown.

The quick start is trained on both, in every precision, and forecasts; two ranks that share the GPU through host memory
are compared with one; then the tests that need a GPU, and the layers' benchmark. Run:

    bash tools/quickstart.sh                       # once: the data of the quick start
    python tools/gpu_check.py                      # writes runs/gpu_check/report.md
    python tools/gpu_check.py --device cpu --skip tests bench      # the check itself, where there is no GPU

Exit code 1 where something is not as it should be; the report says what.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from faconv_hpc import ProcessMesh, RunConfig, load_config
from faconv_hpc.spatial.environment import RankEnvironment, free_port
from faconv_hpc.training.parity import verify_parity
from faconv_hpc.training.records import StepRecord, read_records
from faconv_hpc.training.trainer import train
from faconv_hpc.versions import versions

BENCH = [sys.executable, "-m", "faconv_hpc", "bench"]
TOLERANCES = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 3e-2}
"""How far losses of a short run may be from the CPU's in fp32, relatively; as in tests/test_gpu.py."""
SKILL_TOLERANCE = 1e-3
SHARED = ["training.zero_stage=0"]  # sums and broadcasts alone: of Gloo's collectives torch documents these for GPUs
SECONDS = 1800


class CheckError(Exception):
    """Something did not run."""


@dataclass(frozen=True)
class Section:
    """Of the report."""

    title: str
    passed: bool
    text: str

    def __str__(self) -> str:
        return f"## {self.title}: {'as it should be' if self.passed else 'NOT AS IT SHOULD BE'}\n\n{self.text}\n"


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A program, to its end."""
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


def printed(command: Sequence[str]) -> str:
    """What a program prints; raises CheckError if it fails."""
    ran = run(command)
    if ran.returncode:
        raise CheckError(f"`{' '.join(command)}` ended with {ran.returncode}:\n\n```\n{_end_of(ran)}\n```")
    return ran.stdout


def faconv(*arguments: object) -> list[str]:
    """The command."""
    return [sys.executable, "-m", "faconv_hpc", *map(str, arguments)]


class Check:
    """What is compared, and where it is written.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        options.output.mkdir(parents=True, exist_ok=True)
        self.options, self.output = options, Path(tempfile.mkdtemp(prefix="runs-", dir=options.output))
        self.runs: dict[Path, list[StepRecord]] = {}
        self.kernels = ("compiled",) if options.device == "cpu" else ("compiled", "triton")

    def doctor(self) -> Section:
        """What is installed and what works; the report is there to be read, it fails by what does not work."""
        ran = run(faconv("doctor", self.options.config, "--quick", "--set", f"device={self.options.device}"))
        return Section("faconv doctor", ran.returncode < 2, f"```\n{ran.stdout.strip() or _end_of(ran)}\n```")

    def training(self) -> Section:
        """The quick start on the CPU in fp32, and on the device in every precision, by all kernels that a GPU has."""
        want, device = self._trained("cpu", "fp32"), self.options.device
        rows, passed = [], True
        for kernels, precision in itertools.product(self.kernels, TOLERANCES):
            tolerance, name = TOLERANCES[precision], f"{device}-{precision}"
            more = () if kernels == "compiled" else (f"model.kernels={kernels}",)
            got = self._trained(device, precision, *more, name=f"{name}-{kernels}" if more else "")
            off = apart(got, want)
            passed &= off <= tolerance
            rows.append(row(f"{device}, {precision}{', ' * bool(more)}{kernels if more else ''}", got, off, tolerance))
        return Section("training beside the CPU", passed, table(row("cpu, fp32", want, 0.0, 0.0), *rows))

    def forecasts(self) -> Section:
        """Of one run, by both."""
        run_dir = self.output / f"{self.options.device}-fp32"
        both = [
            [one for one in said["skills"] if one["model"] == said["models"][0]["name"]]
            for device in (self.options.device, "cpu")
            for said in [json.loads(printed(faconv("evaluate", run_dir, "--device", device, "--json")))]
        ]
        pairs = list(zip(*both, strict=True))
        off = max(abs(got["rmse"] / want["rmse"] - 1) for got, want in pairs)
        text = f"RMSE of {len(pairs)} variables and leads: at most {off:.1e} apart, {SKILL_TOLERANCE:g} may be."
        return Section("forecasts beside the CPU's", off <= SKILL_TOLERANCE, text)

    def two_ranks(self) -> Section:
        """That share the device, and talk through host memory, beside one."""
        want = self._trained(self.options.device, "fp32", *SHARED, name="one")
        run_dir = self.output / "two"
        settings = self._settings(self.options.device, run_dir, 2, *SHARED)
        command = [sys.executable, __file__, "--rank-of", str(self.options.config), *settings]
        port = free_port()
        ranks = [
            subprocess.Popen(command, env=os.environ | RankEnvironment(rank, 2, rank, port=port).variables(), text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for rank in range(2)
        ]  # fmt: skip
        told = [rank.communicate(timeout=SECONDS) for rank in ranks]
        if any(rank.returncode for rank in ranks):
            raise CheckError(
                "\n".join(f"rank {number}:\n\n```\n{err[-2000:]}\n```" for number, (_, err) in enumerate(told))
            )
        worst = json.loads(told[0][0].splitlines()[-1])
        got = read_records(run_dir)
        off = apart(got, want)
        text = table(row("1 rank", want, 0.0, 0.0), row("2 ranks, Gloo", got, off, TOLERANCES["fp32"]))
        text += f"\n`faconv verify` on the two: {worst['difference']:.1e} ({worst['quantity']}), 1e-5 may be."
        return Section("two ranks that share it", off <= TOLERANCES["fp32"] and worst["passed"], text)

    def tests(self) -> Section:
        """Those that need a GPU."""
        ran = run([sys.executable, "-m", "pytest", "-q", "tests/test_gpu.py"])
        return Section("tests/test_gpu.py", ran.returncode == 0, f"```\n{_end_of(ran)}\n```")

    def bench(self) -> Section:
        """The layers beside ConvLSTM, in each precision."""
        kinds = ("fp32",) if self.options.device == "cpu" else ("fp32", "tf32", "bf16")
        given = ["--device", self.options.device, *(part for one in self.kernels for part in ("--kernels", one))]
        told = [printed([*BENCH, *given, "--precision", kind]).strip() for kind in kinds]
        return Section(
            "the layers' benchmark",
            True,
            "\n\n".join(f"{kind}:\n\n```\n{text}\n```" for kind, text in zip(kinds, told, strict=True)),
        )

    def _trained(self, device: str, precision: str, *more: str, name: str = "") -> list[StepRecord]:
        """On one rank; once."""
        run_dir = self.output / (name or f"{device}-{precision}")
        if run_dir not in self.runs:
            settings = self._settings(device, run_dir, 1, f"training.precision={precision}", *more)
            printed(faconv("train", self.options.config, *(part for one in settings for part in ("--set", one))))
            self.runs[run_dir] = read_records(run_dir)
        return self.runs[run_dir]

    def _settings(self, device: str, run_dir: Path, ranks: int, *more: str) -> list[str]:
        steps = self.options.steps
        mesh = ("mesh.replicas=1", "mesh.lat=1", f"mesh.lon={ranks}")
        length = (f"training.steps={steps}", f"training.warmup_steps={min(10, steps - 1)}")
        return [f"device={device}", f"run_dir={run_dir}", *mesh, *length, *more]


def apart(got: Sequence[StepRecord], want: Sequence[StepRecord]) -> float:
    """The largest relative difference of two runs' losses."""
    return max(abs(one.loss / other.loss - 1) for one, other in zip(got, want, strict=True))


def row(name: str, records: Sequence[StepRecord], off: float, tolerance: float) -> str:
    """Of a table of runs; the first step, which compiles, counts in no speed."""
    speed = sum(one.samples for one in records[1:]) / sum(one.seconds for one in records[1:])
    losses = f"{records[0].loss:.5f} | {records[-1].loss:.5f}"
    memory = max(one.peak_memory_gib for one in records)
    return f"| {name} | {losses} | {off:.1e} | {tolerance:g} | {speed:.2f} | {memory:.2f} |"


def table(*rows: str) -> str:
    """Of runs."""
    names = "| run | first loss | last loss | apart | may be | samples/s | peak [GiB] |"
    return "\n".join((names, "|---" * 7 + "|", *rows, ""))


def of_rank(config: RunConfig, mesh: ProcessMesh) -> dict[str, object]:
    """What each of two ranks does: verify, then train; the worst of what was verified. Collective."""
    with mesh.guarded():
        rows = verify_parity(config, mesh)
        train(config, mesh)
    worst = max(rows, key=lambda one: (not one.passed, one.difference))
    return {"difference": worst.difference, "quantity": worst.quantity, "passed": worst.passed}


def reported(check: Check, sections: Sequence[str]) -> tuple[str, bool]:
    """The report, and whether all is as it should be."""
    device = torch.cuda.get_device_name() if check.options.device == "cuda" else "CPU: the check itself was tried"
    told = ", ".join(f"{name} {found}" for name, found in versions().items() if name in ("host", "torch", "deepspeed"))
    head = (
        f"# faconv_hpc on a GPU\n\n{time.strftime('%Y-%m-%d %H:%M')}, {device}; {told}; {check.options.steps} steps of "
    )
    parts, passed = [f"{head}{check.options.config}.\n"], True
    for name in sections:
        call: Callable[[], Section] = getattr(check, name)
        try:
            section = call()
        except (CheckError, subprocess.TimeoutExpired) as error:
            section = Section(name.replace("_", " "), False, str(error))
        print(section, flush=True)
        passed &= section.passed
        parts.append(str(section))
    return "\n".join(parts), passed


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report; the exit code."""
    sections = ["doctor", "training", "forecasts", "two_ranks", "tests", "bench"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart_era5.yaml"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--skip", nargs="*", choices=sections, default=[])
    parser.add_argument("--rank-of", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank_of:
        config = load_config(options.rank_of[0], options.rank_of[1:])
        mesh = ProcessMesh.start(lat=1, lon=2, device=config.device, through_host=True)
        print(json.dumps(of_rank(config, mesh)))
        mesh.stop()
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch can use no GPU here. `--device cpu` tries the check itself.", file=sys.stderr)
        return 2
    text, passed = reported(Check(options), [name for name in sections if name not in options.skip])
    (options.output / "report.md").write_text(text)
    print(f"report: {options.output / 'report.md'}")
    return 0 if passed else 1


def _end_of(ran: subprocess.CompletedProcess[str]) -> str:
    return "\n".join((ran.stdout + ran.stderr).strip().splitlines()[-30:])


if __name__ == "__main__":
    sys.exit(main())
