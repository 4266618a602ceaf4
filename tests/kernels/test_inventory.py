"""What all kernels have in common: a twin of the same signature, widths of models, CPUs without Triton, one device."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils._pytree import tree_leaves

from kernels import _runtime
from kernels._runtime import UnsupportedError
from kernels.inventory import Entry, entries
from tests.kernels.conftest import small_inputs

WIDTHS = {32, 64, 96, 128, 192, 256}
# Of each kernel, one tensor that may be on another device than the rest.
ELSEWHERE = {
    "token_noise": "condition",
    "token_noise.backward": "grad_z",
    "denoise_update": "x0_hat",
    "prefix_attention": "offsets",
    "prefix_attention.backward": "gradient",
    "encode_prefix": "items",
    "denoise_last": "offsets",
    "denoise_last_mlp": "times",
    "score_topk": "table",
    "score_topk.exclude": "exclude_items",
}
each_kernel = pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)


@each_kernel
def test_a_twin_has_the_signature_of_its_kernel(entry: Entry) -> None:
    assert inspect.signature(entry.run) == inspect.signature(entry.twin)


@each_kernel
def test_it_is_judged_and_compiled_at_every_width_of_a_model(entry: Entry) -> None:
    assert {shape["width"] for shape in entry.shapes.values()} >= WIDTHS


@each_kernel
def test_on_a_cpu_without_the_interpreter_it_is_its_twin(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_runtime, "INTERPRETED", False)
    values = small_inputs(entry)
    found, expected = (tree_leaves(run(**values)) for run in (entry.run, entry.twin))
    assert len(found) == len(expected) > 0
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True) if pair[0] is not None)


@each_kernel
def test_tensors_on_two_devices_are_refused(entry: Entry) -> None:
    values, name = small_inputs(entry), ELSEWHERE[entry.name]
    with pytest.raises(UnsupportedError, match="tensors are on cpu, meta; expected one device"):
        entry.run(**{**values, name: values[name].to("meta")})
