"""Regimes by embeddings of several seeds: on years that training has not seen, under noise, beside ConvLSTM and PCA.

Run: python tools/bench_regimes.py data/winds runs/winds   (the store: configs/regimes_winds.yaml)
     python tools/bench_regimes.py data/planted runs/planted --planted   (whose regimes are known; makes the store)

Each embedding is cut by k-means of its training years, and by a Gaussian mixture of one covariance; another time has
the regime that is nearest, or likeliest.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import xarray as xr
import yaml
from rich.console import Console
from rich.table import Table
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, silhouette_score

from faconv_hpc.config_file import load_config
from faconv_hpc.data.periods import frames_within, mask_of
from faconv_hpc.data.store import Store
from faconv_hpc.evaluation.regimes.embedding_file import read_embeddings
from faconv_hpc.evaluation.regimes.partitions import METHODS, Fit, Method, axes_for
from faconv_hpc.spatial.grid import Tile
from faconv_hpc.training.records import CONFIG_FILE

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"FAConvLSTM": {}, "ConvLSTM k=3": {"cell": "convlstm", "kernel_size": 3}}
NLAT, NLON, DAYS, KINDS, SCALES = 24, 48, 3000, 4, 5
TRUTH = "regime.npy"
"""Beside the planted store: which regime each day has."""


@dataclass(frozen=True, eq=False)
class Embedded:
    """Vectors of all times of a record, of one model and seed, and of the same record with noise."""

    clean_TE: np.ndarray
    noisy_TE: np.ndarray
    held_out: np.ndarray

    def labels(self, method: Method, clusters: int) -> tuple[np.ndarray, np.ndarray]:
        """Of clean times, and of noisy ones."""
        trained_TE = self.clean_TE[~self.held_out]
        axes = axes_for(method, trained_TE)
        best = Fit.best(axes(trained_TE), method, clusters, seeds=3)
        return best.predict(axes(self.clean_TE)), best.predict(axes(self.noisy_TE))


def planted(store: Path) -> None:
    """Daily height of some years: an annual cycle, waves that travel, and one of four patterns that come and go.

    A regime lasts 13 days on average, three at least; the next one may be any other. Its pattern holds as much
    variance as the waves do, the annual cycle as much as both.
    """
    draw = np.random.default_rng(0)
    lat, lon = np.linspace(87, -87, NLAT), np.arange(NLON) * 360 / NLON
    y, x = np.deg2rad(lat)[:, None], np.deg2rad(lon)[None]

    def smooth(phase: float | np.ndarray = 0.0) -> Iterable[np.ndarray]:
        for wavenumber in range(1, SCALES):
            shape = np.cos(y) ** wavenumber * (1 + draw.normal() * np.sin(y))
            yield draw.normal() * shape * np.cos(wavenumber * x + draw.uniform(0, 2 * np.pi) + phase * wavenumber)

    patterns = np.stack([sum(smooth()) for _ in range(KINDS)])
    patterns = (patterns - patterns.mean(0)) / patterns.std()
    regimes = [int(draw.integers(KINDS))]
    while len(regimes) < DAYS:
        regimes += [regimes[-1]] * (1 + int(draw.geometric(1 / 11)))
        regimes.append(int(regimes[-1] + draw.integers(1, KINDS)) % KINDS)
    regimes = np.array(regimes[:DAYS])
    days = np.arange(DAYS)[:, None, None]
    waves = sum(smooth(days / 9.0))
    red, states = np.zeros((DAYS, NLAT, NLON)), [sum(smooth()) for _ in range(40)]
    amounts = np.zeros(len(states))
    for day in range(DAYS):
        amounts = 0.8 * amounts + draw.normal(size=len(states))
        red[day] = np.tensordot(amounts, states, 1)
    season = np.sin(y) * np.cos(2 * np.pi * days / 365.25) + 0.5 * np.cos(y) * np.cos(4 * np.pi * days / 365.25)
    moving = waves / np.std(waves) + red / red.std()
    height = 100 * (patterns[regimes] + moving / np.std(moving) + 1.4 * season / np.std(season)) + 5000
    height += 10 * draw.normal(size=height.shape)
    named = {
        "time": ("time", np.arange(DAYS), {"units": "days since 2001-01-01"}),
        "latitude": ("latitude", lat, {"standard_name": "latitude"}),
        "longitude": ("longitude", lon, {"standard_name": "longitude"}),
    }
    field = (("time", "latitude", "longitude"), height.astype(np.float32), {"units": "m"})
    prepare(xr.Dataset({"height": field}, named), store)
    np.save(store / TRUTH, regimes)


def prepare(data: xr.Dataset, store: Path) -> None:
    """A store of it."""
    file = store.with_suffix(".nc")
    file.parent.mkdir(parents=True, exist_ok=True)
    data.to_netcdf(file, engine="h5netcdf")
    faconv("data", "prepare", str(file), "--output", str(store))
    file.unlink()


def fields_of(store: Store) -> np.ndarray:
    """(time, channel, lat, lon) all there is."""
    nlat, nlon = store.layout.grid_shape
    fields_TCYX, _ = store.read(range(store.frames), Tile((0, nlat), (0, nlon)), range(len(store.channels)))
    return fields_TCYX


def with_noise(store: Store, share: float, noisy: Path) -> None:
    """The same fields, each value and some of its variable's deviation that means nothing."""
    fields_TCYX, time = fields_of(store), store.layout.time
    told = {"units": "seconds since 1970-01-01", "calendar": time.calendar}
    data = xr.Dataset(
        coords={
            "time": ("time", time.seconds, told),
            "latitude": ("latitude", store.latitude_deg, {"standard_name": "latitude"}),
            "longitude": ("longitude", store.longitude_deg, {"standard_name": "longitude"}),
        }
    )
    draw = np.random.default_rng(1)
    for place, (name, units) in enumerate(zip(store.channels, store.units, strict=True)):
        values = fields_TCYX[:, place] + share * store.std[place] * draw.normal(size=fields_TCYX[:, place].shape)
        data[name] = ("time", "latitude", "longitude"), values.astype(np.float32), {"units": units}
    prepare(data, noisy)


