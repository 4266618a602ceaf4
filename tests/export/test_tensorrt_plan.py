"""A plan is read only whole, beside its own record, and on the machine it was built for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorrt_cases import HERE, PROFILES, edit_record, save_plan

from adrec.engines.exported import ExportError
from adrec.engines.tensorrt.engine import find_plan
from adrec.engines.tensorrt.library import Gpu, Platform, TensorRTError, version_numbers
from adrec.engines.tensorrt.plan import PlanKey, read_plan, record_path
from adrec.engines.tensorrt.session import dimension_sizes
from adrec.errors import ConfigError


def platform(**changes: object) -> Platform:
    return HERE.model_copy(update=changes)


def test_a_whole_plan_is_read(tmp_path: Path) -> None:
    plan = save_plan(tmp_path)
    content, record = read_plan(plan, HERE)
    assert content == b"a plan"
    assert record.key.profiles == PROFILES
    assert plan.name == f"small.{record.fingerprint[:16]}.plan"


def test_the_fingerprint_is_of_everything_a_plan_depends_on() -> None:
    base = PlanKey(graph="0" * 64, profiles=PROFILES, options={"tf32": False}, platform=HERE)
    others = [
        base.model_copy(update=change)
        for change in (
            {"graph": "1" * 64},
            {"profiles": PROFILES[:1]},
            {"options": {"tf32": True}},
            {"platform": platform(tensorrt="11.4.0.106")},
            {"platform": platform(gpu=Gpu(name="NVIDIA H100", capability="9.0"))},
            {"platform": platform(system="Linux aarch64")},
        )
    ]
    assert len({each.fingerprint for each in (base, *others)}) == 7
    assert PlanKey.model_validate_json(base.model_dump_json()).fingerprint == base.fingerprint


@pytest.mark.parametrize(
    ("here", "message"),
    [
        (platform(gpu=Gpu(name="H100", capability="9.0")), r"built for a NVIDIA L4 \(8.9\).*this is a H100 \(9.0\)"),
        (platform(gpu=Gpu(name="RTX 4090", capability="8.9")), "--hardware-compatibility same_compute_capability"),
        (platform(tensorrt="10.16.2.1"), r"by TensorRT 10.16.1.11 and this is 10.16.2.1; build it here: sh build.sh"),
        (platform(system="Windows AMD64"), "built on Linux x86_64 and this is Windows AMD64"),
    ],
)  # fmt: skip
def test_a_plan_of_another_machine_is_refused(tmp_path: Path, here: Platform, message: str) -> None:
    with pytest.raises(TensorRTError, match=message):
        read_plan(save_plan(tmp_path), here)


@pytest.mark.parametrize(
    ("options", "here", "fits"),
    [
        ({"hardware_compatibility": "same_compute_capability"}, Gpu(name="NVIDIA RTX 4090", capability="8.9"), True),
        ({"hardware_compatibility": "same_compute_capability"}, Gpu(name="NVIDIA A10", capability="8.6"), False),
        ({"hardware_compatibility": "ampere_plus"}, Gpu(name="NVIDIA H100", capability="9.0"), True),
        ({"hardware_compatibility": "ampere_plus"}, Gpu(name="NVIDIA T4", capability="7.5"), False),
    ],
)
def test_hardware_compatibility_is_what_it_says(tmp_path: Path, options: dict[str, str], here: Gpu, fits: bool) -> None:
    plan = save_plan(tmp_path, options=options)
    if fits:
        assert read_plan(plan, platform(gpu=here))[0] == b"a plan"
    else:
        with pytest.raises(TensorRTError, match="hardware compatibility"):
            read_plan(plan, platform(gpu=here))


@pytest.mark.parametrize(("version", "fits"), [("10.17.0.1", True), ("10.12.0.1", False), ("11.1.0.106", False)])
def test_version_compatibility_is_for_newer_of_the_same_major(tmp_path: Path, version: str, fits: bool) -> None:
    plan = save_plan(tmp_path, options={"version_compatible": True})
    if fits:
        read_plan(plan, platform(tensorrt=version))
    else:
        with pytest.raises(TensorRTError, match="same major"):
            read_plan(plan, platform(tensorrt=version))


def test_a_truncated_plan_is_refused(tmp_path: Path) -> None:
    plan = save_plan(tmp_path)
    plan.write_bytes(b"a pl")
    with pytest.raises(TensorRTError, match="has 4 bytes and its record says 6"):
        read_plan(plan, HERE)


def test_a_replaced_plan_is_refused(tmp_path: Path) -> None:
    plan = save_plan(tmp_path)
    plan.write_bytes(b"A plan")
    with pytest.raises(TensorRTError, match="SHA-256 differs"):
        read_plan(plan, HERE)


def test_a_plan_without_a_record_is_refused(tmp_path: Path) -> None:
    plan = save_plan(tmp_path)
    record_path(plan).unlink()
    with pytest.raises(TensorRTError, match="nothing tells what it is; a plan is executable content"):
        read_plan(plan, HERE)
    with pytest.raises(TensorRTError, match="does not exist"):
        read_plan(tmp_path / "other.plan", HERE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "f" * 64}, "does not belong to"),
        ({"schema_version": 2}, "schema_version 2; this adrec reads 1"),
        ({"surprise": 1}, "not the record of a plan"),
    ],
)
def test_an_altered_record_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    plan = save_plan(tmp_path)
    edit_record(plan, **changes)
    with pytest.raises(TensorRTError, match=message):
        read_plan(plan, HERE)


def test_a_renamed_plan_is_refused(tmp_path: Path) -> None:
    plan = save_plan(tmp_path)
    other = plan.with_name("small.0123456789abcdef.plan")
    record_path(plan).rename(record_path(other))
    plan.rename(other)
    with pytest.raises(TensorRTError, match="does not belong to"):
        read_plan(other, HERE)


def test_a_record_that_is_no_json_is_refused(tmp_path: Path) -> None:
    plan = save_plan(tmp_path)
    record_path(plan).write_text("{")
    with pytest.raises(TensorRTError, match="not the record of a plan"):
        read_plan(plan, HERE)


def test_a_plan_of_another_graph_is_not_found(tmp_path: Path) -> None:
    graph = tmp_path / "small.onnx"
    graph.write_bytes(b"newer")
    with pytest.raises(ExportError, match=r"holds no plan of small.onnx for this machine. Build it"):
        find_plan(graph, HERE)
    plan = save_plan(tmp_path)
    with pytest.raises(ExportError, match=f"{plan.name} was built from another small.onnx"):
        find_plan(graph, HERE)
    with pytest.raises(ExportError, match="NVIDIA H100"):
        find_plan(graph, platform(gpu=Gpu(name="NVIDIA H100", capability="9.0")))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "also needs the input x"),
        ({"y": torch.zeros(1)}, r"no input 'y' \(did you mean 'x'\?\)|no input 'y'; inputs: x"),
        ({"x": torch.zeros(2, 3, 4).half()}, r"'x' is float16 \[2, 3, 4\]; expected float32 \[batch, length, 4\]"),
        ({"x": torch.zeros(2, 3, 5)}, r"\[2, 3, 5\]; expected float32"),
        ({"x": torch.zeros(2, 4)}, r"\[2, 4\]; expected float32"),
        ({"x": torch.zeros(2, 4, 3).transpose(1, 2)}, "the engine reads contiguous tensors"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tmp_path: Path, inputs: dict[str, torch.Tensor], message: str) -> None:
    record = read_plan(save_plan(tmp_path), HERE)[1]
    with pytest.raises(ConfigError, match=message):
        dimension_sizes(record, inputs)


def test_sizes_of_a_request(tmp_path: Path) -> None:
    record = read_plan(save_plan(tmp_path), HERE)[1]
    assert dimension_sizes(record, {"x": torch.zeros(2, 3, 4)}) == {"batch": 2, "length": 3}


def test_version_numbers() -> None:
    assert version_numbers("10.16.1.11") == (10, 16, 1, 11)
    assert version_numbers("10.9.0") < (10, 12) < version_numbers("11.0")
