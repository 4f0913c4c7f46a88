"""What the doctor finds: a verdict and a fix per thing, and how the findings of all ranks become one report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..errors import InputError

SOFTWARE, MACHINE, FILES, RANKS, NETWORK = "software", "machine", "files", "ranks", "network"
GROUPS = (SOFTWARE, MACHINE, FILES, RANKS, NETWORK)
SAME = 1.05  # times an amount is the same: one file system, asked twice
SHOWN = 8  # nodes, or ranks of one node, that a message names


class Verdict(IntEnum):
    """How bad it is; the worst verdict of a report is its exit code."""

    OK = 0
    WARNING = 1
    FAILURE = 2

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Subject:
    """What is examined.

    Attributes:
        directory: of the run, which need not be there yet.
        config: of the run, if one is given.
        quick: leave out write speed and large messages.
    """

    directory: Path
    config: RunConfig | None = None
    quick: bool = False

    @property
    def device(self) -> str:
        """That the run asks for."""
        return self.config.device if self.config else "auto"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        group: one of `GROUPS`.
        name: what was looked at.
        verdict: what is to be thought of it.
        value: what was found.
        fix: the way out, where the verdict is not ok.
        amount: the value as a number that may differ from node to node, less being worse; the least is reported.
        differs: the verdict if other ranks find another value.
    """

    group: str
    name: str
    verdict: Verdict
    value: str
    fix: str | None = None
    amount: float | None = None
    differs: Verdict = Verdict.OK

    def __post_init__(self) -> None:
        assert (self.fix is None) == (self.verdict is Verdict.OK), f"{self.name}: {self.verdict}, but fix={self.fix!r}"
        assert self.group in GROUPS, f"{self.name}: no group {self.group!r}"

    @classmethod
    def of_error(cls, group: str, name: str, error: InputError) -> "Finding":
        """A failure from a message of ours: its first sentence is what was found, the rest is the fix."""
        found, _, fix = str(error).partition(". ")
        return cls(
            group, name, Verdict.FAILURE, found.removesuffix("."), fix or f"Change what the {name} is made from."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values: group, name, verdict, value, fix (null where all is well)."""
        kept = {"group": self.group, "name": self.name, "verdict": str(self.verdict)}
        return kept | {"value": self.value, "fix": self.fix}


@dataclass(frozen=True)
class Report:
    """All findings, of all ranks.

    Attributes:
        nodes: the node of every rank.
        findings: one for each thing that was looked at, in the order of `GROUPS`.
    """

    nodes: tuple[str, ...]
    findings: tuple[Finding, ...]

    @classmethod
    def of(cls, nodes: Sequence[str], findings: Sequence[Finding]) -> "Report":
        """Sorted into groups; inside a group the order stays."""
        return cls(tuple(nodes), tuple(sorted(findings, key=lambda finding: GROUPS.index(finding.group))))

    @property
    def verdict(self) -> Verdict:
        """The worst of all."""
        return max((finding.verdict for finding in self.findings), default=Verdict.OK)

    @property
    def exit_code(self) -> int:
        """0 all is well, 1 something works worse than it could, 2 something that a run needs does not work."""
        return int(self.verdict)

    def count(self, verdict: Verdict) -> int:
        """How many findings have this verdict."""
        return sum(finding.verdict is verdict for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain values: verdict, exit_code, ranks, nodes (one entry for each), findings."""
        about = {"verdict": str(self.verdict), "exit_code": self.exit_code, "ranks": len(self.nodes)}
        nodes = list(dict.fromkeys(self.nodes))
        return about | {"nodes": nodes, "findings": [finding.to_json() for finding in self.findings]}


def merged(found: Sequence[Sequence[Finding]], nodes: Sequence[str]) -> list[Finding]:
    """One finding for each thing out of those of every rank, which need not have looked at the same things.

    Args:
        found: the findings of each rank.
        nodes: the node of each rank.

    Returns:
        In the order of their first appearance, the worst verdict of each; values that differ name who has them.
    """
    by_name: dict[tuple[str, str], dict[int, Finding]] = {}
    for rank, findings in enumerate(found):
        for finding in findings:
            by_name.setdefault((finding.group, finding.name), {})[rank] = finding
    return [_one_of(of_ranks, nodes) for of_ranks in by_name.values()]


def _one_of(of_ranks: Mapping[int, Finding], nodes: Sequence[str]) -> Finding:
    worst = max(of_ranks.values(), key=lambda finding: finding.verdict)
    values = {finding.value for finding in of_ranks.values()}
    if len(values) == 1:
        return worst
    group, name, verdict, fix = worst.group, worst.name, worst.verdict, worst.fix
    if worst.differs > verdict:
        verdict = worst.differs
        fix = "The ranks of a run must be alike: install the same on all nodes, or start them from the same directory."
    return Finding(group, name, verdict, _least(of_ranks, nodes) or _who_has_what(of_ranks, nodes), fix)


def _least(of_ranks: Mapping[int, Finding], nodes: Sequence[str]) -> str | None:
    """The least amount and whose it is, beside the largest; None where some rank found no amount."""
    amounts = {rank: finding.amount for rank, finding in of_ranks.items() if finding.amount is not None}
    if len(amounts) < len(of_ranks):
        return None
    least, most = min(amounts, key=lambda rank: amounts[rank]), max(amounts, key=lambda rank: amounts[rank])
    if amounts[most] < SAME * amounts[least]:
        return of_ranks[least].value
    return f"{of_ranks[least].value} on {nodes[least]}, the least of {len(amounts)}; most: {of_ranks[most].value}"


def _who_has_what(of_ranks: Mapping[int, Finding], nodes: Sequence[str]) -> str:
    """Every value with its ranks; those of a majority are only counted, so that the odd ones are seen."""
    by_value: dict[str, list[int]] = {}
    for rank, finding in of_ranks.items():
        by_value.setdefault(finding.value, []).append(rank)
    told = []
    for value, ranks in sorted(by_value.items(), key=lambda item: -len(item[1])):
        majority = 2 * len(ranks) > len(of_ranks)
        told.append(f"{value} on {f'the {len(ranks)} others' if majority else places(ranks, nodes)}")
    return "; ".join(reversed(told))


def places(ranks: Sequence[int], nodes: Sequence[str]) -> str:
    """Where ranks are, such as ``n1 (ranks 0, 1), n2 (rank 2)``; of many the first are named."""
    by_node: dict[str, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(nodes[rank], []).append(rank)
    named = [f"{node} (rank{'s' * (len(here) > 1)} {_some(here)})" for node, here in by_node.items()]
    return _some(named)


def _some(things: Sequence[Any]) -> str:
    more = len(things) - SHOWN
    return ", ".join(map(str, things[:SHOWN])) + (f" and {more} more" if more > 0 else "")
