"""What the checksums of a store cost: its tiles read with them, and from a copy without, side by side.

Run: python tools/bench_store.py [--nlat 721] [--nlon 1440]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

from faconv_hpc.prepare.synthetic import SyntheticOptions, synthesise
from faconv_hpc.spatial.grid import Cuts, LatLonGrid

RUNS, FRAMES, CHANNELS, MESH = 7, 16, 4, (2, 2)


def without_checksums(source: Path, target: Path) -> Path:
    """The fields alone, in the same chunks."""
    with h5py.File(source, "r") as file, h5py.File(target, "w", libver="v110") as copy:
        fields = file["fields"]
        copy.create_dataset("fields", data=fields[:], chunks=fields.chunks)
    return target


def seconds(path: Path, slices: tuple[slice, slice]) -> float:
    """One reading of all frames of a tile, in the page cache."""
    began = time.perf_counter()
    with h5py.File(path, "r", locking=False) as file:
        for frame in range(FRAMES):
            np.asarray(file["fields"][frame : frame + 1, :, *slices])
    return time.perf_counter() - began


def main() -> None:
    """Prints the median of each, and of their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nlat", type=int, default=721)
    parser.add_argument("--nlon", type=int, default=1440)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        sizes = SyntheticOptions(options.nlat, options.nlon, CHANNELS, FRAMES)
        synthesise(store, sizes, mesh=MESH, frames_per_file=FRAMES)
        checked = store / "fields-00000.nc"
        plain = without_checksums(checked, Path(directory) / "plain.h5")
        tile = Cuts.even(LatLonGrid(options.nlat, options.nlon), *MESH).tile(0)
        pairs = [(seconds(checked, tile.slices), seconds(plain, tile.slices)) for _ in range(RUNS)]
    mib = FRAMES * CHANNELS * tile.shape[0] * tile.shape[1] * 4 / 2**20
    for name, values in zip(("with checksums", "without"), zip(*pairs, strict=True), strict=True):
        median = statistics.median(values)
        print(f"{name:15s} {1e3 * median:8.1f} ms for {mib:.0f} MiB, {mib / median / 1024:.2f} GiB/s")
    print(f"ratio {statistics.median(one / other for one, other in pairs):.2f} (median of {RUNS})")


if __name__ == "__main__":
    main()
