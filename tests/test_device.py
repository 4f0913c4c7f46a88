"""What a machine without a GPU can tell of one: where tensors are made, what is waited for, which device is taken."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode

from faconv_hpc import ProcessMesh
from faconv_hpc.training.trainer import Trainer, train
from ranks import Layout, run_on_ranks
from runs import make_store, small_config

WAITS = {"item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__", "__index__", "nonzero"}
"""What makes a processor wait for the device that a tensor is on."""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("device") / "waves")


class Waits(TorchFunctionMode):
    """Counts them, by who asks: this package, or a library."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in WAITS:
            import traceback
            where = [f for f in traceback.extract_stack() if "test_device" not in f.filename]
            self.found[name, where[-1].filename.split("site-packages/")[-1], where[-1].lineno] += 1
        return func(*args, **(kwargs or {}))


def test_dbg(tmp_path, store):
    def check(mesh, stage):
        found=[]
        step, gathered = Trainer._step, ProcessMesh.gathered
        def counted(self, number):
            with Waits() as w:
                r = step(self, number)
            found.append(w.found)
            return r
        def outside(self, values):
            with torch._C.DisableTorchFunction():
                return gathered(self, values)
        Trainer._step, ProcessMesh.gathered = counted, outside
        try:
            config = small_config(tmp_path/str(stage), store, mesh={"replicas": 2}, training={"zero_stage": stage, "precision": "bf16" if stage==2 else "fp32", "steps": 3})
            train(config, mesh)
        finally:
            Trainer._step, ProcessMesh.gathered = step, gathered
        return found
    for stage in (0,1,2,3):
        print(stage, run_on_ranks(Layout(2,1,1), check, stage)[0][-1])
