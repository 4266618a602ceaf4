"""Compare our models and engines with reference files of the authors' code (``.npz``; no pickles).

A file holds weights under the released names, inputs, noise, and what the released code printed for them: network
output, losses, gradients, the sampled representation, scores and the top list.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adrec.config import ModelConfig, parse
from adrec.data.jagged import Jagged
from adrec.engines import exact_engines, make_engine
from adrec.errors import DataError, NotSupportedError
from adrec.losses import catalogue_cross_entropy, reconstruction_loss
from adrec.models import ADRec, build_model
from adrec.models.base import SequenceModel, TokenBatch
from adrec.models.layout import Layout
from adrec.noise import TokenNoise
from adrec.released import from_released

ABSOLUTE = 1e-5
RELATIVE_GRADIENT = 1e-4
SUPPORTED = ("adrec", "sasrec")
_OPTIONS = {
    "N": "items",
    "D": "width",
    "heads": "heads",
    "L": "max_length",
    "T": "timesteps",
    "noise_schedule": "schedule",
    "lambda_uncertainty": "lambda_uncertainty",
    "dif_decoder": "denoiser",
    "geodesic": "geodesic",
    "independent": "independent_noise",
}

# What a file may say of itself besides the options.
_NOTES = ("model", "B", "seed")
_INTEGERS = ("hist", "target", "topk", "train_t")


@dataclass(frozen=True)
class Check:
    """Largest difference of one quantity and what is allowed. unit: ``absolute``, ``relative`` or ``places``."""

    quantity: str
    difference: float
    tolerance: float
    unit: str

    @property
    def passed(self) -> bool:
        return bool(self.difference <= self.tolerance)


def verify_file(path: str | Path) -> list[Check]:
    """Run every comparison a reference file allows.

    Outputs, losses and samples are compared absolutely (1e-5), gradients relative to their largest entry (1e-4), scores
    relative to the largest score (1e-5), top lists place by place. Raises DataError for a file that is not a reference
    file, NotSupportedError for a model this version does not have.
    """
    arrays, meta = _read(Path(path))
    model = _model(arrays, meta, str(path))
    return [*_training_checks(model, arrays), *_sampling_checks(model, arrays)]


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # numpy and zipfile raise many kinds; all mean a damaged or foreign file
        kind = type(error).__name__
        raise DataError(f"{path}: cannot be read as a reference file (.npz without pickles): {kind}") from None
    if "meta" not in arrays:
        raise DataError(f"{path}: holds no 'meta'; expected a model reference file, found {sorted(arrays)[:5]}")
    try:
        meta = json.loads(str(arrays["meta"]))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: 'meta' is not JSON: {error}") from None
    if not isinstance(meta, dict):
        raise DataError(f"{path}: 'meta' is a JSON {type(meta).__name__}; expected an object")
    if meta.get("model") not in SUPPORTED:
        raise NotSupportedError(
            f"{path}: model '{meta.get('model')}' is not supported yet; supported: {', '.join(SUPPORTED)}"
        )
    needed = ["hist", "target", "train_out", "train_ce", "sample_last", "scores", "topk"]
    needed += ["train_t", "train_noise", "train_mse", "sample_noise"] if meta["model"] == "adrec" else []
    missing = [name for name in needed if name not in arrays]
    missing += [f"g/{name[2:]}" for name in arrays if name.startswith("w/") and f"g/{name[2:]}" not in arrays]
    if not any(name.startswith("w/") for name in arrays):
        missing.append("w/...")
    if missing:
        raise DataError(f"{path}: lacks {', '.join(missing)}")
    unknown = sorted(set(meta) - {*_OPTIONS, *_NOTES})
    if unknown:
        raise NotSupportedError(f"{path}: option '{unknown[0]}' in 'meta' is not supported; {', '.join(_OPTIONS)} are")
    used = [name for name in arrays if name in needed or name.startswith(("w/", "g/"))]
    arrays = {name: _numbers(name, arrays[name], path) for name in used}
    _check_shapes(arrays, meta, path)
    return arrays, meta


def _numbers(name: str, values: np.ndarray, path: Path) -> np.ndarray:
    """The values as the models take them: ids and steps in int64, all else in float32."""
    kinds, dtype, wanted = ("iu", np.int64, "integers") if name in _INTEGERS else ("f", np.float32, "floats")
    if values.dtype.kind not in kinds:
        raise DataError(f"{path}: '{name}' has dtype {values.dtype}; expected {wanted}")
    return values.astype(dtype)


def _check_shapes(arrays: dict[str, np.ndarray], meta: dict[str, Any], path: Path) -> None:
    try:
        B, L, N, D, T = (int(meta[name]) for name in "BLNDT")
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path}: 'meta' must hold whole numbers B, L, N, D and T") from None
    if min(B, L, N, D, T) < 1:
        raise DataError(f"{path}: 'meta' says B, L, N, D, T = {B}, {L}, {N}, {D}, {T}; allowed: 1 or more")
    shapes: dict[str, tuple[int, ...]] = {
        "hist": (B, L),
        "target": (B, L),
        "train_out": (B, L, D),
        "train_ce": (),
        "sample_last": (B, D),
        "scores": (B, N + 1),
    }
    limits = {"hist": N, "target": N, "topk": N}
    if meta["model"] == "adrec":
        shapes |= {"train_mse": (), "train_noise": (B, L, D), "sample_noise": (T + 1, B, D)}
        limits["train_t"] = T - 1
        shapes["train_t"] = (B, L) if arrays["train_t"].ndim == 2 else (B,)
    if arrays["topk"].ndim != 2 or not 1 <= arrays["topk"].shape[1] <= N:
        raise DataError(f"{path}: 'topk' has shape {arrays['topk'].shape}; expected [{B}, k] with k from 1 to {N}")
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise DataError(f"{path}: '{name}' has shape {arrays[name].shape}; expected {shape}")
    for name, limit in limits.items():
        if not 0 <= arrays[name].min() <= arrays[name].max() <= limit:
            raise DataError(
                f"{path}: '{name}' spans {arrays[name].min()} to {arrays[name].max()}; allowed: 0 to {limit}"
            )
    real = (arrays["hist"] != 0).astype(np.int8)
    odd = np.flatnonzero((real[:, -1] == 0) | (np.diff(real) < 0).any(1))
    if odd.size:
        raise DataError(f"{path}: row {odd[0]} of 'hist' is not left-padded: expected zeros, then 1 item or more")


def _model(arrays: dict[str, np.ndarray], meta: dict[str, Any], where: str) -> SequenceModel:
    options = {ours: meta[theirs] for theirs, ours in _OPTIONS.items() if theirs in meta}
    fixed = {"dropout": 0.0, "embedding_dropout": 0.0, "padding": "released"}
    positions = "released" if "w/position_embedding.weight" in arrays else "none"
    model = build_model(parse(ModelConfig, {"model": meta["model"], "positions": positions, **fixed, **options}, where))
    try:
        model.load_state_dict(from_released(_group(arrays, "w/")))
    except RuntimeError as error:
        raise DataError(f"{where}: the stored weights do not fit: {error}") from None
    for name in (name[2:] for name in arrays if name.startswith("w/")):
        weight, gradient = arrays[f"w/{name}"].shape, arrays[f"g/{name}"].shape
        if gradient != weight:
            raise DataError(f"{where}: 'g/{name}' has shape {gradient}; expected {weight}, that of its weight")
    return model


def _group(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: torch.from_numpy(value) for name, value in arrays.items() if name.startswith(prefix)}


def _training_checks(model: SequenceModel, arrays: dict[str, np.ndarray]) -> list[Check]:
    history, target = torch.from_numpy(arrays["hist"]), torch.from_numpy(arrays["target"])
    order = (history != 0).sum(1).argsort(stable=True)
    real = (history != 0)[order]
    layout = Layout.from_sorted_lengths(real.sum(1))
    batch = TokenBatch(history[order][real], target[order][real], layout)
    if isinstance(model, ADRec):
        steps, padding_steps = torch.from_numpy(arrays["train_t"]), torch.zeros(1, dtype=torch.int64)
        if steps.dim() == 1:
            padding_steps, steps = steps[order], steps[:, None].expand_as(history)
        gaussian = torch.from_numpy(arrays["train_noise"])
        out = model(batch, TokenNoise(steps[order][real], gaussian[order][real], padding_steps))
    else:
        out = model(batch)
    ranking = loss = catalogue_cross_entropy(out, model.table, batch.targets)
    checks = [
        _absolute("output", out, arrays["train_out"][order.numpy()][real.numpy()]),
        _absolute("cross-entropy", ranking, arrays["train_ce"]),
    ]
    if isinstance(model, ADRec):
        reconstruction = reconstruction_loss(out, model.clean_target(batch.targets), layout)
        checks.append(_absolute("reconstruction", reconstruction, arrays["train_mse"]))
        loss = ranking + reconstruction
    loss.backward()
    expected = from_released(_group(arrays, "g/"))
    differences = {
        name: float((parameter.grad - expected[name]).abs().max() / expected[name].abs().max())
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    # A gradient that is not a number is the worst of all, and compares as nothing.
    differences = {name: math.inf if math.isnan(value) else value for name, value in differences.items()}
    worst = max(differences, key=lambda name: differences[name])
    checks.append(
        Check(
            f"gradients of {len(differences)} parameters (worst: {worst})",
            differences[worst],
            RELATIVE_GRADIENT,
            "relative",
        )
    )
    return checks


def _sampling_checks(model: SequenceModel, arrays: dict[str, np.ndarray]) -> list[Check]:
    histories = Jagged.from_padded(torch.from_numpy(arrays["hist"]))
    noise = torch.from_numpy(arrays["sample_noise"]) if isinstance(model, ADRec) else None
    checks = []
    for name in exact_engines(model.table.device):
        engine = make_engine(name, model)
        rows = engine.represent(histories, noise=noise)
        largest = float(np.abs(arrays["scores"]).max())
        score = np.abs(engine.score(rows).numpy() - arrays["scores"]).max() / max(1.0, largest)
        wrong = int((engine.top_k(rows, arrays["topk"].shape[1]).items.numpy() != arrays["topk"]).sum())
        checks += [
            _absolute(f"{name}: sample", rows, arrays["sample_last"]),
            Check(f"{name}: scores", float(score), ABSOLUTE, "relative"),
            Check(f"{name}: top {arrays['topk'].shape[1]}", float(wrong), 0.0, "places"),
        ]
    return checks


def _absolute(quantity: str, ours: Tensor, theirs: np.ndarray) -> Check:
    return Check(quantity, float(np.abs(ours.detach().numpy() - theirs).max()), ABSOLUTE, "absolute")
