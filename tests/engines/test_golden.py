"""`verify_file` and `adrec verify` on reference files of the authors' code, on damaged ones and on foreign ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from adrec.cli import build_app
from adrec.engines import exact_engines
from adrec.errors import AdrecError, DataError, NotSupportedError
from adrec.verify import verify_file

# The small reference files have 8 steps, where trunc_lin changes its end value and says so.
pytestmark = pytest.mark.filterwarnings("ignore:schedule 'trunc_lin' at 8 steps")

GoldenPath = Callable[[str], Path]
SMALL = ["adrec_small", "adrec_lambda1", "adrec_seq_noise", "adrec_mlp", "adrec_geodesic", "sasrec_small"]


def run(*arguments: str | Path) -> Result:
    # A wide terminal, so that the table does not cut its words.
    return CliRunner(env={"COLUMNS": "200"}).invoke(build_app(), [str(argument) for argument in arguments])


def rewrite(source: Path, target: Path, changes: dict[str, Any]) -> Path:
    """Copy an .npz with some arrays replaced."""
    np.savez(target, **{**np.load(source), **changes})
    return target


@pytest.fixture
def two_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the engines that no interpreter runs: the fused one takes a second for a small file."""
    monkeypatch.setattr("adrec.verify.exact_engines", lambda device: ["reference", "cached"])


without_fused = pytest.mark.usefixtures("two_engines")


def check_file(path: Path, engines: list[str]) -> None:
    """Hold every quantity of a reference file to its tolerance."""
    checks = verify_file(path)
    beyond = [f"{check.quantity}: {check.difference:.2e}" for check in checks if not check.passed]
    assert beyond == []
    quantities = " ".join(check.quantity for check in checks)
    for engine in engines:
        for quantity in ("sample", "scores", "top 10"):
            assert f"{engine}: {quantity}" in quantities
    assert "output cross-entropy" in quantities
    assert ("reconstruction" in quantities) == path.name.startswith("adrec")
    gradients = next(check for check in checks if check.quantity.startswith("gradients of "))
    assert int(gradients.quantity.split()[2]) >= 20, "nearly every parameter has a reference gradient"
    assert {check.unit for check in checks} == {"absolute", "relative", "places"}
    assert max(check.tolerance for check in checks) <= 1e-4


@pytest.mark.parametrize("name", [*SMALL, pytest.param("adrec_paper", marks=pytest.mark.slow)])
def test_every_quantity_is_within_tolerance(golden_path: GoldenPath, name: str) -> None:
    check_file(golden_path(f"{name}.npz"), exact_engines(torch.device("cpu")))


@without_fused
def test_so_it_is_at_the_papers_size(golden_path: GoldenPath) -> None:
    check_file(golden_path("adrec_paper.npz"), ["reference", "cached"])


@without_fused
def test_the_command_accepts_several_files(golden_path: GoldenPath) -> None:
    result = run("verify", golden_path("adrec_mlp.npz"), golden_path("sasrec_small.npz"))
    assert result.exit_code == 0, result.output
    assert "adrec_mlp.npz" in result.output
    assert "cached: top 10" in result.output
    assert "BEYOND" not in result.output


@without_fused
def test_a_tampered_weight_is_found_and_named(golden_path: GoldenPath, tmp_path: Path) -> None:
    source = golden_path("adrec_mlp.npz")
    name = "w/diffu.net.decoder.2.weight"
    weight = np.load(source)[name].copy()
    weight[3, 5] += 0.05
    target = rewrite(source, tmp_path / "tampered.npz", {name: weight})
    result = run("verify", target)
    assert result.exit_code == 1
    beyond = [line for line in result.output.splitlines() if "BEYOND" in line]
    for quantity in ("output", "cross-entropy", "gradients of", "reference: sample", "cached: scores"):
        assert any(quantity in line for line in beyond), f"{quantity}: {result.output}"


@without_fused
@pytest.mark.parametrize(
    ("key", "quantity"),
    [
        ("topk", "cached: top 10"),
        ("sample_last", "cached: sample"),
        ("train_ce", "cross-entropy"),
        ("train_mse", "reconstruction"),
        ("train_out", "output"),
        ("scores", "cached: scores"),
        ("g/hist_norm.bias", "gradients of"),
    ],
)
def test_only_the_quantity_that_differs_is_reported(
    golden_path: GoldenPath, tmp_path: Path, key: str, quantity: str
) -> None:
    source = golden_path("adrec_mlp.npz")
    values = np.load(source)[key].copy()
    values.reshape(-1)[0] += 1 if values.dtype.kind == "i" else 0.25
    target = rewrite(source, tmp_path / "tampered.npz", {key: values})
    beyond = {check.quantity for check in verify_file(target) if not check.passed}
    assert beyond
    # Both engines see a sampled quantity; nothing else may be blamed.
    plain = quantity.removeprefix("cached: ")
    assert all(plain in name for name in beyond), beyond


