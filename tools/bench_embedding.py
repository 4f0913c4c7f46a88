"""What embeddings are worth on held-out runs: no clock, not collapsed, the coarse field in them, causal; and the skill.

Run: python tools/bench_embedding.py data/shallow_water runs/embedding   (the store: docs/data.md)
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table

from faconv_hpc.config_file import load_config
from faconv_hpc.data.periods import evenly
from faconv_hpc.data.samples import Windows
from faconv_hpc.data.store import Store
from faconv_hpc.evaluation.evaluate import evaluate
from faconv_hpc.model.network import FAConvLSTMNetwork
from faconv_hpc.model.subspace import coarse_means
from faconv_hpc.spatial.mesh import ProcessMesh
from faconv_hpc.training.embeddings import effective_rank, probe_r2
from faconv_hpc.training.fit import training_starts
from faconv_hpc.training.loading import load_network
from faconv_hpc.training.records import CONFIG_FILE, read_records
from faconv_hpc.training.setup import Workspace

WINDOW, LEADS, FITTED, BATCH = 8, (1, 2, 4, 8), 448, 16
VARIANTS = {
    "as it is": [],
    "no seasonal encoding": ["model.seasonal_encoding=false"],
    "the coarse field now alone": ["model.embedding_leads=0"],
    "each step by itself": ["model.embedding_past=1"],
    "no loss of its own": ["model.embedding_weight=0"],
}


def train(given: argparse.Namespace, variant: str, seed: int) -> Path:
    """Runs `faconv train` with one thread; a run that is there already is not done again."""
    run_dir = given.runs / f"{variant.replace(' ', '-')}-{seed}"
    run_dir.mkdir(parents=True, exist_ok=True)
    periods = {"train": given.train, "test": given.test}
    config = {
        "run_dir": str(run_dir),
        "data": {"store": str(given.store), "window": WINDOW, "periods": periods, "lat_boundary": "pole"},
        "model": {"hidden_channels": 32, "embedding_channels": 32},
        "training": {"steps": given.steps, "micro_batch": 2, "learning_rate": given.rate, "seed": seed},
    }
    (run_dir / "given.yaml").write_text(yaml.safe_dump(config))
    sets = [f"--set={text}" for text in (*VARIANTS[variant], *given.set)]
    command = [sys.executable, "-m", "faconv_hpc", "train", str(run_dir / "given.yaml"), *sets]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return run_dir


@torch.no_grad()
def embedded(
    network: FAConvLSTMNetwork, workspace: Workspace, windows: Windows, later_N: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(N, E) z of the last step of each window, told so much of a year later, and (N, K) the coarse field then."""
    found = []
    for first in range(0, len(windows), BATCH):
        batch = windows.read(range(first, min(first + BATCH, len(windows)))).first(WINDOW)
        season_BT = batch.year_fraction_BT
        if later_N is not None:
            season_BT = season_BT + torch.from_numpy(later_N[first : first + BATCH, None])
        z_BTE = network(batch.inputs_BTCYX, season_BT, domain=workspace.domain).embedding_BTE
        last_B1CYX = batch.inputs_BTCYX[:, -1:, : network.field_channels]
        coarse, _ = coarse_means(last_B1CYX, workspace.domain, network.subspace.coarse_shape)
        found.append((z_BTE[:, -1].double().numpy(), coarse.double().flatten(1).numpy()))
    z_NE, x_NK = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return z_NE, x_NK


@torch.no_grad()
def follows(network: FAConvLSTMNetwork, workspace: Workspace, windows: Windows) -> float:
    """How much z of a time changes with what comes after it, over its deviation."""
    batch = windows.read([0])
    x, season, half = batch.inputs_BTCYX, batch.year_fraction_BT, WINDOW // 2
    other = torch.cat([x[:, :half], x[:, half:].flip(0, 1, -1)], dim=1)
    z, turned = (network(one, season, domain=workspace.domain).embedding_BTE for one in (x, other))
    return float((z - turned)[:, :half].abs().max() / z.std())


def changed_by_another_run(z_RDE: np.ndarray) -> float:
    """Variance between runs at a date over all of it: half the mean square of what another run's fields change."""
    return float(z_RDE.var(0, ddof=1).mean(0).sum() / z_RDE.reshape(-1, z_RDE.shape[-1]).var(0, ddof=1).sum())


def measured(run_dir: Path, mesh: ProcessMesh, samples: int) -> dict[str, float]:
    """Of held-out runs, all of the same dates; the probe is fitted to training's."""
    config, trained = load_config(run_dir / CONFIG_FILE, older=True), load_network(run_dir)
    workspace, network = Workspace.of(config, Store.open(config.data.store), mesh, trained.contract), trained.network
    held_out = workspace.forecast_windows(workspace.contract.test, 1)
    z_NE, x_NK = embedded(network, workspace, held_out)
    runs = 1 + int((np.diff(held_out.starts) > 1).sum())
    z_RDE = z_NE.reshape(runs, -1, z_NE.shape[-1])  # fails where runs are not equally long
    starts = training_starts(workspace.store, workspace.training_spans, WINDOW, 1)
    some = starts[evenly(len(starts), FITTED)]
    fitted = embedded(network, workspace, workspace.windows(some, WINDOW))
    dates = z_RDE.shape[1]
    turned_NE, _ = embedded(network, workspace, held_out, np.tile(np.arange(dates) / dates, runs))
    changed, changed_in_a_year = changed_by_another_run(z_RDE), changed_by_another_run(turned_NE.reshape(z_RDE.shape))
    leads = evaluate([run_dir], mesh, leads=max(LEADS), samples=samples).skills
    skill = {f"lead {lead}": mean(one.ratio for one in leads if one.lead == lead) for lead in LEADS}
    last = read_records(run_dir)[-40:]
    return skill | {
        "changed by another run": changed,
        "calendar": max(0.0, 1 - changed),
        "changed, dates all over a year": changed_in_a_year,
        "effective rank": effective_rank(z_NE),
        "R2": probe_r2(*fitted, z_NE, x_NK),
        "by what follows": follows(network, workspace, held_out),
        "forecast loss": mean(one.forecast_loss for one in last),
        "embedding loss": mean(one.embedding_loss for one in last),
        "seconds": sum(record.seconds for record in read_records(run_dir)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--train", default="sequences 000 to 047")
    parser.add_argument("--test", default="sequences 048 to 055", help="equally long, of the same dates")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate")
    parser.add_argument("--samples", type=int, default=48, help="forecasts, spread over the held-out runs")
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="so many of them")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the config of all runs")
    parser.add_argument("--at-once", type=int, default=2, help="runs side by side")
    given = parser.parse_args()
    jobs = [(variant, seed) for seed in range(given.seeds) for variant in list(VARIANTS)[: given.variants]]
    with ThreadPoolExecutor(given.at_once) as pool:
        runs = dict(zip(jobs, pool.map(lambda job: train(given, *job), jobs), strict=True))
    mesh = ProcessMesh.start(replicas=1, lat=1, lon=1)
    rows = {job: measured(run_dir, mesh, given.samples) for job, run_dir in runs.items()}
    table = Table("embedding", "seed", *next(iter(rows.values())))
    for (variant, seed), row in rows.items():
        table.add_row(variant, str(seed), *(f"{value:.3g}" for value in row.values()))
    Console(width=220).print(table)
    mesh.stop()


if __name__ == "__main__":
    main()
