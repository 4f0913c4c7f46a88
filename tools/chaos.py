"""Trains while it kills, stops, signals and damages what it trains, and proves that nothing is lost.

A small network is trained on the data of a config, on several processes, once undisturbed; then again and again with
one fault at a random instant of every start, until it reaches the same last step. Afterwards, and after every fault:

* every checkpoint that counts as whole holds, bit for bit, what the undisturbed run had at that step;
* the others are there because this tool damaged them, and are passed over by name;
* no start is left hanging; at most one save interval is lost (two where saving goes on in the background), and
  nothing where SIGTERM has asked to stop; a rank that was stopped is named;
* the final weights equal those of the undisturbed run to the last bit.

Run: python tools/chaos.py                               200 kills during saves, 100 other faults: some 40 minutes
     python tools/chaos.py --saves 10 --others 10        a short one
Faults of a full disk need root (a small tmpfs is mounted); they are left out without.
"""

import argparse
import collections
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from faconv_hpc.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_STOPPED
from faconv_hpc.spatial.environment import RankEnvironment, free_port
from faconv_hpc.training.records import read_records
from faconv_hpc.training.shards import UNFINISHED, Checkpoint, checkpoints_in
from faconv_hpc.training.trainer import UNSAVED

STEPS, INTERVAL = 24, 2
TIMEOUT_S = 10  # of the run, the least it allows
HANG_S = TIMEOUT_S + 60  # what is promised for a rank that stops answering
GRACE_S = 8  # a launcher kills those who do not leave after the first
SMALL = {
    "model": "{hidden_channels: 8, layers: 1, attention_every: 2, attention_heads: 1, embedding_channels: 16, "
    "kernels: eager}",
    "data.window": "2",
    "training.steps": str(STEPS),
    "training.warmup_steps": "2",
    "training.keep_last": "1000",
    "training.give_up_after": "0",
    "training.timeout_s": str(TIMEOUT_S),
    "training.shard_mib": "0",  # every rank writes
}
PRELOADED = ["torch", "torch._dynamo", "deepspeed", "faconv_hpc.cli.app", "faconv_hpc.training.trainer"]
DISK_MIB = 24
SAVE_S = 0.024  # kills fall within so long after a save has begun to write


class BrokenPromiseError(AssertionError):
    """Something was lost, mixed up, or left hanging."""


class Job:
    """One start of the run: a process for every rank, forked from one that has imported everything."""

    def __init__(self, chaos: "Chaos", run_dir: Path, *, background: bool = False, interval: int = INTERVAL) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        options = SMALL | {"run_dir": str(run_dir), "training.save_in_background": str(background).lower()}
        options["training.checkpoint_every"] = str(interval)
        options["mesh"] = f"{{replicas: 1, lat: {chaos.ranks // 2}, lon: 2}}"
        arguments = [
            "train",
            str(chaos.config),
            *(part for item in options.items() for part in ("--set", "=".join(item))),
        ]
        port = free_port()
        self.run_dir, self.patience = run_dir, chaos.patience
        self.log = chaos.directory / f"{run_dir.name}.log"  # never on the disk that is filled
        self.signalled = False
        self.printed = self.log.stat().st_size if self.log.exists() else 0  # by earlier starts
        self.records = _signature(run_dir)
        self.stopped: list[int] = []
        self.killed: list[int] = []
        self.ranks = [
            context.Process(target=_rank_main, args=(rank, chaos.ranks, port, arguments, str(self.log)), daemon=True)
            for rank in range(chaos.ranks)
        ]
        for process in self.ranks:
            process.start()

    def send(self, rank: int, number: int) -> None:
        """A signal to one rank."""
        pid = self.ranks[rank].pid
        assert pid is not None, f"rank {rank} was not started"
        self.signalled = True
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)

    @property
    def told(self) -> str:
        """What this start has printed."""
        return self.log.read_bytes()[self.printed :].decode(errors="replace")

    @property
    def over(self) -> bool:
        return all(process.exitcode is not None for process in self.ranks)

    def wait(self) -> list[int]:
        """Exit codes of all ranks, ended as a launcher would; raises where some do not leave, or make no step."""
        deadline, last, failed = time.monotonic() + HANG_S, 0, False
        while not self.over and time.monotonic() < deadline and not self.killed:
            if not failed and any(process.exitcode not in (None, 0) for process in self.ranks):
                failed, deadline = True, time.monotonic() + GRACE_S * self.patience
            elif not failed and (step := _last_step(self.run_dir)) != last:
                last, deadline = step, time.monotonic() + HANG_S * self.patience
            time.sleep(0.02)
        self.killed = [rank for rank, process in enumerate(self.ranks) if process.exitcode is None]
        for process in self.ranks:
            process.kill()
            process.join()
        if len(self.killed) > len(self.stopped):
            raise BrokenPromiseError(f"ranks {self.killed} do not leave after a fault; see {self.log}")
        return [process.exitcode or 0 for process in self.ranks]


