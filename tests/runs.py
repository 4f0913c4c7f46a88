"""A small store and a small config, for tests that train."""

import hashlib
import json

import numpy as np
import yaml

from faconv_hpc import load_config
from faconv_hpc.data.store import Store
from faconv_hpc.evaluation.evaluate import evaluate
from faconv_hpc.prepare.synthetic import SyntheticOptions, synthesise
from faconv_hpc.spatial.grid import Tile
from faconv_hpc.training.fit import check_fits
from faconv_hpc.training.records import VALIDATION_FILE, read_records
from faconv_hpc.training.shards import MANIFEST, SUMS, checkpoints_in
from faconv_hpc.training.trainer import train
from ranks import Layout, run_on_ranks

ALONE = Layout(1, 1, 1)
SMALL = {
    "data": {"window": 3, "periods": {"test": "2000-01-04T06/"}, "lat_boundary": "pole"},
    "model": {
        "hidden_channels": 8, "layers": 2, "attention_every": 2, "attention_heads": 2, "embedding_channels": 16,
        "coarse_shape": [2, 3], "kernels": "eager",
    },
    "training": {"steps": 6, "warmup_steps": 2, "micro_batch": 1, "shard_mib": 0},  # every rank writes
}  # fmt: skip


def make_store(path, **options):
    """Travelling waves on 11 x 14 cells, 16 frames, of which 3 are kept from training."""
    synthesise(path, SyntheticOptions(**({"nlat": 11, "nlon": 14, "channels": 2, "frames": 16} | options)))
    return path


def fields_in(store):
    """(T, C, Y, X) all of it, of which nothing misses, with its times in seconds, latitudes and longitudes."""
    with Store.open(store) as opened:
        nlat, nlon = opened.layout.grid_shape
        whole = Tile((0, nlat), (0, nlon))
        fields, _ = opened.read(range(opened.frames), whole, range(len(opened.channels)))
        return fields, opened.layout.time.seconds, opened.latitude_deg, opened.longitude_deg


def write_config(directory, store, **sections):
    """A config file in ``directory`` whose run goes to ``directory / "run"``."""
    tree = {name: dict(section) for name, section in SMALL.items()}
    for name, section in sections.items():
        tree.setdefault(name, {}).update(section)
    tree["data"]["store"], tree["run_dir"] = str(store), str(directory / "run")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def skills_in(run_dir):
    """What its looks at the validation period said of variables."""
    rows = [json.loads(line) for line in (run_dir / VALIDATION_FILE).read_text().splitlines()]
    return [row for row in rows if "rmse" in row]


def rewrite_manifest(directory, change):
    """A checkpoint as another version would have left it: ``change`` gets what the manifest says."""
    tree = json.loads((directory / MANIFEST).read_text())
    change(tree)
    raw = json.dumps(tree).encode()
    (directory / MANIFEST).write_bytes(raw)
    lines = [line for line in (directory / SUMS).read_text().splitlines() if not line.endswith(MANIFEST)]
    lines.append(f"{hashlib.sha256(raw).hexdigest()}  {MANIFEST}")
    (directory / SUMS).write_text("".join(f"{line}\n" for line in sorted(lines, key=lambda one: one.split("  ")[1])))


def small_config(directory, store, **sections):
    """The same, loaded."""
    return load_config(write_config(directory, store, **sections))


def evaluated(config, mesh, leads=1, *, directory=None, **options):
    """What a run's forecasts are worth, by its newest checkpoint or that of a directory, on the store of its config."""
    return evaluate([directory or config.run_dir], mesh, data=[config.data.store], leads=leads, **options)


def trained(config, layout=ALONE):
    """The losses of a run that goes to its end, or goes on to it."""
    assert set(run_on_ranks(layout, lambda mesh: train(config, mesh))) == {0}
    return [record.loss for record in read_records(config.run_dir)]


def without_its_end(config, away):
    """As a kill after step 7 of 10 leaves a run: the checkpoint of step 5 is its newest."""
    checkpoints_in(config.run_dir)[-1].path.rename(away)


def assert_same_on_every_mesh(directory, config_of, rtol):
    """On one tile, on four, and from the checkpoint of those on two and two replicas; the losses.

    Args:
        config_of: of a directory and a layout.
    """
    tiles, others = Layout(1, 2, 2), Layout(2, 1, 2)
    want = trained(config_of(directory / "alone", ALONE))
    config = config_of(directory / "tiles", tiles)
    check_fits(config)
    np.testing.assert_allclose(trained(config, tiles), want, rtol=rtol)
    without_its_end(config, directory / "away")
    np.testing.assert_allclose(trained(config_of(directory / "tiles", others), others), want, rtol=rtol)
    return want