def faconv(*words: str) -> None:
    command = [sys.executable, "-m", "faconv_hpc", *words]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"faconv {' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def config_of(given: argparse.Namespace) -> dict[str, Any]:
    """The winds' recipe; days are of an anomaly, of which a window sees more."""
    tree = yaml.safe_load((ROOT / "configs" / "regimes_winds.yaml").read_text())
    if given.planted:
        years = {"validation": "2006-03-01/2007-02-28", "test": "2007-03-01/"}
        tree["data"] |= {"window": 8, "periods": years, "anomalies": {"height": 2}}
        tree["model"] |= {"attention_every": 0, "scale_factor": 2, "embedding_channels": 32, "coarse_shape": [6, 12]}
        tree["training"] |= {"steps": 1200, "warmup_steps": 60, "validate_every": 0}
    tree["data"]["store"] = str(given.store)
    return tree


def trained(given: argparse.Namespace, model: str, seed: int) -> Path:
    """The run; one that is there already is not done again."""
    run_dir = given.runs / f"{model.replace(' ', '-')}-{seed}"
    tree = config_of(given) | {"run_dir": str(run_dir)}
    tree["model"] |= MODELS[model]
    tree["training"] |= {"seed": seed, "keep_best": False}
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "given.yaml").write_text(yaml.safe_dump(tree))
    faconv("train", str(run_dir / "given.yaml"), *(f"--set={text}" for text in given.set))
    for name, store in (("clean", given.store), ("noisy", noisy_of(given))):
        faconv("embed", str(run_dir), "--data", str(store), "--output", str(run_dir / f"{name}.nc"))
    return run_dir


def noisy_of(given: argparse.Namespace) -> Path:
    return given.runs / "noisy"


def by_network(run_dir: Path, held_out: np.ndarray, first: int) -> Embedded:
    """What a run has embedded."""
    clean, noisy = (read_embeddings(run_dir / f"{name}.nc").z_TE for name in ("clean", "noisy"))
    return Embedded(clean, noisy, held_out[first:])


def by_components(given: argparse.Namespace, held_out: np.ndarray, first: int, count: int) -> Embedded:
    """The first principal components of anomalies, weighted by area, of the years of training."""
    found = []
    for path in (given.store, noisy_of(given)):
        with Store.open(path) as store:
            weight_Y = np.sqrt(np.cos(np.deg2rad(store.latitude_deg)).clip(0))
            values = (fields_of(store) - store.mean[:, None, None]) / store.std[:, None, None] * weight_Y[:, None]
        if given.planted:  # less the same annual cycle as the network's
            values = values - annual_cycle(values, held_out)
        found.append(values.reshape(len(values), -1)[first:])
    held_out = held_out[first:]
    fit = PCA(count, random_state=0).fit(found[0][~held_out])
    return Embedded(fit.transform(found[0]), fit.transform(found[1]), held_out)