@without_fused
def test_not_a_number_never_passes(golden_path: GoldenPath, tmp_path: Path) -> None:
    source = golden_path("adrec_mlp.npz")
    values = np.load(source)["w/diffu.net.decoder.2.bias"].copy()
    values[0] = np.nan
    target = rewrite(source, tmp_path / "nan.npz", {"w/diffu.net.decoder.2.bias": values})
    checks = {check.quantity: check for check in verify_file(target)}
    for quantity in ("output", "cross-entropy", "reconstruction", "reference: sample", "cached: scores"):
        assert not checks[quantity].passed, quantity
    assert run("verify", target).exit_code == 1


@without_fused
@pytest.mark.parametrize("name", ["g/item_embedding.weight", "g/diffu.net.decoder.3.bias"])
def test_a_gradient_that_is_not_a_number_never_passes(golden_path: GoldenPath, tmp_path: Path, name: str) -> None:
    source = golden_path("adrec_mlp.npz")
    values = np.load(source)[name].copy()
    values.reshape(-1)[-1] = np.nan
    checks = verify_file(rewrite(source, tmp_path / "nan.npz", {name: values}))
    gradients = next(check for check in checks if check.quantity.startswith("gradients of "))
    assert not gradients.passed


def meta_only(path: Path, **meta: Any) -> Path:
    np.savez(path, meta=np.array(json.dumps(meta)))
    return path


@pytest.mark.parametrize("model", ["diffurec", "dreamrec"])
def test_models_of_later_versions_are_refused(golden_path: GoldenPath, tmp_path: Path, model: str) -> None:
    for path in (meta_only(tmp_path / f"{model}.npz", model=model), golden_path(f"{model}_small.npz")):
        with pytest.raises(NotSupportedError, match=f"model '{model}' is not supported yet; supported: adrec, sasrec"):
            verify_file(path)
        result = run("verify", path)
        assert result.exit_code == 2
        assert "is not supported yet" in result.stderr
        assert str(path.name) in result.stderr


def make_text(path: Path) -> None:
    path.write_text("not an archive\n")


def make_empty(path: Path) -> None:
    path.write_bytes(b"")


def make_pickled(path: Path) -> None:
    np.savez(path, meta=np.array(json.dumps({"model": "adrec"})), evil=np.array([{"a": 1}], dtype=object))


def make_without_meta(path: Path) -> None:
    np.savez(path, hist=np.zeros((1, 2), dtype=np.int64))


def make_truncated(path: Path) -> None:
    np.savez(path, meta=np.array(json.dumps({"model": "adrec"})), hist=np.zeros((50, 20)))
    path.write_bytes(path.read_bytes()[:-200])


def make_without_arrays(path: Path) -> None:
    meta_only(path, model="adrec", N=5)


def make_meta_no_json(path: Path) -> None:
    np.savez(path, meta=np.array("model: adrec"))


def make_meta_a_list(path: Path) -> None:
    np.savez(path, meta=np.array('["adrec"]'))


