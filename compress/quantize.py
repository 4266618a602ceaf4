"""Linear layers in fewer bits, skipping those whose rounding the model's output cannot bear."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from adrec.config import LayerFormat, LayerFormatName, OptimiserConfig, QuantizationConfig, TrainConfig
from adrec.data.dataset import Dataset
from adrec.data.jagged import Jagged
from adrec.engines import CachedEngine
from adrec.errors import ConfigError
from adrec.losses import catalogue_cross_entropy, reconstruction_loss
from adrec.models import quantization_of
from adrec.models.adrec import ADRec
from adrec.models.base import SequenceModel
from adrec.models.quantized import linear_layers, sqnr_db, storage
from adrec.noise import draw_token_noise
from adrec.respacing import Steps
from compress.rounding import finish_training, prepare_training, quantized_linear
from compress.technique import (
    Change,
    CompressionError,
    Draft,
    Receipt,
    Skip,
    Technique,
    decibels,
    parameter_count,
    stored_bytes,
)

AUTO_ROWS = 128
"""Rows from which integers (AVX512-VNNI) and bfloat16 (AVX512-BF16) beat float32 at every layer shape measured.

``bench/records/quantized-layers-cpu.json`` has the figures: with one row they take 3 to 5 times as long.
"""
_GROUP = 32
_STAGE = "quantize"
_ON_A_CPU = {
    "int4": "weights are unpacked to float32 when the run is loaded, so that the file is smaller and serving no faster",
    "fp8": "weights are unpacked to float32 when the run is loaded, so that the file is smaller and serving no faster",
    "fp8-dynamic": "inputs are rounded too, and multiplied in float32, so that serving is slower; a GPU of compute"
    " capability 8.9 or newer multiplies fp8",
}


class QuantizeConfig(Technique):
    """Store linear layers in int8, int4, fp8 or bf16, and compute with integers where that is asked for and pays.

    format, compute: see `LayerFormat`. fp8-dynamic is for GPUs that multiply fp8. auto stores int8: layers to which a
    request of ``users`` users gives 128 rows or more compute in bfloat16 on a CPU with instructions for it, which is
    about as fast as integers, and nearer; else with integers on a CPU with VNNI instructions; all others in float32.
    """

    technique: Literal["quantize"] = "quantize"
    format: Literal[LayerFormatName, "auto"] = "int8"
    group_size: int | None = Field(None, ge=2, description="inputs that share a scale, int4 only; none: 32")
    compute: Literal["float32", "bfloat16"] = "float32"
    users: int | None = Field(None, ge=1, description="users of a typical request, which auto needs")
    min_sqnr: float = Field(
        30.0, description="a layer is skipped where its rounding alone leaves less signal to noise in x0_hat, dB"
    )
    fallback: Literal["int8", "bf16"] | None = Field(
        None, description="tried for a layer that format would be too coarse for; null: it stays in float32"
    )
    calibration_users: int = Field(256, ge=1, description="validation histories that measure it")
    fine_tune_epochs: int = Field(0, ge=0, description="epochs of training with rounded weights; 0: none")
    fine_tune_learning_rate: float = Field(1e-4, gt=0.0)

    @model_validator(mode="after")
    def _consistent(self) -> QuantizeConfig:
        if self.group_size is not None and self.format != "int4":
            raise ValueError(f"group_size is {self.group_size}, but only int4 has groups; leave it out")
        if self.fallback == storage(self.format):
            raise ValueError(f"fallback is {self.fallback}, which is what '{self.format}' stores; leave it out")
        if self.format == "auto" and self.users is None:
            raise ValueError("format auto needs users, the users of a typical request")
        if self.format in ("auto", "int8-dynamic", "fp8-dynamic") and self.compute != "float32":
            raise ValueError(f"compute is {self.compute}, but {self.format} says itself how it computes; leave it out")
        return self

    def layer_format(self, name: str) -> LayerFormat:
        """The format of a layer."""
        if self.format == "int4":
            return LayerFormat(format="int4", group_size=self.group_size or _GROUP, compute=self.compute)
        if self.format != "auto":
            return LayerFormat(format=self.format, compute=self.compute)
        assert self.users is not None
        if self.users < AUTO_ROWS or _once_a_table(name) or not (has_bf16() or has_vnni()):
            return LayerFormat(format="int8")
        return LayerFormat(format="int8", compute="bfloat16") if has_bf16() else LayerFormat(format="int8-dynamic")

    def formats(self, name: str) -> list[LayerFormat]:
        """The formats that a layer may get, first choice first."""
        coarser = [] if self.fallback is None else [LayerFormat(format=self.fallback, compute=self.compute)]
        return [self.layer_format(name), *coarser]


def has_vnni() -> bool:
    """Whether this CPU multiplies int8 by instructions of its own."""
    return bool(torch.cpu._is_vnni_supported())


def has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 by instructions of its own."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def _once_a_table(name: str) -> bool:
    # Engines keep the embeddings of all steps; these layers see no user.
    return name.startswith("time_embedding.")


def apply(draft: Draft, config: QuantizeConfig) -> Receipt:
    """Round the linear layers of the draft's model to the configured format.

    Each layer is first rounded alone: where that leaves less than ``min_sqnr`` dB in the output for real histories, the
    layer stays as it is. Without a data set nothing is measured or skipped, and the receipt says so. Raises
    CompressionError for a model whose layers are quantised already, a group size that does not divide a layer, and
    fine-tuning of a model whose table is quantised.
    """
    present = quantization_of(draft.model)
    if present is not None and present.layers:
        raise CompressionError(
            f"the model has {len(present.layers)} quantised layers already; start from the run it was made of"
        )
    model = copy.deepcopy(draft.model)
    notes: list[str] = []
    if config.fine_tune_epochs:
        notes.append(_fine_tune(draft, model, config))
    changes, skips, formats = _choose(draft, model, config)
    exact = None if draft.dataset is None else _Calibration.of(draft, config).outputs(model)
    for name, layer_format in formats.items():
        model.set_submodule(name, quantized_linear(linear_layers(model)[name], layer_format))
    if exact is None:
        notes.append("no data set: the effect of a layer on the output was not measured, and none was skipped")
    elif formats:
        together = sqnr_db(exact, _Calibration.of(draft, config).outputs(model))
        notes.append(f"all layers together leave {together:.1f} dB in x0_hat of {exact.shape[0]} validation histories")
    if config.format == "auto":
        notes.append(_why(config))
    if config.format in _ON_A_CPU:
        notes.append(f"a CPU has no product with {storage(config.format)}: {_ON_A_CPU[config.format]}")
    receipt = Receipt(
        settings=config.model_dump(mode="json"),
        changed=tuple(changes),
        skipped=(*skips, Skip(what="norms, biases, positions", why="few numbers, and the scale of all others")),
        bytes_before=stored_bytes(draft.model),
        bytes_after=stored_bytes(model),
        parameters_before=parameter_count(draft.model),
        parameters_after=parameter_count(model),
        notes=tuple(notes),
    )
    if formats:
        table = None if present is None else present.table
        quantization = QuantizationConfig(layers=formats, table=table)
        draft.settings = draft.settings.model_copy(update={"quantization": quantization})
    if formats or config.fine_tune_epochs:
        draft.model = model.eval()
    return receipt


class _Calibration:
    """Real histories and how they are sampled; the same noise for every model."""

    def __init__(self, histories: Jagged, keys: Tensor, steps: Steps, seed: int) -> None:
        self.histories, self.keys, self.steps, self.seed = histories, keys, steps, seed

    @classmethod
    def of(cls, draft: Draft, config: QuantizeConfig) -> _Calibration:
        examples = draft.validation("quantize")
        generator = torch.Generator().manual_seed(draft.seed)
        rows = torch.randperm(len(examples), generator=generator)[: config.calibration_users]
        return cls(examples.histories.select(rows), examples.users[rows], draft.settings.serving, draft.seed)

    def outputs(self, model: SequenceModel) -> Tensor:
        """``x0_hat`` of every history, `[U, D]`."""
        return CachedEngine(model).represent(self.histories, self.steps, self.seed, row_keys=self.keys)


def _choose(
    draft: Draft, model: SequenceModel, config: QuantizeConfig
) -> tuple[list[Change], list[Skip], dict[str, LayerFormat]]:
    """Round every layer alone, measure, and put it back."""
    changes: list[Change] = []
    skips: list[Skip] = []
    formats: dict[str, LayerFormat] = {}
    calibration = None if draft.dataset is None else _Calibration.of(draft, config)
    exact = None if calibration is None else calibration.outputs(model)
    for name, layer in linear_layers(model).items():
        detail: dict[str, float | int | str] = {}
        reasons = []
        for layer_format in config.formats(name):
            try:
                rounded = quantized_linear(layer, layer_format)
            except (CompressionError, ConfigError) as error:
                raise CompressionError(f"layer {name}: {error}") from None
            own = decibels(sqnr_db(layer.weight, rounded.weight))
            measured: dict[str, float | int | str] = {"sqnr_db": own}
            if calibration is not None and exact is not None:
                model.set_submodule(name, rounded)
                left = sqnr_db(exact, calibration.outputs(model))
                model.set_submodule(name, layer)
                measured["output_sqnr_db"] = decibels(left)
                if left < config.min_sqnr:
                    reasons.append(
                        f"{layer_format.format} leaves {left:.1f} dB in x0_hat, less than {config.min_sqnr:g}"
                        f" (min_sqnr); the weights themselves keep {own} dB"
                    )
                    detail[f"output_sqnr_db in {layer_format.format}"] = decibels(left)
                    continue
            formats[name] = layer_format
            computed = "" if layer_format.compute == "float32" else f", computed in {layer_format.compute}"
            after = layer_format.format + computed
            changes.append(Change(what=name, before="float32", after=after, detail=measured | detail))
            break
        else:
            skips.append(Skip(what=name, why="; ".join(reasons)))
    return changes, skips, formats


def _why(config: QuantizeConfig) -> str:
    able = " and ".join(name for name, has in (("bfloat16", has_bf16()), ("int8", has_vnni())) if has) or "neither"
    return (
        f"auto chose by {config.users} users a request: bfloat16 or integers pay from {AUTO_ROWS} rows on, and this CPU"
        f" has instructions for {able}"
    )


def _fine_tune(draft: Draft, model: SequenceModel, config: QuantizeConfig) -> str:
    """Train a float32 model with rounded weights in its layers; returns what happened."""
    # At use: training brings Lightning with it.
    from compress.distillation import Lessons, TaughtBatch, fit

    dataset: Dataset = draft.require_dataset("quantize with fine_tune_epochs")
    if quantization_of(model) is not None:
        raise CompressionError("the item table is quantised already; fine-tune before the stage 'item_table'")
    train = draft.settings.train or TrainConfig()
    names = list(linear_layers(model))
    prepare_training(model, names, config.layer_format(names[0]))

    def objective(student: SequenceModel, average: SequenceModel, batch: TaughtBatch) -> Tensor:
        tokens = batch.tokens
        if not isinstance(student, ADRec):
            return catalogue_cross_entropy(student(tokens), student.table, tokens.targets, train.logits_budget)
        options = student.config
        noise = draw_token_noise(
            tokens.layout,
            options.width,
            options.timesteps,
            independent=options.independent_noise,
            condition_dropout=options.condition_dropout,
        )
        x0_hat = student(tokens, noise)
        ranking = catalogue_cross_entropy(x0_hat, student.table, tokens.targets, train.logits_budget)
        closeness = reconstruction_loss(x0_hat, student.clean_target(tokens.targets), tokens.layout)
        return 0.5 * (ranking + train.loss_scale * closeness)

    epochs = config.fine_tune_epochs
    fitted = fit(
        model,
        dataset,
        Lessons(dataset.training_sequences(), model.config.max_length),
        objective,
        seed=draft.seed,
        batch_size=train.batch_size,
        optimiser=OptimiserConfig(
            learning_rate=config.fine_tune_learning_rate, epochs=epochs, cosine_epochs=epochs, validate_every=1
        ),
        stage=_STAGE,
        steps=draft.settings.serving or 1,
        report=draft.report,
    )
    finish_training(model, names)
    return (
        f"fine-tuned for {fitted.epochs} epochs with rounded weights: validation NDCG@20 {fitted.before:.2f} before,"
        f" {fitted.reached:.2f} % in the epoch kept ({fitted.epoch})"
    )
