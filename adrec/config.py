"""Configuration of models and training, validated by pydantic.

The defaults are the paper's where they say nothing else. Those that differ were chosen on Beauty (docs/accuracy.md says
how); ``bench/recipes/paper.yaml`` restores the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from adrec.errors import ConfigError, nearest
from adrec.schedule import ScheduleName, diffusion_table, named_betas

Positions = Literal["none", "learned", "released"]
Sampler = Literal["ddpm", "ddim", "dpm++2m"]
LayerFormatName = Literal["int8", "int8-dynamic", "int4", "fp8", "fp8-dynamic", "bf16"]
TableFormatName = Literal["int8", "int4", "fp8", "bf16"]


class StrictModel(BaseModel):
    """Frozen settings that refuse unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="wrap")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        # pydantic would take true for 1, and YAML reads yes and on as true.
        valid = validate(value)
        if isinstance(value, bool) and type(valid) in (int, float):
            raise ValueError("allowed: a number; YAML reads yes, no, on, off, true and false as true or false")
        return valid


class ModelConfig(StrictModel):
    """What the network computes (ADRec, arXiv 2505.19544; SASRec+, arXiv 1808.09781 with full cross-entropy)."""

    model: Literal["adrec", "sasrec"] = "adrec"
    items: int = Field(ge=1, description="N, the size of the catalogue without the padding row")
    width: int = Field(128, ge=2, le=4096, description="D, even and divisible by heads")
    heads: int = Field(4, ge=1)
    max_length: int = Field(50, ge=1, description="the most recent items of a history that are read")
    encoder_blocks: int = Field(2, ge=1)
    denoiser: Literal["att", "mlp"] = "att"
    denoiser_blocks: int = Field(2, ge=1)
    dropout: float = Field(0.3, ge=0.0, lt=1.0, description="paper: 0.1")
    embedding_dropout: float = Field(0.5, ge=0.0, lt=1.0, description="paper: 0.3")
    padding: Literal["released", "masked"] = Field(
        "released", description="released: real positions attend to the padding, as the published weights do"
    )
    positions: Positions = Field(
        "none", description="learned: items carry positions counted from the end; released: padding carries them too"
    )
    timesteps: int = Field(32, ge=1, le=4095, description="T, the diffusion steps trained")
    schedule: ScheduleName = "trunc_lin"
    lambda_uncertainty: float = Field(0.001, ge=0.0, description="weight of x_t + e_t next to the condition")
    independent_noise: bool = Field(True, description="each token draws its own step; else one step a sequence")
    geodesic: bool = False
    condition_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="share of sequences trained without condition")
    guidance_scale: float = Field(1.0, ge=0.0, description="s of uncond + s (cond - uncond); 1 switches guidance off")

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width is {self.width}; allowed: even multiples of heads ({self.heads})")
        if self.model == "adrec":
            # A schedule that does not exist at T steps must be refused before stage 1 has been trained.
            try:
                diffusion_table(named_betas(self.schedule, self.timesteps))
            except ConfigError as error:
                raise ValueError(f"schedule and timesteps do not fit: {error}") from None
        if self.guidance_scale != 1.0 and self.condition_dropout == 0.0:
            raise ValueError(
                f"guidance_scale is {self.guidance_scale} but condition_dropout is 0: the model never learns the"
                " unconditional case; set condition_dropout (the released code uses 0.3) or guidance_scale 1"
            )
        return self

    def baseline(self, train: TrainConfig) -> ModelConfig:
        """The SASRec+ body of stage 1: same items, width, blocks and padding, no diffusion."""
        return self.model_copy(
            update={
                "model": "sasrec",
                "positions": train.pretrain_positions,
                "dropout": train.pretrain_dropout,
                "embedding_dropout": train.pretrain_embedding_dropout,
                "condition_dropout": 0.0,
                "guidance_scale": 1.0,
            }
        )


class OptimiserConfig(StrictModel):
    """Adam with cosine annealing over ``cosine_epochs`` (paper: 500), stopped early on validation NDCG@20."""

    learning_rate: float = Field(1e-3, gt=0.0)
    weight_decay: float = Field(1e-5, ge=0.0)
    average_decay: float = Field(
        0.998, ge=0.0, lt=1.0, description="decay per step of the weights' moving average, which is kept; 0: none"
    )
    epochs: int = Field(500, ge=1)
    cosine_epochs: int = Field(500, ge=1)
    validate_every: int = Field(2, ge=1, description="epochs between validations; paper: 5")
    patience: int = Field(5, ge=1, description="validations without improvement before stopping; paper: 4")


