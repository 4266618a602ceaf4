"""What packages of AOTInductor cannot hold, and runtimes that do not run them, are refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adrec.config import EarlyStop, ServingConfig
from adrec.engines.exported import GraphFile
from adrec.errors import ConfigError, NotSupportedError
from compress.export.aotinductor import export_aotinductor
from compress.export.manifest import Origin, write_manifest
from compress.export.onnx_export import ExportOptions
from compress.export.verify import candidates


def test_what_a_package_would_drop_is_refused(tmp_path: Path, tiny_model: Any) -> None:
    out, model = tmp_path / "out", tiny_model(timesteps=4, schedule="sqrt")
    early = ServingConfig(sampler="ddim", times=(1, 3), early_stop=EarlyStop(top=5))
    for options, error, message in (
        (ExportOptions(steps=(early,)), NotSupportedError, "without early_stop"),
        (ExportOptions(plugins=True), NotSupportedError, "drop --plugins"),
        (ExportOptions(k=model.config.items + 1), ConfigError, "the size of the catalogue"),
    ):
        with pytest.raises(error, match=message):
            export_aotinductor(model, out, options)
    assert not out.exists()


@pytest.mark.parametrize("name", ["nonsense", "cuda", "cpi"])
def test_packages_run_on_the_device_they_were_compiled_for(
    tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("compress.export.verify.package_target", lambda path: ("cpu", ""))
    package = GraphFile(
        file="request.pt2", format="aotinductor", kind="request", precision="fp32", sha256="0" * 64, inputs=(),
        outputs=(),
    )  # fmt: skip
    manifest = write_manifest(tmp_path, Origin.of_model(tiny_model()), [package])
    with pytest.raises(ConfigError, match=f"provider is '{name}'.*allowed: cpu"):
        candidates(tmp_path, manifest, None, ["cpu", name])  # type: ignore[arg-type]
