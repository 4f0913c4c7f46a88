"""What saving costs beside a training step, side by side in one run, for the network and data of a config.

Run: torchrun --standalone --nproc-per-node 2 tools/bench_checkpoint.py [CONFIG]
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from faconv_hpc import ProcessMesh, RunConfig, load_config
from faconv_hpc.config import TrainingConfig
from faconv_hpc.data.store import Store
from faconv_hpc.training.carried import CarriedStates
from faconv_hpc.training.checkpoint import CheckpointWriter
from faconv_hpc.training.engine import Engine
from faconv_hpc.training.objective import losses_of
from faconv_hpc.training.resume import Resumed, resume
from faconv_hpc.training.schedule import legs_of
from faconv_hpc.training.setup import Workspace, build_network, order_of
from faconv_hpc.training.shards import checkpoints_in

RUNS = 7
DEFAULT = Path("configs/quickstart_era5.yaml")


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(config: RunConfig, mesh: ProcessMesh) -> dict[str, list[float]]:
    """Times of a step, and of what it waits for where a checkpoint is due; `RUNS` of each, taken in turn."""
    workspace = Workspace.of(config, Store.open(config.data.store), mesh)
    windows, domain = workspace.training_windows(), workspace.domain
    engine = Engine(build_network(config, workspace.contract.channels), mesh, config.training)
    batch = windows.read([0]).to(mesh.device)

    def step() -> None:
        network = engine.network
        output = engine.forward(batch.inputs_BTCYX, batch.year_fraction_BT, domain)
        engine.backward(losses_of(network, output, batch, domain).total)
        engine.step(1e-3)

    def writer(background: bool) -> CheckpointWriter:
        training = config.training.model_copy(update={"save_in_background": background, "keep_last": 2})
        changed = Workspace(
            config.model_copy(update={"training": training}), workspace.store, workspace.contract, domain
        )
        carried = CarriedStates(config, domain, order_of(config, windows))
        return CheckpointWriter(changed, engine, Resumed(), legs_of(changed.config, (), None), carried)

    foreground, background = writer(False), writer(True)
    times: dict[str, list[float]] = {"step": [], "saving": [], "saving in the background": [], "loading": []}
    step()
    for run in range(RUNS):
        times["step"].append(seconds(step))
        times["saving"].append(seconds(lambda run=run: foreground.save(2 * run + 1)))
        blocked = seconds(lambda run=run: background.save(2 * run + 2))
        step()
        times["saving in the background"].append(blocked + seconds(background.finish))
        times["loading"].append(seconds(lambda: resume(workspace, engine)))
    return times


def main() -> None:
    """Prints the table on the first rank."""
    config = load_config(sys.argv[1] if len(sys.argv) > 1 else DEFAULT)
    mesh = ProcessMesh.start(config.mesh.replicas, config.mesh.lat, config.mesh.lon)
    with mesh.guarded():
        directory = mesh.from_first(tempfile.mkdtemp())
        config = config.model_copy(update={"run_dir": Path(directory)})
        times = {name: statistics.median(values) for name, values in measure(config, mesh).items()}
        if mesh.rank == 0:
            interval = TrainingConfig.model_fields["checkpoint_every"].default
            size = sum(file.bytes for file in checkpoints_in(config.run_dir)[-1].manifest().files.values())
            table = Table(title=f"{mesh.ranks} ranks, {size / 1e6:.2f} MB, medians of {RUNS}")
            for column in ("what", "time [ms]", "of a step", f"of {interval} steps (the default interval)"):
                table.add_column(column, justify="left" if column == "what" else "right")
            for name, value in times.items():
                share = value / times["step"]
                table.add_row(name, f"{value * 1e3:.1f}", f"{share:.1%}", f"{share / interval:.4%}")
            Console().print(table)
    mesh.stop()


if __name__ == "__main__":
    main()
