"""What runs were measured on, by what they say of themselves."""

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..training.records import VERSIONS_FILE
from ..versions import processor

LIBRARIES = ("torch", "deepspeed", "faconv_hpc")


def versions_in(run_dir: Path) -> dict[str, Any]:
    """What the run says it was; of one that does not say, nothing."""
    try:
        return dict(json.loads((run_dir / VERSIONS_FILE).read_text()))
    except (OSError, ValueError):
        return {}


def machine_in_words(clusters: Iterable[str], said: Sequence[Mapping[str, Any]]) -> str:
    """Clusters, hosts (where it is this machine alone, what it is), devices and libraries.

    Args:
        said: by each run, see `versions_in`.
    """
    hosts = sorted({host for one in said for host in one.get("hosts") or [one.get("host")] if host})
    where = f"{' and '.join(sorted(set(clusters))) or 'nothing yet'}, {'hosts' if len(hosts) > 1 else 'host'} "
    where += ", ".join(hosts) or "unknown"
    if hosts == [platform.node()]:
        where += f" ({processor()}, {os.cpu_count()} cores)"
    devices = sorted({str(one["device"]) for one in said if "device" in one})
    first = next((one for one in said if one), {})
    libraries = ", ".join(f"{name} {first[name]}" for name in LIBRARIES if name in first)
    return "; ".join(part for part in (where, *devices, libraries) if part)