def annual_cycle(values_TCYX: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Two harmonics, by least squares of the years of training."""
    angle = 2 * np.pi * np.arange(len(values_TCYX)) / 365.25
    waves = np.stack([np.ones_like(angle), *(f(k * angle) for k in (1, 2) for f in (np.sin, np.cos))], 1)
    flat = values_TCYX.reshape(len(values_TCYX), -1)
    return (waves @ np.linalg.lstsq(waves[~held_out], flat[~held_out], rcond=None)[0]).reshape(values_TCYX.shape)


def spread(values: Sequence[float]) -> str:
    """Mean, and the least and the most where there are several."""
    return f"{mean(values):.2f}" + (f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else "")


def row(found: Sequence[Embedded], method: Method, clusters: int, known_T: np.ndarray) -> Iterable[str]:
    """Over seeds: what is known of held-out times, what seeds agree on, what noise changes."""
    labels = [one.labels(method, clusters) for one in found]
    held_out = found[0].held_out
    yield spread(
        [apart(one.clean_TE[held_out], clean[held_out]) for one, (clean, _) in zip(found, labels, strict=True)]
    )
    pairs = [float(adjusted_rand_score(one, other)) for (one, _), (other, _) in combinations(labels, 2)]
    yield spread(pairs) if pairs else "-"
    yield spread([float((clean != noisy).mean()) for clean, noisy in labels])
    yield spread([float(adjusted_rand_score(known_T[held_out], clean[held_out])) for clean, _ in labels])
    yield spread([told_by(known_T, clean) for clean, _ in labels])


def apart(points_TE: np.ndarray, labels_T: np.ndarray) -> float:
    """Silhouette; 0 where all have the same label."""
    return float(silhouette_score(points_TE, labels_T)) if len(np.unique(labels_T)) > 1 else 0.0


def told_by(known_T: np.ndarray, labels_T: np.ndarray) -> float:
    """Share of times whose label is the commonest of those of which the same is known."""
    return sum(np.bincount(labels_T[known_T == one]).max() for one in np.unique(known_T)) / len(known_T)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument(
        "--planted", action="store_true", help="a store whose regimes are known; made if it is not there"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--clusters", type=int, nargs="+", default=[2, 3, 4, 5, 6])
    parser.add_argument("--noise", type=float, default=0.1, help="of each variable's deviation")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the config of all runs")
    parser.add_argument("--at-once", type=int, default=2, help="runs side by side")
    given = parser.parse_args()
    if given.planted and not given.store.exists():
        planted(given.store)
    with Store.open(given.store) as store:
        if not noisy_of(given).exists():
            with_noise(store, given.noise, noisy_of(given))
        axis, periods = store.layout.time, config_of(given)["data"]["periods"]
        held_out = mask_of(frames_within(axis, [str(periods[name]) for name in ("validation", "test")]), len(axis))
    jobs = [(model, seed) for seed in range(given.seeds) for model in MODELS]
    with ThreadPoolExecutor(given.at_once) as pool:
        runs = dict(zip(jobs, pool.map(lambda job: trained(given, *job), jobs), strict=True))
    first = load_config(runs[jobs[0]] / CONFIG_FILE).data.window - 1
    known_T = np.load(given.store / TRUTH)[first:] if given.planted else axis.months[first:]
    found = {model: [by_network(runs[model, seed], held_out, first) for seed in range(given.seeds)] for model in MODELS}
    found["PCA"] = [by_components(given, held_out, first, found["FAConvLSTM"][0].clean_TE.shape[1])]
    what = "planted regimes" if given.planted else "months"
    table = Table(
        "K", "by", "embedding", "silhouette, held-out", "seeds agree (ARI)", "labels that noise changes",
        f"ARI with {what}, held-out", f"told by {what}",
    )  # fmt: skip
    for clusters in given.clusters:
        for method, name in METHODS.items():
            for model, those in found.items():
                table.add_row(str(clusters), name, model, *row(those, method, clusters, known_T))
    Console(width=220).print(table)


if __name__ == "__main__":
    main()