def make_single_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def make_directory(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_text, "cannot be read as a reference file"),
        (make_empty, "cannot be read as a reference file"),
        (make_pickled, "cannot be read as a reference file (.npz without pickles)"),
        (make_truncated, "cannot be read as a reference file"),
        (make_single_array, "cannot be read as a reference file"),
        (make_directory, "cannot be read as a reference file"),
        (make_without_meta, "holds no 'meta'; expected a model reference file, found ['hist']"),
        (make_without_arrays, "lacks hist, target, train_out"),
        (make_meta_no_json, "'meta' is not JSON"),
        (make_meta_a_list, "'meta'"),
        (lambda path: None, "no such file"),
    ],
)
def test_a_foreign_file_is_refused_by_name(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "odd.npz"
    make(path)
    with pytest.raises(DataError) as caught:
        verify_file(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    result = run("verify", path)
    assert result.exit_code == 2, result.exception
    # The command prints the error itself and goes on to the next file; no traceback.
    assert isinstance(result.exception, SystemExit)
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("prefix", ["w/", "g/"])
def test_a_file_without_weights_or_gradients_is_refused(golden_path: GoldenPath, tmp_path: Path, prefix: str) -> None:
    arrays = {name: value for name, value in np.load(golden_path("adrec_mlp.npz")).items() if name[:2] != prefix}
    path = tmp_path / "partial.npz"
    np.savez(path, **arrays)
    with pytest.raises(AdrecError) as caught:
        verify_file(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_weights_of_another_shape_are_refused(golden_path: GoldenPath, tmp_path: Path) -> None:
    source = golden_path("adrec_mlp.npz")
    path = rewrite(source, tmp_path / "shape.npz", {"w/hist_norm.bias": np.zeros(31, dtype=np.float32)})
    with pytest.raises(DataError, match=r"shape\.npz: the stored weights do not fit"):
        verify_file(path)


def cast(name: str, dtype: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda arrays: {name: arrays[name].astype(dtype)}


def without_items(rows: slice) -> Callable[[Any], dict[str, Any]]:
    def change(arrays: Any) -> dict[str, Any]:
        history = arrays["hist"].copy()
        history[rows] = 0
        return {"hist": history}

    return change


@without_fused
@pytest.mark.parametrize("name", ["train_noise", "sample_noise", "w/hist_norm.bias", "scores", "topk"])
def test_wider_and_narrower_numbers_of_the_same_kind_are_taken(
    golden_path: GoldenPath, tmp_path: Path, name: str
) -> None:
    source = golden_path("adrec_mlp.npz")
    path = rewrite(
        source, tmp_path / "wide.npz", cast(name, np.int32 if name == "topk" else np.float64)(np.load(source))
    )
    assert all(check.passed for check in verify_file(path))


@without_fused
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cast("hist", np.float32), "'hist' has dtype float32; expected integers"),
        (cast("train_t", np.float32), "'train_t' has dtype float32; expected integers"),
        (cast("sample_noise", np.int64), "'sample_noise' has dtype int64; expected floats"),
        (cast("w/hist_norm.bias", str), "'w/hist_norm.bias' has dtype <U32; expected floats"),
        (cast("g/hist_norm.bias", complex), "'g/hist_norm.bias' has dtype complex128; expected floats"),
        (without_items(slice(2, 3)), "row 2 of 'hist' is not left-padded: expected zeros, then 1 item or more"),
        (without_items(slice(None)), "row 0 of 'hist' is not left-padded"),
        (lambda arrays: {"hist": arrays["hist"][:, ::-1]}, "row 1 of 'hist' is not left-padded"),
        (lambda arrays: {"train_ce": np.zeros(3, np.float32)}, "'train_ce' has shape (3,); expected ()"),
        (
            lambda arrays: {"g/hist_norm.bias": np.zeros((3, 32), np.float32)},
            "'g/hist_norm.bias' has shape (3, 32); expected (32,)",
        ),
        (
            lambda arrays: {"meta": np.array(json.dumps({**json.loads(str(arrays["meta"])), "B": 0}))},
            "'meta' says B, L, N, D, T = 0, 12, 97, 32, 8; allowed: 1 or more",
        ),
    ],
)
def test_unusable_arrays_are_named_and_other_files_still_compared(
    golden_path: GoldenPath, tmp_path: Path, change: Callable[[Any], dict[str, Any]], message: str
) -> None:
    source = golden_path("adrec_mlp.npz")
    path = rewrite(source, tmp_path / "odd.npz", change(np.load(source)))
    with pytest.raises(DataError) as caught:
        verify_file(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    result = run("verify", path, golden_path("sasrec_small.npz"))
    assert result.exit_code == 2, result.exception
    assert message in result.stderr
    assert "cached: top 10" in result.stdout


@without_fused
def test_one_bad_file_among_good_ones(golden_path: GoldenPath, tmp_path: Path) -> None:
    """The good ones are still compared; a difference weighs more than an unusable file."""
    good, text = golden_path("sasrec_small.npz"), tmp_path / "odd.npz"
    make_text(text)
    result = run("verify", text, good)
    assert result.exit_code == 2
    assert "cached: top 10" in result.stdout
    off = rewrite(good, tmp_path / "off.npz", {"train_ce": np.load(good)["train_ce"] + 1.0})
    assert run("verify", text, off).exit_code == 1