class TrainConfig(StrictModel):
    """The three stages of ADRec's training (paper section 4.4)."""

    seed: int = Field(0, ge=0, lt=2**31)
    batch_size: int = Field(128, ge=1, description="users a step, summed over all processes; paper: 512")
    pretrain: OptimiserConfig = OptimiserConfig()
    pretrain_positions: Positions = Field(
        "learned", description="positions of the stage-1 body, which is also the SASRec+ baseline"
    )
    pretrain_dropout: float = Field(0.2, ge=0.0, lt=1.0, description="dropout of the stage-1 body; paper: 0.1")
    pretrain_embedding_dropout: float = Field(0.4, ge=0.0, lt=1.0, description="likewise; paper: 0.3")
    main: OptimiserConfig = OptimiserConfig()
    warmup_epochs: int = Field(5, ge=0, description="epochs of stage 2, with the item table frozen")
    frozen_decay: bool = Field(
        False, description="let weight decay shrink the frozen table in stage 2, as the released code does by accident"
    )
    pcgrad: bool = Field(False, description="project conflicting gradients of the two losses")
    loss_scale: float = Field(1.0, ge=0.0, description="weight of the reconstruction loss")
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    logits_budget: int = Field(2**20, ge=1, description="logits held at a time by the chunked cross-entropy, elements")


class EarlyStop(StrictModel):
    """Stop a user's reverse process once the best items, in order, have not changed for ``patience`` steps in a row.

    Every step then ranks the catalogue: N D multiply-adds a user, as many as N / (12 D) transformer blocks. So it pays
    only for small catalogues or large denoisers whose lists settle early. At the paper's lambda they settle after two
    steps, where one gives the same; at larger ones they go on changing until late.
    """

    top: int = Field(20, ge=1, description="K, how many of the best items must stay")
    patience: int = Field(1, ge=1, description="steps in a row whose best K are those of the step before")


class ServingConfig(StrictModel):
    """How a run is sampled where the caller does not say.

    A run without these settings is served with one DDPM step, as before there were any.
    """

    sampler: Sampler = "ddpm"
    eta: float = Field(0.0, ge=0.0, le=1.0, description="of ddim: 0 is deterministic, 1 has DDPM's posterior variance")
    times: tuple[int, ...] | None = Field(None, min_length=1, description="trained steps kept, rising; null: all T")
    start: Literal["noise", "zero"] = Field(
        "noise", description="x_T: drawn, or zero, its mean; one step from zero draws nothing at all"
    )
    early_stop: EarlyStop | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ServingConfig:
        if self.eta != 0.0 and self.sampler != "ddim":
            raise ValueError(f"eta is {self.eta}, but only sampler 'ddim' has one; leave it out of '{self.sampler}'")
        times = self.times or (0,)
        if times[0] < 0 or any(after <= before for before, after in pairwise(times)):
            raise ValueError(f"times are {list(times)}; allowed: trained steps from 0 on, each above the one before")
        return self

    def count(self, trained_steps: int) -> int:
        """Reverse steps of these settings, for a model trained with ``trained_steps``."""
        return trained_steps if self.times is None else len(self.times)

    def check(self, model: ModelConfig) -> None:
        """Raise ConfigError where a model cannot be sampled like this."""
        if model.model != "adrec":
            raise ConfigError(
                f"a '{model.model}' model has no reverse steps, so it cannot be served by settings of them"
            )
        if self.times is not None and self.times[-1] >= model.timesteps:
            raise ConfigError(
                f"times hold {self.times[-1]}; allowed: 0 to {model.timesteps - 1}, the steps that were trained"
            )
        if self.early_stop is not None and self.early_stop.top > model.items:
            raise ConfigError(
                f"early_stop.top is {self.early_stop.top}; allowed: 1 to {model.items}, the size of the catalogue"
            )


class LayerFormat(StrictModel):
    """How a linear layer is stored, and what it computes with.

    int8: a scale for each output. int8-dynamic: the same weights, and inputs rounded to int8 row by row, so that the
    product is one of integers. int4: a scale for each group of inputs. fp8: e4m3 with a scale for each output.
    fp8-dynamic: the same weights, and inputs rounded to e4m3 row by row, so that the product is one of fp8 on a GPU
    that has it (compute capability 8.9 or newer); a CPU multiplies the rounded numbers in float32, which saves no time.
    All but the dynamic ones multiply by the numbers that the stored ones stand for, in ``compute``.
    """

    format: LayerFormatName
    group_size: int | None = Field(None, ge=2, description="inputs that share a scale, int4 only; divides the inputs")
    compute: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: inputs, weights and products rounded to it, sums in float32"
    )

    @model_validator(mode="after")
    def _consistent(self) -> LayerFormat:
        _check_group(self.format, self.group_size)
        if self.format.endswith("-dynamic") and self.compute != "float32":
            numbers = "integers" if self.format == "int8-dynamic" else "fp8"
            raise ValueError(f"compute is {self.compute}, but {self.format} computes with {numbers}; leave it out")
        return self


class ProductQuantization(StrictModel):
    """Candidates by 4-bit product quantisation of the item table (FAISS), scored exactly by the stored table."""

    subspaces: int = Field(ge=2, description="codes of 4 bits an item; even, divides the width")
    candidates: int = Field(10, ge=1, description="candidates for each result asked for")


