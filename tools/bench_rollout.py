"""What training does for free runs: single steps beside noise, rollout late, and states carried on, at equal time.

Run: python tools/bench_rollout.py data/shallow_water runs/rollout   (the store: docs/data.md)
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import yaml
from rich.console import Console
from rich.table import Table

from faconv_hpc.evaluation.evaluate import Evaluation, evaluate
from faconv_hpc.spatial.mesh import ProcessMesh
from faconv_hpc.training.records import read_records

WINDOW = 8
FAR = range(6, 13)
SAMPLES = 48  # forecasts, spread over the runs of the test
SPIN_UPS, TOLD = (4, 8, 40), (12, 24, 36, 48)  # hours


@dataclass(frozen=True)
class Way:
    """How a run is trained.

    Attributes:
        rollout: leads that it is trained through, from a share of its steps on.
        weight: of the leads after the first.
        stateful: windows in a row that states are carried through.
        noise: on the inputs.
    """

    rollout: dict[float, int] = field(default_factory=dict)
    weight: float = 1.0
    stateful: int = 0
    noise: float = 0.0

    def __str__(self) -> str:
        told = [" then ".join(f"{leads} leads from {share:g}" for share, leads in self.rollout.items())]
        told += [f"weight {self.weight:g}"] * bool(self.rollout)
        told += [f"states through {self.stateful} windows"] * bool(self.stateful)
        told += [f"noise {self.noise:g}"] * bool(self.noise)
        return ", ".join(one for one in told if one) or "single steps"

    def steps(self, single: int) -> tuple[int, dict[int, int]]:
        """Steps and schedule of as many time steps of the network as so many single ones: leads lengthen a window."""
        shares, leads = [0.0, *self.rollout, 1.0], [1, *self.rollout.values()]
        cost = sum((WINDOW + n - 1) / WINDOW * (b - a) for a, b, n in zip(shares[:-1], shares[1:], leads, strict=True))
        fewer = round(single / cost)
        return fewer, {round(share * fewer): leads for share, leads in self.rollout.items()}


def ways_of(given: argparse.Namespace) -> Iterator[Way]:
    """Single steps, and what is held beside them."""
    yield Way()
    for noise in given.noise or [0.0]:
        if given.schedule or (noise and not given.stateful):
            yield Way(given.schedule, given.weight, noise=noise)
        if given.stateful:
            yield Way(given.schedule, given.weight, given.stateful, noise)


def config_of(given: argparse.Namespace, run_dir: Path, way: Way, seed: int) -> dict:
    """Of a run on the first 48 sequences, tested on the others."""
    steps, rollout = way.steps(given.steps)
    periods = {"train": "sequences 000 to 047", "test": "sequences 048 to 055"}
    return {
        "run_dir": str(run_dir),
        "data": {"store": str(given.store), "window": WINDOW, "periods": periods, "lat_boundary": "pole"},
        "model": {"hidden_channels": 32, "embedding_channels": 16, "coarse_shape": [4, 8]},
        "training": {
            "steps": steps, "micro_batch": 2, "learning_rate": given.rate, "seed": seed, "rollout": rollout,
            "lead_weights": [way.weight] if rollout and way.weight != 1 else [],
            "stateful_windows": way.stateful, "input_noise": way.noise,
        },
    }  # fmt: skip


def train(given: argparse.Namespace, way: Way, seed: int) -> Path:
    """Runs `faconv train` with one thread; a run that is there already is not done again."""
    run_dir = given.runs / f"{str(way).replace(',', '').replace(' ', '-')}-{seed}"
    run_dir.mkdir(parents=True, exist_ok=True)
    config = run_dir / "given.yaml"
    config.write_text(yaml.safe_dump(config_of(given, run_dir, way, seed)))
    command = [sys.executable, "-m", "faconv_hpc", "train", str(config), *(f"--set={text}" for text in given.set)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return run_dir


def forecasts(run_dir: Path, mesh: ProcessMesh, leads: int, window: int = WINDOW) -> Evaluation:
    """Free runs from dates spread over the test's runs."""
    return evaluate([run_dir], mesh, leads=leads, samples=SAMPLES, window=window)


