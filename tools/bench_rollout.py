"""What training does for free runs: single steps, rollout late, and with states carried on, at equal time.

Run: python tools/bench_rollout.py data/shallow_water runs/rollout   (the store: see tools/shallow_water.py)
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median

import yaml
from rich.console import Console
from rich.table import Table

from faconv_hpc.evaluation.evaluate import evaluate
from faconv_hpc.spatial.mesh import ProcessMesh
from faconv_hpc.training.records import read_records

WINDOW = 8
SINGLE, STATEFUL = "single steps", "states through {} windows"
FAR = range(6, 13)
SAMPLES = 48  # forecasts, spread over the runs of the test
SPIN_UPS, HOURS = (4, 8, 40), 48


def steps_of(given: argparse.Namespace, kind: str) -> tuple[int, dict[int, int]]:
    """Steps and schedule of the same number of time steps of the network: free leads lengthen a window."""
    if kind == SINGLE:
        return given.steps, {}
    shares, leads = [0.0, *given.schedule, 1.0], [1, *given.schedule.values()]
    cost = sum((WINDOW + n - 1) / WINDOW * (b - a) for a, b, n in zip(shares[:-1], shares[1:], leads, strict=True))
    fewer = round(given.steps / cost)
    return fewer, {round(share * fewer): leads for share, leads in given.schedule.items()}


def config_of(given: argparse.Namespace, run_dir: Path, kind: str, seed: int) -> dict:
    """Of a run on the first 48 sequences, tested on the others."""
    steps, rollout = steps_of(given, kind)
    periods = {"train": "sequences 000 to 047", "test": "sequences 048 to 055"}
    return {
        "run_dir": str(run_dir),
        "data": {"store": str(given.store), "window": WINDOW, "periods": periods, "lat_boundary": "pole"},
        "model": {"hidden_channels": 32, "embedding_channels": 16, "coarse_shape": [4, 8]},
        "training": {
            "steps": steps, "micro_batch": 2, "learning_rate": given.rate, "seed": seed, "rollout": rollout,
            "lead_weights": [given.weight] if rollout and given.weight != 1 else [],
            "stateful_windows": given.stateful if STATEFUL.format(given.stateful) in kind else 0,
        },
    }  # fmt: skip


def train(given: argparse.Namespace, kind: str, seed: int) -> Path:
    """Runs `faconv train` with one thread; a run that is there already is not done again."""
    run_dir = given.runs / f"{kind.replace(',', '').replace(' ', '-')}-{seed}"
    run_dir.mkdir(parents=True, exist_ok=True)
    config = run_dir / "given.yaml"
    config.write_text(yaml.safe_dump(config_of(given, run_dir, kind, seed)))
    command = [sys.executable, "-m", "faconv_hpc", "train", str(config), *(f"--set={text}" for text in given.set)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return run_dir


def ratios(run_dir: Path, mesh: ProcessMesh, leads: int, window: int = WINDOW) -> list[float]:
    """Error over persistence's at each lead, mean of the variables."""
    skills = evaluate([run_dir], mesh, leads=leads, samples=SAMPLES, window=window).skills
    return [mean(one.ratio for one in skills if one.lead == lead) for lead in range(1, leads + 1)]


def _schedule(text: str) -> dict[float, int]:
    return {float(share): int(leads) for share, leads in (part.split(":") for part in text.split(","))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--steps", type=int, default=400, help="of the run on single steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--schedule", type=_schedule, default={0.7: 3}, help="0.7:3,0.9:8 is 3 leads from 70 %% on, ..."
    )
    parser.add_argument("--weight", type=float, default=1.0, help="of the leads after the first in the loss")
    parser.add_argument("--stateful", type=int, default=0, help="windows in a row; also with states carried on")
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the config of all runs")
    parser.add_argument("--at-once", type=int, default=2, help="runs side by side")
    given = parser.parse_args()
    told = " then ".join(f"{leads} leads from {share:g}" for share, leads in given.schedule.items())
    kinds = [SINGLE, f"{told}, weight {given.weight:g}"]
    kinds += [f"{kinds[1]}, {STATEFUL.format(given.stateful)}"] * bool(given.stateful)
    jobs = [(kind, seed) for seed in range(given.seeds) for kind in kinds]
    with ThreadPoolExecutor(given.at_once) as pool:
        runs = dict(zip(jobs, pool.map(lambda job: train(given, *job), jobs), strict=True))
    mesh = ProcessMesh.start(replicas=1, lat=1, lon=1)
    found = {job: ratios(run_dir, mesh, FAR.stop - 1) for job, run_dir in runs.items()}
    seconds = {job: sum(record.seconds for record in read_records(run_dir)) for job, run_dir in runs.items()}
    table = Table("training", "seed", "seconds", *(f"lead {lead}" for lead in range(1, FAR.stop)), "leads 6 to 12")
    for (kind, seed), row in found.items():
        far = mean(row[lead - 1] for lead in FAR)
        table.add_row(kind, str(seed), f"{seconds[kind, seed]:.0f}", *(f"{one:.3f}" for one in row), f"{far:.3f}")
    console = Console(width=200)
    console.print(table)
    for kind in kinds[1:]:
        for name, leads in (("leads 6 to 12", FAR), ("lead 1", range(1, 2))):
            pairs = [(found[kind, seed], found[SINGLE, seed]) for seed in range(given.seeds)]
            changes = [
                mean(new[lead - 1] for lead in leads) / mean(old[lead - 1] for lead in leads) - 1 for new, old in pairs
            ]
            told = f"{', '.join(f'{change:+.1%}' for change in changes)}; median {median(changes):+.1%}"
            console.print(f"{kind}, {name}: {told}")
    for kind in kinds:
        for spin_up in SPIN_UPS:
            row = ratios(runs[kind, 0], mesh, HOURS, spin_up)
            told = f"{row[0]:.3f} ... {row[-1]:.3f}, at most {max(row):.3f}"
            console.print(f"{kind}, {HOURS} hours after {spin_up} of spin-up: {told}")
    (given.runs / "found.json").write_text(json.dumps({f"{k} {s}": row for (k, s), row in found.items()}, indent=1))
    mesh.stop()


if __name__ == "__main__":
    main()