class TableFormat(StrictModel):
    """How the item table is stored: a scale for each row (int8, fp8), or for each group of a row (int4)."""

    format: TableFormatName
    group_size: int | None = Field(None, ge=2, description="dimensions that share a scale, int4 only; divides D")
    product: ProductQuantization | None = None

    @model_validator(mode="after")
    def _consistent(self) -> TableFormat:
        _check_group(self.format, self.group_size)
        return self


def _check_group(name: str, group_size: int | None) -> None:
    if name == "int4" and group_size is None:
        raise ValueError("int4 needs group_size, such as 32")
    if name != "int4" and group_size is not None:
        raise ValueError(f"group_size is {group_size}, but only int4 has groups; leave it out of '{name}'")


class QuantizationConfig(StrictModel):
    """Formats of the linear layers, by name, and of the item table; what is not named is stored in float32."""

    layers: dict[str, LayerFormat] = Field(default_factory=dict)
    table: TableFormat | None = None

    @model_validator(mode="after")
    def _consistent(self) -> QuantizationConfig:
        if not self.layers and self.table is None:
            raise ValueError("neither layers nor table has a format; leave quantization out")
        return self


class RunConfig(StrictModel):
    """Contents of a run's ``config.yaml``."""

    schema_version: Literal[1] = 1
    model: ModelConfig
    train: TrainConfig | None = None
    serving: ServingConfig | None = None
    quantization: QuantizationConfig | None = None

    @model_validator(mode="after")
    def _servable(self) -> RunConfig:
        if self.serving is not None:
            try:
                self.serving.check(self.model)
            except ConfigError as error:
                raise ValueError(f"serving and model do not fit: {error}") from None
        return self


Settings = TypeVar("Settings", bound=StrictModel)


def parse(kind: type[Settings], values: Mapping[str, Any], where: str) -> Settings:
    """Validate ``values`` as ``kind``; raise ConfigError naming the key, the value and what is allowed."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {each}" for each in explanations(kind, error))) from None


class _Loader(yaml.SafeLoader):
    """The safe loader, which also refuses a key given twice; PyYAML keeps the last without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"key '{key.value}' is given a second time in line {line}; keep one")
                names.add(key.value)
        return node


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader; raise ConfigError when it is not one or gives a key twice."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    if values is None:
        raise ConfigError(f"{path}: is empty; expected settings, `key: value` lines")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}; expected a mapping of settings")
    return values


def explanations(kind: type[BaseModel], error: ValidationError) -> list[str]:
    """What is wrong, one sentence a key: the key, its value and what is allowed."""
    found: dict[tuple[str, ...], list[Any]] = {}
    owners: dict[tuple[str, ...], Any] = {}
    for issue in error.errors():
        path, owner = _place(kind, issue["loc"])
        found.setdefault(path, []).append(issue)
        owners[path] = owner
    # Of a value that may be one of several kinds, what is wrong inside of one kind says more.
    inner = [path for path in found if not any(path == other[: len(path)] != other for other in found)]
    return [_explain(".".join(path), owners[path], found[path]) for path in inner]


def _place(kind: Any, location: Sequence[int | str]) -> tuple[tuple[str, ...], Any]:
    """The names of a place and the settings it is in, without the names that pydantic gives to kinds of a union."""
    path: list[str] = []
    options, owner = [kind], kind
    for part in location:
        if len(options) > 1:
            options = [option for option in options if getattr(option, "__name__", None) == part]
            continue
        owner = options[0] if options else None
        path.append(str(part))
        if isinstance(owner, type) and issubclass(owner, BaseModel):
            field = owner.model_fields.get(str(part))
            options = [] if field is None else _kinds(field.annotation)
        else:
            options = [each for each in get_args(owner)[-1:] for each in _kinds(each)] if get_origin(owner) else []
    return tuple(path), owner


def _kinds(annotation: Any) -> list[Any]:
    """The types that an annotation allows, None left out."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for option in get_args(annotation) for kind in _kinds(option) if kind is not type(None)]
    return [annotation]


def _explain(key: str, owner: Any, issues: Sequence[Any]) -> str:
    issue = issues[0]
    key = key or "settings"
    if issue["type"] == "extra_forbidden":
        allowed = list(owner.model_fields)
        return f"unknown key '{key}'{nearest(key.split('.')[-1], allowed)}; allowed: {', '.join(allowed)}"
    if issue["type"] == "missing":
        return f"{key} is missing"
    sections = ("model_type", "model_attributes_type", "dict_type")
    reasons = [each["msg"].removeprefix("Value error, ").removeprefix("Input should be ") for each in issues]
    if issue["type"] in sections:
        others = "".join(f", or {reason}" for each, reason in zip(issues, reasons, strict=True) if each is not issue)
        return f"{key} is {issue['input']!r}; expected a section of settings (key: value lines){others}"
    # A whole section at odds with itself is not repeated: the reason names its values.
    value = key if isinstance(issue["input"], dict) else f"{key} is {issue['input']!r}"
    return f"{value}; {'' if issue['type'] == 'value_error' else 'allowed: '}{' or '.join(dict.fromkeys(reasons))}"