def ratios(found: Evaluation, leads: int) -> list[float]:
    """Error over persistence's at each lead, mean of the variables."""
    return [mean(one.ratio for one in found.skills if one.lead == lead) for lead in range(1, leads + 1)]


def variances(found: Evaluation) -> list[float]:
    """Of the forecasts' anomalies over those of what came, at each lead, mean of the variables."""
    shares_LC = (found.metrics["activity"][:, 0] / found.metrics["truth_activity"][:, 0]) ** 2
    return [float(one) for one in shares_LC.mean(axis=1)]


def free_run_told(run_dir: Path, mesh: ProcessMesh, spin_up: int) -> str:
    """How two days of free run go."""
    found = forecasts(run_dir, mesh, TOLD[-1], spin_up)
    row, shares = ratios(found, TOLD[-1]), variances(found)
    errors, spreads = (", ".join(f"{one[hour - 1]:.2f}" for hour in TOLD) for one in (row, shares))
    hours = ", ".join(map(str, TOLD))
    return (
        f"{spin_up} hours of spin-up, after {hours} hours: error {errors} of persistence's (at most {max(row):.2f}), "
        f"variance {spreads} of the truth's"
    )


def _schedule(text: str) -> dict[float, int]:
    return {float(share): int(leads) for share, leads in (part.split(":") for part in text.split(",") if part)}


def given_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--steps", type=int, default=400, help="of the run on single steps")
    parser.add_argument("--seeds", type=int, default=3)
    told = "0.7:3,0.9:8 is 3 leads from 70 %% on, ...; empty: none"
    parser.add_argument("--schedule", type=_schedule, default={0.7: 3}, help=told)
    parser.add_argument("--weight", type=float, default=1.0, help="of the leads after the first in the loss")
    parser.add_argument("--stateful", type=int, default=0, help="windows in a row; also with states carried on")
    parser.add_argument("--noise", type=float, action="append", default=[], help="on the inputs of all but the first")
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the config of all runs")
    parser.add_argument("--at-once", type=int, default=2, help="runs side by side")
    return parser.parse_args(arguments)


def main() -> None:
    given = given_of()
    ways = list(ways_of(given))
    jobs = [(way, seed) for seed in range(given.seeds) for way in ways]
    with ThreadPoolExecutor(given.at_once) as pool:
        runs = {str(way): {} for way in ways}
        for (way, seed), run_dir in zip(jobs, pool.map(lambda job: train(given, *job), jobs), strict=True):
            runs[str(way)][seed] = run_dir
    mesh = ProcessMesh.start(replicas=1, lat=1, lon=1)
    last = FAR.stop - 1
    found = {
        way: {seed: ratios(forecasts(run_dir, mesh, last), last) for seed, run_dir in of_seeds.items()}
        for way, of_seeds in runs.items()
    }
    console = Console(width=200)
    table = Table("training", "seed", "seconds", *(f"lead {lead}" for lead in range(1, FAR.stop)), "leads 6 to 12")
    for way, rows in found.items():
        for seed, row in rows.items():
            seconds = sum(record.seconds for record in read_records(runs[way][seed]))
            far = mean(row[lead - 1] for lead in FAR)
            table.add_row(way, str(seed), f"{seconds:.0f}", *(f"{one:.3f}" for one in row), f"{far:.3f}")
    console.print(table)
    single, *others = found
    for way in others:
        for name, leads in (("leads 6 to 12", FAR), ("lead 1", range(1, 2))):
            changes = [
                mean(found[way][seed][lead - 1] for lead in leads) / mean(row[lead - 1] for lead in leads) - 1
                for seed, row in found[single].items()
            ]
            told = f"{', '.join(f'{change:+.1%}' for change in changes)}; median {median(changes):+.1%}"
            console.print(f"{way}, {name}: {told}")
    for way, of_seeds in runs.items():
        for seed, run_dir in of_seeds.items():
            for spin_up in SPIN_UPS:
                console.print(f"{way}, seed {seed}, {free_run_told(run_dir, mesh, spin_up)}")
    (given.runs / "found.json").write_text(json.dumps(found, indent=1))
    mesh.stop()


if __name__ == "__main__":
    main()
