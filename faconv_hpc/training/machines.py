"""What a run computes on, and the memory that it takes there."""

import resource
import socket
from typing import Any

import torch

from ..spatial.mesh import ProcessMesh


def machines_of(mesh: ProcessMesh) -> dict[str, Any]:
    """The hosts of all ranks, each once, and what computes. Collective."""
    cuda = mesh.device.type == "cuda"
    device = torch.cuda.get_device_name(mesh.device) if cuda else mesh.device.type
    hosts = mesh.gathered_objects(socket.gethostname())
    return {"hosts": list(dict.fromkeys(hosts)), "device": device}


def peak_memory_gib(device: torch.device) -> float:
    """Of this process so far: host memory on a CPU, else device memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
