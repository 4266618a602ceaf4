"""PTX for GPUs that are not there: hidden parameters are cut, and what is left assembles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import _runtime
from kernels.compilation import CompilationError
from kernels.ptx import strip_hidden, target_of
from kernels.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
ENTRY = """\
.visible .entry kernel(
\t.param .u64 .ptr .global .align 1 kernel_param_0,
\t.param .u32 kernel_param_1,
\t.param .u64 .ptr .global .align 1 kernel_param_2,
\t.param .u64 .ptr .global .align 1 kernel_param_3
)
.reqntid 128
{
\tld.param.b64 %rd1, [kernel_param_0];
\tret;
}
"""
SCRIPT = """
import json, sys
import torch
from compress.export.tensorrt.operators import OPERATORS, DENOISE_INPUTS
from kernels.compilation import resource_usage
from kernels.plugin_kernels import Integers
from kernels.ptx import assemble, plugin_ptx
from kernels.targets import TARGETS

HALVES = {"rows", "table", "qkv", "out_weight", "up", "down", "keys_values", "pads", "condition"}
SCORE = {"count": 12102, "width": 128, "k": 20, "first": 1}
DENOISE = {"width": 128, "heads": 4, "blocks": 2, "steps": 4, "pad_rows": 1, "max_length": 50, "mix_weight": 0.001,
           "guidance_scale": 1.0, "geodesic": 0}
found = []
for half in (False, True):
    for name, attributes in (("score_splits", SCORE), ("merge_splits", SCORE), ("denoise_last", DENOISE)):
        operator = OPERATORS[name]
        stored = torch.float16 if half else torch.float32
        kinds = dict.fromkeys(HALVES, stored) | dict.fromkeys(("offsets", "candidates"), torch.int64)
        dtypes = [kinds.get(each, torch.float32) for each in operator.inputs]
        shapes = [(64, 11, 512) if name == "merge_splits" else (2, 2, 2, 64, 50, 128) for _ in operator.inputs]
        outputs = [each.dtype for each in operator.describe(attributes, shapes, dtypes, Integers())]
        kernel = operator.launch(attributes, shapes, dtypes, Integers()).kernel
        ptx = plugin_ptx(kernel, operator.pointer_types(kernel, dtypes, outputs), TARGETS[sys.argv[1]])
        usage = resource_usage(assemble(ptx.text, TARGETS[sys.argv[1]]), ptx.name)
        entry = ptx.text.split(".entry")[1].split(")")[0]
        found.append([name, entry.count(".param"), len(kernel.inputs) + len(kernel.integers) + len(kernel.outputs),
                      ptx.shared, usage["STACK"] + usage["LOCAL"], ptx.threads, f".reqntid {ptx.threads}" in ptx.text])
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not _runtime.AVAILABLE, reason="Triton is not installed")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_the_plugins_compile_without_spills_and_assemble(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, target], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 6
    for name, parameters, declared, shared, spills, threads, required in rows:
        assert parameters == declared, name
        assert (spills, required) == (0, True), name
        assert shared <= 48 * 1024, name
        assert threads in (128, 256), name


def test_hidden_parameters_are_cut() -> None:
    cut = strip_hidden(ENTRY, "kernel", 2)
    assert cut.split("{")[0].count(".param") == 2
    assert "kernel_param_2" not in cut
    assert cut.count(",\n") == 1
    assert cut.split("{", 1)[1] == ENTRY.split("{", 1)[1]
    assert strip_hidden(ENTRY, "kernel", 4).split("{")[0].count(".param") == 4


@pytest.mark.parametrize(
    ("declared", "body", "message"),
    [
        (2, "ld.param.b64 %rd2, [kernel_param_3];", "kernel reads kernel_param_3, a parameter that only Triton's"),
        (5, "", "has 4 parameters in its PTX; expected 5 or more"),
    ],
)
def test_parameters_that_are_needed_are_not_cut(declared: int, body: str, message: str) -> None:
    with pytest.raises(CompilationError, match=message):
        strip_hidden(ENTRY.replace("\tret;", body), "kernel", declared)


def test_another_entry_is_an_error() -> None:
    with pytest.raises(CompilationError, match="no entry other"):
        strip_hidden(ENTRY, "other", 2)


def test_targets_are_found_by_compute_capability() -> None:
    assert target_of("8.9") is TARGETS["sm_89"]
    assert target_of("10.0") is TARGETS["sm_100"]
    with pytest.raises(CompilationError, match=r"compute capability is 7.5; kernels are made for sm_80, sm_86"):
        target_of("7.5")