def _rank_main(rank: int, ranks: int, port: int, arguments: list[str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(RankEnvironment(rank, ranks, rank, port=port).variables())
    torch.set_num_threads(1)
    signal.signal(signal.SIGRTMIN, _raise)
    from faconv_hpc.cli.app import main

    sys.argv = ["faconv", *arguments]
    main()


def _raise(number: int, frame: object) -> None:
    raise RuntimeError("an exception that chaos.py has raised")


class Chaos:
    """The faults that are still to come, and what has been seen so far."""

    def __init__(self, options: argparse.Namespace, directory: Path, disk: Path | None) -> None:
        self.config, self.directory, self.disk = options.config, directory, disk
        self.patience, self.ranks = options.patience, options.ranks
        self.random = random.Random(options.seed)
        self.left = collections.Counter({"kill during a save": options.saves, **self._dealt(options.others)})
        self.done: collections.Counter[str] = collections.Counter()
        self.most_lost = 0
        self.starts = 0
        self.turn = 0
        self.reference: dict[int, dict[str, torch.Tensor]] = {}

    def _dealt(self, others: int) -> dict[str, int]:
        kinds = dict.fromkeys(FAULTS, 0)
        usable = [kind for kind in ORDER if kind != "full disk" or self.disk is not None]
        for number in range(others):
            kinds[usable[number % len(usable)]] += 1
        return kinds

    def run(self) -> None:
        """The undisturbed run, then disturbed ones until no fault is left."""
        self._undisturbed()
        number = 0
        while sum(self.left.values()):
            number += 1
            self._disturbed(number)

    def _undisturbed(self) -> None:
        run_dir = self.directory / "undisturbed"
        codes = Job(self, run_dir, interval=1).wait()
        if any(codes):
            raise BrokenPromiseError(f"the undisturbed run failed: {codes}; see {self.directory / 'undisturbed.log'}")
        for one in checkpoints_in(run_dir):
            self.reference[one.step] = _state(one)

    def _disturbed(self, number: int) -> None:
        full = self.left["full disk"] > 0 and self.disk is not None
        run_dir = (self.disk if full and self.disk is not None else self.directory) / f"run-{number}"
        background = number % 2 == 0
        damaged: set[str] = set()
        ever: set[str] = set()
        passed_over: set[str] = set()
        while True:
            self.starts += 1
            kind = self._next_kind()
            left_over = set(_unfinished(run_dir))
            job = Job(self, run_dir, background=background)
            injected = bool(kind) and self._wait_and_inject(kind, job, run_dir, damaged, left_over)
            codes = job.wait()
            ever |= damaged
            self._undo(run_dir)
            self._check(run_dir, damaged, background, kind)
            if injected:
                self.left[kind] -= 1
                self.done[kind] += 1
                self._say(kind, run_dir, codes)
            for rank in job.stopped if kind == "stopped rank" and injected else ():
                if not re.search(rf"rank {rank}(, which all ranks meet at,)? has not answered for", job.told):
                    raise BrokenPromiseError(f"the stopped rank {rank} is not named in {job.log}")
            passed_over |= {name for name in ever if f"passed over {run_dir}/checkpoints/{name}" in job.told}
            if all(code == EXIT_OK for code in codes):
                break
            if any(codes) and not job.signalled and not injected:
                raise BrokenPromiseError(f"exit codes {codes} without a fault; see {job.log}")
        if ever != passed_over:
            raise BrokenPromiseError(f"{ever - passed_over} were not passed over by name; see {job.log}")
        final = checkpoints_in(run_dir)[-1]
        if final.step != STEPS or final.problem():
            raise BrokenPromiseError(f"{run_dir} ended without the checkpoint of step {STEPS}")
        steps = [record.step for record in read_records(run_dir)]
        if steps != list(range(1, STEPS + 1)):
            raise BrokenPromiseError(f"{run_dir} has records of steps {steps}")
        shutil.rmtree(run_dir)

    def _next_kind(self) -> str:
        kinds = sorted(kind for kind, count in self.left.items() if count > 0)
        weights = [self.left[kind] for kind in kinds]
        return self.random.choices(kinds, weights)[0] if kinds else ""

    def _wait_and_inject(self, kind: str, job: Job, run_dir: Path, damaged: set[str], left_over: set[str]) -> bool:
        """Whether the fault has taken place as it was meant."""
        first = _last_step(run_dir)
        rank = self.turn % self.ranks
        if kind == "kill during a save":
            done = self._kill_in_save(job, run_dir, rank, left_over)
        else:
            wanted = first + self.random.randint(1, 2 * INTERVAL)
            while kind != "kill at the start" and not job.over and _last_step(run_dir) < wanted:
                time.sleep(0.002)
            time.sleep(self.random.uniform(0, 0.1))
            done = not job.over and FAULTS[kind](self, job, run_dir, rank, damaged)
        self.turn += done
        return done

    def _kill_in_save(self, job: Job, run_dir: Path, rank: int, seen: set[str]) -> bool:
        """Counts only if the checkpoint was neither finished nor unbegun: its unfinished directory is left."""
        delay_s = self.random.uniform(0, SAVE_S)
        skipped = self.random.randint(0, 2)
        while not job.over:
            new = set(_unfinished(run_dir)) - seen
            seen |= new
            if new and skipped == 0:
                begun = time.perf_counter()
                while time.perf_counter() - begun < delay_s:
                    pass
                job.send(rank, signal.SIGKILL)
                job.wait()
                return bool(set(_unfinished(run_dir)) & new)
            skipped -= bool(new)
            time.sleep(0.0005)  # or this tool keeps a core from the ranks
        return False

    def _undo(self, run_dir: Path) -> None:
        (run_dir.parent / "ballast").unlink(missing_ok=True)

    def _check(self, run_dir: Path, damaged: set[str], background: bool, kind: str) -> None:
        """All promises about what is on disk."""
        newest = 0
        for one in checkpoints_in(run_dir):
            problem = one.problem()
            if problem is not None:
                if one.path.name not in damaged:
                    raise BrokenPromiseError(f"{one.path} is not whole, and was not damaged by this tool: {problem}")
                continue
            damaged.discard(one.path.name)  # written anew
            if not _equal(_state(one), self.reference[one.step]):
                raise BrokenPromiseError(f"{one.path} holds other numbers than the undisturbed run at that step")
            newest = one.step
        allowed = INTERVAL * (2 if background else 1) * (UNSAVED if kind == "full disk" else 1)
        if kind not in FILE_FAULTS and not damaged:
            lost = _last_step(run_dir) - newest
            self.most_lost = max(self.most_lost, lost)
            if lost > allowed:
                raise BrokenPromiseError(f"{lost} steps lost in {run_dir}, at most {allowed} are allowed")

    def _say(self, kind: str, run_dir: Path, codes: list[int]) -> None:
        total = sum(self.done.values())
        print(f"{total:4d}  {kind}, {run_dir.name}: exit codes {codes}", flush=True)


def _kill(chaos: Chaos, job: Job, run_dir: Path, rank: int, damaged: set[str]) -> bool:
    job.send(rank, signal.SIGKILL)
    return True


def _kill_at_start(chaos: Chaos, job: Job, run_dir: Path, rank: int, damaged: set[str]) -> bool:
    """Before the ranks have met, or while they load: those who wait for it are ended by their launcher."""
    time.sleep(chaos.random.uniform(0, 4))
    if job.over or _signature(run_dir) != job.records:
        return False  # there was nothing left to do, or it trains already, and all ranks must leave
    job.send(rank, signal.SIGKILL)
    job.stopped += range(chaos.ranks)
    return True


def _stop(chaos: Chaos, job: Job, run_dir: Path, rank: int, damaged: set[str]) -> bool:
    job.send(rank, signal.SIGSTOP)
    job.stopped.append(rank)
    return True


def _ask(number: signal.Signals, code: int) -> Callable[..., bool]:
    """A signal to all ranks, as Slurm and a terminal send it, or to one: nothing at all is lost."""

    def fault(chaos: Chaos, job: Job, run_dir: Path, rank: int, damaged: set[str]) -> bool:
        for one in range(chaos.ranks) if chaos.random.random() < 0.5 else (rank,):
            job.send(one, number)
        codes = job.wait()
        if not set(codes) <= {code, EXIT_OK}:
            raise BrokenPromiseError(f"exit codes {codes} after {number.name}, {code} is documented; see {job.log}")
        newest, last = [one for one in checkpoints_in(run_dir) if one.problem() is None][-1:], _last_step(run_dir)
        if [one.step for one in newest] != [last]:
            raise BrokenPromiseError(
                f"stopped by {number.name} after step {last}, but {newest} is saved; see {job.log}"
            )
        return True

    return fault


def _except(chaos: Chaos, job: Job, run_dir: Path, rank: int, damaged: set[str]) -> bool:
    """An exception on one rank ends all in 10 s."""
    began = time.monotonic()
    job.send(rank, signal.SIGRTMIN)
    codes = job.wait()
    seconds = time.monotonic() - began
    if codes[0] == EXIT_OK:
        return False  # all was done, and the first rank gone
    if any(codes) and (seconds > 10 * job.patience or set(codes) != {EXIT_FAILED}):
        raise BrokenPromiseError(f"exit codes {codes} {seconds:.1f} s after an exception; see {job.log}")
    return any(codes)


def _fill_disk(chaos: Chaos, job: Job, run_dir: Path, rank: int, damaged: set[str]) -> bool:
    """All of the small file system but a few bytes, until the run has noticed."""
    if chaos.disk is None or chaos.disk not in run_dir.parents:
        return False
    with (run_dir.parent / "ballast").open("wb", buffering=0) as ballast:
        size = 2**20
        while size >= 1024:
            try:
                ballast.write(b"x" * size)
            except OSError:
                size //= 2
    codes = job.wait()
    if any(codes) and "No space left on device" not in job.told:
        raise BrokenPromiseError(f"a full disk was not told; see {job.log}")
    return any(codes)


def _damage(how: Callable[[list[Path], random.Random], object]) -> Callable[..., bool]:
    """A fault of files: kill a rank, then spoil the newest checkpoint."""

    def fault(chaos: Chaos, job: Job, run_dir: Path, rank: int, damaged: set[str]) -> bool:
        job.send(rank, signal.SIGKILL)
        if not any(job.wait()):
            return False  # it came too late: all was done, and no start is left that would pass it over
        sound = [one for one in checkpoints_in(run_dir) if one.problem() is None]
        if len(sound) < 2:
            return False  # one must be left to go on from
        how(sorted(sound[-1].path.glob("shard-*")), chaos.random)
        damaged.add(sound[-1].path.name)
        return True

    return fault


def _truncate(shards: list[Path], rng: random.Random) -> None:
    shard = rng.choice(shards)
    shard.write_bytes(shard.read_bytes()[: rng.randrange(shard.stat().st_size)])


def _flip(shards: list[Path], rng: random.Random) -> None:
    path = rng.choice([*shards, shards[0].with_name("manifest.json"), shards[0].with_name("SHA256SUMS")])
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def _swap(shards: list[Path], rng: random.Random) -> None:
    one, other = rng.sample(shards, 2)
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


FAULTS: dict[str, Callable[..., bool]] = {
    "kill during a step": _kill,
    "kill at the start": _kill_at_start,
    "stopped rank": _stop,
    "SIGTERM": _ask(signal.SIGTERM, EXIT_STOPPED),
    "Ctrl-C": _ask(signal.SIGINT, EXIT_INTERRUPTED),
    "exception": _except,
    "full disk": _fill_disk,
    "truncated shard": _damage(_truncate),
    "flipped bit": _damage(_flip),
    "deleted shard": _damage(lambda shards, rng: rng.choice(shards).unlink()),
    "swapped shards": _damage(_swap),
}
FILE_FAULTS = ("truncated shard", "flipped bit", "deleted shard", "swapped shards")
ORDER = [
    "kill during a step", "SIGTERM", "exception", "flipped bit", "kill at the start", "truncated shard", "full disk",
    "stopped rank", "Ctrl-C", "kill during a step", "deleted shard", "SIGTERM", "swapped shards",
]  # fmt: skip


def _unfinished(run_dir: Path) -> list[str]:
    try:
        return [path.name for path in (run_dir / "checkpoints").iterdir() if UNFINISHED.fullmatch(path.name)]
    except FileNotFoundError:
        return []


def _signature(run_dir: Path) -> tuple[int, int]:
    """Of the records of steps: it changes with the first step of a start, or before."""
    try:
        status = (run_dir / "steps.jsonl").stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _last_step(run_dir: Path) -> int:
    """Of the last whole line of the log; a kill may have cut the last one short."""
    try:
        lines = (run_dir / "steps.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except json.JSONDecodeError:
            continue
    return 0


def _state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return checkpoint.parameters() | checkpoint.moments()


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@contextmanager
def small_disk() -> Iterator[Path | None]:
    """A file system of `DISK_MIB`; None where it cannot be mounted."""
    with tempfile.TemporaryDirectory() as directory:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", directory]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
            yield None
            return
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", "--lazy", directory], check=False)


def main() -> None:
    """Prints one line per fault and a table of what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart_era5.yaml"), help="gives the data")
    parser.add_argument("--saves", type=int, default=200, help="kills during saves")
    parser.add_argument("--others", type=int, default=100, help="other faults, of all kinds in turn")
    parser.add_argument("--ranks", type=int, default=4, choices=(2, 4), help="of the run")
    parser.add_argument("--patience", type=float, default=1.0, help="factor on all time limits, for a busy machine")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # for the fork server
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, small_disk() as disk:
        chaos = Chaos(options, Path(directory), disk)
        try:
            chaos.run()
        except BrokenPromiseError as error:
            kept = tempfile.mkdtemp()
            for source in (directory, disk) if disk is not None else (directory,):
                shutil.copytree(source, kept, dirs_exist_ok=True)
            raise SystemExit(f"BROKEN after {sum(chaos.done.values())} faults: {error}\nkept in {kept}") from None
    table = Table(title=f"{chaos.starts} starts of a run on {chaos.ranks} processes, {time.monotonic() - began:.0f} s")
    for column in ("fault", "times"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for kind, times in chaos.done.items():
        table.add_row(kind, str(times))
    Console().print(table)
    print(
        f"PASS: {sum(chaos.done.values())} faults, 0 checkpoints that load wrongly, 0 mixtures, 0 hangs, at most "
        f"{chaos.most_lost} steps lost (saved every {INTERVAL}), all final weights bit-identical to the undisturbed run"
    )


if __name__ == "__main__":
    main()
