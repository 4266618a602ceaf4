"""Operators as they are registered for a GPU; without one, tests run those of the interpreter, of another kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import _runtime
from kernels.inventory import entries

ROOT = Path(__file__).resolve().parents[2]
# Fake tensors on a CUDA device carry shapes only: a public function goes through its operator, which answers by its
# fake implementation. The twin says on the CPU what shapes and dtypes that must be.
SCRIPT = """
import json
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from kernels import _runtime, prefix_attention
from kernels.inventory import entries

SMALL = {"users": 3, "tokens": 19, "width": 32, "items": 50, "timesteps": 5, "heads": 2, "length": 5, "longest": 5,
         "results": 5, "steps": 2, "excluded": 3, "blocks": 1, "denoiser_blocks": 2}
# A build of torch without CUDA slices no fake CUDA tensor.
prefix_attention.token_users = lambda offsets, tokens: offsets.new_empty(tokens)

class Called(TorchDispatchMode):
    names = set()
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(function.overloadpacket._qualified_op_name)
        return function(*arguments, **(options or {}))

def kinds(results):
    return [[list(each.shape), str(each.dtype)] for each in tree_leaves(results) if isinstance(each, torch.Tensor)]

found = {}
for entry in entries():
    paper = entry.shapes["paper"]
    sizes = {**paper, **{name: size for name, size in SMALL.items() if name in paper}}
    values = entry.inputs(sizes, torch.float32, torch.device("cpu"))
    mode = FakeTensorMode()
    fakes = tree_map_only(torch.Tensor, lambda each: FakeTensor(mode, each.to("meta"), torch.device("cuda:0")), values)
    with mode, Called():
        if entry.name == "denoise_update":
            entry.run(**fakes, in_place=True)
        results = entry.run(**fakes)
    devices = {each.device.type for each in tree_leaves(results) if isinstance(each, torch.Tensor)}
    found[entry.name] = [kinds(results), kinds(entry.twin(**values)), sorted(devices)]
names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("adrec::")}
print(json.dumps({
    "interpreted": _runtime.INTERPRETED, "entries": found, "called": sorted(Called.names & names),
    "operators": sorted(names), "native": sorted(names & set(torch._library.triton.triton_ops_to_kernels)),
}))
"""


@pytest.mark.skipif(not _runtime.AVAILABLE, reason="Triton is not installed")
def test_every_operator_is_registered_natively_with_a_fake_of_the_right_shapes() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["interpreted"]
    assert found["operators"] == found["native"]
    assert found["operators"] == found["called"]
    assert list(found["entries"]) == [entry.name for entry in entries()]
    for name, (fake, twin, devices) in found["entries"].items():
        assert fake == twin, name
        assert devices == ["cuda"], name
