"""The stand-in that the API shape tests use: strict, and made of surfaces that are those of the real bindings."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from strict_tensorrt import FOLDER, VERSIONS, StrictTensorRT, SurfaceError
from tensorrt_surface import USED, USED_ENUMS

from adrec.engines.tensorrt import library
from adrec.engines.tensorrt.library import flag_bits
from adrec.errors import NotSupportedError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "api"


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_an_old_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.9.0.34"))
    with pytest.raises(NotSupportedError, match=r"TensorRT is 10.9.0.34; allowed: 10.12 or newer"):
        library.load()


def test_flags_that_a_version_lacks_are_left_out() -> None:
    old, new = (StrictTensorRT(version).NetworkDefinitionCreationFlag for version in ("10_16", "11_4"))
    assert flag_bits(old, "STRONGLY_TYPED", "EXPLICIT_BATCH") == 0b11
    assert flag_bits(new, "STRONGLY_TYPED", "EXPLICIT_BATCH") == 0b1


def test_the_stand_in_is_strict(version: str) -> None:
    trt = StrictTensorRT(version)
    config = trt.make("IBuilderConfig")
    for call, message in (
        (lambda: trt.Calibrator, "has no 'Calibrator' in the surface"),
        (lambda: config.int8_calibrator, "IBuilderConfig has no 'int8_calibrator'"),
        (lambda: config.set_flag(), "'flag' is missing"),
        (lambda: config.set_flag(trt.BuilderFlag.REFIT, 1), "takes 1 arguments"),
        (lambda: config.set_flag(flags=trt.BuilderFlag.REFIT), "unexpected keyword 'flags'"),
        (lambda: config.set_flag(3), "'flag' is a int, not BuilderFlag"),
        (lambda: config.set_flag(trt.MemoryPoolType.WORKSPACE), "'flag' is a MemoryPoolType, not BuilderFlag"),
        (lambda: setattr(trt.make("ICudaEngine"), "refittable", True), "ICudaEngine.refittable is read-only"),
        (lambda: setattr(config, "max_workspace_size", 1), "no 'max_workspace_size' to write"),
        (lambda: trt.IBuilderConfig(), "cannot be constructed"),
        (lambda: trt.make("IOptimizationProfile").set_shape("x", 1, 2, 3), "'min' is a int, not Dims"),
    ):
        with pytest.raises(SurfaceError, match=message):
            call()
    with pytest.raises(AttributeError):
        trt.BuilderFlag.BF16 if version != "10_16" else trt.BuilderFlag.NVFP4  # noqa: B018


@pytest.mark.parametrize("version", VERSIONS)
def test_the_surfaces_are_part_of_the_whole_api(version: str) -> None:
    path = SHARED / f"tensorrt_api_{version}.json"
    if not path.is_file():
        pytest.skip("the whole API, kept next to the checkout, is not there")
    whole = json.loads(path.read_text())
    ours = json.loads((FOLDER / f"tensorrt_surface_{version}.json").read_text())
    assert ours["version"] == whole["version"]
    for name, members in USED.items():
        there = whole["classes"][name]
        for method, lines in ours["classes"][name]["methods"].items():
            known = there["methods"][method]["signatures"]
            found = {
                re.sub(r"nv(infer1|onnxparser)::(IP(?=arserError))?", lambda m: "P" if m[2] else "", line)
                for line in known
            }
            assert set(lines) <= found, f"{name}.{method}"
        for member, described in ours["classes"][name]["properties"].items():
            assert there["properties"][member]["writable"] == described["writable"], f"{name}.{member}"
        described = ours["classes"][name]
        assert {*described["methods"], *described["properties"]} == set(members)
    for name in USED_ENUMS:
        owner, _, last = name.rpartition(".")
        there = whole["classes"][owner]["nested_enums"][last] if owner else whole["enums"][name]["members"]
        assert ours["enums"][name] == there, name
